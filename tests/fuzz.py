"""The fuzz test of the ops, run as a process: `python tests/fuzz.py cpu 200`, or emulated; 200 calls per op.

Sizes, layouts, places, values and options are drawn by hypothesis, which also finds the smallest call that fails. The
call that runs is written to the file that the third argument names: after a crash it says which one it was.
"""

import contextlib
import faulthandler
import sys
from pathlib import Path

import hypothesis.strategies as st
import torch
from calls import CALLS, Arguments, Call, Maker, map_tensors, tensors_of
from conftest import poisoned_memory
from hypothesis import HealthCheck, Phase, given, note, settings

from torch_fused.metal import emulate
from torch_fused.testing import guarded, layouts, makers_of_layouts

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 255, 256, 257, 1000, 1025, 4099, 9001)
MOST_ELEMENTS = {"cpu": (200, 200, 200, 2000, 20000), "emulated": (60, 60, 600)}
VALUES = ("ordinary", "constant", "nan", "inf", "huge", "large", "tiny", "mixed", "zeros")


class Drawn(Maker):
    """A `Maker` that draws its values."""

    def __init__(self, draw, dtype: torch.dtype, most_elements: tuple[int, ...]) -> None:
        super().__init__(dtype)
        self.draw = draw
        self.most_elements = self.left = draw(st.sampled_from(most_elements))
        self.seed = draw(st.integers(0, 2**20)) * 100
        self.values = draw(st.sampled_from(VALUES))
        self.guard = draw(st.sampled_from((None, "end", "beginning")))

    def size(self, default: int, most: int | None = None) -> int:
        most = min(most or SIZES[-1], max(1, self.left))
        drawn = self.draw(st.sampled_from([size for size in SIZES if size <= most]))
        self.left //= max(1, drawn)
        return drawn

    def leading(self) -> list[int]:
        self.left = self.most_elements
        return [self.size(2, 33) for _ in range(self.draw(st.integers(0, 4)))]

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def tensor(self, *shape, dtype=None, scale=1.0, positive=False):
        plain = super().tensor(*shape, dtype=torch.float64, scale=scale, positive=positive)
        dtype = dtype or self.dtype
        if dtype.is_floating_point:
            spoil(plain, self.values, self.seed, torch.finfo(dtype))
            plain = plain.abs() if positive else plain
        return self.laid_out(plain.to(dtype))

    def laid_out(self, tensor):
        choice = self.draw(st.integers(0, 23))
        if choice:
            makers = list(makers_of_layouts(tensor))
            tensor = makers[choice % len(makers)][1]()
        return tensor if self.guard is None else guarded(tensor, at_end=self.guard == "end")


def spoil(values: torch.Tensor, how: str, seed: int, limits: torch.finfo) -> None:
    """Puts special values into some places of the values, or all."""
    # In float64 nothing is exact where float64's own squares overflow.
    largest = min(limits.max, 1e100)
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(values.shape, generator=generator) < 0.1
    special = {"nan": torch.nan, "inf": torch.inf, "huge": largest, "tiny": limits.smallest_normal / 4}
    if how == "constant":
        values.fill_(float(torch.randn((), generator=generator)) * 100)
    elif how == "zeros":
        values.zero_()
    elif how == "large":
        values.mul_(largest / 5)
    elif how == "mixed":
        for value in (*special.values(), -torch.inf):
            values[torch.rand(values.shape, generator=generator) < 0.05] = value
    elif how in special:
        values[some] = special[how] * values[some].sign()


def describe(arguments: Arguments) -> str:
    parts = [
        f"{name}[{place}]: {tensor.dtype} {list(tensor.shape)} strides {tensor.stride()} neg {tensor.is_neg()}"
        for name, place, tensor in tensors_of(arguments)
    ]
    others = {name: value for name, value in arguments.items() if not isinstance(value, (torch.Tensor, list))}
    return "\n".join([*parts, str(others)])


def fuzz(call: Call, backend: str, calls: int, log: Path) -> None:
    dtypes = dtypes_of(call, backend)

    @settings(
        max_examples=calls,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(data=st.data())
    def run(data):
        draw = data.draw
        maker = Drawn(draw, draw(st.sampled_from(dtypes)), MOST_ELEMENTS[backend])
        arguments = call.arguments(maker)
        text = f"{call.op} on {backend}\n{describe(arguments)}\nvalues {maker.values}, guard {maker.guard}\n"
        log.write_text(text)
        note(text)
        check(call, arguments)

    run()


def at_guard_pages(call: Call, backend: str, log: Path) -> None:
    """Each tensor ends, or begins, at a guard page."""
    for dtype in dtypes_of(call, backend):
        for layout in ("contiguous", "rows apart", "step 2 in dimension 0", "last two dimensions transposed"):
            for at_end in (True, False):

                def laid_out(tensor, layout=layout, at_end=at_end):
                    return guarded(dict(layouts(tensor)).get(layout, tensor), at_end=at_end)

                arguments = call.arguments(Maker(dtype))
                free = {name: value for name, value in arguments.items() if name not in call.only_dense}
                dense = {name: value for name, value in arguments.items() if name in call.only_dense}
                guard = map_tensors(lambda t, at_end=at_end: guarded(t, at_end=at_end), dense)
                log.write_text(f"{call.op} on {backend}, {layout}, guard at the {'end' if at_end else 'beginning'}\n")
                call.check(arguments | guard | map_tensors(laid_out, free))


def dtypes_of(call: Call, backend: str) -> list[torch.dtype]:
    return [dtype for dtype in call.dtypes if backend == "cpu" or dtype != torch.float64]


def check(call: Call, arguments: Arguments) -> None:
    """Right; or an error for a layout that the argument does not support, or for overlapping written elements."""
    try:
        call.check(arguments)
    except RuntimeError as error:
        if not any(call.refuses(error, name) for name in call.only_dense | call.written):
            raise


def main(backend: str, calls: int, log: Path, ops: list[str]) -> None:
    faulthandler.enable()
    torch.set_num_threads(2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(poisoned_memory())
        if backend == "emulated":
            stack.enter_context(emulate())
        for call in CALLS.values():
            if call.op in ops or not ops:
                at_guard_pages(call, backend, log)
                fuzz(call, backend, calls, log)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
