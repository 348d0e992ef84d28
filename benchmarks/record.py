"""The rows that benchmarks measure, in one small CSV file a benchmark and machine."""

import csv
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from harness import ROOT

import torch_fused

STAMP = ("device", "threads", "torch", "transformers", "torch_fused", "date")
DISTURBED = 0.02
"""The share of the time that its threads may wait for a core, above which a row is measured again by the next run."""


def device_name(device: str) -> str:
    """The chip that `device` is, by its vendor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        chip = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return f"{chip} GPU" if device == "mps" else chip
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(device: str) -> dict[str, str]:
    """What a row was measured on and with, and when: columns `STAMP`."""
    try:
        transformers = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        transformers = ""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = torch.__version__, transformers, torch_fused.__version__
    return dict(zip(STAMP, (device_name(device), str(torch.get_num_threads()), *versions, date), strict=True))


def changed() -> datetime:
    """When the installed torch_fused last changed: its newest file."""
    folder = Path(torch_fused.__file__).parent
    newest = max(path.stat().st_mtime for kind in ("*.py", "*.so") for path in folder.rglob(kind))
    return datetime.fromtimestamp(newest, timezone.utc)


def waited() -> float:
    """Seconds that this process's threads were ready to run while others had the cores; 0 where nobody counts them."""
    counts = (path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat"))
    return sum(int(delay) for _, delay, _ in counts) / 1e9


class Results:
    """The rows of one benchmark on this machine, rewritten with each so that an interrupted run goes on.

    Column `waited` is the share of the time it took to measure a row on a CPU that others kept the threads waiting.

    Args:
        bench: name of the file.
        keys: columns that tell rows apart.
        values: columns that are measured.
        folder: of the results; the file is in the machine's folder in it.
        device: that rows are measured on.
        again: rows that are up to date are measured again.
    """

    def __init__(
        self, bench: str, keys: Iterable[str], values: Iterable[str], folder: Path, device: str, again: bool = False
    ) -> None:
        self.keys, self.values = tuple(keys), tuple(values)
        self.path = folder / slug(device_name(device)) / f"{bench}.csv"
        self._device = device
        self._again = again
        self._changed = changed()
        self._begin = time.perf_counter(), waited()
        self._rows = {self._key(row): row for row in read(self.path)}

    def _key(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in self.keys)

    def current(self, **key: str) -> dict[str, str] | None:
        """The row with these keys, if it was measured undisturbed, with what is installed, since that has changed."""
        self._begin = time.perf_counter(), waited()
        row = self._rows.get(self._key(key))
        if self._again or row is None or datetime.fromisoformat(row["date"]) < self._changed:
            return None
        if float(row.get("waited") or 0) > DISTURBED:
            return None
        now = stamp(self._device)
        return row if all(row[name] == now[name] for name in STAMP if name != "date") else None

    def add(self, **columns: str | float | None) -> dict[str, str]:
        """Puts a row that has been measured since `current` was asked for it into the file, in place of the old one."""
        row = {name: _text(columns.get(name)) for name in (*self.keys, *self.values)} | stamp(self._device)
        row["waited"] = f"{self._share_waited():.3f}" if self._device == "cpu" else ""
        self._rows[self._key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*self.keys, *self.values, "waited", *STAMP), "", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows.values())
        partial.replace(self.path)
        return row

    def _share_waited(self) -> float:
        start, before = self._begin
        return max(0.0, waited() - before) / (torch.get_num_threads() * (time.perf_counter() - start))


def _text(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machines(folder: Path = ROOT / "benchmarks/results") -> Iterator[Path]:
    """The folders of the machines that have results."""
    return (path for path in sorted(folder.glob("*")) if path.is_dir())
