"""Long texts are tokenized, and long answers made, in a thread, so that nobody else's tokens wait for them."""

import json
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import httpx
import pytest
import tokenizers
from fakes import FakeEngine, small_backend_json, small_model

from gptj_serve.api.app import create_app
from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.json_answers import encode_answer
from gptj_serve.api.service import MAX_CHARACTERS_ON_LOOP, Service
from gptj_serve.config import ServiceConfig
from gptj_serve.tokenizer import Encoding, Tokenizer

SENTENCE = "The quick brown fox. "
LONG = SENTENCE * (MAX_CHARACTERS_ON_LOOP // len(SENTENCE) + 1)


class WatchedTokenizer(Tokenizer):
    """Notes whether each text was tokenized on the event loop's thread."""

    def __init__(self) -> None:
        super().__init__(tokenizers.Tokenizer.from_str(small_backend_json()))
        self.on_loop: list[bool] = []

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        return super().encode_all(texts)

    def token_string(self, token_id: int) -> str:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        return super().token_string(token_id)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_with_offsets(self, text: str) -> Encoding:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        return super().encode_with_offsets(text)


def _generate(text: str, **parameters: Any) -> tuple[str, Any]:
    return "/generate", {"inputs": text, "parameters": {"truncate": 10, **parameters}}


def _complete(**changes: Any) -> tuple[str, Any]:
    return "/v1/completions", {"model": "gptj-demo", "prompt": "a", "truncate_prompt_tokens": 10, **changes}


BODIES = {
    "generate": lambda text: _generate(text),
    "bad_words": lambda text: _generate("a", bad_words=[text[i : i + 200] for i in range(0, len(text), 200)]),
    "negative_prompt": lambda text: _generate("a", negative_prompt=text, guidance_scale=2),
    "complete": lambda text: _complete(prompt=text),
    "classify": lambda text: ("/classify", {"inputs": text}),
    "labels": lambda text: (
        "/classify",
        {"inputs": "a", "parameters": {"candidate_labels": [f"{n} {t}" for n, t in enumerate(text.split(". "))]}},
    ),
    "zero-shot": lambda text: ("/classify", {"inputs": text, "parameters": {"candidate_labels": ["a"]}}),
    "context": lambda text: ("/qa", {"inputs": {"question": "Where?", "context": text}}),
    "tokens": lambda text: ("/tokenize", {"inputs": text}),
    "token_strs": lambda text: ("/tokenize", {"prompt": text, "return_token_strs": True}),
    "detokenize": lambda text: ("/detokenize", {"tokens": [17] * len(text)}),
    "question": lambda text: ("/qa", {"inputs": {"question": text, "context": "The fox."}}),
}


@pytest.mark.parametrize("name", BODIES)
async def test_long_texts_are_tokenized_off_the_loop(name: str) -> None:
    tokenizer = WatchedTokenizer()
    model = small_model(n_positions=8192)
    engine = FakeEngine(model, tokenizer)
    service = Service(ServiceConfig(), model, ["lm_head", "score", "qa_outputs"], tokenizer, engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        for text, is_long in ((SENTENCE, False), (LONG, True)):
            tokenizer.on_loop.clear()
            path, body = BODIES[name](text)
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            assert (False in tokenizer.on_loop) is is_long


class WatchedTemplate(ChatTemplate):
    def __init__(self) -> None:
        super().__init__("{{ messages[0].content }}", {})
        self.on_loop: list[bool] = []

    def render(self, *args: Any, **kwargs: Any) -> str:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        return super().render(*args, **kwargs)


@pytest.mark.parametrize(
    ("message", "changes", "is_long"),
    [
        ({"content": SENTENCE}, {}, False),
        ({"content": LONG}, {}, True),
        ({"content": SENTENCE, "name": LONG}, {}, True),
        ({"content": SENTENCE}, {"chat_template_kwargs": {"n": 10**9}}, True),
    ],
)
async def test_templates_with_much_to_do_are_rendered_off_the_loop(
    engine: FakeEngine, message: dict[str, Any], changes: dict[str, Any], is_long: bool
) -> None:
    template = WatchedTemplate()
    service = Service(ServiceConfig(), engine.model, ["lm_head"], engine.tokenizer, engine, chat_template=template)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://test") as client:
        body = {"messages": [{"role": "user"} | message], **changes}
        assert (await client.post("/tokenize", json=body)).status_code == 200
    assert template.on_loop == [not is_long]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        [{"text": "né", "start": n} for n in range(100)],
        [[0.1, 1e-30, -5.0]] * 33,
        {"count": 70, "tokens": list(range(70)), "token_strs": None, "data": []},
    ],
)
def test_an_answer_in_pieces_is_the_answer(answer: Any) -> None:
    assert json.loads(encode_answer(answer)) == answer
    if isinstance(answer, list):
        assert encode_answer(iter(answer)) == encode_answer(answer)


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
async def test_vectors_that_are_not_finite_are_no_answer(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    """JSON has no word for them."""
    engine.head_logits = lambda request: [[float("nan"), 1.0]]
    body = {"model": "tiny", "input": "a"} if path.startswith("/v1/") else {"inputs": "a"}
    response = await client.post(path, json=body)
    assert response.status_code == 500
    assert "the model's hidden states are not finite" in response.text
