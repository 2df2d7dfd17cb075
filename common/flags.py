"""Flags: argparse types, the flags that mean the same in every script, and flags out of a checkpoint."""
from __future__ import annotations

import argparse
import copy
import math
import os
import re
import time
from collections.abc import Callable
from typing import NoReturn

from common.files import UserError

FREE_ON_RESUME = ("name", "out_dir", "resume", "device", "max_minutes", "tracker")


# ---- argparse types

def integer(lo: int, hi: int = 10**9) -> Callable[[str], int]:
    """An argparse type: a whole number in [lo, hi]."""
    def parse(text: str) -> int:
        try:
            value = int(re.fullmatch(r" *[-+]?[0-9]+ *", text)[0])  # int() alone takes 1_000 and digits like ١
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
        if not lo <= value <= hi:
            raise argparse.ArgumentTypeError(f"{text.strip()[:40]} is not in {lo}..{hi}")
        return value
    return parse


def real(lo: float, hi: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number in [lo, hi], or in (lo, hi] with above=True."""
    def parse(text: str) -> float:
        try:
            value = float(re.fullmatch(r"[-+ .0-9eE]+", text)[0])
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
        if not (math.isfinite(value) and lo <= value <= hi and not (above and value == lo)):
            where = f"{'>' if above else '>='} {lo:g}" + (f" and <= {hi:g}" if hi < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not {where}")
        return value
    return parse


def path(text: str) -> str:
    """An argparse type: a path. An empty one, as of an unset shell variable, is an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty")
    return text


def folder_name(text: str) -> str:
    """An argparse type: the name of a folder."""
    if path(text) in (".", "..") or set(text) & set("/\\\0"):
        raise argparse.ArgumentTypeError("a folder's name, without slashes")
    return text


# ---- parsing

class Flags(argparse.Namespace):
    """The flags of a run; vars() of it holds nothing else."""
    __slots__ = ("given", "parser", "started")  # names of those on the command line; what parsed them, and when


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        shown = "default" not in action.help and action.default not in (None, False, "", argparse.SUPPRESS)
        return action.help + " (default: %(default)s)" if shown else action.help


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help keeps the docstring's lines and shows defaults, and whose errors are one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **{"usage": "%(prog)s [flags]", **settings})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def add_run_arguments(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """Add the flags that mean the same in every script; seed=False: but for --seed, which it has in its own way."""
    g = parser.add_argument_group("run")
    if seed:
        g.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="seeds everything: init, data, order")
    g.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|mps", help="auto: CUDA, MPS, else CPU")
    g.add_argument("--threads", type=integer(0, 1024), default=1, help="CPU threads of torch; 0: torch's choice")
    g.add_argument("--name", "--run-name", type=folder_name, help="run name; default: time and seed")
    g.add_argument("--out-dir", type=path, metavar="DIR", help="the run folder itself; default: logs/SCRIPT/NAME")
    g.add_argument("--resume", type=path, metavar="PATH", help="go on from this run or last.pt, with its flags")
    g.add_argument("--init-from", type=path, metavar="PATH", help="start from the weights of this checkpoint alone")
    g.add_argument("--max-minutes", type=real(0), default=0.0, help="end training after this long; 0: no limit")
    g.add_argument("--tracker", choices=["none", "tensorboard", "wandb"], default="none", help="send metrics there too")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Flags:
    """Parse argv; `given` lists the flags that stood there, so that a preset leaves them alone."""
    defaults = {a.dest: a.default for a in parser._actions if a.default is not argparse.SUPPRESS}
    unset: list = []  # told by identity
    args = parser.parse_args(argv, Flags(**dict.fromkeys(defaults, unset)))
    args.given = sorted(name for name, value in vars(args).items() if value is not unset)
    args.parser, args.started = parser, (time.monotonic(), time.process_time())
    use(args, defaults)
    return args


def use(args: Flags, values: dict) -> None:
    """Set these flags, but for those given on the command line: what a preset does."""
    for name, value in values.items():
        if name not in args.given:
            setattr(args, name, value)


def only(args: Flags, *used: str) -> None:
    """Raise UserError when a flag was given that the mode chosen by the first of `used` does not look at."""
    idle = [name for name in args.given if name not in (*used, "threads")]
    if idle:
        first, other = (name.replace("_", "-") for name in (used[0], idle[0]))
        raise UserError(f"--{other}: not together with --{first}, which does not look at it")


# ---- flags out of a checkpoint

def _may_be(action: argparse.Action, value: object) -> bool:
    """Whether a stored value could have come from the command line, as one word."""
    if action.nargs == 0:
        return type(value) is bool
    if value is None:
        return action.default is None
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    try:
        parsed = (action.type or str)(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return parsed == value and (action.choices is None or parsed in action.choices)


def restored(args: Flags, saved: dict, path: str | os.PathLike, names: tuple[str, ...] = ()) -> Flags:
    """The flags that a checkpoint was made with (or these `names` of them), and the others from args.

    Raises UserError when one is missing or damaged, or was given differently on this command line.
    """
    out = copy.copy(args)
    for action in args.parser._actions:
        name, flag = action.dest, "--" + action.dest.replace("_", "-")
        if name not in vars(args) or name in FREE_ON_RESUME or (names and name not in names):
            continue
        if name not in saved or not _may_be(action, saved[name]):
            stored = " ".join(repr(saved[name])[:40].split()) if name in saved else "missing"
            raise UserError(f"{path}: damaged, or of another version: its {flag} is {stored}")
        if name in args.given and saved[name] != getattr(args, name):
            raise UserError(f"{flag} is {getattr(args, name)} here and {saved[name]} in {path}: "
                            "a resumed run keeps its flags (for new ones use --init-from)")
        setattr(out, name, saved[name])
    return out
