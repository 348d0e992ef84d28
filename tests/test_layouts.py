"""Every op takes every argument, and every incoming gradient, in every layout, on every backend."""

import pytest
import torch
from calls import CALLS, Maker, map_tensors, replaced, tensors_of

from torch_fused.testing import guarded, layouts

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
    if request.param.only_cpu and backend.name != "cpu":
        pytest.skip("an op of the CPU")
    return request.param


def test_every_argument_in_every_layout(call, backend):
    """The results, to their roundings; a tensor that the op writes changes only where its elements are."""
    for dtype in {torch.float32, torch.bfloat16} & set(call.dtypes):
        arguments = call.arguments(Maker(dtype, backend.device))
        call.check(arguments)
        for name, place, tensor in tensors_of(arguments):
            for layout, view in layouts(tensor, distinct=name in call.written):
                around = memory_around(view)
                before = around.clone()
                try:
                    call.check(replaced(map_tensors(torch.clone, arguments), name, place, view))
                except RuntimeError as error:
                    named = str(error).startswith((call.op, *call.says)) and name in str(error)
                    assert named and name in call.only_dense, f"{name} {layout}: {error}"
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


def test_all_arguments_at_once_in_the_same_layout(call, backend):
    """Copies are made, and places counted, for each argument on its own."""
    arguments = call.arguments(Maker(torch.float32, backend.device))
    names = [layout for layout, _ in layouts(torch.zeros(2, 3, 4, 5))]
    for layout in names:

        def laid_out(tensor, layout=layout):
            return dict(layouts(tensor)).get(layout, tensor)

        laid = {
            name: value if name in call.written | call.only_dense else map_tensors(laid_out, {name: value})[name]
            for name, value in arguments.items()
        }
        call.check(
            map_tensors(lambda t: t, laid)
            | {name: map_tensors(torch.clone, {name: arguments[name]})[name] for name in call.written}
        )


DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.differentiable}


@pytest.mark.parametrize("call", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_every_incoming_gradient_in_every_layout(call, backend):
    """Autograd hands on gradients as they come: of each result, alone and with the others, in every layout."""
    arguments = call.arguments(Maker(torch.float32, backend.device))

    def gradients(incoming):
        leaves = {name: arguments[name].detach().clone().requires_grad_() for name in call.differentiable}
        results = call.overload(**arguments | leaves)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        used = [(r, g) for r, g in zip(results, incoming, strict=True) if g is not None]
        torch.autograd.backward([r for r, _ in used], [g for _, g in used])
        return [leaf.grad for leaf in leaves.values()]

    count = len(call.overload._schema.returns)
    like = Maker(torch.float32, backend.device)
    like.seed = 50
    shape = arguments[call.differentiable[0]].shape
    dense = [
        like.tensor(*arguments[call.differentiable[min(i, len(call.differentiable) - 1)]].shape)
        if call.op == "apply_rotary_pos_emb"
        else like.tensor(*shape)
        for i in range(count)
    ]
    for i in range(count):
        for others in {count > 1, False}:
            for layout, view in layouts(dense[i]):
                incoming = [view if j == i else (dense[j] if others else None) for j in range(count)]
                plain = [g if g is None else torch.empty(g.shape, device=g.device).copy_(g) for g in incoming]
                for a, e in zip(gradients(incoming), gradients(plain), strict=True):
                    assert (a is None) == (e is None)
                    if a is not None:
                        torch.testing.assert_close(a, e, msg=lambda m, at=(i, layout): f"gradient {at}: {m}")


def test_written_tensors_whose_elements_share_memory_are_refused(call, backend):
    """The message names the op and the argument, and nothing is written."""
    arguments = call.arguments(Maker(torch.float32, backend.device))
    for name, place, tensor in tensors_of(arguments):
        if name not in call.written:
            continue
        distinct = {layout for layout, _ in layouts(tensor, distinct=True)}
        for layout, view in layouts(tensor):
            if layout in distinct:
                continue
            given = replaced(map_tensors(torch.clone, arguments), name, place, view)
            before = map_tensors(torch.clone, given)
            with pytest.raises(RuntimeError, match=f"({'|'.join((call.op, *call.says))}): .*{name}"):
                call.overload(**given)
            for (_, _, a), (_, _, b) in zip(tensors_of(given), tensors_of(before), strict=True):
                assert torch.equal(a, b), f"{name} {layout}"


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "beginning"])
def test_nothing_is_read_outside(call, backend, at_end):
    """Each tensor ends, or begins, where no access is allowed: to read one element more is a segmentation fault."""
    if backend.device != "cpu":
        pytest.skip("memory of the CPU")
    for dtype in call.dtypes if backend.name == "cpu" else {torch.float32, torch.bfloat16} & set(call.dtypes):
        arguments = call.arguments(Maker(dtype, backend.device))
        for layout in ("contiguous", "rows apart", "step 2 in dimension 0"):

            def laid_out(tensor, layout=layout):
                return guarded(dict(layouts(tensor)).get(layout, tensor), at_end=at_end)

            laid = {
                name: map_tensors(
                    laid_out if name not in call.only_dense else lambda t: guarded(t, at_end=at_end), {name: value}
                )[name]
                for name, value in arguments.items()
            }
            call.check(laid)
