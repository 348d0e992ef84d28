"""AdamW's options: amsgrad, numbers in tensors, gradient scalers, clipping, steps counted on the device."""

import copy
import math
import random

import pytest
import torch
from test_adamw import SCHEDULES, SETTINGS, distance, model, operands, train
from torch.utils._python_dispatch import TorchDispatchMode

from torch_fused.metal import emulate
from torch_fused.ops.adamw import adamw_, adamw_reference
from torch_fused.optim import AdamW
from torch_fused.testing import assert_close, make, relative_error

FEW = [(13,), (0, 4), (33, 64), (2049,), (5,), (2048,), (1024,)]  # more than a launch takes with amsgrad


def with_options(dtype, device, *, amsgrad=True, capturable=True, shapes=FEW, **others):
    """(operands of adamw_, its options): every number in a tensor on the device."""
    lists = list(operands(dtype, device=device, shapes=shapes, **others))
    maxima = []
    if amsgrad:  # some above the new average, some below
        maxima = [
            (square * 1.2 * (torch.arange(square.numel(), device=device).view_as(square) % 2)) for square in lists[3]
        ]
    lists.append([maximum.to(lists[3][0].dtype) for maximum in maxima] if amsgrad else [])
    if capturable:
        lists[4] = [step.to(device) for step in lists[4]]

    def number(value):
        return torch.tensor(value, device=device)

    options = {
        "lr": number(0.02),
        "beta1": number(0.8),
        "beta2": number(0.95),
        "eps": 1e-6,
        "weight_decay": 0.3,
        "capturable": capturable,
        "grad_scale": number(8.0),
        "grad_squares": number(64.0 * 9.0),
        "max_grad_norm": 1.25,
    }
    return lists, options


def exactly(lists, options):
    """The lists after the reference in float64."""
    wide = [[tensor.detach().cpu().double() for tensor in tensors] for tensors in lists]
    settings = {}
    for name, value in options.items():
        value = value.cpu().double() if isinstance(value, torch.Tensor) else value
        named = name in ("lr", "beta1", "beta2") and isinstance(value, torch.Tensor)
        settings[f"{name}_tensor" if named else name] = value
    adamw_reference(*wide, **settings)
    return wide


def check(lists, options):
    expected = exactly(lists, options)
    grads = [grad.clone() for grad in lists[1]]
    adamw_(*lists, **options)
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq")
    for name, actual, exact in zip(names, lists, expected, strict=True):
        for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
            assert_close(a, e, what=f"{name} {i}")
    assert all(torch.equal(a, b) for a, b in zip(lists[1], grads, strict=True))


# ---- the op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_every_number_in_a_tensor(backend, amsgrad):
    """Learning rate, betas, scale, norm and steps on the device: right in every dtype."""
    for dtype in backend.dtypes:
        for state_dtype in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
            for misaligned in (False, True):
                check(
                    *with_options(
                        dtype, backend.device, amsgrad=amsgrad, state_dtype=state_dtype, misaligned=misaligned
                    )
                )


def test_each_option_alone(backend):
    """Each option works without the others, and as a number."""
    for name in ("lr", "beta1", "beta2", "grad_scale", "clip", "amsgrad", "capturable"):
        lists, options = with_options(
            torch.float32, backend.device, amsgrad=name == "amsgrad", capturable=name == "capturable"
        )
        kept = {"clip": ("grad_squares", "max_grad_norm")}.get(name, (name,))
        check(lists, SETTINGS | {n: options[n] for n in kept if n in options} | {"capturable": name == "capturable"})
    lists, options = with_options(torch.float32, backend.device)
    wide = torch.float64 if backend.device == "cpu" else torch.float32
    on_the_cpu = {name: options[name].cpu().to(wide) for name in ("lr", "beta1", "beta2")}
    check(lists, options | on_the_cpu | {"maximize": True})


def test_more_tensors_than_a_launch_has_steps(backend):
    """Twenty-one steps per launch; each parameter has its own."""
    check(*with_options(torch.float32, backend.device, shapes=[(n % 7,) for n in range(50)]))


@pytest.mark.parametrize(("found", "changes"), [(0.0, True), (1.0, False), (2.0, False)])
def test_found_inf(backend, found, changes):
    """A step that the scaler skips writes nothing and is not counted."""
    lists, options = with_options(torch.float32, backend.device)
    before = [[tensor.clone() for tensor in tensors] for tensors in lists]
    check(lists, options | {"found_inf": torch.tensor(found, device=backend.device)})
    assert torch.equal(lists[0][0], before[0][0]) != changes
    assert [step.item() for step in lists[4]] == [step.item() + changes for step in before[4]]


def test_clipping_at_its_edges(backend):
    """A norm below the limit leaves the gradients; an infinite one makes them zeros; NaN stays NaN, as in torch."""
    for squares, factor in ((1.0, 1.0), (16.0, 0.5 / (1 + 2.5e-7)), (0.0, 1.0), (math.inf, 0.0), (math.nan, math.nan)):
        param, grad = torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)
        average, square = torch.zeros_like(param), torch.zeros_like(param)
        options = {"grad_squares": torch.tensor(squares, device=backend.device), "max_grad_norm": 2.0, "beta1": 0.5}
        adamw_([param], [grad], [average], [square], [torch.zeros(())], **options)
        torch.testing.assert_close(average.cpu(), torch.full((4,), 0.5 * factor), equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 1000, 123457, 2**24 - 2])
def test_bias_corrections_on_the_device(backend, count):
    """They are right to float32's last bits at every step: 1 - beta^t of a float32 power would be 1e-5 off."""
    for beta1, beta2 in ((0.9, 0.999), (0.0, 0.9999), (0.99, 0.5)):
        for as_tensor in (False, True):
            lists = [[torch.full((8,), value, device=backend.device)] for value in (0.0, 1.0, 0.5, 0.25)]
            lists += [[torch.tensor(float(count), device=backend.device)], []]
            betas = [torch.tensor(b, device=backend.device) if as_tensor else b for b in (beta1, beta2)]
            options = {"beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0, "eps": 0.0, "capturable": True}
            expected = exactly(lists, options)
            adamw_(*lists, **options)
            assert relative_error(lists[0][0].cpu(), expected[0][0]) < 4e-7
            assert lists[4][0].item() == count + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_schedule_gives_the_same_bits(dtype):
    """No result depends on the order that threads run in."""
    results = []
    for schedule, seed in SCHEDULES:
        lists, options = with_options(dtype, "cpu")
        with emulate(schedule=schedule, seed=seed):
            adamw_(*lists, **options, found_inf=torch.zeros(()))
        results.append(lists)
    for lists in results[1:]:
        for actual, expected in zip(lists, results[0], strict=True):
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_traffic():
    """Five tensors per launch with amsgrad, every operand read once; the numbers take one more launch."""
    lists, options = with_options(torch.float32, "cpu", shapes=[(4096,), (1000,)] * 4)
    with emulate() as run:
        adamw_(*lists, **options)
    assert [launch.kernel for launch in run.launches] == ["adamw_numbers"] + ["adamw_amsgrad_f32_f32"] * 2
    operands_of = [launch.buffers[:-2] for launch in run.launches[1:]]
    moved = sum(buffer.read + buffer.written for buffers in operands_of for buffer in buffers)
    assert moved <= 1.05 * 9 * sum(param.nbytes for param in lists[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": torch.ones(2)}, "lr_tensor must be one float32 .*got 2 of Float"),
        ({"beta1": torch.ones((), dtype=torch.int64)}, "beta1_tensor must be one float32 .*got 1 of Long"),
        ({"beta2": torch.ones((), device="meta")}, "beta2_tensor must be on the device of params"),
        ({"found_inf": torch.zeros(())}, "found_inf needs capturable=True"),
        ({"max_grad_norm": 1.0}, "max_grad_norm and grad_squares must be given together"),
        ({"grad_squares": torch.zeros(())}, "max_grad_norm and grad_squares must be given together"),
        ({"max_grad_norm": -1.0, "grad_squares": torch.zeros(())}, "max_grad_norm must be at least 0 .*got -1"),
    ],
)
def test_bad_options(options, message):
    """Each raises an error that names it, before anything is written."""
    lists = operands(shapes=[(4,)])
    before = lists[0][0].clone()
    with pytest.raises(RuntimeError, match=f"adamw_: {message}"):
        adamw_(*lists, **options)
    assert torch.equal(lists[0][0], before) and lists[4][0] == 0


def test_bad_lists():
    """The maxima must match the parameters in number and size, and must not share their memory."""
    lists = operands(shapes=[(4,), (5,)])
    for maxima, message in (
        ([lists[3][0].clone()], "max_exp_avg_sqs must have as many tensors as params, 2, got 1"),
        ([torch.ones(4), torch.ones(4)], r"max_exp_avg_sqs\[1\] must have the shape of params\[1\]"),
        ([torch.ones(4), torch.ones(5).half()], r"max_exp_avg_sqs\[1\] must have the dtype of exp_avgs\[1\]"),
        ([lists[3][0], torch.ones(5)], r"max_exp_avg_sqs\[0\] must not share memory with exp_avg_sqs\[0\]"),
    ):
        with pytest.raises(RuntimeError, match=f"adamw_: {message}"):
            adamw_(*lists, maxima)


# ---- the optimizer --------------------------------------------------------------------------------------------------


def follow_torch(seed, steps):
    """Random shapes, groups and options: torch's AdamW, clipped by torch, and ours give the same result."""
    draw = random.Random(seed)
    options = {
        "amsgrad": draw.random() < 0.5,
        "maximize": draw.random() < 0.5,
        "betas": draw.choice([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99), (0.95, 0.9999)]),
        "eps": draw.choice([1e-8, 1e-5]),
        "weight_decay": draw.choice([0.0, 0.01, 0.3]),
    }
    if draw.random() < 0.5:
        options["betas"] = tuple(torch.tensor(beta) for beta in options["betas"])
    limit = draw.choice([None, 0.1, 3.0, 1e4])
    shapes = [tuple(draw.randint(1, 40) for _ in range(draw.randint(0, 3))) for _ in range(draw.randint(1, 12))]
    weights = [[torch.nn.Parameter(make(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2)]
    cut, rate = draw.randint(0, len(shapes)), draw.choice([1e-3, 0.02])
    optimizers = []
    for kind, own, more in ((AdamW, weights[0], {"max_grad_norm": limit}), (torch.optim.AdamW, weights[1], {})):
        groups = [{"params": own[:cut], "lr": torch.tensor(rate / 2), "weight_decay": 0.1}, {"params": own[cut:]}]
        optimizers.append(kind([group for group in groups if group["params"]], lr=rate, **options, **more))
    for step in range(steps):
        for own in weights:
            for i, weight in enumerate(own):
                seen = (step + i) % 5 > 0  # some have no gradient at some steps
                weight.grad = make(*weight.shape, seed=1000 * step + i) + 0.1 * weights[1][i].detach() if seen else None
        if limit is not None:
            norm = torch.nn.utils.clip_grad_norm_(weights[1], limit)
        for optimizer in optimizers:
            optimizer.step()
        if limit is not None and any(weight.grad is not None for weight in weights[1]):
            assert relative_error(optimizers[0].grad_norm, norm.double()) < 1e-6
    for a, b in zip(*weights, strict=True):
        assert relative_error(a.detach(), b.detach().double()) < 1e-6
        for name, state in optimizers[1].state[b].items():
            assert relative_error(optimizers[0].state[a][name], state.double()) < 1e-6, name


@pytest.mark.parametrize("seed", range(8))
def test_follows_torch(seed):
    """Each parameter, and each of its states, to 1e-6 in float32."""
    follow_torch(seed, 40)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 120))
def test_follows_torch_for_500_steps(seed):
    follow_torch(seed, 500)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_follows_torch_on_the_device(backend, amsgrad):
    """With the steps counted there and every number in a tensor there."""
    nets = model(backend.device), model()
    options = {"weight_decay": 0.1, "amsgrad": amsgrad}
    numbers = {"lr": torch.tensor(0.01, device=backend.device), "capturable": True}
    numbers["betas"] = tuple(torch.tensor(beta, device=backend.device) for beta in (0.75, 0.875))
    ours = AdamW(nets[0].parameters(), **options, **numbers)
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=0.01, betas=(0.75, 0.875), **options)
    train(nets[0], ours, 20)
    train(nets[1], theirs, 20)
    assert distance(*nets) < 1e-5
    assert all(state["step"].device == state["exp_avg"].device for state in ours.state.values())


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"amsgrad": True, "fused": True}, {"maximize": True}])
def test_checkpoints_go_both_ways(backend, options):
    """A training with each option moves from torch to us and back, and gives the same result as one without."""
    nets = model(backend.device), model(backend.device)
    stayed = torch.optim.AdamW(nets[1].parameters(), lr=0.01, **options)
    train(nets[1], stayed, 12)
    optimizer = torch.optim.AdamW(nets[0].parameters(), lr=0.01, **options)
    train(nets[0], optimizer, 4)
    for kind, first in ((AdamW, 4), (torch.optim.AdamW, 8)):
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = kind(nets[0].parameters())
        optimizer.load_state_dict(state)
        train(nets[0], optimizer, 4, first=first)
    assert optimizer.state_dict()["param_groups"] == stayed.state_dict()["param_groups"]
    for a, b in zip(optimizer.state.values(), stayed.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(relative_error(a[name], b[name].double()) < 1e-5 for name in a)
    assert distance(*nets) < 1e-6


def test_amsgrad_with_float32_states(backend):
    """Saved and loaded, the maxima of bfloat16 parameters stay float32, and training continues bit for bit."""
    nets = model(backend.device, torch.bfloat16), model(backend.device, torch.bfloat16)
    options = {"lr": 0.01, "state_dtype": torch.float32, "amsgrad": True}
    optimizers = [AdamW(net.parameters(), **options) for net in nets]
    train(nets[0], optimizers[0], 4)
    train(nets[1], optimizers[1], 2)
    resumed = AdamW(nets[1].parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    train(nets[1], resumed, 2, first=2)
    assert distance(*nets) == 0
    assert resumed.state[nets[1][0].weight]["max_exp_avg_sq"].dtype == torch.float32


def test_amsgrad_that_is_turned_on_later():
    """The maxima start when amsgrad is turned on."""
    net = model()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    train(net, optimizer, 1, first=1)
    state = optimizer.state[net[0].weight]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


class NoHostReads(TorchDispatchMode):
    """Raises if a tensor is read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func) and "is_nonzero" not in str(func), func
        return func(*args, **kwargs or {})


def test_a_step_reads_nothing_on_the_host(backend):
    """With every number in a tensor, including a gradient scaler's inf check."""
    net = model(backend.device)
    numbers = {"lr": torch.tensor(0.01, device=backend.device), "max_grad_norm": 1.0, "amsgrad": True}
    numbers["betas"] = tuple(torch.tensor(beta, device=backend.device) for beta in (0.75, 0.875))
    optimizer = AdamW(net.parameters(), **numbers)
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
    for seed in range(2):
        scaler.scale(net(make(16, 6, seed=seed, device=backend.device)).sum()).backward()
        with NoHostReads():
            scaler.step(optimizer)
        scaler.update()
    with NoHostReads(), pytest.raises(AssertionError, match="local_scalar_dense"):
        optimizer.grad_norm.item()


def scaled_training(kind, device, unscale, limit, **options):
    """Parameters and scales of a training where the third gradient overflows."""
    net = model(device)
    optimizer = kind(net.parameters(), lr=0.05, **options)
    scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=2)
    scales = []
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(net(make(16, 6, seed=step, device=device)).square().mean()).backward()
        if step == 2:
            net[0].weight.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        if limit and kind is torch.optim.AdamW:
            torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert optimizer.state[net[0].weight]["step"].item() == 5
    return net, scales


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler(backend, unscale, limit):
    """Scaled by torch.amp, with an overflow, unscaled by the step or before, clipped: the same as torch's."""
    net, scales = scaled_training(AdamW, backend.device, unscale, limit, max_grad_norm=limit)
    expected, same = scaled_training(torch.optim.AdamW, backend.device, unscale or limit is not None, limit)
    assert scales == same and 512.0 in scales
    assert distance(net, expected) < 1e-6


def test_clipping_leaves_the_gradients(backend):
    """The step is that of torch's clipped gradients; the gradients do not change, and grad_norm is set."""
    nets = model(backend.device), model(backend.device)
    ours = AdamW(nets[0].parameters(), lr=0.1, max_grad_norm=0.01)
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=0.1)
    for net in nets:
        net(make(16, 6, device=backend.device)).sum().backward()
    before = nets[0][0].weight.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(nets[1].parameters(), 0.01)
    ours.step()
    theirs.step()
    assert torch.equal(nets[0][0].weight.grad, before)
    assert relative_error(ours.grad_norm.cpu(), norm.double().cpu()) < 1e-6
    assert distance(*nets) < 1e-6
    ours.max_grad_norm = None
    ours.step()
    assert ours.grad_norm is None


def test_clipping_of_half_types(backend):
    """The norm is summed in float32 and not rounded."""
    for dtype in (torch.float16, torch.bfloat16):
        param = torch.nn.Parameter(make(300, dtype=dtype, device=backend.device))
        param.grad = make(300, seed=1, dtype=dtype, device=backend.device)
        optimizer = AdamW([param], max_grad_norm=1.0)
        optimizer.step()
        assert relative_error(optimizer.grad_norm.cpu(), param.grad.cpu().double().norm()) < 1e-6


def test_max_grad_norm_is_kept():
    """In copies and pickles; its value is checked."""
    optimizer = AdamW(model().parameters(), max_grad_norm=0.5)
    assert copy.deepcopy(optimizer).max_grad_norm == 0.5
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="AdamW: max_grad_norm must be None, or finite and at least 0"):
            AdamW(model().parameters(), max_grad_norm=bad)


def test_compiled_step(backend):
    """torch.compile supports a step with a tensor as learning rate, and gives the same numbers."""
    torch._dynamo.reset()
    nets = model(backend.device), model(backend.device)
    rate = torch.tensor(0.01, device=backend.device)
    optimizers = [AdamW(net.parameters(), lr=rate, max_grad_norm=0.5) for net in nets]
    compiled = torch.compile(optimizers[1].step, backend="aot_eager")
    for seed in range(3):
        for net, step in zip(nets, (optimizers[0].step, compiled), strict=True):
            net.zero_grad()
            net(make(16, 6, seed=seed, device=backend.device)).square().mean().backward()
            step()
    assert distance(*nets) < 1e-6


def test_sparse_gradients_are_refused():
    """The message says what to use instead; nothing changes."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = AdamW(table.parameters())
    with pytest.raises(ValueError, match=r"gradients must be dense, got a sparse_coo one; use torch\.optim\.Sparse"):
        optimizer.step()
    assert not optimizer.state
