"""Muon, in fp32 on a CPU."""
from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised (Jordan et al. 2024); lr as for AdamW (Liu et al., arXiv:2502.16982).

    As torch.optim.Muon, which computes in bfloat16: on a CPU without that it takes longer than the model.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonal(p.grad.lerp(mean, group["momentum"]))
                p.add_(step, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """About U V^T of x = U S V^T: five Newton-Schulz iterations, which bring all of S near 1."""
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32) / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.T
