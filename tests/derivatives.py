"""Torch's ways to differentiate a function, for the tests of differentiable ops.

Each of `DERIVATIVES` takes a function of tensors and the tensors, and returns tensors. The same of an op and of torch
code in float64 must agree: `assert_derivatives`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from packaging.version import Version
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from torch_fused.metal import emulate
from torch_fused.testing import make, relative_error

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def scalar(function: Function) -> Callable[..., Tensor]:
    """A scalar with a different weight per element; the squares of a normalised row always sum to its size."""

    def weigh(*tensors: Tensor) -> Tensor:
        results = results_of(function(*tensors))
        return sum((w * (y + y.square())).sum() for w, y in zip(directions(results), results, strict=True))

    return weigh


def results_of(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def directions(tensors: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """A tensor like each, of multiples of 1/4, which every dtype represents. Not random, because Dynamo traces it."""
    return tuple(
        ((torch.arange(t.numel(), device=t.device) * (2 * seed + 1) + i) % 7 - 3).div(4).to(t.dtype).view(t.shape)
        for i, t in enumerate(tensors)
    )


def leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def every(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


# ---- forward mode ---------------------------------------------------------------------------------------------------


def func_jvp(function, *tensors):
    return jvp(function, tensors, directions(tensors))


def jvp_of_each_tensor(function, *tensors):
    """Tangents of one tensor at a time: the others have none."""
    return [
        jvp(lambda t, i=i: function(*tensors[:i], t, *tensors[i + 1 :]), (tensor,), directions([tensor]))[1]
        for i, tensor in enumerate(tensors)
    ]


def dual_tensors(function, *tensors):
    with torch.no_grad(), forward_ad.dual_level():
        results = results_of(function(*map(forward_ad.make_dual, tensors, directions(tensors))))
        return [forward_ad.unpack_dual(result).tangent for result in results]


def func_linearize(function, *tensors):
    output, derivative = linearize(function, *tensors)
    return output, derivative(*directions(tensors)), derivative(*directions(tensors, 2))


def forward_jacobian(function, *tensors):
    return jacfwd(function, every(tensors))(*tensors)


# ---- reverse mode ---------------------------------------------------------------------------------------------------


def func_grad(function, *tensors):
    return grad(scalar(function), every(tensors))(*tensors)


def grad_of_each_tensor(function, *tensors):
    return [grad(scalar(function), i)(*tensors) for i in every(tensors)]


def func_vjp(function, *tensors):
    output, pull = vjp(function, *tensors)
    cotangents = directions(results_of(output))
    return output, pull(cotangents[0] if isinstance(output, Tensor) else cotangents)


def reverse_jacobian(function, *tensors):
    return jacrev(function, every(tensors))(*tensors)


def batched_backward(function, *tensors):
    """One backward pass for several gradients, like torch.autograd.functional.jacobian(vectorize=True)."""
    tensors = leaves(tensors)
    results = results_of(function(*tensors))
    batches = [torch.stack(rows) for rows in zip(directions(results), directions(results, 2), strict=True)]
    return torch.autograd.grad(results, tensors, batches, is_grads_batched=True)


# ---- the second order and beyond ------------------------------------------------------------------------------------


def double_backward(function, *tensors):
    """For a sum of squared gradients, like a gradient penalty; also the first order, with a graph."""
    tensors = leaves(tensors)
    first = torch.autograd.grad(scalar(function)(*tensors), tensors, create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


def triple_backward(function, *tensors):
    tensors = leaves(tensors)
    value = scalar(function)(*tensors)
    for _ in range(2):
        value = sum(g.div(4).square().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))
    return torch.autograd.grad(value, tensors)


def gradient_of_the_incoming_gradient(function, *tensors):
    """The double-backward trick: the gradient is linear in the incoming one, and its gradient is a jvp."""
    tensors = leaves(tensors)
    results = results_of(function(*tensors))
    incoming = leaves(directions(results))
    gradients = torch.autograd.grad(results, tensors, incoming, create_graph=True)
    return torch.autograd.grad(gradients, incoming, directions(gradients, 2))


def checkpointed_double_backward(function, *tensors):
    return double_backward(lambda *ts: checkpoint(function, *ts, use_reentrant=False), *tensors)


def func_hessian(function, *tensors):
    """Forward over reverse."""
    return hessian(scalar(function), every(tensors))(*tensors)


def reverse_over_reverse(function, *tensors):
    return jacrev(jacrev(scalar(function), every(tensors)), every(tensors))(*tensors)


def reverse_over_forward(function, *tensors):
    return jacrev(jacfwd(scalar(function), every(tensors)), every(tensors))(*tensors)


def forward_over_forward(function, *tensors):
    return jacfwd(jacfwd(scalar(function), every(tensors)), every(tensors))(*tensors)


def dual_tensors_through_backward(function, *tensors):
    """Tangents of the tensors, and of only the incoming gradients."""
    found = []
    for dual_inputs in (True, False):
        given = leaves(tensors)
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(*pair) for pair in zip(given, directions(given), strict=True)]
            results = results_of(function(*(inputs if dual_inputs else given)))
            incoming = [
                forward_ad.make_dual(*pair) for pair in zip(directions(results, 2), directions(results, 3), strict=True)
            ]
            gradients = torch.autograd.grad(results, given, incoming)
            found += [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    return found


# ---- batches --------------------------------------------------------------------------------------------------------


def batches(tensors: Sequence[Tensor]) -> list[tuple[tuple[int | None, ...], tuple[Tensor, ...]]]:
    """All tensors batched, and each alone, along a dimension other than the first."""
    stacked = [torch.stack([t, *directions([t])], min(1, t.dim())) for t in tensors]
    dims = [min(1, t.dim()) for t in tensors]
    cases = [(tuple(dims), tuple(stacked))]
    for i in every(tensors):
        alone = tuple(dims[j] if j == i else None for j in every(tensors))
        cases.append((alone, tuple(stacked[j] if j == i else tensors[j] for j in every(tensors))))
    return cases


def func_vmap(function, *tensors):
    return [vmap(function, dims)(*batch) for dims, batch in batches(tensors)]


def per_sample_gradients(function, *tensors):
    return [vmap(grad(scalar(function), every(tensors)), dims)(*batch) for dims, batch in batches(tensors)]


def gradient_through_vmap(function, *tensors):
    """By torch.func and by a backward pass from outside."""
    found = []
    for dims, batch in batches(tensors):
        total = scalar(vmap(function, dims))
        given = leaves(batch)
        found += [grad(total, every(batch))(*batch), torch.autograd.grad(total(*given), given)]
    return found


def tangents_through_vmap(function, *tensors):
    found = []
    for dims, batch in batches(tensors):
        found += [jvp(vmap(function, dims), batch, directions(batch)), dual_tensors(vmap(function, dims), *batch)]
    return found


def per_sample_tangents(function, *tensors):
    return [vmap(lambda *ts: jvp(function, ts, directions(tensors)), dims)(*batch) for dims, batch in batches(tensors)]


DERIVATIVES = [
    func_jvp,
    jvp_of_each_tensor,
    dual_tensors,
    func_linearize,
    forward_jacobian,
    func_grad,
    grad_of_each_tensor,
    func_vjp,
    reverse_jacobian,
    batched_backward,
    double_backward,
    triple_backward,
    gradient_of_the_incoming_gradient,
    checkpointed_double_backward,
    func_hessian,
    reverse_over_reverse,
    reverse_over_forward,
    forward_over_forward,
    dual_tensors_through_backward,
    func_vmap,
    per_sample_gradients,
    gradient_through_vmap,
    tangents_through_vmap,
    per_sample_tangents,
]

COMPILED = [func_jvp, func_grad, func_vjp, per_sample_gradients, func_vmap]
if Version(torch.__version__) >= Version("2.13"):  # 2.11 cannot trace its own hessian
    COMPILED.append(func_hessian)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def assert_derivatives(
    derivative: Callable, op: Function, exact: Function, *shapes: tuple[int, ...], backend, compiled: bool = False
) -> None:
    """Checks a derivative of `op`, in every dtype, against that of `exact`, torch code, in float64."""
    # The emulator is slow, and the ops' own tests cover every dtype.
    for dtype in (torch.float32,) if compiled or backend.name == "emulated" else backend.dtypes:
        tensors = [make(*shape, dtype=dtype, device=backend.device, seed=i) for i, shape in enumerate(shapes)]
        wanted = derivative(exact, *(t.double().cpu() for t in tensors))
        run = partial(derivative, op)
        if compiled:
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        for i, (a, e) in enumerate(zip(pytree.tree_leaves(run(*tensors)), pytree.tree_leaves(wanted), strict=True)):
            assert a.shape == e.shape
            error = relative_error(a, e) if e.norm() > 1e-6 else a.detach().double().norm().item()
            assert error < TOLERANCES[dtype], f"{derivative.__name__}, result {i}, {dtype}: relative error {error:.1e}"


def assert_gradcheck(op: Function, *shapes: tuple[int, ...]) -> None:
    """Analytic derivatives of the first and second order, in both modes and batched, equal numeric ones in float64."""
    tensors = leaves([make(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)])
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(op, tensors, **options)
    assert torch.autograd.gradgradcheck(op, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)


def assert_checks_arguments(call: Callable[[Tensor], object], tensor: Tensor, message: str) -> None:
    """A bad argument also gives the op's own error when torch differentiates or batches it."""
    ways = [
        lambda: call(tensor.clone().requires_grad_()),
        lambda: jvp(call, (tensor,), (tensor,)),
        lambda: grad(lambda x: pytree.tree_leaves(call(x))[0].sum())(tensor),
        lambda: vmap(call)(torch.stack([tensor, tensor])),
    ]
    for way in ways:
        with pytest.raises(RuntimeError, match=message):
            way()


def assert_kernels(op: Function, *shapes: tuple[int, ...]) -> None:
    """The op and its first-order gradient run kernels."""
    with emulate() as run:
        inputs = leaves([make(*shape, seed=i) for i, shape in enumerate(shapes)])
        results = results_of(op(*inputs))
        assert len(run.launches) == 1
        torch.autograd.grad(results, inputs, directions(results))
    assert len(run.launches) > 1
