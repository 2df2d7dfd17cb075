"""Errors that a person can act on, and files that survive a kill."""
from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Bad input: a message of one line that names the thing and what to do."""


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Turn bad input, a full disk or memory and Ctrl-C into one line and an exit code; other errors are bugs."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed from the start
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as e:
        unnamed = isinstance(e, OSError) and e.filename is None  # all files are named
        sys.exit(f"{script}: error: {'standard output: ' * unnamed}{e}")
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("(out of|enough|allocate) memory", str(e)):
            raise  # torch has no type of its own for a full memory
        sys.exit(f"{script}: error: not enough memory ({' '.join(str(e).split())[:100]})")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextmanager
def refuse_damaged(path: str | os.PathLike) -> Iterator[None]:
    """Raise UserError for what fails while a file is used that another program, or version, may have written."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: damaged, or of another version ({type(e).__name__}: {reason:.150})") from None


@contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Let an OSError from in here name its file: that of a full disk does not."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or os.fspath(path)
        raise


def check_output(path: str | os.PathLike) -> None:
    """Raise UserError when no file can be made at `path`: it is a folder, or in none."""
    if os.path.isdir(path) or not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: {'is a folder' if os.path.isdir(path) else 'its folder does not exist'}")


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write data beside `path`, flush it to disk, then rename: killed at any moment, `path` is whole, old or new."""
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe, like /dev/stdout, is not replaced
        with named(path), open(path, "wb") as f:
            f.write(data)
        return
    path = Path(os.path.realpath(path))  # of a link, the file that it names
    beside = path.with_name(path.name + ".tmp")
    with named(path):
        try:
            with open(beside, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def append(path: str | os.PathLike, text: str) -> None:
    """Append text in one write, so that a kill leaves whole lines, or a last one without its newline."""
    with named(path), open(path, "ab") as f:
        f.write(text.encode("utf-8", "surrogateescape"))  # a path in the text need not be UTF-8
        f.flush()
        os.fsync(f.fileno())


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
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is its folder that of a finished run?") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
