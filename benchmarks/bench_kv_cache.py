"""Appending one token to the cache of Qwen2.5-0.5B (24 layers, 2 heads of 64, bfloat16), FusedKVCache and stock.

    pytest benchmarks/bench_kv_cache.py

Beside the times, `extra_info` has the bytes each cache holds.
"""

import itertools

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, StaticCache

from torch_fused.hf import FusedKVCache

LENGTHS = [512, 4096, 32768]
STEPS = 64
"""Tokens appended after the prompt; the caches have room for them, so that no growth falls among the timed calls."""

CONFIG = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
CACHES = {
    "fused": lambda length: FusedKVCache(CONFIG, expected_len=length),
    "dynamic": lambda length: DynamicCache(config=CONFIG),
    "static": lambda length: StaticCache(config=CONFIG, max_cache_len=length),
}


def states(tokens):
    return torch.randn(1, tokens, 2, 64, dtype=torch.bfloat16).transpose(1, 2)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CACHES)
def test_append_one_token(benchmark, name, length):
    """One token in all 24 layers; at 32768 tokens at most 1.5x the time at 512, whatever the length."""
    torch.set_num_threads(2)
    cache = CACHES[name](length + STEPS)
    layers = range(CONFIG.num_hidden_layers)
    token = states(1)

    def append():
        for layer in layers:
            cache.update(token, token, layer)

    with torch.no_grad():
        for layer in layers:
            cache.update(states(length), states(length), layer)
        benchmark.group = f"append one token at {length}"
        benchmark.pedantic(append, rounds=STEPS - 4, warmup_rounds=4)
    tensors = itertools.chain.from_iterable((layer.keys, layer.values) for layer in cache.layers)
    held = cache.nbytes if name == "fused" else sum(tensor.nbytes for tensor in tensors)
    benchmark.extra_info["MB held"] = round(held / 2**20, 1)
