"""linear_cross_entropy in chunks of classes, as GPUs have it in half types; the CPU's kernel must give the same."""

import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import OPTIONS, TOLERANCE, gradients, operands, ours, torchs

from torch_fused.functional import linear_cross_entropy
from torch_fused.metal import emulate
from torch_fused.testing import make, relative_error

HALVES = (torch.bfloat16, torch.float16)
# (rows, features, classes, classes of a chunk in memory of its own): one chunk, with room to spare; two, the first one
# of a class; of no whole packs; several packs a thread, and more than threads take at once; logits in the weight's
# gradient, of one chunk and of some; the hidden states' gradient finished first, in one chunk and in two.
SHAPES = [
    (5, 8, 33, 128),
    (7, 4, 129, 128),
    (6, 4, 100, 33),
    (3, 4, 4999, 2500),
    (2, 4, 40000, 20000),
    (9, 32, 200, 32),
    (20, 16, 700, 128),
    (9, 32, 1000, 32),
    (40, 32, 2000, 32),
]
FULL = {"label_smoothing": 0.1, "z_loss": 1e-2}


def in_chunks(hidden, weight, bias, target, own, grad=None, needs=(True, True, True), **options):
    """The loss and the gradients of hidden, weight and bias, `own` classes in a chunk with memory of its own."""
    options = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "z_loss": 0.0} | options
    return torch.ops.torch_fused._linear_cross_entropy_gradients(
        hidden, weight, target, bias, grad, *options.values(), *needs, own
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, options):
    """The loss and every gradient, with and without a bias, for an incoming gradient."""
    *sizes, own = shape
    for dtype in HALVES:
        *tensors, target = operands(*sizes, dtype, ignore_index=options.get("ignore_index", -100))
        moved = [t.to(backend.device) for t in (*tensors, target)]
        grad = make(*target.shape, seed=5) if options.get("reduction") == "none" else torch.tensor(3.0)
        for biased in (True, False):
            exact_inputs = [t.double() for t in tensors]
            if not biased:
                exact_inputs[2], moved[2] = torch.zeros(sizes[2], dtype=torch.double), None
            exact = gradients(torchs(target, **options), exact_inputs, grad.double())
            actual = in_chunks(*moved, own, grad.to(backend.device), **options)
            for name, a, e in zip(("loss", "hidden", "weight", "bias"), actual, exact, strict=True):
                assert relative_error(a, e) < TOLERANCE[dtype], f"{name}, {dtype}, {biased=}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("chunk", [128, 512])
def test_errors_are_not_above_torchs(dtype, chunk):
    """The hidden states' gradient is summed over the chunks in float32; the weight's needs no sum."""
    *tensors, target = operands(64, 48, 2048, dtype, ignored=0.0)
    tensors[1] = tensors[1] / 4
    exact = gradients(torchs(target), [t.double() for t in tensors])
    stock = gradients(lambda h, w, b: F.cross_entropy(F.linear(h, w, b).float(), target), tensors)
    with emulate(checked=False):
        actual = in_chunks(*tensors, target, chunk)
    for name, a, s, e in zip(("loss", "hidden", "weight", "bias"), actual, stock, exact, strict=True):
        assert relative_error(a, e) <= 1.05 * relative_error(s, e) + 1e-6, name


def test_the_loss_does_not_depend_on_the_chunks(backend):
    """Up to float32's rounding."""
    hidden, weight, bias, target = (t.to(backend.device) for t in operands(9, 8, 1000, torch.bfloat16))
    found = [in_chunks(hidden, weight, bias, target, chunk, reduction="none", **FULL)[0] for chunk in (1000, 104)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "needed", "own"),
    [((2060, 2, 8200), 0, 8064), ((300, 96, 20000), 1, 3456)],
    ids=["2^24 logits of the hidden states' gradient alone", "2^20 beside the weight's gradient"],
)
def test_its_own_chunks(sizes, needed, own):
    """How many classes' logits have memory of their own: a multiple of 128. Nothing else takes as much."""
    rows, features, classes = sizes
    hidden, weight, _, target = operands(*sizes, torch.bfloat16)
    inputs = [t.requires_grad_(i == needed) for i, t in enumerate((hidden, weight))]
    seen = torch.profiler.profile(profile_memory=True)
    with emulate(checked=False), seen:
        loss = linear_cross_entropy(*inputs, target)
        loss.backward()
    allocated = {event.cpu_memory_usage for event in seen.events() if event.name.startswith("aten::empty")}
    # The CPU's product with a float32 result, the hidden states' gradient, needs a float32 operand.
    largest = rows * own * 4 if needed == 0 else classes * features * 2
    assert sorted(allocated, reverse=True)[:2] == [largest, rows * own * 2]
    exact = F.cross_entropy(hidden.double() @ weight.double().T, target)
    assert relative_error(loss, exact) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("shape", "first", "again", "ahead", "back", "of_hidden"),
    [
        # From the last class on, 256 (kept), 128 and 128 in the weight's gradient; 128 and 60.
        ((20, 16, 700, 128), 3, 4, 0, 5, 5),
        ((9, 32, 200, 32), 2, 3, 0, 4, 4),  # 128 (kept); 32, 32 and 8
        # 768 (kept) and 128, then the other 104 for the hidden states alone; 32, 32, 32 and 8.
        ((9, 32, 1000, 32), 2, 5, 1, 6, 3),
        # 768 (kept), 512, 256, 128 and 128, then 160 and 48; 6 times 32, and 16.
        ((40, 32, 2000, 32), 3, 11, 2, 12, 7),
        ((20, 4, 700, 128), 6, 5, 0, 6, 6),  # no room
        ((20, 16, 700, 1000), 1, 0, 0, 1, 1),
    ],
    ids=str,
)
def test_chunks(shape, first, again, ahead, back, of_hidden):
    """Products and launches of both passes, with the weight's gradient and without."""
    *sizes, own = shape
    hidden, weight, bias, target = operands(*sizes, torch.bfloat16)
    alike = -(-sizes[2] // own)

    def counts(*needs):
        with torch.profiler.profile() as profile, emulate(checked=False) as run:
            in_chunks(hidden, weight, bias, target, own, needs=needs)
        products = sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))
        return products, len(run.launches)

    assert counts(False, False, False) == (alike, alike)
    assert counts(True, False, False) == (alike + (alike - 1) + alike, alike + alike)
    assert counts(False, True, False) == (first + again + back, first + back)
    assert counts(True, True, True) == (first + again + ahead + back + of_hidden, first + back + ahead)


def test_only_what_is_needed(backend):
    """Gradients that are not needed are empty, and do not change the others."""
    tensors = [t.to(backend.device) for t in operands(20, 16, 700, torch.bfloat16)]
    whole = in_chunks(*tensors, 128)
    for i in range(3):
        loss, *found = in_chunks(*tensors, 128, needs=tuple(i == j for j in range(3)))
        assert torch.equal(loss, whole[0]) and torch.equal(found[i], whole[1 + i])
        assert all(gradient.numel() == 0 for j, gradient in enumerate(found) if j != i)


def test_traffic():
    """A chunk of logits is read once for the losses; for the gradient it is read once, and whole packs are written."""
    hidden, weight, bias, target = operands(4, 8, 2001, torch.bfloat16, ignored=0.0)
    with emulate() as run:
        in_chunks(hidden, weight, bias, target, 1000, **FULL)
    sums, gradient = "cross_entropy_sums_bf16", "cross_entropy_gradient_bf16"
    assert [launch.kernel for launch in run.launches] == [sums, sums, gradient, gradient]
    for launch, classes in zip(run.launches[:2], (721, 1280), strict=True):
        logits = 4 * classes * 2
        assert launch.buffers[0].written == 0 and logits <= launch.buffers[0].read <= logits + 4 * 2
    for launch, classes, whole in zip(run.launches[2:], (1280, 721), (1280, 728), strict=True):
        assert launch.buffers[0].read == 4 * classes * 2 and launch.buffers[0].written == 4 * whole * 2


@pytest.mark.parametrize(("schedule", "seed"), [("reversed", 0), ("random", 0), ("random", 1), ("preemptive", 0)])
def test_every_schedule_gives_the_same_bits(schedule, seed):
    """No result depends on the order that threads run in."""

    def run():
        found = []
        for sizes, chunk in (((3, 8, 300), 104), ((3, 4, 5000), 2600)):
            found += in_chunks(*operands(*sizes, torch.float16), chunk, **FULL)
        return found

    with emulate(checked=False):
        expected = run()
    with emulate(checked=True, schedule=schedule, seed=seed):
        actual = run()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_same_bits_again(backend):
    """Run to run."""
    tensors = [t.to(backend.device) for t in operands(20, 16, 700, torch.bfloat16)]
    runs = [in_chunks(*tensors, 128) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_and_inf(backend, dtype):
    """Masked classes, whole chunks of them, all of them, NaN and infinities in any chunk give the same as torch."""
    logits = make(7, 300, scale=3.0, dtype=dtype)
    logits[0] = logits[1, :200] = logits[2, 104:] = logits[3, 7] = -torch.inf
    logits[4, 3], logits[5, 250] = torch.nan, torch.inf
    for row, label in zip(logits, (1, 250, 50, 7, 5, 250, 8), strict=True):
        target, x = torch.tensor([label]), row[None].float().requires_grad_()
        expected = F.cross_entropy(x, target)
        (gradient,) = torch.autograd.grad(expected, x)
        # One row and one feature, 1: the logits are the weight, and its gradient is theirs.
        moved = [t.to(backend.device) for t in (torch.ones(1, 1, dtype=dtype), row[:, None], target)]
        loss, _, found, _ = in_chunks(*moved[:2], None, moved[2], 104)
        torch.testing.assert_close(loss.cpu(), expected.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
        rounded = gradient.T.to(dtype)
        torch.testing.assert_close(found.cpu(), rounded, rtol=1e-2, atol=1e-6, equal_nan=True)


def test_targets_that_are_not_a_class(backend):
    """Not an error where kernels run: their losses and gradients are NaN, as those of an ignored row are 0."""
    hidden, weight, bias, _ = (t.to(backend.device) for t in operands(5, 4, 300, torch.bfloat16))
    for wrong in (-1, 300, 2**40, -(2**40)):
        target = torch.tensor([1, wrong, 299, -100, 200], device=backend.device)
        call = lambda: in_chunks(hidden, weight, bias, target, 104, reduction="none", label_smoothing=0.1)  # noqa: B023, E731
        if backend.name == "cpu":
            with pytest.raises(IndexError, match=rf"linear_cross_entropy: target .*got {wrong}"):
                call()
        else:
            loss, of_hidden, of_weight, _ = call()
            assert loss.isnan().tolist() == [False, True, False, False, False] and loss[3] == 0
            assert of_hidden.isnan().all(-1).tolist() == [False, True, False, False, False]
            assert not of_hidden[3].any() and not of_hidden[[0, 2, 4]].isnan().any()
            assert of_weight.isnan().all()


def test_all_rows_ignored(backend):
    """The mean of nothing is NaN, and gradients are 0."""
    hidden, weight, bias, target = (t.to(backend.device) for t in operands(5, 4, 300, torch.bfloat16))
    loss, *found = in_chunks(hidden, weight, bias, torch.full_like(target, -100), 104)
    assert loss.isnan() and not any(gradient.any() for gradient in found)


def test_layouts(backend):
    """A weight in columns, and rows apart from each other."""
    hidden, weight, bias, target = (t.to(backend.device) for t in operands(9, 8, 300, torch.bfloat16))
    expected = in_chunks(hidden, weight, bias, target, 104)
    apart = torch.full((9, 13), torch.nan, dtype=hidden.dtype, device=hidden.device)[:, 3:11].copy_(hidden)
    given = (apart, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0], torch.stack([target, target], 1)[:, 0])
    for a, e in zip(in_chunks(*given, 104), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_chunk_has_a_class():
    """An error otherwise."""
    with pytest.raises(RuntimeError, match="linear_cross_entropy: a chunk must have a class at least, got 0"):
        in_chunks(*operands(3, 4, 9, torch.bfloat16), 0)


def test_backward(backend):
    """Through autograd: again with another incoming gradient, compiled, and twice."""
    torch._dynamo.reset()
    for reduction in ("mean", "none"):
        *tensors, target = operands(6, 4, 9, torch.bfloat16)
        op = ours(target, reduction=reduction)
        inputs = [t.to(backend.device).requires_grad_() for t in tensors]
        loss = op(*inputs)
        first = torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
        again = torch.autograd.grad(loss.sum() * 2, inputs, create_graph=True)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(2 * a, b, rtol=2e-2, atol=1e-2)
        assert all(g.isfinite().all() for g in torch.autograd.grad(again[0].float().square().sum(), inputs))
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        for a, b in zip(gradients(compiled, inputs), gradients(op, inputs), strict=True):
            assert torch.equal(a, b)
