"""A patched model generates stock's tokens, in every mode that transformers offers."""

import copy
import sys
import threading
from functools import partial

import pytest
import torch
from tokens import small_tokenizer
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
)

import torch_fused
from torch_fused.hf import FusedKVCache, apply_torch_fused, generate
from torch_fused.hf.cache import CACHE
from torch_fused.testing import relative_error

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ONE_FAMILY = ["qwen2", *(pytest.param(family, marks=pytest.mark.full) for family in FAMILIES if family != "qwen2")]
"""For what takes long: the others are in make test-full."""
VOCABULARY = 128


def make_model(family="qwen2", *, seed=0, dtype=torch.float32, layers=2, **changes):
    """A small model with random weights, large enough that greedy tokens do not just repeat."""
    make_config, make_causal_lm = FAMILIES[family]
    config = make_config(
        **{
            "hidden_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = make_causal_lm(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # ones would hide how the weight is applied
    return model.to(dtype)


def prompt(*shape, seed=0):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small, waking threads costs more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stock():
    return make_model()


@pytest.fixture
def fused(stock):
    model = copy.deepcopy(stock)
    apply_torch_fused(model)
    return model


# ---- every family gives stock's tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_stocks(family, seed, dtype):
    """200 greedy tokens; also in bfloat16, with the model's own rounding except in the decode step."""
    model = make_model(family, seed=seed, dtype=dtype, layers=2 + seed)
    expected = model.generate(prompt(1, 9), max_new_tokens=200, do_sample=False)
    with apply_torch_fused(model, decode=dtype == torch.float32):
        tokens = model.generate(prompt(1, 9), max_new_tokens=200, do_sample=False)
    assert len(set(expected[0].tolist())) > 20  # a loop of a few tokens would prove little
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_stocks_bit_for_bit(family, attention):
    """A prompt through the whole model in bfloat16, under both attention implementations."""
    model = make_model(family, dtype=torch.bfloat16, attn_implementation=attention)
    with torch.no_grad():
        expected = model(prompt(2, 17)).logits
        # Silu is within one unit in the last place of torch's, which usually, but not always, rounds the same.
        with apply_torch_fused(model, mlp=False):
            assert torch.equal(model(prompt(2, 17)).logits, expected)
        with apply_torch_fused(model):
            assert relative_error(model(prompt(2, 17)).logits, expected) < 2e-3


def test_hybrid_sliding_window():
    """A model with windowed and full layers, past the window."""
    types = ["sliding_attention", "full_attention"]
    model = make_model(use_sliding_window=True, sliding_window=8, layer_types=types)
    expected = model.generate(prompt(1, 5), max_new_tokens=40, do_sample=False)
    with apply_torch_fused(model):
        assert torch.equal(model.generate(prompt(1, 5), max_new_tokens=40, do_sample=False), expected)


# ---- every way to generate ------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 3},
    "dynamic by name": {"do_sample": False, "cache_implementation": "dynamic"},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_batch_with_left_padding(stock, way):
    """Prompts of different lengths, padded on the left; with transformers' sampler the same seed draws the same tokens,
    twice."""
    fused = copy.deepcopy(stock)
    apply_torch_fused(fused, sampler="num_beams" in WAYS[way] or not WAYS[way]["do_sample"])
    ids = prompt(3, 8)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, 3, 5]):
        ids[row, :padding] = 0
        mask[row, :padding] = 0

    def run(model):
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=30, **WAYS[way])

    expected = run(stock)
    assert torch.equal(run(fused), expected)
    assert torch.equal(run(fused), expected)


def test_prompt_lookup(stock, fused):
    """Candidates copied from the prompt are verified and rejected: the cache is cropped many times."""
    ids = prompt(1, 6).repeat(1, 4)
    options = {"do_sample": False, "max_new_tokens": 60, "prompt_lookup_num_tokens": 4}
    assert torch.equal(fused.generate(ids, **options), stock.generate(ids, **options))


def test_assisted_by_a_second_model(stock, fused):
    """The assistant, also patched, keeps its own fused cache between calls."""
    assistant = make_model(seed=5, layers=2)
    options = {"do_sample": False, "max_new_tokens": 40}
    expected = stock.generate(prompt(1, 6), assistant_model=assistant, **options)
    apply_torch_fused(assistant)
    assert torch.equal(fused.generate(prompt(1, 6), assistant_model=assistant, **options), expected)


def test_several_turns_with_one_cache(stock, fused):
    """A conversation: each turn passes all tokens so far and the cache of the earlier turns."""
    conversations = []
    for model, cache in ((stock, DynamicCache(config=stock.config)), (fused, FusedKVCache(fused.config))):
        tokens = prompt(1, 5)
        for turn in range(3):
            tokens = torch.cat([tokens, prompt(1, 4, seed=turn)], dim=1)
            tokens = model.generate(tokens, **{CACHE: cache}, max_new_tokens=20, do_sample=False)
        assert cache.get_seq_length() == tokens.shape[1] - 1
        conversations.append(tokens)
    assert torch.equal(*conversations)


def test_stops_at_the_end_token(stock, fused):
    """Rows end at different steps and are padded after that."""
    end = stock.generate(prompt(4, 6), max_new_tokens=40, do_sample=False)[:, 15].tolist()
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": end}
    expected = stock.generate(prompt(4, 6), **options)
    assert torch.equal(fused.generate(prompt(4, 6), **options), expected)


def test_returns_scores_and_the_cache(stock, fused):
    """return_dict_in_generate: equal scores, logits and hidden states, and a FusedKVCache that can be used further."""
    options = {
        "do_sample": False,
        "max_new_tokens": 10,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    expected, output = stock.generate(prompt(2, 6), **options), fused.generate(prompt(2, 6), **options)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores))
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits))
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e)
    assert type(output[CACHE]) is FusedKVCache
    assert type(expected[CACHE]) is DynamicCache
    assert output[CACHE].get_seq_length() == 15


def cache_made_by(model, **options):
    output = model.generate(
        prompt(1, 6), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, disable_compile=True, **options
    )
    return output.get(CACHE)


def test_a_choice_of_cache_is_respected(stock, fused):
    """Only the default is replaced: no cache, a named cache, and a passed cache are respected."""
    mine = DynamicCache(config=fused.config)
    assert cache_made_by(fused, **{CACHE: mine}) is mine
    assert cache_made_by(fused, use_cache=False) is None
    assert type(cache_made_by(fused, cache_implementation="static")) is StaticCache
    assert type(cache_made_by(fused)) is FusedKVCache


def test_buffers_are_allocated_for_the_final_length(fused):
    """generate() knows the maximum length, so nothing is moved."""
    cache = cache_made_by(fused)
    assert cache.nbytes == 2 * 2 * (6 + 4 - 1) * 2 * 16 * 4


def test_a_full_cache_stops_generation(fused):
    """If max_cache_len is too small, the cache raises an error; there is no wrong result."""
    cache = FusedKVCache(fused.config, max_cache_len=8)
    with pytest.raises(ValueError, match="max_cache_len is 8 tokens"):
        fused.generate(prompt(1, 6), **{CACHE: cache}, max_new_tokens=10, do_sample=False)
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ONE_FAMILY)
def test_continuous_batching(family, attention):
    """generate_batch passes a paged cache and its indices through every forward: stock's tokens."""
    model = make_model(family, attn_implementation=attention)
    prompts = [prompt(length, seed=length).tolist() for length in (5, 9, 3)]

    def run():
        config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        return [output.generated_tokens for output in outputs.values()]

    expected = run()
    assert [len(tokens) for tokens in expected] == [12, 12, 12]
    for decode in (True, False):
        with apply_torch_fused(model, decode=decode):
            assert run() == expected


class Recording(DynamicCache):
    """A user's cache that records the arguments from attention."""

    def __init__(self, config):
        super().__init__(config=config)
        self.seen = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        handed = {name: sorted(value) for name, value in kwargs.items()}
        self.seen.append((layer_idx, len(args), handed))
        if "kwargs" in kwargs:
            kwargs["kwargs"]["is_causal"] = kwargs["kwargs"].pop("mine") > 0
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_cache_gets_the_arguments_of_attention(family, decode):
    """Its changes to them reach the attention function, as without the patch."""
    model = make_model(family)
    seen, logits = [], []
    for patch in (False, True):
        for mine in (0, 1):
            handle = apply_torch_fused(model, decode=decode) if patch else None
            cache = Recording(model.config)
            with torch.no_grad():
                logits.append(model(prompt(1, 5), **{CACHE: cache}, use_cache=True, mine=mine).logits)
            seen.append(cache.seen)
            if handle is not None:
                handle.revert()
    assert seen[:2] == seen[2:]
    assert len(seen[0]) == 2
    torch.testing.assert_close(logits[2:], logits[:2])
    if seen[0][0][2]:  # from transformers 5.24 on
        assert not torch.equal(logits[0], logits[1])


def test_positional_arguments(stock, fused):
    """Every forward accepts positional arguments like transformers' own."""
    ids, mask, positions = prompt(1, 5), torch.ones(1, 5), torch.arange(5)[None]
    layer, states = stock.model.layers[0], torch.randn(1, 5, 64)
    angles = stock.model.rotary_emb(states, positions)
    with torch.no_grad():
        for make in (lambda: None, lambda: DynamicCache(config=stock.config)):
            torch.testing.assert_close(
                fused(ids, mask, positions, make(), None, None, True, 2).logits,
                stock(ids, mask, positions, make(), None, None, True, 2).logits,
            )
            arguments = (None, positions, make(), True, angles)
            torch.testing.assert_close(fused.model.layers[0](states, *arguments), layer(states, *arguments))
            arguments = (angles, None, make())
            torch.testing.assert_close(
                fused.model.layers[0].self_attn(states, *arguments)[0], layer.self_attn(states, *arguments)[0]
            )
        for module in (fused, fused.model.layers[0]):
            with pytest.raises(TypeError, match="argument"):
                module(*range(12))


# ---- torch_fused.hf.generate ----------------------------------------------------------------------------------------


class Streamer:
    def __init__(self):
        self.tokens = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("patch", [None, {}, {"cache": False}], ids=["stock", "patched", "patched without cache"])
def test_generate_streams_and_leaves_the_model_as_it_was(stock, patch):
    """For a stock model and a patched one: the tokens, the streamer's tokens, a fused cache, no trace."""
    expected = stock.generate(prompt(1, 6), max_new_tokens=12, do_sample=False)
    if patch is not None:
        apply_torch_fused(stock, **patch)
    before = [dict(module.__dict__) for module in stock.modules()]
    streamer = Streamer()
    output = generate(
        stock, prompt(1, 6), max_new_tokens=12, do_sample=False, streamer=streamer, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, expected)
    assert streamer.tokens == expected[0].tolist()
    assert streamer.ended
    assert type(output[CACHE]) is FusedKVCache
    assert [dict(module.__dict__) for module in stock.modules()] == before


def test_generate_takes_what_a_tokenizer_returns(stock):
    """A mapping with a mask, or a tensor of ids; nothing else."""
    inputs = {"input_ids": prompt(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    expected = stock.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(generate(stock, inputs, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(generate(stock, **inputs, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(generate(stock, inputs["input_ids"], max_new_tokens=5, do_sample=False), expected)
    embeds = {"inputs_embeds": stock.get_input_embeddings()(inputs["input_ids"])}
    expected = stock.generate(**embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(generate(stock, embeds, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([1, 2, 3], TypeError, r"inputs must be a tensor of token ids or a mapping, got list; use tokenizer\(text"),
        ("Hello", TypeError, r"inputs must be a tensor of token ids or a mapping, got str; use tokenizer\(text"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor of integers, got list"),
        (torch.ones(1, 3), TypeError, "input_ids must be a tensor of integers, got torch.float32"),
        (
            prompt(3),
            ValueError,
            r"input_ids must have .* got \(3,\); use input_ids\[None\] for one sequence",
        ),
        (
            prompt(1, 2, 3),
            ValueError,
            r"input_ids must have .* both at least 1, got \(1, 2, 3\)$",
        ),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, r"input_ids must have .* both at least 1, got \(1, 0\)$"),
    ],
)
def test_bad_inputs_of_generate(stock, inputs, error, message):
    """As the positional argument or by name; the model does not change."""
    before = [dict(module.__dict__) for module in stock.modules()]
    with pytest.raises(error, match=f"^generate: {message}"):
        generate(stock, inputs, max_new_tokens=2)
    if isinstance(inputs, torch.Tensor):
        with pytest.raises(error, match=f"^generate: {message}"):
            generate(stock, input_ids=inputs, max_new_tokens=2)
    with pytest.raises(TypeError, match=r"^generate: input_ids is passed twice, in inputs and as an argument"):
        generate(stock, prompt(1, 3), input_ids=prompt(1, 3))
    assert [dict(module.__dict__) for module in stock.modules()] == before


def test_pipelines(stock):
    """Patching a pipeline patches its model; other objects raise an error that says what to do."""
    pipe = TextGenerationPipeline(model=stock, tokenizer=small_tokenizer(), device="cpu")
    expected = pipe("the sky is", max_new_tokens=5, do_sample=False)
    tokens = stock.generate(prompt(1, 4), max_new_tokens=5, do_sample=False)
    assert torch.equal(generate(pipe, prompt(1, 4), max_new_tokens=5, do_sample=False), tokens)
    with apply_torch_fused(pipe) as handle:
        assert "Qwen2ForCausalLM.forward" in handle.report()
        assert pipe("the sky is", max_new_tokens=5, do_sample=False) == expected
        assert "4 calls as one op" in handle.report()
    assert "forward" not in stock.__dict__


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ("Qwen/Qwen2", r"'Qwen/Qwen2'; load it with AutoModelForCausalLM.from_pretrained\('Qwen/Qwen2'\)"),
        (None, "NoneType"),
        (Qwen2ForCausalLM, "type"),
        ({}, "dict"),
    ],
)
def test_something_that_is_not_a_model(given, got):
    with pytest.raises(TypeError, match=rf"^apply_torch_fused: model must be .* or a pipeline, got {got}$"):
        apply_torch_fused(given)
    with pytest.raises(TypeError, match=rf"^generate: model must be .* with generate\(\), or a pipeline, got {got}$"):
        generate(given, prompt(1, 3))


def test_a_model_that_cannot_generate(stock):
    with pytest.raises(TypeError, match=r"with generate\(\), or a pipeline, got Qwen2Model$"):
        generate(stock.model, prompt(1, 3))


def test_is_available_from_the_package():
    """`torch_fused.hf` loads on first use."""
    assert torch_fused.hf.generate is generate


# ---- threads --------------------------------------------------------------------------------------------------------


def in_threads(*jobs, times=15):
    """Runs each job this many times in its own thread, all at once, with frequent thread switches."""
    errors = []

    def run(job):
        try:
            for _ in range(times):
                job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def answers(model, batch=1, run=None):
    """A job that generates and checks the tokens."""
    options = {"max_new_tokens": 5, "do_sample": False}
    ids = prompt(batch, 4, seed=batch)
    expected = make_model().generate(ids, **options)

    def job():
        tokens = model.generate(ids, **options) if run is None else run(model, ids, **options)
        assert torch.equal(tokens, expected)

    return job


def test_threads_with_one_model_that_is_not_patched(stock):
    """hf.generate patches during a call: one call after the other, with model.generate running at the same time."""
    before = [dict(module.__dict__) for module in stock.modules()]
    without = partial(generate, decode=False)
    jobs = [answers(stock, batch, run) for batch in (1, 2) for run in (generate, without)]
    in_threads(*jobs, answers(stock, 3))
    assert [dict(module.__dict__) for module in stock.modules()] == before


def test_threads_with_one_patched_model(fused):
    """Calls run at the same time, each with its own cache, and all of them are counted."""
    handle = apply_torch_fused(fused)
    in_threads(*(answers(fused, batch, run) for batch in (1, 2) for run in (generate, None)))
    assert "240 calls as one op" in handle.report()  # 4 threads, 15 calls, 4 tokens after the first
    fused.model.rotary_emb.inv_freq.mul_(1)
    in_threads(*(answers(fused, 1, run) for run in (generate, None)), lambda: handle.report())


def test_threads_that_patch_and_revert(stock):
    """While others generate: no exception, stock's tokens, and no trace in the end."""
    before = [dict(module.__dict__) for module in stock.modules()]
    jobs = [answers(stock, 1, generate), answers(stock, 2), answers(stock, 3, generate)]
    in_threads(*jobs, *(lambda: apply_torch_fused(stock).revert() for _ in range(2)))
    assert [dict(module.__dict__) for module in stock.modules()] == before


def test_generate_inside_generate(stock):
    """A stopping criterion that calls the same model does not deadlock."""

    class Asking(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            answers(stock, 2, generate)()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = stock.generate(prompt(1, 4), max_new_tokens=4, do_sample=False)
    criteria = StoppingCriteriaList([Asking()])
    tokens = generate(stock, prompt(1, 4), max_new_tokens=4, do_sample=False, stopping_criteria=criteria)
    assert torch.equal(tokens, expected)


def test_an_exception_in_the_middle(stock):
    """From a streamer, after some tokens: the model is as before, and a handle and its model continue to work."""

    class Failing(Streamer):
        def put(self, value):
            super().put(value)
            if len(self.tokens) == 9:
                raise KeyboardInterrupt

    options = {"max_new_tokens": 12, "do_sample": False}
    expected = stock.generate(prompt(1, 4), **options)
    before = [dict(module.__dict__) for module in stock.modules()]
    with pytest.raises(KeyboardInterrupt):
        generate(stock, prompt(1, 4), streamer=Failing(), **options)
    assert [dict(module.__dict__) for module in stock.modules()] == before
    with apply_torch_fused(stock) as handle:
        for run in (generate, type(stock).generate):
            with pytest.raises(KeyboardInterrupt):
                run(stock, prompt(1, 4), streamer=Failing(), **options)
            assert torch.equal(run(stock, prompt(1, 4), **options), expected)
        assert "decode: steps of up to 8 tokens run as one op" in handle.report()
    assert [dict(module.__dict__) for module in stock.modules()] == before
