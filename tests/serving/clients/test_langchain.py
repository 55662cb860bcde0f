"""langchain-openai's classes against the service; the answers are those of plain HTTP."""

import pytest

from tests.serving.clients import environments
from tests.serving.clients.conftest import LOGPROB_TOLERANCE, MESSAGES, MODEL, PROMPT, Post

pytestmark = [pytest.mark.serve, pytest.mark.clients, pytest.mark.timeout(900)]

PROMPTS = [PROMPT, "It is a truth", "The Martians"]


@pytest.fixture(scope="module")
def answers(url: str) -> dict:
    return environments.run("langchain", "langchain_calls.py", url)


@pytest.fixture(scope="module")
def texts(post: Post) -> list[str]:
    body = {"model": MODEL, "prompt": PROMPTS, "max_tokens": 12, "temperature": 0}
    return [choice["text"] for choice in post("/v1/completions", **body)["choices"]]


def test_whole_answers(answers: dict, texts: list[str]) -> None:
    assert answers["invoke"] == answers["ainvoke"] == answers["chain"] == texts[0] != ""
    assert answers["batch"] == answers["abatch"] == texts
    assert answers["stopped"] == texts[0].partition("the")[0]
    assert answers["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_streams(answers: dict, texts: list[str]) -> None:
    for pieces in (answers["stream"], answers["astream"]):
        assert "".join(pieces) == texts[0]
        assert len(pieces) > 1


def test_sampled_answers(answers: dict, post: Post) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "seed": 7, "n": 2, "best_of": 3}
    assert answers["seeded"] == [choice["text"] for choice in post("/v1/completions", **body)["choices"]]


def test_logprobs(answers: dict, post: Post) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    expected = post("/v1/completions", **body)["choices"][0]["logprobs"]
    assert (answers["logprobs"]["tokens"], answers["logprobs"]["text_offset"]) == (
        expected["tokens"],
        expected["text_offset"],
    )
    assert answers["logprobs"]["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=LOGPROB_TOLERANCE)
    for top, expected_top in zip(answers["logprobs"]["top_logprobs"], expected["top_logprobs"], strict=True):
        assert top == pytest.approx(expected_top, abs=LOGPROB_TOLERANCE)


def test_chats(answers: dict, post: Post) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    answer = post("/v1/chat/completions", **body)
    text = answer["choices"][0]["message"]["content"]
    assert answers["chat"] == answers["achat"] == "".join(answers["streamed_chat"]) == text != ""
    assert answers["chat_usage"]["output_tokens"] == answer["usage"]["completion_tokens"] == 12


def test_embeddings(answers: dict, post: Post) -> None:
    expected = [entry["embedding"] for entry in post("/v1/embeddings", model=MODEL, input=PROMPTS)["data"]]
    for vector, other in zip([*answers["embed"], answers["aembed"]], [*expected, expected[0]], strict=True):
        assert vector == pytest.approx(other, abs=1e-5)


def test_refusals(answers: dict) -> None:
    assert answers["refused"] == "temperature"
