"""decode_ with the traits of some model families: norms, activations, tables, experts, adapters."""

import pytest
import torch
from decode_step import DTYPES, TRAITS, Shape, Step, adapters

from torch_fused.ops.decoder import LAYER_PARTS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "biased", "olmo2", *TRAITS])
def test_families(backend, family, dtype):
    """The traits of families, for one sequence and four left-padded ones, one token and several."""
    shape = Shape(family, experts=9 if "moe" in family else 0)
    Step(shape, dtype=dtype, device=backend.device).check()
    Step(shape, dtype=dtype, batch=4, steps=3, starts=[0, 7, 20, 19], device=backend.device).check()


@pytest.mark.parametrize("family", ["qwen2", "olmo2", "gemma", "granite", "qwen2_moe", "qwen3_moe"])
def test_aligned_families(backend, family):
    """Sizes that the fast kernels take, a context of several chunks."""
    experts = {"experts": 40, "expert_intermediate": 136} if "moe" in family else {}
    shape = Shape(family, hidden=256, heads=4, kv_heads=2, head_dim=64, rotary_dim=64, intermediate=512, **experts)
    # Experts have their own kernels, and the dtypes of others are tested elsewhere.
    for dtype in DTYPES if experts and backend.name != "emulated" else (torch.float16,):
        Step(shape, dtype=dtype, length=300, device=backend.device).check()
    Step(shape, batch=3, steps=3, dtype=torch.bfloat16, length=300, device=backend.device).check()


@pytest.mark.parametrize("head_dim", [16, 64])
def test_tables_of_layers(backend, head_dim):
    """Layers with different angles, or none."""
    step = Step(
        Shape(layers=3, head_dim=head_dim, rotary_dim=head_dim), batch=2, steps=2, starts=[0, 4], device=backend.device
    )
    for name in ("cos", "sin"):
        step.args[name] = torch.stack([step.args[name], step.args[name].flip(0)])
    step.model["tables"] = [1, -1, 0]
    step.check()
    step.model["tables"] = [1, -1, 2]
    with pytest.raises(RuntimeError, match="cos must have the model's table 2, got 2"):
        step.run()


def test_layers_with_and_without_experts(backend):
    """A layer of each kind, and experts with matrices that are parts of one tensor, as in transformers."""
    step = Step(Shape("qwen2_moe", layers=3, experts=5), batch=2, steps=2, device=backend.device)
    layers = [step.model["layers"][i * len(LAYER_PARTS) : (i + 1) * len(LAYER_PARTS)] for i in range(3)]
    for name in ("router", "experts_gate", "experts_up", "experts_down", "shared_gate"):
        layers[1][LAYER_PARTS.index(name)] = None
    layers[2][LAYER_PARTS.index("shared_gate")] = None
    gate, up = LAYER_PARTS.index("experts_gate"), LAYER_PARTS.index("experts_up")
    layers[0][gate : up + 1] = torch.cat(layers[0][gate : up + 1], 1).chunk(2, 1)
    step.model["layers"] = [part for layer in layers for part in layer]
    step.check()


def test_experts_of_nan(backend):
    """A router's NaN affects only its sequence, and does not select a missing expert."""
    step = Step(Shape("qwen3_moe", experts=6), batch=2, device=backend.device)
    step.args["values"][0][1, 0, 3] = torch.nan
    logits = step.run()
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_adapters(backend, family, rank):
    """Low-rank adapters of every matrix, or some, and several for one; also with one vector."""
    step = Step(Shape(family), device=backend.device)
    step.model["adapters"] = adapters(step, rank)
    step.check()
    step = Step(Shape(family), batch=2, steps=3, starts=[0, 4], device=backend.device)
    for names in (("q", "v"), ("k", "o", "up"), ("q", "k", "v", "o", "gate", "up", "down")):
        step.model["adapters"] = adapters(step, rank, names)
        step.check()
    step.model["adapters"] += adapters(step, 3, ("q", "down"))
    step.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_aligned_sizes(backend, dtype):
    """Sizes for the fast kernels, several chunks of context, one token and many, and float32 with other dtypes."""
    shape = Shape(hidden=256, heads=4, kv_heads=2, head_dim=64, rotary_dim=64, intermediate=512)
    for batch, steps in ((1, 1), (3, 4)):
        step = Step(shape, batch=batch, steps=steps, dtype=dtype, length=300, device=backend.device)
        for own in {dtype, torch.float32} if batch == 1 else {dtype}:
            step.model["adapters"] = adapters(step, 16, dtype=own)
            step.check()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_any_size(backend, activation):
    """Gates far from zero, where activations reach their limits."""
    step = Step(device=backend.device)
    step.model["activation"] = activation
    for i, name in enumerate(LAYER_PARTS * step.shape.layers):
        if name == "gate":
            step.model["layers"][i] = step.model["layers"][i] * 40
    step.check()
