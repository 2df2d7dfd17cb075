"""metrics.csv, the record of a run; the log line; optional trackers."""
from __future__ import annotations

import csv
import importlib.util
import io
import math
import os
from collections.abc import Callable
from pathlib import Path

from common.files import UserError, append, write_atomic

Row = dict[str, float | None]


def _cell(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, int) else repr(float(value))


def write(path: Path, row: Row) -> None:
    """Append a row, None and NaN as empty cells. Raises UserError when its columns are not those of the first row."""
    header, line = ",".join(row) + "\n", ",".join(map(_cell, row.values())) + "\n"
    if path.is_file() and path.stat().st_size:
        with open(path) as f:
            columns = f.readline()
        if columns != header:
            other = sorted({*row}.symmetric_difference(columns.strip().split(","))) or ["their order"]
            raise UserError(f"{path}: other columns than this script writes ({', '.join(other):.80}); go on with the "
                            "script that began the run, or start a new one")
        header = ""
    append(path, header + line)


def read(path: str | os.PathLike) -> list[dict[str, float]]:
    """Rows of a metrics.csv (or of that in a run folder); empty cells are left out, a last line cut short is dropped.

    Raises UserError when the file is missing or a cell is not a number.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such metrics file")
    try:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(io.StringIO(whole))]
    except (TypeError, ValueError, csv.Error):
        raise UserError(f"{path}: not a metrics file") from None


def keep_until(path: Path, step: int) -> None:
    """Drop the rows behind a step, from which the run goes on. Raises UserError when the file is no metrics file."""
    if not path.is_file():
        print(f"{path} is gone: the record begins again behind step {step}", flush=True)
        path.touch()
    try:
        header, *lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")] or [""]
        kept = [x for x in lines if float(x.split(",")[header.strip().split(",").index("step")]) <= step]
    except (ValueError, IndexError):
        raise UserError(f"{path}: not a metrics file") from None
    write_atomic(path, "".join([header, *kept]).encode())


def points(rows: list[dict[str, float]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The curve of column y over column x, of the rows that have a number in both."""
    both = [(row[x], row[y]) for row in rows if math.isfinite(row.get(x, math.nan) + row.get(y, math.nan))]
    return [a for a, _ in both], [b for _, b in both]


def format_row(row: Row) -> str:
    """The log line of a row, without its empty cells: `step   1000 | loss 0.0312 | lr 5.00e-04 | sec   63.2`."""
    def text(key: str, value: float) -> str:
        if isinstance(value, int):
            return f"{value:6d}" if key == "step" else f"{value:4d}"
        return f"{value:.2e}" if key.startswith("lr") else f"{value:6.1f}" if key == "sec" else f"{value:.4f}"
    return " | ".join(f"{key} {text(key, value)}" for key, value in row.items() if _cell(value))


def check_tracker(kind: str) -> None:
    """Raise UserError when the package of a tracker is not installed."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise UserError(f"--tracker {kind} needs a package that is missing: pip install -e '.[trackers]'")


def open_tracker(kind: str, folder: Path, args: dict) -> Callable[[Row], None]:
    """A function that sends a row to tensorboard or wandb, with its files in the run folder; one that does nothing."""
    if kind == "wandb":
        import wandb
        tracked = wandb.init(dir=os.fspath(folder), name=folder.name, config=args)
        return lambda row: tracked.log(row, step=row["step"])
    if kind == "none":
        return lambda row: None
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(os.fspath(folder))

    def log(row: Row) -> None:
        for key in (key for key, value in row.items() if _cell(value)):
            writer.add_scalar(key, row[key], row["step"])
        writer.flush()
    return log
