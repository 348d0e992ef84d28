"""The loss of a head and its gradients: time, and the memory beyond the operands."""

import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from peers import kernels
from record import Case
from timing import Columns, columns, peak_megabytes, seconds
from torch import Tensor

from torch_fused.functional import linear_cross_entropy
from torch_fused.testing import NAMES

CLASSES, ROUNDS = 151936, 5
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def composed(hidden: Tensor, weight: Tensor, target: Tensor, as_transformers: bool = False) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float() if as_transformers else logits, target)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, **options: int | None) -> Tensor:
    """Torch's own, since 2.13, with chunks as it chooses them or of so many rows."""
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions(**options))


@cache
def operands(tokens: int, features: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, features, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(CLASSES, features, device=device) * 0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(CLASSES, (tokens,), device=device)


def sample(call: Step, case: "Loss", device: str, threads: int) -> tuple[float, float | None, float]:
    """In a contender's process: how long a step takes, how much memory, and how much of it it returns."""
    torch.set_num_threads(threads)
    hidden, weight, target = operands(case.tokens, case.features, case.values, device)

    def step() -> None:
        hidden.grad = weight.grad = None
        call(hidden, weight, target).backward()

    took = seconds(step, device, wall=True)
    hidden.grad = weight.grad = None
    peak = peak_megabytes(step, device)
    return took, peak, weight.grad.nbytes / 1e6


@dataclass(frozen=True, eq=False)
class Loss(Case):
    values: torch.dtype
    tokens: int
    features: int

    def contenders(self, device: str) -> Mapping[str, Step]:
        found: dict[str, Step] = {"torch_fused": linear_cross_entropy, "torch": composed}
        if self.values != torch.float32:
            found["transformers"] = partial(composed, as_transformers=True)
        if hasattr(F, "linear_cross_entropy"):
            # As many rows as ours have here.
            found["F.linear_cross_entropy, 128 rows"] = partial(chunked, batch_chunk_size=128, chunking_method=None)
            if device != "cpu":  # there its own choice is two rows, which take minutes
                found["F.linear_cross_entropy, chunked"] = chunked
        return found | (kernels(self.op) if device.startswith("cuda") else {})

    def measure(self, contenders: Mapping[str, Step], device: str) -> dict[str, Columns]:
        """Every contender runs in a process of its own, so that its peak is its own."""
        spawn, samples = multiprocessing.get_context("spawn"), {name: [] for name in contenders}
        with ExitStack() as stack:
            pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in contenders}
            for _ in range(ROUNDS + 1):
                for name, call in contenders.items():
                    task = pools[name].submit(sample, call, self, device, torch.get_num_threads())
                    samples[name].append(task.result())

        def row(times: list[float], peaks: list[float | None], grads: list[float]) -> Columns:
            peak = None if None in peaks else statistics.median(peaks)
            return columns(times) | {"peak_mb": peak, "weight_grad_mb": grads[0]}

        # The first round warms up.
        return {name: row(*zip(*each[1:], strict=True)) for name, each in samples.items()}


def losses(device: str, full: bool) -> list[Case]:
    shapes = [(512, 576), (512, 896), (2048, 896), (8192, 896)]
    shapes = shapes if device != "cpu" else shapes[:2] if full else shapes[:1]
    return [
        Loss("linear_cross_entropy", str((*shape, CLASSES)), NAMES[dtype], "", dtype, *shape)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
