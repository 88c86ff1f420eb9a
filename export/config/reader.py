"""Read config.json, the question tower's configuration and the command line into one typed Model."""

from __future__ import annotations

from typing import Any

from ppllava_edge.engines.bundle.manifest import POOLINGS
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.config.defaults import (
    CLIP_TEXT,
    CLIP_VISION,
    LLAMA,
    QWEN2,
    SIGLIP_TEXT,
    SIGLIP_VISION,
)
from ppllava_edge.export.config.model import Decoder, Model, Overrides, Question, Vision
from ppllava_edge.export.config.pooling_windows import parse_triple, read_windows
from ppllava_edge.export.config.schema import check_config
from ppllava_edge.export.stages.layers import ACTIVATIONS


def read_model(config: dict[str, Any], question_config: dict[str, Any] | None, overrides: Overrides) -> Model:
    """Resolve the configuration of a checkpoint.

    Args:
        config: The checkpoint's config.json.
        question_config: The question tower's config.json; needed for the pooling "ppllava".
        overrides: Settings of the command line.

    Returns:
        The model.

    Raises:
        PPLLaVAError: The model is not of a supported family, its pooling can't work, or a value is of another
            type or out of bounds.
    """
    text_type, siglip = _read_family(config)
    check_config(config, question_config)
    vision = _read_vision(config, siglip)
    pooling = overrides.pooling or config.get("pooling", "avp")
    if pooling not in POOLINGS:
        raise PPLLaVAError(f"pooling {pooling!r} is unknown; choose {', '.join(POOLINGS)}")
    question = _read_question(config, question_config, siglip) if pooling == "ppllava" else None
    video_windows, image_windows = read_windows(config, overrides, pooling)
    if pooling in ("ppllava", "pllava_npu"):
        video_windows.check(vision.grid, "video pooling")
        image_windows.check(vision.grid, "image pooling")
    default_template = "plain_qwen" if text_type == "qwen2" else "plain_v1"
    decoder_config = (QWEN2 if text_type == "qwen2" else LLAMA) | config["text_config"]
    return Model(
        family=f"{'siglip' if siglip else 'clip'}-{text_type}",
        vision=vision,
        question=question,
        decoder=_read_decoder(config, decoder_config, text_type),
        pooling=pooling,
        temperature=_read_temperature(config, overrides),
        video_windows=video_windows,
        image_windows=image_windows,
        pooled_shape=_read_pooled_shape(config, overrides, pooling),
        valuew_plus=_read_valuew_plus(config, overrides, siglip and pooling == "ppllava"),
        image_token=int(config.get("image_token_index", 32000)),
        stop_ids=_read_stop_ids(decoder_config),
        image_grids=tuple((int(h), int(w)) for h, w in config.get("image_grid_pinpoints") or ()),
        default_frames=int(config.get("num_frames", 16 if pooling in ("pllava", "pllava_npu") else 32)),
        template=overrides.template or config.get("prompt_template") or default_template,
    )


def _read_family(config: dict[str, Any]) -> tuple[str, bool]:
    """The decoder's type, llama or qwen2, and whether the vision tower is SigLIP's."""
    if not isinstance(config.get("text_config"), dict) or not isinstance(config.get("vision_config"), dict):
        raise PPLLaVAError(
            "config.json has no text_config and vision_config: this is not a PPLLaVA or PLLaVA checkpoint"
        )
    text_type = config["text_config"].get("model_type", "llama")
    if text_type not in ("llama", "qwen2"):
        raise PPLLaVAError(f"the decoder is a {_shown(text_type)} model; llama and qwen2 are supported")
    vision_type = config["vision_config"].get("model_type", "clip_vision_model")
    if vision_type not in ("clip_vision_model", "siglip_vision_model"):
        raise PPLLaVAError(
            f"the vision tower is a {_shown(vision_type)}; "
            "clip_vision_model and siglip_vision_model are supported"
        )
    return text_type, vision_type.startswith("siglip")


def _shown(value: object) -> str:
    return printable(repr(value), 60)


def _read_vision(config: dict[str, Any], siglip: bool) -> Vision:
    c = (SIGLIP_VISION if siglip else CLIP_VISION) | config["vision_config"]
    layers = c["num_hidden_layers"]
    feature_layer = _read_feature_layer(config, siglip, layers)
    adapter_depth = _read_adapter_depth(config, siglip, layers)
    if not -layers <= feature_layer <= -1 or (adapter_depth and feature_layer != -2):
        raise PPLLaVAError(f"vision_feature_layer {feature_layer} isn't supported for this tower")
    return Vision(
        width=c["hidden_size"],
        mlp=c["intermediate_size"],
        layers=layers,
        heads=c["num_attention_heads"],
        activation=_known_activation(c["hidden_act"]),
        epsilon=float(c["layer_norm_eps"]),
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        class_token=not siglip,
        feature_layer=feature_layer,
        grid=_read_grid(config, c["image_size"] // c["patch_size"]),
        adapter_depth=adapter_depth,
        max_frames=int(config.get("max_T", 64)) if adapter_depth else None,
    )


def _read_grid(config: dict[str, Any], side: int) -> tuple[int, int]:
    """Rows and columns of patches. side: the vision tower's patches along each axis."""
    shape = config.get("frame_shape")
    if not shape:
        return side, side
    rows, columns = int(shape[0]), int(shape[1])
    if rows * columns != side * side:
        raise PPLLaVAError(
            f"frame_shape {tuple(shape)} in config.json doesn't fit the vision tower, which gives "
            f"{side}x{side} patches"
        )
    return rows, columns


def _read_adapter_depth(config: dict[str, Any], siglip: bool, layers: int) -> int:
    """Pairs of the temporal adapter; 0 if there is none."""
    depth = int(config.get("btadapter_depth", 4)) if config.get("btadapter") else 0
    if siglip and depth:
        raise PPLLaVAError(
            "a temporal adapter over a SigLIP tower is not part of any released model and isn't supported"
        )
    if depth and not 2 <= depth <= layers:
        raise PPLLaVAError(f"btadapter_depth {depth} doesn't fit a tower of {layers} layers")
    return depth


def _read_feature_layer(config: dict[str, Any], siglip: bool, layers: int) -> int:
    """The index of the hidden state that gives the features, counted from the end (negative)."""
    strategy = config.get("vision_feature_select_strategy", "default")
    expected = "full" if siglip else "default"  # default drops the class token, which SigLIP doesn't have
    if strategy != expected:
        tower = "SigLIP" if siglip else "CLIP"
        raise PPLLaVAError(
            f"vision_feature_select_strategy {strategy!r} with a {tower} tower isn't supported"
        )
    layer = int(config.get("vision_feature_layer", -2))
    return layer - (layers + 1) if layer > 0 else layer


def _read_question(config: dict[str, Any], question_config: dict[str, Any] | None, siglip: bool) -> Question:
    if question_config is None:
        raise PPLLaVAError(
            "prompt-guided pooling needs the question tower's configuration (config.json of clip_weight): "
            "name it with --clip"
        )
    c = (SIGLIP_TEXT if siglip else CLIP_TEXT) | (question_config.get("text_config") or {})
    stretched = bool(config.get("extend_clip"))
    positions = c["max_position_embeddings"]
    return Question(
        width=c["hidden_size"],
        mlp=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        activation=_known_activation(c["hidden_act"]),
        epsilon=float(c["layer_norm_eps"]),
        positions=4 * positions - 60 if stretched else positions,
        stretched=stretched,
        vocab=c["vocab_size"],
        end_id=int(c.get("eos_token_id") or 0),
        pad_id=int(c.get("pad_token_id", 1)),
    )


def _read_decoder(config: dict[str, Any], c: dict[str, Any], text_type: str) -> Decoder:
    """c: text_config over its defaults."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _check_decoder(c, text_type, rope_type)
    heads = c["num_attention_heads"]
    return Decoder(
        width=c["hidden_size"],
        mlp=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c["num_key_value_heads"] or heads,
        head_size=c["head_dim"] or c["hidden_size"] // heads,
        epsilon=float(c["rms_norm_eps"]),
        rope_base=float(rope.get("rope_theta", c["rope_theta"])),
        rope_scale=float(rope.get("factor", 1.0)) if rope_type == "linear" else 1.0,
        context=c["max_position_embeddings"],
        vocab=c["vocab_size"],
        qkv_bias=bool(c["attention_bias"]),
        tied=bool(c["tie_word_embeddings"] or config.get("tie_word_embeddings", False)),
    )


def _check_decoder(c: dict[str, Any], text_type: str, rope_type: str) -> None:
    """Refuse variants of the decoder that the exported graph doesn't compute."""
    if rope_type not in ("default", "linear"):
        raise PPLLaVAError(f"rotary scaling of type {rope_type!r} isn't supported (default and linear are)")
    if c.get("use_sliding_window"):
        raise PPLLaVAError("a decoder with use_sliding_window isn't supported")
    if c["hidden_act"] not in ("silu", "swish"):
        raise PPLLaVAError(f"the decoder's activation {c['hidden_act']!r} isn't supported (silu is)")
    if text_type == "llama" and (c["attention_bias"] or c.get("mlp_bias")):
        raise PPLLaVAError("a LLaMA decoder with attention_bias or mlp_bias isn't supported")


def _read_stop_ids(c: dict[str, Any]) -> tuple[int, ...]:
    ids = c["eos_token_id"]
    return tuple(int(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None)


def _read_temperature(config: dict[str, Any], overrides: Overrides) -> float:
    temperature = overrides.temperature
    if temperature is None:
        temperature = float(config.get("pooling_temp", 0.01))
    if not temperature > 0:
        raise PPLLaVAError(f"the pooling temperature must be above 0, not {temperature:g}")
    return temperature


def _read_pooled_shape(
    config: dict[str, Any], overrides: Overrides, pooling: str
) -> tuple[int, int, int] | None:
    """The output size of the pllava poolings."""
    shape = parse_triple(config.get("pllava_pooling_shape"), "pllava_pooling_shape")
    if not pooling.startswith("pllava"):
        return shape
    shape = overrides.output_size or shape
    if shape is None:
        raise PPLLaVAError(
            "pllava pooling needs an output size: pllava_pooling_shape in config.json, or --output-size T,H,W"
        )
    return shape


def _read_valuew_plus(config: dict[str, Any], overrides: Overrides, possible: bool) -> bool:
    valuew_plus = overrides.valuew_plus
    if valuew_plus is None:
        valuew_plus = bool(config.get("valuew_plus", False))
    if valuew_plus and not possible:
        raise PPLLaVAError(
            "--valuew-plus belongs to prompt-guided pooling over a SigLIP tower; this checkpoint has none"
        )
    return valuew_plus


def _known_activation(kind: str) -> str:
    if kind not in ACTIVATIONS:
        raise PPLLaVAError(f"the activation {kind!r} isn't supported (known: {', '.join(ACTIVATIONS)})")
    return kind
