"""Runs the benchmarks of this machine, all or the ones named, and records their rows under benchmarks/results.

    python benchmarks/run.py [PART ...] [--device cpu|cuda|mps] [--full] [--again] [--compile]

An interrupted run goes on where it stopped. benchmarks/report.py then writes docs/benchmarks.md from the rows.
"""

import subprocess
import sys

from timing import ROOT, arguments

PARTS = ("ops", "linear_cross_entropy", "metal_candle", "generate", "apple")


def main() -> int:
    help = f"{', '.join(PARTS)} (default: all, but apple on CUDA)"
    args = arguments(__doc__, ("parts", {"nargs": "*", "metavar": "part", "choices": [*PARTS, []], "help": help}))
    options = [option for option in sys.argv[1:] if option not in args.parts]
    parts = args.parts or [part for part in PARTS if part != "apple" or not args.device.startswith("cuda")]
    commands = ([sys.executable, f"benchmarks/{part}.py", *options] for part in parts)
    return max(subprocess.run(command, cwd=ROOT).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
