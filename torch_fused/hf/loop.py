"""The generation loop of a patched model: a step runs as one op if possible, and never waits for the device."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..ops.decode import decode_token_
from ..ops.sampling import next_token
from . import transformers_private as private
from .decode import DECODER, Decoder, left_padding, rows_of
from .ending import EndingOfAll, EndingOfOne, Sequences, ToHost, max_length
from .origin import innermost
from .plan import Left, Plan
from .sampling import split_processors
from .transformers_private import CACHE

GENERATE = inspect.signature(GenerationMixin.generate)
ASK_FOR_ANOTHER = ("assistant_tokenizer", "assistant_model", "synced_gpus", "custom_generate")
"""Arguments of `generate` that need another loop."""

LOOK_AT_TOKENS_ALONE = {MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, StopStringCriteria}
"""Stopping criteria that depend only on the tokens, so that the next step may start first. Custom ones may not."""

STEPS_AHEAD = 64  # whose positions are computed at once

HAND_TOKENS_ON = {type(None), TextStreamer, TextIteratorStreamer, AsyncTextIteratorStreamer}
"""Streamers that do not touch the model. Custom ones may."""


def generate_by_loop(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the class's own `generate`, with `token_loop` for the new tokens if it supports the request."""
    named = dict(GENERATE.bind(self, *args, **kwargs).arguments)
    del named["self"]
    others = named.pop("kwargs", {})
    if any({**named, **others}.get(name) is not None for name in ASK_FOR_ANOTHER) or not has_common_loop(self):
        return type(self).generate(self, *args, **kwargs)
    config = what_is_asked(self, named.get("generation_config"), others)
    mode, tokenizer = config.get_generation_mode(), others.get("tokenizer")
    if (
        mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        or (config.return_dict_in_generate and config.output_scores)  # the tokens must be drawn from these
        or config.penalty_alpha is not None  # contrastive search, except for a default of top_k
        or config.token_healing
        or (config.stop_strings is not None and tokenizer is None)
    ):
        return type(self).generate(self, *args, **kwargs)
    if config.stop_strings is not None:  # `generate` does not pass the tokenizer to a custom loop
        stops = StopStringCriteria(tokenizer, config.stop_strings)
        named["stopping_criteria"] = StoppingCriteriaList([*(named.get("stopping_criteria") or ()), stops])
        others = {**others, "stop_strings": None}
    decoder = self.__dict__.get(DECODER)
    if decoder is not None and decoder.why_not():
        decoder = None
    named["custom_generate"] = functools.partial(token_loop, decoder=decoder, streamer=named.get("streamer"))
    return type(self).generate(self, **named, **others)


# Pipelines and wrappers inspect it.
generate_by_loop.__signature__ = GENERATE  # type: ignore[attr-defined]


def what_is_asked(model: Any, given: GenerationConfig | None, arguments: dict[str, Any]) -> GenerationConfig:
    """The configuration that `generate` will use, from its arguments and the model. `generate` itself checks it."""
    config = copy.copy(model.generation_config)
    if given is not None:
        vars(config).update({name: value for name, value in vars(given).items() if value is not None})
    vars(config).update({name: value for name, value in arguments.items() if name in vars(config)})
    return config


def has_common_loop(model: Any) -> bool:
    """Whether the model uses transformers' standard loop, and no other process waits for its steps."""
    for name in ("generate", "_sample"):
        own = innermost(getattr(type(model), name))
        if own is None or own.__qualname__ != f"GenerationMixin.{name}":
            return False
    return not model.config.is_encoder_decoder and not private.is_in_step_with_others(model)


def token_loop(
    model,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    decoder: Decoder | None,
    streamer: Any = None,
    **model_kwargs: Any,
):
    """Greedy or sampled tokens after `input_ids`, as in transformers' own loop."""
    wanted = [
        name
        for name in ("logits", "attentions", "hidden_states")
        if generation_config.return_dict_in_generate and getattr(generation_config, f"output_{name}")
    ]
    loop = _Loop(model, None if wanted else decoder, generation_config, logits_processor, model_kwargs, wanted)
    plain = set(map(type, stopping_criteria)) <= LOOK_AT_TOKENS_ALONE
    ending: EndingOfAll | EndingOfOne
    if plain and len(input_ids) == 1:
        ending = EndingOfOne(stopping_criteria, input_ids)
    else:
        ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        padding = private.pad_token(generation_config, input_ids.device) if ends else None
        ending = EndingOfAll(stopping_criteria, padding, input_ids)
    sequences, streamed, end = Sequences(input_ids), ToHost(), max_length(stopping_criteria)
    tokens = loop.prefill(input_ids)
    loop.undisturbed = plain and type(streamer) in HAND_TOKENS_ON
    ahead = loop.runs_ahead(input_ids) and plain
    with private.optimized_for_decode(model):
        while True:
            tokens = ending.padded(tokens)
            sequences.append(tokens)
            ending.look_at(sequences)
            if streamer is not None:
                streamed.send(tokens)
            full = end is not None and sequences.length >= end
            following = loop.early_step(sequences) if ahead and not full else None
            if streamer is not None:
                streamer.put(streamed.get())
            if full or ending.has_come():
                if following is not None:
                    loop.take_back()
                break
            tokens = loop.step(sequences) if following is None else following
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequences.ids()
    outputs: dict[str, Any] = {name: tuple(values) for name, values in loop.outputs.items()}
    return GenerateDecoderOnlyOutput(sequences=sequences.ids(), **outputs, **{CACHE: loop.cache})  # type: ignore[arg-type]


def runs_ahead(device: torch.device) -> bool:
    """Whether a step starts before the host knows if the previous one was the last."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Place:
    """The place of the next tokens. Only the first one in a generation is read from the device."""

    length: int  # number of cache slots in use
    starts: Tensor | None  # the first slot that each sequence attends to
    positions: tuple[Tensor, ...]  # of the tokens, (batch, 1), and of those after them
    rows: int  # larger than all positions

    def next(self) -> "Place":
        return Place(
            self.length + 1, self.starts, self.positions[1:] or positions_from(self.positions[0] + 1), self.rows + 1
        )


def positions_from(positions: Tensor) -> tuple[Tensor, ...]:
    """These positions and those after them, from one launch instead of one for each step."""
    return (positions + torch.arange(STEPS_AHEAD, device=positions.device)[:, None, None]).unbind()


class _Loop:
    """The state of a generation: what `model.generate` passes from step to step, updated when needed.

    Args:
        wanted: names of the model's outputs to keep from each call.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder | None,
        config: Any,
        processors: Any,
        model_kwargs: dict[str, Any],
        wanted: list[str],
    ):
        self.model = model
        self.config = config
        self.do_sample = config.do_sample
        self.processors: Any = processors
        self.filters: dict[str, Any] = {}
        if self.do_sample:
            self.processors, self.filters = split_processors(processors)
        self.decoder = None if self.processors else decoder
        self.model_kwargs = model_kwargs
        self.outputs: dict[str, list] = {name: [] for name in wanted}
        self.pending = 0  # tokens that are not in model_kwargs yet
        self.undisturbed = False  # no foreign code runs between two steps
        self._call: Callable = private.compiled_call(model, config, model_kwargs)
        self._place: Place | None = None
        self._random_state: Tensor | None = None
        self._forward_may_be_early = False

    @property
    def cache(self) -> Any:
        return private.cache_in(self.model_kwargs)

    def prefill(self, input_ids: Tensor) -> Tensor:
        return self._took(private.prefill(self.model, input_ids, self.config, self.model_kwargs), input_ids)

    def runs_ahead(self, input_ids: Tensor) -> bool:
        """Whether steps may start early; called once, after the prompt."""
        limited = getattr(self.cache, "max_cache_len", None) is not None  # an extra token could be an error
        self._forward_may_be_early = (
            not limited and not self.outputs and private.forward_may_be_early(input_ids, self.config, self.cache)
        )
        return runs_ahead(input_ids.device) and (self.decoder is not None or self._forward_may_be_early)

    def early_step(self, sequences: Sequences) -> Tensor | None:
        """The next tokens, from a step that `take_back` can undo; None if it could not."""
        if self.do_sample:
            self._random_state = torch.get_rng_state()  # the sampler draws from the CPU's generator, on any device
        following = self.decode(sequences.last)
        return self.forward(sequences.ids()) if following is None and self._forward_may_be_early else following

    def step(self, sequences: Sequences) -> Tensor:
        """The next tokens."""
        following = self.decode(sequences.last)
        return self.forward(sequences.ids()) if following is None else following

    def forward(self, input_ids: Tensor) -> Tensor:
        """The next tokens, from the model's forward."""
        if self.pending:
            outputs = CausalLMOutputWithPast(**{CACHE: self.cache})
            self.model_kwargs = private.after(self.model, outputs, self.model_kwargs, self.pending)
        new = 1 if self.model_kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **self.model_kwargs)
        return self._took(self._call(**inputs, return_dict=True), input_ids)

    def _took(self, outputs: Any, input_ids: Tensor) -> Tensor:
        self.model_kwargs = private.after(self.model, outputs, self.model_kwargs)
        self.pending = 0
        self._place = None
        # Processors may write their input.
        logits = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=bool(self.processors or self.outputs))
        for name, kept in self.outputs.items():
            kept.append(logits if name == "logits" else outputs[name])
        if self.processors:
            logits = self.processors(input_ids, logits.clone() if self.outputs else logits)
        return next_token(logits, self.do_sample, **self.filters)

    def decode(self, last: Tensor) -> Tensor | None:
        """The next tokens, from one op; None if the op does not support the call."""
        decoder = self.decoder
        if decoder is None or decoder.is_wrapped():
            return None
        cache, place = self.cache, self._place
        undisturbed = self.undisturbed and place is not None
        try:
            plan = decoder.check(last, cache, undisturbed=undisturbed)
            if place is None or place.length != cache.get_seq_length():
                place = self._find_place(last, plan)
            plan.check_positions(place.rows)
        except Left:
            return None  # the model's forward, which runs then, counts the reason
        following = decoder.step(
            plan,
            decode_token_,
            last,
            place.positions[0],
            place.starts,
            place.rows,
            cache,
            undisturbed=undisturbed,
            do_sample=self.do_sample,
            **self.filters,
        )
        self._place = place.next()
        self.pending += 1
        return following

    def take_back(self) -> None:
        """Undoes the last step, which started early."""
        if self.cache is not None:
            self.cache.crop(-1)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)

    def _find_place(self, last: Tensor, plan: Plan) -> "Place":
        mask, positions = self.model_kwargs.get("attention_mask"), self.model_kwargs.get("position_ids")
        length = self.cache.get_seq_length()
        if mask is not None:
            mask = F.pad(mask, (0, self.pending), value=1)
        starts = left_padding(mask, last, length)
        if positions is None and plan.family.tables == "sections":
            raise Left("no position_ids were passed; this model computes its own")
        if positions is None:
            return Place(length, starts, positions_from(torch.full(last.shape, length, device=last.device)), length + 1)
        positions = rows_of(positions[..., -1:] + self.pending, last)
        return Place(length, starts, positions_from(positions), int(positions.max()) + 1)
