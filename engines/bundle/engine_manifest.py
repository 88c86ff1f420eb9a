"""Engines in a bundle: engines/<target>/, built from its graphs for one kind of machine, and optional."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import damaged_file, hash_file, remember_hashes
from ppllava_edge.engines.bundle.manifest import FileEntry, KVDtype, Label, Manifest, one_of
from ppllava_edge.engines.bundle.manifest_parser import LARGEST_MANIFEST, file_name_problem
from ppllava_edge.engines.bundle.untrusted import decode_json, file_size, read_limited
from ppllava_edge.engines.bundle.windows import Extent
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.engines.libraries import installed_version
from ppllava_edge.engines.staging import publish

ENGINE = "engine.json"
FORMAT = "ppllava-edge engine"
Library = Annotated[str, one_of("onnxruntime", "tensorrt", "tensorrt_rtx")]
Cache = Annotated[str, one_of("in place", "concatenated")]
Three = Annotated[list[Extent], Meta(min_length=3, max_length=3)]

# Builders and the runtime agree on these. They are here because the runtime imports no builder.
CAPACITY_STEP = 256  # KV caches are rounded up to this: the cost of attention grows with the capacity
LAST_POSITIONS = 8  # positions whose logits one pass returns; speculation verifies that many at once
PLUGIN_STAGE = "pooling-plugin"  # pooling by the TensorRT plugin, whose windows are fixed


class Details(TypedDict, total=False):
    """What a TensorRT engine was built for; empty for ONNX Runtime.

    Attributes:
        capacity: Positions of the KV cache.
        frames: Fewest, usual and most frames of a clip.
        plugin: How pooling is built.
        decoder_profiles: Optimisation profiles of the decoder.
        capabilities: Compute capabilities of GPUs that it runs on.
        device: Name of the GPU that it was built on.
        kernel, stride: Windows of the plugin, (frames, rows, columns).
    """

    capacity: Annotated[int, Meta(ge=1, le=1 << 22)]
    frames: Annotated[list[int], Meta(max_length=3)]
    plugin: Annotated[str, one_of("none", "python", "aot")]
    decoder_profiles: Literal[1, 2]
    capabilities: Annotated[list[Label], Meta(max_length=64)]
    device: Label
    kernel: Three
    stride: Three


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
        library: The library that opens it.
        cache: "in place", or "concatenated" where the present cache is a new, longer tensor.
        details: What it was built for: the keys of Details.
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


@dataclass(frozen=True)
class _Description:
    """The contents of engine.json, with the limits of each value; attributes as in Engine."""

    target: Label
    bundle: Label
    made_by: dict[Library, Label]
    kv_dtype: KVDtype
    stages: Annotated[dict[Label, tuple[Label, ...]], Meta(max_length=256)]
    files: Annotated[dict[str, FileEntry], Meta(max_length=4096)]
    library: Library = "onnxruntime"
    cache: Cache = "in place"
    details: Details = field(default_factory=lambda: Details())


@dataclass(frozen=True)
class _Header:
    """The part of engine.json that tells what it is."""

    format: Any = None


def fingerprint(manifest: Manifest) -> str:
    """A digest that identifies a bundle's graphs and weights."""
    graphs = [
        f"{name} {entry.sha256}"
        for name, entry in sorted(manifest.files.items())
        if ".onnx" in name or name.startswith("embed_tokens")
    ]
    return hashlib.sha256("\n".join(graphs).encode()).hexdigest()


def engine_folder(bundle: Path, target: str) -> Path:
    """The folder of a target's engine, whether it exists or not.

    Raises:
        BundleError: It is outside the bundle, or not a folder: building there would replace what isn't ours.
    """
    folder = bundle / "engines" / target
    try:
        if not folder.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(f"{folder} is a link that leaves the bundle; remove the link")
        if folder.exists() and not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; remove it")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise BundleError(f"{folder}: {getattr(error, 'strerror', None) or error}; remove the link") from None
    return folder


def find_engine(bundle: Bundle, target: str, verify: bool = False) -> tuple[Engine | None, str]:
    """Find a bundle's engine for a target, complete and up to date.

    Args:
        bundle: The opened bundle.
        target: The target's name.
        verify: Hash the files of a large engine even if a stamp remembers them. Files are hashed before a
            library sees them: TensorRT crashes on some damaged files, ONNX Runtime answers wrongly.

    Returns:
        The engine and "", or None and why it can't be used ("" if there is none).
    """
    rebuild = f"rebuild it: ppllava-build {bundle.path} --target {target} --force"
    try:
        folder = engine_folder(bundle.path, target)
        if not os.path.lexists(folder / ENGINE):
            return None, ""
        engine = read_engine(folder)
        if engine.bundle != fingerprint(bundle.manifest):
            return None, f"{folder} was built from another version of this bundle; {rebuild}"
        problem = _version_problem(engine, rebuild) or _file_problem(engine, verify, rebuild)
    except BundleError as error:
        return None, f"{error}; {rebuild}"
    return (None, problem) if problem else (engine, "")


def write_engine(staging: Path, engine: Engine) -> Engine:
    """Write engine.json into a staging folder and rename the folder to the engine's, or exchange the two.

    Readers find the old engine or the new one, as a whole.

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
    publish(staging, engine.folder)
    remember_hashes(engine.folder, files)
    return engine


def read_engine(folder: Path) -> Engine:
    """Read and check engine.json of a folder.

    Raises:
        BundleError: The file is damaged or doesn't describe an engine; in one line.
    """
    path = folder / ENGINE
    try:
        data = read_limited(folder.parent.parent, path, LARGEST_MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"{folder} is not an engine: it has no {ENGINE}") from None
    header = decode_json(path, data, _Header)
    if header.format != FORMAT:
        raise BundleError(f"{path} is not an engine's description")
    found = decode_json(path, data, _Description)
    listed = [name for names in found.stages.values() for name in names]
    if problem := file_name_problem([*found.files, *listed]):
        raise BundleError(f"{path} is damaged: {problem}")
    if any(name not in found.files for name in listed) or not all(found.stages.values()):
        raise BundleError(f"{path} names stages whose files it doesn't list")
    return Engine(folder=folder, **vars(found))


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
        try:
            size = file_size(engine.folder, path)
        except FileNotFoundError:
            size = -1
        if size != entry.bytes:
            return f"{path} is missing or damaged; {rebuild}"
    damaged = damaged_file(engine.folder, engine.files, verify)
    return f"{engine.folder / damaged} is damaged; {rebuild}" if damaged else ""
