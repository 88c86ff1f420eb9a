"""manifest_parser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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
from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import BundleError

LARGEST_MANIFEST = 4 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json. Raises BundleError in one line, whatever the file holds."""
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise BundleError(f"{path} is larger than a manifest can be; this is not a bundle")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a ppllava-edge bundle")
    schema = value.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(f"{path} has no schema version")
    if schema > SCHEMA:
        raise BundleError(
            f"{path} has schema {schema}, newer than this ppllava-edge knows ({SCHEMA}); upgrade: pip install -U ppllava-edge"
        )
    try:
        return _parse(value)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise BundleError(f"{path} is damaged: {what}") from None


def _parse(value: dict[str, Any]) -> Manifest:
    v, p, q, pool, d = (value[key] for key in ("vision", "preprocessing", "question", "pooling", "decoder"))
    manifest = Manifest(
        name=_text(value["name"], "name"),
        family=_one_of(value["family"], FAMILIES, "family"),
        precision={_text(k, "precision"): _text(x, "precision") for k, x in value["precision"].items()},
        vision=VisionInfo(
            _count(v["image_size"], "vision.image_size", 4096),
            _pair(v["grid"], "vision.grid", 1024),
            _count(v["hidden_size"], "vision.hidden_size", 1 << 16),
            _flag(v["class_token"], "vision.class_token"),
            _count(v["states"], "vision.states", 256),
            None if v["max_frames"] is None else _count(v["max_frames"], "vision.max_frames", 1 << 16),
            _count(v["default_frames"], "vision.default_frames", 1 << 16),
        ),
        preprocessing=Preprocessing(
            _one_of(p["method"], ("squash", "pad"), "preprocessing.method"),
            _count(p["size"], "preprocessing.size", 4096),
            _three(p["mean"], "preprocessing.mean"),
            _three(p["std"], "preprocessing.std", positive=True),
            tuple(_pair(g, "preprocessing.image_grids", 1 << 16) for g in p["image_grids"]),
        ),
        question=None
        if q is None
        else QuestionInfo(
            _count(q["length"], "question.length", 1 << 16),
            _flag(q["padded"], "question.padded"),
            _count(q["pad_id"], "question.pad_id", 1 << 31, least=0),
            _count(q["embedding_size"], "question.embedding_size", 1 << 16),
        ),
        pooling=PoolingInfo(
            _one_of(pool["method"], POOLINGS, "pooling.method"),
            _number(pool["temperature"], "pooling.temperature"),
            Windows.from_json(pool["video"]),
            Windows.from_json(pool["image"]),
            None
            if pool["pooled_shape"] is None
            else Windows.from_json({"output_size": pool["pooled_shape"]}).output_size,
        ),
        decoder=DecoderInfo(
            _count(d["hidden_size"], "decoder.hidden_size", 1 << 16),
            _count(d["layers"], "decoder.layers", 1 << 12),
            _count(d["kv_heads"], "decoder.kv_heads", 1 << 12),
            _count(d["head_size"], "decoder.head_size", 1 << 12),
            _count(d["vocab"], "decoder.vocab", 1 << 24),
            _count(d["context"], "decoder.context", 1 << 24),
            _one_of(d["kv_dtype"], ("float32", "float16", "int8"), "decoder.kv_dtype"),
        ),
        prompt=PromptTemplate.from_json(value["prompt"]),
        image_token=_count(value["image_token"], "image_token", 1 << 31, least=0),
        stop_ids=tuple(_count(i, "stop_ids", 1 << 31, least=0) for i in value["stop_ids"]),
        tokenizer=_flag(value["tokenizer"], "tokenizer"),
        checkpoint=dict(value["checkpoint"]),
        created_by=_text(value["created_by"], "created_by"),
        demo=_flag(value["demo"], "demo"),
        calibration=_facts(value.get("calibration"), "calibration"),
        parity=_facts(value.get("parity"), "parity"),
        files={file_name(name): file_entry(name, f) for name, f in value["files"].items()},
    )
    if manifest.pooling.guided and manifest.question is None:
        raise BundleError("prompt-guided pooling without a question tower")
    missing = [name for name in manifest.required_files() if name not in manifest.files]
    if missing:
        raise BundleError(f"the manifest lists no {', '.join(missing)}; it is damaged, export it again")
    return manifest


def _count(x: object, what: str, most: int, least: int = 1) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or not least <= x <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}")
    return x


def _number(x: object, what: str) -> float:
    if not isinstance(x, (int, float)) or isinstance(x, bool) or not 0 < x < 1e6:
        raise ValueError(f"{what} must be a number above 0")
    return float(x)


def _facts(x: Any, what: str) -> dict[str, Any] | None:
    if x is not None and not isinstance(x, dict):
        raise ValueError(f"{what} must be an object or null")
    return x


def _flag(x: object, what: str) -> bool:
    if not isinstance(x, bool):
        raise ValueError(f"{what} must be true or false")
    return x


def _text(x: object, what: str) -> str:
    if not isinstance(x, str) or len(x) > 4096:
        raise ValueError(f"{what} must be a short text")
    return x


def _one_of(x: object, choices: tuple[str, ...], what: str) -> str:
    if x not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}")
    return str(x)


def _pair(x: Any, what: str, most: int) -> tuple[int, int]:
    if not isinstance(x, list) or len(x) != 2:
        raise ValueError(f"{what} must be two whole numbers")
    return _count(x[0], what, most), _count(x[1], what, most)


def _three(x: Any, what: str, positive: bool = False) -> tuple[float, float, float]:
    numbers = (
        [float(v) for v in x] if isinstance(x, list) and all(isinstance(v, (int, float)) for v in x) else []
    )
    if len(numbers) != 3 or any(not abs(v) < 1e6 or (positive and v <= 0) for v in numbers):
        raise ValueError(f"{what} must be three numbers")
    return numbers[0], numbers[1], numbers[2]


def file_entry(name: str, f: dict[str, Any]) -> FileEntry:
    """A file's size and hash as a manifest has them. Raises ValueError or KeyError."""
    return FileEntry(_count(f["bytes"], f"files.{name}.bytes", 1 << 50, least=0), _digest(f["sha256"], name))


def file_name(name: str) -> str:
    """A plain file name that stays in its directory. Raises BundleError."""
    if not _FILE_NAME.match(name) or ".." in name:
        raise BundleError(f"the file name {name[:60]!r} leaves the bundle or is not a plain name; refused")
    return name


def _digest(x: object, name: str) -> str:
    if not isinstance(x, str) or not re.fullmatch(r"[0-9a-f]{64}", x):
        raise ValueError(f"files.{name}.sha256 is not a SHA-256")
    return x
