"""common/: all but runs (tests/test_common_run.py). Nothing here needs a GPU; CUDA is pretended."""
from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from common import checkpoint, devices, files, flags, metrics, plots
from common.evaluation import count_parameters, eval_mode, format_rate, pass_at_k, wilson
from common.files import UserError, one_line_errors, read_json, refuse_damaged, write_atomic, write_json
from common.flags import folder_name, integer, path, real

FORK = multiprocessing.get_context("fork")
FAST = settings(deadline=None, derandomize=True, max_examples=60)


# ---- errors

@pytest.mark.parametrize("act, text", [
    (lambda: checkpoint.read("gone.pt"), "gone.pt: no such checkpoint"),
    (lambda: open("gone"), "[Errno 2] No such file or directory: 'gone'"),
    (lambda: bytes(2**62), "not enough memory"), (lambda: torch.empty(10**15), "not enough memory ("),
    (lambda: torch.ones(2) @ torch.ones(3), None),
    (lambda: torch.zeros(1).expand(2).add_(1), None)])  # "more than one element [...] single memory location"
def test_bad_input_and_a_full_disk_or_memory_are_one_line_and_a_bug_keeps_its_traceback(act, text):
    with pytest.raises(SystemExit if text else RuntimeError) as e, one_line_errors("fake.py"):
        act()
    assert not text or (e.value.code.startswith(f"fake.py: error: {text}") and "\n" not in e.value.code)


def python(code: str, *options: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *options, "-c", code], cwd=Path(__file__).parents[1], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("code", [
    "import common, time\nprint('ready', flush=True)\ntime.sleep(60)",  # as during the imports
    "from common.files import *\nwith one_line_errors('x'):\n    print('ready', flush=True)\n    input()"])
def test_ctrl_c_is_one_line_and_exit_code_130(code):
    process = python(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    err = process.communicate()[1]
    assert err.endswith(": interrupted\n") and err.count("\n") == 1


def test_ctrl_c_does_not_end_an_interactive_session():
    process = python("import common", "-i", "-q")
    assert process.communicate("raise KeyboardInterrupt\nprint(1)\n", timeout=30)[0] == "1\n"


@pytest.mark.parametrize("length", [1, 10**6])
def test_a_reader_that_leaves_or_that_never_was_ends_the_command_quietly(length):
    code = "import sys\nfrom common.files import *\nwith one_line_errors('x'):\n    input()\n    "
    process = python(code + f"print('a' * {length})")
    process.stdout.close()
    process.stdout = None
    assert process.communicate("\n", timeout=30)[1] == "" and process.returncode == 128 + signal.SIGPIPE
    closed = "import sys\nsys.stdout = None\n" + code + "print('a')"
    assert python(closed).communicate("\n", timeout=30)[1] == ""


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("two\n lines"), TypeError("x" * 999)])
def test_what_trips_over_a_damaged_file_is_one_line_that_names_it(error):
    with pytest.raises(UserError, match=r"^a.pt: damaged, or of another version \(\w+: [^\n]{0,150}\)$"):
        with refuse_damaged("a.pt"):
            raise error
    with pytest.raises(UserError, match="^b.pt: empty$"), refuse_damaged("a.pt"):
        raise UserError("b.pt: empty")


# ---- flags

@given(value=st.integers(), lo=st.integers(-100, 100), width=st.none() | st.integers(0, 200))
@example(value=10**9 + 1, lo=0, width=None)  # no more, so that nothing overflows further in
@FAST
def test_integer_takes_exactly_the_whole_numbers_of_its_range(value, lo, width):
    kind = integer(lo) if width is None else integer(lo, lo + width)
    if lo <= value <= (10**9 if width is None else lo + width):
        assert kind(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"is not in {lo}.."):
            kind(str(value))


@given(value=st.floats(), lo=st.floats(-9, 9), width=st.just(math.inf) | st.floats(0, 9), above=st.booleans())
@FAST
def test_real_takes_exactly_the_finite_numbers_of_its_range(value, lo, width, above):
    kind = real(lo, lo + width, above=above)
    if (lo < value if above else lo <= value) and value <= lo + width and math.isfinite(value):
        assert kind(repr(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            kind(repr(value))


@pytest.mark.parametrize("kind, text", [
    *((integer(0), text) for text in ("", "1.0", "1e3", "0x10", "1_000", "١", "²", "9" * 5000)),
    *((real(0), text) for text in ("", "x", "1,5", "--1", "1e999", "1_0", "١.5", "(1")),
    *((path, text) for text in ("", " \t")),
    *((folder_name, text) for text in ("", ".", "..", "a/b", "a\\b", "a\0b"))])
def test_a_text_that_is_none_of_its_kind_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)


def parse(*argv: str) -> flags.Flags:
    p = flags.Parser(prog="fake.py")
    p.add_argument("--lr", type=real(0, above=True), default=1e-3)
    p.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True)
    flags.add_run_arguments(p)
    return flags.parse(p, list(argv))


@pytest.mark.parametrize("argv", [
    ["--run-name", "a/b"], ["--out-dir", ""], ["--resume", ""], ["--init-from", " "], ["--seed", "-1"],
    ["--threads", "2147483648"], ["--tracker", "two\nlines"], ["--se", "1"]])  # the last is an abbreviation
def test_a_flag_out_of_range_is_one_line_that_names_it(argv, capsys):
    with pytest.raises(SystemExit) as e:
        parse(*argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("fake.py: error: ")
    assert err.count("\n") == 1 and argv[0] in err


def test_flags_given_at_their_defaults_are_given_and_a_preset_leaves_them_alone():
    args = parse("--lr", "0.001", "--no-ema", "--run-name", "n")
    assert args.given == ["ema", "lr", "name"] and parse().given == []
    flags.use(args, {"lr": 0.5, "seed": 7})
    assert (args.lr, args.ema, args.seed) == (1e-3, False, 7)
    assert not {"given", "parser"} & set(vars(args))


# ---- writing

WRITERS = {
    "last.pt": lambda path: checkpoint.save(path, {"script": "x"}),
    "summary.json": lambda path: write_json(path, {"a": 1}),
    "metrics.csv": lambda path: metrics.write(path, {"step": 0}),
    "run.txt": lambda path: files.append(path, "x"),
    "loss.png": lambda path: plots.save_figure(plots.new_figure()[0], path)}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"step\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # the kernel lets no file grow
    try:
        with pytest.raises(OSError) as e:
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(e.value)
    assert path.read_bytes() == b"step\n" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_works(moment, tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")

    def die() -> None:
        setattr(os, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        write_atomic(path, b"new" * 1000)
    process = FORK.Process(target=die)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL and path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["a.bin"]


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("file")  # which does not exist yet
    for data in (b"one", b"two"):
        write_atomic(link, data)
        assert link.is_symlink() and (tmp_path / "file").read_bytes() == data


def test_json_is_strict_and_a_number_that_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": math.nan, "b": (1, [math.inf, {"c": -math.inf}]), 3: 1e308, "text": "ä\udcff\n"})
    assert read_json(path) == {"a": None, "b": [1, [None, {"c": None}]], "3": 1e308, "text": "ä\udcff\n"}
    for data in (b"", b'{"a": 1', b"\xff\xfe\x00", b"[1, 2]", b"null", b"[" * 99999):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"^[^\n]*a.json: not [^\n]*$"):
            read_json(path)


# ---- checkpoints

SMALL = {"script": "fake.py", "model": {"w": torch.arange(6.0)}}


def refusal(path: Path) -> str:
    """The one line with which a checkpoint is refused; it names the file, and nothing is warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(UserError) as e:
            checkpoint.check(checkpoint.read(path), path, "fake.py")
    message = str(e.value)
    assert not warned and message.isprintable()
    assert message.startswith(f"{path}: ") and len(message) < len(str(path)) + 200
    return message


def test_plain_types_and_tensors_survive(tmp_path):
    w = torch.randn(4, 5)
    saved = {"none": None, "flags": [True, False], "big": 2**127 + 1, "inf": -math.inf, "text": "ä\n\udcff",
             "tuple": (1, (2.5, "x")), 3: {"a": {}}, "view": w[1:3].t(), "bf16": w.bfloat16(), "empty": w[:0]}
    checkpoint.save(tmp_path / "a.pt", saved)
    assert repr(checkpoint.read(tmp_path / "a.pt")) == repr(saved)


def test_a_folder_stands_for_its_best_pt_or_else_for_the_first(tmp_path):
    assert checkpoint.file_of(tmp_path / "x.pt") == tmp_path / "x.pt"
    for name, expected in (("last.pt", "last.pt"), ("best.pt", "best.pt"), ("a.pt", "best.pt")):
        (tmp_path / name).touch()
        assert checkpoint.file_of(tmp_path) == tmp_path / expected


@pytest.mark.parametrize("form", ["zip", "legacy", 0, 2, 5])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(form, tmp_path):
    path, victim = tmp_path / "a.pt", tmp_path / "ran"
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(victim),))})
    if isinstance(form, int):
        path.write_bytes(pickle.dumps({**SMALL, "model": evil()}, protocol=form))
    else:
        torch.save({**SMALL, "model": evil()}, path, _use_new_zipfile_serialization=form == "zip")
    assert "could run code" in refusal(path) or form not in ("zip", 2)
    assert not victim.exists()


@given(data=st.binary(max_size=80) | st.text(max_size=80).map(str.encode), part=st.floats(0, 0.99))
@settings(FAST, max_examples=100)
def test_any_bytes_and_a_file_cut_short_are_refused_in_one_line(data, part, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(data)
    refusal(path)
    checkpoint.save(path, SMALL)
    os.truncate(path, int(part * path.stat().st_size))
    assert "not a readable checkpoint" in refusal(path)


@pytest.mark.parametrize("change", [
    {"bias": None}, {"extra": torch.zeros(1)}, {"weight": torch.zeros(3, 3)}, {"bias": [0.0] * 3}, {3: 4},
    {"bias": torch.tensor([0, 1, math.nan])}, {"bias": torch.full((3,), 1e300, dtype=torch.float64)}])
def test_weights_are_loaded_unless_they_do_not_fit_or_are_not_finite(change):
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.load_weights(b, a.state_dict(), "x.pt")
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(UserError, match=r"^x.pt: [^\n]*$"):
        checkpoint.load_weights(b, {**a.state_dict(), **change}, "x.pt")


# ---- metrics.csv

def test_rows_survive_and_what_is_no_number_is_an_empty_cell(tmp_path):
    path = tmp_path / "metrics.csv"
    values = [None, math.nan, math.inf, -0.0, 5e-324, 0.1, 2**53, True, np.float32(0.5), np.int64(3)]
    for step, x in enumerate(values):
        metrics.write(path, {"step": step, "x": x})
    assert path.read_text().split()[-3:] == ["7,1", "8,0.5", "9,3.0"]
    kept = [repr(float(x)) for x in values[2:]]  # repr tells -0.0 from 0.0
    for other, named in (({"step": 1}, "x"), ({"x": 1, "step": 1}, "their order"), ({"step": 1, "x": 1, "y": 1}, "y")):
        with pytest.raises(UserError, match=rf"other columns than this script writes \({named}\)"):
            metrics.write(path, other)
    assert [repr(row["x"]) for row in metrics.read(tmp_path) if "x" in row] == kept


@pytest.mark.parametrize("step, kept", [(-1, 0), (0, 1), (15, 2), (20, 3), (99, 3)])
@pytest.mark.parametrize("torn", ["", "1", "15", "15,0.5,1.5"])
def test_rows_behind_the_step_and_a_last_line_cut_short_are_dropped(torn, step, kept, tmp_path):
    path = tmp_path / "metrics.csv"
    lines = ["loss,step\n", "99,0\n", "99,10\n", "1,20\n"]  # the step may stand anywhere
    path.write_text("".join(lines) + torn)
    assert len(metrics.read(path)) == 3
    metrics.keep_until(path, step)
    assert path.read_text() == "".join(lines[:kept + 1])
    path.write_text(torn)  # killed before the first whole row
    metrics.keep_until(path, step)
    assert path.read_text() == "" and metrics.read(path) == []


@pytest.mark.parametrize("use", [metrics.read, lambda path: metrics.keep_until(path, 5)])
@pytest.mark.parametrize("data", [
    b"step,loss\nx,2\n", b"loss,step\n1\n", b"hello\nworld\n", b"\x89PNG\r\n\xff\n",
    b"step\n" + b"x" * 200_000 + b"\n"])  # a field longer than csv takes
def test_a_foreign_file_is_one_line_and_stays(use, data, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*metrics.csv: not a metrics file$"):
        use(path)
    assert path.read_bytes() == data


def test_a_curve_goes_over_the_rows_with_a_number_in_both_columns():
    rows = [{"step": 0, "val": math.nan}, {"step": 10, "val": 0.5}, {"step": 20}, {"val": 1},
            {"step": 30, "val": 2}, {"step": 40, "val": math.inf}]
    assert metrics.points(rows, "step", "val") == ([10, 30], [0.5, 2])


# ---- evaluation

def test_shared_parameters_count_once_and_buffers_not_at_all():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 10)})
    model.head.weight = model.embed.weight
    assert count_parameters(model) == 40 + 8 + 10
    model.norm.requires_grad_(False)
    assert count_parameters(model, trainable=True) == 40 + 10


@pytest.mark.parametrize("k, n, lo, hi", [
    (0, 0, 0.0, 1.0), (10, 10, 0.7225, 1.0),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_gives_the_published_intervals(k, n, lo, hi):
    assert wilson(k, n) == pytest.approx((lo, hi), abs=5e-5)
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 99))  # whatever the rounding


@pytest.mark.parametrize("k, n, text", [
    (0, 0, "n/a (0/0)"), (9991, 10000, "99.91% (9991/10000, 95% 99.83-99.95)"),
    (999_999, 10**6, "99.9999% (999999/1000000, 95% 99.9994-100.0000)")])
def test_a_rate_is_printed_with_its_counts_and_interval(k, n, text):
    assert format_rate(k, n) == text


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_eval_mode_evaluates_and_puts_everything_back_after_an_error_too():
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).eval(), nn.Dropout(0.5))
    model[0][0].train()
    before = [m.training for m in model.modules()]
    x, stream = torch.randn(4, 3, requires_grad=True), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert torch.equal(model(x), model(x)) and not model(x).requires_grad
        assert not any(m.training for m in model.modules())
        torch.manual_seed(77)
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == before and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), stream)


# ---- devices, plots

@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=n, mps=b): torch reports n CUDA devices and whether MPS is there; without torchrun."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return pretend


@pytest.mark.parametrize("cuda, mps, name, expected", [
    (2, True, "auto", "cuda:0"), (0, True, "auto", "mps"), (0, False, "auto", "cpu"), (2, True, "cpu", "cpu"),
    (2, False, "cuda:1", "cuda:1"), (1, False, "cuda:1", None), (0, False, "cuda", None),
    (0, False, "mps", None), *((2, True, name, None) for name in ("", "gpu", "cpu:0", "cuda:", "cuda:-1"))])
def test_a_device_is_found_or_refused_in_one_line(cuda, mps, name, expected, machine):
    machine(cuda, mps)
    if expected:
        assert devices.get_device(name) == torch.device(expected)
    else:
        with pytest.raises(UserError, match=rf"^--device {name}: [^\n]*$"):
            devices.get_device(name)


def test_under_torchrun_a_rank_takes_its_gpu_and_joins_the_others(machine, monkeypatch):
    calls = []
    machine(cuda=2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(devices.atexit, "register", lambda end: None)
    monkeypatch.setattr(devices, "_joined", False)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    devices.init_ranks("fake.py", torch.device("cpu"))
    devices.refuse_ranks("fake.py")
    assert not calls and devices.rank() == 0  # without torchrun
    for variable, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"^WORLD_SIZE is 4, but MASTER_ADDR is not set: [^\n]*torchrun[^\n]*$"):
        devices.init_ranks("fake.py", torch.device("cpu"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name in ("cuda", "cuda:0", "cpu"):  # cuda:0: of a checkpoint of rank 0
        assert devices.rank() == 0 and devices.world_size() == 1
        devices.init_ranks("fake.py", devices.get_device(name))
        assert devices.rank() == 3 and devices.world_size() == 4
        devices._joined = False
    with pytest.raises(UserError, match="^--device mps: "):
        devices.init_ranks("fake.py", torch.device("mps"))
    assert calls == [*[torch.device("cuda:1"), "nccl"] * 2, "gloo"]
    assert sys.stdout.name == os.devnull
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="^the environment variable WORLD_SIZE is 'two'"):
        devices.started_ranks()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^fake.py runs in one process: [^\n]*$"):
        devices.refuse_ranks("fake.py")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_only_on_cuda_that_has_it(has_bf16, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: has_bf16 or including_emulation)  # a T4 emulates it
    monkeypatch.setattr(torch, "autocast", lambda *what: asked.append(what))
    for device, precision in (("cuda:0", "auto"), ("mps", "auto"), ("cpu", "auto"), ("cpu", "bf16")):
        devices.autocast(torch.device(device), precision)
    assert asked == [*[("cuda", torch.bfloat16)] * has_bf16, ("cpu", torch.bfloat16)]


def test_threads_are_set_and_zero_leaves_the_choice_to_torch():
    for n, text in ((2, "cpu, 2 threads"), (0, "cpu, 2 threads"), (1, "cpu, 1 thread")):
        devices.set_threads(n)
        assert devices.describe(torch.device("cpu")) == text


def test_runs_of_any_name_are_plotted_and_an_unknown_column_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["_a", os.fsdecode(b"$b_$\xff")]
    for i, name in enumerate(names):
        Path(name).mkdir()
        for step in (0, 10):
            metrics.write(Path(name, "metrics.csv"), {"step": step, "loss": step / 10 + i, "sec": 5 * step})
    axes, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda fig, path: (axes.extend(fig.axes), save(fig, path))[1])
    plots.main([*names, "--y", "loss"])
    assert Path(capsys.readouterr().out.strip()).read_bytes().startswith(b"\x89PNG")
    assert [line.get_xydata().tolist() for line in axes[0].lines] == [[[0, 0], [10, 1]], [[0, 1], [10, 2]]]
    assert len(axes[0].get_legend().get_texts()) == 2
    plots.main(["_a/metrics.csv", "--y", "loss", "--x", "sec", "--log", "--out", "p.svg"])
    assert b"<svg" in Path("p.svg").read_bytes()
    assert axes[1].lines[0].get_xydata().tolist() == [[0, 0], [50, 1]] and axes[1].get_yscale() == "log"
    with pytest.raises(SystemExit, match=r"^common.plots: error: _a: no column 'no' .* step, loss, sec\)$"):
        plots.main(["_a", "--y", "no"])
