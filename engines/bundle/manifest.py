"""manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppllava_edge.engines.bundle.prompt_template import PromptTemplate
from ppllava_edge.engines.bundle.windows import Windows

FORMAT, SCHEMA = "ppllava-edge bundle", 1
MANIFEST = "manifest.json"
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
            "format": FORMAT,
            "schema": SCHEMA,
            "created_by": self.created_by,
            "name": self.name,
            "family": self.family,
            "demo": self.demo,
            "checkpoint": self.checkpoint,
            "precision": self.precision,
            "calibration": self.calibration,
            "parity": self.parity,
            "vision": {
                "image_size": v.image_size,
                "grid": list(v.grid),
                "hidden_size": v.hidden_size,
                "class_token": v.class_token,
                "states": v.states,
                "max_frames": v.max_frames,
                "default_frames": v.default_frames,
            },
            "preprocessing": {
                "method": p.method,
                "size": p.size,
                "mean": list(p.mean),
                "std": list(p.std),
                "image_grids": [list(g) for g in p.image_grids],
            },
            "question": None if self.question is None else vars(self.question).copy(),
            "pooling": {
                "method": self.pooling.method,
                "temperature": self.pooling.temperature,
                "video": self.pooling.video.as_json(),
                "image": self.pooling.image.as_json(),
                "pooled_shape": self.pooling.pooled_shape and list(self.pooling.pooled_shape),
            },
            "decoder": {
                "hidden_size": d.hidden_size,
                "layers": d.layers,
                "kv_heads": d.kv_heads,
                "head_size": d.head_size,
                "vocab": d.vocab,
                "context": d.context,
                "kv_dtype": d.kv_dtype,
            },
            "prompt": self.prompt.as_json(),
            "image_token": self.image_token,
            "stop_ids": list(self.stop_ids),
            "tokenizer": self.tokenizer,
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }
