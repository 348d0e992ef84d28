"""greedy and sample beside torch.argmax and Hugging Face's warpers with torch.multinomial, over whole vocabularies.

python benchmarks/bench_sampling.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import arguments, copies, copy_bandwidth, measure, report
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.sampling import greedy, sample

SHAPES = [(1, 32000), (1, 151936), (16, 151936)]


def hugging_face(*warpers: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The chain of a sampling step in generate(): the warpers, softmax, multinomial."""

    def call(x: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            x = warper(None, x)
        return torch.multinomial(x.softmax(-1), 1)

    return call


def bench(rows: int, vocabulary: int, device: str) -> None:
    nbytes = rows * vocabulary * 4
    rows_like = {
        "normal logits": lambda i: (torch.randn(rows, vocabulary, device=device) * 2,),
        "all equal": lambda i: (torch.zeros(rows, vocabulary, device=device),),
    }
    top_k, top_p = TopKLogitsWarper(50), TopPLogitsWarper(0.9)
    groups = {
        "greedy": (greedy, {"torch.argmax": lambda x: x.argmax(-1)}),
        "top-k 50": (
            lambda x: sample(x, top_k=50, seed=1),
            {"HF warper alone": lambda x: top_k(None, x), "HF chain": hugging_face(top_k)},
        ),
        "top-p 0.9": (
            lambda x: sample(x, top_p=0.9, seed=1),
            {"HF warper alone": lambda x: top_p(None, x), "HF chain": hugging_face(top_p)},
        ),
        "top-k 50, top-p 0.9": (
            lambda x: sample(x, top_k=50, top_p=0.9, seed=1),
            {"HF chain": hugging_face(top_k, top_p)},
        ),
        "whole vocabulary": (lambda x: sample(x, seed=1), {"softmax, multinomial": hugging_face()}),
    }
    copy = copy_bandwidth(nbytes, device)
    for kind, make in rows_like.items():
        sets = copies(make, nbytes, device)
        for name, (ours, others) in groups.items():
            print(f"{name} ({rows}, {vocabulary}) f32, {kind}, copy of the same bytes {copy / 1e9:.0f} GB/s")
            first = None
            for label, call in {"torch_fused": ours, **others}.items():
                timing = measure(call, sets, device, samples=7)
                report(label, timing, nbytes, copy, first)
                first = first or timing


if __name__ == "__main__":
    args = arguments(__doc__)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} CPU threads; 'x the time': torch_fused's is 1.00")
    with torch.no_grad():
        for rows, vocabulary in SHAPES:
            bench(rows, vocabulary, args.device)
