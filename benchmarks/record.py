"""What is measured, a case at a time, and its rows: one small CSV file for each benchmark and machine."""

import csv
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from cases import Case
from timing import ROOT

from torch_fused import __version__, devices

RESULTS = ROOT / "benchmarks/results"
KEYS = ("op", "shape", "dtype", "kind", "contender")
STAMP = ("device", "threads", "torch", "transformers", "torch_fused", "date")
Row = dict[str, str]
Results = dict[str, list[Row]]  # by benchmark


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(device: str) -> Row:
    """What a row was measured on and with, and when: the columns of `STAMP`."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = torch.__version__, metadata.version("transformers"), __version__
    return dict(zip(STAMP, (devices.device_name(device), str(torch.get_num_threads()), *versions, date), strict=True))


def rows_of(case: Case, path: Path, device: str, missing: bool = False) -> list[Row]:
    """A case's rows, which are measured and written to the file; with `missing`, only if the file lacks one of them."""
    rows = {tuple(row[key] for key in KEYS): row for row in read(path)}
    keys = {name: (case.op, case.shape, case.dtype, case.kind, name) for name in case.contenders}
    if not missing or not rows.keys() >= set(keys.values()):
        torch.manual_seed(0)
        found, last = case.measure(case, device), stamp(device)
        for name, key in keys.items():
            rows[key] = dict(zip(KEYS, key, strict=True)) | {k: text(x) for k, x in found[name].items()} | last
        write(path, list(rows.values()))
    return [rows[key] for key in keys.values()]


def text(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: list[Row]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row if name not in STAMP)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*columns, *STAMP), "", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a file of results; none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def results(folder: Path = RESULTS) -> dict[str, Results]:
    """Of each machine."""
    machines = sorted(folder.iterdir())
    return {machine.name: {path.stem: read(path) for path in sorted(machine.glob("*.csv"))} for machine in machines}


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows that are compared with each other, by these columns."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
