"""`model.generate` with the fused cache, sampler and decoder, for a model that need not be patched."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..ops.decode import decode_token_
from ..ops.sampling import next_token
from .cache import CACHE
from .decode import DECODER, Decoder, Left, left_padding, rows_of
from .inputs import find_model, merge_inputs
from .patch import PatchHandle, lock_of, prepare_cache_for_generation
from .sampling import FusedProcessorList, get_logits_processor


def generate(
    model, inputs: Tensor | Mapping[str, Tensor] | None = None, *, decode: bool = True, **generate_kwargs: Any
):
    """Calls ``model.generate`` with the fused sampler, and a :class:`FusedKVCache` in place of a ``DynamicCache``.

    On the CPU the tokens of a greedy or sampled generation with a Llama, Qwen2 or Qwen3 model, after those of the
    prompt, take one op each, which returns nothing but the next token ids; see ``decode`` of
    :func:`apply_torch_fused`. A model patched by :func:`apply_torch_fused` stays so, and several threads may call this
    at a time; any other is as before when the call returns, and calls on it wait for each other.

    Args:
        model: a transformers model that can generate, or a pipeline, which has one.
        inputs: token ids ``(batch, tokens)``, integers, one sequence being ``(1, tokens)``; or what a tokenizer
            returns, a mapping with ``input_ids``; or None, and ``generate_kwargs`` have them: ``generate(model,
            **tokenizer("Hello", return_tensors="pt"))``.
        decode: False leaves the steps of a model that is not patched to transformers.
        generate_kwargs: passed on to ``model.generate``, the streamer included.

    Returns:
        What ``model.generate`` returns.

    Raises:
        TypeError: ``model`` is no model that can generate, or ``inputs`` are no tensor of integers or mapping with one.
        ValueError: the token ids have another shape.

    Example:
        >>> tokens = generate(model, tokenizer("Hello", return_tensors="pt"), max_new_tokens=32)
    """
    model = find_model("generate", model, can="generate")
    generate_kwargs = merge_inputs(inputs, generate_kwargs)
    with lock_of(model), PatchHandle(model) as handle:
        handle.bind_generation("_prepare_cache_for_generation", prepare_cache_for_generation)
        handle.bind_generation("_get_logits_processor", get_logits_processor)
        if decode:
            handle.bind_decoder()
        if handle.patched:
            return _generate(model, generate_kwargs)
    return _generate(model, generate_kwargs)  # a patched model serves several threads at a time


def _generate(model: Any, generate_kwargs: dict[str, Any]) -> Any:
    decoders = [module.__dict__[DECODER] for module in model.modules() if DECODER in module.__dict__]
    decodes = len(decoders) == 1 and not decoders[0].why_not()
    if decodes and not NEEDED_BY_TRANSFORMERS & generate_kwargs.keys():
        own = partial(token_loop, decoder=decoders[0], streamer=generate_kwargs.get("streamer"))
        generate_kwargs = {"custom_generate": own, **generate_kwargs}
    return model.generate(**generate_kwargs)


NEEDED_BY_TRANSFORMERS = {"tokenizer", "assistant_tokenizer", "assistant_model", "synced_gpus"}
"""What transformers give to no loop but their own; theirs then calls the model, a step of which is one op too."""


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
    ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    while True:
        if ends:  # a sequence that has ended gets padding
            tokens = torch.where(unfinished.bool(), tokens, generation_config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if not unfinished.any():
            break
        tokens = loop.next(input_ids)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    sequences: Any = input_ids
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: loop.cache})


class _Loop:
    """Where a generation stands: what `model.generate` passes from step to step, brought up to date when needed."""

    def __init__(self, decoder: Decoder, do_sample: bool, filters: dict[str, Any], model_kwargs: dict[str, Any]):
        self.decoder = decoder
        self.model = decoder.model
        self.do_sample = do_sample
        self.filters = filters
        self.model_kwargs = model_kwargs
        self.pending = 0  # tokens that model_kwargs does not know of

    @property
    def cache(self) -> Any:
        return self.model_kwargs.get(CACHE)

    def prefill(self, input_ids: Tensor, generation_config: Any) -> Tensor:
        outputs = self.model._prefill(
            input_ids, generation_config, self.model_kwargs, is_first_iteration=not generation_config.is_assistant
        )
        return self._took(outputs)

    def next(self, input_ids: Tensor) -> Tensor:
        """The tokens that follow `input_ids`, of which the last ones are new."""
        if not self.decoder.is_wrapped():
            try:
                tokens = self._decode(input_ids)
                self.pending += 1
                return tokens
            except Left as left:
                self.decoder.count(str(left))
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
        logits = outputs.logits[:, -1].float()
        return next_token(logits, self.do_sample, **self.filters)

    def _decode(self, input_ids: Tensor) -> Tensor:
        mask, positions = self.model_kwargs.get("attention_mask"), self.model_kwargs.get("position_ids")
        last = input_ids[:, -1:]
        plan = self.decoder.check(last, self.cache)
        length = self.cache.get_seq_length()
        if mask is not None:
            mask = F.pad(mask, (0, self.pending), value=1)
        starts = left_padding(mask, last, length)
        if positions is None:
            positions = torch.full((len(input_ids), 1), length)
        elif positions.dim() == 2:
            positions = rows_of(positions[:, -1:] + self.pending, last)
        else:
            raise Left(f"position_ids has shape {tuple(positions.shape)}")
        return self.decoder.step(
            plan, decode_token_, last, positions, starts, self.cache, do_sample=self.do_sample, **self.filters
        )
