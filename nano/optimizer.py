"""Muon for hidden matrices, AdamW for everything else, over one flat buffer: bf16 working weights, fp32 master copy.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix by Newton-Schulz iterations; at this size it needs several times
fewer steps than AdamW alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatMuon:
    """Owns the parameters of a module: their data and gradients become views of two flat bf16 buffers.

    gradient: (n) bf16, what backward accumulates into. master: (n) fp32. step() takes the gradient to apply, so that several
    processes can average theirs first.
    """

    def __init__(
        self,
        module: nn.Module,
        muon_rate: float = 0.02,
        decay: float = 0.02,
        dtype: torch.dtype = torch.bfloat16,
    ):
        named = list(module.named_parameters())
        n = sum(p.numel() for _, p in named)
        self.muon_rate, self.decay, self.steps = muon_rate, decay, 0
        self.master, self.working = torch.empty(n), torch.empty(n, dtype=dtype)
        self.gradient = torch.zeros(n, dtype=dtype)
        self.mean, self.square, self.momentum = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        self.decayed = torch.zeros(n)
        self.slots: dict[str, tuple[int, torch.Size]] = {}
        self.matrices: dict[
            tuple[int, int], list[int]
        ] = {}  # shape → offsets, so that equal shapes go together
        offset = 0
        for name, p in named:
            size = p.numel()
            self.slots[name] = (offset, p.shape)
            self.master[offset : offset + size] = p.data.flatten()
            self.decayed[offset : offset + size] = float(p.dim() == 2)
            if _is_hidden_matrix(name, p):
                parts = 3 if "qkv" in name else 2 if "gate_up" in name else 1
                for k in range(parts):
                    self.matrices.setdefault((p.shape[0] // parts, p.shape[1]), []).append(
                        offset + k * size // parts
                    )
            offset += size
        self.working.copy_(self.master)
        for name, p in named:
            offset, shape = self.slots[name]
            p.data = self.working[offset : offset + p.numel()].view(shape)
            p.grad = self.gradient[offset : offset + p.numel()].view(shape)

    def step(
        self, rate: float, gradient: Tensor, clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.98)
    ) -> float:
        """Apply one averaged gradient (n) fp32 at AdamW's rate (Muon's scales with it). Returns the gradient's norm."""
        self.steps += 1
        before = self.master.clone()
        self.momentum.mul_(0.95).add_(gradient)
        update = gradient + 0.95 * self.momentum
        norm = float(gradient.norm())
        gradient = gradient * min(1.0, clip / (norm + 1e-6))
        self.mean.lerp_(gradient, 1 - betas[0])
        self.square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        scale = (self.square / (1 - betas[1] ** self.steps)).sqrt_().add_(1e-8)
        self.master.mul_(1 - rate * self.decay * self.decayed)
        self.master.addcdiv_(self.mean, scale, value=-rate / (1 - betas[0] ** self.steps))
        muon_rate = self.muon_rate * rate / 1e-3
        for (rows, columns), offsets in self.matrices.items():
            size = rows * columns
            directions = orthogonalise(
                torch.stack([update[o : o + size].view(rows, columns) for o in offsets])
            )
            directions *= max(1.0, rows / columns) ** 0.5
            for o, direction in zip(offsets, directions):
                self.master[o : o + size] = (
                    before[o : o + size] * (1 - 0.01 * muon_rate) - muon_rate * direction.flatten()
                )
        self.working.copy_(self.master)
        self.gradient.zero_()
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The fp32 master weights by parameter name."""
        return {
            name: self.master[o : o + shape.numel()].view(shape).clone()
            for name, (o, shape) in self.slots.items()
        }

    def state(self) -> dict:
        return {
            "steps": self.steps,
            **{k: getattr(self, k) for k in ("master", "mean", "square", "momentum")},
        }

    def restore(self, state: dict) -> None:
        self.steps = state["steps"]
        for key in ("master", "mean", "square", "momentum"):
            getattr(self, key).copy_(state[key])
        self.working.copy_(self.master)


def _is_hidden_matrix(name: str, p: Tensor) -> bool:
    outer = ("positions", "token_embedding.weight", "question_embedding.weight", "lm_head.weight")
    return p.dim() == 2 and min(p.shape) >= 32 and not name.endswith(outer)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix of each matrix in g (k, rows, columns)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()
