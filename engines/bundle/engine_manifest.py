"""Engines inside a bundle: engines/<target>/, made from its graphs for one kind of machine. Never needed to open the bundle elsewhere."""

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
from ppllava_edge.engines.bundle.manifest_parser import file_entry, file_name
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.engines.libraries import installed_version

ENGINE = "engine.json"
FORMAT = "ppllava-edge engine"
LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx")  # what opens an engine
CACHES = ("in place", "concatenated")

# What builders and the runtime agree on; here, because the runtime imports no builder.
CAPACITY_STEP = (
    256  # attention's cost follows the cache's capacity, so it fits the generation, rounded up to this
)
LAST_POSITIONS = 8  # whose logits a pass gives: what speculation verifies at once; of a shorter pass, all
PLUGIN_STAGE = "pooling-plugin"  # pooling with the plugin, whose windows are fixed


@dataclass(frozen=True)
class Engine:
    """engine.json. bundle: fingerprint of the graphs it was made from. made_by: tools by name → version, as far as it must agree. stages:
    name → files that make it up, in order (a decoder may be cut into pieces). kv_dtype: of the cache that its decoder takes. library: what
    opens it. cache: "in place", or "concatenated" where past grows into present. details: compute capabilities, capacity, windows, …"""

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
        """Files of a stage, in order; empty if the engine leaves it to the standard graph."""
        return [self.folder / name for name in self.stages.get(stage, ())]

    def as_json(self) -> dict[str, Any]:
        """The form that is written."""
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
    """What identifies a bundle's graphs and weights."""
    graphs = [
        f"{name} {entry.sha256}"
        for name, entry in sorted(manifest.files.items())
        if ".onnx" in name or name.startswith("embed_tokens")
    ]
    return hashlib.sha256("\n".join(graphs).encode()).hexdigest()


def engine_folder(bundle: Path, target: str) -> Path:
    """Where a target's engine lies."""
    return bundle / "engines" / target


def find_engine(bundle: Bundle, target: str, verify: bool = False) -> tuple[Engine | None, str]:
    """The bundle's engine for a target if it is there, whole and fresh; else None and why ("" if there is none).

    verify: check hashes too; engines that are not graphs are always hashed before a library sees them (some crash on damaged ones).
    """
    folder = engine_folder(bundle.path, target)
    if not (folder / ENGINE).is_file():
        return None, ""
    rebuild = f"rebuild it: ppllava-build {bundle.path} --target {target} --force"
    try:
        engine = read_engine(folder)
        if engine.bundle != fingerprint(bundle.manifest):
            return None, f"{folder} was made from another version of this bundle; {rebuild}"
        for tool, version in engine.made_by.items():
            have = installed_version(tool)
            if not have:
                return None, f"{folder} needs {tool} {version}, which is not installed"
            if have != version and not have.startswith(f"{version}."):
                return None, f"{folder} was made with {tool} {version}, here is {have}; {rebuild}"
        for name, entry in engine.files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.bytes:
                return None, f"{path} is missing or damaged; {rebuild}"
        if verify or engine.library != "onnxruntime":
            damaged = damaged_file(folder, engine.files, verify)
            if damaged:
                return None, f"{folder / damaged} is damaged; {rebuild}"
    except BundleError as error:
        return None, f"{error}; {rebuild}"
    return engine, ""


def write_engine(work: Path, engine: Engine) -> Engine:
    """Hash a work folder's files, write engine.json into it, and put it in the engine's place: whole or not at all."""
    paths = [path for path in sorted(work.iterdir()) if path.is_file() and path.name != ENGINE]
    files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in paths}
    engine = replace(engine, files=files)
    (work / ENGINE).write_text(json.dumps(engine.as_json(), indent=1) + "\n", encoding="utf-8")
    work.chmod(0o755)
    shutil.rmtree(engine.folder, ignore_errors=True)
    work.rename(engine.folder)
    return engine


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
        library, cache, details = (
            value.get("library", "onnxruntime"),
            value.get("cache", "in place"),
            value.get("details", {}),
        )
        if library not in LIBRARIES or cache not in CACHES or not isinstance(details, dict):
            raise BundleError(f"{path} is for a library or a cache that this version doesn't know")
        made_by = {str(tool): str(version) for tool, version in value["made_by"].items()}
        return Engine(
            folder,
            str(value["target"]),
            str(value["bundle"]),
            made_by,
            value["kv_dtype"],
            stages,
            files,
            library,
            cache,
            details,
        )
    except BundleError:
        raise
    except (
        OSError,
        UnicodeDecodeError,
        RecursionError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise BundleError(f"{path} is damaged ({type(error).__name__})") from None
