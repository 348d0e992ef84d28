"""Random calls of every op, in a separate process, so that a crash is an ordinary failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PER_OP = {"cpu": 25, "emulated": 8}
PER_OP_FULL = {"cpu": 9000, "emulated": 2500}  # 200,000 in all


def run(backend: str, calls: int, folder: Path) -> None:
    """tests/fuzz.py, which compares each call with plain torch in float64."""
    log = folder / "call"
    command = [sys.executable, HERE / "fuzz.py", backend, str(calls), log]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    assert result.returncode == 0, f"exit status {result.returncode}\n{log.read_text()}\n{result.stderr[-8000:]}"


@pytest.mark.parametrize("backend", PER_OP)
def test_fuzz(backend, tmp_path):
    """Random sizes, layouts, places, values, options and dtypes: no crash, no wrong value."""
    run(backend, PER_OP[backend], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("backend", PER_OP_FULL)
def test_fuzz_200000_calls(backend, tmp_path):
    """The same, 200,000 calls."""
    run(backend, PER_OP_FULL[backend], tmp_path)
