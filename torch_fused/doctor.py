"""Checks every op on this machine and shows its runtime: ``python -m torch_fused doctor``."""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import __version__, arguments
from .devices import best_device, device_name, synchronize
from .runtime import status
from .selfcheck import CHECKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=arguments.device,
        default=best_device(),
        help="mps, cuda or cpu (default: the best available)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints a report to paste into an issue. Returns 1 if any op gives a wrong result, else 0."""
    device = args.device
    _print(_machine(device))
    print("first use: one call, including compiling the op's kernels or loading them from the cache")
    wrong = 0
    for op, check in CHECKS.items():
        first = FirstUse(op, device)
        try:
            with first:
                check(device)
            verdict = "correct"
        except (AssertionError, RuntimeError) as error:
            verdict = f"WRONG: {str(error).splitlines()[0]}"
            wrong += 1
        runtime = status().get(op, {}).get(torch.device(device).type, "")
        print(f"  {op:29} {runtime:30} first use {first.milliseconds:8.2f} ms  {verdict}")
    _print(_speeds(device))
    print(f"{wrong} of {len(CHECKS)} ops are wrong" if wrong else f"all {len(CHECKS)} ops are correct on {device}")
    return 1 if wrong else 0


class FirstUse(TorchDispatchMode):
    """Times the first call of an op inside a ``with`` block, until the device has finished."""

    def __init__(self, op: str, device: str) -> None:
        super().__init__()
        self.name = f"torch_fused::{op}"
        self.device = device
        self.milliseconds = math.nan

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name != self.name or not math.isnan(self.milliseconds):
            return func(*args, **(kwargs or {}))
        result: list[Any] = []
        self.milliseconds = _milliseconds(lambda: result.append(func(*args, **(kwargs or {}))), self.device)
        return result[0]


def _print(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:22} {value}")


def _machine(device: str) -> dict[str, str]:
    facts = {
        "torch_fused": f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": device_name(device) + (f", {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else ""),
    }
    if platform.system() == "Darwin":
        facts["macOS"] = f"{platform.mac_ver()[0]}, kernels written in Metal 3.1"
    return facts


def _speeds(device: str) -> dict[str, str]:
    """Runs after the checks, so that those time the first use of each op."""
    facts = {}
    x, weight = torch.ones(1, 64, device=device), torch.ones(64, device=device)
    op = torch.ops.torch_fused.rms_norm.default
    op(x, (64,), weight, 1e-6)
    calls = 1000
    launch = _milliseconds(lambda: [op(x, (64,), weight, 1e-6) for _ in range(calls)], device) / calls * 1e3
    facts["one call"] = f"{launch:.1f} us (rms_norm of one row, from Python, asynchronous on a GPU)"
    source = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = min(_milliseconds(lambda: target.copy_(source), device) for _ in range(5))
    facts["copy"] = f"{2 * source.numel() / copy / 1e6:.0f} GB/s, read and written"
    return facts


def _milliseconds(call: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3
