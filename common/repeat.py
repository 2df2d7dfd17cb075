"""Seeds 0..N-1 of one command, and each summary figure as mean, spread and interval:

    python -m common.repeat 3 collatz.py --lookahead 20

Flags after the script are the script's. --seed S starts at S, --name and --out-dir get the seed appended.
"""
from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.files import UserError, one_line_errors, read_json
from common.flags import Parser, folder_name, integer, path

# two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom; 2.1 is close enough above
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def flatten(summary: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a summary, nested keys joined by dots; text, lists and null are left out."""
    flat = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def table(summaries: list[dict]) -> str:
    """One line a figure that every summary has: mean, sd (n - 1), 95 % t-interval of the mean, range."""
    flats = [flatten(s) for s in summaries]
    n = len(flats)
    t = STUDENT_T[n - 2] if 1 < n <= len(STUDENT_T) + 1 else 2.1
    lines = [f"{'figure':<40} {'mean':>12} {'sd':>10}   {'95% of the mean':<24} min - max   (n = {n})"]
    for key in (k for k in flats[0] if k != "seed" and all(k in f for f in flats)):
        values = [f[key] for f in flats]
        mean, sd, interval = statistics.fmean(values), math.nan, "-"
        if n > 1:
            sd = statistics.stdev(values)
            half = t * sd / math.sqrt(n)
            interval = f"{mean - half:.6g} - {mean + half:.6g}"
        lines.append(f"{key:<40} {mean:>12.6g} {sd:>10.3g}   {interval:<24} {min(values):.6g} - {max(values):.6g}")
    return "\n".join(lines)


def run_seed(command: list[str]) -> int:
    """Run one seed and return its exit code. SIGTERM is handed on; after it, as after Ctrl-C, the script may save."""
    children: list[subprocess.Popen] = []

    def hand_on(number: int, frame) -> None:
        for child in children:
            child.send_signal(number)
    before = signal.signal(signal.SIGTERM, hand_on)
    children.append(subprocess.Popen(command))
    try:
        return children[0].wait()
    except KeyboardInterrupt:  # the script has got it as well
        children[0].wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    p = Parser(prog="common.repeat", usage="python -m common.repeat N SCRIPT [flags]", description=__doc__)
    p.add_argument("n", type=integer(1), metavar="N", help="number of seeds")
    p.add_argument("script", type=path, help="script to run")
    p.add_argument("--seed", type=integer(0), default=0, help="first seed")
    p.add_argument("--name", type=folder_name, help="run name; -sSEED is appended")
    p.add_argument("--out-dir", type=path, help="run folder; -sSEED is appended")
    return p.parse_known_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    args, flags = parse_args(argv)
    summaries = []
    with one_line_errors("common.repeat"):
        if not Path(args.script).is_file():
            raise UserError(f"{args.script}: no such script")
        name = args.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        base = args.out_dir or f"logs/{Path(args.script).stem}/{name}"
        for seed in range(args.seed, args.seed + args.n):
            folder = f"{base}-s{seed}"
            print(f"# seed {seed}: {folder}", flush=True)
            code = run_seed([sys.executable, args.script, *flags, "--seed", str(seed), "--out-dir", folder])
            if code:
                print(f"common.repeat: error: seed {seed} ended with exit code {code}; "
                      f"{len(summaries)} seeds had finished", file=sys.stderr)
                sys.exit(code if code > 0 else 128 - code)
            summaries.append(read_json(f"{folder}/summary.json"))
        print("\n" + table(summaries))
    return summaries


if __name__ == "__main__":
    main()
