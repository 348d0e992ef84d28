"""A step of a decoder of SmolLM2-135M's shape as one op: python -m pytest benchmarks/bench_decode.py --device cpu

Beside it is a plain read of the same bytes, the weights and the cache. Shapes are batch x tokens behind a context.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from cases import Case

from torch_fused.ops.decode import decode_, make_decoder

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 30, 576, 9, 3, 64, 1536, 49152
SHAPES = [(1, 1, 128), (1, 1, 4096), (1, 1, 32768), (4, 1, 128), (8, 1, 128), (1, 8, 128)]


@lru_cache(maxsize=1)
def decoder(device: str, dtype: torch.dtype):
    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).to(dtype)

    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layers: list[torch.Tensor | None] = []
    for _ in range(LAYERS):
        attention = [weight(queries, HIDDEN), None, weight(keys, HIDDEN), None, weight(keys, HIDDEN), None, None, None]
        feed_forward = [weight(INTERMEDIATE, HIDDEN), weight(INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE)]
        layers += [weight(HIDDEN), *attention, weight(HIDDEN, queries), None, weight(HIDDEN), *feed_forward]
    embedding = weight(VOCABULARY, HIDDEN)
    scaling = HEAD_DIM**-0.5
    return make_decoder(embedding, layers, weight(HIDDEN), embedding, heads=HEADS, eps=1e-5, scaling=scaling)


def nbytes(batch: int, steps: int, length: int, dtype: torch.dtype) -> int:
    layer = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    cache = 2 * LAYERS * batch * KV_HEADS * (length + steps) * HEAD_DIM
    return (LAYERS * layer + (VOCABULARY + 1) * HIDDEN + cache) * dtype.itemsize


def step(batch: int, steps: int, length: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    states = (batch, KV_HEADS, length + steps, HEAD_DIM)
    keys, values = ([torch.randn(states, device=device).to(dtype) for _ in range(LAYERS)] for _ in range(2))
    ids = torch.zeros(batch, steps, dtype=torch.long, device=device)
    angles = torch.rand(length + steps, HEAD_DIM, device=device).to(dtype)
    model = decoder(device, dtype)
    return lambda: decode_(model, ids, ids, None, angles, angles, keys, values, length, logits_to_keep=1)


def plain_read(batch: int, steps: int, length: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    return torch.ones(nbytes(batch, steps, length, dtype) // 4, device=device).sum


def cases(device: str, full: bool) -> list[Case]:
    def case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
        return Case(
            "decode",
            "{} x {} behind {}".format(*shape),
            dtype,
            nbytes(*shape, dtype),
            lambda device: (*shape, device, dtype),
            {"torch_fused": step, "a plain read": plain_read},
            prepare=lambda make, *operands: make(*operands),
        )

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [case(shape, dtype) for dtype in dtypes for shape in SHAPES]


def test_decode(bench):
    bench()
