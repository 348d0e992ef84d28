"""Writes docs/benchmarks.md, and README.md's numbers, from the CSV files under benchmarks/results; and the plots.

python benchmarks/report.py
"""

import re
from pathlib import Path
from typing import Any

import apple
import jinja2
import metal_candle
import tables
from plots import DOCS, PLOTS, draw, plot_path
from record import RESULTS, Row, machines, read
from timing import ROOT

REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"


def results_of(folder: Path) -> dict[str, list[Row]]:
    """The rows of a machine, by file."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}


def plots(folder: Path) -> list[tuple[str, Path]]:
    paths = ((title, plot_path(name, folder.name)) for name, (title, *_) in PLOTS.items())
    return [(title, path.relative_to(DOCS)) for title, path in paths if path.exists()]


def rendered(template: str, **values: Any) -> str:
    """A template that calls the functions of tables.py."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "benchmarks"), trim_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals |= vars(apple) | vars(tables) | {"plots": plots}
    environment.filters["named"] = tables.named
    return environment.get_template(template).render(values)


def page(results: Path = RESULTS) -> str:
    """docs/benchmarks.md."""
    found = [(folder, results_of(folder)) for folder in machines(results)]
    counted = [row for _, each in found for row in each.pop("apple", [])]
    measured = [(folder, each) for folder, each in found if each]
    return rendered("page.md.jinja", machines=measured, counted=counted, workloads=metal_candle.rows())


def readme(results: Path = RESULTS) -> str:
    """README.md with the table between its marks."""
    found = [results_of(folder) for folder in machines(results)]
    every = [[row for bench, rows in each.items() if bench != "apple" for row in rows] for each in found]
    table = rendered("readme.md.jinja", machines=every)
    return re.sub(f"{BEGIN}.*?{END}", BEGIN + table + END, README.read_text(), flags=re.DOTALL)


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
