"""Writes docs/benchmarks.md, and README.md's numbers, from the CSV files under benchmarks/results; and the plots.

python benchmarks/report.py
"""

import re
from pathlib import Path

import apple
import jinja2
import metal_candle
import tables
from plots import DOCS, PLOTS, draw, plot_path
from record import RESULTS, Row, groups, machines, read
from timing import ROOT

REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"


def results_of(folder: Path) -> dict[str, list[Row]]:
    """The rows of a machine, by file."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}


def plots(folder: Path) -> list[tuple[str, Path]]:
    paths = ((title, plot_path(name, folder.name)) for name, (title, *_) in PLOTS.items())
    return [(title, path.relative_to(DOCS)) for title, path in paths if path.exists()]


def page(results: Path = RESULTS) -> str:
    """docs/benchmarks.md, whose words are in page.md.jinja."""
    found = {folder: results_of(folder) for folder in machines(results)}
    counted = [row for each in found.values() for row in each.pop("apple", [])]
    found = [(folder, each) for folder, each in found.items() if each]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "benchmarks"), trim_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals |= vars(apple) | vars(tables)
    environment.filters["named"] = tables.named
    template = environment.get_template("page.md.jinja")
    return template.render(machines=found, plots=plots, counted=counted, workloads=metal_candle.rows())


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
    lines = [("", "shape", *(rows[0]["device"] for rows in every)), ["---"] * (2 + len(every))]
    lines += [(name, shape, *(ratios(rows, op, shape) for rows in every)) for name, (op, shape) in HEADLINES.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


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
