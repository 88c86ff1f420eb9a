"""The model's stages, one call each: what tests, tools and the session stand on.

frames → encode_frames → features ─┐
question → encode_question → q ────┴→ similarity, visual_tokens → prefill / generate
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.bundle import Bundle
from ..engines.contract import check_stage
from ..engines.engine import Engine
from ..engines.errors import EngineError, MediaError, PromptError
from ..engines.gpu_facts import load_driver
from ..engines.ort import Stage, choose_device, has_cuda_provider
from ..engines.pooling import Windows
from ..engines.select import ON_CPU, check_name, select
from . import anyres
from .lookup import LEFT_OUT, Lookup, rounds_activations
from .sampling import Sampling

if TYPE_CHECKING:
    from .decoding import Decoder

MEDIA = ("video", "image", "multi-image")
TOKENS_PER_VISION_CALL = 2400  # patches encoded at once: 1-4 frames of a large tower; more only costs memory
POOLING_BYTES = 32 << 20  # of linear_1's output at once


class Pipeline:
    """A bundle, opened. Stages load when they are first used. Safe to use from several threads.

    engine: what runs the stages, None for the standard graphs; engine_note: why one that is there is not used.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None, engine: str = "auto"):
        self.bundle, self.manifest = bundle, bundle.manifest
        self.device, self.threads = choose_device(device), threads
        self._lock = threading.Lock()
        self._stages: dict[str, list[Stage]] = {}
        self.engine: Engine | None
        self.engine, self.engine_note = select(bundle, self.device, engine)
        self._graphs = self.engine  # what `pieces` opens; None: the standard graphs

    @classmethod
    def open(cls, bundle: str | os.PathLike[str], device: str = "cpu", threads: int | None = None, engine: str = "auto") -> Pipeline:
        """Open and check a bundle directory. device: auto | cpu | cuda. threads: of the engine, default one per core. engine: auto (the fastest
        that is built and fits), onnxruntime, tensorrt, rtx, standard (the bundle's own graphs), or the name of a folder below engines/.

        Raises BundleError or EngineError in one line.
        """
        return open_pipeline(Bundle.open(bundle), device, threads, engine)

    def stage(self, name: str) -> Stage:
        """The opened graph of a stage that is one graph."""
        return self.pieces(name)[0]

    def pieces(self, name: str) -> list[Stage]:
        """The opened graph of a stage, or the pieces that an engine cut it into: those of this machine's engine, else the standard one."""
        with self._lock:
            if name not in self._stages:
                paths = (self._graphs.paths(name) if self._graphs else []) or [self.bundle.file(f"{name}.onnx")]
                with ThreadPoolExecutor(4) as pool:
                    stages = list(pool.map(lambda path: Stage(path, self.device, self.threads, piece=len(paths) > 1), paths))
                check_stage(name, stages, self.manifest, self._graphs.cache if self._graphs else "in place")
                self._stages[name] = stages
            return self._stages[name]

    def load(self) -> None:
        """Open every stage now, so that the first question finds them ready."""
        for name in self.manifest.required_files():
            if name.endswith(".onnx"):
                self.pieces(name.removesuffix(".onnx"))
        _ = self.decoder

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder with its KV cache."""
        from .decoding import Decoder

        info = self.manifest.decoder
        if self.engine is None:
            return Decoder(self.pieces("decoder"), info)
        return Decoder(self.pieces("decoder"), replace(info, kv_dtype=self.engine.kv_dtype), self.engine.cache)

    @property
    def engine_name(self) -> str:
        """Which of the bundle's engines runs, "standard" for its own graphs."""
        return self.engine.target if self.engine else "standard"

    def wait(self) -> None:
        """Until everything that was asked for is done: on a GPU calls return earlier."""

    # -- vision ------------------------------------------------------------------------------------------------------

    def encode_trunk(self, pixels: np.ndarray, more: bool = False) -> np.ndarray:
        """pixels (T,3,H,W) float32 → states (T,S,P+1,C): frame by frame, so it can be called as frames arrive. more: frames will follow soon."""
        size = self.manifest.vision.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise MediaError(f"pixels must be (T, 3, {size}, {size}), not {pixels.shape}")
        if not len(pixels):
            raise MediaError("there are no frames to encode")
        trunk, step = self.stage("trunk"), max(1, TOKENS_PER_VISION_CALL // (self.manifest.vision.patches + 1))
        states: np.ndarray | None = None
        for i in range(0, len(pixels), step):
            part = trunk(pixels=pixels[i : i + step], tidy=not more and i + step >= len(pixels))[0]
            if states is None:
                states = part if len(part) == len(pixels) else np.empty((len(pixels), *part.shape[1:]), part.dtype)
            states[i : i + step] = part
        assert states is not None
        return states

    def branch(self, states: np.ndarray) -> np.ndarray:
        """states (T,S,P+1,C) of one clip → features (T,P,C). Raises MediaError for clips longer than the temporal adapter knows."""
        if self.manifest.vision.max_frames is None:
            return np.ascontiguousarray(states[:, -1, 1:] if self.manifest.vision.class_token else states[:, -1])
        self.check_frames(len(states))
        return self.stage("temporal")(states=states, tidy=True)[0]

    def takes_device_frames(self, frame: Any) -> bool:
        """Whether a frame that lies in GPU memory can stay there. On the CPU none can."""
        return False

    def prepare_frame(self, frame: Any) -> tuple[Any, Any]:
        """A frame in GPU memory → pixels (1,3,size,size), as encode_trunk takes them, and the resized picture (size,size,3)."""
        raise EngineError("this engine runs on the CPU; give frames in host memory")

    def clip(self) -> Clip:
        """A clip whose frames are encoded as they come."""
        return Clip(self)

    def rows(self, states: Any) -> list[Any]:
        """states (k,S,P+1,C) → k of (1,S,P+1,C), without a copy."""
        return [states[i : i + 1] for i in range(len(states))]

    def join(self, states: Iterable[Any], count: int) -> Any:
        """`count` frames' states, (1,S,P+1,C) each → (T,S,P+1,C), as branch takes them."""
        joined: np.ndarray | None = None
        for i, state in enumerate(states):
            if joined is None:
                joined = np.empty((count, *state.shape[1:]), state.dtype)
            joined[i] = state[0]
        return joined

    def check_frames(self, count: int) -> None:
        """Raise MediaError if a clip of `count` frames is longer than the temporal adapter knows."""
        limit = self.manifest.vision.max_frames
        if limit is not None and count > limit:
            raise MediaError(
                f"{count} frames are too many: the temporal adapter of {self.manifest.name} knows at most {limit}; use --frames {limit} or fewer"
            )

    def encode_frames(self, pixels: np.ndarray, media: str = "video") -> np.ndarray:
        """pixels (T,3,H,W) float32, preprocessed → features (T,P,C).

        media: "video" and "multi-image" run all frames as one clip; "image" runs every tile by itself (the adapter sees T = 1).
        """
        check_media(media, "")
        states = self.encode_trunk(np.asarray(pixels))
        if media == "image":
            return np.concatenate([self.branch(states[i : i + 1]) for i in range(len(states))])
        return self.branch(states)

    # -- question and similarity -------------------------------------------------------------------------------------

    def encode_question(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """ids (1,L) int64, mask (1,L) or None (all ones) → q (1,E) float32, before normalisation.

        SigLIP's tower wants its ids padded to the full length (upstream does so). Raises PromptError if L is too long.
        """
        ids, mask = self._question_inputs(ids, mask)
        stage = self.stage("question")
        return stage(ids=ids, mask=mask)[0] if "mask" in stage.dtypes else stage(ids=ids)[0]

    def _question_inputs(self, ids: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask as the question tower takes them, or what is wrong with them."""
        question = self.manifest.question
        if question is None:
            raise EngineError(f"this bundle pools without the question ({self.manifest.pooling.method}); it has no question tower")
        ids = np.asarray(ids, np.int64)
        if ids.ndim != 2 or ids.shape[0] != 1 or not 1 <= ids.shape[1] <= question.length:
            raise PromptError(f"the question tower takes ids of shape (1, 1 to {question.length}), not {ids.shape}")
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        return ids, mask

    def similarity(self, features: np.ndarray, q: np.ndarray) -> np.ndarray:
        """features (T,P,C), q (1,E) → cosine (T,rows,columns) float32 of every patch with the question."""
        return self.stage("similarity")(features=features, q=q)[0]

    def window_weights(self, features: np.ndarray, q: np.ndarray | None) -> np.ndarray:
        """The weights that pooling takes, (T,rows,columns) float32: softmax over all patches, or equal ones without a question."""
        if not self.manifest.pooling.guided:
            return np.zeros((len(features), *self.manifest.vision.grid), np.float32)
        if q is None:
            raise PromptError("prompt-guided pooling needs the encoded question")
        return self.stage("similarity")(features=features, q=q)[1]

    # -- visual tokens -----------------------------------------------------------------------------------------------

    def visual_tokens(
        self,
        features: np.ndarray,
        q: np.ndarray | None,
        media: str = "video",
        image_size: tuple[int, int] | None = None,
        weights: np.ndarray | None = None,
        windows: Windows | None = None,
    ) -> np.ndarray:
        """Pool features (T,P,C) under the guidance of q (1,E) → visual tokens (N,D) float32, as spliced into the text.

        media "image": tile 0 is the whole image, the others are crops; image_size (height, width) of the original is needed for crops.
        weights (T,rows,columns): the question's, if they are known already, or others, for experiments. windows: instead of the model's.
        Raises MediaError if the clip is too short for the pooling windows.
        """
        pooling = self.manifest.pooling
        check_media(media, pooling.method)
        if weights is None and pooling.windowed:
            weights = self.window_weights(features, q)
        if not pooling.windowed:
            if media == "image":
                tiles = np.stack([self.stage("pooling")(features=features[i : i + 1])[0] for i in range(len(features))])
                return self._assemble_image(tiles, self.manifest.vision.grid, image_size)
            return self.stage("pooling")(features=features)[0].astype(np.float32, copy=False)
        assert weights is not None
        windows = windows or (pooling.video if media == "video" else pooling.image)
        size = (len(features), *self.manifest.vision.grid)
        output, kernel, stride = windows.resolve(size)
        tokens = self._pool(features, weights, output[0], kernel, stride)
        if media != "image":
            return tokens
        if output[0] != len(features):
            raise MediaError(f"image pooling must keep every tile apart; its windows ({windows}) mix {len(features)} tiles into {output[0]}")
        return self._assemble_image(np.asarray(tokens).reshape(output[0], output[1] * output[2], -1), output[1:], image_size)

    def _pool(self, features: np.ndarray, weights: np.ndarray, count: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
        """Pool some temporal windows at a time, so that the projector's wide intermediate never exists for the whole clip."""
        pooling = self.stage("pooling")
        arguments: dict[str, Any] = {"kernel": np.array(kernel, np.int64), "stride": np.array(stride, np.int64)}
        per_frame = self.manifest.vision.patches * self.manifest.decoder.hidden_size * 4
        at_once = count if kernel[0] > stride[0] else max(1, POOLING_BYTES // (per_frame * stride[0]))
        parts = []
        for first in range(0, count, at_once):
            last = min(first + at_once, count) - 1
            frames = slice(first * stride[0], last * stride[0] + kernel[0])
            parts.append(pooling(features=features[frames], weights=weights[frames], **arguments)[0])
        return np.concatenate(parts).astype(np.float32, copy=False)

    def _assemble_image(self, tiles: np.ndarray, grid: tuple[int, int], image_size: tuple[int, int] | None) -> np.ndarray:
        """tiles (1+crops, tokens, D) → (N,D): the whole image, then the unpadded grid of crops with a newline after every row."""
        newline = self._embeddings.get_slice("image_newline")[:].astype(np.float32)
        if len(tiles) == 1:
            return np.concatenate([tiles[0].astype(np.float32), newline[None]])
        if image_size is None:
            raise MediaError("an image of several tiles needs image_size (height, width)")
        p = self.manifest.preprocessing
        return anyres.assemble(tiles.astype(np.float32), grid, image_size, p.image_grids, p.size, newline)

    # -- decoder -----------------------------------------------------------------------------------------------------

    @cached_property
    def _embeddings(self) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.bundle.file("embed_tokens.safetensors")
        try:
            return safe_open(path, "np").__enter__()
        except SafetensorError as error:
            raise EngineError(f"{path.name} can't be read: {error}") from None

    def embed_tokens(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (L,) → embeddings (L,D) float32, read from the mapped file row by row."""
        d = self.manifest.decoder
        ids = [int(i) for i in np.asarray(ids, np.int64).ravel()]
        if any(not 0 <= i < d.vocab for i in ids):
            raise PromptError(f"token ids must lie in 0 to {d.vocab - 1}")
        if not ids:
            return np.zeros((0, d.hidden_size), np.float32)
        rows = self._rows("embed_tokens", ids)
        return rows if self._embedding_scales is None else rows * self._embedding_scales[ids][:, None]

    def _rows(self, name: str, ids: list[int]) -> np.ndarray:
        table = self._embeddings.get_slice(name)
        return np.concatenate([table[i : i + 1] for i in ids]).astype(np.float32)

    @cached_property
    def _embedding_scales(self) -> np.ndarray | None:
        """A scale per row where the table is INT8."""
        name = "embed_tokens.scale"
        return self._embeddings.get_tensor(name).astype(np.float32) if name in self._embeddings.keys() else None  # noqa: SIM118  (not a dict)

    def prompt(self, before: Sequence[int], visual: np.ndarray, after: Sequence[int]) -> np.ndarray:
        """Token ids, visual tokens (N,D), token ids → inputs_embeds (S,D), as prefill and generate take them."""
        return np.concatenate([self.embed_tokens(before), visual, self.embed_tokens(after)])

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """inputs_embeds (S,D) → logits (V,) float32 of the last position."""
        return self.decoder.prefill(np.asarray(inputs_embeds))

    def _allowed(self, lookup: Lookup | None) -> Lookup | None:
        """Drafts, unless they could change the answer; the lookup notes that."""
        if lookup is not None and rounds_activations(self.manifest.precision["decoder"], self.engine_name):
            lookup.note = LEFT_OUT
            return None
        return lookup

    def generate(
        self,
        inputs_embeds: np.ndarray,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        sampling: Sampling | None = None,
        lookup: Lookup | None = None,
        sequence: Any = None,
    ) -> Generator[int, None, None]:
        """Yield token ids after the prompt (S,D), a stop id included; greedy unless sampling says otherwise.

        sequence: of decoder.start, to go on with and to keep.
        lookup: guess tokens from what was said before and verify several in a pass; greedy answers stay the same. Raises PromptError with
        random sampling, EngineError where the engine can't verify.
        """
        sampling = sampling or Sampling()
        if lookup is not None and sampling.temperature > 0:
            raise PromptError("looking ahead works with greedy answers only (temperature 0)")
        lookup = self._allowed(lookup)
        return self.decoder.generate(np.asarray(inputs_embeds), max_new_tokens, self.embed_tokens, sampling.chooser(), stop_ids, lookup, sequence)


def open_pipeline(bundle: Bundle, device: str = "cpu", threads: int | None = None, engine: str = "auto") -> Pipeline:
    """The pipeline of a bundle on a device: resident on a GPU where there is one and an engine for it, else as `device` says."""
    check_name(engine)
    if device in ("auto", "cuda") and engine not in (*ON_CPU, "standard"):
        if load_driver() is not None:
            chosen, _ = select(bundle, "cuda", engine)
            if chosen is not None and (chosen.library != "onnxruntime" or has_cuda_provider()):
                from .gpu_pipeline import GpuPipeline

                return GpuPipeline(bundle, chosen, threads)
        elif engine not in ("auto", "onnxruntime"):
            raise EngineError(f"--engine {engine} needs an NVIDIA GPU, and no driver was found on this machine; ppllava-doctor says what is missing")
    return Pipeline(bundle, device, threads, engine)


class Clip:
    """Frames that are being encoded: they come in any order and grouping, each under a name (its number, say)."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.states: dict[int, Any] = {}

    def add(self, pixels: np.ndarray, names: Sequence[int], more: bool = False) -> None:
        """Encode frames: pixels (k,3,H,W). more: others follow soon."""
        self.states |= zip(names, self.pipeline.rows(self.pipeline.encode_trunk(pixels, more=more)))

    def features(self, order: Sequence[int]) -> Any:
        """(T,P,C) of the frames with these names, which may repeat; the states are let go of on the way. Call it once."""
        last = {name: at for at, name in enumerate(order)}
        states = (self.states.pop(name) if last[name] == at else self.states[name] for at, name in enumerate(order))
        return self.pipeline.branch(self.pipeline.join(states, len(order)))


def check_media(media: str, pooling: str) -> None:
    """Raise MediaError for a kind of media that doesn't exist, or that this pooling can't take."""
    if media not in MEDIA:
        raise MediaError(f"media {media!r} is unknown; choose {', '.join(MEDIA)}")
    if media == "image" and pooling.startswith("pllava"):
        raise MediaError(f"{pooling} pooling can't take single images (neither can the original); give the image as a one-frame video")
