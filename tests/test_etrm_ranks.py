"""etrm_pretrain.py on two ranks of torchrun, with gloo, beside one process."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for torchrun, which starts this file, too
import etrm_pretrain as etrm  # noqa: E402
from common import devices, metrics  # noqa: E402

SMALL = ["--max-train-groups", "3", "--hidden", "32", "--batch-size", "4", "--compile", "off", "--precision", "fp32"]


def torchrun(*words: str, n: int = 2, **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.Popen([*start, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, **more)


def first_gradient(*flags: str) -> dict[str, torch.Tensor]:
    """The gradient of the first step, of all slots."""
    args, device = etrm.parse_args([*SMALL, *flags]), torch.device("cpu")
    torch.set_num_threads(1)
    devices.init_ranks("this test", device)
    data = etrm.load_data(args)
    torch.manual_seed(0)
    model, slots, mine = etrm.Model(etrm.config_of(args)), etrm.Slots(data.train, args), etrm.own_part(args.batch_size)
    torch.nn.init.normal_(model.decoder.halt.weight)  # it begins at 0, and hides the queries from each other
    version = partial(etrm.training_version, C=data.C, seed=0, augment=args.augment)
    batch = etrm.make_batch(slots.items()[mine], data.C, device, version)
    out, each = etrm.supervise(model, batch, model.fresh(*batch.x.shape), slots, args, 0)
    etrm.sum_gradients(model)
    assert len(out.q) == len(each["lm_loss"]) == args.batch_size
    return {"q": out.q, **each, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("flags", [["--loo"], ["--encoder", "recurrent", "--loss", "stablemax"]])
def test_two_ranks_have_the_gradient_of_one(tmp_path, flags):
    done = torchrun(__file__, str(tmp_path / "two.pt"), *flags)
    assert done.wait(120) == 0, done.stdout.read()
    one, two = first_gradient(*flags), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() and len(one) > 20
    largest = max(float(x.abs().max()) for x in one.values())
    for name, x in one.items():
        assert (x - two[name]).abs().max() <= 1e-6 * largest, name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = torchrun("etrm_pretrain.py", *SMALL, "--steps", "12", "--eval-every", "6", "--out-dir", str(folder))
    text = done.communicate(timeout=240)[0]
    assert done.returncode == 0, text
    return folder, text


def test_two_ranks_train_and_evaluate_like_one_and_the_first_alone_prints(two, tmp_path):
    folder, text = two
    assert len(re.findall("^step +6 ", text, re.MULTILINE)) == 1 and "on 2 ranks, cpu" in text
    etrm.main([*SMALL, "--threads", "1", "--steps", "12", "--eval-every", "6", "--out-dir", str(tmp_path / "one")])
    ours, theirs = (metrics.read(x) for x in (tmp_path / "one", folder))
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() - {"sec", "samples_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5, nan_ok=True), (a["step"], name)


def test_a_checkpoint_of_two_ranks_loads_on_one_with_the_same_figures(two):
    folder, _ = two
    summary = json.loads((folder / "summary.json").read_text())
    out = etrm.main(["--checkpoint", str(folder / "last.pt"), "--threads", "1"])
    for kind in ("raw", "ema"):
        said = summary["figures"]["train"][f"last.{kind}"]
        for name in ("exact_count", "halted_count", "accuracy", "lm_loss"):
            assert out[kind][name] == pytest.approx(said[name], rel=1e-5), (kind, name)
    assert summary["n_ranks"] == 2


@pytest.mark.parametrize("flags, said", [(["--batch-size", "5"], "--batch-size 5: cannot be divided among 2 ranks"),
                                         (["--show", "0ca9ddb6"], "runs in one process")])
def test_what_ranks_cannot_do_is_said(monkeypatch, flags, said):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    with pytest.raises(SystemExit, match=said):
        etrm.main(flags)


def test_errors_of_a_run_are_said_by_rank_0_alone(two):
    done = torchrun("etrm_pretrain.py", *SMALL, "--out-dir", str(two[0]))
    text = done.communicate(timeout=120)[0]
    assert done.returncode != 0 and text.count("holds a run already") == 1  # a traceback is torchrun's own
    assert 'etrm_pretrain.py", line' not in text


def test_a_variable_that_looks_like_a_rank_changes_nothing(two, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert devices.rank() == 0 and devices.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(etrm.load(str(two[0]))(etrm.arc_agi_1()[0][0])) == 2


def test_without_torchruns_environment_it_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=r"^etrm_pretrain.py: error: WORLD_SIZE is 2, but RANK is not set[^\n]*$"):
        etrm.main(SMALL)


# ---- Signals and kills

def ranks_of(folder: Path) -> dict[str, int]:
    """Process ids of the ranks whose command names the folder, torchrun's under ""."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                environment = dict(line.split(b"=", 1) for line in (process / "environ").read_bytes().split(b"\0") if line)
                found[environment.get(b"RANK", b"").decode()] = int(process.name)
    return found


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1", ""])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_killed_rank_ends_the_others_within_a_minute(two, tmp_path, mode, rank):
    words = [*SMALL, "--steps", "100000", "--eval-every", "100000", "--out-dir", str(tmp_path / "run")]
    if mode == "evaluation":
        copy = tmp_path / "run"
        copy.mkdir()
        (copy / "last.pt").write_bytes((two[0] / "last.pt").read_bytes())
        words = ["--checkpoint", str(copy / "last.pt"), "--views", "1000"]
    process = torchrun("etrm_pretrain.py", *words)
    if mode == "training":
        wait_for(process, "step      0 ")
    else:
        while len(ranks_of(tmp_path)) < 3:
            time.sleep(0.2)
        time.sleep(15)  # they are loaded, and answer
    os.kill(ranks_of(tmp_path)[rank], signal.SIGKILL)
    start = time.monotonic()
    while ranks_of(tmp_path):
        assert time.monotonic() - start < 60
        time.sleep(0.2)
    assert process.wait(5) != 0


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_two_ranks_save_when_told_and_one_goes_on(tmp_path, to_all):
    words = [*SMALL, "--steps", "80", "--eval-every", "20", "--out-dir", str(tmp_path / "run")]
    process = torchrun("etrm_pretrain.py", *words, start_new_session=True)
    wait_for(process, "step     20 ")
    if to_all:  # as a terminal does; torchrun then passes it on to those that have had it, here at once
        for _ in range(2):
            for rank in "01":
                os.kill(ranks_of(tmp_path)[rank], signal.SIGINT)
        process.send_signal(signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert "go on with: torchrun --nproc-per-node 2 etrm_pretrain.py --resume" in text and process.returncode != 0 and not ranks_of(tmp_path)
    etrm.main(["--resume", str(tmp_path / "run"), "--threads", "1"])
    etrm.main([*words[:-1], str(tmp_path / "one"), "--threads", "1"])
    a, b = (metrics.read(tmp_path / name)[-1] for name in ("run", "one"))
    assert a["step"] == b["step"] == 80 and a["train/lm_loss"] == pytest.approx(b["train/lm_loss"], rel=0.02)


if __name__ == "__main__":
    gradient = first_gradient(*sys.argv[2:])
    if devices.rank() == 0:
        torch.save(gradient, sys.argv[1])
