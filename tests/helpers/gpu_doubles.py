"""Doubles of a GPU: a CUDA driver over host memory, and a TensorRT whose engines run on ONNX Runtime's CPU.

Addresses, shapes, profiles, aliased caches and captured graphs are real: every binding is read and written.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine, engine_folder, fingerprint, write_engine
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.lower import lower, without_small_attention
from ppllava_edge.engines.targets.profiles import limits, profiles
from ppllava_edge.engines.targets.tensorrt.graphs import decoder_pieces


def at(address: int, size: int) -> np.ndarray:
    """Bytes of host memory, in place."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))[:size]


class FakeDriver:
    """cuda.bindings.driver over host memory.

    While a stream is being captured, work is recorded, not executed. New memory is filled with 0xFF, which is
    NaN.
    """

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, memory: int = 1 << 40, devices: int = 1):
        self.memory, self.devices = memory, devices
        self.alive: dict[int, Any] = {}
        self.used = 0
        self.recording: list[Callable[[], None]] | None = None
        self.graphs, self.launches, self.allocations = list[list[Callable[[], None]]](), 0, 0
        self.to_host = list[int]()  # bytes of each copy to the host

    def do(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cuInit(self, flags: int) -> tuple:
        return (0, None)

    cuCtxSetCurrent = cuEventRecord = cuEventSynchronize = lambda self, *_: (0, None)

    def cuDeviceGetCount(self) -> tuple:
        return 0, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple:
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple:
        return 0, 1

    def cuStreamCreate(self, flags: int) -> tuple:
        return 0, 7

    def cuEventCreate(self, flags: int) -> tuple:
        return 0, object()

    def cuMemGetInfo(self) -> tuple:
        return 0, self.memory - self.used, self.memory

    def cuMemAlloc(self, size: int) -> tuple:
        if self.used + size > self.memory:
            return 2, None
        assert self.recording is None, "memory is never made while a step is captured"
        block = np.full(size + 64, 0xFF, np.uint8)
        address = -(-block.ctypes.data // 64) * 64
        self.alive[address], self.used, self.allocations = (
            (block, size),
            self.used + size,
            self.allocations + 1,
        )
        return 0, address

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple:
        block = np.zeros(size, np.uint8)
        self.alive[block.ctypes.data] = (block, 0)
        return 0, block.ctypes.data

    def cuMemFree(self, address: int) -> tuple:
        self.used -= self.alive.pop(address)[1]
        return (0, None)

    cuMemFreeHost = cuMemFree

    def _copy(self, into: int, source: int, size: int, stream: Any) -> tuple:
        self.do(lambda: ctypes.memmove(into, source, size) and None)
        return (0, None)

    cuMemcpyHtoDAsync = cuMemcpyDtoDAsync = _copy

    def cuMemcpyDtoHAsync(self, into: int, source: int, size: int, stream: Any) -> tuple:
        assert self.recording is None, "nothing is copied to the host while a step is captured"
        self.to_host.append(size)
        return self._copy(into, source, size, stream)

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: Any) -> tuple:
        self.do(lambda: at(address, size).fill(value))
        return (0, None)

    def cuStreamSynchronize(self, stream: Any) -> tuple:
        assert self.recording is None, "nobody waits while a step is captured"
        return (0, None)

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple:
        self.recording = []
        return (0, None)

    def cuStreamEndCapture(self, stream: Any) -> tuple:
        work, self.recording = self.recording, None
        return 0, work

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple:
        self.graphs.append(graph)
        return 0, graph

    def cuGraphLaunch(self, graph: Any, stream: Any) -> tuple:
        self.launches += 1
        for work in graph:
            work()
        return (0, None)

    cuGraphDestroy = cuGraphExecDestroy = cuEventDestroy = cuStreamDestroy = lambda self, *_: (0, None)

    def cuGetErrorString(self, status: Any) -> tuple:
        return 0, b"a made-up error"


class FakeTensorRT:
    """The part of TensorRT's runtime that TensorRTStage uses. An "engine" names a graph and its profiles."""

    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)

    def __init__(self, driver: FakeDriver):
        outer = self
        self.driver, self.enqueued = driver, 0
        self.fail = ""

        class Logger:
            ERROR = 1

            def __init__(self, level: int): ...

        class Runtime:
            def __init__(self, logger: Any): ...

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                return None if outer.fail == "deserialize" else _Engine(outer, json.loads(data))

        self.Logger, self.Runtime = Logger, Runtime

    @staticmethod
    def nptype(dtype: Any) -> Any:
        return dtype


_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class _Engine:
    def __init__(self, trt: FakeTensorRT, told: dict[str, Any]):
        self.trt, self.profiles = trt, told["profiles"]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(told["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.tensors = self.inputs | {o.name: o for o in self.session.get_outputs()}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> int:
        return 0 if name in self.inputs else 1

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self.tensors[name].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]

    def create_execution_context(self) -> Any:
        return None if self.trt.fail == "context" else _Context(self)


class _Context:
    def __init__(self, engine: _Engine):
        self.engine, self.profile = engine, 0
        self.shapes, self.addresses = dict[str, tuple[int, ...]](), dict[str, int]()

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        bounds = self.engine.profiles[self.profile].get(name)
        if bounds and name not in ("kernel", "stride"):
            least, _, most = bounds
            if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most)):
                return False
        elif not bounds and list(self.engine.inputs[name].shape) != list(shape):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else 8 for n in self.engine.tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.trt.fail == "execute":
            return False
        shapes, addresses, session = dict(self.shapes), dict(self.addresses), self.engine.session
        assert stream == 7 and set(addresses) == set(self.engine.tensors), (
            "every tensor is bound, on the device's stream"
        )
        for name in {"kernel", "stride"} & set(addresses):
            least, _, most = self.engine.profiles[self.profile][name]
            values = at(addresses[name], 24).view(np.int64).tolist()
            assert all(a <= v <= b for a, v, b in zip(least, values, most)), (
                f"{name} {values} was not built for"
            )
        self.engine.trt.enqueued += 1

        def work() -> None:
            feeds = {}
            for name, value in self.engine.inputs.items():
                dtype = np.dtype(_TYPES[value.type])
                size = int(np.prod(shapes[name], dtype=np.int64)) * dtype.itemsize
                feeds[name] = at(addresses[name], size).view(dtype).reshape(shapes[name]).copy()
            names = [o.name for o in session.get_outputs()]
            for name, result in zip(names, session.run(names, feeds)):
                result = np.ascontiguousarray(result)
                at(addresses[name], result.nbytes)[:] = result.reshape(-1).view(np.uint8)

        self.engine.trt.driver.do(work)
        return True


def write_fake_engine(
    bundle: Bundle,
    target: str,
    piece_bytes: int = 1 << 60,
    capacity: int | None = None,
    decoder_profiles: int = 2,
) -> Engine:
    """Write engines/<target> in the layout of build_tensorrt, with graphs instead of engines."""
    place = engine_folder(bundle.path, target)
    place.parent.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=place.parent))
    graphs_at = place.parent / f"{target}-graphs"
    shutil.rmtree(graphs_at, ignore_errors=True)
    graphs_at.mkdir()
    size = limits(bundle.manifest, capacity, None, decoder_profiles)
    stages: dict[str, tuple[str, ...]] = {}
    for file in bundle.manifest.required_files():
        if not file.endswith(".onnx"):
            continue
        stage, g = file.removesuffix(".onnx"), without_small_attention(Graph.read(bundle.file(file)))
        if stage == "decoder":
            graphs = decoder_pieces(g, bundle, target, size.capacity, piece_bytes)
        else:
            graphs = [lower(g) if target == "orin-jp6" else g]
        names = [stage] if len(graphs) == 1 else [f"{stage}-{i}" for i in range(len(graphs))]
        for name, graph in zip(names, graphs):
            graph.save(graphs_at / f"{name}.onnx", check=False)
            told = {
                "graph": str(graphs_at / f"{name}.onnx"),
                "profiles": profiles(stage, graph.inputs, bundle.manifest, size),
            }
            (work / f"{name}.engine").write_text(json.dumps(told))
        stages[stage] = tuple(f"{name}.engine" for name in names)
    library = "tensorrt_rtx" if target == "rtx" else "tensorrt"
    cache = "concatenated" if target == "orin-jp6" else "in place"
    details = {"capacity": size.capacity, "plugin": "none", "decoder_profiles": decoder_profiles}
    engine = Engine(
        place,
        target,
        fingerprint(bundle.manifest),
        {},
        bundle.manifest.decoder.kv_dtype,
        stages,
        {},
        library,
        cache,
        details,
    )
    return replace(write_engine(work, engine), folder=place)


class OnGpu:
    """An array on the GPU, as torch, CuPy and pycuda present it."""

    def __init__(self, array: np.ndarray):
        self.in_device_memory, self.shape = array, array.shape

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        a = self.in_device_memory
        return {
            "shape": a.shape,
            "typestr": a.dtype.str,
            "data": (a.ctypes.data, True),
            "strides": a.strides,
            "version": 3,
        }
