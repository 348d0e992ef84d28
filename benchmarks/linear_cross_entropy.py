"""The loss of a head and its gradients: time, and the memory beyond the operands.

Every contender runs in a process of its own, so that its peak is its own. The weight's gradient, which all of them
return, is part of the memory and has a column of its own.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_megabytes
from peers import has
from record import Case, Columns
from timing import Timing
from torch import Tensor

from torch_fused.devices import synchronize
from torch_fused.functional import linear_cross_entropy
from torch_fused.testing import NAMES

CLASSES, ROUNDS = 151936, 5


def in_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def as_transformers(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Torch's own, since 2.13, with chunks as it chooses them."""
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def chunks_of_128(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """With chunks of as many rows as ours have here."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, chunking_method=None)
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import functional

    return functional.liger_fused_linear_cross_entropy(hidden, weight, target)


def serve(pipe: Any, call: Callable[..., Tensor], case: "Loss", device: str, threads: int) -> None:
    """A contender's process: whenever it is asked, how long a step takes, how much memory, and how much it returns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, case.features, device=device).to(case.values).requires_grad_()
    weight = (torch.randn(CLASSES, case.features, device=device) * 0.02).to(case.values).requires_grad_()
    target = torch.randint(CLASSES, (case.tokens,), device=device)

    def step() -> None:
        hidden.grad = weight.grad = None
        call(hidden, weight, target).backward()
        synchronize(device)

    while pipe.recv():
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        hidden.grad = weight.grad = None
        peak = peak_megabytes(step, device)
        assert weight.grad is not None
        pipe.send((seconds, peak, weight.grad.nbytes / 1e6))


@dataclass(frozen=True, eq=False)
class Loss(Case):
    values: torch.dtype
    tokens: int
    features: int

    def contenders(self, device: str) -> Mapping[str, Callable[..., Tensor]]:
        found: dict[str, Callable[..., Tensor]] = {"torch_fused": linear_cross_entropy, "torch": in_torch}
        if self.values != torch.float32:
            found["transformers"] = as_transformers
        if hasattr(F, "linear_cross_entropy"):
            found["F.linear_cross_entropy, 128 rows"] = chunks_of_128
            if device != "cpu":  # there its own choice is two rows, which take minutes
                found["F.linear_cross_entropy, chunked"] = chunked
        if device.startswith("cuda") and has("liger_kernel"):
            found["Liger-Kernel"] = liger
        return found

    def measure(self, contenders: Mapping[str, Any], device: str) -> dict[str, Columns]:
        context = multiprocessing.get_context("spawn")
        pipes, processes = {}, []
        for name, call in contenders.items():
            pipes[name], theirs = context.Pipe()
            arguments = theirs, call, self, device, torch.get_num_threads()
            processes.append(context.Process(target=serve, args=arguments))
            processes[-1].start()
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pipes}
        for _ in range(ROUNDS + 1):
            for name, pipe in pipes.items():
                pipe.send(True)
                samples[name].append(pipe.recv())
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(False)
            process.join()

        def columns(found: list[tuple[float, float, float]]) -> Columns:
            seconds, peaks, grads = zip(*found[1:], strict=True)  # the first warms up
            return {**Timing(seconds).columns(), "peak_mb": statistics.median(peaks), "weight_grad_mb": grads[0]}

        return {name: columns(found) for name, found in samples.items()}


def losses(device: str, full: bool) -> list[Case]:
    shapes = [(512, 576), (512, 896), (2048, 896), (8192, 896)]
    shapes = shapes if device != "cpu" else shapes[:2] if full else shapes[:1]
    return [
        Loss("linear_cross_entropy", str((*shape, CLASSES)), NAMES[dtype], "", dtype, *shape)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
