"""A `/v1/completions` body, checked as a whole, as the sequences to be made of it."""

from dataclasses import dataclass

from gptj_serve.api.constraints import constraint_of_completion
from gptj_serve.api.field_names import FieldNames
from gptj_serve.api.generation import GenerationParams
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
    """A request to the engine."""

    token_ids: list[int]
    params: GenerationParams


@dataclass(frozen=True, slots=True)
class Plan:
    """`candidates` are `num_candidates` for each prompt, or, with beams, one."""

    body: CompletionRequest
    candidates: list[Candidate]
    num_prompt_tokens: int

    @property
    def scores_prompts(self) -> bool:
        return _scores_prompts(self.body)

    @property
    def num_top_logprobs(self) -> int:
        return _num_top_logprobs(self.body)


async def make_plan(service: Service, body: CompletionRequest) -> Plan:
    """Check the whole request before any of it is started."""
    _check(body)
    prompts, num_candidates = body.prompts, body.num_candidates
    limit = service.config.ingress.max_batch_inputs
    if len(prompts) * num_candidates > limit:
        raise InvalidRequestError("prompt", len(prompts) * num_candidates, f"at most {limit} completions at once")
    params = await _params(service, body)
    candidates: list[Candidate] = []
    num_prompt_tokens = 0
    for prompt in prompts:
        token_ids = await service.encode_prompt(
            prompt, body.num_new_tokens, "prompt", "max_tokens", num_kept=body.truncate_prompt_tokens
        )
        num_prompt_tokens += len(token_ids)
        for _ in range(1 if body.use_beam_search else num_candidates):
            candidates.append(Candidate(token_ids, for_sequence(params, token_ids, len(candidates))))
    return Plan(body, candidates, num_prompt_tokens)


def _check(body: CompletionRequest) -> None:
    """What goes with what, beyond `generation_rules`."""
    num_choices, num_candidates = body.num_choices, body.num_candidates
    if body.num_new_tokens == 0 and (not body.echo or body.use_beam_search):
        raise InvalidRequestError("max_tokens", 0, "must be at least 1; 0 goes with echo, which then scores the prompt")
    if (body.min_tokens or 0) > body.num_new_tokens:
        raise InvalidRequestError("min_tokens", body.min_tokens, f"is over max_tokens={body.num_new_tokens}")
    if num_candidates < num_choices:
        raise InvalidRequestError("best_of", body.best_of, f"must be at least n={num_choices}")
    if body.stream and num_candidates > num_choices:
        raise InvalidRequestError("best_of", body.best_of, f"can't be over n={num_choices} with stream")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs", body.prompt_logprobs, "does not go with stream")
    if body.use_beam_search:
        if num_candidates < 2:
            raise InvalidRequestError("use_beam_search", True, "needs a best_of, or n, of at least 2: so many beams")
        for field in ("logprobs", "prompt_logprobs"):
            if (value := getattr(body, field)) is not None:
                raise InvalidRequestError(field, value, "a beam search has no log-probabilities of single tokens")


async def _params(service: Service, body: CompletionRequest) -> GenerationParams:
    constraint = constraint_of_completion(body)
    names = FieldNames(names=_NAMES if constraint is None else _NAMES | {"grammar": constraint.field})
    temperature = body.temperature
    if temperature is None:
        temperature = 0.0 if body.use_beam_search else 1.0
    return await make_params(
        service,
        body,
        names,
        stop_strings=body.stop_strings,
        include_stop_string=body.include_stop_str_in_output,
        is_streamed=body.stream,
        max_new_tokens=max(1, body.num_new_tokens),
        min_new_tokens=body.min_tokens,
        warpers=make_warpers(body, temperature, body.top_k, body.top_p),
        seed=new_seed() if body.seed is None else body.seed,
        sequence_bias=[*_logit_bias(service, body), *(body.sequence_bias or [])],
        grammar=None if constraint is None else constraint.grammar,
        beams=make_beams(body, body.num_candidates, body.num_choices) if body.use_beam_search else None,
        num_top_logprobs=_num_top_logprobs(body),
        prompt_logprobs=_scores_prompts(body),
    )


def _logit_bias(service: Service, body: CompletionRequest) -> list[tuple[list[int], float]]:
    biases = {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()}
    service.check_token_ids(list(biases), "logit_bias")
    return [([token_id], bias) for token_id, bias in biases.items()]


def _num_top_logprobs(body: CompletionRequest) -> int:
    return max(body.logprobs or 0, body.prompt_logprobs or 0)


def _scores_prompts(body: CompletionRequest) -> bool:
    return body.prompt_logprobs is not None or bool(body.echo and body.logprobs is not None)
