"""Products with a frozen weight by oneDNN: those of `F.linear`."""

import pytest
import torch
import torch.nn.functional as F

from torch_fused.hf import products

has_onednn = torch.backends.mkldnn.is_available()


def layouts(rows, columns):
    """Plain, transposed, with gaps, and one row repeated."""
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield torch.randn(rows, 2 * columns)[:, ::2]
    yield torch.randn(1, columns).expand(rows, columns)


@pytest.mark.parametrize("rows, out, features", [(5, 3, 4), (1, 1, 1), (70, 33, 17), (0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_any_layout(rows, out, features, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", has_onednn)
    torch.manual_seed(0)
    for x in layouts(rows, features):
        for weight in layouts(out, features):
            for bias in (None, torch.randn(out)):
                expected = F.linear(x, weight, bias)
                with torch.no_grad():
                    actual = products.linear(x, weight, bias)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
                assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_torchs(dtype, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", has_onednn)
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(3, 8).to(dtype)
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_gradients(monkeypatch):
    """oneDNN's product has none; a second derivative needs them."""
    monkeypatch.setattr(products, "ONEDNN", has_onednn)
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8)
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 8))
