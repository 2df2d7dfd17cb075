"""Curves of any runs over each other: python -m common.plots RUN [RUN ...] --y KEY"""
from __future__ import annotations

import argparse
from pathlib import Path

from common import metrics
from common.run import Parser, UserError, one_line_errors


def new_figure(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.2):
    """A matplotlib figure and its axes (an array if there are several), drawn without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained")
    for ax in fig.axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save_figure(fig, path: Path) -> Path:
    """Write the figure as a picture and close it; returns the path. Raises UserError for a format that is not known."""
    import matplotlib.pyplot as plt
    plt.close(fig)  # only forgets it: it can still be drawn
    known = fig.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UserError(f"{path}: the name of a picture ends in one of {', '.join(known)}")
    fig.savefig(path, dpi=120)
    return path


def curves(runs: list[Path], key: str, x: str, out: Path, log: bool = False) -> Path:
    """Plot column `key` against column `x` of each run's metrics.csv into `out`. Raises UserError: unknown column."""
    tables = [metrics.read(run) for run in runs]
    for run, rows in zip(runs, tables, strict=True):
        for name in (key, x):
            if not any(name in row for row in rows):
                known = ", ".join(rows[0]) if rows else "no rows"
                raise UserError(f"{run}: no column {name!r} in its metrics (it has: {known})")
    fig, ax = new_figure()
    for run, rows in zip(runs, tables, strict=True):
        points = [(row[x], row[key]) for row in rows if x in row and key in row]
        name = (run if run.is_dir() else run.parent).resolve().name
        ax.plot(*zip(*points, strict=True), label=name, marker=".", lw=1.2)
    if log:
        ax.set_yscale("log")
    ax.set(xlabel=x, ylabel=key)
    ax.legend(frameon=False)
    return save_figure(fig, out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="common.plots", usage="python -m common.plots RUN [RUN ...] --y KEY", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder or metrics.csv")
    p.add_argument("--y", required=True, metavar="KEY", help="column to plot")
    p.add_argument("--x", default="step", metavar="KEY", help="column along the axis, e.g. sec")
    p.add_argument("--log", action="store_true", help="logarithmic y axis")
    p.add_argument("--out", type=Path, metavar="FILE", help="picture; default: KEY.png in the first run's folder")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    first = args.runs[0]
    with one_line_errors("common.plots"):
        out = args.out or (first if first.is_dir() else first.parent) / f"{args.y}.png"
        print(curves(args.runs, args.y, args.x, out, args.log))


if __name__ == "__main__":
    main()
