"""A patched model saves no more for backward in a training step than stock."""

import peft
import pytest
import torch
from test_hf_generate import FAMILIES, make_model, prompt

from torch_fused.hf import apply_torch_fused


def kept_bytes(model, **options):
    """Bytes that autograd saves, each storage once, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps it alive, so that no address is seen twice

    ids = prompt(2, 33)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_than_stock(family, dtype):
    """For every family, in both dtypes; less in bfloat16, where stock keeps float32 copies for its norms."""
    stock, patched = (make_model(family).to(dtype).train() for _ in range(2))
    apply_torch_fused(patched)
    kept, stocks = kept_bytes(patched), kept_bytes(stock)
    assert 0 < kept <= stocks
    assert dtype == torch.float32 or kept < 0.9 * stocks


def test_with_adapters():
    """LoRA adapters that are not merged."""
    models = []
    for _ in range(2):
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        models.append(peft.get_peft_model(make_model(), config).train())
    apply_torch_fused(models[1])
    assert 0 < kept_bytes(models[1]) <= kept_bytes(models[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed(family):
    """Gradient checkpointing saves the same as stock, which is little."""
    plain, stock, patched = (make_model(family).train() for _ in range(3))
    for model in (stock, patched):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    apply_torch_fused(patched)
    kept, stocks = kept_bytes(patched), kept_bytes(stock)
    assert 0 < kept <= stocks < kept_bytes(plain)


def test_autocast():
    """Under autocast, with float32 weights and bfloat16 products."""
    stock, patched = make_model().train(), make_model().train()
    apply_torch_fused(patched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept, stocks = kept_bytes(patched), kept_bytes(stock)
    assert 0 < kept <= stocks
