"""`ppllava-build --target orin | orin-jp6`: full TensorRT's place is taken by TensorRT-RTX, which parses and builds the same graphs here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.machine import gpu_facts
from ppllava_edge.engines.machine.gpu_facts import Gpu
from ppllava_edge.engines.targets import tensorrt as tensorrt_target
from ppllava_edge.engines.targets.tensorrt import Options, build_tensorrt
from ppllava_edge.engines.targets.tensorrt_worker import Job, build

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'ppllava-edge[rtx]'")

MODULE = """
from tensorrt_rtx import *
import tensorrt_rtx as _real
__version__ = "{version}"

class Builder(_real.Builder):
    def create_builder_config(self):  # full TensorRT knows no compute capabilities: it builds for the GPU that is here
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(_real.ComputeCapability.SM89, 0)
        return config
"""


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `tensorrt` of some version for the workers, and a GPU that only this process sees."""

    def install(version: str) -> None:
        (tmp_path / "modules" / "tensorrt").mkdir(parents=True, exist_ok=True)
        (tmp_path / "modules" / "tensorrt" / "__init__.py").write_text(MODULE.format(version=version))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
        monkeypatch.setattr(
            tensorrt_target, "installed_version", lambda library: version if library == "tensorrt" else ""
        )
        monkeypatch.setattr(gpu_facts, "gpus", lambda: [Gpu("Orin", "8.7", 8 << 30, 4 << 30, 8, True)])

    return install


def nano(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "nano"))


def built_for(engine: Engine, target: str, version: str) -> None:
    assert (engine.target, engine.library, engine.made_by) == (target, "tensorrt", {"tensorrt": version})
    assert engine.details["device"] == "Orin" and engine.details["capabilities"] == ["8.7"]


def test_orin(tmp_path: Path, tensorrt: Any) -> None:
    tensorrt("10.16.1")
    bundle = nano(tmp_path)
    engine, made = build_tensorrt(
        bundle, "orin", Options(plugin="none", workspace=64 << 20, piece_bytes=600_000)
    )
    built_for(engine, "orin", "10.16.1")
    assert engine.cache == "in place" and len(engine.stages["decoder"]) > 1 and all(one.bytes for one in made)
    assert (bundle.path / "engines" / ".orin.timing").stat().st_size > 0, (
        "times of kernels are kept for the next build"
    )


def test_orin_on_jetpack_6(tmp_path: Path, tensorrt: Any) -> None:
    tensorrt("10.3.0")
    bundle = nano(tmp_path)
    with pytest.raises(EngineError, match="use --target orin-jp6"):
        build_tensorrt(bundle, "orin", Options())
    engine, _ = build_tensorrt(bundle, "orin-jp6", Options(plugin="none", piece_bytes=600_000))
    built_for(engine, "orin-jp6", "10.3.0")
    assert engine.cache == "concatenated" and len(engine.stages["decoder"]) > 1


def test_without_a_gpu_there_is_nothing_to_build_for(
    tmp_path: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt("10.16.1")
    monkeypatch.setattr(gpu_facts, "gpus", list)
    with pytest.raises(EngineError, match="builds on the GPU that it builds for"):
        build_tensorrt(nano(tmp_path), "orin", Options())


def test_which_form_the_plugin_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_target, "installed_version", lambda library: "10.3.0")
    assert (
        tensorrt_target._plugin("auto", "orin-jp6", "tensorrt") == "python"
        and tensorrt_target._plugin("none", "orin", "tensorrt") == "none"
    )
    monkeypatch.setattr(tensorrt_target, "installed_version", lambda library: "10.16.1")
    assert (
        tensorrt_target._plugin("auto", "orin", "tensorrt") == "aot"
        and tensorrt_target._plugin("auto", "rtx", "tensorrt_rtx") == "python"
    )
    with pytest.raises(EngineError, match="can't carry a kernel"):
        tensorrt_target._plugin("aot", "rtx", "tensorrt_rtx")


def test_a_library_that_gives_up(tmp_path: Path) -> None:
    """What TensorRT said last is in the error; a build that ends without a plan is no engine."""
    from types import SimpleNamespace

    import tensorrt_rtx as real

    class Builder:
        def __init__(self, logger: Any):
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            return SimpleNamespace(num_inputs=0)

        def create_builder_config(self) -> Any:
            return SimpleNamespace()

        def build_serialized_network(self, network: Any, config: Any) -> None:
            self.logger.log(real.ILogger.ERROR, "no tactic fits")

    parser = SimpleNamespace(parse_from_file=lambda path: True)
    names = {name: getattr(real, name) for name in ("ILogger", "NetworkDefinitionCreationFlag")}
    library = SimpleNamespace(
        **names,
        Builder=Builder,
        OnnxParser=lambda network, logger: parser,
        __name__="tensorrt",
        __version__="10.16",
    )
    with pytest.raises(EngineError, match=r"TensorRT 10\.16 could not build a\.onnx: no tactic fits"):
        build(Job("a.onnx", "", "tensorrt", []), library)
