"""A step of a decoder with random weights, for the tests of `decode_`."""

from dataclasses import dataclass, field

import torch

from torch_fused.ops.decode import decode_, decode_reference, decode_token_
from torch_fused.ops.decoder import LAYER_PARTS, Adapter, DecoderParts, Numbers, Packed, decoder_arguments, make_decoder
from torch_fused.ops.quantized import dequantize_reference, quantize
from torch_fused.testing import HALF_ULP, make, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `qwen2` has biases on q, k and v, `qwen3` norms of queries and keys, `biased` all biases.

    `qwen3_moe` has experts instead of feed-forward layers, `qwen2_moe` in addition to them.
    `olmo2` norms all heads as one, and what is added; `gemma` has norms before and after, and `TRAITS` more numbers.
    """

    family: str = "llama"
    layers: int = 2
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    intermediate: int = 80
    vocabulary: int = 97
    experts: int = 0
    expert_intermediate: int = 24

    def parts(self) -> dict[str, tuple[int, ...] | None]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biased, normed = self.family in ("qwen2", "biased"), self.family in ("qwen3", "gemma")
        before = (self.hidden,) if self.family != "olmo2" else None
        after = (self.hidden,) if self.family in ("olmo2", "gemma") else None
        if self.family == "olmo2":
            head_norms = {"q_norm": (queries,), "k_norm": (keys,)}
        else:
            head_norms = dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,) if normed else None)
        moe = self.family in ("qwen2_moe", "qwen3_moe")
        experts = (self.experts, self.expert_intermediate, self.hidden) if moe else None
        dense = self.family != "qwen3_moe"
        return {
            "input_norm": before,
            "q": (queries, self.hidden),
            "q_bias": (queries,) if biased else None,
            "k": (keys, self.hidden),
            "k_bias": (keys,) if biased else None,
            "v": (keys, self.hidden),
            "v_bias": (keys,) if biased else None,
            **head_norms,
            "o": (self.hidden, queries),
            "o_bias": (self.hidden,) if self.family == "biased" else None,
            "attention_output_norm": after,
            "post_attention_norm": before,
            "gate": (self.intermediate, self.hidden) if dense else None,
            "up": (self.intermediate, self.hidden) if dense else None,
            "down": (self.hidden, self.intermediate) if dense else None,
            "feed_forward_output_norm": after,
            "router": (self.experts, self.hidden) if moe else None,
            "experts_gate": experts,
            "experts_up": experts,
            "experts_down": (self.experts, self.hidden, self.expert_intermediate) if moe else None,
            "shared_gate": (1, self.hidden) if self.family == "qwen2_moe" else None,
        }


TRAITS = {
    "gemma": {
        "norm_offset": 1.0,
        "embedding_scale": 7.0,
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "activation": "gelu_tanh",
    },
    "granite": {"embedding_scale": 12.0, "residual_scale": 0.22, "logits_scale": 0.125},
    "gelu": {"activation": "gelu"},
    "qwen2_moe": {"experts_per_token": 3},
    "qwen3_moe": {"experts_per_token": 4, "normalise_experts": True},
}
"""The numbers of a family that others do not have."""


@dataclass
class Step:
    """The arguments of one call: random weights, and a cache that holds `length` random tokens."""

    shape: Shape = Shape()
    batch: int = 1
    steps: int = 1
    length: int = 20
    dtype: torch.dtype = torch.float32
    starts: list[int] | None = None
    logits_to_keep: int = 0
    windows: list[int] | None = None
    device: str = "cpu"
    args: dict = field(default_factory=dict)

    def __post_init__(self):
        shape, capacity = self.shape, self.length + self.steps + 5
        self.seed = 0
        layers = []
        for _ in range(shape.layers):
            for name, size in shape.parts().items():
                layers.append(None if size is None else self.weight(*size, around=float(name.endswith("norm"))))
        angles = torch.arange(capacity)[:, None] * torch.logspace(0, -2, max(1, shape.rotary_dim // 2))
        angles = torch.cat([angles, angles], -1)[:, : shape.rotary_dim]
        embedding = self.weight(shape.vocabulary, shape.hidden) * shape.hidden**0.5
        starts = None if self.starts is None else torch.tensor(self.starts)
        positions = torch.arange(self.length, self.length + self.steps).expand(self.batch, -1)
        states = (self.batch, shape.kv_heads, capacity, shape.head_dim)
        self.args = {
            "token_ids": torch.randint(
                shape.vocabulary, (self.batch, self.steps), generator=torch.Generator().manual_seed(1)
            ),
            "positions": (positions if starts is None else positions - starts[:, None]).contiguous(),
            "starts": starts,
            "cos": angles.cos().to(self.dtype),
            "sin": angles.sin().to(self.dtype),
            "keys": [make(*states, dtype=self.dtype, seed=100 + i) for i in range(shape.layers)],
            "values": [make(*states, dtype=self.dtype, seed=200 + i) for i in range(shape.layers)],
            "length": self.length,
            "logits_to_keep": self.logits_to_keep,
            **self.args,
        }
        self.model = {
            "embedding": embedding,
            "layers": layers,
            "norm": self.weight(shape.hidden, around=1.0),
            "head": self.weight(shape.vocabulary, shape.hidden),
            "heads": shape.heads,
            **Numbers(eps=1e-6, scaling=shape.head_dim**-0.5)._asdict(),
            "activation": "silu",
            "windows": self.windows or [0] * shape.layers,
            "tables": [0] * shape.layers,
            "int8_products": False,
            "adapters": [],
            **TRAITS.get(shape.family, {}),
        }

    def weight(self, *size: int, around: float = 0.0) -> torch.Tensor:
        self.seed += 1
        return (around + make(*size, seed=self.seed) * size[-1] ** -0.5).to(self.dtype)

    def run(self, **changes) -> torch.Tensor:
        """The logits on the CPU; the caches in `args` are written on the step's device."""
        model = on_device(self.device, {name: changes.pop(name, value) for name, value in self.model.items()})
        args = on_device(self.device, {**self.args, **changes})
        logits = decode_(make_decoder(**model), **args)
        if self.device != "cpu":
            for name in ("keys", "values"):
                for mine, written in zip(self.args[name], args[name], strict=True):
                    mine.copy_(written)
        return logits.cpu()

    def exact(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits in float64, and the caches written by the reference."""
        args = {name: _double(value) for name, value in self.args.items()}
        model = WideDecoder(*decoder_arguments(**{name: _double(value) for name, value in self.model.items()}))
        return decode_reference(model, *args.values()), [*args["keys"], *args["values"]]

    def check(self, **changes) -> None:
        """Compares logits and caches with float64; unused slots must stay as they are."""
        exact, caches = self.exact()
        logits = self.run(**changes)
        assert logits.dtype == torch.float32
        assert logits.shape == exact.shape
        # Everything is float32 except the new keys and values, which are rounded to the cache's dtype.
        assert relative_error(logits, exact) < 1e-5 + (0 if self.dtype == torch.float32 else HALF_ULP[self.dtype])
        for cache, expected in zip([*self.args["keys"], *self.args["values"]], caches, strict=True):
            new = slice(self.length, self.length + self.steps)
            error = relative_error(cache[:, :, new], expected[:, :, new])
            assert error < 1e-5 + (0 if self.dtype == torch.float32 else 2 * HALF_ULP[self.dtype])
            cache[:, :, new] = expected[:, :, new] = 0
            assert torch.equal(cache.double(), expected)


class PackedDense(Packed):
    """A packed matrix with its exact values in float64."""

    dense: torch.Tensor


def packed(weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, dense: torch.Tensor) -> PackedDense:
    matrix = PackedDense(weight, scales, biases)
    matrix.dense = dense
    return matrix


def pack(matrix: torch.Tensor, bits: int, group_size: int) -> PackedDense:
    size = {"bits": bits, "group_size": group_size}
    parts = quantize(matrix, **size)
    return packed(*parts, dequantize_reference(*parts, **size, dtype=torch.float64))


class WideDecoder(DecoderParts):
    """A model in float64, which the op does not support."""


def on_device(device, value):
    if isinstance(value, Packed):
        return packed(*(part.to(device) for part in value), value.dense)
    if isinstance(value, Adapter):
        return value._replace(a=value.a.to(device), b=value.b.to(device))
    if isinstance(value, list):
        return [on_device(device, item) for item in value]
    if isinstance(value, dict):
        return {name: on_device(device, item) for name, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _double(value):
    if isinstance(value, Packed):
        return value.dense.double()
    if isinstance(value, Adapter):
        return value._replace(a=value.a.double(), b=value.b.double())
    if isinstance(value, list):
        return [_double(item) for item in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def adapters(step: Step, rank: int, names=("q", "k", "v", "o", "gate", "up", "down"), dtype=None) -> list[Adapter]:
    """One adapter per matrix in `names`."""
    shapes = step.shape.parts()
    made = []
    for place, name in enumerate(LAYER_PARTS * step.shape.layers):
        if name in names:
            rows, cols = shapes[name]
            a, b = make(rank, cols, seed=300 + place), make(rows, rank, seed=400 + place)
            made.append(Adapter(place, *(t.to(dtype or step.dtype) * t.shape[1] ** -0.5 for t in (a, b)), 0.7))
    return made


def token(step: Step, **changes) -> torch.Tensor:
    model = make_decoder(**{name: changes.pop(name, value) for name, value in step.model.items()})
    args = {name: value for name, value in {**step.args, **changes}.items() if name != "logits_to_keep"}
    return decode_token_(model, **args)
