"""Where a run computes: device, precision, threads, ranks of torchrun."""
from __future__ import annotations

import atexit
import os
import re
import sys
from contextlib import nullcontext

import torch

from common.files import UserError


def get_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda, cuda:1 or mps.

    auto takes CUDA, then MPS, then the CPU. With torchrun, `cuda` and `cuda:N` are the GPU of the local rank.
    Raises UserError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    is_own = name == "cuda" or (name.startswith("cuda") and started_ranks() > 1)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if is_own else name)
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


# ---- torchrun: ranks are processes that do the same, each with a part of the data

_joined = False  # whether this process is one of several ranks


def started_ranks() -> int:
    """How many processes torchrun started; 1 without. Raises UserError when WORLD_SIZE is no number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError(f"the environment variable WORLD_SIZE is {text!r:.40}: torchrun sets it, or nobody")
    return int(text)


def rank() -> int:
    """Which of the ranks this process is; 0 before `init_ranks`, and without torchrun."""
    return torch.distributed.get_rank() if _joined else 0


def world_size() -> int:
    """Number of ranks; 1 before `init_ranks`, and without torchrun."""
    return torch.distributed.get_world_size() if _joined else 1


def init_ranks(script: str, device: torch.device, **divided: int) -> None:
    """Become one of torchrun's ranks (nccl on CUDA, gloo on a CPU), of which the first alone prints.

    divided: flags whose numbers must be divisible by that of ranks. Does nothing without torchrun. Raises UserError
    when the environment is not torchrun's.
    """
    global _joined
    n = started_ranks()
    if n == 1 or _joined:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE is {n}, but {name} is not set: start it with torchrun --nproc-per-node {n} "
                            f"{script}, or unset WORLD_SIZE")
    for name, value in divided.items():
        if value % n and os.environ["RANK"] == "0":  # the others wait for this one, and torchrun ends them
            raise UserError(f"--{name.replace('_', '-')} {value}: cannot be divided among {n} ranks")
    if device.type == "mps":
        raise UserError("--device mps: ranks of torchrun need CUDA, or --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _joined = True
    atexit.register(torch.distributed.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")


def largest(*numbers: float) -> list[float]:
    """The largest of each number over all ranks: what one knows, all know. It waits for the others."""
    if world_size() == 1:
        return list(numbers)
    device = f"cuda:{torch.cuda.current_device()}" if torch.distributed.get_backend() == "nccl" else "cpu"
    together = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    return together.tolist()


def of_first(value):
    """What rank 0 has, of plain types, for all ranks."""
    values = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def refuse_ranks(script: str) -> None:
    """Raise UserError when a script that runs in one process was started by torchrun with several."""
    if started_ranks() > 1:
        raise UserError(f"{script} runs in one process: start it with python, not with torchrun")
