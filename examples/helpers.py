"""Shared by the training examples: text that every machine has, a plot of losses, a message when memory runs out."""

import ast
import contextlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch


def docstrings(least: int = 200) -> list[str]:
    """The docstrings of at least `least` characters in Python's standard library, in file order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented) and len(text := ast.get_docstring(node) or "") >= least:
                texts.append(text)
    return texts


def save_plot(path: Path, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Plots each curve of (step, loss)."""
    import matplotlib

    matplotlib.use("agg")  # needs no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in losses.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


@contextlib.contextmanager
def advice_if_out_of_memory(advice: str) -> Iterator[None]:
    """Ends the program with the advice instead of a traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError of a GPU is a RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise SystemExit(
            f"Out of memory: {advice}\n({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
        ) from None
