"""Tables of the results: what docs/benchmarks.md and README.md show of the CSV files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from apple import BANDWIDTH, LAUNCH_SECONDS, SHARE_REACHED, TOKEN, predicted
from metal_candle import HONEST, PUBLISHED
from metal_candle import rows as published_rows
from peers import LIBRARIES
from record import Row, groups, machines, read
from timing import ROOT

DOCS = ROOT / "docs"
OURS = ("torch_fused", "FusedKVCache")
READ = "a plain read"
NO_RIVALS = {*LIBRARIES, READ, "a dict, no copy", "a dict, nothing allocated"}
NO_OPS = {"metal_candle", "generate", "linear_cross_entropy", "apple", "apple_counted"}
REQUEST = ("model", "dtype", "mode", "batch", "prompt", "new")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def duration(ms: float) -> str:
    for unit, factor in (("s", 1e-3), ("ms", 1.0), ("us", 1e3)):
        if ms * factor >= 1:
            return f"{ms * factor:.3g} {unit}" if ms * factor < 999.5 else f"{ms * factor:.0f} {unit}"
    return f"{ms * 1e6:.3g} ns"


def named(row: Row) -> str:
    return f"{row['contender']} {duration(float(row['ms']))}"


def split(rows: list[Row]) -> tuple[Row | None, Row | None, list[Row]]:
    """Ours, the fastest of torch's, and the rest."""
    ours = next((row for row in rows if row["contender"] in OURS), None)
    rivals = [row for row in rows if not row["contender"].startswith(OURS) and row["contender"] not in NO_RIVALS]
    best = min(rivals, key=lambda row: float(row["ms"]), default=None)
    return ours, best, [row for row in rows if row is not ours and row is not best]


def share(row: Row | None, rows: list[Row]) -> str:
    """Of a plain read of the same bytes if that was timed, else of a copy."""
    read = next((each for each in rows if each["contender"] == READ), None)
    if row and read:
        return f"{float(read['ms']) / float(row['ms']):.2f} of a read"
    return f"{float(row['copy_share']):.2f}" if row and row["copy_share"] else ""


def times(ours: Row, best: Row) -> str:
    return f"{float(best['ms']) / float(ours['ms']):.2f}"


def compared_ops(folder: Path) -> dict[str, dict[str, list[Row]]]:
    """By op and case, the rows of a machine that are compared."""
    found: dict[str, dict[str, list[Row]]] = {}
    for path in sorted(folder.glob("*.csv")):
        if path.stem not in NO_OPS:
            for (op, shape, dtype, kind), rows in groups(read(path), "op", "shape", "dtype", "kind").items():
                found.setdefault(op, {})[f"{shape} {dtype}" + (f", {kind}" if kind else "")] = rows
    return found


def op_tables(ops: dict[str, dict[str, list[Row]]]) -> Iterator[str]:
    for op, cases in ops.items():
        yield f"### {op}\n"
        lines = []
        for case, rows in cases.items():
            ours, best, rest = split(rows)
            ratio = times(ours, best) if ours and best else ""
            mine = duration(float(ours["ms"])) if ours else ""
            lines.append(
                (case, mine, share(ours, rows), named(best) if best else "", ratio, "; ".join(map(named, rest)))
            )
        yield table(("", "torch_fused", "of copy", "torch's best", "times as fast", "others"), lines)


def loss_table(rows: list[Row]) -> Iterator[str]:
    yield "### linear_cross_entropy\n"
    yield (
        "Tokens, features and classes; the loss and the gradients of both operands. Memory is what a step takes "
        "at most beyond its operands, beside the weight's gradient, which every contender returns.\n"
    )
    yield table(
        ("shape", "", "contender", "time", "memory", "weight's gradient"),
        (
            (
                row["shape"],
                row["dtype"],
                row["contender"],
                duration(float(row["ms"])),
                f"{float(row['peak_mb']) - float(row['weight_grad_mb']):.0f} MB",
                f"{float(row['weight_grad_mb']):.0f} MB",
            )
            for row in rows
        ),
    )


def slower_table(compared: dict[str, list[Row]]) -> Iterator[str]:
    """Every row of ours that is slower than torch's best, with a reason if the rows show one."""
    lines = []
    for what, rows in compared.items():
        ours, best, _ = split(rows)
        if ours and best and float(best["ms"]) < float(ours["ms"]):
            lines.append((what, duration(float(ours["ms"])), named(best), times(ours, best), reason(ours, best)))
    if lines:
        yield "### Slower than torch's best\n"
        yield table(("", "torch_fused", "torch's best", "times as fast", "what the rows show"), lines)


def reason(ours: Row, best: Row) -> str:
    low, high = (
        float(row["ms"]) * (1 + sign * float(row.get("spread") or row["variation"]))
        for row, sign in ((ours, -1), (best, 1))
    )
    if low <= high:
        return "within the spread of both"
    copy = float(ours.get("copy_share") or 0)
    return f"bound by memory, at {copy:.2f} of a copy's bandwidth" if copy >= 0.8 else ""


def compared_texts(rows: list[Row]) -> dict[str, list[Row]]:
    """Requests, with the time that each takes."""
    timed = [row | {"ms": str(1e3 * int(row["batch"]) * int(row["new"]) / float(row["tokens_s"]))} for row in rows]
    return {
        f"{model} {dtype}, {mode}, {batch} x {prompt} + {new}": each
        for (model, dtype, mode, batch, prompt, new), each in groups(timed, *REQUEST).items()
    }


def text_table(rows: list[Row]) -> Iterator[str]:
    yield "### Generation\n"
    yield (
        "Whole requests: new tokens after a prompt of random ids. Tokens per second include the prompt. Added memory "
        "is what a request takes in addition to the weights. Ops are those that reach a device, without views. With "
        "packed weights, transformers runs dense ones in bfloat16. The 4 bits of SmolLM2-135M are its file's: Q4_1, "
        "the embedding in Q8_0. Others are packed anew, in groups of 64, and for llama.cpp as Q8_0.\n"
    )
    columns = ("ms_token", "ttft_ms", "weights_mb", "peak_mb", "ops_token", "launches_token")
    lines = []
    for request, contenders in compared_texts(rows).items():
        stock = next((float(row["tokens_s"]) for row in contenders if row["contender"] == "transformers"), None)
        for row in contenders:
            speed = f"{float(row['tokens_s']) / stock:.2f}" if stock else ""
            values = (row.get(column, "") for column in columns)
            lines.append((request, row["contender"], row["tokens_s"], speed, *values))
            request = ""
    header = ("tokens per second", "times as fast as transformers", "ms per token", "ms to the first")
    yield table(("", "", *header, "MB of weights", "MB added", "ops per token", "launches per token"), lines)


def metal_candle_tables(rows: list[Row]) -> Iterator[str]:
    yield "### The rows of metal-candle v1.2.0\n"
    yield (
        "As published, and as an honest workload: real bytes, real shapes, each call waited for. The quoted figure is "
        "what its page says of an Apple M4 Max. It was measured there, on the published workload, and cannot be "
        "compared with the times here. All in float32. A dagger marks runs that vary by more than 5 %, a double dagger "
        "by more than 10 %.\n"
    )
    found = groups(rows, "row", "workload")

    def marked(row: Row) -> str:
        variation = float(row["variation"])
        return duration(float(row["ms"])) + (" ‡" if variation > 0.1 else " †" if variation > 0.05 else "")

    lines = []
    for row in published_rows():
        for kind, (text, _), quoted in ((PUBLISHED, row.published, row.quoted), (HONEST, row.honest, "")):
            contenders = found.get((row.name, kind), [])
            ours = "; ".join(marked(each) for each in contenders if each["contender"].startswith(OURS))
            rest = (f"{r['contender']} {marked(r)}" for r in contenders if not r["contender"].startswith(OURS))
            lines.append((row.name, quoted, f"{kind}: {text}", ours or "not run", "; ".join(rest) or "not run"))
    yield table(("row", "M4 Max, quoted", "workload", "torch_fused", "others"), lines)


def apple_tables(results: Path) -> Iterator[str]:
    measured = [row for folder in machines(results) for row in read(folder / "apple.csv")]
    counted = [row for folder in machines(results) for row in read(folder / "apple_counted.csv")]
    yield "## Apple GPUs\n"
    if measured:
        lines = ((r["device"], r["op"], r["shape"], r["dtype"], duration(float(r["ms"]))) for r in measured)
        yield table(("", "op", "shape", "dtype", "time"), lines)
    else:
        yield from predictions(groups(counted, "op", "shape", "dtype"))


def predictions(counted: dict[tuple[str, ...], list[Row]]) -> Iterator[str]:
    low, high = (f"{1e6 * seconds:.0f}" for seconds in LAUNCH_SECONDS)
    yield (
        "**Predictions, not measurements: nothing here has run on an Apple GPU.** The emulator counts the launches of "
        "each op and the bytes they move; a byte that one launch reads twice counts once. The lower bound takes these "
        f"bytes at Apple's published bandwidth, and {low} us per launch. The upper bound takes {SHARE_REACHED[1]:.0%} "
        f"of that bandwidth, and {high} us per launch, which is the host's time for a launch through torch. On a Mac, "
        "`python benchmarks/apple.py` times the ops, and this section then shows the times.\n"
    )
    rows = [(key, rows[0]) for key, rows in counted.items()]
    lines = ((*key, row["launches"], f"{int(row['bytes']):,}") for key, row in rows)
    yield table(("op", "shape", "dtype", "launches", "bytes"), lines)

    def by_chip(unit: str, tokens: bool, shown: Callable[[float, float], str]) -> str:
        chosen = [(key, row) for key, row in rows if (key[0] == TOKEN) == tokens]
        names = (" ".join(key[1:] if tokens else key) for key, _ in chosen)
        chips = (
            (
                f"{chip}, {gb_s:g} GB/s",
                *(shown(*predicted(int(r["bytes"]), int(r["launches"]), gb_s)) for _, r in chosen),
            )
            for chip, gb_s in BANDWIDTH.items()
        )
        return table((f"{unit}, from - to", *names), chips)

    def microseconds(*bounds: float) -> str:
        return " - ".join(f"{1e6 * s:.3g}" if s < 1e-3 else f"{1e6 * s:.0f}" for s in bounds)

    yield by_chip("us", False, microseconds)
    if any(op == TOKEN for (op, *_), _ in rows):
        yield (
            "A greedy token is one step of a whole model, whose head is its embedding, and the sampler. Its launches "
            "and bytes are counted for one layer and two, and for two small vocabularies, and extended to the model.\n"
        )
        yield by_chip("tokens per second", True, lambda low, high: f"{1 / high:.0f} - {1 / low:.0f}")
