"""Engines in a bundle: engines/<target>/, built from its graphs for one kind of machine, and optional."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import damaged_file, hash_file
from ppllava_edge.engines.bundle.manifest import FileEntry, Manifest
from ppllava_edge.engines.bundle.manifest_parser import MALFORMED, file_entry, file_name
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.engines.libraries import installed_version

ENGINE = "engine.json"
FORMAT = "ppllava-edge engine"
LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
CACHES = ("in place", "concatenated")
KV_DTYPES = ("float32", "float16", "int8")
LARGEST_MANIFEST = 1 << 20  # bytes

# Builders and the runtime agree on these. They are here because the runtime imports no builder.
CAPACITY_STEP = 256  # KV caches are rounded up to this: the cost of attention grows with the capacity
LAST_POSITIONS = 8  # positions whose logits one pass returns; speculation verifies that many at once
PLUGIN_STAGE = "pooling-plugin"  # pooling by the TensorRT plugin, whose windows are fixed


@dataclass(frozen=True)
class Engine:
    """engine.json.

    Attributes:
        folder: The engine's folder.
        target: Its target, as ppllava-build names it.
        bundle: The fingerprint of the graphs it was built from.
        made_by: Library → version, where the version must match the installed one.
        kv_dtype: The dtype of its decoder's KV cache.
        stages: Stage → its files, in order; a large decoder is cut into several.
        files: Sizes and hashes by file name.
        library: The library that opens it, one of LIBRARIES.
        cache: "in place", or "concatenated" where the present cache is a new, longer tensor.
        details: Compute capabilities, capacity, windows, …
    """

    folder: Path
    target: str
    bundle: str
    made_by: dict[str, str]
    kv_dtype: str
    stages: dict[str, tuple[str, ...]]
    files: dict[str, FileEntry]
    library: str = "onnxruntime"
    cache: str = "in place"
    details: dict[str, Any] = field(default_factory=dict)

    def paths(self, stage: str) -> list[Path]:
        """A stage's files in order; empty if the stage runs from the standard graph."""
        return [self.folder / name for name in self.stages.get(stage, ())]

    def as_json(self) -> dict[str, Any]:
        """The contents of engine.json."""
        return {
            "format": FORMAT,
            "target": self.target,
            "bundle": self.bundle,
            "library": self.library,
            "made_by": self.made_by,
            "kv_dtype": self.kv_dtype,
            "cache": self.cache,
            "details": self.details,
            "stages": {name: list(files) for name, files in self.stages.items()},
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }


def fingerprint(manifest: Manifest) -> str:
    """A digest that identifies a bundle's graphs and weights."""
    graphs = [
        f"{name} {entry.sha256}"
        for name, entry in sorted(manifest.files.items())
        if ".onnx" in name or name.startswith("embed_tokens")
    ]
    return hashlib.sha256("\n".join(graphs).encode()).hexdigest()


def engine_folder(bundle: Path, target: str) -> Path:
    """The folder of a target's engine."""
    return bundle / "engines" / target


def find_engine(bundle: Bundle, target: str, verify: bool = False) -> tuple[Engine | None, str]:
    """Find a bundle's engine for a target, complete and up to date.

    Args:
        bundle: The opened bundle.
        target: The target's name.
        verify: Check the hashes of ONNX Runtime engines too. TensorRT engines are always hashed before the
            library sees them, because it crashes on some damaged files.

    Returns:
        The engine and "", or None and why it can't be used ("" if there is none).
    """
    folder = engine_folder(bundle.path, target)
    if not (folder / ENGINE).is_file():
        return None, ""
    rebuild = f"rebuild it: ppllava-build {bundle.path} --target {target} --force"
    try:
        engine = read_engine(folder)
        if engine.bundle != fingerprint(bundle.manifest):
            return None, f"{folder} was built from another version of this bundle; {rebuild}"
        problem = _version_problem(engine, rebuild) or _file_problem(engine, verify, rebuild)
    except BundleError as error:
        return None, f"{error}; {rebuild}"
    return (None, problem) if problem else (engine, "")


def write_engine(staging: Path, engine: Engine) -> Engine:
    """Write engine.json into a staging folder and rename the folder to the engine's: complete or not at all.

    Args:
        staging: The folder with the engine's files.
        engine: The engine; its `files` are ignored.

    Returns:
        The engine with its files filled in.
    """
    paths = [path for path in sorted(staging.iterdir()) if path.is_file() and path.name != ENGINE]
    files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in paths}
    engine = replace(engine, files=files)
    (staging / ENGINE).write_text(json.dumps(engine.as_json(), indent=1) + "\n", encoding="utf-8")
    staging.chmod(0o755)
    shutil.rmtree(engine.folder, ignore_errors=True)
    staging.rename(engine.folder)
    return engine


def read_engine(folder: Path) -> Engine:
    """Read and check engine.json of a folder.

    Raises:
        BundleError: The file is damaged or doesn't describe an engine; in one line.
    """
    path = folder / ENGINE
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise BundleError(f"{path} is larger than such a file can be")
        engine = _parse(folder, json.loads(path.read_text(encoding="utf-8")))
    except BundleError:
        raise
    except (OSError, RecursionError, *MALFORMED) as error:
        raise BundleError(f"{path} is damaged ({type(error).__name__})") from None
    if any(name not in engine.files for names in engine.stages.values() for name in names):
        raise BundleError(f"{path} names stages whose files it doesn't list")
    if engine.kv_dtype not in KV_DTYPES:
        raise BundleError(f"{path} has an unknown kv_dtype")
    known = engine.library in LIBRARIES and engine.cache in CACHES
    if not known or not isinstance(engine.details, dict):
        raise BundleError(f"{path} is for a library or a cache that this version doesn't know")
    return engine


def _parse(folder: Path, value: Any) -> Engine:
    if value.get("format") != FORMAT:
        raise BundleError(f"{folder / ENGINE} is not an engine's description")
    return Engine(
        folder=folder,
        target=str(value["target"]),
        bundle=str(value["bundle"]),
        made_by={str(tool): str(version) for tool, version in value["made_by"].items()},
        kv_dtype=value["kv_dtype"],
        stages={str(stage): tuple(map(file_name, names)) for stage, names in value["stages"].items()},
        files={file_name(name): file_entry(name, entry) for name, entry in value["files"].items()},
        library=value.get("library", "onnxruntime"),
        cache=value.get("cache", "in place"),
        details=value.get("details", {}),
    )


def _version_problem(engine: Engine, rebuild: str) -> str:
    """Why the libraries installed here can't run an engine; "" if they can."""
    for library, version in engine.made_by.items():
        installed = installed_version(library)
        if not installed:
            return f"{engine.folder} needs {library} {version}, which is not installed"
        if installed != version and not installed.startswith(f"{version}."):
            return f"{engine.folder} was built with {library} {version}, not {installed}; {rebuild}"
    return ""


def _file_problem(engine: Engine, verify: bool, rebuild: str) -> str:
    """Which file of an engine is missing or damaged; "" if none is."""
    for name, entry in engine.files.items():
        path = engine.folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.bytes:
            return f"{path} is missing or damaged; {rebuild}"
    if verify or engine.library != "onnxruntime":
        damaged = damaged_file(engine.folder, engine.files, verify)
        if damaged:
            return f"{engine.folder / damaged} is damaged; {rebuild}"
    return ""
