"""What is measured: contenders that get the same operands, timed next to a copy of as many bytes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timing import Call, Columns, columns, copies, interleave, peak_megabytes, sets

LISTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def listed(bench: str, device: str) -> list[Any]:
    return LISTS[bench]["cpu" if device == "cpu" else "gpu"]


def bandwidth(case: "Case", device: str, **timing: int) -> dict[str, Columns]:
    """Time, and the bandwidth of the case's bytes if it has their number."""
    rings = [case.calls(device) for _ in range(sets(case.nbytes, device))]
    calls = {name: [ring[name] for ring in rings] for name in case.contenders}
    if case.nbytes:
        calls["copy"], copied = copies(case.nbytes, device)
    with torch.no_grad():
        found = {name: columns(samples) for name, samples in interleave(calls, device, **timing).items()}
    if not case.nbytes:
        return found
    copy = copied / found.pop("copy")["ms"]
    for each in found.values():
        rate = case.nbytes / each["ms"]
        each |= {"gb_s": rate / 1e6, "copy_share": rate / copy}
    return found


def steps(case: "Case", device: str, more: Callable[[Columns], Columns]) -> dict[str, Columns]:
    """Wall time and peak memory, where a call takes long, and more columns that follow from these."""
    calls, peaks = case.calls(device), {}
    for name, call in calls.items():
        call()  # warms up
        peaks[name] = peak_megabytes(call, device)
    samples = interleave({name: [call] for name, call in calls.items()}, device, rounds=5, calls=1, wall=True)
    found = {name: columns(samples[name]) | {"peak_mb": peak} for name, peak in peaks.items()}
    return {name: row | more(row) for name, row in found.items()}


@dataclass(frozen=True, eq=False)
class Case:
    """An op at one shape. Its contenders are measured together."""

    op: str
    shape: str
    dtype: str
    kind: str  # of the values or the request, where it matters
    contenders: Mapping[str, Callable[..., Any]]
    operands: Callable[[], Iterable[Any]] = tuple  # makes them on torch's default device
    prepare: Callable[..., Call] = partial  # makes what is timed from a contender and the operands
    nbytes: int = 0  # every operand and every result, each once; 0: no bandwidth
    measure: Callable[["Case", str], dict[str, Columns]] = bandwidth  # the columns of each contender, on a device

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.shape, self.dtype, self.kind)))

    def calls(self, device: str = "cpu") -> dict[str, Call]:
        """What is timed, on new operands."""
        with torch.device(device):
            operands = tuple(self.operands())
        return {name: self.prepare(contender, *operands) for name, contender in self.contenders.items()}
