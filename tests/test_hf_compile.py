"""A patched model under torch.compile: whole graphs, as with stock, also if `generate` compiles automatically."""

import pytest
import torch
from test_hf_generate import ONE_FAMILY, make_model, one_thread, prompt  # noqa: F401 (a fixture)
from transformers import CompileConfig, DynamicCache, StaticCache

from torch_fused.hf import FusedKVCache, apply_torch_fused, generate
from torch_fused.hf.cache import CACHE


class Counting:
    """A backend that runs graphs as they are, and counts them and their calls."""

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, inputs, **options):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph(*args)

        return run

    def __deepcopy__(self, memo):  # transformers copies its configurations
        return self


def compiling(backend):
    """Makes `generate` compile on the CPU as it does on a GPU; a graph break is an error."""
    config = CompileConfig(fullgraph=True, backend=backend)
    config._compile_all_devices = True
    return config


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def compiled(run, model, **options):
    """The result of generate, and the graphs that it compiled and ran."""
    torch.manual_seed(0)
    backend = Counting()
    result = run(model, prompt(2, 7), max_new_tokens=12, compile_config=compiling(backend), **options)
    return result, backend


def own(model, ids, **options):
    return model.generate(ids, **options)


@pytest.mark.parametrize(
    ("family", "given", "flags"),
    [
        ("qwen2", {"cache_implementation": "static"}, {}),
        pytest.param("llama", {"cache_implementation": "static"}, {}, marks=pytest.mark.full),
        pytest.param("qwen3", {"cache_implementation": "static"}, {}, marks=pytest.mark.full),
        ("qwen2", {"cache_implementation": "static"}, {"decode": False}),
        ("qwen2", {"cache_implementation": "static"}, {"sampler": False}),
        ("qwen2", {"cache_implementation": "static", "prefill_chunk_size": 4}, {}),
        ("qwen2", {}, {}),
    ],
    ids=str,
)
def test_generate_compiles_what_stocks_does(family, given, flags):
    """With a cache that makes transformers compile, by name or a user's, every token is a call of one graph."""
    model = make_model(family)

    def options():
        users = {} if given else {CACHE: StaticCache(config=model.config, max_cache_len=40)}
        return {"do_sample": False, **given, **users}

    expected, stocks = compiled(own, model, **options())
    assert stocks.calls >= 11
    with apply_torch_fused(model, **flags):
        tokens, backend = compiled(own, model, **options())
    assert torch.equal(tokens, expected)
    assert (backend.graphs, backend.calls) == (stocks.graphs, stocks.calls)


@pytest.mark.parametrize("sliding", [False, True])
def test_hf_generate_compiles_too(sliding):
    """Also for windows, which have another static cache; drawn tokens still come from the fused sampler."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0} if sliding else {}
    model = make_model(**windows)
    static = {"cache_implementation": "static"}
    expected, stocks = compiled(own, model, do_sample=False, **static)
    tokens, backend = compiled(generate, model, do_sample=False, **static)
    assert torch.equal(tokens, expected)
    assert (backend.graphs, backend.calls) == (stocks.graphs, stocks.calls)
    with torch.profiler.profile() as profile:
        _, backend = compiled(generate, model, do_sample=True, top_k=20, **static)
    assert backend.calls == stocks.calls
    assert "aten::multinomial" not in {event.key for event in profile.key_averages()}


def test_what_is_not_compiled():
    """The fused cache, as with a DynamicCache; and models that stock does not compile."""
    model = make_model()
    with apply_torch_fused(model) as handle:
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            _, backend = compiled(own, model, do_sample=False, **options)
            assert backend.calls == 0
        assert "11 calls as one op" in handle.report()
    assert not FusedKVCache(model.config).is_compileable


@pytest.mark.parametrize("kind", ["static", "fused", "dynamic"])
@pytest.mark.parametrize("family", ONE_FAMILY)
def test_steps_with_a_cache_are_whole_graphs(family, kind):
    """Each call is one graph, and its logits stock's: for a static cache, the fused one and transformers' own."""
    model = make_model(family)

    def logits(call, cache):
        parts = prompt(2, 9).split([6, 1, 1, 1], dim=1)
        return torch.cat([call(ids, **{CACHE: cache}, use_cache=True).logits for ids in parts], dim=1)

    make = {
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
        "fused": lambda: FusedKVCache(model.config, max_cache_len=16),
        "dynamic": lambda: DynamicCache(config=model.config),
    }[kind]
    with torch.no_grad():
        expected = logits(model, DynamicCache(config=model.config))
        with apply_torch_fused(model):
            backend = Counting()
            whole = torch.compile(model, fullgraph=True, backend=backend)
            torch.testing.assert_close(logits(whole, make()), expected)
            assert backend.calls == 4
