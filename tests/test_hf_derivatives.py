"""A patched model differentiates as transformers' own: forward mode, second order, batches of samples and of models."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from torch_fused.hf import apply_torch_fused
from torch_fused.testing import make, relative_error

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "attn_implementation": "eager",
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
IDS = torch.arange(10).view(2, 5) * 7 % 50


@pytest.fixture(params=FAMILIES)
def models(request):
    """transformers' own and a patched copy, in float64."""
    torch.manual_seed(0)
    stock = FAMILIES[request.param]().double().eval()
    ours = copy.deepcopy(stock)
    apply_torch_fused(ours)
    return stock, ours


def parameters_of(model, seed=None):
    """The parameters, or a direction for each."""
    return {
        name: p.detach() if seed is None else make(*p.shape, dtype=p.dtype, seed=seed + i)
        for i, (name, p) in enumerate(model.named_parameters())
    }


def logits(model, parameters, ids=IDS):
    return functional_call(model, parameters, (ids,), {"use_cache": False}).logits


def loss(model, parameters, ids=IDS):
    return logits(model, parameters, ids).square().mean()


def flat(value):
    return torch.cat([leaf.detach().flatten() for leaf in torch.utils._pytree.tree_leaves(value)])


def assert_alike(models, derivative):
    expected, actual = (flat(derivative(model)) for model in models)
    # transformers' rotary tables and norms use float32 even here
    assert relative_error(actual, expected) < 1e-5


def test_forward_mode(models):
    assert_alike(models, lambda m: jvp(lambda p: logits(m, p), (parameters_of(m),), (parameters_of(m, 1),)))


def test_per_sample_gradients(models):
    assert_alike(models, lambda m: vmap(grad(lambda p, row: loss(m, p, row[None])), (None, 0))(parameters_of(m), IDS))


def test_hessian_times_vector(models):
    assert_alike(models, lambda m: jvp(grad(lambda p: loss(m, p)), (parameters_of(m),), (parameters_of(m, 1),)))


def test_double_backward(models):
    def penalty(model):
        parameters = list(model.parameters())
        value = model(IDS, use_cache=False).logits.square().mean()
        gradients = torch.autograd.grad(value, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)

    assert_alike(models, penalty)


def test_ensemble(models):
    """One call of several models' parameters."""

    def outputs(model):
        parameters, other = parameters_of(model), parameters_of(model, 1)
        return vmap(lambda p: logits(model, p))(
            {n: torch.stack([p, p + 0.1 * other[n]]) for n, p in parameters.items()}
        )

    assert_alike(models, outputs)
