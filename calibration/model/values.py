"""Stores for the values between stages and pieces: on disk for all samples, or in memory for one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError


class Values(Protocol):
    """Arrays by sample and name."""

    def put(self, sample: int, name: str, value: np.ndarray) -> None:
        """Store an array."""

    def get(self, sample: int, name: str) -> np.ndarray:
        """Load an array."""

    def has(self, sample: int, name: str) -> bool:
        """Whether the array is stored."""

    def drop(self, sample: int, name: str) -> None:
        """Delete the array, if it is stored."""


class DiskValues:
    """Values on disk: the activations of a few videos are larger than a layer.

    They survive an interrupt, and the next run reuses them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, sample: int, name: str) -> Path:
        return self.folder / f"{sample}-{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"

    def put(self, sample: int, name: str, value: np.ndarray) -> None:
        """Store an array atomically: after an interrupt it is complete or absent."""
        path = self._path(sample, name)
        part = path.with_suffix(".part")
        array = np.ascontiguousarray(value)
        with open(part, "wb") as file:  # np.save loses the error number of a full disk
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data.cast("B") if array.size else b"")
        part.replace(path)

    def get(self, sample: int, name: str) -> np.ndarray:
        """Load an array.

        Raises:
            PPLLaVAError: If its file is damaged, as a power cut may leave it: values aren't synced to disk.
        """
        path = self._path(sample, name)
        try:
            with open(path, "rb") as file:
                array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise PPLLaVAError(
                f"{path} is damaged ({error}); run the command again, it starts from the beginning"
            ) from None
        return array

    def has(self, sample: int, name: str) -> bool:
        """Whether the array is stored."""
        return self._path(sample, name).exists()

    def drop(self, sample: int, name: str) -> None:
        """Delete the array, if it is stored."""
        self._path(sample, name).unlink(missing_ok=True)


class MemoryValues:
    """Values of a single sample in memory, for one run of a small stage; sample numbers are ignored."""

    def __init__(self, inputs: dict[str, np.ndarray]):
        self.arrays = {name: np.ascontiguousarray(a) for name, a in inputs.items()}

    def put(self, sample: int, name: str, value: np.ndarray) -> None:
        """Store an array."""
        self.arrays[name] = value

    def get(self, sample: int, name: str) -> np.ndarray:
        """Load an array."""
        return self.arrays[name]

    def has(self, sample: int, name: str) -> bool:
        """Whether the array is stored."""
        return name in self.arrays

    def drop(self, sample: int, name: str) -> None:
        """Keep everything: the caller reads the results."""
