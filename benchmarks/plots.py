"""Plots of the results of every machine, as PNG files under docs/plots."""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from record import machines, read
from report import PLOTS, groups, plot_path, split

COLOURS = {
    "torch_fused": "#0b6e4f",
    "FusedKVCache": "#0b6e4f",
    "transformers": "#c44536",
    "llama-cpp-python": "#e09f3e",
}


def draw() -> None:
    for folder in machines():
        for name, plot in {
            "bandwidth": bandwidth,
            "vocabulary": vocabulary,
            "context": context,
            "tokens": tokens,
            "memory": memory,
        }.items():
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            if plot(folder, axes):
                figure.suptitle(PLOTS[name])
                path = plot_path(name, folder.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=110, metadata={"Software": None})
            pyplot.close(figure)


def lines(axes, series: dict[str, list[tuple[float, float]]], x: str, y: str) -> bool:
    """One line a contender, over powers of ten."""
    for name, points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        style = "o--" if "top-p" in name else "o-"
        axes.plot(xs, ys, style, label=name, color=COLOURS.get(name.split(",")[0]))
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=8)
    return bool(series)


def bars(axes, names: list[str], series: dict[str, list[float]], label: str) -> bool:
    """Groups of horizontal bars, one bar a contender."""
    height = 0.8 / max(len(series), 1)
    for i, (contender, values) in enumerate(series.items()):
        places = [row + i * height for row in range(len(names))]
        axes.barh(places, values, height, label=contender, color=COLOURS.get(contender))
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=7)
    axes.set(xlabel=label)
    axes.invert_yaxis()
    if series:
        axes.legend(fontsize=8)
    return bool(names)


def bandwidth(folder: Path, axes) -> bool:
    """Ours and torch's best, at the largest shape of each op."""
    benches = ("rms_norm", "layer_norm", "softmax", "swiglu", "rope", "adamw")
    names, ours, best = [], [], []
    for bench in benches:
        for (op, dtype), rows in groups(read(folder / f"{bench}.csv"), "op", "dtype").items():
            shape = max(rows, key=lambda row: float(row["gb_s"]) * float(row["ms"]))["shape"]
            fused, rival, _ = split([row for row in rows if row["shape"] == shape])
            if fused and rival:
                names.append(f"{op} {shape} {dtype}")
                ours.append(float(fused["copy_share"]))
                best.append(float(rival["copy_share"]))
    axes.figure.set_size_inches(8, 1 + 0.27 * len(names))
    return bars(axes, names, {"torch_fused": ours, "torch's best": best}, "share of a copy of the same bytes")


def vocabulary(folder: Path, axes) -> bool:
    """The honest rows of the seed's vocabulary table."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in read(folder / "seed.csv"):
        match = re.fullmatch(r"(top-[kp] \S+), vocabulary (\d+)", row["row"])
        if match and row["workload"] == "honest":
            series.setdefault(f"{row['contender']}, {match[1]}", []).append((int(match[2]), float(row["ms"])))
    return lines(axes, series, "tokens in the vocabulary", "ms a draw")


def context(folder: Path, axes) -> bool:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in read(folder / "kv_cache.csv"):
        held = int(row["shape"].split()[0])
        series.setdefault(row["contender"], []).append((held, float(row["ms"])))
    for row in read(folder / "decode.csv"):
        if row["contender"] == "torch_fused" and row["dtype"] == "bf16" and row["shape"].startswith("1 x 1 "):
            held = int(row["shape"].split()[-1])
            series.setdefault("decoding a token of SmolLM2-135M, torch_fused", []).append((held, float(row["ms"])))
    return lines(axes, series, "tokens held", "ms a token")


def _by_request(column: str) -> Callable[[Path, object], bool]:
    def plot(folder: Path, axes) -> bool:
        requests = {
            key: {row["contender"]: float(row[column]) for row in rows if row[column]}
            for key, rows in groups(read(folder / "generate.csv"), "dtype", "mode", "batch", "prompt", "new").items()
        }
        contenders = list(dict.fromkeys(name for values in requests.values() for name in values))
        names = [f"{dtype}, {mode}, {batch} x {prompt} + {new}" for dtype, mode, batch, prompt, new in requests]
        series = {name: [values.get(name, 0.0) for values in requests.values()] for name in contenders}
        axes.figure.set_size_inches(8, 1 + 0.4 * len(names))
        return bars(axes, names, series, LABELS[column])

    return plot


LABELS = {"tokens_s": "tokens a second, prompt included", "peak_mb": "MB on top of the weights"}
tokens, memory = _by_request("tokens_s"), _by_request("peak_mb")
