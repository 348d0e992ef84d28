"""Plots of the results of every machine, as PNG files under docs/plots."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import groups, machines, read
from tables import case_of, split
from timing import ROOT

DOCS = ROOT / "docs"
COLOURS = {
    "torch_fused": "#0b6e4f", "FusedKVCache": "#0b6e4f", "transformers": "#c44536", "llama-cpp-python": "#e09f3e",
}  # fmt: skip
Series = dict[str, dict[Any, float]]
"""Points of each contender."""


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for folder in machines():
        for name, (title, plot) in PLOTS.items():
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            if plot(folder, axes):
                axes.legend(fontsize=8)
                figure.suptitle(title)
                plot_path(name, folder.name).parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(plot_path(name, folder.name), dpi=110, metadata={"Software": None})
            pyplot.close(figure)


def plot_path(name: str, slug: str) -> Path:
    return DOCS / "plots" / f"{name}-{slug}.png"


def lines(axes: Any, series: Series, x: str, y: str) -> bool:
    """One line per contender, over powers of ten."""
    for name, points in series.items():
        xs, ys = zip(*sorted(points.items()), strict=True)
        axes.plot(xs, ys, "o--" if "top-p" in name else "o-", label=name, color=COLOURS.get(name.split(",")[0]))
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return bool(series)


def bars(axes: Any, series: Series, label: str, room: float) -> bool:
    """Groups of horizontal bars, one bar per contender."""
    names, height = list(dict.fromkeys(name for points in series.values() for name in points)), 0.8 / len(series or " ")
    for i, (contender, points) in enumerate(series.items()):
        places = [row + i * height for row in range(len(names))]
        axes.barh(
            places, [points.get(name, 0.0) for name in names], height, label=contender, color=COLOURS.get(contender)
        )
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=7)
    axes.set(xlabel=label)
    axes.invert_yaxis()
    axes.figure.set_size_inches(8, 1 + room * len(names))
    return bool(names)


def bandwidth(folder: Path, axes: Any) -> bool:
    """Ours and torch's best, at the largest shape of each op."""
    series: Series = {"torch_fused": {}, "torch's best": {}}
    for bench in ("rms_norm", "layer_norm", "softmax", "swiglu", "rope", "adamw"):
        for (op, _), rows in groups(read(folder / f"{bench}.csv"), "op", "dtype").items():
            shape = max(rows, key=lambda row: float(row["gb_s"]) * float(row["ms"]))["shape"]
            for name, row in zip(series, split([row for row in rows if row["shape"] == shape]), strict=False):
                if isinstance(row, dict):
                    series[name][f"{op} {case_of(row)}"] = float(row["copy_share"])
    return bars(axes, series, "share of a copy of the same bytes", 0.27)


def vocabulary(folder: Path, axes: Any) -> bool:
    """The honest rows of metal-candle's vocabulary table."""
    series: Series = {}
    for row in read(folder / "metal_candle.csv"):
        match = re.fullmatch(r"(top-[kp] \S+), vocabulary (\d+)", row["op"])
        if match and row["kind"] == "honest":
            series.setdefault(f"{row['contender']}, {match[1]}", {})[int(match[2])] = float(row["ms"])
    return lines(axes, series, "tokens in the vocabulary", "ms per draw")


def context(folder: Path, axes: Any) -> bool:
    series: Series = {}
    for row in read(folder / "kv_cache.csv"):
        series.setdefault(row["contender"], {})[int(row["shape"].split()[0])] = float(row["ms"])
    for row in read(folder / "decode.csv"):
        case = row["op"], row["contender"], row["dtype"], row["kind"], row["shape"][:6]
        if case == ("decode", "torch_fused", "bf16", "", "1 x 1 "):
            name = "decoding a token of SmolLM2-135M, torch_fused"
            series.setdefault(name, {})[int(row["shape"].split()[-1])] = float(row["ms"])
    return lines(axes, series, "tokens held", "ms per token")


def by_request(column: str, label: str) -> Callable[[Path, Any], bool]:
    """Of the first model."""

    def plot(folder: Path, axes: Any) -> bool:
        series: Series = {}
        texts = read(folder / "generate.csv")
        for row in texts:
            if row["op"] == texts[0]["op"] and row[column]:
                series.setdefault(row["contender"], {})[case_of(row)] = float(row[column])
        return bars(axes, series, label, 0.4)

    return plot


PLOTS: dict[str, tuple[str, Callable[[Path, Any], bool]]] = {
    "bandwidth": ("Share of copy bandwidth", bandwidth),
    "vocabulary": ("Time to draw a token, by vocabulary", vocabulary),
    "context": ("Time to append a token to a cache, and to decode one, by context", context),
    "tokens": ("Tokens per second", by_request("tokens_s", "tokens per second, prompt included")),
    "memory": ("Memory that a request takes", by_request("peak_mb", "MB in addition to the weights")),
}
