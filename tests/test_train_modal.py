"""train_modal.py without an account: the Volume is two folders, the call runs in this process."""
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext, suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, CalledProcessError
from unittest.mock import DEFAULT, Mock

import modal
import pytest

import train_modal
from common import metrics
from train_modal import UserError, make_job

pytestmark = pytest.mark.filterwarnings("ignore:The train function is executing locally", "ignore:.*fork")
ROOT = Path(__file__).parent.parent
N = "collatz/n"  # the run of most tests
SAVE = "(folder / 'last.pt').write_text(str(step + 1))"
TOLD = "args.resume or signal.pthread_sigmask(signal.SIG_BLOCK, [2]) or signal.sigtimedwait([2], 20)"  # clean
TOY = '''
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path
def parse_args(argv=None):
    p = argparse.ArgumentParser()
    for flag in ("--out-dir", "--resume", "--init-from", "--tracker", "--name", "--text"):
        p.add_argument(flag)
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--batch-size", type=int)
    args = p.parse_args(argv)
    if args.resume and args.init_from:
        p.error("not both")
    return args
if __name__ == "__main__":
    args = parse_args()
    rank, folder = os.environ.get("RANK"), Path(args.out_dir)
    step = int((folder / "last.pt").read_text()) if args.resume else 0
    try:
        sys.stdout.write(f"words {json.dumps(sys.argv[1:])}\\n")  # in one piece: ranks share the pipe
        sys.stdout.write(f"from step {step} commit {os.environ['RUN_COMMIT']} rank {rank}\\n")
        DO
    finally:
        SAVE
'''


def write_script(do: str = "pass", save: str = SAVE, file: str = "collatz.py") -> None:
    """A script that prints, does `do`, and then saves, also when it is interrupted."""
    text = TOY.replace("DO", do).replace("SAVE", save)
    if file == "reader.py":
        text = text.replace('"--out-dir", "--resume", ', "")
        text = text.replace("args.resume", "0").replace("args.out_dir", "'.'")
    (train_modal.HERE / file).write_text("TORCHRUN = True\n" * (file == "ranks.py") + text)


def write(folder: Path, **texts: str) -> None:
    """Write files; the key `last_pt` is the file last.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, text in texts.items():
        (folder / key.replace("_", ".")).write_text(text)


def copy(source: str, target: str) -> None:
    """Wholly or not at all, also when this process is killed."""
    shutil.copy(source, f"{target}.new")
    os.replace(f"{target}.new", target)


class FakeVolume:
    """What is mounted is seen by the container, what is committed by everyone else."""

    def __init__(self, tmp_path: Path):
        self.mounted, self.committed = tmp_path / "mounted", tmp_path / "committed"
        self.commits: list[set[str]] = []  # of each, the names of the files
        self.fails = 0  # which of them fails

    def commit(self):
        self.commits.append({p.name for p in self.mounted.rglob("*.*")})
        if len(self.commits) == self.fails:
            raise RuntimeError("no connection")
        with suppress(shutil.Error):  # a file that was replaced meanwhile
            shutil.copytree(self.mounted, self.committed, dirs_exist_ok=True, copy_function=copy)

    def reload(self):
        shutil.rmtree(self.mounted)
        shutil.copytree(self.committed, self.mounted)

    def listdir(self, path, recursive):
        kinds = modal.volume.FileEntryType.DIRECTORY, modal.volume.FileEntryType.FILE
        return [Mock(path=str(p.relative_to(self.committed)), type=kinds[p.is_file()])
                for p in sorted(self.committed.rglob("*"))]

    def read_file(self, path):
        data = (self.committed / path).read_bytes()
        return iter([data[:7], data[7:]])

    def read_file_into_fileobj(self, path, fileobj):
        fileobj.write((self.committed / path).read_bytes())

    def text(self, file, run=N):
        return (self.committed / run / file).read_text(errors="replace")

    def record(self):
        return json.loads(self.text("modal.json"))


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """An empty Volume, and a project of three small scripts: one is for torchrun, one has no run folder."""
    fake = FakeVolume(tmp_path)
    for name, value in {"volume": fake, "LOGS": fake.mounted, "HERE": tmp_path / "project"}.items():
        monkeypatch.setattr(train_modal, name, value)
    for folder in (fake.mounted, fake.committed, train_modal.HERE):
        folder.mkdir()
    monkeypatch.syspath_prepend(train_modal.HERE)
    for file in ("collatz.py", "ranks.py", "reader.py"):
        write_script(file=file)
        monkeypatch.setitem(sys.modules, file[:-3], None)  # at the end the real one comes back
        del sys.modules[file[:-3]]
    write(train_modal.HERE, helper_py="x = 1\n")  # no parse_args, so it is none
    return fake


@pytest.fixture
def account(monkeypatch, volume):
    """The entry point's call runs the body in this process; what it asked Modal for is kept."""
    asked, body = {}, train_modal.train.local

    def with_options(**options):
        asked.update(options)
        return Mock(spawn=lambda job: Mock(get=lambda: run_local(job, body)))
    monkeypatch.setattr(train_modal, "train", Mock(local=body, with_options=with_options))
    return asked


def run_local(job: dict, body=None) -> None:
    """A new container: it sees what is committed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may have been started with it ignored
    train_modal.volume.reload()
    (body or train_modal.train.local)(job)


def resumed(volume: FakeVolume) -> dict:
    """The job of a `--resume-name n`, which knows the call before it."""
    return {**make_job(resume_name="n"), "before": volume.record()["calls"][-1]["call"]}


def left_over(folder: Path) -> list[int]:
    """Processes whose command names the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def interrupt(job: dict, seen: str, n: int = 1, sig: int = signal.SIGINT) -> None:
    """Preempt a container (SIGKILL: it is gone at once) as soon as the script's output has `seen` n times.

    Meanwhile, and when a container goes unless it is killed, Modal commits the Volume by itself.
    """
    folder = train_modal.LOGS / job["run"]
    log = folder / "output.txt"
    body = multiprocessing.get_context("fork").Process(target=run_local, args=[job])
    body.start()
    while not (log.is_file() and log.read_text().count(seen) >= n):
        assert body.is_alive()
        time.sleep(0.02)
        train_modal.volume.commit()
    for pid in [body.pid, *left_over(folder)] if sig == signal.SIGKILL else [body.pid]:
        os.kill(pid, sig)
    body.join(30)
    assert body.exitcode
    if sig != signal.SIGKILL:
        train_modal.volume.commit()


# ---- At home

@pytest.mark.parametrize("wrong, message", [
    ({"script": "nope.py"}, "no script nope.py here; there are collatz.py, ranks.py, reader.py"),
    ({"gpu": "H100:9"}, "does not look like a GPU"),
    ({"gpu": "T4,L4"}, "does not look like a GPU"),
    ({"gpu": "H\u0661\u0660\u0660"}, "does not look like a GPU"),
    ({"gpu": "H100:4"}, "TORCHRUN = True"),
    ({"gpu": "A10:8", "script": "ranks.py"}, "up to 4 of these"),
    ({"gpu": "H100:4", "script": "ranks.py", "args": "--batch-size 38"}, "cannot be divided among 4 GPUs"),
    ({"name": ".."}, "is no name of"),
    ({"args": f"--name {'x' * 101}"}, "is no name of"),
    ({"timeout_hours": 0.05}, "timeout-hours"),
    ({"timeout_hours": 25}, "timeout-hours"),
    ({"timeout_hours": float("nan")}, "timeout-hours"),
    ({"timeout_hours": "soon"}, "timeout-hours"),
    ({"args": "--text 'a"}, "No closing quotation"),
    ({"args": "--out-dir x"}, "not with --out-dir"),
    ({"args": "--resume=x"}, "not with --resume"),
    ({"name": "a", "resume_name": "b"}, "not together with --name"),
    ({"script": "reader.py", "resume_name": "n"}, "leaves no checkpoint"),
    ({"args": "--tracker wandb"}, "WANDB_API_KEY"),
    ({"args": "--seed x"}, "collatz.py: error: argument --seed"),  # the script's own message
    ({"args": "--init-from x", "resume_name": "y"}, "not together with --init-from"),
])
def test_a_bad_flag_is_refused_in_one_line(volume, monkeypatch, capsys, wrong, message):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises((UserError, SystemExit)) as e:
        make_job(**wrong)
    assert message in f"{e.value} {capsys.readouterr().err}"
    assert "\n" not in str(e.value) and sys.argv[0] != "collatz.py"


def test_a_job_is_plain_types_and_has_defaults(volume):
    job = make_job("--seed 5")
    assert json.loads(json.dumps(job)) == job and job["call"] != make_job()["call"]
    assert (job["script"], job["gpu"], job["ranks"], job["seconds"]) == ("collatz.py", "T4", 1, 86400)
    assert job["run"].endswith("-s5") and make_job()["run"].endswith("-s7")
    assert [make_job("--name a", name=name)["run"] for name in ("", "b")] == ["collatz/a", "collatz/b"]
    for gpu in ("t4", "A100-80GB", "H100!", "B200+", "RTX-PRO-6000", "H100:1", "any", "none"):
        assert make_job(gpu=gpu)["gpu"] == gpu.upper()


def test_every_script_can_be_run_and_declares_what_is_so():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for script in train_modal.scripts():
        assert set(train_modal.declared(script, "EXTRAS", ())) <= set(optional), script
        refuses = "devices.refuse_ranks(SCRIPT)" in (ROOT / script).read_text()
        assert train_modal.declared(script, "TORCHRUN", False) is not refuses, script
    for script in ("collatz.py", "addition_train.py"):
        assert {"out_dir", "resume"} <= vars(train_modal.parse_flags(script, [])).keys(), script


def test_the_container_is_made_of_pyproject_files_and_volume(volume, monkeypatch):
    """The scripts' constants are read without running them, also where one is half written."""
    asked = {}

    def keep(self, *words, **options):
        asked.update(options, words=[*asked.get("words", []), *words])
        return self
    for method in ("pip_install_from_pyproject", "add_local_dir"):
        monkeypatch.setattr(modal.Image, method, keep)
    monkeypatch.setattr(modal.App, "function", lambda self, **options: keep(lambda body: body, **options))
    write(train_modal.HERE, half_py="def parse_args(\n\ndef parse_args(",
          some_py="raise SystemExit\nEXTRAS = ('arc',)\n" + TOY,
          long_py="EXTRAS = (\n    'sr',\n    'arc')\nTORCHRUN = print\n" + TOY, none_py=TOY.replace("    p = ", "    EXTRAS = ('dev',)\n    p = "))
    here = runpy.run_path(shutil.copy(ROOT / "train_modal.py", train_modal.HERE))
    assert asked["words"] == [f"{here['HERE']}/pyproject.toml", here["HERE"], "/root"]
    assert asked["optional_dependencies"] == ["arc", "sr", "trackers"] and asked["ignore"] is here["NOT_SENT"]
    assert asked["image"] is here["image"] and asked["volumes"] == {"/root/logs": here["volume"]}
    assert (asked["retries"].max_retries, asked["timeout"], asked["single_use_containers"]) == (3, 86400, True)
    pytest.importorskip("toml").loads((ROOT / "pyproject.toml").read_text())  # Modal's parser stumbles easily


def test_what_differs_from_the_commit_is_kept_with_the_run(volume):
    def git(*words):
        settings = "-c", "user.name=a", "-c", "user.email=a@b"
        subprocess.run(["git", *settings, *words], cwd=train_modal.HERE, check=True, capture_output=True)
    assert make_job()["diff"] == ""  # no git here
    git("init")
    git("config", "color.ui", "always")
    git("add", ".")
    git("commit", "-m", "x")
    write(train_modal.HERE, helper_py="x = 2\n", new_py="")
    job = make_job(name="n")
    assert "\n+x = 2" in job["diff"] and "?? new.py" in job["diff"] and "\33" not in job["diff"]
    run_local(job)
    assert f"commit {job['commit']} rank" in volume.text("output.txt")
    run_local({**resumed(volume), "commit": "later", "diff": ""})
    assert "+x = 2" in volume.text("changes.diff") and volume.text("changes.diff").endswith("# later\n")
    assert [call["commit"] for call in volume.record()["calls"]] == [job["commit"], "later"]


# ---- In the container

def test_a_script_runs_once_with_its_flags_and_what_it_prints_is_kept(volume, monkeypatch, capsys):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    found = ("os.environ['PYTHONUNBUFFERED'], os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'], "
             "os.getsid(0) == os.getpid(), os.getcwd()")
    write_script(rf"print({found}); os.write(1, b'\xffbar 1\rbar 2\n'); print('end', file=sys.stderr)")
    text = "it's a \"b\" x=y,z $HOME `ls` ; rm -rf\t[1]* \u00fc\n"
    job = make_job(f"--text {shlex.quote(text)} --seed=4 --init-from ''", name="n")
    run_local(job)
    output = (volume.committed / N / "output.txt").read_bytes().decode(errors="replace")
    words = json.loads(output.partition("\nwords ")[2].partition("\n")[0])
    assert words == ["--text", text, "--seed=4", "--init-from", "", "--out-dir", str(volume.mounted / N)]
    assert output.endswith(f"1 60 True {train_modal.HERE}\n\ufffdbar 1\rbar 2\nend\n")
    assert capsys.readouterr().out.endswith("bar 1\rbar 2\nend\n")
    assert volume.record()["last_lines"][-2:] == ["bar 2", "end"] and volume.record()["exit_code"] == 0
    assert volume.commits[0] == {"modal.json", "output.txt"} and len(volume.commits) == 2
    assert volume.text("last.pt") == "1"
    run_local(job)
    assert volume.text("output.txt").count("\nwords ") == 1


@pytest.mark.parametrize("do, code, last", [
    ("print('oh'); sys.exit(3)", 3, "oh"),
    (f"print('oh'); {SAVE}; os.kill(os.getpid(), signal.SIGKILL)", 137, "oh"),
    (TOLD, 124, "hours are over; a retry, or --resume-name, goes on from last.pt"),
])
def test_a_failed_call_is_not_run_again_and_one_whose_time_is_over_goes_on(volume, do, code, last):
    write_script(f"[print(i) for i in range(40)]; {do}")
    job = {**make_job(name="n"), "seconds": 2}
    with pytest.raises(CalledProcessError) as e:
        run_local(job)
    assert e.value.returncode == code and e.value.output.endswith(last)
    assert len(e.value.output.splitlines()) == 20
    with nullcontext() if code == 124 else pytest.raises(CalledProcessError, match=f"status {code}"):
        run_local(job)  # Modal's retry
    assert volume.record()["containers"] == (2 if code == 124 else 1)
    assert volume.record()["exit_code"] == (0 if code == 124 else code)


def test_a_script_is_told_before_a_slow_volume_eats_its_time_and_fails_without_last_pt(volume, monkeypatch):
    commit, start = volume.commit, time.time()
    monkeypatch.setattr(volume, "commit", lambda: (time.sleep(0.8), commit()))
    write_script("time.sleep(60)", save="print('told', time.time(), flush=True)")
    with pytest.raises(CalledProcessError) as e:
        run_local({**make_job(name="n"), "seconds": 2.5})
    told = float(volume.text("output.txt").split("told ")[1].split()[0]) - start
    assert 1.9 < told < 2.45  # of 2.5 s, less a fifth; with a commit first it would be 2.8
    assert e.value.output.endswith("hours are over") and e.value.returncode == volume.record()["exit_code"]


def test_a_folder_belongs_to_the_call_that_began_it_also_if_that_died_at_its_very_start(volume, monkeypatch):
    write(volume.committed / "collatz/old", last_pt="4")  # an upload, without a record
    job = {**make_job(name="n"), "diff": "+x"}
    with monkeypatch.context() as m:
        m.delattr(train_modal, "command_of")
        with pytest.raises(NameError):
            run_local(job)
    volume.commit()  # Modal commits now and then on its own
    for name in ("n", "old"):
        with pytest.raises(UserError, match=f"collatz/{name} is on the Volume already"):
            run_local(make_job(name=name))
    run_local(job)
    assert volume.record()["exit_code"] == 0 and "from step 0" in volume.text("output.txt")


def test_a_preempted_container_saves_and_the_next_one_goes_on(volume, tmp_path):
    write_script("args.resume or [print('started', flush=True), time.sleep(60)]")
    job = make_job("--seed 3 --init-from w.pt --init-from=w.pt --text x=y", name="n")
    interrupt(job, "started")
    assert volume.record()["exit_code"] is None and volume.text("last.pt") == "1" and not left_over(tmp_path)
    run_local(job)
    assert volume.record()["exit_code"] == 0 and volume.text("last.pt") == "2"
    first, second = volume.text("output.txt").split("# container 2: ")
    assert "from step 0 " in first and "collatz.py --seed 3 --text x=y --out-dir " in second
    jobs = [resumed(volume) for _ in range(2)]
    run_local(jobs[0])
    assert "# container 3: " in volume.text("output.txt")
    for late in (jobs[1], job):  # somebody else has gone on meanwhile
        with pytest.raises(UserError, match="goes on in another call already|is on the Volume already"):
            run_local(late)


@pytest.mark.slow
def test_ranks_of_torchrun_save_and_none_is_left(volume, tmp_path):
    write_script("print('ready', flush=True); time.sleep(60)", file="ranks.py")
    interrupt(make_job("", "ranks.py", "H100:2", "n"), "ready", n=2)
    assert volume.text("last.pt", "ranks/n") == "1" and not left_over(tmp_path)


def test_there_is_time_for_the_last_commit_before_a_preempted_container_goes():
    assert train_modal.GRACE <= 30 - 5  # seconds; 5 for the commit
    assert train_modal.MARGIN / 2 >= 60


def test_a_failed_last_commit_and_a_lost_connection_are_not_hidden(volume, monkeypatch):
    volume.fails = 2
    with pytest.raises(RuntimeError, match="no connection"):
        run_local(make_job(name="n"))
    monkeypatch.setattr(volume, "commit", Mock(side_effect=TimeoutError("late")))
    with pytest.raises(RuntimeError, match="TimeoutError in the container: late"):  # last_call takes a TimeoutError for "not yet"
        run_local(make_job(name="m"))


@pytest.mark.slow
@pytest.mark.parametrize("script, sig", [("collatz.py", "SIGINT"), ("addition_train.py", "SIGKILL")])
def test_an_interrupted_run_gives_the_numbers_of_an_unbroken_one(volume, script, sig):
    def rows(run):  # as text, for a NaN equals itself there
        return [{k: str(v) for k, v in row.items() if k != "sec"} for row in metrics.read(run)]
    shutil.copy(ROOT / script, train_modal.HERE)
    shutil.copytree(ROOT / "common", train_modal.HERE / "common")
    run_local(make_job("--steps 200 --seed 0", script, name="whole"))
    job = {**make_job("--steps 200 --seed 0", script, name="n"), "commit": "abc123, with changes"}
    folder = volume.committed / job["run"]
    interrupt(job, "step    100 ", sig=signal.Signals[sig])
    run_local(job)
    assert rows(folder) == rows(folder.with_name("whole")) != []
    assert "# container 2: " in volume.text("output.txt", job["run"])
    assert "commit   abc123, with changes" in volume.text("run.txt", job["run"])


# ---- modal run

def test_main_asks_modal_for_what_it_was_asked_for(account, volume, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "abc123")
    train_modal.main("--tracker wandb", gpu="A100-80GB", name="n", timeout_hours=2.5)
    assert (account["gpu"], account["cpu"], account["memory"]) == ("A100-80GB", 2, 8192)
    assert account["timeout"] == 9000 and isinstance(account["secrets"][0], modal.Secret)
    assert "abc123" not in volume.text("modal.json") + volume.text("output.txt")
    out = capsys.readouterr().out
    assert out.startswith("collatz/n on A100-80GB for at most 2.5 hours, and up to 3 times again\n")
    assert out.endswith("to bring it into logs/: modal run train_modal.py --script collatz.py --pull n\n")
    train_modal.main("--text x", "reader.py", gpu="none", name="r")  # it has no --out-dir
    out = capsys.readouterr().out
    assert account["gpu"] is None and "reader/r on a CPU" in out and "has no --out-dir: only what it prints is kept" in out
    assert account["secrets"] == [] and 'words ["--text", "x"]' in volume.text("output.txt", "reader/r")


@pytest.mark.parametrize("script, gpu, n, code", [("collatz.py", "T4", 1, 5), ("ranks.py", "H100:2", 2, 1)])
def test_main_exits_with_code_and_last_lines_of_the_script(account, volume, capsys, script, gpu, n, code):
    up = "(folder / rank).touch() or [time.sleep(0.02) for _ in iter(lambda: len([*folder.glob('[01]')]), 2)]"
    write_script(f"rank and ({up}); print('end', file=sys.stderr); sys.exit(5)", file=script)  # both are up
    with pytest.raises(SystemExit) as e:
        train_modal.main("--text 'a b'", script, gpu, "n")
    out, err = capsys.readouterr()
    assert e.value.code == code and f"{script} ended with exit code {code}" in err and "--pull n" in out
    assert "\nend\n" in err and ("exitcode  : 5" in err) is (n == 2)  # torchrun's report follows
    assert (account["gpu"], account["cpu"], account["memory"]) == (gpu, 2 * n, 8192 * n)
    output = volume.text("output.txt", f"{script[:-3]}/n")
    assert output.count('words ["--text", "a b", "--out-dir"') == n
    assert ("torchrun --standalone --nproc-per-node 2 " in output) is (n == 2)


@pytest.mark.parametrize("flags, message", [
    ({"gpu": "banana"}, "'banana' does not look like a GPU"),
    ({"name": "n"}, "collatz/n is on the Volume already"),
    ({"resume_name": "m"}, "no run 'm' on the Volume"),
    ({"resume_name": "log"}, "has no last.pt"),
    ({"resume_name": "bad"}, "collatz/bad/modal.json on the Volume: damaged"),
    ({"resume_name": "cut"}, "collatz/cut/modal.json on the Volume: damaged"),
    ({"resume_name": ""}, "no run '' on the Volume"),
    ({"pull": ""}, "no run '' on the Volume"),
    ({"pull": "n", "gpu": "T4"}, "--pull: alone"),
    ({"pull": "n", "script": "../x"}, "no run 'n' of ../x"),
    ({"pull": "two"}, "collatz/two, reader/two: which one"),
])
def test_what_cannot_be_run_or_pulled_rents_nothing(account, volume, capsys, flags, message):
    for run in ("collatz/n", "collatz/two", "reader/two", "collatz/bad"):
        write(volume.committed / run, last_pt="1")
    write(volume.committed / "collatz/log", output_txt="")
    write(volume.committed / "collatz/bad", modal_json='{"calls": [null]}')
    write(volume.committed / "collatz/cut", modal_json='{"calls": [')
    with pytest.raises(SystemExit) as e:
        train_modal.main(**flags)
    assert e.value.code.startswith("train_modal.py: error: ") and message in e.value.code
    assert "\n" not in e.value.code and not account and not capsys.readouterr().out


def test_resume_name_finds_script_and_gpu_and_goes_on(account, volume):
    write(volume.committed / "ranks/n", last_pt="4")  # an upload
    train_modal.main(resume_name="n")
    assert account["gpu"] == "T4" and "from step 4 " in volume.text("output.txt", "ranks/n")
    train_modal.main(resume_name="n", gpu="L4")
    train_modal.main(resume_name="n")
    assert account["gpu"] == "L4" and volume.text("last.pt", "ranks/n") == "7"


@pytest.mark.parametrize("outcome, runs", [
    (TimeoutError(), True), (modal.exception.ConnectionError("no line"), True), ([None], False),
    (modal.exception.AuthError("no line"), True), (modal.exception.ServiceError("no line"), True),
    (OSError("no line"), True), (modal.exception.RemoteError(""), False), (modal.exception.OutputExpiredError(), False),
    (CalledProcessError(124, "x", "y"), False), (modal.exception.FunctionTimeoutError(), False),
])
def test_a_run_that_has_not_ended_is_not_resumed(account, volume, monkeypatch, outcome, runs):
    call = Mock(**{"from_id.return_value.get.side_effect": outcome})
    monkeypatch.setattr(modal, "FunctionCall", call)
    calls = [{"call": "1", "modal_id": "fc-1"}, {"call": "2", "modal_id": "fc-2"}]
    write(volume.committed / N, last_pt="1", modal_json=json.dumps({"calls": calls, "exit_code": None}))
    with pytest.raises(SystemExit, match=f"{N} is running still, as fc-2|no line") if runs else nullcontext():
        train_modal.main(resume_name="n", gpu="L4")
    call.from_id.assert_called_once_with("fc-2")
    call.from_id().get.assert_called_once_with(timeout=0)
    assert bool(account) is not runs


@pytest.mark.parametrize("error, text", [
    (modal.exception.AuthError("no token"), "no token"), (RuntimeError("not committed"), "not committed"),
    (modal.exception.RemoteError(""), "RemoteError; was the call cancelled?"),
    (OSError("no line"), "no line; the connection is lost, and with --detach the run goes on (`modal app list`)"),
])
def test_errors_of_modal_are_one_line_and_say_whether_the_run_goes_on(account, monkeypatch, capsys, error, text):
    call = Mock(**{"return_value.spawn.return_value.get.side_effect": error})
    monkeypatch.setattr(train_modal.train, "with_options", call)
    with pytest.raises(SystemExit, match=f"^train_modal.py: error: {re.escape(text)}$"):
        train_modal.main(name="n")
    assert capsys.readouterr().out.endswith("--pull n\n")
    call.return_value.spawn.return_value.get.side_effect = KeyboardInterrupt  # Modal stops the app
    with pytest.raises(KeyboardInterrupt):
        train_modal.main(name="n")


@pytest.mark.parametrize("here, pulled", [
    ({}, True),
    ({"run_txt": "time 1\n", "last_pt": "mine"}, True),
    ({"run_txt": "time 1\ntime 2\ntime 3\n", "last_pt": "mine"}, False),  # it went on at home
    ({"run_txt": "", "last_pt": "mine"}, False),
    ({"output_txt": "line 1\n", "last_pt": "mine"}, True),  # of a script that writes no run.txt
    ({"last_pt": "mine"}, False),
])
def test_pull_overwrites_no_other_run_and_nothing_newer(volume, tmp_path, monkeypatch, capsys, here, pulled):
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    home = tmp_path / "home" / N
    write(home, **here)
    write(volume.committed / N, run_txt="time 1\ntime 2\n", output_txt="line 1\n\n", last_pt="theirs")
    write(volume.committed / N / "pictures", a_png="")
    with nullcontext() if pulled else pytest.raises(SystemExit, match="another run, or has gone on since"):
        train_modal.main(pull="n")
        assert f"the run is in {home}" in capsys.readouterr().out and (home / "pictures/a.png").is_file()
    assert (home / "last.pt").read_text() == ("theirs" if pulled else "mine")


def test_a_pull_that_breaks_off_can_be_repeated(volume, tmp_path, monkeypatch):
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    write(volume.committed / N, run_txt="1", output_txt="x", last_pt="1", last_pt_tmp="half", metrics_csv="")
    lost = Mock(wraps=volume.read_file_into_fileobj, side_effect=[DEFAULT, DEFAULT, OSError("no line")])
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="no line"):
        m.setattr(volume, "read_file_into_fileobj", lost)
        train_modal.main(pull="n")
    home = tmp_path / "home" / N
    assert sorted(p.name for p in home.iterdir()) == ["last.pt.part", "output.txt", "run.txt"]
    train_modal.main(pull="n")
    assert sorted(p.name for p in home.iterdir()) == ["last.pt", "metrics.csv", "output.txt", "run.txt"]


def test_flags_are_known_before_modal_parses_them(volume, monkeypatch):
    assert train_modal.options_of(["--gpu", "L4", "--name=x", "--args"]) == {"gpu": "L4", "name": "x", "args": ""}
    made, from_name = Mock(), modal.Volume.from_name
    monkeypatch.setattr(modal.Volume, "from_name", lambda name, create_if_missing: made(create_if_missing) and from_name(name))
    for words, makes in (("--name x", True), ("--resume-name=n", False), ("--pull nope --script collatz.py", False)):
        monkeypatch.setattr(sys, "argv", ["modal", "run", "train_modal.py::main", *words.split()])
        runpy.run_path(shutil.copy(ROOT / "train_modal.py", train_modal.HERE))
        made.assert_called_with(makes)


def test_modal_run_checks_the_flags_before_it_asks_for_a_token(tmp_path):
    """In a folder that has only what is sent to Modal, which is enough for that."""
    ignored = modal.FilePatternMatcher(*train_modal.NOT_SENT)
    assert ignored(Path(".git/HEAD")) and ignored(Path("logs/collatz/n/last.pt"))
    sent = shutil.copytree(ROOT, tmp_path / "sent", ignore=lambda folder, names: [
        name for name in names if ignored(Path(folder, name).relative_to(ROOT))])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODAL_")}
    environment |= {"HOME": str(tmp_path), "MODAL_CONFIG_PATH": str(tmp_path / "none.toml")}

    def modal_run(*words):
        words = [sys.executable, "-m", "modal", "run", "--detach", *words]
        return subprocess.Popen(words, cwd=sent, env=environment, stdout=PIPE, stderr=STDOUT)
    good = modal_run("train_modal.py", "--args", "--seed 3", "--gpu", "L4", "--timeout-hours", "0.5")
    other = modal_run("train_modal.py", "--seeds", "3")  # which Modal knows better
    bad = modal_run("train_modal.py::main", "--script", "nope.py")
    assert b"modal token new" in good.communicate()[0] and good.returncode == 1
    assert b"No such option" in other.communicate()[0]
    [line] = bad.communicate()[0].splitlines()
    assert line.startswith(b"train_modal.py: error: --script: no script nope.py") and bad.returncode == 1


def test_started_with_python_it_says_how_to_start_it():
    with pytest.raises(SystemExit, match="train_modal.py: error: start it as: modal run"):
        runpy.run_path(str(ROOT / "train_modal.py"), run_name="__main__")
