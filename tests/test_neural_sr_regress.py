"""neural_sr.py --mode regress: tables as people have them, the front, the files, and what is refused."""
import csv
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

import evaluate_checkpoints
import neural_sr as sr
from common.files import UserError


@pytest.fixture
def write(tmp_path):
    def write(text, name="data.csv", coding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(coding) if isinstance(text, str) else text)
        return str(tmp_path / name)
    return write


def lines(header, rows, delimiter=","):
    return "\n".join([*([header] if header else []), *(delimiter.join(map(str, row)) for row in rows)]) + "\n"


def regress(file, out, *flags):
    return sr.main(["--mode", "regress", "--data", file, "--out-dir", str(out), "--evaluations", "20000", *flags])


def front_of(folder):
    return list(csv.DictReader(open(Path(folder) / "front.csv", encoding="utf-8")))


# ---- Tables

TABLES = {
    "tabs, thousands": ("a\tb\n1,200.50\t3\n15.25\t4\n7\t5\n", [[1200.5, 3], [15.25, 4], [7, 5]]),
    "semicolons, comma": ("a;b\n1.200,5;3\n15,25;4\n7;5\n", [[1200.5, 3], [15.25, 4], [7, 5]]),
    "semicolons, comma, three digits alone": ("a;b\n1,500;0,250\n2,250;4,125\n3,125;5,500\n", [[1.5, .25], [2.25, 4.125], [3.125, 5.5]]),
    "spaces, comma": ("a  b\n1,5  3,25\n 2,5 4\n3,5   5\n", [[1.5, 3.25], [2.5, 4], [3.5, 5]]),
    "quoted thousands": ('"a","b"\n"1,200","3"\n"15","4,000"\n"7","5"\n', [[1200, 3], [15, 4000], [7, 5]]),
    "comments, blank lines": ("# made by hand\n\na,b\n1,2\n\n# more\n3,4\n5,6\n", [[1, 2], [3, 4], [5, 6]]),
    "names in a comment": ("# a b\n1 2\n3 4\n5 6\n", [[1, 2], [3, 4], [5, 6]]),
    "units in a row of their own": ("a,b\ns,m\n1,2\n3,4\n5,6\n", [[1, 2], [3, 4], [5, 6]]),
    "exponents": ("a,b\n1e3,2E-2\n-3.5d1,4\n+5,.5\n", [[1000, .02], [-35, 4], [5, .5]]),
    "bars": ("a|b\n1|2\n3|4\n5|6\n", [[1, 2], [3, 4], [5, 6]]),
    "Markdown": ("| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | |\n", [[1, 2], [3, 4], [5, np.nan]]),
    "a footer": ("a,b,c\n1,2,x\n3,4,y\n5,6,z\n9,12,Total\n", [[1, 2], [3, 4], [5, 6]]),
    "a footer in place of a number": ("a,b\n1,2\n3,4\n5,6\nMean:,4\nstd,2\n", [[1, 2], [3, 4], [5, 6]]),
    "not a footer": ("a,b,c\n1,2,max\n3,4,min\n5,6,max\n", [[1, 2], [3, 4], [5, 6]]),
    "windows": ("a,b\r\n1,2\r\n3,4\r\n5,6\r\n", [[1, 2], [3, 4], [5, 6]]),
    "thin spaces": ("a;b\n1\u202f200;2\n3;4\n5;6\n", [[1200, 2], [3, 4], [5, 6]]),
}


@pytest.mark.parametrize("text, values", TABLES.values(), ids=TABLES)
def test_a_table_is_read_as_it_is(write, text, values):
    table = sr.read_table(write(text))
    assert [name[0] for name in table.names[:2]] == ["a", "b"]
    np.testing.assert_array_equal(np.stack([table.numbers(0), table.numbers(1)], 1), values)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "latin-1"])
def test_other_codings_are_read(write, coding):
    assert sr.read_table(write("Temperatur °C;y\n1,5;2\n2,5;3\n3;4\n", coding=coding)).names == ["Temperatur °C", "y"]


def test_without_a_header_no_row_is_lost(write):
    table = sr.read_table(write("1 2 3\n4 5 6\n7 8 9.5\n"))
    assert table.names == ["x0", "x1", "y"] and len(table.cells) == 3 and any("x0, x1, y" in note for note in table.notes)


def test_columns_and_rows_that_cannot_be_used_are_left_out_and_said(write):
    rows = [(i, f"2024-01-{i + 1:02d}", "text", 5, i * i % 7, "" if i == 3 else i % 5, 3 * (i * i % 7) + i % 5) for i in range(12)]
    rows.append(rows[5][:1] + rows[5][1:])
    rows[-1] = (12, *rows[5][1:])
    sample = sr.read_sample(write(lines("nr,date,what,same,a,b,y", rows)), sr.parse_args(["--mode", "regress"]))
    assert sample.names == ["a", "b"] and len(sample.y) == 12 and sample.lines[3] == 6
    told = " ".join(sample.notes)
    for word in ("'nr' is left out: it counts", "'date' is left out: dates", "'what' is left out: text", "'same' is left out", "line 5",
                 "1 of 13 rows", "rows are there twice", "target 'y'"):
        assert word in told, (word, told)


def test_the_only_feature_may_count_the_rows(write):
    assert sr.read_sample(write(lines("t,y", [(i, i * i) for i in range(9)])), sr.parse_args(["--mode", "regress"])).names == ["t"]


@pytest.mark.parametrize("cells, digit", [(["1.5", "2.25", "3"], 0.01), (["10", "200", "7"], 1), (["1.5e-3", "2e-3", "1e-2"], 1e-4)])
def test_the_last_digit_of_y_is_known(write, cells, digit):
    sample = sr.read_sample(write(lines("x,y", zip("136", cells, strict=True))), sr.parse_args(["--mode", "regress"]))
    assert sample.digit == pytest.approx(digit)


def test_safe_names_are_identifiers_that_mean_nothing_else():
    names = ["N", "I", "E", "lambda", "temp_%", "Time (s)", "exp", "2x", "", "Größe", "a b", "a-b"]
    safe = sr.safe_names(names)
    assert len(set(safe)) == len(names) and all(name.isidentifier() for name in safe)
    assert safe[3] == "lambda_" and safe[5] == "Time_s" and safe[9] == "Größe" and "exp" not in safe and "N" not in safe


# ---- The search and its answer

def test_sums_and_products_of_a_dictionary_are_found_at_once():
    rng = np.random.default_rng(0)
    X = rng.uniform(1, 3, (60, 3))
    a, b, c = X.T
    for y in (2.5 * a / b**2 - 0.3 * b * c + 1, 1 / (a + b * c), np.sqrt(a**2 + 3 * b**2), 4 * a**1.5 * np.log(b) / c,
              np.exp(a - 2 * b), (a * b + c) / (a + b), a * np.exp(-b / c), 1 / (np.exp(a) + np.exp(-a))):
        found = sr.Regressor(evaluations=1).fit(X, y)
        assert found.regression.k == 1 and found.best.loss < 1e-20 * y.var(), found.formula


def test_powers_are_made_multiples_of_a_half_where_there_is_noise():
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(1, 5, (3, 200))
    y = 2.3 * a * np.exp(-0.4 * b) / (1 + c**2) + 0.02 * rng.normal(size=200)
    root = np.abs(y)
    A = np.stack([np.ones(200), np.log(a), np.log(c), np.log(1 + c**2), b]) * root
    plain = np.linalg.lstsq(A.T, np.log(np.abs(y)) * root, rcond=None)[0]
    assert abs(plain[2]) > 0.1  # all at once are too uncertain
    powers = sr.rounded_powers(A, np.log(np.abs(y)) * root, [False, False, False, True], 2)
    assert powers[:3].tolist() == [1, 0, -1] and powers[3] == pytest.approx(-0.4, abs=0.02)


def test_an_outlier_is_not_bought_with_a_term_that_no_other_row_knows_of():
    x = np.linspace(0, 3, 30)
    y = 2 * x + 1 + 0.05 * np.sin(40 * x)
    y[17] += 4
    t, c = sr.parse(f"1.0 + 2.0*x0 + 4.0*exp(-900.0*(x0 - {float(x[17])!r})**2)")
    loss = sr.Loss(y[None])
    assert sr.measure(t, c, x[:, None], loss) < 0.01  # it meets the outlier
    assert np.abs(sr.left_out(t, c, x[:, None], loss) - y)[0].argmax() == 17
    assert np.abs(sr.left_out(t, c, x[:, None], loss) - y)[0, 17] > 2


@pytest.mark.parametrize("scale, offset", [(1e-12, 0.0), (1e9, 0.0), (1.0, 1e9), (1e23, 0.0)])
def test_nothing_depends_on_the_scale_of_y_or_its_offset(scale, offset):
    x = np.random.default_rng(0).uniform(1, 5, (40, 1))
    y = scale * (3 * x[:, 0] ** 2 + 2 * x[:, 0]) + offset
    found = sr.Regressor(evaluations=6000).fit(x, y)
    assert np.abs(found.predict(x) - y).max() < max(1e-9 * y.std(), 1e-6 * (offset > 0)) and found.best.size < 14


def test_the_scale_of_features_does_not_matter():
    x = np.random.default_rng(0).uniform(1, 5, (40, 2)) * [1e6, 1e-7]
    y = 2 * np.exp(-0.5e-6 * x[:, 0]) + 1e7 * x[:, 1]
    found = sr.Regressor(evaluations=60_000).fit(x, y)
    assert found.best.loss < 1e-6 * y.var()


def test_pure_noise_gives_a_constant():
    rng = np.random.default_rng(5)
    found = sr.Regressor(evaluations=40_000).fit(rng.normal(size=(40, 2)), rng.normal(size=40))
    assert found.best.size == 1


def test_outliers_do_not_matter_to_l1_and_huber_and_are_named_with_mse(write, tmp_path, capsys):
    rng = np.random.default_rng(1)
    x = np.linspace(0.1, 8, 40)
    y = 4.2 / (x + 0.8) + 0.01 * rng.normal(size=40)
    y[[7, 20, 33]] += 5
    file = write(lines("x,y", zip(x, y, strict=True)))
    for loss in ("l1", "huber"):
        found = sr.Regressor(loss=loss, evaluations=120_000, test_fraction=0).fit(x[:, None], y)
        assert np.delete(np.abs(found.predict(x[:, None]) - 4.2 / (x + 0.8)), [7, 20, 33]).max() < 0.05, found.formula
    regress(file, tmp_path / "out")
    named = capsys.readouterr().out.split("more than 6 median deviations from the formula, line ")[1].split(":")[0]
    assert set(named.split(", ")) == {"9", "22", "35"}


def test_weights_are_honoured_in_every_figure(write, tmp_path):
    x = np.random.default_rng(0).uniform(1, 5, 40)
    rows = [(a, 0 if i % 4 == 0 else 2, 99 if i % 4 == 0 else 2 * a + 1) for i, a in enumerate(x.tolist())]
    out = regress(write(lines("x,w,y", rows)), tmp_path / "out", "--weights", "w")
    assert out["train_loss"] < 1e-20 and eval(out["formula"], {"x": 2.0}) == pytest.approx(5)


def test_rows_of_the_front_are_fitted_to_convergence_and_as_good_as_scipys():
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 4, 50)
    y = 2.5 * np.exp(-0.7 * x) + 1.3 + 0.05 * rng.normal(size=50)
    found = sr.Regressor(evaluations=30_000, test_fraction=0).fit(x[:, None], y)
    row = next(row for row in found.front if row.size >= 7 and sr.C in row.tokens)
    place = np.array(row.tokens) == sr.C

    def residual(c):
        full = np.array(row.constants)
        full[place] = c
        return sr.evaluate(np.array([row.tokens], np.int8), x[None, :, None], None, full[None])[0] - y
    best = scipy.least_squares(residual, np.array(row.constants)[place], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert row.loss <= 2 * best.cost / 50 * (1 + 1e-6)


def test_a_pole_inside_the_range_is_marked():
    x = np.random.default_rng(0).uniform(-3, 3, 50)
    found = sr.Regressor(evaluations=3000).fit(x[:, None], 1 / x)
    assert found.best.pole and found.formula == "1 / x0"
    assert not sr.Regressor(evaluations=3000).fit(np.abs(x[:, None]) + 0.1, 1 / (np.abs(x) + 0.1)).best.pole


# ---- Files and use

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regress")
    rng = np.random.default_rng(3)
    x = rng.uniform(1, 4, (60, 3))
    y = 3 * x[:, 0] - 0.2 * x[:, 1] * x[:, 2] + 0.05 * rng.normal(size=60)
    file = folder / "data.csv"
    file.write_text(lines("lambda,Time (s),N,load", np.column_stack([x, y]).tolist()))
    return folder, x, regress(str(file), folder / "out")


def test_every_printed_formula_is_what_is_predicted(run):
    folder, x, out = run
    regressor = sr.load(str(folder / "out"))
    rows = front_of(folder / "out")
    assert len(rows) == len(regressor.front) > 3 and sum(int(row["recommended"]) for row in rows) == 1
    space = {name: getattr(np, name) for name in ("sin", "cos", "exp", "log", "sqrt", "tanh", "abs")}
    for text, row in zip(rows, regressor.front, strict=True):
        values = sr.evaluate(np.array([row.tokens], np.int8), x[None], None, np.array([row.constants]))[0]
        theirs = eval(text["python"], space | {"lambda_": x[:, 0], "Time_s": x[:, 1], "N_": x[:, 2]})
        np.testing.assert_allclose(theirs, values, rtol=1e-9, atol=1e-9)
        assert float(text["train"]) == row.loss and int(text["size"]) == row.size
    assert any("Time (s)" in row["formula"] for row in rows) and "lambda_" not in rows[-1]["formula"]


def test_the_files_can_be_used_elsewhere(run):
    folder, x, out = run
    spec = importlib.util.spec_from_file_location("formula", folder / "out" / "formula.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    regressor = sr.load(str(folder / "out"))
    assert [module.formula(*row) for row in x.tolist()] == pytest.approx(regressor.predict(x).tolist(), rel=1e-9)
    import sympy
    text = (folder / "out" / "formula.sympy.txt").read_text()
    value = sympy.sympify(text).subs(dict(zip(("lambda_", "Time_s", "N_"), x[0].tolist(), strict=True)))
    assert float(value) == pytest.approx(regressor.predict(x[:1])[0], rel=1e-9)
    assert "lambda" in (folder / "out" / "formula.tex").read_text() and (folder / "out" / "report.png").stat().st_size > 10_000
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["n"] == 60 and summary["n_test"] == 15 and math.isfinite(summary["test_loss"])


def test_predictions_are_made_by_names_of_columns(run, tmp_path):
    folder, x, out = run
    file = tmp_path / "new.csv"
    file.write_text(lines("more;N;lambda;Time (s)", [(1, str(c).replace(".", ","), str(a).replace(".", ","), "" if i == 2 else
                                                     str(b).replace(".", ",")) for i, (a, b, c) in enumerate(x[:5].tolist())], ";"))
    sr.main(["--mode", "regress", "--predict", str(file), "--checkpoint", str(folder / "out"), "--output", str(tmp_path / "p.csv")])
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert rows[0] == "load" and rows[3] == '""' or rows[3] == ""
    mine = sr.load(str(folder / "out")).predict(x[:5])
    assert [float(row) for i, row in enumerate(rows[1:]) if i != 2] == np.delete(mine, 2).tolist()


def test_an_evaluation_scores_the_front_on_the_rows_of_test(run, capsys):
    folder, x, out = run
    figures = sr.evaluate_checkpoint(str(folder / "out"), None)
    assert figures["n"] == 15 and [row["test"] for row in figures["front"]] == [float(row["test"]) for row in front_of(folder / "out")]
    evaluate_checkpoints.main([str(folder / "out")])
    assert out["formula"] in capsys.readouterr().out


@pytest.mark.parametrize("n_different", [3, 60])
def test_rows_that_are_equal_are_on_one_side_of_the_split(n_different):
    X = np.random.default_rng(0).uniform(1, 2, (n_different, 2))[np.arange(240) % n_different]
    rows = sr.Regressor().prepare(X, X[:, 0] + X[:, 1]).rows
    train, test = ({tuple(x) for x in X[rows[name]]} for name in ("train", "test"))
    assert not train & test and len(rows["test"]) == {3: 0, 60: 60}[n_different] and len(train) + len(test) == n_different


def test_the_same_seed_gives_the_same_front_and_resume_is_bit_exact(run, tmp_path, monkeypatch):
    folder, x, out = run
    regress(str(folder / "data.csv"), tmp_path / "again")
    assert (tmp_path / "again" / "front.csv").read_bytes() == (folder / "out" / "front.csv").read_bytes()
    whole = sr.Regression.round

    def stop_at_one(self, left=math.inf):
        whole(self, left)
        if self.k == 1:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(sr.Regression, "round", stop_at_one)
    with pytest.raises(SystemExit) as e:
        regress(str(folder / "data.csv"), tmp_path / "cut")
    assert e.value.code == 130 and front_of(tmp_path / "cut")
    monkeypatch.undo()
    sr.main(["--mode", "regress", "--resume", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "front.csv").read_bytes() == (folder / "out" / "front.csv").read_bytes()


def test_a_constant_target_is_said_and_given(write, tmp_path):
    out = regress(write(lines("x,y", [(i * i, 4.2) for i in range(30)])), tmp_path / "out")
    assert out["formula"] == "4.2" and out["train_loss"] == 0


def test_a_target_that_is_nearly_always_the_same_is_no_error(write, tmp_path):
    rows = [(i, 5 * (i % 100 == 50), i % 7) for i in range(1, 401)]  # a sample of 200 rows may know no other value
    out = regress(write(lines("x,y,z", rows)), tmp_path / "out", "--target", "y", "--features", "x,z")
    assert out["n"] == 400


# ---- Bad input

BAD = {
    "missing": (None, (), "data.csv"),
    "empty": ("", (), "empty"),
    "binary": (bytes(range(256)) * 4, (), "binary"),
    "comments alone": ("# a\n# b\n", (), "comments"),
    "a header alone": ("x,y\n", (), "no rows"),
    "no such target": ("x,y\n1,2\n2,3\n3,5\n", ("--target", "z"), "no such column"),
    "a target of text": ("x,y\n1,a\n2,b\n3,c\n", (), "line 2 has 'a'"),
    "a feature of text": ("a,x,y\nu,1,2\nv,2,3\nw,4,5\n", ("--features", "a"), "'a'"),
    "a constant feature": ("a,x,y\n1,1,2\n1,2,3\n1,4,5\n", ("--features", "a,x"), "the same everywhere"),
    "two rows": ("x,y\n1,2\n2,3\n", (), "2 usable rows"),
    "inf": ("x,y\n1,2\n2,inf\n3,4\n4,5\n", (), "line 3"),
    "a name twice": ("x,x,y\n1,2,3\n2,3,4\n4,5,6\n", (), "'x'"),
    "negative weights": ("x,w,y\n1,-1,2\n2,1,3\n4,1,5\n", ("--weights", "w"), "--weights"),
    "weights all 0": ("x,w,y\n1,0,2\n2,0,3\n4,0,5\n", ("--weights", "w"), "--weights"),
    "a weight missing": ("x,w,y\n1,1,2\n2,,3\n4,1,5\n", ("--weights", "w"), "--weights"),
    "log of what is not positive": ("x,y\n1,1\n2,0\n4,5\n7,8\n", ("--loss", "log"), "--loss log"),
    "a line that is too long": ("x,y\n1,1\n2,0,9\n4,5\n7,8\n", (), "line 3"),
    "no features": ("a,y\nu,1\nv,2\nw,4\n", (), "no column of numbers"),
}


@pytest.mark.parametrize("text, more, word", BAD.values(), ids=BAD)
def test_bad_tables_are_one_line_and_leave_nothing(write, tmp_path, text, more, word):
    file = write(text) if text is not None else str(tmp_path / "data.csv")
    with pytest.raises(SystemExit) as e:
        regress(file, tmp_path / "out", *more)
    assert word in str(e.value.code) and "\n" not in str(e.value.code) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, word", [
    ("--mode regress --data x.csv --evaluations 0", "budget"), ("--mode regress --data x.csv --max-minutes 0", "budget"),
    ("--mode regress --units m", "--units"), ("--mode regress --predict new.csv", "--checkpoint"), ("--mode regress --hidden 8", "--hidden"),
    ("--mode search --target y", "--target"), ("--mode regress --features ,", "--features"), ("--mode bench --method wrong", "--method"),
    ("--mode search --method eggp", "--method"), ("--mode bench --problems none", "--problems"), ("--mode regress --ops plus", "--ops")])
def test_flags_that_make_no_sense_are_refused(argv, word, capsys):
    with pytest.raises(SystemExit) as e:
        sr.parse_args(argv.split())
    assert e.value.code == 2 and word in capsys.readouterr().err


def test_predictions_of_a_table_without_a_column_are_refused(run, write, tmp_path):
    with pytest.raises(SystemExit, match="no column 'Time"):
        sr.main(["--mode", "regress", "--predict", write("lambda,N\n1,2\n"), "--checkpoint", str(run[0] / "out")])


def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install"):
        sr.main(["--mode", "bench", "--method", "pyoperon", "--out-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("X, y, more", [([[1], [2]], [1, 2], {}), ([[1], [2], [3]], [1, 2], {}), ([[1], [math.inf], [3]], [1, 2, 3], {}),
                                        ([["a"], ["b"], ["c"]], [1, 2, 3], {}), ([[1], [2], [3]], [1, 2, 3], {"weights": [1, -1, 1]}),
                                        ([[1], [2], [3]], [1, 2, 3], {"names": ["a", "b"]})])
def test_bad_arrays_are_refused(X, y, more):
    with pytest.raises(UserError):
        sr.Regressor(evaluations=100).fit(X, y, **more)
