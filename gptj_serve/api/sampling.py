"""From the parameters that clients send to `SamplingParams`: what both surfaces share."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from gptj_serve.api.field_names import FieldNames
from gptj_serve.api.generation import GenerationParams
from gptj_serve.api.sampling_schema import SamplingExtras
from gptj_serve.api.service import Service, off_loop
from gptj_serve.errors import InvalidRequestError
from gptj_serve.generation_rules import check_combination, check_vocabulary
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import BeamParams, EarlyStopping, SamplingParams, Warpers

_SAME_NAME = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "sequence_bias",
    "guidance_scale",
    "allowed_token_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "stop_token_ids",
    "ignore_eos",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)
_EARLY_STOPPING = {False: EarlyStopping.HEURISTIC, True: EarlyStopping.FIRST, "never": EarlyStopping.NEVER}


def make_warpers(extras: SamplingExtras, temperature: float, top_k: int | None, top_p: float | None) -> Warpers:
    """`top_k` 0 and -1 are off."""
    values = {name: getattr(extras, name) for name in ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")}
    values |= {"top_k": None if top_k is None else max(top_k, 0), "top_p": top_p}
    return Warpers(temperature=temperature, **_set_ones(values))


def make_beams(extras: SamplingExtras, num_beams: int, num_return_sequences: int) -> BeamParams:
    return BeamParams(
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=1.0 if extras.length_penalty is None else extras.length_penalty,
        early_stopping=_EARLY_STOPPING[extras.early_stopping or False],
    )


async def make_params(
    service: Service,
    extras: SamplingExtras,
    names: FieldNames,
    *,
    stop_strings: Sequence[str],
    include_stop_string: bool,
    is_streamed: bool,
    **own: Any,
) -> GenerationParams:
    """Everything in `extras`, and the fields of `SamplingParams` that a surface has `own` names for; all checked.

    Errors have the client's `names`.
    """
    values = {name: getattr(extras, name) for name in _SAME_NAME}
    values |= {
        "bad_words_ids": await _bad_words(service, extras, names),
        "forced_eos_token_id": _as_list(extras.forced_eos_token_id),
        "negative_prompt_token_ids": await _negative_prompt(service, extras, own["max_new_tokens"], names),
        "max_time_s": extras.max_time,
    }
    sampling = SamplingParams(**_set_ones(values | own))
    if sampling.beams is None:
        _refuse_beam_parameters(extras, names)
    try:
        check_vocabulary(sampling, service.model.vocab_size)
        check_combination(sampling, stop_strings=stop_strings, is_streamed=is_streamed)
    except InvalidRequestError as error:
        raise names.translated(_as_sent(error, extras)) from None
    return GenerationParams(
        sampling, stop_strings, include_stop_string, extras.priority, extras.cache_salt or "", names
    )


def _as_sent(error: InvalidRequestError, extras: SamplingExtras) -> InvalidRequestError:
    """Of a negative prompt that came as a text, the text and not its tokens."""
    if error.field != "negative_prompt_token_ids" or not isinstance(extras.negative_prompt, str):
        return error
    return InvalidRequestError(error.field, extras.negative_prompt, error.reason)


def for_sequence(
    params: GenerationParams, token_ids: list[int], index: int, *, scores_prompt: bool
) -> GenerationParams:
    """For one of several sequences: each has noise of its own. Of a prompt of one token there is nothing to score."""
    sampling = params.sampling
    changes: dict[str, Any] = {"seed": (sampling.seed + index) % 2**63}
    if len(token_ids) == 1 or not scores_prompt:
        changes["prompt_logprobs"] = False
    return dataclasses.replace(params, sampling=msgspec.structs.replace(sampling, **changes))


def new_seed() -> int:
    """The seed of a request that brings none; drawn once, so that a replay repeats it."""
    return secrets.randbits(63)


async def _bad_words(service: Service, extras: SamplingExtras, names: FieldNames) -> list[list[int]]:
    words = extras.bad_words or []
    token_ids = await off_loop(sum(map(len, words)), _word_token_ids, service.tokenizer, words)
    for word, forms in zip(words, token_ids, strict=True):
        if not forms:
            raise InvalidRequestError(names["bad_words"], word, "holds nothing but blanks")
    return [*(form for forms in token_ids for form in forms), *(extras.bad_words_ids or [])]


def _word_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[list[int]]]:
    """Each word as it begins a text and as it follows a blank, both forms as vLLM tokenizes them.

    The second one is left out if it is a blank's own token and then the first: to forbid that forbids both. (vLLM's
    `SamplingParams.update_from_tokenizer` also leaves it out if the forms differ in length, and lets it through.)
    """
    stripped = [word.lstrip() for word in words]
    plain = tokenizer.encode_all(stripped)
    spaced = tokenizer.encode_all([f" {word}" for word in stripped])
    return [
        [first, second] if first and second[-len(first) :] != first else [first] if first else []
        for first, second in zip(plain, spaced, strict=True)
    ]


async def _negative_prompt(
    service: Service, extras: SamplingExtras, max_new_tokens: int, names: FieldNames
) -> list[int]:
    prompt = extras.negative_prompt
    if prompt is None:
        return []
    field = names["negative_prompt"]
    token_ids = await service.encode(prompt, field) if isinstance(prompt, str) else prompt
    if len(token_ids) + max_new_tokens > service.model.n_positions:
        reason = (
            f"{len(token_ids)} tokens + {max_new_tokens} new tokens exceed the model's context of "
            f"{service.model.n_positions}"
        )
        raise InvalidRequestError(field, prompt, reason)
    return token_ids


def _refuse_beam_parameters(extras: SamplingExtras, names: FieldNames) -> None:
    for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
        value = getattr(extras, name)
        if value is not None and value != default:
            raise InvalidRequestError(names[name], value, "goes with a beam search only")


def _as_list(value: int | list[int] | None) -> list[int] | None:
    return [value] if isinstance(value, int) else value


def _set_ones(values: dict[str, Any]) -> dict[str, Any]:
    """Without those that are None: they keep their defaults."""
    return {name: value for name, value in values.items() if value is not None}
