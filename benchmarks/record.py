"""What is measured, a case at a time, and its rows: one small CSV file for each benchmark and machine."""

import contextlib
import csv
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import ROOT

import torch_fused
from torch_fused.devices import device_name

RESULTS = ROOT / "benchmarks/results"
KEYS = ("op", "shape", "dtype", "kind", "contender")
STAMP = ("device", "threads", "torch", "transformers", "torch_fused", "date")
DISTURBED = 0.02
"""A case is measured again by the next run if its threads waited for a core for more than this share of the time."""
Row = dict[str, str]
Columns = Mapping[str, float | str | None]


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

    Args:
        bench: name of the file.
        folder: of the results; the file is in the machine's folder in it.
        device: that rows are measured on.
        again: measure cases that are up to date again.
        compiles: time torch.compile too.
    """

    def __init__(self, bench: str, folder: Path, device: str, again: bool = False, compiles: bool = False) -> None:
        self.path = folder / slug(device_name(device)) / f"{bench}.csv"
        self._device, self._again, self._compiles, self._changed = device, again, compiles, changed()
        self._rows = {tuple(row[key] for key in KEYS): row for row in read(self.path)}

    def current(self, key: tuple[str, ...]) -> Row | None:
        """The row with these keys, if it is up to date and was not disturbed."""
        row = self._rows.get(key)
        if self._again or row is None or datetime.fromisoformat(row["date"]) < self._changed:
            return None
        now = stamp(self._device) | {"date": row["date"]}
        undisturbed = float(row["waited"] or 0) <= DISTURBED
        return row if undisturbed and all(row[name] == now[name] for name in STAMP) else None

    def rows(self, case: Case) -> list[Row]:
        """A case's rows. It is measured only if one is out of date."""
        contenders = case.contenders(self._device)
        if not self._compiles:
            contenders = {name: each for name, each in contenders.items() if "compile" not in name}
        keys = {name: (case.op, case.shape, case.dtype, case.kind, name) for name in contenders}
        if not all(self.current(key) for key in keys.values()):
            start, before = time.perf_counter(), waited()
            columns = case.measure(contenders, self._device)
            share = max(0.0, waited() - before) / (torch.get_num_threads() * (time.perf_counter() - start))
            last = stamp(self._device) | {"waited": f"{share:.3f}" if self._device == "cpu" else ""}
            for name, key in keys.items():
                texts = {column: _text(value) for column, value in columns[name].items()}
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


def _text(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """The rows of a file of results; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machines(folder: Path = RESULTS) -> Iterator[Path]:
    """The folders of the machines that have results."""
    return (path for path in sorted(folder.glob("*")) if path.is_dir())


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows that are compared with each other, by these columns."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
