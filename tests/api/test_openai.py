"""The routes in OpenAI's shape, called as curl would; `test_clients` has the real library."""

from typing import Any

import httpx
import pytest
from calls import events
from fakes import FakeEngine

from gptj_serve.types import SamplingParams, Warpers


async def _complete(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps — né"
    body = await _complete(client, prompt="The fox", max_tokens=40)
    num_tokens = len(engine.tokenizer.encode(" jumps — né")) + 1  # and the end token
    num_prompt_tokens = len(engine.tokenizer.encode("The fox"))
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": " jumps — né", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
        },
    }


async def test_defaults_are_those_of_openai(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await _complete(client, prompt="The fox")
    await _complete(
        client, prompt="The fox", max_tokens=None, temperature=None, top_p=None, n=None, stop=None, seed=None
    )
    for request in engine.requests:
        warpers = Warpers(temperature=1.0)
        assert request.sampling == SamplingParams(max_new_tokens=16, warpers=warpers, seed=request.sampling.seed)
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
    ids=["string", "strings", "tokens", "token lists"],
)
async def test_the_four_shapes_of_a_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, expected: list[Any]
) -> None:
    body = await _complete(client, prompt=prompt, seed=1)
    token_ids = [engine.tokenizer.encode(item) if isinstance(item, str) else item for item in expected]
    assert [request.prompt_token_ids for request in engine.requests] == token_ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, token_ids))
    assert body["usage"]["completion_tokens"] == 16 * len(expected)


async def test_n_completions_of_each_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await _complete(client, prompt=["ab", "c"], n=2, seed=5, max_tokens=4)
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in choices}) == 4
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 7, 8]
    prompts = [request.prompt_token_ids for request in engine.requests]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    num_prompt_tokens = len(prompts[0]) + len(prompts[2])
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 16,
        "total_tokens": num_prompt_tokens + 16,
    }


async def test_a_seed_makes_it_reproducible(client: httpx.AsyncClient) -> None:
    texts = []
    for seed in (1, 1, 2, 2**63 - 1):
        body = await _complete(client, prompt="The fox", seed=seed, n=2)
        texts.append([choice["text"] for choice in body["choices"]])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] != texts[3]


@pytest.mark.parametrize(
    ("parameters", "text", "finish_reason"),
    [
        ({"stop": "mp"}, " ju", "stop"),
        ({"stop": ["over", "mps "]}, " ju", "stop"),
        ({"stop": ["over", "mps "], "include_stop_str_in_output": True}, " jumps ", "stop"),
        ({"stop": []}, " jumps over", "stop"),
        ({"stop": "nothing"}, " jumps over", "stop"),
        ({"stop": "overt"}, " jumps over", "stop"),
        ({"max_tokens": 40, "ignore_eos": True}, " jumps over", "length"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_stops(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    parameters: dict[str, Any],
    text: str,
    finish_reason: str,
    stream: bool,
) -> None:
    engine.script["The fox"] = " jumps over"
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 40, "stream": stream, **parameters}
    response = await client.post("/v1/completions", json=body)
    choices = [body["choices"][0] for body in events(response)[:-1]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [finish_reason]


@pytest.mark.parametrize("stream", [False, True])
async def test_return_token_ids(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    """Also of the tokens whose text is withheld: it could become a stop string, or a whole character."""
    engine.script["The fox"] = " 東京 jumps"
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 40, "stream": stream, "return_token_ids": True}
    response = await client.post("/v1/completions", json=body | {"stop": " jumping"})
    choices = [body["choices"][0] for body in events(response)[:-1]] if stream else response.json()["choices"]
    token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert token_ids == [*engine.tokenizer.encode(" 東京 jumps"), *engine.model.eos_token_ids]


async def test_stream(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps — né"
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 40, "stream": True}
    *chunks, done = events(await client.post("/v1/completions", json=body))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all("usage" not in chunk for chunk in chunks)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == " jumps — né"
    assert len(texts) > 3
    assert all(texts[:-1]), "only the last chunk, with the finish reason, may be without text"


@pytest.mark.parametrize("include_usage", [True, False])
async def test_stream_with_usage(client: httpx.AsyncClient, engine: FakeEngine, include_usage: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    body = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "max_tokens": 5, "ignore_eos": True, "seed": 1, **options}
    *chunks, done = events(await client.post("/v1/completions", json=body))
    assert done == "[DONE]"
    if not include_usage:
        assert all("usage" not in chunk for chunk in chunks)
        return
    *chunks, last = chunks
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    num_prompt_tokens = sum(len(engine.tokenizer.encode(prompt)) for prompt in ("ab", "c"))
    assert last["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 20,
        "total_tokens": num_prompt_tokens + 20,
    }


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": ["ab", "c"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}]}),
    ],
)
async def test_stream_with_continuous_usage(client: httpx.AsyncClient, path: str, prompt: dict) -> None:
    """vLLM's: every event says how much there was until now; guidellm and others ask for it."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = {"model": "tiny", "n": 2, "max_tokens": 5, "ignore_eos": True, "return_token_ids": True} | prompt | options
    *chunks, last, _ = events(await client.post(path, json=body))
    num_tokens = 0
    for chunk in chunks:
        num_tokens += len(chunk["choices"][0].get("token_ids") or [])
        assert chunk["usage"]["completion_tokens"] == num_tokens
        assert chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0
    assert last["usage"]["completion_tokens"] == num_tokens > 0
    options["stream_options"]["include_usage"] = False
    refused = await client.post(path, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream_options")
    assert "continuous_usage_stats goes with include_usage" in refused.json()["error"]["message"]


async def test_stream_of_several_choices_equals_the_whole(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "seed": 1, "return_token_ids": True}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"]
    streamed = [
        {"index": i, "text": "", "logprobs": None, "finish_reason": None, "token_ids": []} for i in range(len(whole))
    ]
    chunks = events(await client.post("/v1/completions", json=body | {"stream": True}))[:-1]
    for chunk in chunks:
        (piece,) = chunk["choices"]
        choice = streamed[piece["index"]]
        assert choice["finish_reason"] is None, "nothing comes after the finish reason"
        choice["text"] += piece["text"]
        choice["token_ids"] += piece["token_ids"]
        choice["finish_reason"] = piece["finish_reason"]
    assert streamed == whole
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order), "choices take turns"


async def test_models(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    card = body["data"][0]
    assert body == {"object": "list", "data": [card]}
    assert isinstance(card.pop("created"), int)
    assert card == {"id": "tiny", "object": "model", "owned_by": "gptj_serve", "max_model_len": 64}
    one = (await client.get("/v1/models/tiny")).json()
    assert one.pop("created")
    assert one == card
