"""Can a small net learn a Lyapunov function for the Collatz map: V(T(n)) < V(n), T(n) = (3n+1)/2^k, n odd?

    python collatz.py                           # 400 steps, about 14 s: some 24 of 429 violations, 99.87 %
    python collatz.py --model closed --lookahead 150 --exhaustive 2097152  # no net: none, for odd n < 2^21
    python collatz.py --preset original --split original --curriculum      # what stalled, in small: 30 s
    python collatz.py --score 27,703 --checkpoint logs/kept/collatz/window10-s0

V(n) may use log2 n, n modulo a power of 3, and the next `--lookahead` values of k. The original stalled at 80
violations on the 429 steps of five test trajectories. Here the net stands inside a maximum over the window
(class Lyapunov), so that it learns which steps to give up. What the figures mean: logs/collatz.md.
A run writes logs/collatz/NAME/: args.json, run.txt, collatz.py, metrics.csv, last.pt, best.pt, summary.json,
report.json and pictures. Descends from gabrielberger1000/collatz_lyapunov.
"""
from __future__ import annotations

from common import files, flags  # before torch: a Ctrl-C while that loads is one line then

# isort: split
import argparse
import csv
import io
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Decimal
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate
from common.files import UserError

SCRIPT = Path(__file__).name
LOG2_3 = math.log2(3)
RESIDUE_DIGITS = 12                # n mod 3^12 is the most that a V may know of the past of n
RESIDUE = 3**RESIDUE_DIGITS
MAX_BITS = 128                     # of the numbers that are drawn, as in the original
TEST_SEEDS = (111, 27, 703, 26623, 626331)  # the original's: 24 + 41 + 62 + 113 + 189 = 429 odd steps
RECORD_SEEDS = (                   # known for long or high trajectories: 2,104 odd steps
    837799, 63728127, 319804831, 8528817511, 12327829503, 1410123943, 3743559068799)
ORIGINAL_SEEDS = (                 # its training list; without the five test seeds it has 49
    27, 31, 41, 47, 54, 55, 71, 73, 91, 97, 103, 111, 127, 155, 159, 171, 231, 237, 267, 303, 319, 351, 359,
    391, 447, 479, 607, 703, 871, 1161, 2223, 2463, 2919, 3711, 6171, 10971, 13255, 17647, 23529, 26623, 34239,
    35655, 52527, 77031, 106239, 142587, 156159, 216367, 230631, 410011, 511935, 626331, 837799, 1117065)
EVAL_ROWS, EVAL_SEED = 50_000, 42  # of the original evaluation set
EVAL_COLUMNS = ("n", "t1", "is_growth", "sigma_n", "max_n", "w_expansion")
EVAL_TRAJECTORIES, VALIDATION_ROWS, VALIDATION_TRAJECTORIES = 200, 10_000, 100  # validation chooses best.pt
TIE_BREAK = 1e-3                   # bits a step that an old maximum sinks: so standing still is falling
TAU_START, TAU_END = 1.0, 0.05     # temperature of ramp and soft maximum, bits
ANCHOR_START, ANCHOR_STEPS = 1000, 5000  # the original's: weight 1, then down to 0.001 in so many steps
MINE_CANDIDATES, MINE_COUNT = 5000, 50   # the original's mining: of so many chains the worst are kept
MINED_MAX, MINED_SHARE = 1000, 0.3       # the newest stay; their share of the trajectories in a batch
CLIP = 1.0                         # gradient norm
POOLS, BATCHES, MINING = 1, 2, 3   # random streams: default_rng([seed, stream, step])

# A preset sets these flags; those given on the command line win. `window` is what argparse has.
PRESETS = {
    "window": {},
    "original": {
        "model": "none", "layers": (128, 128, 128), "train_seeds": 0, "pool": 500_000, "segment": 1,
        "hard_ratio": 0.4, "loss": "hinge", "margin": 0.05, "growth_weight": 10.0, "target_type": "fixed",
        "steps": 3000, "batch_size": 1024, "optimizer": "adamw", "lr": 1e-3},
}


# ---- Flags

def odd_number(text: str, where: str) -> int:
    """An odd number > 1 of any size. Raises UserError that says where it stands and what is wrong."""
    text = text.strip()
    n = int(text) if text.isascii() and text.isdecimal() else 0
    if n < 3 or n % 2 == 0:
        raise UserError(f"{where}: {text[:40]!r} is not an odd number > 1 written in digits")
    return n


def widths(text: str) -> tuple[int, ...]:
    """An argparse type: hidden widths, separated by commas."""
    return tuple(map(flags.integer(1, 1 << 20), text.split(",")))


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only the evaluation of this script's checkpoints has."""
    parser.add_argument("--eval-csv", type=flags.path, metavar="FILE",
                        help="evaluation rows of collatz; default: the original's 50,000, made in memory")


def parse_args(argv: list[str] | None = None) -> flags.Flags:
    integer, real, path = flags.integer, flags.real, flags.path
    p = flags.Parser(description=__doc__)
    p.add_argument("--preset", "--recipe", choices=sorted(PRESETS), default="window",
                   help="sets other flags: ours, or the original's")
    g = p.add_argument_group("data")
    g.add_argument("--lookahead", type=integer(1, 1000), default=10, help="L: how many k V(n) may use")
    g.add_argument("--split", choices=["honest", "original"], default="honest",
                   help="honest: train on no number of any evaluation; original: its seeds lead to some")
    g.add_argument("--pool", type=integer(1), default=200_000, help="random numbers to draw steps from")
    g.add_argument("--train-seeds", type=integer(0), default=2000,
                   help="random trajectories to draw steps from; 0: those of the original's 49 seeds")
    g.add_argument("--segment", type=integer(1, 1024), default=24, help="steps on a chain from a trajectory")
    g.add_argument("--hard-ratio", type=real(0, 1), default=0.5, help="share of trajectories in batch, loss")
    g.add_argument("--curriculum", "--ramp-len", type=integer(0), nargs="?", const=1000, default=0,
                   help="start with a few easy trajectories, have all after so many steps (without a number: "
                   "1000; of two the last counts); default: all at once")
    g.add_argument("--start-seeds", type=integer(0), default=1, help="curriculum: trajectories at step 0")
    g.add_argument("--mine-negatives", action="store_true", help="look for low margins, train more on them")
    g.add_argument("--mine-interval", type=integer(1), default=50, help="mining: steps between searches")
    g = p.add_argument_group("model")
    g.add_argument("--model", "--base", choices=["window", "log", "none", "closed"], default="window",
                   help="window: a net inside the closed form; log: log2 n + net; none: the net alone, with "
                   "the original's inputs; closed: the closed form, no net, no training")
    g.add_argument("--layers", type=widths, default=(64, 64), help="hidden widths of the net, default 64,64")
    g.add_argument("--sees", type=integer(1), help="Q: how many k the net sees; default: 1 in window, else L")
    g.add_argument("--digits", type=integer(0, RESIDUE_DIGITS), default=12, help="it sees n mod 3^DIGITS")
    g.add_argument("--hold", type=integer(0),
                   help="window: rising steps on which its end may stay; default: 1, where there is room")
    g = p.add_argument_group("loss")
    g.add_argument("--loss", choices=["ramp", "hinge"], default="ramp", help="bounded, or the original's")
    g.add_argument("--margin", type=real(0), default=0.0, help="how far V should fall, bits")
    g.add_argument("--growth-weight", type=real(0), default=1.0, help="weight of steps with T(n) > n")
    g.add_argument("--use-t4", action="store_true", help="also ask V(T^4(n)) < V(n), weight 0.5")
    g.add_argument("--use-t8", action="store_true", help="also ask V(T^8(n)) < V(n), weight 0.2")
    g.add_argument("--target-type", choices=["none", "fixed", "adaptive"], default="none",
                   help="anchor loss: pull V to log n + beta drift, beta 0.35 or learned")
    g = p.add_argument_group("optimization")
    g.add_argument("--steps", "--epochs", type=integer(1), default=400, help="optimizer steps")
    g.add_argument("--batch-size", type=integer(1), default=512, help="chains a step")
    g.add_argument("--lr", type=real(0, above=True), default=3e-3, help="peak of AdamW; Muon: 5 times that")
    g.add_argument("--optimizer", choices=["adamw", "muon"], default="muon", help="muon: hidden matrices")
    g = p.add_argument_group("evaluation")
    g.add_argument("--eval-every", "--quick-eval-interval", type=integer(1), default=100,
                   help="steps between validations and saves")
    g.add_argument("--test-every", "--eval-interval", type=integer(1), default=200,
                   help="steps between evaluations on the test sets")
    g.add_argument("--exhaustive", type=integer(4, 2**53), help="at the end, check all odd n below it")
    add_evaluation_arguments(g)
    g = p.add_argument_group("instead of training")
    g.add_argument("--checkpoint", type=path, metavar="PATH", help="evaluate this trained V")
    g.add_argument("--score", type=path, metavar="N,N|FILE",
                   help="n, T(n), V(n), V(T(n)), margin as CSV, with --checkpoint or --model closed")
    g.add_argument("--analyze-seeds", type=path, metavar="N,N|FILE", help="length and height of paths")
    g.add_argument("--make-eval", type=path, help="write the original's evaluation set")
    g.add_argument("--plot", type=path, nargs="+", metavar="RUN", help="draw the pictures again")
    flags.add_run_arguments(p)
    args = flags.parse(p, argv)
    flags.use(args, PRESETS[args.preset])
    if args.eval_csv:
        args.eval_csv = os.path.abspath(args.eval_csv)  # a resumed run may start elsewhere
    modes = {"score": ("checkpoint", "device") if args.checkpoint else ("model", "lookahead", "device"),
             "analyze_seeds": (), "make_eval": (), "plot": (), "checkpoint": ("exhaustive", "eval_csv", "device")}
    try:
        for mode, others in modes.items():
            if getattr(args, mode):
                flags.only(args, mode, *others)
                break
        if args.model == "closed" and not args.score:
            used = ("model", "lookahead", "exhaustive", "eval_csv", "seed", "name", "out_dir", "device")
            flags.only(args, "model closed", *used)
            args.steps = 0
        make_config(args)
    except UserError as e:
        p.error(f"argument --{str(e).removeprefix('--')}")
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


def analyze(n: int) -> dict[str, int | Decimal]:
    """Odd steps, total stopping time (halvings counted too), maximum odd value and its ratio to n, exact."""
    path = trajectory(n)
    steps, halvings = len(path) - 1, sum(syracuse(m)[1] for m in path[:-1])
    return {"n": n, "odd_steps": steps, "total_stopping_time": steps + halvings, "max_odd": max(path),
            "ratio": Decimal(max(path)) / n}  # may be larger than any float


def to_limbs(numbers: Sequence[int]) -> np.ndarray:
    """Non-negative integers of any size as 32-bit limbs, least significant first: (limbs, N) uint64."""
    width = 4 * max(1, -(-max(n.bit_length() for n in numbers) // 32))
    raw = b"".join(n.to_bytes(width, "little") for n in numbers)
    return np.ascontiguousarray(np.frombuffer(raw, "<u4").reshape(len(numbers), -1).T.astype(np.uint64))


def k_sequence(limbs: np.ndarray, m: int) -> np.ndarray:
    """k_1 .. k_m of odd numbers: T^j(n) = (3 T^(j-1)(n) + 1) / 2^(k_j). (W, N) -> (N, m) int32, exact."""
    low, width = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, k = limbs.copy(), np.zeros((m, limbs.shape[1]), np.int32)
    for row in k:
        x *= np.uint64(3)
        x[0] += np.uint64(1)
        for i in range(len(x) - 1):
            x[i + 1] += x[i] >> width
            x[i] &= low
        carry = x[-1] >> width
        x[-1] &= low
        if carry.any():
            x = np.vstack([x, carry])
        # trailing zeros of the lowest limb; one of 32 zeros hides more in the next, so look again
        while (zeros := np.minimum(np.bitwise_count((x[0] & -x[0]) - np.uint64(1)), 32)).any():
            row += zeros
            x[:-1] |= x[1:] << width
            x >>= zeros.astype(np.uint64)
            x[:-1] &= low
        if len(x) > 1 and not x[-1].any():
            x = x[:-1]
    return k.T  # step by step in memory, as the loops over steps below read it


def log2_limbs(limbs: np.ndarray) -> np.ndarray:
    """log2 of positive numbers from their three top limbs: (W, N) -> (N,) float64, relative error 2^-52."""
    at = len(limbs) - 1 - np.argmax(limbs[::-1] > 0, axis=0)
    columns = np.arange(limbs.shape[1])
    top = [np.where(at >= i, limbs[np.maximum(at - i, 0), columns], 0).astype(np.float64) for i in range(3)]
    return np.log2(top[0] + top[1] * 2.0**-32 + top[2] * 2.0**-64) + 32.0 * at


def log2_path(lg0: np.ndarray, k: np.ndarray) -> np.ndarray:
    """log2 T^j(n), j = 0..m, from log2 n (N,) and k (N, m): (N, m+1) float64.
    It is log2 T(n) = log2 n + log2(3 + 1/n) - k."""
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
    half = np.array([pow(2, -i, modulus) for i in range(int(k.max(initial=0)) + 1)], np.uint64)
    out = np.empty((k.shape[1] + 1, len(r)), np.uint64)
    out[0] = r
    for j, factor in enumerate(half[k.T]):
        x = (3 * out[j] + 1) * factor  # < 3 2^31 2^31: no overflow
        out[j + 1] = x - x // modulus * modulus  # 4 times as fast as %
    return out.T


def fingerprint(limbs: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Residues of T^j(n) modulo two primes near 2^31 in one uint64: (W, N) and (N, m) -> (N, m+1).
    Equal numbers always agree, different ones below 2^61 never: no member of a set slips through a test."""
    return modular_path(limbs, k, 2147483647) << np.uint64(31) | modular_path(limbs, k, 2147483629)


@dataclass
class Paths:
    """n, T(n), ..., T^m(n) for N numbers: what every V is a function of."""
    k: np.ndarray    # (N, m) int32
    lg: np.ndarray   # (N, m+1) float64, log2 T^j(n)
    res: np.ndarray  # (N, m+1) int32, T^j(n) modulo RESIDUE


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
    """Paths so long that every number has come to 1 and stayed there for `beyond` steps (T(1) = 1)."""
    m = 64
    while ((p := paths(limbs, m + beyond)).lg[:, m] > 0.5).any():
        m *= 2
    m = int((p.lg > 0.5).sum(axis=1).max()) + beyond
    return Paths(p.k[:, :m], p.lg[:, :m + 1], p.res[:, :m + 1])


# ---- Data: evaluation sets, what they forbid, training pools

def random_odd(rng: np.random.Generator, n: int, min_bits: int, max_bits: int = MAX_BITS) -> np.ndarray:
    """n random odd numbers > 1, bit length uniform in [min_bits, max_bits], as limbs (W, n)."""
    bits = rng.integers(min_bits, max_bits + 1, n)
    limb = 32 * np.arange(-(-max_bits // 32))[:, None]
    x = rng.integers(0, 1 << 32, (len(limb), n), dtype=np.uint64)
    x &= (np.uint64(1) << np.clip(bits - limb, 0, 32).astype(np.uint64)) - np.uint64(1)
    x[(bits - 1) // 32, np.arange(n)] |= np.uint64(1) << ((bits - 1) % 32).astype(np.uint64)  # the top bit
    x[0] |= np.uint64(1)
    return x


def eval_numbers(rows: int = EVAL_ROWS, seed: int = EVAL_SEED) -> list[int]:
    """The original evaluation set: distinct odd numbers of 2..128 bits, from Python's generator."""
    rng, seen = random.Random(seed), {}
    while len(seen) < rows:
        bits = rng.randint(2, 128)
        n = rng.randint(2 ** (bits - 1), 2**bits - 1)
        seen[n + 1 - n % 2] = None
    return list(seen)


def default_rows() -> tuple[np.ndarray, np.ndarray]:
    """The original evaluation set: limbs (W, N), weights (N,) = 1 + log10(highest number on the way / n)."""
    limbs = to_limbs(eval_numbers())
    lg0 = log2_limbs(limbs)
    peak, m, rows = np.empty(len(lg0)), 128, np.arange(len(lg0))
    while len(rows):
        left = []
        for part in np.array_split(rows, max(1, len(rows) // 4096)):
            lg = log2_path(lg0[part], k_sequence(limbs[:, part], m))
            peak[part] = np.log2(3 * np.exp2(lg[:, :-1].max(axis=1)) + 1)  # the highest is 3n+1 of an odd n
            left.append(part[lg[:, -1] > 0.5])
        rows, m = np.concatenate(left), 2 * m  # those that are not at 1 yet
    return limbs, np.round(1 + (peak - lg0) * math.log10(2), 4)


def make_eval_csv(path: str) -> None:
    """Write the original evaluation set with its columns, computed with Python integers."""
    files.check_output(path)
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(EVAL_COLUMNS)
    for n in tqdm(eval_numbers(), desc=path, unit="row", disable=None):
        a, t1 = analyze(n), syracuse(n)[0]
        peak = 3 * a["max_odd"] + 1
        out.writerow([n, t1, t1 > n, a["total_stopping_time"], peak, f"{1 + math.log10(peak / n):.4f}"])
    files.write_atomic(path, text.getvalue().encode())


def read_eval_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read and verify an evaluation CSV: limbs, weights as default_rows. Raises UserError with the line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make it with: python collatz.py --make-eval {path}")
    weight = {}  # by n
    with open(path, newline="", errors="replace", encoding="utf-8-sig") as f:
        table = csv.DictReader(f)
        try:
            missing = [c for c in EVAL_COLUMNS if c not in (table.fieldnames or ())]
            if missing:
                raise UserError(f"no column {missing[0]!r}; it needs {', '.join(EVAL_COLUMNS)}")
            for row in table:
                n, w = read_row(row)
                if n in weight:
                    raise UserError(f"{n} stands there twice")
                weight[n] = w
        except (UserError, csv.Error) as e:
            raise UserError(f"{path}, line {table.line_num}: {e}") from None
    if not weight:
        raise UserError(f"{path}: no rows")
    return to_limbs(list(weight)), np.array(list(weight.values()))


def read_row(row: dict[str, str | None]) -> tuple[int, float]:
    """n and its weight. Raises UserError: t1 is not T(n), is_growth is wrong, or the weight is below 1."""
    n, t1, growth = odd_number(row["n"] or "", "n"), row["t1"] or "", row["is_growth"] or ""
    if t1.strip() != str(syracuse(n)[0]):
        raise UserError(f"t1 is {t1[:40]!r}, but T({n}) = {syracuse(n)[0]}")
    if (growth.strip().lower() in ("true", "1")) != (int(t1) > n):
        raise UserError(f"is_growth is {growth[:40]!r}, but n = {n}, t1 = {t1}")
    try:
        return n, flags.real(1)(row["w_expansion"] or "")
    except argparse.ArgumentTypeError as e:
        raise UserError(f"w_expansion {e}") from None


@dataclass
class Exam:
    """All that a V is examined on. Sets of numbers have lookahead + 1 steps; walks go on until after 1."""
    rows: Paths                   # the evaluation set
    weight: np.ndarray            # of its rows
    walks: dict[str, Paths]       # test, record: trajectories of these seeds; random, validation: random ones
    validation_rows: Paths        # for choosing best.pt, as walks["validation"]; none is in the sets above
    validation_steps: np.ndarray  # which steps of those walks are not: near 1 all trajectories meet
    forbidden: np.ndarray         # sorted fingerprints of all: what the honest split keeps out of training


def make_exam(eval_csv: str | None, lookahead: int) -> Exam:
    """Build the evaluation sets. They do not depend on --seed: all runs are compared on the same numbers."""
    rows, weight = read_eval_csv(eval_csv) if eval_csv else default_rows()
    walk_rng, row_rng, validation_rng = (np.random.default_rng([EVAL_SEED, i]) for i in range(3))
    candidates = random_odd(row_rng, VALIDATION_ROWS, 2)
    start = {"test": to_limbs(TEST_SEEDS), "record": to_limbs(RECORD_SEEDS),
             "random": random_odd(walk_rng, EVAL_TRAJECTORIES, 128),
             "validation": random_odd(validation_rng, VALIDATION_TRAJECTORIES, 8)}
    m = lookahead + 1
    beyond = dict.fromkeys(start, m) | {"random": max(m, LOOKAHEADS[-1] + 1)}  # lookahead.png wants more
    walks = {name: full_paths(limbs, beyond[name]) for name, limbs in start.items()}
    keys = {name: fingerprint(limbs, walks[name].k) for name, limbs in start.items()}
    row_keys, candidate_keys = (fingerprint(x, np.empty((x.shape[1], 0), np.int32))[:, 0]
                                for x in (rows, candidates))
    tested = np.unique(np.concatenate([row_keys, *(keys[s].ravel() for s in ("test", "record", "random"))]))
    new = ~member(keys["validation"], tested)
    first = np.unique(candidate_keys, return_index=True)[1]
    first = np.sort(first[~member(candidate_keys[first], tested)])
    forbidden = np.unique(np.concatenate([tested, candidate_keys, keys["validation"].ravel()]))
    new_steps = new[:, :-1] & new[:, 1:]
    return Exam(paths(rows, m), weight, walks, paths(candidates[:, first], m), new_steps, forbidden)


def member(keys: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Which keys stand in the sorted array `of`, which is not empty; shape of keys."""
    return of[np.minimum(np.searchsorted(of, keys), len(of) - 1)] == keys


# Training data are chains n, T(n), ...: tensors k (N, M) uint8, lg (N, M+1) float32, res (N, M+1) int32, and
# ok (N, C) bool: which of the first C numbers, those at which the net is evaluated, may be trained on.
Chains = dict[str, torch.Tensor]
Part = tuple[Chains, int, float]       # of a batch: chains, steps counted on each, share of the loss
Value = Callable[[Paths], np.ndarray]  # V at the first nodes of paths: (N, P) float64


def take(chains: Chains, rows) -> Chains:
    return {name: x[rows] for name, x in chains.items()}


def join(a: Chains, b: Chains) -> Chains:
    return {name: torch.cat([x, b[name]]) for name, x in a.items()}


def make_chains(p: Paths, keys: np.ndarray, args: flags.Flags, exam: Exam) -> tuple[Chains, dict[str, int]]:
    """Chains of paths (N, M steps) with the fingerprints (N, M+1) of their numbers. The honest split
    masks a number that is forbidden or whose T is. Also counts distinct numbers."""
    used = p.k.shape[1] - make_config(args).sees + 1
    forbidden = member(keys, exam.forbidden)
    bad = forbidden[:, :used] | forbidden[:, 1:used + 1]
    live = p.lg[:, :used] > 0.5  # n > 1
    ok = live & ~bad if args.split == "honest" else live
    masks = {"n_train_numbers": ok, "n_excluded": live & ~ok, "n_leaked": ok & bad}
    counts = {name: len(np.unique(keys[:, :used][mask])) for name, mask in masks.items()}
    k, lg = np.minimum(p.k, 255).astype(np.uint8), p.lg.astype(np.float32)
    return {name: torch.from_numpy(x) for name, x in dict(k=k, lg=lg, res=p.res, ok=ok).items()}, counts


def random_chains(rng: np.random.Generator, n: int, steps: int, args: flags.Flags,
                  exam: Exam) -> tuple[Chains, dict[str, int]]:
    """n chains on which `steps` steps are counted, from random odd numbers of 2..MAX_BITS bits."""
    limbs = random_odd(rng, n, 2)
    p = paths(limbs, chain_length(steps, args))
    return make_chains(p, fingerprint(limbs, p.k), args, exam)


def trajectory_chains(rng: np.random.Generator, limbs: np.ndarray, args: flags.Flags,
                      exam: Exam) -> tuple[Chains, dict[str, int], np.ndarray]:
    """Chains on which --segment steps are counted, one behind the other along the trajectories of the seeds;
    their counts, as make_chains; and where each seed's chains begin."""
    m = chain_length(args.segment, args)
    p = full_paths(limbs, beyond=m)
    keys = fingerprint(limbs, p.k)
    steps = (p.lg > 0.5).sum(axis=1)
    starts = [np.arange(rng.integers(min(args.segment, n)), n, args.segment) for n in steps]
    n_chains = [len(x) for x in starts]
    row = np.repeat(np.arange(len(starts)), n_chains)[:, None]
    span = np.concatenate(starts)[:, None] + np.arange(m + 1)
    cut = Paths(p.k[row, span[:, :-1]], p.lg[row, span], p.res[row, span])
    chains, counts = make_chains(cut, keys[row, span], args, exam)
    return chains, counts, np.concatenate([[0], np.cumsum(n_chains)])


def jumps(args: flags.Flags) -> list[tuple[int, float]]:
    """The s for which V(T^s(n)) < V(n) is asked, with the original's coefficients."""
    return [(1, 1.0)] + [(4, 0.5)] * args.use_t4 + [(8, 0.2)] * args.use_t8


def chain_length(steps: int, args: flags.Flags) -> int:
    """Steps of a chain on which V can be compared across every jump from its first `steps` nodes."""
    return steps - 1 + jumps(args)[-1][0] + args.lookahead


@dataclass
class Pools:
    """What batches are drawn from. Mined chains are added during the run."""
    hard: Chains          # of trajectories, seed after seed
    first: np.ndarray     # (seeds+1,): the chains of seed i are first[i] .. first[i+1]-1
    random: Chains        # of random numbers
    counts: dict[str, int]  # distinct numbers within hard, and within random
    mined: Chains = field(default_factory=dict)

    def active_seeds(self, step: int, args: flags.Flags) -> int:
        """How many seeds are in use: all, or with --curriculum from --start-seeds to all over its steps."""
        n = len(self.first) - 1
        ramp = min(1.0, step / args.curriculum) if args.curriculum else 1.0
        return n if ramp == 1 else int(args.start_seeds + (n - args.start_seeds) * ramp)


def make_pools(args: flags.Flags, exam: Exam) -> Pools:
    """The pools of a run. Raises UserError when its flags ask for what they do not have."""
    if args.mine_negatives and args.hard_ratio == 0:
        raise UserError("--mine-negatives: mined numbers get no share with --hard-ratio 0")
    rng = np.random.default_rng([args.seed, POOLS])
    if args.train_seeds == 0:
        limbs = to_limbs([n // (n & -n) for n in ORIGINAL_SEEDS if n not in TEST_SEEDS])  # 54 as its odd part
    else:
        limbs = random_odd(rng, args.train_seeds, 8)
        if args.curriculum:  # short trajectories first
            length = (full_paths(limbs, beyond=0).lg > 0.5).sum(axis=1)
            limbs = limbs[:, np.argsort(length, kind="stable")]
    if args.curriculum and args.start_seeds > limbs.shape[1]:
        raise UserError(f"--start-seeds {args.start_seeds}: there are {limbs.shape[1]} trajectories")
    hard, counts, first = trajectory_chains(rng, limbs, args, exam)
    others, more = random_chains(rng, args.pool, 1, args, exam)
    return Pools(hard, first, others, {name: n + more[name] for name, n in counts.items()})


def sample_batch(pools: Pools, args: flags.Flags, step: int) -> list[Part]:
    """The parts of the batch of a step: of trajectories a random active seed, then a random chain of it."""
    rng = np.random.default_rng([args.seed, BATCHES, step])
    n_hard, n_seeds = int(args.hard_ratio * args.batch_size), pools.active_seeds(step, args)
    others = take(pools.random, rng.integers(0, args.pool, args.batch_size - n_hard))
    if n_seeds == 0:  # no seed yet: random numbers alone (the original fell back to a test seed)
        return [(others, 1, 1.0)]
    seed = rng.integers(0, n_seeds, n_hard)
    chain = pools.first[seed] + (rng.random(n_hard) * np.diff(pools.first)[seed]).astype(np.int64)
    hard = take(pools.hard, chain)
    if pools.mined:
        n_mined = int(MINED_SHARE * n_hard)
        mined = take(pools.mined, rng.integers(0, len(pools.mined["k"]), n_mined))
        hard = join(take(hard, slice(n_mined, None)), mined)
    parts = [(hard, args.segment, args.hard_ratio), (others, 1, 1 - args.hard_ratio)]
    return [part for part in parts if len(part[0]["k"])]


def mine(model: Lyapunov, pools: Pools, args: flags.Flags, exam: Exam, step: int) -> None:
    """Add to the mined chains those whose first step has the lowest margin; the newest MINED_MAX stay.
    Of the candidates, half are from trajectories, half new random numbers."""
    rng = np.random.default_rng([args.seed, MINING, step])
    fresh, _ = random_chains(rng, MINE_CANDIDATES // 2, args.segment, args, exam)
    active = pools.first[max(1, pools.active_seeds(step, args))]
    found = join(take(pools.hard, rng.integers(0, active, MINE_CANDIDATES // 2)), fresh)
    with eval_mode(model):
        chains = {name: x.to(model.device) for name, x in found.items()}
        w = model.terms(chains["lg"], chains["k"], chains["res"])
        fall = falls(model, chains, w, s=1, n=1, tau=0.0)
    both = found["ok"][:, :model.config.window + 2].all(-1)  # every number that V(n) and V(T(n)) look at
    worst = take(found, torch.argsort(torch.where(both, fall[:, 0].cpu(), math.inf))[:MINE_COUNT])
    pools.mined = take(join(pools.mined, worst) if pools.mined else worst, slice(-MINED_MAX, None))


# ---- Model. B chains, P nodes n, T(n), ... on each, L lookahead, the net sees Q values of k, J = L - Q

@dataclass(frozen=True)
class Config:
    """All that is needed to rebuild a model; stored in its checkpoint. Raises UserError for a bad field."""
    lookahead: int = 10
    base: str = "window"  # window: net inside the closed form; log: log2 n + net; none: the original's net
    layers: tuple[int, ...] | None = (64, 64)  # hidden widths; None: no net
    sees: int = 1         # Q: values of k that the net sees
    digits: int = 12      # the net sees statistics of the past of n given n mod 3^digits
    hold: int = 1         # window: up to this many rising steps the end of the window stands still
    mod3: bool = False    # add 1 bit when 3 | n: such n have no predecessor, so nothing is lost
    anchor: bool = False  # has the scalar beta of the anchor loss

    def __post_init__(self):
        closed = self.layers is None
        for f in fields(self):  # a checkpoint may hold anything
            value = getattr(self, f.name)
            if type(value) is not type(f.default) and not (closed and f.name == "layers"):
                raise UserError(f"{f.name}: {value!r:.40} is not of type {type(f.default).__name__}")
        if self.base not in (("window",) if closed else ("window", "log", "none")):
            raise UserError(f"base: {self.base!r:.40} is not known, or not without layers")
        if not closed and not (self.layers and all(type(x) is int and 0 < x <= 1 << 20 for x in self.layers)):
            raise UserError(f"layers: {self.layers!r:.40} are no widths of a net")
        most = 0 if closed else self.lookahead
        least = most if self.base == "none" else min(1, most)
        room = 0 if closed or self.base != "window" else self.lookahead - self.sees
        for name, lo, hi in (("lookahead", 1, 1000), ("sees", least, most), ("digits", 0, RESIDUE_DIGITS),
                             ("hold", 0, room)):
            if not lo <= getattr(self, name) <= hi:
                raise UserError(f"{name}: {getattr(self, name)} is not in {lo}..{hi}")

    @property
    def window(self) -> int:
        """J: V(n) is the maximum over the J + 1 nodes n .. T^J(n), whose terms use L values of k in all."""
        return self.lookahead - self.sees


def make_config(args: flags.Flags) -> Config:
    """The model that the flags describe. Raises UserError naming the one that cannot be."""
    if args.model == "closed":
        return Config(args.lookahead, layers=None, sees=0, hold=0)
    in_window = args.model == "window"
    sees = args.sees or (1 if in_window else args.lookahead)
    room = min(1, args.lookahead - sees) if in_window else 0
    hold = room if args.hold is None else args.hold
    anchor = args.target_type != "none" or args.model == "none"  # the original's net always has it
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    return Config(**{**given, "base": args.model, "sees": sees, "hold": hold, "anchor": anchor})


def original_features(lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
    """The original's inputs: log10 n / 40, n mod 3, 9, 27, 81, the drift over the window / 10, the k / 10."""
    drift = k.shape[-1] * LOG2_3 - k.float().sum(-1)
    x = [lg[..., 0] * (math.log10(2) / 40), *(res % m / (m - 1) for m in (3, 9, 27, 81)), drift / 10]
    return torch.cat([torch.stack(x, -1), k.clamp(max=10) / 10], -1)


def window_features(lg: torch.Tensor, k: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """Ours: size of n, how it moves over the next Q steps, their k, and what its residue says of its past."""
    here, rise = lg[..., :1], lg[..., 1:] - lg[..., :1]
    size = [here / 64 - 1, torch.log2(here + 1) / 3 - 1]
    moves = [torch.relu(rise.amax(-1, keepdim=True)) / 2, rise / 4]
    ks = [k.clamp(max=10) / 5 - 0.4, *((k == i).float() for i in (1, 2, 3))]
    return torch.cat([*size, *moves, *ks, past], -1)


@cache
def residue_statistics(digits: int) -> np.ndarray:
    """What n mod 3^digits tells of the past of n on a long trajectory: (3^digits, 3 + digits) float32.
    Columns: log2 of the stationary density relative to uniform (clipped to +-4, halved); P(last k = 1);
    P(last k = 2); E[log2 n - log2 of the node j steps ago] / 2, j = 1..digits. Exact recursion over
    n = (3m + 1) / 2^k, P(k) = 2^-k, k < 40 (Syracuse random variables: Tao, arXiv:1909.03562, section 1.3)."""
    density, last, rise = np.ones(1), np.zeros((1, 2)), np.zeros((1, 0))
    for d in range(1, digits + 1):
        size, m3 = 3**d, 3 * np.arange(3 ** (d - 1)) + 1
        mass, last, up = np.zeros(size), np.zeros((size, 2)), np.zeros((size, d))
        before = np.pad(rise, ((0, 0), (1, 0)))  # of m, seen from n one step later
        for k in range(1, 40):
            n, w = m3 * pow(2, -k, size) % size, 2.0**-k * density
            mass[n] += w
            if k <= 2:
                last[n, k - 1] = w
            up[n] += w[:, None] * (before + (LOG2_3 - k))
        some = np.maximum(mass, 1e-30)[:, None]
        last, rise, density = last / some, up / some, 3 * mass
    log_density = np.clip(np.log2(np.maximum(density, 1e-9)), -4, 4) / 2
    return np.concatenate([log_density[:, None], last, rise / 2], axis=1).astype(np.float32)


class Lyapunov(nn.Module):
    """V at the first P nodes of chains n, T(n), ... that are L steps longer. V is a maximum of terms W.

    window:  W_i = log2 T^i(n) + net(T^i(n)) + TIE_BREAK i,  V(T^i(n)) = max_{0<=j<=J} W_{i+j} - TIE_BREAK i.
        Every node's W is one number that all V share, so V can only fail to fall where a new W tops the last
        J + 1: the net decides how often that is. Without a net this is the closed form.
    log:  V(n) = log2 n + max_{0<=j<=J} alpha (log2 T^j(n) - log2 n) + delta j + net(T^j(n)); alpha, delta and
        the net start at 0, so nothing of the closed form is given. With Q = L it is log2 n + net.
    none:  V(n) = softplus(net(n)): the original.
    Shapes of one call: lg (B, P+L) is log2 T^j(n), k (B, P-1+L), res (B, P+L).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        pooled = config.base == "log" and config.window > 0
        self.alpha = nn.Parameter(torch.zeros(())) if pooled else None
        self.delta = nn.Parameter(torch.zeros(())) if pooled else None
        self.beta = nn.Parameter(torch.tensor(0.35)) if config.anchor else None
        if config.layers is None:
            return
        ours = config.base != "none"
        if ours:
            statistics = torch.from_numpy(residue_statistics(config.digits))
            self.register_buffer("statistics", statistics, persistent=False)
        one = torch.zeros(1, config.sees + 1)
        sizes = [self.features(one, one[:, 1:], torch.zeros(1, dtype=torch.int32)).shape[-1], *config.layers]
        hidden = []
        for a, b in pairwise(sizes):
            hidden += [nn.Linear(a, b), nn.GELU() if ours else nn.LeakyReLU(0.1)]
        last = nn.Linear(sizes[-1], 1, bias=not ours)  # margins lose a constant
        if ours:
            nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*hidden, last)

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.zeros(())).device

    def features(self, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """What the net sees of a node. lg (..., Q+1), k (..., Q), res (...) -> (..., number of features)"""
        if self.config.base == "none":
            return original_features(lg, k, res)
        return window_features(lg, k, self.statistics[res % len(self.statistics)])

    def net(self, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """The net at each node. lg (..., Q+1), k (..., Q), res (...) -> (...)"""
        return self.layers(self.features(lg, k, res)).squeeze(-1)

    def clock(self, lg: torch.Tensor) -> torch.Tensor:
        """Steps taken so far; the clock stands still at 1. lg (B, M) -> (B, M)"""
        return F.pad(torch.cumsum(lg[:, :-1] > 0.5, 1), (1, 0)).to(lg.dtype)  # log2 of 1 is 0, of 3 1.58

    def terms(self, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """W, the terms inside the maximum, at the first P + J nodes. -> (B, P+J)
        The net computes in float32 on its own device; what is added to it keeps the precision of lg."""
        c = self.config
        nodes = lg.shape[1] - c.sees  # P + J
        w = lg[:, :nodes]
        if c.base == "window":
            w = w + TIE_BREAK * self.clock(lg)[:, :nodes]
        elif self.alpha is not None:
            w = self.alpha.to(lg) * w + self.delta.to(lg) * self.clock(lg)[:, :nodes]
        elif c.base == "none":
            w = torch.zeros_like(w)
        if c.layers is None:
            return w
        near = lg.to(self.device, torch.float32).unfold(1, c.sees + 1, 1)  # (B, P+J, Q+1)
        next_k = k.to(self.device).unfold(1, c.sees, 1)[:, :nodes]         # (B, P+J, Q)
        return w + self.net(near, next_k, res[:, :nodes].to(self.device)).to(lg.device, lg.dtype)

    def ends(self, k: torch.Tensor) -> torch.Tensor:
        """The last j of each node's maximum: J, or J - hold + the leading k = 1 (hold at most). -> (B, P)
        While n rises (k = 1) the end stands still: no new number comes in, so V fails only where n falls."""
        c = self.config
        nodes = k.shape[1] - c.lookahead + 1
        if c.hold == 0:
            return torch.full((len(k), nodes), c.window, device=k.device)
        rising = torch.cumprod(k.unfold(1, c.hold, 1)[:, :nodes] == 1, -1).sum(-1)
        return c.window - c.hold + rising

    def combine(self, w: torch.Tensor, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """V from the terms W (B, P+J) and what they were made of. -> (B, P)
        With base window the loss compares terms (gaps), not V: there a change here changes evaluation alone."""
        c, ends = self.config, self.ends(k)
        nodes = ends.shape[1]
        j = torch.arange(c.window + 1, device=w.device)
        x = torch.where(j <= ends[..., None], w.unfold(1, len(j), 1), -math.inf).amax(-1)  # (B, P)
        if c.base == "none":
            return F.softplus(x) + 1e-6
        clock = self.clock(lg)[:, :nodes]
        if self.alpha is not None:
            x = x + (1 - self.alpha).to(lg) * lg[:, :nodes] - self.delta.to(lg) * clock
        elif c.base == "window":
            x = x - TIE_BREAK * clock
        if c.mod3:
            x = x + (res[:, :nodes] % 3 == 0)
        # log2(1 + 2^x) makes any x positive and keeps the sign of every margin; at large x it is x
        return torch.logaddexp2(x, torch.zeros_like(x))

    def forward(self, lg: torch.Tensor, k: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """V(n), V(T(n)), ... at the first P nodes of each chain, all positive. -> (B, P), dtype of lg"""
        return self.combine(self.terms(lg, k, res), lg, k, res)

    def value(self, p: Paths) -> np.ndarray:
        """V at the first P nodes of each path with P-1+L values of k: (N, P) float64."""
        out = []
        chunk = max(1, 16384 // (p.lg.shape[1] - self.config.lookahead))
        with eval_mode(self):
            for lo in tqdm(range(0, len(p.k), chunk), desc="V", delay=5, leave=False, disable=None):
                rows = slice(lo, lo + chunk)
                arrays = p.lg[rows], np.minimum(p.k[rows], 255), p.res[rows]
                out.append(self(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)).numpy())
        return np.concatenate(out)


# ---- Loss, optimizer

def gaps(w: torch.Tensor, ends: torch.Tensor, window: int, s: int, n: int, tau: float) -> torch.Tensor:
    """By how much V falls from node i to node i+s, i < n, told by the W that the two maxima do not share.
    Top of the W that V(i) sees, less top of those that only V(i+s) sees: negative exactly where V rises. The
    maximum is soft at temperature tau, so that all that is near it gets a gradient.
    w (B, P+J), ends (B, P), node i sees W_i .. W_(i+ends_i) -> (B, n)"""
    def top(x: torch.Tensor) -> torch.Tensor:
        return x.amax(-1) if tau == 0 or window == 0 else tau * torch.logsumexp(x / tau, -1)
    seen = w.unfold(1, window + 1, 1)  # (B, P, J+1)
    j = torch.arange(window + 1, device=w.device)
    end, end_s = ends[:, :n, None], ends[:, s:s + n, None]
    old = torch.where(j <= end, seen[:, :n], -1e4)
    new = torch.where((j + s > end) & (j <= end_s), seen[:, s:s + n], -1e4)
    return top(old) - top(new)


def falls(model: Lyapunov, chains: Chains, w: torch.Tensor, s: int, n: int, tau: float) -> torch.Tensor:
    """What the loss asks to be positive where V(T^(i+s)) < V(T^i), i < n. Terms w (B, P+J) -> (B, n)"""
    if model.config.base == "window":  # V itself falls by TIE_BREAK or fails: it has no gradient to follow
        return gaps(w, model.ends(chains["k"]), model.config.window, s, n, tau)
    v = model.combine(w, chains["lg"], chains["k"], chains["res"])
    return v[:, :n] - v[:, s:s + n]


def tau_at(step: int, args: flags.Flags) -> float:
    """Temperature of ramp and soft maximum, bits: geometric over 70 % of the steps; 0 for the hinge."""
    if args.loss == "hinge":
        return 0.0
    return TAU_START * (TAU_END / TAU_START) ** min(1.0, step / (0.7 * args.steps))


def batch_loss(model: Lyapunov, parts: list[Part], args: flags.Flags, step: int) -> torch.Tensor:
    """Loss of a batch: decrease over 1, 4 and 8 steps, and the anchor. Masked numbers have no part in it."""
    tau, window = tau_at(step, args), model.config.window
    total = torch.zeros((), device=model.device)
    for chains, n, share in parts:
        w = model.terms(chains["lg"], chains["k"], chains["res"])
        for s, coefficient in jumps(args):
            missing = args.margin - falls(model, chains, w, s, n, tau)
            # The ramp is bounded: a step that cannot be saved costs no more than 1. The hinge, the original's
            # ranking loss, cannot give up a step and so spreads small failures over many.
            loss = F.relu(missing) if args.loss == "hinge" else torch.sigmoid(missing / tau)
            if s == 1:
                grows = chains["k"][:, :n] == 1  # k = 1: T(n) > n
                loss = loss * torch.where(grows, args.growth_weight, 1.0)
            ok = chains["ok"].unfold(1, s + window + 1, 1)[:, :n].all(-1)  # all numbers that both V look at
            loss = loss * ok
            total = total + share * coefficient * loss.sum() / ok.sum().clamp(min=1)
        if args.target_type != "none":
            total = total + share * anchor_loss(model, chains, w, step)
    return total


def anchor_loss(model: Lyapunov, chains: Chains, w: torch.Tensor, step: int) -> torch.Tensor:
    """The original's anchor: mean square of V(n) - (log n + beta drift), drift the rise over the window."""
    c, lg, k = model.config, chains["lg"], chains["k"]
    drift = c.lookahead * LOG2_3 - k[:, :c.lookahead].float().sum(1)
    unit = math.log(2) if c.base == "none" else 1.0  # the original's V is in nats
    off = model.combine(w, lg, k, chains["res"])[:, 0] - unit * lg[:, 0] - model.beta * drift
    ok = chains["ok"][:, :c.window + 1].all(-1)
    weight = 0.001 ** min(1.0, max(0.0, (step - ANCHOR_START) / ANCHOR_STEPS))
    return weight * (off.square() * ok).sum() / ok.sum().clamp(min=1)


def make_optimizers(model: Lyapunov, args: flags.Flags) -> list[torch.optim.Optimizer]:
    """AdamW; with muon, Muon for all matrices but the last (worth 3-4 times the steps)."""
    if model.beta is not None:
        model.beta.requires_grad_(args.target_type == "adaptive")
    hidden = [m.weight for m in model.layers[:-1] if isinstance(m, nn.Linear) and args.optimizer == "muon"]
    scales = [model.alpha, model.delta] if model.alpha is not None else []
    taken = {id(p) for p in [*hidden, *scales]}
    groups = [{"params": [p for p in model.parameters() if id(p) not in taken and p.requires_grad]}]
    if scales:
        groups.append({"params": scales, "lr": 7 * args.lr})  # alpha has to come from 0 to about 1
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=5 * args.lr, weight_decay=0.0,
                                           adjust_lr_fn="match_rms_adamw"))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def lr_factor(step: int, args: flags.Flags) -> float:
    """Learning rate over its peak at a step: 30 steps of warm-up, flat to 40 %, then linear to 0."""
    return min(1.0, (step + 1) / 30) * min(1.0, (1 - step / args.steps) / 0.6)


# ---- Evaluation: what the figures mean

RATES = ("pass_rate", "weighted_pass_rate", "growth_pass_rate", "growth_weighted_pass_rate")
LOGGED = (*RATES, "violations_total", "on_trajectory_pass_rate")  # figures of the test sets in metrics.csv
UNSHOWN = (*RATES[1:], "val_pass_rate", "val_on_trajectory_pass_rate", "lr")  # no room in the log line
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.5, 0.95)
LOOKAHEADS = (5, 10, 20, 30, 50, 70, 100)  # of the picture of violations against lookahead


def holds(v: np.ndarray, v_next: np.ndarray) -> np.ndarray:
    """Where V decreases. A tie or a NaN is a violation."""
    return v - v_next > 0


def walk_steps(value: Value, walks: Paths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V along full paths (N, P), where V falls (N, P-1), and which steps n -> T(n) count: n > 1 (N, P-1)."""
    v = value(walks)
    return v, holds(v[:, :-1], v[:, 1:]), walks.lg[:, :v.shape[1] - 1] > 0.5


def evaluate(value: Value, exam: Exam) -> dict:
    """All figures of a V."""
    v, lg = value(exam.rows), exam.rows.lg[:, 0]
    ok, growth = holds(v[:, 0], v[:, 1]), exam.rows.k[:, 0] == 1  # k = 1: T(n) > n
    led_to = exam.rows.res[:, 0] % 3 != 0  # 3 | n has no predecessor: V may be as high there as it likes
    one = np.ones_like(exam.weight)
    def rate(weight: np.ndarray) -> float:
        return float((ok * weight).sum() / weight.sum()) if weight.any() else math.nan
    out = {"pass_rate": rate(one), "weighted_pass_rate": rate(exam.weight),
           "growth_pass_rate": rate(one * growth), "growth_weighted_pass_rate": rate(exam.weight * growth),
           "pass_rate_not_divisible_by_3": rate(one * led_to), "n_rows": len(ok)}
    v_test, test_ok, test_n = walk_steps(value, exam.walks["test"])
    _, walk_ok, walk_n = walk_steps(value, exam.walks["random"])
    bad = ~test_ok & test_n
    out |= {"violations_total": int(bad.sum()), "on_trajectory_pass_rate": float(walk_ok[walk_n].mean())}

    def by(names: Sequence, x: np.ndarray) -> dict[str, float]:
        return dict(zip(map(str, names), x.tolist(), strict=True))
    fall = np.where(test_n, v_test[:, :-1] - v_test[:, 1:], np.inf)
    out["violations"] = by(TEST_SEEDS, bad.sum(axis=1))
    out["odd_steps"] = by(TEST_SEEDS, test_n.sum(axis=1))
    out["worst_margin"] = by(TEST_SEEDS, fall.min(axis=1))
    _, record_ok, record_n = walk_steps(value, exam.walks["record"])
    bad = (~record_ok & record_n).sum(axis=1)
    out["records"], out["record_violations"] = by(RECORD_SEEDS, bad), int(bad.sum())
    big = walk_n & (exam.walks["random"].lg[:, :walk_n.shape[1]] > 16)
    out["on_trajectory_steps"] = int(walk_n.sum())
    out["on_trajectory_above_16_bits"] = float(walk_ok[big].mean())
    # bits: V scaled so that its regression on log2 n has slope 1; a V that does not grow with n has no scale
    sound = np.isfinite(v).all() and len(np.unique(lg)) > 1
    out["slope"] = float(np.polyfit(lg, v[:, 0], 1)[0]) if sound else math.nan
    scale = out["slope"] if out["slope"] > 0.01 else math.nan
    out["margin_quantiles"] = by(QUANTILES, np.quantile((v[:, 0] - v[:, 1]) / scale, QUANTILES))
    out["v_above_log2n"] = np.quantile(v[:, 0] / scale - lg, [0, 1]).tolist()
    out["v_min"] = float(min(v.min(), v_test.min()))
    return out


def validate(model: Lyapunov, exam: Exam) -> dict[str, float]:
    """Pass rates on the validation numbers and trajectories, and their mean, by which best.pt is chosen."""
    v = model.value(exam.validation_rows)
    _, ok, counts = walk_steps(model.value, exam.walks["validation"])
    walk_ok = ok[counts & exam.validation_steps[:, :counts.shape[1]]]
    rows, walks = (float(x.mean()) if len(x) else 0.0 for x in (holds(v[:, 0], v[:, 1]), walk_ok))
    return {"val_pass_rate": rows, "val_on_trajectory_pass_rate": walks, "val": (rows + walks) / 2}


def baselines(lookahead: int) -> dict[str, Value]:
    """V that need no training. The mean of log2 T^j(n), j <= L, fails where T^(L+1)(n) >= n."""
    closed = Config(lookahead, layers=None, sees=0, hold=0)
    return {"linear mean": lambda p: sliding_window_view(p.lg, lookahead + 1, axis=1).mean(-1),
            "closed form": Lyapunov(closed).value,
            "closed + mod 3": Lyapunov(replace(closed, mod3=True)).value}


def lower_bound(lookahead: int) -> float:
    """Least share of violations on trajectories of a V that is smooth in log n and knows only k_1..k_L.
    For iid k, the windows of L + 1 values split into rotation classes; one that rises needs a violation in
    each turn. So P(k_1 + ... + k_(L+1) <= (L+1) log2 3) / (L+1): a sum <= s is L+1 heads in s coin flips."""
    m = lookahead + 1
    s = math.floor(m * LOG2_3)
    return sum(math.comb(s, heads) for heads in range(m, s + 1)) / 2**s / m


def format_evaluation(figures: dict, others: dict[str, dict] | None = None) -> str:
    """The figures of evaluate_checkpoint as text; others: figures of more V to show beside it, by name."""
    total, seeds = sum(figures["odd_steps"].values()), [str(s) for s in TEST_SEEDS]
    lines = [f"V with lookahead {figures['lookahead']}, {figures['n_params']} parameters, "
             f"{figures['split']} split, step {figures['best_step']} chosen on validation",
             f"  {'V':<16} violations  " + " ".join(f"{s:>7}" for s in seeds)
             + "    pass    wtd    growth  gr-wtd  not 3|n  on traj.  records"]
    for name, r in {**(others or {}), "this V": figures}.items():
        keys = (*RATES, "pass_rate_not_divisible_by_3", "on_trajectory_pass_rate")
        lines.append(f"  {name:<16}{r['violations_total']:>7}/{total}  "
                     + " ".join(f"{r['violations'][s]:>7}" for s in seeds) + "  "
                     + " ".join(f"{100 * r[key]:7.3f}" for key in keys) + f"  {r['record_violations']:>5}")
    for name, key, form in (("odd steps", "odd_steps", ">7"), ("worst margin", "worst_margin", ">7.3f")):
        lines.append(f"  {name:<29}" + " ".join(format(figures[key][s], form) for s in seeds))
    bounds = [100 - 100 * lower_bound(figures["lookahead"] + extra) for extra in (0, RESIDUE_DIGITS)]
    n, steps = figures["n_rows"], figures["on_trajectory_steps"]
    quantiles = ", ".join(f"{float(q):g}: {m:.4f}" for q, m in figures["margin_quantiles"].items())
    return "\n".join([
        *lines,
        f"  pass rate {format_rate(round(figures['pass_rate'] * n), n)}",
        f"  on trajectories {format_rate(round(figures['on_trajectory_pass_rate'] * steps), steps)}, "
        f"above 16 bits {100 * figures['on_trajectory_above_16_bits']:.2f}%; "
        f"bound for V of k alone {bounds[0]:.3f}%, with residues {bounds[1]:.3f}%",
        f"  margin (bits) quantiles: {quantiles}",
        f"  V: smallest {figures['v_min']:.4g}, slope on log2 n {figures['slope']:.4f}, "
        f"{figures['v_above_log2n'][0]:.2f} to {figures['v_above_log2n'][1]:.2f} above log2 n"])


# ---- Checkpoints

def load_model(path: str | os.PathLike) -> tuple[Lyapunov, dict]:
    """The model of a checkpoint, on the CPU, and the checkpoint. Raises UserError if it cannot be rebuilt."""
    path = checkpoint.file_of(path)
    saved = checkpoint.check(checkpoint.read(path), path, SCRIPT, like=Config, step=int, config=dict, args=dict)
    # two fields of older files are constants now: with another value Config does not know them
    retired = {"tie_break": TIE_BREAK, "features": "window"}
    config = {name: x for name, x in saved["config"].items() if name not in retired or x != retired[name]}
    try:
        model = Lyapunov(Config(**config))
    except (TypeError, UserError) as e:  # a field too many, or a value that cannot be
        raise UserError(f"{path}: its config cannot be used ({e})") from None
    checkpoint.load_weights(model, saved.get("model"), path)
    return model, saved


def sets_of(saved: dict, path: str | os.PathLike) -> dict:
    """The split and the evaluation rows of a checkpoint's run; unknown if its test seeds were others."""
    own = flags.restored(parse_args([]), saved["args"], path, names=("split", "eval_csv"))
    same = saved["args"].get("test_seeds", list(TEST_SEEDS)) == list(TEST_SEEDS)  # a flag of older runs
    return {"split": own.split if same else "unknown", "eval_csv": own.eval_csv}


def load(path: str | os.PathLike) -> Callable[[int | Sequence[int]], float | np.ndarray]:
    """The trained V of a checkpoint or run folder: V(27), or V([27, 703]) as float64; numbers of any size.
    Raises UserError for a bad checkpoint or a number that is not odd and positive."""
    model, _ = load_model(path)

    def V(n):
        one = isinstance(n, int | np.integer)
        numbers = [n] if one else list(n)
        if not numbers or not all(isinstance(m, int | np.integer) and m > 0 and m % 2 for m in numbers):
            raise UserError(f"V is defined on odd numbers > 0, not on {n!r:.60}")
        v = model.value(paths(to_limbs(list(map(int, numbers))), model.config.lookahead))[:, 0]
        return float(v[0]) if one else v
    return V


def evaluate_checkpoint(path: str | os.PathLike, args: argparse.Namespace) -> dict:
    """Figures of a checkpoint by the code that training uses, on the sets of its run. With another --eval-csv
    in args, whose rows may have been trained on, the split is reported as unknown."""
    model, saved = load_model(path)
    sets, lookahead = sets_of(saved, path), model.config.lookahead
    if getattr(args, "eval_csv", None) not in (None, sets["eval_csv"]):
        sets = {"split": "unknown", "eval_csv": args.eval_csv}
    exam = make_exam(sets["eval_csv"], lookahead)
    model.to(devices.get_device(getattr(args, "device", "cpu")))
    return {"script": SCRIPT, "n_params": count_parameters(model), "lookahead": lookahead,
            "split": sets["split"], "best_step": saved["step"], **evaluate(model.value, exam)}


# ---- Training

def make_model(args: flags.Flags, saved: dict | None) -> Lyapunov:
    """The model of a run: fresh, from the seed alone, or with the weights of --init-from or of a last.pt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = Lyapunov(make_config(args))
    if saved:
        checkpoint.load_weights(model, saved["model"], args.resume)
    elif args.init_from:
        source, its = load_model(args.init_from)
        if source.config != model.config:
            raise UserError(f"{args.init_from}: another model, {source.config}")
        sets = sets_of(its, args.init_from)
        if args.split == "honest" and (sets["split"], sets["eval_csv"]) != ("honest", args.eval_csv):
            raise UserError(f"{args.init_from}: was trained on other sets, perhaps on what is evaluated here")
        model.load_state_dict(source.state_dict())
    return model


def train(args: flags.Flags) -> dict:
    """One run: train, choose the best checkpoint on validation, evaluate it, draw, and return the summary."""
    devices.refuse_ranks(SCRIPT)
    args, saved = run.restore(args, SCRIPT, model=dict, optimizers=list, mined=dict, best=float)
    device = devices.get_device(args.device)
    model = make_model(args, saved).to(device)
    exam = make_exam(args.eval_csv, args.lookahead)
    if args.steps == 0:  # the closed form
        with run.Run(args, SCRIPT, __file__, None) as r:
            r.save("best.pt", config=asdict(model.config), model={})
            return finish(r, args, exam, {})
    pools = make_pools(args, exam)
    optimizers = make_optimizers(model, args)
    best = saved["best"] if saved else -1.0
    if saved:
        with files.refuse_damaged(args.resume):
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                shapes = [(x.shape, p.shape) for p, own in optimizer.state.items() for x in own.values()]
                if not (sum(g["peak"] for g in optimizer.param_groups) and all(a in ((), b) for a, b in shapes)):
                    raise ValueError("the state of another optimizer")
            if saved["mined"]:  # joined with nothing: what does not fit the pool is found here
                pools.mined = join(take(pools.hard, slice(0)), saved["mined"])
    with run.Run(args, SCRIPT, __file__, saved) as r:  # its folder is made now that all fits
        print(devices.describe(device), f"{count_parameters(model)} parameters", f"lookahead {args.lookahead}",
              f"{args.split} split", f"{pools.first[-1]} + {args.pool} chains",
              *(f"{name} {n}" for name, n in pools.counts.items()), r.folder, sep=" | ", flush=True)
        loss = norm = torch.tensor(math.nan)  # an empty cell until a step is taken
        for step in range(r.start, args.steps + 1):
            tested = r.due(step, args.test_every)
            due, last = tested or r.due(step), r.last(step)
            if due or last:
                if step > r.start and not torch.isfinite(loss + norm):
                    raise UserError(f"the loss is not finite at step {step}; the last good checkpoint is "
                                    f"{r.folder / 'last.pt'} (try a lower --lr)")
                state = {"config": asdict(model.config),
                         "model": {name: x.cpu() for name, x in model.state_dict().items()}}
            if due:  # at step 0 base window is the closed form; a net alone passes about half
                figures = evaluate(model.value, exam) if tested else {}
                row = {"step": step, "loss": loss.item(), **validate(model, exam),
                       **{name: figures.get(name) for name in LOGGED},
                       "seeds": pools.active_seeds(step, args) if args.curriculum else None,
                       "mined": len(pools.mined["k"]) if pools.mined else None,
                       "lr": args.lr * lr_factor(step, args), "grad": norm.item()}
                r.record(row)
                r.show({name: x for name, x in row.items() if name not in UNSHOWN})
                if row["val"] > best:
                    best = row["val"]
                    r.save("best.pt", **state)
            if due or last:
                r.save("last.pt", **state, optimizers=[o.state_dict() for o in optimizers],
                       mined=pools.mined, best=best)
            if last:
                break
            if args.mine_negatives and step and step % args.mine_interval == 0:
                mine(model, pools, args, exam, step)
            parts = [({name: x.to(device) for name, x in chains.items()}, n, share)
                     for chains, n, share in sample_batch(pools, args, step)]
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = group["peak"] * lr_factor(step, args)
            model.zero_grad(set_to_none=True)
            with devices.autocast(device, "auto"):
                loss = batch_loss(model, parts, args, step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
        r.leave_if_stopped()
        return finish(r, args, exam, pools.counts)


def finish(r: run.Run, args: flags.Flags, exam: Exam, counts: dict) -> dict:
    """Evaluate best.pt beside the baselines, write summary.json, report.json, pictures; print the table."""
    model, saved = load_model(r.folder / "best.pt")
    model.to(devices.get_device(args.device))
    figures = {"n_params": count_parameters(model), "lookahead": args.lookahead, "split": args.split,
               "best_step": saved["step"], **counts, **evaluate(model.value, exam)}
    if args.exhaustive:
        figures["exhaustive"] = exhaustive(model, args.exhaustive)
    others = {name: evaluate(value, exam) for name, value in baselines(args.lookahead).items()}
    # what the pictures need beside that: V along the test trajectories, and the baselines at other lookaheads
    v, ok, counted = walk_steps(model.value, exam.walks["test"])
    curves, by_lookahead = {}, {}
    for i, (seed, n) in enumerate(zip(TEST_SEEDS, counted.sum(axis=1), strict=True)):
        x = {"log2_n": exam.walks["test"].lg[i, :n + 1], "v": v[i, :n + 1], "ok": ok[i, :n]}
        curves[seed] = {name: y.tolist() for name, y in x.items()}
    for m in LOOKAHEADS:
        by_lookahead[m] = {"bound": lower_bound(m), "bound with residues": lower_bound(m + RESIDUE_DIGITS)}
        for name, value in baselines(m).items():
            _, ok, counted = walk_steps(value, exam.walks["random"])
            by_lookahead[m][name] = float(1 - ok[counted].mean())
    files.write_json(r.folder / "report.json", {"curves": curves, "by_lookahead": by_lookahead, "baselines": others})
    summary = r.summary(preset=args.preset, lower_bound=lower_bound(args.lookahead), **figures)
    draw_pictures(r.folder, [r.folder])
    print("\n" + format_evaluation(figures, others))
    print(f"{figures['violations_total']} of {sum(figures['odd_steps'].values())} violations, pass rate "
          f"{100 * figures['pass_rate']:.2f}%, {r.seconds():.0f} s, {r.folder}")
    return summary


# ---- Pictures

def draw_pictures(folder: Path, runs: Sequence[Path]) -> list[Path]:
    """Draw the pictures of the run in `folder` from its files; in that of lookaheads stand all `runs`."""
    report, summary, args = (files.read_json(folder / f"{x}.json") for x in ("report", "summary", "args"))
    fig, axes = plots.new_figure(1, 2)
    for ax, seed in zip(axes, ("27", "626331"), strict=True):
        c = report["curves"][seed]
        bad = [i + 1 for i, ok in enumerate(c["ok"]) if not ok]
        ax.plot(c["log2_n"], color="0.6", lw=1, label="log2 n")
        ax.plot(c["v"], color="tab:blue", lw=1.5, label="V(n)")
        label = f"V rises ({len(bad)} of {len(c['ok'])} steps)"
        ax.plot(bad, [c["v"][i] for i in bad], "o", color="tab:red", ms=5, label=label)
        ax.set(title=f"trajectory of {seed}", xlabel="odd step", ylabel="bits")
        ax.legend(frameon=False)
    if args["model"] in ("window", "closed"):
        fig.suptitle(f"{plots.as_label(summary['name'])}: V is the highest term in the next {summary['lookahead']} steps. Flat: "
                     f"it is ahead, V falls\nby {TIE_BREAK} a step. Plunge: the last high one is passed.")
    made = [plots.save_figure(fig, folder / "trajectories.png")]
    fig, ax = plots.new_figure()
    none = 1e-6  # what has no violation stands at the bottom; one among the 62,426 steps is 1.6e-5
    styles = {"linear mean": "C7^-", "closed form": "C0s-", "bound": "k--", "bound with residues": "k:"}
    for name, style in styles.items():
        points = [(int(m), max(row[name], none)) for m, row in report["by_lookahead"].items()]
        ax.plot(*zip(*points, strict=True), style, ms=4, label=name)
    for s in (files.read_json(other / "summary.json") for other in runs):
        rate = max(1 - s["on_trajectory_pass_rate"], none)
        ax.plot(s["lookahead"], rate, "*", ms=12, label=plots.as_label(s["name"]), clip_on=False)
    ax.set(yscale="log", ylim=(none, 1), xlabel="lookahead L", ylabel="violations per trajectory step")
    ax.set_yticks([none, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["none", "0.01%", "0.1%", "1%", "10%", "100%"])
    ax.minorticks_off()
    fig.legend(loc="outside right upper", frameon=False)
    made.append(plots.save_figure(fig, folder / "lookahead.png"))
    rows = metrics.read(folder) if (folder / "metrics.csv").is_file() else []
    for key in (x for x in ("loss", "val_on_trajectory_pass_rate") if metrics.points(rows, "step", x)[0]):
        made.append(plots.curves([folder], key, "step", folder / f"{key}.png", log=key == "loss"))
    return made


# ---- Use of a trained V

def exhaustive(model: Lyapunov, limit: int, chunk: int = 1 << 15) -> dict:
    """Check V(T(n)) < V(n) for every odd n, 3 <= n < limit: how many, how many violations, the first five."""
    n_checked, violations, first = 0, 0, []
    for lo in tqdm(range(3, limit, 2 * chunk), desc="exhaustive", unit="chunk", disable=None):
        n = np.arange(lo, min(lo + 2 * chunk, limit), 2, dtype=np.uint64)
        limbs = np.stack([n & np.uint64(0xFFFFFFFF), n >> np.uint64(32)])
        v = model.value(paths(limbs, model.config.lookahead + 1))
        bad = n[~holds(v[:, 0], v[:, 1])]
        n_checked += len(n)
        violations += len(bad)
        first = (first + bad[:5].tolist())[:5]
    print(f"every odd n < {limit}: {violations} violations among {n_checked}, first: {first or 'none'}")
    return {"limit": limit, "n": n_checked, "violations": violations, "first": first}


def read_numbers(text: str) -> list[int]:
    """Odd numbers from a list `27,703`, or from a file, some on each line. Raises UserError with the line."""
    if os.path.isfile(text):  # Path(text).is_file() raises for a number of 256 digits
        lines = enumerate(Path(text).read_text(errors="replace").splitlines(), 1)
        words = [(f"{text}, line {i}", word) for i, line in lines for word in line.replace(",", " ").split()]
    else:
        words = [("neither a file nor a list of odd numbers", word) for word in text.split(",")]
    if not words:
        raise UserError(f"{text}: no numbers")
    return [odd_number(word, where) for where, word in words]


def score(model: Lyapunov, numbers: list[int]) -> None:
    """Write n, t1 = T(n), V(n), V(T(n)) and their difference as CSV to standard output."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["n", "t1", "v", "v_t1", "margin"])
    v = model.value(paths(to_limbs(numbers), model.config.lookahead + 1))
    out.writerows([n, syracuse(n)[0], a, b, a - b] for n, (a, b) in zip(numbers, v.tolist(), strict=True))


def main(argv: list[str] | None = None) -> dict | None:
    sys.set_int_max_str_digits(0)  # numbers of any size may be scored
    args = parse_args(argv)
    with files.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        if args.make_eval:
            make_eval_csv(args.make_eval)
        elif args.analyze_seeds:
            print("           n  odd steps  total stopping time    maximum odd value   ratio to n")
            for a in map(analyze, read_numbers(args.analyze_seeds)):
                print("{:>12} {:>10} {:>20} {:>20} {:>12.6g}".format(*a.values()))
        elif args.plot:
            for folder in args.plot:
                with files.refuse_damaged(folder):
                    print(*draw_pictures(Path(folder), list(map(Path, args.plot))), sep="\n")
        elif args.score:
            if not args.checkpoint and args.model != "closed":
                raise UserError("--score: needs --checkpoint RUN, or --model closed")
            model = load_model(args.checkpoint)[0] if args.checkpoint else Lyapunov(make_config(args))
            score(model.to(devices.get_device(args.device)), read_numbers(args.score))
        elif args.checkpoint:
            figures = evaluate_checkpoint(args.checkpoint, args)
            print(format_evaluation(figures))
            if args.exhaustive:
                model = load_model(args.checkpoint)[0].to(devices.get_device(args.device))
                figures["exhaustive"] = exhaustive(model, args.exhaustive)
            return figures
        else:
            return train(args)


if __name__ == "__main__":
    main()
