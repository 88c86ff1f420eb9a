"""Engines inside a bundle: engines/<target>/, made from its graphs for one kind of machine. Never needed to open the bundle elsewhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import Bundle, FileEntry, Manifest, file_entry, file_name, hash_file
from .errors import BundleError
from .ort import import_onnxruntime

ENGINE = "engine.json"
FORMAT = "ppllava-edge engine"


@dataclass(frozen=True)
class Engine:
    """engine.json. bundle: fingerprint of the graphs it was made from. made_by: tools by name → version. stages: name → files that make it
    up, in order (a decoder may be cut into pieces). kv_dtype: of the cache that its decoder takes."""

    folder: Path
    target: str
    bundle: str
    made_by: dict[str, str]
    kv_dtype: str
    stages: dict[str, tuple[str, ...]]
    files: dict[str, FileEntry]

    def paths(self, stage: str) -> list[Path]:
        """Files of a stage, in order; empty if the engine leaves it to the standard graph."""
        return [self.folder / name for name in self.stages.get(stage, ())]

    def as_json(self) -> dict[str, Any]:
        """The form that is written."""
        return {
            "format": FORMAT, "target": self.target, "bundle": self.bundle, "made_by": self.made_by, "kv_dtype": self.kv_dtype,
            "stages": {name: list(files) for name, files in self.stages.items()},
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }  # fmt: skip


def fingerprint(manifest: Manifest) -> str:
    """What identifies a bundle's graphs and weights."""
    graphs = [f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items()) if ".onnx" in name]
    return hashlib.sha256("\n".join(graphs).encode()).hexdigest()


def engine_folder(bundle: Path, target: str) -> Path:
    """Where a target's engine lies."""
    return bundle / "engines" / target


def find_engine(bundle: Bundle, target: str, verify: bool = False) -> tuple[Engine | None, str]:
    """The bundle's engine for a target if it is there, whole and fresh; else None and why ("" if there is none).

    verify: check hashes too. An engine that can't be used is never an error: the standard graphs serve.
    """
    folder = engine_folder(bundle.path, target)
    if not (folder / ENGINE).is_file():
        return None, ""
    rebuild = f"rebuild it: ppllava-build {bundle.path} --target {target} --force"
    try:
        engine = read_engine(folder)
        if engine.bundle != fingerprint(bundle.manifest):
            return None, f"{folder} was made from another version of this bundle; {rebuild}"
        have = {"onnxruntime": minor(str(import_onnxruntime().__version__))}
        for tool, version in engine.made_by.items():
            if tool in have and have[tool] != version:
                return None, f"{folder} was made with {tool} {version}, here is {have[tool]}; {rebuild}"
        for name, entry in engine.files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.bytes or (verify and hash_file(path) != entry.sha256):
                return None, f"{path} is missing or damaged; {rebuild}"
    except BundleError as error:
        return None, f"{error}; {rebuild}"
    return engine, ""


def read_engine(folder: Path) -> Engine:
    """engine.json of a folder. Raises BundleError in one line."""
    path = folder / ENGINE
    try:
        if path.stat().st_size > 1 << 20:
            raise BundleError(f"{path} is larger than such a file can be")
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("format") != FORMAT:
            raise BundleError(f"{path} is not an engine's description")
        files = {file_name(name): file_entry(name, f) for name, f in value["files"].items()}
        stages = {str(name): tuple(file_name(f) for f in parts) for name, parts in value["stages"].items()}
        if any(part not in files for parts in stages.values() for part in parts):
            raise BundleError(f"{path} names stages whose files it doesn't list")
        if value["kv_dtype"] not in ("float32", "float16", "int8"):
            raise BundleError(f"{path} has an unknown kv_dtype")
        made_by = {str(tool): str(version) for tool, version in value["made_by"].items()}
        return Engine(folder, str(value["target"]), str(value["bundle"]), made_by, value["kv_dtype"], stages, files)
    except BundleError:
        raise
    except (OSError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({type(error).__name__})") from None


def minor(version: str) -> str:
    """ "1.31.1" → "1.31" """
    return ".".join(version.split(".")[:2])
