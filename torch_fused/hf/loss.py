"""The loss of a model, with logits that are computed only when they are read."""

import copy
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..functional import linear_cross_entropy
from .models import is_hooked, is_transformed
from .origin import class_name, function_of, home_of

LOSS = "_torch_fused_loss"
"""The attribute of a patched causal language model that holds its `HeadLoss`."""

_running = threading.local()


class HeadLoss:
    """Tells `head_forward` that a causal language model runs with labels, and counts losses and logits.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def count(self, what: str) -> None:
        with self._lock:
            self.calls[what] += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """In this context, the model's head returns `Logits` on this thread."""
        before = getattr(_running, "loss", None)
        _running.loss = self
        try:
            yield
        finally:
            _running.loss = before

    def report(self) -> list[str]:
        """Counts of the calls with labels so far."""
        lines = ["loss: computed without the logits in memory"]
        return lines + [f"  {count} {what}" for what, count in self.calls.items()]


def has_labels(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward with these argument names was called with labels."""
    if args and "labels" in names and len(args) > (place := names.index("labels")):
        return args[place] is not None
    return kwargs.get("labels") is not None


def why_no_loss(model: Any, head: Any) -> str:
    """Why a model's loss needs all logits; empty if it does not."""
    if type(head) is not nn.Linear:
        return f"its head is {'missing' if head is None else f'a {class_name(head)}'}"
    config = model.config.get_text_config(decoder=True)
    for setting, neutral in (("logits_scaling", 1.0), ("final_logit_softcapping", None)):
        value = getattr(config, setting, neutral)
        if value != neutral:
            return f"config.{setting} is {value}: its logits are changed before the loss"
    return ""


def head_forward(self, hidden: Tensor) -> Tensor:
    """Calls the class's own forward, or returns `Logits` if the model was called with labels."""
    loss = getattr(_running, "loss", None)
    if loss is None or not _can_wait(self, hidden):
        return type(self).forward(self, hidden)
    source = _Source(loss, self, hidden)
    return Logits.of(source, source.hidden, _Head.apply(source, source.hidden, self.weight, self.bias))


def _can_wait(head: Any, hidden: Any) -> bool:
    operands = (hidden, head.weight) if head.bias is None else (hidden, head.weight, head.bias)
    if any(type(operand) not in (Tensor, nn.Parameter) for operand in operands):
        return False
    kind = hidden.device.type
    alike = torch.is_autocast_enabled(kind) or len({operand.dtype for operand in operands}) == 1
    return (
        alike
        and hidden.dim() >= 2
        and kind in ("cpu", "cuda", "mps")
        and len({operand.device for operand in operands}) == 1
        and hidden.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and function_of(head.__dict__.get("forward")) is head_forward  # nothing wraps it
        and home_of(type(head)) is not None
        and not is_hooked(head)
        and not torch.jit.is_tracing()
        and not is_transformed(*operands)
    )


class Logits(Tensor):
    """Logits that a head has not computed yet.

    `F.cross_entropy` of them, as transformers calls it, runs `linear_cross_entropy` of the hidden states. Any other use
    computes them first, in the autocast mode of the head's call, and gets a plain tensor with the same memory. If the
    weights have changed since then, it raises an error. For autograd they are a view of what `_Head` returns or of a
    copy of that, and the plain tensor is a view of them, so that torch keeps account of all changes in place.
    """

    _source: "_Source"
    _hidden: Tensor
    _root: Tensor  # what autograd takes them for a view of
    _whole: "Logits | None" = None  # those that these are a part of

    @classmethod
    def of(cls, source: "_Source", hidden: Tensor, root: Tensor) -> "Logits":
        """Those of hidden states; `root` is from `_empty`, with their history."""
        with torch.enable_grad(), _Wraps():
            self = torch.ops.aten.alias.default(root)
        self._source, self._hidden, self._root = source, hidden, root
        return self

    @property
    def is_made(self) -> bool:
        return "_values" in (self if self._whole is None else self._whole).__dict__

    def made(self) -> Tensor:
        """The logits as a plain tensor, computed now if needed."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(Logits._made)(self)
        return self._made()

    def _made(self) -> Tensor:
        # In these modes, the view may be changed in place wherever the logits may.
        with _as_they_are(), torch.inference_mode(self._source.inference), torch.enable_grad():
            return torch.ops.aten.alias.default(self)

    def _memory(self) -> Tensor:
        """The values, without a history."""
        if self._whole is not None:
            with _as_they_are():
                return self._whole._memory().as_strided(self.shape, self.stride(), self.storage_offset())
        if "_values" not in self.__dict__:
            with _as_they_are(), self._source.then(), torch.no_grad():
                values = self.__dict__.setdefault("_values", self._source.logits(self._hidden).to(self.dtype))
                if not self._source.inference:
                    self._root.data = values
        return self.__dict__["_values"]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with _as_they_are():
                return func(*args, **kwargs)
        if func in _LATER and type(args[0]) is cls and not args[0].is_made:
            result = _LATER[func](func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _ASKS_FOR_GRADIENTS and not (func is Tensor.register_hook and _is_fsdps(args[1])):
            pytree.tree_map_only(cls, cls._check_gradient, (args, kwargs))
        if func in _OF_AUTOGRAD:
            owners, kwargs = pytree.tree_map_only(cls, cls._in_autograd, (args, kwargs))
            with _as_they_are():
                result = func(*owners, **kwargs)
            if func not in _MAKES_LEAVES:
                return result
            torch.autograd.graph.increment_version(owners[0])  # so that views look for their history again
            return args[0]
        if func is Tensor.__deepcopy__:
            return copy.deepcopy(args[0].made(), *args[1:])
        return _call(func, args, kwargs)

    def _in_autograd(self) -> Tensor:
        """What has their history, hooks and gradient."""
        return self._root if self._whole is None else self

    def _check_gradient(self) -> None:
        if self._source.has_loss:
            raise RuntimeError(
                "apply_torch_fused: the loss of this call was computed without its logits, so it gives them no "
                "gradient: pass loss=False to apply_torch_fused"
            )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if getattr(_running, "waits", False):
            return cls._of_call(func, *args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(cls, cls._memory, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def _of_call(cls, func: Callable, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The result of a view or a copy of logits, not computed either; of a copy, its root."""
        if type(logits) is not cls:
            return func(logits, *args, **kwargs)
        like = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")
        made = func(like, *args, **kwargs)
        if made.untyped_storage()._cdata != like.untyped_storage()._cdata:
            return _empty(made.shape, made.dtype, logits.device)
        place = (made.shape, made.stride(), made.storage_offset() + logits.storage_offset())
        self = Tensor._make_wrapper_subclass(cls, *place, dtype=made.dtype, device=logits.device)
        self._whole = logits if logits._whole is None else logits._whole
        return self


_as_they_are = torch._C.DisableTorchFunctionSubclass
"""In this context, torch's functions get `Logits` themselves."""


def _call(func: Callable, args: Any, kwargs: Any) -> Any:
    """Calls a function with plain tensors for all `Logits`."""
    given: list[Tensor] = []

    def make(logits: Logits) -> Tensor:
        given.append(logits.made())
        return given[-1]

    args, kwargs = pytree.tree_map_only(Logits, make, (args, kwargs))
    before = list(map(_form, given))
    result = None if func in _MOVES else func(*args, **kwargs)
    if func in _MOVES or before != list(map(_form, given)):
        raise RuntimeError(
            f"apply_torch_fused: {getattr(func, '__name__', func)} changes the shape or the memory of outputs.logits, "
            "which are computed when they are read: use it on outputs.logits.clone(), or pass loss=False to "
            "apply_torch_fused"
        )
    return result


def _form(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


def _empty(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element, until the values of all are computed."""
    return torch.empty_strided(shape, [0] * len(shape), dtype=dtype, device=device)


class _Wraps(TorchDispatchMode):
    """In this context, a view of a tensor is `Logits`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        (root,) = args
        return Tensor._make_wrapper_subclass(Logits, root.shape, dtype=root.dtype, device=root.device)


class _Head(torch.autograd.Function):
    """A head's call, for autograd."""

    @staticmethod
    def forward(ctx, source, hidden, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(hidden, weight)
        ctx.dtype, ctx.bias = source.dtype, bias is not None
        shape = (*hidden.shape[:-1], weight.shape[0])
        return _empty(shape, source.dtype, hidden.device)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        rows = grad.to(ctx.dtype).flatten(0, -2)
        of_hidden = (rows @ weight.to(ctx.dtype)).view(hidden.shape).to(hidden.dtype)
        of_weight = (rows.T @ hidden.flatten(0, -2).to(ctx.dtype)).to(weight.dtype)
        return None, of_hidden, of_weight, rows.sum(0).to(weight.dtype) if ctx.bias else None


def _is_fsdps(hook: Any) -> bool:
    """Whether a hook is to tell FSDP that a backward pass begins: the loss, which has one too, tells it as well."""
    return str(getattr(getattr(hook, "func", hook), "__module__", None)).startswith("torch.distributed.")


class _Source:
    """A call of a head: its weights and hidden states, and the modes in which it computes logits."""

    def __init__(self, loss: HeadLoss, head: nn.Linear, hidden: Tensor):
        self.loss = loss
        self.head, self.weight, self.bias = head, head.weight, head.bias
        # Torch does not count the changes of an inference tensor.
        self.hidden = hidden.clone() if hidden.is_inference() else hidden
        self.device = hidden.device.type
        self.autocast = torch.is_autocast_enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device) if self.autocast else hidden.dtype
        self.gradients, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.versions = self._versions()
        self.samples = self._samples()
        self.stepped = False  # an optimizer has changed the weights, possibly without a new version number
        self.has_loss = False
        _steps.watch(self)

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def _versions(self) -> list[tuple[int, int]]:
        """And where the tensors are: assigned to `.data`, others are elsewhere."""
        tensors = [*self.weights, self.hidden]
        return [(0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in tensors]

    def _samples(self) -> list[Tensor]:
        """Some of the weights, which show what is written to their `.data`: that has no version number."""
        parts = [tuple(slice(None, None, size // 32 or 1) for size in weight.shape) for weight in self.weights]
        return [weight.detach()[part].clone() for weight, part in zip(self.weights, parts, strict=True)]

    def parameters(self) -> list[Any]:
        """The head's, and those that it has now: FSDP exchanges them, and an optimizer has those between calls."""
        return [*self.weights, *self.head._parameters.values()]

    @contextmanager
    def then(self) -> Iterator[None]:
        """The modes of the head's call."""
        if self.stepped or self._versions() != self.versions:
            self._refuse()
        with (
            torch.inference_mode(self.inference),
            torch.autocast(self.device, dtype=self.dtype if self.autocast else None, enabled=self.autocast),
            torch.set_grad_enabled(self.gradients),
        ):
            yield

    def _refuse(self) -> None:
        raise RuntimeError(
            "apply_torch_fused: the logits of a call with labels are computed when they are read, but the head's "
            "weights have changed since that call, or its hidden states, or FSDP has freed them. Read outputs.logits "
            "before optimizer.step(), with FSDP before loss.backward(), or pass loss=False to apply_torch_fused."
        )

    def logits(self, hidden: Tensor) -> Tensor:
        for before, now in zip(self.samples, self._samples(), strict=True):
            if not torch.allclose(before, now, rtol=0, atol=0, equal_nan=True):
                self._refuse()
        self.loss.count("times the logits were computed because they were read")
        return F.linear(hidden, self.weight, self.bias)

    def cross_entropy(self, hidden: Tensor, target: Tensor, **options: Any) -> Tensor:
        self.loss.count("losses without logits")
        self.has_loss = True
        with self.then():
            return linear_cross_entropy(hidden, self.weight, target, bias=self.bias, **options)


class _Steps:
    """Marks the calls of heads whose weights an optimizer has updated, by a torch hook that exists while needed."""

    def __init__(self) -> None:
        self._sources: weakref.WeakSet[_Source] = weakref.WeakSet()
        self._hook: Any = None
        self._lock = threading.Lock()

    def watch(self, source: _Source) -> None:
        with self._lock:
            self._sources.add(source)
            if self._hook is None:
                self._hook = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        with self._lock:
            sources = list(self._sources)  # none, usually: nobody has kept the logits
            params = [param for group in optimizer.param_groups for param in group["params"]] if sources else []
            stepped = set(map(id, params))
            for source in sources:
                if not stepped.isdisjoint(map(id, source.parameters())):
                    source.stepped = True
                    self._sources.discard(source)
            if not self._sources and self._hook is not None:
                self._hook.remove()
                self._hook = None


_steps = _Steps()


# ---- operations on logits that are not computed yet -----------------------------------------------------------------


def _wait(func: Callable, logits: Logits, hidden: Tensor, *args: Any, **kwargs: Any) -> Logits:
    """A view or a copy of logits, as torch makes it: the logits of these hidden states."""
    _running.waits = True
    try:
        with _as_they_are():
            result = func(logits, *args, **kwargs)
    finally:
        _running.waits = False
    if type(result) is Tensor:
        return Logits.of(logits._source, hidden, result)
    if result is not logits:
        result._source, result._hidden = logits._source, hidden
    return result


def _same(func: Callable, logits: Logits, *args: Any, **kwargs: Any) -> Any:
    return _wait(func, logits, logits._hidden, *args, **kwargs)


def _to(func: Callable, logits: Logits, *args: Any, **kwargs: Any) -> Any:
    return _same(func, logits, *args) if args == (torch.float32,) and not kwargs else NotImplemented


def _view(func: Callable, logits: Logits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if shape != (-1, logits.shape[-1]):
        return NotImplemented
    hidden = logits._hidden
    return _wait(func, logits, hidden.reshape(-1, hidden.shape[-1]), *shape)


def _getitem(func: Callable, logits: Logits, index: Any) -> Any:
    """Selects rows: `[..., begin:end, :]`."""
    if not isinstance(index, tuple) or [type(part) for part in index] != [type(...), slice, slice]:
        return NotImplemented
    if index[2] != slice(None):
        return NotImplemented
    return _wait(func, logits, logits._hidden[index], index)


def _cross_entropy(func: Callable, *args: Any, **kwargs: Any) -> Any:
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    logits, target = given.arguments["input"], given.arguments["target"]
    others = [given.arguments[name] for name in ("weight", "size_average", "reduce")]
    if (
        any(other is not None for other in others)
        or type(target) is not Tensor
        or target.dtype != torch.int64
        or target.device != logits.device
        or logits.dim() != 2
        or target.shape != logits.shape[:1]
    ):
        return NotImplemented
    options = {name: given.arguments[name] for name in ("ignore_index", "reduction", "label_smoothing")}
    loss = logits._source.cross_entropy(logits._hidden, target, **options)
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


_SIGNATURE = inspect.signature(F.cross_entropy)
_LATER: dict[Any, Callable[..., Any]] = {
    Tensor.float: _same,
    Tensor.to: _to,
    Tensor.clone: _same,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.contiguous: _same,
    Tensor.__getitem__: _getitem,
    F.cross_entropy: _cross_entropy,
}
_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cpu", "is_cuda", "is_mps", "is_xla"),
    *("is_meta", "is_sparse", "is_quantized", "is_nested", "_backward_hooks"),
)
_hooks: Any = Tensor._backward_hooks  # torch sets them while it holds a lock
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.element_size, Tensor.__hash__, _hooks.__set__),
    *(Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous, Tensor.is_inference),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
}
"""What does not need the logits' values."""
_data: Any = Tensor.data
_MOVES = {_data.__set__, Tensor.set_}
"""What puts a tensor in other memory."""
_ASKS_FOR_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}
_grad: Any = Tensor.grad
_requires_grad: Any = Tensor.requires_grad
_MAKES_LEAVES = {_requires_grad.__set__, Tensor.requires_grad_}
_FACTS = ("requires_grad", "grad_fn", "is_leaf", "grad", "retains_grad", "_base", "_version")
_OF_AUTOGRAD = {
    *(getattr(Tensor, name).__get__ for name in _FACTS),
    *(_grad.__set__, _grad.__delete__),
    *_ASKS_FOR_GRADIENTS,
    *_MAKES_LEAVES,
}
