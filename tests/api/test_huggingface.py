"""The routes in Hugging Face's shape: what they answer, and what they ask of the engine."""

import math
from typing import Any

import httpx
import pytest
from calls import events
from fakes import SPECIAL_TOKEN, FakeEngine, small_model, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.api.app import create_app
from gptj_serve.api.classification import classify
from gptj_serve.api.huggingface_schemas import ClassifyRequest, QAParameters
from gptj_serve.api.service import Service
from gptj_serve.api.zero_shot_classification import classify_zero_shot
from gptj_serve.config import ServiceConfig
from gptj_serve.errors import InvalidRequestError
from gptj_serve.extractive_qa import QAOptions
from gptj_serve.types import Pooling, SamplingParams, Task


async def _post(client: httpx.AsyncClient, path: str, body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


# ── /generate ────────────────────────────────────────────────────────────────────────────────────────────


async def test_generate(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps over the café."
    assert await _post(client, "/generate", {"inputs": "The fox", "parameters": {"max_new_tokens": 50}}) == {
        "generated_text": " jumps over the café."
    }
    (request,) = engine.requests
    assert request.task is Task.GENERATE
    assert request.prompt_token_ids == engine.tokenizer.encode("The fox")
    assert request.sampling == SamplingParams(max_new_tokens=50, seed=request.sampling.seed)


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"min_p": 0.5}, 1.0),
        ({"typical_p": 0.5}, 1.0),
        ({"epsilon_cutoff": 0.5}, 1.0),
        ({"eta_cutoff": 0.5}, 1.0),
        ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, 0.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"temperature": 0}, 0.0),
    ],
)
async def test_a_sampling_parameter_turns_sampling_on(
    client: httpx.AsyncClient, engine: FakeEngine, parameters: dict[str, Any], temperature: float
) -> None:
    await _post(client, "/generate", {"inputs": "The fox", "parameters": parameters})
    assert engine.requests[0].sampling.warpers.temperature == temperature


async def test_generate_is_reproducible_with_a_seed_and_only_so(client: httpx.AsyncClient) -> None:
    def body(**seed: int) -> dict[str, Any]:
        return {"inputs": "The fox", "parameters": {"do_sample": True, "details": True, **seed}}

    first, second = [await _post(client, "/generate", body(seed=1)) for _ in range(2)]
    assert first == second
    assert first["details"]["seed"] == 1
    assert await _post(client, "/generate", body(seed=2)) != first
    drawn, drawn_again = [await _post(client, "/generate", body()) for _ in range(2)]
    assert drawn["details"]["seed"] != drawn_again["details"]["seed"]
    assert await _post(client, "/generate", body(seed=drawn["details"]["seed"])) == drawn


async def test_generate_with_details(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " né"
    body = {"inputs": "The fox", "parameters": {"details": True}}
    answer = await _post(client, "/generate", body)
    assert answer["generated_text"] == " né"
    details = answer["details"]
    ids = engine.tokenizer.encode(" né")
    (end_id,) = engine.model.eos_token_ids
    assert [token["id"] for token in details["tokens"]] == [*ids, end_id]
    assert "".join(token["text"] for token in details["tokens"]) == " né"
    assert [token["special"] for token in details["tokens"]] == [False] * len(ids) + [True]
    (prompt,) = [request.prompt_token_ids for request in engine.requests]
    scores = engine.score_rows([*prompt, *ids, end_id], len(prompt), 0)
    assert [[token["logprob"]] for token in details["tokens"]] == scores
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", len(ids) + 1)
    assert (details["seed"], details["prefill"]) == (None, [])


@pytest.mark.parametrize(
    ("parameters", "finish_reason", "text"),
    [
        ({"max_new_tokens": 60}, "eos_token", " jumps over"),
        ({"max_new_tokens": 1}, "length", None),
        ({"stop": ["mp"]}, "stop_sequence", " jump"),
        ({"stop": ["nothing", "over", "jumps "]}, "stop_sequence", " jumps "),
        ({"stop": ["nothing"], "max_new_tokens": 60}, "eos_token", " jumps over"),
    ],
)
async def test_generation_ends_with_a_reason(
    client: httpx.AsyncClient, engine: FakeEngine, parameters: dict[str, Any], finish_reason: str, text: str | None
) -> None:
    engine.script["The fox"] = " jumps over"
    answer = await _post(client, "/generate", {"inputs": "The fox", "parameters": {"details": True, **parameters}})
    assert answer["details"]["finish_reason"] == finish_reason
    assert answer["generated_text"] == (answer["details"]["tokens"][0]["text"] if text is None else text)


async def test_an_end_in_the_middle_of_a_character_shows(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = "a👩"  # an emoji that the tokenizer has not seen: a token per byte
    answer = await _post(client, "/generate", {"inputs": "The fox", "parameters": {"max_new_tokens": 3}})
    assert answer == {"generated_text": "a\ufffd"}


async def test_held_text_comes_with_the_end(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps over"
    body = {"inputs": "The fox", "parameters": {"stop": ["overt"]}}
    assert await _post(client, "/generate", body) == {"generated_text": " jumps over"}


async def test_a_stop_token_ends_the_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps over"
    ids = engine.tokenizer.encode(" jumps over")
    body = {"inputs": "The fox", "parameters": {"details": True, "stop_token_ids": [ids[1]]}}
    answer = await _post(client, "/generate", body)
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert [token["id"] for token in answer["details"]["tokens"]] == ids[:2]


async def test_a_stop_string_aborts_what_the_engine_still_does(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps over"
    await _post(client, "/generate", {"inputs": "The fox", "parameters": {"stop": ["jum"]}})
    assert engine.aborted == [engine.requests[0].request_id]


async def test_return_full_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps"
    body = {"inputs": "The fox", "parameters": {"return_full_text": True}}
    assert await _post(client, "/generate", body) == {"generated_text": "The fox jumps"}
    streamed = events(await client.post("/generate_stream", json=body))
    assert streamed[-1]["generated_text"] == "The fox jumps"


@pytest.mark.parametrize(("path", "stream"), [("/generate", True), ("/generate_stream", False)])
async def test_generate_streams(client: httpx.AsyncClient, engine: FakeEngine, path: str, stream: bool) -> None:
    engine.script["The fox"] = " jumps — €"
    body = {"inputs": "The fox", "parameters": {"stop": ["€"]}, "stream": stream}
    *others, last = streamed = events(await client.post(path, json=body))
    ids = engine.tokenizer.encode(" jumps — €")
    assert [event["index"] for event in streamed] == list(range(1, len(ids) + 1))
    assert [event["token"]["id"] for event in streamed] == ids
    assert "".join(event["token"]["text"] for event in streamed) == " jumps — €"
    assert all(event["generated_text"] is None and event["details"] is None for event in others)
    assert last["generated_text"] == " jumps — €"
    assert last["details"] == {"finish_reason": "stop_sequence", "generated_tokens": len(ids), "seed": None}


# ── /classify ────────────────────────────────────────────────────────────────────────────────────────────


async def test_classify(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.head_logits = lambda request: [[0.0, 2.0, 1.0]]
    (labels,) = await _post(client, "/classify", {"inputs": "nice"})
    total = 1 + math.e + math.e**2
    assert [label["label"] for label in labels] == ["good", "neither", "bad"]
    assert [label["score"] for label in labels] == pytest.approx([math.e**2 / total, math.e / total, 1 / total])
    assert engine.requests[0].task is Task.CLASSIFY
    assert engine.requests[0].prompt_token_ids == engine.tokenizer.encode("nice")


async def test_classify_a_list_in_its_order(client: httpx.AsyncClient) -> None:
    together = await _post(client, "/classify", {"inputs": ["one", "two", "three"]})
    alone = [await _post(client, "/classify", {"inputs": text}) for text in ("one", "two", "three")]
    assert together == [labels for (labels,) in alone]
    assert together[0] != together[1]


async def test_classify_top_k(client: httpx.AsyncClient) -> None:
    (all_labels,) = await _post(client, "/classify", {"inputs": "nice"})
    assert await _post(client, "/classify", {"inputs": "nice", "parameters": {"top_k": 2}}) == [all_labels[:2]]
    assert await _post(client, "/classify", {"inputs": "nice", "parameters": {"top_k": 99}}) == [all_labels]


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        ("none", [300.0, 0.0, -800.0]),
        ("sigmoid", [1.0, 0.5, 0.0]),
        ("softmax", [1.0, 0.0, 0.0]),
    ],
)
async def test_function_to_apply(
    client: httpx.AsyncClient, engine: FakeEngine, function: str, scores: list[float]
) -> None:
    engine.head_logits = lambda request: [[-800.0, 0.0, 300.0]]
    body = {"inputs": "nice", "parameters": {"function_to_apply": function}}
    (labels,) = await _post(client, "/classify", body)
    assert [label["score"] for label in labels] == pytest.approx(scores)


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"id2label": {0: "only"}}], ids=["multi", "single"]
)
async def test_independent_labels_get_a_sigmoid(service: Service, engine: FakeEngine, changes: dict[str, Any]) -> None:
    service.model = engine.model = small_model(**changes)
    engine.head_logits = lambda request: [[0.0] * service.model.num_labels]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        (labels,) = await _post(client, "/classify", {"inputs": "nice"})
    assert {label["score"] for label in labels} == {0.5}


async def test_trailing_pad_tokens_are_not_pooled(service: Service, engine: FakeEngine) -> None:
    (pad_token_id,) = service.tokenizer.special_token_ids
    service.model = small_model(pad_token_id=pad_token_id)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        await _post(client, "/classify", {"inputs": [f"nice{SPECIAL_TOKEN}{SPECIAL_TOKEN}", SPECIAL_TOKEN]})
    assert [r.prompt_token_ids for r in engine.requests] == [service.tokenizer.encode("nice"), [pad_token_id]]


# ── /qa ──────────────────────────────────────────────────────────────────────────────────────────────────

CONTEXT = "Žofka lives in 東京 with 👩🏽‍🚀 Ana. She's happy."


def _pointing_at(text: str, engine: FakeEngine, question: str) -> None:
    """Make the engine's logits point at a piece of CONTEXT."""
    num_question_tokens = len(engine.tokenizer.encode(question))
    offsets = engine.tokenizer.encode_with_offsets(CONTEXT).offsets
    start = CONTEXT.index(text)
    first = next(i for i, offset in enumerate(offsets) if offset[0] <= start < offset[1])
    last = max(i for i, offset in enumerate(offsets) if offset[1] == start + len(text))

    def logits(request: Any) -> list[list[float]]:
        values = [[0.0, 0.0] for _ in request.prompt_token_ids]
        values[num_question_tokens + first][0] = values[num_question_tokens + last][1] = 20.0
        return values

    engine.head_logits = logits


async def test_qa(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    _pointing_at("東京", engine, "Where?")
    answer = await _post(client, "/qa", {"inputs": {"question": "Where?", "context": CONTEXT}})
    assert answer == {"answer": "東京", "score": pytest.approx(1.0, abs=1e-4), "start": 15, "end": 17}
    assert engine.requests[0].task is Task.QA
    assert engine.requests[0].prompt_token_ids == engine.tokenizer.encode("Where?") + engine.tokenizer.encode(CONTEXT)


async def test_qa_top_k(client: httpx.AsyncClient) -> None:
    body = {"inputs": {"question": "Where?", "context": CONTEXT}, "parameters": {"top_k": 3}}
    answers = await _post(client, "/qa", body)
    assert len(answers) == 3
    assert all(CONTEXT[answer["start"] : answer["end"]] == answer["answer"] for answer in answers)
    assert answers[0] == await _post(client, "/qa", {**body, "parameters": {}}) | {"score": answers[0]["score"]}


@pytest.mark.parametrize("top_k", [1, 2])
async def test_qa_with_a_list_of_questions(client: httpx.AsyncClient, top_k: int) -> None:
    inputs = [{"question": question, "context": CONTEXT} for question in ("Where?", "Who is it?")]
    together = await _post(client, "/qa", {"inputs": inputs, "parameters": {"top_k": top_k}})
    alone = [await _post(client, "/qa", {"inputs": item, "parameters": {"top_k": top_k}}) for item in inputs]
    assert together == alone
    assert await _post(client, "/qa", {"inputs": inputs[:1], "parameters": {"top_k": top_k}}) == alone[:1]


async def test_a_long_context_is_asked_in_windows(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    context = "The quick brown fox sees 東京. " * 20
    answer = await _post(client, "/qa", {"inputs": {"question": "Where?", "context": context}})
    assert context[answer["start"] : answer["end"]] == answer["answer"] != ""
    assert len(engine.requests) > 3
    assert all(len(request.prompt_token_ids) <= 64 for request in engine.requests)


def test_qa_parameters_are_the_options() -> None:
    assert QAParameters().model_dump() == {name: getattr(QAOptions(), name) for name in QAOptions.__slots__}


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_health_and_status(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    status = (await client.get("/status")).json()
    assert (status["model"], status["tasks"]) == ("tiny", ["generate", "classify", "qa"])
    assert status["pipelines"] == [{"engine": {"num_running": 0}}]


async def test_docs(client: httpx.AsyncClient) -> None:
    docs = await client.get("/docs")
    assert (docs.status_code, docs.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "/openapi.json" in docs.text
    schema = (await client.get("/openapi.json")).json()
    assert set(schema["paths"]) == {
        "/generate",
        "/generate_stream",
        "/classify",
        "/classify/{head}",
        "/qa",
        "/qa/{head}",
        "/embed",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/status",
    }
    parameters = schema["components"]["schemas"]["GenerateParameters"]
    assert parameters["additionalProperties"] is False
    assert "temperature" in parameters["properties"]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
async def test_any_text_is_generated_from_and_classified(text: str) -> None:
    """Whatever the text, the answer is JSON and the prompt reaches the engine whole."""
    engine = FakeEngine(small_model(), small_tokenizer())
    service = Service(ServiceConfig(), engine.model, ["lm_head", "score"], engine.tokenizer, engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        await _post(client, "/generate", {"inputs": text, "parameters": {"max_new_tokens": 3}})
        await _post(client, "/classify", {"inputs": [text]})
    for request in engine.requests:
        assert engine.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False) == text


# ── heads by name ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_named_head_classifies_with_its_own_labels(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (labels,) = await _post(client, "/classify", {"inputs": "The fox", "model": "tone"})
    assert (engine.requests[0].head, engine.requests[0].pooling) == ("tone", Pooling.MEAN)
    (logits,) = engine.head_logits(engine.requests[0])
    expected = dict(zip(["angry", "calm", "sad"], [1 / (1 + math.exp(-x)) for x in logits], strict=True))
    assert {item["label"]: pytest.approx(item["score"]) for item in labels} == expected  # each for itself: multi-label
    own = await _post(client, "/classify", {"inputs": "The fox", "model": "default"})
    assert own == await _post(client, "/classify", {"inputs": "The fox"})
    assert {item["label"] for item in own[0]} == {"bad", "good", "neither"}


async def test_a_named_head_answers_questions(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"inputs": {"question": "Where?", "context": "The fox is here."}}
    own, named = [await _post(client, "/qa", body | extra) for extra in ({}, {"model": "reader"})]
    assert [request.head for request in engine.requests] == ["default", "reader"]
    assert own != named


async def test_a_head_can_be_named_by_the_path(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    question = {"inputs": {"question": "Where?", "context": "The fox is here."}}
    for path, head, body in (("/classify", "tone", {"inputs": "The fox"}), ("/qa", "reader", question)):
        by_model = await _post(client, path, body | {"model": head})
        assert await _post(client, f"{path}/{head}", body) == by_model
        assert await _post(client, f"{path}/{head}", body | {"model": head}) == by_model
        assert await _post(client, f"{path}/default", body) == await _post(client, path, body) != by_model
        conflict = await client.post(f"{path}/{head}", json=body | {"model": "default"})
        assert conflict.status_code == 422
        assert conflict.json()["error"] == f"model='default': is not the head of the address, '{head}'"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/classify/tune", "there is no classification head 'tune'; this service has 'default', 'tone'"),
        ("/classify/reader", "there is no classification head 'reader'; this service has 'default', 'tone'"),
        ("/classify/a/b", "there is no classification head 'a/b'; this service has 'default', 'tone'"),
        ("/qa/tone", "there is no question answering head 'tone'; this service has 'default', 'reader'"),
    ],
)
async def test_an_unknown_head_in_the_path_is_not_found(client: httpx.AsyncClient, path: str, message: str) -> None:
    question = {"question": "Where?", "context": "The fox is here."}
    response = await client.post(path, json={"inputs": question if path.startswith("/qa") else "The fox"})
    assert response.status_code == 404
    assert response.json() == {"error": f"POST {path}: {message}", "error_type": "validation"}


async def test_an_unknown_head_is_refused_with_those_that_exist(client: httpx.AsyncClient) -> None:
    response = await client.post("/classify", json={"inputs": "The fox", "model": "tune"})
    assert response.status_code == 422
    reason = "there is no such classification head; this service has 'default', 'tone'"
    assert response.json()["error"] == f"model='tune': {reason}"


async def test_without_heads_of_its_own_the_only_named_one_is_meant(service: Service, engine: FakeEngine) -> None:
    named = dict(service.named_heads)
    bare = Service(service.config, engine.model, ["lm_head"], engine.tokenizer, engine, named)
    assert bare.tasks == ["generate", "classify", "qa"]
    await classify(bare, ClassifyRequest(inputs="The fox"))
    assert engine.requests[0].head == "tone"
    two = Service(
        service.config, engine.model, ["lm_head"], engine.tokenizer, engine, named | {"second": named["tone"]}
    )
    with pytest.raises(InvalidRequestError, match="choose a head; this service has 'tone', 'second'"):
        await classify(two, ClassifyRequest(inputs="The fox"))


# ── zero-shot ────────────────────────────────────────────────────────────────────────────────────────────


def _zero_shot(text: str | list[str], labels: list[str] | str, **parameters: Any) -> dict[str, Any]:
    return {"inputs": text, "parameters": {"candidate_labels": labels, **parameters}}


async def test_zero_shot_asks_for_each_label_with_and_without_the_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = await _post(client, "/classify", _zero_shot("The fox", "animal, plant"))
    encode, (bos,) = engine.tokenizer.encode, engine.tokenizer.special_token_ids
    neutral, given = [bos, *encode("\nThis example is")], encode("The fox\nThis example is")
    assert [(r.task, r.prompt_token_ids, r.continuation_token_ids) for r in engine.requests] == [
        (Task.SCORE, prompt, encode(label)) for prompt in (neutral, given) for label in (" animal.", " plant.")
    ]
    sums = [sum(row[0] for row in engine.head_logits(request)) for request in engine.requests]
    odds = [math.exp(sums[2] - sums[0]), math.exp(sums[3] - sums[1])]
    expected = [
        {"label": label, "score": odd / sum(odds)} for label, odd in zip(["animal", "plant"], odds, strict=True)
    ]
    expected.sort(key=lambda item: -item["score"])
    assert answer == [item | {"score": pytest.approx(item["score"], rel=1e-5)} for item in expected]


async def test_zero_shot_with_several_true_labels_scores_each_alone(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    many = await _post(client, "/classify", _zero_shot("The fox", ["animal", "plant"], multi_label=True))
    alone = [await _post(client, "/classify", _zero_shot("The fox", [label])) for label in ("animal", "plant")]
    assert sorted(many, key=lambda item: item["label"]) == [answer[0] for answer in alone]
    assert all(0 < item["score"] < 1 for item in many)


async def test_zero_shot_of_a_list_answers_as_the_pipeline_does(client: httpx.AsyncClient) -> None:
    texts = ["The fox", "The dog"]
    body = _zero_shot(texts, ["animal", "plant", "stone"], hypothesis_template="{} is what this is about")
    answers = await _post(client, "/classify", body)
    assert [answer["sequence"] for answer in answers] == texts
    for answer in answers:
        assert sorted(answer["labels"]) == ["animal", "plant", "stone"]
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        assert sum(answer["scores"]) == pytest.approx(1)
    one = await _post(client, "/classify", body | {"inputs": "The dog"})
    assert [item["label"] for item in one] == answers[1]["labels"]


async def test_zero_shot_needs_the_lm_head(service: Service, engine: FakeEngine) -> None:
    bare = Service(service.config, engine.model, ["score"], engine.tokenizer, engine)
    body = ClassifyRequest.model_validate(_zero_shot("The fox", "animal"))
    with pytest.raises(InvalidRequestError, match="no zero-shot classification head"):
        await classify_zero_shot(bare, body)
