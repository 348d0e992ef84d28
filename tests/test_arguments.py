"""Every op checks every argument: bad ones raise an error that names them, and nothing is written."""

import math
import re

import pytest
import torch
from calls import CALLS, map_tensors, replaced, tensors_of

BIG = [2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 8, 2**63 - 1, -1, -(2**31), -(2**63)]
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request, backend):
    return request.param


def other_shapes(tensor):
    """The tensor with more or fewer dimensions and elements."""
    yield "a dimension more", tensor.unsqueeze(0)
    yield "a last dimension more", tensor.unsqueeze(-1)
    yield "a scalar", tensor.flatten()[0]
    yield "empty", tensor[:0] if tensor.dim() else tensor.new_empty(0)
    if tensor.dim():
        yield "flat", tensor.flatten()
        yield "a dimension less", tensor[0]
        yield "huge", tensor.flatten()[:1].expand(2**40)
    for d in range(tensor.dim()):
        yield f"shorter in dimension {d}", tensor.narrow(d, 0, tensor.shape[d] - 1)
        yield f"longer in dimension {d}", torch.cat([tensor, tensor.narrow(d, 0, 1)], d)
        yield f"one in dimension {d}", tensor.narrow(d, 0, 1)
        yield f"none in dimension {d}", tensor.narrow(d, 0, 0)


def right_or_refused(call, given, what):
    """The op gives the same as plain torch, or raises an error that names the argument and writes nothing."""
    before = map_tensors(lambda t: t.detach().clone() if t.numel() < 2**20 else t, given)
    try:
        call(**map_tensors(lambda t: t, given))
    except (RuntimeError, IndexError, TypeError) as error:
        text = str(error)
        names = "|".join(call.parameters)
        assert re.search(rf"\b({'|'.join((call.op, *call.says))})\b", text), f"{what}: {text}"
        assert re.search(rf"\b({names}|of layer)\b", text), f"{what}: {text}"
        for (_, _, a), (_, _, b) in zip(tensors_of(given), tensors_of(before), strict=True):
            assert a is b or same(a, b), f"{what}: it has written"
        return False
    try:
        call.check(before)
    except Exception as error:
        raise AssertionError(f"{what} is taken: {error}") from error
    return True


def same(a, b):
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def test_every_tensor_of_another_shape(call, backend):
    """Other sizes that fit together are right; all others raise an error."""
    arguments = call.made(backend)
    for name, place, tensor in tensors_of(arguments):
        for what, other in other_shapes(tensor):
            if what == "huge" and call.op in UNBOUNDED and name in UNBOUNDED[call.op]:
                continue
            given = replaced(map_tensors(torch.clone, arguments), name, place, other)
            right_or_refused(call, given, f"{name} {place}, {what}: {list(other.shape)}")


# Arguments that may have any shape: a huge one is valid, but takes too much memory.
UNBOUNDED = {
    "softmax": {"input"},
    "sum_of_squares": {"tensors"},
}


def test_every_tensor_of_another_dtype(call, backend):
    """Each argument accepts only its documented dtypes; integers, bools and complex numbers are not floating point."""
    arguments = call.made(backend)
    for name, place, tensor in tensors_of(arguments):
        for dtype in DTYPES:
            if dtype == tensor.dtype:
                continue
            given = replaced(map_tensors(torch.clone, arguments), name, place, tensor.to(dtype))
            taken = right_or_refused(call, given, f"{name} {place}, {dtype}")
            floating = dtype.is_floating_point or call.op in ("softmax", "kv_append_", "kv_update_")
            assert floating or not taken, f"{name} {place}, {dtype}: taken"


def test_every_tensor_on_another_device(call, backend):
    """A tensor on "meta" among others never gives uninitialised results."""
    arguments = call.made(backend)
    alone = len(list(tensors_of(arguments))) == 1
    for name, place, tensor in tensors_of(arguments):
        given = replaced(map_tensors(torch.clone, arguments), name, place, tensor.to("meta"))
        if not alone and tensor.dim():
            with pytest.raises((RuntimeError, NotImplementedError), match=r"device|must be on|meta"):
                call(**given)


def test_every_number_out_of_range(call, backend):
    """Integers up to the limits of int64, NaN, invalid strings, lists of other lengths."""
    arguments = call.made(backend)
    for name, kind in call.parameters.items():
        value = arguments.get(name)
        if "Tensor[]" in kind:
            others = [[], value[:-1], value + value[:1], [None, *value[1:]]]
        elif "Tensor?[]" in kind or "List[Optional[Tensor]]" in kind:
            others = [[], value[:-1], value + value, [None] * len(value)]
        elif "List[Tensor]" in kind:
            others = [[], value[:-1], value + value[:1]]
        elif "List[int]" in kind:
            value = value or []  # left out, where its default is none
            others = [[], [-1], [0], *([*value[:-1], big] for big in BIG), [2**62, 2**62], [1, *value], value * 2]
        elif "Tensor" in kind or "Generator" in kind or "bool" in kind:
            continue
        elif name == "dtype":
            others = [-1, 5000, 127, 128, 255, torch.int32, torch.bool, torch.complex64, torch.float16]
        elif "int" in kind:
            others = [0, 1, 2, 3, 8, 9, 10, *BIG]
        elif "float" in kind:
            others = [0.0, -0.01, math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300]
        elif "str" in kind:
            others = ["", "lama", "torch\0", "LLAMA", "llama"]
        else:
            raise AssertionError(f"{name} of {kind}: no values here")
        for other in others:
            given = map_tensors(torch.clone, arguments) | {name: other}
            right_or_refused(call, given, f"{name}={str(other)[:200]}")
