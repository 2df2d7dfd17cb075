"""A run: its folder, its provenance, its record, its end."""
from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import checkpoint, devices, metrics
from common.files import UserError, append, named, write_json
from common.flags import Flags, restored


def restore(args: Flags, script: str, **kinds: type) -> tuple[Flags, dict | None]:
    """The flags of a run that --resume goes on with, and its last.pt; of a new run its own flags, and None.

    kinds: fields of last.pt that the script needs, by type. Raises UserError: not a last.pt of this script, damaged,
    or a flag is given that the run was not started with.
    """
    if args.resume is None:
        return args, None
    if args.init_from is not None:
        raise UserError("--init-from: not together with --resume")
    path = Path(args.resume) / "last.pt" if Path(args.resume).is_dir() else Path(args.resume)
    saved = checkpoint.check(checkpoint.read(path), path, script, step=int, args=dict, seconds=float,
                             cpu_seconds=float, **kinds)
    args = restored(args, saved["args"], path)
    devices.set_threads(args.threads)  # another number of them rounds otherwise
    if not 0 <= saved["step"] <= args.steps:
        raise UserError(f"{path}: damaged, it is at step {saved['step']} of {args.steps}")
    return args, saved


class Run:
    """An open run: what every training loop does with its folder, its record and its clock.

    Nothing is written before it is entered; from then on the folder is this process's alone, and the first Ctrl-C or
    SIGTERM ends the loop (the second acts at once). Raises UserError when the folder is in use or holds another run.
    Of torchrun's ranks the first alone writes, and all must call `last` and `save` at the same steps.
    """

    def __init__(self, args: Flags, script: str, script_file: str, saved: dict | None):
        self.args, self.script, self.script_file, self.saved = args, script, script_file, saved
        self.start = self.step = saved["step"] if saved else 0
        self.stopped_by, self._signalled = 0, None  # the first signal's number, and when it came
        self._wall, self._cpu = args.started
        self._end = self._wall + 60 * args.max_minutes if args.max_minutes else float("inf")
        self._handlers: dict[int, object] = {}
        if saved:
            self._wall -= saved["seconds"]
            self._cpu -= saved["cpu_seconds"]

    def __enter__(self) -> Run:
        self.folder, self._lock = Path(), None
        if devices.rank() == 0:
            try:
                metrics.check_tracker(self.args.tracker)
                self.folder, self._lock = open_folder(self.args, self.script_file)
                self._open_files()
            except BaseException:
                self.__exit__()
                devices.of_first(None)
                raise
        folder = devices.of_first(str(self.folder))
        if folder is None:
            sys.exit(1)  # rank 0 says why
        self.folder = Path(folder)
        if threading.current_thread() is threading.main_thread():  # signal.signal works nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # so a shell starts what runs behind `&`
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def _open_files(self) -> None:
        folder = self.folder
        if not self.saved and any((folder / f).exists() for f in ("last.pt", "summary.json")):
            raise UserError(f"{folder} holds a run already: choose another --name or --out-dir, or --resume {folder}")
        copy = self.folder / Path(self.script_file).name
        if not (copy.exists() and copy.samefile(self.script_file)):
            with named(copy):
                shutil.copyfile(self.script_file, copy)
        write_json(self.folder / "args.json", vars(self.args))
        append(self.folder / "run.txt", provenance() + "\n")
        if self.saved:
            metrics.keep_until(self.folder / "metrics.csv", self.start)
        else:
            (self.folder / "metrics.csv").unlink(missing_ok=True)  # of a run that was killed before its first save
        self._tracker = metrics.open_tracker(self.args.tracker, self.folder, vars(self.args))

    def __exit__(self, *exc) -> None:
        self._restore_handlers()
        if self._lock is not None:
            os.close(self._lock)

    def _on_signal(self, number: int, frame) -> None:
        first, self._signalled = self._signalled is None, self._signalled or time.monotonic()
        self.stopped_by = number
        # A Ctrl-C reaches a rank twice, from the terminal and from torchrun, which passes it on: that is one.
        if devices.world_size() == 1 or (not first and time.monotonic() - self._signalled > 5):
            self._restore_handlers()
            if not first:
                os.kill(os.getpid(), number)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def seconds(self) -> float:
        """Wall seconds of the run, over all its resumed parts."""
        return time.monotonic() - self._wall

    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu

    def due(self, step: int, every: int | None = None) -> bool:
        """Whether to evaluate at this step: every --eval-every (or `every`) and at the end, but not twice."""
        again = self.saved is not None and step == self.start
        return (step % (every or self.args.eval_every) == 0 or step == self.args.steps) and not again

    def last(self, step: int) -> bool:
        """Whether to save and leave the loop at this step: the end, a signal, or --max-minutes."""
        self.step = step
        self.stopped_by, is_late = map(int, devices.largest(self.stopped_by, time.monotonic() > self._end))
        return step == self.args.steps or self.stopped_by != 0 or bool(is_late)

    def record(self, row: metrics.Row) -> None:
        """Append a row to metrics.csv, seconds last."""
        if devices.rank() == 0:
            metrics.write(self.folder / "metrics.csv", {**row, "sec": self.seconds()})

    def show(self, row: metrics.Row) -> None:
        """Print the log line, and send it to the tracker."""
        row = {**row, "sec": self.seconds()}
        if devices.rank() == 0:
            print(metrics.format_row(row), flush=True)
            self._tracker(row)

    def save(self, name: str, **fields) -> None:
        """Write a checkpoint of this step into the run folder. It is there for all ranks when this returns."""
        if devices.rank() == 0:
            checkpoint.save(self.folder / name, {
                "script": self.script, "format": checkpoint.FORMAT, "step": self.step, "args": vars(self.args),
                "seconds": self.seconds(), "cpu_seconds": self.cpu_seconds(), **fields})
        devices.largest(0)

    def leave_if_stopped(self) -> None:
        """After the loop: a Ctrl-C or SIGTERM ends the process here; from now on it acts at once."""
        self._restore_handlers()
        if self.stopped_by:
            again = shlex.join([*started(), self.script, "--resume", str(self.folder)])
            print(f"stopped at step {self.step}; go on with: {again}", flush=True)
            sys.exit(128 + self.stopped_by)

    def summary(self, **results) -> dict:
        """Write summary.json: what every script says of a run, then its results. Returns it."""
        out = {"script": self.script, "name": self.folder.resolve().name, "seed": self.args.seed,
               "steps": self.step, "stopped_early": self.step < self.args.steps, "seconds": self.seconds(),
               "cpu_seconds": self.cpu_seconds(), "command": command(), **results}
        if devices.rank() == 0:
            write_json(self.folder / "summary.json", out)
        return out


# ---- the folder

def open_folder(args: Flags, script_file: str) -> tuple[Path, int | None]:
    """Make (or, resuming, take) the run folder, and lock it until the descriptor is closed or the process dies.

    It is --out-dir, logs/SCRIPT/NAME, or the folder that is resumed. Raises UserError when another process holds it;
    OSError if it is not writable.
    """
    logs = Path("logs") / Path(script_file).stem
    folder = Path(args.out_dir) if args.out_dir else logs / args.name if args.name else None
    if args.resume:
        source = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        if folder is not None and folder.resolve() != source.resolve():
            raise UserError(f"--resume: the run goes on in its folder {source}, not in {folder}")
        folder = source
    if folder is None:
        folder = new_folder(logs, args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, hold(folder)


def new_folder(logs: Path, seed: int) -> Path:
    """Make a folder named by time and seed; of two runs that start in the same second, one waits for the next."""
    logs.mkdir(parents=True, exist_ok=True)
    while True:
        folder = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-s{seed}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)


def hold(folder: Path) -> int | None:
    """Lock a folder: the open descriptor. Raises UserError when another process has it."""
    try:
        import fcntl
        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):  # Windows has neither
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is writing into this run; wait for it, or stop it") from None
    except OSError:  # some network disks have no locks
        pass
    return descriptor


# ---- provenance

def command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join([*started(), *sys.argv])


def started() -> list[str]:
    """The words before the script's name."""
    n = devices.world_size()
    return ["python"] if n == 1 else ["torchrun", "--nproc-per-node", str(n)]


def commit() -> str:
    """`<hash>` or `<hash>, with changes` of the checkout; the environment variable RUN_COMMIT where there is no git."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
                              timeout=10)
        return done.stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("RUN_COMMIT", "unknown")


def changes(folder: str | os.PathLike) -> str:
    """How the files of a checkout differ from its commit, new ones by name; nothing where there is no git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, errors="replace").stdout
    try:
        return git("status", "--porcelain") + git("diff", "HEAD", "--no-color", "--no-ext-diff")
    except OSError:
        return ""


def provenance() -> str:
    """What is needed to repeat a run: time, command, commit, versions, machine."""
    import numpy
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return "\n".join([
        f"time     {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command  {command()}",
        f"commit   {commit()}",
        f"versions python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
        f"machine  {platform.platform()}, {os.cpu_count()} cores, GPU {gpu}",
    ]) + "\n"
