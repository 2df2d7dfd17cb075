"""Which transformers of a few hundred parameters learn to add two ten-digit numbers, and on which seeds?

    python addition_train.py                                 # 8 seeds of 196 parameters, about 45 s: all grok
    python addition_train.py --preset rope122 --seeds 0-15   # smaller, 16 seeds side by side
    python addition_train.py --preset ref456 --seeds 42-49   # the published model, which failed in the notes
    python addition_train.py --add 1234567890+9876543210 --checkpoint logs/kept/addition_train/rope196
    python evaluate_checkpoints.py logs/kept/addition_train/rope196   # 100,000 pairs, and tables

RotaryAdder and LearnedAdder are plain modules of one model; `batch_loss` maps them over the seeds of a run,
which train side by side. A seed groks if its last weights add 99 % of 100,000 fresh pairs without a wrong
digit. A run writes logs/addition_train/NAME/: args.json, run.txt, addition_train.py, metrics.csv, last.pt
(all seeds), best_sSEED.pt (one model each), summary.json and pictures. Descends from
yinglunz/A-456-Parameter-Transformer and from AdderBoard.
"""
from __future__ import annotations

from common import files, flags  # before torch: a Ctrl-C while that loads is one line then

# isort: split
import argparse
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate, wilson
from common.files import UserError
from common.flags import integer, path, real

SCRIPT = Path(__file__).name
DIGITS, ANSWER = 10, 11                  # digits of an operand, of a sum
LIMIT = 10**DIGITS                       # operands are below
PLUS, EQUALS, EOS = 10, 11, 13           # tokens of the learned family; 0..9 are the digits, 12 is never used
CHUNK = 50                               # steps whose batches are sampled at once
MOST_SUMS = 1 << 20                      # sums a step over all seeds, about 20 kB each
COMPILE_FROM = 2_500_000                 # sums in a run from which compiling the step, half a minute, pays
GROKKED = 0.99                           # exact match from which a seed counts
VAL_SIZE, TEST_SIZE = 2000, 100_000      # pairs for choosing best_sSEED.pt, and at the end
TRAIN, VALIDATION, TEST, TRAINED = 1, 2, 3, 5   # streams of pairs; 5: train_exact; 4: evaluate_checkpoints.py
SPLIT_SEEDS = (41, 100, 200, 300, 400, 500, 999, 1234, 7777, 31415)  # of the original's evaluation

# What --preset changes in the default run, rope196. ref is the original's command line.
LEARNED = {"family": "learned", "d_model": 7, "d_ff": 14, "init": "random", "weight_decay": 0.01}
REF = {**LEARNED, "optimizer": "adamw", "schedule": "cosine", "batch_size": 512, "lr": 0.02, "warmup": 1350.0,
       "fade_until": 0.0, "entropy_bonus": 0.0, "lengths": "3:2000,6:7000", "steps": 27_000,
       "eval_every": 1000}
LOW_RANK = {"pos_rank": 3, "qkv_rank": 3, "attn_out_rank": 2, "ffn_rank": 3, "use_rmsnorm": True,
            "tie_qkv": "shareA_tieKV"}
TINY = {"d_model": 3, "d_ff": 2, "embedding": "arc", "steps": 10_000, "eval_every": 500}
PRESETS = {
    "rope196": {},
    "rope140": {"d_ff": 4, "tie": "kv+oq", "steps": 3000},
    "rope122": {"d_model": 3, "d_ff": 3, "lr": 0.06, "steps": 3000},
    "rope62": {**TINY, "tie": "kv+oq"},
    "rope36": {**TINY, "tie": "all"},
    "ref": REF,
    "ref456": {**REF, **LOW_RANK, "steps": 54_000},
    "grok456": {**LEARNED, **LOW_RANK, "lengths": "full", "random_zeros": 1.5, "lr": 0.03, "fade_until": 0.6,
                "entropy_bonus": 0.1, "smooth_positions": 3.0, "steps": 10_000, "eval_every": 500},
}


# ---- Flags

def seed_list(text: str) -> list[int]:
    """An argparse type: seeds like 42-49,51."""
    seeds = []
    for part in text.split(","):
        found = re.fullmatch(r" *([0-9]{1,10})(?:-([0-9]{1,10}))? *", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not (first <= last < 2**32 and last - first < 4096):
            raise argparse.ArgumentTypeError(f"{part[:40]!r}: expected seeds like 43 or 42-49")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"a seed stands there twice: {text[:60]}")
    return seeds


def lengths(text: str) -> str:
    """An argparse type: uniform, full, or DIGITS:STEP pairs in order of the steps."""
    known = text in ("uniform", "full") or re.fullmatch(r"(([1-9]|10):[0-9]{1,9},?)+(?<!,)", text)
    steps = [step for _, step in curriculum(text)] if known else [1, 0]
    if steps != sorted(steps):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected uniform, full, or like 3:2000,6:7000")
    return text


def curriculum(text: str) -> list[tuple[int, int]]:
    """(digits, step) pairs: operands of up to 3 digits before step 2000, and so on; or none."""
    return [tuple(map(int, phase.split(":"))) for phase in text.split(",") if ":" in phase]


def add_evaluation_arguments(p: argparse.ArgumentParser) -> None:
    """Add the flags of evaluate_checkpoints.py that only addition models have."""
    g = p.add_argument_group("addition")
    g.add_argument("--n", type=integer(1, 1 << 22), default=10_000, help="pairs for each split seed; "
                   "tables have n / 10 an entry, that of operand lengths n / 50")
    g.add_argument("--split-seeds", type=seed_list, default=list(SPLIT_SEEDS), metavar="A-B,C",
                   help="seeds of the test pairs (default: the original's ten)")
    g.add_argument("--mode", choices=["tf", "ar"], default="tf",
                   help="tf: one teacher-forced pass; ar: greedy decoding, digit by digit")


def parse_args(argv: list[str] | None = None) -> flags.Flags:
    p = flags.Parser(description=__doc__)
    p.add_argument("--preset", choices=list(PRESETS), help="changes these defaults, which are rope196's "
                   "(default: rope196, or ref where a flag of its low-rank maps is given)")

    g = p.add_argument_group("data")
    g.add_argument("--seeds", "--seed", type=seed_list, default=[*range(8)], metavar="A-B,C",
                   help="a model each (default: 0-7)")
    g.add_argument("--batch-size", type=integer(1, 1 << 16), default=128, help="sums per step and seed")
    g.add_argument("--lengths", type=lengths, default="uniform", help="operands are below 10^n. uniform: n in 1..10; "
                   "full: n = 10; 3:2000,6:7000: n in 1..3 before step 2000, 1..6 before 7000, then 1..10")
    g.add_argument("--random-zeros", type=real(0, 10), default=0.0, help="share of sums whose operands' digits "
                   "are set to 0 at random, each operand at a rate of its own; falls in a line to 0 at the end")

    g = p.add_argument_group("model")
    g.add_argument("--family", choices=["rotary", "learned"], default="rotary", help="kind of positions")
    g.add_argument("--d-model", type=integer(2, 1024), default=4, help="width of the residual stream")
    g.add_argument("--d-ff", type=integer(1, 4096), default=6, help="hidden width of the feed-forward layer")
    g.add_argument("--init", choices=["arc+phase", "random"], default="arc+phase", help="arc+phase (rotary): "
                   "digits on an arc, queries and keys in phase; random: plain, or as published (learned)")
    g.add_argument("--tie", choices=["none", "kv+oq", "all"], default="none", help="rotary: kv+oq: K = V, O = Q^T; "
                   "all: everything from Q, gate and up, and one norm")
    g.add_argument("--embedding", choices=["table", "arc"], default="table", help="rotary: arc has 3 weights")
    g.add_argument("--pos-rank", type=integer(0), default=0, help="learned: rank of the positions; 0: full")
    g.add_argument("--qkv-rank", type=integer(0), default=0, help="learned: rank of Q, K and V; 0: full")
    g.add_argument("--attn-out-rank", type=integer(0), default=0, help="learned: of the output map; 0: full")
    g.add_argument("--ffn-rank", type=integer(0), default=0, help="learned: of the feed-forward maps; 0: full")
    g.add_argument("--use-rmsnorm", action="store_true", help="learned: RMSNorm in place of LayerNorm")
    g.add_argument("--tie-qkv", choices=["none", "shareA_tieKV"], default="none",
                   help="learned: shareA_tieKV is Q = h A B_q, K = V = h A B_kv")

    g = p.add_argument_group("optimization")
    g.add_argument("--steps", "--train-steps", type=integer(1), default=2000, help="optimizer steps")
    g.add_argument("--optimizer", choices=["soap", "adamw"], default="soap", help="soap: Adam in the eigenbasis "
                   "of the covariance of a seed's gradient, beta2 0.99; adamw: beta2 0.999")
    g.add_argument("--lr", type=real(0, 10, above=True), default=0.05, help="peak learning rate")
    g.add_argument("--schedule", choices=["linear", "cosine"], default="linear",
                   help="of lr behind the warm-up: linear to 0, or cosine to a tenth")
    g.add_argument("--warmup", "--warmup-steps", type=real(0), default=0.1,
                   help="steps in which lr rises from 0; below 1: a share of the run")
    g.add_argument("--weight-decay", type=real(0, 1), default=0.05, help="decoupled, of all weights; fades")
    g.add_argument("--entropy-bonus", type=real(0), default=0.03, help="reward in nats of loss for each nat "
                   "of entropy of the attention, which keeps it soft; fades")
    g.add_argument("--smooth-positions", type=real(0), default=0.0, help="learned: decoupled decay of the "
                   "second differences of the positions (or of their factor A); fades; 0: off")
    g.add_argument("--fade-until", type=real(0, 1), default=0.3, help="share of the run at whose end what fades "
                   "has fallen to 0 in a line; 0: nothing fades")
    g.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile of the "
                   "step, eager where it fails; auto: in runs of 2.5 million sums or more")

    g = p.add_argument_group("evaluation, or instead of training")
    g.add_argument("--eval-every", "--eval-interval", type=integer(1), default=100,
                   help="steps between validations and saves")
    g.add_argument("--checkpoint", type=path, metavar="PATH", help="evaluate a model, or a run's best one")
    g.add_argument("--add", metavar="A+B", help="let --checkpoint answer one sum, digit by digit")
    g.add_argument("--export-submission", type=path, metavar="FILE.py", help="--checkpoint for AdderBoard")
    g.add_argument("--plot", type=path, metavar="RUN", help="draw the pictures of this run again")
    flags.add_run_arguments(p, seed=False)

    args = flags.parse(p, argv)
    if args.preset is None:
        args.preset = "ref" if set(LOW_RANK) & set(args.given) else "rope196"
    flags.use(args, PRESETS[args.preset])
    args.seed = args.seeds[0]
    try:
        config_of(args)
    except UserError as e:
        p.error(f"{e} (preset {args.preset})")
    return args


# ---- Problem: digits, carries, tokens

def digits_of(x: np.ndarray, n: int) -> np.ndarray:
    """The n lowest decimal digits of whole numbers (...,) -> (..., n), least significant first."""
    return (x[..., None] // 10 ** np.arange(n, dtype=np.int64) % 10).astype(np.int8)


def digit_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Digits of the sum: (..., 10) twice -> (..., 11), least significant first."""
    return digits_of((a.astype(np.int64) + b) @ 10 ** np.arange(DIGITS, dtype=np.int64), ANSWER)


def encode(family: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of sums: digits (..., 10) twice, least significant first -> input (..., T) and target (..., Q).

    rotary:  0, a, 0 0, b, 0, then the sum, all least significant digit first; T = 34, Q = 11.
    learned: a + b =, most significant first, then the sum least significant first, EOS; T = 33, Q = 12.
    The last Q positions of the input predict the target (teacher forcing).
    """
    c = digit_sum(a, b)

    def token(t: int) -> np.ndarray:
        return np.full((*a.shape[:-1], 1), t, a.dtype)

    if family == "rotary":
        return np.concatenate([token(0), a, token(0), token(0), b, token(0), c[..., :-1]], -1), c
    return (np.concatenate([a[..., ::-1], token(PLUS), b[..., ::-1], token(EQUALS), c], -1),
            np.concatenate([c, token(EOS)], -1))


def number(digits: np.ndarray) -> int | None:
    """The number of digits (n,), least significant first; None if one of the tokens is no digit."""
    return int("".join(map(str, digits[::-1]))) if ((digits >= 0) & (digits <= 9)).all() else None


# ---- Data: pure functions of a stream's name, so that a resumed run needs no generator state

Pairs = tuple[np.ndarray, np.ndarray]    # digits (n, 10) of both operands


def uniform_pairs(stream: Sequence[int], n: int, digits: int = DIGITS) -> Pairs:
    """n uniform pairs of operands below 10^digits."""
    x = np.random.default_rng(stream).integers(0, 10, (n, 2, DIGITS), dtype=np.int8)
    x[..., digits:] = 0
    return x[:, 0], x[:, 1]


def sample_pairs(stream: Sequence[int], steps: np.ndarray, B: int, args: argparse.Namespace) -> np.ndarray:
    """B training sums, as each of C steps has them: digits (C, B, 2, 10)."""
    rng, C = np.random.default_rng(stream), len(steps)
    x = rng.integers(0, 10, (C, B, 2, DIGITS), dtype=np.int8)
    if args.lengths != "full":
        most = np.full(C, DIGITS)
        for digits, until in reversed(curriculum(args.lengths)):
            most[steps < until] = digits
        n = rng.integers(1, most[:, None] + 1, (C, B))
        x[np.broadcast_to(np.arange(DIGITS) >= n[:, :, None, None], x.shape)] = 0
    if args.random_zeros:
        share = args.random_zeros * (1 - steps / args.steps)
        touched = rng.random((C, B, 1, 1)) < share[:, None, None, None]
        rate = rng.random((C, B, 2, 1)) * touched
        x[rng.random(x.shape) < rate] = 0
    return x


def batches(chunk: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The batches of CHUNK steps: tokens (CHUNK, S, T, B), targets (CHUNK, S, Q, B), a stream for each seed."""
    steps = chunk * CHUNK + np.arange(CHUNK)
    x = np.stack([sample_pairs([seed, TRAIN, chunk], steps, args.batch_size, args) for seed in args.seeds], 1)
    tokens, target = encode(args.family, x[..., 0, :], x[..., 1, :])
    return batch_last(tokens).to(args.device), batch_last(target).to(args.device)


def batch_last(tokens: np.ndarray) -> torch.Tensor:
    """(..., B, T) -> (..., T, B), as the models read them."""
    return torch.from_numpy(np.ascontiguousarray(tokens.swapaxes(-1, -2))).long()


def split_pairs(seed: int, n: int) -> Pairs:
    """The n test pairs that the original's evaluation draws for a split seed: those behind 5,000 others."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, LIMIT, (max(2 * (5000 + n), 4096),), generator=g).numpy() for _ in range(2))
    return digits_of(a[5000:5000 + n], DIGITS), digits_of(b[5000:5000 + n], DIGITS)


# ---- Model. T positions of the input, the last Q of them predict; V tokens, width D, head width H, B sums.
# Features come first and the batch last, (D, T, B): with widths of 3 to 14, that is what makes a step fast.
# This section also stands in an exported file, behind the imports of SUBMISSION.

HEAD, PERIOD = 4, 12                     # rotary: width of the head; positions a turn of the first frequency


@dataclass(frozen=True)
class Config:
    """What is needed to rebuild a model. Raises UserError naming what cannot be.

    The names of the learned family are those of published checkpoints.
    """
    family: str
    d_model: int
    d_ff: int
    tie: str = "none"           # rotary
    embedding: str = "table"
    pos_rank: int = 0           # learned
    qkv_rank: int = 0
    attn_out_rank: int = 0
    ffn_rank: int = 0
    use_rmsnorm: bool = False
    tie_qkv: str = "none"

    def __post_init__(self):
        choices = {"family": ("rotary", "learned"), "tie": ("none", "kv+oq", "all"),
                   "embedding": ("table", "arc"), "tie_qkv": ("none", "shareA_tieKV")}
        only = {"learned": ("pos_rank", "qkv_rank", "attn_out_rank", "ffn_rank", "use_rmsnorm", "tie_qkv"),
                "rotary": ("tie", "embedding")}
        foreign = only["learned" if self.family == "rotary" else "rotary"]
        for f in fields(self):
            value = getattr(self, f.name)
            low, high = {"d_model": (2, 1024), "d_ff": (1, 4096)}.get(f.name, (0, self.d_model))
            sound = type(value).__name__ == f.type and (
                value in choices[f.name] if f.type == "str" else low <= value <= high)
            if not sound or (f.name in foreign and value != f.default):
                raise UserError(f"{f.name} {value!r:.40} cannot be in a {self.family!r:.10} model")
        if self.tie_qkv != "none" and not self.qkv_rank:
            raise UserError(f"tie_qkv {self.tie_qkv} needs a qkv_rank above 0")


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, arXiv:1910.07467) of the features of (D, T, B); with bias LayerNorm."""

    def __init__(self, width: int, eps: float, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            x = x - x.mean(0, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(0, keepdim=True) + self.eps) * self.weight[:, None, None]
        return x if self.bias is None else x + self.bias[:, None, None]


def linear(x: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (in, out), one after the other, on the features of x: (in, T, B) -> (out, T, B)."""
    for w in matrices:
        x = (w.T @ x.flatten(1)).unflatten(1, x.shape[1:])
    return x


def one_hot(tokens: torch.Tensor, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens (T, B) -> (T, V, B); a token that is none of the V gives zeros."""
    return (tokens[:, None] == torch.arange(V, device=tokens.device)[:, None]).to(dtype)


def look_up(table: torch.Tensor, hot: torch.Tensor) -> torch.Tensor:
    """What each token has in a table of all tokens: (D, T or 1, V), one-hot (T, V, B) -> (D, T, B).

    Before the attention nothing depends on other positions: it is computed for V tokens, not for B sums.
    """
    return torch.einsum("dtv,tvb->dtb", table, hot)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (H, Q, B) of the last Q positions, k and v (H, T, B) of all -> (H, Q, B), and weights (Q, T, B)."""
    Q, T = q.shape[1], k.shape[1]
    score = torch.full((Q, T), -1e30, device=q.device, dtype=q.dtype).triu(1 + T - Q)[:, :, None]
    for q_i, k_i in zip(q, k, strict=True):  # H is 3 to 7: a sum term by term needs no tensor of (H, Q, T, B)
        score = torch.addcmul(score, q_i[:, None], k_i)
    weight = score.softmax(1)
    return torch.stack([(weight * v_i).sum(1) for v_i in v]), weight


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i + H/2}) of (H, T, B) by angle (H / 2, T, 1). Su et al., arXiv:2104.09864."""
    a, b = x.chunk(2)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def arc(p: torch.Tensor, width: int) -> torch.Tensor:
    """Digits on an arc: radius, start and step (3,) -> (10, width), zero beyond two coordinates."""
    angle = p[1] + p[2] * torch.arange(10, device=p.device)
    return F.pad(p[0] * torch.stack([angle.cos(), angle.sin()], 1), (0, width - 2))


def turn_columns(w: torch.Tensor, i: int, j: int, angle: torch.Tensor) -> torch.Tensor:
    """A matrix with its columns i and j turned into each other by an angle (1,)."""
    columns = list(w.unbind(1))
    columns[i], columns[j] = (columns[i] * angle.cos() - columns[j] * angle.sin(),
                              columns[j] * angle.cos() + columns[i] * angle.sin())
    return torch.stack(columns, 1)


class RotaryAdder(nn.Module):
    """One layer, one head, rotary positions, QK-norm, SwiGLU, no biases, the output tied with the embedding.

    Digit k of a, digit k of b and the position that predicts digit k of the sum stand 22 and 10 apart: with a
    period of 12 positions both operands' digits have the same angle, so one frequency can attend to both.
    """
    V, PROMPT, OUTPUTS = 10, 24, 11

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        D = c.d_model
        self.norm1, self.q_norm = Norm(D, 1e-6), Norm(HEAD, 1e-6)
        if c.tie == "all":
            self.norm2 = self.norm_f = self.norm1
            self.k_norm = self.q_norm
        else:
            self.norm2, self.norm_f, self.k_norm = Norm(D, 1e-6), Norm(D, 1e-6), Norm(HEAD, 1e-6)
        shapes = {"emb": (10, D) if c.embedding == "table" else (3,),
                  "wq": (D, HEAD), "wk": (D, HEAD), "wv": (D, HEAD), "wo": (HEAD, D),
                  "gate": (D, c.d_ff), "up": (D, c.d_ff), "down": (c.d_ff, D),
                  "wk_angle": (1,), "down_angle": (1,)}
        derived = {"none": ("wk_angle", "down_angle"), "kv+oq": ("wv", "wo", "wk_angle", "down_angle"),
                   "all": ("wk", "wv", "wo", "down")}[c.tie]
        for name in (x for x in shapes if x not in derived):
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])))

    def matrices(self) -> dict[str, torch.Tensor]:
        """The parameters that are no gains, and the matrices that a tied model derives from them.

        kv+oq: V = K, O = Q^T. all: K is Q with its first pair turned by an angle, V = Q, O = Q^T, down is
        up^T with its first two outputs turned by another one (after AdderBoard's 36-parameter model).
        """
        w = dict(self.named_parameters(recurse=False))
        if self.config.embedding == "arc":
            w["emb"] = arc(w["emb"], self.config.d_model)
        if self.config.tie == "all":
            w["wk"] = turn_columns(w["wq"], 0, HEAD // 2, w["wk_angle"])
            w["wv"] = w["wq"]
            w["down"] = turn_columns(w["up"].T, 0, 1, w["down_angle"])
        if self.config.tie == "kv+oq":
            w["wv"] = w["wk"]
        if self.config.tie != "none":
            w["wo"] = w["wq"].T
        return w

    def forward(self, tokens: torch.Tensor, Q: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (T, B) -> logits (V, Q, B) of the last Q positions, and their attention (Q, T, B)."""
        w = self.matrices()
        hot = one_hot(tokens, self.V, w["emb"].dtype)                       # (T, V, B)
        last = hot[-Q:]
        position = torch.arange(len(tokens), device=hot.device)[:, None]
        angle = hot.new_tensor([2 * math.pi / PERIOD, 3**-0.5])[:, None, None] * position   # (H / 2, T, 1)
        x = w["emb"].T[:, None]                                             # (D, 1, V): each token
        h = self.norm1(x)                                                   # the last axis is V up to look_up
        q = rotate(self.q_norm(linear(h, w["wq"])), angle[:, -Q:])          # (H, Q, V)
        k = rotate(self.k_norm(linear(h, w["wk"])), angle)                  # (H, T, V)
        v = linear(h, w["wv"])                                              # (H, 1, V)
        y, attention = causal_attention(look_up(q * HEAD**-0.5, last), look_up(k, hot), look_up(v, hot))
        x = look_up(x, last) + linear(y, w["wo"])                           # (D, Q, B)
        h = self.norm2(x)
        x = x + linear(F.silu(linear(h, w["gate"])) * linear(h, w["up"]), w["down"])
        return linear(self.norm_f(x), w["emb"].T), attention                # (V, Q, B), (Q, T, B)


class LowRank(nn.Module):
    """The matrix A B; std 0.02 for positions, else (2 / (in + out))^1/2 a factor."""

    def __init__(self, n_in: int, n_out: int, rank: int, std: float | None = None):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(n_in, rank)), nn.Parameter(torch.empty(rank, n_out))
        nn.init.normal_(self.A, std=std or math.sqrt(2 / (n_in + rank)))
        nn.init.normal_(self.B, std=std or math.sqrt(2 / (rank + n_out)))


def make_map(n_in: int, n_out: int, rank: int) -> nn.Module:
    """The weights of a linear map of full rank (rank 0) or of the given rank, without bias."""
    return LowRank(n_in, n_out, rank) if rank else nn.Linear(n_in, n_out, bias=False)


def factors(m: nn.Module) -> tuple[torch.Tensor, ...]:
    """The matrices (in, out) of a map, to be applied one after the other."""
    return (m.A, m.B) if isinstance(m, LowRank) else (m.weight.T,)


class LearnedAdder(nn.Module):
    """The model of the 456-parameter project: learned positions, low-rank maps, output tied with embedding.

    Tensor names, shapes and the order of random draws are the original's, so that its checkpoints load and
    torch.manual_seed(43) gives its weights of seed 43.
    """
    V, PROMPT, OUTPUTS = 14, 22, 12

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        T, D, r = self.PROMPT + self.OUTPUTS - 1, c.d_model, c.qkv_rank
        norm = partial(Norm, D, 1e-8) if c.use_rmsnorm else partial(Norm, D, 1e-5, bias=True)
        self.token_emb = nn.Embedding(self.V, D)
        self.pos_emb = LowRank(T, D, c.pos_rank, std=0.02) if c.pos_rank else nn.Embedding(T, D)
        block, attn = nn.Module(), nn.Module()
        if c.tie_qkv == "none":
            attn.qkv = make_map(D, 3 * D, r)
        else:
            for name, shape in (("qkv_A", (D, r)), ("qkv_Bq", (r, D)), ("qkv_Bkv", (r, D))):
                drawn = torch.empty(shape).normal_(std=math.sqrt(2 / (D + r)))
                attn.register_parameter(name, nn.Parameter(drawn))
        attn.proj = make_map(D, D, c.attn_out_rank)
        block.ln1, block.attn, block.ln2 = norm(), attn, norm()
        shapes = {"fc1": (D, c.d_ff), "fc2": (c.d_ff, D)}
        block.mlp = nn.ModuleDict({name: make_map(*shape, c.ffn_rank) for name, shape in shapes.items()})
        self.blocks = nn.ModuleList([block])
        self.ln_f = norm()
        self.lm_head = nn.Linear(D, self.V, bias=False)
        self.lm_head.weight = self.token_emb.weight
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, Q: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (T, B) -> logits (V, Q, B) of the last Q positions, and their attention (Q, T, B).

        With h A as keys and values, the rest of Q and K folds into one matrix, that of V into the output map.
        """
        block, emb = self.blocks[0], self.token_emb.weight
        hot = one_hot(tokens, self.V, emb.dtype)                            # (T, V, B)
        last = hot[-Q:]                                                     # (Q, V, B)
        pos = self.pos_emb.A @ self.pos_emb.B if self.config.pos_rank else self.pos_emb.weight
        if self.config.tie_qkv == "none":
            *a, b = factors(block.attn.qkv)
            bq, bk, bv = b.chunk(3, 1)
        else:
            a, bq, bk = [block.attn.qkv_A], block.attn.qkv_Bq, block.attn.qkv_Bkv
            bv = bk
        x = emb.T[:, None] + pos[:len(tokens)].T[:, :, None]            # (D, T, V): each token, each position
        h = linear(block.ln1(x), *a)                                        # (R, T, V)
        q = linear(h[:, -Q:], bq @ bk.T * self.config.d_model**-0.5)        # (R, Q, V)
        kv = look_up(h, hot)                                                # (R, T, B)
        y, attention = causal_attention(look_up(q, last), kv, kv)
        x = look_up(x[:, -Q:], last) + linear(y, bv, *factors(block.attn.proj))   # (D, Q, B)
        h = F.gelu(linear(block.ln2(x), *factors(block.mlp["fc1"])))
        x = x + linear(h, *factors(block.mlp["fc2"]))
        return linear(self.ln_f(x), emb.T), attention                       # (V, Q, B), (Q, T, B)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The token with the highest logit, -1 where one is NaN: (V, Q, B) -> (Q, B)."""
    top = logits.max(0)
    return torch.where(top.values.isnan(), -1, top.indices)


def greedy(model: nn.Module, tokens: torch.Tensor, n: int) -> torch.Tensor:
    """Extend tokens (T, B) by the n likeliest next tokens, one at a time, each fed back: (n, B)."""
    for _ in range(n):
        tokens = torch.cat([tokens, likeliest(model(tokens, 1)[0])])
    return tokens[-n:]


FAMILIES = {"rotary": RotaryAdder, "learned": LearnedAdder}


# ---- Initial weights

def config_of(args: argparse.Namespace) -> Config:
    """The model that the flags ask for. Raises UserError."""
    if args.family == "learned" and args.init != "random":
        raise UserError(f"init is {args.init}, which is not for the learned family")
    if args.family == "rotary" and args.smooth_positions:
        raise UserError("smooth_positions is for the learned family, which has a table of positions")
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)})


def make_module(config: Config, init: str = "random", seed: int = 0) -> nn.Module:
    """A model with the initial weights of a seed; the global random stream stays as it was.

    random, learned: the original's. random, rotary: embedding N(0, 1/D), other matrices uniform, wq and wk
    within +- 1/(inputs)^1/2, the rest half of that; gains 1, but those of query and key 0.5, so that the
    attention starts soft: where it sharpens onto one column before the carry is noticed, the column below
    gets no gradient any more, and the seed is stuck. arc+phase: also digit t near 2.5 (cos, sin)(0.29 t -
    1.2) in the first two coordinates of the embedding, and the first coordinate's query and key in phase
    where positions differ by 2 (mod the period), where the operands are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = FAMILIES[config.family](config)
        if config.family == "rotary":
            init_rotary({name: p.data for name, p in module.named_parameters()}, config, init == "arc+phase")
    return module


def flat(module: nn.Module) -> torch.Tensor:
    """The parameters of a module as one row (P,)."""
    return parameters_to_vector(module.parameters()).detach()


def init_rotary(w: dict[str, torch.Tensor], config: Config, designed: bool) -> None:
    """Draw the weights of a RotaryAdder in place, as make_module says; designed: arc+phase."""
    line, step_back = torch.tensor([2.5, -1.2, 0.29]), -4 * math.pi / PERIOD
    for name, p in w.items():
        if name == "emb" and config.embedding == "arc":
            p.copy_(line if designed else torch.randn(3))
        elif name == "emb":
            p.normal_(std=0.1 if designed else config.d_model**-0.5)
            p.add_(arc(line, config.d_model) if designed else 0)
        elif name in ("wq", "wk"):
            p.normal_(std=0.1) if designed else p.uniform_(-1, 1).mul_(p.shape[0]**-0.5)
        elif name in ("wk_angle", "down_angle"):
            p.fill_(step_back) if designed and name == "wk_angle" else p.normal_()
        elif p.dim() == 2:
            p.uniform_(-0.5, 0.5).mul_(p.shape[0]**-0.5)
        elif name in ("q_norm.weight", "k_norm.weight"):
            p.fill_(0.5)
    phase = 2 * math.pi * torch.rand(())
    for name, angle in (("wq", phase), ("wk", phase + step_back)):
        if designed and name in w:
            w[name][0, 0] += angle.cos()
            w[name][0, HEAD // 2] += angle.sin()


# ---- Loss: one model's, mapped over the seeds

def by_name(weights: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """Rows of weights (..., P) as the module's parameters, each (..., *its shape): views of the rows."""
    named = dict(module.named_parameters())
    parts = weights.split([p.numel() for p in named.values()], -1)
    return {name: part.unflatten(-1, p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def batch_loss(weights: torch.Tensor, tokens: torch.Tensor, target: torch.Tensor, bonus: torch.Tensor,
               module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step minimizes, and its cross-entropy (nats), for each seed: (S,), (S,).

    weights (S, P), tokens (S, T, B), target (S, Q, B); bonus () is the reward for each nat of the attention's
    entropy.
    """
    def one_seed(row: torch.Tensor, tokens: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = by_name(row, module)  # what a model ties stands there once
        logits, attention = functional_call(module, named, (tokens, len(target)), tie_weights=False)
        loss = (logits.logsumexp(0) - logits.gather(0, target[None])[0]).mean()
        entropy = -(attention * (attention + 1e-9).log()).sum(1).mean()
        return loss - bonus * entropy, loss
    return vmap(one_seed)(weights, tokens, target)


def make_loss(module: nn.Module, weights: torch.Tensor, args: argparse.Namespace) -> tuple[Callable, str]:
    """The loss of a step as a function of weights, tokens, target and bonus, and how it runs."""
    loss = partial(batch_loss, module=module)
    sums = args.steps * args.batch_size * len(args.seeds)
    if args.compile == "off" or (args.compile == "auto" and sums < COMPILE_FROM):
        return loss, "eager"
    print("compiling the step (half a minute the first time, then cached)", flush=True)
    tokens, target = batches(0, args)
    weights = weights.clone().requires_grad_()
    try:
        fast = torch.compile(loss, dynamic=False, fullgraph=True)
        torch.autograd.grad(fast(weights, tokens[0], target[0], weights.new_zeros(()))[0].sum(), weights)
        return fast, "compiled"
    except Exception as e:  # a missing or broken C++ compiler shows itself in many types of exception
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        return loss, f"eager, 2 to 4 times slower: torch.compile failed ({reason:.90})"


# ---- Optimizer: all seeds at once

class Population(nn.Module):
    """Weights and training state of S seeds, as buffers. Raises UserError: too many weights for SOAP."""

    def __init__(self, config: Config, args: argparse.Namespace):
        super().__init__()
        weights = torch.stack([flat(make_module(config, args.init, seed)) for seed in args.seeds])
        S, P = weights.shape
        if args.optimizer == "soap" and P > 2000:
            raise UserError(f"--optimizer: soap has a basis of all {P} parameters; it takes up to 2000")
        n, count = P if args.optimizer == "soap" else 0, torch.zeros(S, dtype=torch.long)
        self.register_buffer("weights", weights)
        self.register_buffer("mean", torch.zeros(S, P))               # running mean of the gradient
        self.register_buffer("square", torch.zeros(S, P))             # and of its square, in the basis
        self.register_buffer("covariance", torch.zeros(S, n, n))      # running mean of g g^T
        self.register_buffer("basis", torch.eye(n).repeat(S, 1, 1))   # its eigenvectors, in columns
        self.register_buffer("alive", count == 0)                     # not, once a loss was not finite
        self.register_buffer("loss_sum", torch.zeros(S))              # since the last row
        self.register_buffer("first", count - 1)                      # first step with 99 % on validation
        self.register_buffer("best_val", count - 1)                   # most right validation pairs so far
        self.register_buffer("best_step", count)                      # the step then, the later one of a tie


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a line to 0 or a cosine to a tenth."""
    warm = max(args.warmup * (args.steps if args.warmup < 1 else 1), 1)
    if step < warm:
        return args.lr * min((step + 1) / warm, 1)
    done = (step - warm) / max(args.steps - warm, 1)
    return args.lr * (1 - done if args.schedule == "linear" else 0.55 + 0.45 * math.cos(math.pi * done))


def faded(step: int, args: argparse.Namespace) -> float:
    """A factor that falls in a line from 1 at step 0 to 0 at --fade-until; always 1 if that is 0."""
    return max(0.0, 1 - step / (args.fade_until * args.steps)) if args.fade_until else 1.0


def new_basis(state: Population) -> None:
    """Take the eigenvectors of the gradient covariance as the basis, and carry the mean square over to it."""
    scale = state.covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-30
    scaled = torch.nan_to_num(state.covariance / scale, 0.0, 0.0, 0.0)   # eigh would stop all seeds for one
    scaled.diagonal(dim1=1, dim2=2).add_(1e-7)  # eigh may fail at rank one, if some weights get no gradient
    new = torch.linalg.eigh(scaled.cpu() if scaled.is_mps else scaled)[1].to(scaled)  # older MPS has no eigh
    between = new.transpose(1, 2) @ state.basis                              # (S, P, P), old basis -> new
    state.square = (between.square() * state.square[:, None]).sum(2)         # as if a covariance's diagonal
    state.basis = new


def update(state: Population, grad: torch.Tensor, loss: torch.Tensor, step: int, args: argparse.Namespace,
           module: nn.Module) -> torch.Tensor:
    """One step of AdamW for every seed; with --optimizer soap, in the eigenbasis of its gradient covariance.

    SOAP (Vyas et al., arXiv:2409.11321) has a basis for each side of each matrix; with a few hundred
    parameters one for all of them at once is affordable. A seed whose loss or gradient is not finite stops
    for good. grad (S, P), loss (S,). Returns the gradient norms (S,).
    """
    soap, lr, norm = args.optimizer == "soap", learning_rate(step, args), grad.norm(dim=1)
    beta2 = 0.99 if soap else 0.999
    state.alive &= torch.isfinite(loss) & torch.isfinite(norm)
    grad = torch.where(state.alive[:, None], grad, 0.0)
    grad = grad / (grad.norm(dim=1, keepdim=True) + 1e-6).clamp(min=1)       # clipped to norm 1
    mean = state.mean.lerp_(grad, 0.1)
    if soap:
        # not as a product: a batched one rounds otherwise for one seed than for several on some processors
        state.covariance.mul_(beta2).addcmul_(grad[:, :, None], grad[:, None], value=1 - beta2)
        if step % max(args.steps // 100, 1) == 0 or step in (1, 3, 8):       # the first gradients say little
            new_basis(state)
        grad, mean = (torch.stack([grad, mean], 1) @ state.basis).unbind(1)
    state.square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    move = mean / (1 - 0.9 ** (step + 1)) / ((state.square / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
    if soap:
        move = (move[:, None] @ state.basis.transpose(1, 2))[:, 0]
    lr = lr * state.alive[:, None].to(grad)                                  # (S, 1)
    state.weights.mul_(1 - lr * args.weight_decay * faded(step, args)).sub_(lr * move)
    if args.smooth_positions:
        named = by_name(state.weights, module)
        table = named["pos_emb.A" if args.pos_rank else "pos_emb.weight"]    # (S, T, r)
        bend = F.pad(table.diff(n=2, dim=1), (0, 0, 2, 2))
        rough = bend.diff(n=2, dim=1)                                    # gradient of half the sum of bend^2
        table -= lr[:, :, None] * args.smooth_positions * faded(step, args) * rough
    return norm


# ---- Evaluation

def answers(model: nn.Module, pairs: Pairs, mode: str = "tf") -> tuple[np.ndarray, np.ndarray]:
    """Predicted and right tokens of sums, (N, 11) each.

    Mode tf: one pass that sees the right digits before each; ar: greedy decoding. A sum is right in both or
    in none: up to a first wrong token they have seen the same ones.
    """
    tokens, target = encode(model.config.family, *pairs)
    device, out = next(model.parameters()).device, []
    with eval_mode(model):
        for lo in range(0, len(tokens), 1000):
            part = batch_last(tokens[lo:lo + 1000]).to(device)
            if mode == "tf":
                said = likeliest(model(part, model.OUTPUTS)[0])[:ANSWER]
            else:
                said = greedy(model, part[:model.PROMPT], ANSWER)
            out.append(said.T.cpu().numpy())
    return np.concatenate(out), target[:, :ANSWER]


def exact_match(weights: torch.Tensor, pairs: Pairs, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the digits of N pairs: how many sums are right in all 11 digits (S,), and each digit (S, 11)."""
    exact, digits = [], []
    for row in weights:
        vector_to_parameters(row, module.parameters())
        got, target = answers(module, pairs)
        exact.append(int((got == target).all(1).sum()))
        digits.append((got == target).sum(0))
    return torch.tensor(exact), torch.tensor(np.array(digits))


# ---- Training

def validate(state: Population, module: nn.Module, step: int, args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Exact match on training sums and validation pairs (S,), digits there (S, 11); notes best and first 99 %."""
    x = sample_pairs([TRAINED], np.array([max(step - 1, 0)]), VAL_SIZE, args)[0]    # as the last step had them
    trained, _ = exact_match(state.weights, (x[:, 0], x[:, 1]), module)
    right, digits = exact_match(state.weights, uniform_pairs([VALIDATION], VAL_SIZE), module)
    right = right.to(state.best_val)
    better = (right >= state.best_val) & torch.isfinite(state.weights).all(1)
    state.best_val[better] = right[better]
    state.best_step[better] = step
    state.first[(state.first < 0) & (right >= GROKKED * VAL_SIZE)] = step
    return trained.double() / VAL_SIZE, right.cpu().double() / VAL_SIZE, digits.double() / VAL_SIZE


def train(args: flags.Flags) -> dict:
    """Train all seeds, and return the summary. Raises UserError."""
    devices.refuse_ranks(SCRIPT)
    args, saved = run.restore(args, SCRIPT, population=dict)
    device = devices.get_device(args.device)
    args.device, args.seed = str(device), args.seeds[0]
    if len(args.seeds) * args.batch_size > MOST_SUMS:
        raise UserError(f"--batch-size: {args.batch_size} sums for each of {len(args.seeds)} seeds are more than "
                        f"the {MOST_SUMS} that a step can have")
    config = config_of(args)
    module, state = make_module(config).to(device), Population(config, args).to(device)
    if args.init_from:
        state.weights[:] = initial_weights(args.init_from, config)
    if saved:
        with files.refuse_damaged(args.resume):
            state.load_state_dict(saved["population"])
    norm = torch.zeros(len(args.seeds), device=device)

    with run.Run(args, SCRIPT, __file__, saved) as r:
        print(f"{args.preset}: {len(args.seeds)} seeds on {devices.describe(device)}, "
              f"params {state.weights.shape[1]} learned, 0 frozen, init {args.init_from or args.init}, "
              f"{args.optimizer}, {args.batch_size} sums a step, {args.steps} steps, {r.folder}", flush=True)
        if args.warmup >= args.steps or any(until >= args.steps for _, until in curriculum(args.lengths)):
            print("the warm-up or the lengths' last phase is longer than this run and is cut off", flush=True)
        loss_fn, how = make_loss(module, state.weights, args)
        print(f"the step runs {how}; ready after {r.seconds():.1f} s", flush=True)
        for step in range(r.start, args.steps + 1):
            due, last = r.due(step), r.last(step)
            if due:
                rates = validate(state, module, step, args)
                n = (step - 1) % args.eval_every + 1 if step else math.nan   # steps since the last row
                log(r, step, args, state.loss_sum / n, *rates, norm)
                state.loss_sum.zero_()
                save_best(r, state, module, args)
            if due or last:
                r.save("last.pt", config=asdict(config), population=state.state_dict(), ema=None)
            if last:
                break
            if step % CHUNK == 0 or step == r.start:
                tokens, target = batches(step // CHUNK, args)
            weights = state.weights.detach().requires_grad_()
            bonus = torch.tensor(args.entropy_bonus * faded(step, args), device=device)
            goal, loss = loss_fn(weights, tokens[step % CHUNK], target[step % CHUNK], bonus)
            grad, = torch.autograd.grad(goal.sum(), weights)
            with torch.no_grad():
                norm = update(state, grad, loss, step, args, module)
                state.loss_sum += loss.detach()
        r.leave_if_stopped()
        return finish(r, state, module, args, how)


def log(r: run.Run, step: int, args: argparse.Namespace, loss: torch.Tensor, train_exact: torch.Tensor,
        exact: torch.Tensor, digits: torch.Tensor, norm: torch.Tensor) -> None:
    """A row of metrics.csv for each seed, and a log line of the means of those that have not failed."""
    lr = learning_rate(step, args)
    for i, seed in enumerate(args.seeds):
        by_digit = {f"digit{k}": float(digits[i, k]) for k in range(ANSWER)}
        r.record({"step": step, "seed": seed, "loss": float(loss[i]), "train_exact": float(train_exact[i]),
                  "exact": float(exact[i]), **by_digit, "lr": lr, "grad": float(norm[i])})
    r.show({"step": step, "loss": float(loss[loss.isfinite()].mean()), "exact": float(exact.mean()),
            "grokked": int((exact >= GROKKED).sum()), "lr": lr, "grad": float(norm[norm.isfinite()].mean())})


def save_best(r: run.Run, state: Population, module: nn.Module, args: argparse.Namespace) -> None:
    """Write best_sSEED.pt of each seed whose validation was the best of its run just now."""
    for i in torch.nonzero(state.best_step == r.step).flatten().tolist():
        vector_to_parameters(state.weights[i], module.parameters())
        weights = {name: x.detach().cpu().clone() for name, x in module.state_dict().items()}
        r.save(f"best_s{args.seeds[i]}.pt", model=weights, config=asdict(module.config), seed=args.seeds[i],
               val_exact=int(state.best_val[i]) / VAL_SIZE)


def finish(r: run.Run, state: Population, module: nn.Module, args: argparse.Namespace, how: str) -> dict:
    """Exact match of the last weights on fresh pairs, summary.json, the pictures, and the table."""
    n = TEST_SIZE
    right, digits = exact_match(state.weights, uniform_pairs([TEST], n), module)
    seeds = {}
    for i, seed in enumerate(args.seeds):
        seeds[str(seed)] = {
            "first_step": int(state.first[i]) if state.first[i] >= 0 else None, "errors": n - int(right[i]),
            "exact": int(right[i]) / n, "digits": (digits[i].double() / n).tolist(),
            "failed": not state.alive[i].item(), "best_step": int(state.best_step[i]),
            "best_val": int(state.best_val[i]) / VAL_SIZE}
    grokked = [s for s in seeds.values() if s["exact"] >= GROKKED and not s["failed"]]
    summary = r.summary(
        n_params=state.weights.shape[1], preset=args.preset, init=args.init_from or args.init, step_runs=how,
        test_size=n, n_seeds=len(seeds), n_grokked=len(grokked), grok_rate=len(grokked) / len(seeds),
        grok_interval=wilson(len(grokked), len(seeds)), n_perfect=sum(s["errors"] == 0 for s in grokked),
        seeds=seeds)
    for seed, s in seeds.items():
        at = f"99% at step {s['first_step']}" if s["first_step"] is not None else "never 99%"
        weak = [f"digit {k} {100 * x:.0f}%" for k, x in enumerate(s["digits"]) if x < 0.95]
        print(f"seed {seed:>5}: {100 * s['exact']:8.3f}%, {s['errors']:6d} errors, {at}"
              + (", failed: its loss was not finite" if s["failed"] else "")
              + (f"; below 95%: {', '.join(weak)}" if weak else ""))
    draw_pictures(r.folder)
    early = f"stopped at step {r.step} of {args.steps} by --max-minutes: " if r.step < args.steps else ""
    print(f"{early}{format_rate(len(grokked), len(seeds))} of the seeds have >= 99% of {n} pairs, "
          f"{summary['n_perfect']} make no error; {summary['n_params']} parameters, {r.seconds():.0f} s "
          f"({r.cpu_seconds():.0f} CPU-s), {r.folder}")
    return summary


# ---- Pictures

def draw_pictures(folder: str | os.PathLike) -> list[Path]:
    """Draw exact.png and attention.png of a run from its metrics.csv, summary.json and best_s*.pt."""
    folder = Path(folder)
    summary, rows = files.read_json(folder / "summary.json"), metrics.read(folder)
    if summary.get("script") != SCRIPT:
        raise UserError(f"{folder}: a run of {summary.get('script')!r:.40}, not of {SCRIPT}")
    seeds = list(summary["seeds"])

    fig, (left, right) = plots.new_figure(1, 2, height=max(4.2, 0.14 * len(seeds)))
    for i, seed in enumerate(seeds):
        steps, exact = metrics.points([row for row in rows if row["seed"] == int(seed)], "step", "exact")
        left.plot(steps, [100 * x for x in exact], marker=".", ms=4, lw=1.2, color=f"C{i % 10}", alpha=0.8,
                  label=f"seed {seed}" if len(seeds) <= 16 else None)
    left.set(xlabel="step", ylabel="exact match on validation, %", ylim=(-3, 103),
             title=f"{summary['n_params']} parameters: {summary['n_grokked']} of {len(seeds)} seeds grok")
    if len(seeds) <= 16:
        left.legend(frameon=False, fontsize=8, ncols=2)
    digits = [[100 * x for x in summary["seeds"][seed]["digits"]] for seed in seeds]
    image = right.imshow(digits, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    right.grid(False)
    right.set(xlabel="digit of the sum, lowest first", ylabel="seed", xticks=range(ANSWER),
              title="right digits at the end, %")
    if len(seeds) <= 32:
        right.set_yticks(range(len(seeds)), seeds)
    fig.colorbar(image, ax=right)
    made = [plots.save_figure(fig, folder / "exact.png")]

    best = max(seeds, key=lambda seed: summary["seeds"][seed]["best_val"])
    file = folder / f"best_s{best}.pt"
    if file.is_file():
        made.append(draw_attention(load_model(file)[0], folder / "attention.png", best))
    return made


def draw_attention(model: nn.Module, out: Path, seed: str, a: int = 1234567890, b: int = 9876543210) -> Path:
    """The attention of the positions that predict the sum of a and b, over all positions."""
    tokens = encode(model.config.family, *pair_of(a, b))[0]
    with eval_mode(model):
        _, attention = model(batch_last(tokens), model.OUTPUTS)
    fig, ax = plots.new_figure(width=9)
    image = ax.imshow(attention[:ANSWER, :, 0].numpy(), vmin=0, aspect="auto")
    ax.grid(False)
    names = ["+" if t == PLUS else "=" if t == EQUALS else str(t) for t in tokens[0].tolist()]
    ax.set_xticks(range(len(names)), names)
    ax.set(xlabel=f"token: {a}, {b} and their sum, as this model reads them", yticks=range(ANSWER),
           ylabel="digit of the sum that is predicted", title=f"attention of seed {seed}")
    fig.colorbar(image, ax=ax)
    return plots.save_figure(fig, out)


# ---- Use of a trained model

def recognises(saved: dict) -> bool:
    """Whether a checkpoint is one of the 456-parameter project, which names no script."""
    return all(isinstance(saved.get(k), dict) for k in ("model_state", "model_config"))


def file_of(path: str | os.PathLike) -> Path:
    """The model that `path` means: itself, or of a run folder the best_sSEED.pt with the best validation."""
    if not Path(path).is_dir():
        return Path(path)
    with files.refuse_damaged(path):
        return max(sorted(Path(path).glob("best_s*.pt")), default=Path(path) / "best_s0.pt",
                   key=lambda file: float(checkpoint.read(file)["val_exact"]))


def stored_config(values: dict, path: str | os.PathLike) -> Config:
    """The Config in a checkpoint. Raises UserError naming a field that no model here has, unless it is off."""
    fixed = {"head_dim": HEAD, "period": PERIOD, "n_layer": 1, "n_head": 1, "max_seq_len": 33, "vocab_size": 14}
    own = {f.name: values[f.name] for f in fields(Config) if f.name in values}
    try:
        for name in values.keys() - own.keys():
            if str(values[name]).removesuffix(".0") not in ("None", "False", "0", str(fixed.get(name))):
                raise UserError(f"its {name} is {values[name]!r:.40}, which no model here has")
        return Config(**own)
    except (TypeError, UserError) as e:
        raise UserError(f"{path}: {e}") from None


def load_model(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """The trained module at `path`, of a run folder its best, and the checkpoint. A published file will do.

    Raises UserError: missing, damaged, foreign, an impossible config, weights that do not fit it.
    """
    path = file_of(path)
    saved = checkpoint.read(path)
    if recognises(saved):
        saved = {"script": SCRIPT, "format": checkpoint.FORMAT, "model": saved["model_state"],
                 "step": saved.get("step", -1), "config": {"family": "learned", **saved["model_config"]}}
    kinds = {"seed": int, "args": dict} if "seed" in saved else {}          # not in a published file
    checkpoint.check(saved, path, SCRIPT, like=Config, config=dict, model=dict, step=int, **kinds)
    module = make_module(stored_config(saved["config"], path))
    checkpoint.load_weights(module, saved["model"], path)
    if module.config.family == "learned" and not torch.equal(*(
            saved["model"][name] for name in ("lm_head.weight", "token_emb.weight"))):
        raise UserError(f"{path}: lm_head.weight is not token_emb.weight, which it is tied to")
    return module.eval(), saved


def initial_weights(path: str, config: Config) -> torch.Tensor:
    """The weights (P,) of a trained model, for every seed to start from. Raises UserError: another config."""
    module, _ = load_model(path)
    if module.config != config:
        raise UserError(f"{path}: a model of another config ({module.config}, here {config})")
    return flat(module)


def pair_of(a: object, b: object) -> Pairs:
    """Digits (1, 10) of two operands. Raises UserError when one is not a whole number in 0..10^10 - 1."""
    for x in (a, b):
        if isinstance(x, bool) or not isinstance(x, (int, np.integer)) or not 0 <= x < LIMIT:
            raise UserError(f"an operand is not a whole number in 0..{LIMIT - 1}")
    return digits_of(np.array([a]), DIGITS), digits_of(np.array([b]), DIGITS)


def load(path: str | os.PathLike) -> Callable[[int, int], int | None]:
    """`add = load(path)`: add(a, b) is the model's sum by greedy decoding, None if a token is no digit.

    Raises UserError for a bad checkpoint, and for operands that are not whole numbers in 0..10^10 - 1.
    """
    model, _ = load_model(path)

    def add(a: int, b: int) -> int | None:
        return number(answers(model, pair_of(a, b), "ar")[0][0])
    return add


def show_sum(model: nn.Module, text: str) -> dict:
    """Let a model answer a sum like 12+34, and print the answer."""
    found = re.fullmatch(r"\s*([0-9]{1,40})\s*\+\s*([0-9]{1,40})\s*", text)
    if not found:
        raise UserError(f"--add {text[:60]!r}: expected two whole numbers like 1234567890+9876543210")
    a, b = int(found[1]), int(found[2])
    digits = answers(model, pair_of(a, b), "ar")[0][0]
    answer = number(digits)
    print(f"digits, lowest first: {' '.join(map(str, digits))}")
    print(f"{a} + {b} = {'no number' if answer is None else answer}, "
          + ("right" if answer == a + b else f"wrong: it is {a + b}"))
    return {"a": a, "b": b, "answer": answer, "right": answer == a + b}


SUBMISSION = '''"""{n} parameters, trained: a submission for AdderBoard, written by {script}."""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

UserError = ValueError


{models}

CONFIG = {config}
WEIGHTS = {weights}


def build_model():
    model = FAMILIES[CONFIG.family](CONFIG)
    model.load_state_dict({{name: torch.tensor(values) for name, values in WEIGHTS.items()}})
    metadata = {{"name": {name!r}, "author": "stalled-experiments",
                "params": sum(p.numel() for p in model.parameters()),
                "architecture": f"one layer, one head, {{CONFIG}}", "tricks": {tricks}}}
    return model.eval(), metadata


def add(model, a, b):
    a, b = f"{{a:010d}}", f"{{b:010d}}"
    prompt = {prompt}
    with torch.no_grad():
        out = greedy(model, torch.tensor(prompt)[:, None], 11)[:, 0].tolist()
    return int("".join(map(str, out[::-1]))) if 0 <= min(out) <= max(out) < 10 else -1
'''


def export_submission(model: nn.Module, saved: dict, out: str) -> None:
    """Write the model as one file with build_model() and add(model, a, b): section Model, and weights as numbers.

    The metadata names what AdderBoard tells apart: priors in the positions, the start and the training.
    """
    c, n, args = model.config, count_parameters(model), saved.get("args", {})
    prompt, tricks = f"[*map(int, a), {PLUS}, *map(int, b), {EQUALS}]", []
    if c.family == "rotary":
        prompt, tricks = "[int(x) for x in '0' + a[::-1] + '00' + b[::-1] + '0']", [f"rotary period {PERIOD}"]
    told = ("init", "optimizer", "entropy_bonus", "random_zeros", "smooth_positions")
    tricks += [f"{name.replace('_', ' ')} {args[name]}" for name in told if args.get(name)]
    models = re.search(r"(?s)\n(# ---- Model.*?)# ---- ", Path(__file__).read_text())[1]
    text = SUBMISSION.format(
        n=n, script=SCRIPT, models=models.strip(), config=c, prompt=prompt, tricks=tricks,
        weights={k: v.tolist() for k, v in model.state_dict().items()},
        name=f"{args.get('preset') or c.family}, {n} parameters, seed {saved.get('seed')}")
    files.write_atomic(out, text.encode())
    print(f"{out}: {n} parameters; check it with AdderBoard's verify.py")


def evaluate_checkpoint(path: str | os.PathLike, args: argparse.Namespace) -> dict:
    """Exact match of a checkpoint on the original's test pairs, as [right, of] counts. Raises UserError.

    A sum is right if all 11 digits are (EOS is not asked, as in the original; a token that is no digit is
    wrong). Intervals are Wilson's, 95 %. args may have: n (10,000) pairs for each of split_seeds, mode (tf:
    one teacher-forced pass; ar: greedy), device. failures: the first ten as a, b, a + b, greedy answer.
    positions: each digit of the sum, lowest first; with mode tf they are teacher-forced.
    """
    model, saved = load_model(path)
    model.to(devices.get_device(getattr(args, "device", "cpu")))
    n, mode = getattr(args, "n", 10_000), getattr(args, "mode", "tf")
    seeds = getattr(args, "split_seeds", SPLIT_SEEDS)
    cpu, total = time.process_time(), n * len(seeds)
    splits, failures, positions = {}, [], np.zeros(ANSWER, np.int64)
    for seed in seeds:
        pairs = split_pairs(seed, n)
        got, target = answers(model, pairs, mode)
        wrong = np.flatnonzero((got != target).any(1))
        splits[str(seed)] = [n - len(wrong), n]
        positions += (got == target).sum(0)
        for i in wrong[:10 - len(failures)]:
            a, b = (number(x[i]) for x in pairs)
            failures.append([a, b, a + b, number(answers(model, pair_of(a, b), "ar")[0][0])])
    cpu, right = time.process_time() - cpu, sum(k for k, _ in splits.values())
    return {"script": SCRIPT, "file": str(file_of(path)), "n_params": count_parameters(model),
            "config": asdict(model.config), "step": saved["step"], "seed": saved.get("seed"), "mode": mode,
            "exact": [right, total], "exact_rate": right / total, "exact_interval": [*wilson(right, total)],
            "splits": splits, "token_accuracy": int(positions.sum()) / (total * ANSWER),
            "positions": [[int(k), total] for k in positions], "failures": failures,
            "cpu_seconds": cpu, "additions_per_cpu_second": total / max(cpu, 1e-9)}


def format_evaluation(out: dict) -> str:
    """The figures of evaluate_checkpoint as text."""
    right, total = out["exact"]
    return "\n".join([
        f"  {out['n_params']} parameters, {out['config']['family']}, step {out['step']}, mode {out['mode']}, "
        f"{out['additions_per_cpu_second']:.0f} additions per CPU-s",
        f"  exact match {format_rate(right, total)}, {total - right} errors, token accuracy "
        f"{100 * out['token_accuracy']:.4f}%",
        "  errors by split seed: " + ", ".join(f"{s}: {n - k}" for s, (k, n) in out["splits"].items()),
        "  % by position, lowest digit first: " + " ".join(f"{100 * k / n:.2f}" for k, n in out["positions"]),
        *(f"  {a} + {b} = {c}, got {'no number' if d is None else d}" for a, b, c, d in out["failures"])])


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    with files.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        if args.plot:
            flags.only(args, "plot")
            with files.refuse_damaged(args.plot):
                print(*draw_pictures(args.plot), sep="\n")
            return None
        modes = ("add", "export_submission", "checkpoint")
        mode = next((name for name in modes if vars(args)[name] is not None), None)
        if mode is None:
            return train(args)
        flags.only(args, mode, "checkpoint", *["device"] * (mode == "checkpoint"))
        if args.checkpoint is None:
            raise UserError(f"--{mode.replace('_', '-')}: of which model? give its --checkpoint")
        if mode == "checkpoint":
            out = evaluate_checkpoint(args.checkpoint, args)
            print(f"{out['file']}\n{format_evaluation(out)}")
            return out
        model, saved = load_model(args.checkpoint)
        if mode == "add":
            return show_sum(model, args.add)
        files.check_output(args.export_submission)
        export_submission(model, saved, args.export_submission)


if __name__ == "__main__":
    main()
