"""The timer of every benchmark, which interleaves contenders, and the memory that a call takes."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # torch_fused need not be installed

from torch_fused.devices import synchronize  # noqa: E402

CACHE_BYTES = 256 << 20  # buffers rotate through this much memory on a GPU, more than any cache holds
PAUSE_CYCLES = 20_000_000  # how long a GPU waits before a sample: 10 ms, in which the host queues what is timed
Call = Callable[[], object]
Columns = dict[str, float | str | None]


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory. Otherwise results above 32 MB are new memory, and its first touch is timed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # the most mmaps
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # the threshold of trimming


def columns(samples: Sequence[float]) -> Columns:
    """Their median, and the distance between their quartiles over it."""
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {"ms": median * 1e3, "spread": (high - low) / median}


def seconds(ring: Sequence[Call], calls: int, device: str, wall: bool) -> float:
    """Per call: wall time, or a CUDA device's own. While that pauses, the host queues what is timed."""

    def run() -> None:
        for call in islice(cycle(ring), calls):
            call()

    if device.startswith("cuda") and not wall:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleave(
    contenders: Mapping[str, Sequence[Call]], device: str, *, rounds: int = 0, calls: int = 0, target: float = 0.02,
    wall: bool = False,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per call of contenders that are timed in turn, a sample of each per round, after a warm-up.

    A contender is a list of calls that do the same on buffers of their own, used in rotation. There are 5 to 15 rounds,
    as time allows, and as many calls per sample as fill `target` seconds of wall time, or one on CUDA.
    """
    once = {name: max([seconds(ring, 1, device, wall) for _ in range(2)][1], 1e-8) for name, ring in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    calls = calls or int(device.startswith("cuda") and not wall)
    for _ in range(rounds or max(5, min(15, int(len(once) / sum(once.values()))))):
        for name, ring in contenders.items():
            samples[name].append(seconds(ring, calls or max(1, int(target / once[name])), device, wall))
    return samples


def sets(nbytes: int, device: str) -> int:
    """How many sets of buffers exceed a GPU's caches. On the CPU one: caches are part of what is measured."""
    return max(1, min(64, -(-CACHE_BYTES // nbytes))) if nbytes and device != "cpu" else 1


def copies(nbytes: int, device: str) -> tuple[list[Call], int]:
    """Copies that read and write `nbytes` in all, and how many bytes they move: at most 1 GB."""
    half = max(min(nbytes, 1 << 30) // 2, 4)

    def copy() -> Call:
        source = torch.empty(half, dtype=torch.uint8, device=device).random_(0, 255)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [copy() for _ in range(sets(nbytes, device))], 2 * half


def peak_megabytes(call: Call, device: str) -> float | None:
    """The most that a call takes in addition: of a GPU's memory, or on Linux of this process's; else None."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in use now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
