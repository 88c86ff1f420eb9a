"""manifest.json as dataclasses. Their fields are the JSON keys; manifest_parser reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ppllava_edge.engines.bundle.prompt_template import PromptTemplate
from ppllava_edge.engines.bundle.windows import Windows

FORMAT = "ppllava-edge bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
FAMILIES = ("clip-llama", "clip-qwen2", "siglip-llama", "siglip-qwen2")
POOLINGS = ("ppllava", "pllava", "pllava_npu", "avp", "none")
KEYS = (  # sections of manifest.json after "format" and "schema", in writing order
    "created_by",
    "name",
    "family",
    "demo",
    "checkpoint",
    "precision",
    "calibration",
    "parity",
    "vision",
    "preprocessing",
    "question",
    "pooling",
    "decoder",
    "prompt",
    "image_token",
    "stop_ids",
    "tokenizer",
    "files",
)


@dataclass(frozen=True)
class VisionInfo:
    """The vision tower.

    Attributes:
        image_size: Height and width of its input, pixels.
        grid: Patches of a frame, (rows, columns).
        hidden_size: Width C of the features.
        class_token: Whether the trunk's states hold a class token before the patches.
        states: Number S of hidden states that the trunk outputs; above 1 they feed the temporal adapter.
        max_frames: Maximum frames of a clip in the temporal adapter; None without one.
        default_frames: Frames of a clip unless the user asks for another number.
    """

    image_size: int
    grid: tuple[int, int]
    hidden_size: int
    class_token: bool
    states: int
    max_frames: int | None
    default_frames: int

    @property
    def patches(self) -> int:
        """Patches P of a frame."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Preprocessing:
    """How frames become pixels for the vision tower.

    Attributes:
        method: "squash" (frames lose their aspect ratio) or "pad" (fitted and centred on black).
        size: Height and width, pixels.
        mean: Per channel, subtracted from values in 0…1.
        std: Per channel, divided by.
        image_grids: (height, width) choices of any-resolution tiling of single images, pixels.
    """

    method: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class QuestionInfo:
    """The question tower.

    Attributes:
        length: Maximum number of tokens in a question.
        padded: Whether shorter questions are padded to `length` (SigLIP needs that).
        pad_id: The token id for padding.
        embedding_size: Width E of the question's embedding.
    """

    length: int
    padded: bool
    pad_id: int
    embedding_size: int


@dataclass(frozen=True)
class PoolingInfo:
    """How features become visual tokens.

    Attributes:
        method: One of POOLINGS.
        temperature: Temperature of the softmax inside a window.
        video: Windows over a clip, for methods that have windows.
        image: Windows over a single image.
        pooled_shape: Output size (frames, rows, columns) of pllava.
    """

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
        """Whether the question guides the pooling."""
        return self.method == "ppllava"

    @property
    def min_frames(self) -> int:
        """The fewest frames that a clip must have."""
        return self.video.min_frames() if self.windowed else 1

    @property
    def takes_images(self) -> bool:
        """Whether single images can be pooled as such; PLLaVA reads them as one-frame videos."""
        return self.method not in ("pllava", "pllava_npu")

    def tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """Count the visual tokens of a clip.

        Args:
            frames: Frames of the clip.
            grid: Patches of a frame, (rows, columns).

        Raises:
            PPLLaVAError: The clip doesn't fill a window.
        """
        if self.windowed:
            output, *_ = self.video.resolve((frames, *grid))
            return output[0] * output[1] * output[2]
        if self.pooled_shape and self.method == "pllava":
            return self.pooled_shape[0] * self.pooled_shape[1] * self.pooled_shape[2]
        if self.method == "avp":
            return grid[0] * grid[1]
        assert self.method == "none", self.method
        return grid[0] * grid[1] * frames


@dataclass(frozen=True)
class DecoderInfo:
    """The language model. A layer's KV cache: two tensors (1, kv_heads, capacity, head_size) in kv_dtype.

    Attributes:
        hidden_size: Width D of embeddings and visual tokens.
        layers: Number of decoder layers.
        kv_heads: Heads of keys and values.
        head_size: Width of a head.
        vocab: Size of the vocabulary.
        context: Maximum number of positions, prompt and answer together.
        kv_dtype: "float32", "float16" or "int8".
    """

    hidden_size: int
    layers: int
    kv_heads: int
    head_size: int
    vocab: int
    context: int
    kv_dtype: str


@dataclass(frozen=True)
class FileEntry:
    """Expected size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest.

    Attributes:
        name: The model's name.
        family: One of FAMILIES: question tower and language model.
        precision: Part of the model → precision, as --precision names them.
        image_token: The token id that stands for the visual tokens.
        stop_ids: Token ids that end an answer.
        tokenizer: Whether the bundle has tokenizers.
        checkpoint: Name and hash of the checkpoint it was exported from.
        created_by: The program and version that wrote it.
        demo: Whether the model is a demonstration, as nano is.
        calibration: Hash and counts of the calibration data; None without calibration.
        parity: Scores of the parity gate; None if it didn't run.
        files: Every other file of the bundle, by name.
    """

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
        """Names of the files that a bundle of this kind must contain."""
        names = ["trunk.onnx", "pooling.onnx", "decoder.onnx", "embed_tokens.safetensors"]
        if self.vision.max_frames:
            names.append("temporal.onnx")
        if self.pooling.guided:
            names += ["question.onnx", "similarity.onnx"]
        if self.tokenizer:
            names.append("tokenizer.json")
        if self.tokenizer and self.pooling.guided:
            names.append("question_tokenizer.json")
        return names

    def as_json(self) -> dict[str, Any]:
        """The contents of manifest.json: dicts, lists and plain values."""
        contents = {key: as_json(getattr(self, key)) for key in KEYS}
        contents["files"] = dict(sorted(contents["files"].items()))
        return {"format": FORMAT, "schema": SCHEMA, **contents}


def as_json(value: Any) -> Any:
    """Turn dataclasses into dicts and tuples into lists, at every level."""
    if is_dataclass(value):
        return {part.name: as_json(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return value
