"""cross_entropy_: losses, gradients in place and contracts, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from calls import smallest
from torch.library import opcheck

from torch_fused.metal import emulate
from torch_fused.ops.cross_entropy import cross_entropy_
from torch_fused.testing import HALF_ULP, make, relative_error

# One class, under a pack, a pack and a tail, one block of the CPU and a tail, more than threads handle at once.
CLASSES = [1, 3, 13, 64, 1025, 9000]
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 0.1}]


def targets(rows, classes, seed=0):
    """Classes, the first and the last among them, and one row that is ignored."""
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    target[0], target[-1], target[rows // 2] = 0, classes - 1, -100
    return target


def in_torch(logits, target, scale=None, *, z_loss=0.0, **options):
    """The losses, and the gradients times the scale, in float64 by torch."""
    x = logits.detach().double().cpu().requires_grad_()
    target = target.cpu()
    kept = target != options.get("ignore_index", -100)
    losses = F.cross_entropy(x, target, reduction="none", **options) + kept.double() * z_loss * x.logsumexp(-1).square()
    (gradient,) = torch.autograd.grad(losses, x, torch.ones_like(losses) if scale is None else scale.double().cpu())
    return losses.detach(), gradient


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_matches_float64(backend, classes, options):
    """Losses to float32's precision, gradients to one rounding; an ignored row has neither."""
    for dtype in backend.dtypes:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logits, target = make(7, classes, dtype=dtype, scale=4.0), targets(7, classes)
        for scale in (make(7, dtype=wide, seed=1), torch.tensor(0.25, dtype=wide)):
            x = logits.to(backend.device, copy=True)
            losses = cross_entropy_(x, target.to(backend.device), scale.to(backend.device), **options)
            exact, gradient = in_torch(logits, target, scale.expand(7), **options)
            assert losses.dtype == wide
            torch.testing.assert_close(losses.cpu().double(), exact, rtol=1e-5, atol=1e-5)
            # A probability minus the targets' shares: these may cancel.
            smoothing = options.get("label_smoothing", 0.0)
            shares = smoothing / classes + (1 - smoothing) * F.one_hot(target.clamp(0), classes).double()
            terms = gradient.abs() + scale.abs().view(-1, 1) * shares
            roundings = 1024 if dtype == torch.float64 else 64  # torch's own gradient is not more exact in float64
            allowed = HALF_ULP[dtype] * gradient.abs() + roundings * HALF_ULP[wide] * terms + smallest(dtype)
            assert ((x.cpu().double() - gradient).abs() <= allowed).all(), dtype
            assert not losses[3] and not x[3].any()
        alone = logits.to(backend.device, copy=True)
        torch.testing.assert_close(cross_entropy_(alone, target.to(backend.device), **options), losses, rtol=0, atol=0)
        assert torch.equal(alone.cpu(), logits)


def test_a_vocabulary_of_logits(backend):
    """151,936 classes, the first third masked: no worse than torch's own in float32."""
    logits = make(2, 151936, scale=3.0)
    logits[:, :50000] = -torch.inf
    target = torch.tensor([50001, 151935])
    x = logits.to(backend.device, copy=True)
    losses = cross_entropy_(x, target.to(backend.device), torch.ones((), device=backend.device))
    exact, gradient = in_torch(logits, target)
    assert relative_error(losses, exact) < 1e-6
    assert relative_error(x, gradient) < 1e-6


def test_far_logits(backend):
    """Nothing overflows, and values much smaller than the largest are right."""
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4 + 1, -1e4 - 3], [0.0, -80.0, -100.0]])
    target = torch.tensor([0, 1, 2, 1])
    x = logits.to(backend.device, copy=True)
    losses = cross_entropy_(x, target.to(backend.device), torch.ones((), device=backend.device))
    exact, gradient = in_torch(logits, target)
    torch.testing.assert_close(losses.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.cpu().double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [40, 3000])
def test_nan_and_inf(backend, classes):
    """NaN, infinities, masked classes and a fully masked row give the same as torch."""
    logits = make(6, classes)
    logits[0], logits[1, 3], logits[2, 5], logits[3, 7], logits[4, 1:] = (
        -torch.inf,
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    target = torch.tensor([1, 2, 5, 7, 0, 4])
    x = logits.to(backend.device, copy=True)
    losses = cross_entropy_(x, target.to(backend.device), torch.ones((), device=backend.device))
    own = logits.clone().requires_grad_()
    expected = F.cross_entropy(own, target, reduction="none")
    torch.testing.assert_close(losses.cpu(), expected.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    expected.sum().backward()
    torch.testing.assert_close(x.cpu(), own.grad, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_ignored_rows_are_not_read(backend):
    """Their losses and gradients are 0 for any contents and any ignore_index."""
    for index in (-100, 2, 2**40):
        x = torch.full((2, 9), torch.nan, device=backend.device)
        target = torch.full((2,), index, device=backend.device)
        losses = cross_entropy_(x, target, torch.ones((), device=backend.device), ignore_index=index)
        assert not losses.any() and not x.any()


def test_targets_that_are_not_a_class(backend):
    """An error on the CPU, before anything is written; NaN only in their rows in kernels."""
    for wrong in (-1, 9, 2**40, -(2**40)):
        logits = make(3, 9)
        x = logits.to(backend.device, copy=True)
        target = torch.tensor([1, wrong, 2], device=backend.device)
        scale = torch.ones((), device=backend.device)
        if backend.name == "cpu":
            with pytest.raises(IndexError, match=rf"cross_entropy_: target must be from 0 to 8 .*got {wrong}"):
                cross_entropy_(x, target, scale)
            assert torch.equal(x, logits)
        else:
            losses = cross_entropy_(x, target, scale)
            assert losses.isnan().tolist() == [False, True, False]
            assert x.isnan().all(-1).tolist() == [False, True, False] and not x[::2].isnan().any()


def test_no_rows(backend):
    """Nothing is launched."""
    x = torch.empty(0, 5, device=backend.device)
    assert cross_entropy_(x, torch.empty(0, dtype=torch.long, device=backend.device)).shape == (0,)


def test_rows_of_a_larger_buffer(backend):
    """Separated and misaligned rows are written in place; the gaps between them do not change."""
    for start in (0, 1):
        for dtype in (torch.float32, torch.bfloat16):
            whole = make(4, 40, dtype=dtype).to(backend.device)
            before, x = whole.clone(), whole[:, start : start + 33]
            expected = x.clone(memory_format=torch.contiguous_format)
            target, scale = targets(4, 33).to(backend.device), torch.ones((), device=backend.device)
            cross_entropy_(expected, target, scale)
            cross_entropy_(x, target, scale)
            assert torch.equal(x, expected)
            assert torch.equal(whole[:, :start], before[:, :start])
            assert torch.equal(whole[:, start + 33 :], before[:, start + 33 :])


@pytest.mark.parametrize(("schedule", "seed"), [("reversed", 0), ("random", 0), ("random", 1), ("preemptive", 0)])
def test_every_schedule_gives_the_same_bits(schedule, seed):
    """No result depends on the order that threads run in."""

    def run():
        found = []
        for classes in (130, 5000):
            x = make(3, classes, scale=3.0)
            losses = cross_entropy_(x, targets(3, classes), torch.ones(()), label_smoothing=0.1, z_loss=1e-2)
            found += [losses, x]
        return found

    with emulate(checked=False):
        expected = run()
    with emulate(checked=True, schedule=schedule, seed=seed):
        actual = run()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_traffic():
    """A row is read once for a loss; for a gradient it is read again and written once."""
    for scale, passes in ((None, 1), (torch.ones(()), 3)):
        x = make(2, 20000)
        with emulate() as run:
            cross_entropy_(x, torch.tensor([3, 19999]), scale)
        (launch,) = run.launches
        assert launch.buffers[0].read + launch.buffers[0].written == passes * x.nbytes


BAD_ARGUMENTS = [
    ({"logits": torch.zeros(2, 3, 4)}, "logits must have the shape"),
    ({"logits": torch.zeros(2, 0)}, "logits must have the shape"),
    ({"logits": torch.zeros(2, 3, dtype=torch.int32)}, "logits must be float32"),
    ({"target": torch.zeros(2)}, "target must be int64"),
    ({"target": torch.zeros(3, dtype=torch.long)}, "target must have a class for each row"),
    ({"scale": torch.zeros(3)}, "scale must be a scalar"),
    ({"scale": torch.zeros((), dtype=torch.bfloat16)}, "scale must be Float"),
    ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1"),
    ({"z_loss": float("nan")}, "z_loss must be finite"),
    ({"logits": torch.zeros(3).expand(2, 3)}, "logits"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS)
def test_bad_arguments(changes, message):
    """The error names the op and the argument."""
    arguments = {"logits": torch.zeros(2, 3), "target": torch.zeros(2, dtype=torch.long), "scale": torch.ones(())}
    with pytest.raises(RuntimeError, match=f"cross_entropy_: .*{message}|{message}"):
        cross_entropy_(**arguments | changes)


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    target, scale = torch.tensor([1, -100, 3], device=backend.device), torch.ones(3, device=backend.device)
    for dtype in (torch.float32, torch.bfloat16):
        x = make(3, 8, dtype=dtype, device=backend.device)
        opcheck(torch.ops.torch_fused.cross_entropy_.default, (x, target, scale), {"label_smoothing": 0.1})
        opcheck(torch.ops.torch_fused.cross_entropy_.default, (x[:, ::2], target))
