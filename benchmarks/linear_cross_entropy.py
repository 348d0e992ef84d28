"""The loss of a head and its gradients: time, and the memory beyond the operands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peers import kernels
from record import Case
from timing import Columns, steps
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_fused.functional import linear_cross_entropy
from torch_fused.testing import NAMES

CLASSES = 151936
CHUNK = 512  # rows
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def composed(hidden: Tensor, weight: Tensor, target: Tensor, as_transformers: bool = False, **options: str) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float() if as_transformers else logits, target, **options)


def in_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As a loop, whose backward computes the logits of each chunk again."""
    total = partial(composed, reduction="sum")
    parts = zip(hidden.split(CHUNK), target.split(CHUNK), strict=True)
    losses = [checkpoint(total, some, weight, classes, use_reentrant=False) for some, classes in parts]
    return torch.stack(losses).sum() / target.numel()


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, **options: int | None) -> Tensor:
    """Torch's own, since 2.13, with chunks as it chooses them or of so many rows."""
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions(**options))


@dataclass(frozen=True, eq=False)
class LossCase(Case):
    values: torch.dtype
    tokens: int
    features: int

    def contenders(self, device: str) -> Mapping[str, Loss]:
        found: dict[str, Loss] = {"torch_fused": linear_cross_entropy, "torch": composed}
        if self.values != torch.float32:
            found["transformers"] = partial(composed, as_transformers=True)
        if hasattr(F, "linear_cross_entropy"):
            # As many rows as ours have here.
            found["F.linear_cross_entropy, 128 rows"] = partial(chunked, batch_chunk_size=128, chunking_method=None)
            if device != "cpu":  # there its own choice is two rows, which take minutes
                found["F.linear_cross_entropy, chunked"] = chunked
        elif device != "cpu":
            found["torch, in chunks"] = in_chunks
        return found | (kernels(self.op) if device.startswith("cuda") else {})

    def measure(self, contenders: Mapping[str, Loss], device: str) -> dict[str, Columns]:
        torch.manual_seed(0)
        with torch.device(device):
            hidden = torch.randn(self.tokens, self.features).to(self.values).requires_grad_()
            weight = (torch.randn(CLASSES, self.features) * 0.02).to(self.values).requires_grad_()
            target = torch.randint(CLASSES, (self.tokens,))

        def step(loss: Loss) -> None:
            loss(hidden, weight, target).backward()
            hidden.grad = weight.grad = None

        found = steps({name: partial(step, loss) for name, loss in contenders.items()}, device)
        return {name: row | {"weight_grad_mb": weight.nbytes / 1e6} for name, row in found.items()}


def losses(device: str, full: bool) -> list[LossCase]:
    shapes = [(512, 576), (512, 896), (2048, 896), (8192, 896)]
    shapes = shapes if device != "cpu" else shapes[:2] if full else shapes[:1]
    return [
        LossCase("linear_cross_entropy", str((*shape, CLASSES)), NAMES[dtype], "", dtype, *shape)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
