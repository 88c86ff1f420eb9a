"""The GPU backends over doubles give the original's arrays and the CPU's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import SAMPLE
from helpers.golden import VARIANTS, run_check
from helpers.gpu_engine import QUESTIONS, TARGETS, Opened, asking, open_double
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.runtime.pipeline.gpu import GpuPipeline


@pytest.mark.parametrize("target", ["cuda", "orin", pytest.param("orin-jp6", marks=pytest.mark.slow)])
@VARIANTS
def test_variant_matches_the_original(
    variant: int,
    target: str,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """check.py over every backend: video, images, all poolings, both families."""

    class Resident:
        @classmethod
        def open(cls, bundle: Path, device: str = "cpu") -> GpuPipeline:
            return open_double(bundle, target, monkeypatch)[0]

    monkeypatch.setattr("ppllava_edge.runtime.Pipeline", Resident)
    run_check(variant, exports, monkeypatch, capsys)


@pytest.mark.parametrize("target", TARGETS)
def test_nano_answers_the_same(opened: Callable[..., Opened], target: str, want: list[str]) -> None:
    pipeline, *_ = opened(target)
    pipeline.load()
    video = asking(pipeline).open(SAMPLE)
    assert [video.ask(question).text for question in QUESTIONS] == want


@pytest.mark.parametrize("target", ["orin", "orin-jp6"])
def test_one_profile_for_both_kinds_of_pass(
    opened: Callable[..., Opened], target: str, want: list[str]
) -> None:
    pipeline, *_ = opened(target, decoder_profiles=1)
    video = asking(pipeline).open(SAMPLE)
    assert [video.ask(question).text for question in QUESTIONS] == want


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_graphs_on_onnxruntime_cuda(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch, want: list[str]
) -> None:
    """MatMulNBits with float16 scales, activations left as floats."""
    from helpers.commands import run_command
    from ppllava_edge.engines.graphs.graph import Graph

    output = tmp_path / "b"
    run = run_command(
        "ppllava-export",
        packed_bundle(),
        "-o",
        output,
        "--precision",
        precision,
        "--weight-only",
        "--no-engine",
    )
    assert run.returncode == 0, run.stderr
    pipeline, *_ = open_double(output, "cuda", monkeypatch)
    kinds = {node.op_type for node in Graph.read(output / "engines" / "cuda" / "decoder.onnx").nodes}
    assert {"MatMulNBits", "GroupQueryAttention", "SimplifiedLayerNormalization"} <= kinds
    newest = {
        "TensorScatter",
        "Attention",
        "RMSNormalization",
        "RotaryEmbedding",
    }  # for which the provider may have no kernels
    for file in (output / "engines" / "cuda").glob("*.onnx"):
        kinds = {node.op_type for node in Graph.read(file).nodes}
        assert not kinds & {"DequantizeLinear", "QuantizeLinear", *newest}, file.name
    video = asking(pipeline).open(SAMPLE)
    assert [video.ask(question).text for question in QUESTIONS] == want


def test_our_kernel_pools_between_two_graphs(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, want: list[str]
) -> None:
    """engines/cuda with the pooling kernel, whose host build takes the GPU's place."""
    from helpers.pool_host import FakeCudaCore, library
    from ppllava_edge.engines.plugins.weighted_pool import kernel

    fake = FakeCudaCore(library(tmp_path))
    monkeypatch.setattr(kernel, "import_cuda_core", lambda: fake)
    kernel.compile_kernels.cache_clear()
    pipeline, *_ = opened("cuda")
    video = asking(pipeline).open(SAMPLE)
    assert [video.ask(question).text for question in QUESTIONS] == want
    assert [name for name, _ in fake.launches] == ["weighted_pool_f16_gelu"] * len(QUESTIONS)
    plain, *_ = opened("cuda")
    plain._launcher = False
    q = plain.encode_question(np.array([[1, 5, 9, 2]]))
    got, direct = (np.asarray(p.visual_tokens(video.features, q), np.float32) for p in (pipeline, plain))
    assert float((got * direct).sum() / np.linalg.norm(got) / np.linalg.norm(direct)) > 0.9999
    kernel.compile_kernels.cache_clear()


def test_frames_that_lie_on_the_gpu_stay_there(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera pipeline on the GPU pushes frames: only a small picture crosses to the host."""
    import av

    from helpers.gpu_doubles import OnGpu
    from helpers.pool_host import FakeCudaCore, library
    from ppllava_edge.engines.plugins.prepare_frame import kernel

    monkeypatch.setattr(kernel, "import_cuda_core", lambda: FakeCudaCore(library(tmp_path, kernel.FOLDER)))
    kernel.compile_kernels.cache_clear()
    with av.open(str(SAMPLE)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::5]
    pipeline, driver, _ = opened("orin")
    features = []
    for wrap in (OnGpu, np.asarray):
        with asking(pipeline).live(fps=4, window=16) as live:
            for i, frame in enumerate(frames):
                live.push(wrap(frame), i / 4, wait=True)
            assert live.wait_for(8, 30)
            if wrap is OnGpu:
                assert set(driver.to_host) == {108 * 108 * 3}
            features.append(np.asarray(live.video().features))
            assert live.ask("What color is the circle?").text == "red"
    np.testing.assert_array_equal(*features)
    kernel.compile_kernels.cache_clear()
