"""Writes docs/benchmarks.md, and README.md's numbers, from the CSV files under benchmarks/results; and the plots.

python benchmarks/report.py
"""

import re
from collections.abc import Iterator
from pathlib import Path

from plots import DOCS, PLOTS, draw, plot_path
from record import RESULTS, Row, groups, machines
from tables import (
    compared,
    contender_table,
    metal_candle_table,
    op_table,
    predictions,
    ratio,
    results_of,
    slower_table,
    split,
    table,
)  # fmt: skip
from timing import ROOT

REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"

METHOD = """\
# Benchmarks

Written by `python benchmarks/report.py` from the CSV files in [benchmarks/results](../benchmarks/results), which hold
all times, versions and dates. `make bench` measures this machine and writes this page again; `make bench-full` also
takes longer cases. What is missing from a table was not run on that machine.

Times are medians of interleaved samples: each round takes one sample of every contender. On a GPU they are the device's
own, measured by events after a pause in which the host queues the calls; buffers rotate through 256 MB, more than any
cache. On the CPU they are wall time, caches included. "Of copy" is the bandwidth of the bytes that an op must read and
write, each once, divided by the bandwidth of a copy of as many bytes. Where a plain read of the same bytes was timed,
the share is of that read. On Linux malloc is told to keep freed memory: otherwise the first touch of new memory takes
longer than most ops. A row whose threads waited for a core because of other programs is measured again by the next
`make bench`. `torch_fused` computes in float32 and rounds once; `torch_fused llama` makes the roundings of Hugging
Face's code. Compare the contenders of one machine, never two machines.

`pip install '.[peers]'` adds other libraries to the next run: llama-cpp-python (the same weights, dense and packed),
mlx-lm (dense weights; with `mlx[cpu]` on Linux) and Liger-Kernel (its ops need a CUDA device). flashinfer and quack are
timed where they are installed.
"""
TEXTS = {
    "linear_cross_entropy": """\
The shape is tokens, features and classes. A step computes the loss and the gradients of both operands. Memory is what
it takes at most in addition to its operands; it includes the weight's gradient, which every contender returns.
""",
    "generate": """\
Whole requests: sequences x tokens of the prompt + new tokens. The prompt has random ids, and is part of the time.
Memory is what a request takes in addition to the weights. Ops are those that reach a device, without views. With packed
weights, transformers runs dense ones in bfloat16. The 4 bits of SmolLM2-135M are its file's: Q4_1, the embedding in
Q8_0. Others are packed anew, in groups of 64, and for llama.cpp as Q8_0.
""",
    "metal_candle": """\
### The rows of metal-candle v1.2.0

As published, and as an honest workload: real bytes, real shapes, each call waited for. The quoted figure is what its
page says of an Apple M4 Max. It was measured there, on the published workload, and cannot be compared with the times
here. All in float32. A dagger marks runs that vary by more than 5 %, a double dagger by more than 10 %.
""",
}


def page(results: Path = RESULTS) -> str:
    parts, counted = [METHOD], []
    for folder in machines(results):
        found = results_of(folder)
        counted += found.pop("apple", [])
        if found:
            parts += machine(folder, found)
    return "\n".join([*parts, *predictions(counted)]).rstrip() + "\n"


def machine(folder: Path, found: dict[str, list[Row]]) -> Iterator[str]:
    every = [row for rows in found.values() for row in rows]
    yield f"## {every[0]['device']}\n"
    yield versions(every)
    for name, (title, *_) in PLOTS.items():
        if (path := plot_path(name, folder.name)).exists():
            yield f"![{title}]({path.relative_to(DOCS)})\n"
    last = [bench for bench in ("linear_cross_entropy", "generate") if bench in found]
    for bench in [bench for bench in found if bench not in TEXTS] + last:
        for (op,), rows in groups(found[bench], "op").items():
            yield f"### {op}\n"
            if op == found[bench][0]["op"] and bench in TEXTS:
                yield TEXTS[bench]
            yield (contender_table if bench in TEXTS else op_table)(rows)
    yield TEXTS["metal_candle"]
    yield metal_candle_table(found.get("metal_candle", []))
    yield from slower_table(compared(every).values())


def versions(rows: list[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"torch {all_of('torch')}, transformers {all_of('transformers')}, torch_fused {all_of('torch_fused')}, "
        f"{all_of('threads')} CPU threads, {dates}.\n"
    )


GENERATE, PLAIN = "generate, ", ("transformers", "torch_fused")
HEADLINES = {
    "`rms_norm`": ("rms_norm", "(4096, 4096)"),
    "`add_rms_norm`": ("add_rms_norm", "(4096, 4096)"),
    "`layer_norm`": ("layer_norm", "(32, 32000)"),
    "`softmax`": ("softmax", "(32, 32000)"),
    "`silu_mul`": ("silu_mul", "(4096, 4096)"),
    "`apply_rotary_pos_emb`": ("apply_rotary_pos_emb", "(1, 2048, 32, 8, 128)"),
    "`rms_norm`, backward": ("rms_norm backward", "(4096, 4096)"),
    "`optim.AdamW`": ("adamw", "8 million in 62 tensors"),
    "`greedy`": ("greedy", "(1, 151936)"),
    "`sample`, top-k 50": ("top-k 50", "(1, 151936)"),
    "`sample`, top-p 0.9": ("top-p 0.9", "(1, 151936)"),
    "`generate`, one sequence": (GENERATE, "1 x 128 + 32"),
    "`generate`, eight": (GENERATE, "8 x 128 + 32"),
}


def headlines(results: Path = RESULTS) -> str:
    """README's table: how many times as fast as the best of torch's or transformers', by machine and dtype."""
    found = [results_of(folder) for folder in machines(results)]

    def ratios(rows: dict[str, list[Row]], op: str, shape: str) -> str:
        every = [row for bench, each in rows.items() if bench != "apple" for row in each]
        if op == GENERATE:
            every = [row | {"op": row["op"][: len(op)]} for row in every if row["contender"] in PLAIN]
        chosen = [row for row in every if row["op"] == op and row["shape"] == shape]
        texts = (
            ratio(*split(each)[:2])
            for (dtype, kind), each in groups(chosen, "dtype", "kind").items()
            if dtype in ("f32", "bf16") and kind in ("", "normal", "greedy")
        )
        return " / ".join(texts) or "not run"

    lines = ((name, shape, *(ratios(rows, op, shape) for rows in found)) for name, (op, shape) in HEADLINES.items())
    return table(("", "shape", *(next(iter(rows.values()))[0]["device"] for rows in found)), lines)


def readme(results: Path = RESULTS) -> str:
    """README.md with the table between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", BEGIN + headlines(results) + END, README.read_text(), flags=re.DOTALL)


def main() -> None:
    try:
        draw()
    except ImportError:
        print("no matplotlib: the plots stay as they are")
    for path, text in ((REPORT, page()), (README, readme())):
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
