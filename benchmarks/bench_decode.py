"""One step of a decoder of SmolLM2-135M's shape as one op on the CPU, beside a plain read of the same bytes.

python benchmarks/bench_decode.py [--threads N]
"""

import sys
from pathlib import Path

import torch
from harness import arguments, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.ops.decode import decode_
from torch_fused.testing import NAMES

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 30, 576, 9, 3, 64, 1536, 49152


def model(dtype: torch.dtype) -> dict:
    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype) * shape[-1] ** -0.5

    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layers: list[torch.Tensor | None] = []
    for _ in range(LAYERS):
        attention = [weight(queries, HIDDEN), None, weight(keys, HIDDEN), None, weight(keys, HIDDEN), None, None, None]
        feed_forward = [weight(INTERMEDIATE, HIDDEN), weight(INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE)]
        layers += [weight(HIDDEN), *attention, weight(HIDDEN, queries), None, weight(HIDDEN), *feed_forward]
    embedding = weight(VOCABULARY, HIDDEN)
    return {"embedding": embedding, "layers": layers, "norm": weight(HIDDEN), "head": embedding}


def bench(dtype: torch.dtype) -> None:
    weights = model(dtype)
    tensors = [weights["embedding"], *(tensor for tensor in weights["layers"] if tensor is not None)]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    plain = torch.ones(nbytes // 4)
    angles = torch.rand(32769, HEAD_DIM, dtype=dtype)
    print(f"{NAMES[dtype]}: {nbytes / 1e6:.0f} MB of weights")
    for length, batch, steps in ((128, 1, 1), (4096, 1, 1), (32768, 1, 1), (128, 4, 1), (128, 8, 1), (128, 1, 8)):
        states = (batch, KV_HEADS, length + steps, HEAD_DIM)
        keys, values = ([torch.randn(states, dtype=dtype) for _ in range(LAYERS)] for _ in range(2))
        ids = torch.zeros(batch, steps, dtype=torch.long)

        def step(ids=ids, length=length, keys=keys, values=values):
            decode_(
                ids, ids, None, cos=angles, sin=angles, keys=keys, values=values, length=length, **weights,
                heads=HEADS, eps=1e-5, scaling=HEAD_DIM**-0.5, logits_to_keep=1,
            )  # fmt: skip

        read = nbytes + sum(tensor.nbytes for tensor in (*keys, *values))
        # The machine's bandwidth changes with what its neighbours do: the read is timed right beside.
        limit = measure(plain.sum, [()], "cpu", samples=9).seconds * read / plain.nbytes
        timing = measure(step, [()], "cpu", samples=9)
        print(
            f"  {batch} x {steps} tokens behind {length:5d} {timing.seconds * 1e3:8.2f} ms  "
            f"+-{timing.spread * 100:3.0f} %  {batch * steps / timing.seconds:7.1f} tokens a second  "
            f"{read / timing.seconds / 1e9:5.1f} GB/s  {limit / timing.seconds:5.2f} of a plain read",
            flush=True,
        )


if __name__ == "__main__":
    arguments(__doc__)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bench(dtype)
