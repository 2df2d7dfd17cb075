"""Speeds, in CPU seconds, beside a plain reference in the same run: python -m pytest -m bench -s"""
import time

import numpy as np
import pytest
import torch

import collatz

pytestmark = pytest.mark.bench


def cpu_seconds(f, repeats: int = 3) -> float:
    """Least CPU seconds of f over repeats."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def naive(numbers: list[int], m: int) -> None:
    """k, log2 and residues along each number with Python integers."""
    import math
    for n in numbers:
        for _ in range(m):
            n, _ = collatz.syracuse(n)
            math.log2(n), n % collatz.RESIDUE


@pytest.mark.parametrize("lookahead, n", [(10, 400_000), (20, 200_000), (100, 60_000)])
def test_exact_arithmetic_against_python_integers(lookahead, n):
    limbs = collatz.random_odd(np.random.default_rng(0), n, 2, 128)
    some = [sum(int(x) << 32 * i for i, x in enumerate(column)) for column in limbs[:, :n // 100].T.tolist()]
    ours = n / cpu_seconds(lambda: collatz.paths(limbs, lookahead + 1))
    plain = len(some) / cpu_seconds(lambda: naive(some, lookahead + 1))
    print(f"\nlookahead {lookahead}: {ours / 1e6:.2f} M samples/CPU-s, Python integers {plain / 1e6:.3f} M: {ours / plain:.0f} times")


def test_training_step_against_forward_alone():
    args = collatz.parse_args(["--pool", "20000", "--train-seeds", "200", "--eval-trajectories", "2"])
    exam = collatz.make_exam(args)
    pools, model, rng = collatz.make_pools(args, exam), collatz.Lyapunov(collatz.model_config(args)), np.random.default_rng(0)
    optimizers = collatz.make_optimizers(model, args)

    def step():
        loss = collatz.batch_loss(model, collatz.draw(pools, args, 0, rng), args, 0)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def forward():
        with torch.no_grad():
            collatz.batch_loss(model, collatz.draw(pools, args, 0, rng), args, 0)

    a, b = cpu_seconds(lambda: [step() for _ in range(10)]) / 10, cpu_seconds(lambda: [forward() for _ in range(10)]) / 10
    print(f"\ntraining step {1000 * a:.1f} ms, its forward pass alone {1000 * b:.1f} ms: {a / b:.1f} times")


def test_exhaustive_check_of_the_closed_form():
    model = collatz.Lyapunov(collatz.Config(150, layers=None, sees=0))
    seconds = cpu_seconds(lambda: collatz.exhaustive(model, 1 << 18), repeats=1)
    print(f"\nclosed form, lookahead 150: {(1 << 17) / seconds / 1e3:.0f} k odd numbers a CPU-s, 2^21 in {8 * seconds:.0f} s")
