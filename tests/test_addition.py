"""addition_train.py: the problem, its data, both models, loss, optimizer, schedule, and the runs."""
import inspect
import json
import math
import os
import re
import signal
import textwrap
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import addition_train as A
from common import metrics
from common.evaluation import count_parameters
from common.files import read_json

FAST = settings(deadline=None, derandomize=True, max_examples=60)
SMALL = ["--steps", "60", "--batch-size", "16", "--lengths", "uniform", "--warmup", "0.1", "--compile", "off",
         "--device", "cpu", "--eval-every", "20"]
SEED_LOG = ["--pos-rank", "3", "--qkv-rank", "3", "--attn-out-rank", "2", "--ffn-rank", "3", "--use-rmsnorm",
            "--tie-qkv", "shareA_tieKV", "--train-steps", "54000", "--device", "cpu", "--seed", "43"]
RANK3 = ["--preset", "ref", "--pos-rank", "3", "--qkv-rank", "3", "--attn-out-rank", "3", "--ffn-rank", "3"]
VARIANTS = {
    **{name: ["--preset", name] for name in A.PRESETS},
    "layernorm, rank 3": RANK3,
    "rmsnorm, rank 3": [*RANK3, "--use-rmsnorm"],
    "rmsnorm, full rank": ["--preset", "ref", "--use-rmsnorm"],
    "some ranks": ["--preset", "ref", "--pos-rank", "2", "--ffn-rank", "1", "--d-model", "9", "--d-ff", "5"],
    "tied": ["--tie", "kv+oq"],
    "all tied": ["--tie", "all", "--d-model", "6"],
    "arc": ["--embedding", "arc"],
}
each_variant = pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
both_families = pytest.mark.parametrize("preset", ["rope196", "ref456"])
both_optimizers = pytest.mark.parametrize("optimizer", ["soap", "adamw"])
operand = st.one_of(st.integers(0, A.LIMIT - 1), st.integers(0, 10).flatmap(lambda k: st.sampled_from(
    [max(10**k - 1, 0), min(10**k, A.LIMIT - 1), A.LIMIT - 10**k, 5 * 10**k % A.LIMIT])))
draw_pictures = A.draw_pictures


@pytest.fixture(autouse=True, scope="module")
def small_sets():
    """Few pairs, and no pictures: they take a second a run."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(A, "VAL_SIZE", 50)
        m.setattr(A, "TEST_SIZE", 100)
        m.setattr(A, "draw_pictures", lambda folder: [])
        yield


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def parse(*flags):
    return A.parse_args([*SMALL, *flags])


def small(folder, *flags):
    return A.main([*SMALL, "--out-dir", str(folder), *flags])


def population(folder):
    return torch.load(folder / "last.pt", weights_only=True)["population"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """60 steps of seeds 0 and 1, unbroken."""
    folder = tmp_path_factory.mktemp("addition") / "plain"
    small(folder, "--seeds", "0-1")
    return folder


@pytest.fixture(scope="module")
def learned_to_add(tmp_path_factory):
    """450 steps of AdamW, after which a few of the longest sums are right."""
    folder = tmp_path_factory.mktemp("addition") / "adds"
    small(folder, "--seeds", "0-1", "--steps", "450", "--eval-every", "150", "--optimizer", "adamw", "--lr", "0.03",
          "--weight-decay", "0.01", "--entropy-bonus", "0")
    return folder


def digits(*numbers):
    return A.digits_of(np.array(numbers, np.int64), A.DIGITS)


def numbers(d):
    """Digits (..., n), least significant first -> whole numbers (...)."""
    return (d.astype(np.int64) * 10 ** np.arange(d.shape[-1], dtype=np.int64)).sum(-1)


# ---- problem

@FAST
@given(st.integers(0, 2 * A.LIMIT - 2))
def test_digits_are_those_of_the_decimal_text(x):
    d = A.digits_of(np.array([x]), 11)[0]
    assert d.tolist() == [int(t) for t in f"{x:011d}"[::-1]]
    assert A.number(d) == x


@FAST
@given(operand, operand)
def test_sum_and_carries_are_those_of_whole_numbers(a, b):
    assert numbers(A.digit_sum(digits(a), digits(b))).tolist() == [a + b]
    want = [int(a % 10**k + b % 10**k >= 10**k) for k in range(1, 11)]
    assert A.carries(digits(a), digits(b))[0].tolist() == want


def test_digits_of_many_numbers_keep_their_shape():
    x = np.arange(6).reshape(2, 3) * 1_234_567_890
    d = A.digits_of(x, 10)
    assert d.shape == (2, 3, 10)
    assert (numbers(A.digit_sum(d, d)) == 2 * x).all()


def test_the_learned_family_reads_and_writes_as_published():
    tokens, target = A.encode("learned", digits(50), digits(70))
    assert "".join("0123456789+="[t] for t in tokens[0]) == "0000000050+0000000070=" + "02100000000"
    assert target[0].tolist() == [0, 2, 1, *[0] * 8, 13]


def test_the_rotary_family_has_digit_k_at_1_13_and_23_plus_k():
    a, b = 1234567890, 9876543219
    tokens, target = A.encode("rotary", digits(a), digits(b))
    assert "".join(map(str, tokens[0])) == "0" + "0987654321" + "00" + "9123456789" + "0" + f"{a + b:011d}"[:0:-1]
    assert "".join(map(str, target[0])) == f"{a + b:011d}"[::-1]
    for k in range(10):
        assert (tokens[0, 1 + k], tokens[0, 13 + k]) == (a // 10**k % 10, b // 10**k % 10)
        assert tokens[0, 24 + k] == target[0, k]


@pytest.mark.parametrize("family, T", [("rotary", 34), ("learned", 33)])
def test_the_last_positions_predict_the_target(family, T):
    tokens, target = A.encode(family, *A.uniform_pairs([0], 50))
    model, Q = A.FAMILIES[family], target.shape[1]
    assert (tokens.shape[1], Q) == (T, model.OUTPUTS)
    assert T == model.PROMPT + Q - 1
    assert (tokens[:, 1 - Q:] == target[:, :-1]).all()


def test_a_token_that_is_no_digit_is_no_number():
    assert A.number(np.array([3, 2, 1])) == 123
    for bad in (A.PLUS, A.EQUALS, 12, A.EOS, -1):
        assert A.number(np.array([3, bad, 1])) is None


# ---- data

def drawn(args, chunk=0):
    """Both operands (CHUNK, S, B) as whole numbers, and the target (CHUNK, S, B, Q)."""
    tokens, target = (x.numpy().swapaxes(-1, -2) for x in A.batches(chunk, args))
    if args.family == "rotary":
        a, b = tokens[..., 1:11], tokens[..., 13:23]
    else:
        a, b = tokens[..., 9::-1], tokens[..., 20:10:-1]
    return numbers(a), numbers(b), target


def test_batches_are_a_pure_function_of_seed_and_chunk():
    args = parse("--seeds", "3,5")
    first = A.batches(7, args)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(x, y) for x, y in zip(first, A.batches(7, args), strict=True))
    assert not torch.equal(first[0], A.batches(8, args)[0])


def test_a_seeds_stream_does_not_depend_on_the_others():
    company, alone = (A.batches(2, parse("--seeds", seeds))[0] for seeds in ("3,5,8", "5"))
    assert torch.equal(company[:, 1], alone[:, 0])
    assert not torch.equal(company[:, 0], alone[:, 0])


@both_families
def test_targets_are_the_sums_and_stand_in_the_input(preset):
    args = parse("--preset", preset, "--seeds", "0-1", "--random-zeros", "0.5")
    a, b, target = drawn(args)
    assert a.shape == (A.CHUNK, 2, 16)
    assert (numbers(target[..., :11]) == a + b).all()
    assert (target[..., 11:] == A.EOS).all()
    tokens = A.batches(0, args)[0].numpy()
    assert (tokens[:, :, 1 - target.shape[-1]:] == target.swapaxes(-1, -2)[:, :, :-1]).all()


@pytest.mark.parametrize("lengths, chances", [
    ("uniform", [sum(1 - 0.01 ** (n - m) for n in range(m + 1, 11)) / 10 for m in range(1, 10)]),
    ("full", [1 - 0.01 ** (10 - m) for m in range(1, 10)])])
def test_both_operands_are_below_10_to_the_n_with_n_uniform_or_10(lengths, chances):
    a, b, _ = drawn(parse("--seeds", "0", "--batch-size", "400", "--lengths", lengths))
    longest = np.maximum(a, b).ravel()
    for m, p in enumerate(chances, 1):                                       # a digit from m on is not 0
        assert abs((longest >= 10**m).mean() - p) < 5 * math.sqrt(0.25 / len(longest))
    short = longest < 10
    assert short.mean() < 0.2 and (a != b).any()


def test_curriculum_bounds_the_operands_until_its_steps():
    args = parse("--seeds", "0", "--batch-size", "200", "--lengths", "3:20,6:40")
    first, second = (np.maximum(*drawn(args, chunk)[:2]) for chunk in (0, 1))
    for x, n in ((first[:20], 3), (first[20:40], 6), (first[40:], 10), (second, 10)):
        assert x.max() < 10**n
        assert abs((x >= 10 ** (n - 1)).mean() - 0.99 / n) < 0.04            # 5 sigma of 2,000


def test_the_share_of_sums_with_random_zeros_falls_in_a_line_to_0():
    flags = ["--seeds", "0", "--batch-size", "400", "--lengths", "full", "--steps", "100"]
    x, y = (A.digits_of(np.stack([np.stack(drawn(parse(*flags, "--random-zeros", share), chunk)[:2])
                                  for chunk in (0, 1)], 1), 10) for share in ("0", "1.5"))
    assert ((y == x) | (y == 0)).all()
    x, y = (z.reshape(2, 100, 400, 10) for z in (x, y))
    touched = (y != x).any((0, 3)).mean(1)           # of each step; at a rate near 0 a sum stays as it is
    for step in range(100):
        share = min(1.5 * (1 - step / 100), 1)
        assert share - 0.2 < touched[step] < share + 0.11, step
    zeroed = ((y != x)[:, :33] & (x[:, :33] > 0)).sum(-1) / np.maximum((x[:, :33] > 0).sum(-1), 1)
    assert zeroed.mean() == pytest.approx(0.5, abs=0.02)                     # rates are uniform in 0..1
    assert abs(np.corrcoef(zeroed.reshape(2, -1))[0, 1]) < 0.05              # and each operand has its own


def test_training_validation_test_and_split_pairs_are_different_ones():
    def pairs(a, b):
        return set(zip(numbers(a).ravel().tolist(), numbers(b).ravel().tolist(), strict=True))
    sets = [pairs(*A.uniform_pairs([stream], 2000)) for stream in (A.VALIDATION, A.TEST)]
    sets.append(pairs(*A.split_pairs(41, 2000)))
    args = parse("--seeds", "0-7", "--lengths", "full", "--batch-size", "8")
    for chunk in (0, 1):
        a, b, _ = drawn(args, chunk)
        sets += [set(zip(a[:, i].ravel().tolist(), b[:, i].ravel().tolist(), strict=True)) for i in range(8)]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 3 * 2000 + 2 * 8 * A.CHUNK * 8


def test_uniform_pairs_are_all_pairs_below_a_power_of_ten():
    a, b = (numbers(x) for x in A.uniform_pairs([9], 3000, 2))
    assert set(a.tolist()) == set(b.tolist()) == set(range(100))
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) > 2000


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


# ---- model

def model_of(flags, std=0.4):
    """A module whose weights are far from any symmetry of the initial ones."""
    config = A.config_of(parse(*flags))
    module, start = A.make_module(config), A.init_weights(config, "random", 0)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    vector_to_parameters(start + std * noise, module.parameters())
    return module.requires_grad_(False)


def some_tokens(module, n):
    return A.batch_last(A.encode(module.config.family, *A.uniform_pairs([1], n))[0])


@pytest.mark.parametrize("flags, count", [
    (SEED_LOG, 456), (["--preset", "ref456"], 456), (["--preset", "ref"], 763), (RANK3, 512),
    ([*RANK3, "--use-rmsnorm"], 491), (["--preset", "rope196"], 196), (["--preset", "rope140"], 140),
    (["--preset", "rope122"], 122), (["--preset", "rope62"], 62), (["--preset", "rope36"], 36),
    (["--d-model", "6", "--d-ff", "8"], 326)])
def test_parameter_counts_to_the_digit(flags, count):
    assert count_parameters(A.make_module(A.config_of(A.parse_args(flags)))) == count


@pytest.mark.parametrize("preset", A.PRESETS)
def test_every_preset_has_the_parameters_of_its_name_and_of_its_initial_weights(preset):
    args = A.parse_args(["--preset", preset])
    config = A.config_of(args)
    n, named = count_parameters(A.make_module(config)), re.search(r"\d+$", preset)
    assert named is None or n == int(named[0])
    assert A.init_weights(config, args.init, 0).shape == (n,)


def test_the_456_model_has_the_names_and_shapes_of_published_checkpoints():
    module = A.make_module(A.config_of(parse("--preset", "ref456")))
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "token_emb.weight": (14, 7), "pos_emb.A": (33, 3), "pos_emb.B": (3, 7), "blocks.0.ln1.weight": (7,),
        "blocks.0.attn.qkv_A": (7, 3), "blocks.0.attn.qkv_Bq": (3, 7), "blocks.0.attn.qkv_Bkv": (3, 7),
        "blocks.0.attn.proj.A": (7, 2), "blocks.0.attn.proj.B": (2, 7), "blocks.0.ln2.weight": (7,),
        "blocks.0.mlp.fc1.A": (7, 3), "blocks.0.mlp.fc1.B": (3, 14), "blocks.0.mlp.fc2.A": (14, 3),
        "blocks.0.mlp.fc2.B": (3, 7), "ln_f.weight": (7,), "lm_head.weight": (14, 7)}
    assert module.lm_head.weight is module.token_emb.weight


def initial(flags, seed):
    """Initial weights of a seed by name."""
    args = parse(*flags)
    config = A.config_of(args)
    return A.by_name(A.init_weights(config, args.init, seed), A.make_module(config))


def test_seed_43_starts_from_the_weights_of_the_published_constructor():
    torch.manual_seed(43)
    torch.randn(14, 7)                                                       # nn.Embedding's own draw
    want = {"pos_emb.A": 0.02 * torch.randn(33, 3), "pos_emb.B": 0.02 * torch.randn(3, 7)}
    for name, (n_in, n_out) in {
            "attn.qkv_A": (7, 3), "attn.qkv_Bq": (3, 7), "attn.qkv_Bkv": (3, 7), "attn.proj.A": (7, 2),
            "attn.proj.B": (2, 7), "mlp.fc1.A": (7, 3), "mlp.fc1.B": (3, 14), "mlp.fc2.A": (14, 3),
            "mlp.fc2.B": (3, 7)}.items():
        want["blocks.0." + name] = (2 / (n_in + n_out)) ** 0.5 * torch.randn(n_in, n_out)
    torch.rand(14, 7)                                                        # nn.Linear's own draw, for the tied head
    torch.randn(14, 7)
    want["token_emb.weight"] = 0.02 * torch.randn(14, 7)                     # drawn as embedding, then again as head
    for name, x in initial(["--preset", "ref456"], 43).items():
        assert torch.allclose(x, want.get(name, torch.ones(7)), rtol=1e-6, atol=0), name


def causal(score):
    return (score + torch.full(score.shape[1:], -math.inf).triu(1)).softmax(-1)


def learned_by_description(w, idx):
    """The 456-parameter project's model: pre-norm, exact GELU, scale 1/sqrt(width); tied: K = V."""
    def norm(x, name):
        if f"{name}.bias" in w:
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt() * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.A"] @ w[f"{name}.B"] if f"{name}.A" in w else x @ w[f"{name}.weight"].T
    positions = w["pos_emb.weight"] if "pos_emb.weight" in w else w["pos_emb.A"] @ w["pos_emb.B"]
    x = w["token_emb.weight"][idx] + positions[:idx.shape[1]]
    h = norm(x, "blocks.0.ln1")
    if "blocks.0.attn.qkv_A" in w:
        h = h @ w["blocks.0.attn.qkv_A"]
        q, k, v = (h @ w[f"blocks.0.attn.qkv_B{name}"] for name in ("q", "kv", "kv"))
    else:
        q, k, v = linear(h, "blocks.0.attn.qkv").chunk(3, -1)
    attention = causal(q @ k.mT / math.sqrt(x.shape[-1]))
    x = x + linear(attention @ v, "blocks.0.attn.proj")
    h = linear(norm(x, "blocks.0.ln2"), "blocks.0.mlp.fc1")
    x = x + linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), "blocks.0.mlp.fc2")
    return norm(x, "ln_f") @ w["lm_head.weight"].T, attention


def turned(m, i, j, angle):
    """Columns i and j of a matrix as complex numbers, multiplied by e^(i angle)."""
    pair = torch.complex(m[:, i], m[:, j]) * torch.polar(torch.ones(1), angle)
    m = m.clone()
    m[:, i], m[:, j] = pair.real, pair.imag
    return m


def rotary_by_description(w, idx):
    """The small rotary models, with complex numbers for the rotated pairs."""
    if w["emb"].dim() == 1:
        points = torch.polar(w["emb"][0].expand(10), w["emb"][1] + w["emb"][2] * torch.arange(10))
        w["emb"] = torch.cat([torch.view_as_real(points), torch.zeros(10, len(w["wq"]) - 2)], 1)
    if "wk_angle" in w:
        w["wk"] = turned(w["wq"], 0, 2, w["wk_angle"])
        w["wv"] = w["wq"]
        w["down"] = turned(w["up"].T, 0, 1, w["down_angle"])

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def at_its_position(x):
        angle = torch.arange(idx.shape[1])[:, None] * torch.tensor([math.pi / 6, 1 / math.sqrt(3)])
        return torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(angle), angle)
    x = w["emb"][idx]
    h = norm(x, "norm1")
    q, k = (at_its_position(norm(h @ w[f"w{name}"], f"{name}_norm")) for name in "qk")
    attention = causal((q @ k.conj().mT).real / 2)
    x = x + attention @ (h @ w.get("wv", w["wk"])) @ w.get("wo", w["wq"].T)
    h = norm(x, "norm2")
    gate = h @ w["gate"]
    x = x + (gate * gate.sigmoid() * (h @ w["up"])) @ w["down"]
    return norm(x, "norm_f") @ w["emb"].T, attention


@each_variant
def test_the_module_is_the_model_described(float64, flags):
    module = model_of(flags)
    tokens = some_tokens(module, 20)
    describe = rotary_by_description if module.config.family == "rotary" else learned_by_description
    want, want_attention = describe(dict(module.state_dict()), tokens.T)
    logits, attention = module(tokens, len(tokens))
    assert torch.allclose(logits.permute(2, 1, 0), want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(attention.permute(2, 0, 1), want_attention, rtol=1e-9, atol=1e-9)


@each_variant
def test_a_later_token_changes_no_earlier_logit(float64, flags):
    module = model_of(flags)
    tokens = some_tokens(module, 4)
    T = len(tokens)
    for t in (0, 13, 24, T - 1):
        other = tokens.clone()
        other[t] = (other[t] + 3) % 10
        same = torch.isclose(module(tokens, T)[0], module(other, T)[0], rtol=1e-12, atol=1e-12).all(0).all(1)
        assert same[:t].all() and not same[t:].any()


@each_variant
def test_fewer_outputs_are_the_last_ones(float64, flags):
    module = model_of(flags)
    tokens = some_tokens(module, 4)
    for T in (module.PROMPT, len(tokens)):                                   # Q = 1 is the step of greedy decoding
        every = module(tokens[:T], T)
        for Q in (1, module.OUTPUTS):
            for some, all_of_it in zip(module(tokens[:T], Q), (every[0], every[1].movedim(0, 1)), strict=True):
                some = some if some.shape[1] == Q and some.shape[0] == module.V else some.movedim(0, 1)
                assert torch.allclose(some, all_of_it[:, -Q:], rtol=1e-12, atol=1e-12)


@each_variant
def test_every_parameter_gets_a_gradient(flags):
    args = parse(*flags, "--seeds", "0")
    module = A.make_module(A.config_of(args))
    vector_to_parameters(A.init_weights(module.config, args.init, 0), module.parameters())
    tokens, target = (x[0, 0] for x in A.batches(0, args))
    F.cross_entropy(module(tokens, len(target))[0].movedim(2, 0), target.T).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and (p.grad != 0).any(), name


# ---- initial weights

def stacked(flags, n=100):
    """Initial weights of n seeds by name, each (n, *shape)."""
    rows = [initial(flags, seed) for seed in range(n)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_learned_family_starts_with_the_published_spreads():
    for name, x in stacked(["--preset", "ref456"]).items():
        std = 0.02 if "emb" in name else (2 / sum(x.shape[1:])) ** 0.5
        assert (x == 1).all() if x.dim() == 2 else x.std().item() == pytest.approx(std, rel=0.05), name
    for name, x in stacked(["--preset", "ref"]).items():
        constant = 0 if "bias" in name else 1
        assert (x == constant).all() if x.dim() == 2 else x.std().item() == pytest.approx(0.02, rel=0.05), name


def test_a_random_start_knows_nothing_of_the_problem():
    w = stacked(["--init", "random"])
    assert w["emb"].std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.allclose(w["emb"].mean(0), torch.zeros(10, 4), atol=0.25)
    for name in ("wq", "wk", "wv", "wo", "gate", "up", "down"):              # uniform
        bound = (1 if name in ("wq", "wk") else 0.5) / w[name].shape[1] ** 0.5
        assert w[name].abs().max().item() == pytest.approx(bound, rel=0.02), name
        assert w[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        assert abs(w[name].mean()) < 0.05 * bound, name
    for name in w:
        gain = 0.5 if name in ("q_norm.weight", "k_norm.weight") else 1
        assert "norm" not in name or (w[name] == gain).all(), name
    arc = stacked(["--init", "random", "--tie", "all", "--embedding", "arc"])
    assert all(0.8 < arc[name].std() < 1.2 for name in ("emb", "wk_angle", "down_angle"))


@pytest.mark.parametrize("flags", [[], ["--tie", "kv+oq"], ["--tie", "all"], ["--embedding", "arc"]], ids=str)
def test_arc_and_phase_are_laid_out_in_the_first_coordinates(flags):
    args = parse(*flags)
    module, apart, q, emb = A.make_module(A.config_of(args)), [], [], []
    for seed in range(100):
        vector_to_parameters(A.init_weights(module.config, args.init, seed), module.parameters())
        with torch.no_grad():
            w = module.matrices()
        pair = [torch.complex(w[name][0, 0], w[name][0, 2]) for name in ("wq", "wk")]
        apart.append(pair[0] * pair[1].conj())
        q.append(pair[0])
        emb.append(w["emb"])
    apart, q, emb = torch.stack(apart).mean(), torch.stack(q).mean(), torch.stack(emb)
    assert apart.abs().item() == pytest.approx(1, abs=0.1)
    assert apart.angle().item() == pytest.approx(math.pi / 3, abs=0.1)       # two positions of a turn of 12
    assert q.abs() < 0.35                                                    # the phase itself is random
    angle = -1.2 + 0.29 * torch.arange(10)
    arc = torch.stack([2.5 * angle.cos(), 2.5 * angle.sin(), 0 * angle, 0 * angle], 1)
    assert torch.allclose(emb.mean(0), arc, atol=0.05)
    spread = 0 if "--embedding" in flags else 0.1
    assert (emb - arc).std().item() == pytest.approx(spread, rel=0.05, abs=1e-6)


def test_arc_and_phase_look_at_the_operands_from_the_start():
    config, k = A.config_of(parse()), torch.arange(10)
    module, seen = A.make_module(config), {}
    tokens = some_tokens(module, 20)
    for how in ("arc+phase", "random"):
        p = torch.zeros(11, 34)
        for seed in range(20):
            vector_to_parameters(A.init_weights(config, how, seed), module.parameters())
            p += module(tokens, 11)[1].detach().mean(2) / 20
        seen[how] = (p[k, 1 + k] + p[k, 13 + k]).mean().item()               # of digit k on digits k of a and b
    assert seen["arc+phase"] > 1.2 * seen["random"]


@pytest.mark.parametrize("preset", A.PRESETS)
def test_initialisation_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(preset):
    args = parse("--preset", preset)
    config = A.config_of(args)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    row = A.init_weights(config, args.init, 0)
    A.make_module(config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(row, A.init_weights(config, args.init, 0))
    assert not torch.equal(row, A.init_weights(config, args.init, 1))


# ---- loss

def entropy_of(attention):
    """Mean entropy in nats of attention (Q, T, B)."""
    return -(attention * (attention + 1e-9).log()).sum(1).mean()


@each_variant
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["64", "32"])
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_loss_and_gradient_of_each_seed_are_those_of_the_plain_module(flags, dtype, tolerance, bonus):
    torch.set_default_dtype(dtype)
    try:
        args, module = parse(*flags, "--seeds", "0-2"), model_of(flags).requires_grad_()
        start = parameters_to_vector(module.parameters()).detach()
        noise = torch.randn(3, len(start), generator=torch.Generator().manual_seed(2))
        weights = (start + 0.3 * noise).requires_grad_()
        tokens, target = (x[0] for x in A.batches(0, args))
        goal, loss = A.batch_loss(weights, tokens, target, torch.tensor(bonus), module=module)
        grad, = torch.autograd.grad(goal.sum(), weights)
        for i in range(3):
            vector_to_parameters(weights[i].detach(), module.parameters())
            logits, attention = module(tokens[i], module.OUTPUTS)
            own_loss = F.cross_entropy(logits.movedim(2, 0), target[i].T)
            own = own_loss - bonus * entropy_of(attention)
            own_grad = parameters_to_vector(torch.autograd.grad(own, list(module.parameters())))
            assert loss[i].item() == pytest.approx(own_loss.item(), rel=tolerance)
            assert goal[i].item() == pytest.approx(own.item(), rel=tolerance)
            assert (grad[i] - own_grad).norm() < tolerance * own_grad.norm()
    finally:
        torch.set_default_dtype(torch.float32)


@both_families
def test_an_edit_of_forward_is_what_trains(tmp_path, monkeypatch, preset):
    model = A.RotaryAdder if preset == "rope196" else A.LearnedAdder
    flags = ["--preset", preset, "--seeds", "0", "--steps", "4", "--eval-every", "2"]
    small(tmp_path / "as it is", *flags)
    source = textwrap.dedent(inspect.getsource(model.forward))
    feed_forward = "x = x + linear("
    assert source.count(feed_forward) == 1
    space = dict(vars(A))
    exec(source.replace(feed_forward, "x = x + 0 * linear("), space)
    monkeypatch.setattr(model, "forward", space["forward"])
    small(tmp_path / "without feed-forward", *flags)
    before, after = ([row["loss"] for row in metrics.read(tmp_path / name)[1:]]
                     for name in ("as it is", "without feed-forward"))
    assert all(abs(x - y) > 1e-3 * x for x, y in zip(before, after, strict=True))
    w = A.by_name(population(tmp_path / "without feed-forward")["weights"], A.make_module(A.config_of(parse(*flags))))
    name = "gate" if preset == "rope196" else "blocks.0.mlp.fc1.A"
    decay = A.by_name(population(tmp_path / "as it is")["weights"], A.make_module(A.config_of(parse(*flags))))[name]
    assert not torch.allclose(w[name], decay, rtol=1e-3)                     # it got no gradient
