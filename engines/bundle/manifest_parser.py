"""Reading and checking manifest.json: one function per section."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.json_section import Section
from ppllava_edge.engines.bundle.manifest import (
    FAMILIES,
    FORMAT,
    MANIFEST,
    POOLINGS,
    SCHEMA,
    DecoderInfo,
    FileEntry,
    Manifest,
    PoolingInfo,
    Preprocessing,
    QuestionInfo,
    VisionInfo,
)
from ppllava_edge.engines.bundle.prompt_template import PromptTemplate
from ppllava_edge.engines.bundle.windows import Triple, Windows
from ppllava_edge.engines.errors import BundleError

LARGEST_MANIFEST = 4 << 20  # bytes
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # raised when parsing bad JSON
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")
_TOKEN_ID = 1 << 31  # limit for token ids
_LENGTH = 1 << 16  # limit for widths, frame counts and question lengths


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        BundleError: The manifest is missing, damaged or too new; in one line.
    """
    value = _read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a ppllava-edge bundle")
    schema = value.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(f"{path} has no schema version")
    if schema > SCHEMA:
        raise BundleError(
            f"{path} has schema {schema}, newer than this ppllava-edge knows ({SCHEMA}); "
            "upgrade: pip install -U ppllava-edge"
        )
    try:
        manifest = _manifest(Section(value))
        _check_consistency(manifest)
        return manifest
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
    except MALFORMED as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise BundleError(f"{path} is damaged: {what}") from None


def file_entry(name: str, value: Any) -> FileEntry:
    """A file's size and hash, from a bundle's or an engine's manifest.

    Args:
        name: The file's name, for messages.
        value: The JSON object.

    Raises:
        ValueError: The value isn't a size and a hash.
    """
    s = Section(value, f"files.{name}")
    return FileEntry(bytes=s.count("bytes", 1 << 50, least=0), sha256=s.sha256("sha256"))


def file_name(name: str) -> str:
    """Return a file name from a manifest if it is plain and stays in its directory.

    Raises:
        BundleError: It isn't plain, or leaves the directory.
    """
    if not _FILE_NAME.match(name) or ".." in name:
        raise BundleError(f"the file name {name[:60]!r} leaves the bundle or is not a plain name; refused")
    return name


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise BundleError(f"{path} is larger than a manifest can be; this is not a bundle")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: not JSON ({type(error).__name__})") from None


def _manifest(s: Section) -> Manifest:
    return Manifest(
        name=s.text("name"),
        family=s.choice("family", FAMILIES),
        precision=s.texts("precision"),
        vision=_vision(s.section("vision")),
        preprocessing=_preprocessing(s.section("preprocessing")),
        question=None if s.is_null("question") else _question(s.section("question")),
        pooling=_pooling(s.section("pooling")),
        decoder=_decoder(s.section("decoder")),
        prompt=PromptTemplate.from_json(s.raw("prompt")),
        image_token=s.count("image_token", _TOKEN_ID, least=0),
        stop_ids=s.counts("stop_ids", _TOKEN_ID, least=0),
        tokenizer=s.flag("tokenizer"),
        checkpoint=dict(s.raw("checkpoint")),
        created_by=s.text("created_by"),
        demo=s.flag("demo"),
        calibration=s.facts("calibration"),
        parity=s.facts("parity"),
        files={file_name(name): file_entry(name, entry) for name, entry in s.raw("files").items()},
    )


def _vision(s: Section) -> VisionInfo:
    return VisionInfo(
        image_size=s.count("image_size", 4096),
        grid=s.pair("grid", 1024),
        hidden_size=s.count("hidden_size", _LENGTH),
        class_token=s.flag("class_token"),
        states=s.count("states", 256),
        max_frames=None if s.is_null("max_frames") else s.count("max_frames", _LENGTH),
        default_frames=s.count("default_frames", _LENGTH),
    )


def _preprocessing(s: Section) -> Preprocessing:
    return Preprocessing(
        method=s.choice("method", ("squash", "pad")),
        size=s.count("size", 4096),
        mean=s.three("mean"),
        std=s.three("std", positive=True),
        image_grids=s.pairs("image_grids", 1 << 16),
    )


def _question(s: Section) -> QuestionInfo:
    return QuestionInfo(
        length=s.count("length", _LENGTH),
        padded=s.flag("padded"),
        pad_id=s.count("pad_id", _TOKEN_ID, least=0),
        embedding_size=s.count("embedding_size", _LENGTH),
    )


def _pooling(s: Section) -> PoolingInfo:
    return PoolingInfo(
        method=s.choice("method", POOLINGS),
        temperature=s.positive("temperature"),
        video=Windows.from_json(s.raw("video")),
        image=Windows.from_json(s.raw("image")),
        pooled_shape=None if s.is_null("pooled_shape") else _triple(s.raw("pooled_shape")),
    )


def _triple(value: Any) -> Triple | None:
    return Windows.from_json({"output_size": value}).output_size


def _decoder(s: Section) -> DecoderInfo:
    return DecoderInfo(
        hidden_size=s.count("hidden_size", _LENGTH),
        layers=s.count("layers", 1 << 12),
        kv_heads=s.count("kv_heads", 1 << 12),
        head_size=s.count("head_size", 1 << 12),
        vocab=s.count("vocab", 1 << 24),
        context=s.count("context", 1 << 24),
        kv_dtype=s.choice("kv_dtype", ("float32", "float16", "int8")),
    )


def _check_consistency(manifest: Manifest) -> None:
    if manifest.pooling.guided and manifest.question is None:
        raise BundleError("prompt-guided pooling without a question tower")
    missing = [name for name in manifest.required_files() if name not in manifest.files]
    if missing:
        raise BundleError(f"the manifest lists no {', '.join(missing)}; it is damaged, export it again")
