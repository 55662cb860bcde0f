"""What arrives on a wire is decoded or refused, whatever it is: no other exception, no endless work."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_serve.errors import WireError
from gptj_serve.pipeline.handoff import HiddenHeader
from gptj_serve.steps import LogitEdits, MicroBatch, Row, RowOutput, RowResult, SampledToken, SampleSpec, StepOutput
from gptj_serve.types import (
    Beam,
    BeamEvent,
    BeamParams,
    EngineRequest,
    Event,
    FailureEvent,
    FinishReason,
    Grammar,
    GrammarKind,
    HeadEvent,
    LoadEvent,
    Matrix,
    ModelVersion,
    OtherVersion,
    Overload,
    PromptEvent,
    Refusal,
    SamplingParams,
    Task,
    TokenEvent,
    Warpers,
)
from gptj_serve.wire import WireDecoder

SAMPLE = SampleSpec(
    Warpers(0.8, 5, 0.9),
    7,
    LogitEdits([(3, 0.5)], 1.2, [1, 2], 0.1, 0.2, [(4, 2)], [5], b"\x0f", [6], [7], 0.5),
    3,
)
SAMPLING = SamplingParams(
    max_new_tokens=9,
    warpers=Warpers(0.5),
    sequence_bias=[([1, 2], 1.5)],
    bad_words_ids=[[3]],
    grammar=Grammar(GrammarKind.REGEX, "a+"),
    exponential_decay_length_penalty=(2, 1.1),
    beams=BeamParams(num_beams=3),
)
REFUSED = Refusal | Overload | OtherVersion  # in place of a request's first event
EXAMPLES: list[tuple[Any, Any]] = [
    (
        MicroBatch,
        MicroBatch(
            3,
            [
                Row([1, 2, 3], 0, [0, 1], samples=[SAMPLE]),
                Row([4], 5, [2], RowOutput.QA, head="reader", target_token_ids=[1], num_top_targets=2),
            ],
            [(0, 1)],
        ),
    ),
    (
        StepOutput,
        StepOutput(
            3,
            [
                RowResult([SampledToken(5, -0.5, [(5, -0.5), (6, -1.0)])], values=Matrix.of([[1.0, 2.0]])),
                None,
                RowResult(candidates=[(1, -0.1)], targets=Matrix.of([[0.5]]), failure="NaN", is_kv_suspect=True),
            ],
        ),
    ),
    (
        EngineRequest,
        EngineRequest(
            request_id="a", task=Task.GENERATE, prompt_token_ids=[1, 2], output_token_ids=[3], sampling=SAMPLING
        ),
    ),
    (
        list[Event | LoadEvent],
        [
            LoadEvent(True, 2.5, ModelVersion("text", "numbers")),
            LoadEvent(False),
            LoadEvent(True, 2.5, None, 1, 3, ("a", "b")),
            TokenEvent("a", 0, 5, -0.5, FinishReason.EOS, [(5, -0.5)]),
            PromptEvent("a", Matrix.of([[0.5]])),
            HeadEvent("b", Matrix.of([[0.5], [1.5]])),
            BeamEvent("c", [Beam([1, 2], -0.3, FinishReason.LENGTH)]),
            FailureEvent("d", "broken", True),
        ],
    ),
    (REFUSED, Refusal("max_tokens", [1, {"a": None}], "too many")),
    (REFUSED, Overload("too full", 2.5, "replica", 62.5)),
    (REFUSED, OtherVersion("replica", ModelVersion("text", "numbers"))),
    (HiddenHeader, HiddenHeader(3, "float32", [2, 64], 0.5)),
]
EXAMPLE_NAMES = [type(message).__name__ if type_ is REFUSED else str(type_) for type_, message in EXAMPLES]
TYPES = list(dict.fromkeys(type_ for type_, _ in EXAMPLES))


def decode(type_: Any, data: bytes) -> Any:
    """The message, which then can be written again, or None if it is refused."""
    try:
        message = WireDecoder[Any](type_).decode(data)
    except WireError:
        return None
    msgspec.msgpack.encode(message)
    return message


@pytest.mark.parametrize(("type_", "message"), EXAMPLES, ids=EXAMPLE_NAMES)
def test_there_and_back(type_: Any, message: Any) -> None:
    assert decode(type_, msgspec.msgpack.encode(message)) == message


@pytest.mark.parametrize("type_", TYPES, ids=str)
@given(data=st.binary(max_size=200))
def test_anything(type_: Any, data: bytes) -> None:
    decode(type_, data)


@pytest.mark.parametrize(("type_", "message"), EXAMPLES, ids=EXAMPLE_NAMES)
@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), num_changes=st.integers(1, 6))
def test_damaged_messages(type_: Any, message: Any, seed: int, num_changes: int) -> None:
    """Bytes changed, left out, put in and repeated."""
    rng = random.Random(seed)
    data = bytearray(msgspec.msgpack.encode(message))
    for _ in range(num_changes):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data[at:at] = data[rng.randrange(len(data) + 1) :]
    decode(type_, bytes(data[:100_000]))


@pytest.mark.parametrize("type_", TYPES, ids=str)
@pytest.mark.parametrize(
    "data", [b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_nothing_is_as_deep_or_as_long_as_it_says(type_: Any, data: bytes) -> None:
    assert decode(type_, data) is None
