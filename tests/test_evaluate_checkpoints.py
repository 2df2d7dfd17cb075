"""evaluate_checkpoints.py: tables of addition models, other experiments, bad checkpoints among good ones."""
import importlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_addition import numbers
from test_addition_use import LOGS, learned, published, rotary, sums_of, tamper  # noqa: F401, fixtures

import addition_train as A
import collatz
import evaluate_checkpoints as E
from common.files import UserError

ROOT = Path(__file__).parents[1]
COLLATZ = str(LOGS / "collatz" / "window10-s0")
FEW = ["--n", "100", "--split-seeds", "41,100", "--device", "cpu"]


# ---- tables of an addition model

def carries(a, b):
    """Whether column i carries into column i + 1: digits (n, 10) twice -> (n, 10) of 0 and 1."""
    into = (A.digit_sum(a, b)[:, :-1] - a - b) % 10
    return np.concatenate([into[:, 1:], A.digit_sum(a, b)[:, -1:]], 1)


@pytest.mark.parametrize("length", range(11))
def test_chained_pairs_have_exactly_that_chain_and_are_distributed_as_by_rejection(length):
    direct = E.chained_pairs([6, length], 30_000, length)
    rows = ["".join(map(str, row)) for row in carries(*direct)[:3000]]
    assert {max(map(len, row.split("0"))) for row in rows} == {length}
    assert all(x.shape == (30_000, 10) and x.min() == 0 and x.max() == 9 for x in direct)
    a, b = A.uniform_pairs([5, length], 200_000)
    kept = E.longest_chain(carries(a, b)) == length

    def events(a, b):  # each digit of a and b in each column, each column's carry, two in a row
        shown = [(x[..., None] == np.arange(10)).reshape(len(x), -1) for x in (a, b)]
        c = carries(a, b)
        return np.concatenate([*shown, c, c[:, 1:] * c[:, :-1]], 1)
    x, y = events(a[kept], b[kept]), events(*direct)
    p = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
    sigma = np.sqrt(p * (1 - p) * (1 / len(x) + 1 / len(y))) + 1e-9
    assert (np.abs(x.mean(0) - y.mean(0)) / sigma).max() < (4.7 if len(x) > 5000 else 7)  # of 219


@pytest.mark.parametrize("lengths", [(1, 1), (1, 10), (4, 7), (10, 2)])
def test_pairs_of_lengths_have_these_lengths_and_are_uniform(lengths):
    for x, n in zip(E.pairs_of_lengths([0, *lengths], 5000, *lengths), lengths, strict=True):
        x, least = numbers(x), 0 if n == 1 else 10 ** (n - 1)
        assert (x >= least).all() and (x < 10**n).all()
        assert abs((x - least).mean() / (10**n - least) - (0.5 if n > 1 else 0.45)) < 0.02
        assert len(set((x // 10 ** (n - 1)).tolist())) == (9 if n > 1 else 10)


def test_figures_are_those_of_the_script_and_tables_the_counts_of_their_pairs(rotary):  # noqa: F811
    args = E.parse_args([*FEW, "--n", "150", "x"])
    (out, text), (module, _) = E.evaluate(str(rotary), args), A.load_model(rotary)
    want = A.evaluate_checkpoint(rotary, args)
    timing = ("cpu_seconds", "additions_per_cpu_second")
    assert all(out[key] == want[key] for key in want if key not in timing)

    def count(pairs):
        return [int(sums_of(module, pairs).sum()), len(pairs[0])]
    stream = E.TABLES
    assert out["by_digits"] == {str(k): count(A.uniform_pairs([stream, 0, k], 15, k)) for k in range(1, 11)}
    assert out["by_chain"] == {str(k): count(E.chained_pairs([stream, 3, k], 15, k)) for k in range(11)}
    assert out["by_lengths"] == [[count(E.pairs_of_lengths([stream, 2, i, j], 3, i, j)) for j in range(1, 11)]
                                 for i in range(1, 11)]
    add = A.load(rotary)
    assert out["edge_cases"] == [sum(add(a, b) == a + b for a, b in E.EDGE_CASES), len(E.EDGE_CASES)]
    assert 0 < out["edge_cases"][0] < len(E.EDGE_CASES)
    ar, _ = E.evaluate(str(rotary), E.parse_args([*FEW, "--n", "150", "--mode", "ar", "x"]))
    for key in ("exact", "splits", "failures", "by_digits", "by_chain", "by_lengths", "edge_cases"):
        assert ar[key] == out[key], key                                      # greedy decoding
    for title, cells in (("longest carry chain, 0..10", out["by_chain"].values()),
                         ("a of 10 digits, b of 1..10", out["by_lengths"][9])):
        shown = text.split(title)[1].split("(n")[0].split()
        assert [float(x) for x in shown] == pytest.approx([100 * k / n for k, n in cells], abs=0.006)


def test_pairs_of_training_validation_test_splits_and_tables_are_different_ones():
    args = E.parse_args(["x"])
    assert args.split_seeds == [41, 100, 200, 300, 400, 500, 999, 1234, 7777, 31415]
    assert (args.n, args.mode) == (10_000, "tf")
    tables = [A.uniform_pairs([E.TABLES, 0, 10], 2000), E.chained_pairs([E.TABLES, 3, 3], 2000, 3),
              E.pairs_of_lengths([E.TABLES, 2, 10, 10], 2000, 10, 10)]
    others = [A.uniform_pairs([A.VALIDATION], 2000), A.uniform_pairs([A.TEST], 2000), A.split_pairs(41, 2000)]
    full, steps = A.parse_args(["--lengths", "full"]), np.arange(A.CHUNK)
    drawn = [A.sample_pairs([seed, A.TRAIN, 0], steps, 128, full).reshape(-1, 2, 10) for seed in range(8)]
    drawn.append(A.sample_pairs([A.TRAINED], steps[:1], 2000, full)[0])
    others += [(x[:, 0], x[:, 1]) for x in drawn]
    sets = [{row.tobytes() for row in np.concatenate(pair, 1)} for pair in tables + others]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 7 * 2000 + 8 * A.CHUNK * 128


# ---- any checkpoint

def test_a_collatz_checkpoint_goes_to_its_own_script(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluate_checkpoint(path, args):
        asked.append((path, args.device))
        return {"script": "collatz.py", "pass_rate": 0.5, "margin": math.nan}
    monkeypatch.setattr(collatz, "evaluate_checkpoint", evaluate_checkpoint)
    monkeypatch.setattr(collatz, "format_evaluation", lambda out: f"half: {out['pass_rate']}")
    E.main([COLLATZ, "--device", "cpu", "--output", str(tmp_path / "out.json")])
    assert asked == [(COLLATZ, "cpu")]
    assert "half: 0.5" in capsys.readouterr().out
    out = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    assert out[COLLATZ] == {"script": "collatz.py", "pass_rate": 0.5, "margin": None}


def test_one_bad_checkpoint_does_not_stop_the_others(rotary, published, tmp_path, capsys):  # noqa: F811
    bad = [tmp_path / "cut.pt", tmp_path / "missing.pt",
           tamper(rotary, tmp_path / "foreign.pt", script="x.py"),
           tamper(rotary, tmp_path / "shape.pt", model={"wq": torch.ones(2)}),
           tamper(rotary, tmp_path / "odd.pt", seed=torch.ones(2))]
    bad[0].write_bytes(rotary.read_bytes()[:1000])
    with pytest.raises(SystemExit) as e:
        E.main([*map(str, bad), str(rotary), str(published), *FEW, "--output", str(tmp_path / "out.json")])
    said = capsys.readouterr()
    out = json.loads((tmp_path / "out.json").read_text())
    assert e.value.code == 1 and out.keys() >= {"command", "commit"}
    out = out["checkpoints"]
    for path in bad:
        assert path.name in out[str(path)]["error"] and out[str(path)]["error"] in said.err
    assert said.err.count("\n") == said.err.count("evaluate_checkpoints.py: error: ") == len(bad)
    assert out[str(rotary)]["exact"][1] == 200 and out[str(rotary)]["by_chain"]["3"][1] == 10
    assert (out[str(published)]["n_params"], out[str(published)]["step"]) == (456, 34_000)


@pytest.mark.parametrize("flags, named", [
    ("", "CKPT"), ("--n 0 CKPT", "--n"), ("--split-seeds 41,41 CKPT", "twice"), ("--mode beam CKPT", "beam"),
    ("--device gpu CKPT", "--device gpu"), ("--output / CKPT", "/: is a folder"),
    ("--output nowhere/out.json CKPT", "nowhere")])
def test_bad_flags_end_in_one_line_before_any_work(tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(E, "evaluate", None)
    with pytest.raises(SystemExit) as e:
        E.main(flags.split())
    message = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert e.value.code not in (0, None) and "error: " in message and named in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["addition_train", "collatz"])
def test_a_copy_of_a_script_is_named_by_its_file_and_evaluated_by_its_own_code(tmp_path, monkeypatch, name):
    copy = shutil.copy(ROOT / f"{name}.py", tmp_path / f"copied_{name}.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(E, "__file__", str(tmp_path / "evaluate_checkpoints.py"))
    torch.save({"script": f"copied_{name}.py"}, tmp_path / "a.pt")
    module = E.script_of(str(tmp_path / "a.pt"))
    assert module.__file__ == str(copy) and module.SCRIPT == f"copied_{name}.py"
    for other in ("gone.py", "../collatz.py", "evaluate_checkpoints.py", 5):
        torch.save({"script": other}, tmp_path / "b.pt")
        with pytest.raises(UserError, match="no script of this folder"):
            E.script_of(str(tmp_path / "b.pt"))


@pytest.mark.parametrize("name, kept", [("addition_train", "rope196"), ("collatz", "window10-s0"),
                                        ("self_improve", "compare-s10-off"), ("etrm_pretrain", "default-s0")])
def test_a_copy_of_a_script_takes_models_of_the_script_that_was_copied_and_of_no_other(monkeypatch, name, kept):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "SCRIPT", "mine.py")
    assert module.load(str(LOGS / name / kept))
    other = f"{'self_improve/compare-s10-off' if name == 'collatz' else 'collatz/window10-s0'}/best.pt"
    with pytest.raises(UserError, match="not of 'mine.py'"):
        module.load(str(LOGS / other))
