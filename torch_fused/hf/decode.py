"""Runs short steps through a whole model as one op, if that computes the same as transformers."""

import functools
import inspect
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decode import decode_
from .cache import FusedKVCache, FusedLayer, FusedSlidingLayer
from .described import names_of
from .families import FAMILIES, WRAPPERS, family_of_model
from .loss import LOSS, has_labels
from .models import take_cache
from .no_cache import without_waiting
from .origin import class_name, describe, home_of, is_ours, is_own
from .plan import Left, Plan, read
from .transformers_private import CACHE, attention_of, experts_function_of, mask_function_of
from .watch import Watch, has_hooks

MOST_SEQUENCES = MOST_STEPS = 8
INTEGERS = (torch.int32, torch.int64)
UNUSED_ARGUMENTS = {"tokenizer", "assistant_tokenizer", "num_items_in_batch"}
"""Arguments that `generate` and trainers pass to a model that does not use them."""

DECODER = "_torch_fused_decoder"
"""The attribute of a patched causal language model that holds its `Decoder`."""

LOOK_AGAIN = 0.2
"""Seconds. Checking all modules of a model can take as long as a step of a small model."""

CAUSAL_LMS = {family.path("causal_lm") for family in FAMILIES} | WRAPPERS


class Decoder:
    """Runs the decode steps of one causal language model, from any thread. Stored in the model while it is patched.

    Args:
        model: the model.
        gives_cache: whether a call with ``use_cache`` but without a cache gets a `FusedKVCache`.
        int8_products: as in :func:`make_decoder`.
    """

    def __init__(self, model: nn.Module, gives_cache: bool = False, int8_products: bool = True):
        self.model: Any = model
        self.gives_cache = gives_cache
        self.int8_products = int8_products
        self.arguments = arguments_of(type(model))
        family = family_of_model(model)
        self._holds_text = family is None or family.text != "model"
        self.calls: Counter[str] = Counter()  # by the reason why transformers ran them; "" for the op
        self._read: tuple[Watch, Plan | Left] | None = None
        self._looked = -math.inf  # when the model was last checked for changes
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        names = ("model", "gives_cache", "int8_products", "arguments", "calls", "_holds_text")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _read=None, _looked=-math.inf, _lock=threading.Lock())

    def count(self, reason: str = "") -> None:
        with self._lock:
            self.calls[reason] += 1

    def plan(self) -> Plan:
        """The plan for the model as it is now; raises `Left`."""
        found, now = self._read, time.monotonic()
        if found is None or not found[0].holds() or not (isinstance(found[1], Left) or found[1].is_current):
            found = self._read = None  # frees tensors that may no longer be in the model
            found = self._read = Watch(self.model), read(self.model, self.int8_products)
        self._looked = now
        plan = found[1]
        if isinstance(plan, Left):
            raise Left(*plan.args)
        return plan

    def _recent_plan(self) -> Plan | None:
        """The plan of the last call, if the model was checked not long ago and still has its tensors."""
        found = self._read
        if found is None or isinstance(found[1], Left) or time.monotonic() - self._looked >= LOOK_AGAIN:
            return None
        return found[1] if found[1].is_current else None

    def why_not(self) -> str:
        """Why the model as it is now is left to transformers; empty if it has a decode step."""
        try:
            self.plan()
        except Left as left:
            return str(left)
        return ""

    def report(self) -> list[str]:
        """The path of the model's next steps, and those of the calls so far."""
        reason = self.why_not()
        one_op = f"decode: steps of up to {MOST_STEPS} tokens run as one op"
        lines = [f"decode: left to transformers: {reason}" if reason else one_op]
        with self._lock:
            calls = self.calls.copy()
        lines += [f"  {count} calls as one op" for why, count in calls.items() if not why]
        lines += [f"  {count} calls left to transformers: {why}" for why, count in calls.items() if why]
        return lines

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the class's own forward, or the same logits, in float32, from one op."""
        own = type(self.model).forward
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache = take_cache(given)
        gives = cache is None and self._can_give_cache(given)
        if gives:
            ids = given.get("input_ids")
            tokens = (given["inputs_embeds"] if ids is None else ids).shape[1]
            cache = FusedKVCache(self.model.config, expected_len=tokens)
        try:
            return self._forward(cache, **given)
        except Left as left:
            self.count(str(left))
        return own(self.model, **given, **{CACHE: cache}) if gives else own(self.model, *args, **kwargs)

    def step(
        self,
        plan: Plan,
        run: Callable[..., Tensor],
        input_ids: Tensor,
        positions: Tensor,
        starts: Tensor | None,
        rows: int,
        cache: FusedKVCache,
        *,
        undisturbed: bool = False,
        **more: Any,
    ) -> Tensor:
        """Calls the op `run` for new tokens after those in the cache, with the plan from `check`.

        All positions are below `rows`.
        """
        cos, sin = plan.cos_and_sin(rows)
        keys, values = cache.room_for(input_ids.shape[1], undisturbed=undisturbed)
        length = cache.get_seq_length()
        layers: list[Any] = cache.layers
        dropped = [layer.dropped for layer in layers]
        result = run(
            plan.decoder,
            input_ids.long().contiguous(),
            positions.long().contiguous(),
            starts,
            cos=cos,
            sin=sin,
            keys=keys,
            values=values,
            length=length,
            dropped=dropped if any(dropped) else (),
            **more,
        )
        cache.advance(input_ids.shape[1])
        self.count()
        return result

    def check(self, input_ids: Tensor, cache: Any, *, undisturbed: bool = False) -> Plan:
        """The plan, if the op supports this call; raises `Left` otherwise.

        Args:
            undisturbed: no foreign code has run in this thread since the last call, which had this cache and as many
                token ids. Changes by other threads are then noticed within `LOOK_AGAIN` seconds.
        """
        recent = self._recent_plan() if undisturbed else None
        if recent is not None:
            self._check_room(cache, input_ids.shape[1])
            return recent
        self._check_cache(input_ids, cache)
        plan = self.plan()
        if [layer.window for layer in cache.layers] != plan.windows:
            raise Left("the cache has a different number of layers, or different windows")
        if input_ids.device != plan.device:
            raise Left(f"the token ids are on {input_ids.device}, the weights on {plan.device}")
        if torch.is_autocast_enabled(plan.device.type):
            _widen(cache, plan.dtype)
        if not cache.is_uniform(plan.dtype, plan.device, input_ids.shape[0]):
            raise Left("the cache has a different dtype, device or batch size, or its layers differ")
        if self.needs_gradients():
            raise Left("gradients are enabled")
        if any(module.training for module in plan.dropout):
            raise Left("the model is in training mode and has dropout: call model.eval()")
        config = plan.config
        if config.num_hidden_layers != plan.layers:
            raise Left(f"config.num_hidden_layers has changed to {config.num_hidden_layers}")
        if not getattr(config, "is_causal", True):
            raise Left("config.is_causal is False")
        implementation = attention_of(config)
        if implementation not in ("eager", "sdpa"):
            raise Left(f"its attention is {implementation!r}, not 'sdpa' or 'eager'")
        home: Any = home_of(type(self.model.get_submodule(plan.family.text)))
        attention = home.ALL_ATTENTION_FUNCTIONS.get(implementation, home.eager_attention_forward)
        for function in (attention, mask_function_of(implementation)):
            if not is_own(function):
                raise Left(f"{implementation} attention is {describe(function)}")
        experts = experts_function_of(config) if plan.family.experts else None
        if experts is not None and not is_own(experts):
            raise Left(f"its experts are computed by {describe(experts)}")
        return plan

    def needs_gradients(self) -> bool:
        model = self.model
        return torch.is_grad_enabled() and (
            any(parameter.requires_grad for parameter in model.parameters())
            or bool(model.get_input_embeddings()._forward_hooks)  # enable_input_require_grads
        )

    def is_wrapped(self) -> bool:
        """Whether foreign code runs around the model's forward."""
        model = self.model
        replaced = "forward" in model.__dict__ and not is_ours(model.__dict__["forward"], model)
        return replaced or has_hooks(model) or model._compiled_call_impl is not None

    @property
    def config(self) -> Any:
        """The configuration of the text model."""
        config = self.model.config
        return config.get_text_config(decoder=True) if self._holds_text else config

    def _can_give_cache(self, given: dict[str, Any]) -> bool:
        use_cache = given.get("use_cache")
        wanted = self.gives_cache and (self.config.use_cache if use_cache is None else use_cache)
        return wanted and not torch.jit.is_tracing() and not self.needs_gradients() and not self.why_not()

    def _check_cache(self, input_ids: Tensor, cache: Any) -> None:
        if type(cache) is not FusedKVCache:
            raise Left(f"the cache is a {class_name(cache)}, not a FusedKVCache")
        if any(type(layer) not in (FusedLayer, FusedSlidingLayer) for layer in cache.layers):
            raise Left("the cache has layers other than plain attention")
        layers: Any = cache.layers
        if not all(layer.is_initialized for layer in layers):
            raise Left("the cache is empty (a prompt)")
        batch, steps = input_ids.shape
        if steps > MOST_STEPS:
            raise Left(f"more than {MOST_STEPS} new tokens (a prompt)")
        if batch > MOST_SEQUENCES:
            raise Left(f"more than {MOST_SEQUENCES} sequences")
        self._check_room(cache, steps)

    def _check_room(self, cache: Any, steps: int) -> None:
        if cache.max_cache_len is not None and cache.get_seq_length() + steps > cache.max_cache_len:
            raise Left("the cache is full")

    def _forward(
        self,
        cache: Any,
        /,  # kwargs may contain another `cache`, as in continuous batching of transformers 5.17
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        config = self.config
        if input_ids is None or inputs_embeds is not None:
            raise Left("inputs_embeds were passed instead of input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in INTEGERS:
            raise Left("input_ids is not a tensor of integers (batch, tokens)")
        if labels is not None:
            raise Left("labels were passed")
        if not (config.use_cache if use_cache is None else use_cache):
            raise Left("use_cache is False")
        if cache is None:
            raise Left("no cache was passed")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None) or getattr(config, name, False) or getattr(self.model.config, name, False):
                raise Left(f"{name} is True")
        if not kwargs.pop("return_dict", True) or not self.model.config.return_dict:
            raise Left("return_dict is False")
        unknown = [name for name, value in kwargs.items() if name not in UNUSED_ARGUMENTS and not _is_nothing(value)]
        if unknown:
            raise Left(f"unsupported arguments: {', '.join(unknown)}")
        if not isinstance(logits_to_keep, int):
            raise Left("logits_to_keep is a tensor")
        plan = self.check(input_ids, cache)
        length = cache.get_seq_length()
        starts = left_padding(attention_mask, input_ids, length)
        rows = length + input_ids.shape[1]
        if position_ids is None and plan.family.tables == "sections":
            raise Left("no position_ids were passed; this model computes its own")
        if position_ids is None:
            position_ids = torch.arange(length, rows, device=input_ids.device)[None].expand(input_ids.shape)
        else:
            position_ids = rows_of(position_ids, input_ids)
            rows = int(position_ids.max()) + 1
        plan.check_positions(rows)
        logits = self.step(
            plan,
            decode_,
            input_ids,
            position_ids,
            starts,
            rows,
            cache,
            logits_to_keep=min(logits_to_keep, input_ids.shape[1]),
        )
        cls: Any = type(self.model)
        return output_of(cls)(logits=logits, **{CACHE: cache})


# ---- the forward of a patched model ---------------------------------------------------------------------------------


def causal_lm_forward(self, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or len(args) > len(names := arguments_of(type(self))):
        return type(self).forward(self, *args, **kwargs)
    decoder, loss = self.__dict__.get(DECODER), self.__dict__.get(LOSS)
    forward = partial(type(self).forward, self) if decoder is None else decoder.forward
    if loss is None or not has_labels(names, args, kwargs):
        return forward(*args, **kwargs)
    with loss.running():
        return without_waiting(self, forward, {**dict(zip(names, args, strict=False)), **kwargs})


_forwards: dict[str, FunctionType] = {}


def forward_of(cls: str) -> FunctionType:
    """`causal_lm_forward` with the signature of the class's forward, which `generate` and trainers inspect."""
    if cls not in _forwards:
        home = next(home for home, name in CAUSAL_LMS if name == cls)
        name = f"forward_of_{cls}"
        function = FunctionType(causal_lm_forward.__code__, globals(), name)
        function.__qualname__ = name
        own = getattr(import_module(home), cls).forward
        function.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        _forwards[cls] = function
    return _forwards[cls]


def __getattr__(name: str) -> Any:
    """The forwards of causal language models, which are pickled by name."""
    cls = name.removeprefix("forward_of_")
    if any(cls == known != name for _, known in CAUSAL_LMS):
        return forward_of(cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def arguments_of(cls: Any) -> tuple[str, ...]:
    """The positional arguments of a class's forward."""
    return _names_by_position(cls.forward)


@functools.cache
def _names_by_position(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


@functools.cache
def output_of(cls: Any) -> Any:
    """The class of the result of a class's forward."""
    name = next(name for name in names_of(cls.forward) if name.endswith("CausalLMOutputWithPast"))
    return getattr(home_of(cls), name)


def rows_of(position_ids: Any, input_ids: Tensor) -> Tensor:
    """The position of each token, which is a row of the tables; raises `Left` for anything else."""
    shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else ()
    if len(shape) == 3 and shape[0] in (1, 3, 4) and position_ids.dtype in INTEGERS:  # of time, height and width
        if not (position_ids[-3:] == position_ids[-1]).all():
            raise Left("position_ids belong to an image")
        position_ids = position_ids[-1]
        shape = shape[1:]
    if shape not in (tuple(input_ids.shape), (1, input_ids.shape[1])) or position_ids.dtype not in INTEGERS:
        raise Left(f"position_ids is not a tensor of integers (batch, tokens): {shape}")
    if int(position_ids.min()) < 0:
        raise Left("position_ids has negative positions")
    return position_ids.expand(input_ids.shape)


def _is_nothing(argument: Any) -> bool:
    return argument is None or argument is False or (isinstance(argument, dict) and not argument)


def _widen(cache: Any, dtype: torch.dtype) -> None:
    """Converts keys and values to the weights' dtype; after a prompt, autocast leaves some in its own dtype."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            if states.dtype != dtype:
                setattr(layer, name, states.to(dtype))


def left_padding(mask: Tensor | None, input_ids: Tensor, length: int) -> Tensor | None:
    """The first slot that each sequence attends to, None if all attend to slot 0; raises `Left` for other masks."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (input_ids.shape[0], length + input_ids.shape[1]):
        raise Left(f"attention_mask is not of shape (batch, tokens): {tuple(getattr(mask, 'shape', ()))}")
    attended = mask != 0
    if attended.all():
        return None
    starts = attended.int().argmax(-1)
    if not torch.equal(attended.sum(-1), mask.shape[1] - starts) or int(starts.max()) > length:
        raise Left("attention_mask is not just left padding")
    return starts
