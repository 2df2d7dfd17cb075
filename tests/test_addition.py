"""addition_train.py: the problem, its data, both models, loss, optimizer, schedule, and the runs."""
import inspect
import math
import os
import signal
import textwrap

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

SMALL = ["--steps", "60", "--batch-size", "16", "--lengths", "uniform", "--warmup", "0.1", "--device", "cpu",
         "--eval-every", "20"]
SEED_LOG = ["--pos-rank", "3", "--qkv-rank", "3", "--attn-out-rank", "2", "--ffn-rank", "3", "--use-rmsnorm",
            "--tie-qkv", "shareA_tieKV", "--train-steps", "54000", "--device", "cpu", "--seed", "43",
            "--run-name", "repro_456_s43"]
RANK3 = ["--preset", "ref", "--pos-rank", "3", "--qkv-rank", "3", "--attn-out-rank", "3", "--ffn-rank", "3"]
VARIANTS = {
    **{name: ["--preset", name] for name in A.PRESETS},
    "layernorm, rank 3": RANK3,
    "some ranks": ["--preset", "ref", "--pos-rank", "2", "--ffn-rank", "1", "--d-model", "9", "--d-ff", "5"],
    "all tied": ["--tie", "all", "--d-model", "6"],
}
each_variant = pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
both_families = pytest.mark.parametrize("preset", ["rope196", "ref456"])
TINY = ["--preset", "rope62", "--seeds", "0-1"]
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
def dtype(request):
    """The default dtype of torch in a test: float64, or what it is parametrized with."""
    torch.set_default_dtype(getattr(request, "param", torch.float64))
    yield torch.get_default_dtype()
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
    small(folder, *TINY)
    return folder


def digits(*numbers):
    return A.digits_of(np.array(numbers, np.int64), A.DIGITS)


def numbers(d):
    """Digits (..., n), least significant first -> whole numbers (...)."""
    return (d.astype(np.int64) * 10 ** np.arange(d.shape[-1], dtype=np.int64)).sum(-1)


# ---- problem

@settings(deadline=None, derandomize=True, max_examples=60)
@given(operand, operand)
def test_digits_and_sums_are_those_of_whole_numbers(a, b):
    for x, d in ((a, digits(a)[0]), (b, digits(b)[0]), (a + b, A.digit_sum(digits(a), digits(b))[0])):
        assert d.tolist() == [int(t) for t in f"{x:0{len(d)}d}"[::-1]] and A.number(d) == x


def test_the_families_read_and_write_as_published_and_with_digit_k_at_1_13_and_23_plus_k():
    tokens, target = A.encode("learned", digits(50), digits(70))
    assert "".join("0123456789+="[t] for t in tokens[0]) == "0000000050+0000000070=" + "02100000000"
    assert target[0].tolist() == [0, 2, 1, *[0] * 8, 13]
    tokens, target = A.encode("rotary", digits(1234567890), digits(9876543219))
    assert "".join(map(str, tokens[0])) == "0" + "0987654321" + "00" + "9123456789" + "0" + "9011111111"
    assert "".join(map(str, target[0])) == "90111111111"


# ---- data

def drawn(chunk, *flags):
    """Both operands of a rotary chunk as whole numbers (CHUNK, S, B)."""
    tokens, target = (x.numpy().swapaxes(-1, -2) for x in A.batches(chunk, parse(*flags)))
    a, b = numbers(tokens[..., 1:11]), numbers(tokens[..., 13:23])
    assert (numbers(target) == a + b).all()
    return a, b


@both_families
def test_batches_are_a_function_of_seed_and_chunk_alone(preset):
    company, again = (A.batches(2, parse("--preset", preset, "--seeds", "3,5,8")) for _ in range(2))
    alone = A.batches(2, parse("--preset", preset, "--seeds", "5"))
    for x, y, z in zip(company, again, alone, strict=True):
        assert torch.equal(x, y) and torch.equal(x[:, 1], z[:, 0])
        assert not torch.equal(x[:, 0], z[:, 0])
    assert not torch.equal(alone[0], A.batches(3, parse("--preset", preset, "--seeds", "5"))[0])


@pytest.mark.parametrize("lengths, phases", [
    ("uniform", [(0, 50, range(1, 11))]), ("full", [(0, 50, [10])]),
    ("3:20,6:40", [(0, 20, [1, 2, 3]), (20, 40, range(1, 7)), (40, 50, range(1, 11))])])
def test_both_operands_are_below_10_to_the_n_with_n_uniform_or_full_or_by_step(lengths, phases):
    a, b = drawn(0, "--seeds", "0", "--batch-size", "400", "--lengths", lengths)
    for first, last, ns in phases:
        longest = np.maximum(a, b)[first:last].ravel()
        for m in range(1, 11):                                               # P(one has more than m digits)
            p = np.mean([1 - 0.01 ** max(n - m, 0) for n in ns])
            assert abs((longest >= 10**m).mean() - p) <= 5 * math.sqrt(p * (1 - p) / len(longest))


def test_the_share_of_sums_with_random_zeros_falls_in_a_line_to_0():
    flags = ["--seeds", "0", "--batch-size", "400", "--lengths", "full", "--steps", "50", "--random-zeros"]
    x, y = (A.digits_of(np.stack(drawn(0, *flags, share)), 10)[:, :, 0] for share in ("0", "1.5"))
    assert ((y == x) | (y == 0)).all()
    touched = (y != x).any((0, 3)).mean(1)           # of each step; at a rate near 0 a sum stays as it is
    for step in range(50):
        share = min(1.5 * (1 - step / 50), 1)
        assert share - 0.2 < touched[step] < share + 0.11, step
    zeroed = ((y != x)[:, :16]).sum(-1) / np.maximum((x[:, :16] > 0).sum(-1), 1)
    assert zeroed.mean() == pytest.approx(0.5, abs=0.02)                     # rates are uniform in 0..1
    assert abs(np.corrcoef(zeroed.reshape(2, -1))[0, 1]) < 0.08              # and each operand has its own


@pytest.mark.parametrize("seed, n", [(41, 10_000), (31415, 10_000), (7, 3)])
def test_split_pairs_are_the_originals(seed, n):
    g, size = torch.Generator().manual_seed(seed), max(2 * (5000 + n), 4096)
    a, b = (torch.randint(0, 10**10, (size,), generator=g).tolist() for _ in range(2))
    unique = list(dict.fromkeys(zip(a, b, strict=True)))                     # it skips repeated pairs
    a, b = (numbers(x).tolist() for x in A.split_pairs(seed, n))
    assert list(zip(a, b, strict=True)) == unique[5000:5000 + n]


# ---- model

def model_of(flags, std=0.4):
    """A module whose weights are far from any symmetry of the initial ones."""
    config = A.config_of(parse(*flags))
    module, start = A.make_module(config), A.flat(A.make_module(config, "random", 0))
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    vector_to_parameters(start + std * noise, module.parameters())
    return module.requires_grad_(False)


@pytest.mark.parametrize("flags, count", [
    (SEED_LOG, 456), (["--preset", "ref"], 763), (RANK3, 512), ([*RANK3, "--use-rmsnorm"], 491),
    (["--d-model", "6", "--d-ff", "8"], 326),
    *((["--preset", name], int(name[-3:].strip("pe"))) for name in A.PRESETS if name != "ref")])
def test_parameter_counts_to_the_digit_are_those_in_the_names_of_presets(flags, count):
    assert count_parameters(A.make_module(A.config_of(A.parse_args(flags)))) == count


def test_the_456_model_of_seed_43_has_the_tensors_of_the_published_constructor():
    torch.manual_seed(43)
    torch.randn(14, 7)                                                       # nn.Embedding's own draw
    want = {"pos_emb.A": 0.02 * torch.randn(33, 3), "pos_emb.B": 0.02 * torch.randn(3, 7)}
    for name, (n_in, n_out) in {
            "attn.qkv_A": (7, 3), "attn.qkv_Bq": (3, 7), "attn.qkv_Bkv": (3, 7), "attn.proj.A": (7, 2),
            "attn.proj.B": (2, 7), "mlp.fc1.A": (7, 3), "mlp.fc1.B": (3, 14), "mlp.fc2.A": (14, 3),
            "mlp.fc2.B": (3, 7)}.items():
        want["blocks.0." + name] = (2 / (n_in + n_out)) ** 0.5 * torch.randn(n_in, n_out)
    torch.rand(14, 7)                                                        # nn.Linear's own for the head
    torch.randn(14, 7)
    want["token_emb.weight"] = want["lm_head.weight"] = 0.02 * torch.randn(14, 7)  # drawn twice, for both
    want |= dict.fromkeys(("blocks.0.ln1.weight", "blocks.0.ln2.weight", "ln_f.weight"), torch.ones(7))
    before = torch.get_rng_state()
    module = A.make_module(A.config_of(parse("--preset", "ref456")), seed=43)
    assert torch.equal(torch.get_rng_state(), before)
    got = module.state_dict()
    assert got.keys() == want.keys() and module.lm_head.weight is module.token_emb.weight
    for name, x in got.items():
        assert x.shape == want[name].shape and torch.allclose(x, want[name], rtol=1e-6, atol=0), name


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
def test_the_module_is_the_causal_model_described_and_fewer_outputs_are_the_last_ones(dtype, flags):
    module = model_of(flags)
    tokens = A.batch_last(A.encode(module.config.family, *A.uniform_pairs([1], 5))[0])
    describe = rotary_by_description if module.config.family == "rotary" else learned_by_description
    want, want_attention = describe(dict(module.state_dict()), tokens.T)
    T = len(tokens)
    logits, attention = module(tokens, T)
    assert torch.allclose(logits.permute(2, 1, 0), want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(attention.permute(2, 0, 1), want_attention, rtol=1e-9, atol=1e-9)
    for t in (0, 13, 24, T - 1):
        other = tokens.clone()
        other[t] = (other[t] + 3) % 10
        same = torch.isclose(logits, module(other, T)[0], rtol=1e-12, atol=1e-12).all(0).all(1)
        assert same[:t].all() and not same[t:].any()
    for P in (module.PROMPT, T):
        for Q in (1, module.OUTPUTS):                                        # 1: the step of greedy decoding
            last, seen = module(tokens[:P], Q)
            assert torch.allclose(last, logits[:, P - Q:P], rtol=1e-12, atol=1e-12)
            assert torch.allclose(seen, attention[P - Q:P, :P], rtol=1e-12, atol=1e-12)


# ---- initial weights

def stacked(flags, n=50):
    """Initial weights of n seeds by name, each (n, *shape)."""
    args = parse(*flags)
    config = A.config_of(args)
    rows = torch.stack([A.flat(A.make_module(config, args.init, seed)) for seed in range(n)])
    return A.by_name(rows, A.make_module(config))


def test_a_random_start_knows_nothing_of_the_problem():
    w, full_rank = stacked(["--init", "random"]), stacked(["--preset", "ref"])
    assert full_rank["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert w["emb"].std().item() == pytest.approx(0.5, rel=0.1) and w["emb"].mean(0).abs().max() < 0.35
    for name in ("wq", "wk", "wv", "wo", "gate", "up", "down"):              # uniform
        bound = (1 if name in ("wq", "wk") else 0.5) / w[name].shape[1] ** 0.5
        assert w[name].abs().max().item() == pytest.approx(bound, rel=0.02), name
        assert w[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert (w["norm1.weight"] == 1).all() and (w["q_norm.weight"] == 0.5).all()


def test_arc_and_phase_are_laid_out_in_the_first_coordinates():
    w, angle = stacked([]), -1.2 + 0.29 * torch.arange(10)
    q, k = (torch.complex(w[name][:, 0, 0], w[name][:, 0, 2]) for name in ("wq", "wk"))
    apart = (q * k.conj()).mean()
    assert apart.abs().item() == pytest.approx(1, abs=0.1) and q.mean().abs() < 0.5  # q's phase is random
    assert apart.angle().item() == pytest.approx(math.pi / 3, abs=0.1)       # two positions of a turn of 12
    arc = torch.stack([2.5 * angle.cos(), 2.5 * angle.sin(), 0 * angle, 0 * angle], 1)
    assert torch.allclose(w["emb"].mean(0), arc, atol=0.07)
    tied = stacked(["--tie", "all", "--embedding", "arc"])
    assert torch.allclose(tied["wk_angle"], torch.tensor(-math.pi / 3))
    assert torch.allclose(tied["emb"], torch.tensor([2.5, -1.2, 0.29]))


# ---- loss

@each_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], indirect=True, ids=str)
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_loss_and_gradient_of_each_seed_are_those_of_the_plain_module(dtype, flags, bonus):
    args, module = parse(*flags, "--seeds", "0-2"), model_of(flags).requires_grad_()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
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
        entropy = -(attention * (attention + 1e-9).log()).sum(1).mean()      # of each position, over columns
        own = own_loss - bonus * entropy
        own_grad = torch.cat([g.flatten() for g in torch.autograd.grad(own, list(module.parameters()))])
        assert loss[i].item() == pytest.approx(own_loss.item(), rel=tolerance)
        assert goal[i].item() == pytest.approx(own.item(), rel=tolerance)
        assert (grad[i] - own_grad).norm() < tolerance * own_grad.norm()
    assert all(x.flatten(1).any(1).all() for x in A.by_name(grad, module).values())  # into every parameter


@both_families
def test_an_edit_of_forward_is_what_trains(tmp_path, monkeypatch, preset):
    model = A.RotaryAdder if preset == "rope196" else A.LearnedAdder
    flags = ["--preset", preset, "--seeds", "0", "--steps", "4", "--eval-every", "2"]
    small(tmp_path / "as it is", *flags)
    source = textwrap.dedent(inspect.getsource(model.forward))
    space, feed_forward = dict(vars(A)), "x = x + linear("
    assert source.count(feed_forward) == 1
    exec(source.replace(feed_forward, "x = x + 0 * linear("), space)
    monkeypatch.setattr(model, "forward", space["forward"])
    small(tmp_path / "without feed-forward", *flags)
    before, after = ([row["loss"] for row in metrics.read(tmp_path / name)[1:]]
                     for name in ("as it is", "without feed-forward"))
    assert all(abs(x - y) > 1e-4 for x, y in zip(before, after, strict=True))


# ---- optimizer

def updates(args, n, factors=(1,)):
    """The population after n steps as the loop takes them, their gradients times the factors in turn."""
    module = A.make_module(A.config_of(args))
    state, (tokens, target) = A.Population(module.config, args), A.batches(0, args)
    for step in range(n):
        weights = state.weights.detach().requires_grad_()
        goal, loss = A.batch_loss(weights, tokens[step], target[step], torch.tensor(0.0), module=module)
        grad, = torch.autograd.grad(factors[step % len(factors)] * goal.sum(), weights)
        with torch.no_grad():
            A.update(state, grad, loss, step, args, module)
    return state


@both_families
@pytest.mark.parametrize("optimizer, beta2, until", [("adamw", 0.999, 0.1), ("soap", 0.99, 0)])
def test_the_optimizer_is_adamw_of_torch_on_the_module_with_soap_in_its_basis(
        dtype, monkeypatch, preset, optimizer, beta2, until):
    monkeypatch.setattr(A, "new_basis", lambda state: None)                  # it stays the identity
    args = parse("--preset", preset, "--seeds", "4", "--optimizer", optimizer, "--weight-decay", "0.1",
                 "--fade-until", str(until), "--lr", "0.03")
    module, factors, norms = A.make_module(A.config_of(args)), (0.1, 1, 5), []
    start = A.flat(A.make_module(module.config, args.init, 4))
    vector_to_parameters(start.clone(), module.parameters())
    adamw = torch.optim.AdamW(module.parameters(), betas=(0.9, beta2), eps=1e-8)
    tokens, target = A.batches(0, args)
    for step in range(9):
        decay = 0.1 * max(0, 1 - step / 6) if until else 0.1                 # a tenth of 60 steps
        adamw.param_groups[0].update(lr=A.learning_rate(step, args), weight_decay=decay)
        adamw.zero_grad()
        logits, _ = module(tokens[step, 0], module.OUTPUTS)
        (factors[step % 3] * F.cross_entropy(logits.movedim(2, 0), target[step, 0].T)).backward()
        norms.append(clip_grad_norm_(module.parameters(), 1.0).item())
        adamw.step()
    state = updates(args, 9, factors)
    moved = parameters_to_vector(module.parameters()).detach() - start
    assert torch.allclose(state.weights[0] - start, moved, rtol=1e-8, atol=1e-9)
    assert min(norms) < 0.5 and max(norms) > 1.5 and moved.abs().mean() > 0.03


def gradients(n, *shape):
    """n random gradients of norm 1/2."""
    g = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    return 0.5 * F.normalize(g, dim=-1)


def soap_state(seeds, n=0, *flags):
    """A population of rope62 after n random gradients without a new basis, and its flags and module."""
    args = parse("--preset", "rope62", "--seeds", seeds, "--optimizer", "soap", "--lr", "0.1", *flags)
    module = A.make_module(A.config_of(args))
    state = A.Population(module.config, args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(A, "new_basis", lambda state: None)
        for step, grad in enumerate(gradients(n, *state.weights.shape)):
            A.update(state, grad, torch.ones(len(grad)), step, args, module)
    return state, args, module


def test_the_basis_of_soap_is_orthogonal_diagonalizes_and_takes_the_mean_square_along(dtype):
    state, args, module = soap_state("0-1", 100)
    want = torch.zeros_like(state.covariance)
    for grad in gradients(100, 2, 62):
        want = 0.99 * want + 0.01 * grad[:, :, None] * grad[:, None]
    assert torch.allclose(state.covariance, want, rtol=1e-9, atol=1e-15)
    state.basis = torch.linalg.qr(gradients(1, 2, 62, 62)[0])[0]
    old, square = state.basis.clone(), state.square.clone()
    A.new_basis(state)
    for i in range(2):
        basis, covariance = state.basis[i], state.covariance[i]
        assert torch.allclose(basis.T @ basis, torch.eye(62), atol=1e-9)
        inside = basis.T @ covariance @ basis
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-9 * inside.diagonal().max()
        carried = (basis.T @ old[i] @ torch.diag(square[i]) @ old[i].T @ basis).diagonal()
        assert torch.allclose(state.square[i], carried, rtol=1e-9)


@pytest.mark.parametrize("steps, want", [
    (1000, [0, 1, 3, 8, 10, 20, 30, 40]), (450, [0, 1, 3, *range(4, 45, 4)]), (99, list(range(45)))])
def test_a_new_basis_comes_at_steps_1_3_and_8_and_at_every_hundredth_of_the_run(monkeypatch, steps, want):
    state, args, module = soap_state("0", 0, "--steps", str(steps))
    seen = []
    monkeypatch.setattr(A, "new_basis", lambda state: seen.append(step))
    for step in range(45):
        A.update(state, torch.ones(1, 62), torch.ones(1), step, args, module)
    assert seen == want


def test_an_update_of_soap_is_the_same_alone_and_in_company(dtype):
    state, args, module = soap_state("3,5,8", 150)
    alone = soap_state("5")[0]
    alone.load_state_dict({name: x[1:2] for name, x in state.state_dict().items()})
    grad = gradients(1, 3, 62)[0]
    A.update(state, grad.clone(), torch.ones(3), 0, args, module)
    A.update(alone, grad[1:2].clone(), torch.ones(1), 0, args, module)
    assert torch.allclose(alone.weights[0], state.weights[1], rtol=1e-9, atol=1e-9)
    assert torch.allclose(alone.square[0], state.square[1], rtol=1e-9, atol=1e-15)


@both_families
def test_ten_steps_of_adamw_are_the_same_alone_and_in_company(preset):
    flags = ["--preset", preset, "--optimizer", "adamw", "--entropy-bonus", "0.1"]
    alone, company = (updates(parse(*flags, "--seeds", seeds), 10) for seeds in ("5", "3,5,8"))
    assert torch.allclose(alone.weights[0], company.weights[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset, name", [("ref456", "pos_emb.A"), ("ref", "pos_emb.weight")])
def test_smoothing_pulls_the_positions_straight_and_nothing_else_and_fades(preset, name):
    args = parse("--preset", preset, "--seeds", "0", "--lr", "0.1", "--weight-decay", "0",
                 "--smooth-positions", "0.5", "--fade-until", "0.1")
    module = A.make_module(A.config_of(args))
    state = A.Population(module.config, args)
    before = A.by_name(state.weights[0].clone(), module)
    table, bend = before[name], torch.eye(33).diff(n=2, dim=0)               # (33, r), (31, 33)
    for step in range(10):
        A.update(state, torch.zeros_like(state.weights), torch.ones(1), step, args, module)
        rough = bend.T @ bend @ table                                        # gradient of |bend table|^2 / 2
        table = table - A.learning_rate(step, args) * 0.5 * max(0, 1 - step / 6) * rough
    after = A.by_name(state.weights[0], module)
    assert all(torch.equal(before[x], after[x]) == (x != name) for x in before)
    assert torch.allclose(after[name], table, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_seed_without_a_finite_loss_or_gradient_stops_and_the_other_goes_on(optimizer, bad):
    args = parse("--preset", "rope62", "--seeds", "0-1", "--optimizer", optimizer)
    module, sound, state = A.make_module(A.config_of(args)), updates(args, 3), updates(args, 3)
    before = state.weights.clone()
    for step, grad in enumerate(gradients(3, 2, 62), 3):
        A.update(sound, grad.clone(), torch.ones(2), step, args, module)
        loss = torch.ones(2)
        if step == 3 and bad == "loss":
            loss[0] = math.inf
        elif step == 3:
            grad[0, 5] = math.nan
        A.update(state, grad, loss, step, args, module)
    assert state.alive.tolist() == [False, True]
    assert torch.equal(state.weights[0], before[0]) and (state.weights[1] != before[1]).all()
    assert torch.allclose(state.weights[1], sound.weights[1], rtol=0, atol=1e-6)


# ---- schedule, presets

def test_the_seed_logs_command_is_the_preset_ref456_with_the_published_schedule():
    args = A.parse_args(["--preset", "ref456", "--seed", "43", "--device", "cpu", "--name", "repro_456_s43"])
    assert {**vars(A.parse_args(SEED_LOG)), "preset": "ref456"} == vars(args)
    assert (args.seeds, args.steps, args.lr, args.batch_size) == ([43], 54_000, 0.02, 512)
    assert (args.optimizer, args.weight_decay, args.lengths) == ("adamw", 0.01, "3:2000,6:7000")
    assert args.entropy_bonus == args.random_zeros == args.smooth_positions == args.fade_until == 0
    for step in (0, 1, 1348, 1349, 1350, 1351, 10_000, 27_675, 53_999, 54_000):
        rate = 0.02 * (step + 1) / 1350
        if step >= 1350:
            rate = 0.002 + 0.018 * 0.5 * (1 + math.cos(math.pi * (step - 1350) / 52_650))
        assert A.learning_rate(step, args) == pytest.approx(rate, rel=1e-6), step


@pytest.mark.parametrize("schedule, end", [("cosine", 0.05), ("linear", 0)])
@pytest.mark.parametrize("steps, warm, flag", [
    (60, 6, "0.1"), (65, 6.5, "0.1"), (50, 1, "0"), (50, 7, "7"), (5, 1350, "1350")])
def test_the_rate_rises_in_a_line_to_lr_and_falls_to_its_end(steps, warm, flag, schedule, end):
    args = parse("--steps", str(steps), "--warmup", flag, "--schedule", schedule, "--lr", "0.5")
    for step in range(steps + 1):
        done = (step - warm) / (steps - warm)
        fall = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        want = 0.5 * min((step + 1) / warm, 1) if step < warm else end + (0.5 - end) * fall
        assert A.learning_rate(step, args) == pytest.approx(want, abs=1e-9), step


def test_a_flag_wins_over_the_preset_and_seed_names_one_seed():
    args = A.parse_args(["--preset", "ref456", "--lr", "0.5", "--steps", "2000", "--seed", "43"])
    assert (args.lr, args.steps, args.d_model, args.seeds) == (0.5, 2000, 7, [43])
    assert [A.parse_args(x).seeds for x in ([], ["--seeds", "2-4,9"])] == [list(range(8)), [2, 3, 4, 9]]


# ---- evaluation

def test_a_constant_model_scores_chance():
    module = A.make_module(A.config_of(parse()))
    right, by_digit = A.exact_match(torch.zeros(1, 196), A.uniform_pairs([1], 5000), module)
    assert right.tolist() == [0] and by_digit.shape == (1, 11)
    assert all(0.08 < x / 5000 < 0.12 for x in by_digit[0, :10].tolist())    # 5 sigma around a tenth


@pytest.mark.parametrize("preset, value", [("rope196", math.nan), ("ref456", math.nan), ("ref456", 1e30)])
@pytest.mark.parametrize("mode", ["tf", "ar"])
def test_a_model_without_numbers_for_logits_scores_0(preset, mode, value):
    module = model_of(["--preset", preset])
    vector_to_parameters(value * parameters_to_vector(module.parameters()), module.parameters())
    got, _ = A.answers(module, A.uniform_pairs([1], 50), mode)
    assert (got == -1).all()


# ---- runs

def test_a_run_learns_and_leaves_its_files_and_the_figures_of_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(A, "draw_pictures", draw_pictures)
    out = small(tmp_path / "run", *TINY, "--steps", "80")
    made = {f.name for f in (tmp_path / "run").iterdir()}
    assert made >= {"args.json", "run.txt", "addition_train.py", "metrics.csv", "last.pt", "best_s0.pt",
                    "best_s1.pt", "summary.json", "exact.png", "attention.png"}
    rows = metrics.read(tmp_path / "run")
    assert [(r["step"], r["seed"]) for r in rows] == [(t, s) for t in range(0, 81, 20) for s in (0, 1)]
    columns = ["step", "seed", "loss", "train_exact", "exact", *(f"digit{k}" for k in range(11)), "lr", "grad", "sec"]
    assert list(rows[2]) == columns and "loss" not in rows[0]                # it is of no step yet
    assert all(r["loss"] < 2.1 for r in rows[8:])                            # ln 10 = 2.30 is chance
    assert out == {**read_json(tmp_path / "run" / "summary.json"), "grok_interval": out["grok_interval"]}
    assert (out["n_params"], out["n_seeds"], out["test_size"]) == (62, 2, 100)
    assert (out["n_grokked"], out["grok_rate"], out["seeds"]["0"]["first_step"]) == (0, 0, None)
    module, pop = A.make_module(A.config_of(parse(*TINY))), population(tmp_path / "run")
    for i, (row, seed) in enumerate(zip(rows[8:], out["seeds"].values(), strict=True)):
        vector_to_parameters(pop["weights"][i], module.parameters())
        same = np.equal(*A.answers(module, A.uniform_pairs([A.VALIDATION], 50)))
        assert [row["exact"], row["digit3"]] == pytest.approx([same.all(1).mean(), same[:, 3].mean()])
        x = A.sample_pairs([A.TRAINED], np.array([79]), 50, parse(*TINY))[0]
        assert row["train_exact"] == np.equal(*A.answers(module, (x[:, 0], x[:, 1]))).all(1).mean()
        same = np.equal(*A.answers(module, A.uniform_pairs([A.TEST], 100)))
        assert (seed["errors"], seed["exact"]) == (100 - same.all(1).sum(), same.all(1).mean())
        assert seed["digits"] == pytest.approx(same.mean(0).tolist())
        best, saved = A.load_model(tmp_path / "run" / f"best_s{i}.pt")
        same = np.equal(*A.answers(best, A.uniform_pairs([A.VALIDATION], 50)))
        assert (same.all(1).sum(), saved["seed"]) == (pop["best_val"][i], i)
    drawn_again = [tmp_path / "run" / f"{name}.png" for name in ("exact", "attention")]
    for picture in drawn_again:
        picture.unlink()
    A.main(["--plot", str(tmp_path / "run")])
    assert all(picture.stat().st_size > 5000 for picture in drawn_again)
    assert all(len(line) <= 160 for line in capsys.readouterr().out.splitlines() if line.startswith("step"))


@pytest.mark.parametrize("until", [0.5, 0.0])
def test_each_step_has_its_batch_and_bonus_and_a_row_has_the_mean_loss(tmp_path, monkeypatch, until):
    seen, real = [], A.batch_loss

    def batch_loss(weights, tokens, target, bonus, module):
        goal, loss = real(weights, tokens, target, bonus, module)
        seen.append((tokens, target, bonus.item(), loss.detach()))
        return goal, loss
    monkeypatch.setattr(A, "batch_loss", batch_loss)
    flags = [*TINY, "--entropy-bonus", "0.2", "--fade-until", str(until), "--eval-every", "40"]
    small(tmp_path / "run", *flags)
    chunks = [A.batches(chunk, parse(*flags)) for chunk in (0, 1)]
    for step, (tokens, target, bonus, _) in enumerate(seen):
        want = (x[step % 50] for x in chunks[step // 50])
        assert all(torch.equal(x, y) for x, y in zip((tokens, target), want, strict=True)), step
        assert bonus == pytest.approx(0.2 * max(0, 1 - step / 30) if until else 0.2), step
    losses = torch.stack([loss for *_, loss in seen])
    want = torch.cat([losses[:40].mean(0), losses[40:].mean(0)])
    got = [row["loss"] for row in metrics.read(tmp_path / "run")[2:]]
    assert got == pytest.approx(want.tolist(), rel=1e-4)


def test_train_exact_is_of_fresh_sums_drawn_as_those_of_the_last_step(tmp_path, monkeypatch):
    seen = []

    def exact_match(weights, pairs, module):                                 # of a model that knows two digits
        seen.append([numbers(x) for x in pairs])
        right = torch.tensor(int(((seen[-1][0] < 100) & (seen[-1][1] < 100)).sum())).repeat(len(weights))
        return right, right[:, None].repeat(1, 11)
    monkeypatch.setattr(A, "exact_match", exact_match)
    monkeypatch.setattr(A, "VAL_SIZE", 400)
    flags = [*TINY, "--lengths", "2:40,4:41", "--batch-size", "40"]
    small(tmp_path / "run", *flags)
    rows = metrics.read(tmp_path / "run")[::2]
    assert [row["exact"] for row in rows] == [0, 0, 0, 0]                    # of uniform ten-digit numbers
    assert [row["train_exact"] for row in rows[:3]] == [1, 1, 1]             # step 39 is the last of two digits
    assert abs(rows[3]["train_exact"] - 0.2) < 0.1                           # n is uniform in 1..10 by now
    a, b = seen[6]                                                           # the fourth of train_exact
    trained = {pair for x, y in (drawn(chunk, *flags) for chunk in (0, 1))
               for pair in zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)}
    fresh = [pair for pair in zip(a.tolist(), b.tolist(), strict=True) if max(pair) >= 10**6]
    assert len(fresh) > 100 and not trained & set(fresh)


def test_a_seed_counts_from_99_percent_on(tmp_path, monkeypatch):
    shares = iter([0.5, 0.6, 0.0, 0.98, 0.7, 0.8, 1.0, 1.0, 0.9, 0.2, 0.98, 1.0, 0.1, 1.0, 0.5, 0.5,
                   0.98, 0.99])            # train and validation, two seeds each, at 0, 20, 40, 60; at the end

    def exact_match(weights, pairs, module):
        right = torch.tensor([round(next(shares) * len(pairs[0])) for _ in weights])
        return right, right[:, None].repeat(1, 11)
    monkeypatch.setattr(A, "exact_match", exact_match)
    seeds = (out := small(tmp_path / "run", "--preset", "rope62", "--seeds", "4-5"))["seeds"]
    rows = metrics.read(tmp_path / "run")
    assert [row["train_exact"] for row in rows] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.2, 0.1, 1.0]
    assert [row["exact"] for row in rows] == [0.0, 0.98, 1.0, 1.0, 0.98, 1.0, 0.5, 0.5]
    assert [s["first_step"] for s in seeds.values()] == [20, 20]
    assert [s["best_step"] for s in seeds.values()] == [20, 40]              # the later one of a tie
    assert [s["errors"] for s in seeds.values()] == [2, 1]
    assert (out["n_grokked"], out["n_perfect"], out["grok_rate"]) == (1, 0, 0.5)
    for seed, step in ((4, 20), (5, 40)):
        assert torch.load(tmp_path / "run" / f"best_s{seed}.pt", weights_only=True)["step"] == step


def assert_same_run(a, b):
    rows = [[{k: v for k, v in r.items() if k != "sec"} for r in metrics.read(folder)] for folder in (a, b)]
    assert rows[0] == rows[1]
    assert all(torch.equal(x, population(b)[name]) for name, x in population(a).items())
    assert read_json(a / "summary.json")["seeds"] == read_json(b / "summary.json")["seeds"]


@pytest.mark.parametrize("flags", [TINY, ["--preset", "grok456", "--seeds", "0-1", "--optimizer", "adamw"]],
                         ids=["rotary", "learned"])
def test_resume_is_bit_exact(tmp_path, monkeypatch, capsys, flags):
    flags, real, steps = [*flags, "--batch-size", "4"], A.run.Run.last, []
    small(tmp_path / "whole", *flags)
    cuts = [0, 7, 20, 33, 54]                  # at the start, between evaluations, at one, Ctrl-C, in chunk 1

    def last(self, step):
        if step in cuts and step not in steps:
            steps.append(step)
            self._end = 0                                                    # as if the time was up
            if step == 33:
                os.kill(os.getpid(), signal.SIGINT)
        return real(self, step)
    monkeypatch.setattr(A.run.Run, "last", last)
    outs = [small(tmp_path / "cut", *flags)]
    again = ["--resume", str(tmp_path / "cut")]
    outs += [A.main(again) for _ in cuts[1:3]]
    with pytest.raises(SystemExit) as e:
        A.main(again)
    assert e.value.code == 130 and f"addition_train.py --resume {tmp_path}/cut" in capsys.readouterr().out
    outs += [A.main(again) for _ in range(3)]                                # the last is of a finished run
    assert [out["steps"] for out in outs] == [0, 7, 20, 54, 60, 60]
    assert [out["stopped_early"] for out in outs] == [True] * 4 + [False] * 2
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_failed_seeds_do_not_count_as_grokked_and_a_run_of_them_still_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(A, "draw_pictures", draw_pictures)
    real, factors = A.batch_loss, torch.tensor([math.inf, math.nan])
    monkeypatch.setattr(A, "batch_loss", lambda *x, **k: tuple(y * factors for y in real(*x, **k)))
    monkeypatch.setattr(A, "exact_match", lambda w, pairs, module: (
        torch.full((2,), len(pairs[0])), torch.full((2, 11), len(pairs[0]))))
    out = small(tmp_path / "run", *TINY, "--steps", "5")
    assert (out["n_grokked"], out["grok_rate"], out["n_perfect"]) == (0, 0, 0)
    assert capsys.readouterr().out.count("failed: its loss was not finite") == 2
    assert (tmp_path / "run" / "exact.png").is_file()


@pytest.mark.parametrize("moment, flag", [("wrapping", "on"), ("first call", "auto")])
def test_without_a_compiler_a_long_run_is_eager(plain, tmp_path, monkeypatch, capsys, moment, flag):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nand a long trace")
    monkeypatch.setattr(torch, "compile", broken if moment == "wrapping" else lambda f, **k: broken)
    monkeypatch.setattr(A, "COMPILE_FROM", 60 * 16 * 2)                      # sums from which auto compiles
    out = small(tmp_path / "run", *TINY, "--compile", flag)
    text = capsys.readouterr().out
    assert "torch.compile failed (no C++ compiler found)" in out["step_runs"]
    assert "the step runs eager" in text and "trace" not in text
    assert_same_run(plain, tmp_path / "run")
    assert read_json(plain / "summary.json")["step_runs"] == "eager"         # a short run does not try
