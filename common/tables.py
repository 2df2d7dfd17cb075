"""Tables of numbers as people have them: delimiter, decimal sign, header and missing cells are found out.

    python -m common.tables my.csv      # what is found in it
"""
from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import UserError, one_line_errors
from common.flags import Parser, path

MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "--", "?", ".", "*",
           "#n/a", "#div/0!", "#ref!", "#value!", "#name?", "#num!", "#null!"}
FOOTER = re.compile(r"((grand|sub)[ -]?)?totals?|sum|mean|average|avg\.?|median|std\.?( ?dev\.?)?|min|max|count",
                    re.IGNORECASE)
DELIMITERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", " ": "spaces"}


class Table(NamedTuple):
    """A file's cells (rows, columns) as text, with a name for each column and, for each row, the line it stands in."""
    names: list[str]
    cells: np.ndarray
    lines: list[int]
    decimal: str      # point or comma
    header: bool      # whether the names are the file's
    notes: list[str]  # what was found out

    def numbers(self, column: int) -> np.ndarray:
        """A column as numbers: NaN where a cell is missing, None where there is text in it."""
        return numbers(self.cells[:, column], self.decimal)


def numbers(cells: Sequence[str], decimal: str = ".") -> np.ndarray | None:
    """Cells as numbers, NaN where they are missing; None if one is neither. Groups of thousands are joined, a percent
    sign is left out."""
    group = "," if decimal == "." else "."
    joined = re.compile(rf"[-+]?[1-9][0-9]{{0,2}}((\{group}|['’\u00a0\u202f ])[0-9]{{3}})+(\{decimal}[0-9]*)?")
    out = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        text = cell.strip().removesuffix("%").rstrip().replace("\u2212", "-")
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


def decimal_of(cells: Iterable[str], delimiter: str) -> tuple[str, bool]:
    """Whether numbers are written with a point or a comma, and whether a cell says so: 1,5 and 0,123 and 1.234,5 and
    1.234.567 do; 1,234 may be either, and is taken for 1.234 where commas do not stand between columns."""
    bodies = [re.split("[eE]", cell.strip())[0].lstrip("+-") for cell in cells]
    seen = [x for x in bodies if re.fullmatch("[0-9.,]*[0-9][0-9.,]*", x) and ("." in x or "," in x)]

    def is_decimal(x: str, sign: str, other: str) -> bool:
        if sign in x and other in x:
            return x.rindex(sign) > x.rindex(other)
        grouped = re.fullmatch(r"[1-9][0-9]{0,2}([.,][0-9]{3})+", x)
        return x.count(sign) == 1 and not grouped if sign in x else x.count(other) > 1 and bool(grouped)
    comma, point = (sum(is_decimal(x, *signs) for x in seen) for signs in (",.", ".,"))
    if comma or point:
        return "," if comma > point else ".", True
    return ("," if delimiter != "," and any("," in x for x in seen) else "."), not seen or delimiter == ","


def rows_of(lines: list[str], delimiter: str) -> list[list[str]]:
    """Cells of each line, without columns behind the last delimiter that are empty everywhere."""
    if delimiter == " ":
        return [line.split() for line in lines]
    if delimiter == "|" and all(line.strip().startswith("|") for line in lines):  # a Markdown table
        lines = [line.strip()[1:] for line in lines]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    while (width := max(map(len, rows))) > 1 and not any(row[-1] for row in rows if len(row) == width):
        if sum(len(row) < width for row in rows) > 1:
            break
        rows = [row[:width - 1] for row in rows]
    return rows


def split(lines: list[str]) -> tuple[list[list[str]], int, str, str, bool]:
    """Rows of cells, how many most of them have, the delimiter with which most cells are numbers, the decimal sign,
    and whether a cell tells that."""
    best, best_score = None, (False, -1.0)
    for delimiter in DELIMITERS:
        rows = rows_of(lines, delimiter)
        widths = [len(row) for row in rows]
        width = max(set(widths), key=widths.count)
        cells = [cell for row in rows[1:] or rows for cell in row][:5000]
        sign, known = decimal_of(cells, delimiter)
        read = [numbers([cell], sign) for cell in cells]
        share = sum(x is not None and not np.isnan(x).all() for x in read) / max(1, len(read))
        share *= widths.count(width) / len(widths) > 0.8
        if len(rows[0]) == width - 1 and len(rows) > 1:  # R's row names have no header; numbers that do not count do
            first = numbers([row[0] for row in rows[1:]], sign)
            if first is not None and not (np.diff(first) == 1).all():
                share = 0.0
        several = width > 1 and share > 0
        if best is None or (several, share) > (best_score[0], best_score[1] + 0.05):
            best, best_score = (rows, width, delimiter, sign, known), (several, share)
    return best


def read_table(file: str | Path) -> Table:
    """A file of numbers as it is: its delimiter, decimal sign and header are found out. Raises UserError."""
    if Path(file).is_dir():
        raise UserError(f"{file}: is a folder, not a file of data")
    data, notes = Path(file).read_bytes(), []
    for coding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252", "latin-1"):
        try:
            text = data.decode(coding)
            break
        except UnicodeDecodeError as e:
            if coding == "utf-16":
                raise UserError(f"{file}: damaged UTF-16 ({e.reason})") from None
    if "\0" in text:
        raise UserError(f"{file}: a binary file, not a table")
    found = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip(" \t")]
    found = [(i, line) for i, line in found if not re.fullmatch("sep=.", line.strip())]  # Excel's own
    found = [(i, line) for i, line in found if not re.fullmatch(r"[\s|:+=-]*(---|===)[\s|:+=-]*", line)]  # rules
    remark = re.compile(r"\s*[#%](?!\s*[,;|\t]|(N/A|DIV|REF|VALUE|NAME|NUM|NULL)\b)")
    comments = [line.strip() for _, line in found if remark.match(line)]
    found = [(i, line) for i, line in found if not remark.match(line)]
    if not found:
        raise UserError(f"{file}: empty" if not comments else f"{file}: it has comments alone")
    lines = [i for i, _ in found]
    try:
        rows, width, delimiter, sign, known = split([line for _, line in found])
    except csv.Error as e:
        raise UserError(f"{file}: not a table ({e})") from None
    if len(rows) < len(lines):
        raise UserError(f"{file}: a quoted cell goes over several lines")
    notes.append(f"{DELIMITERS[delimiter]} between columns, decimal {'comma' if sign == ',' else 'point'}" +
                 ("" if known else " (no cell tells it from groups of thousands)") +
                 (f", comments: {len(comments)}" if comments else "") +
                 (", byte-order mark" if data[:3] == b"\xef\xbb\xbf" else "") +
                 (f", {coding}" if coding != "utf-8-sig" else ""))
    before = next((k for k, row in enumerate(rows) if len(row) >= width - 1), 0)
    if before:
        notes.append(f"{before} lines before the table are left out")
        rows, lines, found = rows[before:], lines[before:], found[before:]

    def is_text(cell: str) -> bool:
        return numbers([cell], sign) is None
    names, head = None, rows[0]
    named = [is_text(a) and not is_text(b) for a, b in zip(head, rows[1], strict=False)] if len(rows) > 1 else []
    if any(named) or all(map(is_text, head)):
        names, rows, lines = head, rows[1:], lines[1:]
        if len(names) > width:  # names with spaces between spaces
            names = re.split(r"\s{2,}|\t", found[0][1].strip()) if delimiter == " " else names
            names = names if len(names) == width else re.split(r"\s+(?![(\[])", found[0][1].strip())
            if len(names) != width:
                raise UserError(f"{file}: line {found[0][0]} has {len(names)} names of {width} columns")
        if len(names) == width - 1:
            names = ["row", *names]  # as R writes it
        units = [is_text(cell) for cell in rows[0]] if len(rows) > 1 and len(rows[0]) == len(rows[1]) == width else []
        plain = all(u or cell in ("", "-", "1") for u, cell in zip(units, rows[0] if units else [], strict=True))
        if any(units) and plain and not any(is_text(c) for c, u in zip(rows[1], units, strict=True) if u):
            names = [f"{name} {cell}" if u else name for name, cell, u in zip(names, rows[0], units, strict=True)]
            rows, lines = rows[1:], lines[1:]
            notes.append(f"line {lines[0] - 1} is taken for units")
    elif comments:
        words = rows_of([comments[-1].lstrip("#% ")], delimiter)[0]
        names = words if len(words) == width and all(map(is_text, words)) else None
    for row, i in zip(rows, lines, strict=True):
        if len(row) > width and any(row[width:]):
            raise UserError(f"{file}: line {i} has {len(row)} cells, the others {width}")
    cells = np.array([(row + [""] * width)[:width] for row in rows], dtype=object).reshape(-1, width)
    is_footer = [any(FOOTER.fullmatch(cell.strip(" :")) for cell in row) for row in cells]
    n_rows = len(cells) - sum(is_footer)
    if 0 < n_rows < len(cells) and not any(is_footer[:n_rows]):
        notes.append(f"line {', '.join(map(str, lines[n_rows:]))}: left out, a summary of the rows")
        cells, lines = cells[:n_rows], lines[:n_rows]
    header = names is not None
    if names is None:
        names = [*(f"x{i}" for i in range(width - 1)), "y"]
        notes.append(f"no header: the columns are called {', '.join(names)}")
    names = [name.strip() or f"column {i + 1}" for i, name in enumerate((names + [""] * width)[:width])]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(f"{file}: two columns are called {twice[0]!r:.60}")
    return Table(names, cells, lines, sign, header, notes)


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


def read_sample(file: str | Path, args: argparse.Namespace) -> Sample:
    """The columns of a file that are used: --target, --features, --ignore, --weights. Raises UserError."""
    table = read_table(file)
    names, notes = table.names, list(table.notes)

    def find(name: str, flag: str) -> int:
        if name not in names:
            raise UserError(f"{flag} {name!r:.60}: {file} has no such column; there are {', '.join(names):.200}")
        return names.index(name)

    def column(i: int, flag: str) -> np.ndarray:
        values = table.numbers(i)
        if values is None:
            bad = next(k for k, cell in enumerate(table.cells[:, i]) if numbers([cell], table.decimal) is None)
            raise UserError(f"{flag} {names[i]!r:.60}: not a column of numbers, line {table.lines[bad]} has "
                            f"{table.cells[bad, i]!r:.40}")
        return values
    if not len(table.cells):
        raise UserError(f"{file}: a header and no rows")
    ignored = {find(name, "--ignore") for name in args.ignore or []}
    ignored |= {find(args.weights, "--weights")} if args.weights is not None else set()
    left = [i for i in range(len(names)) if i not in ignored]
    if not left:
        raise UserError(f"{file}: no column is left for the target")
    t = find(args.target, "--target") if args.target is not None else left[-1]
    if t in ignored:
        raise UserError(f"--target {names[t]!r:.60}: it is ignored, or the weights")
    y = column(t, "--target")
    if args.target is None:
        notes.append(f"target {names[t]!r}, the last column" + " that is left" * bool(ignored))
    w = column(find(args.weights, "--weights"), "--weights") if args.weights is not None else None
    ignored.add(t)
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
            bad = [k for k, cell in enumerate(table.cells[:, i]) if numbers([cell], table.decimal) is None]
            left_out[i] = "dates" if is_date else "text"
            if len(bad) < len(table.cells) / 2:
                left_out[i] += f", {table.cells[bad[0], i]!r:.30} in line {table.lines[bad[0]]}"
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
        raise UserError(f"{file}: no column of numbers but the target {names[t]!r:.60}")
    used = np.stack([*columns.values(), y] + ([w] if w is not None else []), 1)
    if np.isinf(used).any():
        raise UserError(f"{file}: a number in line {table.lines[int(np.argwhere(np.isinf(used))[0, 0])]} is infinite")
    if w is not None and (np.isnan(w).any() or (w[~np.isnan(w)] < 0).any() or not w.any()):
        raise UserError(f"--weights {args.weights!r:.60}: weights must be there, 0 or more, and not all 0")
    kept = np.flatnonzero(~np.isnan(used).any(1))
    if len(kept) < len(used):
        gone = [table.lines[i] for i in np.setdiff1d(np.arange(len(used)), kept)]
        notes.append(f"{len(gone)} of {len(used)} rows have a missing cell and are dropped: line"
                     f"{'s' * (len(gone) > 1)} {', '.join(map(str, gone[:10]))}{', ...' * (len(gone) > 10)}")
    if len(kept) < 3:
        raise UserError(f"{file}: {len(kept)} usable rows; there must be 3 or more")
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="common.tables", usage="python -m common.tables FILE", description=__doc__)
    p.add_argument("file", type=path)
    return p.parse_args(argv)


if __name__ == "__main__":
    with one_line_errors("common.tables"):
        table = read_table(parse_args().file)
        print(f"{len(table.cells)} rows of {', '.join(table.names)}", *table.notes, sep="\n  ")
