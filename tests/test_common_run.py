"""common/run.py and common/repeat.py, by way of a training script whose model is one integer."""
from __future__ import annotations

import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from common import checkpoint, flags, metrics, repeat, run
from common.files import read_json

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")
RUN = "logs/fake/n"
FAKE = '''
from common import files, flags, run

def at(step, r):
    """What a test makes happen at this step."""

def parse_args(argv):
    p = flags.Parser(prog="fake.py")
    p.add_argument("--steps", type=flags.integer(0, 100), default=10)
    p.add_argument("--eval-every", type=flags.integer(1), default=4)
    p.add_argument("--lr", type=flags.real(0, 1), default=0.5)
    p.add_argument("--sizes", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2])
    p.add_argument("--quick", action="store_true")
    flags.add_run_arguments(p)
    return flags.parse(p, argv)

def train(args):
    args, saved = run.restore(args, "fake.py", model=int)
    model = saved["model"] if saved else args.seed
    with run.Run(args, "fake.py", __file__, saved) as r:
        for step in range(r.start, args.steps + 1):
            at(step, r)
            due, last = r.due(step), r.last(step)
            if due:
                row = {"step": step, "model": model, "test": model if r.due(step, 8) else None}
                r.record(row)
                r.show(row)
            if due or last:
                r.save("last.pt", model=model)
            if last:
                break
            model = (3 * model + step) % 1009
        r.leave_if_stopped()
        at("end", r)
        return r.summary(model=model)

def main(argv):
    with files.one_line_errors("fake.py"):
        return train(parse_args(argv))
'''
SEED = """
import json, pathlib, signal, sys, time
argv = sys.argv[1:]
folder = pathlib.Path(argv[-1])
if argv[0] == "--fail-at" and argv[1] == argv[-3]:
    sys.exit(3)
folder.mkdir(parents=True)
if argv[0] == "--wait":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), (folder / "saved").touch(), sys.exit(143)))
    print("waiting", flush=True)
    time.sleep(60)
(folder / "summary.json").write_text(json.dumps({"argv": argv, "test": {"deep": {"x": int(argv[-3])}}}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> ModuleType:
    """fake.py, imported; it and seed.py are in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "commit", lambda: "abc123")
    Path("fake.py").write_text(FAKE)
    Path("seed.py").write_text(SEED)
    module = ModuleType("fake")
    module.__file__ = str(tmp_path / "fake.py")
    exec(FAKE, vars(module))
    return module


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time of a run, which stands still unless it is moved; sleep moves it."""
    now = SimpleNamespace(wall=1e9, cpu=50.0)
    stopped = SimpleNamespace(
        monotonic=lambda: now.wall, process_time=lambda: now.cpu,
        strftime=lambda form: time.strftime(form, time.gmtime(now.wall)),
        sleep=lambda seconds: setattr(now, "wall", now.wall + seconds))
    for module in flags, run:
        monkeypatch.setattr(module, "time", stopped)
    return now


def outcome(folder: str) -> tuple:
    """What must not depend on how often a run was stopped: rows, last checkpoint, summary, but for times."""
    rows = [{k: v for k, v in row.items() if k != "sec"} for row in metrics.read(folder)]
    saved, summary = checkpoint.read(Path(folder, "last.pt")), read_json(Path(folder, "summary.json"))
    return rows, saved["step"], saved["model"], summary["model"], summary["steps"], summary["stopped_early"]


def unbroken(fake: ModuleType) -> tuple:
    fake.main(["--out-dir", "unbroken"])
    return outcome("unbroken")


def refusal(fake: ModuleType, *argv: str) -> str:
    """The one line with which a command ends that leaves every file as it was, and makes none."""
    def everything() -> list:
        return [(p, p.is_file() and p.read_bytes()) for p in sorted(Path().rglob("*"))]
    before = everything()
    with pytest.raises(SystemExit) as e:
        fake.main(list(argv))
    assert e.value.code.startswith("fake.py: error: ") and "\n" not in e.value.code
    assert everything() == before
    return e.value.code


# ---- a run

def test_a_run_leaves_its_flags_provenance_rows_summary_and_script(fake, clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fake.py", "--name", "two words"])
    summary = fake.main(["--name", "two words", "--lr", "0.25"])
    folder = Path("logs/fake/two words")
    args = read_json(folder / "args.json")
    assert args == checkpoint.read(folder / "last.pt")["args"] and args["lr"] == 0.25 and args["steps"] == 10
    assert (folder / "fake.py").read_text() == FAKE
    words = [line.split()[0] for line in (folder / "run.txt").read_text().splitlines() if line]
    assert words == ["time", "command", "commit", "versions", "machine"]
    rows = metrics.read(folder)
    assert [(row["step"], "test" in row) for row in rows] == [(0, True), (4, False), (8, True), (10, True)]
    assert list(rows[0])[-1] == "sec"
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "step      4 | model   18 | sec    0.0", "step      8 | model  627 | test  627 | sec    0.0"]
    assert read_json(folder / "summary.json") == summary
    assert {k: v for k, v in summary.items() if "seconds" not in k} == {
        "script": "fake.py", "name": "two words", "seed": 0, "steps": 10, "stopped_early": False,
        "command": "python fake.py --name 'two words'", "model": 631}


def test_runs_of_one_second_and_seed_get_folders_of_their_own(fake, clock):
    assert len({fake.main(["--seed", "7"])["name"] for _ in range(3)}) == 3
    assert len(list(Path("logs/fake").glob("*-s7/summary.json"))) == 3


def test_logs_on_a_disk_that_is_gone_are_said(fake, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for another run"))
    Path("logs").symlink_to("gone")
    assert "logs" in refusal(fake)


# ---- stopped and resumed

@pytest.mark.parametrize("step", [0, 3, 4, 9, 10])
@pytest.mark.parametrize("way", ["SIGINT", "SIGTERM", "--max-minutes"])
def test_a_run_that_is_stopped_and_resumed_is_the_unbroken_run(way, step, fake, clock, capsys):
    expected = unbroken(fake)

    def stop(here, r) -> None:
        if here == step and way == "--max-minutes":
            clock.wall += 61
        elif here == step:
            signal.raise_signal(signal.Signals[way])
    fake.at = stop
    resume = ["--resume", "a run"]
    if way == "--max-minutes":
        summary = fake.main(["--out-dir", "a run", "--max-minutes", "1"])
        assert (summary["steps"], summary["stopped_early"]) == (step, step < 10)
    else:
        with pytest.raises(SystemExit) as e:
            fake.main(["--out-dir", "a run"])
        assert e.value.code == 128 + signal.Signals[way]
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"stopped at step {step}; ")
        assert shlex.split(line.split(": ")[1]) == ["python", "fake.py", *resume]
        assert not Path("a run/summary.json").exists()
    fake.at = lambda step, r: None
    for _ in range(2):  # at last a finished run
        fake.main(resume)
        assert outcome("a run") == expected
    assert Path("a run/run.txt").read_text().count("command ") == 3


def test_a_record_that_is_gone_is_said_and_begins_again(fake, capsys):
    fake.main(["--out-dir", "a", "--max-minutes", "1e-9"])
    os.remove("a/metrics.csv")
    fake.main(["--resume", "a"])
    assert "a/metrics.csv is gone" in capsys.readouterr().out
    assert [row["step"] for row in metrics.read("a")] == [4, 8, 10]


def test_the_seconds_of_all_parts_are_counted_and_the_limit_is_that_of_this_part(fake, clock):
    def work(step, r) -> None:
        clock.wall, clock.cpu = clock.wall + 20, clock.cpu + 30
    fake.at = work
    summaries = [fake.main([*argv, "--max-minutes", "1"]) for argv in (["--out-dir", "a"], ["--resume", "a"])]
    assert [(s["steps"], s["seconds"], s["cpu_seconds"]) for s in summaries] == [(3, 100, 150), (6, 180, 270)]
    assert [row["sec"] for row in metrics.read("a")] == [20, 120]


@pytest.mark.parametrize("step, signals, code", [
    (3, "SIGINT SIGINT", 130), (3, "SIGTERM SIGINT", 130), (3, "SIGTERM SIGTERM", -15),
    ("end", "SIGINT", 130), ("end", "SIGTERM", -15)])
def test_a_second_signal_and_one_after_the_loop_act_at_once(step, signals, code, fake):
    numbers = [signal.Signals[name] for name in signals.split()]
    fake.at = lambda here, r: here == step and list(map(signal.raise_signal, numbers))
    process = FORK.Process(target=fake.main, args=[["--out-dir", "a"]])
    process.start()
    process.join(30)
    assert process.exitcode == code
    assert checkpoint.read("a/last.pt")["step"] == (0 if step == 3 else 10)
    assert not Path("a/summary.json").exists()


# ---- one writer

@pytest.mark.parametrize("argv, step", [
    (["--out-dir", RUN], 0), (["--name", "n"], 0), (["--resume", RUN], 8),
    (["--resume", f"{RUN}/last.pt", "--name", "n", "--out-dir", f"logs/../{RUN}", "--device", "cpu",
      "--max-minutes", "9", "--tracker", "none", "--lr", "0.5"], 8)])
def test_a_folder_has_one_writer_and_is_free_when_that_is_killed(argv, step, fake):
    expected = unbroken(fake)
    there = FORK.Event()

    def stand_still(here, r) -> None:  # between the row and its checkpoint
        if here == step:
            r.save = lambda *words, **fields: (there.set(), time.sleep(60))
    fake.at = stand_still
    process = FORK.Process(target=fake.main, args=[["--name", "n"]], daemon=True)
    process.start()
    fake.at = lambda step, r: None
    assert there.wait(30)
    assert f"{RUN}: another process is writing" in refusal(fake, *argv)
    process.kill()
    process.join(30)
    fake.main(argv)
    assert outcome(RUN) == expected


# ---- refused before anything is written

@pytest.mark.parametrize("argv, message", [
    (["--tracker", "wandb"], "--tracker wandb needs a package that is missing"),
    (["--name", "n"], f"{RUN} holds a run already: choose another --name or --out-dir, or --resume {RUN}"),
    (["--out-dir", "fake.py"], "fake.py"),
    (["--resume", "gone"], "gone: no such checkpoint"),
    (["--resume", "logs/fake"], "logs/fake/last.pt: no such checkpoint"),
    (["--resume", "fake.py"], "fake.py: not a readable checkpoint"),
    (["--resume", RUN, "--init-from", "x"], "--init-from: not together with --resume"),
    (["--resume", RUN, "--out-dir", "other"], f"goes on in its folder {RUN}, not in other"),
    (["--resume", RUN, "--name", "other"], f"goes on in its folder {RUN}, not in logs/fake/other"),
    (["--resume", RUN, "--lr", "0.25"], f"--lr is 0.25 here and 0.5 in {RUN}/last.pt"),
    (["--resume", RUN, "--quick"], f"--quick is True here and False in {RUN}/last.pt")])
def test_what_cannot_run_is_one_line_and_leaves_nothing_behind(argv, message, fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    fake.main(["--name", "n"])
    assert message in refusal(fake, *argv)


@pytest.mark.parametrize("name, value", [
    ("script", ...), ("script", torch.eye(3)), ("script", "other.py"), ("format", ...), ("format", 2),
    ("step", -1), ("step", 11), ("step", True), ("step", 7.0), ("args", []), ("seconds", None),
    ("model", torch.eye(3)), ("--lr", ...), ("--lr", 2.0), ("--lr", math.nan), ("--lr", "0.5"),
    ("--lr", torch.eye(3)), ("--steps", 10.0), ("--steps", True), ("--steps", -1), ("--steps", None),
    ("--sizes", 1), ("--sizes", [1, "x"]), ("--sizes", "1,2"), ("--quick", 1), ("--quick", None)])
def test_a_tampered_checkpoint_is_one_line_that_names_what_is_wrong(name, value, fake):
    fake.main(["--out-dir", "a"])
    saved = checkpoint.read("a/last.pt")
    fields = saved["args"] if name.startswith("--") else saved
    fields[name.lstrip("-")] = value
    if value is ...:  # missing
        del fields[name.lstrip("-")]
    checkpoint.save("a/last.pt", saved)
    message = refusal(fake, "--resume", "a")
    assert "a/last.pt: " in message and (name in message or "of 'other.py', not of 'fake.py'" in message)


def test_any_path_works_in_a_locale_of_ascii(fake):
    code = "import fake, sys\nfor argv in sys.argv[1:4], sys.argv[4:]: fake.main(argv)"
    folder = "ä " + os.fsdecode(b"\xff")
    argv = ["--out-dir", folder, "--max-minutes=1e-9", "--resume", folder]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": f"{ROOT}:."}
    env = {**os.environ, **ascii_only}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert outcome(folder) == unbroken(fake)
    assert os.fsencode(folder) in Path(folder, "run.txt").read_bytes()


def test_the_commit_is_that_of_the_checkout_or_else_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("RUN_COMMIT", "abc123")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.commit() == "abc123"
    (tmp_path / "run.py").write_text("1\n")
    me = "-c user.name=t -c user.email=t -c commit.gpgsign=false"
    git = f"git init -q && git add run.py && git {me} commit -qm first"
    subprocess.run(git, shell=True, cwd=tmp_path, check=True)
    assert len(head := run.commit()) == 40
    (tmp_path / "run.py").write_text("2\n")
    assert run.commit() == f"{head}, with changes"


# ---- several seeds

def test_the_table_has_a_line_for_each_number_that_every_summary_has():
    summaries = [{"seed": i, "acc": i, "yes": True, "text": "n", "a": {"b": {"c": 0.5}}} for i in (1, 2, 3)]
    lines = repeat.table([{**summaries[0], "only_here": 1}, *summaries[1:]]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["acc", "2", "1", "-0.484338", "-", "4.48434", "1", "-", "3"],  # 2 -+ 4.303 / sqrt(3)
        ["a.b.c", "0.5", "0", "0.5", "-", "0.5", "0.5", "-", "0.5"]]
    assert repeat.table([{"acc": 1}]).splitlines()[1].split() == ["acc", "1", "nan", "-", "1", "-", "1"]


def test_the_seeds_are_run_with_their_flags_in_order(fake, capsys):
    words = ["--words", "b", "a", "c d", "--scale=-1.5", "--out", "x"]  # the last is no abbreviation
    summaries = repeat.main(["2", "seed.py", *words, "--seed", "4", "--out-dir", "r"])
    assert [s["argv"] for s in summaries] == [[*words, "--seed", s, "--out-dir", f"r-s{s}"] for s in "45"]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# seed 4: r-s4", "# seed 5: r-s5"]
    assert lines[-1].split()[:2] == ["test.deep.x", "4.5"]
    repeat.main(["1", "seed.py", "--name", "n"])
    assert os.listdir("logs/seed") == ["n-s0"]


def test_a_seed_that_fails_ends_the_command_with_its_exit_code(fake, capsys):
    with pytest.raises(SystemExit) as e:
        repeat.main(["3", "seed.py", "--fail-at", "1", "--out-dir", "r"])
    assert e.value.code == 3 and not Path("r-s2").exists()
    message = "seed 1 ended with exit code 3; 1 seeds had finished"
    assert capsys.readouterr().err == f"common.repeat: error: {message}\n"


def test_sigterm_reaches_the_script_which_may_save(fake):
    command = [sys.executable, "-m", "common.repeat", "2", "seed.py", "--wait", "--out-dir", "r"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err.startswith("common.repeat: error: ") and err.count("\n") == 1
    assert os.listdir("r-s0") == ["saved"] and not Path("r-s1").exists()
