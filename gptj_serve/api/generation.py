"""Generation: a tokenized prompt in; tokens with their text, beams, or the prompt's own scores out."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from gptj_serve.api.field_names import FieldNames
from gptj_serve.api.logprobs import ScoredToken, finite
from gptj_serve.api.service import Service
from gptj_serve.errors import InvalidRequestError
from gptj_serve.tokenizer import IncrementalDetokenizer, StopStringScanner
from gptj_serve.types import (
    BeamEvent,
    Event,
    FinishReason,
    Matrix,
    PromptEvent,
    SamplingParams,
    Task,
    TokenEvent,
)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """All that is asked of one generation: stop strings are text, and so never reach the engine."""

    sampling: SamplingParams
    stop_strings: Sequence[str] = ()
    include_stop_string: bool = False
    priority: int | None = None  # None: that of the HTTP request
    cache_salt: str = ""
    names: FieldNames = field(default_factory=FieldNames)  # in which the engine's refusals are put


@dataclass(frozen=True, slots=True)
class TextChunk:
    """One generated token and the text that can be released with it; the last has a finish reason."""

    token: ScoredToken
    text: str  # what may be shown now: withheld while it could still become a stop string
    finish_reason: FinishReason | None
    is_first: bool = False
    prompt_scores: Matrix | None = None  # with the first chunk, if asked for


@dataclass(frozen=True, slots=True)
class BeamText:
    """What one of a beam search's best hypotheses says."""

    text: str
    tokens: list[ScoredToken]  # without log-probabilities
    score: float
    finish_reason: FinishReason


async def generate(service: Service, token_ids: list[int], params: GenerationParams) -> AsyncGenerator[TextChunk]:
    """Stream the completion of a prompt that `Service.encode_prompt` has checked."""
    detokenizer = IncrementalDetokenizer(service.tokenizer)
    scanner = StopStringScanner(params.stop_strings, include_in_output=params.include_stop_string)
    prompt_scores: Matrix | None = None
    async with aclosing(_events(service, token_ids, params)) as events:
        async for event in events:
            if isinstance(event, PromptEvent):
                prompt_scores = event.scores
                continue
            assert isinstance(event, TokenEvent)
            finish_reason = event.finish_reason
            token_text = detokenizer.push(event.token_id)
            if finish_reason is not None:
                token_text += detokenizer.flush()
            text = scanner.push(token_text)
            if scanner.stopped_by is not None:
                finish_reason = FinishReason.STOP
            elif finish_reason is not None:
                text += scanner.flush()
            is_first = event.index == 0
            scores = prompt_scores if is_first else None  # a replay says them again
            yield TextChunk(_scored(event, token_text), text, finish_reason, is_first, scores)
            if finish_reason is not None:
                return


async def search_beams(service: Service, token_ids: list[int], params: GenerationParams) -> list[BeamText]:
    """The best hypotheses, best first."""
    async with aclosing(_events(service, token_ids, params)) as events:
        async for event in events:
            assert isinstance(event, BeamEvent)
            return [_beam_text(service, beam.token_ids, finite(beam.score), beam.finish_reason) for beam in event.beams]
    raise AssertionError("a stream of events ends with a terminal one")


async def score_prompt(
    service: Service, token_ids: list[int], num_top_logprobs: int, params: GenerationParams
) -> Matrix | None:
    """The log-probabilities of all tokens but the first, in `HeadEvent`'s columns; None if there is only that."""
    first, *others = token_ids
    if not others:
        return None
    return await service.values(
        Task.SCORE,
        [first],
        continuation_token_ids=others,
        num_top_logprobs=num_top_logprobs,
        priority=params.priority,
        cache_salt=params.cache_salt,
    )


async def _events(service: Service, token_ids: list[int], params: GenerationParams) -> AsyncGenerator[Event]:
    stream = service.events(
        Task.GENERATE,
        token_ids,
        sampling=params.sampling,
        priority=params.priority,
        cache_salt=params.cache_salt,
    )
    try:
        async with aclosing(stream) as events:
            async for event in events:
                yield event
    except InvalidRequestError as error:  # what only the engine can find out, as of a grammar
        raise params.names.translated(error) from None


def _scored(event: TokenEvent, text: str) -> ScoredToken:
    top = [(token_id, finite(logprob)) for token_id, logprob in event.top_logprobs]
    return ScoredToken(event.token_id, text, finite(event.logprob), top)


def _beam_text(service: Service, token_ids: list[int], score: float, finish_reason: FinishReason) -> BeamText:
    detokenizer = IncrementalDetokenizer(service.tokenizer)
    texts = [detokenizer.push(token_id) for token_id in token_ids]
    if texts:
        texts[-1] += detokenizer.flush()
    tokens = [ScoredToken(token_id, text, None) for token_id, text in zip(token_ids, texts, strict=True)]
    return BeamText("".join(texts), tokens, score, finish_reason)
