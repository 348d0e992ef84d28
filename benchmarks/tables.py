"""What docs/benchmarks.md and README.md say of the rows."""

from collections.abc import Iterable, Iterator

from apple import BANDWIDTH, TOKEN, predicted
from metal_candle import Workload
from peers import LIBRARIES
from record import Row, groups

OURS = ("torch_fused", "FusedKVCache")
READ = "a plain read"
NO_RIVALS = {*LIBRARIES, READ, "a dict, no copy", "a dict, nothing allocated"}
CHIPS = [f"{chip}, {gb_s:g} GB/s" for chip, gb_s in BANDWIDTH.items()]


def cases(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """The rows that are compared with each other."""
    return groups(rows, "op", "shape", "dtype", "kind").values()


def case_of(row: Row) -> str:
    return ", ".join(filter(None, (f"{row['shape']} {row['dtype']}", row["kind"])))


def is_ours(row: Row) -> bool:
    return row["contender"].startswith(OURS)


def first_rival(rows: list[Row]) -> Row | None:
    return next((row for row in rows if not is_ours(row)), None)


def split(rows: list[Row]) -> tuple[Row | None, Row | None, list[Row]]:
    """Ours, the fastest of torch's, and the rest."""
    ours = next((row for row in rows if row["contender"] in OURS), None)
    rivals = [row for row in rows if not is_ours(row) and row["contender"] not in NO_RIVALS]
    best = min(rivals, key=lambda row: float(row["ms"]), default=None)
    return ours, best, [row for row in rows if row is not ours and row is not best]


def duration(row: Row | None) -> str:
    if row is None:
        return ""
    ms = float(row["ms"])
    for unit, factor in (("s", 1e-3), ("ms", 1.0), ("us", 1e3)):
        if ms * factor >= 1:
            return f"{ms * factor:.3g} {unit}" if ms * factor < 999.5 else f"{ms * factor:.0f} {unit}"
    return f"{ms * 1e6:.3g} ns"


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


def of_workload(workload: Workload, rows: Iterable[Row]) -> tuple[str, str]:
    """Our times and the others', with daggers where runs vary."""

    def marked(row: Row) -> str:
        variation = float(row["variation"])
        return duration(row) + (" ‡" if variation > 0.1 else " †" if variation > 0.05 else "")

    found = groups(rows, "op", "kind").get((workload.op, workload.kind), [])
    rest = (f"{row['contender']} {marked(row)}" for row in found if not is_ours(row))
    return "; ".join(marked(row) for row in found if is_ours(row)), "; ".join(rest)


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
    for gb_s in BANDWIDTH.values():
        low, high = predicted(int(row["bytes"]), int(row["launches"]), gb_s)
        times = (duration({"ms": str(1e3 * seconds)}) for seconds in (low, high))
        yield f"{1 / high:.0f} - {1 / low:.0f} per second" if row["op"] == TOKEN else " - ".join(times)


def headline(rows: Iterable[Row], op: str, shape: str) -> str:
    """How many times as fast as the best of torch's or transformers', for each dtype; of generation all models."""

    def is_chosen(row: Row) -> bool:
        generation = row["op"].startswith("generate, ") and row["contender"] in ("transformers", "torch_fused")
        return row["shape"] == shape and (generation if op == "generate" else row["op"] == op)

    chosen = [row for row in rows if is_chosen(row) and row["dtype"] in ("f32", "bf16")]
    plain = [row for row in chosen if row["kind"] in ("", "normal", "greedy")]
    return " / ".join(ratio(*split(each)[:2]) for each in groups(plain, "dtype", "kind").values())
