"""Generates text with a model, stock and fused: python examples/02_generate_qwen.py [model id or local folder]"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_fused.demo import load_demo_model
from torch_fused.hf import apply_torch_fused


def load(name: str | None):
    if name is None:
        return load_demo_model()
    device = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def timed_generate(model, inputs, tokens: int = 64):
    model.generate(**inputs, max_new_tokens=4, do_sample=False)  # warm up
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return output[0].tolist(), tokens / (time.perf_counter() - start)  # tolist waits for the device


model, tokenizer = load(*sys.argv[1:2] or [None])
inputs = tokenizer("The three most important things about whales are", return_tensors="pt").to(model.device)

stock, stock_speed = timed_generate(model, inputs)
with apply_torch_fused(model) as handle:
    print(handle.report())
    fused, fused_speed = timed_generate(model, inputs)

print(tokenizer.decode(fused))
equal = "equal tokens" if fused == stock else "DIFFERENT tokens"
print(f"transformers {stock_speed:.1f} tokens/s, torch_fused {fused_speed:.1f} tokens/s, {equal}")
