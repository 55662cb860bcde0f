"""The `openai` library against the service, sync and async; the answers are those of plain HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import httpx
import httpx2
import openai
import pydantic
import pytest

from tests.serving.clients.conftest import LOGPROB_TOLERANCE, MESSAGES, MESSAGES_AS_PROMPT, MODEL, PROMPT, Post
from tests.serving.service import eventually

pytestmark = pytest.mark.serve

GREEDY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
SAMPLED = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "seed": 7}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("request_body", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_completion(client: openai.OpenAI, post: Post, request_body: dict) -> None:
    expected = post("/v1/completions", **request_body)
    completion = client.completions.create(**request_body)
    assert completion.choices[0].text == expected["choices"][0]["text"] != ""
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.to_dict() == expected["usage"]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 12)
    assert (completion.object, completion.model) == ("text_completion", MODEL)


@pytest.mark.parametrize("request_body", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_stream(client: openai.OpenAI, post: Post, request_body: dict) -> None:
    expected = post("/v1/completions", **request_body)
    chunks = list(client.completions.create(**request_body, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(piece.choices[0].text for piece in pieces) == expected["choices"][0]["text"]
    assert len(pieces) > 1
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.usage.to_dict() == expected["usage"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_with_several_choices(client: openai.OpenAI, post: Post) -> None:
    request_body = SAMPLED | {"prompt": [PROMPT, "The fox"], "n": 2, "logprobs": 2, "echo": True}
    expected = post("/v1/completions", **request_body)["choices"]
    choices = client.completions.create(**request_body).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert [choice.text for choice in choices] == [choice["text"] for choice in expected]
    assert [choice.text.startswith(PROMPT) for choice in choices] == [True, True, False, False]
    for choice, other in zip(choices, expected, strict=True):
        assert choice.logprobs.tokens == other["logprobs"]["tokens"]
        logprobs = other["logprobs"]["token_logprobs"]
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)
        assert (logprobs[0], len(choice.logprobs.top_logprobs)) == (None, len(logprobs))


def test_extra_body(client: openai.OpenAI) -> None:
    request_body = GREEDY | {"extra_body": {"guided_choice": [" yes", " no"], "return_token_ids": True}}
    choice = client.completions.create(**request_body).choices[0]
    assert choice.text in (" yes", " no")
    assert len(choice.token_ids) > 0


def test_stop(client: openai.OpenAI, post: Post) -> None:
    text = post("/v1/completions", **GREEDY)["choices"][0]["text"]
    choice = client.completions.create(**GREEDY, stop=text[5:10]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[5:10])], "stop")


CHAT = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}


def test_chat(client: openai.OpenAI, post: Post) -> None:
    """It is the completion of what the chat template makes of the messages."""
    text = post("/v1/completions", **GREEDY | {"prompt": MESSAGES_AS_PROMPT})["choices"][0]["text"]
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", text, "length")
    scored = answer.choices[0].logprobs.content
    assert "".join(token.token for token in scored) == text
    assert [len(token.top_logprobs) for token in scored] == [2] * 12
    assert answer.usage.completion_tokens == 12


def test_streamed_chat(client: openai.OpenAI, post: Post) -> None:
    expected = post("/v1/chat/completions", **CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    first, *pieces, last = chunks
    assert first.choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == expected["choices"][0]["message"]["content"] != ""
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.usage.to_dict() == expected["usage"]


def test_the_chat_stream_helper(client: openai.OpenAI, post: Post) -> None:
    """It takes only answers that have ended by themselves."""
    choices = {"guided_choice": [" a sailor of the ship", " a whale"]}
    expected = post("/v1/chat/completions", **CHAT, **choices)["choices"][0]["message"]["content"]
    with client.chat.completions.stream(**CHAT, extra_body=choices) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == expected in choices["guided_choice"]


class Answer(pydantic.BaseModel):
    is_ship: bool
    name: Literal["Pequod", "Beagle"]


def test_a_parsed_chat(client: openai.OpenAI) -> None:
    """The SDK sends the model's JSON schema and reads the answer with it."""
    answer = client.chat.completions.parse(**CHAT | {"max_completion_tokens": 100}, response_format=Answer)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Answer)
    assert parsed == Answer.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("encoding", [None, "float"], ids=["base64, which the SDK asks for itself", "float"])
def test_embeddings(client: openai.OpenAI, post: Post, encoding: str | None) -> None:
    texts = [PROMPT, "The fox"]
    expected = [entry["embedding"] for entry in post("/v1/embeddings", model=MODEL, input=texts)["data"]]
    options = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model=MODEL, input=texts, **options)
    assert [entry.index for entry in answer.data] == [0, 1]
    for entry, vector in zip(answer.data, expected, strict=True):
        assert entry.embedding == pytest.approx(vector, abs=1e-5)
        assert sum(value * value for value in entry.embedding) == pytest.approx(1, abs=1e-5)
    assert answer.usage.prompt_tokens == sum(post("/tokenize", prompt=text)["count"] for text in texts)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "gptj_serve"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


async def test_concurrent_requests(async_client: openai.AsyncOpenAI, post: Post) -> None:
    bodies = [SAMPLED | {"seed": seed} for seed in range(24)]
    completions = await asyncio.gather(*[async_client.completions.create(**body) for body in bodies])
    texts = [completion.choices[0].text for completion in completions]
    assert texts == [post("/v1/completions", **body)["choices"][0]["text"] for body in bodies]
    assert len(set(texts)) > 12


async def test_concurrent_streams(async_client: openai.AsyncOpenAI, post: Post) -> None:
    async def read(body: dict) -> str:
        stream = await async_client.completions.create(**body, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    bodies = [SAMPLED | {"seed": seed} for seed in range(16)]
    texts = await asyncio.gather(*[read(body) for body in bodies])
    assert texts == [post("/v1/completions", **body)["choices"][0]["text"] for body in bodies]


async def test_a_closed_stream_ends_its_request(async_client: openai.AsyncOpenAI, url: str) -> None:
    endless = GREEDY | {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    stream = await async_client.completions.create(**endless, stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with httpx.AsyncClient(base_url=url) as http:

        async def is_idle() -> bool:
            """Nothing runs any more."""
            pipelines = (await http.get("/status")).json()["pipelines"]
            return all(pipeline["engine"]["num_running"] == 0 for pipeline in pipelines)

        await eventually(is_idle)


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
        ({"prompt": [[99999]]}, openai.BadRequestError, "prompt"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: openai.OpenAI, change: dict, error: type, param: str, stream: bool) -> None:
    with pytest.raises(error) as refused:
        client.completions.create(**GREEDY | change, stream=stream)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert param in refused.value.message


def test_an_unknown_route(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"GET /v1/files"):
        client.files.list()


def test_a_short_timeout(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(**GREEDY | {"max_tokens": 1000})


class Unreliable(httpx2.HTTPTransport):
    """Lets through what comes after a broken connection and a refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.num_requests += 1
        if self.num_requests == 1:
            raise httpx2.ConnectError("broken")
        if self.num_requests == 2:
            return httpx2.Response(503, headers={"retry-after-ms": "10"}, json={"error": {"message": "full"}})
        return super().handle_request(request)


def test_retries(url: str, post: Post) -> None:
    transport = Unreliable()
    with (
        contextlib.closing(httpx2.Client(transport=transport)) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=2) as client,
    ):
        completion = client.completions.create(**GREEDY)
    assert completion.choices[0].text == post("/v1/completions", **GREEDY)["choices"][0]["text"]
    assert transport.num_requests == 3


def test_the_raw_response(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(**GREEDY)
    assert raw.status_code == 200
    assert raw.parse().choices[0].text == raw.http_response.json()["choices"][0]["text"]
