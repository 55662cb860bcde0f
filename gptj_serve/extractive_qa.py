"""Extractive question answering around the model: windows going in, answer spans coming out.

The behaviour is that of the question-answering pipeline of transformers 4 (`QuestionAnsweringPipeline`), which
transformers 5 removed: question and context are encoded apart and concatenated; a long context is cut into windows
that overlap by `doc_stride` tokens; a span's score is the product of its start and end probabilities within its
window. Two things differ: an answer never begins or ends with white space (GPT-2's tokens carry the blank before a
word, and the old pipeline returned it); and without a CLS token, which GPT-J has not, "no answer" is the window's
first token, which is where transformers' `run_qa.py` trains such models to point.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptj_serve.errors import InvalidRequestError
from gptj_serve.tokenizer import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class QAOptions:
    """The pipeline's parameters, with its defaults; None means the default that fits the model's context."""

    top_k: int = 1
    doc_stride: int | None = None  # 128, or half a window's room for context
    max_seq_len: int | None = None  # 384, or n_positions
    max_question_len: int | None = None  # 64, or half of max_seq_len
    max_answer_len: int = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """`context[start:end] == answer`, in characters of the caller's string."""

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Window:
    """One sequence for the model: the question's tokens, then `context_tokens` of the context's encoding."""

    token_ids: list[int]
    num_question_tokens: int
    context_tokens: range


def make_windows(
    tokenizer: Tokenizer,
    question: str,
    context: Encoding,
    options: QAOptions,
    n_positions: int,
    max_windows: int | None = None,
) -> list[Window]:
    """Cut the context into windows. Raises `InvalidRequestError` when the lengths leave no room, or make too many."""
    max_seq_len = min(384, n_positions) if options.max_seq_len is None else options.max_seq_len
    if max_seq_len > n_positions:
        raise InvalidRequestError("max_seq_len", max_seq_len, f"the model's context is {n_positions} tokens")
    max_question_len = options.max_question_len or min(64, max_seq_len // 2)
    question_ids = tokenizer.encode(question)[:max_question_len]
    if not question_ids:
        raise InvalidRequestError("question", question, "must not be empty")
    if not context.token_ids:
        raise InvalidRequestError("context", "", "must not be empty")
    room = max_seq_len - len(question_ids)
    if room < 1:
        raise InvalidRequestError(
            "max_seq_len", max_seq_len, f"leaves no room for context after {len(question_ids)} question tokens"
        )
    stride = min(128, room // 2) if options.doc_stride is None else options.doc_stride
    if stride >= room:
        raise InvalidRequestError("doc_stride", stride, f"must be less than the {room} context tokens of a window")
    length = len(context.token_ids)
    starts = range(0, max(length - stride, 1), room - stride)
    if max_windows is not None and len(starts) > max_windows:
        raise InvalidRequestError(
            "context", f"{length} tokens", f"makes {len(starts)} windows; at most {max_windows} in one request"
        )
    spans = [range(start, min(start + room, length)) for start in starts]
    return [Window(question_ids + context.token_ids[span.start : span.stop], len(question_ids), span) for span in spans]


def best_answers(
    context_text: str,
    context: Encoding,
    windows: Sequence[Window],
    logits: Sequence[Sequence[Sequence[float]]],
    options: QAOptions,
) -> list[Answer]:
    """The `top_k` best answers over all windows; `logits` per window [num_tokens][2] (start, end)."""
    found: dict[str, Answer] = {}  # by lower-cased text: the scores of equal answers add up
    lowest_null_score = 1.0
    num_candidates = options.top_k * 2 + 10  # more than wanted: some are blank, some the same words
    for window, window_logits in zip(windows, logits, strict=True):
        values = np.asarray(window_logits, dtype=np.float64)
        in_context = values[window.num_question_tokens :]
        if options.handle_impossible_answer:  # "no answer" takes its share of the probability
            probabilities = _softmax(np.concatenate([values[:1], in_context]))
            lowest_null_score = min(lowest_null_score, float(probabilities[0].prod()))
            probabilities = probabilities[1:]
        else:
            probabilities = _softmax(in_context)
        for first, last, score in _best_spans(probabilities, num_candidates, options.max_answer_len):
            start, end = _characters(
                context_text, context, window.context_tokens[first], window.context_tokens[last], options.align_to_words
            )
            if start == end:
                continue
            text = context_text[start:end]
            known = found.get(text.lower())
            found[text.lower()] = (
                Answer(text, score, start, end)
                if known is None
                else Answer(known.answer, known.score + score, known.start, known.end)
            )
    answers = list(found.values())
    if options.handle_impossible_answer:
        answers.append(Answer("", lowest_null_score, 0, 0))
    return sorted(answers, key=lambda answer: -answer.score)[: options.top_k] or [Answer("", 0.0, 0, 0)]


def _best_spans(probabilities: NDArray[np.float64], top_k: int, max_answer_len: int) -> list[tuple[int, int, float]]:
    """(first token, last token, score) of the best spans over the context's start and end probabilities [C, 2]."""
    start, end = probabilities.T
    max_answer_len = min(max_answer_len, len(start))
    scores = np.tril(np.triu(np.outer(start, end)), max_answer_len - 1)
    flat = scores.ravel()
    best = np.argpartition(-flat, top_k - 1)[:top_k] if top_k < flat.size else np.arange(flat.size)
    best = best[np.argsort(-flat[best], kind="stable")]
    firsts, lasts = np.unravel_index(best, scores.shape)
    return [
        (int(first), int(last), float(scores[first, last]))
        for first, last in zip(firsts, lasts, strict=True)
        if first <= last < first + max_answer_len
    ]


def _characters(text: str, encoding: Encoding, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """The character span of tokens first..last, widened to whole words if asked, without surrounding blanks."""
    if align_to_words:
        while first > 0 and encoding.word_ids[first - 1] == encoding.word_ids[first]:
            first -= 1
        while last + 1 < len(encoding.word_ids) and encoding.word_ids[last + 1] == encoding.word_ids[last]:
            last += 1
    start, end = encoding.offsets[first][0], encoding.offsets[last][1]
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the tokens, for start and end apart: [num_tokens, 2]."""
    exponentials = np.exp(logits - logits.max(axis=0))
    result: NDArray[np.float64] = exponentials / exponentials.sum(axis=0)
    return result
