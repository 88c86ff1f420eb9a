"""Reading manifest.json, and checking that its values fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ppllava_edge.engines.bundle.manifest import FORMAT, MANIFEST, SCHEMA, Manifest
from ppllava_edge.engines.bundle.untrusted import decode_json, printable, read_limited
from ppllava_edge.engines.errors import BundleError, PPLLaVAError

LARGEST_MANIFEST = 1 << 20  # bytes
LARGEST_TOKENIZER = 128 << 20  # bytes of a tokenizer file: it is parsed whole
LARGEST_GRAPH = 256 << 20  # bytes of an .onnx file: parsed whole; large weights are in other files
LARGEST_IMAGE = 16 << 20  # pixels of an image's tiles
LARGEST_STATES = 256 << 20  # bytes of one frame's states, in float32
LARGEST_CLIP = 32 << 30  # bytes of the states of all frames that are sampled by default
LARGEST_CACHE = 1 << 40  # bytes of a KV cache over the whole context; only positions in use are allocated
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class _Header:
    """The part of manifest.json that every version has."""

    format: Any = None
    schema: Any = None


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        BundleError: The manifest is missing, damaged or too new; in one line.
    """
    try:
        data = read_limited(path.parent, path, LARGEST_MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST}") from None
    header = decode_json(path, data, _Header)
    if header.format != FORMAT:
        raise BundleError(f"{path} is not the manifest of a ppllava-edge bundle")
    schema = header.schema
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(f"{path} has no schema version")
    if schema > SCHEMA:
        raise BundleError(
            f"{path} has schema {schema}, newer than this ppllava-edge knows ({SCHEMA}); "
            "upgrade: pip install -U ppllava-edge"
        )
    manifest = decode_json(path, data, Manifest)
    problem = next(_problems(manifest), "")
    if problem:
        raise BundleError(f"{path} is damaged: {problem}; export the bundle again")
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Check a manifest before its bundle is written; its files may be missing yet.

    Raises:
        BundleError: The runtime would refuse it.
    """
    try:
        checked = msgspec.convert(manifest.as_json(), Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"the runtime can't open such a bundle: {printable(error)}") from None
    for problem in _model_problems(checked):
        raise BundleError(f"the runtime can't open such a bundle: {problem}")


def is_bundle(folder: Path) -> bool:
    """Whether a folder's manifest.json is one of ours, of whatever version, and even if it is damaged."""
    try:
        return FORMAT.encode() in read_limited(folder, folder / MANIFEST, LARGEST_MANIFEST)
    except (FileNotFoundError, BundleError):
        return False


def file_name_problem(names: Iterable[str]) -> str:
    """Why file names from a bundle are refused (one isn't plain, or leaves the directory), or ""."""
    for name in names:
        if not _FILE_NAME.match(name) or ".." in name:
            shown = printable(repr(name), 60)
            return f"the file name {shown} leaves the bundle or is not a plain name; refused"
    return ""


def _problems(m: Manifest) -> Iterator[str]:
    """What doesn't fit together in a manifest whose values are within their limits each."""
    if name_problem := file_name_problem(m.files):
        yield name_problem
    missing = [name for name in m.required_files() if name not in m.files]
    if missing:
        yield f"the manifest lists no {', '.join(missing)}"
    for name, entry in m.files.items():
        limit = (
            LARGEST_TOKENIZER if name.endswith(".json") else LARGEST_GRAPH if name.endswith(".onnx") else 0
        )
        if limit and entry.bytes > limit:
            yield f"{name} has {entry.bytes} bytes, more than such a file can have ({limit >> 20} MB)"
    yield from _model_problems(m)


def _model_problems(m: Manifest) -> Iterator[str]:
    """Those of them that have nothing to do with the files."""
    if m.pooling.guided and m.question is None:
        yield "prompt-guided pooling without a question tower"
    if "decoder" not in m.precision:
        yield "precision has no decoder"
    yield from _vision_problems(m)
    yield from _pooling_problems(m)
    yield from _decoder_problems(m)


def _vision_problems(m: Manifest) -> Iterator[str]:
    v, p = m.vision, m.preprocessing
    if p.size != v.image_size:
        yield f"preprocessing.size is {p.size}, vision.image_size {v.image_size}"
    patch = v.image_size // v.grid[0]
    if patch < 1 or any(v.image_size // patch != side for side in v.grid):
        yield f"vision.grid {list(v.grid)} is not a grid of square patches over {v.image_size} pixels"
    if v.max_frames is not None and v.default_frames > v.max_frames:
        yield f"vision.default_frames is {v.default_frames}, above vision.max_frames ({v.max_frames})"
    states = 4 * v.states * (v.patches + v.class_token) * v.hidden_size
    if states > LARGEST_STATES or states * v.default_frames > LARGEST_CLIP:
        yield f"vision: the states of {v.default_frames} frames take {states * v.default_frames >> 20} MB"
    for height, width in p.image_grids:
        if height % p.size or width % p.size:
            yield f"preprocessing.image_grids has {height}x{width}, not whole tiles of {p.size} pixels"
        if height * width > LARGEST_IMAGE:
            limit = LARGEST_IMAGE >> 20
            yield f"preprocessing.image_grids has {height}x{width}, more than {limit} megapixels"


def _pooling_problems(m: Manifest) -> Iterator[str]:
    p = m.pooling
    if p.windowed:
        for windows, name in ((p.video, "pooling.video"), (p.image, "pooling.image")):
            try:
                windows.check(m.vision.grid, name)
            except PPLLaVAError as error:
                yield str(error)
    if p.method == "pllava":
        if p.pooled_shape is None:
            yield "pooling.pooled_shape is missing"
        elif math.prod(p.pooled_shape) >= m.decoder.context:
            yield f"pooling.pooled_shape {list(p.pooled_shape)} fills decoder.context ({m.decoder.context})"


def _decoder_problems(m: Manifest) -> Iterator[str]:
    d = m.decoder
    per_position = 2 * d.layers * d.kv_heads * d.head_size * _ITEM_BYTES[d.kv_dtype]
    if per_position * d.context > LARGEST_CACHE:
        yield f"the decoder's KV cache takes {per_position * d.context >> 30} GB over the whole context"
