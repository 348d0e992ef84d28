"""A valid call of every op in `torch.ops.torch_fused`, with any sizes and values, and the expected result.

`CALLS` is where an op's test begins: test_layouts.py, test_arguments.py and test_fuzz.py run every op that is in it,
and test_layouts.py fails for an op that is not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_fused.ops.decode import decode_reference
from torch_fused.ops.decoder import LAYER_PARTS, DecoderParts, decoder_arguments, make_decoder
from torch_fused.ops.kv_cache import kv_append_reference
from torch_fused.testing import HALF_ULP, make

Arguments = dict[str, Any]


class Maker:
    """Makes the arguments of a call: always the same ones here; the fuzz test draws them."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype, self.device, self.seed = dtype, device, 0

    def size(self, default: int, most: int | None = None) -> int:
        """An extent, from 0 to `most`."""
        return default

    def leading(self) -> list[int]:
        """The dimensions before a row."""
        return [2, 3]

    def pick(self, *options: Any) -> Any:
        return options[0]

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, positive: bool = False
    ) -> Tensor:
        self.seed += 1
        values = make(*shape, dtype=torch.float64, seed=self.seed, scale=scale)
        return (values.abs() if positive else values).to(dtype or self.dtype).to(self.device)

    def integers(self, *shape: int, end: int, device: str | None = None) -> Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(end, shape, generator=generator).to(device or self.device)


# The arguments of make_decoder, which are part of the calls of a decoder.
MODEL = {
    "embedding": "Tensor",
    "layers": "Tensor?[]",
    "norm": "Tensor",
    "head": "Tensor",
    "heads": "int",
    "eps": "float",
    "scaling": "float",
    "norm_offset": "float",
    "embedding_scale": "float",
    "residual_scale": "float",
    "logits_scale": "float",
    "attention_softcap": "float",
    "logits_softcap": "float",
    "activation": "str",
    "windows": "List[int]",
    "tables": "List[int]",
}


@dataclass(frozen=True)
class Call:
    """One op. `arguments` makes valid arguments; `exact` is the op in plain torch, from the same arguments."""

    op: str
    arguments: Callable[[Maker], Arguments]
    exact: Callable[..., Any] | None = None
    in_float64: bool = True  # whether the plain form is exact only in float64, or in any dtype
    cancels: Callable[..., Tensor | float] = lambda **_: 0.0  # the largest terms that cancel in the results
    loose: float = 0.0  # a relative error, for results of whole networks
    only_dense: frozenset[str] = frozenset()  # arguments that may not support all layouts
    model: Callable[..., Any] | None = None  # makes the op's first argument from those of `MODEL`
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    differentiable: tuple[str, ...] = ()  # arguments that have a gradient
    says: tuple[str, ...] = ()  # other names at the start of its errors

    def refuses(self, error: Exception, name: str) -> bool:
        """Whether the error names the op and the argument."""
        named = name in str(error) or (name == "layers" and " of layer " in str(error))
        return str(error).startswith((self.op, *self.says)) and named

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.torch_fused, self.op).default

    @property
    def written(self) -> set[str]:
        """The names of the arguments that the op writes."""
        arguments = self.overload._schema.arguments
        return {argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write}

    @property
    def parameters(self) -> dict[str, str]:
        """The type of each argument in the schema, by name."""
        found = {argument.name: str(argument.type) for argument in self.overload._schema.arguments}
        if self.model:
            del found["model"]
            found |= MODEL
        return found

    def __call__(self, **arguments: Any) -> Any:
        return self.overload(**self._with_model(self.model, arguments))

    def _with_model(self, make_model: Callable[..., Any] | None, arguments: Arguments) -> Arguments:
        if make_model is None:
            return arguments
        rest = {name: value for name, value in arguments.items() if name not in MODEL}
        return {"model": make_model(**{name: arguments[name] for name in MODEL}), **rest}

    def made(self, backend: Any, dtype: torch.dtype = torch.float32) -> Arguments:
        """Valid arguments for a backend."""
        return self.arguments(Maker(dtype, backend.device))

    def run(self, arguments: Arguments) -> list[Tensor]:
        """The op's results, followed by the arguments that it has written."""
        return self._outcome(arguments, self(**arguments))

    def plain(self, arguments: Arguments, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same from plain torch, on copies of the tensors, floating ones in `dtype`."""

        def copied(value: Tensor) -> Tensor:
            return value.detach().cpu().clone().to(dtype if dtype and value.is_floating_point() else value.dtype)

        copies = map_tensors(copied, arguments)
        exact = self.exact or getattr(torch.ops.torch_fused_reference, self.op)
        parts = self._with_model(self.model and model_of_parts, copies)
        return self._outcome(copies, exact(**parts))

    def _outcome(self, arguments: Arguments, results: Any) -> list[Tensor]:
        results = [] if results is None else [results] if isinstance(results, Tensor) else list(results)
        return results + [tensor for name in sorted(self.written) for tensor in as_list(arguments[name])]

    def check(self, arguments: Arguments) -> None:
        """Runs the op, and checks every element of its results and written arguments, up to rounding."""
        given = {
            name: map_tensors(torch.clone, {name: value})[name] if name in self.written else value
            for name, value in arguments.items()
        }
        results = self.run(arguments)
        narrow = self.plain(given)
        exact = self.plain(given, torch.float64) if self.in_float64 else narrow
        cancels = self.cancels(**map_tensors(lambda t: t.detach().cpu().double(), given))
        for i, (actual, e, n) in enumerate(zip(results, exact, narrow, strict=True)):
            self.compare(f"{self.op}, result {i}", actual.detach().cpu(), e, n, cancels)

    def compare(self, what: str, actual: Tensor, exact: Tensor, narrow: Tensor, cancels: Tensor | float) -> None:
        assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
        if not actual.dtype.is_floating_point and torch.equal(actual, narrow):
            return
        if not self.in_float64 or not actual.dtype.is_floating_point:
            torch.testing.assert_close(actual, exact, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
            return
        if self.loose and actual.dtype.is_floating_point:
            size = torch.as_tensor(cancels).double()
            errors = [float((actual.double() - e).norm() / e.double().norm().maximum(size)) for e in (exact, narrow)]
            right = torch.equal(actual, narrow) or min(errors) <= self.loose
            assert exact.isnan().any() or narrow.isnan().any() or right, f"{what}: off by {min(errors):.3g}"
            return
        right = _near(actual, exact, cancels) | _near(actual, narrow, cancels)
        if self.op.endswith(("_backward", "_linear")):  # infinities may sum to NaN or infinity, depending on the order
            overflows = torch.as_tensor(cancels) > torch.finfo(torch.float32).max
            right |= ~actual.isfinite() & (~exact.to(actual.dtype).isfinite() | overflows)
        assert bool(right.all()), (
            f"{what}: {int((~right).sum())} of {right.numel()} elements are off; the first, at "
            f"{(~right).nonzero()[0].tolist()}: {actual[~right][0]:.9g}, exact {exact[~right][0]:.9g}, "
            f"in torch {narrow[~right][0]:.9g}"
        )


def model_of_parts(**parts: Any) -> DecoderParts:
    return DecoderParts(*decoder_arguments(**parts))


def _near(actual: Tensor, exact: Tensor, cancels: Tensor | float) -> Tensor:
    """Where `actual` is `exact` to three roundings of its dtype and to float32's relative to the largest of the row."""
    dtype, actual, exact = actual.dtype, actual.double(), exact.double()
    if exact.numel() == 0:
        return torch.ones_like(exact, dtype=torch.bool)
    exact = torch.where(exact.abs() > torch.finfo(dtype).max, exact.to(dtype).double(), exact)
    finite = torch.where(exact.isfinite(), exact, 0.0).abs()
    largest = (finite.amax(-1, keepdim=True) if finite.dim() else finite).maximum(torch.as_tensor(cancels).double())
    arithmetic = HALF_ULP[torch.float64 if dtype == torch.float64 else torch.float32]
    allowed = 3 * HALF_ULP[dtype] * finite + 64 * arithmetic * largest + 2 * smallest(dtype)
    return (actual == exact) | (actual.isnan() & exact.isnan()) | ((actual - exact).abs() <= allowed)


def smallest(dtype: torch.dtype) -> float:
    """The smallest denormal number above 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def map_tensors(function: Callable[[Tensor], Any], arguments: Arguments) -> Arguments:
    """The arguments, with `function` applied to every tensor, also in lists."""

    def mapped(value: Any) -> Any:
        if isinstance(value, list):
            return [mapped(item) for item in value]
        return function(value) if isinstance(value, Tensor) else value

    return {name: mapped(value) for name, value in arguments.items()}


def tensors_of(arguments: Arguments) -> Iterator[tuple[str, int | None, Tensor]]:
    """(argument, place in its list or None, tensor) of every tensor."""
    for name, value in arguments.items():
        for i, item in enumerate(as_list(value)):
            if isinstance(item, Tensor):
                yield name, i if isinstance(value, list) else None, item


def replaced(arguments: Arguments, name: str, place: int | None, value: Any) -> Arguments:
    if place is None:
        return arguments | {name: value}
    return arguments | {name: [value if i == place else item for i, item in enumerate(arguments[name])]}


# ---- the ops --------------------------------------------------------------------------------------------------------


def rms_norm(m: Maker) -> Arguments:
    shape = [m.size(5, 4), m.size(8)] if m.pick(False, True) else [m.size(9)]
    return {
        "input": m.tensor(*m.leading(), *shape),
        "normalized_shape": shape,
        "weight": m.tensor(*shape) if m.pick(True, False) else None,
        "eps": m.pick(1e-5, None, 1e-2),
        "casting_mode": m.pick("torch", "llama"),
        "weight_offset": m.pick(0.0, 1.0),
    }


def add_rms_norm(m: Maker) -> Arguments:
    arguments = rms_norm(m)
    del arguments["normalized_shape"]
    shape = arguments["input"].shape
    weight = arguments["weight"]
    return arguments | {
        "residual": m.tensor(*shape),
        "weight": m.tensor(shape[-1]) if weight is None else weight,
        "eps": arguments["eps"] or 1e-6,
    }


def rms_norm_backward(m: Maker) -> Arguments:
    arguments = rms_norm(m)
    x = arguments.pop("input")
    return arguments | {
        "grad": m.tensor(*x.shape),
        "grad_sum": m.tensor(*x.shape) if m.pick(True, False) else None,
        "x": x,
        "need_weight_grad": m.pick(True, False),
    }


def layer_norm(m: Maker) -> Arguments:
    shape = [m.size(5, 4), m.size(8)] if m.pick(False, True) else [m.size(9)]
    return {
        "input": m.tensor(*m.leading(), *shape),
        "normalized_shape": shape,
        "weight": m.tensor(*shape) if m.pick(True, False) else None,
        "bias": m.tensor(*shape) if m.pick(True, False) else None,
        "eps": m.pick(1e-5, 1e-2),
    }


def layer_norm_backward(m: Maker) -> Arguments:
    arguments = layer_norm(m)
    x = arguments.pop("input")
    del arguments["bias"]
    return arguments | {
        "grad": m.tensor(*x.shape),
        "x": x,
        "need_weight_grad": m.pick(True, False),
        "need_bias_grad": m.pick(True, False),
    }


def norm_cancels(
    grad: Tensor | None = None,
    x: Tensor | None = None,
    input: Tensor | None = None,
    weight: Tensor | None = None,
    weight_offset: float = 0.0,
    normalized_shape: Sequence[int] = (),
    eps: float | None = None,
    centred: bool = False,
    **_: Any,
) -> float:
    """The largest term of a norm or its gradient: near values, or 1 / eps, make it larger than the result."""
    x = input if x is None else x
    if x is None or x.numel() == 0:
        return 0.0
    finite = lambda t: torch.where(t.isfinite(), t, 0.0)  # noqa: E731
    rows = finite(x).reshape(-1, math.prod(normalized_shape) or 1)
    scale = (rows.var(-1, correction=0) + (eps or 1e-7)).rsqrt().nan_to_num()
    largest = float((rows.abs().amax(-1) * scale).amax())
    factor = 1.0 if weight is None else float(finite(weight + weight_offset).abs().amax())
    if grad is None:
        return largest * factor if centred else 0.0
    g = finite(grad).abs().reshape(rows.shape).amax(-1)
    return float((scale * g).amax() * max(factor, 1.0) * max(largest, 1.0) + g.sum() * max(1.0, largest))


def layer_norm_cancels(**arguments: Any) -> float:
    return norm_cancels(centred=True, **arguments)


def softmax(m: Maker) -> Arguments:
    return {"input": m.tensor(*m.leading(), m.size(9)), "dtype": m.pick(None, torch.float32)}


def softmax_backward(m: Maker) -> Arguments:
    shape = [*m.leading(), m.size(9)]
    return {"grad": m.tensor(*shape), "output": m.tensor(*shape, positive=True)}


def softmax_cancels(grad: Tensor, output: Tensor) -> float:
    if grad.numel() == 0:
        return 0.0
    finite = [torch.where(t.isfinite(), t, 0.0).abs() for t in (grad, output)]
    terms = (finite[0] * finite[1]).sum(-1) if grad.dim() else finite[0] * finite[1]
    return float(finite[1].amax() * (finite[0].amax() + terms.amax()))


def silu_mul(m: Maker) -> Arguments:
    shape = [*m.leading(), m.size(9)]
    return {"gate": m.tensor(*shape), "up": m.tensor(*shape), "casting_mode": m.pick("torch", "llama")}


def gelu_mul(m: Maker) -> Arguments:
    return {**silu_mul(m), "approximate": m.pick("none", "tanh")}


def gelu_mul_backward(m: Maker) -> Arguments:
    return {**silu_mul_backward(m), "approximate": m.pick("none", "tanh")}


def gelu_cancels(gate: Tensor, up: Tensor, grad: Tensor | None = None, **_: Any) -> float:
    """Far below zero gelu is close to 0, and its slope is a difference."""
    if gate.numel() == 0:
        return 0.0
    largest = [float(torch.where(t.isfinite(), t, 0.0).abs().amax()) for t in (gate, up)]
    if grad is None:
        return largest[0] * largest[1]
    return float(torch.where(grad.isfinite(), grad, 0.0).abs().amax()) * sum(largest)


def silu_mul_backward(m: Maker) -> Arguments:
    shape = [*m.leading(), m.size(9)]
    return {name: m.tensor(*shape) for name in ("grad", "gate", "up")}


def rotary(m: Maker) -> Arguments:
    batch, tokens, half, passed = m.size(2, 4), m.size(3, 9), m.size(4, 70), m.pick(2, 0, 1, 17)
    unsqueeze_dim = m.pick(1, 2)

    def heads(count: int) -> Tensor:
        return m.tensor(batch, *((count, tokens) if unsqueeze_dim == 1 else (tokens, count)), 2 * half + passed)

    q, k = heads(m.size(3, 5)), heads(m.size(2, 5))
    tables = [m.tensor(m.pick(batch, 1), m.pick(tokens, 1), 2 * half) for _ in range(2)]
    return {"q": q, "k": k, "cos": tables[0], "sin": tables[1], "unsqueeze_dim": unsqueeze_dim}


def apply_rotary_pos_emb(m: Maker) -> Arguments:
    return rotary(m) | {"casting_mode": m.pick("torch", "llama")}


def apply_rotary_pos_emb_backward(m: Maker) -> Arguments:
    arguments = rotary(m)
    return arguments | {"grad_q": arguments.pop("q"), "grad_k": arguments.pop("k")}


def rotary_cancels(cos: Tensor, sin: Tensor, **x: Any) -> float:
    heads = [torch.where(t.isfinite(), t, 0.0) for name, t in x.items() if name[-1] in "qk"]
    tables = [torch.where(t.isfinite(), t, 0.0) for t in (cos, sin)]
    largest = [max(float(t.abs().amax()) if t.numel() else 0.0 for t in tensors) for tensors in (heads, tables)]
    return largest[0] * largest[1]


def adamw_(m: Maker) -> Arguments:
    shapes = [[*m.leading(), m.size(5)] for _ in range(m.pick(2, 1, 8))]
    state = m.pick(m.dtype, torch.float32) if m.dtype != torch.float64 else m.dtype
    amsgrad, capturable, clipped = m.pick(True, False), m.pick(True, False), m.pick(True, False)

    def number(value: float, given: bool) -> Tensor | None:
        return torch.full((), value, device=m.device) if given else None

    return {
        "params": [m.tensor(*shape) for shape in shapes],
        "grads": [m.tensor(*shape) for shape in shapes],
        "exp_avgs": [m.tensor(*shape, dtype=state) for shape in shapes],
        "exp_avg_sqs": [m.tensor(*shape, dtype=state, positive=True) for shape in shapes],
        "steps": [torch.full((), float(m.pick(0, 7, 1000)), device=m.device if capturable else "cpu") for _ in shapes],
        "max_exp_avg_sqs": [m.tensor(*shape, dtype=state, positive=True) for shape in shapes] if amsgrad else [],
        "lr": m.pick(0.02, 0.0),
        "beta1": m.pick(0.9, 0.0),
        "beta2": m.pick(0.95, 0.0),
        "eps": m.pick(1e-6, 1e-8),
        "weight_decay": m.pick(0.1, 0.0),
        "maximize": m.pick(False, True),
        "capturable": capturable,
        "lr_tensor": number(0.03, m.pick(True, False)),
        "beta1_tensor": number(0.75, m.pick(True, False)),
        "beta2_tensor": number(0.875, m.pick(True, False)),
        "grad_scale": number(4.0, m.pick(True, False)),
        "found_inf": number(m.pick(0.0, 1.0), capturable and m.pick(True, False)),
        "grad_squares": number(m.pick(200.0, 2.0), clipped),
        "max_grad_norm": m.pick(1.5, 0.0) if clipped else None,
    }


def sum_of_squares(m: Maker) -> Arguments:
    return {"tensors": [m.tensor(*m.leading(), m.size(5)) for _ in range(m.pick(2, 1, 30))]}


def kv_append_(m: Maker) -> Arguments:
    batch, heads, tokens, position = m.size(2, 3), m.size(3, 4), m.size(2, 9), m.size(1, 9)
    key_dim, value_dim = m.size(4, 70), m.size(5, 70)
    dtype = m.pick(m.dtype, torch.int8, torch.float64)
    capacity = position + tokens + m.pick(1, 0, 20)
    return {
        "keys": m.tensor(batch, heads, capacity, key_dim, dtype=dtype, scale=9),
        "values": m.tensor(batch, heads, capacity, value_dim, dtype=dtype, scale=9),
        "new_keys": m.tensor(batch, heads, tokens, key_dim, dtype=dtype, scale=9),
        "new_values": m.tensor(batch, heads, tokens, value_dim, dtype=dtype, scale=9),
        "position": position,
    }


def kv_update_exact(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, position: int):
    kv_append_reference(keys, values, new_keys, new_values, position)
    length = position + new_keys.shape[2]
    return keys[:, :, :length], values[:, :, :length]


def decode_(m: Maker) -> Arguments:
    def at_least_1(default: int, most: int) -> int:
        return max(1, m.size(default, most))

    batch, steps, length = at_least_1(2, 8), at_least_1(2, 8), m.size(9, 80)
    kv_heads, groups, half, passed = m.pick(1, 2, 3), m.pick(2, 1, 3), m.size(4, 20), m.pick(1, 0, 2)
    hidden, heads, head_dim = at_least_1(9, 40), kv_heads * groups, max(1, 2 * half + passed)
    intermediate, vocabulary = m.size(7, 40), at_least_1(11, 40)
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "o": hidden}
    rows |= {"gate": intermediate, "up": intermediate, "down": hidden}
    cols = {"o": rows["q"], "down": intermediate}
    biases, layers = m.pick(True, False), m.pick(1, 2)
    head_norms, norms_before, norms_after = m.pick("each", "", "all"), m.pick(True, False), m.pick(True, False)

    def part(name: str) -> Tensor | None:
        if name in ("q_norm", "k_norm"):
            return m.tensor(head_dim if head_norms == "each" else rows[name[0]]) if head_norms else None
        if name.endswith("norm"):
            return m.tensor(hidden) if (norms_after if "output" in name else norms_before) else None
        if name not in rows and not name.endswith("bias"):
            return None  # experts: any of equal logits may be chosen
        if name.endswith("bias"):
            return m.tensor(rows[name[0]]) if biases else None
        return m.tensor(rows[name], cols.get(name, hidden), scale=0.3)

    states = (batch, kv_heads, length + steps + m.pick(1, 0), head_dim)
    positions = m.pick(30, 1)
    return {
        "token_ids": m.integers(batch, steps, end=vocabulary),
        "positions": m.integers(batch, steps, end=positions),
        "starts": m.integers(batch, end=length + 1) if m.pick(True, False) else None,
        "embedding": m.tensor(vocabulary, hidden),
        "cos": m.tensor(2, positions, 2 * half),
        "sin": m.tensor(2, positions, 2 * half),
        "layers": [part(name) for _ in range(layers) for name in LAYER_PARTS],
        "norm": m.tensor(hidden),
        "head": m.tensor(vocabulary, hidden),
        "keys": [m.tensor(*states) for _ in range(layers)],
        "values": [m.tensor(*states) for _ in range(layers)],
        "length": length,
        "heads": heads,
        "eps": 1e-5,
        "scaling": head_dim**-0.5,
        "norm_offset": m.pick(1.0, 0.0),
        "embedding_scale": m.pick(1.7, 1.0),
        "residual_scale": m.pick(0.7, 1.0),
        "logits_scale": m.pick(0.6, 1.0),
        "attention_softcap": m.pick(0.0, 3.0),
        "logits_softcap": m.pick(0.0, 2.0),
        "activation": m.pick("silu", "gelu", "gelu_tanh"),
        "windows": [m.pick(0, 3, 1, 100) for _ in range(layers)],
        "tables": [m.pick(1, 0, -1) for _ in range(layers)],
        "logits_to_keep": m.pick(0, 1),
    }


def decode_token_(m: Maker) -> Arguments:
    arguments = decode_(m)
    del arguments["logits_to_keep"]
    sampling = {"do_sample": False, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    return arguments | sampling


def decode_token_exact(do_sample, temperature, top_k, top_p, min_p, **arguments: Any) -> Tensor:
    return decode_reference(**arguments, logits_to_keep=1).argmax(-1).squeeze(1)


def loss_options(m: Maker) -> Arguments:
    return {
        "ignore_index": m.pick(-100, 0, -1),
        "label_smoothing": m.pick(0.1, 0.0, 1.0),
        "z_loss": m.pick(0.01, 0.0, -1.0),
    }


def cross_entropy_(m: Maker) -> Arguments:
    rows, classes = m.size(3, 5), max(1, m.size(9))
    wide = torch.float64 if m.dtype == torch.float64 else torch.float32
    target = m.integers(rows, end=classes)
    target[:1] = -100
    arguments = loss_options(m) | {"logits": m.tensor(rows, classes, scale=3), "target": target}
    arguments["scale"] = m.pick(m.tensor(rows, dtype=wide), m.tensor(dtype=wide), None)
    return arguments | ({"ignore_index": -100} if rows else {})


def cross_entropy_cancels(logits: Tensor, scale: Tensor | None, z_loss: float, **_: Any) -> float:
    """The terms of a loss, and of a gradient."""
    finite = lambda t: torch.where(t.isfinite(), t, 0.0).abs()  # noqa: E731
    if logits.numel() == 0:
        return 0.0
    largest = float(finite(logits).amax()) + math.log(logits.shape[1])
    factor = float(finite(scale).amax()) if scale is not None else 0.0
    return largest + abs(z_loss) * largest**2 + factor * (1 + 2 * abs(z_loss) * largest)


def linear_cross_entropy(m: Maker) -> Arguments:
    leading, features, classes = m.leading(), m.size(8), max(1, m.size(9))
    return loss_options(m) | {
        "hidden": m.tensor(*leading, features),
        "weight": m.tensor(classes, features),
        "target": m.integers(*leading, end=classes),
        "bias": m.tensor(classes) if m.pick(True, False) else None,
        "reduction": m.pick("mean", "sum", "none"),
    }


def greedy(m: Maker) -> Arguments:
    vocabulary = max(1, m.size(9))
    return {"logits": m.tensor(m.size(3, 5), vocabulary, scale=3) if m.pick(True, False) else m.tensor(vocabulary)}


def filter_logits(m: Maker) -> Arguments:
    arguments = greedy(m) | {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "row_parameters": None}
    rows = arguments["logits"].shape[0] if arguments["logits"].dim() == 2 else 1
    if m.pick(True, False):
        columns = [(2.0, 1.44, 100.0), (3.0, 0.0, 1.0), (0.9, 1.0, 0.0), (0.01, 0.0, 1.0)]
        values = [m.pick(*column) for column in columns]
        arguments["row_parameters"] = torch.tensor(values, device=m.device).repeat(rows, 1)
    else:
        arguments |= {"temperature": m.pick(0.7, 0.0, 1.0, 1e30), "top_k": m.pick(4, None, 1)}
        arguments |= {"top_p": m.pick(0.8, None, 0.0, 1.0), "min_p": m.pick(0.1, None, 1.0)}
    return arguments


def sample(m: Maker) -> Arguments:
    random = {"seed": m.pick(7, -(2**63), 2**63 - 1), "offset": m.pick(None, 3, 2**63 - 1), "state": None}
    if m.pick(True, False):
        random = {"seed": None, "offset": None, "state": m.integers(2, end=2**62)}
    return filter_logits(m) | random | {"generator": None, "return_valid": True}


def dequantize(m: Maker) -> Arguments:
    bits, group_size, rows, groups = m.pick(4, 8), m.pick(32, 64, 128), m.leading(), m.size(3, 40)
    scale = m.pick(torch.float32, torch.float16, torch.bfloat16)
    return {
        "weight": m.integers(*rows, groups * group_size * bits // 32, end=2**32).to(torch.uint32),
        "scales": m.tensor(*rows, groups, dtype=scale),
        "biases": m.tensor(*rows, groups, dtype=scale),
        "bits": bits,
        "group_size": group_size,
        "dtype": m.dtype,
    }


def dequantize_cancels(scales: Tensor, biases: Tensor, bits: int, **_: Any) -> float:
    """The bias, which has the opposite sign of the scaled code."""
    finite = lambda t: torch.where(t.isfinite(), t, 0.0).abs()  # noqa: E731
    return float((finite(scales) * 2**bits + finite(biases)).amax()) if scales.numel() else 0.0


def quantized_linear(m: Maker) -> Arguments:
    bits, group_size, groups, rows = m.pick(4, 8), m.pick(32, 64, 128), m.size(3, 20), m.size(5, 200)
    scale = m.pick(torch.float32, torch.float16, torch.bfloat16)
    return {
        "x": m.tensor(*m.leading(), groups * group_size),
        "weight": m.integers(rows, groups * group_size * bits // 32, end=2**32).to(torch.uint32),
        "scales": m.tensor(rows, groups, dtype=scale),
        "biases": m.tensor(rows, groups, dtype=scale),
        "bias": m.tensor(rows) if m.pick(True, False) else None,
        "bits": bits,
        "group_size": group_size,
    }


def quantized_cancels(
    x: Tensor, scales: Tensor, biases: Tensor, bits: int, bias: Tensor | None = None, **_: Any
) -> Tensor | float:
    """The terms of the sums; many vectors are multiplied by weights rounded to x's dtype."""
    if x.numel() == 0 or scales.numel() == 0:
        return 0.0
    finite = lambda t: torch.where(t.isfinite(), t, 0.0).abs()  # noqa: E731
    largest = float((finite(scales) * 2**bits + finite(biases)).amax())
    return finite(x).sum(-1, keepdim=True) * largest + (0.0 if bias is None else float(finite(bias).sum()))


GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECODER = frozenset(
    ("token_ids", "positions", "starts", "embedding", "cos", "sin", "layers", "norm", "head", "keys", "values")
)

CALLS = {
    call.op: call
    for call in (
        Call("rms_norm", rms_norm, cancels=norm_cancels, differentiable=("input", "weight")),
        Call("add_rms_norm", add_rms_norm, cancels=norm_cancels, differentiable=("input", "residual", "weight")),
        Call("rms_norm_backward", rms_norm_backward, cancels=norm_cancels),
        Call("layer_norm", layer_norm, cancels=layer_norm_cancels, differentiable=("input", "weight", "bias")),
        Call("layer_norm_backward", layer_norm_backward, cancels=norm_cancels),
        Call("softmax", softmax, differentiable=("input",)),
        Call("softmax_backward", softmax_backward, cancels=softmax_cancels),
        Call("cross_entropy_", cross_entropy_, cancels=cross_entropy_cancels),
        Call(
            "linear_cross_entropy",
            linear_cross_entropy,
            cancels=lambda **_: 1.0,  # the loss of one class, or far above all others, is a difference
            loose=3e-2,  # the logits are rounded
            differentiable=("hidden", "weight", "bias"),
        ),
        Call("silu_mul", silu_mul, differentiable=("gate", "up")),
        Call("silu_mul_backward", silu_mul_backward),
        Call("gelu_mul", gelu_mul, cancels=gelu_cancels, differentiable=("gate", "up")),
        Call("gelu_mul_backward", gelu_mul_backward, cancels=gelu_cancels),
        Call("apply_rotary_pos_emb", apply_rotary_pos_emb, cancels=rotary_cancels, differentiable=("q", "k")),
        Call("apply_rotary_pos_emb_backward", apply_rotary_pos_emb_backward, cancels=rotary_cancels),
        Call("adamw_", adamw_),
        Call("sum_of_squares", sum_of_squares),
        Call("kv_append_", kv_append_, in_float64=False),
        Call("kv_update_", kv_append_, exact=kv_update_exact, in_float64=False, says=("kv_append_",)),
        Call(
            "decode_",
            decode_,
            exact=decode_reference,
            loose=3e-2,
            model=make_decoder,
            only_dense=DECODER,
            dtypes=GPU_DTYPES,
            says=("Decoder",),
        ),
        Call(
            "decode_token_",
            decode_token_,
            exact=decode_token_exact,
            loose=3e-2,
            model=make_decoder,
            only_dense=DECODER,
            dtypes=(torch.float32,),
            says=("decode_", "Decoder"),
        ),
        Call("dequantize", dequantize, cancels=dequantize_cancels),
        Call("quantized_linear", quantized_linear, cancels=quantized_cancels, differentiable=("x", "bias")),
        Call("greedy", greedy, in_float64=False),
        Call("filter_logits", filter_logits, in_float64=False, only_dense=frozenset({"row_parameters"})),
        Call("sample", sample, in_float64=False, only_dense=frozenset({"row_parameters", "state"})),
    )
}
