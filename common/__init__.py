"""Thin bookkeeping shared by the experiments: no models, losses, data, schedules or training loops.

A script imports from this package before torch, whose import takes seconds: a Ctrl-C then, too, is one line. And
torch's threads then wait without spinning for long: beside another busy process on two cores a step of etrm_pretrain.py
takes 0.6 instead of 1.2 s, a small one a twentieth; on a quiet machine a tenth more. numpy's linear algebra, which
--threads does not know, has one thread.
"""
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:  # a torchrun that is killed would leave its ranks
    import ctypes
    import signal
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _excepthook(kind, error, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # at a prompt, Ctrl-C goes back to it
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # 128 + SIGINT; Python's own exit would be a death by that signal


sys.excepthook = _excepthook
