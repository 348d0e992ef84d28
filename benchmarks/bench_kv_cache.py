"""Appending one token to the cache of Qwen2.5-0.5B (24 layers, 2 heads of 64, bfloat16): FusedKVCache beside stock.

python benchmarks/bench_kv_cache.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
from harness import arguments, measure
from transformers import DynamicCache, Qwen2Config, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.hf import FusedKVCache

CONFIG = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
CACHES = {
    "FusedKVCache": lambda length: FusedKVCache(CONFIG, expected_len=length),
    "DynamicCache": lambda length: DynamicCache(config=CONFIG),
    "StaticCache": lambda length: StaticCache(config=CONFIG, max_cache_len=length),
}
SAMPLES = 60
WARM_UP = 4


def states(tokens: int, device: str) -> torch.Tensor:
    """As attention hands them in: the projection's output, heads and tokens transposed."""
    return torch.randn(1, tokens, 2, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)


def bench(length: int, device: str) -> None:
    print(f"one token behind {length}, all layers")
    fused = None
    for name, make in CACHES.items():
        cache = make(length + WARM_UP + SAMPLES)
        prompt, token = states(length, device), states(1, device)

        def append(tokens, cache=cache):
            for layer in range(CONFIG.num_hidden_layers):
                cache.update(tokens, tokens, layer)

        append(prompt)
        # A target of no time makes every sample one call, so that the cache has grown by a known number of tokens.
        timing = measure(append, [(token,)], device, samples=SAMPLES, target=0)
        fused = fused or timing
        held = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))
        print(
            f"  {name:14s} {timing.seconds * 1e6:10.1f} us  {timing.seconds / fused.seconds:7.2f}x the time"
            f"  {held / 2**20:7.1f} MiB held",
            flush=True,
        )


if __name__ == "__main__":
    args = arguments(__doc__)
    with torch.no_grad():
        for length in (512, 4096, 32768):
            bench(length, args.device)
