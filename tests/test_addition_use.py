"""addition_train.py: checkpoints, load, --add, export; bad input is one line and an exit code."""
import argparse
import ast
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import addition_train as A
from common.run import UserError

ROOT = Path(__file__).parent.parent
KEPT = sorted(f.parent for f in (Path(__file__).parent.parent / "logs/kept/addition_train").glob("*/summary.json")
              if json.loads(f.read_text())["n_perfect"] and list(f.parent.glob("best_s*.pt")))
COLLATZ = ROOT / "logs" / "kept" / "collatz" / "window10-s0"
SMALL = ["--steps", "60", "--batch-size", "16", "--curriculum", "", "--warmup", "0.1", "--compile", "off",
         "--device", "cpu", "--val-size", "50", "--test-size", "100", "--eval-every", "20"]
LEARNED_CONFIG = {"n_layer": 1, "d_model": 7, "n_head": 1, "d_ff": 14, "dropout": 0.0, "max_seq_len": 33, "vocab_size": 14,
                  "pos_rank": 3, "qkv_rank": 3, "attn_out_rank": 2, "ffn_rank": 3, "use_rmsnorm": True,
                  "tie_qkv": "shareA_tieKV"}  # as published


def train(folder, *flags):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(A, "draw_pictures", lambda folder: [])
        return A.main([*SMALL, "--optimizer", "adamw", "--out-dir", str(folder), *flags])


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    """A third to a half of the pairs right."""
    folder = tmp_path_factory.mktemp("use") / "rotary"
    train(folder, "--preset", "rope196", "--steps", "600", "--batch-size", "32", "--seeds", "0-1", "--lr", "0.03", "--beta2",
          "0.99", "--weight-decay", "0.01", "--eval-every", "200", "--decay-until", "0", "--entropy-bonus", "0", "--schedule", "cosine")
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("use") / "learned"
    train(folder, "--preset", "ref456", "--steps", "20", "--seeds", "3")
    return folder


@pytest.fixture(scope="module")
def best(rotary):
    return max(sorted(rotary.glob("best_s*.pt")), key=lambda f: torch.load(f, weights_only=True)["val_exact"])


def published(learned, path, **change):
    """A file as the 456-parameter project writes it."""
    state = torch.load(learned / "best_s3.pt", weights_only=True)["model"]
    torch.save({"model_state": state, "model_config": LEARNED_CONFIG, "train_config": {"seed": 43}, "step": 34_000,
                "val_exact": 1.0, "params": 456, **change}, path)
    return path


def tamper(source, path, **change):
    saved = torch.load(source, weights_only=True)
    for key, value in change.items():
        if value is None:
            del saved[key]
        elif isinstance(saved.get(key), dict) and isinstance(value, dict):
            saved[key] = {k: v for k, v in {**saved[key], **value}.items() if v is not None}
        else:
            saved[key] = value
    torch.save(saved, path)
    return path


def refusal(path):
    """The one line with which a checkpoint is refused, the same by load and on the command line."""
    with pytest.raises(UserError) as e:
        A.load(path)
    message = str(e.value)
    assert str(path) in message and message.isprintable() and len(message) < len(str(path)) + 300
    for use in (["--add", "1+2"], []):
        with pytest.raises(SystemExit) as e:
            A.main([*use, "--checkpoint", str(path)])
        assert e.value.code == f"addition_train.py: error: {message}"
    return message


# ---- checkpoints

def test_a_best_checkpoint_is_one_model_of_plain_types(best):
    saved = torch.load(best, weights_only=True)
    assert (saved["script"], saved["format"], f"best_s{saved['seed']}.pt") == ("addition_train.py", A.FORMAT, best.name)
    assert saved["config"]["family"] == "rotary" and saved["args"]["lr"] == 0.03 and 0 < saved["val_exact"] <= 1
    assert sum(x.numel() for x in saved["model"].values()) == 196 and best.stat().st_size < 20_000


def test_a_run_folder_gives_the_seed_with_the_best_validation(rotary, best):
    for path in (rotary, str(rotary), rotary / "last.pt"):
        module, saved = A.load_model(path)
        assert f"best_s{saved['seed']}.pt" == best.name and saved["step"] == torch.load(best, weights_only=True)["step"]
        for name, x in A.load_model(best)[0].state_dict().items():
            assert torch.equal(x, module.state_dict()[name]), name


def test_a_run_folder_of_the_learned_family_loads_with_its_tied_head(learned):
    module, saved = A.load_model(learned)
    assert saved["seed"] == 3 and torch.equal(module.lm_head.weight, module.token_emb.weight)
    for name, x in A.load_model(learned / "best_s3.pt")[0].state_dict().items():
        assert torch.equal(x, module.state_dict()[name]), name


def test_published_checkpoints_load(learned, tmp_path):
    module, saved = A.load_model(published(learned, tmp_path / "best_456p_s43.pt"))
    own, _ = A.load_model(learned / "best_s3.pt")
    idx = torch.randint(0, 10, (5, 33), generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(idx), own(idx)) and saved["step"] == 34_000 and module.lm_head.weight is module.token_emb.weight
    out = A.evaluate_checkpoint(tmp_path / "best_456p_s43.pt", argparse.Namespace(n=20, split_seeds=[41]))
    assert out["n_params"] == 456 and out["step"] == 34_000 and out["exact"][1] == 20


def test_published_checkpoints_of_older_fields_load(tmp_path):
    config = A.make_config({"family": "learned", "d_model": 7, "d_ff": 14, "pos_rank": 3, "qkv_rank": 3, "attn_out_rank": 3,
                            "ffn_rank": 3}, "")
    old = {k: v for k, v in LEARNED_CONFIG.items() if k not in ("use_rmsnorm", "tie_qkv", "n_head")} | {"attn_out_rank": 3}
    torch.save({"model_state": A.LearnedAdder(config).state_dict(), "model_config": old}, tmp_path / "best_512params.pt")
    assert A.load_model(tmp_path / "best_512params.pt")[0].config == config


def test_tensors_saved_from_cuda_load_on_a_cpu(learned, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    published(learned, tmp_path / "cuda.pt")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):  # the file is what it should be
            torch.load(tmp_path / "cuda.pt", weights_only=True)
    assert A.load_model(tmp_path / "cuda.pt")[0].token_emb.weight.device.type == "cpu"


def test_loading_leaves_the_global_stream_alone(best):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    A.load(best)(1, 2)
    assert torch.equal(before, torch.get_rng_state())


# ---- load, --add

def test_load_adds_as_the_module_does(best):
    add, (module, _) = A.load(best), A.load_model(best)
    pairs = tuple(np.concatenate(x) for x in zip(A.uniform_pairs([1], 20, 1), A.uniform_pairs([1], 20), strict=True))
    got, _ = A.answers(module, pairs, "tf")
    a, b = ([A.number(row) for row in x] for x in pairs)
    sums = [add(x, y) for x, y in zip(a, b, strict=True)]
    right = [s == x + y for s, x, y in zip(sums, a, b, strict=True)]
    assert all(isinstance(s, int) and 0 <= s < 10**11 for s in sums) and 0 < sum(right) < 40
    assert [A.number(row) == s for row, s, ok in zip(got, sums, right, strict=True) if ok] == [True] * sum(right)


def test_load_takes_numpy_integers(best):
    add = A.load(best)
    for kind in (np.int64, np.uint64, np.int16, np.uint8):
        assert add(kind(7), kind(9)) == add(7, 9)
    assert isinstance(add(A.LIMIT - 1, A.LIMIT - 1), int)


@pytest.mark.parametrize("bad", [-1, 10**10, 10**30, 10**5000, True, np.True_, 1.0, np.float32(3), "5", None, [1], np.int64(-4),
                                 np.array([1]), math.nan], ids=lambda x: f"{type(x).__name__} {'huge' if isinstance(x, int) and x > 10**40 else x}")
def test_load_refuses_what_is_no_operand(best, bad):
    add = A.load(best)
    for name, pair in (("a", (bad, 1)), ("b", (1, bad))):
        with pytest.raises(UserError, match=rf"^{name}: ") as e:
            add(*pair)
        assert "\n" not in str(e.value) and len(str(e.value)) < 120


def test_an_answer_with_a_token_that_is_no_digit_is_none(learned, tmp_path, capsys):
    state = torch.load(learned / "best_s3.pt", weights_only=True)["model"]
    state["ln_f.weight"], state["token_emb.weight"] = torch.zeros(7), torch.zeros(14, 7)
    state["token_emb.weight"][:, 0] = torch.arange(14.0)                     # token 13 is the likeliest where x[0] > 0
    state["ln_f.weight"][0] = 1
    state["lm_head.weight"] = state["token_emb.weight"]
    path = tamper(learned / "best_s3.pt", tmp_path / "eos.pt", model=state)
    module, _ = A.load_model(path)
    assert A.greedy(module, torch.from_numpy(A.encode("learned", *A.uniform_pairs([1], 1))[0][:, :22]).long(), 1).item() == A.EOS
    assert A.load(path)(1, 2) is None
    assert A.main(["--add", "1+2", "--checkpoint", str(path)])["answer"] is None
    assert "no number, wrong: it is 3" in capsys.readouterr().out


def test_add_answers_one_sum_digit_by_digit(best, capsys):
    out = A.main(["--add", " 1234567890 + 9876543210 ", "--checkpoint", str(best)])
    lines = capsys.readouterr().out.splitlines()
    assert out["answer"] == A.load(best)(1234567890, 9876543210) and (out["a"], out["b"]) == (1234567890, 9876543210)
    said = [re.fullmatch(r"digit +(\d+): +(\d+)  probability (\d\.\d{4})", x).groups() for x in lines[:-1]]
    assert [int(k) for k, _, _ in said] == list(range(11)) and all(0.1 < float(p) <= 1 for _, _, p in said)
    assert int("".join(d for _, d, _ in said[::-1])) == out["answer"]
    assert lines[-1].startswith(f"1234567890 + 9876543210 = {out['answer']}, ") and out["right"] == (out["answer"] == 11111111100)


def test_add_says_right_and_wrong(best, capsys, monkeypatch):
    add = A.load(best)
    pairs = [(a, b) for a in range(10) for b in range(10)] + [(10**9 + 7 * k, 9 * 10**9 + k) for k in range(50)]
    for right in (True, False):
        a, b = next((a, b) for a, b in pairs if (add(a, b) == a + b) == right)
        assert A.main(["--add", f"{a}+{b}", "--checkpoint", str(best)])["right"] is right
        assert capsys.readouterr().out.splitlines()[-1].endswith("right" if right else f"wrong: it is {a + b}")


@pytest.mark.parametrize("text, named", [
    ("1", "two whole numbers"), ("1+", "two whole numbers"), ("a+b", "two whole numbers"), ("1+2+3", "two whole numbers"),
    ("1.5+2", "two whole numbers"), ("1e3+4", "two whole numbers"), ("1-2", "two whole numbers"), (" -1+2", "two whole numbers"),
    ("10000000000+1", "not in 0..9999999999"), ("1+" + 39 * "9", "not in 0..9999999999"), ("1+" + 5000 * "9", "two whole numbers")])
def test_add_refuses_what_is_no_sum(best, text, named, capsys):
    with pytest.raises(SystemExit, match=named) as e:
        A.main(["--add", text, "--checkpoint", str(best)])
    assert str(e.value).startswith("addition_train.py: error: --add") and "\n" not in str(e.value) and len(str(e.value)) < 200
    assert capsys.readouterr().out == ""


def test_checkpoint_alone_is_evaluated_on_the_original_pairs(best, capsys):
    out = A.main(["--checkpoint", str(best)])
    assert out["exact"][1] == 100_000 and list(out["splits"]) == [str(s) for s in A.SPLIT_SEEDS]
    right, _ = A.answers(A.load_model(best)[0], A.split_pairs(7777, 10_000), "tf")
    assert out["splits"]["7777"] == [int((right == A.encode("rotary", *A.split_pairs(7777, 10_000))[1]).all(1).sum()), 10_000]
    assert f"({out['exact'][0]}/100000, 95%" in capsys.readouterr().out


def figures(path, **settings):
    return A.evaluate_checkpoint(path, argparse.Namespace(**{"n": 300, "split_seeds": [41, 100], **settings}))


def test_figures_of_a_checkpoint_fit_together(best):
    out = figures(best)
    assert out["exact"] == [sum(k for k, _ in out["splits"].values()), 600] and 0 < out["exact"][0] < 600
    assert out["exact_rate"] == out["exact"][0] / 600 and {n for _, n in out["positions"]} == {600}
    assert out["token_accuracy"] == pytest.approx(sum(k for k, _ in out["positions"]) / 6600)
    assert (out["n_params"], out["mode"]) == (196, "tf") and json.loads(json.dumps(out)) == out
    assert len(out["failures"]) == 10
    for a, b, c, d in out["failures"]:
        assert c == a + b and d != c and d == A.load(best)(a, b)


def test_one_pass_and_greedy_decoding_give_equal_counts(best):
    tf, ar = figures(best), figures(best, mode="ar")
    assert tf["exact"] == ar["exact"] and tf["splits"] == ar["splits"] and tf["failures"] == ar["failures"]
    assert ar["mode"] == "ar" and tf["positions"][0] == ar["positions"][0]   # later digits may follow a wrong one


# ---- what was trained and kept

@pytest.mark.skipif(not KEPT, reason="no kept runs of addition_train.py")
@pytest.mark.parametrize("folder", KEPT, ids=lambda f: f.name)
def test_the_best_kept_model_adds(folder):
    path = max(folder.glob("best_s*.pt"), key=lambda f: torch.load(f, weights_only=True)["val_exact"])
    model, _ = A.load_model(path)
    pairs = A.split_pairs(20_26, 3000)
    tf, ar = ((np.equal(*A.answers(model, pairs, mode))).all(1) for mode in ("tf", "ar"))
    assert tf[:2000].mean() >= 0.99 and (tf == ar).all()
    assert A.load(path)(1234567890, 9876543210) == 11111111100


# ---- export

PAIRS = [(0, 0), (1, 9), (5, 5), (9999999999, 1), (9999999999, 9999999999), (1234567890, 9876543210), (7, 0), (0, 30),
         *((37 * 7**k % A.LIMIT, 91 * 11**k % A.LIMIT) for k in range(12))]


@pytest.fixture(scope="module")
def exported(rotary, learned, tmp_path_factory):
    """Both families exported, and what a fresh interpreter says of them: {name: {metadata, sums}}."""
    folder = tmp_path_factory.mktemp("submission")
    state = torch.load(learned / "best_s3.pt", weights_only=True)["model"]   # says the same to all sums; after noise it does not
    noise = torch.Generator().manual_seed(0)
    state = {name: x + torch.randn(x.shape, generator=noise) for name, x in state.items()}
    state["lm_head.weight"] = state["token_emb.weight"]
    checkpoints = {"rotary": rotary / "best_s1.pt", "learned": tamper(learned / "best_s3.pt", folder / "noisy.pt", model=state)}
    for name, path in checkpoints.items():
        A.main(["--export-submission", str(folder / f"{name}.py"), "--checkpoint", str(path)])
    code = """
import importlib.util, json, sys
out = {}
for name in ("rotary", "learned"):
    spec = importlib.util.spec_from_file_location("submission_" + name, name + ".py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model, metadata = module.build_model()
    out[name] = {"metadata": metadata, "sums": [module.add(model, a, b) for a, b in json.loads(sys.argv[1])],
                 "params": sum(p.numel() for p in model.parameters())}
assert not {"addition_train", "common"} & set(sys.modules)
print(json.dumps(out))
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(PAIRS)], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, checkpoints, json.loads(done.stdout)


@pytest.mark.parametrize("name, params", [("rotary", 196), ("learned", 456)])
def test_the_exported_file_gives_the_answers_of_the_checkpoint(exported, name, params):
    _, checkpoints, said = exported
    add = A.load(checkpoints[name])
    sums = [add(a, b) for a, b in PAIRS]
    assert said[name]["sums"] == [-1 if s is None else s for s in sums] and len(set(sums)) > 4
    metadata = said[name]["metadata"]
    assert metadata["params"] == params == said[name]["params"]
    assert metadata.keys() == {"name", "author", "params", "architecture", "tricks"} and isinstance(metadata["tricks"], list)
    assert name == "learned" or any(s == a + b for s, (a, b) in zip(sums, PAIRS, strict=True))


@pytest.mark.parametrize("name", ["rotary", "learned"])
def test_the_exported_file_is_torch_and_plain_numbers(exported, name):
    text = (exported[0] / f"{name}.py").read_text()
    tree = ast.parse(text)
    imports = {a.name for x in ast.walk(tree) if isinstance(x, ast.Import) for a in x.names}
    imports |= {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    assert {x.split(".")[0] if x.startswith("torch") else x for x in imports} <= {"math", "dataclasses", "collections.abc", "functools", "torch"}
    functions = {x.name: [a.arg for a in x.args.args] for x in tree.body if isinstance(x, ast.FunctionDef)}
    assert functions["build_model"] == [] and functions["add"] == ["model", "a", "b"]
    called = {x.func.id for x in ast.walk(tree) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)}
    assert "greedy" in called and not called & {"eval", "exec", "open", "__import__", "compile"}
    assert "pickle" not in text and "base64" not in text


def metadata_of(path):
    """build_model()'s metadata, in this process: only after a look at what the file would run."""
    space = {"__name__": "submission"}
    sys.modules["submission"] = type(sys)("submission")
    try:
        exec(compile(path.read_text(), str(path), "exec"), space)
        return space["build_model"]()[1]
    finally:
        del sys.modules["submission"]


def test_a_path_with_quotes_exports_to_a_file_that_runs(best, tmp_path):
    odd = tmp_path / """a "b" 'c' \\n {d}.pt"""
    odd.write_bytes(best.read_bytes())
    A.main(["--export-submission", str(tmp_path / "out.py"), "--checkpoint", str(odd)])
    assert metadata_of(tmp_path / "out.py")["params"] == 196


def test_a_checkpoint_cannot_put_code_into_the_exported_file(best, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed = '" + str(__import__("os").mkdir("evil")) + "'
    tamper(best, tmp_path / "seed.pt", seed=seed)
    try:
        A.main(["--export-submission", "out.py", "--checkpoint", "seed.pt"])
    except SystemExit as e:
        assert "\n" not in str(e.code)
        return
    metadata_of(tmp_path / "out.py")
    assert not (tmp_path / "evil").exists()


def test_an_export_that_cannot_be_written_is_one_line(best, tmp_path, capsys):
    for target in (tmp_path, tmp_path / "missing" / "out.py"):
        with pytest.raises(SystemExit, match=r"^addition_train\.py: error: ") as e:
            A.main(["--export-submission", str(target), "--checkpoint", str(best)])
        assert "\n" not in str(e.value)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


# ---- bad checkpoints

class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_what_is_no_checkpoint_is_refused(best, tmp_path):
    data = best.read_bytes()
    for name, content, named in (("empty.pt", b"", "not a readable checkpoint"), ("text.pt", b"hello\n", "not a readable checkpoint"),
                                 ("cut.pt", data[:len(data) // 2], "not a readable checkpoint"), ("shorn.pt", data[:-1], "not a readable")):
        (tmp_path / name).write_bytes(content)
        assert named in refusal(tmp_path / name)
    assert "no such checkpoint" in refusal(tmp_path / "missing.pt")
    (tmp_path / "folder").mkdir()
    assert "checkpoint" in refusal(tmp_path / "folder")


def test_over_ten_megabytes_is_refused_unread(best, tmp_path, monkeypatch):
    with open(tmp_path / "big.pt", "wb") as f:
        f.write(best.read_bytes())
        f.truncate(11_000_000)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was read"))
    assert "11 MB" in refusal(tmp_path / "big.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_not_run(best, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({**torch.load(best, weights_only=True), "args": Evil()}, tmp_path / "zip.pt")
    for name in ("pickle.pt", "zip.pt"):
        assert "could run code" in refusal(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)  # the trap is armed
    assert (tmp_path / "evil").is_dir()


@pytest.mark.parametrize("change, named", [
    ({"script": None}, "no field 'script'"), ({"script": "other.py"}, "a checkpoint of 'other.py'"), ({"script": 5}, "no field 'script'"),
    ({"format": 99}, "format"), ({"format": None}, "format"), ({"config": None}, "config"), ({"config": [1]}, "config"), ({"step": None}, "step"),
    ({"model": None}, "no weights"), ({"model": 3}, "no weights"), ({"model": {"wq": None}}, "wq is missing"),
    ({"model": {"extra": torch.ones(2)}}, "extra is not of this model"), ({"model": {"wq": torch.ones(4, 5)}}, "wq is (4, 5)"),
    ({"model": {"wq": "text"}}, "wq is str"), ({"model": {"wq": torch.full((4, 4), math.nan)}}, "wq is not finite"),
    ({"model": {"emb": torch.full((10, 4), math.inf)}}, "emb is not finite"), ({"config": {"d_ff": 7}}, "tensor gate")], ids=lambda x: str(x)[:50])
def test_a_damaged_checkpoint_names_what_is_wrong(best, tmp_path, change, named):
    assert named in refusal(tamper(best, tmp_path / "bad.pt", **change))


@pytest.mark.parametrize("change, named", [
    ({"d_model": 10**9}, "d_model 1000000000"), ({"d_model": 0}, "d_model 0"), ({"d_model": -4}, "d_model -4"), ({"d_ff": 10**9}, "d_ff"),
    ({"d_ff": 0}, "d_ff 0"), ({"head_dim": 10**9}, "head_dim"), ({"head_dim": 3}, "head_dim 3"), ({"period": math.nan}, "period nan"),
    ({"period": math.inf}, "period inf"), ({"period": 0.0}, "period"), ({"family": "unknown"}, "family 'unknown'"), ({"family": None}, "config"),
    ({"family": ["rotary"]}, "family"), ({"d_model": None}, "d_model"), ({"d_model": "4"}, "d_model is '4', expected int"),
    ({"d_model": 4.0}, "d_model is 4.0"), ({"d_model": True}, "d_model is True"), ({"tie": "half"}, "tie"), ({"embedding": 3}, "embedding"),
    ({"tie": "x" * 10**5}, "tie"), ({"tie": "a\nb"}, "tie"), ({"d_model": torch.ones(3)}, "d_model")], ids=lambda x: str(x)[:40])
def test_an_absurd_config_is_named(best, tmp_path, change, named):
    assert named in refusal(tamper(best, tmp_path / "bad.pt", config=change))


@pytest.mark.parametrize("change, named", [
    ({"n_head": 2}, "n_head is 2"), ({"n_layer": 2}, "n_layer is 2"), ({"max_seq_len": 20}, "max_seq_len is 20"),
    ({"max_seq_len": 34}, "max_seq_len is 34"), ({"vocab_size": 12}, "vocab_size is 12"), ({"dropout": 0.1}, "dropout is 0.1"),
    ({"qkv_rank": 8}, "rank of 8"), ({"pos_rank": -1}, "rank"), ({"ffn_rank": 10**9}, "rank of 1000000000"), ({"d_model": 10**9}, "d_model"),
    ({"tie_qkv": "shareB"}, "tie_qkv 'shareB'"), ({"qkv_rank": 0}, "tie_qkv shareA_tieKV"), ({"use_rmsnorm": 1}, "use_rmsnorm is 1"),
    ({"use_rmsnorm": False}, "ln1"), ({"d_ff": None}, "d_ff"), ({"n_head": torch.ones(2)}, "n_head")],
    ids=lambda x: str(x)[:40])
def test_an_absurd_published_config_is_named(learned, tmp_path, change, named):
    config = {k: v for k, v in {**LEARNED_CONFIG, **change}.items() if v is not None}
    path = published(learned, tmp_path / "bad.pt", model_config=config)
    assert named in refusal(path)


def test_an_untied_head_is_refused(learned, tmp_path):
    state = torch.load(learned / "best_s3.pt", weights_only=True)["model"]
    state["lm_head.weight"] = state["lm_head.weight"] + 1e-3
    assert "lm_head.weight is not token_emb.weight" in refusal(published(learned, tmp_path / "bad.pt", model_state=state))


def test_published_weights_that_do_not_fit_are_named(learned, tmp_path):
    state = torch.load(learned / "best_s3.pt", weights_only=True)["model"]
    del state["pos_emb.B"]
    assert "pos_emb.B is missing" in refusal(published(learned, tmp_path / "bad.pt", model_state=state))
    assert "no field 'script'" in refusal(published(learned, tmp_path / "bad.pt", model_config=None))


def test_a_checkpoint_of_another_script_is_named():
    assert "a checkpoint of 'collatz.py', not of 'addition_train.py'" in refusal(COLLATZ / "best.pt")


# ---- bad last.pt

def bad_exit(argv, capsys):
    """The line with which a command ends, and nothing else on stderr."""
    with pytest.raises(SystemExit) as e:
        A.main(argv)
    assert e.value.code not in (0, None)
    message = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert "error: " in message and "\n" not in message and len(message) < 600
    return message


POPULATION = [
    ({"population": None}, ""), ({"population": 5}, ""), ({"population": {"weights": None}}, "weights"),
    ({"population": {"best": None}}, "best"), ({"population": {"weights": torch.zeros(2, 5)}}, "weights"),
    ({"population": {"best": torch.zeros(2, 195)}}, "best"), ({"population": {"best_val": torch.zeros(0, dtype=torch.long)}}, "best_val"),
    ({"population": {"mean": "x"}}, "mean"), ({"population": {"born": torch.zeros(2)}}, "born")]


@pytest.mark.parametrize("change, named", POPULATION, ids=lambda x: str(x)[:50])
def test_a_damaged_population_is_not_resumed(rotary, tmp_path, capsys, change, named):
    message = bad_exit(["--resume", str(tamper(rotary / "last.pt", tmp_path / "last.pt", **change))], capsys)
    assert str(tmp_path / "last.pt") in message and named in message


@pytest.mark.parametrize("change, named", [
    x for x in POPULATION if x[1] in ("", "best", "best_val")] + [({"args": None}, ""), ({"args": {"seeds": None}}, "seeds"), ({"args": {"seeds": []}}, ""),
    ({"population": {"best": torch.full((2, 196), math.nan)}}, "not finite")], ids=lambda x: str(x)[:50])
def test_a_damaged_population_gives_no_model(rotary, tmp_path, change, named):
    refusal(tamper(rotary / "last.pt", tmp_path / "last.pt", **change))


@pytest.mark.parametrize("change", [{"step": None}, {"step": "x"}, {"step": 10**9}, {"logged": None}, {"loss_sum": None}, {"loss_sum": 1},
                                    {"seconds": None}, {"cpu_seconds": "x"}, {"args": None}, {"args": 5}, {"args": {"seeds": None}},
                                    {"config": None}, {"format": 99}, {"args": {"basis_every": 0}}, {"args": {"steps": 60.5}},
                                    {"args": {"curriculum": "zz"}}, {"args": {"preset": "rope1"}}], ids=lambda x: str(x)[:50])
def test_a_damaged_last_pt_is_not_resumed(rotary, tmp_path, capsys, change):
    bad_exit(["--resume", str(tamper(rotary / "last.pt", tmp_path / "last.pt", **change))], capsys)


@pytest.mark.parametrize("change", [{"population": 5}, {"population": {"weights": None}}, {"population": {"weights": torch.zeros(2, 5)}},
                                    {"population": {"weights": torch.full((2, 196), math.nan)}}, {"args": None}, {"args": {"seeds": None}},
                                    {"args": {"seeds": [0, 1, 2]}}], ids=lambda x: str(x)[:50])
def test_a_damaged_last_pt_is_no_start(rotary, tmp_path, capsys, change):
    path = tamper(rotary / "last.pt", tmp_path / "last.pt", **change)
    seeds = "2" if change == {"args": {"seeds": [0, 1, 2]}} else "0-1"
    bad_exit([*SMALL, "--preset", "rope196", "--seeds", seeds, "--steps", "2", "--out-dir", str(tmp_path / "run"), "--init-from", str(path)], capsys)
    assert not (tmp_path / "run").exists()


# ---- bad flags

@pytest.mark.parametrize("flags, named", [
    (["--steps", "0"], "--steps"), (["--steps", "-5"], "--steps"), (["--lr", "0"], "--lr"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--seeds", "1,1"], "twice"), (["--seeds", "40-45,43"], "twice"), (["--seeds", "5-3"], "--seeds"), (["--seeds", ""], "--seeds"),
    (["--seeds", "x"], "--seeds"), (["--seeds", "4294967296"], "--seeds"), (["--seed", "3", "--seeds", "4"], "--seed"),
    (["--curriculum", "3:60"], "longer"), (["--curriculum", "3:20,6:7000"], "longer"), (["--curriculum", "3:20006:7000"], "--curriculum"),
    (["--curriculum", "11:5"], "--curriculum"), (["--curriculum", "0:5"], "--curriculum"), (["--curriculum", "3"], "--curriculum"),
    (["--curriculum", "6:40,3:20"], "--curriculum"), (["--preset", "ref456", "--steps", "5000", "--curriculum", "3:2000,6:7000"], "longer"),
    (["--batch-size", "0"], "--batch-size"), (["--batch-size", "65536", "--seeds", "0-4095"], "GB"), (["--d-model", "1"], "--d-model"),
    (["--d-model", "1000000000"], "--d-model"), (["--d-ff", "0"], "--d-ff"), (["--head-dim", "6"], "head_dim 6"), (["--period", "1"], "--period"),
    (["--preset", "ref", "--qkv-rank", "8"], "rank of 8"), (["--preset", "ref", "--tie-qkv", "shareA"], "needs a qkv_rank"),
    (["--preset", "ref", "--pos-rank", "-1"], "--pos-rank"), (["--preset", "none"], "--preset"), (["--optimizer", "lion"], "--optimizer"),
    (["--preset", "rope196", "--pos-rank", "3"], "--pos-rank: not a flag of the rotary models"),
    (["--preset", "rope196", "--use-rmsnorm"], "--use-rmsnorm: not a flag"), (["--preset", "ref456", "--period", "10"], "--period: not a flag"),
    (["--preset", "ref456", "--tie", "kv+oq"], "--tie: not a flag"), (["--pos-rank", "3", "--head-dim", "8"], "--head-dim: not a flag"),
    (["--preset", "rope196", "--smooth-positions", "1"], "--smooth-positions"), (["--preset", "ref456", "--init", "random"], "--init"), (["--preset", "rope196", "--init", "reference"], "--init"),
    (["--full-length", "1.5"], "--full-length"), (["--random-zeros", "-0.1"], "--random-zeros"), (["--beta2", "1"], "--beta2"),
    (["--warmup", "-1"], "--warmup"), (["--val-size", "0"], "--val-size"), (["--test-size", "0"], "--test-size"), (["--eval-every", "0"], "--eval-every"),
    (["--optimizer", "soap", "--preset", "ref", "--d-model", "1024", "--d-ff", "4096"], ""), (["--precision", "bf16"], "--precision"),
    (["--device", "gpu"], "--device gpu"), (["--out-dir", ""], "--out-dir"), (["--name", "a/b"], "--name"), (["--threads", "-1"], "--threads"),
    (["--add", "1+2"], "--checkpoint"), (["--export-submission", "x.py"], "--checkpoint"), (["--no-such-flag"], "--no-such-flag"),
    (["--add", "1+2", "--export-submission", "x.py", "--checkpoint", "BEST"], "--export-submission"),
    (["--checkpoint", "BEST", "--resume", "BEST"], "one of"), (["--checkpoint", "BEST", "--plot", "RUN"], "one of"),
    (["--resume", "RUN", "--plot", "RUN"], "one of"), (["--resume", "RUN", "--init-from", "BEST"], "--init-from"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt"), (["--resume", "nowhere"], "nowhere"), (["--init-from", "nowhere.pt"], "nowhere.pt"),
    (["--plot", "nowhere"], "nowhere"), (["--plot", "COLLATZ"], "window10-s0"), (["--init-from", "COLLATZ"], "collatz.py"),
    (["--resume", "COLLATZ"], "collatz"), (["--checkpoint", ""], "--checkpoint"), (["--resume", ""], "--resume"), (["--init-from", ""], "--init-from"),
    (["--add", "", "--checkpoint", "BEST"], "--add"), (["--export-submission", "", "--checkpoint", "BEST"], "--export-submission"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_flags_end_in_one_line(rotary, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    words = {"BEST": str(rotary / "best_s1.pt"), "RUN": str(rotary), "COLLATZ": str(COLLATZ)}
    base = [] if {"--resume", "--checkpoint"} & set(flags) and "" not in flags else [*SMALL, "--preset", "rope196", "--seeds", "0"]
    if "--seed" in flags or "--pos-rank" in flags and "--preset" not in flags:
        base = SMALL
    assert named in bad_exit([*base, *(words.get(f, f) for f in flags)], capsys)
    assert list(tmp_path.iterdir()) == []
