"""common/devices.py: devices, precision, seeds, ranks. Nothing here needs a GPU; CUDA is pretended."""
from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import devices
from common.run import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=n, mps=b): torch reports n CUDA devices and whether MPS is there."""
    def pretend(cuda: int = 0, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return pretend


# ---- device

def test_auto_takes_cuda_then_mps_then_the_cpu(machine):
    for cuda, mps, expected in ((2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")):
        machine(cuda, mps)
        assert devices.get_device("auto") == torch.device(expected)
        assert devices.get_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cpu:0", "cpu:", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1",
                                  "cuda 0", "mps:0", "xla", "meta"])
def test_an_unknown_device_is_one_clear_error(name, machine):
    machine(cuda=2, mps=True)
    with pytest.raises(UserError, match=r"^--device [^\n]*: expected auto, cpu, cuda, cuda:N or mps$"):
        devices.get_device(name)


@pytest.mark.parametrize("name, what", [("cuda", "CUDA"), ("cuda:0", "CUDA"), ("mps", "MPS")])
def test_a_device_that_is_not_there_is_one_clear_error(name, what, machine):
    machine()
    with pytest.raises(UserError, match=rf"^--device {name}: this machine has no {what} device; try --device cpu$"):
        devices.get_device(name)


def test_a_cuda_device_past_the_last_is_one_clear_error(machine):
    machine(cuda=1)
    assert devices.get_device("cuda") == devices.get_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"^--device cuda:1: there are only 1 CUDA devices$"):
        devices.get_device("cuda:1")
    machine(cuda=2)
    assert devices.get_device("cuda:1") == torch.device("cuda", 1)


def test_under_torchrun_cuda_is_the_gpu_of_the_local_rank(machine, monkeypatch):
    machine(cuda=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.get_device("cuda") == devices.get_device("auto") == torch.device("cuda", 3)
    assert devices.get_device("cuda:1") == torch.device("cuda", 1)
    machine(cuda=2)
    with pytest.raises(UserError, match="only 2 CUDA devices"):
        devices.get_device("cuda")


def test_the_device_is_described_with_its_threads_or_its_name(monkeypatch):
    for n, text in ((1, "cpu, 1 thread"), (8, "cpu, 8 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        assert devices.describe(torch.device("cpu")) == text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert devices.describe(torch.device("cuda", 0)) == "cuda:0 NVIDIA H200"


# ---- precision, threads, seeds

@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)])
def test_autocast_computes_in_the_precision_asked_for(precision, dtype):
    a = torch.ones(2, 2)
    with devices.autocast(torch.device("cpu"), precision):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_only_on_cuda_that_has_it(has_bf16, monkeypatch):
    """A T4 has no bf16, but torch counts it as supported unless emulation is left out."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda *what: asked.append(what))
    devices.autocast(torch.device("cuda", 0), "auto")
    devices.autocast(torch.device("mps"), "auto")
    assert asked == ([("cuda", torch.bfloat16)] if has_bf16 else [])


def test_threads_are_set_and_zero_leaves_the_choice_to_torch():
    before = torch.get_num_threads()
    try:
        devices.set_threads(2)
        assert torch.get_num_threads() == 2
        devices.set_threads(0)
        assert torch.get_num_threads() == 2
        devices.set_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def draws(seed: int) -> list[float]:
    devices.set_seed(seed)
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_a_seed_repeats_every_stream_and_another_seed_changes_every_stream():
    for seed in (0, 1, 2**32 - 1):
        assert draws(seed) == draws(seed)
    assert all(a != b for a, b in zip(draws(0), draws(1), strict=True))


# ---- ranks

def test_rank_and_world_size_come_from_torchrun(monkeypatch):
    assert (devices.rank(), devices.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (devices.rank(), devices.world_size()) == (3, 8)


def test_a_script_of_one_process_refuses_several_ranks(monkeypatch):
    devices.refuse_ranks("fake.py")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process is fine
    devices.refuse_ranks("fake.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^fake.py runs in one process: [^\n]*$"):
        devices.refuse_ranks("fake.py")


def test_without_torchrun_no_group_is_joined():
    devices.init_ranks(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("device, backend", [(torch.device("cpu"), "gloo"), (torch.device("cuda", 1), "nccl")])
def test_the_backend_is_nccl_on_cuda_and_gloo_elsewhere(device, backend, monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    devices.init_ranks(device)
    assert calls == ([device] if device.type == "cuda" else []) + [backend]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    devices.init_ranks(device)
    assert calls[-1] == backend and calls.count(backend) == 1  # a second call does nothing


def test_two_gloo_ranks_add_up_their_tensors():
    code = """
import torch
from common import devices
devices.set_threads(1)
devices.init_ranks(torch.device("cpu"))
devices.init_ranks(torch.device("cpu"))
x = torch.tensor([devices.rank() + 1.0, 10.0])
torch.distributed.all_reduce(x)
print(devices.rank(), devices.world_size(), x.tolist())
torch.distributed.destroy_process_group()
"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the host's name, which may need a network
    ranks = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**env, "RANK": str(r)}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(2)]
    try:
        out = [p.communicate(timeout=120) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], out
    assert [o.strip() for o, _ in out] == ["0 2 [3.0, 20.0]", "1 2 [3.0, 20.0]"]
