"""common/arc_rules.py: what is seen in a grid, every family, tasks that show their rule."""
from __future__ import annotations

import numpy as np
import pytest

from common import arc_rules as rules
from common import arc_tasks


def grid(text: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in text.split()], np.int8)


def test_what_is_seen_in_a_grid():
    g = grid("1100 0020 0302 0000")
    assert sorted(len(cells[0]) for cells in rules.objects(g)) == [1, 2, 2]
    assert sorted(len(cells[0]) for cells in rules.objects(g, one_colour=False)) == [5]
    assert sorted(len(cells[0]) for cells in rules.objects(g, diagonal=False)) == [1, 1, 1, 2]
    assert rules.content(g) == (slice(0, 3), slice(0, 4)) and rules.counts(g) == [(2, 2), (2, 1), (1, 3)]
    ring = grid("1110 1010 1110")
    assert rules.holes(ring).astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert not rules.holes(grid("111 101 101")).any() and not rules.holes(grid("0110 1001 0110"))[0].any()
    assert rules.holes(grid("0110 1001 0110")).sum() == 2
    assert rules.inside(np.ones((3, 4), bool)).sum() == 2
    assert rules.around(grid("000 010 000") > 0, False).sum() == 5 and rules.around(grid("000 010 000") > 0, True).all()


@pytest.mark.parametrize("name, given, expected", [
    ("gravity", "10 02 00", {"00 00 12", "12 00 00", "10 20 00", "01 02 00"}),
    ("drop_repeats", "112 112 330", {"12 30"}),
    ("invert", "50 05", {"0x x0"}),
    ("fill_holes", "111 101 111", {"111 1x1 111", "000 0x0 000"}),
    ("crop", "000 012 000", {"12"}),
    ("colour_lines", "010 222 010", {"0y0 xyx 0y0"}),
    ("flood_outside", "00000 01110 01010 01110 00000", {"xxxxx x111x x101x x111x xxxxx"}),
    ("mirror_each_object", "1200 0000 0034", {"2100 0000 0043", "1200 0000 0034"}),
    ("objects_fall", "010 011 200 000", {"000 010 011 200", "000 000 010 211", "010 211 000 000", "100 110 200 000", "001 011 002 000"}),
])
def test_a_family_does_what_its_name_says(name, given, expected):
    found = set()
    for i in range(60):
        try:
            out = rules.FAMILIES[name](np.random.default_rng(i)).apply(grid(given))
        except rules.Unfit:
            continue
        new = [c for c in np.unique(out) if c not in grid(given)]  # colours that the rule has chosen
        text = " ".join("".join(str(c) for c in row) for row in out.tolist())
        found |= {text} | {text.replace(str(new[k]), "x").replace(str(new[1 - k]), "y") if len(new) == 2 else
                           text.replace(str(new[0]), "x") for k in range(len(new))}
    assert expected & found and (name not in ("gravity", "drop_repeats", "crop") or found == expected)


@pytest.mark.parametrize("name", sorted(rules.FAMILIES))
def test_every_family_makes_tasks_that_its_rule_explains(name):
    for i in range(5):
        rng = np.random.default_rng([1, i])
        for _ in range(200):
            try:
                rule = rules.FAMILIES[name](rng)
                pairs = rules.make_pairs(rng, [rule], 10, 4)
                break
            except (rules.Unfit, IndexError, ValueError):
                continue
        for x, y in pairs:
            np.testing.assert_array_equal(rule.apply(x), y)
            assert x.dtype == y.dtype == np.int8 and max(x.shape + y.shape) <= 10 and 0 <= min(x.min(), y.min())
        assert len({arc_tasks.as_key(x) for x, _ in pairs}) == 4


def test_a_task_is_a_function_of_its_seed_and_can_be_read_back():
    a, b = (rules.make_task([3, 7], side=8) for _ in range(2))
    assert a.id == b.id and arc_tasks.fingerprint([a]) == arc_tasks.fingerprint([b])
    assert a.id != rules.make_task([3, 8], side=8).id and len(a.pairs) == a.n_demos + 1 == 4
    value = {"train": [{"input": x.tolist(), "output": y.tolist()} for x, y in a.pairs[:3]],
             "test": [{"input": x.tolist(), "output": y.tolist()} for x, y in a.pairs[3:]]}
    assert arc_tasks.as_task("task", value, "task").pairs[0][0].tolist() == a.pairs[0][0].tolist()


def test_held_out_families_are_not_drawn_unless_they_are_asked_for():
    assert set(rules.HELD_OUT) < set(rules.FAMILIES)
    for i in range(150):
        used = {part.split(" (")[0] for part in rules.make_task([5, i]).id.split(" + ")}
        assert not used & set(rules.HELD_OUT), used
    assert all(rules.make_task([5, i], families=rules.HELD_OUT).id.split(" (")[0] in rules.HELD_OUT for i in range(20))


def test_what_the_demonstrations_cannot_tell_is_refused():
    good = [(grid("12"), grid("21")), (grid("21"), grid("12")), (grid("11 22"), grid("11 22")), (grid("22 12"), grid("22 21"))]
    rules.check_pairs(good, np.array([1]))
    for bad in ([*good[:3], (grid("13"), grid("31"))],              # a colour that no demonstration has
                [*good[:3], (grid("12 21"), grid("2 1"))],          # a size that changes in the test alone
                [(x, grid("1 1")) for x, _ in good]):               # outputs that are all alike
        with pytest.raises(rules.Unfit):
            rules.check_pairs(bad, np.array([0]))
    with pytest.raises(rules.Unfit):
        rules.check_pairs(good, np.array([0, 3]))  # a second rule that does nothing


def test_a_sheet_is_drawn(tmp_path, capsys):
    rules.main(["--draw", "3", "--family", "gravity", "--side", "6", "--out", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 5_000
    with pytest.raises(SystemExit, match="its folder does not exist"):
        rules.main(["--out", str(tmp_path / "no" / "sheet.png")])
    with pytest.raises(SystemExit, match="no task with grids of up to 4 x 4 shows odd_one_out"):
        rules.main(["--side", "4", "--family", "odd_one_out", "--out", str(tmp_path / "sheet.png")])
