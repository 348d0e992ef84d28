"""Tolerances, tensors and comparisons that the tests, the benchmarks and the self-check share."""

from collections.abc import Callable, Iterable, Sequence
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
    """A normal random tensor, the same values for a seed whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(device).requires_grad_(requires_grad)


def misleading_row(vocabulary: int, scale: float = 1.0) -> Tensor:
    """Logits ``(1, vocabulary)`` whose tokens in the sampler's sample of a row (sampling.metal) come last."""
    logits = make(1, vocabulary, scale=scale)
    places = torch.arange(1024)
    logits[0, (places << 10 | (places * 2654435761 & 0xFFFFFFFF) >> 22) * vocabulary >> 20] -= 100
    return logits


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in the Euclidean norm, computed in float64; NaN if either holds one."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_close(actual: Tensor, exact: Tensor, *, roundings: float = 1.0, what: str = "result") -> None:
    """Checks every element of `actual` against the float64 tensor `exact`.

    The error allowed is `roundings` roundings to `actual`'s dtype, of the element itself, plus the error that float32
    arithmetic leaves relative to the largest element of the row. NaN and infinity must be in the same places.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    dtype = actual.dtype
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    # A value past the largest of the dtype rounds to infinity.
    exact = torch.where(exact.abs() > torch.finfo(dtype).max, exact.to(dtype).double(), exact)
    special = ~torch.isfinite(exact)
    torch.testing.assert_close(actual[special], exact[special], rtol=0, atol=0, equal_nan=True)
    if exact.numel() == 0 or special.all():
        return
    finite = torch.where(special, torch.zeros_like(exact), exact)
    largest = finite.abs().amax(-1, keepdim=True) if finite.dim() else finite.abs()
    arithmetic = HALF_ULP[torch.float64 if dtype == torch.float64 else torch.float32]
    allowed = (roundings * HALF_ULP[dtype] + 4 * arithmetic) * finite.abs() + 8 * arithmetic * largest
    allowed = allowed.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    excess = torch.where(special, torch.zeros_like(exact), (actual - exact).abs() - allowed)
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert bool((excess <= 0).all()), (
        f"{what}: {int((~(excess <= 0)).sum())} of {exact.numel()} elements are off; worst at {worst}: "
        f"{actual.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, allowed {allowed.flatten()[worst]:.3g}"
    )


def assert_matches_reference(
    op: Callable[..., Any], reference: Callable[..., Any], *args: Any, roundings: float = 1.0, **kwargs: Any
) -> None:
    """Checks ``op(*args, **kwargs)`` against ``reference`` run on the same tensors in float64 on the CPU."""
    actual = op(*args, **kwargs)
    wide = [_widen(arg) for arg in args]
    exact = reference(*wide, **{name: _widen(value) for name, value in kwargs.items()})
    for i, (a, e) in enumerate(zip(_tensors(actual), _tensors(exact), strict=True)):
        assert_close(a, e, roundings=roundings, what=f"result {i}")


def _widen(value: Any) -> Any:
    return value.detach().double().cpu() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
