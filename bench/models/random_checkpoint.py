"""Random checkpoints in upstream's layout, of any size, written shard by shard.

    python -m ppllava_edge.bench.models.random_checkpoint FOLDER --shape vit-l-336

Weights are noise, so answers are too: they serve to measure time and memory where the real ones can't be had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of a CLIP + LLaMA checkpoint with prompt-guided pooling. adapter: depth of the temporal adapter, 0 for none."""

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
        return self.image // self.patch


TINY = Shape(84, 14, 32, 64, 4, 4, 3, 16, 24, 48, 2, 4, 20, 48, 64, 2, 4, 300, 1024)
VIT_L_336 = Shape(336, 14, 1024, 4096, 24, 16, 4, 64, 768, 3072, 12, 12, 768, 4096, 11008, 4, 32, 32000, 4096)
ONE_LAYER = replace(
    VIT_L_336, vision_layers=2, adapter=2, question_layers=1, decoder_layers=1, vocab=1024
)  # of every stage, at full width
SHAPES = {
    "tiny": TINY,
    "one-layer": ONE_LAYER,
    "vit-l-336": VIT_L_336,
    "vicuna-7b": replace(VIT_L_336, decoder_layers=32),
}


def tensor_shapes(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of such a checkpoint, in the order in which it is written."""
    tower, projector, language = "vision_tower.vision_model.", "multi_modal_projector.", "language_model."

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))

    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,)))

    def attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{name}.self_attn.{part}", width, width)

    def layer(name: str, width: int, mlp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from attention(name, width)
        yield from norm(f"{name}.layer_norm1", width)
        yield from linear(f"{name}.mlp.fc1", width, mlp)
        yield from linear(f"{name}.mlp.fc2", mlp, width)
        yield from norm(f"{name}.layer_norm2", width)

    yield "image_newline", (s.decoder,)
    yield tower + "embeddings.class_embedding", (s.vision,)
    yield tower + "embeddings.patch_embedding.weight", (s.vision, 3, s.patch, s.patch)
    yield tower + "embeddings.position_embedding.weight", (s.grid**2 + 1, s.vision)
    yield from norm(tower + "pre_layrnorm", s.vision)
    yield from norm(tower + "post_layernorm", s.vision)
    for i in range(s.vision_layers):
        yield from layer(f"{tower}encoder.layers.{i}", s.vision, s.vision_mlp)
    for i in range(s.adapter):
        yield from layer(f"{tower}btadapter_S_layers.{i}", s.vision, s.vision_mlp)
        yield from attention(f"{tower}btadapter_T_layers.{i}", s.vision)
        yield from norm(f"{tower}btadapter_T_layers.{i}.layer_norm1", s.vision)
        yield from linear(f"{tower}btadapter_T_layers.{i}.temporal_fc", s.vision, s.vision)
    if s.adapter:
        yield tower + "btadapter_cls_token", (1, 1, s.vision)
        yield tower + "btadapter_time_embed.weight", (s.max_frames, s.vision)
    text = projector + "clip_text_model."
    yield text + "embeddings.token_embedding.weight", (s.vocab, s.question)
    yield text + "embeddings.position_embedding", (248, s.question)
    yield text + "embeddings.position_embedding_res", (248, s.question)
    for i in range(s.question_layers):
        yield from layer(f"{text}encoder.layers.{i}", s.question, s.question_mlp)
    yield from norm(text + "final_layer_norm", s.question)
    yield projector + "clip_text_projection.weight", (s.projection, s.question)
    yield projector + "clip_visual_projection.weight", (s.projection, s.vision)
    yield from norm(projector + "clip_visual_ln", s.vision)
    yield projector + "logit_scale", (1,)
    yield from linear(projector + "linear_1", s.vision, s.decoder)
    yield from linear(projector + "linear_2", s.decoder, s.decoder)
    yield language + "model.embed_tokens.weight", (s.vocab, s.decoder)
    for i in range(s.decoder_layers):
        name = f"{language}model.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.self_attn.{part}.weight", (s.decoder, s.decoder)
        yield f"{name}.mlp.gate_proj.weight", (s.decoder_mlp, s.decoder)
        yield f"{name}.mlp.up_proj.weight", (s.decoder_mlp, s.decoder)
        yield f"{name}.mlp.down_proj.weight", (s.decoder, s.decoder_mlp)
        yield f"{name}.input_layernorm.weight", (s.decoder,)
        yield f"{name}.post_attention_layernorm.weight", (s.decoder,)
    yield language + "model.norm.weight", (s.decoder,)
    yield language + "lm_head.weight", (s.vocab, s.decoder)


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """float16 noise of a size that keeps activations sane: norms near 1, matrices by their fan-in."""
    if name.endswith("logit_scale"):
        return np.full(shape, np.log(100), np.float16)
    if len(shape) == 1:
        centre = (
            1.0
            if name.endswith(
                (
                    "norm.weight",
                    "norm1.weight",
                    "norm2.weight",
                    "layernorm.weight",
                    "layrnorm.weight",
                    "ln.weight",
                )
            )
            else 0.0
        )
        return (centre + 0.02 * rng.standard_normal(shape, np.float32)).astype(np.float16)
    scale = 0.02 if "embed" in name else 0.7 / np.sqrt(np.prod(shape[1:]))
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(np.float16)


def write_random_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write config.json, sharded safetensors with an index, clip/ and both tokenizers. Memory: one shard."""
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}

    def flush() -> None:
        if batch:
            save_file(batch, folder / f"model-{len(shards) + 1:05d}.safetensors")
            shards.append(list(batch))
            batch.clear()

    for name, dims in tensor_shapes(shape):
        batch[name] = random_tensor(name, dims, rng)
        if sum(a.nbytes for a in batch.values()) >= SHARD_BYTES:
            flush()
    flush()
    where = {name: f"model-{i + 1:05d}.safetensors" for i, names in enumerate(shards) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    text = {
        "hidden_size": shape.question,
        "intermediate_size": shape.question_mlp,
        "num_hidden_layers": shape.question_layers,
        "num_attention_heads": shape.question_heads,
        "vocab_size": shape.vocab,
        "eos_token_id": 257,
        "projection_dim": shape.projection,
    }
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    byte_tokenizer(["<s>", "</s>", "<image>"], "<s> $A").save(str(folder / "tokenizer.json"))
    byte_tokenizer(["<|start|>", "<|end|>"], "<|start|> $A <|end|>").save(
        str(folder / "clip" / "tokenizer.json")
    )


def byte_tokenizer(special: list[str], template: str) -> Tokenizer:
    """One token per byte, then the special ones from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    ids = [(token, tokenizer.token_to_id(token)) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def _config(s: Shape) -> dict:
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
@click.option("--shape", type=click.Choice(sorted(SHAPES)), required=True)
@click.option("--seed", type=int, default=0)
def main(folder: Path, shape: str, seed: int) -> None:
    """Write a random checkpoint."""
    write_random_checkpoint(folder, SHAPES[shape], seed)


if __name__ == "__main__":
    main()
