import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import sandbox
from common.sandbox import ALL, Limits, Result, Sandbox, SandboxError, pack, same, unpack

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the server needs Linux")
TIGHT = Limits(cpu=0.2, wall=0.5, memory_mb=64, reply=10_000)
IDENTITY = "def f(*x): return x[0] if len(x) == 1 else x"


@pytest.fixture(scope="module")
def box():
    with Sandbox(TIGHT) as box:
        kept[:] = children(os.getpid())
        yield box


def run(box, code, *case, name="f"):
    return box.run(code, name, [case])


def children(pid=None):
    """Processes below one, zombies too; of this one, without the server of the fixture."""
    tasks = Path(f"/proc/{pid or os.getpid()}/task")
    found = [int(x) for t in tasks.iterdir() for x in (t / "children").read_text().split()]
    found += [y for x in found if Path(f"/proc/{x}").exists() for y in children(x)]
    return [x for x in found if pid or x not in kept]


kept: list[int] = []


# ---- values

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.binary() | st.text(
    st.characters())
hashable = st.recursive(leaves, lambda x: st.lists(x).map(tuple) | st.frozensets(x), max_leaves=8)
values = st.recursive(hashable, lambda x: st.lists(x) | st.dictionaries(hashable, x) | st.sets(hashable), max_leaves=20)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(values)
def test_a_value_crosses_unchanged_and_is_the_same(value):
    back = unpack(pack(value))
    assert same(back, value) and type(back) is type(value)


@pytest.mark.parametrize("a, b, want", [
    (1, True, False), (1, 1.0, False), (0.0, -0.0, True), (math.nan, -math.nan, True), ([1], (1,), False),
    ({1: 2, 3: 4}, {3: 4, 1: 2}, True), ({1: 2}, {True: 2}, False), ({1, 2}, {2, 1}, True), ({1}, {True}, False),
    ({1}, frozenset({1}), False), ([math.nan], [math.nan], True), ("1", b"1", False), (10**5000, 10**5000, True),
    (10**5000, 10**5000 + 1, False), ("\ud800", "\ud800", True), ("\ud83d\ude00", "\U0001f600", False),
    (complex(0.0, -0.0), 0j, True), (object(), object(), False), ([], (), False),
    (complex(0, math.nan), complex(0, math.nan), True), (int, int, False)], ids=lambda x: str(type(x).__name__))
def test_same_is_strict_about_types_in_depth(a, b, want):
    for wrapped in (lambda x: x, lambda x: [x], lambda x: {"k": (x,)}):
        assert same(wrapped(a), wrapped(b)) is want


def test_what_only_pretends_is_the_same_as_nothing():
    class Equal(int):
        def __eq__(self, other):
            return True
        __hash__ = int.__hash__
    assert not any(same(x, y) for x in (Equal(1), [Equal(1)]) for y in (1, [1], x))
    deep = []
    for _ in range(sandbox.DEPTH + 1):
        deep = [deep]
    assert not same(deep, deep) and same(deep[0][0], deep[0][0])


@pytest.mark.parametrize("text", [
    "", "1", "1.5", "NaN", "{}", '"x1"', '""', '"i"', '"iq"', '"f"', '"fx"', '"c1 2 3"', '"b0"', "[]", "[1]",
    '["list"', '["list", 1]', '["range"]', '["set", ["list"]]', '["dict", "i1"]', '["dict", ["list"], "i1"]', "[[]]",
    '["list"]]', "[" * 100_000, '["list",' * 101 + "null" + "]" * 101, "9" * 5000, '"\\', "\ud800", '"i' + "_" * 9])
def test_any_other_text_is_malformed(text):
    with pytest.raises(ValueError, match="malformed"):
        unpack(text)


def test_keys_of_equal_hash_are_refused_before_they_take_time():
    many = ",".join(f'"i{(2**61 - 1) * k:x}"' for k in range(12_000))
    start = time.process_time()
    for text in (f'["set",{many}]', f'["dict",{many}]', f'["list",["frozenset",{many}]]'):
        with pytest.raises(ValueError, match="malformed"):
            unpack(text)
    assert time.process_time() - start < 1  # a set of them takes seconds


# ---- verdicts

@linux
@pytest.mark.parametrize("code, status, error", [
    ("def f(x): return x", "ok", ""),
    ("def g(x): return x", "error", "NameError: no f is defined"),
    ("f = 3", "error", "TypeError"),
    ("def f(x: return", "error", "SyntaxError"),
    ("def f(x): return '\0'", "error", ""),
    ("def f(x): return '\ud800'", "error", "UnicodeEncodeError"),
    ("def f(x): return 1 / 0", "error", "ZeroDivisionError: division by zero"),
    ("def f(x): return f(x)", "error", "RecursionError"),
    ("def f(x): raise SystemExit(3)", "error", "SystemExit: 3"),
    ("def f(x): raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
    ("def f(x): return object()", "error", "TypeError: a value of type object does not cross"),
    ("def f(x): return type('I', (int,), {})(3)", "error", "TypeError: a value of type I"),
    ("def f(x):\n y = []\n for _ in range(101): y = [y]\n return y", "error", "ValueError: nested deeper than 100"),
    ("def f(x):\n while True: pass", "cpu", ""),
    ("def f(x): return 9**9**9", "cpu", ""),
    ("import time\ndef f(x): time.sleep(9)", "wall", ""),
    ("def f(x): return bytearray(10**9)", "memory", ""),
    ("def f(x): return [0] * 10**6", "reply", ""),
    ("def f(x): return 10**20000", "reply", ""),
    ("import os\ndef f(x): os._exit(0)", "died", "it ended with exit code 0, without a whole reply"),
    ("import ctypes\ndef f(x): ctypes.string_at(0)", "died", "it ended by signal 11, without a whole reply")])
def test_a_status_says_what_happened(box, code, status, error):
    result = run(box, code, 1)
    assert result.status == status and result.error.startswith(error) and bool(result.error) == (status in ("error", "died"))
    assert result.values == ((1,) if status == "ok" else ())
    assert (result.seconds >= TIGHT.cpu) == (status == "cpu") and result.seconds < 3 * TIGHT.cpu


@linux
def test_values_are_those_before_the_case_that_failed(box):
    code = "import time\ndef f(x):\n if x == 2: {}\n return x * x"
    for failure, status in (("1 / 0", "error"), ("time.sleep(9)", "wall"), ("time._exit(1)", "error")):
        result = box.run(code.format(failure), "f", [(0,), (1,), (2,), (3,)])
        assert (result.status, result.values) == (status, (0, 1))
    assert box.run(code.format("pass"), "f", []) == Result("ok", (), "", pytest.approx(0, abs=0.2))
    assert box.run("def f(a, b=2): return a - b", "f", [(5,), (5, 1)]).values == (3, 4)


@linux
def test_an_error_is_one_printable_line(box):
    text = run(box, "def f(): raise ValueError('\\x1b[31m\\r\\n\\u202e\\ud800\\0' * 100)").error
    assert text.isascii() and text.isprintable() and 100 < len(text) <= 200 and text.startswith("ValueError: \\x1b[31m")
    assert run(box, "class E(Exception):\n def __str__(self): 1 / 0\ndef f(): raise E").error == "E"


@linux
def test_values_of_all_kinds_cross_both_ways(box):
    given = [None, True, -1, 10**5000, 0.1, math.inf, -0.0, 1j, "\ud800é\0\n", b"\xff\n", [1, (2, [3])], {"a": {1: None}},
             {(1, 2), 3}, frozenset({b"x"}), (), {}, set()]
    result = box.run(IDENTITY, "f", [(x,) for x in given])
    assert result.status == "ok" and [*map(repr, result.values[4:])] == [*map(repr, given[4:])]
    assert same(result.values, tuple(given)) and math.isnan(run(box, IDENTITY, math.nan).values[0])
    assert len(repr(result)) < 300 and repr(result).startswith("Result('ok', [\"tuple\",null,true,")
    with pytest.raises(TypeError, match="object"):
        run(box, IDENTITY, object())


@linux
def test_a_caller_that_is_deep_in_recursion_hears_of_it():
    def deep(n):
        return deep(n - 1) if n else run(box, "def f():\n x = []\n for _ in range(95): x = [x]\n return x")
    with Sandbox(TIGHT) as box:
        assert deep(10).status == "ok"
        with pytest.raises(RecursionError):
            deep(sys.getrecursionlimit() - 190)
        assert run(box, IDENTITY, 1).values == (1,)


HONEST = {
    "math, cmath": ("import math, cmath\ndef f(x): return math.comb(5, x), cmath.sqrt(-1)", 2, (10, 1j)),
    "re, string": ("import re, string\ndef f(x): return re.sub('[aeiou]', '*', x) + string.capwords('a b')", "hello", "h*ll*A B"),
    "json": ("import json\ndef f(x): return json.loads(json.dumps({'a': [x, None]}))", 1, {"a": [1, None]}),
    "itertools": ("from itertools import *\ndef f(x): return list(accumulate(range(x)))", 4, [0, 1, 3, 6]),
    "functools": ("import functools\n@functools.lru_cache\ndef f(x): return 1 if x < 2 else f(x - 1) + f(x - 2)", 80, 37889062373143906),
    "collections": ("from collections import *\ndef f(x): return Counter(x).most_common(1), deque([1]).pop()", "abb", ([("b", 2)], 1)),
    "heapq, bisect": ("import heapq, bisect, operator\ndef f(x): return heapq.nsmallest(2, x) + [bisect.bisect([1, 5], 3)]", [3, 1, 2], [1, 2, 1]),
    "decimal": ("from decimal import *\ndef f(x): return str(Decimal(x) / 7), round(float(Decimal(x).sqrt()), 9)", 2,
                ("0.2857142857142857142857142857", 1.414213562)),
    "fractions": ("from fractions import Fraction\nfrom numbers import Rational\ndef f(x): return str(Fraction(x, 6)), isinstance(Fraction(1), Rational)", 4, ("2/3", True)),
    "statistics": ("import statistics\ndef f(x): return statistics.mean(x), statistics.quantiles(x)", [1, 2, 3], (2, [1.0, 2.0, 3.0])),
    "random": ("import random\ndef f(x): random.seed(x); a = random.random(); random.seed(x); return a == random.random() and 0 <= random.Random().random() < 1", 7, True),
    "datetime": ("from datetime import *\ndef f(x): return str(datetime.strptime(x, '%d %b %Y') + timedelta(days=1)), date(2024, 2, 29).strftime('%A'), datetime.now() > datetime(2020, 1, 1)",
                 "28 Feb 2024", ("2024-02-29 00:00:00", "Thursday", True)),
    "dataclasses": ("from __future__ import annotations\nfrom dataclasses import *\n@dataclass(order=True)\nclass P:\n x: int\n y: list[int] = field(default_factory=list)\ndef f(x): return asdict(P(x)), P(1) < P(2)",
                    3, ({"x": 3, "y": []}, True)),
    "typing, enum, abc": ("from typing import *\nfrom enum import Enum\nfrom abc import ABC\nclass C(Enum):\n A = 1\nclass N(NamedTuple):\n a: int\ndef f(x: Optional[int]) -> list: return [C(1).name, N(2).a, get_type_hints(f)['return'] is list]",
                          1, ["A", 2, True]),
    "copy, textwrap": ("import copy, textwrap\ndef f(x): y = copy.deepcopy(x); y[0].append(9); return x, textwrap.dedent('  a')", [[1]], ([[1]], "a")),
    "unicodedata, ast": ("import unicodedata, ast\ndef f(x): return unicodedata.name(x), ast.unparse(ast.parse('a  +  b')), ast.literal_eval('[1]')", "é",
                         ("LATIN SMALL LETTER E WITH ACUTE", "a + b", [1])),
    "array, struct": ("import array, struct\ndef f(x): return array.array('i', [x]).tobytes(), struct.pack('<h', x)", 1, (b"\1\0\0\0", b"\1\0")),
    "encodings": ("def f(x): return x.encode('latin-1'), x.encode('utf-16-le').decode('utf-16-le'), x.casefold()", "É", (b"\xc9", "É", "é")),
    "print and input": ("import sys\ndef f(x):\n print('x' * 10**6); print(1, file=sys.stderr)\n try: return input()\n except EOFError: return x", 5, 5),
    "main guard": ("def f(x): return x\nif __name__ == '__main__': 1 / 0", 5, 5),
    "classes and generators": ("class A:\n def __init__(self): self.x = 3\n def g(self): yield from range(self.x)\ndef f(x): return list(A().g())", 0, [0, 1, 2]),
    "annotations that are no strings": ("def f(x: int): return f.__annotations__['x'] is int", 1, True),
    "powers of two as keys": ("def f(x): return {2**i: 0 for i in range(x)}", 200, {2**i: 0 for i in range(200)}),
    "surrogates": ("def f(x): return [x, len(x), x == '\\ud83d\\ude00']", "\ud83d\ude00", ["\ud83d\ude00", 2, True]),
    "more encodings": ("def f(x): return [x.encode(e) for e in ('utf-8-sig', 'unicode_escape', 'cp1252')] + [b'a'.hex()]", "é",
                       [b"\xef\xbb\xbf\xc3\xa9", b"\\xe9", b"\xe9", "61"]),
    "big numbers": ("def f(x): return pow(3, x, 10**9 + 7), len(str(3**x))", 8000, (pow(3, 8000, 10**9 + 7), 3817)),
}


@linux
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_is_judged_right(box, name):
    code, x, want = HONEST[name]
    result = run(box, code, x)
    assert result.status == "ok" and same(result.values, (want,)), result


@linux
def test_what_a_program_patches_dies_with_it(box):
    run(box, "import builtins, json, sys\ndef f():\n builtins.len = json.dumps = lambda *x: 0\n sys.modules.clear()\n return 1")
    assert run(box, "import json\ndef f(): return len([1]), json.dumps([1])").values == ((1, "[1]"),)


FRAMES = """
import sys
def f(word):
    found, frame = [], sys._getframe()
    while frame:
        found += [repr(x) for x in [*frame.f_locals.values(), *frame.f_globals.values()] if word in repr(x)]
        frame = frame.f_back
    return [x for x in found if "-" + word not in x]
"""


@linux
def test_of_an_earlier_program_nothing_is_found():
    with Sandbox(Limits(cpu=5, wall=15)) as box:
        for _ in range(3):
            assert run(box, "def f(x): return x[1:] + '##' # " + "-SECRET" * 3, "-SECRET").status == "ok"
        result = run(box, FRAMES.replace("word in", "word[1:] in"), "-SECRET")
        known = [x for x in result.values[0] if "SECRET##" in str(x)]
        assert result.status == "ok" and known == [], known


@linux
def test_the_verdict_is_by_cpu_time_when_the_machine_is_busy():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * os.cpu_count())]
    try:
        with Sandbox(Limits(cpu=0.3, wall=0.4)) as box:
            code = "import time\ndef f(x):\n while time.process_time() < x: pass\n return x"
            assert [run(box, code, x).status for x in (0.2, 0.6)] == ["ok", "cpu"]
    finally:
        for process in busy:
            process.kill()
            process.wait()


# ---- attacks

def readable_python():
    """A Python that user 1000 may run, or None."""
    for python in (sys.executable, "/usr/bin/python3"):
        test = "import ctypes, sys; sys.exit(sys.version_info < (3, 11))"
        try:
            if subprocess.run([python, "-I", "-S", "-c", test], user=1000, group=1000, extra_groups=[]).returncode == 0:
                return python
        except OSError:
            pass
    return None


@linux
@pytest.mark.parametrize("user", ["this user", "user 1000"])
def test_no_attack_gets_through_and_nothing_is_left(tmp_path, user):
    folder, settings, python = Path("/tmp") / f"attacks-{os.getpid()}", {}, sys.executable
    if user == "user 1000":
        if os.geteuid() != 0 or not (python := readable_python()):
            pytest.skip("it takes root to be another user, and a Python that this user may read")
        settings = {"user": 1000, "group": 1000, "extra_groups": []}
    try:
        for name in ("common/__init__.py", "common/sandbox.py", "tests/sandbox_attacks.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        before, priority = set(Path("/tmp").iterdir()), os.getpriority(os.PRIO_PROCESS, 0)
        ipc = [Path(f"/proc/sysvipc/{x}").read_text() for x in ("shm", "sem", "msg")]
        done = subprocess.run([python, folder / "tests/sandbox_attacks.py"], capture_output=True, text=True, **settings)
        out = json.loads(done.stdout)
        assert out["through"] == {} and out["n"] > 100 and not done.stderr
        assert [x.split()[0] for x in out["protections"]] == [
            "rlimits", *["own"] * (user == "this user" and os.geteuid() == 0), "landlock", "seccomp"]
        assert not [x for x in set(Path("/tmp").iterdir()) - before if "left" in x.name]
        assert ipc == [Path(f"/proc/sysvipc/{x}").read_text() for x in ("shm", "sem", "msg")]
        assert os.getpriority(os.PRIO_PROCESS, 0) == priority
        assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"attacks-" in p.read_bytes()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


ATTEMPTS = {"file": "open('/proc/self/maps')", "stat": "os.stat('/')", "memory": "__import__('mmap').mmap(-1, 1 << 28)",
            "process": "os.fork() or os._exit(0)", "descriptor": "os.pipe()", "root": "os.setuid(0)"}


@linux
@pytest.mark.parametrize("layers, stopped", [
    ((), ""), (("rlimits",), "file memory descriptor"), (("own uid",), "root"), (("landlock",), "file"),
    (("seccomp",), "file stat process descriptor root"), (("landlock", "seccomp"), "file stat process descriptor root"),
    (ALL, "file stat memory process descriptor root")], ids=str)
def test_each_layer_stops_what_it_is_for(layers, stopped):
    if os.geteuid() != 0:
        pytest.skip("what stops an ordinary user is another list")
    with Sandbox(TIGHT, layers=layers) as box:
        assert [x.split()[0] for x in box.protections] == [x.split()[0] for x in layers]
        through = {name for name, attempt in ATTEMPTS.items() if run(box, f"import os\ndef f():\n {attempt}").status == "ok"}
    assert ATTEMPTS.keys() - through == set(stopped.split())


@linux
def test_a_layer_that_the_kernel_lacks_is_said_once_and_is_not_claimed(monkeypatch, tmp_path):
    source = (ROOT / "common/sandbox.py").read_text()
    assert source.count("claimed = checked(") == 1
    (tmp_path / "old.py").write_text(source.replace("LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446", "LANDLOCK_CREATE, LANDLOCK_RESTRICT = 999, 999"))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "old.py"))
    with pytest.warns(UserWarning, match="for landlock, this kernel gives nothing") as said, Sandbox(TIGHT, workers=2) as box:
        assert len(list(box.run_all([(IDENTITY, "f", [(1,)])] * 4))) == 4
    assert len(said) == 1 and not any(x.startswith("landlock") for x in box.protections)
    # a kernel whose Landlock takes the calls and does nothing
    (tmp_path / "old.py").write_text(source.replace("checked(LIBC.syscall(LANDLOCK_RESTRICT, rules, 0))", "0"))
    with pytest.warns(UserWarning, match="for landlock, this kernel gives nothing"), Sandbox(TIGHT) as box:
        assert not any(x.startswith("landlock") for x in box.protections)
    # a kernel that claims version 7 and has 3
    (tmp_path / "old.py").write_text(source.replace("range(min(claimed, 7), 0, -1)", "range(min(claimed, 3), 0, -1)"))
    with pytest.warns(UserWarning, match=r"gives landlock 3 \(claims 7\)"), Sandbox(TIGHT) as box:
        assert "landlock 3 (claims 7)" in box.protections


@linux
@pytest.mark.parametrize("layers", [("rlimits", "landlock"), ("landlock",), ("rlimits",)], ids=str)
def test_a_kernel_with_some_layers_will_do(layers):
    with Sandbox(TIGHT, layers=layers) as box:
        assert run(box, IDENTITY, 1).values == (1,) and [x.split()[0] for x in box.protections] == list(layers)


@linux
def test_a_hard_limit_of_the_caller_is_kept_and_a_long_reply_costs_no_memory():
    code = ("from common.sandbox import *\nwith Sandbox() as box: print(box.protections[0], "
            "box.run('def f(x): return len(bytearray(x))', 'f', [(200 << 20,)]).status)")
    words = ["sh", "-c", "ulimit -v 2000000; ulimit -t 100; exec \"$0\" -c \"$1\"", sys.executable, code]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == "rlimits ok\n"
    with Sandbox(Limits(reply=300_000_000)) as box:
        assert run(box, "def f(): return len(bytearray(10 << 20))").values == (10 << 20,)


@linux
@pytest.mark.parametrize("limits", [Limits(reply=1), Limits(cpu=1e-6)], ids=str)
def test_a_sandbox_that_cannot_work_is_an_error_not_zeros(limits):
    for bad in ({"memory_mb": 0}, {"memory_mb": 1.5}, {"reply": 1e5}, {"cpu": math.inf}, {"wall": -1}):
        with pytest.raises(ValueError, match="out of range"):
            Limits(**bad)
    with pytest.raises(SandboxError, match="self-test"):
        Sandbox(limits)
    assert not children()


# ---- the server, the caller

@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=str)
def test_a_server_that_is_lost_is_replaced_and_the_job_judged_again(number, monkeypatch):
    monkeypatch.setattr(sandbox, "PATIENCE", 1)
    with Sandbox(Limits(cpu=0.5, wall=1)) as box:
        server, = children()
        timer = threading.Timer(0.2, os.kill, (server, number))
        timer.start()
        result = run(box, "import time\ndef f(x): time.sleep(0.5); return x", 5)
        assert (result.status, result.values) == ("ok", (5,)) and server not in children()
        assert run(box, IDENTITY, 6).values == (6,)
    assert not children()


@linux
def test_a_server_that_stops_while_it_starts_is_ended(monkeypatch):
    whole = sandbox.start

    def stopped(*args, **settings):
        process = whole(*args, **settings)
        os.kill(process.pid, signal.SIGSTOP)
        return process
    monkeypatch.setattr(sandbox, "start", stopped)
    monkeypatch.setattr(sandbox.Client, "answer", lambda self: (_ for _ in ()).throw(TimeoutError("timed out")))
    with pytest.raises(SandboxError, match="three times: timed out"):
        Sandbox(Limits(wall=0.1))
    assert not children()


@linux
def test_closing_leaves_no_server_behind_for_threads_that_wait():
    box = Sandbox(TIGHT)
    errors = []

    def job():
        try:
            run(box, "import time\ndef f(): time.sleep(0.2)")
        except SandboxError as e:
            errors.append(str(e))
    threads = [threading.Thread(target=job) for _ in range(4)]
    [t.start() for t in threads]
    time.sleep(0.1)
    forked = os.fork()                                                       # it holds the socket open
    if forked == 0:
        time.sleep(20)
        os._exit(0)
    start = time.monotonic()
    box.close()
    [t.join() for t in threads]
    assert children() == [forked] and errors and time.monotonic() - start < 4
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)


@linux
def test_a_server_that_cannot_live_is_an_error():
    with Sandbox(TIGHT) as box:
        box.new_client = lambda: (_ for _ in ()).throw(ConnectionError("gone"))
        os.kill(children()[0], signal.SIGKILL)
        with pytest.raises(SandboxError, match="three times: gone"):
            run(box, IDENTITY, 1)


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_caller_that_ends_leaves_no_process(number):
    code = ("from common.sandbox import *\nbox = Sandbox(Limits(cpu=50, wall=50))\nprint('ready', flush=True)\n"
            "box.run('import time\\ndef f(): time.sleep(40)', 'f', [()])")
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    caller.stdout.readline()
    time.sleep(0.3)
    below = children(caller.pid)
    assert len(below) == 2
    caller.send_signal(number)
    caller.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{x}").exists() and " Z " not in Path(f"/proc/{x}/stat").read_text() for x in below):
        assert time.monotonic() < end
        time.sleep(0.05)


@linux
def test_run_all_keeps_the_order_and_runs_several_at_a_time():
    code = "import time\ndef f(x): time.sleep(x % 3 / 20); return x"
    with Sandbox(workers=3) as box:
        start = time.monotonic()
        assert [r.values[0] for r in box.run_all((code, "f", [(x,)]) for x in range(24))] == [*range(24)]
        assert time.monotonic() - start < 1.1                               # 1.2 s one after the other
        first = next(box.run_all((code, "f", [(x,)]) for x in range(5, 20)))
        assert first.values == (5,)
        threads = [threading.Thread(target=run, args=(box, code, x)) for x in range(9)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert run(box, code, 1).values == (1,) and len(children()) == 3
    assert not children()
    with pytest.raises(SandboxError, match="closed"):
        run(box, code, 1)
    box.close()


@linux
def test_a_forked_process_may_not_use_it(box):
    pid = os.fork()
    if pid == 0:
        try:
            run(box, IDENTITY, 1)
        except SandboxError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@linux
@pytest.mark.slow
def test_two_hundred_time_outs_leave_everything_flat():
    def state(pid):
        status = Path(f"/proc/{pid}/status").read_text()
        return len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status.split("VmRSS:")[1].split()[0])
    with Sandbox(Limits(cpu=0.02, wall=0.05)) as box:
        server, = children()
        run(box, IDENTITY, 1)
        before = state(os.getpid()), state(server)
        for i in range(200):
            assert run(box, ["def f():\n while True: pass", "import time\ndef f(): time.sleep(9)"][i % 2]).status == ["cpu", "wall"][i % 2]
        after = state(os.getpid()), state(server)
        assert children() == [server]
        for (files, memory), (files_then, memory_then) in zip(before, after, strict=True):
            assert files_then == files and memory_then < memory + 2000


# ---- the fallback, the command line

def test_the_fallback_gives_the_same_verdicts_and_says_what_it_lacks():
    with pytest.warns(UserWarning, match="files, network and processes are open"), Sandbox(
            Limits(cpu=1, wall=4, memory_mb=200, reply=10_000), mode="subprocess") as box:
        assert box.protections == ("rlimits",)
        for code, status in (("def f(x): return x", "ok"), ("def f(x): 1 / 0", "error"),
                             ("def f(x): return bytearray(1 << 30)", "memory"), ("def f(x): return 'x' * 10**5", "reply"),
                             ("import os\ndef f(x): os._exit(0)", "died"), ("def f(x):\n while True: pass", "cpu"),
                             ("import os\ndef f(x):\n for _ in range(10**6): os.write(3, b'x' * 999)", "died")):
            assert run(box, code, 1).status == status, code
        code = "import builtins\ndef f(x): builtins.sorted = None; return type(x)(x)"
        assert [r.values for r in box.run_all([(code, "f", [({1, 2},)])] * 2)] == [({1, 2},)] * 2
        code = "import os\ndef f(x):\n d = os.getcwd(); os.mkdir(d + '/left'); os.rmdir(d + '/left'); return x"
        assert run(box, code, 1).status == "ok"
        forged = "import os, sys\ndef f(x):\n os.write(3, b'![\"tuple\",\"sok\",\"s\",\"fnan\"]\\n'); os._exit(0)"
        assert run(box, forged, 1).error == "its reply is malformed"
        box.limits = Limits(wall=0.5)
        assert run(box, "import time\ndef f(x): time.sleep(9)", 1).status == "wall"


def test_the_command_runs_a_file(tmp_path, capsys):
    file = tmp_path / "program.py"
    file.write_text("def solve(x): return [x, '\x1b']\ndef long(): return 10**5000")
    sandbox.main([str(file), "--case", "(3,)", "--case", "('é',)"])
    out = capsys.readouterr().out
    assert out.startswith("protections: ") and out.endswith("solve(3,) = [3, '\\x1b']\nsolve('\\xe9',) = ['\\xe9', '\\x1b']\n")
    sandbox.main([str(file), "--call", "long"])
    assert f"long() = 1{'0' * 5000}\n" in capsys.readouterr().out
    for case in ("3,(", "3", "(3)", "(len,)", "", "(" * 999):
        with pytest.raises(SystemExit) as e:
            sandbox.main([str(file), "--case", case])
        assert e.value.code == 2 and "--case" in (text := capsys.readouterr().err) and text.count("\n") == 1
    with pytest.raises(SystemExit) as e:
        sandbox.main([str(tmp_path)])
    assert str(e.value.code).startswith("common.sandbox: error: ") and str(tmp_path) in str(e.value.code)
