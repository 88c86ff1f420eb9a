"""Random checkpoints in upstream's layout, of any size, written shard by shard.

    python -m ppllava_edge.bench.models.random_checkpoint FOLDER --shape vit-l-336

Weights are noise, and so are answers. Use them to measure time and memory where the real weights aren't
available.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SHARD_BYTES = 1 << 30
QUESTION_POSITIONS = 248  # LongCLIP's
TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
QUESTION = "multi_modal_projector.clip_text_model."
LANGUAGE = "language_model."
NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "layrnorm.weight", "ln.weight")
Tensors = Iterator[tuple[str, tuple[int, ...]]]  # names and shapes


@dataclass(frozen=True)
class Shape:
    """Sizes of a CLIP + LLaMA checkpoint with prompt-guided pooling.

    Attributes:
        image, patch: Pixels a side.
        vision, vision_mlp, vision_layers, vision_heads: Widths, layers and heads of the vision tower.
        adapter: Layers of the temporal adapter; 0: none.
        max_frames: Maximum frames of the adapter.
        question, question_mlp, question_layers, question_heads: The same for the question tower.
        projection: Size of the space in which patches and question are compared.
        decoder, decoder_mlp, decoder_layers, decoder_heads: The same for the language model.
        vocab, context: Vocabulary size and longest sequence, tokens.
        kernel: Windows of pooling (frames, rows, columns); the stride is the same.
    """

    image: int
    patch: int
    vision: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    adapter: int
    max_frames: int
    question: int
    question_mlp: int
    question_layers: int
    question_heads: int
    projection: int
    decoder: int
    decoder_mlp: int
    decoder_layers: int
    decoder_heads: int
    vocab: int
    context: int
    kernel: tuple[int, int, int] = (2, 3, 3)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image // self.patch


TINY = Shape(84, 14, 32, 64, 4, 4, 3, 16, 24, 48, 2, 4, 20, 48, 64, 2, 4, 300, 1024)
VIT_L_336 = Shape(336, 14, 1024, 4096, 24, 16, 4, 64, 768, 3072, 12, 12, 768, 4096, 11008, 4, 32, 32000, 4096)
ONE_LAYER = replace(  # one layer of every stage, at full width
    VIT_L_336, vision_layers=2, adapter=2, question_layers=1, decoder_layers=1, vocab=1024
)
SHAPES = {
    "tiny": TINY,
    "one-layer": ONE_LAYER,
    "vit-l-336": VIT_L_336,
    "vicuna-7b": replace(VIT_L_336, decoder_layers=32),
}


def tensor_shapes(s: Shape) -> Tensors:
    """Every tensor of such a checkpoint, in the order in which it is written."""
    yield "image_newline", (s.decoder,)
    yield from _vision_tensors(s)
    yield from _projector_tensors(s)
    yield from _language_tensors(s)


def _vision_tensors(s: Shape) -> Tensors:
    yield TOWER + "embeddings.class_embedding", (s.vision,)
    yield TOWER + "embeddings.patch_embedding.weight", (s.vision, 3, s.patch, s.patch)
    yield TOWER + "embeddings.position_embedding.weight", (s.grid**2 + 1, s.vision)
    yield from _norm(TOWER + "pre_layrnorm", s.vision)
    yield from _norm(TOWER + "post_layernorm", s.vision)
    for i in range(s.vision_layers):
        yield from _clip_layer(f"{TOWER}encoder.layers.{i}", s.vision, s.vision_mlp)
    for i in range(s.adapter):
        spatial, temporal = f"{TOWER}btadapter_S_layers.{i}", f"{TOWER}btadapter_T_layers.{i}"
        yield from _clip_layer(spatial, s.vision, s.vision_mlp)
        yield from _attention(temporal, s.vision)
        yield from _norm(f"{temporal}.layer_norm1", s.vision)
        yield from _linear(f"{temporal}.temporal_fc", s.vision, s.vision)
    if s.adapter:
        yield TOWER + "btadapter_cls_token", (1, 1, s.vision)
        yield TOWER + "btadapter_time_embed.weight", (s.max_frames, s.vision)


def _projector_tensors(s: Shape) -> Tensors:
    yield QUESTION + "embeddings.token_embedding.weight", (s.vocab, s.question)
    yield QUESTION + "embeddings.position_embedding", (QUESTION_POSITIONS, s.question)
    yield QUESTION + "embeddings.position_embedding_res", (QUESTION_POSITIONS, s.question)
    for i in range(s.question_layers):
        yield from _clip_layer(f"{QUESTION}encoder.layers.{i}", s.question, s.question_mlp)
    yield from _norm(QUESTION + "final_layer_norm", s.question)
    yield PROJECTOR + "clip_text_projection.weight", (s.projection, s.question)
    yield PROJECTOR + "clip_visual_projection.weight", (s.projection, s.vision)
    yield from _norm(PROJECTOR + "clip_visual_ln", s.vision)
    yield PROJECTOR + "logit_scale", (1,)
    yield from _linear(PROJECTOR + "linear_1", s.vision, s.decoder)
    yield from _linear(PROJECTOR + "linear_2", s.decoder, s.decoder)


def _language_tensors(s: Shape) -> Tensors:
    yield LANGUAGE + "model.embed_tokens.weight", (s.vocab, s.decoder)
    for i in range(s.decoder_layers):
        name = f"{LANGUAGE}model.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.self_attn.{part}.weight", (s.decoder, s.decoder)
        yield f"{name}.mlp.gate_proj.weight", (s.decoder_mlp, s.decoder)
        yield f"{name}.mlp.up_proj.weight", (s.decoder_mlp, s.decoder)
        yield f"{name}.mlp.down_proj.weight", (s.decoder, s.decoder_mlp)
        yield f"{name}.input_layernorm.weight", (s.decoder,)
        yield f"{name}.post_attention_layernorm.weight", (s.decoder,)
    yield LANGUAGE + "model.norm.weight", (s.decoder,)
    yield LANGUAGE + "lm_head.weight", (s.vocab, s.decoder)


def _clip_layer(name: str, width: int, mlp: int) -> Tensors:
    yield from _attention(name, width)
    yield from _norm(f"{name}.layer_norm1", width)
    yield from _linear(f"{name}.mlp.fc1", width, mlp)
    yield from _linear(f"{name}.mlp.fc2", mlp, width)
    yield from _norm(f"{name}.layer_norm2", width)


def _attention(name: str, width: int) -> Tensors:
    for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _linear(f"{name}.self_attn.{part}", width, width)


def _linear(name: str, inputs: int, outputs: int) -> Tensors:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """float16 noise of a size that keeps activations in range: norms near 1, matrices by their fan-in."""
    if name.endswith("logit_scale"):
        return np.full(shape, np.log(100), np.float16)
    if len(shape) == 1:
        mean = 1.0 if name.endswith(NORMS) else 0.0
        return (mean + 0.02 * rng.standard_normal(shape, np.float32)).astype(np.float16)
    scale = 0.02 if "embed" in name else 0.7 / np.sqrt(np.prod(shape[1:]))
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(np.float16)


def write_random_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write config.json, sharded safetensors with an index, clip/ and both tokenizers.

    Needs memory for one shard.

    Args:
        folder: The directory, created if missing.
        shape: Sizes of the model.
        seed: Seed of the weights.
    """
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    index = _write_shards(folder, shape, np.random.default_rng(seed))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    (folder / "clip" / "config.json").write_text(json.dumps(_question_config(shape)))
    language_tokenizer = byte_tokenizer(["<s>", "</s>", "<image>"], "<s> $A")
    language_tokenizer.save(str(folder / "tokenizer.json"))
    question_tokenizer = byte_tokenizer(["<|start|>", "<|end|>"], "<|start|> $A <|end|>")
    question_tokenizer.save(str(folder / "clip" / "tokenizer.json"))


def _write_shards(folder: Path, shape: Shape, rng: np.random.Generator) -> dict[str, str]:
    """Write all tensors. Returns tensor → file."""
    index: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        if shard:
            count += 1
            file = f"model-{count:05d}.safetensors"
            save_file(shard, folder / file)
            index.update(dict.fromkeys(shard, file))
            shard.clear()

    for name, dims in tensor_shapes(shape):
        shard[name] = random_tensor(name, dims, rng)
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    return index


def byte_tokenizer(special: list[str], template: str) -> Tokenizer:
    """A tokenizer with one token per byte, and special tokens from 256 on.

    Args:
        special: Special tokens.
        template: Special tokens around the text "$A".
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    ids = [(token, tokenizer.token_to_id(token)) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def _question_config(s: Shape) -> dict[str, Any]:
    text = {
        "hidden_size": s.question,
        "intermediate_size": s.question_mlp,
        "num_hidden_layers": s.question_layers,
        "num_attention_heads": s.question_heads,
        "vocab_size": s.vocab,
        "eos_token_id": 257,
        "projection_dim": s.projection,
    }
    return {"model_type": "clip", "text_config": text}


def _config(s: Shape) -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "pooling": "ppllava",
        "pooling_kernel": list(s.kernel),
        "pooling_stride": list(s.kernel),
        "pooling_temp": 0.01,
        "image_pooling_kernel": [1, *s.kernel[1:]],
        "image_pooling_stride": [1, *s.kernel[1:]],
        "frame_shape": [s.grid, s.grid],
        "btadapter": s.adapter > 0,
        "btadapter_depth": s.adapter,
        "max_T": s.max_frames,
        "extend_clip": True,
        "clip_weight": "clip",
        "image_token_index": 258,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": [[s.image, 2 * s.image], [2 * s.image, s.image], [2 * s.image, 2 * s.image]],
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": s.vision,
            "intermediate_size": s.vision_mlp,
            "image_size": s.image,
            "num_hidden_layers": s.vision_layers,
            "num_attention_heads": s.vision_heads,
            "patch_size": s.patch,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": s.decoder,
            "intermediate_size": s.decoder_mlp,
            "num_hidden_layers": s.decoder_layers,
            "num_attention_heads": s.decoder_heads,
            "vocab_size": s.vocab,
            "max_position_embeddings": s.context,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 257,
        },
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), required=True, help="Size of the model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
def main(folder: Path, shape: str, seed: int) -> None:
    """Write a random checkpoint to FOLDER."""
    write_random_checkpoint(folder, SHAPES[shape], seed)


if __name__ == "__main__":
    main()
