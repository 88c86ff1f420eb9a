"""Nano's parameters in upstream's layout, so that the ordinary exporter makes its bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ppllava_edge.nano.model import Shape
from ppllava_edge.nano.vocabulary import ASK, END, PAD, SPOKEN, UNKNOWN, WORD_ID, WORDS

POSITIONS = 248


def write_checkpoint(weights: dict[str, Tensor], shape: Shape, folder: Path, guided: bool = True) -> None:
    """Write config.json, model.safetensors (fp16), the tokenizer, and clip/ with the question tower's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip").mkdir(exist_ok=True)
    tensors = upstream_tensors({name: w.detach().float().numpy() for name, w in weights.items()}, shape)
    save_file(
        {name: np.asarray(a, np.float16, order="C") for name, a in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(_config(shape, guided), indent=1))
    (folder / "clip" / "config.json").write_text(json.dumps(_clip_config(shape), indent=1))
    _tokenizer(end=False).save(str(folder / "tokenizer.json"))
    _tokenizer(end=True).save(str(folder / "clip" / "tokenizer.json"))


def upstream_tensors(w: dict[str, np.ndarray], s: Shape) -> dict[str, np.ndarray]:
    """Rename and split: fused matrices come apart, words that only pretraining used are dropped, and the layers above the features,
    which nothing reads, are not there."""
    out: dict[str, np.ndarray] = {}
    vision, projector, language = "vision_tower.vision_model.", "multi_modal_projector.", "language_model."

    def norm(target: str, name: str) -> None:
        out[f"{target}.weight"], out[f"{target}.bias"] = w[f"{name}.weight"], w[f"{name}.bias"]

    def attention(target: str, name: str, out_name: str = "out_proj") -> None:
        for kind in ("weight", "bias"):
            if f"{name}.qkv.{kind}" in w:
                for part, block in zip("qkv", np.split(w[f"{name}.qkv.{kind}"], 3)):
                    out[f"{target}.{part}_proj.{kind}"] = block
                out[f"{target}.{out_name}.{kind}"] = w[f"{name}.out.{kind}"]

    def clip_layer(target: str, name: str) -> None:
        attention(f"{target}.self_attn", f"{name}.attention")
        norm(f"{target}.layer_norm1", f"{name}.norm1")
        norm(f"{target}.layer_norm2", f"{name}.norm2")
        norm(f"{target}.mlp.fc1", f"{name}.up")
        norm(f"{target}.mlp.fc2", f"{name}.down")

    patches = w["patch_embedding.weight"].reshape(s.vision, 3, s.patch, s.patch)
    out[vision + "embeddings.patch_embedding.weight"] = patches
    out[vision + "embeddings.class_embedding"] = w["class_embedding"]
    out[vision + "embeddings.position_embedding.weight"] = w["patch_positions"]
    norm(vision + "pre_layrnorm", "pre_norm")
    for i in range(s.vision_layers):
        clip_layer(f"{vision}encoder.layers.{i}", f"trunk.{i}")
    for i in range(s.branch_layers):
        clip_layer(f"{vision}btadapter_S_layers.{i}", f"branch_space.{i}")
        time = f"{vision}btadapter_T_layers.{i}"
        attention(f"{time}.self_attn", f"branch_time.{i}.attention")
        norm(f"{time}.layer_norm1", f"branch_time.{i}.norm")
        norm(f"{time}.temporal_fc", f"branch_time.{i}.out")
    out[vision + "btadapter_cls_token"] = w["branch_class"].reshape(1, 1, -1)
    out[vision + "btadapter_time_embed.weight"] = w["frame_positions"]

    text = projector + "clip_text_model."
    out[text + "embeddings.token_embedding.weight"] = w["question_embedding.weight"][:SPOKEN]
    positions = np.zeros((POSITIONS, s.question), np.float32)
    positions[: s.question_length] = w["question_positions"]
    out[text + "embeddings.position_embedding"] = out[text + "embeddings.position_embedding_res"] = positions
    for i in range(s.question_layers):
        clip_layer(f"{text}encoder.layers.{i}", f"question_layers.{i}")
    norm(text + "final_layer_norm", "question_norm")
    out[projector + "clip_text_projection.weight"] = w["question_projection.weight"]
    out[projector + "clip_visual_projection.weight"] = w["similarity_projection.weight"]
    norm(projector + "clip_visual_ln", "similarity_norm")
    out[projector + "logit_scale"] = w["logit_scale"]
    norm(projector + "linear_1", "linear_1")
    norm(projector + "linear_2", "linear_2")

    out[language + "model.embed_tokens.weight"] = w["token_embedding.weight"][:SPOKEN]
    for i in range(s.decoder_layers):
        target, name = f"{language}model.layers.{i}", f"decoder.{i}"
        attention(f"{target}.self_attn", f"{name}.attention", "o_proj")
        out[f"{target}.input_layernorm.weight"] = w[f"{name}.norm1.weight"]
        out[f"{target}.post_attention_layernorm.weight"] = w[f"{name}.norm2.weight"]
        out[f"{target}.mlp.gate_proj.weight"], out[f"{target}.mlp.up_proj.weight"] = np.split(
            w[f"{name}.gate_up.weight"], 2
        )
        out[f"{target}.mlp.down_proj.weight"] = w[f"{name}.down.weight"]
    out[language + "model.norm.weight"] = w["decoder_norm.weight"]
    out[language + "lm_head.weight"] = w["lm_head.weight"][:SPOKEN]
    out["image_newline"] = np.zeros(s.decoder, np.float32)
    return out


def _config(s: Shape, guided: bool) -> dict:
    return {
        "name": "nano" if guided else "nano-unguided",
        "demo": True,
        "architectures": ["LlavaInterleaveForConditionalGeneration"],
        "model_type": "llava_next",
        "pooling": "ppllava",
        "pooling_kernel": list(s.kernel),
        "pooling_stride": list(s.kernel),
        "pooling_temp": s.temperature if guided else 1e5,  # so hot that all window weights are equal
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
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": s.vision,
            "intermediate_size": 4 * s.vision,
            "num_hidden_layers": s.vision_layers + 1,
            "num_attention_heads": s.heads,
            "image_size": s.image,
            "patch_size": s.patch,
            "hidden_act": "gelu",
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": s.decoder,
            "intermediate_size": s.decoder_mlp,
            "num_hidden_layers": s.decoder_layers,
            "num_attention_heads": s.heads,
            "vocab_size": SPOKEN,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "eos_token_id": WORD_ID[END],
        },
    }


def _clip_config(s: Shape) -> dict:
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
    """One token per word, lower case, punctuation apart; a few spellings are brought to the world's own. end: append the end token."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS[:SPOKEN])}, unk_token=UNKNOWN)
    )
    spellings = [
        ("colour", "color"),
        (r"\ban\b", "a"),
        ("what's", "what is"),
        ("where's", "where is"),
        ("centre", "center"),
        (r"\bgrey\b", "gray"),
    ]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(Regex(old), new) for old, new in spellings)]
    )
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
    """python -m ppllava_edge.nano.checkpoint STATE.pt FOLDER: the checkpoint of a training run that is under way."""
    import sys

    state = torch.load(sys.argv[1], weights_only=True, map_location="cpu")
    write_checkpoint(state["weights"], Shape(), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
