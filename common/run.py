"""A run: its flags, its folder, its provenance, its end."""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

RUN_FLAGS = ("name", "out_dir", "resume", "init_from", "device", "threads", "max_minutes", "tracker")  # free on resume


class UserError(ValueError):
    """Bad input: a message of one line that names the thing and what to do."""


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Turn bad input, a full or read-only disk and Ctrl-C into one line and an exit code; other errors are bugs."""
    try:
        yield
    except (UserError, OSError) as e:
        sys.exit(f"{script}: error: {e}")
    except MemoryError as e:
        sys.exit(f"{script}: error: not enough memory: {e}")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


# ---- flags

def integer(lo: int, hi: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number in [lo, hi]."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < lo or (hi is not None and value > hi):
            raise argparse.ArgumentTypeError(f"{value} is not {f'in {lo}..{hi}' if hi is not None else f'>= {lo}'}")
        return value
    return parse


def real(lo: float, hi: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number in [lo, hi], or in (lo, hi] with above=True."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (math.isfinite(value) and lo <= value <= hi and not (above and value == lo)):
            where = f"{'>' if above else '>='} {lo:g}" + (f" and <= {hi:g}" if hi < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not {where}")
        return value
    return parse


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        shown = "default" not in action.help and action.default not in (None, False, argparse.SUPPRESS)
        return action.help + " (default: %(default)s)" if shown else action.help


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help keeps the docstring's lines and shows defaults, and whose errors are one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **{"usage": "%(prog)s [flags]", **settings})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_run_arguments(parser: argparse.ArgumentParser, threads: int = 1) -> None:
    """Add the flags that mean the same in every script."""
    g = parser.add_argument_group("run")
    g.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="seeds everything: init, data, order")
    g.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|mps", help="auto: CUDA, MPS, else CPU")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="of the forward pass; auto: bf16 on CUDA that has it, fp32 elsewhere")
    g.add_argument("--threads", type=integer(0), default=threads, help="CPU threads of torch; 0: torch's choice")
    g.add_argument("--name", help="run name; default: time and seed")
    g.add_argument("--out-dir", help="the run folder itself; default: logs/SCRIPT/NAME")
    g.add_argument("--resume", metavar="PATH", help="go on from this run folder or checkpoint, with its flags")
    g.add_argument("--init-from", metavar="PATH", help="start from the weights of this checkpoint, nothing else of it")
    g.add_argument("--max-minutes", type=real(0), default=0, help="end training after this long; 0: no limit")
    g.add_argument("--tracker", choices=["none", "tensorboard", "wandb"], default="none", help="send metrics there too")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse argv; `given` in the namespace lists the flags that stood on the command line."""
    args = parser.parse_args(argv)
    unset = []  # told by identity; a list, so that action="append" can copy it
    blank = argparse.Namespace(**{a.dest: unset for a in parser._actions})
    parser.parse_args(argv, namespace=blank)
    args.given = sorted(a.dest for a in parser._actions if getattr(blank, a.dest, unset) is not unset)
    if args.name is not None and (not args.name or set(args.name) & set("/\\\0") or args.name in (".", "..")):
        parser.error("argument --name: a folder's name, without slashes")
    return args


def resumed_args(args: argparse.Namespace, saved: dict, path: str) -> argparse.Namespace:
    """The flags of a resumed run: the checkpoint's, but for RUN_FLAGS. Raises UserError when a given flag differs."""
    for flag in args.given:
        if flag not in RUN_FLAGS and saved.get(flag) != getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(args, flag)} here and {saved.get(flag)} in {path}"
                            ": a resumed run keeps its flags (for new ones use --init-from)")
    kept = {k: v for k, v in saved.items() if k not in RUN_FLAGS and k != "given"}
    return argparse.Namespace(**{**vars(args), **kept})


# ---- folder

def _folder_of(path: str) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def run_folder(args: argparse.Namespace, script: str) -> Path:
    """The folder of a run of `script` (its file name): --out-dir, the folder that is resumed, or logs/SCRIPT/NAME."""
    if args.out_dir is not None:
        return Path(args.out_dir)
    if args.resume is not None and args.name is None:
        return _folder_of(args.resume)
    name = args.name or f"{time.strftime('%Y%m%d-%H%M%S')}-s{args.seed}"
    return Path("logs") / Path(script).stem / name


def open_run(args: argparse.Namespace, script_file: str) -> Path:
    """Create the run folder with args.json, run.txt and a copy of the script, and return it.

    Raises UserError when the folder holds another run, which this one does not resume; OSError if it is not writable.
    """
    folder = run_folder(args, script_file)
    own = args.resume is not None and folder.resolve() == _folder_of(args.resume).resolve()
    if not own and any((folder / f).exists() for f in ("last.pt", "summary.json")):
        raise UserError(f"{folder} holds a run already: choose another --name or --out-dir, or --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume is not None and not own:  # the record so far comes along
        for pattern in ("metrics.csv", "best*.pt"):
            for file in _folder_of(args.resume).glob(pattern):
                shutil.copyfile(file, folder / file.name)
    write_json(folder / "args.json", {k: v for k, v in vars(args).items() if k != "given"})
    with open(folder / "run.txt", "a") as f:
        f.write(provenance() + "\n")
    copy = folder / Path(script_file).name
    if not (copy.exists() and copy.samefile(script_file)):
        shutil.copyfile(script_file, copy)
    return folder


def command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def commit() -> str:
    """`<hash>` or `<hash>, with changes` of the checkout; the environment variable RUN_COMMIT where there is no git."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
                              timeout=10)
        return done.stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("RUN_COMMIT", "unknown")


def provenance() -> str:
    """What is needed to repeat a run: time, command, commit, versions, machine."""
    import numpy
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return "\n".join([
        f"time     {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command  {command()}",
        f"commit   {commit()}",
        f"versions python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
        f"machine  {platform.platform()}, {os.cpu_count()} cores, GPU {gpu}",
    ]) + "\n"


# ---- files

def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write data beside `path`, flush it to disk, then rename: killed at any moment, `path` is whole, old or new."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Write strict JSON atomically; numbers that are not finite become null."""
    def finite(x):
        if isinstance(x, dict):
            return {str(k): finite(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    write_atomic(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON object. Raises UserError when it is missing or not one."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is its folder that of a finished run?") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


# ---- the end of a run

class Clock:
    """Wall and CPU seconds of a run, over all its resumed parts, and the end that --max-minutes sets for this part."""

    def __init__(self, max_minutes: float = 0, seconds: float = 0.0, cpu_seconds: float = 0.0):
        self._wall, self._cpu = time.monotonic() - seconds, time.process_time() - cpu_seconds
        self._end = time.monotonic() + 60 * max_minutes if max_minutes else math.inf

    def seconds(self) -> float:
        return time.monotonic() - self._wall

    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu

    def expired(self) -> bool:
        return time.monotonic() > self._end


class StopSignal:
    """While entered, the first Ctrl-C or SIGTERM sets `number` for the loop to see; a second one acts at once."""

    def __init__(self):
        self.number = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # signal.signal works nowhere else
            self._old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _on_signal(self, number: int, frame) -> None:
        self.number = number
        self.__exit__()

    def __exit__(self, *exc) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)
        self._old = {}
