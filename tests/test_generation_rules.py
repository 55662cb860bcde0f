"""Parameters of a generation that don't go together, each refused under the name of one of them."""

from typing import Any

import pytest

from gptj_serve.errors import InvalidRequestError
from gptj_serve.generation_rules import check_combination, check_vocabulary
from gptj_serve.types import BeamParams, EarlyStopping, Grammar, GrammarKind, SamplingParams, Warpers

BEAMS = BeamParams(num_beams=4, num_return_sequences=2)
GRAMMAR = Grammar(GrammarKind.REGEX, "a+")


def _sampling(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8} | values)


@pytest.mark.parametrize(
    "sampling",
    [
        _sampling(),
        _sampling(min_new_tokens=8),
        _sampling(warpers=Warpers(temperature=1.0, top_k=5), grammar=GRAMMAR, guidance_scale=2.0),
        _sampling(guidance_scale=0.5, negative_prompt_token_ids=[1]),
        _sampling(prompt_lookup_num_tokens=4, max_matching_ngram_size=5, warpers=Warpers(temperature=1.0)),
        _sampling(prompt_lookup_num_tokens=4, prompt_logprobs=True, num_top_logprobs=3),
        _sampling(beams=BEAMS),
        _sampling(beams=BeamParams(num_beams=64, num_return_sequences=64, early_stopping=EarlyStopping.NEVER)),
        _sampling(beams=BEAMS, warpers=Warpers(top_k=5), grammar=GRAMMAR, repetition_penalty=2.0, stop_token_ids=[1]),
        _sampling(suppress_tokens=[1, 2], allowed_token_ids=[2, 3], forced_eos_token_id=[2, 3], forced_bos_token_id=3),
        _sampling(sequence_bias=[([1], 1.0), ([1, 2], 1.0), ([2], 1.0)]),
    ],
)
def test_what_goes_together(sampling: SamplingParams) -> None:
    check_combination(sampling)
    check_vocabulary(sampling, 10)


def test_streams_and_stop_strings_go_with_anything_but_beams() -> None:
    check_combination(_sampling(), stop_strings=["a"], is_streamed=True)


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"min_new_tokens": 9}, "min_new_tokens", 9),
        ({"beams": BeamParams(num_beams=1)}, "num_beams", 1),
        ({"beams": BeamParams(num_beams=65)}, "num_beams", 65),
        ({"beams": BeamParams(num_beams=2, num_return_sequences=3)}, "num_return_sequences", 3),
        ({"beams": BeamParams(num_beams=2, num_return_sequences=0)}, "num_return_sequences", 0),
        ({"beams": BEAMS, "warpers": Warpers(temperature=0.5)}, "temperature", 0.5),
        ({"beams": BEAMS, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens", 3),
        ({"beams": BEAMS, "guidance_scale": 1.5}, "guidance_scale", 1.5),
        ({"beams": BEAMS, "num_top_logprobs": 1}, "num_top_logprobs", 1),
        ({"beams": BEAMS, "prompt_logprobs": True}, "prompt_logprobs", True),
        ({"prompt_lookup_num_tokens": 3, "guidance_scale": 1.5}, "prompt_lookup_num_tokens", 3),
        ({"prompt_lookup_num_tokens": 3, "grammar": GRAMMAR}, "prompt_lookup_num_tokens", 3),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size", 3),
        ({"negative_prompt_token_ids": [1]}, "negative_prompt_token_ids", [1]),
        ({"sequence_bias": [([1, 2], 1.0), ([1], 1.0), ([1, 2], -1.0)]}, "sequence_bias", [1, 2]),
        ({"suppress_tokens": [1, 2], "allowed_token_ids": [2]}, "allowed_token_ids", [2]),
        ({"suppress_tokens": [1, 2], "forced_eos_token_id": [1, 2]}, "forced_eos_token_id", [1, 2]),
        ({"suppress_tokens": [1, 2], "forced_bos_token_id": 1}, "forced_bos_token_id", [1]),
    ],
)
def test_what_does_not(values: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_combination(_sampling(**values))
    assert (refused.value.field, refused.value.value) == (field, value)


@pytest.mark.parametrize(
    ("values", "field"), [({"stop_strings": ["a"]}, "stop_strings"), ({"is_streamed": True}, "stream")]
)
def test_beams_have_neither_text_nor_a_stream(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_combination(_sampling(beams=BEAMS), **values)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("stop_token_ids", [9], [10]),
        ("suppress_tokens", [9], [1, 10]),
        ("begin_suppress_tokens", [9], [10]),
        ("forced_eos_token_id", [9], [10]),
        ("forced_bos_token_id", 9, 10),
        ("negative_prompt_token_ids", [9], [10]),
        ("allowed_token_ids", [9], [10]),
        ("bad_words_ids", [[9]], [[1], [2, 10]]),
        ("sequence_bias", [([9], 1.0)], [([1], 1.0), ([2, 10], 1.0)]),
    ],
)
def test_token_ids_are_those_of_the_model(field: str, inside: Any, outside: Any) -> None:
    check_vocabulary(_sampling(**{field: inside}), 10)
    with pytest.raises(InvalidRequestError, match="token ids are below 10") as refused:
        check_vocabulary(_sampling(**{field: outside}), 10)
    assert (refused.value.field, refused.value.value) == (field, 10)


def test_no_field_with_token_ids_is_forgotten() -> None:
    """`TokenId` in a type means that an id outside the vocabulary is found."""
    with_ids = {name for name in SamplingParams.__struct_fields__ if "token" in name or name.endswith("_ids")}
    counts = {"max_new_tokens", "min_new_tokens", "prompt_lookup_num_tokens"}
    assert with_ids - counts | {"sequence_bias"} == {
        "stop_token_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_eos_token_id",
        "forced_bos_token_id",
        "negative_prompt_token_ids",
        "allowed_token_ids",
        "bad_words_ids",
        "sequence_bias",
    }
