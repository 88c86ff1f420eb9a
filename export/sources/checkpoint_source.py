"""A checkpoint in upstream's layout as the source of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.prompt_template import IMAGE, TEMPLATES, PromptTemplate
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.reader import read_model
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import Precision
from ppllava_edge.export.sources.locate import locate, locate_checkpoint, read_json
from ppllava_edge.export.sources.manifest import TokenIds, build_manifest
from ppllava_edge.export.sources.stage_graphs import check_tensors, embedding_size, embeddings, stage_graphs
from ppllava_edge.export.sources.tensors import Checkpoint
from ppllava_edge.export.sources.tokenizers import find_tokenizer, language_tokenizer, question_tokenizer

END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>")

_CLIP_FILES = (
    "config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
)


class CheckpointSource:
    """A checkpoint directory or hub repository."""

    def __init__(self, options: Options):
        """Read the configuration and check all tensors by name and shape.

        Raises:
            PPLLaVAError: There is no such checkpoint, it is not supported, or tensors are missing, unexpected
                or wrongly shaped.
        """
        self.options = options
        folder = locate_checkpoint(options.checkpoint, options.subfolder)
        self.config = read_json(folder / "config.json")
        pooling = options.overrides.pooling or self.config.get("pooling", "avp")
        self.clip = _clip_folder(folder, self.config, options) if pooling == "ppllava" else None
        clip_config = read_json(self.clip / "config.json") if self.clip else None
        self.model = read_model(self.config, clip_config, options.overrides)
        self.template = _read_template(self.model.template)
        self.checkpoint = Checkpoint(folder)
        self.tokens: TokenIds | None = None
        check_tensors(self.checkpoint, self.model, options.precision)

    def graphs(self, precision: Precision) -> dict[str, Callable[[], Graph]]:
        """Return a function per stage that builds its graph; see Source."""
        return stage_graphs(self.checkpoint, self.model, precision)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the token embeddings (V, D) and image_newline (D)."""
        return embeddings(self.checkpoint, self.model)

    def write_tokenizers(self, folder: Path) -> None:
        """Write the tokenizers into a bundle's folder."""
        if not self.options.tokenizer:
            return
        checkpoint, options = self.checkpoint.folder, self.options
        found = find_tokenizer([checkpoint], options.base, "--base", "decoder")
        language = language_tokenizer(found, self.model.image_token, self.model.decoder.vocab)
        language.save(str(folder / "tokenizer.json"))
        if self.clip is not None:
            found = find_tokenizer([self.clip, checkpoint], options.clip, "--clip", "question tower")
            question_tokenizer(found).save(str(folder / "question_tokenizer.json"))
        ids = [language.token_to_id(text) for text in (self.template.separators[1].strip(), *END_TOKENS)]
        stop_ids = frozenset(i for i in ids if i is not None)
        image_token = language.token_to_id(IMAGE)
        assert image_token is not None, "language_tokenizer adds it"
        self.tokens = TokenIds(image_token, stop_ids)

    def manifest(self, precision: Precision, hash_weights: bool = True) -> Manifest:
        """Return the bundle's manifest; see Source."""
        return build_manifest(
            self.model,
            self.options,
            precision,
            self.template,
            self.tokens,
            self.config,
            self.checkpoint.folder,
            embedding_size(self.checkpoint, self.model),
            self.checkpoint.hash() if hash_weights else "",
        )

    def close(self) -> None:
        """Release open files."""
        self.checkpoint.close()


def _clip_folder(folder: Path, config: dict[str, Any], options: Options) -> Path:
    """The directory of the question tower's checkpoint, which holds its configuration and tokenizer."""
    if options.clip:
        return locate(options.clip, patterns=_CLIP_FILES)
    name = config.get("clip_weight")
    if not isinstance(name, str) or not name or name != printable(name):
        raise PPLLaVAError(
            f"{folder / 'config.json'} has no usable clip_weight; "
            "name the question tower's directory with --clip"
        )
    inside = folder / name
    if inside.is_dir() and folder.resolve() in inside.resolve().parents:
        return inside
    try:
        return locate(name, patterns=_CLIP_FILES)
    except PPLLaVAError as error:
        raise PPLLaVAError(
            f"the question tower's configuration is not there ({error}); name its directory with --clip"
        ) from None


def _read_template(template: str | dict[str, Any]) -> PromptTemplate:
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise PPLLaVAError(f"prompt template {template!r} is unknown; choose {', '.join(TEMPLATES)}")
        return TEMPLATES[template]
    try:
        return PromptTemplate.from_json(template)
    except (KeyError, TypeError, ValueError) as error:
        raise PPLLaVAError(f"the prompt template in config.json can't be used: {error}") from None
