"""What the engine offers beyond plain text, and heads beside the checkpoint's own, through the whole service."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from torch import Tensor

from gptj_serve.model.heads import HeadCheckpoint
from tests.serving.service import eventually

pytestmark = pytest.mark.serve

PROMPT = "The President said that the people of the United States"
LABELS = ["politics", "cooking", "sport"]


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(demo)


@pytest.fixture(scope="module")
def oracle(demo: Path) -> transformers.GPTJForCausalLM:
    return transformers.GPTJForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


async def post(http: httpx.AsyncClient, route: str, **body: object):
    response = await http.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_beams_and_processors_equal_transformers(http: httpx.AsyncClient, oracle, tokenizer) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    cases = [
        {"num_beams": 4, "early_stopping": True, "min_new_tokens": 6},
        {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [5, 11]},
    ]
    answers = await asyncio.gather(
        *[post(http, "/generate", inputs=PROMPT, parameters={"max_new_tokens": 20, **case}) for case in cases]
    )
    for case, answer in zip(cases, answers, strict=True):
        out = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0, **case
        )
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"] == expected, case


async def test_echoed_logprobs_equal_transformers(http: httpx.AsyncClient, oracle, tokenizer) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    answer = await post(http, "/v1/completions", model="gptj-demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    with torch.no_grad():
        logprobs = oracle(ids).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    returned = answer["choices"][0]["logprobs"]
    assert returned["token_logprobs"][0] is None
    torch.testing.assert_close(torch.tensor(returned["token_logprobs"][1:]), expected, atol=1e-4, rtol=0)
    best = [max(top.values()) for top in returned["top_logprobs"][1:]]
    torch.testing.assert_close(torch.tensor(best), logprobs.max(-1).values, atol=1e-4, rtol=0)


async def test_constrained_and_free_requests_in_one_batch(http: httpx.AsyncClient) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    free = {"inputs": PROMPT, "parameters": {"max_new_tokens": 30}}
    alone = await post(http, "/generate", **free)
    constrained = {"max_new_tokens": 80, "temperature": 1.0, "seed": 4}
    together = await asyncio.gather(
        post(http, "/generate", **free),
        *[
            post(http, "/generate", inputs=f"Person {n}: ", parameters=constrained | {"grammar": grammar, "seed": n})
            for n in range(3)
            for grammar in ({"type": "json", "value": schema}, {"type": "choice", "value": ["yes", "no", "né"]})
        ],
    )
    assert together[0] == alone
    for index, answer in enumerate(together[1:]):
        if index % 2:
            assert answer["generated_text"] in ("yes", "no", "né")
        else:
            person = json.loads(answer["generated_text"])
            assert set(person) == {"name", "age"}
            assert person["age"] <= 120
    refused = await http.post(
        "/generate", json={"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a("}}}
    )
    assert refused.status_code == 422
    assert "grammar" in refused.json()["error"]


async def test_labels_of_a_text_share_what_is_computed_of_it(http: httpx.AsyncClient) -> None:
    text = "The senate voted on the bill, and the president of the republic signed it in the evening. " * 6

    async def reused() -> int:
        return (await http.get("/status")).json()["pipelines"][0]["engine"]["num_prefix_tokens_reused"]

    before = await reused()
    answer = await post(http, "/classify", inputs=text, parameters={"candidate_labels": LABELS})
    assert sorted(pair["label"] for pair in answer) == sorted(LABELS)
    assert sum(pair["score"] for pair in answer) == pytest.approx(1)

    async def most_is_shared() -> bool:
        """two of three labels skip most of the text"""
        return await reused() - before >= 2 * 16 * (len(text) // 100)

    await eventually(most_is_shared)


# ------------------------------------------------------------------------------------------------- named heads


def hidden_states(demo: Path, token_ids: list[int]) -> Tensor:
    model = transformers.GPTJModel.from_pretrained(demo, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).last_hidden_state[0]


async def test_named_classifier(
    http: httpx.AsyncClient, demo: Path, tokenizer, named_heads: dict[str, HeadCheckpoint]
) -> None:
    answer = await post(http, "/classify", inputs=PROMPT, model="tone", parameters={"function_to_apply": "none"})
    states = hidden_states(demo, tokenizer(PROMPT)["input_ids"])
    expected = torch.from_numpy(named_heads["tone"].weight) @ states.mean(0)
    scores = {pair["label"]: pair["score"] for pair in answer[0]}
    actual = torch.tensor([scores[label] for label in named_heads["tone"].info.labels])
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)
    own = await post(http, "/classify", inputs="what is my balance")
    assert own[0][0]["label"] == "balance"
    unknown = await http.post("/classify", json={"inputs": "x", "model": "reader"})
    assert unknown.status_code == 422
    assert "'tone'" in unknown.json()["error"]


async def test_named_reader(
    http: httpx.AsyncClient, demo: Path, tokenizer, named_heads: dict[str, HeadCheckpoint]
) -> None:
    question, context = "Where does Anna live?", "Anna lives in Paris. She works at the museum."
    inputs = {"question": question, "context": context}
    answer = await post(http, "/qa", inputs=inputs, model="reader", parameters={"align_to_words": False})
    question_ids, context_ids = tokenizer(question)["input_ids"], tokenizer(context)["input_ids"]
    head = named_heads["reader"]
    states = hidden_states(demo, question_ids + context_ids)[len(question_ids) :]
    assert head.bias is not None
    logits = states @ torch.from_numpy(head.weight).T + torch.from_numpy(head.bias)
    start, end = (logits[:, side].softmax(0) for side in (0, 1))
    best = torch.outer(start, end).triu().tril(14).max().item()
    assert answer["score"] == pytest.approx(best, abs=1e-4)
    assert answer["answer"] == context[answer["start"] : answer["end"]]
