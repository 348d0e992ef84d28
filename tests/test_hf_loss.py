"""A patched model computes transformers' loss without logits, and the logits only when they are read."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_hf_generate import FAMILIES, make_model, one_thread, prompt  # noqa: F401  (a fixture)
from test_hf_patch import kernels
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, Trainer, TrainingArguments

from torch_fused.hf import apply_torch_fused
from torch_fused.hf.loss import Logits
from torch_fused.metal import emulate
from torch_fused.testing import relative_error

LOSS_OP = "_linear_cross_entropy_gradients"


def labels_of(ids):
    """Some labels are ignored, including a whole sequence."""
    labels = ids.clone()
    labels[0, : ids.shape[1] // 2] = -100
    labels[-1] = -100
    return labels


def pair(family="qwen2", **options):
    stock, patched = make_model(family, **options).train(), make_model(family, **options).train()
    return stock, patched, apply_torch_fused(patched)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_steps(stock, patched, **inputs):
    """The loss and every gradient; the patched model's come from the fused op."""
    expected, actual = stock(**inputs), patched(**inputs)
    assert type(actual.logits) is Logits
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    wanted = gradients(stock, expected.loss)
    found = gradients(patched, actual.loss)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


COUNTS = {
    "mean": {},
    "a number of items": {"num_items_in_batch": 7},
    "a tensor of items": {"num_items_in_batch": torch.tensor(11)},
    "another ignored index": {"ignore_index": 5},
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, counts):
    """With transformers' shift and count of labels, with tied and untied heads."""
    for tied in (False, True):
        stock, patched, _ = pair(family, tie_word_embeddings=tied)
        ids = prompt(3, 9)
        labels = labels_of(ids)
        if "ignore_index" in COUNTS[counts]:
            labels[labels == -100] = 5
        assert_same_steps(stock, patched, input_ids=ids, labels=labels, **COUNTS[counts])


def test_labels_that_are_shifted_already():
    """`shift_labels` and labels by position, packed sequences and padding."""
    stock, patched, _ = pair()
    ids = prompt(2, 8)
    shifted = F.pad(labels_of(ids), (0, 1), value=-100)[:, 1:].contiguous()
    assert_same_steps(stock, patched, input_ids=ids, labels=ids, shift_labels=shifted)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    assert_same_steps(stock, patched, input_ids=ids[:1], labels=ids[:1], position_ids=positions)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert_same_steps(stock, patched, input_ids=ids, labels=labels_of(ids), attention_mask=mask)
    assert_same_steps(stock, patched, inputs_embeds=stock.model.embed_tokens(ids).detach(), labels=ids)
    place = list(inspect.signature(patched.forward).parameters).index("labels")
    by_position = ids, *[None] * (place - 1), ids
    torch.testing.assert_close(patched(*by_position).loss, stock(*by_position).loss)
    assert type(patched(*by_position).logits) is Logits


def test_all_labels_ignored():
    """NaN, like transformers' mean; 0 with a given number of items."""
    stock, patched, _ = pair()
    ids = prompt(2, 5)
    nothing = torch.full_like(ids, -100)
    assert patched(ids, labels=nothing).loss.isnan() and stock(ids, labels=nothing).loss.isnan()
    assert_same_steps(stock, patched, input_ids=ids, labels=nothing, num_items_in_batch=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    """As close to float32 as stock, and the loss is float32, as in stock."""
    exact = make_model().train()
    stock, patched, _ = pair(dtype=dtype)
    ids = prompt(2, 9)
    wanted = gradients(exact, exact(ids, labels=ids).loss)
    losses = [model(ids, labels=ids).loss for model in (stock, patched)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    theirs, found = gradients(stock, losses[0]), gradients(patched, losses[1])
    for name, gradient in wanted.items():
        limit = 1.5 * relative_error(theirs[name], gradient) + 0.01
        assert relative_error(found[name], gradient) < limit, name


def test_autocast():
    """With float32 weights and bfloat16 autocast, as in the Trainer."""
    stock, patched, _ = pair()
    ids = prompt(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = stock(ids, labels=ids), patched(ids, labels=ids)
    assert type(actual.logits) is Logits and actual.logits.dtype == torch.bfloat16
    torch.testing.assert_close(actual.loss, expected.loss, rtol=2e-3, atol=2e-3)
    wanted = gradients(stock, expected.loss)
    for name, gradient in gradients(patched, actual.loss).items():
        assert relative_error(gradient, wanted[name]) < 5e-2, name


def test_in_the_emulator():
    """The Metal kernels' loss and gradients."""
    stock, patched, _ = pair()
    with emulate() as run:
        assert_same_steps(stock, patched, input_ids=prompt(2, 5), labels=labels_of(prompt(2, 5)))
    assert any(launch.kernel.startswith("cross_entropy") for launch in run.launches)


# ---- logits ---------------------------------------------------------------------------------------------------------


def test_logits_are_computed_when_they_are_read():
    """In training and evaluation, by any kind of use; reading shape and dtype does not compute them."""
    stock, patched, handle = pair()
    ids = prompt(2, 6)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            expected, outputs = stock(ids, labels=ids), patched(ids, labels=ids)
            logits = outputs.logits
            assert logits.shape == expected.logits.shape and logits.dtype == torch.float32 and len(logits) == 2
            assert logits.size(-1) == 128 and logits.dim() == 3 and logits.device == ids.device
            assert "_value" not in logits.__dict__
            torch.testing.assert_close(logits.argmax(-1), expected.logits.argmax(-1))
            torch.testing.assert_close(logits[:, -1], expected.logits[:, -1])
            torch.testing.assert_close(torch.softmax(logits, -1), torch.softmax(expected.logits, -1))
            torch.testing.assert_close(logits + 0, expected.logits)
            torch.testing.assert_close(outputs[1] * 1, expected[1])
            assert repr(logits) == repr(logits.made())
    with torch.no_grad():
        assert patched(ids, labels=ids).logits.numpy() == pytest.approx(stock(ids, labels=ids).logits.numpy(), abs=1e-4)
    logits = pickle.loads(pickle.dumps(patched(ids, labels=ids).logits.detach()))
    assert type(logits) is torch.Tensor
    assert "times the logits were computed because they were read" in handle.report()
    assert "losses without logits" in handle.report()


def test_a_loss_of_the_users_from_the_logits():
    """Gradients flow through logits that are read, alone and together with the loss."""
    stock, patched, _ = pair()
    ids = prompt(2, 6)

    def loss_of(model):
        outputs = model(ids, labels=ids)
        return outputs.loss + outputs.logits.softmax(-1).square().sum()

    wanted = gradients(stock, loss_of(stock))
    for name, gradient in gradients(patched, loss_of(patched)).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


class CrossEntropy(torch.autograd.Function):
    """A loss of a user's, with a backward of its own: torch hands it its arguments as they are."""

    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    @staticmethod
    def backward(ctx, grad):
        logits, target = ctx.saved_tensors
        of_logits = (logits.softmax(-1) - F.one_hot(target, logits.shape[-1])) / target.numel()
        return grad * of_logits, None


def checkpointed(reentrant):
    return lambda logits, target: checkpoint(CrossEntropy.apply, logits, target, use_reentrant=reentrant)


USERS = {"function": CrossEntropy.apply, "reentrant": checkpointed(True), "checkpointed": checkpointed(False)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("user", USERS)
def test_gradients_of_logits_that_an_autograd_function_takes(user, bias):
    """Alone, beside the loss, and of logits that were read before; a part of them, in float32."""
    models = [make_model(tie_word_embeddings=not bias).train() for _ in range(2)]
    if bias:
        for model in models:
            model.lm_head = nn.Linear(64, 128)
            model.lm_head.load_state_dict({"weight": torch.ones(128, 64).cumsum(0) / 512, "bias": torch.ones(128)})
    apply_torch_fused(models[1])
    ids = prompt(3, 9)
    for read in (False, True):
        for beside in (False, True):

            def loss_of(model, read=read, beside=beside):
                outputs = model(ids, labels=ids)
                logits = outputs.logits.float()[..., :-1, :].contiguous()
                assert logits.requires_grad and not logits.is_leaf and outputs.logits.grad_fn is not None
                if read:
                    logits.argmax(-1)
                loss = USERS[user](logits, ids[:, 1:])
                return loss + outputs.loss if beside else loss

            stock, patched = models
            wanted = gradients(stock, loss_of(stock))
            found = gradients(patched, loss_of(patched))
            assert found.keys() == wanted.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def edit_part(logits):
    logits[0, 1:] = 0.25


def edit_view(logits):
    logits[:, 1].mul_(3)


def edit_a_view_that_waits(logits):
    rows = logits[..., :-1, :].view(-1, logits.shape[-1]) if len(logits) == 1 else logits[..., :-1, :]
    rows.div_(2)


def edit_floats(logits):
    logits.float().contiguous().mul_(2)


def edit_a_copy(logits):
    """Which the logits do not notice."""
    logits[..., :-1, :].contiguous().mul_(2)
    logits.clone().zero_()


def edit_by_operator(logits):
    logits /= 2


def edit_without_history(logits):
    with torch.no_grad():
        logits.exp_()


EDITS = {
    "method": lambda logits: logits.div_(2),
    "part": edit_part,
    "view": edit_view,
    "view that waits": edit_a_view_that_waits,
    "floats": edit_floats,
    "copy": edit_a_copy,
    "operator": edit_by_operator,
    "mask": lambda logits: logits.masked_fill_(logits > 0.1, -1.0),
    "foreach": lambda logits: torch._foreach_mul_([logits, torch.ones(2)], 0.5),
    "function": lambda logits: F.relu(logits, inplace=True),
    "copy_": lambda logits: logits.copy_(logits.softmax(-1)),
    "diagonal": lambda logits: torch.diagonal(logits, dim1=1, dim2=2).add_(1).mul_(2),
    "no history": edit_without_history,
    "out": lambda logits: torch.mul(logits.detach(), 2, out=logits.detach()),
    "detached": lambda logits: logits.detach().mul_(2),
    "data": lambda logits: logits.data.mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_that_are_edited_in_place(edit, rows):
    """Torch functions and an `autograd.Function` see them as in transformers: the same values and gradients."""
    ids = prompt(rows, 6)
    stock, patched, _ = pair()
    uses = {
        "function": lambda logits, _: CrossEntropy.apply(logits, ids),
        "reentrant": lambda logits, _: USERS["reentrant"](logits, ids),
        "torch": lambda logits, _: logits.square().mean(),
        "part": lambda logits, part: CrossEntropy.apply(part, ids[:, 1:]) + logits.sin().sum() + part.cos().sum(),
    }
    for name, use in uses.items():
        for read in (False, True):

            def loss_of(model, read=read, use=use):
                logits = model(ids, labels=ids).logits
                part = logits[..., :-1, :]
                if read:
                    logits.argmax(-1)
                EDITS[edit](logits)
                return use(logits, part)

            expected, actual = loss_of(stock), loss_of(patched)
            torch.testing.assert_close(actual, expected, msg=lambda m, n=name: f"{n}: {m}")
            wanted = gradients(stock, expected)
            for weight, gradient in gradients(patched, actual).items():
                close = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, wanted[weight].abs().max().item())}
                torch.testing.assert_close(gradient, wanted[weight], **close, msg=f"{name}: {weight}")


class Halved(torch.autograd.Function):
    """Writes its argument."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        logits.mul_(0.5)
        return logits

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


def test_an_autograd_function_that_writes_the_logits():
    stock, patched, _ = pair()
    ids = prompt(2, 6)

    def loss_of(model):
        logits = model(ids, labels=ids).logits
        row = logits[:, 0]
        Halved.apply(logits)
        return logits.square().mean() + CrossEntropy.apply(logits, ids) + row.sin().sum()

    expected, actual = loss_of(stock), loss_of(patched)
    torch.testing.assert_close(actual, expected)
    wanted = gradients(stock, expected)
    for name, gradient in gradients(patched, actual).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("edit", ["method", "view", "no history", "view that waits"])
def test_logits_that_are_edited_after_a_function_has_saved_them(edit):
    """Its backward raises torch's error, as in transformers."""
    stock, patched, _ = pair()
    ids = prompt(2, 6)
    for model in (stock, patched):
        logits = model(ids, labels=ids).logits
        loss = CrossEntropy.apply(logits, ids)
        EDITS[edit](logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("edit", ["method", "view", "view that waits", "floats", "copy", "foreach", "data"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_that_are_edited_without_gradients(edit, mode):
    stock, patched, _ = pair()
    with mode():
        found = [model(prompt(2, 6), labels=prompt(2, 6)).logits for model in (stock, patched)]
        parts = [logits[..., 1:, :] for logits in found]
        for logits in found:
            EDITS[edit](logits)
    torch.testing.assert_close(found[1] * 1, found[0] * 1)
    torch.testing.assert_close(parts[1] * 1, parts[0] * 1)


def test_logits_are_one_object():
    """A hook, a gradient, a hash and a copy are the logits' own, though what reads them is made anew."""
    _, patched, _ = pair()
    ids = prompt(2, 6)
    with torch.no_grad():
        logits = patched(ids, labels=ids).logits
    logits.requires_grad_()
    assert {logits: 1}[logits] == 1 and logits.is_leaf
    CrossEntropy.apply(logits, ids).backward()
    logits.square().mean().backward()
    assert logits.grad.shape == logits.shape and logits.grad.abs().sum() > 0
    with torch.no_grad():
        copies = copy.deepcopy([logits.detach(), *(patched(ids, labels=ids).logits for _ in range(3))])
    for other in copies:
        torch.testing.assert_close(other, logits.detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: setattr(logits, "data", logits.detach() * 2),
        lambda logits: logits.unsqueeze_(0),
        lambda logits: logits.transpose_(0, 1),
    ],
    ids=["data", "unsqueeze_", "transpose_"],
)
def test_a_change_of_the_logits_that_is_not_one_of_values(change):
    """It would be lost in silence."""
    _, patched, _ = pair()
    with torch.no_grad():
        logits = patched(prompt(2, 6), labels=prompt(2, 6)).logits
        with pytest.raises(RuntimeError, match=r"changes the shape or the memory of outputs.logits.*logits.clone\(\)"):
            change(logits)


@pytest.mark.parametrize("part", [lambda x: x, lambda x: x[:, 1:], lambda x: x[..., 1:, :].clone()[0]])
def test_a_compiled_function_takes_logits(part):
    """Whole ones, a view of them, and one of a copy."""
    torch._dynamo.reset()
    stock, patched, _ = pair()
    compiled = torch.compile(lambda logits: logits.softmax(-1).square().sum(), backend="aot_eager")
    found = []
    for model in (stock, patched):
        loss = compiled(part(model(prompt(2, 6), labels=prompt(2, 6)).logits))
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-5)


def test_transforms_of_logits():
    stock, patched, _ = pair()
    found = []
    for model in (stock, patched):
        logits = model(prompt(2, 6), labels=prompt(2, 6)).logits
        scaled = torch.func.grad(lambda scale, logits=logits: (logits * scale).square().sum())(torch.tensor(2.0))
        found.append([torch.func.vmap(lambda row: row.sum())(logits), scaled])
    torch.testing.assert_close(found[1], found[0])


def test_a_hook_of_logits_that_are_edited_later():
    """It gets the gradient from before the edit."""
    stock, patched, _ = pair()
    ids = prompt(2, 6)
    found = []
    for model in (stock, patched):
        with torch.no_grad():
            embeds = model.model.embed_tokens(ids)
        logits = model(inputs_embeds=embeds, labels=None if model is stock else ids).logits
        if model is patched:
            logits._source.has_loss = False  # as if somebody's loss function had computed it
        seen = []
        logits.register_hook(seen.append)
        logits.retain_grad()
        logits.mul_(3)
        (logits.square().mean() + CrossEntropy.apply(logits, ids)).backward()
        found.append([*seen, logits.grad])
    torch.testing.assert_close(found[1], found[0])


def test_an_autograd_function_under_autocast():
    stock, patched, _ = pair()
    ids = prompt(2, 9)
    found = []
    for model in (stock, patched):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, labels=ids).logits
        found.append(gradients(model, CrossEntropy.apply(logits, ids)))
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, found[0][name]) < 5e-2, name


def test_a_checkpointed_loss():
    """What is computed again keeps as many tensors as before, also where it makes the logits."""
    stock, patched, _ = pair()
    ids = prompt(2, 9)

    def loss_of(model):
        logits = model(ids, labels=ids).logits
        return checkpoint(lambda logits: logits.logsumexp(-1).square().sum(), logits, use_reentrant=False)

    wanted = gradients(stock, loss_of(stock))
    for name, gradient in gradients(patched, loss_of(patched)).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ask",
    [
        lambda outputs: outputs.logits.register_hook(print),
        lambda outputs: outputs.logits.retain_grad(),
        lambda outputs: torch.autograd.grad(outputs.loss, [outputs.logits], allow_unused=True),
    ],
    ids=["hook", "retain", "grad"],
)
def test_a_gradient_that_the_loss_does_not_give(ask):
    """It is refused, as it would be missing in silence."""
    _, patched, handle = pair()
    ids = prompt(2, 6)
    with pytest.raises(RuntimeError, match="gives them no gradient: pass loss=False to apply_torch_fused"):
        ask(patched(ids, labels=ids))
    handle.revert()
    apply_torch_fused(patched, loss=False)
    ask(patched(ids, labels=ids))


def test_logits_of_old_weights_are_an_error():
    """After the optimizer's step they would belong to other weights."""
    _, patched, _ = pair()
    ids = prompt(2, 6)
    optimizer = torch.optim.SGD(patched.parameters(), lr=0.1)
    outputs, kept = patched(ids, labels=ids), patched(ids, labels=ids)
    before = kept.logits.argmax(-1)
    outputs.loss.backward()
    optimizer.step()
    assert torch.equal(kept.logits.argmax(-1), before)
    with pytest.raises(RuntimeError, match=r"weights have changed .* Read outputs.logits before optimizer.step"):
        outputs.logits.argmax(-1)


def test_logits_of_weights_that_are_replaced():
    """Assigned to `.data`, which torch does not count, or converted."""
    for change in (
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: setattr(weight, "data", weight.data.bfloat16()),
    ):
        _, patched, _ = pair()
        outputs = patched(prompt(2, 6), labels=prompt(2, 6))
        change(patched.lm_head.weight)
        with pytest.raises(RuntimeError, match="weights have changed"):
            outputs.logits.argmax(-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_that_are_read_first_without_gradients(mode):
    """A gradient flows through them all the same, as they were asked for with one."""
    stock, patched, _ = pair()
    ids = prompt(2, 6)

    def loss_of(model):
        outputs = model(ids, labels=ids)
        with mode():
            right = (outputs.logits.argmax(-1) == ids).float().mean().item()
        return outputs.logits.square().mean() + right

    wanted = gradients(stock, loss_of(stock))
    for name, gradient in gradients(patched, loss_of(patched)).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


class WritesData(torch.optim.Optimizer):
    """An optimizer whose writes do not change version numbers."""

    def step(self):
        for param in self.param_groups[0]["params"]:
            param.data.sub_(param.grad, alpha=0.1)


def test_logits_of_weights_that_an_optimizer_has_stepped_uncounted():
    """They are not silently computed from other weights; those of a model without a step are computed."""
    models = [make_model().train() for _ in range(2)]
    outputs = []
    for model in models:
        apply_torch_fused(model)
        outputs.append(model(prompt(2, 8), labels=prompt(2, 8)))
        outputs[-1].loss.backward()
    WritesData(models[0].parameters(), {}).step()
    with pytest.raises(RuntimeError, match="weights have changed"):
        outputs[0].logits.argmax(-1)
    assert outputs[1].logits.argmax(-1).shape == (2, 8)


def test_logits_of_weights_that_are_written_by_hand():
    """To `.data`, which has no version number."""
    for part in ("weight", "bias"):
        _, patched, _ = pair()
        patched.lm_head = nn.Linear(64, 128)
        apply_torch_fused(patched).revert()
        apply_torch_fused(patched)
        outputs = patched(prompt(2, 8), labels=prompt(2, 8))
        outputs.loss.backward()
        weight = getattr(patched.lm_head, part)
        weight.data.sub_(weight.grad, alpha=0.1)
        with pytest.raises(RuntimeError, match="weights have changed"):
            outputs.logits.argmax(-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_of_hidden_states_that_are_edited(mode):
    """They are those of the call, or an error."""
    stock, patched, _ = pair()
    found = []
    for model in (stock, patched):
        with mode():
            outputs = model(prompt(2, 8), labels=prompt(2, 8), output_hidden_states=True)
            outputs.hidden_states[-1].mul_(2)
        found.append(outputs.logits)
    if mode is torch.inference_mode:
        torch.testing.assert_close(found[1] + 0, found[0])
    else:
        with pytest.raises(RuntimeError, match="or its hidden states"):
            found[1].argmax(-1)


def test_a_cross_entropy_that_is_not_transformers():
    """The older way to shift labels, class weights, probabilities and label smoothing."""
    stock, patched, handle = pair()
    ids = prompt(2, 6)

    def losses(model):
        logits = model(ids, labels=ids).logits
        rows = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
        target = ids[..., 1:].reshape(-1)
        yield F.cross_entropy(rows, target, label_smoothing=0.1, reduction="sum")
        yield nn.CrossEntropyLoss(ignore_index=int(target[0]))(rows.float(), target)
        yield F.cross_entropy(rows, target, weight=torch.arange(128.0))
        yield F.cross_entropy(rows, F.one_hot(target, 128).float())

    for actual, expected in zip(losses(patched), losses(stock), strict=True):
        torch.testing.assert_close(actual, expected)
    assert "  3 losses without logits" in handle.report()


# ---- what keeps transformers' way -----------------------------------------------------------------------------------


def test_calls_without_labels_have_logits():
    """Only calls with labels defer them."""
    _, patched, _ = pair()
    assert type(patched(prompt(1, 4)).logits) is torch.Tensor
    with torch.no_grad():
        assert type(patched(prompt(1, 4)).logits) is torch.Tensor


def test_loss_off():
    """The flag also works without the decode step."""
    ids = prompt(2, 6)
    for decode in (False, True):
        model = make_model().train()
        before = [dict(module.__dict__) for module in model.modules()]
        with apply_torch_fused(model, loss=False, decode=decode) as handle:
            assert type(model(ids, labels=ids).logits) is torch.Tensor
            assert "loss:" not in handle.report()
        with apply_torch_fused(model, decode=decode) as handle:
            assert type(model(ids, labels=ids).logits) is Logits
            assert "loss: computed without the logits in memory" in handle.report()
            assert "1 x Linear.forward" in handle.report()
        assert [dict(module.__dict__) for module in model.modules()] == before


def changed_logits(family):
    options = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**options)).train()
    return GraniteForCausalLM(GraniteConfig(**options, logits_scaling=3.0)).train()


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma2", "final_logit_softcapping is 30.0"), ("granite", "logits_scaling is 3.0")],
)
def test_logits_that_are_changed_before_the_loss(family, reason):
    """Soft caps and scales: transformers computes these losses; the report says why."""
    stock, patched = changed_logits(family), changed_logits(family)
    report = apply_torch_fused(patched).report()
    assert f"its loss: config.{reason}" in report
    ids = prompt(2, 6)
    expected, actual = stock(ids, labels=ids), patched(ids, labels=ids)
    assert type(actual.logits) is torch.Tensor
    torch.testing.assert_close(actual.loss, expected.loss)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(model):
    model.lm_head.__class__ = Doubled


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)


def wrapped(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) * 2


def hooked_gradient(model):
    model.lm_head.register_full_backward_hook(lambda module, of_input, of_output: (2 * of_input[0],))


def hooked_output(model):
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.register_hook(lambda grad: grad * 2) and None
    )


@pytest.mark.parametrize("change", [doubled, hooked, hooked_gradient, hooked_output, wrapped])
@pytest.mark.parametrize("patch_first", [False, True])
def test_other_heads(change, patch_first):
    """A head of another class, with a hook, or with a wrapper, before the patch or after: the loss is stock's."""
    stock, patched = make_model().train(), make_model().train()
    change(stock)
    for step in (apply_torch_fused, change) if patch_first else (change, apply_torch_fused):
        step(patched)
    ids = prompt(2, 6)
    expected, actual = stock(ids, labels=ids).loss, patched(ids, labels=ids).loss
    torch.testing.assert_close(actual, expected)
    wanted = gradients(stock, expected)
    for name, gradient in gradients(patched, actual).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_head():
    """A PEFT adapter, which adds to the head's logits."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    models = []
    for patch_first in (None, True, False):
        model = make_model().train()
        if patch_first:
            apply_torch_fused(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        if patch_first is False:
            apply_torch_fused(model)
        models.append(model)
    ids = prompt(2, 6)
    losses = [model(input_ids=ids, labels=ids).loss for model in models]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_a_frozen_head():
    """No gradient of its weight is computed, and those of the layers are stock's."""
    stock, patched, _ = pair()
    for model in (stock, patched):
        model.lm_head.requires_grad_(False)
    ids = prompt(2, 6)
    for model in (stock, patched):
        model(ids, labels=ids).loss.backward()
    assert patched.lm_head.weight.grad is None
    torch.testing.assert_close(patched.model.norm.weight.grad, stock.model.norm.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_copy_and_a_pickle_have_their_own():
    """A copied model computes its own loss, and has its own counts."""
    _, patched, handle = pair()
    ids = prompt(2, 6)
    expected = patched(ids, labels=ids).loss
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        outputs = other(ids, labels=ids)
        assert type(outputs.logits) is Logits and outputs.logits._source.weight is other.lm_head.weight
        torch.testing.assert_close(outputs.loss, expected)
    assert "  1 losses without logits" in handle.report()


def test_transforms():
    """torch.func.grad through a call with labels."""
    stock, patched, _ = pair()
    ids = prompt(2, 6)

    def gradient(model):
        weights = dict(model.named_parameters())
        call = lambda w: functional_call(model, w, kwargs={"input_ids": ids, "labels": ids, "use_cache": False}).loss  # noqa: E731
        return torch.func.grad(call)(weights)

    expected = gradient(stock)
    for name, found in gradient(patched).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


def test_compile():
    """The compiled model computes transformers' loss, in one graph."""
    torch._dynamo.reset()
    stock, patched, _ = pair()
    ids = prompt(2, 6)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids, labels=ids, use_cache=False).loss, stock(ids, labels=ids, use_cache=False).loss
    )


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_trainer_trains_and_evaluates(tmp_path):
    """Steps use the fused loss without logits; compute_metrics gets logits."""
    rows = [{"input_ids": row, "labels": row} for row in prompt(4, 8)]
    results = []
    for patch in (False, True):
        model = make_model().train()
        handle = apply_torch_fused(model) if patch else None
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        loss = trainer.train().training_loss
        if handle:
            report = handle.report()
            assert "  6 losses without logits" in report and "logits were computed" not in report
        metrics = trainer.evaluate()
        results.append((loss, metrics["eval_loss"], metrics["eval_right"]))
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def train_losses(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        starts = torch.randint(0, 64, (4, 1), generator=generator)
        ids = (starts + torch.arange(16) * 3) % 127 + 1  # sequences that can be learnt
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -100)
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("steps", "tolerance"), [(50, 1e-4), pytest.param(300, 2e-3, marks=pytest.mark.full)], ids=["50", "300"]
)
def test_training_follows_stocks(steps, tolerance):
    """The losses of a small Qwen2 in float32, step by step."""
    stock, patched, _ = pair(initializer_range=0.05)
    expected, actual = train_losses(stock, steps), train_losses(patched, steps)
    assert (actual - expected).abs().max() < tolerance
    assert expected[-1] < expected[0] / 2


def test_kernels_of_a_step():
    """One op for the loss, and none of torch's for logits."""
    _, patched, _ = pair()
    ids = prompt(2, 6)
    counts = kernels(lambda: patched(ids, labels=ids))
    assert counts[LOSS_OP] == 1 and "aten::log_softmax" not in counts
    with torch.no_grad():
        assert "aten::log_softmax" not in kernels(lambda: patched(ids, labels=ids))
