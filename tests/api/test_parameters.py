"""Each parameter reaches the engine as it is meant, under the names of either surface."""

from typing import Any

import httpx
import msgspec
import pytest
from fakes import SPECIAL_TOKEN, FakeEngine

from gptj_serve.types import (
    BeamParams,
    EarlyStopping,
    EngineRequest,
    Grammar,
    GrammarKind,
    SamplingParams,
    Warpers,
)

BEAM_SEARCH = {"use_beam_search": True, "n": 2, "best_of": 3}

BOTH: list[tuple[dict[str, Any], dict[str, Any]]] = [  # as a client says it, as the engine is told
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
    ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
    ({"exponential_decay_length_penalty": [4, 1.5]}, {"exponential_decay_length_penalty": (4, 1.5)}),
    ({"sequence_bias": [[[5], -1.5], [[5, 6], 2]]}, {"sequence_bias": [([5], -1.5), ([5, 6], 2.0)]}),
    ({"bad_words_ids": [[5], [6, 7]]}, {"bad_words_ids": [[5], [6, 7]]}),
    ({"allowed_token_ids": [5, 404]}, {"allowed_token_ids": [5, 404]}),
    ({"suppress_tokens": [5]}, {"suppress_tokens": [5]}),
    ({"begin_suppress_tokens": [5]}, {"begin_suppress_tokens": [5]}),
    ({"forced_bos_token_id": 0}, {"forced_bos_token_id": 0}),
    ({"forced_eos_token_id": 0}, {"forced_eos_token_id": [0]}),
    ({"forced_eos_token_id": [5, 6]}, {"forced_eos_token_id": [5, 6]}),
    ({"stop_token_ids": [5]}, {"stop_token_ids": [5]}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"max_time": 2}, {"max_time_s": 2.0}),
    ({"guidance_scale": 1.5}, {"guidance_scale": 1.5}),
    (
        {"guidance_scale": 2, "negative_prompt": [5, 6]},
        {"guidance_scale": 2.0, "negative_prompt_token_ids": [5, 6]},
    ),
    ({"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 3}),
    (
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 4},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 4},
    ),
    ({"max_matching_ngram_size": 2, "length_penalty": 1, "early_stopping": False}, {}),  # what holds anyway
]

GENERATE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_new_tokens": 7, "min_new_tokens": 2}, {"max_new_tokens": 7, "min_new_tokens": 2}),
    ({"temperature": 0.5, "seed": 5}, {"warpers": Warpers(temperature=0.5), "seed": 5}),
    ({"top_k": 0, "do_sample": True}, {"warpers": Warpers(temperature=1.0)}),
    (
        {
            "temperature": 2,
            "top_k": 3,
            "top_p": 0.9,
            "min_p": 0.1,
            "typical_p": 0.8,
            "epsilon_cutoff": 0.2,
            "eta_cutoff": 0.3,
        },
        {
            "warpers": Warpers(
                temperature=2.0, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.8, epsilon_cutoff=0.2, eta_cutoff=0.3
            )
        },
    ),
    ({"top_n_tokens": 3}, {"num_top_logprobs": 3}),
    ({"decoder_input_details": True}, {"prompt_logprobs": True}),
    ({"num_beams": 1, "num_return_sequences": 1, "best_of": 1}, {}),
    ({"num_beams": 3}, {"beams": BeamParams(num_beams=3)}),
    (
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": -1, "early_stopping": "never"},
        {
            "beams": BeamParams(
                num_beams=4, num_return_sequences=2, length_penalty=-1.0, early_stopping=EarlyStopping.NEVER
            )
        },
    ),
    (
        {"num_beams": 2, "early_stopping": True},
        {"beams": BeamParams(num_beams=2, early_stopping=EarlyStopping.FIRST)},
    ),
    ({"num_beams": 2, "early_stopping": False}, {"beams": BeamParams(num_beams=2)}),
    ({"grammar": {"type": "regex", "value": "a+"}}, {"grammar": Grammar(GrammarKind.REGEX, "a+")}),
]

COMPLETE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 7, "min_tokens": 2}, {"max_new_tokens": 7, "min_new_tokens": 2}),
    ({"temperature": 0, "seed": 5}, {"warpers": Warpers(), "seed": 5}),
    (
        {
            "temperature": 2,
            "top_k": 3,
            "top_p": 0.9,
            "min_p": 0.1,
            "typical_p": 0.8,
            "epsilon_cutoff": 0.2,
            "eta_cutoff": 0.3,
        },
        {
            "warpers": Warpers(
                temperature=2.0, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.8, epsilon_cutoff=0.2, eta_cutoff=0.3
            )
        },
    ),
    ({"top_k": -1}, {"warpers": Warpers(temperature=1.0)}),
    ({"logit_bias": {"5": -100, "6": 2.5}}, {"sequence_bias": [([5], -100.0), ([6], 2.5)]}),
    (
        {"logit_bias": {"5": 1}, "sequence_bias": [[[5, 6], 2]]},
        {"sequence_bias": [([5], 1.0), ([5, 6], 2.0)]},
    ),
    ({"logprobs": 0}, {}),
    ({"logprobs": 5}, {"num_top_logprobs": 5}),
    ({"logprobs": 0, "echo": True}, {"prompt_logprobs": True}),
    ({"logprobs": 2, "prompt_logprobs": 4}, {"num_top_logprobs": 4, "prompt_logprobs": True}),
    ({"prompt_logprobs": 0}, {"prompt_logprobs": True}),
    ({"echo": True}, {}),
    (BEAM_SEARCH, {"warpers": Warpers(), "beams": BeamParams(num_beams=3, num_return_sequences=2)}),
    (
        {"use_beam_search": True, "n": 2},
        {"warpers": Warpers(), "beams": BeamParams(num_beams=2, num_return_sequences=2)},
    ),
    ({"use_beam_search": True, "best_of": 2}, {"warpers": Warpers(), "beams": BeamParams(num_beams=2)}),
    (
        BEAM_SEARCH | {"length_penalty": 2, "early_stopping": True, "temperature": 0},
        {
            "warpers": Warpers(),
            "beams": BeamParams(
                num_beams=3, num_return_sequences=2, length_penalty=2.0, early_stopping=EarlyStopping.FIRST
            ),
        },
    ),
]


def _id(row: Any) -> str:
    return "+".join(row) if isinstance(row, dict) else ""


async def _asked(client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any) -> EngineRequest:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    request = engine.requests[0]
    encoded = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(encoded, type=EngineRequest) == request, "within the bounds of the wire"
    return request


@pytest.mark.parametrize(("said", "told"), [*BOTH, *GENERATE], ids=_id)
async def test_generate(client: httpx.AsyncClient, engine: FakeEngine, said: Any, told: Any) -> None:
    request = await _asked(client, engine, "/generate", {"inputs": "The fox", "parameters": {"seed": 1, **said}})
    assert request.sampling == SamplingParams(**{"max_new_tokens": 20, "seed": 1} | told)


@pytest.mark.parametrize(("said", "told"), [*BOTH, *COMPLETE], ids=_id)
async def test_complete(client: httpx.AsyncClient, engine: FakeEngine, said: Any, told: Any) -> None:
    request = await _asked(client, engine, "/v1/completions", {"model": "tiny", "prompt": "The fox", "seed": 1, **said})
    defaults = {"max_new_tokens": 16, "seed": 1, "warpers": Warpers(temperature=1.0)}
    assert request.sampling == SamplingParams(**defaults | told)


PATHS = [("/generate", "inputs"), ("/v1/completions", "prompt")]


def _body(path: str, text: Any, **parameters: Any) -> dict[str, Any]:
    if path == "/generate":
        return {"inputs": text, "parameters": parameters}
    return {"model": "tiny", "prompt": text, **parameters}


@pytest.mark.parametrize(("path", "_"), PATHS)
async def test_a_text_to_keep_away_from(client: httpx.AsyncClient, engine: FakeEngine, path: str, _: str) -> None:
    request = await _asked(client, engine, path, _body(path, "The fox", guidance_scale=2, negative_prompt="The dog"))
    assert request.sampling is not None
    assert request.sampling.negative_prompt_token_ids == engine.tokenizer.encode("The dog")


@pytest.mark.parametrize(("path", "_"), PATHS)
async def test_priority_and_salt_go_beside_the_sampling(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, _: str
) -> None:
    request = await _asked(client, engine, path, _body(path, "The fox", priority=-1000, cache_salt="pepper"))
    assert (request.priority, request.cache_salt) == (-1000, "pepper")
    engine.requests.clear()
    request = await _asked(client, engine, path, _body(path, "The fox"))
    assert (request.priority, request.cache_salt) == (0, "")


@pytest.mark.parametrize(("path", "_"), PATHS)
async def test_an_unseeded_request_gets_a_seed(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, _: str
) -> None:
    for _try in range(2):
        assert (await client.post(path, json=_body(path, "The fox"))).status_code == 200
    first, second = [request.sampling.seed for request in engine.requests if request.sampling]
    assert first != second


# ── bad words ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("path", "_"), PATHS)
async def test_bad_words_are_forbidden_at_the_beginning_and_after_a_blank(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, _: str
) -> None:
    encode = engine.tokenizer.encode
    words = ["dog", "  fox", "Ljubljana", "ж"]
    request = await _asked(client, engine, path, _body(path, "The fox", bad_words=words, bad_words_ids=[[5]]))
    assert request.sampling is not None
    forms = request.sampling.bad_words_ids
    assert forms[-1] == [5]
    for word in ("dog", "fox", "Ljubljana", "ж"):
        assert encode(word) in forms
        spaced = encode(f" {word}")
        assert spaced in forms or spaced == [*encode(" "), *encode(word)], "which the first form forbids"
    decoded = [engine.tokenizer.decode(form) for form in forms[:-1]]
    assert {text.strip() for text in decoded} == {"dog", "fox", "Ljubljana", "ж"}


async def test_a_word_of_another_length_after_a_blank_is_forbidden_too(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    encode = engine.tokenizer.encode
    word = next(
        w for w in ("jumps", "quick", "brown", "capital", "lazy", "fox") if len(encode(w)) != len(encode(f" {w}"))
    )
    request = await _asked(client, engine, "/generate", _body("/generate", "The fox", bad_words=[word]))
    assert request.sampling is not None
    assert request.sampling.bad_words_ids == [encode(word), encode(f" {word}")]


# ── which of the prompt's tokens ─────────────────────────────────────────────────────────────────────────

LONG = "The quick brown fox. " * 20


@pytest.mark.parametrize(("path", "field"), [("/generate", "truncate"), ("/v1/completions", "truncate_prompt_tokens")])
async def test_the_last_tokens_are_kept(client: httpx.AsyncClient, engine: FakeEngine, path: str, field: str) -> None:
    token_ids = engine.tokenizer.encode(LONG)
    assert len(token_ids) > 100
    for num_kept in (1, 40):
        engine.requests.clear()
        request = await _asked(client, engine, path, _body(path, LONG, **{field: num_kept}))
        assert request.prompt_token_ids == token_ids[-num_kept:]
    engine.requests.clear()
    request = await _asked(client, engine, path, _body(path, "The fox", **{field: 1000}))
    assert request.prompt_token_ids == engine.tokenizer.encode("The fox")
    refused = await client.post(path, json=_body(path, LONG, **{field: 60}))
    assert "exceed the model's context of 64" in refused.text


async def test_as_many_of_the_last_tokens_as_fit(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    prompts = [LONG, "The fox"]
    body = {"model": "tiny", "prompt": prompts, "truncate_prompt_tokens": -1, "max_tokens": 10, "echo": True}
    response = await client.post("/v1/completions", json=body)
    kept = [engine.tokenizer.encode(LONG)[-54:], engine.tokenizer.encode("The fox")]
    assert [request.prompt_token_ids for request in engine.requests] == kept
    assert response.json()["usage"]["prompt_tokens"] == 54 + len(kept[1])
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert [text.startswith(engine.tokenizer.decode(ids)) for text, ids in zip(texts, kept, strict=True)] == [
        True,
        True,
    ]


async def test_special_tokens_in_a_text_are_themselves(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"model": "tiny", "prompt": f"a{SPECIAL_TOKEN}b", "max_tokens": 0, "echo": True}
    response = await client.post("/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] == f"a{SPECIAL_TOKEN}b"
