"""The data that the demo checkpoint is made from, read from one directory, and what is held out of it.

Held out of training: the last `HELD_OUT_CHARACTERS` of every text, CLINC150's validation and test parts, a twentieth of
the SQuAD paragraphs (development) and all of XQuAD (test).
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_CHARACTERS = 20_000
OUT_OF_SCOPE = "oos"
PROSE = ("sotu.txt", "moby_dick.txt", "pride_and_prejudice.txt", "gutenberg/*.txt")
VERSE = ("tinyshakespeare.txt",)


@dataclass(frozen=True, slots=True)
class Text:
    name: str
    train: str
    held_out: str


@dataclass(frozen=True, slots=True)
class Question:
    """One extractive question: `context[start:end]` is its first answer, half-open in characters."""

    id: str
    question: str
    context: str
    start: int
    end: int
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Intents:
    """CLINC150: (text, label) pairs; `labels` sorted by name, out-of-scope last."""

    labels: tuple[str, ...]
    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]


def read_texts(data: Path) -> list[Text]:
    """The public-domain texts; prose has the line breaks inside its paragraphs taken out, verse keeps them."""
    corpora = data / "corpora"
    texts = []
    for pattern in (*PROSE, *VERSE):
        for path in sorted(corpora.glob(pattern)):
            content = path.read_text(encoding="utf-8")
            content = content if pattern in VERSE else unwrap(content)
            texts.append(Text(path.stem, content[:-HELD_OUT_CHARACTERS], content[-HELD_OUT_CHARACTERS:]))
    if not texts:
        raise FileNotFoundError(f"{corpora}: none of {', '.join(PROSE + VERSE)} found")
    return texts


def unwrap(content: str) -> str:
    """Join the hard-wrapped lines of each paragraph; paragraphs stay one blank line apart."""
    paragraphs = re.split(r"\n[ \t]*\n\s*", content)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def read_intents(data: Path) -> Intents:
    raw: dict[str, list[tuple[str, str]]] = json.loads((data / "classify/clinc150.data_full.json").read_text())
    labels = (*sorted({label for _, label in raw["train"]}), OUT_OF_SCOPE)
    numbers = {label: number for number, label in enumerate(labels)}

    def part(name: str) -> list[tuple[str, int]]:
        return [(text, numbers[label]) for text, label in raw[name] + raw[f"oos_{name}"]]

    return Intents(labels, part("train"), part("val"), part("test"))


def read_questions(data: Path) -> tuple[list[Question], list[Question]]:
    """SQuAD 1.1 training questions → (train, development), split by paragraph so that no context is in both."""
    questions = read_squad(data / "qa/squad1.1.train-head.json") + read_squad(data / "qa/squad1.1.train-extra.json")
    train: list[Question] = []
    development: list[Question] = []
    for question in questions:
        is_development = zlib.crc32(question.context.encode()) % 20 == 0
        (development if is_development else train).append(question)
    return train, development


def read_test_questions(data: Path) -> list[Question]:
    return read_squad(data / "qa/xquad.en.json")


def read_squad(path: Path) -> list[Question]:
    articles: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["data"]
    questions = []
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        for raw in paragraph["qas"]:
            first = raw["answers"][0]
            start, end = first["answer_start"], first["answer_start"] + len(first["text"])
            answers = tuple(answer["text"] for answer in raw["answers"])
            questions.append(Question(raw["id"], raw["question"].strip(), paragraph["context"], start, end, answers))
    return questions
