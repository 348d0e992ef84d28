"""The rows that benchmarks measure: one small CSV file for each benchmark and machine."""

import csv
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import ROOT

import torch_fused
from torch_fused.devices import device_name

STAMP = ("device", "threads", "torch", "transformers", "torch_fused", "date")
DISTURBED = 0.02
"""A row is measured again by the next run if its threads waited for a core for more than this share of the time."""
Row = dict[str, str]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(device: str) -> Row:
    """What a row was measured on and with, and when: the columns of `STAMP`."""
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
    """Seconds for which this process's threads waited for a core; 0 where the system does not count them."""
    counts = (path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat"))
    return sum(int(delay) for _, delay, _ in counts) / 1e9


class Results:
    """The rows of one benchmark on this machine. The file is rewritten with each, so an interrupted run goes on.

    Args:
        bench: name of the file.
        keys: columns that tell rows apart.
        values: columns that are measured.
        folder: of the results; the file is in the machine's folder in it.
        device: that rows are measured on.
        again: measure rows that are up to date again.
    """

    def __init__(
        self, bench: str, keys: Iterable[str], values: Iterable[str], folder: Path, device: str, again: bool = False
    ) -> None:
        self.keys, self.values = tuple(keys), tuple(values)
        self.path = folder / slug(device_name(device)) / f"{bench}.csv"
        self._device, self._again, self._changed = device, again, changed()
        self._rows = {self._key(row): row for row in read(self.path)}

    def _key(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in self.keys)

    def current(self, **key: str) -> Row | None:
        """The row with these keys, if it is up to date and was not disturbed."""
        row = self._rows.get(self._key(key))
        if self._again or row is None or datetime.fromisoformat(row["date"]) < self._changed:
            return None
        if float(row.get("waited") or 0) > DISTURBED:
            return None
        now = stamp(self._device)
        return row if all(row[name] == now[name] for name in STAMP if name != "date") else None

    def rows(self, keys: Mapping[str, Row], measure: Callable[[], Mapping[str, Mapping[str, Any]]]) -> dict[str, Row]:
        """The rows of contenders that are measured together, by name: `measure` gives their columns.

        It is called only if a row is out of date. Column `waited` is the share of that time in which the threads
        waited for a core.
        """
        found = {name: self.current(**key) for name, key in keys.items()}
        if None in found.values():
            start, before = time.perf_counter(), waited()
            columns = measure()
            share = (waited() - before) / (torch.get_num_threads() * (time.perf_counter() - start))
            text = f"{max(0.0, share):.3f}" if self._device == "cpu" else ""
            found = {name: self._row(text, **key, **columns[name]) for name, key in keys.items()}
            self._rows |= {self._key(row): row for row in found.values() if row}
            self._write()
        return {name: row for name, row in found.items() if row}

    def _row(self, waited: str, **columns: str | float | None) -> Row:
        texts = {name: _text(columns.get(name)) for name in (*self.keys, *self.values)}
        return texts | stamp(self._device) | {"waited": waited}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*self.keys, *self.values, "waited", *STAMP), "", lineterminator="\n")
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


def machines(folder: Path = ROOT / "benchmarks/results") -> Iterator[Path]:
    """The folders of the machines that have results."""
    return (path for path in sorted(folder.glob("*")) if path.is_dir())


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows that are compared with each other, by these columns."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
