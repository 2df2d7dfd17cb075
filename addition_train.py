"""Which transformers of a few hundred parameters learn to add two ten-digit numbers, and on which seeds?

    python addition_train.py                                     # 8 seeds of 196 parameters, about 40 s, all grok
    python addition_train.py --preset rope122 --seeds 0-15       # smaller, 16 seeds in one batched computation
    python addition_train.py --preset ref456 --seeds 42-49       # the published 456 parameters that failed in the notes
    python addition_train.py --add 1234567890+9876543210 --checkpoint logs/kept/addition_train/rope196
    python evaluate_checkpoints.py logs/kept/addition_train/*/best_*.pt     # 100,000 pairs and tables for each

All seeds of a run train side by side: the seed is the leading axis of every tensor. A model is one layer, so whatever
comes before the attention depends on (position, token) alone: `batch_loss` looks it up in tables and computes only the
positions that predict. The modules RotaryAdder and LearnedAdder are the same models written plainly.
A run writes logs/addition_train/NAME/: args.json, run.txt, addition_train.py, metrics.csv, last.pt (all seeds),
best_sSEED.pt (one model each), summary.json and pictures. Descends from yinglunz/A-456-Parameter-Transformer and from
AdderBoard.
"""
from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate, wilson
from common.run import UserError, integer, real

SCRIPT, FORMAT = "addition_train.py", 1  # of its checkpoints
DIGITS, ANSWER = 10, 11                  # digits of an operand, of a sum
LIMIT = 10**DIGITS                       # operands are below
PLUS, EQUALS, EOS = 10, 11, 13           # tokens of the learned family; 0..9 are the digits, 12 is padding, never used
MAX_BYTES = 10_000_000                   # a checkpoint of one of these models has a few kB
COMPILE_FROM = 2_500_000                 # sums in a run from which compiling the step, half a minute, pays
CHUNK = 50                               # steps whose batches are drawn at once
GROKKED = 0.99                           # exact match from which a seed counts
TRAIN, VALIDATION, TEST = 1, 2, 3        # streams of pairs
SPLIT_SEEDS = (41, 100, 200, 300, 400, 500, 999, 1234, 7777, 31415)  # of the original evaluation, 10,000 pairs each

# What --preset sets; a flag on the command line wins. ref: the defaults of the original's command line.
ROTARY = {"family": "rotary", "init": "arc+phase", "batch_size": 128, "optimizer": "soap", "lr": 0.05, "beta2": 0.99,
          "weight_decay": 0.05, "decay_until": 0.4, "warmup": 0.1, "schedule": "linear", "min_lr_ratio": 0.0,
          "entropy_bonus": 0.03, "entropy_until": 0.3, "steps": 3000, "eval_every": 100}
REF = {"family": "learned", "init": "reference", "d_model": 7, "d_ff": 14, "batch_size": 512, "lr": 0.02,
       "beta2": 0.999, "weight_decay": 0.01, "warmup": 1350, "steps": 27_000, "curriculum": "3:2000,6:7000",
       "eval_every": 1000, "val_size": 5000}
LOW_RANK = {"pos_rank": 3, "qkv_rank": 3, "attn_out_rank": 2, "ffn_rank": 3, "use_rmsnorm": True,
            "tie_qkv": "shareA_tieKV"}
PRESETS = {
    "rope196": {**ROTARY, "d_model": 4, "d_ff": 6, "steps": 2000},
    "rope140": {**ROTARY, "d_model": 4, "d_ff": 4, "tie": "kv+oq"},
    "rope122": {**ROTARY, "d_model": 3, "d_ff": 3, "lr": 0.06},
    "rope62": {**ROTARY, "d_model": 3, "d_ff": 2, "tie": "kv+oq", "embedding": "arc", "steps": 10_000,
               "eval_every": 500},
    "rope36": {**ROTARY, "d_model": 3, "d_ff": 2, "tie": "all", "embedding": "arc", "steps": 10_000, "eval_every": 500},
    "ref": REF,
    "ref456": {**REF, **LOW_RANK, "steps": 54_000},
    "grok456": {**REF, **LOW_RANK, "curriculum": "", "full_length": 1.0, "random_zeros": 1.5, "zeros_until": 1.0,
                "optimizer": "soap", "basis_every": 100, "lr": 0.03, "beta2": 0.99, "warmup": 0.1, "schedule": "linear",
                "min_lr_ratio": 0.0, "smooth_positions": 3.0, "entropy_bonus": 0.1, "entropy_until": 0.6,
                "batch_size": 128, "steps": 10_000, "eval_every": 500, "val_size": 2000},
}
FAMILY_FLAGS = {"rotary": ("head_dim", "period", "tie", "embedding"),
                "learned": ("pos_rank", "qkv_rank", "attn_out_rank", "ffn_rank", "use_rmsnorm", "tie_qkv",
                            "smooth_positions")}
INITS = {"rotary": ("arc+phase", "random"), "learned": ("reference",)}


# ---- Flags

def seed_list(text: str) -> list[int]:
    """An argparse type: seeds like 42-49,51."""
    seeds = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not (first <= last < 2**32 and last - first < 4096):
            raise argparse.ArgumentTypeError(f"{part!r}: expected seeds like 43 or 42-49")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"a seed stands there twice: {text}")
    return seeds


def curriculum(text: str) -> list[tuple[int, int]]:
    """(digits, step) pairs of a text like 3:2000,6:7000: operands of up to 3 digits before step 2000, and so on."""
    parts = text.split(",") if text else []
    phases = [tuple(map(int, x.split(":"))) for x in parts if re.fullmatch(r"\d{1,2}:\d{1,9}", x)]
    in_order = phases == sorted(phases, key=lambda phase: phase[1])
    if len(phases) < len(parts) or not in_order or any(not 1 <= d <= DIGITS for d, _ in phases):
        raise argparse.ArgumentTypeError(f"{text!r}: expected DIGITS:STEP pairs like 3:2000,6:7000, digits 1..{DIGITS}")
    return phases


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = run.Parser(description=__doc__)
    p.add_argument("--preset", choices=list(PRESETS), help="sets defaults of model and training; those shown here "
                   "are rope196's (default: rope196, or ref, the original's, where a flag of its model is given)")

    g = p.add_argument_group("data")
    g.add_argument("--seeds", type=seed_list, metavar="A-B,C", help="one model for each (default: --seed, or 0-7)")
    g.add_argument("--batch-size", type=integer(1, 1 << 16), help="sums per step and seed")
    g.add_argument("--full-length", type=real(0, 1), default=0.0, help="share of sums with ten digits; in the others "
                   "both operands are below 10^n, n uniform in 1..10")
    g.add_argument("--random-zeros", type=real(0, 10), default=0.0, help="share of sums in which each operand's digits "
                   "are set to 0 at random, at a rate drawn for each operand; above 1: all, until it has fallen to 1")
    g.add_argument("--zeros-until", type=real(0, 1), default=0.0, help="share of the run at whose end the share of "
                   "random zeros, which falls linearly, is 0; 0: it does not fall")
    g.add_argument("--curriculum", metavar="N:STEP,...", default="",
                   help="n at most N before STEP, e.g. 3:2000,6:7000; default: none")

    g = p.add_argument_group("model")
    g.add_argument("--d-model", type=integer(2, 1024), help="width of the residual stream")
    g.add_argument("--d-ff", type=integer(1, 4096), help="hidden width of the feed-forward layer")
    g.add_argument("--init", choices=sorted({x for y in INITS.values() for x in y}),
                   help="rotary: arc+phase (digits on an arc, queries and keys in phase) or random; learned: reference")
    g.add_argument("--head-dim", type=integer(4, 256), default=4, help="rotary: width of the head, a multiple of 4")
    g.add_argument("--period", type=real(2, 1e6), default=12.0, help="rotary: positions a turn of the first frequency")
    g.add_argument("--tie", choices=["none", "kv+oq", "all"], default="none", help="rotary: K = V and O = Q^T; all: "
                   "everything from Q, gate and up, and one norm")
    g.add_argument("--embedding", choices=["table", "arc"], default="table", help="rotary: arc has 3 parameters")
    g.add_argument("--pos-rank", type=integer(0), default=0, help="learned: rank of the positions; 0: full")
    g.add_argument("--qkv-rank", type=integer(0), default=0, help="learned: rank of Q, K and V; 0: full")
    g.add_argument("--attn-out-rank", type=integer(0), default=0, help="learned: rank of the output map; 0: full")
    g.add_argument("--ffn-rank", type=integer(0), default=0, help="learned: rank of both feed-forward maps; 0: full")
    g.add_argument("--use-rmsnorm", action="store_true", help="learned: RMSNorm in place of LayerNorm")
    g.add_argument("--tie-qkv", choices=["none", "shareA", "shareA_tieKV", "shareA_tieQK"], default="none",
                   help="learned: what Q, K and V = h A B share")

    g = p.add_argument_group("optimization")
    g.add_argument("--steps", "--train-steps", type=integer(1), help="optimizer steps of each seed")
    g.add_argument("--optimizer", choices=["adamw", "soap"], default="adamw", help="soap: AdamW in the eigenbasis of "
                   "the covariance of a seed's gradient")
    g.add_argument("--basis-every", type=integer(1), default=25, help="soap: steps between new eigenbases")
    g.add_argument("--lr", type=real(0, 10, above=True), help="peak learning rate")
    g.add_argument("--schedule", choices=["cosine", "linear"], default="cosine", help="of lr after the warm-up")
    g.add_argument("--beta2", type=real(0, 0.999999), help="of AdamW; beta1 is 0.9")
    g.add_argument("--weight-decay", type=real(0, 1), help="decoupled, on every parameter")
    g.add_argument("--decay-until", type=real(0, 1), default=0.0, help="share of the run at whose end the weight "
                   "decay, which falls linearly, is 0; 0: it does not fall")
    g.add_argument("--warmup", "--warmup-steps", type=real(0), help="steps in which lr rises from 0; below 1: a share")
    g.add_argument("--min-lr-ratio", type=real(0, 1), default=0.1, help="lr at the end, as a share of --lr")
    g.add_argument("--smooth-positions", type=real(0), default=0.0, help="learned: decoupled decay of the second "
                   "differences of the positions (or their factor A), fading until 70 %% of the run; 0: off")
    g.add_argument("--entropy-bonus", type=real(0), default=0.0, help="reward in nats of loss for each nat of entropy "
                   "of the attention, which keeps it soft; falls linearly")
    g.add_argument("--entropy-until", type=real(0, 1, above=True), default=0.5, help="share of the run when it is 0")
    g.add_argument("--grad-clip", type=real(0), default=1.0, help="gradient norm of a seed; 0: no clipping")
    g.add_argument("--restart-stuck", action="store_true", help="start a seed anew, from other random weights, if it "
                   "has below 1 %% a quarter of the run after its start; counted and reported")
    g.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                   help="torch.compile of the step, eager where it fails; auto: in runs of 2.5 million sums or more, "
                   "as it takes half a minute")

    g = p.add_argument_group("evaluation")
    g.add_argument("--eval-every", "--eval-interval", type=integer(1), default=500,
                   help="steps between validations and saves")
    g.add_argument("--val-size", type=integer(1, 1 << 20), default=2000, help="pairs for choosing best_sSEED.pt")
    g.add_argument("--test-size", type=integer(1, 1 << 24), default=100_000, help="fresh pairs at the end")

    g = p.add_argument_group("instead of training")
    g.add_argument("--checkpoint", metavar="PATH", help="a trained model: evaluate it, or --add, --export-submission")
    g.add_argument("--add", metavar="A+B", help="answer one sum, digit by digit")
    g.add_argument("--export-submission", metavar="FILE.py", help="write the model as a file for AdderBoard's verifier")
    g.add_argument("--plot", metavar="RUN", type=Path, help="draw the pictures of this run again")
    run.add_run_arguments(p)
    p.add_argument("--run-name", dest="name", default=argparse.SUPPRESS, help="the same as --name, as in the original")

    flags = set().union(*PRESETS.values())
    plain = {a.dest: a.default for a in p._actions if a.dest in flags}
    p.set_defaults(**PRESETS["rope196"])  # what --help shows
    first = run.parse(p, argv)
    preset = first.preset or ("ref" if set(FAMILY_FLAGS["learned"]) & set(first.given) else "rope196")
    p.set_defaults(**{**plain, **PRESETS[preset], "preset": preset})
    args = run.parse(p, argv)
    family = args.family
    if args.seeds is None:
        args.seeds = [args.seed] if "seed" in args.given else list(range(8))
    elif "seed" in args.given and args.seeds != [args.seed]:
        p.error("argument --seed: not together with --seeds")
    args.seed = args.seeds[0]
    try:
        phases = curriculum(args.curriculum)
        n_params = count_parameters(make_module(make_config(vars(args), "flags")))
    except (argparse.ArgumentTypeError, UserError) as e:
        p.error(str(e) if isinstance(e, UserError) else f"argument --curriculum: {e}")
    foreign = [f for f in FAMILY_FLAGS["learned" if family == "rotary" else "rotary"] if f in args.given]
    modes = [m for m in (args.add or args.export_submission or args.checkpoint, args.plot, args.resume) if m]
    paths = ("checkpoint", "add", "export_submission", "resume", "init_from", "out_dir")
    empty = [f for f in paths if vars(args)[f] == ""]
    idle = sorted(set(args.given) - {"checkpoint", "add", "export_submission", "device", "threads", "precision"})
    need = memory_needed(args, n_params)
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 34
    for wrong, message in (
        (foreign, f"--{(foreign or [''])[0].replace('_', '-')}: not a flag of the {family} models ({preset})"),
        (args.init not in INITS[family], f"--init: {args.init} is not for the {family} models"),
        ("curriculum" in args.given and phases and phases[-1][1] >= args.steps,
         f"--curriculum: longer than the {args.steps} steps of the run"),
        ("warmup" in args.given and args.warmup >= args.steps,
         f"--warmup: {args.warmup:g} steps of a run of {args.steps}"),
        (args.optimizer == "soap" and n_params > 2000, f"--optimizer: soap has a basis of all {n_params} parameters at "
         "once; it is for models of up to 2000"),
        (args.precision == "bf16", "--precision: these models are trained in fp32"),
        (len(modes) > 1, "--checkpoint: one of --checkpoint, --plot, --resume at a time"),
        (args.add and args.export_submission, "--add: not together with --export-submission"),
        ((args.add or args.export_submission) and not args.checkpoint, "--checkpoint: which model? give its path"),
        (args.resume and args.init_from, "--init-from: not together with --resume"),
        (args.checkpoint and idle and not empty,
         f"--checkpoint: not together with --{(idle or [''])[0].replace('_', '-')}, a flag of training"),
        (empty, f"--{(empty or [''])[0].replace('_', '-')}: empty"),
        (need > 0.6 * have, f"--batch-size: {len(args.seeds)} seeds x {args.batch_size} sums need about "
         f"{need / 1e9:.0f} GB of the {have / 1e9:.0f} GB here"),
    ):
        if wrong:
            p.error(f"argument {message}")
    return args


def flags_of(args: argparse.Namespace) -> list[str]:
    """The command line that gives the training flags in a namespace: the preset, and what differs from it."""
    flags, preset = [], PRESETS.get(args.preset, {})
    foreign = FAMILY_FLAGS["learned" if args.family == "rotary" else "rotary"]
    for name, value in vars(args).items():
        own = name not in ("given", "family", "seed", *foreign, *run.RUN_FLAGS) and value != preset.get(name)
        if own and value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [text])
    return flags


def memory_needed(args: argparse.Namespace, n_params: int) -> float:
    """Bytes of the step, a chunk of batches and the optimizer, roughly: attention weights in fp32, tokens in int64."""
    per_sum = 4 * 12 * 34 * (8 + args.d_model) + 4 * 12 * 6 * args.d_ff + CHUNK * 8 * 60
    return len(args.seeds) * (args.batch_size * per_sum + 24 * n_params * (n_params if args.optimizer == "soap" else 1))


# ---- Problem: digits, carries, tokens

def digits_of(x: np.ndarray, n: int) -> np.ndarray:
    """The n lowest decimal digits of whole numbers (...,) -> (..., n), least significant first."""
    return (x[..., None] // 10 ** np.arange(n, dtype=np.int64) % 10).astype(np.int8)


def carries(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether column i of a + b carries into column i + 1: digits (..., 10) twice -> (..., 10) of 0 and 1."""
    out = np.zeros_like(a)
    for i in range(DIGITS):
        out[..., i] = a[..., i] + b[..., i] + (out[..., i - 1] if i else 0) > 9
    return out


def digit_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Digits of the sum: (..., 10) twice -> (..., 11), least significant first."""
    c = carries(a, b)
    low = a + b + np.concatenate([np.zeros_like(c[..., :1]), c[..., :-1]], -1) - 10 * c
    return np.concatenate([low, c[..., -1:]], -1)


def encode(family: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of sums: digits (..., 10) twice, least significant first -> input (..., J) and target (..., Q).

    rotary:  0, a, 0 0, b, 0, then the sum, all least significant digit first; J = 34, Q = 11.
    learned: a + b =, most significant first, then the sum least significant first, EOS; J = 33, Q = 12.
    The last Q positions of the input predict the target (teacher forcing).
    """
    c = digit_sum(a, b)

    def token(t: int) -> np.ndarray:
        return np.full((*a.shape[:-1], 1), t, a.dtype)

    if family == "rotary":
        return np.concatenate([token(0), a, token(0), token(0), b, token(0), c[..., :-1]], -1), c
    return (np.concatenate([a[..., ::-1], token(PLUS), b[..., ::-1], token(EQUALS), c], -1),
            np.concatenate([c, token(EOS)], -1))


# ---- Data: pure functions of a stream's name, so that a resumed run needs no generator state

def uniform_pairs(stream: Sequence[int], n: int, digits: int = DIGITS) -> tuple[np.ndarray, np.ndarray]:
    """Digits (n, 10) of n uniform pairs of operands below 10^digits."""
    x = np.random.default_rng(stream).integers(0, 10, (n, 2, DIGITS), dtype=np.int8)
    x[..., digits:] = 0
    return x[:, 0], x[:, 1]


def batches(chunk: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The batches of CHUNK steps: tokens (CHUNK, S, J, B), targets (CHUNK, S, Q, B). Each seed has its own stream."""
    steps, B = chunk * CHUNK + np.arange(CHUNK), args.batch_size
    most = np.full(CHUNK, DIGITS)
    for digits, until in reversed(curriculum(args.curriculum)):
        most[steps < until] = digits
    drawn = []
    for seed in args.seeds:
        rng = np.random.default_rng([seed, TRAIN, chunk])
        x = rng.integers(0, 10, (CHUNK, B, 2, DIGITS), dtype=np.int8)
        n = rng.integers(1, most[:, None] + 1, (CHUNK, B))
        n = np.where(rng.random((CHUNK, B)) < args.full_length, most[:, None], n)
        x[np.broadcast_to(np.arange(DIGITS) >= n[:, :, None, None], x.shape)] = 0
        if args.random_zeros:
            share = args.random_zeros * faded(torch.from_numpy(steps), args.zeros_until * args.steps).numpy()
            rate = rng.random((CHUNK, B, 2, 1)) * (rng.random((CHUNK, B, 1, 1)) < share[:, None, None, None])
            x[rng.random(x.shape) < rate] = 0
        drawn.append(x)
    x = np.stack(drawn, 1)
    tokens, target = encode(args.family, x[..., 0, :], x[..., 1, :])
    return tuple(torch.from_numpy(np.ascontiguousarray(t.swapaxes(-1, -2))).long().to(args.device)
                 for t in (tokens, target))


def split_pairs(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits of the n test pairs that the original's evaluation draws for a split seed: those after 5,000 others."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, LIMIT, (max(2 * (5000 + n), 4096),), generator=g)[5000:5000 + n].numpy() for _ in range(2))
    return digits_of(a, DIGITS), digits_of(b, DIGITS)


# ---- Model. T positions, J of the input, Q of them predict; V tokens, D width, H head width, F feed-forward width

@dataclass(frozen=True)
class Config:
    """What is needed to rebuild a model; the names of the learned family are those of published checkpoints."""
    family: str
    d_model: int
    d_ff: int
    head_dim: int = 4           # rotary
    period: float = 12.0
    tie: str = "none"
    embedding: str = "table"
    pos_rank: int = 0           # learned
    qkv_rank: int = 0
    attn_out_rank: int = 0
    ffn_rank: int = 0
    use_rmsnorm: bool = False
    tie_qkv: str = "none"


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis. Zhang and Sennrich, arXiv:1910.07467."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax of the causal scores, times v: q, k, v (B, T, H) -> (B, T, H)."""
    T = q.shape[1]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(1, 2)) * q.shape[-1]**-0.5
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v             # (B, T, T) @ (B, T, H)


def rotary_angles(c: Config, T: int) -> torch.Tensor:
    """Angle of each pair of the head at each position (T, H / 2): 2 pi / period, then 3^-1/2, 3^-1, ... a position."""
    frequency = torch.tensor([2 * math.pi / c.period, *(3 ** (-i / 2) for i in range(1, c.head_dim // 2))])
    return torch.arange(T)[:, None] * frequency


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i + H/2}) of (..., H) by angle (..., H / 2). Su et al., arXiv:2104.09864."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def arc(p: torch.Tensor, width: int) -> torch.Tensor:
    """Digits on an arc: radius, start and step (..., 3) -> (..., 10, width), zero beyond two coordinates."""
    angle = p[..., 1, None] + p[..., 2, None] * torch.arange(10, device=p.device)
    return F.pad(p[..., 0, None, None] * torch.stack([angle.cos(), angle.sin()], -1), (0, width - 2))


def untied(p: dict[str, torch.Tensor], c: Config) -> dict[str, torch.Tensor]:
    """Adds the matrices that a tied rotary model derives: of one model, or of many along leading axes.

    kv+oq: V = K, O = Q^T. all: K is Q with its first pair turned by an angle, V = Q, O = Q^T, down is up^T with its
    first two outputs turned by another one (after AdderBoard's 36-parameter model).
    """
    def turned(w: torch.Tensor, i: int, j: int, angle: torch.Tensor) -> torch.Tensor:
        cos, sin, columns = angle.cos(), angle.sin(), list(w.unbind(-1))
        a, b = columns[i], columns[j]
        columns[i], columns[j] = a * cos - b * sin, b * cos + a * sin
        return torch.stack(columns, -1)
    if c.tie == "none":
        return p
    if c.tie == "all":
        p = {**p, "wk": turned(p["wq"], 0, c.head_dim // 2, p["wk_angle"]), "wv": p["wq"],
             "down": turned(p["up"].mT, 0, 1, p["down_angle"])}
    return {"wv": p["wk"], **p, "wo": p["wq"].mT}


class RotaryAdder(nn.Module):
    """One layer, one head, rotary positions, QK-norm, SwiGLU, no biases, the output tied with the embedding.

    Digit k of a, digit k of b and the position that predicts digit k of the sum stand 22 and 10 apart: with a period of
    12 positions both operands' digits have the same angle, so one frequency can attend to both.
    """
    V, PROMPT, OUTPUTS = 10, 24, 11

    def __init__(self, c: Config):
        super().__init__()
        D, H = c.d_model, c.head_dim
        self.config = c
        self.norm1, self.q_norm = RMSNorm(D, 1e-6), RMSNorm(H, 1e-6)
        if c.tie == "all":
            self.norm2 = self.norm_f = self.norm1
            self.k_norm = self.q_norm
        else:
            self.norm2, self.norm_f, self.k_norm = RMSNorm(D, 1e-6), RMSNorm(D, 1e-6), RMSNorm(H, 1e-6)
        shapes = {"emb": (10, D) if c.embedding == "table" else (3,),
                  "wq": (D, H), "wk": (D, H), "wv": (D, H), "wo": (H, D),
                  "gate": (D, c.d_ff), "up": (D, c.d_ff), "down": (c.d_ff, D), "wk_angle": (1,), "down_angle": (1,)}
        derived = {"none": ("wk_angle", "down_angle"), "kv+oq": ("wv", "wo", "wk_angle", "down_angle"),
                   "all": ("wk", "wv", "wo", "down")}[c.tie]
        for name in (x for x in shapes if x not in derived):
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        c, T = self.config, idx.shape[1]
        w = untied(dict(self.named_parameters(recurse=False)), c)
        emb = w["emb"] if c.embedding == "table" else arc(w["emb"], c.d_model)
        angle = rotary_angles(c, T).to(idx.device)
        x = emb[idx]                                                       # (B, T, D)
        h = self.norm1(x)
        q, k = rotate(self.q_norm(h @ w["wq"]), angle), rotate(self.k_norm(h @ w["wk"]), angle)
        x = x + causal_attention(q, k, h @ w["wv"]) @ w["wo"]
        h = self.norm2(x)
        x = x + (F.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return self.norm_f(x) @ emb.T                                      # (B, T, V)


class LowRank(nn.Module):
    """x -> x A B, or a row of A times B for positions; std 0.02 for positions, else (2 / (in + out))^1/2 a factor."""

    def __init__(self, n_in: int, n_out: int, rank: int, std: float | None = None):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(n_in, rank)), nn.Parameter(torch.empty(rank, n_out))
        nn.init.normal_(self.A, std=std or math.sqrt(2 / (n_in + rank)))
        nn.init.normal_(self.B, std=std or math.sqrt(2 / (rank + n_out)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.A @ self.B


def linear(n_in: int, n_out: int, rank: int) -> nn.Module:
    """A linear map of full rank (rank 0) or of the given rank, without bias."""
    return LowRank(n_in, n_out, rank) if rank else nn.Linear(n_in, n_out, bias=False)


QKV = {"shareA": ("q", "k", "v"), "shareA_tieKV": ("q", "kv", "kv"), "shareA_tieQK": ("qk", "qk", "v")}  # names of B


class Attention(nn.Module):
    """One causal head; Q, K and V of full rank, or h A B with a common A."""

    def __init__(self, c: Config):
        super().__init__()
        D, r = c.d_model, c.qkv_rank
        self.tie = c.tie_qkv
        if self.tie == "none":
            self.qkv = linear(D, 3 * D, r)
        else:
            std = math.sqrt(2 / (D + r))
            self.qkv_A = nn.Parameter(torch.empty(D, r).normal_(std=std))
            for name in dict.fromkeys(QKV[self.tie]):
                self.register_parameter("qkv_B" + name, nn.Parameter(torch.empty(r, D).normal_(std=std)))
        self.proj = linear(D, D, c.attn_out_rank)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.tie == "none":
            q, k, v = self.qkv(h).chunk(3, -1)
        else:
            h = h @ self.qkv_A
            q, k, v = (h @ getattr(self, "qkv_B" + name) for name in QKV[self.tie])
        return self.proj(causal_attention(q, k, v))


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x) with an exact GELU."""

    def __init__(self, c: Config, norm: Callable[[], nn.Module]):
        super().__init__()
        self.ln1, self.attn, self.ln2 = norm(), Attention(c), norm()
        self.mlp = nn.ModuleDict({"fc1": linear(c.d_model, c.d_ff, c.ffn_rank),
                                  "fc2": linear(c.d_ff, c.d_model, c.ffn_rank)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.ln2(x))))


class LearnedAdder(nn.Module):
    """The model of the 456-parameter project: learned positions, low-rank maps, the output tied with the embedding.

    Tensor names, shapes and the order of random draws are the original's, so that its checkpoints load and
    torch.manual_seed(43) gives its weights of seed 43.
    """
    V, PROMPT, OUTPUTS = 14, 22, 12

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        T, D = self.PROMPT + self.OUTPUTS - 1, c.d_model
        norm = partial(RMSNorm, D, 1e-8) if c.use_rmsnorm else partial(nn.LayerNorm, D)
        self.token_emb = nn.Embedding(self.V, D)
        self.pos_emb = LowRank(T, D, c.pos_rank, std=0.02) if c.pos_rank else nn.Embedding(T, D)
        self.blocks = nn.ModuleList([Block(c, norm)])
        self.ln_f = norm()
        self.lm_head = nn.Linear(D, self.V, bias=False)
        self.lm_head.weight = self.token_emb.weight
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        pos = self.pos_emb.A @ self.pos_emb.B if self.config.pos_rank else self.pos_emb.weight
        x = self.token_emb(idx) + pos[:idx.shape[1]]                       # (B, T, D)
        return self.lm_head(self.ln_f(self.blocks[0](x)))                  # (B, T, V)


FAMILIES = {"rotary": RotaryAdder, "learned": LearnedAdder}


def make_config(values: dict, where: str) -> Config:
    """A Config from flags, a checkpoint of ours or a published one. Raises UserError naming what cannot be."""
    fixed = {"n_layer": 1, "n_head": 1, "max_seq_len": 33, "vocab_size": 14, "dropout": 0.0}  # in published configs
    known = {f.name: values[f.name] for f in fields(Config) if f.name in values}
    for name, value in known.items():
        wanted = {"str": str, "int": int, "float": float, "bool": bool}[Config.__annotations__[name]]
        if type(value) is not wanted:
            raise UserError(f"{where}: {name} is {value!r:.40}, expected {wanted.__name__}")
    for name, value in fixed.items():
        if name in values and (type(values[name]) not in (int, float) or values[name] != value):
            raise UserError(f"{where}: {name} is {values[name]!r:.40}, models here have {value}")
    try:
        c = Config(**known)
    except TypeError as e:
        raise UserError(f"{where}: not the config of an addition model ({e})") from None
    D, ranks = c.d_model, (c.pos_rank, c.qkv_rank, c.attn_out_rank, c.ffn_rank)
    for wrong, message in (
        (c.family not in FAMILIES, f"family {c.family!r:.40} is not one of {', '.join(FAMILIES)}"),
        (not 2 <= D <= 1024, f"d_model {D} is not in 2..1024"),
        (not 1 <= c.d_ff <= 4096, f"d_ff {c.d_ff} is not in 1..4096"),
        (not 4 <= c.head_dim <= 256 or c.head_dim % 4, f"head_dim {c.head_dim} is not a multiple of 4 up to 256"),
        (not (math.isfinite(c.period) and c.period >= 2), f"period {c.period} is below 2"),
        (c.tie not in ("none", "kv+oq", "all"), f"tie {c.tie!r:.40} is not one of none, kv+oq, all"),
        (c.embedding not in ("table", "arc"), f"embedding {c.embedding!r:.40} is not table or arc"),
        (not all(0 <= r <= D for r in ranks), f"a rank of {max(ranks)} is not in 0..d_model = {D}"),
        (c.tie_qkv not in ("none", *QKV), f"tie_qkv {c.tie_qkv!r:.40} is not one of none, {', '.join(QKV)}"),
        (c.tie_qkv != "none" and not c.qkv_rank, f"tie_qkv {c.tie_qkv} needs a qkv_rank above 0"),
    ):
        if wrong:
            raise UserError(f"{where}: {message}")
    return c


def make_module(config: Config) -> nn.Module:
    """A module whose weights are to be set; the global random stream stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return FAMILIES[config.family](config)


def init_weights(config: Config, how: str, seed: int) -> torch.Tensor:
    """Initial weights of a seed as one row (P,).

    reference: the original's. random (rotary): embedding N(0, 1/D), other matrices uniform, wq and wk within
    +- 1/(inputs)^1/2, the rest half of that; gains 1, but those of query and key 0.5, so that the attention starts
    soft: where it sharpens onto one column before the carry is noticed, the column below gets no gradient any more,
    and the seed is stuck. arc+phase: also digit t near 2.5 (cos, sin)(0.29 t - 1.2) in the first two coordinates of the
    embedding, and the first coordinate's query and key in phase where positions differ by 2 (mod the period), where the
    operands are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = FAMILIES[config.family](config)
        if config.family == "learned":
            return parameters_to_vector(module.parameters()).detach()
        w = {name: p.data for name, p in module.named_parameters()}
        designed, line = how == "arc+phase", torch.tensor([2.5, -1.2, 0.29])
        for name, p in w.items():
            if name == "emb" and config.embedding == "arc":
                p.copy_(line if designed else torch.randn(3))
            elif name == "emb":
                p.normal_(std=0.1 if designed else config.d_model**-0.5)
                p.add_(arc(line, config.d_model) if designed else 0)
            elif name in ("wq", "wk"):
                p.normal_(std=0.1) if designed else p.uniform_(-1, 1).mul_(p.shape[0]**-0.5)
            elif name in ("wk_angle", "down_angle"):
                p.fill_(-4 * math.pi / config.period) if designed and name == "wk_angle" else p.normal_()
            elif "norm" not in name:
                p.uniform_(-0.5, 0.5).mul_(p.shape[0]**-0.5)
        phase = 2 * math.pi * torch.rand(())
        for x, angle in (("q", phase), ("k", phase - 4 * math.pi / config.period)):
            if x + "_norm.weight" in w:
                w[x + "_norm.weight"].fill_(0.5)
            if designed and "w" + x in w:
                w["w" + x][0, 0] += angle.cos()
                w["w" + x][0, config.head_dim // 2] += angle.sin()
        return parameters_to_vector(module.parameters()).detach()


# ---- The batched step: the same models for S seeds at once, batch innermost

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Tensors = dict[str, torch.Tensor]   # the parameters of S models by name


def shapes_of(config: Config) -> Shapes:
    """Names and shapes of a model's parameters, in the order in which a row of weights (P,) holds them."""
    return tuple((name, tuple(p.shape)) for name, p in make_module(config).named_parameters())


def unflatten(weights: torch.Tensor, shapes: Shapes) -> Tensors:
    """Weights (S, P) -> parameters by name, each with the seeds as first axis."""
    parts = weights.split([math.prod(shape) for _, shape in shapes], 1)
    return {name: part.view(-1, *shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def normed(x: torch.Tensor, p: Tensors, name: str, dim: int, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm (or LayerNorm, if it has a bias) of x along dim, with the weights of each seed."""
    def on_dim(w: torch.Tensor) -> torch.Tensor:
        return w.view(w.shape[0], *(w.shape[1] if i == dim else 1 for i in range(1, x.dim())))
    bias = p.get(name + ".bias")
    if bias is not None:
        x, eps = x - x.mean(dim, keepdim=True), 1e-5
    y = x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps) * on_dim(p[name + ".weight"])
    return y if bias is None else y + on_dim(bias)


def project(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x W for each seed: (S, K, N) and (S, Q, K, B) -> (S, Q, N, B)."""
    if w.shape[1] > 8:  # the compiler unrolls sums of up to 8 terms and fuses them; longer ones are better as a product
        return w.transpose(1, 2)[:, None] @ x
    return (w[:, None, :, :, None] * x[:, :, :, None]).sum(2)


def look_up(table: torch.Tensor, hot: torch.Tensor) -> torch.Tensor:
    """Entries of each position's token: table (S, J, V, N) and one-hot tokens (S, J, V, B) -> (S, J, N, B)."""
    return table.transpose(2, 3) @ hot


def matrices(p: Tensors, name: str) -> list[torch.Tensor]:
    """The factors (S, in, out) of a linear map: A and B, or one of full rank."""
    return [p[name + ".A"], p[name + ".B"]] if name + ".A" in p else [p[name + ".weight"].transpose(1, 2)]


def rotary_logits(p: Tensors, c: Config, hot: torch.Tensor, future: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (S, Q, V, B) of RotaryAdder at the last Q positions, and attention weights (S, Q, J, B).

    hot (S, J, V, B) are the tokens, future (Q, J) is added to the scores.
    """
    Q, J = future.shape
    emb = p["emb"] if c.embedding == "table" else arc(p["emb"], c.d_model)   # (S, V, D)
    p = untied(p, c)
    if c.tie == "all":
        p["norm2.weight"] = p["norm_f.weight"] = p["norm1.weight"]
        p["k_norm.weight"] = p["q_norm.weight"]
    angle = rotary_angles(c, J).to(emb.device)[:, None]                      # (J, 1, H/2)
    h = normed(emb, p, "norm1", 2)
    q = rotate(normed(h @ p["wq"], p, "q_norm", 2)[:, None], angle[J - Q:]) * c.head_dim**-0.5  # (S, Q, V, H)
    k = rotate(normed(h @ p["wk"], p, "k_norm", 2)[:, None], angle)          # (S, J, V, H)
    v = (h @ p["wv"])[:, None].expand_as(k)
    y, weight = attend(look_up(q, hot[:, J - Q:]), look_up(k, hot), look_up(v, hot), future)
    x = look_up(emb[:, None].expand(-1, Q, -1, -1), hot[:, J - Q:]) + project(p["wo"], y)
    h = normed(x, p, "norm2", 2)
    x = x + project(p["down"], F.silu(project(p["gate"], h)) * project(p["up"], h))
    return project(emb.transpose(1, 2), normed(x, p, "norm_f", 2)), weight


def learned_logits(p: Tensors, c: Config, hot: torch.Tensor, future: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of LearnedAdder.

    With h A as keys and values, the rest of Q and K folds into one matrix, that of V into the output map.
    """
    (Q, J), D = future.shape, c.d_model
    pos = (p["pos_emb.A"][..., None] * p["pos_emb.B"][:, None]).sum(2) if c.pos_rank else p["pos_emb.weight"]
    x = p["token_emb.weight"][:, None] + pos[:, :, None]                     # (S, J, V, D)
    h = normed(x, p, "blocks.0.ln1", 3, 1e-8)
    if c.tie_qkv == "none":
        *a, b = matrices(p, "blocks.0.attn.qkv")
        bq, bk, bv = b.chunk(3, 2)
    else:
        a = [p["blocks.0.attn.qkv_A"]]
        bq, bk, bv = (p["blocks.0.attn.qkv_B" + name] for name in QKV[c.tie_qkv])
    for factor in a:
        h = h @ factor[:, None]                                              # (S, J, V, R)
    q = h[:, J - Q:] @ (bq @ bk.transpose(1, 2) * D**-0.5)[:, None]          # (S, Q, V, R)
    kv = look_up(h, hot)
    y, weight = attend(look_up(q, hot[:, J - Q:]), kv, kv, future)           # (S, Q, R, B)
    first, *rest = matrices(p, "blocks.0.attn.proj")
    x = look_up(x[:, J - Q:], hot[:, J - Q:])
    for w in [bv @ first, *rest]:
        y = project(w, y)
    x = x + y
    h = normed(x, p, "blocks.0.ln2", 2, 1e-8)
    for w in matrices(p, "blocks.0.mlp.fc1"):
        h = project(w, h)
    h = F.gelu(h)
    for w in matrices(p, "blocks.0.mlp.fc2"):
        h = project(w, h)
    return project(p["token_emb.weight"].transpose(1, 2), normed(x + h, p, "ln_f", 2, 1e-8)), weight


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           future: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the batch innermost: q (S, Q, R, B), k and v (S, J, R, B) -> (S, Q, R, B), weights (S, Q, J, B).

    R is 3 to 7: a sum over it term by term needs no product of five axes in memory, and the compiler fuses it.
    """
    score = future[:, :, None]
    for r in range(q.shape[2]):
        score = torch.addcmul(score, q[:, :, None, r], k[:, None, :, r])     # (S, Q, J, B)
    weight = score.softmax(2)
    return torch.stack([(weight * v[:, None, :, r]).sum(2) for r in range(v.shape[2])], 2), weight


def batched_logits(weights: torch.Tensor, tokens: torch.Tensor, config: Config,
                   shapes: Shapes) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (S, Q, V, B) and attention (S, Q, J, B) where it predicts: weights (S, P), tokens (S or 1, J, B)."""
    family = FAMILIES[config.family]
    Q, J = family.OUTPUTS, family.PROMPT + family.OUTPUTS - 1
    where = torch.arange(J, device=weights.device)
    future = torch.where(where > where[J - Q:, None], -1e30, 0.0)            # (Q, J)
    hot = (tokens[:, :, None] == torch.arange(family.V, device=weights.device)[:, None]).to(weights.dtype)
    logits = {"rotary": rotary_logits, "learned": learned_logits}[config.family]
    return logits(unflatten(weights, shapes), config, hot, future)


def batch_loss(weights: torch.Tensor, tokens: torch.Tensor, target: torch.Tensor, bonus: torch.Tensor | None = None, *,
               config: Config, shapes: Shapes) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step minimizes, and its mean cross-entropy (nats), both (S,): weights (S, P), tokens (S, J, B), target
    (S, Q, B); bonus (S,) is a reward for each nat of the attention's mean entropy, or None."""
    logits, attention = batched_logits(weights, tokens, config, shapes)
    loss = (logits.logsumexp(2) - logits.gather(2, target[:, :, None])[:, :, 0]).mean((1, 2))
    if bonus is None:
        return loss, loss
    entropy = -(attention * (attention + 1e-9).log()).sum(2).mean((1, 2))
    return loss - bonus * entropy, loss


def compiled(loss: Callable, weights: torch.Tensor, *batch: torch.Tensor) -> tuple[Callable, str]:
    """The compiled loss, tried out on a batch, and how it runs: the plain loss where compilation fails."""
    try:
        fast = torch.compile(loss, dynamic=False, fullgraph=True)
        torch.autograd.grad(fast(weights, *batch)[0].sum(), weights)
        return fast, "compiled"
    except Exception as e:  # a missing or broken C++ compiler shows itself in many types of exception
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        return loss, f"eager, 2 to 4 times slower: torch.compile failed ({reason:.90})"


# ---- Optimizer: all seeds at once

CURVATURE = np.diff(np.eye(33), 2, axis=0)                       # (31, 33), second differences of a table of positions
ROUGHNESS = torch.from_numpy(CURVATURE.T @ CURVATURE).float()    # (33, 33), gradient of half their sum of squares


@dataclass
class Population:
    """Weights and training state of S seeds; what last.pt holds."""
    weights: torch.Tensor      # (S, P)
    mean: torch.Tensor         # (S, P) running mean of the gradient
    square: torch.Tensor       # (S, P) running mean of its square, in the basis
    covariance: torch.Tensor   # (S, P, P) running mean of g g^T; (S, 0, 0) without --optimizer soap
    basis: torch.Tensor        # (S, P, P) its eigenvectors, in columns
    born: torch.Tensor         # (S,) step at which the seed started, or started anew
    alive: torch.Tensor        # (S,) false once a loss or a gradient was not finite
    restarts: torch.Tensor     # (S,)
    first: torch.Tensor        # (S,) first step with 99 % on validation, -1 before
    best: torch.Tensor         # (S, P) weights of the best validation, the later one of a tie
    best_val: torch.Tensor     # (S,) correct validation pairs then, -1 before
    best_step: torch.Tensor    # (S,)


def empty_population(S: int, P: int, soap: bool) -> Population:
    """S seeds of P parameters before their first step, all weights 0."""
    n, whole = P if soap else 0, torch.zeros(S, dtype=torch.long)
    return Population(
        weights=torch.zeros(S, P), mean=torch.zeros(S, P), square=torch.zeros(S, P), covariance=torch.zeros(S, n, n),
        basis=torch.eye(n).repeat(S, 1, 1), born=whole.clone(), alive=torch.ones(S, dtype=torch.bool),
        restarts=whole.clone(), first=whole - 1, best=torch.zeros(S, P), best_val=whole - 1, best_step=whole.clone())


def new_population(config: Config, args: argparse.Namespace) -> Population:
    """The seeds of a run with their initial weights."""
    weights = torch.stack([init_weights(config, args.init, seed) for seed in args.seeds])
    state = empty_population(*weights.shape, args.optimizer == "soap")
    state.weights, state.best = weights, weights.clone()
    return state


def learning_rates(age: torch.Tensor, total: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Rate of each seed at its own step `age` of `total`: linear warm-up, then a cosine (or line) to the least rate."""
    warm = (args.warmup * (total if args.warmup < 1 else torch.ones_like(total))).clamp(min=1)
    done = ((age - warm) / (total - warm).clamp(min=1)).clamp(0, 1)
    falling = 1 - done if args.schedule == "linear" else 0.5 * (1 + torch.cos(math.pi * done))
    rate = args.min_lr_ratio + (1 - args.min_lr_ratio) * falling
    return args.lr * torch.where(age < warm, ((age + 1) / warm).clamp(max=1), rate)


def faded(age: torch.Tensor, end: torch.Tensor | float) -> torch.Tensor:
    """A factor that falls linearly from 1 at age 0 to 0 at `end`, and stays there; 1 for ever if end is 0."""
    end = torch.as_tensor(end, dtype=torch.float32, device=age.device)
    return torch.where(end > 0, (1 - age / end.clamp(min=1e-9)).clamp(min=0), 1.0)


def entropy_bonus(state: Population, step: int, args: argparse.Namespace) -> torch.Tensor | None:
    """The bonus of each seed for entropy of its attention at a step (S,); None without."""
    if not args.entropy_bonus:
        return None
    return args.entropy_bonus * faded(step - state.born, args.entropy_until * (args.steps - state.born))


def new_basis(state: Population) -> None:
    """Take the eigenvectors of the gradient covariance as the new basis, and carry the mean square over to it."""
    scale = state.covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-30
    scaled = torch.nan_to_num(state.covariance / scale, 0.0, 0.0, 0.0)       # eigh would stop all seeds for one
    new = torch.linalg.eigh(scaled.cpu() if scaled.is_mps else scaled)[1].to(scaled.device)  # older MPS has no eigh
    between = new.transpose(1, 2) @ state.basis                              # (S, P, P), old basis -> new
    state.square = (between.square() * state.square[:, None]).sum(2)         # as if a covariance's diagonal
    state.basis = new


def update(state: Population, grad: torch.Tensor, loss: torch.Tensor, step: int,
           args: argparse.Namespace) -> torch.Tensor:
    """One step of AdamW for every seed; with --optimizer soap, in the eigenbasis of its gradient covariance.

    SOAP (Vyas et al., arXiv:2409.11321) has a basis for each side of each matrix; with a few hundred parameters one for
    all of them at once is affordable. A seed whose loss or gradient is not finite stops for good.
    grad (S, P), loss (S,). Returns the gradient norms (S,).
    """
    norm = grad.norm(dim=1)
    state.alive &= torch.isfinite(loss) & torch.isfinite(norm)
    grad = torch.where(state.alive[:, None], grad, 0.0)
    if args.grad_clip:
        grad = grad * (args.grad_clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
    state.mean.lerp_(grad, 0.1)
    mean = state.mean
    if args.optimizer == "soap":
        state.covariance.mul_(args.beta2).baddbmm_(grad[:, :, None], grad[:, None], alpha=1 - args.beta2)
        if step % args.basis_every == 0 or step in (1, 3, 8):                # the first gradients say little
            new_basis(state)
        grad, mean = (torch.stack([grad, mean], 1) @ state.basis).unbind(1)
    age = step - state.born
    lr = torch.where(state.alive, learning_rates(age, args.steps - state.born, args), 0.0)[:, None]
    t = (age + 1)[:, None]
    state.square.mul_(args.beta2).addcmul_(grad, grad, value=1 - args.beta2)
    move = mean / (1 - 0.9**t) / ((state.square / (1 - args.beta2**t)).sqrt() + 1e-8)
    if args.optimizer == "soap":
        move = (move[:, None] @ state.basis.transpose(1, 2))[:, 0]
    total = args.steps - state.born
    decay = args.weight_decay * faded(age, args.decay_until * total)[:, None]
    state.weights.mul_(1 - lr * decay).sub_(lr * move)
    if args.smooth_positions:
        rough = lr[:, :, None] * args.smooth_positions * faded(age, 0.7 * total)[:, None, None]
        first = LearnedAdder.V * args.d_model                                # the position table follows the tokens
        width = args.pos_rank or args.d_model
        table = state.weights[:, first:first + ROUGHNESS.shape[0] * width].view(len(lr), -1, width)   # (S, T, r)
        table -= rough * (ROUGHNESS.to(table)[:, :, None] * table[:, None]).sum(2)
    return norm


def restart_stuck(state: Population, exact: torch.Tensor, step: int, config: Config, args: argparse.Namespace) -> None:
    """Give seeds below 1 % a quarter of the run after their start new random weights and the rest of the steps."""
    due = (step - state.born >= args.steps / 4) & (step - state.born < args.steps / 4 + args.eval_every)
    for i in torch.nonzero(due & state.alive & (exact < 0.01) & (step <= args.steps / 2)).flatten().tolist():
        state.restarts[i] += 1
        state.born[i] = step
        again = np.random.SeedSequence([args.seeds[i], int(state.restarts[i])]).generate_state(1)[0]
        fresh = init_weights(config, args.init, int(again))
        state.weights[i] = fresh.to(state.weights)
        for part in (state.mean, state.square, state.covariance):
            part[i] = 0
        if len(state.basis[i]):
            state.basis[i] = torch.eye(len(fresh))
        print(f"step {step:6d}: seed {args.seeds[i]} is stuck at {100 * exact[i]:.1f}%, restart {state.restarts[i]}")


# ---- Evaluation

def predictions(weights: torch.Tensor, tokens: np.ndarray, config: Config, shapes: Shapes) -> np.ndarray:
    """The likeliest token of each predicting position, given the right ones before it: tokens (N, J) -> (N, Q).

    weights (P,) of one model. A logit that is NaN gives -1. All of the answer right here is the same as a greedy
    answer that is right: up to a first wrong token both have seen the same tokens.
    """
    out = []
    with torch.no_grad():
        for lo in range(0, len(tokens), 1000):
            idx = torch.from_numpy(np.ascontiguousarray(tokens[lo:lo + 1000].T)).long().to(weights.device)
            top = batched_logits(weights[None], idx[None], config, shapes)[0][0].max(1)   # (Q, B)
            out.append(torch.where(top.values.isnan(), -1, top.indices).T.cpu().numpy())
    return np.concatenate(out)


def exact_match(weights: torch.Tensor, pairs: tuple[np.ndarray, np.ndarray], config: Config,
                shapes: Shapes) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the digits of N pairs: how many sums are right in all 11 digits (S,), and each digit (S, 11)."""
    tokens, target = encode(config.family, *pairs)
    exact, digits = [], []
    for w in weights:
        right = predictions(w, tokens, config, shapes)[:, :ANSWER] == target[:, :ANSWER]
        exact.append(int(right.all(1).sum()))
        digits.append(right.sum(0))
    return torch.tensor(exact), torch.tensor(np.array(digits))


def greedy(model: nn.Module, tokens: torch.Tensor, n: int) -> torch.Tensor:
    """Extend tokens (B, T) by the n likeliest next tokens, one at a time, each fed back: (B, n)."""
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, -n:]


def answers(model: nn.Module, pairs: tuple[np.ndarray, np.ndarray], mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and right tokens (N, 11) of a module: mode tf by one teacher-forced pass, ar by greedy decoding."""
    tokens, target = encode(model.config.family, *pairs)
    if mode == "tf":
        out = predictions(parameters_to_vector(model.parameters()), tokens, model.config, shapes_of(model.config))
        return out[:, :ANSWER], target[:, :ANSWER]
    device, out = next(model.parameters()).device, []
    with eval_mode(model):
        for lo in range(0, len(tokens), 2000):
            prompt = torch.from_numpy(np.ascontiguousarray(tokens[lo:lo + 2000, :model.PROMPT])).long().to(device)
            given = greedy(model, prompt, ANSWER)
            logits = model(torch.cat([prompt, given], 1))[:, model.PROMPT - 1:-1]
            out.append(torch.where(logits.isnan().any(-1), -1, given).cpu().numpy())
    return np.concatenate(out), target[:, :ANSWER]


def number(digits: np.ndarray) -> int | None:
    """The number of digits (n,), least significant first; None if one of the tokens is no digit."""
    return int("".join(map(str, digits[::-1]))) if ((digits >= 0) & (digits <= 9)).all() else None


# ---- Training

def validate(state: Population, pairs: tuple[np.ndarray, np.ndarray], config: Config, shapes: Shapes,
             step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact match (S,) and digit accuracy (S, 11) on the validation pairs; keeps the best weights, the first 99 %."""
    right, digits = exact_match(state.weights, pairs, config, shapes)
    right, n = right.to(state.best_val), len(pairs[0])
    better = (right >= state.best_val) & torch.isfinite(state.weights).all(1)
    state.best[better], state.best_val[better], state.best_step[better] = state.weights[better], right[better], step
    state.first[(state.first < 0) & (right >= GROKKED * n)] = step
    return right.double() / n, digits.to(right.device).double() / n


def train(args: argparse.Namespace) -> dict:
    """Train all seeds, and return the summary. Raises UserError."""
    devices.refuse_ranks(SCRIPT)
    saved = None
    if args.resume:
        saved = read_checkpoint(args.resume, whole_run=True)
        if "population" not in saved or not isinstance(saved.get("args"), dict):
            raise UserError(f"{args.resume}: holds one model; a run goes on from its last.pt")
        lacking = set(vars(args)) - set(saved["args"]) - {"given"}
        if lacking:
            raise UserError(f"{args.resume}: damaged, its flags lack {min(lacking)}")
        args = run.resumed_args(args, saved["args"], args.resume)
        parse_args(flags_of(args))  # a file's flags pass the same checks as a command line's
    device = devices.get_device(args.device)
    args.device = str(device)
    config = make_config(vars(args), "flags")
    shapes = shapes_of(config)
    state = new_population(config, args)
    if args.init_from:
        state.weights = initial_weights(args, config, state.weights)
    start, logged, loss_sum = 0, -1, torch.zeros(len(args.seeds))
    if saved:
        start, logged, loss_sum, seconds = resumed_state(saved, args)
        _, state = load_population(saved, args.resume)
    for f in fields(state):
        setattr(state, f.name, getattr(state, f.name).to(device))
    folder = run.open_run(args, __file__)
    clock = run.Clock(args.max_minutes, *(seconds if saved else ()))
    n_params = state.weights.shape[1]
    seeds = f"{len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}"
    print(f"{args.preset}: {seeds} on {devices.describe(device)}, params {n_params} learned, 0 frozen, "
          f"init {origin(args)}, {args.optimizer}, {args.batch_size} sums a step, {args.steps} steps, {folder}",
          flush=True)
    if args.warmup >= args.steps or any(until >= args.steps for _, until in curriculum(args.curriculum)):
        print(f"the warm-up or the curriculum of preset {args.preset} is longer than this run and is cut off")
    loss_fn, how = partial(batch_loss, config=config, shapes=shapes), "eager"
    n_sums = args.steps * args.batch_size * len(args.seeds)
    if args.compile == "on" or (args.compile == "auto" and n_sums >= COMPILE_FROM):
        print("compiling the step (half a minute the first time, then cached)", flush=True)
        weights, bonus = state.weights.clone().requires_grad_(), entropy_bonus(state, 0, args)
        loss_fn, how = compiled(loss_fn, weights, *(x[0] for x in batches(0, args)), bonus)
    print(f"the step runs {how}; ready after {clock.seconds():.1f} s", flush=True)
    log = metrics.Metrics(folder / "metrics.csv", logged if saved else None)
    tracker = metrics.open_tracker(args.tracker, folder, vars(args))
    pairs, norm = uniform_pairs([VALIDATION], args.val_size), torch.zeros(len(args.seeds), device=device)
    loss_sum, since = loss_sum.to(device), logged

    with run.StopSignal() as stop:
        for step in range(start, args.steps + 1):
            last = step == args.steps or stop.number or clock.expired()
            due = logged < step and (step % args.eval_every == 0 or step == args.steps)
            if due:
                exact, digits = validate(state, pairs, config, shapes, step)
                mean_loss = (loss_sum / (step - max(since, 0))).tolist() if step else [math.nan] * len(args.seeds)
                lr = learning_rates(step - state.born, args.steps - state.born, args).tolist()
                rows = [{"step": step, "seed": seed, "loss": mean_loss[i], "exact": float(exact[i]),
                         **{f"digit{k}": float(digits[i, k]) for k in range(ANSWER)}, "lr": lr[i],
                         "grad": float(norm[i]), "sec": clock.seconds()} for i, seed in enumerate(args.seeds)]
                for row in rows:
                    log.write(row)
                mean = {"step": step, "loss": finite_mean(mean_loss), "exact": float(exact.mean()),
                        "grokked": int((exact >= GROKKED).sum()), "lr": lr[0], "grad": finite_mean(norm.tolist()),
                        "sec": clock.seconds()}
                print(metrics.format_row(mean), flush=True)
                if tracker:
                    tracker(mean)
                loss_sum, logged, since = torch.zeros_like(loss_sum), step, step
                save_best(folder, state, step, config, args)
                if args.restart_stuck and step < args.steps:
                    restart_stuck(state, exact, step, config, args)
            if due or last:
                checkpoint.save(folder / "last.pt", {
                    "script": SCRIPT, "format": FORMAT, "step": step, "config": asdict(config), "args": vars(args),
                    "population": {f.name: getattr(state, f.name).cpu() for f in fields(state)}, "ema": None,
                    "loss_sum": loss_sum.cpu(), "logged": logged,
                    "seconds": clock.seconds(), "cpu_seconds": clock.cpu_seconds()})
            if last:
                break
            if step % CHUNK == 0 or step == start:
                tokens, target = batches(step // CHUNK, args)
            weights = state.weights.detach().requires_grad_()
            bonus = entropy_bonus(state, step, args)
            goal, loss = loss_fn(weights, tokens[step % CHUNK], target[step % CHUNK], bonus)
            grad, = torch.autograd.grad(goal.sum(), weights)
            with torch.no_grad():
                norm = update(state, grad, loss, step, args)
                loss_sum += loss.detach()
    if stop.number:
        print(f"stopped at step {step}; go on with: python {SCRIPT} --resume {folder}", flush=True)
        sys.exit(128 + stop.number)
    return finish(args, state, config, folder, clock, step, how)


def origin(args: argparse.Namespace) -> str:
    """Where the first weights come from: --init, or the path of --init-from."""
    return f"from {args.init_from}" if args.init_from else args.init


def finite_mean(values: Sequence[float]) -> float:
    """Mean over the seeds that have not failed; NaN if all have, or at step 0."""
    kept = [x for x in values if math.isfinite(x)]
    return sum(kept) / len(kept) if kept else math.nan


def save_best(folder: Path, state: Population, step: int, config: Config, args: argparse.Namespace) -> None:
    """Write best_sSEED.pt of each seed whose validation was the best of its run just now."""
    module = make_module(config)
    for i in torch.nonzero(state.best_step == step).flatten().tolist():
        vector_to_parameters(state.best[i].cpu(), module.parameters())
        checkpoint.save(folder / f"best_s{args.seeds[i]}.pt", {
            "script": SCRIPT, "format": FORMAT, "step": int(state.best_step[i]), "model": module.state_dict(),
            "config": asdict(config), "seed": args.seeds[i], "val_exact": int(state.best_val[i]) / args.val_size,
            "args": vars(args)})


def finish(args: argparse.Namespace, state: Population, config: Config, folder: Path, clock: run.Clock, step: int,
           how: str) -> dict:
    """Exact match of the last weights on fresh pairs, summary.json, the pictures, and the table."""
    shapes = shapes_of(config)
    right, digits = exact_match(state.weights, uniform_pairs([TEST], args.test_size), config, shapes)
    n, seeds = args.test_size, {}
    for i, seed in enumerate(args.seeds):
        seeds[str(seed)] = {
            "first_step": int(state.first[i]) if state.first[i] >= 0 else None, "errors": n - int(right[i]),
            "exact": int(right[i]) / n, "digits": (digits[i].double() / n).tolist(),
            "failed": not state.alive[i].item(),
            "restarts": int(state.restarts[i]), "best_step": int(state.best_step[i]),
            "best_val": int(state.best_val[i]) / args.val_size}
    grokked = [s for s in seeds.values() if s["exact"] >= GROKKED and not s["failed"]]
    alone = sum(not s["restarts"] for s in grokked)
    summary = {"script": SCRIPT, "name": folder.resolve().name, "seed": args.seed, "n_params": state.weights.shape[1],
               "seconds": clock.seconds(), "cpu_seconds": clock.cpu_seconds(), "command": run.command(),
               "preset": args.preset, "init": origin(args),
               "steps": step, "stopped_early": step < args.steps, "step_runs": how,
               "test_size": n, "n_seeds": len(seeds), "n_grokked": len(grokked), "grok_rate": len(grokked) / len(seeds),
               "grok_interval": wilson(len(grokked), len(seeds)), "n_perfect": sum(s["errors"] == 0 for s in grokked),
               "n_grokked_without_restarts": alone, "n_restarts": int(state.restarts.sum()), "seeds": seeds}
    run.write_json(folder / "summary.json", summary)
    for seed, s in seeds.items():
        note = (", failed: its loss was not finite" if s["failed"] else "") + (
            f", restarted {s['restarts']} times" if s["restarts"] else "")
        weak = [f"digit {k} {100 * x:.0f}%" for k, x in enumerate(s["digits"]) if x < 0.95]
        at = f"99% at step {s['first_step']}" if s["first_step"] is not None else "never 99%"
        print(f"seed {seed:>5}: {100 * s['exact']:8.3f}%, {s['errors']:6d} errors, {at}{note}"
              + (f"; below 95%: {', '.join(weak)}" if weak else ""))
    restarts = f", {alone} without restarts ({summary['n_restarts']} restarts)" if summary["n_restarts"] else ""
    early = f"stopped at step {step} of {args.steps} by --max-minutes: " if step < args.steps else ""
    draw_pictures(folder)
    print(f"{early}{format_rate(len(grokked), len(seeds))} of the seeds have >= 99% of {n} pairs{restarts}, "
          f"{summary['n_perfect']} make no error; {summary['n_params']} parameters, {clock.seconds():.0f} s "
          f"({clock.cpu_seconds():.0f} CPU-s), {folder}")
    return summary


# ---- Pictures

def draw_pictures(folder: Path) -> list[Path]:
    """Draw exact.png, positions.png and attention.png of a run from its metrics.csv, summary.json and best_s*.pt."""
    from matplotlib import colormaps
    summary = run.read_json(folder / "summary.json")
    if summary.get("script") != SCRIPT or not isinstance(summary.get("seeds"), dict):
        raise UserError(f"{folder}: a run of {summary.get('script')!r:.40}, not a finished one of {SCRIPT}")
    rows = metrics.read(folder)
    seeds, made = list(summary["seeds"]), []
    fig, ax = plots.new_figure()
    for i, seed in enumerate(seeds):
        curve = [(r["step"], 100 * r["exact"]) for r in rows if r["seed"] == int(seed)]
        ax.plot(*zip(*curve, strict=True), marker=".", ms=4, lw=1.2, color=f"C{i % 10}", alpha=0.8,
                label=f"seed {seed}" if len(seeds) <= 16 else None)
    ax.set(xlabel="step", ylabel="exact match on validation, %", ylim=(-3, 103),
           title=f"{summary['n_params']} parameters: {summary['n_grokked']} of {len(seeds)} seeds reach 99 %")
    if len(seeds) <= 16:
        ax.legend(frameon=False, fontsize=8, ncols=2)
    made.append(plots.save_figure(fig, folder / "exact.png"))

    worst = min(seeds, key=lambda s: summary["seeds"][s]["exact"])
    fig, (left, right) = plots.new_figure(1, 2, height=max(4.2, 0.14 * len(seeds)))
    grid = np.array([summary["seeds"][s]["digits"] for s in seeds])
    image = left.imshow(100 * grid, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    left.grid(False)
    left.set(xlabel="digit of the sum, lowest first", ylabel="seed", xticks=range(ANSWER),
             title="accuracy at the end, %")
    if len(seeds) <= 32:
        left.set_yticks(range(len(seeds)), seeds)
    fig.colorbar(image, ax=left)
    history = [r for r in rows if r["seed"] == int(worst)]
    for k in range(ANSWER):
        right.plot([r["step"] for r in history], [100 * r[f"digit{k}"] for r in history], lw=1.2,
                   color=colormaps["viridis"](k / (ANSWER - 1)), label=f"digit {k}")
    right.set(xlabel="step", ylabel="accuracy on validation, %", ylim=(-3, 103),
              title=f"seed {worst}, the lowest at the end")
    right.legend(frameon=False, fontsize=8)
    made.append(plots.save_figure(fig, folder / "positions.png"))

    best = max(seeds, key=lambda s: summary["seeds"][s]["best_val"])
    if (folder / f"best_s{best}.pt").is_file():
        made.append(draw_attention(load_model(folder / f"best_s{best}.pt")[0], folder / "attention.png", best))
    return made


def draw_attention(model: nn.Module, path: Path, seed: str, a: int = 1234567890, b: int = 9876543210) -> Path:
    """The attention of the positions that predict the sum of a and b, over all positions."""
    tokens, _ = encode(model.config.family, *(digits_of(np.array([x]), DIGITS) for x in (a, b)))
    weights, shapes = parameters_to_vector(model.parameters()), shapes_of(model.config)
    with torch.no_grad():
        _, attention = batched_logits(weights[None], torch.from_numpy(tokens.T).long()[None], model.config, shapes)
    fig, ax = plots.new_figure(width=9)
    image = ax.imshow(attention[0, :ANSWER, :, 0].numpy(), vmin=0, aspect="auto")
    ax.grid(False)
    names = ["+" if t == PLUS else "=" if t == EQUALS else str(t) for t in tokens[0].tolist()]
    ax.set_xticks(range(len(names)), names)
    ax.set(xlabel=f"token: {a}, {b} and their sum, as this model reads them", yticks=range(ANSWER),
           ylabel="digit of the sum that is predicted", title=f"attention of seed {seed}")
    fig.colorbar(image, ax=ax)
    return plots.save_figure(fig, path)


# ---- Use of a trained model

def file_of(path: str | os.PathLike) -> Path:
    """The checkpoint that `path` means: itself, or of a folder best.pt, the best_sSEED.pt with the best validation, or
    last.pt."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "best.pt").is_file():
        return path / "best.pt"
    seeds = sorted((f for f in path.glob("best_s*.pt") if f.stem[6:].isdecimal()), key=lambda f: int(f.stem[6:]))

    def validation(file: Path) -> float:
        value = read_checkpoint(file).get("val_exact")
        return value if type(value) is float else -1.0
    return max(seeds, key=validation) if seeds else path / "last.pt"


def read_checkpoint(path: str | os.PathLike, whole_run: bool = False) -> dict:
    """A checkpoint of this script, or a published one with its keys renamed. Raises UserError.

    Over 10 MB is refused, but for whole_run=True: the optimizer state of many seeds is larger.
    """
    path = Path(path) / "last.pt" if whole_run and Path(path).is_dir() else file_of(path)
    if path.is_file() and path.stat().st_size > MAX_BYTES and not whole_run:
        raise UserError(f"{path}: {path.stat().st_size / 1e6:.0f} MB; a model of {SCRIPT} has at most "
                        f"{MAX_BYTES // 10**6} MB (of a run, take a best_sSEED.pt)")
    saved = checkpoint.read(path)
    if is_published(saved):
        saved = {"script": SCRIPT, "format": FORMAT, "model": saved["model_state"], "step": saved.get("step", -1),
                 "args": {}, "config": {"family": "learned", **saved["model_config"]}}
    checkpoint.check_script(saved, SCRIPT, path)
    kinds = {"format": int, "config": dict, "step": int}
    if "seed" in saved:  # not in a last.pt, which has many
        kinds["seed"] = int
    for key, kind in kinds.items():
        if type(saved.get(key)) is not kind or (key == "format" and saved[key] != FORMAT):
            shown = " ".join(repr(saved.get(key))[:20].split())
            raise UserError(f"{path}: its {key} is {shown}, which cannot be read here")
    return saved


def is_published(saved: dict) -> bool:
    """Whether a checkpoint is one of the 456-parameter project, which names no script."""
    return all(isinstance(saved.get(k), dict) for k in ("model_state", "model_config"))


def load_population(saved: dict, path: str | os.PathLike) -> tuple[list[int], Population]:
    """The seeds of a last.pt and their population. Raises UserError when they do not fit each other or the config."""
    args, stored = (saved[k] if isinstance(saved.get(k), dict) else {} for k in ("args", "population"))
    seeds = args.get("seeds")
    if not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise UserError(f"{path}: damaged, it names no seeds")
    module = make_module(make_config(saved["config"], str(path)))
    like = empty_population(len(seeds), count_parameters(module), args.get("optimizer") == "soap")
    for f in fields(Population):
        got, own = stored.get(f.name), getattr(like, f.name)
        if not isinstance(got, torch.Tensor) or got.shape != own.shape or got.dtype != own.dtype:
            raise UserError(f"{path}: damaged, {f.name} of its seeds is missing or not {tuple(own.shape)}")
        setattr(like, f.name, got)
    return seeds, like


def resumed_state(saved: dict, args: argparse.Namespace) -> tuple[int, int, torch.Tensor, tuple[float, float]]:
    """Step, last logged step, sum of losses since then, wall and CPU seconds of a last.pt. Raises UserError."""
    step, logged, loss_sum = (saved.get(k) for k in ("step", "logged", "loss_sum"))
    seconds = saved.get("seconds"), saved.get("cpu_seconds")
    if not (type(step) is type(logged) is int and -1 <= logged <= step <= args.steps and step >= 0
            and isinstance(loss_sum, torch.Tensor) and loss_sum.shape == (len(args.seeds),)
            and all(type(x) is float and math.isfinite(x) for x in seconds)):
        raise UserError(f"{args.resume}: damaged, it cannot be resumed (step {step!r:.20}, logged {logged!r:.20})")
    return step, logged, loss_sum, seconds


def load_model(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """The trained module at `path` and its checkpoint; of a last.pt or a run folder, the seed with the best validation.

    Raises UserError: missing, damaged, foreign, over 10 MB, an impossible config, tensors missing, extra, of another
    shape or not finite.
    """
    saved = read_checkpoint(path)
    config = make_config(saved["config"], str(path))
    module, state = make_module(config), saved.get("model")
    if "population" in saved:
        seeds, population = load_population(saved, path)
        i = int(population.best_val.argmax())
        vector_to_parameters(population.best[i], module.parameters())
        saved = {**saved, "seed": seeds[i], "step": int(population.best_step[i])}
        state = {k: v.clone() for k, v in module.state_dict().items()}
    if not isinstance(state, dict):
        raise UserError(f"{path}: it holds no weights")
    checkpoint.load_weights(module, state, path)
    if config.family == "learned" and not torch.equal(state["lm_head.weight"], state["token_emb.weight"]):
        raise UserError(f"{path}: lm_head.weight is not token_emb.weight, which it is tied to")
    return module.eval(), saved


def initial_weights(args: argparse.Namespace, config: Config, like: torch.Tensor) -> torch.Tensor:
    """Weights (S, P) of --init-from: the same seeds of a last.pt, or one model for every seed. Raises UserError."""
    saved = read_checkpoint(args.init_from, whole_run=not os.path.isdir(args.init_from))
    theirs = make_config(saved["config"], args.init_from)
    if theirs != config:
        raise UserError(f"{args.init_from}: a model of another config ({theirs}, here {config})")
    if "population" not in saved:
        module, _ = load_model(args.init_from)
        return parameters_to_vector(module.parameters()).detach().expand_as(like).clone()
    seeds, population = load_population(saved, args.init_from)
    missing = set(args.seeds) - set(seeds)
    if missing:
        raise UserError(f"{args.init_from}: has no seed {min(missing)}; give one model (best_sSEED.pt), or its seeds")
    weights = population.weights[[seeds.index(s) for s in args.seeds]]
    if not torch.isfinite(weights).all():
        raise UserError(f"{args.init_from}: its weights are not finite")
    return weights


def operand(x: object, name: str) -> int:
    """x as an operand. Raises UserError when it is not a whole number in 0..10^10 - 1."""
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise UserError(f"{name}: {repr(x)[:40]} is not a whole number")
    if not 0 <= x < LIMIT:
        shown = str(x) if abs(x) < 10**40 else f"a number of {int(x).bit_length()} bits"
        raise UserError(f"{name}: {shown} is not in 0..{LIMIT - 1}")
    return int(x)


def load(path: str | os.PathLike) -> Callable[[int, int], int | None]:
    """`add = load(path)`: add(a, b) is the model's sum by greedy decoding, None if a token is no digit.

    Raises UserError for a bad checkpoint, and for operands that are not whole numbers in 0..10^10 - 1.
    """
    model, _ = load_model(path)

    def add(a: int, b: int) -> int | None:
        pair = tuple(digits_of(np.array([operand(x, name)]), DIGITS) for x, name in ((a, "a"), (b, "b")))
        return number(answers(model, pair, "ar")[0][0])
    return add


def show_sum(model: nn.Module, text: str) -> dict:
    """Answer a sum like 12+34, and print the digits as the model gives them, with their probability."""
    found = re.fullmatch(r"\s*(\d{1,40})\s*\+\s*(\d{1,40})\s*", text)
    if not found:
        raise UserError(f"--add {text[:60]!r}: expected two whole numbers like 1234567890+9876543210")
    a, b = (operand(int(x), "--add") for x in found.groups())
    pair = tuple(digits_of(np.array([x]), DIGITS) for x in (a, b))
    given = answers(model, pair, "ar")[0][0]
    prompt = torch.from_numpy(encode(model.config.family, *pair)[0][:, :model.PROMPT]).long()
    with eval_mode(model):
        p = model(torch.cat([prompt, torch.from_numpy(given[None]).clamp(min=0)], 1))[0, model.PROMPT - 1:].softmax(-1)
    for k, digit in enumerate(given.tolist()):
        print(f"digit {k:2d}: {digit:2d}  probability {p[k, digit]:.4f}")
    answer = number(given)
    print(f"{a} + {b} = {'no number' if answer is None else answer}, "
          + ("right" if answer == a + b else f"wrong: it is {a + b}"))
    return {"a": a, "b": b, "answer": answer, "right": answer == a + b}


SUBMISSION = '''"""{n} parameters, trained: a submission for AdderBoard, written by {script} --export-submission."""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

{sources}

CONFIG = {config}
WEIGHTS = {weights}


def build_model():
    model = {cls}(CONFIG)
    model.load_state_dict({{name: torch.tensor(values) for name, values in WEIGHTS.items()}})
    metadata = {{"name": {name!r}, "author": "stalled-experiments",
                "params": sum(p.numel() for p in model.parameters()),
                "architecture": f"{cls}, one layer, one head, {{CONFIG}}", "tricks": {tricks}}}
    return model.eval(), metadata


def add(model, a, b):
    a, b = f"{{a:010d}}", f"{{b:010d}}"
    prompt = {prompt}
    with torch.no_grad():
        out = greedy(model, torch.tensor([prompt]), 11)[0].tolist()
    return int("".join(map(str, out[::-1]))) if max(out) < 10 else -1
'''


def export_submission(model: nn.Module, path: str, name: str) -> None:
    """Write the model as one file with build_model() and add(model, a, b): its classes' source, weights as numbers."""
    c = model.config
    parts = [Config, RMSNorm, causal_attention]
    if c.family == "rotary":
        parts += [rotary_angles, rotate, arc, untied, RotaryAdder]
        prompt = "[int(x) for x in '0' + a[::-1] + '00' + b[::-1] + '0']"
        tricks = [f"rotary positions of period {c.period:g}", f"tie {c.tie}"]
    else:
        parts += [LowRank, linear, Attention, Block, LearnedAdder]
        prompt = f"[*map(int, a), {PLUS}, *map(int, b), {EQUALS}]"
        tricks = [f"ranks {c.pos_rank} {c.qkv_rank} {c.attn_out_rank} {c.ffn_rank}", f"tie {c.tie_qkv}"]
    sources = "\n\n".join(inspect.getsource(part) for part in (*parts, greedy))
    if c.family == "learned":
        sources = f"QKV = {QKV}\n\n\n{sources}"
    text = SUBMISSION.format(
        n=count_parameters(model), script=SCRIPT, sources=sources, config=c, cls=type(model).__name__, name=name,
        weights={k: v.tolist() for k, v in model.state_dict().items()}, prompt=prompt, tricks=tricks)
    run.write_atomic(path, text.encode())
    print(f"{path}: {count_parameters(model)} parameters; check it with AdderBoard's verify.py")


def evaluate_checkpoint(path: str | os.PathLike, args: argparse.Namespace) -> dict:
    """Exact match of a checkpoint on the original's test pairs, as [right, of] counts. Raises UserError.

    A sum is right if all 11 digits are (EOS is not asked, as in the original; a token that is no digit is wrong).
    With mode tf, token accuracy and positions are teacher-forced. Intervals are Wilson's, 95 %.
    args may have: n (10,000) pairs for each of split_seeds, mode (tf: one teacher-forced pass; ar: greedy), device.
    failures: the first ten as a, b, a + b, greedy answer. positions: each digit of the sum, lowest first.
    """
    model, saved = load_model(path)
    model.to(devices.get_device(getattr(args, "device", "cpu")))
    n, seeds, mode = (getattr(args, k, d) for k, d in (("n", 10_000), ("split_seeds", SPLIT_SEEDS), ("mode", "tf")))
    wall, cpu, total = time.monotonic(), time.process_time(), n * len(seeds)
    splits, failures, positions = {}, [], np.zeros(ANSWER, np.int64)
    for seed in seeds:
        pairs = split_pairs(seed, n)
        got, target = answers(model, pairs, mode)
        wrong = np.flatnonzero((got != target).any(1))
        splits[str(seed)] = [n - len(wrong), n]
        positions += (got == target).sum(0)
        for i in wrong[:10 - len(failures)]:
            one = tuple(x[i:i + 1] for x in pairs)
            a, b = number(one[0][0]), number(one[1][0])
            failures.append([a, b, a + b, number(answers(model, one, "ar")[0][0])])
    cpu, right = time.process_time() - cpu, sum(k for k, _ in splits.values())
    return {"script": SCRIPT, "file": str(file_of(path)), "n_params": count_parameters(model),
            "config": asdict(model.config), "step": saved["step"], "seed": saved.get("seed"), "mode": mode,
            "exact": [right, total], "exact_rate": right / total, "exact_interval": list(wilson(right, total)),
            "splits": splits,
            "split_intervals": {seed: list(wilson(*counts)) for seed, counts in splits.items()},
            "token_accuracy": int(positions.sum()) / (total * ANSWER),
            "positions": [[int(k), total] for k in positions], "failures": failures,
            "seconds": time.monotonic() - wall, "cpu_seconds": cpu,
            "additions_per_cpu_second": total / max(cpu, 1e-9)}


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    with run.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        if args.plot:
            print(*draw_pictures(args.plot), sep="\n")
        elif args.add:
            return show_sum(load_model(args.checkpoint)[0], args.add)
        elif args.export_submission:
            model, saved = load_model(args.checkpoint)
            export_submission(model, args.export_submission, f"{args.checkpoint}, seed {saved.get('seed')}")
        elif args.checkpoint:
            out = evaluate_checkpoint(args.checkpoint, args)
            print(f"{args.checkpoint}: {out['n_params']} parameters, step {out['step']}, exact match "
                  f"{format_rate(*out['exact'])} (tables: python evaluate_checkpoints.py {args.checkpoint})")
            return out
        else:
            return train(args)


if __name__ == "__main__":
    main()
