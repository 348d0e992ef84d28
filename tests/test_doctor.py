"""The doctor and its self-check: every op on a device, and the exit status."""

import pytest
import torch
from conftest import available_backends

from torch_fused import doctor
from torch_fused.__main__ import main
from torch_fused.metal import emulate
from torch_fused.opcount import OpCounter
from torch_fused.selfcheck import CHECKS, compare


# test_gpu_kernels.py runs all of them in the emulator.
@pytest.mark.parametrize("backend", [b for b in available_backends() if b.name != "emulated"], ids=str, indirect=True)
@pytest.mark.parametrize("op", CHECKS)
def test_selfcheck_passes_on_every_backend(backend, op):
    """The shapes that reach every kernel are right on the CPU and on a GPU."""
    CHECKS[op](backend.device)


def test_selfcheck_reaches_every_row_kernel():
    """One, two and four packs per thread, and the loop, in each dtype, so that compute-sanitizer sees all."""
    with emulate() as run:
        CHECKS["add_rms_norm"]("cpu")
    kernels = {launch.kernel for launch in run.launches}
    assert kernels == {f"rms_norm_{dtype}_{packs}" for dtype in ("f32", "f16", "bf16") for packs in (0, 1, 2, 4)}


def test_doctor_reports_and_succeeds(capsys):
    """Versions, chip, speeds and one line per op; exit status 0."""
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "GB/s" in output
    assert all(f"  {op} " in output for op in CHECKS)
    assert f"all {len(CHECKS)} ops are correct on cpu" in output


@pytest.mark.parametrize("op", ["rms_norm", "adamw_", "decode_"])
def test_doctor_times_only_the_first_use(monkeypatch, op):
    """The op's first call until the device has finished, without the rest of the check."""
    timed = []

    def milliseconds(call, device):
        with OpCounter() as ops:
            call()
        timed.append((dict(ops.counts), device))
        return 12.5

    monkeypatch.setattr(doctor, "_milliseconds", milliseconds)
    with doctor.FirstUse(op, "cpu") as first:
        CHECKS[op]("cpu")
    assert timed == [({f"torch_fused::{op}": 1}, "cpu")]
    assert first.milliseconds == 12.5


def test_doctor_uses_no_op_before_its_check(monkeypatch, capsys):
    """Its other measurement, the cost of an rms_norm call, runs after the checks."""
    order = []
    monkeypatch.setattr(doctor, "CHECKS", {"rms_norm": lambda device: order.append("check")})
    monkeypatch.setattr(doctor, "_speeds", lambda device: order.append("speeds") or {})
    with OpCounter() as ops:
        assert main(["doctor", "--device", "cpu"]) == 0
    assert order == ["check", "speeds"]
    assert not any(name.startswith("torch_fused::") and not name.startswith("torch_fused::_") for name in ops.counts)
    assert "first use      nan ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("mps", "this machine has no mps"),
        ("cuda:99", "this machine has no cuda:99"),
        ("gpu", "unknown device 'gpu'"),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_a_missing_device(command, device, reason, capsys):
    """One line that names the available devices, and exit status 2."""
    if device == "mps" and torch.backends.mps.is_available():
        device, reason = "mps:7", "this machine has no mps:7"
    with pytest.raises(SystemExit) as exit:
        main([command, "--device", device])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert f"torch_fused {command}: argument --device: {reason}; use one of cpu" in error


def test_doctor_fails_on_a_wrong_result(monkeypatch, capsys):
    """One wrong op: its line says so, and the exit status is 1."""

    def wrong(device):
        compare("rms_norm of 2 columns", [torch.ones(2)], [torch.zeros(2, dtype=torch.float64) + 2])

    monkeypatch.setitem(CHECKS, "rms_norm", wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG: rms_norm of 2 columns" in capsys.readouterr().out
