"""Reading a checkpoint lazily, tensor by tensor: one safetensors file, shards with an index, or .bin shards.

Nothing in a checkpoint runs: safetensors holds plain arrays, and .bin files are read with torch's weights_only.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 known to numpy)
import numpy as np
from safetensors import SafetensorError, safe_open

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.tensors import Tensor

_SMALL_FILES = ("*.json", "*.model", "*.txt", "clip*/*.json", "siglip*/*.json", "clip*/*.txt")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def locate(name: str, subfolder: str = "", patterns: Iterable[str] | None = None) -> Path:
    """A local directory as it is, or a hub id ("owner/name") from the hub's cache or, where allowed, the network.

    Raises PPLLaVAError in one line when there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise PPLLaVAError(f"{name} is a file; name the checkpoint's directory (the one with config.json)")
    if path.is_dir():
        folder = path / subfolder
        if not folder.is_dir():
            raise PPLLaVAError(f"{name} has no sub-folder {subfolder}")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise PPLLaVAError(f"no checkpoint at {name}: no such directory, and not a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise PPLLaVAError(
            f"{name} is not a directory here; to read it from the hub, install the extra: pip install 'ppllava-edge[export]'"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [prefix + pattern for pattern in patterns] if patterns else [prefix + "*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted)) / subfolder
    except Exception as error:  # the hub's client raises many kinds, some with pages of advice
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise PPLLaVAError(
            f"{name} is not a directory here and could not be read from the hub ({type(error).__name__}: {reason}); download it and name its directory"
        ) from None


def locate_checkpoint(name: str, subfolder: str = "") -> Path:
    """As locate; from the hub, only what is read: configuration, tokenizers, and safetensors, or .bin shards where there are none."""
    folder = locate(name, subfolder, [*_SMALL_FILES, "*.safetensors"])
    if not Path(name).expanduser().is_dir() and not any(folder.glob("*.safetensors")):
        folder = locate(name, subfolder, [*_SMALL_FILES, "*.bin"])
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PPLLaVAError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PPLLaVAError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise PPLLaVAError(f"{path} doesn't hold a JSON object")
    return value


class Checkpoint:
    """The tensors of a checkpoint directory, by name. Files are opened when their first tensor is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.asked: set[str] = set()
        self.problems: list[str] = []
        self._file_of: dict[str, Path] = {}
        self._loaded: dict[Path, Any] = {}  # .bin shards
        self._hash = ""
        self.files = self._find_files()
        for file in self.files:
            for name, shape in self._list(file):
                self.shapes[name], self._file_of[name] = shape, file

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def close(self) -> None:
        """Let go of all files."""
        self._loaded.clear()

    def source(self, prefix: str = "") -> Callable[..., Tensor]:
        """source("linear_1.weight", 48, 32): that tensor below prefix. A missing or wrongly shaped one is noted in `problems`."""

        def tensor(name: str, *shape: int) -> Tensor:
            full = prefix + name
            self.asked.add(full)
            if full not in self.shapes:
                self.problems.append(f"missing: {full} {list(shape)}")
            elif self.shapes[full] != shape and {self.shapes[full], shape} != {(), (1,)}:
                self.problems.append(
                    f"wrong shape: {full} is {list(self.shapes[full])}, expected {list(shape)}"
                )
            return Tensor(full, shape, lambda: self.load(full))

        return tensor

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32 or float16. Raises PPLLaVAError if it holds NaN or infinity."""
        array = self._read(self._file_of[name], name)
        if array.dtype not in (np.float32, np.float16):
            array = array.astype(np.float32)  # bfloat16, float64
        if not np.isfinite(array).all():
            raise PPLLaVAError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        return array

    def hash(self) -> str:
        """SHA-256 over configuration and tensor files, in the order of their names."""
        if self._hash:
            return self._hash
        digest = hashlib.sha256()
        for path in sorted([*self.files, self.folder / "config.json"]):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        self._hash = digest.hexdigest()
        return self._hash

    def _find_files(self) -> list[Path]:
        if (single := self.folder / "model.safetensors").is_file():
            return [single]
        for index in _INDEX_FILES:
            if (self.folder / index).is_file():
                names = sorted(set(read_json(self.folder / index).get("weight_map", {}).values()))
                if any(not isinstance(name, str) or Path(name).name != name for name in names):
                    raise PPLLaVAError(f"{self.folder / index} names files outside the checkpoint")
                missing = [name for name in names if not (self.folder / name).is_file()]
                if missing or not names:
                    raise PPLLaVAError(
                        f"{self.folder / index} lists shards that are missing: {', '.join(missing) or 'none listed'}"
                    )
                return [self.folder / name for name in names]
        for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
            if found := sorted(self.folder.glob(pattern)):
                return found
        raise PPLLaVAError(f"{self.folder} holds no weights: no model.safetensors, no index, no .bin shards")

    def _list(self, file: Path) -> list[tuple[str, tuple[int, ...]]]:
        if file.suffix == ".bin":
            return [(name, tuple(tensor.shape)) for name, tensor in self._bin(file).items()]
        with _safetensors(file) as reader:
            return [(name, tuple(reader.get_slice(name).get_shape())) for name in reader.keys()]  # noqa: SIM118  (not a dict)

    def _read(self, file: Path, name: str) -> np.ndarray:
        if file.suffix == ".bin":
            return self._bin(file)[name].float().numpy()
        with _safetensors(
            file
        ) as reader:  # opened for every tensor: the pages of a mapping that stays open count as our memory
            return reader.get_tensor(name)

    def _bin(self, file: Path) -> Any:
        if file not in self._loaded:
            self._loaded[file] = _load_bin(file)
        return self._loaded[file]


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except SafetensorError as error:
        raise PPLLaVAError(f"{file} is not a valid safetensors file: {error}") from None


def _load_bin(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise PPLLaVAError(
            f"{file.name} is a .bin shard, which only torch reads: pip install 'ppllava-edge[train]'"
        ) from None
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )  # old ones can't be mapped
    except Exception as error:  # unpickling errors of many kinds
        raise PPLLaVAError(
            f"{file} can't be read as plain weights ({type(error).__name__}); it may hold code, which is never run"
        ) from None
