"""PPLLaVA at nano size, for training: every stage of the architecture, in torch.

The same mathematics as the exported graphs (export/), batched and differentiable. checkpoint.py writes the
parameters in upstream's layout for the exporter.

Shapes: B clips of T frames, P patches of width D, N visual tokens, L text tokens, E question embedding, V
words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppllava_edge.nano.vocabulary import WORDS

# The trunk's states have a size of about 8 where the branch begins. A much smaller time embedding is lost in
# the norm that follows: the model then learns the axis along which objects move, but not the direction.
TIME_SCALE = 4.0


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. Frames and grid must be multiples of the pooling kernel.

    Attributes:
        image, patch: Side of a frame and of a patch, pixels.
        frames: Frames of a clip.
        vision, vision_layers: Width and depth of the vision tower's trunk.
        branch_layers: Pairs of the temporal branch, beside the trunk's last layers.
        heads: Heads of every attention.
        question, question_layers, question_length: Width, depth and longest text of the question tower.
        projection: Width of the space where patches and questions are compared.
        decoder, decoder_layers, decoder_mlp: Width, depth and hidden width of the decoder.
        kernel: Pooling kernel: frames, rows, columns.
        temperature: Temperature of the softmax within a pooling window.
    """

    image: int = 108
    patch: int = 12
    frames: int = 8
    vision: int = 128
    vision_layers: int = 4
    branch_layers: int = 2
    heads: int = 4
    question: int = 64
    question_layers: int = 2
    question_length: int = 16
    projection: int = 64
    decoder: int = 128
    decoder_layers: int = 3
    decoder_mlp: int = 384
    kernel: tuple[int, int, int] = (2, 3, 3)
    temperature: float = 0.01

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid**2

    as_dict = asdict


class SelfAttention(nn.Module):
    """Multi-head self-attention over x (B, L, D); rotate turns queries and keys by position."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, causal: bool = False, rotate: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        # Written out: in bf16 on a CPU this trains faster than the fused kernel.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if causal:
            scores = scores + torch.full((length, length), -1e4, dtype=x.dtype).triu(1)
        y = torch.softmax(scores, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class ClipLayer(nn.Module):
    """Pre-norm transformer layer of both CLIP towers, with exact GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def mlp(self, x: Tensor) -> Tensor:
        """The second half of the layer."""
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        return self.mlp(x + self.attention(self.norm1(x), causal))


class TemporalLayer(nn.Module):
    """The temporal half of a branch pair: attention along time for every patch, then a linear map."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.out = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:  # (B, T, P, D)
        batch, frames, count, width = patches.shape
        along_time = self.norm(patches).transpose(1, 2).reshape(batch * count, frames, width)
        y = self.out(self.attention(along_time)).view(batch, count, frames, width)
        return patches + y.transpose(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm, epsilon 1e-5."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class DecoderLayer(nn.Module):
    """LLaMA layer: RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = SelfAttention(width, heads, bias=False)
        self.norm2 = RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=True, rotate=rotate)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class NanoPPLLaVA(nn.Module):
    """The whole model.

    Args:
        shape: Sizes of the model.
        guided: Whether the question weighs the patches of a pooling window; otherwise all weigh the same.
    """

    def __init__(self, shape: Shape = Shape(), guided: bool = True):
        super().__init__()
        self.shape = s = shape
        self.guided = guided
        self.patch_embedding = nn.Linear(3 * s.patch**2, s.vision, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(s.vision) * 0.02)
        self.patch_positions = nn.Parameter(torch.randn(1 + s.patches, s.vision) * 0.02)
        self.pre_norm = nn.LayerNorm(s.vision)
        self.trunk = nn.ModuleList(ClipLayer(s.vision, s.heads) for _ in range(s.vision_layers))
        self.branch_time = nn.ModuleList(TemporalLayer(s.vision, s.heads) for _ in range(s.branch_layers))
        self.branch_space = nn.ModuleList(ClipLayer(s.vision, s.heads) for _ in range(s.branch_layers))
        self.branch_class = nn.Parameter(torch.zeros(s.vision))
        self.frame_positions = nn.Parameter(TIME_SCALE * sine_cosine(s.frames, s.vision))
        self.similarity_norm = nn.LayerNorm(s.vision)
        self.similarity_projection = nn.Linear(s.vision, s.projection, bias=False)

        self.question_embedding = nn.Embedding(len(WORDS), s.question)
        self.question_positions = nn.Parameter(torch.randn(s.question_length, s.question) * 0.02)
        self.question_layers = nn.ModuleList(ClipLayer(s.question, s.heads) for _ in range(s.question_layers))
        self.question_norm = nn.LayerNorm(s.question)
        self.question_projection = nn.Linear(s.question, s.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

        self.linear_1 = nn.Linear(s.vision, s.decoder)
        self.linear_2 = nn.Linear(s.decoder, s.decoder)
        self.token_embedding = nn.Embedding(len(WORDS), s.decoder)
        self.decoder = nn.ModuleList(
            DecoderLayer(s.decoder, s.heads, s.decoder_mlp) for _ in range(s.decoder_layers)
        )
        self.decoder_norm = RMSNorm(s.decoder)
        self.lm_head = nn.Linear(s.decoder, len(WORDS), bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            if name.endswith("embedding.weight") and not name.startswith("patch"):
                nn.init.normal_(p, std=0.02)
            elif p.dim() == 2 and not name.endswith("positions"):
                nn.init.normal_(p, std=0.7 * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            residual = name.endswith(("attention.out.weight", "down.weight"))
            if residual or (name.startswith("branch_time") and name.endswith(".out.weight")):
                p.data *= 0.5
        g = self.shape.grid
        half = sine_cosine(g, self.shape.vision // 2)
        grid = torch.cat([half[:, None].expand(g, g, -1), half[None].expand(g, g, -1)], -1)
        self.patch_positions.data[1:] = 0.3 * grid.reshape(g * g, -1)

    def features(self, pixels: Tensor, branch: bool = True) -> Tensor:
        """Pixels (B, T, 3, H, W) → features (B, T, P, D): mean of trunk and branch, or trunk alone."""
        s = self.shape
        batch, frames = pixels.shape[:2]
        g, p = s.grid, s.patch
        x = pixels.to(self.patch_embedding.weight.dtype)
        x = x.view(-1, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(batch * frames, g * g, 3 * p * p)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), self.patch_embedding(x)], 1)
        x = self.pre_norm(x + self.patch_positions)
        state: tuple[Tensor, Tensor] | None = None
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            pair = i - (s.vision_layers - s.branch_layers)
            if branch and pair >= 0:
                state = self._branch(pair, x.view(batch, frames, 1 + s.patches, -1), state)
        trunk = x[:, 1:].view(batch, frames, s.patches, -1)
        return (trunk + state[0]) / 2 if state is not None else trunk

    def _branch(self, pair: int, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Run one branch pair over all frames.

        Args:
            pair: Number of the pair.
            x: (B, T, 1+P, D), the trunk's state.
            state: The branch's patches (B, T, P, D) and class token (B, D); None before the first pair.

        Returns:
            The branch's new state.
        """
        patches = x[:, :, 1:]
        token = x[:, :, 0].mean(1)
        if state is None:
            patches = patches + self.patch_positions[1:] + self.frame_positions[: x.shape[1], None]
            token = (token + self.branch_class + self.patch_positions[0]) / 2
        else:
            patches = patches + state[0]
            token = token + state[1]
        layer: Any = self.branch_space[pair]
        patches = self.branch_time[pair](patches)
        y = torch.cat([token[:, None, None].expand(-1, x.shape[1], -1, -1), patches], 2)
        residual = layer.attention(layer.norm1(y.flatten(0, 1))).view_as(y)
        patches = patches + residual[:, :, 1:]
        token = token + residual[:, :, 0].mean(1)
        return layer.mlp(patches), layer.mlp(token)

    def questions(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Ids (N, L) with the index of each end token (N) → normalised embeddings (N, E) float32."""
        x = self.question_embedding(ids) + self.question_positions[: ids.shape[1]]
        for layer in self.question_layers:
            x = layer(x, causal=True)
        x = self.question_norm(x[torch.arange(len(ids)), ends])
        return F.normalize(self.question_projection(x).float(), dim=-1)

    def patch_embeddings(self, features: Tensor) -> Tensor:
        """Features (B, T, P, D) → normalised embeddings (B, T*P, E) float32."""
        x = self.similarity_projection(self.similarity_norm(features))
        return F.normalize(x.float(), dim=-1).flatten(1, 2)

    def pool(self, features: Tensor, logits: Tensor) -> Tensor:
        """Prompt-guided pooling.

        Args:
            features: (B, T, P, D).
            logits: (B, K, T*P), cosine × scale of every patch with K questions.

        Returns:
            Visual tokens (B*K, N, decoder).
        """
        g = self.shape.grid
        batch, count = logits.shape[:2]
        frames = features.shape[1]
        hidden = self._windows(F.gelu(self.linear_1(features)).unflatten(2, (g, g)), 1)
        weights = self._windows(torch.softmax(logits, -1).view(batch, count, frames, g, g), 2)
        weights = weights.transpose(1, 2)  # (B, windows, K, patches of a window)
        weights = weights / self.shape.temperature if self.guided else weights * 0
        weights = torch.softmax(weights, -1).to(hidden.dtype)
        return self.linear_2((weights @ hidden).transpose(1, 2)).flatten(0, 1)

    def _windows(self, x: Tensor, lead: int) -> Tensor:
        """Group patches by pooling window: (lead…, T, g, g, …) → (lead…, windows, patches of a window, …)."""
        kt, kh, kw = self.shape.kernel
        frames, g, _ = x.shape[lead : lead + 3]
        shape = (*x.shape[:lead], frames // kt, kt, g // kh, kh, g // kw, kw, *x.shape[lead + 3 :])
        counts = [lead, lead + 2, lead + 4]
        within = [lead + 1, lead + 3, lead + 5]
        order = [*range(lead), *counts, *within, *range(lead + 6, len(shape))]
        return x.reshape(shape).permute(order).flatten(lead + 3, lead + 5).flatten(lead, lead + 2)

    def decode(self, visual: Tensor, ids: Tensor) -> Tensor:
        """Visual tokens (B, N, D), then token ids (B, L) → logits (B, L, V) float32 at the ids' positions."""
        x = torch.cat([visual, self.token_embedding(ids)], 1)
        rotate = rotary(x.shape[1], self.shape.decoder // self.shape.heads, x.dtype)
        for layer in self.decoder:
            x = layer(x, rotate)
        return self.lm_head(self.decoder_norm(x[:, visual.shape[1] :])).float()


def rotary(length: int, width: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rotary position embedding in LLaMA's half-split layout, base 10000: rotates (…, length, width)."""
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin

    return rotate


def sine_cosine(positions: int, width: int) -> Tensor:
    """Smooth initial values of a learned position table: (positions, width)."""
    frequency = math.pi * torch.exp(torch.arange(width // 2) / (width // 2) * math.log(positions)) / positions
    angle = torch.outer(torch.arange(positions) + 0.5, frequency)
    return torch.cat([angle.sin(), angle.cos()], 1)
