"""Writes docs/benchmarks.md from the CSV files under benchmarks/results, and plots beside it if matplotlib is there.

python benchmarks/report.py
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from apple_prediction import BANDWIDTH, LAUNCH_SECONDS, SHARE_REACHED, TOKEN, predicted
from harness import ROOT
from peers import LIBRARIES
from record import machines, read
from seed_table import HONEST, PUBLISHED, ROWS, Workload

REPORT = ROOT / "docs/benchmarks.md"
PLOTS = {
    "bandwidth": "Share of copy bandwidth",
    "vocabulary": "Time to draw a token, by vocabulary",
    "context": "Time to append a token to a cache, and to decode one, by context",
    "tokens": "Tokens a second",
    "memory": "Memory that a request takes",
}
NO_OPS = {"seed", "generate", "linear_cross_entropy", "apple", "apple_counted"}
OURS = ("torch_fused", "FusedKVCache")
NO_RIVALS = {*LIBRARIES, "a plain read", "a dict, no copy", "a dict, nothing allocated"}
Row = dict[str, str]

METHOD = """\
# Benchmarks

Written by `python benchmarks/report.py` from the CSV files in [benchmarks/results](../benchmarks/results), which hold
every contender's times, the versions and the dates. `make bench` measures this machine and writes this page again;
`make bench-full` takes longer cases too. What is missing from a table was not run on that machine.

Times are medians. On a GPU they are the device's own, by events behind a pause in which the host queues the calls;
buffers rotate through 256 MB, more than any cache. On the CPU they are wall time, caches included. "Of copy" is the
bandwidth of the bytes that an op must read and write, each once, over that of a copy of as many bytes in the same run.
On Linux malloc is told to keep what is freed: else a CPU's first touch of new memory takes longer than most ops.
Whole texts and the seed's rows are measured in rounds, in which the contenders take turns.
A row that other programs disturbed, so that its threads waited for a core, is measured again by the next `make bench`.
`torch_fused` computes in float32 and rounds once; `torch_fused llama` makes the roundings of Hugging Face's code.
Ratios compare contenders of one run on one machine, never two machines.
"""

SLOWER = {
    r"top-k 50 .*all equal, .*": "all tokens tie and all are kept, as Hugging Face does; torch.topk draws among 50",
    r"whole vocabulary .*nearly flat, on a CPU": "weights are integers, for one draw on all devices, and none is 0",
    r"seed's (KV allocation.*honest|full sequence.*), .*": "Python calls of transformers' cache",
    r"seed's KV allocation.*as published, .*": "an empty object, made on top of a DynamicCache",
    r"seed's full training step.*, on a CPU": "nearly all of it are torch's matrix products, the same for all",
    r"seed's greedy, vocabulary 1000, .*, on a GPU": "two launches, of which so few tokens need one",
    r"layer_norm backward \(4096, (1024|896)\) bf16, on a GPU": "a short row waits for four sums in two rounds",
    r"adamw 8 million.*bf16, on a GPU": "launches of seven tensors wait for one another; torch takes dozens at once",
    r"generation, .*, on a GPU": "the host's calls take longer than the kernels; a compiled model replays a CUDA graph",
}
"""Why a row is slower than torch's best, by a pattern of what it is."""


def generate(results: Path = ROOT / "benchmarks/results") -> str:
    """The whole page."""
    parts = [METHOD]
    for folder in machines(results):
        parts += machine(folder)
    parts += apple(results)
    return "\n".join(parts).rstrip() + "\n"


def machine(folder: Path) -> Iterator[str]:
    ops = [row for path in sorted(folder.glob("*.csv")) if path.stem not in NO_OPS for row in read(path)]
    texts, seed = read(folder / "generate.csv"), read(folder / "seed.csv")
    losses = read(folder / "linear_cross_entropy.csv")
    rows = ops + losses + texts + seed
    if not rows:
        return
    yield f"## {rows[0]['device']}\n"
    yield versions(rows)
    for name, title in PLOTS.items():
        if (path := plot_path(name, folder.name)).exists():
            yield f"![{title}]({path.relative_to(REPORT.parent)})\n"
    if ops:
        yield from op_tables(ops)
    if losses:
        yield from loss_table(losses)
    if texts:
        yield from text_table(texts)
    yield from seed_tables(seed)
    yield from slower_table(ops + losses, texts, seed)


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


def plot_path(name: str, slug: str) -> Path:
    return REPORT.parent / "plots" / f"{name}-{slug}.png"


def versions(rows: list[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"torch {all_of('torch')}, transformers {all_of('transformers')}, torch_fused {all_of('torch_fused')}, "
        f"{all_of('threads')} CPU threads, {dates}.\n"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def duration(ms: float) -> str:
    for unit, factor in (("s", 1e-3), ("ms", 1.0), ("us", 1e3)):
        if ms * factor >= 1:
            return f"{ms * factor:.3g} {unit}" if ms * factor < 999.5 else f"{ms * factor:.0f} {unit}"
    return f"{ms * 1e6:.3g} ns"


# ---- ops ------------------------------------------------------------------------------------------------------------


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def split(rows: list[Row]) -> tuple[Row | None, Row | None, list[Row]]:
    """Ours, the fastest of torch's, and the rest."""
    ours = next((row for row in rows if row["contender"] in OURS), None)
    rivals = [row for row in rows if not row["contender"].startswith(OURS) and row["contender"] not in NO_RIVALS]
    best = min(rivals, key=lambda row: float(row["ms"]), default=None)
    return ours, best, [row for row in rows if row is not ours and row is not best]


def op_tables(rows: list[Row]) -> Iterator[str]:
    for (op,), op_rows in groups(rows, "op").items():
        yield f"### {op}\n"
        lines = []
        for (shape, dtype, kind), contenders in groups(op_rows, "shape", "dtype", "kind").items():
            ours, best, rest = split(contenders)
            lines.append((
                f"{shape} {dtype}" + (f", {kind}" if kind else ""),
                duration(float(ours["ms"])) if ours else "",
                f"{float(ours['copy_share']):.2f}" if ours and ours["copy_share"] else "",
                f"{best['contender']} {duration(float(best['ms']))}" if best else "",
                f"{float(best['ms']) / float(ours['ms']):.2f}" if ours and best else "",
                "; ".join(f"{row['contender']} {duration(float(row['ms']))}" for row in rest),
            ))  # fmt: skip
        yield table(("", "torch_fused", "of copy", "torch's best", "times as fast", "others"), lines)


def slower_table(ops: list[Row], texts: list[Row], seed: list[Row]) -> Iterator[str]:
    """Every row of ours that is slower than torch's best, with the reason where it is known."""
    requests = [row | {"ms": str(1e3 * int(row["batch"]) * int(row["new"]) / float(row["tokens_s"]))} for row in texts]
    compared = {
        **{f"{op} {shape} {dtype}" + (f", {kind}" if kind else ""): rows
           for (op, shape, dtype, kind), rows in groups(ops, "op", "shape", "dtype", "kind").items()},
        **{f"generation, {dtype}, {mode}, {batch} x {prompt} + {new}": rows
           for (dtype, mode, batch, prompt, new), rows
           in groups(requests, "dtype", "mode", "batch", "prompt", "new").items()},
        **{f"seed's {name}, {kind}": rows for (name, kind), rows in groups(seed, "row", "workload").items()},
    }  # fmt: skip
    lines = []
    for what, rows in compared.items():
        ours, best, _ = split(rows)
        if ours and best and float(best["ms"]) < float(ours["ms"]):
            ratio = float(best["ms"]) / float(ours["ms"])
            times = duration(float(ours["ms"])), f"{best['contender']} {duration(float(best['ms']))}"
            lines.append((what, *times, f"{ratio:.2f}", reason(what, ours, best)))
    if lines:
        yield "### Slower than torch's best\n"
        yield table(("", "torch_fused", "torch's best", "times as fast", "why"), lines)


def reason(what: str, ours: Row, best: Row) -> str:
    low, high = (
        float(row["ms"]) * (1 + sign * float(row.get("spread") or row["variation"]))
        for row, sign in ((ours, -1), (best, 1))
    )
    if low <= high:
        return "within the spread of both"
    if float(ours.get("copy_share") or 0) >= 0.8:
        return f"bound by memory, at {float(ours['copy_share']):.2f} of a copy's bandwidth"
    place = "GPU" if re.search(r"^NVIDIA|GPU$", ours["device"]) else "CPU"
    return next((why for pattern, why in SLOWER.items() if re.fullmatch(pattern, f"{what}, on a {place}")), "")


# ---- generation -----------------------------------------------------------------------------------------------------


def text_table(rows: list[Row]) -> Iterator[str]:
    yield "### Generation\n"
    yield (
        "Whole requests of new tokens behind a prompt of random ids, the prompt included in tokens a second; memory on "
        "top is what a request takes besides the weights; ops are those that reach a device, views left out. Beside "
        "packed weights transformers runs dense ones in bfloat16. The 4 bits of SmolLM2-135M are its file's, Q4_1 "
        "with the embedding in Q8_0; others are packed anew, in groups of 64, and for llama.cpp as Q8_0.\n"
    )
    lines = []
    for (model, dtype, mode, batch, prompt, new), contenders in groups(
        rows, "model", "dtype", "mode", "batch", "prompt", "new"
    ).items():
        stock = next((row for row in contenders if row["contender"] == "transformers"), None)
        for row in contenders:
            speed = float(row["tokens_s"]) / float(stock["tokens_s"]) if stock else None
            lines.append((
                f"{model} {dtype}, {mode}, {batch} x {prompt} + {new}" if row is contenders[0] else "",
                row["contender"], row["tokens_s"], f"{speed:.2f}" if speed else "", row["ms_token"], row["ttft_ms"],
                row.get("weights_mb", ""), row["peak_mb"], row["ops_token"], row["launches_token"],
            ))  # fmt: skip
    yield table(
        (
            "", "", "tokens a second", "times as fast as transformers", "ms a token", "ms to the first",
            "MB of weights", "MB on top", "ops a token", "launches a token",
        ),
        lines,
    )  # fmt: skip


# ---- the seed's rows ------------------------------------------------------------------------------------------------


def seed_tables(rows: list[Row]) -> Iterator[str]:
    yield "### The rows of metal-candle v1.2.0\n"
    yield (
        "As published, and as an honest workload: real bytes, real shapes, each call waited for. The figure quoted is "
        "what its page says of an Apple M4 Max; it was measured there, on the published workload, and is no rival "
        "here. Float32. A dagger marks runs that vary by more than 5 %, a double dagger by more than 10 %.\n"
    )
    found = groups(rows, "row", "workload")

    def line(name: str, kind: str, workload: Workload, quoted: str) -> tuple[str, ...]:
        contenders = found.get((name, kind), [])
        ours = [marked(row) for row in contenders if row["contender"].startswith(OURS)]
        rest = [f"{row['contender']} {marked(row)}" for row in contenders if not row["contender"].startswith(OURS)]
        return name, quoted, f"{kind}: {workload.text}", "; ".join(ours) or "not run", "; ".join(rest) or "not run"

    lines = []
    for row in ROWS:
        lines.append(line(row.name, PUBLISHED, row.published, row.quoted))
        lines.append(line(row.name, HONEST, row.honest, ""))
    yield table(("row", "M4 Max, quoted", "workload", "torch_fused", "others"), lines)


def marked(row: Row) -> str:
    variation = float(row["variation"])
    return duration(float(row["ms"])) + (" ‡" if variation > 0.1 else " †" if variation > 0.05 else "")


# ---- Apple GPUs -----------------------------------------------------------------------------------------------------


def apple(results: Path) -> Iterator[str]:
    measured = [row for folder in machines(results) for row in read(folder / "apple.csv")]
    counted = [row for folder in machines(results) for row in read(folder / "apple_counted.csv")]
    yield "## Apple GPUs\n"
    if measured:
        lines = ((r["device"], r["op"], r["shape"], r["dtype"], duration(float(r["ms"]))) for r in measured)
        yield table(("", "op", "shape", "dtype", "time"), lines)
    else:
        yield from prediction(groups(counted, "op", "shape", "dtype"))


def prediction(counted: dict[tuple[str, ...], list[Row]]) -> Iterator[str]:
    low, high = (f"{1e6 * seconds:.0f}" for seconds in LAUNCH_SECONDS)
    yield (
        "**Predictions, not measurements: nothing here has run on an Apple GPU.** The launches of each op and the "
        "bytes they move are counted by the emulator, a byte that one launch reads twice once. The lower bound takes "
        f"these bytes at Apple's published bandwidth and {low} us a launch; the upper bound {SHARE_REACHED[1]:.0%} of "
        f"that bandwidth and {high} us a launch, which is what the host takes for one through torch. On a Mac "
        "`python benchmarks/apple_prediction.py` times the ops, and its times then stand here in their place.\n"
    )
    rows = [(key, rows[0]) for key, rows in counted.items()]
    yield table(
        ("op", "shape", "dtype", "launches", "bytes"),
        ((*key, row["launches"], f"{int(row['bytes']):,}") for key, row in rows),
    )

    def by_chip(unit: str, tokens: bool, times: Callable[[float, float], str]) -> str:
        chosen = [(key, row) for key, row in rows if (key[0] == TOKEN) == tokens]
        names = (" ".join(key[1:] if tokens else key) for key, _ in chosen)

        def cells(gb_s: float) -> Iterator[str]:
            return (times(*predicted(int(row["bytes"]), int(row["launches"]), gb_s)) for _, row in chosen)

        chips = ((f"{chip}, {gb_s:g} GB/s", *cells(gb_s)) for chip, gb_s in BANDWIDTH.items())
        return table((f"{unit}, from - to", *names), chips)

    yield by_chip(
        "us",
        False,
        lambda low, high: " - ".join(f"{1e6 * s:.3g}" if s < 1e-3 else f"{1e6 * s:.0f}" for s in (low, high)),
    )
    if all(op != TOKEN for (op, *_), _ in rows):
        return
    yield (
        "A greedy token is one step of a whole model, whose head is its embedding, and the sampler. What it takes is "
        "counted of one layer and of two, and of two small vocabularies, and extended to the model's.\n"
    )
    yield by_chip("tokens a second", True, lambda low, high: f"{1 / high:.0f} - {1 / low:.0f}")


def main() -> None:
    try:
        import plots
    except ImportError:
        print("no matplotlib: the plots stay as they are")
    else:
        plots.draw()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(generate())
    print(f"wrote {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
