"""The most memory that a call takes, in addition to what is in use."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_megabytes(call: Callable[[], object], device: str) -> float | None:
    """A GPU's memory, or this process's on Linux; None elsewhere."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in use now
        before, peak = _resident_peak(), _resident_peak
    else:
        return None
    call()
    return (peak() - before) / 1e6


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
