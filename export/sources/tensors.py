"""Read a checkpoint lazily, tensor by tensor: one safetensors file, shards with an index, or .bin shards.

No code in a checkpoint runs: safetensors holds plain arrays, and .bin files are read with torch's
weights_only.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open

from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.sources.locate import read_json
from ppllava_edge.export.stages.layers import WeightSource

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PATTERNS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
_READ_BYTES = 1 << 22


class Checkpoint:
    """The tensors of a checkpoint directory, by name. A file is opened whenever one of its tensors is read.

    Attributes:
        folder: The directory.
        files: Its files with tensors.
        shapes: The shape of every tensor.
        requested: Names that were requested from source(), present or not.
        problems: Lines about requested tensors that are missing or have another shape.
    """

    def __init__(self, folder: Path):
        """List the tensors.

        Raises:
            PPLLaVAError: There are no weights, some are missing, or a file is damaged.
        """
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.requested: set[str] = set()
        self.problems: list[str] = []
        self._file_of: dict[str, Path] = {}
        self._bin_shards: dict[Path, Any] = {}
        self._hash = ""
        self.files = _find_files(folder)
        for file in self.files:
            for name, shape in self._list(file):
                self.shapes[name] = shape
                self._file_of[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def close(self) -> None:
        """Release all files."""
        self._bin_shards.clear()

    def source(self, prefix: str = "") -> WeightSource:
        """Return a function (name, *shape) → the tensor of that name below `prefix`, not loaded.

        A missing tensor, or one of another shape, is noted in `problems`.
        """

        def tensor(name: str, *shape: int) -> Tensor:
            full = prefix + name
            self.requested.add(full)
            if full not in self.shapes:
                self.problems.append(f"missing: {full} {list(shape)}")
            elif self.shapes[full] != shape and {self.shapes[full], shape} != {(), (1,)}:
                self.problems.append(
                    f"wrong shape: {full} is {list(self.shapes[full])}, expected {list(shape)}"
                )
            return Tensor(full, shape, lambda: self.load(full))

        return tensor

    def load(self, name: str) -> np.ndarray:
        """Load one tensor as float32 or float16.

        Raises:
            PPLLaVAError: The tensor holds NaN or infinity, or isn't of real numbers that NumPy reads.
        """
        try:
            array = self._read(self._file_of[name], name)
        except (AttributeError, SafetensorError) as error:  # float8 and smaller types
            raise PPLLaVAError(f"{name} is of a type that isn't exported ({printable(error)})") from None
        if array.dtype.kind == "c":
            raise PPLLaVAError(f"{name} is of a type that isn't exported ({array.dtype})")
        if array.dtype not in (np.float32, np.float16):
            array = array.astype(np.float32)  # bfloat16, float64
        if not np.isfinite(array).all():
            raise PPLLaVAError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        return array

    def hash(self) -> str:
        """Compute the SHA-256 of config.json and all tensor files, in the order of their names."""
        if self._hash:
            return self._hash
        digest = hashlib.sha256()
        for path in sorted([*self.files, self.folder / "config.json"]):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
        self._hash = digest.hexdigest()
        return self._hash

    def _list(self, file: Path) -> list[tuple[str, tuple[int, ...]]]:
        if file.suffix == ".bin":
            return [(name, tuple(tensor.shape)) for name, tensor in self._bin(file).items()]
        with _open_safetensors(file) as reader:
            names = reader.keys()
            return [(name, tuple(reader.get_slice(name).get_shape())) for name in names]

    def _read(self, file: Path, name: str) -> np.ndarray:
        if file.suffix == ".bin":
            return self._bin(file)[name].float().numpy()
        # opened for every tensor: the pages of a mapping that stays open count as this process's memory
        with _open_safetensors(file) as reader:
            return reader.get_tensor(name)

    def _bin(self, file: Path) -> Any:
        if file not in self._bin_shards:
            self._bin_shards[file] = _load_bin(file)
        return self._bin_shards[file]


def _find_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    for index in _INDEX_FILES:
        if (folder / index).is_file():
            return _shards(folder, folder / index)
    for pattern in _PATTERNS:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if files:
            return files
    raise PPLLaVAError(f"{folder} holds no weights: no model.safetensors, no index, no .bin shards")


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index lists."""
    shards = read_json(index).get("weight_map", {})
    files: list[Any] = list(shards.values()) if isinstance(shards, dict) else [None]
    if any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise PPLLaVAError(f"{index} names files outside the checkpoint, or isn't an index")
    names = sorted(set(files))
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing or not names:
        listed = printable(", ".join(missing)) or "none listed"
        raise PPLLaVAError(f"{index} lists shards that are missing: {listed}")
    return [folder / name for name in names]


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except SafetensorError as error:
        raise PPLLaVAError(f"{file} is not a valid safetensors file: {printable(error)}") from None


def _load_bin(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise PPLLaVAError(
            f"{file.name} is a .bin shard, which only torch reads: pip install 'ppllava-edge[train]'"
        ) from None
    can_map = zipfile.is_zipfile(file)  # torch's format before 1.6 is no zip file
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # unpickling errors of many kinds
        raise PPLLaVAError(
            f"{file} can't be read as plain weights ({type(error).__name__}); "
            "it may hold code, which is never run"
        ) from None
