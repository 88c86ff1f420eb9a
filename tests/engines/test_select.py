"""The choice of a bundle's engine for a machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import SAMPLE
from helpers.gpu_doubles import FakeDriver, FakeTensorRT
from helpers.gpu_engine import QUESTIONS, Opened
from ppllava_edge import VideoQA
from ppllava_edge.engines.backends import tensorrt_stage
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.machine.gpu_facts import Gpu
from ppllava_edge.engines.targets import select
from ppllava_edge.runtime.pipeline.gpu import GpuPipeline


def test_the_fastest_engine_that_fits_is_chosen(
    opened: Callable[..., Opened], nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(nano)
    opened("cuda"), opened("orin-jp6")
    assert select.select(bundle, "cuda")[0].target == "orin-jp6"  # type: ignore[union-attr]
    opened("orin")
    assert select.select(bundle, "cuda")[0].target == "orin"  # type: ignore[union-attr]
    assert select.select(bundle, "cuda", "onnxruntime")[0].target == "cuda"  # type: ignore[union-attr]
    assert select.select(bundle, "cpu") == (None, "") and select.select(bundle, "cpu", "standard") == (
        None,
        "",
    )
    with pytest.raises(EngineError, match=re.escape("has no engine for rtx; build it: ppllava-build")):
        select.select(bundle, "cuda", "rtx")
    with pytest.raises(EngineError, match="doesn't run on the cpu; use device=cuda"):
        select.select(bundle, "cpu", "tensorrt")
    with pytest.raises(EngineError, match="engine 'fast' is unknown"):
        select.select(bundle, "cpu", "fast")


def test_a_gpu_engine_is_chosen_without_options(
    opened: Callable[..., Opened], nano: Path, monkeypatch: pytest.MonkeyPatch, want: list[str]
) -> None:
    """VideoQA(bundle) on a machine with a GPU; no ONNX Runtime with CUDA is needed for TensorRT."""
    from ppllava_edge.runtime.pipeline import factory
    from ppllava_edge.runtime.pipeline import gpu as gpu_pipeline

    opened("orin")
    driver = FakeDriver()
    trt = FakeTensorRT(driver)
    monkeypatch.setattr(tensorrt_stage, "import_library", lambda library: trt)
    monkeypatch.setattr(factory, "load_driver", lambda: driver)
    monkeypatch.setattr(gpu_pipeline, "CudaDevice", lambda: CudaDevice(driver))
    for device, engine in (("auto", "auto"), ("cuda", "tensorrt"), ("auto", "orin")):
        qa = VideoQA(nano, device=device, engine=engine)
        answer = qa.open(SAMPLE).ask(QUESTIONS[0])
        assert isinstance(qa.pipeline, GpuPipeline) and (answer.text, answer.engine) == (want[0], "orin")
    assert not isinstance(VideoQA(nano, device="cpu").pipeline, GpuPipeline)
    monkeypatch.setattr(factory, "load_driver", lambda: None)
    assert not isinstance(VideoQA(nano, device="auto").pipeline, GpuPipeline)
    with pytest.raises(EngineError, match="engine=tensorrt needs an NVIDIA GPU, and no driver was found"):
        VideoQA(nano, device="auto", engine="tensorrt")


def test_an_engine_of_another_gpu_is_refused(
    opened: Callable[..., Opened], nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    opened("orin")
    description = nano / "engines" / "orin" / "engine.json"
    told = json.loads(description.read_text())
    told["details"] |= {"capabilities": ["8.7"], "device": "Orin"}
    description.write_text(json.dumps(told))
    here = [Gpu("RTX 4090", "8.9", 24 << 30, None, 128, False)]
    monkeypatch.setattr("ppllava_edge.engines.machine.gpu_facts.gpus", lambda: here)
    with pytest.raises(
        EngineError, match=r"built for compute capability 8.7, this GPU \(RTX 4090\) has 8.9; rebuild it"
    ):
        select.select(Bundle.open(nano), "cuda", "tensorrt")
    here[0] = Gpu("Orin NX", "8.7", 16 << 30, None, 8, True)
    with pytest.raises(EngineError, match="built on Orin, this is Orin NX"):
        select.select(Bundle.open(nano), "cuda", "tensorrt")
    here[0] = Gpu("Orin", "8.7", 32 << 30, None, 16, True)
    assert select.select(Bundle.open(nano), "cuda", "tensorrt")[0] is not None
    told["made_by"] = {"tensorrt": "10.3.0"}
    description.write_text(json.dumps(told))
    with pytest.raises(EngineError, match=r"needs tensorrt 10\.3\.0, which is not installed"):
        select.select(Bundle.open(nano), "cuda", "tensorrt")
