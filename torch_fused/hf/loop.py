"""The loop over new tokens of a patched model: a step is one op where it can be, and nobody waits for the device."""

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..ops.decode import decode_token_
from ..ops.sampling import next_token
from .cache import CACHE
from .decode import DECODER, Decoder, Left, left_padding, rows_of
from .sampling import FusedProcessorList

NEEDED_BY_TRANSFORMERS = ("tokenizer", "assistant_tokenizer", "assistant_model", "synced_gpus", "custom_generate")
"""Arguments of `generate` that ask for another loop; transformers' calls the model, a step of which is one op too."""


def generate_by_loop(self, *args: Any, **kwargs: Any) -> Any:
    """The class's own `generate`, which sets everything up and then calls `token_loop`."""
    decoder = self.__dict__.get(DECODER)
    asked = any(kwargs.get(name) is not None for name in NEEDED_BY_TRANSFORMERS)
    if decoder is not None and len(args) <= 4 and not asked and not decoder.why_not():
        loop = functools.partial(token_loop, decoder=decoder, streamer=kwargs.get("streamer"))
        kwargs = {**kwargs, "custom_generate": loop}
    return type(self).generate(self, *args, **kwargs)


# Pipelines and wrappers look at it.
generate_by_loop.__signature__ = inspect.signature(GenerationMixin.generate)  # type: ignore[attr-defined]


def token_loop(
    model,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    decoder: Decoder,
    streamer: Any = None,
    **model_kwargs: Any,
):
    """The loop over new tokens; what the op cannot give, or another mode of generation, is left to the class's own."""
    mode = generation_config.get_generation_mode()
    filters = logits_processor.filters if isinstance(logits_processor, FusedProcessorList) else None
    wanted = generation_config.return_dict_in_generate and any(
        getattr(generation_config, f"output_{name}") for name in ("scores", "logits", "attentions", "hidden_states")
    )
    ours = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and not wanted
    if not ours or filters is None:
        method = GENERATION_MODES_MAPPING[mode]
        if "/" in method:
            raise ValueError(f"generate: {mode.value} is not a part of transformers any more: call model.generate")
        return getattr(type(model), method)(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **({} if streamer is None else {"streamer": streamer}),
            **model_kwargs,
        )
    loop = _Loop(decoder, generation_config.do_sample, filters, model_kwargs)
    tokens = loop.prefill(input_ids, generation_config)
    # A user's own criteria may look at anything, so they are asked before the next step begins.
    kinds = set(map(type, stopping_criteria))
    ahead = runs_ahead(input_ids.device) and kinds <= {MaxLengthCriteria, EosTokenCriteria}
    ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        if ends:  # a sequence that has ended gets padding
            tokens = torch.where(unfinished, tokens, generation_config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        goes_on, streamed = OnItsWay(unfinished.any()), OnItsWay(tokens)
        full = stopping_criteria.max_length is not None and input_ids.shape[1] >= stopping_criteria.max_length
        early = ahead and not full
        following = loop.decode(tokens, early=True) if early else None
        if streamer is not None:
            streamer.put(streamed.get())
        if full or not goes_on.get():
            if following is not None:
                loop.take_back()
            break
        if not early:
            following = loop.decode(tokens)
        tokens = loop.forward(input_ids) if following is None else following
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    sequences: Any = input_ids
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: loop.cache})


def runs_ahead(device: torch.device) -> bool:
    """Whether a step begins before the host knows if the one before it was the last."""
    return device.type != "cpu"


class OnItsWay:
    """A tensor of a device on its way to the host, which waits for nothing until the values are asked for."""

    def __init__(self, tensor: Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)
        self._event = None if tensor.is_cpu else torch.Event(tensor.device)
        if self._event is not None:
            with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
                self._event.record()

    def get(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def random_state(device: torch.device) -> Tensor:
    """Of torch's default generator; a GPU's is on the host too."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class Place:
    """Where the next tokens belong. Only the first of a generation is read from the device."""

    length: int  # slots of the cache in use
    starts: Tensor | None  # the first slot that each sequence attends
    positions: Tensor  # of the tokens, (batch, 1)
    rows: int  # above all positions


class _Loop:
    """Where a generation stands: what `model.generate` passes from step to step, brought up to date when needed."""

    def __init__(self, decoder: Decoder, do_sample: bool, filters: dict[str, Any], model_kwargs: dict[str, Any]):
        self.decoder = decoder
        self.model = decoder.model
        self.do_sample = do_sample
        self.filters = filters
        self.model_kwargs = model_kwargs
        self.pending = 0  # tokens that model_kwargs does not know of
        self._place: Place | None = None
        self._random_state: Tensor | None = None

    @property
    def cache(self) -> Any:
        return self.model_kwargs.get(CACHE)

    def prefill(self, input_ids: Tensor, generation_config: Any) -> Tensor:
        outputs = self.model._prefill(
            input_ids, generation_config, self.model_kwargs, is_first_iteration=not generation_config.is_assistant
        )
        return self._took(outputs)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The tokens that follow, from the model's forward."""
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            self._outputs, self.model_kwargs, num_new_tokens=self.pending
        )
        new = 1 if self.model_kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **self.model_kwargs)
        return self._took(self.model(**inputs, return_dict=True))

    def _took(self, outputs: Any) -> Tensor:
        cache = {CACHE: getattr(outputs, CACHE)}
        self._outputs = CausalLMOutputWithPast(**cache)
        self.model_kwargs.update(cache)
        self.pending = 1
        self._place = None
        logits = outputs.logits[:, -1].float()
        return next_token(logits, self.do_sample, **self.filters)

    def decode(self, tokens: Tensor, early: bool = False) -> Tensor | None:
        """The tokens that follow, from one op; None if it cannot give them. `early`: it may have to be taken back."""
        if self.decoder.is_wrapped():
            return None
        last = tokens[:, None]
        try:
            plan = self.decoder.check(last, self.cache)
            place = self._place
            if place is None or place.length != self.cache.get_seq_length():
                place = self._find_place(last)
        except Left as left:
            self.decoder.count(str(left))
            return None
        if early and self.do_sample:
            self._random_state = random_state(last.device)
        following = self.decoder.step(
            plan,
            decode_token_,
            last,
            place.positions,
            place.starts,
            place.rows,
            self.cache,
            do_sample=self.do_sample,
            **self.filters,
        )
        self._place = Place(place.length + 1, place.starts, place.positions + 1, place.rows + 1)
        self.pending += 1
        return following

    def take_back(self) -> None:
        """Undoes the last `decode`, which was early."""
        self.cache.crop(-1)
        if self._random_state is not None:
            set_random_state(self._random_state, self.cache.layers[0].keys.device)

    def _find_place(self, last: Tensor) -> "Place":
        mask, positions = self.model_kwargs.get("attention_mask"), self.model_kwargs.get("position_ids")
        length = self.cache.get_seq_length()
        if mask is not None:
            mask = F.pad(mask, (0, self.pending), value=1)
        starts = left_padding(mask, last, length)
        if positions is None:
            return Place(length, starts, torch.full(last.shape, length, device=last.device), length + 1)
        if positions.dim() != 2:
            raise Left(f"position_ids has shape {tuple(positions.shape)}")
        positions = rows_of(positions[:, -1:] + self.pending, last)
        return Place(length, starts, positions, int(positions.max()) + 1)
