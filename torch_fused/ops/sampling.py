"""Greedy decoding, and sampling with temperature, top-k, top-p and min-p in integer arithmetic."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .library import register

_LOW = 0xFFFFFFFF


def greedy_reference(logits: Tensor) -> Tensor:
    """`greedy` in plain torch."""
    logits = logits.float()
    return torch.where(logits.isnan(), -torch.inf, logits).argmax(-1)


def filter_logits_reference(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    row_parameters: Tensor | None = None,
) -> Tensor:
    """`filter_logits` in plain torch."""
    rows = logits.reshape(-1, logits.shape[-1])
    parameters = _parameters(rows, temperature, top_k, top_p, min_p, row_parameters)
    order, kept, _ = _rank(rows, parameters)
    kept = torch.zeros_like(kept).scatter_(-1, order, kept)
    divided = (rows.to(parameters.divisor.dtype) / parameters.divisor).to(rows.dtype)
    return torch.where(kept, divided, -torch.inf).view(logits.shape)


def sample_reference(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    row_parameters: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    offset: int | None = None,
    state: Tensor | None = None,
    return_valid: bool = False,
) -> tuple[Tensor, Tensor]:
    """`sample` in plain torch: sorts, then takes the first token whose cumulative weight exceeds a random number."""
    rows = logits.reshape(-1, logits.shape[-1])
    parameters = _parameters(rows, temperature, top_k, top_p, min_p, row_parameters)
    order, kept, weights = _rank(rows, parameters)
    running = weights.cumsum(-1)
    total = torch.where(kept, running, 0).amax(-1, keepdim=True)
    if state is None:
        if seed is None:
            device = generator.device if generator is not None else "cpu"
            drawn = torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
            seed_tensor = drawn.to(rows.device)
        else:
            seed_tensor = torch.full((1,), seed, device=rows.device)
        state = torch.cat([seed_tensor, torch.full((1,), offset or 0, device=rows.device)])
    below = _share_of(total, *_random_bits(state, len(rows)))
    place = (running <= below).sum(-1, keepdim=True).clamp_max(rows.shape[-1] - 1)
    valid = kept.any(-1)
    ids = torch.where(valid, order.gather(-1, place).squeeze(-1), 0)
    return ids.view(logits.shape[:-1]), valid.view(logits.shape[:-1])


class _Parameters(NamedTuple):
    """The filters' parameters, (rows, 1) each; temperature 0 is a top_p of 0."""

    scale: Tensor  # log2(e) / temperature
    divisor: Tensor  # of the kept logits
    top_k: Tensor  # or 0
    top_p: tuple[Tensor, Tensor]  # the halves of a 64-bit fraction; all ones for no top_p
    min_p: Tensor


def _parameters(
    rows: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    row_parameters: Tensor | None,
) -> _Parameters:
    wide = torch.promote_types(rows.dtype, torch.float32)
    if row_parameters is None:
        values = [temperature, min(top_k or 0, 1 << 20), 0.0, min_p or 0.0]
        columns = torch.tensor(values, device=rows.device).expand(len(rows), 4)
        divisor = torch.full((len(rows), 1), temperature, dtype=wide, device=rows.device)
        share = min(int((1.0 if top_p is None else top_p) * 2**64), 2**64 - 1)
        high, low = (torch.full_like(columns[:, :1], 0, dtype=torch.int64) + half for half in divmod(share, 2**32))
    else:
        columns, divisor = row_parameters, row_parameters[:, :1].to(wide)
        # The smallest number that float32 rounds to top_p, or the one before.
        scaled = columns[:, 2:3] * 2.0**32
        high, low = scaled.long(), (scaled.frac() * 2.0**32).long()
        low = low - ((high << 8 | low >> 24) & _LOW)
        high, low = high - (high >> 24) + (low >> 32), low & _LOW
        nothing = columns[:, 2:3] >= 1
        high, low = high.masked_fill(nothing, _LOW), low.masked_fill(nothing, _LOW)
    # Rounds once: a number divided by a tensor would be a reciprocal and a product.
    scale = torch.full_like(columns[:, :1], math.log2(math.e)) / columns[:, :1]
    greedy = scale.isinf()
    top = (high.masked_fill(greedy, 0), low.masked_fill(greedy, 0))
    return _Parameters(scale, divisor.masked_fill(greedy, 1), columns[:, 1:2], top, columns[:, 3:])


def _rank(rows: Tensor, parameters: _Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's tokens in sampling order, which of them are kept, and their integer weights."""
    x = rows.float()
    x, order = torch.where(x.isnan(), -torch.inf, x).sort(stable=True, dim=-1, descending=True)
    scale, _, top_k, top_p, min_p = parameters
    live = x > -torch.inf
    weights = torch.where(live, _weights(x, scale), 0)

    kth = x.gather(-1, top_k.long().clamp(1, x.shape[-1]) - 1)
    kept = live & ((x >= kth) | (top_k == 0))
    running = weights.cumsum(-1)
    total = torch.where(kept, weights, 0).sum(-1, keepdim=True)

    # The token that reaches top_p is dropped if the tokens before it reach top_p up to rounding.
    target = _share_of(total, *top_p).clamp_min(1)
    edge = (running < target).sum(-1, keepdim=True).clamp_max(x.shape[-1] - 1)
    at_edge, weight = x.gather(-1, edge), weights.gather(-1, edge)
    before = running.gather(-1, edge) - weight
    octaves = torch.maximum(_octaves(at_edge, scale), _octaves(x[:, :1], scale))
    octaves += _steps(x, scale).gather(-1, edge) >> 24
    missing = target - before
    surplus = (before != 0) & (missing <= weight >> 10)
    surplus &= missing <= _rounding(torch.minimum(before, total - before), octaves)
    place = torch.arange(x.shape[-1], device=x.device)
    kept &= (place <= edge - surplus.long()) | ((top_p[0] == _LOW) & (top_p[1] == _LOW))

    lightest = (min_p * 2.0**40).ceil().long()
    octaves = _octaves(x[:, :1], scale)
    for doublings in range(40):
        octaves += 2 * ((lightest != 0) & (lightest << doublings < 1 << 40)).long()
    kept &= weights >= lightest - _rounding(lightest, octaves)
    return order, kept, weights


def _octaves(logit: Tensor, scale: Tensor) -> Tensor:
    octaves = logit.abs() * scale
    return torch.where(octaves < 32000, octaves, 32000).long()


def _rounding(weight: Tensor, octaves: Tensor) -> Tensor:
    """The error of a weight due to rounding of logits, their differences and the steps to float32."""
    return ((weight >> 12) * (octaves + 1)) >> 11


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """The distance of each logit from the largest, which comes first, in 2^-24 octaves."""
    octaves = torch.where(x == x[:, :1], 0.0, (x[:, :1] - x) * scale)
    return (torch.where(octaves < 42, octaves, 42.0) * 2.0**24).long()


def _weights(x: Tensor, scale: Tensor) -> Tensor:
    """round(2^40 * 2^((x - max) * scale)): a polynomial in 32-bit fixed point, as in csrc_mps/common/token_weight.h."""
    steps = _steps(x, scale)
    whole = (steps + 0xFFFFFF) >> 24
    fraction = ((whole << 24) - steps) << 8
    power = torch.full_like(steps, 0x00072A3C)
    for coefficient in (0x00289A9A, 0x013D54D8, 0x0719FD42, 0x1EBFDF1D, 0x58B909E8, 0x80000000):
        power = coefficient + _multiply_high(power, fraction)
    return ((power << 9) + ((torch.ones_like(whole) << whole) >> 1)) >> whole


def _multiply_high(a: Tensor | int, b: Tensor) -> Tensor:
    """The high half of the product of two 32-bit integers, which fits int64 except for its sign."""
    return ((a * b) >> 32) & _LOW


def _random_bits(state: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Philox 4x32-10 of (offset, row) with the key `seed`: the high and low 32 of each row's 64 bits."""
    seed, offset = state[:1], state[1:]
    low, high = seed & _LOW, (seed >> 32) & _LOW
    row = torch.arange(rows, device=state.device)
    x, y, z, w = (offset & _LOW) + 0 * row, (offset >> 32) & _LOW, row, 0 * row
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = ((b >> 32) & _LOW) ^ y ^ low, b & _LOW, ((a >> 32) & _LOW) ^ w ^ high, a & _LOW
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return x.unsqueeze(-1), y.unsqueeze(-1)


def _share_of(total: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """floor((high * 2^32 + low) * total / 2^64); total is below 2^60."""
    b, c = low * (total >> 32), high * (total & _LOW)
    middle = _multiply_high(low, total & _LOW) + (b & _LOW) + (c & _LOW)
    return high * (total >> 32) + ((b >> 32) & _LOW) + ((c >> 32) & _LOW) + (middle >> 32)


def _greedy_fake(logits):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


def _filter_logits_fake(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, row_parameters=None):
    return logits.new_empty(logits.shape)


def _sample_fake(logits, *args, **kwargs):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64), logits.new_empty(logits.shape[:-1], dtype=torch.bool)


register("greedy", reference=greedy_reference, fake=_greedy_fake)
register("filter_logits", reference=filter_logits_reference, fake=_filter_logits_fake)
register("sample", reference=sample_reference, fake=_sample_fake)
torch.library.register_fake("torch_fused::_next_token", lambda logits, *args, **kwargs: _greedy_fake(logits))
torch.library.register_fake("torch_fused::_check_sampling_parameter", lambda op, name, value: None)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row. Among equal logits, the lowest index is chosen.

    Args:
        logits: ``(batch, vocabulary)`` or ``(vocabulary,)``, at most 2^20 tokens; float32, float16 or bfloat16, or
            float64 on the CPU; compared as float32. NaN is never chosen.

    Returns:
        int64 of shape ``(batch,)`` or ``()``; 0 for a row with only NaN and -inf.

    Raises:
        RuntimeError: logits has the wrong shape or dtype.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.sampling.greedy(torch.tensor([[0.0, 2.0, 2.0]]))
        tensor([1])
    """
    return _greedy(logits)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws a token from each row, filtered like Hugging Face: temperature, then top-k, top-p and min-p.

    The same seed and offset give the same tokens on every device, because probabilities are integers; the most likely
    token has 2^40. +inf is always drawn, NaN and -inf never.

    top_p and min_p allow for the rounding of logits. With probabilities 0.5, 0.3, 0.1 and 0.1, a top_p of 0.8 keeps two
    tokens, as it would in decimal arithmetic. The assumed error of a weight is 2^-24 for each octave (factor of two) of
    its logit and of its distance to the largest logit, plus 2^-24; it is twice that for two weights, or for the parts
    that top_p keeps and drops. In addition, top_p drops a token only if less than a thousandth of it is missing.

    Args:
        logits: ``(batch, vocabulary)`` or ``(vocabulary,)``, at most 2^20 tokens; float32, float16 or bfloat16, or
            float64 on the CPU; converted to float32.
        temperature: divides the logits; 0 keeps only the first of the most likely tokens.
        top_k: keeps this many of the most likely tokens, and ties with the last one. None keeps all.
        top_p: keeps the smallest set of most likely tokens with probabilities that sum to at least this, and at least
            one token; of equal ones, the lowest index first. None or 1.0 keeps all. A float is used exactly; a tensor
            stands for any number that float32 rounds to it.
        min_p: drops tokens with a probability below this times that of the most likely token.
        generator: on the CPU or on logits' device; a seed is drawn from it. None is torch's default CPU generator.
        seed: instead of a generator, an int or an int64 tensor with one element on logits' device.
        offset: like ``seed``; each offset gives another draw. Rows of a batch are drawn independently.
        return_valid: also return which rows had a token to draw.

        Each of temperature, top_k, top_p and min_p may be a tensor, ``()`` or ``(batch,)``; in a tensor, a top_k of 0
        keeps all.

    Returns:
        int64 ids of shape ``(batch,)`` or ``()``; 0 for a row with nothing to draw. With ``return_valid``, a pair of
        ids and a bool tensor.

    Raises:
        RuntimeError: an argument is out of range or, on the CPU and without ``return_valid``, a row has only NaN and
            -inf; the message names it, and no generator has advanced. To not wait for a GPU, parameter tensors on it
            are clamped to their range instead, and NaN becomes 0.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11), for the random numbers;
    transformers/generation/logits_process.py for the filters.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.sampling.sample(torch.tensor([0.0, 100.0, 0.0]), top_k=2, seed=1)
        tensor(1)
    """
    scalars, row_parameters = _split_parameters("sample", logits, temperature, top_k, top_p, min_p)
    state = None
    if isinstance(seed, Tensor) or isinstance(offset, Tensor):
        if seed is None:
            raise RuntimeError("sample: offset as a tensor needs a seed, got seed=None")
        state = torch.cat([_one_integer(logits, name, value) for name, value in (("seed", seed), ("offset", offset))])
        seed = offset = None
    ids, valid = _sample(logits, *scalars, row_parameters, generator, seed, offset, state, return_valid)
    return (ids, valid) if return_valid else ids


def filter_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> Tensor:
    """The logits that :func:`sample` may draw, divided by the temperature; all others become -inf.

    Replaces Hugging Face's logits processors: the softmax of the result gives the probabilities of :func:`sample`.

    Args:
        logits: ``(batch, vocabulary)`` or ``(vocabulary,)``, at most 2^20 tokens; float32, float16 or bfloat16, or
            float64 on the CPU; compared as float32.
        temperature, top_k, top_p, min_p: as in :func:`sample`. With temperature 0, the one kept logit is not divided.

    Returns:
        A dense tensor with ``logits``' shape and dtype.

    Raises:
        RuntimeError: an argument is out of range; the message names it. Parameter tensors on a GPU are clamped as in
            :func:`sample`.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.sampling.filter_logits(torch.tensor([1.0, 3.0, 2.0]), temperature=0.5, top_k=2)
        tensor([-inf, 6., 4.])
    """
    scalars, row_parameters = _split_parameters("filter_logits", logits, temperature, top_k, top_p, min_p)
    return _filter_logits(logits, *scalars, row_parameters)


def next_token(
    logits: Tensor,
    do_sample: bool,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The next token of each sequence of a generation: :func:`sample`, or :func:`greedy` unless ``do_sample``.

    On the CPU, NaN and +inf are treated as in torch's softmax, multinomial and argmax. On a GPU, where checking for
    them would wait for the device, NaN is never chosen and +inf is always drawn.

    Args:
        logits: ``(batch, vocabulary)``, as for :func:`sample`.
        do_sample: draw with torch's default CPU generator; otherwise take the most likely token or, on the CPU, the
            first NaN if there is one.
        temperature, top_k, top_p, min_p: as in :func:`sample`; used only with ``do_sample``.

    Returns:
        int64 ids ``(batch,)``.

    Raises:
        RuntimeError: as in :func:`sample`; or, on the CPU, a row to draw from has NaN or +inf; the message names it.
    """
    return _next_token(logits, do_sample, temperature, top_k, top_p, min_p)


def _split_parameters(op: str, logits: Tensor, temperature, top_k, top_p, min_p):
    """The four parameters as scalars or, if one is a tensor, packed for the kernels: four floats per row."""
    named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if not any(isinstance(value, Tensor) for value in named.values()):
        return (temperature, top_k, top_p, min_p), None
    rows = logits.shape[0] if logits.dim() == 2 else 1
    columns = []
    for (name, value), nothing in zip(named.items(), (1.0, 0.0, 1.0, 0.0), strict=True):
        if isinstance(value, Tensor):
            if value.shape not in ((), (rows,)) or value.is_complex():
                takes = f"a scalar or of shape ({rows},)"
                raise RuntimeError(f"{op}: {name} must be {takes}, got {tuple(value.shape)} of {value.dtype}")
            if value.is_cpu:  # reading it elsewhere would wait for the device
                _check_parameter(op, name, value)
            columns.append(value.to(device=logits.device, dtype=torch.float32).expand(rows))
        else:
            columns.append(torch.full((rows,), nothing if value is None else value, device=logits.device))
    scalars = [None if isinstance(value, Tensor) else value for value in named.values()]
    return (1.0 if scalars[0] is None else scalars[0], *scalars[1:]), torch.stack(columns, -1)


def _one_integer(logits: Tensor, name: str, value: int | Tensor | None) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((1,), value or 0, dtype=torch.int64, device=logits.device)
    if value.dtype != torch.int64 or value.numel() != 1:
        raise RuntimeError(f"sample: {name} must be one int64, got {value.dtype} of shape {tuple(value.shape)}")
    return value.reshape(1)


_greedy = torch.ops.torch_fused.greedy.default
_filter_logits = torch.ops.torch_fused.filter_logits.default
_sample = torch.ops.torch_fused.sample.default
_next_token = torch.ops.torch_fused._next_token.default
_check_parameter = torch.ops.torch_fused._check_sampling_parameter.default
