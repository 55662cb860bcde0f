"""Batches of the three tasks. What step n holds depends on the seed and n alone, so a resumed run goes on as it was."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.cloze import cut_passage, make_cloze
from training.network import IGNORED
from training.plan import Phase
from training.sources import OUT_OF_SCOPE, Intents, Question, Text, read_intents, read_questions, read_texts
from training.tokenizer import end_of_text_id

DOCUMENT_BREAK = re.compile(r"\n\n(?=(?:CHAPTER|Chapter|VOLUME|Letter|Fellow|[IVXL]+\.|To the (?:Senate|Congress))\b)")
INTENT_LENGTHS = (16, 32)
EXTRA_OUT_OF_SCOPE = 400
SIZE_EXPONENT = 0.75  # a text is drawn with its size to this power: the longest one does not drown the rest
SQUAD_PASSAGES = 0.4  # of the cloze questions


@dataclass(frozen=True, slots=True)
class LanguageBatch:
    ids: Tensor  # [B, T]
    targets: Tensor  # [B, T]


@dataclass(frozen=True, slots=True)
class QuestionBatch:
    ids: Tensor  # [B, T], padded on the right
    targets: Tensor  # [B, T], next tokens of the context, else IGNORED
    is_context: Tensor  # [B, T] bool
    start: Tensor  # [B], token positions
    end: Tensor  # [B], inclusive


@dataclass(frozen=True, slots=True)
class IntentBatch:
    ids: Tensor  # [B, T], padded on the right
    last: Tensor  # [B]
    labels: Tensor  # [B]


Batch = LanguageBatch | QuestionBatch | IntentBatch


@dataclass(frozen=True, slots=True)
class Example:
    """A question before its context in tokens; `start` and `end` (inclusive) count from the question's first token."""

    question: list[int]
    context: list[int]
    start: int
    end: int


class BatchMaker:
    """Holds the tokenised training parts and draws from them."""

    def __init__(self, data: Path, tokenizer: Tokenizer, seed: int) -> None:
        self.seed = seed
        self.tokenizer = tokenizer
        self.texts = read_texts(data)
        self.weights = [len(text.train) ** SIZE_EXPONENT for text in self.texts]
        self.tokens = [torch.tensor(encode_documents(tokenizer, text)) for text in self.texts]
        self.questions, _ = read_questions(data)
        self.contexts = list(dict.fromkeys(question.context for question in self.questions))
        self.intents = self._encode_intents(read_intents(data))

    def step_batches(self, step: int, phase: Phase) -> list[Batch]:
        rng = random.Random(f"{self.seed} {step}")
        batches: list[Batch] = [self.language(rows, length, rng) for rows, length in phase.lm]
        batches += [self.question(rows, length, phase.squad_share, rng) for rows, length in phase.qa]
        return [*batches, self.intent(phase.intent_tokens, rng)]

    def language(self, rows: int, length: int, rng: random.Random) -> LanguageBatch:
        windows = []
        for tokens in rng.choices(self.tokens, self.weights, k=rows):
            start = rng.randrange(len(tokens) - length)
            windows.append(tokens[start : start + length + 1])
        window = torch.stack(windows)
        return LanguageBatch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

    def question(self, rows: int, length: int, squad_share: float, rng: random.Random) -> QuestionBatch:
        num_squad = round(rows * squad_share)
        examples = [self._squad(rng) for _ in range(num_squad)]
        examples += [self._cloze(length * 4, rng) for _ in range(rows - num_squad)]
        return collate_questions([crop(example, length, rng) for example in examples], length)

    def intent(self, num_tokens: int, rng: random.Random) -> IntentBatch:
        buckets = [self.intents[length] for length in INTENT_LENGTHS]
        (length,) = rng.choices(INTENT_LENGTHS, [len(bucket) for bucket in buckets])
        rows = rng.sample(self.intents[length], num_tokens // length)
        last = torch.tensor([len(ids) - 1 for ids, _ in rows])
        return IntentBatch(pad([ids for ids, _ in rows], length), last, torch.tensor([label for _, label in rows]))

    def _squad(self, rng: random.Random) -> Example:
        question = rng.choice(self.questions)
        return encode_example(self.tokenizer, question.question, question.context, question.start, question.end)

    def _cloze(self, num_characters: int, rng: random.Random) -> Example:
        while True:
            if rng.random() < SQUAD_PASSAGES:
                passage = rng.choice(self.contexts)
            else:
                (text,) = rng.choices(self.texts, self.weights)
                passage = cut_passage(text.train, num_characters, rng)
            if cloze := make_cloze(passage, rng):
                return encode_example(self.tokenizer, cloze.question, passage, cloze.start, cloze.end)

    def _encode_intents(self, intents: Intents) -> dict[int, list[tuple[list[int], int]]]:
        """By padded length; SQuAD's questions, in CLINC150's spelling, are more examples of what is out of scope."""
        out_of_scope = intents.labels.index(OUT_OF_SCOPE)
        asked = random.Random(self.seed).sample(self.questions, EXTRA_OUT_OF_SCOPE)
        pairs = [*intents.train, *((plain_spelling(question), out_of_scope) for question in asked)]
        encodings = self.tokenizer.encode_batch([text for text, _ in pairs])
        encoded = [(encoding.ids, label) for encoding, (_, label) in zip(encodings, pairs, strict=True)]
        shortest = (0, *INTENT_LENGTHS)
        return {
            high: [(ids, label) for ids, label in encoded if low < len(ids) <= high]
            for low, high in zip(shortest, INTENT_LENGTHS, strict=False)
        }


def plain_spelling(question: Question) -> str:
    return question.question.lower().rstrip("?").replace(",", "").strip()


def encode_documents(tokenizer: Tokenizer, text: Text) -> list[int]:
    """A text's training part with the end-of-text token after each chapter or speech."""
    end_of_text = end_of_text_id(tokenizer)
    encodings = tokenizer.encode_batch(DOCUMENT_BREAK.split(text.train))
    return [token for encoding in encodings for token in (*encoding.ids, end_of_text)]


def encode_example(tokenizer: Tokenizer, question: str, context: str, start: int, end: int) -> Example:
    """Character span [start, end) of the context → the tokens that touch it."""
    prefix = tokenizer.encode(question).ids
    encoding = tokenizer.encode(context)
    touching = [i for i, (low, high) in enumerate(encoding.offsets) if low < end and high > start]
    return Example(prefix, encoding.ids, len(prefix) + touching[0], len(prefix) + touching[-1])


def crop(example: Example, length: int, rng: random.Random) -> Example:
    """Cut the context to a random window that keeps the answer, so that the whole has at most `length` tokens."""
    question = example.question[: length // 3]
    lost = len(example.question) - len(question)
    room = length - len(question)
    first, last = example.start - len(example.question), example.end - len(example.question)
    last = min(last, first + room - 1)
    low, high = max(0, last + 1 - room), max(0, min(first, len(example.context) - room))
    begin = rng.randint(min(low, high), high)
    context = example.context[begin : begin + room]
    return Example(question, context, example.start - begin - lost, len(question) + last - begin)


def collate_questions(examples: list[Example], length: int) -> QuestionBatch:
    ids = pad([example.question + example.context for example in examples], length)
    is_context = torch.zeros(len(examples), length, dtype=torch.bool)
    targets = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        first, end = len(example.question), len(example.question) + len(example.context)
        is_context[row, first:end] = True
        targets[row, first - 1 : end - 1] = ids[row, first:end]
    start = torch.tensor([example.start for example in examples])
    return QuestionBatch(ids, targets, is_context, start, torch.tensor([example.end for example in examples]))


def pad(rows: list[list[int]], length: int) -> Tensor:
    """Zeros on the right, to `length`; whatever is there, no token left of it sees it."""
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
