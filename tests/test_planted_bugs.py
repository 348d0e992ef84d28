"""Bugs planted in copies of the ops' kernels: each is caught, on the right line.

What only the clang lint can see is in test_metal_lint.py.
"""

import re
from pathlib import Path

import pytest
import torch
from planted import BUGS, ONLY_NUMBERS

from torch_fused.metal import MetalError, emulate
from torch_fused.metal.emulation import Launch
from torch_fused.testing import relative_error

SOURCES = Path(__file__).parents[1] / "csrc_mps"


def metal_text(source: str) -> str:
    return dict(zip(*torch.ops.torch_fused._metal_sources(), strict=True))[source]


def lines_with(file: str, part: str) -> set[int]:
    lines = (SOURCES / file).read_text().splitlines()
    found = {number for number, line in enumerate(lines, 1) if part.strip() in line}
    assert found, f"{file} has no line with {part!r}"
    return found


def planted(source: str, old: str, new: str, launches: list[Launch]) -> str:
    """The source with the bug, with kernels only for the launched types, to save compile time."""
    text = metal_text(source)
    assert old in text
    launched = {dtype for dtype in ("f32", "f16", "bf16") for launch in launches if f"_{dtype}" in launch.kernel}
    instances = re.compile(r"^[A-Z_]+\((f32|f16|bf16), .*\)$", re.MULTILINE)
    return instances.sub(lambda line: line[0] if line[1] in launched else "", text.replace(old, new, 1))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught_at_its_line(bug):
    """The planted bug raises the expected error with file and line; without it nothing is raised."""
    with emulate() as clean:
        bug.run()
    text = planted(bug.source, bug.old, bug.new, clean.launches)
    with pytest.raises((RuntimeError, MetalError), match=bug.message) as error, emulate(sources={bug.source: text}):
        bug.run()
    place = re.search(rf"{re.escape(Path(bug.file).name)}:(\d+)", str(error.value))
    assert place, str(error.value)
    assert int(place[1]) in lines_with(bug.file, bug.at), str(error.value)


@pytest.mark.parametrize(
    ("source", "old", "new", "run"),
    [bug[1:] for bug in ONLY_NUMBERS],
    ids=[f"{source}: {name}" for name, source, *_ in ONLY_NUMBERS],
)
def test_bug_shows_in_the_numbers_only(source, old, new, run):
    """No check fires, but the results are wrong by far more than rounding, so tests against float64 would fail."""
    with emulate() as clean:
        expected = tensors(run())
    with emulate(sources={source: planted(source, old, new, clean.launches)}):
        actual = tensors(run())
    assert not all(relative_error(a, e) < 1e-5 for a, e in zip(actual, expected, strict=True))


def tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
