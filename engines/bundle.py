"""The bundle: the one contract between export and runtime. docs/bundle.md describes every field.

A bundle is checked when it is opened: names, sizes, schema and shapes always; hashes always below 256 MB in all, else on the first open
and on request, then remembered by a stamp (size, time, inode) in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import BundleError
from .pooling import Windows
from .prompt_template import PromptTemplate

FORMAT, SCHEMA = "ppllava-edge bundle", 1
MANIFEST = "manifest.json"
ALWAYS_HASHED = 256 << 20  # bytes in all up to which hashes are checked on every open
LARGEST_MANIFEST = 4 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")
FAMILIES = ("clip-llama", "clip-qwen2", "siglip-llama", "siglip-qwen2")
POOLINGS = ("ppllava", "pllava", "pllava_npu", "avp", "none")


@dataclass(frozen=True)
class VisionInfo:
    """image_size, patch_size: pixels. grid: patches (rows, columns). states: trunk states that leave the tower, S.
    max_frames: the longest clip of the temporal adapter; None without one."""

    image_size: int
    grid: tuple[int, int]
    hidden_size: int
    class_token: bool
    states: int
    max_frames: int | None
    default_frames: int

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Preprocessing:
    """method: "squash" (frames lose their aspect) or "pad" (fit, centred on black). mean, std: per channel, of values in 0…1.
    image_grids: (height, width) choices of any-resolution tiling of single images."""

    method: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class QuestionInfo:
    """length: the most tokens. padded: shorter questions are padded to it with pad_id (SigLIP needs that)."""

    length: int
    padded: bool
    pad_id: int
    embedding_size: int


@dataclass(frozen=True)
class PoolingInfo:
    """method: ppllava | pllava | pllava_npu | avp | none. video, image: windows where the method has them.
    pooled_shape: output size of pllava."""

    method: str
    temperature: float
    video: Windows
    image: Windows
    pooled_shape: tuple[int, int, int] | None

    @property
    def windowed(self) -> bool:
        """Whether pooling.onnx takes weights, kernel and stride."""
        return self.method in ("ppllava", "pllava_npu")

    @property
    def guided(self) -> bool:
        return self.method == "ppllava"

    def tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """Visual tokens of a clip. Raises PPLLaVAError if it doesn't fill a window."""
        if self.windowed:
            output, *_ = self.video.resolve((frames, *grid))
            return output[0] * output[1] * output[2]
        if self.pooled_shape and self.method == "pllava":
            return self.pooled_shape[0] * self.pooled_shape[1] * self.pooled_shape[2]
        return grid[0] * grid[1] * (1 if self.method == "avp" else frames)


@dataclass(frozen=True)
class DecoderInfo:
    """Sizes that the runtime needs: the cache is (1, kv_heads, capacity, head_size) per layer, in kv_dtype."""

    hidden_size: int
    layers: int
    kv_heads: int
    head_size: int
    vocab: int
    context: int
    kv_dtype: str


@dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json, typed."""

    name: str
    family: str
    precision: dict[str, str]
    vision: VisionInfo
    preprocessing: Preprocessing
    question: QuestionInfo | None
    pooling: PoolingInfo
    decoder: DecoderInfo
    prompt: PromptTemplate
    image_token: int
    stop_ids: tuple[int, ...]
    tokenizer: bool
    checkpoint: dict[str, Any] = field(default_factory=dict)
    created_by: str = ""
    demo: bool = False
    calibration: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)

    def required_files(self) -> list[str]:
        """Names that a bundle of this kind must hold."""
        names = ["trunk.onnx", "pooling.onnx", "decoder.onnx", "embed_tokens.safetensors"]
        names += ["temporal.onnx"] if self.vision.max_frames else []
        names += ["question.onnx", "similarity.onnx"] if self.pooling.guided else []
        names += ["tokenizer.json"] if self.tokenizer else []
        names += ["question_tokenizer.json"] if self.tokenizer and self.pooling.guided else []
        return names

    def as_json(self) -> dict[str, Any]:
        """The form that is written."""
        v, p, d = self.vision, self.preprocessing, self.decoder
        return {
            "format": FORMAT, "schema": SCHEMA, "created_by": self.created_by, "name": self.name, "family": self.family, "demo": self.demo,
            "checkpoint": self.checkpoint, "precision": self.precision, "calibration": self.calibration, "parity": self.parity,
            "vision": {"image_size": v.image_size, "grid": list(v.grid), "hidden_size": v.hidden_size, "class_token": v.class_token,
                       "states": v.states, "max_frames": v.max_frames, "default_frames": v.default_frames},
            "preprocessing": {"method": p.method, "size": p.size, "mean": list(p.mean), "std": list(p.std),
                              "image_grids": [list(g) for g in p.image_grids]},
            "question": None if self.question is None else vars(self.question).copy(),
            "pooling": {"method": self.pooling.method, "temperature": self.pooling.temperature, "video": self.pooling.video.as_json(),
                        "image": self.pooling.image.as_json(), "pooled_shape": self.pooling.pooled_shape and list(self.pooling.pooled_shape)},
            "decoder": {"hidden_size": d.hidden_size, "layers": d.layers, "kv_heads": d.kv_heads, "head_size": d.head_size, "vocab": d.vocab,
                        "context": d.context, "kv_dtype": d.kv_dtype},
            "prompt": self.prompt.as_json(), "image_token": self.image_token, "stop_ids": list(self.stop_ids), "tokenizer": self.tokenizer,
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }  # fmt: skip


class Bundle:
    """An opened, checked bundle directory."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Read the manifest and check every file. verify: check hashes of a large bundle again even if a stamp remembers them.

        Raises BundleError in one line.
        """
        folder = Path(path).expanduser()
        if not folder.exists():
            raise BundleError(f"no bundle at {path}: no such directory")
        if not folder.is_dir():
            raise BundleError(f"{path} is a file; a bundle is a directory, as ppllava-export writes it")
        bundle = cls(folder, read_manifest(folder / MANIFEST))
        bundle._check_sizes()
        bundle._check_hashes(verify)
        return bundle

    def file(self, name: str) -> Path:
        """Path of one of the manifest's files. Raises BundleError for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}; it was exported without it")
        return self.path / name

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if path.is_symlink():
                target = path.resolve()
                if self.path.resolve() not in target.parents:
                    raise BundleError(f"{path} is a link that leaves the bundle; copy the file into it")
            try:
                size = path.stat().st_size if path.is_file() else -1
            except OSError as error:
                raise BundleError(f"{path} can't be read: {error.strerror}") from None
            if size < 0:
                raise BundleError(f"{self.path} is incomplete: {name} is missing; export it again")
            if size != entry.bytes:
                raise BundleError(f"{path} has {size} bytes, the manifest says {entry.bytes}; it is damaged, export it again")

    def _check_hashes(self, verify: bool) -> None:
        damaged = damaged_file(self.path, self.manifest.files, verify)
        if damaged:
            raise BundleError(f"{self.path / damaged} doesn't match its hash in the manifest; it is damaged, export it again")


def damaged_file(folder: Path, files: dict[str, FileEntry], verify: bool = False) -> str | None:
    """The first file whose hash is wrong, or None. Large folders are hashed once and then remembered by a stamp, unless verify is set."""
    stamp = None if sum(f.bytes for f in files.values()) <= ALWAYS_HASHED else _stamp(folder, files)
    if stamp and not verify and _stamp_known(stamp):
        return None
    for name, entry in files.items():
        if hash_file(folder / name) != entry.sha256:
            return name
    if stamp:
        _remember_stamp(stamp)
    return None


def _stamp(folder: Path, files: dict[str, FileEntry]) -> str:
    parts = [str(folder.resolve())]
    for name, entry in sorted(files.items()):
        s = (folder / name).stat()
        parts.append(f"{name} {entry.sha256} {s.st_size} {s.st_mtime_ns} {s.st_ino}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises BundleError if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash_blocks(file)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None


def _hash_blocks(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where this user's caches live: $XDG_CACHE_HOME/ppllava-edge or ~/.cache/ppllava-edge."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppllava-edge"


def _stamp_known(stamp: str) -> bool:
    return (cache_folder() / "verified" / stamp).exists()


def _remember_stamp(stamp: str) -> None:
    try:
        folder = cache_folder() / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stamp).touch()
    except OSError:
        return  # a read-only home costs a hash on the next open, nothing else


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
        raise BundleError(f"{path} has schema {schema}, newer than this ppllava-edge knows ({SCHEMA}); upgrade: pip install -U ppllava-edge")
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
        name=_text(value["name"], "name"), family=_one_of(value["family"], FAMILIES, "family"),
        precision={_text(k, "precision"): _text(x, "precision") for k, x in value["precision"].items()},
        vision=VisionInfo(
            _count(v["image_size"], "vision.image_size", 4096), _pair(v["grid"], "vision.grid", 1024),
            _count(v["hidden_size"], "vision.hidden_size", 1 << 16), _flag(v["class_token"], "vision.class_token"),
            _count(v["states"], "vision.states", 256),
            None if v["max_frames"] is None else _count(v["max_frames"], "vision.max_frames", 1 << 16),
            _count(v["default_frames"], "vision.default_frames", 1 << 16),
        ),
        preprocessing=Preprocessing(
            _one_of(p["method"], ("squash", "pad"), "preprocessing.method"), _count(p["size"], "preprocessing.size", 4096),
            _three(p["mean"], "preprocessing.mean"), _three(p["std"], "preprocessing.std", positive=True),
            tuple(_pair(g, "preprocessing.image_grids", 1 << 16) for g in p["image_grids"]),
        ),
        question=None if q is None else QuestionInfo(
            _count(q["length"], "question.length", 1 << 16), _flag(q["padded"], "question.padded"),
            _count(q["pad_id"], "question.pad_id", 1 << 31, least=0), _count(q["embedding_size"], "question.embedding_size", 1 << 16),
        ),
        pooling=PoolingInfo(
            _one_of(pool["method"], POOLINGS, "pooling.method"), _number(pool["temperature"], "pooling.temperature"),
            Windows.from_json(pool["video"]), Windows.from_json(pool["image"]),
            None if pool["pooled_shape"] is None else Windows.from_json({"output_size": pool["pooled_shape"]}).output_size,
        ),
        decoder=DecoderInfo(
            _count(d["hidden_size"], "decoder.hidden_size", 1 << 16), _count(d["layers"], "decoder.layers", 1 << 12),
            _count(d["kv_heads"], "decoder.kv_heads", 1 << 12), _count(d["head_size"], "decoder.head_size", 1 << 12),
            _count(d["vocab"], "decoder.vocab", 1 << 24), _count(d["context"], "decoder.context", 1 << 24),
            _one_of(d["kv_dtype"], ("float32", "float16", "int8"), "decoder.kv_dtype"),
        ),
        prompt=PromptTemplate.from_json(value["prompt"]), image_token=_count(value["image_token"], "image_token", 1 << 31, least=0),
        stop_ids=tuple(_count(i, "stop_ids", 1 << 31, least=0) for i in value["stop_ids"]),
        tokenizer=_flag(value["tokenizer"], "tokenizer"), checkpoint=dict(value["checkpoint"]), created_by=_text(value["created_by"], "created_by"),
        demo=_flag(value["demo"], "demo"), calibration=_facts(value.get("calibration"), "calibration"), parity=_facts(value.get("parity"), "parity"),
        files={
            file_name(name): file_entry(name, f) for name, f in value["files"].items()
        },
    )  # fmt: skip
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
    numbers = [float(v) for v in x] if isinstance(x, list) and all(isinstance(v, (int, float)) for v in x) else []
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


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in folder, complete the manifest with them and write it."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    manifest = replace(manifest, files={path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in paths})
    (folder / MANIFEST).write_text(json.dumps(manifest.as_json(), indent=1) + "\n", encoding="utf-8")
    return manifest
