"""Writes docs/benchmarks.md, README.md's numbers and the plots from the CSV files under benchmarks/results.

python benchmarks/report.py
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, product
from pathlib import Path

import apple
import jinja2
import metal_candle
from cases import Case
from plots import draw
from record import KEYS, RESULTS, Results, Row, groups, results
from timing import ROOT

DOCS = ROOT / "docs"
REPORT, README = DOCS / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python benchmarks/report.py -->\n", "<!-- end -->"
READ = "a plain read"
NO_RIVALS = {"Liger-Kernel", READ, "a dict, no copy", "a dict, nothing allocated"}
CHIPS = [f"{chip}, {gb_s:g} GB/s" for chip, gb_s in apple.BANDWIDTH.items()]


def cases(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """The rows that are compared with each other."""
    return groups(rows, *KEYS[:4]).values()


def case_of(row: Row) -> str:
    return ", ".join(filter(None, (f"{row['shape']} {row['dtype']}", row["kind"])))


def is_ours(row: Row) -> bool:
    return row["contender"].startswith(("torch_fused", "FusedKVCache"))


def first_rival(rows: list[Row]) -> Row | None:
    return next((row for row in rows if not is_ours(row)), None)


def split(rows: list[Row]) -> tuple[Row | None, Row | None, list[Row]]:
    """Ours, the fastest of torch's, and the rest."""
    ours = next((row for row in rows if row["contender"] in ("torch_fused", "FusedKVCache")), None)
    rivals = [row for row in rows if not is_ours(row) and row["contender"] not in NO_RIVALS]
    best = min(rivals, key=lambda row: float(row["ms"]), default=None)
    return ours, best, [row for row in rows if row is not ours and row is not best]


def in_units(ms: float) -> str:
    units = (("s", 1e-3), ("ms", 1.0), ("us", 1e3), ("ns", 1e6))
    unit, factor = next((each for each in units if ms * each[1] >= 1), units[-1])
    return f"{ms * factor:{'.3g' if ms * factor < 999.5 else '.0f'}} {unit}"


def duration(row: Row | None) -> str:
    return in_units(float(row["ms"])) if row else ""


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


def of_workload(workload: Case, rows: Iterable[Row]) -> tuple[str, str]:
    """Our times and the others', with daggers where runs vary."""

    def marked(row: Row) -> str:
        variation = float(row["variation"])
        name = "" if is_ours(row) else f"{row['contender']} "
        return name + duration(row) + (" ‡" if variation > 0.1 else " †" if variation > 0.05 else "")

    found = groups(rows, "op", "kind").get((workload.op, workload.kind), [])
    ours, others = ([marked(row) for row in found if is_ours(row) == which] for which in (True, False))
    return "; ".join(ours), "; ".join(others)


def slower(rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """Every row of ours that is slower than torch's best, and that one."""
    for ours, best, _ in map(split, cases(rows)):
        if ours and best and float(best["ms"]) < float(ours["ms"]):
            yield ours, best


def reason(ours: Row, best: Row) -> str:
    """Why ours is slower, if the rows show it."""
    least, most = (
        float(row["ms"]) * (1 + sign * float(row.get("spread") or row["variation"]))
        for row, sign in ((ours, -1), (best, 1))
    )
    if least <= most:
        return "within the spread of both"
    copy = float(ours.get("copy_share") or 0)
    return f"bound by memory, at {copy:.2f} of a copy's bandwidth" if copy >= 0.8 else ""


def bounds(row: Row) -> Iterator[str]:
    """Of the time that a counted op should take on each of Apple's chips, or of a token's speed."""
    for gb_s in apple.BANDWIDTH.values():
        low, high = (1e3 * bound for bound in apple.predicted(int(row["bytes"]), int(row["launches"]), gb_s))
        token = row["op"] == apple.TOKEN
        yield f"{1e3 / high:.0f} - {1e3 / low:.0f} per second" if token else f"{in_units(low)} - {in_units(high)}"


def headline(rows: Iterable[Row], op: str, shape: str) -> str:
    """How many times as fast as the best of torch's or transformers', for each dtype; of generation all models."""

    def is_chosen(row: Row) -> bool:
        generation = row["op"].startswith("generate, ") and row["contender"] in ("transformers", "torch_fused")
        plain = row["dtype"] in ("f32", "bf16") and row["kind"] in ("", "normal", "greedy")
        return plain and row["shape"] == shape and (generation if op == "generate" else row["op"] == op)

    chosen = groups(filter(is_chosen, rows), "dtype", "kind").values()
    return " / ".join(ratio(*split(each)[:2]) for each in chosen)


# ---- plots ----------------------------------------------------------------------------------------------------------

Series = dict[str, dict[str, float]]
"""The bars of each contender, by name."""


PLOTTED = {"bandwidth": ("rms_norm", "layer_norm", "softmax", "swiglu", "rope", "adamw"), "tokens": ("generate",)}
"""The benchmarks that a plot shows."""


def bandwidth(found: Results) -> Series:
    """Ours and torch's best, at the largest shape of each op."""
    series: Series = {}
    for bench in PLOTTED["bandwidth"]:
        for (op, _), rows in groups(found.get(bench, []), "op", "dtype").items():
            shape = max(rows, key=lambda row: float(row["gb_s"]) * float(row["ms"]))["shape"]
            ours, best, _ = split([row for row in rows if row["shape"] == shape])
            for name, row in (("torch_fused", ours), ("torch's best", best)):
                if row:
                    series.setdefault(name, {})[f"{op} {case_of(row)}"] = float(row["copy_share"])
    return series


def tokens(found: Results) -> Series:
    """Of the first model."""
    series: Series = {}
    for row in next(iter(groups(found.get("generate", []), "op").values()), []):
        series.setdefault(row["contender"], {})[case_of(row)] = float(row["tokens_s"])
    return series


PLOTS = {
    "bandwidth": ("Bandwidth", "share of a copy of the same bytes", bandwidth),
    "tokens": ("Tokens per second", "tokens per second, prompt included", tokens),
}


def plots(machine: str, found: Results) -> Iterator[tuple[str, Path]]:
    """The titles of a machine's plots, and their files."""
    for name, (title, *_) in PLOTS.items():
        if any(found.get(bench) for bench in PLOTTED[name]):
            yield title, Path("plots") / f"{name}-{machine}.png"


# ---- pages ----------------------------------------------------------------------------------------------------------


def rendered(template: str, **values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "benchmarks"), trim_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals |= globals()
    environment.filters["named"] = named
    return environment.get_template(template).render(values)


def page(folder: Path = RESULTS) -> str:
    """docs/benchmarks.md."""
    found = results(folder)
    counted = [row for each in found.values() for row in each.pop("apple", [])]
    measured = {machine: each for machine, each in found.items() if each}
    workloads, quoted = (
        list(metal_candle.rows()),
        {name: row["quoted"] for name, row in metal_candle.PAGE["rows"].items()},
    )
    return rendered("page.md.jinja", machines=measured, counted=counted, workloads=workloads, quoted=quoted)


def readme(folder: Path = RESULTS) -> str:
    """README.md with the table between its marks."""
    found = [chain(*(rows for bench, rows in each.items() if bench != "apple")) for each in results(folder).values()]
    table = rendered("readme.md.jinja", machines=list(map(list, found)))
    return re.sub(f"{BEGIN}.*?{END}", BEGIN + table + END, README.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for (machine, rows), (name, (title, label, series_of)) in product(results().items(), PLOTS.items()):
        if series := series_of(rows):
            draw(DOCS / "plots" / f"{name}-{machine}.png", title, label, series)
    for path, text in ((REPORT, page()), (README, readme())):
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
