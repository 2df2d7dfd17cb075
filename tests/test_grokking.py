"""common/evaluation.py: the detector of grokking, on synthetic curves and as a command."""
from collections import Counter

import numpy as np
import pytest

from common import evaluation, metrics
from common.evaluation import grokking
from common.files import UserError


def label(train, val, steps=None, n_val=1000):
    return grokking(range(0, 100 * len(train), 100) if steps is None else steps, train, val, n_val)["label"]


# ---- families of noisy curves, 60 evaluations

def families(rng):
    """One curve of each family: name, train and val without their noise, what it is."""
    u, t = rng.uniform, np.arange(60.0)

    def rise(at, width, low=0.1, high=1.0):
        return low + (high - low) / (1 + np.exp(-(t - at) / width))
    learned, at, width, peak = rise(u(2, 5), u(0.5, 0.9)), u(6, 20), u(1.5, 4), u(18, 30)
    yield "late", learned, rise(u(32, 38), u(0.5, 2), high=u(0.93, 1)), "grokking"
    yield "mid", learned, rise(u(18, 22), u(0.5, 1), high=u(0.93, 1)), "grokking"
    yield "ordinary", rise(at, width), rise(at + u(0, 0.7) * width, width, high=u(0.9, 1)), "joint_generalisation"
    yield "catching up", learned, np.clip(0.1 + 0.85 * (t - u(3, 6)) / u(40, 52), 0.1, 0.95), "delayed_generalisation"
    yield "memorised", learned, rise(u(3, 8), 1, high=u(0.1, 0.5)), "memorised"
    yield "flat", 0 * t + 0.567, 0 * t + 0.444, "not_saturated"
    yield "val alone", rise(u(3, 10), 2, 0.3, u(0.5, 0.85)), rise(u(20, 40), 1), "not_saturated"
    yield "lost again", learned, rise(peak, 0.8) - rise(peak + u(8, 20), u(0.5, 2), 0, u(0.45, 0.8)), "collapsed"


@pytest.mark.parametrize("n_val", [100, 300])
def test_each_of_200_noisy_curves_of_a_family_has_its_label(n_val):
    rng, found, expected = np.random.default_rng(0), Counter(), {}
    for _ in range(200):
        for name, train, val, truth in families(rng):
            train, val = (rng.binomial(n, p.clip(0, 1)) / n for n, p in ((300, train), (n_val, val)))
            found[name, label(train, val, n_val=n_val)] += 1
            expected[name, truth] = 200
    assert found == expected and len(expected) == 8


# ---- the rule

def story(saturated=2, top=1.0, low=0.1, at=10, high=1.0, width=0.0, n=20, end=None, dip=None):
    """Curves without noise: train jumps to `top`, val rises in a line of `width` evaluations, by default at once.

    end: val of the last 4 evaluations. dip: train of the evaluations 5 and 6.
    """
    k = np.arange(n)
    train = np.where(k < saturated, 0.1, top)
    val = low + (high - low) * (np.clip((k - at) / width, 0, 1) if width else k >= at)
    if end is not None:
        val[-4:] = end
    if dip is not None:
        train[5:7] = dip
    return train, val


def test_the_numbers_are_those_of_the_curves():
    assert grokking(range(0, 2000, 100), *story(), 1000) == pytest.approx({
        "label": "grokking", "evaluations": 20, "saturated_at": 200, "gap": 0.9, "rise": 0.9, "fall": 0,
        "counts_from": 0.3, "best_val": 1, "half_at": 1000, "half_evaluations_later": 8, "plateau_steps": 720,
        "rise_steps": 60, "rise_evaluations": 0.6, "mean_gap_behind": 0})


@pytest.mark.parametrize("inside, outside, other", [
    ({"at": 5, "n": 8}, {"at": 5, "n": 7}, "insufficient"),
    ({"top": 0.95}, {"top": 0.94}, "not_saturated"),
    ({"dip": 0.90}, {"dip": 0.89}, "delayed_generalisation"),            # then it saturates behind the dip
    ({"low": 0.69}, {"low": 0.71}, "joint_generalisation"),
    ({"top": 0.95, "high": 0.81}, {"top": 0.95, "high": 0.79}, "memorised"),
    ({"end": 0.71}, {"end": 0.69}, "collapsed"),
    ({"at": 5}, {"at": 4}, "delayed_generalisation"),                    # 3 evaluations, or 2
    ({"saturated": 5}, {"saturated": 5, "at": 9}, "delayed_generalisation"),     # twice the steps
    ({"at": 8, "width": 5}, {"at": 8, "width": 7}, "delayed_generalisation"),    # 3 of 7 evaluations, 4.2 of 7.4
    ({"at": 4, "width": 3}, {"at": 4, "width": 4}, "delayed_generalisation"),    # 1.8 of 2.6, 2.4 of 2.8
    ({"high": 0.86}, {"high": 0.84}, "delayed_generalisation")])
def test_each_constant_parts_grokking_from_another_label(inside, outside, other):
    assert (label(*story(**inside)), label(*story(**outside))) == ("grokking", other)


def test_few_problems_make_small_gaps_and_rises_count_less():
    assert [label(*story(low=0.6), n_val=n) for n in (9, 100)] == ["joint_generalisation", "grokking"]
    assert [label(*story(low=0.5, high=0.9), n_val=n) for n in (9, 100)] == ["memorised", "grokking"]
    assert grokking(range(20), *story(), 9)["counts_from"] == pytest.approx(2.8 * (0.25 / 9) ** 0.5)


# ---- what could be taken for grokking, or grokking for something else

def test_evaluations_without_a_number_are_left_out():
    train, val = (list(x) for x in story())
    for k in (3, 9, 12):
        train.insert(k, 0.0)
        val.insert(k, None if k == 9 else np.nan)
    train[15] = np.nan
    got = grokking(range(23), train, val, 1000)
    assert (got["label"], got["evaluations"]) == ("grokking", 19)
    assert label(*([*x, *[np.nan] * 20] for x in story(n=7))) == "insufficient"


def test_one_evaluation_alone_changes_nothing():
    for k, truth in ((6, "grokking"), (15, "grokking"), (19, "grokking"), (6, "memorised"), (19, "memorised")):
        train, val = story(high=1.0 if truth == "grokking" else 0.1)
        for curve in (train, val):
            changed = curve.copy()
            changed[k] = 1.0 - curve[k]
            pair = (changed, val) if curve is train else (train, changed)
            assert label(*pair) == truth, (k, truth)


def test_val_above_train_is_joint_generalisation():
    train = np.linspace(0.1, 1, 20)
    assert label(train, np.minimum(train + 0.2, 1)) == "joint_generalisation"


@pytest.mark.parametrize("first", [0, 1, 700])
def test_train_that_is_saturated_at_the_first_evaluation_shows_no_grokking(first):
    train, val = story(saturated=0, at=12)
    steps = first + 100 * np.arange(20)
    assert label(train, val, steps) == "delayed_generalisation"
    assert label(np.r_[0.1, 0.1, train], np.r_[0.1, 0.1, val]) == "grokking"     # its start was cut off


@pytest.mark.parametrize("steps", [
    np.r_[0:201:10, 1000:8001:1000], np.r_[0:1000:10, 1000:30001:1000], np.r_[0:1000:100, 1000:8001:10],
    np.r_[0, 10 * 1.3 ** np.arange(28)]], ids=["sparse late", "very sparse late", "dense late", "logarithmic"])
def test_a_slow_rise_is_not_sharp_and_a_sharp_one_is_however_the_evaluations_are_spaced(steps):
    train = np.where(steps < 100, 0.1, 1.0)
    for until in (1000, 1200, 1500, 2500, 4000, 6000):                       # in a line from saturation on
        assert label(train, np.interp(steps, [100, until], [0.1, 1]), steps) == "delayed_generalisation", until
    assert label(train, np.where(steps < 5000, 0.1, 1.0), steps) == "grokking"


def test_the_same_curves_have_the_same_label_at_any_number_of_steps_and_of_evaluations():
    for at, width, truth in ((10, 1, "grokking"), (3, 12, "delayed_generalisation")):
        for per in (1, 3, 10):                                               # evaluations in place of one
            k = np.arange(20 * per) / per
            train, val = (np.interp(k, range(20), x) for x in story(at=at, width=width))
            for scale in (0.01, 1, 1e6):
                assert label(train, val, scale * k) == truth


def test_train_may_dip_behind_the_rise_and_what_falls_with_it_has_collapsed():
    train, val = story()
    train[14:16] = val[14:16] = 0.2
    assert label(train, val) == "grokking"
    train[14:] = val[14:] = 0.2
    assert label(train, val) == "collapsed"
    train, val = story(at=3, saturated=3)
    val[12:] = 0.4
    assert label(train, val) == "collapsed"                                  # after joint generalisation too
    train, val = story(saturated=10, low=0.4, high=0.4)
    val[4:9] = 0.9
    assert label(train, val) == "collapsed"                                  # and before train was saturated
    val[4:9], val[9:] = 0.7, 0.1
    assert label(train, val) == "memorised"                                  # it had not generalised


def test_train_that_was_saturated_only_on_an_easier_set_has_not_memorised():
    k = np.arange(30)                                                        # from 10 on the problems are harder
    train = np.where((k >= 2) & (k < 10), 1.0, np.clip((k - 10) / 15, 0, 1))
    assert label(train, np.clip((k - 11) / 15, 0, 1)) == "joint_generalisation"


def test_a_model_that_had_generalised_before_it_memorised_does_not_grok():
    k = np.arange(40)                                                        # epoch-wise double descent
    train, val = np.clip(k / 10, 0, 1), np.interp(k, [0, 7, 10, 25, 28, 40], [0, 0.9, 0.4, 0.4, 0.95, 0.95])
    assert label(train, val) == "joint_generalisation"
    assert label(train, np.where(k < 10, 0.3, val)) == "grokking"            # the same without its first hill


def test_a_rise_of_two_evaluations_does_not_last():
    train, val = story(high=0.1)
    val[10:12] = 1.0
    assert label(train, val) == "collapsed"
    assert label(train, np.where(np.arange(20) % 4 < 2, val, 1 - val)) != "grokking"


@pytest.mark.parametrize("train, val, steps, text", [
    ([0.5, 1.1], [0, 0], [0, 1], "1.1 is no accuracy"), ([0, 0], [0.5, -0.1], [0, 1], "-0.1 is no accuracy"),
    ([0, 0], [0, np.inf], [0, 1], "inf is no accuracy"), ([0, 0], [0, 0], [1, 1], "the steps do not rise"),
    ([0, 0], [0, 0], [1, 0], "the steps do not rise")])
def test_what_is_no_curve_of_accuracies_is_refused(train, val, steps, text):
    with pytest.raises(UserError, match=text):
        grokking(steps, train, val, 100)


# ---- the command

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose seed 0 memorises and seed 3 groks; its last rows come first, and some have an empty cell."""
    folder, stories = tmp_path_factory.mktemp("run"), {0: story(high=0.1), 3: story()}
    for k in range(19, -1, -1):
        for seed, (train, val) in stories.items():
            row = {"step": 100 * k, "seed": seed, "kind": 1, "train": train[k], "loss": 2.0 + k}
            metrics.write(folder / "metrics.csv", {**row, "val": val[k]})
            metrics.write(folder / "metrics.csv", {**row, "step": 100 * k + 50, "val": None})
    return folder


def command(run, *flags):
    evaluation.main([str(run), "--train", "train", "--val", "val", "--n", "500", *flags])


def test_the_command_names_the_label_and_the_numbers_of_the_rows_that_it_was_asked_for(run, capsys):
    command(run, "--where", "seed=3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "grokking" and {"  evaluations 20", "  saturated_at 200", "  half_at 1000"} <= set(lines)
    command(run / "metrics.csv", "--where", "seed=0", "--where", "kind=1", "--n", "100")
    out = capsys.readouterr().out
    assert out.startswith("memorised\n") and "too small" not in out
    command(run, "--where", "seed=3", "--n", "99")
    out = capsys.readouterr().out
    assert out.startswith("grokking\n") and out.endswith(
        "n 99 is too small: no label from fewer than 100 problems can be trusted\n")


@pytest.mark.parametrize("flags, text", [
    (["--train", "no"], "no column 'no' in its metrics (it has: step, seed, kind, train, loss, val)"),
    (["--where", "no=1"], "no column 'no' in its metrics (it has: step, seed, kind, train, loss, val)"),
    (["--where", "seed=7"], "no row that has train and val is left by --where"),
    (["--where", "seed=0", "--where", "seed=3"], "no row that has train and val is left by --where"),
    ([], "the steps do not rise: if these are several runs, choose one by --where"),
    (["--train", "loss", "--where", "seed=3"], "2 is no accuracy: train and val are wanted as rates in 0..1"),
    (["--n", "0"], "argument --n: 0 is not in 1.."), (["--where", "seed"], "expected COLUMN=NUMBER"),
    (["--where", "=3"], "expected COLUMN=NUMBER"), (["--where", "seed="], "argument --where: '' is not a number"),
    (["--where", "seed=x"], "argument --where: 'x' is not a number")])
def test_bad_input_is_one_line_and_an_exit_code(run, flags, text, capsys):
    with pytest.raises(SystemExit) as e:
        command(run, *flags)
    message = capsys.readouterr().err or e.value.code + "\n"
    assert text in message and message.startswith("common.evaluation: error: ")
    assert message.count("\n") == 1 and e.value.code not in (0, None)


def test_a_run_without_rows_and_one_that_is_not_there_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no such metrics file$"):
        command(tmp_path)
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(SystemExit, match=r"no column 'step' in its metrics \(it has: no rows\)$"):
        command(tmp_path)
