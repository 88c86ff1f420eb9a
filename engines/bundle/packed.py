"""The bundle that is packed with ppllava-edge, and how commands find it by its name."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from ppllava_edge.engines.bundle.manifest import MANIFEST

PACKED = "nano"


def packed_bundle() -> Path:
    """The directory of nano, the small trained model that is packed with ppllava-edge (docs/nano.md)."""
    return Path(str(resources.files("ppllava_edge.nano"))) / "bundle"


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """The directory that a user means by a bundle's name.

    Args:
        name: A directory; None or "nano": the packed bundle, unless a bundle lies in a folder of that name.

    Returns:
        The directory, not checked yet (Bundle.open does that).
    """
    if name is None:
        return packed_bundle()
    folder = Path(name).expanduser()
    if str(name) == PACKED and not (folder / MANIFEST).is_file():
        return packed_bundle()
    return folder
