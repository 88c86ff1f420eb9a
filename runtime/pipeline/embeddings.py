"""The table of token embeddings, read row by row from its mapped file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.untrusted import open_inside, printable
from ppllava_edge.engines.errors import BundleError, PromptError

FILE = "embed_tokens.safetensors"
SCALES = "embed_tokens.scale"  # per-row scales of an INT8 table
LARGEST_HEADER = 1 << 20  # bytes
TYPES = ("F32", "F16", "I8")  # of the table; everything else is one of the first two


class EmbeddingTable:
    """embed_tokens.safetensors of a bundle; only the rows that are asked for are read.

    Raises:
        BundleError: If the file can't be read, or its tensors aren't those that the manifest promises.
    """

    def __init__(self, bundle: Bundle):
        from safetensors import SafetensorError, safe_open

        self.info = bundle.manifest.decoder
        self._path = bundle.file(FILE)
        self._check_header(bundle.path)
        try:
            self._file: Any = safe_open(self._path, "np").__enter__()
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{self._path} can't be read: {printable(error)}") from None
        self._check("embed_tokens", [self.info.vocab, self.info.hidden_size], TYPES)
        self._scales: np.ndarray | None = None
        if self._file.get_slice("embed_tokens").get_dtype() == "I8":
            self._check(SCALES, [self.info.vocab], TYPES[:2])
            self._scales = self._file.get_tensor(SCALES).astype(np.float32)

    def _check_header(self, root: Path) -> None:
        """Refuse a list of tensors that would take much memory: the library allows 100 MB of JSON."""
        with open_inside(root, self._path) as file:
            size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise BundleError(f"{self._path} lists too many tensors; the bundle is damaged, export it again")

    def _check(self, name: str, shape: list[int], types: tuple[str, ...]) -> None:
        """Compare a tensor's header with the manifest, before anything is read. Raises BundleError."""
        damaged = "the bundle is damaged, export it again"
        if name not in self._file.keys():  # noqa: SIM118  (not a dict)
            raise BundleError(f"{self._path} has no {name}; {damaged}")
        found = self._file.get_slice(name)
        if found.get_shape() != shape or found.get_dtype() not in types:
            raise BundleError(
                f"{self._path}: {name} is {found.get_dtype()} {found.get_shape()}, the manifest promises "
                f"{' or '.join(types)} {shape}; {damaged}"
            )

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
        """(D,) float32: the embedding that ends a row of an image's crops. BundleError if there is none."""
        self._check("image_newline", [self.info.hidden_size], TYPES[:2])
        newline: np.ndarray = self._file.get_slice("image_newline")[:].astype(np.float32)
        return newline
