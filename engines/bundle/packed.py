"""The bundle packed with ppllava-edge, and how a bundle's name resolves to a directory."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from ppllava_edge.engines.bundle.manifest import MANIFEST

PACKED = "nano"


def packed_bundle() -> Path:
    """The directory of nano, the small trained model that is packed with ppllava-edge (docs/nano.md)."""
    return Path(str(resources.files("ppllava_edge.nano"))) / "bundle"


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path with "~" expanded; one of an unknown user stays as it is, as in a shell."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """Resolve a bundle's name to its directory.

    Args:
        name: A directory. None and "nano" mean the packed bundle, unless there is a folder "nano" with a
            manifest in the working directory.

    Returns:
        The directory, unchecked (Bundle.open checks it).
    """
    if name is None:
        return packed_bundle()
    folder = expanded(name)
    if str(name) == PACKED and not (folder / MANIFEST).is_file():
        return packed_bundle()
    return folder
