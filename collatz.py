"""Can a small net learn a Lyapunov function for the Collatz map: V(T(n)) < V(n) for odd n, T(n) = (3n+1)/2^k?

    python collatz.py                                        # 400 steps, about 14 s: 28 of 429 violations, 99.84 %
    python collatz.py --lookahead 20 --seed 1                # more foresight, fewer violations
    python collatz.py --model closed --lookahead 150 --exhaustive 2097152    # no training, 0 violations, odd n < 2^21
    python collatz.py --recipe original --curriculum --steps 3000 --split original   # the experiment that stalled
    python collatz.py --score 27,703 --checkpoint logs/kept/collatz/window10-s0/best.pt

V(n) may use log2 n, n modulo a power of 3, and the next `--lookahead` values of k. The original stalled at 80 of 429
violations on five test trajectories. Here the net stands inside a maximum over the window (class Lyapunov), so that it
learns which steps to give up. A run writes logs/collatz/NAME/: args.json, run.txt, collatz.py, metrics.csv, last.pt,
best.pt, summary.json, report.json and pictures. Descends from gabrielberger1000/collatz_lyapunov.
"""
from __future__ import annotations

import argparse
import csv
import math
import operator
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate
from common.run import UserError, integer, real

SCRIPT, FORMAT = "collatz.py", 1   # of its checkpoints
LOG2_3 = math.log2(3)
RESIDUE_DIGITS = 12                # n mod 3^12 is the most that a V may know of the past of n
RESIDUE = 3**RESIDUE_DIGITS
TEST_SEEDS = (111, 27, 703, 26623, 626331)   # of the original; 24 + 41 + 62 + 113 + 189 = 429 odd steps
RECORD_SEEDS = (837799, 63728127, 319804831, 8528817511, 12327829503, 1410123943, 3743559068799)  # 2104 odd steps
ORIGINAL_SEEDS = (  # its training list; without the five test seeds it has 49
    27, 31, 41, 47, 54, 55, 71, 73, 91, 97, 103, 111, 127, 155, 159, 171, 231, 237, 267, 303, 319, 351, 359, 391, 447,
    479, 607, 703, 871, 1161, 2223, 2463, 2919, 3711, 6171, 10971, 13255, 17647, 23529, 26623, 34239, 35655, 52527,
    77031, 106239, 142587, 156159, 216367, 230631, 410011, 511935, 626331, 837799, 1117065)
EVAL_ROWS, EVAL_SEED = 50_000, 42  # of the original evaluation set
EVAL_COLUMNS = ("n", "t1", "is_growth", "sigma_n", "max_n", "w_expansion")
BIT_RANGES = ((2, 16), (17, 32), (33, 64), (65, 128), (129, 1 << 30))
RATES = ("pass_rate", "weighted_pass_rate", "growth_pass_rate", "growth_weighted_pass_rate")
LOGGED = (*RATES, "violations_total", "on_trajectory_pass_rate")  # figures of the test sets in metrics.csv
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.5, 0.95)
LOOKAHEADS = (5, 10, 20, 30, 50, 70, 100)  # of the picture of violations against lookahead

# What --recipe sets. A flag on the command line wins; those that window sets have no flag: hard_weight is the weight of
# steps from trajectories, growth_weight of those where T(n) > n.
RECIPES = {
    "window": {"hard_weight": 1.0, "growth_weight": 1.0, "schedule": "linear", "beta2": 0.98, "weight_decay": 0.0},
    "original": {
        "hard_weight": 2.0, "growth_weight": 10.0, "schedule": "plateau", "beta2": 0.999, "weight_decay": 0.01,
        "base": "none", "features": "original", "layers": "128,128,128", "loss": "hinge", "margin": 0.05,
        "target_type": "fixed", "batch_size": 1024, "hard_ratio": 0.25, "segment": 1, "pool": 500_000,
        "optimizer": "adamw", "lr": 1e-3, "clip": 0.0, "steps": 3000,
    },
}
ANCHOR_START, ANCHOR_LEN = 1000, 5000  # of the original: the anchor's weight is 1, then falls to 0.001 in LEN steps


# ---- Flags

def odd_number(text: str, where: str) -> int:
    """An odd number > 1 of any size. Raises UserError that says where it stands and what is wrong."""
    text = text.strip()
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{where}: {text[:40]!r} is not a whole number > 1 written in digits")
    n = int(text)
    if n < 3 or n % 2 == 0:
        raise UserError(f"{where}: {text[:40]} is not an odd number > 1 (T is defined on odd numbers and ends at 1)")
    return n


def odd_numbers(text: str) -> list[int]:
    """An argparse type: odd numbers > 1, separated by commas."""
    try:
        numbers = [odd_number(t, "number") for t in text.split(",")]
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"a number stands there twice: {text[:60]}")
    return numbers


def widths(text: str) -> tuple[int, ...]:
    """An argparse type: hidden widths, separated by commas."""
    parts = text.split(",")
    if not all(t.strip().isdecimal() and 1 <= int(t) <= 1 << 20 for t in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected widths like 64,64 (for no hidden layer: --model linear)")
    return tuple(int(t) for t in parts)


def memory_needed(args: argparse.Namespace) -> float:
    """Bytes that evaluation sets, pools and weights take at their peak, roughly (lookahead 100: 1.7 GB measured)."""
    per_number = 40 * (args.lookahead + 2)  # k, log2, residue, fingerprint of each number in sight, and copies
    steps = 350 * (args.eval_trajectories + args.validation_trajectories)
    chains = args.pool + args.train_seeds * (164 / args.segment + 10)  # 164 steps a path on average, and its own arrays
    sizes = [6 * args.lookahead, *(args.layers if args.model == "mlp" else ())]
    weights = sum(a * b for a, b in pairwise(sizes))
    return per_number * (EVAL_ROWS + args.validation_rows + chains) + 100 * steps + 24 * weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = run.Parser(description=__doc__)
    p.add_argument("--recipe", choices=sorted(RECIPES), default="window", help="sets defaults: ours, or the original's")

    g = p.add_argument_group("data")
    g.add_argument("--lookahead", type=integer(1), default=10, help="L: how many k of T = (3n+1)/2^k V(n) may use")
    g.add_argument("--split", choices=["honest", "original"], default="honest",
                   help="honest: train on no number of any evaluation; original: its seeds run into the test's numbers")
    g.add_argument("--max-bits", type=integer(8, 4096), default=128, help="bit length of the largest training numbers")
    g.add_argument("--test-seeds", type=odd_numbers, default=list(TEST_SEEDS), help="whose trajectories are the test")
    g.add_argument("--pool", type=integer(1), default=200_000, help="random numbers to draw training steps from")
    g.add_argument("--train-seeds", type=integer(1), default=2000, help="random trajectories to draw steps from")
    g.add_argument("--segment", type=integer(1, 1024), default=24, help="steps that a chain from a trajectory holds")
    g.add_argument("--hard-ratio", type=real(0, 1), default=0.5, help="share of trajectories in chains and loss")
    g.add_argument("--curriculum", action="store_true", help="start with a few easy trajectories, then add the others")
    g.add_argument("--ramp-len", type=integer(1), default=1000, help="curriculum: steps until all of them are in use")
    g.add_argument("--start-seeds", type=integer(0), default=1, help="curriculum: trajectories in use at step 0")
    g.add_argument("--mine-negatives", action="store_true", help="find numbers with low margins, train more on them")
    g.add_argument("--mine-interval", type=integer(1), default=50, help="mining: steps between searches")
    g.add_argument("--mine-count", type=integer(1, 5000), default=50, help="mining: numbers kept of each search")
    g.add_argument("--mine-start", type=integer(0), default=200, help="mining: first step")

    g = p.add_argument_group("model")
    g.add_argument("--model", choices=["closed", "linear", "mlp"], default="mlp", help="closed: no net, no training")
    g.add_argument("--base", choices=["none", "log", "closed", "window"], default="window",
                   help="added to the net: nothing, log2 n, the closed form, or log2 T^j(n) inside the closed form")
    g.add_argument("--layers", type=widths, default="64,64", help="hidden widths of mlp")
    g.add_argument("--features", choices=["window", "original"], default="window", help="what the net sees")
    g.add_argument("--sees", type=integer(0), default=0,
                   help="values of k that the net sees; 0: 1 with base window, else all (fewer: only with base log)")
    g.add_argument("--digits", type=integer(0, RESIDUE_DIGITS), default=12, help="it sees statistics of n mod 3^DIGITS")
    g.add_argument("--hold", type=integer(0), default=1, help="base window: rising steps that its end may stand still")
    g.add_argument("--tie-break", type=real(0, 0.4, above=True), default=1e-3, help="bits a step that a maximum sinks")
    g.add_argument("--mod3", action="store_true", help="one bit more where 3 | n: such n have no predecessor")

    g = p.add_argument_group("loss")
    g.add_argument("--loss", choices=["ramp", "hinge"], default="ramp", help="bounded, or the original's ranking loss")
    g.add_argument("--margin", type=real(0), default=0.0, help="by how much V should fall (bits; nats with base none)")
    g.add_argument("--tau-start", type=real(0, above=True), default=1.0, help="ramp: temperature at step 0, bits")
    g.add_argument("--tau-end", type=real(0, above=True), default=0.05, help="ramp: the same after 70 %% of the steps")
    g.add_argument("--use-t4", action="store_true", help="also ask V(T^4(n)) < V(n), weight 0.5")
    g.add_argument("--use-t8", action="store_true", help="also ask V(T^8(n)) < V(n), weight 0.2")
    g.add_argument("--target-type", choices=["none", "fixed", "adaptive"], default="none",
                   help="anchor loss: pull V to log n + beta drift, beta 0.35 or learned")

    g = p.add_argument_group("optimization")
    g.add_argument("--steps", "--epochs", type=integer(1), default=400, help="optimizer steps (the original's epochs)")
    g.add_argument("--batch-size", type=integer(1), default=512, help="chains per step")
    g.add_argument("--lr", type=real(0, above=True), default=3e-3, help="peak rate of AdamW; Muon's is 5 times that")
    g.add_argument("--optimizer", choices=["adamw", "muon"], default="muon", help="muon: for all matrices but the last")
    g.add_argument("--clip", type=real(0), default=1.0, help="gradient norm; 0: no clipping")

    g = p.add_argument_group("evaluation")
    g.add_argument("--eval-csv", metavar="PATH", help="evaluation rows; default: the original's 50,000, made in memory")
    g.add_argument("--eval-interval", type=integer(1), default=200, help="steps between evaluations on the test sets")
    g.add_argument("--quick-eval-interval", type=integer(1), default=100, help="steps between validations and saves")
    g.add_argument("--eval-trajectories", type=integer(1), default=200, help="random 128-bit ones to evaluate on")
    g.add_argument("--validation-rows", type=integer(1), default=10_000, help="numbers for choosing best.pt")
    g.add_argument("--validation-trajectories", type=integer(1), default=100, help="trajectories for choosing best.pt")
    g.add_argument("--exhaustive", type=integer(4, 2**53), metavar="N", help="at the end, check every odd n < N")

    g = p.add_argument_group("instead of training")
    g.add_argument("--checkpoint", metavar="PATH", help="a trained V: evaluate it (also --exhaustive), or --score")
    g.add_argument("--score", metavar="N,N|FILE", help="print n, T(n), V(n), V(T(n)) and the margin as CSV")
    g.add_argument("--analyze-seeds", type=odd_numbers, metavar="N,N", help="print length and height of trajectories")
    g.add_argument("--make-eval", metavar="PATH", help="write the original's evaluation set as CSV")
    g.add_argument("--plot", nargs="+", metavar="RUN", type=Path, help="draw the pictures of these runs again")
    run.add_run_arguments(p)

    p.set_defaults(**RECIPES[p.parse_known_args(argv)[0].recipe])
    args = run.parse(p, argv)
    if args.eval_csv:
        args.eval_csv = os.path.abspath(args.eval_csv)  # a resumed run may start elsewhere
    if "hold" not in args.given:
        args.hold = min(args.hold, args.lookahead - (args.sees or 1))
    L, q, n_hard = args.lookahead, args.sees or 1, int(args.hard_ratio * args.batch_size)
    n_seeds = len(set(ORIGINAL_SEEDS) - set(args.test_seeds)) if args.recipe == "original" else args.train_seeds
    need = memory_needed(args)
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 34
    for wrong, message in (
        (args.sees > L, f"--sees: {args.sees} values of k with --lookahead {L}"),
        (args.base in ("none", "closed") and args.sees not in (0, L),
         f"--sees: with --base {args.base} the net sees all {L} values of k"),
        (args.model != "closed" and args.base == "window" and args.hold > L - q,
         f"--hold: {args.hold} is more than lookahead - sees = {L - q}"),
        (args.mod3 and args.model != "closed", "--mod3: for --model closed; a net learns this from the residue"),
        (args.curriculum and args.start_seeds > n_seeds, f"--start-seeds: {args.start_seeds} of {n_seeds} seeds"),
        (args.batch_size - n_hard > args.pool, f"--batch-size: more random numbers than the --pool of {args.pool} has"),
        (sum(map(bool, (args.analyze_seeds, args.make_eval, args.plot, args.score or args.checkpoint, args.resume)))
         > 1, "--checkpoint: one of --checkpoint, --score, --analyze-seeds, --make-eval, --plot, --resume at a time"),
        (args.score and args.exhaustive, "--score: not together with --exhaustive"),
        (args.resume and args.init_from, "--init-from: not together with --resume"),
        (args.out_dir == "", "--out-dir: empty"),
        (args.checkpoint and "model" in args.given, "--model: not together with --checkpoint, which has its own"),
        (args.checkpoint and set(args.given) & {"split", "test_seeds", "eval_trajectories"},
         "--checkpoint: it is evaluated on the test sets of its run; only --eval-csv may be another"),
        (args.tau_end > args.tau_start, "--tau-end: above --tau-start"),
        (args.schedule == "plateau" and args.optimizer == "muon", "--optimizer: the plateau schedule is for adamw"),
        (args.mine_negatives and args.hard_ratio == 0,
         "--mine-negatives: mined numbers get no share with --hard-ratio 0"),
        (need > 0.6 * have, f"--lookahead: {L}, with these pools, trajectories and layers, needs about "
         f"{need / 1e9:.0f} GB of the {have / 1e9:.0f} GB here"),
    ):
        if wrong:
            p.error(f"argument {message}")
    return args


# ---- Problem: the Syracuse map, exact

def syracuse(n: int) -> tuple[int, int]:
    """T(n) = (3n+1)/2^k and k, for odd n > 0 of any size."""
    x = 3 * n + 1
    k = (x & -x).bit_length() - 1
    return x >> k, k


def trajectory(n: int) -> list[int]:
    """n, T(n), ..., 1: the odd numbers on the way to 1, exact."""
    path = [n]
    while path[-1] != 1:
        path.append(syracuse(path[-1])[0])
    return path


def analyze(n: int) -> dict[str, int | float]:
    """Odd steps, total stopping time (halvings counted too), maximum odd value and its ratio to n, exact."""
    path = trajectory(n)
    halvings = sum(syracuse(m)[1] for m in path[:-1])
    return {"n": n, "odd_steps": len(path) - 1, "total_stopping_time": len(path) - 1 + halvings,
            "max_odd": max(path), "excursion_ratio": max(path) / n}


def to_limbs(numbers: Sequence[int]) -> np.ndarray:
    """Non-negative Python integers of any size as 32-bit limbs, least significant first: (limbs, N) uint64."""
    width = 4 * max(1, -(-max(n.bit_length() for n in numbers) // 32))
    raw = b"".join(n.to_bytes(width, "little") for n in numbers)
    return np.ascontiguousarray(np.frombuffer(raw, "<u4").reshape(len(numbers), -1).T.astype(np.uint64))


@cache
def halving_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """16 steps of f(x) = x/2 or (3x+1)/2 at once: f^16(2^16 a + b) = factor[b] a + rest[b] (Terras 1976). Bit i of
    parity[b] is the parity of f^i(b), which depends on b alone; the gaps between its ones are the k of T."""
    rest = np.arange(1 << 16, dtype=np.uint64)
    factor, parity = np.ones_like(rest), np.zeros(1 << 16, np.uint16)
    for i in range(16):
        odd = rest % 2 == 1
        parity |= odd.astype(np.uint16) << i
        rest = np.where(odd, 3 * rest + 1, rest) // 2
        factor = np.where(odd, 3 * factor, factor)
    return parity, factor, rest


def k_sequence(limbs: np.ndarray, m: int) -> np.ndarray:
    """k_1 .. k_m of odd numbers: T^j(n) = (3 T^(j-1)(n) + 1) / 2^(k_j). limbs (W, N) -> (N, m) int32, exact."""
    parity, factor, rest = halving_table()
    low16, low32, s16, s32 = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF), np.uint64(16), np.uint64(32)
    n_rows = limbs.shape[1]
    x = limbs                          # (W, rows), where each number stands
    rows = np.arange(n_rows)           # those that have not shown m + 1 odd numbers yet
    ones = np.zeros(n_rows, np.int64)  # odd numbers shown so far
    words = []                         # their parities, 16 halving steps a word
    while len(rows):
        b = (x[0] & low16).astype(np.int64)
        words.append(np.zeros(n_rows, "<u2"))
        words[-1][rows] = parity[b]
        ones[rows] += np.bitwise_count(parity[b])
        a = x >> s16
        a[:-1] |= (x[1:] & low16) << s16  # x = 2^16 a + b
        y = np.empty((len(x) + 1, len(rows)), np.uint64)
        by, carry = factor[b], rest[b]
        for i, limb in enumerate(a):
            carry = carry + limb * by  # < 2^32 3^16 + 2^64 / 2^32: no overflow
            y[i], carry = carry & low32, carry >> s32
        y[-1] = carry
        x, keep = y, ones[rows] <= m
        if not keep.all():
            rows, x = rows[keep], y[:, keep]
        while len(x) > 1 and not x[-1].any():
            x = x[:-1]
    bits = np.unpackbits(np.stack(words, axis=1).view(np.uint8), axis=1, bitorder="little").view(bool)
    first = np.cumsum(ones) - ones
    at = np.flatnonzero(bits)[first[:, None] + np.arange(m + 1)].T.astype(np.int32)  # of the first m + 1 odd numbers
    return (at[1:] - at[:-1]).T  # step by step in memory, as the loops over steps below read it


def log2_limbs(limbs: np.ndarray) -> np.ndarray:
    """log2 of positive numbers of any size from their three top limbs: (W, N) -> (N,) float64, relative error 2^-52."""
    at = len(limbs) - 1 - np.argmax(limbs[::-1] > 0, axis=0)
    columns = np.arange(limbs.shape[1])
    top = [np.where(at >= i, limbs[np.maximum(at - i, 0), columns], 0).astype(np.float64) for i in range(3)]
    return np.log2(top[0] + top[1] * 2.0**-32 + top[2] * 2.0**-64) + 32.0 * at


def log2_path(lg0: np.ndarray, k: np.ndarray) -> np.ndarray:
    """log2 T^j(n), j = 0..m, from log2 n (N,) and k (N, m) by log2 T = log2 n + log2(3 + 1/n) - k: (N, m+1) float64."""
    out, kt = np.empty((k.shape[1] + 1, len(lg0))), k.T
    out[0], inverse = lg0, np.exp2(-lg0)  # inverse: 1/n
    huge = lg0.max(initial=0) > 1000      # 1/n may round to 0, which is exact enough, but not for ever
    for j in range(len(kt)):
        s = 3.0 + inverse
        out[j + 1] = out[j] + np.log2(s) - kt[j]
        inverse = np.exp2(-out[j + 1]) if huge else np.ldexp(inverse, kt[j]) / s
    return out.T


def modular_path(limbs: np.ndarray, k: np.ndarray, modulus: int) -> np.ndarray:
    """T^j(n) modulo an odd number < 2^31, j = 0..m: (W, N) and (N, m) -> (N, m+1) unsigned, exact."""
    r = np.zeros(limbs.shape[1], np.uint64)
    for limb in limbs[::-1]:
        r = ((r << np.uint64(32)) | limb) % np.uint64(modulus)
    half = np.ones(int(k.max(initial=0)) + 1, np.uint64)
    for i in range(1, len(half)):
        half[i] = int(half[i - 1]) * ((modulus + 1) // 2) % modulus  # 2^-i
    out = np.empty((k.shape[1] + 1, len(r)), np.uint64)
    out[0] = r
    for j, factor in enumerate(half[k.T]):
        x = (3 * out[j] + 1) * factor  # < 3 2^31 2^31: no overflow
        out[j + 1] = x - x // modulus * modulus  # 4 times as fast as %
    return out.T


def fingerprint(limbs: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Residues of T^j(n) modulo two primes near 2^31 in one uint64 (N, m+1): equal numbers always agree, different ones
    below 2^61 never. Membership in a set is tested on it, so that a number that is in the set cannot slip through."""
    return modular_path(limbs, k, 2147483647) << np.uint64(31) | modular_path(limbs, k, 2147483629)


@dataclass
class Paths:
    """n, T(n), ..., T^m(n) for N numbers: what every V is a function of."""
    k: np.ndarray    # (N, m) int32
    lg: np.ndarray   # (N, m+1) float64, log2 T^j(n)
    res: np.ndarray  # (N, m+1) int32, T^j(n) modulo RESIDUE

    def __len__(self) -> int:
        return len(self.k)

    def __getitem__(self, rows) -> Paths:
        return Paths(self.k[rows], self.lg[rows], self.res[rows])


def paths(limbs: np.ndarray, m: int, chunk: int = 8192) -> Paths:
    """The first m steps of N odd numbers, limbs (W, N), in chunks that stay in the processor's cache."""
    n = limbs.shape[1]
    out = Paths(np.empty((m, n), np.int32).T, np.empty((m + 1, n)).T, np.empty((m + 1, n), np.int32).T)
    for lo in tqdm(range(0, n, chunk), desc="paths", unit="chunk", delay=5, leave=False, disable=None):
        part, rows = limbs[:, lo:lo + chunk], slice(lo, lo + chunk)
        out.k[rows] = k_sequence(part, m)
        out.lg[rows] = log2_path(log2_limbs(part), out.k[rows])
        out.res[rows] = modular_path(part, out.k[rows], RESIDUE)
    return out


def full_paths(limbs: np.ndarray, beyond: int) -> Paths:
    """Paths long enough that every number has come to 1 and stayed there for `beyond` steps (T(1) = 1)."""
    m = 64
    while ((p := paths(limbs, m + beyond)).lg[:, m] > 0.5).any():
        m *= 2
    m = int((p.lg > 0.5).sum(axis=1).max()) + beyond
    return Paths(p.k[:, :m], p.lg[:, :m + 1], p.res[:, :m + 1])

# ---- Data: evaluation sets, what they forbid, training pools

def random_odd(rng: np.random.Generator, n: int, min_bits: int, max_bits: int) -> np.ndarray:
    """n random odd numbers > 1 whose bit length is uniform in [min_bits, max_bits], as limbs (W, n)."""
    bits = rng.integers(min_bits, max_bits + 1, n)
    limb = 32 * np.arange(-(-max_bits // 32))[:, None]
    x = rng.integers(0, 1 << 32, (len(limb), n), dtype=np.uint64)
    x &= (np.uint64(1) << np.clip(bits - limb, 0, 32).astype(np.uint64)) - np.uint64(1)
    x[(bits - 1) // 32, np.arange(n)] |= np.uint64(1) << ((bits - 1) % 32).astype(np.uint64)  # the top bit
    x[0] |= np.uint64(1)
    return x


def eval_numbers(rows: int = EVAL_ROWS, seed: int = EVAL_SEED) -> list[int]:
    """The original evaluation set: distinct odd numbers of 2..128 bits, bit length uniform, from Python's generator."""
    rng, seen = random.Random(seed), {}
    while len(seen) < rows:
        bits = rng.randint(2, 128)
        n = rng.randint(2 ** (bits - 1), 2**bits - 1)
        seen[n + 1 - n % 2] = None
    return list(seen)


def peak_log2(limbs: np.ndarray) -> np.ndarray:
    """log2 of the highest number, even ones counted, on the way of each odd number > 1 to 1. (W, N) -> (N,)"""
    peak, m, rows = np.empty(limbs.shape[1]), 128, np.arange(limbs.shape[1])
    while len(rows):
        left = []
        for part in np.array_split(rows, max(1, len(rows) // 4096)):
            x = limbs[:, part]
            lg = log2_path(log2_limbs(x), k_sequence(x, m))
            top = lg[:, :-1].max(axis=1)
            peak[part] = np.where(top < 1000, np.log2(3 * np.exp2(np.minimum(top, 1000)) + 1), top + LOG2_3)
            left.append(part[lg[:, -1] > 0.5])
        rows, m = np.concatenate(left), 2 * m
    return peak


def default_rows() -> tuple[np.ndarray, np.ndarray]:
    """The original evaluation set: limbs (W, N), weights (N,) = 1 + log10(highest number on the way / n), 4 places."""
    limbs = to_limbs(eval_numbers())
    return limbs, np.round(1 + (peak_log2(limbs) - log2_limbs(limbs)) * math.log10(2), 4)


def make_eval_csv(path: str) -> None:
    """Write the original evaluation set with its columns, computed with Python integers. Raises OSError."""
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(EVAL_COLUMNS)
        for n in tqdm(eval_numbers(), desc=path, unit="row"):
            a, t1 = analyze(n), syracuse(n)[0]
            peak = 3 * a["max_odd"] + 1
            out.writerow([n, t1, t1 > n, a["total_stopping_time"], peak, f"{1 + math.log10(peak / n):.4f}"])


def read_eval_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an evaluation CSV and verify it: limbs and weights as default_rows. Raises UserError naming the line: column
    missing, t1 not T(n), n repeated, weight not finite or below 1."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make it with: python collatz.py --make-eval {path}")
    weight = {}  # by n
    with open(path, newline="", errors="replace", encoding="utf-8-sig") as f:
        table = csv.DictReader(f)
        missing = [c for c in EVAL_COLUMNS if c not in (table.fieldnames or [])]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; it needs {', '.join(EVAL_COLUMNS)}")
        for row in table:
            where = f"{path}, line {table.line_num}"
            n = odd_number(row["n"] or "", where)
            try:
                t1, w = int(row["t1"]), float(row["w_expansion"])
            except (TypeError, ValueError):
                what = f"t1 {row['t1']!r} or w_expansion {row['w_expansion']!r}"
                raise UserError(f"{where}: {what} is not a number") from None
            if t1 != syracuse(n)[0]:
                raise UserError(f"{where}: t1 = {t1}, but T({n}) = {syracuse(n)[0]}")
            if n in weight:
                raise UserError(f"{where}: {n} stands there twice")
            if not 1 <= w < math.inf:
                raise UserError(f"{where}: w_expansion {w} is not a finite number >= 1")
            growth = row["is_growth"] or ""
            if (growth.strip().lower() in ("true", "1")) != (t1 > n):
                raise UserError(f"{where}: is_growth {growth!r}, but n = {n}, t1 = {t1}")
            weight[n] = w
    if not weight:
        raise UserError(f"{path}: no rows")
    return to_limbs(list(weight)), np.array(list(weight.values()))


@dataclass
class Exam:
    """Everything that a V is examined on. Sets of numbers have lookahead + 1 steps; walks go on until after 1."""
    rows: Paths                # the evaluation set
    weight: np.ndarray         # of its rows
    walks: dict[str, Paths]    # test, record: trajectories of these seeds; random, validation: of random numbers
    test_seeds: list[int]
    validation_rows: Paths     # for choosing best.pt, as are walks["validation"]; none of them is in the sets above
    validation_steps: np.ndarray  # which steps of those walks are not: near 1 all trajectories meet
    forbidden: np.ndarray      # sorted fingerprints of all of them: what the honest split keeps out of training


def make_exam(args: argparse.Namespace) -> Exam:
    """Build the evaluation sets. They do not depend on --seed, so all runs are compared on the same numbers."""
    rows, weight = read_eval_csv(args.eval_csv) if args.eval_csv else default_rows()
    rng, m = [np.random.default_rng([EVAL_SEED, i]) for i in range(3)], args.lookahead + 1
    validation_rows = random_odd(rng[1], args.validation_rows, 2, 128)
    start = {"test": to_limbs(args.test_seeds), "record": to_limbs(RECORD_SEEDS),
             "random": random_odd(rng[0], args.eval_trajectories, 128, 128),
             "validation": random_odd(rng[2], args.validation_trajectories, 8, 128)}
    walks = {name: full_paths(limbs, beyond=max(m, LOOKAHEADS[-1] + 1) if name == "random" else m)
             for name, limbs in start.items()}
    keys = {name: fingerprint(limbs, walks[name].k) for name, limbs in start.items()}
    row_keys, new_keys = (fingerprint(x, np.empty((x.shape[1], 0), np.int32))[:, 0] for x in (rows, validation_rows))
    test_keys = np.unique(np.concatenate([row_keys, *(keys[name].ravel() for name in ("test", "record", "random"))]))
    new = ~member(keys["validation"], test_keys)
    first = np.unique(new_keys, return_index=True)[1]
    first = np.sort(first[~member(new_keys[first], test_keys)])
    forbidden = np.unique(np.concatenate([test_keys, new_keys, keys["validation"].ravel()]))
    return Exam(paths(rows, m), weight, walks, args.test_seeds, paths(validation_rows[:, first], m),
                new[:, :-1] & new[:, 1:], forbidden)


def member(keys: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Which keys stand in the sorted array `of`, which is not empty; shape of keys."""
    return of[np.minimum(np.searchsorted(of, keys), len(of) - 1)] == keys


# Training data are chains n, T(n), ...: tensors k (N, M) uint8, lg (N, M+1) float32, res (N, M+1) int32, and ok (N, C)
# bool, which says of the first C numbers, those at which the net is evaluated, whether they may be trained on.
Chains = dict[str, torch.Tensor]
Part = tuple[Chains, int, float, float]  # of a batch: chains, steps counted on each, share of the loss, their weight
Value = Callable[[Paths], np.ndarray]    # V at the first nodes of paths: (N, P) float64


def take(chains: Chains, rows) -> Chains:
    return {name: x[rows] for name, x in chains.items()}


def join(a: Chains, b: Chains) -> Chains:
    return {name: torch.cat([x, b[name]]) for name, x in a.items()}


def make_chains(p: Paths, keys: np.ndarray, args: argparse.Namespace, exam: Exam) -> tuple[Chains, np.ndarray]:
    """Chains of paths (N, M steps) with the fingerprints (N, M+1) of their numbers; the honest split masks a number
    that is forbidden or whose T is. Also counts distinct numbers: trained on, masked, and forbidden but not masked."""
    used = p.k.shape[1] - model_config(args).sees + 1
    bad = member(keys, exam.forbidden)
    bad = bad[:, :used] | bad[:, 1:used + 1]
    live = p.lg[:, :used] > 0.5  # n > 1
    ok = live & ~bad if args.split == "honest" else live
    counts = np.array([len(np.unique(keys[:, :used][mask])) for mask in (ok, live & ~ok, ok & bad)])
    arrays = {"k": np.minimum(p.k, 255).astype(np.uint8), "lg": p.lg.astype(np.float32), "res": p.res, "ok": ok}
    return {name: torch.from_numpy(x) for name, x in arrays.items()}, counts


def random_chains(rng: np.random.Generator, n: int, length: int, args: argparse.Namespace,
                  exam: Exam) -> tuple[Chains, np.ndarray]:
    """Chains of `length` steps from random odd numbers of 2..max_bits bits (original recipe: 3..max_bits-3)."""
    lo, hi = (3, args.max_bits - 3) if args.recipe == "original" else (2, args.max_bits)
    limbs = random_odd(rng, n, lo, hi)
    p = paths(limbs, length + args.lookahead)
    return make_chains(p, fingerprint(limbs, p.k), args, exam)


def trajectory_chains(limbs: np.ndarray, rng: np.random.Generator, length: int, args: argparse.Namespace,
                      exam: Exam) -> tuple[Chains, np.ndarray, np.ndarray]:
    """Chains of `length` steps, one every --segment steps of the trajectories of the seeds; where each seed's begin."""
    m = length + args.lookahead
    parts, keys, n_chains = [], [], []
    for lo in range(0, limbs.shape[1], 512):
        p = full_paths(limbs[:, lo:lo + 512], beyond=m)
        at = [np.arange(rng.integers(min(args.segment, n)), n, args.segment) for n in (p.lg > 0.5).sum(axis=1)]
        n_chains += [len(a) for a in at]
        row = np.repeat(np.arange(len(at)), n_chains[lo:])[:, None]
        span = np.concatenate(at)[:, None] + np.arange(m + 1)
        parts.append(Paths(p.k[row, span[:, :-1]], p.lg[row, span], p.res[row, span]))
        keys.append(fingerprint(limbs[:, lo:lo + 512], p.k)[row, span])
    p = Paths(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Paths)))
    return *make_chains(p, np.concatenate(keys), args, exam), np.concatenate([[0], np.cumsum(n_chains)])


# ---- Model. B chains, P nodes n, T(n), ... on each, L lookahead, the net sees q values of k, J = L - q, F features

@dataclass
class Config:
    """All that is needed to rebuild a model; stored in its checkpoint."""
    lookahead: int = 10
    base: str = "window"          # none: V = net; log: log2 n + net; closed: closed form + net; window: net in maximum
    layers: tuple[int, ...] | None = (64, 64)  # hidden widths; () is linear; None: no net
    features: str = "window"      # window or original
    sees: int = 1                 # q: values of k that the net sees; the maximum runs over the L - q nodes behind
    digits: int = 12              # the net sees statistics of the past of n given n mod 3^digits
    hold: int = 0                 # window: up to this many rising steps the end of the window stands still
    tie_break: float = 1e-3       # bits a step: an old maximum sinks by this much, so that standing still is a decrease
    mod3: bool = False            # add 1 bit when 3 | n: such n have no predecessor, so nothing is lost
    anchor: bool = False          # has the scalar beta of the anchor loss

    @property
    def window(self) -> int:
        """J: V(n) is the maximum over the J + 1 nodes n .. T^J(n)."""
        return self.lookahead - self.sees if self.base in ("window", "log") else 0

    @property
    def pooled(self) -> bool:
        """Base log, a net that sees fewer than L values of k: a maximum over the window too, but all of it learned."""
        return self.base == "log" and self.window > 0


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def original_features(lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
    """The original's 6 + L inputs: log10 n / 40, n mod 3, 9, 27, 81, the drift over the window / 10, and the k / 10."""
    drift = k.shape[-1] * LOG2_3 - k.float().sum(-1)
    x = [lg[..., 0] * (math.log10(2) / 40), *(res % m / (m - 1) for m in (3, 9, 27, 81)), drift / 10]
    return torch.cat([torch.stack(x, -1), k.clamp(max=10) / 10], -1)


@cache
def residue_statistics(digits: int) -> np.ndarray:
    """What n mod 3^digits tells of the past of n on a long trajectory: (3^digits, 3 + digits) float32.
    Columns: log2 of the stationary density relative to uniform (clipped to +-4, halved); P(last k = 1); P(last k = 2);
    E[log2 n - log2 of the node j steps ago] / 2, j = 1..digits. Exact recursion over n = (3m + 1) / 2^k, P(k) = 2^-k,
    k < 40 (the Syracuse random variables of Tao, arXiv:1909.03562, section 1.3)."""
    density, first, rise = np.ones(1), np.zeros((1, 2)), np.zeros((1, 0))
    for d in range(1, digits + 1):
        size, m3 = 3**d, 3 * np.arange(3 ** (d - 1)) + 1
        mass, first, up = np.zeros(size), np.zeros((size, 2)), np.zeros((size, d))
        before = np.pad(rise, ((0, 0), (1, 0)))  # of m, seen from n one step later
        for k in range(1, 40):
            n, w = m3 * pow(2, -k, size) % size, 2.0**-k * density
            mass[n] += w
            if k <= 2:
                first[n, k - 1] = w
            up[n] += w[:, None] * (before + (LOG2_3 - k))
        some = np.maximum(mass, 1e-30)[:, None]
        first, rise, density = first / some, up / some, 3 * mass
    log_density = np.clip(np.log2(np.maximum(density, 1e-9)), -4, 4) / 2
    return np.concatenate([log_density[:, None], first, rise / 2], axis=1).astype(np.float32)


class Lyapunov(nn.Module):
    """V for chains of numbers. Given nodes n .. T^(P-1+L)(n), V at the first P of them.

    base window:  W_i = log2 T^i(n) + net(T^i(n)) + tie_break i,   V(T^i(n)) = max_{0<=j<=J} W_{i+j} - tie_break i.
    Every node's W is one number that all V share, so V can only fail to decrease where a new W tops the last J + 1:
    the net decides how often that is. Without a net this is the closed form (window maximum with a time tie-break).
    base log with q < L:  V(n) = log2 n + max_{0<=j<=J} alpha (log2 T^j(n) - log2 n) + delta j + net(T^j(n)); alpha,
    delta and the net start at 0: nothing of the closed form is given. Otherwise J = 0: the net sees all L values of k.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.alpha, self.delta = (nn.Parameter(torch.zeros(())) if config.pooled else None for _ in range(2))
        self.beta = nn.Parameter(torch.tensor(0.35)) if config.anchor else None
        if config.layers is not None and config.features == "original":
            self.layers = mlp([6 + config.sees, *config.layers, 1], lambda: nn.LeakyReLU(0.1))
        elif config.layers is not None:
            self.register_buffer("statistics", torch.from_numpy(residue_statistics(config.digits)), persistent=False)
            self.layers = mlp([6 + 5 * config.sees + config.digits, *config.layers, 1], nn.GELU)
            self.layers[-1] = nn.Linear(self.layers[-1].in_features, 1, bias=False)  # margins lose a constant
            nn.init.zeros_(self.layers[-1].weight)

    def net(self, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """The net at each node. lg (..., q+1), k (..., q), res (...) -> (...)"""
        if self.config.features == "original":
            return self.layers(original_features(lg, k, res)).squeeze(-1)
        here, rise = lg[..., :1], lg[..., 1:] - lg[..., :1]
        x = [here / 64 - 1, torch.log2(here + 1) / 3 - 1, torch.relu(rise.amax(-1, keepdim=True)) / 2, rise / 4,
             k.clamp(max=10) / 5 - 0.4, *((k == i).float() for i in (1, 2, 3)),
             self.statistics[res % len(self.statistics)]]
        return self.layers(torch.cat(x, -1)).squeeze(-1)  # (..., F) -> (...)

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.zeros(())).device

    def clock(self, lg: torch.Tensor) -> torch.Tensor:
        """Steps taken so far; the clock stands still at 1. lg (B, M) -> (B, M)"""
        return F.pad(torch.cumsum(lg[:, :-1] > 0.5, 1), (1, 0)).to(lg.dtype)  # log2 of 1 is 0, of 3 it is 1.58

    def end(self, k: torch.Tensor) -> torch.Tensor:
        """The last j of each node's maximum, k (B, P-1+L) -> (B, P): J, or J - hold + the leading k = 1 (hold at most).
        While n rises (k = 1) the end stands still: no new number comes in, so V fails on falling steps alone."""
        c = self.config
        nodes = k.shape[1] - c.lookahead + 1
        if c.hold == 0:
            return torch.full((len(k), nodes), c.window, device=k.device)
        rising = torch.cumprod(k.unfold(1, c.hold, 1)[:, :nodes] == 1, -1).sum(-1)
        return c.window - c.hold + rising

    def maximum(self, w: torch.Tensor, end: torch.Tensor, lg: torch.Tensor) -> torch.Tensor:
        """V at the first P nodes from W (B, P+J), the ends of their windows (B, P) and log2 (B, P+L). -> (B, P)"""
        j, n = torch.arange(self.config.window + 1, device=w.device), end.shape[1]
        v = torch.where(j <= end[..., None], w.unfold(1, len(j), 1), -math.inf).amax(-1)
        if self.config.pooled:
            return v + (1 - self.alpha).to(lg) * lg[:, :n] - self.delta.to(lg) * self.clock(lg)[:, :n]
        return v - self.config.tie_break * self.clock(lg)[:, :n] if self.config.base == "window" else v

    def forward(self, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """W at the first P + J nodes (see the class). lg (B, P+L), k (B, P-1+L), res (B, P+L) -> (B, P+J), dtype of lg.
        The net computes in float32 on its own device; what is added to it keeps the precision and device of lg."""
        c = self.config
        nodes = lg.shape[1] - c.sees  # P + J
        clock = self.clock(lg)
        if c.base == "closed":
            w = (lg + c.tie_break * clock).unfold(1, c.lookahead + 1, 1).amax(-1) - c.tie_break * clock[:, :nodes]
        elif c.pooled:
            w = (self.alpha.to(lg) * lg + self.delta.to(lg) * clock)[:, :nodes]
        else:
            w = lg[:, :nodes] + (c.tie_break * clock[:, :nodes] if c.base == "window" else 0)
        if c.layers is None:
            return w
        at = self.device
        near = lg.to(at, torch.float32).unfold(1, c.sees + 1, 1)  # (B, P+J, q+1)
        u = self.net(near, k.to(at).unfold(1, c.sees, 1)[:, :nodes], res[:, :nodes].to(at)).to(lg.device, lg.dtype)
        return F.softplus(u) + 1e-6 if c.base == "none" else w + u

    def value(self, p: Paths) -> np.ndarray:
        """V at the first P nodes of each path with P-1+L values of k: (N, P) float64, positive.
        log2(1 + 2^x) makes any x positive and keeps the sign of every margin; at large x it is x."""
        c, out = self.config, []
        chunk = max(1, 16384 // (p.lg.shape[1] - c.lookahead))
        with eval_mode(self):
            for lo in tqdm(range(0, len(p), chunk), desc="V", unit="chunk", delay=5, leave=False, disable=None):
                q = p[lo:lo + chunk]
                lg = torch.from_numpy(np.ascontiguousarray(q.lg))
                w = self(lg, torch.from_numpy(np.minimum(q.k, 255)), torch.from_numpy(np.ascontiguousarray(q.res)))
                x = self.maximum(w, self.end(torch.from_numpy(q.k)), lg)
                if c.mod3:
                    x = x + torch.from_numpy(q.res[:, :x.shape[1]] % 3 == 0)
                out.append((x if c.base == "none" else torch.logaddexp2(x, torch.zeros_like(x))).numpy())
        return np.concatenate(out)


# ---- Loss, optimizer

def top(x: torch.Tensor, tau: float) -> torch.Tensor:
    """Maximum over the last axis; soft at temperature tau > 0, so that every entry near the top gets a gradient."""
    if x.shape[-1] == 1 or tau == 0:
        return x.amax(-1)
    return tau * torch.logsumexp(x / tau, -1)


def gaps(w: torch.Tensor, end: torch.Tensor, window: int, s: int, n: int, tau: float) -> torch.Tensor:
    """By how much V falls from node i to node i+s, i < n, told by the W that the two maxima do not share: top of the W
    that V(i) sees, less top of those that only V(i+s) sees; negative exactly where V rises. With J = 0 it is
    V(i) - V(i+s). w (B, P+J), end (B, P): node i sees W_i .. W_(i+end_i) -> (B, n)"""
    seen, j = w.unfold(1, window + 1, 1), torch.arange(window + 1, device=w.device)  # (B, P, J+1)
    e, e_s = end[:, :n, None], end[:, s:s + n, None]
    old = torch.where(j <= e, seen[:, :n], -1e4)
    new = torch.where((j + s > e) & (j <= e_s), seen[:, s:s + n], -1e4)
    return top(old, tau) - top(new, tau)


def falls(model: Lyapunov, data: Chains, w: torch.Tensor, s: int, n: int, tau: float) -> torch.Tensor:
    """What the loss asks to be positive where V(T^(i+s)) < V(T^i), i < n. W (B, P+J) -> (B, n)"""
    end = model.end(data["k"])
    if model.config.pooled:  # here V has a part outside the maximum
        v = model.maximum(w, end, data["lg"])
        return v[:, :n] - v[:, s:s + n]
    return gaps(w, end, model.config.window, s, n, tau)


def edge_loss(gap: torch.Tensor, margin: float, tau: float) -> torch.Tensor:
    """ramp: sigmoid((margin - gap) / tau), which is bounded: a step that cannot be saved costs no more than 1. tau = 0
    is the hinge max(0, margin - gap), the original's ranking loss, which spreads small failures over many steps."""
    return torch.sigmoid((margin - gap) / tau) if tau else F.relu(margin - gap)


def tau_at(step: int, args: argparse.Namespace) -> float:
    """Temperature of ramp and soft maximum: tau-start to tau-end, geometric over 70 % of the steps; 0 for the hinge."""
    if args.loss == "hinge":
        return 0.0
    return args.tau_start * (args.tau_end / args.tau_start) ** min(1.0, step / (0.7 * args.steps))


def batch_loss(model: Lyapunov, parts: list[Part], args: argparse.Namespace, step: int) -> torch.Tensor:
    """Loss of a batch, all its terms: decrease over 1, 4, 8 steps, and the anchor."""
    c, tau = model.config, tau_at(step, args)
    total = torch.zeros((), device=model.device)
    for data, n, share, weight in parts:
        w = model(data["lg"], data["k"], data["res"])
        for s, coefficient in jumps(args):
            ok = data["ok"].unfold(1, s + c.window + 1, 1)[:, :n].all(-1)  # every number that the two V look at
            loss = edge_loss(falls(model, data, w, s, n, tau), args.margin, tau) * ok
            if s == 1:
                loss = loss * torch.where(data["k"][:, :n] == 1, args.growth_weight, 1.0) * weight  # k = 1: T(n) > n
            total = total + share * coefficient * loss.sum() / ok.sum().clamp(min=1)
        if args.target_type != "none":
            drift = c.lookahead * LOG2_3 - data["k"][:, :c.lookahead].float().sum(1)
            v = model.maximum(w, model.end(data["k"]), data["lg"])
            target = data["lg"][:, 0] * (math.log(2) if c.base == "none" else 1.0) + model.beta * drift  # none: nats
            ok = data["ok"][:, :c.window + 1].all(-1)
            anchor = 0.001 ** min(1.0, max(0.0, (step - ANCHOR_START) / ANCHOR_LEN))
            total = total + share * anchor * ((v[:, 0] - target).square() * ok).sum() / ok.sum().clamp(min=1)
    return total


def jumps(args: argparse.Namespace) -> list[tuple[int, float]]:
    """The s for which V(T^s(n)) < V(n) is asked, with the original's coefficients."""
    return [(1, 1.0)] + [(4, 0.5)] * args.use_t4 + [(8, 0.2)] * args.use_t8


def make_optimizers(model: Lyapunov, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW; with muon, Muon for all matrices but the last (worth 3-4 times the steps) and AdamW for the rest."""
    if model.beta is not None:
        model.beta.requires_grad_(args.target_type == "adaptive")
    hidden = [m.weight for m in model.layers[:-1] if isinstance(m, nn.Linear)] if args.optimizer == "muon" else []
    scales = [model.alpha, model.delta] if model.config.pooled else []
    taken = {id(p) for p in [*hidden, *scales]}
    groups = [{"params": [p for p in model.parameters() if id(p) not in taken and p.requires_grad]}]
    if scales:
        groups.append({"params": scales, "lr": 7 * args.lr})  # alpha has to come from 0 to about 1
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=5 * args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def lr_factor(step: int, args: argparse.Namespace) -> float:
    """Learning rate over its peak at a step: 30 steps of warm-up, flat to 40 %, then linear to 0."""
    return min(1.0, (step + 1) / 30) * min(1.0, (1 - step / args.steps) / 0.6)


# ---- Batches

@dataclass
class Pools:
    """What batches are drawn from. Mined chains are added during the run."""
    hard: Chains          # of trajectories, seed after seed
    first: np.ndarray     # (seeds+1,): the chains of seed i are first[i] .. first[i+1]-1
    random: Chains        # of random numbers
    counts: np.ndarray    # numbers trained on, masked, leaked: distinct within hard, random and each search of mine()
    mined: Chains | None = None


def make_pools(args: argparse.Namespace, exam: Exam) -> Pools:
    """The pools of a run. Raises UserError when a batch wants more chains than there are."""
    rng, beyond = np.random.default_rng([args.seed, 1, 0]), jumps(args)[-1][0] - 1
    if args.recipe == "original":
        limbs = to_limbs([n // (n & -n) for n in ORIGINAL_SEEDS if n not in args.test_seeds])  # 54 as its odd part
    else:
        limbs = random_odd(rng, args.train_seeds, 8, args.max_bits)
        if args.curriculum:  # short trajectories first
            limbs = limbs[:, np.argsort((full_paths(limbs, beyond=0).lg > 0.5).sum(axis=1), kind="stable")]
    hard, hard_counts, first = trajectory_chains(limbs, rng, args.segment + beyond, args, exam)
    if int(args.hard_ratio * args.batch_size) > first[-1]:
        raise UserError(f"--batch-size {args.batch_size}: more chains from trajectories than the {first[-1]} there are "
                        "(raise --train-seeds or lower --hard-ratio)")
    rand, counts = random_chains(rng, args.pool, 1 + beyond, args, exam)
    return Pools(hard, first, rand, hard_counts + counts)


def active_seeds(step: int, n_seeds: int, args: argparse.Namespace) -> int:
    """How many training seeds are in use: all, or with --curriculum from start-seeds to all over ramp-len steps."""
    if not args.curriculum:
        return n_seeds
    return int(args.start_seeds + (n_seeds - args.start_seeds) * min(1.0, step / args.ramp_len))


def draw(pools: Pools, args: argparse.Namespace, step: int, rng: np.random.Generator) -> list[Part]:
    """The parts of one batch, for batch_loss. A random active seed, then a random chain of it; or a mined chain."""
    n_hard, n_seeds = int(args.hard_ratio * args.batch_size), active_seeds(step, len(pools.first) - 1, args)
    rand = take(pools.random, rng.integers(0, args.pool, args.batch_size - n_hard))
    if n_seeds == 0:  # no seed yet: random numbers alone (the original fell back to a test seed)
        return [(rand, 1, 1.0, 1.0)]
    seed = rng.integers(0, n_seeds, n_hard)
    hard = take(pools.hard, pools.first[seed] + (rng.random(n_hard) * np.diff(pools.first)[seed]).astype(np.int64))
    if pools.mined is not None:
        n_mined = int(0.3 * n_hard)
        mined = take(pools.mined, rng.integers(0, len(pools.mined["k"]), n_mined))
        hard = join(take(hard, slice(n_mined, None)), mined)
    parts = [(hard, args.segment, args.hard_ratio, args.hard_weight), (rand, 1, 1 - args.hard_ratio, 1.0)]
    return [part for part in parts if len(part[0]["k"])]


def mine(model: Lyapunov, pools: Pools, args: argparse.Namespace, exam: Exam, step: int,
         rng: np.random.Generator) -> Chains:
    """The mined list with the mine-count chains whose first step has the lowest margin, of 5000 candidates, half
    from trajectories, half new random numbers; the newest 1000 stay."""
    beyond, window = jumps(args)[-1][0] - 1, model.config.window
    fresh, counts = random_chains(rng, 2500, args.segment + beyond, args, exam)
    pools.counts = pools.counts + counts
    active = pools.first[max(1, active_seeds(step, len(pools.first) - 1, args))]
    found = join(take(pools.hard, rng.integers(0, active, 2500)), fresh)
    with eval_mode(model):
        data = {name: x.to(model.device) for name, x in found.items()}
        gap = falls(model, data, model(data["lg"], data["k"], data["res"]), 1, 1, 0.0)[:, 0].cpu()
    gap = torch.where(found["ok"][:, :window + 2].all(-1), gap, math.inf)
    worst = take(found, torch.argsort(gap)[:args.mine_count])
    return worst if pools.mined is None else take(join(pools.mined, worst), slice(-1000, None))


# ---- Evaluation: what the figures mean

def holds(v: np.ndarray, v_next: np.ndarray) -> np.ndarray:
    """Where V decreases. A tie or a NaN is a violation."""
    return v - v_next > 0


def rates(ok: np.ndarray, weight: np.ndarray, growth: np.ndarray) -> dict[str, float]:
    """Pass rates over evaluation rows: plain, weighted by 1 + log10(excursion), the same where T(n) > n."""
    def mean(x: np.ndarray, w: np.ndarray) -> float:
        return float((x * w).sum() / w.sum()) if w.sum() else math.nan
    one, g = np.ones_like(weight), growth
    return dict(zip(RATES, (mean(ok, one), mean(ok, weight), mean(ok[g], one[g]), mean(ok[g], weight[g])), strict=True))


def walk_steps(value: Value, walks: Paths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V along full paths (N, P), where V falls (N, P-1), and which steps n -> T(n) count: n > 1 (N, P-1)."""
    v = value(walks)
    return v, holds(v[:, :-1], v[:, 1:]), walks.lg[:, :v.shape[1] - 1] > 0.5


def evaluate(value: Value, exam: Exam, full: bool = True) -> dict:
    """All figures of a V. full=False leaves out the tables and gives what metrics.csv has."""
    lg, growth = exam.rows.lg[:, 0], exam.rows.k[:, 0] == 1
    v = value(exam.rows)
    ok = holds(v[:, 0], v[:, 1])
    out = rates(ok, exam.weight, growth)
    v_test, test_ok, test_n = walk_steps(value, exam.walks["test"])
    _, walk_ok, walk_n = walk_steps(value, exam.walks["random"])
    out["violations_total"] = int((~test_ok & test_n).sum())
    out["on_trajectory_pass_rate"] = float(walk_ok[walk_n].mean())
    if not full:
        return out

    def by(names: Sequence, x: np.ndarray) -> dict[str, float]:
        return dict(zip(map(str, names), x.tolist(), strict=True))
    bad, fall = ~test_ok & test_n, np.where(test_n, v_test[:, :-1] - v_test[:, 1:], np.inf)
    out |= {"violations": by(exam.test_seeds, bad.sum(axis=1)), "odd_steps": by(exam.test_seeds, test_n.sum(axis=1)),
            "worst_margin": by(exam.test_seeds, fall.min(axis=1))}
    _, record_ok, record_n = walk_steps(value, exam.walks["record"])
    bad = (~record_ok & record_n).sum(axis=1)
    out |= {"records": by(RECORD_SEEDS, bad), "record_violations": int(bad.sum())}
    big = walk_n & (exam.walks["random"].lg[:, :walk_n.shape[1]] > 16)
    out |= {"on_trajectory_steps": int(walk_n.sum()), "on_trajectory_above_16_bits": float(walk_ok[big].mean())}
    free = exam.rows.res[:, 0] % 3 == 0
    out["not_divisible_by_3"] = rates(ok[~free], exam.weight[~free], growth[~free])
    bits = np.floor(lg).astype(int) + 1
    out["by_bits"] = {f"{lo}-{hi}": [int((ok & at).sum()), int(at.sum())]
                      for lo, hi in BIT_RANGES if (at := (bits >= lo) & (bits <= hi)).any()}
    # bits: V scaled so that its regression on log2 n has slope 1; a V that does not grow with n has no scale
    slope = float(np.polyfit(lg, v[:, 0], 1)[0]) if np.isfinite(v).all() and len(np.unique(lg)) > 1 else math.nan
    scale = slope if slope > 0.01 else math.nan
    margins = (v[:, 0] - v[:, 1]) / scale
    counts, edges = np.histogram(np.clip(np.nan_to_num(margins, nan=-4.0), -4, 8), bins=np.linspace(-4, 8, 121))
    return out | {"slope": slope, "v_min": float(min(v.min(), v_test.min())),
                  "v_above_log2n": np.quantile(v[:, 0] / scale - lg, [0, 1]).tolist(),
                  "margin_quantiles": by(QUANTILES, np.quantile(margins, QUANTILES)),
                  "margin_histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}


def baselines(lookahead: int) -> dict[str, Value]:
    """V that need no training. The linear mean is that of log2 T^j(n), j <= L: it fails where T^(L+1)(n) >= n."""
    closed = Config(lookahead, layers=None, sees=0)
    return {"linear mean": lambda p: np.lib.stride_tricks.sliding_window_view(p.lg, lookahead + 1, axis=1).mean(-1),
            "closed form": Lyapunov(closed).value, "closed + mod 3": Lyapunov(replace(closed, mod3=True)).value}


def lower_bound(lookahead: int) -> float:
    """Least share of violations on trajectories of a V that is smooth in log n and knows only k_1..k_L. For iid k, the
    windows of L + 1 values split into rotation classes; a class that rises needs a violation in each turn. So
    P(k_1 + ... + k_(L+1) <= (L+1) log2 3) / (L+1), where the sum is at most s iff s coin flips show L + 1 heads."""
    m = lookahead + 1
    s = math.floor(m * LOG2_3)
    return sum(math.comb(s, heads) for heads in range(m, s + 1)) / 2**s / m


def by_lookahead(walks: Paths, lookaheads: Sequence[int]) -> dict[str, dict[str, float]]:
    """Violation rates of the baselines on trajectories, and the bounds without and with residues, by lookahead."""
    out = {}
    for m in lookaheads:
        row = {"bound": lower_bound(m), "bound with residues": lower_bound(m + RESIDUE_DIGITS)}
        for name, value in baselines(m).items() if m + 1 < walks.k.shape[1] else ():
            _, ok, counts = walk_steps(value, walks)
            row[name] = float(1 - ok[counts].mean())
        out[str(m)] = row
    return out


def format_report(title: str, own: dict, rows: dict[str, dict]) -> str:
    """The table that a run ends with. own: figures of the V in question; rows: name -> figures of every V to show."""
    seeds, total = list(own["violations"]), sum(own["odd_steps"].values())
    lines = ["", title, f"  {'V':<16} violations  " + " ".join(f"{s:>7}" for s in seeds)
             + "    pass    wtd    growth  gr-wtd  not 3|n  on traj.  records"]
    for name, r in rows.items():
        shares = [*(r[key] for key in RATES), r["not_divisible_by_3"]["pass_rate"], r["on_trajectory_pass_rate"]]
        lines.append(f"  {name[:15]:<16}{r['violations_total']:>7}/{total}  "
                     + " ".join(f"{r['violations'][s]:>7}" for s in seeds) + "  "
                     + " ".join(f"{100 * x:7.3f}" for x in shares) + f"  {r['record_violations']:>5}")
    for name, extra in (("bound, k alone", 0), ("bound, residues", RESIDUE_DIGITS)):
        lines.append(f"  {name:<16}" + " " * 95 + f"{100 - 100 * lower_bound(own['lookahead'] + extra):7.3f}")
    for name, key, form in (("odd steps", "odd_steps", ">7"), ("worst margin", "worst_margin", ">7.3f")):
        lines.append(f"  {name:<16}" + " " * 13 + " ".join(format(own[key][s], form) for s in seeds))
    n, steps = sum(n for _, n in own["by_bits"].values()), own["on_trajectory_steps"]
    low, high = own["v_above_log2n"]
    return "\n".join([
        *lines,
        f"  pass rate {format_rate(round(own['pass_rate'] * n), n)}; by bits of n: "
        + ", ".join(f"{b} {100 * k / m:.2f}%" for b, (k, m) in own["by_bits"].items()),
        f"  on trajectories {format_rate(round(own['on_trajectory_pass_rate'] * steps), steps)}, above 16 bits "
        f"{100 * own['on_trajectory_above_16_bits']:.2f}%",
        "  not divisible by 3: " + ", ".join(f"{key} {100 * own['not_divisible_by_3'][key]:.3f}%" for key in RATES),
        "  margin (bits) quantiles: " + ", ".join(f"{float(q):g}: {m:.4f}" for q, m in own["margin_quantiles"].items()),
        f"  V: smallest {own['v_min']:.4g}, slope on log2 n {own['slope']:.4f}, {low:.2f} to {high:.2f} above log2 n"])


# ---- Training

def model_config(args: argparse.Namespace) -> Config:
    layers = {"closed": None, "linear": (), "mlp": args.layers}[args.model]
    base = "window" if args.model == "closed" else args.base
    sees = 0 if layers is None else args.sees or (1 if base == "window" else args.lookahead)
    return Config(args.lookahead, base, layers, args.features, sees, args.digits,
                  args.hold if base == "window" and layers is not None else 0, args.tie_break, args.mod3,
                  anchor=layers is not None and (args.target_type != "none" or args.features == "original"))


def load_model(path: str | os.PathLike) -> tuple[Lyapunov, dict]:
    """The model of a checkpoint, on the CPU, and the checkpoint. Raises UserError when it cannot be rebuilt."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    saved = checkpoint.load(path, SCRIPT)
    try:
        c = Config(**saved["config"])
        sound = (saved.get("format") == FORMAT and type(c.lookahead) is int and 1 <= c.lookahead <= 1 << 20
                 and 0 <= c.sees <= c.lookahead and 0 <= c.hold <= c.window and 0 <= c.digits <= RESIDUE_DIGITS
                 and c.features in ("window", "original") and c.base in ("none", "log", "closed", "window")
                 and sum(c.layers or ()) <= 1 << 20 and 0 < c.tie_break < 1)
        model = Lyapunov(c) if sound else None
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError):
        model = None
    kinds = {"model": dict, "args": dict, "step": int}
    if model is None or not all(isinstance(saved.get(k), kind) for k, kind in kinds.items()):
        raise UserError(f"{path}: not a V of this script, or damaged (config {saved.get('config')})")
    checkpoint.load_weights(model, saved["model"], path)
    return model, saved


def require_same(saved: dict, wanted: dict, path: str) -> None:
    """Raise UserError when a setting of a checkpoint is another than the wanted one."""
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise UserError(f"--{name.replace('_', '-')} {value}: {path} was trained with {saved.get(name)}")


def load(path: str | os.PathLike) -> Callable[[int | Sequence[int]], float | np.ndarray]:
    """The trained V of a checkpoint or run folder: V(27), or V([27, 703]) as float64; for odd numbers of any size.
    Raises UserError for a bad checkpoint or a number that is not odd and positive."""
    model, _ = load_model(path)

    def V(n):
        one = not isinstance(n, Sequence | np.ndarray)
        numbers = [operator.index(m) if hasattr(m, "__index__") else m for m in ([n] if one else n)]
        for m in numbers or [None]:
            if not isinstance(m, int) or m < 1 or m % 2 == 0:
                raise UserError(f"V is defined on odd numbers > 0, not on {m!r}")
        v = model.value(paths(to_limbs(numbers), model.config.lookahead))[:, 0]
        return float(v[0]) if one else v
    return V


def validate(model: Lyapunov, exam: Exam) -> dict[str, float]:
    """Pass rates on the validation numbers and trajectories, and their mean, by which best.pt is chosen."""
    v = model.value(exam.validation_rows)
    _, ok, counts = walk_steps(model.value, exam.walks["validation"])
    ok, walk_ok = holds(v[:, 0], v[:, 1]), ok[counts & exam.validation_steps[:, :counts.shape[1]]]
    rows, walks = (float(x.mean()) if len(x) else 0.0 for x in (ok, walk_ok))
    return {"val_pass_rate": rows, "val_on_trajectory_pass_rate": walks, "val": (rows + walks) / 2}


def train(args: argparse.Namespace) -> dict:
    """One run: train, choose the best checkpoint on validation, evaluate it, draw, and return the summary."""
    devices.refuse_ranks(SCRIPT)
    saved = checkpoint.load(args.resume, SCRIPT) if args.resume else None
    if saved:
        if "optimizers" not in saved:
            raise UserError(f"{args.resume} holds weights alone; --resume needs a last.pt (or use --init-from)")
        kinds = {"args": dict, "model": dict, "seconds": float, "cpu_seconds": float}
        if saved.get("format") != FORMAT or not all(isinstance(saved.get(k), kind) for k, kind in kinds.items()):
            raise UserError(f"{args.resume}: damaged or of another format, it cannot be resumed")
        args = run.resumed_args(args, saved["args"], args.resume)
    device = devices.get_device(args.device)
    devices.set_threads(args.threads)
    devices.set_seed(args.seed)
    model = Lyapunov(model_config(args))
    if args.init_from and not saved:
        source, its = load_model(args.init_from)
        require_same(asdict(source.config), asdict(model.config), args.init_from)
        # weights of a run with other sets may have been trained on what is evaluated here
        seen = ("split", "test_seeds", "eval_csv", "eval_trajectories", "validation_rows", "validation_trajectories")
        if args.split == "honest":
            require_same({k: its["args"].get(k) for k in seen}, {k: getattr(args, k) for k in seen}, args.init_from)
        model.load_state_dict(source.state_dict())
    if saved:
        checkpoint.load_weights(model, saved["model"], args.resume)
    model.to(device)
    folder = run.open_run(args, __file__)
    clock = run.Clock(args.max_minutes, *((saved["seconds"], saved["cpu_seconds"]) if saved else ()))
    exam = make_exam(args)
    head = f"{devices.describe(device)} | 1 rank | {count_parameters(model)} parameters | lookahead {args.lookahead} | "
    what = {"script": SCRIPT, "format": FORMAT, "config": asdict(model.config),
            "args": {k: v for k, v in vars(args).items() if k != "given"}}
    if model.config.layers is None:
        print(f"{head}no training | {folder}", flush=True)
        checkpoint.save(folder / "best.pt", {**what, "step": 0, "model": model.state_dict()})
        return finish(args, model, exam, folder, clock, {"steps": 0, "best_step": 0, "stopped_early": False})

    pools = make_pools(args, exam)
    print(f"{head}{args.split} split | {pools.first[-1]} + {args.pool} chains, {pools.counts[0]} numbers, "
          f"{pools.counts[1]} more excluded, {pools.counts[2]} leaked | {folder}", flush=True)
    optimizers = make_optimizers(model, args)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    # the original stepped this on the loss of every batch: its noise decides, and it can only lower the rate
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0], factor=0.5, patience=2000)
    rng = np.random.default_rng([args.seed, 2])
    start, logged, best, loss_sum, loss_n, norm = 0, -1, -1.0, torch.zeros((), device=device), 0, math.nan
    if saved:
        try:
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            plateau.load_state_dict(saved["plateau"])
            rng.bit_generator.state = saved["data_rng"]
            checkpoint.set_rng_state(saved["rng"])
            start, logged, best, loss_n = int(saved["step"]), saved["logged"], saved["best"], saved["loss_n"]
            pools.counts, pools.mined, norm = np.array(saved["counts"]), saved["mined"], saved["norm"]
            loss_sum = saved["loss_sum"].to(device)
            if not 0 <= start <= args.steps:
                raise ValueError(f"step {start} of {args.steps}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
            raise UserError(f"{args.resume}: damaged, it cannot be resumed ({type(e).__name__}: {e})") from None
    log = metrics.Metrics(folder / "metrics.csv", logged if saved else None,
                          metrics.open_tracker(args.tracker, folder, vars(args)))

    def weights_at(step: int) -> dict:
        return {**what, "step": step, "model": {k: v.cpu() for k, v in model.state_dict().items()}}

    def save(step: int) -> None:
        checkpoint.save(folder / "last.pt", {
            **weights_at(step), "ema": None, "optimizers": [o.state_dict() for o in optimizers],
            "plateau": plateau.state_dict(), "rng": checkpoint.rng_state(), "data_rng": rng.bit_generator.state,
            "mined": pools.mined, "counts": pools.counts.tolist(), "best": best, "logged": logged,
            "loss_sum": loss_sum.cpu(), "loss_n": loss_n, "norm": float(norm),
            "seconds": clock.seconds(), "cpu_seconds": clock.cpu_seconds()})

    begun = clock.seconds()
    with run.StopSignal() as stop:
        for step in range(start, args.steps + 1):
            last = step == args.steps or stop.number or clock.expired()
            full = step % args.eval_interval == 0 or step == args.steps
            due = logged < step and (full or step % args.quick_eval_interval == 0)
            if (due or last) and not torch.isfinite(loss_sum):
                raise UserError(f"the loss is not finite at step {step} (try a lower --lr, or --clip 1); the last good "
                                f"checkpoint is {folder / 'last.pt'}")
            if due:
                figures = evaluate(model.value, exam, full=False) if full else dict.fromkeys(LOGGED, math.nan)
                row = {"step": step, "loss": float(loss_sum / loss_n) if loss_n else math.nan, **validate(model, exam),
                       **figures, "seeds": active_seeds(step, len(pools.first) - 1, args),
                       "mined": len(pools.mined["k"]) if pools.mined else 0,
                       "lr": optimizers[0].param_groups[0]["lr"], "grad": float(norm), "sec": clock.seconds()}
                log.write(row)
                print(metrics.format_row(row), flush=True)
                loss_sum, loss_n, logged = loss_sum * 0, 0, step
                if row["val"] > best:
                    best = row["val"]
                    checkpoint.save(folder / "best.pt", weights_at(step))
                if start < step <= start + args.quick_eval_interval and not last:
                    left = (clock.seconds() - begun) / (step - start) * (args.steps - step)
                    print(f"about {left:.0f} s of training left", flush=True)
            if due or last:
                save(step)
            if last:
                break
            if args.mine_negatives and step >= args.mine_start and step % args.mine_interval == 0:
                pools.mined = mine(model, pools, args, exam, step, rng)
            parts = [({k: v.to(device) for k, v in chains.items()}, *rest)
                     for chains, *rest in draw(pools, args, step, rng)]
            if args.schedule == "linear":
                for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
                    group["lr"] = peak * lr_factor(step, args)
            model.zero_grad(set_to_none=True)
            with devices.autocast(device, args.precision):
                loss = batch_loss(model, parts, args, step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
            if args.schedule == "plateau":
                plateau.step(loss.item())
            loss_sum, loss_n = loss_sum + loss.detach(), loss_n + 1
    if stop.number:
        print(f"stopped at step {step}; go on with: python {SCRIPT} --resume {folder}", flush=True)
        sys.exit(128 + stop.number)
    model, chosen = load_model(folder / "best.pt")
    return finish(args, model.to(device), exam, folder, clock, {
        "steps": step, "best_step": chosen["step"], "stopped_early": step < args.steps,
        **dict(zip(("n_train_numbers", "n_excluded", "n_leaked"), pools.counts.tolist(), strict=True))})


def finish(args: argparse.Namespace, model: Lyapunov, exam: Exam, folder: Path, clock: run.Clock, facts: dict) -> dict:
    """Evaluate the chosen V beside the baselines, write summary.json, report.json and the pictures, print the table."""
    figures = evaluate(model.value, exam)
    compare = {name: evaluate(value, exam) for name, value in baselines(args.lookahead).items()}
    if args.exhaustive:
        facts = {**facts, "exhaustive": exhaustive(model, args.exhaustive)}
    report = {"curves": curves(model, exam), "by_lookahead": by_lookahead(exam.walks["random"], LOOKAHEADS)}
    run.write_json(folder / "report.json", {**report, "baselines": compare})
    summary = {"script": SCRIPT, "name": folder.resolve().name, "seed": args.seed, "n_params": count_parameters(model),
               "seconds": clock.seconds(), "cpu_seconds": clock.cpu_seconds(), "command": run.command(),
               "recipe": args.recipe, "split": args.split, "lookahead": args.lookahead,
               "lower_bound": lower_bound(args.lookahead), **facts, **figures}
    run.write_json(folder / "summary.json", summary)
    draw_pictures(folder, [folder])
    title = f"{args.model} V, lookahead {args.lookahead}, {args.split} split, step {facts['best_step']} chosen"
    print(format_report(f"{title} on validation", summary, {**compare, folder.name: figures}))
    print(f"{figures['violations_total']} of {sum(figures['odd_steps'].values())} violations on the test seeds, "
          f"pass rate {100 * figures['pass_rate']:.2f}%, {summary.get('n_leaked', 0)} numbers leaked, "
          f"{clock.seconds():.0f} s, {folder}")
    return summary


# ---- Pictures

def curves(model: Lyapunov, exam: Exam) -> dict[str, dict[str, list]]:
    """V and log2 n along each test seed's trajectory, and where V fails to fall."""
    v, ok, counts = walk_steps(model.value, exam.walks["test"])
    lg = exam.walks["test"].lg
    return {str(seed): {"log2_n": lg[i, :n + 1].tolist(), "v": v[i, :n + 1].tolist(), "ok": ok[i, :n].tolist()}
            for i, (seed, n) in enumerate(zip(exam.test_seeds, counts.sum(axis=1), strict=True))}


def draw_pictures(folder: Path, runs: Sequence[Path]) -> list[Path]:
    """Draw the pictures of the run in `folder` from its files; that of lookaheads shows the nets of all `runs`."""
    summary, report = (run.read_json(folder / f) for f in ("summary.json", "report.json"))
    made = []

    def done(fig, name: str, **settings) -> None:
        for ax in fig.axes:
            ax.set(**settings)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(framealpha=0.8, edgecolor="none")
        made.append(plots.save_figure(fig, folder / name))

    shown = [s for s in ("27", "626331") if s in report["curves"]] or list(report["curves"])[:2]
    fig, _ = plots.new_figure(1, len(shown))
    for ax, seed in zip(fig.axes, shown, strict=True):
        c = report["curves"][seed]
        bad = [i + 1 for i, ok in enumerate(c["ok"]) if not ok]
        ax.plot(c["log2_n"], color="0.6", lw=1, label="log2 n")
        ax.plot(c["v"], color="tab:blue", lw=1.5, label="V")
        ax.plot(bad, [c["v"][i] for i in bad], "o", color="tab:red", ms=5,
                label=f"V rose ({len(bad)} of {len(c['ok'])} steps)")
        ax.set_title(f"trajectory of {seed}")
    done(fig, "trajectories.png", xlabel="odd step", ylabel="bits")

    fig, ax = plots.new_figure()
    styles = {"linear mean": "C7^-", "closed form": "C0s-", "bound with residues": "k:", "bound": "k--"}
    for name, style in styles.items():
        points = [(int(m), row[name]) for m, row in report["by_lookahead"].items() if row.get(name, 0) > 0]
        ax.plot(*np.reshape(points, (-1, 2)).T, style, ms=4, label=name)
    for s in (run.read_json(other / "summary.json") for other in runs):
        ax.plot(s["lookahead"], max(1 - s["on_trajectory_pass_rate"], 1e-6), "*", ms=12, label=s["name"])
    done(fig, "lookahead.png", yscale="log", xlabel="lookahead L", ylabel="violations per step of random trajectories")

    fig, ax = plots.new_figure()
    ax.stairs(summary["margin_histogram"]["counts"], summary["margin_histogram"]["edges"], fill=True)
    ax.axvline(0, color="tab:red", lw=1, label="left of it V fails")
    done(fig, "margins.png", yscale="log", ylabel="evaluation rows",
         xlabel="margin V(n) - V(T(n)), bits, clipped to -4..8")

    fig, ax = plots.new_figure()
    x = np.arange(len(summary["by_bits"]))
    for shift, name, table in ((-0.2, "closed form", report["baselines"]["closed form"]["by_bits"]),
                               (0.2, summary["name"], summary["by_bits"])):
        ax.bar(x + shift, [100 - 100 * k / n for k, n in table.values()], 0.4, label=name)
    done(fig, "bits.png", xticks=x, xticklabels=list(summary["by_bits"]), xlabel="bits of n",
           ylabel="violations, % of evaluation rows")

    if (folder / "metrics.csv").is_file():
        fig, axes = plots.new_figure(1, 2)
        rows = metrics.read(folder)
        shares = ["val_pass_rate", "val_on_trajectory_pass_rate", "pass_rate", "on_trajectory_pass_rate"]
        for ax, keys in zip(axes, (["loss"], shares), strict=True):
            for key in keys:
                points = [(row["step"], row[key]) for row in rows if math.isfinite(row[key])]
                ax.plot(*np.reshape(points, (-1, 2)).T, marker=".", lw=1.2, label=key.replace("_", " "))
        done(fig, "training.png", xlabel="step")
    return made


# ---- Use of a trained V

def exhaustive(model: Lyapunov, limit: int, chunk: int = 1 << 15) -> dict:
    """Check V(T(n)) < V(n) for every odd n, 3 <= n < limit: how many, how many violations, the first of them."""
    n_checked, violations, first = 0, 0, []
    for lo in tqdm(range(3, limit, 2 * chunk), desc="exhaustive", unit="chunk", disable=None):
        n = np.arange(lo, min(lo + 2 * chunk, limit), 2, dtype=np.uint64)
        limbs = np.stack([n & np.uint64(0xFFFFFFFF), n >> np.uint64(32)])
        v = model.value(paths(limbs, model.config.lookahead + 1))
        bad = n[~holds(v[:, 0], v[:, 1])]
        n_checked, violations, first = n_checked + len(n), violations + len(bad), (first + bad[:5].tolist())[:5]
    at = f", the first at {first}" if first else ""
    print(f"every odd n < {limit}: {violations} violations among {n_checked}{at}")
    return {"limit": limit, "n": n_checked, "violations": violations, "first": first}


def read_numbers(text: str) -> list[int]:
    """Numbers from a list `27,703`, or from a file with one or more on a line. Raises UserError naming the line."""
    if not os.path.isfile(text):  # Path(text).is_file() raises for a number of 256 digits
        if not all(c.isdigit() or c in ", -" for c in text):
            raise UserError(f"--score {text[:60]}: neither a file nor odd numbers separated by commas")
        return [odd_number(t, "--score") for t in text.split(",")]
    lines = enumerate(Path(text).read_text(errors="replace").splitlines(), 1)
    numbers = [odd_number(t, f"{text}, line {i}") for i, line in lines for t in line.replace(",", " ").split()]
    if not numbers:
        raise UserError(f"{text}: no numbers")
    return numbers


def score(model: Lyapunov, numbers: list[int]) -> None:
    """Write n, t1 = T(n), V(n), V(T(n)) and their difference as CSV to standard output."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["n", "t1", "v", "v_t1", "margin"])
    for lo in range(0, len(numbers), 4096):
        part = numbers[lo:lo + 4096]
        v = model.value(paths(to_limbs(part), model.config.lookahead + 1))
        out.writerows([n, syracuse(n)[0], float(a), float(b), float(a - b)] for n, (a, b) in zip(part, v, strict=True))


def evaluate_checkpoint(path: str | os.PathLike, args: argparse.Namespace) -> dict:
    """Figures of a checkpoint by the code that training uses, on the sets of its run. With another --eval-csv in args,
    whose rows may have been trained on, the split is reported as unknown. Raises UserError."""
    model, saved = load_model(path)
    own = argparse.Namespace(**{**vars(parse_args([])), **saved["args"], "lookahead": model.config.lookahead})
    if getattr(args, "eval_csv", None) not in (None, own.eval_csv):
        own.eval_csv, own.split = args.eval_csv, "unknown"
    model.to(devices.get_device(getattr(args, "device", "cpu")))
    return {"script": SCRIPT, "n_params": count_parameters(model), "lookahead": own.lookahead, "split": own.split,
            "step": saved["step"], **evaluate(model.value, make_exam(own))}


def main(argv: list[str] | None = None) -> dict | None:
    sys.set_int_max_str_digits(0)  # numbers of any size may be scored
    args = parse_args(argv)
    with run.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        if args.make_eval:
            make_eval_csv(args.make_eval)
        elif args.analyze_seeds:
            row = "{:>12} {:>10} {:>20} {:>20} {:>12}".format
            print(row("n", "odd steps", "total stopping time", "maximum odd value", "ratio to n"))
            for *whole, ratio in (analyze(n).values() for n in args.analyze_seeds):
                print(row(*whole, f"{ratio:.1f}"))
        elif args.plot:
            for folder in args.plot:
                print(*draw_pictures(folder, args.plot), sep="\n")
        elif args.score or args.checkpoint:
            if not args.checkpoint and args.model != "closed":
                raise UserError("--score needs --checkpoint RUN/best.pt (or --model closed)")
            numbers = read_numbers(args.score) if args.score else None
            model = load_model(args.checkpoint)[0] if args.checkpoint else Lyapunov(model_config(args))
            config = asdict(model.config)
            if args.checkpoint:
                require_same(config, {k: getattr(args, k) for k in args.given if k in config}, args.checkpoint)
            model.to(devices.get_device(args.device))
            if numbers:
                return score(model, numbers)
            out = evaluate_checkpoint(args.checkpoint, args)
            title = f"{args.checkpoint}, lookahead {out['lookahead']}, {out['split']} split"
            print(format_report(title, out, {"this V": out}))
            if args.exhaustive:
                out["exhaustive"] = exhaustive(model, args.exhaustive)
            return out
        else:
            return train(args)


if __name__ == "__main__":
    main()
