"""The model's stages, one call each, as tests, tools and the session use them.

frames → encode_frames → features ─┐
question → encode_question → q ────┴→ similarity, visual_tokens → prefill / generate
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine
from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import EngineError, MediaError, PromptError
from ppllava_edge.runtime.language.prompt_lookup import LOOKUP_SKIPPED, PromptLookup, rounds_activations
from ppllava_edge.runtime.language.sampling import Sampling
from ppllava_edge.runtime.pipeline.parts import PipelineParts
from ppllava_edge.runtime.vision import anyres
from ppllava_edge.runtime.vision.frame_options import check_clip_length

MEDIA = ("video", "image", "multi-image")


class BasePipeline(PipelineParts):
    """A bundle, opened. Stages load when they are first used. Safe to use from several threads.

    Arrays are numpy's on the CPU and device buffers on a GPU (np.asarray copies one to the host). Shapes: T
    frames, P patches (rows x columns), C features, E question embedding, N visual tokens, D hidden size, V
    vocabulary.

    Attributes:
        bundle, manifest: The opened bundle and its manifest.
        device: "cpu" or "cuda".
        engine: The engine that runs the stages; None: the standard graphs.
        engine_note: Why an existing engine is not used.
    """

    device: str
    engine: Engine | None
    engine_note: str

    def __init__(self, bundle: Bundle, threads: int | None = None):
        super().__init__(bundle)
        self.threads = threads

    @property
    def engine_name(self) -> str:
        """Which of the bundle's engines runs, "standard" for its own graphs."""
        return self.engine.target if self.engine else "standard"

    def wait(self) -> None:
        """Block until queued GPU work completes."""

    # -- vision ----------------------------------------------------------------------------------------------

    def check_pixels(self, pixels: Any) -> None:
        """Raise MediaError unless pixels are (T, 3, size, size) with T of 1 or more."""
        size = self.manifest.vision.image_size
        if len(pixels.shape) != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise MediaError(f"pixels must be (T, 3, {size}, {size}), not {pixels.shape}")
        if not len(pixels):
            raise MediaError("there are no frames to encode")

    @abstractmethod
    def encode_trunk(self, pixels: Any, more: bool = False) -> Any:
        """Run the vision tower, frame by frame, so it can be called as frames arrive.

        Args:
            pixels: (T, 3, size, size) float32, preprocessed.
            more: Whether more frames follow soon.

        Returns:
            States (T, S, P+1, C): what the temporal branch needs; S is 1 without one.

        Raises:
            MediaError: If the shape is invalid.
        """

    @abstractmethod
    def branch(self, states: Any) -> Any:
        """Run the temporal branch over one clip: states (T, S, P+1, C) → features (T, P, C).

        Raises:
            MediaError: If the clip is longer than the temporal adapter supports.
        """

    @abstractmethod
    def rows(self, array: Any) -> list[Any]:
        """An array (k, …) → k arrays (1, …) over the same memory."""

    @abstractmethod
    def join(self, states: Iterable[Any], count: int) -> Any:
        """States (1, S, P+1, C) of `count` frames → (count, S, P+1, C), as `branch` takes them."""

    @abstractmethod
    def takes_device_frames(self, frame: Any) -> bool:
        """Whether this is a frame in GPU memory that can stay there. On the CPU none can."""

    @abstractmethod
    def prepare_frame(self, frame: Any) -> tuple[Any, Any]:
        """Resize and normalise a frame in GPU memory, without copying it to the host.

        Returns:
            Pixels (1, 3, size, size), as `encode_trunk` takes them, and the resized picture (size, size, 3).

        Raises:
            EngineError: On the CPU.
            MediaError: If it isn't a frame.
        """

    def check_frames(self, count: int) -> None:
        """Raise MediaError if a clip of `count` frames is longer than the temporal adapter supports."""
        check_clip_length(self.manifest, count)

    def encode_frames(self, pixels: Any, media: str = "video") -> Any:
        """Encode preprocessed frames.

        Args:
            pixels: (T, 3, size, size) float32.
            media: "video" and "multi-image" run all frames as one clip; "image" runs every tile by itself
                (the temporal adapter sees T = 1).

        Returns:
            Features (T, P, C).

        Raises:
            MediaError: If the shape or the kind of media is invalid.
        """
        check_media(media, "")
        states = self.encode_trunk(np.asarray(pixels))
        if media != "image":
            return self.branch(states)
        tiles = [self.branch(state) for state in self.rows(states)]
        return self.join(tiles, len(tiles))

    # -- question and similarity -----------------------------------------------------------------------------

    def check_question(self, ids: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask as the question tower takes them: (1, L) int64 each.

        Raises:
            EngineError: If the bundle has no question tower.
            PromptError: If the shape is invalid.
        """
        question = self.manifest.question
        if question is None:
            method = self.manifest.pooling.method
            raise EngineError(f"this bundle pools without the question ({method}); it has no question tower")
        ids = np.asarray(ids, np.int64)
        if ids.ndim != 2 or ids.shape[0] != 1 or not 1 <= ids.shape[1] <= question.length:
            wanted = f"(1, 1 to {question.length})"
            raise PromptError(f"the question tower takes ids of shape {wanted}, not {ids.shape}")
        return ids, np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)

    @abstractmethod
    def encode_question(self, ids: np.ndarray, mask: np.ndarray | None = None) -> Any:
        """Run the question tower.

        Args:
            ids: (1, L) int64. SigLIP's tower wants its ids padded to the full length (upstream does so).
            mask: (1, L) int64; None: all ones.

        Returns:
            q (1, E) float32, before normalisation.

        Raises:
            PromptError: If L is too long.
        """

    @abstractmethod
    def similarity(self, features: Any, q: Any) -> np.ndarray:
        """Cosine of every patch with the question: features (T, P, C), q (1, E) → (T, rows, columns) float32.

        Computed on the host, for display.
        """

    def window_weights(self, features: Any, q: Any) -> Any:
        """Pooling weights (T, rows, columns) float32: softmax over all patches; equal if unguided.

        Raises:
            PromptError: If pooling is guided and q is None.
        """
        if not self.manifest.pooling.guided:
            return self.equal_weights((len(features), *self.manifest.vision.grid))
        if q is None:
            raise PromptError("prompt-guided pooling needs the encoded question")
        return self.patch_weights(features, q)

    @abstractmethod
    def equal_weights(self, shape: tuple[int, ...]) -> Any:
        """Zeros (T, rows, columns) float32: every patch of a window weighs the same."""

    @abstractmethod
    def patch_weights(self, features: Any, q: Any) -> Any:
        """Weights (T, rows, columns) float32 of every patch for a question (1, E)."""

    # -- visual tokens ---------------------------------------------------------------------------------------

    def visual_tokens(
        self,
        features: Any,
        q: Any,
        media: str = "video",
        image_size: tuple[int, int] | None = None,
        weights: Any = None,
        windows: Windows | None = None,
    ) -> Any:
        """Pool features under the guidance of the question.

        Args:
            features: (T, P, C).
            q: (1, E), the encoded question; may be None where pooling isn't guided.
            media: "video", "image" (tile 0 is the whole image, the others are crops) or "multi-image".
            image_size: (height, width) of the original image, needed for crops.
            weights: (T, rows, columns): the question's, if known already, or others, for experiments.
            windows: Pooling windows to use instead of the model's.

        Returns:
            Visual tokens (N, D) float32, as spliced into the text.

        Raises:
            MediaError: If the clip is too short for the pooling windows, or the media can't be pooled.
        """
        pooling = self.manifest.pooling
        check_media(media, pooling.method)
        if not pooling.windowed:
            return self._pool_unwindowed(features, media, image_size)
        if weights is None:
            weights = self.window_weights(features, q)
        windows = windows or (pooling.video if media == "video" else pooling.image)
        output, kernel, stride = windows.resolve((len(features), *self.manifest.vision.grid))
        tokens = self.pool_windows(features, weights, output[0], kernel, stride)
        if media != "image":
            return tokens
        if output[0] != len(features):
            raise MediaError(
                f"image pooling must keep every tile apart; its windows ({windows}) mix "
                f"{len(features)} tiles into {output[0]}"
            )
        tiles = np.asarray(tokens).reshape(output[0], output[1] * output[2], -1)
        return self._assemble_image(tiles, output[1:], image_size)

    def _pool_unwindowed(self, features: Any, media: str, image_size: tuple[int, int] | None) -> Any:
        if media != "image":
            return self.pool_clip(features)
        tiles = np.stack([np.asarray(self.pool_clip(tile)) for tile in self.rows(features)])
        return self._assemble_image(tiles, self.manifest.vision.grid, image_size)

    @abstractmethod
    def pool_windows(
        self, features: Any, weights: Any, count: int, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> Any:
        """Pool a clip window by window: features (T, P, C), weights (T, rows, columns) → (N, D).

        Args:
            features: (T, P, C).
            weights: (T, rows, columns) float32.
            count: Windows along time.
            kernel, stride: (frames, rows, columns).
        """

    @abstractmethod
    def pool_clip(self, features: Any) -> Any:
        """Pool a clip without windows (PLLaVA's average, AVP, none): features (T, P, C) → (N, D)."""

    def _assemble_image(
        self, tiles: np.ndarray, grid: tuple[int, int], image_size: tuple[int, int] | None
    ) -> np.ndarray:
        """Tiles (1+crops, tokens, D) → (N, D): the whole image, then rows of crops, each with a newline."""
        newline = self.embedding_table.image_newline()
        if len(tiles) == 1:
            return np.concatenate([tiles[0].astype(np.float32), newline[None]])
        if image_size is None:
            raise MediaError("an image of several tiles needs image_size (height, width)")
        p = self.manifest.preprocessing
        return anyres.assemble(tiles.astype(np.float32), grid, image_size, p.image_grids, p.size, newline)

    # -- decoder ---------------------------------------------------------------------------------------------

    def embed_tokens(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (L,) → embeddings (L, D) float32. Raises PromptError for an unknown id."""
        return self.embedding_table.rows(ids)

    @abstractmethod
    def prompt(self, before: Sequence[int], visual: Any, after: Sequence[int]) -> Any:
        """Token ids, visual tokens (N, D), token ids → a prompt, as `prefill` and `generate` take it."""

    def prefill(self, prompt: Any) -> np.ndarray:
        """A prompt, or embeddings (S, D) → logits (V,) float32 of the last position."""
        return self.decoder.prefill(prompt)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        sampling: Sampling | None = None,
        lookup: PromptLookup | None = None,
        sequence: Any = None,
    ) -> Generator[int, None, None]:
        """Generate token ids after a prompt.

        Args:
            prompt: From `prompt`, or embeddings (S, D).
            max_new_tokens: Maximum number of ids to yield.
            stop_ids: Ids that end the answer; the one that does is yielded too.
            sampling: Greedy by default.
            lookup: Draft tokens from the prompt and the answer so far, and verify several in a pass; greedy
                answers stay the same. Skipped, with a note in it, where it could change the answer.
            sequence: A sequence from decoder.start to continue; the caller keeps it.

        Yields:
            Token ids.

        Raises:
            PromptError: If the prompt is too long, or drafts are combined with random sampling.
            EngineError: If the engine fails or can't verify drafts.
        """
        sampling = sampling or Sampling()
        if lookup is not None and sampling.temperature > 0:
            raise PromptError("looking ahead works with greedy answers only (temperature 0)")
        if lookup is not None and rounds_activations(self.manifest.precision["decoder"], self.engine_name):
            lookup.note, lookup = LOOKUP_SKIPPED, None
        return self.decoder.generate(prompt, max_new_tokens, stop_ids, sampling, lookup, sequence)


def check_media(media: str, pooling: str) -> None:
    """Raise MediaError for an unknown kind of media, or one that this pooling method doesn't support."""
    if media not in MEDIA:
        raise MediaError(f"media {media!r} is unknown; choose {', '.join(MEDIA)}")
    if media == "image" and pooling.startswith("pllava"):
        raise MediaError(
            f"{pooling} pooling can't take single images (neither can the original); "
            "give the image as a one-frame video"
        )
