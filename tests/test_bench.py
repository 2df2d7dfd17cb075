"""Speeds, in CPU seconds (of the sandbox: on the clock), beside a plain reference in the same run: python -m pytest -m bench -s"""
import itertools
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import addition_train
import collatz
import neural_sr
import self_improve
from common import arc_rules, metrics, sandbox

pytestmark = pytest.mark.bench


def cpu_seconds(f, repeats: int = 3) -> float:
    """Least CPU seconds of f over repeats."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def naive(numbers: list[int], m: int) -> None:
    """k, log2 and residues along each number with Python integers."""
    import math
    for n in numbers:
        for _ in range(m):
            n, _ = collatz.syracuse(n)
            math.log2(n), n % collatz.RESIDUE


@pytest.mark.parametrize("lookahead, n", [(10, 400_000), (20, 200_000), (100, 60_000)])
def test_exact_arithmetic_against_python_integers(lookahead, n):
    limbs = collatz.random_odd(np.random.default_rng(0), n, 2, 128)
    some = [sum(int(x) << 32 * i for i, x in enumerate(column)) for column in limbs[:, :n // 100].T.tolist()]
    ours = n / cpu_seconds(lambda: collatz.paths(limbs, lookahead + 1))
    plain = len(some) / cpu_seconds(lambda: naive(some, lookahead + 1))
    print(f"\nlookahead {lookahead}: {ours / 1e6:.2f} M samples/CPU-s, Python integers {plain / 1e6:.3f} M: {ours / plain:.0f} times")


def test_training_step_against_forward_alone():
    args = collatz.parse_args(["--pool", "20000", "--train-seeds", "200"])
    pools = collatz.make_pools(args, collatz.make_exam(None, args.lookahead))
    model = collatz.make_model(args, None)
    optimizers = collatz.make_optimizers(model, args)

    def step():
        collatz.batch_loss(model, collatz.sample_batch(pools, args, 0), args, 0).backward()
        for optimizer in optimizers:
            optimizer.step()

    def forward():
        with torch.no_grad():
            collatz.batch_loss(model, collatz.sample_batch(pools, args, 0), args, 0)

    a, b = (cpu_seconds(lambda f=f: [f() for _ in range(10)]) / 10 for f in (step, forward))
    print(f"\ntraining step {1000 * a:.1f} ms, its forward pass alone {1000 * b:.1f} ms: {a / b:.1f} times")


def test_exhaustive_check_of_the_closed_form():
    model = collatz.Lyapunov(collatz.Config(150, layers=None, sees=0, hold=0))
    seconds = cpu_seconds(lambda: collatz.exhaustive(model, 1 << 18), repeats=1)
    print(f"\nclosed form, lookahead 150: {(1 << 17) / seconds / 1e3:.0f} k odd numbers a CPU-s, 2^21 in {8 * seconds:.0f} s")


def addition(preset: str, n_seeds: int):
    """Arguments, a module, fresh seeds and one chunk of batches of a preset."""
    args = addition_train.parse_args(["--preset", preset, "--seeds", f"0-{n_seeds - 1}", "--device", "cpu"])
    module = addition_train.make_module(addition_train.config_of(args))
    return args, module, addition_train.Population(module.config, args), *addition_train.batches(0, args)


@pytest.mark.parametrize("preset, n_seeds", [("ref456", 1), ("ref456", 4), ("grok456", 8), ("rope196", 8)])
def test_training_steps_of_addition_against_a_plain_loop_of_one_seed(preset, n_seeds):
    args, module, state, tokens, target = addition(preset, n_seeds)
    eager, bonus = partial(addition_train.batch_loss, module=module), torch.tensor(args.entropy_bonus)
    weights, args.compile = state.weights.clone().requires_grad_(), "on"
    fast, how = addition_train.make_loss(module, weights.detach(), args)
    for a, b in zip(*(f(weights, tokens[1], target[1], bonus) for f in (eager, fast)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.lr)
    count = itertools.count(101)  # new eigenbases come as often as in a run

    def steps(loss_fn, n):
        for i in range(n):
            weights = state.weights.detach().requires_grad_()
            goal, loss = loss_fn(weights, tokens[i], target[i], bonus)
            grad, = torch.autograd.grad(goal.sum(), weights)
            with torch.no_grad():
                addition_train.update(state, grad, loss, next(count), args, module)

    def plain_steps(n):
        for i in range(n):
            logits, _ = module(tokens[i, 0], module.OUTPUTS)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.movedim(2, 0), target[i, 0].T).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

    one = 10 / cpu_seconds(lambda: plain_steps(10))
    rates = {"eager": 10 * n_seeds / cpu_seconds(lambda: steps(eager, 10)),
             how: 40 * n_seeds / cpu_seconds(lambda: steps(fast, 40), repeats=5)}
    data = n_seeds * addition_train.CHUNK / cpu_seconds(lambda: addition_train.batches(1, args))
    print(f"\n{preset}, batch {args.batch_size}, {args.optimizer}, {n_seeds} seeds, seed-steps a CPU-s: "
          f"plain loop with AdamW {one:.0f}; batches alone {data:.0f}")
    for name, rate in rates.items():
        print(f"  {name}: {rate:.0f}, {rate / one:.2f} times the plain loop")


@pytest.mark.parametrize("preset", ["ref456", "rope196", "rope122"])
def test_evaluation_of_addition_against_greedy_decoding(preset):
    args, module, state, *_ = addition(preset, 1)
    pairs = addition_train.uniform_pairs([0], 20_000)
    few = tuple(x[:1000] for x in pairs)
    ours = 20_000 / cpu_seconds(lambda: addition_train.exact_match(state.weights, pairs, module))
    greedy = 1000 / cpu_seconds(lambda: addition_train.answers(module, few, "ar"))
    print(f"\n{preset}: {ours:.0f} additions/CPU-s with encoding, greedy decoding {greedy:.0f}: "
          f"{ours / greedy:.0f} times")


def test_sandbox_against_a_fresh_interpreter_for_each_program():
    code = "def f(x):\n    y = x + 1\n    return y * 2"
    with sandbox.Sandbox() as box:
        def programs(n_cases, n=200):
            start = time.perf_counter()
            for i in range(n):
                assert box.run(code, "f", [(i,)] * n_cases).values == (2 * i + 2,) * n_cases
            return n / (time.perf_counter() - start)

        def fresh(n=50):
            start = time.perf_counter()
            for i in range(n):
                words = [sys.executable, "-I", "-S", "-c", f"{code}\nprint(f({i}))"]
                assert subprocess.run(words, capture_output=True, text=True).stdout == f"{2 * i + 2}\n"
            return n / (time.perf_counter() - start)
        rates = [(programs(1), programs(8), fresh()) for _ in range(5)]
    one, eight, plain = (max(column) for column in zip(*rates, strict=True))
    print(f"\nsandbox with {', '.join(box.protections)}: {one:.0f} programs/s, {8 * eight:.0f} cases/s with 8 a program; "
          f"fresh interpreter {plain:.0f}/s: {one / plain:.1f} times")


def test_writing_of_self_improve_against_one_token_at_a_time(monkeypatch):
    model, _ = self_improve.load_model("logs/kept/self_improve/compare-s10-off")
    rng = np.random.default_rng(0)
    some = [model.problem(rng, kind, d) for kind in self_improve.KINDS for d in (4, 7) for _ in range(20)]
    traces = [self_improve.Trace(p, [], [p.line]) for p in some]

    @torch.no_grad()
    def one_at_a_time():
        for lo in range(0, len(traces), 64):
            prompts = [model.example(t.problem.kind, t.lines[-1], ())[0][:-1] for t in traces[lo:lo + 64]]
            place = torch.tensor([len(x) for x in prompts])
            x = torch.zeros(len(prompts), 2 * int(place.max()) + 4, dtype=torch.long)
            for row, tokens in zip(x, prompts, strict=True):
                row[:len(tokens)] = torch.tensor(tokens)
            for _ in range(int(place.max()) + 4):
                each = torch.arange(len(x))
                x[each, place] = model(x[:, :int(place.max())])[each, place - 1].argmax(-1)
                place += 1

    @torch.no_grad()
    def ours():
        model.write(traces, 0.0, torch.Generator())
    plain, guessed = cpu_seconds(one_at_a_time, repeats=2), cpu_seconds(ours)
    monkeypatch.setattr(model, "guess", lambda kind, line: [])
    alone = cpu_seconds(ours)
    print(f"\nself_improve: {len(traces) / guessed:.0f} steps/CPU-s; one token at a time, in batches, uncached, {len(traces) / plain:.0f}: "
          f"{plain / guessed:.0f} times; without the teacher's guess {plain / alone:.0f} times")


class PlainBlock(torch.nn.Module):
    """As etrm_pretrain.Block, out of torch's own parts: nn.MultiheadAttention, SwiGLU, post-norm. No rotary positions."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(D, heads, bias=False, batch_first=True)
        self.gate, self.up = (torch.nn.Linear(D, 3 * D, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(3 * D, D, bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(D, eps=1e-5) for _ in range(2))

    def forward(self, x, memory=None, mask=None):
        memory = x if memory is None else memory
        x = self.norms[0](x + self.attention(x, memory, memory, key_padding_mask=mask, need_weights=False)[0])
        return self.norms[1](x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x)))


class PlainModel(torch.nn.Module):
    """The source's model in plain parts: each slot encodes its demonstrations, input and output as 2 S tokens."""

    def __init__(self, D: int, heads: int, T: int, h_cycles: int, l_cycles: int):
        super().__init__()
        self.embed, self.cycles, self.T = torch.nn.Embedding(12, D), (h_cycles, l_cycles), T
        self.encoder, self.decoder = (torch.nn.ModuleList(PlainBlock(D, heads) for _ in range(2)) for _ in range(2))
        self.queries, self.reader, self.head = torch.nn.Parameter(torch.randn(T, D)), PlainBlock(D, heads), torch.nn.Linear(D, 12)

    def net(self, z):
        for block in self.decoder:
            z = block(z)
        return z

    def encode(self, demos, mask):                       # (B, K, 2 S), (B, K)
        B, K, L = demos.shape
        x = self.embed(demos.reshape(B * K, L))
        for block in self.encoder:
            x = block(x)
        return self.reader(self.queries.expand(B, -1, -1), x.mean(1).view(B, K, -1), ~mask)

    def decode(self, x, context, z_H, z_L):
        x = torch.cat([context, self.embed(x)], 1)
        for cycle in range(self.cycles[0]):
            with torch.set_grad_enabled(cycle == self.cycles[0] - 1):
                for _ in range(self.cycles[1]):
                    z_L = self.net(z_L + z_H + x)
                z_H = self.net(z_H + z_L)
        return self.head(z_H[:, self.T:])


@pytest.mark.parametrize("what", ["decoder", "whole"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_supervision_steps_of_etrm_against_plain_torch_blocks(what, compile):
    """Hidden 128, a canvas of 100 cells, one thread: decoder alone as published (H3 L4), and encoder and decoder."""
    import etrm_pretrain as etrm
    cycles = ("3", "4") if what == "decoder" else ("2", "2")
    args = etrm.parse_args(["--hidden", "128", "--optimizer", "adamw", "--h-cycles", cycles[0], "--l-cycles", cycles[1], "--compile", compile])
    tasks = [task for task in etrm.arc_agi_1()[0] if etrm.side(task.grids()) == 10][:32]
    items = [(query, 0) for query in etrm.queries_of(tasks)][:32]
    batch = etrm.make_batch(items, 10, torch.device("cpu"), lambda task, i, epoch: (task.pairs[i], 0, 0))
    torch.manual_seed(0)
    ours, plain = etrm.Model(etrm.config_of(args)), PlainModel(128, 2, 8, *map(int, cycles))
    how = etrm.compiled(ours, args)
    optimizers = etrm.make_optimizers(ours, args), [torch.optim.AdamW(plain.parameters())]
    carry, demos = ours.fresh(*batch.x.shape), batch.pairs[batch.index].flatten(2)
    context = torch.zeros(len(items), 8, 128)

    def update(loss, optimizers):
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def our_step():
        logits = (ours.decoder(batch.x, context, carry.z_H, carry.z_L)[0] if what == "decoder"
                  else ours(batch, carry).logits)
        update(etrm.token_loss(logits, batch.y, "softmax").mean(), optimizers[0])

    def plain_step():
        given = context if what == "decoder" else plain.encode(demos, batch.mask)
        logits = plain.decode(batch.x, given, carry.z_H, carry.z_L)
        update(etrm.token_loss(logits, batch.y, "softmax").mean(), optimizers[1])
    our_step(), plain_step()
    mine, theirs = (len(items) / cpu_seconds(f, 5) for f in (our_step, plain_step))
    print(f"\n{what}, {how}: {mine:.1f} sample-steps/CPU-s, plain blocks {theirs:.1f}: {mine / theirs:.2f} times")


# ---- neural_sr

GRAMMAR = neural_sr.Grammar(ops=("add", "sub", "mul", "div", "sin", "cos", "exp", "log"), variables=2, max_size=30)


def fifty_points():
    """A problem that no program within reach solves."""
    tokens, constants = neural_sr.parse("sin(x0**2)*cos(x0) - 1/(1.7 + exp(x1))")
    rng = np.random.default_rng(0)
    return neural_sr.make_problems(rng, np.array([tokens]), 50, 2, np.array([constants]))[0]


@pytest.mark.parametrize("n_ops", [4, 8])
def test_programs_a_second_beside_python(n_ops):
    rng, grammar = np.random.default_rng(0), replace(GRAMMAR, ops=GRAMMAR.ops[:n_ops])
    tokens = neural_sr.random_programs(rng, rng.integers(1, 24, 20_000), grammar)
    X = fifty_points().X
    ours = len(tokens) / cpu_seconds(lambda: neural_sr.evaluate(tokens, X), 20)
    space = {name: getattr(np, name) for name in ("sin", "cos", "exp", "log")} | {"x0": X[0, :, 0], "x1": X[0, :, 1]}
    texts = [text for text in map(neural_sr.infix, tokens[:2000]) if "/ (1 " not in text]  # Python's 1 / 0

    def plain():
        with np.errstate(all="ignore"):
            for text in texts:
                eval(text, space)
    slow = len(texts) / cpu_seconds(plain)
    print(f"\nprograms of {(tokens != 0).sum(1).mean():.0f} tokens, of {','.join(grammar.ops)}, on 50 points: {ours / 1e3:.0f} k/CPU-s, Python's eval "
          f"of their text {slow / 1e3:.1f} k: {ours / slow:.0f} times")


def evolve(islands: list[str], evaluations: int) -> neural_sr.Search:
    s = neural_sr.Search(fifty_points(), GRAMMAR, budget=evaluations, population=4000, islands=islands, seed=0)
    s.begin()
    while len(s.active()):
        for kind in islands:
            s.breed(kind, 4000)
    return s


@pytest.mark.parametrize("engine", ["raw", "terms", "gplearn", "pyoperon", "pyoperon, 10 steps of LM"])
def test_evaluations_a_second_of_whole_engines(engine):
    p = fifty_points()
    X, y, start = p.X[0], p.y[0], time.process_time()
    if engine in ("raw", "terms"):
        s = evolve([engine], 300_000)
        n, children = s.spent[0], s.proposed[0]
    elif engine == "gplearn":
        genetic = pytest.importorskip("gplearn.genetic", reason="pip install -e '.[sr]'")
        genetic.SymbolicRegressor(population_size=1000, generations=10, random_state=0,
                                  function_set=("add", "sub", "mul", "div", "sin", "cos", "log")).fit(X, y)
        n = children = 10_000
    else:
        sklearn = pytest.importorskip("pyoperon.sklearn", reason="pip install -e '.[sr]'")
        model = sklearn.SymbolicRegressor(
            allowed_symbols="add,sub,mul,div,sin,cos,exp,log,constant,variable", population_size=4000, n_threads=1,
            max_evaluations=300_000, generations=100_000, optimizer_iterations=10 * ("LM" in engine), max_length=30,
            random_state=0).fit(X, y)
        n, children = sum(model.stats_[key] for key in ("residual_evaluations", "jacobian_evaluations")), model.stats_["evaluation_count"]
    seconds = time.process_time() - start
    print(f"\n{engine}: {n / seconds / 1e3:.1f} k evaluations/CPU-s (ours: distinct ones), {children / seconds / 1e3:.1f} k programs")


def test_two_ranks_against_one(tmp_path):
    """On the clock, so on two idle cores: sample-steps a second of the default run, the median over rows, twice each."""
    rates = {1: [], 2: []}
    for k, n in enumerate((1, 2, 1, 2)):
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "etrm_pretrain.py", "--threads", "1",
                 "--steps", "60", "--eval-every", "60", "--out-dir", str(tmp_path / str(k))]
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
        rows = metrics.read(tmp_path / str(k))
        rates[n].append(round(float(np.median([row["samples_per_second"] for row in rows if row["step"] > 10])), 1))
    one, two = np.mean(rates[1]), np.mean(rates[2])
    print(f"\netrm_pretrain.py, sample-steps/s: one rank {one:.0f}, two ranks {two:.0f}: {two / one:.2f} times; each: {rates}")


def test_synthetic_tasks():
    n = 400
    rate = n / cpu_seconds(lambda: [arc_rules.make_task([0, i]) for i in range(n)])
    print(f"\nsynthetic tasks: {rate:.0f} a CPU-s")
