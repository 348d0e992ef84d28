"""layer_norm: values, gradients and contracts, on every backend."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import torch_fused
from torch_fused.functional import layer_norm
from torch_fused.metal import emulate
from torch_fused.ops.layer_norm import layer_norm_backward_reference, layer_norm_reference
from torch_fused.selfcheck import longest_row
from torch_fused.testing import assert_close, assert_matches_reference, make, relative_error

# One column, under one pack, a pack, a pack and a tail, whole packs, odd, two and four packs per thread; then rows past
# a threadgroup's registers.
COLS = [1, 3, 8, 13, 64, 128, 896, 1000, 1537, 3001, 8192]
LONG_COLS = [16385, 33000]


def operands(rows, cols, dtype=torch.float32, device="cpu"):
    """x, weight and bias."""
    x, weight, bias = make(rows, cols, dtype=dtype), make(cols, dtype=dtype, seed=1), make(cols, dtype=dtype, seed=2)
    return x.to(device), weight.to(device), bias.to(device)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", COLS)
def test_matches_float64(backend, cols):
    """Every dtype and row length, with and without weight and bias, is right to one rounding of the result."""
    for dtype in backend.dtypes:
        x, weight, bias = operands(3, cols, dtype, backend.device)
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            assert_matches_reference(layer_norm, layer_norm_reference, x, (cols,), w, b, 1e-3)


@pytest.mark.parametrize("cols", LONG_COLS)
def test_long_rows(backend, cols):
    """Rows past the registers of a threadgroup take the looped path."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = operands(2, cols, dtype, backend.device)
        assert_matches_reference(layer_norm, layer_norm_reference, x, (cols,), weight, bias)


@pytest.mark.parametrize("cols", [40, 896, 5000, 20000])
def test_large_mean_and_small_variance(backend, cols):
    """The mean is exact to more than one float32: of 30000 +- 1, and of rows whose first values are far from
    the rest, every element is right; eager's float32 mean causes an error of a thousandth."""
    x = make(3, cols) + 30000
    x[1, 0] = -30000
    x[2, : cols // 8] = 0
    exact = layer_norm_reference(x.double(), (cols,))
    assert_close(layer_norm(x.to(backend.device), (cols,)), exact)
    constant = torch.full((2, cols), 12345.678, device=backend.device)
    assert layer_norm(constant, (cols,)).abs().max() < 1e-3


def test_error_is_not_above_eager(backend):
    """The error against float64 is at most that of torch's own composition and of F.layer_norm."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, weight, bias = operands(64, 896, dtype, backend.device)
        x = x * 3 + 1
        exact = layer_norm_reference(x.double().cpu(), (896,), weight.double().cpu(), bias.double().cpu())
        ours = relative_error(layer_norm(x, (896,), weight, bias), exact)
        for eager in (layer_norm_reference, F.layer_norm):
            assert ours <= relative_error(eager(x, (896,), weight, bias), exact) * 1.05


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_strides(backend):
    """Row strides, offsets that break 16-byte alignment, expanded and transposed inputs give the dense result."""
    base = make(6, 5, 80, device=backend.device)
    _, weight, bias = operands(1, 64, device=backend.device)
    views = {
        "row stride": base[:, :, :64],
        "misaligned": base[:, :, 3:67],
        "odd rows": base[::2, 1::2, 16:],
        "expanded rows": base[:1, :1, :64].expand(6, 5, 64),
        "expanded middle": base[:, :1, :64].expand(6, 5, 64),
        "transposed": base[:, :, :64].transpose(0, 1),
        "unit dims": base[:1, :, :64].unsqueeze(2),
        "one column stride": make(64, 7, device=backend.device).t(),
    }
    for name, view in views.items():
        assert torch.equal(layer_norm(view, (64,), weight, bias), layer_norm(view.contiguous(), (64,), weight, bias)), (
            name
        )
    x, parameters = base[..., :64], make(128, 2, seed=1, device=backend.device)[::2].unbind(1)
    expected = layer_norm(x, (64,), *(parameter.contiguous() for parameter in parameters))
    assert torch.equal(layer_norm(x, (64,), *parameters), expected)


def test_gradients_of_strided_operands(backend):
    """A misaligned x and an expanded gradient give the same results as dense ones."""
    x = make(5, 67, device=backend.device)[:, 3:]
    grad = make(64, seed=1, device=backend.device).expand(5, 64)
    rest = ((64,), make(64, seed=2).to(backend.device), 1e-5, True, True)
    actual = torch.ops.torch_fused.layer_norm_backward(grad, x, *rest)
    expected = torch.ops.torch_fused.layer_norm_backward(grad.contiguous(), x.contiguous(), *rest)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_normalized_shape_of_several_dimensions(backend):
    """The last dimensions together are the row."""
    x = make(3, 4, 5, 6, device=backend.device)
    for shape in ((6,), (5, 6), (4, 5, 6), (3, 4, 5, 6)):
        weight, bias = make(*shape, seed=1).to(backend.device), make(*shape, seed=2).to(backend.device)
        torch.testing.assert_close(
            layer_norm(x, shape, weight, bias), F.layer_norm(x, shape, weight, bias), rtol=4e-6, atol=4e-6
        )


def test_empty(backend):
    """No rows, no columns: an empty result, gradients of zero."""
    for shape, normalized in (((0, 8), (8,)), ((3, 0), (0,)), ((2, 0, 8), (8,))):
        x = torch.empty(shape, device=backend.device, requires_grad=True)
        weight, bias = (torch.ones(normalized, device=backend.device, requires_grad=True) for _ in range(2))
        result = layer_norm(x, normalized, weight, bias)
        assert result.shape == x.shape
        result.sum().backward()
        assert x.grad.shape == x.shape
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in (weight, bias))


@pytest.mark.parametrize("cols", [40, 9000])
def test_nan_and_inf(backend, cols):
    """A NaN or infinity makes its row NaN, as in torch, and stays in it."""
    x, weight, bias = operands(5, cols, device=backend.device)
    x[0, 3], x[1, 5], x[2, 7] = torch.nan, torch.inf, -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        actual = layer_norm(x.to(dtype), (cols,), weight.to(dtype), bias.to(dtype))
        expected = F.layer_norm(x.to(dtype), (cols,), weight.to(dtype), bias.to(dtype))
        assert actual[:3].isnan().all() and expected[:3].isnan().all()
        assert torch.isfinite(actual[3:]).all()


@pytest.mark.parametrize("cols", [1, 3, 40, 4096, 9000, 20000])
def test_huge_values(backend, cols):
    """Values and gradients are right if sums, squares or distances overflow; torch gives NaN, or the bias."""
    for dtype in backend.dtypes:
        largest = torch.finfo(dtype).max
        _, weight, bias = operands(1, cols, dtype, backend.device)
        x = make(6, cols, dtype=torch.float64)
        x *= torch.tensor([1e20, 0.2, 0.99, 0.3, 1.0, 1.0])[:, None]
        x[1:3] = x[1:3] / x[1:3].abs().amax(-1, keepdim=True) * largest * torch.tensor([[0.2], [0.99]])
        x[3] = largest * (1 - x[3].sigmoid() / 64)  # a mean near the largest number
        x[4], x[5] = largest, -largest
        x = x.clamp(-largest, largest).to(dtype)
        grad = make(6, cols, dtype=dtype, seed=5)
        actual = layer_norm(x.to(backend.device), (cols,), weight, bias)
        wide = [t.cpu().double() for t in (weight, bias)]
        small = x.double() * (1e-160 if dtype == torch.float64 else 1)  # as float64's squares overflow too
        exact = layer_norm_reference(small, (cols,), *wide, eps=1e-300)
        rounding = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
        assert actual.isfinite().all()
        for row in range(4):
            assert relative_error(actual[row], exact[row]) < rounding, (dtype, row)
        assert torch.equal(actual[4:].cpu(), bias.cpu().expand(2, cols))
        actual = torch.ops.torch_fused.layer_norm_backward(
            grad[:4].to(backend.device), x[:4].to(backend.device), (cols,), weight, 1e-5, True, True
        )
        exact = layer_norm_backward_reference(grad[:4].double(), small[:4], (cols,), wide[0], 1e-300, True, True)
        assert actual[0].isfinite().all() and actual[1].isfinite().all()
        assert relative_error(actual[1], exact[1]) < 3 * rounding
        alone = grad[4:].to(backend.device), (cols,), weight, 1e-5, False, False
        same = torch.ops.torch_fused.layer_norm_backward(alone[0], x[4:].to(backend.device), *alone[1:])
        zeros = torch.zeros_like(x[4:]).to(backend.device)
        torch.testing.assert_close(same[0], torch.ops.torch_fused.layer_norm_backward(alone[0], zeros, *alone[1:])[0])


def test_inputs_are_not_written(backend):
    """An op without a trailing underscore does not change its inputs."""
    tensors = operands(6, 64, device=backend.device)
    before = [t.clone() for t in tensors]
    layer_norm(tensors[0], (64,), *tensors[1:])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.full
def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: an expanded input of 2^31 + 2^16 elements, checked at its end."""
    cols = 1 << 16
    x = make(cols, dtype=torch.bfloat16).expand((1 << 15) + 1, cols)
    assert torch.equal(layer_norm(x, (cols,))[-1], layer_norm(x[:1], (cols,))[0])


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def test_mixed_dtypes_promote_as_torch_does(backend):
    """Parameters of another dtype: the input's dtype, computed in float32 and rounded once."""
    halves = (torch.float32, torch.float16, torch.bfloat16)
    for x_dtype in halves:
        for w_dtype, b_dtype in ((a, b) for a in halves for b in (*halves, None)):
            x, weight, bias = operands(5, 64, device=backend.device)
            x, weight, bias = x.to(x_dtype), weight.to(w_dtype), None if b_dtype is None else bias.to(b_dtype)
            result = layer_norm(x, (64,), weight, bias)
            assert result.dtype == x_dtype
            wide = [None if t is None else t.double().cpu() for t in (x, weight, bias)]
            assert_close(result, layer_norm_reference(wide[0], (64,), *wide[1:]))


def test_autocast(backend):
    """Autocast behaves as for F.layer_norm on that device, for parameters of either dtype."""
    x, weight, bias = operands(5, 64, torch.bfloat16, backend.device)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            result = layer_norm(x, (64,), weight.to(dtype), bias.to(dtype))
            expected = F.layer_norm(x, (64,), weight.to(dtype), bias.to(dtype))
        assert result.dtype == expected.dtype
        assert relative_error(result, expected) < 1e-3


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 7, 64, 200, 896, 3000, 9000])
def test_gradients_match_float64(backend, cols):
    """The backward op against float64: x, weight and bias, each set of parameters that needs a gradient."""
    for dtype in backend.dtypes:
        x, weight, _ = operands(9, cols, dtype)
        grad = make(9, cols, dtype=dtype, seed=3)
        tolerance = {torch.float64: 1e-13, torch.float32: 4e-6}.get(dtype, 5e-3)
        for w in (weight, None):
            for needs in (
                ((True, True), (True, False), (False, True), (False, False)) if cols < 9000 else ((True, True),)
            ):
                tensors = [None if t is None else t.to(backend.device) for t in (grad, x, w)]
                actual = torch.ops.torch_fused.layer_norm_backward(*tensors[:2], (cols,), tensors[2], 1e-5, *needs)
                wide = [None if t is None else t.double() for t in (grad, x, w)]
                exact = layer_norm_backward_reference(*wide[:2], (cols,), wide[2], 1e-5, *needs)
                assert actual[1].shape == (sum(needs), cols)
                # With one column, only rounding errors of the cancelled terms are left.
                scale = exact[0].norm() if cols > 1 else grad.double().norm() * 300
                assert (actual[0].double().cpu() - exact[0]).norm() <= tolerance * scale
                for a, e in zip(actual[1], exact[1], strict=True):
                    assert (a.double().cpu() - e).norm() <= tolerance * e.norm()


def test_more_rows_than_threadgroups(backend):
    """Rows that share a threadgroup's partial sums of parameter gradients, in registers and looped."""
    for rows, cols in ((600, 33), (260, 8200)):
        x, weight, _ = operands(rows, cols)
        grad = make(rows, cols, seed=3)
        tensors = [t.to(backend.device) for t in (grad, x)]
        actual = torch.ops.torch_fused.layer_norm_backward(
            *tensors, (cols,), weight.to(backend.device), 1e-5, True, True
        )
        exact = layer_norm_backward_reference(grad.double(), x.double(), (cols,), weight.double(), 1e-5, True, True)
        for a, e in zip(actual, exact, strict=True):
            assert relative_error(a, e) < 4e-6


def test_gradcheck():
    """Analytic gradients equal numeric ones in float64, for every differentiable argument."""
    x, weight, bias = (t.requires_grad_() for t in operands(4, 6, torch.float64))
    assert torch.autograd.gradcheck(lambda a, w, b: layer_norm(a, (6,), w, b, 1e-3), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda a, w: layer_norm(a, (6,), w, None, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: layer_norm(a, (6,), None, b, 1e-3), (x, bias))
    assert torch.autograd.gradcheck(lambda a: layer_norm(a, (6,), None, None, 1e-3), (x,))


def test_backward_through_autograd(backend):
    """loss.backward() reaches the kernels of the backend; only tensors that require a gradient get one."""
    tensors = operands(9, 64)
    grad = make(9, 64, seed=3)
    for needs in [
        (True, True, True),
        (True, True, False),
        (True, False, True),
        (False, True, False),
        (True, False, False),
    ]:
        ours = [t.to(backend.device, copy=True).requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        layer_norm(ours[0], (64,), *ours[1:]).backward(grad.to(backend.device))
        exact = [t.double().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        layer_norm_reference(exact[0], (64,), *exact[1:]).backward(grad.double())
        for mine, wide in zip(ours, exact, strict=True):
            if wide.grad is None:
                assert mine.grad is None
            else:
                assert relative_error(mine.grad, wide.grad) < 3e-6


def test_parameter_gradients_are_deterministic(backend):
    """The same inputs give the same bits, and on the CPU with any number of threads."""
    x, weight, _ = operands(500, 64, device=backend.device)
    args = (x, x, (64,), weight, 1e-5, True, True)
    first = torch.ops.torch_fused.layer_norm_backward(*args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = torch.ops.torch_fused.layer_norm_backward(*args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def layer_norm_exact(x, weight=1.0, bias=0.0, dims=(-1,)):
    """Not F.layer_norm, some of whose second derivatives are wrong in torch 2.13."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + 1e-3) * weight + bias


DIFFERENTIATED = {
    "layer_norm": (
        lambda x, w, b: layer_norm(x, (6,), w, b, 1e-3),
        layer_norm_exact,
        [(3, 6), (6,), (6,)],
    ),
    "no weight": (
        lambda x, b: layer_norm(x, (2, 3), None, b, 1e-3),
        lambda x, b: layer_norm_exact(x, 1.0, b, (-2, -1)),
        [(2, 2, 3), (2, 3)],
    ),
    "bare": (lambda x: layer_norm(x, (6,), eps=1e-3), layer_norm_exact, [(3, 6)]),
}


BAD_ARGUMENTS = [
    (lambda x: layer_norm(x, (7,)), "layer_norm: normalized_shape"),
    (lambda x: layer_norm(x, (8,), None, torch.ones_like(x)[0, :1]), "layer_norm: bias must have the shape"),
]


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    x, weight, bias = (t.requires_grad_() for t in operands(4, 24, device=backend.device))
    ops = torch.ops.torch_fused
    opcheck(ops.layer_norm.default, (x, (24,), weight, bias))
    opcheck(ops.layer_norm.default, (x, (24,), None, bias))
    opcheck(ops.layer_norm.default, (x[:, ::2], (12,)))
    opcheck(ops.layer_norm.default, (x.detach().bfloat16(), (24,), weight.detach().bfloat16()))
    for needs in ((True, True), (False, True), (False, False)):
        opcheck(ops.layer_norm_backward.default, (x.detach(), x.detach(), (24,), weight.detach(), 1e-5, *needs))


def test_compile_fullgraph(backend):
    """torch.compile traces forward and backward without a graph break and gives the same numbers."""

    def step(x, weight, bias):
        return layer_norm(layer_norm(x, (48,), weight, bias), (48,), weight.bfloat16(), None)

    tensors = operands(6, 48, device=backend.device)
    plain, compiled = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    expected = step(*plain)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(result, expected)
    expected.square().sum().backward()
    result.square().sum().backward()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_vmap(backend):
    """torch.func.vmap over any of the operands."""
    x = make(3, 5, 16, device=backend.device)
    weight, bias = make(3, 16, seed=1).to(backend.device), make(16, 3, seed=2).to(backend.device)
    pick = lambda t, dim, i: t if dim is None or t is None else t.select(dim, i)  # noqa: E731
    for in_dims, tensors in (
        ((0, None, None), (x, weight[0], bias[:, 0])),
        ((1, None, None), (x, weight[0], None)),
        ((0, 0, 1), (x, weight, bias)),
        ((None, 0, None), (x, weight, bias[:, 0])),
        ((0, None, 1), (x, weight[0], bias)),
        ((2, None, 1), (x.movedim(0, 2), None, bias)),
    ):

        def call(a, w, b):
            return layer_norm(a, (16,), w, b)

        result = torch.func.vmap(call, in_dims)(*tensors)
        rows = [call(*(pick(t, dim, i) for t, dim in zip(tensors, in_dims, strict=True))) for i in range(3)]
        if in_dims[0] == 1:
            rows = [call(x[:, i], weight[0], None) for i in range(5)]
        torch.testing.assert_close(result, torch.stack(rows))


def test_inference_mode_and_no_grad(backend):
    """Results are the same with autograd on, off, and in inference mode."""
    x, weight, bias = operands(4, 32, device=backend.device)
    with torch.inference_mode():
        inference = layer_norm(x, (32,), weight, bias).clone()
    with torch.no_grad():
        no_grad = layer_norm(x, (32,), weight.requires_grad_(), bias)
    assert not no_grad.requires_grad
    assert torch.equal(inference.cpu(), layer_norm(x, (32,), weight, bias).detach().cpu())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: layer_norm(x, (7,)), r"layer_norm: normalized_shape .* \[7\] for input of shape \[4, 8\]"),
        (lambda x, w: layer_norm(x, ()), r"layer_norm: normalized_shape"),
        (lambda x, w: layer_norm(x, (8,), w[:4]), r"layer_norm: weight must have the shape \[8\], got \[4\]"),
        (lambda x, w: layer_norm(x, (8,), w, w[:4]), r"layer_norm: bias must have the shape \[8\], got \[4\]"),
        (lambda x, w: layer_norm(x.int(), (8,)), r"layer_norm: input must be float32.*got Int"),
        (lambda x, w: layer_norm(x.int(), (8,), w), r"layer_norm: input must be float32.*got torch.int32"),
        (lambda x, w: layer_norm(x, (8,), w.int()), r"layer_norm: weight must be float32.*got torch.int32"),
        (lambda x, w: layer_norm(x, (8,), w.bool(), w), r"layer_norm: weight must be float32.*got torch.bool"),
        (lambda x, w: layer_norm(x, (8,), w, w.cfloat()), r"layer_norm: bias must be float32.*got torch.complex64"),
        (
            lambda x, w: torch.ops.torch_fused.layer_norm(x, (8,), None, w.half()),
            r"layer_norm: bias must have input's dtype Float, got Half",
        ),
        (
            lambda x, w: torch.ops.torch_fused.layer_norm_backward(x[:2], x, (8,), w, 1e-5, True, True),
            r"layer_norm_backward: grad must have x's shape \[4, 8\], got \[2, 8\]",
        ),
        (
            lambda x, w: torch.ops.torch_fused.layer_norm_backward(x.half(), x, (8,), w, 1e-5, True, True),
            r"layer_norm_backward: grad must have x's dtype Float, got Half",
        ),
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
    """Forward and backward of one shape."""
    x, weight, bias = operands(rows, cols, dtype)
    grads = torch.ops.torch_fused.layer_norm_backward(x.flip(0), x, (cols,), weight, 1e-5, True, True)
    return [layer_norm(x, (cols,), weight, bias), *grads]


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
    """Each row is read once and written once: at most 1.05 times that, counting weight and bias once."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = operands(4, cols, dtype)
        with emulate() as run:
            layer_norm(x, (cols,), weight, bias)
        (launch,) = run.launches
        row, *shared, output = launch.buffers[:4]
        assert [buffer.distinct_read for buffer in shared] == [weight.nbytes, bias.nbytes]
        least = 2 * x.nbytes + weight.nbytes + bias.nbytes
        assert least <= row.read + output.written + weight.nbytes + bias.nbytes <= 1.05 * least


def test_long_rows_and_gradients_move_few_bytes():
    """A long row is read twice, and its first packs once more; backward reads x and the gradient once."""
    x, weight, bias = operands(2, 32768)
    with emulate() as run:
        layer_norm(x, (32768,), weight, bias)
    (launch,) = run.launches
    assert launch.buffers[0].read + launch.buffers[3].written <= 1.05 * 3 * x.nbytes
    x, weight, _ = operands(4, 4096)
    with emulate() as run:
        torch.ops.torch_fused.layer_norm_backward(x.flip(0), x, (4096,), weight, 1e-5, True, True)
    backward, _ = run.launches
    grad, values, _, grad_x, partial = backward.buffers[:5]
    assert [grad.read, values.read, grad_x.written, partial.written] == [x.nbytes] * 3 + [2 * x.nbytes]


# ---- module ---------------------------------------------------------------------------------------------------------


def test_module_is_a_drop_in(backend):
    """nn.LayerNorm has torch's arguments, parameters and values, and exchanges state dicts both ways."""
    ours, theirs = torch_fused.nn.LayerNorm(32, eps=1e-4), torch.nn.LayerNorm(32, eps=1e-4)
    with torch.no_grad():
        theirs.weight.copy_(make(32))
        theirs.bias.copy_(make(32, seed=2))
    ours.load_state_dict(theirs.state_dict())
    torch.nn.LayerNorm(32).load_state_dict(ours.state_dict())
    x = make(6, 32, seed=1)
    torch.testing.assert_close(ours.to(backend.device)(x.to(backend.device)).cpu(), theirs(x), rtol=2e-6, atol=2e-6)
    assert copy.deepcopy(ours).eps == 1e-4
    assert torch_fused.nn.LayerNorm(8, bias=False, dtype=torch.bfloat16).bias is None
    bare = torch_fused.nn.LayerNorm((4, 8), elementwise_affine=False).to(backend.device)
    assert list(bare.parameters()) == []
    y = make(3, 4, 8, device=backend.device)
    torch.testing.assert_close(bare(y), F.layer_norm(y, (4, 8)), rtol=2e-6, atol=2e-6)
