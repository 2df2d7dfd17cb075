"""Checkpoints: a dict of plain types and tensors, saved atomically and read without running code."""
from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import torch

from common.files import UserError, refuse_damaged, write_atomic

FORMAT = 1


def save(path: str | os.PathLike, checkpoint: dict) -> None:
    """Save a checkpoint of plain types and tensors. Raises OSError when the disk is full or not writable."""
    buffer = io.BytesIO()  # torch's own file writer hides OSError behind RuntimeError
    torch.save(checkpoint, buffer)
    write_atomic(path, buffer.getvalue())


def file_of(path: str | os.PathLike) -> Path:
    """The checkpoint that `path` means: itself, or of a run folder best.pt, or else the first of its *.pt."""
    path = Path(path)
    best = path / "best.pt"
    return path if not path.is_dir() else best if best.is_file() else min(path.glob("*.pt"), default=best)


def read(path: str | os.PathLike) -> dict:
    """The dict of plain types and tensors in a file of torch.save, tensors on the CPU.

    Read with weights_only=True, so a pickle that would run code is refused.
    Raises UserError: missing, empty, cut short, not a dict.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a plain pickle, which is then refused
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # foreign bytes trip the unpickler in a dozen ways, IndexError and struct.error among them
        unsafe = "GLOBAL" in str(e) or "Unsupported class" in str(e)
        reason = "it holds more than plain data, and loading that could run code" if unsafe else "damaged, or cut short"
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    return saved if isinstance(saved, dict) else {}


def check(saved: dict, path: str | os.PathLike, script: str, like: type | None = None, **kinds: type) -> dict:
    """The checkpoint itself, if `script` wrote it and its fields are of these kinds. Raises UserError otherwise.

    like: a dataclass; a checkpoint whose config has fields of that alone will do, too: of the script that was copied.
    """
    if not isinstance(saved.get("script"), str):
        raise UserError(f"{path}: not a checkpoint of this project (no field 'script')")
    config = saved.get("config")
    is_parent = like and isinstance(config, dict) and 0 < len(config.keys() & like.__dataclass_fields__) == len(config)
    if saved["script"] != script and not is_parent:
        raise UserError(f"{path}: a checkpoint of {saved['script']!r:.40}, not of {script!r}")
    for name, kind in {"format": int, **kinds}.items():
        value = saved.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (name == "format" and value != FORMAT):
            shown = " ".join(repr(saved[name])[:40].split()) if name in saved else "missing"
            raise UserError(f"{path}: its {name} is {shown}; damaged, or not the kind of checkpoint that is wanted here")
    return saved


def load_weights(module: torch.nn.Module, state: dict, path: str | os.PathLike) -> None:
    """Load a state dict strictly. Raises UserError when it is not that of the module, or not finite."""
    with refuse_damaged(path):
        module.load_state_dict(state)
        if not all(torch.isfinite(x).all() for x in module.state_dict().values()):
            raise UserError(f"{path}: its weights are not finite")
