"""metrics.csv, the record of a run; the log line; optional trackers."""
from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from common.run import UserError, write_atomic


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


def _cell(value: float) -> str:
    return str(int(value)) if isinstance(value, int) else repr(float(value))


class Metrics:
    """Appends rows to a CSV whose columns are fixed by its first row, and to a tracker if there is one.

    With keep_until=s, rows of steps up to s stay and later ones are dropped (resume); without, the file is new.
    Raises UserError when the file that is resumed is no metrics file.
    """

    def __init__(self, path: str | os.PathLike, keep_until: int | None = None, tracker=None):
        self.path, self.tracker = Path(path), tracker
        self.columns: list[str] = []
        kept = ""
        if keep_until is not None and self.path.is_file():
            try:
                whole = [x for x in self.path.read_text().splitlines(keepends=True) if x.endswith("\n")]
                if whole:  # not so if the run was killed before its first row
                    self.columns = whole[0].strip().split(",")
                    at = self.columns.index("step")
                    kept = whole[0] + "".join(x for x in whole[1:] if float(x.split(",")[at]) <= keep_until)
            except (ValueError, IndexError):
                raise UserError(f"{self.path}: not a metrics file") from None
        write_atomic(self.path, kept.encode())

    def write(self, row: dict[str, float]) -> None:
        """Append one row of numbers. Raises ValueError when its columns are not those of the first row."""
        line = ",".join(_cell(v) for v in row.values()) + "\n"
        if not self.columns:
            self.columns = list(row)
            line = ",".join(row) + "\n" + line
        if list(row) != self.columns:
            raise ValueError(f"metrics row {list(row)} does not fit the columns {self.columns}")
        with open(self.path, "a") as f:
            f.write(line)  # one write: a kill leaves whole lines or a last one without its newline
            f.flush()
            os.fsync(f.fileno())
        if self.tracker:
            self.tracker(row)


def format_row(row: dict[str, float]) -> str:
    """The log line of a row, NaN left out: `step   1000 | loss 0.0312 | violations   80 | lr 5.00e-04 | sec   63.2`."""
    def cell(key: str, value: float) -> str:
        if key == "step":
            return f"{value:6d}"
        if isinstance(value, int):
            return f"{value:4d}"
        return f"{value:.2e}" if key.startswith("lr") else f"{value:6.1f}" if key == "sec" else f"{value:.4f}"
    return " | ".join(f"{key} {cell(key, value)}" for key, value in row.items() if value == value)


def open_tracker(kind: str, folder: str | os.PathLike, args: dict):
    """A function that sends a row to tensorboard or wandb (files in the run folder), or None for kind `none`.

    Raises UserError when the package is not installed.
    """
    if kind == "none":
        return None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(os.fspath(folder))

            def log(row: dict[str, float]) -> None:
                for key, value in row.items():
                    writer.add_scalar(key, value, row["step"])
                writer.flush()
            return log
        import wandb
    except ImportError:
        raise UserError(f"--tracker {kind} needs a package that is missing: pip install -e '.[trackers]'") from None
    run = wandb.init(dir=os.fspath(folder), name=Path(folder).name, config=args)
    return lambda row: run.log(row, step=row["step"])
