"""End to end in the emulator, checked: every family generates, and Qwen2 trains, with the same results as stock."""

import copy

import pytest
import torch
from test_hf_generate import FAMILIES, make_model

from torch_fused.hf import apply_torch_fused
from torch_fused.metal import emulate
from torch_fused.optim import AdamW

VOCABULARY = 320


def launched(run) -> set[str]:
    """The Metal sources with launched kernels."""
    return {launch.kernel.split("_f32")[0].rstrip("_0123456789") for launch in run.launches}


@pytest.mark.parametrize(
    ("family", "schedule"), [("qwen2", "random"), *((family, "sequential") for family in FAMILIES)]
)
def test_generates_stocks_tokens_through_metal(family, schedule):
    """All ops on, greedy, left-padded: stock's tokens. Sampled: the same tokens as on the CPU."""
    model = make_model(family, vocab_size=VOCABULARY)
    prompt = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    greedy = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24}
    stock = model.generate(prompt, **greedy)
    assert len(set(stock.flatten().tolist())) > 20
    sampled = {"do_sample": True, "max_new_tokens": 8, "temperature": 0.7, "top_k": 30, "top_p": 0.9}
    with apply_torch_fused(model) as handle:
        with emulate(schedule=schedule) as run:
            fused = model.generate(prompt, **greedy)
        assert "23 calls as one op" in handle.report()
        torch.manual_seed(1)
        drawn_on_cpu = model.generate(prompt, **sampled)
        with emulate(schedule=schedule):
            torch.manual_seed(1)
            drawn = model.generate(prompt, **sampled)
    assert torch.equal(fused, stock)
    assert torch.equal(drawn, drawn_on_cpu)
    assert {"rms_norm", "rope", "silu_mul", "kv_append", "decode_product", "decode_attention"} <= launched(run)
    assert any("greedy" in kernel for kernel in launched(run))


def test_qwen2_trains_with_stocks_losses_through_metal():
    """20 steps, forward, backward and AdamW in emulated kernels: stock's losses to float32's tolerance."""
    batches = torch.randint(1, VOCABULARY, (20, 2, 10), generator=torch.Generator().manual_seed(0))

    def losses(model, optimizer):
        values = []
        for ids in batches % 40 + 1:  # few tokens, so that there is something to learn
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.detach())
        return torch.stack(values)

    stock = make_model("qwen2", vocab_size=VOCABULARY, initializer_range=0.02).train()
    fused = copy.deepcopy(stock)
    expected = losses(stock, torch.optim.AdamW(stock.parameters(), lr=3e-3))
    apply_torch_fused(fused)
    with emulate() as run:
        actual = losses(fused, AdamW(fused.parameters(), lr=3e-3))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert expected[-1] < 0.8 * expected[0]
    kernels = launched(run)
    assert {"rms_norm", "rms_norm_backward", "rope", "silu_mul", "silu_mul_backward"} <= kernels
    assert any(kernel.startswith("adamw") for kernel in kernels)
