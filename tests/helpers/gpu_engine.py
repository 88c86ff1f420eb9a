"""A bundle's engine for a GPU target, on doubles of the driver and of TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.gpu_doubles import FakeDriver, FakeTensorRT, write_fake_engine
from ppllava_edge import VideoQA
from ppllava_edge.engines.backends import tensorrt_stage
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.targets.build import build_onnxruntime
from ppllava_edge.runtime import Pipeline
from ppllava_edge.runtime.pipeline.gpu import GpuPipeline

QUESTIONS = ("What color is the circle?", "Describe the video.", "How many objects are there?")
TARGETS = ("cuda", "orin", "orin-jp6")
Opened = tuple[GpuPipeline, FakeDriver, FakeTensorRT]


def open_double(
    folder: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    driver: FakeDriver | None = None,
    **options: Any,
) -> Opened:
    """A bundle's engine for a target, on doubles of driver and library."""
    bundle, driver = Bundle.open(folder), driver or FakeDriver()
    trt = FakeTensorRT(driver)
    monkeypatch.setattr(tensorrt_stage, "import_library", lambda library: trt)
    engine = (
        build_onnxruntime(bundle, target)
        if target == "cuda"
        else write_fake_engine(bundle, target, **options)
    )
    return GpuPipeline(bundle, engine, gpu=CudaDevice(driver), on_cpu=True), driver, trt


def asking(pipeline: Pipeline) -> VideoQA:
    qa = VideoQA(pipeline.bundle.path, device="cpu")
    qa.pipeline = pipeline
    return qa
