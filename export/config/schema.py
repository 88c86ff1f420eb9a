"""The types and limits of what a checkpoint's config.json may hold, as far as the export reads it.

Configurations come from other people. Values that are missing have defaults (defaults.py); values of another
type, or beyond these limits, are refused by their place.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import PPLLaVAError

Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, Meta(ge=1, le=4096)]
Extent = Annotated[int, Meta(ge=1, le=4096)]  # of a pooling window
Id = Annotated[int, Meta(ge=-1, le=1 << 31)]
Name = Annotated[str, Meta(max_length=64)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
Triple = Annotated[list[Extent], Meta(max_length=8)] | Name | None


class _Rope(Struct):
    rope_type: Name | UnsetType = UNSET
    type: Name | UnsetType = UNSET
    factor: Positive | UnsetType = UNSET
    rope_theta: Positive | UnsetType = UNSET


class _Tower(Struct):
    model_type: Name | UnsetType = UNSET
    hidden_size: Size | UnsetType = UNSET
    intermediate_size: Size | UnsetType = UNSET
    num_hidden_layers: Layers | UnsetType = UNSET
    num_attention_heads: Layers | UnsetType = UNSET
    hidden_act: Name | UnsetType = UNSET
    layer_norm_eps: Positive | UnsetType = UNSET
    vocab_size: Size | UnsetType = UNSET
    max_position_embeddings: Size | UnsetType = UNSET


class _Vision(_Tower):
    image_size: Size | UnsetType = UNSET
    patch_size: Size | UnsetType = UNSET


class _Question(_Tower):
    eos_token_id: Id | None = None
    pad_token_id: Id | UnsetType = UNSET


class _Decoder(_Tower):
    num_key_value_heads: Layers | None = None
    head_dim: Layers | None = None
    rms_norm_eps: Positive | UnsetType = UNSET
    rope_theta: Positive | UnsetType = UNSET
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    eos_token_id: Annotated[list[Id | None], Meta(max_length=64)] | Id | None = None


class _Config(Struct):
    vision_config: _Vision | UnsetType = UNSET
    text_config: _Decoder | UnsetType = UNSET
    pooling: Name | UnsetType = UNSET
    pooling_kernel: Triple = None
    pooling_stride: Triple = None
    image_pooling_kernel: Triple = None
    image_pooling_stride: Triple = None
    pllava_pooling_shape: Triple = None
    pooling_temp: Positive | UnsetType = UNSET
    frame_shape: Annotated[list[Size], Meta(min_length=2, max_length=4)] | None = None
    btadapter_depth: Layers | UnsetType = UNSET
    max_T: Size | UnsetType = UNSET
    vision_feature_layer: Annotated[int, Meta(ge=-4096, le=4096)] | UnsetType = UNSET
    vision_feature_select_strategy: Name | UnsetType = UNSET
    image_token_index: Id | UnsetType = UNSET
    image_grid_pinpoints: Annotated[list[tuple[Size, Size]], Meta(max_length=256)] | None = None
    num_frames: Annotated[int, Meta(ge=1, le=4096)] | UnsetType = UNSET
    prompt_template: Name | dict[str, Any] | None = None


class _QuestionConfig(Struct):
    text_config: _Question | None = None


def check_config(config: dict[str, Any], question_config: dict[str, Any] | None) -> None:
    """Check the types and limits of all values that are read.

    Args:
        config: The checkpoint's config.json.
        question_config: The question tower's.

    Raises:
        PPLLaVAError: A value is of another type or out of bounds; names its place.
    """
    _check(config, _Config, "config.json")
    if question_config is not None:
        _check(question_config, _QuestionConfig, "the question tower's config.json")


def _check(value: dict[str, Any], kind: type[Struct], what: str) -> None:
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter for half a surrogate pair
        raise PPLLaVAError(f"{what} can't be used: {printable(error)}") from None
