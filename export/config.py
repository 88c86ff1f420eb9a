"""What a checkpoint's configuration says, in one typed place: sizes of every stage, pooling, preprocessing.

config.json omits values that equal the defaults of its model class, so those defaults stand here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ppllava_edge.engines.bundle.manifest import POOLINGS
from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.stages.layers import ACTIVATIONS

CLIP_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
SIGLIP_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SIGLIP_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vocab_size": 32000,
    "pad_token_id": 1,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "head_dim": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 2,
}
QWEN2 = LLAMA | {
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "attention_bias": True,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Tower:
    """A transformer of CLIP or SigLIP: width, feed-forward width, layers, heads."""

    width: int
    mlp: int
    layers: int
    heads: int
    activation: str
    epsilon: float


@dataclass(frozen=True)
class Vision(Tower):
    """The vision tower. feature_layer: which hidden state becomes the features (-2: the one that enters the last layer)."""

    image_size: int
    patch_size: int
    class_token: bool
    feature_layer: int
    grid: tuple[int, int]
    adapter_depth: int = 0
    max_frames: int | None = None

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def used_layers(self) -> int:
        """Layers below the features; those above are never computed."""
        return self.layers + self.feature_layer + 1

    @property
    def states(self) -> int:
        """How many of the trunk's states leave it: those that the temporal branch reads, or the last one."""
        return max(self.adapter_depth - 1, 1)


@dataclass(frozen=True)
class Question(Tower):
    """The question tower. legacy_eos: pool at the position of the largest id instead of the first end token."""

    positions: int
    stretched: bool
    vocab: int
    end_id: int
    pad_id: int

    @property
    def legacy_eos(self) -> bool:
        return self.end_id == 2


@dataclass(frozen=True)
class Decoder:
    """The language model, LLaMA or Qwen2."""

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
    """A whole checkpoint."""

    family: str  # clip-llama | clip-qwen2 | siglip-llama | siglip-qwen2
    vision: Vision
    question: Question | None
    decoder: Decoder
    pooling: str
    temperature: float
    video_windows: Windows
    image_windows: Windows
    pooled_shape: tuple[int, int, int] | None  # of pllava
    valuew_plus: bool
    image_token: int
    stop_ids: tuple[int, ...]
    image_grids: tuple[tuple[int, int], ...]
    default_frames: int
    template: str | dict[str, Any]

    @property
    def siglip(self) -> bool:
        return self.family.startswith("siglip")


@dataclass
class Overrides:
    """What the command line sets over the checkpoint's configuration; None leaves it."""

    pooling: str | None = None
    kernel: tuple[int, int, int] | None = None
    stride: tuple[int, int, int] | None = None
    output_size: tuple[int, int, int] | None = None
    image_kernel: tuple[int, int, int] | None = None
    image_stride: tuple[int, int, int] | None = None
    temperature: float | None = None
    valuew_plus: bool | None = None
    template: str | dict[str, Any] | None = None


def read_model(config: dict[str, Any], question_config: dict[str, Any] | None, overrides: Overrides) -> Model:
    """Resolve a checkpoint's config.json, the question tower's config and the command line into one Model.

    Raises PPLLaVAError for models that are not of the supported families and for poolings that can't work.
    """
    if not isinstance(config.get("text_config"), dict) or not isinstance(config.get("vision_config"), dict):
        raise PPLLaVAError(
            "config.json has no text_config and vision_config: this is not a PPLLaVA or PLLaVA checkpoint"
        )
    text_type = config["text_config"].get("model_type", "llama")
    if text_type not in ("llama", "qwen2"):
        raise PPLLaVAError(f"the decoder is a {text_type!r} model; llama and qwen2 are supported")
    vision_type = config["vision_config"].get("model_type", "clip_vision_model")
    if vision_type not in ("clip_vision_model", "siglip_vision_model"):
        raise PPLLaVAError(
            f"the vision tower is a {vision_type!r}; clip_vision_model and siglip_vision_model are supported"
        )
    siglip = vision_type.startswith("siglip")
    vision = _vision(config, siglip)
    pooling = overrides.pooling or config.get("pooling", "avp")
    if pooling not in POOLINGS:
        raise PPLLaVAError(f"pooling {pooling!r} is unknown; choose {', '.join(POOLINGS)}")
    question = None
    if pooling == "ppllava":
        if question_config is None:
            raise PPLLaVAError(
                "prompt-guided pooling needs the question tower's configuration (config.json of clip_weight): name it with --clip"
            )
        question = _question(
            question_config.get("text_config") or {}, siglip, bool(config.get("extend_clip"))
        )
    video, image = _windows(config, overrides, pooling)
    if pooling == "ppllava" or pooling == "pllava_npu":
        video.check(vision.grid, "video pooling")
        image.check(vision.grid, "image pooling")
    temperature = (
        overrides.temperature
        if overrides.temperature is not None
        else float(config.get("pooling_temp", 0.01))
    )
    if not temperature > 0:
        raise PPLLaVAError(f"the pooling temperature must be above 0, not {temperature:g}")
    pooled = _triple(config.get("pllava_pooling_shape"), "pllava_pooling_shape")
    if overrides.output_size and pooling.startswith("pllava"):
        pooled = overrides.output_size
    if pooling.startswith("pllava") and pooled is None:
        raise PPLLaVAError(
            "pllava pooling needs an output size: pllava_pooling_shape in config.json, or --output-size T,H,W"
        )
    valuew_plus = (
        overrides.valuew_plus if overrides.valuew_plus is not None else bool(config.get("valuew_plus", False))
    )
    if valuew_plus and not (siglip and pooling == "ppllava"):
        raise PPLLaVAError(
            "--valuew-plus belongs to prompt-guided pooling over a SigLIP tower; this checkpoint has none"
        )
    decoder, stops = _decoder(config, text_type)
    return Model(
        family=f"{'siglip' if siglip else 'clip'}-{text_type}",
        vision=vision,
        question=question,
        decoder=decoder,
        pooling=pooling,
        temperature=temperature,
        video_windows=video,
        image_windows=image,
        pooled_shape=pooled,
        valuew_plus=valuew_plus,
        image_token=int(config.get("image_token_index", 32000)),
        stop_ids=stops,
        image_grids=tuple((int(h), int(w)) for h, w in config.get("image_grid_pinpoints") or ()),
        default_frames=int(config.get("num_frames", 16 if pooling in ("pllava", "pllava_npu") else 32)),
        template=overrides.template
        or config.get("prompt_template")
        or ("plain_qwen" if text_type == "qwen2" else "plain_v1"),
    )


def _vision(config: dict[str, Any], siglip: bool) -> Vision:
    c = (SIGLIP_VISION if siglip else CLIP_VISION) | config["vision_config"]
    side = c["image_size"] // c["patch_size"]
    grid = (side, side)
    told = config.get("frame_shape")
    if told and int(told[0]) * int(told[1]) != side * side:
        raise PPLLaVAError(
            f"frame_shape {tuple(told)} in config.json doesn't fit the vision tower, which gives {side}x{side} patches"
        )
    adapter = int(config.get("btadapter_depth", 4)) if config.get("btadapter") else 0
    if siglip and adapter:
        raise PPLLaVAError(
            "a temporal adapter over a SigLIP tower is not part of any released model and isn't supported"
        )
    layer = int(config.get("vision_feature_layer", -2))
    strategy = config.get("vision_feature_select_strategy", "default")
    if layer > 0:
        layer -= c["num_hidden_layers"] + 1
    if strategy not in ("default", "full") or (strategy == "default") != (not siglip):
        raise PPLLaVAError(
            f"vision_feature_select_strategy {strategy!r} with a {'SigLIP' if siglip else 'CLIP'} tower isn't supported"
        )
    if not -c["num_hidden_layers"] <= layer <= -1 or (adapter and layer != -2):
        raise PPLLaVAError(f"vision_feature_layer {layer} isn't supported for this tower")
    if adapter and not 2 <= adapter <= c["num_hidden_layers"]:
        raise PPLLaVAError(
            f"btadapter_depth {adapter} doesn't fit a tower of {c['num_hidden_layers']} layers"
        )
    return Vision(
        c["hidden_size"],
        c["intermediate_size"],
        c["num_hidden_layers"],
        c["num_attention_heads"],
        _activation(c["hidden_act"]),
        float(c["layer_norm_eps"]),
        c["image_size"],
        c["patch_size"],
        not siglip,
        layer,
        (int(told[0]), int(told[1])) if told else grid,
        adapter,
        int(config.get("max_T", 64)) if adapter else None,
    )


def _question(text: dict[str, Any], siglip: bool, stretched: bool) -> Question:
    c = (SIGLIP_TEXT if siglip else CLIP_TEXT) | text
    positions = c["max_position_embeddings"]
    return Question(
        c["hidden_size"],
        c["intermediate_size"],
        c["num_hidden_layers"],
        c["num_attention_heads"],
        _activation(c["hidden_act"]),
        float(c["layer_norm_eps"]),
        4 * positions - 60 if stretched else positions,
        stretched,
        c["vocab_size"],
        int(c.get("eos_token_id") or 0),
        int(c.get("pad_token_id", 1)),
    )


def _decoder(config: dict[str, Any], text_type: str) -> tuple[Decoder, tuple[int, ...]]:
    c = (QWEN2 if text_type == "qwen2" else LLAMA) | config["text_config"]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise PPLLaVAError(f"rotary scaling of type {kind!r} isn't supported (default and linear are)")
    if c.get("use_sliding_window"):
        raise PPLLaVAError("a decoder with use_sliding_window isn't supported")
    if c["hidden_act"] not in ("silu", "swish"):
        raise PPLLaVAError(f"the decoder's activation {c['hidden_act']!r} isn't supported (silu is)")
    if text_type == "llama" and (c["attention_bias"] or c.get("mlp_bias")):
        raise PPLLaVAError("a LLaMA decoder with attention_bias or mlp_bias isn't supported")
    heads = c["num_attention_heads"]
    decoder = Decoder(
        c["hidden_size"],
        c["intermediate_size"],
        c["num_hidden_layers"],
        heads,
        c["num_key_value_heads"] or heads,
        c["head_dim"] or c["hidden_size"] // heads,
        float(c["rms_norm_eps"]),
        float(rope.get("rope_theta", c["rope_theta"])),
        float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
        c["max_position_embeddings"],
        c["vocab_size"],
        bool(c["attention_bias"]),
        bool(c["tie_word_embeddings"] or config.get("tie_word_embeddings", False)),
    )
    ends = c["eos_token_id"]
    return decoder, tuple(int(e) for e in (ends if isinstance(ends, list) else [ends]) if e is not None)


def _windows(config: dict[str, Any], o: Overrides, pooling: str) -> tuple[Windows, Windows]:
    """Video and image windows. Any of kernel, stride and output size on the command line replaces all three of the checkpoint."""
    video = Windows(
        _triple(config.get("pooling_kernel"), "pooling_kernel"),
        _triple(config.get("pooling_stride"), "pooling_stride"),
        _triple(config.get("pllava_pooling_shape"), "pllava_pooling_shape") if pooling == "ppllava" else None,
    )
    if o.kernel or o.stride or o.output_size:
        video = Windows(o.kernel, o.stride, o.output_size)
    if pooling == "pllava_npu":
        output = o.output_size or _triple(config.get("pllava_pooling_shape"), "pllava_pooling_shape")
        return Windows(None, None, output), Windows(None, None, output)
    image_kernel = _triple(config.get("image_pooling_kernel"), "image_pooling_kernel")
    image_stride = _triple(config.get("image_pooling_stride"), "image_pooling_stride")
    image = replace(video, kernel=image_kernel or video.kernel, stride=image_stride or video.stride)
    if o.image_kernel or o.image_stride:
        image = Windows(o.image_kernel or o.image_stride, o.image_stride or o.image_kernel, None)
    elif o.kernel or o.stride or o.output_size:
        image = (
            Windows(image_kernel, image_stride or image_kernel, None) if image_kernel else _one_frame(video)
        )
    return video, image


def _one_frame(video: Windows) -> Windows:
    """Windows for single images where only those for video are known: the same over rows and columns, one frame deep."""
    flat = [
        None if part is None else (1, part[1], part[2])
        for part in (video.kernel, video.stride, video.output_size)
    ]
    return Windows(*flat)


def _triple(value: object, name: str) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = value.strip("()[] ").split(",")
    try:
        t, h, w = (int(part) for part in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise PPLLaVAError(
            f"{name} must be three whole numbers (frames, rows, columns), not {value!r}"
        ) from None
    return t, h, w


def _activation(kind: str) -> str:
    if kind not in ACTIVATIONS:
        raise PPLLaVAError(f"the activation {kind!r} isn't supported (known: {', '.join(ACTIVATIONS)})")
    return kind
