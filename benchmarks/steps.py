"""Cases whose contenders run in a process each: the peak of its memory is its own, and so is what it patches."""

import multiprocessing
import statistics
from abc import abstractmethod
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from record import Case
from timing import Call, Columns, columns, peak_megabytes, seconds
from transformers.utils import logging

ROUNDS = 5
running: list[Call] = []  # what this process times


class Steps(Case):
    @abstractmethod
    def step(self, contender: Any, device: str) -> Call:
        """What is timed, of one of the contenders. It keeps no gradients."""

    def measure(self, contenders: Iterable[str], device: str) -> dict[str, Columns]:
        """One step of each contender per round."""
        spawn, samples = multiprocessing.get_context("spawn"), {name: [] for name in contenders}
        with ExitStack() as stack:
            pools = {}
            for name in contenders:
                arguments = self, name, device, torch.get_num_threads()
                pools[name] = stack.enter_context(ProcessPoolExecutor(1, spawn, start, arguments))
            for _ in range(ROUNDS + 1):
                for name, pool in pools.items():
                    samples[name].append(pool.submit(sample, device).result())

        def row(times: list[float], peaks: list[float | None]) -> Columns:
            return columns(times) | {"peak_mb": None if None in peaks else statistics.median(peaks)}

        # The first round warms up.
        return {name: row(*zip(*each[1:], strict=True)) for name, each in samples.items()}


def start(case: Steps, name: str, device: str, threads: int) -> None:
    """In a contender's process."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    running[:] = [case.step(case.contenders(device)[name], device)]


def sample(device: str) -> tuple[float, float | None]:
    """How long a step takes, and how much memory in addition."""
    (step,) = running
    return seconds(step, device, wall=True), peak_megabytes(step, device)
