"""Tables of numbers as people have them: delimiter, decimal sign, header and missing cells are found out.

    python -m common.tables my.csv      # what is found in it
"""
from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import UserError, one_line_errors

MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "-", "--", "?", ".", "*"}


class Table(NamedTuple):
    """A file's cells (rows, columns) as text, with a name for each column and, for each row, the line it stands in."""
    names: list[str]
    cells: np.ndarray
    lines: list[int]
    decimal: str      # point or comma
    notes: list[str]  # what was found out

    def numbers(self, column: int) -> np.ndarray:
        """A column as numbers: NaN where a cell is missing, None where there is text in it."""
        return numbers(self.cells[:, column], self.decimal)


def numbers(cells: Sequence[str], decimal: str = ".") -> np.ndarray | None:
    """Cells as numbers, NaN where they are missing; None if one is neither. Groups of thousands are joined."""
    group = "," if decimal == "." else "."
    joined = re.compile(rf"[-+]?[0-9]{{1,3}}((\{group}|['’\u00a0\u202f ])[0-9]{{3}})+(\{decimal}[0-9]*)?")
    out = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        text = cell.strip()
        if text.lower() in MISSING:
            continue
        if joined.fullmatch(text):
            text = re.sub(rf"[\{group}'’\u00a0\u202f ]", "", text)
        text = text.replace(decimal, ".", 1) if group not in text else "text"
        try:
            out[i] = float(re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eEdD][-+]?[0-9]+)?|[-+]?inf(inity)?", text,
                                        re.IGNORECASE)[0].lower().replace("d", "e"))
        except TypeError:
            return None
    return out


def decimal_of(cells: Iterable[str]) -> str:
    """Whether numbers are written with a point or a comma: 1,5 and 0,123 and 1.234,5 have a comma; 1,234 has none."""
    seen = [cell.strip() for cell in cells if re.fullmatch(r"[-+]?[0-9.,]+([eE][-+]?[0-9]+)?", cell.strip())]
    if any("." in x and "," in x[x.rindex("."):] for x in seen):
        return ","
    if any(re.fullmatch(r"[-+]?[0-9,]*\.[0-9]*(e.*)?", x, re.IGNORECASE) for x in seen):
        return "."
    both = [re.split("[.,]", re.split("[eE]", x)[0].lstrip("+-")) for x in seen
            if x.count(",") == 1 and "." not in x]
    return "," if any(len(b) != 3 or len(a) > 3 or a in ("", "0") for a, b in both) else "."


def read_table(path: str | Path) -> Table:
    """A file of numbers as it is: its delimiter, decimal sign and header are found out. Raises UserError."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, not a file of data")
    data, notes = Path(path).read_bytes(), []
    coding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(coding)
    except UnicodeDecodeError:
        text, coding = data.decode("latin-1"), "latin-1"
    if "\0" in text:
        raise UserError(f"{path}: a binary file, not a table")
    found = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    comments = [line.strip() for _, line in found if line.lstrip()[0] in "#%"]
    found = [(i, line) for i, line in found if line.lstrip()[0] not in "#%"]
    if not found:
        raise UserError(f"{path}: empty" if not comments else f"{path}: it has comments alone")

    def split(lines: list[str], delimiter: str) -> list[list[str]]:
        if delimiter == " ":
            return [line.split() for line in lines]
        return [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    best = None
    for delimiter in "\t;|, ":
        rows = split([line for _, line in found], delimiter)
        widths = [len(row) for row in rows]
        width = max(set(widths), key=widths.count)
        cells = [cell for row in rows[1:] or rows for cell in row]
        sign = decimal_of(cells)
        read = [numbers([cell], sign) for cell in cells[:5000]]
        known = sum(x is not None and not np.isnan(x).all() for x in read)
        share = known / max(1, len(read)) * (widths.count(width) / len(widths) > 0.8)
        if best is None or (width > 1, share) > (best[0] > 1, best[1] + 0.05):
            best = width, share, delimiter, rows, sign
    width, _, delimiter, rows, sign = best
    lines = [i for i, _ in found]
    if len(rows) < len(lines):
        raise UserError(f"{path}: a quoted cell goes over several lines")
    told = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", " ": "spaces"}[delimiter]
    notes.append(f"{told} between columns, decimal {'comma' if sign == ',' else 'point'}" +
                 (f", {len(comments)} lines of comments" if comments else "") +
                 (", byte-order mark" if data[:3] == b"\xef\xbb\xbf" else "") +
                 (f", {coding}" if coding != "utf-8-sig" else ""))
    names, head = None, rows[0]

    def is_text(cell: str) -> bool:
        return numbers([cell], sign) is None
    named = [is_text(a) and not is_text(b) for a, b in zip(head, rows[1], strict=False)] if len(rows) > 1 else []
    if any(named) or all(map(is_text, head)):
        names, rows, lines = head, rows[1:], lines[1:]
        if len(names) == width - 1:
            names = ["row", *names]  # as R writes it
        if len(rows) > 1 and not any(numbers([cell], sign) is not None for cell in rows[0]) and len(rows[0]) == width:
            names = [f"{name} {unit}".strip() for name, unit in zip(names, rows[0], strict=False)]
            rows, lines = rows[1:], lines[1:]
            notes.append(f"line {lines[0] - 1} is taken for units")
    elif comments:
        words = split([comments[-1].lstrip("#% ")], delimiter)[0]
        names = words if len(words) == width and all(map(is_text, words)) else None
    for row, i in zip(rows, lines, strict=True):
        if len(row) > width and any(row[width:]):
            raise UserError(f"{path}: line {i} has {len(row)} cells, the others {width}")
    cells = np.array([(row + [""] * width)[:width] for row in rows], dtype=object).reshape(-1, width)
    if names is None:
        names = [*(f"x{i}" for i in range(width - 1)), "y"]
        notes.append(f"no header: the columns are called {', '.join(names)}")
    names = [name.strip() or f"column {i + 1}" for i, name in enumerate((names + [""] * width)[:width])]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]!r:.60}")
    return Table(names, cells, lines, sign, notes)


class Sample(NamedTuple):
    """What a formula is searched for on: features X (N, V), y and weights (N,), and where they come from."""
    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray | None
    names: list[str]   # of the features
    target: str
    lines: list[int]
    digit: float       # unit of the last written digit of y
    notes: list[str]


def read_sample(path: str | Path, args: argparse.Namespace) -> Sample:
    """The columns of a file that are used: --target, --features, --ignore, --weights. Raises UserError."""
    table = read_table(path)
    names, notes = table.names, list(table.notes)

    def find(name: str, flag: str) -> int:
        if name not in names:
            raise UserError(f"{flag} {name!r:.60}: {path} has no such column; there are {', '.join(names):.200}")
        return names.index(name)

    def column(i: int, flag: str) -> np.ndarray:
        values = table.numbers(i)
        if values is None:
            bad = next(k for k, cell in enumerate(table.cells[:, i]) if numbers([cell], table.decimal) is None)
            raise UserError(f"{flag} {names[i]!r:.60}: not a column of numbers, line {table.lines[bad]} has "
                            f"{table.cells[bad, i]!r:.40}")
        return values
    if not len(table.cells):
        raise UserError(f"{path}: a header and no rows")
    t = find(args.target, "--target") if args.target is not None else len(names) - 1
    y = column(t, "--target")
    if args.target is None:
        notes.append(f"target {names[t]!r}, the last column")
    w = column(find(args.weights, "--weights"), "--weights") if args.weights is not None else None
    ignored = {find(name, "--ignore") for name in args.ignore or []} | {t}
    ignored |= {find(args.weights, "--weights")} if args.weights is not None else set()
    wanted = [find(name, "--features") for name in args.features or []]
    if set(wanted) & ignored:
        both = names[(set(wanted) & ignored).pop()]
        raise UserError(f"--features {both!r}: it is the target, the weights, or ignored")
    columns, left_out = {}, {}
    for i in wanted or [i for i in range(len(names)) if i not in ignored]:
        values = table.numbers(i)
        there = values[~np.isnan(values)] if values is not None else None
        if values is None:
            is_date = re.match(r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}", table.cells[0, i])
            left_out[i] = "dates" if is_date else "text"
        elif len(there) < len(values) / 2:
            left_out[i] = "more than half of it is missing"
        elif there.max() == there.min():
            left_out[i] = "the same everywhere"
        else:
            columns[i] = values
        if args.features and i in left_out:
            column(i, "--features")
            raise UserError(f"--features {names[i]!r:.60}: {left_out[i]}")
    for i in [] if args.features else list(columns):
        n = np.arange(len(columns[i]))
        if len(columns) > 1 and any((columns[i] == n + first).all() for first in (0, 1)):
            left_out[i] = "it counts the rows"
            del columns[i]
    notes += [f"column {names[i]!r} is left out: {reason}" for i, reason in left_out.items()]
    if not columns:
        raise UserError(f"{path}: no column of numbers but the target {names[t]!r:.60}")
    used = np.stack([*columns.values(), y] + ([w] if w is not None else []), 1)
    if np.isinf(used).any():
        raise UserError(f"{path}: a number in line {table.lines[int(np.argwhere(np.isinf(used))[0, 0])]} is infinite")
    if w is not None and (np.isnan(w).any() or (w[~np.isnan(w)] < 0).any() or not w.any()):
        raise UserError(f"--weights {args.weights!r:.60}: weights must be there, 0 or more, and not all 0")
    kept = np.flatnonzero(~np.isnan(used).any(1))
    if len(kept) < len(used):
        gone = [table.lines[i] for i in np.setdiff1d(np.arange(len(used)), kept)]
        notes.append(f"{len(gone)} of {len(used)} rows have a missing cell and are dropped: line"
                     f"{'s' * (len(gone) > 1)} {', '.join(map(str, gone[:10]))}{', ...' * (len(gone) > 10)}")
    if len(kept) < 3:
        raise UserError(f"{path}: {len(kept)} usable rows; there must be 3 or more")
    same = len(kept) - len(np.unique(used[kept], axis=0))
    if same:
        notes.append(f"{same} rows are there twice; they are kept")
    parts = [re.split("[eEdD]", cell) for cell in table.cells[kept, t]]
    digit = 10.0 ** min(int((x[1:] or ["0"])[0]) - len(x[0].partition(table.decimal)[2].strip()) for x in parts)
    if args.loss == "log" and y[kept].min() <= 0:
        line = table.lines[kept[y[kept].argmin()]]
        raise UserError(f"--loss log: {names[t]!r:.60} is {y[kept].min():g} in line {line}, and must be above 0")
    return Sample(used[kept, :len(columns)], y[kept], w[kept] if w is not None else None, [names[i] for i in columns],
                  names[t], [table.lines[i] for i in kept], digit, notes)


if __name__ == "__main__":
    with one_line_errors("common.tables"):
        for table in map(read_table, sys.argv[1:]):
            print(f"{len(table.cells)} rows of {', '.join(table.names)}", *table.notes, sep="\n  ")
