"""evaluate_checkpoints.py: figures and tables of addition models, other experiments, bad checkpoints among good ones."""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import addition_train as A
import collatz
import evaluate_checkpoints as E

ROOT = Path(__file__).parent.parent
COLLATZ = ROOT / "logs" / "kept" / "collatz" / "window10-s0"
SMALL = ["--batch-size", "32", "--curriculum", "", "--warmup", "0.1", "--compile", "off", "--device", "cpu", "--val-size", "50",
         "--test-size", "100", "--eval-every", "200", "--optimizer", "adamw"]
FEW = ["--n", "100", "--split-seeds", "41,100", "--device", "cpu"]


def train(folder, *flags):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(A, "draw_pictures", lambda folder: [])
        A.main([*SMALL, "--out-dir", str(folder), *flags])


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    """About half of the pairs right at the end."""
    folder = tmp_path_factory.mktemp("evaluate") / "rotary"
    train(folder, "--preset", "rope196", "--steps", "600", "--seeds", "1", "--lr", "0.03", "--beta2", "0.99", "--weight-decay", "0.01",
          "--decay-until", "0", "--entropy-bonus", "0", "--schedule", "cosine")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as the 456-parameter project writes it: no script, the model under other names."""
    path = tmp_path_factory.mktemp("evaluate") / "best_456p_s43.pt"
    config = A.make_config(vars(A.parse_args(["--preset", "ref456"])), "")
    torch.manual_seed(43)
    fields = ("d_model", "d_ff", "pos_rank", "qkv_rank", "attn_out_rank", "ffn_rank", "use_rmsnorm", "tie_qkv")
    torch.save({"model_state": A.LearnedAdder(config).state_dict(), "model_config": {
        "n_layer": 1, "n_head": 1, "max_seq_len": 33, "vocab_size": 14, "dropout": 0.0, **{f: getattr(config, f) for f in fields}},
        "step": 34_000}, path)
    return path


@pytest.fixture(scope="module")
def figures(rotary):
    """Of the half-trained model, teacher-forced: 300 pairs for each of two split seeds."""
    return E.evaluate(str(rotary / "best_s1.pt"), E.parse_args([*FEW, "--n", "300", "x"]))


def test_figures_are_those_of_training_and_tables_are_counts(rotary, figures):
    out, _ = figures
    want = A.evaluate_checkpoint(rotary / "best_s1.pt", argparse.Namespace(n=300, split_seeds=[41, 100]))
    timing = ("seconds", "cpu_seconds", "additions_per_cpu_second")
    assert {k: v for k, v in want.items() if k not in timing} == {k: out[k] for k in want if k not in timing}
    assert list(out["by_digits"]) == [str(k) for k in range(1, 11)] and {n for _, n in out["by_digits"].values()} == {30}
    assert list(out["by_chain"]) == [str(k) for k in range(11)] and {n for _, n in out["by_chain"].values()} == {30}
    assert len(out["by_lengths"]) == 10 and all(len(row) == 10 and {n for _, n in row} == {6} for row in out["by_lengths"])
    assert out["edge_cases"][1] == len(E.EDGE_CASES) and 0 < out["edge_cases"][0] < len(E.EDGE_CASES)
    assert out["by_digits"]["1"][0] > out["by_digits"]["10"][0]


def test_tables_are_those_of_their_pairs(rotary, figures):
    module, _ = A.load_model(rotary / "best_s1.pt")

    def right(pairs):
        got, target = A.answers(module, pairs, "tf")
        return [int((got == target).all(1).sum()), len(target)]
    out = figures[0]
    assert list(out["by_digits"].values()) == [right(A.uniform_pairs([E.TABLES, 0, k], 30, k)) for k in range(1, 11)]
    assert list(out["by_chain"].values()) == [right(E.chained_pairs([E.TABLES, 3, k], 30, k)) for k in range(11)]
    assert out["by_lengths"] == [[right(E.pairs_of_lengths([E.TABLES, 2, i, j], 6, i, j)) for j in range(1, 11)] for i in range(1, 11)]


def test_edge_cases_by_hand(rotary, figures):
    module, _ = A.load_model(rotary / "best_s1.pt")
    pairs = tuple(np.concatenate([A.digits_of(np.array([x]), 10) for x in column]) for column in zip(*E.EDGE_CASES, strict=True))
    add = A.load(rotary / "best_s1.pt")
    assert figures[0]["edge_cases"][0] == sum(add(a, b) == a + b for a, b in E.EDGE_CASES)
    assert figures[0]["edge_cases"][0] == (np.equal(*A.answers(module, pairs, "ar"))).all(1).sum()


def test_greedy_decoding_gives_the_counts_of_one_pass(rotary, figures):
    ar, _ = E.evaluate(str(rotary / "best_s1.pt"), E.parse_args([*FEW, "--n", "300", "--mode", "ar", "x"]))
    for key in ("exact", "splits", "failures", "by_digits", "by_chain", "by_lengths", "edge_cases"):
        assert ar[key] == figures[0][key], key
    assert 0 < ar["exact"][0] < ar["exact"][1] == 600 and (ar["mode"], figures[0]["mode"]) == ("ar", "tf")


def test_the_report_has_the_tables(figures):
    out, text = figures
    lines = text.splitlines()
    assert "196 parameters, rotary, step 600, mode tf" in lines[0]
    assert f"({out['exact'][0]}/600, 95%" in lines[1] and f"edge cases {out['edge_cases'][0]}/{len(E.EDGE_CASES)}" in lines[1]
    assert lines[2].endswith(", ".join(f"{s}: {n - k}" for s, (k, n) in out["splits"].items()))

    def cells(title):
        line, = (x for x in lines if title in x)
        return [float(x) for x in line.split(title)[1].split("(n =")[0].split()[-11 if "chain" in title or "position" in title else -10:]]
    for title, counts in (("% by position", out["positions"]), ("% by longest carry chain", out["by_chain"].values()),
                          ("% by digits", out["by_digits"].values()), ("% a of 1 digit,", out["by_lengths"][0]),
                          ("% a of 10 digits,", out["by_lengths"][9])):
        assert cells(title) == pytest.approx([100 * k / n for k, n in counts], abs=0.006)
    assert len([x for x in lines if x.startswith("  % a of")]) == 10
    a, b, c, d = out["failures"][0]
    assert f"  {a} + {b} = {c}, got {d}" in lines and len(out["failures"]) == 10


def test_an_answer_that_is_no_number_is_said_so(published):
    out, text = E.evaluate(str(published), E.parse_args([*FEW, "x"]))
    out["failures"] = [[1, 2, 3, None]]
    assert "1 + 2 = 3, got no number" in E.format_addition(out) and "0.0% (0/200" in text


def test_n_and_split_seeds_are_honoured(rotary, capsys):
    out = E.main([str(rotary / "best_s1.pt"), "--n", "70", "--split-seeds", "5-7,9", "--device", "cpu"])[str(rotary / "best_s1.pt")]
    assert {k: n for k, (_, n) in out["splits"].items()} == {"5": 70, "6": 70, "7": 70, "9": 70} and out["exact"][1] == 280
    assert out["by_chain"]["3"][1] == 7 and out["by_lengths"][0][0][1] == 1
    assert "5: " in capsys.readouterr().out
    one = E.main([str(rotary / "best_s1.pt"), "--n", "1", "--split-seeds", "5"])[str(rotary / "best_s1.pt")]
    assert one["exact"][1] == 1 and one["by_digits"]["1"][1] == one["by_lengths"][9][9][1] == 1


def test_the_splits_are_the_originals_by_default():
    args = E.parse_args(["x"])
    assert args.split_seeds == [41, 100, 200, 300, 400, 500, 999, 1234, 7777, 31415] and args.n == 10_000 and args.mode == "tf"


def test_pairs_of_the_tables_are_not_those_of_training_validation_or_test():
    def keys(a, b):
        return {row.tobytes() for row in np.concatenate([a, b], 1)}
    tables = [keys(*A.uniform_pairs([E.TABLES, 0, 10], 2000)), keys(*E.chained_pairs([E.TABLES, 1, 3], 2000, 3)),
              keys(*E.pairs_of_lengths([E.TABLES, 2, 10, 10], 2000, 10, 10))]
    others = [keys(*A.uniform_pairs([s], 2000)) for s in (A.VALIDATION, A.TEST)]
    args = A.parse_args(["--seeds", "0-7", "--full-length", "1", "--batch-size", "8", "--preset", "rope196", "--device", "cpu"])
    tokens = A.batches(0, args)[0].numpy().swapaxes(-1, -2).astype(np.int8).reshape(-1, 34)
    others.append(keys(tokens[:, 1:11], tokens[:, 13:23]))
    assert sum(map(len, tables + others)) == len(set().union(*tables, *others)) == 10_000 + 8 * A.CHUNK * 8


# ---- which script

def test_a_published_checkpoint_is_known_by_its_keys(published):
    assert E.script_of(str(published)) == "addition_train.py"
    out = E.main([str(published), *FEW])[str(published)]
    assert (out["n_params"], out["step"], out["script"], out["config"]["tie_qkv"]) == (456, 34_000, "addition_train.py", "shareA_tieKV")


def test_a_run_folder_stands_for_its_last_pt(rotary):
    whole, one = (E.main([str(p), *FEW])[str(p)] for p in (rotary, rotary / "best_s1.pt"))
    assert whole["seed"] == 1 and whole["exact"] == one["exact"] and whole["by_lengths"] == one["by_lengths"]


def same(a, b):
    """Equal figures; NaN equals NaN, tuples lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("path", [COLLATZ / "best.pt", COLLATZ], ids=["file", "folder"])
def test_a_collatz_checkpoint_goes_to_its_own_script(path, tmp_path, monkeypatch, capsys):
    asked = []

    def evaluate_checkpoint(path, args):
        asked.append((path, args.device))
        return {"script": "collatz.py", "pass_rate": 0.5, "rows": [1, 2], "none": None}
    monkeypatch.setattr(collatz, "evaluate_checkpoint", evaluate_checkpoint)
    out = E.main([str(path), "--device", "cpu", "--output", str(tmp_path / "out.json")])
    assert asked == [(str(path), "cpu")] and out == {str(path): evaluate_checkpoint(str(path), argparse.Namespace(device="cpu"))}
    assert capsys.readouterr().out.splitlines() == [str(path), "  script collatz.py", "  pass_rate 0.5"]
    assert json.loads((tmp_path / "out.json").read_text())["checkpoints"] == out


def test_the_kept_collatz_checkpoint_has_the_figures_of_its_own_script(tmp_path, monkeypatch):
    real, numbers = collatz.make_exam, collatz.eval_numbers(rows=100)

    def smaller(args):  # the real sets take seconds
        args.eval_trajectories = args.validation_trajectories = 2
        args.validation_rows = 10
        return real(args)
    monkeypatch.setattr(collatz, "make_exam", smaller)
    monkeypatch.setattr(collatz, "eval_numbers", lambda: numbers)
    path = str(COLLATZ / "best.pt")
    out = E.main([path, "--device", "cpu", "--output", str(tmp_path / "out.json")])[path]
    assert same(out, collatz.evaluate_checkpoint(path, argparse.Namespace(device="cpu")))
    assert out["script"] == "collatz.py" and out["n_params"] > 0 and out["pass_rate"] > 0.9
    assert json.loads((tmp_path / "out.json").read_text())["checkpoints"][path]["pass_rate"] == out["pass_rate"]


@pytest.mark.slow
def test_the_kept_collatz_checkpoint_has_its_recorded_figures():
    out = E.main([str(COLLATZ / "best.pt"), "--device", "cpu"])[str(COLLATZ / "best.pt")]
    summary = json.loads((COLLATZ / "summary.json").read_text())
    assert out["violations_total"] == summary["violations_total"] and out["pass_rate"] == pytest.approx(summary["pass_rate"])


def test_every_script_of_the_list_can_evaluate():
    import importlib
    for script in E.SCRIPTS:
        module = importlib.import_module(script.removesuffix(".py"))
        assert module.SCRIPT == script and callable(module.evaluate_checkpoint)


# ---- bad input

def bad_exit(argv, capsys):
    with pytest.raises(SystemExit) as e:
        E.main(argv)
    assert e.value.code not in (0, None)
    message = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert "error: " in message and "\n" not in message
    return message


def altered(source, path, **change):
    saved = {**torch.load(source, weights_only=True), **change}
    torch.save({k: v for k, v in saved.items() if v is not None}, path)
    return path


def test_one_bad_checkpoint_does_not_stop_the_others(rotary, published, tmp_path, capsys):
    good, bad = str(rotary / "best_s1.pt"), str(tmp_path / "bad.pt")
    Path(bad).write_bytes(Path(good).read_bytes()[:1000])
    with pytest.raises(SystemExit) as e:
        E.main([bad, good, str(tmp_path / "missing.pt"), str(published), *FEW, "--output", str(tmp_path / "out.json")])
    said = capsys.readouterr()
    assert e.value.code == 1 and said.err.count("\n") == 2 and said.err.count("evaluate_checkpoints.py: error: ") == 2
    assert "bad.pt" in said.err and "missing.pt: no such checkpoint" in said.err and "Traceback" not in said.err + said.out
    out = json.loads((tmp_path / "out.json").read_text())
    assert out.keys() >= {"command", "commit", "checkpoints"} and list(out["checkpoints"]) == [bad, good, str(tmp_path / "missing.pt"), str(published)]
    assert out["checkpoints"][bad].keys() == {"error"} and "not a readable checkpoint" in out["checkpoints"][bad]["error"]
    assert out["checkpoints"][good]["exact"][1] == 200 and out["checkpoints"][good]["config"]["family"] == "rotary"
    assert out["checkpoints"][str(published)]["n_params"] == 456 and out["checkpoints"][good]["seconds"] > 0


ODD = [{"step": None}, {"step": torch.ones(2)}, {"step": "x"}, {"seed": torch.ones(2)}, {"args": None}, {"args": 5}, {"format": torch.ones(2)},
       {"config": {"family": "rotary"}}, {"config": {"family": "rotary", "d_model": 4, "d_ff": 6, "n_head": torch.ones(2)}},
       {"population": 3}, {"model": {3: 4}}, {"model": None}]


@pytest.mark.parametrize("source, changes", [("addition", ODD), ("collatz", [{"config": None}, {"args": None}, {"args": 5}, {"step": None}])],
                         ids=["addition", "collatz"])
def test_no_field_that_is_odd_or_missing_stops_the_others(rotary, tmp_path, capsys, source, changes):
    good = str(rotary / "best_s1.pt")
    bad = [str(altered(good if source == "addition" else COLLATZ / "best.pt", tmp_path / f"bad{i}.pt", **c)) for i, c in enumerate(changes)]
    with pytest.raises(SystemExit) as e:
        E.main([*bad, good, *FEW, "--n", "5", "--output", str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    errors = [x["error"] for x in out.values() if "error" in x]
    assert e.value.code == 1 and out[good]["exact"][1] == 10 and capsys.readouterr().err.count("\n") == len(errors) > 1
    assert all("bad" in x and x.isprintable() for x in errors) and (source == "addition" or len(errors) == len(bad))


@pytest.mark.parametrize("change, named", [({"script": "train_everything.py"}, "train_everything.py"), ({"script": "os.py"}, "os.py"),
                                           ({"script": "../addition_train.py"}, "addition_train.py"), ({"script": None}, "no field 'script'"),
                                           ({"script": 5}, "no field 'script'"), ({"script": "x" * 9999}, "xxx")], ids=lambda x: str(x)[:40])
def test_a_checkpoint_of_an_unknown_script_is_refused(rotary, tmp_path, capsys, change, named):
    path = altered(rotary / "best_s1.pt", tmp_path / "bad.pt", **change)
    message = bad_exit([str(path), *FEW], capsys)
    assert named in message and len(message) < len(str(path)) + 250


def test_folders_and_files_without_a_checkpoint_are_refused(tmp_path, capsys):
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("", "empty.pt", "missing"):
        assert "checkpoint" in bad_exit([str(tmp_path / name), *FEW], capsys)


def test_an_addition_checkpoint_over_ten_megabytes_is_refused(rotary, tmp_path, capsys):
    path = altered(rotary / "best_s1.pt", tmp_path / "big.pt", extra=torch.zeros(3_000_000))
    assert "12 MB" in bad_exit([str(path), *FEW], capsys)


def test_weights_that_are_not_finite_are_refused(rotary, tmp_path, capsys):
    state = torch.load(rotary / "best_s1.pt", weights_only=True)["model"]
    state["up"][0, 0] = math.nan
    assert "up is not finite" in bad_exit([str(altered(rotary / "best_s1.pt", tmp_path / "nan.pt", model=state)), *FEW], capsys)


@pytest.mark.parametrize("flags, named", [([], "CKPT"), (["--n", "0", "X"], "--n"), (["--n", "-1", "X"], "--n"), (["--split-seeds", "", "X"], "--split-seeds"),
                                          (["--split-seeds", "41,41", "X"], "twice"), (["--mode", "beam", "X"], "--mode"), (["--device", "gpu", "X"], "--device gpu"),
                                          (["--threads", "-1", "X"], "--threads"), (["--output", "nowhere/out.json", "X"], "nowhere")], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_flags_end_in_one_line(rotary, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    assert named in bad_exit(["--n", "5", "--split-seeds", "41", *(str(rotary / "best_s1.pt") if f == "X" else f for f in flags)], capsys)
    assert list(tmp_path.iterdir()) == []
