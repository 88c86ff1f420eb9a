"""Find a checkpoint's directory: on this machine, in the hub's cache, or on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.packed import expanded
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import PPLLaVAError

LARGEST_JSON = 32 << 20  # bytes; the index of a checkpoint of 200 billion parameters has 0.2 MB
_SMALL_FILES = ("*.json", "*.model", "*.txt", "clip*/*.json", "siglip*/*.json", "clip*/*.txt")


def locate(name: str, subfolder: str = "", patterns: Iterable[str] | None = None) -> Path:
    """Return a local directory, or download a hub repository.

    Args:
        name: A directory, or a hub id ("owner/name") that is read from the hub's cache or, where allowed, the
            network.
        subfolder: A folder inside it.
        patterns: File patterns to download; None: everything.

    Raises:
        PPLLaVAError: No directory or repository of that name exists.
    """
    path = expanded(name)
    if path.is_file():
        raise PPLLaVAError(f"{name} is a file; name the checkpoint's directory (the one with config.json)")
    if path.is_dir():
        folder = path / subfolder
        if not folder.is_dir():
            raise PPLLaVAError(f"{name} has no sub-folder {subfolder}")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise PPLLaVAError(f"no checkpoint at {name}: no such directory, and not a hub id (owner/name)")
    prefix = f"{subfolder}/" if subfolder else ""
    return _download(name, [prefix + pattern for pattern in patterns or ["*"]]) / subfolder


def locate_checkpoint(name: str, subfolder: str = "") -> Path:
    """Like locate(), but download only the files that an export reads.

    These are the configuration, the tokenizers, and safetensors files, or .bin shards if there are none.
    """
    folder = locate(name, subfolder, [*_SMALL_FILES, "*.safetensors"])
    if not expanded(name).is_dir() and not any(folder.glob("*.safetensors")):
        folder = locate(name, subfolder, [*_SMALL_FILES, "*.bin"])
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        PPLLaVAError: The file is missing, unreadable, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never ends
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON >> 20} MB")
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise PPLLaVAError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also for numbers of many digits
        raise PPLLaVAError(f"{path} can't be read as JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise PPLLaVAError(f"{path} doesn't hold a JSON object")
    return value


def _download(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise PPLLaVAError(
            f"{name} is not a directory here; to read it from the hub, install the extra: "
            "pip install 'ppllava-edge[export]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, some with pages of advice
        lines = str(error).strip().splitlines()
        reason = lines[0][:160] if lines else ""
        raise PPLLaVAError(
            f"{name} is not a directory here and could not be read from the hub "
            f"({type(error).__name__}: {reason}); download it and name its directory"
        ) from None
