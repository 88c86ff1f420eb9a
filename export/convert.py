"""A whole checkpoint into a bundle, stage after stage."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..engines.bundle import DecoderInfo, Manifest, PoolingInfo, Preprocessing, QuestionInfo, VisionInfo, write_manifest
from ..engines.errors import PPLLaVAError
from ..engines.prompt_template import TEMPLATES, PromptTemplate
from .checkpoint import Checkpoint, locate, locate_checkpoint, read_json
from .config import Model, Overrides, read_model
from .decoder import LANGUAGE, build_decoder
from .graph import Graph, Tensor
from .pooling import build_pooling
from .question import build_question
from .similarity import PROJECTOR, UNUSED, build_similarity
from .temporal import build_temporal
from .tokenizers import find_tokenizer, language_tokenizer, question_tokenizer
from .trunk import TOWER, build_trunk

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EMBEDDINGS = "embed_tokens.safetensors"
PARTS = ("vision", "question", "projector", "decoder", "embeddings")  # what --precision can name
STAGE_PART = {"trunk": "vision", "temporal": "vision", "question": "question", "similarity": "similarity", "pooling": "projector", "decoder": "decoder"}


@dataclass
class Options:
    """What ppllava-export was asked for. precision: float type per part ("float32" or "float16")."""

    checkpoint: str
    output: Path
    precision: dict[str, str]
    overrides: Overrides = field(default_factory=Overrides)
    subfolder: str = ""
    clip: str | None = None
    base: str | None = None
    tokenizer: bool = True
    force: bool = False


@dataclass(frozen=True)
class StageReport:
    """One row of the closing table."""

    stage: str
    parameters: int
    bytes: int
    seconds: float


class Progress:
    """What convert() tells while it works; the command line draws it."""

    def start(self, total_bytes: int) -> None:
        """The checkpoint is whole and this much will be written."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def wrote(self, count: int) -> None:
        """So many bytes of weights were written."""


def convert(options: Options, progress: Progress | None = None) -> tuple[Manifest, list[StageReport]]:
    """Write a bundle. Nothing is left behind when it fails: the bundle is written beside its place and renamed when it is whole.

    Raises PPLLaVAError in one line for anything that the user can mend.
    """
    progress = progress or Progress()
    folder = locate_checkpoint(options.checkpoint, options.subfolder)
    config = read_json(folder / "config.json")
    wanted = options.overrides.pooling or config.get("pooling", "avp")
    clip = _clip_folder(folder, config, options) if wanted == "ppllava" else None
    model = read_model(config, read_json(clip / "config.json") if clip else None, options.overrides)
    template = _template(model.template)
    output = Path(os.path.abspath(options.output))
    if output.exists() and not options.force:
        raise PPLLaVAError(f"{options.output} exists already; name another directory, or replace it with --force")
    with contextlib.closing(Checkpoint(folder)) as checkpoint, _work_beside(output) as work:
        progress.start(_check_tensors(checkpoint, model, options.precision))
        tokens = _write_tokenizers(folder, clip, model, options, template, work) if options.tokenizer else None  # first: quick, and may fail
        reports = _write_stages(checkpoint, model, options.precision, work, progress)
        reports.append(_write_embeddings(checkpoint, model, options.precision["embeddings"], work))
        manifest = _manifest(checkpoint, model, options, template, tokens, config)
        manifest = write_manifest(work, manifest)
        _move_into_place(work, output, options.force)
    return manifest, reports


def stages(checkpoint: Checkpoint, model: Model, precision: dict[str, str]) -> dict[str, tuple[str, Callable[[Graph], None]]]:
    """Every stage's name → (its floating type, what writes its graph)."""
    vision = precision["vision"]
    projector, tower = checkpoint.source(PROJECTOR), checkpoint.source(TOWER)
    found: dict[str, tuple[str, Callable[[Graph], None]]] = {"trunk": (vision, lambda g: build_trunk(g, tower, model.vision))}
    if model.vision.adapter_depth:
        found["temporal"] = (vision, lambda g: build_temporal(g, tower, model.vision))
    if model.question is not None:
        question, size = model.question, embedding_size(checkpoint, model)
        found["question"] = (
            precision["question"],
            lambda g: build_question(g, checkpoint.source(), checkpoint.shapes, question, model.siglip, size),
        )
        found["similarity"] = ("float32", lambda g: build_similarity(g, projector, model, vision, size))
    found["pooling"] = (precision["projector"], lambda g: build_pooling(g, projector, model, vision))
    found["decoder"] = (precision["decoder"], lambda g: build_decoder(g, checkpoint.source(LANGUAGE), model.decoder))
    return found


def embedding_size(checkpoint: Checkpoint, model: Model) -> int:
    """E, the size in which question and patches are compared: what the checkpoint's projection has."""
    if model.siglip:
        return model.vision.width
    shape = checkpoint.shapes.get(PROJECTOR + "clip_text_projection.weight", ())
    return shape[0] if len(shape) == 2 else 768


def _clip_folder(folder: Path, config: dict[str, Any], options: Options) -> Path:
    """The directory of the question tower's own checkpoint, for its configuration and tokenizer."""
    patterns = ("config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "spiece.model")
    if options.clip:
        return locate(options.clip, patterns=patterns)
    told = config.get("clip_weight")
    if not told:
        raise PPLLaVAError(f"{folder / 'config.json'} has no clip_weight; name the question tower's directory with --clip")
    beside = folder / str(told)
    if beside.is_dir() and folder.resolve() in beside.resolve().parents:
        return beside
    try:
        return locate(str(told), patterns=patterns)
    except PPLLaVAError as error:
        raise PPLLaVAError(f"the question tower's configuration is not there ({error}); name its directory with --clip") from None


def _template(told: str | dict[str, Any]) -> PromptTemplate:
    if isinstance(told, str):
        if told not in TEMPLATES:
            raise PPLLaVAError(f"prompt template {told!r} is unknown; choose {', '.join(TEMPLATES)}")
        return TEMPLATES[told]
    try:
        return PromptTemplate.from_json(told)
    except (KeyError, TypeError, ValueError) as error:
        raise PPLLaVAError(f"the prompt template in config.json can't be used: {error}") from None


def _check_tensors(checkpoint: Checkpoint, model: Model, precision: dict[str, str]) -> int:
    """Go through all graphs without loading a weight, and list what is missing, wrongly shaped or unexpected, by name.

    Returns the bytes of weights that the graphs will hold.
    """
    total = 0
    for name, (dtype, build) in stages(checkpoint, model, precision).items():
        build(g := Graph(name, dtype))
        total += g.weight_bytes
    source = checkpoint.source(LANGUAGE)
    source("model.embed_tokens.weight", model.decoder.vocab, model.decoder.width)
    checkpoint.source()("image_newline", model.decoder.width)
    unexpected = [name for name in checkpoint.shapes if name not in checkpoint.asked and not _known_unused(name, model)]
    problems = sorted(set(checkpoint.problems)) + [f"unexpected: {name} {list(checkpoint.shapes[name])}" for name in sorted(unexpected)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise PPLLaVAError(f"{checkpoint.folder} doesn't hold this model ({len(problems)} tensors): {shown}")
    return total


def _known_unused(name: str, model: Model) -> bool:
    """Tensors that upstream stores and never uses for the features: layers above them, the towers' own heads, buffers."""
    v = model.vision
    if name.startswith(TOWER):
        rest = name[len(TOWER) :]
        above = re.match(r"(?:encoder\.layers|btadapter_[ST]_layers)\.(\d+)\.", rest)
        if above:
            first, end = (v.used_layers, v.layers) if rest.startswith("encoder") else (v.states, v.adapter_depth)
            return first <= int(above[1]) < end
        return rest.startswith(("post_layernorm.", "head.")) or rest.endswith("position_ids")
    if name.startswith(PROJECTOR):
        rest = name[len(PROJECTOR) :]
        if model.pooling != "ppllava":
            return rest.startswith(("clip_", "logit_"))
        return rest.startswith((*UNUSED, "clip_visual_head.probe")) or rest.endswith("position_ids")
    return name.endswith(("rotary_emb.inv_freq", "position_ids")) or (model.decoder.tied and name == LANGUAGE + "lm_head.weight")


def _write_stages(checkpoint: Checkpoint, model: Model, precision: dict[str, str], work: Path, progress: Progress) -> list[StageReport]:
    reports = []
    plan = stages(checkpoint, model, precision)
    for name, (dtype, build) in plan.items():
        progress.stage(name)
        started = time.perf_counter()
        g = Graph(name, dtype, work / f"{name}.onnx.data", progress.wrote)
        try:
            build(g)
            g.save(work / f"{name}.onnx")
        finally:
            g.close()
        size = sum(path.stat().st_size for path in work.glob(f"{name}.onnx*"))
        reports.append(StageReport(name, g.parameters, size, time.perf_counter() - started))
    return reports


def _write_embeddings(checkpoint: Checkpoint, model: Model, dtype: str, work: Path) -> StageReport:
    """Token embeddings and image_newline: looked up by the runtime, memory-mapped, never part of a graph."""
    started, d = time.perf_counter(), model.decoder
    table: Tensor = checkpoint.source(LANGUAGE)("model.embed_tokens.weight", d.vocab, d.width)
    newline: Tensor = checkpoint.source()("image_newline", d.width)
    arrays = {"embed_tokens": table.load().astype(dtype, copy=False), "image_newline": newline.load().astype(dtype, copy=False)}
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, work / EMBEDDINGS)
    return StageReport("embeddings", (d.vocab + 1) * d.width, (work / EMBEDDINGS).stat().st_size, time.perf_counter() - started)


def _write_tokenizers(folder: Path, clip: Path | None, model: Model, options: Options, template: PromptTemplate, work: Path) -> dict[str, Any]:
    """Save the tokenizers. Returns the image token's id and the stop tokens' ids as the tokenizer has them."""
    language = language_tokenizer(find_tokenizer([folder], options.base, "--base", "decoder"), model.image_token, model.decoder.vocab)
    language.save(str(work / "tokenizer.json"))
    if clip is not None:
        told = find_tokenizer([clip, folder], options.clip, "--clip", "question tower")
        question_tokenizer(told).save(str(work / "question_tokenizer.json"))
    ends = {language.token_to_id(text) for text in (template.separators[1].strip(), "</s>", "<|im_end|>", "<|endoftext|>")}
    return {"image_token": language.token_to_id("<image>"), "stops": {i for i in ends if i is not None}}


def _manifest(checkpoint: Checkpoint, model: Model, o: Options, template: PromptTemplate, tokens: dict[str, Any] | None, config: dict[str, Any]) -> Manifest:
    v, d, q = model.vision, model.decoder, model.question
    clip_colours = not model.siglip
    stop_ids = set(model.stop_ids) | (tokens["stops"] if tokens else set())
    return Manifest(
        name=str(config.get("name") or Path(o.checkpoint).name or checkpoint.folder.name), family=model.family,
        precision={**{part: _short(o.precision[part]) for part in PARTS}, "similarity": "fp32"},
        vision=VisionInfo(v.image_size, v.grid, v.width, v.class_token, v.states, v.max_frames, min(model.default_frames, v.max_frames or 1 << 16)),
        preprocessing=Preprocessing(
            "squash" if clip_colours else "pad", v.image_size, CLIP_MEAN if clip_colours else (0.5, 0.5, 0.5),
            CLIP_STD if clip_colours else (0.5, 0.5, 0.5), model.image_grids,
        ),
        question=None if q is None else QuestionInfo(q.positions, model.siglip, q.pad_id, embedding_size(checkpoint, model)),
        pooling=PoolingInfo(model.pooling, model.temperature, model.video_windows, model.image_windows, model.pooled_shape),
        decoder=DecoderInfo(d.width, d.layers, d.kv_heads, d.head_size, d.vocab, d.context, o.precision["decoder"]),
        prompt=template, image_token=tokens["image_token"] if tokens else model.image_token, stop_ids=tuple(sorted(stop_ids)),
        tokenizer=o.tokenizer, checkpoint={"name": o.checkpoint if "/" in o.checkpoint and not Path(o.checkpoint).exists() else checkpoint.folder.name,
                                           "sha256": checkpoint.hash(), "valuew_plus": model.valuew_plus},
        created_by=f"ppllava-edge {tool_version()}", demo=bool(config.get("demo", False)),
    )  # fmt: skip


def tool_version() -> str:
    """This package's version."""
    try:
        return version("ppllava-edge")
    except PackageNotFoundError:
        return "0 (not installed)"


def _short(dtype: str) -> str:
    return {"float32": "fp32", "float16": "fp16"}[dtype]


@contextlib.contextmanager
def _work_beside(output: Path) -> Iterator[Path]:
    """A scratch directory beside the output; removed on any failure or interrupt. A full disk is one clear line."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    except OSError as error:
        raise PPLLaVAError(f"can't write beside {output}: {error.strerror}") from None
    try:
        yield work
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PPLLaVAError(f"the disk that holds {output.parent} is full; nothing was left behind") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_into_place(work: Path, output: Path, force: bool) -> None:
    work.chmod(0o755)
    if force and output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / "manifest.json").is_file()):
            raise PPLLaVAError(f"{output} is not a bundle; --force replaces only bundles")
        shutil.rmtree(output)
    work.rename(output)
