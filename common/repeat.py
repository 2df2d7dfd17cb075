"""Seeds 0..N-1 of one command, and each summary figure as mean, spread and interval:

    python -m common.repeat 3 collatz.py --lookahead 20

Flags after the script are the script's. --seed S starts at S, --name and --out-dir get the seed appended.
"""
from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.run import Parser, UserError, integer, one_line_errors, read_json

# two-sided 95 % quantile of Student's t by degrees of freedom; 1.96 is close enough above 30
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
             2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def flatten(summary: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a summary, nested keys joined by dots; text, lists and null are left out."""
    flat = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def statistics_of(values: list[float]) -> dict[str, float]:
    """mean, sd (n-1), min, max and the half width of the 95 % t-interval of the mean; sd and half width need n >= 2."""
    n, mean = len(values), statistics.fmean(values)
    sd = statistics.stdev(values) if n > 1 else math.nan
    t = STUDENT_T[n - 2] if 1 < n < 32 else 1.96
    return {"mean": mean, "sd": sd, "half": t * sd / math.sqrt(n), "min": min(values), "max": max(values)}


def table(summaries: list[dict]) -> str:
    """One line a figure that every summary has."""
    flats = [flatten(s) for s in summaries]
    keys = [k for k in flats[0] if k != "seed" and all(k in f for f in flats)]
    lines = [f"{'figure':<40} {'mean':>12} {'sd':>10}   {'95% of the mean':<24} min - max   (n = {len(flats)})"]
    for key in keys:
        s = statistics_of([f[key] for f in flats])
        interval = "-" if math.isnan(s["sd"]) else f"{s['mean'] - s['half']:.6g} - {s['mean'] + s['half']:.6g}"
        lines.append(f"{key:<40} {s['mean']:>12.6g} {s['sd']:>10.3g}   {interval:<24} {s['min']:.6g} - {s['max']:.6g}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    p = Parser(prog="common.repeat", usage="python -m common.repeat N SCRIPT [flags]", description=__doc__)
    p.add_argument("n", type=integer(1), metavar="N", help="number of seeds")
    p.add_argument("script", type=Path, help="script to run")
    p.add_argument("--seed", type=integer(0), default=0, help="first seed")
    p.add_argument("--name", default=None, help="run name; -sSEED is appended")
    p.add_argument("--out-dir", default=None, help="run folder; -sSEED is appended")
    return p.parse_known_args(argv)


def repeat(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """Run the seeds one after the other; return the summaries. Raises UserError when a run fails."""
    if not args.script.is_file():
        raise UserError(f"{args.script}: no such script")
    name = args.name or time.strftime("%Y%m%d-%H%M%S")
    base = args.out_dir or str(Path("logs") / args.script.stem / name)
    summaries = []
    for seed in range(args.seed, args.seed + args.n):
        folder = f"{base}-s{seed}"
        print(f"# seed {seed}: {folder}", flush=True)
        process = subprocess.Popen([sys.executable, str(args.script), *flags, "--seed", str(seed), "--out-dir", folder])
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # the script got the Ctrl-C as well and saves before it leaves
            raise
        if code:
            raise UserError(f"seed {seed} ended with exit code {code}; {len(summaries)} seeds had finished")
        summaries.append(read_json(Path(folder) / "summary.json"))
    return summaries


def main(argv: list[str] | None = None) -> list[dict]:
    args, flags = parse_args(argv)
    with one_line_errors("common.repeat"):
        summaries = repeat(args, flags)
        print("\n" + table(summaries))
    return summaries


if __name__ == "__main__":
    main()
