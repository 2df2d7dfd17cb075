"""common/run.py: flags, the run folder, files that survive a kill, the end of a run."""
from __future__ import annotations

import argparse
import errno
import json
import math
import os
import resource
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

from common import run
from common.run import UserError, integer, one_line_errors, parse, real, resumed_args

ROOT = Path(__file__).parents[1]
FAST = settings(deadline=None, derandomize=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="fake.py")
    p.add_argument("--lr", type=real(0, above=True), default=1e-3)
    p.add_argument("--layers", type=integer(1, 8), default=2)
    p.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--note", action="append")
    run.add_run_arguments(p)
    return p


def flags(*argv: str) -> argparse.Namespace:
    return parse(parser(), list(argv))


def python(code: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True)


# ---- flags

@given(value=st.integers(), lo=st.integers(-100, 100), width=st.integers(0, 200))
@FAST
def test_integer_takes_exactly_the_whole_numbers_of_its_range(value, lo, width):
    kind = integer(lo, lo + width)
    if lo <= value <= lo + width:
        assert kind(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{value} is not in {lo}..{lo + width}"):
            kind(str(value))


def test_integer_without_an_upper_limit_has_none():
    assert integer(0)("0") == 0 and integer(0)(str(10**30)) == 10**30
    with pytest.raises(argparse.ArgumentTypeError, match="-1 is not >= 0"):
        integer(0)("-1")


@pytest.mark.parametrize("text", ["", " ", "1.0", "1e3", "nan", "inf", "two", "0x10", "9" * 5000])
def test_integer_refuses_text_that_is_no_whole_number(text):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(4300)  # Python's default; a script may have lifted it
    try:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
            integer(0)(text)
    finally:
        sys.set_int_max_str_digits(limit)


@given(value=st.floats(), lo=st.floats(-10, 10), width=st.floats(0, 20), above=st.booleans())
@FAST
def test_real_takes_exactly_the_finite_numbers_of_its_range(value, lo, width, above):
    kind = real(lo, lo + width, above=above)
    if (lo < value if above else lo <= value) and value <= lo + width:
        assert kind(repr(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not >"):
            kind(repr(value))


def test_real_at_its_limits():
    assert real(0)("0") == 0.0 and real(0, 1)("1") == 1.0 and real(0, 1, above=True)("1") == 1.0
    assert real(0, above=True)("5e-324") == 5e-324
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not > 0 and <= 1"):
        real(0, 1, above=True)("0")
    with pytest.raises(argparse.ArgumentTypeError, match="1.0000001 is not >= 0 and <= 1"):
        real(0, 1)("1.0000001")


@pytest.mark.parametrize("text", ["nan", "-nan", "inf", "-inf", "1e999", "", "x", "1,5", "--1"])
def test_real_refuses_what_is_not_a_finite_number(text):
    for kind in (real(0), real(-math.inf), real(0, above=True)):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_given_lists_the_flags_of_the_command_line_also_at_their_defaults():
    assert flags().given == []
    assert flags("--lr", "0.001", "--no-ema", "--seed=0").given == ["ema", "lr", "seed"]
    assert flags("--layer", "2").given == ["layers"]  # argparse takes an abbreviation


def test_given_knows_flags_that_may_be_repeated():
    args = flags("--note", "a", "--note", "b")
    assert args.note == ["a", "b"] and args.given == ["note"]
    assert flags().note is None


def test_the_run_flags_have_the_documented_defaults():
    args = flags()
    assert (args.seed, args.device, args.precision, args.threads) == (0, "auto", "auto", 1)
    assert (args.max_minutes, args.tracker) == (0, "none")
    assert args.name is args.out_dir is args.resume is args.init_from is None
    p = argparse.ArgumentParser()
    run.add_run_arguments(p, threads=4)
    assert parse(p, []).threads == 4


@pytest.mark.parametrize("argv", [
    ["--name", "a/b"], ["--name", "/a"], ["--name", "a\\b"], ["--name", ".."], ["--name", "."], ["--name", ""],
    ["--name", "a\0b"], ["--seed", "-1"], ["--seed", str(2**32)], ["--seed", "1.5"], ["--threads", "-1"],
    ["--max-minutes", "nan"], ["--max-minutes", "inf"], ["--max-minutes", "-1"],
    ["--precision", "fp16"], ["--tracker", "mlflow"], ["--lr", "0"],
    ["--layers", "9"]])
def test_a_flag_out_of_range_ends_the_command_and_is_named(argv, capsys):
    with pytest.raises(SystemExit) as e:
        flags(*argv)
    assert e.value.code == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_run_flags_take_the_ends_of_their_ranges():
    for seed in (0, 2**32 - 1):
        assert flags("--seed", str(seed)).seed == seed
    args = flags("--threads", "0", "--max-minutes", "0", "--name", "run 1.2")
    assert (args.threads, args.max_minutes, args.name) == (0, 0, "run 1.2")


def test_a_resumed_run_keeps_the_flags_of_its_checkpoint():
    saved = {k: v for k, v in vars(flags("--lr", "0.5", "--seed", "3", "--no-ema")).items() if k != "given"}
    args = resumed_args(flags("--resume", "x"), saved, "x")
    assert (args.lr, args.seed, args.ema, args.resume) == (0.5, 3, False, "x")


def test_a_resumed_run_takes_the_run_flags_from_the_command_line():
    old = {"name": "old", "out_dir": "old", "resume": "old", "init_from": "old", "device": "cuda", "threads": 8,
           "max_minutes": 9.0, "tracker": "wandb"}
    assert set(old) == set(run.RUN_FLAGS)
    saved = {**vars(flags()), **old}
    new = flags("--name", "n", "--resume", "x", "--device", "cpu", "--threads", "2", "--max-minutes", "1")
    args = resumed_args(new, saved, "x")
    assert (args.name, args.resume, args.device, args.threads, args.max_minutes) == ("n", "x", "cpu", 2, 1.0)
    assert args.out_dir is None and args.init_from is None and args.tracker == "none"  # the default, not the old one


def test_a_resumed_run_refuses_a_given_flag_that_differs():
    saved = vars(flags("--seed", "3", "--layers", "4"))
    with pytest.raises(UserError, match=r"^--layers is 2 here and 4 in run/last.pt: [^\n]*--init-from[^\n]*$"):
        resumed_args(flags("--layers", "2"), saved, "run/last.pt")
    with pytest.raises(UserError, match="--seed is 0 here and 3 in"):
        resumed_args(flags("--seed", "0"), saved, "run/last.pt")
    assert resumed_args(flags("--seed", "3"), saved, "run/last.pt").layers == 4


def test_an_old_checkpoint_without_a_new_flag_takes_its_default_and_refuses_another_value():
    saved = {k: v for k, v in vars(flags("--lr", "0.5")).items() if k not in ("layers", "given")}
    args = resumed_args(flags("--lr", "0.5"), saved, "x")
    assert (args.layers, args.lr, args.given) == (2, 0.5, ["lr"])
    with pytest.raises(UserError, match="--layers is 3 here and None in x"):
        resumed_args(flags("--layers", "3"), saved, "x")


# ---- folder

def test_the_run_folder_is_out_dir_then_the_name_then_the_resumed_folder_then_time_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    (old / "best.pt").touch()
    for resume in (str(old), str(old / "best.pt")):
        assert run.run_folder(flags("--resume", resume), "/here/fake.py") == old
        assert run.run_folder(flags("--resume", resume, "--name", "n"), "/here/fake.py") == Path("logs/fake/n")
        assert run.run_folder(flags("--resume", resume, "--out-dir", "o", "--name", "n"), "/here/fake.py") == Path("o")
    assert run.run_folder(flags("--out-dir", "a/b"), "fake.py") == Path("a/b")
    monkeypatch.setattr(time, "strftime", lambda form: "20250102-030405")
    assert run.run_folder(flags("--seed", "7"), "fake.py") == Path("logs/fake/20250102-030405-s7")
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text("print('first')\n")
    return path


def test_open_run_writes_the_flags_the_provenance_and_a_copy_of_the_script(tmp_path, script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fake.py", "--name", "two words"])
    folder = run.open_run(flags("--out-dir", str(tmp_path / "deep/er"), "--lr", "0.5"), str(script))
    assert folder == tmp_path / "deep/er"
    assert sorted(p.name for p in folder.iterdir()) == ["args.json", "fake.py", "run.txt"]
    args = run.read_json(folder / "args.json")
    assert args["lr"] == 0.5 and args["layers"] == 2 and "given" not in args
    assert (folder / "fake.py").read_text() == script.read_text()
    text = (folder / "run.txt").read_text()
    words = [line.split()[0] for line in text.splitlines() if line]
    assert words == ["time", "command", "commit", "versions", "machine"]
    assert "command  python fake.py --name 'two words'\n" in text


@pytest.mark.parametrize("file", ["last.pt", "summary.json"])
def test_open_run_refuses_a_folder_that_holds_a_run_and_leaves_it_alone(file, tmp_path, script):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / file).write_text("precious")
    with pytest.raises(UserError, match=r"^[^\n]*old holds a run already: [^\n]*--resume [^\n]*old$"):
        run.open_run(flags("--out-dir", str(folder)), str(script))
    assert [p.name for p in folder.iterdir()] == [file] and (folder / file).read_text() == "precious"


def test_open_run_takes_a_folder_without_a_run(tmp_path, script):
    (tmp_path / "notes.txt").touch()
    assert run.open_run(flags("--out-dir", str(tmp_path)), str(script)) == tmp_path


def test_open_run_appends_to_run_txt_and_renews_the_copy_on_resume(tmp_path, script):
    folder = run.open_run(flags("--out-dir", str(tmp_path / "r")), str(script))
    (folder / "last.pt").touch()
    (folder / "metrics.csv").write_text("step\n0\n")
    first = (folder / "run.txt").read_text()
    script.write_text("print('second')\n")
    for resume in (folder, folder / "last.pt"):
        assert run.open_run(flags("--resume", str(resume), "--seed", "5"), str(script)) == folder
    text = (folder / "run.txt").read_text()
    assert text.startswith(first) and text.count("command  ") == 3
    assert (folder / "fake.py").read_text() == "print('second')\n"
    assert run.read_json(folder / "args.json")["seed"] == 5
    assert (folder / "metrics.csv").read_text() == "step\n0\n"


def test_resume_into_a_third_folder_that_holds_another_run_is_refused(tmp_path, script):
    old, other = tmp_path / "old", tmp_path / "other"
    for folder in (old, other):
        folder.mkdir()
        (folder / "last.pt").touch()
    with pytest.raises(UserError, match="other holds a run already"):
        run.open_run(flags("--resume", str(old), "--out-dir", str(other)), str(script))
    assert [p.name for p in other.iterdir()] == ["last.pt"]
    new = tmp_path / "new"
    assert run.open_run(flags("--resume", str(old), "--out-dir", str(new)), str(script)) == new
    same = flags("--resume", str(old / "last.pt"), "--out-dir", str(tmp_path / "new/../old"))
    assert run.open_run(same, str(script)).samefile(old)


def test_the_copy_in_a_run_folder_can_itself_be_run_there(tmp_path, script):
    run.open_run(flags("--out-dir", str(tmp_path)), str(script))  # the copy would be the script itself
    assert script.read_text() == "print('first')\n"


def test_a_run_folder_that_cannot_be_made_is_an_oserror(tmp_path, script):
    for bad in (script, script / "below"):
        with pytest.raises(OSError):
            run.open_run(flags("--out-dir", str(bad)), str(script))


def test_the_commit_is_that_of_the_checkout_and_says_when_files_have_changed(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("no git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setenv("RUN_COMMIT", "abc123")
    assert run.commit() == "abc123"  # not a repository
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / "run.py").write_text("1\n")
    for words in (["init", "-q"], ["add", "run.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
    head = run.commit()
    assert len(head) == 40 and set(head) <= set("0123456789abcdef")
    (tmp_path / "untracked").touch()
    assert run.commit() == head
    (tmp_path / "run.py").write_text("2\n")
    assert run.commit() == f"{head}, with changes"


def test_without_git_the_commit_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("RUN_COMMIT", "abc123")
    assert run.commit() == "abc123"
    monkeypatch.delenv("RUN_COMMIT")
    assert run.commit() == "unknown"


# ---- errors

@pytest.mark.parametrize("error, text", [
    (UserError("run/last.pt: no such checkpoint"), "run/last.pt: no such checkpoint"),
    (OSError(errno.ENOSPC, "No space left on device", "last.pt"), "[Errno 28] No space left on device: 'last.pt'"),
    (PermissionError(errno.EACCES, "Permission denied"), "[Errno 13] Permission denied")])
def test_bad_input_and_a_full_disk_are_one_line_and_a_non_zero_exit(error, text):
    with pytest.raises(SystemExit) as e, one_line_errors("fake.py"):
        raise error
    assert e.value.code == f"fake.py: error: {text}"  # Python prints a text code to stderr and exits with 1


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as e, one_line_errors("fake.py"):
        raise KeyboardInterrupt
    assert e.value.code == 130 and capsys.readouterr().err == "fake.py: interrupted\n"


@pytest.mark.parametrize("error", [
    ValueError("a bug"), RuntimeError("a bug"), AssertionError(), KeyError("x"), SystemExit(3)])
def test_every_other_error_passes_through_unchanged(error):
    with pytest.raises(type(error)) as e, one_line_errors("fake.py"):
        raise error
    assert e.value is error


def test_a_block_without_error_goes_on():
    with one_line_errors("fake.py"):
        done = True
    assert done


def test_the_exit_of_a_real_process_is_one_line_on_stderr():
    code = "from common.run import *\nwith one_line_errors('s.py'): raise UserError('x: no')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "s.py: error: x: no\n")


# ---- files

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
                    max_leaves=12)


def _refuse(word: str):
    raise AssertionError(f"{word} is not strict JSON")


@given(value=st.dictionaries(st.text(), JSON, max_size=5))
@FAST
def test_json_is_strict_and_survives_but_for_numbers_that_are_not_finite(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "strict.json"
    run.write_json(path, value)
    read = json.loads(path.read_text(), parse_constant=_refuse)

    def same(a, b) -> bool:
        if isinstance(a, float) and not math.isfinite(a):
            return b is None
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b
    assert same(value, read) and run.read_json(path) == read


def test_json_turns_nan_and_infinity_into_null_at_any_depth(tmp_path):
    run.write_json(tmp_path / "a.json", {"a": math.nan, "b": (1, [math.inf, {"c": -math.inf}]), 3: 1e308})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1, [None, {"c": None}]], "3": 1e308}


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(path, {"a": object()})
    assert run.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"a: 1", b"\xff\xfe\x00", b"[1, 2]", b"3", b'"text"', b"null"])
def test_a_file_that_holds_no_json_object_is_one_clear_error(data, tmp_path):
    path = tmp_path / "summary.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*summary.json: not [^\n]*$"):
        run.read_json(path)


def test_a_missing_json_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*summary.json: no such file[^\n]*$"):
        run.read_json(tmp_path / "summary.json")
    with pytest.raises(OSError):
        run.read_json(tmp_path)  # a folder: one_line_errors has a line for it


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(broken, tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    run.write_atomic(path, b"old")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        run.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    monkeypatch.undo()
    run.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


def test_a_write_that_outgrows_the_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.bin"
    run.write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # the kernel refuses byte 65537, like a full disk
    try:
        with pytest.raises(OSError):
            run.write_atomic(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_works(moment, tmp_path):
    path = tmp_path / "a.bin"
    run.write_atomic(path, b"old")
    code = (f"import os, signal, sys\nfrom common.run import write_atomic\n"
            f"os.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nwrite_atomic(sys.argv[1], b'new' * 1000)")
    with python(code, str(path)) as process:
        assert process.wait(30) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    run.write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["a.bin"]


def test_the_bytes_are_on_the_disk_before_the_file_takes_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(b).name)), replace(a, b)))
    run.write_atomic(tmp_path / "a.bin", b"12345")
    assert calls == [("fsync", 5), ("replace", "a.bin")]


# ---- the end of a run

def test_the_clock_counts_from_what_the_earlier_parts_took(monkeypatch):
    wall, cpu = 100.0, 50.0
    monkeypatch.setattr(time, "monotonic", lambda: wall)
    monkeypatch.setattr(time, "process_time", lambda: cpu)
    clock = run.Clock(max_minutes=2, seconds=1000.0, cpu_seconds=500.0)
    assert (clock.seconds(), clock.cpu_seconds(), clock.expired()) == (1000.0, 500.0, False)
    wall, cpu = 220.0, 53.0
    assert (clock.seconds(), clock.cpu_seconds(), clock.expired()) == (1120.0, 503.0, False)
    wall = 220.5  # 120.5 s of this part
    assert clock.expired()


def test_without_a_limit_the_clock_never_expires(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: now)
    clock = run.Clock()
    assert clock.seconds() == clock.cpu_seconds() == 0
    now = 1e12
    assert not clock.expired()


@pytest.fixture
def received():
    """Our own handlers of SIGINT and SIGTERM in place of the default ones; yields what they received."""
    got = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(s, lambda number, frame: got.append(number)) for s in numbers]
    yield got
    for s, handler in zip(numbers, old, strict=True):
        signal.signal(s, handler)


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT),
                                           (signal.SIGTERM, signal.SIGINT)])
def test_the_first_signal_sets_the_number_and_the_second_acts(first, second, received):
    with run.StopSignal() as stop:
        assert stop.number == 0
        signal.raise_signal(first)
        assert stop.number == first and received == []
        signal.raise_signal(second)
        assert stop.number == first and received == [second]


def test_the_handlers_are_put_back_at_the_end_after_a_signal_and_after_an_error(received):
    def handlers():
        return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before = handlers()
    with run.StopSignal() as stop:
        assert handlers() == [stop._on_signal] * 2
    assert handlers() == before and stop.number == 0
    with run.StopSignal():
        signal.raise_signal(signal.SIGINT)
        assert handlers() == before
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # set after the first signal: not ours to put back
    assert handlers() == [before[0], signal.SIG_IGN]
    signal.signal(signal.SIGTERM, before[1])
    with pytest.raises(RuntimeError), run.StopSignal():
        raise RuntimeError
    assert handlers() == before


def test_in_another_thread_the_stop_signal_stays_out_of_the_way(received):
    before = signal.getsignal(signal.SIGTERM)
    numbers = []

    def work():
        with run.StopSignal() as stop:
            numbers.append((stop.number, signal.getsignal(signal.SIGTERM) is before))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert numbers == [(0, True)]


def test_a_real_process_finishes_its_step_at_the_first_sigterm_and_dies_of_the_second():
    code = """
import time
from common.run import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.number:
        time.sleep(0.01)
    print(stop.number, flush=True)
    time.sleep(60)
"""
    process = python(code)
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "15\n"
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
