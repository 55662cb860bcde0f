"""Figures of a model: perplexity on held-out text, intent accuracy, exact match and F1 of extracted answers."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from training.batches import pad
from training.network import DemoModel
from training.sources import OUT_OF_SCOPE, Intents, Question, Text

WINDOW_TOKENS = 384
WINDOW_OVERLAP = 128
MAX_QUESTION_TOKENS = 64
MAX_ANSWER_TOKENS = 15
BATCH_ROWS = 16


@dataclass(frozen=True, slots=True)
class Perplexity:
    per_token: float
    per_byte: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class IntentScores:
    in_scope_accuracy: float
    out_of_scope_recall: float
    out_of_scope_precision: float


@dataclass(frozen=True, slots=True)
class AnswerScores:
    exact_match: float
    f1: float


@torch.inference_mode()
def measure_perplexity(model: DemoModel, tokenizer: Tokenizer, texts: list[Text], device: torch.device) -> Perplexity:
    """Each held-out text in consecutive windows of `n_positions` tokens; no window sees the one before it."""
    loss, num_tokens, num_bytes = 0.0, 0, 0
    length = model.config.n_positions
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text.held_out).ids, device=device)
        num_bytes += len(text.held_out.encode())
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            hidden = model.transformer(window[None, :-1])
            loss += model.language_loss(hidden, window[None, 1:]).item() * (len(window) - 1)
            num_tokens += len(window) - 1
    return Perplexity(math.exp(loss / num_tokens), math.exp(loss / num_bytes), num_tokens)


@torch.inference_mode()
def measure_intents(
    model: DemoModel, tokenizer: Tokenizer, intents: Intents, pairs: list[tuple[str, int]], device: torch.device
) -> IntentScores:
    out_of_scope = intents.labels.index(OUT_OF_SCOPE)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([text for text, _ in pairs])]
    counts: Counter[str] = Counter()
    by_length = sorted(range(len(pairs)), key=lambda i: len(encoded[i]))
    for rows in (by_length[i : i + 64] for i in range(0, len(by_length), 64)):
        ids = pad([encoded[i] for i in rows], len(encoded[rows[-1]])).to(device)
        last = torch.tensor([len(encoded[i]) - 1 for i in rows], device=device)
        predicted = model.intent_logits(model.transformer(ids), last).argmax(-1).tolist()
        for i, guess in zip(rows, predicted, strict=True):
            label = pairs[i][1]
            side = "out" if label == out_of_scope else "in"
            counts[side] += 1
            counts[f"{side} right"] += guess == label
            counts["guessed out"] += guess == out_of_scope
    precision = counts["out right"] / max(1, counts["guessed out"])
    return IntentScores(counts["in right"] / counts["in"], counts["out right"] / max(1, counts["out"]), precision)


@torch.inference_mode()
def measure_answers(
    model: DemoModel, tokenizer: Tokenizer, questions: list[Question], device: torch.device
) -> AnswerScores:
    """Best answer over all windows of each context against its reference answers, in percent as SQuAD reports."""
    exact_match = f1 = 0.0
    for question, guess in zip(questions, extract_answers(model, tokenizer, questions, device), strict=True):
        exact_match += max(float(normalise(guess) == normalise(answer)) for answer in question.answers)
        f1 += max(token_f1(guess, answer) for answer in question.answers)
    return AnswerScores(100 * exact_match / len(questions), 100 * f1 / len(questions))


@dataclass(frozen=True, slots=True)
class Window:
    row: int  # of the question
    ids: list[int]
    prefix: int  # tokens of the question
    first: int  # the context's token that comes first in the window


def extract_answers(
    model: DemoModel, tokenizer: Tokenizer, questions: list[Question], device: torch.device
) -> list[str]:
    contexts = tokenizer.encode_batch([question.context for question in questions])
    asked = tokenizer.encode_batch([question.question for question in questions])
    prefixes = [encoding.ids[:MAX_QUESTION_TOKENS] for encoding in asked]
    windows = [window for row in range(len(questions)) for window in cut_windows(row, prefixes[row], contexts[row].ids)]
    windows.sort(key=lambda window: len(window.ids))
    best: dict[int, tuple[float, int, int]] = {}
    for batch in (windows[i : i + BATCH_ROWS] for i in range(0, len(windows), BATCH_ROWS)):
        ids = pad([window.ids for window in batch], len(batch[-1].ids)).to(device)
        is_context = torch.zeros_like(ids, dtype=torch.bool)
        for i, window in enumerate(batch):
            is_context[i, window.prefix : len(window.ids)] = True
        starts, ends = model.span_logits(model.transformer(ids), is_context)
        scores, spans = best_spans(starts.softmax(-1), ends.softmax(-1))
        for window, score, (start, end) in zip(batch, scores.tolist(), spans.tolist(), strict=True):
            shift = window.first - window.prefix
            best[window.row] = max(best.get(window.row, (-1.0, 0, 0)), (score, start + shift, end + shift))
    return [words_of(questions[row].context, contexts[row], *best[row][1:]) for row in range(len(questions))]


def cut_windows(row: int, prefix: list[int], context: list[int]) -> Iterator[Window]:
    room = WINDOW_TOKENS - len(prefix)
    for first in range(0, max(1, len(context) - WINDOW_OVERLAP), room - WINDOW_OVERLAP):
        yield Window(row, prefix + context[first : first + room], len(prefix), first)


def best_spans(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B, T] each → the greatest product of start and end [B] and its (start, inclusive end) [B, 2]."""
    products = starts[:, :, None] * ends[:, None, :]
    products = products.triu().tril(MAX_ANSWER_TOKENS - 1)
    scores, flat = products.flatten(1).max(-1)
    return scores, torch.stack((flat // starts.shape[1], flat % starts.shape[1]), dim=-1)


def words_of(context: str, encoding: Encoding, start: int, end: int) -> str:
    """The text of the whole words that the tokens start … end touch."""
    words = encoding.word_ids
    while start > 0 and words[start - 1] == words[start]:
        start -= 1
    while end + 1 < len(words) and words[end + 1] == words[end]:
        end += 1
    return context[encoding.offsets[start][0] : encoding.offsets[end][1]].strip()


def normalise(answer: str) -> str:
    """As SQuAD's evaluate-v1.1.py: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def token_f1(guess: str, answer: str) -> float:
    guessed, wanted = normalise(guess).split(), normalise(answer).split()
    common = (Counter(guessed) & Counter(wanted)).total()
    return 2 * common / (len(guessed) + len(wanted)) if common else 0.0
