"""The doctor and its self-check: every op on a device, an exit status that tells."""

import pytest
import torch

from torch_fused.__main__ import main
from torch_fused.metal import emulate
from torch_fused.selfcheck import CHECKS, compare


@pytest.mark.parametrize("op", CHECKS)
def test_selfcheck_passes_on_every_backend(backend, op):
    """The shapes that reach every kernel are right on the CPU, in the emulator, and on a GPU."""
    CHECKS[op](backend.device)


def test_selfcheck_reaches_every_row_kernel():
    """One, two and four packs a thread, and the loop, in each dtype: nothing escapes compute-sanitizer."""
    with emulate() as run:
        CHECKS["add_rms_norm"]("cpu")
    kernels = {launch.kernel for launch in run.launches}
    assert kernels == {f"rms_norm_{dtype}_{packs}" for dtype in ("f32", "f16", "bf16") for packs in (0, 1, 2, 4)}


def test_doctor_reports_and_succeeds(capsys):
    """Versions, chip, speeds and one line an op; exit status 0."""
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "GB/s" in output
    assert all(f"  {op} " in output for op in CHECKS)
    assert f"all {len(CHECKS)} ops are right on cpu" in output


def test_doctor_fails_on_a_wrong_result(monkeypatch, capsys):
    """One wrong op: its line says so, and the exit status is 1."""

    def wrong(device):
        compare("rms_norm of 2 columns", [torch.ones(2)], [torch.zeros(2, dtype=torch.float64) + 2])

    monkeypatch.setitem(CHECKS, "rms_norm", wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG: rms_norm of 2 columns" in capsys.readouterr().out
