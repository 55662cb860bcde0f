"""litellm against the service, as OpenAI's and as vLLM's; the answers are those of plain HTTP."""

import pytest

from tests.serving.clients import environments
from tests.serving.clients.conftest import LOGPROB_TOLERANCE, MESSAGES, MODEL, PROMPT, Post

pytestmark = [pytest.mark.serve, pytest.mark.clients, pytest.mark.timeout(900)]

GREEDY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def all_answers(url: str) -> dict:
    return environments.run("litellm", "litellm_calls.py", url)


@pytest.fixture(params=["OpenAI", "vLLM"])
def answers(all_answers: dict, request: pytest.FixtureRequest) -> dict:
    return all_answers[request.param]


def test_completions(answers: dict, post: Post) -> None:
    expected = post("/v1/completions", **GREEDY, logprobs=2)["choices"][0]
    whole, pieces = answers["async"]
    assert answers["text"] == whole == expected["text"] != ""
    assert answers["finish_reason"] == "length"
    assert answers["usage"] == [3, 12]
    logprobs = expected["logprobs"]["token_logprobs"]
    assert answers["token_logprobs"] == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)
    for stream in (answers["stream"], pieces):
        assert "".join(stream) == expected["text"]
        assert len(stream) > 2


def test_sampled_completion(answers: dict, post: Post) -> None:
    expected = post("/v1/completions", **GREEDY | {"temperature": 0.9, "seed": 7, "top_p": 0.95})
    assert answers["sampled"] == expected["choices"][0]["text"]


def test_chats(answers: dict, post: Post) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    text = post("/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    assert answers["chat"] == "".join(answers["streamed_chat"]) == text != ""


def test_embeddings(answers: dict, post: Post) -> None:
    expected = post("/v1/embeddings", model=MODEL, input=[PROMPT, "The fox"])["data"]
    for vector, entry in zip(answers["embeddings"], expected, strict=True):
        assert vector == pytest.approx(entry["embedding"], abs=1e-5)


def test_refusals(answers: dict) -> None:
    status, message = answers["refused"]
    assert status == 400
    assert "temperature=-1" in message
