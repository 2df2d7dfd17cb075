"""Does a transformer that reads data and candidates propose better expressions than the evolution it learned from?

    python neural_sr.py                              # generate, train, diagnose, and search with and without it
    python neural_sr.py --mode eval --net RUN        # the diagnosis: collapsed, overfit, not converged?
    python neural_sr.py --mode search --net RUN      # genetic programming with and without the net, paired
    python neural_sr.py --mode regress --data my.csv # formulas for a table of your own, in a minute
    python neural_sr.py --mode bench                 # Nguyen's and Feynman's problems by the same search

Symbolic regression looks for a formula of y in x0, x1, ... Genetic programming (GP) breeds programs; a causal
transformer (the net) reads the data and the best programs so far and samples the next. The notes that this
descends from imitate GP's children, which cannot beat GP; here the target is the solution, or an ancestor of it.
A run writes logs/neural_sr/NAME/: the usual files, and pictures of training, first tokens and solve rates.
"""
from __future__ import annotations

from common import files, flags  # before torch: a Ctrl-C while that loads is one line then

# isort: split
import argparse
import ast
import builtins
import copy
import csv
import hashlib
import importlib.util
import io
import keyword
import math
import multiprocessing
import re
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import checkpoint, devices, metrics, plots, run
from common.evaluation import count_parameters, eval_mode, format_rate, wilson
from common.files import UserError
from common.flags import integer, path, real
from common.optim import Muon
from common.tables import Sample, read_sample, read_table

SCRIPT = Path(__file__).name
SOLVED = 1e-9                     # NMSE on test points: mean squared error as a share of the variance of y
EXACT = 1e-18                     # NMSE on a search's own points, at which it ends: rounding, and no approximation
N_VAL, N_FINAL = 500, 1000         # examples of each split that are diagnosed in training, and at its end
N_SAMPLED, N_SAMPLES = 250, 32     # of these get many samples each, at the end so many
LOSSES, ROBUST, POWER = ("mse", "l1", "huber", "log"), ("l1", "huber"), {"l1": 1}  # POWER of y's unit: else 2
PATIENCE = 5                       # evaluations without a better validation loss, after which training ends
SAMPLED = 2048                     # programs that are sampled at a time: more do not fit the cache
RANGES = ((-3.0, 3.0), (0.2, 4.0))  # of x: the second where a function has no value, or too large ones, on the first
MOST_ROWS = 5000                  # of a table that are used
SEARCHED_ROWS = 1000              # of these that programs are bred on; the front is of all
REGRESS_OPS = ("add", "sub", "mul", "div", "sin", "cos", "exp", "log", "sqrt", "square")
IDLE = 100                        # offers without a new program, after which a search ends: there may be no more
N_TEST = 400                      # points that nothing is fitted on
VAL_SHARE, TEST_SHARE = 0.07, 0.08  # of functions, by a hash of what they are
DATA_FLAGS = ("ops", "variables", "functions", "target_size", "max_size", "points", "generations", "objective")
GP_POPULATION = 20                 # of the runs that give examples
FUNCTIONS, TRAJECTORY, BATCH, EVAL, PROBLEMS, SEARCH = range(1, 7)  # streams of randomness


# ---- Flags

def names_of(options: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the options, with commas between them."""
    options = tuple(options)

    def parse_names(text: str) -> list[str]:
        names = [x.strip() for x in text.split(",")]
        unknown = [x for x in names if x not in options]
        if unknown or len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected some of {','.join(options)}")
        return names
    return parse_names


def columns(text: str) -> list[str]:
    """An argparse type: names of columns, with commas between them."""
    names = [x.strip() for x in next(csv.reader([text], skipinitialspace=True))] if text.strip() else [""]
    if not all(names):
        raise argparse.ArgumentTypeError("an empty name")
    return names


def parse_args(argv: list[str] | None = None) -> flags.Flags:
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("regress")
    g.add_argument("--target", type=path, metavar="COLUMN", help="the column of y (default: the last)")
    g.add_argument("--features", type=columns, metavar="LIST",
                   help="columns that y may depend on (default: all others)")
    g.add_argument("--ignore", type=columns, metavar="LIST", help="columns that are left out")
    g.add_argument("--weights", type=path, metavar="COLUMN", help="of rows, in every fit and figure")
    g.add_argument("--loss", choices=LOSSES, default="mse",
                   help="mean squared error; mean absolute "
                   "error; squared up to a tenth of y's spread and linear beyond; squared error of log y")
    g.add_argument("--test-fraction", type=real(0, 0.9), default=0.25,
                   help="of rows that no formula of the front is fitted on, from 20 rows on")
    g.add_argument("--predict", type=path, metavar="FILE",
                   help="with --checkpoint: write its predictions for this table")
    g.add_argument("--checkpoint", type=path, metavar="RUN", help="a run of --mode regress")
    g.add_argument("--output", type=path, metavar="FILE", help="of --predict (default: predictions.csv beside the run)")
    p.add_argument("--mode", choices=list(MODES), default="demo", help="demo: all stages. gen: write data.npz; "
                   "train; eval: diagnose --net; search: compare methods with --net; bench: published problems; "
                   "regress: formulas for the table of --data")
    g = p.add_argument_group("data")
    g.add_argument("--ops", type=names_of(TOKENS), default=["add", "sub", "mul", "div"],
                   metavar="LIST", help=f"operators, some of {','.join(TOKENS)} (regress: all but pow, tanh, abs)")
    g.add_argument("--variables", type=integer(1, 4), default=2, help="of functions and programs")
    g.add_argument("--functions", type=integer(10), default=300_000, help="programs that are sampled; how many "
                   "different functions they are is printed")
    g.add_argument("--target-size", type=integer(3, 40), default=11, help="tokens of the largest of them")
    g.add_argument("--max-size", type=integer(3, 60), default=15,
                   help="tokens of the largest program in a search (regress: of a formula, 40; what is bred: up to 30)")
    g.add_argument("--points", type=integer(3, 10_000), default=32, help="of a data set")
    g.add_argument("--generations", type=integer(1, 1000), default=4, help="of the GP runs that give examples")
    g.add_argument("--objective", choices=["solution", "ancestor", "gp"], default="solution", help="what the net shall "
                   "answer: the function; an ancestor of GP's best; any child of GP's (the notes' objective)")
    g.add_argument("--data", type=path, metavar="FILE", help="regress: the table; else a data.npz of --mode gen "
                   "(default: made anew)")

    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=["own", "gpt2"], default="own", help="gpt2: transformers' model in its place")
    g.add_argument("--hidden", type=integer(4, 4096), default=128, help="width")
    g.add_argument("--layers", type=integer(1, 64), default=3, help="blocks")
    g.add_argument("--heads", type=integer(1, 64), default=2, help="of attention")
    g.add_argument("--members", type=integer(1, 1000), default=4, help="programs that the net is shown, the best ones")

    g = p.add_argument_group("optimization")
    g.add_argument("--steps", type=integer(1), default=800, help="of the optimizer")
    g.add_argument("--rounds", type=integer(0, 100), default=0, help="of expert iteration: --steps are "
                   "cut into one part more; before each but the first, larger functions solved by mix become examples")
    g.add_argument("--batch-size", type=integer(1, 1 << 16), default=128, help="examples of a step")
    g.add_argument("--lr", type=real(0, 10, above=True), default=16e-3, help="peak of the learning rate")

    g = p.add_argument_group("evaluation")
    g.add_argument("--eval-every", type=integer(1), default=200, help="steps between validations and saves")
    g.add_argument("--net", type=path, metavar="RUN",
                   help="eval, search, bench, regress: this run's best.pt (default: the kept one)")

    g = p.add_argument_group("search")
    g.add_argument("--method", type=names_of(dict.fromkeys((*METHODS, "gp", "mix", *PEERS))), default=list(METHODS),
                   metavar="LIST",
                   help="mix: GP and the net; net: its proposals alone; random, wrong: controls, with random programs "
                   "or another problem's proposals in place of the net's; bench: gp and mix, of --mode regress, "
                   "gplearn, pyoperon, eggp")
    g.add_argument("--problems", type=names_of(PROBLEM_SETS), default=["nguyen", "feynman"], metavar="LIST",
                   help=f"bench: some of {','.join(PROBLEM_SETS)}")
    g.add_argument("--noise", type=real(0, 10), default=0.0, help="bench: of y, as a share of its standard deviation")
    g.add_argument("--held-out", type=integer(2), default=120, help="held-out functions to search for")
    g.add_argument("--larger", type=integer(0, 40), default=0, help="ask functions that are larger than those of "
                   "training by up to so many tokens; 0: of its sizes")
    g.add_argument("--search-seeds", type=integer(1, 1000), default=3, help="searches of each problem")
    g.add_argument("--evaluations", type=integer(0), default=600,
                   help="distinct ones, for each problem (regress: instead of --max-minutes)")
    g.add_argument("--population", type=integer(2, 100_000), default=20, help="of an island")
    g.add_argument("--islands", type=names_of(["raw", "terms"]), default=["terms"], metavar="LIST",
                   help="raw: programs are measured as they are; terms: with least-squares weights of their additive "
                   "terms")
    g.add_argument("--constants", action="store_true", help="GP's leaves may be fitted constants, c")
    g.add_argument("--mix", type=integer(2, 1000), default=3, metavar="B",
                   help="of mix, the rounds 1, B, B * B, ... are the net's, the others GP's")
    g.add_argument("--temperature", type=real(0, 100, above=True), default=1.0, help="of the net's samples")
    flags.add_run_arguments(p)
    p.set_defaults(threads=2)

    args = flags.parse(p, argv)
    if "mode" not in args.given:
        args.mode = "regress" if args.predict is not None else mode_of(args.resume) if args.resume else args.mode
    if args.mode == "regress":
        flags.use(args, {"ops": list(REGRESS_OPS), "max_size": 40, "steps": 10**9, "threads": 1} |
                  ({} if "evaluations" in args.given else {"evaluations": 0, "max_minutes": 1.0}))
        if (args.predict is None) != (args.checkpoint is None) or (args.output is not None and args.predict is None):
            p.error("--predict FILE and --checkpoint RUN go together, and --output FILE with them")
    if args.mode == "bench":
        flags.use(args, {"method": ["gp", "mix"], "max_minutes": 0.5, "steps": 10**9, "threads": 1})
    try:
        config_of(args)
        check_flags(args)
    except UserError as e:
        p.error(str(e))
    return args


def mode_of(run: str) -> str:
    """The mode of the run that --resume goes on with; what is wrong with it is told later."""
    try:
        mode = checkpoint.read(Path(run) / "last.pt" if Path(run).is_dir() else Path(run))["args"]["mode"]
    except (UserError, KeyError, TypeError):
        mode = "demo"
    return mode if mode in MODES else "demo"


def check_flags(args: flags.Flags) -> None:
    """Raise UserError for flags that do not go together, or that the mode does not look at."""
    table = ("target", "features", "ignore", "weights", "loss", "test_fraction", "predict", "checkpoint", "output")
    net = (*DATA_FLAGS, "data", "net", "arch", "members", "hidden", "layers", "heads")
    find = ("method", "constants", "evaluations", "population", "islands", "search_seeds")
    used = {"gen": DATA_FLAGS, "eval": net, "bench": ("method", "problems", "noise", "search_seeds", "net",
                                                      "max_minutes", "resume"),
            "search": (*net, *find, "held_out", "larger", "mix", "temperature"),
            "demo": set(vars(args)) - {"net", "problems", "noise", *table},
            "train": set(vars(args)) - {"net", "held_out", "larger", "method", "constants", "search_seeds", "problems",
                                        "noise", *table},
            "regress": (*table, "data", "ops", "max_size", "evaluations", "net", "max_minutes", "resume", "tracker")}
    if not args.rounds:
        used["train"] -= {"evaluations", "population", "islands", "mix", "temperature"}
    if args.predict is not None:
        used["regress"] = ("predict", "checkpoint", "output")
    own = () if args.mode in ("regress", "bench") else ("device",)
    flags.only(args, f"mode {args.mode}", *used[args.mode], "mode", "seed", "name", "out_dir", *own)
    known = ("gp", "mix", *PEERS) if args.mode == "bench" else METHODS
    if not set(args.method) <= set(known):
        raise UserError(f"--method {','.join(args.method)}: --mode {args.mode} has {', '.join(known)}")
    budget = args.max_minutes + (args.evaluations if args.mode == "regress" else 0)
    if args.mode in ("regress", "bench") and not budget or ("evaluations" in args.given and not args.evaluations):
        raise UserError("--evaluations, --max-minutes: a budget of 0")
    if args.mode == "regress" and {"evaluations", "max_minutes"} <= set(args.given):
        raise UserError("--evaluations: not together with --max-minutes")
    if args.mode not in ("regress", "bench"):
        check_sizes(args)


def check_sizes(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that do not go together."""
    if args.steps % (args.rounds + 1):
        raise UserError(f"--steps {args.steps}: cannot be cut into {args.rounds + 1} equal parts")
    if args.target_size + max(args.larger, args.rounds > 0) > args.max_size:
        raise UserError(f"--target-size {args.target_size}: with --larger {args.larger} and --rounds {args.rounds} "
                        f"there is no room in a --max-size of {args.max_size}")
    if args.rounds and args.constants:
        raise UserError("--rounds: not together with --constants, which the net does not know")
    if args.evaluations < args.population:
        raise UserError(f"--evaluations {args.evaluations}: fewer than a --population of {args.population}")


def config_of(args: argparse.Namespace) -> Config:
    names = Config.__dataclass_fields__
    return Config(**{name: tuple(args.ops) if name == "ops" else getattr(args, name) for name in names})


# ---- Expressions. P programs in prefix order of L tokens each; N points, Q data sets, V variables

PAD, EOS, BOS, ONE, C, X0 = range(6)  # tokens; x0 to x10 are from X0 on, then operators, then x11 and so on
FIRST_OP, N_TOKENS, VOCAB = 16, 128, 64  # VOCAB: those that a net can know


class Op(NamedTuple):
    name: str
    arity: int
    value: Callable   # a ufunc, with out=; no operator is protected: a pole is inf or NaN
    slopes: Callable  # derivatives of the value by each operand, of operands and value
    text: str         # in Python: operands with a sign between them, or the name as a function of math, or a builtin
    commutes: bool = False


OPS = (
    Op("add", 2, np.add, lambda a, b, v: (np.ones_like(v), np.ones_like(v)), "({} + {})", True),
    Op("sub", 2, np.subtract, lambda a, b, v: (np.ones_like(v), -np.ones_like(v)), "({} - {})"),
    Op("mul", 2, np.multiply, lambda a, b, v: (b, a), "({} * {})", True),
    Op("div", 2, np.divide, lambda a, b, v: (1 / b, -v / b), "({} / {})"),
    Op("pow", 2, np.power, lambda a, b, v: (b * np.power(a, b - 1), np.where(v == 0, 0.0, v * np.log(a))),
       "({} ** {})"),
    Op("sin", 1, np.sin, lambda a, v: (np.cos(a),), "sin({})"),
    Op("cos", 1, np.cos, lambda a, v: (-np.sin(a),), "cos({})"),
    Op("exp", 1, np.exp, lambda a, v: (v,), "exp({})"),
    Op("log", 1, np.log, lambda a, v: (1 / a,), "log({})"),
    Op("sqrt", 1, np.sqrt, lambda a, v: (0.5 / v,), "sqrt({})"),
    Op("tanh", 1, np.tanh, lambda a, v: (1 - v * v,), "tanh({})"),
    Op("abs", 1, np.abs, lambda a, v: (np.sign(a),), "abs({})"),
    Op("square", 1, np.square, lambda a, v: (2 * a,), "({} ** 2)"),
)
TOKENS = {op.name: FIRST_OP + i for i, op in enumerate(OPS)}
VARIABLES = np.array([*range(X0, FIRST_OP), *range(FIRST_OP + len(OPS), N_TOKENS)])  # tokens of x0, x1, ...
INDEX = np.full(N_TOKENS, -1)  # of a variable's token: which it is
INDEX[VARIABLES] = np.arange(len(VARIABLES))
ADD, SUB, MUL, DIV, POW, EXP, LOG, SQRT, SQUARE = (
    TOKENS[name] for name in ("add", "sub", "mul", "div", "pow", "exp", "log", "sqrt", "square"))
ARITY = np.zeros(N_TOKENS, np.int64)
ARITY[FIRST_OP:FIRST_OP + len(OPS)] = [op.arity for op in OPS]
COMMUTES = np.zeros(N_TOKENS, bool)
COMMUTES[FIRST_OP:FIRST_OP + len(OPS)] = [op.commutes for op in OPS]


def take(x: NamedTuple, some: np.ndarray | slice):
    """The same NamedTuple with some rows of each of its arrays."""
    return type(x)(*(field[some] for field in x))


class Shape(NamedTuple):
    """Of each node of P programs, (P, L): how many tokens hang on it, its height, where its second operand is."""
    size: np.ndarray
    height: np.ndarray
    second: np.ndarray


def shape_of(tokens: np.ndarray) -> Shape:
    """The shape of valid programs (P, L). From right to left, since operands stand behind their operator."""
    (P, L), rows = tokens.shape, np.arange(len(tokens))
    arity = ARITY[tokens.T]
    has_one, has_two = (arity >= 1).astype(np.int32), (arity == 2).astype(np.int32)
    size, height = np.ones((L + 2, P), np.int32), np.zeros((L + 2, P), np.int32)
    second = np.zeros((L, P), np.int32)  # of nodes without one: any place
    for i in range(longest(tokens) - 1, -1, -1):
        at = np.minimum(size[i + 1] + (i + 1), L + 1, out=second[i])
        where = at * P + rows
        size[i] += has_one[i] * size[i + 1] + has_two[i] * size.ravel().take(where)
        height[i] = has_one[i] * (1 + np.maximum(height[i + 1], has_two[i] * height.ravel().take(where)))
    return Shape(size[:L].T, height[:L].T, second.T)


def longest(tokens: np.ndarray) -> int:
    """Places that any of the programs (P, L) uses."""
    return int((tokens != PAD).any(0).sum())


def keys_of(tokens: np.ndarray, shape: Shape) -> np.ndarray:
    """A 64-bit hash (P,) of each program, the same when operands of + and * change places."""
    def mixed(x: np.ndarray) -> np.ndarray:  # the finaliser of splitmix64
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
    (P, L), odd = tokens.shape, np.uint64(0x9E3779B97F4A7C15)
    key, rows, tokens = np.zeros((L + 2, P), np.uint64), np.arange(P), tokens.T
    for i in range(longest(tokens.T) - 1, -1, -1):
        t, arity = tokens[i].astype(np.uint64), ARITY[tokens[i]]
        a = key[i + 1] * (arity >= 1)
        b = key.ravel().take(shape.second[:, i] * P + rows) * (arity == 2)
        swaps = COMMUTES[tokens[i]] & (a > b)
        a, b = np.where(swaps, b, a), np.where(swaps, a, b)
        key[i] = mixed(mixed(a * odd + t) + b)
    return key[0]


def whole(rows: np.ndarray, grammar: Grammar) -> np.ndarray:
    """Which rows (P, L), cut at EOS or PAD, are one whole program of the grammar's tokens."""
    there = np.cumsum((rows == EOS) | (rows == PAD), 1) == 0
    known = np.isin(rows, np.concatenate([grammar.leaves, grammar.operators]))
    arity = ARITY[np.where(there & known, rows, PAD)]
    need = 1 + np.cumsum(np.where(there, arity - 1, 0), 1)  # operands that are missing behind each token
    last = np.arange(rows.shape[1]) == there.sum(1, keepdims=True) - 1
    return there[:, 0] & (known | ~there).all(1) & ((need > 0) | ~there | last).all(1) & (need[:, -1] == 0)


def check_programs(tokens: np.ndarray, grammar: Grammar) -> None:
    """Raise UserError for a row of (P, L) that is not one whole program, with PAD behind it."""
    gap = (np.cumsum(tokens == PAD, 1) > 0) & (tokens != PAD)
    bad = gap.any(1) | (tokens == EOS).any(1) | ~whole(tokens, grammar)
    if bad.any():
        raise UserError(f"program {tokens[bad.argmax()].tolist()}: not one whole expression of known tokens")


class Plan:
    """In which order to compute the nodes of programs: those of a height together, equal ones once.

    ids (P, L): the row of each node in a table of values. steps: an operator, the rows that it fills, the rows of
    its operands. Rows begin with the variables and the 1 of each data set, then the constants.
    """

    def __init__(self, tokens: np.ndarray, shape: Shape, of: np.ndarray, Q: int, V: int):
        used = np.arange(tokens.shape[1]) < shape.size[:, :1]
        tokens = tokens.astype(np.int64)
        column = INDEX[tokens]
        if column.max(initial=-1) >= V:
            raise ValueError(f"programs with more variables than the {V} of the data")
        self.ids = np.where(tokens == ONE, V, column) + (V + 1) * of[:, None]
        self.constants = np.nonzero(used & (tokens == C))
        self.n_rows = Q * (V + 1) + len(self.constants[0])
        self.ids[self.constants] = np.arange(Q * (V + 1), self.n_rows)
        self.steps: list[tuple[Op, slice, np.ndarray, np.ndarray]] = []
        inner = np.nonzero(used & (shape.height > 0))
        bound = self.n_rows + len(inner[0])  # more than any row
        order = np.argsort(shape.height[inner], kind="stable")
        ends = np.cumsum(np.bincount(shape.height[inner]))
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            p, i = (x[order[start:end]] for x in inner)
            t, a = tokens[p, i], self.ids[p, i + 1]
            b = np.where(ARITY[t] == 2, self.ids[p, np.minimum(shape.second[p, i], tokens.shape[1] - 1)], 0)
            nodes, which = np.unique((t * bound + a) * bound + b, return_inverse=True)
            self.ids[p, i] = self.n_rows + which
            t, a, b = nodes // bound ** 2, nodes // bound % bound, nodes % bound
            of_op = np.searchsorted(t, np.arange(FIRST_OP, FIRST_OP + len(OPS) + 1))
            for op, first, last in zip(OPS, of_op[:-1], of_op[1:], strict=True):
                if first < last:
                    rows = slice(self.n_rows + first, self.n_rows + last)
                    self.steps.append((op, rows, a[first:last], b[first:last]))
            self.n_rows += len(nodes)

    def values(self, X: np.ndarray, constants: np.ndarray | None) -> np.ndarray:
        """The table (rows, N) of values on X (Q, N, V), with constants (P, L)."""
        Q, N, V = X.shape
        table = np.empty((self.n_rows, N))
        given = table[:Q * (V + 1)].reshape(Q, V + 1, N)
        given[:, :V], given[:, V] = X.transpose(0, 2, 1), 1.0
        if len(self.constants[0]):
            table[Q * (V + 1):][:len(self.constants[0])] = constants[self.constants][:, None]
        for op, rows, a, b in self.steps:
            op.value(*(table[a], table[b])[:op.arity], out=table[rows])
        return table


def evaluate(tokens: np.ndarray, X: np.ndarray, of: np.ndarray | None = None, constants: np.ndarray | None = None,
             at: np.ndarray | None = None, shape: Shape | None = None, chunk: int = 2048) -> np.ndarray:
    """Values (P, N) of programs (P, L) on X (Q, N, V), in float64. of (P,): whose points each takes.

    constants (P, L): the value of each token c. at (P, L): instead of the roots the nodes whose values (n, N) are
    wanted, row by row.
    """
    L = max(1, longest(tokens))
    (P, _), tokens = tokens.shape, tokens[:, :L]
    of = np.zeros(P, np.int64) if of is None else of
    at = np.broadcast_to(np.arange(L) == 0, (P, L)) if at is None else at[:, :L]
    parts = [np.empty((0, X.shape[1]))]
    with np.errstate(all="ignore"):
        for start in range(0, P, chunk):  # a chunk's table stays in the cache
            some = slice(start, start + chunk)
            part = take(shape, (some, slice(L))) if shape else shape_of(tokens[some])
            plan = Plan(tokens[some], part, of[some], len(X), X.shape[2])
            table = plan.values(X, None if constants is None else constants[some, :L])
            parts.append(table[plan.ids[at[some]]])
    return np.concatenate(parts)


class Loss:
    """How far values (P, N) are from y (Q, N): mse, l1, huber (squared up to a tenth of y's spread, linear beyond) or
    log (mse of logarithms). A mean over rows, with weights (Q, N) where there are any. copies (Q, N): how often each
    row is there.
    """

    def __init__(self, y: np.ndarray, name: str = "mse", weights: np.ndarray | None = None,
                 copies: np.ndarray | float = 1.0):
        if name not in LOSSES:
            raise UserError(f"loss {name!r:.40}: there are {', '.join(LOSSES)}")
        self.y, self.name, self.copies, self.robust = y, name, np.broadcast_to(copies, y.shape), name in ROBUST
        self.weights = None if weights is None else weights / weights.mean(1, keepdims=True)
        self.rounds = 1 if name == "mse" else 8  # of reweighted least squares
        spread = np.median(np.abs(y - np.median(y, 1, keepdims=True)), 1, keepdims=True) * 1.4826
        self.corner = 0.1 * np.where(spread > 0, spread, y.std(1, keepdims=True))
        self.spread = y.std(1, keepdims=True)
        middle = np.zeros((len(y), 0, y.shape[1]))
        self.of_constant = self.fitness(least_squares(middle, self, np.arange(len(y)))[1], np.arange(len(y)))  # (Q,)

    def floor(self, digit: float) -> float:
        """The fitness of the first data set that rounding makes, to the digit that y is written to, and of float64."""
        y = self.y[0]
        digit = max(digit, 1e-12 * y.std(), 4e-16 * np.abs(y).max())
        return (digit / (np.median(np.abs(y)) if self.name == "log" else 1)) ** 2 / 12

    def __call__(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The loss (P,) of each program; inf or NaN where it has no value. of (P,): the data set of each."""
        return self.each(values, of).mean(1)

    def each(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """What each row adds to it, (P, N)."""
        y = self.y[of]
        with np.errstate(all="ignore"):
            if self.name == "log":
                each = np.log(values / y) ** 2
            else:
                each = np.abs(values - y) if self.name == "l1" else (values - y) ** 2
            if self.name == "huber":
                corner = self.corner[of]
                each = np.where(each > corner ** 2, 2 * corner * np.abs(values - y) - corner ** 2, each)
            return each if self.weights is None else each * self.weights[of]

    def codes(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Twice the nats (P, N) in which a Cauchy distribution codes the errors, its scale their median."""
        with np.errstate(all="ignore"):
            far = np.abs(values - self.y[of])
            scale = np.median(far, 1, keepdims=True) + 1e-12 * self.spread[of] + 1e-300
            codes = 2 * np.log1p((far / scale) ** 2) + 2 * np.log(scale)
            return codes if self.weights is None else codes * self.weights[of]

    def fitness(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """What a search makes small, (P,): the loss or, where it is robust, the exponential of the mean code, since to
        l1 and huber a few outliers are nearly all of the loss.
        """
        with np.errstate(over="ignore"):
            return np.exp(self.codes(values, of).mean(1)) if self.robust else self(values, of)

    def pull(self, values: np.ndarray | None, of: np.ndarray, least: float = 1e-12) -> np.ndarray | None:
        """Weights (P, N) with which squared errors have the loss's slopes at these values (None: nothing is known yet);
        None: all are 1. Reweighted least squares go on from there (Holland and Welsch 1977). least: with l1 the error,
        in standard deviations of y, below which a row pulls no more.
        """
        weights = None if self.weights is None else self.weights[of]
        if self.name == "mse":
            return weights
        y = self.y[of]
        with np.errstate(all="ignore"):
            if self.name == "log":
                f = y if values is None else np.where(values > 0, values, y)
                ratio = (f - y) / y
                own = np.where(np.abs(ratio) < 1e-6, 1 / y ** 2, np.log(f / y) / (f * (f - y)))
            elif values is None:
                own = np.ones_like(y)
            else:
                own = 1 / np.maximum(np.abs(values - y),
                                     least * self.spread[of] if self.name == "l1" else self.corner[of])
            own = own if weights is None else own * weights
            return own / own.mean(1, keepdims=True)


def without_own(values: np.ndarray, leverage: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a fit's values (n, N) would be, each without its own row of y having been fitted (PRESS, Allen 1974)."""
    return y + (values - y) / np.maximum(1 - leverage, 1e-10)


def least_squares(A: np.ndarray, loss: Loss, of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (n, k) of the terms A (n, k, N), beside an intercept, for the least loss; the values (n, N) of the sums.
    For the losses that outliers shall not pull, each value also as it would be if its row had been left out.
    """
    (n, k, N), y = A.shape, loss.y[of]
    A = A - A.mean(2, keepdims=True) if k else A
    scale = np.sqrt((A ** 2).mean(2)) + 1e-100
    A = np.concatenate([np.ones((n, 1, N)), A / scale[:, :, None]], 1)
    values = None
    for _ in range(loss.rounds):
        pull = loss.pull(values, of)
        weighted = A if pull is None else A * pull[:, None]
        gram, w, residual = A @ weighted.transpose(0, 2, 1) / N + 1e-12 * np.eye(k + 1), 0.0, y
        for _ in range(3):  # again, since the normal equations lose digits
            w = w + np.linalg.solve(gram, weighted @ residual[:, :, None] / N)
            residual = y - (w * A).sum(1)
        values = y - residual
    outside = values
    if loss.robust:
        outside = without_own(values, (A * np.linalg.solve(gram, weighted)).sum(1) / N * loss.copies[of], y)
    return w[:, 1:, 0] / scale, values, outside


def slopes(tokens: np.ndarray, constants: np.ndarray, X: np.ndarray, of: np.ndarray, at: np.ndarray, shape: Shape
           ) -> tuple[np.ndarray, np.ndarray]:
    """Values (n, N) of the nodes at (P, L), and their derivatives (n, K, N) by the constants of their programs, K the
    most that one has.
    """
    with np.errstate(all="ignore"):
        plan, constant = Plan(tokens, shape, of, len(X), X.shape[2]), np.nonzero(tokens == C)
        # G: derivatives of a node at `at` by each below.
        table, G = plan.values(X, constants), np.zeros((plan.n_rows, X.shape[1]))
        G[plan.ids[at]], live = 1.0, np.zeros(plan.n_rows, bool)
        live[plan.ids[constant]] = True  # what has constants in it: such nodes are part of one program alone
        for op, rows, a, b in plan.steps:
            live[rows] = live[a] | (live[b] & (op.arity == 2))
        for op, rows, a, b in reversed(plan.steps):
            some = np.arange(rows.start, rows.stop)[live[rows]]
            below = [x[live[rows]] for x in (a, b)[:op.arity]]
            parts = op.slopes(*(table[x] for x in below), table[some]) if len(some) else ()
            for x, part in zip(below, parts, strict=False):
                G[x[live[x]]] += (G[some] * part)[live[x]]
    D = np.zeros((int(at.sum()), (tokens == C).sum(1).max(initial=1), X.shape[1]))
    D[(np.cumsum(at) - 1).reshape(at.shape)[constant],
      (np.cumsum(tokens == C, 1) - 1)[constant]] = G[plan.ids[constant]]
    return table[plan.ids[at]], D


def fit_constants(tokens: np.ndarray, constants: np.ndarray, X: np.ndarray, loss: Loss, of: np.ndarray,
                  iterations: int = 8, terms: bool = False) -> np.ndarray:
    """Constants (P, L) after Levenberg-Marquardt steps on the loss, each program for itself.

    terms: with the best weights of a program's additive terms at every step, as in `fit_terms`: variable projection
    (Golub and Pereyra 1973, with Kaufman's Jacobian).
    """
    shape, place, constants = shape_of(tokens), tokens == C, constants.copy()
    at = split_terms(tokens, shape) if terms else np.arange(tokens.shape[1]) == np.zeros((len(tokens), 1))
    n = at.sum(1)
    rank, program, which = np.where(place, np.cumsum(place, 1) - 1, 0), *np.nonzero(at)
    which, start = (np.cumsum(at, 1) - 1)[program, which], np.cumsum(n) - n

    def look(constants: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses (P,), values (P, N), and their slopes (P, J, N); those by the constants are the last ones."""
        each, D = slopes(tokens, constants, X, of, at, shape)
        if not terms:
            return loss(each, of), each, D
        A = np.zeros((len(tokens), n.max(), X.shape[1]))
        A[program, which] = each
        usable = (np.abs(A) < 1e100).all((1, 2)) & (n <= MAX_TERMS)
        A[~usable] = 0.0
        weights, values, _ = least_squares(A, loss, of)
        D = np.add.reduceat(D * weights[program, which][:, None, None], start, 0)
        error = np.where(usable, loss(values, of), np.inf)
        return error, values, np.concatenate([np.ones_like(A[:, :1]), A, D], 1)
    with np.errstate(all="ignore"):
        damping, (error, values, J) = np.full(len(tokens), 1e-3), look(constants)
        for i in range(iterations):
            usable = np.isfinite(error) & np.isfinite(J).all((1, 2))
            J[~usable], values[~usable] = 0.0, 0.0
            pull = loss.pull(values, of, 0.1 ** (1 + i / 2))  # a row that is met at once would hold all constants
            size = np.sqrt((J ** 2).mean(2, keepdims=True)) + 1e-100
            unit = J / size
            weighted = unit if pull is None else unit * pull[:, None]
            H = unit @ weighted.transpose(0, 2, 1) / J.shape[2]
            H += np.eye(H.shape[1]) * (damping[:, None] * np.einsum("pkk->pk", H) + 1e-12)[:, None]
            step = np.linalg.solve(H, weighted @ (values - loss.y[of])[:, :, None]) / size / J.shape[2]
            step = step[:, 1 + n.max():, 0] if terms else step[:, :, 0]
            trial = constants - np.where(place, np.take_along_axis(step, rank, 1), 0.0)
            new_error, new_values, new_J = look(trial)
            better = new_error < error
            constants[better], error[better] = trial[better], new_error[better]
            values[better], J[better] = new_values[better], new_J[better]
            damping = np.where(better, damping / 5, damping * 4)
    return constants


MAX_TERMS = 8


def split_terms(tokens: np.ndarray, shape: Shape) -> np.ndarray:
    """Which nodes (P, L) are the additive terms of a program: what + and - at its top join."""
    top = np.zeros((tokens.shape[0], tokens.shape[1] + 2), bool)
    top[:, 0] = True
    for i in range(tokens.shape[1]):
        some = np.flatnonzero(top[:, i] & ((tokens[:, i] == ADD) | (tokens[:, i] == SUB)))
        top[some, i], top[some, i + 1], top[some, shape.second[some, i]] = False, True, True
    return top[:, :tokens.shape[1]]


def fit_terms(tokens: np.ndarray, X: np.ndarray, loss: Loss, of: np.ndarray, constants: np.ndarray | None = None,
              shape: Shape | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Losses (P,) with the best weights of a program's additive terms and an intercept; the numbers (P,) of terms.

    They are those of generalised cross-validation (Craven and Wahba 1979): of N points and k weights and constants, the
    intercept one of them, times (N / (N - k))^2. With l1 and huber they are of rows left out one by one, lest spikes
    fit outliers. A program of more than MAX_TERMS terms, or with a value that is not finite, has the loss inf.
    """
    shape = shape or shape_of(tokens)
    top = split_terms(tokens, shape)
    values, n, N = evaluate(tokens, X, of, constants, top, shape), top.sum(1), X.shape[1]
    start, error = np.cumsum(n) - n, np.full(len(tokens), np.inf)
    used = (tokens == C).sum(1)
    free = N - 1 - n - used
    for k in range(1, MAX_TERMS + 1):
        some = np.flatnonzero((n == k) & (free > 0))
        A = values[start[some][:, None] + np.arange(k)]
        usable = (np.abs(A) < 1e100).all((1, 2))
        some, A = some[usable], A[usable]
        if len(some):
            found = least_squares(A, loss, of[some])[2]
            error[some] = loss.fitness(found, of[some]) * (N / ((N - used[some]) if loss.robust else free[some])) ** 2
    return error, n


# ---- Expressions as text

def operands(tokens: Sequence[int], i: int = 0) -> tuple[list[int], int]:
    """Where the operands of the node at i begin, and where it ends."""
    starts, end = [], i + 1
    for _ in range(int(ARITY[tokens[i]])):
        starts.append(end)
        _, end = operands(tokens, end)
    return starts, end


def infix(tokens: Sequence[int], constants: Sequence[float] | None = None, names: Sequence[str] | None = None,
          i: int = 0) -> str:
    """A program as Python writes it. Constants have as many digits as they need to be read back."""
    t = int(tokens[i])
    if ARITY[t]:
        return OPS[t - FIRST_OP].text.format(*(infix(tokens, constants, names, k) for k in operands(tokens, i)[0]))
    if t == C:
        text = "c" if constants is None else repr(float(constants[i])).removesuffix(".0")
        return f"({text})" if text[0] == "-" else text  # -2.0 ** x is another thing in Python
    return "1" if t == ONE else names[INDEX[t]] if names else f"x{INDEX[t]}"


def to_sympy(tokens: Sequence[int], constants: Sequence[float] | None = None, names: Sequence[str] | None = None):
    """A program as a sympy expression of Symbol objects, so that columns may be called N, S or lambda."""
    import sympy
    symbols = {f"x{i}": sympy.Symbol(names[i] if names else f"x{i}") for i in INDEX[np.array(tokens)] if i >= 0}
    called = {op.name: op.name.capitalize() if op.name in ("abs", "max", "min") else op.name for op in OPS}
    functions = {name: getattr(sympy, there) for name, there in called.items() if hasattr(sympy, there)}
    return sympy.S(eval(infix(tokens, constants), {**functions, **symbols, "c": sympy.Symbol("c")}))


def parse(text: str, names: Sequence[str] | None = None) -> tuple[list[int], list[float]]:
    """Tokens and constants of an expression as Python writes it. Whole powers up to 6 become products.

    Raises UserError: not such an expression, an unknown name or function.
    """
    known = {name: int(VARIABLES[i]) for i, name in enumerate(names or [f"x{i}" for i in range(len(VARIABLES))])}
    joins = {ast.Add: ADD, ast.Sub: SUB, ast.Mult: MUL, ast.Div: DIV, ast.Pow: POW}
    called = {op.name: op.arity for op in OPS}

    def refuse(what: str) -> UserError:
        return UserError(f"expression {text[:60]!r}: {what[:60]}")

    def number(x: int | float) -> float:
        if isinstance(x, bool) or not abs(x) < 1e300:
            raise refuse(f"{str(x)[:20]} is no number that can be used")
        return float(x)

    def read(node: ast.AST) -> tuple[list[int], list[float]]:
        match node:
            case ast.Name(id=name) if name in known:
                return [known[name]], [0.0]
            case ast.Constant(value=int() | float() as x):
                return ([ONE], [0.0]) if number(x) == 1 else ([C], [number(x)])
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as x)):
                return [C], [-number(x)]
            case ast.UnaryOp(op=ast.USub(), operand=a):
                (t, c) = read(a)
                return [MUL, C, *t], [0.0, -1.0, *c]
            case ast.BinOp(left=a, op=ast.Pow(), right=ast.Constant(value=int() as n)) if 2 <= n <= 6:
                (t, c) = read(a)
                if len(t) > 1000:
                    raise refuse("too long, with its powers written out")
                return [MUL] * (n - 1) + t * n, [0.0] * (n - 1) + c * n
            case ast.BinOp(left=a, op=op, right=b) if type(op) in joins:
                (s, c), (t, d) = read(a), read(b)
                return [joins[type(op)], *s, *t], [0.0, *c, *d]
            case ast.Call(func=ast.Name(id=name), args=nodes, keywords=[]) if called.get(name) == len(nodes):
                parts = list(map(read, nodes))
                return [TOKENS[name], *sum((t for t, _ in parts), [])], [0.0, *sum((c for _, c in parts), [])]
        raise refuse(f"{ast.unparse(node)} is unknown here")
    try:
        return read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise e if isinstance(e, UserError) else refuse("not an expression as Python writes it") from None


def padded(tokens: Sequence[int], L: int) -> np.ndarray:
    """A program as a row of L tokens. Raises UserError if it is longer."""
    if len(tokens) > L:
        raise UserError(f"expression {infix(tokens)[:60]}: {len(tokens)} tokens, and --max-size is {L}")
    return np.array([*tokens, *[PAD] * (L - len(tokens))], np.int8)


def canonical(tokens: Sequence[int]) -> tuple[int, ...]:
    """The program with operands of + and * in order, larger ones first, then by their tokens; without * 1 and / 1."""
    arity, commutes, one = ARITY.tolist(), COMMUTES.tolist(), (ONE,)

    def read(i: int) -> tuple[tuple[int, ...], int]:
        """The node at i in order, and where it ends."""
        t = tokens[i]
        if not arity[t]:
            return (t,), i + 1
        a, end = read(i + 1)
        if arity[t] == 1:
            return (t, *a), end
        b, end = read(end)
        if t in (MUL, DIV) and b == one:
            return a, end
        if t == MUL and a == one:
            return b, end
        if commutes[t] and (-len(a), a) > (-len(b), b):
            a, b = b, a
        return (t, *a, *b), end
    return read(0)[0]


# ---- Programs at random, and their children

@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What programs are made of. Raises UserError for one that no program fits."""
    ops: tuple[str, ...]
    variables: int
    max_size: int            # tokens of a program
    constants: bool = False  # whether a leaf may be a fitted constant, c

    def __post_init__(self):
        unknown = sorted(set(self.ops) - TOKENS.keys())
        if unknown or not self.ops:
            raise UserError(f"--ops: no operator {unknown[0][:30]!r}; there are {', '.join(TOKENS)}" if unknown
                            else "--ops: none is given")
        if not 1 <= self.variables <= len(VARIABLES) or not 3 <= self.max_size <= 100:
            raise UserError(f"a grammar of {self.variables} variables and {self.max_size} tokens: there may be "
                            f"1 to {len(VARIABLES)} and 3 to 100")

    @property
    def leaves(self) -> np.ndarray:
        return np.array([*VARIABLES[:self.variables], ONE, *[C] * self.constants])

    @property
    def operators(self) -> np.ndarray:
        return np.array([TOKENS[name] for name in self.ops])


def fitting(need: np.ndarray, room: np.ndarray, arity: np.ndarray, fill: bool) -> np.ndarray:
    """Which tokens (P, choices) of some arity may come next, for `need` (P,) missing operands and `room` tokens.

    fill: all the room must be filled, which binary operators alone can do for odd sizes only.
    """
    after, room = need[:, None] + arity - 1, room[:, None] - 1
    fits = (after >= 0) & (after <= room)
    if fill:
        fits &= ((after > 0) == (room > 0)) & (bool((arity == 1).any()) | ((room - after) % 2 == 0))
    return fits


def random_programs(rng: np.random.Generator, sizes: np.ndarray, grammar: Grammar) -> np.ndarray:
    """Programs (P, L) of these sizes; one token less where binary operators alone cannot make an even size."""
    choices = np.concatenate([grammar.leaves, grammar.operators])
    arity = ARITY[choices]
    weight = np.where(arity == 0, len(grammar.operators) / len(grammar.leaves), 1.0)
    sizes = sizes if (arity == 1).any() else sizes - (sizes % 2 == 0)
    tokens, need = np.full((len(sizes), grammar.max_size), PAD, np.int8), np.ones(len(sizes), np.int64)
    for i in range(int(sizes.max(initial=0))):
        some = np.flatnonzero(need > 0)
        odds = (weight * fitting(need[some], sizes[some] - i, arity, True)).cumsum(1)
        pick = (odds > rng.random((len(some), 1)) * odds[:, -1:]).argmax(1)
        tokens[some, i] = choices[pick]
        need[some] += arity[pick] - 1
    return tokens


def graft(a: np.ndarray, at: np.ndarray, size_a: np.ndarray, b: np.ndarray, of: np.ndarray, size_b: np.ndarray
          ) -> np.ndarray:
    """Rows of a (P, L) whose size_a (P,) entries from `at` on are replaced by size_b of b from `of` on.

    What then stands behind the L-th place is lost: the caller sees to it that nothing does.
    """
    (P, L), k = a.shape, np.arange(a.shape[1])
    at, size_a, of, size_b = (x[:, None] for x in (at, size_a, of, size_b))
    inside, moved = (k >= at) & (k < at + size_b), np.where(k < at, k, k + size_a - size_b)
    source = np.where(inside, k + of - at + (L + 1) * P, np.minimum(moved, L))  # what is behind a row is 0
    both = np.pad(np.concatenate([a, b]), ((0, 0), (0, 1))).ravel()
    return both.take(source + (L + 1) * np.arange(P)[:, None])


Programs = tuple[np.ndarray, np.ndarray]  # tokens (P, L) and constants (P, L)


def breed(rng: np.random.Generator, a: Programs, b: Programs, grammar: Grammar) -> Programs:
    """A child of each pair of parents: of 20, 12 are crossed, 5 get a new subtree of up to 5 tokens, and in 3, and
    where the child would be too large, a token is changed."""
    (tokens, constants), P = a, len(a[0])
    kind, rows = rng.random(P), np.arange(P)
    crossed, choices = kind < 0.6, np.concatenate([grammar.leaves, grammar.operators])
    new = np.flatnonzero(~crossed)
    donor = b[0].copy()
    donor[new] = random_programs(rng, rng.integers(1, min(6, grammar.max_size + 1), len(new)), grammar)
    size, donor_size = shape_of(tokens).size, shape_of(donor).size
    at = (rng.random(P) * size[:, 0]).astype(np.int64)
    of = np.where(crossed, rng.random(P) * donor_size[:, 0], 0).astype(np.int64)
    size_a, size_b = size[rows, at], donor_size[rows, of]
    fits = (size[:, 0] - size_a + size_b <= tokens.shape[1]) & (kind < 0.85)
    size_a, size_b = np.where(fits, size_a, 0), np.where(fits, size_b, 0)  # without a graft where it would not fit
    child = graft(tokens, at, size_a, donor, of, size_b)
    if grammar.constants:
        donated = np.where(crossed[:, None], b[1], rng.normal(size=constants.shape))
        constants = graft(constants, at, size_a, donated, of, size_b)
    for arity in (0, 1, 2):
        some = np.flatnonzero(~fits & (ARITY[tokens[rows, at]] == arity))
        alike = choices[ARITY[choices] == arity]
        if len(some) and len(alike):
            child[some, at[some]] = rng.choice(alike, len(some))
            if grammar.constants:
                constants[some, at[some]] = rng.normal(size=len(some))
    return child, constants


def tournament(rng: np.random.Generator, there: np.ndarray) -> np.ndarray:
    """The best of 3 of `there` (P,) programs, which are in order: its place (P,)."""
    return (rng.random((len(there), 3)) * there[:, None]).astype(np.int64).min(1)


# ---- Problems

class Problems(NamedTuple):
    """Q data sets. The points of a test, and those on a range twice as wide, are for scoring alone."""
    X: np.ndarray       # (Q, N, V)
    y: np.ndarray       # (Q, N)
    X_test: np.ndarray  # (Q, n_test, V)
    y_test: np.ndarray
    X_wide: np.ndarray  # (Q, n_test, V)
    y_wide: np.ndarray
    truth: np.ndarray   # (Q, L) programs


def check_data(X: np.ndarray, y: np.ndarray) -> None:
    """Raise UserError for a data set X (N, V), y (N,) that no formula can be searched for."""
    X, y = as_data(X, y)
    if y.max() == y.min():
        raise UserError(f"y is {y[0]} everywhere; there is nothing to search for")


def as_data(X, y) -> tuple[np.ndarray, np.ndarray | None]:
    """X (N, V) and y (N,) in float64. Raises UserError for what cannot be used."""
    try:
        if np.iscomplexobj(X) or np.iscomplexobj(y):
            raise TypeError("complex")
        X, y = np.asarray(X, np.float64), None if y is None else np.asarray(y, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"X and y: not real numbers ({e})") from None
    if X.ndim != 2 or not X.shape[1] or (y is not None and y.shape != X.shape[:1]):
        both = f"X has the shape {X.shape}" + (f" and y {y.shape}" if y is not None else "")
        raise UserError(f"{both}: expected (N, V) and (N,), V 1 or more")
    for name, x in (("X", X), ("y", y)) if y is not None else ():
        if not np.isfinite(x).all():
            raise UserError(f"{name} has a value that is not finite, in row {int(np.argwhere(~np.isfinite(x))[0, 0])}")
    if y is not None and len(y) < 3:
        raise UserError(f"{len(y)} points; there must be 3 or more")
    return X, y


def make_problems(rng: np.random.Generator, truth: np.ndarray, n_points: int, variables: int,
                  constants: np.ndarray | None = None, ranges: Sequence[tuple] = RANGES,
                  n_test: int = N_TEST) -> tuple[Problems, np.ndarray]:
    """A data set for each program (P, L) that has values on one of the ranges; which programs (Q,) these are. The ends
    of a range are of all variables, or of each (V,).

    Values are usable if they are finite, below 10,000, and not all the same.
    """
    parts, which, todo = [], [], np.arange(len(truth))
    for low, high in ranges:
        middle, half = (low + high) / 2, (high - low) / 2
        start = np.where(np.asarray(low) > 0, np.asarray(low) / 2, middle - 2 * half)  # of a range twice as wide
        bounds = (start, start + 4 * half)
        X, wide = (rng.uniform(*ends, (len(todo), n, variables)) for ends, n in (
            ((low, high), n_points + n_test), (bounds, n_test)))
        at, own = np.arange(len(todo)), None if constants is None else constants[todo]
        y, y_wide = (evaluate(truth[todo], x, at, own) for x in (X, wide))
        with np.errstate(all="ignore"):
            usable = np.isfinite(y).all(1) & (np.abs(y).max(1) < 1e4) & (y[:, :n_points].std(1) > 1e-3)
        parts.append([x[usable] for x in (X[:, :n_points], y[:, :n_points], X[:, n_points:], y[:, n_points:],
                                          wide, y_wide, truth[todo])])
        which.append(todo[usable])
        todo = todo[~usable]
    order = np.argsort(np.concatenate(which))
    return Problems(*(np.concatenate(x)[order] for x in zip(*parts, strict=True))), np.sort(np.concatenate(which))


def fixed_points(variables: int) -> np.ndarray:
    """(1, 24, variables): half of them positive, where logarithms and roots have values."""
    rng = np.random.default_rng(FUNCTIONS)
    points = np.concatenate([rng.uniform(0.3, 3.0, (12, 10)), rng.uniform(-3.0, 3.0, (12, 10))])
    return points[None, :, :variables]


def fingerprints(tokens: np.ndarray, variables: int) -> list[bytes]:
    """What tells functions apart: values at fixed points, 9 digits of each; equal ones are taken for the same."""
    values = evaluate(tokens, fixed_points(variables))
    with np.errstate(all="ignore"):
        unit = 10.0 ** (np.floor(np.log10(np.abs(values))) - 8)
        rounded = np.where(values == 0, 0.0, np.round(values / unit) * unit)
    return [row.tobytes() for row in np.where(np.isnan(rounded), np.nan, rounded)]


def standardised(values: np.ndarray) -> list[bytes]:
    """What values (P, 24) have in common with all that differ by a factor and a constant; b"" for constants."""
    finite = np.abs(values) < 1e12
    n, x = np.maximum(1, finite.sum(1, keepdims=True)), np.where(finite, values, 0.0)
    size = np.abs(x).max(1)
    x = np.where(finite, x - x.sum(1, keepdims=True) / n, 0.0)
    scale = np.sqrt((x ** 2).sum(1, keepdims=True) / n)
    both = [np.where(finite, np.round(sign * 1e5 * x / np.maximum(scale, 1e-300)), 1e9).astype(np.int32)
            for sign in (1, -1)]
    return [min(a.tobytes(), b.tobytes()) if varies else b""
            for a, b, varies in zip(*both, scale[:, 0] > 1e-9 * size, strict=True)]


def classes_of(tokens: np.ndarray, variables: int) -> list[bytes]:
    """What each function is up to a factor, a constant, and the names of its variables."""
    points = fixed_points(variables)
    return list(map(min, zip(*(standardised(evaluate(tokens, points[:, :, order]))
                               for order in permutations(range(variables))), strict=True)))


def expanded(tokens: Sequence[int], i: int = 0) -> list[list[int]]:
    """The terms of a program's node once products of sums are written out."""
    t, starts = tokens[i], operands(tokens, i)[0]
    if t in (ADD, SUB):
        return expanded(tokens, starts[0]) + expanded(tokens, starts[1])
    if t == MUL:
        return [[MUL, *a, *b] for a in expanded(tokens, starts[0]) for b in expanded(tokens, starts[1])]
    end = operands(tokens, i)[1]
    if t == DIV:
        return [[DIV, *a, *tokens[starts[1]:end]] for a in expanded(tokens, starts[0])]
    return [list(tokens[i:end])]


def share_of(tokens: np.ndarray, variables: int) -> np.ndarray:
    """Numbers (P,) in 0..1, by which functions are split: the same for all with the same terms, whatever the weights.

    A search with weights solves a problem by any function of the same terms, so a net that was taught one knows all.
    """
    terms = [expanded(row) for row in tokens.tolist()]
    ends, points = np.cumsum(list(map(len, terms))), fixed_points(variables)
    L = max((len(term) for row in terms for term in row), default=1)
    flat = np.array([term + [PAD] * (L - len(term)) for row in terms for term in row], np.int8).reshape(-1, L)
    least = [b"\xff"] * len(tokens)
    for order in permutations(range(variables)):
        parts = standardised(evaluate(flat, points[:, :, order]))
        keys = (b"".join(sorted(set(parts[start:end]))) for start, end in zip([0, *ends[:-1]], ends, strict=True))
        least = list(map(min, least, keys))
    return np.array([int.from_bytes(hashlib.sha256(key).digest()[:4], "big") / 2 ** 32 for key in least])


def subtrees(tokens: np.ndarray) -> np.ndarray:
    """All nodes of programs (P, L) as programs (n, L)."""
    p, i = np.nonzero(tokens != PAD)
    size = shape_of(tokens).size[p, i]
    k = np.arange(tokens.shape[1])
    moved = np.take_along_axis(tokens[p], np.minimum(k + i[:, None], len(k) - 1), 1)
    return np.where(k < size[:, None], moved, PAD).astype(np.int8)


def nested(tokens: np.ndarray) -> np.ndarray:
    """How many functions of programs (P, L) have a function in them, as sin of sin(exp(x0)) has; people seldom write
    such.
    """
    called = (ARITY[tokens] == 1) & (tokens != SQUARE)
    before = np.pad(np.cumsum(called, 1), ((0, 0), (1, 0)))  # functions before each place
    last = np.arange(tokens.shape[1]) + shape_of(tokens).size
    inside = np.take_along_axis(before, np.minimum(last, tokens.shape[1]), 1) - before[:, :-1]
    return (called & (inside > 1)).sum(1)


def sample_functions(rng: np.random.Generator, grammar: Grammar, n: int, sizes: Sequence[int]
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Different functions among n random programs: the shortest program of each (P, L), in canonical order, and its
    share (P,). Those without values at most of the fixed points are left out."""
    tokens = np.unique(random_programs(rng, rng.choice(np.array(sizes), n), grammar), axis=0)
    tokens = tokens[nested(tokens) == 0]
    tokens = np.unique(subtrees(tokens), axis=0)  # for exp(log(u)) to be found the same as u
    tokens = np.unique([padded(canonical(row), grammar.max_size) for row in tokens.tolist()], axis=0)
    tokens = tokens[np.lexsort((*tokens.T[::-1], (tokens != PAD).sum(1)))]  # shorter ones first
    first: dict[bytes, int] = {}
    for i, key in enumerate(fingerprints(tokens, grammar.variables)):
        if np.isfinite(np.frombuffer(key)).sum() >= 12:
            first.setdefault(key, i)
    tokens = tokens[list(first.values())]
    return tokens, share_of(tokens, grammar.variables)


# ---- Search

class Island(NamedTuple):
    """The best programs of each problem, best first: (Q, M, L) and (Q, M). An empty place has the score inf."""
    tokens: np.ndarray
    constants: np.ndarray
    nmse: np.ndarray
    score: np.ndarray
    ids: np.ndarray

    def taken(self, order: np.ndarray) -> Island:
        return Island(*(np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1) for x in self))


def empty_island(Q: int, M: int, L: int) -> Island:
    return Island(np.full((Q, M, L), PAD, np.int8), np.zeros((Q, M, L)), np.full((Q, M), np.inf),
                  np.full((Q, M), np.inf), np.full((Q, M), -1))


def rank_among_equals(x: np.ndarray) -> np.ndarray:
    """How many equal ones stand before each of x (n,)."""
    order = np.argsort(x, kind="stable")
    rank = np.empty(len(x), np.int64)
    rank[order] = np.arange(len(x)) - np.searchsorted(x[order], x[order])
    return rank


class Front(NamedTuple):
    """Of each problem and each size the program of the least error, (Q, S, L) and (Q, S)."""
    tokens: np.ndarray
    constants: np.ndarray
    nmse: np.ndarray
    weighted: np.ndarray  # whether it is so with weights of its terms
    id: np.ndarray
    at: np.ndarray        # evaluations spent by then
    source: np.ndarray    # who proposed it: what Search.source was


def empty_front(Q: int, L: int) -> Front:
    S = L + 2 * MAX_TERMS + 3  # sizes: the tokens, and with weights those too
    return Front(np.full((Q, S, L), PAD, np.int8), np.zeros((Q, S, L)), np.full((Q, S), np.inf), np.zeros((Q, S), bool),
                 *(np.full((Q, S), -1) for _ in range(3)))


class Search:
    """A search of all problems in lockstep. One cache counts distinct evaluations, the same for all methods.

    An island is `raw`, where a program is measured as it is, or `terms`, where its additive terms get the weights of
    least squares, which costs one evaluation more.
    """

    def __init__(self, problems: Problems, grammar: Grammar, *, budget: int, population: int, islands: Sequence[str],
                 seed: int | Sequence[int], parsimony: float = 0.05, record: bool = False, loss: Loss | None = None,
                 exact: float = EXACT):
        Q, M, L = len(problems.y), population, grammar.max_size
        if not set(islands) <= {"raw", "terms"}:
            raise ValueError(f"islands {islands}: raw and terms are known")
        for X, y in zip(problems.X, problems.y, strict=True):
            check_data(X, y)
        self.problems, self.grammar, self.budget, self.parsimony = problems, grammar, budget, parsimony
        self.rng, self.loss = np.random.default_rng([*np.atleast_1d(seed), SEARCH]), loss or Loss(problems.y)
        self.islands = {kind: empty_island(Q, M, L) for kind in islands}
        self.cache: set[int] = set()
        self.spent, self.proposed, self.ended_at = np.zeros(Q, int), np.zeros(Q, int), np.full(Q, -1)
        self.front, self.exact, self.source, self.gains = empty_front(Q, L), exact, 0, np.zeros(3)
        self.n_ids, self.record, self.births, self.fitted, self.idle = 0, record, [], set(), 0

    def active(self) -> np.ndarray:
        """Problems that are neither solved on their own points nor out of evaluations; none where nothing is new."""
        return np.flatnonzero((self.ended_at < 0) & (self.spent < self.budget) & (self.idle < IDLE))

    def offer(self, kind: str, of: np.ndarray, programs: Programs, parents: np.ndarray | None = None) -> None:
        """Evaluate the programs (P, L) for problems `of` (P,) that are new to them, and let the best survive."""
        np.add.at(self.proposed, of, 1)
        shape = shape_of(programs[0])
        new, at = self.novel(kind, of, programs, shape)
        self.idle = 0 if len(new) else self.idle + 1
        if self.record:
            nobody = np.full((len(of), 2), -1)
            self.births.append((of[new], programs[0][new], (nobody if parents is None else parents)[new]))
        if not len(new):
            return
        self.judge(kind, of[new], (programs[0][new], programs[1][new]), at, take(shape, new))

    def fit(self, kind: str, iterations: int = 8) -> None:
        """Fit the constants of each problem's best twentieth, once each program.

        Every residual and every Jacobian counts as an evaluation.
        """
        island, cost = self.islands[kind], 2 * (iterations + 1)
        some = island.tokens[:, :max(1, island.score.shape[1] // 20)]
        q, i = np.nonzero((some == C).any(2) & np.isfinite(island.score[:, :some.shape[1]]))
        fresh = [k for k, key in enumerate(island.ids[q, i].tolist()) if key not in self.fitted]
        q, i = q[fresh], i[fresh]
        at = self.spent[q] + cost * (rank_among_equals(q) + 1)
        paid = (self.ended_at[q] < 0) & (at <= self.budget)
        q, i, at = q[paid], i[paid], at[paid]
        if not len(q):
            return
        self.fitted.update(island.ids[q, i].tolist())
        tokens = island.tokens[q, i]
        tokens = tokens[:, :longest(tokens)]
        constants = fit_constants(tokens, island.constants[q, i][:, :tokens.shape[1]], self.problems.X, self.loss, q,
                                  iterations, kind == "terms")
        np.maximum.at(self.spent, q, at)
        constants = np.pad(constants, ((0, 0), (0, self.grammar.max_size - tokens.shape[1])))
        tokens = island.tokens[q, i]
        self.judge(kind, q, (tokens, constants), at, shape_of(tokens))

    def judge(self, kind: str, of: np.ndarray, programs: Programs, at: np.ndarray, shape: Shape) -> None:
        """Errors and scores of programs; the best of them survive. at (P,): the evaluations spent by then."""
        (tokens, constants), X, size = programs, self.problems.X, shape.size[:, 0]
        used = constants if self.grammar.constants else None
        if kind == "terms":
            errors, n = fit_terms(tokens, X, self.loss, of, used, shape)
            full_size = size + 2 * np.minimum(n, MAX_TERMS) + 2
        else:
            errors, full_size = self.loss.fitness(evaluate(tokens, X, of, used, shape=shape), of), size
            if used is not None:
                N = X.shape[1]
                free = np.maximum(0, N - (tokens == C).sum(1))
                with np.errstate(all="ignore"):
                    errors = errors * (N / free) ** 2
        with np.errstate(all="ignore"):
            nmse = errors / self.loss.of_constant[of]
        nmse[~np.isfinite(nmse)] = np.inf
        score = np.log10(nmse + 1e-30) + self.parsimony * size
        ids = self.n_ids + np.arange(len(of))
        self.n_ids += len(of)
        self.note(of, full_size, Front(tokens, constants, nmse, np.full(len(of), kind == "terms"), ids, at,
                                       np.full(len(of), self.source)))
        self.select(kind, of, (tokens, constants, nmse, score, ids))

    def novel(self, kind: str, of: np.ndarray, programs: Programs, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n,) that are not in the cache and within the budget; evaluations (n,) spent when each is done."""
        (tokens, constants), cost = programs, 1 + (kind == "terms")
        salt = (of * len(self.islands) + list(self.islands).index(kind) + 1).astype(np.uint64)
        keys = keys_of(tokens, shape) ^ (salt * np.uint64(0x2545F4914F6CDD1D))
        if self.grammar.constants:  # the same program with other constants is another one
            sizes = np.sqrt(np.arange(2, tokens.shape[1] + 2))
            keys = keys ^ (np.where(tokens == C, constants, 0.0) * sizes).sum(1).view(np.uint64)
        _, first = np.unique(keys, return_index=True)
        first = np.sort(first)  # of equal ones the first counts
        known = np.fromiter(map(self.cache.__contains__, keys[first].tolist()), bool, len(first))
        new = first[~known]
        at = self.spent[of[new]] + cost * (rank_among_equals(of[new]) + 1)
        over = at > self.budget
        new, at = new[~over], at[~over]
        np.maximum.at(self.spent, of[new], at)
        self.spent[np.unique(of[first[~known]][over])] = self.budget  # what is left does not pay for another
        self.cache.update(keys[new].tolist())
        return new, at

    def note(self, of: np.ndarray, size: np.ndarray, born: Front) -> None:
        """Keep the best program of each size; a problem ends where one is exact. born: its fields without the axis
        Q.
        """
        better = np.flatnonzero((born.nmse < self.front.nmse[of, size]) & (self.ended_at[of] < 0))
        order = better[np.lexsort((born.nmse[better], size[better], of[better]))]
        _, first = np.unique(of[order] * self.front.nmse.shape[1] + size[order], return_index=True)
        some = order[first]
        self.gains[self.source] += len(some)
        for old, new in zip(self.front, born, strict=True):
            old[of[some], size[some]] = new[some]
        for i in some[born.nmse[some] <= self.exact]:
            q = of[i]
            self.ended_at[q] = born.at[i] if self.ended_at[q] < 0 else min(self.ended_at[q], born.at[i])

    def select(self, kind: str, of: np.ndarray, born: tuple[np.ndarray, ...]) -> None:
        """The island keeps its M best; of programs with equal errors, which are the same function, the best alone."""
        island = self.islands[kind]
        some, rows = np.unique(of, return_inverse=True)
        place = rank_among_equals(of)
        M, B = island.score.shape[1], int(place.max()) + 1
        merged = empty_island(len(some), M + B, self.grammar.max_size)
        for both, old, new in zip(merged, island, born, strict=True):
            both[:, :M] = old[some]
            both[rows, M + place] = new
        order = np.argsort(merged.score, 1, kind="stable")
        errors = np.take_along_axis(np.round(np.log(merged.nmse + 1e-300), 9), order, 1)
        by_error = np.argsort(errors, 1, kind="stable")
        order, errors = (np.take_along_axis(x, by_error, 1) for x in (order, errors))
        twins = np.where(errors[:, 1:] == errors[:, :-1], np.inf, 0)
        merged.score[np.arange(len(order))[:, None], order[:, 1:]] += twins
        merged = merged.taken(np.argsort(merged.score, 1, kind="stable")[:, :M])
        for old, new in zip(island, merged, strict=True):
            old[some] = new

    def begin(self) -> None:
        for kind in self.islands:
            self.sow(kind, np.arange(len(self.spent)))

    def sow(self, kind: str, problems: np.ndarray) -> None:
        """Random programs of up to 7 tokens, in place of what these problems' islands hold."""
        island = self.islands[kind]
        for old, new in zip(island, empty_island(1, *island.tokens.shape[1:]), strict=True):
            old[problems] = new
        of = np.repeat(problems, island.score.shape[1])
        sizes = self.rng.integers(1, min(8, self.grammar.max_size + 1), len(of))
        tokens = random_programs(self.rng, sizes, self.grammar)
        self.offer(kind, of, (tokens, self.rng.normal(size=tokens.shape)))

    def best(self) -> Front:
        """The program of the least error of each problem, the smallest of equal ones: fields without the axis S."""
        return take(self.front, (np.arange(len(self.spent)), self.front.nmse.argmin(1)))

    def breed(self, kind: str, n: int) -> None:
        """n children for each active problem, of parents that won tournaments of 3; random programs where none is."""
        empty = np.repeat([q for q in self.active() if self.islands[kind].score[q, 0] == np.inf], n).astype(int)
        if len(empty):
            sizes = self.rng.integers(1, self.grammar.max_size + 1, len(empty))
            tokens = random_programs(self.rng, sizes, self.grammar)
            self.offer(kind, empty, (tokens, self.rng.normal(size=tokens.shape)))
        there = np.isfinite(self.islands[kind].score).any(1)
        of = np.repeat(self.active()[there[self.active()]], n)
        self.offer(kind, of, *self.children(kind, of))

    def children(self, kind: str, of: np.ndarray) -> tuple[Programs, np.ndarray]:
        """A child for each of the problems (P,), and the ids (P, 2) of its parents."""
        island = self.islands[kind]
        there = np.isfinite(island.score).sum(1)[of]
        a, b = (tournament(self.rng, there) for _ in range(2))
        parents = [(island.tokens[of, i], island.constants[of, i]) for i in (a, b)]
        return breed(self.rng, *parents, self.grammar), np.stack([island.ids[of, a], island.ids[of, b]], 1)


# ---- Examples: what the net learns from

class Examples(NamedTuple):
    """n moments of GP runs: the programs that the net is shown, and the one that it shall answer with."""
    members: np.ndarray     # (n, M, L), best first
    targets: np.ndarray     # (n, L)
    generation: np.ndarray  # (n,)
    function: np.ndarray    # (n,) which of the split's functions the data are of


class Data(NamedTuple):
    """Functions (n, L) and examples of train, val and test; no function is in two of them."""
    functions: dict[str, np.ndarray]
    examples: dict[str, Examples]


SPLITS = ("train", "val", "test")


def generate(args: argparse.Namespace) -> Data:
    """Sample functions, split them by what they are, run GP on each, and take examples of its generations."""
    grammar, rng = config_of(args).grammar, np.random.default_rng([args.seed, FUNCTIONS])
    tokens, share = sample_functions(rng, grammar, args.functions, range(1, args.target_size + 1))
    size = (tokens != PAD).sum(1)
    tokens, share = tokens[size >= 3], share[size >= 3]
    split = np.where(share < TEST_SHARE, 2, np.where(share < TEST_SHARE + VAL_SHARE, 1, 0))
    highest: dict[bytes, int] = {}  # by class: what is in test, too, is left out of train and val
    classes = classes_of(tokens, args.variables)
    for key, i in zip(classes, split.tolist(), strict=True):
        highest[key] = max(i, highest.get(key, 0))
    split = np.where(split == [highest[key] for key in classes], split, -1)
    functions, examples = {}, {}
    for i, name in enumerate(SPLITS):
        if not (split == i).any():
            raise UserError(f"--functions {args.functions}: there is none for {name} among them")
        rng = np.random.default_rng([args.seed, TRAJECTORY, i])
        problems, usable = make_problems(rng, tokens[split == i], args.points, args.variables)
        if not len(usable):
            raise UserError(f"--functions {args.functions}: those of {name} have no usable values")
        functions[name] = tokens[split == i][usable]
        parts = [trajectories(take(problems, slice(k, k + 2000)), grammar, args, (args.seed, TRAJECTORY, i, k), k)
                 for k in range(0, len(usable), 2000)]
        examples[name] = Examples(*map(np.concatenate, zip(*parts, strict=True)))
    refuse_overlap(functions, args.variables)
    return Data(functions, examples)


def refuse_overlap(functions: dict[str, np.ndarray], variables: int) -> None:
    """Raise UserError if functions of one class are in two splits."""
    seen: dict[bytes, str] = {}
    for name, tokens in functions.items():
        for row, key in zip(tokens, classes_of(tokens, variables), strict=True):
            if seen.setdefault(key, name) != name:
                raise UserError(f"the function {infix(row)} of {name}, or one of its class, is in {seen[key]}, too")


def trajectories(problems: Problems, grammar: Grammar, args: argparse.Namespace, seed: Sequence[int], first: int
                 ) -> Examples:
    """Examples of GP runs of --generations on these problems, whose functions are the split's from `first` on.

    The target is the solution; an ancestor of the run's best among the next generation, where there is one; or a
    child that GP might have next.
    """
    s = Search(problems, grammar, budget=1 << 40, population=GP_POPULATION, islands=["raw"], seed=seed, record=True)
    s.begin()
    parts = []
    for generation in range(args.generations):
        of = s.active()
        targets = s.children("raw", of)[0][0] if args.objective == "gp" else problems.truth[of]
        parts.append((s.islands["raw"].tokens[of], targets, np.full(len(of), generation), of))
        s.breed("raw", GP_POPULATION)
    out = Examples(*map(np.concatenate, zip(*parts, strict=True)))
    if args.objective == "ancestor":
        chosen, there = ancestors(s, out)
        out = take(out._replace(targets=chosen), there)
    return out._replace(function=out.function + first)


def ancestors(s: Search, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """A program (n, L) of the next generation for each example, an ancestor of the best; whether (n,) there is one."""
    of, tokens, parents = (np.concatenate(x) for x in zip(*s.births, strict=True))
    generation = np.repeat(np.arange(len(s.births)), [len(b[0]) for b in s.births])  # 0: those of `begin`
    wanted = np.zeros(len(of), bool)
    best = s.best()
    wanted[best.id[best.id >= 0]] = True
    for i in range(len(of) - 1, -1, -1):  # children are born behind their parents
        if wanted[i]:
            wanted[parents[i][parents[i] >= 0]] = True
    order = s.rng.permutation(np.flatnonzero(wanted))
    # Of several in a generation the last one stays, which in this order is any of them.
    born_in = {(int(of[i]), int(generation[i])): i for i in order.tolist()}
    chosen = [born_in.get((q, g + 1), -1) for q, g in
              zip(examples.function.tolist(), examples.generation.tolist(), strict=True)]
    return tokens[chosen], np.array(chosen, np.int64) >= 0


# ---- Model. B examples, M members, N points, V variables, T tokens of context, D width

N_FEATURES = 11


def features(x: torch.Tensor) -> torch.Tensor:
    """Numbers of any size as (..., N_FEATURES) between about -2 and 2: coarse, fine, and whether they are finite."""
    finite = torch.isfinite(x)
    x = torch.where(finite, x, 0.0).clamp(-1e6, 1e6)
    scale = torch.asinh(x)
    waves = scale[..., None] * torch.tensor([1.0, 2.0, 4.0, 8.0], device=x.device)
    coarse = torch.stack([scale / 2, x.clamp(-4, 4) / 2, finite.float() - 1], -1)
    return torch.cat([coarse, waves.sin(), waves.cos()], -1)


class Context(NamedTuple):
    """What the net sees of a problem: its points, and programs with their values on them, best first."""
    X: torch.Tensor        # (B, N, V)
    y: torch.Tensor        # (B, N)
    members: torch.Tensor  # (B, M, L) tokens
    values: torch.Tensor   # (B, M, N)


def encode_context(X: np.ndarray, y: np.ndarray, members: np.ndarray, c: Config, constants: np.ndarray | None = None
                   ) -> Context:
    """The context of data X (B, N, V), y (B, N) and programs (B, M, L); training and search call this alone.

    It is trimmed to the first `points` points and the first `members` programs; places that are left are empty.
    constants (B, M, L): of tokens c, which the net is shown as 1, with the values that they have.
    """
    B, X, y = len(X), X[:, :c.points], y[:, :c.points]

    def rows(x: np.ndarray) -> np.ndarray:  # (B, M, L) -> (B members, max_size)
        x = x[:, :c.members]
        return np.pad(x, ((0, 0), (0, c.members - x.shape[1]), (0, c.max_size - x.shape[2]))).reshape(-1, c.max_size)
    tokens, numbers = rows(members), rows(members * 0.0 if constants is None else constants)
    there = tokens[:, 0] != PAD
    values = np.full((len(tokens), X.shape[1]), np.nan)
    values[there] = evaluate(tokens[there], X, np.repeat(np.arange(B), c.members)[there], numbers[there])
    tokens = np.where(tokens == C, ONE, tokens).reshape(B, c.members, -1)
    X = np.pad(X, ((0, 0), (0, 0), (0, c.variables - X.shape[2])))
    values = values.reshape(B, c.members, X.shape[1])
    X, y, values = (torch.from_numpy(np.clip(x, -1e15, 1e15).astype(np.float32)) for x in (X, y, values))
    return Context(X, y, torch.from_numpy(tokens.astype(np.int64)), values)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is needed to rebuild a net. Raises UserError for one that cannot be."""
    arch: str
    ops: tuple[str, ...]
    variables: int
    max_size: int
    points: int
    members: int
    hidden: int
    layers: int
    heads: int

    def __post_init__(self):
        _ = self.grammar  # which checks operators and sizes
        for name in ("points", "members", "hidden", "layers", "heads"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)!r:.40}, not 1 or more")
        if self.hidden % self.heads or self.arch not in ("own", "gpt2"):
            raise UserError(f"--hidden {self.hidden} cannot be divided by --heads {self.heads}"
                            if self.hidden % self.heads else f"--arch is {self.arch!r:.40}, not own or gpt2")

    @property
    def grammar(self) -> Grammar:
        return Grammar(ops=self.ops, variables=self.variables, max_size=self.max_size)


def format_of(c: Config) -> str:
    """A hash of how contexts are written, from an example of one: a net is used only where it is the same."""
    X = np.linspace(-2, 3, c.points * c.variables).reshape(1, c.points, c.variables)
    context = encode_context(X, X.sum(2), np.array([[[X0], [ONE]]], np.int8), c)
    digest = hashlib.sha256(repr([(name, TOKENS[name]) for name in c.ops]).encode())
    for x in (context.members, *(features(x) for x in (context.X, context.y, context.values))):
        digest.update(np.round(7.07 * x.double().numpy()).astype(np.int64).tobytes())
    return digest.hexdigest()[:12]


DATA_TOKENS = 4  # of a context, for the data; behind them one for each member


class Reader(nn.Module):
    """A context to T vectors (B, T, D): the data's, pooled by attention, and one of each member.

    A member's vector knows its tokens, and at each point its value f, y, y - f and y / f: what would be left to find.
    """

    def __init__(self, c: Config):
        super().__init__()
        D, H = c.hidden, 96
        self.point = nn.Sequential(nn.Linear((c.variables + 1) * N_FEATURES, H), nn.GELU(), nn.Linear(H, H), nn.GELU())
        self.pool, self.data = nn.Linear(H, DATA_TOKENS, bias=False), nn.Linear(H, D)
        self.place = nn.Linear((c.variables + 1) * N_FEATURES, H, bias=False)
        self.value = nn.Linear(3 * N_FEATURES, H)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(H, H), nn.GELU())
        self.member = nn.Linear(2 * H + N_FEATURES, D)
        self.letters, self.program = nn.Embedding(VOCAB, 16), nn.Linear(16 * c.max_size, D)
        self.kind = nn.Parameter(0.02 * torch.randn(DATA_TOKENS + c.members, D))

    def forward(self, context: Context) -> torch.Tensor:
        X, y, members, f = context
        place = features(torch.cat([X, y[..., None]], -1)).flatten(2)
        points = self.point(place)                                                       # (B, N, H)
        data = self.data(self.pool(points).softmax(1).transpose(1, 2) @ points)          # (B, DATA_TOKENS, D)
        target = y[:, None]
        values = self.value(features(torch.stack([f, target - f, target / f], -1)).flatten(3))
        values = self.mix(values + self.place(place)[:, None])                           # (B, M, N, H)
        error = ((f - target) ** 2).mean(2) / y.var(1, correction=0)[:, None]
        error = error.nan_to_num(1e9, 1e9).clamp(1e-9, 1e9)
        x = torch.cat([values.mean(2), values.amax(2), features(error.log())], -1)       # (B, M, 2 H + N_FEATURES)
        x = self.member(x) + self.program(self.letters(members).flatten(2))              # (B, M, D)
        return torch.cat([data, x], 1) + self.kind


Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each block, (B, heads, tokens so far, D / heads)


class Block(nn.Module):
    """Causal attention and an MLP of squared ReLU, each added to what comes in (pre-norm)."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None, n_context: int = 0
                ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """x (B, n, D) behind `past`; the first n_context of x see each other. Returns (B, n, D), and past with x."""
        B, n, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = torch.ones(n, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - n)
        seen[:n_context, :n_context] = True
        # Written out: on a CPU torch's own attention with a mask takes longer.
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -1e4)
        x = x + self.out((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(B, n, D))
        return x + self.down(F.relu(self.up(self.norm2(x))).square()), (k, v)


class Transformer(nn.Module):
    """Blocks over vectors (B, n, D), behind a past."""

    def __init__(self, c: Config):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(Block(c.hidden, c.heads) for _ in range(c.layers)), nn.RMSNorm(c.hidden)

    def forward(self, x: torch.Tensor, past: Past | None = None, n_context: int = 0) -> tuple[torch.Tensor, Past]:
        new = []
        for i, block in enumerate(self.blocks):
            x, both = block(x, past[i] if past else None, n_context)
            new.append(both)
        return self.norm(x), new

    @staticmethod
    def chosen(past: Past, rows: torch.Tensor) -> Past:
        return [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in past]


class GPT2(nn.Module):
    """transformers' GPT-2 in the same place, as a comparison."""

    def __init__(self, c: Config):
        super().__init__()
        from transformers import GPT2Config, GPT2Model
        self.body = GPT2Model(GPT2Config(
            vocab_size=1, bos_token_id=None, eos_token_id=None, n_embd=c.hidden, n_layer=c.layers, n_head=c.heads,
            n_positions=DATA_TOKENS + c.members + c.max_size + 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def forward(self, x: torch.Tensor, past=None, n_context: int = 0):
        out = self.body(None, past, inputs_embeds=x, use_cache=True)
        return out.last_hidden_state, out.past_key_values

    @staticmethod
    def chosen(past, rows: torch.Tensor):
        past.batch_select_indices(rows)
        return past


class Net(nn.Module):
    """Reads a context, and gives logits of a program's tokens one behind the other."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.reader, self.embed = Reader(c), nn.Embedding(VOCAB, c.hidden)
        self.place = nn.Parameter(0.02 * torch.randn(c.max_size + 1, c.hidden))
        self.body = (Transformer if c.arch == "own" else GPT2)(c)
        self.head = nn.Linear(c.hidden, VOCAB, bias=False)

    def forward(self, context: Context, targets: torch.Tensor) -> torch.Tensor:
        """Logits (B, n, VOCAB) of the targets (B, n), each from the context and the targets before it."""
        read = self.read(context)
        before = F.pad(targets[:, :-1], (1, 0), value=BOS).to(read.device)
        x = torch.cat([read, self.embed(before) + self.place[:before.shape[1]]], 1)
        x, _ = self.body(x, n_context=read.shape[1])
        return self.head(x[:, read.shape[1]:])

    def read(self, context: Context) -> torch.Tensor:
        return self.reader(Context(*(x.to(self.place.device) for x in context)))

    @torch.no_grad()
    def sample(self, context: Context, n: int, generator: torch.Generator, temperature: float = 1.0,
               masked: bool = True, variables: int | None = None) -> np.ndarray:
        """n programs (B, n, L) for each context; temperature 0: the likeliest token each time.

        masked: only tokens that can be part of a program of up to L tokens, of the first `variables` (default: all).
        Otherwise rows may be no programs: they hold what was sampled up to EOS.
        """
        size, grammar = max(1, SAMPLED // n), self.config.grammar
        choices = np.concatenate([replace(grammar, variables=variables or grammar.variables).leaves, grammar.operators])
        parts = [take(context, slice(k, k + size)) for k in range(0, len(context.y), size)]
        return np.concatenate([self.continued(self.read(part), n, generator, temperature, choices if masked else None)
                               for part in parts])

    def continued(self, read: torch.Tensor, n: int, generator: torch.Generator, temperature: float,
                  choices: np.ndarray | None) -> np.ndarray:
        """The same of contexts that are read (B, T, D). choices: tokens that may come, None: unmasked."""
        c, device = self.config, read.device
        _, past = self.body(read, n_context=read.shape[1])
        tokens = np.full((len(read) * n, c.max_size), PAD, np.int8)
        rows, need = np.arange(len(tokens)), np.ones(len(tokens), np.int64)  # programs that are not done yet
        of = rows // n  # samples that begin alike are computed once: which beginning each has, (rows,)
        last, first = np.full(len(read), BOS), np.arange(len(read)) * n
        for i in range(c.max_size):
            x, past = self.body(self.embed(torch.from_numpy(last).to(device))[:, None] + self.place[i], past)
            logits = self.head(x[:, 0]).float().cpu()
            if choices is not None:
                allowed = np.zeros(logits.shape, bool)
                allowed[:, choices] = fitting(need[first], np.full(len(first), c.max_size - i), ARITY[choices], False)
                logits = logits.masked_fill(~torch.from_numpy(allowed), -math.inf)
            if temperature:
                chances = (logits / temperature).softmax(-1)[of]
                picked = torch.multinomial(chances, 1, generator=generator)[:, 0].numpy()
            else:
                picked = logits.argmax(-1).numpy()[of]
            tokens[rows, i] = picked
            need += ARITY[picked] - 1
            goes_on = np.flatnonzero(need > 0 if choices is not None else picked != EOS)
            if not len(goes_on):
                break
            rows, need = rows[goes_on], need[goes_on]
            both, first, of = np.unique((of * VOCAB + picked)[goes_on], return_index=True, return_inverse=True)
            last, past = both % VOCAB, self.body.chosen(past, torch.from_numpy(both // VOCAB).to(device))
        return tokens.reshape(len(read), n, c.max_size)


# ---- Loss, optimizer

def labels_of(targets: np.ndarray) -> torch.Tensor:
    """Tokens (n, longest + 1) of programs (n, L) with EOS behind each; PAD is no label."""
    size = (targets != PAD).sum(1)
    labels = np.pad(targets, ((0, 0), (0, 1)))[:, :size.max() + 1].astype(np.int64)
    labels[np.arange(len(labels)), size] = EOS
    return torch.from_numpy(labels)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B, n) of each token of the target and of its EOS, 0 behind that."""
    return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=PAD, reduction="none")


def batch_of(examples: Examples, functions: np.ndarray, rng: np.random.Generator, c: Config
             ) -> tuple[Context, torch.Tensor, Examples]:
    """Contexts and labels of examples, with points of their functions that are drawn anew, and the examples.

    Points on which a function has no usable values are drawn again, up to 50 times; then its example is left out.
    """
    n = len(examples.targets)
    X, y, todo = np.empty((n, c.points, c.variables)), np.empty((n, c.points)), np.arange(n)
    for _ in range(50):
        problems, usable = make_problems(rng, functions[examples.function[todo]], c.points, c.variables, n_test=0)
        X[todo[usable]], y[todo[usable]] = problems.X, problems.y
        todo = np.delete(todo, usable)
        if not len(todo):
            break
    kept = np.delete(np.arange(n), todo)
    if not len(kept):
        raise UserError("no example of this batch has usable values")
    examples = take(examples, kept)
    return encode_context(X[kept], y[kept], examples.members, c), labels_of(examples.targets), examples


def part_of(step: int, args: argparse.Namespace) -> tuple[int, int]:
    """First step, and number of steps, of the part of training that this step belongs to."""
    n = args.steps // (args.rounds + 1)
    return min(step // n, args.rounds) * n, n


def schedule(step: int, args: argparse.Namespace) -> float:
    """Share of --lr: in each part up during 30 steps, then down in a line to 0."""
    first, n = part_of(step, args)
    up = min(30, n // 10)
    return min(1.0, (step - first + 1) / (up + 1), (n - step + first) / (n - up))


def make_optimizers(net: Net, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW without decay for the rest."""
    matrices = [p for p in net.body.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in net.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=args.lr, weight_decay=0.05),
            torch.optim.AdamW(rest, betas=(0.9, 0.95), lr=args.lr, weight_decay=0.0)]


# ---- Diagnosis: is the net any good, and if not, in which way?

def mean_of(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def teacher_forced(net: Net, context: Context, labels: torch.Tensor) -> dict:
    """Loss and accuracies, each token predicted from the target's own before it; the first token's distribution."""
    with torch.no_grad():
        logits = torch.cat([net(take(context, slice(k, k + 256)), labels[k:k + 256]).float().cpu()
                            for k in range(0, len(labels), 256)])
    losses, asked = token_losses(logits, labels), labels != PAD
    first = labels[:, 0].numpy()
    target = np.bincount(first, minlength=VOCAB) / len(first)
    predicted = logits[:, 0].softmax(-1).mean(0).double().numpy()
    there = target > 0
    right = (logits.argmax(-1) == labels) | ~asked
    return {"loss": float(losses.sum() / asked.sum()), "first_token": mean_of(right[:, 0].numpy()),
            "majority": float(target.max()), "token": float((right & asked).sum() / asked.sum()),
            "kl": float((target[there] * np.log(target[there] / np.maximum(predicted[there], 1e-12))).sum()),
            "first_target": target.tolist(), "first_predicted": predicted.tolist()}


def generated(net: Net, context: Context, examples: Examples, truth: np.ndarray, generator: torch.Generator, k: int
              ) -> dict:
    """What the net answers, greedily and in k samples, beside targets (B, L) and the truth's programs (B, L)."""
    c = net.config
    goal = fingerprints(truth, c.variables)

    def matches(rows: np.ndarray) -> np.ndarray:  # (B, n, L) -> (B, n)
        keys = fingerprints(rows.reshape(-1, c.max_size), c.variables)
        return np.array([key == goal[i // rows.shape[1]] for i, key in enumerate(keys)]).reshape(rows.shape[:2])
    greedy = net.sample(context, 1, generator, 0.0)
    free = net.sample(context, 1, generator, 1.0, masked=False)[:, 0]
    B = min(N_SAMPLED, len(truth))
    context = take(context, slice(B))
    samples = net.sample(context, k, generator)
    hits, flat = matches(samples), samples.reshape(-1, c.max_size)
    values = evaluate(flat, context.X.double().numpy(), np.repeat(np.arange(B), k)).reshape(B, k, -1)
    y = context.y.double().numpy()[:, None]
    with np.errstate(all="ignore"):
        errors = np.nan_to_num(((values - y) ** 2).mean(2), nan=np.inf)
        known = np.nan_to_num(((context.values.double().numpy() - y) ** 2).mean(2), nan=np.inf).min(1)
    _, counts = np.unique(greedy[:, 0], axis=0, return_counts=True)
    return {"leaf": mean_of(greedy[:, 0, 1] == PAD), "leaf_target": mean_of(examples.targets[:, 1] == PAD),
            "most_frequent": float(counts.max() / len(truth)), "valid_free": mean_of(whole(free, c.grammar)),
            "valid_masked": mean_of(whole(flat, c.grammar)),
            "exact_greedy": mean_of((greedy[:, 0] == examples.targets).all(1)),
            "match_greedy": mean_of(matches(greedy)[:, 0]), f"match_best_of_{k}": mean_of(hits.any(1)),
            "improves": mean_of(errors < known[:, None] * (1 - 1e-9)), "n": len(truth), "n_sampled": B}


def ceiling(examples: Examples, grammar: Grammar, rng: np.random.Generator, k: int = 400) -> float:
    """The best that can be guessed of the first token of a GP child, who knows the population: from k children each."""
    n, M, L = examples.members.shape
    of, there = np.repeat(np.arange(n), k), np.repeat((examples.members[:, :, 0] != PAD).sum(1), k)
    parents = [(examples.members[of, tournament(rng, there)], np.zeros((n * k, L))) for _ in range(2)]
    first = breed(rng, *parents, grammar)[0][:, 0].reshape(n, k)
    return float(np.mean([np.bincount(row).max() / k for row in first]))


def diagnose(net: Net, data: Data, args: argparse.Namespace, n: int, k: int, splits: Sequence[str] = ("train", "val")
             ) -> dict[str, dict]:
    """The same figures on n examples of each split, or as many as the smallest has, the same ones each time."""
    out = {}
    n = min(n, *(len(data.examples[name].targets) for name in splits))
    with eval_mode(net):
        for name in splits:
            rng = np.random.default_rng([args.seed, EVAL, SPLITS.index(name)])
            examples, functions = data.examples[name], data.functions[name]
            some = take(examples, chosen_examples(len(examples.targets), n, args, name))
            context, labels, some = batch_of(some, functions, rng, net.config)
            generator = torch.Generator().manual_seed(args.seed)
            out[name] = {**teacher_forced(net, context, labels),
                         **generated(net, context, some, functions[some.function], generator, k)}
            if args.objective == "gp":
                out[name]["ceiling"] = ceiling(take(some, slice(200)), net.config.grammar, rng)
    return out


def chosen_examples(n_there: int, n: int, args: argparse.Namespace, split: str) -> np.ndarray:
    """Which n examples of a split are diagnosed, always the same; all in their order where there are n."""
    rng = np.random.default_rng([args.seed, EVAL, SPLITS.index(split), 0])
    return rng.permutation(n_there)[:n] if n_there > n else np.arange(n)


def verdicts(figures: dict[str, dict], losses: Sequence[float]) -> list[str]:
    """In plain words what is wrong; losses: of validation, so far, the newest last."""
    val, train, out = figures["val"], figures["train"], []
    if val["leaf"] > val["leaf_target"] + 0.1:
        out.append(f"collapsed: {val['leaf']:.0%} of its answers are a single leaf, {val['leaf_target']:.0%} of the "
                   "targets")
    if val["most_frequent"] > 0.2:
        out.append(f"collapsed: {val['most_frequent']:.0%} of its answers are the same")
    if val["kl"] > 0.1:
        out.append(f"first tokens are off: a divergence of {val['kl']:.3f} nats from the targets'")
    if len(losses) > 1 and losses[-1] > min(losses) + 0.02 and train["loss"] < val["loss"] - 0.1:
        out.append(f"overfit: validation loss rose from {min(losses):.3f} to {losses[-1]:.3f}")
    if val["first_token"] < val["majority"] + 0.05:
        out.append(f"not learned: first token {val['first_token']:.1%}, the commonest is {val['majority']:.1%}")
    return out


# ---- Comparison: the search with and without the net, by problem

METHODS = ("gp", "mix", "net", "random", "wrong")  # mix: some rounds are the net's; random, wrong: controls


def advance(s: Search, method: str, net: Net | None, args: argparse.Namespace, generator: torch.Generator, k: int
            ) -> None:
    """Round k, from 1 on: --population children of GP or, in the net's rounds, as many of its proposals.

    mix: the net's rounds are the 1st and those of --mix, its square, ...; net: all. random and wrong: as mix, with
    random programs, or proposals for the next problem, in the net's rounds. They go to the first island.
    """
    if not {"gp": False, "net": True}.get(method, k in {args.mix ** i for i in range(40)}):
        for kind in s.islands:
            s.breed(kind, args.population)
            if args.constants:
                s.fit(kind)
        return
    of, kind = s.active(), next(iter(s.islands))
    if method == "random":
        sizes = s.rng.integers(1, args.target_size + 1, len(of) * args.population)
        tokens = random_programs(s.rng, sizes, s.grammar)
    else:
        shown = (of + 1) % len(s.spent) if method == "wrong" else of
        island = s.islands[kind]
        context = encode_context(s.problems.X[shown], s.problems.y[shown], island.tokens[shown], net.config,
                                 island.constants[shown])
        tokens = net.sample(context, args.population, generator, args.temperature).reshape(-1, net.config.max_size)
        tokens = np.pad(tokens, ((0, 0), (0, s.grammar.max_size - tokens.shape[1])))
    s.offer(kind, np.repeat(of, args.population), (tokens, np.zeros(tokens.shape)))


def search(problems: Problems, method: str, net: Net | None, args: argparse.Namespace, seed: int, budget: int,
           max_seconds: float = math.inf) -> Search:
    """Search all problems until they are solved, or out of evaluations or time, or nothing new is found for long."""
    grammar = Grammar(ops=tuple(args.ops), variables=args.variables, max_size=args.max_size, constants=args.constants)
    s = Search(problems, grammar, budget=budget, population=args.population, islands=args.islands, seed=seed)
    generator, start, k = torch.Generator().manual_seed(seed), time.monotonic(), 0
    s.begin()
    while len(s.active()) and time.monotonic() - start < max_seconds:
        k += 1
        advance(s, method, net, args, generator, k)
    return s


def answers(s: Search) -> Programs:
    """The best program of each problem (Q, L'), with the weights of least squares where it was found by them."""
    found = [simplified(*answer(s, q)) for q in range(len(s.spent))]
    L = max(1, *(len(t) for t, _ in found))
    return np.stack([padded(t, L) for t, _ in found]), np.stack([np.pad(c, (0, L - len(c))) for _, c in found])


def answer(s: Search, q: int) -> tuple[Sequence[int], Sequence[float]]:
    """The best program of a problem; 1 where none has a value."""
    best = take(s.best(), q)
    n = int((best.tokens != PAD).sum())
    if not n:
        return [ONE], [0.0]
    program = best.tokens[:n], best.constants[:n]
    return weighted(*program, s.problems.X[q], s.loss, q) if best.weighted else program


def weighted(tokens: np.ndarray, constants: np.ndarray, X: np.ndarray, loss: Loss, q: int) -> tuple[list, list]:
    """A program (n,) as a sum of its terms with their best weights. A weight is rounded, made 1 or -1, or left out with
    its term, where that changes the values by less than 1e-10 of y's standard deviation.
    """
    shape, y = shape_of(tokens[None]), loss.y[q]
    top = split_terms(tokens[None], shape)
    values = evaluate(tokens[None], X[None], None, constants[None], top, shape)
    vary = np.ptp(values, 1) > 0  # the others are part of the intercept
    A, found = np.vstack([np.ones_like(y), values[vary]]), None
    size = np.sqrt((A ** 2).mean(1))
    for _ in range(loss.rounds):
        pull = loss.pull(found, np.array([q]))
        root = 1.0 if pull is None else np.sqrt(pull[0])
        w = np.linalg.lstsq((A / size[:, None] * root).T, y * root, rcond=None)[0] / size
        found = (w @ A)[None]
    least = 1e-10 * y.std()
    w = [next((x for x in (0.0, 1.0, -1.0, float(f"{weight:.9g}"), float(weight)) if abs(x - weight) * scale <= least),
              weight)
         for weight, scale in zip(w, size, strict=True)]
    terms = [([C], [w[0]], 1.0)] if w[0] else []
    for i, weight in zip(np.flatnonzero(top[0])[vary], w[1:], strict=True):
        t, c = (list(x[i:i + shape.size[0, i]]) for x in (tokens, constants))
        if abs(weight) == 1:
            terms.append((t, c, weight))
        elif weight:
            terms.append(([MUL, C, *t], [0.0, weight, *c], 1.0))
    terms.sort(key=lambda term: term[2] < 0)  # one to add stands first, if there is one
    t, c, sign = terms[0] if terms else ([C], [0.0], 1.0)
    if sign < 0:
        t, c = [MUL, C, *t], [0.0, -1.0, *c]
    for more_t, more_c, sign in terms[1:]:
        t, c = [ADD if sign > 0 else SUB, *t, *more_t], [0.0, *c, *more_c]
    return t, c


Node = tuple[float, tuple]  # a coefficient, and pairs of a base and its power: (x,), (operator, Node), (ADD, Node, ...)


def normal_form(tokens: Sequence[int], constants: Sequence[float], i: int = 0) -> Node:
    """A program as a product of powers, in which sums are flat and numbers are one."""
    t = int(tokens[i])
    if not ARITY[t]:
        return (1.0 if t == ONE else float(constants[i]), ()) if t in (ONE, C) else (1.0, (((t,), 1),))
    parts = [normal_form(tokens, constants, k) for k in operands(tokens, i)[0]]
    (f, a), (g, b) = parts[0], parts[-1]
    if not a and not b:
        with np.errstate(all="ignore"):
            return float(OPS[t - FIRST_OP].value(*(np.float64(part[0]) for part in parts))), ()
    if t in (ADD, SUB):
        return total([(f, a), (g if t == ADD else -g, b)])
    if t in (MUL, DIV):
        return times([(f, a), (g, b) if t == MUL else to_power((g, b), -1)])
    if t == SQUARE or (t == POW and not b):
        return to_power((f, a), 2.0 if t == SQUARE else g)
    if t == SQRT:
        return to_power((f, a), 0.5)
    if t == LOG and f > 0 and len(a) == 1 and a[0][0][0] == EXP:
        return total([times([a[0][0][1], (float(a[0][1]), ())]), (math.log(f), ())])
    if t == EXP:
        return exponential((f, a))
    name, sign = OPS[t - FIRST_OP].name, -1.0 if f < 0 else 1.0
    if name in ("sin", "tanh"):
        return sign, (((t, (sign * f, a)), 1),)
    return 1.0, (((t, *((sign * f, a) if name in ("cos", "abs") else part for part in parts)), 1),)


def times(parts: list[Node]) -> Node:
    """The product of some nodes."""
    powers: dict[tuple, int] = {}
    for _, a in parts:
        for base, k in a:
            powers[base] = powers.get(base, 0) + k
    with np.errstate(all="ignore"):
        f = float(np.prod([f for f, _ in parts]))
    return f, tuple((base, k) for base, k in powers.items() if k and f)


def to_power(node: Node, g: float) -> Node:
    """A node to a power that is a number: whole ones, and roots of what is positive, go to its factors."""
    (f, a), sign = node, 1 if g > 0 else -1
    with np.errstate(all="ignore"):
        if abs(g) < 100 and g == int(g):
            return float(np.power(f, g)), tuple((base, k * int(g)) for base, k in a)
        even = tuple((base, k // 2) for base, k in a if k % 2 == 0)
        if g == 0.5 and f > 0 and even:
            odd = tuple((base, k) for base, k in a if k % 2)
            return math.sqrt(f), (((TOKENS["abs"], (1.0, even)), 1), *([((SQRT, (1.0, odd)), 1)] if odd else []))
        f, inner = (float(np.power(f, g)), (1.0, a)) if f > 0 else (1.0, node)
    return f, (((SQRT, inner) if abs(g) == 0.5 else (POW, inner, (abs(g), ())), sign),)


def exponential(node: Node) -> Node:
    """exp of a node: exp(u + 2 + 3 log v) is exp(2) v^3 exp(u)."""
    f, a = node
    flat = a[0][0][1:] if len(a) == 1 and a[0][1] == 1 and a[0][0][0] == ADD else [(1.0, a)]
    out, rest = [], []
    for g, b in [(f * g, b) for g, b in flat]:
        if not b:
            out.append((float(np.exp(np.float64(g))), ()))
        elif logs := [base for base, k in b if k == 1 and base[0] == LOG]:
            rest_of = tuple(pair for pair in b if pair[0] is not logs[0])
            out.append((1.0, (((POW, logs[0][1], (g, rest_of)), 1),)) if rest_of else to_power(logs[0][1], g))
        else:
            rest.append((g, b))
    return times([*out, *([(1.0, (((EXP, total(rest)), 1),))] if rest else [])])


def spread(node: Node) -> list[Node]:
    """The terms of a sum, times its coefficient if that makes it no longer; of another node itself alone."""
    f, a = node
    if len(a) == 1 and a[0][1] == 1 and a[0][0][0] == ADD:
        terms = a[0][0][1:]
        if abs(f) == 1 or sum(abs(g) == 1 and bool(b) for g, b in terms) < 2:
            return [(f * g, b) for g, b in terms]
    return [node]


def total(parts: list[Node]) -> Node:
    """The sum of some nodes; a number stands last in it."""
    found: dict[tuple, float] = {}
    for f, a in (term for part in parts for term in spread(part)):
        found[a] = found.get(a, 0.0) + f
    terms = sorted(((f, a) for a, f in found.items() if f), key=lambda node: not node[1])
    if len(terms) < 2:
        return terms[0] if terms else (0.0, ())
    sizes = {abs(f) for f, _ in terms}
    common = (-1.0 if all(f < 0 for f, _ in terms) else 1.0) * (sizes.pop() if len(sizes) == 1 else 1.0)
    return common, (((ADD, *((f / common, a) for f, a in terms)), 1),)


def written(node: Node) -> list[tuple[int, float]]:
    """Tokens and constants of a normal form."""
    def number(x: float) -> list[tuple[int, float]]:
        return [(ONE, 0.0)] if abs(x - 1) < 1e-12 else [(C, x)]

    def base_of(base: tuple) -> list[tuple[int, float]]:
        if base[0] != ADD:
            return [(base[0], 0.0), *sum(map(written, base[1:]), [])]
        first, *rest = sorted(base[1:], key=lambda part: part[0] < 0)  # one to add stands first
        out = written(first)
        for f, a in rest:
            out = [(ADD if f > 0 else SUB, 0.0), *out, *written((abs(f), a))]
        return out

    def power(base: list, k: int) -> list:
        if k == 1:
            return base
        return [(SQUARE, 0.0), *power(base, k // 2)] if k % 2 == 0 else [(MUL, 0.0), *base, *power(base, k - 1)]
    if node[0] != 1 and len(terms := spread(node)) > 1 and any(abs(f) != 1 for f, _ in terms):
        node = 1.0, (((ADD, *terms), 1),)
    f, powers = node
    of_power: dict[int, list] = {}  # (a b)^2 is shorter than a^2 b^2
    for base, k in powers:
        of_power.setdefault(k, []).append(base_of(base))
    above, below = ([power(quotient(bases, []), abs(k)) for k, bases in of_power.items() if sign * k > 0]
                    for sign in (1, -1))
    if abs(f - 1) >= 1e-12 or not above:
        above = [number(f), *above]
    return quotient(above, below)


def variants(node: Node) -> list[tuple[list[int], list[float]]]:
    """A formula as tokens and constants; with constants, to be fitted, for each 1; and without a term of a sum in
    it.
    """
    out = [node]
    for i, (base, k) in enumerate(node[1]):
        for j in range(1, len(base)) if base[0] == ADD else ():
            rest = total([*base[1:j], *base[j + 1:]])
            powers = tuple((b, k * n) for b, n in rest[1])
            out.append((node[0] * rest[0] ** k, node[1][:i] + powers + node[1][i + 1:]))
    rows = [written(x) for x in out]
    rows.insert(1, [(C, 1.0) if t == ONE else (t, c) for t, c in rows[0]])
    return [tuple(map(list, zip(*row, strict=True))) for row in rows]


def simplified(tokens: Sequence[int], constants: Sequence[float]) -> tuple[list[int], list[float]]:
    """A program in its normal form: numbers that meet are one, and so are equal factors and equal terms."""
    t, c = zip(*written(normal_form(tokens, constants)), strict=True)
    return list(t), list(c)


def without_constants(tokens: Sequence[int]) -> list[int]:
    """What `weighted` wrote without the constants: they are weights of terms, and an intercept."""
    def read(i: int) -> list[int]:
        t, parts = tokens[i], [read(k) for k in operands(tokens, i)[0]]
        there = [part for part in parts if part]
        return [] if t == C else [t, *sum(parts, [])] if len(there) == len(parts) else there[0] if there else []
    return read(0)


def scored(s: Search) -> dict[str, np.ndarray]:
    """Of each problem (Q,): whether it is solved (NMSE <= 1e-9 on the test points), after how many evaluations, and
    recovered (equal to the truth on a range twice as wide, with at most twice its tokens)."""
    p, (tokens, constants) = s.problems, answers(s)
    of = np.arange(len(s.spent))
    test, wide = (evaluate(tokens, X, of, constants) for X in (p.X_test, p.X_wide))
    there = np.isfinite(p.y_wide)
    with np.errstate(all="ignore"):
        nmse = ((test - p.y_test) ** 2).mean(1) / p.y_test.var(1)
        close = np.abs(wide - p.y_wide) <= 1e-6 * (1 + np.abs(p.y_wide))
    solved = nmse <= SOLVED
    small = (tokens != PAD).sum(1) <= 2 * (p.truth != PAD).sum(1)
    return {"solved": solved, "recovered": solved & (close | ~there).all(1) & small, "nmse": nmse,
            "at": np.where(solved, s.best().at, -1)}


def paired(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b, (problems, seeds), and its 95 % interval by a bootstrap over problems."""
    difference = (a.astype(float) - b).mean(1)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), (10_000, len(difference)))].mean(1)
    return float(difference.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


# ---- Training

def train(args: flags.Flags) -> dict:
    """Train a net, diagnose it and, in the mode demo, search with it; the summary. Raises UserError."""
    devices.refuse_ranks(SCRIPT)
    args, saved = run.restore(args, SCRIPT, model=dict, optimizers=list, best=float, losses=list, data=str, found=list)
    check_sizes(args)  # once more, of flags out of a file
    data, base = load_data(args.data, args) if args.data else (generate(args), None)
    if base not in (None, hash_of(data)):
        raise UserError(f"{args.data}: it holds a part of the examples, for --mode eval and search")
    if saved and saved["data"] != hash_of(data):
        raise UserError(f"{args.resume}: its examples have the hash {saved['data']}, those here {hash_of(data)}")
    problems = held_out(data, args) if args.mode == "demo" else None  # too few are told now
    base = hash_of(data)
    described = describe(data, args, base)
    small, (net, optimizers, found, data) = a_part(data, args), set_up(args, saved, data)
    best, losses = (saved["best"], saved["losses"]) if saved else (math.inf, [])
    kind = {"config": asdict(net.config), "context": format_of(net.config), "data": base}

    with run.Run(args, SCRIPT, __file__, saved) as r:
        n, first = len(data.examples["train"].targets), part_of(r.start, args)[0]
        print(f"{described}\n{args.arch} on {devices.describe(net.place.device)}; {count_parameters(net)} parameters, "
              f"{args.steps} steps of {args.batch_size} examples, of which there are {n}; {r.folder}", flush=True)
        ended, grad = "", math.nan
        for step in range(r.start, args.steps + 1):
            due, last = r.due(step), r.last(step)
            if due:
                figures = diagnose(net, data, args, N_VAL, 4)
                losses.append(figures["val"]["loss"])
                log(r, step, figures, (step - first) * args.batch_size / n, grad, args)
                if losses[-1] <= best:
                    best = losses[-1]
                    r.save("best.pt", **kind, model=net.state_dict(), best=best)
                for verdict in verdicts(figures, losses) if step else []:
                    print(f"  {verdict}", flush=True)
            if patience_is_over(losses, step, args):
                last, ended = True, f"no better validation loss in {PATIENCE} evaluations"
            if due or last:
                r.save("last.pt", **kind, model=net.state_dict(), best=best, losses=losses,
                       optimizers=[o.state_dict() for o in optimizers],
                       found=[[torch.from_numpy(x) for x in one] for one in found])
            if last:
                break
            if len(found) < part_of(step, args)[0] // part_of(step, args)[1]:
                found.append(harvest(net, data, args, len(found) + 1))
                data, best, losses, first = with_more(data, *found[-1]), math.inf, [], step
                n = len(data.examples["train"].targets)
            grad = update(net, optimizers, data, args, step, r.folder)
        r.leave_if_stopped()
        save_data(r.folder / "data.npz", small, args, base)
        return finish(r, net, data, problems, args, losses, ended)


def set_up(args: flags.Flags, saved: dict | None, data: Data
           ) -> tuple[Net, list[torch.optim.Optimizer], list[list[np.ndarray]], Data]:
    """The net, its optimizers, what rounds found so far, and the data with that. Raises UserError."""
    torch.manual_seed(args.seed)
    net = Net(config_of(args)).to(devices.get_device(args.device))
    if args.init_from and not saved:
        net.load_state_dict(load_net(args.init_from, net.config)[0].state_dict())
    optimizers, found = make_optimizers(net, args), []
    if saved:
        with files.refuse_damaged(args.resume):
            net.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            found = [[x.numpy() for x in one] for one in saved["found"]]
            for more in found:
                data = with_more(data, *more)
                check_examples(data.examples["train"], data.functions["train"], args, own_targets=False)
    return net, optimizers, found, data


def patience_is_over(losses: Sequence[float], step: int, args: argparse.Namespace) -> bool:
    """Whether too many evaluations without a better validation loss end training, in its last part alone."""
    in_last = step > part_of(args.steps, args)[0]
    return bool(in_last and losses and len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE)


def update(net: Net, optimizers: Sequence[torch.optim.Optimizer], data: Data, args: argparse.Namespace, step: int,
           folder: Path) -> float:
    """One optimizer step; the norm of the gradient. Raises UserError if that is not finite."""
    rng, examples = np.random.default_rng([args.seed, BATCH, step]), data.examples["train"]
    torch.manual_seed(args.seed * 10**9 + step)  # for models with dropout or noise
    context, labels, _ = batch_of(epoch_batch(examples, args, step), data.functions["train"], rng, net.config)
    assert len(labels) == args.batch_size  # epochs are counted by it
    logits = net(context, labels)
    losses = token_losses(logits, labels.to(logits.device))
    (losses.sum() / (labels != PAD).sum()).backward()
    grad = float(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    if not math.isfinite(grad):
        raise UserError(f"the loss of step {step}, or its gradient, is not finite; the last good checkpoint is "
                        f"{folder / 'last.pt'}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad


def epoch_batch(examples: Examples, args: argparse.Namespace, step: int) -> Examples:
    """The batch of a step: each epoch has every example once, in an order of its own."""
    n, done = len(examples.targets), step - part_of(step, args)[0]
    seen = np.arange(done * args.batch_size, (done + 1) * args.batch_size)
    orders = {k: np.random.default_rng([args.seed, BATCH, 0, int(k)]).permutation(n) for k in np.unique(seen // n)}
    return take(examples, np.array([orders[k // n][k % n] for k in seen.tolist()]))


def with_more(data: Data, functions: np.ndarray, *fields: np.ndarray) -> Data:
    """Data whose train has these functions (F, L) more, and examples of these fields."""
    examples = Examples(*map(np.concatenate, zip(data.examples["train"], fields, strict=True)))
    return Data({**data.functions, "train": np.concatenate([data.functions["train"], functions])},
                {**data.examples, "train": examples})


def harvest(net: Net, data: Data, args: argparse.Namespace, k: int) -> list[np.ndarray]:
    """Examples of the k-th round: functions larger than those of train, with the programs by which mix solved them."""
    rng = np.random.default_rng([args.seed, FUNCTIONS, k])
    tokens, share = larger_functions(rng, args, args.functions // 20, args.max_size - args.target_size)
    known = {key for name in ("val", "test") for key in classes_of(data.functions[name], args.variables)}
    new = [x >= TEST_SHARE + VAL_SHARE and key not in known
           for x, key in zip(share, classes_of(tokens, args.variables), strict=True)]
    tokens = rng.permutation(tokens[new])[:args.functions // 200]
    problems, _ = make_problems(rng, tokens, args.points, args.variables)
    if not len(problems.y):
        raise UserError(f"round {k}: --functions {args.functions} give no function of more than --target-size")
    with eval_mode(net):
        s = search(problems, "mix", net, args, args.seed + k, args.evaluations)
    solved = np.flatnonzero(scored(s)["solved"])
    L = args.max_size
    found = np.array([padded(canonical(without_constants(answer(s, q)[0])), L) for q in solved], np.int8).reshape(-1, L)
    new = share_of(found, args.variables) >= TEST_SHARE + VAL_SHARE  # found may be of another class
    solved, found = solved[new], found[new]
    if not len(solved):
        raise UserError(f"round {k}: mix solved none of {len(s.spent)} functions; --functions, --evaluations?")
    problems = take(problems, solved)._replace(truth=found)
    known = len(data.functions["train"])
    examples = trajectories(problems, net.config.grammar, args, (args.seed, TRAJECTORY, k), known)
    print(f"round {k}: mix solved {format_rate(len(solved), len(s.spent))} functions of {args.target_size + 1} to {L} "
          f"tokens; {len(examples.targets)} examples more", flush=True)
    return [s.problems.truth[solved], *examples]


def log(r: run.Run, step: int, figures: dict, epoch: float, grad: float, args: argparse.Namespace) -> None:
    """A row of metrics.csv, and the log line."""
    row = {"step": step, "epoch": epoch}
    for name, table in figures.items():
        row |= {f"{name}_{key}": value for key, value in table.items()
                if isinstance(value, float)}
    r.record({**row, "lr": args.lr * schedule(step, args), "grad": grad})
    r.show({"step": step, **{key: row[key] for key in (
        "train_loss", "val_loss", "val_first_token", "val_majority", "val_kl", "val_leaf", "val_valid_free",
        "val_match_greedy", "val_improves")}, "lr": args.lr * schedule(step, args)})


def describe(data: Data, args: argparse.Namespace, hash_: str) -> str:
    """What the data hold, counted. hash_: of what they are all, or a part, of."""
    lines = []
    for name in SPLITS:
        sizes = np.bincount((data.functions[name] != PAD).sum(1))
        lines.append(f"{name}: {len(data.functions[name])} functions (of " + ", ".join(
            f"{k} tokens {n}" for k, n in enumerate(sizes) if n) + f"), {len(data.examples[name].targets)} examples")
    return "\n".join([f"objective {args.objective}, operators {','.join(args.ops)}, hash {hash_}", *lines])


def hash_of(data: Data) -> str:
    """Twelve hexadecimal digits of a hash of all functions and examples."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for x in (data.functions[name], *data.examples[name]):
            digest.update(repr((name, x.shape)).encode() + np.ascontiguousarray(x.astype(np.int64)).tobytes())
    return digest.hexdigest()[:12]


def finish(r: run.Run, net: Net, data: Data, problems: Problems | None, args: flags.Flags, losses: Sequence[float],
           ended: str) -> dict:
    """Conclude with the best net, write the summary and the picture of training."""
    best = checkpoint.read(r.folder / "best.pt")
    net.load_state_dict(best["model"])
    found = conclude(r.folder, net, data, problems, args, [math.inf] if ended else losses)
    summary = r.summary(n_params=count_parameters(net), arch=args.arch, objective=args.objective, ops=args.ops,
                        data=best["data"], best_step=best["step"], ended=ended, **found)
    draw_training(r.folder)
    print(f"best at step {best['step']}, {ended or 'ended'} at step {r.step}; {summary['seconds']:.0f} s, "
          f"{summary['cpu_seconds']:.0f} CPU-s, {r.folder}")
    return summary


def conclude(folder: Path, net: Net, data: Data, problems: Problems | None, args: argparse.Namespace,
             losses: Sequence[float]) -> dict:
    """Diagnose a net on all three splits, but for --mode search, and compare searches for problems, if there are any;
    print, draw and return what was found."""
    found: dict = {}
    if args.mode != "search":
        figures = diagnose(net, data, args, N_FINAL, N_SAMPLES, SPLITS)
        found = {"verdicts": verdicts(figures, losses), "figures": figures}
        if len(losses) > 2 and losses[-1] < losses[-2] - 0.01:
            found["verdicts"].append(f"not converged: validation loss still falls, {losses[-2]:.3f} to "
                                     f"{losses[-1]:.3f} at the end")
        draw_first_tokens(figures, folder / "first_tokens.png")
        print(format_diagnosis(figures), *found["verdicts"], sep="\n", flush=True)
    if problems is not None:
        compared = compare(problems, net, args, folder)
        found |= compared
        draw_solve_rates(compared, folder / "solve_rates.png")
        print(format_comparison(compared), flush=True)
    return found


def format_diagnosis(figures: dict[str, dict]) -> str:
    """A table of the diagnosis, a column for each split, and the first tokens of targets beside the predicted ones."""
    names = [name for name in next(iter(figures.values())) if name not in ("first_target", "first_predicted")]
    lines = [f"{'':18s}" + "".join(f"{split:>12s}" for split in figures)]
    for name in names:
        lines.append(f"{name:18s}" + "".join(f"{table[name]:12.4f}" if isinstance(table[name], float) else
                                             f"{table[name]:12d}" for table in figures.values()))
    for split, table in figures.items():
        pairs = enumerate(zip(table["first_target"], table["first_predicted"], strict=True))
        lines.append(f"first tokens of {split}, targets / predicted in %: " + ", ".join(
            f"{name_of(t)} {100 * a:.1f} / {100 * b:.1f}" for t, (a, b) in pairs if a > 0 or b > 0.01))
    return "\n".join(lines)


# ---- The comparison of searches

def held_out(data: Data, args: argparse.Namespace) -> Problems:
    """--held-out functions of different classes, none of them in train or val: of each size equally many, as far as
    there are."""
    rng = np.random.default_rng([args.seed, PROBLEMS])
    tokens = data.functions["test"]
    if args.larger:
        tokens, share = larger_functions(rng, args, 200 * args.held_out, args.larger)
        known = {key for name in ("train", "val") for key in classes_of(data.functions[name], args.variables)}
        tokens = tokens[[x < TEST_SHARE and key not in known
                         for x, key in zip(share, classes_of(tokens, args.variables), strict=True)]]
    tokens = rng.permutation(tokens)
    _, first = np.unique(share_of(tokens, args.variables), return_index=True)  # one of each class
    tokens = tokens[np.sort(first)]
    size = (tokens != PAD).sum(1)
    tokens = tokens[np.lexsort((size, rank_among_equals(size)))]
    problems, _ = make_problems(rng, tokens[:2 * args.held_out], args.points, args.variables)
    if len(problems.y) < args.held_out:
        raise UserError(f"--held-out {args.held_out}: there are {len(problems.y)} held-out functions of different "
                        "classes; more --functions give more")
    return take(problems, slice(args.held_out))


def larger_functions(rng: np.random.Generator, args: argparse.Namespace, n: int, more: int
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Functions among n random programs (F, L) with up to `more` tokens above --target-size, and their shares (F,)."""
    sizes = range(args.target_size + 1, args.target_size + more + 1)
    tokens, share = sample_functions(rng, config_of(args).grammar, n, sizes)
    larger = (tokens != PAD).sum(1) > args.target_size
    return tokens[larger], share[larger]


def compare(problems: Problems, net: Net, args: argparse.Namespace, folder: Path) -> dict:
    """Each method on each problem, --search-seeds times, at equal evaluations; GP and mix also at equal time.

    That is the time that mix took, whatever the evaluations; GP's population is then eight times as large, the best
    of 1, 2, 4 and 8 times on validation functions.
    """
    results: dict[str, list[dict]] = {}
    by_time = copy.copy(args)
    by_time.population *= 8

    def add(name: str, seed: int, s: Search, start: float) -> None:
        seconds = time.monotonic() - start
        results.setdefault(name, []).append({**scored(s), "spent": s.spent, "seconds": seconds})
        print(f"  {name}, seed {seed}: {format_rate(int(results[name][-1]['solved'].sum()), len(problems.y))} solved, "
              f"{seconds:.1f} s", flush=True)
    with eval_mode(net):
        for seed in range(args.search_seeds):
            for name in args.method:
                start = time.monotonic()
                s = search(problems, name, net, args, seed, args.evaluations)
                add(name, seed, s, start)
                if name == "mix" and seed == 0:
                    draw_problems(s, net, folder / "problems.png")
            for name, how in (("gp", by_time), ("mix", args)) if "mix" in results else ():
                start, limit = time.monotonic(), results["mix"][-1]["seconds"]
                add(f"{name}, timed", seed, search(problems, name, net, how, seed, 1 << 40, limit), start)
    stacked = {name: {key: np.stack([one[key] for one in runs], 1) for key in ("solved", "recovered", "at", "spent")}
               for name, runs in results.items()}
    table = {name: {"solved": mean_of(x["solved"]), "recovered": mean_of(x["recovered"]),
                    "solved_by_seed": x["solved"].mean(0).tolist(), "evaluations": mean_of(x["spent"]),
                    "times_solved": x["solved"].sum(1).tolist(),  # of each problem
                    "seconds": mean_of([one["seconds"] for one in results[name]]),
                    "solved_at": np.sort(x["at"][x["at"] >= 0]).tolist()} for name, x in stacked.items()}
    pairs = [("mix", name) for name in args.method if name != "mix"] + [("mix, timed", "gp, timed")]
    differences = {f"{a} - {b}": paired(stacked[a]["solved"], stacked[b]["solved"]) for a, b in pairs if a in stacked}
    sizes = (problems.truth != PAD).sum(1)
    by_size = {name: {int(k): mean_of(x["solved"][sizes == k]) for k in np.unique(sizes)}
               for name, x in stacked.items()}
    return {"n_problems": len(problems.y), "search_seeds": args.search_seeds, "methods": table,
            "differences": differences, "by_size": by_size}


def format_comparison(found: dict) -> str:
    """Tables of the comparison as text."""
    n = found["n_problems"] * found["search_seeds"]
    lines = [f"{'':16s}  solved at NMSE 1e-9              recovered  evaluations  seconds  (n = {n})"]
    for name, row in found["methods"].items():
        lines.append(f"{name:16s}  {format_rate(round(row['solved'] * n), n):32s} {row['recovered']:8.1%}  "
                     f"{row['evaluations']:11.0f}  {row['seconds']:7.1f}")
    for name, (mean, low, high) in found["differences"].items():
        lines.append(f"{name:22s} {100 * mean:+6.1f} points (95 % {100 * low:.1f} to {100 * high:.1f}, paired by "
                     "problem)")
    return "\n".join(lines)


# ---- Pictures

def draw_training(folder: Path) -> Path:
    rows = metrics.read(folder)
    fig, axes = plots.new_figure(2, 2, width=5.5, height=3.6)
    panels = (("train_loss", "val_loss"), ("val_first_token", "val_majority", "val_valid_free"),
              ("val_kl", "val_most_frequent", "val_leaf"), ("val_match_greedy", "val_match_best_of_4", "val_improves"))
    for ax, names in zip(axes.flat, panels, strict=True):
        for name in names:
            ax.plot(*metrics.points(rows, "step", name), marker=".", ms=4, lw=1.2, label=name)
        ax.set(xlabel="step")
        ax.legend(frameon=False, fontsize=7)
    return plots.save_figure(fig, folder / "training.png")


def name_of(token: int) -> str:
    known = token in (ONE, C) or INDEX[token] >= 0
    return OPS[token - FIRST_OP].name if ARITY[token] else infix([token]) if known else f"token {token}"


def draw_first_tokens(figures: dict[str, dict], out: Path) -> Path:
    """First tokens of the targets and as predicted, of each split."""
    fig, axes = plots.new_figure(1, len(figures), width=4.2, height=3.2)
    for ax, (split, table) in zip(np.atleast_1d(axes).flat, figures.items(), strict=True):
        target, predicted = (np.array(table[f"first_{kind}"]) for kind in ("target", "predicted"))
        some = np.flatnonzero((target > 0) | (predicted > 0.01))
        at = np.arange(len(some))
        ax.bar(at - 0.2, target[some], 0.4, label="targets")
        ax.bar(at + 0.2, predicted[some], 0.4, label="predicted")
        ax.set_xticks(at, [name_of(t) for t in some], rotation=60, fontsize=7)
        ax.set(title=f"{split}: KL {table['kl']:.4f}, n = {table['n']}")
        ax.legend(frameon=False, fontsize=7)
    return plots.save_figure(fig, out)


def draw_problems(s: Search, net: Net, out: Path, n: int = 6) -> Path:
    """A search's answers to n problems on their test points, with what the net proposes for the last population."""
    p, (tokens, constants), kind = s.problems, answers(s), next(iter(s.islands))
    some = np.linspace(0, len(p.y) - 1, min(n, len(p.y))).astype(int)
    island = s.islands[kind]
    context = encode_context(p.X[some], p.y[some], island.tokens[some], net.config, island.constants[some])
    proposals = net.sample(context, 3, torch.Generator().manual_seed(0))
    fig, axes = plots.new_figure(2, 3, width=4.6, height=3.6)
    for ax, q, rows in zip(axes.flat, some, proposals, strict=False):
        found = evaluate(tokens[[q]], p.X_test[[q]], None, constants[[q]])[0]
        ax.plot(p.y_test[q], found, ".", ms=3)
        ax.axline((0, 0), slope=1, color="gray", lw=0.7)
        lines = [f"truth {infix(p.truth[q])}", f"found {infix(tokens[q], constants[q]):.60}",
                 *(f"net {infix(row)}" for row in rows)]
        ax.set_title("\n".join(map(plots.as_label, lines)), fontsize=6, loc="left")
        low, high = np.quantile(p.y_test[q], (0.02, 0.98))  # without what is near a pole
        ends = low - 0.1 * (high - low), high + 0.1 * (high - low)
        ax.set(xlabel="y of a test point", ylabel="found", xlim=ends, ylim=ends)
    return plots.save_figure(fig, out)


def draw_solve_rates(found: dict, out: Path) -> Path:
    """Share of problems that are solved after so many distinct evaluations, with Wilson bands."""
    fig, ax = plots.new_figure()
    n = found["n_problems"] * found["search_seeds"]
    for name, row in found["methods"].items():
        if name not in METHODS:  # at equal time
            continue
        at = np.array(row["solved_at"])
        x = np.unique(np.concatenate([[1], at]))
        k = np.searchsorted(at, x, side="right")
        low, high = np.array([wilson(int(i), n) for i in k]).T
        line, = ax.step(x, k / n, where="post", label=f"{name}: {row['solved']:.1%}")
        ax.fill_between(x, low, high, step="post", alpha=0.15, color=line.get_color())
    ax.set(xlabel="distinct evaluations", ylabel="share of problems solved", xscale="log")
    ax.legend(frameon=False)
    return plots.save_figure(fig, out)


# ---- Files: examples, and a trained net

def a_part(data: Data, args: argparse.Namespace) -> Data:
    """All functions, and of the examples those that are diagnosed: what --mode eval and search need."""
    n = min(N_FINAL, *(len(x.targets) for x in data.examples.values()))
    return Data(data.functions, {name: take(x, chosen_examples(len(x.targets), n, args, name))
                                 for name, x in data.examples.items()})


def save_data(file: Path, data: Data, args: argparse.Namespace, hash_: str) -> None:
    """hash_: of the data that these are all, or a part, of."""
    arrays = {f"{name}_{key}": value for name in SPLITS for key, value in (
        ("functions", data.functions[name]), *data.examples[name]._asdict().items())}
    out = io.BytesIO()
    np.savez_compressed(out, **arrays, flags=np.array(repr({name: getattr(args, name) for name in DATA_FLAGS})),
                        hash=np.array(hash_))
    files.write_atomic(file, out.getvalue())


def load_data(path: str | Path, args: flags.Flags) -> tuple[Data, str]:
    """A data.npz, checked, and the hash of what it is all, or a part, of. Raises UserError: damaged, of other flags, a
    function in two splits."""
    with files.refuse_damaged(path):
        try:
            with np.load(path, allow_pickle=False) as z:
                made, hash_ = ast.literal_eval(str(z["flags"])), str(z["hash"])
                functions = {name: z[f"{name}_functions"] for name in SPLITS}
                examples = {name: Examples(*(z[f"{name}_{key}"] for key in Examples._fields)) for name in SPLITS}
        except (zipfile.BadZipFile, zlib.error, EOFError, SyntaxError) as e:
            raise ValueError(str(e)) from None
        for name in DATA_FLAGS:
            if made[name] != getattr(args, name) and name in args.given:
                raise UserError(f"--{name.replace('_', '-')}: {path} was made with {made[name]}")
        old = flags.restored(parse_args([]), made, path, DATA_FLAGS)
        for name in DATA_FLAGS:
            setattr(args, name, getattr(old, name))
        for name in SPLITS:
            check_examples(examples[name], functions[name], args, args.objective == "solution")
    refuse_overlap(functions, args.variables)
    return Data(functions, examples), hash_


def check_examples(examples: Examples, functions: np.ndarray, args: argparse.Namespace, own_targets: bool) -> None:
    """Raise UserError or ValueError for examples of a file that cannot be trained on. own_targets: they must be the
    functions themselves."""
    n, L, grammar = len(examples.targets), args.max_size, config_of(args).grammar
    shapes = [functions.shape[1:], examples.members.shape[2:], examples.targets.shape[1:]]
    if not n or shapes != [(L,)] * 3 or any(len(x) != n for x in examples):
        raise ValueError(f"arrays of the shapes {[x.shape for x in (functions, *examples)]}")
    members = examples.members.reshape(-1, L)
    for rows in (functions, examples.targets, members[members.any(1)]):
        check_programs(rows, grammar)
    if not 0 <= examples.function.min() <= examples.function.max() < len(functions):
        raise ValueError("an example of a function that there is not")
    if own_targets and (functions[examples.function] != examples.targets).any():
        raise ValueError("a target that is not its function")


def load_net(path: str, like: Config | None = None) -> tuple[Net, dict]:
    """The net at `path`, of a run its best, and the checkpoint. Raises UserError: none, damaged, of another format."""
    path = checkpoint.file_of(path)
    saved = checkpoint.check(checkpoint.read(path), path, SCRIPT, like=Config, config=dict, model=dict, step=int,
                             args=dict, context=str, data=str)
    with files.refuse_damaged(path):
        net = Net(Config(**{**saved["config"], "ops": tuple(saved["config"]["ops"])}))
    if saved["context"] != format_of(net.config):
        raise UserError(f"{path}: its contexts are written in another way (hash {saved['context'][:12]}, here "
                        f"{format_of(net.config)})")
    checkpoint.load_weights(net, saved["model"], path)
    if like is not None and net.config != like:
        differ = [name for name in Config.__dataclass_fields__ if getattr(net.config, name) != getattr(like, name)]
        raise UserError(f"{path}: its {differ[0].replace('_', '-')} is {getattr(net.config, differ[0])}, here "
                        f"{getattr(like, differ[0])}")
    return net, saved


def load(path: str) -> Callable[..., list[str]]:
    """`propose = load(path)`: propose(X, y, population, n) gives n expressions for data X (N, V), y (N,).

    population: expressions as Python writes them, of which the best are shown to the net. With more variables than
    the net knows it works on those that y depends on most, by rank correlation, and says so. Raises UserError.
    """
    saved = checkpoint.read(checkpoint.file_of(path))
    if "regressor" in saved:
        return load_regressor(checkpoint.check(saved, path, str(saved.get("script")), regressor=dict), path)
    net = load_net(path)[0].eval()

    def propose(X, y, population: Sequence[str] = (), n: int = 1, temperature: float = 1.0, seed: int = 0) -> list[str]:
        X, y = as_data(X, y)
        check_data(X, y)
        if not 0.01 <= temperature <= 100 or not (isinstance(n, int) and n > 0) or not 0 <= seed < 2 ** 63:
            raise UserError(f"temperature {temperature}, n {n}, seed {seed}: expected 0.01 to 100, a whole number "
                            "above 0, and one in 0..2^63 - 1")
        c = net.config
        columns = strongest(X, y, c.variables)
        if len(columns) < X.shape[1]:
            print(f"the net knows {c.variables} variables: it works on {', '.join(f'x{i}' for i in columns)}")
        names = [f"x{i}" for i in columns]
        rows = np.array([padded(parse(text, names)[0], c.max_size) for text in population], np.int8)
        rows = rows.reshape(-1, c.max_size)
        if (rows == C).any():
            raise UserError("population: the net knows no numbers but 1")
        errors = np.nan_to_num(((evaluate(rows, X[None][:, :, columns]) - y) ** 2).mean(1), nan=np.inf)
        context = encode_context(X[None][:, :, columns], y[None], rows[np.argsort(errors)][None], c)
        programs = net.sample(context, n, torch.Generator().manual_seed(seed), temperature,
                              variables=len(columns))[0]
        return [infix(row, names=names) for row in programs]
    return propose


def strongest(X: np.ndarray, y: np.ndarray, n: int) -> list[int]:
    """Up to n columns of X (N, V), those whose ranks have the greatest correlation with the ranks of y."""
    if X.shape[1] <= n:
        return list(range(X.shape[1]))

    def ranks(x: np.ndarray) -> np.ndarray:  # equal ones have the mean of theirs
        _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - counts / 2)[which]
    with np.errstate(all="ignore"):
        correlation = np.abs(np.corrcoef([ranks(x) for x in (*X.T, y)])[-1, :-1])
    correlation = np.nan_to_num(correlation)  # of a column that is the same everywhere
    return sorted(np.argsort(-correlation, kind="stable")[:n].tolist())


# ---- Sums and products of a dictionary: what least squares finds without evolution

Pairs = list[tuple[int, float]]  # tokens of a program, each with its constant


def monomials(variables: int, n: int) -> list[Pairs]:
    """Up to n products and quotients of variables, those of the lowest degree first, up to the ninth."""
    exponents = [(0,) * variables]
    known = set(exponents)
    for e in exponents:  # grows while it is gone through: by degree
        for i, step in ((i, step) for step in (1, -1) for i in range(variables)):
            new = (*e[:i], e[i] + step, *e[i + 1:])
            if e[i] * step >= 0 and new not in known and len(exponents) <= n and sum(map(abs, new)) <= 9:
                known.add(new)
                exponents.append(new)
    return [quotient(*([[(int(VARIABLES[i]), 0.0)] for i, k in enumerate(e) for _ in range(max(0, sign * k))]
                       for sign in (1, -1))) for e in exponents[1:]]


def quotient(above: list[Pairs], below: list[Pairs]) -> Pairs:
    """The product of some programs over that of others."""
    def product(parts: list[Pairs]) -> Pairs:
        return [(MUL, 0.0)] * (len(parts) - 1) + [pair for part in parts for pair in part] if parts else [(ONE, 0.0)]
    return [(DIV, 0.0), *product(above), *product(below)] if below else product(above)


def unit_columns(values: np.ndarray, given: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to n different ones of values (M, N), without what the rows of `given` (k, N) explain, of length 1: which, and
    they themselves."""
    Q = np.linalg.qr(given.T)[0]
    some = np.flatnonzero((np.abs(values) < 1e12).all(1))
    with np.errstate(all="ignore"):
        C = values[some] - (values[some] @ Q) @ Q.T
        size = np.sqrt((C ** 2).sum(1))
        varies = size > 1e-7 * np.sqrt((values[some] ** 2).sum(1))
        some, C = some[varies], C[varies] / size[varies, None]
    sign = np.sign(C[np.arange(len(C)), np.abs(C).argmax(1)])[:, None]
    first = np.sort(np.unique(np.round(1e6 * sign * C).astype(np.int32), axis=0, return_index=True)[1])[:n]
    return some[first], C[first]


def best_sets(C: np.ndarray, z: np.ndarray, width: int, depth: int) -> list[tuple[int, ...]]:
    """The sets of up to `depth` columns C (M, N), of length 1, whose sums explain most of z (N,): about `width` of each
    size.

    All pairs are looked at, and of larger sets those that have one column more than a good one. In the spirit of SISSO
    (Ouyang et al. 2018), without its screening.
    """
    M, r = len(C), C @ z
    sets = np.argsort(-r ** 2, kind="stable")[:width, None]
    out = list(map(tuple, sets.tolist()))
    pairs, gains = [], []
    for a in range(0, M if depth > 1 else 0, 256):
        some = r[a:a + 256, None]
        G = C[a:a + 256] @ C.T
        with np.errstate(all="ignore"):
            gain = (some ** 2 + r ** 2 - 2 * some * r * G) / (1 - G * G)
        gain[(1 - G * G < 1e-8) | (np.arange(M) <= np.arange(a, a + len(G))[:, None])] = 0.0
        top = np.argpartition(-gain.ravel(), min(width, gain.size - 1))[:width]
        pairs.append(np.stack([top // M + a, top % M], 1))
        gains.append(gain.ravel()[top])
    for size in range(2, min(depth, M) + 1):
        if size > 2:
            Q = np.linalg.qr(C[sets].transpose(0, 2, 1))[0]                          # (W, N, size - 1)
            left = z - (Q @ (Q.transpose(0, 2, 1) @ z[:, None]))[:, :, 0]
            known = np.einsum("mn,wnk->wmk", C, Q, optimize=True)
            gain = (left @ C.T) ** 2 / np.maximum(1 - (known ** 2).sum(2), 1e-8) - (left ** 2).sum(1)[:, None]
            top = np.argsort(-gain.ravel(), kind="stable")[:3 * width]
            pairs, gains = [np.concatenate([sets[top // M], (top % M)[:, None]], 1)], [gain.ravel()[top]]
        order = np.argsort(-np.concatenate(gains), kind="stable")
        found = dict.fromkeys(tuple(sorted(row)) for row in np.concatenate(pairs)[order].tolist())
        sets = np.array([row for row in found if len(set(row)) == size][:width])
        if not len(sets):
            break
        out += list(map(tuple, sets.tolist()))
    return out


def sums(values: np.ndarray, z: np.ndarray, pull: np.ndarray, depth: int) -> list[list[int]]:
    """Which of some programs with these values (M, N) make sums of up to `depth` that are near z (N,), once they have
    weights.
    """
    with np.errstate(all="ignore"):
        root = np.sqrt(pull)
        which, C = unit_columns(values * root, root[None], 5000)
        goal = unit_columns((z * root)[None], root[None], 1)[1]
    return [which[list(row)].tolist() for row in best_sets(C, goal[0], 100, depth)] if len(C) and len(goal) else []


def rounded_powers(A: np.ndarray, z: np.ndarray, free: list[bool], n: int) -> np.ndarray:
    """Powers (k,) for which powers @ A[1:] and a multiple of A[0] make z (N,) by least squares: those that are not free
    multiples of 1 / n, the nearest made so first.
    """
    powers, todo = np.zeros(len(A) - 1), np.arange(1, len(A))
    while True:
        found = np.linalg.lstsq(A[[0, *todo]].T, z - powers @ A[1:], rcond=None)[0][1:]
        off = np.where(np.array(free)[todo - 1], np.inf, np.abs(n * found - np.round(n * found)))
        if not np.isfinite(off).any():
            powers[todo - 1] = found
            return powers
        i = int(off.argmin())
        powers[todo[i] - 1], todo = np.round(n * found[i]) / n, np.delete(todo, i)


def products(programs: list[Pairs], values: np.ndarray, X: np.ndarray, y: np.ndarray, pull: np.ndarray, roots: bool
             ) -> list[Pairs]:
    """Products of powers of variables and of up to two programs with these values (M, N), near y up to a factor.

    In logarithms they are sums. Powers are whole or, with roots, multiples of 1/2.
    """
    with np.errstate(all="ignore"):
        logs = [np.log(np.abs(x)) for x in (X.T, values, y[None])]
        root = np.sqrt(pull) * np.abs(y)
        plain = np.flatnonzero(np.isfinite(logs[0]).all(1))
        given = np.concatenate([np.ones((1, len(y))), logs[0][plain]]) * root
        if not np.isfinite(logs[2]).all() or len(given) >= len(y) - 2:
            return []
        which, columns = unit_columns(logs[1] * root, given, 2000)
        goal = unit_columns(logs[2] * root, given, 1)[1]
    out = []
    for row in [(), *(best_sets(columns, goal[0], 60, 2) if len(goal) and len(columns) else [])]:
        chosen = [*([(int(VARIABLES[i]), 0.0)] for i in plain), *(programs[which[i]] for i in row)]
        A = np.concatenate([given, logs[1][which[list(row)]] * root])
        powers = rounded_powers(A, logs[2][0] * root, [part[0][0] == EXP for part in chosen], 1 + roots)
        factors = [([(EXP, 0.0), (MUL, 0.0), (C, k), *part[1:]], 2) if part[0][0] == EXP else (part, round(2 * k))
                   for part, k in zip(chosen, powers, strict=True)]
        if 0 < sum(abs(k) for _, k in factors) <= 20:
            out.append(quotient(*([part for factor, k in factors if sign * k > 0
                                   for part in [factor] * (abs(k) // 2) + [[(SQRT, 0.0), *factor]] * (k % 2)]
                                   for sign in (1, -1))))
    return out


# ---- Regression: one data set, and for each size of a formula the least error

LINKS = {  # tokens of outer in y = outer(s), a prefix without constants: s of y, NaN where there is none; dy / ds, of y
    (): (lambda y: y, np.ones_like),
    (DIV, ONE): (lambda y: 1 / y, np.square),
    (SQRT,): (lambda y: np.where(y > 0, y * y, np.nan), lambda y: 0.5 / y),
    (EXP,): (np.log, lambda y: y),
    (SQUARE,): (lambda y: np.sqrt(np.where(y > 0, y, np.nan)), lambda y: 2 * np.sqrt(y)),
}
SOURCES = ("evolution", "dictionary", "net")


class Regression:
    """A search of formulas for one data set. What is bred are programs for s in y = outer(s), s being y itself, 1 / y,
    y^2, log y or sqrt y: each link is a problem of one `Search`, with the weights by which errors of s are errors of
    y.
    """

    # Programs of an island; rounds between dictionaries; rounds until it is sown anew.
    POPULATION, RENEWAL, PATIENCE = 100, 40, 30

    def __init__(self, X: np.ndarray, y: np.ndarray, weights: np.ndarray | None, loss: str, grammar: Grammar, seed: int,
                 net: Net | None = None, digit: float = 0.0):
        self.units, self.unit = unit_of(np.sqrt((X ** 2).mean(0))), float(unit_of(y.std()))
        self.seed, self.net, self.k, self.grammar = seed, net, 0, grammar
        self.X, y = X / self.units, y / self.unit
        self.y, self.weights = y, np.ones_like(y) if weights is None else weights
        self.outer, Z, pulls = [], [], []
        for tokens, (s_of, slope) in LINKS.items():
            with np.errstate(all="ignore"):
                s, pull = s_of(y), np.abs(slope(y)) ** POWER.get(loss, 2)
            known = {OPS[t - FIRST_OP].name for t in tokens if ARITY[t]} <= set(grammar.ops)
            if not tokens or (loss != "log" and known and np.isfinite(s + pull).all() and np.ptp(s) > 0):
                n = 1 if tokens else 4
                self.outer, Z, pulls = self.outer + [tokens] * n, Z + [s] * n, pulls + [pull * self.weights] * n
        Q, Z, nothing = len(Z), np.array(Z), np.zeros((len(Z), 0))
        problems = Problems(np.repeat(self.X[None], Q, 0), Z, *[nothing] * 5)
        self.search = Search(problems, grammar, budget=1 << 60, population=self.POPULATION, islands=["raw", "terms"],
                             seed=seed, parsimony=0.02, loss=Loss(Z, loss, np.array(pulls), copies_of(X, y)),
                             exact=-1.0)
        floor = Loss(y[None], loss, self.weights[None]).floor(digit / self.unit)
        pull = np.array([pull.mean() for pull in pulls])
        self.exact = 1.5 * floor * self.weights.mean() / pull / self.search.loss.of_constant
        self.exact_at: int | None = None  # in which round a program was
        self.seconds, self.slowest = 0.0, 0.0  # in all; of the last dictionary
        self.age = {kind: np.zeros(Q, int) for kind in self.search.islands}
        self.least = {kind: np.full(Q, np.inf) for kind in self.search.islands}
        self.n_children = max(10, min(self.POPULATION, 40_000 // len(y)))

    def round(self, left: float = math.inf) -> None:
        """A generation of every island; in some rounds the dictionary, or the net, has its say first. left: seconds;
        the dictionary has not if it would take longer.
        """
        s, start = self.search, time.monotonic()
        s.rng = np.random.default_rng([self.seed, SEARCH, self.k])
        if self.k == 0:
            s.begin()
        if self.k == 0 or (self.k % self.RENEWAL == 1 and self.slowest < left):
            s.source = 1
            self.offer_dictionary(0.15 if self.k == 0 else 1.0)
            self.slowest = time.monotonic() - start
        if self.net is not None and self.k in {3 ** i for i in range(40)}:
            s.source = 2
            self.offer_proposals()
        s.source = 0
        for kind in s.islands:
            s.breed(kind, self.n_children)
            s.fit(kind)
            self.renew(kind)
        if len(s.cache) > 3_000_000:
            s.cache.clear()  # an hour's programs do not fit the memory
        self.k += 1
        if self.exact_at is None and (s.front.nmse <= self.exact[:, None]).any():
            self.exact_at = self.k
        self.seconds += time.monotonic() - start

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of fixed size that a search changes in place."""
        s = self.search
        out = {"spent": s.spent, "gains": s.gains, **{f"front_{k}": x for k, x in s.front._asdict().items()}}
        for kind, island in s.islands.items():
            own = {**island._asdict(), "age": self.age[kind], "least": self.least[kind]}
            out |= {f"{kind}_{k}": x for k, x in own.items()}
        return out

    def state(self) -> dict:
        """All that a search needs to go on, of plain types."""
        s = self.search
        arrays = {**self.arrays(), "cache": np.array(sorted(s.cache), np.uint64).view(np.int64),
                  "fitted": np.array(sorted(s.fitted), np.int64)}
        return {"tokens": list(TOKENS), "k": self.k, "seconds": self.seconds,
                "exact_at": -1 if self.exact_at is None else self.exact_at, "idle": s.idle, "n_ids": s.n_ids,
                **{k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in arrays.items()}}

    def restore(self, state: dict) -> None:
        """Go on from a state. Raises UserError: of other operators."""
        s = self.search
        if state["tokens"] != list(TOKENS):
            raise UserError(f"--resume: it was written with other operators: {', '.join(state['tokens'])}")
        self.k, self.seconds, s.idle, s.n_ids = (state[k] for k in ("k", "seconds", "idle", "n_ids"))
        self.exact_at = None if state["exact_at"] < 0 else state["exact_at"]
        s.cache = set(state["cache"].numpy().view(np.uint64).tolist())
        s.fitted = set(state["fitted"].tolist())
        for name, x in self.arrays().items():
            x[...] = state[name].numpy()

    def renew(self, kind: str) -> None:
        """Sow the island anew that has not got better for longest; now and then let a program move to another of its
        link.
        """
        s, island = self.search, self.search.islands[kind]
        better = island.score[:, 0] < self.least[kind] - 0.01
        self.least[kind] = np.minimum(self.least[kind], island.score[:, 0])
        self.age[kind] = np.where(better, 0, self.age[kind] + 1)
        a, b = s.rng.integers(0, len(self.outer), 2)
        if s.rng.random() < 0.2 and self.outer[a] == self.outer[b]:
            i = int(s.rng.integers(0, 3))
            for field in island:
                field[b, -1] = field[a, i]
        old = int(self.age[kind].argmax())
        if self.age[kind][old] > self.PATIENCE:
            self.age[kind][old], self.least[kind][old] = 0, np.inf
            s.sow(kind, np.array([old]))

    def offer_dictionary(self, share: float) -> None:
        """Sums and products of monomials, of small programs, and of what the islands hold; a share of a whole one."""
        s, g, L = self.search, self.grammar, self.grammar.max_size
        tokens = random_programs(s.rng, s.rng.integers(1, min(7, L), round(6000 * share)), g)
        if self.k // self.RENEWAL % 2 == 0:
            tokens[tokens == C] = ONE
        constants = s.rng.choice([-1.0, 1.0], tokens.shape) * 10 ** s.rng.uniform(-1, 1, tokens.shape)
        parts, n_monomials = [], 0
        if {"add", "sub", "mul", "div"} <= set(g.ops):
            rows = [[t for t, _ in row] for row in monomials(g.variables, round(1000 * share)) if len(row) <= L]
            n_monomials = len(rows)
            small = [[ONE], *(row for row in rows if len(row) <= 3)][:60]
            pairs = [[op, *a, *b] for i, a in enumerate(small) for b in small[:i] for op in (ADD, SUB)]
            ratios = [[DIV, *a, *b] for b in pairs if len(b) == 3 for a in small]
            called = [[TOKENS[f], *m] for f in g.ops if f in ("sin", "cos", "exp", "tanh") for m in rows if len(m) <= 5]
            called += [[DIV, ONE, *f] for f in called if f[0] == EXP]
            waves = [*called, *([t, *f, *x] for f in called for x in small if len(x) == 1 for t in (MUL, DIV))]
            for some, n in ((pairs, 800), (ratios, 500), (waves, 800)):
                rows += [some[i] for i in s.rng.permutation(len(some))[:round(n * share)]]
            rows = np.array([padded(row, L) for row in rows if len(row) <= L])
            parts.append((rows, np.zeros(rows.shape)))
        for island in s.islands.values() if self.k else ():
            some = np.isfinite(island.score) & (island.tokens != C).all(2)
            nodes, top = subtrees(island.tokens[some]), split_terms(island.tokens[some], shape_of(island.tokens[some]))
            nodes = nodes[top[island.tokens[some] != PAD]]
            parts.append((nodes, np.zeros(nodes.shape)))
        parts.append((tokens, constants))
        tokens, constants = (np.concatenate(x) for x in zip(*parts, strict=True))
        some = s.rng.permutation(len(self.y))[:200]  # to choose by; what is offered is measured on all
        X, y, weights = self.X[some], self.y[some], self.weights[some]
        values = evaluate(tokens, X[None], None, constants)
        programs = [[(t, c) for t, c in zip(*row, strict=True) if t]
                    for row in zip(tokens.tolist(), constants.tolist(), strict=True)]
        for outer in dict.fromkeys(self.outer):
            q, logs = self.outer.index(outer), np.zeros(0, int)
            if outer == (EXP,) and "log" in g.ops:
                logs = np.flatnonzero((values > 0).all(1))
            both = [*programs, *([(LOG, 0.0), *programs[i]] for i in logs)]
            v = np.concatenate([values, np.log(values[logs])])
            goal = s.loss.y[q, some], s.loss.weights[q, some]
            rows = sums(v[:n_monomials], *goal, 6) + sums(v, *goal, 3)  # of more, any functions make anything
            found = [[(ADD, 0.0)] * (len(row) - 1) + [pair for i in row for pair in both[i]] for row in rows]
            if not outer and {"mul", "div"} <= set(g.ops):
                found += products(programs, values, X, y, weights, "sqrt" in g.ops)
            found = [row + [(PAD, 0.0)] * (L - len(row)) for row in found if len(row) <= L]
            if found:
                rows = np.array(found).transpose(2, 0, 1)
                s.offer("terms", np.full(len(found), q), (rows[0].astype(np.int8), rows[1]))

    def offer_proposals(self) -> None:
        """What the net proposes for the first problem, in as many variables as it knows."""
        s, c = self.search, self.net.config
        columns = strongest(self.X, self.y, c.variables)
        rows = s.rng.permutation(len(self.y))[:c.points]
        back = np.arange(N_TOKENS)
        back[VARIABLES[:len(columns)]] = VARIABLES[columns]
        there = np.arange(N_TOKENS)
        there[VARIABLES] = -1
        there[VARIABLES[columns]] = VARIABLES[:len(columns)]
        island = s.islands["raw"]
        shown = [t for t in island.tokens[0] if (there[t] >= 0).all() and not t[c.max_size:].any()
                 and whole(there[t][None], c.grammar)[0]][:c.members]
        shown = there[np.array(shown, np.int64).reshape(-1, self.grammar.max_size)][:, :c.max_size]
        context = encode_context(self.X[None][:, rows][:, :, columns], self.y[None, rows], shown[None].astype(np.int8),
                                 c)
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.k)
        tokens = back[self.net.sample(context, self.POPULATION, generator, variables=len(columns))[0]]
        known = whole(tokens, self.grammar) & ((tokens != PAD).sum(1) <= self.grammar.max_size)
        tokens = np.pad(tokens[known], ((0, 0), (0, self.grammar.max_size)))[:, :self.grammar.max_size].astype(np.int8)
        for kind in s.islands:
            s.offer(kind, np.zeros(len(tokens), int), (tokens, np.zeros(tokens.shape)))

    # What is found, in the units of the file

    def programs(self) -> list[tuple[list, list]]:
        """Programs of the front, as formulas of y: of each link those that may be better than all shorter ones."""
        s, out, least = self.search, [], dict.fromkeys(self.outer, np.inf)
        for i in range(s.front.nmse.shape[1]):
            best = {}  # of each link
            for q in np.flatnonzero(s.front.nmse[:, i] < np.inf):
                if s.front.nmse[q, i] < min(1.2 * least[self.outer[q]], best.get(self.outer[q], (np.inf,))[0]):
                    best[self.outer[q]] = s.front.nmse[q, i], q
            least |= {outer: min(error, least[outer]) for outer, (error, _) in best.items()}
            out += [formula for _, q in best.values() for formula in self.formulas(take(s.front, (q, i)), q)]
        return out

    def formulas(self, f: Front, q: int) -> list[tuple[list, list]]:
        """A program of the q-th problem as a formula of y, and as ones without a term."""
        n = int((f.tokens != PAD).sum())
        t, c = list(map(int, f.tokens[:n])), list(map(float, f.constants[:n]))
        if f.weighted:
            t, c = weighted(np.array(t), np.array(c), self.X, self.search.loss, q)
        t, c = [*self.outer[q], *t], [0.0] * len(self.outer[q]) + c
        pairs = [[(MUL, 0.0), (C, float(1 / self.units[INDEX[token]]))] * int(INDEX[token] >= 0) + [(token, value)]
                 for token, value in zip(t, c, strict=True)]
        t, c = map(list, zip(*[(MUL, 0.0), (C, self.unit), *sum(pairs, [])], strict=True))
        return variants(normal_form(t, c))


def copies_of(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How often each row of X (N, V), y (N,) is there."""
    _, which, counts = np.unique(np.column_stack([X, y]), axis=0, return_inverse=True, return_counts=True)
    return counts[which]


def unit_of(size: np.ndarray) -> np.ndarray:
    """The power of ten that numbers of this size are measured in: 1 where they are of 0.03 to 30."""
    decade = np.round(np.log10(np.maximum(size, 1e-300)))
    return 10.0 ** np.where(np.abs(decade) > 1, decade, 0)


class Row(NamedTuple):
    """A formula of the front, in the units of the data."""
    tokens: list[int]
    constants: list[float]
    loss: float    # on the rows that it was fitted on
    test: float    # on others; NaN where there are none
    length: float  # of its description, in nats
    pole: bool     # somewhere in the range of the data it has no value, or an infinite one
    recommended: bool

    @property
    def size(self) -> int:
        return len(self.tokens)


def rows_of(programs: list[tuple[list, list]], X: np.ndarray, loss: Loss, test: tuple[np.ndarray, Loss] | None,
            max_size: int, n_symbols: int, digit: float, n_forms: int = 4) -> list[Row]:
    """The front of these programs: constants fitted until nothing changes and written with as few digits as that needs;
    each row has a smaller loss than all that are shorter.

    The description length of a row: n / 2 log(loss) + k / 2 log(n) + size log(symbols), of n data, k constants
    (Rissanen 1978), where a function of a function counts as two symbols more, since people seldom write such. This
    loss is that of rows left out one by one, since a spike may fit an outlier; and it is not taken to be less than
    rounding to the last digit of y makes it. With l1 and huber it is `Loss.fitness`. A pole inside the data's range
    costs 1.5 n. The row with the star is that of `recommended`.
    """
    N, floor = loss.y.shape[1], loss.floor(digit)
    middle = least_squares(np.zeros((1, 0, N)), loss, np.zeros(1, int))[1][0, 0]
    programs = [([C], [float(middle)]), *(x for x in programs if len(x[0]) <= max_size)]
    L = max(len(t) for t, _ in programs)
    tokens = np.array([[*t, *[PAD] * (L - len(t))] for t, _ in programs], np.int8)
    constants = np.array([[*c, *[0.0] * (L - len(c))] for _, c in programs])
    size, of = (tokens != PAD).sum(1), np.zeros(len(tokens), int)
    error = loss.fitness(evaluate(tokens, X[None], None, constants), of)
    error[~np.isfinite(error) | ((tokens == C).sum(1) > max(1, N - 2))] = np.inf
    some, least = [], np.inf
    for k in np.unique(size):  # of each size the best forms, if they may still get better than what is shorter
        here = np.flatnonzero((size == k) & (error < np.inf) & (error <= 3 * least))
        here = here[np.argsort(error[here], kind="stable")]
        some += here[np.sort(np.unique(tokens[here], axis=0, return_index=True)[1])[:n_forms]].tolist()
        least = min(least, error[here].min(initial=np.inf))
    tokens, constants = tokens[some], converged(tokens[some], constants[some], X, loss)
    of = np.zeros(1, int)
    found = (simplified(row[row != PAD].tolist(), c[row != PAD].tolist())
             for row, c in zip(tokens, constants, strict=True))
    chosen = [rounded(t, c, X, loss, floor) for _, (t, c) in pareto(found, X, loss, floor)]
    out, codes, nats = [], [], []  # nats of each row of the data; of the formula
    for outside, (t, c) in pareto(chosen, X, loss, floor) or [(math.inf, ([C], [float(middle)]))]:
        pole, values = has_pole(t, c, X), left_out(t, c, X, loss)
        formula = t.count(C) / 2 * math.log(N) + (len(t) + 2 * int(nested(np.array([t]))[0])) * math.log(n_symbols)
        length = N / 2 * math.log(max(outside, floor)) + formula + pole * 1.5 * N
        nats.append(formula)
        out.append(Row(t, c, measure(t, c, X, loss), measure(t, c, *test) if test else math.nan, length, pole, False))
        each = loss.each(values, of)[0]
        scale = max(each.mean(), floor)
        codes.append(loss.codes(values, of)[0] / 2 if loss.robust else 0.5 * (np.log(scale) + each / scale))
    best = recommended([row.length for row in out], nats, codes)
    out[best] = out[best]._replace(recommended=True)
    return out


RULE = ("recommended: the shortest description of formula and errors, unless a simpler formula is as good within two "
        "standard errors")


def recommended(lengths: list[float], nats: list[float], codes: list[np.ndarray]) -> int:
    """Which formula has the star, by RULE. lengths: of descriptions; nats: of the formulas alone; codes: of each row
    (N,) of the data by each formula. What a longer formula gains must not come from a few rows (Vuong 1989).
    """
    best = int(np.argmin(lengths))
    for i in np.argsort(nats, kind="stable"):
        gain = codes[i] - codes[best]
        if gain.mean() <= 2 * gain.std() / math.sqrt(len(gain)):
            return int(i)
    return best


def pareto(formulas: Iterable[tuple[list, list]], X: np.ndarray, loss: Loss,
           floor: float) -> list[tuple[float, tuple[list, list]]]:
    """The formulas that are better, on rows left out, than all shorter ones by a tenth; nothing behind one that is
    exact.
    """
    rows = [(float(loss.fitness(left_out(t, c, X, loss), np.zeros(1, int))[0]), (t, c)) for t, c in formulas]
    out: list[tuple[float, tuple[list, list]]] = []
    for outside, (t, c) in sorted(rows, key=lambda row: (len(row[1][0]), row[0])):
        if math.isfinite(outside) and (not out or outside < 0.9 * out[-1][0] and out[-1][0] > 2 * floor):
            out.append((outside, (t, c)))
    return out


def left_out(tokens: list[int], constants: list[float], X: np.ndarray, loss: Loss) -> np.ndarray:
    """Values (1, N) of a formula, each as if its constants had been fitted without that row and its copies (PRESS, to
    first order).
    """
    t, c, first = np.array([tokens], np.int8), np.array([constants]), np.zeros(1, int)
    values, J = slopes(t, c, X[None], first, np.arange(len(tokens))[None] == 0, shape_of(t))
    if not (t == C).any() or not np.isfinite(J).all():
        return values if np.isfinite(J).all() else values + np.nan
    root = np.ones_like(loss.y) if loss.weights is None else np.sqrt(loss.weights)
    Q, R = np.linalg.qr((J[0] * root).T)
    Q = Q[:, np.abs(np.diag(R)) > 1e-12 * np.abs(R).max(initial=1e-300)]  # the others are there twice
    leverage, far = loss.copies[0] * (Q ** 2).sum(1), (values - loss.y)[0] * root[0]
    # Where a row alone decides, l1 leaves no residual to scale up: that of least squares is taken.
    far = np.where(leverage > 0.9, far - Q @ (Q.T @ far), far) / np.maximum(1 - leverage, 1e-10)
    with np.errstate(all="ignore"):
        effect = (c[t == C][:, None] * J[0]) ** 2  # (K, N)
        row = effect.argmax(1)
        others = effect.sum(1) - effect.max(1) * loss.copies[0][row]
    noise = max(1e-12 * loss.y.var() * loss.y.shape[1], 4 * (1.4826 * np.median(np.abs(far))) ** 2)
    alone = row[others < noise]  # a constant that no other row tells from 0, by two standard errors
    far[alone] = (np.median(loss.y) - loss.y)[0, alone]
    return loss.y + far / root


def measure(tokens: list[int], constants: list[float], X: np.ndarray, loss: Loss) -> float:
    """The loss of a formula."""
    return float(loss(evaluate(np.array([tokens], np.int8), X[None], None, np.array([constants])), np.zeros(1, int))[0])


def converged(tokens: np.ndarray, constants: np.ndarray, X: np.ndarray, loss: Loss) -> np.ndarray:
    """Constants (P, L) from which no step makes a loss smaller by more than 1e-12 of it, or after 200 steps. With l1
    they come from ever sharper huber losses: steps on l1 itself stop where a row is met.
    """
    constants, chunk = constants.copy(), max(1, 300_000 // len(X))
    for corner in (0.1, 0.01, 1e-3, 1e-4) if loss.name == "l1" else ():
        smooth = Loss(loss.y, "huber", loss.weights, loss.copies)
        smooth.corner = corner * loss.spread
        for some in (slice(k, k + chunk) for k in range(0, len(tokens), chunk)):
            if (tokens[some] == C).any():
                of = np.zeros(len(tokens[some]), int)
                found = fit_constants(tokens[some], constants[some], X[None], smooth, of, 20)
                before, after = (loss(evaluate(tokens[some], X[None], of, c), of) for c in (constants[some], found))
                constants[some] = np.where((after < before)[:, None], found, constants[some])
    for k in range(0, len(tokens), chunk):
        todo = np.arange(k, min(k + chunk, len(tokens)))
        todo = todo[(tokens[todo] == C).any(1)]
        for _ in range(10):
            if not len(todo):
                break
            of = np.zeros(len(todo), int)
            before = loss(evaluate(tokens[todo], X[None], of, constants[todo]), of)
            constants[todo] = fit_constants(tokens[todo], constants[todo], X[None], loss, of, 20)
            after = loss(evaluate(tokens[todo], X[None], of, constants[todo]), of)
            todo = todo[after < before * (1 - 1e-12)]
    return constants


def rounded(tokens: list[int], constants: list[float], X: np.ndarray, loss: Loss, floor: float) -> tuple[list, list]:
    """A formula whose constants have as few digits as leave its loss what it is: to 1e-9 of it, or to the floor."""
    t, c = np.array([tokens], np.int8), np.array([constants])
    most = measure(tokens, constants, X, loss) * (1 + 1e-9) + floor ** (POWER.get(loss.name, 2) / 2)
    for i in np.tile(np.flatnonzero(t[0] == C), 2):  # once more, when the others are short
        tried = np.array([0.0, *(float(f"{c[0, i]:.{n}g}") for n in range(1, 18))])
        rows = np.repeat(c, len(tried), 0)
        rows[:, i] = tried
        of = np.zeros(len(tried), int)
        fits = np.flatnonzero(loss(evaluate(np.repeat(t, len(tried), 0), X[None], of, rows), of) <= most)
        c[0, i] = tried[fits[0]] if len(fits) else c[0, i]
    return simplified(tokens, c[0].tolist())


def has_pole(tokens: list[int], constants: list[float], X: np.ndarray) -> bool:
    """Whether a formula has no value somewhere between the data's least and greatest, by 4,096 points and the data."""
    low, high = X.min(0), X.max(0)
    inside = np.concatenate([X, low + (high - low) * np.random.default_rng(0).random((4096, X.shape[1])),
                             low + (high - low) * np.linspace(0, 1, 4096)[:, None]])[None]
    t, c = np.array([tokens], np.int8), np.array([constants])
    below = [operands(tokens, i)[0][1] for i, token in enumerate(tokens) if token == DIV]
    value, *divisors = evaluate(t, inside, None, c, np.isin(np.arange(len(tokens)), [0, *below])[None])
    # Where a divisor touches 0 and does not cross it, values are far larger than the data's.
    steep = np.abs(value).max() > (10 if X.shape[1] == 1 else 1000) * np.abs(value[:len(X)]).max()
    return bool(not np.isfinite(value).all() or steep or any(d.min() <= 0 <= d.max() for d in divisors))


# ---- Regression as a user has it

class Regressor:
    """Symbolic regression with scikit-learn's habits: `Regressor(max_minutes=0.2).fit(X, y).formula`.

    Settings are those of the flags of the same names. After `fit`: `front` (a list of Row), `best` (the recommended
    one), `formula` (it as Python writes it), `predict(X)`.
    """

    def __init__(self, ops: Sequence[str] = REGRESS_OPS, max_size: int = 40, loss: str = "mse",
                 max_minutes: float = 1.0, evaluations: int = 0, test_fraction: float = 0.25, seed: int = 0,
                 net: Net | None = None):
        self.ops, self.max_size, self.loss, self.max_minutes = ops, max_size, loss, max_minutes
        self.evaluations, self.test_fraction, self.seed, self.net = evaluations, test_fraction, seed, net
        self.names: list[str] = []
        self.front: list[Row] = []

    def get_params(self, deep: bool = True) -> dict:
        """The settings, by which scikit-learn makes copies."""
        return {name: getattr(self, name) for name in (
            "ops", "max_size", "loss", "max_minutes", "evaluations", "test_fraction", "seed", "net")}

    def set_params(self, **settings) -> Regressor:
        self.__init__(**{**self.get_params(), **settings})
        return self

    def prepare(self, X, y, names: Sequence[str] | None = None, weights=None, digit: float = 0.0) -> Regressor:
        """Take the data, of which y is known to `digit`, split them, and make a search ready. Raises UserError."""
        if not 0 <= self.test_fraction <= 0.9 or self.seed < 0 or self.max_size < 3:
            raise UserError(f"test_fraction {self.test_fraction}, seed {self.seed}, max_size {self.max_size}: expected "
                            "0 to 0.9; 0 or more; 3 or more")
        if names is None:
            names = getattr(X, "columns", None)  # of a data frame
        X, y = as_data(X, y)
        self.names = [f"x{i}" for i in range(X.shape[1])] if names is None else list(map(str, names))
        try:
            weights = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
        except (TypeError, ValueError):
            weights = np.zeros(0)
        if weights.shape != y.shape or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
            raise UserError("weights must be numbers, one for each row, 0 or more and not all 0")
        if self.loss == "log" and y.min() <= 0:
            raise UserError(f"--loss log: y is {y.min():g} in row {int(y.argmin())}, and must be above 0")
        if len(self.names) != X.shape[1]:
            raise UserError(f"{len(self.names)} names of {X.shape[1]} columns")
        if X.shape[1] > len(VARIABLES):
            raise UserError(f"{X.shape[1]} features: there may be {len(VARIABLES)}; choose some (--features)")
        sizes = np.abs([*np.ptp(X, 0), *np.abs(X).max(0), np.ptp(y), np.abs(y).max()])
        if sizes.max() > 1e100 or sizes[sizes > 0].min(initial=1) < 1e-100:
            raise UserError("numbers of more than 1e100, or that differ by less than 1e-100: choose other units")
        grammar = Grammar(ops=tuple(self.ops), variables=X.shape[1], max_size=min(30, self.max_size), constants=True)
        order = np.random.default_rng([self.seed, PROBLEMS]).permutation(np.flatnonzero(weights))[:MOST_ROWS]
        n_test = round(self.test_fraction * len(order)) if len(order) >= 20 else 0
        # Rows that are equal go to one side, or a formula would be tested on rows that it is fitted on.
        _, first, which, counts = np.unique(np.column_stack([X, y])[order], axis=0, return_index=True,
                                            return_inverse=True, return_counts=True)
        drawn, up_to = np.argsort(first), np.zeros(len(first), np.int64)
        up_to[drawn] = np.cumsum(counts[drawn])
        is_test = up_to[which] <= n_test
        self.rows = {"test": np.sort(order[is_test]), "train": np.sort(order[~is_test])}
        if len(self.rows["train"]) < 3:
            raise UserError(f"{len(self.rows['train'])} rows to fit, behind those of --test-fraction and those without "
                            "weight; there must be 3 or more")
        self.data = {name: (X[rows], Loss(y[rows][None], self.loss, weights[rows][None], copies_of(X[rows], y[rows])))
                     for name, rows in self.rows.items() if len(rows)}
        self.digit, self.n_symbols = digit, len(grammar.leaves) + len(grammar.ops)
        X, y, weights = self.data["train"][0], self.data["train"][1].y[0], weights[self.rows["train"]]
        some = np.sort(np.random.default_rng([self.seed, EVAL]).permutation(len(y))[:SEARCHED_ROWS])
        some = some if np.ptp(y[some]) else np.arange(len(y))
        self.regression = None if not np.ptp(y) else Regression(X[some], y[some], weights[some], self.loss, grammar,
                                                            self.seed, self.net, digit)
        return self

    def fit(self, X, y, names: Sequence[str] | None = None, weights=None) -> Regressor:
        """Search for formulas of y (N,) in X (N, V). names, weights: of columns and rows. Raises UserError."""
        return self.prepare(X, y, names, weights).go()

    def go(self, watch: Callable[[Regressor], bool] = lambda regressor: False) -> Regressor:
        """Search on what is prepared. watch: called before each round, it ends the search by True."""
        while self.regression and not self.is_over() and not watch(self):
            self.regression.round(math.inf if self.evaluations else 60 * self.max_minutes - self.regression.seconds)
        return self.conclude()

    def is_over(self) -> bool:
        """Out of evaluations or time; or a formula was exact long ago."""
        s = self.regression
        exact = s.exact_at is not None and s.k >= 2 * s.exact_at + 20
        spent = s.search.spent.sum() >= self.evaluations if self.evaluations else s.seconds >= 60 * self.max_minutes
        return s.k > 0 and bool(exact or spent)

    def conclude(self, n_forms: int = 4) -> Regressor:
        """Make the front of what was found so far; n_forms: of formulas of a size, that are fitted until nothing
        changes.
        """
        programs = self.regression.programs() if self.regression else []
        self.front = rows_of(programs, *self.data["train"], self.data.get("test"), self.max_size, self.n_symbols,
                             self.digit, n_forms)
        return self

    @property
    def best(self) -> Row:
        """The recommended row."""
        if not self.front:
            raise UserError("nothing is fitted yet")
        return next(row for row in self.front if row.recommended)

    @property
    def formula(self) -> str:
        return text_of(self.best, safe_names(self.names))

    def predict(self, X) -> np.ndarray:
        """Values (N,) of the recommended formula."""
        X, best = as_data(X, None)[0], self.best
        if X.shape[1] != len(self.names):
            raise UserError(f"X has {X.shape[1]} columns, and the formula was found with {len(self.names)}")
        return evaluate(np.array([best.tokens], np.int8), X[None], None, np.array([best.constants]))[0]

    def score(self, X, y) -> float:
        """The share of y's variance that the formula explains, R^2."""
        return float(1 - ((self.predict(X) - y) ** 2).mean() / np.var(y))


def safe_names(names: Sequence[str]) -> list[str]:
    """Names that Python and sympy take for variables: lambda_ of lambda, temp of temp_%, Time_s of Time (s)."""
    import sympy
    out: list[str] = []
    for name in names:
        safe = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name)).strip("_")  # as Python reads it: x2 of x²
        safe = safe if safe.isidentifier() else f"v_{safe}"
        safe = safe if safe.isidentifier() else f"v{len(out)}"
        while keyword.iskeyword(safe) or safe in out or any(hasattr(known, safe) for known in (sympy, math, builtins)):
            safe += "_"
        out.append(safe)
    return out


class Powers(ast.NodeTransformer):
    """x * x ** 2 and (x ** 2) ** 2 as one power, -1 * x as -x."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.BinOp(op=ast.Pow(), left=ast.BinOp(op=ast.Pow(), left=a, right=ast.Constant(value=int() as n)),
                           right=ast.Constant(value=int() as m)):
                return ast.BinOp(a, ast.Pow(), ast.Constant(n * m))
            case ast.BinOp(op=ast.Mult(), left=a,
                           right=ast.BinOp(op=ast.Pow(), left=b, right=ast.Constant(value=int() as n))
                           ) if ast.dump(a) == ast.dump(b):
                return ast.BinOp(a, ast.Pow(), ast.Constant(n + 1))
            case ast.BinOp(op=ast.Mult(), left=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)), right=a):
                return ast.UnaryOp(ast.USub(), a)
        return node


def text_of(row: Row, names: Sequence[str]) -> str:
    """A formula as Python writes it, with names that are safe."""
    tree = Powers().visit(ast.parse(infix(row.tokens, row.constants, names), mode="eval"))
    return ast.unparse(tree)


# ---- Mode regress

def regress(args: flags.Flags) -> dict:
    """A front of formulas for the file of --data, or predictions for that of --predict; the summary. Raises
    UserError.
    """
    if args.predict is not None:
        return predict_file(args)
    devices.refuse_ranks(SCRIPT)
    given = args.given
    args, saved = run.restore(args, SCRIPT, search=dict, data=str)
    if saved and "max_minutes" not in given:
        args.max_minutes = saved["args"]["max_minutes"]
    if args.data is None:
        raise UserError("--mode regress: --data FILE is missing")
    sample = read_sample(args.data, args)
    weights = sample.y * 0 + 1 if sample.weights is None else sample.weights
    parts = (sample.X, sample.y, weights, np.frombuffer(repr(sample.names).encode(), np.uint8))
    hash_ = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:12]
    if saved and saved["data"] != hash_:
        raise UserError(f"{args.data}: it has changed since {args.resume} was begun")
    source = args.net or (KEPT if Path(KEPT).exists() else None)
    regressor = Regressor(args.ops, args.max_size, args.loss, args.max_minutes, args.evaluations, args.test_fraction,
                          args.seed, load_net(source)[0].eval() if source else None)
    regressor.prepare(sample.X, sample.y, sample.names, sample.weights, sample.digit)
    if saved and regressor.regression:
        regressor.regression.restore(saved["search"])
    with run.Run(args, SCRIPT, __file__, saved) as r:
        print(f"{args.data}: {len(sample.y)} rows, {sample.target!r} of {', '.join(sample.names)}", *sample.notes,
              sep="\n  ", flush=True)
        names = {name: safe for name, safe in zip(sample.names, safe_names(sample.names), strict=True) if name != safe}
        if names:
            print("  in code: " + ", ".join(f"{name!r} is {safe}" for name, safe in names.items()))
        if len(sample.y) < 10:
            print(f"  only {len(sample.y)} rows: whatever is found may be chance")
        if len(sample.y) > MOST_ROWS:
            print(f"  {MOST_ROWS} of the rows are used, drawn by --seed")
        n_test, n = len(regressor.rows["test"]), len(regressor.rows["train"])
        print(f"  {n} rows are fitted" +
              (f", {n_test}, drawn by --seed, are for the column test alone" if n_test else "") +
              (f"; programs are bred on {SEARCHED_ROWS} of them" if n > SEARCHED_ROWS else ""))
        if not regressor.regression:
            print(f"  {sample.target!r} is the same in all rows that are fitted: there is nothing to search for")
        next_report = 0.0

        def watch(reg: Regressor) -> bool:
            nonlocal next_report
            r.step = reg.regression.k
            if reg.regression.k and (reg.regression.seconds >= next_report or r.stopped_by):
                next_report = 1.5 * reg.regression.seconds + 1
                report(r, reg.conclude(n_forms=1), sample)
                r.save("last.pt", data=hash_, search=reg.regression.state())
            return bool(r.stopped_by)
        regressor.go(watch)
        if regressor.regression:
            r.step = regressor.regression.k
            r.save("last.pt", data=hash_, search=regressor.regression.state())
        return finish_regression(r, regressor, sample, args, hash_)


def report(r: run.Run, regressor: Regressor, sample: Sample) -> None:
    """front.csv, the live line."""
    best, s = regressor.best, regressor.regression
    write_front(r.folder / "front.csv", regressor)
    row = {"step": s.k, "evaluations": int(s.search.spent.sum()), "size": best.size, "train_loss": best.loss,
           "test_loss": best.test}
    r.record(row)
    test = "" if math.isnan(best.test) else f" (test {best.test:.4g})"
    print(f"{s.seconds:6.1f} s, {row['evaluations']} evaluations: {best.loss:.4g}{test} {shown(best, regressor):.90}",
          flush=True)


def shown(row: Row, regressor: Regressor) -> str:
    """A formula with the names that a person gave."""
    safe = safe_names(regressor.names)
    original = dict(zip(safe, regressor.names, strict=True))
    return re.sub(r"[^\W\d]\w*", lambda m: original.get(m[0], m[0]), text_of(row, safe))


def write_front(file: Path, regressor: Regressor) -> None:
    out, safe = io.StringIO(), safe_names(regressor.names)
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["size", "train", "test", "recommended", "pole", "formula", "python"])
    for row in regressor.front:
        table.writerow([row.size, repr(row.loss), repr(row.test), int(row is regressor.best), int(row.pole),
                        shown(row, regressor), text_of(row, safe)])
    files.write_atomic(file, out.getvalue().encode())


def finish_regression(r: run.Run, regressor: Regressor, sample: Sample, args: flags.Flags, hash_: str) -> dict:
    """The table, the files, the picture; the summary."""
    import sympy
    best, safe, folder, s = regressor.best, safe_names(sample.names), r.folder, regressor.regression
    write_front(folder / "front.csv", regressor)
    text = text_of(best, safe)
    formula = to_sympy(best.tokens, best.constants, safe)
    latex = sympy.latex(formula, symbol_names={sympy.Symbol(a): rf"\mathrm{{{as_latex(b)}}}" for a, b in
                                               zip(safe, sample.names, strict=True)})
    used = sorted(op.name for op in OPS if re.search(rf"\b{op.name}\(", text) and hasattr(math, op.name))
    body = [f'"""{as_comment(sample.target)}, found by {SCRIPT} in {as_comment(Path(args.data).name)}."""',
            *([f"from math import {', '.join(used)}"] if used else []), "", "",
            f"def formula({', '.join(safe)}):",
            *(f"    # {a}: {as_comment(b)}" for a, b in zip(safe, sample.names, strict=True)
                                                  if a != b), f"    return {text}", ""]
    for name, content in (("formula.py", "\n".join(body)), ("formula.tex", latex + "\n"),
                          ("formula.sympy.txt", f"{formula}\n")):
        files.write_atomic(folder / name, content.encode("utf-8", "backslashreplace"))
    test = regressor.data.get("test")
    save_regressor(r, regressor, sample, hash_)
    draw_report(regressor, sample, folder / "report.png")
    print(f"{'size':>6s} {'train ' + args.loss:>12s} {'test':>12s}  {sample.target} =")
    for row in regressor.front:
        scored = "-" if math.isnan(row.test) else f"{row.test:.5g}"
        print(f"{'*' if row is best else ' '}{row.size:5d} {row.loss:12.5g} {scored:>12s}  {shown(row, regressor)}"
              f"{'   (pole)' * row.pole}")
    print(f"* {RULE}")
    for line in outliers(regressor, sample) if args.loss == "mse" else []:
        print(line)
    share = s.search.gains / max(1, s.search.gains.sum()) if s else np.zeros(3)
    print("improvements of the front: " + ", ".join(f"{name} {x:.0%}" for name, x in zip(SOURCES, share, strict=True)))
    summary = r.summary(n_params=best.tokens.count(C), formula=text, sympy=str(formula), train_loss=best.loss,
                        test_loss=best.test, size=best.size, n=len(sample.y), n_test=len(test[0]) if test else 0,
                        evaluations=int(s.search.spent.sum()) if s else 0, search_seconds=s.seconds if s else 0.0,
                        steps=s.k if s else 0, stopped_early=bool(r.stopped_by),
                        gains=dict(zip(SOURCES, map(float, share), strict=True)))
    print(f"{text}\n{folder}")
    r.leave_if_stopped()
    return summary


def as_latex(name: str) -> str:
    safe = re.sub(r"([#$%&_{}])", r"\\\1", name.replace("\\", "").replace("~", " "))
    return safe.replace("^", r"\wedge ")


def as_comment(name: str) -> str:
    return " ".join(name.replace("\\", "/").replace('"', "'").split())


def outliers(regressor: Regressor, sample: Sample) -> list[str]:
    """A line that names the rows whose residual is far out, if there are any: from what --loss l1 would recommend of
    all that was found, and of a round of its own, since the formula of mse may have gone to the outliers.
    """
    used = np.sort(np.concatenate(list(regressor.rows.values())))
    some = np.sort(np.random.default_rng(0).permutation(used)[:200])
    X, y = sample.X[some], sample.y[some]
    if not regressor.regression or not np.ptp(y):
        return []
    weights = np.ones(len(some)) if sample.weights is None else sample.weights[some]
    robust = Regression(X, y, weights, "l1", regressor.regression.grammar, 0)
    robust.round()
    rows = rows_of(robust.programs() + regressor.regression.programs(), X,
                   Loss(y[None], "l1", weights[None], copies_of(X, y)), None,
                   regressor.max_size, regressor.n_symbols, sample.digit)
    best = next(row for row in rows if row.recommended)
    residual = sample.y[used] - evaluate(np.array([best.tokens], np.int8), sample.X[None, used], None,
                                         np.array([best.constants]))[0]
    middle = np.median(residual)
    far = np.abs(residual - middle)
    least = max(3 * sample.digit, 1e-9 * sample.y.std(), 1e-15 * np.abs(sample.y).max())  # less is rounding
    rows = np.flatnonzero(far > max(6 * 1.4826 * np.median(far), least))
    if not len(rows):
        return []
    lines = ", ".join(str(sample.lines[i]) for i in used[rows[np.argsort(-far[rows])]][:10])
    return [f"warning: {len(rows)} rows are more than 6 median deviations from the formula, line {lines}: "
            "--loss huber or l1 gives them less weight"]


def draw_report(regressor: Regressor, sample: Sample, out: Path) -> Path:
    """The fit, the front and the residuals."""
    fig, axes = plots.new_figure(1, 3, width=5.0, height=4.0)
    best, names, is_log = regressor.best, regressor.names, regressor.loss == "log"
    for part, color in (("train", "C0"), ("test", "C1")):
        rows = regressor.rows[part]
        if not len(rows):
            continue
        X, y = sample.X[rows], sample.y[rows]
        found = regressor.predict(X)
        axes[0].plot(X[:, 0] if len(names) == 1 else found, y, ".", ms=4, color=color, label=part)
        with np.errstate(all="ignore"):
            axes[2].plot(found, np.log(y / found) if is_log else y - found, ".", ms=4, color=color, label=part)
    if len(names) == 1:
        spaced = np.geomspace if is_log and sample.X.min() > 0 else np.linspace
        x = spaced(sample.X.min(), sample.X.max(), 1000)
        axes[0].plot(x, regressor.predict(x[:, None]), lw=1, color="k")
    else:
        axes[0].axline((sample.y[0], sample.y[0]), slope=1, color="k", lw=0.7)
    axes[0].set(xlabel=plots.as_label(names[0]) if len(names) == 1 else "predicted",
                ylabel=plots.as_label(sample.target))
    axes[0].set_title(plots.as_label(f"{sample.target} = {shown(best, regressor):.70}"), fontsize=8, loc="left")
    if is_log:
        axes[0].set(yscale="log", xscale="log" if len(names) > 1 or sample.X.min() > 0 else "linear")
        axes[2].set(xscale="log")
    sizes = [row.size for row in regressor.front]
    for key, part, color in (("loss", "train", "C0"), ("test", "test", "C1")):
        if len(regressor.rows[part]):
            axes[1].plot(sizes, [max(getattr(row, key), 1e-300) for row in regressor.front], marker="o", ms=4,
                         color=color, label=part)
    axes[1].axvline(best.size, color="k", lw=0.7, ls=":")
    axes[1].set(xlabel="size (dotted: recommended)", ylabel=f"loss ({regressor.loss})", yscale="log", title="front")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[2].axhline(0, color="k", lw=0.7)
    axes[2].set(xlabel="predicted", ylabel="residual of log y" if is_log else "residual", title="residuals")
    for ax in axes[:2]:
        ax.legend(frameon=False, fontsize=7)
    return plots.save_figure(fig, out)


def save_regressor(r: run.Run, regressor: Regressor, sample: Sample, hash_: str) -> None:
    test = regressor.data.get("test")
    r.save("best.pt", data=hash_, regressor={
        "settings": {**regressor.get_params(), "ops": list(regressor.ops), "net": None}, "names": regressor.names,
        "target": sample.target, "n_symbols": regressor.n_symbols, "tokens": list(TOKENS),
        "front": [row._asdict() for row in regressor.front],
        "test": [torch.from_numpy(x) for x in (test[0], test[1].y, test[1].weights)] if test else []})


def load_regressor(saved: dict, path: str | Path) -> Regressor:
    """The Regressor of a run, ready to predict. Raises UserError."""
    with files.refuse_damaged(path):
        kept = saved["regressor"]
        if kept["tokens"] != list(TOKENS):
            raise UserError(f"{path}: it was written with other operators: {', '.join(kept['tokens'])}")
        out = Regressor(**kept["settings"])
        out.names, out.target = list(kept["names"]), str(kept["target"])
        out.front = [Row(**{**row, "tokens": list(row["tokens"]), "constants": list(row["constants"])})
                     for row in kept["front"]]
        grammar = Grammar(ops=tuple(TOKENS), variables=len(out.names), max_size=100, constants=True)
        for row in out.front:
            check_programs(np.array([row.tokens], np.int8), grammar)
        X, y, weights = (x.numpy() for x in kept["test"]) if kept["test"] else (None, None, None)
        out.data = {} if X is None else {"test": (X, Loss(y, out.loss, weights))}
    return out


def predict_file(args: flags.Flags) -> dict:
    """Write predictions.csv for a file whose columns have the names of those that the formula was found with."""
    path_ = checkpoint.file_of(args.checkpoint)
    saved = checkpoint.read(path_)
    saved = checkpoint.check(saved, path_, str(saved.get("script")), regressor=dict)  # a copy of the script may read it
    regressor, table = load_regressor(saved, path_), read_table(args.predict)
    if not table.header and len(table.names) == len(regressor.names):
        table = table._replace(names=regressor.names)
    missing = [name for name in regressor.names if name not in table.names]
    if missing:
        raise UserError(f"{args.predict}: no column {missing[0]!r:.60}; there are {', '.join(table.names):.200}")
    columns = [table.numbers(table.names.index(name)) for name in regressor.names]
    for name, column in zip(regressor.names, columns, strict=True):
        if column is None:
            raise UserError(f"{args.predict}: column {name!r:.60} has cells that are no numbers")
    X = np.stack(columns, 1)
    out = Path(args.output or path_.parent / "predictions.csv")
    files.check_output(out)
    values = regressor.predict(X)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[regressor.target],
                                                     *([repr(float(v)) if np.isfinite(v) else ""] for v in values)])
    files.write_atomic(out, text.getvalue().encode())
    n = int((~np.isfinite(values)).sum())
    print(f"{out}: {len(values)} predictions" + (f", {n} of them empty: a cell is missing, or the formula has no value"
                                                 if n else ""))
    return {"script": SCRIPT, "predictions": str(out), "n": len(values), "empty": n}


# ---- Mode bench: published problems, and other engines

# Formula: range of all variables, or of each; points; a noise, if there is one. Values must be below 10,000. Where a
# source has a grid, so many points at random. They are drawn by the place in the table: new ones stand last.
PROBLEM_SETS = {
    # Nguyen et al. 2011, as in DSO (Petersen et al. 2021)
    "nguyen": ("x0**3 + x0**2 + x0: -1,1; 20", "x0**4 + x0**3 + x0**2 + x0: -1,1; 20",
               "x0**5 + x0**4 + x0**3 + x0**2 + x0: -1,1; 20", "x0**6 + x0**5 + x0**4 + x0**3 + x0**2 + x0: -1,1; 20",
               "sin(x0**2)*cos(x0) - 1: -1,1; 20", "sin(x0) + sin(x0 + x0**2): -1,1; 20",
               "log(x0 + 1) + log(x0**2 + 1): 0,2; 20", "sqrt(x0): 0,4; 20", "sin(x0) + sin(x1**2): 0,1; 20",
               "2*sin(x0)*cos(x1): 0,1; 20", "x0**x1: 0,1; 20", "x0**4 - x0**3 + 0.5*x1**2 - x1: 0,1; 20"),
    # Keijzer 2003, without the sixth, a sum of 1 / i, which has no closed form
    "keijzer": ("0.3*x0*sin(6.283185307179586*x0): -1,1; 20", "0.3*x0*sin(6.283185307179586*x0): -2,2; 40",
                "0.3*x0*sin(6.283185307179586*x0): -3,3; 60",
                "x0**3*exp(-x0)*cos(x0)*sin(x0)*(sin(x0)**2*cos(x0) - 1): 0,10; 200",
                "30*x0*x1/((x0 - 10)*x2**2): -1,1 -1,1 1,2; 1000", "log(x0): 1,100; 100", "sqrt(x0): 0,100; 100",
                "log(x0 + sqrt(x0**2 + 1)): 0,100; 100", "x0**x1: 0,1; 100", "x0*x1 + sin((x0 - 1)*(x1 - 1)): -3,3; 20",
                "x0**4 - x0**3 + x1**2/2 - x1: -3,3; 20", "6*sin(x0)*cos(x1): -3,3; 20",
                "8/(2 + x0**2 + x1**2): -3,3; 20",
                "x0**3/5 + x1**3/2 - x1 - x0: -3,3; 20"),
    "koza": ("x0**4 + x0**3 + x0**2 + x0: -1,1; 20", "x0**5 - 2*x0**3 + x0: -1,1; 20",
             "x0**6 - 2*x0**4 + x0**2: -1,1; 20"),
    # Mundhenk et al. 2021
    "livermore": ("1/3 + x0 + sin(x0**2): -10,10; 1000", "sin(x0**2)*cos(x0) - 2: -1,1; 20",
                  "sin(x0**3)*cos(x0**2) - 1: -1,1; 20",
                  "log(x0 + 1) + log(x0**2 + 1) + log(x0): 0,2; 20", "x0**4 - x0**3 + x0**2 - x1: 0,1; 20",
                  "4*x0**4 + 3*x0**3 + 2*x0**2 + x0: -1,1; 20", "(exp(x0) - exp(-x0))/2: -1,1; 20",
                  "(exp(x0) + exp(-x0))/2: -1,1; 20",
                  "x0**9 + x0**8 + x0**7 + x0**6 + x0**5 + x0**4 + x0**3 + x0**2 + x0: -1,1; 20",
                  "6*sin(x0)*cos(x1): 0,1; 20",
                  "x0**4/(x0 + x1): -1,1; 50", "x0**5/x1**3: -1,1; 50", "x0**(1/3): 0,4; 20",
                  "x0**3 + x0**2 + x0 + sin(x0) + sin(x0**2): -1,1; 20", "x0**(1/5): 0,4; 20", "x0**(2/5): 0,4; 20",
                  "4*sin(x0)*cos(x1): 0,1; 20", "sin(x0**2)*cos(x0) - 5: -1,1; 20",
                  "x0**5 + x0**4 + x0**2 + x0: -1,1; 20",
                  "exp(-(x0**2)): -1,1; 20", "x0**8 + x0**7 + x0**6 + x0**5 + x0**4 + x0**3 + x0**2 + x0: -1,1; 20",
                  "exp(-0.5*x0**2): -1,1; 20"),
    "pagie": ("1/(1 + 1/x0**4) + 1/(1 + 1/x1**4): -5,5; 676",),
    # Every eighth of the hundred of Udrescu and Tegmark 2020, from the fourth on: I.8.14, I.12.11, I.16.6, I.29.4,
    # I.34.14, I.41.16, II.2.42, II.10.9, II.13.34, II.34.2, II.38.3, III.12.43, with their ranges; chosen before the
    # first timed run
    "feynman": ("sqrt((x1 - x0)**2 + (x3 - x2)**2): 1,5 1,5 1,5 1,5; 200",
                "x0*(x1 + x2*x3*sin(x4)): 1,5 1,5 1,5 1,5 1,5; 200",
                "(x1 + x2)/(1 + x1*x2/x0**2): 1,5 1,5 1,5; 200", "x0/x1: 1,10 1,10; 200",
                "(1 + x1/x0)/sqrt(1 - x1**2/x0**2)*x2: 3,10 1,2 1,5; 200",
                "x1*x0**3/(9.869604401089358*x4**2*(exp(x1*x0/(6.283185307179586*x3*x2)) - 1)): "
                "1,5 1,5 1,5 1,5 1,5; 200",
                "x0*(x2 - x1)*x3/x4: 1,5 1,5 1,5 1,5 1,5; 200", "x0/x1/(1 + x2): 1,5 1,5 1,5; 200",
                "x0/sqrt(1 - x1**2/x2**2): 1,5 1,2 3,10; 200", "x0*x1*x2/2: 1,5 1,5 1,5; 200",
                "x0*x1*x2/x3: 1,5 1,5 1,5 1,5; 200",
                "x0*x1/6.283185307179586: 1,5 1,5; 200"),
    # Four of Nguyen's, a decay that is measured with noise (see --noise), Coulomb's law in units of 1e9
    "six": ("x0**3 + x0**2 + x0: -1,1; 20", "x0**6 + x0**5 + x0**4 + x0**3 + x0**2 + x0: -1,1; 20",
            "log(x0 + 1) + log(x0**2 + 1): 0,2; 20", "2*sin(x0)*cos(x1): 0,1; 20",
            "2.5*exp(-0.7*x0) + 1.3: 0,5; 50; 0.05", "8.99*x0*x1/x2**2: 1,5 1,5 1,5; 50"),
}


PEERS = ("gplearn", "pyoperon", "eggp")  # other engines: packages, each with a branch in `peer`


class Published(NamedTuple):
    """A problem of a set, with data, and the noise that is added to y as a share of its standard deviation."""
    name: str
    problems: Problems   # Q = 1, without noise
    y: np.ndarray        # (N,) with it
    noise: float
    max_size: int        # tokens that a formula which counts as recovered may have


def published(set_name: str, i: int, noise: float, seed: int) -> Published:
    """The i-th problem of a set, its points and noise drawn by the seed."""
    text, bounds, points, *own = [x.strip() for x in re.split("[:;]", PROBLEM_SETS[set_name][i])]
    tokens, constants = parse(text)
    ranges = [tuple(map(float, pair.split(","))) for pair in bounds.split()]
    variables = 1 + int(INDEX[tokens].max())
    rng = np.random.default_rng([seed, PROBLEMS, list(PROBLEM_SETS).index(set_name), i])
    for _ in range(1000):  # poles of some are near the data at times
        problems, usable = make_problems(rng, np.array([tokens], np.int8), int(points), variables,
                                         np.array([constants]),
                                         [np.array(ranges * (variables if len(ranges) == 1 else 1)).T])
        if len(usable):
            break
    else:
        raise UserError(f"{set_name}-{i + 1}: it has no usable values (below 10,000, not all the same)")
    noise = max(noise, float(own[0]) if own else 0.0)
    y = problems.y[0] + noise * problems.y[0].std() * rng.normal(size=int(points))
    return Published(f"{set_name}-{i + 1}", problems, y, noise, 2 * len(simplified(tokens, constants)[0]))


def judged(p: Published, formulas: Iterable[tuple[list, list]]) -> tuple[bool, bool, int]:
    """Whether one of the formulas solves the problem, and whether one recovers it; the size of that (0: none).

    Without noise: NMSE of at most SOLVED on test points; and besides equal to the truth on a range twice as wide, with
    at most twice its tokens. With noise: the error of test points to the truth within the noise; and besides the same
    as the truth once its own constants are fitted to that, of which those fitted to the noise differ by 5 % at most.
    """
    solved, sizes = False, []
    for t, c in formulas:
        t, c = simplified(t, c)
        nmse = measure(t, c, p.problems.X_test[0], Loss(p.problems.y_test)) / p.problems.y_test.var()
        if nmse <= max(SOLVED, p.noise ** 2):
            solved = True
            own = c
            if p.noise:
                row, values = np.array([t], np.int8), np.array([c])
                c = converged(row, values, p.problems.X[0], Loss(p.problems.y))[0].tolist()
            near = all(abs(a - b) <= 0.05 * abs(b) for a, b in zip(own, c, strict=True))
            wide = evaluate(np.array([t], np.int8), p.problems.X_wide, None, np.array([c]))
            y = p.problems.y_wide
            with np.errstate(all="ignore"):
                same = (~np.isfinite(y) | (np.abs(wide - y) <= 1e-6 * (1 + np.abs(y)))).all()
            sizes += [len(t)] if near and same and len(t) <= p.max_size else []
    return solved, bool(sizes), min(sizes, default=0)


def better(a: tuple[bool, bool, int], b: tuple[bool, bool, int]) -> tuple[bool, bool, int]:
    """Of two judgements the one that is recovered, or else solved; of equal ones that of the smaller formula."""
    return max(a, b, key=lambda one: (*one[:2], -one[2]))


Outcome = tuple[bool, bool, int, float, str]  # what `judged` says, seconds until solved, the recommended formula


def with_ours(p: Published, method: str, seconds: float, seed: int, net: Net | None) -> Outcome:
    """What --mode regress makes of a problem; mix is with the net, gp without. The search ends once it has recovered
    the formula, or when what is left of the time is for the front alone.
    """
    found, solved_at, least, start = (False, False, 0), None, SOLVED, time.monotonic()

    def watch(regressor: Regressor) -> bool:
        nonlocal found, solved_at, least
        low = regressor.regression.search.front.nmse.min()
        if not p.noise and low <= least:
            least = low / 10
            found = better(found, judged(p, [(row.tokens, row.constants) for row in regressor.conclude().front]))
            solved_at = solved_at or (found[0] and time.monotonic() - start)
        return found[1] or time.monotonic() - start > seconds - min(1.5, 0.1 * seconds)
    regressor = Regressor(max_minutes=seconds / 60, seed=seed, net=net if method == "mix" else None)
    regressor.prepare(p.problems.X[0], p.y).go(watch)
    rows = [regressor.best] if p.noise else regressor.front
    found = better(found, judged(p, [(row.tokens, row.constants) for row in rows]))
    return *found, solved_at or time.monotonic() - start, text_of(regressor.best, safe_names(regressor.names))


def peer(method: str, X: np.ndarray, y: np.ndarray, seconds: float, seed: int, folder: str, pipe) -> None:
    """Run another engine until it is killed, and send the formulas of its front from time to time."""
    names, functions = [f"x{i}" for i in range(X.shape[1])], "add,sub,mul,div,sin,cos,exp,log,sqrt"
    if method == "gplearn":  # one run, looked at after each ten generations
        from gplearn.functions import make_function
        from gplearn.genetic import SymbolicRegressor
        exp = make_function(function=lambda x: np.exp(np.minimum(x, 50)), name="exp", arity=1)
        model = SymbolicRegressor(
            population_size=1000, random_state=seed, const_range=(-5, 5), parsimony_coefficient=0.001, warm_start=True,
            function_set=[exp if name == "exp" else name for name in functions.split(",")])

        def front(k: int, left: float) -> list[str]:
            model.set_params(generations=10 * (k + 1)).fit(X, y)
            return [str(model._program).replace("X", "x")]
    elif method == "pyoperon":  # restarts, with twice as many evaluations each time
        from pyoperon.sklearn import SymbolicRegressor

        def front(k: int, left: float) -> list[str]:
            model = SymbolicRegressor(
                allowed_symbols=f"{functions},square,constant,variable", population_size=1000, generations=100_000,
                max_evaluations=20_000 << k, max_time=max(1, int(left)), optimizer_iterations=10, n_threads=1,
                max_length=30, objectives=["r2", "length"], random_state=1000 * seed + k).fit(X, y)
            return [model.get_model_string(one["tree"], 17, names=names) for one in model.pareto_front_]
    elif method == "eggp":  # goes on from what it has, for 1, 2, 4 and 8 fifteenths of the time; it takes no seed
        from eggp import EGGP

        def front(k: int, left: float) -> list[str]:
            model = EGGP(
                gen=100_000, nPop=100, maxSize=20, nonterminals=f"{functions},square", loss="MSE", optIter=10,
                optRepeat=1, max_time=max(1, int(min(left, seconds * 2 ** k / 15))),
                dumpTo=f"{folder}/{k}", loadFrom=f"{folder}/{k - 1}" if k else "")
            model.fit(X, y)
            return list(model.results.Expression)
    pipe.send([])  # the imports are done, and not timed
    start = time.monotonic()
    for k in range(1000):
        pipe.send(front(k, start + seconds - 0.5 - time.monotonic()))


def with_peer(p: Published, method: str, seconds: float, seed: int) -> Outcome:
    """The same of another engine, in a process of its own; all that it ever had in its front counts."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    found, text, solved_at = (False, False, 0), "", seconds
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=peer, args=(method, p.problems.X[0], p.y, seconds, seed, folder, other),
                                  daemon=True)
        process.start()
        other.close()
        try:
            pipe.recv()
            start = time.monotonic()
            while (left := start + seconds - time.monotonic()) > 0 and pipe.poll(left):
                texts = pipe.recv()
                text = texts[-1] if texts else text
                read = (readable(one, method == "gplearn") for one in texts)
                found = better(found, judged(p, [x for x in read if x]))
                solved_at = min(solved_at, time.monotonic() - start) if found[0] else seconds
                if found[1] and not p.noise:
                    break
            return *found, solved_at, text
        except EOFError:
            raise UserError(f"--method {method}: it ended with an error") from None
        finally:
            process.kill()
            process.join()


def readable(text: str, protected: bool) -> tuple[list, list] | None:
    """Another engine's formula; None if it cannot be read. protected: its roots and logarithms are of absolute
    values.
    """
    text = re.sub(r"\b[A-Z]\w*", lambda m: m[0].lower(), text).replace("^", "**")
    try:
        t, c = parse(text)
    except UserError:
        return None
    if protected:
        pairs = [one for t, c in zip(t, c, strict=True)
                 for one in [(t, c)] + [(TOKENS["abs"], 0.0)] * (t in (SQRT, LOG))]
        t, c = map(list, zip(*pairs, strict=True))
    return t, c


def bench(args: flags.Flags) -> dict:
    """Each method on each published problem, --search-seeds times; the summary."""
    for method in args.method:
        if method in PEERS and importlib.util.find_spec(method) is None:
            raise UserError(f"--method {method} needs a package that is missing: pip install -e '.[sr]'")
    given = args.given
    args, saved = run.restore(args, SCRIPT, rows=list)
    rows, minutes = (saved["rows"], saved["args"]["max_minutes"]) if saved else ([], args.max_minutes)
    if "max_minutes" in given and args.max_minutes != minutes:
        raise UserError(f"--max-minutes: {args.resume} was begun with {minutes}")
    args.max_minutes = minutes
    net = load_net(args.net or KEPT)[0].eval() if "mix" in args.method else None
    done = {(row["problem"], row["method"], row["seed"]) for row in rows}
    with run.Run(args, SCRIPT, __file__, saved) as r:
        print(f"operators {','.join(REGRESS_OPS)}; {60 * args.max_minutes:.0f} s for each, on one thread; "
              f"noise {args.noise}")
        r.save("last.pt", rows=rows)
        todo = [(name, i, seed, method) for name in args.problems for i in range(len(PROBLEM_SETS[name]))
                for seed in range(args.search_seeds) for method in args.method if seed == 0 or method != "gplearn"]
        for name, i, seed, method in todo:
            p = published(name, i, args.noise, args.seed + seed)
            if (p.name, method, seed) in done or r.stopped_by:
                continue
            given = p, method, 60 * args.max_minutes, args.seed + seed
            solved, recovered, size, seconds, text = with_peer(*given) if method in PEERS else with_ours(*given, net)
            if r.stopped_by:
                break
            rows.append({"problem": p.name, "method": method, "seed": seed, "solved": solved, "recovered": recovered,
                         "size": size, "seconds": seconds, "formula": text[:1000]})
            told = "recovered" if recovered else "solved" if solved else "-"
            print(f"{p.name:12s} {method:9s} seed {seed}: {told:9s} {seconds:6.1f} s  {text:.90}", flush=True)
            r.save("last.pt", rows=rows)
        out = io.StringIO()
        table = csv.DictWriter(out, rows[0] if rows else ["problem"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        files.write_atomic(r.folder / "bench.csv", out.getvalue().encode())
        r.leave_if_stopped()
        methods = {}
        for method in args.method:
            mine = [row for row in rows if row["method"] == method]
            times = sorted(row["seconds"] if row["solved"] else math.inf for row in mine)
            n, solved, recovered = len(mine), *(sum(row[key] for row in mine) for key in ("solved", "recovered"))
            methods[method] = {"n": n, "solved": solved, "recovered": recovered, "times": times,
                               "median_seconds": times[n // 2], "median_size": float(np.median(
                                   [row["size"] for row in mine if row["recovered"]] or [math.nan]))}
            print(f"{method:9s} solved {format_rate(solved, n)}, recovered {format_rate(recovered, n)}, "
                  f"median time to solution {times[n // 2]:.1f} s, "
                  f"median size of what is recovered {methods[method]['median_size']:.0f}")
        draw_bench(methods, 60 * args.max_minutes, r.folder / "bench.png")
        r.step = args.steps
        return r.summary(n_params=0, problems=args.problems, minutes=args.max_minutes, noise=args.noise,
                         methods=methods, ops=list(REGRESS_OPS))


def draw_bench(methods: dict[str, dict], seconds: float, out: Path) -> Path:
    """Share of problems solved within so many seconds, and beside it the share recovered."""
    fig, ax = plots.new_figure()
    for name, row in methods.items():
        times = [x for x in row["times"] if x < math.inf]
        line, = ax.step([0.1, *times, seconds], np.array([*range(len(times) + 1), len(times)]) / row["n"], where="post",
                        label=f"{name}: solved {row['solved']}, recovered {row['recovered']} of {row['n']}")
        ax.plot(seconds, row["recovered"] / row["n"], "o", color=line.get_color())
    ax.set(xlabel="seconds", ylabel="share solved (points: recovered)", xscale="log", ylim=(-0.02, 1.02))
    ax.legend(frameon=False)
    return plots.save_figure(fig, out)


# ---- Modes

def gen(args: flags.Flags) -> dict:
    """Make the examples and write data.npz; the summary."""
    data = generate(args)
    with run.Run(args, SCRIPT, __file__, None) as r:
        print(describe(data, args, hash_of(data)), flush=True)
        save_data(r.folder / "data.npz", data, args, hash_of(data))
        r.step = args.steps
        summary = r.summary(n_params=0, data=hash_of(data), n={
            name: [len(data.functions[name]), len(data.examples[name].targets)] for name in SPLITS})
        print(f"{r.folder / 'data.npz'}: {summary['seconds']:.0f} s, {summary['cpu_seconds']:.0f} CPU-s")
        return summary


def with_net(args: flags.Flags) -> dict:
    """Diagnose the net of --net, or compare searches with it, on the functions that its run held out; the summary."""
    source = args.net or KEPT
    net, saved, data = net_and_data(source, args)
    net.to(devices.get_device(args.device))
    problems = held_out(data, args) if args.mode == "search" else None
    record = checkpoint.file_of(source).parent / "metrics.csv"
    losses = [row["val_loss"] for row in metrics.read(record)] if record.exists() else []
    with run.Run(args, SCRIPT, __file__, None) as r:
        r.leave_if_stopped()  # a Ctrl-C acts at once from here on
        print(f"{source}, step {saved['step']}\n{describe(data, args, saved['data'])}", flush=True)
        r.step = args.steps
        found = conclude(r.folder, net, data, problems, args, losses)
        return r.summary(n_params=count_parameters(net), net=str(source), **found)


def net_and_data(path: str, args: flags.Flags) -> tuple[Net, dict, Data]:
    """A net, its checkpoint, and the examples of its run, whose flags args takes over. Raises UserError.

    One is that a flag is given which the net or its examples had otherwise; one, that the examples are others now.
    """
    net, saved = load_net(path)
    names = tuple(dict.fromkeys(("seed", *DATA_FLAGS, *Config.__dataclass_fields__)))
    old = flags.restored(parse_args([]), saved["args"], path, names)
    for name in names:
        if name in args.given and getattr(args, name) != getattr(old, name):
            raise UserError(f"--{name.replace('_', '-')}: the net of {path} has {getattr(old, name)}")
        setattr(args, name, getattr(old, name))
    beside = checkpoint.file_of(path).parent / "data.npz"
    source = args.data or (beside if beside.exists() else None)
    data, hash_ = load_data(source, args) if source else (generate(args), None)
    hash_ = hash_ or hash_of(data)
    if hash_ != saved["data"]:
        raise UserError(f"{path}: it was trained on examples with the hash {saved['data']}, those here have "
                        f"{hash_}: what is held out here may be known to it (--data, if it had one)")
    return net, saved, data


def evaluate_checkpoint(path: str, args: argparse.Namespace) -> dict:
    """The diagnosis of a net on the examples of its run, or the front of --mode regress on its test rows. Raises
    UserError.
    """
    own, regressor = parse_args([]), load(path)
    if isinstance(regressor, Regressor):
        safe, test = safe_names(regressor.names), regressor.data.get("test")
        front = [{"size": row.size, "loss": row.loss,
                  "test": measure(row.tokens, row.constants, *test) if test else math.nan,
                  "recommended": row is regressor.best, "formula": text_of(row, safe)} for row in regressor.front]
        return {"script": SCRIPT, "file": str(checkpoint.file_of(path)), "n_params": regressor.best.tokens.count(C),
                "front": front, "n": len(test[0]) if test else 0}
    net, saved, data = net_and_data(path, own)
    return {"script": SCRIPT, "file": str(checkpoint.file_of(path)), "n_params": count_parameters(net),
            "step": saved["step"], "figures": diagnose(net, data, own, N_FINAL, N_SAMPLES, SPLITS)}


def format_evaluation(out: dict) -> str:
    """The figures of evaluate_checkpoint as text."""
    if "front" in out:
        return "\n".join(f"{'*' if row['recommended'] else ' '} {row['size']:4d} {row['test']:12.5g}  {row['formula']}"
                         for row in out["front"])
    return f"  {out['n_params']} parameters, step {out['step']}\n{format_diagnosis(out['figures'])}"


MODES = {"demo": train, "gen": gen, "train": train, "eval": with_net, "search": with_net, "bench": bench,
         "regress": regress}
KEPT = "logs/kept/neural_sr/large-s0"


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    with files.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        return MODES[args.mode](args)


if __name__ == "__main__":
    main()
