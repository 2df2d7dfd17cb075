"""Synthetic tasks in the style of ARC: families of rules, inputs that show what they do, and compositions.

    python -m common.arc_rules --draw 24 --out sheet.png

A family is a function that draws a rule (which way things fall, which colour is kept): how inputs are made, and what
is done to them. A task is a rule, or up to three one after the other, with a few pairs. Nothing here was made by
looking at ARC's evaluation tasks; the kinds are those of its training tasks, and of an older prototype.
"""
from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from common import arc_tasks
from common.arc_tasks import Grid, Pair, Task
from common.files import UserError, check_output, one_line_errors
from common.flags import Parser, integer, path

Random = np.random.Generator
Draw = Callable[[Random, int, int, np.ndarray], Grid]  # a grid of a height and width, in some colours
Cells = tuple[np.ndarray, np.ndarray]                  # rows and columns, as an index of a grid

PAIRS = 4           # of a task: three demonstrations and a query
TRIES = 6           # inputs that are drawn for each pair; then another rule is
SECOND, THIRD = 0.3, 0.06  # how often a task has two rules or more, and three


class Unfit(Exception):
    """A rule says nothing about a grid, or not all that is to be seen of it."""


def need(condition) -> None:
    if not condition:
        raise Unfit


@dataclass(frozen=True)
class Rule:
    """What is done to a grid, and grids that show it."""
    name: str
    draw: Draw
    apply: Callable[[Grid], Grid]                   # raises Unfit where it has nothing to do
    least: int = 3                                  # side of an input
    most: Callable[[int], int] = lambda side: side  # the same, where outputs have sides of up to `side`
    colours: Sequence[int] | None = None            # of inputs, where the rule names some
    square: bool = False
    same_size: bool = False                         # all inputs of a task


FAMILIES: dict[str, Callable[[Random], Rule]] = {}
CHANGES: list[str] = []  # families that make sense behind another one: they ask little of their input


def family(f: Callable[[Random], Rule]) -> Callable[[Random], Rule]:
    """Add a family under its function's name. It may be called with a random generator alone."""
    FAMILIES[f.__name__] = f
    return f


def change(f: Callable[[Random], Rule]) -> Callable[[Random], Rule]:
    """Add a family that may stand behind another one, too."""
    CHANGES.append(f.__name__)
    return family(f)


# ---- Looking at a grid; 0 is the background

def colours_of(rng: Random, n: int) -> list[int]:
    """n different ones of 1 to 9."""
    return (1 + rng.permutation(9)[:n]).tolist()


def one_of(rng: Random, values: Sequence):
    return values[int(rng.integers(len(values)))]


def drawn_from(rng: Random, colours: np.ndarray, size: int | tuple[int, ...]) -> np.ndarray:
    """As rng.choice, in a third of its time."""
    return colours[rng.integers(len(colours), size=size)]


def objects(grid: Grid, diagonal: bool = True, one_colour: bool = True) -> list[Cells]:
    """Connected cells that are not background, in the order of their first cells."""
    cells, height, width = grid.tolist(), *grid.shape
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] * diagonal
    seen, found = set(), []
    for first in zip(*map(np.ndarray.tolist, np.nonzero(grid)), strict=True):
        if first in seen:
            continue
        colour, todo = cells[first[0]][first[1]], [first]
        seen.add(first)
        for r, c in todo:  # grows while it is gone through
            for dr, dc in steps:
                at = x, y = r + dr, c + dc
                if 0 <= x < height and 0 <= y < width and at not in seen and cells[x][y]:
                    if not one_colour or cells[x][y] == colour:
                        seen.add(at)
                        todo.append(at)
        rows, columns = np.array(todo).T
        found.append((rows, columns))
    return found


def box(cells: Cells) -> tuple[slice, slice]:
    """The smallest rectangle around some cells."""
    return tuple(slice(int(x.min()), int(x.max()) + 1) for x in cells)


def content(grid: Grid) -> tuple[slice, slice]:
    """The smallest rectangle around all that is not background."""
    need(grid.any())
    return box(np.nonzero(grid))


def holes(grid: Grid) -> np.ndarray:
    """Background that no path of background, along sides, leads to the border from."""
    padded = np.pad(grid == 0, 1, constant_values=True)
    outside = objects(padded.astype(np.int8), diagonal=False)[0]  # the frame of padding is the first one
    padded[outside] = False
    return padded[1:-1, 1:-1]


def around(mask: np.ndarray, diagonal: bool) -> np.ndarray:
    """The cells of a mask and their neighbours."""
    padded, out = np.pad(mask, 1), mask.copy()
    height, width = mask.shape
    for dr in range(3):
        for dc in range(3):
            if diagonal or dr == 1 or dc == 1:
                out |= padded[dr:dr + height, dc:dc + width]
    return out


def inside(mask: np.ndarray) -> np.ndarray:
    """The cells of a mask whose four neighbours are in it, too."""
    p = np.pad(mask, 1)
    return p[2:, 1:-1] & p[:-2, 1:-1] & p[1:-1, 2:] & p[1:-1, :-2] & mask


def as_mask(grid: Grid, cells: Cells) -> np.ndarray:
    mask = np.zeros(grid.shape, bool)
    mask[cells] = True
    return mask


def turned(grid: Grid, k: int) -> Grid:
    """One of the eight symmetries: quarter turns, from 4 on mirrored behind them."""
    grid = np.rot90(grid, k % 4)
    return np.fliplr(grid) if k >= 4 else grid


def counts(grid: Grid) -> list[tuple[int, int]]:
    """How often colours occur, the commonest first: (number, colour). Background does not count."""
    n = np.bincount(grid.ravel(), minlength=10)[1:]
    return sorted(((int(k), colour) for colour, k in enumerate(n, 1) if k), reverse=True)


# ---- Drawing inputs

def noise(rng: Random, height: int, width: int, colours: np.ndarray, density: float | None = None) -> Grid:
    """Cells of random colours, at random places."""
    density = rng.uniform(0.15, 0.6) if density is None else density
    return np.where(rng.random((height, width)) < density, drawn_from(rng, colours, (height, width)), 0).astype(np.int8)


def full(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
    """No background."""
    return drawn_from(rng, colours, (height, width)).astype(np.int8)


def pixels(rng: Random, height: int, width: int, colours: np.ndarray, n: int | None = None) -> Grid:
    """A few single cells."""
    grid = np.zeros((height, width), np.int8)
    n = n or int(rng.integers(1, max(3, min(6, height * width // 6) + 1)))
    grid[rng.integers(height, size=n), rng.integers(width, size=n)] = drawn_from(rng, colours, n)
    return grid


def shape(rng: Random, most: int, kind: str = "") -> np.ndarray:
    """The mask of a rectangle, ring, bar, plus, or of a walk."""
    kind = kind or one_of(rng, ["rectangle", "ring", "bar", "plus", "walk", "walk"])
    height, width = rng.integers(1, most + 1, 2).tolist()
    if kind == "rectangle":
        return np.ones((height, width), bool)
    if kind == "ring":
        mask = np.ones((max(3, height), max(3, width)), bool)
        mask[1:-1, 1:-1] = False
        return mask
    if kind == "bar":
        return np.ones((1, width) if rng.random() < 0.5 else (height, 1), bool)
    if kind == "plus":
        return np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    height, width = max(2, height), max(2, width)
    mask = np.zeros((height, width), bool)
    r, c = int(rng.integers(height)), int(rng.integers(width))
    mask[r, c] = True
    for k in rng.integers(4, size=int(rng.integers(2, height * width + 1))).tolist():
        dr, dc = ((0, 1), (1, 0), (0, -1), (-1, 0))[k]
        r, c = min(max(r + dr, 0), height - 1), min(max(c + dc, 0), width - 1)
        mask[r, c] = True
    return mask[box(np.nonzero(mask))]


def things(rng: Random, height: int, width: int, colours: np.ndarray, n: int | None = None, kind: str = "",
           most: int | None = None, gap: int = 1) -> Grid:
    """Up to n shapes of one colour each, `gap` cells apart."""
    grid, taken = np.zeros((height, width), np.int8), np.zeros((height, width), bool)
    for _ in range(n or int(rng.integers(1, 5))):
        mask = shape(rng, most or max(2, min(height, width) // 2), kind)
        h, w = mask.shape
        if h > height or w > width:
            continue
        for r, c in rng.integers(0, [height - h + 1, width - w + 1], (5, 2)).tolist():
            if not taken[max(0, r - gap):r + h + gap, max(0, c - gap):c + w + gap].any():
                grid[r:r + h, c:c + w][mask] = one_of(rng, colours)
                taken[r:r + h, c:c + w] = True
                break
    return grid


def some_things(**settings) -> Draw:
    """`things` with these settings; a pair of numbers is a range, ends included."""
    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        drawn = {k: int(rng.integers(v[0], v[1] + 1)) if isinstance(v, tuple) else v for k, v in settings.items()}
        return things(rng, height, width, colours, **drawn)
    return draw


def lines(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
    """One to three whole rows and columns."""
    grid = np.zeros((height, width), np.int8)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(height)) if rng.random() < 0.5 else (slice(None), int(rng.integers(width)))
        grid[at] = one_of(rng, colours)
    return grid


def blocks(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
    """Rectangles, some over others."""
    grid = np.zeros((height, width), np.int8)
    for _ in range(int(rng.integers(2, 5))):
        (a, b), (c, d) = (sorted(rng.integers(0, n + 1, 2).tolist()) for n in (height, width))
        grid[a:b, c:d] = one_of(rng, colours)
    return grid


def symmetric(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
    grid = noise(rng, height, width, colours, rng.uniform(0.3, 0.9))
    grid[height - height // 2:] = grid[:height // 2][::-1]
    if rng.random() < 0.7:
        grid[:, width - width // 2:] = grid[:, :width // 2][:, ::-1]
    return grid


def patch(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
    """A rectangle of noise somewhere."""
    grid = np.zeros((height, width), np.int8)
    h, w = int(rng.integers(1, height)), int(rng.integers(1, width))
    r, c = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    grid[r:r + h, c:c + w] = noise(rng, h, w, colours, 0.75)
    return grid


ANYTHING = (noise, noise, full, things, things, lines, blocks, pixels, symmetric)


# ---- Families: place and size

@change
def turn_or_mirror(rng: Random) -> Rule:
    k = int(rng.integers(1, 8))
    return Rule(f"{'mirror' if k >= 4 else 'turn'} {k}", one_of(rng, ANYTHING), lambda grid: turned(grid, k), least=2)


@change
def shift(rng: Random) -> Rule:
    """Everything moves; what leaves is lost, or comes in at the other side."""
    move = one_of(rng, [(1, 0), (-1, 0), (0, 1), (0, -1), (2, 0), (0, 2), (-2, 0), (0, -2), (1, 1), (-1, -1), (1, -1)])
    wraps = rng.random() < 0.5

    def apply(grid: Grid) -> Grid:
        out = np.roll(grid, move, (0, 1))
        for axis, n in enumerate(() if wraps else move):
            np.moveaxis(out, axis, 0)[slice(None, n) if n > 0 else slice(n, None) if n else slice(0)] = 0
        return out
    return Rule(f"shift {move}{' and wrap' * wraps}", one_of(rng, ANYTHING), apply)


@change
def enlarge(rng: Random) -> Rule:
    a, b = one_of(rng, [(2, 2), (2, 1), (1, 2), (3, 3)])
    return Rule(f"enlarge {a} x {b}", one_of(rng, ANYTHING), lambda grid: np.kron(grid, np.ones((a, b), np.int8)),
                least=1, most=lambda side: side // max(a, b))


@family
def shrink(rng: Random) -> Rule:
    a, b = one_of(rng, [(2, 2), (2, 1), (1, 2), (3, 3)])
    draw = one_of(rng, ANYTHING)

    def enlarged(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        small = draw(rng, max(1, height // a), max(1, width // b), colours)
        return np.kron(small, np.ones((a, b), np.int8))
    return Rule(f"shrink {a} x {b}", enlarged, lambda grid: grid[::a, ::b], least=max(a, b))


@family
def tile(rng: Random) -> Rule:
    """Copies side by side, some of them mirrored or turned."""
    rows, columns = one_of(rng, [(1, 2), (2, 1), (2, 2), (2, 2), (3, 1), (1, 3), (3, 3)])
    how = one_of(rng, ["plain", "mirrored", "mirrored", "turned", "one by one"])
    ways = rng.integers(0, 4, (rows, columns))

    def copy(grid: Grid, r: int, c: int) -> Grid:
        if how == "mirrored":
            return grid[::-1 if r % 2 else 1, ::-1 if c % 2 else 1]
        if how == "turned":
            return np.rot90(grid, r + c)
        return np.rot90(grid, ways[r, c]) if how == "one by one" else grid
    return Rule(f"tile {rows} x {columns}, {how}", one_of(rng, ANYTHING),
                lambda grid: np.block([[copy(grid, r, c) for c in range(columns)] for r in range(rows)]), least=2,
                most=lambda side: side // max(rows, columns), square=how in ("turned", "one by one"))


@family
def fractal(rng: Random) -> Rule:
    """A copy of the grid in place of each coloured cell."""
    inverse = rng.random() < 0.3
    return Rule("fractal" + " of the background" * inverse, noise,
                lambda grid: np.kron((grid == 0) if inverse else (grid != 0), grid), least=2,
                most=lambda side: int(side ** 0.5), square=True)


@change
def crop(rng: Random) -> Rule:
    return Rule("crop", patch, lambda grid: grid[content(grid)])


@change
def keep_part(rng: Random) -> Rule:
    name, apply = one_of(rng, [
        ("left half", lambda g: g[:, :(g.shape[1] + 1) // 2]), ("right half", lambda g: g[:, g.shape[1] // 2:]),
        ("upper half", lambda g: g[:(len(g) + 1) // 2]), ("lower half", lambda g: g[len(g) // 2:]),
        ("upper right quarter", lambda g: g[:len(g) // 2, g.shape[1] - g.shape[1] // 2:]),
        ("last row", lambda g: g[-1:]), ("first column", lambda g: g[:, :1]),
        ("every other row", lambda g: g[::2])])
    return Rule(name, one_of(rng, ANYTHING), apply)


@change
def frame(rng: Random) -> Rule:
    [colour] = colours_of(rng, 1)
    what = one_of(rng, ["draw", "add", "remove", "keep", "fill within"])

    def apply(grid: Grid) -> Grid:
        middle = (slice(1, -1), slice(1, -1))
        if what == "add":
            return np.pad(grid, 1, constant_values=colour)
        need(min(grid.shape) > 2)
        if what == "remove":
            return grid[middle]
        if what == "fill within":
            out = grid.copy()
            out[middle] = colour
            return out
        out = np.full_like(grid, colour) if what == "draw" else grid.copy()
        out[middle] = grid[middle] if what == "draw" else 0
        return out
    return Rule(f"frame: {what}", one_of(rng, ANYTHING), apply, most=lambda side: side - 2 * (what == "add"))


@change
def gravity(rng: Random) -> Rule:
    k = int(rng.integers(4))

    def apply(grid: Grid) -> Grid:
        grid = np.rot90(grid, k)
        order = np.argsort(grid != 0, axis=0, kind="stable")
        return np.rot90(np.take_along_axis(grid, order, 0), -k)
    return Rule(f"gravity {k}", one_of(rng, [noise, pixels, things]), apply)


@family
def move_to_the_wall(rng: Random) -> Rule:
    """What is there moves as one, one step or until it touches the border."""
    k, far = int(rng.integers(4)), rng.random() < 0.6

    def apply(grid: Grid) -> Grid:
        grid = np.rot90(grid, k)
        rows, _ = content(grid)
        n = len(grid) - rows.stop if far else 1
        need(0 < n <= len(grid) - rows.stop)
        out = np.zeros_like(grid)
        out[rows.start + n:rows.stop + n] = grid[rows]
        return np.rot90(out, -k)
    return Rule(f"move {'to the wall' if far else 'a step'} {k}", some_things(n=(1, 2)), apply, least=4)


@family
def objects_fall(rng: Random) -> Rule:
    """Each object falls as a whole until it meets the border or another one."""
    k = int(rng.integers(4))

    def apply(grid: Grid) -> Grid:
        grid = np.rot90(grid, k)
        out, moved = np.zeros_like(grid), False
        for rows, columns in sorted(objects(grid), key=lambda cells: -int(cells[0].max())):
            n = 0
            while rows.max() + n + 1 < len(grid) and not out[rows + n + 1, columns].any():
                n += 1
            out[rows + n, columns] = grid[rows, columns]
            moved |= n > 0
        need(moved)
        return np.rot90(out, -k)
    return Rule(f"objects fall {k}", some_things(n=(2, 4), most=3), apply, least=5)


@family
def mirror_the_object(rng: Random) -> Rule:
    """What is there is turned or mirrored where it stands."""
    k = int(rng.integers(1, 8))

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        grid, n = np.zeros((height, width), np.int8), int(rng.integers(2, min(height, width) + 1))
        r, c = int(rng.integers(height - n + 1)), int(rng.integers(width - n + 1))
        grid[r:r + n, c:c + n] = noise(rng, n, n, colours, 0.7)
        return grid

    def apply(grid: Grid) -> Grid:
        at, out = content(grid), grid.copy()
        new = turned(grid[at], k)
        need(new.shape == grid[at].shape)
        out[at] = new
        return out
    return Rule(f"{'mirror' if k >= 4 else 'turn'} the object {k}", draw, apply, least=4)


@family
def mirror_each_object(rng: Random) -> Rule:
    k = int(one_of(rng, [2, 4, 6]))

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        grid = things(rng, height, width, colours[:1], n=int(rng.integers(1, 4)), kind="walk", most=3)
        return np.where(grid, full(rng, height, width, colours), 0).astype(np.int8)

    def apply(grid: Grid) -> Grid:
        out = grid.copy()
        for cells in objects(grid, one_colour=False):
            out[box(cells)] = turned(grid[box(cells)], k)
        return out
    return Rule(f"mirror each object {k}", draw, apply, least=4, colours=colours_of(rng, 3))


@family
def complete_symmetry(rng: Random) -> Rule:
    """What a mirror would show is drawn where there is background."""
    axes = one_of(rng, [(0,), (1,), (0, 1)])

    def apply(grid: Grid) -> Grid:
        for axis in axes:
            grid = np.where(grid, grid, np.flip(grid, axis))
        return grid

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        grid = apply(noise(rng, height, width, colours, rng.uniform(0.3, 0.9)) if rng.random() < 0.6 else
                     things(rng, height, width, colours))
        if rng.random() < 0.4:
            half = grid if 0 in axes else grid.T
            half[len(half) - len(half) // 2:] = 0
        else:
            h, w = (int(rng.integers(1, max(2, n // 2 + 1))) for n in (height, width))
            r, c = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            grid[r:r + h, c:c + w] = 0
        return grid
    return Rule(f"complete symmetry {axes}", draw, apply, least=4)


@family
def repair_pattern(rng: Random) -> Rule:
    """A periodic pattern has a hole."""
    diagonal = rng.random() < 0.4
    a, b = (1 if diagonal else int(rng.integers(1, 4))), int(rng.integers(2, 4))

    def period(r, c):
        return (r * 0, (r + c) % b) if diagonal else (r % a, c % b)

    def apply(grid: Grid) -> Grid:
        r, c = np.indices(grid.shape)
        x, y = period(r, c)
        motif = np.zeros((a, b), np.int8)
        motif[x[grid != 0], y[grid != 0]] = grid[grid != 0]
        need(motif.all())
        return motif[x, y]

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        motif = full(rng, a, b, colours)
        need(len(np.unique(motif)) > 1)
        grid = motif[period(*np.indices((height, width)))]
        h, w = (int(rng.integers(1, max(2, n // 2 + 1))) for n in (height, width))
        r, c = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        grid[r:r + h, c:c + w] = 0
        return grid
    return Rule("repair a pattern", draw, apply, least=5)


@family
def drop_repeats(rng: Random) -> Rule:
    """Rows and columns that are as the one before go."""
    def different(grid: Grid) -> Grid:
        return grid[np.r_[True, (grid[1:] != grid[:-1]).any(1)]]

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        small = full(rng, *rng.integers(1, 4, 2).tolist(), colours)
        rows, columns = (np.sort(rng.integers(0, n, m)) for n, m in zip(small.shape, (height, width), strict=True))
        return small[rows][:, columns]
    return Rule("drop repeats", draw, lambda grid: different(different(grid).T).T)


@family
def sort_columns(rng: Random) -> Rule:
    """Bars are put in the order of their heights."""
    k, falling = int(rng.integers(4)), rng.random() < 0.5

    def apply(grid: Grid) -> Grid:
        grid = np.rot90(grid, k)
        n = (grid != 0).sum(0)
        return np.rot90(grid[:, np.argsort(-n if falling else n, kind="stable")], -k)

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        height, width = (width, height) if k % 2 else (height, width)
        top = rng.permutation(height)[:width] if width <= height else rng.integers(0, height, width)
        rows = np.arange(height)[:, None]
        return np.rot90(np.where(rows >= top, drawn_from(rng, colours, width), 0).astype(np.int8), -k)
    return Rule(f"sort bars {k}, {'falling' if falling else 'rising'}", draw, apply)


# ---- Families: colour

@change
def map_colours(rng: Random) -> Rule:
    colours, table = colours_of(rng, int(rng.integers(2, 5))), np.arange(10, dtype=np.int8)
    how = one_of(rng, ["swap", "rotate", "all to one", "replace"])
    if how == "swap":
        table[colours[:2]] = colours[1::-1]
    elif how == "rotate":
        table[colours] = np.roll(colours, 1)
    elif how == "all to one":
        table[colours] = one_of(rng, colours)
    else:
        table[colours[0]] = one_of(rng, [c for c in range(10) if c != colours[0]])
    return Rule(f"colours: {how}", one_of(rng, ANYTHING), lambda grid: table[grid], least=2, colours=colours)


@family
def keep_a_colour(rng: Random) -> Rule:
    colours, others = colours_of(rng, int(rng.integers(2, 4))), rng.random() < 0.5
    return Rule(f"{'remove' if others else 'keep'} a colour", one_of(rng, ANYTHING),
                lambda grid: np.where((grid == colours[0]) ^ others, grid, 0).astype(np.int8), colours=colours)


@change
def invert(rng: Random) -> Rule:
    """Background is drawn, what was drawn is background."""
    a, b = colours_of(rng, 2)
    colour = a if rng.random() < 0.5 else b
    return Rule("invert", one_of(rng, [noise, things, blocks, symmetric]),
                lambda grid: np.where(grid == 0, colour, 0).astype(np.int8), colours=[a])


@family
def the_commonest(rng: Random) -> Rule:
    """The grid, or one cell, of its commonest or rarest colour; or all but that colour goes."""
    rarest, what = rng.random() < 0.4, one_of(rng, ["one cell", "all cells", "only it"])

    def apply(grid: Grid) -> Grid:
        found = counts(grid)
        need(len(found) > 1)
        first, second = (found[-1], found[-2]) if rarest else found[:2]
        need(first[0] != second[0])
        if what == "only it":
            return np.where(grid == first[1], grid, 0).astype(np.int8)
        return np.full((1, 1) if what == "one cell" else grid.shape, first[1], np.int8)
    return Rule(f"the {'rarest' if rarest else 'commonest'} colour, {what}", full, apply, colours=colours_of(rng, 3))


@family
def count(rng: Random) -> Rule:
    """A row of as many cells as there are objects, or cells."""
    cells, upright, [colour] = rng.random() < 0.4, rng.random() < 0.5, colours_of(rng, 1)

    def apply(grid: Grid) -> Grid:
        n = int((grid != 0).sum()) if cells else len(objects(grid, one_colour=False))
        need(0 < n <= 9)
        return np.full((n, 1) if upright else (1, n), colour, np.int8)
    return Rule(f"count {'cells' if cells else 'objects'}", pixels if cells else some_things(n=(1, 6), most=2), apply)


@family
def histogram(rng: Random) -> Rule:
    """A bar for each colour, the commonest first."""
    def apply(grid: Grid) -> Grid:
        found = counts(grid)
        need(len({n for n, _ in found}) == len(found) > 1 and found[0][0] <= 9)
        out = np.zeros((len(found), found[0][0]), np.int8)
        for row, (n, colour) in zip(out, found, strict=True):
            row[:n] = colour
        return out
    return Rule("histogram", one_of(rng, [pixels, things, lines]), apply, least=4, colours=colours_of(rng, 3))


@change
def lattice(rng: Random) -> Rule:
    """Every other cell, row or column, or the diagonal, where there is background (or is not)."""
    what, odd, over = one_of(rng, ["checkers", "rows", "columns", "diagonal"]), int(rng.integers(2)), rng.random() < 0.5
    [colour] = colours_of(rng, 1)

    def apply(grid: Grid) -> Grid:
        r, c = np.indices(grid.shape)
        at = {"checkers": (r + c) % 2 == odd, "rows": r % 2 == odd, "columns": c % 2 == odd, "diagonal": r == c}[what]
        return np.where(at & ((grid != 0) if over else (grid == 0)), colour, grid).astype(np.int8)
    return Rule(f"lattice: {what}", one_of(rng, [things, blocks, noise, lines]), apply)


# ---- Families: objects

PROPERTIES: dict[str, Callable[[Cells, Grid], bool]] = {
    "large": lambda cells, grid: len(cells[0]) >= 4,
    "at the border": lambda cells, grid: min(map(np.min, cells)) == 0 or cells[0].max() == len(grid) - 1
                                         or cells[1].max() == grid.shape[1] - 1,
    "upright": lambda cells, grid: np.ptp(cells[0]) > np.ptp(cells[1]),
    "a rectangle": lambda cells, grid: len(cells[0]) == (np.ptp(cells[0]) + 1) * (np.ptp(cells[1]) + 1),
    "in the upper half": lambda cells, grid: cells[0].min() + cells[0].max() < len(grid) - 1,
    "a single cell": lambda cells, grid: len(cells[0]) == 1,
    "with a hole": lambda cells, grid: bool(holes(as_mask(grid, cells)[box(cells)].astype(np.int8)).any()),
    "symmetric": lambda cells, grid: (m := as_mask(grid, cells)[box(cells)]).tolist() == m[:, ::-1].tolist(),
}


@family
def colour_by_property(rng: Random) -> Rule:
    """Objects that have something in common get one colour, the others another."""
    name, (yes, no) = one_of(rng, list(PROPERTIES)), colours_of(rng, 2)

    def apply(grid: Grid) -> Grid:
        out, seen = grid.copy(), set()
        for cells in objects(grid):
            has = bool(PROPERTIES[name](cells, grid))
            seen.add(has)
            out[cells] = yes if has else no
        need(len(seen) == 2)
        return out
    draw = some_things(n=(2, 5), kind="bar" if name == "upright" else "")
    return Rule(f"colour what is {name}", draw, apply, least=5, colours=colours_of(rng, 1))


@family
def keep_by_property(rng: Random) -> Rule:
    """Objects without a property go."""
    name, inverse = one_of(rng, list(PROPERTIES)), rng.random() < 0.5

    def apply(grid: Grid) -> Grid:
        out, seen = grid.copy(), set()
        for cells in objects(grid):
            has = bool(PROPERTIES[name](cells, grid))
            seen.add(has)
            out[cells] = 0 if has == inverse else out[cells]
        need(len(seen) == 2)
        return out
    return Rule(f"{'remove' if inverse else 'keep'} what is {name}",
                some_things(n=(2, 5), kind="bar" if name == "upright" else ""), apply, least=5)


@family
def colour_by_rank(rng: Random) -> Rule:
    """The largest object gets one colour, the next another, ..."""
    order = colours_of(rng, 3)

    def apply(grid: Grid) -> Grid:
        found = sorted(objects(grid), key=lambda cells: -len(cells[0]))
        sizes = [len(cells[0]) for cells in found]
        need(len(set(sizes)) == len(sizes) == 3)
        out = grid.copy()
        for cells, colour in zip(found, order, strict=True):
            out[cells] = colour
        return out
    return Rule("colour by rank", some_things(n=3), apply, least=5, colours=colours_of(rng, 1))


@family
def pick_by_size(rng: Random) -> Rule:
    """The largest or smallest object is kept, cut out, recoloured or removed."""
    largest, what = rng.random() < 0.6, one_of(rng, ["keep", "colour", "cut out", "remove"])
    [colour] = colours_of(rng, 1)

    def apply(grid: Grid) -> Grid:
        found = sorted(objects(grid), key=lambda cells: len(cells[0]), reverse=largest)
        need(len(found) > 1 and len(found[0][0]) != len(found[1][0]))
        only, out = np.zeros_like(grid), grid.copy()
        only[found[0]] = grid[found[0]]
        if what in ("keep", "cut out"):
            return only if what == "keep" else only[box(found[0])]
        out[found[0]] = colour if what == "colour" else 0
        return out
    return Rule(f"{what} the {'largest' if largest else 'smallest'}", some_things(n=(2, 4)), apply, least=5)


@family
def odd_one_out(rng: Random) -> Rule:
    """The object whose colour no other has is cut out, or alone kept."""
    cut = rng.random() < 0.6

    def apply(grid: Grid) -> Grid:
        found = objects(grid)
        of = [int(grid[cells][0]) for cells in found]
        alone = [cells for cells, colour in zip(found, of, strict=True) if of.count(colour) == 1]
        need(len(alone) == 1 and len(found) > 2)
        only = np.zeros_like(grid)
        only[alone[0]] = grid[alone[0]]
        return only[box(alone[0])] if cut else only
    return Rule("odd one out" + ", cut out" * cut, some_things(n=(3, 5), most=3), apply, least=6,
                colours=colours_of(rng, 2))


@family
def remove_specks(rng: Random) -> Rule:
    colour = colours_of(rng, 1)[0] if rng.random() < 0.3 else 0

    def apply(grid: Grid) -> Grid:
        out, n = grid.copy(), 0
        for cells in objects(grid, diagonal=False):
            if len(cells[0]) == 1:
                out[cells], n = colour, n + 1
        need(n)
        return out

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        grid = things(rng, height, width, colours, n=2, kind="rectangle")
        return np.where(grid, grid, pixels(rng, height, width, colours)).astype(np.int8)
    return Rule("remove specks" if not colour else "colour specks", draw, apply, least=4)


@change
def fill_holes(rng: Random) -> Rule:
    [colour], only = colours_of(rng, 1), rng.random() < 0.25

    def apply(grid: Grid) -> Grid:
        mask = holes(grid)
        need(mask.any())
        return np.where(mask, colour, 0 if only else grid).astype(np.int8)
    return Rule("fill holes" + ", and nothing else" * only, some_things(n=(1, 4), kind="ring"), apply, least=4)


@family
def flood_outside(rng: Random) -> Rule:
    [colour] = colours_of(rng, 1)

    def apply(grid: Grid) -> Grid:
        mask = (grid == 0) & ~holes(grid)
        need(mask.any() and holes(grid).any())
        return np.where(mask, colour, grid).astype(np.int8)
    return Rule("flood outside", some_things(n=(1, 2), kind="ring"), apply, least=4)


@change
def outline(rng: Random) -> Rule:
    [colour], diagonal, only = colours_of(rng, 1), rng.random() < 0.6, rng.random() < 0.2

    def apply(grid: Grid) -> Grid:
        mask = around(grid != 0, diagonal) & (grid == 0)
        need(mask.any())
        return np.where(mask, colour, 0 if only else grid).astype(np.int8)
    return Rule("outline", one_of(rng, [pixels, some_things(n=(1, 2), most=2, gap=2)]), apply, least=4)


@family
def parts_of_rectangles(rng: Random) -> Rule:
    """Their inside goes or gets a colour, or rim and inside, or the corners."""
    what, (a, b) = one_of(rng, ["hollow", "inside", "rim and inside", "corners"]), colours_of(rng, 2)

    def apply(grid: Grid) -> Grid:
        out, n = grid.copy(), 0
        for cells in objects(grid, diagonal=False):
            mask = as_mask(grid, cells)
            within = inside(mask)
            n += int(within.sum())
            if what == "corners":
                rows, columns = box(cells)
                out[np.ix_([rows.start, rows.stop - 1], [columns.start, columns.stop - 1])] = a
                continue
            out[within] = {"hollow": 0, "inside": a, "rim and inside": b}[what]
            if what == "rim and inside":
                out[mask & ~within] = a
        need(n)
        return out
    return Rule(f"rectangles: {what}", some_things(n=(1, 3), kind="rectangle", most=5), apply, least=5)


@change
def fill_boxes(rng: Random) -> Rule:
    """The background within the rectangle around each object."""
    [colour] = colours_of(rng, 1)

    def apply(grid: Grid) -> Grid:
        out, found = grid.copy(), objects(grid)
        for cells in found:
            out[box(cells)] = np.where(out[box(cells)], out[box(cells)], colour)
        need((out != grid).any())
        return out
    draw = some_things(n=(1, 3), kind=one_of(rng, ["walk", "walk", "plus", "ring"]), most=4)
    return Rule("fill boxes", draw, apply, least=5)


@family
def cut_out_the_inside(rng: Random) -> Rule:
    """What stands within the frame is the output."""
    colours = colours_of(rng, 3)

    def draw(rng: Random, height: int, width: int, _: np.ndarray) -> Grid:
        grid = pixels(rng, height, width, np.array(colours[1:]))
        h, w = int(rng.integers(3, height + 1)), int(rng.integers(3, width + 1))
        r, c = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        grid[r:r + h, c:c + w] = colours[0]
        grid[r + 1:r + h - 1, c + 1:c + w - 1] = noise(rng, h - 2, w - 2, np.array(colours[1:]))
        return grid

    def apply(grid: Grid) -> Grid:
        found = [cells for cells in objects(grid, diagonal=False) if grid[cells][0] == colours[0]]
        need(len(found) == 1)
        rows, columns = box(found[0])
        need(rows.stop - rows.start > 2 and columns.stop - columns.start > 2)
        return grid[rows.start + 1:rows.stop - 1, columns.start + 1:columns.stop - 1]
    return Rule("cut out the inside", draw, apply, least=4, colours=colours)


# ---- Families: lines

WAYS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))


@family
def rays(rng: Random) -> Rule:
    """Lines leave each cell, to the border or to what is in the way."""
    several = [[0, 2], [1, 3], [0, 1, 2, 3], [4, 7], [4, 5, 6, 7]]
    ways = [WAYS[i] for i in one_of(rng, [*([i] for i in range(8)), *several])]
    colour, stops = colours_of(rng, 1)[0] if rng.random() < 0.4 else 0, rng.random() < 0.7

    def apply(grid: Grid) -> Grid:
        out, (height, width) = grid.copy(), grid.shape
        for r, c in zip(*np.nonzero(grid), strict=True):
            for dr, dc in ways:
                x, y = r + dr, c + dc
                while 0 <= x < height and 0 <= y < width and not (stops and grid[x, y]):
                    if not grid[x, y]:
                        out[x, y] = colour or grid[r, c]
                    x, y = x + dr, y + dc
        return out
    return Rule(f"rays {ways}", lambda rng, *more: pixels(rng, *more, n=int(rng.integers(1, 4))), apply)


@family
def cross(rng: Random) -> Rule:
    """The row or column of each cell, or both, is drawn."""
    what, colour = one_of(rng, ["row", "column", "both"]), colours_of(rng, 1)[0] if rng.random() < 0.3 else 0

    def apply(grid: Grid) -> Grid:
        out = grid.copy()
        for r, c in zip(*np.nonzero(grid), strict=True):
            for line, own in ((out[r], grid[r]),) * (what != "column") + ((out[:, c], grid[:, c]),) * (what != "row"):
                line[own == 0] = colour or grid[r, c]
        return out
    most = 2 if what == "both" else 3
    return Rule(f"draw its {what}", lambda rng, *more: pixels(rng, *more, n=int(rng.integers(1, most))), apply)


@family
def connect(rng: Random) -> Rule:
    """Equal cells in a row or column are connected."""
    axes, colour = one_of(rng, [(0,), (1,), (0, 1)]), colours_of(rng, 1)[0] if rng.random() < 0.5 else 0

    def apply(grid: Grid) -> Grid:
        out = grid.copy()
        for axis in axes:
            for line, new in zip(*((grid, out) if axis == 0 else (grid.T, out.T)), strict=True):
                at = np.flatnonzero(line)
                for a, b in zip(at[:-1], at[1:], strict=True):
                    if line[a] == line[b]:
                        new[a + 1:b] = colour or line[a]
        need((out != grid).any())
        return out

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        grid = np.zeros((height, width), np.int8)
        for _ in range(int(rng.integers(1, 4))):
            view = grid if one_of(rng, axes) == 0 else grid.T
            view[int(rng.integers(len(view))), rng.choice(view.shape[1], 2, replace=False)] = one_of(rng, colours)
        return grid
    return Rule(f"connect {axes}", draw, apply, least=4)


@family
def stamp(rng: Random) -> Rule:
    """A small figure is drawn around each cell."""
    figure = one_of(rng, [np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]), np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]]),
                          (rng.random((3, 3)) < 0.5).astype(int)]).astype(bool)
    colour = colours_of(rng, 1)[0] if rng.random() < 0.6 else 0

    def apply(grid: Grid) -> Grid:
        out = np.zeros(np.add(grid.shape, 2), np.int8)
        for r, c in zip(*np.nonzero(grid), strict=True):
            out[r:r + 3, c:c + 3][figure] = colour or grid[r, c]
        return np.where(grid, grid, out[1:-1, 1:-1]).astype(np.int8)
    return Rule("stamp", some_things(n=(1, 3), kind="rectangle", most=1, gap=2), apply, least=4)


@family
def rows_from_keys(rng: Random) -> Rule:
    """The first cell of a row says what becomes of the row."""
    k, what = int(rng.integers(4)), one_of(rng, ["fill", "colour what is there", "every other", "last cell"])

    def apply(grid: Grid) -> Grid:
        grid = np.rot90(grid, k)
        out = grid.copy()
        for row, new in zip(grid, out, strict=True):
            if row[0]:
                at = {"fill": row >= 0, "colour what is there": row != 0, "every other": np.arange(len(row)) % 2 == 0,
                      "last cell": np.arange(len(row)) == len(row) - 1}[what]
                new[at] = row[0]
        return np.rot90(out, -k)

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        height, width = (width, height) if k % 2 else (height, width)
        grid = np.zeros((height, width), np.int8)
        if what == "colour what is there":
            grid[:] = np.where(rng.random((height, width)) < 0.5, colours[0], 0)
        grid[:, 0] = np.where(rng.random(height) < 0.5, drawn_from(rng, colours, height), 0)
        return np.rot90(grid, -k)
    return Rule(f"rows from keys {k}: {what}", draw, apply)


@family
def colour_lines(rng: Random) -> Rule:
    """Whole rows get one colour, whole columns another."""
    a, b = colours_of(rng, 2)

    def apply(grid: Grid) -> Grid:
        rows, columns = (grid != 0).all(1), (grid != 0).all(0)
        need(rows.any() or columns.any())
        out = grid.copy()
        out[rows], out[:, columns] = a, b
        return out
    return Rule("colour lines", lines, apply)


# ---- Families: parts of a grid that belong together

@family
def combine_halves(rng: Random) -> Rule:
    """Two halves, with a line between them or without, are laid over each other."""
    how = one_of(rng, ["and", "or", "one of both", "neither", "first alone", "not both", "first on top",
                       "second on top"])
    [colour], (a, b, line) = colours_of(rng, 1), colours_of(rng, 3)
    b, upright, separate = (a if rng.random() < 0.3 else b), rng.random() < 0.5, rng.random() < 0.6

    def apply(grid: Grid) -> Grid:
        grid = grid.T if upright else grid
        n = (grid.shape[1] - separate) // 2
        x, y = grid[:, :n], grid[:, n + separate:2 * n + separate]
        p, q = x != 0, y != 0
        if how.endswith("top"):
            out = np.where(p, x, y) if how.startswith("first") else np.where(q, y, x)
        else:
            out = np.where({"and": p & q, "or": p | q, "one of both": p ^ q, "neither": ~(p | q), "first alone": p & ~q,
                            "not both": ~(p & q)}[how], colour, 0)
        return (out.T if upright else out).astype(np.int8)

    def draw(rng: Random, height: int, width: int, _: np.ndarray) -> Grid:
        height, width = (width, height) if upright else (height, width)
        n, density = max(1, (width - separate) // 2), rng.uniform(0.3, 0.7)
        x, y = (np.where(rng.random((height, n)) < density, c, 0) for c in (a, b))
        grid = np.concatenate([x, *[np.full((height, 1), line)] * separate, y], 1).astype(np.int8)
        return grid.T if upright else grid
    return Rule(f"halves: {how}", draw, apply, least=4, same_size=rng.random() < 0.7)


@family
def choose_a_cell(rng: Random) -> Rule:
    """A grid of cells with lines between them: the fullest cell, where it is, or which are not empty."""
    n, what = int(rng.integers(2, 4)), one_of(rng, ["the fullest", "where the fullest is", "which are not empty"])
    colour, line = colours_of(rng, 2)

    def cells(grid: Grid) -> list[list[Grid]]:
        size = (len(grid) - n + 1) // n
        return [[grid[r * (size + 1):, c * (size + 1):][:size, :size] for c in range(n)] for r in range(n)]

    def apply(grid: Grid) -> Grid:
        parts = cells(grid)
        filled = np.array([[(part != 0).sum() for part in row] for row in parts])
        if what == "which are not empty":
            return np.where(filled, colour, 0).astype(np.int8)
        most = filled == filled.max()
        need(most.sum() == 1)
        r, c = np.argwhere(most)[0]
        return parts[r][c] if what == "the fullest" else np.where(most, colour, 0).astype(np.int8)

    def draw(rng: Random, height: int, width: int, colours: np.ndarray) -> Grid:
        size = (min(height, width) - n + 1) // n
        need(size > 0)
        grid = np.full((n * (size + 1) - 1,) * 2, line, np.int8)
        for row in cells(grid):
            for part in row:
                part[:] = noise(rng, size, size, colours[:1], rng.uniform(0, 0.9) * (rng.random() < 0.7))
        return grid
    least = 3 * n - 1 if what == "the fullest" else 2 * n - 1
    return Rule(f"{n} x {n} cells: {what}", draw, apply, least=least, square=True)


# ---- Tasks

HELD_OUT = ("colour_by_rank", "combine_halves", "gravity", "keep_part", "parts_of_rectangles", "rays")  # by lot, seed 0


def make_task(seed: Sequence[int], side: int = 10, n_pairs: int = PAIRS, families: Collection[str] = ()) -> Task:
    """A task with grids of up to `side`, the last pair its test; its id names the rules.

    families: those that may be drawn (default: all but those of HELD_OUT). Raises UserError: none fits so small grids.
    """
    rng = np.random.default_rng(seed)
    names = sorted(families or set(FAMILIES) - set(HELD_OUT))
    behind = [name for name in CHANGES if name in names]
    for _ in range(1000):
        first = one_of(rng, names)
        u = rng.random()
        chosen = [first, *(one_of(rng, behind) for _ in range((u < SECOND) + (u < THIRD)))] if behind else [first]
        try:
            rules = [FAMILIES[name](rng) for name in chosen]
            pairs = make_pairs(rng, rules, side, n_pairs)
        except (Unfit, IndexError, ValueError):  # too small for the rule, as a half of one column
            continue
        name = " + ".join(f"{name} ({rule.name})" for name, rule in zip(chosen, rules, strict=True))
        return Task(name, tuple(pairs), n_pairs - 1)
    raise UserError(f"no task with grids of up to {side} x {side} shows {', '.join(names):.80}: larger ones may")


def make_pairs(rng: Random, rules: Sequence[Rule], side: int, n: int) -> list[Pair]:
    """n pairs that show what the rules do. Raises Unfit when they do not."""
    rule = rules[0]
    most = min(side, max(rule.least, rule.most(side)))
    if rng.random() < 0.5:
        most = int(rng.integers(rule.least, most + 1))
    same, square = rule.same_size or rng.random() < 0.4, rule.square or rng.random() < 0.3
    colours = np.array(rule.colours or colours_of(rng, int(rng.integers(1, 5))))
    size, pairs, seen, idle = None, [], set(), np.zeros(len(rules), int)
    for tries in range(TRIES * n):
        if size is None or not same:
            size = rng.integers(rule.least, most + 1, 2).tolist()
            size = [min(size)] * 2 if square else size
        try:
            given = steps = rule.draw(rng, *size, colours)
            for k, one in enumerate(rules):
                before, steps = steps, one.apply(steps)
                idle[k] += before.shape == steps.shape and (before == steps).all()
        except (Unfit, IndexError, ValueError):
            continue
        key = arc_tasks.as_key(given)
        unlike = steps.shape != given.shape or (steps != given).any()
        if key in seen or not given.any() or not unlike or max(given.shape + steps.shape) > side or not steps.size:
            continue
        seen.add(key)
        pairs.append((np.ascontiguousarray(given, np.int8), np.ascontiguousarray(steps, np.int8)))
        if len(pairs) == n:
            for _ in pairs:  # whichever may be asked
                with suppress(Unfit):
                    check_pairs(pairs, idle)
                    return pairs
                pairs = [pairs[-1], *pairs[:-1]]
            break
        if tries >= n and tries > 4 * len(pairs):
            break
    raise Unfit


def check_pairs(pairs: Sequence[Pair], idle: np.ndarray) -> None:
    """Raise Unfit where demonstrations cannot tell the rule: a step that does nothing in most of them, outputs that are
    alike or empty, colours that the test alone has, a size that stays in all of them but the test's."""
    demos, (given, asked) = pairs[:-1], pairs[-1]
    outputs = {arc_tasks.as_key(y) for _, y in pairs}
    need(idle.max() <= len(pairs) // 2 and len(outputs) >= min(3, len(pairs)) - (asked.size <= 3))
    need(sum(not y.any() for _, y in pairs) <= 1)
    shown_in, shown_out = ({*np.concatenate([pair[i].ravel() for pair in demos]).tolist()} for i in (0, 1))
    need({*given.ravel().tolist()} <= shown_in and {*asked.ravel().tolist()} <= shown_out | {*given.ravel().tolist()})
    if all(x.shape == y.shape for x, y in demos):
        need(given.shape == asked.shape)


# ---- Generators of ARC's training tasks

@cache
def re_arc() -> dict[str, Callable]:
    """The generators of re-arc (Hodel 2024, arXiv:2404.07353), one for each of ARC's training tasks, by its id.

    Raises UserError when reasoning-gym, which carries them, is missing.
    """
    try:
        from reasoning_gym.arc.rearc_utils import generators
        from reasoning_gym.arc.rearc_utils.utils import get_generators
    except ImportError:
        raise UserError("re-arc's generators come with reasoning-gym, which is missing: pip install -e '.[arc]'") from None
    return dict(sorted(get_generators(generators).items()))


class Colours(random.Random):
    """What re-arc's generators draw with. They take any colours for each pair; here the first colour of a pair, mostly
    its background, is 0, and its colours are those of the other pairs, as in most tasks of ARC."""

    def next_pair(self, colours: int, ground: bool) -> None:
        """Begin a pair: with the same seed of its colours, it has those of another one."""
        self.colours, self.ground = random.Random(colours), ground

    def sample(self, population, k, **more):
        population = list(population)
        if len(population) < 6 or not {8, 9} & set(population) <= set(range(10)):  # not colours
            return super().sample(population, k, **more)
        ground, self.ground = self.ground and 0 in population and k > 0, False
        if ground:
            population.remove(0)
        return [0] * ground + self.colours.sample(population, k - ground)

    def choice(self, population):
        return self.sample(population, 1)[0]


def re_arc_pair(name: str, draws: Colours, hardest: float, side: int) -> Pair:
    """A pair with grids of up to `side`. Raises Unfit."""
    try:
        found = re_arc()[name](draws, 0.0, hardest)
    except (IndexError, ValueError, TypeError):  # a generator may fail
        raise Unfit from None
    pair = tuple(np.array(found[part], np.int8) for part in ("input", "output"))
    need(arc_tasks.side(pair) <= side)
    return pair


@cache
def re_arc_names(side: int) -> list[str]:
    """The generators that make pairs with grids of up to `side` in three of eight tries or more."""
    def fits(name: str, k: int) -> bool:
        draws = Colours(f"{name} {k}")
        draws.next_pair(k, False)
        with suppress(Unfit):
            re_arc_pair(name, draws, 0.1, side)
            return True
        return False
    return [name for name in re_arc() if sum(fits(name, k) for k in range(8)) >= 3]


def re_arc_task(seed: Sequence[int], side: int = 10, n_pairs: int = PAIRS, without: Collection[str] = ()) -> Task:
    """A task like a training task of ARC, with grids of up to `side`, the last pair its test. Raises UserError.

    without: ids of training tasks that it may not be like.
    """
    rng = np.random.default_rng(seed)
    names, draws = [name for name in re_arc_names(side) if name not in without], Colours(str(tuple(seed)))
    for _ in range(1000 if names else 0):
        name, hardest, pairs, same = one_of(rng, names), rng.choice([0.0, 0.1, 0.2]), {}, int(rng.integers(1 << 32))
        ground, alike = rng.random(2) < (0.85, 0.7)
        for _ in range(TRIES * n_pairs):
            draws.next_pair(same if alike else draws.getrandbits(32), ground)
            with suppress(Unfit):
                pair = re_arc_pair(name, draws, hardest, side)
                pairs.setdefault(arc_tasks.as_key(pair[0]), pair)
            if len(pairs) == n_pairs:
                return Task(f"re-arc {name}", tuple(pairs.values()), n_pairs - 1)
    raise UserError(f"no generator of re-arc makes a task with grids of up to {side} x {side}")


def draw_sheet(tasks: Sequence[Task], out: Path) -> Path:
    """A row for each task, behind its rules' names."""
    return arc_tasks.draw_grids([[(np.zeros((1, 1), np.int8), task.id.replace(" + ", "\n+ ")), *(
        (grid, f"{name} {i + 1}") for i, pair in enumerate(task.pairs)
        for grid, name in zip(pair, ("in", "out"), strict=True))] for task in tasks], out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(prog="common.arc_rules", usage="python -m common.arc_rules [flags]", description=__doc__)
    p.add_argument("--draw", type=integer(1, 200), default=24, help="so many tasks (default: 24)")
    p.add_argument("--family", choices=[*sorted(FAMILIES), "re-arc"], help="of this family alone, not composed; re-arc: of "
                   "the generators of ARC's training tasks (extra arc)")
    p.add_argument("--side", type=integer(4, arc_tasks.LARGEST), default=10, help="of the largest grid (default: 10)")
    p.add_argument("--seed", type=integer(0), default=0)
    p.add_argument("--out", type=path, default="sheet.png", help="the picture (default: sheet.png)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    with one_line_errors("common.arc_rules"):
        check_output(args.out)
        tasks = [re_arc_task([args.seed, i], args.side) if args.family == "re-arc" else
                 make_task([args.seed, i], args.side, families=[args.family] if args.family else ())
                 for i in range(args.draw)]
        print(draw_sheet(tasks, Path(args.out)))
        return Path(args.out)


if __name__ == "__main__":
    main()
