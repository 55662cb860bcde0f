"""Zero-shot classification: labels that come with the request, by their likelihood through the LM head."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_serve import zero_shot
from gptj_serve.api.huggingface_responses import ZeroShotLabels
from gptj_serve.api.huggingface_schemas import ClassifyParameters, ClassifyRequest
from gptj_serve.api.service import Service, off_loop, run_all
from gptj_serve.errors import InvalidRequestError
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import Task

MAX_PAIRS = 1024
"""Inputs times candidate labels of one request."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is scored: a label's words after a text, or, to calibrate it, after nothing."""

    prompt: list[int]
    continuation: list[int]


async def classify_zero_shot(service: Service, request: ClassifyRequest) -> list[ZeroShotLabels]:
    """Per input its candidate labels, best first."""
    service.require_head("lm_head", "zero-shot classification")
    parameters = request.parameters
    _check_that_nothing_is_without_meaning(request)
    inputs = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    service.check_batch(inputs)
    labels, hypotheses = _hypotheses(parameters)
    if len(inputs) * len(labels) > MAX_PAIRS:
        raise InvalidRequestError(
            "parameters.candidate_labels",
            len(labels),
            f"{len(inputs)} inputs with {len(labels)} labels each: over the limit of {MAX_PAIRS} pairs",
        )
    num_characters = sum(map(len, inputs)) * len(labels) + sum(len(h.opening) + len(h.rest) for h in hypotheses)
    bos = service.model.bos_token_id
    neutral, given = await off_loop(num_characters, _tokenized, service.tokenizer, inputs, hypotheses, bos)
    for text, pairs in zip(inputs, given, strict=True):
        _check_lengths(service, text, [*neutral, *pairs])
    scores = await run_all([_log_likelihood(service, pair) for pairs in [neutral, *given] for pair in pairs])
    multi_label = bool(parameters.multi_label)
    results: list[ZeroShotLabels] = []
    for index, text in enumerate(inputs, 1):
        likelihoods = scores[index * len(labels) : (index + 1) * len(labels)]
        values = zero_shot.label_probabilities(likelihoods, scores[: len(labels)], multi_label=multi_label)
        ranked = sorted(zip(labels, values, strict=True), key=lambda pair: -pair[1])
        results.append(
            {"sequence": text, "labels": [label for label, _ in ranked], "scores": [value for _, value in ranked]}
        )
    return results


def _check_that_nothing_is_without_meaning(request: ClassifyRequest) -> None:
    for field, value in (
        ("model", request.model),
        ("parameters.top_k", request.parameters.top_k),
        ("parameters.function_to_apply", request.parameters.function_to_apply),
    ):
        if value is not None:
            raise InvalidRequestError(field, value, "has no meaning with candidate_labels")


def _hypotheses(parameters: ClassifyParameters) -> tuple[list[str], list[zero_shot.Hypothesis]]:
    template = parameters.hypothesis_template or zero_shot.DEFAULT_HYPOTHESIS_TEMPLATE
    try:
        labels = zero_shot.parse_labels(parameters.candidate_labels or [])
        return labels, [zero_shot.make_hypothesis(template, label) for label in labels]
    except InvalidRequestError as error:
        raise InvalidRequestError(f"parameters.{error.field}", error.value, error.reason) from None


def _tokenized(
    tokenizer: Tokenizer, inputs: Sequence[str], hypotheses: Sequence[zero_shot.Hypothesis], bos: int | None
) -> tuple[list[_Pair], list[list[_Pair]]]:
    """A pair for each label without a text, and one for each label with each text."""
    continuations = [zero_shot.continuation(tokenizer, hypothesis) for hypothesis in hypotheses]
    neutral = [zero_shot.neutral_prompt(tokenizer, hypothesis, bos) for hypothesis in hypotheses]
    given = [[zero_shot.prompt(tokenizer, text, hypothesis) for hypothesis in hypotheses] for text in inputs]
    first, *others = [list(map(_Pair, prompts, continuations)) for prompts in [neutral, *given]]
    return first, others


def _check_lengths(service: Service, text: str, pairs: Sequence[_Pair]) -> None:
    for pair in pairs:
        if len(pair.prompt) + len(pair.continuation) > service.model.n_positions:
            raise InvalidRequestError(
                "inputs",
                text,
                f"{len(pair.prompt)} tokens + {len(pair.continuation)} of a label exceed the model's context of "
                f"{service.model.n_positions}",
            )


async def _log_likelihood(service: Service, pair: _Pair) -> float:
    values = await service.values(Task.SCORE, pair.prompt, continuation_token_ids=pair.continuation)
    return float(values.array.sum(dtype="float64"))
