"""The bundle: the one contract between export and runtime. docs/bundle.md describes every field.

A bundle is checked when it is opened. Names, sizes, schema and shapes are always checked. Hashes are always
checked below 256 MB in total; larger bundles are hashed on the first open and on request, and then remembered
by a stamp (size, time, inode) in the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

from ppllava_edge.engines.bundle.integrity import damaged_file
from ppllava_edge.engines.bundle.manifest import MANIFEST, Manifest
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.bundle.packed import find_bundle
from ppllava_edge.engines.bundle.untrusted import file_size
from ppllava_edge.engines.errors import BundleError


class Bundle:
    """An opened, checked bundle directory.

    Attributes:
        path: The directory.
        manifest: Its manifest.json.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Read the manifest and check every file.

        Args:
            path: The directory, or "nano" for the packed bundle.
            verify: Hash the files of a large bundle even if a stamp remembers them.

        Raises:
            BundleError: Not a bundle, incomplete, damaged or too new; in one line.
        """
        folder = find_bundle(path)
        try:
            exists, is_folder = folder.exists(), folder.is_dir()
        except OSError as error:  # a name too long, a folder above that may not be entered
            raise BundleError(f"no bundle at {path}: {error.strerror}") from None
        if not exists:
            raise BundleError(f"no bundle at {path}: no such directory")
        if not is_folder:
            raise BundleError(f"{path} is a file; a bundle is a directory, as ppllava-export writes it")
        bundle = cls(folder, read_manifest(folder / MANIFEST))
        bundle._check_sizes()
        bundle._check_hashes(verify)
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the manifest's files.

        Raises:
            BundleError: The manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}; it was exported without it")
        return self.path / name

    @property
    def total_bytes(self) -> int:
        """Bytes of all files in the manifest."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path / name
            try:
                size = file_size(self.path, path)
            except FileNotFoundError:
                raise BundleError(f"{self.path} is incomplete: {name} is missing; export it again") from None
            if size != entry.bytes:
                raise BundleError(
                    f"{path} has {size} bytes, the manifest says {entry.bytes}; "
                    "it is damaged, export it again"
                )

    def _check_hashes(self, verify: bool) -> None:
        damaged = damaged_file(self.path, self.manifest.files, verify)
        if damaged:
            raise BundleError(
                f"{self.path / damaged} doesn't match its hash in the manifest; "
                "it is damaged, export it again"
            )
