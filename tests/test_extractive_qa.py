"""Windows going in, answers coming out. The oracle below is written from the description of transformers 4's
`QuestionAnsweringPipeline`, whose code transformers 5 no longer has."""

import itertools
from typing import Any

import numpy as np
import pytest
import tokenizers
from fakes import SENTENCES, small_backend_json, small_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

from gptj_serve.errors import InvalidRequestError
from gptj_serve.extractive_qa import Answer, QAOptions, Window, best_answers, make_windows
from gptj_serve.tokenizer import Encoding

TOKENIZER = small_tokenizer()
BACKEND = tokenizers.Tokenizer.from_str(small_backend_json())
QUESTION = "Where is the fox?"

characters = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab  \n\u0301é京👩\u200d"))
contexts = st.one_of(st.text(characters, min_size=1, max_size=60), st.lists(st.sampled_from(SENTENCES)).map(" ".join))
seeds = st.integers(0, 2**32 - 1)


def _random_logits(windows: list[Window], seed: int, scale: float = 5.0) -> list[list[list[float]]]:
    random = np.random.default_rng(seed)
    return [(random.standard_normal((len(window.token_ids), 2)) * scale).tolist() for window in windows]


def _logits(window: Window, **peaks: tuple[int, float]) -> list[list[float]]:
    """Zeros, but for `start=(context token, logit)` and `end=(…)`."""
    values = [[0.0, 0.0] for _ in window.token_ids]
    for side, (token, logit) in peaks.items():
        values[window.num_question_tokens + token][["start", "end"].index(side)] = logit
    return values


def _windows(context: str, options: QAOptions, question: str = QUESTION, n_positions: int = 64) -> list[Window]:
    return make_windows(TOKENIZER, question, TOKENIZER.encode_with_offsets(context), options, n_positions, 10**9)


def _answers(context: str, windows: list[Window], logits: list[list[list[float]]], options: QAOptions) -> list[Answer]:
    return best_answers(context, TOKENIZER.encode_with_offsets(context), windows, logits, options)


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.text(characters, min_size=1, max_size=200), st.integers(2, 64), st.integers(0, 20), st.integers(1, 20))
def test_windows_cover_the_context_with_the_stride_and_fit(
    context: str, max_seq_len: int, doc_stride: int, max_question_len: int
) -> None:
    question = TOKENIZER.encode(QUESTION)[:max_question_len]
    room = max_seq_len - len(question)
    assume(doc_stride < room)
    encoding = TOKENIZER.encode_with_offsets(context)
    options = QAOptions(max_seq_len=max_seq_len, doc_stride=doc_stride, max_question_len=max_question_len)
    windows = make_windows(TOKENIZER, QUESTION, encoding, options, 64, 10**9)
    for window in windows:
        assert len(window.token_ids) <= max_seq_len
        assert window.num_question_tokens == len(question)
        assert window.token_ids == question + [encoding.token_ids[i] for i in window.context_tokens]
    spans = [window.context_tokens for window in windows]
    assert spans[0].start == 0
    assert spans[-1].stop == len(encoding.token_ids)
    assert all(len(span) == room for span in spans[:-1])
    assert all(before.stop - after.start == doc_stride for before, after in itertools.pairwise(spans))
    assert all(len(after) > doc_stride for after in spans[1:]), "a window without a token of its own"


def test_windows_by_default() -> None:
    """384 tokens, 128 of them repeated, at most 64 for the question; halves of them if the model is smaller."""
    long = "one two three four five six seven eight nine ten " * 100
    windows = _windows(long, QAOptions(), long, n_positions=2048)
    assert {window.num_question_tokens for window in windows} == {64}
    assert len(windows[0].token_ids) == 384
    assert windows[1].context_tokens.start == 384 - 64 - 128
    windows = _windows(long, QAOptions(), long, n_positions=32)
    assert {window.num_question_tokens for window in windows} == {16}
    assert len(windows[0].token_ids) == 32
    assert windows[1].context_tokens.start == 8


@pytest.mark.parametrize(
    ("question", "context", "options", "field", "value"),
    [
        ("", "text", {}, "question", ""),
        (QUESTION, "", {}, "context", ""),
        (QUESTION, "text", {"max_seq_len": 65}, "max_seq_len", 65),
        (QUESTION, "text", {"max_seq_len": 5, "max_question_len": 5}, "max_seq_len", 5),
        (QUESTION, "text", {"max_seq_len": 20, "max_question_len": 5, "doc_stride": 15}, "doc_stride", 15),
    ],
)
def test_lengths_that_leave_no_room_are_refused_by_name(
    question: str, context: str, options: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        _windows(context, QAOptions(**options), question)
    assert (error.value.field, error.value.value) == (field, value)


def test_too_many_windows_are_refused_before_they_are_made() -> None:
    encoding = TOKENIZER.encode_with_offsets("the fox " * 50)
    options = QAOptions(max_seq_len=10, max_question_len=2, doc_stride=7)
    windows = make_windows(TOKENIZER, QUESTION, encoding, options, 64, 10**9)
    assert make_windows(TOKENIZER, QUESTION, encoding, options, 64, len(windows)) == windows
    with pytest.raises(InvalidRequestError, match=f"makes {len(windows)} windows"):
        make_windows(TOKENIZER, QUESTION, encoding, options, 64, len(windows) - 1)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────


@given(contexts, seeds, st.booleans(), st.booleans(), st.integers(1, 30), st.integers(1, 5), st.integers(15, 64))
def test_an_answer_is_the_piece_of_context_it_points_at(
    context: str,
    seed: int,
    align_to_words: bool,
    handle_impossible_answer: bool,
    max_answer_len: int,
    top_k: int,
    max_seq_len: int,
) -> None:
    options = QAOptions(
        align_to_words=align_to_words,
        handle_impossible_answer=handle_impossible_answer,
        max_answer_len=max_answer_len,
        top_k=top_k,
        max_seq_len=max_seq_len,
    )
    assume(context)
    windows = _windows(context, options)
    answers = _answers(context, windows, _random_logits(windows, seed), options)
    assert 1 <= len(answers) <= top_k
    for answer in answers:
        assert context[answer.start : answer.end] == answer.answer
        assert answer.answer == answer.answer.strip()
        assert answer.score >= 0
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    assert len({answer.answer.lower() for answer in answers}) == len(answers)


def _brute_force(
    context: str, windows: list[Window], logits: list[list[list[float]]], options: QAOptions
) -> list[tuple[str, float]]:
    """(answer, score): every span of every window, one by one."""
    encoding = BACKEND.encode(context, add_special_tokens=False)
    answers: dict[str, list[Any]] = {}
    for window, window_logits in zip(windows, logits, strict=True):
        own = np.exp(np.array(window_logits[window.num_question_tokens :]))
        start, end = (own / own.sum(axis=0)).T  # the question's tokens have no part in the softmax
        spans = [
            (start[s] * end[e], s, e)
            for s in range(len(own))
            for e in range(len(own))
            if s <= e and e - s + 1 <= options.max_answer_len
        ]
        num_kept = options.top_k * 2 + 10
        for score, s, e in sorted(spans, reverse=True)[:num_kept]:
            first, last = window.context_tokens.start + s, window.context_tokens.start + e
            if options.align_to_words:
                begin = encoding.word_to_chars(encoding.token_to_word(first))[0]
                stop = encoding.word_to_chars(encoding.token_to_word(last))[1]
            else:
                begin, stop = encoding.token_to_chars(first)[0], encoding.token_to_chars(last)[1]
            text = context[begin:stop].strip()
            if text:
                answers.setdefault(text.lower(), [text, 0.0])[1] += score
    ranked = sorted(answers.values(), key=lambda answer: -answer[1])
    return [(text, score) for text, score in ranked[: options.top_k]] or [("", 0.0)]


@given(contexts, seeds, st.booleans(), st.integers(1, 30), st.integers(1, 4), st.integers(15, 64))
def test_best_answers_equal_a_brute_force_search(
    context: str, seed: int, align_to_words: bool, max_answer_len: int, top_k: int, max_seq_len: int
) -> None:
    assume(context)
    options = QAOptions(
        align_to_words=align_to_words, max_answer_len=max_answer_len, top_k=top_k, max_seq_len=max_seq_len
    )
    windows = _windows(context, options)
    logits = _random_logits(windows, seed, scale=2.0)
    answers = _answers(context, windows, logits, options)
    expected = _brute_force(context, windows, logits, options)
    assert [answer.answer for answer in answers] == [text for text, _ in expected]
    np.testing.assert_allclose([a.score for a in answers], [score for _, score in expected], rtol=1e-9)


def _token(context: str, position: int) -> int:
    """The last token that covers a character."""
    offsets = TOKENIZER.encode_with_offsets(context).offsets
    return max(i for i, (start, end) in enumerate(offsets) if start <= position < end)


def test_align_to_words_widens_the_span() -> None:
    context = "We met Žofka-Marie yesterday."
    (window,) = _windows(context, QAOptions())
    first, last = _token(context, context.index("ofka") + 1), _token(context, context.index("arie") + 1)
    logits = [_logits(window, start=(first, 20.0), end=(last, 20.0))]
    (whole,) = _answers(context, [window], logits, QAOptions(align_to_words=True))
    (raw,) = _answers(context, [window], logits, QAOptions(align_to_words=False))
    assert whole.answer == "Žofka-Marie"
    assert raw.answer in whole.answer
    assert len(raw.answer) < len(whole.answer)


def test_a_token_that_is_part_of_a_character_stands_for_all_of_it() -> None:
    context = "It was 👩🏽 there."
    (window,) = _windows(context, QAOptions())
    tokens = [i for i, (start, _) in enumerate(TOKENIZER.encode_with_offsets(context).offsets) if start == 7]
    logits = [_logits(window, start=(tokens[2], 20.0), end=(tokens[2], 20.0))]
    (answer,) = _answers(context, [window], logits, QAOptions(align_to_words=False))
    assert answer.answer == "👩"


def test_equal_answers_are_merged_and_their_scores_added() -> None:
    context = "Yes, the fox. No, THE FOX."
    (window,) = _windows(context, QAOptions())
    values = _logits(window)
    for text, logit in [("the fox", 9.0), ("THE FOX", 8.0)]:
        position = context.index(text)
        values[window.num_question_tokens + _token(context, position)][0] = logit
        values[window.num_question_tokens + _token(context, position + len(text) - 1)][1] = logit
    options = QAOptions(max_answer_len=8, top_k=3)
    answers = _answers(context, [window], [values], options)
    total = np.exp(9.0) + np.exp(8.0) + len(window.context_tokens) - 2
    first, second = (np.exp(9.0) / total) ** 2, (np.exp(8.0) / total) ** 2
    assert (answers[0].answer, answers[0].start) == ("the fox", context.index("the fox"))
    assert answers[0].score == pytest.approx(first + second, rel=1e-3)  # part-word spans widen to it and add a little
    assert "the fox" not in [answer.answer.lower() for answer in answers[1:]]


def test_an_answer_in_two_windows_is_found_once() -> None:
    context = "the fox sat here"
    options = QAOptions(max_seq_len=64)
    (window,) = _windows(context, options)
    peak = _logits(window, start=(_token(context, 4), 9.0), end=(_token(context, 6), 9.0))
    (once,) = _answers(context, [window], [peak], options)
    (twice,) = _answers(context, [window, window], [peak, peak], options)
    assert twice == Answer("fox", pytest.approx(2 * once.score), 4, 7)


@pytest.mark.parametrize(
    ("null_logit", "expected"),
    [(30.0, ["", "fox"]), (-30.0, ["fox", "over"])],
)
def test_no_answer_is_one_of_the_answers_if_allowed(null_logit: float, expected: list[str]) -> None:
    """Its probability is that of the window's first token among it and the context's."""
    context = "the fox jumps over"
    (window,) = _windows(context, QAOptions())
    values = _logits(window)
    for text, logit in (("fox", 9.0), ("over", 7.0)):
        first, last = _token(context, context.index(text)), _token(context, context.index(text) + len(text) - 1)
        values[window.num_question_tokens + first][0] = values[window.num_question_tokens + last][1] = logit
    values[0] = [null_logit, null_logit]
    allowed = QAOptions(handle_impossible_answer=True, max_answer_len=4, top_k=2)
    assert [answer.answer for answer in _answers(context, [window], [values], allowed)] == expected
    forbidden = QAOptions(handle_impossible_answer=False, max_answer_len=4, top_k=2)
    assert [answer.answer for answer in _answers(context, [window], [values], forbidden)] == ["fox", "over"]


def test_no_answer_has_the_lowest_score_of_all_windows() -> None:
    context = "the fox jumps over"
    options = QAOptions(handle_impossible_answer=True, top_k=100)
    (window,) = _windows(context, options)
    sure, unsure = _logits(window), _logits(window)
    sure[0] = [9.0, 9.0]
    unsure[0] = [1.0, 2.0]
    others = len(window.context_tokens)
    expected = np.exp(1.0) / (np.exp(1.0) + others) * np.exp(2.0) / (np.exp(2.0) + others)
    for logits in ([sure, unsure], [unsure, sure]):
        answers = _answers(context, [window, window], logits, options)
        assert [answer.score for answer in answers if answer.answer == ""] == [pytest.approx(expected)]


def test_a_context_of_blanks_has_no_answer() -> None:
    (window,) = _windows(" \n ", QAOptions())
    assert _answers(" \n ", [window], _random_logits([window], 1), QAOptions()) == [Answer("", 0.0, 0, 0)]


@pytest.mark.parametrize("limit", [2**31, 2**63, 10**30])
def test_a_huge_answer_length_is_no_limit(limit: int) -> None:
    context = SENTENCES[1]
    (window,) = _windows(context, QAOptions(max_seq_len=64))
    logits = _random_logits([window], 3)
    unlimited = _answers(context, [window], logits, QAOptions(max_answer_len=limit))
    assert unlimited == _answers(context, [window], logits, QAOptions(max_answer_len=64))


def test_windows_and_logits_belong_together() -> None:
    (window,) = _windows("text", QAOptions())
    with pytest.raises(ValueError, match="zip"):
        best_answers("text", Encoding([0], [(0, 4)], [0]), [window], [], QAOptions())
