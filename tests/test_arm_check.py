"""Checks that the bugs planted by `make arm-check`, which runs the NEON kernels, still fit the sources."""

from pathlib import Path

import pytest
from arm_check.planted import BUGS

SOURCES = Path(__file__).resolve().parent.parent / "csrc_mps"
PROGRAMS = {path.stem for path in (SOURCES.parent / "tools/arm_check").glob("*.cpp")}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_fits_the_sources(bug):
    assert (SOURCES / bug.file).read_text().count(bug.old) == 1 and bug.new != bug.old


def test_every_program_has_a_planted_bug():
    assert {bug.program for bug in BUGS} == PROGRAMS
