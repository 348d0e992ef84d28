"""Timing shared by the benchmarks: medians, rotated buffers, and a copy of the same bytes in the same run."""

import argparse
import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # torch_fused need not be installed

CACHE_BYTES = 256 << 20
"""Rotating through this much memory keeps results out of any cache."""
PAUSE_CYCLES, PAUSE_SECONDS = 4_000_000, 2e-3
"""What a GPU waits before a sample, and the least that takes: its clock is below 2 GHz."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median seconds a call, and the spread of the samples: between their quartiles, over the median."""

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (high - low) / median)


def add_options(add: Callable[..., Any]) -> None:
    """Options of every benchmark; `add` is the method of a parser, argparse's or pytest's, that adds one."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add("--device", default=best, help="cpu, cuda or mps (default: the best there is)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--full", action="store_true", help="longer cases too")
    add("--again", action="store_true", help="measure rows that are up to date again")
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the CSV files")


def arguments(description: str | None, *more: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser.add_argument)
    for name, options in more:
        parser.add_argument(name, **options)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else a result past 32 MB is fresh from the system, and its first touch is timed."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


class GpuMoment:
    """A point of a CUDA device's time line, with a pause behind it in which the host queues what is timed from it.

    So the difference of two is the time of the device, not of the host.
    """

    def __init__(self) -> None:
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._before.record()
        torch.cuda._sleep(PAUSE_CYCLES)
        self._after.record()

    def __sub__(self, earlier: "GpuMoment") -> float:
        self._before.synchronize()
        return earlier._after.elapsed_time(self._before) / 1e3


def clock(device: str) -> Callable[[], Any]:
    """A function whose results differ by the seconds that the device took for what was queued in between."""
    if device.startswith("cuda"):
        return GpuMoment
    return wall_clock(device)


def wall_clock(device: str) -> Callable[[], float]:
    """Seconds at which all that was queued is done."""
    wait = synchronizer(device)

    def now() -> float:
        wait()
        return time.perf_counter()

    return now


def synchronizer(device: str) -> Call:
    kind = torch.device(device).type
    return (lambda: None) if kind == "cpu" else getattr(torch, kind).synchronize


def sets(nbytes: int, device: str) -> int:
    """How many sets of buffers exceed the caches: one on the CPU, whose caches are part of the matter."""
    return 1 if device == "cpu" else max(1, min(64, -(-CACHE_BYTES // max(nbytes, 1))))


def plan(call: Call, device: str, target: float | None = None) -> tuple[int, int]:
    """Warms up; then how many calls make a sample of `target` seconds, and how many samples to take."""
    cuda = device.startswith("cuda")
    target = target or (0.002 if cuda else 0.02)
    now = clock(device)
    call()
    wall_clock(device)()
    begin, host = now(), time.perf_counter()
    for _ in range(2):
        call()
    host = time.perf_counter() - host
    once = max((now() - begin) / 2, 1e-8)
    calls = max(1, int(target / once))
    if cuda:  # no more than the host can queue in the pause
        calls = max(1, min(calls, int(PAUSE_SECONDS / (host / 2))))
    return calls, max(5, min(7 if cuda else 15, int(1 / once)))


def measure(calls: Sequence[Call], device: str, *, target: float | None = None) -> Timing:
    """Times `calls`, which do the same on buffers of their own, in turn."""
    now = clock(device)
    ring = itertools.cycle(calls)
    count, samples = plan(lambda: next(ring)(), device, target)
    seconds = []
    for _ in range(samples):
        begin = now()
        for _ in range(count):
            next(ring)()
        seconds.append((now() - begin) / count)
    return Timing.of(seconds)


def copy_bandwidth(nbytes: int, device: str) -> float:
    """Bytes a second of a copy that reads and writes `nbytes` in all, buffers rotated."""
    half = max(min(nbytes, 1 << 30) // 2, 4)

    def copy() -> Call:
        source = torch.empty(half, dtype=torch.uint8, device=device).random_(0, 255)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return 2 * half / measure([copy() for _ in range(sets(nbytes, device))], device).seconds
