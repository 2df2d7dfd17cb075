import copy
import json
import math
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import self_improve as S
from common import metrics
from common.files import UserError

SMALL = ["--width", "32", "--layers", "2", "--bootstrap-steps", "150", "--lr", "4e-3", "--steps", "2", "--problems", "6",
         "--updates", "4", "--batch-size", "32", "--n-test", "4", "--device", "cpu", "--threads", "1"]
every_kind = pytest.mark.parametrize("kind", S.KINDS)


def problems(kind, d, n, seed=0, limit=20):
    rng = np.random.default_rng(seed)
    return [S.as_problem(kind, S.KINDS[kind].draw(rng, d, limit), d) for _ in range(n)]


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "PASS_K", 2)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("self") / "run"
    S.main([*SMALL, "--cache-dir", str(cache), "--out-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def trained(run):
    return S.load_model(run)[0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return S.Rewriter(S.Config(width=32, layers=2)).eval()


# ---- problems and their grammar

@pytest.mark.parametrize("d", [1, 3, 6, 10])
def test_the_answers_are_pythons_own(d):
    for p in problems("arithmetic", d, 200):
        assert S.KINDS["arithmetic"].value(p.line) == p.answer == str(eval(" ".join(p.line)))
        assert S.KINDS["arithmetic"].parts(p.line) == d
    for p in problems("rpn", d, 200):
        stack = []
        for token in p.line:
            stack.append(token if S.is_number(token) else f"({stack.pop(-2)} {token} {stack.pop()})")
        assert S.KINDS["rpn"].value(p.line) == p.answer == str(eval(stack[0])) and S.KINDS["rpn"].parts(p.line) == d


def test_brackets_are_half_balanced_and_the_others_look_alike():
    some = problems("brackets", 5, 2000)
    assert 0.45 < np.mean([p.answer == "yes" for p in some]) < 0.55
    for p in some:
        text = "".join(p.line)
        for _ in range(5):
            text = text.replace("()", "").replace("[]", "").replace("{}", "")
        assert (text == "") == (p.answer == "yes") == (S.KINDS["brackets"].value(p.line) == "yes") and len(p.line) == 10


def test_half_of_the_spoilt_lines_have_as_many_brackets_of_each_type():
    spoilt = [p.line for p in problems("brackets", 5, 3000) if p.answer == "no"]
    even = [all(line.count(a) == line.count(b) for a, b in S.CLOSING.items()) for line in spoilt]
    assert 0.45 < np.mean(even) < 0.55


@every_kind
def test_no_value_on_the_way_is_beyond_the_limit(kind):
    for p in problems(kind, 7, 100, limit=12):
        for line in S.teach(p, marks=True).lines:
            assert all(abs(int(t)) <= 12 for t in line if S.is_number(t))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.sampled_from(["1", "-2", "3", "+", "-", "*", "//", "(", ")"]), max_size=9).map(tuple))
def test_the_evaluator_takes_what_python_takes_but_for_signs(line):
    pairs = [*zip(("", *line), line, strict=False)]
    signs = any(a in (*S.PRECEDENCE, "(", "") and b in "+-" for a, b in pairs)
    touching = any((a == ")" or S.is_number(a)) and (b == "(" or S.is_number(b)) for a, b in pairs)
    try:
        want = None if signs or touching else str(eval(" ".join(line)))
    except (SyntaxError, ZeroDivisionError, TypeError):
        want = None
    assert S.KINDS["arithmetic"].value(line) == (want if want != "()" else None)


@every_kind
def test_splits_have_no_common_problem_and_small_spaces_are_respected(kind):
    sets = [S.draw(np.random.default_rng(i), split, lambda rng: S.as_problem(kind, S.KINDS[kind].draw(rng, 2, 20), 2), 400)
            for i, split in enumerate(("train", "val", "test"))]
    texts = [{p.line for p in some} for some in sets]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert all(len(x) == len(y) > 0 for x, y in zip(texts, sets, strict=True))
    if kind == "brackets":                                                   # 18 are balanced, few more are near them
        assert sum(map(len, sets)) < 400


def test_corpus_and_fresh_problems_are_of_the_training_split_alone(model, monkeypatch):
    seen = []
    monkeypatch.setattr(S, "teach", lambda p, marks: (seen.append(p), S.Trace(p, [("1",)], [p.line]))[1])
    model.corpus(np.random.default_rng(0), 300, [*S.KINDS])
    assert {S.split_of(p) for p in seen} == {"train"} and {p.difficulty for p in seen} == {1, 2, 3}
    monkeypatch.setattr(model, "solve", lambda some, *rest: seen.extend(some))
    S.sample(model, dict.fromkeys(S.KINDS, 6), S.parse_args(SMALL), 1)
    assert {S.split_of(p) for p in seen} == {"train"} and max(p.difficulty for p in seen) == 6


# ---- rewriting

@every_kind
@pytest.mark.parametrize("marks", [True, False])
def test_a_clean_solution_is_strict_and_has_a_step_for_each_part(kind, marks):
    for p in problems(kind, 6, 100):
        trace = S.teach(p, marks)
        assert trace.verdict == "strict" and len(trace.written) == S.KINDS[kind].parts(p.line)


@pytest.mark.parametrize("kind, lines, verdict", [
    ("arithmetic", ["1 + 2 * 3", "1 + 6", "7"], "strict"),
    ("arithmetic", ["1 + 2 * 3", "3 * 3", "7"], "lucky"),
    ("arithmetic", ["1 + 2 * 3", "7"], "lucky"),                             # two parts at once
    ("arithmetic", ["1 + 2 * 3", "1 + 6", "8"], "wrong"),
    ("arithmetic", ["1 + 2 * 3", "7 * 1", "7"], "strict"),                   # another way, but each line has the value
    ("arithmetic", ["1 + 2 * 3", "7 *"], "failed"),
    ("arithmetic", ["1 + 2 * 3", ""], "truncated"),
    ("rpn", ["2 3 + 4 -", "5 4 -", "1"], "strict"),
    ("rpn", ["2 3 + 4 -", "5 4", "1"], "lucky"),
    ("brackets", ["( [ ] )", "( )", "yes"], "strict"),
    ("brackets", ["( [ ] )", "yes"], "lucky"),                               # a guess
    ("brackets", ["( ] [ )", "no"], "strict"),
    ("brackets", ["( ) ( ]", "no"], "lucky"),
    ("brackets", ["( ) ( ]", "( ]", "no"], "strict")])
def test_strict_means_that_every_line_has_the_value_and_one_part_less(kind, lines, verdict):
    lines = [tuple(x.split()) for x in lines]
    problem = S.Problem(kind, lines[0], S.KINDS[kind].value(lines[0]), 1)
    assert S.Trace(problem, lines[1:], lines).verdict == verdict


@pytest.mark.parametrize("written, line", [
    ("5 < 3 4 + > 7 2 *", "5 7 2 *"), ("( < [ ] > _ )", "( )"), ("< 1 2 + > 3", "3"), ("1 2 +", ""), ("> 1 < 2", ""),
    ("< 1 < 2 > 3", ""), ("< >", "")])
def test_what_is_written_is_read_without_the_marked_part(written, line):
    assert S.read_step(tuple(written.split()), marks=True) == tuple(line.split())


# ---- model

def test_a_copied_token_has_the_position_of_its_source(model):
    for kind in S.KINDS:
        for p in problems(kind, 5, 20):
            written = S.write_step(kind, p.line, True)
            tokens = torch.tensor([model.example(kind, p.line, written)[0]])
            place = model.positions(tokens)[0].tolist()
            source, out = place[1:len(p.line) + 1], place[len(p.line) + 2:-1]
            assert source == [*range(1, len(p.line) + 1)]
            copied = [(t, q) for i, (t, q) in enumerate(zip(written, out, strict=True))
                      if t not in "<>" and (i == 0 or written[i - 1] != ">")]
            assert copied == [*zip(p.line, source, strict=True)]


def test_the_model_is_causal(model):
    tokens = torch.randint(1, len(model.vocabulary), (3, 12), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 8:] = 1
    whole, changed = model(tokens), model(other)
    assert torch.equal(changed[:, :8], whole[:, :8]) and not torch.equal(changed[:, 8:], whole[:, 8:])


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_written_does_not_depend_on_the_first_guess(trained, monkeypatch, temperature):
    traces = [S.Trace(p, [], [p.line]) for kind in S.KINDS for d in (2, 5) for p in problems(kind, d, 5)]

    def write():
        return trained.write(traces, temperature, torch.Generator().manual_seed(3))
    with_a_teacher = write()
    monkeypatch.setattr(trained, "guess", lambda kind, line: [])
    assert write() == with_a_teacher and len({*with_a_teacher}) > 15
    if temperature == 0:                                                     # and it is the answer token by token
        for trace, written in zip(traces, with_a_teacher, strict=True):
            tokens = trained.example(trace.problem.kind, trace.lines[-1], ())[0][:-1]
            end, start = 2 * len(tokens) + 4, len(tokens)
            while tokens[-1] != trained.ids[";"] and len(tokens) < end:
                tokens.append(int(trained(torch.tensor([tokens]))[0, -1].argmax()))
            ended = tokens[-1] == trained.ids[";"]
            assert written == (tuple(trained.vocabulary[t] for t in tokens[start:-1]) if ended else written)


def test_sampling_follows_the_models_probabilities(trained):
    line = ("3", "4", "+", "2", "*")
    traces = [S.Trace(problems("rpn", 2, 1)[0], [], [line])] * 3000
    written = Counter(trained.write(traces, 1.0, torch.Generator().manual_seed(0)))
    for text, n in written.most_common(3):
        tokens, start = trained.example("rpn", line, text)
        logp = trained(torch.tensor([tokens]))[0, :-1].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        p = float(logp[start - 1:].sum().exp().detach())
        assert n > 30 and abs(n / 3000 - p) < 5 * (p / 3000) ** 0.5


def test_a_gradient_reaches_every_parameter_and_the_prompt_has_no_loss(model):
    batch = [model.example(p.kind, p.line, S.write_step(p.kind, p.line, True)) for k in S.KINDS for p in problems(k, 3, 4)]
    loss = S.batch_loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    single = [float(S.batch_loss(model, [x]).detach()) * (len(x[0]) - x[1]) for x in batch]
    assert loss.item() == pytest.approx(sum(single) / sum(len(t) - n for t, n in batch), rel=1e-4)


def test_sampling_is_seeded_and_greedy_is_the_same_in_any_company(model):
    some = [p for kind in S.KINDS for p in problems(kind, 4, 5)]
    a, b = (model.solve(some, 1.0, (7, 1)) for _ in range(2))
    assert [t.written for t in a] == [t.written for t in b]
    assert [t.written for t in a] != [t.written for t in model.solve(some, 1.0, (7, 2))]
    together, alone = model.solve(some), [model.solve([p])[0] for p in some]
    assert [t.written for t in together] == [t.written for t in alone]


# ---- the loop

def test_a_run_leaves_its_files_and_its_rows(run):
    names = {x.name for x in run.iterdir()}
    assert names >= {"args.json", "run.txt", "self_improve.py", "metrics.csv", "last.pt", "best.pt", "summary.json", "accuracy.png",
                     "train.jsonl", "val.jsonl", "test.jsonl", "solutions", "examples.txt", "checkpoints"}
    rows, summary = metrics.read(run), json.loads((run / "summary.json").read_text())
    assert [row["step"] for row in rows] == [0, 1, 2] and "sampled" not in rows[0]
    assert all(sum(row[name] for name in S.VERDICTS) == row["sampled"] == 36 for row in rows[1:])
    assert summary["script"] == "self_improve.py" and summary["test_accuracy"] == pytest.approx(rows[-1]["test_accuracy"])
    assert 0 <= summary["pass_before"]["pass@1"] <= summary["pass_before"]["pass@2"] <= 1 and summary["pass_now"].keys() == {"pass@1", "pass@2"}
    assert summary["n_test"] == sum(n for name, (_, n) in summary["test_cells"].items() if 3 <= int(name.split()[1]) <= 7)
    test = [json.loads(x) for x in (run / "test.jsonl").read_text().splitlines()]
    assert {x["kind"] for x in test} == set(S.KINDS) and {x["difficulty"] for x in test} == set(range(1, 11))


def test_resume_is_bit_exact_and_the_bootstrap_is_found_again(run, tmp_path, cache, capsys):
    whole = [line.rsplit(",", 1)[0] for line in (run / "metrics.csv").read_text().splitlines()]
    S.main([*SMALL, "--cache-dir", str(cache), "--max-minutes", "1e-6", "--out-dir", str(tmp_path / "run")])
    assert "bootstrapped before" in capsys.readouterr().out
    assert metrics.read(tmp_path / "run")[-1]["step"] == 0
    S.main(["--resume", str(tmp_path / "run")])
    assert [line.rsplit(",", 1)[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()] == whole


def test_an_edited_script_does_not_take_the_bootstrap_of_another(tmp_path, cache, monkeypatch, capsys):
    edited = tmp_path / "self_improve.py"
    edited.write_text(S.Path(S.__file__).read_text() + "# edited")
    monkeypatch.setattr(S, "__file__", str(edited))
    S.main([*SMALL, "--steps", "1", "--cache-dir", str(cache), "--out-dir", str(tmp_path / "run")])
    assert "bootstrapped before" not in capsys.readouterr().out


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_is_an_error(tmp_path, capsys):
    flags = [*SMALL, "--steps", "1", "--bootstrap-steps", "2", "--out-dir"]
    S.main([*flags, str(tmp_path / "a"), "--cache-dir", str(tmp_path / "cache")])
    file, = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    S.main([*flags, str(tmp_path / "b"), "--cache-dir", str(tmp_path / "cache")])
    assert f"bootstrapping anew: {file}" in capsys.readouterr().out and [*(tmp_path / "cache").iterdir()] == [file]
    assert metrics.read(tmp_path / "b")[0]["val_accuracy"] == metrics.read(tmp_path / "a")[0]["val_accuracy"]
    with pytest.raises(SystemExit, match="cache"):
        S.main([*flags, str(tmp_path / "c"), "--cache-dir", str(file)])
    assert not (tmp_path / "c").exists()


def test_ctrl_c_in_the_bootstrap_ends_it_and_in_the_loop_saves(tmp_path, cache, monkeypatch, capsys):
    def stop(*args):
        signal.raise_signal(signal.SIGINT)
        return {}
    monkeypatch.setattr(S, "update", stop)
    with pytest.raises(SystemExit) as e:
        S.main([*SMALL, "--cache-dir", str(tmp_path / "none"), "--out-dir", str(tmp_path / "run")])
    assert e.value.code == 130 and "nothing to go on from" in capsys.readouterr().out and not [*(tmp_path / "none").iterdir()]
    monkeypatch.undo()
    monkeypatch.setattr(S, "improve", stop)
    with pytest.raises(SystemExit) as e:
        S.main([*SMALL, "--cache-dir", str(cache), "--out-dir", str(tmp_path / "run")])
    assert e.value.code == 130 and "stopped at step 1; go on with" in capsys.readouterr().out


def test_without_training_nothing_changes_and_the_other_controls_train(run, tmp_path, cache):
    rows = {}
    for control in ("none", "outcome", "unverified", "corpus"):
        S.main([*SMALL, "--cache-dir", str(cache), "--control", control, "--out-dir", str(tmp_path / control)])
        rows[control] = metrics.read(tmp_path / control)
    first = metrics.read(run)[0]
    keys = ("train_accuracy", "val_accuracy", "test_accuracy", "ood_accuracy", "easy_accuracy")
    assert all(row[k] == first[k] for row in rows["none"] for k in keys) and "loss" not in rows["none"][1]
    assert rows["corpus"][1]["loss"] > 0 and "sampled" not in rows["corpus"][1]
    unverified, outcome = rows["unverified"][1], rows["outcome"][1]
    assert 0 < unverified["kept"] <= unverified["strict"] + unverified["lucky"] + unverified["wrong"]
    assert outcome["kept"] <= outcome["strict"] + outcome["lucky"] < outcome["kept"] + outcome["wrong"]


def test_a_fall_of_validation_brings_the_best_weights_back(run, tmp_path, cache, monkeypatch, capsys):
    values = iter([0.9, 0.8, 0.95])                                          # of val_accuracy, in steps 0, 1, 2
    whole, log, improve, seen = S.accuracy, S.log, S.improve, []

    def log_and_set_the_next(*args):
        monkeypatch.setattr(S, "accuracy", whole)
        log(*args)
        x = next(values)
        monkeypatch.setattr(S, "accuracy", lambda cells, ds=S.MIDDLE, kind=None: whole(cells, ds, kind) if kind else x)
    monkeypatch.setattr(S, "log", log_and_set_the_next)

    def remember(model, *args):
        seen.append([p.detach().clone() for p in model.parameters()])
        return improve(model, *args)
    monkeypatch.setattr(S, "improve", remember)
    S.main([*SMALL, "--cache-dir", str(cache), "--out-dir", str(tmp_path / "run")])
    assert "validation fell from 0.9000 to 0.8000" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))        # what iteration 2 starts from is that of 1


def test_a_run_that_is_stopped_where_validation_fell_goes_on_as_one_that_is_not(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(S, "FALL", -1.0)                                     # not to rise is to fall
    flags = [*SMALL, "--steps", "4", "--cache-dir", str(cache), "--control", "unverified", "--out-dir"]
    S.main([*flags, str(tmp_path / "whole")])
    fell = capsys.readouterr().out.count("validation fell")
    improve = S.improve

    def stop(model, optimizer, pool, frontier, args, step, folder):
        signal.raise_signal(signal.SIGINT)
        return improve(model, optimizer, pool, frontier, args, step, folder)
    for _ in range(4):
        monkeypatch.setattr(S, "improve", stop)
        with pytest.raises(SystemExit):
            S.main(["--resume", str(tmp_path / "run")] if (tmp_path / "run").exists() else [*flags, str(tmp_path / "run")])
    monkeypatch.setattr(S, "improve", improve)
    S.main(["--resume", str(tmp_path / "run")])
    rows = [[line.rsplit(",", 1)[0] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()] for name in ("whole", "run")]
    assert fell >= 2 and rows[0] == rows[1] and len(rows[0]) == 6


def test_a_run_that_ended_early_is_resumed_without_a_change(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(S, "keep", lambda traces, args, step: ([], {}))
    out = S.main([*SMALL, "--steps", "9", "--cache-dir", str(cache), "--out-dir", str(tmp_path / "run")])
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert out["steps"] == S.IDLE and out["ended"] == "no solution passed in 3 iterations"
    again = S.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "metrics.csv").read_text() == rows and again["test_cells"] == out["test_cells"]


def test_validation_alone_chooses_the_best_weights_and_the_next_difficulty(tmp_path, cache, monkeypatch):
    shares = iter([(0.76, 0.9), (0.5, 0.1), (0.9, 0.2)])                     # right of validation, and of test and training
    cells = {}

    def count(traces):
        split = S.split_of(traces[0].problem)
        if split == "train":                                                # the first of the three that is counted
            cells["val"], cells["test"] = next(shares)
            cells["train"] = cells["test"]
        return {name: [round(100 * cells[split]), 100] for name in {f"{t.problem.kind} {t.problem.difficulty}" for t in traces}}
    monkeypatch.setattr(S, "count", count)
    S.main([*SMALL, "--cache-dir", str(cache), "--out-dir", str(tmp_path / "run")])
    rows = metrics.read(tmp_path / "run")
    assert [row["frontier_rpn"] for row in rows] == [4, 5, 5]                # after each row it goes on where 0.75 is reached
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["best"] == 0.9 and last["frontier"] == dict.fromkeys(S.KINDS, 6)
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"] == 2


def test_what_is_kept_is_kept_once_and_weighs_more_where_it_is_rare():
    a, b, c = problems("rpn", 4, 3)
    wrong = S.Trace(c, [("1",)], [c.line, ("999",)])
    new, figures = S.keep([S.teach(a, True), S.teach(a, True), S.teach(b, True), wrong], S.parse_args(["--k", "2"]), 5)
    assert [(s["steps"], s["iteration"]) for s in new] == [(S.teach(p, True).steps, 5) for p in (a, b)]
    assert [s["weight"] for s in new] == pytest.approx([0.1, 0.6])
    assert (figures["strict"], figures["wrong"], figures["kept"]) == (3, 1, 2) and figures["share_distinct"] == pytest.approx(2 / 3)
    assert (figures["sampled_pass@1"], figures["sampled_pass@k"]) == pytest.approx((3 / 4, 2 / 3))


def test_an_iteration_remembers_four_and_its_learning_rate_falls(model, tmp_path, monkeypatch):
    args, pool, rates = S.parse_args([*SMALL, "--updates", "10", "--lr", "0.01"]), [], []
    monkeypatch.setattr(S, "sample", lambda *_: [])
    monkeypatch.setattr(S, "examples", lambda _: "")
    monkeypatch.setattr(S, "keep", lambda traces, args, step: ([{"kind": "rpn", "steps": [], "weight": 1, "iteration": step}], {}))
    monkeypatch.setattr(S, "lesson", lambda *_: [[]] * 10)
    monkeypatch.setattr(S, "update", lambda model, optimizer, batches, lrs: rates.append(lrs))
    for step in range(7):
        S.improve(model, None, pool, {}, args, step, tmp_path)
    assert [s["iteration"] for s in pool] == [3, 4, 5, 6] and rates[0][0] == 0.01 and rates[0][-1] == pytest.approx(0.0019)


def test_a_gradient_is_clipped(model):
    twin = copy.deepcopy(model)
    torch.nn.init.normal_(twin.embedding.weight, std=3.0)
    before = [p.detach().clone() for p in twin.parameters()]
    S.update(twin, torch.optim.SGD(twin.parameters()), [[twin.example("rpn", ("1", "2", "+"), ("3",))]], [1.0])
    moved = sum(((p - q) ** 2).sum() for p, q in zip(twin.parameters(), before, strict=True)) ** 0.5
    assert float(moved.detach()) == pytest.approx(1, rel=1e-3)


def test_a_constant_answer_is_a_baseline_and_pass_at_k_takes_every_second_problem(model, monkeypatch):
    some = [S.Problem("rpn", (str(i),), str(i % 2 or 7), 3 + i // 10) for i in range(30)]
    some[0] = S.Problem("rpn", ("0",), "1", 3)
    assert S.constant_baseline(some, "rpn") == 16 / 30
    asked = []
    monkeypatch.setattr(model, "solve", lambda some, *rest: (asked.extend(some), [S.Trace(p, [], [p.line, (p.answer,)]) for p in some])[1])
    assert S.passes(model, some, S.parse_args([]), 0) == {"pass@1": 1.0, "pass@2": 1.0}
    assert [*dict.fromkeys(asked)] == some[::2] and len(asked) == 15 * 2


def test_fixed_problems_are_the_same_in_every_iteration_and_fresh_ones_are_not(model, monkeypatch):
    drawn = []
    monkeypatch.setattr(model, "solve", lambda some, *rest: drawn.append([p.line for p in some]))
    for flags in ([], ["--fixed"]):
        for step in (1, 2):
            S.sample(model, dict.fromkeys(S.KINDS, 5), S.parse_args([*SMALL, *flags]), step)
    assert drawn[0] != drawn[1] and drawn[2] == drawn[3] and len(drawn[0]) == len(drawn[2]) == 36


def test_compare_runs_every_arm_from_one_bootstrap_and_goes_on_where_it_was(tmp_path, cache):
    flags = [*SMALL, "--cache-dir", str(cache), "--compare", "--out-dir", str(tmp_path / "arms")]
    out = S.main(flags)
    firsts = [metrics.read(tmp_path / f"arms-{control}")[0] for control in S.KEPT]
    assert [*out] == [*S.KEPT] and len({row["test_accuracy"] for row in firsts}) == 1
    assert (tmp_path / "arms-off" / "compare.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="was run with --k 2"):
        S.main([*flags, "--k", "3"])
    (tmp_path / "arms-corpus" / "summary.json").unlink()
    assert S.main(flags)["corpus"]["test_cells"] == out["corpus"]["test_cells"]
    assert [row["step"] for row in metrics.read(tmp_path / "arms-corpus")] == [0, 1, 2]


def test_own_solutions_are_trained_on_as_they_were_written(model, monkeypatch):
    args = S.parse_args([*SMALL, "--replay", "0", "--updates", "50"])
    trace = S.teach(problems("rpn", 4, 1)[0], True)
    pool = [{"kind": "rpn", "steps": trace.steps, "weight": 1.0, "iteration": 0}]
    batches = S.lesson(model, pool, args, 3)
    wanted = {(tuple(model.example("rpn", *x)[0])) for x in trace.steps}
    assert {tuple(tokens) for batch in batches for tokens, _ in batch} == wanted and len(batches) == 50
    args.control = "corpus"
    longest = max(wanted, key=len)                                           # of four operations: no step of the corpus
    assert longest not in {tuple(tokens) for batch in S.lesson(model, pool, args, 3) for tokens, _ in batch}


# ---- use and bad input

def test_a_saved_model_answers_as_the_trained_one_and_shows_its_lines(run, capsys):
    solve = S.load(run)
    out = S.main(["--solve", "3 4 + 2 *", "--kind", "rpn", "--checkpoint", str(run), "--threads", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert out["answer"] == solve("3 4 + 2 *", "rpn") and printed[0].startswith("3 4 + 2 *  =  ")
    assert printed[-2] == f"answer: {out['answer'] or 'none'}" and printed[-1].startswith(f"{out['verdict']}: ")
    evaluated = S.main(["--checkpoint", str(run / "last.pt"), "--threads", "1"])
    assert evaluated["cells"] == json.loads((run / "summary.json").read_text())["test_cells"]
    assert "difficulty 3-7: " in capsys.readouterr().out


@pytest.mark.parametrize("flags, named", [
    ("--kinds rpn,roman", "--kinds"), ("--k 0", "--k"), ("--temperature -1", "--temperature"), ("--temperature 0", "--temperature"),
    ("--width 30", "width"), ("--difficulty 0-5", "--difficulty"), ("--difficulty 7-4", "--difficulty"), ("--difficulty 4-11", "--difficulty"), ("--difficulty 4", "--difficulty"), ("--compare --resume RUN", "--compare"), ("--plot RUN nowhere", "not both"), ("--problems 1", "--problems"), ("--resume ''", "empty"),
    ("--solve 1 --checkpoint RUN", "--solve"), ("--solve '--1 + ²' --checkpoint RUN", "--solve"), ("--solve '1 + 2'", "--checkpoint"), ("--solve '1 + 99' --checkpoint RUN", "+-20"),
    ("--solve '1 + + 2' --checkpoint RUN", "--solve"), ("--checkpoint nowhere.pt", "nowhere.pt"), ("--plot nowhere", "nowhere"),
    ("--out-dir RUN", "holds a run"), ("--resume RUN --lr 0.5", "--lr"), ("--checkpoint RUN --lr 0.1", "--lr")])
def test_bad_flags_end_in_one_line(run, tmp_path, capsys, monkeypatch, flags, named):
    import shlex
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        S.main(shlex.split(flags.replace("RUN", str(run))))
    message = capsys.readouterr().err if e.value.code == 2 else str(e.value.code)
    assert named in message and message.strip().count("\n") == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, named", [
    ({"model": {}}, "bad.pt"), ({"config": {"width": "x"}}, "width"), ({"config": {"wings": 2}}, "wings"),
    ({"script": "x.py", "config": {"wings": 2}}, "x.py")])
def test_a_damaged_checkpoint_is_refused(run, tmp_path, change, named):
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save({**saved, **change}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=named):
        S.load(tmp_path / "bad.pt")


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    saved = torch.load(run / "last.pt", weights_only=True)
    model = S.Rewriter(S.Config(**saved["config"]))
    torch.nn.init.constant_(model.embedding.weight, math.inf)
    with pytest.raises(UserError, match="not finite"):
        S.update(model, torch.optim.SGD(model.parameters()), [[model.example("rpn", ("1", "2", "+"), ("3",))]], [1.0])


def test_the_kept_model_works_out_harder_lines_than_its_corpus_had():
    path = S.Path(S.__file__).parent / "logs" / "kept" / "self_improve" / "compare-s10-off"
    assert S.load(path)("( 3 + 4 ) * 2 - 9") == "5"
    model, _ = S.load_model(path)
    some = [p for kind in S.KINDS for p in S.draw(np.random.default_rng(7), "test", lambda rng: model.problem(rng, kind, 6), 30)]  # noqa: B023
    assert np.mean([t.verdict == "strict" for t in model.solve(some)]) > 0.6  # 20 % after the bootstrap
