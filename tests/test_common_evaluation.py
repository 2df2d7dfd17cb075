"""common/evaluation.py: parameter counts, Wilson's interval, pass@k, evaluation mode."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.evaluation import count_parameters, eval_mode, format_rate, pass_at_k, wilson

FAST = settings(deadline=None, derandomize=True)
TRIALS = st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# ---- parameters

def test_shared_parameters_count_once_and_buffers_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)            # 40
            self.norm = nn.BatchNorm1d(4)               # 8, and buffers
            self.head = nn.Linear(4, 10)                # 40 + 10
            self.head.weight = self.embed.weight
            self.again = self.head
    assert count_parameters(Tied()) == 40 + 8 + 10


def test_frozen_parameters_count_unless_only_those_that_learn_are_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert count_parameters(model) == 16 + 10 and count_parameters(model, trainable=True) == 10
    assert count_parameters(nn.ReLU()) == 0


# ---- intervals

@pytest.mark.parametrize("k, n, lo, hi", [
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_gives_the_published_intervals(k, n, lo, hi):
    assert wilson(k, n) == pytest.approx((lo, hi), abs=5e-5)


def test_wilson_of_no_trials_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("k, n", [(-1, 10), (11, 10), (1, 0), (0, -1)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError):
        wilson(k, n)


@given(TRIALS)
@FAST
def test_wilson_lies_in_the_unit_interval_around_the_rate(trials):
    k, n = trials
    lo, hi = wilson(k, n)
    assert 0 <= lo <= k / n <= hi <= 1 and lo < hi
    assert (lo == 0) == (k == 0) and (hi == 1) == (k == n)


@given(TRIALS)
@FAST
def test_wilson_of_failures_mirrors_that_of_successes(trials):
    k, n = trials
    lo, hi = wilson(k, n)
    assert wilson(n - k, n) == pytest.approx((1 - hi, 1 - lo), abs=1e-12)


@given(TRIALS, st.floats(0.5, 4))
@FAST
def test_wilson_bounds_are_the_rates_that_a_score_test_just_accepts(trials, z):
    k, n = trials
    for rate in wilson(k, n, z):
        assert (k / n - rate) ** 2 == pytest.approx(z * z * rate * (1 - rate) / n, rel=1e-6, abs=1e-15)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(2, 50))
@FAST
def test_wilson_narrows_with_trials_and_widens_with_confidence(trials, times):
    (k, n), width = trials, lambda bounds: bounds[1] - bounds[0]
    assert width(wilson(k * times, n * times)) < width(wilson(k, n)) < width(wilson(k, n, 2.575829))


@pytest.mark.parametrize("k, n, text", [
    (9991, 10000, "99.91% (9991/10000, 95% 99.83-99.95)"),
    (0, 10, "0.0% (0/10, 95% 0.0-27.8)"), (5, 10, "50.0% (5/10, 95% 23.7-76.3)"),
    (10, 10, "100.0% (10/10, 95% 72.2-100.0)"),
    (0, 0, "n/a (0/0)"), (0, 1, "0.0% (0/1, 95% 0.0-79.3)"), (349, 429, "81.4% (349/429, 95% 77.4-84.8)"),
    (500_000, 1_000_000, "50.00% (500000/1000000, 95% 49.90-50.10)"),
    (10**12 // 2, 10**12, "50.0000% (500000000000/1000000000000, 95% 49.9999-50.0001)")])
def test_a_rate_is_printed_with_its_counts_and_interval(k, n, text):
    assert format_rate(k, n) == text


def test_the_example_in_the_docstring_is_what_is_printed():
    assert f"`{format_rate(9991, 10000)}`" in format_rate.__doc__


def test_one_failure_does_not_print_as_a_perfect_rate():
    for n in (10, 1000, 10**5, 10**6):
        assert not format_rate(n - 1, n).startswith("100") and format_rate(n, n).startswith("100.0")
        assert not format_rate(1, n).startswith("0.0% ") and format_rate(0, n).startswith("0.0")


# ---- pass@k

def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_of_the_cases_that_need_no_count():
    assert pass_at_k(10, 0, 10) == 0 and pass_at_k(10, 10, 1) == 1 and pass_at_k(10, 1, 10) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3) and pass_at_k(10, 3, 8) == 1
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)  # 1 - C(3,2) / C(5,2)


@given(st.integers(2, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n - 1))))
@FAST
def test_pass_at_k_grows_with_k_and_with_right_answers_for_many_samples(case):
    n, c, k = case
    here = pass_at_k(n, c, k)
    assert 0 <= here <= pass_at_k(n, c, k + 1) <= 1
    assert here <= pass_at_k(n, min(n, c + 1), k)


@pytest.mark.parametrize("n, c, k", [(10, 11, 1), (10, -1, 1), (10, 5, 0), (10, 5, 11), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


# ---- evaluation mode

def mixed() -> nn.Module:
    """A training model with a frozen, evaluating part that holds a training part."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)), nn.Dropout(0.5))
    model[1].eval()
    model[1][0].train()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def test_eval_mode_evaluates_without_dropout_or_gradients_and_puts_every_mode_back():
    model, other = mixed(), nn.Dropout(0.5)
    before, statistics = modes(model), model[1][1].running_mean.clone()
    assert len(set(before)) == 2
    x = torch.randn(4, 3)
    with eval_mode(model, other):
        assert not any(modes(model)) and not other.training and not torch.is_grad_enabled()
        y = model(x)
        assert torch.equal(y, model(x)) and not y.requires_grad and torch.equal(other(x), x)
    assert modes(model) == before and other.training and torch.is_grad_enabled()
    assert torch.equal(model[1][1].running_mean, statistics)
    assert model(x).requires_grad


def test_eval_mode_keeps_gradients_that_are_there():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    with eval_mode(model):
        model(torch.ones(1, 2))
    assert torch.equal(model.weight.grad, before)


def test_eval_mode_leaves_the_random_stream_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    with eval_mode(nn.ReLU()):
        torch.rand(1000)
        torch.manual_seed(77)
    assert torch.equal(torch.rand(5), expected)


def test_eval_mode_puts_all_back_after_an_exception():
    model = mixed()
    before = modes(model)
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        torch.rand(3)
        math.fmod(1, 1) / 0
    assert modes(model) == before and torch.is_grad_enabled() and torch.equal(torch.rand(5), expected)


def test_eval_mode_nests_and_leaves_gradients_off_where_they_were_off():
    model = mixed()
    before = modes(model)
    with torch.no_grad(), eval_mode(model):
        with eval_mode(model[1]):
            pass
        assert not any(modes(model))
    assert modes(model) == before
    with torch.no_grad():
        with eval_mode(model):
            pass
        assert not torch.is_grad_enabled()
