"""Plots of the results of every machine, as PNG files under docs/plots."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import groups, machines, read
from tables import DOCS, split

COLOURS = {
    "torch_fused": "#0b6e4f",
    "FusedKVCache": "#0b6e4f",
    "transformers": "#c44536",
    "llama-cpp-python": "#e09f3e",
}


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for folder in machines():
        for name, (title, plot) in PLOTS.items():
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            if plot(folder, axes):
                figure.suptitle(title)
                path = plot_path(name, folder.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=110, metadata={"Software": None})
            pyplot.close(figure)


def plot_path(name: str, slug: str) -> Path:
    return DOCS / "plots" / f"{name}-{slug}.png"


def lines(axes: Any, series: dict[str, list[tuple[float, float]]], x: str, y: str) -> bool:
    """One line per contender, over powers of ten."""
    for name, points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, "o--" if "top-p" in name else "o-", label=name, color=COLOURS.get(name.split(",")[0]))
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=8)
    return bool(series)


def bars(axes: Any, names: list[str], series: dict[str, list[float]], label: str, room: float) -> bool:
    """Groups of horizontal bars, one bar per contender."""
    height = 0.8 / max(len(series), 1)
    for i, (contender, values) in enumerate(series.items()):
        places = [row + i * height for row in range(len(names))]
        axes.barh(places, values, height, label=contender, color=COLOURS.get(contender))
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=7)
    axes.set(xlabel=label)
    axes.invert_yaxis()
    axes.figure.set_size_inches(8, 1 + room * len(names))
    if series:
        axes.legend(fontsize=8)
    return bool(names)


def bandwidth(folder: Path, axes: Any) -> bool:
    """Ours and torch's best, at the largest shape of each op."""
    names, ours, best = [], [], []
    for bench in ("rms_norm", "layer_norm", "softmax", "swiglu", "rope", "adamw"):
        for (op, dtype), rows in groups(read(folder / f"{bench}.csv"), "op", "dtype").items():
            shape = max(rows, key=lambda row: float(row["gb_s"]) * float(row["ms"]))["shape"]
            fused, rival, _ = split([row for row in rows if row["shape"] == shape])
            if fused and rival:
                names.append(f"{op} {shape} {dtype}")
                ours.append(float(fused["copy_share"]))
                best.append(float(rival["copy_share"]))
    return bars(axes, names, {"torch_fused": ours, "torch's best": best}, "share of a copy of the same bytes", 0.27)


def vocabulary(folder: Path, axes: Any) -> bool:
    """The honest rows of metal-candle's vocabulary table."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in read(folder / "metal_candle.csv"):
        match = re.fullmatch(r"(top-[kp] \S+), vocabulary (\d+)", row["row"])
        if match and row["workload"] == "honest":
            series.setdefault(f"{row['contender']}, {match[1]}", []).append((int(match[2]), float(row["ms"])))
    return lines(axes, series, "tokens in the vocabulary", "ms per draw")


def context(folder: Path, axes: Any) -> bool:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in read(folder / "kv_cache.csv"):
        series.setdefault(row["contender"], []).append((int(row["shape"].split()[0]), float(row["ms"])))
    for row in read(folder / "decode.csv"):
        if row["contender"] == "torch_fused" and row["dtype"] == "bf16" and row["shape"].startswith("1 x 1 "):
            point = int(row["shape"].split()[-1]), float(row["ms"])
            series.setdefault("decoding a token of SmolLM2-135M, torch_fused", []).append(point)
    return lines(axes, series, "tokens held", "ms per token")


def by_request(column: str, label: str) -> Callable[[Path, Any], bool]:
    def plot(folder: Path, axes: Any) -> bool:
        texts = read(folder / "generate.csv")
        requests = {
            f"{dtype}, {mode}, {batch} x {prompt} + {new}": {
                r["contender"]: float(r[column]) for r in rows if r[column]
            }
            for (dtype, mode, batch, prompt, new), rows in groups(
                [row for row in texts if row["model"] == texts[0]["model"]], "dtype", "mode", "batch", "prompt", "new"
            ).items()
        }
        contenders = dict.fromkeys(name for values in requests.values() for name in values)
        series = {name: [values.get(name, 0.0) for values in requests.values()] for name in contenders}
        return bars(axes, list(requests), series, label, 0.4)

    return plot


PLOTS: dict[str, tuple[str, Callable[[Path, Any], bool]]] = {
    "bandwidth": ("Share of copy bandwidth", bandwidth),
    "vocabulary": ("Time to draw a token, by vocabulary", vocabulary),
    "context": ("Time to append a token to a cache, and to decode one, by context", context),
    "tokens": ("Tokens per second", by_request("tokens_s", "tokens per second, prompt included")),
    "memory": ("Memory that a request takes", by_request("peak_mb", "MB in addition to the weights")),
}
