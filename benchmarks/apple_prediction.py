"""Times of the ops, and of whole tokens, on Apple GPUs: predicted where there is none, measured where there is.

    python benchmarks/apple_prediction.py

A prediction is made of what the emulator counts, the launches of an op and the bytes that each moves between a kernel
and its buffers, of Apple's published memory bandwidth, and of two bounds for what a launch costs and for the share of
the bandwidth that is reached. On a Mac the same command times the ops instead, and the report shows these times.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from bench_adamw import SMALL
from bench_decode import GROUP_SIZE, LLAMA, QWEN, Sizes, decoder, operands
from cases import randn
from harness import Call, arguments, measure
from progress import Progress
from record import Results

from torch_fused import functional, sampling
from torch_fused.metal import emulate
from torch_fused.ops.decode import decode_, decode_token_
from torch_fused.ops.kv_cache import kv_append_
from torch_fused.optim import AdamW

KEYS = ("op", "shape", "dtype")
COUNTED = ("launches", "bytes")
BANDWIDTH = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max, 14-core CPU": 300,
    "M3 Max, 16-core CPU": 400,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max, 32-core GPU": 410,
    "M4 Max, 40-core GPU": 546,
}
"""GB/s, from Apple's technical specifications."""
LAUNCH_SECONDS = (2e-6, 12e-6)
"""From kernels that follow each other in one command buffer, to the host time of a launch through torch."""
SHARE_REACHED = (1.0, 0.7)


Counts = tuple[int, int]
"""Launches, and the bytes that they move."""


def counted(call: Call) -> Counts:
    """Of one call; a byte that one launch reads twice counts once."""
    with emulate() as run:
        call()
    moved = sum(buffer.distinct_read + buffer.distinct_written for launch in run.launches for buffer in launch.buffers)
    return len(run.launches), moved


@dataclass(frozen=True)
class Op:
    name: str
    shape: str
    dtype: str
    make: Callable[[str], Call]
    counts: Callable[[], Counts] | None = None  # for an op that is too long for the emulator

    def counted(self) -> Counts:
        return self.counts() if self.counts else counted(self.make("cpu"))


def predicted(nbytes: float, launches: float, gb_s: float) -> tuple[float, float]:
    """The least and the most seconds that are expected of these bytes and launches."""
    low, high = (
        nbytes / (gb_s * 1e9 * share) + launches * launch
        for share, launch in zip(SHARE_REACHED, LAUNCH_SECONDS, strict=True)
    )
    return low, high


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows_op(name: str, inputs: int, weights: int, call: Callable[..., object]) -> Callable[..., Op]:
    def op(rows: int, cols: int, dtype: torch.dtype) -> Op:
        def make(device: str) -> Call:
            shapes = [(rows, cols)] * inputs + [(cols,)] * weights
            operands = [randn(*shape, dtype=dtype, device=device) for shape in shapes]
            return lambda: call(*operands)

        return Op(name, f"({rows}, {cols})", dtype_name(dtype), make)

    return op


def rotary(dtype: torch.dtype) -> Op:
    def make(device: str) -> Call:
        q, k = (randn(1, heads, 1, 64, dtype=dtype, device=device) for heads in (14, 2))
        tables = [randn(1, 1, 64, dtype=dtype, device=device) for _ in range(2)]
        return lambda: functional.apply_rotary_pos_emb(q, k, *tables)

    return Op("apply_rotary_pos_emb", "(1, 1, 14, 2, 64)", dtype_name(dtype), make)


def append(dtype: torch.dtype) -> Op:
    def make(device: str) -> Call:
        keys, values = (randn(1, 2, 4096, 64, dtype=dtype, device=device) for _ in range(2))
        token = randn(1, 2, 1, 64, dtype=dtype, device=device)
        return lambda: kv_append_(keys, values, token, token, 1024)

    return Op("kv_append_", "one token, one layer", dtype_name(dtype), make)


def adamw(dtype: torch.dtype) -> Op:
    def make(device: str) -> Call:
        params = [torch.nn.Parameter(randn(*shape, dtype=dtype, device=device)) for shape in SMALL]
        for param in params:
            param.grad = torch.ones_like(param)
        return AdamW(params).step

    return Op("AdamW", f"8 million in {len(SMALL)} tensors", dtype_name(dtype), make)


TOKEN = "a greedy token"
CONTEXT, PART = 128, 1024  # tokens; those in a part of a vocabulary


def token(sizes: Sizes, bits: int) -> Op:
    """A greedy token of a whole model, by `decode_token_`."""
    half, shape = torch.bfloat16, (1, 1, CONTEXT)

    def make(device: str) -> Call:
        model, rest = decoder(sizes, bits, device, half), operands(sizes, shape, device, half)
        return lambda: decode_token_(model, *rest)

    def of_part(layers: int, vocabulary: int) -> Counts:
        part = replace(sizes, layers=layers, vocabulary=vocabulary)
        model, rest = decoder(part, bits, "cpu", half), operands(part, shape, "cpu", half)
        return counted(lambda: decode_(model, *rest))

    def counts() -> Counts:
        """From one layer and two, and from two vocabularies: with each the counts grow by as much."""
        one, two, wide = of_part(1, PART), of_part(2, PART), of_part(1, 2 * PART)
        greedy = counted(lambda: sampling.greedy(torch.zeros(1, sizes.vocabulary)))

        def whole(i: int) -> int:
            layers = (sizes.layers - 1) * (two[i] - one[i])
            return one[i] + layers + (sizes.vocabulary - PART) * (wide[i] - one[i]) // PART + greedy[i]

        return whole(0), whole(1)

    weights = f"{bits} bits in groups of {GROUP_SIZE}" if bits else "bfloat16"
    return Op(TOKEN, f"{sizes.name} behind {CONTEXT}", weights, make, counts)


def ops() -> list[Op]:
    norm = rows_op("rms_norm", 1, 1, lambda x, w: functional.rms_norm(x, w.shape, w))
    add_norm = rows_op("add_rms_norm", 2, 1, functional.add_rms_norm)
    layer_norm = rows_op("layer_norm", 1, 2, lambda x, w, b: functional.layer_norm(x, w.shape, w, b))
    softmax = rows_op("softmax", 1, 0, functional.softmax)
    silu_mul = rows_op("silu_mul", 2, 0, functional.silu_mul)
    half = torch.bfloat16
    return [
        *(op(rows, 896, half) for op in (norm, add_norm, layer_norm) for rows in (1, 1024)),
        *(silu_mul(rows, 4864, half) for rows in (1, 1024)),
        softmax(1024, 1024, half),
        rotary(half),
        append(half),
        rows_op("greedy", 1, 0, sampling.greedy)(1, 151936, torch.float32),
        rows_op("sample, top-k 50", 1, 0, lambda x: sampling.sample(x, top_k=50, seed=1))(1, 151936, torch.float32),
        rows_op("sample, top-p 0.9", 1, 0, lambda x: sampling.sample(x, top_p=0.9, seed=1))(1, 151936, torch.float32),
        adamw(torch.float32),
        *(token(sizes, bits) for sizes in (QWEN, LLAMA) for bits in (0, 4)),
    ]


def main() -> None:
    args = arguments(__doc__)
    measures = args.device == "mps"
    name, values = ("apple", ("ms", "spread")) if measures else ("apple_counted", COUNTED)
    results = Results(name, KEYS, values, args.results, args.device if measures else "cpu", args.again)
    torch.manual_seed(0)
    with torch.no_grad(), Progress(name, len(ops())) as progress:
        for op in ops():
            key = {"op": op.name, "shape": op.shape, "dtype": op.dtype}
            row = results.current(**key)
            if row is None and measures:
                timing = measure([op.make("mps")], "mps")
                row = results.add(**key, ms=timing.seconds * 1e3, spread=timing.spread)
            elif row is None:
                row = results.add(**key, **dict(zip(COUNTED, map(str, op.counted()), strict=True)))
            progress.say("  ".join((*key.values(), *(f"{row[name]} {name}" for name in values))))
            progress.advance()


if __name__ == "__main__":
    main()
