"""Curves of any runs over each other: python -m common.plots RUN [RUN ...] --y KEY"""
from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

from common import metrics
from common.files import UserError, one_line_errors, write_atomic
from common.flags import Parser, path


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


def save_figure(fig, out: Path) -> Path:
    """Write the figure as a picture and close it; returns the path. Raises UserError for a format that is not known."""
    import matplotlib.pyplot as plt
    plt.close(fig)  # only forgets it: it can still be drawn
    known = fig.canvas.get_supported_filetypes()
    kind = out.suffix[1:].lower()
    if kind not in known:
        raise UserError(f"{out}: the name of a picture ends in one of {', '.join(known)}")
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=120, format=kind)
    write_atomic(out, buffer.getvalue())
    return out


def as_label(name: str) -> str:
    """A name as matplotlib can show it: text without formulas, not hidden from the legend."""
    return os.fsencode(name).decode(errors="replace").lstrip("_").replace("$", r"\$")


def curves(runs: list[Path], key: str, x: str, out: Path, log: bool = False) -> Path:
    """Plot column `key` against column `x` of each run's metrics.csv into `out`. Raises UserError: no such numbers."""
    fig, ax = new_figure()
    for run in runs:
        rows = metrics.read(run)
        curve = metrics.points(rows, x, key)
        if not curve[0]:
            known = ", ".join(dict.fromkeys(name for row in rows for name in row)) or "no rows"
            raise UserError(f"{run}: no column {key!r} over {x!r} in its metrics (it has: {known})")
        name = (run if run.is_dir() else run.parent).resolve().name
        ax.plot(*curve, label=as_label(name), marker=".", lw=1.2)
    ax.set(xlabel=x, ylabel=key, yscale="log" if log else "linear")
    ax.legend(frameon=False)
    return save_figure(fig, out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="common.plots", usage="python -m common.plots RUN [RUN ...] --y KEY", description=__doc__)
    p.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folder or metrics.csv")
    p.add_argument("--y", required=True, metavar="KEY", help="column to plot")
    p.add_argument("--x", default="step", metavar="KEY", help="column along the axis, e.g. sec")
    p.add_argument("--log", action="store_true", help="logarithmic y axis")
    p.add_argument("--out", type=path, metavar="FILE", help="picture; default: KEY.png in the first run's folder")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    runs = [Path(run) for run in args.runs]
    with one_line_errors("common.plots"):
        folder = runs[0] if runs[0].is_dir() else runs[0].parent
        print(curves(runs, args.y, args.x, Path(args.out or folder / f"{args.y}.png"), args.log))


if __name__ == "__main__":
    main()
