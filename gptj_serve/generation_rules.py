"""Which parameters of a generation go together: the rules that no single field's bounds can state.

Errors name the fields of `SamplingParams` and `BeamParams`, which are mostly transformers' own; who has other names for
them puts those in. `stop_strings` and `stream` stand for what is decided where there is text.
"""

from collections.abc import Iterator, Sequence

from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import MAX_BEAMS, MIN_BEAMS, BeamParams, SamplingParams

_DEFAULTS = SamplingParams(max_new_tokens=1)

_NO_LOGPROBS = "a beam search has no log-probabilities of single tokens"


def check_combination(sampling: SamplingParams, *, stop_strings: Sequence[str] = (), is_streamed: bool = False) -> None:
    """Raises `InvalidRequestError` for parameters that contradict each other, or of which one would have no effect."""
    if sampling.min_new_tokens > sampling.max_new_tokens:
        reason = f"is over the maximum of {sampling.max_new_tokens} new tokens"
        raise InvalidRequestError("min_new_tokens", sampling.min_new_tokens, reason)
    if sampling.beams is not None:
        _check_beams(sampling, sampling.beams, stop_strings, is_streamed)
    _check_biases(sampling)
    _check_guidance(sampling)
    _check_prompt_lookup(sampling)
    _check_that_a_token_is_left(sampling)


def check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises `InvalidRequestError` for a token id that the model has no logit for."""
    for field, token_id in _token_ids(sampling):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(field, token_id, f"token ids are below {vocab_size}")


def _check_beams(sampling: SamplingParams, beams: BeamParams, stop_strings: Sequence[str], is_streamed: bool) -> None:
    if not MIN_BEAMS <= beams.num_beams <= MAX_BEAMS:
        reason = f"a beam search has {MIN_BEAMS} to {MAX_BEAMS} beams"
        raise InvalidRequestError("num_beams", beams.num_beams, reason)
    if not 1 <= beams.num_return_sequences <= beams.num_beams:
        reason = f"a search with {beams.num_beams} beams returns 1 to {beams.num_beams} sequences"
        raise InvalidRequestError("num_return_sequences", beams.num_return_sequences, reason)
    drafted = sampling.prompt_lookup_num_tokens
    for field, value, off, reason in (
        ("temperature", sampling.warpers.temperature, 0.0, "a beam search draws no tokens"),
        ("guidance_scale", sampling.guidance_scale, 1.0, "does not go with a beam search"),
        ("prompt_lookup_num_tokens", drafted, 0, "does not go with a beam search"),
        ("num_top_logprobs", sampling.num_top_logprobs, 0, _NO_LOGPROBS),
        ("prompt_logprobs", sampling.prompt_logprobs, False, _NO_LOGPROBS),
        ("stop_strings", list(stop_strings), [], "a beam search knows tokens, not text: stop_token_ids may do"),
        ("stream", is_streamed, False, "which beam is the best one is known at the end only"),
    ):
        if value != off:
            raise InvalidRequestError(field, value, reason)


def _check_biases(sampling: SamplingParams) -> None:
    seen: set[tuple[int, ...]] = set()
    for sequence, _ in sampling.sequence_bias:
        if tuple(sequence) in seen:
            raise InvalidRequestError("sequence_bias", sequence, "has two biases")
        seen.add(tuple(sequence))


def _check_guidance(sampling: SamplingParams) -> None:
    if sampling.guidance_scale == 1.0 and sampling.negative_prompt_token_ids:
        reason = "has no effect unless guidance_scale is other than 1"
        raise InvalidRequestError("negative_prompt_token_ids", sampling.negative_prompt_token_ids, reason)


def _check_prompt_lookup(sampling: SamplingParams) -> None:
    num_tokens = sampling.prompt_lookup_num_tokens
    if num_tokens and sampling.guidance_scale != 1.0:
        raise InvalidRequestError("prompt_lookup_num_tokens", num_tokens, "does not go with guidance_scale")
    if num_tokens and sampling.grammar is not None:
        raise InvalidRequestError("prompt_lookup_num_tokens", num_tokens, "does not go with a grammar")
    ngram_size = sampling.max_matching_ngram_size
    if not num_tokens and ngram_size != _DEFAULTS.max_matching_ngram_size:
        raise InvalidRequestError(
            "max_matching_ngram_size", ngram_size, "has no effect without prompt_lookup_num_tokens"
        )


def _check_that_a_token_is_left(sampling: SamplingParams) -> None:
    """As far as it shows beforehand (transformers refuses the same)."""
    suppressed = set(sampling.suppress_tokens)
    forced_bos = [] if sampling.forced_bos_token_id is None else [sampling.forced_bos_token_id]
    for field, token_ids in (
        ("forced_bos_token_id", forced_bos),
        ("forced_eos_token_id", sampling.forced_eos_token_id),
        ("allowed_token_ids", sampling.allowed_token_ids or []),
    ):
        if token_ids and suppressed.issuperset(token_ids):
            raise InvalidRequestError(field, token_ids, "suppress_tokens rules all of it out")


def _token_ids(sampling: SamplingParams) -> Iterator[tuple[str, int]]:
    for field in (
        "stop_token_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_eos_token_id",
        "negative_prompt_token_ids",
    ):
        yield from ((field, token_id) for token_id in getattr(sampling, field))
    yield from (("allowed_token_ids", token_id) for token_id in sampling.allowed_token_ids or ())
    yield from (("bad_words_ids", token_id) for word in sampling.bad_words_ids for token_id in word)
    yield from (("sequence_bias", token_id) for sequence, _ in sampling.sequence_bias for token_id in sequence)
    if sampling.forced_bos_token_id is not None:
        yield "forced_bos_token_id", sampling.forced_bos_token_id
