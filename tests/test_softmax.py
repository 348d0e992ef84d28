"""softmax: values, gradients and contracts, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import torch_fused
from torch_fused.functional import softmax
from torch_fused.metal import emulate
from torch_fused.ops.softmax import softmax_backward_reference, softmax_reference
from torch_fused.testing import assert_close, make, relative_error

# One column, under a pack, a pack, a pack and a tail, whole packs, odd, two and four packs per thread.
COLS = [1, 3, 8, 13, 64, 1000, 1537, 6000, 8192]
# Past the registers of a threadgroup: one threadgroup per row, and several.
LONG = [(130, 16400), (2, 33001)]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", COLS)
def test_matches_float64(backend, cols):
    """Every dtype and row length is right to one rounding of the result."""
    for dtype in backend.dtypes:
        x = make(3, cols, dtype=dtype, device=backend.device, scale=4.0)
        assert_close(softmax(x), softmax_reference(x.double().cpu()))


@pytest.mark.parametrize(("rows", "cols"), LONG)
def test_long_rows(backend, rows, cols):
    """Rows read twice, by one threadgroup or by many, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = make(rows, cols, dtype=dtype, scale=4.0), make(rows, cols, dtype=dtype, seed=1)
        y = softmax(x.to(backend.device))
        assert_close(y, softmax_reference(x.double()))
        dx = torch.ops.torch_fused.softmax_backward(grad.to(backend.device), y)
        exact = softmax_backward_reference(grad.double(), y.double().cpu())
        assert relative_error(dx, exact) < (3e-6 if dtype == torch.float32 else 5e-3)


def test_a_vocabulary_of_logits(backend):
    """One row of 151,936 columns, with its first chunk completely masked."""
    x = make(1, 151936, scale=3.0)
    x[:, :50000] = -torch.inf
    assert_close(softmax(x.to(backend.device)), softmax_reference(x.double()))


def test_error_is_not_above_eager(backend):
    """The error against float64 is at most that of torch's own softmax."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = make(64, 896, dtype=dtype, device=backend.device, scale=3.0)
        exact = torch.softmax(x.double().cpu(), -1)
        assert relative_error(softmax(x), exact) <= relative_error(torch.softmax(x, -1), exact) * 1.05


@pytest.mark.parametrize("cols", [40, 9000, 20000])
def test_nan_and_inf(backend, cols):
    """NaN, infinities, masked values and a fully masked row give the same results as torch."""
    for rows in (7, 140):
        x = make(rows, cols)
        x[0], x[1, 3], x[2, 5], x[3, 7], x[4, : cols // 2] = -torch.inf, torch.nan, torch.inf, -torch.inf, -torch.inf
        x[5, 0] = 3e38
        actual, expected = softmax(x.to(backend.device)).cpu(), torch.softmax(x, -1)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_any_dimension_and_strides(backend):
    """Every dim of contiguous, transposed, sliced and expanded inputs, and a scalar."""
    base = make(4, 5, 6, device=backend.device)
    for x in (base, base.transpose(0, 2), base[..., 1:5], base[:, ::2], base[..., ::2], base[:, :1].expand(4, 7, 6)):
        for dim in range(-3, 3):
            torch.testing.assert_close(softmax(x, dim), torch.softmax(x, dim), rtol=2e-6, atol=1e-7)
    scalar = torch.tensor(3.0, device=backend.device)
    assert torch.equal(softmax(scalar), torch.softmax(scalar, -1))


def test_empty(backend):
    """No rows or no columns: an empty result and an empty gradient."""
    for shape in ((0, 8), (3, 0), (2, 0, 8)):
        x = torch.empty(shape, device=backend.device, requires_grad=True)
        softmax(x).sum().backward()
        assert x.grad.shape == x.shape


def test_input_is_not_written(backend):
    """The op leaves its input alone."""
    x = make(6, 64, device=backend.device)
    before = x.clone()
    softmax(x)
    assert torch.equal(x, before)


def test_exponentials_below_the_normal_range():
    """The CPU's exp is right where results are subnormal, and zero below them."""
    x = torch.cat([torch.zeros(1), torch.linspace(-110.0, -80.0, 999)])
    exact = torch.softmax(x.double(), -1)
    assert ((softmax(x).double() - exact).abs() <= exact * 1e-6 + 1.5e-45).all()


@pytest.mark.full
def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: an expanded input of 2^31 + 2^16 elements, checked at its end."""
    x = make(1 << 16, dtype=torch.bfloat16).expand((1 << 15) + 1, 1 << 16)
    assert torch.equal(softmax(x)[-1], softmax(x[:1])[0])


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def test_dtype_argument(backend):
    """The input is converted first, also from integers; the gradient has the input's dtype."""
    x = make(5, 64, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
    result = softmax(x, dtype=torch.float32)
    assert_close(result, torch.softmax(x.detach().double().cpu(), -1))
    assert result.dtype == torch.float32
    result.square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    whole = torch.arange(12, device=backend.device).view(3, 4)
    torch.testing.assert_close(softmax(whole, dtype=torch.float32), torch.softmax(whole, -1, dtype=torch.float32))


def test_autocast(backend):
    """Autocast behaves as for torch.softmax on that device, with and without a dtype."""
    x = make(5, 64, dtype=torch.bfloat16, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        for dtype in (None, torch.float16, torch.float32):
            result, expected = softmax(x, dtype=dtype), torch.softmax(x, -1, dtype=dtype)
            assert result.dtype == expected.dtype
            assert relative_error(result, expected) < 4e-3


def test_autocast_in_transforms(backend):
    """The dtypes are those of torch.softmax, inside a transform or, if a transform bypasses autocast, outside."""
    x = make(5, 64, dtype=torch.bfloat16, device=backend.device)

    def derivatives(op):
        leaf = x.clone().requires_grad_()
        return (
            *torch.func.jvp(lambda t: op(t, -1), (x,), (x,)),
            torch.func.grad(lambda t: op(t, -1).square().sum())(x),
            torch.func.vmap(lambda t: op(t, -1))(x),
            *torch.autograd.grad(op(leaf, -1).square().sum(), leaf, create_graph=True),
        )

    with torch.autocast(backend.device, dtype=torch.bfloat16):
        outside = torch.softmax(x, -1).dtype
        for result, expected in zip(derivatives(softmax), derivatives(torch.softmax), strict=True):
            assert result.dtype in (expected.dtype, outside)
            assert relative_error(result, expected) < 1e-2


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 7, 64, 3000, 8000])
def test_gradients_match_float64(backend, cols):
    """The backward op against float64, from the same output."""
    for dtype in backend.dtypes:
        grad, y = make(9, cols, dtype=dtype), softmax_reference(make(9, cols, dtype=dtype, seed=1))
        actual = torch.ops.torch_fused.softmax_backward(grad.to(backend.device), y.to(backend.device))
        exact = softmax_backward_reference(grad.double(), y.double()).to(torch.float64)
        scale = (grad.double() * y.double()).norm()
        tolerance = {torch.float64: 1e-14, torch.float32: 3e-6}.get(dtype, 5e-3)
        assert (actual.double().cpu() - exact).norm() < tolerance * scale


def test_gradcheck():
    """Analytic gradients equal numeric ones in float64, over any dim."""
    x = make(4, 6, dtype=torch.float64, requires_grad=True)
    for dim in (0, 1):
        assert torch.autograd.gradcheck(lambda a, dim=dim: softmax(a, dim), (x,))


def test_backward_through_autograd(backend):
    """loss.backward() reaches the kernels of the backend."""
    x, grad = make(9, 64), make(9, 64, seed=1)
    ours = x.to(backend.device, copy=True).requires_grad_()
    softmax(ours).backward(grad.to(backend.device))
    exact = x.double().requires_grad_()
    torch.softmax(exact, -1).backward(grad.double())
    assert relative_error(ours.grad, exact.grad) < 3e-6


DIFFERENTIATED = {
    "softmax": (softmax, lambda x: torch.softmax(x, -1), [(3, 6)]),
    "first dimension": (lambda x: softmax(x, 0), lambda x: torch.softmax(x, 0), [(4, 2, 3)]),
    "scalar": (lambda x: softmax(x) * x, lambda x: x, [()]),
}


BAD_ARGUMENTS = [
    (lambda x: torch.ops.torch_fused.softmax(x, dtype=torch.int32), "softmax: dtype must be float32"),
    (
        lambda x: torch.ops.torch_fused.softmax_backward(x, torch.ones_like(x)[:1]),
        "softmax_backward: grad must have output's shape",
    ),
]


def test_strides_are_those_of_torch(backend):
    """The result is dense over any dim, and a transposed input is not followed, as in torch.softmax."""
    x = make(3, 4, 5, device=backend.device)
    for view in (x, x.transpose(0, 1), x.transpose(1, 2), x[:, ::2]):
        for dim in range(3):
            assert softmax(view, dim).stride() == torch.softmax(view, dim).stride()


# ---- GPU kernels ----------------------------------------------------------------------------------------------------


SCHEDULES = [("sequential", 0), ("reversed", 0), ("random", 0), ("random", 1), ("random", 2), ("preemptive", 0)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_every_schedule_gives_the_same_bits(schedule, seed):
    """No result depends on the thread order: short, long and split rows, and the gradient."""

    def run():
        results = []
        for rows, cols in ((3, 130), (128, 16385), (2, 17000)):
            y = softmax(make(rows, cols, scale=3.0))
            results += [y, torch.ops.torch_fused.softmax_backward(y, y)]
        return results

    with emulate(checked=False):
        expected = run()
    with emulate(checked=schedule == "preemptive", schedule=schedule, seed=seed):
        actual = run()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_traffic():
    """A row that fits in registers is read once and written once; a longer one is read twice."""
    for rows, cols, reads in ((2, 8192, 1), (128, 8200, 2), (2, 20000, 2)):
        x = make(rows, cols)
        with emulate() as run:
            softmax(x)
        moved = sum(buffer.read + buffer.written for launch in run.launches for buffer in launch.buffers[:-1])
        assert moved <= 1.05 * (reads + 1) * x.nbytes
    x = make(2, 8192)
    with emulate() as run:
        torch.ops.torch_fused.softmax_backward(x, x.flip(0))
    (launch,) = run.launches
    assert sum(buffer.read + buffer.written for buffer in launch.buffers[:-1]) == 3 * x.nbytes


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    x = make(4, 24, device=backend.device, requires_grad=True)
    ops = torch.ops.torch_fused
    opcheck(ops.softmax.default, (x,))
    opcheck(ops.softmax.default, (x[:, ::2],))
    opcheck(ops.softmax.default, (x.detach().bfloat16(),), {"dtype": torch.float32})
    opcheck(ops.softmax_backward.default, (x.detach(), x.detach()))


def test_compile_fullgraph(backend):
    """torch.compile traces forward and backward without a graph break and gives the same numbers."""
    plain = make(6, 48, device=backend.device, requires_grad=True)
    compiled = plain.detach().clone().requires_grad_()
    expected = softmax(plain, 0)
    result = torch.compile(lambda x: softmax(x, 0), fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(result, expected)
    expected.square().sum().backward()
    result.square().sum().backward()
    torch.testing.assert_close(plain.grad, compiled.grad)


def test_vmap(backend):
    """torch.func.vmap over any dimension, scalars included."""
    x = make(3, 5, 16, device=backend.device)
    for in_dim in (0, 1, 2):
        result = torch.func.vmap(softmax, in_dim)(x)
        torch.testing.assert_close(result, torch.stack([softmax(part) for part in x.unbind(in_dim)]))
    assert torch.equal(torch.func.vmap(softmax)(x[0, 0]), torch.ones(16, device=backend.device))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: softmax(x, 2), r"softmax: dim must be from -2 to 1 for input of 2 dimensions, got 2"),
        (lambda x: softmax(x.int()), r"softmax: input must be float32.*got Int"),
        (lambda x: softmax(x, dtype=torch.int32), r"softmax: dtype must be float32.*got Int"),
        (lambda x: softmax(x.requires_grad_(), dtype=torch.complex64), r"softmax: dtype must be .*got ComplexFloat"),
        (lambda x: softmax(x, dtype=999), r"softmax: dtype must be float32.*got UNKNOWN_SCALAR"),
        (lambda x: softmax(x, dtype=-1), r"softmax: dtype must be float32.*got UNKNOWN_SCALAR"),
        (lambda x: softmax(x.requires_grad_(), dtype=127), r"softmax: dtype must be float32.*got UNKNOWN_SCALAR"),
        (
            lambda x: torch.ops.torch_fused.softmax_backward(x[:2], x),
            r"softmax_backward: grad must have output's shape \[4, 8\], got \[2, 8\]",
        ),
        (
            lambda x: torch.ops.torch_fused.softmax_backward(x.half(), x),
            r"softmax_backward: grad must have output's dtype Float, got Half",
        ),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything runs; the error names the op and the argument."""
    with pytest.raises((RuntimeError, IndexError), match=message):
        call(make(4, 8, device=backend.device))


def test_module_is_a_drop_in(backend):
    """nn.Softmax has torch's argument and values."""
    x = make(3, 4, 5, device=backend.device)
    for dim in (0, -1):
        torch.testing.assert_close(torch_fused.nn.Softmax(dim)(x), F.softmax(x, dim), rtol=2e-6, atol=1e-7)
