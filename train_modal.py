"""Run any script of this folder on a rented GPU, with the flags that it takes at home, and bring its run folder back.

    pip install -e ".[modal]" && modal setup                   # once; needs an account at modal.com
    modal run --detach train_modal.py --args "--epochs 100000 --curriculum --ramp-len 50000"   # collatz.py on a T4
    modal run train_modal.py --script addition_train.py --args "--seeds 0-63" --gpu L4 --name sixty-four
    modal run train_modal.py --resume-name sixty-four          # go on from its last.pt, on the GPU that it had
    modal run train_modal.py --pull sixty-four                 # into logs/addition_train/sixty-four

--gpu: T4 (default), L4, A100-80GB, H100, ...; H100:4 for a script that declares `TORCHRUN = True`; `none` for a CPU.
The container has the files of this folder (but NOT_SENT) and a Modal Volume as its logs/; a script that declares
`EXTRAS = ("name",)` gets that extra of pyproject.toml. A container that is preempted, crashes, or comes to the end of
--timeout-hours is followed by a new one, which goes on from last.pt; a script that fails is not started again.
Tests run this up to Modal's door; logs/modal.md says what takes an account and was not tested.
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
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

try:
    import modal
except ModuleNotFoundError:
    sys.exit("train_modal.py: error: modal is not installed: pip install -e '.[modal]' && modal setup")

from common.files import UserError, one_line_errors, refuse_damaged, write_json

REMOTE = "/root"                        # where Modal puts this file, so the rest goes there too
HERE = Path(__file__).resolve().parent  # there: /root
LOGS = HERE / "logs"                    # there: the Volume
NAME = "stalled-experiments"            # of app and Volume
NOT_SENT = ["logs", "venv", "env", "build", "dist", "**/.*", "**/__pycache__", "**/*.egg-info"]
GPU = re.compile(r"ANY|[A-Z]+(-[A-Z]+)*-?[0-9]+[A-Z]*(-[0-9]+GB)?[!+]?(:[1-8])?")  # T4, A100-80GB, H100!, H100:4
RUN = re.compile(r"\w[\w.+=,-]{0,99}", re.ASCII)  # name of a run
CORES, MEMORY = 2.0, 8192               # reserved for each GPU; MiB
RETRIES = 3                             # of a call; that of a failed script ends at once
MARGIN = 120.0                          # seconds before the timeout at which the script is told to save and end
GRACE = 20.0                            # seconds that it gets when preempted; the container has 30 in all
ENDED = [getattr(modal.exception, name) for name in (  # of what a look at a call raises: the rest is the connection's
    "RemoteError", "FunctionTimeoutError", "OutputExpiredError", "InternalFailure", "NotFoundError")]


def scripts() -> list[str]:
    """File names of the scripts that can be run: those with a parse_args."""
    return sorted(p.name for p in HERE.glob("*.py") if "\ndef parse_args(" in p.read_text(errors="replace"))


def declared(script: str, name: str, default):
    """The value of `name = literal` at the top level of a script, read without running it."""
    with suppress(SyntaxError, ValueError):  # somebody is writing it; or it is no literal
        for node in ast.parse((HERE / script).read_text(errors="replace")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets) == name:
                return ast.literal_eval(node.value)
    return default


def options_of(words: list[str]) -> dict[str, str]:
    """`--gpu L4 --name=x`, as words, as arguments of `main`."""
    options, rest = {}, iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        options[flag.removeprefix("--").replace("-", "_")] = value if equals else next(rest, "")
    return options


# modal run imports this file before it parses its flags, asks for a token, and makes Volume and image
at = next((i for i, word in enumerate(sys.argv[1:], 1) if Path(word.partition("::")[0]).name == Path(__file__).name), 0)
given = options_of(sys.argv[at + 1:]) if "run" in sys.argv[1:at] else {}
is_old = bool(given.keys() & {"pull", "resume_name"})
app = modal.App(NAME)
volume = modal.Volume.from_name(NAME, create_if_missing=not is_old)
extras = {"trackers"}.union(*(declared(script, "EXTRAS", ()) for script in scripts()))
image = (modal.Image.debian_slim(python_version="3.11")
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


def make_job(args: str = "", script: str = "", gpu: str = "", name: str = "", timeout_hours: float | str = 24.0,
             resume_name: str = "") -> dict:
    """What `train` has to know, as plain types: made once, so that a retry finds its folder and a new run gets its own.

    Raises UserError for bad flags of `modal run`, SystemExit for flags in `args` that the script refuses.
    """
    from common.run import changes, commit  # they load torch, which --pull can do without
    script, gpu = script or "collatz.py", gpu or "T4"
    if script not in scripts():
        raise UserError(f"--script: no script {script} here; there are {', '.join(scripts())}")
    if gpu.upper() != "NONE" and not GPU.fullmatch(gpu.upper()):
        raise UserError(f"--gpu: {gpu!r} does not look like a GPU; expected T4, L4, A100-80GB, H100:4, ... or none")
    ranks = int(gpu.partition(":")[2] or 1)
    if ranks > 4 and re.match("A10G?:", gpu.upper()):
        raise UserError(f"--gpu: {gpu}: Modal has up to 4 of these in one machine")
    if ranks > 1 and declared(script, "TORCHRUN", False) is not True:
        raise UserError(f"--gpu: {gpu}: {script} runs on one GPU (only scripts that declare TORCHRUN = True take more)")
    if not re.fullmatch(r"\d+\.?\d*", str(timeout_hours)) or not 0.1 <= float(timeout_hours) <= 24:
        raise UserError(f"--timeout-hours: {timeout_hours} is not in 0.1..24 (Modal's longest)")
    try:
        flags = shlex.split(args)
    except ValueError as e:
        raise UserError(f"--args: {e}: {args}") from None
    own = vars(parse_flags(script, flags))
    for flag, instead in (("out_dir", "--name"), ("resume", "--resume-name")):
        if own.get(flag) is not None:
            raise UserError(f"--args: not with --{flag.replace('_', '-')}: the folder is on the Volume, use {instead}")
    if resume_name and (name or own.get("init_from") is not None):
        raise UserError(f"--resume-name: not together with {'--name' if name else '--init-from'}")
    if (own.get("batch_size") or ranks) % ranks:
        raise UserError(f"--args: --batch-size {own['batch_size']} cannot be divided among {ranks} GPUs")
    if resume_name and "resume" not in own:
        raise UserError(f"--resume-name: {script} leaves no checkpoint to go on from")
    name = resume_name or name or own.get("name") or f"{time.strftime('%Y%m%d-%H%M%S')}-s{own.get('seed', 0)}"
    if not RUN.fullmatch(name):
        raise UserError(f"--name: {name!r} is no name of letters, digits and ._-")
    if own.get("tracker") == "wandb" and "WANDB_API_KEY" not in os.environ:
        raise UserError("--args: --tracker wandb needs the environment variable WANDB_API_KEY")
    job = {"call": str(time.time_ns()), "script": script, "flags": flags, "run": f"{Path(script).stem}/{name}",
           "gpu": gpu.upper(), "ranks": ranks, "seconds": round(3600 * float(timeout_hours)),
           "resume": bool(resume_name), "before": None, "commit": commit(), "diff": changes(HERE),
           "has_folder": "out_dir" in own and own.get("checkpoint") is None, "can_resume": "resume" in own,
           "wandb": own.get("tracker") == "wandb"}
    return job


def command_of(job: dict, resume: bool) -> list[str]:
    """The script, the user's flags, the run folder, and --resume if there is something to go on from."""
    flags, folder = list(job["flags"]), str(LOGS / job["run"])
    if resume and not job["resume"]:  # a retry: the weights that it started from are in last.pt by now
        flags = [word for before, word in zip(["", *flags], flags, strict=False)
                 if "--init-from" not in (before, word) and not word.startswith("--init-from=")]
    flags += ["--out-dir", folder] * job["has_folder"] + ["--resume", folder] * resume
    return [str(HERE / job["script"]), *flags]


def check_folder(job: dict, files: Collection[str], last: str | None) -> None:
    """Raise UserError when the run folder, with these files and last call, is not one that this job may write into."""
    if job["resume"] and "last.pt" not in files:
        raise UserError(f"--resume-name: {job['run']} has no last.pt on the Volume")
    if job["resume"] and last != job["before"]:
        raise UserError(f"--resume-name: {job['run']} goes on in another call already")
    if not job["resume"] and files:
        raise UserError(f"--name: {job['run']} is on the Volume already; choose another one, or --resume-name")


def parse_record(data: bytes, run: str) -> tuple[dict, dict]:
    """What modal.json says, and its last call, empty where there is none. Raises UserError when it is damaged."""
    with refuse_damaged(f"{run}/modal.json on the Volume"):
        record = json.loads(data or b'{"calls": []}')
        return record, {"call": None, **[{}, *record["calls"]][-1]}


# ---- In the container

def open_folder(job: dict) -> dict:
    """The record of the run, modal.json, with this call in it. Raises UserError when the folder is another call's."""
    folder = LOGS / job["run"]
    file = folder / "modal.json"
    record, last = parse_record(file.read_bytes() if file.is_file() else b"", job["run"])
    if last["call"] == job["call"]:
        return record  # a retry
    check_folder(job, [p.name for p in folder.iterdir()] if folder.is_dir() else [], last["call"])
    folder.mkdir(parents=True, exist_ok=True)
    call = {key: job[key] for key in ("call", "gpu", "flags", "commit")}
    call["modal_id"] = modal.current_function_call_id()
    record = {"containers": 0, **record, "calls": [*record["calls"], call], "exit_code": None}
    write_json(file, record)  # first: it says whose folder this is
    if job["diff"] or (folder / "changes.diff").exists():
        with open(folder / "changes.diff", "a") as f:
            f.write(f"# {job['commit']}\n{job['diff']}")
    return record


@app.function(image=image, volumes={f"{REMOTE}/logs": volume}, cpu=CORES, memory=MEMORY, timeout=24 * 3600,
              retries=modal.Retries(max_retries=RETRIES, initial_delay=1.0), single_use_containers=True)
def train(job: dict) -> None:
    """One container's part of a run; `job` is that of make_job, the same for a retry.

    Raises CalledProcessError when the script failed (a retry: at once, without starting it) and, with exit code 124,
    when its time is over (a retry goes on); UserError when the folder is another call's. The KeyboardInterrupt of a
    preemption passes through. The Volume is committed before and after the script; while it runs, and when the
    container goes, Modal does that by itself.
    """
    start = time.monotonic()
    try:
        record = open_folder(job)
        code = record["exit_code"]
        if code is None:
            code = run_script(job, record, start)
            write_json(LOGS / job["run"] / "modal.json", record)
            volume.commit()
    except (OSError, modal.exception.Error) as e:  # at home these types mean the connection, and "not yet"
        raise RuntimeError(f"{type(e).__name__} in the container: {e}") from e
    if code:
        raise subprocess.CalledProcessError(code, job["script"], "\n".join(record["last_lines"]))


def run_script(job: dict, record: dict, start: float) -> int:
    """Run the script to its end, or to that of its time; put its end into the record, and return its exit code."""
    folder, margin = LOGS / job["run"], min(MARGIN, 0.2 * job["seconds"])
    words = [sys.executable] if job["ranks"] == 1 else [
        str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(job["ranks"])]
    words += command_of(job, job["can_resume"] and (folder / "last.pt").is_file())
    environment = {**os.environ, "RUN_COMMIT": job["commit"], "PYTHONUNBUFFERED": "1",
                   "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(margin / 2))}  # seconds in which ranks have to save
    record["containers"] += 1
    write_json(folder / "modal.json", record)
    log, late = folder / "output.txt", False
    with open(log, "ab") as out, open(log, errors="replace", newline="\n") as printed:
        out.write(f"# container {record['containers']}: {shlex.join(words)}\n".encode())
        out.flush()
        volume.commit()
        printed.seek(0, os.SEEK_END)
        child = subprocess.Popen(words, cwd=HERE, env=environment, stdout=out, stderr=subprocess.STDOUT,
                                 start_new_session=True)  # no second Ctrl-C
        try:
            while child.poll() is None and not late:
                time.sleep(0.2)
                print(printed.read(), end="", flush=True)
                late = time.monotonic() > start + job["seconds"] - margin
            late = child.poll() is None
        finally:  # also for the KeyboardInterrupt of a preemption
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(margin / 2 if late else GRACE)
                child.kill()  # ranks end with their torchrun
                child.wait()
        print(printed.read(), end="", flush=True)
    lines = log.read_text(errors="replace").rpartition("\n# container ")[2].rstrip("\n").split("\n")[1:]
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode  # signals as in a shell
    n_lines, resumes = 20 if job["ranks"] == 1 else 60 + 8 * job["ranks"], False  # torchrun's report is long
    if late and (code or not (folder / "summary.json").is_file()):
        code, resumes = 124, (folder / "last.pt").is_file()  # as timeout(1) has it
        lines.append(f"stopped: {job['seconds'] / 3600:g} hours are over" +
                     "; a retry, or --resume-name, goes on from last.pt" * resumes)
    lines = [line.rpartition("\r")[2] for line in lines[-n_lines:]]  # of a progress bar its last state
    record |= {"exit_code": None if resumes else code, "last_lines": lines}
    return code


# ---- modal run

def files_of_runs() -> dict[str, list[str]]:
    """What is on the Volume: {"collatz/NAME": ["last.pt", ...], ...}."""
    found: dict[str, list[str]] = {}
    for entry in volume.listdir("/", recursive=True):
        script, name, file = [*entry.path.strip("/").split("/", 2), "", ""][:3]
        if entry.type == modal.volume.FileEntryType.FILE:
            found.setdefault(f"{script}/{name}", []).append(file)
    return found


def find_run(name: str, script: str = "") -> tuple[str, list[str]]:
    """The run of that name, of one script or of any, and its files. Raises UserError: there is none, or several."""
    found = {run: files for run, files in files_of_runs().items()
             if Path(run).name == name and script in ("", f"{Path(run).parent}.py")}
    if len(found) != 1:
        raise UserError(f"{', '.join(found)}: which one? add --script" if found else
                        f"no run {name!r}{f' of {script}' if script else ''} on the Volume {NAME}")
    return found.popitem()


def last_call(run: str, files: list[str]) -> dict:
    """What modal.json says of the last call of a run. Raises UserError when that call has not ended."""
    data = b"".join(volume.read_file(f"{run}/modal.json")) if "modal.json" in files else b""
    call = parse_record(data, run)[1]
    if call.get("modal_id"):
        try:
            modal.FunctionCall.from_id(call["modal_id"]).get(timeout=0)
        except TimeoutError:  # Modal's "not yet"
            raise UserError(f"{run} is running still, as {call['modal_id']}; two cannot share a folder") from None
        except (subprocess.CalledProcessError, UserError, RuntimeError, *ENDED):
            pass  # how it has ended does not matter here
    return call


def pull_run(name: str, script: str = "") -> Path:
    """Bring a run folder from the Volume into logs/, over an older state of the same run, and return it.

    Raises UserError when the Volume has no such run or several, or logs/ has another of that name or a newer state.
    """
    run, files = find_run(name, script)
    home = LOGS / run
    if home.is_dir() and any(home.iterdir()):  # every start of a run, there or at home, adds to these two
        known = next((log for log in ("run.txt", "output.txt") if (home / log).is_file()), "")
        log = (home / known).read_bytes() if known else b""
        if not log or known not in files or not b"".join(volume.read_file(f"{run}/{known}")).startswith(log):
            raise UserError(f"{home} holds another run, or has gone on since: move it away first")
    # those two first, so that a pull that breaks off can be repeated; last.pt before metrics.csv, which may run ahead
    for file in sorted(files, key=lambda file: (file != "output.txt", file != "run.txt", file)):
        if not file.endswith(".tmp"):  # which is being written
            target = home / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{target}.part", "wb") as f:
                volume.read_file_into_fileobj(f"{run}/{file}", f)
            os.replace(f"{target}.part", target)
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
        before = {"call": None}
        if resume_name is not None:
            run, files = find_run(resume_name, script)
            before = last_call(run, files)
            script, gpu = f"{Path(run).parent}.py", gpu or before.get("gpu", "")
        job = make_job(args, script, gpu, name, timeout_hours, resume_name or "") | {"before": before["call"]}
        check_folder(job, files_of_runs().get(job["run"], []), before["call"])
        secrets = [modal.Secret.from_dict({"WANDB_API_KEY": os.environ["WANDB_API_KEY"]})] if job["wandb"] else []
        device = None if job["gpu"] == "NONE" else job["gpu"]
        call = train.with_options(
            gpu=device, cpu=CORES * job["ranks"], memory=MEMORY * job["ranks"], timeout=job["seconds"],
            secrets=secrets).spawn(job)  # spawned: with --detach it outlives this process
        rented = job["run"]
        print(f"{rented} on {device or 'a CPU'} for at most {timeout_hours:g} hours, and up to {RETRIES} times again" +
              f"\n{script} has no --out-dir: only what it prints is kept" * (not job["has_folder"]), flush=True)
        call.get()
    except subprocess.CalledProcessError as e:
        print(f"train_modal.py: error: {e.cmd} ended with exit code {e.returncode}; its last lines:\n{e.output}",
              file=sys.stderr)
        sys.exit(e.returncode)
    except (UserError, OSError, RuntimeError, modal.exception.Error) as e:
        lost = rented and isinstance(e, (OSError, modal.exception.ConnectionError, modal.exception.ServiceError))
        sys.exit(f"train_modal.py: error: {str(e) or f'{type(e).__name__}; was the call cancelled?'}" +
                 "; the connection is lost, and with --detach the run goes on (`modal app list`)" * bool(lost))
    finally:
        if rented:
            stem, name = rented.split("/")
            print(f"to bring it into logs/: modal run train_modal.py --script {stem}.py --pull {name}")


if given and not is_old:
    with suppress(TypeError), one_line_errors("train_modal.py"):  # unknown flags are left to Modal
        make_job(**given)
if __name__ == "__main__":
    sys.exit('train_modal.py: error: start it as: modal run train_modal.py --args "..."')
