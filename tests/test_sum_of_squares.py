"""sum_of_squares: values, order, layouts and errors, on every backend."""

import math

import pytest
import torch
from torch.library import opcheck

from torch_fused.metal import emulate
from torch_fused.ops.sum_of_squares import sum_of_squares
from torch_fused.testing import make, relative_error

# A scalar, one element, under a pack, a tail, several threadgroups, an empty tensor in between.
SHAPES = [(), (1,), (3,), (13,), (0, 4), (8193,), (33, 64), (200, 200), (5,)]


def exact(tensors):
    return sum(tensor.cpu().double().square().sum() for tensor in tensors)


def test_matches_float64(backend):
    """Every dtype, size and alignment; more tensors than a launch takes, of several dtypes together."""
    for dtype in backend.dtypes:
        for start in (0, 1):
            tensors = [
                make(math.prod(shape) + start, dtype=dtype, seed=i, device=backend.device)[start:].view(shape)
                for i, shape in enumerate(SHAPES * 4)
            ]
            total = sum_of_squares(tensors)
            assert total.shape == () and total.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert relative_error(total.cpu(), exact(tensors)) < 1e-6
    mixed = [make(100, dtype=dtype, seed=i, device=backend.device) for i, dtype in enumerate(backend.dtypes * 2)]
    assert relative_error(sum_of_squares(mixed).cpu(), exact(mixed)) < 1e-6


def test_layouts(backend):
    """Any order of dimensions is summed in place; gaps are skipped, expanded elements count each time."""
    base = make(12, 20, device=backend.device)
    for view in (base.t(), base[:, ::2], base[:1].expand(5, 20), base[2:, 3:], base.as_strided((5, 4), (2, 1))):
        assert relative_error(sum_of_squares([view, base]).cpu(), exact([view, base])) < 1e-6


def test_nothing_to_sum(backend):
    """Empty tensors have no squares."""
    assert sum_of_squares([make(0, device=backend.device), make(3, 0, device=backend.device)]) == 0


def test_nan_and_inf(backend):
    """They reach the sum from any place."""
    for value in (torch.nan, torch.inf, -torch.inf):
        x = make(9000, device=backend.device)
        x[8999] = value
        total = sum_of_squares([make(4, device=backend.device), x]).item()
        assert math.isnan(total) if math.isnan(value) else total == math.inf


@pytest.mark.parametrize(("schedule", "seed"), [("reversed", 0), ("random", 0), ("random", 1), ("preemptive", 0)])
def test_every_schedule_gives_the_same_bits(schedule, seed):
    """The order of the summation depends on the sizes only."""
    tensors = [make(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    with emulate():
        expected = sum_of_squares(tensors)
    with emulate(schedule=schedule, seed=seed):
        assert torch.equal(sum_of_squares(tensors), expected)


def test_traffic():
    """Every element is read once; 28 tensors per launch, and one launch for the total."""
    tensors = [make(5000, seed=i) for i in range(30)]
    with emulate() as run:
        sum_of_squares(tensors)
    assert [launch.kernel for launch in run.launches] == ["sum_of_squares_f32"] * 2 + ["sum_of_squares_total"]
    moved = sum(buffer.read + buffer.written for launch in run.launches for buffer in launch.buffers[:-1])
    assert moved <= 1.01 * sum(tensor.nbytes for tensor in tensors)


def test_threads_do_not_matter():
    """On the CPU the blocks are added in one order."""
    tensors = [make(100000, seed=i) for i in range(3)]
    threads = torch.get_num_threads()
    totals = []
    for count in (1, 2):
        torch.set_num_threads(count)
        totals.append(sum_of_squares(tensors))
    torch.set_num_threads(threads)
    assert torch.equal(*totals)


def test_opcheck_and_compile(backend):
    """Schema, fake and AOT dispatch agree; torch.compile traces it."""
    tensors = [make(9, device=backend.device), make(4, 4, device=backend.device)]
    opcheck(torch.ops.torch_fused.sum_of_squares.default, (tensors,))
    compiled = torch.compile(lambda x: sum_of_squares(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors), sum_of_squares(tensors))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "tensors must be at least one, got none"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], r"tensors\[1\] must be float32.*got Long"),
        ([torch.ones(2, dtype=torch.complex64)], r"tensors\[0\] must be float32.*got ComplexFloat"),
        ([torch.ones(2, requires_grad=True)], "not differentiable"),
    ],
)
def test_bad_arguments(tensors, message):
    """Each raises an error that names it."""
    with pytest.raises(RuntimeError, match=f"sum_of_squares: (.* )?{message}"):
        sum_of_squares(tensors)
