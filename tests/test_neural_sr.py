"""neural_sr.py: expressions, constants, evolution, examples, the net, its diagnosis and the searches with it."""
from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import neural_sr as sr
from common import metrics, run
from common.files import UserError, read_json

ALL = sr.Grammar(ops=tuple(sr.TOKENS), variables=3, max_size=20, constants=True)
PLAIN = sr.Grammar(ops=("add", "sub", "mul", "div", "sin", "exp"), variables=2, max_size=15)


def programs(n, grammar=ALL, seed=0, most=None):
    rng = np.random.default_rng(seed)
    tokens = sr.random_programs(rng, rng.integers(1, (most or grammar.max_size) + 1, n), grammar)
    return tokens, rng.normal(size=tokens.shape)


# ---- Expressions

def test_programs_have_the_values_that_python_gives_their_text():
    no_abs = replace(ALL, ops=tuple(op for op in ALL.ops if op != "abs"))  # it makes complex numbers real again
    tokens, constants = programs(3000, no_abs)
    X = np.random.default_rng(1).uniform(-3, 3, (1, 4, 3))
    values = sr.evaluate(tokens, X, None, constants)
    space = {name: getattr(math, name) for name in ("sin", "cos", "exp", "log", "sqrt", "tanh")} | {"abs": abs}
    rounded = {name: lambda x, f=f: f(x) * (1 + 4e-16) for name, f in space.items()}  # as another CPU may round them
    n_finite = 0
    for row, k, ours in zip(tokens, constants, values, strict=True):
        for point, value in zip(X[0], ours, strict=True):
            try:
                theirs, others = (eval(sr.infix(row, k), dict(functions), {f"x{i}": float(x) for i, x in enumerate(point)})
                                  for functions in (space, rounded))
            except (ArithmeticError, ValueError, TypeError):  # where Python raises, numpy has inf or NaN on the way
                continue
            if isinstance(theirs, complex) or not math.isfinite(theirs):
                continue
            n_finite += 1
            slack = 1e-12 + 10 * abs(theirs - others)  # cos(exp(exp(3))) hangs on the last bit
            assert value == pytest.approx(theirs, rel=1e-9, abs=slack), sr.infix(row, k)
    assert n_finite > 6000


def test_programs_have_the_values_that_sympy_gives_them():
    tokens, constants = programs(300, seed=2, most=9)
    point = np.random.default_rng(3).uniform(0.5, 2, (1, 1, 3))
    names, values = ["N", "lambda", "x y"], sr.evaluate(tokens, point, None, constants)[:, 0]
    for row, k, ours in zip(tokens, constants, values, strict=True):
        formula = sr.to_sympy(row, k, names)
        theirs = complex(formula.subs({s: point[0, 0, names.index(s.name)] for s in formula.free_symbols}).evalf())
        if np.isfinite(ours) and abs(theirs.imag) < 1e-12:
            assert ours == pytest.approx(theirs.real, rel=1e-8, abs=1e-9)


def test_text_is_read_back_as_the_program_that_it_was_written_from():
    tokens, constants = programs(500, seed=4)
    X = np.random.default_rng(5).uniform(0.5, 2, (1, 5, 3))
    for row, k in zip(tokens, constants, strict=True):
        t, c = sr.parse(sr.infix(row, k))
        again = sr.evaluate(np.array([t]), X, None, np.array([c]))
        np.testing.assert_array_equal(again, sr.evaluate(row[None], X, None, k[None]))


@pytest.mark.parametrize("text", ["x0 +", "x200", "foo(x0)", "import os", "__import__('os')", "x0 if x1 else 1", "True",
                                  "1e999", "-1e999", "-True", "1" + "0" * 400, "((((((x0**6)**6)**6)**6)**6)**6)**6", "sin(x0, x1)", "sin", "(" * 5000, "x0\0", "", "2j*x0", "x0 = 1"])
def test_what_is_no_expression_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"^expression [^\n]{0,200}$"):
        sr.parse(text)


@pytest.mark.parametrize("row", [[sr.ADD, sr.X0], [sr.X0, sr.X0], [0, 0, 0], [sr.X0 + 9, 0], [63, 0], [-1, 0],
                                 [sr.EOS, 0], [sr.X0, 0, sr.X0], [sr.BOS, 0]])
def test_rows_that_are_no_programs_are_refused(row):
    with pytest.raises(UserError, match="^program"):
        sr.check_programs(np.array([row]), PLAIN)


def test_equal_up_to_order_have_one_key_and_one_canonical_program():
    a, b, c = (np.array([sr.padded(sr.parse(text)[0], 15)]) for text in (
        "sin(x0 + x1*x0) * (x1 + 1)", "(1 + x1) * sin(x0*x1 + x0)", "(1 + x1) * sin(x0*x1 - x0)"))
    keys = [sr.keys_of(x, sr.shape_of(x))[0] for x in (a, b, c)]
    assert keys[0] == keys[1] != keys[2]
    assert sr.canonical(a[0]) == sr.canonical(b[0]) != sr.canonical(c[0])
    assert sr.canonical(sr.parse("(x0 / 1) * 1 * (1 * x1)")[0]) == (sr.MUL, sr.X0, sr.X0 + 1)
    tokens, _ = programs(5000, seed=6)
    in_order = np.array([sr.padded(sr.canonical(row), 20) for row in tokens])
    differ = sr.keys_of(tokens, sr.shape_of(tokens)) != sr.keys_of(in_order, sr.shape_of(in_order))
    assert all("1" in sr.infix(row) for row in tokens[differ])  # a product with 1 was left out


def test_slopes_are_those_of_differences():
    tokens, constants = programs(400, seed=7, most=12)
    X, of = np.random.default_rng(8).uniform(0.5, 1.5, (1, 3, 3)), np.zeros(400, int)
    values, J = sr.slopes(tokens, constants, X, of, np.arange(20) == np.zeros((400, 1)), sr.shape_of(tokens))
    np.testing.assert_array_equal(values, sr.evaluate(tokens, X, of, constants))
    checked = 0
    for p in range(400):
        for k, i in enumerate(np.flatnonzero(tokens[p] == sr.C)):
            h = np.zeros(20)
            h[i] = 1e-6
            two = sr.evaluate(np.stack([tokens[p]] * 2), X, None, constants[p] + np.stack([h, -h]))
            difference = (two[0] - two[1]) / 2e-6
            if np.isfinite(difference).all() and np.abs(values[p]).max() < 1e3:
                checked += np.allclose(J[p, k], difference, rtol=1e-4, atol=1e-4)
                assert np.allclose(J[p, k], difference, rtol=1e-2, atol=1e-2), sr.infix(tokens[p], constants[p])
    assert checked > 120


def test_constants_are_found_from_near_by_and_never_made_worse():
    tokens = np.array([sr.padded(sr.parse("2.5*exp(-0.7*x0) + 1.3")[0], 12)] * 8)
    truth = np.zeros((8, 12))
    truth[:, tokens[0] == sr.C] = [2.5, -0.7, 1.3]
    rng = np.random.default_rng(0)
    X, of = rng.uniform(0, 4, (1, 40, 1)), np.zeros(8, int)
    y = sr.evaluate(tokens[:1], X, None, truth[:1])
    start = truth * rng.uniform(0.6, 1.4, truth.shape)
    found = sr.fit_constants(tokens, start, X, sr.Loss(y), of, 20)
    assert np.abs(found - truth).max() < 1e-6
    tokens, start = programs(200, seed=9)
    X, of = rng.uniform(-2, 2, (1, 30, 3)), np.zeros(200, int)
    y = rng.normal(size=(1, 30))
    with np.errstate(all="ignore"):
        before, after = (((sr.evaluate(tokens, X, of, k) - y) ** 2).mean(1) for k in (
            start, sr.fit_constants(tokens, start, X, sr.Loss(y), of)))
    assert not (after > before).any()


def test_weights_of_terms_are_those_of_least_squares():
    text = "x0*x0 - sin(x1) + x0*x1"
    tokens = np.array([sr.padded(sr.parse(text)[0], 15)])
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, (1, 30, 2))
    y = sr.evaluate(tokens, X) + 1 + 0.2 * rng.normal(size=(1, 30))
    error, n_terms = sr.fit_terms(tokens, X, sr.Loss(y), np.zeros(1, int))
    a, b = X[0].T
    A = np.stack([np.ones(30), a * a, np.sin(b), a * b], 1)
    theirs, *_ = np.linalg.lstsq(A, y[0], rcond=None)
    assert error[0] == pytest.approx(((A @ theirs - y[0]) ** 2).mean() * (30 / 26) ** 2, rel=1e-9) and n_terms[0] == 3
    t, c = sr.weighted(tokens[0][:10], np.zeros(10), X[0], sr.Loss(y), 0)
    left_out = [(A[i] @ np.linalg.lstsq(np.delete(A, i, 0), np.delete(y[0], i), rcond=None)[0] - y[0, i]) ** 2 for i in range(30)]
    values = sr.left_out(t, c, X[0], sr.Loss(y))  # the weights are constants now
    assert ((values - y) ** 2).mean() == pytest.approx(np.mean(left_out), rel=1e-9)
    t, c = map(np.array, sr.weighted(tokens[0][:10], np.zeros(10), X[0], sr.Loss(y), 0))
    np.testing.assert_allclose(sr.evaluate(t[None], X, None, c[None])[0], A @ theirs, atol=1e-9)


@pytest.mark.parametrize("text, short", [
    ("x0*1 + (2.0 - 2.0)", "x0"), ("(1 + 1)*x0/1", "(2 * x0)"), ("0.5*2.0*x0", "x0"), ("x0 - 0.0", "x0"),
    ("sin(0.0) + x1", "x1"), ("1/(1 + 1) + 0.5", "1"), ("x0 - x0", "0"), ("x0/x0", "1"),
    ("sqrt(x0**2)", "abs(x0)"), ("exp(log(x0) - x1*2)", "(x0 * exp(((-2) * x1)))"), ("exp(x1*log(x0))", "(x0 ** x1)"),
    ("2*x0*(3*x1)/(x0*x0)", "((6 * x1) / x0)"), ("exp(0.7*log(x0))", "(x0 ** 0.7)"), ("x1 + 2.0 + (x0 - 2.0)", "(x1 + x0)")])
def test_answers_are_simplified(text, short):
    assert sr.infix(*sr.simplified(*sr.parse(text))) == short


# ---- Programs at random, and their children

def test_random_programs_and_children_are_whole_and_of_their_sizes():
    tokens, constants = programs(2000, PLAIN)
    sr.check_programs(tokens, PLAIN)
    sizes = np.random.default_rng(0).integers(1, 16, 2000)
    binary = sr.Grammar(ops=("add", "div"), variables=1, max_size=15)
    for grammar in (PLAIN, binary):
        made = (sr.random_programs(np.random.default_rng(1), sizes, grammar) != 0).sum(1)
        np.testing.assert_array_equal(made, sizes if grammar is PLAIN else sizes - (sizes % 2 == 0))
    rng = np.random.default_rng(2)
    child, values = sr.breed(rng, (tokens, constants), (tokens[::-1], constants[::-1]), PLAIN)
    sr.check_programs(child, PLAIN)
    changed = (child != tokens).any(1)
    assert 0.6 < changed.mean() < 0.95 and child.shape == values.shape


def test_a_subtree_is_replaced_with_its_constants():
    (a, c), (b, d) = (sr.parse(text) for text in ("sin(x0 * 2.0) + 3.0", "x1 - 5.0"))
    a, b, c, d = sr.padded(a, 10), sr.padded(b, 10), np.array(c + [0] * 4), np.array(d + [0] * 7)
    at, size, of, donated = (np.array([x]) for x in (2, 3, 0, 3))
    tokens, constants = (sr.graft(x[None], at, size, y[None], of, donated) for x, y in ((a, b), (c, d)))
    assert sr.infix(tokens[0], constants[0]) == "(sin((x1 - 5)) + 3)"


# ---- Problems and splits

def rows_of_text(texts):
    return np.array([sr.padded([t if t != sr.C else sr.ONE for t in sr.parse(text)[0]], 15) for text in texts])


def test_classes_and_shares_hold_what_least_squares_cannot_tell_apart():
    groups = [["x0/x1", "(x0 + x1)/x1", "x1/x0 + 1"], ["x0 + x0", "x1", "1 - x0"], ["x0*x1*x1", "x0*x1*x0 + 1"],
              ["x0*x1 + x1", "1 - (x0 + x0*x1)", "x1*(x0 + 1)"], ["sin(x0)*x1 - 1", "sin(x1)*x0"]]
    classes = [set(sr.classes_of(rows_of_text(texts), 2)) for texts in groups]
    assert [len(some) for some in classes] == [1] * 5 and len(set.union(*classes)) == 5
    groups = [["x0*x1 + x1", "x0 - x1*x0", "x0*(x1 - 1)", "x0*x1 - (1 + 1)*x0"], ["x0/x1 + x1", "(x0*x0 - x1)/x0"],
              ["sin(x0 + x1)*x0 - x1", "x1*sin(x0 + x1) + x0 + 1"], ["(x0 + x1)*(x0 - x1)", "x0*x0 + x1*x1"]]
    shares = [set(sr.share_of(rows_of_text(texts), 2)) for texts in groups]
    assert [len(some) for some in shares[:3]] == [1] * 3 and len(set.union(*shares)) >= 4


def test_functions_are_different_short_and_split_by_what_they_are():
    tokens, share = sr.sample_functions(np.random.default_rng(0), PLAIN, 5000, range(1, 8))
    keys = sr.fingerprints(tokens, 2)
    assert len(set(keys)) == len(keys) > 500
    text = [sr.infix(row) for row in tokens]
    assert "x0" in text and not any("* 1)" in t or "/ 1)" in t for t in text)
    swapped = np.where(tokens == sr.X0, sr.X0 + 1, np.where(tokens == sr.X0 + 1, sr.X0, tokens))
    assert sr.classes_of(tokens, 2) == sr.classes_of(swapped, 2)
    both = {key: s for key, s in zip(keys, share, strict=True)}
    pairs = [(both[key], s) for key, s in zip(sr.fingerprints(swapped, 2), share, strict=True) if key in both]
    assert len(pairs) > 100 and np.mean([a == b for a, b in pairs]) > 0.98  # the others are told by their classes
    with pytest.raises(UserError, match="of val, or one of its class, is in train, too"):
        sr.refuse_overlap({"train": tokens[:50], "val": swapped[20:21]}, 2)


def test_problems_have_usable_values_and_a_range_twice_as_wide():
    tokens = np.array([sr.padded(sr.parse(text)[0], 9) for text in ("x0 + x1", "log(x0)", "1", "exp(exp(exp(x0)))")])
    problems, which = sr.make_problems(np.random.default_rng(0), tokens, 20, 2)
    assert which.tolist() == [0, 1] and problems.X.shape == (2, 20, 2) and problems.X_test.shape == (2, 400, 2)
    assert problems.X[0].min() < -1 and 0.2 <= problems.X[1].min() and problems.X_wide[0].max() > 4
    np.testing.assert_allclose(problems.y[1], np.log(problems.X[1, :, 0]))


@pytest.mark.parametrize("X, y, message", [
    (np.ones((4, 1)), np.arange(3.0), "shape"), (np.ones((4, 1)), np.array([1, 2, np.nan, 3]), "y has a value .* row 2"),
    (np.full((4, 1), np.inf), np.arange(4.0), "X has a value"), (np.ones((4, 1)), np.ones(4), "everywhere"),
    (np.ones((2, 1)), np.arange(2.0), "2 points")])
def test_data_that_no_formula_can_be_searched_for_is_refused(X, y, message):
    with pytest.raises(UserError, match=message):
        sr.check_data(X, y)


# ---- Search

def easy(texts, seed=0, n_points=20):
    tokens = np.array([sr.padded(sr.parse(text)[0], PLAIN.max_size) for text in texts])
    return sr.make_problems(np.random.default_rng(seed), tokens, n_points, 2)[0]


def searched(problems, budget=400, islands=("raw",), seed=0, rounds=300, **more):
    s = sr.Search(problems, PLAIN, budget=budget, population=20, islands=islands, seed=seed, **more)
    s.begin()
    for _ in range(rounds):
        for kind in islands:
            s.breed(kind, 20)
    return s


@pytest.mark.parametrize("islands", [("raw",), ("terms",), ("raw", "terms")])
def test_a_search_solves_easy_problems_within_its_budget_and_says_after_how_many_evaluations(islands):
    problems = easy(["x0 + x1", "x0 * x1", "sin(x0)", "x0*x0*x1 - x1/x0"])
    s = searched(problems, islands=islands)
    figures = sr.scored(s)
    assert figures["solved"][:3].all() and figures["recovered"][:3].all()
    assert (s.spent <= 400).all() and (figures["at"][:3] <= s.spent[:3]).all() and (figures["at"][:3] > 0).all()
    again = searched(problems, islands=islands)
    assert (again.spent == s.spent).all() and (again.front.tokens == s.front.tokens).all()
    assert len(s.cache) * (1 if islands == ("raw",) else 2) >= s.spent.sum() - 4 * len(s.spent)


def test_an_evaluation_is_counted_once_for_each_program_and_problem():
    problems = easy(["x0*x0*x1 - x1/x0", "sin(x1*x1) + x0"])
    s = sr.Search(problems, PLAIN, budget=100, population=5, islands=["raw"], seed=0)
    rows = np.array([sr.padded(sr.parse(text)[0], 15) for text in ("x0 + x1", "x1 + x0", "x0 - x1", "x0 + x1")])
    s.offer("raw", np.array([0, 0, 0, 1]), (rows, np.zeros(rows.shape)))
    s.offer("raw", np.array([0, 1]), (rows[:2], np.zeros((2, 15))))
    assert s.spent.tolist() == [2, 1] and s.proposed.tolist() == [4, 2]
    terms = sr.Search(problems, PLAIN, budget=3, population=5, islands=["terms"], seed=0)
    terms.offer("terms", np.zeros(3, int), (rows[[0, 2, 3]], np.zeros((3, 15))))
    assert terms.spent[0] == 3 and np.isfinite(terms.islands["terms"].score[0]).sum() == 1  # two evaluations each


def test_solutions_out_of_terms_have_their_weights_and_are_scored_on_other_points():
    truth = "2.5*x0*x0 - 0.75*x1 + 3.0"
    tokens, constants = sr.parse(truth)
    problems, _ = sr.make_problems(np.random.default_rng(0), np.array([tokens]), 20, 2, np.array([constants]))
    s = searched(problems, budget=3000, islands=["terms"], seed=1)
    figures, (rows, values) = sr.scored(s), sr.answers(s)
    assert figures["solved"][0] and figures["recovered"][0] and figures["nmse"][0] < 1e-20
    found = eval(sr.infix(rows[0], values[0]), {"x0": 1.5, "x1": -2.0})
    assert found == pytest.approx(2.5 * 2.25 + 1.5 + 3, rel=1e-9)
    s.front.tokens[0] = sr.padded(sr.parse("x0")[0], 15)
    assert not sr.scored(s)["solved"][0]


@pytest.mark.parametrize("y, text, truth", [
    (lambda a, b: 1e-10 * a, "x0", [1e-10]), (lambda a, b: 1e-16 * a**4 + b, "x0*x0*x0*x0 + x1", [1e-16]),
    (lambda a, b: a * (1 + 5e-8) - b, "x0 - x1", [1 + 5e-8]), (lambda a, b: 3 * a + 1e9, "x0", [1e9, 3.0])])
def test_weights_are_simplified_by_what_that_changes(y, text, truth):
    rng = np.random.default_rng(0)
    X = rng.uniform(1, 2, (1, 30, 2)) * 1e4
    X[0, :, 1] = X[0, :, 0] + rng.normal(size=30)
    tokens, target = np.array(sr.parse(text)[0]), y(*X[0].T)
    t, c = map(np.array, sr.weighted(tokens, np.zeros(len(tokens)), X[0], sr.Loss(target[None]), 0))
    found = sr.evaluate(t[None], X, None, c[None])[0]
    assert ((found - target) ** 2).mean() < 1e-16 * target.var()
    assert all(np.isclose(np.abs(c), x, rtol=1e-9, atol=0).any() for x in truth)


def test_where_no_program_has_a_value_nothing_is_solved_and_nothing_fails():
    problems = easy(["x0 + x1", "x0 * x1"])
    grammar = sr.Grammar(ops=("log",), variables=2, max_size=9)
    problems.X[0] = -np.abs(problems.X[0])
    s = sr.Search(problems, grammar, budget=50, population=3, islands=["raw"], seed=0)
    rows = np.array([sr.padded(sr.parse("log(x0)")[0], 9)] * 2)
    s.offer("raw", np.arange(2), (rows, np.zeros(rows.shape)))
    assert not np.isfinite(s.islands["raw"].score).any() and not sr.scored(s)["solved"].any()
    for _ in range(5):
        s.breed("raw", 3)
    assert not (s.islands["raw"].tokens[np.isfinite(s.islands["raw"].score)] == 0).all(1).any()


def test_the_strongest_variables_are_not_those_that_stand_still():
    a = np.arange(200.0)
    noise = np.random.default_rng(0).normal(size=200)
    assert sr.strongest(np.column_stack([np.zeros(200), a + noise, -a]), a, 2) == [1, 2]
    assert sr.strongest(np.column_stack([np.arange(200) % 2, np.zeros(200), a + noise]), -a, 1) == [2]


def test_a_fit_to_few_points_that_is_wrong_elsewhere_is_not_solved():
    problems = easy(["x0*x0*x1 - x1/x0"], n_points=4)
    s = searched(problems, budget=2000, islands=["terms"])
    assert s.best().nmse[0] < 1e-9 or s.ended_at[0] < 0
    figures = sr.scored(s)
    assert figures["solved"][0] == (figures["nmse"][0] <= 1e-9 and s.ended_at[0] >= 0)


def test_the_interval_of_a_paired_difference_is_by_problem():
    rng = np.random.default_rng(0)
    a, b = rng.random((200, 3)) < 0.6, rng.random((200, 3)) < 0.4
    mean, low, high = sr.paired(a, b)
    assert mean == pytest.approx(a.mean() - b.mean()) and low < mean < high and low > 0.1
    assert sr.paired(a, a) == (0, 0, 0)


def test_constants_are_fitted_in_a_search_and_every_residual_and_jacobian_is_paid():
    tokens, constants = sr.parse("sin(2.3*x0 + 0.5)")
    rng = np.random.default_rng(0)
    problems, _ = sr.make_problems(rng, np.array([tokens] * 3), 20, 1, np.array([constants] * 3), [(0, 4)])
    s = sr.Search(problems, replace(PLAIN, variables=1, constants=True), budget=100, population=20, islands=["raw"], seed=0)
    rows, start = np.array([sr.padded(tokens, 15)] * 3), np.array([sr.padded([], 15)] * 3) * 0.0
    start[:, :len(constants)] = np.array(constants) * 1.05
    s.offer("raw", np.arange(3), (rows, start))
    before = s.best().nmse.copy()
    s.fit("raw", 8)
    assert (s.spent == 1 + 18).all() and (before > 1e-4).all() and (s.best().nmse < 1e-9).all()
    s.fit("raw", 8)  # each program is fitted once, and its child too
    s.fit("raw", 8)
    assert (s.spent <= 1 + 36).all()
    values = sr.answers(s)[1]
    assert sorted(np.abs(values[0][values[0] != 0])) == pytest.approx([0.5, 2.3], rel=1e-4)
    poor = sr.Search(problems, replace(PLAIN, constants=True), budget=18, population=20, islands=["raw"], seed=0)
    poor.offer("raw", np.arange(3), (rows, start))
    poor.fit("raw", 8)
    assert (poor.spent == 1).all()


# ---- Examples

@pytest.fixture(scope="module")
def flags():
    return sr.parse_args(["--threads", "1", *SMALL])


SMALL_DATA = ["--functions", "20000", "--target-size", "7", "--max-size", "9", "--generations", "3", "--points", "12"]
SMALL_NET = [*SMALL_DATA, "--steps", "4", "--eval-every", "2", "--hidden", "16", "--heads", "1", "--layers", "1",
             "--batch-size", "16", "--members", "4"]
SMALL_SEARCH = ["--evaluations", "60", "--population", "10"]
SMALL = [*SMALL_NET, *SMALL_SEARCH, "--held-out", "6", "--search-seeds", "2"]


@pytest.fixture(scope="module")
def data(flags):
    return sr.generate(flags)


def test_examples_show_a_population_that_does_not_hold_the_answer(flags, data):
    for name, examples in data.examples.items():
        functions = data.functions[name]
        np.testing.assert_array_equal(examples.targets, functions[examples.function])
        keys = sr.fingerprints(functions, 2)
        members = sr.fingerprints(examples.members[:, 0], 2)
        assert not any(keys[f] == m for f, m in zip(examples.function, members, strict=True))
        assert set(examples.generation.tolist()) == {0, 1, 2}
    sizes = [len(data.functions[name]) for name in sr.SPLITS]
    assert sizes[0] > 5 * sizes[1] and sizes[0] > 5 * sizes[2] and min(sizes) >= 5


def test_targets_may_be_ancestors_of_the_best():
    problems = easy(["x0*x0*x1 - x1/x0", "sin(x1*x1) + x0*x0", "x0 / (x1*x1 + 1)"])
    s = searched(problems, budget=1 << 30, rounds=3, record=True)
    of, tokens, parents = (np.concatenate(x) for x in zip(*s.births, strict=True))
    examples = sr.Examples(np.zeros((9, 1, 15)), np.zeros((9, 15)), np.repeat([0, 1, 2], 3), np.tile([0, 1, 2], 3))
    targets, there = sr.ancestors(s, examples)
    ancestors = [set(), set(), set()]
    for q in range(3):
        todo = [s.best().id[q]]
        while todo:
            i = todo.pop()
            if i >= 0 and i not in ancestors[q]:
                ancestors[q].add(i)
                todo += parents[i].tolist()
    starts = np.cumsum([0, *(len(b[0]) for b in s.births)])
    for target, ok, g, q in zip(targets, there, examples.generation, examples.function, strict=True):
        born_then = range(starts[g + 1], starts[g + 2])
        options = [i for i in born_then if of[i] == q and i in ancestors[q]]
        assert ok == bool(options) and (not ok or any((tokens[i] == target).all() for i in options))
    assert there.any()


def test_nobody_guesses_a_first_token_of_imitation_above_its_ceiling(flags):
    args = replace_flags(flags, objective="gp", functions=20_000, generations=4)
    examples = sr.generate(args).examples["train"]
    ceiling = sr.ceiling(sr.take(examples, slice(500)), sr.config_of(args).grammar, np.random.default_rng(0))
    root = examples.members[:500, :, 0]
    root = np.where(root == 0, -1, root)
    guess = [np.bincount(row[row >= 0][:3]).argmax() for row in root]  # a simple rule: the roots of the best three
    assert np.mean(examples.targets[:500, 0] == guess) < ceiling + 0.02 < 0.8


def test_the_ceiling_of_imitation_is_what_knowing_the_population_is_worth():
    same = np.array([sr.padded(sr.parse("x0 + x1")[0], 15)] * 5)[None]
    examples = sr.Examples(same, same[:, 0], np.zeros(1), np.zeros(1))
    rng = np.random.default_rng(0)
    assert 0.5 < sr.ceiling(examples, PLAIN, rng) < 0.8  # most children keep its root, as the rules of breeding say
    leaves = np.array([sr.padded([t], 15) for t in (sr.X0, sr.X0 + 1, sr.ONE)])[None]
    mixed = sr.ceiling(sr.Examples(leaves, leaves[:, 0], np.zeros(1), np.zeros(1)), PLAIN, rng)
    assert 0.3 < mixed < 0.7


# ---- Net

def small_net(arch="own", **more):
    torch.manual_seed(0)
    settings = {"ops": PLAIN.ops, "variables": 2, "max_size": 9, "points": 12, "members": 4, "hidden": 16, "layers": 2,
                "heads": 2, **more}
    return sr.Net(sr.Config(arch=arch, **settings)).eval()


def small_context(net, n=3, seed=0):
    rng = np.random.default_rng(seed)
    members, _ = programs(n * 6, replace(PLAIN, max_size=9), seed)
    return sr.encode_context(rng.normal(size=(n, 20, 2)), rng.normal(size=(n, 20)), members.reshape(n, 6, 9), net.config)


def test_contexts_are_trimmed_and_filled_and_never_not_finite():
    net = small_net(variables=3)
    context = small_context(net)
    assert [tuple(x.shape) for x in context] == [(3, 12, 3), (3, 12), (3, 4, 9), (3, 4, 12)]
    empty = sr.encode_context(np.ones((1, 3, 1)), np.array([[1e200, -1e200, 0]]), np.zeros((1, 0, 9), np.int8), net.config)
    poles = sr.encode_context(np.zeros((1, 3, 2)), np.array([[1.0, 2, 3]]),
                              np.array([[sr.padded(sr.parse(t)[0], 9) for t in ("1/x0", "exp(exp(exp(exp(1))))")]]), net.config)
    for c in (context, empty, poles):
        assert torch.isfinite(net.reader(c)).all()


def test_the_hash_of_the_format_is_the_same_on_another_cpu_and_another_one_for_other_features(monkeypatch):
    config = sr.config_of(sr.parse_args([]))
    seen, features = [], sr.features
    monkeypatch.setattr(sr, "features", lambda x: seen.append(features(x)) or seen[-1])
    assert sr.format_of(config) == sr.format_of(config) != sr.format_of(replace(config, ops=("add", "sub", "mul", "sin")))
    rest = torch.cat([x.flatten() for x in seen]).double() * 7.07 % 1
    assert (rest - 0.5).abs().min() > 1e-4  # no figure is so near to being rounded the other way
    before = sr.format_of(config)
    monkeypatch.setattr(sr, "features", lambda x: features(x) / 2)
    assert sr.format_of(config) != before


@pytest.mark.parametrize("arch", ["own", "gpt2"])
def test_logits_do_not_look_ahead_and_sampling_gives_what_the_whole_gives(arch):
    net = small_net(arch)
    for p in net.body.parameters():  # blocks begin as nothing
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    context = small_context(net)
    greedy = net.sample(context, 2, torch.Generator(), 0.0, masked=False)
    assert (greedy[:, 0] == greedy[:, 1]).all()
    labels = torch.from_numpy(np.pad(greedy[:, 0], ((0, 0), (0, 1))).astype(np.int64))
    with torch.no_grad():
        logits = net(context, labels)
        changed = labels.clone()
        changed[:, 4:] = sr.ONE
        assert torch.allclose(net(context, changed)[:, :5], logits[:, :5], atol=1e-5)
        assert not torch.allclose(net(context, changed)[:, 5:], logits[:, 5:], atol=1e-3)
    said = np.cumsum(greedy[:, 0] == sr.EOS, 1) == 0
    assert (logits.argmax(-1).numpy()[:, :9][said] == greedy[:, 0][said]).all()


@pytest.mark.parametrize("arch", ["own", "gpt2"])
def test_a_gradient_reaches_every_parameter_and_padding_is_not_asked(arch):
    net = small_net(arch).train()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    targets, _ = programs(3, replace(PLAIN, max_size=9))
    labels = sr.labels_of(targets)
    assert ((labels == sr.EOS).sum(1) == 1).all() and labels.shape == (3, (targets != 0).sum(1).max() + 1)
    losses = sr.token_losses(net(small_context(net), labels), labels)
    assert ((losses > 0) == (labels != sr.PAD)).all()
    losses.sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused in ([], ["body.body.wte.weight"])  # GPT-2's own embedding, of one token


def test_masked_samples_are_whole_programs_of_every_size():
    net = small_net()
    rows = net.sample(small_context(net), 200, torch.Generator().manual_seed(0), 2.0).reshape(-1, 9)
    sr.check_programs(rows, PLAIN)
    assert sr.whole(rows, PLAIN).all() and set((rows != 0).sum(1)) >= {1, 2, 5, 8, 9}
    tokens, _ = programs(50, replace(PLAIN, max_size=9))
    assert sr.whole(tokens, PLAIN).all()
    spoilt = tokens.copy()
    spoilt[:, 0] = sr.ADD
    for rows in (spoilt, np.array([[sr.EOS] + [0] * 8, [sr.X0 + 2] + [0] * 8, [sr.C] + [0] * 8, [0] * 9]),
                 net.sample(small_context(net), 100, torch.Generator().manual_seed(0), masked=False).reshape(-1, 9)):
        for row, ok in zip(rows, sr.whole(rows, PLAIN), strict=True):
            row = np.where(np.cumsum(row == sr.EOS) > 0, 0, row)
            try:
                sr.check_programs(row[None], PLAIN)
                assert ok == (not (row == sr.C).any())
            except UserError:
                assert not ok


# ---- Whole runs

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sr") / "run"
    sr.main(["--threads", "1", *SMALL, "--out-dir", str(folder)])
    return folder


def rows_of(folder):
    return [{k: v for k, v in row.items() if k != "sec"} for row in metrics.read(folder)]


def test_a_run_generates_trains_diagnoses_and_searches(folder):
    summary = read_json(folder / "summary.json")
    assert set(summary["methods"]) == {*sr.METHODS, "gp, timed", "mix, timed"} and set(summary["figures"]) == set(sr.SPLITS)
    assert summary["differences"].keys() == {*(f"mix - {name}" for name in ("gp", "net", "random", "wrong")),
                                             "mix, timed - gp, timed"}
    assert all(table["valid_masked"] == 1 for table in summary["figures"].values())
    rows = metrics.read(folder)
    assert [row["step"] for row in rows] == [0, 2, 4] and rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[-1]["epoch"] == pytest.approx(4 * 16 / len(sr.generate(sr.parse_args(SMALL)).examples["train"].targets))
    for name in ("training", "first_tokens", "solve_rates", "problems"):
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_an_epoch_has_each_example_once(flags, data):
    examples = data.examples["train"]
    n, args = len(examples.targets), replace_flags(flags, batch_size=7)
    numbered = examples._replace(generation=np.arange(n))
    seen = np.concatenate([sr.epoch_batch(numbered, args, step).generation for step in range(-(-2 * n // 7))])
    assert sorted(seen[:n]) == sorted(seen[n:2 * n]) == list(range(n)) and (seen[:n] != seen[n:2 * n]).any()


def replace_flags(args, **values):
    out = copy.copy(args)
    for name, value in values.items():
        setattr(out, name, value)
    return out


@pytest.mark.parametrize("rounds, at", [(0, 2), (1, 3)])
def test_resume_equals_an_unbroken_run(tmp_path, monkeypatch, capsys, rounds, at):
    save, args = run.Run.save, ["--threads", "1", "--mode", "train", *SMALL_NET, "--rounds", str(rounds),
                                "--eval-every", "1", *SMALL_SEARCH * rounds]
    sr.main([*args, "--out-dir", str(tmp_path / "unbroken")])
    said = capsys.readouterr().out
    assert said.count("round 1: mix solved") == rounds and "solved 0.0%" not in said

    def stop(self, name, **fields):
        save(self, name, **fields)
        if name == "last.pt" and self.step == at:
            raise KeyboardInterrupt
    monkeypatch.setattr(run.Run, "save", stop)
    with pytest.raises(SystemExit):
        sr.main([*args, "--out-dir", str(tmp_path / "run")])
    monkeypatch.setattr(run.Run, "save", save)
    sr.main(["--resume", str(tmp_path / "run")])
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "unbroken")
    one, two = (torch.load(tmp_path / name / "last.pt") for name in ("unbroken", "run"))
    assert all(torch.equal(x, two["model"][name]) for name, x in one["model"].items())
    assert len(one["found"]) == rounds and all(torch.equal(a, b) for a, b in zip(*(sum(x["found"], []) for x in (one, two)), strict=True))


def test_constants_leave_a_program_with_their_operators():
    for text, bare in (("2.5*x0*x0 - 0.75*x1 + 3.0", "((x0 * x0) - x1)"), ("1.5 + -2.0*sin(x0)", "sin(x0)"), ("3.0", "")):
        left = sr.without_constants(sr.parse(text)[0])
        assert (sr.infix(left) if left else "") == bare


def test_a_net_proposes_from_python_also_with_more_variables_than_it_knows(folder):
    propose = sr.load(str(folder))
    rng = np.random.default_rng(0)
    X = rng.uniform(1, 3, (30, 4))
    out = propose(X, X[:, 1] * X[:, 3], ["x1 + x3", "x1"], n=20)
    assert len(out) == 20 and out == propose(X, X[:, 1] * X[:, 3], ["x1", "x1 + x3"], n=20)
    used = {name for text in out for name in ("x0", "x1", "x2", "x3") if name in text}
    assert used <= {"x1", "x3"} and used
    assert not any("x1" in text for text in propose(X[:, :1], X[:, 0] ** 2, n=50))
    for bad in (lambda: propose(X, np.ones(30)), lambda: propose(X[:5], X[:, 0]), lambda: propose(X, X[:, 0], ["y"]),
                lambda: propose(X, X[:, 0], ["2.5*x1"]), lambda: propose(X, X[:, 0], temperature=0),
                lambda: propose(X, X[:, 0], ["x1*x1*x1*x1*x1*x1"]), lambda: propose(X, X[:, 0], temperature=math.nan),
                lambda: propose(X[:, :0], X[:, 0]), lambda: propose([["a"]] * 4, range(4)), lambda: propose(X, X[:, 0], n=2.5),
                lambda: propose(X, X[:, 0] * 1j), lambda: propose([[1], [2, 3], [4]], [1, 2, 3])):
        with pytest.raises(UserError):
            bad()


def test_examples_of_a_file_are_those_that_were_made(folder, tmp_path, capsys):
    sr.main(["--threads", "1", "--mode", "gen", *SMALL_DATA, "--out-dir", str(tmp_path / "gen")])
    out = sr.main(["--threads", "1", "--mode", "eval", "--net", str(folder), "--data",
                   str(tmp_path / "gen/data.npz"), "--out-dir", str(tmp_path / "eval")])
    assert "hash " + read_json(folder / "summary.json")["data"] in capsys.readouterr().out
    assert out["figures"]["test"]["loss"] == pytest.approx(read_json(folder / "summary.json")["figures"]["test"]["loss"])
    with pytest.raises(SystemExit, match="was made with 20000"):
        sr.main(["--mode", "train", "--data", str(tmp_path / "gen/data.npz"), "--functions", "1600", "--out-dir",
                 str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="holds a part"):
        sr.main(["--mode", "train", "--data", str(folder / "data.npz"), "--out-dir", str(tmp_path / "part")])
    with np.load(tmp_path / "gen/data.npz") as z:
        whole = dict(z)
    for change in ({"train_targets": whole["train_targets"][:-1]}, {"flags": np.array("{'ops': [")}, {"val_targets": whole["val_targets"][:0]},
                   {"flags": np.array(str(whole["flags"]).replace("solution", "foo"))}, {"train_function": whole["train_function"] - 9**6},
                   {"train_members": whole["train_members"] * 0 + sr.ADD}, {"train_targets": whole["train_targets"][::-1]}):
        np.savez(tmp_path / "bad.npz", **{**whole, **change})
        with pytest.raises(SystemExit, match="bad.npz|program"):
            sr.main(["--mode", "train", "--data", str(tmp_path / "bad.npz"), "--out-dir", str(tmp_path / "bad")])
    assert not (tmp_path / "bad").exists()
    (tmp_path / "cut.npz").write_bytes((tmp_path / "gen/data.npz").read_bytes()[:-100])
    with pytest.raises(SystemExit, match="damaged"):
        sr.main(["--mode", "train", "--data", str(tmp_path / "cut.npz")])


def test_figures_of_a_checkpoint_are_those_of_its_run(folder):
    out = sr.evaluate_checkpoint(str(folder), None)
    assert out["figures"]["test"]["loss"] == read_json(folder / "summary.json")["figures"]["test"]["loss"]
    assert "match_best_of_32" in sr.format_evaluation(out)


@pytest.mark.parametrize("flags, message", [
    (["--ops", "add,foo"], "expected some of"), (["--ops", ""], "expected some of"), (["--net", ""], "empty"),
    (["--evaluations", "10"], "fewer than"), (["--target-size", "20"], "no room"), (["--hidden", "10", "--heads", "3"],
     "divided"), (["--temperature", "0"], "temperature"), (["--steps", "9", "--rounds", "1"], "equal parts"), (["--method", "gp,gp"],
     "expected some of"), (["--objective", "x"], "choice")])
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        sr.main(flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_a_checkpoint_of_another_kind_is_refused(folder, tmp_path):
    saved = torch.load(folder / "best.pt")
    for change, message in (({"context": "another"}, "in another way"), ({"config": {**saved["config"], "hidden": 0}}, "hidden"), ({"data": "0"}, "hash 0")):
        torch.save({**saved, **change}, tmp_path / "best.pt")
        with pytest.raises(SystemExit, match=message):
            sr.main(["--mode", "eval", "--net", str(tmp_path / "best.pt"), "--out-dir", str(tmp_path / "out")])
    (tmp_path / "best.pt").write_bytes((folder / "best.pt").read_bytes()[:-50])
    with pytest.raises(SystemExit, match="best.pt"):
        sr.main(["--mode", "eval", "--net", str(tmp_path / "best.pt"), "--out-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- Published problems

@pytest.mark.parametrize("set_name, i, x, y", [
    ("nguyen", 4, [0.5], 0.984375), ("nguyen", 7, [1.0], 2 * math.log(2)), ("nguyen", 8, [4.0], 2.0), ("pagie", 1, [1.0, 1.0], 1.0),
    ("keijzer", 7, [1.0], 0.0), ("livermore", 7, [1.0], math.sinh(1)), ("feynman", 3, [1.0, 1.0, 1.0], 1.0),
    ("feynman", 6, [1.0, 2 * math.pi, 1.0, 1.0, 1.0], 2 * math.pi / (math.pi**2 * (math.e - 1))), ("koza", 3, [2.0], 36.0)])
def test_published_problems_are_as_published(set_name, i, x, y):
    tokens, constants = sr.parse(sr.PROBLEM_SETS[set_name][i - 1 - (set_name == "keijzer" and i > 6)].split(":")[0])
    value = sr.evaluate(np.array([tokens]), np.array([[x]]), None, np.array([constants]))
    assert value[0, 0] == pytest.approx(y, abs=1e-12)


def test_all_published_problems_have_data_and_their_truth_is_recovered():
    for name, rows in sr.PROBLEM_SETS.items():
        for i, row in enumerate(rows):
            p = sr.published(name, i, 0.0, 7)
            assert np.isfinite(p.y).all() and len(p.y) == int(row.split(";")[1])
            truth = sr.parse(row.split(":")[0])
            assert sr.judged(p, [truth])[:2] == (True, True), row
            assert sr.judged(p, [sr.parse("x0*0.3")])[0] is False


def test_with_noise_the_form_and_five_percent_of_the_constants_count():
    p = sr.published("six", 4, 0.05, 0)
    assert p.noise == 0.05 and sr.judged(p, [sr.parse("2.52*exp(-0.71*x0) + 1.29")])[:2] == (True, True)
    assert sr.judged(p, [sr.parse("2.52*exp(-0.71*x0) + 1.29 + 0.001*x0")])[:2] == (True, False)
    assert sr.judged(p, [sr.parse("2.5*exp(-0.9*x0) + 1.4")])[:2] != (True, True)
    assert sr.judged(p, [sr.parse("2.5*exp(-0.7*x0) + 2")])[0] is False
