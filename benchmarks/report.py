"""Writes docs/benchmarks.md, README.md's numbers and the plots from the CSV files under benchmarks/results."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import apple
import jinja2
import metal_candle
from matplotlib.figure import Figure
from record import KEYS, RESULTS, Results, Row, groups, results
from timing import ROOT

DOCS = ROOT / "docs"
REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"
READ = "a plain read"
NO_RIVALS = {"Liger-Kernel", READ, "a dict, no copy", "a dict, nothing allocated"}
PLOTTED = ("rms_norm", "layer_norm", "softmax", "swiglu", "rope", "adamw")
COLOURS = {"torch_fused": "#0b6e4f", "transformers": "#c44536", "llama-cpp-python": "#e09f3e"}
Series = dict[str, dict[str, float]]  # of each contender, the lengths of its bars by name
CHIPS = [f"{chip}, {gb_s:g} GB/s" for chip, gb_s in apple.BANDWIDTH.items()]


def cases(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """The rows that are compared with each other."""
    return groups(rows, *KEYS[:4]).values()


def case_of(row: Row) -> str:
    return ", ".join(filter(None, (f"{row['shape']} {row['dtype']}", row["kind"])))


def is_ours(row: Row) -> bool:
    return row["contender"].startswith(("torch_fused", "FusedKVCache"))


def split(rows: list[Row]) -> tuple[Row | None, Row | None, list[Row]]:
    """Ours, the fastest of torch's, and the rest."""
    ours = next((row for row in rows if row["contender"] in ("torch_fused", "FusedKVCache")), None)
    rivals = [row for row in rows if not is_ours(row) and row["contender"] not in NO_RIVALS]
    best = min(rivals, key=lambda row: float(row["ms"]), default=None)
    return ours, best, [row for row in rows if row is not ours and row is not best]


def duration(row: Row | None) -> str:
    if not row:
        return ""
    ms, units = float(row["ms"]), (("s", 1e-3), ("ms", 1.0), ("us", 1e3), ("ns", 1e6))
    unit, factor = next((each for each in units if ms * each[1] >= 1), units[-1])
    return f"{ms * factor:{'.3g' if ms * factor < 999.5 else '.0f'}} {unit}"


def named(row: Row | None) -> str:
    return f"{row['contender']} {duration(row)}" if row else ""


def ratio(ours: Row | None, best: Row | None) -> str:
    return f"{float(best['ms']) / float(ours['ms']):.2f}" if ours and best else ""


def share(row: Row | None, rows: list[Row]) -> str:
    """Of a plain read of the same bytes if that was timed, else of a copy."""
    read = next((each for each in rows if each["contender"] == READ), None)
    if row and read:
        return f"{ratio(row, read)} of a read"
    return f"{float(row['copy_share']):.2f}" if row and row.get("copy_share") else ""


def given(rows: Iterable[Row]) -> set[str]:
    """The columns that have values."""
    return {column for row in rows for column, value in row.items() if value}


def slower(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Every row of ours that is slower than torch's best, and that one."""
    pairs = (split(each)[:2] for each in cases(rows))
    return [(ours, best) for ours, best in pairs if ours and best and float(best["ms"]) < float(ours["ms"])]


def reason(ours: Row, best: Row) -> str:
    """Why ours is slower, if the rows show it."""
    spreads = sum(float(row["ms"]) * float(row.get("spread") or row["variation"]) for row in (ours, best))
    if float(ours["ms"]) - float(best["ms"]) <= spreads:
        return "within the spread of both"
    copy = float(ours.get("copy_share") or 0)
    return f"bound by memory, at {copy:.2f} of a copy's bandwidth" if copy >= 0.8 else ""


def headline(found: Results, op: str, shape: str) -> str:
    """How many times as fast as the best of torch's or transformers', for each dtype; of generation all models."""

    def is_chosen(row: Row) -> bool:
        generation = row["op"].startswith("generate, ") and row["contender"] in ("transformers", "torch_fused")
        plain = row["dtype"] in ("f32", "bf16") and row["kind"] in ("", "normal", "greedy")
        return plain and row["shape"] == shape and (generation if op == "generate" else row["op"] == op)

    chosen = groups(filter(is_chosen, chain(*found.values())), "dtype", "kind").values()
    return " / ".join(ratio(*split(each)[:2]) for each in chosen)


def plots(machine: str, found: Results) -> Iterator[tuple[str, str, str, Series]]:
    """The file, title, label and bars of each: ours and torch's best for each op's largest shape; the first model."""
    shares: Series = defaultdict(dict)
    for (op, _), rows in groups(chain(*(found.get(bench, []) for bench in PLOTTED)), "op", "dtype").items():
        largest = max(cases(rows), key=lambda each: float(each[0]["gb_s"]) * float(each[0]["ms"]))
        for name, row in zip(("torch_fused", "torch's best"), split(largest)[:2], strict=True):
            if row:
                shares[name][f"{op} {case_of(row)}"] = float(row["copy_share"])
    if shares:
        yield f"plots/bandwidth-{machine}.png", "Bandwidth", "share of a copy of the same bytes", shares
    speeds: Series = defaultdict(dict)
    for row in next(iter(groups(found.get("generate", []), "op").values()), []):
        speeds[row["contender"]][case_of(row)] = float(row["tokens_s"])
    if speeds:
        yield f"plots/tokens-{machine}.png", "Tokens per second", "tokens per second, prompt included", speeds


def draw(path: Path, title: str, label: str, series: Series) -> None:
    """Groups of horizontal bars, one bar per contender."""
    names, height = list(dict.fromkeys(chain(*series.values()))), 0.8 / len(series)
    figure = Figure(layout="constrained", figsize=(8, 1 + len(names) * len(series) * 0.13))
    axes = figure.subplots()
    for i, (contender, lengths) in enumerate(series.items()):
        places, values = [row + i * height for row in range(len(names))], [lengths.get(name, 0) for name in names]
        axes.barh(places, values, height, label=contender, color=COLOURS.get(contender))
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    axes.set(xlabel=label, title=title)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """docs/benchmarks.md, and README.md with the table between its marks."""
    machines = results(folder)
    counted = [row for found in machines.values() for row in found.pop("apple", [])]
    measured = {machine: found for machine, found in machines.items() if found}
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "benchmarks"), trim_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    templates.globals |= globals() | {"machines": measured, "counted": counted, "metal_candle": metal_candle}
    templates.filters["named"] = named
    templates.tests["ours"] = is_ours
    table = BEGIN + templates.get_template("readme.md.jinja").render() + END
    readme = re.sub(f"{BEGIN}.*?{END}", table, README.read_text(), flags=re.DOTALL)
    return {REPORT: templates.get_template("page.md.jinja").render(), README: readme}


if __name__ == "__main__":
    for machine, found in results().items():
        for name, *plot in plots(machine, found):
            draw(DOCS / name, *plot)
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
