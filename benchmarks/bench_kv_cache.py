"""A token appended to all layers of a cache: python -m pytest benchmarks/bench_kv_cache.py [--device cpu|cuda|mps]

The cache is that of Qwen2.5-0.5B, 24 layers of 2 heads of 64; the shape is how many tokens it holds.
"""

from collections.abc import Callable

import torch
from cases import Case, randn
from harness import Call
from transformers import DynamicCache, Qwen2Config, StaticCache

from torch_fused.hf import FusedKVCache

CONFIG = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
ROOM = 64
CONTENDERS = {
    "FusedKVCache": lambda length: FusedKVCache(CONFIG, expected_len=length),
    "DynamicCache": lambda length: DynamicCache(config=CONFIG),
    "StaticCache": lambda length: StaticCache(config=CONFIG, max_cache_len=length),
}


def filled(make: Callable[[int], DynamicCache], prompt: torch.Tensor, token: torch.Tensor) -> Call:
    cache = make(prompt.shape[2] + ROOM)

    def append(states: torch.Tensor) -> None:
        for layer in range(CONFIG.num_hidden_layers):
            cache.update(states, states, layer)

    append(prompt)
    return lambda: append(token)


def cases(device: str, full: bool) -> list[Case]:
    def case(length: int) -> Case:
        def operands(device: str):
            # As attention hands them in: the projection's output, heads and tokens transposed.
            states = (randn(1, tokens, 2, 64, dtype=torch.bfloat16, device=device) for tokens in (length, 1))
            return tuple(tensor.transpose(1, 2) for tensor in states)

        shape = f"{length} tokens"
        return Case("kv append", shape, torch.bfloat16, 0, operands, CONTENDERS, prepare=filled, once=True)

    return [case(length) for length in (512, 4096, 32768)]


def test_kv_cache(bench):
    bench()
