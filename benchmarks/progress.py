"""A line for each row measured and, on a terminal and where rich is installed, a bar with the time left."""

from types import TracebackType
from typing import Any


class Progress:
    def __init__(self, description: str, total: int) -> None:
        self._bar: Any = None
        try:
            from rich import progress
        except ImportError:
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        self._bar = progress.Progress(*columns)
        self._task = self._bar.add_task(description, total=total)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def advance(self) -> None:
        if self._bar:
            self._bar.advance(self._task)
