"""Tolerances, tensors and comparisons for the tests, the benchmarks and the self-check."""

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

HALF_ULP = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""The relative error of one rounding to each dtype."""

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


def make(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    requires_grad: bool = False,
) -> Tensor:
    """A normal random tensor; a seed gives the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(device).requires_grad_(requires_grad)


def layouts(values: Tensor, *, written: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors with the shape of `values` in every layout that an op must accept: (name, tensor).

    The tensors contain `values`; if their elements share memory, some values repeat. Gaps between elements contain
    NaN or the largest integer.

    Args:
        values: any shape and dtype.
        written: only layouts that are allowed for tensors that are written.
    """
    for name, make_layout in makers_of_layouts(values, written=written):
        yield name, make_layout()


def makers_of_layouts(values: Tensor, *, written: bool = False) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Like `layouts`, with functions that create the tensors."""
    shape, dims = list(values.shape), range(values.dim())

    def view_of(buffer_shape: Sequence[int], view: Callable[[Tensor], Tensor]) -> Tensor:
        gap: Any = torch.nan if values.is_floating_point() else values.dtype == torch.bool
        if not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
            gap = torch.iinfo(values.dtype).max
        return view(torch.full(tuple(buffer_shape), gap, dtype=values.dtype, device=values.device)).copy_(values)

    def in_order(*order: int) -> Callable[[], Tensor]:
        """The dimensions in this memory order, the last one dense."""
        inverse = [order.index(d) for d in dims]
        return lambda: view_of([shape[d] for d in order], lambda t: t.permute(inverse))

    def step_2(dim: int) -> Callable[[], Tensor]:
        doubled = [2 * n if d == dim else n for d, n in enumerate(shape)]
        every_other = (*[slice(None)] * dim, slice(None, None, 2))
        return lambda: view_of(doubled, lambda t: t[every_other])

    def expanded(dim: int) -> Callable[[], Tensor]:
        return lambda: values.narrow(dim, 0, 1).clone().expand(shape)

    def odd_strides() -> Tensor:
        dense = values.contiguous()
        return dense.as_strided(shape, [7 if n == 1 else s for n, s in zip(shape, dense.stride(), strict=True)])

    yield "contiguous", lambda: values.clone(memory_format=torch.contiguous_format)
    yield "after an offset", lambda: view_of([values.numel() + 1], lambda t: t[1:].view(shape))
    if values.dim() >= 1:
        yield "rows apart", lambda: view_of([*shape[:-1], shape[-1] + 3], lambda t: t[..., : shape[-1]])
    if values.dim() >= 2:
        yield "last two dimensions transposed", in_order(*dims[:-2], dims[-1], dims[-2])
    if values.dim() >= 3:
        yield "first two dimensions transposed", in_order(1, 0, *dims[2:])
        yield "dimensions reversed", in_order(*dims[::-1])
        yield "last dimension first", in_order(dims[-1], *dims[:-1])
    for d in dims:
        yield f"step 2 in dimension {d}", step_2(d)
    yield "odd strides of single elements", odd_strides
    if written:
        return
    if values.is_floating_point():
        yield "negated when read", lambda: torch._neg_view(-values)
    if values.numel() <= 1:
        return
    long = [d for d in dims if shape[d] > 1]
    for d in long:
        yield f"expanded in dimension {d}", expanded(d)
    yield "one element", lambda: values.flatten()[:1].clone().expand(values.numel()).view(shape)
    if len(long) > 1:
        yield "overlapping", lambda: values.flatten().clone().as_strided(shape, [1] * len(shape))


def guarded(tensor: Tensor, *, at_end: bool = True) -> Tensor:
    """A copy of the CPU tensor with the same strides, in memory that ends (or begins) at a guard page.

    Reading or writing past its last (or before its first) element is a segmentation fault.
    """
    if tensor.is_neg():
        return torch._neg_view(guarded(torch._neg_view(tensor), at_end=at_end))
    if tensor.numel() == 0:
        return tensor.clone()
    reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size, page = reach * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + (pages * page if at_end else 0)), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * page - size if at_end else page
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=reach, offset=offset)
    flat.copy_(tensor.as_strided((reach,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


def misleading_row(vocabulary: int, scale: float = 1.0) -> Tensor:
    """Logits ``(1, vocabulary)`` where the tokens that the sampler samples from a row (sampling.metal) rank last."""
    logits = make(1, vocabulary, scale=scale)
    places = torch.arange(1024)
    logits[0, (places << 10 | (places * 2654435761 & 0xFFFFFFFF) >> 22) * vocabulary >> 20] -= 100
    return logits


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in the Euclidean norm, computed in float64; NaN if either contains NaN."""
    actual, exact = actual.detach().cpu().double(), exact.detach().cpu().double()
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_close(actual: Tensor, exact: Tensor, *, roundings: float = 1.0, what: str = "result") -> None:
    """Checks every element of `actual` against the float64 tensor `exact`.

    The allowed error is `roundings` roundings of the element to `actual`'s dtype, plus the error of float32
    arithmetic relative to the largest element of the row. NaN and infinity must be in the same places.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    dtype = actual.dtype
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    # A value above the largest of the dtype rounds to infinity.
    exact = torch.where(exact.abs() > torch.finfo(dtype).max, exact.to(dtype).double(), exact)
    special = ~torch.isfinite(exact)
    torch.testing.assert_close(actual[special], exact[special], rtol=0, atol=0, equal_nan=True)
    if exact.numel() == 0 or special.all():
        return
    finite = torch.where(special, torch.zeros_like(exact), exact)
    largest = finite.abs().amax(-1, keepdim=True) if finite.dim() else finite.abs()
    # For float64 results, the exact values have the same precision.
    arithmetic = 2 * HALF_ULP[dtype] if dtype == torch.float64 else HALF_ULP[torch.float32]
    allowed = (roundings * HALF_ULP[dtype] + 4 * arithmetic) * finite.abs() + 8 * arithmetic * largest
    allowed = allowed.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    excess = torch.where(special, torch.zeros_like(exact), (actual - exact).abs() - allowed)
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert bool((excess <= 0).all()), (
        f"{what}: {int((~(excess <= 0)).sum())} of {exact.numel()} elements are wrong; worst at {worst}: "
        f"{actual.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, allowed {allowed.flatten()[worst]:.3g}"
    )


def assert_matches_reference(
    op: Callable[..., Any], reference: Callable[..., Any], *args: Any, roundings: float = 1.0, **kwargs: Any
) -> None:
    """Checks ``op(*args, **kwargs)`` against ``reference`` with the same tensors in float64 on the CPU."""
    actual = op(*args, **kwargs)
    wide = [_widen(arg) for arg in args]
    exact = reference(*wide, **{name: _widen(value) for name, value in kwargs.items()})
    for i, (a, e) in enumerate(zip(_tensors(actual), _tensors(exact), strict=True)):
        assert_close(a, e, roundings=roundings, what=f"result {i}")


def _widen(value: Any) -> Any:
    return value.detach().double().cpu() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
