"""The error every tool of this package raises for a Metal source it cannot accept."""


class MetalError(RuntimeError):
    """Everything wrong with a Metal source, one `file.metal:line: error: what` a line."""


class Diagnostics:
    """Collects errors, so that one run names all of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def error(self, file: str, line: int, message: str) -> None:
        self.lines.append(f"{file}:{line}: error: {message}")

    def raise_if_any(self) -> None:
        if self.lines:
            raise MetalError("\n".join(self.lines))
