"""Write nano's parameters in upstream's layout, so that the ordinary exporter can read them.

python -m ppllava_edge.nano.checkpoint STATE.pt FOLDER writes the checkpoint of a training run in progress.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ppllava_edge.nano.model import Shape
from ppllava_edge.nano.vocabulary import ASK, END, PAD, SPOKEN, UNKNOWN, WORD_ID, WORDS

POSITIONS = 248  # positions of the question tower, as in Long-CLIP
VISION, PROJECTOR, LANGUAGE = "vision_tower.vision_model.", "multi_modal_projector.", "language_model."


SPELLINGS = (
    ("colour", "color"),
    (r"\ban\b", "a"),
    ("what's", "what is"),
    ("where's", "where is"),
    ("centre", "center"),
    (r"\bgrey\b", "gray"),
)


def write_checkpoint(weights: dict[str, Tensor], shape: Shape, folder: Path, guided: bool = True) -> None:
    """Write a checkpoint in upstream's layout.

    The directory gets config.json, model.safetensors (float16) and the tokenizer, and in clip/ the
    configuration and tokenizer of the question tower.

    Args:
        weights: Parameters by name.
        shape: The model's sizes.
        folder: The checkpoint's directory.
        guided: Whether the question guides the pooling.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip").mkdir(exist_ok=True)
    tensors = upstream_tensors({name: w.detach().float().numpy() for name, w in weights.items()}, shape)
    halves = {name: np.asarray(a, np.float16, order="C") for name, a in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(shape, guided), indent=1))
    (folder / "clip" / "config.json").write_text(json.dumps(_clip_config(shape), indent=1))
    _tokenizer(end=False).save(str(folder / "tokenizer.json"))
    _tokenizer(end=True).save(str(folder / "clip" / "tokenizer.json"))


def upstream_tensors(w: dict[str, np.ndarray], s: Shape) -> dict[str, np.ndarray]:
    """Nano's parameters under upstream's names.

    Fused matrices are split, and words that only pretraining used are dropped. Layers above the features are
    left out: nothing reads them.

    Args:
        w: Parameters by name, float32.
        s: The model's sizes.
    """
    renamed = _Renamed(w)
    _vision_tower(renamed, s)
    _question_tower(renamed, s)
    _decoder(renamed, s)
    return renamed.out


class _Renamed:
    """Parameters that are copied under other names, layer by layer."""

    def __init__(self, w: dict[str, np.ndarray]):
        self.w = w
        self.out: dict[str, np.ndarray] = {}

    def linear(self, target: str, name: str) -> None:
        """Weight and bias of a linear map or a norm."""
        self.out[f"{target}.weight"] = self.w[f"{name}.weight"]
        self.out[f"{target}.bias"] = self.w[f"{name}.bias"]

    def attention(self, target: str, name: str, out_name: str = "out_proj") -> None:
        """An attention, its fused query, key and value split."""
        for kind in ("weight", "bias"):
            if f"{name}.qkv.{kind}" in self.w:
                for part, block in zip("qkv", np.split(self.w[f"{name}.qkv.{kind}"], 3)):
                    self.out[f"{target}.{part}_proj.{kind}"] = block
                self.out[f"{target}.{out_name}.{kind}"] = self.w[f"{name}.out.{kind}"]

    def clip_layer(self, target: str, name: str) -> None:
        """A transformer layer of a CLIP tower."""
        self.attention(f"{target}.self_attn", f"{name}.attention")
        self.linear(f"{target}.layer_norm1", f"{name}.norm1")
        self.linear(f"{target}.layer_norm2", f"{name}.norm2")
        self.linear(f"{target}.mlp.fc1", f"{name}.up")
        self.linear(f"{target}.mlp.fc2", f"{name}.down")


def _vision_tower(renamed: _Renamed, s: Shape) -> None:
    w, out = renamed.w, renamed.out
    patches = w["patch_embedding.weight"].reshape(s.vision, 3, s.patch, s.patch)
    out[VISION + "embeddings.patch_embedding.weight"] = patches
    out[VISION + "embeddings.class_embedding"] = w["class_embedding"]
    out[VISION + "embeddings.position_embedding.weight"] = w["patch_positions"]
    renamed.linear(VISION + "pre_layrnorm", "pre_norm")  # upstream's spelling
    for i in range(s.vision_layers):
        renamed.clip_layer(f"{VISION}encoder.layers.{i}", f"trunk.{i}")
    for i in range(s.branch_layers):
        renamed.clip_layer(f"{VISION}btadapter_S_layers.{i}", f"branch_space.{i}")
        time = f"{VISION}btadapter_T_layers.{i}"
        renamed.attention(f"{time}.self_attn", f"branch_time.{i}.attention")
        renamed.linear(f"{time}.layer_norm1", f"branch_time.{i}.norm")
        renamed.linear(f"{time}.temporal_fc", f"branch_time.{i}.out")
    out[VISION + "btadapter_cls_token"] = w["branch_class"].reshape(1, 1, -1)
    out[VISION + "btadapter_time_embed.weight"] = w["frame_positions"]


def _question_tower(renamed: _Renamed, s: Shape) -> None:
    """The question tower, the similarity and the projector."""
    w, out = renamed.w, renamed.out
    text = PROJECTOR + "clip_text_model."
    out[text + "embeddings.token_embedding.weight"] = w["question_embedding.weight"][:SPOKEN]
    positions = np.zeros((POSITIONS, s.question), np.float32)
    positions[: s.question_length] = w["question_positions"]
    out[text + "embeddings.position_embedding"] = positions
    out[text + "embeddings.position_embedding_res"] = positions
    for i in range(s.question_layers):
        renamed.clip_layer(f"{text}encoder.layers.{i}", f"question_layers.{i}")
    renamed.linear(text + "final_layer_norm", "question_norm")
    out[PROJECTOR + "clip_text_projection.weight"] = w["question_projection.weight"]
    out[PROJECTOR + "clip_visual_projection.weight"] = w["similarity_projection.weight"]
    renamed.linear(PROJECTOR + "clip_visual_ln", "similarity_norm")
    out[PROJECTOR + "logit_scale"] = w["logit_scale"]
    renamed.linear(PROJECTOR + "linear_1", "linear_1")
    renamed.linear(PROJECTOR + "linear_2", "linear_2")


def _decoder(renamed: _Renamed, s: Shape) -> None:
    w, out = renamed.w, renamed.out
    out[LANGUAGE + "model.embed_tokens.weight"] = w["token_embedding.weight"][:SPOKEN]
    for i in range(s.decoder_layers):
        target, name = f"{LANGUAGE}model.layers.{i}", f"decoder.{i}"
        gate, up = np.split(w[f"{name}.gate_up.weight"], 2)
        renamed.attention(f"{target}.self_attn", f"{name}.attention", "o_proj")
        out[f"{target}.input_layernorm.weight"] = w[f"{name}.norm1.weight"]
        out[f"{target}.post_attention_layernorm.weight"] = w[f"{name}.norm2.weight"]
        out[f"{target}.mlp.gate_proj.weight"] = gate
        out[f"{target}.mlp.up_proj.weight"] = up
        out[f"{target}.mlp.down_proj.weight"] = w[f"{name}.down.weight"]
    out[LANGUAGE + "model.norm.weight"] = w["decoder_norm.weight"]
    out[LANGUAGE + "lm_head.weight"] = w["lm_head.weight"][:SPOKEN]
    out["image_newline"] = np.zeros(s.decoder, np.float32)


def _config(s: Shape, guided: bool) -> dict[str, Any]:
    return {
        "name": "nano" if guided else "nano-unguided",
        "demo": True,
        "architectures": ["LlavaInterleaveForConditionalGeneration"],
        "model_type": "llava_next",
        "pooling": "ppllava",
        "pooling_kernel": list(s.kernel),
        "pooling_stride": list(s.kernel),
        "pooling_temp": s.temperature if guided else 1e5,  # hot enough to make all window weights equal
        "image_pooling_kernel": [1, *s.kernel[1:]],
        "image_pooling_stride": [1, *s.kernel[1:]],
        "frame_shape": [s.grid, s.grid],
        "btadapter": True,
        "btadapter_depth": s.branch_layers + 1,
        "max_T": s.frames,
        "extend_clip": True,
        "clip_weight": "clip",
        "image_token_index": WORD_ID["<image>"],
        "image_grid_pinpoints": [[s.image, 2 * s.image], [2 * s.image, s.image], [2 * s.image] * 2],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "num_frames": s.frames,
        "prompt_template": {
            "system": "",
            "roles": ["", ASK],
            "separators": [" ", END],
            "image_tag": "<image> ",
        },
        "vision_config": _vision_config(s),
        "text_config": _decoder_config(s),
    }


def _vision_config(s: Shape) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": s.vision,
        "intermediate_size": 4 * s.vision,
        "num_hidden_layers": s.vision_layers + 1,  # the features are the output of the second-to-last layer
        "num_attention_heads": s.heads,
        "image_size": s.image,
        "patch_size": s.patch,
        "hidden_act": "gelu",
    }


def _decoder_config(s: Shape) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": s.decoder,
        "intermediate_size": s.decoder_mlp,
        "num_hidden_layers": s.decoder_layers,
        "num_attention_heads": s.heads,
        "vocab_size": SPOKEN,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "eos_token_id": WORD_ID[END],
    }


def _clip_config(s: Shape) -> dict[str, Any]:
    text = {
        "hidden_size": s.question,
        "intermediate_size": 4 * s.question,
        "num_hidden_layers": s.question_layers,
        "num_attention_heads": s.heads,
        "vocab_size": SPOKEN,
        "hidden_act": "gelu",
        "eos_token_id": WORD_ID[END],
        "pad_token_id": WORD_ID[PAD],
    }
    return {"model_type": "clip", "projection_dim": s.projection, "text_config": text}


def _tokenizer(end: bool) -> Tokenizer:
    """One token per lower-case word or punctuation mark; other spellings are replaced by the world's.

    Args:
        end: Whether the end token is appended.
    """
    vocabulary = {word: i for i, word in enumerate(WORDS[:SPOKEN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    replaced = (normalizers.Replace(Regex(old), new) for old, new in SPELLINGS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replaced])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.add_special_tokens([PAD, ASK, END, "<image>"])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, WORD_ID[END])]
        )
    return tokenizer


def main() -> None:
    """Write the checkpoint of the state.pt and to the folder named on the command line."""
    state = torch.load(sys.argv[1], weights_only=True, map_location="cpu")
    write_checkpoint(state["weights"], Shape(), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
