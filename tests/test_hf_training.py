"""A patched model trains as stock does."""

import collections
import functools

import peft
import pytest
import torch
import torch.distributed as dist
from test_hf_generate import FAMILIES, make_model, prompt
from test_hf_patch import kernels
from tokens import small_tokenizer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from torch_fused.hf import apply_torch_fused
from torch_fused.hf.loss import Logits
from torch_fused.optim import AdamW
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
    """Loss and every parameter's gradient, also with transformers' default cache."""
    stock, patched = make_model(family).train(), make_model(family).train()
    apply_torch_fused(patched)
    assert_steps_match(train_step(stock, use_cache=use_cache), train_step(patched, use_cache=use_cache))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "full"])
def test_gradients_under_every_attention(attention, heads):
    """With grouped heads and with equal numbers of heads, where gradients come in other layouts."""
    stock, patched = (make_model(attn_implementation=attention, num_key_value_heads=heads).train() for _ in range(2))
    apply_torch_fused(patched)
    assert_steps_match(train_step(stock), train_step(patched))


def test_flex_attention():
    """It has no backward on the CPU."""
    stock, patched = (make_model(attn_implementation="flex_attention") for _ in range(2))
    apply_torch_fused(patched)
    with torch.no_grad():
        torch.testing.assert_close(patched(prompt(2, 9)).logits, stock(prompt(2, 9)).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_still_works(family, reentrant):
    """Each layer is recomputed in backward, also when patched, and the gradients are right."""
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


class Calls(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_fused":
            self.counts[func._opname] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_addition_before_a_norm_stays_fused_when_checkpointed(family, reentrant):
    """In forward and again in backward; a passed cache is dropped, as in transformers."""
    stock, patched = make_model(family).train(), make_model(family).train()
    apply_torch_fused(patched)
    patched.enable_input_require_grads()
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with Calls() as calls:
        step = train_step(patched, use_cache=True)
    assert calls.counts["add_rms_norm"] == 2 * 2
    assert_steps_match(train_step(stock), step)


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
    """Layers in torch's own wrapper, patched before or after: every gradient is right, and each layer runs twice."""
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
    """One rank's training step on its half of a batch: the gradients are those of the whole batch."""
    ids = prompt(4, 12)
    stock, model = make_model(family).train(), make_model(family).train()
    stock(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: weight.grad for name, weight in stock.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    patched = model
    if how.startswith("ddp"):
        apply_torch_fused(model)
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters="searched" in how)
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
    outputs = model(half, labels=half, use_cache=False)
    outputs.loss.backward()
    assert "logits were made" not in apply_torch_fused(patched).report()
    if "sharded" in how:
        with pytest.raises(RuntimeError, match="FSDP has freed them"):
            outputs.logits.argmax(-1)
    for name, weight in model.named_parameters():
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        name = name.removeprefix("module.")
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{how} {n}: {m}")


DDP = "ddp", "ddp, unused parameters searched"


def sharded_logits(rank, sharded, reshard):
    """One rank's gradients of the loss and of logits that are read, in a model whose head may be sharded alone."""
    ids = prompt(4, 12)
    stock, model = make_model().train(), make_model().train()
    mesh = init_device_mesh("cpu", (2,))
    apply_torch_fused(model)
    for layer in (*model.model.layers, *([model.lm_head] if sharded == "head" else [])):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    for step_model, rows in ((stock, ids), (model, ids[2 * rank : 2 * rank + 2])):
        outputs = step_model(rows, labels=rows, use_cache=False)
        (outputs.loss + outputs.logits.square().mean()).backward()
    for (name, weight), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(weight.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    if sharded == "model":  # logits of weights that are whole again, after a step
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        old = model(ids, labels=ids, use_cache=False)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.reshard()
        model(ids, labels=ids, use_cache=False)
        with pytest.raises(RuntimeError, match="weights have changed"):
            old.logits.argmax(-1)


def logits_of_other_heads(rank):
    """One rank's models with heads of one shape: the step of one does not concern the logits of the others."""
    ids = prompt(2, 12)
    mesh = init_device_mesh("cpu", (2,))
    models = [make_model().train() for _ in range(3)]
    for model in models:
        apply_torch_fused(model)
    for model in models[:2]:
        fully_shard(model, mesh=mesh)
    stepped, *others = [model(ids, labels=ids, use_cache=False) for model in models]
    stepped.loss.backward()
    torch.optim.SGD(models[0].parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="weights have changed"):
        stepped.logits.argmax(-1)
    expected = make_model()(ids).logits
    for outputs in others:
        assert type(outputs.logits) is Logits
        torch.testing.assert_close(outputs.logits + 0, expected)
    models[0].unshard()
    with pytest.raises(RuntimeError, match="weights have changed"):
        stepped.logits.argmax(-1)


def parallel_steps(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family in FAMILIES:
        for how in (*DDP, "patched, then sharded", "sharded, then patched", "sharded, then patched, checkpointed"):
            parallel_step(rank, family, how)
    sharded_logits(rank, "model", None)
    sharded_logits(rank, "head", True)
    logits_of_other_heads(rank)
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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_under_autocast(checkpointed):
    """Loss and gradients are as close to float32's as stock's, also when layers are recomputed."""
    exact = train_step(make_model().train())
    steps = []
    for patch in (False, True):
        model = make_model().train()
        if patch:
            apply_torch_fused(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps.append(train_step(model, use_cache=False))
    errors = [
        [relative_error(step[1][name].flatten(), exact[1][name].flatten().double()) for name in exact[1]]
        for step in steps
    ]
    assert max(errors[1]) <= 1.2 * max(errors[0]) < 0.1
    assert float(steps[1][0]) == pytest.approx(float(exact[0]), rel=1e-2)


def adapted(patch, dropout=0.0):
    """A model in training with unmerged adapters that have an effect."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout)
    model = peft.get_peft_model(make_model(), config).train()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    if patch:
        apply_torch_fused(model)
    return model


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_that_are_not_merged(dropout, checkpointed):
    """The adapters' gradients are stock's, with the same dropout; other weights have none."""
    steps = []
    for patch in (False, True):
        model = adapted(patch, dropout)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        loss, grads = train_step(model, use_cache=False)
        assert all(("lora_" in name) == (grad is not None) for name, grad in grads.items())
        steps.append((loss, {name: grad for name, grad in grads.items() if grad is not None}))
    assert_steps_match(*steps)


def test_a_compiled_step():
    """torch.compile of a model in training: stock's loss and gradients."""
    torch._dynamo.reset()
    stock, patched = make_model().train(), make_model().train()
    apply_torch_fused(patched)
    compiled = torch.compile(patched, backend="aot_eager")
    ids = prompt(2, 12)
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    grads = {name: weight.grad for name, weight in patched.named_parameters()}
    loss = patched(ids, labels=ids, use_cache=False).loss.detach()
    assert_steps_match(train_step(stock, use_cache=False), (loss, grads))


def rows(padded):
    """Sequences of several lengths: padded by the collator, or packed into one row, where positions start again."""
    lengths = (5, 12, 9, 7, 3, 11, 8, 6)
    made = [prompt(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    if padded:
        return [{"input_ids": row, "labels": row} for row in made]
    return [{"input_ids": row} for row in made]


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_trainer(tmp_path, how):
    """Batches of the Trainer with padding, and packed by transformers' own collator: stock's losses."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    losses = []
    for patch in (False, True):
        model = make_model().train()
        if patch:
            apply_torch_fused(model)
        collator = DataCollatorWithFlattening() if how == "packed" else DataCollatorForSeq2Seq(small_tokenizer())
        arguments = TrainingArguments(
            tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, save_strategy="no", logging_steps=1, learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows(how == "padded"),
            data_collator=collator,
            optimizer_cls_and_kwargs=(AdamW if patch else torch.optim.AdamW, {"lr": 1e-3}),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_compile():
    """The patched model compiles in one graph and gives stock's logits."""
    torch._dynamo.reset()
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt(1, 6), use_cache=False).logits, stock(prompt(1, 6)).logits)
