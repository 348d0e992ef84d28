"""What the emulator counts of the ops, and of whole tokens: the launches, and the bytes that each moves.

A prediction for an Apple GPU takes these bytes at its published memory bandwidth, and two bounds each for the cost of
a launch and the share of the bandwidth that is reached. On a Mac the other benchmarks measure these ops.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch
from cases import LISTS, Case
from models import config, made, step
from ops import adamw, by_rows, draws, rope
from timing import Call, Columns

from torch_fused import sampling
from torch_fused.metal import emulate
from torch_fused.ops.kv_cache import kv_append_

BANDWIDTH = {"M1": 68.25, "M2 Pro": 200, "M3 Pro": 150, "M4": 120, "M4 Pro": 273, "M4 Max": 546}
"""GB/s, from Apple's technical specifications; of the M4 Max with 40 GPU cores."""
LAUNCH_SECONDS = (2e-6, 12e-6)  # between kernels of one command buffer; the host's time for a launch through torch
SHARE_REACHED = (1.0, 0.7)
TOKEN, CONTEXT, PART = "a greedy token", 128, 1024  # tokens of a context, and in a part of a vocabulary
Counts = tuple[int, int]  # launches, and the bytes that they move


def counted(call: Call) -> Counts:
    """Of one call. A byte that one launch reads twice counts once."""
    with torch.no_grad(), emulate() as run:
        call()
    moved = sum(buffer.distinct_read + buffer.distinct_written for launch in run.launches for buffer in launch.buffers)
    return len(run.launches), moved


def predicted(nbytes: float, launches: float, gb_s: float) -> list[float]:
    """The least and the most seconds that these bytes and launches should take."""
    bounds = zip(SHARE_REACHED, LAUNCH_SECONDS, strict=True)
    return [nbytes / (gb_s * 1e9 * share) + launches * launch for share, launch in bounds]


def token(name: str, bits: int) -> Counts:
    """Of a greedy token of a model, from one layer and two, and from two vocabularies: counts grow evenly."""

    def part(layers: int, vocabulary: int) -> Counts:
        model = made(name, torch.bfloat16, "cpu", bits, num_hidden_layers=layers, vocab_size=vocabulary)
        return counted(step(model, (1, 1, CONTEXT)))

    layers, vocabulary = config(name).num_hidden_layers, config(name).vocab_size
    sampler = counted(partial(sampling.greedy, torch.zeros(1, vocabulary)))
    one, two, wide, rest = map(np.array, (part(1, PART), part(2, PART), part(1, 2 * PART), sampler))
    return tuple(one + (layers - 1) * (two - one) + (vocabulary - PART) * (wide - one) // PART + rest)


def columns(case: Case, device: str) -> dict[str, Columns]:
    call = case.calls()["torch_fused"]
    launches, moved = call() if case.op == TOKEN else counted(call)
    return {"torch_fused": {"launches": str(launches), "bytes": str(moved)}}


def counts() -> Iterator[Case]:
    append = {"torch_fused": lambda *states: kv_append_(*states, 1024)}
    states = partial(map, lambda tokens: torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16), (4096, 4096, 1, 1))
    names = {"greedy": "greedy", "top-k 50": "sample, top-k 50", "top-p 0.9": "sample, top-p 0.9"}
    cases = [
        *(case for op, sizes in LISTS["apple"].items() for case in by_rows(op, shapes=sizes, dtypes=[torch.bfloat16])),
        [*rope()][1],
        Case("kv_append_", "one token, one layer", "bf16", "", append, states),
        *(case for case in draws() if case.op in names and (case.shape, case.kind) == ("(1, 151936)", "normal")),
        next(adamw("cpu")),
    ]
    for case in cases:
        ours = {"torch_fused": case.contenders["torch_fused"]}
        yield replace(case, op=names.get(case.op, case.op), kind="", contenders=ours, measure=columns)
    for name, bits in product(("Qwen2.5-0.5B", "Llama-3.2-1B"), (0, 4)):
        kind, contenders = f"{bits} bits" if bits else "", {"torch_fused": partial(token, name, bits)}
        yield Case(TOKEN, f"{name} after {CONTEXT}", "bf16", kind, contenders, measure=columns)
