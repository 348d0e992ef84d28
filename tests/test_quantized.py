"""Packed weights: the format bit by bit, values, gradients and contracts, on every backend."""

import numpy as np
import pytest
import torch

import torch_fused
from torch_fused.functional import dequantize, quantize
from torch_fused.testing import make

FORMATS = [(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MATRICES = {
    "normal": lambda: make(48, 512, dtype=torch.float32),
    "grid": lambda: torch.round(make(64, 512, dtype=torch.float32) * 8) / 4,
    "ties": lambda: torch.arange(-256.0, 256).repeat(4, 1) / 34,
    "constant": lambda: torch.full((2, 256), 0.3),
    "negative constant": lambda: torch.full((2, 256), -0.3),
    "zero": lambda: torch.zeros(2, 256),
    "negative": lambda: -make(16, 512, dtype=torch.float32).abs() - 0.1,
    "positive": lambda: make(16, 512, dtype=torch.float32).abs() + 0.1,
    "large": lambda: make(16, 512, dtype=torch.float32).clamp(-3, 3) * 2e4,
    "small": lambda: make(16, 512, dtype=torch.float32) * 1e-7,
    "denormal": lambda: make(2, 256, dtype=torch.float32) * 1e-39,
    "one outlier": lambda: torch.where(torch.arange(512) % 100 == 7, -9.0, make(4, 512, dtype=torch.float32)),
}


def bit_level(packed, scales, biases, bits, group_size, wide=np.float32):
    """The matrix of a packed one, a weight at a time out of the bytes of its row."""
    rows = np.ascontiguousarray(packed.cpu().view(torch.int32).numpy()).view(np.uint8)
    scales, biases = (t.cpu().float().numpy().astype(wide) for t in (scales, biases))
    columns = rows.shape[-1] * 8 // bits
    out = np.zeros((*rows.shape[:-1], columns), wide)
    for j in range(columns):
        byte = rows[..., j * bits // 8]
        code = byte if bits == 8 else byte >> 4 if j % 2 else byte & 15
        out[..., j] = scales[..., j // group_size] * code.astype(wide) + biases[..., j // group_size]
    return torch.from_numpy(out)


def from_mlx(array):
    mx = pytest.importorskip("mlx.core")
    if array.dtype == mx.uint32:
        return torch.from_numpy(np.array(array).view(np.int32)).view(torch.uint32)
    dtype = {mx.float32: torch.float32, mx.float16: torch.float16, mx.bfloat16: torch.bfloat16}[array.dtype]
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def to_mlx(tensor):
    mx = pytest.importorskip("mlx.core")
    dtype = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[tensor.dtype]
    return mx.array(tensor.float().numpy()).astype(dtype)


def same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype == torch.uint32:
        actual, expected = actual.view(torch.int32), expected.view(torch.int32)
    assert torch.equal(actual, expected)


# ---- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("name", MATRICES)
def test_quantize_is_mlx(name, bits, group_size):
    """Codes, scales and biases are those of mlx.core.quantize, bit for bit."""
    mx = pytest.importorskip("mlx.core")
    for dtype in DTYPES:
        weight = MATRICES[name]().to(dtype)
        expected = mx.quantize(to_mlx(weight), group_size=group_size, bits=bits)
        for a, e in zip(quantize(weight, bits=bits, group_size=group_size), expected, strict=True):
            same(a, from_mlx(e))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("name", MATRICES)
def test_quantize_by_hand(name, bits, group_size):
    """Codes, scales and biases from the rule, a group at a time in numpy."""
    for dtype in DTYPES:
        weight = MATRICES[name]()[:4].to(dtype)
        packed, scales, biases = quantize(weight, bits=bits, group_size=group_size)
        most = 2**bits - 1
        one = [torch.ones(s.shape) for s in (scales, biases)]
        codes = bit_level(packed, one[0], one[1] * 0, bits, group_size).numpy()
        for row, values in enumerate(weight.float().numpy()):
            for group in range(len(values) // group_size):
                w = values[group * group_size : (group + 1) * group_size]
                edge = w.min() if abs(w.min()) > abs(w.max()) else w.max()
                scale = max((w.max() - w.min()) / np.float32(most), np.float32(1e-7))
                scale = scale if abs(w.min()) > abs(w.max()) else -scale
                steps = np.rint(edge / scale)
                scale, bias = (edge / steps, edge) if steps != 0 else (scale, np.float32(0))
                assert scales[row, group] == torch.tensor(scale).to(dtype)
                assert biases[row, group] == torch.tensor(bias).to(dtype)
                expected = np.clip(np.rint((w - bias) / scale), 0, most)
                assert (codes[row, group * group_size : (group + 1) * group_size] == expected).all()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_layout(backend, bits, group_size):
    """Any codes and any scales unpack to what the bytes say, to the last bit, in every dtype of scale and result."""
    words = torch.randint(-(2**31), 2**31, (5, 3 * group_size * bits // 32)).to(torch.int32).view(torch.uint32)
    for dtype in DTYPES:
        scales, biases = (make(5, 3, dtype=dtype, seed=seed) for seed in range(2))
        exact = bit_level(words, scales, biases, bits, group_size)
        packed = [t.to(backend.device) for t in (words, scales, biases)]
        for result in (None, *DTYPES):
            actual = dequantize(*packed, bits=bits, group_size=group_size, dtype=result)
            same(actual.cpu(), exact.to(result or dtype))
    scales, biases = (make(5, 3, dtype=torch.float32, seed=seed) for seed in range(2))
    if torch.float64 in backend.dtypes:
        actual = dequantize(words, scales, biases, bits=bits, group_size=group_size, dtype=torch.float64)
        same(actual, bit_level(words, scales, biases, bits, group_size, np.float64))


def test_quantize_in_blocks(monkeypatch):
    """Blocks of rows, to bound the memory on the way, and leading dimensions change nothing."""
    weight = make(7, 3, 64, dtype=torch.bfloat16)
    expected = [quantize(row) for row in weight.flatten(0, 1)]
    monkeypatch.setattr(torch_fused.ops.quantized, "_BLOCK", 256)
    for i, actual in enumerate(quantize(weight)):
        same(actual, torch.stack([e[i].view(torch.int32) if i == 0 else e[i] for e in expected]).view(7, 3, -1)
             .view(actual.dtype))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (64,), (2, 0, 128)])
def test_quantize_shapes(shape):
    """No rows, no columns, one row."""
    packed, scales, biases = quantize(torch.ones(shape))
    assert packed.shape == (*shape[:-1], shape[-1] // 8)
    assert scales.shape == biases.shape == (*shape[:-1], shape[-1] // 64)
    assert dequantize(packed, scales, biases, bits=4, group_size=64).shape == shape


def test_quantize_not_finite():
    """A group with NaN or infinity is NaN; its neighbours are right."""
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = torch.ones(2, 128)
        weight[0, 70] = value
        result = dequantize(*quantize(weight), bits=4, group_size=64)
        assert result[0, 64:].isnan().all() and torch.equal(result[0, :64], weight[0, :64])
        assert torch.equal(result[1], weight[1])


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_module(dtype):
    """A packed linear layer has MLX's names, the values of the unpacked one, and a state dict that loads."""
    linear = torch.nn.Linear(64, 5, dtype=dtype).eval()
    packed = torch_fused.nn.QuantizedLinear.from_linear(linear, bits=8, group_size=32)
    assert not packed.training and packed.bias is linear.bias
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.state_dict().items()} == {
        "weight": (torch.uint32, (5, 16)),
        "scales": (dtype, (5, 2)),
        "biases": (dtype, (5, 2)),
        "bias": (dtype, (5,)),
    }
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    x = make(3, 64, dtype=dtype)
    matrix = dequantize(packed.weight, packed.scales, packed.biases, bits=8, group_size=32)
    torch.testing.assert_close(packed(x), torch.nn.functional.linear(x, matrix, linear.bias))
    again = torch_fused.nn.QuantizedLinear(64, 5, bits=8, group_size=32, dtype=dtype)
    assert torch.equal(again(x), torch.zeros(3, 5, dtype=dtype))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x))
    assert "bits=8" in repr(again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_module(dtype):
    """A packed embedding looks up unpacked rows; tied, it multiplies with them."""
    embedding = torch.nn.Embedding(11, 64, dtype=dtype)
    packed = torch_fused.nn.QuantizedEmbedding.from_embedding(embedding)
    matrix = dequantize(packed.weight, packed.scales, packed.biases, bits=4, group_size=64)
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(packed(ids), matrix[ids])
    x = make(2, 64, dtype=dtype)
    torch.testing.assert_close(packed.as_linear(x), x @ matrix.T)
    assert sorted(packed.state_dict()) == ["biases", "scales", "weight"] and not list(packed.parameters())
    packed.output_dtype = torch.float32
    assert packed(ids).dtype == torch.float32
    assert "bits=4" in repr(packed)


def test_modules_on_meta():
    """A module that has no memory yet, as loaders make it."""
    module = torch_fused.nn.QuantizedLinear(64, 5, device="meta", dtype=torch.bfloat16)
    assert module.weight.is_meta and module(torch.ones(2, 64, device="meta")).shape == (2, 5)
    module.to_empty(device="cpu")
    assert module.weight.dtype == torch.uint32 and module.scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(2, 64), bits=3), "quantize: bits must be 4 or 8, got 3"),
        (lambda: quantize(torch.ones(2, 64), group_size=16), "quantize: group_size must be 32, 64 or 128, got 16"),
        (lambda: quantize(torch.ones(2, 96)), r"quantize: weight must .* group_size, 64, .* \[2, 96\]"),
        (lambda: quantize(torch.ones(2, 64).int()), "quantize: weight must be float32.*got torch.int32"),
        (lambda: quantize(torch.ones(2, 64).double()), "quantize: weight must be float32.*got torch.float64"),
        (lambda: torch_fused.nn.QuantizedLinear(96, 2), "QuantizedLinear: the columns must be.* 64, got 96"),
        (lambda: torch_fused.nn.QuantizedEmbedding(2, 64, bits=5), "QuantizedEmbedding: bits must be 4 or 8, got 5"),
    ],
)
def test_bad_matrices(call, message):
    """What cannot be packed is refused by name."""
    with pytest.raises(RuntimeError, match=message):
        call()
