"""Self-supervised questions: hide a span of one sentence of a passage and ask for it.

"The treaty was signed by John Adams in Paris." → "Who was treaty signed by in Paris?". Crude English, yet answering
takes what extractive QA takes: find the sentence that the question's words come from, and the span that is missing.
"""

import random
import re
from dataclasses import dataclass

SENTENCE_END = re.compile(r"(?<=[.!?;])[\"'’”)]*\s+(?=[A-Z\"'“‘(])")
NAME = re.compile(r"(?<=[\w,;] )[A-Z][\w’'-]+(?: (?:(?:of|the|de) )?[A-Z][\w’'-]+){0,3}")
NUMBER = re.compile(r"\$?\b\d[\d,.]*(?<![,.])(?: (?:million|billion|percent|per cent|thousand))?")
CHUNK = re.compile(
    r"(?<=\b(?:the|his|her|our|and|for|was) )(?:[a-z]+ ){0,2}[a-z]{4,}"
    r"|(?<=\b(?:of|in|by|to|is) )(?:[a-z]+ ){0,2}[a-z]{4,}"
)
YEAR = re.compile(r"1\d{3}|20\d\d")
FUNCTION_WORD = re.compile(
    "a|an|and|as|at|be|but|by|for|from|had|has|have|he|her|his|i|in|is|it|its|my|not|of|on|or|our|she|so|that|the|"
    "their|them|they|this|to|was|we|were|which|who|with|you"
)
PUNCTUATION = "\"'.,;:!?()[]_*—-“”‘’"
MAX_SPAN_CHARACTERS = 45
SENTENCE_CHARACTERS = range(30, 401)
TRIES = 4


@dataclass(frozen=True, slots=True)
class Cloze:
    question: str
    start: int  # the answer is passage[start:end]
    end: int


def sentence_spans(passage: str) -> list[tuple[int, int]]:
    """Spans [start, end) of the sentences of a passage."""
    spans, start = [], 0
    for boundary in SENTENCE_END.finditer(passage):
        spans.append((start, boundary.start()))
        start = boundary.end()
    return [*spans, (start, len(passage))]


def cut_passage(text: str, num_characters: int, rng: random.Random) -> str:
    """A stretch of about `num_characters` that begins where a sentence begins, as far as can be seen."""
    offset = rng.randrange(max(1, len(text) - num_characters - 400))
    boundary = SENTENCE_END.search(text, offset, offset + 400)
    start = boundary.end() if boundary else offset
    stretch = text[start : start + num_characters]
    last = stretch.rfind(". ")
    return stretch[: last + 1] if last > num_characters // 2 else stretch


def make_cloze(passage: str, rng: random.Random) -> Cloze | None:
    """Choose a sentence and a span in it; None where a few tries find nothing to ask for."""
    sentences = [(start, end) for start, end in sentence_spans(passage) if end - start in SENTENCE_CHARACTERS]
    for _ in range(TRIES if sentences else 0):
        start, end = rng.choice(sentences)
        kind = rng.choice((NAME, NAME, NUMBER, NUMBER, CHUNK))
        spans = [match.span() for match in kind.finditer(passage, start, end)]
        spans = [span for span in spans if span[1] - span[0] <= MAX_SPAN_CHARACTERS]
        if spans:
            answer = rng.choice(spans)
            left, right = passage[start : answer[0]].split(), passage[answer[1] : end].split()
            wh = question_words(kind, passage[slice(*answer)], left[-1].lower() if left else "", rng)
            return Cloze(phrase_question(left, right, wh, rng), *answer)
    return None


def question_words(kind: re.Pattern[str], answer: str, word_before: str, rng: random.Random) -> str:
    if kind is NUMBER:
        if YEAR.fullmatch(answer):
            return rng.choice(("when", "in what year", "what year"))
        return rng.choice(("how much", "how many", "how many", "what number"))
    if kind is NAME:
        if word_before in ("in", "at", "from", "near", "to"):
            return rng.choice(("where", "where", "what place", "in what", "what"))
        return rng.choice(("who", "who", "who", "what", "which", "what"))
    return rng.choice(("what", "what", "what", "which", "what kind of", "who", "why", "how"))


def phrase_question(left: list[str], right: list[str], wh: str, rng: random.Random) -> str:
    """Words around the gap, some of them lost, with the question words in the gap's place or in front."""
    reach = rng.randint(3, 12)
    before = thin_out(left[-reach:], rng)
    after = thin_out(right[:reach], rng)
    order = rng.random()
    if order < 0.3:
        words = [*before, wh, *after]
    elif order < 0.65:
        words = [wh, *after, *before]
    else:
        words = [wh, *before, *after]
    sentence = " ".join(words)
    return sentence[:1].upper() + sentence[1:] + "?"


def thin_out(words: list[str], rng: random.Random) -> list[str]:
    kept = []
    for word in (word.strip(PUNCTUATION) for word in words):
        lost = 0.35 if FUNCTION_WORD.fullmatch(word.lower()) else 0.12
        if word and rng.random() >= lost:
            kept.append(stem(word) if rng.random() < 0.25 else word)
    return kept


def stem(word: str) -> str:
    """Take a verb's or a plural's ending off, as questions with "did" and "does" do."""
    for ending in ("ing", "ed", "es", "s"):
        if word.islower() and word.endswith(ending) and len(word) > len(ending) + 3:
            return word[: -len(ending)]
    return word
