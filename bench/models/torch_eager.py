"""The original algorithm in torch, eager: a baseline for benchmarks, and an independent check of the runtime.

Written from upstream's order of operations: every layer is computed, linear_2 comes before the pooling,
windows are unfolded and multiplied, and prefill returns the logits of all positions. CLIP + LLaMA, with or
without the temporal adapter.

Shapes: T frames, P patches, C vision features, L question tokens, E question embedding, N visual tokens, S
prompt positions, D hidden size, V vocabulary.
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

TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
QUESTION = "multi_modal_projector.clip_text_model."
LANGUAGE = "language_model."
KEPT_POSITIONS = 20  # of the question tower's table that was trained; the stretched one follows
ROPE_BASE = 10000
Cache = list[tuple[Tensor, Tensor]]  # keys and values (1, heads, positions, size) of every layer


class TorchModel:
    """A checkpoint in memory.

    Args:
        folder: The checkpoint.
        prefix: Load only tensors whose names begin with it.
        dtype: Type of all weights.
        device: Device of the weights.

    Attributes:
        config: config.json.
        question_config: Text part of the question tower's config.json.
        w: Name → tensor.
    """

    def __init__(
        self, folder: Path, prefix: str = "", dtype: torch.dtype = torch.float32, device: str = "cpu"
    ):
        self.config = json.loads((folder / "config.json").read_text())
        question_folder = folder / self.config["clip_weight"]
        self.question_config = json.loads((question_folder / "config.json").read_text())["text_config"]
        self.w: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(prefix):
                        self.w[name] = reader.get_tensor(name).to(device, dtype)

    # -- layers of CLIP --------------------------------------------------------------------------------------

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer, with bias if the checkpoint has one."""
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """A layer norm."""
        weight = self.w[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.w[f"{name}.bias"], 1e-5)

    def attention(self, x: Tensor, name: str, heads: int, causal: bool = False) -> Tensor:
        """Self-attention."""
        q, k, v = (self._heads(x, f"{name}.{part}_proj", heads) for part in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.linear(y.transpose(-2, -3).flatten(-2), f"{name}.out_proj")

    def _heads(self, x: Tensor, name: str, heads: int) -> Tensor:
        """Project (…, S, C) → (…, heads, S, C / heads)."""
        return self.linear(x, name).unflatten(-1, (heads, -1)).transpose(-2, -3)

    def mlp(self, x: Tensor, name: str, act: str) -> Tensor:
        """fc1, GELU or quick GELU, fc2."""
        hidden = self.linear(x, f"{name}.fc1")
        activated = F.gelu(hidden) if act == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
        return self.linear(activated, f"{name}.fc2")

    def layer(self, x: Tensor, name: str, heads: int, act: str, causal: bool = False) -> Tensor:
        """A pre-norm transformer layer."""
        x = x + self.attention(self.norm(x, f"{name}.layer_norm1"), f"{name}.self_attn", heads, causal)
        return x + self.mlp(self.norm(x, f"{name}.layer_norm2"), f"{name}.mlp", act)

    # -- vision ----------------------------------------------------------------------------------------------

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Pixels (T, 3, H, W) → (T, P+1, C), class token first."""
        kernel = self.w[TOWER + "embeddings.patch_embedding.weight"]
        patches = F.conv2d(pixels, kernel, stride=self.config["vision_config"]["patch_size"])
        x = patches.flatten(2).transpose(1, 2)
        token = self.w[TOWER + "embeddings.class_embedding"].expand(len(x), 1, -1)
        positions = self.w[TOWER + "embeddings.position_embedding.weight"]
        return self.norm(torch.cat([token, x], 1) + positions, TOWER + "pre_layrnorm")

    def trunk(self, pixels: Tensor) -> Tensor:
        """Pixels (T, 3, H, W) → the state that enters the last layer (T, P+1, C), as the runtime's trunk."""
        x = self.embed_patches(pixels)
        for i in range(self.config["vision_config"]["num_hidden_layers"] - 1):
            x = self._vision_layer(x, i)
        return x

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (T, 3, H, W) → features (T, P, C), with the temporal adapter where there is one."""
        layers = self.config["vision_config"]["num_hidden_layers"]
        depth = self.config["btadapter_depth"] if self.config.get("btadapter") else 0
        x = self.embed_patches(pixels)
        before_last: tuple[Tensor, Tensor | None] = (x, None)
        patches: Tensor | None = None
        cls: Tensor | None = None
        for i in range(layers):
            if i == layers - 1:
                before_last = (x, patches)
            if f"{TOWER}encoder.layers.{i}.mlp.fc1.weight" not in self.w:
                break  # a checkpoint without its last layer, whose output nothing reads
            x = self._vision_layer(x, i)
            pair = i - (layers - depth)
            if depth and pair >= 0 and f"{TOWER}btadapter_S_layers.{pair}.mlp.fc1.weight" in self.w:
                patches, cls = self._branch(x, patches, cls, pair)
        trunk, patches = before_last
        return (trunk[:, 1:] + patches) / 2 if patches is not None else trunk[:, 1:]

    def _vision_layer(self, x: Tensor, i: int) -> Tensor:
        heads, act = self._vision_sizes()
        return self.layer(x, f"{TOWER}encoder.layers.{i}", heads, act)

    def _vision_sizes(self) -> tuple[int, str]:
        """Attention heads and activation of the vision tower."""
        vision = self.config["vision_config"]
        return vision["num_attention_heads"], vision.get("hidden_act", "quick_gelu")

    def _branch(
        self, x: Tensor, patches: Tensor | None, cls: Tensor | None, pair: int
    ) -> tuple[Tensor, Tensor]:
        """One pair of the temporal adapter's layers: attention along time, then within every frame.

        Args:
            x: State of the trunk (T, P+1, C).
            patches: (T, P, C), None before the first pair.
            cls: (C), None before the first pair.
            pair: Which pair.

        Returns:
            The next patches and cls.
        """
        heads, act = self._vision_sizes()
        patches, cls = self._branch_input(x, patches, cls)
        temporal, spatial = f"{TOWER}btadapter_T_layers.{pair}", f"{TOWER}btadapter_S_layers.{pair}"
        along_time = self.norm(patches.transpose(0, 1), f"{temporal}.layer_norm1")
        along_time = self.attention(along_time, f"{temporal}.self_attn", heads)
        patches = patches + self.linear(along_time, f"{temporal}.temporal_fc").transpose(0, 1)
        frames = self.norm(torch.cat([cls.expand(len(x), 1, -1), patches], 1), f"{spatial}.layer_norm1")
        y = self.attention(frames, f"{spatial}.self_attn", heads)
        patches, cls = patches + y[:, 1:], cls + y[:, 0].mean(0)
        patches = patches + self.mlp(self.norm(patches, f"{spatial}.layer_norm2"), f"{spatial}.mlp", act)
        return patches, cls + self.mlp(self.norm(cls, f"{spatial}.layer_norm2"), f"{spatial}.mlp", act)

    def _branch_input(self, x: Tensor, patches: Tensor | None, cls: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patches (T, P, C) and cls (C) that enter a pair: the trunk's state is added to the branch's."""
        mean = x[:, 0].mean(0)
        if patches is not None:
            assert cls is not None
            return x[:, 1:] + patches, mean + cls
        positions = self.w[TOWER + "embeddings.position_embedding.weight"]
        times = self.w[TOWER + "btadapter_time_embed.weight"][: len(x), None]
        token = self.w[TOWER + "btadapter_cls_token"][0, 0]
        return x[:, 1:] + positions[1:] + times, (mean + token + positions[0]) / 2

    # -- question and pooling --------------------------------------------------------------------------------

    def question(self, ids: Tensor) -> Tensor:
        """Ids (1, L), the end token last → (1, E)."""
        config = self.question_config
        kept = self.w[QUESTION + "embeddings.position_embedding"][:KEPT_POSITIONS]
        stretched = self.w[QUESTION + "embeddings.position_embedding_res"][KEPT_POSITIONS:]
        positions = torch.cat([kept, stretched])[: ids.shape[1]]
        x = self.w[QUESTION + "embeddings.token_embedding.weight"][ids] + positions
        heads, act = config["num_attention_heads"], config.get("hidden_act", "quick_gelu")
        for i in range(config["num_hidden_layers"]):
            x = self.layer(x, f"{QUESTION}encoder.layers.{i}", heads, act, causal=True)
        last = self.norm(x, QUESTION + "final_layer_norm")[:, -1]
        return self.linear(last, PROJECTOR + "clip_text_projection")

    def visual_tokens(self, features: Tensor, q: Tensor) -> Tensor:
        """Features (T, P, C), q (1, E) → visual tokens (N, D), by upstream's steps."""
        frames, (rows, columns) = len(features), self.config["frame_shape"]
        projected = self.linear(
            self.norm(features, PROJECTOR + "clip_visual_ln"), PROJECTOR + "clip_visual_projection"
        )
        cosine = F.normalize(projected, dim=-1).flatten(0, 1) @ F.normalize(q, dim=-1)[0]
        logits = cosine * self.w[PROJECTOR + "logit_scale"].exp()
        weights = torch.softmax(logits, -1).view(frames, rows, columns)
        hidden = F.gelu(self.linear(features, PROJECTOR + "linear_1"))
        hidden = self.linear(hidden, PROJECTOR + "linear_2").view(frames, rows, columns, -1)
        kernel, stride, temperature = (
            self.config[f"pooling_{name}"] for name in ("kernel", "stride", "temp")
        )
        return pool_windows(hidden, weights, kernel, stride, temperature)

    # -- decoder ---------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) → embeddings (…, D)."""
        return self.w[LANGUAGE + "model.embed_tokens.weight"][ids]

    def decode(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """One pass of the decoder.

        Args:
            x: Embeddings (1, S, D) of the positions after the cached ones.
            cache: None at the start.

        Returns:
            Logits (1, S, V) of all positions, and the longer cache.
        """
        config = self.config["text_config"]
        past = cache[0][0].shape[2] if cache else 0
        size = config["hidden_size"] // config["num_attention_heads"]
        cos, sin = _rotary(past, x, size)
        longer: Cache = []
        for i in range(config["num_hidden_layers"]):
            name = f"{LANGUAGE}model.layers.{i}"
            y = self._rms(x, f"{name}.input_layernorm")
            q, k, v = (
                self._heads(y, f"{name}.self_attn.{part}_proj", config["num_attention_heads"])
                for part in "qkv"
            )
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if cache:
                k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
            longer.append((k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0 and x.shape[1] > 1)
            x = x + self.linear(y.transpose(1, 2).flatten(2), f"{name}.self_attn.o_proj")
            y = self._rms(x, f"{name}.post_attention_layernorm")
            gated = F.silu(self.linear(y, f"{name}.mlp.gate_proj")) * self.linear(y, f"{name}.mlp.up_proj")
            x = x + self.linear(gated, f"{name}.mlp.down_proj")
        return self.linear(self._rms(x, LANGUAGE + "model.norm"), LANGUAGE + "lm_head"), longer

    def _rms(self, x: Tensor, name: str) -> Tensor:
        epsilon = self.config["text_config"]["rms_norm_eps"]
        return F.rms_norm(x, (x.shape[-1],), self.w[f"{name}.weight"], epsilon)


def _rotary(past: int, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, size) of the rotary embedding for x (1, S, D) after `past` positions."""
    positions = torch.arange(past, past + x.shape[1], device=x.device).float()
    frequencies = ROPE_BASE ** (-torch.arange(0, size, 2, device=x.device) / size)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def pool_windows(
    hidden: Tensor, weights: Tensor, kernel: Sequence[int], stride: Sequence[int], temperature: float
) -> Tensor:
    """Pool by upstream's own steps: unfold, multiply, sum.

    Args:
        hidden: (T, rows, columns, D).
        weights: (T, rows, columns).
        kernel, stride: (frames, rows, columns).
        temperature: Divides the weights before the softmax within a window.

    Returns:
        (N, D), N windows.
    """
    (kt, kh, kw), (st, sh, sw) = kernel, stride
    u = hidden[None].permute(0, 4, 1, 2, 3).unfold(2, kt, st).unfold(3, kh, sh).unfold(4, kw, sw).flatten(5)
    w = weights[None].unfold(1, kt, st).unfold(2, kh, sh).unfold(3, kw, sw).flatten(4)
    return (u * torch.softmax(w / temperature, -1).unsqueeze(1)).sum(-1).flatten(2)[0].T


@torch.no_grad()
def answer(
    model: TorchModel, pixels: Tensor, question_ids: Tensor, before: Tensor, after: Tensor, new_tokens: int
) -> tuple[list[int], dict[str, float]]:
    """Answer greedily.

    Args:
        model: The whole checkpoint.
        pixels: (T, 3, H, W), preprocessed.
        question_ids: (1, L), of the question tower.
        before, after: Token ids of the prompt around the visual tokens.
        new_tokens: How many to generate.

    Returns:
        The token ids, and seconds per stage under the runtime's names.
    """
    timings: dict[str, float] = {}
    since = time.perf_counter()

    def record_elapsed(name: str) -> None:
        nonlocal since
        if pixels.is_cuda:
            torch.cuda.synchronize()
        timings[name] = time.perf_counter() - since
        since = time.perf_counter()

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
