"""The table of token embeddings, read row by row from its mapped file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.embeddings import NEWLINE, SCALES, TABLE, open_embeddings
from ppllava_edge.engines.errors import PromptError


class EmbeddingTable:
    """embed_tokens.safetensors of a bundle; only the rows that are asked for are read.

    Raises:
        BundleError: If the file can't be read, or its tensors aren't those that the manifest promises.
    """

    def __init__(self, bundle: Bundle):
        self.info = bundle.manifest.decoder
        self._bundle = bundle
        self._file = open_embeddings(bundle)
        self._scales: np.ndarray | None = None
        if self._file.get_slice(TABLE).get_dtype() == "I8":
            self._scales = self._file.get_tensor(SCALES).astype(np.float32)

    def rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (L,) → embeddings (L, D) float32. Raises PromptError for an unknown id."""
        ids = [int(i) for i in np.asarray(ids, np.int64).ravel()]
        if any(not 0 <= i < self.info.vocab for i in ids):
            raise PromptError(f"token ids must be from 0 to {self.info.vocab - 1}")
        if not ids:
            return np.zeros((0, self.info.hidden_size), np.float32)
        table = self._file.get_slice(TABLE)
        rows = np.concatenate([table[i : i + 1] for i in ids]).astype(np.float32)
        return rows if self._scales is None else rows * self._scales[ids][:, None]

    def image_newline(self) -> np.ndarray:
        """(D,) float32: the embedding that ends a row of an image's crops. BundleError if there is none."""
        with open_embeddings(self._bundle, newline=True) as file:
            newline: np.ndarray = file.get_tensor(NEWLINE).astype(np.float32)
        return newline
