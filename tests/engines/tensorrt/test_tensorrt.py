"""`ppllava-build --target orin | orin-jp6`, with TensorRT-RTX in place of full TensorRT."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.machine import gpu_facts
from ppllava_edge.engines.machine.gpu_facts import Gpu
from ppllava_edge.engines.targets.tensorrt import plan as tensorrt_plan
from ppllava_edge.engines.targets.tensorrt.builder import build_tensorrt
from ppllava_edge.engines.targets.tensorrt.plan import Options, plugin_form
from ppllava_edge.engines.targets.tensorrt.worker import Job, build

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'ppllava-edge[rtx]'")

MODULE = """
from tensorrt_rtx import *
import tensorrt_rtx as _real
__version__ = "{version}"

class Builder(_real.Builder):
    def create_builder_config(self):  # full TensorRT builds for the GPU of the machine
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(_real.ComputeCapability.SM89, 0)
        return config
"""


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a module `tensorrt` of some version for the workers, and a GPU that only this process sees."""

    def install(version: str) -> None:
        package = tmp_path / "modules" / "tensorrt"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(MODULE.format(version=version))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
        set_version(monkeypatch, version)
        monkeypatch.setattr(gpu_facts, "gpus", lambda: [Gpu("Orin", "8.7", 8 << 30, 4 << 30, 8, True)])

    return install


def set_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    versions = {"tensorrt": version}
    monkeypatch.setattr(tensorrt_plan, "installed_version", lambda library: versions.get(library, ""))


def nano(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "nano"))


def assert_built_for(engine: Engine, target: str, version: str) -> None:
    assert (engine.target, engine.library, engine.made_by) == (target, "tensorrt", {"tensorrt": version})
    assert engine.details["device"] == "Orin"
    assert engine.details["capabilities"] == ["8.7"]


@pytest.mark.slow
def test_orin(tmp_path: Path, tensorrt: Any) -> None:
    tensorrt("10.16.1")
    bundle = nano(tmp_path)
    options = Options(plugin="none", workspace=64 << 20, piece_bytes=600_000)
    engine, reports = build_tensorrt(bundle, "orin", options)
    assert_built_for(engine, "orin", "10.16.1")
    assert engine.cache == "in place"
    assert len(engine.stages["decoder"]) > 1
    assert all(report.bytes for report in reports)
    timings = bundle.path / "engines" / ".orin.timing"
    assert timings.stat().st_size > 0, "kernel timings are kept for the next build"


def test_orin_on_jetpack_6(tmp_path: Path, tensorrt: Any) -> None:
    tensorrt("10.3.0")
    bundle = nano(tmp_path)
    with pytest.raises(EngineError, match="use --target orin-jp6"):
        build_tensorrt(bundle, "orin", Options())
    engine, _ = build_tensorrt(bundle, "orin-jp6", Options(plugin="none", piece_bytes=600_000))
    assert_built_for(engine, "orin-jp6", "10.3.0")
    assert engine.cache == "concatenated"
    assert len(engine.stages["decoder"]) > 1


def test_without_a_gpu_full_tensorrt_builds_nothing(
    tmp_path: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt("10.16.1")
    monkeypatch.setattr(gpu_facts, "gpus", list)
    with pytest.raises(EngineError, match="builds on the GPU that it builds for"):
        build_tensorrt(nano(tmp_path), "orin", Options())


def test_form_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    set_version(monkeypatch, "10.3.0")
    assert plugin_form("auto", "orin-jp6", "tensorrt") == "python"
    assert plugin_form("none", "orin", "tensorrt") == "none"
    set_version(monkeypatch, "10.16.1")
    assert plugin_form("auto", "orin", "tensorrt") == "aot"
    assert plugin_form("auto", "rtx", "tensorrt_rtx") == "python"
    with pytest.raises(EngineError, match="can't carry a kernel"):
        plugin_form("aot", "rtx", "tensorrt_rtx")


def test_a_failed_tensorrt_build_shows_the_last_message(tmp_path: Path) -> None:
    """The error has TensorRT's last message; a build that returns no plan writes no engine."""
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
