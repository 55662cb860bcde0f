"""`/v1/embeddings` in OpenAI's shape and `/embed` in Text Embeddings Inference's: the same vectors."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeEngine
from numpy.typing import NDArray

from gptj_serve.types import Pooling, Task

LONG = "The quick brown fox. " * 20


async def _openai(client: httpx.AsyncClient, given: Any, **changes: Any) -> dict[str, Any]:
    response = await client.post("/v1/embeddings", json={"model": "tiny", "input": given, **changes})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def _embed(client: httpx.AsyncClient, given: Any, **changes: Any) -> NDArray[np.float32]:
    response = await client.post("/embed", json={"inputs": given, **changes})
    assert response.status_code == 200, response.text
    return np.array(response.json(), dtype=np.float32)


def _states(engine: FakeEngine) -> NDArray[np.float32]:
    """What the engine answered to all that it was asked."""
    assert all(request.task is Task.EMBED for request in engine.requests)
    return np.array([engine.head_logits(request)[0] for request in engine.requests], dtype=np.float32)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("The fox", ["The fox"]),
        (["The fox", "né"], ["The fox", "né"]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
    ids=["string", "strings", "tokens", "token lists"],
)
async def test_the_four_shapes_of_an_input(
    client: httpx.AsyncClient, engine: FakeEngine, given: Any, texts: list[Any]
) -> None:
    body = await _openai(client, given)
    prompts = [engine.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    assert [request.prompt_token_ids for request in engine.requests] == prompts
    states = _states(engine)
    expected = states / np.linalg.norm(states, axis=1, keepdims=True)
    vectors = np.array([item.pop("embedding") for item in body["data"]])
    np.testing.assert_allclose(vectors, expected, rtol=1e-5)
    num_tokens = sum(map(len, prompts))
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": index} for index in range(len(texts))],
        "model": "tiny",
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    np.testing.assert_array_equal(await _embed(client, given), vectors.astype(np.float32))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_pooling_and_normalization(
    client: httpx.AsyncClient, engine: FakeEngine, pooling: str, normalize: bool
) -> None:
    body = await _openai(client, "The fox", pooling=pooling, normalize=normalize)
    (request,) = engine.requests
    assert request.pooling is Pooling(pooling)
    vector = np.array(body["data"][0]["embedding"])
    state = _states(engine)[0]
    np.testing.assert_allclose(vector, state / np.linalg.norm(state) if normalize else state, rtol=1e-5)
    other = await _embed(client, "The fox", pooling=pooling, normalize=normalize)
    np.testing.assert_array_equal(other[0], vector.astype(np.float32))


async def test_the_default_is_the_normalized_mean(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    default = await _openai(client, "The fox")
    assert default == await _openai(client, "The fox", pooling="mean", normalize=True)
    assert default["data"] != (await _openai(client, "The fox", pooling="last"))["data"]


async def test_a_vector_of_nothing_stays_one(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.head_logits = lambda request: [[0.0] * 32]
    assert (await _embed(client, "The fox")).tolist() == [[0.0] * 32]


async def test_base64(client: httpx.AsyncClient) -> None:
    numbers = (await _openai(client, "The fox", encoding_format="float", dimensions=32, user="me"))["data"]
    encoded = (await _openai(client, "The fox", encoding_format="base64"))["data"]
    decoded = np.frombuffer(base64.b64decode(encoded[0]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(decoded, np.array(numbers[0]["embedding"], dtype=np.float32))


@pytest.mark.parametrize(("kept", "expected"), [(3, [8, 9, 10]), (99, list(range(1, 11))), (-1, list(range(1, 11)))])
async def test_truncation_in_openais_shape(
    client: httpx.AsyncClient, engine: FakeEngine, kept: int, expected: list[int]
) -> None:
    await _openai(client, list(range(1, 11)), truncate_prompt_tokens=kept)
    assert engine.requests[0].prompt_token_ids == expected


async def test_as_many_as_fit(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await _openai(client, LONG, truncate_prompt_tokens=-1)
    await _embed(client, LONG, truncate=True, truncation_direction="left")
    await _embed(client, LONG, truncate=True, truncation_direction="Left")
    await _embed(client, LONG, truncate=True)
    await _embed(client, LONG, truncate=True, truncation_direction="right")
    token_ids = engine.tokenizer.encode(LONG)
    expected = [token_ids[-64:]] * 3 + [token_ids[:64]] * 2
    assert [request.prompt_token_ids for request in engine.requests] == expected


REFUSED: list[tuple[dict[str, Any], str]] = [  # changes to both bodies, field
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input.1"),
    ({"input": [[]]}, "input.0"),
    ({"input": [1, 405]}, "input"),
    ({"input": ["a"] * 5}, "input"),
    ({"input": LONG}, "input"),
    ({"input": [1] * 65}, "input"),
    ({"input": "a", "dimensions": 16}, "dimensions"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "pooling": "cls"}, "pooling"),
    ({"input": "a", "normalize": "yes"}, "normalize"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "unknown": 1}, "unknown"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[str(changes)[:40] for changes, _ in REFUSED])
async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine, changes: dict[str, Any], field: str) -> None:
    response = await client.post("/v1/embeddings", json={"model": "tiny", **changes})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    given = changes.pop("input") if "input" in changes else "a"
    response = await client.post("/embed", json={"inputs": given, **changes})
    assert response.status_code == 422
    assert response.json()["error"].startswith(field.replace("input", "inputs") + "=")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"prompt_name": "query"}, "prompt_name"), ({"encoding_format": "base64"}, "encoding_format")],
)
async def test_what_only_embed_refuses(client: httpx.AsyncClient, changes: dict[str, Any], field: str) -> None:
    response = await client.post("/embed", json={"inputs": "a", **changes})
    assert response.status_code == 422
    assert response.json()["error"] == f"{field}={changes[field]!r}: is not supported"


async def test_a_failure(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_at = lambda request, index: "a stage was lost"
    response = await client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b"]})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    response = await client.post("/embed", json={"inputs": "a"})
    assert response.json() == {"error": "a stage was lost", "error_type": "generation"}
