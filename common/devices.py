"""Where a run computes: device, precision, threads, ranks of torchrun."""
from __future__ import annotations

import os
import re
from contextlib import nullcontext

import torch

from common.files import UserError


def get_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda, cuda:1 or mps.

    auto takes CUDA, then MPS, then the CPU. With torchrun, `cuda` is the GPU of the local rank.
    Raises UserError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= there:
        raise UserError(f"--device {name}: this machine has {there or 'no'} {device.type.upper()} devices; try --device cpu")
    return device


def describe(device: torch.device) -> str:
    """`cuda:0 NVIDIA H200` or `cpu, 1 thread`: for the first line of a run."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    n = torch.get_num_threads()
    return f"{device}, {n} thread{'s' * (n != 1)}"


def autocast(device: torch.device, precision: str):
    """The context in which forward passes run.

    precision: fp32, bf16, or auto = bf16 on a CUDA device that computes in it, fp32 everywhere else.
    """
    if precision == "auto":  # emulated bf16, as on a T4, is slower than fp32
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def set_threads(n: int) -> None:
    """Limit torch to n CPU threads; 0 leaves torch's own choice. Spinning threads slow small models down 30x."""
    if n > 0:
        torch.set_num_threads(n)


# ---- torchrun

def rank() -> int:
    """Rank of this process under torchrun, 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes under torchrun, 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_ranks(device: torch.device) -> None:
    """Join the process group of torchrun (nccl on CUDA, gloo elsewhere). Does nothing without torchrun."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def refuse_ranks(script: str) -> None:
    """Raise UserError when a script that runs in one process was started by torchrun with several."""
    if world_size() > 1:
        raise UserError(f"{script} runs in one process: start it with python, not with torchrun")
