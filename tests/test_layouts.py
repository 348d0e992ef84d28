"""Every op accepts every argument and incoming gradient in every layout, on every backend."""

import pytest
import torch
from calls import CALLS, as_list, map_tensors, replaced, tensors_of

from torch_fused.testing import layouts, make

# Ops of the emulator and the loader, which do not take user tensors.
PRIVATE = "_"


def test_every_op_has_a_call():
    """An op without a call in calls.py would miss the tests of layouts and bad arguments, and the fuzz test."""
    names = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torch_fused::")
    }
    assert {name for name in names if not name.startswith(PRIVATE)} == set(CALLS)


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request, backend):
    return request.param


def test_every_argument_in_every_layout(call, backend):
    """The results, up to rounding; in a tensor that the op writes, only its elements change."""
    for dtype in {torch.float32, torch.bfloat16} & set(call.dtypes):
        arguments = call.made(backend, dtype)
        call.check(arguments)
        for name, place, tensor in tensors_of(arguments):
            for layout, view in layouts(tensor, written=name in call.written):
                around = memory_around(view)
                before = around.clone()
                try:
                    call.check(replaced(map_tensors(torch.clone, arguments), name, place, view))
                except RuntimeError as error:
                    assert name in call.only_dense and call.refuses(error, name), f"{name} {layout}: {error}"
                except AssertionError as error:
                    raise AssertionError(f"{name} {layout}, {dtype}: {error}") from error
                own = view.new_zeros(around.shape, dtype=torch.bool).as_strided(
                    view.shape, view.stride(), view.storage_offset()
                )
                own.fill_(True)
                outside = ~own.as_strided(around.shape, (1,), 0)
                if name in call.written:
                    assert same(around[outside], before[outside]), f"{name} {layout}: written outside"
                else:
                    assert same(around, before), f"{name} {layout}: written"


def memory_around(view):
    """The whole storage of a tensor, as in memory."""
    plain = torch._neg_view(view) if view.is_neg() else view
    return plain.as_strided((plain.untyped_storage().nbytes() // plain.element_size(),), (1,), 0)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("layout", [name for name, _ in layouts(torch.zeros(2, 3, 4, 5), written=True)])
def test_all_arguments_in_one_layout(call, backend, layout):
    """Copies and offsets are handled per argument."""

    def laid_out(tensor):
        return dict(layouts(tensor, written=True)).get(layout, tensor)

    arguments = call.made(backend)
    free = {name: value for name, value in arguments.items() if name not in call.only_dense}
    call.check(arguments | map_tensors(laid_out, free))


DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.differentiable}


@pytest.mark.parametrize("call", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_every_incoming_gradient_in_every_layout(call, backend):
    """Autograd passes gradients unchanged: for each result, alone and with the others, in every layout."""
    arguments = call.made(backend)

    def gradients(incoming):
        leaves = {name: arguments[name].detach().clone().requires_grad_() for name in call.differentiable}
        results = as_list(call(**arguments | leaves))
        used = [(r, g) for r, g in zip(results, incoming, strict=True) if g is not None]
        torch.autograd.backward([r for r, _ in used], [g for _, g in used])
        return [leaf.grad for leaf in leaves.values()]

    count = len(call.overload._schema.returns)
    with torch.no_grad():
        results = as_list(call(**arguments))
    dense = [make(*result.shape, seed=50 + i).to(result) for i, result in enumerate(results)]
    for i in range(count):
        for others in {count > 1, False}:
            for layout, view in layouts(dense[i]):
                incoming = [view if j == i else (dense[j] if others else None) for j in range(count)]
                plain = [g if g is None else torch.empty(g.shape, device=g.device).copy_(g) for g in incoming]
                for a, e in zip(gradients(incoming), gradients(plain), strict=True):
                    assert (a is None) == (e is None)
                    if a is not None:
                        torch.testing.assert_close(a, e, msg=lambda m, at=(i, layout): f"gradient {at}: {m}")


def test_unwritable_layouts_are_an_error(call, backend):
    """Overlapping elements, and views with the negative bit: the error names the op and the argument."""
    arguments = call.made(backend)
    for name, place, tensor in tensors_of(arguments):
        if name not in call.written:
            continue
        may_be_written = {layout for layout, _ in layouts(tensor, written=True)}
        for layout, view in layouts(tensor):
            if layout in may_be_written:
                continue
            given = replaced(map_tensors(torch.clone, arguments), name, place, view)
            before = map_tensors(torch.clone, given)
            with pytest.raises(RuntimeError, match=f"({'|'.join((call.op, *call.says))}): .*{name}"):
                call(**given)
            for (_, _, a), (_, _, b) in zip(tensors_of(given), tensors_of(before), strict=True):
                assert torch.equal(a, b), f"{name} {layout}"
