"""Zero-shot classification around the model: what is scored for a text and its candidate labels, and what that means.

transformers' `ZeroShotClassificationPipeline` asks a model trained on entailment; a GPT-J is asked how likely it goes
on from the text to the hypothesis that names the label. Labels that are likely anywhere would always win, so the
log-likelihood of the same words without the text is subtracted (PMI-DC: Holtzman et al., arXiv 2104.08315).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_serve.errors import InvalidRequestError
from gptj_serve.tokenizer import Tokenizer

DEFAULT_HYPOTHESIS_TEMPLATE = "This example is {}."
"""transformers'."""

SEPARATOR = "\n"
"""Between a text and its hypothesis."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A label's sentence, cut where the label begins: `opening` + `rest` is the template with the label in it.

    The blank before the label belongs to `rest`: GPT-2's tokens carry the blank before a word.
    """

    opening: str
    rest: str


def parse_labels(labels: str | Sequence[str]) -> list[str]:
    """A list, or labels separated by commas. Raises `InvalidRequestError` if there is none, or one twice: the scores
    are shared out among the labels, and the two would get a share each."""
    parsed = [label.strip() for label in labels.split(",")] if isinstance(labels, str) else list(labels)
    parsed = [label for label in parsed if label.strip()]
    if not parsed:
        raise InvalidRequestError("candidate_labels", labels, "must name at least one label")
    label, count = Counter(parsed).most_common(1)[0]
    if count > 1:
        raise InvalidRequestError("candidate_labels", label, "is there twice")
    return parsed


def make_hypothesis(template: str, label: str) -> Hypothesis:
    before, placeholder, after = template.partition("{}")
    if not placeholder or "{}" in after:
        raise InvalidRequestError("hypothesis_template", template, "must have one {} where the label goes")
    opening = before.rstrip()
    return Hypothesis(opening, before[len(opening) :] + label + after)


def continuation(tokenizer: Tokenizer, hypothesis: Hypothesis) -> list[int]:
    return tokenizer.encode(hypothesis.rest)


def prompt(tokenizer: Tokenizer, text: str, hypothesis: Hypothesis) -> list[int]:
    """What the continuation is scored after."""
    return tokenizer.encode(text + SEPARATOR + hypothesis.opening)


def neutral_prompt(tokenizer: Tokenizer, hypothesis: Hypothesis, bos_token_id: int | None) -> list[int]:
    """The same without the text: the hypothesis begins a document."""
    begin = [] if bos_token_id is None else [bos_token_id]
    return begin + tokenizer.encode(SEPARATOR + hypothesis.opening)


def label_probabilities(
    log_likelihoods: Sequence[float], neutral_log_likelihoods: Sequence[float], *, multi_label: bool
) -> list[float]:
    """One of the labels is true: softmax over the calibrated scores. Any may be true, or there is one label only: each
    alone, as the odds that the text brings it forth rather than anything does."""
    scores = [given - neutral for given, neutral in zip(log_likelihoods, neutral_log_likelihoods, strict=True)]
    if multi_label or len(scores) == 1:
        return [0.5 * (1.0 + math.tanh(0.5 * score)) for score in scores]
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
