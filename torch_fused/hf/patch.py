"""Binds fused forwards on the instances of one model, and takes them back."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .cache import FusedKVCache
from .models import DECODER_LAYERS, RMS_NORMS, Forwards


@dataclass(frozen=True)
class Patch:
    """One method bound on one module; the class's own shows again when it is taken away."""

    path: str
    module: nn.Module
    method: str
    bound: MethodType

    @property
    def current(self) -> Callable | None:
        return self.module.__dict__.get(self.method)


class PatchHandle:
    """What `apply_torch_fused` did to a model. As a context manager it reverts on exit."""

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

    def bind_cache(self) -> None:
        """Makes `generate` of the model, or of the model that a wrapper such as PEFT's holds, use a FusedKVCache."""
        for path, module in self._model.named_modules():
            if issubclass(type(module), GenerationMixin):
                self._bind(path, module, "_prepare_cache_for_generation", prepare_cache_for_generation)

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
            if patch.current is not patch.bound:
                raise RuntimeError(
                    f"torch_fused: cannot revert {patch.path}: its {patch.method} has been replaced by "
                    f"{_describe(patch.current)} since apply_torch_fused; remove that first. Nothing was reverted."
                )
        for patch in self._patches:
            delattr(patch.module, patch.method)
        self._patches.clear()

    @property
    def patched(self) -> bool:
        """Whether any patch is in place."""
        return bool(self._patches)

    def report(self) -> str:
        """A table of what was patched, and of what was left to transformers with the reason."""
        lines = [f"torch_fused on {type(self._model).__name__}"]
        counts = Counter((type(patch.module).__name__, patch.method) for patch in self._patches)
        lines += [f"  {count:4d} x {name}.{method}" for (name, method), count in counts.items()] or [
            "  nothing patched"
        ]
        lines += [f"  left: {path}: {reason}" for path, reason in self._left]
        return "\n".join(lines)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.revert()


def apply_torch_fused(
    model: nn.Module, *, norms: bool = True, residual: bool = True, cache: bool = True
) -> PatchHandle:
    """Makes ``model`` use fused ops, bit for bit with the results of its own code.

    Only this model's instances are touched: methods are bound on them, and no class and no global changes. Modules
    whose class is not exactly one of Llama's, Qwen2's or Qwen3's are left alone, and so are modules that accelerate,
    torch.compile or anybody else has wrapped; the handle's report lists these.

    Args:
        model: a transformers model, or any module that holds one.
        norms: RMS norms run as one kernel.
        residual: in decoder layers, the addition after the attention and the norm that follows run as one kernel; needs
            ``norms``.
        cache: ``generate()`` uses a :class:`FusedKVCache` where it would make a ``DynamicCache``. Your own
            ``past_key_values``, another ``cache_implementation`` and ``use_cache=False`` are respected.

    Returns:
        A handle with ``revert()`` and ``report()``, and a context manager that reverts.

    Raises:
        RuntimeError: the model is patched already, or it has nothing that could be patched.

    Example:
        >>> handle = apply_torch_fused(model)
        >>> model.generate(**tokenizer("Hello", return_tensors="pt"))
        >>> handle.revert()
    """
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
    if cache:
        handle.bind_cache()
    if not handle.patched:
        raise RuntimeError(f"apply_torch_fused: nothing could be patched.\n{handle.report()}")
    return handle


def prepare_cache_for_generation(
    self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
) -> None:
    """The class's own method; then a `FusedKVCache` instead of the `DynamicCache` that it made, if it made one."""
    user_cache = model_kwargs.get("past_key_values")
    type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    cache = model_kwargs.get("past_key_values")
    if user_cache is not None or type(cache) is not DynamicCache or cache.offloading:
        return
    fused = FusedKVCache(self.config.get_text_config(decoder=True), expected_len=max_cache_length)
    if generation_config.is_assistant:
        fused.activate_past_recording()
    model_kwargs["past_key_values"] = fused


FUNCTIONS = {prepare_cache_for_generation, *RMS_NORMS.values(), *DECODER_LAYERS.values()}
"""Every function that is ever bound."""


def _describe(method: Callable | None) -> str:
    if method is None:
        return "the class's own"
    function = getattr(method, "__func__", method)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"
