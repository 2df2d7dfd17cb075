"""Evaluation: parameter counts, intervals, pass@k, evaluation mode, and whether a run grokked:

    python -m common.evaluation RUN --train KEY --val KEY --n 1000 --where seed=3
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from common import metrics
from common.files import UserError, one_line_errors
from common.flags import Parser, integer, path, real

# Of grokking(): rates, unless a unit is named.
ENOUGH, TRUSTED_N = 8, 100      # evaluations that a label needs; validation problems from which it can be trusted
SATURATED, STAYS = 0.95, 0.90   # of train: saturated from the one on, for as long as it is not below the other
GENERAL = 0.80                  # of val: from here on the model generalises
LEAST, SIGMAS = 0.30, 2.8       # what counts as a gap, rise or fall; or so many standard deviations of a val of 1/2
LATE, LATE_RATIO = 3, 2         # from saturation to half the rise: evaluations, and ratio of the steps
SHARP, RESOLVED = 0.5, 2        # length of the rise: share of the plateau before; or evaluations
CLOSED = 0.15                   # mean gap behind the rise


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


# ---- Grokking

def grokking(steps: Sequence[float], train: Sequence[float], val: Sequence[float], n_val: int) -> dict:
    """The `label` of a run by its accuracies on training and on n_val validation problems, and what decided it.

    Evaluations with a NaN or None are left out. Each value is then the median of itself and its neighbours (the
    first stays as it is, the last is the one before). Train saturates at the first evaluation i with SATURATED,
    from where it stays at STAYS until val has reached GENERAL, or else to the end. The gap is train at i minus
    val's best up to i, the rise is from there to val's best, the fall from that to its end. Each counts from
    LEAST on, or from SIGMAS / 2 / sqrt(n_val) where that is more.

    insufficient: fewer than ENOUGH evaluations. not_saturated: there is no i.
    collapsed: val's best is at GENERAL, but a fall follows.
    joint_generalisation: no gap. memorised: a gap, and no rise to GENERAL.
    grokking: a gap, and a rise to GENERAL that is late, sharp and lasting. delayed_generalisation: not all three.

    Late: half the rise is reached at least LATE evaluations behind i and at LATE_RATIO times its step, and i is
    not the first evaluation, which does not show when train saturated. Sharp: from 20 to 80 % the rise takes at
    most SHARP of the plateau, which is the steps from i to the 20 %; or at most the plateau, and RESOLVED
    evaluations. Lasting: from 80 % on, train minus val is CLOSED or less on average.
    Raises UserError for values outside 0..1 and for steps that do not rise.
    """
    curves = np.array([steps, train, val], float)
    curves = curves[:, ~np.isnan(curves).any(0)]
    if (bad := curves[1:][(curves[1:] < 0) | (curves[1:] > 1)]).size:
        raise UserError(f"{bad[0]:g} is no accuracy: train and val are wanted as rates in 0..1")
    if (np.diff(curves[0]) <= 0).any():
        raise UserError("the steps do not rise: if these are several runs, choose one by --where")
    found = {"label": "insufficient", "evaluations": curves.shape[1]}
    if curves.shape[1] < ENOUGH:
        return found
    medians = np.median(np.lib.stride_tricks.sliding_window_view(curves[1:], 3, axis=1), -1)
    train, val = np.hstack([curves[1:, :1], medians, medians[:, -1:]])
    steps, i = curves[0], None
    for k in range(len(steps)):
        if train[k] < STAYS:
            i = None
        elif i is None and train[k] >= SATURATED:
            i = k
        if i is not None and val[k] >= GENERAL:
            break
    if i is None:
        return {**found, "label": "not_saturated", "best_train": train.max(), "last_train": train[-1]}

    least, base, best = max(LEAST, SIGMAS / 2 / math.sqrt(n_val)), val[:i + 1].max(), val.max()
    gap, rise, fall = train[i] - base, best - base, best - val[-1]
    found |= {"saturated_at": steps[i], "gap": gap, "rise": rise, "fall": fall, "counts_from": least, "best_val": best}
    if best >= GENERAL and fall >= least:
        return {**found, "label": "collapsed"}
    if gap < least:
        return {**found, "label": "joint_generalisation"}
    if best < GENERAL or rise < least:
        return {**found, "label": "memorised"}

    def reached(share: float) -> float:
        """The evaluation at which val first has this share of its rise, by a line between the two around it."""
        level = base + share * rise
        k = int(np.argmax(val >= level))
        return k - (val[k] - level) / (val[k] - val[k - 1])
    a, half, b = reached(0.2), math.ceil(reached(0.5)), reached(0.8)
    at_a, at_b = np.interp([a, b], range(len(steps)), steps)
    plateau, length, behind = at_a - steps[i], at_b - at_a, (train - val)[math.ceil(b):].mean()
    late = i > 0 and half - i >= LATE and steps[half] >= LATE_RATIO * steps[i]
    sharp = length <= SHARP * plateau or (length <= plateau and b - a <= RESOLVED)
    return {**found, "half_at": steps[half], "half_evaluations_later": half - i, "plateau_steps": plateau,
            "rise_steps": length, "rise_evaluations": b - a, "mean_gap_behind": behind,
            "label": "grokking" if late and sharp and behind <= CLOSED else "delayed_generalisation"}


def condition(text: str) -> tuple[str, float]:
    """An argparse type: a column and the number that it shall have, like seed=3."""
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected COLUMN=NUMBER, like seed=3")
    return column, real(-math.inf)(value)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="common.evaluation", usage="python -m common.evaluation RUN --train KEY --val KEY --n N [flags]",
               description=__doc__)
    p.add_argument("run", type=path, metavar="RUN", help="run folder or metrics.csv")
    p.add_argument("--train", required=True, metavar="KEY", help="column of the accuracy on training problems")
    p.add_argument("--val", required=True, metavar="KEY", help="column of that on validation problems")
    p.add_argument("--n", required=True, type=integer(1), help="validation problems behind a value")
    p.add_argument("--where", type=condition, action="append", default=[], metavar="COLUMN=NUMBER",
                   help="these rows alone (default: all); may be repeated")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    columns = ("step", args.train, args.val)
    with one_line_errors("common.evaluation"):
        rows = metrics.read(args.run)
        known = dict.fromkeys(name for row in rows for name in row)
        for name in (*columns, *(column for column, _ in args.where)):
            if name not in known:
                raise UserError(f"{args.run}: no column {name!r} in its metrics "
                                f"(it has: {', '.join(known) or 'no rows'})")
        rows = [row for row in rows if set(columns) <= row.keys() and set(args.where) <= row.items()]
        if not rows:
            raise UserError(f"{args.run}: no row that has {args.train} and {args.val} is left by --where")
        rows.sort(key=lambda row: row["step"])
        found = grokking(*([row[name] for row in rows] for name in columns), args.n)
        print(found.pop("label"))
        for name, value in found.items():
            print(f"  {name} {value:.6g}")
        if args.n < TRUSTED_N:
            print(f"n {args.n} is too small: no label from fewer than {TRUSTED_N} problems can be trusted")


if __name__ == "__main__":
    main()
