"""The libraries that people have, unmodified: openai in process, huggingface_hub over a loopback socket."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from calls import TEXT
from fakes import FakeEngine
from fastapi import FastAPI
from huggingface_hub import InferenceClient, TextGenerationInputGrammarType
from huggingface_hub.errors import ValidationError
from openai.types.chat import ChatCompletionContentPartTextParam

from gptj_serve.errors import OverloadedError
from gptj_serve.types import Grammar, GrammarKind

# ── openai ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def openai_client(app: FastAPI, engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    engine.script["The fox"] = TEXT
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport), max_retries=0
    ) as client:
        yield client


async def test_openai_completion(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    completion = await openai_client.completions.create(model="tiny", prompt="The fox", max_tokens=50, temperature=0)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (TEXT, "stop")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(engine.tokenizer.encode(TEXT)) + 1


async def test_openai_stream(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    stream = await openai_client.completions.create(
        model="tiny", prompt="The fox", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(engine.tokenizer.encode("The fox"))


async def test_openai_parameters(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    completion = await openai_client.completions.create(
        model="tiny",
        prompt="The fox",
        max_tokens=4,
        n=2,
        best_of=3,
        logprobs=2,
        logit_bias={"5": 1},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=3,
        extra_body={"repetition_penalty": 1.1, "guided_choice": ["a", "b"], "bad_words": ["dog"], "top_k": 5},
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert all(choice.logprobs is not None and choice.logprobs.token_logprobs for choice in completion.choices)
    sampling = engine.requests[0].sampling
    assert sampling is not None
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.5, -0.5)
    assert (sampling.sequence_bias, sampling.warpers.top_k) == ([([5], 1.0)], 5)
    assert sampling.grammar == Grammar(GrammarKind.CHOICE, '["a", "b"]')
    beams = await openai_client.completions.create(
        model="tiny", prompt="The fox", n=2, best_of=4, extra_body={"use_beam_search": True, "length_penalty": 0.5}
    )
    assert (beams.choices[0].text, len(beams.choices)) == (TEXT, 2)


async def test_openai_streamed_logprobs(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.completions.create(
        model="tiny", prompt="The fox", max_tokens=50, stream=True, logprobs=1, echo=True
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    text = "".join(chunk.text for chunk in chunks)
    assert text == f"The fox{TEXT}"
    tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens or []]
    offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset or []]
    assert [
        text[at : at + len(t)] for t, at in zip(tokens, offsets, strict=True) if not t.startswith(("bytes", "<"))
    ] == [token for token in tokens if not token.startswith(("bytes", "<"))]


async def test_openai_chat(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script["u>The fox|a>"] = TEXT
    create = openai_client.chat.completions.create
    answer = await create(
        model="tiny",
        messages=[{"role": "user", "content": "The fox"}],
        max_completion_tokens=40,
        logprobs=True,
        top_logprobs=2,
        store=False,
        tool_choice="none",
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in choice.logprobs.content[:-1]).decode() == TEXT
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    parts: list[ChatCompletionContentPartTextParam] = [{"type": "text", "text": "The fox"}]
    stream = await create(
        model="tiny",
        messages=[{"role": "user", "content": parts}],
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == answer.usage
    with pytest.raises(openai.BadRequestError, match="tools="):
        await create(
            model="tiny",
            messages=[{"role": "user", "content": "The fox"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


async def test_openai_embeddings(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """Unless told otherwise the client asks for base64, and decodes it."""
    embeddings = await openai_client.embeddings.create(model="tiny", input=["The fox", "The dog"])
    vectors = [item.embedding for item in embeddings.data]
    assert [len(vector) for vector in vectors] == [engine.model.n_embd] * 2
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1])
    numbers = await openai_client.embeddings.create(model="tiny", input="The dog", encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(vectors[1])
    assert numbers.usage.prompt_tokens == len(engine.tokenizer.encode("The dog"))


async def test_openai_models(openai_client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in openai_client.models.list()] == ["tiny"]
    assert (await openai_client.models.retrieve("tiny")).id == "tiny"


async def test_openai_errors(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    create = openai_client.completions.create
    with pytest.raises(openai.BadRequestError, match="temperature=-1") as refused:
        await create(model="tiny", prompt="The fox", temperature=-1)
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="this service has 'tiny' only"):
        await create(model="other", prompt="The fox")
    engine.fail_at = lambda request, index: "a stage was lost" if index == 3 else None
    stream = await create(model="tiny", prompt="The fox", stream=True)
    with pytest.raises(openai.APIError, match="a stage was lost"):
        [chunk async for chunk in stream]
    engine.refusal = lambda request: OverloadedError("full", 3)
    with pytest.raises(openai.InternalServerError, match="full") as full:
        await create(model="tiny", prompt="The fox")
    assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "3")


# ── huggingface_hub ──────────────────────────────────────────────────────────────────────────────────────


def test_hugging_face_text_generation(url: str) -> None:
    client = InferenceClient(model=f"{url}/generate")
    assert client.text_generation("The fox", max_new_tokens=50) == TEXT
    assert client.text_generation("The fox", max_new_tokens=50, return_full_text=True) == f"The fox{TEXT}"
    assert client.text_generation("The fox", max_new_tokens=50, stop=["over"]) == " jumps over"


def test_hugging_face_text_generation_with_details(url: str) -> None:
    answer = InferenceClient(model=f"{url}/generate").text_generation("The fox", details=True, max_new_tokens=50)
    assert answer.generated_text == TEXT
    assert answer.details is not None
    assert (answer.details.finish_reason, answer.details.seed, answer.details.prefill) == ("eos_token", None, [])
    assert "".join(token.text for token in answer.details.tokens) == TEXT
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert all(token.logprob < 0 for token in answer.details.tokens)


def test_hugging_face_text_generation_streamed(url: str) -> None:
    client = InferenceClient(model=f"{url}/generate")
    assert "".join(client.text_generation("The fox", stream=True, max_new_tokens=50)) == TEXT
    *_, last = client.text_generation("The fox", stream=True, details=True, max_new_tokens=50)
    assert (last.generated_text, last.token.special) == (TEXT, True)
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("eos_token", last.index)


def test_hugging_face_parameters(url: str) -> None:
    client = InferenceClient(model=f"{url}/generate")
    answer = client.text_generation(
        "The fox",
        details=True,
        max_new_tokens=4,
        best_of=2,
        top_n_tokens=2,
        decoder_input_details=True,
        do_sample=True,
        typical_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        truncate=2,
        grammar=TextGenerationInputGrammarType(type="json", value={"properties": {}}),
    )
    assert answer.details is not None
    assert answer.details.best_of_sequences is not None
    assert len(answer.details.best_of_sequences) == 1
    assert answer.details.top_tokens is not None
    assert [len(top) for top in answer.details.top_tokens] == [2] * answer.details.generated_tokens
    assert (len(answer.details.prefill), answer.details.prefill[0].logprob) == (2, None)
    streamed = [*client.text_generation("The fox", stream=True, details=True, max_new_tokens=3, top_n_tokens=2)]
    assert all(len(event.top_tokens or []) == 2 for event in streamed)


def test_hugging_face_text_classification(url: str) -> None:
    client = InferenceClient(model=f"{url}/classify")
    labels = client.text_classification("The fox")
    assert {label.label for label in labels} == {"bad", "good", "neither"}
    assert sum(label.score for label in labels) == pytest.approx(1.0)
    assert client.text_classification("The fox", top_k=1) == labels[:1]


def test_hugging_face_zero_shot_classification(url: str) -> None:
    client = InferenceClient(model=f"{url}/classify")
    one = client.zero_shot_classification("The fox", ["animal", "plant"])
    assert {label.label for label in one} == {"animal", "plant"}
    assert sum(label.score for label in one) == pytest.approx(1)
    assert one[0].score >= one[1].score
    many = client.zero_shot_classification("The fox", ["animal", "plant"], multi_label=True)
    assert sum(label.score for label in many) != pytest.approx(1)
    other = client.zero_shot_classification("The fox", ["animal", "plant"], hypothesis_template="About {}")
    assert other != one


def test_hugging_face_question_answering(url: str) -> None:
    client = InferenceClient(model=f"{url}/qa")
    context = "Žofka lives in 東京 with 👩🏽‍🚀 Ana."
    answer = client.question_answering(question="Where?", context=context)
    assert context[answer.start : answer.end] == answer.answer != ""
    answers = client.question_answering(question="Where?", context=context, top_k=2)
    assert [a.answer == answer.answer for a in answers] == [True, False]


def test_hugging_face_errors(url: str) -> None:
    """The library knows TGI's error object and raises what its `error_type` says."""
    client = InferenceClient(model=f"{url}/generate")
    with pytest.raises(ValidationError, match=r"^parameters\.temperature=-1: "):
        client.text_generation("The fox", temperature=-1)


def test_a_huge_body_is_answered_over_a_socket(url: str) -> None:
    """The client gets the answer, not a broken connection, though most of what it sends is never read."""
    response = httpx.post(f"{url}/generate", content=b" " * 50_000_000, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "the body of 50000000 bytes is over the limit of 1048576 bytes" in response.json()["error"]
