"""Measures the effect of rounding vectors to int8 on a packed model on the CPU, in logits and perplexity.

    python tools/packed_perplexity.py [--tokens 4096] [--bits 4|8]

The model is the demo's, with the 4 bits of its file or repacked to 8. The text is the standard library's docstrings.
The exit status is 1 if the perplexities differ by more than half a percent, or the root mean square of the logits by
more than one.
"""

import argparse
import ast
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fused.demo import _demo_file, load_demo_model
from torch_fused.hf import load_gguf, quantize_
from torch_fused.hf.plan import Plan, read
from torch_fused.ops.decode import decode_
from torch_fused.ops.decoder import DECODER_PARTS

BATCH, STEPS = 8, 8  # texts at once and tokens per call, the maximum of the op
CONTEXT = 512  # tokens of a text
MOST_PERPLEXITY, MOST_ERROR = 0.005, 0.01


def docstrings() -> Iterator[str]:
    """The standard library's docstrings of more than one line."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if "\n" in text:
                    yield text


def make_texts(tokenizer: Any, tokens: int) -> Tensor:
    """Concatenated docstrings, cut into ``(texts, CONTEXT)``."""
    ids: list[int] = []
    found = docstrings()
    while len(ids) < tokens:
        ids += tokenizer(next(found) + "\n\n")["input_ids"]
    return torch.tensor(ids[: max(1, tokens // CONTEXT) * CONTEXT]).view(-1, CONTEXT)


def packed_model(bits: int) -> tuple[Any, Any]:
    if bits == 4:
        return load_gguf(_demo_file())
    model, tokenizer = load_demo_model(torch.float32)
    quantize_(model, bits=bits)
    return model, tokenizer


def runner(decoder: Any, plan: Plan, config: Any, batch: int) -> Callable[[Tensor, int], Tensor]:
    """Takes tokens ``(batch, steps)`` and the number of tokens before them, and returns logits."""
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, CONTEXT, head_dim)
    keys, values = ([torch.empty(shape) for _ in range(config.num_hidden_layers)] for _ in range(2))
    cos, sin = plan.cos_and_sin(CONTEXT)

    def run(ids: Tensor, length: int) -> Tensor:
        positions = torch.arange(length, length + ids.shape[1]).expand(ids.shape).contiguous()
        return decode_(decoder, ids, positions, None, cos, sin, keys, values, length)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    args = parser.parse_args()
    model, tokenizer = packed_model(args.bits)
    plan: Any = read(model)
    parts = list(plan.decoder.arguments())
    parts[DECODER_PARTS.index("int8_products")] = False
    decoders = {"int8": plan.decoder, "float": torch.classes.torch_fused.Decoder(*parts)}
    loss = dict.fromkeys(decoders, 0.0)
    squares = {"error": 0.0, "logits": 0.0}
    texts = make_texts(tokenizer, args.tokens)
    batches = texts.split(BATCH)
    with torch.no_grad():
        for batch in batches:
            runs = {name: runner(decoder, plan, model.config, len(batch)) for name, decoder in decoders.items()}
            for length in range(0, CONTEXT, STEPS):
                ids = batch[:, length : length + STEPS].contiguous()
                following = batch[:, length + 1 : length + 1 + STEPS]
                logits = {name: run(ids, length) for name, run in runs.items()}
                squares["error"] += float((logits["int8"] - logits["float"]).double().square().sum())
                squares["logits"] += float(logits["float"].double().square().sum())
                for name, each in logits.items():
                    known = each[:, : following.shape[1]].flatten(0, 1)
                    loss[name] += float(F.cross_entropy(known, following.flatten(), reduction="sum"))
    predicted = len(texts) * (CONTEXT - 1)
    perplexity = {name: math.exp(total / predicted) for name, total in loss.items()}
    worse = perplexity["int8"] / perplexity["float"] - 1
    error = math.sqrt(squares["error"] / squares["logits"])
    print(f"{predicted} tokens of the standard library's docstrings, {args.bits} bits")
    print(f"perplexity {perplexity['float']:.4f} with float products, {perplexity['int8']:.4f} with int8: {worse:+.3%}")
    print(f"relative error of the logits {error:.3%}")
    return int(abs(worse) > MOST_PERPLEXITY or error > MOST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
