"""Plots of the results of every machine, as PNG files under docs/plots."""

from itertools import chain, product
from pathlib import Path

from record import groups, machines, read
from tables import case_of, split
from timing import ROOT

DOCS = ROOT / "docs"
COLOURS = {"torch_fused": "#0b6e4f", "transformers": "#c44536", "llama-cpp-python": "#e09f3e"}
Series = dict[str, dict[str, float]]
"""The bars of each contender, by name."""


def bandwidth(folder: Path) -> Series:
    """Ours and torch's best, at the largest shape of each op."""
    series: Series = {}
    for bench in ("rms_norm", "layer_norm", "softmax", "swiglu", "rope", "adamw"):
        for (op, _), rows in groups(read(folder / f"{bench}.csv"), "op", "dtype").items():
            shape = max(rows, key=lambda row: float(row["gb_s"]) * float(row["ms"]))["shape"]
            ours, best, _ = split([row for row in rows if row["shape"] == shape])
            for name, row in (("torch_fused", ours), ("torch's best", best)):
                if row:
                    series.setdefault(name, {})[f"{op} {case_of(row)}"] = float(row["copy_share"])
    return series


def tokens(folder: Path) -> Series:
    """Of the first model."""
    series: Series = {}
    texts = read(folder / "generate.csv")
    for row in texts:
        if row["op"] == texts[0]["op"]:
            series.setdefault(row["contender"], {})[case_of(row)] = float(row["tokens_s"])
    return series


PLOTS = {
    "bandwidth": ("Bandwidth", "share of a copy of the same bytes", bandwidth),
    "tokens": ("Tokens per second", "tokens per second, prompt included", tokens),
}


def plot_path(name: str, slug: str) -> Path:
    return DOCS / "plots" / f"{name}-{slug}.png"


def draw() -> None:
    """Groups of horizontal bars, one bar per contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (DOCS / "plots").mkdir(exist_ok=True)
    for folder, (name, (title, label, series_of)) in product(machines(), PLOTS.items()):
        if not (series := series_of(folder)):
            continue
        names, height = list(dict.fromkeys(chain(*series.values()))), 0.8 / len(series)
        figure, axes = pyplot.subplots(layout="constrained", figsize=(8, 1 + len(names) * len(series) * 0.13))
        for i, (contender, points) in enumerate(series.items()):
            places, values = [row + i * height for row in range(len(names))], [points.get(name, 0) for name in names]
            axes.barh(places, values, height, label=contender, color=COLOURS.get(contender))
        axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=7)
        axes.invert_yaxis()
        axes.legend(fontsize=8)
        axes.set(xlabel=label)
        figure.suptitle(title)
        figure.savefig(plot_path(name, folder.name), dpi=110, metadata={"Software": None})
        pyplot.close(figure)
