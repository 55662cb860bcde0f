"""`/v1/chat/completions`: parameters, answers, streams, log-probabilities, refusals."""

from typing import Any

import httpx
import pytest
from calls import events
from fakes import FakeEngine, small_model, small_tokenizer
from pydantic import ValidationError

from gptj_serve.api.app import create_app
from gptj_serve.api.chat_schemas import ChatCompletionRequest
from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.service import Service
from gptj_serve.config import ServiceConfig
from gptj_serve.types import SamplingParams, Warpers

PROMPT = "u>The fox|a>"
ANSWER = " jumps — né"


def _body(*contents: str, **changes: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents or ("The fox",))]
    return {"model": "tiny", "messages": messages, **changes}


async def _chat(client: httpx.AsyncClient, *contents: str, **changes: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json=_body(*contents, **changes))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def _prompts(engine: FakeEngine) -> list[str]:
    return [engine.tokenizer.decode(r.prompt_token_ids, skip_special_tokens=False) for r in engine.requests]


async def test_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script[PROMPT] = ANSWER
    body = await _chat(client, max_tokens=20)
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1e9
    num_prompt_tokens, num_tokens = (len(engine.tokenizer.encode(text)) for text in (PROMPT, ANSWER))
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens + 1,
            "total_tokens": num_prompt_tokens + num_tokens + 1,
        },
    }


async def test_without_a_limit_as_many_tokens_as_fit(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await _chat(client)
    (request,) = engine.requests
    assert request.sampling is not None
    assert request.sampling == SamplingParams(
        max_new_tokens=64 - len(request.prompt_token_ids),
        warpers=Warpers(temperature=1.0),
        seed=request.sampling.seed,
    )


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
async def test_the_limit_has_two_names(client: httpx.AsyncClient, engine: FakeEngine, limits: dict[str, int]) -> None:
    body = await _chat(client, **limits, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 3
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({}, PROMPT),
        ({"add_generation_prompt": True}, PROMPT),
        ({"add_generation_prompt": False}, "u>The fox|"),
        ({"continue_final_message": True}, "u>The fox"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "u>The fox"),
        ({"chat_template_kwargs": {"end": "!"}}, "u>The fox!a>"),
        ({"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]}, "s>Be|u>Hi|a>"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Ana"}]}, "u(Ana)>Hi|a>"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("The", "fox")]}]},
            "u>The\nfox|a>",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "u>|a>"),
        ({"truncate_prompt_tokens": 2}, "a>"),
        ({"truncate_prompt_tokens": -1}, PROMPT),
    ],
)
async def test_prompt(client: httpx.AsyncClient, engine: FakeEngine, changes: dict[str, Any], prompt: str) -> None:
    await _chat(client, max_tokens=5, **changes)
    assert _prompts(engine) == [prompt]


async def test_sampling_parameters_are_those_of_completions(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    changes = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "logit_bias": {"5": 1},
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "bad_words": ["dog"],
        "response_format": {"type": "json_object"},
        "n": 2,
        "priority": 3,
        "cache_salt": "pepper",
        "max_tokens": 9,
    }
    await _chat(client, **changes)
    prompt = {"model": "tiny", "prompt": PROMPT}
    assert (await client.post("/v1/completions", json=prompt | changes)).status_code == 200
    asked = [(r.prompt_token_ids, r.sampling, r.priority, r.cache_salt) for r in engine.requests]
    assert asked[:2] == asked[2:]
    assert asked[0] != asked[1]


async def test_beams(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script[PROMPT] = ANSWER
    body = await _chat(client, n=2, use_beam_search=True, max_tokens=20)
    assert body["choices"][0]["message"]["content"] == ANSWER
    assert [choice["index"] for choice in body["choices"]] == [0, 1]


async def test_stream(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script[PROMPT] = ANSWER
    body = _body(stream=True, max_tokens=20)
    *chunks, done = events(await client.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    first, *others = (chunk["choices"][0] for chunk in chunks)
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert "".join(choice["delta"].get("content", "") for choice in others) == ANSWER
    assert [choice["finish_reason"] for choice in others] == [None] * (len(others) - 1) + ["stop"]
    assert all("role" not in choice["delta"] for choice in others)
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_stream_of_several_choices_equals_the_whole(client: httpx.AsyncClient, include_usage: bool) -> None:
    changes: dict[str, Any] = {"n": 2, "seed": 1, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    changes |= {"return_token_ids": True, "ignore_eos": True}
    whole = await _chat(client, **changes)
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    *chunks, _ = events(await client.post("/v1/chat/completions", json=_body(**changes, **options)))
    if include_usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert all(chunk["usage"] is None for chunk in chunks)
    text, tokens, token_ids, roles = ["", ""], [[], []], [[], []], [0, 0]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        roles[index] += choice["delta"].get("role") == "assistant"
        text[index] += choice["delta"].get("content", "")
        tokens[index] += choice["logprobs"]["content"] if choice["logprobs"] else []
        token_ids[index] += choice.get("token_ids", [])
    assert roles == [1, 1]
    assert text == [choice["message"]["content"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["content"] for choice in whole["choices"]]
    assert token_ids == [choice["token_ids"] for choice in whole["choices"]]


@pytest.mark.parametrize("num_top", [None, 0, 2])
async def test_logprobs(client: httpx.AsyncClient, engine: FakeEngine, num_top: int | None) -> None:
    engine.script[PROMPT] = " 東"
    changes = {} if num_top is None else {"top_logprobs": num_top}
    body = await _chat(client, max_tokens=20, logprobs=True, return_token_ids=True, **changes)
    (choice,) = body["choices"]
    prompt = engine.tokenizer.encode(PROMPT)
    token_ids = choice["token_ids"]
    assert body["prompt_token_ids"] == prompt
    rows = engine.score_rows([*prompt, *token_ids], len(prompt), num_top or 0)
    for token, token_id, row in zip(choice["logprobs"]["content"], token_ids, rows, strict=True):
        assert token["logprob"] == row[0]
        assert bytes(token["bytes"]) == engine.tokenizer.token_bytes(token_id, skip_special_tokens=False)
        assert [top["logprob"] for top in token["top_logprobs"]] == row[1 + (num_top or 0) :]
        for top, top_id in zip(token["top_logprobs"], row[1 : 1 + (num_top or 0)], strict=True):
            assert bytes(top["bytes"]) == engine.tokenizer.token_bytes(int(top_id), skip_special_tokens=False)
    said = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"][:-1])
    assert said.decode() == " 東" == choice["message"]["content"]
    assert choice["logprobs"]["refusal"] is None


async def test_prompt_logprobs(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await _chat(client, max_tokens=2, prompt_logprobs=1, n=2)
    prompt = engine.tokenizer.encode(PROMPT)
    rows = engine.score_rows(prompt, 1, 1)
    first, *others = body["prompt_logprobs"]
    assert first is None
    for scores, token_id, row in zip(others, prompt[1:], rows, strict=True):
        assert scores[str(token_id)]["logprob"] == row[0]
        assert scores[str(int(row[1]))]["rank"] == 1


MESSAGE = {"role": "user", "content": "The fox"}
REFUSED: list[tuple[dict[str, Any], str]] = [  # changes, the field that is named
    ({"messages": []}, "messages"),
    ({"messages": "The fox"}, "messages"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [MESSAGE | {"content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content.0.type"),
    ({"messages": [MESSAGE | {"tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ({"messages": [MESSAGE | {"refusal": "no"}]}, "messages.0.refusal"),
    ({"messages": [MESSAGE | {"audio": {"id": "a"}}]}, "messages.0.audio"),
    ({"messages": [MESSAGE | {"function_call": {}}]}, "messages.0.function_call"),
    ({"messages": [MESSAGE | {"weight": 1}]}, "messages.0.weight"),
    ({"messages": [MESSAGE | {"role": "developer"}]}, "messages"),
    ({"messages": [MESSAGE | {"content": "fox " * 500}]}, "messages"),
    ({"messages": [MESSAGE] * 30}, "messages"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 64}, "max_tokens"),
    ({"max_completion_tokens": 64}, "max_completion_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"n": 5}, "n"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": True, "n": 2, "logprobs": True}, "logprobs"),
    ({"use_beam_search": True, "n": 2, "temperature": 1}, "temperature"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {str(n): n for n in range(33)}}, "chat_template_kwargs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[field for _, field in REFUSED])
async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine, changes: dict[str, Any], field: str) -> None:
    response = await client.post("/v1/chat/completions", json=_body(**changes))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}=")
    assert engine.requests == []


def test_the_number_of_messages_is_bounded() -> None:
    ChatCompletionRequest.model_validate(_body(messages=[MESSAGE] * 512))
    with pytest.raises(ValidationError, match="at most 512 items"):
        ChatCompletionRequest.model_validate(_body(messages=[MESSAGE] * 513))


async def test_what_the_template_refuses(client: httpx.AsyncClient) -> None:
    messages = [MESSAGE | {"role": "developer"}]
    error = (await client.post("/v1/chat/completions", json=_body(messages=messages))).json()["error"]
    assert error["message"].endswith("the chat template refuses: only system, user, assistant")


async def test_a_templates_refusal_can_be_sent_whatever_it_says(engine: FakeEngine) -> None:
    template = ChatTemplate('{{ raise_exception("not " ~ "%c" % n) }}', {})
    config = ServiceConfig(model_name="tiny")
    service = Service(config, small_model(), ["lm_head"], small_tokenizer(), engine, chat_template=template)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json=_body(chat_template_kwargs={"n": 0xD800}))
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith("the chat template refuses: not \\ud800")


async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=_body(model="other"))
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


async def test_without_a_template_it_says_how_to_set_one(engine: FakeEngine) -> None:
    service = Service(ServiceConfig(model_name="tiny"), small_model(), ["lm_head"], small_tokenizer(), engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json=_body())
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    assert "'tiny' has no chat template: set chat_template in the deployment's configuration" in error["message"]
