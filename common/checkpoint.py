"""Checkpoints: a dict of plain types and tensors, saved atomically and read without running code."""
from __future__ import annotations

import io
import os
import random
from pathlib import Path

import numpy as np
import torch

from common.run import UserError, write_atomic


def save(path: str | os.PathLike, checkpoint: dict) -> None:
    """Save a checkpoint of plain types and tensors. Raises OSError when the disk is full or not writable."""
    buffer = io.BytesIO()  # torch's own file writer hides OSError behind RuntimeError
    torch.save(checkpoint, buffer)
    write_atomic(path, buffer.getvalue())


def read(path: str | os.PathLike) -> dict:
    """The dict of plain types and tensors in a file of torch.save, tensors on the CPU.

    Read with weights_only=True, so a pickle that would run code is refused.
    Raises UserError: missing, empty, cut short, not a dict.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # foreign bytes trip the unpickler in a dozen ways, IndexError and struct.error among them
        reason = "cut short, damaged, or not written by torch.save"
        if isinstance(e, (RuntimeError, PermissionError)):
            reason = (str(e).splitlines() or [reason])[0][:100]
        elif "GLOBAL" in str(e) or "Unsupported class" in str(e):
            reason = "it holds more than plain data, and loading that could run code"
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    return saved if isinstance(saved, dict) else {}


def check_script(checkpoint: dict, script: str | None, path: str | os.PathLike) -> None:
    """Raises UserError when a checkpoint names no script, or another one than `script`."""
    if not isinstance(checkpoint.get("script"), str):
        raise UserError(f"{path}: not a checkpoint of this project (no field 'script')")
    if script is not None and checkpoint["script"] != script:
        raise UserError(f"{path}: a checkpoint of {checkpoint['script']!r}, not of {script!r}")


def load(path: str | os.PathLike, script: str | None = None) -> dict:
    """The checkpoint at `path` (a file, or a run folder: its last.pt). Raises UserError: see read, check_script."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    checkpoint = read(path)
    check_script(checkpoint, script, path)
    return checkpoint


def load_weights(module: torch.nn.Module, state: dict, path: str | os.PathLike) -> None:
    """Load a state dict strictly. Raises UserError naming the first tensor missing, extra, misshapen or not finite."""
    own = module.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            raise UserError(f"{path}: tensor {name} is {'missing' if name in own else 'not of this model'}")
        x = state[name]
        if not isinstance(x, torch.Tensor) or x.is_nested or x.shape != own[name].shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) and not x.is_nested else type(x).__name__
            raise UserError(f"{path}: tensor {name} is {got}, this model wants {tuple(own[name].shape)}")
        plain = x.layout == torch.strided and not x.is_quantized and not x.is_meta
        if not plain or x.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{path}: tensor {name} cannot be read ({x.layout}, {x.dtype}, {x.device})")
        if not torch.isfinite(state[name].to(own[name].dtype)).all():  # a float64 may be too large for the model
            raise UserError(f"{path}: tensor {name} is not finite")
    module.load_state_dict(state)


def rng_state() -> dict:
    """State of the global generators of Python, numpy, torch and CUDA, as plain types."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` returned. CUDA states are put back only where as many devices are there."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
