"""Labelled examples from the files that people have: JSONL and CSV for classification, SQuAD's shapes for answers.

All errors are `DataError`s that name file, line and field.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptj_serve.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelledText:
    text: str
    labels: tuple[str, ...]  # one; any number if the file has lists of labels
    source: str  # file:line


@dataclass(frozen=True, slots=True)
class Question:
    question: str
    context: str
    answers: tuple[tuple[int, str], ...]  # (first character, text) in the context; none: it has no answer there
    source: str


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    examples: list[LabelledText]
    is_multi_label: bool

    @property
    def labels(self) -> list[str]:
        return sorted({label for example in self.examples for label in example.labels})


def read_texts(
    file: Path, *, text_field: str = "text", label_field: str = "label", label_separator: str | None = None
) -> LabelledTexts:
    """JSONL (`.jsonl`), or CSV or TSV with a header line. A JSON list of labels, or a separator, means multi-label."""
    examples: list[LabelledText] = []
    kinds: dict[bool, str] = {}  # is it a list of labels → where
    for source, row in _rows(file):
        text = _field(row, text_field, source)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{source}: {text_field}={text!r}: must be a text that is not empty")
        value = _field(row, label_field, source)
        if label_separator is not None and isinstance(value, str):
            value = [label.strip() for label in value.split(label_separator) if label.strip()]
        is_list = isinstance(value, list)
        labels = [_label(label, label_field, source) for label in (value if is_list else [value])]
        if len(set(labels)) < len(labels):
            raise DataError(f"{source}: {label_field}={value!r}: a label comes twice")
        kinds.setdefault(is_list, source)
        examples.append(LabelledText(text, tuple(labels), source))
    if not examples:
        raise DataError(f"{file}: has no examples")
    if len(kinds) == 2:
        raise DataError(f"{kinds[False]} has a single {label_field}, {kinds[True]} a list: all must be of one kind")
    texts = LabelledTexts(examples, True in kinds)
    if len(texts.labels) < 2:
        raise DataError(f"{file}: {label_field} has one class only: {texts.labels}; a classifier needs two")
    return texts


def read_questions(file: Path) -> list[Question]:
    """SQuAD's own JSON (1.1 and 2.0), or JSONL with question, context, answers (`text` and `answer_start` lists)."""
    questions = list(_flat_squad(file) if file.suffix == ".jsonl" else _nested_squad(file))
    if not questions:
        raise DataError(f"{file}: has no questions")
    return questions


def split(keys: Sequence[str], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Indices in len(fractions) + 1 parts, the rest first. Equal keys fall into the same part, so nothing leaks."""
    unique = list(dict.fromkeys(keys))
    order = np.random.default_rng(seed).permutation(len(unique))
    sizes = [round(fraction * len(unique)) for fraction in fractions]
    bounds = np.cumsum([0, len(unique) - sum(sizes), *sizes])
    part_of = {unique[i]: int(np.searchsorted(bounds, place, side="right")) - 1 for place, i in enumerate(order)}
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for index, key in enumerate(keys):
        parts[part_of[key]].append(index)
    return parts


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix == ".jsonl":
        yield from _json_lines(file)
    elif file.suffix in (".csv", ".tsv"):
        yield from _csv_rows(file)
    else:
        raise DataError(f"{file}: expected .jsonl, .csv or .tsv")


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{file}:{number}", row


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    is_tsv = file.suffix == ".tsv"  # has no quotes: a quotation mark is one
    lines = _text(file).splitlines(keepends=True)
    reader = csv.DictReader(
        lines, delimiter="\t" if is_tsv else ",", quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL, strict=True
    )
    try:
        for row in reader:
            source = f"{file}:{reader.line_num}"
            if None in row:
                raise DataError(f"{source}: has more fields than the header ({', '.join(reader.fieldnames or [])})")
            yield source, {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        raise DataError(f"{file}:{reader.reader.line_num}: not CSV: {error}") from None


def _field(row: dict[str, Any], name: str, source: str) -> Any:
    if name not in row:
        raise DataError(f"{source}: has no field {name!r}, only {', '.join(map(repr, row))}")
    return row[name]


def _label(value: Any, field: str, source: str) -> str:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and value.strip()):
        return str(value)
    raise DataError(f"{source}: {field}={value!r}: must be a label, or a list of labels")


def _flat_squad(file: Path) -> Iterator[Question]:
    for source, row in _json_lines(file):
        answers = _field(row, "answers", source)
        try:
            pairs = list(zip(answers["answer_start"], answers["text"], strict=True))
        except (TypeError, KeyError, ValueError):
            raise DataError(f"{source}: answers={answers!r}: must have equally long text and answer_start") from None
        yield _question(_field(row, "question", source), _field(row, "context", source), pairs, source)


def _nested_squad(file: Path) -> Iterator[Question]:
    try:
        for document, article in enumerate(json.loads(_text(file))["data"]):
            for place, paragraph in enumerate(article["paragraphs"]):
                for number, item in enumerate(paragraph["qas"]):
                    source = f"{file}: data[{document}].paragraphs[{place}].qas[{number}]"
                    pairs = [(answer["answer_start"], answer["text"]) for answer in item["answers"]]
                    yield _question(item["question"], paragraph["context"], pairs, source)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not in SQuAD's format: {error!r}") from None


def _question(question: Any, context: Any, answers: Iterable[tuple[Any, Any]], source: str) -> Question:
    for field, value in (("question", question), ("context", context)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{source}: {field}={value!r}: must be a text that is not empty")
    found = []
    for start, text in answers:
        if not isinstance(start, int) or not isinstance(text, str) or not text:
            raise DataError(f"{source}: answers: {text!r} at {start!r} is not a text at a number of characters")
        if start < 0 or context[start : start + len(text)] != text:
            raise DataError(f"{source}: answers: {text!r} is not at character {start} of the context")
        found.append((start, text))
    return Question(question, context, tuple(found), source)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable as UTF-8 text: {error}") from None
