"""Runs benchmarks and records their rows under benchmarks/results. benchmarks/report.py writes the pages from them."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ops
from apple import counts
from cases import Case
from generate import requests
from metal_candle import rows
from models import decode
from record import KEYS, RESULTS, STAMP, rows_of, slug
from timing import ROOT, keep_freed_memory
from train import losses, training
from transformers.utils import logging

from torch_fused.devices import best_device, device_name

BENCHES: dict[str, Callable[[str], Iterable[Case]]] = {  # the cases of each file of results, for a device
    "adamw": ops.adamw, "apple": lambda _: counts(), "decode": decode, "generate": requests,
    "kv_cache": lambda _: ops.kv_cache(),
    "layer_norm": lambda _: ops.by_rows("layer_norm"), "linear_cross_entropy": losses, "metal_candle": lambda _: rows(),
    "quantized": ops.quantized, "rms_norm": lambda _: ops.by_rows("rms_norm", "add_rms_norm"),
    "rope": lambda _: ops.rope(), "sampling": lambda _: ops.draws(), "softmax": lambda _: ops.by_rows("softmax"),
    "swiglu": lambda _: ops.by_rows("silu_mul", "gelu_mul"), "train": training,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = f"{', '.join(BENCHES)} (default: all)"
    parser.add_argument("benches", nargs="*", choices=[*BENCHES, []], metavar="bench", help=names)
    parser.add_argument("--device", default=best_device(), help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--only", default="", help="only cases with this in their names")
    parser.add_argument("--missing", action="store_true", help="only cases without rows, as after an interrupted run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    if len(args.benches) != 1:  # each in a process of its own
        options = [option for option in sys.argv[1:] if option not in args.benches]
        commands = ([sys.executable, __file__, bench, *options] for bench in args.benches or BENCHES)
        return max(subprocess.run(command, cwd=ROOT).returncode for command in commands)
    (bench,) = args.benches
    if bench not in ("linear_cross_entropy", "train"):  # whose peaks would include it
        keep_freed_memory()
    logging.disable_progress_bar()
    device = "cpu" if bench == "apple" else args.device  # it counts, in the emulator
    path = args.results / slug(device_name(device)) / f"{bench}.csv"
    for case in BENCHES[bench](device):
        if args.only in case.name:
            print(case.name, flush=True)
            for row in rows_of(case, path, device, args.missing):
                columns = (f"{name} {value}" for name, value in row.items() if name not in (*KEYS, *STAMP) and value)
                print(f"  {row['contender']:32s}", *columns, sep="  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
