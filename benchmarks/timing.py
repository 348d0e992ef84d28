"""The timer of every benchmark: interleaved contenders, warm-up, medians and their spread."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # torch_fused need not be installed

from torch_fused.devices import synchronize  # noqa: E402

CACHE_BYTES = 256 << 20
"""Buffers rotate through this much memory on a GPU, more than any cache holds."""
PAUSE_CYCLES, PAUSE_SECONDS = 4_000_000, 2e-3
"""How long a GPU waits before a sample: its clock is below 2 GHz."""
Call = Callable[[], object]


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory. Otherwise results above 32 MB are new memory, and its first touch is timed."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one for each sample."""

    samples: Sequence[float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, over the median."""
        low, median, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / median

    def columns(self) -> dict[str, float]:
        return {"ms": self.seconds * 1e3, "spread": self.spread}


class GpuMoment:
    """A point on a CUDA device's time line, followed by a pause in which the host queues what is timed.

    The difference of two is therefore the device's time, without the host's.
    """

    def __init__(self) -> None:
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._before.record()
        torch.cuda._sleep(PAUSE_CYCLES)
        self._after.record()

    def __sub__(self, earlier: "GpuMoment") -> float:
        self._before.synchronize()
        return earlier._after.elapsed_time(self._before) / 1e3


def interleave(
    contenders: Mapping[str, Sequence[Call]], device: str, *, rounds: int | None = None, calls: int | None = None,
    target: float | None = None, wall: bool = False,
) -> dict[str, Timing]:  # fmt: skip
    """Times contenders in turn, a sample of each per round, after a warm-up.

    Args:
        contenders: what to time. Each is a list of calls that do the same on buffers of their own, used in rotation.
        device: whose time is measured.
        rounds: samples of each contender; by default 5 to 15, as time allows.
        calls: calls per sample; by default as many as fill `target`.
        target: seconds per sample; by default 2 ms on CUDA and 20 ms elsewhere.
        wall: measure wall time on CUDA too, not the time of the device.
    """
    events = device.startswith("cuda") and not wall

    def now() -> Any:
        if events:
            return GpuMoment()
        synchronize(device)
        return time.perf_counter()

    def sample(ring: Sequence[Call], count: int) -> float:
        begin = now()
        for i in range(count):
            ring[i % len(ring)]()
        return (now() - begin) / count

    counts, once = {}, {}
    for name, ring in contenders.items():
        sample(ring, 1)
        host = time.perf_counter()
        once[name] = max(sample(ring, 1), 1e-8)
        host = time.perf_counter() - host
        counts[name] = calls or max(1, int((target or (0.002 if events else 0.02)) / once[name]))
        if events:  # no more than the host can queue in the pause
            counts[name] = max(1, min(counts[name], int(PAUSE_SECONDS / host)))
    rounds = rounds or max(5, min(15, int(len(once) / sum(once.values()))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, found in samples.items():
            found.append(sample(contenders[name], counts[name]))
    return {name: Timing(found) for name, found in samples.items()}


def sets(nbytes: int, device: str) -> int:
    """How many sets of buffers exceed a GPU's caches. On the CPU one: caches are part of what is measured."""
    return 1 if device == "cpu" else max(1, min(64, -(-CACHE_BYTES // max(nbytes, 1))))


def copies(nbytes: int, device: str) -> tuple[list[Call], int]:
    """Copies that read and write `nbytes` in all, and how many bytes they move: at most 1 GB."""
    half = max(min(nbytes, 1 << 30) // 2, 4)

    def copy() -> Call:
        source = torch.empty(half, dtype=torch.uint8, device=device).random_(0, 255)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [copy() for _ in range(sets(nbytes, device))], 2 * half
