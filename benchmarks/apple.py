"""Times of the ops, and of whole tokens, on Apple GPUs: measured on a Mac, elsewhere predicted.

    python benchmarks/apple.py

A prediction uses what the emulator counts, the launches of an op and the bytes that each moves between a kernel and
its buffers; Apple's published memory bandwidth; and two bounds for the cost of a launch and for the share of the
bandwidth that is reached. On a Mac the same command times the ops, and the report shows these times.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from decode import GROUP_SIZE, LLAMA, QWEN, Sizes, decoder, operands
from ops import SMALL, randn
from record import Results
from timing import Call, arguments, interleave

from torch_fused import functional, sampling
from torch_fused.metal import emulate
from torch_fused.ops.decode import decode_, decode_token_
from torch_fused.ops.kv_cache import kv_append_
from torch_fused.optim import AdamW

KEYS = ("op", "shape", "dtype")
COUNTED = ("launches", "bytes")
BANDWIDTH = {
    "M1": 68.25, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M3": 100,
    "M3 Pro": 150, "M3 Max, 14-core CPU": 300, "M3 Max, 16-core CPU": 400, "M4": 120, "M4 Pro": 273,
    "M4 Max, 32-core GPU": 410, "M4 Max, 40-core GPU": 546,
}  # fmt: skip
"""GB/s, from Apple's technical specifications."""
LAUNCH_SECONDS = (2e-6, 12e-6)
"""From kernels that follow each other in one command buffer, to the host's time for a launch through torch."""
SHARE_REACHED = (1.0, 0.7)
TOKEN = "a greedy token"
CONTEXT, PART = 128, 1024  # tokens; those in a part of a vocabulary
Counts = tuple[int, int]
"""Launches, and the bytes that they move."""


def counted(call: Call) -> Counts:
    """Of one call. A byte that one launch reads twice counts once."""
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
    counts: Callable[[], Counts] | None = None  # for an op that takes too long in the emulator

    def counted(self) -> Counts:
        return self.counts() if self.counts else counted(self.make("cpu"))


def predicted(nbytes: float, launches: float, gb_s: float) -> tuple[float, float]:
    """The least and the most seconds that these bytes and launches should take."""
    low, high = (
        nbytes / (gb_s * 1e9 * share) + launches * launch
        for share, launch in zip(SHARE_REACHED, LAUNCH_SECONDS, strict=True)
    )
    return low, high


def op(name: str, shape: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, call: Callable[..., object]) -> Op:
    """An op of random operands of `shapes`."""

    def make(device: str) -> Call:
        tensors = [randn(*each, dtype=dtype, device=device) for each in shapes]
        return lambda: call(*tensors)

    return Op(name, shape, str(dtype).removeprefix("torch."), make)


def by_rows(name: str, inputs: int, weights: int, rows: int, cols: int, call: Callable[..., object]) -> Op:
    dtype = torch.float32 if name.startswith(("greedy", "sample")) else torch.bfloat16
    return op(name, f"({rows}, {cols})", [(rows, cols)] * inputs + [(cols,)] * weights, dtype, call)


def adamw() -> Op:
    def make(device: str) -> Call:
        params = [torch.nn.Parameter(randn(*shape, dtype=torch.float32, device=device)) for shape in SMALL]
        for param in params:
            param.grad = torch.ones_like(param)
        return AdamW(params).step

    return Op("AdamW", f"8 million in {len(SMALL)} tensors", "float32", make)


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
        """From one layer and two, and from two vocabularies: the counts grow by the same amount with each."""
        one, two, wide = of_part(1, PART), of_part(2, PART), of_part(1, 2 * PART)
        greedy = counted(lambda: sampling.greedy(torch.zeros(1, sizes.vocabulary)))

        def whole(i: int) -> int:
            layers = (sizes.layers - 1) * (two[i] - one[i])
            return one[i] + layers + (sizes.vocabulary - PART) * (wide[i] - one[i]) // PART + greedy[i]

        return whole(0), whole(1)

    weights = f"{bits} bits in groups of {GROUP_SIZE}" if bits else "bfloat16"
    return Op(TOKEN, f"{sizes.name} after {CONTEXT}", weights, make, counts)


def ops() -> list[Op]:
    half, layer, one = torch.bfloat16, (1, 2, 4096, 64), (1, 2, 1, 64)
    norm, layer_norm = functional.rms_norm, functional.layer_norm
    rotated = [(1, 14, 1, 64), (1, 2, 1, 64), (1, 1, 64), (1, 1, 64)]
    return [
        *(by_rows("rms_norm", 1, 1, rows, 896, lambda x, w: norm(x, w.shape, w)) for rows in (1, 1024)),
        *(by_rows("add_rms_norm", 2, 1, rows, 896, functional.add_rms_norm) for rows in (1, 1024)),
        *(by_rows("layer_norm", 1, 2, rows, 896, lambda x, w, b: layer_norm(x, w.shape, w, b)) for rows in (1, 1024)),
        *(by_rows("silu_mul", 2, 0, rows, 4864, functional.silu_mul) for rows in (1, 1024)),
        by_rows("softmax", 1, 0, 1024, 1024, functional.softmax),
        op("apply_rotary_pos_emb", "(1, 1, 14, 2, 64)", rotated, half, functional.apply_rotary_pos_emb),
        op("kv_append_", "one token, one layer", [layer, layer, one, one], half, lambda *x: kv_append_(*x, 1024)),
        by_rows("greedy", 1, 0, 1, 151936, sampling.greedy),
        by_rows("sample, top-k 50", 1, 0, 1, 151936, lambda x: sampling.sample(x, top_k=50, seed=1)),
        by_rows("sample, top-p 0.9", 1, 0, 1, 151936, lambda x: sampling.sample(x, top_p=0.9, seed=1)),
        adamw(),
        *(token(sizes, bits) for sizes in (QWEN, LLAMA) for bits in (0, 4)),
    ]


def main() -> None:
    args = arguments(__doc__)
    measures = args.device == "mps"
    name, values = ("apple", ("ms", "spread")) if measures else ("apple_counted", COUNTED)
    results = Results(name, KEYS, values, args.results, args.device if measures else "cpu", args.again)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    for each in ops():

        def columns(each: Op = each) -> dict[str, dict[str, float | str]]:
            if not measures:
                return {"": dict(zip(COUNTED, map(str, each.counted()), strict=True))}
            timing = interleave({"": [each.make("mps")]}, "mps")[""]
            return {"": {"ms": timing.seconds * 1e3, "spread": timing.spread}}

        row = results.rows({"": {"op": each.name, "shape": each.shape, "dtype": each.dtype}}, columns)[""]
        print("  ".join(row[key] for key in KEYS), *(f"{row[value]} {value}" for value in values), flush=True)


if __name__ == "__main__":
    main()
