"""kv_append_: values, errors, and its behaviour under autograd, inference mode and compile."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.library import opcheck

from torch_fused.metal import emulate
from torch_fused.ops.kv_cache import kv_append_, kv_append_reference, kv_update_
from torch_fused.testing import make


def buffers(dtype=torch.float32, batch=2, heads=3, capacity=9, head_dim=5, value_dim=4, device="cpu"):
    keys = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
    return keys, torch.zeros(batch, heads, capacity, value_dim, dtype=dtype, device=device)


def states(tokens=2, dtype=torch.float32, batch=2, heads=3, head_dim=5, value_dim=4, device="cpu"):
    new_keys = make(batch, heads, tokens, head_dim, dtype=dtype, device=device, seed=1)
    return new_keys, make(batch, heads, tokens, value_dim, dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize("position", [0, 3, 7])
def test_writes_only_the_tokens_at_position(backend, position):
    """Every dtype, keys and values of different widths; the rest of the buffers keeps its values."""
    for dtype in backend.dtypes:
        keys, values = buffers(dtype, device=backend.device)
        new_keys, new_values = states(dtype=dtype, device=backend.device)
        expected = keys.clone(), values.clone()
        kv_append_reference(*expected, new_keys, new_values, position)
        kv_append_(keys, values, new_keys, new_values, position)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])
        assert keys.count_nonzero() == new_keys.count_nonzero()


def test_any_strides(backend):
    """Attention passes transposed states; the buffers may be views, and nothing outside them is written."""
    new_keys = make(2, 2, 3, 5, device=backend.device).transpose(1, 2)  # tokens before heads in memory
    new_values = make(2, 3, 4, 2, seed=3, device=backend.device).transpose(2, 3)  # head_dim not innermost
    around = torch.zeros(2, 3, 9, 16, device=backend.device)
    keys, values = around[..., 1:6], around[..., 7:15:2]
    expected = buffers(device=backend.device)
    kv_append_reference(*expected, new_keys, new_values, 4)
    kv_append_(keys, values, new_keys, new_values, 4)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    assert around.count_nonzero() == new_keys.numel() + new_values.numel()


def test_update_appends_and_views_what_is_in_use():
    """kv_update_ writes the same as kv_append_; the results are views of the buffers, not copies."""
    keys, values = buffers()
    new_keys, new_values = states()
    used_keys, used_values = kv_update_(keys, values, new_keys, new_values, 3)
    assert used_keys.shape == (2, 3, 5, 5)
    assert used_values.shape == (2, 3, 5, 4)
    assert used_keys.data_ptr() == keys.data_ptr()
    assert used_values.data_ptr() == values.data_ptr()
    assert torch.equal(used_keys[:, :, 3:], new_keys)
    assert torch.equal(used_values[:, :, 3:], new_values)


def test_many_tokens_are_copied_by_several_threads():
    """A long prompt is copied by several threads; two of them meet in the middle of a head."""
    keys, values = buffers(batch=1, heads=3, capacity=3000, head_dim=64, value_dim=64)
    new_keys, new_values = states(tokens=2999, batch=1, heads=3, head_dim=64, value_dim=64)
    kv_append_(keys, values, new_keys, new_values, 1)
    assert torch.equal(keys[:, :, 1:], new_keys)
    assert torch.equal(values[:, :, 1:], new_values)


def test_no_tokens(backend):
    """Appending no tokens is not an error, even at the end of the buffers."""
    keys, values = buffers(device=backend.device)
    kv_append_(keys, values, *states(tokens=0, device=backend.device), 9)
    assert keys.count_nonzero() == values.count_nonzero() == 0


BAD_ARGUMENTS = {
    "keys must be .batch, heads, capacity, head_dim.": lambda k, v, nk, nv: (k[0], v, nk, nv, 0),
    "new_keys must be .2, 3, tokens, 5.": lambda k, v, nk, nv: (k, v, nk[:1], nv, 0),
    "new_values must be .2, 3, tokens, 4.": lambda k, v, nk, nv: (k, v, nk, nk, 0),
    "new_keys must have the dtype of keys": lambda k, v, nk, nv: (k, v, nk.half(), nv, 0),
    "new_values must have the dtype of values": lambda k, v, nk, nv: (k, v, nk, nv.double(), 0),
    "values must have the batch and heads of keys": lambda k, v, nk, nv: (k, v[:, :2], nk, nv[:, :2], 0),
    "values must have keys's dtype": lambda k, v, nk, nv: (k, v.half(), nk, nv.half(), 0),
    "new_values must have as many tokens": lambda k, v, nk, nv: (k, v, nk, nv[:, :, :1], 0),
    "position must be from 0 to 7 .* got -1": lambda k, v, nk, nv: (k, v, nk, nv, -1),
    "position must be from 0 to 7 .* got 8": lambda k, v, nk, nv: (k, v, nk, nv, 8),
    "position must be from 0 to 6 .* in values": lambda k, v, nk, nv: (k, v[:, :, :8], nk, nv, 7),
    "values must not be an expanded tensor": lambda k, v, nk, nv: (k, v[:1].expand(2, -1, -1, -1), nk, nv, 0),
    "new_keys must not share memory with keys": lambda k, v, nk, nv: (k, v, k[:, :, 1:3], nv, 0),
    "new_values must not share memory with keys": lambda k, v, nk, nv: (k, v, nk, k[:, :, 1:3, 1:], 0),
    "new_keys must not share memory with values": lambda k, v, nk, nv: (k[..., :4], v, v[:, :, 7:], nv, 0),
    "values must not share memory with keys": lambda k, v, nk, nv: (k, k, nk, nk, 0),
    "keys must not share memory with values": lambda k, v, nk, nv: (k[..., 1:], k[..., :4], nk[..., 1:], nv, 0),
    "keys must not be an expanded tensor or another whose": lambda k, v, nk, nv: (
        k.as_strided((2, 3, 9, 5), (45, 15, 1, 1)),
        v,
        nk,
        nv,
        0,
    ),
    "position must be from 0 to 7 .* got 9223372036854775807": lambda k, v, nk, nv: (k, v, nk, nv, 2**63 - 1),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_refuses_bad_arguments_before_writing(backend, message):
    """The message names the op and the argument; neither buffer is written."""
    keys, values = buffers(device=backend.device)
    arguments = BAD_ARGUMENTS[message](keys, values, *states(device=backend.device))
    with pytest.raises(RuntimeError, match=f"kv_append_: {message}"):
        kv_append_(*arguments)
    assert keys.count_nonzero() == values.count_nonzero() == 0


def test_buffers_side_by_side(backend):
    """Views of one buffer without common elements are allowed, interleaved or not."""
    whole = torch.zeros(2, 3, 9, 18, device=backend.device)
    for keys, values in ((whole[..., :5], whole[..., 5:9]), (whole[..., :10:2], whole[..., 1:9:2])):
        new_keys, new_values = states(device=backend.device)
        kv_append_(keys, values, new_keys, new_values, 3)
        assert torch.equal(keys[:, :, 3:5], new_keys) and torch.equal(values[:, :, 3:5], new_values)
        kv_append_(keys, values, whole[:, :, :2, 10:15], whole[:, :, 4:6, 14:], 0)


# ---- GPU kernel -----------------------------------------------------------------------------------------------------

SCHEDULES = [("sequential", 0), ("reversed", 0), ("random", 0), ("random", 1), ("random", 2), ("preemptive", 0)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_every_schedule_is_clean(schedule, seed):
    """No thread depends on another: packs and elements, several threadgroups."""
    for head_dim in (5, 64):
        keys, values = buffers(head_dim=head_dim, value_dim=64)
        new_keys, new_values = states(tokens=6, head_dim=head_dim, value_dim=64)
        with emulate(schedule=schedule, seed=seed):
            kv_append_(keys, values, new_keys, new_values, 2)
        assert torch.equal(keys[:, :, 2:8], new_keys)
        assert torch.equal(values[:, :, 2:8], new_values)


@pytest.mark.parametrize("head_dim", [5, 64])
def test_traffic(head_dim):
    """One launch reads each new element once, transposed states in place, and writes it once."""
    keys, values = buffers(head_dim=head_dim, value_dim=head_dim)
    new = [make(2, 6, 3, head_dim, seed=s).transpose(1, 2) for s in range(2)]
    with emulate() as run:
        kv_append_(keys, values, *new, 2)
    (launch,) = run.launches
    assert sum(b.read + b.written for b in launch.buffers[:-1]) == 2 * sum(t.nbytes for t in new)


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_refuses_to_lose_a_gradient():
    """States that require grad are an error under grad mode, and fine under no_grad; a tangent always is one."""
    keys, values = buffers()
    new_keys, new_values = states()
    new_values.requires_grad_()
    with pytest.raises(RuntimeError, match="kv_append_: new_values requires grad"):
        kv_append_(keys, values, new_keys, new_values, 0)
    with torch.no_grad():
        kv_append_(keys, values, new_keys, new_values, 0)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="kv_append_: new_keys has a tangent"):
            kv_append_(keys, values, forward_ad.make_dual(new_keys, new_keys), new_values, 2)
    assert torch.equal(values[:, :, :2], new_values)


def test_refuses_vmap():
    """Torch cannot batch this in-place write, and the error says so."""
    tensors = [torch.stack([t, t]) for t in (*buffers(), *states())]
    for op in (kv_append_, kv_update_):
        with pytest.raises(
            RuntimeError, match=rf"{op.__name__.removesuffix('.default')}: torch.func.vmap cannot batch"
        ):
            torch.func.vmap(lambda *ts, op=op: op(*ts, 0))(*tensors)


def test_autograd_sees_the_write():
    """A buffer saved for backward and then appended to is reported by autograd, not used silently."""
    keys, values = buffers()
    weight = torch.ones(2, 3, 9, 5, requires_grad=True)
    product = (keys * weight).sum()
    kv_append_(keys, values, *states(), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_failed_call_is_no_change_for_autograd():
    """Tensors that autograd saved are still valid after an append that raised."""
    keys, values = buffers()
    weight = torch.ones(2, 3, 9, 5, requires_grad=True)
    product = (keys * weight).sum()
    with pytest.raises(RuntimeError, match="position must be"):
        kv_append_(keys, values, *states(), 8)
    product.backward()
    assert torch.equal(weight.grad, keys)


def test_inference_tensors():
    """As for torch's in-place ops, an inference tensor can be written only in inference mode."""
    with torch.inference_mode():
        keys, values = buffers()
        kv_append_(keys, values, *states(), 0)
    assert keys.count_nonzero() > 0
    before = keys.clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        kv_append_(keys, values, *states(), 4)
    assert torch.equal(keys, before)


def test_opcheck():
    """Schema, autograd registration, fake tensors and AOT dispatch, static and dynamic."""
    opcheck(torch.ops.torch_fused.kv_append_.default, (*buffers(), *states(), 3))


@pytest.mark.parametrize("op", [kv_append_, kv_update_])
def test_compiles_without_graph_breaks(op):
    """One graph serves every position, through AOT autograd too."""
    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    step = torch.compile(op, fullgraph=True, dynamic=True, backend=compile_graph)
    keys, values = buffers()
    new_keys, new_values = states()
    for position in (2, 4, 6):
        step(keys, values, new_keys, new_values, position)
        assert torch.equal(keys[:, :, position : position + 2], new_keys)
        assert torch.equal(values[:, :, position : position + 2], new_values)
    assert len(graphs) == 1
