"""rms_norm and add_rms_norm: values, gradients and contracts, on every backend."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import torch_fused
from torch_fused.functional import add_rms_norm, rms_norm
from torch_fused.metal import emulate
from torch_fused.ops.rms_norm import rms_norm_backward_reference, rms_norm_reference
from torch_fused.selfcheck import longest_row
from torch_fused.testing import assert_close, assert_matches_reference, make, relative_error

# One column, under one pack, a pack, a pack and a tail, Qwen's head and hidden sizes, odd, the last row in registers,
# and one that has to be read twice.
COLS = [1, 3, 8, 13, 64, 128, 896, 1000, 1537]
LONG_COLS = [16384, 33000]


@pytest.fixture(params=["torch", "llama"])
def casting_mode(request):
    return request.param


class HfRMSNorm(torch.nn.Module):
    """Hugging Face's eager LlamaRMSNorm, which Qwen2 and Qwen3 share."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", COLS)
def test_matches_float64(backend, cols, casting_mode):
    """Every dtype and row length is right to its roundings: one for "torch", two for "llama"."""
    for dtype in backend.dtypes:
        x = make(5, cols, dtype=dtype, device=backend.device)
        residual, weight = make(5, cols, dtype=dtype, seed=1), make(cols, dtype=dtype, seed=2)
        residual, weight = residual.to(backend.device), weight.to(backend.device)
        roundings = 1.0 if casting_mode == "torch" else 2.1
        for w in (weight, None):
            assert_matches_reference(
                rms_norm, rms_norm_reference, x, (cols,), w, 1e-5, casting_mode=casting_mode, roundings=roundings
            )
        total = x + residual
        normed, actual_total = add_rms_norm(x, residual, weight, 1e-5, casting_mode=casting_mode)
        assert torch.equal(actual_total, total)
        exact = rms_norm_reference(total.double().cpu(), (cols,), weight.double().cpu(), 1e-5)
        assert_close(normed, exact, roundings=roundings)


@pytest.mark.parametrize("cols", LONG_COLS)
def test_long_rows(backend, cols):
    """Rows past the registers of a threadgroup take the looped path."""
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = make(2, cols, dtype=dtype, device=backend.device), make(2, cols, dtype=dtype, seed=1)
        residual, weight = residual.to(backend.device), make(cols, dtype=dtype, seed=2).to(backend.device)
        normed, total = add_rms_norm(x, residual, weight, casting_mode="torch")
        assert torch.equal(total, x + residual)
        assert_close(normed, rms_norm_reference(total.double().cpu(), (cols,), weight.double().cpu(), 1e-6))


def test_error_is_not_above_eager(backend):
    """In "torch" mode the error against float64 is at most that of torch's own composition."""
    for dtype in backend.dtypes:
        x = make(64, 896, dtype=dtype, device=backend.device, scale=3.0)
        weight = make(896, dtype=dtype, seed=1).to(backend.device)
        exact = rms_norm_reference(x.double().cpu(), (896,), weight.double().cpu(), 1e-6)
        ours = relative_error(rms_norm(x, (896,), weight, 1e-6), exact)
        eager = relative_error(rms_norm_reference(x, (896,), weight, 1e-6), exact)
        assert ours <= eager * 1.05


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bit_equal_to_torch_and_hugging_face(cols, dtype):
    """On the CPU "torch" has F.rms_norm's bits and "llama" those of Hugging Face's eager module, sums included."""
    x, residual = make(33, cols, dtype=dtype), make(33, cols, dtype=dtype, seed=1)
    weight = make(cols, dtype=dtype, seed=2)
    module = HfRMSNorm(weight, 1e-6)
    assert torch.equal(rms_norm(x, (cols,), weight, 1e-6), F.rms_norm(x, (cols,), weight, 1e-6))
    assert torch.equal(rms_norm(x, (cols,), weight), F.rms_norm(x, (cols,), weight))
    assert torch.equal(rms_norm(x, (cols,)), F.rms_norm(x, (cols,)))
    assert torch.equal(rms_norm(x, (cols,), weight, 1e-6, casting_mode="llama"), module(x))
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, module(total))


def test_every_half_value_converts_as_torch_does():
    """The CPU's conversions of all 65,536 bit patterns of a half type are the same as torch's."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
        actual, expected = rms_norm(values, (1,)), F.rms_norm(values, (1,))
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
        total = add_rms_norm(values, values, torch.ones(1, dtype=dtype))[1]
        torch.testing.assert_close(total, values + values, rtol=0, atol=0, equal_nan=True)


def test_llama_rounds_before_the_weight(backend):
    """With the same scale, both modes round exactly as specified: an error of one unit would show."""
    for dtype in (torch.float16, torch.bfloat16):
        x = make(40, 256, dtype=dtype, device=backend.device)
        weight = make(256, dtype=dtype, seed=1).to(backend.device)
        rounded = rms_norm_reference(x, (256,), None, 1e-6).double().cpu() * weight.double().cpu()
        actual = rms_norm(x, (256,), weight, 1e-6, casting_mode="llama")
        # The scale's last float32 bit changes the rounding of about one value in 2^13.
        assert (actual.cpu() != rounded.to(dtype)).float().mean() < 1e-3
        assert (rms_norm(x, (256,), weight, 1e-6).cpu() != rounded.to(dtype)).float().mean() > 0.01


def test_weight_offset(backend):
    """Gemma's 1 + weight, in float32 for "torch" and in the dtype for "llama"."""
    for dtype in backend.dtypes:
        x, weight = make(7, 96, dtype=dtype, device=backend.device), make(96, dtype=dtype, seed=1, scale=0.1)
        weight = weight.to(backend.device)
        assert_matches_reference(rms_norm, rms_norm_reference, x, (96,), weight, 1e-6, weight_offset=1.0)
        llama = rms_norm(x, (96,), weight, 1e-6, casting_mode="llama", weight_offset=1.0)
        expected = rms_norm_reference(x, (96,), weight, 1e-6, casting_mode="llama", weight_offset=1.0)
        assert relative_error(llama, expected) <= 1e-3


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_strides(backend):
    """Row strides, offsets that break 16-byte alignment, expanded and transposed inputs give the dense result."""
    base = make(6, 5, 80, device=backend.device)
    weight = make(64, seed=1).to(backend.device)
    views = {
        "row stride": base[:, :, :64],
        "misaligned": base[:, :, 3:67],
        "odd rows": base[::2, 1::2, 16:],
        "expanded rows": base[:1, :1, :64].expand(6, 5, 64),
        "expanded middle": base[:, :1, :64].expand(6, 5, 64),
        "transposed": base[:, :, :64].transpose(0, 1),
        "columns not dense": base.transpose(1, 2)[:, :64, :].transpose(1, 2)[..., :64],
        "unit dims": base[:1, :, :64].unsqueeze(2),
        "one column stride": make(64, 7, device=backend.device).t(),
    }
    for name, view in views.items():
        expected = rms_norm(view.contiguous(), (64,), weight)
        assert torch.equal(rms_norm(view, (64,), weight), expected), name
        other = make(*view.shape, seed=3, device=backend.device)
        for a, b in ((view, other), (other, view)):
            normed, total = add_rms_norm(a, b, weight)
            assert torch.equal(total, a + b), name
            assert torch.equal(normed, add_rms_norm(a.contiguous(), b.contiguous(), weight)[0]), name
    strided_weight = make(128, seed=1, device=backend.device)[::2]
    assert torch.equal(
        rms_norm(base[..., :64], (64,), strided_weight), rms_norm(base[..., :64], (64,), strided_weight.contiguous())
    )


def test_normalized_shape_of_several_dimensions(backend):
    """The last dimensions together are the row."""
    x, weight = make(3, 4, 5, 6, device=backend.device), make(4, 5, 6, seed=1).to(backend.device)
    torch.testing.assert_close(
        rms_norm(x, (4, 5, 6), weight).cpu(), F.rms_norm(x.cpu(), (4, 5, 6), weight.cpu()), rtol=2e-6, atol=2e-6
    )
    one = make(9, device=backend.device)
    torch.testing.assert_close(rms_norm(one, (9,)).cpu(), F.rms_norm(one.cpu(), (9,)), rtol=2e-6, atol=2e-6)


def test_empty(backend):
    """No rows, no columns: an empty result, gradients of zero."""
    for shape, normalized in (((0, 8), (8,)), ((3, 0), (0,)), ((2, 0, 8), (8,))):
        x = torch.empty(shape, device=backend.device, requires_grad=True)
        weight = torch.ones(normalized, device=backend.device, requires_grad=True)
        result = rms_norm(x, normalized, weight)
        assert result.shape == x.shape
        result.sum().backward()
        assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))
        assert add_rms_norm(x, x, weight)[1].shape == x.shape


def test_nan_and_inf(backend):
    """A NaN or infinity stays in its row and has torch's result."""
    x = make(4, 40, device=backend.device)
    x[0, 3], x[1, 5], x[2, 7] = torch.nan, torch.inf, -torch.inf
    weight = make(40, seed=1).to(backend.device)
    for dtype in (torch.float32, torch.bfloat16):
        actual, expected = rms_norm(x.to(dtype), (40,), weight.to(dtype)), F.rms_norm(x, (40,), weight)
        assert torch.equal(actual.isnan().cpu(), expected.isnan().cpu())
        assert torch.isfinite(actual[3]).all()
        assert (actual[1:3].nan_to_num(nan=0.0) == 0).all()
    total = add_rms_norm(x, x, weight)[1]
    torch.testing.assert_close(total, x + x, rtol=0, atol=0, equal_nan=True)


def test_inputs_are_not_written(backend):
    """An op without a trailing underscore does not change its inputs."""
    tensors = [make(6, 64, device=backend.device), make(6, 64, device=backend.device, seed=1)]
    weight = make(64, seed=2).to(backend.device)
    before = [t.clone() for t in (*tensors, weight)]
    add_rms_norm(*tensors, weight)
    rms_norm(tensors[0], (64,), weight)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, weight), strict=True))


@pytest.mark.full
def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: an expanded input of 2^31 + 2^16 elements, checked at its end."""
    cols = 1 << 16
    x = make(cols, dtype=torch.bfloat16).expand((1 << 15) + 1, cols)
    result = rms_norm(x, (cols,))
    assert torch.equal(result[-1], F.rms_norm(x[:1], (cols,))[0])


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def test_mixed_dtypes_promote_as_torch_does(backend):
    """A weight of another dtype: F.rms_norm's dtype and value, or the HF module's promotion in "llama" mode."""
    for x_dtype in (torch.float32, torch.float16, torch.bfloat16):
        for w_dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, weight = make(5, 64, dtype=x_dtype, device=backend.device), make(64, dtype=w_dtype, seed=1)
            weight = weight.to(backend.device)
            result = rms_norm(x, (64,), weight, 1e-6)
            assert result.dtype == x_dtype
            assert_close(result, rms_norm_reference(x.double().cpu(), (64,), weight.double().cpu(), 1e-6))
            llama = rms_norm(x, (64,), weight, 1e-6, casting_mode="llama")
            expected = HfRMSNorm(weight, 1e-6)(x)
            assert llama.dtype == expected.dtype
            assert relative_error(llama, expected) < 2e-3


def test_autocast(backend):
    """Autocast behaves as for F.rms_norm on that device."""
    x, weight = make(5, 64, dtype=torch.bfloat16, device=backend.device), make(64, dtype=torch.bfloat16, seed=1)
    weight = weight.to(backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        result, expected = rms_norm(x, (64,), weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6)
        llama, module = rms_norm(x, (64,), weight, 1e-6, casting_mode="llama"), HfRMSNorm(weight, 1e-6)(x)
    assert result.dtype == expected.dtype
    assert llama.dtype == module.dtype
    assert relative_error(result, expected) < 1e-3 and relative_error(llama, module) < 1e-3


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 7, 64, 200, 896, 9000])
def test_gradients_match_float64(backend, cols):
    """Input and weight gradients, with and without a gradient of the sum, against float64."""
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = make(70, cols, dtype=dtype), make(70, cols, dtype=dtype, seed=1)
        grad_sum, weight = make(70, cols, dtype=dtype, seed=2), make(cols, dtype=dtype, seed=3)
        for extra in (None, grad_sum):
            args = (grad, extra, x, (cols,), weight, 1e-5, "torch", 0.5, True)
            moved = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in args]
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            actual = torch.ops.torch_fused.rms_norm_backward(*moved)
            exact = rms_norm_backward_reference(*wide)
            tolerance = 3e-6 if dtype == torch.float32 else 5e-3
            assert relative_error(actual[0], exact[0]) < tolerance
            assert relative_error(actual[1], exact[1]) < tolerance
        no_weight = torch.ops.torch_fused.rms_norm_backward(
            moved[0], None, moved[2], (cols,), None, 1e-5, "llama", 0.0, False
        )
        exact = rms_norm_backward_reference(wide[0], None, wide[2], (cols,), None, 1e-5, "llama", 0.0, False)
        assert relative_error(no_weight[0], exact[0]) < tolerance
        assert no_weight[1].numel() == 0


@pytest.mark.parametrize("cols", [1, 40, 9000])
def test_gradients_of_huge_values(backend, cols):
    """If products or squares overflow, results that are finite in torch are finite here."""
    weight = make(cols, seed=3).to(backend.device)
    for x_scale, grad_scale in ((1e37, 1.0), (1e37, 1e3), (1e15, 1e30), (1e18, 1e22)):
        x, grad = make(6, cols) * x_scale, make(6, cols, seed=1) * grad_scale
        args = ((cols,), weight, 1e-6, "torch", 0.0, True)
        actual = torch.ops.torch_fused.rms_norm_backward(grad.to(backend.device), None, x.to(backend.device), *args)
        expected = rms_norm_backward_reference(grad, None, x, args[0], weight.cpu(), *args[2:])
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.isfinite().cpu(), e.isfinite())
            assert e.isfinite().all() and float(a.abs().max()) <= 2 * float(e.abs().max()) + 1e-6 * grad_scale


@pytest.mark.parametrize("casting_mode", ["torch", "llama"])
def test_gradcheck(casting_mode):
    """Analytic gradients equal numeric ones in float64, for every differentiable argument."""
    x, residual = make(4, 6, dtype=torch.float64, requires_grad=True), make(4, 6, dtype=torch.float64, seed=1)
    weight = make(6, dtype=torch.float64, seed=2, requires_grad=True)
    residual.requires_grad_()
    options = {"casting_mode": casting_mode, "weight_offset": 0.5}
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, (6,), w, 1e-3, **options), (x, weight))
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, (6,), None, 1e-3, **options), (x,))
    assert torch.autograd.gradcheck(lambda a, r, w: add_rms_norm(a, r, w, 1e-3, **options), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda a, r, w: add_rms_norm(a, r, w, 1e-3)[0], (x, residual, weight))
    assert torch.autograd.gradcheck(lambda a, r, w: add_rms_norm(a, r, w, 1e-3)[1], (x, residual, weight))


def test_backward_through_autograd(backend):
    """loss.backward() reaches the kernels of the backend; frozen weights and a detached x get no gradient."""
    x, weight = make(9, 64, device=backend.device), make(64, seed=1).to(backend.device)
    grad = make(9, 64, seed=2, device=backend.device)
    for x_grad, w_grad in ((True, True), (True, False), (False, True)):
        a, w = x.clone().requires_grad_(x_grad), weight.clone().requires_grad_(w_grad)
        rms_norm(a, (64,), w, 1e-6).backward(grad)
        b, v = x.cpu().double().requires_grad_(x_grad), weight.cpu().double().requires_grad_(w_grad)
        rms_norm_reference(b, (64,), v, 1e-6).backward(grad.cpu().double())
        for mine, exact in ((a, b), (w, v)):
            if exact.grad is None:
                assert mine.grad is None
            else:
                assert relative_error(mine.grad, exact.grad) < 3e-6


def test_weight_gradient_is_deterministic(backend):
    """The same inputs give the same bits, and on the CPU with any number of threads."""
    x, weight = make(500, 64, device=backend.device), make(64, seed=1).to(backend.device)
    args = (x, None, x, (64,), weight, 1e-6, "torch", 0.0, True)
    first = torch.ops.torch_fused.rms_norm_backward(*args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = torch.ops.torch_fused.rms_norm_backward(*args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def rms_norm_exact(x, weight=1.0, offset=0.0):
    """Not F.rms_norm, which torch.func.linearize gets wrong in torch 2.13."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (weight + offset)


def llama(x, weight):
    return rms_norm(x, (6,), weight, 1e-3, casting_mode="llama", weight_offset=0.5)


DIFFERENTIATED = {
    "rms_norm": (lambda x, w: rms_norm(x, (6,), w, 1e-3), rms_norm_exact, [(3, 6), (6,)]),
    "llama": (llama, lambda x, w: rms_norm_exact(x, w, 0.5), [(3, 6), (6,)]),
    "no weight": (lambda x: rms_norm(x, (6,), None, 1e-3), rms_norm_exact, [(2, 2, 6)]),
    "add_rms_norm": (
        lambda x, r, w: add_rms_norm(x, r, w, 1e-3),
        lambda x, r, w: (rms_norm_exact(x + r, w), x + r),
        [(2, 6), (2, 6), (6,)],
    ),
    "add_rms_norm's sum": (lambda x, r: add_rms_norm(x, r, torch.ones_like(x[0]))[1], torch.add, [(2, 6), (2, 6)]),
}


BAD_ARGUMENTS = [
    (lambda x: rms_norm(x, (7,)), "rms_norm: normalized_shape"),
    (lambda x: rms_norm(x, (8,), torch.ones_like(x)[0, :4]), "rms_norm: weight must have the shape"),
    (
        lambda x: add_rms_norm(x, torch.ones_like(x)[:1], torch.ones_like(x)[0]),
        "add_rms_norm: residual must have input's shape",
    ),
]


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    x, residual = make(4, 24, device=backend.device, requires_grad=True), make(4, 24, seed=1, device=backend.device)
    weight = make(24, seed=2).to(backend.device).requires_grad_()
    ops = torch.ops.torch_fused
    opcheck(ops.rms_norm.default, (x, (24,), weight, 1e-6))
    opcheck(ops.rms_norm.default, (x[:, ::2], (12,)), {"casting_mode": "llama"})
    opcheck(ops.rms_norm.default, (x.detach().bfloat16(), (24,), weight.detach().bfloat16()))
    opcheck(ops.add_rms_norm.default, (x, residual, weight))
    opcheck(
        ops.rms_norm_backward.default, (residual, None, x.detach(), (24,), weight.detach(), 1e-6, "torch", 0.0, True)
    )
    opcheck(ops.rms_norm_backward.default, (residual, residual, x.detach(), (24,), None, None, "llama", 0.0, False))


def test_compile_fullgraph(backend):
    """torch.compile traces forward and backward without a graph break and gives the same numbers."""

    def step(x, residual, weight):
        normed, total = add_rms_norm(x, residual, weight)
        return rms_norm(normed, (48,), weight, casting_mode="llama") + total

    tensors = [make(6, 48, seed=s, device=backend.device) for s in range(2)] + [make(48, seed=2).to(backend.device)]
    plain = [t.clone().requires_grad_() for t in tensors]
    compiled = [t.clone().requires_grad_() for t in tensors]
    expected = step(*plain)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(result, expected)
    expected.sum().backward()
    result.sum().backward()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_vmap(backend):
    """torch.func.vmap over the input, the weight, or both."""
    x, weight = make(3, 5, 16, device=backend.device), make(3, 16, seed=1).to(backend.device)
    for mode in ("torch", "llama"):
        cases = [((0, None), weight[0]), ((0, 0), weight), ((None, 0), weight), ((1, None), weight[0])]
        for in_dims, w in cases:

            def call(a, b, mode=mode):
                return rms_norm(a, (16,), b, casting_mode=mode)

            result = torch.func.vmap(call, in_dims)(x, w)
            pick = lambda t, dim, i: t if dim is None else t.select(dim, i)  # noqa: E731
            count = x.shape[in_dims[0]] if in_dims[0] is not None else w.shape[0]
            rows = [call(pick(x, in_dims[0], i), pick(w, in_dims[1], i)) for i in range(count)]
            torch.testing.assert_close(result, torch.stack(rows))


def test_vmap_of_weights_rounds_as_the_op(backend, casting_mode):
    """A batched weight, with its offset, is rounded like a single weight; an empty batch works."""
    for dtype in (torch.float16, torch.bfloat16):
        x, weights = (make(3, 512, dtype=dtype, device=backend.device, seed=s) for s in range(2))

        def call(weight, x=x):
            return rms_norm(x, (512,), weight, casting_mode=casting_mode, weight_offset=1.0)

        result = torch.func.vmap(call)(weights)
        assert (result != torch.stack([call(weight) for weight in weights])).float().mean() < 1e-3
        assert torch.func.vmap(call)(weights[:0]).shape == (0, 3, 512)


def test_inference_mode_and_no_grad(backend):
    """Results are the same with autograd on, off, and in inference mode."""
    x, weight = make(4, 32, device=backend.device), make(32, seed=1).to(backend.device)
    with torch.inference_mode():
        inference = rms_norm(x, (32,), weight).clone()
    with torch.no_grad():
        no_grad = rms_norm(x, (32,), weight.requires_grad_())
    assert not no_grad.requires_grad
    assert torch.equal(inference.cpu(), rms_norm(x, (32,), weight).detach().cpu())


def backward(grad=lambda x: x, grad_sum=lambda x: x):
    """Calls the backward op with another gradient."""
    return lambda x, w: torch.ops.torch_fused.rms_norm_backward(
        grad(x), grad_sum(x), x, (8,), w, 1e-6, "torch", 0.0, True
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: rms_norm(x, (7,), None), r"rms_norm: normalized_shape .* \[7\] for input of shape \[4, 8\]"),
        (lambda x, w: rms_norm(x, (), None), r"rms_norm: normalized_shape"),
        (lambda x, w: rms_norm(x, (8,), w[:4]), r"rms_norm: weight must have the shape \[8\], got \[4\]"),
        (lambda x, w: rms_norm(x.int(), (8,)), r"rms_norm: input must be float32.*got Int"),
        (lambda x, w: rms_norm(x, (8,), w, casting_mode="gemma"), r"rms_norm: casting_mode .* got 'gemma'"),
        (
            lambda x, w: add_rms_norm(x, x[:2], w),
            r"add_rms_norm: residual must have input's shape \[4, 8\], got \[2, 8\]",
        ),
        (lambda x, w: add_rms_norm(x, x.half(), w), r"add_rms_norm: residual must have input's dtype Float, got Half"),
        (lambda x, w: add_rms_norm(x, x, w.half()), r"add_rms_norm: weight must have input's dtype Float, got Half"),
        (lambda x, w: add_rms_norm(x, x, w[:4]), r"add_rms_norm: normalized_shape"),
        (lambda x, w: add_rms_norm(x, x, w[0]), r"add_rms_norm: weight must have at least one dimension"),
        (lambda x, w: rms_norm(x, (8,), w.half(), casting_mode="lama"), r"rms_norm: casting_mode .* got 'lama'"),
        (lambda x, w: rms_norm(x, (8,), w.int()), r"rms_norm: weight must be float32.*got torch.int32"),
        (
            lambda x, w: rms_norm(x, (8,), w.bool(), casting_mode="llama"),
            r"rms_norm: weight must be float32.*torch.bool",
        ),
        (lambda x, w: rms_norm(x, (8,), w.cfloat()), r"rms_norm: weight must be float32.*got torch.complex64"),
        (lambda x, w: rms_norm(x.long(), (8,), w), r"rms_norm: input must be float32.*got torch.int64"),
        (
            lambda x, w: rms_norm(x, (8,), w.half()[:1], casting_mode="llama"),
            r"rms_norm: weight must have the shape \[8\], got \[1\]",
        ),
        (
            lambda x, w: torch.func.vmap(lambda a, b: rms_norm(a, (8,), b, casting_mode="lama"))(x, w.expand(4, 8)),
            r"rms_norm: casting_mode .* got 'lama'",
        ),
        (backward(grad=lambda x: x[:2]), r"rms_norm_backward: grad must have x's shape \[4, 8\], got \[2, 8\]"),
        (backward(grad=lambda x: x.half()), r"rms_norm_backward: grad must have x's dtype Float, got Half"),
        (backward(grad_sum=lambda x: x[:, :4]), r"rms_norm_backward: grad_sum must have x's shape .* got \[4, 4\]"),
        (backward(grad_sum=lambda x: x.bfloat16()), r"rms_norm_backward: grad_sum must have x's dtype Float, got BF"),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything runs; the error names the op and the argument."""
    x, weight = make(4, 8, device=backend.device), make(8, seed=1).to(backend.device)
    with pytest.raises(RuntimeError, match=message):
        call(x, weight)


# ---- the kernels under the emulator ----------------------------------------------------------------------------------

SCHEDULES = [("sequential", 0), ("reversed", 0), ("preemptive", 0), ("random", 0), ("random", 1), ("random", 2)]


def run_all(rows, cols, dtype):
    """Forward and backward for one shape, with and without a residual."""
    x, residual, weight = (make(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, cols), (rows, cols), (cols,)]))
    return [
        rms_norm(x, (cols,), weight, 1e-6),
        *add_rms_norm(x, residual, weight),
        *torch.ops.torch_fused.rms_norm_backward(x, residual, x, (cols,), weight, 1e-6, "torch", 0.0, True),
    ]


@cache
def unchecked(*shape):
    with emulate(checked=False):
        return run_all(*shape)


def check_schedule(schedule: str, seed: int, sizes, dtype: torch.dtype) -> None:
    """No check fires, and the bits do not depend on the order of the threads."""
    for rows, cols in sizes:
        with emulate(schedule=schedule, seed=seed):
            actual = run_all(rows, cols, dtype)
        assert all(torch.equal(a, b) for a, b in zip(actual, unchecked(rows, cols, dtype), strict=True))


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_kernels_are_clean_in_every_schedule(schedule, seed):
    """Tiny, odd and real rows."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_schedule(schedule, seed, ((1, 1), (3, 7), (2, 64), (2, 896), (1, 1001)), dtype)


@pytest.mark.parametrize(
    ("schedule", "seed"), [("random", 7), *(pytest.param(*each, marks=pytest.mark.full) for each in SCHEDULES)]
)
def test_kernels_are_clean_of_long_rows(schedule, seed):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_schedule(schedule, seed, ((1, 4096), (1, longest_row(dtype))), dtype)


@pytest.mark.parametrize("cols", [64, 896, 1000, 4096, 8192])
def test_forward_moves_the_least_bytes(cols):
    """Each row is read once and written once: at most 1.05 times that, counting the shared weight once."""
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight = make(4, cols, dtype=dtype), make(4, cols, dtype=dtype, seed=1), make(cols, dtype=dtype)
        for call, tensors in (
            (lambda x=x, w=weight: rms_norm(x, (cols,), w), 2),
            (lambda x=x, r=residual, w=weight: add_rms_norm(x, r, w), 4),
        ):
            with emulate() as run:
                call()
            (launch,) = run.launches
            shared = launch.buffers[2].distinct_read
            moved = sum(b.read + b.written for i, b in enumerate(launch.buffers[:5]) if i != 2) + shared
            least = tensors * x.nbytes + weight.nbytes
            assert shared == weight.nbytes
            assert least <= moved <= 1.05 * least


# ---- module ---------------------------------------------------------------------------------------------------------


def test_module_is_a_drop_in(backend):
    """nn.RMSNorm has torch's parameters and values, and exchanges state dicts both ways."""
    ours, theirs = torch_fused.nn.RMSNorm(32, eps=1e-5), torch.nn.RMSNorm(32, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(make(32))
    ours.load_state_dict(theirs.state_dict())
    torch.nn.RMSNorm(32).load_state_dict(ours.state_dict())
    x = make(6, 32, seed=1)
    torch.testing.assert_close(ours.to(backend.device)(x.to(backend.device)).cpu(), theirs(x), rtol=2e-6, atol=2e-6)
    assert copy.deepcopy(ours).casting_mode == "torch"
    bare = torch_fused.nn.RMSNorm((4, 8), elementwise_affine=False)
    assert list(bare.parameters()) == []
    assert bare(make(3, 4, 8)).shape == (3, 4, 8)
