"""greedy, sample and filter_logits: one token on every backend, Hugging Face's kept sets, the distribution."""

import itertools
import random
from fractions import Fraction

import pytest
import torch
from decode_step import Step
from torch.library import opcheck
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import torch_fused
from torch_fused.ops.decode import decode_token_
from torch_fused.ops.decoder import make_decoder
from torch_fused.ops.sampling import (
    _random_bits,
    _share_of,
    _weights,
    filter_logits_reference,
    greedy_reference,
    sample_reference,
)
from torch_fused.sampling import filter_logits, greedy, sample
from torch_fused.testing import make, misleading_row

INF = torch.inf

FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"top_k": 3},
    {"top_p": 0.6},
    {"temperature": 3.0, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 400, "top_p": 0.95, "min_p": 0.02},
]


def rows_of_every_kind(vocabulary: int) -> torch.Tensor:
    """Normal, peaked, flat, tied, masked, special and adversarial rows (an outlier far above nearly equal values)."""
    x = make(8, vocabulary, scale=3.0)
    x[1] *= 20
    x[2] = 1.5
    x[3] = x[3].round()
    x[4, torch.arange(vocabulary) % 3 != 0] = -INF
    x[5, ::5], x[5, 1::7], x[5, 2::11] = torch.nan, -INF, -0.0
    x[6] = 5 + make(vocabulary, seed=1, scale=1e-6)
    x[6, vocabulary // 2] = 9
    x[7] = -x[7].abs() - 1e30
    return x


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 700, 2500])
def test_matches_the_reference(backend, vocabulary):
    """Every kind of row and filter gives the reference's kept set and its tokens, bit for bit."""
    rows = rows_of_every_kind(vocabulary)
    emulated = backend.name == "emulated"  # thorough and slow
    seeds, filters = (range(1), FILTERS[1::3] + FILTERS[-1:]) if emulated else (range(4), FILTERS)
    for kwargs in filters:
        expected = filter_logits_reference(rows, **kwargs)
        assert torch.equal(filter_logits(rows.to(backend.device), **kwargs).cpu(), expected), kwargs
        for seed in seeds:
            ids, valid = sample(rows.to(backend.device), seed=seed, offset=7, return_valid=True, **kwargs)
            expected_ids, expected_valid = sample_reference(rows, seed=seed, offset=7, **kwargs)
            assert torch.equal(ids.cpu(), expected_ids) and torch.equal(valid.cpu(), expected_valid), kwargs


def test_whole_vocabulary(backend):
    """Qwen's vocabulary: many slices, blocks on both CPU threads; top_k above and below the number of blocks."""
    x = make(1, 151936, scale=2.0)
    for kwargs in ({"top_k": 50, "top_p": 0.9}, {"top_k": 5000, "min_p": 1e-4}, {"top_p": 0.95}):
        actual = sample(x.to(backend.device), seed=3, **kwargs)
        assert torch.equal(actual.cpu(), sample_reference(x, seed=3, **kwargs)[0])
        if backend.name == "emulated":
            break
    assert torch.equal(greedy(x.to(backend.device)).cpu(), x.argmax(-1))


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_sample_that_misleads(backend, scale):
    """A row whose sampled tokens are the least likely ones, so that one bucket has all others; also with ties."""
    x = misleading_row(7000, scale)
    for kwargs in ({}, {"top_k": 3000}, {"top_p": 0.6}, {"top_k": 5000, "top_p": 0.3}):
        expected = filter_logits_reference(x, **kwargs)
        assert torch.equal(filter_logits(x.to(backend.device), **kwargs).cpu(), expected), kwargs
        for seed in range(2):
            actual = sample(x.to(backend.device), seed=seed, **kwargs)
            assert torch.equal(actual.cpu(), sample_reference(x, seed=seed, **kwargs)[0]), kwargs


def test_every_dtype(backend):
    """Half types rank by their value in float32, float64 after rounding to float32."""
    for dtype in backend.dtypes:
        x = make(3, 300, dtype=dtype, scale=4.0)
        moved, kwargs = x.to(backend.device), {"temperature": 0.8, "top_p": 0.7}
        result = filter_logits(moved, **kwargs)
        assert result.dtype == dtype
        assert torch.equal(result.cpu(), filter_logits_reference(x, **kwargs))
        assert torch.equal(sample(moved, seed=5, **kwargs).cpu(), sample_reference(x, seed=5, **kwargs)[0])
        assert torch.equal(greedy(moved).cpu(), greedy_reference(x.float()))


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_kept_set_is_hugging_faces(scale):
    """Temperature, top-k, top-p and min-p keep Hugging Face's tokens, except for 3 at a rounding edge."""
    x = make(3, 8000, scale=scale)
    x[1] = x[1].bfloat16().float()  # ties
    for temperature, top_k, top_p, min_p in itertools.product((1.0, 0.6, 1.7), (None, 50), (None, 0.9), (None, 0.03)):
        scores = TemperatureLogitsWarper(temperature)(None, x) if temperature != 1.0 else x
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p else scores
        scores = MinPLogitsWarper(min_p)(None, scores) if min_p else scores
        ours = filter_logits(x, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        # If top_p ends among equal tokens, Hugging Face's sort may keep other ones: compare their number.
        kept, expected = ours > -INF, scores > -INF
        values = ours.masked_fill(~kept, 0).sort(-1).values, scores.masked_fill(~expected, 0).sort(-1).values
        assert ((kept.sum(-1) - expected.sum(-1)).abs() <= 3).all()
        assert ((values[0] != values[1]).sum(-1) <= 3).all() or ((kept ^ expected).sum(-1) <= 3).all()
        assert torch.equal(ours[kept], (x / temperature)[kept])


def test_kept_set_of_a_whole_vocabulary_is_exact():
    """Of 151,936 logits, top_p keeps the same as in float64, although many tokens are near its edge."""
    for scale, top_p in itertools.product((1.0, 2.0, 5.0), (0.3, 0.9, 0.95)):
        x = make(4, 151936, scale=scale)
        running = x.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        count = (filter_logits(x, top_p=top_p) > -INF).sum(-1)
        assert torch.equal(count, (running < top_p).sum(-1) + 1)


def test_kept_set_of_a_whole_vocabulary_is_hugging_faces():
    """151,936 logits, from flat to peaked: the same tokens, except for 3 at a rounding edge."""
    for scale, temperature, top_k in itertools.product((1.0, 2.0, 5.0), (1.0, 0.7), (None, 50)):
        x = make(1, 151936, scale=scale)
        scores = TemperatureLogitsWarper(temperature)(None, x)
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        expected = TopPLogitsWarper(0.9)(None, scores) > -INF
        kept = filter_logits(x, temperature=temperature, top_k=top_k, top_p=0.9) > -INF
        assert (kept ^ expected).sum() <= 3


def decimal_rows(count: int, seed: int):
    """Rows of probabilities that are multiples of a simple decimal, and a number that is reached exactly or between."""
    choose = random.Random(seed)
    for _ in range(count):
        unit = choose.choice([8, 10, 20, 40, 100, 1000])
        vocabulary = min(unit, choose.choice([2, 3, 4, 5, 8, 10, 16, 20, 50, 100, 200]))
        cuts = [0, *sorted(choose.sample(range(1, unit), vocabulary - 1)), unit]
        row = [Fraction(end - start, unit) for start, end in itertools.pairwise(cuts)]
        choose.shuffle(row)
        share = sum(sorted(row, reverse=True)[: choose.randint(1, vocabulary - 1)])
        yield row, share if choose.random() < 0.8 else Fraction(choose.randint(1, unit - 1), unit)


def decimal_logits(row, offset: float, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.tensor([float(p) for p in row], dtype=dtype).log()
    return ((logits + offset) * temperature).float()


def exact_top_p(row, top_p: Fraction) -> list[int]:
    total, kept = Fraction(0), []
    for index in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        kept.append(index)
        total += row[index]
        if total >= top_p:
            break
    return sorted(kept)


def test_top_p_that_is_reached_exactly(backend):
    """Hugging Face's regression case, and a top_p that the first tokens reach exactly, or between two tokens."""
    x = torch.tensor([0.3, 0.1, 0.1, 0.5]).log()
    assert kept(x, backend, top_p=0.8) == [0, 3]
    assert kept(x, backend, top_p=torch.tensor(0.8)) == [0, 3]
    assert kept(x, backend, top_p=0.5) == [3]
    assert kept(x, backend, top_p=0.9) == [0, 1, 3]  # equal ones lowest index first
    assert kept(x, backend, top_p=0.800001) == kept(x, backend, top_p=0.899999) == [0, 1, 3]
    assert kept(x, backend, top_p=0.799999) == [0, 3]


# (added to the logarithms of the probabilities, temperature, dtype of the logarithms)
DECIMALS = [
    (0.0, 1.0, torch.float32),
    (0.0, 1.0, torch.float64),
    (3.0, 1.0, torch.float64),
    (-10.0, 0.7, torch.float32),
    (300.0, 1.0, torch.float64),
    (0.0, 2.3, torch.float32),
]


@pytest.mark.parametrize(("offset", "temperature", "dtype"), DECIMALS)
def test_top_p_of_decimal_rows(offset, temperature, dtype):
    """1,000 rows, 800 of them with a top_p that is reached exactly: what decimal arithmetic keeps, where HF may err.

    As a float, and, to float32's rounding, as a tensor.
    """
    wrong = 0
    for row, top_p in decimal_rows(1000, seed=int(offset)):
        x = decimal_logits(row, offset, temperature, dtype)
        expected = torch.zeros(len(row), dtype=torch.bool)
        expected[exact_top_p(row, top_p)] = True
        for given in (float(top_p), torch.tensor(float(top_p))):
            ours = filter_logits(x, temperature=temperature, top_p=given) > -INF
            assert torch.equal(ours, expected), (row, top_p, given)
        theirs = TopPLogitsWarper(float(top_p))(None, (x / temperature)[None])[0] > -INF
        wrong += int(theirs.sum()) != int(expected.sum())
    assert wrong > 0


@pytest.mark.parametrize(("offset", "temperature", "dtype"), DECIMALS)
def test_min_p_and_top_k_of_decimal_rows(offset, temperature, dtype):
    """min_p as the ratio of two probabilities, and top_k among equal ones: what decimal arithmetic keeps."""
    for row, _ in decimal_rows(300, seed=int(offset) + 1):
        x = decimal_logits(row, offset, temperature, dtype)
        ratio = row[0] / max(row)
        for min_p in (ratio, 1 - ratio):
            expected = torch.tensor([p >= min_p * max(row) for p in row])
            for given in (float(min_p), torch.tensor(float(min_p))):
                ours = filter_logits(x, temperature=temperature, min_p=given) > -INF
                assert torch.equal(ours, expected), (row, min_p, given)
        k = 1 + len(row) // 3
        expected = torch.tensor([p >= sorted(row, reverse=True)[k - 1] for p in row])
        assert torch.equal(filter_logits(x, temperature=temperature, top_k=k) > -INF, expected)


def test_decimal_rows_on_every_device(backend):
    """The kernels keep the same tokens as the reference, also if the last token is dropped: first index, equal ones."""
    cases = list(decimal_rows(40 if backend.name == "emulated" else 300, seed=5))
    cases += [([Fraction(1, 4)] * 4, Fraction(3, 4)), ([Fraction(1)], Fraction(1, 2))]
    cases += [([Fraction(1, 5), Fraction(3, 10), Fraction(1, 2)], Fraction(4, 5))]
    width = max(len(row) for row, _ in cases)
    x = torch.full((len(cases), width), -INF)
    for i, (row, _) in enumerate(cases):
        x[i, : len(row)] = decimal_logits(row, 0.0, 1.0, torch.float64)
    top_p = torch.tensor([float(top_p) for _, top_p in cases], device=backend.device)
    filtered = filter_logits(x.to(backend.device), top_p=top_p).cpu()
    for i, (row, exact) in enumerate(cases):
        assert (filtered[i] > -INF).nonzero().flatten().tolist() == exact_top_p(row, exact), (row, exact)
    ids = sample(x.to(backend.device), top_p=top_p, seed=3).cpu()
    assert (filtered.gather(1, ids[:, None]) > -INF).all()
    row_parameters = torch.stack(
        [torch.ones(len(cases)), torch.zeros(len(cases)), top_p.cpu(), torch.zeros(len(cases))], 1
    )
    assert torch.equal(ids, sample_reference(x, row_parameters=row_parameters, seed=3)[0])


def test_equal_tokens_reach_top_p(backend):
    """k equal tokens of V reach k / V and not more, for any V and any logit."""
    for vocabulary, value in ((1000, 0.0), (1000, 300.0), (1000, -1e4), (9001, 20.0)):
        x = torch.full((vocabulary,), value)
        for k in (1, 7, vocabulary // 3, vocabulary - 1):
            assert kept(x, backend, top_p=k / vocabulary) == list(range(k)), (vocabulary, value, k)
            assert kept(x, backend, top_p=(k + 0.5) / vocabulary) == list(range(k + 1))
        if backend.name == "emulated":
            break


def test_weights_are_powers_of_two():
    """The fixed-point weight is 2^40 * 2^x to a step of 2^-24 octaves, never grows, and rounds to 0 in the end."""
    octaves = torch.cat([torch.zeros(1), torch.linspace(0, 43, 100001)]).neg().unsqueeze(0)
    weights = _weights(octaves, torch.ones(1, 1))
    exact = 2.0 ** (40 + octaves.double())
    error = (weights - exact).abs()
    assert (error <= exact * 6e-8 + 0.51).all()
    assert (weights.diff() <= 0).all() and int(weights[0, 0]) == 2**40 and int(weights[0, -1]) == 0


def test_philox_known_answers():
    """Random123's published vectors of philox4x32-10, and the 128-bit product that scales them."""
    high, low = _random_bits(torch.zeros(2, dtype=torch.int64), 1)
    assert (int(high), int(low)) == (0x6627E8D5, 0xE169C58D)
    for bits, total in (((2**64 - 1), 2**59 - 1), (0x123456789ABCDEF0, 2**40 + 12345), (2**63, 3)):
        parts = torch.tensor([[bits >> 32]]), torch.tensor([[bits & 0xFFFFFFFF]])
        assert int(_share_of(torch.tensor([[total]]), *parts)) == bits * total >> 64


def chi_square(draws: int, device: str) -> None:
    """Frequencies fit the filtered softmax: chi-square below its 1 - 1e-6 quantile (11 cells: 48.1)."""
    x = torch.tensor(
        [2.0, -1.0, 0.5, 0.0, 1.0, 1.5, -0.5, 0.25, -2.0, 0.75, 1.25, -1.5, -INF, torch.nan], device=device
    )
    for kwargs in ({}, {"temperature": 2.0}, {"top_k": 6, "temperature": 0.7}, {"top_p": 0.8}):
        ids = sample(x.expand(draws, -1), seed=11, **kwargs)
        kept = filter_logits_reference(x.cpu(), **kwargs)
        expected = kept.double().softmax(-1) * draws
        counts = torch.bincount(ids.cpu(), minlength=len(x)).double()
        assert counts[expected == 0].sum() == 0
        cells = expected > 0
        assert ((counts - expected)[cells] ** 2 / expected[cells]).sum() < 48.1


def test_frequencies(backend):
    """Draws follow the distribution. The emulated kernels draw the CPU's tokens, so a few of them are enough."""
    if backend.name == "emulated":
        x = make(6, 40)
        assert torch.equal(sample(x, seed=11), sample_reference(x, seed=11)[0])
    else:
        chi_square(20_000, backend.device)


@pytest.mark.full
def test_frequencies_of_many_draws():
    """The same with ten times as many draws."""
    chi_square(200_000, "cpu")


def test_frequencies_of_a_whole_vocabulary():
    """200,000 draws from 151,936 logits: none outside the kept set, the others follow the softmax."""
    x, draws, kwargs = make(1, 151936, scale=2.0), 200_000, {"temperature": 0.7, "top_k": 20}
    ids = sample(x.expand(draws, -1), seed=11, **kwargs)
    expected = filter_logits_reference(x, **kwargs)[0].double().softmax(-1) * draws
    counts = torch.bincount(ids, minlength=x.shape[1]).double()
    cells = expected > 0
    assert cells.sum() == 20 and counts[cells].sum() == draws
    assert ((counts - expected)[cells] ** 2 / expected[cells]).sum() < 64.4  # the 1 - 1e-6 quantile of 20 cells


# ---- edges ----------------------------------------------------------------------------------------------------------


def kept(x: torch.Tensor, backend, **kwargs) -> list[int]:
    return (filter_logits(x.to(backend.device), **kwargs) > -INF).nonzero().flatten().tolist()


def test_edges_of_the_filters(backend):
    """The limits of each parameter, and ties: all at the k-th value, the lowest index first at the edge of top_p."""
    x = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 2.0])
    everything = list(range(6))
    assert kept(x, backend, top_k=1) == [1, 3]
    assert kept(x, backend, top_k=3) == [1, 2, 3, 5]
    assert kept(x, backend, top_k=6) == kept(x, backend, top_k=10**9) == everything
    assert kept(x, backend, top_p=0.0) == [1]
    assert kept(x, backend, top_p=1.0) == kept(x, backend, min_p=0.0) == kept(x, backend) == everything
    assert kept(torch.zeros(8), backend, top_p=0.5) == [0, 1, 2, 3]
    assert kept(x, backend, min_p=1.0) == [1, 3]
    assert kept(x, backend, min_p=0.3) == [1, 2, 3, 5]
    assert kept(torch.tensor([0.0, -0.0, -1.0]), backend, top_k=1) == [0, 1]


def test_temperature_zero_is_greedy(backend):
    """The lowest index of the maximum, for any seed and filters; only its logit is kept, unchanged."""
    x = torch.tensor([1.0, 3.0, 2.0, 3.0]).to(backend.device)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}):
        assert {int(sample(x, temperature=0.0, seed=seed, **filters)) for seed in range(4)} == {1}
        assert filter_logits(x, temperature=0.0, **filters).tolist() == [-INF, 3.0, -INF, -INF]


def test_filtered_logits_are_divided(backend):
    """By the temperature, rounded once to the result's dtype, like Hugging Face's processors; also per row."""
    for dtype in backend.dtypes:
        x = make(3, 300, dtype=dtype, scale=4.0)
        for temperature in (0.7, 1.0, 3.0):
            scores = TopKLogitsWarper(300)(None, TemperatureLogitsWarper(temperature)(None, x))
            assert torch.equal(filter_logits(x.to(backend.device), temperature=temperature).cpu(), scores)
        each = torch.tensor([0.5, 1.0, 1.7])
        filtered = filter_logits(x.to(backend.device), temperature=each.to(backend.device), top_k=20).cpu()
        expected = (x.to(torch.promote_types(dtype, torch.float32)) / each[:, None]).to(dtype)
        assert torch.equal(filtered[filtered > -INF], expected[filtered > -INF])
        probabilities = filtered.double().softmax(-1)
        assert ((probabilities > 0).sum(-1) >= 20).all()


def test_special_values(backend):
    """+inf is always drawn, NaN and -inf never; a row with nothing to draw is invalid and gives 0."""
    nan = torch.nan
    x = torch.tensor([[0.0, INF, 5.0, nan], [nan, -INF, 1.0, -INF], [nan, -INF, nan, -INF], [-INF] * 4])
    for kwargs in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}):
        ids, valid = sample(x.to(backend.device), seed=1, return_valid=True, **kwargs)
        assert ids.tolist() == [1, 2, 0, 0] and valid.tolist() == [True, True, False, False]
    assert greedy(x.to(backend.device)).tolist() == [1, 2, 0, 0]
    two = torch.tensor([INF, 3.0, INF]).to(backend.device)
    assert {int(sample(two, seed=seed)) for seed in range(8)} == {0, 2}


def test_a_row_with_nothing_to_draw_is_an_error_on_the_cpu():
    """The error names the row."""
    x = make(3, 10)
    x[1] = -INF
    with pytest.raises(RuntimeError, match=r"sample: logits .* row 1 has only NaN and -inf"):
        sample(x, seed=1)


def test_an_error_moves_no_generator(backend):
    """A row without tokens, and each bad argument: the next draw is the same as without the error."""
    x, bad = make(3, 200, device=backend.device), make(3, 200)
    bad[1] = torch.where(torch.arange(200) % 2 == 0, -INF, torch.nan)
    calls = [lambda g: sample(x, top_k=0, generator=g), lambda g: sample(x, top_p=torch.tensor(2.0), generator=g)]
    calls += [lambda g: sample(x[None], generator=g), lambda g: sample(x, temperature=INF, generator=g)]
    if backend.name == "cpu":
        calls += [lambda g: sample(bad, generator=g), lambda g: sample(bad[:, ::2], generator=g)]
        calls += [lambda g: sample(torch.full((70,), -INF), generator=g)]
    for device in {"cpu", backend.device}:
        generator = torch.Generator(device).manual_seed(1)
        for source in (generator, None) if device == "cpu" else (generator,):
            state = torch.get_rng_state() if source is None else source.get_state()
            for call in calls:
                with pytest.raises(RuntimeError, match="sample: "):
                    call(source)
                assert torch.equal(torch.get_rng_state() if source is None else source.get_state(), state)
    last = torch.full((2, 5000), -INF)
    last[:, -1] = 1.0
    assert sample(last.to(backend.device), seed=1).tolist() == [4999, 4999]


def test_an_error_of_a_decode_step_moves_no_generator():
    """decode_token_ checks its filters before it writes the cache; NaN logits do not change the slots in use."""
    step = Step()
    args = {name: value for name, value in step.args.items() if name != "logits_to_keep"}
    args["model"] = make_decoder(**step.model)
    caches, state = [*args["keys"], *args["values"]], torch.get_rng_state()
    before = [cache.clone() for cache in caches]
    for filters in ({"top_k": 0}, {"top_p": 2.0}, {"min_p": -1.0}, {"temperature": INF}):
        with pytest.raises(RuntimeError, match=f"decode_token_: {next(iter(filters))} must be"):
            decode_token_(**args, do_sample=True, **filters)
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
    step.model["head"][7] = torch.nan
    with pytest.raises(RuntimeError, match=r"no NaN or .inf .* row 0 has"):
        decode_token_(**args, do_sample=True)
    used = slice(0, step.length)
    assert all(torch.equal(cache[:, :, used], old[:, :, used]) for cache, old in zip(caches, before, strict=True))
    assert decode_token_(**args).tolist() == [7]
    assert torch.equal(torch.get_rng_state(), state)


def test_shapes_and_strides(backend):
    """A row, a batch, no rows; row strides, expanded and transposed logits."""
    base = make(4, 80, device=backend.device)
    assert sample(base[0], seed=1).shape == greedy(base[0]).shape == ()
    assert sample(base[:0], seed=1).shape == greedy(base[:0]).shape == (0,)
    assert filter_logits(base[:0]).shape == (0, 80)
    for view in (base[:, 3:70], base[::2], base[:1].expand(3, 80), base[:, :4].t(), base[:, ::3], base[2, 5:]):
        dense = view.contiguous()
        assert torch.equal(sample(view, seed=2), sample(dense, seed=2))
        assert torch.equal(filter_logits(view, top_p=0.5), filter_logits(dense, top_p=0.5))
        assert torch.equal(greedy(view), greedy(dense))


def test_greedy(backend):
    """argmax, with the lowest index of equal maxima, across slices and packs."""
    for vocabulary in (1, 7, 64, 2048, 2049, 9001):
        x = rows_of_every_kind(vocabulary) if vocabulary > 64 else make(8, vocabulary)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(greedy(x.to(backend.device, dtype)).cpu(), greedy_reference(x.to(dtype)))


# ---- parameters and random numbers ----------------------------------------------------------------------------------


def test_parameters_of_each_row(backend):
    """(batch,) tensors give each row the same as a scalar call; scalars and tensors can be mixed."""
    x = make(4, 500, scale=2.0, device=backend.device)
    temperature, top_k = torch.tensor([0.0, 0.7, 1.0, 1.9]), torch.tensor([0, 5, 50, 1000])
    top_p, min_p = torch.tensor([0.9, 1.0, 0.5, 0.95]), torch.tensor([0.0, 0.1, 0.0, 0.01])
    moved = [t.to(backend.device) for t in (temperature, top_k, top_p, min_p)]
    names = ("temperature", "top_k", "top_p", "min_p")
    ids = sample(x, seed=4, **dict(zip(names, moved, strict=True)))
    filtered = filter_logits(x, **dict(zip(names, moved, strict=True)))
    for row in range(4):
        scalars = {"temperature": float(temperature[row]), "top_k": int(top_k[row]) or None}
        scalars |= {"top_p": float(top_p[row]), "min_p": float(min_p[row])}
        assert int(ids[row]) == int(sample(x, seed=4, **scalars)[row])
        assert torch.equal(filtered[row], filter_logits(x, **scalars)[row])
    assert torch.equal(filter_logits(x, top_k=5, top_p=moved[2])[2], filter_logits(x, top_k=5, top_p=0.5)[2])


def test_seeds(backend):
    """A seed and an offset determine the draw, as numbers or tensors; rows and offsets draw independently."""
    x = torch.zeros(12, 1000, device=backend.device)
    first = sample(x, seed=2**40 + 5, offset=9)
    as_tensor = [torch.tensor(value, device=backend.device) for value in (2**40 + 5, 9)]
    assert torch.equal(first, sample(x, seed=as_tensor[0], offset=as_tensor[1]))
    assert torch.equal(first, sample(x, seed=2**40 + 5, offset=as_tensor[1]))
    assert len(first.unique()) > 8
    for other in (sample(x, seed=2**40 + 5, offset=10), sample(x, seed=5, offset=9)):
        assert (other != first).float().mean() > 0.7


def test_generators(backend):
    """Without a seed, one is drawn from the generator: reproducible, and different the next time."""
    x = torch.zeros(12, 1000, device=backend.device)
    for device in {"cpu", backend.device}:
        generator = torch.Generator(device).manual_seed(1)
        first, second = sample(x, generator=generator), sample(x, generator=generator)
        assert (first != second).float().mean() > 0.7
        assert torch.equal(first, sample(x, generator=generator.manual_seed(1)))
    torch.manual_seed(3)
    first = sample(x)
    torch.manual_seed(3)
    assert torch.equal(first, sample(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sample(x, top_k=0), "sample: top_k must be at least 1, or None for no filter, got 0"),
        (lambda x: sample(x, top_p=1.5), "sample: top_p must be from 0 to 1, got 1.5"),
        (lambda x: sample(x, min_p=-0.1), "sample: min_p must be from 0 to 1, got -0.1"),
        (lambda x: filter_logits(x, temperature=-1.0), "filter_logits: temperature must be finite and not negative"),
        (lambda x: sample(x, temperature=float("nan")), "sample: temperature must be finite and not negative, got nan"),
        (lambda x: sample(x[None]), r"sample: logits must be .* got \[1, 4, 8\]"),
        (lambda x: greedy(x[:, :0]), "greedy: logits must have 1 to 1048576 tokens, got 0"),
        (lambda x: greedy(x.int()), "greedy: logits must be float32.*got Int"),
        (lambda x: sample(x, top_p=x[:3, 0]), r"sample: top_p must be a scalar or of shape \(4,\), got \(3,\)"),
        (lambda x: sample(x, seed=x[0, 0]), "sample: seed must be one int64, got torch.float32"),
        (lambda x: sample(x, offset=torch.ones(1, dtype=torch.int64)), "sample: offset as a tensor needs a seed"),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything runs; the error names the op and the argument."""
    with pytest.raises(RuntimeError, match=message):
        call(make(4, 8, device=backend.device))


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        *(("temperature", bad, "must be finite and not negative") for bad in (INF, -INF, torch.nan, -0.5, 1e300)),
        *(("top_k", bad, "must be a whole number, at least 1, or 0 for no filter") for bad in (-1, 2.5, torch.nan)),
        *(("top_p", bad, "must be from 0 to 1") for bad in (1.5, -0.1, torch.nan, INF, 1.00000001)),
        *(("min_p", bad, "must be from 0 to 1") for bad in (1.5, -0.1, torch.nan, INF)),
    ],
)
def test_bad_values_in_parameter_tensors(backend, name, bad, message):
    """Tensors on the CPU are checked like numbers, in their own dtype, for logits on any device; the row is named."""
    good = {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}[name]
    message = rf": {name} {message}, got .* in row"
    one, each = torch.tensor(bad, dtype=torch.float64), torch.tensor([good, bad], dtype=torch.float64)
    for device in (backend.device, "meta"):
        x = make(2, 8).to(device)
        for op in (sample, filter_logits):
            with pytest.raises(RuntimeError, match=f"{op.__name__}{message} 0"):
                op(x, **{name: one})
            with pytest.raises(RuntimeError, match=f"{op.__name__}{message} 1"):
                op(x, **{name: each})
            with pytest.raises(RuntimeError, match=f"{op.__name__}{message} 0"):
                op(x[:0], **{name: one})
    with pytest.raises(RuntimeError, match=rf"sample: {name} must be a scalar .* of torch.complex64"):
        sample(make(2, 8), **{name: torch.ones(2, dtype=torch.complex64)})


def test_bad_numbers_next_to_tensors(backend):
    """A number is also checked if another parameter is a tensor."""
    x, tensor = make(2, 8, device=backend.device), torch.tensor(0.5)
    for name, bad in (("temperature", INF), ("temperature", -1.0), ("top_k", -1), ("min_p", 1.5)):
        with pytest.raises(RuntimeError, match=f"sample: {name} must be"):
            sample(x, **{name: bad}, top_p=tensor)
    with pytest.raises(RuntimeError, match="sample: top_p must be"):
        sample(x, temperature=tensor, top_p=torch.nan)


def test_parameters_the_op_is_given():
    """Arguments passed directly to torch.ops are checked."""
    for column, bad, name in ((0, INF, "temperature"), (1, -1.0, "top_k"), (2, 2.0, "top_p"), (3, torch.nan, "min_p")):
        parameters = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).repeat(3, 1)
        parameters[2, column] = bad
        for op in (torch.ops.torch_fused.sample, torch.ops.torch_fused.filter_logits):
            with pytest.raises(RuntimeError, match=rf": {name} must be .* in row 2"):
                op(make(3, 8), row_parameters=parameters)


# ---- kernels and torch's machinery ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [("sequential", 0), ("reversed", 0), ("random", 0), ("random", 1), ("random", 2), ("preemptive", 0)],
)
def test_every_schedule_gives_the_same_bits(schedule, seed):
    """No thread order changes a token or a kept set, and there are no races."""
    x = rows_of_every_kind(2500)[3:7]
    kwargs = {"top_k": 900, "top_p": 0.9, "min_p": 0.001}
    with torch_fused.metal.emulate(schedule=schedule, seed=seed):
        ids, filtered, best = sample(x, seed=1, **kwargs), filter_logits(x, **kwargs), greedy(x)
    assert torch.equal(ids, sample_reference(x, seed=1, **kwargs)[0])
    assert torch.equal(filtered, filter_logits_reference(x, **kwargs))
    assert torch.equal(best, greedy_reference(x))


def test_launches_and_traffic():
    """Greedy takes two launches, sampling and filtering three for any row; sampling reads the logits twice."""
    nbytes = 2 * 5000 * 4
    for x in (make(2, 5000), torch.zeros(2, 5000)):
        with torch_fused.metal.emulate() as run:
            greedy(x)
            assert [launch.kernel for launch in run.launches] == ["greedy_slices_f32", "greedy_rows"]
            assert run.launches[0].buffers[0].read == nbytes
            run.clear()
            sample(x, top_k=50, top_p=0.9, seed=1)
            kernels = [launch.kernel for launch in run.launches]
            assert kernels == ["sampling_survey_f32", "sampling_divide_f32", "sampling_draw"]
            sampled = 2 * 1024 * 4
            assert [launch.buffers[0].read for launch in run.launches[:2]] == [nbytes + sampled, nbytes]
            run.clear()
            filtered = filter_logits(x, top_p=0.9)
            assert len(run.launches) == 3
            assert run.launches[2].buffers[8].written == filtered.nbytes


def test_opcheck(backend):
    """Schemas, fakes and dispatch are consistent."""
    x, ops = make(3, 50, device=backend.device), torch.ops.torch_fused
    opcheck(ops.greedy.default, (x,))
    opcheck(ops.filter_logits.default, (x, 0.7, 5, 0.9, 0.1))
    opcheck(ops.sample.default, (x, 0.7, 5, 0.9, 0.1), {"seed": 3, "offset": 4})
    opcheck(ops._next_token.default, (x, False))
    opcheck(ops._check_sampling_parameter.default, ("sample", "top_p", torch.ones(3)))
    assert torch.Tag.nondeterministic_seeded in ops.sample.default.tags


def test_compile_fullgraph(backend):
    """torch.compile traces a step of sampling without a graph break."""

    def step(x):
        return sample(filter_logits(x, top_k=5), temperature=0.8, seed=2), greedy(x)

    x = make(3, 60, device=backend.device)
    for actual, expected in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x), strict=True):
        assert torch.equal(actual, expected)


def test_derivatives_of_filter_logits(backend):
    """Kept logits have derivatives, in both modes and orders, as with torch's masked_fill."""
    x = make(3, 20, device=backend.device)

    def exact(logits):
        return logits.masked_fill(logits < logits.topk(5)[0][..., -1:], -torch.inf)

    def derivatives(filtered):
        def loss(logits):
            return filtered(logits).softmax(-1).square().sum()

        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        per_row = torch.func.vmap(torch.func.grad(loss))(x)
        return first, second, per_row, torch.func.jvp(lambda t: filtered(t).softmax(-1), (x,), (x.cos(),))[1]

    for result, expected in zip(derivatives(lambda t: filter_logits(t, top_k=5)), derivatives(exact), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)
