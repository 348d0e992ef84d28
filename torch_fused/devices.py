"""Devices for the commands: the best one, its name, and synchronization."""

import platform
import re
import subprocess
from pathlib import Path

import torch


def best_device() -> str:
    """``"mps"``, ``"cuda"`` or ``"cpu"``."""
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """The vendor's name of the device; for a CPU on Linux also the number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        chip = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return f"{chip} GPU" if device == "mps" else chip
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has finished all its work."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()
