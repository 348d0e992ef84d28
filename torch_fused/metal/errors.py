"""The error that this package raises for an invalid Metal source."""


class MetalError(RuntimeError):
    """All errors in a Metal source, one `file.metal:line: error: message` per line."""


class Diagnostics:
    """Collects errors, so that one run reports all of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def error(self, file: str, line: int, message: str) -> None:
        self.lines.append(f"{file}:{line}: error: {message}")

    def raise_if_any(self) -> None:
        if self.lines:
            raise MetalError("\n".join(self.lines))
