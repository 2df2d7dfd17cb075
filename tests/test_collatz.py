"""collatz.py: figures of the closed form, the split, the model, what each flag does, resume, the command line."""
import argparse
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_collatz_arithmetic import from_limbs
from torch.nn import init

import collatz
from common import metrics
from common.files import UserError

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "logs" / "kept" / "collatz"
SMALL = "--steps 12 --pool 400 --train-seeds 12 --batch-size 32 --segment 8 --layers 16 --digits 3 " \
        "--eval-every 4 --test-every 6".split()
SETS = {"EVAL_TRAJECTORIES": 3, "VALIDATION_ROWS": 100, "VALIDATION_TRAJECTORIES": 3, "LOOKAHEADS": (5, 20)}
REAL_ODD = collatz.random_odd
HEAVY = "--curriculum 8 --mine-negatives --mine-interval 3 --use-t4 --target-type adaptive".split()


@pytest.fixture(scope="module", autouse=True)
def small_sets():
    """Small evaluation sets, so that a run takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETS.items():
            patch.setattr(collatz, name, value)
        yield


@pytest.fixture(scope="module")
def exam():
    """The real evaluation sets at lookahead 10."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(SETS, (200, 10_000, 100, (5, 100)), strict=True):
            patch.setattr(collatz, name, value)
        return collatz.make_exam(None, 10)


@pytest.fixture(scope="module")
def rows_csv(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("rows") / "eval.csv")
    numbers = collatz.eval_numbers(rows=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collatz, "eval_numbers", lambda: numbers)
        collatz.make_eval_csv(path)
    return path


@pytest.fixture(scope="module")
def trained(rows_csv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    small(rows_csv, folder)
    return folder


def small(rows_csv, out_dir, *flags):
    return collatz.main([*SMALL, "--eval-csv", rows_csv, "--out-dir", str(out_dir), *flags])


def setting(rows_csv, *flags):
    """Flags, evaluation sets and pools of a small run."""
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, *flags])
    exam = collatz.make_exam(args.eval_csv, args.lookahead)
    return args, exam, collatz.make_pools(args, exam)


def random_model(args, std=0.3):
    torch.manual_seed(0)
    model = collatz.Lyapunov(collatz.make_config(args))
    for p in model.parameters():
        init.normal_(p, std=std)
    return model


def tensors(p):
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in (p.lg, p.k, p.res)]


def read(path):
    return torch.load(path, weights_only=True)


def closed(lookahead):
    return collatz.baselines(lookahead)["closed form"]


def one_line(e, capsys) -> str:
    """The message of a SystemExit, which is one line."""
    text = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert e.value.code not in (0, None) and "error: " in text and "\n" not in text and "Traceback" not in text
    return text


# ---- the closed form and the evaluator

@pytest.mark.parametrize("lookahead, seeds, pass_rate", [
    (10, [2, 9, 8, 18, 27], 0.94356), (20, [0, 5, 4, 11, 13], 0.98134), (50, [0, 0, 0, 0, 0], 0.99890)])
def test_closed_form_has_its_known_figures(lookahead, seeds, pass_rate):
    out = collatz.evaluate(closed(lookahead), collatz.make_exam(None, lookahead))
    assert list(out["violations"].values()) == seeds
    assert out["odd_steps"] == {"111": 24, "27": 41, "703": 62, "26623": 113, "626331": 189}
    assert out["pass_rate"] == pytest.approx(pass_rate, abs=1e-5)


def test_a_perfect_v_scores_1_and_constant_and_broken_ones_0(exam):
    def time_to_one(p):  # perfect on trajectories that reach 1 within the walk
        return np.cumsum((p.lg > 0.5)[:, ::-1], axis=1)[:, ::-1][:, :p.lg.shape[1] - 10].astype(float)

    def constant(p):
        return np.ones((len(p.k), p.lg.shape[1] - 10))
    out = collatz.evaluate(time_to_one, exam)
    assert out["violations_total"] == out["record_violations"] == 0 and out["on_trajectory_pass_rate"] == 1
    for broken in (constant, lambda p: constant(p) * np.nan):  # ties and NaN fail
        out = collatz.evaluate(broken, exam)
        assert out["violations_total"] == 429 and out["record_violations"] == 2104
        assert out["pass_rate"] == out["on_trajectory_pass_rate"] == 0
        assert math.isnan(out["margin_quantiles"]["0.5"])


def test_rates_weigh_as_defined(rows_csv):
    exam = collatz.make_exam(rows_csv, 10)
    out, v = collatz.evaluate(closed(10), exam), closed(10)(exam.rows)
    ok, grows, w = v[:, 0] > v[:, 1], exam.rows.lg[:, 1] > exam.rows.lg[:, 0], collatz.default_rows()[1][:200]
    free = np.array([n % 3 == 0 for n in collatz.eval_numbers(rows=200)])
    want = [ok.mean(), np.average(ok, weights=w), ok[grows].mean(), np.average(ok[grows], weights=w[grows])]
    assert [out[key] for key in collatz.RATES] == pytest.approx(want, abs=1e-3)
    assert out["pass_rate_not_divisible_by_3"] == ok[~free].mean() and out["n_rows"] == 200


def test_a_v_of_the_mantissa_is_exposed(exam):
    def steps_to_interval(p):  # steps until the fraction of log2 n + j log2 3 enters [0, 0.01): knows no k at all
        x = p.lg[:, :p.lg.shape[1] - 10] % 1.0
        steps, alive = np.zeros_like(x), np.ones(x.shape, bool)
        while alive.any():
            alive &= x >= 0.01
            steps += alive
            x = (x + collatz.LOG2_3) % 1.0
        return steps
    out = collatz.evaluate(steps_to_interval, exam)
    assert out["pass_rate"] > 0.99 > out["on_trajectory_pass_rate"] + 0.005  # better than the published net
    assert abs(out["slope"]) < 0.01 and math.isnan(out["margin_quantiles"]["0.5"])
    grown = collatz.evaluate(lambda p: steps_to_interval(p) + p.lg[:, :p.lg.shape[1] - 10], exam)
    assert grown["v_above_log2n"][1] > 200  # bits above log2 n


# ---- the model

@pytest.mark.parametrize("lookahead, count", [(10, 4_405_250), (20, 4_425_730), (100, 4_589_570)])
def test_original_net_has_the_published_size(lookahead, count):
    args = collatz.parse_args(["--preset", "original", "--lookahead", str(lookahead),
                               "--layers", "2048,1024,1024,512,512,512,256,128,64"])
    assert collatz.count_parameters(collatz.Lyapunov(collatz.make_config(args))) == count


def test_original_features_by_hand():
    lg, k, res = tensors(collatz.paths(collatz.to_limbs([27]), 4))
    x = collatz.original_features(lg[:, :5], k[:, :4], res[:, 0])[0].tolist()
    ks = [1, 2, 1, 1]  # 27, 41, 31, 47, 71
    want = [math.log10(27) / 40, 0, 0, 0, 27 / 80, (4 * math.log2(3) - 5) / 10, *(i / 10 for i in ks)]
    assert x == pytest.approx(want, abs=1e-6)


def test_untrained_net_is_the_closed_form():
    # the net sees one k: the maximum runs over L - 1 nodes behind, so it is the closed form of lookahead L - 1
    p = collatz.paths(collatz.random_odd(np.random.default_rng(0), 300, 2), 11)
    model = collatz.Lyapunov(collatz.Config(10, "window", (16,), digits=3, hold=0))
    assert np.allclose(model.value(p), closed(9)(p)[:, :2], atol=1e-6)
    assert torch.equal(model(*tensors(p)), torch.from_numpy(model.value(p)))  # forward is V


@pytest.mark.parametrize("flags", ["window --hold 0", "window --sees 4", "log", "log --sees 2", "none"])
def test_v_looks_at_lookahead_values_of_k_and_no_more(flags):
    model = random_model(collatz.parse_args([*SMALL, "--model", *flags.split()]))

    def terms(change_at):  # what V(n) is made of
        p = collatz.paths(collatz.to_limbs([2**90 + 12345]), 11)
        p.k[0, change_at] += 3
        p.lg[0, change_at + 1:] += 20
        with torch.no_grad():
            return model.terms(*tensors(p))[0, :model.config.window + 1]
    plain = terms(10)
    assert [torch.equal(terms(j), plain) for j in range(11)] == [False] * 10 + [True]


@pytest.mark.parametrize("flags", ["window --sees 2 --hold 3", "log", "log --sees 1", "none"])
def test_v_is_positive_and_the_fall_in_the_loss_has_the_sign_of_its_margin(flags):
    model = random_model(collatz.parse_args([*SMALL, "--model", *flags.split()]))
    p = collatz.paths(collatz.random_odd(np.random.default_rng(1), 500, 2), 18)
    v, chains = model.value(p), dict(zip(("lg", "k", "res"), tensors(p), strict=True))
    assert v.min() > 0
    with torch.no_grad():
        w = model.terms(*tensors(p))
        for s in (1, 4, 8):
            fall = collatz.falls(model, chains, w, s, 1, 0.0)[:, 0].numpy()
            soft = collatz.falls(model, chains, w, s, 1, 1e-4)[:, 0].numpy()
            margin = v[:, 0] - v[:, s]
            clear = (np.abs(fall) > 0.02) & (np.abs(margin) > 0.02) & (p.lg[:, s + 10] > 0.5)
            assert clear.sum() > 50 and (np.sign(fall) == np.sign(margin))[clear].all()
            assert np.allclose(fall, soft, atol=1e-2)  # a soft maximum tends to the maximum
            assert (fall[p.lg[:, s + 10] > 0.5] != 0).all()  # no term stands on both sides


@pytest.mark.parametrize("flags", ["", "--model log --sees 1", "--model log", "--preset original --target-type adaptive"])
def test_every_parameter_gets_a_gradient_and_the_loss_follows_the_net(rows_csv, flags):
    args, _, pools = setting(rows_csv, *flags.split())
    model, parts = random_model(args), collatz.sample_batch(pools, args, 0)
    loss = collatz.batch_loss(model, parts, args, 0)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    net = model.net
    model.net = lambda *x: 0.5 * net(*x)
    assert collatz.batch_loss(model, parts, args, 0) != loss


# ---- the split

def forbidden_numbers(args):
    """Everything the report evaluates on or that validation uses, with Python integers."""
    walk, row, validation = (np.random.default_rng([collatz.EVAL_SEED, i]) for i in range(3))
    rows = from_limbs(collatz.read_eval_csv(args.eval_csv)[0]) + from_limbs(collatz.random_odd(row, 100, 2))
    walks = [*collatz.TEST_SEEDS, *collatz.RECORD_SEEDS, *from_limbs(collatz.random_odd(walk, 3, 128)),
             *from_limbs(collatz.random_odd(validation, 3, 8))]
    return set(rows).union(*map(collatz.trajectory, walks))


@pytest.mark.parametrize("flags", ["", "--model log", "--model log --sees 2 --use-t8", "--hold 3 --use-t4",
                                   "--preset original --train-seeds 60 --use-t8"])
def test_no_gradient_reaches_the_net_from_a_forbidden_number(rows_csv, monkeypatch, flags):
    monkeypatch.setattr(collatz, "random_odd", lambda rng, n, lo: REAL_ODD(rng, n, lo, max(lo, 24)))
    args, exam, pools = setting(rows_csv, "--train-seeds", "60", *flags.split(), "--pool", "3000", "--batch-size",
                                "400", "--hard-ratio", "0.3")
    model, forbidden = random_model(args), forbidden_numbers(args)
    collatz.mine(model, pools, args, exam, 0)
    seen, net = [], model.net

    def spy(lg, k, res):  # the numbers are told by log2, exact in float32 below 2^24
        u = net(lg, k, res)
        u.retain_grad()
        seen.append((lg[..., 0], u))
        return u
    model.net = spy
    parts = collatz.sample_batch(pools, args, 0)
    assert [len(chains["k"]) for chains, _, _ in parts] == [120, 280]
    collatz.batch_loss(model, parts, args, 0).backward()
    reached, others = set(), set()
    for lg, u in seen:
        numbers = [round(2**x) | 1 for x in lg.flatten().double().tolist()]
        for n, g in zip(numbers, u.grad.flatten().tolist(), strict=True):
            if 1 < n < 2**16:
                (reached if g else others).add(n)
    assert len(reached) > 50 and others & forbidden
    assert not (reached | {collatz.syracuse(n)[0] for n in reached}) & forbidden


def test_validation_shares_no_number_with_the_test_sets(exam):
    walk, row, validation = (np.random.default_rng([collatz.EVAL_SEED, i]) for i in range(3))
    walks = [*collatz.TEST_SEEDS, *collatz.RECORD_SEEDS, *from_limbs(collatz.random_odd(walk, 200, 128))]
    tested = set(collatz.eval_numbers()).union(*map(collatz.trajectory, walks))
    candidates = from_limbs(collatz.random_odd(row, 10_000, 2))
    kept = {n for n in candidates if n not in tested}
    assert len(exam.validation_rows.k) == len(kept) < len(set(candidates))
    assert np.allclose(np.sort(exam.validation_rows.lg[:, 0]), np.sort([math.log2(n) for n in kept]))
    starts = from_limbs(collatz.random_odd(validation, 100, 8))
    for n, mask in zip(starts, exam.validation_steps, strict=True):
        path = collatz.trajectory(n)
        for i in range(len(path) - 1):
            assert mask[i] == (path[i] not in tested and path[i + 1] not in tested)
    model = collatz.Lyapunov(collatz.Config(10, layers=None, sees=0, hold=0))
    _, ok, _ = collatz.walk_steps(model.value, exam.walks["validation"])
    want = ok[exam.validation_steps[:, :ok.shape[1]]].mean()  # the number 1 lies on every test trajectory
    assert collatz.validate(model, exam)["val_on_trajectory_pass_rate"] == want


def test_best_checkpoint_is_chosen_by_validation_alone(rows_csv, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.5, 0.2, 0.3])  # at steps 0, 4, 6, 8, 12
    monkeypatch.setattr(collatz, "validate", lambda model, exam: {"val": next(scores)})
    monkeypatch.setattr(collatz, "draw_pictures", lambda *a: None)
    assert small(rows_csv, tmp_path / "run")["best_step"] == 4 == read(tmp_path / "run" / "best.pt")["step"]


def test_original_split_leaks_as_the_original_did(rows_csv):
    _, _, pools = setting(rows_csv, "--preset", "original", "--train-seeds", "0", "--split", "original")
    seeds = {n // (n & -n) for n in collatz.ORIGINAL_SEEDS if n not in collatz.TEST_SEEDS}
    assert 27 in seeds  # the odd part of 54
    trained = set().union(*map(collatz.trajectory, seeds)) - {1}
    on_path = [len(trained & set(collatz.trajectory(n)[:-1])) for n in collatz.TEST_SEEDS]
    assert on_path == [23, 41, 62, 113, 32]  # of 24, 41, 62, 113, 189
    assert len(pools.first) == 50 and pools.counts["n_leaked"] > 271 and pools.counts["n_excluded"] == 0


# ---- the flags of the notes act

def test_a_preset_sets_what_was_not_given():
    args = collatz.parse_args(["--recipe", "original", "--lr", "0.5", "--epochs", "7"])
    assert (args.lr, args.steps, args.model, args.growth_weight) == (0.5, 7, "none", 10.0)
    assert collatz.parse_args([]).growth_weight == 1.0
    assert {name: collatz.parse_args(line.split()).curriculum for name, line in {
        "old": "--curriculum --ramp-len 5000", "alone": "--curriculum", "one": "--curriculum 70", "none": ""}.items()
    } == {"old": 5000, "alone": 1000, "one": 70, "none": 0}


def test_curriculum_adds_seeds_in_order_ours_from_short_to_long(rows_csv):
    args, _, pools = setting(rows_csv, *"--preset original --train-seeds 0 --curriculum 10 --start-seeds 1".split())
    assert [pools.active_seeds(s, args) for s in (0, 5, 10, 99)] == [1, 25, 49, 49]
    first = set(pools.hard["lg"][:pools.first[1], 0].tolist())  # all of the first seed, 31
    now, later = (set(collatz.sample_batch(pools, args, s)[0][0]["lg"][:, 0].tolist()) for s in (0, 10))
    assert now <= first and not later <= first
    args.start_seeds = 0  # without a seed the batch is random numbers alone
    assert [(n, share) for _, n, share in collatz.sample_batch(pools, args, 0)] == [(1, 1.0)]
    length = np.diff(setting(rows_csv, *"--curriculum --train-seeds 40 --segment 1".split())[2].first)
    assert (np.diff(length) >= 0).all() and length[-1] > length[0]


def test_mining_keeps_the_lowest_margins_and_trains_on_them(rows_csv, monkeypatch):
    args, exam, pools = setting(rows_csv, *"--mine-negatives --batch-size 64".split())
    model, J = collatz.Lyapunov(collatz.make_config(args)), collatz.make_config(args).window

    def fall(chains):
        with torch.no_grad():
            return collatz.falls(model, chains, model.terms(chains["lg"], chains["k"], chains["res"]), 1, 1, 0.0)
    pools.hard["ok"][:, J + 1] = False  # the last number that V(T(n)) looks at: then none of them may be mined
    collatz.mine(model, pools, args, exam, 0)
    mined = pools.mined
    assert len(mined["k"]) == 50 and fall(mined).max() < 0 < fall(pools.random).median()
    assert mined["ok"][:, :J + 2].all()
    marked = {**mined, "lg": mined["lg"] + 1000}
    pools.mined = marked
    (hard, _, _), (others, _, _) = collatz.sample_batch(pools, args, 0)
    assert (hard["lg"][:, 0] > 1000).sum() == 9 == int(0.3 * 32) and (others["lg"][:, 0] < 1000).all()
    monkeypatch.setattr(collatz, "MINED_MAX", 120)
    found = []
    for step in range(3):  # 50 marked ones before, 150 new ones
        before = pools.mined
        collatz.mine(model, pools, args, exam, step)
        found.append(pools.mined["lg"][-50:])
        assert torch.equal(pools.mined["lg"], torch.cat([before["lg"], found[-1]])[-120:])
    assert torch.equal(pools.mined["lg"], torch.cat(found)[-120:])


@pytest.mark.parametrize("preset", ["window", "original"])
def test_t4_t8_growth_weight_and_the_anchor_add_their_terms(rows_csv, preset):
    base = ["--preset", preset, "--train-seeds", "12", "--growth-weight", "1", "--target-type", "none"]
    args, _, pools = setting(rows_csv, *base, "--use-t8")
    parts = collatz.sample_batch(pools, args, 0)
    model = random_model(collatz.parse_args([*SMALL, *base, "--target-type", "fixed"]))

    def loss(*flags, parts=parts, step=0):
        return collatz.batch_loss(model, parts, collatz.parse_args([*SMALL, *base, *flags]), step).item()
    t4, t8 = loss("--use-t4") - loss(), loss("--use-t8") - loss()
    assert t4 > 0 and t8 > 0 and loss("--use-t4", "--use-t8") == pytest.approx(loss() + t4 + t8, rel=1e-5)
    one, two, three = (loss("--growth-weight", w) for w in "123")
    assert three - two == pytest.approx(two - one, rel=1e-3) and two > one
    first, last = (loss("--target-type", "fixed", step=s) - loss(step=s) for s in (0, 10_000))
    assert first > 0 and last == pytest.approx(0.001 * first, rel=0.2)
    collatz.make_optimizers(model, collatz.parse_args([*SMALL, *base, "--target-type", "fixed"]))
    assert not model.beta.requires_grad
    assert loss("--hard-ratio", "0.2", parts=[(*parts[0][:2], 0.2)]) == pytest.approx(
        0.4 * loss(parts=[(*parts[0][:2], 0.5)]), rel=1e-5)


# ---- runs

def test_a_run_leaves_its_files_and_learns(rows_csv, tmp_path, capsys):
    out = small(rows_csv, tmp_path, *"--steps 150 --lr 0.01 --pool 4000 --train-seeds 60 --layers 32 --batch-size 128 "
                "--digits 6 --eval-every 50 --test-every 100".split())
    assert {f.name for f in tmp_path.iterdir()} == {
        "args.json", "run.txt", "collatz.py", "metrics.csv", "last.pt", "best.pt", "summary.json", "report.json",
        "trajectories.png", "lookahead.png", "loss.png", "val_on_trajectory_pass_rate.png"}
    assert json.loads((tmp_path / "summary.json").read_text())["violations"] == out["violations"]
    assert {"script", "name", "seed", "n_params", "seconds", "cpu_seconds", "command", "pass_rate"} <= out.keys()
    rows = metrics.read(tmp_path)
    assert [r["step"] for r in rows] == [0, 50, 100, 150] and "loss" not in rows[0] and "mined" not in rows[-1]
    assert ["pass_rate" in r for r in rows] == [True, False, True, True]
    assert rows[-1]["val"] > rows[0]["val"] + 0.01  # at step 0: the closed form
    assert out["on_trajectory_pass_rate"] > rows[0]["on_trajectory_pass_rate"]
    assert out["n_leaked"] == 0 < out["n_excluded"]
    text = capsys.readouterr().out
    assert re.search(r"\d+ of 429 violations", text.splitlines()[-1]) and "bound for V of k alone 98.490%" in text
    assert "nan" not in text and max(len(x) for x in text.splitlines() if x.startswith("step")) <= 160


def same_run(a: Path, b: Path) -> None:
    rows = [[{k: v for k, v in r.items() if k != "sec"} for r in metrics.read(d)] for d in (a, b)]
    assert rows[0] == rows[1]
    left, right = (read(d / "last.pt") for d in (a, b))
    assert left["step"] == right["step"] and left["best"] == right["best"] and left["model"].keys() == right["model"].keys()
    for name, value in left["model"].items():
        assert torch.equal(value, right["model"][name]), name
    states = [[s for o in x["optimizers"] for s in o["state"].values()] for x in (left, right)]
    for s, t in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for k in s)


@pytest.mark.parametrize("flags", ["", "--preset original --train-seeds 12"], ids=["window", "original"])
def test_resume_is_bit_exact(rows_csv, tmp_path, monkeypatch, flags):
    whole = small(rows_csv, tmp_path / "whole", *HEAVY, *flags.split())
    last = collatz.run.Run.last
    with monkeypatch.context() as patch:
        patch.setattr(collatz.run.Run, "last", lambda self, step: last(self, step) or step == 7)  # as if time was up
        out = small(rows_csv, tmp_path / "cut", *HEAVY, *flags.split())
        assert out["steps"] == 7 and out["stopped_early"]
    assert read(tmp_path / "cut" / "last.pt")["mined"]["k"].shape[0] == 100  # mined at steps 3 and 6
    torch.manual_seed(99)  # no global stream is used
    out = collatz.main(["--resume", str(tmp_path / "cut")])
    assert out["steps"] == 12 and not out["stopped_early"] and out["violations"] == whole["violations"]
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert abs(read(tmp_path / "cut" / "last.pt")["model"]["beta"] - 0.35) > 1e-3  # adaptive: it learns


PATCHED = f"import collatz\nfor name, value in {SETS!r}.items(): setattr(collatz, name, value)\ncollatz.main()"


def start(*flags):
    return subprocess.Popen([sys.executable, "-c", PATCHED, *map(str, flags)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_after_ctrl_c_a_run_resumes_to_the_numbers_of_an_unbroken_one(rows_csv, tmp_path):
    flags = [*SMALL, "--eval-csv", rows_csv, "--steps", "300", "--eval-every", "20", "--test-every", "300"]
    process = start(*flags, "--out-dir", tmp_path / "cut")
    line = next(x for x in process.stdout if x.startswith("step     20"))
    process.send_signal(signal.SIGINT)
    text = line + process.communicate(timeout=60)[0]
    assert process.returncode == 130 and f"--resume {tmp_path / 'cut'}" in text and "Traceback" not in text
    step = read(tmp_path / "cut" / "last.pt")["step"]
    assert 20 <= step < 300 and f"stopped at step {step};" in text and not (tmp_path / "cut" / "summary.json").exists()
    collatz.main([*flags, "--out-dir", str(tmp_path / "whole")])
    collatz.main(["--resume", str(tmp_path / "cut")])
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_weights_batches_and_schedules_are_functions_of_seed_and_step(rows_csv):
    args, _, pools = setting(rows_csv)

    def drawn(seed, step):
        args.seed = seed
        return collatz.make_model(args, None).layers[0].weight, collatz.sample_batch(pools, args, step)[1][0]["k"]
    torch.manual_seed(5)
    stream = torch.rand(1)
    torch.manual_seed(5)
    (a, b), (c, d), (_, e), (f, g) = drawn(0, 1000), drawn(0, 1000), drawn(0, 1001), drawn(1, 1000)
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(b, e)
    assert not torch.equal(a, f) and not torch.equal(b, g)
    assert torch.rand(1) == stream  # torch's own stream is left alone
    args.steps = 1000
    assert [collatz.lr_factor(s, args) for s in (0, 14, 400, 700, 1000)] == pytest.approx([1 / 30, 0.5, 1, 0.5, 0])
    assert [collatz.tau_at(s, args) for s in (0, 350, 700, 999)] == pytest.approx([1, 0.05**0.5, 0.05, 0.05])


def test_init_from_takes_weights_that_fit_and_have_not_seen_the_test(trained, rows_csv, tmp_path, capsys):
    small(rows_csv, tmp_path / "b", "--init-from", str(trained), "--steps", "1", "--lr", "1e-12")
    a, b = (read(d / "best.pt")["model"] for d in (trained, tmp_path / "b"))
    assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a)
    saved, leaky, other = read(trained / "best.pt"), tmp_path / "leaky.pt", tmp_path / "other.csv"
    torch.save(saved | {"args": saved["args"] | {"split": "original"}}, leaky)
    shutil.copy(rows_csv, other)
    for flags in (["--lookahead", "12"], ["--hold", "0"], ["--eval-csv", str(other)], ["--init-from", str(leaky)]):
        with pytest.raises(SystemExit) as e:
            small(rows_csv, tmp_path / "c", "--init-from", str(trained), *flags)
        assert re.search("another model|trained on other sets", one_line(e, capsys))
        assert not (tmp_path / "c").exists()


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(rows_csv, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        small(rows_csv, tmp_path / "run", *"--lr 1e30 --loss hinge --model log".split())
    assert re.search("not finite at step 4.*last.pt", one_line(e, capsys))
    assert read(tmp_path / "run" / "last.pt")["step"] == 0


def test_the_closed_form_and_a_lookahead_of_one_run(rows_csv, tmp_path):
    out = collatz.main(["--model", "closed", "--lookahead", "50", "--exhaustive", "100001", "--eval-csv", rows_csv,
                        "--out-dir", str(tmp_path / "closed")])
    v = closed(50)(collatz.paths(collatz.to_limbs(range(3, 100001, 2)), 51))
    bad = [n for n, (a, b) in zip(range(3, 100001, 2), v, strict=True) if not a > b]
    assert bad and out["exhaustive"] == {"limit": 100001, "n": 49999, "violations": len(bad), "first": bad[:5]}
    assert out["n_params"] == out["violations_total"] == 0 and not out["stopped_early"]
    assert collatz.load(tmp_path / "closed")(3) == v[0, 0]
    out = small(rows_csv, tmp_path / "run", "--lookahead", "1", "--steps", "2")
    assert out["lookahead"] == 1 and out["violations_total"] > 100


def test_a_folder_of_any_name_and_a_run_without_a_step_get_their_pictures(rows_csv, tmp_path):
    folder = tmp_path / "_a$x^$\udcff"                                       # no text, no formula
    out = small(rows_csv, folder, "--max-minutes", "0.0000001")
    assert out["steps"] == 0 and out["stopped_early"]
    assert (folder / "trajectories.png").is_file() and (folder / "lookahead.png").is_file()
    assert not (folder / "loss.png").exists()


def test_plot_draws_the_pictures_again_and_refuses_what_is_no_run(trained, tmp_path, capsys):
    for name in ("report.json", "summary.json", "args.json", "metrics.csv"):
        shutil.copy(trained / name, tmp_path / name)
    rows = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(rows.replace("\n0,,", "\n0,nan,"))  # as an older run has it
    collatz.main(["--plot", str(tmp_path), str(trained)])
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in trained.glob("*.png")}
    for name, text in (("report.json", "{}"), ("summary.json", "{}"), ("args.json", "{}"), ("summary.json", "[1"), ("metrics.csv", "a\nb\n"),
                       ("report.json", '{"curves": {"27": 3, "626331": 4}}')):
        good = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(SystemExit) as e:
            collatz.main(["--plot", str(tmp_path)])
        assert str(tmp_path) in one_line(e, capsys)
        (tmp_path / name).write_text(good)


# ---- use of a trained V

def test_score_writes_csv_and_load_returns_v_of_integers(trained, tmp_path, capsys):
    numbers = [27, 703, 2**127 - 1, 2**3000 + 1]
    (tmp_path / "numbers.txt").write_text("27, 703\n" + "\n".join(map(str, numbers[2:])))
    collatz.main(["--score", str(tmp_path / "numbers.txt"), "--checkpoint", str(trained / "best.pt")])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    V = collatz.load(trained)
    assert list(rows[0]) == ["n", "t1", "v", "v_t1", "margin"] and [int(r["n"]) for r in rows] == numbers
    for n, r in zip(numbers, rows, strict=True):
        assert int(r["t1"]) == collatz.syracuse(n)[0] and float(r["margin"]) == float(r["v"]) - float(r["v_t1"])
        assert float(r["v"]) == pytest.approx(V(n), abs=1e-5) and float(r["v_t1"]) == pytest.approx(V(int(r["t1"])), abs=1e-5)
    assert isinstance(V(27), float) and V([27, 1, 703]).shape == (3,) and V(1) > 0 and V(np.int64(27)) == V(27)
    assert (V(np.array([27, 703])) == V([27, 703])).all()
    for bad in ([28], [0], [-3], [2.5], "27", []):
        with pytest.raises(ValueError, match="odd numbers"):
            V(bad)


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    (tmp_path / "n.txt").write_text("\n".join(str(n) for n in range(3, 40_000, 2)))
    done = subprocess.run(f"{sys.executable} collatz.py --model closed --score {tmp_path / 'n.txt'} | head -1", shell=True,
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "n,t1,v,v_t1,margin\n" and done.stderr == ""


def test_evaluate_checkpoint_gives_the_figures_of_the_run_and_knows_other_rows(trained, rows_csv, tmp_path, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    out = collatz.evaluate_checkpoint(trained, argparse.Namespace())
    for key in ("violations", "pass_rate", "on_trajectory_pass_rate", "margin_quantiles", "n_params", "split"):
        assert out[key] == summary[key]
    assert out["split"] == "honest" and "honest split" in collatz.format_evaluation(out)
    other = tmp_path / "other.csv"
    shutil.copy(rows_csv, other)
    figures = collatz.main(["--checkpoint", str(trained), "--eval-csv", str(other), "--exhaustive", "200"])
    V = collatz.load(trained)
    bad = [n for n in range(3, 200, 2) if not V(n) - V(collatz.syracuse(n)[0]) > 1e-5]
    assert figures["exhaustive"] == {"limit": 200, "n": 99, "violations": len(bad), "first": bad[:5]}
    assert figures["split"] == "unknown" and "unknown split" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(KEPT.glob("*/best.pt")), ids=lambda p: p.parent.name)
def test_a_kept_checkpoint_has_its_figures(path):
    summary, v = json.loads((path.parent / "summary.json").read_text()), collatz.load(path)(collatz.trajectory(27))
    assert (~(v[:-1] - v[1:] > 0)).sum() == summary["violations"]["27"]


# ---- bad input: one line, an exit code, nothing lost

BAD = """
--score 28 --checkpoint KEPT | --score -3 --checkpoint KEPT | --score 1 --checkpoint KEPT | --score 1e6 --checkpoint KEPT
--score abc --checkpoint KEPT | --score 27,,31 --checkpoint KEPT | --score ٢٧ --checkpoint KEPT | --score 27 | --mod3
--score 27 --checkpoint KEPT --lookahead 20 | --checkpoint KEPT --layers 8,8 | --checkpoint KEPT --steps 3
--score 27 --checkpoint KEPT --exhaustive 9 | --score 27 --checkpoint KEPT --model closed | --resume KEPT --init-from KEPT
--analyze-seeds 27 --score 27 --checkpoint KEPT | --analyze-seeds 54 | --analyze-seeds x | --model closed --steps 5
--lookahead 0 | --lookahead 99999999 | --layers 64,,64 | --layers 0 | --layers ٦٤ | --layers 1000000,1000000
--curriculum --start-seeds 2001 | --hard-ratio 1.5 | --mine-negatives --hard-ratio 0 | --eval-every 0 | --sees 11 | --hold 10
--model log --hold 1 | --model none --sees 3 | --steps 0 | --lr inf | --name a/b | --exhaustive 2 | --exhaustive 1e30
--eval-csv /nonexistent.csv | --checkpoint /nonexistent.pt | --resume /nonexistent | --init-from /nonexistent.pt
--plot /nonexistent | --make-eval / | --make-eval /nonexistent/eval.csv | --device gpu | --tracker nope
--eval-csv EMPTY | --checkpoint EMPTY | --score EMPTY | --make-eval EMPTY | --plot EMPTY | --init-from EMPTY | --resume EMPTY
"""


@pytest.mark.parametrize("line", [x.strip() for x in re.split(r"[|\n]", BAD) if x.strip()])
def test_bad_flags_end_in_one_line_and_leave_no_folder(line, tmp_path, capsys, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"KEPT": str(trained / "best.pt"), "EMPTY": ""}
    with pytest.raises(SystemExit) as e:
        collatz.main([words.get(word, word) for word in line.split()])
    one_line(e, capsys)
    assert not list(tmp_path.iterdir())


def test_trajectories_are_analyzed_beyond_all_floats(capsys):
    collatz.main(["--analyze-seeds", f"27,{2**1800 - 1}"])
    header, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["27", "41", "111", "3077", "113.963"] and second.split()[-1].endswith("e+316")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


CONFIG = [{"flux": 3}, {"lookahead": 0}, {"lookahead": "10"}, {"layers": (17,)}, {"layers": (10**9,)}, {"layers": 5},
          {"layers": ()}, {"sees": 11}, {"hold": True}, {"base": "x"}, {"tie_break": 0.5}, {"features": "original"}]


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "nan", *CONFIG, {"config": 5}, {"args": None}, {"step": "x"},
                                    {"script": "addition_train.py", "config": {"d_model": 3}}, {"format": 99}, {"model": {}}, {"model": 5}], ids=str)
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    data, saved = (trained / "best.pt").read_bytes(), read(trained / "best.pt")
    if damage == "nan":
        saved["model"]["layers.0.weight"][0] = math.nan
    elif isinstance(damage, dict):
        inside = not damage.keys() & {"config", "args", "step", "script", "format", "model"}
        saved |= {"config": saved["config"] | damage} if inside else damage
    torch.save(saved, "bad.pt")
    if damage in ("cut", "empty", "pickle"):
        text = {"cut": data[:len(data) // 2], "empty": b"", "pickle": pickle.dumps(Evil(), protocol=2)}[damage]
        Path("bad.pt").write_bytes(text)
    with pytest.raises(SystemExit) as e:
        collatz.main(["--score", "27", "--checkpoint", "bad.pt"])
    assert "bad.pt" in one_line(e, capsys) and not Path("evil").exists()


def test_older_files_load_and_tampered_args_are_refused(trained, tmp_path):
    saved, path = read(trained / "best.pt"), tmp_path / "old.pt"
    torch.save(saved | {"config": saved["config"] | {"tie_break": 1e-3, "features": "window"},  # constants now
                        "args": saved["args"] | {"test_seeds": [97]}}, path)
    assert collatz.load(path)(27) == collatz.load(trained)(27)
    assert collatz.evaluate_checkpoint(path, argparse.Namespace())["split"] == "unknown"
    for args in ({"split": 3}, {"eval_csv": 5}, {}):
        torch.save(saved | {"args": args and saved["args"] | args}, path)
        with pytest.raises(UserError, match="old.pt: damaged, or of another version: its --"):
            collatz.evaluate_checkpoint(path, argparse.Namespace())


@pytest.mark.parametrize("change", [{"step": "x"}, {"step": 10**9}, {"args": 5}, {"optimizers": [{}]}, {"mined": None},
                                    {"mined": {"k": 3}}, {"best": None}, {"model": {}}], ids=str)
def test_a_damaged_last_pt_is_not_resumed(trained, tmp_path, capsys, change):
    torch.save(read(trained / "last.pt") | change, tmp_path / "last.pt")
    with pytest.raises(SystemExit) as e:
        collatz.main(["--resume", str(tmp_path)])
    one_line(e, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
