"""Muon for hidden matrices, AdamW for everything else, over flat buffers: bf16 weights, fp32 master copy.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix by Newton-Schulz iterations. At this size
it needs several times fewer steps than AdamW alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MUON_MOMENTUM = 0.95
STATE = ("master", "mean", "square", "momentum")


class FlatMuon:
    """An optimizer that owns the parameters of a module.

    The parameters' data and gradients become views of two flat bf16 buffers. Several processes can average
    their gradients before each `step`.

    Args:
        module: The model.
        muon_rate: Muon's learning rate where AdamW's is 1e-3.
        decay: AdamW's weight decay for matrices.
        dtype: Type of the buffers that the model computes with.

    Attributes:
        gradient: (n), what backward accumulates into.
        master: (n) float32, the weights.
        working: (n), the weights that the model computes with.
        matrices: (rows, columns) → offsets of the matrices that Muon updates, equal shapes
            together.
    """

    def __init__(
        self,
        module: nn.Module,
        muon_rate: float = 0.02,
        decay: float = 0.02,
        dtype: torch.dtype = torch.bfloat16,
    ):
        parameters = list(module.named_parameters())
        n = sum(p.numel() for _, p in parameters)
        self.muon_rate = muon_rate
        self.decay = decay
        self.steps = 0
        self.master = torch.empty(n)
        self.working = torch.empty(n, dtype=dtype)
        self.gradient = torch.zeros(n, dtype=dtype)
        self.mean = torch.zeros(n)
        self.square = torch.zeros(n)
        self.momentum = torch.zeros(n)
        self.decayed = torch.zeros(n)  # 1 where weight decay applies
        self.slots: dict[str, tuple[int, torch.Size]] = {}
        self.matrices: dict[tuple[int, int], list[int]] = {}
        offset = 0
        for name, p in parameters:
            self._add(name, p, offset)
            offset += p.numel()
        self.working.copy_(self.master)
        for name, p in parameters:
            offset, shape = self.slots[name]
            p.data = self.working[offset : offset + p.numel()].view(shape)
            p.grad = self.gradient[offset : offset + p.numel()].view(shape)

    def _add(self, name: str, p: Tensor, offset: int) -> None:
        """Copy a parameter to its place in the master copy and note how it is updated."""
        size = p.numel()
        self.slots[name] = (offset, p.shape)
        self.master[offset : offset + size] = p.data.flatten()
        self.decayed[offset : offset + size] = float(p.dim() == 2)
        if _is_hidden_matrix(name, p):
            parts = 3 if "qkv" in name else 2 if "gate_up" in name else 1
            shape = (p.shape[0] // parts, p.shape[1])
            offsets = [offset + k * size // parts for k in range(parts)]
            self.matrices.setdefault(shape, []).extend(offsets)

    def step(
        self, rate: float, gradient: Tensor, clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.98)
    ) -> float:
        """Apply one gradient.

        Args:
            rate: AdamW's learning rate; Muon's scales with it.
            gradient: (n) float32, averaged over processes.
            clip: Maximum norm of the gradient, for AdamW.
            betas: AdamW's decay rates of the moments.

        Returns:
            The norm of the gradient.
        """
        self.steps += 1
        before = self.master.clone()
        self.momentum.mul_(MUON_MOMENTUM).add_(gradient)
        update = gradient + MUON_MOMENTUM * self.momentum  # Nesterov
        norm = float(gradient.norm())
        self._adamw(rate, gradient * min(1.0, clip / (norm + 1e-6)), betas)
        self._muon(self.muon_rate * rate / 1e-3, before, update)
        self.working.copy_(self.master)
        self.gradient.zero_()
        return norm

    def _adamw(self, rate: float, gradient: Tensor, betas: tuple[float, float]) -> None:
        """Update everything by AdamW; Muon's matrices are overwritten afterwards."""
        self.mean.lerp_(gradient, 1 - betas[0])
        self.square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        scale = (self.square / (1 - betas[1] ** self.steps)).sqrt_().add_(1e-8)
        self.master.mul_(1 - rate * self.decay * self.decayed)
        self.master.addcdiv_(self.mean, scale, value=-rate / (1 - betas[0] ** self.steps))

    def _muon(self, rate: float, before: Tensor, update: Tensor) -> None:
        """Update the hidden matrices: before (n), the weights before this step; update (n), the momentum."""
        for (rows, columns), offsets in self.matrices.items():
            size = rows * columns
            momenta = torch.stack([update[o : o + size].view(rows, columns) for o in offsets])
            directions = orthogonalise(momenta)
            directions *= max(1.0, rows / columns) ** 0.5
            for o, direction in zip(offsets, directions):
                decayed = before[o : o + size] * (1 - 0.01 * rate)
                self.master[o : o + size] = decayed - rate * direction.flatten()

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights by parameter name."""
        return {
            name: self.master[o : o + shape.numel()].view(shape).clone()
            for name, (o, shape) in self.slots.items()
        }

    def state(self) -> dict[str, Any]:
        """The optimizer's state, from which a run can resume."""
        return {"steps": self.steps, **{key: getattr(self, key) for key in STATE}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.steps = state["steps"]
        for key in STATE:
            getattr(self, key).copy_(state[key])
        self.working.copy_(self.master)


def _is_hidden_matrix(name: str, p: Tensor) -> bool:
    outer = ("positions", "token_embedding.weight", "question_embedding.weight", "lm_head.weight")
    return p.dim() == 2 and min(p.shape) >= 32 and not name.endswith(outer)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Move matrices g (k, rows, columns) towards the nearest semi-orthogonal ones by Newton-Schulz steps."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()
