"""Gradients of whole patched models are the same as stock's, for every attention implementation."""

import pytest
import torch
from test_hf_generate import FAMILIES, make_model, prompt
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_fused.hf import apply_torch_fused
from torch_fused.metal import emulate
from torch_fused.testing import layouts, relative_error

IMPLEMENTATIONS = ["eager", "sdpa"]  # the others have no backward pass on the CPU
LAYOUTS = [name for name, _ in layouts(torch.zeros(2, 3, 4, 5), written=True)]


class LaidOut(torch.autograd.Function):
    """Returns its argument; the gradient comes in another layout."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return dict(layouts(grad))[ctx.layout], None


@pytest.fixture(params=LAYOUTS)
def attention(request):
    """The name of a user's attention function, which returns gradients in one layout."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        query, key, value = (LaidOut.apply(states, request.param) for states in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    name = "laid_out_" + request.param.replace(" ", "_")
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield name
    del ALL_ATTENTION_FUNCTIONS._global_mapping[name], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def gradients(model, ids, **inputs):
    model.zero_grad()
    model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check(model, ids, tolerance=2e-5, **inputs):
    """Every parameter's gradient, relative to its own size or, if that is very small, to the largest."""
    expected = gradients(model, ids, **inputs)
    with apply_torch_fused(model):
        actual = gradients(model, ids, **inputs)
    assert actual.keys() == expected.keys()
    largest = max(float(e.norm()) for e in expected.values())
    for name, e in expected.items():
        error = relative_error(actual[name], e) if e.norm() > 1e-6 * largest else (actual[name] - e).norm() / largest
        assert error < tolerance, f"{name}: {error:.3g}"


# As many key and value heads as heads: eager attention's gradient of the keys comes transposed.
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_implementation(family, implementation, kv_heads):
    """A padded batch and one without padding, one token and several."""
    model = make_model(family, num_key_value_heads=kv_heads, attn_implementation=implementation).train()
    check(model, prompt(2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    check(model, prompt(2, 7), attention_mask=mask)
    check(model, prompt(3, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_of_the_users(family, attention):
    """Gradients of queries, keys and values in every layout."""
    model = make_model(family, num_key_value_heads=2, attn_implementation=attention).train()
    check(model, prompt(2, 7))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_in_the_emulator(implementation):
    """The Metal kernels' gradients, in the layouts that attention returns."""
    model = make_model("qwen3", num_key_value_heads=4, attn_implementation=implementation).train()
    expected = gradients(model, prompt(2, 5))
    with emulate(), apply_torch_fused(model):
        actual = gradients(model, prompt(2, 5))
    for name, e in expected.items():
        assert relative_error(actual[name], e) < 2e-5, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16(family, implementation):
    """As close to float32's gradients as stock's."""
    exact = gradients(
        make_model(family, num_key_value_heads=4, attn_implementation=implementation).train(), prompt(2, 7)
    )
    model = make_model(family, num_key_value_heads=4, attn_implementation=implementation, dtype=torch.bfloat16).train()
    stock = gradients(model, prompt(2, 7))
    with apply_torch_fused(model):
        ours = gradients(model, prompt(2, 7))
    for name, e in exact.items():
        assert relative_error(ours[name], e) < 1.5 * relative_error(stock[name], e) + 0.01, name
