"""The manifest of a bundle that is exported from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.manifest import (
    DecoderInfo,
    Manifest,
    PoolingInfo,
    Preprocessing,
    QuestionInfo,
    VisionInfo,
)
from ppllava_edge.engines.bundle.prompt_template import PromptTemplate
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.export.config.model import Model
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import Precision

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
NO_FRAME_LIMIT = 1 << 16


@dataclass(frozen=True)
class TokenIds:
    """The tokenizer's ids of the image token and of the tokens that end an answer."""

    image_token: int
    stop_ids: frozenset[int]


def build_manifest(
    model: Model,
    options: Options,
    precision: Precision,
    template: PromptTemplate,
    tokens: TokenIds | None,
    config: dict[str, Any],
    folder: Path,
    embedding_size: int,
    checkpoint_hash: str,
) -> Manifest:
    """Describe an exported model; the list of files stays empty.

    Args:
        tokens: The tokenizer's ids; None: use the ids of the configuration.
        config: The checkpoint's config.json.
        folder: The checkpoint's directory.
        embedding_size: E, the width of the space in which question and patches are compared.
        checkpoint_hash: SHA-256, or "" if it was not computed.
    """
    q = model.question
    stop_ids = set(model.stop_ids) | (tokens.stop_ids if tokens else set())
    question = None if q is None else QuestionInfo(q.positions, model.siglip, q.pad_id, embedding_size)
    pooling = PoolingInfo(
        model.pooling, model.temperature, model.video_windows, model.image_windows, model.pooled_shape
    )
    return Manifest(
        name=printable(config.get("name") or Path(options.checkpoint).name or folder.name),
        family=model.family,
        precision=describe_precision(precision),
        vision=_vision_info(model),
        preprocessing=_preprocessing(model),
        question=question,
        pooling=pooling,
        decoder=_decoder_info(model, precision),
        prompt=template,
        image_token=tokens.image_token if tokens else model.image_token,
        stop_ids=tuple(sorted(stop_ids)),
        tokenizer=options.tokenizer,
        checkpoint={
            "name": _checkpoint_name(options, folder),
            "sha256": checkpoint_hash,
            "valuew_plus": model.valuew_plus,
        },
        created_by=created_by(),
        demo=bool(config.get("demo", False)),
    )


def describe_precision(precision: Precision) -> dict[str, str]:
    """Return the precision of every part as the manifest records it."""
    return {**precision.parts, "similarity": "fp32"}


def kv_dtype(precision: Precision) -> str:
    """Return the numpy type of the KV cache."""
    return {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision.parts["kv"]]


def created_by() -> str:
    """Return this package's name and version."""
    try:
        return f"ppllava-edge {version('ppllava-edge')}"
    except PackageNotFoundError:
        return "ppllava-edge 0 (not installed)"


def _vision_info(model: Model) -> VisionInfo:
    v = model.vision
    return VisionInfo(
        image_size=v.image_size,
        grid=v.grid,
        hidden_size=v.width,
        class_token=v.class_token,
        states=v.states,
        max_frames=v.max_frames,
        default_frames=min(model.default_frames, v.max_frames or NO_FRAME_LIMIT),
    )


def _preprocessing(model: Model) -> Preprocessing:
    size = model.vision.image_size
    if model.siglip:
        return Preprocessing("pad", size, SIGLIP_MEAN, SIGLIP_STD, model.image_grids)
    return Preprocessing("squash", size, CLIP_MEAN, CLIP_STD, model.image_grids)


def _decoder_info(model: Model, precision: Precision) -> DecoderInfo:
    d = model.decoder
    return DecoderInfo(
        hidden_size=d.width,
        layers=d.layers,
        kv_heads=d.kv_heads,
        head_size=d.head_size,
        vocab=d.vocab,
        context=d.context,
        kv_dtype=kv_dtype(precision),
    )


def _checkpoint_name(options: Options, folder: Path) -> str:
    """The hub id, or the name of a directory without its path, which means nothing on another machine."""
    is_hub_id = "/" in options.checkpoint and not Path(options.checkpoint).exists()
    return printable(options.checkpoint if is_hub_id else folder.name)
