"""Tests that need an NVIDIA GPU: graphs, streams, threads, processes, devices, no waiting, and whole models."""

import contextlib
import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_ops
import pytest
import torch
from cuda_ops import CASES, assert_close_to_the_cpus, assert_same, operands_on
from decode_step import Shape, Step, on_device
from test_hf_compile import Counting
from test_hf_generate import FAMILIES, make_model, prompt
from transformers import CompileConfig, DynamicCache

import torch_fused
from torch_fused.__main__ import main
from torch_fused.functional import add_rms_norm, layer_norm, rms_norm, silu_mul, softmax
from torch_fused.hf import FusedKVCache, apply_torch_fused, generate, loop
from torch_fused.metal import emulate
from torch_fused.ops.decode import decode_
from torch_fused.ops.decoder import make_decoder
from torch_fused.optim import AdamW
from torch_fused.sampling import filter_logits, greedy, sample
from torch_fused.selfcheck import CHECKS
from torch_fused.testing import make, relative_error

ROOT = Path(__file__).parents[1]
INF = torch.inf
LAST = f"cuda:{torch.cuda.device_count() - 1}"

each_op = pytest.mark.parametrize("op", CASES)


# ---- graphs ---------------------------------------------------------------------------------------------------------


@each_op
def test_cuda_graph_replays_with_new_values(op):
    """A captured op, forward and backward, gives the same for other operand values as outside a graph.

    Of AdamW the update is captured with the steps as they are then: they are numbers of the host, and so are the bias
    corrections that come of them. Of `sample` the seed and the offset are tensors of the device, read by each replay.
    """
    cuda_ops.assert_replays(op)


def start(function: str, cache: Path) -> subprocess.Popen:
    """Runs a function of cuda_ops in a new process, with compiled kernels in `cache`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
        "TORCH_FUSED_CACHE": str(cache),
        "TORCH_FUSED_STRICT": "1",
    }
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, "-c", f"import cuda_ops; cuda_ops.{function}()"]
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> None:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and output.strip().endswith("right"), errors


def test_cuda_first_use_inside_a_capture(tmp_path):
    """Modules load while a graph is captured: compiled during capture, and, in a second process, from the cache."""
    finish(start("first_use_in_captures", tmp_path))
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cubin").iterdir()}
    assert compiled
    finish(start("first_use_in_captures", tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cubin").iterdir()} == compiled


def steps_of_one_decoder(lengths) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of steps by one decoder on a GPU and another on the CPU, each with different tokens, context and cache."""
    step = Step(Shape("qwen3", kv_heads=1), batch=2, length=max(lengths), dtype=torch.bfloat16)
    decoders = {device: make_decoder(**on_device(device, step.model)) for device in ("cpu", "cuda")}
    found: dict[str, list[torch.Tensor]] = {"cpu": [], "cuda": []}
    for i, length in enumerate(lengths):
        ids = torch.tensor([[i], [2 * i + 1]])
        for device, logits in found.items():
            args = on_device(
                device, {**step.args, "token_ids": ids, "length": length, "positions": torch.full((2, 1), length)}
            )
            logits.append(decode_(decoders[device], **args).cpu())
    return found["cuda"], found["cpu"]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert relative_error(mine, other) < 2e-2


def test_cuda_repeated_steps():
    """From the second step on, the launches are a graph with changing arguments, grids and number of chunks."""
    assert_near(*steps_of_one_decoder([20, 21, 22, 300, 301, 40, 23, 302]))


def test_cuda_steps_on_separate_streams():
    """Threads that share a decoder each get their own logits."""
    step = Step(Shape("qwen2", layers=8), length=50)
    model = make_decoder(**on_device("cuda", step.model))

    def work(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        args = on_device("cuda", {**step.args, "token_ids": torch.full((1, 1), number)})
        with torch.cuda.stream(torch.cuda.Stream()):
            first = decode_(model, **args).clone()
            for _ in range(20):
                last = decode_(model, **args)
            return first.cpu(), last.cpu()

    torch.cuda.synchronize()
    alone = [work(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    for (first, last), (expected, _) in zip([*alone, *together], [*alone, *alone], strict=True):
        assert torch.equal(first, expected) and torch.equal(last, expected)


def test_cuda_step_in_a_graph_of_torch():
    """While torch captures, the launches go to its graph; before and after, to the decoder's own."""
    step = Step(length=50, device="cuda")
    model, args = make_decoder(**on_device("cuda", step.model)), on_device("cuda", step.args)
    expected = [decode_(model, **args) for _ in range(3)][-1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_(model, **args)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
    assert torch.equal(decode_(model, **args), expected)


# ---- threads and processes ------------------------------------------------------------------------------------------


def test_cuda_threads_on_separate_streams(tmp_path):
    """Eight threads at once, including the first use of every kernel: all get the same bits as one thread."""
    finish(start("threads_on_streams", tmp_path))


def test_cuda_first_call_of_a_thread_is_an_op():
    """A thread that has not called CUDA before has no CUDA context yet."""
    x = make(3, 896, device="cuda")
    results = []
    thread = threading.Thread(target=lambda: results.append(rms_norm(x, (896,))))
    thread.start()
    thread.join()
    assert_same(results, [rms_norm(x, (896,))], "rms_norm")


def is_whole(kept: bytes) -> bool:
    """Whether the data after the digest is ELF and has all sections that its header lists."""
    cubin = kept[16:]

    def number(start: int, size: int) -> int:
        return int.from_bytes(cubin[start : start + size], "little")

    end = number(40, 8) + number(58, 2) * number(60, 2)  # offset of the table of sections, size of an entry, entries
    return cubin[:4] == b"\x7fELF" and 64 <= end <= len(cubin)


def test_cuda_several_processes_start_with_one_empty_cache(tmp_path):
    """All are right; the cache has only complete files, and the next process uses these."""
    processes = [start("one_of_several_processes", tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:  # only now, so that they compile at the same time
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        finish(process)
    files = sorted((tmp_path / "cubin").iterdir())
    sources = ["column_sum", "greedy", "kv_append", "rms_norm", "rms_norm_backward", "softmax"]
    assert sorted(path.name.rpartition("-")[0] for path in files) == sources
    assert all(path.suffix == ".cubin" and is_whole(path.read_bytes()) for path in files)
    written = [path.stat().st_mtime_ns for path in files]
    finish(start("one_of_several_processes", tmp_path))
    assert sorted((tmp_path / "cubin").iterdir()) == files
    assert [path.stat().st_mtime_ns for path in files] == written


# ---- devices and streams --------------------------------------------------------------------------------------------


@each_op
def test_cuda_last_device(op):
    """On the last GPU while the first is the current one: the CPU's results, on that GPU, and device 0 is current."""
    with torch.cuda.device(0):
        results = CASES[op](operands_on(LAST, CASES[op], 0))
        assert torch.cuda.current_device() == 0
    assert {result.device for result in results} == {torch.device(LAST)}
    assert_close_to_the_cpus(results, op, 0)


def test_cuda_last_device_trains():
    """A model of our modules and AdamW there: the parameters after five steps are the CPU's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch_fused.nn.RMSNorm(64), torch_fused.nn.LayerNorm(64), torch.nn.Linear(64, 8)
    )
    moved = copy.deepcopy(model).to(LAST)
    with torch.cuda.device(0):
        for net, device in ((model, "cpu"), (moved, LAST)):
            optimizer = AdamW(net.parameters(), lr=1e-2)
            for step in range(5):
                net(make(16, 32, seed=step, device=device)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for expected, actual in zip(model.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_cuda_last_device_draws_with_its_own_generator():
    """The generator of that GPU: its seed, an offset that advances, and a repeatable draw."""
    logits = make(4, 5000, device=LAST)
    generator = torch.Generator(LAST)
    runs = []
    with torch.cuda.device(0):
        for _ in range(2):
            generator.manual_seed(3)
            runs.append([sample(logits, generator=generator) for _ in range(3)])
    assert_same(runs[0], runs[1], "sample")
    assert not torch.equal(runs[0][0], runs[0][1])
    assert_same(runs[0][:1], [sample(logits.cpu(), seed=3).to(LAST)], "sample with its seed")


def test_cuda_tensors_on_several_devices_are_an_error():
    """The message names both, before anything is launched."""
    x, weight = make(3, 896, device=LAST), make(896)
    with pytest.raises(RuntimeError, match=r"cuda:\d+.*cpu|cpu.*cuda:\d+"):
        rms_norm(x, (896,), weight)


@each_op
def test_cuda_stream_order_without_waiting(op):
    """On a busy stream: the op sees the results of earlier work, and returns while the stream is still busy."""
    case = CASES[op]
    static, fresh = (operands_on("cuda", case, seed) for seed in (0, 1))
    expected = case(operands_on("cuda", case, 1))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case(operands_on("cuda", case, 0))  # loads the kernels, and reserves memory for the results on this stream
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # cycles: half a second
        for operand, value in zip(static, fresh, strict=True):
            operand.copy_(value)
        results = case(static)
        still_busy = not stream.query()
    stream.synchronize()
    assert_same(results, expected, op)
    assert still_busy


@contextlib.contextmanager
def synchronisation_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op
def test_cuda_ops_do_not_synchronise(op):
    """No op, forward or backward, makes torch wait for the device or copy to the host."""
    operands = operands_on("cuda", CASES[op], 0)
    with synchronisation_is_an_error():
        CASES[op](operands)


def test_cuda_random_draws_and_optimizer_do_not_synchronise():
    """Seeds from either generator, scalar parameters, and AdamW's step including its first states."""
    logits, generator = make(4, 5000, device="cuda"), torch.Generator("cuda")
    weight = make(64, 64, device="cuda", requires_grad=True)
    weight.grad = make(64, 64, device="cuda", seed=1)
    optimizer = AdamW([weight], state_dtype=torch.float32)
    with synchronisation_is_an_error():
        sample(logits, top_k=40, top_p=0.9, min_p=0.01, temperature=0.7)
        sample(logits, generator=generator)
        sample(logits, seed=1, offset=2)
        filter_logits(logits, top_k=40)
        for _ in range(2):
            optimizer.step()


def test_cuda_wait_for_the_device_would_show():
    """A control for the test above: a copy to the host raises in this mode."""
    x = make(3, device="cuda")
    with synchronisation_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


# ---- torch.compile, determinism, profiler ---------------------------------------------------------------------------


def test_cuda_compile_fullgraph():
    """torch.compile traces a block of ops and its gradients, and sampling, without a graph break: the same numbers."""

    def block(x, residual, weight):
        normed, total = add_rms_norm(x, residual, weight)
        return softmax(silu_mul(normed, total)), total

    def token(logits):
        return greedy(logits), filter_logits(logits, top_k=5), sample(logits, top_p=0.9, seed=4)

    def run(block, token):
        x, residual, weight = (
            make(*shape, device="cuda", requires_grad=True) for shape in ((5, 896), (5, 896), (896,))
        )
        result, total = block(x, residual, weight)
        gradients = torch.autograd.grad((result * total).sum(), (x, residual, weight))
        return [result.detach(), total.detach(), *gradients, *token(make(3, 2500, device="cuda"))]

    compiled = (torch.compile(function, fullgraph=True, backend="aot_eager") for function in (block, token))
    assert_same(run(*compiled), run(block, token), "compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_cuda_norms_backward_is_deterministic(dtype):
    """Gradients of 4000 rows, several times and on two streams at once: the same bits."""
    x, grad = (make(4000, 896, dtype=dtype, device="cuda", seed=seed) for seed in range(2))
    weight, bias = (make(896, dtype=dtype, device="cuda", seed=seed) for seed in (2, 3))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    runs = []
    for i in range(6):
        with torch.cuda.stream(streams[i % 2]):
            rms = cuda_ops.differentiated(lambda x, w: rms_norm(x, (896,), w), 2)(x, weight, grad)
            layer = cuda_ops.differentiated(lambda x, w, b: layer_norm(x, (896,), w, b), 3)(x, weight, bias, grad)
            runs.append([*rms, *layer])
    torch.cuda.synchronize()
    for run in runs[1:]:
        assert_same(run, runs[0], "norms")


def test_cuda_profiler_shows_each_kernel_by_its_name():
    """torch.profiler lists the kernels of the ops that ran."""
    logits, x, gate = make(2, 5000, device="cuda"), make(4, 896, device="cuda"), make(4, 896, device="cuda", seed=1)
    weight = make(896, device="cuda")

    def run():
        rms_norm(x, (896,), weight)
        softmax(x)
        silu_mul(x, gate)
        greedy(logits)
        torch.cuda.synchronize()

    run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    for prefix in ("rms_norm_f32_", "softmax_f32_", "silu_mul_f32", "greedy_slices_f32", "greedy_rows"):
        assert any(name.startswith(prefix) for name in names), (prefix, sorted(names))


# ---- one seed, one token --------------------------------------------------------------------------------------------


def logits_of_every_kind(vocabulary: int) -> torch.Tensor:
    """Normal, nearly flat, all equal, ascending, descending, mostly masked, wholly masked, one above nearly flat."""
    x = make(8, vocabulary, scale=2)
    x[1] = 5 + make(vocabulary, seed=1, scale=1e-6)
    x[2] = 1.5
    x[3] = x[0].sort().values
    x[4] = x[0].sort(descending=True).values
    x[5, torch.arange(vocabulary) % 4001 != 17] = -INF
    x[6] = -INF
    x[7] = x[1]
    x[7, vocabulary // 2] = 9
    return x


FILTERS = (
    {},
    {"temperature": 0.0},
    {"top_k": 50},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"top_p": 0.95},
    {"temperature": 1.4, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 20000, "top_p": 0.6, "min_p": 1e-4},
)
BY_ROW = {
    "temperature": torch.tensor([1.0, 0.0, 0.7, 1.3, 1.0, 2.0, 1.0, 0.9]),
    "top_k": torch.tensor([50.0, 0.0, 3000.0, 0.0, 20000.0, 5.0, 1.0, 40.0]),
    "top_p": torch.tensor([0.9, 0.95, 1.0, 0.5, 0.99, 1.0, 0.3, 0.8]),
    "min_p": torch.tensor([0.0, 0.0, 0.01, 1e-3, 0.0, 0.2, 0.0, 0.0]),
}
SEEDS = ((0, 0), (1, 5), (2**40 + 7, 2**33))


def tokens_of(logits: torch.Tensor, filters: dict, seeds=SEEDS) -> list[torch.Tensor]:
    """The kept set, the draws for every seed and offset, and whether there was something to draw; on the CPU."""
    filters = {
        name: value.to(logits.device) if isinstance(value, torch.Tensor) else value for name, value in filters.items()
    }
    results = [filter_logits(logits, **filters)]
    for seed, offset in seeds:
        results += sample(logits, seed=seed, offset=offset, return_valid=True, **filters)
    return [result.cpu() for result in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("vocabulary", [151936, 300000])
def test_cuda_draws_the_cpus_tokens(vocabulary, dtype):
    """Every kind of row with every filter, scalar and per row: kept set, tokens and validity, bit for bit."""
    logits = logits_of_every_kind(vocabulary).to(dtype)
    moved = logits.cuda()
    assert_same([greedy(moved).cpu()], [greedy(logits)], "greedy")
    for filters in (*FILTERS, BY_ROW):
        assert_same(tokens_of(moved, filters), tokens_of(logits, filters), f"{filters}")
    for row in range(len(logits)):  # one at a time, as in generation
        assert_same(
            tokens_of(moved[row], {"top_p": 0.9}, [(row, 1)]),
            tokens_of(logits[row], {"top_p": 0.9}, [(row, 1)]),
            f"row {row}",
        )


def test_cuda_draws_the_emulators_tokens():
    """The same kernels in the emulator, with a whole vocabulary; only two filters, because it is slow."""
    logits = logits_of_every_kind(151936)
    moved = logits.cuda()
    on_cuda = [greedy(moved).cpu()]
    for filters in (FILTERS[3], BY_ROW):
        on_cuda += tokens_of(moved, filters, SEEDS[1:2])
    with emulate(checked=False):
        emulated = [greedy(logits)]
        for filters in (FILTERS[3], BY_ROW):
            emulated += tokens_of(logits, filters, SEEDS[1:2])
    assert_same(on_cuda, emulated, "emulated")


# ---- Hugging Face ---------------------------------------------------------------------------------------------------

GREEDY = {"do_sample": False, "max_new_tokens": 40}
SAMPLED = {"do_sample": True, "max_new_tokens": 24, "temperature": 0.8, "top_k": 40, "top_p": 0.9}


@pytest.fixture(params=FAMILIES)
def model(request):
    """Small, with random weights, in float32."""
    return make_model(request.param).to("cuda")


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = prompt(rows, 9)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": torch.where(mask == 1, ids, 0).cuda(), "attention_mask": mask.cuda()}


@pytest.mark.parametrize("rows", [1, 4])
def test_cuda_generates_stocks_greedy_tokens(model, rows):
    """A patched model, and hf.generate on the stock one; reverted, it is stock again."""
    stock = model.generate(**batch(rows), **GREEDY)
    before = [dict(module.__dict__) for module in model.modules()]
    assert torch.equal(generate(model, batch(rows), **GREEDY), stock)
    with apply_torch_fused(model):
        patched = model.generate(**batch(rows), **GREEDY, return_dict_in_generate=True)
    assert type(patched.past_key_values) is FusedKVCache
    assert torch.equal(patched.sequences, stock)
    assert [dict(module.__dict__) for module in model.modules()] == before
    reverted = model.generate(**batch(rows), **GREEDY, return_dict_in_generate=True)
    assert type(reverted.past_key_values) is DynamicCache
    assert torch.equal(reverted.sequences, stock)


def test_cuda_sampled_tokens_are_the_cpus_for_the_same_logits(model):
    """The tokens of a seed are those that the CPU draws from the GPU's logits.

    These are, for the tokens so far, the CPU model's to float32's tolerance. They are not its bits, so a draw at the
    very edge between two tokens might go either way: the tokens of the two models are not compared.
    """
    inputs, on_cpu = batch(4), copy.deepcopy(model).cpu()
    length = inputs["input_ids"].shape[1]
    with apply_torch_fused(model):
        torch.manual_seed(1)
        out = model.generate(**inputs, **SAMPLED, return_dict_in_generate=True, output_logits=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out.sequences[:, length:])], dim=-1).cpu()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = on_cpu(out.sequences.cpu(), attention_mask=mask, position_ids=positions, use_cache=False).logits
    filters = {name: SAMPLED[name] for name in ("temperature", "top_k", "top_p")}
    torch.manual_seed(1)
    drawn = torch.stack([sample(logits.cpu().float(), **filters) for logits in out.logits], dim=-1)
    assert torch.equal(drawn, out.sequences[:, length:].cpu())
    actual = torch.stack(out.logits, dim=1).cpu()
    torch.testing.assert_close(actual, expected[:, length - 1 : -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cuda_generation_does_not_wait(model, options, monkeypatch):
    """From the third token on, torch raises if the host waits for the device."""
    decode, steps = loop._Loop.decode, []

    def watched(self, tokens, **early):
        steps.append(tokens)
        if len(steps) == 2:
            torch.cuda.set_sync_debug_mode("error")
        return decode(self, tokens, **early)

    with apply_torch_fused(model):
        expected = model.generate(**batch(4), **options) if options is GREEDY else None
        monkeypatch.setattr(loop._Loop, "decode", watched)
        try:
            tokens = model.generate(**batch(4), **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == options["max_new_tokens"] - 1
    assert expected is None or torch.equal(tokens, expected)


def test_cuda_an_end_that_is_noticed_late(model, monkeypatch):
    """An extra sampled step leaves no trace: tokens, cache and generator are those of a loop that waits."""

    def run(**options):
        torch.manual_seed(3)
        output = model.generate(**batch(1), **SAMPLED, **options, return_dict_in_generate=True)
        length = next(value for value in output.values() if hasattr(value, "layers")).get_seq_length()
        return output.sequences.tolist(), length, torch.get_rng_state().tolist(), torch.cuda.get_rng_state().tolist()

    with apply_torch_fused(model):
        end = run(eos_token_id=None)[0][0][-5]
        late = run(eos_token_id=end)
        monkeypatch.setattr(loop, "runs_ahead", lambda device: False)
        assert late == run(eos_token_id=end)


def test_cuda_static_cache_is_compiled():
    """The same number of calls of a compiled model as with stock, and the same tokens."""
    model, counts = make_model("qwen2").to("cuda"), []
    options = {**GREEDY, "cache_implementation": "static"}
    for patched in (False, True):
        torch._dynamo.reset()
        backend = Counting()
        options["compile_config"] = CompileConfig(fullgraph=True, backend=backend)
        handle = apply_torch_fused(model) if patched else None
        counts.append((model.generate(**batch(2), **options).tolist(), backend.graphs, backend.calls))
        if handle is not None:
            handle.revert()
    assert counts[0] == counts[1]
    assert backend.calls == GREEDY["max_new_tokens"] - 1


def test_cuda_training_gives_stocks_losses():
    """Ten steps of a patched Qwen2 with our AdamW, compared with stock and torch's AdamW."""
    stock = make_model("qwen2", initializer_range=0.02).to("cuda").train()
    fused = copy.deepcopy(stock)
    apply_torch_fused(fused)

    def losses(model, optimizer):
        values = []
        for step in range(10):
            ids = (prompt(4, 12, seed=step) % 20 + 1).cuda()  # few tokens, so that there is something to learn
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.detach())
        return torch.stack(values)

    expected = losses(stock, torch.optim.AdamW(stock.parameters(), lr=1e-2))
    actual = losses(fused, AdamW(fused.parameters(), lr=1e-2))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert expected[-1] < 0.9 * expected[0]


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", LAST])
def test_cuda_doctor(device, capsys):
    """Every op is correct, and none runs in plain torch."""
    status = main(["doctor", "--device", device])
    output = capsys.readouterr().out
    assert status == 0, output
    assert f"ops are correct on {device}" in output
    assert "Metal source translated to CUDA" in output and "torch: " not in output


def test_cuda_demo_with_random_weights(capsys):
    """SmolLM2-135M's shape: stock's greedy tokens, and a table."""
    status = main(["demo", "--random-weights", "--device", "cuda", "--max-new-tokens", "16", "--rounds", "1"])
    output = capsys.readouterr().out
    assert status == 0, output
    assert "tokens per second" in output and "the same" in output


def test_cuda_status_lists_the_kernels():
    """status(): every op with kernels runs the translated Metal source; none has fallen back to torch."""
    status = torch_fused.status()
    for op in CHECKS.keys() | {"kv_update_", "decode_token_"}:
        assert status[op]["cuda"] == "Metal source translated to CUDA"


def test_cuda_damaged_cubins_are_compiled_again(tmp_path):
    """Truncated, empty and foreign files, each in a new process: the kernel runs, and the file is complete again."""
    script = "import torch, torch_fused\nx = torch.ones(3, device='cuda')\nprint(torch_fused.functional.softmax(x))"
    environment = {**os.environ, "TORCH_FUSED_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def run() -> bytes:
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert "0.3333, 0.3333, 0.3333" in result.stdout, result.stderr
        (path,) = (tmp_path / "cubin").iterdir()
        return path.read_bytes()

    whole = run()
    (path,) = (tmp_path / "cubin").iterdir()
    for damaged in (whole[: len(whole) // 2], b"", b"not a cubin"):
        path.write_bytes(damaged)
        assert run() == whole
