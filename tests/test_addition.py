"""addition_train.py: the problem, its data, both models, the batched step, the optimizer, the loop."""
import argparse
import json
import math
import os
import re
import signal
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import addition_train as A
import evaluate_checkpoints as E
from common import metrics
from common.evaluation import count_parameters

FAST = settings(deadline=None, derandomize=True)
SMALL = ["--steps", "60", "--batch-size", "16", "--curriculum", "", "--warmup", "0.1", "--compile", "off",
         "--device", "cpu", "--val-size", "50", "--test-size", "100", "--eval-every", "20"]
PLAIN = ["--optimizer", "adamw", "--lr", "0.03", "--beta2", "0.99", "--weight-decay", "0.01", "--warmup", "0.1",
         "--schedule", "cosine", "--full-length", "0", "--random-zeros", "0", "--min-lr-ratio", "0.1",
         "--decay-until", "0", "--zeros-until", "0", "--entropy-bonus", "0"]
PLAIN_RUN = ["--preset", "rope196", "--seeds", "0-1"]
SEED_LOG = ["--pos-rank", "3", "--qkv-rank", "3", "--attn-out-rank", "2", "--ffn-rank", "3", "--use-rmsnorm",
            "--tie-qkv", "shareA_tieKV", "--train-steps", "54000", "--device", "cpu", "--seed", "43"]
RANK3 = ["--preset", "ref", "--pos-rank", "3", "--qkv-rank", "3", "--attn-out-rank", "3", "--ffn-rank", "3"]
VARIANTS = {
    **{name: ["--preset", name] for name in A.PRESETS},
    "layernorm, rank 3": RANK3, "rmsnorm, rank 3": [*RANK3, "--use-rmsnorm"], "shareA": [*RANK3, "--tie-qkv", "shareA"],
    "shareA_tieQK": [*RANK3, "--use-rmsnorm", "--tie-qkv", "shareA_tieQK"],
    "rmsnorm, full rank": ["--preset", "ref", "--use-rmsnorm"], "wide": ["--preset", "ref", "--d-model", "12", "--d-ff", "20"],
    "head of 8": ["--preset", "rope196", "--head-dim", "8", "--d-model", "6", "--d-ff", "9", "--period", "10"],
    "tied": ["--preset", "rope196", "--tie", "kv+oq"], "all tied": ["--preset", "rope196", "--tie", "all"], "arc": ["--preset", "rope196", "--embedding", "arc"],
}
each_variant = pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
both_families = pytest.mark.parametrize("preset", ["rope196", "ref456"])
operand = st.one_of(st.integers(0, A.LIMIT - 1), st.integers(0, 10).flatmap(lambda k: st.sampled_from(
    [max(10**k - 1, 0), min(10**k, A.LIMIT - 1), A.LIMIT - 10**k, 5 * 10**k % A.LIMIT])))


def parse(*flags):
    return A.parse_args([*SMALL, *flags])


def config_of(args):
    return A.make_config(vars(args), "flags")


def small(out_dir, *flags):
    return A.main([*SMALL, *PLAIN, "--out-dir", str(out_dir), *flags])


def population(folder):
    return torch.load(folder / "last.pt", weights_only=True)["population"]


def digits(*numbers):
    return A.digits_of(np.array(numbers, np.int64), A.DIGITS)


def numbers(d):
    """Digits (..., n), least significant first -> whole numbers (...)."""
    return (d.astype(np.int64) * 10 ** np.arange(d.shape[-1], dtype=np.int64)).sum(-1)


def module_of(config, row):
    module = A.FAMILIES[config.family](config).to(row.dtype)
    vector_to_parameters(row.detach().clone(), module.parameters())
    return module


def random_weights(config, n, std=0.4):
    """Weights (n, P) far from any symmetry of the initial ones."""
    how = "random" if config.family == "rotary" else "reference"
    noise = torch.randn(n, sum(math.prod(s) for _, s in A.shapes_of(config)), generator=torch.Generator().manual_seed(0))
    return torch.stack([A.init_weights(config, how, seed) for seed in range(n)]) + std * noise


@pytest.fixture
def no_pictures(monkeypatch):
    """Most runs here are judged by their numbers; the pictures take a second a run."""
    monkeypatch.setattr(A, "draw_pictures", lambda folder: [])


@pytest.fixture(scope="module")
def rotary_run(tmp_path_factory):
    """A third to a half of the pairs right at the end."""
    folder = tmp_path_factory.mktemp("addition") / "rotary"
    small(folder, "--preset", "rope196", "--steps", "600", "--batch-size", "32", "--seeds", "0-1", "--eval-every", "200")
    return folder


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """60 steps of seeds 0 and 1, uninterrupted."""
    folder = tmp_path_factory.mktemp("addition") / "plain"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(A, "draw_pictures", lambda folder: [])
        small(folder, *PLAIN_RUN)
    return folder


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory):
    """Single digits alone, a few of them right at the end."""
    folder = tmp_path_factory.mktemp("addition") / "learned"
    small(folder, "--preset", "ref", "--steps", "200", "--batch-size", "32", "--seeds", "0-1", "--curriculum", "1:199",
          "--eval-every", "200", "--lr", "0.02")
    return folder


# ---- problem

@FAST
@given(st.integers(0, 2 * A.LIMIT - 2))
def test_digits_are_those_of_the_decimal_text(x):
    assert A.digits_of(np.array([x]), 11)[0].tolist() == [int(t) for t in f"{x:011d}"[::-1]]
    assert A.number(A.digits_of(np.array([x]), 11)[0]) == x


@FAST
@given(operand, operand)
def test_sum_and_carries_are_those_of_whole_numbers(a, b):
    da, db = digits(a), digits(b)
    assert numbers(A.digit_sum(da, db)).tolist() == [a + b]
    assert A.carries(da, db)[0].tolist() == [int(a % 10**k + b % 10**k >= 10**k) for k in range(1, 11)]


def test_digits_of_many_numbers_keep_their_shape():
    x = np.arange(6).reshape(2, 3) * 1_234_567_890
    assert A.digits_of(x, 10).shape == (2, 3, 10) and (numbers(A.digits_of(x, 10)) == x).all()
    assert (numbers(A.digit_sum(A.digits_of(x, 10), A.digits_of(x, 10))) == 2 * x).all()


def test_the_learned_family_reads_and_writes_as_published():
    tokens, target = A.encode("learned", digits(5), digits(7))
    text = "".join("0123456789+="[t] for t in tokens[0])
    assert text == "0000000005+0000000007=" + "21000000000" and tokens.shape == (1, 33)
    assert target[0].tolist() == [2, 1, *[0] * 9, 13]


def test_the_rotary_family_has_digit_k_at_1_13_and_23_plus_k():
    a, b = 1234567890, 9876543219
    tokens, target = A.encode("rotary", digits(a), digits(b))
    assert "".join(map(str, tokens[0])) == "0" + "0987654321" + "00" + "9123456789" + "0" + f"{a + b:011d}"[:0:-1]
    assert tokens.shape == (1, 34) and "".join(map(str, target[0])) == f"{a + b:011d}"[::-1]
    for k in range(10):
        assert tokens[0, 1 + k] == a // 10**k % 10 and tokens[0, 13 + k] == b // 10**k % 10
        assert target[0, k] == (tokens[0, 24 + k]) == (a + b) // 10**k % 10  # predicted from position 23 + k


@pytest.mark.parametrize("family", A.FAMILIES)
def test_the_last_positions_predict_the_target(family):
    tokens, target = A.encode(family, *A.uniform_pairs([0], 50))
    q = target.shape[1]
    assert q == A.FAMILIES[family].OUTPUTS and tokens.shape[1] == A.FAMILIES[family].PROMPT + q - 1
    assert (tokens[:, 1 - q:] == target[:, :-1]).all()


def test_a_token_that_is_no_digit_is_no_number():
    assert A.number(np.array([3, 2, 1])) == 123
    for bad in (A.PLUS, A.EQUALS, 12, A.EOS, -1):
        assert A.number(np.array([3, bad, 1])) is None


@FAST
@given(operand, operand)
def test_longest_chain_is_the_longest_run_of_carries(a, b):
    carry = A.carries(digits(a), digits(b))
    assert E.longest_chain(carry).tolist() == [max(map(len, "".join(map(str, carry[0])).split("0")))]


@pytest.mark.parametrize("length", range(11))
def test_chained_pairs_have_exactly_that_chain(length):
    a, b = E.chained_pairs([0, length], 500, length)
    assert a.shape == b.shape == (500, 10) and a.min() >= 0 and b.min() >= 0 and a.max() <= 9 and b.max() <= 9
    assert (E.longest_chain(A.carries(a, b)) == length).all()


@pytest.mark.parametrize("length", range(4))
def test_chained_pairs_are_distributed_as_by_rejection(length):
    a, b = A.uniform_pairs([5, length], 300_000)
    kept = E.longest_chain(A.carries(a, b)) == length
    direct = E.chained_pairs([6, length], 40_000, length)

    def frequencies(a, b):  # of each digit of a and b in each column, and of each column's carry
        shown = [(x[..., None] == np.arange(10)).reshape(len(x), -1) for x in (a, b)]
        return np.concatenate([*shown, A.carries(a, b), A.carries(a, b)[:, 1:] * A.carries(a, b)[:, :-1]], 1)
    x, y = frequencies(a[kept], b[kept]), frequencies(*direct)
    p = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
    sigma = np.sqrt(p * (1 - p) * (1 / len(x) + 1 / len(y))) + 1e-12
    assert kept.sum() > 400 and (np.abs(x.mean(0) - y.mean(0)) / sigma).max() < 4.5  # of 219 frequencies


@pytest.mark.parametrize("lengths", [(1, 1), (1, 10), (4, 7), (10, 2), (10, 10)])
def test_pairs_of_lengths_have_these_lengths_and_are_uniform(lengths):
    for x, n in zip(E.pairs_of_lengths([0, *lengths], 5000, *lengths), lengths, strict=True):
        x = numbers(x)
        assert (x < 10**n).all() and (n == 1 or (x >= 10 ** (n - 1)).all())
        least = 0 if n == 1 else 10 ** (n - 1)
        span = 10**n - least
        assert abs((x - least).mean() / span - (0.5 if n > 1 else 0.45)) < 0.02 and len(set((x // 10 ** (n - 1)).tolist())) == 10 - (n > 1)


def original_split(seed, n):
    """Rejection of repeated pairs, then those after 5,000, as in the original's evaluation."""
    g, seen = torch.Generator().manual_seed(seed), {}
    while len(seen) < 5000 + n:
        size = max(2 * (5000 + n - len(seen)), 4096)
        a, b = (torch.randint(0, 10**10, (size,), generator=g).tolist() for _ in range(2))
        seen |= dict.fromkeys(zip(a, b, strict=True))
    return list(seen)[5000:5000 + n]


@pytest.mark.parametrize("seed, n", [(41, 10_000), (31415, 10_000), (7, 3)])
def test_split_pairs_are_the_originals(seed, n):
    a, b = A.split_pairs(seed, n)
    assert list(zip(numbers(a).tolist(), numbers(b).tolist(), strict=True)) == original_split(seed, n)


def test_edge_cases_are_operands_and_hold_the_hard_ones():
    assert all(0 <= x < A.LIMIT for pair in E.EDGE_CASES for x in pair) and len(set(E.EDGE_CASES)) == len(E.EDGE_CASES)
    a, b = (digits(*x) for x in zip(*E.EDGE_CASES, strict=True))
    assert numbers(A.digit_sum(a, b)).tolist() == [x + y for x, y in E.EDGE_CASES]
    assert E.longest_chain(A.carries(a, b)).max() == 10 and {(0, 0), (A.LIMIT - 1, 1), (A.LIMIT - 1, A.LIMIT - 1)} <= set(E.EDGE_CASES)


# ---- data

def drawn(args, chunk=0):
    """Operands and targets of a chunk as whole numbers (CHUNK, S, B)."""
    tokens, target = (x.numpy().swapaxes(-1, -2) for x in A.batches(chunk, args))
    a, b = (tokens[..., 1:11], tokens[..., 13:23]) if args.family == "rotary" else (tokens[..., 9::-1], tokens[..., 20:10:-1])
    return numbers(a), numbers(b), target


def test_batches_are_a_pure_function():
    args = parse("--seeds", "3,5")
    first = A.batches(7, args)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(x, y) for x, y in zip(first, A.batches(7, args), strict=True))
    assert not torch.equal(first[0], A.batches(8, args)[0])


def test_a_seeds_stream_does_not_depend_on_the_others():
    company, alone = A.batches(2, parse("--seeds", "3,5,8"))[0], A.batches(2, parse("--seeds", "5"))[0]
    assert torch.equal(company[:, 1], alone[:, 0])
    assert not torch.equal(company[:, 0], alone[:, 0])


@both_families
def test_targets_are_the_sums_and_stand_in_the_input(preset):
    args = parse("--preset", preset, "--seeds", "0-1", "--random-zeros", "0.5")
    a, b, target = drawn(args)
    assert a.shape == (A.CHUNK, 2, 16) and (numbers(target[..., :11]) == a + b).all()
    assert target.shape[-1] == 11 or (target[..., 11:] == A.EOS).all()
    tokens = A.batches(0, args)[0].numpy()
    assert (tokens[:, :, 1 - target.shape[-1]:] == target.swapaxes(-1, -2)[:, :, :-1]).all()
    assert tokens.shape[2] == A.FAMILIES[args.family].PROMPT + target.shape[-1] - 1


@pytest.mark.parametrize("full", [0.0, 0.5, 1.0])
def test_both_operands_have_up_to_n_digits_with_n_uniform_or_full(full):
    a, b, _ = drawn(parse("--seeds", "0", "--batch-size", "400", "--full-length", str(full)))
    longest = np.maximum(a, b).ravel()
    for m in range(1, 10):  # a digit from m on is not 0: with n > m, unless all of them came out 0
        p_uniform = sum(1 - 0.01 ** (n - m) for n in range(m + 1, 11)) / 10
        p = full * (1 - 0.01 ** (10 - m)) + (1 - full) * p_uniform
        assert abs((longest >= 10**m).mean() - p) < 4 * math.sqrt(0.25 / len(longest))


def test_curriculum_bounds_the_operands_until_its_steps():
    args = parse("--seeds", "0", "--batch-size", "200", "--curriculum", "3:20,6:40", "--full-length", "0.5")
    a, b, _ = drawn(args)
    for lo, hi, n in ((0, 20, 3), (20, 40, 6), (40, 50, 10)):
        x = np.maximum(a, b)[lo:hi]
        assert x.max() < 10**n and 0.5 < (x >= 10 ** (n - 1)).mean() < 0.8  # half at n, and 1/n of the others
    later = np.maximum(*drawn(args, 1)[:2])
    assert (later >= 10**9).mean() > 0.4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_zeros_zero_digits_in_that_share_of_the_sums(share):
    flags = ["--seeds", "0", "--batch-size", "400", "--full-length", "1"]
    x, y = (np.stack(drawn(parse(*flags, "--random-zeros", str(r)))[:2]) for r in (0.0, share))
    x, y = A.digits_of(x, 10), A.digits_of(y, 10)
    assert ((y == x) | (y == 0)).all()
    assert abs((y == 0).mean() - (0.1 + 0.9 * 0.5 * share)) < 0.01      # the rate is uniform in 0..1
    touched = (y != x).any(-1).any(0)  # a sum of 20 digits stays as it is at a rate near 0 alone
    assert 0.9 * share - 0.01 < touched.mean() < share + 0.01


def test_zeros_until_lets_the_share_of_random_zeros_fall_to_0():
    flags = ["--seeds", "0", "--batch-size", "400", "--full-length", "1", "--random-zeros", "1"]
    x, y = (A.digits_of(np.stack(drawn(parse(*flags, "--random-zeros", r, "--zeros-until", "0.5"))[:2]), 10) for r in ("0", "1"))
    touched = (y != x).any((0, 4)).mean((1, 2))                              # of each step of the chunk, 60 in the run
    assert touched[0] > 0.95 and abs(touched[15] - 0.5) < 0.1 and (touched[30:] == 0).all()


def test_training_validation_and_test_pairs_are_different_ones():
    def keys(a, b):
        return set(zip(numbers(a).ravel().tolist(), numbers(b).ravel().tolist(), strict=True))
    sets = [keys(*A.uniform_pairs([s], 2000)) for s in (A.VALIDATION, A.TEST)]
    args = parse("--seeds", "0-7", "--full-length", "1", "--batch-size", "8")
    tokens = A.batches(0, args)[0].numpy().swapaxes(-1, -2)
    sets += [keys(tokens[:, i, :, 1:11], tokens[:, i, :, 13:23]) for i in range(8)]
    sets.append(keys(*A.split_pairs(41, 2000)))
    assert sum(map(len, sets)) == len(set().union(*sets)) == 3 * 2000 + 8 * A.CHUNK * 8


def test_uniform_pairs_below_a_power_of_ten():
    a, b = (numbers(x) for x in A.uniform_pairs([9], 3000, 2))
    assert set(a.tolist()) == set(b.tolist()) == set(range(100)) and (a != b).any()


# ---- model

@pytest.mark.parametrize("flags, count", [
    (SEED_LOG, 456), (["--preset", "ref456"], 456), (["--preset", "ref"], 763), (RANK3, 512),
    ([*RANK3, "--use-rmsnorm"], 491), (["--preset", "rope196"], 196), (["--preset", "rope140"], 140),
    (["--preset", "rope122"], 122), (["--preset", "rope62"], 62), (["--preset", "rope36"], 36), (["--preset", "rope196", "--d-model", "6", "--d-ff", "8"], 326)])
def test_parameter_counts_to_the_digit(flags, count):
    config = config_of(A.parse_args(flags))
    assert count_parameters(A.FAMILIES[config.family](config)) == count


@pytest.mark.parametrize("preset", A.PRESETS)
def test_every_preset_has_the_parameters_of_its_name(preset):
    args = A.parse_args(["--preset", preset])
    config = config_of(args)
    module = A.FAMILIES[config.family](config)
    named = re.search(r"\d+$", preset)
    assert named is None or count_parameters(module) == int(named[0])
    assert A.init_weights(config, args.init, 0).shape == (count_parameters(module),)


def test_the_seed_logs_flags_are_the_preset_ref456():
    log, preset = A.parse_args(SEED_LOG), A.parse_args(["--preset", "ref456", "--seed", "43", "--device", "cpu"])
    assert {k: v for k, v in vars(log).items() if k not in ("given", "preset")} == {
        k: v for k, v in vars(preset).items() if k not in ("given", "preset")}
    assert (log.steps, log.lr, log.batch_size, log.curriculum) == (54_000, 0.02, 512, "3:2000,6:7000")


def test_run_name_of_the_seed_log_is_the_name():
    assert A.parse_args([*SEED_LOG, "--run-name", "repro_456_s43"]).name == "repro_456_s43"


def test_the_456_model_has_the_names_and_shapes_of_published_checkpoints():
    config = config_of(A.parse_args(["--preset", "ref456"]))
    module = A.LearnedAdder(config)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "token_emb.weight": (14, 7), "pos_emb.A": (33, 3), "pos_emb.B": (3, 7), "blocks.0.ln1.weight": (7,),
        "blocks.0.attn.qkv_A": (7, 3), "blocks.0.attn.qkv_Bq": (3, 7), "blocks.0.attn.qkv_Bkv": (3, 7),
        "blocks.0.attn.proj.A": (7, 2), "blocks.0.attn.proj.B": (2, 7), "blocks.0.ln2.weight": (7,),
        "blocks.0.mlp.fc1.A": (7, 3), "blocks.0.mlp.fc1.B": (3, 14), "blocks.0.mlp.fc2.A": (14, 3),
        "blocks.0.mlp.fc2.B": (3, 7), "ln_f.weight": (7,), "lm_head.weight": (14, 7)}
    assert module.lm_head.weight is module.token_emb.weight


def test_a_seed_starts_from_the_weights_of_the_published_constructor():
    torch.manual_seed(43)
    torch.randn(14, 7)                                                       # nn.Embedding's own draw
    drawn = {"pos_emb.A": 0.02 * torch.randn(33, 3), "pos_emb.B": 0.02 * torch.randn(3, 7)}
    for name, (n_in, n_out) in {"attn.qkv_A": (7, 3), "attn.qkv_Bq": (3, 7), "attn.qkv_Bkv": (3, 7), "attn.proj.A": (7, 2),
                                "attn.proj.B": (2, 7), "mlp.fc1.A": (7, 3), "mlp.fc1.B": (3, 14), "mlp.fc2.A": (14, 3),
                                "mlp.fc2.B": (3, 7)}.items():
        drawn["blocks.0." + name] = (2 / (n_in + n_out)) ** 0.5 * torch.randn(n_in, n_out)
    torch.rand(14, 7)                                                        # nn.Linear's own draw, for the tied head
    torch.randn(14, 7)
    drawn["token_emb.weight"] = 0.02 * torch.randn(14, 7)                    # drawn as embedding, then again as head
    config = config_of(A.parse_args(["--preset", "ref456"]))
    got = A.unflatten(A.init_weights(config, "reference", 43)[None], A.shapes_of(config))
    for name, value in drawn.items():
        assert torch.allclose(got[name][0], value, rtol=1e-6, atol=0), name
    assert all((got[name] == 1).all() for name in got if name not in drawn)


def published_logits(w, idx):
    """The 456-parameter model by its description: K = V, pre-norm, exact GELU, scale 1/sqrt(7)."""
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt() * w[name + ".weight"]
    x = w["token_emb.weight"][idx] + (w["pos_emb.A"] @ w["pos_emb.B"])[:idx.shape[1]]
    h = norm(x, "blocks.0.ln1") @ w["blocks.0.attn.qkv_A"]
    q, kv = h @ w["blocks.0.attn.qkv_Bq"], h @ w["blocks.0.attn.qkv_Bkv"]
    score = q @ kv.transpose(1, 2) / math.sqrt(7) + torch.full((idx.shape[1],) * 2, -math.inf).triu(1)
    x = x + score.softmax(-1) @ kv @ w["blocks.0.attn.proj.A"] @ w["blocks.0.attn.proj.B"]
    h = norm(x, "blocks.0.ln2") @ w["blocks.0.mlp.fc1.A"] @ w["blocks.0.mlp.fc1.B"]
    x = x + h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) @ w["blocks.0.mlp.fc2.A"] @ w["blocks.0.mlp.fc2.B"]
    return norm(x, "ln_f") @ w["token_emb.weight"].T


def rotary_logits(w, idx):
    """The small rotary models by the notes, with complex numbers for the rotated pairs."""
    w = {"norm2.weight": w["norm1.weight"], "norm_f.weight": w["norm1.weight"], "k_norm.weight": w["q_norm.weight"], **w}
    if w["emb"].dim() == 1:
        points = torch.polar(w["emb"][0].expand(10), w["emb"][1] + w["emb"][2] * torch.arange(10))
        w["emb"] = torch.cat([torch.view_as_real(points), torch.zeros(10, len(w["wq"]) - 2)], 1)
    if "wk_angle" in w:  # K is Q with its first pair turned, V = Q, down is up^T with its first two columns turned

        def turned(m, i, j, angle):
            pair, m = torch.complex(m[:, i], m[:, j]) * torch.polar(torch.ones_like(angle), angle), m.clone()
            m[:, i], m[:, j] = pair.real, pair.imag
            return m
        w |= {"wk": turned(w["wq"], 0, 2, w["wk_angle"]), "wv": w["wq"], "down": turned(w["up"].T, 0, 1, w["down_angle"])}
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    def turned(x):
        angle = torch.arange(idx.shape[1])[:, None] * torch.tensor([math.pi / 6, 1 / math.sqrt(3)], dtype=x.dtype)
        return torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(angle), angle)
    x = w["emb"][idx]
    h = norm(x, "norm1")
    q, k = turned(norm(h @ w["wq"], "q_norm")), turned(norm(h @ w["wk"], "k_norm"))
    score = (q @ k.conj().transpose(1, 2)).real / 2 + torch.full((idx.shape[1],) * 2, -math.inf).triu(1)
    x = x + score.softmax(-1) @ (h @ w.get("wv", w["wk"])) @ w.get("wo", w["wq"].T)
    h = norm(x, "norm2")
    gate = h @ w["gate"]
    x = x + (gate * gate.sigmoid() * (h @ w["up"])) @ w["down"]
    return norm(x, "norm_f") @ w["emb"].T


@pytest.mark.parametrize("preset, logits", [
    ("ref456", published_logits), ("rope196", rotary_logits), ("rope140", rotary_logits), ("rope122", rotary_logits),
    ("rope62", rotary_logits), ("rope36", rotary_logits)])
def test_the_module_is_the_model_described(preset, logits):
    config = config_of(A.parse_args(["--preset", preset]))
    row = random_weights(config, 1)[0].double()
    module = module_of(config, row)
    idx = torch.from_numpy(A.encode(config.family, *A.uniform_pairs([1], 20))[0]).long()
    want = logits({k: v[0] for k, v in A.unflatten(row[None], A.shapes_of(config)).items()}, idx)
    assert torch.allclose(module(idx), want, atol=1e-4)                      # its angles are float32


@each_variant
def test_a_later_token_changes_no_earlier_logit(flags):
    config = config_of(parse(*flags))
    module = module_of(config, random_weights(config, 1)[0].double())
    idx = torch.from_numpy(A.encode(config.family, *A.uniform_pairs([1], 4))[0]).long()
    for t in (0, 13, 24, idx.shape[1] - 1):
        other = idx.clone()
        other[:, t] = (other[:, t] + 3) % 10
        same = torch.isclose(module(idx), module(other), rtol=1e-12, atol=1e-12).all(2).all(0)
        assert same[:t].all() and not same[t:].any()


@each_variant
def test_every_parameter_gets_a_gradient(flags):
    args = parse(*flags)
    config = config_of(args)
    module = module_of(config, A.init_weights(config, args.init, 0))
    tokens, target = A.encode(config.family, *A.uniform_pairs([1], 64))
    logits = module(torch.from_numpy(tokens).long())[:, module.PROMPT - 1:]
    F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(target).long().flatten()).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and (p.grad != 0).any(), name


@pytest.mark.parametrize("head_dim", [4, 8])
def test_rotated_scores_depend_on_relative_position_only(head_dim):
    config = config_of(parse("--preset", "rope196", "--head-dim", str(head_dim), "--period", "12"))
    angle = A.rotary_angles(config, 34).double()
    q, k = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(0)).double()
    score = A.rotate(q, angle) @ A.rotate(k, angle).T                        # (34, 34)
    for offset in range(-10, 11):
        assert torch.allclose(score.diagonal(offset), score.diagonal(offset)[0], atol=1e-5)
    q[1:head_dim // 2] = q[head_dim // 2 + 1:] = 0                            # the first frequency alone
    score = A.rotate(q, angle) @ A.rotate(k, angle).T
    assert torch.allclose(score[:, 12:], score[:, :-12], atol=1e-5) and not torch.allclose(score[:, 6:], score[:, :-6], atol=0.1)


def stacked(config, how, n=100):
    rows = torch.stack([A.init_weights(config, how, seed) for seed in range(n)])
    return A.unflatten(rows, A.shapes_of(config))


def test_the_reference_initialisation_has_the_published_spreads():
    w = stacked(config_of(parse("--preset", "ref456")), "reference")
    for name, x in w.items():
        std = 0.02 if "emb" in name else (2 / (x.shape[1] + x.shape[2])) ** 0.5 if x.dim() == 3 else 0
        assert x.std().item() == pytest.approx(std, rel=0.05) if std else (x == 1).all(), name
    full = stacked(config_of(parse("--preset", "ref")), "reference")
    assert all(x.std().item() == pytest.approx(0.02, rel=0.05) for x in full.values() if x.dim() == 3)


def test_random_initialisation_knows_nothing_of_the_problem():
    w = stacked(config_of(parse("--preset", "rope196")), "random")
    assert w["emb"].std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.allclose(w["emb"].mean(0), torch.zeros(10, 4), atol=0.25)
    for name in ("wq", "wk", "wv", "wo", "gate", "up", "down"):              # uniform within a bound
        bound = w[name].abs().max().item()
        assert 0.3 < bound * w[name].shape[1] ** 0.5 < 1.001 and abs(w[name].mean()) < 0.05 * bound
        assert w[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert all(len(w[name].unique()) == 1 for name in w if "norm" in name)


def test_arc_and_phase_are_laid_out_in_the_first_coordinates():
    w = stacked(config_of(parse("--preset", "rope196", "--period", "12")), "arc+phase")
    angle = -1.2 + 0.29 * torch.arange(10)
    arc = torch.stack([2.5 * angle.cos(), 2.5 * angle.sin(), 0 * angle, 0 * angle], 1)
    assert torch.allclose(w["emb"].mean(0), arc, atol=0.05) and (w["emb"] - arc).std().item() == pytest.approx(0.1, rel=0.05)
    q, k = (torch.complex(w[name][:, 0, 0], w[name][:, 0, 2]) for name in ("wq", "wk"))
    apart = (q * k.conj()).mean()                                            # two positions of a turn of 12
    assert apart.abs().item() == pytest.approx(1, abs=0.1) and apart.angle().item() == pytest.approx(math.pi / 3, abs=0.1)
    assert q.mean().abs() < 0.3                                              # the phase itself is random
    assert len(torch.cat([w["q_norm.weight"], w["k_norm.weight"]]).unique()) == 1


def keep_weights(to, q, k, v):
    """causal_attention, restated, which also appends its weights to a list."""
    score = (q @ k.mT / q.shape[-1]**0.5).masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1) > 0, -math.inf)
    to.append(score.softmax(-1))
    return to[-1] @ v


def attention_on_operands(config, how):
    """Mean attention from the position that predicts digit k to digit k of a and b, before training."""
    seen, tokens = [], torch.from_numpy(A.encode("rotary", *A.uniform_pairs([1], 20))[0].T).long()[None]
    for seed in range(20):
        weights = A.init_weights(config, how, seed)[None]
        seen.append(A.batched_logits(weights, tokens, config, A.shapes_of(config))[1][0])   # (Q, J, B)
    k = torch.arange(10)
    p = torch.stack(seen).mean((0, 3))
    return (p[k, 1 + k] + p[k, 13 + k]).mean().item()


def test_arc_and_phase_look_at_the_operands_from_the_start():
    config = config_of(parse("--preset", "rope196"))
    assert attention_on_operands(config, "arc+phase") > 1.2 * attention_on_operands(config, "random")


@pytest.mark.parametrize("preset", A.PRESETS)
def test_initialisation_leaves_the_global_stream_alone(preset):
    args = parse("--preset", preset)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    row = A.init_weights(config_of(args), args.init, 0)
    A.shapes_of(config_of(args))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(row, A.init_weights(config_of(args), args.init, 0))
    assert not torch.equal(row, A.init_weights(config_of(args), args.init, 1))


# ---- the batched step and the modules

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["float64", "float32"])
@each_variant
def test_batched_loss_and_gradient_are_those_of_the_module(monkeypatch, flags, dtype, tolerance):
    args = parse(*flags, "--seeds", "0-2")
    config = config_of(args)
    weights = random_weights(config, 3).to(dtype).requires_grad_()
    tokens, target = (x[0] for x in A.batches(0, args))
    for bonus in (None, torch.tensor(0.3)):
        goal, loss = A.batch_loss(weights, tokens, target, bonus, config=config, shapes=A.shapes_of(config))
        grad, = torch.autograd.grad(goal.sum(), weights)
        for i in range(3):
            module, seen = module_of(config, weights[i]), []
            monkeypatch.setattr(A, "causal_attention", partial(keep_weights, seen))
            logits = module(tokens[i].T)[:, module.PROMPT - 1:]
            own = F.cross_entropy(logits.flatten(0, 1), target[i].T.flatten())
            weight = seen[0][:, module.PROMPT - 1:]
            entropy = torch.special.entr(weight.masked_fill(weight == 0, 1)).sum(2).mean()
            assert loss[i].item() == pytest.approx(own.item(), rel=tolerance)
            own = own - (0 if bonus is None else bonus) * entropy
            own_grad = parameters_to_vector(torch.autograd.grad(own, list(module.parameters())))
            assert goal[i].item() == pytest.approx(own.item(), abs=max(tolerance, 1e-6 if bonus else 0))
            assert (grad[i] - own_grad).norm() < max(tolerance, 1e-5 if bonus else 0) * own_grad.norm()


@each_variant
def test_predictions_are_the_likeliest_tokens_of_the_module(flags):
    config = config_of(parse(*flags))
    row = random_weights(config, 1)[0]
    tokens, _ = A.encode(config.family, *A.uniform_pairs([1], 1100))         # more than a slice of 1,000
    module = module_of(config, row)
    with torch.no_grad():
        want = module(torch.from_numpy(tokens).long())[:, module.PROMPT - 1:].argmax(2).numpy()
    got = A.predictions(row, tokens, config, A.shapes_of(config))
    assert (got == want).all() and len(np.unique(got)) > 3


def first_wrong(got, target):
    """The first wrong digit of each answer, 11 if there is none."""
    wrong = got != target
    return np.where(wrong.any(1), wrong.argmax(1), A.ANSWER)


def short_and_long(n):
    """n pairs below 10, 100, 10^4 and 10^10 each."""
    return tuple(np.concatenate(x) for x in zip(*(A.uniform_pairs([8, k], n, k) for k in (1, 2, 4, 10)), strict=True))


@each_variant
def test_one_pass_over_its_own_greedy_answer_gives_that_answer(flags):
    config = config_of(parse(*flags))
    row = random_weights(config, 1, std=1.0)[0]
    module, pairs = module_of(config, row), short_and_long(50)
    said, _ = A.answers(module, pairs, "ar")
    tokens, _ = A.encode(config.family, *pairs)
    tokens[:, module.PROMPT:] = said[:, :tokens.shape[1] - module.PROMPT]
    assert (A.predictions(row, tokens, config, A.shapes_of(config))[:, :A.ANSWER] == said).all() and len(np.unique(said)) > 1


@pytest.mark.parametrize("run", ["rotary_run", "learned_run"])
def test_one_pass_and_greedy_answers_are_right_equally_often_after_training(run, request):
    module, _ = A.load_model(request.getfixturevalue(run) / "best_s1.pt")
    pairs = short_and_long(200)
    tf, ar = (first_wrong(*A.answers(module, pairs, mode)) for mode in ("tf", "ar"))
    assert (tf == ar).all() and 0 < (ar == A.ANSWER).sum() < len(ar)
    right, by_digit = A.exact_match(parameters_to_vector(module.parameters())[None], pairs, module.config, A.shapes_of(module.config))
    assert right.tolist() == [(ar == A.ANSWER).sum()]
    assert by_digit.tolist() == [(np.equal(*A.answers(module, pairs, "tf"))).sum(0).tolist()]


# ---- evaluation: a perfect, a constant, a broken model

class Scripted(torch.nn.Module):
    """A module that says the tokens it is given, whatever it reads."""
    PROMPT = A.LearnedAdder.PROMPT

    def __init__(self, said):
        super().__init__()
        self.config, self.said = config_of(parse("--preset", "ref456")), torch.as_tensor(said).long()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx):
        return F.one_hot(self.said[:, idx.shape[1] - self.PROMPT], 14).float()[:, None].expand(-1, idx.shape[1], -1)


def test_a_model_that_is_always_right_scores_1():
    pairs = A.uniform_pairs([1], 200)
    got, target = A.answers(Scripted(A.encode("learned", *pairs)[1]), pairs, "ar")
    assert (got == target).all() and got.shape == (200, 11)


@pytest.mark.parametrize("token", [A.EOS, A.PLUS, A.EQUALS, 12])
def test_early_eos_and_tokens_that_are_no_digits_are_wrong(token):
    pairs = digits(0, 12, 3), digits(0, 30, 4)                               # sums that zeros would complete
    said = A.encode("learned", *pairs)[1].astype(np.int64)
    said[:, 5:] = token
    got, target = A.answers(Scripted(said), pairs, "ar")
    assert not (got == target).all(1).any() and A.number(got[0]) is None


@both_families
def test_a_constant_model_scores_chance(preset):
    config = config_of(parse("--preset", preset))
    weights = torch.zeros(1, len(random_weights(config, 1)[0]))
    right, by_digit = A.exact_match(weights, A.uniform_pairs([1], 5000), config, A.shapes_of(config))
    assert right.tolist() == [0] and by_digit.shape == (1, 11)
    assert all(0.08 < x / 5000 < 0.12 for x in by_digit[0, :10].tolist()) and 0.45 < by_digit[0, 10] / 5000 < 0.55


@pytest.mark.parametrize("preset, value", [("rope196", math.nan), ("ref456", math.nan), ("ref456", 1e30)])
@pytest.mark.parametrize("mode", ["tf", "ar"])
def test_a_model_without_numbers_for_logits_scores_0(preset, mode, value):
    config = config_of(parse("--preset", preset))
    row = random_weights(config, 1)[0] * value
    module, pairs = module_of(config, row), tuple(np.concatenate(x) for x in zip((digits(0), digits(0)), A.uniform_pairs([1], 50), strict=True))
    assert module(torch.from_numpy(A.encode(config.family, *pairs)[0]).long()).isnan().all()
    got, target = A.answers(module, pairs, mode)
    assert not (got == target).all(1).any()
    assert A.exact_match(row[None], pairs, config, A.shapes_of(config))[0].tolist() == [0]


# ---- optimizer

def double(state):
    for f in fields(state):
        x = getattr(state, f.name)
        setattr(state, f.name, x.double() if x.is_floating_point() else x)
    return state


def updates(args, n):
    """n steps as the loop takes them; the states' weights before each."""
    config = config_of(args)
    shapes, state, before = A.shapes_of(config), double(A.new_population(config, args)), []
    tokens, target = A.batches(0, args)
    for step in range(n):
        before.append(state.weights.clone())
        weights = state.weights.detach().requires_grad_()
        _, loss = A.batch_loss(weights, tokens[step], target[step], config=config, shapes=shapes)
        grad, = torch.autograd.grad(loss.sum(), weights)
        with torch.no_grad():
            A.update(state, grad, loss, step, args)
    return state, before


@both_families
@pytest.mark.parametrize("clip", ["0.2", "0"])
def test_adamw_is_that_of_torch_on_the_module(preset, clip):
    args = parse("--preset", preset, *PLAIN, "--seeds", "4", "--grad-clip", clip)
    config = config_of(args)
    start = A.init_weights(config, args.init, 4).double()
    module = module_of(config, start)
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    tokens, target = A.batches(0, args)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = A.learning_rates(torch.tensor([step]), torch.tensor([60]), args).item()
        logits = module(tokens[step, 0].T)[:, module.PROMPT - 1:]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target[step, 0].T.flatten()).backward()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
        optimizer.step()
    state, _ = updates(args, 12)
    moved = parameters_to_vector(module.parameters()) - start
    assert torch.allclose(state.weights[0] - start, moved, rtol=1e-4, atol=5e-5) and moved.abs().mean() > 0.05


@both_families
def test_soap_in_the_identity_basis_is_adamw(preset, monkeypatch):
    monkeypatch.setattr(A, "new_basis", lambda state: None)
    a, b = (updates(parse("--preset", preset, *PLAIN, "--seeds", "0-1", "--optimizer", o), 10)[0] for o in ("adamw", "soap"))
    assert torch.allclose(a.weights, b.weights, rtol=1e-9, atol=1e-12) and (a.weights != A.new_population(
        config_of(parse("--preset", preset)), parse("--preset", preset, "--seeds", "0-1")).weights).any()


def test_the_basis_of_soap_is_orthogonal_and_diagonalizes_the_covariance():
    args = parse("--preset", "rope62", *PLAIN, "--seeds", "0-1", "--optimizer", "soap", "--basis-every", "1000")
    state, _ = updates(args, 30)
    old, square = state.basis.clone(), state.square.clone()
    A.new_basis(state)
    for i in range(2):
        basis, covariance = state.basis[i], state.covariance[i]
        assert torch.allclose(basis.T @ basis, torch.eye(len(basis)).double(), atol=1e-9)
        inside = basis.T @ covariance @ basis
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-9 * inside.diagonal().max()
        carried = (basis.T @ old[i] @ torch.diag(square[i]) @ old[i].T @ basis).diagonal()
        assert torch.allclose(state.square[i], carried, rtol=1e-9) and state.square[i].min() >= 0


def test_the_covariance_of_soap_is_the_running_mean_of_squares():
    args = parse("--preset", "rope62", *PLAIN, "--seeds", "0-1", "--optimizer", "soap", "--grad-clip", "0")
    state = double(A.new_population(config_of(args), args))
    want = torch.zeros_like(state.covariance)
    for step in range(5):
        grad = torch.randn(state.weights.shape, generator=torch.Generator().manual_seed(step)).double()
        A.update(state, grad, torch.ones(2), step, args)
        want = 0.99 * want + 0.01 * grad[:, :, None] * grad[:, None]
    assert torch.allclose(state.covariance, want, rtol=1e-9)


def test_soap_takes_equal_steps_along_the_eigenvectors():
    # a gradient that is +-1 along one fixed direction: in its eigenbasis Adam moves by lr along it, and not elsewhere
    args = parse("--preset", "rope62", *PLAIN, "--seeds", "0", "--optimizer", "soap", "--weight-decay", "0", "--warmup", "0")
    state = double(A.new_population(config_of(args), args))
    start, direction = state.weights.clone(), F.normalize(torch.arange(1.0, 63).double(), dim=0)
    A.update(state, direction[None].clone(), torch.ones(1), 0, args)
    assert torch.allclose(start - state.weights, 0.03 * direction, rtol=1e-4, atol=1e-8)


def still(*flags):
    """Weights before and after ten steps without any gradient."""
    args = parse(*PLAIN, "--seeds", "0", *flags)
    state = double(A.new_population(config_of(args), args))
    before = state.weights.clone()
    for step in range(10):
        A.update(state, torch.zeros_like(before), torch.ones(1), step, args)
    return before, state.weights, args


@pytest.mark.parametrize("until", [0.0, 0.1])
def test_weight_decay_falls_until_its_share_of_the_run(until):
    before, after, args = still("--preset", "rope62", "--weight-decay", "0.5", "--decay-until", str(until), "--lr", "0.1")
    factor = 1.0
    for step, lr in enumerate(rates(args, *range(10))):
        factor *= 1 - lr * 0.5 * (max(0, 1 - step / 6) if until else 1)      # 0.1 of 60 steps
    assert torch.allclose(after, before * factor, rtol=1e-5) and factor < 0.95


def test_the_entropy_bonus_falls_linearly_to_0():
    args = parse("--entropy-bonus", "0.2", "--entropy-until", "0.5")         # of 60 steps
    state = SimpleNamespace(born=torch.tensor([0, 20]))                      # the second seed was restarted at step 20
    got = [A.entropy_bonus(state, step, args).tolist() for step in (20, 30, 40, 59)]
    assert np.allclose(got, [[0.2 / 3, 0.2], [0, 0.1], [0, 0], [0, 0]], atol=1e-7)
    assert A.entropy_bonus(state, 0, parse("--entropy-bonus", "0")) is None


def test_smooth_positions_pulls_the_position_table_straight_and_nothing_else():
    before, after, args = still("--preset", "ref456", "--weight-decay", "0", "--smooth-positions", "0.5", "--lr", "0.1")
    config = config_of(args)
    (a, b) = (A.unflatten(x, A.shapes_of(config)) for x in (before, after))
    assert all(torch.equal(a[name], b[name]) == (name != "pos_emb.A") for name in a)
    bent = [x["pos_emb.A"][0].diff(n=2, dim=0).square().sum() for x in (a, b)]
    assert bent[1] < 0.9 * bent[0]
    table = a["pos_emb.A"][0]
    for step, lr in enumerate(rates(args, *range(10))):
        table = table.clone().requires_grad_()
        rough, = torch.autograd.grad(table.diff(n=2, dim=0).square().sum() / 2, table)
        table = table.detach() - lr * 0.5 * (1 - step / 42) * rough          # fades until 0.7 of 60 steps
    assert torch.allclose(b["pos_emb.A"][0], table, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_seed_without_a_finite_loss_or_gradient_stops_for_good(optimizer, bad):
    args = parse("--preset", "rope62", "--seeds", "0-1", "--optimizer", optimizer)
    state, _ = updates(args, 3)
    before = state.weights.clone()
    loss, grad = torch.ones(2), torch.ones_like(before)
    if bad == "loss":
        loss[0] = math.inf
    grad[0, 5] = math.nan
    A.update(state, grad, loss, 3, args)
    for step in (4, 5):
        A.update(state, torch.ones_like(before), torch.ones(2), step, args)
    assert state.alive.tolist() == [False, True]
    assert torch.equal(state.weights[0], before[0]) and (state.weights[1] != before[1]).all()
    assert torch.isfinite(state.weights).all() and torch.isfinite(state.square).all()


# ---- schedule

def rates(args, *ages):
    return A.learning_rates(torch.tensor(ages), torch.tensor([args.steps] * len(ages)), args).tolist()


@pytest.mark.parametrize("flags", [["--preset", "ref456"], SEED_LOG], ids=["preset", "seed log"])
def test_cosine_schedule_is_the_published_one(flags):
    args = A.parse_args(flags)
    ages = [0, 1, 1348, 1349, 1350, 1351, 10_000, 27_675, 53_999, 54_000]

    def published(step):
        if step < 1350:
            return 0.02 * (step + 1) / 1350
        return 0.002 + 0.018 * 0.5 * (1 + math.cos(math.pi * (step - 1350) / 52_650))
    assert rates(args, *ages) == pytest.approx([published(t) for t in ages], rel=1e-4)


def test_linear_schedule_falls_in_a_line_to_the_least_rate():
    args = parse("--steps", "110", "--warmup", "10", "--schedule", "linear", "--lr", "1", "--min-lr-ratio", "0.2")
    assert rates(args, 0, 4, 9, 10, 60, 85, 110) == pytest.approx([0.1, 0.5, 1, 1, 0.6, 0.4, 0.2], rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps, warmup", [(60, 0.1), (65, 0.1), (997, 0.03), (50, 0), (50, 7)])
def test_the_rate_rises_to_lr_and_falls_to_the_least_rate(steps, warmup, schedule):
    args = argparse.Namespace(steps=steps, warmup=warmup, min_lr_ratio=0.1, schedule=schedule, lr=0.5)
    got = np.array(rates(args, *range(steps + 1)))
    top = got.argmax()
    assert 0.45 < got.max() < 0.5 * (1 + 1e-5) and got[-1] == pytest.approx(0.05)
    assert (np.diff(got[:top + 1]) > 0).all() and (np.diff(got[top:]) <= 0).all()


# ---- stuck seeds

def test_a_stuck_seed_starts_anew_from_other_weights():
    args = parse("--preset", "rope62", *PLAIN, "--seeds", "0-2", "--optimizer", "soap")
    config = config_of(args)
    state, _ = updates(args, 15)
    state.alive[2] = False
    old = {f.name: getattr(state, f.name).clone() for f in fields(state)}
    stuck = torch.tensor([0.0, 0.5, 0.0])
    for step in (0, 10, 14, 35, 40):                                         # too early, or after its one chance
        A.restart_stuck(state, stuck, step, config, args)
    assert state.restarts.tolist() == [0, 0, 0]
    A.restart_stuck(state, stuck, 20, config, args)
    assert state.restarts.tolist() == [1, 0, 0] and state.born.tolist() == [20, 0, 0]
    for name in ("weights", "mean", "square", "covariance", "basis"):
        assert torch.equal(getattr(state, name)[1:], old[name][1:]), name    # of the others
    for name in ("mean", "square", "covariance"):
        assert (getattr(state, name)[0] == 0).all(), name
    assert torch.equal(state.basis[0], torch.eye(62).double())
    first = A.new_population(config, args).weights
    assert not torch.isclose(state.weights[0], old["weights"][0]).all()
    assert not any(torch.equal(state.weights[0].float(), row) for row in first), "it starts from the weights it had"


def test_restarts_are_reported_beside_the_rate_without_them(tmp_path, capsys, no_pictures):
    out = small(tmp_path / "run", "--preset", "rope196", "--seeds", "0-1", "--steps", "40", "--eval-every", "5",
                "--restart-stuck", "--lr", "0.001")
    assert out["n_restarts"] == 4 and [s["restarts"] for s in out["seeds"].values()] == [2, 2]
    assert out["n_grokked_without_restarts"] == 0
    text = capsys.readouterr().out
    assert text.count("is stuck at 0.0%") == 4 and "restarted 2 times" in text and "0 without restarts (4 restarts)" in text
    lr = {r["step"]: r["lr"] for r in metrics.read(tmp_path / "run") if r["seed"] == 0}
    args = parse(*PLAIN, "--lr", "0.001")
    for step, born in ((10, 0), (15, 10), (20, 10), (25, 20), (40, 20)):     # a quarter of the run, then again
        want = A.learning_rates(torch.tensor(step - born), torch.tensor(40 - born), args).item()
        assert lr[step] == pytest.approx(want)


def test_without_the_flag_nothing_restarts(tmp_path, no_pictures):
    out = small(tmp_path / "run", "--preset", "rope196", "--seeds", "0-1", "--steps", "40", "--lr", "0.001")
    assert out["n_restarts"] == 0 and out["n_grokked_without_restarts"] == out["n_grokked"] == 0


# ---- runs

def test_a_run_leaves_its_files_and_learns(rotary_run):
    files = {f.name for f in rotary_run.iterdir()}
    assert files >= {"args.json", "run.txt", "addition_train.py", "metrics.csv", "last.pt", "best_s0.pt", "best_s1.pt",
                     "summary.json", "exact.png", "positions.png", "attention.png"}
    rows = metrics.read(rotary_run)
    assert [(r["step"], r["seed"]) for r in rows] == [(t, s) for t in (0, 200, 400, 600) for s in (0, 1)]
    assert list(rows[0]) == ["step", "seed", "loss", "exact", *(f"digit{k}" for k in range(11)), "lr", "grad", "sec"]
    assert math.isnan(rows[0]["loss"]) and rows[0]["exact"] == 0             # nothing is known before the first step
    assert 1.2 < rows[2]["loss"] < 2.3 and rows[-1]["loss"] < 0.6            # ln 10; 1.2 where operands are unread
    assert rows[-1]["exact"] > 0.2 and all(r["exact"] <= min(r[f"digit{k}"] for k in range(11)) for r in rows)


def test_losses_and_figures_of_a_run_are_those_of_its_weights(rotary_run):
    pop, args = population(rotary_run), parse("--preset", "rope196")
    config, rows = config_of(args), metrics.read(rotary_run)[-2:]
    val, by_digit = A.exact_match(pop["weights"], A.uniform_pairs([A.VALIDATION], 50), config, A.shapes_of(config))
    assert [r["exact"] for r in rows] == pytest.approx([x / 50 for x in val.tolist()])
    assert [r["digit3"] for r in rows] == pytest.approx([x / 50 for x in by_digit[:, 3].tolist()])
    test, _ = A.exact_match(pop["weights"], A.uniform_pairs([A.TEST], 100), config, A.shapes_of(config))
    summary = json.loads((rotary_run / "summary.json").read_text())
    assert [s["exact"] for s in summary["seeds"].values()] == [x / 100 for x in test.tolist()]
    assert [s["errors"] for s in summary["seeds"].values()] == [100 - x for x in test.tolist()]


def test_the_loss_of_a_row_is_the_mean_since_the_last(tmp_path, no_pictures):
    args = parse("--preset", "rope196", *PLAIN, "--seeds", "0-1", "--steps", "10", "--eval-every", "4")
    small(tmp_path / "run", "--preset", "rope196", "--seeds", "0-1", "--steps", "10", "--eval-every", "4")
    _, before = updates(args, 10)
    config = config_of(args)
    tokens, target = A.batches(0, args)
    losses = torch.stack([A.batch_loss(w, tokens[i], target[i], config=config, shapes=A.shapes_of(config))[1] for i, w in enumerate(before)])
    got = [[r["loss"] for r in metrics.read(tmp_path / "run") if r["step"] == t] for t in (4, 8, 10)]
    want = [losses[a:b].mean(0).tolist() for a, b in ((0, 4), (4, 8), (8, 10))]
    assert np.array(got) == pytest.approx(np.array(want), rel=1e-3)


def test_the_summary_counts_seeds(rotary_run):
    out = json.loads((rotary_run / "summary.json").read_text())
    assert {"script", "name", "seed", "n_params", "seconds", "cpu_seconds", "command", "grok_interval"} <= out.keys()
    assert (out["n_params"], out["n_seeds"], out["n_grokked"], out["grok_rate"]) == (196, 2, 0, 0)
    assert list(out["seeds"]) == ["0", "1"] and out["steps"] == 600 and not out["stopped_early"] and out["test_size"] == 100
    assert out["seeds"]["1"].keys() >= {"first_step", "exact", "digits", "failed", "restarts", "best_step", "best_val"}
    assert out["seeds"]["1"]["first_step"] is None and len(out["seeds"]["1"]["digits"]) == 11


def test_a_seed_counts_from_99_percent_on(tmp_path, monkeypatch, no_pictures):
    shares = iter([0.0, 0.99, 0.5, 1.0, 0.989])

    def fake(weights, pairs, config, shapes):
        right = torch.tensor([round(next(shares) * len(pairs[0]))] * len(weights))
        return right, right[:, None].repeat(1, 11)
    monkeypatch.setattr(A, "exact_match", fake)
    out = small(tmp_path / "run", "--preset", "rope196", "--seeds", "0", "--val-size", "100", "--test-size", "1000")
    assert out["seeds"]["0"]["first_step"] == 20 and out["seeds"]["0"]["best_step"] == 60  # 0, 20, 40, 60; then the test
    assert out["seeds"]["0"]["exact"] == 0.989 and out["n_grokked"] == 0


def test_best_checkpoints_are_chosen_by_validation_the_later_of_a_tie(rotary_run):
    rows, pop = metrics.read(rotary_run), population(rotary_run)
    for i in (0, 1):
        module, saved = A.load_model(rotary_run / f"best_s{i}.pt")
        mine = [(r["exact"], r["step"]) for r in rows if r["seed"] == i]
        assert (saved["val_exact"], saved["step"]) == pytest.approx(max(mine)) and saved["seed"] == i
        assert torch.equal(parameters_to_vector(module.parameters()), pop["best"][i])


def test_best_of_a_population_by_hand(monkeypatch):
    args = parse("--preset", "rope62", "--seeds", "0-1")
    state, counts = A.new_population(config_of(args), args), iter([[3, 5], [3, 4], [2, 10], [9, 10]])
    monkeypatch.setattr(A, "exact_match", lambda w, p, c, s: (torch.tensor(next(counts)), torch.zeros(2, 11)))
    for step in range(4):
        state.weights += 1
        A.validate(state, A.uniform_pairs([A.VALIDATION], 10), None, None, step)
    assert state.best_val.tolist() == [9, 10] and state.best_step.tolist() == [3, 3] and state.first.tolist() == [-1, 2]
    assert torch.equal(state.best, state.weights)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
@both_families
def test_a_seed_is_bit_equal_alone_and_in_company(tmp_path, no_pictures, preset, optimizer):
    flags = ["--preset", preset, "--optimizer", optimizer, "--basis-every", "40", "--steps", "50", "--eval-every", "50"]
    small(tmp_path / "alone", *flags, "--seeds", "5")
    small(tmp_path / "company", *flags, "--seeds", "3,5,8")
    alone, company = population(tmp_path / "alone"), population(tmp_path / "company")
    for name, x in alone.items():
        assert torch.equal(x[0], company[name][1]), name
    assert not torch.equal(company["weights"][0], company["weights"][1])


def same_run(a, b):
    rows = [[{k: v for k, v in r.items() if k != "sec" and v == v} for r in metrics.read(d)] for d in (a, b)]
    assert rows[0] == rows[1]
    for name, x in population(a).items():
        assert torch.equal(x, population(b)[name]), name
    left, right = (json.loads((d / "summary.json").read_text()) for d in (a, b))
    assert left["seeds"] == right["seeds"]


def stop_at(monkeypatch, *steps):
    """As if the time was up at these steps (counted over all runs)."""
    calls = []

    def expired(self):
        calls.append(1)
        return len(calls) - 1 in steps
    monkeypatch.setattr(A.run.Clock, "expired", expired)


@pytest.mark.parametrize("flags", [["--preset", "rope196"],
                                   ["--preset", "ref456", "--optimizer", "soap", "--basis-every", "30", "--random-zeros", "0.2",
                                    "--d-model", "4", "--d-ff", "5"]], ids=["rotary", "learned"])
def test_resume_is_bit_exact(tmp_path, monkeypatch, no_pictures, flags):
    flags = [*flags, "--seeds", "0-1", "--steps", "70", "--full-length", "0.2", "--batch-size", "8"]
    small(tmp_path / "whole", *flags)
    cuts = [0, 7, 20, 64]                                                    # of chunks of 50 steps, evaluations every 20
    stop_at(monkeypatch, *(t + i for i, t in enumerate(cuts)))
    assert small(tmp_path / "cut", *flags)["stopped_early"]
    for cut in cuts[1:]:
        out = A.main(["--resume", str(tmp_path / "cut")])
        assert out["steps"] == cut and out["stopped_early"]
    out = A.main(["--resume", str(tmp_path / "cut")])
    assert out["steps"] == 70 and not out["stopped_early"]
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_is_bit_exact_where_a_stuck_seed_was_due(tmp_path, monkeypatch, no_pictures):
    flags = ["--preset", "rope196", "--seeds", "0-1", "--steps", "40", "--eval-every", "10", "--restart-stuck"]
    small(tmp_path / "whole", *flags)
    assert population(tmp_path / "whole")["restarts"].sum() > 0
    stop_at(monkeypatch, 10)
    small(tmp_path / "cut", *flags)
    A.main(["--resume", str(tmp_path / "cut")])
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_before_they_leave(plain_run, tmp_path, monkeypatch, capsys, no_pictures, number):
    real, calls = A.update, []

    def update(*x):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), number)
        return real(*x)
    monkeypatch.setattr(A, "update", update)
    with pytest.raises(SystemExit) as e:
        small(tmp_path / "cut", *PLAIN_RUN)
    assert e.value.code == 128 + number and not (tmp_path / "cut" / "summary.json").exists()
    assert f"stopped at step 8; go on with: python addition_train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 8
    A.main(["--resume", str(tmp_path / "cut")])
    same_run(plain_run, tmp_path / "cut")


def test_max_minutes_ends_a_run_with_its_summary(tmp_path, no_pictures):
    out = small(tmp_path / "run", "--preset", "rope196", "--seeds", "0", "--steps", "100000", "--max-minutes", "0.005")
    assert out["stopped_early"] and 0 < out["steps"] < 2000 and out["seconds"] < 5
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == out["steps"]


def test_a_finished_run_resumed_gives_its_summary_again(tmp_path, no_pictures):
    a = small(tmp_path / "run", "--preset", "rope196", "--seeds", "0-1", "--steps", "20")
    b = A.main(["--resume", str(tmp_path / "run")])
    assert a["seeds"] == b["seeds"] and len(metrics.read(tmp_path / "run")) == 4


def test_a_run_shorter_than_its_preset_can_be_resumed(tmp_path, no_pictures):
    flags = ["--preset", "ref456", "--steps", "20", "--batch-size", "4", "--seeds", "0", "--val-size", "20", "--test-size", "20"]
    a = A.main([*flags, "--out-dir", str(tmp_path / "run")])                 # its warm-up has 1350 steps
    assert A.main(["--resume", str(tmp_path / "run")])["seeds"] == a["seeds"]


@pytest.mark.parametrize("flags, named", [(["--lr", "0.5"], "--lr is 0.5 here"), (["--d-model", "5"], "--d-model is 5"),
                                          (["--seeds", "0-2"], "--seeds"), (["--preset", "ref456"], "--preset")])
def test_resume_refuses_other_flags(rotary_run, flags, named):
    before = (rotary_run / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match=named) as e:
        A.main(["--resume", str(rotary_run), *flags])
    assert "keeps its flags" in str(e.value) and (rotary_run / "last.pt").read_bytes() == before


def test_resume_refuses_one_model(rotary_run):
    with pytest.raises(SystemExit, match="holds one model"):
        A.main(["--resume", str(rotary_run / "best_s0.pt")])


def test_a_run_resumed_into_another_folder_takes_its_record_along(tmp_path, monkeypatch, no_pictures):
    stop_at(monkeypatch, 50)
    small(tmp_path / "cut", *PLAIN_RUN)
    monkeypatch.setattr(A, "exact_match", lambda w, p, c, s: (torch.full((2,), -5), torch.zeros(2, 11)))  # no new best
    A.main(["--resume", str(tmp_path / "cut"), "--out-dir", str(tmp_path / "new")])
    assert [r["step"] for r in metrics.read(tmp_path / "new")[::2]] == [0, 20, 40, 60]
    assert {f.name for f in (tmp_path / "new").glob("best_s*.pt")} == {"best_s0.pt", "best_s1.pt"}


def test_a_folder_that_holds_a_run_is_not_overwritten(rotary_run):
    before = (rotary_run / "summary.json").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already"):
        small(rotary_run)
    assert (rotary_run / "summary.json").read_bytes() == before


FROZEN = ["--preset", "rope196", "--steps", "1", "--lr", "1e-12"]


def test_init_from_one_model_gives_it_to_every_seed(rotary_run, tmp_path, no_pictures):
    small(tmp_path / "run", *FROZEN, "--seeds", "7-9", "--init-from", str(rotary_run / "best_s1.pt"))
    pop = population(tmp_path / "run")
    assert torch.allclose(pop["weights"], population(rotary_run)["best"][1].expand(3, -1), atol=1e-9)
    assert pop["born"].tolist() == [0, 0, 0] and pop["best_step"].tolist() == [1, 1, 1] and (pop["square"] < 1).all()


def test_init_from_a_run_folder_gives_its_best_model_to_every_seed(rotary_run, tmp_path, no_pictures):
    small(tmp_path / "run", *FROZEN, "--seeds", "0-2", "--init-from", str(rotary_run))
    pop = population(rotary_run)
    assert torch.allclose(population(tmp_path / "run")["weights"], pop["best"][pop["best_val"].argmax()].expand(3, -1), atol=1e-9)


def test_init_from_last_pt_takes_the_weights_of_the_same_seeds(rotary_run, tmp_path, no_pictures):
    small(tmp_path / "run", *FROZEN, "--seeds", "1,0", "--init-from", str(rotary_run / "last.pt"))
    assert torch.allclose(population(tmp_path / "run")["weights"], population(rotary_run)["weights"][[1, 0]], atol=1e-9)


@pytest.mark.parametrize("flags, named", [(["--seeds", "1-2"], "no seed 2"), (["--d-ff", "5"], "another config"),
                                          (["--preset", "ref456"], "another config")])
def test_init_from_refuses_what_does_not_fit(rotary_run, tmp_path, flags, named):
    with pytest.raises(SystemExit, match=named) as e:
        small(tmp_path / "run", "--preset", "rope196", "--seeds", "0-1", *flags, "--init-from", str(rotary_run / "last.pt"))
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def poison(monkeypatch, factors, after):
    real, calls = A.batch_loss, []

    def loss(*x, **k):
        calls.append(1)
        factor = torch.tensor(factors if len(calls) > after else [1.0] * len(factors))
        return tuple(y * factor for y in real(*x, **k))
    monkeypatch.setattr(A, "batch_loss", loss)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_a_seed_without_a_finite_loss_is_marked_failed_and_the_others_go_on(tmp_path, monkeypatch, capsys, no_pictures, optimizer):
    flags = ["--preset", "rope62", "--seeds", "0-2", "--optimizer", optimizer]
    small(tmp_path / "sound", *flags)
    poison(monkeypatch, [1.0, math.inf, 1.0], 25)
    out = small(tmp_path / "run", *flags)
    assert [s["failed"] for s in out["seeds"].values()] == [False, True, False]
    assert capsys.readouterr().out.count("failed: its loss was not finite") == 1
    sound, pop = population(tmp_path / "sound"), population(tmp_path / "run")
    assert all(torch.equal(x[[0, 2]], pop[name][[0, 2]]) for name, x in sound.items())
    assert torch.isfinite(pop["weights"]).all() and not torch.equal(sound["weights"][1], pop["weights"][1])


def test_a_failed_seed_does_not_count_as_grokked(tmp_path, monkeypatch, no_pictures):
    poison(monkeypatch, [math.nan, 1.0], 5)
    monkeypatch.setattr(A, "exact_match", lambda w, p, c, s: (torch.full((2,), len(p[0])), torch.full((2, 11), len(p[0]))))
    out = small(tmp_path / "run", "--preset", "rope62", "--seeds", "0-1")
    assert (out["n_grokked"], out["grok_rate"], out["n_perfect"]) == (1, 0.5, 1)


def test_a_run_whose_seeds_all_fail_still_ends(tmp_path, monkeypatch):
    poison(monkeypatch, [math.inf, math.nan], 0)
    out = small(tmp_path / "run", "--preset", "rope62", "--seeds", "0-1", "--steps", "5")
    assert all(s["failed"] for s in out["seeds"].values()) and out["n_grokked"] == 0
    assert (tmp_path / "run" / "exact.png").is_file()


def test_a_run_of_soap_on_eight_seeds_can_be_resumed(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(A, "new_basis", lambda state: None)  # its size is the question here
    flags = ["--preset", "ref456", "--optimizer", "soap", "--seeds", "0-7", "--steps", "1", "--batch-size", "2"]
    out = small(tmp_path / "run", *flags)
    assert A.main(["--resume", str(tmp_path / "run")])["seeds"] == out["seeds"]


def test_seed_names_one_seed_and_no_flag_eight():
    assert A.parse_args([]).seeds == list(range(8)) and A.parse_args(["--seed", "43"]).seeds == [43]
    assert A.parse_args(["--seeds", "42-44,51"]).seeds == [42, 43, 44, 51]


def test_a_flag_wins_over_the_preset():
    args = A.parse_args(["--preset", "ref456", "--lr", "0.5", "--d-ff", "13"])
    assert (args.lr, args.d_ff, args.d_model) == (0.5, 13, A.PRESETS["ref456"]["d_model"])


@pytest.mark.parametrize("moment", ["wrapping", "first call"])
def test_without_a_compiler_the_step_runs_eager_and_says_so(plain_run, tmp_path, monkeypatch, capsys, no_pictures, moment):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nand a long trace")
    monkeypatch.setattr(torch, "compile", broken if moment == "wrapping" else lambda f, **k: broken)
    out = small(tmp_path / "on", *PLAIN_RUN, "--compile", "on")
    text = capsys.readouterr().out
    assert out["step_runs"].startswith("eager") and "torch.compile failed (no C++ compiler found)" in out["step_runs"]
    assert "the step runs eager, 2 to 4 times" in text and "trace" not in text
    same_run(plain_run, tmp_path / "on")


def test_compile_auto_is_for_long_runs_alone(tmp_path, monkeypatch, no_pictures):
    class Asked(Exception):
        pass

    def compiled(*x):
        raise Asked
    monkeypatch.setattr(A, "compiled", compiled)
    flags = ["--preset", "rope196", "--seeds", "0", "--compile", "auto"]
    assert small(tmp_path / "short", *flags, "--steps", "5")["step_runs"] == "eager"
    with pytest.raises(Asked):
        small(tmp_path / "long", *flags, "--steps", "10000000")


@pytest.mark.slow
@both_families
def test_the_compiled_step_agrees_with_the_eager_one(preset):
    args = parse("--preset", preset, "--seeds", "0-1")
    config = config_of(args)
    eager, tokens, target = partial(A.batch_loss, config=config, shapes=A.shapes_of(config)), *A.batches(0, args)
    weights = random_weights(config, 2).requires_grad_()
    fast, how = A.compiled(eager, weights, tokens[0], target[0])
    assert how == "compiled"
    for step in range(3):
        a, b = (f(weights, tokens[step], target[step])[0] for f in (fast, eager))
        (da,), (db,) = (torch.autograd.grad(x.sum(), weights) for x in (a, b))
        assert torch.allclose(a, b, rtol=1e-5) and ((da - db).norm(dim=1) < 1e-4 * db.norm(dim=1)).all()


def test_plot_draws_the_pictures_again(rotary_run, tmp_path, capsys):
    for name in ("summary.json", "metrics.csv", "best_s0.pt", "best_s1.pt"):
        (tmp_path / name).write_bytes((rotary_run / name).read_bytes())
    A.main(["--plot", str(tmp_path)])
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == ["attention.png", "exact.png", "positions.png"] and all(p.stat().st_size > 5000 for p in pictures)
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in ("exact.png", "positions.png", "attention.png")]
