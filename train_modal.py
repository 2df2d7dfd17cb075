"""Run any script of this folder on a rented GPU, with the flags that it takes at home, and bring its run folder back.

    pip install -e ".[modal]" && modal setup                   # once; needs an account at modal.com
    modal run --detach train_modal.py --args "--epochs 100000 --curriculum --ramp-len 50000"   # collatz.py on a T4
    modal run train_modal.py --script addition_train.py --args "--seeds 0-63" --gpu L4 --name sixty-four
    modal run train_modal.py --script addition_train.py --resume-name sixty-four               # go on from its last.pt
    modal run train_modal.py --pull sixty-four                 # into logs/addition_train/sixty-four

--gpu: T4 (default), L4, A100-80GB, H100, ...; H100:4 for a script that declares `TORCHRUN = True`; `none` for a CPU.
The container has the files of this folder (without logs, hidden files and caches) and a Modal Volume as its logs/, so
that paths in --args mean the same there as here. A script that declares `EXTRAS = ("name",)` gets that extra of
pyproject.toml. A run folder has more files than at home: output.txt, modal.json, and changes.diff if git saw changes.

A container that is preempted, crashes or comes to the end of --timeout-hours is followed by another one (after a
timeout: at most 3), which goes on from last.pt. A script that fails is not started again.

Tests run all of this up to Modal's door. Not tested, for it takes an account: building the image; the files and the
Volume under /root; that a preemption arrives as KeyboardInterrupt and an exception is retried (so says Modal of its
client 1.6); listing and reading the Volume from outside; CUDA and NCCL there.
"""
from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

try:
    import modal
except ModuleNotFoundError:
    sys.exit("train_modal.py: error: modal is not installed: pip install -e '.[modal]' && modal setup")

from common.run import UserError, commit, read_json, write_atomic, write_json

REMOTE = "/root"                        # where Modal puts this file, so the rest goes there too
HERE = Path(__file__).resolve().parent  # there: /root
LOGS = HERE / "logs"                    # there: the Volume
NAME = "stalled-experiments"            # of app and Volume
NOT_SENT = ["logs", "venv", "env", "build", "dist", "**/.*", "**/__pycache__", "**/*.egg-info"]
GPU = r"[A-Z]+(-[A-Z]+)*-?\d+[A-Z]*(-\d+GB)?[!+]?(:[1-8])?"  # T4, A100-80GB, H100!, RTX-PRO-6000, H100:4
RUN = re.compile(r"\w[\w.+=,-]*", re.ASCII)  # name of a run
RETRIES = 3                             # containers after the first
COMMIT_EVERY = 60.0                     # seconds: what a container that dies at once may lose, beside its last steps
MARGIN = 120.0                          # seconds before the timeout at which the script is told to save and end
GRACE = 25.0                            # seconds for that; a preempted container has 30 in all


def scripts() -> list[str]:
    """File names of the scripts that can be run: those with a parse_args."""
    return sorted(p.name for p in HERE.glob("*.py") if "\ndef parse_args(" in p.read_text())


def constant(script: str, name: str, default):
    """The value of `name = literal` at the top level of a script, read without running it."""
    for node in ast.parse((HERE / script).read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return default


app = modal.App(NAME)
volume = modal.Volume.from_name(NAME, create_if_missing=True)
extras = {"trackers"}.union(*(constant(script, "EXTRAS", ()) for script in scripts()))
image = (modal.Image.debian_slim(python_version="3.11")
         .apt_install("g++")  # for torch.compile
         .pip_install_from_pyproject(str(HERE / "pyproject.toml"), optional_dependencies=sorted(extras))
         .add_local_dir(HERE, REMOTE, ignore=NOT_SENT))


# ---- At home: everything is checked before a GPU is rented

def parse_flags(script: str, flags: list[str]):
    """The namespace of the script's own parse_args, which leaves with one line when it refuses a flag."""
    argv, sys.argv = sys.argv, [script]  # argparse takes the program's name from here
    try:
        return importlib.import_module(Path(script).stem).parse_args(flags)
    finally:
        sys.argv = argv


def git_diff() -> str:
    """How the tracked files differ from the commit; nothing where there is no git."""
    with suppress(OSError):
        git = ["git", "diff", "HEAD"]
        return subprocess.run(git, cwd=HERE, capture_output=True, text=True, errors="replace").stdout
    return ""


def make_job(args: str = "", script: str = "", gpu: str = "T4", name: str = "", timeout_hours: float = 24.0,
             resume_name: str = "") -> dict:
    """What `train` has to know, as plain types: made once, so that a retry finds its folder and a new run gets its own.

    Raises UserError for bad flags of `modal run`, SystemExit for flags in `args` that the script refuses.
    """
    script = script or "collatz.py"
    if script not in scripts():
        raise UserError(f"--script: no script {script} here; there are {', '.join(scripts())}")
    if gpu.lower() != "none" and not re.fullmatch(GPU, gpu.upper()):
        raise UserError(f"--gpu: {gpu!r} does not look like a GPU; expected T4, L4, A100-80GB, H100:4, ... or none")
    ranks = int(gpu.partition(":")[2] or 1)
    if ranks > 1 and constant(script, "TORCHRUN", False) is not True:
        raise UserError(f"--gpu: {gpu}: {script} runs on one GPU (only scripts that declare TORCHRUN = True take more)")
    if not 1 / 60 <= timeout_hours <= 24:
        raise UserError(f"--timeout-hours: {timeout_hours:g} is not in 1/60..24 (Modal's longest)")
    if name and resume_name:
        raise UserError("--name: not together with --resume-name")
    try:
        flags = shlex.split(args)
    except ValueError as e:
        raise UserError(f"--args: {e}: {args}") from None

    own = vars(parse_flags(script, flags))
    for flag, instead in (("out_dir", "--name"), ("resume", "--resume-name")):
        if own.get(flag) is not None:
            raise UserError(f"--args: not with --{flag.replace('_', '-')}: the folder is on the Volume, use {instead}")
    if resume_name and "resume" not in own:
        raise UserError(f"--resume-name: {script} leaves no checkpoint to go on from")
    name = resume_name or name or own.get("name") or f"{time.strftime('%Y%m%d-%H%M%S')}-s{own.get('seed', 0)}"
    if not RUN.fullmatch(name):
        raise UserError(f"--{'resume-' * bool(resume_name)}name: {name!r} is no name of letters, digits and ._-")
    secrets = ["WANDB_API_KEY"] if own.get("tracker") == "wandb" else []
    if secrets and secrets[0] not in os.environ:
        raise UserError(f"--args: --tracker wandb needs the environment variable {secrets[0]}")
    job = {"call": str(time.time_ns()), "script": script, "flags": flags, "run": f"{Path(script).stem}/{name}",
           "ranks": ranks, "resume": bool(resume_name), "has_folder": "out_dir" in own, "secrets": secrets,
           "seconds": round(3600 * timeout_hours), "commit": commit(), "diff": git_diff()}
    parse_flags(script, script_flags(job, job["resume"]))
    return job


def script_flags(job: dict, resume: bool) -> list[str]:
    """The user's flags, the run folder, and --resume if there is something to go on from."""
    flags, folder = list(job["flags"]), str(LOGS / job["run"])
    at = next((i for i, word in enumerate(flags) if word.partition("=")[0] == "--init-from"), None)
    if resume and not job["resume"] and at is not None:  # a retry: what it started from is in last.pt by now
        del flags[at:at + (1 if "=" in flags[at] else 2)]
    return flags + ["--out-dir", folder] * job["has_folder"] + ["--resume", folder] * resume


def command_of(job: dict, resume: bool) -> list[str]:
    """The words of the command that a container runs."""
    start = [sys.executable]
    if job["ranks"] > 1:
        start = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(job["ranks"])]
    return [*start, str(HERE / job["script"]), *script_flags(job, resume)]


# ---- In the container

def open_folder(job: dict) -> dict:
    """The record of this call, modal.json: a new one, or that of its containers before.

    Raises UserError when the run folder belongs to another call that this one is not meant to go on with.
    """
    folder = LOGS / job["run"]
    record = read_json(folder / "modal.json") if (folder / "modal.json").is_file() else {}
    if record.get("call") == job["call"]:
        return record
    if job["resume"] and not (folder / "last.pt").is_file():
        raise UserError(f"--resume-name: {job['run']} has no last.pt on the Volume")
    if not job["resume"] and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--name: {job['run']} is on the Volume already; choose another one, or --resume-name")
    folder.mkdir(parents=True, exist_ok=True)
    if job["diff"]:
        write_atomic(folder / "changes.diff", job["diff"].encode())
    return {"call": job["call"], "script": job["script"], "commit": job["commit"], "containers": 0, "exit_code": None}


def echo(child: subprocess.Popen, log: Path, tail: deque[str]) -> None:
    """Pass the script's output on to Modal's log and to a file, and remember its last lines."""
    with open(log, "a") as f:
        for line in child.stdout:
            print(line, end="", flush=True)
            print(line, end="", flush=True, file=f)
            tail.append(line.rstrip().rpartition("\r")[2])  # of a progress bar its last state


def stop(child: subprocess.Popen) -> None:
    """Let the script save and end, if it still runs; kill it when that takes longer than GRACE."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)


@app.function(image=image, volumes={f"{REMOTE}/logs": volume}, cpu=2.0, memory=8192, timeout=24 * 3600,
              retries=modal.Retries(max_retries=RETRIES, initial_delay=1.0))
def train(job: dict) -> None:
    """One container's part of a run; `job` is that of make_job, the same for a retry.

    Raises CalledProcessError when the script failed (a retry: at once, without starting it), TimeoutError before the
    timeout, UserError when the folder is another call's. The KeyboardInterrupt of a preemption passes through.
    """
    volume.reload()  # a container that is used a second time may have an old view
    record = open_folder(job)
    if record["exit_code"] is None:
        run_script(job, record)
    if record["exit_code"]:
        raise subprocess.CalledProcessError(record["exit_code"], job["script"], "\n".join(record["last_lines"]))


def run_script(job: dict, record: dict) -> None:
    """Run the script to its end, commit the Volume on the way and after it, write exit code and last lines down."""
    folder = LOGS / job["run"]
    command = command_of(job, resume=job["has_folder"] and (folder / "last.pt").is_file())
    record["containers"] += 1
    with open(folder / "output.txt", "a") as f:
        f.write(f"# container {record['containers']}: {shlex.join(command)}\n")
    write_json(folder / "modal.json", record)
    volume.commit()

    end = time.monotonic() + job["seconds"] - min(MARGIN, 0.2 * job["seconds"])
    child = subprocess.Popen(
        command, cwd=HERE, env={**os.environ, "RUN_COMMIT": job["commit"], "PYTHONUNBUFFERED": "1"}, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # no second Ctrl-C
    child.stdout.reconfigure(newline="\n")  # a progress bar is one line
    tail: deque[str] = deque(maxlen=20)
    reader = threading.Thread(target=echo, args=(child, folder / "output.txt", tail))
    reader.start()
    late = False
    try:
        while child.poll() is None and not late:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, min(COMMIT_EVERY, end - time.monotonic())))
            late = child.returncode is None and time.monotonic() >= end
            try:
                volume.commit()
            except Exception as e:  # the next one may do; only the last must not fail unseen
                print(f"train_modal.py: the Volume could not be committed, trying again: {e}", flush=True)
        if late:
            stop(child)
            reader.join(GRACE)
            tail.append(f"stopped: {job['seconds'] / 3600:g} hours are over")
            if child.wait() and (folder / "last.pt").is_file():
                raise TimeoutError(f"{job['run']} {tail[-1]}; a retry or --resume-name goes on from last.pt")
        reader.join(GRACE)
        code = child.wait()
        record |= {"exit_code": code if code >= 0 else 128 - code, "last_lines": list(tail)}  # signals as in a shell
        write_json(folder / "modal.json", record)
    finally:  # also for KeyboardInterrupt, which Modal sends before it takes the machine away
        stop(child)
        reader.join(GRACE)
        volume.commit()


# ---- modal run

def files_of(run: str) -> list[str]:
    """Paths of the files in a run folder on the Volume; [] if there is none."""
    try:
        return [e.path for e in volume.listdir(run, recursive=True) if e.type == modal.volume.FileEntryType.FILE]
    except (modal.exception.NotFoundError, FileNotFoundError):
        return []


def pull_run(name: str, script: str = "") -> Path:
    """Bring a run folder from the Volume into logs/, over an older state of the same run, and return it.

    Raises UserError when the Volume has no such run, or more than one, or logs/ has another one of that name.
    """
    if not RUN.fullmatch(name) or (script and script not in scripts()):
        raise UserError(f"--pull: {name!r}{f' of {script}' if script else ''} is no name of a run")
    stems = [Path(script).stem] if script else [entry.path.strip("/") for entry in volume.listdir("/")]
    found = {f"{stem}/{name}": files for stem in stems if (files := files_of(f"{stem}/{name}"))}
    if len(found) > 1:
        raise UserError(f"--pull: {', '.join(found)}: which one? add --script")
    if not found:
        raise UserError(f"--pull: no run {name}{f' of {script}' if script else ''} on the Volume {NAME}")
    [(run, files)] = found.items()
    home, log = LOGS / run, f"{run}/output.txt"
    if home.is_dir() and any(home.iterdir()):
        known = (home / "output.txt").read_bytes() if (home / "output.txt").is_file() else None
        if known is None or not b"".join(volume.read_file(log)).startswith(known):  # output.txt only grows
            raise UserError(f"--pull: {home} holds another run: move it away first")
    for path in sorted(files, key=lambda path: path.strip("/") != log):  # output.txt first: from then on it is known
        target = LOGS / path.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with open(part, "wb") as f:
            volume.read_file_into_fileobj(path, f)
        os.replace(part, target)
    return home


@app.local_entrypoint()
def main(args: str = "", script: str = "", gpu: str = "T4", name: str = "", timeout_hours: float = 24.0,
         resume_name: str = "", pull: str = ""):
    job = {}
    try:
        if pull:
            print(f"the run is in {pull_run(pull, script)}")
            return
        checked = make_job(args, script, gpu, name, timeout_hours, resume_name)
        files = files_of(checked["run"])
        if files and not checked["resume"]:
            raise UserError(f"--name: {checked['run']} is on the Volume already; choose another one, or --resume-name")
        if checked["resume"] and not any(path.endswith("/last.pt") for path in files):
            raise UserError(f"--resume-name: {checked['run']} has no last.pt on the Volume (another --script?)")
        job = checked
        print(f"{job['run']} on {gpu}, at most {1 + RETRIES} containers of {timeout_hours:g} hours", flush=True)
        secrets = [modal.Secret.from_dict({key: os.environ[key]}) for key in job["secrets"]]
        rented = train.with_options(gpu=None if gpu.lower() == "none" else gpu, timeout=job["seconds"], secrets=secrets)
        rented.spawn(job).get()  # spawned: with --detach it outlives this process
    except subprocess.CalledProcessError as e:
        print(f"train_modal.py: error: {e.cmd} ended with exit code {e.returncode}; its last lines:\n{e.output}",
              file=sys.stderr)
        sys.exit(e.returncode)
    except (UserError, OSError, modal.exception.Error) as e:
        sys.exit(f"train_modal.py: error: {e}")
    finally:
        if job:
            pull = shlex.join(["--script", job["script"], "--pull", Path(job["run"]).name])
            print(f"to bring it into logs/: modal run train_modal.py {pull}")


if __name__ == "__main__":
    sys.exit('train_modal.py: error: start it as: modal run train_modal.py --args "..."')
