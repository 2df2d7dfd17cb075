"""addition_train.py: models, load, --add, export, --init-from; bad input is one line and an exit code."""
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_addition import draw_pictures, small_sets  # noqa: F401, a fixture
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import addition_train as A
from common.files import UserError

LOGS = Path(__file__).parents[1] / "logs" / "kept"
KEPT = sorted(f.parent for f in (LOGS / "addition_train").glob("*/summary.json")
              if json.loads(f.read_text())["n_perfect"] and list(f.parent.glob("best_s*.pt")))
SMALL = ["--steps", "3", "--batch-size", "4", "--compile", "off", "--device", "cpu", "--seeds", "0-1"]
LEARNED_CONFIG = {"n_layer": 1, "d_model": 7, "n_head": 1, "d_ff": 14, "dropout": 0.0, "max_seq_len": 33,
                  "vocab_size": 14, "pos_rank": 3, "qkv_rank": 3, "attn_out_rank": 2, "ffn_rank": 3,
                  "use_rmsnorm": True, "tie_qkv": "shareA_tieKV"}  # as published


def blurred(name, path):
    """A kept model whose weights have 2 % of noise, so that only some of its sums are right."""
    module, saved = A.load_model(LOGS / "addition_train" / name)
    weights = parameters_to_vector(module.parameters()).detach()
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    vector_to_parameters(weights * (1 + 0.02 * noise), module.parameters())
    torch.save({**saved, "model": {k: x.clone() for k, x in module.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    return blurred("rope122", tmp_path_factory.mktemp("use") / "rotary.pt")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return blurred("ref456", tmp_path_factory.mktemp("use") / "learned.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("use") / "run"
    A.main([*SMALL, "--preset", "rope62", "--out-dir", str(folder)])
    damaged = folder.parent / "damaged"
    damaged.mkdir()
    (damaged / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes())
    (damaged / "summary.json").write_text('{"script": "addition_train.py"}')
    return folder


def tamper(source, path, **change):
    """A copy of a checkpoint with other fields; those in a dict are merged, None deletes."""
    saved = torch.load(source, map_location="cpu", weights_only=True)
    for key, value in change.items():
        old = saved.get(key)
        new = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        saved[key] = {k: v for k, v in new.items() if v is not None} if isinstance(new, dict) else new
    torch.save(saved, path)
    return path


@pytest.fixture(scope="module")
def published(learned):
    """A file as the 456-parameter project writes it."""
    path = learned.parent / "best_456p_s43.pt"
    state = torch.load(learned, weights_only=True)["model"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # written on a GPU
        torch.save({"model_state": state, "model_config": LEARNED_CONFIG, "train_config": {"seed": 43},
                    "step": 34_000, "val_exact": 1.0, "params": 456}, path)
    return path


def sums_of(model, pairs, mode="tf"):
    """Whether each of the sums is right."""
    got, target = A.answers(model, pairs, mode)
    return (got == target).all(1)


# ---- what was trained and kept

@pytest.mark.parametrize("folder", KEPT, ids=lambda f: f.name)
def test_the_best_kept_model_adds(folder):
    model, _ = A.load_model(folder)
    pairs = A.split_pairs(2026, 1000)
    right = sums_of(model, pairs)
    assert right.mean() >= 0.99
    assert (right == sums_of(model, pairs, "ar")).all()
    assert A.load(folder)(1234567890, 9876543210) == 11111111100


def test_published_checkpoints_load(learned, published, tmp_path):
    (module, saved), (own, _) = A.load_model(published), A.load_model(learned)
    assert saved["step"] == 34_000 and module.lm_head.weight is module.token_emb.weight
    assert all(torch.equal(x, own.state_dict()[name]) for name, x in module.state_dict().items())
    config = A.Config("learned", 7, 14, pos_rank=3, qkv_rank=3, attn_out_rank=3, ffn_rank=3)
    old = {k: v for k, v in LEARNED_CONFIG.items() if k not in ("use_rmsnorm", "tie_qkv", "n_head")}
    state = A.LearnedAdder(config).state_dict()
    torch.save({"model_state": state, "model_config": {**old, "attn_out_rank": 3}}, tmp_path / "512.pt")
    assert A.load_model(tmp_path / "512.pt")[0].config == config


# ---- load, --add, --checkpoint, --init-from

@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_load_adds_as_the_module_does_in_one_pass(request, family):
    path, pairs = request.getfixturevalue(family), A.uniform_pairs([1], 40)
    add, right = A.load(path), sums_of(A.load_model(path)[0], pairs)
    for a, b, ok in zip(*([A.number(row) for row in x] for x in pairs), right, strict=True):
        assert (add(a, b) == a + b) == ok
    assert 0 < right.sum() < 40
    assert {add(kind(7), kind(9)) for kind in (int, np.int64, np.uint64, np.uint8)} == {add(7, 9)}


@pytest.mark.parametrize("bad", [-1, 10**10, 10**5000, True, np.True_, 1.0, "5", None, [1], np.int64(-4)],
                         ids=lambda x: type(x).__name__)
def test_load_refuses_what_is_no_operand(rotary, bad):
    add = A.load(rotary)
    for pair in ((bad, 1), (1, bad)):
        with pytest.raises(UserError, match="not a whole number in 0..9999999999") as e:
            add(*pair)
        assert "\n" not in str(e.value) and len(str(e.value)) < 120


def test_an_answer_with_a_token_that_is_no_digit_is_none(learned, tmp_path, capsys):
    embedding = torch.zeros(14, 7)
    embedding[12:, 0] = torch.tensor([1.0, -1.0])                            # one of them is the likeliest
    path = tamper(learned, tmp_path / "eos.pt", model={
        "ln_f.weight": torch.ones(7), "token_emb.weight": embedding, "lm_head.weight": embedding})
    assert A.load(path)(1, 2) is None
    assert A.main(["--add", "1+2", "--checkpoint", str(path)])["answer"] is None
    assert "no number, wrong: it is 3" in capsys.readouterr().out


def test_add_answers_digit_by_digit_and_says_right_or_wrong(rotary, capsys):
    add, seen = A.load(rotary), set()
    for a, b in zip(*([A.number(row) for row in x] for x in A.uniform_pairs([1], 9)), strict=True):
        out = A.main(["--add", f" {a} + {b} ", "--checkpoint", str(rotary)])
        digits, line = capsys.readouterr().out.splitlines()
        assert (out["answer"], out["right"]) == (add(a, b), add(a, b) == a + b)
        said = digits.removeprefix("digits, lowest first: ").split()
        assert len(said) == 11 and int("".join(said[::-1])) == out["answer"]
        end = "right" if out["right"] else f"wrong: it is {a + b}"
        assert line == f"{a} + {b} = {out['answer']}, {end}"
        seen.add(out["right"])
    assert seen == {True, False}


def test_checkpoint_alone_is_evaluated_on_the_original_pairs(rotary, capsys, monkeypatch):
    monkeypatch.setattr(A, "SPLIT_SEEDS", (7777, 41))
    out = A.main(["--checkpoint", str(rotary)])
    rights = [int(sums_of(A.load_model(rotary)[0], A.split_pairs(seed, 10_000)).sum()) for seed in (7777, 41)]
    assert out["splits"] == {"7777": [rights[0], 10_000], "41": [rights[1], 10_000]}
    assert out["exact"] == [sum(rights), 20_000] and out["exact_rate"] == sum(rights) / 20_000
    assert f"({sum(rights)}/20000, 95%" in capsys.readouterr().out
    assert out["token_accuracy"] == pytest.approx(sum(k for k, _ in out["positions"]) / 220_000)
    assert json.loads(json.dumps(out)) == out and (out["n_params"], out["mode"]) == (122, "tf")
    assert len(out["failures"]) == 10
    for a, b, c, d in out["failures"]:
        assert c == a + b and d != c and d == A.load(rotary)(a, b)


def test_a_few_steps_mend_a_blurred_model(rotary, tmp_path):
    before = sums_of(A.load_model(rotary)[0], A.uniform_pairs([A.TEST], 100)).mean()
    out = A.main([*SMALL, "--preset", "rope122", "--steps", "30", "--batch-size", "32", "--lr", "0.01",
                  "--out-dir", str(tmp_path / "run"), "--init-from", str(rotary)])
    assert before < 0.65 and all(seed["exact"] > 0.9 for seed in out["seeds"].values())


def test_every_seed_starts_from_the_best_of_a_run(run, tmp_path):
    for seed, val_exact in ((0, 0.9), (1, 0.5)):
        tamper(run / f"best_s{seed}.pt", tmp_path / f"best_s{seed}.pt", val_exact=val_exact)
    A.main([*SMALL, "--preset", "rope62", "--steps", "1", "--lr", "1e-12", "--seeds", "7-9",
            "--out-dir", str(tmp_path / "run"), "--init-from", str(tmp_path)])
    new = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["population"]["weights"]
    assert torch.allclose(new, A.flat(A.load_model(run / "best_s0.pt")[0]).expand(3, -1), rtol=0, atol=1e-9)


# ---- export

PAIRS = [(0, 0), (1, 9), (9999999999, 1), (9999999999, 9999999999), (1234567890, 9876543210), (7, 0),
         *((37 * 7**k % A.LIMIT, 91 * 11**k % A.LIMIT) for k in range(12))]
CODE = """'"+str(__import__('os').mkdir('evil'))+"'"""
FRESH = """
import importlib.util, json, sys
for name in sys.argv[2:]:
    spec = importlib.util.spec_from_file_location(name, name + ".py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, metadata = module.build_model()
    sums = [module.add(model, a, b) for a, b in json.loads(sys.argv[1])]
    assert not {"addition_train", "common"} & set(sys.modules)
    print(json.dumps([metadata, sums, sum(p.numel() for p in model.parameters())]))
"""


@pytest.fixture(scope="module")
def exported(rotary, learned, tmp_path_factory):
    """Three exported models, and what a fresh interpreter without our code says of each file."""
    folder = tmp_path_factory.mktemp("exported")
    args = {"preset": "mine", "init": "arc+phase", "optimizer": "soap", "entropy_bonus": 0.5}
    tamper(rotary, folder / "rotary.pt", seed=7, args=args)
    tamper(learned, folder / "learned.pt", seed=7, args=args)
    tamper(rotary, folder / "evil.pt", args={"preset": CODE, "init": CODE})
    names = ["rotary", "learned", "evil"]
    (folder / "evil.py").symlink_to("real.py")                               # it is followed
    for name in names:
        A.main(["--export-submission", f"{folder}/{name}.py", "--checkpoint", f"{folder}/{name}.pt"])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", FRESH, json.dumps(PAIRS), *names], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("family, n", [("rotary", 122), ("learned", 456)])
def test_the_exported_file_adds_as_the_model_and_names_its_priors(exported, family, n):
    folder, said = exported
    metadata, sums, params = said[family]
    add = A.load(folder / f"{family}.pt")
    assert sums == [add(a, b) for a, b in PAIRS] and len(set(sums)) > 10
    assert params == metadata["params"] == n
    assert metadata["name"] == f"mine, {n} parameters, seed 7" and metadata["author"]
    tricks = "; ".join(metadata["tricks"])
    assert all(x in tricks for x in ("arc+phase", "soap", "entropy bonus 0.5"))
    text = (folder / f"{family}.py").read_text()                             # AdderBoard: tensors to tensors,
    assert "def forward(self, tokens: torch.Tensor, Q: int)" in text         # a generic loop outside
    assert "likeliest(model(tokens, 1)[0])" in text and "greedy(model, " in text
    assert str(folder) not in text and "open(" not in text


def test_a_checkpoint_cannot_put_code_into_the_exported_file_and_a_link_is_followed(exported):
    folder, said = exported
    assert CODE in said["evil"][0]["name"] and not (folder / "evil").exists()
    assert (folder / "evil.py").is_symlink() and (folder / "real.py").is_file()


# ---- bad checkpoints

def refusal(capsys, *argv):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as e:
        A.main(list(map(str, argv)))
    assert e.value.code not in (0, None)
    out, err = capsys.readouterr()
    message = e.value.code if isinstance(e.value.code, str) else err.strip()
    assert out == "" and "error: " in message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("source, change, named", [
    ("rotary", {"script": "other.py", "config": {"flux": 3}}, "other.py"),
    ("rotary", {"config": {"d_model": 10**9}}, "d_model"),
    ("rotary", {"config": {"flux": 3}}, "flux"),
    ("rotary", {"model": {"wq": torch.ones(4, 5)}}, "wq"),
    ("rotary", {"model": {"up": torch.full((3, 3), math.nan)}}, "not finite"),
    ("learned", {"model": {"lm_head.weight": torch.ones(14, 7)}}, "lm_head.weight is not token_emb.weight"),
    ("published", {"model_config": {"n_head": 2}}, "n_head"),
    ("published", {"model_config": {"flux": torch.ones(2)}}, "flux")], ids=lambda x: str(x)[:30])
def test_a_bad_checkpoint_names_what_is_wrong(request, tmp_path, capsys, source, change, named):
    path = tamper(request.getfixturevalue(source), tmp_path / "bad.pt", **change)
    message = refusal(capsys, "--add", "1+2", "--checkpoint", path)
    assert str(path) in message and named in message
    with pytest.raises(UserError, match="bad.pt"):
        A.load(path)


@pytest.mark.parametrize("change, named", [
    ({"population": {"best_val": None}}, "best_val"),
    ({"population": {"weights": torch.zeros(2, 5)}}, "weights"),
    ({"population": {"loss_sum": torch.zeros(5)}}, "loss_sum"),
    ({"args": {"steps": 60.5}}, "--steps")], ids=lambda x: str(x)[:30])
def test_a_damaged_population_is_not_resumed(run, tmp_path, capsys, change, named):
    tamper(run / "last.pt", tmp_path / "last.pt", **change)
    assert named in refusal(capsys, "--resume", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


# ---- bad flags

@pytest.mark.parametrize("flags, named", [
    ("--seeds 40-45,43", "twice"),
    ("--lengths 6:40,3:20", "--lengths"),
    ("--batch-size 65536 --seeds 0-40", "--batch-size"),
    ("--d-model 64 --d-ff 64", "soap"),
    ("--preset rope196 --pos-rank 3", "pos_rank"),
    ("--preset rope196 --smooth-positions 1", "smooth"),
    ("--preset ref456 --tie kv+oq", "tie"),
    ("--preset ref --tie-qkv shareA_tieKV", "tie_qkv"),
    ("--preset ref456 --init arc+phase", "init"),
    ("--add 1+2", "--checkpoint"),
    ("--add 1+2 --checkpoint MODEL --steps 3", "--steps"),
    ("--add 1+2+3 --checkpoint MODEL", "two whole numbers"),
    ("--add \u0661+\u0662 --checkpoint MODEL", "two whole numbers"),
    ("--add 10000000000+1 --checkpoint MODEL", "not a whole number in 0..9999999999"),
    ("--export-submission nowhere/out.py --checkpoint MODEL", "nowhere"),
    ("--plot RUN --resume RUN", "--resume"),
    ("--plot COLLATZ", "collatz.py"),
    ("--plot RUN/../damaged", "damaged"),
    ("--resume RUN --preset ref456", "--preset"),
    ("--resume MODEL", "wanted here"),
    ("--init-from RUN/last.pt", "last.pt"),
    ("--preset rope36 --init-from MODEL", "another config"),
    *((f"--{flag} ''", f"--{flag}: empty")
      for flag in ("resume", "checkpoint", "init-from", "export-submission", "plot", "out-dir"))])
def test_bad_flags_end_in_one_line_without_trace(rotary, run, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(A, "draw_pictures", draw_pictures)
    places = {"MODEL": rotary, "RUN": run, "COLLATZ": LOGS / "collatz" / "window10-s0"}
    for word, place in places.items():
        flags = flags.replace(word, str(place))
    assert named in refusal(capsys, *shlex.split(flags))
    assert list(tmp_path.iterdir()) == []
