"""common/metrics.py: the CSV, its resume, the log line, trackers."""
from __future__ import annotations

import math
import os
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import metrics
from common.metrics import Metrics, format_row
from common.run import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def row(step: int, loss: float = 0.5) -> dict:
    return {"step": step, "loss": loss, "sec": 0.1 * step}


# ---- rows

def test_the_first_row_fixes_the_columns(path):
    log = Metrics(path)
    assert path.read_text() == ""
    log.write(row(0))
    log.write(row(10, 0.25))
    assert path.read_text() == "step,loss,sec\n0,0.5,0.0\n10,0.25,1.0\n"


@pytest.mark.parametrize("other", [{"step": 1}, {"step": 1, "loss": 1.0, "sec": 1.0, "lr": 1.0},
                                   {"step": 1, "loss": 1.0, "second": 1.0}, {"loss": 1.0, "step": 1, "sec": 1.0}, {}])
def test_a_row_of_other_columns_is_an_error_and_is_not_written(other, path):
    seen = []
    log = Metrics(path, tracker=seen.append)
    log.write(row(0))
    with pytest.raises(ValueError, match="does not fit the columns"):
        log.write(other)
    assert metrics.read(path) == [row(0)] and seen == [row(0)]


@given(rows=st.lists(st.tuples(st.integers(-2**53, 2**53), st.floats(), st.booleans()), max_size=6))
@settings(deadline=None, derandomize=True)
def test_integers_floats_nan_infinities_and_booleans_survive(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "survive.csv"
    log = Metrics(path)
    for i, x, ok in rows:
        log.write({"step": i, "x": x, "ok": ok})
    got = metrics.read(path)
    assert len(got) == len(rows)
    for (i, x, ok), read in zip(rows, got, strict=True):
        assert read["step"] == i and read["ok"] == ok
        assert repr(read["x"]) == repr(x)  # bit for bit: repr tells -0.0 from 0.0 and has one nan


def test_integers_are_written_without_a_point_and_numpy_numbers_as_plain_ones(path):
    np = pytest.importorskip("numpy")
    Metrics(path).write({"step": 3, "n": np.int64(4), "x": np.float64(0.1), "y": np.float32(0.5)})
    assert path.read_text() == "step,n,x,y\n3,4.0,0.1,0.5\n"


def test_a_new_run_starts_an_empty_file_and_a_run_folder_stands_for_its_csv(path):
    Metrics(path).write(row(0))
    assert metrics.read(path.parent) == metrics.read(str(path.parent)) == metrics.read(str(path)) == [row(0)]
    Metrics(path)
    assert metrics.read(path.parent) == []


def test_every_row_is_on_the_disk_when_write_returns(path, monkeypatch):
    log, sizes, fsync = Metrics(path), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(os.fstat(fd).st_size), fsync(fd)))
    for step in range(3):
        log.write(row(step))
        assert len(metrics.read(path)) == step + 1 == len(sizes) and sizes[-1] == path.stat().st_size


# ---- resume

def test_resume_drops_the_rows_past_the_step_and_goes_on(path):
    log = Metrics(path)
    for step in (0, 10, 20, 30):
        log.write(row(step))
    log = Metrics(path, keep_until=20)
    assert [r["step"] for r in metrics.read(path)] == [0, 10, 20]
    log.write(row(30, 0.75))
    assert path.read_text() == "step,loss,sec\n0,0.5,0.0\n10,0.5,1.0\n20,0.5,2.0\n30,0.75,3.0\n"


@pytest.mark.parametrize("torn", ["1", "15", "15,0", "15,0.5,1.5", "9"])
def test_resume_drops_a_last_line_cut_short_even_if_its_step_looks_early(torn, path):
    whole = "step,loss,sec\n0,0.5,0.0\n10,0.5,1.0\n"
    path.write_text(whole + torn)
    Metrics(path, keep_until=20)
    assert path.read_text() == whole


def test_a_resumed_run_keeps_the_columns(path):
    Metrics(path).write(row(0))
    log = Metrics(path, keep_until=0)
    with pytest.raises(ValueError, match="does not fit the columns"):
        log.write({"step": 10, "loss": 0.5})
    log.write(row(10))
    assert len(metrics.read(path)) == 2


def test_resume_finds_the_step_wherever_its_column_stands(path):
    path.write_text("loss,step\n99,0\n99,10\n1,20\n")
    Metrics(path, keep_until=10)
    assert path.read_text() == "loss,step\n99,0\n99,10\n"


def test_resume_before_the_first_row_keeps_the_header_alone(path):
    Metrics(path).write(row(0))
    log = Metrics(path, keep_until=-1)
    assert path.read_text() == "step,loss,sec\n"
    log.write(row(0))
    assert metrics.read(path) == [row(0)]


@pytest.mark.parametrize("left", [None, "", "st", "step,loss,sec"])
def test_resume_after_a_kill_before_the_first_whole_row_starts_the_file(left, path):
    if left is not None:
        path.write_text(left)
    log = Metrics(path, keep_until=50)
    log.write(row(60))
    assert path.read_text() == "step,loss,sec\n60,0.5,6.0\n"


@pytest.mark.parametrize("data", [b"loss,sec\n1,2\n", b"step,loss\nx,2\n", b"loss,step\n1\n", b"\n\n",
                                  b"hello\nworld\n", b"\x89PNG\r\n\xff\n"])
def test_resume_on_a_foreign_file_is_one_clear_error_and_leaves_it(data, path):
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*metrics.csv: not a metrics file$"):
        Metrics(path, keep_until=5)
    assert path.read_bytes() == data


# ---- reading

@pytest.mark.parametrize("torn", ["", "2", "20,0", "20,0.5,2.0", "x"])
def test_read_ignores_a_last_line_cut_short(torn, path):
    path.write_text("step,loss,sec\n10,0.5,1.0\n" + torn)
    assert metrics.read(path) == [row(10)]


@pytest.mark.parametrize("text", ["", "step,loss", "step,loss\n"])
def test_read_finds_no_rows_in_a_file_that_has_none(text, path):
    path.write_text(text)
    assert metrics.read(path) == []


def test_read_leaves_empty_cells_out(path):
    path.write_text("step,loss,val\n0,,1\n10,0.5,\n")
    assert metrics.read(path) == [{"step": 0, "val": 1}, {"step": 10, "loss": 0.5}]


@pytest.mark.parametrize("data", [b"step,loss\n0,abc\n", b"step,loss\n0\n", b"step,loss\n0,1,2\n", b"hello\nworld\n",
                                  b"\x89PNG\r\n\x1a\n\xff\xfe\n",
                                  b"a\n" + b"x" * 200_000 + b"\n"])  # a field longer than csv takes
def test_a_file_with_cells_that_are_no_numbers_is_one_clear_error(data, path):
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*metrics.csv: not a metrics file$"):
        metrics.read(path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    for path in (tmp_path, tmp_path / "metrics.csv", tmp_path / "gone"):
        with pytest.raises(UserError, match=r"^[^\n]*: no such metrics file$"):
            metrics.read(path)


# ---- the log line

def test_the_log_line_of_a_row():
    text = format_row({"step": 1000, "loss": 0.0312, "pass_rate": 0.95789, "violations_total": 80, "lr": 5e-4,
                       "lr_muon": 0.02, "grad": 0.41, "sec": 63.21})
    assert text == ("step   1000 | loss 0.0312 | pass_rate 0.9579 | violations_total   80 | lr 5.00e-04 | "
                    "lr_muon 2.00e-02 | grad 0.4100 | sec   63.2")


def test_log_lines_of_a_run_have_one_width():
    lines = [format_row({"step": s, "loss": x, "n": n, "lr": lr, "sec": t})
             for s, x, n, lr, t in (
                 (0, 9.5, 0, 0.0, 0.0), (100, 0.1234567, 80, 1e-3, 7.25), (999999, 0.0, 9999, 1e-10, 9999.9))]
    assert len({len(line) for line in lines}) == 1


def test_the_example_in_the_docstring_is_what_is_printed():
    text = format_row({"step": 1000, "loss": 0.0312, "violations": 80, "lr": 5e-4, "sec": 63.2})
    assert f"`{text}`" in format_row.__doc__


def test_nan_is_left_out_of_the_log_line_and_infinity_is_not():
    text = format_row({"step": 5, "val": math.nan, "loss": math.inf, "lr": -math.inf})
    assert text == "step      5 | loss inf | lr -inf"


# ---- trackers

def test_rows_go_to_the_tracker_too(path):
    seen = []
    log = Metrics(path, tracker=seen.append)
    log.write(row(0))
    log.write(row(10))
    assert seen == [row(0), row(10)]


def test_no_tracker_is_none(tmp_path):
    assert metrics.open_tracker("none", tmp_path, {}) is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_whose_package_is_missing_is_one_clear_error(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(UserError, match=rf"^--tracker {kind} needs a package [^\n]*pip install[^\n]*$"):
        metrics.open_tracker(kind, tmp_path, {})


def test_tensorboard_receives_every_figure_under_its_name_and_step(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def flush(self):
            calls.append("flush")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    metrics.open_tracker("tensorboard", tmp_path, {})({"step": 10, "loss": 0.5})
    assert calls == [str(tmp_path), ("step", 10, 10), ("loss", 0.5, 10), "flush"]


def test_tensorboard_writes_a_file_into_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    log = metrics.open_tracker("tensorboard", tmp_path, {})
    (file,) = tmp_path.glob("events.out.tfevents.*")
    before = file.stat().st_size
    log({"step": 10, "loss": 0.5})
    assert b"loss" in file.read_bytes()[before:]


def test_wandb_receives_the_flags_the_name_and_the_rows(tmp_path, monkeypatch):
    calls = []

    def init(**words):
        calls.append(words)
        return types.SimpleNamespace(log=lambda row, step: calls.append((row, step)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    metrics.open_tracker("wandb", tmp_path / "run1", {"lr": 0.1})(row(10))
    assert calls == [{"dir": str(tmp_path / "run1"), "name": "run1", "config": {"lr": 0.1}}, (row(10), 10)]
