"""Writes the tables of docs/benchmarks.md and README.md from the CSV files under benchmarks/results; and the plots.

python benchmarks/report.py
"""

import re
from collections.abc import Iterator
from pathlib import Path

import generate
import linear_cross_entropy
import metal_candle
import tables
from plots import DOCS, PLOTS, draw, plot_path
from record import RESULTS, Row, groups, machines, read
from timing import ROOT

REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"
TEXTS = {module.__name__: module.__doc__ for module in (linear_cross_entropy, generate)}
"""What the page says of benchmarks whose tables have a line for each contender."""


def results_of(folder: Path) -> dict[str, list[Row]]:
    """The rows of a machine, by file."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}


def page(results: Path = RESULTS) -> str:
    """docs/benchmarks.md. What it says before the first machine, and of Apple's GPUs, stays as it is."""
    method, rest = REPORT.read_text().split("\n## ", 1)
    apple = re.search(r"## Apple GPUs\n.*?(?=\n\|)", rest, re.DOTALL)
    parts, counted = [method], []
    for folder in machines(results):
        found = results_of(folder)
        counted += found.pop("apple", [])
        if found:
            parts += machine(folder, found)
    return "\n".join([*parts, apple[0], tables.predictions(counted)])


def machine(folder: Path, found: dict[str, list[Row]]) -> Iterator[str]:
    every = [row for rows in found.values() for row in rows]
    yield f"## {every[0]['device']}\n"
    yield versions(every)
    for name, (title, *_) in PLOTS.items():
        if (path := plot_path(name, folder.name)).exists():
            yield f"![{title}]({path.relative_to(DOCS)})\n"
    for bench in [*(bench for bench in found if bench not in (*TEXTS, "metal_candle")), *TEXTS]:
        for i, ((op,), rows) in enumerate(groups(found.get(bench, []), "op").items()):
            yield f"### {op}\n"
            if bench in TEXTS and i == 0:
                yield TEXTS[bench]
            yield (tables.contender_table if bench in TEXTS else tables.op_table)(rows)
    yield f"### The rows of metal-candle v1.2.0\n\n{metal_candle.__doc__}"
    yield tables.metal_candle_table(found.get("metal_candle", []))
    yield from tables.slower_table(every)


def versions(rows: list[Row]) -> str:
    torch, transformers, torch_fused, threads = (
        ", ".join(sorted({row[name] for row in rows})) for name in ("torch", "transformers", "torch_fused", "threads")
    )
    first, last = min(row["date"][:10] for row in rows), max(row["date"][:10] for row in rows)
    dates = first if first == last else f"{first} to {last}"
    return f"torch {torch}, transformers {transformers}, torch_fused {torch_fused}, {threads} CPU threads, {dates}.\n"


GENERATE = "generate, "
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

    def ratios(rows: list[Row], op: str, shape: str) -> str:
        def is_chosen(row: Row) -> bool:
            plain = row["op"].startswith(GENERATE) and row["contender"] in ("transformers", "torch_fused")
            return row["shape"] == shape and (plain if op == GENERATE else row["op"] == op)

        texts = (
            tables.ratio(*tables.split(each)[:2])
            for (dtype, kind), each in groups(filter(is_chosen, rows), "dtype", "kind").items()
            if dtype in ("f32", "bf16") and kind in ("", "normal", "greedy")
        )
        return " / ".join(texts) or "not run"

    found = [results_of(folder) for folder in machines(results)]
    every = [[row for bench, rows in each.items() if bench != "apple" for row in rows] for each in found]
    lines = ((name, shape, *(ratios(rows, op, shape) for rows in every)) for name, (op, shape) in HEADLINES.items())
    return tables.table(("", "shape", *(rows[0]["device"] for rows in every)), lines)


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
