"""Tables of the results: what docs/benchmarks.md shows of the CSV files."""

from collections.abc import Iterable, Iterator

from apple import BANDWIDTH, TOKEN, predicted
from metal_candle import rows as workloads
from peers import LIBRARIES
from record import Row, groups

OURS = ("torch_fused", "FusedKVCache")
READ = "a plain read"
NO_RIVALS = {*LIBRARIES, READ, "a dict, no copy", "a dict, nothing allocated"}
CASE = ("shape", "dtype", "kind")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def duration(row: Row) -> str:
    ms = float(row["ms"])
    for unit, factor in (("s", 1e-3), ("ms", 1.0), ("us", 1e3)):
        if ms * factor >= 1:
            return f"{ms * factor:.3g} {unit}" if ms * factor < 999.5 else f"{ms * factor:.0f} {unit}"
    return f"{ms * 1e6:.3g} ns"


def named(row: Row) -> str:
    return f"{row['contender']} {duration(row)}"


def case_of(row: Row) -> str:
    return ", ".join(filter(None, (f"{row['shape']} {row['dtype']}", row["kind"])))


def is_ours(row: Row) -> bool:
    return row["contender"].startswith(OURS)


def split(rows: list[Row]) -> tuple[Row | None, Row | None, list[Row]]:
    """Ours, the fastest of torch's, and the rest."""
    ours = next((row for row in rows if row["contender"] in OURS), None)
    rivals = [row for row in rows if not is_ours(row) and row["contender"] not in NO_RIVALS]
    best = min(rivals, key=lambda row: float(row["ms"]), default=None)
    return ours, best, [row for row in rows if row is not ours and row is not best]


def ratio(ours: Row | None, best: Row | None) -> str:
    return f"{float(best['ms']) / float(ours['ms']):.2f}" if ours and best else ""


def share(row: Row | None, rows: list[Row]) -> str:
    """Of a plain read of the same bytes if that was timed, else of a copy."""
    read = next((each for each in rows if each["contender"] == READ), None)
    if row and read:
        return f"{ratio(row, read)} of a read"
    return f"{float(row['copy_share']):.2f}" if row and row.get("copy_share") else ""


def op_table(rows: list[Row]) -> str:
    """A line per case."""
    lines = []
    for each in groups(rows, *CASE).values():
        ours, best, rest = split(each)
        mine, theirs = duration(ours) if ours else "", named(best) if best else ""
        others = "; ".join(map(named, rest))
        lines.append((case_of(each[0]), mine, share(ours, each), theirs, ratio(ours, best), others))
    return table(("", "torch_fused", "of copy", "torch's best", "times as fast", "others"), lines)


COLUMNS = {
    "tokens_s": "tokens per second", "ms_token": "ms per token", "ttft_ms": "ms to the first",
    "weights_mb": "MB of weights", "weight_grad_mb": "MB of the weight's gradient", "peak_mb": "MB in addition",
    "ops_token": "ops per token", "launches_token": "launches per token",
}  # fmt: skip
"""Of benchmarks that measure more than a time."""


def contender_table(rows: list[Row]) -> str:
    """A line per contender, with all that was measured. They are compared with the first that is not ours."""
    columns = {column: name for column, name in COLUMNS.items() if any(row.get(column) for row in rows)}
    stock, lines = "", []
    for each in groups(rows, *CASE).values():
        first = next((row for row in each if not is_ours(row)), None)
        stock = first["contender"] if first else stock
        for row in each:
            cells = (duration(row), ratio(row, first), *(row.get(column, "") for column in columns))
            lines.append((case_of(row) if row is each[0] else "", row["contender"], *cells))
    return table(("", "", "time", f"times as fast as {stock}", *columns.values()), lines)


def slower_table(rows: Iterable[Row]) -> Iterator[str]:
    """Every row of ours that is slower than torch's best, with a reason if the rows show one."""
    lines = []
    for each in groups(rows, "op", *CASE).values():
        ours, best, _ = split(each)
        if ours and best and float(best["ms"]) < float(ours["ms"]):
            times = duration(ours), named(best), ratio(ours, best)
            lines.append((f"{ours['op']}, {case_of(ours)}", *times, reason(ours, best)))
    if lines:
        yield "### Slower than torch's best\n"
        yield table(("", "torch_fused", "torch's best", "times as fast", "what the rows show"), lines)


def reason(ours: Row, best: Row) -> str:
    least, most = (
        float(row["ms"]) * (1 + sign * float(row.get("spread") or row["variation"]))
        for row, sign in ((ours, -1), (best, 1))
    )
    if least <= most:
        return "within the spread of both"
    copy = float(ours.get("copy_share") or 0)
    return f"bound by memory, at {copy:.2f} of a copy's bandwidth" if copy >= 0.8 else ""


def metal_candle_table(rows: list[Row]) -> str:
    def marked(row: Row) -> str:
        variation = float(row["variation"])
        return duration(row) + (" ‡" if variation > 0.1 else " †" if variation > 0.05 else "")

    found, lines = groups(rows, "op", "kind"), []
    for each in workloads():
        contenders = found.get((each.op, each.kind), [])
        ours = "; ".join(marked(row) for row in contenders if is_ours(row))
        rest = "; ".join(f"{row['contender']} {marked(row)}" for row in contenders if not is_ours(row))
        lines.append((each.op, each.quoted, f"{each.kind}: {each.shape}", ours or "not run", rest or "not run"))
    return table(("row", "M4 Max, quoted", "workload", "torch_fused", "others"), lines)


def predictions(counted: list[Row]) -> str:
    def bounds(row: Row, gb_s: float) -> str:
        low, high = predicted(int(row["bytes"]), int(row["launches"]), gb_s)
        if row["op"] == TOKEN:
            return f"{1 / high:.0f} - {1 / low:.0f} per second"
        return " - ".join(duration({"ms": str(1e3 * seconds)}) for seconds in (low, high))

    lines = []
    for row in counted:
        cells = row["launches"], f"{int(row['bytes']):,}", *(bounds(row, gb_s) for gb_s in BANDWIDTH.values())
        lines.append((row["op"], case_of(row), *cells))
    chips = (f"{chip}, {gb_s:g} GB/s" for chip, gb_s in BANDWIDTH.items())
    return table(("op", "", "launches", "bytes", *chips), lines)
