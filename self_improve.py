"""Can a model teach itself harder problems, from nothing but its own solutions that pass a check?

    python self_improve.py                                   # 0.5 M parameters, 6 to 11 min on two cores
    python self_improve.py --compare                         # the loop beside its controls, in one picture
    python self_improve.py --difficulty 4-10 --steps 60      # as far as it goes
    python self_improve.py --solve "3 4 + 2 *" --kind rpn --checkpoint logs/kept/self_improve/compare-s10-off
    python self_improve.py --model Qwen/Qwen2.5-Coder-1.5B-Instruct     # LoRA on a code model: wants a GPU

Each iteration the model solves new problems, its solutions are checked, and it is trained on those that pass;
a kind of problem goes on to the next difficulty when it passes a gate on validation problems. The tiny model
rewrites a line: it marks the next part that can be worked out and writes its value, and is asked again with
the shorter line until an answer is left; it is bootstrapped on clean solutions of difficulty 1-3. A model of
Hugging Face writes a Python function, which runs in common/sandbox.py. A run writes logs/self_improve/NAME/:
the usual files (step is the iteration), checkpoints/, solutions/, examples.txt and pictures. Descends from
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
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm as progress

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate, grokking, pass_at_k, wilson
from common.files import UserError
from common.flags import integer, path, real
from common.sandbox import Result, Sandbox, same

SCRIPT = Path(__file__).name
OPERATORS = ("+", "-", "*", "//")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "//": 2, "%": 2}
CLOSING = {"(": ")", "[": "]", "{": "}"}
HELD_OUT = {"test": range(0, 10), "val": range(10, 15)}           # of 100 buckets of a problem's hash
CORPUS, FRESH, SAMPLE, UPDATE, SPLIT, PASS = 1, 2, 3, 4, 5, 6     # streams of randomness
EASY, MIDDLE, HARD = range(1, 4), range(3, 8), range(8, 11)       # of the corpus, test_accuracy, ood_accuracy
VERDICTS = ("strict", "lucky", "wrong", "failed", "truncated")
KEPT = {"off": ("strict",), "none": (), "outcome": ("strict", "lucky"), "unverified": ("strict", "lucky", "wrong"),
        "corpus": ()}                                             # verdicts that are trained on, by --control
LABELS = {"off": "verified solutions", "none": "no training", "outcome": "right answers",
          "unverified": "all answers", "corpus": "more of the corpus"}
REMEMBERED = 4                                                    # iterations whose solutions are trained on
IDLE = 3                                                          # iterations without a solution, then it ends
PASS_K = 8                                                        # samples of a test problem for pass@k
FALL = 0.05                                                       # of validation: back to the best weights
POSITIONS = ("coupled", "plain", "rope", "none")
TINY_FLAGS = ("max_value", "width", "layers", "positions", "marks", "bootstrap_steps", "replay", "cache_dir")
LORA_FLAGS = ("revision", "lora_rank", "lora_targets")
LOOP_FLAGS = ("steps", "problems", "k", "fixed", "temperature", "control", "compare", "gate", "updates", "replay",
              "difficulty", "n_test", "eval_every", "cache_dir")  # all others may matter to the bootstrap
CODE_DEFAULTS = {"difficulty": [3, 7], "n_test": 4, "problems": 20, "k": 4, "updates": 60, "batch_size": 8,
                 "lr": 2e-4, "replay": 0.0}                       # of another --model, where no flag is given

Line = tuple[str, ...]


# ---- Flags

def kind_list(text: str) -> list[str]:
    """An argparse type: kinds of problems, like rpn,brackets."""
    kinds = text.split(",")
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected some of {','.join(KINDS)}")
    return kinds


def difficulties(text: str) -> list[int]:
    """An argparse type: 4-7, from and to."""
    found = re.fullmatch("([0-9]{1,2})[-,]([0-9]{1,2})", text)  # with a comma, as checkpoints are read
    lo, hi = map(int, found.groups()) if found else (0, 0)
    if not 1 <= lo <= hi <= 10:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected two of 1 to 10, the lower first, like 4-7")
    return [lo, hi]


def parse_args(argv: list[str] | None = None) -> flags.Flags:
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("data")
    g.add_argument("--kinds", type=kind_list, default=[*KINDS], metavar="A,B",
                   help="of problems (default: all)")
    g.add_argument("--difficulty", type=difficulties, default=[4, 7], metavar="A-B",
                   help="from A to the last that is learned (default: 4-7)")
    g.add_argument("--max-value", type=integer(9, 999), default=20,
                   help="all values are at most this, one token each")
    g.add_argument("--n-test", type=integer(2), default=40, help="test problems of each kind and difficulty 1-10, and "
                   "as many for validation, half as many for training accuracy, of 3 to B")

    g = p.add_argument_group("model")
    g.add_argument("--model", type=path, default="tiny", metavar="ID|DIR", help="tiny, or a causal language model of "
                   "Hugging Face, with defaults of its own: "
                   + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in CODE_DEFAULTS.items() if k != "difficulty")
                   + " --difficulty 3-7")
    g.add_argument("--revision", type=path, default="main", help="of the --model on the hub")
    g.add_argument("--lora-rank", type=integer(1, 4096), default=16, help="of the adapter; alpha is twice that")
    g.add_argument("--lora-targets", type=path, default="all-linear", metavar="A,B", help="modules that get one")
    g.add_argument("--width", type=integer(8, 4096), default=128, help="tiny: of the residual stream")
    g.add_argument("--layers", type=integer(1, 64), default=3, help="tiny: blocks, of four heads")
    g.add_argument("--positions", choices=POSITIONS, default="coupled", help="tiny: coupled: a copied token has "
                   "the position of its source; plain: positions count on; rope: plain, all of each head turns, and "
                   "as slowly as usual; none")
    g.add_argument("--no-marks", dest="marks", action="store_false",
                   help="tiny: it writes the new line, marking nothing "
                   "(default: with marks)")
    g.add_argument("--bootstrap-steps", type=integer(1), default=1000, help="tiny: optimizer steps on the corpus: "
                   "clean solutions of difficulty 1-3")
    g.add_argument("--cache-dir", type=path, default="~/.cache/stalled-experiments",
                   help="where bootstrapped models are kept, by a hash of script and flags")

    g = p.add_argument_group("loop")
    g.add_argument("--steps", "--iterations", type=integer(1), default=12, help="iterations")
    g.add_argument("--problems", type=integer(2), default=200, help="new ones an iteration and kind: at least "
                   "half of the difficulty that is learned now, the others of those before it, as many of each")
    g.add_argument("--k", type=integer(1, 1000), default=2, help="solutions sampled of each")
    g.add_argument("--fixed", action="store_true", help="the same problems of a difficulty each time")
    g.add_argument("--temperature", type=real(0, 10), default=1.0, help="of sampling")
    g.add_argument("--control", choices=[*KEPT], default="off", help="off: train on strict solutions; none: no "
                   "training; outcome: on all that end right; unverified: on all that end in an answer; corpus: on "
                   "more of the corpus")
    g.add_argument("--compare", action="store_true", help="run the loop and its controls from one bootstrap, into "
                   "OUT-DIR-off and so on, and draw them in one picture; what is there already is gone on with")
    g.add_argument("--gate", type=real(0, 1), default=0.75,
                   help="validation accuracy from which the next difficulty is learned")
    g.add_argument("--updates", type=integer(1), default=120, help="optimizer steps an iteration")
    g.add_argument("--batch-size", type=integer(1, 1 << 16), default=96, help="examples: a line, what is written behind")
    g.add_argument("--lr", type=real(0, 1, above=True), default=1e-3, help="learning rate, falling to a tenth in "
                   "each iteration; the bootstrap has twice as much")
    g.add_argument("--replay", type=real(0, 1), default=0.4, help="tiny: share of the corpus in the examples of "
                   "an iteration")

    g = p.add_argument_group("evaluation, or instead of training")
    g.add_argument("--eval-every", type=integer(1), default=1, help="iterations from evaluation to evaluation")
    g.add_argument("--checkpoint", type=path, metavar="PATH", help="evaluate this model, or a run's best one")
    g.add_argument("--solve", metavar="LINE",
                   help="let --checkpoint work out one line, with spaces between its tokens")
    g.add_argument("--kind", choices=[*KINDS], default="arithmetic", help="of the line to --solve")
    g.add_argument("--export", type=path, metavar="DIR", help="write --checkpoint, a model of Hugging Face, with its "
                   "adapter merged")
    g.add_argument("--plot", type=path, nargs="+", metavar="RUN", help="draw the picture of this run again, or of the "
                   "--out-dir of one or more comparisons")
    flags.add_run_arguments(p)
    p.set_defaults(threads=2)
    args = flags.parse(p, argv)
    if args.model != "tiny":
        flags.use(args, CODE_DEFAULTS)
    try:
        config_of(args)
        if args.temperature == 0 and args.k > 1:
            raise UserError("--temperature: at 0 all --k samples are the same")
        for name in TINY_FLAGS if args.model != "tiny" else LORA_FLAGS:
            if name in args.given and not args.resume:
                only = "the tiny model" if name in TINY_FLAGS else "a --model of Hugging Face"
                raise UserError(f"--{name.replace('_', '-')}: only {only} has it")
        if args.model != "tiny" and args.control == "corpus":
            raise UserError("--control corpus: only the tiny model has a corpus")
        if args.compare and (args.resume or "control" in args.given):
            raise UserError("--compare runs all controls and goes on by itself: not with --resume, --control")
    except UserError as e:
        p.error(str(e))
    return args


# ---- Problems

@dataclass(frozen=True)
class Problem:
    """A line to be worked out. difficulty: operations, or pairs of brackets; for programs as in LEVELS."""
    kind: str
    line: Line
    answer: str       # a number; yes or no for brackets
    difficulty: int

    @property
    def argument(self) -> str:
        """What a program is called with."""
        return KINDS[self.kind].between.join(self.line)

    @property
    def result(self) -> int | bool:
        """What a program must return."""
        return self.answer == "yes" if self.answer in ("yes", "no") else int(self.answer)


def apply(operator: str, a: int, b: int) -> int | None:
    """Python's integer arithmetic, which rounds down; None for a division by zero."""
    if operator in ("//", "%"):
        return None if b == 0 else a // b if operator == "//" else a % b
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def random_tree(rng: np.random.Generator, d: int, largest: int, limit: int,
                operators: Sequence[str] = OPERATORS) -> tuple:
    """(value,) or (value, operator, a, b): d operations on 1 to `largest`, all values within `limit`."""
    if d == 0:
        return (int(rng.integers(1, largest + 1)),)
    while True:
        left = int(rng.integers(d))
        a, b = (random_tree(rng, n, largest, limit, operators) for n in (left, d - 1 - left))
        for i in rng.permutation(len(operators)):
            value = apply(operators[i], a[0], b[0])
            if value is not None and abs(value) <= limit:
                return (value, operators[i], a, b)


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


def random_brackets(rng: np.random.Generator, d: int, types: int = 3) -> list[str]:
    """A balanced line of d pairs."""
    if d == 0:
        return []
    inside, opening = int(rng.integers(d)), [*CLOSING][int(rng.integers(types))]
    return [opening, *random_brackets(rng, inside, types), CLOSING[opening],
            *random_brackets(rng, d - 1 - inside, types)]


def balanced_or_not(rng: np.random.Generator, line: list[str]) -> Line:
    """Half of the lines are spoilt and look like the others: one bracket is changed, or two change places."""
    spoilt = int(rng.integers(4))
    if spoilt == 0:
        i, others = int(rng.integers(len(line))), [*CLOSING, *CLOSING.values()]
        others.remove(line[i])
        line[i] = others[int(rng.integers(len(others)))]
    while spoilt == 1 and not reduced(tuple(line)):  # counting brackets does not tell these
        i, j = rng.integers(len(line), size=2)
        line[i], line[j] = line[j], line[i]
    return tuple(line)


# For programs, as axiom-rl has them, at difficulty 1-2, 3-4 and so on: operands from and to, operators, the
# largest operand; pairs of brackets from and to, types of them.
LEVELS = [(2, 2, ("+", "-"), 10, 2, 4, 1), (3, 4, ("+", "-", "*"), 50, 4, 7, 2),
          (4, 5, (*PRECEDENCE,), 100, 7, 11, 3), (5, 7, (*PRECEDENCE,), 100, 10, 17, 3),
          (7, 10, (*PRECEDENCE,), 200, 15, 25, 3)]


def draw_brackets(rng: np.random.Generator, d: int, limit: int | None) -> Line:
    lo, hi, types = (d, d, 3) if limit else LEVELS[(d - 1) // 2][4:]
    return balanced_or_not(rng, random_brackets(rng, int(rng.integers(lo, hi + 1)), types))


def draw_expression(written: Callable[[tuple], list[str]], rng: np.random.Generator, d: int,
                    limit: int | None) -> Line:
    """All values are within the limit; for programs within 10^9."""
    lo, hi, operators, largest = (d + 1, d + 1, OPERATORS, min(limit, 9)) if limit else LEVELS[(d - 1) // 2][:4]
    return tuple(written(random_tree(rng, int(rng.integers(lo, hi + 1)) - 1, largest, limit or 10**9, operators)))


def split_of(problem: Problem) -> str:
    """train, val or test: by a hash of the text, so that no problem is in two of them."""
    text = f"{problem.kind} {' '.join(problem.line)}"
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next((name for name, buckets in HELD_OUT.items() if bucket in buckets), "train")


def draw(rng: np.random.Generator, split: str, make: Callable[[np.random.Generator], Problem],
         n: int) -> list[Problem]:
    """Up to n different problems of a split: fewer where the space of such problems is small."""
    found, misses = {}, 0
    while len(found) < n and misses < 2000:
        problem = make(rng)
        new = problem.line not in found and split_of(problem) == split
        misses = 0 if new else misses + 1
        if new:
            found[problem.line] = problem
    return list(found.values())


# ---- Grammar: what a line is worth, and how many parts it has left

def is_number(token: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", token) is not None


def is_answer(line: Line) -> bool:
    return len(line) == 1 and (is_number(line[0]) or line[0] in ("yes", "no"))


def operations(line: Line) -> int:
    return sum(token in PRECEDENCE for token in line)


def arithmetic_value(line: Line) -> str | None:
    """By Python, which has this grammar; but numbers and operators must alternate: no sign, call or tuple."""
    ends = [False, *(is_number(token) or token == ")" for token in line)]
    starts = [is_number(token) or token == "(" for token in line]
    known = all(is_number(token) or token in (*PRECEDENCE, "(", ")") for token in line)
    if not (line and known and all(a != b for a, b in zip(ends, starts, strict=False))):
        return None
    try:
        return str(eval(" ".join(line)))
    except (MemoryError, RecursionError, SyntaxError, ZeroDivisionError):  # two of them: nested too deeply
        return None


def arithmetic_part(line: Line) -> tuple[int, int, str]:
    """Of an operation that binds more tightly than the one before it, and no less than the one behind."""
    for i in range(1, len(line) - 1):
        if line[i] in PRECEDENCE and is_number(line[i - 1]) and is_number(line[i + 1]):
            before = line[i - 2] if i > 1 else ""
            after = line[i + 2] if i + 2 < len(line) else ""
            if PRECEDENCE.get(before, 0) < PRECEDENCE[line[i]] >= PRECEDENCE.get(after, 0):
                number = str(apply(line[i], int(line[i - 1]), int(line[i + 1])))
                enclosed = before == "(" and after == ")"
                return i - 1 - enclosed, i + 2 + enclosed, number
    raise ValueError(f"no part of {line} can be worked out")


def rpn_value(line: Line) -> str | None:
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


def rpn_part(line: Line) -> tuple[int, int, str]:
    i = next(i for i, token in enumerate(line) if token in PRECEDENCE)
    return i - 2, i + 1, str(apply(line[i], int(line[i - 2]), int(line[i - 1])))


def reduced(line: Line) -> list[str]:
    """The brackets that are left when matched neighbours are taken out."""
    stack: list[str] = []
    for token in line:
        if stack and CLOSING.get(stack[-1]) == token:
            stack.pop()
        else:
            stack.append(token)
    return stack


def brackets_value(line: Line) -> str | None:
    if line in (("yes",), ("no",)):
        return line[0]
    if not line or any(x not in CLOSING and x not in CLOSING.values() for x in line):
        return None
    return "no" if reduced(line) else "yes"


def pairs(line: Line) -> int:
    """Matched pairs, and one step more to say no."""
    if line in (("yes",), ("no",)):
        return 0
    rest = reduced(line)
    return (len(line) - len(rest)) // 2 + bool(rest)


def brackets_part(line: Line) -> tuple[int, int, str]:
    for i in range(len(line) - 1):
        if CLOSING.get(line[i]) == line[i + 1]:
            return i, i + 2, "yes" if len(line) == 2 else "_"
    return 0, len(line), "no"


@dataclass(frozen=True)
class Kind:
    """A kind of problems: a generator and a checker.

    draw: generator, difficulty d, limit -> a line of d parts with values within the limit; with None for a limit
    one for programs, as in LEVELS. next_part: i, j, token: line[i:j] can be worked out, and token replaces it.
    """
    draw: Callable[[np.random.Generator, int, int | None], Line]
    value: Callable[[Line], str | None]                # the answer; None of a line that is not in the grammar
    parts: Callable[[Line], int]                       # steps that are left
    next_part: Callable[[Line], tuple[int, int, str]]  # _ is nothing
    task: str                                          # what a program does
    between: str = " "                                 # tokens, in a program's argument


PYTHONS = "; // and % are those of Python, and tokens are separated by spaces"
KINDS = {
    "arithmetic": Kind(partial(draw_expression, as_infix), arithmetic_value, operations, arithmetic_part,
                       "returns the value of an expression of integers with + - * // % and brackets" + PYTHONS),
    "rpn": Kind(partial(draw_expression, as_rpn), rpn_value, operations, rpn_part,
                "returns the value of an expression of integers in reverse Polish notation with + - * // %" + PYTHONS),
    "brackets": Kind(draw_brackets, brackets_value, pairs, brackets_part,
                     "returns True if every bracket of a string of ()[]{} is closed by its own kind, in the right "
                     "order, and False if not", between=""),
}


def as_problem(kind: str, line: Line, d: int) -> Problem:
    return Problem(kind, line, KINDS[kind].value(line), d)


# ---- Rewriting: what the model writes, and what the harness makes of it

def write_step(kind: str, line: Line, marks: bool) -> Line:
    """What a teacher writes behind a line: its next part in < >, and the value; without marks the new line."""
    i, j, token = KINDS[kind].next_part(line)
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
    """A solution: what the model wrote at each step, () where it did not end, and the lines that this gave.

    The first line is the problem's; one that cannot be read from what was written is ().
    """
    problem: Problem
    written: list[Line]
    lines: list[Line]
    solves = ("strict", "lucky")  # what accuracy counts: the answer

    @property
    def verdict(self) -> str:
        """strict: every line has the problem's value, and one part less each time. lucky: the answer alone."""
        if not is_answer(self.lines[-1]):
            return "truncated" if self.written and not self.written[-1] else "failed"
        if self.lines[-1] != (self.problem.answer,):
            return "wrong"
        kind = KINDS[self.problem.kind]
        left = [kind.parts(line) for line in self.lines]
        kept = all(kind.value(line) == self.problem.answer for line in self.lines)
        return "strict" if kept and all(a - b == 1 for a, b in pairwise(left)) else "lucky"

    @property
    def steps(self) -> list[tuple[Line, Line]]:
        """Pairs of a line and what was written behind it: what is trained on."""
        return [*zip(self.lines, self.written, strict=False)]

    @property
    def answer(self) -> str | None:
        return self.lines[-1][0] if is_answer(self.lines[-1]) else None

    def __str__(self) -> str:
        steps = [f"{' '.join(a)}  =  {' '.join(b) or '(nothing that ends)'}" for a, b in self.steps]
        return "\n".join([*steps, f"answer: {self.answer or 'none'}"])


def teach(problem: Problem, marks: bool) -> Trace:
    """A clean solution."""
    trace = Trace(problem, [], [problem.line])
    while trace.answer is None:
        trace.written.append(write_step(problem.kind, trace.lines[-1], marks))
        trace.lines.append(read_step(trace.written[-1], marks))
    return trace


# ---- The tiny model. B lines, T tokens, width D; a position is that in the line that is rewritten

HEADS = 4
Example = tuple[list[int], int]  # tokens of a prompt and what is written behind, and how many are the prompt


def vocabulary(limit: int) -> list[str]:
    """Token 0 pads; `=` stands before what is written, `;` ends it."""
    return ["", *KINDS, "=", ";", "<", ">", "_", *OPERATORS, *CLOSING, *CLOSING.values(), "yes", "no",
            *map(str, range(-limit, limit + 1))]


@dataclass(frozen=True)
class Config:
    """What is needed to rebuild a model. Raises UserError naming what cannot be."""
    width: int = 128
    layers: int = 3
    positions: str = "coupled"
    marks: bool = True
    max_value: int = 20

    def __post_init__(self):
        for f in fields(self):
            if type(getattr(self, f.name)).__name__ != f.type:
                raise UserError(f"{f.name}: {getattr(self, f.name)!r:.40} is not of type {f.type}")
        if self.positions not in POSITIONS:
            raise UserError(f"positions {self.positions!r:.20}: not one of {', '.join(POSITIONS)}")
        if not (0 < self.layers <= 64 and 1 <= self.max_value <= 999):
            raise UserError(f"{self}: a size is out of range")
        if not 0 < self.width <= 4096 or self.width % (2 * HEADS):
            raise UserError(f"width {self.width} is no multiple of 2 x {HEADS} heads")


class Block(nn.Module):
    """Attention with a rotary part of each head, and a feed-forward layer; normalized before each."""

    def __init__(self, c: Config):
        super().__init__()
        D = c.width
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """x (B, T, D), cosine and sine (B, 1, T, R / 2) or None -> (B, T, D)."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D / H)
        (q, k), v = qkv[:2] if turn is None else rotate(qkv[:2], *turn), qkv[2]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn the first pairs (x_i, x_{i + R/2}) of queries and keys; other dimensions have no position."""
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
        half = c.width // HEADS // 2
        if c.positions == "rope":
            frequency = 10_000.0 ** -(torch.arange(half) / half)
        else:  # Half of each head. All turn fully within a line of the corpus: slow ones meet new angles later.
            frequency = 2.0 * 0.2 ** torch.linspace(0, 1, half // 2)
        self.register_buffer("frequency", frequency, persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.08)  # with the usual 0.02 the loss stood still for 500 steps

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position of each token (B, T) in the line that it belongs to: rpn 3 4 + = < 3 4 + > 7 ; has

        0 1 2 3 0 0 1 2 3 3 3 4, so that each copied token, and the end, finds its source, or what follows it.
        """
        if self.config.positions != "coupled":
            return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        marks = (tokens == self.ids["<"]) | (tokens == self.ids[">"])
        behind = F.pad((tokens == self.ids[">"])[:, :-1], (1, 0))
        place = (~(marks | behind)).long().cumsum(1)
        start = torch.where(tokens == self.ids["="], place, 1).cummax(1).values
        return place - start

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V) of the tokens behind."""
        x, turn = self.embedding(tokens), None
        if self.config.positions != "none":
            angle = self.positions(tokens)[:, None, :, None] * self.frequency
            turn = angle.cos(), angle.sin()
        for block in self.blocks:
            x = block(x, turn)
        return self.norm(x) @ self.embedding.weight.T  # (B, T, V)

    # What the loop asks of a model; CodeModel has the same.

    def problem(self, rng: np.random.Generator, kind: str, d: int) -> Problem:
        return as_problem(kind, KINDS[kind].draw(rng, d, self.config.max_value), d)

    def example(self, kind: str, line: Line, written: Line) -> Example:
        prompt = [self.ids[token] for token in (kind, *line, "=")]
        return prompt + [self.ids[token] for token in (*written, ";")], len(prompt)

    def corpus(self, rng: np.random.Generator, n: int, kinds: Sequence[str]) -> list[Example]:
        """n steps of clean solutions of training problems of difficulty 1-3."""
        out: list[Example] = []
        while len(out) < n:
            problem = self.problem(rng, str(rng.choice(kinds)), int(rng.choice(EASY)))
            if split_of(problem) == "train":
                out += [self.example(problem.kind, *step) for step in teach(problem, self.config.marks).steps]
        return out[:n]

    def solve(self, problems: Sequence[Problem], temperature: float = 0.0,
              seed: Sequence[int] = (0,)) -> list[Trace]:
        """Ask again with the new line until an answer is left, or a line that is not shorter or not known."""
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        traces = [Trace(problem, [], [problem.line]) for problem in problems]
        open_ = traces
        with eval_mode(self), progress(total=len(traces), desc="solve", leave=False, disable=None) as bar:
            while open_:
                for trace, written in zip(open_, self.write(open_, temperature, generator), strict=True):
                    trace.written.append(written)
                    trace.lines.append(read_step(written, self.config.marks))
                open_ = [t for t in open_ if t.answer is None and 0 < len(t.lines[-1]) < len(t.lines[-2])
                         and all(token in self.ids for token in t.lines[-1])]
                bar.update(len(traces) - len(open_) - bar.n)
        return traces

    def guess(self, kind: str, line: Line) -> list[int]:
        """A first guess of what will be written: the teacher's step, or nothing where a line has none.

        It decides how soon an answer is there (five times sooner for a good model), never what it is.
        """
        try:
            written = write_step(kind, line, self.config.marks) if KINDS[kind].value(line) else ()
        except ValueError:  # ( 3 ) has a value, and no part
            written = ()
        return [self.ids.get(token, 0) for token in (*written, ";")]

    def write(self, traces: list[Trace], temperature: float, generator: torch.Generator) -> list[Line]:
        """What is written behind the last line of each, up to the `;`; () where that does not come.

        Jacobi decoding (Santilli et al. 2023, arXiv:2305.10427): the model reads a whole guess at once. What it
        would have written itself is certain up to one token behind the first difference, and is the next guess.
        A good first guess saves time and changes nothing: the noise of sampling (Gumbel) is drawn before, so
        each token is a function of those before it.
        """
        out: list[Line] = [()] * len(traces)
        end, device = self.ids[";"], self.embedding.weight.device
        asked = [(t.problem.kind, t.lines[-1]) for t in traces]
        prompts = [self.example(*x, ())[0][:-1] for x in asked]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for lo in range(0, len(order), 64):
            rows = torch.tensor(order[lo:lo + 64])
            P = max(len(prompts[i]) for i in rows)
            M = P + 4  # the line, <, >, a value and the end are two tokens more than the prompt
            x = torch.tensor([prompts[i] + [0] * (P + M - len(prompts[i])) for i in rows], device=device)
            starts = torch.tensor([[len(prompts[i])] for i in rows], device=device)
            place = starts + torch.arange(M, device=device)                                # (n, M)
            guess = torch.tensor([(self.guess(*asked[i]) + [0] * M)[:M] for i in rows], device=device)
            noise = torch.zeros(len(rows), M, len(self.vocabulary))
            if temperature > 0:
                noise = -temperature * noise.exponential_(generator=generator).log()
            noise = noise.to(device)
            while len(rows):
                x = x.scatter(1, place, guess)                                             # (n, P + M)
                logits = self(x).gather(1, (place - 1)[:, :, None].expand_as(noise))
                own = (logits + noise).argmax(-1)                                          # (n, M)
                certain = F.pad((own == guess)[:, :-1], (1, 0), value=True).cumprod(1)
                in_time = place - place[:, :1] < place[:, :1] + 4  # as for a prompt that is alone
                ended = certain * (own == end) * in_time
                done = ended.any(1) | (certain.bool() | ~in_time).all(1)
                lengths = ended[done].argmax(1).tolist()
                for i, tokens, n in zip(rows[done.cpu()].tolist(), own[done].tolist(), lengths, strict=True):
                    out[i] = tuple(self.vocabulary[t] for t in tokens[:n]) if tokens[n] == end else ()
                rows, x, place, guess, noise = rows[~done.cpu()], *(t[~done] for t in (x, place, own, noise))
        return out

    def state(self) -> dict[str, torch.Tensor]:
        return self.state_dict()

    def load_state(self, state: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
        checkpoint.load_weights(self, state, path)


# ---- Models of Hugging Face, which answer with a program

CASES = 16     # lines that a program must work out; the first is that of its question
MAX_NEW = 300  # tokens of a reply


def question(problem: Problem) -> str:
    return (f"Write a Python function solve(s) that {KINDS[problem.kind].task}. For example, "
            f"solve({problem.argument!r}) is {problem.result!r}. Answer with the function in a code block.")


@cache
def cases_of(problem: Problem) -> tuple[Problem, ...]:
    """The problem and others like it, always the same; no constant is right on more than half of them."""
    text = hashlib.sha256(f"{problem.kind} {problem.difficulty} {problem.argument}".encode()).digest()
    rng, found = np.random.default_rng([*text]), {problem.line: problem}
    while len(found) < CASES:
        line = KINDS[problem.kind].draw(rng, problem.difficulty, None)
        other = as_problem(problem.kind, line, problem.difficulty)
        if sum(p.answer == other.answer for p in found.values()) < CASES // 2:
            found.setdefault(other.line, other)
    return tuple(found.values())


def code_in(reply: str) -> str:
    """The first fenced block that defines solve, also one that is not closed; or else all of the reply."""
    blocks = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    return next((block for block in blocks if "def solve" in block), reply)


@dataclass
class Program:
    """A reply of a model, whether it came to its end, and what its program gave for the problem's cases."""
    problem: Problem
    reply: str
    ended: bool
    result: Result
    solves = ("strict",)  # what accuracy counts: all cases

    @property
    def verdict(self) -> str:
        """strict: right on all cases. lucky: on that of the question, as `return 14` may be, but not on all."""
        if not self.ended:
            return "truncated"
        cases = cases_of(self.problem)
        right = [same(a, b.result) for a, b in zip(self.result.values, cases, strict=False)]
        if right and right[0]:
            return "strict" if len(right) == CASES and all(right) else "lucky"
        return "wrong" if self.result.status == "ok" else "failed"

    @property
    def answer(self) -> str | None:
        return ascii(self.result.values[0])[:80] if self.result.values else None

    @property
    def steps(self) -> list[tuple[Line, Line]]:
        return [(self.problem.line, (self.reply,))]

    def __str__(self) -> str:
        call = f"solve({self.problem.argument!r})"
        return f"{self.reply}\n{call}: {self.answer} ({self.result.status}) {self.result.error}".rstrip()


@dataclass(frozen=True)
class CodeConfig:
    """A model of Hugging Face and its adapter. fingerprint: of the base's weights; no other base is taken."""
    base: str
    revision: str = "main"
    lora_rank: int = 16
    lora_targets: str = "all-linear"
    fingerprint: str = ""


class CodeModel(nn.Module):
    """A causal language model with LoRA (Hu et al. 2021, arXiv:2106.09685).

    Its base is in bf16 on a GPU that computes in it, the adapter in fp32. No code of the model's own is run.
    Raises UserError when it cannot be loaded.
    """
    def __init__(self, c: CodeConfig, device: torch.device):
        super().__init__()
        import peft
        import transformers
        transformers.utils.logging.set_verbosity_error()
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        options = {"revision": c.revision, "trust_remote_code": False}
        try:
            with Sandbox():  # to know now that there can be one
                pass
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(c.base, **options)
            base, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                c.base, dtype=torch.bfloat16 if bf16 else torch.float32, output_loading_info=True, **options)
            if loaded["missing_keys"]:  # transformers would go on with random ones
                raise UserError(f"its weights are not whole: {min(loaded['missing_keys'])} is missing")
            # Where its files are missing, transformers makes an empty tokenizer.
            if self.tokenizer.decode(self.tokenizer("solve").input_ids, skip_special_tokens=True) != "solve":
                raise UserError("it has no tokenizer that can write")
            if self.tokenizer.eos_token_id is None:
                raise UserError("its tokenizer has no token that ends a text")
            found = fingerprint(base)
            if c.fingerprint not in ("", found):
                raise UserError("its weights are not those that the adapter was trained with")
            modules = {name.split(".")[-1] for name, _ in base.named_modules()} | {"all-linear"}
            if unknown := {*c.lora_targets.split(",")} - modules:
                raise UserError(f"it has no module {min(unknown)} for --lora-targets")
            self.generation = base.generation_config
            stops = self.generation.eos_token_id
            stops = stops if isinstance(stops, list) else [stops]
            self.stops = {self.tokenizer.eos_token_id, *stops} - {None}
            base.generation_config = transformers.GenerationConfig()  # without its penalties and cut-offs
            self.lm = peft.get_peft_model(base, peft.LoraConfig(
                task_type="CAUSAL_LM", r=c.lora_rank, lora_alpha=2 * c.lora_rank,
                target_modules=c.lora_targets if c.lora_targets == "all-linear" else c.lora_targets.split(",")))
            self.to(device)
            if not self(torch.tensor([self.prompt("rpn", ("1", "2", "+"))], device=device)).isfinite().all():
                raise UserError("its logits are not finite")
        except Exception as e:  # foreign files fail in a dozen ways: of torch, safetensors, jinja2, the hub
            raise UserError(f"--model {c.base}: cannot be used: {' '.join(str(e).split())[:200]}") from None
        self.config = replace(c, fingerprint=found)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V) of the tokens behind. Padding on the right is never looked at."""
        return self.lm(input_ids=tokens, use_cache=False).logits

    def problem(self, rng: np.random.Generator, kind: str, d: int) -> Problem:
        return as_problem(kind, KINDS[kind].draw(rng, d, None), d)

    def prompt(self, kind: str, line: Line) -> list[int]:
        """Tokens of the question, in the form of a chat where the model has one."""
        text = question(as_problem(kind, line, 1))
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text + "\n").input_ids
        chat = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True)
        return self.tokenizer(chat, add_special_tokens=False).input_ids

    def example(self, kind: str, line: Line, written: Line) -> Example:
        prompt = self.prompt(kind, line)
        reply = self.tokenizer(written[0], add_special_tokens=False).input_ids
        return [*prompt, *reply, self.tokenizer.eos_token_id], len(prompt)

    def corpus(self, rng: np.random.Generator, n: int, kinds: Sequence[str]) -> list[Example]:
        return []

    def solve(self, problems: Sequence[Problem], temperature: float = 0.0,
              seed: Sequence[int] = (0,)) -> list[Program]:
        """Ask for a program for each problem, and run it on its cases."""
        replies = self.write(problems, temperature, seed)
        jobs = [(code_in(reply), "solve", [(p.argument,) for p in cases_of(problem)])
                for problem, (reply, _) in zip(problems, replies, strict=True)]
        with Sandbox(workers=max(1, (os.cpu_count() or 1) // 2)) as box:
            results = [*progress(box.run_all(jobs), total=len(jobs), desc="run", leave=False, disable=None)]
        return [Program(problem, *reply, result)
                for problem, reply, result in zip(problems, replies, results, strict=True)]

    def write(self, problems: Sequence[Problem], temperature: float, seed: Sequence[int]) -> list[tuple[str, bool]]:
        """A reply to each question, and whether it came to its end."""
        from transformers import GenerationConfig
        out: list[tuple[str, bool]] = [("", False)] * len(problems)
        prompts = [self.prompt(p.kind, p.line) for p in problems]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        pad, device = self.tokenizer.eos_token_id, next(self.lm.parameters()).device
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        settings = GenerationConfig(max_new_tokens=MAX_NEW, pad_token_id=pad, eos_token_id=[*self.stops], **how)
        with eval_mode(self):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            for lo in progress(range(0, len(order), 32), desc="write", leave=False, disable=None):
                rows = order[lo:lo + 32]
                P = max(len(prompts[i]) for i in rows)
                x = torch.tensor([[pad] * (P - len(prompts[i])) + prompts[i] for i in rows], device=device)
                seen = torch.tensor([[0] * (P - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device)
                new = self.lm.generate(input_ids=x, attention_mask=seen, generation_config=settings)[:, P:]
                for i, tokens in zip(rows, new.tolist(), strict=True):
                    n = next((n for n, token in enumerate(tokens) if token in self.stops), None)
                    out[i] = self.tokenizer.decode(tokens[:n], skip_special_tokens=True), n is not None
        return out

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter alone."""
        from peft import get_peft_model_state_dict
        return get_peft_model_state_dict(self.lm, save_embedding_layers=False)

    def load_state(self, state: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
        from peft import set_peft_model_state_dict
        shapes = [{name: tuple(x.shape) for name, x in adapter.items()} for adapter in (self.state(), state)]
        if shapes[0] != shapes[1]:
            odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
            raise UserError(f"{path}: no adapter of {self.config.base}: {odd} is missing, or of another shape")
        if not all(torch.isfinite(x).all() for x in state.values()):
            raise UserError(f"{path}: its weights are not finite")
        set_peft_model_state_dict(self.lm, state)


def fingerprint(base: nn.Module) -> str:
    """Of names, shapes and a few weights of each tensor, the same in fp32 and bf16."""
    out = hashlib.sha256()
    for name, x in sorted(base.state_dict().items()):
        some = x.flatten()[::max(1, x.numel() // 64)].to(torch.bfloat16).view(torch.int16)
        out.update(f"{name} {tuple(x.shape)} {some.tolist()}".encode())
    return out.hexdigest()[:16]


Model, Attempt = Rewriter | CodeModel, Trace | Program


def make_model(config: dict, device: torch.device) -> Model:
    """The model of a Config or CodeConfig, given as a dict. Raises UserError, TypeError for unknown fields."""
    if "base" in config:
        return CodeModel(CodeConfig(**config), device)
    return Rewriter(Config(**config)).to(device)


# ---- Training

def batches_of(some: list[Example], size: int, rng: np.random.Generator) -> list[list[Example]]:
    """Batches of examples of about the same length, in random order."""
    order = np.argsort([len(tokens) for tokens, _ in some] + 3 * rng.random(len(some)))
    batches = [[some[i] for i in order[lo:lo + size]] for lo in range(0, len(order), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batch_loss(model: Model, batch: list[Example]) -> torch.Tensor:
    """Mean cross-entropy in nats of the tokens behind the prompts, the one that ends a text among them."""
    T, device = max(len(tokens) for tokens, _ in batch), next(model.parameters()).device
    x = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, _ in batch], device=device)      # (B, T)
    column = torch.arange(1, T, device=device)
    first, end = torch.tensor([(start, len(tokens)) for tokens, start in batch], device=device).T[:, :, None]
    asked = (column >= first) & (column < end)
    return F.cross_entropy(model(x[:, :-1])[asked].float(), x[:, 1:][asked])


def update(model: Model, optimizer: torch.optim.Optimizer, batches: list[list[Example]],
           lrs: Iterable[float]) -> float:
    """An optimizer step for each batch; returns the mean loss. Raises UserError when it is not finite."""
    total = 0.0
    for batch, lr in zip(progress(batches, desc="train", leave=False, disable=None), lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = batch_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    if not math.isfinite(total):
        raise UserError("the loss is not finite; a lower --lr may help. last.pt, if any, is of the iteration before")
    return total / len(batches)


def bootstrap(model: Rewriter, optimizer: torch.optim.Optimizer, args: flags.Flags, r: run.Run) -> None:
    """Train on the corpus, or take the model that this very script made with the same flags before."""
    free = {*flags.FREE_ON_RESUME, *LOOP_FLAGS} - {"device"}
    made_by = {name: value for name, value in vars(args).items() if name not in free}
    made_by["source"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # of an edited script: anew
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(args.cache_dir).expanduser() / f"bootstrap-{digest}.pt"
    if file.is_file():
        try:
            saved = checkpoint.read(file)
            with files.refuse_damaged(file):
                model.load_state(saved["model"], file)
                optimizer.load_state_dict(saved["optimizer"])
            print(f"bootstrapped before: {file}", flush=True)
            return
        except UserError as e:
            print(f"bootstrapping anew: {e}", flush=True)
    n = args.bootstrap_steps
    for lo in progress(range(0, n, 25), desc="bootstrap", unit="25 steps", leave=False, disable=None):
        rng = np.random.default_rng([args.seed, CORPUS, lo])
        batches = batches_of(model.corpus(rng, 25 * args.batch_size, args.kinds), args.batch_size, rng)[:n - lo]
        # A line up over 100 steps, then level, and in the second half a line down to a twentieth.
        shares = [min(1, (t + 1) / 100, max(0.05, 2 - 2 * t / n)) for t in range(lo, lo + len(batches))]
        update(model, optimizer, batches, [2 * args.lr * share for share in shares])
        if r.stopped_by:
            print("stopped in the bootstrap: there is nothing to go on from", flush=True)
            sys.exit(128 + r.stopped_by)
    own = file.with_name(f"{file.name}.{os.getpid()}")  # two runs may make the same model at once
    checkpoint.save(own, {"model": model.state(), "optimizer": optimizer.state_dict(), "made_by": made_by})
    os.replace(own, file)


def sample(model: Model, frontier: dict[str, int], args: flags.Flags, step: int) -> list[Attempt]:
    """--k solutions of each of the new training problems of an iteration."""
    problems = []
    for i, kind in enumerate(args.kinds):
        levels = range(args.difficulty[0], frontier[kind] + 1)
        share = args.problems // 2 // len(levels)
        for d in levels:
            n = share if d < frontier[kind] else args.problems - share * (len(levels) - 1)
            rng = np.random.default_rng([args.seed, FRESH, 0 if args.fixed else step, i, d])
            problems += draw(rng, "train", partial(model.problem, kind=kind, d=d), n)
    several = [p for p in problems for _ in range(args.k)]
    return model.solve(several, args.temperature, (args.seed, SAMPLE, step))


def keep(traces: Sequence[Attempt], args: flags.Flags, step: int) -> tuple[list[dict], dict]:
    """Those that pass, each once, for training; and figures of the iteration."""
    verdicts = [t.verdict for t in traces]
    passed = [t for t, verdict in zip(traces, verdicts, strict=True) if verdict in KEPT[args.control]]
    solved = Counter(t.problem for t in passed)
    distinct = {(t.problem, *(written for _, written in t.steps)): t for t in passed}.values()
    new = [{"kind": t.problem.kind, "steps": t.steps, "iteration": step,  # what is seldom solved weighs more
            "weight": 1.1 - solved[t.problem] / args.k} for t in distinct]
    right = Counter(t.problem for t in traces if t.verdict in t.solves)
    problems = dict.fromkeys(t.problem for t in traces)
    return new, {"sampled": len(traces), **{name: verdicts.count(name) for name in VERDICTS}, "kept": len(new),
                 "sampled_pass@1": right.total() / len(traces), "sampled_pass@k": len(right) / len(problems),
                 "share_truncated": verdicts.count("truncated") / len(traces),
                 "share_distinct": len(new) / len(passed) if passed else None}


def lesson(model: Model, pool: list[dict], args: flags.Flags, step: int) -> list[list[Example]]:
    """The batches of an iteration: steps of own solutions, as many of each kind, and of the corpus."""
    rng, n = np.random.default_rng([args.seed, UPDATE, step]), args.updates * args.batch_size
    kinds = [kind for kind in args.kinds if any(s["kind"] == kind for s in pool)]
    n_own = int(n * (1 - args.replay)) if kinds and args.control != "corpus" else 0
    own: list[Example] = []
    for kind in kinds if n_own else ():
        some = [s for s in pool if s["kind"] == kind]
        weight = np.array([s["weight"] for s in some])
        wanted = len(own) + n_own // len(kinds)
        while len(own) < wanted:
            s = some[rng.choice(len(some), p=weight / weight.sum())]
            own += [model.example(kind, *x) for x in s["steps"]]
    return batches_of(own + model.corpus(rng, n - len(own), args.kinds), args.batch_size, rng)[:args.updates]


def config_of(args: argparse.Namespace) -> Config | CodeConfig:
    """Of the model that the flags ask for. Raises UserError."""
    if args.model != "tiny":
        return CodeConfig(args.model, args.revision, args.lora_rank, args.lora_targets)
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)})


# ---- Evaluation

Cells = dict[str, list[int]]  # right and all of a kind and difficulty, like `rpn 4`


def problem_sets(args: argparse.Namespace, model: Model) -> dict[str, list[Problem]]:
    """train, val and test: problems of each kind and difficulty, the same for all seeds.

    test has all ten difficulties; the others, for the gate and for comparison, have 3 up to the last that is
    learned. Raises UserError where there are not so many, but for difficulty 1-3, of which there are few.
    """
    sizes = {"train": args.n_test // 2, "val": args.n_test, "test": args.n_test}
    sets: dict[str, list[Problem]] = {split: [] for split in sizes}
    for split, n in sizes.items():
        for kind in args.kinds:
            lo, hi = args.difficulty
            for d in range(1, 11) if split == "test" else range(min(3, lo), max(3, hi) + 1):
                rng = np.random.default_rng([SPLIT, [*KINDS].index(kind), d])
                some = draw(rng, split, partial(model.problem, kind=kind, d=d), n)
                if len(some) < n and d not in EASY:
                    raise UserError(f"--n-test {args.n_test}: {kind} of difficulty {d} has {len(some)} {split} problems")
                sets[split] += some
    return sets


def count(traces: Iterable[Attempt]) -> Cells:
    """Solutions that are right, by kind and difficulty."""
    cells: Cells = {}
    for trace in traces:
        cell = cells.setdefault(f"{trace.problem.kind} {trace.problem.difficulty}", [0, 0])
        cell[0] += trace.verdict in trace.solves
        cell[1] += 1
    return cells


def constant_baseline(problems: Sequence[Problem], kind: str) -> float:
    """Accuracy over difficulty 3-7 of the one answer that is right most often."""
    answers = Counter(p.answer for p in problems if p.kind == kind and p.difficulty in MIDDLE)
    return max(answers.values()) / answers.total()


def passes(model: Model, problems: Sequence[Problem], args: flags.Flags, step: int) -> dict[str, float]:
    """pass@1 and pass@k on every second test problem of 3-7: does training widen the reach, or sharpen it?"""
    some = [p for p in problems if p.difficulty in MIDDLE][::2]
    traces = model.solve([p for p in some for _ in range(PASS_K)], args.temperature, (args.seed, PASS, step))
    right = np.array([t.verdict in t.solves for t in traces]).reshape(len(some), PASS_K).sum(1)
    return {f"pass@{k}": float(np.mean([pass_at_k(PASS_K, int(c), k) for c in right])) for k in (1, PASS_K)}


def total(cells: Cells, difficulties: Iterable[int] = range(1, 11), kind: str | None = None) -> tuple[int, int]:
    """Right and all of these difficulties, of one kind or all."""
    names = [f"{k} {d}" for k in KINDS if kind in (None, k) for d in difficulties]
    some = [cells[name] for name in names if name in cells]
    return sum(right for right, _ in some), sum(n for _, n in some)


def accuracy(cells: Cells, difficulties: Iterable[int] = range(1, 11), kind: str | None = None) -> float:
    right, n = total(cells, difficulties, kind)
    return right / n if n else math.nan


# ---- The run

def train(args: flags.Flags) -> dict:
    """Bootstrap, then improve; returns the summary. Raises UserError."""
    devices.refuse_ranks(SCRIPT)
    args, saved = run.restore(args, SCRIPT, model=dict, config=dict, optimizer=dict, frontier=dict, pool=list,
                              val=float, best=float)
    device = devices.get_device(args.device)
    args.device = str(device)
    torch.manual_seed(args.seed)
    model = make_model(asdict(config_of(args)), device)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.98), weight_decay=0.01)
    sets, pool, val, best, first = problem_sets(args, model), [], 0.0, 0.0, None
    frontier = dict.fromkeys(args.kinds, args.difficulty[0])
    if saved:
        with files.refuse_damaged(args.resume):
            load_into(model, saved, args.resume)
            optimizer.load_state_dict(saved["optimizer"])
            names = ("frontier", "pool", "val", "best", "first")
            frontier, pool, val, best, first = (saved[name] for name in names)
    elif args.init_from:
        load_into(model, read_checkpoint(args.init_from), args.init_from)

    if isinstance(model, Rewriter):
        Path(args.cache_dir).expanduser().mkdir(parents=True, exist_ok=True)
    with run.Run(args, SCRIPT, __file__, saved) as r:
        describe(model, sets, device, args, r.folder)
        if not saved:
            for split, problems in sets.items():
                rows = [json.dumps({**asdict(p), "line": " ".join(p.line)}) + "\n" for p in problems]
                files.write_atomic(r.folder / f"{split}.jsonl", "".join(rows).encode())
            if isinstance(model, Rewriter) and not args.init_from:
                bootstrap(model, optimizer, args, r)
        (r.folder / "checkpoints").mkdir(exist_ok=True)
        figures, ended = {}, ""
        for step in range(r.start, args.steps + 1):
            if KEPT[args.control] and step - 1 - max((s["iteration"] for s in pool), default=-1) >= IDLE:
                ended = f"no solution passed in {IDLE} iterations"
            again = saved is not None and step == r.start
            due, last = r.due(step) or (ended != "" and not again), r.last(step) or ended != ""
            if due:
                cells = {split: count(model.solve(problems)) for split, problems in sets.items()}
                first = first or {"cells": cells["test"], **passes(model, sets["test"], args, step)}
                log(r, step, cells, figures, frontier, args)
                val = accuracy(cells["val"])
                weights = {"model": model.state(), "config": asdict(model.config)}
                r.save(f"checkpoints/iter_{step}.pt", **weights)
                if val >= best:
                    best = val
                    r.save("best.pt", **weights)
                for kind in args.kinds:
                    passed = accuracy(cells["val"], [frontier[kind]], kind) >= args.gate
                    frontier[kind] = min(frontier[kind] + passed, args.difficulty[-1])
            if due or last:
                r.save("last.pt", model=model.state(), config=asdict(model.config), ema=None, first=first,
                       optimizer=optimizer.state_dict(), frontier=frontier, pool=pool, val=val,
                       best=best)
            if last:
                break
            if val < best - FALL:
                print(f"validation fell from {best:.4f} to {val:.4f}: back to the best weights", flush=True)
                load_into(model, read_checkpoint(r.folder), r.folder)
                val = best  # the optimizer goes on with its averages
            if args.control != "none":
                figures = improve(model, optimizer, pool, frontier, args, step, r.folder)
        r.leave_if_stopped()
        return finish(r, model, sets, first, ended, args)


def describe(model: Model, sets: dict[str, list[Problem]], device: torch.device, args: flags.Flags,
             folder: Path) -> None:
    """The first lines of a run."""
    sizes = ", ".join(f"{len(problems)} {split}" for split, problems in sets.items())
    values = f"values to {args.max_value}" if args.model == "tiny" else args.model
    n_learn = count_parameters(model, trainable=True)
    print(f"{devices.describe(device)}, {count_parameters(model)} parameters, {n_learn} of them learn, {values}, "
          f"{sizes} problems, {folder}")
    cells = Counter((p.kind, p.difficulty) for p in sets["test"])
    if few := [f"{kind} {d}: {n}" for (kind, d), n in cells.items() if n < args.n_test]:
        print(f"all test problems that there are: {', '.join(few)}")
    print("right by one constant answer, difficulty 3-7: " + ", ".join(
        f"{kind} {100 * constant_baseline(sets['test'], kind):.0f}%" for kind in args.kinds), flush=True)


def improve(model: Model, optimizer: torch.optim.Optimizer, pool: list[dict],
            frontier: dict[str, int], args: flags.Flags, step: int, folder: Path) -> dict:
    """One iteration: sample, verify, train. Changes model and pool; returns its figures."""
    figures = {}
    if KEPT[args.control]:
        traces = sample(model, frontier, args, step)
        new, figures = keep(traces, args, step)
        (folder / "solutions").mkdir(exist_ok=True)
        rows = [{**s, "steps": [[" ".join(x) for x in pair] for pair in s["steps"]]} for s in new]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_atomic(folder / "solutions" / f"iter_{step + 1}.jsonl", text.encode())
        files.write_atomic(folder / "examples.txt", examples(traces).encode("utf-8", "backslashreplace"))
        pool[:] = [s for s in pool if s["iteration"] > step - REMEMBERED] + new
        if not new:
            print(f"iteration {step + 1}: no solution passed", flush=True)
    batches = lesson(model, pool, args, step)
    lrs = [args.lr * (1 - 0.9 * i / len(batches)) for i in range(len(batches))]
    return {**figures, "loss": update(model, optimizer, batches, lrs) if batches else None}


def examples(traces: Sequence[Attempt]) -> str:
    """The first solution of each kind and verdict, as text."""
    first = {(t.problem.kind, t.verdict): t for t in reversed(traces)}
    return "".join(f"# {kind}, {verdict}\n{first[kind, verdict]}\n\n" for kind, verdict in sorted(first))


def log(r: run.Run, step: int, cells: dict[str, Cells], figures: dict, frontier: dict[str, int],
        args: flags.Flags) -> None:
    """A row of metrics.csv, and a log line."""
    row = {"step": step, "loss": figures.get("loss"), "train_accuracy": accuracy(cells["train"]),
           "val_accuracy": accuracy(cells["val"]), "test_accuracy": accuracy(cells["test"], MIDDLE),
           "easy_accuracy": accuracy(cells["test"], EASY), "ood_accuracy": accuracy(cells["test"], HARD)}
    row |= {f"frontier_{kind}": d for kind, d in frontier.items()}
    r.show(row)
    row |= {f"test_{kind}": accuracy(cells["test"], MIDDLE, kind) for kind in args.kinds}
    names = ("sampled", *VERDICTS, "sampled_pass@1", "sampled_pass@k", "kept", "share_truncated", "share_distinct")
    r.record({**row, **{name: figures.get(name) for name in names}})


def finish(r: run.Run, model: Model, sets: dict[str, list[Problem]], first: dict, ended: str,
           args: flags.Flags) -> dict:
    """summary.json, the pictures, and the result on the test problems."""
    problems, rows = sets["test"], metrics.read(r.folder)
    curves = [[row.get(name) for row in rows] for name in ("step", "train_accuracy", "val_accuracy")]
    grok = grokking(*curves, n_val=len(sets["val"]))
    traces = model.solve(problems)
    cells, verdicts = count(traces), Counter(t.verdict for t in traces if t.problem.difficulty in MIDDLE)
    before, after = total(first["cells"], MIDDLE), total(cells, MIDDLE)
    samples = passes(model, problems, args, r.step)
    n = {"train_accuracy": len(sets["train"]), "val_accuracy": len(sets["val"]), "test_accuracy": after[1],
         "easy_accuracy": total(cells, EASY)[1], "ood_accuracy": total(cells, HARD)[1]}
    summary = r.summary(
        n_params=count_parameters(model), control=args.control, ended=ended or None, n=n, n_test=after[1],
        test_accuracy_before=before[0] / before[1], test_accuracy=after[0] / after[1],
        test_interval=wilson(*after), test_verdicts={name: verdicts[name] for name in VERDICTS},
        easy_accuracy=accuracy(cells, EASY), ood_accuracy=accuracy(cells, HARD),
        constant_baseline={kind: constant_baseline(problems, kind) for kind in args.kinds},
        grokking=grok, pass_before={k: x for k, x in first.items() if k != "cells"}, pass_now=samples,
        test_cells_before=first["cells"], test_cells=cells)
    draw_picture(r.folder)
    for k, x in samples.items():
        print(f"{k} at temperature {args.temperature:g}: {100 * first[k]:.1f}% before, {100 * x:.1f}% now")
    lucky, right = verdicts["lucky"], verdicts["lucky"] + verdicts["strict"]
    print(f"right by luck, with a wrong step: {format_rate(lucky, right)}")
    print(f"grokking: {grok['label']}")
    if ended:
        print(f"ended after iteration {r.step}: {ended}")
    print(f"difficulty 3-7: {format_rate(*before)} before, {format_rate(*after)} now; "
          f"{r.seconds():.0f} s ({r.cpu_seconds():.0f} CPU-s), {r.folder}")
    return summary


# ---- Pictures

def read_summary(folder: Path) -> dict:
    """Raises UserError when the run is not finished, or not of this script."""
    summary = files.read_json(folder / "summary.json")
    if summary.get("script") != SCRIPT:
        raise UserError(f"{folder}: a run of {summary.get('script')!r:.40}, not of {SCRIPT}")
    return summary


def draw_picture(folder: Path) -> Path:
    """Draw accuracy.png of a run from its metrics.csv and summary.json."""
    summary, rows = read_summary(folder), metrics.read(folder)
    fig, (left, right) = plots.new_figure(1, 2)
    names = {"train_accuracy": "train", "val_accuracy": "validation", "test_accuracy": "test, difficulty 3-7",
             "easy_accuracy": "test, 1-3", "ood_accuracy": "test, 8-10"}
    for name, label in names.items():
        x, y = metrics.points(rows, "step", name)
        left.plot(x, [100 * v for v in y], marker=".", label=label)
        n = summary["n"][name]
        band = [wilson(round(v * n), n) for v in y]
        left.fill_between(x, [100 * lo for lo, _ in band], [100 * hi for _, hi in band], alpha=0.12)
    left.set(xlabel="iteration", ylabel="right answers, %", ylim=(-3, 103), title=LABELS[summary["control"]])
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, fontsize=8)
    for name, style, when in (("test_cells_before", ":", "before"), ("test_cells", "-", "end")):
        for i, kind in enumerate(KINDS):
            cells = [(d, *summary[name][f"{kind} {d}"]) for d in range(1, 11) if f"{kind} {d}" in summary[name]]
            if cells:
                x, k, n = map(np.array, zip(*cells, strict=True))
                right.plot(x, 100 * k / n, style, marker=".", color=f"C{i}", label=f"{kind}, {when}")
                band = 100 * np.array([wilson(int(a), int(b)) for a, b in zip(k, n, strict=True)]).T
                right.fill_between(x, *band, alpha=0.1, color=f"C{i}")
    right.set(xlabel="difficulty", ylabel="right answers on test, %", ylim=(-3, 103), xticks=range(1, 11))
    right.legend(frameon=False, fontsize=8)
    return plots.save_figure(fig, folder / "accuracy.png")


def compare(args: flags.Flags) -> dict:
    """A run for each control, from one bootstrap; compare.png. Returns their summaries."""
    base = Path(args.out_dir or f"logs/{Path(SCRIPT).stem}/{args.name or f'compare-s{args.seed}'}")
    arms = {}
    for control in KEPT if args.model == "tiny" else [*KEPT][:-1]:
        one, folder = copy.copy(args), base.with_name(f"{base.name}-{control}")
        one.control, one.compare, one.name, one.out_dir = control, False, None, str(folder)
        one.resume = str(folder) if (folder / "last.pt").is_file() else None
        arms[control] = one
        before = files.read_json(folder / "args.json") if one.resume else vars(one)
        for name in {*vars(one)} - {*flags.FREE_ON_RESUME}:
            if before.get(name) != getattr(one, name):
                raise UserError(f"{folder}: was run with --{name.replace('_', '-')} {before.get(name)}; "
                                "choose another --name or --out-dir")
    out = {}
    for control, one in arms.items():
        print(f"# control: {control}, {one.out_dir}", flush=True)
        one.started = time.monotonic(), time.process_time()
        summary = Path(one.out_dir) / "summary.json"
        out[control] = read_summary(summary.parent) if summary.is_file() else {"stopped_early": True, "ended": None}
        if out[control]["stopped_early"] and not out[control]["ended"]:
            out[control] = train(one)
    print(draw_comparison([base]))
    return out


def draw_comparison(bases: Sequence[str | Path]) -> Path:
    """Test accuracy over the iterations of the arms of comparisons: compare.png beside those of the first.

    Lines are means over the comparisons, bands their ranges; of a single one, its 95 % Wilson interval.
    """
    paths = [Path(base) for base in bases]
    for base in paths:
        if not base.with_name(f"{base.name}-off").is_dir():
            raise UserError(f"{base}: no finished run, and no comparison: there is no {base}-off")
    fig, ax = plots.new_figure()
    for i, control in enumerate(KEPT):
        runs = [folder for base in paths if (folder := base.with_name(f"{base.name}-{control}")).is_dir()]
        if not runs:
            continue
        curves = [metrics.points(metrics.read(folder), "step", "test_accuracy") for folder in runs]
        n = [read_summary(folder) for folder in runs][0]["n_test"]
        x = min((x for x, _ in curves), key=len)
        y = np.array([y[:len(x)] for _, y in curves])
        band = np.array([wilson(round(v * n), n) for v in y[0]]).T if len(y) == 1 else (y.min(0), y.max(0))
        ax.plot(x, 100 * y.mean(0), "-" if control == "off" else "--", marker=".", color=f"C{i}", label=LABELS[control])
        ax.fill_between(x, 100 * band[0], 100 * band[1], alpha=0.15, color=f"C{i}")
    ax.set(xlabel="iteration", ylabel="right on test, difficulty 3-7, %", ylim=(-3, 103))
    ax.legend(frameon=False)
    return plots.save_figure(fig, paths[0].with_name(f"{paths[0].name}-off") / "compare.png")


# ---- Use of a trained model

def read_checkpoint(path: str | os.PathLike) -> dict:
    """The checkpoint at `path`, of a run folder its best.pt. Raises UserError."""
    path = checkpoint.file_of(path)
    return checkpoint.check(checkpoint.read(path), path, SCRIPT, like=Config, model=dict, config=dict, step=int, args=dict)


def load_into(model: Model, saved: dict, path: str | os.PathLike) -> None:
    """Give a model the weights of a checkpoint of its kind. Raises UserError."""
    if saved["config"] != asdict(model.config):
        raise UserError(f"{path}: its model is {saved['config']}, not {asdict(model.config)}")
    model.load_state(saved["model"], path)


def load_model(path: str | os.PathLike, device: str = "cpu") -> tuple[Model, dict]:
    """The trained model at `path`, of a run folder its best.pt, and the checkpoint. Raises UserError."""
    saved = read_checkpoint(path)
    try:
        model = make_model(saved["config"], devices.get_device(device))
    except (TypeError, UserError) as e:
        raise UserError(f"{path}: its config: {e}") from None
    load_into(model, saved, path)
    return model.eval(), saved


def problem_of(text: str, kind: str, model: Model) -> Problem:
    """The problem in a line like `3 4 + 2 *`. Raises UserError."""
    line, known = tuple(text.split()), isinstance(model, CodeModel) or set(text.split()) <= {*model.ids}
    answer = KINDS[kind].value(line) if known else None
    if answer is None or KINDS[kind].parts(line) == 0:
        raise UserError(f"--solve {text[:60]!r}: expected a line of kind {kind} with spaces between its tokens" + (
            "" if isinstance(model, CodeModel) else f", numbers within +-{model.config.max_value}"))
    return Problem(kind, line, answer, min(KINDS[kind].parts(line), 10))


def load(path: str | os.PathLike):
    """`solve = load(path)`: solve("3 4 + 2 *", "rpn") is the model's answer as text, or None."""
    model, _ = load_model(path)

    def answer(text: str, kind: str = "arithmetic") -> str | None:
        return model.solve([problem_of(text, kind, model)])[0].answer
    return answer


def show_solution(args: flags.Flags) -> dict:
    """Print the solution of a line, and whether it is right."""
    model, _ = load_model(args.checkpoint, args.device)
    trace = model.solve([problem_of(args.solve, args.kind, model)])[0]
    right = trace.verdict in trace.solves
    print(trace)
    print(f"{trace.verdict}: " + ("right" if right else f"the answer is {trace.problem.answer}"))
    return {"answer": trace.answer, "right": right, "verdict": trace.verdict}


def export(args: flags.Flags) -> None:
    """Write a model of Hugging Face, its adapter merged, and its tokenizer into a new folder. Raises UserError."""
    model, _ = load_model(args.checkpoint)
    if isinstance(model, Rewriter):
        raise UserError(f"--export: {args.checkpoint} is a tiny model, which has no adapter to merge")
    if Path(args.export).exists():
        raise UserError(f"--export {args.export}: it exists")
    merged = model.lm.merge_and_unload()
    merged.generation_config = model.generation  # with it, others know where its texts end
    merged.save_pretrained(args.export)
    model.tokenizer.save_pretrained(args.export)
    print(args.export)


def evaluate_checkpoint(path: str | os.PathLike, args: argparse.Namespace) -> dict:
    """Greedy answers on the test problems of a checkpoint's run, as [right, of] counts. Raises UserError."""
    model, saved = load_model(path, getattr(args, "device", "cpu"))
    with files.refuse_damaged(path):
        cells = count(model.solve(problem_sets(argparse.Namespace(**saved["args"]), model)["test"]))
    middle = total(cells, MIDDLE)
    return {"script": SCRIPT, "n_params": count_parameters(model), "step": saved["step"],
            "model": saved["args"]["model"], "max_value": getattr(model.config, "max_value", 10**9),
            "test": [*middle], "test_accuracy": middle[0] / middle[1], "test_interval": [*wilson(*middle)],
            "easy": [*total(cells, EASY)], "ood": [*total(cells, HARD)], "cells": cells}


def format_evaluation(out: dict) -> str:
    """The figures of evaluate_checkpoint as text."""
    lines = [f"  {out['model']}, {out['n_params']} parameters, iteration {out['step']}, values to {out['max_value']}"]
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
        for name in ("solve", "export"):
            if getattr(args, name) is not None and args.checkpoint is None:
                raise UserError(f"--{name}: of which model? give its --checkpoint")
        if args.plot:
            flags.only(args, "plot")
            runs = [path for path in args.plot if (Path(path) / "summary.json").is_file()]
            with files.refuse_damaged(args.plot[0]):
                if 0 < len(runs) < len(args.plot):
                    raise UserError(f"--plot: either runs, like {runs[0]}, or comparisons; not both")
                for picture in map(draw_picture, map(Path, runs)) if runs else [draw_comparison(args.plot)]:
                    print(picture)
            return None
        if args.solve is not None:
            flags.only(args, "solve", "kind", "checkpoint", "device")
            return show_solution(args)
        if args.export:
            flags.only(args, "export", "checkpoint")
            return export(args)
        if args.checkpoint:
            flags.only(args, "checkpoint", "device")
            out = evaluate_checkpoint(args.checkpoint, args)
            print(format_evaluation(out))
            return out
        return compare(args) if args.compare else train(args)


if __name__ == "__main__":
    main()
