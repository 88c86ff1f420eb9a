"""manifest.json as dataclasses: fields are JSON keys, and annotations limit their values.

manifest_parser decodes them with msgspec, which enforces the limits, and checks how values fit together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from msgspec import Meta

from ppllava_edge.engines.bundle.prompt_template import PromptTemplate
from ppllava_edge.engines.bundle.windows import Triple, Windows

FORMAT = "ppllava-edge bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
FAMILIES = ("clip-llama", "clip-qwen2", "siglip-llama", "siglip-qwen2")
POOLINGS = ("ppllava", "pllava", "pllava_npu", "avp", "none")
END = r"$(?!\n)"  # the end of a text in a regular expression; "$" alone allows a line break after it


def one_of(*choices: str) -> Meta:
    """The limit of a text that must be one of the given ones."""
    return Meta(pattern=f"^({'|'.join(choices)}){END}")


# The limits are far above every released model, and far below what would exhaust a machine.
Side = Annotated[int, Meta(ge=1, le=4096)]  # pixels
Width = Annotated[int, Meta(ge=1, le=1 << 16)]  # channels of a layer
Frames = Annotated[int, Meta(ge=1, le=4096)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Positive = Annotated[float, Meta(gt=0, lt=1e6)]
KVDtype = Annotated[str, one_of("float32", "float16", "int8")]
Number = Annotated[float, Meta(gt=-1e6, lt=1e6)]
# printable, so that nothing in a bundle can send control sequences to a terminal
Label = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]*" + END)]
Plain = str | int | float | bool | None
Facts = Annotated[dict[Label, Plain], Meta(max_length=256)]
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

    image_size: Side
    grid: tuple[Side, Side]
    hidden_size: Width
    class_token: bool
    states: Annotated[int, Meta(ge=1, le=256)]
    max_frames: Frames | None
    default_frames: Frames

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

    method: Annotated[str, one_of("squash", "pad")]
    size: Side
    mean: tuple[Number, Number, Number]
    std: tuple[Positive, Positive, Positive]
    image_grids: Annotated[tuple[tuple[Side, Side], ...], Meta(max_length=64)]


@dataclass(frozen=True)
class QuestionInfo:
    """The question tower.

    Attributes:
        length: Maximum number of tokens in a question.
        padded: Whether shorter questions are padded to `length` (SigLIP needs that).
        pad_id: The token id for padding.
        embedding_size: Width E of the question's embedding.
    """

    length: Annotated[int, Meta(ge=1, le=4096)]
    padded: bool
    pad_id: TokenId
    embedding_size: Width


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

    method: Annotated[str, one_of(*POOLINGS)]
    temperature: Positive
    video: Windows
    image: Windows
    pooled_shape: Triple | None

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

    hidden_size: Width
    layers: Annotated[int, Meta(ge=1, le=512)]
    kv_heads: Annotated[int, Meta(ge=1, le=1024)]
    head_size: Annotated[int, Meta(ge=1, le=4096)]
    vocab: Annotated[int, Meta(ge=1, le=1 << 22)]
    context: Annotated[int, Meta(ge=1, le=1 << 22)]
    kv_dtype: KVDtype


@dataclass(frozen=True)
class FileEntry:
    """Expected size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: Annotated[int, Meta(ge=0, le=1 << 40)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}" + END)]


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest.

    Attributes:
        name: The model's name.
        family: Question tower and language model.
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

    name: Label
    family: Annotated[str, one_of(*FAMILIES)]
    precision: Annotated[dict[Label, Label], Meta(max_length=64)]
    vision: VisionInfo
    preprocessing: Preprocessing
    question: QuestionInfo | None
    pooling: PoolingInfo
    decoder: DecoderInfo
    prompt: PromptTemplate
    image_token: TokenId
    stop_ids: Annotated[tuple[TokenId, ...], Meta(max_length=256)]
    tokenizer: bool
    checkpoint: Facts = field(default_factory=dict)
    created_by: Label = ""
    demo: bool = False
    calibration: Facts | None = None
    parity: Facts | None = None
    files: Annotated[dict[str, FileEntry], Meta(max_length=4096)] = field(default_factory=dict)

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
