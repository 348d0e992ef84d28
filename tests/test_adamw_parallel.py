"""AdamW on two processes: DDP and FSDP2 give the result of one process, and exchange checkpoints with torch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from torch_fused.optim import AdamW
from torch_fused.testing import make, relative_error

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True}
LIMIT = 0.3  # below the norm of every gradient here


def network():
    """Odd sizes, so that the shards differ and some are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def batch(step, rank=None):
    x = make(8, 6, seed=step)
    return x if rank is None else x[4 * rank : 4 * rank + 4]


def train(net, optimizer, steps, rank=None, clip=False):
    for step in steps:
        optimizer.zero_grad()
        x = batch(step, rank)
        (net(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_same_parameters(net, expected, tolerance=1e-5):
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        assert relative_error(whole(a), b.detach().double()) < tolerance


def sharded(mesh):
    net = network()
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def checks(rank, mesh):
    alone = network()
    stayed = torch.optim.AdamW(alone.parameters(), **OPTIONS)
    train(alone, stayed, range(12), clip=True)

    # DDP: every process has every gradient.
    net = nn.parallel.DistributedDataParallel(network())
    train(net, AdamW(net.parameters(), **OPTIONS, max_grad_norm=LIMIT), range(12), rank)
    assert_same_parameters(net, alone)

    # FSDP2: each has its shards; the norm is over all of them. Clipped by torch before the step, too.
    for clip in (False, True):
        net = sharded(mesh)
        addresses = [param.to_local().data_ptr() for param in net.parameters()]
        optimizer = AdamW(net.parameters(), **OPTIONS, max_grad_norm=None if clip else LIMIT)
        train(net, optimizer, range(12), rank, clip)
        assert_same_parameters(net, alone)
        assert [param.to_local().data_ptr() for param in net.parameters()] == addresses
        assert all(isinstance(state["max_exp_avg_sq"], DTensor) for state in optimizer.state.values())

    # Four steps of torch's, four of ours, four of torch's, through both kinds of state dicts.
    net = sharded(mesh)
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, range(4), rank, clip=True)
    state = copy.deepcopy(optimizer.state_dict())
    ours = AdamW(net.parameters(), max_grad_norm=LIMIT)
    ours.load_state_dict(state)
    train(net, ours, range(4, 8), rank)
    saved = copy.deepcopy(get_optimizer_state_dict(net, ours))
    optimizer = torch.optim.AdamW(net.parameters(), amsgrad=True)
    set_optimizer_state_dict(net, optimizer, saved)
    train(net, optimizer, range(8, 12), rank, clip=True)
    assert_same_parameters(net, alone)
    for a, b in zip(optimizer.state.values(), stayed.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(relative_error(whole(a[name]), b[name].double()) < 1e-4 for name in a)


def placements(rank, mesh):
    """Other placements than FSDP2's."""
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    values, grads = make(6, 4), make(6, 4, seed=1)
    plain = nn.Parameter(values.clone())
    plain.grad = grads.clone()
    expected = AdamW([plain], max_grad_norm=0.5)
    expected.step()
    for on, places in (
        (mesh, [Replicate()]),
        (mesh, [Shard(0)]),
        (mesh, [Shard(1)]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(1), Replicate()]),
    ):
        param = nn.Parameter(distribute_tensor(values.clone(), on, places))
        param.grad = distribute_tensor(grads.clone(), on, places)
        optimizer = AdamW([param], max_grad_norm=0.5)
        optimizer.step()
        assert relative_error(optimizer.grad_norm, grads.double().norm()) < 1e-6
        assert relative_error(whole(param), plain.detach().double()) < 1e-6

    # A Partial gradient becomes a sum with the placement of its parameter.
    param = nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
    param.grad = distribute_tensor(grads.clone(), mesh, [Shard(0)])
    half = DTensor.from_local(grads / 2, mesh, [Partial()])
    replicated = nn.Parameter(distribute_tensor(values.clone(), mesh, [Replicate()]))
    replicated.grad = half
    optimizer = AdamW([replicated], max_grad_norm=0.5)
    optimizer.step()
    assert relative_error(whole(replicated), plain.detach().double()) < 1e-6

    # Plain and sharded parameters together: one norm.
    both = AdamW([nn.Parameter(values.clone()), param], max_grad_norm=0.5)
    both.param_groups[0]["params"][0].grad = grads.clone()
    both.step()
    assert relative_error(both.grad_norm, 2**0.5 * grads.double().norm()) < 1e-6

    summands = nn.Parameter(DTensor.from_local(values / 2, mesh, [Partial()]))
    summands.grad = DTensor.from_local(grads / 2, mesh, [Partial()])
    optimizer = AdamW([summands])
    with pytest.raises(ValueError, match=r"must be sharded or replicated, got a DTensor with placements .*Partial"):
        optimizer.step()
    elsewhere = nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
    elsewhere.grad = distribute_tensor(grads.clone(), grid, [Replicate(), Replicate()])
    optimizer = AdamW([elsewhere])
    with pytest.raises(ValueError, match="gradients must be on the mesh of their parameters"):
        optimizer.step()
    assert not optimizer.state


def scaled(rank, mesh):
    """If a gradient is infinite in one process's shard, both skip the step."""
    net = sharded(mesh)
    optimizer = AdamW(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(2):
        optimizer.zero_grad()
        before = [whole(param).clone() for param in net.parameters()]
        scaler.scale(net(batch(step, rank)).sum()).backward()
        if step == 1 and rank == 1:
            next(net.parameters()).grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(whole(param), b) for param, b in zip(net.parameters(), before, strict=True))
        assert same == (step == 1)


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for run in (checks, placements, scaled):
        run(rank, mesh)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """DDP, FSDP2, checkpoints, placements and gradient scalers; see the functions above."""
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
