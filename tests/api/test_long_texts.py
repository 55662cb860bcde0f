"""Long texts are tokenized in a thread, so that nobody else's tokens wait for them."""

import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import tokenizers
from fakes import FakeEngine, small_backend_json, small_model

from gptj_serve.api.app import create_app
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
