"""Binds fused forwards to the modules of one model, and removes them again."""

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .cache import CACHE, FusedKVCache
from .decode import CAUSAL_LMS, DECODER, Decoder, causal_lm_forward, forward_of
from .described import mismatch
from .families import FAMILIES, UNKNOWN, Family, known
from .inputs import find_model
from .loop import generate_by_loop
from .lora import is_lora
from .lora_linear import lora_forward
from .loss import LOSS, HeadLoss, head_forward, why_no_loss
from .models import DECODER_LAYERS, EXPERTS, GATED, MLPS, RMS_NORMS, ROTARY, Forwards, activation_of
from .origin import Bound, class_name, describe, function_of, home_of, is_ours, path_of
from .transformers_private import APPLY_GATE, PREPARE_CACHE, has_own_gate, prepare_cache

HANDLE = "_torch_fused_handle"
"""The attribute of a patched model that holds its `PatchHandle`."""

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock for patching and reverting a model; a wrapper around the model has the same lock."""
    inner = next((module for module in model.modules() if issubclass(type(module), GenerationMixin)), model)
    with _locks_lock:
        return _locks.setdefault(inner, threading.RLock())


@dataclass(frozen=True)
class Patch:
    """One attribute set on one module; removing it restores the class's own method, if there is one."""

    path: str
    module: nn.Module
    name: str
    value: partial | Decoder | HeadLoss

    @property
    def current(self) -> Any:
        return self.module.__dict__.get(self.name)

    @property
    def wrapped(self) -> bool:
        """Whether this is a causal language model's forward inside a wrapper that declares what it wraps, such as
        accelerate's for mixed precision. It can stay: without a `Decoder` it calls the class's own forward."""
        return _runs_decoder(self.current) and not is_ours(self.current, self.module)

    @property
    def replaced(self) -> bool:
        """Whether the attribute is something else now. Accelerate rebinds a function when it removes its wrapper."""
        current = self.current
        if current is None or current is self.value or self.wrapped:
            return False
        return not is_ours(current, self.module) or function_of(current) is not function_of(self.value)


class PatchHandle:
    """The patches that :func:`apply_torch_fused` applied to a model. As a context manager, it reverts them on exit.

    The handle is saved and copied with the model; ``apply_torch_fused`` with the same flags returns it again.

    Example:
        >>> with apply_torch_fused(model, decode=False) as handle:
        ...     print(handle.report())
        torch_fused on Qwen2ForCausalLM
        ...
    """

    def __init__(self, model: nn.Module, flags: dict[str, bool] | None = None):
        self._model = model
        self._flags = flags
        self._patches: list[Patch] = []
        self._left: list[tuple[str, str]] = []  # (path, reason)
        self._outside: list[tuple[str, str]] = []  # the same, for parts that the decode step does compute

    def bind_forwards(self, forwards: Forwards) -> None:
        """Binds to each module the forward in `forwards` for its class."""
        for path, module in self._model.named_modules():
            forward = forwards.get(path_of(module))
            if forward is None:
                bases = [base.__qualname__ for base in type(module).__mro__ if _path(base) in forwards]
                if bases:
                    self._leave(path, module, f"its class is {class_name(module)}, not {bases[0]} itself")
            elif home_of(type(module)) is None:
                self._leave(path, module, f"its class's forward is replaced by {describe(type(module).forward)}")
            elif reason := why_left(module):
                self._leave(path, module, reason)
            else:
                bind = Bound if path_of(module) in CAUSAL_LMS else partial
                self._bind(path, module, "forward", bind(forward, module))

    def bind_gates(self) -> None:
        """Fuses the activation of experts with the product that follows."""
        for path, module in self._model.named_modules():
            if path_of(module) in EXPERTS and has_own_gate(type(module)) and not why_left(module):
                self._bind(path, module, APPLY_GATE, partial(EXPERTS[path_of(module)], module))

    def bind_adapters(self) -> None:
        """Lets LoRA adapters of PEFT be added by their products in training."""
        for path, module in self._model.named_modules():
            if is_lora(module) and type(module.base_layer) is nn.Linear:
                self._bind(path, module, "forward", partial(lora_forward, module))

    def bind_generation(self, method: str, function: Callable) -> None:
        """Binds a method that `generate` calls to the model, or to the model inside a wrapper such as PEFT's."""
        for path, module in self._model.named_modules():
            if issubclass(type(module), GenerationMixin):
                self._bind(path, module, method, Bound(function, module))

    def bind_causal_lms(self) -> None:
        """Binds the forwards of causal language models."""
        present = {path_of(module) for module in self._model.modules()} & CAUSAL_LMS
        forwards = {path: forward_of(path[1]) for path in present}
        self.bind_forwards({**dict.fromkeys(CAUSAL_LMS, causal_lm_forward), **forwards})

    def bind_decoder(self, gives_cache: bool = False, int8_products: bool = True) -> None:
        """Adds a `Decoder` to each causal language model, which runs short steps as one op."""
        for path, module in self._model.named_modules():
            if _runs_decoder(module.__dict__.get("forward")) and DECODER not in module.__dict__:
                self._keep(path, module, DECODER, Decoder(module, gives_cache, int8_products))

    def bind_loss(self) -> None:
        """Adds a `HeadLoss` to each causal language model, which computes its loss without storing logits."""
        names = {id(module): path for path, module in self._model.named_modules()}
        for path, module in self._model.named_modules():
            if not _runs_decoder(module.__dict__.get("forward")) or LOSS in module.__dict__:
                continue
            head = module.get_output_embeddings()
            if reason := why_no_loss(module, head):
                self._leave(path, module, f"its loss: {reason}")
            elif function_of(head.__dict__.get("forward")) is head_forward or self._bind(
                names[id(head)], head, "forward", partial(head_forward, head)
            ):
                self._keep(path, module, LOSS, HeadLoss(module))

    def _keep(self, path: str, module: nn.Module, name: str, value: Decoder | HeadLoss) -> None:
        self._patches.append(Patch(path or type(module).__name__, module, name, value))
        module.__dict__[name] = value  # not setattr: it is not part of the model

    def tell_what_stays(self, in_step: bool) -> None:
        """Reports the parts of known families that no fused op computes, one line per class."""
        present = Counter(path_of(module) for module in self._model.modules())
        for (home, name), count in present.items():
            for family in FAMILIES:
                if family.home == home and name in family.stays:
                    step = in_step and name != family.linear_class and self._may_step(family)
                    (self._outside if step else self._left).append((f"{count} x {name}", family.stays[name]))

    def _may_step(self, family: Family) -> bool:
        """Whether a model of the family is present and can have a decode step."""
        return family.has_step and any(path_of(module) == family.path("causal_lm") for module in self._model.modules())

    def tell_other_families(self) -> None:
        """Reports models that can generate but do not belong to a known family, with a warning."""
        for path, module in self._model.named_modules():
            if issubclass(type(module), GenerationMixin) and path_of(module) not in CAUSAL_LMS:
                inside = tuple(id(part) for part in module.modules())
                parts = any(patch.name == "forward" and id(patch.module) in inside for patch in self._patches)
                fused = "its decode step is left to transformers" if parts else "only its cache and sampler are fused"
                reason = (
                    f"{UNKNOWN.format(type(module).__name__)}: {fused}. If its modules compute the same as those, add "
                    "a row to torch_fused/hf/families.py"
                )
                self._leave(path, module, reason)
                warnings.warn(f"apply_torch_fused: {reason}", stacklevel=3)

    def _bind(self, path: str, module: nn.Module, method: str, bound: partial) -> bool:
        """Whether the method is bound now."""
        if _runs_decoder(module.__dict__.get(method)):
            kept = DECODER in module.__dict__ or LOSS in module.__dict__
            if kept or not is_ours(module.__dict__[method], module):
                return False  # belongs to another handle, or is in a wrapper
            del module.__dict__[method]  # accelerate has removed its wrapper after a revert
        if method in module.__dict__:
            self._leave(path, module, f"its {method} is already replaced by {describe(module.__dict__[method])}")
        elif module._compiled_call_impl is not None:
            self._leave(path, module, "it is compiled by torch.compile")
        else:
            self._patches.append(Patch(path or type(module).__name__, module, method, bound))
            setattr(module, method, bound)
            return True
        return False

    def _leave(self, path: str, module: nn.Module, reason: str) -> None:
        self._left.append((path or type(module).__name__, reason))

    def revert(self) -> None:
        """Removes every patch; the modules' ``__dict__`` are then as before. A second call does nothing.

        Raises:
            RuntimeError: a patched method has since been replaced. Nothing is reverted then. A wrapper around the
                model's forward with a ``__wrapped__`` attribute, such as accelerate's for mixed precision, may stay.
        """
        with lock_of(self._model):
            for patch in self._patches:
                if patch.replaced:
                    raise RuntimeError(
                        f"torch_fused: cannot revert {patch.path}: its {patch.name} has been replaced by "
                        f"{describe(patch.current)} after apply_torch_fused; remove that first. Nothing was reverted."
                    )
            while self._patches:  # one by one, so that an interrupted revert can be repeated
                patch = self._patches[-1]
                if not patch.wrapped:
                    patch.module.__dict__.pop(patch.name, None)
                self._patches.pop()
            if self._model.__dict__.get(HANDLE) is self:
                del self._model.__dict__[HANDLE]

    @property
    def patched(self) -> bool:
        """Whether any patch is in place."""
        return bool(self._patches)

    def report(self) -> str:
        """A table of what was patched and what was not, with reasons."""
        lines = [f"torch_fused on {type(self._model).__name__}"]
        methods = [patch for patch in self._patches if isinstance(patch.value, partial)]
        counts = Counter((type(patch.module).__name__, patch.name) for patch in methods)
        lines += [f"  {count:4d} x {name}.{method}" for (name, method), count in counts.items()] or [
            "  nothing patched"
        ]
        lines += [f"  not patched: {path}: {reason}" for path, reason in self._left]
        lines += [f"  not fused outside the decode step: {path}: {reason}" for path, reason in self._outside]
        for patch in self._patches:
            if isinstance(patch.value, (Decoder, HeadLoss)):
                lines += [f"  {line}" for line in patch.value.report()]
        return "\n".join(lines)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for patch in self._patches:
            home_of(type(patch.module))  # cached now, because a compiler cannot compute it

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
    adapters: bool = True,
    cache: bool = True,
    sampler: bool = True,
    decode: bool = True,
    int8_products: bool = True,
    loss: bool = True,
) -> PatchHandle:
    """Makes ``model`` use fused ops. Greedy tokens stay the same in float32, and in any dtype with ``decode=False``.

    Only this model instance is patched; classes, globals and other models do not change. A module is not patched if its
    class is not exactly one of a supported family (see docs/generate.md), if it contains or uses something unknown in
    its family, if accelerate, torch.compile or other code has wrapped it, or if its class's forward was replaced. The
    handle's report lists these modules. A patched model can be saved, copied and sent to another process, with its
    patches and its handle.

    Args:
        model: a transformers model, a module that contains one, or a pipeline, which has its model patched.
        norms: run RMS norms as one kernel.
        residual: in decoder layers, fuse the addition after attention with the norm that follows; requires ``norms``.
        rotary: rotate queries and keys in one kernel.
        mlp: run the activation between the feed-forward projections, ``silu(gate) * up`` or the same with gelu, as one
            kernel, also in experts.
        adapters: in training, add the output of PEFT's LoRA adapters to their frozen linear layer's output in the
            adapter's own matrix product. Applies to the adapters that the model has now.
        cache: ``generate()`` creates a :class:`FusedKVCache` instead of a ``DynamicCache``. So does a call of the model
            without gradients and without a cache, if ``decode`` can continue from it. Your own cache, another
            ``cache_implementation`` and ``use_cache=False`` are respected.
        sampler: ``generate()`` uses torch_fused's loop for greedy decoding and sampling, with
            :func:`torch_fused.sampling.greedy` and :func:`torch_fused.sampling.sample`. They replace the processors
            for temperature, top-k, top-p and min-p; other processors run as before. Sampled tokens follow
            ``torch.manual_seed`` and have the same probabilities as in transformers, but are different draws. Beam
            search, assisted generation and ``output_scores`` use transformers' loop. Like transformers, this loop
            compiles the model for a static cache on a GPU.
        decode: with a `FusedKVCache`, run up to 8 new tokens of up to 8 sequences through the whole model in one op,
            which is several times faster. Activations stay float32 in the op. In float32 the tokens are the same as in
            transformers. In bfloat16, float16 and under autocast, the logits are float32 and closer to the exact ones;
            set this to False for transformers' rounding. On a GPU, ``generate()`` starts each step before it knows
            whether the last token ended the text, and undoes the extra step. Anything that the op does not support,
            such as hooks or attention maps, runs as before; the report says why.
        int8_products: in that op on the CPU, multiply packed matrices by activations rounded to int8, with one scale
            per 8 values, which is faster. False multiplies in float32.
        loss: in calls with ``labels``, compute the loss with :func:`torch_fused.functional.linear_cross_entropy`, with
            or without gradients, and the same shift of labels, ``ignore_index`` and ``num_items_in_batch`` as in
            transformers. ``outputs.logits`` are computed only when they are read; reading them after
            ``optimizer.step()`` has changed the weights raises an error. Models that change their logits before the
            loss (soft caps, scales) and heads other than a plain ``nn.Linear`` use transformers' loss.

    Returns:
        A :class:`PatchHandle` with ``revert()`` and ``report()``, also a context manager that reverts. If the model is
        already patched with the same flags, its existing handle; with other flags, it is patched again.

    Raises:
        TypeError: ``model`` is none of these.
        RuntimeError: the model is part of a patched model, or nothing in it could be patched.

    Warns:
        UserWarning: a model does not belong to a supported family, so only its cache and sampler are fused.

    Example:
        >>> handle = apply_torch_fused(model)
        >>> tokens = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=32)
        >>> handle.revert()
    """
    model = find_model("apply_torch_fused", model)
    flags = {
        "norms": norms,
        "residual": residual,
        "rotary": rotary,
        "mlp": mlp,
        "adapters": adapters,
        "cache": cache,
        "sampler": sampler,
        "decode": decode,
        "int8_products": int8_products,
        "loss": loss,
    }
    with lock_of(model):
        present = model.__dict__.get(HANDLE)
        if present is not None and present._flags == flags:
            return present
        for module in model.modules():
            if HANDLE in module.__dict__:
                module.__dict__[HANDLE].revert()
        for path, module in model.named_modules():
            found = [
                value for value in list(module.__dict__.values()) if is_ours(value, module) and not _runs_decoder(value)
            ]
            if found or DECODER in module.__dict__ or LOSS in module.__dict__:
                raise RuntimeError(
                    f"apply_torch_fused: model is already patched, at {path or 'its root'}, as part of another model; "
                    "revert() the handle of that model first"
                )
        handle = PatchHandle(model, flags)
        try:
            if norms:
                handle.bind_forwards(RMS_NORMS)
            if norms and residual:
                handle.bind_forwards(DECODER_LAYERS)
            if rotary:
                handle.bind_forwards(ROTARY)
            if mlp:
                handle.bind_forwards(MLPS)
                handle.bind_gates()
            if adapters:
                handle.bind_adapters()
            if cache:
                handle.bind_generation(PREPARE_CACHE, prepare_cache_for_generation)
            if decode or loss:
                handle.bind_causal_lms()
            if decode:
                handle.bind_decoder(gives_cache=cache, int8_products=int8_products)
            if loss:
                handle.bind_loss()
            if sampler:
                handle.bind_generation("generate", generate_by_loop)
            if mlp:
                handle.tell_what_stays(in_step=decode)
            if norms or rotary or mlp or decode:
                handle.tell_other_families()
            if not handle.patched:
                raise RuntimeError(f"apply_torch_fused: nothing could be patched.\n{handle.report()}")
            model.__dict__[HANDLE] = handle  # not setattr: it is not part of the model
        except BaseException:
            handle.revert()
            raise
        return handle


def prepare_cache_for_generation(
    self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
) -> None:
    """Calls the class's own method, then replaces a `DynamicCache` that it created by a `FusedKVCache`."""
    user_cache = model_kwargs.get(CACHE)
    prepare_cache(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get(CACHE)
    if user_cache is not None or type(cache) is not DynamicCache or cache.offloading:
        return
    fused = FusedKVCache(self.config.get_text_config(decoder=True), expected_len=max_cache_length)
    if generation_config.is_assistant:
        fused.activate_past_recording()
    model_kwargs[CACHE] = fused


def why_left(module: nn.Module) -> str:
    """Why a module of a known class is not patched; empty if it can be."""
    family, part = known(module)
    if family is not None and part in ("mlp", "experts") and not mismatch(module):
        activation = getattr(module, family.activation if part == "mlp" else "act_fn")
        if activation_of(activation) not in GATED:
            return f"its activation is {class_name(activation)}, not silu or gelu"
    return mismatch(module)


def _runs_decoder(method: Any) -> bool:
    """Whether this is our forward of a causal language model, possibly inside wrappers that declare what they wrap."""
    function: Any = inspect.unwrap(method)
    return getattr(function_of(function) or function, "__code__", None) is causal_lm_forward.__code__


def _path(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
