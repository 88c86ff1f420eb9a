"""The GPU backends through doubles: every binding is really read and written, on the CPU."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import VARIANTS, run_check

from helpers.commands import SAMPLE
from helpers.gpu_doubles import FakeDriver, FakeTensorRT, write_fake_engine
from ppllava_edge import VideoQA
from ppllava_edge.engines.backends import tensorrt_stage
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import EngineError, PromptError
from ppllava_edge.engines.machine.gpu_facts import Gpu
from ppllava_edge.engines.targets import select
from ppllava_edge.engines.targets.build import build_onnxruntime
from ppllava_edge.runtime import Pipeline
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.language.sampling import Sampling
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


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_bundle(), tmp_path / "nano"))


@pytest.fixture
def opened(nano: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Opened]:
    return lambda target, **options: open_double(nano, target, monkeypatch, **options)


def asking(pipeline: Pipeline) -> VideoQA:
    qa = VideoQA(pipeline.bundle.path, device="cpu")
    qa.pipeline = pipeline
    return qa


@pytest.fixture(scope="module")
def want() -> list[str]:
    video = VideoQA(device="cpu").open(SAMPLE)
    return [video.ask(question).text for question in QUESTIONS]


# -- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@VARIANTS
def test_variant_matches_the_original(
    variant: int, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """check.py over every backend: video, images, all poolings, both families."""

    class Resident(Pipeline):
        @classmethod
        def open(cls, bundle: Path, device: str = "cpu") -> Pipeline:  # type: ignore[override]
            return open_double(bundle, target, monkeypatch)[0]

    monkeypatch.setattr("ppllava_edge.runtime.Pipeline", Resident)
    run_check(variant, monkeypatch, capsys)


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


# -- resident ----------------------------------------------------------------------------------------------------------


def test_only_token_ids_come_back(opened: Callable[..., Opened], want: list[str]) -> None:
    """And, after the last of them, the weights of 8 frames of 9x9 patches, to say where the question looked."""
    pipeline, driver, _ = opened("orin")
    video = asking(pipeline).open(SAMPLE)
    answer = video.ask(QUESTIONS[1])
    assert answer.text == want[1] and driver.to_host == [8] * answer.new_tokens + [4 * 8 * 81]


def test_a_step_is_captured_once_and_launched_again(
    opened: Callable[..., Opened], want: list[str]
) -> None:
    pipeline, driver, trt = opened("orin", piece_bytes=200_000)
    video = asking(pipeline).open(SAMPLE)
    pieces = len(pipeline.device_stages("decoder"))
    assert pieces > 2
    first = video.ask(QUESTIONS[1])
    assert len(driver.graphs) == 1 and driver.launches == first.new_tokens - 2, (
        "the first step runs as it is; the last token needs none"
    )
    assert len(driver.graphs[0]) == 3 + pieces, "three copies feed the step, then the pieces run"
    enqueued, allocated = trt.enqueued, driver.allocations
    second = video.ask(QUESTIONS[1])
    assert (first.text, second.text) == (want[1], want[1]) and len(driver.graphs) == 1, (
        "the next answer launches the same graph"
    )
    assert trt.enqueued - enqueued == 3 + pieces, (
        "question, similarity, pooling and prefill; every step was launched, none enqueued"
    )
    assert driver.allocations - allocated < 10 + 2 * pieces < first.new_tokens * 2, (
        "buffers of steps are not made again"
    )


def test_blocks_are_used_again_and_given_back_when_memory_is_short() -> None:
    device = CudaDevice(FakeDriver(memory=1000))
    first = device.empty((400,), np.uint8)
    address = first.address
    del first
    again = device.empty((100,), np.float32)
    assert again.address == address and device.driver.allocations == 1, "a block of the same size"
    del again
    assert device.driver.used == 400
    large = device.empty((800,), np.uint8)  # fits only when the spare block goes
    assert device.driver.used == 800 and large.nbytes == 800
    with pytest.raises(EngineError, match="out of memory"):
        device.empty((400,), np.uint8)
    part = large.rows(100, 50)
    del large
    assert device.driver.used == 800 and part.nbytes == 50, "a part keeps the whole alive"
    with pytest.raises(EngineError, match="out of memory"):
        device.empty((400,), np.uint8)


def test_memory_is_given_back(opened: Callable[..., Opened]) -> None:
    pipeline, driver, _ = opened("orin")
    qa = asking(pipeline)
    used = []
    for _ in range(4):
        qa.open(SAMPLE).ask(QUESTIONS[0])
        used.append(driver.used)
    assert used[1] == used[2] == used[3]


@pytest.mark.parametrize("target", TARGETS)
def test_answers_from_several_threads(
    opened: Callable[..., Opened], target: str, want: list[str]
) -> None:
    """Also while one of them captures a step: nobody else's work gets into its graph."""
    pipeline, *_ = opened(target)
    qa, found, lock = asking(pipeline), dict[int, str](), threading.Lock()
    video = qa.open(SAMPLE)

    def ask(i: int) -> None:
        text = video.ask(QUESTIONS[i % 3]).text
        with lock:
            found[i] = text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == [want[i % 3] for i in range(6)]


@pytest.mark.parametrize("target", ["cuda", "orin"])
def test_sampling_and_penalties_agree_with_the_cpu(
    opened: Callable[..., Opened], nano: Path, target: str
) -> None:
    pipeline, *_ = opened(target)
    on_cpu = Pipeline.open(nano, engine="standard")
    rows = on_cpu.embed_tokens([1, 5, 9, 3])
    for sampling in (
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.7, top_k=5, seed=3),
        Sampling(temperature=1.0, top_p=0.8, seed=4),
    ):
        assert list(pipeline.generate(rows, 8, sampling=sampling)) == list(
            on_cpu.generate(rows, 8, sampling=sampling)
        ), sampling


class Drafts(PromptLookup):
    """The right tokens, made wrong at a place of choice in every other draft."""

    def __init__(self, truth: list[int], length: int, wrong: int):
        super().__init__()
        self.truth, self.length, self.wrong = truth, length, wrong

    def draft(self, ids: Any, most: int) -> list[int]:
        guess = self.truth[len(ids) : len(ids) + min(most, self.length)]
        if self.passes % 2 and guess:
            guess[self.wrong % len(guess)] += 1
        return guess if self.passes % 3 else []


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(0, 6))
def test_drafts_change_no_answer(tmp_path_factory: pytest.TempPathFactory, length: int, wrong: int) -> None:
    """Steps, captured steps and verified drafts in every order over one cache."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        nano = Path(shutil.copytree(packed_bundle(), tmp_path_factory.mktemp("drafts") / "nano"))
        pipeline, *_ = open_double(nano, "orin", monkeypatch)
        rows = pipeline.embed_tokens([1, 5, 9, 3])
        truth = list(pipeline.generate(rows, 24))
        drafts = Drafts(truth, length, wrong)
        assert list(pipeline.generate(rows, 24, lookup=drafts)) == truth and drafts.accepted


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_engine(opened: Callable[..., Opened]) -> None:
    pipeline, *_ = opened("orin", capacity=32)
    with pytest.raises(PromptError, match=r"40 tokens; this engine's cache holds 32.*--capacity 296"):
        pipeline.prefill(np.zeros((40, pipeline.manifest.decoder.hidden_size), np.float32))
    jetson, *_ = opened("orin-jp6", capacity=32)
    with pytest.raises(PromptError, match="this engine's cache holds 32"):
        jetson.prefill(np.zeros((40, pipeline.manifest.decoder.hidden_size), np.float32))
    ids = list(pipeline.generate(pipeline.embed_tokens(range(28)), 100))
    assert len(ids) == 5, "an answer ends where the cache does"


def test_too_many_frames_for_the_profile(opened: Callable[..., Opened]) -> None:
    pipeline, *_ = opened("orin")
    with pytest.raises(EngineError, match=r"states is \(9, .*built for \(1, .* to \(8, "):
        pipeline._run(
            "temporal", {"states": np.zeros((9, 2, 82, 128), np.float16)}, {"features": (9, 81, 128)}
        )


def test_too_little_memory_says_how_much_is_missing(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, *_ = open_double(nano, "orin", monkeypatch, FakeDriver(memory=400_000))
    with pytest.raises(
        EngineError, match=r"out of memory: \d+ MB are needed in one piece, \d+ of 0 MB are free"
    ):
        asking(pipeline).open(SAMPLE).ask(QUESTIONS[0])


FAULTS = [
    ("deserialize", "another version or for another GPU; rebuild it"),
    ("context", "too little memory"),
    ("execute", "failed"),
]


@pytest.mark.parametrize("fault, words", FAULTS)
def test_what_the_library_refuses(opened: Callable[..., Opened], fault: str, words: str) -> None:
    pipeline, _, trt = opened("orin")
    trt.fail = fault
    with pytest.raises(EngineError, match=words):
        asking(pipeline).open(SAMPLE)


def test_a_damaged_engine_never_reaches_the_library(
    opened: Callable[..., Opened], nano: Path
) -> None:
    opened("orin")
    file = nano / "engines" / "orin" / "trunk.engine"
    file.write_bytes(file.read_bytes().replace(b"trunk", b"drunk"))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(select, "ON_CPU", ())
    with pytest.raises(
        EngineError, match=r"trunk.engine is damaged; rebuild it: ppllava-build .* --target orin --force"
    ):
        select.select(Bundle.open(nano), "cuda", "tensorrt")
    monkey.undo()


def test_no_gpu_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="no NVIDIA GPU was found"):
        CudaDevice(FakeDriver(devices=0))
    broken = FakeDriver()
    monkeypatch.setattr(broken, "cuStreamCreate", lambda flags: (999, None))
    with pytest.raises(EngineError, match="cuStreamCreate failed: a made-up error"):
        CudaDevice(broken)
    with pytest.raises(EngineError, match=r"cuda-core: pip install|no NVIDIA driver"):
        CudaDevice()


# -- chosen ------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(EngineError, match="doesn't run on the cpu; use --device cuda"):
        select.select(bundle, "cpu", "tensorrt")
    with pytest.raises(EngineError, match="engine 'fast' is unknown"):
        select.select(bundle, "cpu", "fast")


def test_a_gpu_engine_is_found_by_itself(
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
    with pytest.raises(EngineError, match="--engine tensorrt needs an NVIDIA GPU, and no driver was found"):
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


def test_frames_that_lie_on_the_gpu_stay_there(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera pipeline on the GPU pushes its frames: nothing of them crosses to the host but a small picture, and the answer is that of host frames."""
    import av
    from test_prepare_frame import OnGpu

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
