"""Runs the benchmarks of this machine, all or the parts named, and records their rows under benchmarks/results.

    python benchmarks/run.py [PART ...] [--device cpu|cuda|mps] [--full] [--again] [--compile]

A run that was interrupted goes on where it was. The options are those of the parts; benchmarks/report.py then writes
docs/benchmarks.md from what is recorded.
"""

import argparse
import subprocess
import sys

from harness import ROOT, add_options

FOLDER = ROOT / "benchmarks"
OWN_PARTS = {"bench_sampling", "bench_generate", "bench_linear_cross_entropy"}
OPS = sorted(path.name for path in FOLDER.glob("bench_*.py") if path.stem not in OWN_PARTS)
PARTS = {
    "ops": OPS,
    "sampling": ["bench_sampling.py"],
    "loss": ["bench_linear_cross_entropy.py"],
    "seed": ["seed_table.py"],
    "generate": ["bench_generate.py"],
    "apple": ["apple_prediction.py"],
}


def command(part: str, options: list[str]) -> list[str]:
    files = [str(FOLDER / name) for name in PARTS[part]]
    if part in ("ops", "sampling"):
        return [sys.executable, "-m", "pytest", *files, "-s", "--live", *options]
    return [sys.executable, *files, *(option for option in options if part == "generate" or option != "--compile")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} (default: all)")
    add_options(parser.add_argument)
    parser.add_argument("--compile", action="store_true", help="torch.compile is a contender")
    args = parser.parse_args()
    options = [option for option in sys.argv[1:] if option not in args.parts]
    if args.device.startswith("cuda") and not args.parts:
        args.parts = [part for part in PARTS if part != "apple"]
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no part named {min(unknown)!r}; there are {', '.join(PARTS)}")
    status = 0
    for part in args.parts or PARTS:
        status |= subprocess.run(command(part, options), cwd=ROOT).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
