"""linear_cross_entropy: losses, gradients, memory and contracts, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from torch_fused.functional import linear_cross_entropy
from torch_fused.metal import emulate
from torch_fused.testing import make, relative_error

# (rows, features, classes): one of each; one chunk; several, the last one short; half types in chunks, their sums in
# float32.
SHAPES = [(1, 1, 1), (7, 5, 33), (300, 8, 70), (700, 4, 40)]
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 1e-2},
    {"ignore_index": 0, "z_loss": 1e-2, "reduction": "none"},
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def operands(rows, features, classes, dtype=torch.float32, *, ignored=0.3, ignore_index=-100):
    """Hidden states, weight, bias, and targets of which some are ignored."""
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))
    target[torch.rand(rows, generator=torch.Generator().manual_seed(4)) < ignored] = ignore_index
    target[0] = classes - 1
    hidden, weight = make(rows, features, dtype=dtype), make(classes, features, dtype=dtype, seed=1)
    return hidden, weight, make(classes, dtype=dtype, seed=2), target


def in_torch(hidden, weight, bias, target, *, z_loss=0.0, reduction="mean", **options):
    """By torch's own linear and cross entropy."""
    logits = F.linear(hidden, weight, bias)
    kept = target != options.get("ignore_index", -100)
    losses = F.cross_entropy(logits, target, reduction="none", **options)
    losses = losses + kept.to(logits.dtype) * z_loss * logits.logsumexp(-1).square()
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / kept.sum()}[reduction]


def gradients(op, tensors, grad=None):
    """The loss and the gradients of hidden, weight and bias."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    loss = op(*inputs)
    found = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad is None else grad.to(loss))
    return [loss.detach(), *found]


def torchs(target, **options):
    return lambda h, w, b: in_torch(h, w, b, target.to(h.device), **options)


def ours(target, **options):
    return lambda h, w, b: linear_cross_entropy(h, w, target.to(h.device), bias=b, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, options):
    """The loss and every gradient, of one chunk and of several, in every dtype."""
    for dtype in backend.dtypes:
        *tensors, target = operands(*shape, dtype, ignore_index=options.get("ignore_index", -100))
        exact = gradients(torchs(target, **options), [t.double() for t in tensors])
        actual = gradients(ours(target, **options), [t.to(backend.device) for t in tensors])
        assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
        for name, a, e in zip(("loss", "hidden", "weight", "bias"), actual, exact, strict=True):
            assert relative_error(a, e) < TOLERANCE[dtype] or (a - e.to(a)).abs().max() < 1e-7, f"{name}, {dtype}"
        for a, tensor in zip(actual[1:], tensors, strict=True):
            assert a.dtype == dtype and a.shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_errors_of_half_types_are_not_above_torchs(dtype, scale):
    """In chunks with float32 sums, and with a loss scaled by a GradScaler: against float64."""
    *tensors, target = operands(600, 16, 2048, dtype, ignored=0.0)
    tensors[1] = tensors[1] / 4
    grad = torch.tensor(scale)
    exact = gradients(torchs(target), [t.double() for t in tensors], grad)
    stock = gradients(lambda h, w, b: F.cross_entropy(F.linear(h, w, b).float(), target), tensors, grad)
    actual = gradients(ours(target), tensors, grad)
    for name, a, s, e in zip(("loss", "hidden", "weight", "bias"), actual, stock, exact, strict=True):
        # A loss scale in bfloat16 multiplies gradients that are already rounded: they are rounded once more.
        limit = 1.05 if scale == 1.0 or dtype == torch.float16 else 1.5
        assert relative_error(a, e) <= limit * relative_error(s, e) + 1e-6, name


def test_the_factor_of_the_loss_is_not_rounded(backend):
    """The gradients of the hidden states and of the weight are multiplied in float32, and rounded once."""
    *tensors, target = operands(600, 8, 70, torch.bfloat16)
    tensors, third = [t.to(backend.device) for t in tensors], torch.tensor(1 / 3)
    once, found = gradients(ours(target), tensors), gradients(ours(target), tensors, third)
    for gradient, whole in zip(found[1:], once[1:], strict=True):
        assert torch.equal(gradient, (whole.float() * third.to(whole.device)).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale(backend, dtype):
    """A number in the device's memory multiplies in place: in float32, and rounded once. 1 needs no pass."""
    for size, start in ((1, 0), (8191, 0), (20001, 0), (20001, 3)):
        x = make(size + start, dtype=dtype).to(backend.device)[start:]
        factor = torch.tensor(1 / 3, device=backend.device)
        expected = (x.float() * factor).to(dtype)
        torch.ops.torch_fused._scale_(x, factor)
        assert torch.equal(x, expected)
    with emulate() as run:
        torch.ops.torch_fused._scale_(make(9, dtype=dtype), torch.ones(()))
    assert (run.launches[0].buffers[0].read, run.launches[0].buffers[0].written) == (0, 0)


def test_float16_keeps_small_gradients():
    """With 65,536 classes, each probability divided by the number of rows would underflow in float16."""
    hidden, weight, bias, target = operands(64, 8, 65536, torch.float16, ignored=0.0)
    tensors, grad = [hidden, weight / 64, bias * 0], torch.tensor(2.0**14)
    exact = gradients(torchs(target), [t.double() for t in tensors], grad)
    actual = gradients(ours(target), tensors, grad)
    rest = torch.ones(65536, dtype=torch.bool)
    rest[target] = False
    assert relative_error(actual[2][rest], exact[2][rest]) < 5e-2
    assert exact[2][rest].any()


def test_all_ignored(backend):
    """The mean of nothing is NaN and the sum 0, as in torch; gradients are 0."""
    *tensors, target = operands(5, 4, 9)
    target = torch.full_like(target, -100)
    for reduction in ("mean", "sum", "none"):
        loss, *found = gradients(ours(target, reduction=reduction), [t.to(backend.device) for t in tensors])
        expected = F.cross_entropy(F.linear(*tensors), target, reduction=reduction)
        torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)
        assert not any(gradient.any() for gradient in found)


def test_no_rows_and_no_features(backend):
    """With nothing to multiply, losses are those of zero logits, and gradients have the right shapes."""
    for rows, features in ((0, 4), (3, 0), (0, 0)):
        *tensors, _ = operands(max(rows, 1), features, 9)
        tensors[0] = tensors[0][:rows]
        target = torch.arange(rows, device=backend.device)
        loss, *found = gradients(ours(target, reduction="sum"), [t.to(backend.device) for t in tensors])
        torch.testing.assert_close(loss.cpu(), in_torch(*tensors, target.cpu(), reduction="sum"))
        assert [g.shape for g in found] == [t.shape for t in tensors]
        assert rows or not found[1].any()


def test_only_what_is_needed():
    """Products for gradients that are not required are skipped; without any, so is the logits' gradient."""
    hidden, weight, bias, target = operands(600, 8, 70)
    all_of_them = gradients(ours(target), (hidden, weight, bias))
    for needed in (0, 1, 2):
        tensors = [t.clone().requires_grad_(i == needed) for i, t in enumerate((hidden, weight, bias))]
        with torch.profiler.profile() as profile:
            loss = ours(target)(*tensors)
            loss.backward()
        products = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
        chunks = 2  # of the rows that are not ignored
        assert products == chunks * (1 if needed == 2 else 2)
        torch.testing.assert_close(tensors[needed].grad, all_of_them[1 + needed])
        assert [t.grad is None for t in tensors] == [i != needed for i in range(3)]
    with emulate() as run:
        linear_cross_entropy(hidden, weight, target)
    assert all(launch.buffers[0].written == 0 for launch in run.launches)


def test_backward_more_than_once():
    """With retain_graph, the second pass computes the gradients again, also for another incoming gradient."""
    *tensors, target = operands(600, 8, 70)
    inputs = [t.requires_grad_() for t in tensors]
    loss = ours(target)(*inputs)
    first = torch.autograd.grad(loss, inputs, torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs[1])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)
    torch.testing.assert_close(third[0], second[1])


def test_the_weights_gradient_is_not_copied():
    """A step holds it only once."""
    *tensors, target = operands(600, 8, 70)
    inputs = [t.requires_grad_() for t in tensors]
    calls = []
    handle = inputs[1].register_hook(lambda grad: calls.append(grad.data_ptr()))
    ours(target)(*inputs).backward()
    handle.remove()
    assert calls == [inputs[1].grad.data_ptr()]


def test_same_bits_again(backend):
    """Run to run."""
    *tensors, target = operands(600, 8, 70, torch.bfloat16)
    runs = [gradients(ours(target), [t.to(backend.device) for t in tensors]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast(backend):
    """The products have autocast's dtype, the loss is float32; gradients have the dtype of their tensors."""
    *tensors, target = operands(40, 8, 70)
    tensors = [t.to(backend.device) for t in tensors]
    expected = gradients(torchs(target), tensors)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        actual = gradients(ours(target), tensors)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert 1e-6 < relative_error(a, e) < 3e-2


def test_leading_dimensions(backend):
    """Batches of sequences, and one state alone."""
    *tensors, target = operands(6, 4, 9)
    hidden, weight, bias = (t.to(backend.device) for t in tensors)
    target = target.to(backend.device)
    losses = linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none")
    assert losses.shape == (6,)
    folded = linear_cross_entropy(hidden.view(2, 3, 4), weight, target.view(2, 3), bias=bias, reduction="none")
    torch.testing.assert_close(folded, losses.view(2, 3))
    alone = linear_cross_entropy(hidden[0], weight, target[0], bias=bias)
    torch.testing.assert_close(alone, losses[0])


# The targets of the calls below.
TARGET = torch.tensor([2, -100, 0, 3, 1])


def differentiated(**options):
    def op(h, w, b):
        return linear_cross_entropy(h, w, TARGET.to(h.device), bias=b, **options)

    return op, lambda h, w, b: in_torch(h, w, b, TARGET, **options), [(5, 3), (4, 3), (4,)]


DIFFERENTIATED = {
    "a loss a row": differentiated(reduction="none"),
    "mean": differentiated(label_smoothing=0.1, z_loss=0.1),
}

X = torch.zeros(4, 2)
LONG = torch.zeros(4, dtype=torch.long)
BAD_ARGUMENTS = [
    (lambda x: linear_cross_entropy(x, X, LONG), r"weight must have the shape \(classes, 8\)"),
    (lambda x: linear_cross_entropy(x, x, LONG[:3]), "target must have a class for each row of hidden"),
    (lambda x: linear_cross_entropy(x, x, LONG, reduction="max"), "reduction must be 'mean', 'sum' or 'none'"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": X.int()}, "hidden must be float32"),
        ({"hidden": torch.zeros(())}, "hidden must have the shape"),
        ({"weight": torch.zeros(3, 2).bfloat16()}, "weight must have hidden's dtype"),
        ({"weight": torch.zeros(0, 2)}, "with a class at least"),
        ({"target": LONG.int()}, "target must be int64"),
        ({"bias": torch.zeros(4)}, "bias must have the shape"),
        ({"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1"),
        ({"z_loss": float("inf")}, "z_loss must be finite"),
    ],
)
def test_bad_arguments(changes, message):
    """The error names the op and the argument."""
    arguments = {"hidden": X, "weight": torch.zeros(3, 2), "target": LONG} | changes
    with pytest.raises(RuntimeError, match=f"linear_cross_entropy: .*{message}|: {message}"):
        linear_cross_entropy(**arguments)


def test_a_target_that_is_not_a_class():
    """As in torch, an IndexError on the CPU."""
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=rf"linear_cross_entropy: target must be from 0 to 2 .*, got {wrong}"):
            linear_cross_entropy(X, torch.zeros(3, 2), torch.tensor([0, 1, wrong, 2]))


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    for dtype in (torch.float32, torch.bfloat16):
        *tensors, target = operands(6, 4, 9, dtype)
        tensors = [t.to(backend.device).requires_grad_() for t in tensors]
        hidden, weight, bias = tensors
        target = target.to(backend.device)
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "label_smoothing": 0.1}
            opcheck(torch.ops.torch_fused.linear_cross_entropy.default, (hidden, weight, target, bias), options)


def test_compile(backend):
    """One graph for forward and backward; the op is opaque in it."""
    torch._dynamo.reset()
    *tensors, target = operands(600, 8, 70)
    tensors = [t.to(backend.device) for t in tensors]

    def step(h, w, b):
        return linear_cross_entropy(h * 2, w, target.to(h.device), bias=b) / 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, e in zip(gradients(compiled, tensors), gradients(step, tensors), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("rows", "classes", "chunk"), [(2400, 5000, 300), (512, 5000, 256), (512, 150_000, 128)])
def test_logits_come_in_chunks(rows, classes, chunk):
    """At most an eighth of the logits, or 128 to 256 rows, are in memory: no product has a larger result."""
    largest = []
    seen = torch.profiler.profile(profile_memory=True)
    hidden, weight, _, target = operands(rows, 4, classes, ignored=0.0)
    inputs = [t.requires_grad_() for t in (hidden, weight)]
    with seen:
        linear_cross_entropy(*inputs, target).backward()
    for event in seen.events():
        largest.append(event.cpu_memory_usage)
    assert 0.9 < max(largest) / (chunk * classes * 4) < 1.5
