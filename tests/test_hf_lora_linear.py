"""Adapters of PEFT that are added by their products in training: stock's gradients, whatever is around them."""

import copy
import pickle

import peft
import pytest
import torch
from test_hf_generate import make_model, one_thread, prompt  # noqa: F401  (a fixture)
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from torch_fused.hf import apply_torch_fused
from torch_fused.testing import relative_error

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]


def adapted(model=None, **options):
    """A model with adapters that have an effect, in training."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **options})
    model = peft.get_peft_model(make_model() if model is None else model, config).train()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def layer_of(model):
    return model.get_base_model().model.layers[1].self_attn.q_proj


def step(model, seed=1, **options):
    """The loss and the gradients that there are."""
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout
    ids = prompt(2, 9)
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), {name: grad.clone() for name, grad in grads.items()}


def assert_same_steps(stock, patched, **options):
    (expected, wanted), (loss, found) = step(stock, **options), step(patched, **options)
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


def is_fused(layer, **options):
    x = torch.randn(2, 3, layer.in_features, requires_grad=True, **options)
    return type(layer(x).grad_fn).__name__ == "_LoraLinearBackward"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_is_stocks(family, dropout):
    """With biases below (Qwen2) and without, where the input needs a gradient and, in the first layer, none."""
    stock, patched = (adapted(make_model(family), lora_dropout=dropout) for _ in range(2))
    assert "9 x Linear.forward" in apply_torch_fused(patched).report()  # the head's is one
    assert is_fused(layer_of(patched))
    assert_same_steps(stock, patched)
    assert_same_steps(stock, patched)  # the gradients of a second step, with other strides to add to


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_tokens(dropout):
    """An expert that no token has chosen gets such an input."""
    patched = adapted(lora_dropout=dropout)
    apply_torch_fused(patched)
    layer = layer_of(patched)
    x = torch.empty(0, layer.in_features, requires_grad=True)
    result = layer(x)
    assert is_fused(layer) and result.shape == (0, layer.out_features)
    result.sum().backward()
    assert x.grad is not None and all(not w.grad.any() for w in layer.parameters() if w.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    """As near to float32's as stock."""
    exact = step(adapted())[1]
    models = [adapted().to(dtype) for _ in range(2)]
    apply_torch_fused(models[1])
    assert is_fused(layer_of(models[1]), dtype=dtype)
    theirs, found = (step(model)[1] for model in models)
    for name, grad in exact.items():
        assert relative_error(found[name], grad) < 1.5 * relative_error(theirs[name], grad) + 0.01, name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, dropout):
    """Of float32 weights, and of a bfloat16 model, beside which PEFT keeps adapters in float32."""
    exact = step(adapted(lora_dropout=dropout))[1]
    models = [adapted(make_model(dtype=base), lora_dropout=dropout) for _ in range(2)]
    apply_torch_fused(models[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_fused(layer_of(models[1]))
        steps = [step(model)[1] for model in models]
    for name, grad in exact.items():
        assert steps[1][name].dtype == torch.float32
        assert relative_error(steps[1][name], grad) < 1.5 * relative_error(steps[0][name], grad) + 0.01, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    stock, patched = adapted(lora_dropout=0.3), adapted(lora_dropout=0.3)
    mixed = adapted(make_model(dtype=torch.bfloat16), lora_dropout=0.3)
    for model in (patched, mixed):
        apply_torch_fused(model)
    for model in (stock, patched, mixed):
        model.enable_input_require_grads()
    kept = step(mixed)
    for model in (stock, patched, mixed):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_steps(stock, patched)
    recomputed = step(mixed)
    assert torch.equal(recomputed[0], kept[0])
    assert all(torch.equal(grad, kept[1][name]) for name, grad in recomputed[1].items())


def test_without_gradients_the_bits_are_stocks():
    """Evaluation, and adapters that are frozen."""
    stock, patched = adapted().bfloat16().eval(), adapted().bfloat16().eval()
    apply_torch_fused(patched, decode=False, loss=False)
    ids = prompt(2, 9)
    with torch.no_grad():
        assert torch.equal(patched(input_ids=ids).logits, stock(input_ids=ids).logits)
    for model in (stock, patched):
        model.requires_grad_(False)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(layer_of(patched)(x), layer_of(stock)(x))


def hooked(model):
    layer_of(model).lora_A["default"].register_forward_hook(lambda module, args, result: result * 2)


def hooked_base(model):
    layer_of(model).base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced(model):
    b = layer_of(model).lora_B["default"]
    b.forward = lambda x: 2 * nn.functional.linear(x, b.weight)


def trained_base(model):
    layer_of(model).base_layer.weight.requires_grad_()


def trained_bias(model):
    layer_of(model).base_layer.bias.requires_grad_()


def trained_half(model):
    layer_of(model).lora_A["default"].weight.requires_grad_(False)


def second(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def disabled(model):
    model.base_model.disable_adapter_layers()
    layer_of(model).base_layer.weight.requires_grad_()


def merged(model):
    model.merge_adapter()
    layer_of(model).base_layer.weight.requires_grad_()


def rescaled(model):
    layer_of(model).scaling["default"] *= 3


CHANGES = [hooked, hooked_base, replaced, trained_base, trained_bias, trained_half, second, disabled, merged, rescaled]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_patch(change):
    """Each call looks at the layer as it is, and again once the patch is taken back."""
    stock, patched = adapted(), adapted()
    handle = apply_torch_fused(patched)
    for model in (stock, patched):
        torch.manual_seed(0)
        change(model)
    assert is_fused(layer_of(patched)) == (change is rescaled)
    assert_same_steps(stock, patched)
    handle.revert()
    assert "forward" not in layer_of(patched).__dict__
    assert_same_steps(stock, patched)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_other_adapters(options):
    stock, patched = adapted(**options), adapted(**options)
    apply_torch_fused(patched)
    assert is_fused(layer_of(patched)) == ("use_rslora" in options)
    assert_same_steps(stock, patched)


def results(layer, x, seed=1):
    """The output of a layer, and the gradients of the input and the adapter."""
    torch.manual_seed(seed)  # of dropout
    x = x.detach().requires_grad_()
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    y = layer(x)
    weight_of_rows = torch.arange(1, 1 + y[..., 0].numel()).view(*y.shape[:-1], 1).to(y.dtype)
    return [y, *torch.autograd.grad((y * weight_of_rows).sum(), [x, *weights])]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_beside_16_bits(dtype, options, dropout):
    """PEFT's default. As near to the float64 results of the same weights as PEFT."""
    stock, patched, exact = (adapted(make_model(dtype=dtype), lora_dropout=dropout, **options) for _ in range(3))
    apply_torch_fused(patched)
    assert layer_of(patched).lora_A["default"].weight.dtype == torch.float32
    assert is_fused(layer_of(patched), dtype=dtype)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs, ours = (results(layer_of(model), x) for model in (stock, patched))
    wanted = results(layer_of(exact.double()), x.double())
    for found, peft_found, value in zip(ours, theirs, wanted, strict=True):
        assert found.dtype == peft_found.dtype
        assert relative_error(found, value) < 1.05 * relative_error(peft_found, value) + 1e-6
    wanted = step(exact)[1]
    theirs, ours = (step(model)[1] for model in (stock, patched))
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        assert relative_error(grad, wanted[name]) < 1.5 * relative_error(theirs[name], wanted[name]) + 0.01, name


def test_float32_adapters_save_less():
    """The input stays in 16 bits, of which PEFT makes float32."""

    def saved(model):
        seen = {}
        x = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            layer_of(model)(x)
        own = {weight.data_ptr() for weight in model.parameters()}
        return sum(t.nbytes for place, t in seen.items() if place not in own)

    stock, patched = (adapted(make_model(dtype=torch.bfloat16)) for _ in range(2))
    apply_torch_fused(patched)
    assert saved(patched) < saved(stock)


@pytest.mark.parametrize("base, a, b", [("float32", "bfloat16", "bfloat16"), ("bfloat16", "float16", "float16")])
def test_other_mixes_are_left(base, a, b):
    stock, patched = (adapted(make_model(dtype=getattr(torch, base))) for _ in range(2))
    apply_torch_fused(patched)
    for model in (stock, patched):
        layer_of(model).lora_A["default"].to(getattr(torch, a))
        layer_of(model).lora_B["default"].to(getattr(torch, b))
    x = torch.randn(2, 3, 64, dtype=getattr(torch, base))
    assert not is_fused(layer_of(patched), dtype=x.dtype)
    for found, expected in zip(results(layer_of(patched), x), results(layer_of(stock), x), strict=True):
        assert torch.equal(found, expected)


def test_an_input_that_is_not_cast():
    """PEFT's context in which a layer in 16 bits cannot have such an adapter, but a layer with hooks that cast can."""
    stock, patched = (adapted(make_model(dtype=torch.bfloat16)) for _ in range(2))
    apply_torch_fused(patched)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    for model in (stock, patched):
        with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            layer_of(model)(x)


def test_backward_under_autocast():
    """It does not change the dtypes that forward has chosen."""
    stock, patched = adapted(), adapted()
    apply_torch_fused(patched)
    x = torch.randn(2, 3, 64, requires_grad=True)
    expected = results(layer_of(stock), x)[1]
    y = layer_of(patched)(x)
    weight_of_rows = torch.arange(1.0, 7).view(2, 3, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad((y * weight_of_rows).sum(), x)
    torch.testing.assert_close(found, expected)


def test_on_no_device():
    patched = adapted()
    apply_torch_fused(patched)
    layer = layer_of(patched).to("meta")
    assert layer(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, layer.out_features)


def test_the_flag():
    patched = adapted()
    with apply_torch_fused(patched, adapters=False):
        assert not is_fused(layer_of(patched))
    with apply_torch_fused(patched):
        assert is_fused(layer_of(patched))
        assert is_fused(layer_of(copy.deepcopy(patched))) and is_fused(layer_of(pickle.loads(pickle.dumps(patched))))
    assert not is_fused(layer_of(patched))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_and_transforms(dtype):
    """Double backward goes through all operands; torch.func and forward mode go PEFT's way."""
    stock, patched = (adapted(make_model(dtype=dtype)) for _ in range(2))
    apply_torch_fused(patched)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    results = []
    for model in (stock, patched):
        layer = layer_of(model)
        weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        first = torch.autograd.grad(layer(x).square().sum(), weights, create_graph=True)
        second_order = torch.autograd.grad(sum(grad.square().sum() for grad in first), weights)
        named = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
        of_func = torch.func.grad(lambda given, layer=layer: functional_call(layer, given, (x,)).square().sum())(named)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))).tangent
        results.append([*first, *second_order, *of_func.values(), tangent])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) < (1e-6 if dtype == torch.float32 else 0.01)


def test_compile():
    torch._dynamo.reset()
    stock, patched = adapted(), adapted()
    apply_torch_fused(patched)
    compiled = torch.compile(patched, backend="aot_eager")
    expected, actual = step(stock), step(compiled)
    torch.testing.assert_close(actual[0], expected[0])
    for (name, grad), wanted in zip(actual[1].items(), expected[1].values(), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_merging_after_training():
    """The trained adapters are the modules' own: merging and saving them needs nothing of the patch."""
    stock, patched = adapted(), adapted()
    handle = apply_torch_fused(patched)
    for model in (stock, patched):
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
        for _ in range(3):
            step(model)
            optimizer.step()
    merged_stock, merged_patched = stock.merge_and_unload(), patched.merge_and_unload()
    ids = prompt(2, 9)
    torch.testing.assert_close(merged_patched(ids).logits, merged_stock(ids).logits, rtol=1e-4, atol=1e-4)
    handle.revert()
