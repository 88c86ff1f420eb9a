"""The typed configuration of a checkpoint: sizes of every stage, pooling, stop ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppllava_edge.engines.bundle.windows import Windows


@dataclass(frozen=True)
class Tower:
    """A transformer of CLIP or SigLIP.

    Attributes:
        width: Hidden size.
        mlp: Hidden size of the feed-forward network.
        layers: Number of layers.
        heads: Attention heads.
        activation: Activation of the feed-forward network, by its name in config.json.
        epsilon: Epsilon of the layer norms.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    activation: str
    epsilon: float


@dataclass(frozen=True)
class Vision(Tower):
    """The vision tower.

    Attributes:
        image_size: Height and width of the input, pixels.
        patch_size: Height and width of a patch, pixels.
        class_token: Whether there is a class token before the patches (CLIP).
        feature_layer: Index of the hidden state that gives the features; -2 is the input of the last layer.
        grid: Rows and columns of patches.
        adapter_depth: Pairs in the temporal adapter's checkpoint; 0: no adapter.
        max_frames: The most frames that the temporal adapter has time embeddings for; None: no limit.
    """

    image_size: int
    patch_size: int
    class_token: bool
    feature_layer: int
    grid: tuple[int, int]
    adapter_depth: int = 0
    max_frames: int | None = None

    @property
    def patches(self) -> int:
        """Patches per frame, P."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Patches per frame, plus the class token if there is one."""
        return self.patches + self.class_token

    @property
    def used_layers(self) -> int:
        """Number of layers below the features; the layers above are never computed."""
        return self.layers + self.feature_layer + 1

    @property
    def states(self) -> int:
        """Number of hidden states that the trunk outputs: all that the temporal branch reads, or one."""
        return max(self.adapter_depth - 1, 1)


@dataclass(frozen=True)
class Question(Tower):
    """The question tower (text encoder).

    Attributes:
        positions: The longest question, tokens.
        stretched: Whether its position table is stretched fourfold (upstream's extend_clip).
        vocab: Vocabulary size.
        end_id: Id of the end token.
        pad_id: Id of the padding token.
    """

    positions: int
    stretched: bool
    vocab: int
    end_id: int
    pad_id: int

    @property
    def legacy_eos(self) -> bool:
        """Whether to pool at the largest id instead of the first end token (old CLIP configurations)."""
        return self.end_id == 2


@dataclass(frozen=True)
class Decoder:
    """The language model, LLaMA or Qwen2.

    Attributes:
        width: Hidden size.
        mlp: Hidden size of the feed-forward network.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_size: Width of a head.
        epsilon: Epsilon of the RMS norms.
        rope_base: Base of the rotary frequencies.
        rope_scale: Positions are divided by this (linear rotary scaling).
        context: The longest sequence, tokens.
        vocab: Vocabulary size.
        qkv_bias: Whether q, k and v projections have biases.
        tied: Whether the output projection is the embedding table.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    rope_base: float
    rope_scale: float
    context: int
    vocab: int
    qkv_bias: bool
    tied: bool


@dataclass(frozen=True)
class Model:
    """A whole checkpoint.

    Attributes:
        family: clip-llama, clip-qwen2, siglip-llama or siglip-qwen2.
        pooling: The pooling method, one of engines.bundle.manifest.POOLINGS.
        temperature: Temperature of the softmax inside a pooling window.
        pooled_shape: Output size of the pllava poolings (frames, rows, columns).
        valuew_plus: Whether similarity weights are multiplied by the SigLIP head's attention.
        image_token: Id of the token that visual tokens replace.
        stop_ids: Ids that end an answer.
        image_grids: Any-resolution grids for images, (height, width) in pixels.
        default_frames: Frames per video if the user sets no number.
        template: The prompt template, by name or as JSON.
    """

    family: str
    vision: Vision
    question: Question | None
    decoder: Decoder
    pooling: str
    temperature: float
    video_windows: Windows
    image_windows: Windows
    pooled_shape: tuple[int, int, int] | None
    valuew_plus: bool
    image_token: int
    stop_ids: tuple[int, ...]
    image_grids: tuple[tuple[int, int], ...]
    default_frames: int
    template: str | dict[str, Any]

    @property
    def siglip(self) -> bool:
        """Whether vision and question towers are SigLIP's."""
        return self.family.startswith("siglip")


@dataclass
class Overrides:
    """Settings of the command line that replace those of the checkpoint; None keeps the checkpoint's."""

    pooling: str | None = None
    kernel: tuple[int, int, int] | None = None
    stride: tuple[int, int, int] | None = None
    output_size: tuple[int, int, int] | None = None
    image_kernel: tuple[int, int, int] | None = None
    image_stride: tuple[int, int, int] | None = None
    temperature: float | None = None
    valuew_plus: bool | None = None
    template: str | dict[str, Any] | None = None
