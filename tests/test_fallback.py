"""If GPU kernels cannot be built, there is one warning and plain torch runs; or an error if requested."""

import os
import subprocess
import sys

import torch

import torch_fused
from torch_fused.opcount import OpCounter
from torch_fused.ops.decode import decode_token_
from torch_fused.ops.decoder import LAYER_PARTS, make_decoder
from torch_fused.ops.library import COMPOSED
from torch_fused.runtime import _runtime

# An emulation without sources stands for a GPU whose compiler rejects them all. It runs in a separate process, because
# an op that has fallen back reports so until the process ends.
SCRIPT = """
import torch
import torch_fused
from torch_fused.functional import add_rms_norm, linear_cross_entropy
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
logits, target = torch.randn(3, 5).bfloat16(), torch.tensor([1, 4, 0])
loss = linear_cross_entropy(torch.eye(3).bfloat16(), logits.T, target)
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), target))
print("fell back")
"""


def run(strict: str, folder) -> subprocess.CompletedProcess:
    """Runs in another folder, because Python would import unbuilt sources in the current one."""
    environment = {**os.environ, "TORCH_FUSED_STRICT": strict, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_falls_back_to_torch_with_one_warning(tmp_path):
    """The values and gradients of the plain-torch reference, and a single warning that gives the reason."""
    result = run("0", tmp_path)
    assert result.stdout.strip() == "fell back", result.stderr
    for op in ("add_rms_norm", "linear_cross_entropy"):
        assert result.stderr.count(f"torch_fused::{op} falls back to torch") == 1
    assert "is not among the sources" in result.stderr


def test_strict_makes_it_an_error(tmp_path):
    """TORCH_FUSED_STRICT=1: an error that names the op and the reason."""
    result = run("1", tmp_path)
    assert result.returncode != 0
    assert "torch_fused::add_rms_norm" in result.stderr and "TORCH_FUSED_STRICT=1" in result.stderr
    assert "is not among the sources" in result.stderr


def test_every_op_has_a_reference_of_the_same_schema():
    """The fallback is torch_fused_reference::<op>, with the same schema as the op."""
    status = torch_fused.status()
    assert {"rms_norm", "add_rms_norm", "rms_norm_backward"} <= status.keys()
    for op in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
        ours = getattr(torch.ops.torch_fused, op).default._schema
        theirs = getattr(torch.ops.torch_fused_reference, op).default._schema
        assert str(theirs) == str(ours).replace("torch_fused::", "torch_fused_reference::")


def test_status_lists_each_op_on_each_device():
    """status(): op -> device -> runtime, without private ops. On the CPU every op runs our kernels."""
    status = torch_fused.status()
    assert not any(op.startswith("_") for op in status)
    assert {"rms_norm", "sample", "kv_append_", "kv_update_", "decode_", "decode_token_"} <= status.keys()
    assert {runtimes["cpu"] for runtimes in status.values()} == {"vectorised C++"}


def decode_arguments() -> dict:
    """A decoder with one layer, two dimensions and three tokens."""
    shapes = {"gate": (3, 2), "up": (3, 2), "down": (2, 3), "input_norm": (2,), "post_attention_norm": (2,)}
    shapes |= {name: (2, 2) for name in "qkvo"}
    zero = torch.zeros(1, 1, dtype=torch.long)
    layers = [torch.ones(shapes[name]) if name in shapes else None for name in LAYER_PARTS]
    return {
        "model": make_decoder(
            torch.ones(3, 2), layers, torch.ones(2), torch.ones(3, 2), heads=1, eps=1e-5, scaling=1.0
        ),
        "token_ids": zero,
        "positions": zero,
        "starts": None,
        "cos": torch.ones(4, 2),
        "sin": torch.zeros(4, 2),
        "keys": [torch.zeros(1, 1, 4, 2)],
        "values": [torch.zeros(1, 1, 4, 2)],
        "length": 0,
    }


def test_status_knows_what_the_composed_ops_call():
    """The runtime of `kv_update_` and `decode_token_` is that of the ops they call; no other op calls our ops."""

    def has_kernel(op, key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_fused::{op}", key)

    composed = {op for op in torch_fused.status() if not has_kernel(op, "CPU")}
    assert composed == COMPOSED.keys()
    assert all(has_kernel(op, "CompositeImplicitAutograd") for op in composed)

    buffers = torch.zeros(2, 1, 1, 4, 2)
    with OpCounter() as ops, torch.no_grad():
        torch.ops.torch_fused.kv_update_(*buffers, *torch.ones(2, 1, 1, 1, 2), 3)
    assert {name for name in ops.counts if name.startswith("torch_fused::")} == {"torch_fused::kv_append_"}
    called = set()
    for do_sample in (False, True):
        with OpCounter() as ops, torch.no_grad():
            decode_token_(**decode_arguments(), do_sample=do_sample)
        called |= {name.removeprefix("torch_fused::") for name in ops.counts if name.startswith("torch_fused::")}
    # Private ops are not in the table: _next_token calls one of these two.
    assert called == {"decode_", "_next_token"}
    assert set(COMPOSED["decode_token_"]) == {"decode_", "greedy", "sample"}


def test_status_without_a_kernel(monkeypatch):
    """If an op has no kernel, and if its kernels could not be built, as on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    status = torch_fused.status()
    assert status["kv_update_"]["cuda"] == status["rms_norm"]["cuda"] == "Metal source translated to CUDA"
    assert status["decode_token_"]["cuda"] == status["decode_"]["cuda"] == "Metal source translated to CUDA"
    reasons = {"kv_append_": "no compiler"}
    assert _runtime("kv_update_", "cuda", reasons) == _runtime("kv_append_", "cuda", reasons) == "torch: no compiler"
    assert _runtime("kv_update_", "cpu", reasons) == "vectorised C++"
