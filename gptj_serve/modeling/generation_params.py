"""From the options of `generate` to the engine's parameters: transformers' rules, and which options go together."""

import logging
from collections.abc import Iterator, Set
from typing import Any

import torch

from gptj_serve.errors import InvalidOptionError, InvalidRequestError
from gptj_serve.generation_rules import check_combination, check_vocabulary
from gptj_serve.model.config import GPTJConfig
from gptj_serve.modeling.generation_config import GenerationConfig, as_list
from gptj_serve.types import BeamParams, EarlyStopping, SamplingParams, Warpers

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20
_DEFAULT_TOP_K = 50
_SMALLEST = 1e-9
"""For bounds that transformers includes and the engine does not; to both they mean: as little as possible."""

_SAME_NAME = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "prompt_lookup_num_tokens",
)
_OF_SAMPLING = {
    "temperature": 1.0,
    "top_k": _DEFAULT_TOP_K,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_OPTION_NAMES = {
    "negative_prompt": "negative_prompt_ids",
    "negative_prompt_token_ids": "negative_prompt_ids",
    "prompt": "input_ids",
    "stream": "streamer",
}
"""What the engine and the rules call otherwise."""


def chosen_options(
    of_model: GenerationConfig, of_call: GenerationConfig | None, options: dict[str, Any]
) -> GenerationConfig:
    """An option counts before the call's config, that before the model's, that before transformers' defaults.

    Only as an option does None mean something: that this is off. Raises `InvalidOptionError`.
    """
    if of_call is not None and not isinstance(of_call, GenerationConfig):
        reason = "must be a gptj_serve.GenerationConfig; tensors are passed by their names"
        raise InvalidOptionError("generation_config", type(of_call).__name__, reason)
    named = {**(of_call.to_dict() if of_call is not None else {}), **options}
    chosen = GenerationConfig(top_k=_DEFAULT_TOP_K).changed(**of_model.to_dict()).changed(**named)
    _warn_of_idle(chosen, named.keys())
    return chosen


def sampling_params(chosen: GenerationConfig, model: GPTJConfig, num_prompt: int) -> SamplingParams:
    """What all rows share. `num_prompt` counts padding, as transformers does.

    Raises `InvalidOptionError`.
    """
    max_new, min_new = _lengths(chosen, model.n_positions, num_prompt)
    values = {name: value for name in _SAME_NAME if (value := getattr(chosen, name)) is not None}
    if chosen.prompt_lookup_num_tokens is not None and chosen.max_matching_ngram_size is not None:
        values["max_matching_ngram_size"] = chosen.max_matching_ngram_size
    if chosen.max_time is not None:
        values["max_time_s"] = max(chosen.max_time, _SMALLEST)
    single = [([token_id], bias) for token_id, bias in (chosen.logit_bias or {}).items()]
    return SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=min_new,
        warpers=_warpers(chosen) if chosen.do_sample else Warpers(),
        seed=int(torch.randint(2**62, ())) if chosen.do_sample and chosen.seed is None else chosen.seed or 0,
        sequence_bias=(chosen.sequence_bias or []) + single,
        forced_eos_token_id=as_list(chosen.forced_eos_token_id),
        beams=_beams(chosen) if (chosen.num_beams or 1) > 1 else None,
        **values,
    )


def check_options(chosen: GenerationConfig, sampling: SamplingParams, vocab_size: int, *, is_streamed: bool) -> None:
    """Raises `InvalidOptionError` for options that don't go together, or can't be followed together."""
    for name, reason in _contradictions(chosen, sampling, vocab_size):
        raise InvalidOptionError(name, getattr(chosen, name), reason)
    try:
        check_combination(sampling, stop_strings=as_list(chosen.stop_strings), is_streamed=is_streamed)
        check_vocabulary(sampling, vocab_size)
    except InvalidRequestError as error:
        raise as_option_error(error) from None


def as_option_error(error: InvalidRequestError) -> InvalidOptionError:
    """Under the name that people know here."""
    return InvalidOptionError(_OPTION_NAMES.get(error.field, error.field), error.value, error.reason)


def _warn_of_idle(chosen: GenerationConfig, named: Set[str]) -> None:
    """Tell which of the `named` options have no effect for want of another."""
    has_beams = (chosen.num_beams or 1) > 1
    for wanted, is_there, neutral_values in (
        ("do_sample", chosen.do_sample, _OF_SAMPLING),
        ("num_beams", has_beams, {"length_penalty": 1.0, "early_stopping": False}),
        ("prompt_lookup_num_tokens", chosen.prompt_lookup_num_tokens, {"max_matching_ngram_size": 2}),
        ("return_dict_in_generate", chosen.return_dict_in_generate, {"output_scores": False, "output_logits": False}),
    ):
        for name, neutral in neutral_values.items():
            value = getattr(chosen, name)
            if name in named and not is_there and value not in (neutral, None):
                logger.warning("generate: %s=%r has no effect without %s", name, value, wanted)


def _lengths(chosen: GenerationConfig, n_positions: int, num_prompt: int) -> tuple[int, int]:
    """The most and the fewest new tokens."""
    if chosen.max_new_tokens is not None:
        max_new = chosen.max_new_tokens
        if chosen.max_length is not None:
            logger.warning("generate: both max_new_tokens and max_length are given: max_new_tokens counts")
    elif chosen.max_length is not None:
        max_new = chosen.max_length - num_prompt
    else:
        max_new = min(_DEFAULT_NEW_TOKENS, n_positions - num_prompt)
    if max_new < 1:
        reason = f"the prompt's {num_prompt} tokens leave no room for new ones (n_positions={n_positions})"
        raise InvalidOptionError("max_length", chosen.max_length, reason)
    min_new = chosen.min_new_tokens
    if min_new is None:
        min_new = max((chosen.min_length or 0) - num_prompt, 0)
    if min_new > max_new:
        logger.warning(
            "generate: at least %d new tokens are asked for, and at most %d: that is the end", min_new, max_new
        )
    return max_new, min(min_new, max_new)


def _warpers(chosen: GenerationConfig) -> Warpers:
    return Warpers(
        temperature=1.0 if chosen.temperature is None else chosen.temperature,
        top_k=chosen.top_k or 0,
        top_p=1.0 if chosen.top_p is None else max(chosen.top_p, _SMALLEST),
        min_p=chosen.min_p or 0.0,
        typical_p=chosen.typical_p or 1.0,
        epsilon_cutoff=chosen.epsilon_cutoff or 0.0,
        eta_cutoff=chosen.eta_cutoff or 0.0,
    )


def _beams(chosen: GenerationConfig) -> BeamParams:
    early_stopping = EarlyStopping.FIRST if chosen.early_stopping else EarlyStopping.HEURISTIC
    return BeamParams(
        num_beams=chosen.num_beams or 1,
        length_penalty=1.0 if chosen.length_penalty is None else chosen.length_penalty,
        early_stopping=EarlyStopping.NEVER if chosen.early_stopping == "never" else early_stopping,
        num_return_sequences=chosen.num_return_sequences or 1,
    )


def _contradictions(chosen: GenerationConfig, sampling: SamplingParams, vocab_size: int) -> Iterator[tuple[str, str]]:
    """Names of options that are refused, and why."""
    if any(token_id >= vocab_size for token_id in chosen.logit_bias or ()):
        yield "logit_bias", f"token ids are below {vocab_size}"
    num_sequences = chosen.num_return_sequences or 1
    if sampling.beams is not None:
        if chosen.do_sample:
            yield "num_beams", "does not go with do_sample: a beam search draws no tokens"
        if chosen.renormalize_logits:
            yield "renormalize_logits", "a beam's log-probabilities are added up as the processors leave them"
        if chosen.output_logits:
            yield "output_logits", "those of beams that were given up are not kept"
    elif num_sequences > 1 and not chosen.do_sample:
        yield "num_return_sequences", "greedy answers are all the same: set do_sample or num_beams"
    if chosen.remove_invalid_values:
        if chosen.exponential_decay_length_penalty is not None:
            yield "remove_invalid_values", "would let exponential_decay_length_penalty bring back forbidden end tokens"
        if chosen.output_scores and chosen.return_dict_in_generate:
            yield "remove_invalid_values", "output_scores shows impossible tokens as -inf"
