"""Attacks on common/sandbox.py: each defines f(), which returns "THROUGH" if it did what it wanted.

    python tests/sandbox_attacks.py        # all of them as this user; prints what got through, as JSON

Run by test_sandbox.py, also as an ordinary user, so that it imports nothing but the sandbox.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# ---- with Python's own functions: {line} is the attempt

PLAIN = """
open("/etc/passwd").read()
open("/proc/self/environ").read()
open("/tmp/left", "w")
os.open("/tmp", os.O_RDONLY)
os.listdir("/")
os.stat("/etc/passwd")
os.chmod("/tmp", 0o777)
os.chown("/tmp", os.getuid(), -1)
os.utime("/tmp")
os.mkdir("/tmp/left")
os.symlink("/etc/passwd", "/tmp/left")
os.mkfifo("/tmp/left")
os.unlink("/etc/hostname")
os.rename("/tmp", "/tmp2")
os.truncate("/etc/hostname", 0)
os.setxattr("/tmp", "user.left", b"x")
os.chdir("/tmp")
os.memfd_create("left")
os.pipe()
os.dup(1)
os.eventfd(0)
os.sendfile(1, 0, 0, 10)
os.openpty()
os.fork()
os.posix_spawn("/bin/true", ["true"], {})
os.execv("/bin/true", ["true"])
os.system("true") == 0 or 1 / 0
os.kill(os.getppid(), 9)
os.kill(-1, 9)
os.kill(0, 9)
os.killpg(0, 9)
os.pidfd_open(os.getppid())
os.setpriority(os.PRIO_USER, os.getuid(), 10)
os.nice(5)
os.sched_setaffinity(0, {0})
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.setuid(0)
os.setgid(0)
os.setsid()
os.umask(0)
os.getsid(0)
os.waitpid(-1, os.WNOHANG)
os.write(3, b"x")
os.read(3, 1)
os.close(0)
os.ftruncate(1, 0)
os.posix_openpt(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 100)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))
fcntl.flock(0, fcntl.LOCK_EX)
threading.Thread(target=int).start()
_thread.start_new_thread(int, ())
_socket.socket()
_socket.socketpair()
subprocess.run(["true"])
__import__("urllib.request")
select.epoll()
mmap.mmap(3, 10)
time.clock_settime(time.CLOCK_REALTIME, 0)
"""

# ---- with system calls that Python has no function for; the numbers are those of x86_64
CALLS = """
2, b"/etc/passwd", 0
257, -100, b"/etc/passwd", 0
437, -100, b"/etc/passwd", b"\\0" * 24, 24
304, -100, b"/etc/passwd"
41, 2, 1, 0
53, 1, 1, 0, pointer
56, 17, 0, 0, 0, 0
435, pointer, 64
57
58
59, b"/bin/true", 0, 0
322, -100, b"/bin/true", 0, 0, 0
62, os.getpid(), 0
200, os.getpid(), 0
234, os.getpid(), os.getpid(), 0
424, 3, 9, 0, 0
434, 1, 0
438, 3, 0, 0
101, 16, 1, 0, 0
310, 1, pointer, 1, pointer, 1, 0
311, 1, pointer, 1, pointer, 1, 0
302, os.getpid(), 9, 0, pointer
160, 9, pointer
141, 2, 0, 5
251, 3, 0, 0
203, 0, 8, pointer
144, 0, 0, pointer
314, 0, pointer, 0
29, 0, 4096, 0o1600
64, 0, 1, 0o1600
68, 0, 0o1600
240, b"left", 0o102, 0o600, 0
248, b"user", b"left", b"x", 1, -3
250, 0, -3, 1
425, 8, pointer
323, 0
319, b"left", 0
447, 0
321, 0, pointer, 64
298, pointer, 0, -1, -1, 0
272, 0x10000000
308, 3, 0
165, b"none", b"/tmp", b"tmpfs", 0, 0
161, b"/tmp"
155, b"/", b"/"
157, 22, 0, 0, 0, 0
157, 1, 0, 0, 0, 0
157, 4, 1, 0, 0, 0
158, 0x1002, 0
317, 1, 0, pointer
446, 3, 0
444, 0, 0, 1
175, b"x", 1, b""
246, 0, 0, 0, 0
169, 0xfee1dead, 672274793, 0, 0
170, b"left", 4
227, 0, pointer
159, pointer
103, 2, pointer, 10
173, 0, 1, 1
16, 1, 0x5412, b"x"
72, 0, 1030, 0
73, 0, 2
32, 0
292, 0, 5, 0
436, 3, 5, 0
325, pointer, 4096, 0
149, pointer, 4096
151, 1
253
283, 1, 0
282, -1, pointer, 8, 0
222, 1, 0, pointer
13, 15, 0, 0, 8
39 | 0x40000000
57 | 0x40000000
"""

# ---- whole programs
PROGRAMS = {
    "i386 calls": """
        import ctypes, mmap
        def f():
            page = mmap.mmap(-1, 4096, prot=7)
            page.write(bytes.fromhex("53b814000000cd805bc3"))                # getpid of i386
            call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
            return "THROUGH" if call() > 0 else "" """,
    "an object that equals all": """
        class Equal:
            def __eq__(self, other): return True
            def __hash__(self): return 42
        def f(): return Equal()""",
    "an int that equals all": """
        class Equal(int):
            def __eq__(self, other): return True
        def f(): return [Equal(3)]""",
    "more values than cases": """
        import gc, mmap
        def f():
            reply = next(x for x in gc.get_objects() + [y for z in gc.get_objects() for y in gc.get_referents(z)]
                         if type(x) is mmap.mmap)
            lines = b'="sTHROUGH"\\n' * 3 + b'!["tuple","sok","s","f0x0.0p+0"]\\n'
            reply[:8 + len(lines)] = len(lines).to_bytes(8, "little") + lines
            os._exit(0)""",
    "a length that is a lie": """
        import gc, mmap
        def f():
            reply = next(x for x in gc.get_objects() + [y for z in gc.get_objects() for y in gc.get_referents(z)]
                         if type(x) is mmap.mmap)
            reply[:8] = b"\\xff" * 8
            os._exit(0)""",
    "ends early": "def f(): os._exit(0)",
    "exits": "def f(): raise SystemExit(0)",
    "crashes": """
        import ctypes
        def f(): return ctypes.string_at(1)""",
    "deep recursion": """
        sys.setrecursionlimit(10**9)
        def g(x): return [g(x)]
        def f(): return g(0)""",
    "a list of itself": """
        def f():
            x = []
            x.append(x)
            return x""",
    "text of an error that never ends": """
        class E(Exception):
            def __str__(self):
                while True: pass
        def f(): raise E""",
    "a name that raises": """
        class M(type):
            @property
            def __name__(self): raise SystemExit
        class E(Exception, metaclass=M): pass
        def f(): raise E""",
    "waits for ever": "def f(): time.sleep(100)",
    "catches everything": """
        def f():
            while True:
                try:
                    while True: pass
                except BaseException: pass""",
    "one step of C that lasts": "def f(): return 9**9**9",
    "a regular expression that lasts": """
        import re
        def f(): return re.match("(a*)*b", "a" * 40)""",
    "all memory": """
        def f():
            x = []
            while True:
                try: x.append(bytearray(1 << 20))
                except MemoryError: pass""",
    "a reply that is too long": "def f(): return 'x' * 10**8",
    "a reply of shared parts": """
        def f():
            x = []
            for _ in range(60): x = [x] * 10
            return x""",
}


def programs() -> dict[str, str]:
    """Source by name; each defines f(), and the first lines import what is there."""
    start = ("import os, sys, time\nfor name in 'signal resource fcntl threading _thread _socket subprocess select mmap'"
             ".split():\n try: globals()[name] = __import__(name)\n except BaseException: pass\n")
    out = {line: f"{start}def f():\n {line}\n return 'THROUGH'" for line in PLAIN.strip().splitlines()}
    if os.uname().machine == "x86_64":
        for line in CALLS.strip().splitlines():
            out[f"syscall {line}"] = (
                f"{start}import ctypes\ndef f():\n pointer = ctypes.create_string_buffer(4096)\n"
                f" return 'THROUGH' if ctypes.CDLL(None).syscall({line}) >= 0 else ''")
    for name, code in PROGRAMS.items():
        lines = code.split("\n")
        indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
        out[name] = start + "\n".join(x[indent:] for x in lines)
    return out


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from common.sandbox import Limits, Sandbox
    out = {}
    with Sandbox(Limits(cpu=0.3, wall=0.6, memory_mb=64)) as box:
        for name, code in programs().items():
            before = box.run("def f(x): return x + 1", "f", [(1,)])
            result = box.run(code, "f", [()])
            after = box.run("def f(x): return x + 2", "f", [(1,)])
            sound = (before.status, before.values, after.status, after.values) == ("ok", (2,), "ok", (3,))
            if result.status == "ok" or not sound or not result.error.isascii():
                out[name] = [result.status, repr(result.values)[:80], result.error, sound]
    print(json.dumps({"through": {k: v for k, v in out.items() if v[:2] != ["ok", "('',)"] or not v[3]},
                      "protections": box.protections, "n": len(programs())}))


if __name__ == "__main__":
    main()
