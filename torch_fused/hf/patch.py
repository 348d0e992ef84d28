"""Binds fused forwards on the instances of one model, and takes them back."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .cache import CACHE, FusedKVCache
from .decode import CAUSAL_LMS, DECODER, Decoder, causal_lm_forward
from .inputs import find_model
from .models import DECODER_LAYERS, MLPS, NEXT_NORM, RMS_NORMS, ROTARY, Forwards
from .sampling import get_logits_processor


@dataclass(frozen=True)
class Patch:
    """One attribute of one module; the class's own, if it is a method, shows again when it is taken away."""

    path: str
    module: nn.Module
    name: str
    value: MethodType | nn.Module | Decoder

    @property
    def current(self) -> Any:
        return self.module.__dict__.get(self.name)


class PatchHandle:
    """What :func:`apply_torch_fused` did to a model. As a context manager it reverts on exit.

    Example:
        >>> with apply_torch_fused(model, decode=False) as handle:
        ...     print(handle.report())
        torch_fused on Qwen2ForCausalLM
        ...
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._patches: list[Patch] = []
        self._left: list[tuple[str, str]] = []  # (path, reason)

    def bind_forwards(self, forwards: Forwards) -> None:
        """Binds the forward that `forwards` has for a module's class on each such module."""
        for path, module in self._model.named_modules():
            forward = forwards.get((type(module).__module__, type(module).__qualname__))
            if forward is not None:
                self._bind(path, module, "forward", forward)

    def bind_generation(self, method: str, function: Callable) -> None:
        """Binds a method that `generate` calls, on the model or on the model that a wrapper such as PEFT's holds."""
        for path, module in self._model.named_modules():
            if issubclass(type(module), GenerationMixin):
                self._bind(path, module, method, function)

    def bind_decoder(self) -> None:
        """Lets each causal language model run steps of few tokens as one op."""
        for path, module in self._model.named_modules():
            if (type(module).__module__, type(module).__qualname__) in CAUSAL_LMS and DECODER not in module.__dict__:
                before = len(self._patches)
                self._bind(path, module, "forward", causal_lm_forward)
                if len(self._patches) > before:
                    decoder = module.__dict__[DECODER] = Decoder(module)  # not setattr: it is no part of the model
                    self._patches.append(Patch(path, module, DECODER, decoder))

    def link_norms(self) -> None:
        """Tells each patched decoder layer which patched norm its result goes to."""
        patched = {id(patch.module): patch.path for patch in self._patches if patch.name == "forward"}
        for module in self._model.modules():
            layers = getattr(module, "layers", None)
            if not isinstance(layers, nn.ModuleList):
                continue
            firsts = [getattr(layer, "input_layernorm", None) for layer in layers[1:]]
            for layer, norm in zip(layers, [*firsts, getattr(module, "norm", None)], strict=True):
                if id(layer) in patched and norm is not None and id(norm) in patched:
                    layer.__dict__[NEXT_NORM] = norm  # not setattr, which would make it a part of the layer
                    self._patches.append(Patch(patched[id(layer)], layer, NEXT_NORM, norm))

    def _bind(self, path: str, module: nn.Module, method: str, function: Callable) -> None:
        path = path or type(module).__name__
        if method in module.__dict__:
            self._left.append((path, f"its {method} is already replaced by {_describe(module.__dict__[method])}"))
        elif module._compiled_call_impl is not None:
            self._left.append((path, "it is compiled by torch.compile"))
        else:
            bound = MethodType(function, module)
            setattr(module, method, bound)
            self._patches.append(Patch(path, module, method, bound))

    def revert(self) -> None:
        """Takes every patch back; the modules' ``__dict__`` are then as before. A second call does nothing.

        Raises:
            RuntimeError: someone has replaced a patched method since. Nothing is reverted then.
        """
        for patch in self._patches:
            if patch.current is not patch.value:
                raise RuntimeError(
                    f"torch_fused: cannot revert {patch.path}: its {patch.name} has been replaced by "
                    f"{_describe(patch.current)} since apply_torch_fused; remove that first. Nothing was reverted."
                )
        for patch in self._patches:
            del patch.module.__dict__[patch.name]
        self._patches.clear()

    @property
    def patched(self) -> bool:
        """Whether any patch is in place."""
        return bool(self._patches)

    def report(self) -> str:
        """A table of what was patched, and of what was left to transformers with the reason."""
        lines = [f"torch_fused on {type(self._model).__name__}"]
        methods = [patch for patch in self._patches if isinstance(patch.value, MethodType)]
        counts = Counter((type(patch.module).__name__, patch.name) for patch in methods)
        lines += [f"  {count:4d} x {name}.{method}" for (name, method), count in counts.items()] or [
            "  nothing patched"
        ]
        lines += [f"  left: {path}: {reason}" for path, reason in self._left]
        for patch in self._patches:
            if isinstance(patch.value, Decoder):
                lines += [f"  {line}" for line in patch.value.report()]
        return "\n".join(lines)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.revert()


def apply_torch_fused(
    model: nn.Module,
    *,
    norms: bool = True,
    residual: bool = True,
    rotary: bool = True,
    mlp: bool = True,
    cache: bool = True,
    sampler: bool = True,
    decode: bool = True,
) -> PatchHandle:
    """Makes ``model`` use fused ops with the roundings of its own code, so that it gives the same greedy tokens.

    Only this model's instances are touched: methods are bound on them, and no class and no global changes. Modules
    whose class is not exactly one of Llama's, Qwen2's or Qwen3's are left alone, and so are modules that accelerate,
    torch.compile or anybody else has wrapped; the handle's report lists these.

    Args:
        model: a transformers model, any module that holds one, or a pipeline, whose model is patched.
        norms: RMS norms run as one kernel.
        residual: in decoder layers, each addition and the norm that follows it run as one kernel; needs ``norms``.
        rotary: queries and keys are rotated by their positions in one kernel.
        mlp: the activation between the feed-forward projections, ``silu(gate) * up``, runs as one kernel.
        cache: ``generate()`` uses a :class:`FusedKVCache` where it would make a ``DynamicCache``. Your own
            cache, another ``cache_implementation`` and ``use_cache=False`` are respected.
        sampler: ``generate()`` picks tokens with :func:`torch_fused.sampling.greedy` and
            :func:`torch_fused.sampling.sample`, which take over temperature, top-k, top-p and min-p; other processors
            run as before. What is drawn follows ``torch.manual_seed`` but is another draw than transformers' from the
            same probabilities.
        decode: on the CPU, with a `FusedKVCache`, up to 8 new tokens of up to 8 sequences go through the whole model in
            one op, several times as fast. It keeps float32 between the weights, so in float32 the tokens are
            transformers' own, and in bfloat16 and float16 the logits, which are then float32, are nearer to the exact
            ones than transformers' are: set this to False to have its roundings. Whatever the op cannot do, such as
            hooks, adapters, quantised weights or attention maps, runs as before; the report tells why.

    Returns:
        A :class:`PatchHandle` with ``revert()`` and ``report()``, and a context manager that reverts.

    Raises:
        TypeError: ``model`` is none of these.
        RuntimeError: the model is patched already, or it has nothing that could be patched.

    Example:
        >>> handle = apply_torch_fused(model)
        >>> tokens = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=32)
        >>> handle.revert()
    """
    model = find_model("apply_torch_fused", model)
    for path, module in model.named_modules():
        if any(getattr(value, "__func__", None) in FUNCTIONS for value in module.__dict__.values()):
            raise RuntimeError(
                f"apply_torch_fused: model is already patched, at {path or 'its root'}: revert() the first handle"
            )
    handle = PatchHandle(model)
    if norms:
        handle.bind_forwards(RMS_NORMS)
    if norms and residual:
        handle.bind_forwards(DECODER_LAYERS)
        handle.link_norms()
    if rotary:
        handle.bind_forwards(ROTARY)
    if mlp:
        handle.bind_forwards(MLPS)
    if cache:
        handle.bind_generation("_prepare_cache_for_generation", prepare_cache_for_generation)
    if sampler:
        handle.bind_generation("_get_logits_processor", get_logits_processor)
    if decode:
        handle.bind_decoder()
    if not handle.patched:
        raise RuntimeError(f"apply_torch_fused: nothing could be patched.\n{handle.report()}")
    return handle


def prepare_cache_for_generation(
    self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
) -> None:
    """The class's own method; then a `FusedKVCache` instead of the `DynamicCache` that it made, if it made one."""
    user_cache = model_kwargs.get(CACHE)
    type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    cache = model_kwargs.get(CACHE)
    if user_cache is not None or type(cache) is not DynamicCache or cache.offloading:
        return
    fused = FusedKVCache(self.config.get_text_config(decoder=True), expected_len=max_cache_length)
    if generation_config.is_assistant:
        fused.activate_past_recording()
    model_kwargs[CACHE] = fused


FUNCTIONS = {
    prepare_cache_for_generation,
    get_logits_processor,
    causal_lm_forward,
    *(forward for forwards in (RMS_NORMS, DECODER_LAYERS, ROTARY, MLPS) for forward in forwards.values()),
}
"""Every function that is ever bound."""


def _describe(method: Callable | None) -> str:
    if method is None:
        return "the class's own"
    function = getattr(method, "__func__", method)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"
