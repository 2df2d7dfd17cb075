"""collatz.py: figures of the closed form, the split, the model, what each flag does, resume, the command line."""
import csv
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import collatz
from common import metrics

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "12", "--pool", "400", "--train-seeds", "12", "--batch-size", "32", "--segment", "8", "--layers", "16", "--digits", "3",
         "--quick-eval-interval", "4", "--eval-interval", "6", "--eval-trajectories", "3",
         "--validation-rows", "100", "--validation-trajectories", "3"]


@pytest.fixture(scope="module")
def rows_csv(tmp_path_factory):
    """A small evaluation set, so that a run takes a second."""
    path = tmp_path_factory.mktemp("rows") / "eval.csv"
    numbers, real = collatz.eval_numbers(rows=200), collatz.eval_numbers
    collatz.eval_numbers = lambda: numbers
    collatz.make_eval_csv(str(path))
    collatz.eval_numbers = real
    return str(path)


@pytest.fixture(scope="module")
def exam():
    """The real evaluation sets at lookahead 10."""
    return collatz.make_exam(collatz.parse_args([]))


def small(rows_csv, out_dir, *flags):
    return collatz.main([*SMALL, "--eval-csv", rows_csv, "--out-dir", str(out_dir), *flags])


def from_limbs(limbs):
    return [sum(int(x) << 32 * i for i, x in enumerate(column)) for column in limbs.T.tolist()]


def closed(lookahead):
    return collatz.baselines(lookahead)["closed form"]


# ---- the closed form and the evaluator

@pytest.mark.parametrize("lookahead, seeds, pass_rate", [
    (10, [2, 9, 8, 18, 27], 0.94356), (20, [0, 5, 4, 11, 13], 0.98134), (50, [0, 0, 0, 0, 0], 0.99890)])
def test_closed_form_has_its_known_figures(lookahead, seeds, pass_rate):
    args = collatz.parse_args(["--lookahead", str(lookahead), "--eval-trajectories", "3", "--validation-rows", "10"])
    out = collatz.evaluate(closed(lookahead), collatz.make_exam(args))
    assert list(out["violations"].values()) == seeds
    assert out["odd_steps"] == {"111": 24, "27": 41, "703": 62, "26623": 113, "626331": 189}
    assert out["pass_rate"] == pytest.approx(pass_rate, abs=1e-5)


def test_closed_form_is_the_formula():
    numbers = [27, 703, 2**100 - 1, 5, 3]
    v = closed(7)(collatz.paths(collatz.to_limbs(numbers), 7))[:, 0]
    for n, got in zip(numbers, v, strict=True):
        path = (collatz.trajectory(n) + [1] * 8)[:8]
        want = max(math.log2(m) + 1e-3 * min(j, len(collatz.trajectory(n)) - 1) for j, m in enumerate(path))
        assert got == pytest.approx(np.logaddexp2(want, 0), abs=1e-9)


def test_original_figures_by_evaluate_of_a_perfect_constant_and_broken_v(exam):
    def time_to_one(p):  # perfect on trajectories that reach 1 within the walk
        return np.cumsum((p.lg > 0.5)[:, ::-1], axis=1)[:, ::-1][:, :p.lg.shape[1] - 10].astype(float)

    def constant(p):
        return np.ones((len(p), p.lg.shape[1] - 10))

    assert collatz.evaluate(time_to_one, exam, full=False)["violations_total"] == 0
    assert collatz.evaluate(time_to_one, exam, full=False)["on_trajectory_pass_rate"] == 1
    for broken in (constant, lambda p: constant(p) * np.nan):
        out = collatz.evaluate(broken, exam)  # ties and NaN fail
        assert out["violations_total"] == 429 and out["pass_rate"] == 0 and out["on_trajectory_pass_rate"] == 0
        assert math.isnan(out["margin_quantiles"]["0.5"])


def test_rates_weigh_as_defined():
    ok, w, growth = np.array([True, False, True, False]), np.array([1.0, 2, 3, 4]), np.array([True, True, False, False])
    assert collatz.rates(ok, w, growth) == {"pass_rate": 0.5, "weighted_pass_rate": 0.4, "growth_pass_rate": 0.5,
                                            "growth_weighted_pass_rate": 1 / 3}


def cycle_of_3n_minus_1(laps: int) -> collatz.Paths:
    """5 -> 7 -> 5 under 3n-1: 3*5-1 = 14 = 7*2, 3*7-1 = 20 = 5*4."""
    k = np.tile([1, 2], laps + 10)[None].astype(np.int32)
    lg = np.log2(np.tile([5.0, 7.0], laps + 11))[None, :k.shape[1] + 1]
    return collatz.Paths(k, lg, np.where(lg > 2.5, 7, 5).astype(np.int32))


def test_any_v_fails_at_least_once_a_lap_on_a_cycle():
    torch.manual_seed(0)
    values = list(collatz.baselines(10).values())
    for base in ("window", "log", "closed", "none"):
        model = collatz.Lyapunov(collatz.Config(10, base, (16,), sees=2 if base == "window" else 10, digits=2))
        for p in model.parameters():
            torch.nn.init.normal_(p)
        values.append(model.value)
    for value in values:
        _, ok, counts = collatz.walk_steps(value, cycle_of_3n_minus_1(30))
        assert (~ok[:, :40].reshape(20, 2)).any(axis=1).all()


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
    assert out["pass_rate"] > 0.99  # better than the published net
    assert out["on_trajectory_pass_rate"] < out["pass_rate"] - 0.01
    assert abs(out["slope"]) < 0.01 and math.isnan(out["margin_quantiles"]["0.5"])
    grown = collatz.evaluate(lambda p: steps_to_interval(p) + p.lg[:, :p.lg.shape[1] - 10], exam)
    assert grown["v_above_log2n"][1] > 200  # bits above log2 n


# ---- the model

@pytest.mark.parametrize("lookahead, count", [(10, 4_405_250), (20, 4_425_730), (100, 4_589_570)])
def test_original_net_has_the_published_size(lookahead, count):
    args = collatz.parse_args(["--recipe", "original", "--lookahead", str(lookahead), "--layers", "2048,1024,1024,512,512,512,256,128,64"])
    with torch.device("meta"):
        assert collatz.count_parameters(collatz.Lyapunov(collatz.model_config(args))) == count


def test_original_features_by_hand():
    p = collatz.paths(collatz.to_limbs([27]), 4)
    lg, k, res = (torch.from_numpy(np.ascontiguousarray(x)) for x in (p.lg, p.k, p.res))
    x = collatz.original_features(lg[:, :5], k[:, :4], res[:, 0])[0].tolist()
    ks = [1, 2, 1, 1]  # 27, 41, 31, 47, 71
    assert x == pytest.approx([math.log10(27) / 40, 0, 0, 0, 27 / 80, (4 * math.log2(3) - 5) / 10, *(i / 10 for i in ks)], abs=1e-6)


def test_untrained_net_is_the_closed_form():
    # window, q = 1: the maximum runs over L - 1 nodes behind, so it is the closed form of lookahead L - 1
    p = collatz.paths(collatz.random_odd(np.random.default_rng(0), 300, 2, 128), 11)
    model = collatz.Lyapunov(collatz.Config(10, "window", (16,), digits=3))
    assert np.allclose(model.value(p), closed(9)(p)[:, :2], atol=1e-6)
    model = collatz.Lyapunov(collatz.Config(10, "closed", (16,), sees=10, digits=3))
    assert np.allclose(model.value(p), closed(10)(p), atol=1e-6)


def random_model(args):
    torch.manual_seed(0)
    model = collatz.Lyapunov(collatz.model_config(args))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("base, sees", [("window", 1), ("window", 4), ("log", 10), ("closed", 10), ("none", 10)])
def test_v_looks_at_lookahead_values_of_k_and_no_more(base, sees):
    model = random_model(collatz.parse_args([*SMALL, "--base", base, "--sees", str(sees)]))
    p = collatz.paths(collatz.to_limbs([2**90 + 12345]), 11)
    def w(p):  # what V(n) is made of
        with torch.no_grad():
            return model(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (p.lg, p.k, p.res)))[0, :model.config.window + 1]
    for j in range(11):
        q = collatz.paths(collatz.to_limbs([2**90 + 12345]), 11)
        q.k[0, j] += 3
        q.lg[0, j + 1:] += 20
        same = torch.equal(w(q), w(p))
        assert same if j == 10 else not same


@pytest.mark.parametrize("base, sees", [("window", 2), ("log", 10), ("closed", 10), ("none", 10)])
def test_v_is_positive_and_the_gap_of_the_loss_has_the_sign_of_its_margin(base, sees):
    model = random_model(collatz.parse_args([*SMALL, "--base", base, "--sees", str(sees)]))
    p = collatz.paths(collatz.random_odd(np.random.default_rng(1), 500, 2, 128), 18)
    v = model.value(p)
    assert v.min() > 0
    with torch.no_grad():
        w = model(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (p.lg, p.k, p.res)))
    window = model.config.window
    for s in (1, 4, 8):
        gap = collatz.gaps(w, model.end(torch.from_numpy(p.k)), window, s, 1, 0.0)[:, 0].numpy()
        margin = v[:, 0] - v[:, s]
        clear = (np.abs(gap) > 0.02) & (np.abs(margin) > 0.02) & (p.lg[:, s + 10] > 0.5)
        assert clear.sum() > 50 and (np.sign(gap) == np.sign(margin))[clear].all()


def test_every_parameter_gets_a_gradient():
    for flags in ([], ["--base", "log"], ["--base", "closed"], ["--recipe", "original", "--target-type", "adaptive"]):
        args = collatz.parse_args([*SMALL, *flags])
        exam = collatz.make_exam(args)
        model = random_model(args)
        pools = collatz.make_pools(args, exam)
        collatz.batch_loss(model, collatz.draw(pools, args, 0, np.random.default_rng(0)), args, 0).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_soft_maximum_tends_to_the_maximum():
    x = torch.tensor([[1.0, 2.0, 1.5]])
    assert collatz.top(x, 0).item() == 2 and collatz.top(x, 1e-3).item() == pytest.approx(2)
    assert collatz.top(x, 1.0).item() == pytest.approx(math.log(sum(map(math.exp, [1, 2, 1.5]))))


def test_ramp_is_bounded_and_hinge_is_not():
    gap = torch.tensor([-100.0, 0.0, 100.0])
    ramp = collatz.edge_loss(gap, 0.0, 0.1)
    assert ramp.tolist() == pytest.approx([1, 0.5, 0])
    hinge = collatz.edge_loss(gap, 0.05, 0.0)
    assert hinge.tolist() == pytest.approx([100.05, 0.05, 0])


# ---- the split

def used_numbers(chains, numbers, window, n_edges, jumps=(1,)):
    """Every number at which the net is evaluated with a weight, from the chains' first numbers, with Python integers."""
    used = set()
    for n, ok in zip(numbers, chains["ok"].tolist(), strict=True):
        path = [n]
        while len(path) < len(ok):
            path.append(collatz.syracuse(path[-1])[0])
        for i in range(n_edges):
            for s in jumps:
                if all(ok[i:i + s + window + 1]):
                    used |= set(path[i:i + s + window + 1])
    return used


def forbidden_numbers(args):
    """Everything the report evaluates on or that validation uses, with Python integers."""
    rng = [np.random.default_rng([collatz.EVAL_SEED, i]) for i in range(3)]
    rows = from_limbs(collatz.read_eval_csv(args.eval_csv)[0])
    rows += from_limbs(collatz.random_odd(rng[1], args.validation_rows, 2, 128))
    walks = [*args.test_seeds, *collatz.RECORD_SEEDS]
    walks += from_limbs(collatz.random_odd(rng[0], args.eval_trajectories, 128, 128))
    walks += from_limbs(collatz.random_odd(rng[2], args.validation_trajectories, 8, 128))
    return set(rows).union(*(collatz.trajectory(n) for n in walks))


@pytest.mark.parametrize("flags", [[], ["--base", "log"], ["--recipe", "original"], ["--use-t8", "--max-bits", "20"]])
def test_honest_split_trains_on_no_forbidden_number(rows_csv, monkeypatch, flags):
    made, real = [], collatz.make_chains

    def spy(p, keys, args, exam):
        chains, counts = real(p, keys, args, exam)
        made.append((chains, counts, [from_key(k) for k in keys[:, 0].tolist()], args.segment))
        return chains, counts
    monkeypatch.setattr(collatz, "make_chains", spy)
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--max-bits", "24", *flags, "--pool", "3000"])
    exam = collatz.make_exam(args)
    pools = collatz.make_pools(args, exam)
    model = collatz.Lyapunov(collatz.model_config(args))
    collatz.mine(model, pools, args, exam, 0, np.random.default_rng(0))
    assert len(made) == 3  # trajectories, random numbers, numbers for mining
    forbidden, masked = forbidden_numbers(args), 0
    for i, (chains, counts, numbers, segment) in enumerate(made):
        jumps = [s for s, _ in collatz.jumps(args)]
        used = used_numbers(chains, numbers, model.config.window, 1 if i == 1 else segment, jumps)
        assert used and not used & forbidden
        assert not {collatz.syracuse(n)[0] for n in used} & forbidden
        masked += (~chains["ok"]).any(1).sum().item()
        assert counts[2] == 0
    assert masked > 100  # the mask had something to do


@pytest.mark.parametrize("flags", [[], ["--base", "log"], ["--base", "log", "--sees", "2"], ["--base", "closed", "--use-t8"],
                                   ["--hold", "3", "--use-t4"], ["--recipe", "original", "--use-t8"]], ids=" ".join)
def test_no_gradient_reaches_the_net_from_a_forbidden_number(rows_csv, flags):
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--max-bits", "24", *flags, "--pool", "3000", "--batch-size", "400",
                               "--train-seeds", "60", "--hard-ratio", "0.3"])
    exam = collatz.make_exam(args)
    model, rng, forbidden = random_model(args), np.random.default_rng(0), forbidden_numbers(args)
    pools = collatz.make_pools(args, exam)
    pools.mined = collatz.mine(model, pools, args, exam, 0, rng)
    seen, real = [], model.net

    def net(lg, k, res):  # the numbers are told by log2, exact in float32 below 2^24
        u = real(lg, k, res)
        u.retain_grad()
        seen.append((lg[..., 0], u))
        return u
    model.net = net
    collatz.batch_loss(model, collatz.draw(pools, args, 0, rng), args, 0).backward()
    reached, others = set(), set()
    for lg, u in seen:
        numbers = [round(2**x) | 1 for x in lg.flatten().double().tolist()]
        small = [(n, g) for n, g in zip(numbers, u.grad.flatten().tolist(), strict=True) if 1 < n < 2**16]
        reached |= {n for n, g in small if g != 0}
        others |= {n for n, g in small if g == 0}
    assert len(reached) > 100 and others & forbidden
    assert not reached & forbidden
    assert not {collatz.syracuse(n)[0] for n in reached} & forbidden


def test_validation_shares_no_number_with_the_test_sets(exam):
    args = collatz.parse_args([])
    rng = [np.random.default_rng([collatz.EVAL_SEED, i]) for i in range(3)]
    tested = set(collatz.eval_numbers()).union(
        *(collatz.trajectory(n) for n in [*args.test_seeds, *collatz.RECORD_SEEDS, *from_limbs(collatz.random_odd(rng[0], 200, 128, 128))]))
    candidates = from_limbs(collatz.random_odd(rng[1], args.validation_rows, 2, 128))
    kept = {n for n in candidates if n not in tested}
    assert len(exam.validation_rows) == len(kept) < len(set(candidates))
    want = np.sort([math.log2(n) for n in kept])
    assert np.allclose(np.sort(exam.validation_rows.lg[:, 0]), want)
    starts = from_limbs(collatz.random_odd(rng[2], args.validation_trajectories, 8, 128))
    for n, mask in zip(starts, exam.validation_steps, strict=True):
        path = collatz.trajectory(n)
        for i in range(len(path) - 1):
            assert mask[i] == (path[i] not in tested and path[i + 1] not in tested)


def test_best_checkpoint_is_chosen_by_validation_alone(rows_csv, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.5, 0.2, 0.3])  # at steps 0, 4, 6, 8, 12
    monkeypatch.setattr(collatz, "validate", lambda model, exam: {
        "val_pass_rate": 0.0, "val_on_trajectory_pass_rate": 0.0, "val": next(scores)})
    assert small(rows_csv, tmp_path / "run")["best_step"] == 4
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 4


def from_key(key: int) -> int:
    """The number below 2^61 with this fingerprint (Chinese remainders)."""
    p, q = 2147483647, 2147483629
    a, b = key >> 31, key & (2**31 - 1)
    return a + p * ((b - a) * pow(p, -1, q) % q)


def test_original_split_leaks_as_the_original_did(rows_csv):
    args = collatz.parse_args([*SMALL, "--recipe", "original", "--split", "original", "--eval-csv", rows_csv])
    seeds = {n // (n & -n) for n in collatz.ORIGINAL_SEEDS if n not in args.test_seeds}
    assert 27 in seeds  # the odd part of 54
    trained = set().union(*(collatz.trajectory(n) for n in seeds)) - {1}
    on_path = [len(trained & set(collatz.trajectory(n)[:-1])) for n in args.test_seeds]
    assert on_path == [23, 41, 62, 113, 32]  # of 24, 41, 62, 113, 189
    pools = collatz.make_pools(args, collatz.make_exam(args))
    assert pools.counts[2] > 271 and pools.counts[1] == 0  # leaked, masked


# ---- the flags of the seed log act

def drawn(args, step, exam, pools=None):
    pools = pools or collatz.make_pools(args, exam)
    return pools, collatz.draw(pools, args, step, np.random.default_rng(0))


def test_curriculum_adds_seeds_in_order(rows_csv):
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--recipe", "original", "--curriculum", "--start-seeds", "1", "--ramp-len", "10"])
    exam = collatz.make_exam(args)
    pools, parts = drawn(args, 0, exam)
    first = pools.first
    assert len(first) == 50 and [collatz.active_seeds(s, 49, args) for s in (0, 5, 10, 99)] == [1, 25, 49, 49]
    path = {round(2 ** x, 3) for x in pools.hard["lg"][:first[1], 0].tolist()}
    assert {round(2 ** x, 3) for x in parts[0][0]["lg"][:, 0].tolist()} <= path  # all of the first seed, 31
    _, parts = drawn(args, 10, exam, pools)
    assert not {round(2 ** x, 3) for x in parts[0][0]["lg"][:, 0].tolist()} <= path


def test_without_a_seed_the_batch_is_random_numbers_alone(rows_csv):
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--curriculum", "--start-seeds", "0"])
    _, parts = drawn(args, 0, collatz.make_exam(args))
    assert [(n, share) for _, n, share, _ in parts] == [(1, 1.0)]


def test_our_curriculum_goes_from_short_to_long(rows_csv):
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--curriculum", "--train-seeds", "40", "--segment", "1"])
    first = collatz.make_pools(args, collatz.make_exam(args)).first
    length = np.diff(first)
    assert (np.diff(length) >= 0).all() and length[-1] > length[0]


def test_mining_keeps_the_lowest_margins_and_trains_on_them(rows_csv):
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--mine-negatives", "--mine-count", "20", "--batch-size", "64"])
    exam = collatz.make_exam(args)
    pools = collatz.make_pools(args, exam)
    model = collatz.Lyapunov(collatz.model_config(args))
    mined = collatz.mine(model, pools, args, exam, 0, np.random.default_rng(0))
    def gap(chains):
        with torch.no_grad():
            w = model(chains["lg"], chains["k"], chains["res"])
            return collatz.gaps(w, model.end(chains["k"]), model.config.window, 1, 1, 0.0)[:, 0]
    assert len(mined["k"]) == 20 and gap(mined).max() < 0 < gap(pools.random).median()
    assert mined["ok"][:, :model.config.window + 2].all()
    _, plain = drawn(args, 0, exam, pools)
    pools.mined = mined
    _, more = drawn(args, 0, exam, pools)
    kept = {tuple(r) for r in mined["lg"].tolist()}
    before, after = (sum(tuple(r) in kept for r in parts[0][0]["lg"].tolist()) for parts in (plain, more))
    assert before < int(0.3 * 32) <= after
    for _ in range(60):
        pools.mined = collatz.mine(model, pools, args, exam, 0, np.random.default_rng(0))
    assert len(pools.mined["k"]) == 1000


@pytest.mark.parametrize("recipe", ["window", "original"])
def test_t4_and_t8_add_their_terms(rows_csv, recipe):
    def loss(*flags):
        args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--recipe", recipe, *flags])
        pools = collatz.make_pools(collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--recipe", recipe, "--use-t4", "--use-t8"]), exam)
        return collatz.batch_loss(model, collatz.draw(pools, args, 0, np.random.default_rng(0)), args, 0).item()
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv, "--recipe", recipe])
    exam = collatz.make_exam(args)
    model = random_model(args)
    assert loss() < loss("--use-t8") < loss("--use-t8", "--use-t4")


@pytest.mark.parametrize("recipe", ["window", "original"])
def test_adaptive_target_learns_beta_and_fixed_does_not(rows_csv, tmp_path, recipe):
    betas = {}
    for kind in ("fixed", "adaptive"):
        small(rows_csv, tmp_path / kind, "--recipe", recipe, "--steps", "12", "--target-type", kind)
        betas[kind] = torch.load(tmp_path / kind / "last.pt", weights_only=True)["model"]["beta"].item()
    assert betas["fixed"] == pytest.approx(0.35) and abs(betas["adaptive"] - 0.35) > 1e-3


def test_plateau_only_lowers_the_rate(rows_csv, tmp_path, monkeypatch):
    real = torch.optim.lr_scheduler.ReduceLROnPlateau
    monkeypatch.setattr(torch.optim.lr_scheduler, "ReduceLROnPlateau", lambda o, factor, patience: real(o, factor=factor, patience=1))
    small(rows_csv, tmp_path / "run", "--recipe", "original", "--steps", "40")
    lr = [r["lr"] for r in metrics.read(tmp_path / "run")]
    assert lr[0] == 1e-3 and lr[-1] < 1e-3 and all(a >= b for a, b in zip(lr, lr[1:], strict=False))


def test_growth_weight_and_hard_weight_scale_the_loss(rows_csv):
    args = collatz.parse_args([*SMALL, "--eval-csv", rows_csv])
    exam = collatz.make_exam(args)
    model = collatz.Lyapunov(collatz.model_config(args))
    _, parts = drawn(args, 0, exam)
    def loss(part, weight, growth_weight):
        args.growth_weight = growth_weight
        data, n, _, _ = part
        return collatz.batch_loss(model, [(data, n, 1.0, weight)], args, 0).item()
    assert loss(parts[0], 2.0, 1.0) == pytest.approx(2 * loss(parts[0], 1.0, 1.0))
    a, b, c = (loss(parts[1], 1.0, g) for g in (1.0, 2.0, 3.0))
    assert c - b == pytest.approx(b - a) and b > a


# ---- runs

def test_a_run_leaves_its_files_and_learns(rows_csv, tmp_path):
    out = collatz.main([*SMALL, "--eval-csv", rows_csv, "--out-dir", str(tmp_path / "run"), "--steps", "150", "--lr", "0.01", "--pool", "4000",
                        "--train-seeds", "60", "--layers", "32", "--batch-size", "128", "--digits", "6",
                        "--quick-eval-interval", "50", "--eval-interval", "50"])
    files = {f.name for f in (tmp_path / "run").iterdir()}
    assert files >= {"args.json", "run.txt", "collatz.py", "metrics.csv", "last.pt", "best.pt", "summary.json", "report.json",
                     "trajectories.png", "lookahead.png", "margins.png", "bits.png", "training.png"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["violations"] == out["violations"]
    assert {"script", "name", "seed", "n_params", "seconds", "cpu_seconds", "command", "weighted_pass_rate"} <= out.keys()
    rows = metrics.read(tmp_path / "run")
    assert [r["step"] for r in rows] == [0, 50, 100, 150]
    assert rows[-1]["val"] > rows[0]["val"] + 0.02 and rows[-1]["loss"] < 0.7 * rows[1]["loss"]
    assert out["on_trajectory_pass_rate"] > 0.955  # the closed form has 0.94
    assert out["n_leaked"] == 0 and out["n_excluded"] > 0


def same_run(a: Path, b: Path) -> None:
    skip = ("sec",)
    rows = [[{k: v for k, v in r.items() if k not in skip and v == v} for r in metrics.read(d)] for d in (a, b)]
    assert rows[0] == rows[1]
    left, right = (torch.load(d / "last.pt", weights_only=True) for d in (a, b))
    assert left["step"] == right["step"] and left["data_rng"] == right["data_rng"]
    for name, value in left["model"].items():
        assert torch.equal(value, right["model"][name]), name
    states = [[s for o in x["optimizers"] for s in o["state"].values()] for x in (left, right)]
    for s, t in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for k in s)


HEAVY = ["--curriculum", "--ramp-len", "8", "--mine-negatives", "--mine-start", "2", "--mine-interval", "3", "--use-t4", "--layers", "16,16"]


@pytest.mark.parametrize("flags", [HEAVY, ["--recipe", "original", *HEAVY[:-2]]], ids=["window", "original"])
def test_resume_is_bit_exact(rows_csv, tmp_path, monkeypatch, flags):
    small(rows_csv, tmp_path / "whole", *flags)
    calls = []
    def stop_after_7(self):  # as if the time was up
        calls.append(1)
        return len(calls) == 8
    monkeypatch.setattr(collatz.run.Clock, "expired", stop_after_7)
    out = small(rows_csv, tmp_path / "cut", *flags)
    assert out["steps"] == 7 and out["stopped_early"]
    out = collatz.main(["--resume", str(tmp_path / "cut")])
    assert out["steps"] == 12 and not out["stopped_early"]
    same_run(tmp_path / "whole", tmp_path / "cut")


def start(rows_csv, out_dir, *flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "collatz.py", *SMALL, "--eval-csv", rows_csv, "--out-dir", str(out_dir), "--steps", "100000",
                             "--quick-eval-interval", "5", "--eval-interval", "100000", *flags], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process) -> None:
    end = time.monotonic() + 60
    while not path.is_file() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert path.is_file(), process.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_before_they_leave(rows_csv, tmp_path, number):
    process = start(rows_csv, tmp_path / "run")
    wait_for(tmp_path / "run" / "last.pt", process)
    time.sleep(0.2)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and f"--resume {tmp_path / 'run'}" in text and "Traceback" not in text
    step = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert f"stopped at step {step};" in text
    assert metrics.read(tmp_path / "run")[-1]["step"] <= step


@pytest.mark.slow
def test_killed_again_and_again_a_run_resumes_to_the_same_numbers(rows_csv, tmp_path):
    flags = [*SMALL, "--eval-csv", rows_csv, "--steps", "400", "--eval-interval", "100", *HEAVY]
    whole = collatz.main([*flags, "--out-dir", str(tmp_path / "whole")])
    rng, more = np.random.default_rng(0), ["--out-dir", str(tmp_path / "cut")]
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "collatz.py", *flags, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(tmp_path / "cut" / "last.pt", process)
        try:
            process.wait(timeout=float(rng.uniform(2.5, 6)))  # about 2 s of it are imports
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            metrics.read(tmp_path / "cut")
            more = ["--resume", str(tmp_path / "cut")]
    assert process.returncode == 0, process.stdout.read()
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["violations"] == whole["violations"]


def test_init_from_takes_the_weights_alone(rows_csv, tmp_path):
    small(rows_csv, tmp_path / "a")
    small(rows_csv, tmp_path / "b", "--init-from", str(tmp_path / "a"), "--steps", "1", "--lr", "1e-12")
    a, b = (torch.load(tmp_path / d / "best.pt", weights_only=True)["model"] for d in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a)


@pytest.mark.parametrize("flags", [["--split", "original"], ["--test-seeds", "97,871"], ["--lookahead", "12"], ["--layers", "8"],
                                   ["--eval-trajectories", "2"]])
def test_init_from_refuses_weights_that_leak_or_do_not_fit(rows_csv, tmp_path, flags):
    small(rows_csv, tmp_path / "a", *flags, "--steps", "1")
    with pytest.raises(SystemExit, match="was trained with"):
        small(rows_csv, tmp_path / "b", "--init-from", str(tmp_path / "a"))
    assert not (tmp_path / "b").exists()


def test_same_seed_same_weights_and_other_seed_other_weights(rows_csv, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        small(rows_csv, tmp_path / name, "--seed", seed, "--steps", "3")
    same_run(tmp_path / "a", tmp_path / "b")
    a, c = (torch.load(tmp_path / d / "last.pt", weights_only=True)["model"] for d in "ac")
    assert not torch.equal(a["layers.0.weight"], c["layers.0.weight"])


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(rows_csv, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        small(rows_csv, tmp_path / "run", "--lr", "1e30", "--loss", "hinge", "--clip", "0", "--base", "log")
    assert "not finite" in str(e.value) and "last.pt" in str(e.value) and "\n" not in str(e.value)
    assert torch.isfinite(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["loss_sum"])


def test_model_closed_and_linear_run(rows_csv, tmp_path):
    out = small(rows_csv, tmp_path / "closed", "--model", "closed", "--mod3", "--exhaustive", "1000")
    assert out["n_params"] == 0 and out["violations_total"] == 62 and out["exhaustive"]["n"] == 499
    out = small(rows_csv, tmp_path / "linear", "--model", "linear")
    assert 0 < out["n_params"] < 200 and (tmp_path / "linear" / "training.png").is_file()


def test_a_run_resumed_into_another_folder_takes_its_record_along(rows_csv, tmp_path, monkeypatch):
    small(rows_csv, tmp_path / "whole")
    monkeypatch.setattr(collatz.run.Clock, "expired", lambda self: True)
    small(rows_csv, tmp_path / "cut")
    monkeypatch.undo()
    collatz.main(["--resume", str(tmp_path / "cut"), "--out-dir", str(tmp_path / "new")])
    same_run(tmp_path / "whole", tmp_path / "new")


def test_a_lookahead_of_one_runs(rows_csv, tmp_path):
    out = small(rows_csv, tmp_path / "run", "--lookahead", "1", "--steps", "2")
    assert out["lookahead"] == 1 and out["violations_total"] > 100


def test_plot_draws_the_pictures_again(rows_csv, tmp_path, capsys):
    for name in ("a", "b"):
        small(rows_csv, tmp_path / name, "--steps", "4")
        for picture in (tmp_path / name).glob("*.png"):
            picture.unlink()
    collatz.main(["--plot", str(tmp_path / "a"), str(tmp_path / "b")])
    assert all(len(list((tmp_path / name).glob("*.png"))) == 5 for name in "ab")


# ---- use of a trained V

@pytest.fixture(scope="module")
def trained(rows_csv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    small(rows_csv, folder)
    return folder


def test_score_writes_csv_and_nothing_else(trained, tmp_path, capsys):
    numbers = [27, 703, 2**127 - 1, 2**3000 + 1]
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, numbers)))
    collatz.main(["--score", str(tmp_path / "numbers.txt"), "--checkpoint", str(trained / "best.pt")])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    V = collatz.load(trained)
    assert list(rows[0]) == ["n", "t1", "v", "v_t1", "margin"] and [int(r["n"]) for r in rows] == numbers
    for n, r in zip(numbers, rows, strict=True):
        assert int(r["t1"]) == collatz.syracuse(n)[0]
        assert float(r["v"]) == pytest.approx(V(n), abs=1e-5) and float(r["v_t1"]) == pytest.approx(V(int(r["t1"])), abs=1e-5)
        assert float(r["margin"]) == pytest.approx(float(r["v"]) - float(r["v_t1"]))


def test_load_returns_v_of_integers(trained):
    V = collatz.load(trained / "best.pt")
    assert isinstance(V(27), float) and V([27, 1, 703]).shape == (3,) and V(1) > 0
    for bad in (28, 0, -3, 2.5, "27"):
        with pytest.raises(ValueError, match="odd numbers"):
            V([bad])


def test_evaluate_checkpoint_gives_the_figures_of_the_run(trained, rows_csv):
    summary = json.loads((trained / "summary.json").read_text())
    out = collatz.evaluate_checkpoint(trained / "best.pt", collatz.parse_args(["--eval-csv", rows_csv]))
    for key in ("violations", "pass_rate", "on_trajectory_pass_rate", "margin_quantiles", "n_params"):
        assert out[key] == summary[key]


def test_checkpoint_with_exhaustive_checks_that_v(trained, rows_csv):
    out = collatz.main(["--checkpoint", str(trained), "--eval-csv", rows_csv, "--exhaustive", "200"])
    V = collatz.load(trained)
    bad = [n for n in range(3, 200, 2) if not V(n) - V(collatz.syracuse(n)[0]) > 1e-5]
    assert out["exhaustive"] == {"limit": 200, "n": 99, "violations": len(bad), "first": bad[:5]}


def test_other_rows_than_the_run_s_are_not_called_honest(trained, rows_csv, tmp_path):
    assert collatz.evaluate_checkpoint(trained, collatz.parse_args([]))["split"] == "honest"
    other = tmp_path / "other.csv"
    other.write_text(Path(rows_csv).read_text())
    assert collatz.evaluate_checkpoint(trained, collatz.parse_args(["--eval-csv", str(other)]))["split"] == "unknown"


def test_the_kept_checkpoint_has_its_figures(capsys):
    kept = ROOT / "logs" / "kept" / "collatz" / "window10-s0"
    collatz.main(["--score", ",".join(map(str, collatz.trajectory(27)[:-1])), "--checkpoint", str(kept / "best.pt")])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    fails = sum(not float(r["margin"]) > 0 for r in rows)
    assert len(rows) == 41 and fails == json.loads((kept / "summary.json").read_text())["violations"]["27"]


def test_v_takes_numpy_integers_and_refuses_nothing(trained):
    V = collatz.load(trained)
    assert V(np.int64(27)) == V(27) and (V(np.array([27, 703])) == V([27, 703])).all()
    with pytest.raises(ValueError, match="odd numbers"):
        V([])


def test_exhaustive_counts_every_odd_number(capsys):
    model = collatz.Lyapunov(collatz.Config(50, layers=None, sees=0))
    out = collatz.exhaustive(model, 1 << 17, chunk=1000)
    assert out["n"] == (1 << 16) - 1
    brute = [n for n in range(3, 5000, 2) if not collatz.holds(*(closed(50)(collatz.paths(collatz.to_limbs([n]), 51))[0]))]
    assert [n for n in out["first"] if n < 5000] == brute[:5]


# ---- bad input: one line, an exit code, nothing lost

@pytest.mark.parametrize("flags", [
    ["--score", "28", "--checkpoint", "KEPT"], ["--score", "0", "--checkpoint", "KEPT"], ["--score", "-3", "--checkpoint", "KEPT"],
    ["--score", "1", "--checkpoint", "KEPT"], ["--score", "1e6", "--checkpoint", "KEPT"], ["--score", "abc", "--checkpoint", "KEPT"],
    ["--score", "27", "--checkpoint", "KEPT", "--lookahead", "20"], ["--checkpoint", "KEPT", "--layers", "8,8"],
    ["--checkpoint", "KEPT", "--test-seeds", "97"], ["--score", "27", "--checkpoint", "KEPT", "--exhaustive", "9"],
    ["--score", "27", "--checkpoint", "KEPT", "--model", "closed"], ["--resume", "KEPT", "--init-from", "KEPT"], ["--out-dir", ""],
    ["--analyze-seeds", "27", "--score", "27", "--checkpoint", "KEPT"], ["--eval-trajectories", "100000000000"],
    ["--layers", "1000000,1000000"], ["--lookahead", "5000"], ["--exhaustive", "1" + 30 * "0"],
    ["--score", "27"], ["--score", "27,,31", "--checkpoint", "KEPT"],
    ["--lookahead", "0"], ["--lookahead", "-3"], ["--lookahead", "99999999"], ["--layers", ""], ["--layers", "64,,64"], ["--layers", "0"],
    ["--batch-size", "100000000"], ["--ramp-len", "0"], ["--curriculum", "--start-seeds", "2001"], ["--hard-ratio", "1.5"],
    ["--hard-ratio", "nan"], ["--eval-interval", "0"], ["--quick-eval-interval", "0"], ["--mine-interval", "0"],
    ["--test-seeds", "27,27"], ["--test-seeds", "28"], ["--test-seeds", "1"], ["--test-seeds", ""], ["--eval-csv", "/nonexistent.csv"],
    ["--checkpoint", "/nonexistent.pt"], ["--resume", "/nonexistent"], ["--init-from", "/nonexistent.pt"], ["--device", "gpu"],
    ["--device", "cuda"], ["--device", "mps"], ["--sees", "11"], ["--lr", "0"], ["--lr", "inf"], ["--steps", "0"], ["--epochs", "-1"],
    ["--analyze-seeds", "54"], ["--analyze-seeds", "x"], ["--tau-end", "5"], ["--name", "a/b"], ["--mod3"], ["--plot", "/nonexistent"],
    ["--exhaustive", "2"], ["--recipe", "original", "--optimizer", "muon"], ["--max-bits", "4"], ["--steps", "1", "--hard-ratio", "1", "--batch-size", "50000", "--train-seeds", "1"],
], ids=" ".join)
def test_bad_flags_end_in_one_line(flags, tmp_path, capsys, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if flags[:2] in (["--device", "cuda"], ["--device", "mps"]) and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("this machine has it")
    with pytest.raises(SystemExit) as e:
        collatz.main([str(trained / "best.pt") if f == "KEPT" else f for f in flags])
    message = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code not in (0, None) and "error" in message and "\n" not in message and "Traceback" not in message


def tamper(path, **change):
    saved = torch.load(path, weights_only=True)
    for key, value in change.items():
        if key == "config":
            saved["config"] |= value
        else:
            saved[key] = value
    torch.save(saved, path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle", "lookahead", "layers", "nan", "huge", "foreign", "no config", "no args", "no step"])
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    data = (trained / "best.pt").read_bytes()
    path.write_bytes({"cut": data[:len(data) // 2], "empty": b"", "text": b"hello"}.get(damage, data))
    if damage == "pickle":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    if damage in ("lookahead", "layers", "huge"):
        tamper(path, config={"lookahead": {"lookahead": 0}, "layers": {"layers": (17,)}, "huge": {"layers": (10**9,)}}[damage])
    if damage == "foreign":
        tamper(path, script="addition_train.py")
    if damage in ("no args", "no step"):
        tamper(path, **{damage[3:]: None})
    if damage == "no config":
        tamper(path, config={"color": "red"})
    if damage == "nan":
        state = torch.load(path, weights_only=True)["model"]
        state["layers.0.weight"][0] = math.nan
        tamper(path, model=state)
    with pytest.raises(SystemExit) as e:
        collatz.main(["--score", "27", "--checkpoint", str(path)])
    assert str(e.value).startswith("collatz.py: error: ") and "\n" not in str(e.value)
    assert not (tmp_path / "evil").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [
    {"format": 99}, {"step": "x"}, {"step": 10**9}, {"args": 5}, {"optimizers": [{}]}, {"plateau": None}, {"data_rng": {}},
    {"rng": 1}, {"loss_sum": 1}, {"mined": None, "counts": None, "logged": None, "seconds": None}, {"model": {}}])
def test_a_damaged_last_pt_is_not_resumed(rows_csv, tmp_path, change):
    small(rows_csv, tmp_path / "run", "--steps", "2")
    tamper(tmp_path / "run" / "last.pt", **change)
    with pytest.raises(SystemExit) as e:
        collatz.main(["--resume", str(tmp_path / "run")])
    assert str(e.value).startswith("collatz.py: error: ") and "\n" not in str(e.value)


def test_killed_before_its_first_checkpoint_a_run_can_start_again(rows_csv, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("")  # what a kill during the first evaluation leaves
    assert small(rows_csv, tmp_path / "run", "--steps", "1")["steps"] == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(trained, rows_csv):
    before = (trained / "summary.json").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already"):
        small(rows_csv, trained)
    assert (trained / "summary.json").read_bytes() == before


def test_resume_refuses_other_flags_and_weights_alone(trained):
    with pytest.raises(SystemExit, match="--lr is 0.5 here"):
        collatz.main(["--resume", str(trained), "--lr", "0.5"])
    with pytest.raises(SystemExit, match="holds weights alone"):
        collatz.main(["--resume", str(trained / "best.pt")])


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(rows_csv, tmp_path, monkeypatch):
    real, calls = os.fsync, []
    def full(fd):
        calls.append(fd)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        small(rows_csv, tmp_path / "run")
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 0


def test_an_out_dir_that_cannot_be_written_is_one_line(rows_csv, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: .*file"):
        small(rows_csv, tmp_path / "file" / "run")
