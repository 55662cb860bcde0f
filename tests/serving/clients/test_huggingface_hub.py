"""`huggingface_hub.InferenceClient` against the service's routes; the answers are those of plain HTTP."""

import asyncio

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

from tests.serving.clients.conftest import LOGPROB_TOLERANCE, PROMPT, Post

pytestmark = pytest.mark.serve

REQUEST = "how much money is in my account"
CONTEXT = "Anna lives in Paris, naïve 😀 as she is. She works at the museum."
QUESTION = "Where does Anna live?"


@pytest.fixture
def generator(url: str) -> InferenceClient:
    return InferenceClient(model=f"{url}/generate")


@pytest.fixture
def classifier(url: str) -> InferenceClient:
    return InferenceClient(model=f"{url}/classify")


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7},
        {"max_new_tokens": 12, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "return_full_text": True},
        {"max_new_tokens": 40, "stop": ["United"]},
    ],
)
def test_text_generation(generator: InferenceClient, post: Post, parameters: dict) -> None:
    expected = post("/generate", inputs=PROMPT, parameters=parameters)["generated_text"]
    assert generator.text_generation(PROMPT, **parameters) == expected != ""
    assert "".join(generator.text_generation(PROMPT, stream=True, **parameters)) == expected.removeprefix(PROMPT)


def test_text_generation_with_details(generator: InferenceClient, post: Post) -> None:
    asked = {"max_new_tokens": 9, "details": True, "top_n_tokens": 2}
    expected = post("/generate", inputs=PROMPT, parameters=asked | {"decoder_input_details": True})
    answer = generator.text_generation(PROMPT, decoder_input_details=True, **asked)
    assert answer.generated_text == expected["generated_text"]
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 9, None)
    for tokens, key in ((details.tokens, "tokens"), (details.prefill, "prefill")):
        others = expected["details"][key]
        assert [(token.id, token.text) for token in tokens] == [(token["id"], token["text"]) for token in others]
        logprobs = [token["logprob"] for token in others]
        assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)
    assert len(details.prefill) == 3
    assert [[token["id"] for token in top] for top in details.top_tokens] == [
        [token["id"] for token in top] for top in expected["details"]["top_tokens"]
    ]
    assert "".join(token.text for token in details.tokens) == answer.generated_text


def test_text_generation_streamed_with_details(generator: InferenceClient, post: Post) -> None:
    expected = post("/generate", inputs=PROMPT, parameters={"max_new_tokens": 9, "details": True})
    *events, last = generator.text_generation(PROMPT, stream=True, details=True, max_new_tokens=9)
    assert [event.generated_text for event in events] == [None] * 8
    assert [event.token.id for event in [*events, last]] == [token["id"] for token in expected["details"]["tokens"]]
    assert last.generated_text == expected["generated_text"]
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 9)


async def test_async_text_generation(url: str, post: Post) -> None:
    prompts = [PROMPT, "The Martians", "It is a truth", "She"]
    expected = [post("/generate", inputs=prompt)["generated_text"] for prompt in prompts]
    async with AsyncInferenceClient(model=f"{url}/generate") as client:
        assert await asyncio.gather(*[client.text_generation(prompt) for prompt in prompts]) == expected
        pieces = [piece async for piece in await client.text_generation(PROMPT, stream=True)]
    assert "".join(pieces) == expected[0]


def check(labels: list, expected: list[dict]) -> None:
    assert [label.label for label in labels] == [label["label"] for label in expected]
    assert [label.score for label in labels] == pytest.approx([label["score"] for label in expected], abs=1e-5)


def test_text_classification(classifier: InferenceClient, post: Post) -> None:
    (expected,) = post("/classify", inputs=REQUEST, parameters={"top_k": 3})
    labels = classifier.text_classification(REQUEST, top_k=3)
    check(labels, expected)
    assert labels[0].label == "balance"
    everything = classifier.text_classification(REQUEST, function_to_apply="sigmoid")
    (expected,) = post("/classify", inputs=REQUEST, parameters={"function_to_apply": "sigmoid"})
    check(everything, expected)
    assert sum(label.score for label in everything) != pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"hypothesis_template": "It says {}"}])
def test_zero_shot_classification(classifier: InferenceClient, post: Post, options: dict) -> None:
    candidates = ["ships", "money", "love"]
    expected = post("/classify", inputs=REQUEST, parameters={"candidate_labels": candidates} | options)
    labels = classifier.zero_shot_classification(REQUEST, candidates, **options)
    check(labels, expected)
    assert {label.label for label in labels} == set(candidates)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"max_answer_len": 2, "align_to_words": False}])
def test_question_answering(url: str, post: Post, options: dict) -> None:
    inputs = {"question": QUESTION, "context": CONTEXT}
    expected = post("/qa", inputs=inputs, parameters=options)
    made = InferenceClient(model=f"{url}/qa").question_answering(**inputs, **options)
    answers = made if isinstance(made, list) else [made]
    others = expected if isinstance(expected, list) else [expected]
    for answer, other in zip(answers, others, strict=True):
        assert (answer.answer, answer.start, answer.end) == (other["answer"], other["start"], other["end"])
        assert answer.score == pytest.approx(other["score"], abs=1e-5)
    assert all(CONTEXT[answer.start : answer.end] == answer.answer != "" for answer in answers)


@pytest.mark.parametrize("options", [{}, {"normalize": False}])
def test_feature_extraction(url: str, post: Post, options: dict) -> None:
    texts = [REQUEST, CONTEXT]
    expected = np.array(post("/embed", inputs=texts, **options), dtype=np.float32)
    vectors = InferenceClient(model=f"{url}/embed").feature_extraction(texts, **options)
    assert vectors.shape == (2, 256)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    one = InferenceClient(model=f"{url}/embed").feature_extraction(REQUEST, **options)
    np.testing.assert_allclose(one, vectors[:1], atol=1e-4)


def test_refusals(generator: InferenceClient, classifier: InferenceClient) -> None:
    """The library knows TGI's error object and raises what its `error_type` says."""
    with pytest.raises(ValidationError, match=r"parameters\.temperature=-1: "):
        generator.text_generation(PROMPT, temperature=-1)
    with pytest.raises(ValidationError, match=r"parameters\.temperature=-1: "):
        list(generator.text_generation(PROMPT, temperature=-1, stream=True))
    with pytest.raises(HfHubHTTPError, match="422") as refused:
        classifier.text_classification(REQUEST, top_k=0)
    assert refused.value.response.json()["error"].startswith("parameters.top_k=0: ")
