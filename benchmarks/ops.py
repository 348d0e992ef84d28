"""The ops next to torch's, transformers' and other libraries'. "llama" makes the roundings of Hugging Face's code."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from cases import LISTS, Case, bandwidth, listed
from models import GROUP_SIZE, config, made
from peers import kernels
from timing import Call
from torch import Tensor
from transformers import DynamicCache, StaticCache, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama import modeling_llama

from torch_fused import functional, optim, sampling
from torch_fused.hf import FusedKVCache
from torch_fused.ops.layer_norm import layer_norm_reference
from torch_fused.ops.rms_norm import add_rms_norm_reference, rms_norm_reference
from torch_fused.testing import NAMES

ROPE, DTYPES = "apply_rotary_pos_emb", (torch.float32, torch.bfloat16)
Contenders, Shape = Mapping[str, Callable[..., Any]], tuple[int, ...]


def normed(norm: Callable[..., Tensor], **options: str) -> Callable[..., Tensor]:
    """Over the last dimension."""
    return lambda x, *weights: norm(x, x.shape[-1:], *weights, **options)


def added(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, w.shape, w), total


def composed_softmax(x: Tensor) -> Tensor:
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


CALLS: dict[str, Contenders] = {
    "rms_norm": {
        "torch_fused": normed(functional.rms_norm),
        "torch_fused llama": normed(functional.rms_norm, casting_mode="llama"),
        "F.rms_norm": normed(F.rms_norm),
        "HF module": normed(rms_norm_reference, casting_mode="llama"),
    },
    "add_rms_norm": {
        "torch_fused": partial(functional.add_rms_norm, casting_mode="torch"),
        "torch_fused llama": functional.add_rms_norm,
        "add, F.rms_norm": added,
        "add, HF module": add_rms_norm_reference,
    },
    "layer_norm": {
        "torch_fused": normed(functional.layer_norm),
        "F.layer_norm": normed(F.layer_norm),
        "torch composed": normed(layer_norm_reference),
    },
    "softmax": {
        "torch_fused": functional.softmax,
        "torch.softmax": partial(torch.softmax, dim=-1),
        "torch composed": composed_softmax,
    },
    "silu_mul": {
        "torch_fused": functional.silu_mul,
        "torch_fused llama": partial(functional.silu_mul, casting_mode="llama"),
        "F.silu(gate) * up": lambda gate, up: F.silu(gate) * up,
    },
    "gelu_mul": {
        "torch_fused": partial(functional.gelu_mul, approximate="tanh"),
        "torch_fused exact": functional.gelu_mul,
        "F.gelu(gate) * up": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    },
    ROPE: {
        "torch_fused": functional.apply_rotary_pos_emb,
        "torch_fused llama": partial(functional.apply_rotary_pos_emb, casting_mode="llama"),
        "transformers": modeling_llama.apply_rotary_pos_emb,
    },
}


def hugging_face(x: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What generate() does: logits processors, softmax, multinomial."""
    x = TopKLogitsWarper(top_k)(None, x) if top_k else x
    x = TopPLogitsWarper(top_p)(None, x) if top_p < 1 else x
    return torch.multinomial(x.softmax(-1), 1)


def top_k_multinomial(x: Tensor) -> Tensor:
    """The fastest that torch can do for top-k: no mask over the vocabulary."""
    values, ids = x.topk(50)
    return ids.gather(-1, torch.multinomial(values.softmax(-1), 1))


sample = partial(sampling.sample, seed=1)
DRAWS: dict[str, Contenders] = {
    "greedy": {"torch_fused": sampling.greedy, "torch.argmax": partial(torch.argmax, dim=-1)},
    "whole vocabulary": {"torch_fused": sample, "softmax, multinomial": hugging_face},
}
for op, options in LISTS["sampling"]["filters"].items():
    DRAWS[op] = {"torch_fused": partial(sample, **options), "HF chain": partial(hugging_face, **options)}
DRAWS["top-k 50"]["torch.topk, multinomial"] = top_k_multinomial
OPTIMIZERS = {
    "torch_fused": optim.AdamW,
    "torch fused=True": partial(torch.optim.AdamW, fused=True),
    "torch foreach=True": partial(torch.optim.AdamW, foreach=True),
}


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Four dimensions are as attention passes them: heads and tokens of a projection's output, transposed."""
    x = torch.randn(shape).to(dtype)
    return x.transpose(1, 2) if len(shape) == 4 else x


def gradients(of: int, call: Callable[..., Any], *operands: Tensor) -> Call:
    """Prepares the gradients of the first `of` operands, for random gradients of the results."""
    inputs = [operand.detach().requires_grad_() for operand in operands[:of]]
    with torch.enable_grad():
        results = call(*inputs, *operands[of:])
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.randn_like(result) for result in results]
    return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)


def op_case(op: str, shape: Shape, sizes: Sequence[Shape], moved: int, dtype: torch.dtype, of: int = 0) -> Case:
    """An op with operands of these sizes, which moves so many elements; or the gradients of its first `of` operands."""
    name, prepare = (f"{op} backward", partial(gradients, of)) if of else (op, partial)
    contenders = {**CALLS[op], **kernels(name, sizes[0][-1])}
    return Case(
        name, str(tuple(shape)), NAMES[dtype], "", contenders, lambda: (randn(*size, dtype=dtype) for size in sizes),
        prepare, moved * dtype.itemsize,
    )  # fmt: skip


def by_rows(*ops: str, shapes: Iterable[Shape] = (), dtypes: Iterable[torch.dtype] = DTYPES) -> Iterator[Case]:
    """Ops, and their gradients in the shapes of training."""
    for op in ops:
        known, full, vectors = (LISTS["by_rows"][op][key] for key in ("shapes", "operands", "vectors"))
        adds = op == "add_rms_norm"  # it has two results, and its gradient is not timed
        for shape, dtype in product(shapes or known, dtypes):
            sizes, elements = [shape] * full + [shape[1:]] * vectors, shape[0] * shape[1]
            yield op_case(op, shape, sizes, (full + 1 + adds) * elements, dtype)
            if shape[0] >= 2048 and not adds:
                yield op_case(op, shape, sizes, (2 * full + 1) * elements, dtype, full + vectors)


def rope() -> Iterator[Case]:
    for shape, dtype in product(LISTS["rope"]["shapes"], DTYPES):
        batch, tokens, *heads, head_dim = shape
        sizes = [*((batch, tokens, n, head_dim) for n in heads), *[(1, tokens, head_dim)] * 2]
        moved = (2 * batch * sum(heads) + 2) * tokens * head_dim
        for of in (0, 2) if shape in LISTS["rope"]["backward"] else (0,):
            yield op_case(ROPE, shape, sizes, moved, dtype, of)


def parameters(shapes: Iterable[Iterable[int]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """With gradients."""
    params = [torch.nn.Parameter(randn(*shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def adamw(device: str) -> Iterator[Case]:
    for name, dtype in product(listed("adamw", device), DTYPES):
        shapes = [weight.shape for weight in made(name, dtype, "meta").parameters()]
        elements = sum(shape.numel() for shape in shapes)
        yield Case(
            "adamw", f"{elements / 1e6:.0f} million in {len(shapes)} tensors", NAMES[dtype], "",
            OPTIMIZERS, partial(parameters, shapes, dtype), lambda make, *params: make(params).step,
            7 * elements * dtype.itemsize,  # four operands are read, three written
        )  # fmt: skip


def fill(cache: Any, states: Tensor, layers: int) -> None:
    for layer in range(layers):
        cache.update(states, states, layer)


def kv_cache() -> Iterator[Case]:
    """A token is appended to a cache that has room for more."""
    settings = config("Qwen2.5-0.5B")
    layers, once = settings.num_hidden_layers, partial(bandwidth, rounds=40, calls=1)  # each call changes the next one

    def prepare(make: Callable[[], Any], prompt: Tensor, token: Tensor) -> Call:
        cache = make()
        fill(cache, prompt, layers)
        return partial(fill, cache, token, layers)

    for length in LISTS["kv_cache"]:
        operands = partial(map, lambda tokens: randn(1, tokens, 2, 64, dtype=torch.bfloat16), (length, 1))
        caches = {
            "FusedKVCache": partial(FusedKVCache, settings, expected_len=length + 64),
            "DynamicCache": partial(DynamicCache, config=settings),
            "StaticCache": partial(StaticCache, config=settings, max_cache_len=length + 64),
        }
        yield Case("kv append", f"{length} tokens", "bf16", "", caches, operands, prepare, measure=once)


def draws() -> Iterator[Case]:
    listed = LISTS["sampling"]
    for shape, (kind, scale), op in product(listed["shapes"], listed["kinds"].items(), DRAWS):
        logits = partial(lambda shape, scale: [torch.randn(shape) * scale], shape, scale)
        yield Case(op, str(tuple(shape)), "f32", kind, DRAWS[op], logits, nbytes=4 * shape[0] * shape[1])


int8_linear = torch.ops.torch_fused._quantized_linear_int8
PRODUCTS: Contenders = {  # of vectors and a matrix, dense and packed
    "torch_fused": lambda x, dense, packed, options: functional.quantized_linear(x, *packed, **options),
    "F.linear, not packed": lambda x, dense, packed, options: F.linear(x, dense),
    "torch_fused int8": lambda x, dense, packed, options: int8_linear(x, *packed, **options),
    "dequantize, F.linear": lambda x, dense, packed, options: F.linear(x, functional.dequantize(*packed, **options)),
}


def matrices(vectors: int, rows: int, cols: int, dtype: torch.dtype, **options: int) -> tuple[Any, ...]:
    weight = randn(rows, cols, dtype=dtype)
    return randn(vectors, cols, dtype=dtype), weight, functional.quantize(weight, **options), options


def quantized(device: str) -> Iterator[Case]:
    for shape, bits, dtype in product(LISTS["quantized"], (4, 8), DTYPES):
        vectors, rows, cols = shape
        absent = {"dequantize, F.linear"} if vectors <= 8 else {"torch_fused int8"}
        if device != "cpu":
            absent.add("torch_fused int8")
        nbytes = rows * cols * bits // 8 + (2 * rows * cols // GROUP_SIZE + vectors * (rows + cols)) * dtype.itemsize
        yield Case(
            "quantized_linear", f"({vectors}, {cols}) x ({rows}, {cols})", NAMES[dtype], f"{bits} bits",
            {name: call for name, call in PRODUCTS.items() if name not in absent},
            partial(matrices, *shape, dtype, bits=bits, group_size=GROUP_SIZE), nbytes=nbytes,
        )  # fmt: skip
