"""A patched model trains as stock does."""

import functools

import pytest
import torch
import torch.distributed as dist
from test_hf_generate import FAMILIES, make_model, prompt
from test_hf_patch import kernels
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from torch_fused.hf import apply_torch_fused
from torch_fused.testing import relative_error


def train_step(model, **options):
    ids = prompt(2, 12)
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_steps_match(stock, patched):
    torch.testing.assert_close(patched[0], stock[0])
    for name, gradient in stock[1].items():
        torch.testing.assert_close(patched[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_stocks(family, use_cache):
    """Loss and every parameter's gradient, also with the cache that transformers makes by default."""
    stock, patched = make_model(family).train(), make_model(family).train()
    apply_torch_fused(patched)
    assert_steps_match(train_step(stock, use_cache=use_cache), train_step(patched, use_cache=use_cache))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "full"])
def test_gradients_under_every_attention(attention, heads):
    """With grouped heads and with as many key / value heads as heads, whose gradients come in other layouts."""
    stock, patched = (make_model(attn_implementation=attention, num_key_value_heads=heads).train() for _ in range(2))
    apply_torch_fused(patched)
    assert_steps_match(train_step(stock), train_step(patched))


def test_flex_attention():
    """Which has no backward on the CPU."""
    stock, patched = (make_model(attn_implementation="flex_attention") for _ in range(2))
    apply_torch_fused(patched)
    with torch.no_grad():
        torch.testing.assert_close(patched(prompt(2, 9)).logits, stock(prompt(2, 9)).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_still_works(family, reentrant):
    """Each layer is recomputed in backward: the patched forward keeps that, and the gradients."""
    stock, patched = make_model(family).train(), make_model(family).train()
    apply_torch_fused(patched)
    patched.enable_input_require_grads()
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    patched.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    assert_steps_match(train_step(stock), train_step(patched))
    assert len(calls) == 2
    with torch.no_grad():  # which needs no checkpoints, and takes the cache
        assert kernels(patched, prompt(1, 4))["add_rms_norm"] == 2


def checkpoint_layers(model, reentrant):
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, GradientCheckpointingLayer),
    )


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_from_outside(family, reentrant, patch_first):
    """Layers in torch's own wrapper, patched before or after: every gradient, and each layer is computed twice."""
    stock, patched = make_model(family).train(), make_model(family).train()
    steps = [lambda: apply_torch_fused(patched), lambda: checkpoint_layers(patched, reentrant)]
    for step in steps if patch_first else steps[::-1]:
        step()
    calls = []
    patched.get_submodule("model.norm").register_forward_hook(lambda *_: calls.append(0))
    next(m for m in patched.modules() if type(m).__name__.endswith("RMSNorm")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    expected, actual = train_step(stock, use_cache=False), train_step(patched, use_cache=False)
    assert sorted(calls) == [0, 1, 1]
    actual[1].update({name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in actual[1].items()})
    assert_steps_match(expected, actual)


def parallel_step(rank, family, how):
    """One rank's training step on its half of a batch: the gradients are the whole batch's."""
    ids = prompt(4, 12)
    stock, model = make_model(family).train(), make_model(family).train()
    stock(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: weight.grad for name, weight in stock.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    if how == "ddp":
        apply_torch_fused(model)
        model = nn.parallel.DistributedDataParallel(model)
    if how == "patched, then sharded":
        apply_torch_fused(model)
    if "sharded" in how:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if how == "sharded, then patched":
        report = apply_torch_fused(model).report()
        assert "2 x FSDP" in report and "DecoderLayer.forward" in report
    if how == "sharded, then patched, checkpointed":
        apply_torch_fused(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    half = ids[2 * rank : 2 * rank + 2]
    model(half, labels=half, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        name = name.removeprefix("module.")
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{how} {n}: {m}")


def parallel_steps(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family in FAMILIES:
        for how in ("ddp", "patched, then sharded", "sharded, then patched", "sharded, then patched, checkpointed"):
            parallel_step(rank, family, how)
    dist.destroy_process_group()


def test_parallel_training(tmp_path):
    """Two processes: DDP, and FSDP2 before and after the patch, give the gradients of the whole batch."""
    torch.multiprocessing.spawn(parallel_steps, (tmp_path,), nprocs=2)


def test_autocast():
    """Under autocast the residual stream stays float32 while the attention is bfloat16."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(patched(prompt(2, 9)).logits, stock(prompt(2, 9)).logits) < 2e-3


def test_compile():
    """The patched model compiles in one graph and gives stock's logits."""
    torch._dynamo.reset()
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt(1, 6), use_cache=False).logits, stock(prompt(1, 6)).logits)
