"""The pipeline over numpy arrays: ONNX Runtime, on the CPU or, stage by stage, on its CUDA provider."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.contract import check_stage
from ppllava_edge.engines.backends.onnxruntime_stage import Stage, choose_device
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine
from ppllava_edge.engines.errors import BundleError, EngineError
from ppllava_edge.engines.targets.select import select
from ppllava_edge.runtime.decoding.onnxruntime_decoder import OnnxRuntimeDecoder
from ppllava_edge.runtime.lazy import locked_cached_property
from ppllava_edge.runtime.pipeline.base import BasePipeline

log = logging.getLogger(__name__)
TOKENS_PER_VISION_CALL = 2400  # patches encoded at once: 1-4 frames of a large tower; more only costs memory
POOLING_BYTES = 32 << 20  # size of linear_1's output per call


class CpuPipeline(BasePipeline):
    """A bundle on ONNX Runtime.

    Args:
        bundle: The bundle to open.
        device: auto | cpu | cuda.
        threads: CPU threads of the engine; None: one per core.
        engine: As Pipeline.open takes it.

    Raises:
        EngineError: If the device or the engine isn't available.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None, engine: str = "auto"):
        super().__init__(bundle, threads)
        self.device = choose_device(device)
        self.engine, self.engine_note = select(bundle, self.device, engine)
        self._may_fall_back = engine in ("auto", "onnxruntime")
        self._engine_of: dict[str, Engine | None] = {}  # by stage, once it is open

    def stage(self, name: str) -> Stage:
        """The opened graph of a stage that is one graph."""
        return self.open_stage(name)[0]

    def stage_names(self) -> list[str]:
        """As BasePipeline says."""
        files = self.manifest.required_files()
        return [name.removesuffix(".onnx") for name in files if name.endswith(".onnx")]

    def open_stage(self, name: str) -> list[Stage]:
        """As BasePipeline says: the graph of a stage, or the pieces that an engine cut it into."""
        return self._stages.get(name, lambda: self._open(name))

    def _open(self, name: str) -> list[Stage]:
        self.check_open()
        stages = self._open_engine(name) or self._open_from(None, name, [self.bundle.file(f"{name}.onnx")])
        self.check_open()
        return stages

    def _open_engine(self, name: str) -> list[Stage]:
        """Open a stage from the engine; none if its files can't be used and the user asked for no engine."""
        engine = self.engine
        if engine is None or not engine.paths(name):
            return []
        try:
            return self._open_from(engine, name, engine.paths(name))
        except (BundleError, EngineError) as error:
            if not self._may_fall_back or engine.target == "lowered":  # standard graphs would not open either
                raise
            self.engine = None
            self.engine_note = (
                f"{error}; the standard graphs are used; rebuild the engine: "
                f"ppllava-build {self.bundle.path} --target {engine.target} --force"
            )
            log.warning("%s", self.engine_note)
            return []

    def _open_from(self, engine: Engine | None, name: str, paths: list[Path]) -> list[Stage]:
        with ThreadPoolExecutor(4) as pool:
            stages = list(pool.map(lambda path: self._open_graph(path, len(paths) > 1), paths))
        facts = (engine.cache, engine.kv_dtype) if engine else ()
        check_stage(name, stages, self.manifest, *facts)
        self._engine_of[name] = engine
        return stages

    def _open_graph(self, path: Path, piece: bool) -> Stage:
        return Stage(path, self.device, self.threads, piece=piece)

    # -- vision ----------------------------------------------------------------------------------------------

    def encode_trunk(self, pixels: np.ndarray, more: bool = False) -> np.ndarray:
        """As BasePipeline says."""
        self.check_pixels(pixels)
        trunk = self.stage("trunk")
        step = max(1, TOKENS_PER_VISION_CALL // (self.manifest.vision.patches + 1))
        states: np.ndarray | None = None
        for i in range(0, len(pixels), step):
            last = i + step >= len(pixels)
            part = trunk(pixels=pixels[i : i + step], tidy=last and not more)[0]
            if states is None:
                fits = len(part) == len(pixels)
                states = part if fits else np.empty((len(pixels), *part.shape[1:]), part.dtype)
            states[i : i + step] = part
        assert states is not None
        return states

    def branch(self, states: np.ndarray) -> np.ndarray:
        """As BasePipeline says."""
        vision = self.manifest.vision
        if vision.max_frames is None:  # no temporal adapter: the trunk's last state, without its class token
            return np.ascontiguousarray(states[:, -1, 1:] if vision.class_token else states[:, -1])
        self.check_frames(len(states))
        return self.stage("temporal")(states=states, tidy=True)[0]

    def rows(self, array: np.ndarray) -> list[np.ndarray]:
        """As BasePipeline says."""
        return [array[i : i + 1] for i in range(len(array))]

    def join(self, states: Iterable[np.ndarray], count: int) -> Any:
        """As BasePipeline says."""
        joined: np.ndarray | None = None
        for i, state in enumerate(states):
            if joined is None:
                joined = np.empty((count, *state.shape[1:]), state.dtype)
            joined[i] = state[0]
        return joined

    def takes_device_frames(self, frame: Any) -> bool:
        """As BasePipeline says."""
        return False

    def prepare_frame(self, frame: Any) -> tuple[Any, Any]:
        """As BasePipeline says."""
        raise EngineError("this engine runs on the CPU; give frames in host memory")

    # -- question and pooling --------------------------------------------------------------------------------

    def encode_question(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """As BasePipeline says."""
        ids, mask = self.check_question(ids, mask)
        stage = self.stage("question")
        return stage(ids=ids, mask=mask)[0] if "mask" in stage.dtypes else stage(ids=ids)[0]

    def similarity(self, features: np.ndarray, q: np.ndarray) -> np.ndarray:
        """As BasePipeline says."""
        return self.stage("similarity")(features=features, q=q)[0]

    def patch_weights(self, features: np.ndarray, q: np.ndarray) -> np.ndarray:
        """As BasePipeline says."""
        return self.stage("similarity")(features=features, q=q)[1]

    def equal_weights(self, shape: tuple[int, ...]) -> np.ndarray:
        """As BasePipeline says."""
        return np.zeros(shape, np.float32)

    def pool_windows(
        self,
        features: np.ndarray,
        weights: np.ndarray,
        count: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> np.ndarray:
        """Pool some temporal windows at a time: the projector's wide intermediate never exists as a whole."""
        pooling = self.stage("pooling")
        sizes: dict[str, Any] = {"kernel": np.array(kernel, np.int64), "stride": np.array(stride, np.int64)}
        frame_bytes = self.manifest.vision.patches * self.manifest.decoder.hidden_size * 4
        overlapping = kernel[0] > stride[0]
        at_once = count if overlapping else max(1, POOLING_BYTES // (frame_bytes * stride[0]))
        parts = []
        for first in range(0, count, at_once):
            last = min(first + at_once, count) - 1
            frames = slice(first * stride[0], last * stride[0] + kernel[0])
            parts.append(pooling(features=features[frames], weights=weights[frames], **sizes)[0])
        return np.concatenate(parts).astype(np.float32, copy=False)

    def pool_clip(self, features: np.ndarray) -> np.ndarray:
        """As BasePipeline says."""
        return self.stage("pooling")(features=features)[0].astype(np.float32, copy=False)

    # -- decoder ---------------------------------------------------------------------------------------------

    @locked_cached_property
    def decoder(self) -> OnnxRuntimeDecoder:
        """As BasePipeline says."""
        self.check_open()
        info, cache = self.manifest.decoder, "in place"
        stages = self.open_stage("decoder")
        engine = self._engine_of["decoder"]
        if engine is not None:
            info, cache = replace(info, kv_dtype=engine.kv_dtype), engine.cache
        return OnnxRuntimeDecoder(stages, info, self.embedding_table.rows, cache)

    def prompt(self, before: Sequence[int], visual: np.ndarray, after: Sequence[int]) -> np.ndarray:
        """Token ids, visual tokens (N, D), token ids → embeddings (S, D) float32."""
        return np.concatenate([self.embed_tokens(before), visual, self.embed_tokens(after)])

    def prefill(self, prompt: Any) -> np.ndarray:
        """As BasePipeline says."""
        return super().prefill(np.asarray(prompt))

    def generate(self, prompt: Any, *arguments: Any, **options: Any) -> Generator[int, None, None]:
        """As BasePipeline says."""
        return super().generate(np.asarray(prompt), *arguments, **options)
