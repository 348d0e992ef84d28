"""What happens where the GPU kernels cannot be built: one warning and plain torch, or an error if that is asked for."""

import os
import subprocess
import sys

import torch

import torch_fused

# An emulation without a single source stands for a GPU whose compiler rejects them all. In a process of its own, since
# an op that has fallen back says so until the process ends.
SCRIPT = """
import torch
import torch_fused
from torch_fused.functional import add_rms_norm
from torch_fused.ops.rms_norm import add_rms_norm_reference

x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
torch.ops.torch_fused._emulator_begin([], [], True, "sequential", 0)
for _ in range(2):
    normed, total = add_rms_norm(x, x, weight)
expected = add_rms_norm_reference(x, x, weight)
assert torch.equal(normed, expected[0]) and torch.equal(total, expected[1])
actual = torch.autograd.grad((normed + total).sum(), (x, weight))
wanted = torch.autograd.grad(sum(expected).sum(), (x, weight))
for a, b in zip(actual, wanted):
    torch.testing.assert_close(a, b)
print("fell back")
"""


def run(strict: str, folder) -> subprocess.CompletedProcess:
    """In another folder: beside unpacked sources that are not built, Python would find these."""
    environment = {**os.environ, "TORCH_FUSED_STRICT": strict, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_falls_back_to_torch_with_one_warning(tmp_path):
    """The values and gradients of the plain-torch reference, and a single warning that gives the reason."""
    result = run("0", tmp_path)
    assert result.stdout.strip() == "fell back", result.stderr
    assert result.stderr.count("torch_fused::add_rms_norm falls back to torch") == 1
    assert "is not among the sources" in result.stderr


def test_strict_makes_it_an_error(tmp_path):
    """TORCH_FUSED_STRICT=1: an error that names the op and the reason."""
    result = run("1", tmp_path)
    assert result.returncode != 0
    assert "torch_fused::add_rms_norm" in result.stderr and "TORCH_FUSED_STRICT=1" in result.stderr
    assert "is not among the sources" in result.stderr


def test_every_op_has_a_reference_of_the_same_schema():
    """The fallback is torch_fused_reference::<op>, whose schema is the op's own."""
    status = torch_fused.status()
    assert {"rms_norm", "add_rms_norm", "rms_norm_backward"} <= status.keys()
    for op in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
        ours = getattr(torch.ops.torch_fused, op).default._schema
        theirs = getattr(torch.ops.torch_fused_reference, op).default._schema
        assert str(theirs) == str(ours).replace("torch_fused::", "torch_fused_reference::")


def test_status_lists_each_op_on_each_device():
    """status(): op -> device -> runtime, without the private ops; "torch" where an op has no kernel of its own."""
    status = torch_fused.status()
    assert not any(op.startswith("_") for op in status)
    assert {status[op]["cpu"] for op in ("rms_norm", "softmax", "sample", "kv_append_")} == {"vectorised C++"}
    assert status["kv_update_"]["cpu"] == "torch"
