"""Reading examples: the shapes people have, and errors that name file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.errors import DataError
from gptj_serve.fit.examples import read_questions, read_texts, split


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str | bytes | list[Any]) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_jsonl(write):
    texts = read_texts(write("a.jsonl", [{"text": "Hello", "label": "hi"}, {"text": "So\u2028long", "label": 7}]))
    assert [(e.text, e.labels) for e in texts.examples] == [("Hello", ("hi",)), ("So\u2028long", ("7",))]
    assert (texts.labels, texts.is_multi_label) == (["7", "hi"], False)
    assert texts.examples[1].source.endswith("a.jsonl:2")


def test_csv_with_quotes_and_line_breaks(write):
    texts = read_texts(write("a.csv", '\ufefflabel,text\nham,"Hi, ""you""\nthere"\nspam,Win\n'))
    assert [(e.text, e.labels) for e in texts.examples] == [('Hi, "you"\nthere', ("ham",)), ("Win", ("spam",))]
    assert texts.examples[1].source.endswith("a.csv:4")


def test_tsv_with_other_names_and_plain_quotation_marks(write):
    path = write("a.tsv", 'Label\tSMS\nham\t"Hi\nspam\tWin" now\n')
    texts = read_texts(path, text_field="SMS", label_field="Label")
    assert [e.text for e in texts.examples] == ['"Hi', 'Win" now']


def test_lists_of_labels(write):
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}]
    texts = read_texts(write("a.jsonl", rows))
    assert texts.is_multi_label
    assert [e.labels for e in texts.examples] == [("x", "y"), ()]
    texts = read_texts(write("a.csv", "text,label\na,x | y\nb,\n"), label_separator="|")
    assert texts.is_multi_label
    assert [e.labels for e in texts.examples] == [("x", "y"), ()]


GOOD = {"text": "a", "label": "x"}
BAD_TEXTS: list[tuple[str, Any, str]] = [
    ("a.jsonl", [GOOD, {"text": "b"}], r"a\.jsonl:2: has no field 'label', only 'text'"),
    ("a.jsonl", [GOOD, {"text": "", "label": "x"}], r"a\.jsonl:2: text='': must be a text"),
    ("a.jsonl", [{"text": 5, "label": "x"}], r"a\.jsonl:1: text=5: "),
    ("a.jsonl", [GOOD, {"text": "b", "label": None}], r"a\.jsonl:2: label=None: "),
    ("a.jsonl", [GOOD, {"text": "b", "label": True}], r"a\.jsonl:2: label=True: "),
    ("a.jsonl", [{"text": "b", "label": ["x", "x"]}], r"a\.jsonl:1: label=\['x', 'x'\]: a label comes twice"),
    ("a.jsonl", [GOOD, {"text": "b", "label": ["y"]}], r"1 has a single label, .*a\.jsonl:2 a list"),
    ("a.jsonl", [GOOD, GOOD], r"a\.jsonl: label has one class only: \['x'\]"),
    ("a.jsonl", [GOOD, [1]], r"a\.jsonl:2: expected a JSON object, found list"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text"', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", "", r"a\.jsonl: has no examples"),
    ("a.csv", "", r"a\.csv: has no examples"),
    ("a.csv", "text,label\n", r"a\.csv: has no examples"),
    ("a.csv", "text,label\na,x\nb\n", r"a\.csv:3: has no field 'label'"),
    ("a.csv", "text,label\na,x,y\n", r"a\.csv:2: has more fields than the header \(text, label\)"),
    ("a.csv", 'text,label\n"a" b,x\n', r"a\.csv:2: not CSV"),
    ("a.csv", b"text,label\n\xff,x\n", r"a\.csv: not readable as UTF-8"),
    ("a.parquet", b"", r"a\.parquet: expected \.jsonl, \.csv or \.tsv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TEXTS)
def test_bad_texts_are_refused_by_place(write, name: str, content: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_texts(write(name, content))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_texts(tmp_path / "none.csv")


CONTEXT = "Ana lives in Ljubljana 👩🏽‍🚀."


def _squad(*qas: dict[str, Any]) -> str:
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": list(qas)}]}]})


def test_squad_in_both_shapes(write):
    where = {"question": "Where?", "answers": [{"answer_start": 13, "text": "Ljubljana"}]}
    nested = read_questions(write("a.json", _squad(where, {"question": "When?", "answers": [], "is_impossible": True})))
    flat = {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Ljubljana"], "answer_start": [13]}}
    lines = read_questions(write("a.jsonl", [flat]))
    assert [q.answers for q in nested] == [((13, "Ljubljana"),), ()]
    assert (lines[0].question, lines[0].context, lines[0].answers) == ("Where?", CONTEXT, nested[0].answers)


BAD_QUESTIONS: list[tuple[str, Any, str]] = [
    ("a.json", "[1]", r"a\.json: not in SQuAD's format"),
    ("a.json", "{", r"a\.json: not in SQuAD's format"),
    ("a.json", '{"data": []}', r"a\.json: has no questions"),
    (
        "a.json",
        _squad({"question": "Where?", "answers": [{"answer_start": 12, "text": "Ljubljana"}]}),
        r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: answers: 'Ljubljana' is not at character 12",
    ),
    ("a.json", _squad({"question": " ", "answers": []}), r"question=' ': must be a text"),
    ("a.jsonl", [{"question": "a", "context": "b", "answers": {"text": ["b"]}}], r"a\.jsonl:1: answers="),
    (
        "a.jsonl",
        [{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": ["0"]}}],
        r"a\.jsonl:1: answers: 'b' at '0'",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_QUESTIONS)
def test_bad_questions_are_refused_by_place(write, name: str, content: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_questions(write(name, content))


@given(st.lists(st.sampled_from("abcdefghijklmnopqrst"), max_size=40), st.integers(0, 9))
def test_equal_keys_never_part(keys: list[str], seed: int):
    parts = split(keys, [0.2, 0.1], seed)
    assert sorted(index for part in parts for index in part) == list(range(len(keys)))
    sets = [{keys[index] for index in part} for part in parts]
    assert sum(map(len, sets)) == len(set(keys))
    assert [len(part) for part in sets[1:]] == [round(0.2 * len(set(keys))), round(0.1 * len(set(keys)))]
    assert parts == split(keys, [0.2, 0.1], seed)


def test_another_seed_splits_otherwise():
    keys = [str(i) for i in range(30)]
    assert split(keys, [0.5], 0) != split(keys, [0.5], 1)
