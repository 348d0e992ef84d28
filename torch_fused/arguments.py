"""Arguments of the commands, and their errors: one line on stderr and an exit status."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch

USAGE = 2
"""The exit status for wrong arguments."""


class Failure(Exception):
    """An error that ends a command, reported in one line."""

    def __init__(self, message: object, status: int = 1) -> None:
        super().__init__(" ".join(str(message).split()))
        self.status = status


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def device(text: str) -> str:
    """A device that this torch can use, for argparse."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; use one of {', '.join(there)}") from None
    name = "cuda:0" if text == "cuda" else str(chosen)
    if name not in there:
        raise argparse.ArgumentTypeError(f"this machine has no {text}; use one of {', '.join(there)}")
    return text


def prompt(text: str) -> str:
    """Text for a tokenizer, for argparse. Bytes that are not valid text arrive as surrogates."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the prompt is empty; give some text, such as --prompt 'Hello'")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"the prompt is not valid text: {error}") from None
    return text


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An int or a finite float from `low` to `high`, for argparse."""
    what = "an integer" if kind is int else "a number"
    what += f" of at least {low}" if high == math.inf else f" from {low} to {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse
