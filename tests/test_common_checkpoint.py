"""common/checkpoint.py: round trips, atomic saves, files that are foreign, damaged or hostile."""
from __future__ import annotations

import errno
import io
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import checkpoint
from common.run import UserError

ROOT = Path(__file__).parents[1]
FAST = settings(deadline=None, derandomize=True)
PICKLE_WARNING = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
SMALL = {"script": "fake.py", "format": 1, "step": 7, "model": {"w": torch.arange(6.0).view(2, 3)}}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "last.pt"


def refusal(path: Path, script: str | None = None) -> str:
    """The message with which the file is refused; it names the file and is one line."""
    with pytest.raises(UserError) as e:
        checkpoint.load(path, script)
    message = str(e.value)
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert path.name in message and len(message) < len(str(path)) + 200
    return message


# ---- round trips

def test_plain_types_and_tensors_survive(path):
    w = torch.randn(4, 5)
    saved = {"script": "fake.py", "none": None, "flags": [True, False], "big": 2**127 + 1, "tiny": 5e-324,
             "inf": -math.inf, "text": "ä\n", "tuple": (1, (2.5, "x")), "nested": {"a": {"b": [1, {"c": 2}]}, 3: 4},
             "w": w, "view": w[1:3].t(), "bf16": w.bfloat16(), "long": torch.tensor([2**62]),
             "bool": torch.tensor([True, False]), "empty": torch.empty(0, 3)}
    checkpoint.save(path, saved)
    got = checkpoint.load(path, "fake.py")
    assert list(got) == list(saved)
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype and torch.equal(got[key], value)
        else:
            assert got[key] == value and type(got[key]) is type(value)


def test_nan_survives_bit_for_bit(path):
    checkpoint.save(path, {"script": "x", "best": math.nan, "w": torch.tensor([math.nan, -0.0])})
    got = checkpoint.load(path)
    assert math.isnan(got["best"]) and got["w"][0].isnan() and math.copysign(1, got["w"][1]) == -1


def test_a_folder_stands_for_its_last_pt(path):
    checkpoint.save(path, SMALL)
    checkpoint.save(path.with_name("best.pt"), {**SMALL, "step": 3})
    assert checkpoint.load(path.parent)["step"] == 7 and checkpoint.load(str(path.parent / "best.pt"))["step"] == 3


def test_a_model_and_its_optimizer_go_on_as_if_unbroken(path):
    def step():
        optimizer.zero_grad(set_to_none=True)
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4).eval(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step()
    checkpoint.save(path, {"script": "x", "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = step()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4).eval(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    got = checkpoint.load(path)
    checkpoint.load_weights(model, got["model"], path)
    optimizer.load_state_dict(got["optimizer"])
    assert all(torch.equal(v, expected[k]) for k, v in step().items())


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.standard_normal()),
            float(torch.rand(())), float(torch.randn(()))]


def test_the_random_streams_go_on_where_they_were_saved(path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draws()  # a single gauss and standard_normal leave a second one behind, which belongs to the state
    checkpoint.save(path, {"script": "x", "rng": checkpoint.rng_state()})
    expected = [draws() for _ in range(700)]  # past the end of the Mersenne Twister's block of 624
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert draws() != expected[0]
    checkpoint.set_rng_state(checkpoint.load(path)["rng"])
    assert [draws() for _ in range(700)] == expected


def test_reading_the_random_state_does_not_move_it():
    first = checkpoint.rng_state()
    second = checkpoint.rng_state()
    assert torch.equal(first.pop("torch"), second.pop("torch")) and first == second


def test_cuda_streams_are_put_back_only_where_as_many_devices_are_there(monkeypatch):
    put_back = []
    states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    saved = checkpoint.rng_state()
    assert saved["cuda"] == states
    checkpoint.set_rng_state(saved)
    assert put_back == [states]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    checkpoint.set_rng_state(saved)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkpoint.rng_state()["cuda"] == []
    checkpoint.set_rng_state(saved)
    assert put_back == [states]


def test_the_state_of_a_numpy_generator_is_plain_enough(path):
    rng = np.random.default_rng(5)
    rng.random(3)
    checkpoint.save(path, {"script": "x", "data_rng": rng.bit_generator.state})
    expected = rng.random(5).tolist()
    other = np.random.default_rng(0)
    other.bit_generator.state = checkpoint.load(path)["data_rng"]
    assert other.random(5).tolist() == expected


# ---- saving

@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_checkpoint_whole_and_no_tmp(broken, path, monkeypatch):
    checkpoint.save(path, SMALL)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {**SMALL, "step": 8})
    assert checkpoint.load(path)["step"] == 7 and os.listdir(path.parent) == ["last.pt"]


def test_a_save_into_a_missing_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "gone" / "last.pt", SMALL)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_pickled_leaves_the_old_checkpoint(path):
    checkpoint.save(path, SMALL)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save(path, {**SMALL, "hook": lambda: 0})
    assert checkpoint.load(path)["step"] == 7 and os.listdir(path.parent) == ["last.pt"]


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(path):
    code = """
import sys, torch
from common import checkpoint
for step in range(10**9):
    checkpoint.save(sys.argv[1], {"script": "x", "step": step, "w": torch.full((200_000,), float(step))})
    if step == 3:
        print("going", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "going\n"
        for _ in range(20):  # a reader never meets half a file either
            got = checkpoint.load(path, "x")
            assert got["step"] >= 3 and (got["w"] == got["step"]).all()
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    got = checkpoint.load(path, "x")
    assert got["w"].shape == (200_000,) and (got["w"] == got["step"]).all()
    assert set(os.listdir(path.parent)) <= {"last.pt", "last.pt.tmp"}
    checkpoint.save(path, SMALL)
    assert os.listdir(path.parent) == ["last.pt"] and checkpoint.load(path)["step"] == 7


# ---- bad files

class Touch:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@PICKLE_WARNING
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 0", "protocol 2", "protocol 5"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(form, tmp_path):
    path, victim = tmp_path / "evil.pt", tmp_path / "ran"
    value = {"script": "fake.py", "model": {}, "args": Touch(victim)}
    if form in ("zip", "legacy"):
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(value, protocol=int(form[-1])))
    message = refusal(path)
    assert not victim.exists()
    if form in ("zip", "protocol 2"):
        assert "could run code" in message
    with open(path, "rb") as f:  # the trap is armed: a careless reader falls into it
        (torch.load(f, weights_only=False) if form in ("zip", "legacy") else pickle.load(f))
    assert victim.is_dir()


def test_objects_beyond_plain_types_are_refused_with_the_reason(path):
    for value in (Path("x"), np.zeros(2), torch.nn.Linear(1, 1)):
        checkpoint.save(path, {**SMALL, "extra": value})
        assert "more than plain data" in refusal(path)


def test_a_checkpoint_cut_short_is_one_clear_error(path):
    checkpoint.save(path, {**SMALL, "rng": checkpoint.rng_state()})
    data = path.read_bytes()
    for n in {0, 1, 2, 4, 100, len(data) // 2, len(data) - 1, *range(5, len(data), len(data) // 60)}:
        path.write_bytes(data[:n])
        assert "not a readable checkpoint" in refusal(path, "fake.py")


def test_an_empty_file_is_one_clear_error(path):
    path.touch()
    assert "not a readable checkpoint" in refusal(path)


def test_a_missing_file_and_a_folder_without_last_pt_are_one_clear_error(tmp_path):
    assert refusal(tmp_path / "gone.pt").endswith("gone.pt: no such checkpoint")
    assert refusal(tmp_path).endswith("last.pt: no such checkpoint")
    (tmp_path / "last.pt").mkdir()
    assert refusal(tmp_path / "last.pt").endswith("last.pt/last.pt: no such checkpoint")


@pytest.mark.parametrize("text", [
    "hello world\n", "step,loss\n0,1.5\n", "all weights\n", "# a title\n\nSome text.\n", '{"script": "fake.py"}\n',
    "import os\n", "0\n", "<!DOCTYPE html>\n",
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"])
def test_a_text_file_is_not_a_checkpoint_and_the_message_does_not_call_it_code(text, path):
    path.write_text(text)
    message = refusal(path)
    assert "not a readable checkpoint" in message and "run code" not in message


@PICKLE_WARNING
@given(data=st.binary(max_size=80))
@settings(FAST, max_examples=300)
def test_any_bytes_at_all_are_refused_in_one_line(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(data)
    refusal(path)


LEGACY = io.BytesIO()
torch.save(SMALL, LEGACY, _use_new_zipfile_serialization=False)


@PICKLE_WARNING
@given(n=st.integers(0, len(LEGACY.getvalue()) - 1))
@FAST
def test_a_file_of_the_old_torch_format_cut_short_is_refused_in_one_line(n, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "legacy.pt"
    path.write_bytes(LEGACY.getvalue()[:n])
    refusal(path)


def zip_with_pickle(change) -> bytes:
    """SMALL as a sound zip archive, checksums and all, whose pickle went through `change`."""
    whole, made = io.BytesIO(), io.BytesIO()
    torch.save(SMALL, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


@PICKLE_WARNING
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(FAST, max_examples=150)
def test_a_tampered_pickle_is_refused_in_one_line_or_is_a_checkpoint_still(edits, tmp_path_factory):
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for where, value in edits:
            changed[int(where * len(changed))] = value
        return bytes(changed)
    path = tmp_path_factory.getbasetemp() / "tampered.pt"
    path.write_bytes(zip_with_pickle(change))
    try:
        assert checkpoint.load(path, "fake.py")["script"] == "fake.py"
    except UserError:
        refusal(path, "fake.py")


@pytest.mark.parametrize("pickled", [
    b"\x80\x02e.",                                # an empty stack
    b"\x80\x02K\x01Q.",                           # a persistent id that is no tuple
    b"\x80\x02.",                                 # nothing
    b"\x80\x02X\xff\x00",                         # text cut short
    b"\x80\x02ccollections\nOrderedDict\nNR."])   # bad arguments
def test_a_pickle_that_trips_the_unpickler_is_refused_in_one_line(pickled, path):
    path.write_bytes(zip_with_pickle(lambda data: pickled))
    assert "not a readable checkpoint" in refusal(path)


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("no central directory\nframe #0: c10"), "no central directory"),
    (PermissionError(errno.EACCES, "Permission denied"), "[Errno 13] Permission denied"),
    (RuntimeError(), "cut short, damaged, or not written by torch.save"),
    (OSError(errno.EINVAL, "Invalid argument"), "cut short, damaged, or not written by torch.save")])
def test_the_reason_of_a_refusal_is_the_first_line_of_what_torch_says(error, reason, path, monkeypatch):
    def fail(*args, **words):
        raise error
    path.touch()
    monkeypatch.setattr(torch, "load", fail)
    assert refusal(path).endswith(f"last.pt: not a readable checkpoint ({reason})")


def test_a_zip_of_something_else_is_refused(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("hello.txt", "hello")
    assert "not a readable checkpoint" in refusal(path)


@pytest.mark.parametrize("value", [{"model": {}}, {}, [1, 2], ("script",), "script", 3, None, torch.ones(2)])
def test_a_file_of_torch_without_the_field_script_is_not_of_this_project(value, path):
    torch.save(value, path)
    assert "not a checkpoint of this project" in refusal(path)


def test_a_checkpoint_of_another_script_is_named(path):
    checkpoint.save(path, SMALL)
    assert refusal(path, "other.py").endswith("last.pt: a checkpoint of 'fake.py', not of 'other.py'")
    assert checkpoint.load(path)["script"] == checkpoint.load(path, "fake.py")["script"] == "fake.py"


def test_a_script_field_that_is_no_text_stays_one_line(path):
    for value in (torch.zeros(3, 3), "a\nb", None, ["x"]):
        checkpoint.save(path, {"script": value})
        refusal(path, "fake.py")


# ---- weights

def tiny() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_sound_weights_are_loaded():
    a, b = tiny(), tiny()
    checkpoint.load_weights(b, a.state_dict(), "x.pt")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("0.bias"), "tensor 0.bias is missing"),
    (lambda s: s.clear(), "tensor 0.weight is missing"),
    (lambda s: s.update(extra=torch.zeros(1)), "tensor extra is not of this model"),
    (lambda s: s.update({"0.weight": torch.zeros(3, 3)}), r"tensor 0.weight is \(3, 3\), this model wants \(3, 2\)"),
    (lambda s: s.update({"0.bias": torch.zeros(1)}), r"tensor 0.bias is \(1,\), this model wants \(3,\)"),
    (lambda s: s.update({"0.bias": [0.0, 0.0, 0.0]}), r"tensor 0.bias is list, this model wants \(3,\)"),
    (lambda s: s["0.weight"].view(-1)[5:].fill_(math.nan), "tensor 0.weight is not finite"),
    (lambda s: s["1.running_var"][:1].fill_(math.inf), "tensor 1.running_var is not finite"),
    (lambda s: s.update({"0.bias": torch.full((3,), 1e300, dtype=torch.float64)}), "tensor 0.bias is not finite")])
def test_weights_that_do_not_fit_are_named_and_the_model_keeps_its_own(change, message):
    model, state = tiny(), {k: v.clone() for k, v in tiny().state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=f"^x.pt: {message}$"):
        checkpoint.load_weights(model, state, "x.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
