"""`fit_qa_head`: from questions with their answers to a head that points at the answer's first and last token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gptj_serve.errors import DataError, InvalidRequestError
from gptj_serve.extractive_qa import QAOptions, best_answers, make_windows
from gptj_serve.extractive_qa import Window as TokenWindow
from gptj_serve.fit.examples import Question, split
from gptj_serve.fit.features import FeatureCache, compute_features, key_of
from gptj_serve.fit.job import FitJob, check_parts
from gptj_serve.fit.linear import Fitted, Window, fit_pointers
from gptj_serve.fit.metrics import exact_match_and_f1
from gptj_serve.model.heads import HeadKind
from gptj_serve.tokenizer import Encoding
from gptj_serve.types import Pooling

BASELINE_WORDS = 3
"""The baseline answers every question with so many words from the context's beginning."""


@dataclass(frozen=True, slots=True)
class _Item:
    question: Question
    encoding: Encoding
    windows: list[TokenWindow]


async def fit_qa_head(job: FitJob, questions: Sequence[Question], test: Sequence[Question] = ()) -> dict[str, Any]:
    """Fit on a part of `questions`, stop by another, report on `test` or a third; returns the report.

    Parts are made of whole contexts. A window without its question's answer points at its first token, which is how
    `extractive_qa` reads "no answer".
    """
    job = job.pooled(Pooling.ALL)
    parts = split([q.context for q in questions], [job.validation, *([] if test else [job.holdout])], job.seed)
    check_parts(parts, len(questions))
    if not any(questions[i].answers for i in parts[0]):
        raise DataError("no question of the training part has an answer in its context")
    items = [_cut(job, question) for question in [*questions, *test]]
    train, validation = ([items[i] for i in part] for part in parts[:2])
    held_out = items[len(questions) :] if test else [items[i] for i in parts[2]]
    options = QAOptions()
    with job.open_cache() as cache:
        windows = [window.token_ids for item in items for window in item.windows]
        await compute_features(job.checkpoint, job.features, cache, windows)
        fitted = fit_pointers(
            [window for item in train for window in _targets(item, cache)],
            [window for item in validation for window in _targets(item, cache)],
            width=job.checkpoint.config.n_embd,
            seed=job.seed,
        )
        predicted = [_answer(item, cache, fitted, options) for item in held_out]
    baseline = [" ".join(item.question.context.split()[:BASELINE_WORDS]) for item in held_out]
    figures = {
        "training_questions": len(train),
        "validation_questions": len(validation),
        "held_out_questions": len(held_out),
        **_figures("", predicted, held_out),
        **_figures("baseline_", baseline, held_out),
    }
    return job.save(HeadKind.QA, fitted, figures)


def _cut(job: FitJob, question: Question) -> _Item:
    """The windows that the service would make."""
    encoding = job.tokenizer.encode_with_offsets(question.context)
    try:
        windows = make_windows(
            job.tokenizer, question.question, encoding, QAOptions(), job.checkpoint.config.n_positions
        )
    except InvalidRequestError as error:
        raise DataError(f"{question.source}: {error}") from None
    return _Item(question, encoding, windows)


def _targets(item: _Item, cache: FeatureCache) -> list[Window]:
    span = _answer_tokens(item)
    result = []
    for window in item.windows:
        shift = window.num_question_tokens - window.context_tokens.start
        is_inside = span is not None and span[0] in window.context_tokens and span[1] in window.context_tokens
        first, last = (span[0] + shift, span[1] + shift) if span is not None and is_inside else (0, 0)
        candidates = np.array([0, *range(window.num_question_tokens, len(window.token_ids))])
        result.append(Window(partial(cache.__getitem__, key_of(window.token_ids)), candidates, first, last))
    return result


def _answer_tokens(item: _Item) -> tuple[int, int] | None:
    """First and last token of the first answer, in the context's encoding."""
    if not item.question.answers:
        return None
    first_character, text = item.question.answers[0]
    touched = [
        token
        for token, (start, end) in enumerate(item.encoding.offsets)
        if start < first_character + len(text) and end > first_character
    ]
    return (touched[0], touched[-1]) if touched else None


def _answer(item: _Item, cache: FeatureCache, fitted: Fitted, options: QAOptions) -> str:
    assert fitted.bias is not None
    logits = [cache[key_of(window.token_ids)] @ fitted.weight.T + fitted.bias for window in item.windows]
    answers = best_answers(item.question.context, item.encoding, item.windows, [x.tolist() for x in logits], options)
    return answers[0].answer


def _figures(prefix: str, predicted: Sequence[str], items: Sequence[_Item]) -> dict[str, float]:
    scores = [
        exact_match_and_f1(answer, (text for _, text in item.question.answers))
        for answer, item in zip(predicted, items, strict=True)
    ]
    exact, f1 = np.mean(scores, axis=0)
    return {f"{prefix}exact_match": round(float(exact), 4), f"{prefix}f1": round(float(f1), 4)}
