"""Generation parameters that are refused: values out of bounds, of another type, and those that don't go together.

Each refusal is a 4xx that names the field and its value as the client wrote them, and nothing reaches the engine.
"""

import json
from typing import Any

import httpx
import pytest
from fakes import FakeEngine
from pydantic import ValidationError

from gptj_serve.api.openai_schemas import CompletionRequest

LONG = "The quick brown fox. " * 20

BOTH: list[tuple[dict[str, Any], str, Any]] = [  # parameters, field, value
    # bounds
    ({"min_p": 1.5}, "min_p", 1.5),
    ({"typical_p": 0}, "typical_p", 0),
    ({"typical_p": 1.1}, "typical_p", 1.1),
    ({"epsilon_cutoff": 1}, "epsilon_cutoff", 1),
    ({"eta_cutoff": -0.1}, "eta_cutoff", -0.1),
    ({"repetition_penalty": 0}, "repetition_penalty", 0),
    ({"repetition_penalty": float("inf")}, "repetition_penalty", float("inf")),
    ({"presence_penalty": 2.1}, "presence_penalty", 2.1),
    ({"frequency_penalty": -2.1}, "frequency_penalty", -2.1),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size", -1),
    ({"exponential_decay_length_penalty": [-1, 1.5]}, "exponential_decay_length_penalty.0", -1),
    ({"exponential_decay_length_penalty": [1, 0]}, "exponential_decay_length_penalty.1", 0),
    ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty.1", None),
    ({"exponential_decay_length_penalty": [1, 2, 3]}, "exponential_decay_length_penalty", [1, 2, 3]),
    ({"sequence_bias": [[[], 1]]}, "sequence_bias.0.0", []),
    ({"sequence_bias": [[[1], float("nan")]]}, "sequence_bias.0.1", float("nan")),
    ({"sequence_bias": [[[1], 1], [[1], 2]]}, "sequence_bias", [1]),
    ({"guidance_scale": float("nan")}, "guidance_scale", float("nan")),
    ({"guidance_scale": 1e30}, "guidance_scale", 1e30),
    ({"guidance_scale": -100.5}, "guidance_scale", -100.5),
    ({"negative_prompt": "The dog"}, "negative_prompt", "The dog"),
    ({"negative_prompt": "", "guidance_scale": 2}, "negative_prompt", ""),
    ({"negative_prompt": [], "guidance_scale": 2}, "negative_prompt", []),
    ({"negative_prompt": LONG, "guidance_scale": 2}, "negative_prompt", LONG),
    ({"negative_prompt": [1] * 60, "guidance_scale": 2}, "negative_prompt", [1] * 60),
    ({"bad_words": [""]}, "bad_words.0", ""),
    ({"bad_words": ["a", "  "]}, "bad_words", "  "),
    ({"bad_words": ["a" * 257]}, "bad_words.0", "a" * 257),
    ({"bad_words_ids": [[]]}, "bad_words_ids.0", []),
    ({"allowed_token_ids": []}, "allowed_token_ids", []),
    ({"suppress_tokens": [-1]}, "suppress_tokens.0", -1),
    ({"forced_bos_token_id": -1}, "forced_bos_token_id", -1),
    ({"forced_eos_token_id": []}, "forced_eos_token_id", []),
    ({"max_time": 0}, "max_time", 0),
    ({"prompt_lookup_num_tokens": 65}, "prompt_lookup_num_tokens", 65),
    ({"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 0}, "max_matching_ngram_size", 0),
    ({"priority": 1001}, "priority", 1001),
    ({"priority": -1001}, "priority", -1001),
    ({"cache_salt": ""}, "cache_salt", ""),
    ({"cache_salt": "a" * 1025}, "cache_salt", "a" * 1025),
    # outside the vocabulary
    ({"sequence_bias": [[[1, 405], 1]]}, "sequence_bias", 405),
    ({"negative_prompt": [405], "guidance_scale": 2}, "negative_prompt", 405),
    ({"bad_words_ids": [[1], [2, 405]]}, "bad_words_ids", 405),
    ({"allowed_token_ids": [405]}, "allowed_token_ids", 405),
    ({"suppress_tokens": [405]}, "suppress_tokens", 405),
    ({"begin_suppress_tokens": [405]}, "begin_suppress_tokens", 405),
    ({"forced_bos_token_id": 405}, "forced_bos_token_id", 405),
    ({"forced_eos_token_id": [1, 405]}, "forced_eos_token_id", 405),
    ({"stop_token_ids": [405]}, "stop_token_ids", 405),
    # of another type
    ({"min_p": "0.5"}, "min_p", "0.5"),
    ({"repetition_penalty": True}, "repetition_penalty", True),
    ({"no_repeat_ngram_size": 2.0}, "no_repeat_ngram_size", 2.0),
    ({"no_repeat_ngram_size": "2"}, "no_repeat_ngram_size", "2"),
    ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size", True),
    ({"exponential_decay_length_penalty": {"start": 1}}, "exponential_decay_length_penalty", {"start": 1}),
    ({"exponential_decay_length_penalty": ["1", 1.5]}, "exponential_decay_length_penalty.0", "1"),
    ({"sequence_bias": {"1": 2}}, "sequence_bias", {"1": 2}),
    ({"negative_prompt": 5, "guidance_scale": 2}, "negative_prompt", 5),
    ({"bad_words": "a"}, "bad_words", "a"),
    ({"allowed_token_ids": ["1"]}, "allowed_token_ids.0", "1"),
    ({"forced_eos_token_id": "1"}, "forced_eos_token_id", "1"),
    ({"ignore_eos": "yes"}, "ignore_eos", "yes"),
    ({"ignore_eos": 1}, "ignore_eos", 1),
    ({"early_stopping": "maybe"}, "early_stopping", "maybe"),
    ({"early_stopping": 1}, "early_stopping", 1),
    ({"seed": "1"}, "seed", "1"),
    ({"top_k": 5.0}, "top_k", 5.0),
    ({"top_p": "0.9"}, "top_p", "0.9"),
    ({"stop": [5]}, "stop.0", 5),
    # without what they go with
    ({"length_penalty": 2}, "length_penalty", 2.0),
    ({"early_stopping": True}, "early_stopping", True),
    ({"early_stopping": "never"}, "early_stopping", "never"),
    ({"max_matching_ngram_size": 3}, "max_matching_ngram_size", 3),
    ({"negative_prompt": [1]}, "negative_prompt", [1]),
    ({"negative_prompt": [1], "guidance_scale": 1}, "negative_prompt", [1]),
    # against each other
    ({"prompt_lookup_num_tokens": 3, "guidance_scale": 2}, "prompt_lookup_num_tokens", 3),
    ({"suppress_tokens": [1, 2], "allowed_token_ids": [1]}, "allowed_token_ids", [1]),
    ({"watermark": True}, "watermark", True),
]

REGEX = {"grammar": {"type": "regex", "value": "a"}}
BEAMS = {"num_beams": 3}
GENERATE: list[tuple[dict[str, Any], str, Any]] = [
    ({"max_new_tokens": "20"}, "max_new_tokens", "20"),
    ({"max_new_tokens": 20.0}, "max_new_tokens", 20.0),
    ({"do_sample": "yes"}, "do_sample", "yes"),
    ({"details": 1}, "details", 1),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens", 9),
    ({"truncate": 0}, "truncate", 0),
    ({"top_n_tokens": 21}, "top_n_tokens", 21),
    ({"best_of": 65, "do_sample": True}, "best_of", 65),
    ({"best_of": 0}, "best_of", 0),
    ({"best_of": 2}, "best_of", 2),
    ({"best_of": 2, "temperature": 0}, "best_of", 2),
    ({"best_of": 2, "do_sample": True, "num_return_sequences": 2}, "best_of", 2),
    ({"best_of": 2, **BEAMS}, "best_of", 2),
    ({"num_return_sequences": 2}, "num_return_sequences", 2),
    ({"num_beams": 65}, "num_beams", 65),
    ({"num_beams": 0}, "num_beams", 0),
    ({"num_beams": "2"}, "num_beams", "2"),
    ({"num_return_sequences": 4, **BEAMS}, "num_return_sequences", 4),
    ({"temperature": 0.5, **BEAMS}, "temperature", 0.5),
    ({"do_sample": True, **BEAMS}, "do_sample", True),
    ({"do_sample": True, "top_k": 5, **BEAMS}, "do_sample", True),
    ({"min_p": 0, **BEAMS}, "min_p", 0.0),
    ({"temperature": 0.5, "do_sample": True, **BEAMS}, "temperature", 0.5),
    ({"stop": ["a"], **BEAMS}, "stop", ["a"]),
    ({"guidance_scale": 2, **BEAMS}, "guidance_scale", 2.0),
    ({"prompt_lookup_num_tokens": 3, **BEAMS}, "prompt_lookup_num_tokens", 3),
    ({"top_n_tokens": 3, **BEAMS}, "top_n_tokens", 3),
    ({"decoder_input_details": True, **BEAMS}, "decoder_input_details", True),
    ({"prompt_lookup_num_tokens": 3, **REGEX}, "prompt_lookup_num_tokens", 3),
    ({"logprobs": 1}, "logprobs", 1),
    ({"top_k": -1}, "top_k", -1),
]
GENERATE_STREAM: list[tuple[dict[str, Any], str, Any]] = [
    ({"best_of": 2, "do_sample": True}, "best_of", 2),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences", 2),
    ({"num_return_sequences": 2, **BEAMS}, "num_return_sequences", 2),
    ({"decoder_input_details": True}, "decoder_input_details", True),
]

SEARCH = {"use_beam_search": True, "n": 2}
COMPLETE: list[tuple[dict[str, Any], str, Any]] = [
    ({"max_tokens": "20"}, "max_tokens", "20"),
    ({"max_tokens": True}, "max_tokens", True),
    ({"max_tokens": 0}, "max_tokens", 0),
    ({"max_tokens": 0, "echo": True, **SEARCH}, "max_tokens", 0),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", 1),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", 9),
    ({"n": 1.0}, "n", 1.0),
    ({"best_of": 65}, "best_of", 65),
    ({"best_of": 0}, "best_of", 0),
    ({"best_of": 1, "n": 2}, "best_of", 1),
    ({"best_of": 5}, "prompt", 5),
    ({"logprobs": 21}, "logprobs", 21),
    ({"logprobs": -1}, "logprobs", -1),
    ({"logprobs": True}, "logprobs", True),
    ({"prompt_logprobs": 21}, "prompt_logprobs", 21),
    ({"prompt_logprobs": -1}, "prompt_logprobs", -1),
    ({"echo": "yes"}, "echo", "yes"),
    ({"echo": 1}, "echo", 1),
    ({"logit_bias": {"5": 101}}, "logit_bias", 101),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "1"),
    ({"logit_bias": {"-5": 1}}, "logit_bias", "-5"),
    ({"logit_bias": {"fox": 1}}, "logit_bias.fox", "fox"),
    ({"logit_bias": {"405": 1}}, "logit_bias", 405),
    ({"logit_bias": [5, 1]}, "logit_bias", [5, 1]),
    ({"logit_bias": {"5": 1}, "sequence_bias": [[[5], 2]]}, "sequence_bias", [5]),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", 0),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", -2),
    ({"suffix": "end"}, "suffix", "end"),
    ({"use_beam_search": 1}, "use_beam_search", 1),
    ({"use_beam_search": True}, "use_beam_search", True),
    ({"temperature": 0.5, **SEARCH}, "temperature", 0.5),
    ({"stop": "a", **SEARCH}, "stop", ["a"]),
    ({"guidance_scale": 2, **SEARCH}, "guidance_scale", 2.0),
    ({"prompt_lookup_num_tokens": 3, **SEARCH}, "prompt_lookup_num_tokens", 3),
    ({"logprobs": 0, **SEARCH}, "logprobs", 0),
    ({"prompt_logprobs": 0, **SEARCH}, "prompt_logprobs", 0),
    ({"best_of": 1, **SEARCH}, "best_of", 1),
    ({"prompt_lookup_num_tokens": 3, "guided_regex": "a"}, "prompt_lookup_num_tokens", 3),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids", [1] * 257),
    ({"num_beams": 2}, "num_beams", 2),
]
COMPLETE_STREAM: list[tuple[dict[str, Any], str, Any]] = [
    ({"best_of": 2}, "best_of", 2),
    ({"best_of": 3, "n": 2}, "best_of", 3),
    ({"prompt_logprobs": 1}, "prompt_logprobs", 1),
    (SEARCH, "stream", True),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", 1),
]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _id(value: Any) -> str:
    return json.dumps(value)[:40] if isinstance(value, dict) else ""


async def _post(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    """As `json=`, but with NaN, which Python's JSON knows and httpx refuses."""
    return await client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})


async def _check_generate(client: httpx.AsyncClient, path: str, said: Any, field: str, value: Any) -> None:
    response = await _post(client, path, {"inputs": "The fox", "parameters": said})
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"{field}={_shortened(value)}: "), response.text


async def _check_complete(client: httpx.AsyncClient, said: Any, field: str, value: Any) -> None:
    response = await _post(client, "/v1/completions", {"model": "tiny", "prompt": "The fox", **said})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field}={_shortened(value)}: "), response.text


@pytest.mark.parametrize(("said", "field", "value"), [*BOTH, *GENERATE], ids=_id)
async def test_generate(client: httpx.AsyncClient, engine: FakeEngine, said: Any, field: str, value: Any) -> None:
    await _check_generate(client, "/generate", said, f"parameters.{field}", value)
    assert engine.requests == []


@pytest.mark.parametrize(("said", "field", "value"), GENERATE_STREAM, ids=_id)
async def test_what_is_not_streamed(
    client: httpx.AsyncClient, engine: FakeEngine, said: Any, field: str, value: Any
) -> None:
    await _check_generate(client, "/generate_stream", said, f"parameters.{field}", value)
    body = {"inputs": "The fox", "parameters": said, "stream": True}
    assert (await _post(client, "/generate", body)).status_code == 422
    assert engine.requests == []


@pytest.mark.parametrize("field", ["bad_words", "bad_words_ids", "sequence_bias", "logit_bias", "stop_token_ids"])
def test_lists_have_an_end(field: str) -> None:
    entry: dict[str, Any] = {"bad_words": "a", "bad_words_ids": [1], "sequence_bias": [[1], 1], "stop_token_ids": 1}
    value = {str(i): 1 for i in range(1025)} if field == "logit_bias" else [entry[field]] * 1025
    with pytest.raises(ValidationError, match=rf"(?s){field}.*at most"):
        CompletionRequest.model_validate({"model": "tiny", "prompt": "a", field: value})


async def test_beams_are_not_streamed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await _check_generate(client, "/generate_stream", BEAMS, "stream", True)
    assert engine.requests == []


@pytest.mark.parametrize(("said", "field", "value"), [*BOTH, *COMPLETE], ids=_id)
async def test_complete(client: httpx.AsyncClient, engine: FakeEngine, said: Any, field: str, value: Any) -> None:
    await _check_complete(client, said, field, value)
    assert engine.requests == []


@pytest.mark.parametrize(("said", "field", "value"), COMPLETE_STREAM, ids=_id)
async def test_what_is_not_streamed_of_completions(
    client: httpx.AsyncClient, engine: FakeEngine, said: Any, field: str, value: Any
) -> None:
    await _check_complete(client, {"stream": True, **said}, field, value)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/classify", {"inputs": "a", "parameters": {"top_k": "1"}}, "parameters.top_k"),
        (
            "/classify",
            {"inputs": "a", "parameters": {"candidate_labels": "a", "multi_label": 1}},
            "parameters.multi_label",
        ),
        (
            "/qa",
            {"inputs": {"question": "a", "context": "b"}, "parameters": {"align_to_words": "no"}},
            "parameters.align_to_words",
        ),
        ("/generate", {"inputs": "a", "stream": 1}, "stream"),
        ("/generate", {"inputs": "a", "stream": "true"}, "stream"),
    ],
)
async def test_the_other_bodies_are_as_strict(client: httpx.AsyncClient, path: str, body: Any, field: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"{field}=")
