"""Where a model comes from: a checkpoint in upstream's layout, or a bundle whose weights are still floats."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.manifest import (
    DecoderInfo,
    Manifest,
    PoolingInfo,
    Preprocessing,
    QuestionInfo,
    VisionInfo,
)
from ppllava_edge.engines.bundle.prompt_template import TEMPLATES, PromptTemplate
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.checkpoint import Checkpoint, locate, locate_checkpoint, read_json
from ppllava_edge.export.config import Model, Overrides, read_model
from ppllava_edge.export.quantisation.precision import STAGE_PART, Precision
from ppllava_edge.export.stages.decoder import LANGUAGE, build_decoder
from ppllava_edge.export.stages.pooling import build_pooling
from ppllava_edge.export.stages.question import build_question
from ppllava_edge.export.stages.similarity import PROJECTOR, UNUSED, build_similarity
from ppllava_edge.export.stages.temporal import build_temporal
from ppllava_edge.export.stages.trunk import TOWER, build_trunk
from ppllava_edge.export.tokenizers import find_tokenizer, language_tokenizer, question_tokenizer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOKENIZERS = ("tokenizer.json", "question_tokenizer.json")


@dataclass
class Options:
    """What ppllava-export was asked for. block: rows per INT4 scale. engine: whether to write engines/cpu too; None: if anything is quantised."""

    checkpoint: str
    output: Path
    precision: Precision
    overrides: Overrides = field(default_factory=Overrides)
    subfolder: str = ""
    clip: str | None = None
    base: str | None = None
    tokenizer: bool = True
    force: bool = False
    block: int = 32
    engine: bool | None = None


class Source(Protocol):
    """A model whose weights are read one by one."""

    def graphs(self, precision: Precision) -> dict[str, Callable[[], Graph]]:
        """Every stage's name → what builds its graph in the precision's floating type, weights not loaded, not yet quantised."""

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Token embeddings (V, D) and image_newline (D)."""

    def write_tokenizers(self, work: Path) -> None:
        """Put the tokenizers into a bundle."""

    def manifest(self, precision: Precision, hash_weights: bool = True) -> Manifest:
        """What the bundle says of itself. write_tokenizers comes first. hash_weights: False where reading all of them would take too long."""

    def close(self) -> None:
        """Let go of files."""


def open_source(options: Options) -> Source:
    """The model that ppllava-export was pointed at. Raises PPLLaVAError in one line."""
    path = Path(options.checkpoint).expanduser() / options.subfolder
    return BundleSource(path, options) if (path / "manifest.json").is_file() else CheckpointSource(options)


class CheckpointSource:
    """A checkpoint in upstream's layout. Everything that is missing, unexpected or wrongly shaped is listed by name when it is opened."""

    def __init__(self, options: Options):
        self.options = options
        folder = locate_checkpoint(options.checkpoint, options.subfolder)
        self.config = read_json(folder / "config.json")
        wanted = options.overrides.pooling or self.config.get("pooling", "avp")
        self.clip = _clip_folder(folder, self.config, options) if wanted == "ppllava" else None
        self.model = read_model(
            self.config, read_json(self.clip / "config.json") if self.clip else None, options.overrides
        )
        self.template = _template(self.model.template)
        self.checkpoint = Checkpoint(folder)
        self.tokens: dict[str, Any] | None = None
        _check_tensors(self.checkpoint, self.model, options.precision)

    def graphs(self, precision: Precision) -> dict[str, Callable[[], Graph]]:
        return stages(self.checkpoint, self.model, precision)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        d = self.model.decoder
        table: Tensor = self.checkpoint.source(LANGUAGE)("model.embed_tokens.weight", d.vocab, d.width)
        newline: Tensor = self.checkpoint.source()("image_newline", d.width)
        return table, newline

    def write_tokenizers(self, work: Path) -> None:
        if self.options.tokenizer:
            self.tokens = _write_tokenizers(
                self.checkpoint.folder, self.clip, self.model, self.options, self.template, work
            )

    def manifest(self, precision: Precision, hash_weights: bool = True) -> Manifest:
        digest = self.checkpoint.hash() if hash_weights else ""
        return _manifest(
            self.checkpoint,
            self.model,
            self.options,
            precision,
            self.template,
            self.tokens,
            self.config,
            digest,
        )

    def close(self) -> None:
        self.checkpoint.close()


class BundleSource:
    """A bundle in fp32 or fp16, to be quantised, or widened to fp32."""

    def __init__(self, path: Path, options: Options):
        if vars(options.overrides) != vars(Overrides()) or options.clip or options.base:
            raise PPLLaVAError(
                f"{path} is a bundle already: pooling, template and tokenizers are set when a checkpoint is exported"
            )
        self.bundle, self.options = Bundle.open(path), options
        m = self.bundle.manifest
        if any(kind not in ("fp32", "fp16") for kind in m.precision.values()):
            kinds = ", ".join(
                f"{part} {kind}" for part, kind in m.precision.items() if kind.startswith("int")
            )
            raise PPLLaVAError(
                f"{path} is quantised already ({kinds}); start from its checkpoint, or from a bundle in fp16 or fp32"
            )
        for part, kind in options.precision.parts.items():
            if (
                m.precision.get(part) == "fp32"
                and kind == "fp16"
                and not (part == "kv" and options.precision.integer("decoder"))
            ):
                raise PPLLaVAError(
                    f"{path} holds {part} in fp32, which is not narrowed to fp16; export the checkpoint with --precision fp16"
                )

    def graphs(self, precision: Precision) -> dict[str, Callable[[], Graph]]:
        names = [name for name in STAGE_PART if f"{name}.onnx" in self.bundle.manifest.files]

        def build(name: str) -> Graph:
            g = Graph.read(self.bundle.file(f"{name}.onnx"))
            if name == "similarity" and precision.float_type("trunk") == "float32":
                return to_float32(g)
            return to_float32(g) if precision.float_type(name) == "float32" and name != "similarity" else g

        return {name: functools.partial(build, name) for name in names}

    def embeddings(self) -> tuple[Tensor, Tensor]:
        from safetensors import safe_open

        with safe_open(self.bundle.file("embed_tokens.safetensors"), "np") as reader:
            shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118  (not a dict)

        def load(name: str) -> np.ndarray:
            with safe_open(self.bundle.file("embed_tokens.safetensors"), "np") as reader:
                return reader.get_tensor(name)

        table, newline = (
            Tensor(name, shapes[name], functools.partial(load, name))
            for name in ("embed_tokens", "image_newline")
        )
        return table, newline

    def write_tokenizers(self, work: Path) -> None:
        for name in TOKENIZERS:
            if name in self.bundle.manifest.files and self.options.tokenizer:
                shutil.copyfile(self.bundle.file(name), work / name)

    def manifest(self, precision: Precision, hash_weights: bool = True) -> Manifest:
        m = self.bundle.manifest
        if (
            m.precision.get("kv", "fp32" if m.decoder.kv_dtype == "float32" else "fp16") == "fp32"
            and precision.parts["kv"] == "fp16"
        ):
            precision = Precision(
                {**precision.parts, "kv": "fp32"}
            )  # what isn't quantised stays as wide as it was
        decoder = replace(m.decoder, kv_dtype=_kv_dtype(precision))
        writer, tokenizer = f"ppllava-edge {tool_version()}", m.tokenizer and self.options.tokenizer
        return replace(
            m,
            precision=_described(precision),
            decoder=decoder,
            created_by=writer,
            files={},
            tokenizer=tokenizer,
        )

    def close(self) -> None:
        pass


def stages(checkpoint: Checkpoint, model: Model, precision: Precision) -> dict[str, Callable[[], Graph]]:
    """Every stage's name → what builds its graph."""
    vision = precision.float_type("trunk")
    projector, tower = checkpoint.source(PROJECTOR), checkpoint.source(TOWER)

    def stage(name: str, build: Callable[[Graph], None]) -> Callable[[], Graph]:
        def made() -> Graph:
            build(g := Graph(name, precision.float_type(name)))
            return g

        return made

    found = {"trunk": stage("trunk", lambda g: build_trunk(g, tower, model.vision))}
    if model.vision.adapter_depth:
        found["temporal"] = stage("temporal", lambda g: build_temporal(g, tower, model.vision))
    if model.question is not None:
        question, size = model.question, embedding_size(checkpoint, model)
        found["question"] = stage(
            "question",
            lambda g: build_question(g, checkpoint.source(), checkpoint.shapes, question, model.siglip, size),
        )
        found["similarity"] = stage(
            "similarity", lambda g: build_similarity(g, projector, model, vision, size)
        )
    found["pooling"] = stage("pooling", lambda g: build_pooling(g, projector, model, vision))
    found["decoder"] = stage(
        "decoder", lambda g: build_decoder(g, checkpoint.source(LANGUAGE), model.decoder)
    )
    return found


def embedding_size(checkpoint: Checkpoint, model: Model) -> int:
    """E, the size in which question and patches are compared: what the checkpoint's projection has."""
    if model.siglip:
        return model.vision.width
    shape = checkpoint.shapes.get(PROJECTOR + "clip_text_projection.weight", ())
    return shape[0] if len(shape) == 2 else 768


def _clip_folder(folder: Path, config: dict[str, Any], options: Options) -> Path:
    """The directory of the question tower's own checkpoint, for its configuration and tokenizer."""
    patterns = (
        "config.json",
        "tokenizer*",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
    )
    if options.clip:
        return locate(options.clip, patterns=patterns)
    told = config.get("clip_weight")
    if not told:
        raise PPLLaVAError(
            f"{folder / 'config.json'} has no clip_weight; name the question tower's directory with --clip"
        )
    beside = folder / str(told)
    if beside.is_dir() and folder.resolve() in beside.resolve().parents:
        return beside
    try:
        return locate(str(told), patterns=patterns)
    except PPLLaVAError as error:
        raise PPLLaVAError(
            f"the question tower's configuration is not there ({error}); name its directory with --clip"
        ) from None


def _template(told: str | dict[str, Any]) -> PromptTemplate:
    if isinstance(told, str):
        if told not in TEMPLATES:
            raise PPLLaVAError(f"prompt template {told!r} is unknown; choose {', '.join(TEMPLATES)}")
        return TEMPLATES[told]
    try:
        return PromptTemplate.from_json(told)
    except (KeyError, TypeError, ValueError) as error:
        raise PPLLaVAError(f"the prompt template in config.json can't be used: {error}") from None


def _check_tensors(checkpoint: Checkpoint, model: Model, precision: Precision) -> None:
    """Go through all graphs without loading a weight, and list what is missing, wrongly shaped or unexpected, by name."""
    for build in stages(checkpoint, model, precision).values():
        build()
    source = checkpoint.source(LANGUAGE)
    source("model.embed_tokens.weight", model.decoder.vocab, model.decoder.width)
    checkpoint.source()("image_newline", model.decoder.width)
    unexpected = [
        name for name in checkpoint.shapes if name not in checkpoint.asked and not _known_unused(name, model)
    ]
    problems = sorted(set(checkpoint.problems)) + [
        f"unexpected: {name} {list(checkpoint.shapes[name])}" for name in sorted(unexpected)
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise PPLLaVAError(f"{checkpoint.folder} doesn't hold this model ({len(problems)} tensors): {shown}")


def _known_unused(name: str, model: Model) -> bool:
    """Tensors that upstream stores and never uses for the features: layers above them, the towers' own heads, buffers."""
    v = model.vision
    if name.startswith(TOWER):
        rest = name[len(TOWER) :]
        above = re.match(r"(?:encoder\.layers|btadapter_[ST]_layers)\.(\d+)\.", rest)
        if above:
            first, end = (
                (v.used_layers, v.layers) if rest.startswith("encoder") else (v.states, v.adapter_depth)
            )
            return first <= int(above[1]) < end
        return rest.startswith(("post_layernorm.", "head.")) or rest.endswith("position_ids")
    if name.startswith(PROJECTOR):
        rest = name[len(PROJECTOR) :]
        if model.pooling != "ppllava":
            return rest.startswith(("clip_", "logit_"))
        return rest.startswith((*UNUSED, "clip_visual_head.probe")) or rest.endswith("position_ids")
    return name.endswith(("rotary_emb.inv_freq", "position_ids")) or (
        model.decoder.tied and name == LANGUAGE + "lm_head.weight"
    )


def _write_tokenizers(
    folder: Path, clip: Path | None, model: Model, options: Options, template: PromptTemplate, work: Path
) -> dict[str, Any]:
    """Save the tokenizers. Returns the image token's id and the stop tokens' ids as the tokenizer has them."""
    language = language_tokenizer(
        find_tokenizer([folder], options.base, "--base", "decoder"), model.image_token, model.decoder.vocab
    )
    language.save(str(work / "tokenizer.json"))
    if clip is not None:
        told = find_tokenizer([clip, folder], options.clip, "--clip", "question tower")
        question_tokenizer(told).save(str(work / "question_tokenizer.json"))
    ends = {
        language.token_to_id(text)
        for text in (template.separators[1].strip(), "</s>", "<|im_end|>", "<|endoftext|>")
    }
    return {"image_token": language.token_to_id("<image>"), "stops": {i for i in ends if i is not None}}


def _manifest(
    checkpoint: Checkpoint,
    model: Model,
    o: Options,
    precision: Precision,
    template: PromptTemplate,
    tokens: dict[str, Any] | None,
    config: dict[str, Any],
    digest: str,
) -> Manifest:
    v, d, q = model.vision, model.decoder, model.question
    clip_colours = not model.siglip
    stop_ids = set(model.stop_ids) | (tokens["stops"] if tokens else set())
    return Manifest(
        name=str(config.get("name") or Path(o.checkpoint).name or checkpoint.folder.name),
        family=model.family,
        precision=_described(precision),
        vision=VisionInfo(
            v.image_size,
            v.grid,
            v.width,
            v.class_token,
            v.states,
            v.max_frames,
            min(model.default_frames, v.max_frames or 1 << 16),
        ),
        preprocessing=Preprocessing(
            "squash" if clip_colours else "pad",
            v.image_size,
            CLIP_MEAN if clip_colours else (0.5, 0.5, 0.5),
            CLIP_STD if clip_colours else (0.5, 0.5, 0.5),
            model.image_grids,
        ),
        question=None
        if q is None
        else QuestionInfo(q.positions, model.siglip, q.pad_id, embedding_size(checkpoint, model)),
        pooling=PoolingInfo(
            model.pooling, model.temperature, model.video_windows, model.image_windows, model.pooled_shape
        ),
        decoder=DecoderInfo(
            d.width, d.layers, d.kv_heads, d.head_size, d.vocab, d.context, _kv_dtype(precision)
        ),
        prompt=template,
        image_token=tokens["image_token"] if tokens else model.image_token,
        stop_ids=tuple(sorted(stop_ids)),
        tokenizer=o.tokenizer,
        checkpoint={
            "name": o.checkpoint
            if "/" in o.checkpoint and not Path(o.checkpoint).exists()
            else checkpoint.folder.name,
            "sha256": digest,
            "valuew_plus": model.valuew_plus,
        },
        created_by=f"ppllava-edge {tool_version()}",
        demo=bool(config.get("demo", False)),
    )


def _described(precision: Precision) -> dict[str, str]:
    return {**precision.parts, "similarity": "fp32"}


def _kv_dtype(precision: Precision) -> str:
    return {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision.parts["kv"]]


def tool_version() -> str:
    """This package's version."""
    try:
        return version("ppllava-edge")
    except PackageNotFoundError:
        return "0 (not installed)"
