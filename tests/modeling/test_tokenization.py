"""The callable tokenizer against transformers' `PreTrainedTokenizerFast` on the same small byte-level BPE."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fakes import ADDED_TOKEN, SENTENCES, SPECIAL_TOKEN, small_backend_json

from gptj_serve import AutoTokenizer
from gptj_serve.errors import CheckpointError
from gptj_serve.modeling.tokenization import GPTJTokenizer
from gptj_serve.tokenizer import Tokenizer


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    content = json.loads(small_backend_json())
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    write_json(directory / "tokenizer.json", content)
    tokens = {"bos_token": SPECIAL_TOKEN, "eos_token": {"content": SPECIAL_TOKEN}, "unk_token": SPECIAL_TOKEN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **tokens}
    write_json(directory / "tokenizer_config.json", config | {"eos_token": SPECIAL_TOKEN})
    write_json(directory / "special_tokens_map.json", tokens)
    return directory


@pytest.fixture
def both(directory: Path) -> tuple[GPTJTokenizer, Any]:
    return AutoTokenizer.from_pretrained(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture
def slow_files(tmp_path: Path) -> Path:
    """vocab.json, merges.txt and added_tokens.json of the same tokenizer, and nothing else."""
    content = json.loads(small_backend_json())
    model = content["model"]
    write_json(tmp_path / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    write_json(tmp_path / "added_tokens.json", {t["content"]: t["id"] for t in content["added_tokens"]})
    return tmp_path


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")  # transformers' own
def test_random_calls_equal_transformers(both: tuple[GPTJTokenizer, Any]):
    ours, theirs = both
    ours.pad_token = theirs.pad_token = SPECIAL_TOKEN
    rng = random.Random(0)
    pieces = [
        *["abc", "dé", "ž", "東京", "\n\t123", "👩\u200d👩\u200d👧"],
        " ",
        "  ",
        SPECIAL_TOKEN,
        ADDED_TOKEN,
        *SENTENCES[:2],
    ]
    num_compared = 0
    for _ in range(300):
        num_texts = rng.randint(0, 3)

        def draw(num_texts: int = num_texts) -> Any:
            texts = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(max(num_texts, 1))]
            return texts if num_texts else texts[0]

        text, pair = draw(), draw() if rng.random() < 0.5 else None
        options = {
            "padding": rng.choice([False, True, "max_length", "longest"]),
            "truncation": rng.choice([False, True, "only_first", *(["only_second"] if pair else [])]),
            "max_length": rng.choice([None, 8, 16]),
            "padding_side": rng.choice([None, "left", "right"]),
            "return_offsets_mapping": rng.random() < 0.5,
            "return_token_type_ids": rng.random() < 0.5,
            "return_special_tokens_mask": rng.random() < 0.3,
            "return_overflowing_tokens": rng.random() < 0.3,
            "stride": rng.choice([0, 1]),
        }
        try:
            expected = dict(theirs(text, pair, **options))
        except BaseException:  # the backend panics when nothing of a text would be left
            with pytest.raises(ValueError, match="max_length"):
                ours(text, pair, **options)
            continue
        assert dict(ours(text, pair, **options)) == expected, (text, pair, options)
        num_compared += 1
    assert num_compared > 150


def test_tensors(both: tuple[GPTJTokenizer, Any]):
    ours, theirs = both
    ours.pad_token = theirs.pad_token = SPECIAL_TOKEN
    for arguments in [("Hello, my dog is cute",), (SENTENCES,), ("Who?", "The dog.")]:
        result, expected = (t(*arguments, return_tensors="pt", padding=True) for t in (ours, theirs))
        for key, value in expected.items():
            assert torch.equal(result[key], value)
        assert result.to("cpu") is result
        assert result.to("meta").input_ids.device.type == "meta"
    assert isinstance(ours("a", return_tensors="np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="padding=True"):
        ours(["a b c", "a"], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        ours("a", return_tensors="tf")


def test_what_lies_behind_a_result(both: tuple[GPTJTokenizer, Any]):
    ours, theirs = both
    result, expected = (t("the dog", "and the dog", padding=False) for t in (ours, theirs))
    assert result.tokens() == expected.tokens()
    assert result.sequence_ids(0) == expected.sequence_ids(0)
    assert result.word_ids() == expected.word_ids()
    assert result.char_to_token(0, 5, 1) == expected.char_to_token(0, 5, sequence_index=1)
    assert {**result} == dict(result.items())
    assert result[0] is result.encodings[0]
    with pytest.raises(AttributeError, match="labels"):
        result.labels  # noqa: B018


def test_texts_of_tokens(both: tuple[GPTJTokenizer, Any]):
    ours, theirs = both
    ids = [ours(sentence + SPECIAL_TOKEN).input_ids for sentence in SENTENCES]
    for skip in (False, True):
        options = {"skip_special_tokens": skip}
        assert ours.batch_decode(ids, **options) == theirs.batch_decode(ids, **options)
        assert ours.decode(ids, **options) == ours.batch_decode(ids, **options)
        assert ours.decode(torch.tensor(ids[0]), **options) == theirs.decode(ids[0], **options)
        assert ours.batch_decode(torch.tensor([ids[0]]), **options) == [theirs.decode(ids[0], **options)]
    assert ours.decode(ids[0][0]) == theirs.decode(ids[0][0])
    assert ours.decode(torch.tensor(ids[0][0])) == theirs.decode(ids[0][0])
    assert ours.decode([]) == ""


def test_vocabulary(both: tuple[GPTJTokenizer, Any]):
    ours, theirs = both
    assert (len(ours), ours.vocab_size, ours.model_max_length) == (len(theirs), theirs.vocab_size, 64)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.tokenize(SENTENCES[2]) == theirs.tokenize(SENTENCES[2])
    assert ours.encode("a b", "c") == theirs.encode("a b", "c")
    tokens = theirs.tokenize(SENTENCES[0])
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_ids_to_tokens(ours.convert_tokens_to_ids(tokens)) == tokens
    assert ours.convert_tokens_to_ids("no such token") == ours.unk_token_id
    assert ours.all_special_ids == theirs.all_special_ids


def test_special_tokens_can_be_set(both: tuple[GPTJTokenizer, Any]):
    ours, _ = both
    assert (ours.eos_token, ours.bos_token, ours.pad_token, ours.pad_token_id) == (
        SPECIAL_TOKEN,
        SPECIAL_TOKEN,
        None,
        None,
    )
    with pytest.raises(ValueError, match="does not have a padding token"):
        ours(["a", "b c"], padding=True)
    ours.pad_token = ours.eos_token
    assert ours.pad_token_id == ours.eos_token_id
    ours.pad_token_id = 5
    assert ours.pad_token == ours.convert_ids_to_tokens(5)
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        ours.pad_token = "[PAD]"
    with pytest.raises(ValueError, match="pad_token_id=9999"):
        ours.pad_token_id = 9999
    ours.pad_token = None
    assert ours.pad_token_id is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"padding": "most"}, "padding='most'"),
        ({"truncation": "middle"}, "truncation='middle'"),
        ({"padding_side": "top"}, "'top'"),
        ({"text_pair": ["a"]}, "text_pair"),
        ({"text": [1, 2]}, "not 1"),
        ({"text": [["a", "b"]]}, "string"),
    ],
    ids=str,
)
def test_arguments_that_can_not_be_followed(both: tuple[GPTJTokenizer, Any], options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        both[0](**{"text": "a", **options})


def test_saved_and_loaded_again(both: tuple[GPTJTokenizer, Any], tmp_path: Path):
    ours, _ = both
    ours.pad_token, ours.padding_side = ADDED_TOKEN, "left"
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (theirs, again):
        assert (loaded.pad_token, loaded.padding_side, loaded.model_max_length) == (ADDED_TOKEN, "left", 64)
        assert loaded(SENTENCES, padding=True)["input_ids"] == ours(SENTENCES, padding=True)["input_ids"]


def test_settings_override_those_of_the_files(directory: Path):
    ours = AutoTokenizer.from_pretrained(str(directory), padding_side="left", pad_token=ADDED_TOKEN, model_max_length=7)
    assert (ours.padding_side, ours.pad_token, ours.model_max_length) == ("left", ADDED_TOKEN, 7)
    assert len(ours(SENTENCES[0], truncation=True).input_ids) == 7
    with pytest.raises(TypeError, match="use_slow"):
        AutoTokenizer.from_pretrained(directory, use_slow=True)
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoTokenizer()


def test_the_slow_files_make_the_same_tokenizer(directory: Path, slow_files: Path):
    expected, built = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(slow_files)
    assert built.get_vocab() == expected.get_vocab()
    assert built.all_special_ids == expected.all_special_ids
    texts = [*SENTENCES, f"a{SPECIAL_TOKEN} b{ADDED_TOKEN}c"]
    result, reference = (t(texts, return_offsets_mapping=True) for t in (built, expected))
    assert dict(result) == dict(reference)
    for skip in (False, True):
        assert built.decode(result.input_ids, skip) == expected.decode(result.input_ids, skip)
    served = Tokenizer.from_directory(slow_files)
    assert [served.encode(text) for text in texts] == result.input_ids


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("vocab.json", "{", "vocab.json"),
        ("merges.txt", None, "merges.txt"),
        ("added_tokens.json", "[1]", "not a mapping"),
        ("added_tokens.json", '{"<|x|>": 9000}', "'<|x|>' is 9000, but its turn is"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", "{", "not readable as JSON"),
    ],
)
def test_damaged_files_are_refused_by_name(slow_files: Path, file: str, content: str | None, told: str):
    (slow_files / file).unlink(missing_ok=True)
    if content is not None:
        (slow_files / file).write_text(content)
    with pytest.raises(CheckpointError) as error:
        AutoTokenizer.from_pretrained(slow_files)
    assert told in str(error.value)


def test_no_tokenizer(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_torch_is_not_imported_for_lists(directory: Path):
    code = (
        "import sys; from gptj_serve import AutoTokenizer;"
        f"AutoTokenizer.from_pretrained({str(directory)!r})(['a', 'b'], 'c d'.split()); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
