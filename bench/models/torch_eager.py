"""The original algorithm in torch, eager and float32: what the runtime is measured against, and an independent check of it.

Written from upstream's order of operations: every layer is computed, linear_2 stands before the pooling, windows are unfolded and
multiplied, and prefill returns the logits of all positions. CLIP + LLaMA, with or without the temporal adapter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor


class TorchModel:
    """A checkpoint in memory. prefix: load only tensors whose names begin so."""

    def __init__(
        self, folder: Path, prefix: str = "", dtype: torch.dtype = torch.float32, device: str = "cpu"
    ):
        self.config = json.loads((folder / "config.json").read_text())
        self.question_config = json.loads((folder / self.config["clip_weight"] / "config.json").read_text())[
            "text_config"
        ]
        self.w: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(prefix):
                        self.w[name] = reader.get_tensor(name).to(device, dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.w[f"{name}.bias"], 1e-5)

    def attention(self, x: Tensor, name: str, heads: int, causal: bool = False) -> Tensor:
        q, k, v = (
            self.linear(x, f"{name}.{p}_proj").unflatten(-1, (heads, -1)).transpose(-2, -3) for p in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.linear(y.transpose(-2, -3).flatten(-2), f"{name}.out_proj")

    def mlp(self, x: Tensor, name: str, act: str) -> Tensor:
        h = self.linear(x, f"{name}.fc1")
        return self.linear(F.gelu(h) if act == "gelu" else h * torch.sigmoid(1.702 * h), f"{name}.fc2")

    def layer(self, x: Tensor, name: str, heads: int, act: str, causal: bool = False) -> Tensor:
        x = x + self.attention(self.norm(x, f"{name}.layer_norm1"), f"{name}.self_attn", heads, causal)
        return x + self.mlp(self.norm(x, f"{name}.layer_norm2"), f"{name}.mlp", act)

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """pixels (T,3,H,W) → (T,P+1,C), class token first."""
        tower = "vision_tower.vision_model."
        patch = self.config["vision_config"]["patch_size"]
        x = (
            F.conv2d(pixels, self.w[tower + "embeddings.patch_embedding.weight"], stride=patch)
            .flatten(2)
            .transpose(1, 2)
        )
        token = self.w[tower + "embeddings.class_embedding"].expand(len(x), 1, -1)
        return self.norm(
            torch.cat([token, x], 1) + self.w[tower + "embeddings.position_embedding.weight"],
            tower + "pre_layrnorm",
        )

    def trunk(self, pixels: Tensor) -> Tensor:
        """pixels (T,3,H,W) → the state that enters the last layer, (T,P+1,C): what our trunk computes."""
        v, x = self.config["vision_config"], self.embed_patches(pixels)
        for i in range(v["num_hidden_layers"] - 1):
            x = self.layer(
                x,
                f"vision_tower.vision_model.encoder.layers.{i}",
                v["num_attention_heads"],
                v.get("hidden_act", "quick_gelu"),
            )
        return x

    def features(self, pixels: Tensor) -> Tensor:
        """pixels (T,3,H,W) → (T,P,C)."""
        v, tower = self.config["vision_config"], "vision_tower.vision_model."
        act, heads, layers = (
            v.get("hidden_act", "quick_gelu"),
            v["num_attention_heads"],
            v["num_hidden_layers"],
        )
        x, positions = self.embed_patches(pixels), self.w[tower + "embeddings.position_embedding.weight"]
        depth = self.config["btadapter_depth"] if self.config.get("btadapter") else 0
        states: list[Tensor | None] = []
        patches: Tensor | None = None
        cls: Tensor | None = None
        for i in range(layers):
            if i == layers - 1:
                states = [x, patches]
            if f"{tower}encoder.layers.{i}.mlp.fc1.weight" not in self.w:
                break  # a checkpoint without the layer that nothing reads
            x = self.layer(x, f"{tower}encoder.layers.{i}", heads, act)
            pair = i - (layers - depth)
            if depth and pair >= 0 and f"{tower}btadapter_S_layers.{pair}.mlp.fc1.weight" in self.w:
                patches, cls = self._branch(x, patches, cls, pair, positions, heads, act)
        trunk, patches = states
        assert trunk is not None
        return (trunk[:, 1:] + patches) / 2 if patches is not None else trunk[:, 1:]

    def _branch(
        self,
        x: Tensor,
        patches: Tensor | None,
        cls: Tensor | None,
        pair: int,
        positions: Tensor,
        heads: int,
        act: str,
    ):
        tower = "vision_tower.vision_model."
        frames, mean = len(x), x[:, 0].mean(0)
        if patches is None:
            times = self.w[tower + "btadapter_time_embed.weight"][:frames, None]
            patches = x[:, 1:] + positions[1:] + times
            cls = (mean + self.w[tower + "btadapter_cls_token"][0, 0] + positions[0]) / 2
        else:
            assert cls is not None
            patches, cls = x[:, 1:] + patches, mean + cls
        t, s = f"{tower}btadapter_T_layers.{pair}", f"{tower}btadapter_S_layers.{pair}"
        along = self.attention(
            self.norm(patches.transpose(0, 1), f"{t}.layer_norm1"), f"{t}.self_attn", heads
        )
        patches = patches + self.linear(along, f"{t}.temporal_fc").transpose(0, 1)
        y = self.attention(
            self.norm(torch.cat([cls.expand(frames, 1, -1), patches], 1), f"{s}.layer_norm1"),
            f"{s}.self_attn",
            heads,
        )
        patches, cls = patches + y[:, 1:], cls + y[:, 0].mean(0)
        patches = patches + self.mlp(self.norm(patches, f"{s}.layer_norm2"), f"{s}.mlp", act)
        return patches, cls + self.mlp(self.norm(cls, f"{s}.layer_norm2"), f"{s}.mlp", act)

    def question(self, ids: Tensor) -> Tensor:
        """ids (1,L), the end token last → (1,E)."""
        text, c = "multi_modal_projector.clip_text_model.", self.question_config
        first, rest = (
            self.w[text + "embeddings.position_embedding"],
            self.w[text + "embeddings.position_embedding_res"],
        )
        x = (
            self.w[text + "embeddings.token_embedding.weight"][ids]
            + torch.cat([first[:20], rest[20:]])[: ids.shape[1]]
        )
        for i in range(c["num_hidden_layers"]):
            x = self.layer(
                x,
                f"{text}encoder.layers.{i}",
                c["num_attention_heads"],
                c.get("hidden_act", "quick_gelu"),
                causal=True,
            )
        return self.linear(
            self.norm(x, text + "final_layer_norm")[:, -1], "multi_modal_projector.clip_text_projection"
        )

    def visual_tokens(self, features: Tensor, q: Tensor) -> Tensor:
        """features (T,P,C), q (1,E) → (N,D), by upstream's own steps."""
        p, (rows, columns) = "multi_modal_projector.", self.config["frame_shape"]
        frames = len(features)
        e = F.normalize(
            self.linear(self.norm(features, p + "clip_visual_ln"), p + "clip_visual_projection"), dim=-1
        )
        logits = (e.flatten(0, 1) @ F.normalize(q, dim=-1)[0]) * self.w[p + "logit_scale"].exp()
        weights = torch.softmax(logits, -1).view(frames, rows, columns)
        h = self.linear(F.gelu(self.linear(features, p + "linear_1")), p + "linear_2")
        kernel, stride, temperature = (
            self.config[f"pooling_{what}"] for what in ("kernel", "stride", "temp")
        )
        return pool_windows(h.view(frames, rows, columns, -1), weights, kernel, stride, temperature)

    def embed(self, ids: Tensor) -> Tensor:
        return self.w["language_model.model.embed_tokens.weight"][ids]

    def decode(
        self, x: Tensor, cache: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x (1,s,D) after the cache → logits of all positions (1,s,V), the longer cache."""
        c = self.config["text_config"]
        heads, past = c["num_attention_heads"], cache[0][0].shape[2] if cache else 0
        size = c["hidden_size"] // heads
        positions = torch.arange(past, past + x.shape[1], device=x.device).float()
        angles = torch.outer(positions, 10000 ** (-torch.arange(0, size, 2, device=x.device) / size)).repeat(
            1, 2
        )
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        grown = []
        for i in range(c["num_hidden_layers"]):
            name = f"language_model.model.layers.{i}"
            y = self._rms(x, f"{name}.input_layernorm", c["rms_norm_eps"])
            q, k, v = (
                self.linear(y, f"{name}.self_attn.{p}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
                for p in "qkv"
            )
            q, k = (
                z * cos + torch.cat([-z[..., size // 2 :], z[..., : size // 2]], -1) * sin for z in (q, k)
            )
            if cache:
                k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
            grown.append((k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0 and x.shape[1] > 1)
            x = x + self.linear(y.transpose(1, 2).flatten(2), f"{name}.self_attn.o_proj")
            y = self._rms(x, f"{name}.post_attention_layernorm", c["rms_norm_eps"])
            x = x + self.linear(
                F.silu(self.linear(y, f"{name}.mlp.gate_proj")) * self.linear(y, f"{name}.mlp.up_proj"),
                f"{name}.mlp.down_proj",
            )
        return self.linear(
            self._rms(x, "language_model.model.norm", c["rms_norm_eps"]), "language_model.lm_head"
        ), grown

    def _rms(self, x: Tensor, name: str, epsilon: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.w[f"{name}.weight"], epsilon)


def pool_windows(
    hidden: Tensor, weights: Tensor, kernel: Sequence[int], stride: Sequence[int], temperature: float
) -> Tensor:
    """hidden (T,H,W,D), weights (T,H,W) → (N,D), by upstream's own steps: unfold, multiply, sum."""
    (kt, kh, kw), (st, sh, sw) = kernel, stride
    u = hidden[None].permute(0, 4, 1, 2, 3).unfold(2, kt, st).unfold(3, kh, sh).unfold(4, kw, sw).flatten(5)
    w = weights[None].unfold(1, kt, st).unfold(2, kh, sh).unfold(3, kw, sw).flatten(4)
    return (u * torch.softmax(w / temperature, -1).unsqueeze(1)).sum(-1).flatten(2)[0].T


@torch.no_grad()
def answer(
    model: TorchModel, pixels: Tensor, question_ids: Tensor, before: Tensor, after: Tensor, new_tokens: int
) -> tuple[list[int], dict[str, float]]:
    """Greedy token ids, and seconds per stage under the runtime's names."""
    timings, at = {}, time.perf_counter()

    def record_elapsed(name: str) -> None:
        nonlocal at
        if pixels.is_cuda:
            torch.cuda.synchronize()
        timings[name], at = time.perf_counter() - at, time.perf_counter()

    features = model.features(pixels)
    record_elapsed("vision")
    q = model.question(question_ids)
    record_elapsed("question")
    visual = model.visual_tokens(features, q)
    record_elapsed("pooling")
    logits, cache = model.decode(torch.cat([model.embed(before), visual, model.embed(after)])[None], None)
    record_elapsed("prefill")
    ids = [int(logits[0, -1].argmax())]
    while len(ids) < new_tokens:
        logits, cache = model.decode(model.embed(torch.tensor([ids[-1:]], device=pixels.device)), cache)
        ids.append(int(logits[0, -1].argmax()))
    record_elapsed("generate")
    return ids, timings
