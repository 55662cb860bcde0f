"""An OpenAI body, checked as a whole, as the sequences to be made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptj_serve.api.constraints import constraint_of_completion
from gptj_serve.api.field_names import FieldNames
from gptj_serve.api.generation import GenerationParams
from gptj_serve.api.openai_sampling import OpenAISampling
from gptj_serve.api.openai_schemas import CompletionRequest
from gptj_serve.api.sampling import for_sequence, make_beams, make_params, make_warpers, new_seed
from gptj_serve.api.service import Service
from gptj_serve.errors import InvalidRequestError

_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_top_logprobs": "logprobs",
    "num_beams": "best_of",
    "num_return_sequences": "n",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request to the engine. Of those with the same prompt only the first one scores it."""

    prompt_index: int
    token_ids: list[int]
    params: GenerationParams
    scores_prompt: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """`candidates` are `num_candidates` for each prompt, or, with beams, one."""

    body: OpenAISampling
    candidates: list[Candidate]
    num_prompt_tokens: int
    num_new_tokens: int
    num_top_logprobs: int  # that the engine gives with each token
    num_shown_logprobs: int | None  # of these, with each new token; None: no log-probability is shown
    scores_prompts: bool
    echo: bool = False  # the prompt comes before the text


async def make_plan(service: Service, body: CompletionRequest) -> Plan:
    """Check the whole request before any of it is started."""
    _check(body)
    check_choices(service, body, len(body.prompts), "prompt")
    scores_prompts = body.prompt_logprobs is not None or bool(body.echo and body.logprobs is not None)
    num_top_logprobs = max(body.logprobs or 0, body.prompt_logprobs or 0)
    params = await sampling_of(
        service, body, body.num_new_tokens, _NAMES, num_top_logprobs=num_top_logprobs, scores_prompts=scores_prompts
    )
    prompts = [
        await service.encode_prompt(
            prompt, body.num_new_tokens, "prompt", "max_tokens", num_kept=body.truncate_prompt_tokens
        )
        for prompt in body.prompts
    ]
    return Plan(
        body,
        candidates_of(body, prompts, params),
        num_prompt_tokens=sum(map(len, prompts)),
        num_new_tokens=body.num_new_tokens,
        num_top_logprobs=num_top_logprobs,
        num_shown_logprobs=body.logprobs,
        scores_prompts=scores_prompts,
        echo=bool(body.echo),
    )


def check_choices(service: Service, body: OpenAISampling, num_prompts: int, field: str) -> None:
    """What goes with what in every OpenAI body, beyond `generation_rules`."""
    limit = service.config.ingress.max_batch_inputs
    if num_prompts * body.num_candidates > limit:
        raise InvalidRequestError(field, num_prompts * body.num_candidates, f"at most {limit} completions at once")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options", body.stream_options.model_dump(exclude_unset=True), "goes with stream only"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs", body.prompt_logprobs, "does not go with stream")
    if body.use_beam_search:
        if body.num_candidates < 2:
            reason = "needs an n of at least 2, or in /v1/completions a best_of: so many beams"
            raise InvalidRequestError("use_beam_search", True, reason)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(body, name)
            if value is not None and value is not False:
                raise InvalidRequestError(name, value, "a beam search has no log-probabilities of single tokens")


async def sampling_of(
    service: Service,
    body: OpenAISampling,
    num_new_tokens: int,
    names: Mapping[str, str],
    *,
    num_top_logprobs: int,
    scores_prompts: bool,
) -> GenerationParams:
    constraint = constraint_of_completion(body)
    field_names = FieldNames(names=names if constraint is None else {**names, "grammar": constraint.field})
    temperature = body.temperature
    if temperature is None:
        temperature = 0.0 if body.use_beam_search else 1.0
    return await make_params(
        service,
        body,
        field_names,
        stop_strings=body.stop_strings,
        include_stop_string=body.include_stop_str_in_output,
        is_streamed=body.stream,
        max_new_tokens=max(1, num_new_tokens),
        min_new_tokens=body.min_tokens,
        warpers=make_warpers(body, temperature, body.top_k, body.top_p),
        seed=new_seed() if body.seed is None else body.seed,
        sequence_bias=[*_logit_bias(service, body), *(body.sequence_bias or [])],
        grammar=None if constraint is None else constraint.grammar,
        beams=make_beams(body, body.num_candidates, body.num_choices) if body.use_beam_search else None,
        num_top_logprobs=num_top_logprobs,
        prompt_logprobs=scores_prompts,
    )


def candidates_of(body: OpenAISampling, prompts: Sequence[list[int]], params: GenerationParams) -> list[Candidate]:
    per_prompt = 1 if body.use_beam_search else body.num_candidates
    return [
        Candidate(
            prompt_index,
            token_ids,
            for_sequence(params, token_ids, prompt_index * per_prompt + index, scores_prompt=index == 0),
            params.sampling.prompt_logprobs and index == 0,
        )
        for prompt_index, token_ids in enumerate(prompts)
        for index in range(per_prompt)
    ]


def _check(body: CompletionRequest) -> None:
    num_choices, num_candidates = body.num_choices, body.num_candidates
    if body.num_new_tokens == 0 and (not body.echo or body.use_beam_search):
        raise InvalidRequestError("max_tokens", 0, "must be at least 1; 0 goes with echo, which then scores the prompt")
    if (body.min_tokens or 0) > body.num_new_tokens:
        raise InvalidRequestError("min_tokens", body.min_tokens, f"is over max_tokens={body.num_new_tokens}")
    if num_candidates < num_choices:
        raise InvalidRequestError("best_of", body.best_of, f"must be at least n={num_choices}")
    if body.stream and num_candidates > num_choices:
        raise InvalidRequestError("best_of", body.best_of, f"can't be over n={num_choices} with stream")


def _logit_bias(service: Service, body: OpenAISampling) -> list[tuple[list[int], float]]:
    biases = {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()}
    service.check_token_ids(list(biases), "logit_bias")
    return [([token_id], bias) for token_id, bias in biases.items()]
