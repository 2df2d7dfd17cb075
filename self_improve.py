"""Can a small model teach itself harder problems, from nothing but its own solutions that pass a check?

    python self_improve.py                                   # 0.5 M parameters, about 4 min on two cores
    python self_improve.py --compare --steps 10              # the loop beside its three controls, in one picture
    python self_improve.py --solve "3 4 + 2 *" --kind rpn --checkpoint logs/kept/self_improve/seed101

The model rewrites a line: it marks the next part that can be worked out and writes its value, and is asked again
with the shorter line until an answer is left. It is bootstrapped on clean solutions of difficulty 1-3. Each
iteration it samples solutions of new problems, keeps those whose every line has the problem's value, trains on
them, and goes on to the next difficulty when it passes a gate on validation problems. A run writes
logs/self_improve/NAME/: the usual files (step is the iteration), solutions/iter_N.jsonl and pictures. Descends from
canivel/axiom-rl, whose loop never trained.
"""
from __future__ import annotations

from common import files, flags  # before torch: a Ctrl-C while that loads is one line then

# isort: split
import argparse
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate, pass_at_k, wilson
from common.files import UserError
from common.flags import integer, path, real

SCRIPT = Path(__file__).name
KINDS = ("arithmetic", "rpn", "brackets")
CONTROLS = ("off", "none", "unverified", "corpus")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "//": 2}
CLOSING = {"(": ")", "[": "]", "{": "}"}
HELD_OUT = {"test": range(0, 10), "val": range(10, 15)}           # of 100 buckets of a problem's hash
CORPUS, FRESH, SAMPLE, UPDATE, SPLIT, PASS = 1, 2, 3, 4, 5, 6     # streams of randomness
EASY, MIDDLE, HARD = range(1, 4), range(3, 8), range(8, 11)       # of the corpus, test_accuracy, ood_accuracy
REMEMBERED = 4                                                    # iterations whose solutions are trained on
PASS_K = 8                                                        # samples of a test problem for pass@k
FALL = 0.05                                                       # of validation, that brings the best weights back

Line = tuple[str, ...]


# ---- Flags

def kind_list(text: str) -> list[str]:
    """An argparse type: kinds of problems, like rpn,brackets."""
    kinds = text.split(",")
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected some of {','.join(KINDS)}")
    return kinds


def parse_args(argv: list[str] | None = None) -> flags.Flags:
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("data")
    g.add_argument("--kinds", type=kind_list, default=[*KINDS], metavar="A,B",
                   help="of problems (default: all three)")
    g.add_argument("--max-value", type=integer(9, 999), default=20,
                   help="all values are at most this, one token each")
    g.add_argument("--n-test", type=integer(2), default=40, help="problems of each kind and difficulty "
                   "1-10; where there are fewer, those; training accuracy is of half as many")
    g.add_argument("--n-val", type=integer(1), default=40, help="the same, for the gate")

    g = p.add_argument_group("model")
    g.add_argument("--width", type=integer(8, 4096), default=128, help="of the residual stream")
    g.add_argument("--layers", type=integer(1, 64), default=3, help="blocks")
    g.add_argument("--heads", type=integer(1, 64), default=4, help="of attention")
    g.add_argument("--positions", choices=["coupled", "plain", "none"], default="coupled",
                   help="coupled: a copied token has the position of its source")
    g.add_argument("--rotary", type=real(0, 1, above=True), default=0.5,
                   help="share of a head that knows positions")
    g.add_argument("--no-marks", dest="marks", action="store_false",
                   help="the model writes the new line, marking nothing")

    g = p.add_argument_group("bootstrap, on clean solutions of difficulty 1-3")
    g.add_argument("--bootstrap-steps", type=integer(1), default=1000, help="optimizer steps")
    g.add_argument("--bootstrap-lr", type=real(0, 1, above=True), default=2e-3, help="peak learning rate")
    g.add_argument("--cache-dir", type=path, default=os.path.expanduser("~/.cache/stalled-experiments"),
                   help="where bootstrapped models are kept, by a hash of script and flags")

    g = p.add_argument_group("loop")
    g.add_argument("--steps", "--iterations", type=integer(1), default=16, help="iterations")
    g.add_argument("--problems", type=integer(2), default=200, help="new ones an iteration and kind: half of the "
                   "difficulty that is learned now, half of 4 up to it")
    g.add_argument("--k", type=integer(1, 1000), default=2, help="solutions sampled of each")
    g.add_argument("--fixed", action="store_true", help="the same problems of a difficulty in every iteration")
    g.add_argument("--temperature", type=real(0, 10), default=1.0, help="of sampling")
    g.add_argument("--verify", choices=["strict", "outcome"], default="strict", help="strict: every line has the "
                   "problem's value and one part less than the one before; outcome: the answer is right")
    g.add_argument("--control", choices=CONTROLS, default="off",
                   help="none: no training; unverified: on all that ends in an answer; corpus: on clean "
                   "solutions of difficulty 1-3")
    g.add_argument("--compare", action="store_true", help="run the loop and its three controls from one bootstrap, into "
                   "OUT-DIR-off and so on, and draw them in one picture; what is there already is gone on with")
    g.add_argument("--gate", type=real(0, 1), default=0.7,
                   help="validation accuracy from which the next difficulty is learned")
    g.add_argument("--top", type=integer(4, 10), default=7, help="last difficulty that is learned")
    g.add_argument("--updates", type=integer(1), default=120, help="optimizer steps an iteration")
    g.add_argument("--batch-size", type=integer(1, 1 << 16), default=96, help="steps of solutions in a batch")
    g.add_argument("--lr", type=real(0, 1, above=True), default=1e-3,
                   help="learning rate, falling to a tenth in each iteration")
    g.add_argument("--replay", type=real(0, 1), default=0.4, help="share of the corpus in a batch")

    g = p.add_argument_group("evaluation, or instead of training")
    g.add_argument("--eval-every", type=integer(1), default=1, help="iterations between evaluations and saves")
    g.add_argument("--checkpoint", type=path, metavar="PATH", help="evaluate this model, or a run's last one")
    g.add_argument("--solve", metavar="LINE",
                   help="let --checkpoint work out one line, with spaces between its tokens")
    g.add_argument("--kind", choices=KINDS, default="arithmetic", help="of the line to --solve")
    g.add_argument("--plot", type=path, metavar="RUN", help="draw the pictures of this run again")
    flags.add_run_arguments(p)
    p.set_defaults(threads=2)
    args = flags.parse(p, argv)
    try:
        config_of(args)
        if args.temperature == 0 and args.k > 1:
            raise UserError("--temperature: at 0 all --k samples are the same")
    except UserError as e:
        p.error(str(e))
    return args


# ---- Problems

@dataclass(frozen=True)
class Problem:
    """A line to be worked out. difficulty: operations, or pairs of brackets."""
    kind: str
    line: Line
    answer: str       # a number; yes or no for brackets
    difficulty: int


def apply(operator: str, a: int, b: int) -> int | None:
    """Python's integer arithmetic; None for a division by zero."""
    if operator == "//":
        return a // b if b else None
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def random_tree(rng: np.random.Generator, d: int, limit: int) -> tuple:
    """An expression of d operations, all values within `limit`: (value,) or (value, operator, a, b)."""
    if d == 0:
        return (int(rng.integers(1, min(limit, 9) + 1)),)
    while True:
        left = int(rng.integers(d))
        a, b = random_tree(rng, left, limit), random_tree(rng, d - 1 - left, limit)
        for operator in rng.permutation(list(PRECEDENCE)):
            value = apply(operator, a[0], b[0])
            if value is not None and abs(value) <= limit:
                return (value, str(operator), a, b)


def as_rpn(tree: tuple) -> list[str]:
    if len(tree) == 1:
        return [str(tree[0])]
    return [*as_rpn(tree[2]), *as_rpn(tree[3]), tree[1]]


def as_infix(tree: tuple) -> list[str]:
    """With the brackets that precedence asks for, and no others."""
    if len(tree) == 1:
        return [str(tree[0])]
    sides = []
    for side, least in ((tree[2], PRECEDENCE[tree[1]]), (tree[3], PRECEDENCE[tree[1]] + 1)):
        line = as_infix(side)
        sides.append(["(", *line, ")"] if len(side) > 1 and PRECEDENCE[side[1]] < least else line)
    return [*sides[0], tree[1], *sides[1]]


def random_brackets(rng: np.random.Generator, d: int) -> list[str]:
    """A balanced line of d pairs."""
    if d == 0:
        return []
    inside, opening = int(rng.integers(d)), str(rng.choice(list(CLOSING)))
    return [opening, *random_brackets(rng, inside), CLOSING[opening], *random_brackets(rng, d - 1 - inside)]


def random_problem(rng: np.random.Generator, kind: str, d: int, limit: int) -> Problem:
    """Brackets: half are balanced, the others have one bracket changed, so that they look alike."""
    if kind == "brackets":
        line, balanced = random_brackets(rng, d), bool(rng.integers(2))
        if not balanced:
            i = int(rng.integers(len(line)))
            line[i] = str(rng.choice([x for x in (*CLOSING, *CLOSING.values()) if x != line[i]]))
        return Problem(kind, tuple(line), "yes" if balanced else "no", d)
    tree = random_tree(rng, d, limit)
    return Problem(kind, tuple(as_rpn(tree) if kind == "rpn" else as_infix(tree)), str(tree[0]), d)


def split_of(problem: Problem) -> str:
    """train, val or test: by a hash of the text, so that no problem is in two of them."""
    text = f"{problem.kind} {' '.join(problem.line)}"
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next((name for name, buckets in HELD_OUT.items() if bucket in buckets), "train")


def draw(rng: np.random.Generator, split: str, kind: str, d: int, n: int, limit: int) -> list[Problem]:
    """Up to n different problems of a split: fewer where the space of such problems is small."""
    found, misses = {}, 0
    while len(found) < n and misses < 2000:
        problem = random_problem(rng, kind, d, limit)
        new = problem.line not in found and split_of(problem) == split
        misses = 0 if new else misses + 1
        if new:
            found[problem.line] = problem
    return list(found.values())


# ---- Grammar: what a line is worth, and how many parts it has left

def is_number(token: str) -> bool:
    return token.lstrip("-").isdigit()


def value(kind: str, line: Line) -> str | None:
    """The answer of a line; None if it is none of the grammar, or divides by zero."""
    if kind == "brackets":
        if line in (("yes",), ("no",)):
            return line[0]
        if not line or any(x not in CLOSING and x not in CLOSING.values() for x in line):
            return None
        return "no" if reduced(line) else "yes"
    if kind == "rpn":
        stack = []
        for token in line:
            if is_number(token):
                stack.append(int(token))
            elif token in PRECEDENCE and len(stack) > 1:
                b, a = stack.pop(), stack.pop()
                stack.append(apply(token, a, b))
            else:
                return None
            if stack[-1] is None:
                return None
        return str(stack[0]) if len(stack) == 1 else None
    try:
        number, rest = infix_value(line, 1)
    except (IndexError, TypeError):
        return None
    return None if rest or number is None else str(number)


def infix_value(line: Line, least: int) -> tuple[int | None, Line]:
    """Value of the longest expression at the start whose operators bind at least so tightly, and the rest."""
    if line[0] == "(":
        number, line = infix_value(line[1:], 1)
        if line[0] != ")":
            raise IndexError
        line = line[1:]
    elif is_number(line[0]):
        number, line = int(line[0]), line[1:]
    else:
        raise IndexError
    while line and PRECEDENCE.get(line[0], 0) >= least:
        operator = line[0]
        right, line = infix_value(line[1:], PRECEDENCE[operator] + 1)
        number = apply(operator, number, right)
    return number, line


def reduced(line: Line) -> list[str]:
    """The brackets that are left when matched neighbours are taken out."""
    stack: list[str] = []
    for token in line:
        if stack and CLOSING.get(stack[-1]) == token:
            stack.pop()
        else:
            stack.append(token)
    return stack


def parts(kind: str, line: Line) -> int:
    """Steps that are left: operations; for brackets matched pairs, and one more to say no."""
    if kind != "brackets":
        return sum(token in PRECEDENCE for token in line)
    if line in (("yes",), ("no",)):
        return 0
    rest = reduced(line)
    return (len(line) - len(rest)) // 2 + bool(rest)


def is_answer(line: Line) -> bool:
    return len(line) == 1 and (is_number(line[0]) or line[0] in ("yes", "no"))


def next_part(kind: str, line: Line) -> tuple[int, int, str]:
    """The first part that can be worked out, line[i:j], and the token that replaces it; _ is nothing."""
    n = len(line)
    if kind == "rpn":
        i = next(i for i, token in enumerate(line) if token in PRECEDENCE)
        return i - 2, i + 1, str(apply(line[i], int(line[i - 2]), int(line[i - 1])))
    if kind == "brackets":
        for i in range(n - 1):
            if CLOSING.get(line[i]) == line[i + 1]:
                return i, i + 2, "yes" if n == 2 else "_"
        return 0, n, "no"
    for i in range(1, n - 1):
        if line[i] in PRECEDENCE and is_number(line[i - 1]) and is_number(line[i + 1]):
            before = line[i - 2] if i > 1 else ""
            after = line[i + 2] if i + 2 < n else ""
            if PRECEDENCE.get(before, 0) < PRECEDENCE[line[i]] >= PRECEDENCE.get(after, 0):
                number = str(apply(line[i], int(line[i - 1]), int(line[i + 1])))
                enclosed = before == "(" and after == ")"
                return i - 1 - enclosed, i + 2 + enclosed, number
    raise ValueError(f"no part of {line} can be worked out")


# ---- Rewriting: what the model writes, and what the harness makes of it

def write_step(kind: str, line: Line, marks: bool) -> Line:
    """What a teacher writes behind a line: its next part in < >, then the value; without marks the new line."""
    i, j, token = next_part(kind, line)
    if marks:
        return (*line[:i], "<", *line[i:j], ">", token, *line[j:])
    return tuple(x for x in (*line[:i], token, *line[j:]) if x != "_")


def read_step(written: Line, marks: bool) -> Line:
    """The next line: without < ... > and _. An empty line where the marks are wrong."""
    if marks:
        if written.count("<") != 1 or written.count(">") != 1 or written.index("<") > written.index(">"):
            return ()
        written = written[:written.index("<")] + written[written.index(">") + 1:]
    return tuple(x for x in written if x != "_")


@dataclass
class Trace:
    """A solution: what the model wrote at each step, and the lines that this gave (the problem's first)."""
    problem: Problem
    written: list[Line]
    lines: list[Line]

    @property
    def answered(self) -> bool:
        return is_answer(self.lines[-1])

    @property
    def right(self) -> bool:
        return self.lines[-1] == (self.problem.answer,)

    @property
    def strict(self) -> bool:
        """Every line has the problem's value, and has one part less than the one before."""
        kind = self.problem.kind
        left = [parts(kind, line) for line in self.lines]
        return (self.right and all(value(kind, line) == self.problem.answer for line in self.lines)
                and all(a - b == 1 for a, b in pairwise(left)))


def teach(problem: Problem, marks: bool) -> Trace:
    """A clean solution."""
    trace = Trace(problem, [], [problem.line])
    while not trace.answered:
        trace.written.append(write_step(problem.kind, trace.lines[-1], marks))
        trace.lines.append(read_step(trace.written[-1], marks))
    return trace


# ---- Model. B lines, T tokens, width D; a position is that of the token in the line that is rewritten

def vocabulary(limit: int) -> list[str]:
    """Token 0 pads; `=` stands before what is written, `;` ends it."""
    return ["", *KINDS, "=", ";", "<", ">", "_", *PRECEDENCE, *CLOSING, *CLOSING.values(), "yes", "no",
            *map(str, range(-limit, limit + 1))]


@dataclass(frozen=True)
class Config:
    """What is needed to rebuild a model. Raises UserError naming what cannot be."""
    width: int = 128
    layers: int = 3
    heads: int = 4
    positions: str = "coupled"
    rotary: float = 0.5
    marks: bool = True
    max_value: int = 20

    def __post_init__(self):
        for f in fields(self):
            if type(getattr(self, f.name)).__name__ != f.type:
                raise UserError(f"{f.name}: {getattr(self, f.name)!r:.40} is not of type {f.type}")
        if self.positions not in ("coupled", "plain", "none") or not 0 < self.rotary <= 1:
            raise UserError(f"positions {self.positions!r:.20}, rotary {self.rotary}: not known")
        if not (0 < self.layers <= 64 and 0 < self.heads and 1 <= self.max_value <= 999):
            raise UserError(f"{self}: a size is out of range")
        if self.width <= 0 or self.width % (2 * self.heads):
            raise UserError(f"width {self.width} is no multiple of 2 x {self.heads} heads")


class Block(nn.Module):
    """Attention with a rotary part of each head, and a feed-forward layer; normalized before each."""

    def __init__(self, c: Config):
        super().__init__()
        D = c.width
        self.heads = c.heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None,
                past: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, tuple]:
        """x (B, T, D), cosine and sine (B, 1, T, R / 2), keys and values before -> (B, T, D), and all of them."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D / H)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)        # T > 1 only at the start of a line
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), (k, v)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn the first pairs (x_i, x_{i + R/2}) of a head; its other dimensions have no position."""
    half = cosine.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], -1)


class Rewriter(nn.Module):
    """A causal transformer over `kind line = written ;`, its output tied with the embedding.

    Coupled positions restart at `=`, and <, > and the value behind it do not advance them: each token that is
    copied has the position of its source, so copying needs no counting. A prior, and named as one.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.vocabulary = vocabulary(c.max_value)
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}
        self.embedding = nn.Embedding(len(self.vocabulary), c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        half = int(c.width // c.heads * c.rotary) // 2
        # All turn fully within a line of the corpus: a slower one meets unseen angles in longer lines.
        self.register_buffer("frequency", 2.0 * 0.2 ** torch.linspace(0, 1, half), persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.08)  # with the usual 0.02 the loss stood still for 500 steps

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position of each token (B, T) in the line that it belongs to."""
        if self.config.positions == "plain":
            return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        marks = (tokens == self.ids["<"]) | (tokens == self.ids[">"])
        behind = F.pad((tokens == self.ids[">"])[:, :-1], (1, 0))
        place = (~(marks | behind)).long().cumsum(1)
        start = torch.where(tokens == self.ids["="], place, 1).cummax(1).values
        return place - start

    def forward(self, tokens: torch.Tensor, past: list | None = None) -> tuple[torch.Tensor, list]:
        """Tokens (B, T) -> logits (B, T', V) of the T' that `past` does not know, and keys and values of all."""
        known = 0 if past is None else past[0][0].shape[2]
        x, turn = self.embedding(tokens[:, known:]), None
        if self.config.positions != "none":
            angle = self.positions(tokens)[:, None, known:, None] * self.frequency
            turn = angle.cos(), angle.sin()
        kept = []
        for i, block in enumerate(self.blocks):
            x, keys = block(x, turn, past[i] if past else None)
            kept.append(keys)
        return self.norm(x) @ self.embedding.weight.T, kept

    def prompt(self, kind: str, line: Line) -> list[int]:
        return [self.ids[token] for token in (kind, *line, "=")]


# ---- Sampling

def write(model: Rewriter, prompts: list[list[int]], temperature: float,
          generator: torch.Generator) -> list[Line]:
    """What the model writes behind each prompt, up to the `;`; an empty line where it does not end in time."""
    out: list[Line] = [()] * len(prompts)
    end, device = model.ids[";"], model.embedding.weight.device
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for length, same in by_length.items():  # of equal length, so that nothing is padded
        for lo in range(0, len(same), 256):
            rows = np.array(same[lo:lo + 256])
            tokens, past = torch.tensor([prompts[i] for i in rows], device=device), None
            for _ in range(length + 4):
                logits, past = model(tokens, past)
                if temperature == 0:
                    new = logits[:, -1].argmax(-1, keepdim=True)
                else:
                    p = (logits[:, -1].float() / temperature).softmax(-1)
                    new = torch.multinomial(p.cpu(), 1, generator=generator).to(device)
                tokens = torch.cat([tokens, new], 1)
                ended = new[:, 0] == end
                if ended.any():
                    for i, row in zip(rows[ended.cpu().numpy()], tokens[ended, length:-1].tolist(), strict=True):
                        out[i] = tuple(model.vocabulary[t] for t in row)
                    rows, tokens = rows[~ended.cpu().numpy()], tokens[~ended]
                    past = [(k[~ended], v[~ended]) for k, v in past]
                if len(rows) == 0:
                    break
    return out


def solve(model: Rewriter, problems: Sequence[Problem], temperature: float = 0.0,
          seed: Sequence[int] = (0,)) -> list[Trace]:
    """Ask again with the new line until an answer is left, or a line that is not shorter, or too many steps."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    traces = [Trace(problem, [], [problem.line]) for problem in problems]
    open_ = list(range(len(traces)))
    with eval_mode(model):
        while open_:
            prompts = [model.prompt(traces[i].problem.kind, traces[i].lines[-1]) for i in open_]
            for i, written in zip(open_, write(model, prompts, temperature, generator), strict=True):
                traces[i].written.append(written)
                traces[i].lines.append(read_step(written, model.config.marks))
            open_ = [i for i in open_ if not is_answer(traces[i].lines[-1])
                     and 0 < len(traces[i].lines[-1]) < len(traces[i].lines[-2])
                     and all(token in model.ids for token in traces[i].lines[-1])]
    return traces


# ---- Training

Example = tuple[list[int], int]  # tokens of `kind line = written ;`, and how many of them are the prompt


def example(model: Rewriter, kind: str, line: Line, written: Line) -> Example:
    prompt = model.prompt(kind, line)
    return prompt + [model.ids[token] for token in (*written, ";")], len(prompt)


def batches_of(some: list[Example], size: int, rng: np.random.Generator) -> list[list[Example]]:
    """Batches of examples of about the same length, in random order."""
    order = np.argsort([len(tokens) for tokens, _ in some] + 3 * rng.random(len(some)))
    batches = [[some[i] for i in order[lo:lo + size]] for lo in range(0, len(order), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batch_loss(model: Rewriter, batch: list[Example]) -> torch.Tensor:
    """Mean cross-entropy in nats of the tokens behind the prompts."""
    T = max(len(tokens) for tokens, _ in batch)
    device = model.embedding.weight.device
    x = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, _ in batch], device=device)
    column = torch.arange(1, T, device=device)
    first = torch.tensor([start for _, start in batch], device=device)[:, None]
    asked = (column >= first) & (x[:, 1:] != 0)
    logits, _ = model(x[:, :-1])
    return F.cross_entropy(logits[asked], x[:, 1:][asked])


def update(model: Rewriter, optimizer: torch.optim.Optimizer, batches: list[list[Example]],
           lrs: Iterable[float]) -> float:
    """An optimizer step for each batch; returns the mean loss. Raises UserError when it is not finite."""
    total = 0.0
    for batch, lr in zip(batches, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = batch_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    if not math.isfinite(total):
        raise UserError("the loss is not finite; a lower --lr may help. last.pt holds the iteration before")
    return total / max(len(batches), 1)


def corpus(rng: np.random.Generator, n: int, model: Rewriter, kinds: Sequence[str]) -> list[Example]:
    """n steps of clean solutions of training problems of difficulty 1-3."""
    out: list[Example] = []
    while len(out) < n:
        problem = random_problem(rng, str(rng.choice(kinds)), int(rng.choice(EASY)), model.config.max_value)
        if split_of(problem) == "train":
            trace = teach(problem, model.config.marks)
            out += [example(model, problem.kind, *x) for x in zip(trace.lines, trace.written, strict=False)]
    return out[:n]


def bootstrap(model: Rewriter, optimizer: torch.optim.Optimizer, args: flags.Flags, r: run.Run) -> None:
    """Train on the corpus, or take the model that this very script made with the same flags before."""
    names = ("seed", "kinds", "bootstrap_steps", "bootstrap_lr", "batch_size", "threads", "device")
    made_by = {**asdict(model.config), **{name: getattr(args, name) for name in names}}
    made_by["source"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # an edited model is another one
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(args.cache_dir) / f"bootstrap-{digest}.pt"
    if file.is_file():
        saved = checkpoint.read(file)
        with files.refuse_damaged(file):
            checkpoint.load_weights(model, saved["model"], file)
            optimizer.load_state_dict(saved["optimizer"])
        print(f"bootstrapped before: {file}", flush=True)
        return
    n = args.bootstrap_steps
    for lo in tqdm(range(0, n, 25), desc="bootstrap", unit="25 steps", leave=False, disable=None):
        rng = np.random.default_rng([args.seed, CORPUS, lo])
        some = corpus(rng, 25 * args.batch_size, model, args.kinds)
        batches = batches_of(some, args.batch_size, rng)[:n - lo]
        steps = range(lo, lo + len(batches))  # a line up, then level, and in the second half a line down
        lrs = [args.bootstrap_lr * min(1, (t + 1) / 100, max(0.05, 2 - 2 * t / n)) for t in steps]
        update(model, optimizer, batches, lrs)
        if r.stopped_by:
            raise KeyboardInterrupt  # there is nothing to save yet
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(file, {**state, "made_by": made_by})


@dataclass
class Solution:
    """A verified trace that is trained on. weight: larger for a problem that was seldom solved."""
    kind: str
    lines: list[Line]
    written: list[Line]
    weight: float
    iteration: int


def collect(model: Rewriter, frontier: dict[str, int], args: flags.Flags,
            step: int) -> tuple[list[Solution], dict]:
    """Sample solutions of new training problems, and keep those that pass: with figures of the iteration."""
    problems = []
    for i, kind in enumerate(args.kinds):
        levels = range(4, frontier[kind] + 1)
        share = args.problems // 2 // len(levels)
        for d in levels:
            n = share if d < frontier[kind] else args.problems - share * (len(levels) - 1)
            rng = np.random.default_rng([args.seed, FRESH, 0 if args.fixed else step, i, d])
            problems += draw(rng, "train", kind, d, n, args.max_value)
    several = [p for p in problems for _ in range(args.k)]
    traces = solve(model, several, args.temperature, (args.seed, SAMPLE, step))
    passes = {"strict": lambda t: t.strict, "outcome": lambda t: t.right}[args.verify]
    if args.control == "unverified":
        passes = lambda t: t.answered  # noqa: E731
    passed = [trace for trace in traces if passes(trace)]
    solved: dict[Problem, int] = {}
    for trace in passed:
        solved[trace.problem] = solved.get(trace.problem, 0) + 1
    kept = {(t.problem.kind, t.problem.line, *t.written): t for t in passed}
    figures = {"sampled": len(traces), "answered": sum(t.answered for t in traces),
               "right": sum(t.right for t in traces), "strict": sum(t.strict for t in traces), "kept": len(kept)}
    new = [Solution(t.problem.kind, t.lines, t.written, 1.1 - solved[t.problem] / args.k, step)
           for t in kept.values()]
    return new, figures


def lesson(model: Rewriter, pool: list[Solution], args: flags.Flags, step: int) -> list[list[Example]]:
    """The batches of an iteration: steps of own solutions, as many of each kind, and of the corpus."""
    rng, n = np.random.default_rng([args.seed, UPDATE, step]), args.updates * args.batch_size
    kinds = [kind for kind in args.kinds if any(s.kind == kind for s in pool)]
    n_own = int(n * (1 - args.replay)) if kinds and args.control != "corpus" else 0
    own: list[Example] = []
    for kind in kinds if n_own else ():
        some = [s for s in pool if s.kind == kind]
        weight = np.array([s.weight for s in some])
        wanted = len(own) + n_own // len(kinds)
        while len(own) < wanted:
            s = some[rng.choice(len(some), p=weight / weight.sum())]
            own += [example(model, kind, *x) for x in zip(s.lines, s.written, strict=False)]
    return batches_of(own + corpus(rng, n - len(own), model, args.kinds), args.batch_size, rng)[:args.updates]


def config_of(args: argparse.Namespace) -> Config:
    """The model that the flags ask for. Raises UserError."""
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)})


# ---- Evaluation

Cells = dict[tuple[str, int], list[int]]  # right and all, by kind and difficulty


def problem_sets(args: flags.Flags) -> dict[str, list[Problem]]:
    """train, val and test: problems of each kind and difficulty, the same for all seeds.

    test has all ten difficulties; the others, for the gate and for comparison, have those that are learned.
    """
    sizes = {"train": (args.n_test // 2, range(1, args.top + 1)), "val": (args.n_val, range(1, args.top + 1)),
             "test": (args.n_test, range(1, 11))}
    return {split: [p for i, kind in enumerate(KINDS) if kind in args.kinds for d in difficulties
                    for p in draw(np.random.default_rng([SPLIT, i, d]), split, kind, d, n, args.max_value)]
            for split, (n, difficulties) in sizes.items()}


def count(model: Rewriter, problems: Sequence[Problem]) -> Cells:
    """Greedy answers that are right, by kind and difficulty."""
    cells: Cells = {}
    for trace in solve(model, problems):
        cell = cells.setdefault((trace.problem.kind, trace.problem.difficulty), [0, 0])
        cell[0] += trace.right
        cell[1] += 1
    return cells


def passes(model: Rewriter, problems: Sequence[Problem], args: flags.Flags, step: int) -> dict[str, float]:
    """pass@1 and pass@k on test, difficulty 3-7: does training widen what can be reached, or sharpen it?"""
    some = [p for p in problems if p.difficulty in MIDDLE]
    traces = solve(model, [p for p in some for _ in range(PASS_K)], args.temperature, (args.seed, PASS, step))
    right = np.array([t.right for t in traces]).reshape(len(some), PASS_K).sum(1)
    return {f"pass@{k}": float(np.mean([pass_at_k(PASS_K, int(c), k) for c in right])) for k in (1, PASS_K)}


def total(cells: Cells, difficulties: Iterable[int], kind: str | None = None) -> tuple[int, int]:
    """Right and all of these difficulties, of one kind or all."""
    some = [cell for (k, d), cell in cells.items() if d in difficulties and kind in (None, k)]
    return sum(right for right, _ in some), sum(n for _, n in some)


def accuracy(cells: Cells, difficulties: Iterable[int], kind: str | None = None) -> float:
    right, n = total(cells, difficulties, kind)
    return right / n if n else math.nan


# ---- The run

def train(args: flags.Flags) -> dict:
    """Bootstrap, then improve; returns the summary. Raises UserError."""
    devices.refuse_ranks(SCRIPT)
    args, saved = run.restore(args, SCRIPT, model=dict, optimizer=dict, frontier=dict, pool=list, best=float)
    device = devices.get_device(args.device)
    args.device = str(device)
    torch.manual_seed(args.seed)
    model = Rewriter(config_of(args)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    sets, pool, best, first = problem_sets(args), [], 0.0, None
    frontier = {kind: 4 for kind in args.kinds}
    if saved:
        with files.refuse_damaged(args.resume):
            checkpoint.load_weights(model, saved["model"], args.resume)
            optimizer.load_state_dict(saved["optimizer"])
            pool = [Solution(**{**x, "lines": [*map(tuple, x["lines"])], "written": [*map(tuple, x["written"])]})
                    for x in saved["pool"]]
            frontier, best, first = saved["frontier"], saved["best"], saved["first"]
    elif args.init_from:
        checkpoint.load_weights(model, load_model(args.init_from)[1]["model"], args.init_from)

    with run.Run(args, SCRIPT, __file__, saved) as r:
        sizes = ", ".join(f"{len(problems)} {split}" for split, problems in sets.items())
        print(f"{devices.describe(device)}, {count_parameters(model)} parameters, values to {args.max_value}, "
              f"{sizes} problems, {r.folder}", flush=True)
        if not saved:
            for split, problems in sets.items():
                files.write_atomic(r.folder / f"{split}.jsonl", "".join(json.dumps(
                    {**asdict(p), "line": " ".join(p.line)}) + "\n" for p in problems).encode())
            if not args.init_from:
                bootstrap(model, optimizer, args, r)
        figures: dict = {}
        for step in range(r.start, args.steps + 1):
            due, last = r.due(step), r.last(step)
            if due:
                cells = {split: count(model, problems) for split, problems in sets.items()}
                first = first or {"cells": {f"{kind} {d}": cell for (kind, d), cell in cells["test"].items()},
                                  **passes(model, sets["test"], args, step)}
                log(r, step, cells, figures, frontier, args)
                val = accuracy(cells["val"], MIDDLE)
                if val >= best:
                    best = val
                    r.save("best.pt", model=model.state_dict(), config=asdict(model.config))
                elif val < best - FALL and not last:
                    print(f"validation fell from {best:.4f} to {val:.4f}: back to the best weights", flush=True)
                    file = r.folder / "best.pt"
                    checkpoint.load_weights(model, checkpoint.read(file)["model"], file)
                for kind in args.kinds:
                    passed = accuracy(cells["val"], [frontier[kind]], kind) >= args.gate
                    frontier[kind] = min(frontier[kind] + passed, args.top)
            if due or last:
                r.save("last.pt", model=model.state_dict(), config=asdict(model.config), ema=None, first=first,
                       optimizer=optimizer.state_dict(), frontier=frontier, pool=[vars(s) for s in pool], best=best)
            if last:
                break
            if args.control != "none":
                figures = improve(model, optimizer, pool, frontier, args, step, r.folder)
        r.leave_if_stopped()
        return finish(r, model, sets["test"], first, args)


def improve(model: Rewriter, optimizer: torch.optim.Optimizer, pool: list[Solution], frontier: dict[str, int],
            args: flags.Flags, step: int, folder: Path) -> dict:
    """One iteration: sample, verify, train. Changes model and pool; returns its figures."""
    figures = {}
    if args.control != "corpus":
        new, figures = collect(model, frontier, args, step)
        (folder / "solutions").mkdir(exist_ok=True)
        rows = [{"kind": s.kind, "lines": [" ".join(x) for x in s.lines], "weight": s.weight} for s in new]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_atomic(folder / "solutions" / f"iter_{step + 1}.jsonl", text.encode())
        pool[:] = [s for s in pool if s.iteration > step - REMEMBERED] + new
        if not new:
            print(f"iteration {step + 1}: no verified solution; the corpus and older ones serve", flush=True)
    batches = lesson(model, pool, args, step)
    lrs = [args.lr * (1 - 0.9 * i / len(batches)) for i in range(len(batches))]
    return {**figures, "loss": update(model, optimizer, batches, lrs)}


def log(r: run.Run, step: int, cells: dict[str, Cells], figures: dict, frontier: dict[str, int],
        args: flags.Flags) -> None:
    """A row of metrics.csv, and a log line."""
    row = {"step": step, "loss": figures.get("loss"), "train_accuracy": accuracy(cells["train"], MIDDLE),
           "val_accuracy": accuracy(cells["val"], MIDDLE), "test_accuracy": accuracy(cells["test"], MIDDLE),
           "easy_accuracy": accuracy(cells["test"], EASY), "ood_accuracy": accuracy(cells["test"], HARD)}
    r.show({**row, **{f"d_{kind}": d for kind, d in frontier.items()}})
    for kind in args.kinds:
        row[f"test_{kind}"] = accuracy(cells["test"], MIDDLE, kind)
        row[f"frontier_{kind}"] = frontier[kind]
    names = ("sampled", "answered", "right", "strict", "kept")
    r.record({**row, **{name: figures.get(name) for name in names}})


def finish(r: run.Run, model: Rewriter, problems: list[Problem], first: dict, args: flags.Flags) -> dict:
    """summary.json, the pictures, and the result on the test problems."""
    cells = count(model, problems)
    names = [(name.split(), cell) for name, cell in first["cells"].items()]
    before = total({(kind, int(d)): cell for (kind, d), cell in names}, MIDDLE)
    after, samples = total(cells, MIDDLE), passes(model, problems, args, r.step)
    summary = r.summary(
        n_params=count_parameters(model), control=args.control, verify=args.verify, n_test=after[1],
        test_accuracy_before=before[0] / before[1], test_accuracy=after[0] / after[1],
        test_interval=wilson(*after),
        easy_accuracy=accuracy(cells, EASY), ood_accuracy=accuracy(cells, HARD),
        pass_before={k: x for k, x in first.items() if k != "cells"}, pass_now=samples,
        test_cells_before=first["cells"], test_cells={f"{kind} {d}": cell for (kind, d), cell in cells.items()})
    draw_pictures(r.folder)
    for k, x in samples.items():
        print(f"{k} at temperature {args.temperature:g}: {100 * first[k]:.1f}% before, {100 * x:.1f}% now")
    print(f"difficulty 3-7: {format_rate(*before)} after the bootstrap, {format_rate(*after)} now; "
          f"values to {args.max_value}, {r.seconds():.0f} s ({r.cpu_seconds():.0f} CPU-s), {r.folder}")
    return summary


# ---- Pictures

def draw_pictures(folder: str | os.PathLike) -> list[Path]:
    """Draw accuracy.png of a run from its metrics.csv and summary.json."""
    folder = Path(folder)
    summary, rows = files.read_json(folder / "summary.json"), metrics.read(folder)
    if summary.get("script") != SCRIPT:
        raise UserError(f"{folder}: a run of {summary.get('script')!r:.40}, not of {SCRIPT}")
    fig, (left, right) = plots.new_figure(1, 2)
    names = {"train_accuracy": "train", "val_accuracy": "validation", "test_accuracy": "test, difficulty 3-7",
             "easy_accuracy": "test, 1-3", "ood_accuracy": "test, 8-10, never trained on"}
    for name, label in names.items():
        x, y = metrics.points(rows, "step", name)
        left.plot(x, [100 * v for v in y], marker=".", label=label)
        if name == "test_accuracy":
            band = [wilson(round(v * summary["n_test"]), summary["n_test"]) for v in y]
            left.fill_between(x, [100 * lo for lo, _ in band], [100 * hi for _, hi in band], alpha=0.2, color="C2")
    left.set(xlabel="iteration", ylabel="right answers, %", ylim=(-3, 103), title=f"control: {summary['control']}")
    left.legend(frameon=False, fontsize=8)
    for name, style, when in (("test_cells_before", ":", "bootstrap"), ("test_cells", "-", "end")):
        for i, kind in enumerate(KINDS):
            cells = [(int(x.split()[1]), right_of) for x, right_of in summary[name].items() if x.split()[0] == kind]
            if cells:
                x, y = zip(*((d, 100 * k / n) for d, (k, n) in cells), strict=True)
                right.plot(x, y, style, marker=".", color=f"C{i}", label=f"{kind}, {when}")
    right.set(xlabel="difficulty", ylabel="right answers on test, %", ylim=(-3, 103), xticks=range(1, 11))
    right.legend(frameon=False, fontsize=8)
    return [plots.save_figure(fig, folder / "accuracy.png")]


def compare(args: flags.Flags) -> dict:
    """A run for each control, from one bootstrap; compare.png. Returns their summaries."""
    name = args.name or f"compare-s{args.seed}"
    base, out = args.out_dir or f"logs/{Path(SCRIPT).stem}/{name}", {}
    for control in CONTROLS:
        one, folder = copy.copy(args), Path(f"{base}-{control}")
        one.control, one.compare, one.name, one.out_dir = control, False, None, str(folder)
        one.started = time.monotonic(), time.process_time()
        print(f"# control: {control}, {folder}", flush=True)
        if (folder / "summary.json").is_file():
            out[control] = files.read_json(folder / "summary.json")
            continue
        one.resume = str(folder) if (folder / "last.pt").is_file() else None
        out[control] = train(one)
    print(draw_comparison(base))
    return out


def draw_comparison(base: str) -> Path:
    """Test accuracy over the iterations of the four runs, with Wilson bands, in BASE-off/compare.png."""
    fig, ax = plots.new_figure()
    for i, control in enumerate(CONTROLS):
        n = files.read_json(f"{base}-{control}/summary.json")["n_test"]
        x, y = metrics.points(metrics.read(f"{base}-{control}"), "step", "test_accuracy")
        band = [wilson(round(v * n), n) for v in y]
        label = {"off": "verified solutions", "none": "no training"}.get(control, control)
        ax.plot(x, [100 * v for v in y], "-" if control == "off" else "--", marker=".", color=f"C{i}", label=label)
        ax.fill_between(x, [100 * lo for lo, _ in band], [100 * hi for _, hi in band], alpha=0.15, color=f"C{i}")
    ax.set(xlabel="iteration", ylabel="right answers on test, difficulty 3-7, %", ylim=(-3, 103))
    ax.legend(frameon=False)
    return plots.save_figure(fig, Path(f"{base}-off/compare.png"))


# ---- Use of a trained model

def load_model(path: str | os.PathLike) -> tuple[Rewriter, dict]:
    """The trained model at `path`, of a run folder its best.pt, and the checkpoint. Raises UserError."""
    path = checkpoint.file_of(path)
    saved = checkpoint.check(checkpoint.read(path), path, SCRIPT, model=dict, config=dict, step=int, args=dict)
    try:
        model = Rewriter(Config(**saved["config"]))
    except (TypeError, UserError) as e:
        raise UserError(f"{path}: its config: {e}") from None
    checkpoint.load_weights(model, saved["model"], path)
    return model.eval(), saved


def problem_of(text: str, kind: str, limit: int) -> Problem:
    """The problem in a line like `3 4 + 2 *`. Raises UserError."""
    line = tuple(text.split())
    answer = value(kind, line) if all(token in vocabulary(limit) for token in line) else None
    if answer is None or parts(kind, line) == 0:
        raise UserError(f"--solve {text[:60]!r}: expected a line of kind {kind} with spaces between its tokens, "
                        f"numbers within +-{limit}")
    return Problem(kind, line, answer, parts(kind, line))


def load(path: str | os.PathLike):
    """`solve = load(path)`: solve("3 4 + 2 *", "rpn") is the model's answer as text, None if there is none."""
    model, _ = load_model(path)

    def answer(text: str, kind: str = "arithmetic") -> str | None:
        trace = solve(model, [problem_of(text, kind, model.config.max_value)])[0]
        return trace.lines[-1][0] if trace.answered else None
    return answer


def show_solution(path: str, text: str, kind: str) -> dict:
    """Print the lines of a solution, and whether it is right."""
    model, _ = load_model(path)
    trace = solve(model, [problem_of(text, kind, model.config.max_value)])[0]
    for line, written in zip(trace.lines, trace.written, strict=False):
        print(f"{' '.join(line)}  =  {' '.join(written) or '(nothing that ends)'}")
    answer = trace.lines[-1][0] if trace.answered else None
    print(f"answer: {answer or 'none'}, {'right' if trace.right else f'wrong: it is {trace.problem.answer}'}"
          + (", but a line on the way is wrong" if trace.right and not trace.strict else ""))
    return {"answer": answer, "right": trace.right, "strict": trace.strict}


def evaluate_checkpoint(path: str | os.PathLike, args: argparse.Namespace) -> dict:
    """Greedy answers on the test problems of a checkpoint's run, as [right, of] counts. Raises UserError."""
    model, saved = load_model(path)
    model.to(devices.get_device(getattr(args, "device", "cpu")))
    with files.refuse_damaged(path):
        cells = count(model, problem_sets(argparse.Namespace(**saved["args"]))["test"])
    middle = total(cells, MIDDLE)
    return {"script": SCRIPT, "n_params": count_parameters(model), "step": saved["step"],
            "max_value": model.config.max_value, "test": [*middle],
            "test_accuracy": middle[0] / middle[1], "test_interval": [*wilson(*middle)],
            "easy": [*total(cells, EASY)], "ood": [*total(cells, HARD)],
            "cells": {f"{kind} {d}": cell for (kind, d), cell in cells.items()}}


def format_evaluation(out: dict) -> str:
    """The figures of evaluate_checkpoint as text."""
    lines = [f"  {out['n_params']} parameters, iteration {out['step']}, values to {out['max_value']}"]
    for name, key in (("1-3", "easy"), ("3-7", "test"), ("8-10", "ood")):
        lines.append(f"  difficulty {name}: {format_rate(*out[key])}")
    for kind in KINDS:
        cells = [(d, out["cells"][f"{kind} {d}"]) for d in range(1, 11) if f"{kind} {d}" in out["cells"]]
        if cells:
            lines.append(f"  {kind:<10} " + "  ".join(f"{d}: {100 * right / n:.0f}%" for d, (right, n) in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    with files.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        if args.plot:
            flags.only(args, "plot")
            with files.refuse_damaged(args.plot):
                print(*draw_pictures(args.plot), sep="\n")
            return None
        if args.solve is not None:
            flags.only(args, "solve", "kind", "checkpoint")
            if args.checkpoint is None:
                raise UserError("--solve: by which model? give its --checkpoint")
            return show_solution(args.checkpoint, args.solve, args.kind)
        if args.checkpoint:
            flags.only(args, "checkpoint", "device")
            out = evaluate_checkpoint(args.checkpoint, args)
            print(format_evaluation(out))
            return out
        return compare(args) if args.compare else train(args)


if __name__ == "__main__":
    main()
