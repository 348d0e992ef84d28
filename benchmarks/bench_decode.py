"""A step of a decoder of SmolLM2-135M's shape as one CPU op: python -m pytest benchmarks/bench_decode.py --device cpu

Beside it is a plain read of the same bytes, the weights and the cache. Shapes are batch x tokens behind a context.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from cases import Case

from torch_fused.ops.decode import decode_

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 30, 576, 9, 3, 64, 1536, 49152
SHAPES = [(1, 1, 128), (1, 1, 4096), (1, 1, 32768), (4, 1, 128), (8, 1, 128), (1, 8, 128)]


@lru_cache(maxsize=1)
def weights(dtype: torch.dtype) -> dict:
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


def nbytes(batch: int, steps: int, length: int, dtype: torch.dtype) -> int:
    layer = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    cache = 2 * LAYERS * batch * KV_HEADS * (length + steps) * HEAD_DIM
    return (LAYERS * layer + (VOCABULARY + 1) * HIDDEN + cache) * dtype.itemsize


def step(batch: int, steps: int, length: int, dtype: torch.dtype) -> Callable[[], object]:
    states = (batch, KV_HEADS, length + steps, HEAD_DIM)
    keys, values = ([torch.randn(states, dtype=dtype) for _ in range(LAYERS)] for _ in range(2))
    ids = torch.zeros(batch, steps, dtype=torch.long)
    angles = torch.rand(length + steps, HEAD_DIM, dtype=dtype)
    return lambda: decode_(
        ids, ids, None, cos=angles, sin=angles, keys=keys, values=values, length=length, **weights(dtype),
        heads=HEADS, eps=1e-5, scaling=HEAD_DIM**-0.5, logits_to_keep=1,
    )  # fmt: skip


def plain_read(*shape) -> Callable[[], object]:
    return torch.ones(nbytes(*shape) // 4).sum


def cases(device: str, full: bool) -> list[Case]:
    def case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
        return Case(
            "decode",
            "{} x {} behind {}".format(*shape),
            dtype,
            nbytes(*shape, dtype),
            lambda _: (*shape, dtype),
            {"torch_fused": step, "a plain read": plain_read},
            prepare=lambda make, *operands: make(*operands),
        )

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [case(shape, dtype) for dtype in dtypes for shape in SHAPES] if device == "cpu" else []


def test_decode(bench):
    bench()
