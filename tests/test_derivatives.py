"""All of torch's ways to differentiate and batch, of every order, for every op with a gradient."""

import pytest
import test_layer_norm
import test_linear_cross_entropy
import test_quantized
import test_rms_norm
import test_rope
import test_softmax
import test_swiglu
from conftest import available_backends
from derivatives import (
    COMPILED,
    DERIVATIVES,
    assert_checks_arguments,
    assert_derivatives,
    assert_gradcheck,
    assert_kernels,
)

from torch_fused.testing import make

# Each has the op's calls, the same in torch code, the operands' shapes, and what is not supported.
MODULES = (
    test_layer_norm,
    test_linear_cross_entropy,
    test_quantized,
    test_rms_norm,
    test_rope,
    test_softmax,
    test_swiglu,
)


def name_of(module):
    return module.__name__.removeprefix("test_")


CASES = {f"{name_of(m)}: {name}": case for m in MODULES for name, case in m.DIFFERENTIATED.items()}
# The gradients of a sum and of rotary tables are torch code.
IN_TORCH = {"rms_norm: add_rms_norm's sum", "rope: apply_rotary_pos_emb", "rope: part of a head, shared tables"}
# The gradients of a single loss are computed with it.
WITH_FORWARD = {"linear_cross_entropy: mean"}
FIRST_CASES = {name_of(m): next(iter(m.DIFFERENTIATED.values())) for m in MODULES}
BAD_ARGUMENTS = [
    pytest.param(call, (2, 3, 5, 8) if m is test_rope else (4, 8), message, id=f"{name_of(m)}-{i}")
    for m in MODULES
    for i, (call, message) in enumerate(m.BAD_ARGUMENTS)
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives(backend, derivative, case):
    """Against float64."""
    op, exact, shapes = CASES[case]
    assert_derivatives(derivative, op, exact, *shapes, backend=backend)


# What is traced does not depend on whether the kernels are emulated.
@pytest.mark.parametrize("backend", [b for b in available_backends() if b.name != "emulated"], ids=str, indirect=True)
@pytest.mark.parametrize("op", FIRST_CASES)
@pytest.mark.parametrize("derivative", COMPILED)
def test_compiled_derivatives(backend, derivative, op):
    """The same with torch.compile tracing the differentiation."""
    function, exact, shapes = FIRST_CASES[op]
    assert_derivatives(derivative, function, exact, *shapes, backend=backend, compiled=True)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_of_every_order(case):
    """Against numeric derivatives in float64: both modes, batched, and second order."""
    op, _, shapes = CASES[case]
    assert_gradcheck(op, *shapes)


@pytest.mark.parametrize("case", [case for case in CASES if case not in IN_TORCH | WITH_FORWARD])
def test_the_first_order_uses_kernels(case):
    """An ordinary gradient uses the op's kernels, forward and backward."""
    op, _, shapes = CASES[case]
    assert_kernels(op, *shapes)


@pytest.mark.parametrize(("call", "shape", "message"), BAD_ARGUMENTS)
def test_bad_arguments_in_transforms(backend, call, shape, message):
    """A bad argument also raises when torch differentiates or batches the op."""
    assert_checks_arguments(call, make(*shape, device=backend.device), message)
