"""etrm_pretrain.py on unseen tasks: cells that attend to cells, canonical colours, drawn tasks, test-time training."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import etrm_pretrain as etrm
from common import metrics
from common.arc_tasks import Task, View

CPU = torch.device("cpu")
CELLS = ["--encoder", "cells", "--hidden", "16", "--heads", "2", "--encoder-layers", "1", "--layers", "1", "--l-cycles", "1",
         "--halt-max-steps", "2", "--loo", "--synthetic", "0.5", "--max-side", "6", "--max-train-groups", "4",
         "--batch-size", "8", "--threads", "1", "--compile", "off", "--precision", "fp32"]


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], np.int8)


def small_tasks(n: int = 4) -> list[Task]:
    return [task for task in etrm.arc_agi_1()[0] if etrm.side(task.grids()) <= 6][:n]


def make_model(*flags: str) -> tuple[etrm.Model, etrm.flags.Flags]:
    args = etrm.parse_args([*CELLS, *flags])
    torch.manual_seed(0)
    return etrm.Model(etrm.config_of(args)), args


def plain(task, i, epoch):
    return task.pairs[i], 0, 0


def logits(model, queries, version=plain, C=6) -> torch.Tensor:
    batch = etrm.make_batch([(query, 0) for query in queries], C, CPU, version)
    with torch.no_grad():
        return model(batch, model.fresh(*batch.x.shape)).logits


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(etrm, "N_SYNTHETIC", 4)
    patch.setattr(etrm, "N_VAL", 4)
    folder = tmp_path_factory.mktemp("cells") / "run"
    etrm.main([*CELLS, "--steps", "6", "--eval-every", "3", "--out-dir", str(folder)])
    patch.undo()
    return folder


# ---- The model

@pytest.mark.parametrize("k", range(8))
def test_a_relation_is_the_symmetry_it_is_named_after(k):
    names = ["itself", "turned", "half a turn", "turned back", "transposed", "flipped columns",
             "transposed the other way", "flipped rows"]  # as View turns by k quarters, and transposes from 4 on
    given, (H, W), C = np.arange(15).reshape(3, 5), (3, 5), 6
    turned = np.rot90(given, k % 4)
    turned = turned.T if k >= 4 else turned
    points = etrm.pointers_on(C, H, W)[list(etrm.RELATIONS).index(names[k])].reshape(C, C)
    for (r, c), value in np.ndenumerate(turned):
        assert given[divmod(int(points[r, c]), C)] == value


def test_relations_of_tiles_halves_and_neighbours_by_hand():
    def of(name: str, r: int, c: int, H: int = 2, W: int = 3) -> list:
        to = int(etrm.pointers_on(6, H, W)[list(etrm.RELATIONS).index(name), 6 * r + c])
        return [] if to == 36 else [list(divmod(to, 6))]
    assert of("tiled", 3, 4) == [[1, 1]] and of("which tile", 3, 4) == [[1, 1]] and of("mirrored tiles", 3, 4) == [[0, 1]]
    assert of("enlarged by 2", 3, 5) == [[1, 2]] and of("shrunk by 2", 1, 2) == [[2, 4]] and of("shrunk by 2", 4, 4) == []
    assert of("half a width on", 0, 0, 3, 5) == [[0, 3]] and of("half a height back", 4, 1, 4) == [[2, 1]]
    assert of("above", 0, 0) == [] and of("below", 0, 0) == [[1, 0]]
    weights = torch.zeros(2, 1, etrm.N_RELATIONS)
    weights[0, 0, list(etrm.RELATIONS).index("tiled")] = 1.0
    tokens = torch.from_numpy(np.stack([etrm.to_tokens(np.ones(size, np.int8), 6) for size in ((2, 3), (5, 5))])).long()
    weights[1, 0, etrm.N_POINTING] = 0.5  # the row
    bias = etrm.relation_bias(weights, etrm.pointers(6, np.array([[2, 3], [5, 5]]), CPU), etrm.wide(tokens))
    assert bias.shape == (2, 1, 36, 36) and bias[0, 0, 3 * 6 + 4, 7] == bias[0].sum() / 36 == etrm.RELATION_SCALE
    assert bias[1, 0, 8].tolist() == [0.0] * 6 + [etrm.RELATION_SCALE / 2] * 6 + [0.0] * 24


def test_cells_of_an_object_touch_by_sides_and_of_a_figure_also_by_corners():
    tokens = torch.from_numpy(etrm.to_tokens(grid("110", "001", "020"), 6)).long()[None]
    objects, figures = etrm.same_object(tokens)[0].view(2, 6, 6, 6, 6).bool()
    assert np.argwhere(objects[0, 0].numpy()).tolist() == [[0, 0], [0, 1]] and objects[1, 2].sum() == 1
    assert np.argwhere(objects[0, 2].numpy()).tolist() == [[0, 2]] and objects[1, 0].sum() == 3 and not objects[3, 3].any()
    assert np.argwhere(figures[0, 0].numpy()).tolist() == [[0, 0], [0, 1], [1, 2], [2, 1]] and not figures[1, 0].any()


def test_what_explains_an_output_is_found_cell_by_cell_and_as_a_share():
    x, y = grid("120", "003"), grid("021", "303")
    pairs = torch.from_numpy(np.stack([etrm.to_tokens(g, 6) for g in (x, y)])).long()[None]
    (of_cells,), (of_pair,) = etrm.explained(pairs, etrm.pointers(6, np.array([[2, 3]]), CPU))
    i = list(etrm.RELATIONS).index("flipped columns")
    assert of_cells.view(6, 6, -1)[:2, :3, i].tolist() == [[1, 1, 1], [1, 1, 0]] and of_cells[:, i].sum() == 5
    assert of_pair[:, i].tolist() == pytest.approx([5 / 6, 0])


def test_a_map_of_colours_along_a_relation_is_what_the_demonstrations_say():
    pairs = ((grid("12", "21"), grid("43", "34")), (grid("112", "000"), grid("433", "000")), (grid("15"), grid("00")))
    query = etrm.Query(Task("a", pairs, 2), 2, (0, 1))  # mirrored, then 1 becomes 3 and 2 becomes 4
    batch = etrm.make_batch([(query, 0)], 6, CPU, plain)
    maps, i = etrm.colour_maps(batch), list(etrm.RELATIONS).index("flipped columns")
    assert maps.evidence[0, :, i].tolist() == [1, 1] and maps.evidence[0, 1].sum() < etrm.N_POINTING
    of = maps.shares[0, i]
    assert of[3, 5] > 0.8 and of[4, 6] > 0.8 and of[7, 7] == 1 and torch.allclose(of.sum(1), torch.ones(()))
    itself = list(etrm.RELATIONS).index("itself")
    assert float(maps.evidence[0, 0, itself]) == pytest.approx((2 + 2 + 1 + 1 + 3) / 10)


def test_a_query_looks_at_its_demonstrations_in_any_order_and_not_at_its_answer():
    model, _ = make_model()
    queries = etrm.queries_of(small_tasks())
    usual = logits(model, queries)

    def with_answer(task, i, epoch):
        x, y = task.pairs[i]
        return (x, y if i < task.n_demos else (y + 1) % 10), 0, 0
    assert torch.equal(usual, logits(model, queries, with_answer))
    turned = [replace(query, demos=query.demos[::-1]) for query in queries]
    assert torch.allclose(usual, logits(model, turned), atol=1e-5)
    alone = logits(model, [max(queries, key=lambda query: len(query.demos))])  # without the others' room
    assert torch.allclose(usual[max(range(len(queries)), key=lambda i: len(queries[i].demos))], alone[0], atol=1e-5)

    def one_cell(task, i, epoch):
        x, y = (g.copy() for g in task.pairs[i])
        if i == 0:
            y[-1, -1] = (y[-1, -1] + 1) % 10
        return (x, y), 0, 0
    assert ((usual - logits(model, queries, one_cell)).abs().amax((1, 2)) > 1e-5).all()


def test_canonical_colours_are_the_same_for_a_recoloured_task_and_do_not_see_the_answer():
    task = etrm.as_task("a", {"train": [{"input": [[0, 7, 7], [3, 7, 0]], "output": [[0, 5, 5], [2, 5, 0]]}],
                              "test": [{"input": [[7, 3]], "output": [[9, 9]]}]}, "a")
    query = etrm.queries_of([task])[0]
    new = etrm.canonical_colours(query, task.pairs)
    assert new[0] == 0 and new[7] == 1 and new[3] == 2 and {new[5], new[2]} == {8, 9} and sorted(new) == list(range(10))
    other = (task.pairs[0], (task.pairs[1][0], grid("44")))
    assert (etrm.canonical_colours(query, other) == new).all()
    for seed in range(20):  # 5 and 2 are as common in what inputs have, so their order is that of their numbers
        view = View(0, (0, *np.random.default_rng(seed).permutation(range(1, 10))))
        pairs = [tuple(map(view.apply, pair)) for pair in task.pairs]
        again = etrm.canonical_colours(query, pairs)
        for (x, y), (u, v) in zip(task.pairs, pairs, strict=True):
            assert (again[u] == new[x]).all() and (np.isin(again[v], (0, 8, 9)).all() or (y == 9).all())


def test_answers_are_told_in_the_task_own_colours():
    model, args = make_model()
    with torch.no_grad():
        model.decoder.copy.fill_(1e4)
    queries = etrm.queries_of(small_tasks(8))
    predicted = etrm.predict(model, queries, (6,), args)
    for query, entry in zip(queries, predicted, strict=True):
        assert (etrm.attempts(entry)[0] == query.task.pairs[query.pair][0]).all()


def test_all_steps_of_a_query_have_one_gradient():
    model, args = make_model("--changed-weight", "1")
    batch = etrm.make_batch([(query, 0) for query in etrm.queries_of(small_tasks())], 6, CPU, plain)
    norms = []
    for through in (True, False):
        carry, model.decoder.places.on.grad = model.fresh(*batch.x.shape), None
        first = model(batch, carry)
        carry = first.carry if through else etrm.Carry(*(x.detach() for x in first.carry))
        etrm.batch_loss(model(batch, carry, context=first.context), batch, args)[0].backward()
        norms.append(model.decoder.places.on.grad.clone())
    assert (norms[0] - norms[1]).abs().max() > 1e-4
    loss, out, _ = etrm.run_steps(model, batch, model.fresh(*batch.x.shape), args, 2)
    each = [etrm.batch_loss(step, batch, args)[0] for step in (first, out)]
    assert torch.allclose(loss, sum(each) / 2, atol=1e-5)


def test_a_changed_cell_weighs_more():
    scores, y, x = torch.zeros(1, 2, etrm.VOCAB), torch.tensor([[2, 3]]), torch.tensor([[2, 2]])
    scores[0, 0, 2] = 50.0  # right, and the second one guesses: log 12
    weights = torch.where(y == x, 1.0, 3.0)
    assert float(etrm.token_loss(scores, y, "softmax", weights)) == pytest.approx(3 / 4 * np.log(12), rel=1e-5)
    assert float(etrm.token_loss(scores, y, "softmax")) == pytest.approx(np.log(12) / 2, rel=1e-5)


def test_every_parameter_learns():
    model, args = make_model()
    batch = etrm.make_batch([(query, 0) for query in etrm.queries_of(small_tasks())], 6, CPU, plain)
    torch.nn.init.normal_(model.decoder.halt.weight)
    etrm.run_steps(model, batch, model.fresh(*batch.x.shape), args, 2)[0].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


# ---- What training draws

def test_queries_of_a_drawn_task_follow_each_other_and_ask_each_of_its_pairs():
    args = etrm.parse_args([*CELLS, "--batch-size", "16"])
    slots = etrm.Slots(etrm.queries_of(small_tasks()), args, 10)
    assert slots.canvases == [6, 8, 10]
    shares = np.bincount([slots.canvas(step) for step in range(2000)], minlength=11)[[6, 8, 10]] / 2000
    assert abs(shares - np.array([1 / 36, 1 / 64, 1 / 100]) / sum([1 / 36, 1 / 64, 1 / 100])).max() < 0.05
    synthetic = 0
    for start in range(0, 320, 4):
        four = [slots.item(start + i)[0] for i in range(4)]
        C = slots.canvas(start // 16)
        assert len({query.task.id for query in four}) == 1 and etrm.side(four[0].task.grids()) <= C
        assert len({query.pair for query in four}) == min(4, len(four[0].task.pairs))
        assert all(query.pair not in query.demos and len(query.demos) <= 3 for query in four)
        synthetic += ":" in four[0].task.id
    assert 25 <= synthetic <= 55


def test_the_canvas_of_a_query_is_that_of_what_may_be_seen_and_one_too_large_is_not_answered():
    large = etrm.as_task("a", {"train": [{"input": [[1]], "output": [[1] * 7]}, {"input": [[1]], "output": [[2]]}],
                               "test": [{"input": [[1]], "output": [[1] * 12]}]}, "a")
    query = etrm.queries_of([large])[0]
    assert etrm.canvas_of(query, (6, 8, 10)) == 8 and etrm.canvas_of(replace(query, demos=(1,)), (6, 8, 10)) == 6
    assert etrm.canvas_of(query, (6,)) == 0
    model, args = make_model()
    answers = etrm.answer(model, [*etrm.queries_of(small_tasks()), query], (6,), args)
    assert not answers.tokens[:, -1].any() and answers.tokens[:, :-1].any((0, 2)).all()
    assert etrm.score(answers, [*etrm.queries_of(small_tasks()), query], (6,))["exact_count"][1] == 6


def test_tasks_of_re_arc_are_drawn_for_all_but_held_out_ids():
    pytest.importorskip("reasoning_gym")
    rules = etrm.arc_rules
    tasks = [rules.re_arc_task((1, i), 10) for i in range(40)]
    assert len({task.id for task in tasks}) > 25 and all(len(task.pairs) == 4 for task in tasks)
    assert max(etrm.side(task.grids()) for task in tasks) <= 10
    assert all((a.pairs[0][0] == b.pairs[0][0]).all() for a, b in zip(
        tasks, [rules.re_arc_task((1, i), 10) for i in range(40)], strict=True))
    names = {task.id.split()[1] for task in tasks}
    assert not names & {rules.re_arc_task((1, i), 10, without=names).id.split()[1] for i in range(40)}
    ground = [np.bincount(x.ravel(), minlength=10).argmax() == 0 for task in tasks for x, _ in task.pairs]
    assert np.mean(ground) > 0.5


def test_re_arc_that_is_missing_is_one_line(monkeypatch, tmp_path):
    def missing():
        raise etrm.UserError("re-arc's generators come with reasoning-gym, which is missing: pip install -e '.[arc]'")
    monkeypatch.setattr(etrm.arc_rules, "re_arc", missing)
    with pytest.raises(SystemExit, match="missing: pip install"):
        etrm.main([*CELLS, "--re-arc", "0.5", "--out-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# ---- Runs

def test_resume_is_bit_exact(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(etrm, "N_SYNTHETIC", 4)
    monkeypatch.setattr(etrm, "N_VAL", 4)
    folder = tmp_path / "run"
    real = etrm.Slots.refill

    def stops(self, halted):
        real(self, halted)
        if self.next == 8 * 5:
            etrm.run.os.kill(etrm.run.os.getpid(), etrm.run.signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(etrm.Slots, "refill", stops)
        etrm.main([*CELLS, "--steps", "6", "--eval-every", "3", "--out-dir", str(folder)])
    etrm.main(["--resume", str(folder), "--threads", "1"])
    for name in ("model", "ema"):
        a, b = (torch.load(x / "last.pt")[name] for x in (folder, run_folder))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_schedule_by_time_falls_with_the_minutes_of_the_whole_run(tmp_path, monkeypatch):
    args = etrm.parse_args([*CELLS, "--schedule", "time", "--max-minutes", "2", "--warmup", "9"])
    assert etrm.schedule(0, args, 0.0) == 0.1 and etrm.schedule(9, args, 0.0) == 1.0
    assert etrm.schedule(500, args, 90.0) == 0.25 and etrm.schedule(500, args, 1e9) == 0.0
    monkeypatch.setattr(etrm, "N_SYNTHETIC", 2)
    monkeypatch.setattr(etrm, "N_VAL", 2)
    folder = tmp_path / "run"
    flags = [*CELLS, "--schedule", "time", "--warmup", "0", "--out-dir", str(folder)]
    with pytest.raises(SystemExit, match="give --max-minutes"):
        etrm.main(flags)
    assert not folder.exists()
    summary = etrm.main([*flags, "--max-minutes", "0.05"])
    rates = [row["train/lr"] for row in metrics.read(folder)][1:]
    assert not summary["stopped_early"] and rates == sorted(rates, reverse=True) and rates[-1] < 0.5 * args.lr
    with pytest.raises(SystemExit, match="give --max-minutes"):
        etrm.main(["--resume", str(folder)])


# ---- Test-time training and evaluation

def test_test_time_training_learns_its_task_and_leaves_the_weights_as_they_were(monkeypatch):
    model, args = make_model("--ttt-steps", "4")
    monkeypatch.setattr(etrm, "TTT_LR", 0.01)
    task, before = small_tasks()[0], {name: x.clone() for name, x in model.state_dict().items()}
    query = etrm.queries_of([task])
    first = etrm.answer(model, query, (6,), args)
    with etrm.adapted(model, task, (6,), args) as how:
        assert how == "adapted"
        inside = etrm.answer(model, query, (6,), args)
    assert inside.loss[0] < first.loss[0] - 0.01
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert np.array_equal(etrm.answer(model, query, (6,), args).q, first.q)


def test_refinement_moves_the_context_alone(monkeypatch):
    model, args = make_model("--refine-steps", "4")
    task, before = small_tasks()[0], {name: x.clone() for name, x in model.state_dict().items()}
    query = etrm.queries_of([task])
    first = etrm.answer(model, query, (6,), args)
    with etrm.adapted(model, task, (6,), args):
        assert model.offset.abs().max() > 0
        assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
        assert etrm.answer(model, query, (6,), args).loss[0] < first.loss[0]
    assert model.offset is None and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == before.keys()


def test_a_loss_that_is_not_finite_is_counted_and_the_next_task_goes_on(monkeypatch):
    model, args = make_model("--ttt-steps", "2")
    tasks, real = small_tasks(3), etrm.batch_loss
    one = Task("one", (tasks[0].pairs[0], tasks[0].pairs[-1]), 1)
    large = etrm.as_task("large", {"train": [{"input": [[1] * 9], "output": [[2]]}] * 2,
                                   "test": [{"input": [[3]], "output": [[4]]}]}, "large")

    def spoilt(step, batch, args):
        loss, each = real(step, batch, args)
        return loss * (torch.nan if batch.tasks[0] == tasks[1].id else 1), each
    before = {name: x.clone() for name, x in model.state_dict().items()}
    monkeypatch.setattr(etrm, "batch_loss", spoilt)
    queries = etrm.queries_of([*tasks, one, large])
    predicted, how = etrm.predict_tasks(model, queries, (6,), args)
    assert how == {"adapted": 2, "not adapted: its loss was not finite": 1, "not adapted: one demonstration": 1,
                   "larger than the canvas": 1}
    assert [entry["task"] for entry in predicted] == [query.task.id for query in queries]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_the_table_counts_tests_and_tasks_by_the_sides_of_what_may_be_seen():
    def task(name: str, side: int, n_tests: int) -> Task:
        pair = (np.ones((side, 1), np.int8), grid("2"))
        return Task(name, (pair, pair, *[(grid("1"), grid("3"))] * n_tests), 2)
    queries = etrm.queries_of([task("a", 8, 2), task("b", 9, 1), task("c", 30, 1)])
    right, second, wrong = ([(grid("3"), 2, 0.5)], [(grid("4"), 2, 0.5), (grid("3"), 1, 0.5)], [(grid("5"), 1, 0.5)])
    predicted = [{"votes": votes, "earlier": []} for votes in (right, second, wrong, right)]
    table = etrm.by_side(predicted, queries)
    assert table == {"sides <= 8": {"tests": [1, 2, 2], "tasks": [0.5, 1.0, 1.0]},
                     "sides <= 10": {"tests": [1, 2, 3], "tasks": [0.5, 1.0, 2.0]},
                     "sides <= 30": {"tests": [2, 3, 4], "tasks": [1.5, 2.0, 3.0]}}
    text = etrm.format_table(table)
    assert "sides <= 30, tests: pass@1 50.0% (2/4" in text and "tasks: pass@1 50.0% (1.5/3" in text


def test_a_checkpoint_is_evaluated_on_unseen_tasks_and_solves_a_file(run_folder, tmp_path, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in small_tasks(7)[4:]:
        pairs = [{"input": x.tolist(), "output": y.tolist()} for x, y in task.pairs]
        (folder / f"{task.id}.json").write_text(json.dumps({"train": pairs[:task.n_demos], "test": pairs[task.n_demos:]}))
    (folder / "large.json").write_text(json.dumps({"train": [{"input": [[1] * 9], "output": [[2]]}] * 2,
                                                   "test": [{"input": [[3]], "output": [[4]]}]}))
    out = etrm.main(["--checkpoint", str(run_folder), "--eval-data", str(folder), "--views", "2", "--ttt-steps", "1",
                     "--threads", "1", "--out-dir", str(tmp_path)])
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["table"] == out["table"] and out["table"]["sides <= 10"]["tests"][2] == len(saved["predictions"])
    assert out["counts"] == {"larger than the canvas": 1, "adapted": 3} and out["n_tasks"] == 4
    text = capsys.readouterr().out
    assert "1 steps of test-time training" in text and "1 of 4 tasks larger than the canvas" in text
    with pytest.raises(SystemExit, match="no such folder"):
        etrm.main(["--checkpoint", str(run_folder), "--eval-data", str(folder), "--out-dir", str(tmp_path / "none")])
    out = etrm.main(["--solve", str(folder), "--checkpoint", str(run_folder), "--ttt-steps", "1", "--threads", "1",
                     "--out-dir", str(tmp_path)])
    assert out["tasks"] == 4 and "1 of 4 tasks larger than the canvas" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "said"), [
    (["--encoder", "cells", "--pooling", "mean"], "--attend-cells: needs --pooling none"),
    (["--encoder", "cells", "--no-attend-cells", "--relations"], "--relations: need --attend-cells"),
    (["--encoder", "cells", "--halting", "learned"], "--halting learned: not with --bptt"),
    (["--encoder", "cells", "--augment", "translate"], "--augment translate: not with"),
    (["--encoder", "cells", "--cache-context"], "--cache-context: does nothing with --bptt"),
    (["--synthetic", "0.7", "--re-arc", "0.7"], "more than all queries"),
    (["--ttt-steps", "-1"], "--ttt-steps"), (["--schedule", "never"], "--schedule")])
def test_flags_that_do_not_go_together_are_one_line(flags, said, capsys):
    with pytest.raises(SystemExit):
        etrm.parse_args(flags)
    assert said in capsys.readouterr().err


def test_what_is_kept_is_small_and_is_used_and_evaluated_like_the_run(run_folder, tmp_path):
    etrm.keep(str(run_folder / "last.pt"), str(tmp_path / "best.pt"))
    assert (tmp_path / "best.pt").stat().st_size < 0.3 * (run_folder / "best.pt").stat().st_size
    (ours, _), (kept, saved) = etrm.load_model(str(run_folder / "last.pt")), etrm.load_model(str(tmp_path))
    a, b = (etrm.answer(model, etrm.queries_of(small_tasks()), (6,), saved["args"]) for model in (ours, kept))
    assert np.abs(a.loss - b.loss).max() < 0.1 and len(saved["seen"]) > 4
    assert len(etrm.load(str(tmp_path))(small_tasks()[0], views=2)) == 2
    with pytest.raises(SystemExit):
        etrm.main(["--resume", str(tmp_path / "best.pt")])
