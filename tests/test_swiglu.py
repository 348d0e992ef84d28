"""silu_mul and gelu_mul: values, gradients and contracts, on every backend."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import torch_fused
from torch_fused.functional import gelu_mul, silu_mul
from torch_fused.metal import emulate
from torch_fused.ops.swiglu import (
    gelu_mul_backward_reference,
    gelu_mul_reference,
    silu_mul_backward_reference,
    silu_mul_reference,
)
from torch_fused.testing import HALF_ULP, assert_close, assert_matches_reference, make, relative_error

# Under a pack, a pack and a tail, odd, Qwen's intermediate size, more than one threadgroup.
COLS = [1, 3, 8, 13, 1000, 1537, 4864]


@dataclass(frozen=True)
class Gated:
    """An activation: the ops with it, in plain torch too, and torch's function for the activation alone."""

    mul: Callable[..., Any]
    reference: Callable[..., Any]
    backward: Callable[..., Any]
    backward_reference: Callable[..., Any]
    activation: Callable[..., Any]
    is_silu: bool = False  # it keeps its digits far below zero, where torch's gelu loses them and ours loses some


def gelu(approximate):
    functions = (gelu_mul, gelu_mul_reference, torch.ops.torch_fused.gelu_mul_backward, gelu_mul_backward_reference)
    return Gated(*(partial(function, approximate=approximate) for function in (*functions, F.gelu)))


ACTIVATIONS = {
    "silu": Gated(
        silu_mul,
        silu_mul_reference,
        torch.ops.torch_fused.silu_mul_backward,
        silu_mul_backward_reference,
        F.silu,
        is_silu=True,
    ),
    "gelu": gelu("none"),
    "gelu_tanh": gelu("tanh"),
}


@pytest.fixture(params=ACTIVATIONS)
def gated(request):
    return ACTIVATIONS[request.param]


@pytest.fixture(params=["torch", "llama"])
def casting_mode(request):
    return request.param


def pair(*shape, dtype=torch.float32, device="cpu", scale=3.0):
    return tuple(make(*shape, dtype=dtype, device=device, seed=seed, scale=scale) for seed in range(2))


def as_one_row(function):
    """The results in one row, whose largest value says which error is allowed: far below zero gelu is next to nothing,
    and each digit of the gate costs it several."""
    return lambda *args, **options: function(*args, **options).flatten()


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", COLS)
def test_matches_float64(backend, gated, cols, casting_mode):
    """Every dtype and row length is right to its roundings: one for "torch", two for "llama"."""
    for dtype in backend.dtypes:
        gate, up = pair(3, cols, dtype=dtype, device=backend.device)
        roundings = 1.0 if casting_mode == "torch" else 2.1
        assert_matches_reference(
            as_one_row(gated.mul), as_one_row(gated.reference), gate, up, casting_mode=casting_mode, roundings=roundings
        )


def test_gradients_near_the_largest_float(backend, gated):
    """A huge gradient times a tiny up is finite, in any order of the factors."""
    grad, up, gate = (torch.full((1, 8), value, device=backend.device) for value in (3e38, 3e-38, 1.28))
    actual = gated.backward(grad, gate, up)
    exact = gated.backward_reference(grad.double().cpu(), gate.double().cpu(), up.double().cpu())
    assert_close(actual[0], exact[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate(backend, gated, dtype):
    """The activation of all 65536 values of a half type is rounded right, or to the neighbour."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    actual = gated.mul(gate.to(backend.device), torch.ones_like(gate).to(backend.device)).cpu()
    expected = gated.reference(gate.double(), torch.ones_like(gate).double()).to(dtype)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    same |= (actual.abs() < 1e-36) & (expected.abs() < 1e-36)  # float32 has no more of them
    steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert (same | (steps <= 1)).all()
    assert same.float().mean() > 0.99


def check_float16_of_every_length():
    """All activations of 40 are 40, so the results are torch's products: every value, rounded, and every tail."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    for n in (*range(1, 40), 511, 512, 513, len(x)):
        for gated, mode in itertools.product(ACTIVATIONS.values(), ("torch", "llama")):
            gate = torch.full((n,), 40.0, dtype=torch.float16)
            actual = gated.mul(gate, x[-n:], casting_mode=mode)
            torch.testing.assert_close(actual, gate * x[-n:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets(capability):
    """Machines with and without float16 conversion instructions give the same bits."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "import test_swiglu; test_swiglu.check_float16_of_every_length()"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=os.path.dirname(__file__))


def test_llama_has_the_roundings_of_hugging_face(backend, gated):
    """Where the activation rounds as torch's, the product has the bits of eager's."""
    for dtype in (torch.float16, torch.bfloat16):
        gate, up = pair(64, 896, dtype=dtype)
        gate = gate if gated.is_silu else gate.clamp(min=-1)
        expected = gated.activation(gate) * up
        actual = gated.mul(gate.to(backend.device), up.to(backend.device), casting_mode="llama").cpu()
        assert (actual == expected).float().mean() > (0.999 if gated.is_silu else 0.998)
        torch.testing.assert_close(actual, expected, rtol=4 * HALF_ULP[dtype], atol=1e-7)


def test_error_is_not_above_eager(backend, gated):
    """The error against float64 is at most that of torch's composition; of gelu, or of one rounding."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        gate, up = pair(64, 896, dtype=dtype, device=backend.device)
        exact = gated.reference(gate.double().cpu(), up.double().cpu())
        eager = relative_error(gated.activation(gate) * up, exact)
        rounding = 0.0 if gated.is_silu else HALF_ULP[torch.float32]
        assert relative_error(gated.mul(gate, up), exact) <= max(eager * 1.05, rounding)


def test_strides(backend, gated):
    """Halves of one projection and other row strides, transposed, stepped and expanded inputs, and scalars."""
    base = make(4, 6, 40, device=backend.device)
    views = [base.chunk(2, -1), (base[..., :17], base[..., 17:34]), (base[::2], base[1::2])]
    views += [(base.transpose(0, 2), base.transpose(0, 2)), (base[..., ::2], base[..., 1::2])]
    views += [(base[:, :1].expand(4, 6, 40), base), (base[0, 0, 0], base[0, 0, 1])]
    for gate, up in views:
        result = gated.mul(gate, up)
        assert result.is_contiguous()
        expected = gated.activation(gate.double()).float() * up
        torch.testing.assert_close(result, expected, rtol=2e-6 if gated.is_silu else 4e-6, atol=1e-7)


def test_row_views_are_read_in_place(backend, gated):
    """The halves of one projection are not copied."""
    gate, up = make(4, 512, device=backend.device).chunk(2, -1)
    with torch.profiler.profile() as profile:
        gated.mul(gate, up)
    assert "aten::empty" in {event.key for event in profile.key_averages()}
    assert "aten::copy_" not in {event.key for event in profile.key_averages()}


def test_empty(backend, gated):
    """No elements: an empty result and empty gradients."""
    for shape in ((0, 8), (3, 0)):
        gate, up = (torch.empty(shape, device=backend.device, requires_grad=True) for _ in range(2))
        gated.mul(gate, up).sum().backward()
        assert gate.grad.shape == up.grad.shape == gate.shape


def test_nan_and_inf(backend, gated):
    """NaN and infinities give the same as torch in float64; in float32 its gelu(inf) is NaN on some CPUs."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 88.0, -88.0, -200.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    gate, up = (x.contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    actual = gated.mul(gate.to(backend.device), up.to(backend.device)).cpu()
    expected = gated.activation(gate.double()).float() * up
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7, equal_nan=True)


def test_inputs_are_not_written(backend, gated):
    """The op does not change its inputs."""
    gate, up = pair(6, 64, device=backend.device)
    before = gate.clone(), up.clone()
    gated.mul(gate, up)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@pytest.mark.full
def test_more_than_two_to_the_31_elements(gated):
    """Offsets are 64 bits wide: expanded inputs of 2^31 + 2^16 elements, checked at their end."""
    gate, up = (x.expand((1 << 15) + 1, 1 << 16) for x in pair(1 << 16, dtype=torch.bfloat16))
    assert torch.equal(gated.mul(gate, up)[-1], gated.mul(gate[:1], up[:1])[0])


def test_mixed_dtypes_promote_as_torch_does(backend, gated, casting_mode):
    """The result has the dtype of torch's product."""
    gate, up = make(5, 64, dtype=torch.bfloat16, device=backend.device), make(5, 64, device=backend.device, seed=1)
    for g, u in ((gate, up), (up, gate)):
        expected = gated.activation(g) * u
        result = gated.mul(g, u, casting_mode=casting_mode)
        assert result.dtype == expected.dtype
        assert relative_error(result, expected) < 1e-2


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 7, 64, 3000])
def test_gradients_match_float64(backend, gated, cols):
    """The backward op against float64."""
    for dtype in backend.dtypes:
        tensors = [make(9, cols, dtype=dtype, device=backend.device, seed=seed) for seed in range(3)]
        actual = gated.backward(*tensors)
        exact = gated.backward_reference(*(t.double().cpu() for t in tensors))
        for a, e in zip(actual, exact, strict=True):
            assert_close(a.flatten(), e.flatten())


def test_gradients_of_strided_operands(backend, gated):
    """The halves of one projection and an expanded gradient."""
    gate, up = make(4, 6, 40, device=backend.device).chunk(2, -1)
    grad = make(6, 20, device=backend.device, seed=1).expand(4, 6, 20)
    actual = gated.backward(grad, gate, up)
    for a, e in zip(actual, gated.backward_reference(grad, gate, up), strict=True):
        torch.testing.assert_close(a, e)


def test_gradcheck(gated):
    """Analytic gradients equal numeric ones in float64."""
    operands = tuple(x.requires_grad_() for x in pair(4, 6, dtype=torch.float64))
    assert torch.autograd.gradcheck(gated.mul, operands)


def test_backward_through_autograd(backend, gated):
    """loss.backward() reaches the kernels of the backend."""
    operands, grad = pair(9, 64), make(9, 64, seed=2)
    ours = [x.to(backend.device, copy=True).requires_grad_() for x in operands]
    gated.mul(*ours).backward(grad.to(backend.device))
    exact = [x.double().requires_grad_() for x in operands]
    (gated.activation(exact[0]) * exact[1]).backward(grad.double())
    for a, e in zip(ours, exact, strict=True):
        assert relative_error(a.grad, e.grad) < 1e-6


def silu_mul_exact(gate, up):
    return gate * torch.sigmoid(gate) * up  # not F.silu: torch has no forward mode for its gradient


def gelu_mul_exact(gate, up, approximate="none"):
    return F.gelu(gate, approximate=approximate) * up


DIFFERENTIATED = {
    "silu_mul": (silu_mul, silu_mul_exact, [(3, 6), (3, 6)]),
    "llama": (lambda g, u: silu_mul(g, u, casting_mode="llama"), silu_mul_exact, [(3, 6), (3, 6)]),
    "gelu_mul": (gelu_mul, gelu_mul_exact, [(3, 6), (3, 6)]),
    "gelu_mul by tanh": (
        partial(gelu_mul, approximate="tanh", casting_mode="llama"),
        partial(gelu_mul_exact, approximate="tanh"),
        [(3, 6), (3, 6)],
    ),
    "one operand": (lambda x: silu_mul(x, x), lambda x: silu_mul_exact(x, x), [(3, 6)]),
}


BAD_ARGUMENTS = [
    (lambda x: silu_mul(x, torch.ones_like(x)[:1]), "silu_mul: up must have gate's shape"),
    (
        lambda x: torch.ops.torch_fused.silu_mul_backward(x, x, torch.ones_like(x)[:1]),
        "silu_mul_backward: up must have grad's shape",
    ),
    (lambda x: gelu_mul(x, x, approximate="erf"), "gelu_mul: approximate must be 'none' or 'tanh', got 'erf'"),
]


# ---- GPU kernels ----------------------------------------------------------------------------------------------------


SCHEDULES = [("sequential", 0), ("reversed", 0), ("preemptive", 0), ("random", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_kernels_are_clean_in_every_schedule(gated, schedule, seed):
    """No check fires, and no bit depends on the order of threads and threadgroups."""

    def run():
        gate, up = pair(3, 3001)
        return gated.mul(gate, up), *gated.backward(up, gate, up)

    with emulate(checked=False):
        expected = run()
    with emulate(checked=True, schedule=schedule, seed=seed):
        assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(gated, dtype):
    """Every operand is read once, and every result written once."""
    gate, up = pair(3, 3000, dtype=dtype)
    with emulate() as run:
        gated.mul(gate, up)
        gated.backward(up, gate, up)
    for launch, operands in zip(run.launches, (3, 5), strict=True):
        moved = sum(buffer.read + buffer.written for buffer in launch.buffers[:-1])
        assert moved == operands * gate.nbytes


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    gate, up = (make(4, 24, device=backend.device, seed=s, requires_grad=True) for s in range(2))
    opcheck(torch.ops.torch_fused.silu_mul.default, (gate, up))
    opcheck(torch.ops.torch_fused.silu_mul.default, (gate[:, ::2], up[:, ::2]), {"casting_mode": "llama"})
    opcheck(torch.ops.torch_fused.silu_mul_backward.default, (gate.detach(), gate.detach(), up.detach()))
    by_tanh = {"approximate": "tanh"}
    opcheck(torch.ops.torch_fused.gelu_mul.default, (gate, up))
    opcheck(torch.ops.torch_fused.gelu_mul.default, (gate[:, ::2], up[:, ::2]), {**by_tanh, "casting_mode": "llama"})
    opcheck(torch.ops.torch_fused.gelu_mul_backward.default, (gate.detach(), gate.detach(), up.detach()), by_tanh)


def test_compile_fullgraph(backend, gated):
    """torch.compile traces forward and backward without a graph break and gives the same numbers."""
    plain = [make(6, 48, device=backend.device, seed=s, requires_grad=True) for s in range(2)]
    compiled = [x.detach().clone().requires_grad_() for x in plain]
    expected = gated.mul(*plain)
    result = torch.compile(gated.mul, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(result, expected)
    expected.square().sum().backward()
    result.square().sum().backward()
    for p, c in zip(plain, compiled, strict=True):
        torch.testing.assert_close(p.grad, c.grad)


def test_vmap(backend, gated):
    """torch.func.vmap over either operand or both."""
    gate, up = pair(3, 5, 16, device=backend.device)
    for in_dims in ((0, 0), (1, 1)):
        result = torch.func.vmap(gated.mul, in_dims, in_dims[0])(gate, up)
        torch.testing.assert_close(result, gated.mul(gate, up))
    torch.testing.assert_close(
        torch.func.vmap(gated.mul, (0, None))(gate, up[0]), gated.mul(gate, up[:1].expand(3, 5, 16))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: silu_mul(x, x[:2]), r"silu_mul: up must have gate's shape \[4, 8\], got \[2, 8\]"),
        (lambda x: silu_mul(x.int(), x.int()), r"silu_mul: gate must be float32.*got Int"),
        (lambda x: silu_mul(x, x, casting_mode="gemma"), "silu_mul: casting_mode must be 'torch' or 'llama'"),
        (
            lambda x: torch.ops.torch_fused.silu_mul(x, x.half()),
            r"silu_mul: up must have gate's dtype Float, got Half",
        ),
        (
            lambda x: torch.ops.torch_fused.silu_mul_backward(x, x[:2], x),
            r"silu_mul_backward: gate must have grad's shape \[4, 8\], got \[2, 8\]",
        ),
        (lambda x: gelu_mul(x, x[:2]), r"gelu_mul: up must have gate's shape \[4, 8\], got \[2, 8\]"),
        (lambda x: gelu_mul(x, x[:2].half()), r"gelu_mul: up must have the shape \[4, 8\], got \[2, 8\]"),
        (lambda x: gelu_mul(x, x, approximate="fast"), "gelu_mul: approximate must be 'none' or 'tanh', got 'fast'"),
        (lambda x: gelu_mul(x, x, casting_mode="gemma"), "gelu_mul: casting_mode must be 'torch' or 'llama'"),
        (
            lambda x: torch.ops.torch_fused.gelu_mul_backward(x, x, x[:2], approximate="tanh"),
            r"gelu_mul_backward: up must have grad's shape \[4, 8\], got \[2, 8\]",
        ),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything runs; the error names the op and the argument."""
    with pytest.raises(RuntimeError, match=message):
        call(make(4, 8, device=backend.device))


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (torch_fused.nn.SwiGLU, F.silu),
        (torch_fused.nn.GeGLU, F.gelu),
        (partial(torch_fused.nn.GeGLU, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    ],
    ids=["SwiGLU", "GeGLU", "GeGLU by tanh"],
)
def test_module_takes_a_hugging_face_mlp(backend, module, activation):
    """It has the parameters of Hugging Face's LlamaMLP and Gemma2MLP, and their values."""
    ours = module(16, 40, device=backend.device)
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == {
        "gate_proj.weight": (40, 16),
        "up_proj.weight": (40, 16),
        "down_proj.weight": (16, 40),
    }
    x = make(3, 5, 16, device=backend.device)
    expected = ours.down_proj(activation(ours.gate_proj(x)) * ours.up_proj(x))
    torch.testing.assert_close(ours(x), expected)
