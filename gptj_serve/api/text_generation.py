"""Text Generation Inference's shapes: what a `/generate` body asks for, and the answers to it, whole or streamed."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from gptj_serve.api.constraints import constraint_of_generation
from gptj_serve.api.field_names import FieldNames
from gptj_serve.api.generation import GenerationParams, generate, search_beams
from gptj_serve.api.huggingface_responses import (
    GenerateAnswer,
    GenerateAnswers,
    GenerateDetails,
    GenerateDetailsOfBest,
    GenerateEvent,
    GenerateFinishReason,
    Token,
)
from gptj_serve.api.huggingface_schemas import GenerateParameters, GenerateRequest
from gptj_serve.api.logprobs import ScoredToken, mean_logprob, scored_prompt
from gptj_serve.api.resumption import AnswerStream, ChoiceEvent
from gptj_serve.api.sampling import for_sequence, make_beams, make_params, make_warpers, new_seed
from gptj_serve.api.service import Service, run_all
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import FinishReason, Matrix

_NAMES = {
    "prompt": "inputs",
    "stream": "stream",
    "num_top_logprobs": "parameters.top_n_tokens",
    "prompt_logprobs": "parameters.decoder_input_details",
}
_FINISH_REASONS: dict[FinishReason, GenerateFinishReason] = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
    FinishReason.TIME: "length",
}


@dataclass(frozen=True, slots=True)
class _Plan:
    body: GenerateRequest
    token_ids: list[int]
    params: list[GenerationParams]  # of each sequence to be drawn; of a beam search the only ones

    @property
    def parameters(self) -> GenerateParameters:
        return self.body.parameters


@dataclass(frozen=True, slots=True)
class _Answer:
    """A finished sequence."""

    text: str
    tokens: list[ScoredToken]
    finish_reason: FinishReason
    seed: int | None  # of one that was drawn
    beam_score: float | None = None


async def generate_whole(service: Service, body: GenerateRequest) -> GenerateAnswers:
    """The whole answer: `generated_text`, and with `details` its tokens. A list of them for `num_return_sequences`."""
    plan = await _make_plan(service, body, is_streamed=False)
    prompt_scores: Matrix | None = None
    if plan.params[0].sampling.beams is not None:
        answers = await _search(service, plan)
    else:
        drawn = await run_all([_draw(service, plan, params) for params in plan.params])
        answers = [answer for answer, _ in drawn]
        prompt_scores = drawn[0][1]
    if (plan.parameters.num_return_sequences or 1) > 1:
        return [_answer_body(service, plan, answer, [], prompt_scores) for answer in answers]
    best = max(answers, key=lambda answer: mean_logprob(answer.tokens))
    return _answer_body(service, plan, best, [answer for answer in answers if answer is not best], prompt_scores)


async def generate_stream(
    service: Service, body: GenerateRequest, answer: AnswerStream | None = None
) -> AsyncGenerator[GenerateEvent]:
    """TGI's events: each token, and with the last one the whole text; those that were not sent yet."""
    plan = await _make_plan(service, body, is_streamed=True)
    answer = answer or AnswerStream()
    async with aclosing(answer.rest(_token_events(service, plan), num_choices=1, num_closing=0)) as events:
        async for event in events:
            yield event.body


async def _token_events(service: Service, plan: _Plan) -> AsyncGenerator[ChoiceEvent[GenerateEvent]]:
    (params,) = plan.params
    text, num_tokens = "", 0
    async with aclosing(generate(service, plan.token_ids, params)) as stream:
        async for chunk in stream:
            text += chunk.text
            num_tokens += 1
            event: GenerateEvent = {
                "index": num_tokens,
                "token": _token(service, chunk.token),
                "generated_text": None,
                "details": None,
            }
            if plan.parameters.top_n_tokens:
                event["top_tokens"] = _top_tokens(service, chunk.token)
            if chunk.finish_reason is not None:
                event["generated_text"] = _full_text(plan, text)
                event["details"] = {
                    "finish_reason": _FINISH_REASONS[chunk.finish_reason],
                    "generated_tokens": num_tokens,
                    "seed": _shown_seed(params),
                }
            yield ChoiceEvent(0, event, [chunk.token.token_id])


async def _make_plan(service: Service, body: GenerateRequest, *, is_streamed: bool) -> _Plan:
    parameters = body.parameters
    _check(parameters, is_streamed)
    constraint = constraint_of_generation(parameters.grammar)
    names = FieldNames("parameters.", _NAMES if constraint is None else _NAMES | {"grammar": constraint.field})
    num_beams, num_returned = parameters.num_beams or 1, parameters.num_return_sequences or 1
    beams = make_beams(parameters, num_beams, num_returned) if num_beams > 1 else None
    params = await make_params(
        service,
        parameters,
        names,
        stop_strings=parameters.stop or (),
        include_stop_string=True,  # as in TGI
        is_streamed=is_streamed,
        max_new_tokens=parameters.max_new_tokens,
        min_new_tokens=parameters.min_new_tokens,
        warpers=make_warpers(parameters, parameters.effective_temperature, parameters.top_k, parameters.top_p),
        seed=new_seed() if parameters.seed is None else parameters.seed,
        grammar=None if constraint is None else constraint.grammar,
        beams=beams,
        num_top_logprobs=parameters.top_n_tokens,
        prompt_logprobs=bool(parameters.decoder_input_details),
    )
    length_field = names["max_new_tokens"]
    token_ids = await service.encode_prompt(
        body.inputs, parameters.max_new_tokens, "inputs", length_field, num_kept=parameters.truncate
    )
    num_sequences = 1 if beams is not None else max(parameters.best_of or 1, num_returned)
    sequences = [for_sequence(params, token_ids, index, scores_prompt=index == 0) for index in range(num_sequences)]
    return _Plan(body, token_ids, sequences)


def _check(parameters: GenerateParameters, is_streamed: bool) -> None:
    """What goes with what, beyond `generation_rules`."""
    best_of, num_returned = parameters.best_of or 1, parameters.num_return_sequences or 1
    has_beams = (parameters.num_beams or 1) > 1
    is_greedy = parameters.effective_temperature == 0
    for field, value, is_wrong, reason in (
        ("best_of", best_of, has_beams, "does not go with num_beams"),
        ("best_of", best_of, num_returned > 1, "does not go with num_return_sequences"),
        ("best_of", best_of, is_greedy, "greedy answers are all the same: needs do_sample"),
        ("best_of", best_of, is_streamed, "can't be streamed"),
        ("num_return_sequences", num_returned, is_streamed, "can't be streamed"),
        ("num_return_sequences", num_returned, is_greedy and not has_beams, "needs num_beams or do_sample"),
    ):
        if value > 1 and is_wrong:
            raise InvalidRequestError(f"parameters.{field}", value, reason)
    if has_beams and not is_greedy:
        field, value = parameters.asks_to_draw
        raise InvalidRequestError(f"parameters.{field}", value, "a beam search draws no tokens")
    if is_streamed and parameters.decoder_input_details:
        raise InvalidRequestError("parameters.decoder_input_details", True, "can't be streamed")


async def _draw(service: Service, plan: _Plan, params: GenerationParams) -> tuple[_Answer, Matrix | None]:
    """The answer, and the prompt's scores if this sequence brings them."""
    async with aclosing(generate(service, plan.token_ids, params)) as stream:
        chunks = [chunk async for chunk in stream]
    finish_reason = chunks[-1].finish_reason
    assert finish_reason is not None
    text = "".join(chunk.text for chunk in chunks)
    tokens = [chunk.token for chunk in chunks]
    return _Answer(text, tokens, finish_reason, _shown_seed(params)), chunks[0].prompt_scores


async def _search(service: Service, plan: _Plan) -> list[_Answer]:
    beams = await search_beams(service, plan.token_ids, plan.params[0])
    return [_Answer(beam.text, beam.tokens, beam.finish_reason, None, beam_score=beam.score) for beam in beams]


def _shown_seed(params: GenerationParams) -> int | None:
    return params.sampling.seed if params.sampling.warpers.temperature > 0 else None


def _answer_body(
    service: Service, plan: _Plan, answer: _Answer, others: Sequence[_Answer], prompt_scores: Matrix | None
) -> GenerateAnswer:
    """As in TGI, `decoder_input_details` asks for details; so does `top_n_tokens`, which shows nowhere else."""
    parameters = plan.parameters
    body: GenerateAnswer = {"generated_text": _full_text(plan, answer.text)}
    if parameters.details or parameters.decoder_input_details or parameters.top_n_tokens:
        details = _details(service, plan, answer, prompt_scores)
        body["details"] = details
        if others:
            with_others: GenerateDetailsOfBest = {
                **details,
                "best_of_sequences": [
                    {"generated_text": _full_text(plan, other.text), **_details(service, plan, other, prompt_scores)}
                    for other in others
                ],
            }
            body["details"] = with_others
    return body


def _details(service: Service, plan: _Plan, answer: _Answer, prompt_scores: Matrix | None) -> GenerateDetails:
    details: GenerateDetails = {
        "finish_reason": _FINISH_REASONS[answer.finish_reason],
        "generated_tokens": len(answer.tokens),
        "seed": answer.seed,
        "prefill": [],
        "tokens": [_token(service, token) for token in answer.tokens],
    }
    if plan.parameters.decoder_input_details:
        prompt = scored_prompt(service.tokenizer, plan.token_ids, prompt_scores)
        details["prefill"] = [{"id": token.token_id, "text": token.text, "logprob": token.logprob} for token in prompt]
    if plan.parameters.top_n_tokens:
        details["top_tokens"] = [_top_tokens(service, token) for token in answer.tokens]
    if answer.beam_score is not None:
        details["beam_score"] = answer.beam_score
    return details


def _token(service: Service, token: ScoredToken) -> Token:
    special = token.token_id in service.tokenizer.special_token_ids
    return {"id": token.token_id, "text": token.text, "logprob": token.logprob, "special": special}


def _top_tokens(service: Service, token: ScoredToken) -> list[Token]:
    """The likeliest tokens at a token's place, each with its text by itself."""
    decode = service.tokenizer.decode
    return [
        _token(service, ScoredToken(token_id, decode([token_id], skip_special_tokens=False), logprob))
        for token_id, logprob in token.top
    ]


def _full_text(plan: _Plan, text: str) -> str:
    """With `return_full_text`, after the whole of `inputs`, also what `truncate` left out: as TGI does."""
    return plan.body.inputs + text if plan.parameters.return_full_text else text
