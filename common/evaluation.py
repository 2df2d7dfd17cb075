"""Evaluation: parameter counts, intervals, pass@k, evaluation mode."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def count_parameters(module: torch.nn.Module, trainable: bool = False) -> int:
    """Number of scalars in the module's parameters, shared ones once; with trainable=True only those that learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval for k successes in n trials, as rates (default 95 %); (0, 1) for n = 0.

    E. B. Wilson, JASA 22 (1927) 209.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, z * z
    center, half = (p + z2 / (2 * n)) / (1 + z2 / n), z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at k = 0 and k = n the bound is 0 or 1 exactly; rounding must not move it
    return (0.0 if k == 0 else center - half), (1.0 if k == n else center + half)


def format_rate(k: int, n: int) -> str:
    """`99.91% (9991/10000, 95% 99.83-99.95)`, with as many decimals as the interval is wide."""
    if n == 0:
        return "n/a (0/0)"
    lo, hi = wilson(k, n)
    digits = max(1, min(4, math.ceil(-math.log10((hi - lo) * 100)) + 1))
    return f"{100 * k / n:.{digits}f}% ({k}/{n}, 95% {100 * lo:.{digits}f}-{100 * hi:.{digits}f})"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k draws without replacement from n samples, c of them right, hold a right one.

    Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@contextmanager
def eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; leaves each submodule's mode and torch's random streams as they were."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        for m, training in modes:
            m.training = training
