"""The table of token embeddings, read row by row from its mapped file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import EngineError, PromptError

FILE = "embed_tokens.safetensors"
SCALES = "embed_tokens.scale"  # per-row scales of an INT8 table


class EmbeddingTable:
    """embed_tokens.safetensors of a bundle; only the rows that are asked for are read.

    Raises:
        EngineError: If the file can't be read.
    """

    def __init__(self, bundle: Bundle):
        from safetensors import SafetensorError, safe_open

        self.info = bundle.manifest.decoder
        path = bundle.file(FILE)
        try:
            self._file: Any = safe_open(path, "np").__enter__()
        except SafetensorError as error:
            raise EngineError(f"{path.name} can't be read: {error}") from None
        self._scales: np.ndarray | None = None
        if SCALES in self._file.keys():  # noqa: SIM118  (not a dict)
            self._scales = self._file.get_tensor(SCALES).astype(np.float32)

    def rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (L,) → embeddings (L, D) float32. Raises PromptError for an unknown id."""
        ids = [int(i) for i in np.asarray(ids, np.int64).ravel()]
        if any(not 0 <= i < self.info.vocab for i in ids):
            raise PromptError(f"token ids must be from 0 to {self.info.vocab - 1}")
        if not ids:
            return np.zeros((0, self.info.hidden_size), np.float32)
        table = self._file.get_slice("embed_tokens")
        rows = np.concatenate([table[i : i + 1] for i in ids]).astype(np.float32)
        return rows if self._scales is None else rows * self._scales[ids][:, None]

    def image_newline(self) -> np.ndarray:
        """(D,) float32: the embedding that ends a row of an image's crops."""
        newline: np.ndarray = self._file.get_slice("image_newline")[:].astype(np.float32)
        return newline
