"""Classification: a head's logits as labels with scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_serve.api.huggingface_responses import LabelScore
from gptj_serve.api.huggingface_schemas import ClassifyParameters, ClassifyRequest
from gptj_serve.api.service import Service, run_all
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import DEFAULT_HEAD, Pooling, Task


@dataclass(frozen=True, slots=True)
class _Head:
    """A classification head as requests see it."""

    name: str
    labels: Sequence[str]
    problem_type: str | None
    pooling: Pooling = Pooling.LAST


async def classify(service: Service, request: ClassifyRequest) -> list[list[LabelScore]]:
    """Per input its labels, best first: those of the checkpoint's config.json, or of the head that is asked for."""
    for name in ("hypothesis_template", "multi_label"):
        if (value := getattr(request.parameters, name)) is not None:
            raise InvalidRequestError(f"parameters.{name}", value, "goes with candidate_labels only")
    head = _classifier(service, service.choose_head(request.model, "score", "classification"))
    inputs = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    service.check_batch(inputs)
    prompts = [_without_trailing_pads(service, await service.encode(text, "inputs")) for text in inputs]
    logits = await run_all(
        [service.values(Task.CLASSIFY, ids, head=head.name, pooling=head.pooling) for ids in prompts]
    )
    return [_label_scores(matrix.rows()[0], request.parameters, head) for matrix in logits]


def _classifier(service: Service, name: str) -> _Head:
    if name != DEFAULT_HEAD:
        info = service.named_heads[name]
        return _Head(name, info.labels, info.problem_type, Pooling(info.pooling))
    model = service.model
    return _Head(name, [model.id2label[index] for index in range(model.num_labels)], model.problem_type)


def _without_trailing_pads(service: Service, token_ids: list[int]) -> list[int]:
    """Transformers pools at the rightmost token that is not the pad token; what follows can't influence it."""
    length = len(token_ids)
    while length > 1 and token_ids[length - 1] == service.model.pad_token_id:
        length -= 1
    return token_ids[:length]


def _label_scores(logits: Sequence[float], parameters: ClassifyParameters, head: _Head) -> list[LabelScore]:
    scores = _apply_function(logits, parameters.function_to_apply or _default_function(head))
    labels: list[LabelScore] = [
        {"label": label, "score": score} for label, score in zip(head.labels, scores, strict=True)
    ]
    return sorted(labels, key=lambda label: -label["score"])[: parameters.top_k]


def _default_function(head: _Head) -> str:
    """As in transformers' pipeline: sigmoid for several independent labels or a single one, else softmax."""
    multi_label = head.problem_type == "multi_label_classification"
    return "sigmoid" if multi_label or len(head.labels) == 1 else "softmax"


def _apply_function(logits: Sequence[float], function: str) -> list[float]:
    match function:
        case "none":
            return list(logits)
        case "sigmoid":
            return [0.5 * (1.0 + math.tanh(0.5 * x)) for x in logits]
        case _:
            highest = max(logits)
            weights = [math.exp(x - highest) for x in logits]
            return [weight / sum(weights) for weight in weights]
