"""Run any script of this folder on a rented GPU, with the flags that it takes at home, and bring its run folder back.

    pip install -e ".[modal]" && modal setup                   # once; needs an account at modal.com
    modal run --detach train_modal.py --args "--epochs 100000 --curriculum --ramp-len 50000"   # collatz.py on a T4
    modal run train_modal.py --script addition_train.py --args "--seeds 0-63" --gpu L4 --name sixty-four
    modal run train_modal.py --resume-name sixty-four          # go on from its last.pt, on the GPU that it had
    modal run train_modal.py --pull sixty-four                 # into logs/addition_train/sixty-four

--gpu: T4 (default), L4, A100-80GB, H100, ...; H100:4 for a script that declares `TORCHRUN = True`; `none` for a CPU.
The container has the files of this folder (but NOT_SENT: logs, hidden files, caches, ...) and a Modal Volume as its
logs/; the script is started in this folder. A script that declares `EXTRAS = ("name",)` gets that extra of
pyproject.toml. A run folder has more files than at home: output.txt, modal.json, and changes.diff if git saw changes.

A container that is preempted or crashes is followed by another one, and up to 3 times one that comes to the end of
--timeout-hours; it goes on from last.pt. A script that fails is not started again.

Tests run this up to Modal's door. Not tested, for it takes an account: building the image; files and Volume under
/root; that a preemption is a SIGINT for this process alone, that an exception is retried and with_options merges (so
say Modal's guide and client 1.6); commits while the script has files open; the Volume seen from outside; CUDA and NCCL.
"""
from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

try:
    import modal
except ModuleNotFoundError:
    sys.exit("train_modal.py: error: modal is not installed: pip install -e '.[modal]' && modal setup")

from common.files import UserError, write_json
from common.run import commit

REMOTE = "/root"                        # where Modal puts this file, so the rest goes there too
HERE = Path(__file__).resolve().parent  # there: /root
LOGS = HERE / "logs"                    # there: the Volume
NAME = "stalled-experiments"            # of app and Volume
NOT_SENT = ["logs", "venv", "env", "build", "dist", "**/.*", "**/__pycache__", "**/*.egg-info"]
GPU = re.compile(r"ANY|[A-Z]+(-[A-Z]+)*-?[0-9]+[A-Z]*(-[0-9]+GB)?[!+]?(:[1-8])?")  # T4, A100-80GB, H100!, H100:4
RUN = re.compile(r"\w[\w.+=,-]{0,99}", re.ASCII)  # name of a run
CORES, MEMORY = 2.0, 8192               # reserved for each GPU; MiB
RETRIES = 3                             # of a call; that of a failed script ends at once
COMMIT_EVERY = 60.0                     # seconds: what a container that dies at once may lose, beside its last steps
MARGIN = 120.0                          # seconds before the timeout at which the script is told to save and end
GRACE = 20.0                            # seconds that it gets when preempted; the container has 30 in all


def scripts() -> list[str]:
    """File names of the scripts that can be run: those with a parse_args."""
    return sorted(p.name for p in HERE.glob("*.py") if "\ndef parse_args(" in p.read_text(errors="replace"))


def constant(script: str, name: str, default):
    """The value of `name = literal` at the top level of a script, read without running it."""
    try:
        body = ast.parse((HERE / script).read_text(errors="replace")).body
    except SyntaxError:  # somebody is writing it; the others can run
        return default
    for node in body:
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


# ---- At home: everything is checked before anything is rented

def parse_flags(script: str, flags: list[str]):
    """The namespace of the script's own parse_args, which leaves with one line when it refuses a flag."""
    argv, sys.argv = sys.argv, [script]  # argparse takes the program's name from here
    try:
        return importlib.import_module(Path(script).stem).parse_args(flags)
    finally:
        sys.argv = argv


def git_diff() -> str:
    """How the files here differ from the commit, new ones by name; nothing where there is no git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, errors="replace").stdout
    with suppress(OSError):
        return git("status", "--porcelain") + git("diff", "HEAD", "--no-color", "--no-ext-diff")
    return ""


def make_job(args: str = "", script: str = "", gpu: str = "", name: str = "", timeout_hours: float = 24.0,
             resume_name: str = "") -> dict:
    """What `train` has to know, as plain types: made once, so that a retry finds its folder and a new run gets its own.

    Raises UserError for bad flags of `modal run`, SystemExit for flags in `args` that the script refuses.
    """
    script, gpu = script or "collatz.py", gpu or "T4"
    if script not in scripts():
        raise UserError(f"--script: no script {script} here; there are {', '.join(scripts())}")
    if gpu.upper() != "NONE" and not GPU.fullmatch(gpu.upper()):
        raise UserError(f"--gpu: {gpu!r} does not look like a GPU; expected T4, L4, A100-80GB, H100:4, ... or none")
    ranks = int(gpu.partition(":")[2] or 1)
    if ranks > 1 and constant(script, "TORCHRUN", False) is not True:
        raise UserError(f"--gpu: {gpu}: {script} runs on one GPU (only scripts that declare TORCHRUN = True take more)")
    if not 0.1 <= timeout_hours <= 24:
        raise UserError(f"--timeout-hours: {timeout_hours:g} is not in 0.1..24 (Modal's longest)")
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
    if own.get("tracker") == "wandb" and "WANDB_API_KEY" not in os.environ:
        raise UserError("--args: --tracker wandb needs the environment variable WANDB_API_KEY")
    job = {"call": str(time.time_ns()), "script": script, "flags": flags, "run": f"{Path(script).stem}/{name}",
           "gpu": gpu.upper(), "ranks": ranks, "seconds": round(3600 * timeout_hours), "resume": bool(resume_name),
           "has_folder": "out_dir" in own, "can_resume": "resume" in own, "wandb": own.get("tracker") == "wandb",
           "commit": commit(), "diff": git_diff()}
    parse_flags(script, script_flags(job, job["resume"]))
    return job


def script_flags(job: dict, resume: bool) -> list[str]:
    """The user's flags, the run folder, and --resume if there is something to go on from."""
    flags, folder = list(job["flags"]), str(LOGS / job["run"])
    if resume and not job["resume"]:  # a retry: the weights that it started from are in last.pt by now
        flags = [word for before, word in zip(["", *flags], flags, strict=False)
                 if "--init-from" not in (before, word) and not word.startswith("--init-from=")]
    return flags + ["--out-dir", folder] * job["has_folder"] + ["--resume", folder] * resume


def command_of(job: dict, resume: bool) -> list[str]:
    """The words of the command that a container runs."""
    start = [sys.executable]
    if job["ranks"] > 1:
        start = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(job["ranks"])]
    return [*start, str(HERE / job["script"]), *script_flags(job, resume)]


def check_folder(job: dict, files: Collection[str]) -> None:
    """Raise UserError when the run folder, which has these files, is not one that this call may write into."""
    if job["resume"] and "last.pt" not in files:
        raise UserError(f"--resume-name: {job['run']} has no last.pt on the Volume")
    if not job["resume"] and files:
        raise UserError(f"--name: {job['run']} is on the Volume already; choose another one, or --resume-name")


# ---- In the container

def parse_record(data: bytes, run: str) -> dict:
    """What modal.json says. Raises UserError when it is damaged."""
    try:
        record = json.loads(data)
        if all(isinstance(call["call"], str) for call in record["calls"]):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{run}/modal.json on the Volume is damaged")


def open_folder(job: dict) -> dict:
    """The record of the run, modal.json, with this call in it. Raises UserError when the folder is another call's."""
    folder = LOGS / job["run"]
    file = folder / "modal.json"
    record = parse_record(file.read_bytes(), job["run"]) if file.is_file() else {"calls": []}
    if record["calls"] and record["calls"][-1]["call"] == job["call"]:
        return record  # a retry
    check_folder(job, [p.name for p in folder.iterdir()] if folder.is_dir() else [])
    folder.mkdir(parents=True, exist_ok=True)
    call = {key: job[key] for key in ("call", "gpu", "flags", "commit")}
    call["modal_id"] = modal.current_function_call_id()
    record = {"calls": [*record["calls"], call], "containers": 0, "exit_code": None}
    write_json(file, record)  # first: it says whose folder this is
    if job["diff"] or (folder / "changes.diff").exists():
        with open(folder / "changes.diff", "a") as f:
            f.write(f"# {job['commit']}\n{job['diff']}")
    return record


def echo(child: subprocess.Popen, log: Path, tail: deque[str]) -> None:
    """Pass the script's output on to Modal's log and to a file, and remember its last lines."""
    for line in child.stdout:
        tail.append(line.rstrip().rpartition("\r")[2])  # of a progress bar its last state
        with suppress(OSError, UnicodeError):  # read on, whatever happens: the script would wait for a full pipe
            print(line, end="", flush=True)
            with open(log, "a") as f:  # not kept open: a Volume with open files cannot be reloaded
                f.write(line)


def stop(child: subprocess.Popen, call: str, grace: float) -> None:
    """Let the script save and end if it still runs, and kill what is left of it after `grace` seconds."""
    if not hasattr(child, "told"):  # a second signal would end it before it has saved
        child.told = True
        child.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    child.kill()
    for environ in Path("/proc").glob("[0-9]*/environ"):  # torchrun puts each rank into a session of its own
        with suppress(OSError):  # one that has ended
            if f"RUN_CALL={call}".encode() in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


@app.function(image=image, volumes={f"{REMOTE}/logs": volume}, cpu=CORES, memory=MEMORY, timeout=24 * 3600,
              retries=modal.Retries(max_retries=RETRIES, initial_delay=1.0), scaledown_window=5)
def train(job: dict) -> None:
    """One container's part of a run; `job` is that of make_job, the same for a retry.

    Raises CalledProcessError when the script failed (a retry: at once, without starting it) and, with exit code 124,
    when its time is over (a retry goes on); UserError when the folder is another call's; RuntimeError when the Volume
    could not be read or committed. The KeyboardInterrupt of a preemption passes through.
    """
    start = time.monotonic()
    try:
        volume.reload()  # a container that is used a second time may have an old view
        record = open_folder(job)
        if record["exit_code"] is None:
            run_script(job, record, start)
    except TimeoutError as e:  # of the connection; last_call takes a result of that type for "not yet"
        raise RuntimeError(f"timed out: {e}") from e
    if record["exit_code"]:
        raise subprocess.CalledProcessError(record["exit_code"], job["script"], "\n".join(record["last_lines"]))


def run_script(job: dict, record: dict, start: float) -> None:
    """Run the script to its end, commit the Volume on the way and after it, write exit code and last lines down."""
    folder = LOGS / job["run"]
    command = command_of(job, resume=job["can_resume"] and (folder / "last.pt").is_file())
    record["containers"] += 1
    with open(folder / "output.txt", "a") as f:
        f.write(f"# container {record['containers']}: {shlex.join(command)}\n")
    write_json(folder / "modal.json", record)
    volume.commit()

    margin = min(MARGIN, 0.2 * job["seconds"])
    end, late = start + job["seconds"] - margin, False
    environment = {**os.environ, "RUN_COMMIT": job["commit"], "RUN_CALL": job["call"], "PYTHONUNBUFFERED": "1",
                   "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15"}  # s in which ranks have to save; torchrun's own are 30
    child = subprocess.Popen(command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             encoding="utf-8", errors="replace", start_new_session=True)  # no second Ctrl-C
    child.stdout.reconfigure(newline="\n")  # a progress bar is one line
    tail: deque[str] = deque(maxlen=20 if job["ranks"] == 1 else 60 + 8 * job["ranks"])  # torchrun's report is long
    reader = threading.Thread(target=echo, args=(child, folder / "output.txt", tail), daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, min(COMMIT_EVERY, end - time.monotonic())))
            if late := child.returncode is None and time.monotonic() >= end:
                break
            try:
                volume.commit()
            except Exception as e:  # the next one may do; only the last must not fail unseen
                print(f"train_modal.py: the Volume could not be committed, trying again: {e}", flush=True)
        stop(child, job["call"], margin / 2)
        reader.join(5)
        code = child.wait()
        if late:
            tail.append(f"stopped: {job['seconds'] / 3600:g} hours are over")
            if (folder / "last.pt").is_file() and (code or not (folder / "summary.json").is_file()):
                tail[-1] += "; a retry, or --resume-name, goes on from last.pt"
                raise subprocess.CalledProcessError(124, job["script"], "\n".join(tail))  # as timeout(1) has it
        record |= {"exit_code": code if code >= 0 else 128 - code, "last_lines": list(tail)}  # signals as in a shell
        write_json(folder / "modal.json", record)
    finally:  # also for KeyboardInterrupt, which comes before Modal takes the machine away
        stop(child, job["call"], GRACE)
        reader.join(2)
        volume.commit()


# ---- modal run

def find_runs(name: str, script: str = "") -> dict[str, list[str]]:
    """Runs of that name on the Volume, of one script or of any: {"collatz/NAME": ["last.pt", ...]}."""
    if not RUN.fullmatch(name):
        raise UserError(f"{name!r} is no name of a run")
    found: dict[str, list[str]] = {}
    for entry in volume.listdir("/", recursive=True):
        stem, _, rest = entry.path.strip("/").partition("/")
        folder, _, file = rest.partition("/")
        if entry.type == modal.volume.FileEntryType.FILE and folder == name and script in ("", f"{stem}.py"):
            found.setdefault(f"{stem}/{name}", []).append(file)
    return found


def find_run(name: str, script: str = "") -> tuple[str, list[str]]:
    """The only one of find_runs. Raises UserError when there is none, or more than one."""
    found = find_runs(name, script)
    if len(found) != 1:
        raise UserError(f"{', '.join(found)}: which one? add --script" if found else
                        f"no run {name}{f' of {script}' if script else ''} on the Volume {NAME}")
    return found.popitem()


def read_volume(path: str) -> bytes:
    return b"".join(volume.read_file(path))


def last_call(run: str, files: list[str]) -> dict:
    """What modal.json says of the last call of a run. Raises UserError when that call has not ended."""
    calls = parse_record(read_volume(f"{run}/modal.json"), run)["calls"] if "modal.json" in files else []
    call = calls[-1] if calls else {}
    if call.get("modal_id"):
        try:
            modal.FunctionCall.from_id(call["modal_id"]).get(timeout=0)
        except TimeoutError:  # Modal's "not yet"
            raise UserError(f"{run} is running still, as {call['modal_id']}; two cannot share a folder") from None
        except (modal.exception.ConnectionError, modal.exception.AuthError):
            raise
        except Exception:  # it has ended; how does not matter here
            pass
    return call


def pull_run(name: str, script: str = "") -> Path:
    """Bring a run folder from the Volume into logs/, over an older state of the same run, and return it.

    Raises UserError when the Volume has no such run or several, or logs/ has another of that name or a newer state.
    """
    run, files = find_run(name, script)
    home = LOGS / run
    if home.is_dir() and any(home.iterdir()):  # every start of a run, there or at home, adds to these two
        known = next((log for log in ("run.txt", "output.txt") if (home / log).is_file()), None)
        log = (home / known).read_bytes() if known else b""
        if not log or known not in files or not read_volume(f"{run}/{known}").startswith(log):
            raise UserError(f"{home} holds another run, or has gone on since: move it away first")
    # those two first, so that a pull that breaks off can be repeated; last.pt before metrics.csv, which may run ahead
    for file in sorted(files, key=lambda file: (file != "output.txt", file != "run.txt", file)):
        if file.endswith(".tmp"):  # is being written
            continue
        target = home / file
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with open(part, "wb") as f:
            volume.read_file_into_fileobj(f"{run}/{file}", f)
        os.replace(part, target)
    return home


@app.local_entrypoint()
def main(args: str = "", script: str = "", gpu: str = "", name: str = "", timeout_hours: float = 24.0,
         resume_name: str | None = None, pull: str | None = None):
    """What `modal run` starts, at home: check, rent, wait; or bring a run folder back."""
    rented = ""
    try:
        if pull is not None:
            if args or gpu or name or resume_name:
                raise UserError("--pull: alone, or with --script")
            print(f"the run is in {pull_run(pull, script)}")
            return
        files: list[str] = []
        if resume_name is not None:
            run, files = find_run(resume_name, script)
            before = last_call(run, files)
            script, gpu = f"{Path(run).parent}.py", gpu or before.get("gpu", "")
        job = make_job(args, script, gpu, name, timeout_hours, resume_name or "")
        check_folder(job, files or find_runs(Path(job["run"]).name, job["script"]))
        secrets = [modal.Secret.from_dict({"WANDB_API_KEY": os.environ["WANDB_API_KEY"]})] if job["wandb"] else []
        device = None if job["gpu"] == "NONE" else job["gpu"]
        call = train.with_options(
            gpu=device, cpu=CORES * job["ranks"], memory=MEMORY * job["ranks"], timeout=job["seconds"],
            secrets=secrets).spawn(job)  # spawned: with --detach it outlives this process
        rented = job["run"]
        print(f"{rented} on {device or 'a CPU'} for at most {timeout_hours:g} hours, and up to {RETRIES} times again",
              flush=True)
        call.get()
    except subprocess.CalledProcessError as e:
        print(f"train_modal.py: error: {e.cmd} ended with exit code {e.returncode}; its last lines:\n{e.output}",
              file=sys.stderr)
        sys.exit(e.returncode)
    except (UserError, OSError, RuntimeError, modal.exception.Error) as e:
        sys.exit(f"train_modal.py: error: {e}")
    finally:
        if rented:
            stem, name = rented.split("/")
            print(f"to bring it into logs/: modal run train_modal.py --script {stem}.py --pull {name}")


def options_of(words: list[str]) -> dict[str, str]:
    """`--gpu L4 --name=x`, as words, as arguments of `main`."""
    options, rest = {}, iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        options[flag.removeprefix("--").replace("-", "_")] = value if equals else next(rest, "")
    return options


def check_early(words: list[str]) -> None:
    """Leave with one line if make_job refuses these flags. What Modal's own parser refuses is left to it."""
    options = options_of(words)
    hours = options.pop("timeout_hours", "24")
    known = set(options) <= {"args", "script", "gpu", "name", "resume_name"} and re.fullmatch(r"\d+\.?\d*", hours)
    if known and (options.get("script") or not options.get("resume_name")):  # else the Volume knows the script
        try:
            make_job(**options, timeout_hours=float(hours))
        except UserError as e:
            sys.exit(f"train_modal.py: error: {e}")


at = next((i for i, word in enumerate(sys.argv) if Path(word.partition("::")[0]).name == Path(__file__).name), 0)
if "run" in sys.argv[1:at]:  # modal run imports this file before it asks for a token and builds the image
    check_early(sys.argv[at + 1:])
if __name__ == "__main__":
    sys.exit('train_modal.py: error: start it as: modal run train_modal.py --args "..."')
