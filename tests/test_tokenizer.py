"""Text to tokens and back. The oracle is the `tokenizers` library itself, on a byte-level BPE made on the spot."""

import json
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
from fakes import ADDED_TOKEN, HOLE, SENTENCES, SPECIAL_TOKEN, small_backend_json, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.errors import CheckpointError
from gptj_serve.tokenizer import IncrementalDetokenizer, StopStringScanner, Tokenizer

TOKENIZER = small_tokenizer()
BACKEND = tokenizers.Tokenizer.from_str(small_backend_json())
SPECIAL_ID = BACKEND.token_to_id(SPECIAL_TOKEN)
ADDED_ID = BACKEND.token_to_id(ADDED_TOKEN)

texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*SENTENCES, SPECIAL_TOKEN, ADDED_TOKEN, "é", "👩‍👩‍👧"])).map("".join),
)
token_ids = st.lists(st.integers(0, TOKENIZER.num_token_ids + HOLE), max_size=20)


@given(texts)
def test_encode_equals_the_backend(text: str) -> None:
    expected = BACKEND.encode(text, add_special_tokens=False)
    assert TOKENIZER.encode(text) == expected.ids
    assert TOKENIZER.encode_with_offsets(text) == (expected.ids, expected.offsets, expected.word_ids)


@given(texts)
def test_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


@given(token_ids, st.booleans())
def test_decode_equals_the_backend(ids: list[int], skip_special_tokens: bool) -> None:
    expected = BACKEND.decode(ids, skip_special_tokens=skip_special_tokens)
    assert TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens) == expected


def test_truncation_and_padding_of_the_file_have_no_effect() -> None:
    backend = tokenizers.Tokenizer.from_str(small_backend_json())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert Tokenizer(backend).encode(SENTENCES[0]) == TOKENIZER.encode(SENTENCES[0])


def test_special_tokens_are_read_as_tokens_and_skipped_in_text() -> None:
    ids = TOKENIZER.encode(f"a{SPECIAL_TOKEN}b{ADDED_TOKEN}")
    assert {SPECIAL_ID, ADDED_ID} < set(ids)
    assert TOKENIZER.special_token_ids == {SPECIAL_ID}
    assert TOKENIZER.decode(ids) == f"ab{ADDED_TOKEN}"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == f"a{SPECIAL_TOKEN}b{ADDED_TOKEN}"


def test_num_token_ids_ends_with_the_last_token() -> None:
    assert TOKENIZER.num_token_ids == BACKEND.get_vocab_size(with_added_tokens=True)
    assert TOKENIZER.token_bytes(TOKENIZER.num_token_ids - 1) == ADDED_TOKEN.encode()
    assert TOKENIZER.token_bytes(TOKENIZER.num_token_ids) == b""


@given(token_ids)
def test_pieces_joined_are_the_decoded_text(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == TOKENIZER.decode(ids)


@given(texts)
def test_no_piece_is_half_a_character(text: str) -> None:
    """Valid text never yields U+FFFD of its own, and what is out at any time is a beginning of the text."""
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    text = text.replace(SPECIAL_TOKEN, "").replace("\ufffd", "")
    released = ""
    for token_id in TOKENIZER.encode(text):
        released += detokenizer.push(token_id)
        assert text.startswith(released)
    assert detokenizer.flush() == ""
    assert released == text.replace(SPECIAL_TOKEN, "")


def test_a_character_appears_with_its_last_byte() -> None:
    ids = [BACKEND.token_to_id(symbol) for symbol in "ðŁĺĢ"]  # U+1F600, a token per byte
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "\U0001f600"]
    assert [detokenizer.push(ids[0]), detokenizer.flush()] == ["", "\ufffd"]


# Two letters, so that stop strings overlap with the text, with themselves and with one another.
letters = st.text("aé", max_size=5)
stop_lists = st.lists(st.text("aé", min_size=1, max_size=4), max_size=3)


def _stopped(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Where the stop string that completes first begins and ends; of several that complete together, the longest."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if not found:
        return None
    end, start = min(found)
    return start, end


@given(st.lists(letters, max_size=8), stop_lists, st.booleans())
def test_released_text_does_not_depend_on_how_it_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    scanner = StopStringScanner(stops, include_in_output=include)
    released = "".join([scanner.push(piece) for piece in pieces]) + scanner.flush()
    text = "".join(pieces)
    match _stopped(text, stops):
        case None:
            assert (released, scanner.stopped_by) == (text, None)
        case start, end:
            assert released == text[: end if include else start]
            assert scanner.stopped_by == text[start:end]


@given(st.lists(letters, max_size=8), stop_lists)
def test_held_text_is_the_longest_ending_that_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    scanner = StopStringScanner(stops, include_in_output=False)
    text = released = ""
    for piece in pieces:
        text += piece
        released += scanner.push(piece)
        if scanner.stopped_by is not None:
            return
        prefixes = {stop[:n] for stop in stops for n in range(1, len(stop))}
        endings = (text[start:] for start in range(len(text)))
        assert text == released + next((ending for ending in endings if ending in prefixes), "")


def test_nothing_is_released_after_a_stop() -> None:
    scanner = StopStringScanner(["STOP"], include_in_output=True)
    assert [scanner.push("one ST"), scanner.push("OP two"), scanner.push(" three"), scanner.flush()] == [
        "one ",
        "STOP",
        "",
        "",
    ]


def test_loads_a_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(small_backend_json(), encoding="utf-8")
    assert Tokenizer.from_directory(tmp_path).encode(SENTENCES[2]) == TOKENIZER.encode(SENTENCES[2])


def _without(key: str) -> str:
    return json.dumps(json.loads(small_backend_json()) | {key: None})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"{", "not a tokenizer"),
        (b"\xff\xfe", "not a tokenizer"),
        (b"[]", "not a tokenizer"),
        (b'{"model": 5}', "not a tokenizer"),
        (_without("decoder").encode(), "decoder None, but GPT-J's tokenizer is ByteLevel"),
        (
            json.dumps(json.loads(small_backend_json()) | {"decoder": {"type": "Fuse"}}).encode(),
            "decoder 'Fuse', but GPT-J's tokenizer is ByteLevel",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_directory(tmp_path)
    assert str(error.value).startswith(f"{file}: {reason}")


@pytest.mark.parametrize("method", ["encode", "encode_with_offsets"])
def test_tokenizing_in_a_thread_holds_up_no_other(method: str) -> None:
    """With so long a switch interval a thread goes on only when another gives the interpreter away."""
    encode = getattr(small_tokenizer(), method)
    text = " ".join(f"{n:x}" for n in range(50_000))
    is_started, is_done = threading.Event(), threading.Event()

    def work() -> None:
        is_started.set()
        encode(text)
        is_done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        is_started.wait()
        assert not is_done.is_set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
