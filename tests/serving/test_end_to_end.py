"""The README's service, held against transformers and used through real clients."""

import asyncio
import json
import random
import re
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers
from huggingface_hub import InferenceClient

from tests.serving.service import URL, ServeRun

pytestmark = pytest.mark.serve

NUM_PROMPTS = 200
MAX_NEW_TOKENS = 8

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, "
    "naïve and alone, I thought I would sail about a little and see the watery part of the world. 日本語 too. "
)


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(demo)


def load(cls, demo: Path, **kwargs):
    return cls.from_pretrained(demo, dtype=torch.float32, **kwargs).eval()


def test_output_is_clean(service: ServeRun) -> None:
    """No traceback and no warning but Ray's own about token authentication."""
    lines = [line for line in service.startup_output.splitlines() if "Token authentication is enabled" not in line]
    assert [line for line in lines if re.search("traceback|warn|error", line, re.IGNORECASE)] == []
    assert any("gptj-demo is ready" in line for line in lines), "the start-up summary is missing"


async def test_200_prompts_at_once_equal_transformers(
    http: httpx.AsyncClient, demo: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    model = load(transformers.GPTJForCausalLM, demo)
    rng = random.Random(0)
    ids = tokenizer(TEXT * 20)["input_ids"]
    longest = model.config.n_positions - MAX_NEW_TOKENS
    lengths = [1, 2, longest - 1, longest] + [min(int(rng.lognormvariate(4, 1)) + 1, longest) for _ in range(196)]
    prompts = [ids[(start := rng.randrange(len(ids) - length)) : start + length] for length in lengths]

    async def complete(prompt: list[int]) -> list[int]:
        body = {"model": "gptj-demo", "prompt": prompt, "max_tokens": MAX_NEW_TOKENS, "temperature": 0}
        response = await http.post("/v1/completions", json=body | {"return_token_ids": True})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    answers = await asyncio.gather(*[complete(prompt) for prompt in prompts])
    mismatches = []
    for prompt, answer in zip(prompts, answers, strict=True):
        input_ids = torch.tensor([prompt])
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
            pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
        if answer != output[0, len(prompt) :].tolist():
            mismatches.append((len(prompt), answer))
    assert len(answers) == NUM_PROMPTS
    assert mismatches == []


async def test_classify_logits_equal_transformers(
    http: httpx.AsyncClient, demo: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    model = load(transformers.GPTJForSequenceClassification, demo)
    texts = ["what is my balance", "book me a flight to Oslo", "é", TEXT * 3, "how do you say hello in 日本語"]
    body = {"inputs": texts, "parameters": {"function_to_apply": "none"}}
    answers = (await http.post("/classify", json=body)).json()
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0]
        logits = {label["label"]: label["score"] for label in answer}
        actual = torch.tensor([logits[model.config.id2label[index]] for index in range(len(expected))])
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


QUESTIONS = [
    ("Where does Anna live?", "Anna lives in Paris. She works at the museum."),
    ("Who wrote it?", "naïve 😀 Émile Zola wrote it in 1885 — 日本 — and 👩‍👩‍👧 read it."),
    ("When?", TEXT * 6 + "It happened in 1914 in Sarajevo. " + TEXT * 6),
]


@pytest.mark.parametrize(("question", "context"), QUESTIONS)
async def test_qa_spans_and_scores(
    http: httpx.AsyncClient, demo: Path, question: str, context: str, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    body = {"inputs": {"question": question, "context": context}, "parameters": {"top_k": 5}}
    answers = (await http.post("/qa", json=body)).json()
    assert 1 <= len(answers) <= 5
    for answer in answers:
        assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
    if len(context) < 200:  # a single window: the best score is that of transformers' logits
        model = load(transformers.GPTJForQuestionAnswering, demo, num_labels=2)
        question_ids, context_ids = tokenizer(question)["input_ids"], tokenizer(context)["input_ids"]
        with torch.no_grad():
            output = model(torch.tensor([question_ids + context_ids]))
        start, end = (logits[0, len(question_ids) :].softmax(-1) for logits in (output.start_logits, output.end_logits))
        best = torch.outer(start, end).triu().tril(14).max().item()
        assert max(answer["score"] for answer in answers) >= best - 1e-4


async def test_openai_client(service: ServeRun) -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["gptj-demo"]
        request = {"model": "gptj-demo", "prompt": "The President", "max_tokens": 12, "seed": 7}
        whole = await client.completions.create(**request)
        stream = await client.completions.create(**request, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
        assert "".join(pieces) == whole.choices[0].text != ""
        assert len(pieces) > 1
        with pytest.raises(openai.BadRequestError, match=r"temperature=-1"):
            await client.completions.create(**request, temperature=-1)
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            await client.completions.create(**request | {"model": "gpt-4"})


def test_hugging_face_client(service: ServeRun) -> None:
    generator = InferenceClient(f"{URL}/generate")
    whole = generator.text_generation("The President", max_new_tokens=9)
    pieces = list(generator.text_generation("The President", max_new_tokens=9, stream=True))
    assert "".join(pieces) == whole
    assert len(pieces) == 9
    details = generator.text_generation("The President", max_new_tokens=9, details=True).details
    assert details.generated_tokens == len(details.tokens) == 9
    labels = InferenceClient(f"{URL}/classify").text_classification("what is my balance")
    assert labels[0].score == max(label.score for label in labels)
    context = "Anna lives in Paris."
    answer = InferenceClient(f"{URL}/qa").question_answering(question="Where does Anna live?", context=context)
    assert context[answer.start : answer.end] == answer.answer


async def test_bad_input_does_not_disturb_a_stream(http: httpx.AsyncClient) -> None:
    golden_body = {"inputs": "In the beginning", "parameters": {"max_new_tokens": 200}, "stream": True}

    async def golden_stream() -> str:
        text = (await http.post("/generate", json=golden_body)).text
        return re.sub(r"^id: .*$", "", text, flags=re.MULTILINE)  # those are each stream's own

    undisturbed = await golden_stream()
    stream = asyncio.create_task(golden_stream())
    bad = [
        ({"inputs": ""}, 422, "inputs"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 5000}}, 422, "max_new_tokens=5000"),
        ({"inputs": "x", "parameters": {"temperature": -1}}, 422, "parameters.temperature=-1"),
        ({"inputs": "x", "parameters": {"top_p": 1.5}}, 422, "parameters.top_p=1.5"),
        ({"inputs": "x", "parameters": {"colour": "red"}}, 422, "parameters.colour='red'"),
        ({"inputs": 5}, 422, "inputs=5"),
    ]
    for body, status, named in bad:
        response = await http.post("/generate", json=body)
        assert (response.status_code, named in response.json()["error"]) == (status, True), response.text
    response = await http.post("/generate", content=b"{not json", headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert "JSON" in response.json()["error"]
    response = await http.post("/generate", content=json.dumps({"inputs": "x" * 50_000_000}))
    assert response.status_code == 413
    assert "error" in response.json()
    response = await http.post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert await stream == undisturbed
