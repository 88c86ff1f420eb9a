"""One stage on a GPU: inputs and outputs are device memory, bound by address. ONNX Runtime's CUDA provider and TensorRT look alike here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import Buffer, CudaDevice
from ppllava_edge.engines.backends.onnxruntime_stage import NUMPY_TYPE, first_line
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_library, import_onnxruntime

Values = dict[str, "Buffer | np.ndarray"]  # host arrays are small integers that steer a graph


class OrtDeviceStage:
    """A graph on ONNX Runtime, in the device's stream. provider: CUDA, or the CPU's, whose "device" memory is the host's (tests)."""

    captures = False  # its runs queue work of their own and can't be put into a CUDA graph of ours

    def __init__(self, path: Path, device: CudaDevice, on_cpu: bool = False):
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        cuda = ("CUDAExecutionProvider", {"user_compute_stream": str(device.stream)})
        try:
            self.session = ort.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"] if on_cpu else [cuda, "CPUExecutionProvider"],
            )
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {ort.__version__} can't open {path.name}: {first_line(error)}"
            ) from None
        if not on_cpu and "CUDAExecutionProvider" not in self.session.get_providers():
            raise EngineError(
                "ONNX Runtime could not start its CUDA provider (driver, CUDA or cuDNN missing); ppllava-doctor says what; or use --device cpu"
            )
        self.path, self.device, self.kind = path, device, "cpu" if on_cpu else "cuda"
        self.dtypes = {i.name: np.dtype(NUMPY_TYPE[i.type]) for i in self.session.get_inputs()}
        self.outputs = {o.name: np.dtype(NUMPY_TYPE[o.type]) for o in self.session.get_outputs()}

    def run(self, inputs: Values, outputs: dict[str, Buffer], profile: int = 0) -> None:
        """One run. Outputs that nobody wants are left to the engine."""
        with self.device.work:
            self._run(inputs, outputs)

    def _run(self, inputs: Values, outputs: dict[str, Buffer]) -> None:
        binding = self.session.io_binding()
        for name, dtype in self.dtypes.items():
            value = inputs[name]
            if isinstance(value, Buffer):
                binding.bind_input(name, self.kind, 0, dtype, list(value.shape), value.address)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype))
        for name, dtype in self.outputs.items():
            if name in outputs:
                binding.bind_output(
                    name, self.kind, 0, dtype, list(outputs[name].shape), outputs[name].address
                )
            else:
                binding.bind_output(name, self.kind)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"{self.path.name} failed: {first_line(error)}") from None


class TensorRTStage:
    """An engine of TensorRT or TensorRT-RTX. Its hash was checked before (find_engine): some of these libraries crash on damaged files."""

    captures = True

    def __init__(self, path: Path, device: CudaDevice, library: str, trt: Any = None):
        self.trt = trt or import_library(library)
        self.path, self.device = path, device
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(self._logger)
        device.enter()
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise EngineError(
                f"{library} can't open {path}: it was built by another version or for another GPU; rebuild it: ppllava-build "
                f"{path.parent.parent.parent} --target {path.parent.name} --force"
            )
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT for name in names}
        types = {name: np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))) for name in names}
        self.dtypes = {name: types[name] for name in names if is_input[name]}
        self.outputs = {name: types[name] for name in names if not is_input[name]}
        self._contexts: dict[int, Any] = {}
        self._unwanted: dict[str, Buffer] = {}
        self._host_values: dict[str, np.ndarray] = {}

    def _context(self, profile: int) -> Any:
        """An execution context of a profile: each keeps what it computes with."""
        if profile not in self._contexts:
            context = self.engine.create_execution_context()
            if context is None:
                raise EngineError(
                    f"{self.path.name}: the GPU has too little memory for what this engine computes with; build it with a smaller --capacity"
                )
            if profile and not context.set_optimization_profile_async(profile, self.device.stream):
                raise EngineError(
                    f"{self.path.name} has no profile {profile}; it was built by another version"
                )
            self._contexts[profile] = context
        return self._contexts[profile]

    def run(self, inputs: Values, outputs: dict[str, Buffer], profile: int = 0) -> None:
        """Queue one run on the device's stream. Raises EngineError for shapes outside the engine's profile."""
        with self.device.work:
            self.device.enter()
            self._queue(inputs, outputs, profile)

    def _queue(self, inputs: Values, outputs: dict[str, Buffer], profile: int) -> None:
        context = self._context(profile)
        for name in self.dtypes:
            value = inputs[name]
            if not context.set_input_shape(name, tuple(value.shape)):
                least, _, most = self.engine.get_tensor_profile_shape(name, profile)
                raise EngineError(
                    f"{self.path.name}: {name} is {tuple(value.shape)}; this engine was built for {tuple(least)} to {tuple(most)}"
                )
            if isinstance(value, Buffer):
                context.set_tensor_address(name, value.address)
            else:
                self._host_values[name] = np.ascontiguousarray(
                    value, self.dtypes[name]
                )  # must live until the run is done
                context.set_tensor_address(name, self._host_values[name].ctypes.data)
        for name, dtype in self.outputs.items():
            address = (
                outputs[name].address
                if name in outputs
                else self._unwanted_at(name, tuple(context.get_tensor_shape(name)), dtype)
            )
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(self.device.stream):
            raise EngineError(f"{self.path.name} failed on the GPU; see TensorRT's message above")

    def _unwanted_at(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
        """Memory for an output that nobody asked for: the engine writes it all the same."""
        size = int(np.prod([max(n, 1) for n in shape])) * dtype.itemsize
        if name not in self._unwanted or self._unwanted[name].nbytes < size:
            self._unwanted[name] = self.device.empty((size,), np.uint8)
        return self._unwanted[name].address
