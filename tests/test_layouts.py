"""Every op takes every argument, and every incoming gradient, in every layout, on every backend."""

import pytest
import torch
from calls import CALLS, as_list, map_tensors, replaced, tensors_of

from torch_fused.testing import layouts, make

# Ops of the emulator and of the loader, which take no tensors of the user's.
PRIVATE = "_"


def test_every_op_is_here():
    """An op that has no call in calls.py would be in no test of layouts, of bad arguments, and in no fuzz."""
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
    """The results, to their roundings; a tensor that the op writes changes only where its elements are."""
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
    """All of the storage of a tensor, as it is in memory."""
    plain = torch._neg_view(view) if view.is_neg() else view
    return plain.as_strided((plain.untyped_storage().nbytes() // plain.element_size(),), (1,), 0)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("layout", [name for name, _ in layouts(torch.zeros(2, 3, 4, 5), written=True)])
def test_all_arguments_in_one_layout(call, backend, layout):
    """Copies are made, and places counted, for each argument on its own."""

    def laid_out(tensor):
        return dict(layouts(tensor, written=True)).get(layout, tensor)

    arguments = call.made(backend)
    free = {name: value for name, value in arguments.items() if name not in call.only_dense}
    call.check(arguments | map_tensors(laid_out, free))


DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.differentiable}


@pytest.mark.parametrize("call", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_every_incoming_gradient_in_every_layout(call, backend):
    """Autograd hands on gradients as they come: of each result, alone and with the others, in every layout."""
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


def test_what_cannot_be_written_is_refused(call, backend):
    """Elements that share memory, and views that are negated when read: the error names the op and the argument."""
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
