"""The pooling plugin in TensorRT: built into real engines by TensorRT-RTX, run through test doubles."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.pool_host import FakeCudaCore, library, reference
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.plugin_node import with_plugin
from ppllava_edge.engines.plugins.weighted_pool import aot, kernel, tensorrt_plugin
from ppllava_edge.engines.plugins.weighted_pool.kernel import FOLDER, Call, Launcher

SHAPE, KERNEL, STRIDE = (4, 6, 6, 16), (2, 3, 3), (2, 3, 3)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library(tmp_path_factory.mktemp("kernel"))


@pytest.fixture
def fake(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    double = FakeCudaCore(host)
    monkeypatch.setattr(kernel, "import_cuda_core", lambda: double)
    kernel.compile_kernels.cache_clear()
    yield double
    kernel.compile_kernels.cache_clear()


def pooling_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal(SHAPE).astype(np.float32)
    weights = rng.random(SHAPE[:3]).astype(np.float32)
    call = Call(SHAPE[:3], SHAPE[3], KERNEL, STRIDE, 0.1, "float32", gelu=True)
    return hidden, weights, reference(hidden, weights, call)


# -- the node ------------------------------------------------------------------------------------------------


def test_the_node_has_gelu_and_windows_as_attributes() -> None:
    bundle = Bundle.open(packed_bundle())
    before = Graph.read(bundle.file("pooling.onnx"))
    g = with_plugin(before, KERNEL, STRIDE)
    node = next(n for n in g.nodes if n.op_type == "PromptGuidedPool3d")
    attributes = {a.name: a for a in node.attribute}
    assert list(attributes["kernel"].ints) == list(KERNEL)
    assert attributes["gelu"].i == 1
    assert attributes["plugin_namespace"].s == b"ppllava_edge"
    assert len(node.input) == 2 and {v.name for v in g.inputs} == {"features", "weights"}
    assert "Gelu" not in {n.op_type for n in g.nodes}
    assert "Gelu" in {n.op_type for n in before.nodes}, "the original graph isn't changed"
    assert set(g.weights) == set(before.weights)


def test_unguided_pooling_has_no_plugin() -> None:
    with pytest.raises(EngineError, match="not guided"):
        with_plugin(Graph("pooling"), KERNEL, STRIDE)


# -- Python --------------------------------------------------------------------------------------------------

BUILD = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
import onnx
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.plugins.weighted_pool import tensorrt_plugin
from ppllava_edge.engines.targets.profiles import limits, profiles
from ppllava_edge.engines.targets.tensorrt.worker import Job, build
if sys.argv[3] == "python":
    tensorrt_plugin.register(trt)
    tensorrt_plugin.register(trt)  # again is harmless
elif sys.argv[3] != "none":
    assert trt.get_plugin_registry().load_library(sys.argv[3])
manifest = Bundle.open(sys.argv[2]).manifest
inputs = onnx.load(sys.argv[1], load_external_data=False).graph.input
shapes = profiles("pooling", inputs, manifest, limits(manifest))
plan = build(Job(sys.argv[1], "", "tensorrt_rtx", shapes, ["8.9"]))
print(len(plan), plan.count(b"PromptGuidedPool3d"))
"""


def build_with_plugin(folder: Path, plugin: str) -> subprocess.CompletedProcess[str]:
    """Build nano's pooling graph with the plugin's node, in a process that finds the unversioned library."""
    import tensorrt_rtx_libs

    pooling = Graph.read(Bundle.open(packed_bundle()).file("pooling.onnx"))
    with_plugin(pooling, KERNEL, STRIDE).save(folder / "pooling.onnx", check=False)
    versioned = Path(tensorrt_rtx_libs.__file__).with_name("libtensorrt_rtx.so.1")
    (folder / "libtensorrt_rtx.so").symlink_to(versioned)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    command = [sys.executable, "-c", BUILD, str(folder / "pooling.onnx"), str(packed_bundle()), plugin]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_an_engine_with_the_python_plugin_builds(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = build_with_plugin(tmp_path, "python")
    assert run.returncode == 0, run.stderr
    size, mentioned = map(int, run.stdout.split())
    assert size > 10_000 and mentioned


def test_without_the_plugin_its_node_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = build_with_plugin(tmp_path, "none")
    assert run.returncode != 0 and "PromptGuidedPool3d" in run.stderr


def test_the_python_plugin_runs(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create from fields, serialise, create again, clone; then run once over host memory."""
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt_plugin, "_launcher", Launcher)
    creator = tensorrt_plugin.creator_class(trt)()
    fields = tensorrt_plugin.plugin_fields(trt, KERNEL, STRIDE, [0.1], [1])
    plugin = creator.create_plugin("pool", fields, None)
    plugin = creator.create_plugin("pool", plugin.get_fields_to_serialize(), None).attach_to_context(None)
    hidden, weights, want = pooling_case()
    out = np.full(want.shape, np.nan, np.float32)
    description = SimpleNamespace(dims=SHAPE, type=trt.DataType.FLOAT)
    plugin.enqueue([description], None, [hidden.ctypes.data, weights.ctypes.data], [out.ctypes.data], None, 5)
    np.testing.assert_allclose(out, want, atol=1e-5)
    linear = trt.TensorFormat.LINEAR

    def takes(*types: Any, format: Any = linear) -> bool:
        described = [SimpleNamespace(desc=SimpleNamespace(type=t, format=format)) for t in types]
        return all(plugin.supports_format_combination(i, described, 2) for i in range(3))

    kinds = trt.DataType
    assert takes(kinds.HALF, kinds.FLOAT, kinds.HALF) and takes(kinds.BF16, kinds.FLOAT, kinds.BF16)
    assert not takes(kinds.HALF, kinds.HALF, kinds.HALF)
    assert not takes(kinds.HALF, kinds.FLOAT, kinds.FLOAT)
    assert not takes(kinds.INT8, kinds.FLOAT, kinds.INT8)
    assert not takes(kinds.HALF, kinds.FLOAT, kinds.HALF, format=trt.TensorFormat.CHW4)
    two_axes = tensorrt_plugin.plugin_fields(trt, (2, 3), STRIDE, [0.1], [1])
    with pytest.raises(EngineError, match="whole numbers"):
        creator.create_plugin("pool", two_axes, None)


def test_a_plugin_name_that_is_already_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    double = SimpleNamespace(
        **{name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")},
        __name__="double",
        __version__="0",
    )
    double.get_plugin_registry = lambda: SimpleNamespace(register_creator=lambda creator, namespace: False)
    with pytest.raises(EngineError, match="refuses the pooling plugin"):
        tensorrt_plugin.register(double)


# -- ahead of time -------------------------------------------------------------------------------------------


class Size(int):
    """A known dimension, with the interface of TensorRT's symbolic ones."""

    def constant_value(self) -> int:
        return int(self)


def test_the_embedded_kernel_is_launched_like_the_direct_one(
    fake: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: dict[str, Any] = {}

    class Sequence(list):
        def __init__(self, length: int):
            super().__init__([None] * length)

        from_tuple = staticmethod(list)

    trtp = SimpleNamespace(
        register=lambda name: lambda function: registered.update(describe=function),
        aot_impl=lambda name: lambda function: registered.update(implement=function),
        TensorDesc=object,
        ShapeExprs=Sequence,
        SymIntExprs=Sequence,
        SymInt32=int,
        KernelLaunchParams=SimpleNamespace,
    )
    kinds = SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16")
    trt = SimpleNamespace(
        __name__="tensorrt double",
        DataType=kinds,
        NetworkDefinitionCreationFlag=SimpleNamespace(PREFER_AOT_PYTHON_PLUGINS=1),
    )
    monkeypatch.setattr(aot, "registered", {})
    monkeypatch.setattr(aot, "compile_kernels", lambda capability, form: SimpleNamespace(code=b"// ptx"))
    older = SimpleNamespace(**{**vars(trt), "NetworkDefinitionCreationFlag": SimpleNamespace()})
    assert aot.is_available(trt, trtp)
    assert not aot.is_available(trt, None)
    assert not aot.is_available(older, trtp)
    aot.register_aot(trt, trtp, (8, 9))
    aot.register_aot(trt, trtp, (8, 9))
    hidden, weights, want = pooling_case()
    described = SimpleNamespace(
        dtype="float", shape_expr=[Size(n) for n in SHAPE], like=lambda: SimpleNamespace(dtype="float")
    )
    window_weights = SimpleNamespace(shape_expr=[Size(n) for n in SHAPE[:3]])
    attributes = (np.array(KERNEL, np.int32), np.array(STRIDE, np.int32), np.float32(0.1), 1)
    assert list(registered["describe"](described, window_weights, *attributes).shape_expr) == list(want.shape)
    name, code, launch, extra = registered["implement"](described, window_weights, *attributes, None, None)
    call = Call(SHAPE[:3], SHAPE[3], KERNEL, STRIDE, 0.1, "float32", gelu=True)
    assert (name, tuple(extra), (launch.grid_x, launch.grid_y, 1), launch.block_x) == (
        call.name,
        call.integers,
        call.grid,
        kernel.THREADS,
    )
    assert code == b"// ptx"
    out = np.full(want.shape, np.nan, np.float32)
    getattr(host, name)(
        ctypes.c_void_p(hidden.ctypes.data),
        ctypes.c_void_p(weights.ctypes.data),
        *extra,
        ctypes.c_void_p(out.ctypes.data),
    )
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_one_form_of_the_plugin_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "registered", {"x": object()})
    with pytest.raises(EngineError, match="in another process"):
        aot.register_aot(SimpleNamespace(__name__="x"), SimpleNamespace(), (8, 9))


# -- C++ -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not os.environ.get("TENSORRT_INCLUDE") or not shutil.which("nvcc"),
    reason="needs nvcc, and TensorRT's C++ headers in TENSORRT_INCLUDE",
)
def test_the_library_compiles_and_builds_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = tmp_path / "libplugin.so"
    command = [
        "nvcc",
        "-std=c++17",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-arch=sm_87",
        "-isystem",
        os.environ["TENSORRT_INCLUDE"],
    ]
    run = subprocess.run(
        [*command, str(FOLDER / "tensorrt_plugin.cu"), "-o", str(built)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    run = build_with_plugin(tmp_path, str(built))
    assert run.returncode == 0 and int(run.stdout.split()[1]), run.stderr
