"""common/repeat.py: several seeds of one command and their statistics."""
from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from common import repeat
from common.repeat import STUDENT_T, flatten, statistics_of, table

ROOT = Path(__file__).parents[1]
FAKE = """
import argparse, json, pathlib, sys
p = argparse.ArgumentParser()
p.add_argument("--seed", type=int)
p.add_argument("--out-dir", type=pathlib.Path)
p.add_argument("--scale", type=float, default=1.0)
p.add_argument("--fail-at", type=int, default=-1)
p.add_argument("--silent", action="store_true")
p.add_argument("--words", nargs="*")
p.add_argument("--out")
p.add_argument("--na")
args = p.parse_args()
if args.seed == args.fail_at:
    sys.exit(3)
args.out_dir.mkdir(parents=True)
(args.out_dir / "argv.json").write_text(json.dumps(sys.argv[1:]))
summary = {"script": "fake.py", "seed": args.seed, "score": args.scale * args.seed,
           "test": {"n": 10, "deep": {"x": args.seed ** 2}}}
if not args.silent:
    (args.out_dir / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    return "fake.py"


# ---- statistics

def test_the_statistics_of_hand_made_samples():
    assert statistics_of([1, 2, 3]) == pytest.approx(
        {"mean": 2, "sd": 1, "half": 4.303 / math.sqrt(3), "min": 1, "max": 3})
    assert statistics_of([2.0, 0.0]) == pytest.approx(
        {"mean": 1, "sd": math.sqrt(2), "half": 12.706, "min": 0, "max": 2})
    assert statistics_of([5, 5, 5, 5]) == {"mean": 5, "sd": 0, "half": 0, "min": 5, "max": 5}
    # 2, 4, 4, 4, 5, 5, 7, 9: squares of deviations sum to 32, sd = sqrt(32 / 7), t(7) = 2.365
    assert statistics_of([2, 4, 4, 4, 5, 5, 7, 9]) == pytest.approx(
        {"mean": 5, "sd": 2.138090, "half": 2.365 * 2.138090 / math.sqrt(8), "min": 2, "max": 9}, rel=1e-6)


def test_one_value_has_a_mean_but_no_spread():
    s = statistics_of([7])
    assert (s["mean"], s["min"], s["max"]) == (7, 7, 7) and math.isnan(s["sd"]) and math.isnan(s["half"])


@pytest.mark.parametrize("n, t", [(31, 2.042), (32, 1.96), (101, 1.96)])
def test_the_quantile_of_student_ends_at_thirty_degrees_of_freedom(n, t):
    s = statistics_of(list(range(n)))
    assert s["half"] == pytest.approx(t * s["sd"] / math.sqrt(n))


def test_the_table_of_student_holds_its_97_5_percent_quantiles():
    def mass(t: float, df: int, steps: int = 2000) -> float:
        """P(0 < T < t) by Simpson's rule, with T = sqrt(df) tan(a): the density becomes cos(a)^(df-1)."""
        end = math.atan(t / math.sqrt(df))
        y = [math.cos(end * i / steps) ** (df - 1) for i in range(steps + 1)]
        area = end / steps / 3 * (y[0] + y[-1] + 4 * sum(y[1:-1:2]) + 2 * sum(y[2:-1:2]))
        return area * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    assert len(STUDENT_T) == 30
    for df, t in enumerate(STUDENT_T, start=1):
        assert mass(t - 0.00051, df) < 0.475 < mass(t + 0.00051, df)


# ---- table

def test_flatten_joins_nested_keys_and_leaves_out_what_is_no_number():
    summary = {"a": 1, "b": {"c": 2.5, "d": {"e": 0}, "text": "x"}, "yes": True, "none": None, "list": [1],
               "empty": {}}
    assert flatten(summary) == {"a": 1, "b.c": 2.5, "b.d.e": 0}


def test_the_table_has_a_line_for_each_figure_that_every_summary_has():
    lines = table([{"seed": 0, "name": "a", "acc": 1, "test": {"x": 0.5}, "only_here": 1},
                   {"seed": 1, "acc": 2, "test": {"x": 0.5}},
                   {"seed": 2, "acc": 3, "test": {"x": 0.5}, "also": 1}]).splitlines()
    assert "(n = 3)" in lines[0]
    assert [line.split() for line in lines[1:]] == [["acc", "2", "1", "-0.484338", "-", "4.48434", "1", "-", "3"],
                                                    ["test.x", "0.5", "0", "0.5", "-", "0.5", "0.5", "-", "0.5"]]


def test_the_table_of_one_seed_has_no_interval():
    assert table([{"acc": 0.25}]).splitlines()[1].split() == ["acc", "0.25", "nan", "-", "0.25", "-", "0.25"]


# ---- runs

def test_main_runs_the_seeds_and_prints_the_table(fake, capsys):
    summaries = repeat.main(["3", fake, "--scale", "2", "--out-dir", "out/r"])
    assert [s["seed"] for s in summaries] == [0, 1, 2] and [s["score"] for s in summaries] == [0, 2, 4]
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("#")] == [f"# seed {s}: out/r-s{s}" for s in range(3)]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line and line[0] != "#"}
    assert rows["score"][:2] == ["2", "2"] and rows["test.n"][:2] == ["10", "0"]
    assert rows["test.deep.x"][0] == "1.66667"
    assert "seed" not in rows and "script" not in rows
    assert sorted(p.name for p in Path("out").iterdir()) == ["r-s0", "r-s1", "r-s2"]


def test_the_flags_reach_the_script_in_their_order(fake):
    flags = ["--words", "b", "a", "c d", "--scale=-1.5", "--fail-at", "-2", "--out", "x",
             "--na", "y"]  # the last two are no abbreviations
    repeat.main(["1", fake, *flags, "--out-dir", "r", "--seed", "4"])
    assert json.loads(Path("r-s4/argv.json").read_text()) == [*flags, "--seed", "4", "--out-dir", "r-s4"]


def test_seeds_start_where_seed_says_and_the_folder_is_logs_script_name(fake):
    assert [s["seed"] for s in repeat.main(["2", fake, "--seed", "5", "--name", "n"])] == [5, 6]
    assert sorted(map(str, Path("logs").glob("*/*"))) == ["logs/fake/n-s5", "logs/fake/n-s6"]


def test_without_a_name_the_folder_carries_the_time(fake, monkeypatch):
    monkeypatch.setattr(repeat.time, "strftime", lambda form: "20250102-030405")
    repeat.main(["1", fake])
    assert Path("logs/fake/20250102-030405-s0/summary.json").is_file()


def test_a_seed_that_fails_ends_the_command_with_one_line(fake):
    with pytest.raises(SystemExit) as e:
        repeat.main(["3", fake, "--fail-at", "1", "--out-dir", "r"])
    assert e.value.code == "common.repeat: error: seed 1 ended with exit code 3; 1 seeds had finished"
    assert Path("r-s0").is_dir() and not Path("r-s2").exists()


def test_a_script_that_leaves_no_summary_ends_the_command_with_one_line(fake):
    with pytest.raises(SystemExit, match=r"^common.repeat: error: r-s0/summary.json: no such file[^\n]*$"):
        repeat.main(["2", fake, "--silent", "--out-dir", "r"])


def test_a_summary_that_is_no_object_ends_the_command_with_one_line(fake):
    Path(fake).write_text(FAKE.replace("summary = {", "summary = 3, {"))
    with pytest.raises(SystemExit, match=r"^common.repeat: error: r-s0/summary.json: not [^\n]*$"):
        repeat.main(["1", fake, "--out-dir", "r"])


def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "common.repeat", "1", "gone.py"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "common.repeat: error: gone.py: no such script\n")


def test_a_missing_script_ends_the_command_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^common.repeat: error: [^\n]*gone.py: no such script$"):
        repeat.main(["2", str(tmp_path / "gone.py")])


@pytest.mark.parametrize("argv", [
    [], ["3"], ["0", "x.py"], ["-1", "x.py"], ["x.py", "3"], ["2", "x.py", "--seed", "-1"]])
def test_a_command_line_that_makes_no_sense_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        repeat.main(argv)
    assert e.value.code == 2 and "error:" in capsys.readouterr().err
