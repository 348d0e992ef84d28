"""Greedy choice and draws over vocabularies: python -m pytest benchmarks/bench_sampling.py [--device cpu|cuda|mps]

Beside them are torch.argmax and what generate() does: Hugging Face's warpers, softmax, multinomial.
"""

from collections.abc import Callable

import torch
from cases import Case
from peers import peers
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from torch_fused.sampling import greedy, sample

SHAPES = [(1, 32000), (1, 151936), (32, 151936)]


def hugging_face(*warpers: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            x = warper(None, x)
        return torch.multinomial(x.softmax(-1), 1)

    return call


def top_k_multinomial(x: torch.Tensor) -> torch.Tensor:
    """The least that torch can do for top-k: no mask over the vocabulary."""
    values, ids = x.topk(50)
    return ids.gather(-1, torch.multinomial(values.softmax(-1), 1))


TOP_K, TOP_P = TopKLogitsWarper(50), TopPLogitsWarper(0.9)
OPS = {
    "greedy": {"torch_fused": greedy, "torch.argmax": lambda x: x.argmax(-1)},
    "top-k 50": {
        "torch_fused": lambda x: sample(x, top_k=50, seed=1),
        "torch.topk, multinomial": top_k_multinomial,
        "HF chain": hugging_face(TOP_K),
    },
    "top-k 50, top-p 0.9": {
        "torch_fused": lambda x: sample(x, top_k=50, top_p=0.9, seed=1),
        "HF chain": hugging_face(TOP_K, TOP_P),
    },
    "top-p 0.9": {"torch_fused": lambda x: sample(x, top_p=0.9, seed=1), "HF chain": hugging_face(TOP_P)},
    "top-p 0.95": {
        "torch_fused": lambda x: sample(x, top_p=0.95, seed=1),
        "HF chain": hugging_face(TopPLogitsWarper(0.95)),
    },
    "whole vocabulary": {"torch_fused": lambda x: sample(x, seed=1), "softmax, multinomial": hugging_face()},
}
KINDS = {
    "normal": lambda shape, device: torch.randn(shape, device=device) * 2,
    "nearly flat": lambda shape, device: torch.randn(shape, device=device) * 1e-3,
    "all equal": lambda shape, device: torch.zeros(shape, device=device),
}


def cases(device: str, full: bool) -> list[Case]:
    def case(op: str, shape: tuple[int, int], kind: str) -> Case:
        def operands(device: str):
            return (KINDS[kind](shape, device),)

        nbytes = 4 * shape[0] * shape[1]
        return Case(op, str(shape), torch.float32, nbytes, operands, OPS[op] | peers(op), kind=kind)

    return [case(op, shape, kind) for shape in SHAPES for kind in KINDS for op in OPS]


def test_sampling(bench):
    bench()
