"""huggingface_hub's `InferenceClient`, unmodified, with all that it can send: over a loopback socket."""

from typing import Any

import httpx
import numpy as np
import pytest
from calls import CHAT_TEMPLATE, TEXT
from fakes import small_model
from huggingface_hub import InferenceClient, TextGenerationInputGrammarType
from huggingface_hub.errors import HfHubHTTPError, ValidationError

CONTEXT = "Ana lives in Ljubljana with the quick brown fox, who jumps over Žofka's lazy dog all day long."


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{url}{path}", json=body).raise_for_status().json()


# ── text generation ──────────────────────────────────────────────────────────────────────────────────────

GENERATION: dict[str, Any] = {  # every parameter that changes what is generated, or what is told of it
    "do_sample": True,
    "frequency_penalty": 0.5,
    "max_new_tokens": 6,
    "repetition_penalty": 1.2,
    "seed": 3,
    "stop": ["nothing"],
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "truncate": 2,
    "typical_p": 0.95,
    "watermark": False,
}


def test_all_parameters_arrive(url: str) -> None:
    client = InferenceClient(model=f"{url}/generate")
    text = client.text_generation("The fox", **GENERATION, return_full_text=True)
    parameters = GENERATION | {"return_full_text": True}
    expected = _post(url, "/generate", {"inputs": "The fox", "parameters": parameters})
    assert text == expected["generated_text"]
    assert text.startswith("The fox")
    assert client.text_generation("The fox", **GENERATION | {"seed": 4}, return_full_text=True) != text


def test_details(url: str) -> None:
    client = InferenceClient(model=f"{url}/generate")
    answer = client.text_generation(
        "The fox", details=True, decoder_input_details=True, top_n_tokens=3, best_of=3, **GENERATION
    )
    details = answer.details
    assert details is not None
    assert details.best_of_sequences is not None
    assert details.top_tokens is not None
    assert len(details.best_of_sequences) == 2
    for one in (details, *details.best_of_sequences):
        assert [len(one.prefill), one.prefill[0].logprob] == [2, None]
        assert one.prefill[1].logprob is not None
        assert one.finish_reason in ("length", "eos_token")
        assert one.generated_tokens == len(one.tokens) == len(one.top_tokens or [])
    assert len({details.seed, *(one.seed for one in details.best_of_sequences)}) == 3
    texts = {answer.generated_text, *(one.generated_text for one in details.best_of_sequences)}
    assert len(texts) == 3


@pytest.mark.parametrize("details", [True, False])
def test_stream(url: str, details: bool) -> None:
    client = InferenceClient(model=f"{url}/generate")
    whole = client.text_generation("The fox", details=True, top_n_tokens=2, **GENERATION)
    events = [*client.text_generation("The fox", stream=True, details=details, top_n_tokens=2, **GENERATION)]
    assert whole.details is not None
    if not details:
        assert "".join(events) == "".join(token.text for token in whole.details.tokens)
        return
    assert [vars(event.token) for event in events] == [vars(token) for token in whole.details.tokens]
    streamed = [[vars(token) for token in event.top_tokens or []] for event in events]
    assert streamed == whole.details.top_tokens  # which the library leaves as they came
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert [event.generated_text for event in events] == [None] * (len(events) - 1) + [whole.generated_text]
    last = events[-1].details
    assert last is not None
    assert (last.finish_reason, last.generated_tokens, last.seed) == (
        whole.details.finish_reason,
        whole.details.generated_tokens,
        3,
    )


@pytest.mark.parametrize(
    ("kind", "value"), [("json", {"type": "object"}), ("regex", "[a-z]+"), ("json_schema", {"schema": {}})]
)
def test_grammars_are_taken(url: str, kind: Any, value: Any) -> None:
    grammar = TextGenerationInputGrammarType(type=kind, value=value)
    assert (
        InferenceClient(model=f"{url}/generate").text_generation("The fox", grammar=grammar, max_new_tokens=50) == TEXT
    )


def test_an_adapter_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"parameters\.adapter_id='lora': is not supported"):
        InferenceClient(model=f"{url}/generate").text_generation("The fox", adapter_id="lora")


# ── classification ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("path", ["/classify", "/classify/tone"])
def test_text_classification(url: str, path: str, function: Any) -> None:
    labels = InferenceClient(model=f"{url}{path}").text_classification("The fox", function_to_apply=function, top_k=2)
    body = {"inputs": "The fox", "parameters": {"function_to_apply": function, "top_k": 2}}
    (expected,) = _post(url, path, body)
    assert [(label.label, label.score) for label in labels] == [(one["label"], one["score"]) for one in expected]
    named = {"angry", "calm", "sad"} if path.endswith("tone") else {"bad", "good", "neither"}
    assert {label.label for label in labels} < named
    assert len(labels) == 2


def test_a_head_that_is_not_there(url: str) -> None:
    with pytest.raises(HfHubHTTPError, match="there is no classification head 'tune'"):
        InferenceClient(model=f"{url}/classify/tune").text_classification("The fox")


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("template", [None, "About {}"])
def test_zero_shot_classification(url: str, multi_label: bool, template: str | None) -> None:
    options: dict[str, Any] = {"multi_label": multi_label, "hypothesis_template": template}
    client = InferenceClient(model=f"{url}/classify")
    labels = client.zero_shot_classification("The fox", ["animal", "plant"], **options)
    body = {"inputs": "The fox", "parameters": {"candidate_labels": ["animal", "plant"], **options}}
    expected = _post(url, "/classify", body)
    assert [(label.label, label.score) for label in labels] == [(one["label"], one["score"]) for one in expected]
    assert (sum(label.score for label in labels) == pytest.approx(1)) is not multi_label


# ── question answering ───────────────────────────────────────────────────────────────────────────────────

QA: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"align_to_words": False},
    {"doc_stride": 4, "max_seq_len": 24, "max_question_len": 5},
    {"handle_impossible_answer": True, "top_k": 5},
    {"max_answer_len": 2},
]


@pytest.mark.parametrize("parameters", QA)
@pytest.mark.parametrize("path", ["/qa", "/qa/reader"])
def test_question_answering(url: str, path: str, parameters: dict[str, Any]) -> None:
    client = InferenceClient(model=f"{url}{path}")
    answers = client.question_answering(question="Where is the fox?", context=CONTEXT, **parameters)
    inputs = {"question": "Where is the fox?", "context": CONTEXT}
    expected = _post(url, path, {"inputs": inputs, "parameters": parameters})
    answers = answers if isinstance(answers, list) else [answers]
    expected = expected if isinstance(expected, list) else [expected]
    assert [vars(answer) for answer in answers] == expected
    assert len(answers) == parameters.get("top_k", 1)
    assert all(CONTEXT[answer.start : answer.end] == answer.answer for answer in answers)


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────────────


def test_feature_extraction(url: str) -> None:
    client = InferenceClient(model=f"{url}/embed")
    one = client.feature_extraction("The fox")
    many = client.feature_extraction(["The fox", "The dog"], normalize=True, dimensions=small_model().n_embd)
    assert (one.shape, many.shape, one.dtype) == ((1, 32), (2, 32), np.float32)
    np.testing.assert_array_equal(one[0], many[0])
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, rtol=1e-6)
    raw = client.feature_extraction("The fox", normalize=False, encoding_format="float")
    np.testing.assert_allclose(raw / np.linalg.norm(raw), one, rtol=1e-5)
    long = "The quick brown fox. " * 20
    ends = [client.feature_extraction(long, truncate=True, truncation_direction=side) for side in ("left", "right")]
    assert not np.array_equal(*ends)
    with pytest.raises(HfHubHTTPError, match="the model's context is 64"):
        client.feature_extraction(long)
    with pytest.raises(HfHubHTTPError, match="prompt_name='query': is not supported"):
        client.feature_extraction("The fox", prompt_name="query")


# ── chats ────────────────────────────────────────────────────────────────────────────────────────────────


def test_chat_completion(url: str) -> None:
    client = InferenceClient(base_url=url)
    messages = [{"role": "user", "content": "The fox"}]
    answer = client.chat_completion(
        messages, model="gptj-demo", max_tokens=40, logprobs=True, top_logprobs=2, temperature=0.5, seed=1, top_p=0.9
    )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].logprobs is not None
    stream = client.chat_completion(messages, model="gptj-demo", max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
    schema = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}
    constrained = client.chat_completion(messages, model="gptj-demo", max_tokens=40, response_format=schema)
    assert constrained.choices[0].message.content == TEXT
    with pytest.raises(HfHubHTTPError, match="messages"):
        client.chat_completion([], model="gptj-demo")


def test_the_server_says_how_it_writes_chats(url: str) -> None:
    assert httpx.get(f"{url}/tokenizer_info").json()["chat_template"] == CHAT_TEMPLATE


def test_a_stream_that_is_refused(url: str) -> None:
    client = InferenceClient(model=f"{url}/generate")
    with pytest.raises(ValidationError, match=r"parameters\.top_p=0\.0: "):
        [*client.text_generation("The fox", stream=True, top_p=0.0)]
