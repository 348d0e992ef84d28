"""decode_: a step of a whole decoder gives the same as plain torch, for any model, cache and CPU."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from decode_step import DTYPES, Shape, Step, token
from torch.library import opcheck

from torch_fused.metal import emulate
from torch_fused.ops.decode import decode_
from torch_fused.ops.decoder import LAYER_PARTS, Adapter, make_decoder
from torch_fused.testing import make, relative_error


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_tokens_at_once(backend, batch, steps):
    """Every number of vectors per row of a weight; a new token attends only to earlier ones."""
    Step(batch=batch, steps=steps, device=backend.device).check()
    Step(batch=batch, steps=steps, length=0, device=backend.device).check()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=2, rotary_dim=2, intermediate=1, vocabulary=2),
        Shape(hidden=17, heads=3, kv_heads=1, head_dim=6, rotary_dim=4, intermediate=5, vocabulary=3),
        Shape("qwen3", hidden=33, heads=6, kv_heads=6, head_dim=10, rotary_dim=2, intermediate=63, vocabulary=31),
        Shape("biased", hidden=95, heads=8, kv_heads=2, head_dim=34, rotary_dim=34, intermediate=257, vocabulary=1000),
        Shape(rotary_dim=0),
        Shape("qwen2", layers=1, hidden=896, heads=14, kv_heads=2, head_dim=64, rotary_dim=64, intermediate=700),
    ],
    ids=str,
)
def test_sizes(backend, shape):
    """Tiny and odd sizes, partly rotated heads, one key head for all queries and one per query."""
    large = backend.name == "emulated" and shape.hidden > 500
    for dtype in DTYPES[-1:] if large else DTYPES:
        Step(shape, batch=2, steps=2, dtype=dtype, device=backend.device).check()


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 255, 256, 1000, 32770])
def test_long_contexts(length, threads):
    """The context is split over the threads; padding may fill whole parts of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Step(length=length).check()
        Step(batch=3, steps=4, length=length, starts=[0, length // 2, length]).check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [1, 2, 8, 70, 300, 10_000])
@pytest.mark.parametrize("length", [0, 5, 400])
def test_windows(backend, window, length):
    """Layers with a window next to layers without, with padding and several new tokens."""
    windows = [window, 0]
    Step(length=length, windows=windows, device=backend.device).check()
    starts = [0, length // 2, length]
    Step(batch=3, steps=4, length=length, starts=starts, windows=windows, device=backend.device).check()


@pytest.mark.parametrize(("steps", "starts"), [(1, None), (4, [0, 60, 115])])
def test_dropped_slots(backend, steps, starts):
    """Layers with a window work without the slots that no new token attends to."""
    options = {"batch": 3, "steps": steps, "length": 130, "starts": starts, "device": backend.device}
    for window, dropped in ((70, 61), (70, 60), (70, 1), (1, 130), (2, 129)):
        whole, step = (Step(windows=[window, 0], **options) for _ in range(2))
        for name in ("keys", "values"):
            step.args[name][0] = step.args[name][0][:, :, dropped:].clone()
        logits = step.run(dropped=[dropped, 0])
        assert torch.equal(logits, whole.run())
        for name in ("keys", "values"):
            assert torch.equal(step.args[name][0], whole.args[name][0][:, :, dropped:])
            assert torch.equal(step.args[name][1], whole.args[name][1])


def test_dropped_slots_of_the_reference():
    step = Step(windows=[7, 0])
    step.args["keys"][0], step.args["values"][0] = (step.args[n][0][:, :, 14:].clone() for n in ("keys", "values"))
    step.args["dropped"] = [14, 0]
    exact, _ = step.exact()
    assert relative_error(step.run(), exact) < 1e-5


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257, 511, 1100])
def test_chunk_edges(backend, length):
    """The context is split into chunks that are combined afterwards."""
    for dtype in (torch.float32, torch.bfloat16):
        Step(length=length, dtype=dtype, device=backend.device).check()
    Step(batch=3, steps=4, length=length, starts=[0, length // 2, length], device=backend.device).check()


def test_mixed_dtypes(backend):
    """Matrices, vectors, tables and cache with different dtypes."""
    step = Step(Shape("biased"), batch=2, steps=2, device=backend.device)
    dtypes = dict(zip(LAYER_PARTS, cycle((torch.float16, torch.bfloat16, torch.float32))))
    dtypes["up"] = dtypes["gate"]
    names = LAYER_PARTS * step.shape.layers
    step.model["layers"] = [
        t if t is None else t.to(dtypes[n]) for t, n in zip(step.model["layers"], names, strict=True)
    ]
    step.model["head"] = step.model["head"].bfloat16()
    step.args["cos"], step.args["sin"] = step.args["cos"].half(), step.args["sin"].half()
    step.check()


def test_large_scores(backend):
    """Scores that are far apart: the softmax does not overflow, and small weights vanish."""
    step = Step(length=600, device=backend.device)
    for keys in step.args["keys"]:
        keys.mul_(300)
        keys[:, :, 400:].mul_(3)
    step.check()


def test_masked_slots_may_contain_anything(backend):
    """Slots before a sequence's start and past its new tokens are never read."""
    step = Step(batch=2, steps=2, length=300, starts=[0, 270], device=backend.device)
    expected = step.run()
    for states in (*step.args["keys"], *step.args["values"]):
        states[1, :, :270] = torch.nan
        states[:, :, 300:] = torch.nan
    assert torch.equal(step.run(), expected)


def test_nan_stays_in_its_sequence(backend):
    step = Step(batch=2, device=backend.device)
    step.args["values"][0][1, 0, 3] = torch.nan
    logits = step.run()
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_layouts(backend):
    """Caches with tokens before heads in memory, and weights that are parts of larger tensors, are used in place."""
    step = Step(Shape("qwen2_moe", experts=5), batch=2, steps=3, device=backend.device)
    for name in ("keys", "values"):
        step.args[name] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in step.args[name]]
    padded = [None if t is None or t.dim() == 1 else torch.nn.functional.pad(t, (3, 2)) for t in step.model["layers"]]
    step.model["layers"] = [
        part if wide is None else wide[..., 3:-2] for part, wide in zip(step.model["layers"], padded, strict=True)
    ]
    step.check()


def test_tied_head(backend):
    step = Step(device=backend.device)
    step.model["head"] = step.model["embedding"]
    step.check()


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_logits_of_the_last_tokens(backend, kept):
    step = Step(batch=3, steps=4, device=backend.device)
    every = step.run()
    torch.testing.assert_close(step.run(logits_to_keep=kept), every[:, -kept:], rtol=1e-5, atol=1e-5)


def test_threads_of_python():
    """Calls from several threads at once do not share memory."""
    steps = [Step(Shape(layers=4), batch=2, steps=1 + i) for i in range(6)]
    expected = [step.run() for step in steps]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            results = pool.map(lambda step: step.run(), steps)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


CAPABILITIES = ("default", "avx2", "avx512")
BEST = torch.backends.cpu.get_cpu_capability().lower()


@pytest.mark.parametrize("capability", CAPABILITIES[: CAPABILITIES.index(BEST) + 1 if BEST in CAPABILITIES else 1])
def test_instruction_sets(capability):
    """All are compiled in; torch's environment variable selects one of those that the machine supports."""
    script = "import conftest, test_decode_families as t\nfor family in ('qwen2', 'qwen3'):\n"
    script += "  for dtype in t.DTYPES: t.test_families(conftest.Backend('cpu'), family, dtype)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=os.path.dirname(__file__))


@pytest.mark.parametrize(
    "limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}], ids=str
)
def test_fewer_threads_than_asked_for(limit):
    """OpenMP may give a team fewer threads than torch's setting: these do all the work, and none waits."""
    script = "import torch, test_decode as t\ntorch.set_num_threads(4)\nt.Step(batch=3, steps=2, length=600).check()"
    environment = {**os.environ, **limit, "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=folder, timeout=300)


class Checked(torch.utils.data.Dataset):
    """Items that take a step."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        Step(batch=2, length=600).check()
        return index


def test_worker_of_a_data_loader():
    """A process forked after a step has run on several threads: torch gives it one thread."""
    Step(length=600).check()
    loader = torch.utils.data.DataLoader(Checked(), num_workers=2, multiprocessing_context="fork", timeout=300)
    assert [int(item) for item in loader] == [0, 1, 2]


def test_inputs_are_not_written():
    step = Step(batch=2)
    caches = set(map(id, step.args["keys"] + step.args["values"]))
    inputs = [tensor for tensor in _tensors({**step.args, **step.model}) if id(tensor) not in caches]
    before = [tensor.clone() for tensor in inputs]
    step.run()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def _tensors(args):
    flat = [item for value in args.values() for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def test_opcheck():
    step = Step(batch=2, steps=2, starts=[0, 3], logits_to_keep=1)
    # Torch's schema test does not support objects; test_inputs_are_not_written replaces it.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = make_decoder(**step.model), *step.args.values()
    opcheck(torch.ops.torch_fused.decode_.default, arguments, test_utils=checks)


def test_compiles_without_graph_breaks():
    expected = Step(batch=2).run()
    step = Step(batch=2)
    compiled = torch.compile(lambda model, args: decode_(model, **args), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(make_decoder(**step.model), step.args), expected)


def test_autograd():
    """No gradient is lost silently, and autograd notices that a saved cache has changed."""
    step = Step()
    step.model["layers"][1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"decode_: q of layer 0 requires grad.*torch\.no_grad"):
        step.run()
    with torch.no_grad(), forward_ad.dual_level():
        head = step.model["head"]
        step.model["head"] = forward_ad.make_dual(head, head)
        with pytest.raises(RuntimeError, match="decode_: head has a tangent"):
            step.run()
        step.model["head"] = head
    version = step.args["keys"][0]._version
    with torch.no_grad():
        assert not step.run().requires_grad
    assert step.args["keys"][0]._version == version + 1


def _parts(step: Step, **changes) -> list:
    """The layers, with some parts of the last one replaced."""
    layers = list(step.model["layers"])
    for name, value in changes.items():
        layers[len(layers) - len(LAYER_PARTS) + LAYER_PARTS.index(name)] = value
    return layers


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda s: {"token_ids": torch.zeros(9, 1, dtype=torch.long)}, RuntimeError, "token_ids must be .* 1 to 8"),
        (lambda s: {"token_ids": torch.zeros(1, 9, dtype=torch.long)}, RuntimeError, "token_ids must be .* 1 to 8"),
        (lambda s: {"token_ids": torch.zeros(2, 0, dtype=torch.long)}, RuntimeError, "token_ids must be .* 1 to 8"),
        (lambda s: {"token_ids": torch.zeros(2, dtype=torch.long)}, RuntimeError, "token_ids must be .* 1 to 8"),
        (lambda s: {"token_ids": torch.zeros(2, 2, dtype=torch.int)}, RuntimeError, "token_ids must be .* int64"),
        (lambda s: {"token_ids": torch.full((2, 2), 97)}, IndexError, "token_ids must be from 0 to 96, got 97"),
        (lambda s: {"token_ids": torch.full((2, 2), -1)}, IndexError, "token_ids must be from 0 to 96, got -1"),
        (lambda s: {"positions": torch.full((2, 2), 27)}, IndexError, "positions must be from 0 to 26, got 27"),
        (lambda s: {"positions": torch.zeros(2, 3, dtype=torch.long)}, RuntimeError, "positions must be .*2, 2"),
        (lambda s: {"starts": torch.tensor([0, 21])}, IndexError, "starts must be from 0 to 20, got 21"),
        (lambda s: {"embedding": s.model["embedding"].double()}, RuntimeError, "embedding must be .*float32"),
        (lambda s: {"cos": s.args["cos"][:, :15]}, RuntimeError, "cos must be .* even rotary dim"),
        (lambda s: {"sin": s.args["sin"][:4]}, RuntimeError, "sin must be a contiguous"),
        (lambda s: {"layers": s.model["layers"][:-1]}, RuntimeError, "layers must .* 22"),
        (lambda s: {"layers": []}, RuntimeError, "layers must .* 22 .* got 0"),
        (lambda s: {"layers": _parts(s, down=None)}, RuntimeError, "down of layer 1 must be a tensor"),
        (lambda s: {"layers": _parts(s, q=torch.zeros(64, 47))}, RuntimeError, "q of layer 1 must have shape"),
        (lambda s: {"layers": _parts(s, k=torch.zeros(31, 48))}, RuntimeError, "k of layer 1 must have shape"),
        (lambda s: {"layers": _parts(s, up=torch.zeros(80, 48).half())}, RuntimeError, "up of layer 1 must have"),
        (lambda s: {"layers": _parts(s, gate=torch.zeros(48, 80).t())}, RuntimeError, "gate of layer 1 .* dense rows"),
        (lambda s: {"norm": torch.zeros(47)}, RuntimeError, "norm must have shape"),
        (lambda s: {"layers": _parts(s, q_norm=torch.ones(17))}, RuntimeError, "q_norm of layer 1 must have shape"),
        (
            lambda s: {"adapters": [Adapter(0, torch.ones(2, 48), torch.ones(64, 2), 1.0)]},
            RuntimeError,
            "adapter_places must be the places of matrices in layers, got 0",
        ),
        (
            lambda s: {"adapters": [Adapter(34, torch.ones(2, 48), torch.ones(64, 2), 1.0)]},
            RuntimeError,
            "adapter_places must .* got 34",
        ),
        (
            lambda s: {"adapters": [Adapter(1, torch.ones(2, 47), torch.ones(64, 2), 1.0)]},
            RuntimeError,
            "a of the adapter of q of layer 0 must have shape .2, 48., got .2, 47.",
        ),
        (
            lambda s: {"adapters": [Adapter(1, torch.ones(257, 48), torch.ones(64, 257), 1.0)]},
            RuntimeError,
            "a of the adapter of q of layer 0 .* a rank of 1 to 256",
        ),
        (
            lambda s: {"adapters": [Adapter(1, torch.ones(2, 48), torch.ones(63, 2), 1.0)]},
            RuntimeError,
            "b of the adapter of q of layer 0 must have shape",
        ),
        (
            lambda s: {"adapters": [Adapter(1, torch.ones(2, 48), torch.ones(64, 2), float("inf"))]},
            RuntimeError,
            "the scale of the adapter of q of layer 0 must be finite",
        ),
        (
            lambda s: {"layers": _parts(s, router=torch.ones(4, 48))},
            RuntimeError,
            "experts_gate of layer 1 must be .4, rows, columns.",
        ),
        (
            lambda s: {
                "layers": _parts(
                    s,
                    router=torch.ones(4, 48),
                    experts_gate=torch.ones(4, 8, 48),
                    experts_up=torch.ones(4, 8, 48),
                    experts_down=torch.ones(4, 48, 7),
                )
            },
            RuntimeError,
            "experts_down of layer 1 must have shape",
        ),
        (
            lambda s: {
                "layers": _parts(
                    s,
                    router=torch.ones(4, 48),
                    experts_gate=torch.ones(4, 8, 48),
                    experts_up=torch.ones(4, 8, 48),
                    experts_down=torch.ones(4, 48, 8),
                )
            },
            RuntimeError,
            "experts_per_token must be at least 1 with a router",
        ),
        (lambda s: {"experts_per_token": 33}, RuntimeError, "experts_per_token must be from 0 to 32, got 33"),
        (lambda s: {"layers": _parts(s, gate=None)}, RuntimeError, "gate of layer 1 must be a tensor"),
        (lambda s: {"activation": "relu"}, RuntimeError, "activation must be silu, gelu or gelu_tanh, got relu"),
        (lambda s: {"tables": [0]}, RuntimeError, "tables must be a number for each of the 2 layers"),
        (lambda s: {"tables": [0, -2]}, RuntimeError, "tables must be .* -1 for none"),
        (lambda s: {"residual_scale": float("nan")}, RuntimeError, "residual_scale must be finite, got nan"),
        (
            lambda s: {"attention_softcap": -1.0},
            RuntimeError,
            "attention_softcap and .* must be 0 or at least 1e-06, got -1",
        ),
        (lambda s: {"head": torch.zeros(97, 47)}, RuntimeError, "head must have shape"),
        (lambda s: {"keys": s.args["keys"][:1]}, RuntimeError, "keys must be a tensor for each of the 2 layers"),
        (lambda s: {"values": [t[:, :, :21] for t in s.args["values"]]}, RuntimeError, "values must have room .* 21"),
        (lambda s: {"keys": [t.half() for t in s.args["keys"]]}, RuntimeError, "values must all be .* got Float"),
        (lambda s: {"keys": [t.double() for t in s.args["keys"]]}, RuntimeError, "keys must all be .* got Double"),
        (
            lambda s: {"keys": [t[:1].expand(2, -1, -1, -1) for t in s.args["keys"]]},
            RuntimeError,
            r"keys\[\d\] .* expanded tensor",
        ),
        (lambda s: {"dropped": [0]}, RuntimeError, "dropped must be empty or a number for each of the 2 layers, got 1"),
        (lambda s: {"dropped": [1, 0]}, RuntimeError, "dropped of layer 0 must be 0, .* window of 0 .* got 1"),
        (
            lambda s: {"dropped": [15, 0], "windows": [7, 0]},
            RuntimeError,
            "dropped of layer 0 must .* = 20, got 15",
        ),
        (lambda s: {"dropped": [-1, 0], "windows": [7, 0]}, RuntimeError, "dropped of layer 0 must be 0, .* got -1"),
        (lambda s: {"length": -1}, RuntimeError, "length must not be negative, got -1"),
        (lambda s: {"length": 26}, RuntimeError, "keys must have room for 2 tokens after length = 26, .* 27"),
        (lambda s: {"length": 2**63 - 1}, RuntimeError, "keys must have room .* length = 9223372036854775807"),
        (lambda s: {"length": 2**63 - 3}, RuntimeError, "keys must have room .* length = 9223372036854775805"),
        (lambda s: {"length": -(2**63)}, RuntimeError, "length must not be negative"),
        (lambda s: {"heads": 2**63 - 1}, RuntimeError, "heads must"),
        (lambda s: {"logits_to_keep": 2**63 - 1}, RuntimeError, "logits_to_keep must"),
        (
            lambda s: {"values": s.args["keys"]},
            RuntimeError,
            r"(keys|values)\[\d\] must not share memory with (keys|values)\[\d\]",
        ),
        (
            lambda s: {"keys": [s.args["keys"][0]] * 2},
            RuntimeError,
            r"keys\[\d\] must not share memory with keys\[\d\]",
        ),
        (
            lambda s: {"keys": [s.args["keys"][0], s.args["values"][0]]},
            RuntimeError,
            r"keys\[1\] must not share memory with values\[0\]|values\[0\] must not .* keys\[1\]",
        ),
        (lambda s: {"norm": s.args["keys"][1].flatten()[5:53]}, RuntimeError, r"norm must not share .* keys\[1\]"),
        (
            lambda s: {"layers": _parts(s, k_bias=s.args["values"][0].flatten()[-32:])},
            RuntimeError,
            r"k_bias of layer 1 must not share memory with values\[\d\]",
        ),
        (
            lambda s: {"keys": [s.args["keys"][0].as_strided((2, 2, 27, 16), (1, 864, 16, 1)), s.args["keys"][1]]},
            RuntimeError,
            r"keys\[\d\] must not be an expanded tensor or another whose elements share",
        ),
        (lambda s: {"heads": 3}, RuntimeError, "heads must"),
        (lambda s: {"heads": 0}, RuntimeError, "heads must"),
        (lambda s: {"logits_to_keep": 3}, RuntimeError, "logits_to_keep must be from 0 to 2, got 3"),
    ],
)
def test_bad_arguments(changes, error, message):
    """The message names the op and the argument; nothing has been written."""
    step = Step(batch=2, steps=2)
    before = [t.clone() for t in (*step.args["keys"], *step.args["values"])]
    with pytest.raises(error, match=f"(decode_|Decoder): {message}"):
        step.run(**changes(step))
    assert all(torch.equal(a, b) for a, b in zip((*step.args["keys"], *step.args["values"]), before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": torch.zeros(0, 48)}, "Decoder: head must be a matrix with rows and columns"),
        ({"head": torch.zeros(1, 48).expand(2**20 + 1, 48)}, "decode_token_: head must have 1 to 1048576 rows"),
        (
            {"do_sample": True, "temperature": -1.0},
            "decode_token_: temperature must be finite and not negative, got -1",
        ),
        ({"do_sample": True, "temperature": float("inf")}, "decode_token_: temperature must be finite"),
        ({"do_sample": True, "top_k": 0}, "decode_token_: top_k must be at least 1"),
        ({"do_sample": True, "top_p": 1.5}, "decode_token_: top_p must be from 0 to 1"),
        ({"do_sample": True, "min_p": -0.1}, "decode_token_: min_p must be from 0 to 1"),
        ({"length": 2**63 - 1}, "decode_: keys must have room"),
    ],
)
def test_no_token_no_change(changes, message):
    """Logits without a valid token raise before the cache is written, and the generator has not advanced."""
    step = Step(batch=2)
    before = [t.clone() for t in (*step.args["keys"], *step.args["values"])]
    versions = [t._version for t in step.args["keys"]]
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=message):
        token(step, **changes)
    assert all(torch.equal(a, b) for a, b in zip((*step.args["keys"], *step.args["values"]), before, strict=True))
    assert [t._version for t in step.args["keys"]] == versions
    assert torch.equal(torch.get_rng_state(), state)


def test_caches_side_by_side():
    """Caches that are separate parts of one buffer, for keys and values or for all layers, are allowed."""
    expected = Step(batch=2, steps=2).run()
    for at in range(4):  # the dimension of the buffer that tells them apart; the last one stays dense
        step = Step(batch=2, steps=2)
        parts = torch.stack([*step.args["keys"], *step.args["values"]]).movedim(0, at).contiguous().movedim(at, 0)
        assert torch.equal(step.run(keys=list(parts[:2]), values=list(parts[2:])), expected)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.model["embedding"].set_(make(97, 48)), "embedding"),
        (lambda s: setattr(s.model["layers"][1], "data", make(48, 64).t()), "q of layer 0"),
        (lambda s: s.model["layers"][len(LAYER_PARTS) + 1].resize_(1), "q of layer 1"),
        (lambda s: setattr(s.model["norm"], "data", s.model["norm"].data.half()), "norm"),
    ],
)
def test_a_model_that_has_changed(change, name):
    """Values written in place are used; a tensor with other memory or another shape raises an error that names it."""
    step = Step()
    model = make_decoder(**step.model)
    step.model["head"].mul_(2)
    assert model.is_current()
    assert torch.equal(decode_(model, **step.args), step.run())
    change(step)
    assert not model.is_current()
    with pytest.raises(RuntimeError, match=f"decode_: {name} of the model has been given other memory"):
        decode_(model, **step.args)


# ---- what the kernels cost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1000, 5000])
@pytest.mark.parametrize("batch", [1, 3])
def test_launches_per_token(batch, length):
    """Five per layer, and six for the embedding, the head and choosing the token, for any context."""
    step = Step(Shape("qwen3", layers=3), batch=batch, length=length)
    with emulate(checked=False) as run:
        token(step)
    assert len(run.launches) <= 5 * 3 + 6


def test_a_step_reads_the_least_bytes():
    """Weights and the context are read once: at most 1.05 times their size, including intermediate results."""
    shape = Shape("qwen3", 1, 512, 8, 2, 64, 64, intermediate=1024, vocabulary=2000)
    step = Step(shape, length=1000, dtype=torch.bfloat16)
    with emulate() as run:
        token(step)
    parts = [step.model["head"], *(t for t in step.model["layers"] if t is not None)]
    context = 2 * 1000 * 2 * 64 * 2
    least = sum(t.nbytes for t in parts) + context
    moved = sum(buffer.distinct_read + buffer.written for launch in run.launches for buffer in launch.buffers)
    assert least <= moved <= 1.05 * least
