"""Writes docs/benchmarks.md, and README.md's numbers, from the CSV files under benchmarks/results; and the plots.

python benchmarks/report.py
"""

import re
from collections.abc import Iterator
from pathlib import Path

from plots import PLOTS, draw, plot_path
from record import Row, groups, machines, read
from tables import (
    DOCS,
    apple_tables,
    compared_ops,
    compared_texts,
    loss_table,
    metal_candle_tables,
    op_tables,
    slower_table,
    split,
    table,
    text_table,
    times,
)  # fmt: skip
from timing import ROOT

REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"

METHOD = """\
# Benchmarks

Written by `python benchmarks/report.py` from the CSV files in [benchmarks/results](../benchmarks/results), which hold
all times, versions and dates. `make bench` measures this machine and writes this page again; `make bench-full` also
takes longer cases. What is missing from a table was not run on that machine.

Times are medians of interleaved samples: each round takes one of every contender. On a GPU they are the device's own,
by events after a pause in which the host queues the calls; buffers rotate through 256 MB, more than any cache. On the
CPU they are wall time, caches included. "Of copy" is the bandwidth of the bytes that an op must read and write, each
once, over that of a copy of as many bytes. Where a plain read of the same bytes was timed, the share is of that read.
On Linux malloc is told to keep freed memory: otherwise the first touch of new memory takes longer than most ops.
A row whose threads waited for a core because of other programs is measured again by the next `make bench`.
`torch_fused` computes in float32 and rounds once; `torch_fused llama` makes the roundings of Hugging Face's code.
Compare the contenders of one machine, never two machines.

`pip install '.[peers]'` adds other libraries to the next run: llama-cpp-python (the same weights, dense and packed),
mlx-lm (dense weights; with `mlx[cpu]` on Linux) and Liger-Kernel (its ops need a CUDA device). flashinfer and quack are
timed where they are installed. mlx-lm was tried on Linux and generates with the demo's weights; its rows are not
recorded yet.
"""


def page(results: Path = RESULTS) -> str:
    parts = [METHOD]
    for folder in machines(results):
        parts += machine(folder)
    parts += apple_tables(results)
    return "\n".join(parts).rstrip() + "\n"


def machine(folder: Path) -> Iterator[str]:
    ops, texts, published = compared_ops(folder), read(folder / "generate.csv"), read(folder / "metal_candle.csv")
    rows = [row for cases in ops.values() for each in cases.values() for row in each] + texts + published
    if not rows:
        return
    yield f"## {rows[0]['device']}\n"
    yield versions(rows)
    for name, (title, _) in PLOTS.items():
        if (path := plot_path(name, folder.name)).exists():
            yield f"![{title}]({path.relative_to(DOCS)})\n"
    yield from op_tables(ops)
    if losses := read(folder / "linear_cross_entropy.csv"):
        yield from loss_table(losses)
    if texts:
        yield from text_table(texts)
    yield from metal_candle_tables(published)
    compared = {f"{op} {case}": rows for op, cases in ops.items() for case, rows in cases.items()}
    compared |= {f"generation, {request}": rows for request, rows in compared_texts(texts).items()}
    compared |= {
        f"metal-candle's {name}, {kind}": r for (name, kind), r in groups(published, "row", "workload").items()
    }
    yield from slower_table(compared)


def versions(rows: list[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"torch {all_of('torch')}, transformers {all_of('transformers')}, torch_fused {all_of('torch_fused')}, "
        f"{all_of('threads')} CPU threads, {dates}.\n"
    )


# ---- README.md ------------------------------------------------------------------------------------------------------

HEADLINES = {
    "`rms_norm`": ("rms_norm", "(4096, 4096) {}"),
    "`add_rms_norm`": ("add_rms_norm", "(4096, 4096) {}"),
    "`layer_norm`": ("layer_norm", "(32, 32000) {}"),
    "`softmax`": ("softmax", "(32, 32000) {}"),
    "`silu_mul`": ("silu_mul", "(4096, 4096) {}"),
    "`apply_rotary_pos_emb`": ("apply_rotary_pos_emb", "(1, 2048, 32, 8, 128) {}"),
    "`rms_norm`, backward": ("rms_norm backward", "(4096, 4096) {}"),
    "`optim.AdamW`": ("adamw", "8 million in 62 tensors {}"),
    "`greedy`": ("greedy", "(1, 151936) f32, normal"),
    "`sample`, top-k 50": ("top-k 50", "(1, 151936) f32, normal"),
    "`sample`, top-p 0.9": ("top-p 0.9", "(1, 151936) f32, normal"),
}
TEXTS = {"`generate`, one sequence": "1 x 128 + 32", "`generate`, eight": "8 x 128 + 32"}


def headlines(results: Path = RESULTS) -> str:
    """The table of README.md: how many times as fast as torch's or transformers' best, by machine."""
    folders = list(machines(results))
    ops = [compared_ops(folder) for folder in folders]
    texts = [compared_texts(read(folder / "generate.csv")) for folder in folders]

    def ratio(rows: list[Row]) -> str:
        ours, best, _ = split(rows)
        return times(ours, best) if ours and best else "not run"

    lines = []
    for name, (op, case) in HEADLINES.items():
        dtypes = ("f32", "bf16") if "{}" in case else ("f32",)
        shape = re.sub(r" f32.*| \{\}", "", case)
        lines.append((name, shape, *(" / ".join(ratio(m[op][case.format(d)]) for d in dtypes) for m in ops)))
    for name, request in TEXTS.items():
        found = (next(rows for key, rows in m.items() if f"bf16, greedy, {request}" in key) for m in texts)
        two = ([row for row in rows if row["contender"] in ("transformers", "torch_fused")] for rows in found)
        lines.append((name, f"{request} tokens, bf16", *map(ratio, two)))
    devices = [read(folder / "rms_norm.csv")[0]["device"] for folder in folders]
    return table(("", "shape", *devices), lines)


def readme(results: Path = RESULTS) -> str:
    """README.md with the table between its marks."""
    before, rest = README.read_text().split(BEGIN)
    return before + BEGIN + headlines(results) + END + rest.split(END, 1)[1]


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
