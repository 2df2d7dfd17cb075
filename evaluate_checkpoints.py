"""Evaluate checkpoints of any experiment by the code that its training uses.

    python evaluate_checkpoints.py logs/kept/addition_train/rope196     # 100,000 sums and tables, 2 s
    python evaluate_checkpoints.py logs/kept/collatz/window10-s0 --output out.json      # all figures as JSON

The checkpoint's field `script` says which script's `evaluate_checkpoint(path, args)` is called and whose
`format_evaluation` makes text of the figures; a checkpoint of another project goes to the script that
`recognises` it. Reads plain data, runs no pickle. A checkpoint that cannot be evaluated does not stop the
others; the exit code is then 1. The tables of an addition model stand here, as they did in the evaluation
script that this one descends from.
"""
from __future__ import annotations

from common import files, flags  # before torch: a Ctrl-C while that loads is one line then

# isort: split
import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from addition_train import DIGITS, LIMIT, Pairs, digits_of, uniform_pairs
from common import checkpoint, devices, run
from common.files import UserError
from common.flags import integer, path

SCRIPT = Path(__file__).name
SCRIPTS = ("addition_train", "collatz", "self_improve")  # whose flags are here; their copies are found by name
TABLES = 4              # stream of the pairs of the tables; training, validation and test have others
EDGE_CASES = ((0, 0), (0, 1), (1, 0), (9, 1), (5, 5), (LIMIT - 1, 0), (LIMIT - 1, 1), (1, LIMIT - 1),
              (LIMIT - 1, LIMIT - 1), (LIMIT // 2, LIMIT // 2), (1234567890, 9876543210), (9999999990, 10),
              (1111111111, 8888888889), (9090909090, 909090910), (4999999999, 5000000001), (123456789, 987654321))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser(usage="%(prog)s CKPT [CKPT ...] [flags]", description=__doc__)
    p.add_argument("checkpoints", nargs="+", type=path, metavar="CKPT", help="checkpoint, or run folder")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|mps",
                   help="auto: the fastest here")
    p.add_argument("--threads", type=integer(0, 1024), default=1, help="of torch; 0: its own choice")
    p.add_argument("--output", type=path, metavar="FILE.json", help="write all figures there")
    for script in map(importlib.import_module, SCRIPTS):
        if hasattr(script, "add_evaluation_arguments"):
            script.add_evaluation_arguments(p)
    return p.parse_args(argv)


# ---- Tables of an addition model

def longest_chain(carry: np.ndarray) -> np.ndarray:
    """Most columns in a row that carry: (..., 10) of 0 and 1 -> (...,), 0..10."""
    longest = current = np.zeros(carry.shape[:-1], np.int64)
    for i in range(DIGITS):
        current = (current + 1) * carry[..., i]
        longest = np.maximum(longest, current)
    return longest


def chained_pairs(stream: Sequence[int], n: int, length: int) -> Pairs:
    """Digits of n pairs, uniform among all pairs of ten-digit operands whose longest carry chain is `length`.

    A column carries for 45 of its 100 digit pairs without a carry into it and for 55 with one, so the weight
    of each of the 2^10 carry patterns is known: draw a pattern, then each column's digits among those that
    give it.
    """
    rng = np.random.default_rng(stream)
    patterns = (np.arange(1 << DIGITS)[:, None] >> np.arange(DIGITS) & 1).astype(np.int8)
    into = np.concatenate([np.zeros_like(patterns[:, :1]), patterns[:, :-1]], 1)
    weight = np.where(patterns, 45 + 10 * into, 55 - 10 * into).astype(float).prod(1)
    weight[longest_chain(patterns) != length] = 0
    drawn = rng.choice(len(patterns), n, p=weight / weight.sum())
    out = np.empty((2, n, DIGITS), np.int8)
    x, y = np.divmod(np.arange(100), 10)
    for carry_in in (0, 1):
        for carry_out in (0, 1):
            fits = np.flatnonzero((x + y + carry_in > 9) == carry_out)
            where = (into[drawn] == carry_in) & (patterns[drawn] == carry_out)
            chosen = rng.choice(fits, int(where.sum()))
            out[:, where] = x[chosen], y[chosen]
    return out[0], out[1]


def pairs_of_lengths(stream: Sequence[int], n: int, a_length: int, b_length: int) -> Pairs:
    """Digits of n pairs, uniform among those with exactly so many digits in a and b (one digit: 0..9)."""
    pairs = uniform_pairs(stream, n)
    for i, (x, length) in enumerate(zip(pairs, (a_length, b_length), strict=True)):
        x[:, length:] = 0
        if length > 1:
            x[:, length - 1] = np.random.default_rng([*stream, i]).integers(1, 10, n)
    return pairs


def addition_tables(module: ModuleType, path: str, args: argparse.Namespace) -> dict:
    """Exact match of an addition model where uniform pairs say little, as [right, of] counts.

    by_digits[k]: both operands uniform below 10^k (the short ones are seen in training). by_chain[k]: uniform
    among the pairs whose longest run of columns that carry is k. by_lengths[i][j]: a has i + 1 digits, b has
    j + 1. edge_cases.
    """
    model, _ = module.load_model(path)
    model.to(devices.get_device(args.device))
    few, fewer, lengths = max(args.n // 10, 1), max(args.n // 50, 1), range(1, DIGITS + 1)

    def count(pairs: Pairs) -> list[int]:
        got, target = module.answers(model, pairs, args.mode)
        return [int((got == target).all(1).sum()), len(got)]
    edges = tuple(digits_of(np.array(x, np.int64), DIGITS) for x in zip(*EDGE_CASES, strict=True))
    return {"by_digits": {str(k): count(uniform_pairs([TABLES, 0, k], few, k)) for k in lengths},
            "by_chain": {str(k): count(chained_pairs([TABLES, 3, k], few, k)) for k in range(DIGITS + 1)},
            "by_lengths": [[count(pairs_of_lengths([TABLES, 2, i, j], fewer, i, j)) for j in lengths]
                           for i in lengths],
            "edge_cases": count(edges)}


def format_tables(out: dict) -> str:
    """The tables of an addition model as text."""
    def row(title: str, cells: Sequence[list[int]]) -> str:
        return f"  {title:<37}" + " ".join(f"{100 * k / n:6.2f}" for k, n in cells) + f"  (n = {cells[0][1]} each)"
    edges = out["edge_cases"]
    return "\n".join([
        f"  edge cases {edges[0]}/{edges[1]}",
        row("% by longest carry chain, 0..10", list(out["by_chain"].values())),
        row("% by digits, both below 10^1..10^10", list(out["by_digits"].values())),
        *(row(f"% a of {i} digit{'s' * (i > 1)}, b of 1..10", cells) for i, cells in enumerate(out["by_lengths"], 1))])


# ---- Any checkpoint

def script_of(file: str) -> ModuleType:
    """The script that evaluates a checkpoint: one that `recognises` it, or the one in this folder that wrote it.

    Raises UserError when there is none.
    """
    saved = checkpoint.read(checkpoint.file_of(file))
    for module in map(importlib.import_module, (*SCRIPTS, "etrm_pretrain")):
        if getattr(module, "recognises", lambda saved: False)(saved):
            return module
    name = str(saved.get("script", "nothing: it has no field 'script'"))
    found = re.fullmatch(r"([A-Za-z]\w*)\.py", name, re.ASCII)  # a name, never a path
    if found and (Path(__file__).parent / name).is_file():
        module = importlib.import_module(found[1])
        if hasattr(module, "evaluate_checkpoint"):
            return module
    raise UserError(f"{file}: written by {name[:60]!r}, which is no script of this folder with an evaluation")


def evaluate(file: str, args: argparse.Namespace) -> tuple[dict, str]:
    """The figures of one checkpoint, and the same as text. Raises UserError."""
    module = script_of(file)
    out = module.evaluate_checkpoint(file, args)
    text = module.format_evaluation(out)
    if hasattr(module, "digit_sum"):  # addition_train.py, or a copy of it
        out.update(addition_tables(module, file, args))
        text += "\n" + format_tables(out)
    return out, text


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    results, failed = {}, 0
    with files.one_line_errors(SCRIPT):
        devices.refuse_ranks(SCRIPT)
        devices.set_threads(args.threads)
        devices.get_device(args.device)
        if args.output:
            files.check_output(args.output)
        for file in args.checkpoints:
            try:
                results[file], text = evaluate(file, args)
                print(f"{results[file].get('file', file)}\n{text}", flush=True)
            except BrokenPipeError:
                raise
            except Exception as e:  # a file may be broken as no check foresees, and must not stop the others
                failed += 1
                reason = str(e) if isinstance(e, (UserError, OSError)) else f"{file}: {type(e).__name__}: {e}"
                results[file] = {"error": " ".join(reason.split())}
                print("evaluate_checkpoints.py: error:", results[file]["error"], file=sys.stderr, flush=True)
        if args.output:
            report = {"command": run.command(), "commit": run.commit(), "checkpoints": results}
            files.write_json(args.output, report)
    if failed:
        sys.exit(1)
    return results


if __name__ == "__main__":
    main()
