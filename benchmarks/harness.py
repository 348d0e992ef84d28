"""Timing shared by the benchmarks: medians, rotated buffers, and a copy of the same bytes in the same run."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CACHE_BYTES = 256 << 20
"""Rotating through this much memory keeps results out of any cache."""


@dataclass(frozen=True)
class Timing:
    """Median seconds a call, and the spread of the samples: (largest - smallest) / median."""

    seconds: float
    spread: float


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser.add_argument("--device", default=best, help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def copies(make: Callable[[int], object], nbytes: int, device: str) -> list:
    """As many sets of buffers as it takes to exceed the caches, at least two on a GPU; one on the CPU."""
    count = 1 if device == "cpu" else max(2, min(64, -(-CACHE_BYTES // max(nbytes, 1))))
    return [make(i) for i in range(count)]


def measure(call: Callable[..., object], sets: list, device: str, *, samples: int = 15, target: float = 0.02) -> Timing:
    """Times ``call(*set)``, rotating through the sets: host time on the CPU, device time by events on CUDA."""
    for buffers in sets[:3]:
        call(*buffers)
    once = _sample(call, sets, 3, device)
    count = max(1, int(target / max(once, 1e-9)))
    values = [_sample(call, sets, count, device) for _ in range(samples)]
    median = statistics.median(values)
    return Timing(median, (max(values) - min(values)) / median)


def _sample(call: Callable[..., object], sets: list, count: int, device: str) -> float:
    if device.startswith("cuda"):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(count):
            call(*sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count
    if device == "mps":
        torch.mps.synchronize()
    start = time.perf_counter()
    for i in range(count):
        call(*sets[i % len(sets)])
    if device == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - start) / count


def copy_bandwidth(nbytes: int, device: str) -> float:
    """Bytes a second of a copy that reads and writes `nbytes` in all, buffers rotated."""
    half = max(nbytes // 2, 4)

    def pair(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.empty(half, dtype=torch.uint8, device=device).random_(0, 255)
        return torch.empty_like(source), source

    timing = measure(lambda to, source: to.copy_(source), copies(pair, nbytes, device), device)
    return 2 * half / timing.seconds


def report(name: str, timing: Timing, nbytes: int, copy: float, baseline: Timing | None = None) -> None:
    """One line: time, GB/s, share of the copy, and how many times faster than the baseline of the same run."""
    rate = nbytes / timing.seconds
    against = f"{timing.seconds / baseline.seconds:8.2f}x the time" if baseline else ""
    print(
        f"  {name:28s} {timing.seconds * 1e6:10.2f} us  +-{timing.spread * 100:3.0f} %  {rate / 1e9:8.1f} GB/s  "
        f"{rate / copy:5.2f} of copy {against}",
        flush=True,
    )
