"""adamw_ and optim.AdamW: values, contracts and checkpoints, on every backend."""

import copy
import inspect
import pickle
import re
from itertools import chain

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.library import opcheck

from torch_fused.metal import emulate
from torch_fused.ops.adamw import adamw_, adamw_reference
from torch_fused.optim import AdamW
from torch_fused.testing import assert_close, make, relative_error

# A scalar, one element, under a pack, a pack and a tail, a threadgroup's elements and one more, several threadgroups,
# an empty tensor in between; more tensors than a launch takes.
SHAPES = [(), (1,), (3,), (13,), (0, 4), (1024,), (2049,), (33, 64), (7, 7), (96, 100), (5,), (2048,), (4,)]
SETTINGS = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.3}


def operands(dtype=torch.float32, *, device="cpu", shapes=SHAPES, state_dtype=None, misaligned=False):
    """(params, grads, exp_avgs, exp_avg_sqs, steps); every tensor has made another number of steps."""

    def tensors(kind, of):
        made = []
        for i, shape in enumerate(shapes):
            values = make(*shape, dtype=of, seed=4 * i + kind)
            values = values.abs() if kind == 3 else values
            if misaligned:  # a view that starts one element into its storage
                storage = torch.zeros(values.numel() + 1, dtype=of, device=device)
                made.append(storage[1:].view(shape).copy_(values))
            else:
                made.append(values.to(device))
        return made

    state_dtype = state_dtype or dtype
    steps = [torch.tensor(float(i)) for i in range(len(shapes))]
    return tensors(0, dtype), tensors(1, dtype), tensors(2, state_dtype), tensors(3, state_dtype), steps


def widened(lists):
    return [[tensor.detach().double().cpu() for tensor in tensors] for tensors in lists[:4]] + [
        [step.clone() for step in lists[4]]
    ]


def cloned(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def same(actual, expected):
    pairs = (zip(got, want, strict=True) for got, want in zip(actual, expected, strict=True))
    return all(torch.equal(a, b) for a, b in chain.from_iterable(pairs))


def check(lists, roundings=1.0, **settings):
    """adamw_ on the lists against the reference in float64."""
    exact, grads = widened(lists), [grad.clone() for grad in lists[1]]
    adamw_reference(*exact, **settings)
    adamw_(*lists, **settings)
    for name, actual, expected in zip(("param", "grad", "exp_avg", "exp_avg_sq"), lists, exact, strict=False):
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, roundings=roundings, what=f"{name} {i}")
    assert all(torch.equal(a, b) for a, b in zip(lists[1], grads, strict=True))
    assert [step.item() for step in lists[4]] == [step.item() for step in exact[4]]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("misaligned", [False, True])
def test_matches_float64(backend, misaligned):
    """Every dtype, size and alignment, with a different step per tensor, is right to one rounding of each result."""
    for dtype in backend.dtypes:
        check(operands(dtype, device=backend.device, misaligned=misaligned), **SETTINGS)


@pytest.mark.parametrize("misaligned", [False, True])
def test_float32_states_of_half_parameters(backend, misaligned):
    """The running averages may be float32 for any dtype of the parameter."""
    for dtype in (torch.float16, torch.bfloat16):
        lists = operands(dtype, device=backend.device, state_dtype=torch.float32, misaligned=misaligned)
        check(lists, **SETTINGS)
        assert lists[2][0].dtype == torch.float32


def test_settings(backend):
    """Maximising, no decay, no momentum, and a beta1 below 0.5, where exp_avg interpolates from the gradient."""
    for settings in ({"maximize": True}, {"weight_decay": 0.0}, {"beta1": 0.0, "beta2": 0.0}, {"beta1": 0.3}):
        check(operands(device=backend.device, shapes=[(33,), (64,)]), **(SETTINGS | settings))


def test_mixed_dtypes(backend):
    """One call supports parameters of every dtype, with states in their dtype or float32, in any order."""
    lists = [[] for _ in range(5)]
    for round in range(3):
        for dtype in backend.dtypes:
            for state_dtype in {dtype, dtype if dtype == torch.float64 else torch.float32}:
                for to, more in zip(
                    lists,
                    operands(
                        dtype, device=backend.device, shapes=[(5 + round,), (4, 16), (0,)], state_dtype=state_dtype
                    ),
                    strict=True,
                ):
                    to += more
    check(lists, **SETTINGS)


def test_bits_of_torch_fused_on_the_cpu():
    """On the CPU torch's fused AdamW gives the same bits, except for one ulp in its scalar tails."""
    ours, theirs = operands(shapes=[(64, 65), (4096,)]), operands(shapes=[(64, 65), (4096,)])
    for _ in range(5):
        adamw_(*ours, lr=1e-3)
        for step in theirs[4]:
            step += 1
        torch._fused_adamw_(
            *theirs[:4],
            [],
            theirs[4],
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            weight_decay=1e-2,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=2.0**-22, atol=0)


def test_nan_and_inf(backend):
    """NaN and infinity in any operand give the same as torch, and do not spread."""
    lists = [[make(40, seed=i).to(backend.device)] for i in range(4)]
    lists[3][0].abs_()
    for i, tensors in enumerate(lists):
        tensors[0][3 * i], tensors[0][3 * i + 1], tensors[0][3 * i + 2] = torch.nan, torch.inf, -torch.inf
    lists.append([torch.tensor(2.0)])
    expected = cloned(lists)
    adamw_reference(*expected, **SETTINGS)
    adamw_(*lists, **SETTINGS)
    for a, e in zip(lists, expected, strict=True):
        torch.testing.assert_close(a[0], e[0], rtol=1e-6, atol=1e-7, equal_nan=True)


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_transposed_parameters_are_updated_in_place(backend):
    """A dense parameter with another dimension order, with states like it and a gradient in another layout."""
    lists = operands(device=backend.device, shapes=[(12, 20), (3, 4, 5)])
    for tensors in (lists[0], lists[2], lists[3]):
        tensors[:] = [tensors[0].t().contiguous().t(), tensors[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)]
    addresses = [tensor.data_ptr() for tensor in lists[0]]
    check(lists, **SETTINGS)
    assert [tensor.data_ptr() for tensor in lists[0]] == addresses


def test_states_and_gradients_in_other_orders(backend):
    """States with another layout than the parameter, and an expanded gradient, are matched by element."""
    lists = operands(device=backend.device, shapes=[(12, 20)])
    lists[1][0] = make(1, 20, device=backend.device).expand(12, 20)
    lists[2][0] = lists[2][0].t().contiguous().t()
    check(lists, **SETTINGS)


def test_parameters_with_gaps(backend):
    """A strided view is updated, but not the gaps between its elements."""
    lists = operands(device=backend.device, shapes=[(12, 10)])
    around = torch.full((12, 20), 7.0, device=backend.device)
    around[:, ::2] = lists[0][0]
    lists[0][0] = around[:, ::2]
    check(lists, **SETTINGS)
    assert (around[:, 1::2] == 7).all()


def test_empty_only(backend):
    """Nothing to update, but the steps are counted."""
    lists = operands(device=backend.device, shapes=[(0,), (3, 0)])
    adamw_(*lists)
    assert [step.item() for step in lists[4]] == [1, 2]


# ---- GPU kernels ----------------------------------------------------------------------------------------------------


SCHEDULES = [("sequential", 0), ("reversed", 0), ("random", 0), ("random", 1), ("random", 2), ("preemptive", 0)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_every_schedule_gives_the_same_bits(schedule, seed):
    """No result depends on the thread order, and all are the same as on the CPU."""
    for dtype in (torch.float32, torch.bfloat16):
        expected, actual = operands(dtype), operands(dtype)
        adamw_(*expected)
        with emulate(schedule=schedule, seed=seed):
            adamw_(*actual)
        assert same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype):
    """Seven tensors per launch; every operand is read once and, except the gradient, written once."""
    lists = operands(dtype, shapes=[(4096,), (1000,), (64, 64)] * 3)
    with emulate() as run:
        adamw_(*lists)
    assert len(run.launches) == 2
    moved = sum(buffer.read + buffer.written for launch in run.launches for buffer in launch.buffers[:-1])
    assert moved <= 1.05 * 7 * sum(param.nbytes for param in lists[0])


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """The schema says which lists are written; fake tensors and AOT dispatch agree."""
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(
            torch.ops.torch_fused.adamw_.default,
            (*operands(dtype, device=backend.device, shapes=[(9,), (4, 4)]), []),
        )


def test_compile_fullgraph(backend):
    """torch.compile traces the op without a graph break and gives the same numbers."""
    expected = operands(device=backend.device, shapes=[(9,), (4, 4)])
    actual = cloned(expected)
    adamw_(*expected)
    torch.compile(lambda *lists: adamw_(*lists), fullgraph=True, backend="aot_eager")(*actual)
    assert same(actual, expected)


def test_versions_and_gradients(backend):
    """Autograd notices that the tensors have changed; a step that would need a gradient is an error."""
    lists = operands(device=backend.device, shapes=[(4,)])
    param = lists[0][0]
    saved = (param.clone().requires_grad_() * param).sum()  # keeps param for its backward
    adamw_(*lists)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    param.requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        adamw_(*lists)
    with torch.no_grad():
        adamw_(*lists)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="adamw_: grads has a tangent"):
        adamw_([param.detach()], [forward_ad.make_dual(*lists[1], *lists[1])], *lists[2:])
    with pytest.raises(RuntimeError, match=r"adamw_: torch\.func\.vmap cannot batch"):
        torch.func.vmap(lambda grad: adamw_([param.detach()], [grad], *lists[2:]))(lists[1][0].expand(2, 4))


def changed(place, new):
    """A call with the operand at `place`, (list, index), replaced by `new` of it."""

    def call(lists):
        lists[place[0]][place[1]] = new(lists[place[0]][place[1]])
        adamw_(*lists)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (changed((0, 1), lambda t: t.int()), r"params\[1\] must be float32.*got Int"),
        (changed((1, 1), lambda t: t[:2]), r"grads\[1\] must have the shape of params\[1\], \[4, 4\], got \[2, 4\]"),
        (changed((1, 0), lambda t: t.half()), r"grads\[0\] must have the dtype of params\[0\], Float, got Half"),
        (changed((2, 0), lambda t: t.half()), r"exp_avgs\[0\] must have the dtype of params\[0\].*float32, got Half"),
        (changed((3, 0), lambda t: t.half()), r"exp_avg_sqs\[0\] must have the dtype of exp_avgs\[0\].*got Half"),
        (
            changed((3, 1), lambda t: t[:, :1].expand(4, 4)),
            r"exp_avg_sqs\[1\] must not be an expanded tensor.*\[4, 0\]",
        ),
        (changed((4, 1), lambda t: t.double()), r"steps\[1\] must be one float32 on the CPU, got 1 of Double on cpu"),
        (changed((4, 1), lambda t: t.expand(2)), r"steps\[1\] must be one float32 on the CPU, got 2 of Float"),
        (lambda lists: adamw_(*lists[:4], lists[4][:1]), "steps must have as many tensors as params, 2, got 1"),
        (lambda lists: adamw_(*lists, lr=-1.0), "lr must be at least 0 .*got -1"),
        (lambda lists: adamw_(*lists, beta1=1.0), "beta1 must be at least 0 and below 1, got 1"),
        (lambda lists: adamw_(*lists, eps=float("nan")), "eps must be at least 0 .*got nan"),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything is written; the error names the argument."""
    lists = operands(device=backend.device, shapes=[(9,), (4, 4)])
    before = cloned(lists)
    with pytest.raises(RuntimeError, match=rf"adamw_: {message}"):
        call([list(tensors) for tensors in lists])
    assert same(lists, before)


def one_buffer(*views):
    """Views of one buffer of 64 float32, for the given places (list, index)."""
    buffer = make(64, scale=1.0).abs()
    lists = operands(shapes=[(8,), (8,)])
    for (kind, index), view in views:
        lists[kind][index] = view(buffer)
    return lists


ALIASES = {
    "params[1] must not share memory with params[0]": [((0, 0), lambda b: b[:8]), ((0, 1), lambda b: b[:8])],
    "params[1] must not share memory with params[0], which": [((0, 0), lambda b: b[:8]), ((0, 1), lambda b: b[7:15])],
    "params[1] must not share memory with params[0],": [((0, 0), lambda b: b[:16:2]), ((0, 1), lambda b: b[8:16])],
    "exp_avgs[0] must not share memory with params[0]": [((0, 0), lambda b: b[:8]), ((2, 0), lambda b: b[:8])],
    "exp_avg_sqs[0] must not share memory with exp_avgs[0]": [((2, 0), lambda b: b[:8]), ((3, 0), lambda b: b[4:12])],
    "exp_avg_sqs[1] must not share memory with params[0]": [((0, 0), lambda b: b[:8]), ((3, 1), lambda b: b[3:11])],
    "exp_avgs[1] must not share memory with exp_avgs[0]": [((2, 0), lambda b: b[:8]), ((2, 1), lambda b: b[1:9])],
    "grads[0] must not share memory with params[0]": [((0, 0), lambda b: b[:8]), ((1, 0), lambda b: b[:8])],
    "grads[1] must not share memory with exp_avgs[0]": [((2, 0), lambda b: b[:8]), ((1, 1), lambda b: b[5:13])],
    "steps[1] must not share memory with steps[0]": [((4, 0), lambda b: b[0]), ((4, 1), lambda b: b[0])],
    "steps[0] must not share memory with params[1]": [((0, 1), lambda b: b[:8]), ((4, 0), lambda b: b[3])],
    "params[0] must not be an expanded tensor or another whose": [
        ((0, 0), lambda b: b.as_strided((2, 4), (3, 1))),
        ((1, 0), lambda b: torch.ones(2, 4)),
        ((2, 0), lambda b: torch.ones(2, 4)),
        ((3, 0), lambda b: torch.ones(2, 4)),
    ],
}


@pytest.mark.parametrize("message", ALIASES)
def test_shared_memory_is_an_error(message):
    """Written tensors must not overlap: one parameter twice, states of others, overlapping parts of a buffer."""
    lists = one_buffer(*ALIASES[message])
    before = cloned(lists)
    with pytest.raises(RuntimeError, match=re.escape(f"adamw_: {message}")):
        adamw_(*lists)
    assert same(lists, before)


def test_parts_of_one_buffer(backend):
    """Flat buffers, columns, interleaved and empty parts without common elements are updated like copies."""
    views = {
        "flat": lambda b: (b[:24], b[24:48], b[48:48], b[48:]),
        "columns": lambda b: b.view(8, 8).split((3, 3, 2), 1),
        "interleaved": lambda b: (b[::3], b[1::3], b[2::3]),
        "squares": lambda b: (
            b.view(8, 8)[:4, :4],
            b.view(8, 8)[4:, :4],
            b.view(8, 8)[:4, 4:].t(),
            b.view(8, 8)[4:, 4:],
        ),
    }
    for view in views.values():
        buffers = [make(64, seed=i).abs().to(backend.device) for i in range(4)]
        lists = [list(view(buffer)) for buffer in buffers]
        lists.append([torch.tensor(3.0) for _ in lists[0]])
        check(lists, **SETTINGS)
    # Two parameters may share a gradient, which is only read.
    lists = operands(device=backend.device, shapes=[(8,), (8,)])
    lists[1][1] = lists[1][0]
    check(lists, **SETTINGS)


def test_a_failed_call_is_no_change_for_autograd():
    """Tensors that autograd saved are still valid after a step that raised."""
    lists = operands(shapes=[(8,)])
    weight = torch.ones(8, requires_grad=True)
    product = (lists[0][0] * weight).sum()
    with pytest.raises(RuntimeError, match="lr must be"):
        adamw_(*lists, lr=-1.0)
    product.backward()
    assert torch.equal(weight.grad, lists[0][0])


# ---- the optimizer --------------------------------------------------------------------------------------------------


def model(device="cpu", dtype=torch.float32):
    """A small network with the same weights every time; one parameter never gets a gradient."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 33), torch.nn.GELU(), torch.nn.LayerNorm(33), torch.nn.Linear(33, 1))
    net.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    return net.to(device, dtype)


def train(net, optimizer, steps, first=0, scheduler=None):
    """The losses of some steps, with data that depends only on the step."""
    losses = []
    parameter = next(net.parameters())
    for step in range(first, first + steps):
        x = make(16, 6, seed=step).to(parameter)
        y = x.sin().sum(1, keepdim=True)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        if scheduler:
            scheduler.step()
    return losses


def distance(ours, theirs):
    """Of all parameters together, relative."""
    flat = [torch.cat([p.detach().double().cpu().flatten() for p in net.parameters()]) for net in (ours, theirs)]
    return relative_error(*flat)


def test_training_follows_float64(backend):
    """50 steps with a scheduler, groups and a closure give the result of torch's AdamW in float64."""
    nets = model(backend.device), model(dtype=torch.float64)
    losses = []
    for net, kind in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
        groups = [
            {"params": net[0].parameters(), "weight_decay": 0.3, "betas": (0.8, 0.95)},
            {"params": net[3].parameters()},
        ]
        optimizer = kind(groups, lr=torch.tensor(0.01))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=51)
        losses.append(train(net, optimizer, 50, scheduler=schedule))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert distance(*nets) < 1e-4
    assert torch.equal(nets[0].unused.cpu(), torch.ones(3))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_checkpoints_go_both_ways(backend, options):
    """A training that moves from torch to us and back gives the same result as one in torch."""
    nets = model(backend.device), model(backend.device)
    stayed = torch.optim.AdamW(nets[1].parameters(), lr=0.01, weight_decay=0.1, **options)
    train(nets[1], stayed, 15)

    optimizer = torch.optim.AdamW(nets[0].parameters(), lr=0.01, weight_decay=0.1, **options)
    train(nets[0], optimizer, 5)
    for kind, first in ((AdamW, 5), (torch.optim.AdamW, 10)):
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = kind(nets[0].parameters())
        optimizer.load_state_dict(state)
        assert all(values["step"] == first for values in optimizer.state.values())
        train(nets[0], optimizer, 5, first=first)
    ours, theirs = optimizer.state_dict(), stayed.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    assert all(values["step"] == 15 for values in ours["state"].values())
    assert distance(*nets) < 1e-6


def test_own_checkpoint_resumes_bit_for_bit(backend):
    """Saved and loaded, with float32 states of bfloat16 parameters, training continues as if never stopped."""
    for state_dtype in (None, torch.float32):
        nets = model(backend.device, torch.bfloat16), model(backend.device, torch.bfloat16)
        optimizers = [AdamW(net.parameters(), lr=0.01, state_dtype=state_dtype) for net in nets]
        train(nets[0], optimizers[0], 6)
        train(nets[1], optimizers[1], 3)
        resumed = AdamW(nets[1].parameters(), state_dtype=state_dtype)
        resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        train(nets[1], resumed, 3, first=3)
        assert distance(*nets) == 0
        state = resumed.state[nets[1][0].weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (state_dtype or torch.bfloat16)


def test_copies_and_pickles(backend):
    """A copied or pickled optimizer keeps its states and options and trains its own parameters."""
    net = model(backend.device, torch.bfloat16)
    optimizer = AdamW(net.parameters(), lr=0.01, state_dtype=torch.float32)
    train(net, optimizer, 2)
    other, resumed = copy.deepcopy((net, optimizer))
    unpickled = pickle.loads(pickle.dumps(optimizer))
    assert unpickled.state_dtype == resumed.state_dtype == torch.float32
    train(net, optimizer, 2, first=2)
    train(other, resumed, 2, first=2)
    assert distance(net, other) == 0


def test_gradient_scaler(backend):
    """torch.amp.GradScaler unscales the gradients before a step, and skips a step with an infinite one."""
    param = torch.nn.Parameter(make(8, device=backend.device))
    expected = param.detach().clone().requires_grad_()
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
    for kind, p in ((AdamW, param), (torch.optim.AdamW, expected)):
        optimizer = kind([p], lr=0.1)
        scaler.scale(p.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        before = p.detach().clone()
        p.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before)
    torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


def test_gradients_of_another_dtype(backend):
    """A gradient is converted to its parameter's dtype."""
    param = torch.nn.Parameter(make(20, dtype=torch.bfloat16, device=backend.device))
    param.grad_dtype = torch.float32
    param.grad = make(20, seed=1, device=backend.device)
    expected = param.detach().clone().requires_grad_()
    expected.grad = param.grad.bfloat16()
    for p in (param, expected):
        AdamW([p], lr=0.1).step()
    assert torch.equal(param, expected)


def test_no_gradients(backend):
    """A step without gradients does nothing and creates no state."""
    param = torch.nn.Parameter(make(4, device=backend.device))
    optimizer = AdamW([param])
    assert optimizer.step() is None
    assert not optimizer.state


def test_sharded_parameters(tmp_path):
    """FSDP2's parameters, DTensors, are updated through their local parts."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = torch.nn.Parameter(make(8, 4))
        sharded = torch.nn.Parameter(distribute_tensor(make(8, 4), mesh, [Shard(0)]))
        for param in (plain, sharded):
            optimizer = AdamW([param], lr=0.1)
            param.square().sum().backward()
            optimizer.step()
        assert isinstance(optimizer.state[sharded]["exp_avg"], DTensor)
        assert torch.equal(sharded.full_tensor(), plain)
    finally:
        destroy_process_group()


# ---- torch's arguments ----------------------------------------------------------------------------------------------

TORCHS = inspect.signature(torch.optim.AdamW).parameters
NOT_SUPPORTED = {"differentiable": True, "decoupled_weight_decay": False}


def one_param(value=1.0):
    param = torch.nn.Parameter(torch.full((2,), value))
    param.grad = torch.ones(2)
    return param


def test_the_arguments_are_torchs():
    """All of torch's arguments, in the same order and with the same defaults; ours come after them."""
    ours = inspect.signature(AdamW).parameters
    assert list(ours)[: len(TORCHS)] == list(TORCHS)
    for name, theirs in TORCHS.items():
        assert (ours[name].default, ours[name].kind) == (theirs.default, theirs.kind), name


def test_every_default_can_be_passed():
    """Each default alone, all of them, torch's `defaults`, and the positional ones: the same groups as torch's."""
    expected = torch.optim.AdamW([one_param()]).state_dict()["param_groups"]
    given = {name: parameter.default for name, parameter in TORCHS.items() if name != "params"}
    theirs = torch.optim.AdamW([one_param()], lr=0.3, betas=(0.5, 0.6), eps=1e-5, weight_decay=0.7, maximize=True)
    for arguments in ({}, given, *({name: value} for name, value in given.items())):
        assert AdamW([one_param()], **arguments).state_dict()["param_groups"] == expected
    assert AdamW([one_param()], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False).state_dict()["param_groups"] == expected
    optimizer = AdamW([one_param()], **theirs.defaults)
    assert optimizer.defaults == theirs.defaults
    assert optimizer.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
def test_foreach_and_fused_change_nothing(backend, options):
    """They are accepted and kept in the groups, and training is the same; a gradient scaler unscales as usual."""
    nets = model(backend.device), model(backend.device)
    optimizers = AdamW(nets[0].parameters(), lr=0.01), AdamW(nets[1].parameters(), lr=0.01, **options)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 3)
        scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
        scaler.scale(net(make(16, 6, device=backend.device)).sum()).backward()
        scaler.step(optimizer)
    assert distance(*nets) == 0
    assert options.items() <= optimizers[1].param_groups[0].items()
    theirs = torch.optim.AdamW(nets[1].parameters(), **options)
    theirs.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    optimizers[0].load_state_dict(theirs.state_dict())
    assert options.items() <= optimizers[0].param_groups[0].items()
    train(nets[0], optimizers[0], 1, first=3)
    train(nets[1], optimizers[1], 1, first=3)
    assert distance(*nets) == 0


def test_tensors_as_numbers(backend):
    """A learning rate and betas in tensors, as in torch, count as their values."""
    params = [torch.nn.Parameter(make(9, device=backend.device)) for _ in range(2)]
    betas = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64)
    for param, lr, pair in ((params[0], 0.25, (0.5, 0.75)), (params[1], torch.tensor(0.25), betas)):
        param.grad = make(9, seed=1, device=backend.device)
        AdamW([param], lr=lr, betas=pair).step()
    assert torch.equal(*params)


@pytest.mark.parametrize(("name", "value"), NOT_SUPPORTED.items())
def test_what_is_not_supported(name, value):
    """As an argument, in a group, in a group added or changed later, in a checkpoint: an error that names it."""
    message = rf"AdamW: {name} must be {not value}, got {value}"
    with pytest.raises(ValueError, match=message):
        AdamW([one_param()], **{name: value})
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [one_param()], name: value}])
    optimizer = AdamW([one_param()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [one_param()], name: value})
    assert len(optimizer.param_groups) == 1

    params = one_param(), one_param()
    optimizer = AdamW([{"params": [param]} for param in params])
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state and all((param == 1).all() for param in params)


def test_a_checkpoint_that_is_not_supported():
    """A torch checkpoint with an unsupported setting raises an error, and nothing of it is loaded."""
    theirs = torch.optim.AdamW([one_param()], lr=0.3)
    theirs.step()
    state = theirs.state_dict()
    state["param_groups"][0]["differentiable"] = True
    optimizer = AdamW([one_param()])
    with pytest.raises(ValueError, match=r"AdamW: differentiable must be False, got True; use torch\.optim\.AdamW"):
        optimizer.load_state_dict(state)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-3


def test_older_checkpoints():
    """Groups without torch's newer keys, and those of torch.optim.Adam, load as in torch's AdamW."""
    theirs = torch.optim.Adam([one_param()], weight_decay=0.1)
    theirs.step()
    for missing in ("foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"):
        state = theirs.state_dict()
        del state["param_groups"][0][missing]
        params = one_param(), one_param()
        for param, kind in zip(params, (AdamW, torch.optim.AdamW), strict=True):
            optimizer = kind([param])
            optimizer.load_state_dict(copy.deepcopy(state))
            optimizer.step()
        torch.testing.assert_close(*params, rtol=1e-6, atol=1e-7)


def trained(folder, kind, options, **arguments):
    """The losses that transformers' Trainer logs, with the optimizer's class and arguments."""
    from transformers import Trainer, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, x, labels):
            return {"loss": (self.linear(x) - labels).square().mean()}

    torch.manual_seed(0)
    data = [{"x": torch.tensor([float(i), 1.0]), "labels": torch.tensor([0.5 * i])} for i in range(32)]
    settings = TrainingArguments(
        folder, max_steps=6, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, **arguments
    )
    trainer = Trainer(Net(), settings, train_dataset=data, optimizer_cls_and_kwargs=(kind, options))
    trainer.train()
    assert type(trainer.optimizer.optimizer) is kind
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    """transformers' Trainer works with the class and the arguments of its own AdamW; it accumulates and clips."""
    options = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "fused": True}
    for arguments in ({}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}):
        losses = [trained(tmp_path, kind, options, **arguments) for kind in (AdamW, torch.optim.AdamW)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 6
    own = trained(tmp_path, AdamW, options | {"max_grad_norm": 0.3}, gradient_accumulation_steps=2, max_grad_norm=0.0)
    assert own == pytest.approx(losses[1], rel=1e-4)


def test_bad_options():
    """Arguments out of range, and unsupported gradients: nothing changes."""
    params = [one_param(), one_param()]
    with pytest.raises(ValueError, match=r"state_dtype must be None or torch\.float32, got torch\.float16"):
        AdamW(params, state_dtype=torch.float16)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        AdamW(params, lr=-1.0)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        AdamW(params, fused=True, foreach=True)
    complex_param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_param.grad = torch.ones(2, dtype=torch.complex64)
    params[1].grad = torch.ones(2).to_sparse()
    for bad, message in (
        (params[1], "gradients must be dense, got a sparse_coo one"),
        (complex_param, r"gradients must be real, got torch\.complex64"),
    ):
        optimizer = AdamW([{"params": [params[0]]}, {"params": [bad]}])
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert not optimizer.state and (params[0] == 1).all()


def test_a_parameter_twice():
    """An error at once, where torch only warns; nothing is added. The step rejects groups that share memory."""
    weight, bias = (torch.nn.Parameter(make(4, seed=i)) for i in range(2))
    with pytest.raises(ValueError, match="AdamW: params 0 and 2 of a group are the same parameter"):
        AdamW([weight, bias, weight])
    with pytest.raises(ValueError, match="AdamW: params 0 and 1 of a group are the same parameter"):
        AdamW([("a", weight), ("b", weight)])
    optimizer = AdamW([weight])
    with pytest.raises(ValueError, match="AdamW: params 1 and 2 of a group are the same parameter"):
        optimizer.add_param_group({"params": (torch.nn.Parameter(make(1)), bias, bias)})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": weight})
    assert len(optimizer.param_groups) == 1
    whole = make(8)
    parts = [torch.nn.Parameter(whole[:5]), torch.nn.Parameter(whole[3:])]
    optimizer = AdamW(parts)
    for part in parts:
        part.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"adamw_: params\[1\] must not share memory with params\[0\]"):
        optimizer.step()
    assert torch.equal(whole, make(8))


def test_a_step_that_raises_has_changed_no_group():
    """An unsupported gradient in the last group is found before the first group is updated."""
    first, second = (torch.nn.Parameter(make(4, seed=i)) for i in range(2))
    optimizer = AdamW([{"params": [first]}, {"params": [second]}])
    first.grad, second.grad = torch.ones(4), torch.ones(4).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step()
    assert torch.equal(first, make(4))
