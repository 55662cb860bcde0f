"""The whole service held against its OpenAPI schema, by requests made up from it, and by a chat."""

import httpx
import pytest
from fuzz_schema import fuzz, golden_stream

from tests.serving.service import URL, ServeRun

pytestmark = pytest.mark.serve

NUM_CASES = 200


@pytest.mark.timeout(600)
def test_made_up_requests_are_answered_as_described(service: ServeRun) -> None:
    with golden_stream(URL):
        statuses = fuzz(URL, NUM_CASES)
    assert statuses["positive 200"] > NUM_CASES // 10
    assert statuses["negative 422"] + statuses["negative 400"] > NUM_CASES // 10


async def test_a_chat_goes_through_the_configured_template(http: httpx.AsyncClient) -> None:
    chat = [{"role": "user", "content": "Where is the fox?"}]
    tokens = (await http.post("/tokenize", json={"messages": chat})).json()["tokens"]
    prompt = (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert prompt == "User: Where is the fox?\n\nAssistant:"
    limits = {"max_tokens": 8, "temperature": 0}
    answer = await http.post("/v1/chat/completions", json={"model": "gptj-demo", "messages": chat, **limits})
    completion = await http.post("/v1/completions", json={"model": "gptj-demo", "prompt": prompt, **limits})
    assert answer.json()["choices"][0]["message"]["content"] == completion.json()["choices"][0]["text"]
