"""apply_rotary_pos_emb: values, gradients and contracts, on every backend."""

import pytest
import torch
from torch.library import opcheck
from transformers.models.llama import modeling_llama

from torch_fused.functional import apply_rotary_pos_emb
from torch_fused.metal import emulate
from torch_fused.ops.rope import apply_rotary_pos_emb_backward_reference, apply_rotary_pos_emb_reference
from torch_fused.testing import assert_close, assert_matches_reference, make, relative_error

# (head_dim, rotary_dim): tiny, odd halves, Qwen's, a part of a head, none of it, no whole pack in a half, huge.
DIMS = [(2, 2), (6, 6), (64, 64), (128, 128), (80, 32), (13, 6), (8, 0), (600, 514)]


@pytest.fixture(params=["torch", "llama"])
def casting_mode(request):
    return request.param


def operands(tokens=5, head_dim=64, rotary_dim=None, *, batch=2, heads=(4, 2), dtype=torch.float32, device="cpu"):
    """q, k, cos, sin; q and k as a model makes them, transposed views of projections."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    q, k = (
        make(batch, tokens, n, head_dim, dtype=dtype, device=device, seed=i).transpose(1, 2)
        for i, n in enumerate(heads)
    )
    cos, sin = (make(batch, tokens, rotary_dim, dtype=dtype, device=device, seed=i) for i in (2, 3))
    return q, k, cos, sin


def wide(tensors):
    return [t.detach().double().cpu() for t in tensors]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "rotary_dim"), DIMS)
def test_matches_float64(backend, head_dim, rotary_dim, casting_mode):
    """Every dtype and head size, rotated in part or whole, is right to its roundings."""
    for dtype in backend.dtypes:
        tensors = operands(5, head_dim, rotary_dim, dtype=dtype, device=backend.device)
        if casting_mode == "torch":
            assert_matches_reference(apply_rotary_pos_emb, apply_rotary_pos_emb_reference, *tensors)
        else:
            expected = apply_rotary_pos_emb_reference(*tensors, casting_mode="llama")
            for a, e in zip(apply_rotary_pos_emb(*tensors, casting_mode="llama"), expected, strict=True):
                assert torch.equal(a, e)


def test_bit_equal_to_hugging_face(backend):
    """In "llama" mode the results, and their strides, are those of transformers' function, real tables included."""
    positions = torch.arange(7, device=backend.device)[:, None] * 10000.0 ** -torch.arange(
        0, 1, 1 / 32, device=backend.device
    )
    angles = torch.cat([positions, positions], -1)[None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k, _, _ = operands(7, dtype=dtype, device=backend.device)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        for a, e in zip(apply_rotary_pos_emb(q, k, cos, sin, casting_mode="llama"), expected, strict=True):
            assert torch.equal(a, e)
            assert a.stride() == e.stride()


def test_error_is_not_above_eager(backend):
    """The error against float64 is at most that of transformers' function."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = operands(16, dtype=dtype, device=backend.device)
        exact = apply_rotary_pos_emb_reference(*wide(tensors))
        eager = modeling_llama.apply_rotary_pos_emb(*tensors)
        for a, e, x in zip(apply_rotary_pos_emb(*tensors), eager, exact, strict=True):
            assert relative_error(a, x) <= relative_error(e, x) * 1.05


def test_strides_and_broadcast_tables(backend):
    """Heads before or after tokens, parts of one projection, steps, and tables shared by batch or token."""
    q, k, cos, sin = operands(device=backend.device)
    joined = make(2, 5, 6, 64, device=backend.device, seed=4)
    q_part, k_part = joined[:, :, :4].transpose(1, 2), joined[:, :, 4:].transpose(1, 2)
    stepped = make(2, 4, 5, 128, device=backend.device)[..., ::2]
    calls = [(q.contiguous(), k, cos, sin), (q_part, k_part, cos, sin), (stepped, k, cos, sin)]
    calls += [(q, k, cos[:1], sin), (q, k, cos[:, :1], sin[:1, :1]), (q[:, :1].expand(2, 4, 5, 64), k, cos, sin)]
    calls += [(q, k, *make(2, 2, 5, 64, device=backend.device).unbind(1))]
    calls += [(q[:, :0], k, cos, sin), (q[..., 1:51], k[..., 1:51], cos[..., 3:53], sin[..., 3:53])]
    for call in calls:
        for a, e in zip(apply_rotary_pos_emb(*call), apply_rotary_pos_emb_reference(*call), strict=True):
            torch.testing.assert_close(a, e)
            assert a.stride() == e.stride()
    by_token = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for a, e in zip(by_token, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(a.transpose(1, 2), e)


def test_last_dimension_without_a_unit_stride(backend):
    """The result is dense in its last dimension for any argument; so are the gradients."""
    q, k = make(2, 3, 6, 5, device=backend.device).transpose(2, 3), make(6, 2, 3, 5, device=backend.device)
    k = k.permute(1, 2, 3, 0)
    cos, sin = make(2, 5, 4, device=backend.device), make(2, 4, 5, seed=1, device=backend.device).transpose(1, 2)
    for actual, expected in (
        (apply_rotary_pos_emb(q, k, cos, sin), apply_rotary_pos_emb_reference(q, k, cos, sin)),
        (
            torch.ops.torch_fused.apply_rotary_pos_emb_backward(q, k, cos, sin, 1),
            apply_rotary_pos_emb_backward_reference(q, k, cos, sin, 1),
        ),
    ):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
            assert a.stride(3) == 1


def test_transposed_views_are_read_in_place(backend):
    """The views that a model passes are not copied."""
    tensors = operands(device=backend.device)
    with torch.profiler.profile() as profile:
        apply_rotary_pos_emb(*tensors)
    ops = {event.key for event in profile.key_averages()}
    assert "aten::empty_like" in ops and "aten::copy_" not in ops


def test_empty(backend):
    """No batch, tokens, heads or dimensions: empty results."""
    for shape in ({"batch": 0}, {"tokens": 0}, {"heads": (0, 0)}, {"head_dim": 0}):
        tensors = operands(**shape, device=backend.device)
        for a, x in zip(apply_rotary_pos_emb(*tensors), tensors, strict=False):
            assert a.shape == x.shape


def test_nan_and_inf(backend):
    """NaN and infinities spread as in eager mode, and only within their pair."""
    q, k, cos, sin = operands()
    q[0, 0, 0, 3], q[0, 1, 2, 5], k[1, 0, 1, 40] = torch.nan, torch.inf, -torch.inf
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    actual = apply_rotary_pos_emb(*(x.to(backend.device) for x in (q, k, cos, sin)))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, equal_nan=True)


def test_inputs_are_not_written(backend):
    """The op does not change its inputs."""
    tensors = operands(device=backend.device)
    before = [x.clone() for x in tensors]
    apply_rotary_pos_emb(*tensors)
    assert all(torch.equal(x, b) for x, b in zip(tensors, before, strict=True))


@pytest.mark.full
def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: the last token of 2^31 + 2^16 elements."""
    tokens = (1 << 15) + 1
    x = make(1, 1, 1, 1 << 16, dtype=torch.bfloat16)
    cos, sin = (make(1, 1, 1 << 16, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    q, _ = apply_rotary_pos_emb(x.expand(1, 1, tokens, 1 << 16), x.expand(1, 1, tokens, 1 << 16)[:, :0], cos, sin)
    assert torch.equal(q[:, :, -1:], apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_mixed_dtypes_promote_as_torch_does(backend, casting_mode):
    """Tables of another dtype give the same dtypes as transformers' function."""
    q, k, cos, sin = operands(dtype=torch.bfloat16, device=backend.device)
    for call in ((q, k, cos.float(), sin.float()), (q.float(), k, cos, sin)):
        expected = modeling_llama.apply_rotary_pos_emb(*call)
        for a, e in zip(apply_rotary_pos_emb(*call, casting_mode=casting_mode), expected, strict=True):
            assert a.dtype == e.dtype
            assert relative_error(a, e) < 1e-2


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "rotary_dim"), DIMS)
def test_gradients_match_float64(backend, head_dim, rotary_dim):
    """The backward op against float64, for tables whose halves differ."""
    for dtype in backend.dtypes:
        tensors = operands(3, head_dim, rotary_dim, dtype=dtype, device=backend.device)
        actual = torch.ops.torch_fused.apply_rotary_pos_emb_backward(*tensors, 1)
        exact = apply_rotary_pos_emb_backward_reference(*wide(tensors), 1)
        for a, e in zip(actual, exact, strict=True):
            assert_close(a, e)


def test_gradcheck():
    """Analytic gradients equal numeric ones in float64."""
    q, k, cos, sin = operands(2, 8, 6, dtype=torch.float64)
    q, k = (x.contiguous().requires_grad_() for x in (q, k))
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), (q, k))


def test_backward_through_autograd(backend):
    """loss.backward() reaches the kernels of the backend, from either result."""
    q, k, cos, sin = operands(device=backend.device)
    for used in (0, 1):
        ours, theirs = ([x.detach().clone().requires_grad_() for x in (q, k)] for _ in range(2))
        apply_rotary_pos_emb(*ours, cos, sin)[used].square().sum().backward()
        modeling_llama.apply_rotary_pos_emb(*theirs, cos, sin)[used].square().sum().backward()
        torch.testing.assert_close(ours[used].grad, theirs[used].grad)


def rotated(x, cos, sin, unsqueeze_dim=1):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(unsqueeze_dim) + torch.cat([-b, a], -1) * sin.unsqueeze(unsqueeze_dim)


def rotated_in_part(q, k, cos, sin):
    return tuple(torch.cat([rotated(x[..., :4], cos, sin, 2), x[..., 4:]], -1) for x in (q, k))


TABLES = make(2, 1, 3, 4, seed=9)
DIFFERENTIATED = {
    "apply_rotary_pos_emb": (
        apply_rotary_pos_emb,
        lambda q, k, cos, sin: (rotated(q, cos, sin), rotated(k, cos, sin)),
        [(2, 3, 2, 4), (2, 1, 2, 4), (2, 2, 4), (2, 2, 4)],
    ),
    "part of a head, shared tables": (
        lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, sin, 2, casting_mode="llama"),
        rotated_in_part,
        [(1, 3, 1, 5), (1, 3, 2, 5), (1, 3, 4), (1, 1, 4)],
    ),
    "constant tables": (
        lambda q, k: apply_rotary_pos_emb(q, k, *TABLES.to(q)),
        lambda q, k: tuple(rotated(x, *TABLES.to(q)) for x in (q, k)),
        [(2, 1, 3, 4), (2, 2, 3, 4)],
    ),
}


BAD_ARGUMENTS = [
    (
        lambda q: op(q, torch.ones_like(q)[:, :, 1:], q[:, 0], q[:, 0]),
        "apply_rotary_pos_emb: k must have q's shape",
    ),
    (lambda q: op(q, q, q[:, 0, :4], q[:, 0]), "apply_rotary_pos_emb: cos must be"),
]


# ---- GPU kernels ----------------------------------------------------------------------------------------------------


SCHEDULES = [("sequential", 0), ("reversed", 0), ("preemptive", 0), ("random", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_kernels_are_clean_in_every_schedule(schedule, seed):
    """No check fires, and no bit depends on the order of threads and threadgroups."""

    def run():
        results = []
        for head_dim, rotary_dim in DIMS:
            tensors = operands(3, head_dim, rotary_dim)
            results += apply_rotary_pos_emb(*tensors)
            results += torch.ops.torch_fused.apply_rotary_pos_emb_backward(*tensors, 1)
        return results

    with emulate(checked=False):
        expected = run()
    with emulate(checked=True, schedule=schedule, seed=seed):
        assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype):
    """One launch reads and writes q and k once; the tables, shared by heads, count once."""
    q, k, cos, sin = operands(7, 128, heads=(14, 2), dtype=dtype)
    with emulate() as run:
        apply_rotary_pos_emb(q, k, cos, sin)
    (launch,) = run.launches
    buffers = launch.buffers
    tables = buffers[2].distinct_read + buffers[3].distinct_read
    moved = sum(buffer.read + buffer.written for i, buffer in enumerate(buffers[:-1]) if i not in (2, 3))
    assert (moved, tables) == (2 * (q.nbytes + k.nbytes), cos.nbytes + sin.nbytes)


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    q, k, cos, sin = operands(device=backend.device)
    ops = torch.ops.torch_fused
    opcheck(ops.apply_rotary_pos_emb.default, (q.requires_grad_(), k.requires_grad_(), cos, sin))
    opcheck(ops.apply_rotary_pos_emb.default, (q, k, cos, sin), {"casting_mode": "llama"})
    opcheck(ops.apply_rotary_pos_emb_backward.default, (q.detach(), k.detach(), cos, sin, 1))


def test_compile_fullgraph(backend):
    """torch.compile traces forward and backward without a graph break and gives the same numbers."""
    q, k, cos, sin = operands(device=backend.device)
    plain, compiled = ([x.detach().clone().requires_grad_() for x in (q, k)] for _ in range(2))
    expected = apply_rotary_pos_emb(*plain, cos, sin)
    results = torch.compile(apply_rotary_pos_emb, fullgraph=True, backend="aot_eager")(*compiled, cos, sin)
    for a, e in zip(results, expected, strict=True):
        assert torch.equal(a, e)
    sum(x.square().sum() for x in expected).backward()
    sum(x.square().sum() for x in results).backward()
    for p, c in zip(plain, compiled, strict=True):
        torch.testing.assert_close(p.grad, c.grad)


def op(q, k, cos, sin, **kwargs):
    return torch.ops.torch_fused.apply_rotary_pos_emb(q, k, cos, sin, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, c, s: op(q[0], k, c, s), r"q must have four dimensions, got shape \[4, 5, 8\]"),
        (
            lambda q, k, c, s: op(q, k[:, :, 1:], c, s),
            r"k must have q's shape except for the heads, .* got \[2, 2, 4, 8\]",
        ),
        (
            lambda q, k, c, s: op(q, k, c[:, 1:], s),
            r"cos must be \(2 or 1, 5 or 1, rotary_dim\), got shape \[2, 4, 8\]",
        ),
        (lambda q, k, c, s: op(q, k, c, s[0]), r"sin must be \(2 or 1, 5 or 1, rotary_dim\), got shape \[5, 8\]"),
        (lambda q, k, c, s: op(q[..., :6], k[..., :6], c, s), "must be even and at most head_dim 6, got 8"),
        (lambda q, k, c, s: op(q, k, c[..., :3], s), "must be even and at most head_dim 8, got 3"),
        (lambda q, k, c, s: op(q, k, c, s[..., :6]), "sin must have cos's rotary_dim 8, got 6"),
        (lambda q, k, c, s: op(q, k, c, s, unsqueeze_dim=3), "unsqueeze_dim must be 1 .* or 2 .* got 3"),
        (lambda q, k, c, s: op(q.half(), k, c, s), "q must have cos's dtype Float, got Half"),
        (lambda q, k, c, s: op(q.int(), k.int(), c.int(), s.int()), "cos must be float32.*got Int"),
        (lambda q, k, c, s: apply_rotary_pos_emb(q.int(), k, c, s), "q must be float32.*got torch.int32"),
        (lambda q, k, c, s: apply_rotary_pos_emb(q, k.cfloat(), c, s), "k must be float32.*got torch.complex64"),
        (lambda q, k, c, s: op(q, k, c, s, casting_mode="x"), "casting_mode must be 'torch' or 'llama', got 'x'"),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything runs; the error names the op and the argument."""
    with pytest.raises(RuntimeError, match=f"apply_rotary_pos_emb: .*{message}"):
        call(*operands(head_dim=8, device=backend.device))
