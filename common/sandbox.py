"""Run a program that a model wrote: python -m common.sandbox FILE.py --call solve --case '(3,)'

Threat model. The program is hostile: it wants to read or change files, reach the network, start, stop or slow
other processes, outlive its limits, break the caller with what it returns, or make itself or another program
pass. It runs in a child of a small clean server (a fresh `python -I -S`, never the caller), and the caller alone
knows the expected values. What stops what:

  fork      patches of modules and builtins die with the child; what it replies is data, read when it is dead;
            job and reply lie in memory that the server never reads, so the next child cannot find them
  server    CPU time (the verdict), wall time (ends waiting; time spent waiting for a busy CPU is not counted)
  rlimits   memory beyond the server's own, file sizes, descriptors, processes, core dumps
  own uid   (root only) other users' files; signals to others, and their priorities and limits
  landlock  all files, TCP, abstract sockets, signals, as far as the kernel's version goes
  seccomp   every system call but those that computing needs: no files, sockets, processes, signals, IPC

Not stopped: side channels of time and cache, faults of the kernel, and a program that chooses what it reports,
which is no more than `return 42` can do; a hostile reply of the greatest size may cost the caller 0.2 s. Where
the kernel lacks a layer, a warning says so and `protections` leaves it out.

mode="subprocess", for macOS and Windows, is weaker: a fresh interpreter for each program with a
limit of wall time and (not on Windows) of CPU time and memory, in whole seconds; files, network and processes are
open to it, and it chooses the seconds that it reports.

Sources: seccomp(2), landlock(7), syscall tables of Linux 6.18 (x86_64; arm64 is written from them, untested).
"""
from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import json
import math
import mmap
import os
import platform
import select
import signal
import struct
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Literal, NoReturn

ALL = ("rlimits", "own uid", "landlock", "seccomp")
DEPTH = 100               # containers within containers that cross
SPARE = 10_000            # bytes of a reply besides its values
PATIENCE = 5              # times Limits.wall after which a program that waits for a busy CPU is ended, too
IMPORTED = """math re json itertools functools collections string operator heapq bisect decimal fractions random
    statistics datetime dataclasses typing enum abc copy unicodedata textwrap ast cmath numbers array struct time
    calendar contextlib _strptime encodings.ascii encodings.latin_1 encodings.utf_16 encodings.utf_16_le
    encodings.utf_16_be encodings.utf_32 encodings.utf_8_sig encodings.unicode_escape encodings.cp1252
    encodings.iso8859_15 encodings.cp437 encodings.hex_codec encodings.rot_13 encodings.utf_7
    encodings.raw_unicode_escape"""


class SandboxError(RuntimeError):
    """The sandbox itself does not work; no verdict."""


@dataclass(frozen=True)
class Limits:
    """Of one program, all its cases together."""
    cpu: float = 1.0      # seconds of CPU time
    wall: float = 3.0     # seconds
    memory_mb: int = 256
    reply: int = 256_000  # bytes that its values may take

    def __post_init__(self):
        if not (all(0 < value < 1e6 for value in (self.cpu, self.wall, self.memory_mb)) and 0 < self.reply < 1 << 30
                and type(self.memory_mb) is type(self.reply) is int):
            raise ValueError(f"{self}: out of range")


@dataclass(frozen=True, repr=False)
class Result:
    status: Literal["ok", "error", "cpu", "wall", "memory", "reply", "died"]
    values: tuple = ()    # one a case, up to the first that failed; exact builtin types
    error: str = ""       # one printable line, at most 200 characters
    seconds: float = 0.0  # CPU time of the program

    def __repr__(self) -> str:  # that of an int of 4,301 digits is an error
        return f"Result({self.status!r}, {pack(self.values)[:200]}, {self.error!r}, {self.seconds:.3f})"


# ---- Values: exact builtin types as JSON, which is read without running anything. It joins pairs of surrogates: UTF-8

LEAVES = {type(None): lambda x: "null", bool: lambda x: "true" if x else "false", int: lambda x: f'"i{x:x}"',
          float: lambda x: f'"f{x.hex()}"', complex: lambda x: f'"c{x.real.hex()} {x.imag.hex()}"',
          str: lambda x: json.dumps("s" + x.encode("utf-8", "surrogatepass").decode("latin-1")),
          bytes: lambda x: f'"b{x.hex()}"'}
READ = {"i": lambda x: int(x, 16), "f": float.fromhex, "c": lambda x: complex(*map(float.fromhex, x.split(" "))),
        "s": lambda x: x.encode("latin-1").decode("utf-8", "surrogatepass"), "b": bytes.fromhex}
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, dict, set, frozenset)}


class TooLong(Exception):
    """A value takes more room than a reply has."""


def pack(value: object, room: float = math.inf, canonical: bool = False) -> str:
    """A value as JSON text; canonical: without the order of dicts and sets, and the sign of zero.

    Raises TypeError for any type but None, bool, int, float, complex, str, bytes and list, tuple, dict, set,
    frozenset of them (a subclass is another type), ValueError when nested deeper than DEPTH, TooLong.
    """
    def text(x: object, depth: int) -> str:
        nonlocal room
        kind = type(x)
        if kind in LEAVES:
            if canonical and kind in (float, complex):
                x = x + 0.0 if kind is float else complex(x.real + 0.0, x.imag + 0.0)
            out = LEAVES[kind](x)
            room -= len(out)
        else:
            if CONTAINERS.get(kind.__name__) is not kind:
                raise TypeError(f"a value of type {kind.__name__} does not cross")
            if depth == 0:
                raise ValueError(f"nested deeper than {DEPTH}")
            if kind is dict:
                items = [f"{text(k, depth - 1)},{text(v, depth - 1)}" for k, v in x.items()]
            else:
                items = [text(item, depth - 1) for item in x]
            if canonical and kind not in (list, tuple):
                items.sort()
            out = "[" + ",".join([f'"{kind.__name__}"', *items]) + "]"
            room -= len(items) + 8
        if room < 0:
            raise TooLong
        return out
    return text(value, DEPTH)


def unpack(text: str | bytes) -> object:
    """The value of a JSON text of pack. Raises ValueError for any other text, however it was made."""
    def build(node: object, depth: int) -> object:
        if node is None or type(node) is bool:
            return node
        if type(node) is str:
            return READ[node[:1]](node[1:])
        if depth == 0:
            raise ValueError
        kind, items = CONTAINERS[node[0]], [build(item, depth - 1) for item in node[1:]]
        if kind in (list, tuple):
            return kind(items)
        keys = items[::2] if kind is dict else items
        if max(Counter(map(hash, keys)).values(), default=0) > 100:  # equal hashes would make a dict quadratic
            raise ValueError
        return dict(zip(keys, items[1::2], strict=True)) if kind is dict else kind(items)
    try:
        node = json.loads(text)
    except (RecursionError, ValueError):
        raise ValueError("malformed") from None
    try:
        return build(node, DEPTH)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise ValueError("malformed") from None


def same(a: object, b: object) -> bool:
    """Whether two values are equal and of the same types in depth; NaN is the same as NaN, True is not 1.

    A value that cannot cross is the same as nothing.
    """
    try:
        return pack(a, canonical=True) == pack(b, canonical=True)
    except (TypeError, ValueError, RecursionError):
        return False


# ---- Layers: a function for each prepares it in the server; returns its name and what puts it on a child, for good

Layer = tuple[str, Callable[[], object]]
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
# What computing, sleeping and ending call, with the numbers on x86_64 and arm64. All that is open is /dev/null.
CALLS = {"read": (0, 63), "write": (1, 64), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
         "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98), "getrandom": (318, 278),
         "rt_sigreturn": (15, 139), "rt_sigprocmask": (14, 135), "sched_yield": (24, 124), "nanosleep": (35, 101),
         "getpid": (39, 172), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "times": (100, 153),
         "clock_getres": (229, 114), "gettimeofday": (96, 169), "getrusage": (98, 165), "exit": (60, 93),
         "restart_syscall": (219, 128), "exit_group": (231, 94)}
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def rlimits(limits: Limits, file_size: int = 0) -> Layer:
    import resource
    values = {"CPU": math.ceil(limits.cpu) + 1, "FSIZE": file_size, "NOFILE": 0, "NPROC": 0, "MEMLOCK": 0,
              "CORE": 1}  # 0 would let a program that takes core dumps run
    with suppress(FileNotFoundError), open("/proc/self/statm") as f:  # not on macOS
        values["AS"] = int(f.read().split()[0]) * mmap.PAGESIZE + (limits.memory_mb << 20)
    pairs = []
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        pairs.append((kind, (value, value)))
    return "rlimits", lambda: [resource.setrlimit(*pair) for pair in pairs]


def own_uid(limits: Limits) -> Layer:
    """Root becomes a user far above those that exist; not nobody, whom many programs share."""
    if os.geteuid() != 0:
        raise PermissionError
    with open("/proc/self/uid_map") as f:
        first, _, count = max((list(map(int, line.split())) for line in f), key=lambda row: row[2])
    uid = first + count - 2000 - os.getpid() % 30_000

    def put_on() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    return "own uid", put_on


def tie(limits: Limits) -> Layer:
    """Always on: no descriptor but /dev/null; die with the server (a change of user would undo it: so, after that)."""
    server, null = os.getpid(), os.open(os.devnull, os.O_RDWR)

    def put_on() -> None:
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.closerange(3, 1024)
        checked(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != server:
            os._exit(1)
    return "tie", put_on


def no_new_rights() -> None:
    """By any exec; without it only root may confine itself."""
    checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def landlock(limits: Limits) -> Layer:
    """Rules that allow nothing. Some kernels claim a newer version than they have: the newest that works counts."""
    claimed = checked(LIBC.syscall(LANDLOCK_CREATE, None, 0, 1))
    for version in range(min(claimed, 7), 0, -1):  # the rights of 7 are those of 6
        n_files = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
        rights = struct.pack("QQQ", (1 << n_files) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
        size = 8 if version < 4 else 16 if version < 6 else 24
        rules = LIBC.syscall(LANDLOCK_CREATE, rights[:size], size, 0)
        if rules >= 0:
            break

    def put_on() -> None:
        no_new_rights()
        checked(LIBC.syscall(LANDLOCK_RESTRICT, rules, 0))
    return f"landlock {version}{f' (claims {claimed})' * (version < min(claimed, 7))}", put_on


def seccomp(limits: Limits) -> Layer:
    """What is not allowed fails with EPERM, or ENOSYS if it is younger than Linux 5.1: glibc falls back at that alone.

    A call of another architecture (i386, x32) ends the process.
    """
    column, arch = list(MACHINES).index(platform.machine()), MACHINES[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06                # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, RET|K
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000              # SECCOMP_RET_*
    steps = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill),  # 4: arch in struct seccomp_data
             (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for numbers in CALLS.values():
        steps += [(equal, 0, 1, numbers[column]), (give, 0, 0, allow)]
    steps += [(at_least, 0, 1, 424), (give, 0, 0, fail | errno.ENOSYS), (give, 0, 0, fail | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))

    def put_on(code: object = code) -> None:  # which is to live as long as this
        no_new_rights()
        checked(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))
    return "seccomp", put_on


def prepared(limits: Limits, names: Sequence[str]) -> list[Layer]:
    """Those of these layers that this kernel has, in the order in which they are put on; each is tried in a child."""
    layers = []
    for prepare in (own_uid, landlock, tie, rlimits, seccomp):
        if prepare is not tie and prepare.__name__.replace("_", " ") not in names:
            continue
        with suppress(OSError, ValueError):  # the kernel has no such thing, or does not know this machine
            layer = prepare(limits)
            pid = os.fork()
            if pid == 0:
                try:
                    layer[1]()
                    if prepare in (landlock, seccomp):
                        os.listdir("/")
                        os._exit(1)
                    os._exit(0)
                except PermissionError as e:
                    os._exit(e.filename != "/")
                finally:
                    os._exit(1)
            if os.waitpid(pid, 0)[1] == 0:
                layers.append(layer)
    return layers


# ---- The child: runs the program, and writes a line for each value and one for the end

def run_program(job: bytes, write: Callable[[bytes], object], reply: int) -> None:
    """Call the job's function for each of its cases; write(line) takes at most `reply` bytes, and the end."""
    status, error = "ok", ""
    try:
        code, name, cases = json.loads(job)
        module = sys.modules["solution"] = types.ModuleType("solution")
        exec(compile(code, "<solution>", "exec", dont_inherit=True), module.__dict__)
        if name not in module.__dict__:
            raise NameError(f"no {name} is defined")
        for case in cases:
            line = b"=" + pack(module.__dict__[name](*unpack(case)), reply).encode() + b"\n"
            reply -= len(line)
            if reply < 0:
                raise TooLong
            write(line)
    except MemoryError:
        status = "memory"
    except TooLong:
        status = "reply"
    except BaseException as e:  # SystemExit and KeyboardInterrupt among them
        status, error = "error", type(e).__name__[:200]
        with suppress(BaseException):
            error = f"{error}: {e}"[:200]
    write(b"!" + pack((status, error, time.process_time())).encode() + b"\n")


def run_once(limits: Limits, names: Sequence[str]) -> NoReturn:
    """mode="subprocess": this process is the child, its job and its reply are standard input and output."""
    job, reply = sys.stdin.buffer.read(), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if "rlimits" in names and os.name == "posix":
        rlimits(limits, file_size=limits.reply + SPARE)[1]()
    run_program(job, partial(os.write, reply), limits.reply)
    os._exit(0)


# ---- The server: one child a job

def serve(limits: Limits, names: Sequence[str], shared: int) -> NoReturn:
    """For each byte of the socket, standard input, run the job in `shared`; answer what became of it, in a line.

    `shared` is memory of the caller: room for a reply, then a job. Ends when the caller does.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reply = mmap.mmap(shared, limits.reply + SPARE)
    layers, caller = prepared(limits, names), os.pidfd_open(os.getppid())
    gc.freeze()
    hello = [name for layer in ALL for name, _ in layers if name.startswith(layer)]
    os.write(0, json.dumps(hello).encode() + b"\n")
    while wait_for({0: select.POLLIN, caller: select.POLLIN}) == 0 and os.read(0, 1):
        pid = os.fork()
        if pid == 0:
            try:
                job = os.pread(shared, os.fstat(shared).st_size, len(reply))
                for _, put_on in layers:
                    put_on()
                run_program(job, reply.write, limits.reply)
                os._exit(0)
            finally:
                os._exit(1)
        ended_by = watch(pid, limits, caller)
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        verdict = [ended_by, usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)]
        os.write(0, json.dumps(verdict).encode() + b"\n")
    os._exit(0)


def wait_for(events: dict[int, int], seconds: float | None = None) -> int | None:
    """The first of these descriptors that has one of its events, or was closed; None after so many seconds."""
    poll = select.poll()
    for descriptor, event in events.items():
        poll.register(descriptor, event)
    ready = poll.poll(None if seconds is None else 1000 * seconds + 1)
    return ready[0][0] if ready else None


def watch(pid: int, limits: Limits, caller: int) -> str:
    """Wait until the child ends, or has reached a limit: "cpu" or "wall". Ends with the caller, too."""
    child, start, wait, ended_by = os.pidfd_open(pid), time.monotonic(), min(limits.cpu, limits.wall), ""
    while not ended_by and (ended := wait_for({child: select.POLLIN, caller: select.POLLIN, 0: 0}, wait)) != child:
        if ended is not None:
            os._exit(0)  # the child dies of it
        used, seconds = time.clock_gettime(~pid << 3 | 2), time.monotonic() - start  # CPUCLOCK_SCHED of the child
        waited = seconds
        with suppress(OSError, IndexError), open(f"/proc/{pid}/schedstat") as f:
            waited -= int(f.read().split()[1]) / 1e9  # of this, it was ready to run and waited for a CPU
        wait = min(limits.cpu - used, limits.wall - waited)
        if wait <= 0 or seconds > PATIENCE * limits.wall:
            ended_by = "cpu" if used >= limits.cpu else "wall"
    os.close(child)
    return ended_by


# ---- The caller. What only it needs is imported where it is used: a smaller server forks faster.

def start(what: str, run: Callable, *settings: object, **options: object):
    """Run this file in a fresh interpreter, by subprocess.Popen or subprocess.run. Raises SandboxError."""
    words = [sys.executable, "-I", "-S", os.path.abspath(__file__), what, json.dumps(settings)]
    environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows needs it
    try:
        return run(words, env=environment, stderr=-3, start_new_session=True, **options)  # -3: subprocess.DEVNULL
    except OSError as e:
        raise SandboxError(f"cannot start {sys.executable}: {e}") from None


class Client:
    """The caller's end of a server. Raises OSError when that has ended, or does not answer."""

    def __init__(self, limits: Limits, layers: Sequence[str]):
        import socket
        import subprocess
        self.room, self.shared = limits.reply + SPARE, os.memfd_create("sandbox")
        os.ftruncate(self.shared, self.room)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE * limits.wall + 5)
        self.answers = self.socket.makefile("rb")
        with theirs:
            self.process = start("--serve", subprocess.Popen, astuple(limits), layers, self.shared, stdin=theirs,
                                 stdout=-3, cwd="/", pass_fds=[self.shared])
        try:
            self.protections = tuple(self.answer())
        except BaseException:
            self.close(kill=True)
            raise

    def answer(self) -> list:
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("it ended")
        return json.loads(line)

    def ask(self, job: bytes) -> tuple[str, float, int, bytes]:
        """What ended the job early ("", "cpu", "wall"), its CPU seconds, exit code and reply."""
        os.ftruncate(self.shared, 0)  # so that what was there is gone
        os.ftruncate(self.shared, self.room)
        os.pwrite(self.shared, job, self.room)
        self.socket.sendall(b"!")
        ended_by, seconds, code = self.answer()
        reply = os.pread(self.shared, 4000, 0)
        if b"\0" not in reply:
            reply = os.pread(self.shared, self.room, 0)
        return ended_by, seconds, code, reply.partition(b"\0")[0]

    def close(self, kill: bool = False) -> None:
        with suppress(OSError):
            self.socket.shutdown(2)  # a process that was forked from this one may hold it open
        self.answers.close()
        self.socket.close()
        os.close(self.shared)
        with suppress(Exception):
            self.process.wait(0 if kill else 5)
        self.process.kill()
        self.process.wait()


def judge(limits: Limits, n_cases: int, ended_by: str, seconds: float | None, code: int, reply: bytes) -> Result:
    """The result of a program from what its child left; seconds None: what the child itself says."""
    *lines, rest = reply.split(b"\n")
    end = lines.pop() if lines and lines[-1][:1] == b"!" else b""
    try:
        if len(lines) > n_cases or any(line[:1] != b"=" for line in lines):
            raise ValueError
        values = tuple(unpack(line[1:]) for line in lines)
        status, error, own = unpack(end[1:]) if end else ("", "", 0.0)
        if not (type(status) is type(error) is str and type(own) is float and 0 <= own < math.inf):
            raise ValueError
    except (TypeError, ValueError):
        return Result("died", (), "its reply is malformed", seconds or 0.0)
    seconds = own if seconds is None else seconds
    if ended_by or seconds >= limits.cpu:
        return Result(ended_by or "cpu", values, "", seconds)
    whole = code == 0 and not rest and status in ("ok", "error", "memory", "reply")
    if not whole or (status == "ok" and len(values) < n_cases):
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return Result("died", values, f"it ended {how}, without a whole reply", seconds)
    return Result(status, values, ascii(error)[1:-1][:200], seconds)


class Sandbox:
    """Where programs run: `with Sandbox() as box: box.run(code, "solve", [(3,), (4,)])`.

    mode: server, subprocess (weaker, see above), or auto: server on Linux. workers: programs at a time in
    run_all. layers: of ALL; fewer are for tests. Threads may share it, forked processes may not.
    Raises SandboxError when its self-test fails.
    """

    def __init__(self, limits: Limits = Limits(), mode: str = "auto", workers: int = 1, layers: Sequence[str] = ALL):
        import queue
        if mode not in ("auto", "server", "subprocess") or not set(layers) <= set(ALL) or workers < 1:
            raise ValueError(f"mode {mode!r}, layers {layers}, workers {workers}")
        self.limits, self.layers, self.workers, self.owner = limits, tuple(layers), workers, os.getpid()
        self.mode = mode if mode != "auto" else "server" if hasattr(os, "pidfd_open") else "subprocess"
        self.idle = queue.SimpleQueue()  # clients, or None for one that is still to be started
        for _ in range(workers):
            self.idle.put(None)
        self.protections: tuple[str, ...] | None = None
        if self.mode == "subprocess":
            self.protections = ("rlimits",) if "rlimits" in layers and os.name == "posix" else ()
            warnings.warn("sandbox: files, network and processes are open to programs here", stacklevel=2)
        try:
            self.test()
        except BaseException:
            self.close()
            raise

    def test(self) -> None:
        """Raise SandboxError unless an honest program passes, a wrong one fails, and files are out of reach."""
        code = "def double(x): return x + x\ndef wrong(): 1 / 0\ndef attack(): open('/proc/self/maps')"
        honest = self.run(code, "double", [(21,), ("ab",)])
        wrong = self.run(code, "wrong", [()])
        attack = self.run(code, "attack", [()])
        confined = any(name.startswith(("landlock", "seccomp")) for name in self.protections)
        for result, sound in ((honest, honest.status == "ok" and honest.values == (42, "abab")),
                              (wrong, wrong.error.startswith("ZeroDivisionError")),
                              (attack, not confined or attack.error.startswith(("PermissionError", "OSError")))):
            if not sound:
                raise SandboxError(f"the sandbox does not work here, its self-test gives {result}")

    def run(self, code: str, name: str, cases: Sequence[tuple]) -> Result:
        """Call name(*case) for each case. Raises TypeError for a case that cannot cross, SandboxError."""
        if self.owner != os.getpid():
            raise SandboxError("the sandbox is closed, or was opened by another process")
        job = json.dumps([code, name, [pack(tuple(case)) for case in cases]]).encode()
        if self.mode == "subprocess":
            return self.run_in_subprocess(job, len(cases))
        client, reason = self.idle.get(), None
        try:
            for _ in range(3):  # that a server was killed says nothing of the program: it is judged again
                if self.owner is None:
                    raise SandboxError("the sandbox was closed")
                try:
                    client = client or self.new_client()
                    return judge(self.limits, len(cases), *client.ask(job))
                except OSError as e:
                    client, reason = client and client.close(kill=True), e
            raise SandboxError(f"its server was lost three times: {reason}")
        except BaseException:
            client = client and client.close(kill=True)  # after a Ctrl-C, an answer may be on its way
            raise
        finally:
            self.idle.put(client)

    def new_client(self) -> Client:
        client = Client(self.limits, self.layers)
        if self.protections is None:
            self.protections = client.protections
            for layer in self.layers:
                have = next((x for x in self.protections if x.startswith(layer)), "nothing")
                if "claims" in have or (have == "nothing" and (layer != "own uid" or os.geteuid() == 0)):
                    warnings.warn(f"sandbox: for {layer}, this kernel gives {have}", stacklevel=5)
        if client.protections != self.protections:
            client.close()
            raise SandboxError(f"a new server has {client.protections}, the first had {self.protections}")
        return client

    def run_in_subprocess(self, job: bytes, n_cases: int) -> Result:
        import subprocess
        import tempfile
        with tempfile.TemporaryFile() as reply:
            try:
                code = start("--once", subprocess.run, astuple(self.limits), self.layers, input=job, stdout=reply,
                             cwd=tempfile.gettempdir(), timeout=self.limits.wall).returncode
                ended_by = "cpu" if code == -9 else ""
            except subprocess.TimeoutExpired:
                code, ended_by = 0, "wall"
            reply.seek(0)
            lines = reply.read(self.limits.reply + SPARE)
            return judge(self.limits, n_cases, ended_by, None, code, lines)

    def run_all(self, jobs: Iterable[tuple[str, str, Sequence[tuple]]]) -> Iterator[Result]:
        """run of each job, `workers` at a time; results in the order of the jobs."""
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(lambda job: self.run(*job), jobs)

    def close(self) -> None:
        """End the servers. No process is left."""
        self.owner = None
        for _ in range(self.workers):
            client = self.idle.get()
            self.idle.put(client and client.close())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def main(argv: list[str] | None = None) -> None:
    """Run one file, and print the result and the protections."""
    import argparse
    import ast

    from common.files import UserError, one_line_errors
    from common.flags import Parser, path

    def arguments(text: str) -> tuple:
        with suppress(SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            case = ast.literal_eval(text)
            if type(case) is tuple and pack(case):
                return case
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected a tuple of plain values, like (3,)")
    p = Parser(prog="common.sandbox", usage="python -m common.sandbox FILE.py [flags]", description=__doc__)
    p.add_argument("file", type=path, metavar="FILE.py", help="program to run")
    p.add_argument("--call", default="solve", metavar="NAME", help="its function")
    p.add_argument("--case", action="append", type=arguments, metavar="'(A, B)'", help="its arguments; repeatable")
    args = p.parse_args(argv)
    with one_line_errors("common.sandbox"):
        cases = args.case or [()]
        try:
            with open(args.file, encoding="utf-8", errors="surrogateescape") as f, Sandbox() as box:
                result = box.run(f.read(), args.call, cases)
        except SandboxError as e:
            raise UserError(e) from None
        sys.set_int_max_str_digits(0)  # of a value that is to be read
        print(f"protections: {', '.join(box.protections) or 'none'}")
        print(f"{result.status}, {result.seconds:.3f} CPU-s {result.error}")
        for case, value in zip(cases, result.values, strict=False):
            print(f"{args.call}{case!a} = {value!a}")


if __name__ == "__main__":
    inside = {"--serve": serve, "--once": run_once}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if inside is None:
        main()
    else:
        warnings.simplefilter("ignore")
        for module_name in IMPORTED.split():
            importlib.import_module(module_name)
        own_limits, *others = json.loads(sys.argv[2])
        inside(Limits(*own_limits), *others)
