"""train_modal.py without an account: a Volume of two folders, the body by .local(), the entry point with a fake call."""
import json
import os
import pickle
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import modal
import pytest

import train_modal
from common import metrics
from common.run import UserError
from train_modal import command_of, make_job, script_flags

pytestmark = pytest.mark.filterwarnings("ignore:The train function is executing locally")
ROOT = Path(__file__).parent.parent
COLLATZ = "--steps 50 --pool 2000 --train-seeds 50 --batch-size 32 --eval-trajectories 5 --validation-rows 200 " \
          "--validation-trajectories 5 --quick-eval-interval 5 --eval-interval 50"
ADDITION = "--steps 60 --seeds 0-1 --batch-size 32 --test-size 200 --val-size 100 --eval-every 20"

ECHO = train_modal.echo
TOY = '''
import argparse, json, os, signal, sys, time
from pathlib import Path
def parse_args(argv=None):
    p = argparse.ArgumentParser()
    for flag in ("--out-dir", "--resume", "--init-from", "--tracker", "--name", "--text"):
        p.add_argument(flag)
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--exit", type=int, default=0)
    p.add_argument("--sleep", type=float, default=0)
    return p.parse_args(argv)
if __name__ == "__main__":
    args = parse_args()
    folder = Path(args.out_dir)
    step = int((folder / "last.pt").read_text()) if args.resume else 0
    try:
        sys.stdout.write(f"words {json.dumps(sys.argv[1:])}\\n")  # in one piece: ranks share the pipe
        sys.stdout.write(f"from step {step} commit {os.environ['RUN_COMMIT']} rank {os.environ.get('RANK')}\\n")
        time.sleep(args.sleep)
    finally:
        (folder / "last.pt").write_text(str(step + 1))
    print("bar 1\\rbar 2")
    print("the end", file=sys.stderr)
    sys.exit(args.exit)
'''


class FakeVolume:
    """What is mounted is seen by the container, what is committed by everyone else. `events` says what happened."""

    def __init__(self, mounted: Path, committed: Path):
        self.mounted, self.committed, self.events = mounted, committed, []
        for folder in (mounted, committed):
            folder.mkdir(exist_ok=True)

    def commit(self):
        for file in [p for p in self.mounted.rglob("*") if p.is_file()]:
            with suppress(FileNotFoundError):  # a file that is being replaced
                target = self.committed / file.relative_to(self.mounted)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        self.events.append("commit")

    def reload(self):
        shutil.rmtree(self.mounted)
        shutil.copytree(self.committed, self.mounted)
        self.events.append("reload")

    def listdir(self, path, recursive=False):
        assert (path, recursive) == ("/", True)
        base = self.committed
        kinds = modal.volume.FileEntryType
        return [SimpleNamespace(path=str(p.relative_to(self.committed)), type=kinds.FILE if p.is_file() else kinds.DIRECTORY)
                for p in sorted(base.rglob("*"))]

    def read_file(self, path):
        data = (self.committed / path).read_bytes()
        yield from (data[i:i + 7] for i in range(0, len(data), 7))

    def read_file_into_fileobj(self, path, fileobj):
        return fileobj.write((self.committed / path).read_bytes())


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal, also where pytest was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def volume(tmp_path, monkeypatch):
    fake = FakeVolume(tmp_path / "mounted", tmp_path / "committed")
    monkeypatch.setattr(train_modal, "volume", fake)
    monkeypatch.setattr(train_modal, "LOGS", fake.mounted)
    return fake


@pytest.fixture
def toy(tmp_path, monkeypatch, volume):
    """The folder of the project is one with two small scripts, one of which is for torchrun."""
    here = tmp_path / "project"
    here.mkdir()
    (here / "collatz.py").write_text(TOY)
    (here / "ranks.py").write_text("TORCHRUN = True\n" + TOY)
    (here / "reader.py").write_text(TOY.replace('"--out-dir", "--resume", ', "").replace("args.resume", "0")
                                    .replace("args.out_dir", "'.'"))
    (here / "helper.py").write_text("x = 1\n")
    monkeypatch.setattr(train_modal, "HERE", here)
    monkeypatch.syspath_prepend(here)
    for name in ("collatz", "ranks", "reader"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield here
    for name in ("collatz", "ranks", "reader"):
        sys.modules.pop(name, None)


@pytest.fixture
def account(monkeypatch, volume):
    """The entry point's call runs the body in this process, and what was asked for is kept."""
    asked = {}

    class Call:
        def __init__(self, job):
            self.job = job

        def get(self):
            return train_modal.train.local(pickle.loads(pickle.dumps(self.job)))

    def with_options(**options):
        asked.update(options)
        return SimpleNamespace(spawn=lambda job: asked.update(job=job) or Call(job))

    monkeypatch.setattr(train_modal, "train", SimpleNamespace(local=train_modal.train.local, with_options=with_options))
    return asked


def run_local(job):
    return train_modal.train.local(json.loads(json.dumps(job)))


def output_of(volume, run):
    return (volume.committed / run / "output.txt").read_text()


def record_of(volume, run):
    return json.loads((volume.committed / run / "modal.json").read_text())


def left_over(folder):
    """Processes that still run a script of this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder) in file.read_bytes().decode(errors="replace"):
                found.append(file.parent.name)
    return found


# ---- At home

@pytest.mark.parametrize("wrong, message", [
    ({"script": "nope.py"}, "no script nope.py here; there are collatz.py, ranks.py, reader.py"),
    ({"script": "../collatz.py"}, "no script"),
    ({"script": "collatz"}, "no script"),
    ({"script": "helper.py"}, "no script"),  # nothing to check its flags with
    ({"gpu": "banana"}, "does not look like a GPU"), ({"gpu": "4xH100"}, "look"), ({"gpu": "H100:"}, "look"),
    ({"gpu": "H100:0"}, "look"), ({"gpu": "H100:9"}, "look"), ({"gpu": "H100:two"}, "look"), ({"gpu": "H\u0661\u0660\u0660"}, "look"),
    ({"gpu": "none:2"}, "look"), ({"gpu": "T4,L4"}, "look"),
    ({"gpu": "H100:4"}, "TORCHRUN = True"),
    ({"name": "a/b"}, "is no name of"), ({"name": ".."}, "is no name of"), ({"name": "-x"}, "is no name of"),
    ({"name": "a b"}, "is no name of"), ({"name": "x" * 101}, "is no name of"), ({"args": "--name a/b"}, "is no name of"), ({"resume_name": "../a"}, "is no name of"),
    ({"timeout_hours": 0.05}, "timeout-hours"), ({"timeout_hours": 25}, "timeout-hours"),
    ({"timeout_hours": float("nan")}, "timeout-hours"), ({"timeout_hours": -1}, "timeout-hours"),
    ({"args": "--text 'a"}, "No closing quotation"),
    ({"args": "--out-dir x"}, "not with --out-dir"), ({"args": "--resume=x"}, "not with --resume"),
    ({"name": "a", "resume_name": "b"}, "not together"),
    ({"args": "--tracker wandb"}, "WANDB_API_KEY"),
    ])
def test_bad_flags_are_one_line_before_anything_is_rented(toy, account, capsys, monkeypatch, wrong, message):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=message) as e:
        make_job(**wrong)
    assert "\n" not in str(e.value)
    with pytest.raises(SystemExit) as e:
        train_modal.main(**wrong)
    assert "\n" not in e.value.code and e.value.code.startswith("train_modal.py: error: ")
    assert not account and not capsys.readouterr().out


@pytest.mark.parametrize("script, args, message", [
    ("collatz.py", "--lookahed 20", "collatz.py: error: unrecognized arguments: --lookahed 20"),
    ("collatz.py", "--sees 11", "collatz.py: error: argument --sees"),
    ("collatz.py", "--checkpoint x --model mlp", "collatz.py: error: argument --model"),
    ("addition_train.py", "--preset rope", "addition_train.py: error: argument --preset"),
    ("evaluate_checkpoints.py", "", "evaluate_checkpoints.py: error: the following arguments are required"),
])
def test_flags_that_the_script_refuses_are_refused_at_home(capsys, account, script, args, message):
    program = sys.argv[0]
    with pytest.raises(SystemExit) as e:
        train_modal.main(args=args, script=script)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(message) and err.count("\n") == 1 and sys.argv[0] == program
    assert not account


def test_resume_flags_are_checked_with_the_script_too(capsys, volume):
    with pytest.raises(SystemExit) as e:
        make_job("--init-from logs/collatz/x", resume_name="y")
    assert e.value.code == 2 and "--init-from: not together with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", ["T4", "t4", "L4", "A10", "A10G", "L40S", "A100", "A100-40GB", "A100-80GB", "H100", "H100!",
                                 "H200", "B200", "B200+", "RTX-PRO-6000", "H100:1", "any", "none", "NONE", ""])
def test_gpus_that_modal_knows_are_accepted(toy, volume, gpu):
    assert make_job(gpu=gpu)["ranks"] == 1


@pytest.mark.parametrize("gpu, n", [("H100:4", 4), ("A100-80GB:8", 8), ("H100!:2", 2)])
def test_several_gpus_start_torchrun(toy, volume, gpu, n):
    job = make_job("--seed 3", "ranks.py", gpu)
    words = command_of(job, resume=False)
    assert Path(words[0]).name == "torchrun" and words[1:4] == ["--standalone", "--nproc-per-node", str(n)]
    assert words[4:] == [str(toy / "ranks.py"), "--seed", "3", "--out-dir", str(volume.mounted / job["run"])]


def test_args_alone_runs_collatz_as_in_the_seed_log(volume):
    args = ("--epochs 100000 --layers 2048,1024,1024,512,512,512,256,128,64 --curriculum --ramp-len 50000 --start-seeds 0 "
            "--mine-negatives --mine-interval 10000")
    job = make_job(args)
    assert job["script"] == "collatz.py" and job["flags"] == args.split() and job["ranks"] == 1 and job["resume"] is False
    folder = str(volume.mounted / job["run"])
    assert command_of(job, False) == [sys.executable, str(ROOT / "collatz.py"), *args.split(), "--out-dir", folder]
    assert json.loads(json.dumps(job)) == job and job["seconds"] == 24 * 3600


def test_every_script_of_the_project_can_be_run():
    found = train_modal.scripts()
    assert {"collatz.py", "addition_train.py", "evaluate_checkpoints.py"} <= set(found) and "train_modal.py" not in found
    for script in found:
        text = (ROOT / script).read_text()
        assert "devices.refuse_ranks(SCRIPT)" not in text or train_modal.constant(script, "TORCHRUN", False) is False


def test_name_is_made_once_of_time_and_seed(toy, volume):
    assert make_job()["run"].endswith("-s7") and make_job("--seed 5")["run"].endswith("-s5")
    assert make_job("--name mine")["run"] == "collatz/mine" and make_job("--name mine", name="yours")["run"] == "collatz/yours"
    assert make_job()["call"] != make_job()["call"]


def test_a_retry_leaves_init_from_out_and_a_deliberate_resume_does_not(toy, volume):
    job = make_job("--seed 3 --init-from a.pt --text x=y", name="n")
    folder = str(volume.mounted / "collatz/n")
    end = ["--out-dir", folder, "--resume", folder]
    assert script_flags(job, False) == ["--seed", "3", "--init-from", "a.pt", "--text", "x=y", "--out-dir", folder]
    assert script_flags(job, True) == ["--seed", "3", "--text", "x=y", *end]
    assert script_flags(make_job("--init-from b.pt --init-from=a.pt --text x=y", name="n"), True) == ["--text", "x=y", *end]
    assert script_flags(make_job("--text x", name="n"), True) == ["--text", "x", *end]
    assert script_flags(make_job("--init-from a.pt", resume_name="n"), True) == ["--init-from", "a.pt", *end]


def test_constants_are_read_without_running_the_script(toy):
    (toy / "half.py").write_text("def parse_args(\n\ndef parse_args(")
    assert train_modal.constant("half.py", "EXTRAS", ()) == ()
    (toy / "odd.py").write_text("raise SystemExit\nA, TORCHRUN = 1, 2\nEXTRAS = ('arc', 'sr')\ndef f():\n    TORCHRUN = True\n")
    assert train_modal.constant("odd.py", "EXTRAS", ()) == ("arc", "sr") and train_modal.constant("odd.py", "TORCHRUN", 0) == 0


def test_sent_are_the_files_on_disk_without_logs_caches_and_git():
    ignored = modal.FilePatternMatcher(*train_modal.NOT_SENT)
    for path in (".git/HEAD", ".venv/bin/python", "venv/lib/x.py", "logs/collatz/a/last.pt", "logs/collatz.md", "__pycache__/a.pyc",
                 "common/__pycache__/run.pyc", ".pytest_cache/x", ".hypothesis/x", ".env", "tests/.cache/x", "a.egg-info/PKG-INFO"):
        assert ignored(Path(path)), path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), ROOT / "pyproject.toml"]:
        assert not ignored(path.relative_to(ROOT)), path
    assert not ignored(Path("mine.py")) and not ignored(Path("data/rows.csv")) and not ignored(Path("common/logs.py"))


def test_what_is_sent_is_enough(tmp_path):
    ignored = modal.FilePatternMatcher(*train_modal.NOT_SENT)
    shutil.copytree(ROOT, tmp_path / "sent", ignore=lambda folder, names: [
        name for name in names if ignored(Path(folder, name).relative_to(ROOT))])
    code = "import train_modal as t; print(t.make_job('--steps 3')['run'], t.extras, *t.scripts())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "sent", capture_output=True, text=True)
    assert done.stdout.startswith("collatz/") and "evaluate_checkpoints.py" in done.stdout, done.stderr


def test_the_container_is_made_of_pyproject_files_and_volume():
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for script in train_modal.scripts():
        assert set(train_modal.constant(script, "EXTRAS", ())) <= set(project["optional-dependencies"]), script
    asked = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(modal.Image, "pip_install_from_pyproject", lambda self, path, **k: asked.update(pyproject=path, **k) or self)
        m.setattr(modal.Image, "add_local_dir", lambda self, *words, **k: asked.update(sent=words, **k) or self)
        m.setattr(modal.Image, "apt_install", lambda self, *words: asked.update(apt=words) or self)
        m.setattr(modal.App, "function", lambda self, **k: asked.update(k) or (lambda body: body))
        namespace = runpy.run_path(str(ROOT / "train_modal.py"))
    extras = {"trackers"}.union(*(train_modal.constant(s, "EXTRAS", ()) for s in train_modal.scripts()))
    assert asked["pyproject"] == str(ROOT / "pyproject.toml") and set(asked["optional_dependencies"]) == extras
    assert asked["sent"] == (ROOT, "/root") and asked["ignore"] is namespace["NOT_SENT"]
    assert asked["image"] is namespace["image"] and asked["volumes"] == {"/root/logs": namespace["volume"]}
    assert asked["scaledown_window"] == 5 and asked["apt"] == ("g++",)
    assert asked["timeout"] == 24 * 3600 and asked["retries"].max_retries == 3 and asked["cpu"] >= 2
    toml = pytest.importorskip("toml")  # Modal's parser; an old one, that stumbles over some comments
    assert toml.load(ROOT / "pyproject.toml")["project"] == project


def test_what_comes_out_of_git_is_recorded(toy, volume, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=toy, check=True, capture_output=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1"), monkeypatch.setenv("GIT_CONFIG_KEY_0", "color.ui")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    assert make_job()["diff"] == ""  # no git here
    git("init"), git("add", "."), git("commit", "-m", "x")
    assert make_job()["diff"] == ""
    (toy / "helper.py").write_text("x = 2\n")
    job = make_job(name="n")
    (toy / "new.py").write_text("")
    job = make_job(name="n")
    assert "\n+x = 2" in job["diff"] and "?? new.py" in job["diff"] and "\33" not in job["diff"]
    run_local(job)
    assert "+x = 2" in (volume.committed / "collatz/n/changes.diff").read_text()
    assert f"commit {job['commit']} rank" in output_of(volume, "collatz/n")
    git("add", "."), git("commit", "-m", "y")
    later = {**make_job(resume_name="n"), "commit": "later"}
    run_local(later)  # what is known of the first part stays
    changes = (volume.committed / "collatz/n/changes.diff").read_text()
    assert "+x = 2" in changes and changes.endswith("# later\n")
    assert [call["commit"] for call in record_of(volume, "collatz/n")["calls"]] == [job["commit"], "later"]


# ---- In the container

@pytest.mark.parametrize("text", ["a b", "x=y,z", 'say "hi"', "it's", "$HOME `ls` ; rm -rf", "tab\there", "[1, 2]*", "ümlaut", "a\nb", ""])
def test_quotes_and_signs_in_args_survive(toy, volume, text):
    run_local(make_job(f"--text {shlex.quote(text)} --seed=4", name="n"))
    words = json.loads(next(x for x in output_of(volume, "collatz/n").splitlines() if x.startswith("words"))[6:])
    assert words[:3] == ["--text", text, "--seed=4"]


def test_a_run_is_committed_before_and_after(toy, volume, capsys):
    seen = []
    commit = volume.commit
    volume.commit = lambda: (commit(), seen.append(sorted(p.name for p in (volume.committed / "collatz/n").iterdir())))
    assert run_local(make_job(name="n")) is None
    assert volume.events[0] == "reload" and seen[0] == ["modal.json", "output.txt"]
    assert seen[-1] == ["last.pt", "modal.json", "output.txt"]
    record = record_of(volume, "collatz/n")
    assert record["exit_code"] == 0 and record["containers"] == 1 and record["last_lines"][-2:] == ["bar 2", "the end"]
    assert output_of(volume, "collatz/n").startswith("# container 1: ") and "the end\n" in capsys.readouterr().out


def test_a_failing_script_fails_the_call_and_is_not_run_again(toy, volume):
    job = make_job("--exit 3", name="n")
    with pytest.raises(CalledProcessError) as e:
        run_local(job)
    assert e.value.returncode == 3 and e.value.output.endswith("bar 2\nthe end") and len(e.value.output.splitlines()) < 25
    assert volume.events[-1] == "commit" and record_of(volume, "collatz/n")["exit_code"] == 3
    assert (volume.committed / "collatz/n/last.pt").read_text() == "1"
    with pytest.raises(CalledProcessError) as again:  # Modal's retry
        run_local(job)
    assert again.value.args == e.value.args and (volume.committed / "collatz/n/last.pt").read_text() == "1"
    copy = pickle.loads(pickle.dumps(e.value))
    assert copy.returncode == 3 and copy.output == e.value.output


def test_a_script_killed_by_a_signal_fails_as_in_a_shell(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace('print("bar', 'os.kill(os.getpid(), signal.SIGKILL); print("bar'))
    with pytest.raises(CalledProcessError) as e:
        run_local(make_job(name="n"))
    assert e.value.returncode == 137


def test_a_finished_call_is_not_run_again(toy, volume):
    job = make_job(name="n")
    run_local(job)
    run_local(job)
    assert output_of(volume, "collatz/n").count("# container") == 1


def test_a_new_run_never_picks_up_an_old_folder(toy, volume):
    run_local(make_job(name="n"))
    with pytest.raises(UserError, match="collatz/n is on the Volume already"):
        run_local(make_job(name="n"))
    (volume.committed / "collatz/old").mkdir()
    (volume.committed / "collatz/old/last.pt").write_text("4")  # of an upload, without a record
    with pytest.raises(UserError, match="on the Volume already"):
        run_local(make_job(name="old"))
    assert (volume.committed / "collatz/n/last.pt").read_text() == "1"


def test_a_container_that_dies_at_its_very_start_has_claimed_the_folder(toy, volume, monkeypatch):
    job = {**make_job(name="n"), "diff": "+x"}

    def gone(*_, **__):
        raise OSError("gone")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train_modal, "command_of", gone)
        with pytest.raises(OSError, match="gone"):
            run_local(job)
    volume.commit()  # Modal commits now and then on its own
    run_local(job)
    assert record_of(volume, "collatz/n")["exit_code"] == 0


def test_resume_name_goes_on_with_an_old_folder_on_purpose(toy, volume):
    run_local(make_job(name="n"))
    run_local(make_job(resume_name="n"))
    assert "from step 1 " in output_of(volume, "collatz/n") and (volume.committed / "collatz/n/last.pt").read_text() == "2"
    with pytest.raises(UserError, match="collatz/m has no last.pt"):
        run_local(make_job(resume_name="m"))


def test_a_run_that_began_at_home_goes_on_at_modal_and_comes_back(toy, account, volume, monkeypatch, tmp_path):
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    home = tmp_path / "home/collatz/n"
    home.mkdir(parents=True)
    (home / "last.pt").write_text("4"), (home / "run.txt").write_text("begun\n")
    shutil.copytree(home, volume.committed / "collatz/n")  # modal volume put
    monkeypatch.setattr(train_modal, "LOGS", volume.mounted)
    train_modal.main(resume_name="n")
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    train_modal.main(pull="n")
    assert (home / "last.pt").read_text() == "5"


def preempt(volume, job, seen, n=1):
    """Run the job and send this process Ctrl-C as soon as the script's output has `seen` n times."""
    log = volume.mounted / job["run"] / "output.txt"

    ended = threading.Event()

    def wait():
        while not ended.wait(0.02):
            if log.is_file() and log.read_text().count(seen) >= n:
                return os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=wait, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_local(job)
    finally:
        ended.set()


def test_a_preempted_container_saves_and_the_next_one_goes_on(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "time.sleep(0 if args.resume else 60)"))
    job = make_job("--init-from w.pt", name="n")
    preempt(volume, job, "from step")
    assert record_of(volume, "collatz/n")["exit_code"] is None and (volume.committed / "collatz/n/last.pt").read_text() == "1"
    run_local(job)
    record = record_of(volume, "collatz/n")
    assert record["containers"] == 2 and record["exit_code"] == 0 and (volume.committed / "collatz/n/last.pt").read_text() == "2"
    assert "--init-from" not in output_of(volume, "collatz/n").split("# container 2")[1]


def test_preempted_before_the_first_checkpoint_starts_anew(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace("    finally:\n        (", "    finally:\n        args.sleep < 60 and ("))
    job = make_job("--sleep 60", name="n")
    preempt(volume, job, "from step")
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "pass"))
    run_local(job)
    assert output_of(volume, "collatz/n").count("from step 0") == 2


def test_a_script_that_does_not_end_is_killed(toy, volume, monkeypatch):
    monkeypatch.setattr(train_modal, "GRACE", 0.3)
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "signal.signal(signal.SIGINT, signal.SIG_IGN), "
                                                                            "print('deaf', flush=True), time.sleep(60)"))
    start = time.monotonic()
    preempt(volume, make_job(name="n"), "deaf")
    assert time.monotonic() - start < 20 and volume.events[-1] == "commit" and not left_over(toy)


def test_there_is_time_for_the_last_commit_before_a_preempted_container_goes():
    assert train_modal.GRACE + 2 + 5 < 30 and train_modal.MARGIN / 2 >= 60 and train_modal.COMMIT_EVERY <= 60


@pytest.mark.parametrize("deaf", [False, True])
def test_ranks_of_torchrun_save_and_none_is_left(toy, volume, monkeypatch, deaf):
    """Each rank has a session of its own; one that lived on would write over the checkpoints of the next container."""
    if deaf:
        monkeypatch.setattr(train_modal, "GRACE", 0.5)
        ignore = "[signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)], "
    else:
        ignore = ""
    (toy / "ranks.py").write_text("TORCHRUN = True\n" + TOY.replace("time.sleep(args.sleep)", f"{ignore}time.sleep(60)"))
    preempt(volume, make_job("", "ranks.py", "H100:2", "n"), "from step", 2)
    assert not left_over(toy) and (volume.committed / "ranks/n/last.pt").exists() is not deaf
    assert threading.active_count() < 10


def test_a_child_of_the_script_that_lives_on_is_ended(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "__import__('subprocess').Popen("
                                                "[sys.executable, '-c', 'import time; time.sleep(60)', __file__], start_new_session=True)"))
    start = time.monotonic()
    run_local(make_job(name="n"))
    assert not left_over(toy) and time.monotonic() - start < 10


def test_the_script_goes_on_when_its_output_cannot_be_written(toy, volume, monkeypatch):
    monkeypatch.setattr(train_modal, "echo", lambda child, log, tail: ECHO(child, Path("/dev/full"), tail))
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "[print('x' * 1000) for _ in range(500)]"))
    run_local({**make_job(name="n"), "seconds": 20})
    assert record_of(volume, "collatz/n")["last_lines"][-1] == "the end"


def test_what_the_script_finds_in_the_container(toy, volume, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "print('found', *[os.environ[k] for k in "
        "('PYTHONUNBUFFERED', 'TORCH_ELASTIC_SHUTDOWN_TIMEOUT')], os.getsid(0) == os.getpid(), os.getcwd(), flush=True), "
        "os.write(1, b'\\xff\\n')"))
    run_local(make_job(name="n"))
    output = (volume.committed / "collatz/n/output.txt").read_bytes()
    assert f"found 1 15 True {toy}\n".encode() in output and "\ufffd\n".encode() in output and b"bar 1\rbar 2\n" in output


def test_before_the_timeout_the_script_saves_and_the_retry_goes_on(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "time.sleep(0 if args.resume else 60)"))
    job = {**make_job(name="n"), "seconds": 2}
    with pytest.raises(CalledProcessError) as e:
        run_local(job)
    assert e.value.returncode == 124 and e.value.output.endswith("hours are over; a retry, or --resume-name, goes on from last.pt")
    assert not isinstance(e.value, TimeoutError)  # which last_call would take for "not yet"
    assert record_of(volume, "collatz/n")["exit_code"] is None
    run_local(job)
    assert record_of(volume, "collatz/n")["exit_code"] == 0 and (volume.committed / "collatz/n/last.pt").read_text() == "2"


def test_a_script_that_takes_the_end_of_its_time_for_success_goes_on_too(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace("time.sleep(args.sleep)", "time.sleep(0 if args.resume else 60)")
                                    .replace("    finally:", "    except KeyboardInterrupt:\n        pass\n    finally:"))
    with pytest.raises(CalledProcessError) as e:
        run_local({**make_job(name="n"), "seconds": 2})
    assert e.value.returncode == 124


def test_the_script_is_told_before_a_slow_volume_eats_its_time(toy, volume, monkeypatch):
    commit = volume.commit
    monkeypatch.setattr(volume, "commit", lambda: (time.sleep(2), commit()))
    (toy / "collatz.py").write_text(TOY.replace("    finally:", "    finally:\n        print('told', time.time(), flush=True)"))
    start = time.time()
    with pytest.raises(CalledProcessError):
        run_local({**make_job("--sleep 60", name="n"), "seconds": 5})
    told = float(output_of(volume, "collatz/n").split("told ")[1].split()[0]) - start
    assert 3.9 < told < 5.9  # of 5 s, less a fifth; with a commit first it would be 6


def test_preempted_while_it_saves_it_is_not_told_again(toy, volume):
    (toy / "collatz.py").write_text(TOY.replace("    finally:", "    finally:\n        print('saving', flush=True)\n        time.sleep(1)"))
    preempt(volume, {**make_job("--sleep 60", name="n"), "seconds": 4}, "saving")
    assert (volume.committed / "collatz/n/last.pt").read_text() == "1"


def test_a_lost_connection_to_the_volume_is_no_timeout_error(toy, volume, monkeypatch):
    monkeypatch.setattr(volume, "reload", lambda: (_ for _ in ()).throw(TimeoutError("late")))
    with pytest.raises(RuntimeError, match="timed out: late"):
        run_local(make_job(name="n"))


def test_a_timeout_without_a_checkpoint_is_a_failure(toy, volume):
    job = {**make_job("--sleep 60", "reader.py", name="n"), "seconds": 2}
    with pytest.raises(CalledProcessError) as e:
        run_local(job)
    assert e.value.output.endswith("hours are over")
    assert record_of(volume, "reader/n")["exit_code"] in (1, 130)


def test_the_volume_is_committed_during_the_run_and_survives_a_failed_commit(toy, volume, monkeypatch, capsys):
    monkeypatch.setattr(train_modal, "COMMIT_EVERY", 0.2)
    commit, calls = volume.commit, []

    def sometimes():
        calls.append(time.monotonic())
        if len(calls) == 2:
            raise RuntimeError("no connection")
        commit()
    volume.commit = sometimes
    run_local(make_job("--sleep 1.5", name="n"))
    assert len(calls) >= 5 and "could not be committed, trying again: no connection" in capsys.readouterr().out
    assert record_of(volume, "collatz/n")["exit_code"] == 0


def test_a_failed_last_commit_is_not_hidden(toy, volume, monkeypatch):
    commit = volume.commit
    volume.commit = lambda: commit() if not (volume.mounted / "collatz/n/last.pt").exists() else (_ for _ in ()).throw(RuntimeError("full"))
    with pytest.raises(RuntimeError, match="full"):
        run_local(make_job(name="n"))


def test_two_ranks_run_through_torchrun(toy, volume):
    run_local(make_job("--text 'a b'", "ranks.py", "H100:2", "n"))
    output = output_of(volume, "ranks/n")
    assert "rank 0" in output and "rank 1" in output and output.count('words ["--text", "a b", "--out-dir"') == 2


def test_a_failing_rank_fails_the_call(toy, volume):
    with pytest.raises(CalledProcessError) as e:
        run_local(make_job("--exit 3", "ranks.py", "H100:2", "n"))
    assert e.value.returncode == 1  # torchrun's own; the rank's is in its report
    assert "exitcode  : 3" in e.value.output and "the end" in e.value.output.split("torch")[0]  # before torchrun's report


def test_a_script_without_run_folder_runs_with_its_own_flags(toy, volume):
    run_local(make_job("--text x", "reader.py", name="n"))
    assert 'words ["--text", "x"]' in output_of(volume, "reader/n")
    (toy / "last.pt").unlink()


@pytest.fixture
def clone(tmp_path, monkeypatch, volume):
    """The project without .git, as the container has it."""
    here = tmp_path / "clone"
    shutil.copytree(ROOT / "common", here / "common")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, here)
    monkeypatch.setattr(train_modal, "HERE", here)
    return here


def columns(folder):
    return [{k: str(v) for k, v in row.items() if k != "sec"} for row in metrics.read(folder)]  # a NaN equals itself


def test_collatz_runs_and_says_where_its_code_comes_from(clone, volume):
    run_local({**make_job(COLLATZ, name="n"), "commit": "abc123, with changes"})
    folder = volume.committed / "collatz/n"
    assert {"summary.json", "metrics.csv", "last.pt", "best.pt", "collatz.py", "trajectories.png", "output.txt"} <= {
        p.name for p in folder.iterdir()}
    assert "commit   abc123, with changes" in (folder / "run.txt").read_text()
    assert "of 429 violations" in record_of(volume, "collatz/n")["last_lines"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_gives_the_numbers_of_an_unbroken_one(clone, volume, tmp_path, killed):
    """Preempted as Modal does it, or the whole container gone at once: then what was committed is what there is."""
    flags = COLLATZ.replace("--steps 50", "--steps 600").replace("--eval-interval 50", "--eval-interval 600")
    subprocess.run([sys.executable, str(ROOT / "collatz.py"), *flags.split(), "--out-dir", str(tmp_path / "whole")],
                   check=True, capture_output=True)
    job = make_job(flags, name="n")
    reached = "step    100 "
    if killed:
        driver = f"""import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import json, train_modal, test_train_modal as t
from pathlib import Path
volume = t.FakeVolume(Path({str(volume.mounted)!r}), Path({str(volume.committed)!r}))
train_modal.volume, train_modal.LOGS, train_modal.HERE = volume, volume.mounted, Path({str(clone)!r})
train_modal.COMMIT_EVERY = 0.2
train_modal.train.local(json.loads({json.dumps(job)!r}))"""
        body = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = volume.mounted / "collatz/n/output.txt"
        while not (log.is_file() and reached in log.read_text()):
            assert body.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{body.pid}/task/{body.pid}/children").read_text().split()
        for pid in (body.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        body.wait()
    else:
        preempt(volume, job, reached)
        assert "stopped at step" in output_of(volume, "collatz/n")
    folder = volume.committed / "collatz/n"
    assert not (folder / "summary.json").exists() and record_of(volume, "collatz/n")["exit_code"] is None
    run_local(job)
    assert columns(folder) == columns(tmp_path / "whole") and record_of(volume, "collatz/n")["containers"] == 2
    whole, summary = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "whole", folder))
    assert summary["violations_total"] == whole["violations_total"] and summary["pass_rate"] == whole["pass_rate"]


def test_addition_runs_and_what_was_not_committed_is_run_again(clone, volume):
    job = make_job(ADDITION, "addition_train.py", name="n")
    run_local(job)
    folder = volume.committed / "addition_train/n"
    assert json.loads((folder / "summary.json").read_text())["n_seeds"] == 2
    first = columns(folder)
    (folder / "summary.json").unlink()  # as if the container had died before its last commit
    (folder / "modal.json").write_text(json.dumps({**record_of(volume, "addition_train/n"), "exit_code": None}))
    run_local(job)
    assert columns(folder) == first and (folder / "summary.json").is_file()


def test_evaluate_checkpoints_runs_on_what_the_volume_has(clone, volume):
    shutil.copytree(ROOT / "logs/kept/addition_train/rope122", volume.committed / "addition_train/rope122")
    (clone / "logs").symlink_to(volume.mounted)  # as the container sees it
    run_local(make_job("logs/addition_train/rope122 --n 100", "evaluate_checkpoints.py", name="n"))
    assert "1000/1000" in output_of(volume, "evaluate_checkpoints/n").replace(",", "")


# ---- modal run

def test_main_rents_what_was_asked_for(toy, account, volume, capsys):
    train_modal.main(args="--seed 3", gpu="A100-80GB", name="n", timeout_hours=2.5)
    assert account["gpu"] == "A100-80GB" and account["timeout"] == 9000 and account["secrets"] == []
    assert account["cpu"] == 2 and account["memory"] == 8192
    out = capsys.readouterr().out
    assert out.startswith("collatz/n on A100-80GB for at most 2.5 hours, and up to 3 times again\n")
    assert out.endswith("to bring it into logs/: modal run train_modal.py --script collatz.py --pull n\n")
    train_modal.main(gpu="none", name="m")
    assert account["gpu"] is None and "collatz/m on a CPU for" in capsys.readouterr().out
    train_modal.main(script="ranks.py", gpu="H100:2", name="n")
    assert account["cpu"] == 4 and account["memory"] == 16384 and account["gpu"] == "H100:2"


def test_main_exits_with_the_scripts_code_and_last_lines(toy, account, capsys):
    with pytest.raises(SystemExit) as e:
        train_modal.main(args="--exit 5", name="n")
    out, err = capsys.readouterr()
    assert e.value.code == 5 and "collatz.py ended with exit code 5" in err and "the end" in err and "--pull n" in out


def test_main_refuses_a_name_that_is_taken_and_a_run_that_is_not_there(toy, account, volume):
    train_modal.main(name="n")
    train_modal.main(name="r", script="reader.py")
    (volume.committed / "collatz/l").mkdir()
    (volume.committed / "collatz/l/output.txt").write_text("")
    account.clear()
    for flags, message in (({"name": "n"}, "on the Volume already"), ({"resume_name": "m"}, "no run m on the Volume"),
                           ({"resume_name": "n", "script": "ranks.py"}, "no run n of ranks.py"),
                           ({"resume_name": "r"}, "leaves no checkpoint"), ({"resume_name": "l"}, "has no last.pt")):
        with pytest.raises(SystemExit, match=message):
            train_modal.main(**flags)
        assert not account
    train_modal.main(resume_name="n")
    assert "from step 1" in output_of(volume, "collatz/n")


def test_resume_name_finds_script_and_gpu(toy, account, volume):
    train_modal.main(script="ranks.py", gpu="H100:2", name="n")
    train_modal.main(script="collatz.py", gpu="none", name="m")
    train_modal.main(resume_name="n")
    assert account["gpu"] == "H100:2" and account["job"]["script"] == "ranks.py"
    train_modal.main(resume_name="m")
    assert account["gpu"] is None
    train_modal.main(resume_name="m", gpu="L4")
    assert account["gpu"] == "L4"


@pytest.mark.parametrize("outcome", [TimeoutError(), modal.exception.ConnectionError("no line"), CalledProcessError(124, "x", "y"),
                                     modal.exception.OutputExpiredError(), modal.exception.FunctionTimeoutError(), None])
def test_a_run_that_has_not_ended_is_not_resumed(toy, account, volume, monkeypatch, outcome):
    asked = []

    class Call:
        def get(self, timeout):
            if outcome:
                raise outcome
    monkeypatch.setattr(modal, "FunctionCall", SimpleNamespace(from_id=lambda id: asked.append(id) or Call()))
    monkeypatch.setattr(modal, "current_function_call_id", lambda: "fc-1")
    train_modal.main(name="n")
    if isinstance(outcome, (TimeoutError, modal.exception.ConnectionError)):
        account.clear()
        with pytest.raises(SystemExit, match="collatz/n is running still, as fc-1|no line"):
            train_modal.main(resume_name="n", gpu="L4")
        assert not account
    else:
        train_modal.main(resume_name="n")
    assert asked == ["fc-1"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"calls": [', '{"calls": [{"id": null}]}', '{"calls": 3}', ""])
def test_a_damaged_record_is_one_line(toy, account, volume, text):
    (volume.committed / "collatz/n").mkdir(parents=True)
    (volume.committed / "collatz/n/modal.json").write_text(text)
    (volume.committed / "collatz/n/last.pt").write_text("1")
    with pytest.raises(SystemExit, match="collatz/n/modal.json on the Volume is damaged"):
        train_modal.main(resume_name="n")
    with pytest.raises(UserError, match="damaged"):
        run_local(make_job(resume_name="n"))
    assert not account


def test_an_empty_name_rents_nothing(toy, account):
    for flags in ({"pull": ""}, {"resume_name": ""}):
        with pytest.raises(SystemExit, match="'' is no name of a run"):
            train_modal.main(**flags)
    assert not account


def test_the_wandb_key_is_passed_on_when_it_is_asked_for(toy, account, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abc123")
    train_modal.main(args="--tracker wandb", name="n")
    assert len(account["secrets"]) == 1 and isinstance(account["secrets"][0], modal.Secret)
    assert "abc123" not in json.dumps(account["job"])
    train_modal.main(name="m")
    assert account["secrets"] == []


def test_ctrl_c_reaches_modal_so_that_detached_runs_go_on(toy, account, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_modal, "train", SimpleNamespace(with_options=interrupted))
    with pytest.raises(KeyboardInterrupt):
        train_modal.main(name="n")


@pytest.mark.parametrize("error", [modal.exception.AuthError("Token missing"), modal.exception.FunctionTimeoutError("late"),
                                   RuntimeError("could not be committed"), UserError("taken")])
def test_errors_of_modal_are_one_line(toy, account, monkeypatch, error):
    def fail(**_):
        raise error
    monkeypatch.setattr(train_modal, "train", SimpleNamespace(with_options=fail))
    with pytest.raises(SystemExit) as e:
        train_modal.main(name="n")
    assert e.value.code == f"train_modal.py: error: {error}"


def test_pull_brings_a_run_home_and_knows_it_again(toy, account, volume, monkeypatch, tmp_path, capsys):
    train_modal.main(name="n")
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    train_modal.main(pull="n")
    home = tmp_path / "home/collatz/n"
    assert f"the run is in {home}" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in home.iterdir()} == {
        p.name: p.read_bytes() for p in (volume.committed / "collatz/n").iterdir()}
    monkeypatch.setattr(train_modal, "LOGS", volume.mounted)
    train_modal.main(resume_name="n")
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    train_modal.main(pull="n", script="collatz.py")  # the same run, grown
    assert (home / "last.pt").read_text() == "2" and "container 1" in (home / "output.txt").read_text()


def test_pull_overwrites_nothing_newer(toy, account, volume, monkeypatch, tmp_path):
    home = tmp_path / "home/collatz/n"
    train_modal.main(name="n")
    (volume.committed / "collatz/n/run.txt").write_text("time 1\n")
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    train_modal.main(pull="n")
    (home / "run.txt").write_text("time 1\ntime 2\n")  # it went on at home
    (home / "last.pt").write_text("newer")
    with pytest.raises(SystemExit, match="or has gone on since"):
        train_modal.main(pull="n")
    assert (home / "last.pt").read_text() == "newer"
    (volume.committed / "collatz/n/run.txt").write_text("time 1\ntime 2\ntime 3\n")  # and then at Modal
    train_modal.main(pull="n")
    assert (home / "last.pt").read_text() == "1"


def test_pull_that_breaks_off_can_be_repeated(toy, account, volume, monkeypatch, tmp_path):
    train_modal.main(name="n")
    (volume.committed / "collatz/n/run.txt").write_text("time 1\n")
    (volume.committed / "collatz/n/last.pt.tmp").write_text("half")
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    home, read = tmp_path / "home/collatz/n", FakeVolume.read_file_into_fileobj

    def broken(self, path, fileobj):
        read(self, path, fileobj)
        if path.endswith("last.pt"):
            raise OSError("connection lost")
    monkeypatch.setattr(FakeVolume, "read_file_into_fileobj", broken)
    with pytest.raises(SystemExit, match="connection lost"):
        train_modal.main(pull="n")
    assert not (home / "last.pt").exists() and (home / "run.txt").exists()
    monkeypatch.setattr(FakeVolume, "read_file_into_fileobj", read)
    train_modal.main(pull="n")
    assert sorted(p.name for p in home.iterdir()) == ["last.pt", "modal.json", "output.txt", "run.txt"]


def test_pull_overwrites_no_other_run(toy, account, volume, monkeypatch, tmp_path):
    train_modal.main(name="n")
    (volume.committed / "collatz/n/run.txt").write_text("time 1\n")
    monkeypatch.setattr(train_modal, "LOGS", tmp_path / "home")
    home = tmp_path / "home/collatz/n"
    home.mkdir(parents=True)
    for name, text in (("last.pt", "mine"), ("output.txt", "mine"), ("run.txt", "")):
        (home / name).write_text(text)
        with pytest.raises(SystemExit, match="holds another run"):
            train_modal.main(pull="n")
        assert (home / "last.pt").read_text() == "mine"


def test_pull_of_what_is_not_there_or_not_clear(toy, account, volume):
    for wrong, message in (({"pull": "../n"}, "is no name"), ({"pull": "a/b"}, "is no name"), ({"pull": ".."}, "is no name"),
                           ({"pull": "n", "gpu": "T4"}, "alone"), ({"pull": "n", "script": "../x"}, "no run n of ../x")):
        with pytest.raises(SystemExit, match=message):
            train_modal.main(**wrong)
    with pytest.raises(SystemExit, match="no run n on the Volume"):
        train_modal.main(pull="n")
    run_local(make_job(name="n"))
    run_local(make_job(name="n", script="reader.py"))
    with pytest.raises(SystemExit, match="collatz/n, reader/n: which one"):
        train_modal.main(pull="n")


def modal_run(monkeypatch, *words):
    """`modal run train_modal.py ...` in process, with everything of Modal's but the connection."""
    from modal.cli.entry_point import entrypoint_cli
    asked = {}

    def with_options(self, **options):
        asked.update(options)
        return SimpleNamespace(spawn=lambda job: asked.update(job=job) or SimpleNamespace(get=lambda: None))

    monkeypatch.setattr("modal.cli.run.run_app", lambda *a, **k: nullcontext())
    monkeypatch.setattr(modal.Function, "with_options", with_options)
    monkeypatch.setattr(modal.Volume, "listdir", lambda *a, **k: [])
    monkeypatch.setitem(sys.modules, "train_modal", train_modal)  # imported anew by the command; put back at the end
    monkeypatch.setattr(sys, "argv", ["modal", "run", *words])
    try:
        entrypoint_cli(["run", *words], standalone_mode=False)
    except SystemExit as e:
        asked["exit"] = e.code
    return asked


def test_modal_run_reads_the_flags(monkeypatch, capsys):
    path = str(ROOT / "train_modal.py")
    asked = modal_run(monkeypatch, "--detach", path, "--args", "--seed 3 --layers '32,32'", "--gpu", "L4", "--name", "n=1",
                      "--timeout-hours", "0.5")
    assert "exit" not in asked and asked["gpu"] == "L4" and asked["timeout"] == 1800
    assert asked["job"]["flags"] == ["--seed", "3", "--layers", "32,32"] and asked["job"]["run"] == "collatz/n=1"
    assert modal_run(monkeypatch, path + "::main", "--args", "--curriculum")["job"]["flags"] == ["--curriculum"]
    asked = modal_run(monkeypatch, path, "--args", "--no-such 3")
    assert asked == {"exit": 2} and "collatz.py: error: unrecognized arguments" in capsys.readouterr().err
    asked = modal_run(monkeypatch, path, "--script", "nope.py")
    assert list(asked) == ["exit"] and "no script nope.py" in asked["exit"]


@pytest.mark.parametrize("flags, code, message", [
    (["--args", "--steps 3", "--timeout-hours", "2"], 1, "modal token new"),
    (["--script", "nope.py"], 1, "train_modal.py: error: --script: no script nope.py here; there are addition_train.py, "),
    (["--timeout-hours", "soon"], 2, "Invalid value for '--timeout-hours'"),
    (["--nope", "3"], 2, "No such option"), (["--args"], 2, "Option '--args' requires an argument"),
    (["--help"], 0, "--resume-name"),
])
def test_modal_run_without_a_token_checks_the_flags_first(tmp_path, flags, code, message):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODAL_")} | {
        "HOME": str(tmp_path), "MODAL_CONFIG_PATH": str(tmp_path / "none.toml")}
    done = subprocess.run([sys.executable, "-m", "modal", "run", "--detach", str(ROOT / "train_modal.py"), *flags],
                          env=environment, capture_output=True, text=True, timeout=60)
    output = done.stdout + done.stderr
    assert done.returncode == code and message in output and ("Token" in output) is ("token" in message)
    assert "train_modal.py: error" not in message or output.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    (["--args=--exit three"], "argument --exit"), (["--gpu", "banana"], "'banana' does not look like a GPU"),
    (["--name=a/b"], "'a/b' is no name"), (["--timeout-hours", "99"], "--timeout-hours: 99"),
    (["--resume-name", "n", "--script", "reader.py"], "leaves no checkpoint"),
    (["--seeds", "3"], ""), (["--timeout-hours", "soon"], ""), (["--timeout-hours", "1.2.3"], ""), (["--args"], ""),
    (["--pull", "n"], ""), (["--help"], ""), (["--resume-name", "n", "--args", "--of another"], ""), ([], ""),
])
def test_early_check_leaves_to_modal_and_the_volume_what_they_know_better(toy, volume, capsys, flags, message):
    if message:
        with pytest.raises(SystemExit) as e:
            train_modal.check_early(flags)
        assert message in f"{e.value.code} {capsys.readouterr().err}"
    else:
        train_modal.check_early(flags)


def test_started_with_python_it_says_how_to_start_it():
    done = subprocess.run([sys.executable, str(ROOT / "train_modal.py"), "--args", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("train_modal.py: error: start it as: modal run")
