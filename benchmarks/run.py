"""Runs the benchmarks of this machine, all or the ones named, and records their rows under benchmarks/results.

    python benchmarks/run.py [BENCH ...] [--device cpu|cuda|mps] [--only TEXT] [--full] [--again] [--compile]

An interrupted run goes on where it stopped. benchmarks/report.py then writes docs/benchmarks.md from the rows.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from apple import counts
from decode import decode
from generate import requests
from linear_cross_entropy import losses
from metal_candle import rows
from ops import adamw, draws, kv_cache, layer_norm, quantized, rms_norm, rope, softmax, swiglu
from record import KEYS, RESULTS, STAMP, Case, Results
from timing import ROOT, keep_freed_memory
from transformers.utils import logging

from torch_fused.devices import best_device

BENCHES: dict[str, Callable[[str, bool], list[Case]]] = {
    "adamw": adamw, "decode": decode, "kv_cache": kv_cache, "layer_norm": layer_norm,
    "linear_cross_entropy": losses, "quantized": quantized, "rms_norm": rms_norm, "rope": rope, "sampling": draws,
    "softmax": softmax, "swiglu": swiglu, "metal_candle": rows, "generate": requests, "apple": counts,
}  # fmt: skip
"""The cases of each file of results."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{', '.join(BENCHES)} (default: all)"
    parser.add_argument("benches", nargs="*", choices=[*BENCHES, []], metavar="bench", help=names)
    parser.add_argument("--device", default=best_device(), help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", default="", help="only cases with this in their names")
    parser.add_argument("--full", action="store_true", help="longer cases too")
    parser.add_argument("--again", action="store_true", help="measure rows that are up to date again")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    if len(args.benches) != 1:  # each in a process of its own
        options = [option for option in sys.argv[1:] if option not in args.benches]
        commands = ([sys.executable, __file__, bench, *options] for bench in args.benches or BENCHES)
        return max(subprocess.run(command, cwd=ROOT).returncode for command in commands)
    (bench,) = args.benches
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    logging.disable_progress_bar()
    device = "cpu" if bench == "apple" else args.device  # it counts, in the emulator
    results = Results(bench, args.results, device, args.again, args.compile)
    for case in BENCHES[bench](device, args.full):
        if args.only in case.name:
            print(case.name, flush=True)
            for row in results.rows(case):
                columns = (f"{name} {value}" for name, value in row.items() if name not in (*KEYS, *STAMP) and value)
                print(f"  {row['contender']:32s}", *columns, sep="  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
