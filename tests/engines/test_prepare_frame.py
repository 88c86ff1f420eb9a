"""Frames in GPU memory are prepared bit for bit as by Pillow on the host.

The kernels' host build runs over test doubles of the CUDA driver and cuda-core.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.gpu_doubles import FakeDriver, OnGpu
from helpers.pool_host import FakeCudaCore, library
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.engines.plugins.prepare_frame import kernel
from ppllava_edge.runtime.vision import preprocess
from ppllava_edge.runtime.vision.preprocess import preprocess_video

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> FakeCudaCore:
    return FakeCudaCore(library(tmp_path_factory.mktemp("prepare"), kernel.FOLDER))


def rows_first(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize rows first, as Pillow up to 12; version 13 takes columns first for some shapes."""
    narrowed = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return narrowed.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", autouse=True)
def doubles(core: FakeCudaCore) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_resize", rows_first)
        patch.setattr(kernel, "import_cuda_core", lambda: core)
        kernel.compile_kernels.cache_clear()
        yield
    kernel.compile_kernels.cache_clear()


def preprocessing(size: int, method: str) -> Preprocessing:
    return Preprocessing(method, size, MEAN, STD, ())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 90),
    st.integers(8, 90),
    st.integers(8, 60),
    st.sampled_from(["squash", "pad"]),
    st.integers(0, 2**31),
)
def test_the_same_pixels_as_on_the_host(height: int, width: int, size: int, method: str, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    p = preprocessing(size, method)
    pixels, picture = kernel.FramePreparer(CudaDevice(FakeDriver()), p).prepare(OnGpu(image))
    np.testing.assert_array_equal(np.asarray(pixels), preprocess_video([image], p))
    assert picture.shape == (size, size, 3)
    half, _ = kernel.FramePreparer(CudaDevice(FakeDriver()), p, np.float16).prepare(OnGpu(image))
    np.testing.assert_array_equal(np.asarray(half), preprocess_video([image], p).astype(np.float16))


@pytest.mark.parametrize("shape", [(1080, 1920), (720, 1280), (240, 320), (336, 336), (100, 2000)])
def test_real_sizes(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    for size, method in ((336, "squash"), (384, "pad")):
        p = preprocessing(size, method)
        pixels, picture = kernel.FramePreparer(CudaDevice(FakeDriver()), p).prepare(OnGpu(image))
        np.testing.assert_array_equal(np.asarray(pixels), preprocess_video([image], p))
        if method == "squash":
            want = rows_first(Image.fromarray(image), size, size)
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(want))


def test_strided_frames() -> None:
    """Part of a larger picture, one with alpha, one upside down, one in planes."""
    base = np.random.default_rng(2).integers(0, 256, (60, 80, 4), np.uint8)
    p = preprocessing(28, "squash")
    planar = np.ascontiguousarray(base[..., :3].transpose(2, 0, 1)).transpose(1, 2, 0)
    for image in (base[5:50, 7:70, :3], base, base[::-1, :, :3], planar):
        pixels, _ = kernel.FramePreparer(CudaDevice(FakeDriver()), p).prepare(OnGpu(image))
        want = preprocess_video([np.ascontiguousarray(image[..., :3])], p)
        np.testing.assert_array_equal(np.asarray(pixels), want)


def test_other_arrays_are_refused() -> None:
    preparer = kernel.FramePreparer(CudaDevice(FakeDriver()), preprocessing(28, "squash"))
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((9, 9, 3), np.float32), np.zeros((9, 9, 2), np.uint8)):
        with pytest.raises(MediaError, match="must be RGB uint8"):
            preparer.prepare(OnGpu(wrong))
    with pytest.raises(MediaError, match="can't be taken from the GPU"):
        preparer.prepare(SimpleNamespace(in_device_memory="nothing"))
    frame = np.zeros((9, 9, 3), np.uint8)
    assert kernel.is_device_frame(OnGpu(frame))
    assert not kernel.is_device_frame(frame)
    on_gpu, on_cpu = (SimpleNamespace(__dlpack_device__=lambda kind=kind: (kind, 0)) for kind in (2, 1))
    assert kernel.is_device_frame(on_gpu)
    assert not kernel.is_device_frame(on_cpu)


def test_a_cpu_engine_refuses_device_frames() -> None:
    with (
        VideoQA(device="cpu").live() as live,
        pytest.raises(MediaError, match="is in GPU memory; engines on the CPU"),
    ):
        live.push(OnGpu(np.zeros((9, 9, 3), np.uint8)))


def test_nvrtc_compiles_the_kernels() -> None:
    core = pytest.importorskip("cuda.core", reason="NVRTC comes with the extra `cuda`")
    options = core.ProgramOptions(std="c++17", arch="sm_87")
    code = core.Program(kernel.source(), "c++", options).compile("cubin", name_expressions=kernel.KERNELS)
    assert len(code.code) > 10_000 and all(name.encode() in code.code for name in kernel.KERNELS)


def test_the_check_that_runs_on_a_gpu(core: FakeCudaCore) -> None:
    """bench/gpu.py, over the doubles."""
    from ppllava_edge.bench.gpu_report.kernel import frame_checks

    found = frame_checks(OnGpu, CudaDevice(FakeDriver()), runs=1)
    assert found["shapes"] == 5 and found["shapes_that_differ"] == 0 and found["microseconds_1080p"] > 0
