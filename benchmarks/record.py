"""What is measured, a case at a time, and its rows: one small CSV file for each benchmark and machine."""

import contextlib
import csv
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, Columns

import torch_fused
from torch_fused.devices import device_name

RESULTS = ROOT / "benchmarks/results"
KEYS = ("op", "shape", "dtype", "kind", "contender")
STAMP = ("device", "threads", "torch", "transformers", "torch_fused", "date")
DISTURBED = 0.02
"""A case is measured again by the next run if its threads waited for a core for more than this share of the time."""
Row = dict[str, str]


@dataclass(frozen=True, eq=False)
class Case(ABC):
    """An op at one shape. Its contenders are measured together."""

    op: str
    shape: str
    dtype: str
    kind: str  # of the values or the request, where it matters

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.shape, self.dtype, self.kind)))

    @abstractmethod
    def contenders(self, device: str) -> Mapping[str, Any]:
        """What is compared, by name."""

    @abstractmethod
    def measure(self, contenders: Mapping[str, Any], device: str) -> Mapping[str, Columns]:
        """The columns of each contender."""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(device: str) -> Row:
    """What a row was measured on and with, and when: the columns of `STAMP`."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = torch.__version__, metadata.version("transformers"), torch_fused.__version__
    return dict(zip(STAMP, (device_name(device), str(torch.get_num_threads()), *versions, date), strict=True))


def changed() -> datetime:
    """When the installed torch_fused last changed: its newest file."""
    folder = Path(torch_fused.__file__).parent
    newest = max(path.stat().st_mtime for kind in ("*.py", "*.so") for path in folder.rglob(kind))
    return datetime.fromtimestamp(newest, timezone.utc)


def waited() -> float:
    """Seconds for which this process's threads waited for a core; 0 where the system does not count them."""
    delays = []
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            delays.append(int(path.read_text().split()[1]))
    return sum(delays) / 1e9


class Results:
    """The rows of one benchmark on this machine. The file is rewritten with each case: an interrupted run goes on.

    `again` measures cases that are up to date too, `compiles` contenders that torch.compile makes.
    """

    def __init__(self, bench: str, folder: Path, device: str, again: bool = False, compiles: bool = False) -> None:
        self.path = folder / slug(device_name(device)) / f"{bench}.csv"
        self._device, self._again, self._compiles, self._changed = device, again, compiles, changed()
        self._rows = {tuple(row[key] for key in KEYS): row for row in read(self.path)}

    def is_current(self, key: tuple[str, ...]) -> bool:
        """Whether there is a row with these keys that is up to date and was not disturbed."""
        row, now = self._rows.get(key), stamp(self._device)
        if self._again or row is None or datetime.fromisoformat(row["date"]) < self._changed:
            return False
        return float(row["waited"] or 0) <= DISTURBED and all(row[name] == now[name] for name in STAMP[:-1])

    def rows(self, case: Case) -> list[Row]:
        """A case's rows. It is measured only if one is out of date."""
        contenders = case.contenders(self._device)
        contenders = {name: each for name, each in contenders.items() if self._compiles or "compile" not in name}
        keys = {name: (case.op, case.shape, case.dtype, case.kind, name) for name in contenders}
        if not all(map(self.is_current, keys.values())):
            start, before = time.perf_counter(), waited()
            columns = case.measure(contenders, self._device)
            share = max(0.0, waited() - before) / (torch.get_num_threads() * (time.perf_counter() - start))
            last = {"waited": f"{share:.3f}" if self._device == "cpu" else "", **stamp(self._device)}
            for name, key in keys.items():
                texts = {column: text(value) for column, value in columns[name].items()}
                self._rows[key] = dict(zip(KEYS, key, strict=True)) | texts | last
            self._write()
        return [self._rows[key] for key in keys.values()]

    def _write(self) -> None:
        columns = dict.fromkeys(name for row in self._rows.values() for name in row if name not in STAMP)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*columns, *STAMP), "", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows.values())
        partial.replace(self.path)


def text(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """The rows of a file of results; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machines(folder: Path = RESULTS) -> list[Path]:
    """The folders of the machines that have results."""
    return [path for path in sorted(folder.glob("*")) if path.is_dir()]


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows that are compared with each other, by these columns."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
