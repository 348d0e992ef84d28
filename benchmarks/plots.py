"""Plots as PNG files."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"torch_fused": "#0b6e4f", "transformers": "#c44536", "llama-cpp-python": "#e09f3e"}


def draw(path: Path, title: str, label: str, series: Mapping[str, Mapping[str, float]]) -> None:
    """Groups of horizontal bars, one bar per contender: the lengths of each, by name."""
    names, height = list(dict.fromkeys(chain(*series.values()))), 0.8 / len(series)
    figure, axes = pyplot.subplots(layout="constrained", figsize=(8, 1 + len(names) * len(series) * 0.13))
    for i, (contender, lengths) in enumerate(series.items()):
        places, values = [row + i * height for row in range(len(names))], [lengths.get(name, 0) for name in names]
        axes.barh(places, values, height, label=contender, color=COLOURS.get(contender))
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    axes.set(xlabel=label)
    figure.suptitle(title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
