"""decode_ with packed matrices gives the same as with the unpacked matrices."""

import pytest
import torch
from decode_step import DTYPES, Packed, Shape, Step, adapters, pack, packed, token

from torch_fused.metal import emulate
from torch_fused.ops.decode import decode_, decode_reference
from torch_fused.ops.decoder import LAYER_PARTS, make_decoder
from torch_fused.ops.quantized import quantize
from torch_fused.testing import relative_error

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def shape_for(family: str = "qwen2", group_size: int = 32) -> Shape:
    """Sizes that are multiples of the group size; neither hidden nor intermediate is a whole block of a kernel."""
    return Shape(
        family, hidden=3 * group_size, heads=4, head_dim=group_size, intermediate=5 * group_size, rotary_dim=16
    )


def packed_step(bits=4, group_size=32, only=(*MATRICES, "embedding", "head"), family="qwen2", **options) -> Step:
    """A step of a model with the matrices in `only` packed."""
    step = Step(shape_for(family, group_size), **options)
    names = LAYER_PARTS * step.shape.layers
    step.model["layers"] = [
        pack(part, bits, group_size) if name in only else part
        for name, part in zip(names, step.model["layers"], strict=True)
    ]
    for name in {"embedding", "head"} & {*only}:
        step.model[name] = pack(step.model[name], bits, group_size)
    return step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_all_packed(backend, bits, group_size, dtype):
    packed_step(bits, group_size, dtype=dtype, device=backend.device).check()


@pytest.mark.parametrize("family", ["llama", "qwen3", "biased"])
@pytest.mark.parametrize(("batch", "steps", "length"), [(1, 1, 200), (3, 1, 33), (2, 4, 70), (8, 8, 5)])
def test_families_and_sizes(backend, family, batch, steps, length):
    """One vector and several, one chunk of the context and several."""
    starts = None if batch == 1 else [i % 3 for i in range(batch)]
    packed_step(family=family, batch=batch, steps=steps, length=length, starts=starts, device=backend.device).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "steps"), [(3, 1), (2, 4), (3, 5)])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, 128), (8, 64), (8, 128)])
def test_several_vectors(backend, bits, group_size, batch, steps, dtype):
    """On a GPU's matrix units: part of a block of vectors, a whole one, and more."""
    for family in ("biased", "gemma"):
        options = {"batch": batch, "steps": steps, "dtype": dtype, "device": backend.device}
        packed_step(bits, group_size, family=family, **options).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group_size", "family"), [(32, "biased"), (64, "gemma"), (128, "qwen3")])
def test_many_rows(backend, group_size, family, dtype):
    """A GPU has kernels of its own for one vector and many rows of four bits."""
    shape = Shape(family, 1, 3 * group_size, 4, 2, group_size, 16, intermediate=4224, vocabulary=8205)
    step = Step(shape, dtype=dtype, device=backend.device)
    names = zip(LAYER_PARTS, step.model["layers"], strict=True)
    layers = [pack(part, 4, group_size) if name in MATRICES else part for name, part in names]
    step.model.update(layers=layers, head=pack(step.model["head"], 4, group_size))
    step.check()


@pytest.mark.parametrize("rows", [8200, 42253])
def test_the_last_of_several_tokens(backend, rows):
    """A head with many rows multiplies one vector, which is not the first. With more, simdgroups take several tiles."""
    step = packed_step(group_size=64, only=(), steps=4, dtype=torch.bfloat16, logits_to_keep=1, device=backend.device)
    weight = step.weight(rows, step.shape.hidden)
    step.model["head"] = pack(weight, 4, 64)
    step.check()


@pytest.mark.parametrize("only", [("q",), ("k", "v"), ("o",), ("gate", "up"), ("down",), ("embedding",), ("head",)])
def test_some_packed(backend, only):
    packed_step(8, only=only, length=100, device=backend.device).check()


def test_mixed_formats(backend):
    """Bits, groups and dtypes of scales differ from matrix to matrix, and from the norms' dtype."""
    step = packed_step(only=(), group_size=128, length=100, device=backend.device)
    sizes = {"q": (4, 32), "k": (8, 64), "v": (4, 128), "o": (8, 32), "gate": (4, 64), "up": (4, 64), "down": (8, 128)}
    dtypes = {"q": torch.float16, "o": torch.bfloat16, "gate": torch.float16, "up": torch.float16}
    step.model["layers"] = [
        pack(part.to(dtypes.get(name, torch.float32)), *sizes[name]) if name in sizes else part
        for name, part in zip(LAYER_PARTS * 2, step.model["layers"], strict=True)
    ]
    step.model["embedding"] = pack(step.model["embedding"].half(), 4, 32)
    step.model["head"] = pack(step.model["head"].bfloat16(), 8, 64)
    step.check()


def test_tied_head(backend):
    step = packed_step(device=backend.device)
    step.model["head"] = step.model["embedding"]
    step.check()


def test_parts_of_larger_tensors(backend):
    """Rows with gaps between them, starting anywhere, are read in place."""
    step = packed_step(device=backend.device, length=100)
    for i, part in enumerate(step.model["layers"]):
        if isinstance(part, Packed):
            # uint32 tensors cannot be put together
            apart = [torch.cat([t.view(torch.int32)] * 2, 1)[:, : t.shape[1]].view(t.dtype) for t in part]
            assert not any(t.is_contiguous() for t in apart)
            step.model["layers"][i] = packed(*apart, part.dense)
    step.check()


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 64), (8, 128)])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 4)])
def test_int8_products(bits, group_size, batch, steps):
    """Vectors are rounded to int8 on a CPU: an error of at most 1 % with random weights, two layers and the head."""
    step = packed_step(bits, group_size, batch=batch, steps=steps)
    exact, _ = step.exact()
    assert 1e-5 < relative_error(step.run(int8_products=True), exact) < 1e-2


@pytest.mark.parametrize(("bits", "group_size", "only"), [(8, 32, (*MATRICES, "head")), (4, 64, ("v", "embedding"))])
def test_float_products_where_int8_does_not_pay(bits, group_size, only):
    """If int8 is not faster or too inexact, products use floats."""
    step = packed_step(bits, group_size, only=only)
    exact, _ = step.exact()
    assert relative_error(step.run(int8_products=True), exact) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters(backend, bits):
    """Low-rank adapters with packed matrices."""
    step = packed_step(bits, batch=2, steps=2, device=backend.device)
    step.model["adapters"] = adapters(step, 8)
    step.check()


def test_reference():
    step = packed_step(8, length=20)
    exact, _ = step.exact()
    model = make_decoder(**step.model)
    assert relative_error(decode_reference(model, *step.args.values()), exact) < 1e-5


@pytest.mark.parametrize("schedule", ["reversed", "random", "preemptive"])
def test_schedules(schedule):
    step = packed_step(batch=2, length=70)
    exact, _ = step.exact()
    with emulate(schedule=schedule):
        assert relative_error(decode_(make_decoder(**step.model), **step.args), exact) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, s, b: (w[:, :-1], s, b), "q of layer 1 must have rows of 96 codes of 4 or 8 bits, got 11 words"),
        (lambda w, s, b: (w[:-1], s, b), "q of layer 1 must have shape"),
        (lambda w, s, b: (w, s[:, :-1], b), "scales of q of layer 1 must be one for each 32, 64 or 128"),
        (lambda w, s, b: (w, s[:-1], b), "scales of q of layer 1 must have shape"),
        (lambda w, s, b: (w, s, b[:, :-1]), "biases of q of layer 1 must have shape"),
        (lambda w, s, b: (w, s.double(), b), "scales of q of layer 1 must be float32"),
        (lambda w, s, b: (w, s, b.half()), "biases of q of layer 1 must have the dtype of its scales"),
        (lambda w, s, b: (w.view(torch.int32), s, b), "q of layer 1 must have shape|q of layer 1 must be float32"),
    ],
)
def test_bad_matrices(change, message):
    step = packed_step()
    at = len(LAYER_PARTS) + LAYER_PARTS.index("q")
    step.model["layers"][at] = Packed(*change(*step.model["layers"][at]))
    with pytest.raises(RuntimeError, match=f"Decoder: ({message})"):
        make_decoder(**step.model)


def test_gate_and_up_have_the_same_format():
    step = packed_step()
    at = LAYER_PARTS.index("up")
    step.model["layers"][at] = pack(step.model["layers"][at].dense.float(), 8, 32)
    with pytest.raises(RuntimeError, match="Decoder: up of layer 0 must be packed as gate is"):
        make_decoder(**step.model)


def test_groups_of_no_matrix():
    step = packed_step()
    _, scales, biases = quantize(torch.zeros(2, 32), group_size=32)
    arguments = list(make_decoder(**step.model).arguments())
    arguments[4] = [*arguments[4], scales, biases]
    with pytest.raises(RuntimeError, match="Decoder: groups must have two tensors for each packed matrix"):
        torch.classes.torch_fused.Decoder(*arguments)
    arguments[4] = arguments[4][:-4]
    with pytest.raises(RuntimeError, match="Decoder: groups must have the scales and the biases of down of layer 1"):
        torch.classes.torch_fused.Decoder(*arguments)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_reads_the_least_bytes(bits):
    """Codes, scales, biases and the context are read once: at most 1.05 times, including intermediate results."""
    shape = Shape("qwen3", 1, 1024, 8, 2, 64, 64, intermediate=2048, vocabulary=2000)
    step = Step(shape, length=1000, dtype=torch.bfloat16)
    named = zip(LAYER_PARTS, step.model["layers"], strict=True)
    layers = [pack(part, bits, 64) if name in MATRICES else part for name, part in named]
    step.model.update(layers=layers, head=pack(step.model["head"], bits, 64))
    with emulate() as run:
        token(step)
    read = [part if isinstance(part, Packed) else (part,) for part in (*layers, step.model["head"]) if part is not None]
    least = sum(t.nbytes for parts in read for t in parts) + 2 * 1000 * 2 * 64 * 2
    moved = sum(buffer.distinct_read + buffer.written for launch in run.launches for buffer in launch.buffers)
    assert least <= moved <= 1.05 * least
