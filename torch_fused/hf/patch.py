"""Binds fused forwards on the instances of one model, and takes them back."""

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
    """The lock under which a model is patched and reverted, the same for the model alone and in a wrapper."""
    inner = next((module for module in model.modules() if issubclass(type(module), GenerationMixin)), model)
    with _locks_lock:
        return _locks.setdefault(inner, threading.RLock())


@dataclass(frozen=True)
class Patch:
    """One attribute of one module; the class's own, if it is a method, shows again when it is taken away."""

    path: str
    module: nn.Module
    name: str
    value: partial | Decoder | HeadLoss

    @property
    def current(self) -> Any:
        return self.module.__dict__.get(self.name)

    @property
    def wrapped(self) -> bool:
        """Whether this is the forward of a causal language model, in a wrapper that says so, such as accelerate's for
        mixed precision. It can stay there: without a `Decoder` it hands every call to the class's own."""
        return _runs_decoder(self.current) and not is_ours(self.current, self.module)

    @property
    def replaced(self) -> bool:
        """Whether there is something else now. Accelerate binds a function anew when it takes its wrapper off."""
        current = self.current
        if current is None or current is self.value or self.wrapped:
            return False
        return not is_ours(current, self.module) or function_of(current) is not function_of(self.value)


class PatchHandle:
    """What :func:`apply_torch_fused` did to a model. As a context manager it reverts on exit.

    It is saved and copied with the model; ``apply_torch_fused`` with the same flags returns it again.

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
        self._outside: list[tuple[str, str]] = []  # the same of what the decode step computes

    def bind_forwards(self, forwards: Forwards) -> None:
        """Binds the forward that `forwards` has for a module's class on each such module."""
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
        """Lets experts multiply their activation and the other projection by one op."""
        for path, module in self._model.named_modules():
            if path_of(module) in EXPERTS and has_own_gate(type(module)) and not why_left(module):
                self._bind(path, module, APPLY_GATE, partial(EXPERTS[path_of(module)], module))

    def bind_adapters(self) -> None:
        """Lets LoRA adapters of PEFT be added by their products in training."""
        for path, module in self._model.named_modules():
            if is_lora(module) and type(module.base_layer) is nn.Linear:
                self._bind(path, module, "forward", partial(lora_forward, module))

    def bind_generation(self, method: str, function: Callable) -> None:
        """Binds a method that `generate` calls, on the model or on the model that a wrapper such as PEFT's holds."""
        for path, module in self._model.named_modules():
            if issubclass(type(module), GenerationMixin):
                self._bind(path, module, method, Bound(function, module))

    def bind_causal_lms(self) -> None:
        """Lets each causal language model look at its calls."""
        present = {path_of(module) for module in self._model.modules()} & CAUSAL_LMS
        forwards = {path: forward_of(path[1]) for path in present}
        self.bind_forwards({**dict.fromkeys(CAUSAL_LMS, causal_lm_forward), **forwards})

    def bind_decoder(self, gives_cache: bool = False, int8_products: bool = True) -> None:
        """Lets each of these run steps of few tokens as one op."""
        for path, module in self._model.named_modules():
            if _runs_decoder(module.__dict__.get("forward")) and DECODER not in module.__dict__:
                self._keep(path, module, DECODER, Decoder(module, gives_cache, int8_products))

    def bind_loss(self) -> None:
        """Lets each of these make its loss without its logits."""
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
        module.__dict__[name] = value  # not setattr: it is no part of the model

    def tell_what_stays(self, in_step: bool) -> None:
        """Reports the parts of known families that no fused op computes, a line for each class."""
        present = Counter(path_of(module) for module in self._model.modules())
        for (home, name), count in present.items():
            for family in FAMILIES:
                if family.home == home and name in family.stays:
                    step = in_step and name != family.linear_class and self._may_step(family)
                    (self._outside if step else self._left).append((f"{count} x {name}", family.stays[name]))

    def _may_step(self, family: Family) -> bool:
        """Whether there is a model of the family that can have a decode step."""
        return family.has_step and any(path_of(module) == family.path("causal_lm") for module in self._model.modules())

    def tell_other_families(self) -> None:
        """Reports, and warns of, models that can generate but are of no family that is known."""
        for path, module in self._model.named_modules():
            if issubclass(type(module), GenerationMixin) and path_of(module) not in CAUSAL_LMS:
                inside = tuple(id(part) for part in module.modules())
                parts = any(patch.name == "forward" and id(patch.module) in inside for patch in self._patches)
                reason = (
                    f"{UNKNOWN.format(type(module).__name__)}: "
                    f"{'its decode step is' if parts else 'all but its cache and its sampler is'} left to "
                    "transformers. If its modules compute what those do, it takes one row in "
                    "torch_fused/hf/families.py"
                )
                self._leave(path, module, reason)
                warnings.warn(f"apply_torch_fused: {reason}", stacklevel=3)

    def _bind(self, path: str, module: nn.Module, method: str, bound: partial) -> bool:
        """Whether the method is bound now."""
        if _runs_decoder(module.__dict__.get(method)):
            kept = DECODER in module.__dict__ or LOSS in module.__dict__
            if kept or not is_ours(module.__dict__[method], module):
                return False  # another handle's, or in a wrapper
            del module.__dict__[method]  # accelerate has taken its wrapper off after a revert
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
        """Takes every patch back; the modules' ``__dict__`` are then as before. A second call does nothing.

        Raises:
            RuntimeError: someone has replaced a patched method since. Nothing is reverted then. A wrapper around the
                model's forward that says what it wraps, such as accelerate's for mixed precision, may stay.
        """
        with lock_of(self._model):
            for patch in self._patches:
                if patch.replaced:
                    raise RuntimeError(
                        f"torch_fused: cannot revert {patch.path}: its {patch.name} has been replaced by "
                        f"{describe(patch.current)} since apply_torch_fused; remove that first. Nothing was reverted."
                    )
            while self._patches:  # one by one: what is interrupted can be reverted again
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
        """A table of what was patched, and of what was left to transformers with the reason."""
        lines = [f"torch_fused on {type(self._model).__name__}"]
        methods = [patch for patch in self._patches if isinstance(patch.value, partial)]
        counts = Counter((type(patch.module).__name__, patch.name) for patch in methods)
        lines += [f"  {count:4d} x {name}.{method}" for (name, method), count in counts.items()] or [
            "  nothing patched"
        ]
        lines += [f"  left: {path}: {reason}" for path, reason in self._left]
        lines += [f"  left outside of the decode step: {path}: {reason}" for path, reason in self._outside]
        for patch in self._patches:
            if isinstance(patch.value, (Decoder, HeadLoss)):
                lines += [f"  {line}" for line in patch.value.report()]
        return "\n".join(lines)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for patch in self._patches:
            home_of(type(patch.module))  # found now: a compiler can look it up, but not find it

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
    """Makes ``model`` use fused ops: the same greedy tokens in float32, and with ``decode=False`` in any dtype.

    Only this model's instances are touched: methods are bound on them, and no class and no global changes. Modules
    whose class is not exactly one of a known family's, as docs/generate.md lists them, are left alone, and so are those
    that hold or use something that is not known of their family, modules that accelerate, torch.compile or anybody else
    has wrapped, and classes whose forward was replaced; the handle's report lists these.
    A patched model can be saved, copied and sent to another process with its patches and its handle.

    Args:
        model: a transformers model, any module that holds one, or a pipeline, whose model is patched.
        norms: RMS norms run as one kernel.
        residual: in decoder layers, the addition after attention and the norm that follows it run as one kernel;
            needs ``norms``.
        rotary: queries and keys are rotated by their positions in one kernel.
        mlp: the activation between the feed-forward projections, ``silu(gate) * up`` or that with a gelu, runs as one
            kernel, in experts too.
        adapters: in training, LoRA adapters of PEFT on frozen linear layers, which are there now, are added to the
            layer's output, and to the gradient of its input, by the products that make them.
        cache: ``generate()`` uses a :class:`FusedKVCache` where it would make a ``DynamicCache``, and so does a call of
            the model without gradients and without a cache, if ``decode`` can go on from it. Your own cache, another
            ``cache_implementation`` and ``use_cache=False`` are respected.
        sampler: the loop of ``generate()`` is ours, for greedy and sampled tokens: it picks them with
            :func:`torch_fused.sampling.greedy` and :func:`torch_fused.sampling.sample`, which take over temperature,
            top-k, top-p and min-p; other processors run as before. What is drawn follows ``torch.manual_seed`` but is
            another draw than transformers' from the same probabilities. Beams, assisted generation and
            ``output_scores`` are transformers' own. Where transformers compiles the model, as for a static cache on a
            GPU, so does this loop.
        decode: with a `FusedKVCache`, up to 8 new tokens of up to 8 sequences go through the whole model in one op,
            several times as fast. The op keeps float32 between the weights, so in float32 the tokens are transformers'
            own, and in bfloat16, float16 and under autocast the logits, which are then float32, are nearer to the
            exact ones than transformers' are: set this to False to have its roundings. On a GPU ``generate()`` then
            starts each step before it knows whether the one before it was the last, and takes back one too many.
            Whatever the op cannot do, such as hooks or attention maps, runs as before; the report tells why.
        int8_products: of packed matrices, in that op on the CPU: vectors are rounded to int8 for them, 8
            values a scale, which is faster. False: as float32.
        loss: a call with ``labels`` makes its loss by :func:`torch_fused.functional.linear_cross_entropy`, in training
            and without gradients alike, as transformers counts it: labels shifted, ``ignore_index``,
            ``num_items_in_batch``. ``outputs.logits`` are made only when they are read, which must be before
            ``optimizer.step()`` changes the weights: after it, reading them raises. Models that change their logits
            before the loss (soft caps, scales) and heads that are no plain ``nn.Linear`` keep transformers' way.

    Returns:
        A :class:`PatchHandle` with ``revert()`` and ``report()``, and a context manager that reverts. For a model that
        is patched with the same flags, the handle that it has; with others it is patched anew.

    Raises:
        TypeError: ``model`` is none of these.
        RuntimeError: the model is part of one that is patched, or it has nothing that could be patched.

    Warns:
        UserWarning: a model is of no family that is known: all but its cache and its sampler is left to transformers.

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
            found = [value for value in module.__dict__.values() if is_ours(value, module) and not _runs_decoder(value)]
            if found or DECODER in module.__dict__ or LOSS in module.__dict__:
                raise RuntimeError(
                    f"apply_torch_fused: model is already patched, at {path or 'its root'}, as a part of another: "
                    "revert() that one's handle"
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
            model.__dict__[HANDLE] = handle  # not setattr: it is no part of the model
        except BaseException:
            handle.revert()
            raise
        return handle


def prepare_cache_for_generation(
    self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
) -> None:
    """The class's own method; then a `FusedKVCache` instead of the `DynamicCache` that it made, if it made one."""
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
    """Why a module of a known class stays with transformers; empty if it does not."""
    family, part = known(module)
    if family is not None and part in ("mlp", "experts") and not mismatch(module):
        activation = getattr(module, family.activation if part == "mlp" else "act_fn")
        if activation_of(activation) not in GATED:
            return f"its activation is {class_name(activation)}, neither silu nor gelu"
    return mismatch(module)


def _runs_decoder(method: Any) -> bool:
    """Whether this is our forward of a causal language model, be it in wrappers that say what they wrap."""
    function: Any = inspect.unwrap(method)
    return getattr(function_of(function) or function, "__code__", None) is causal_lm_forward.__code__


def _path(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
