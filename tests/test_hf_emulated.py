"""End to end: Qwen2 generates through the Metal kernels, emulated and checked, with stock's tokens."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from torch_fused.hf import apply_torch_fused
from torch_fused.metal import emulate


@pytest.mark.parametrize("schedule", ["sequential", "random"])
def test_qwen2_generates_stocks_tokens_through_metal(schedule):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    prompt = torch.randint(1, 320, (2, 7))
    stock = model.generate(prompt, do_sample=False, max_new_tokens=24)
    with apply_torch_fused(model), emulate(schedule=schedule) as run:
        fused = model.generate(prompt, do_sample=False, max_new_tokens=24)
    assert torch.equal(fused, stock)
    kernels = {launch.kernel for launch in run.launches}
    assert "rms_norm_f32_1" in kernels
    assert len(run.launches) >= 24 * 5  # two norms a layer and the last, every token
