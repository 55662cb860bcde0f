"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in the shapes of Text Generation Inference and vLLM."""

from typing import Any

import httpx
import pytest
import tokenizers
from calls import CHAT_TEMPLATE
from fakes import ADDED_TOKEN, SPECIAL_TOKEN, FakeEngine, small_backend_json

TEXT = "The fox — né 東京"


async def _tokenize(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", [TEXT, "", f"a{SPECIAL_TOKEN}b{ADDED_TOKEN}", "\x00", "fox " * 500])
async def test_vllms_shape(client: httpx.AsyncClient, engine: FakeEngine, text: str) -> None:
    """Of any length; the way back gives the same text."""
    token_ids = engine.tokenizer.encode(text)
    expected = {"count": len(token_ids), "max_model_len": 64, "tokens": token_ids, "token_strs": None}
    assert await _tokenize(client, prompt=text) == expected
    for adds in (True, False):
        assert await _tokenize(client, prompt=text, model="tiny", add_special_tokens=adds) == expected
    response = await client.post("/detokenize", json={"tokens": token_ids, "model": "tiny"})
    assert response.json() == {"prompt": text}
    assert engine.requests == []


async def test_token_strings(client: httpx.AsyncClient) -> None:
    body = await _tokenize(client, prompt=TEXT + SPECIAL_TOKEN, return_token_strs=True)
    backend = tokenizers.Tokenizer.from_str(small_backend_json())
    assert body["token_strs"] == [backend.id_to_token(token_id) for token_id in body["tokens"]]
    assert body["token_strs"][-1] == SPECIAL_TOKEN
    assert any(token.startswith("Ġ") for token in body["token_strs"])


async def test_tgis_shape(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    tokens = await _tokenize(client, inputs=TEXT)
    assert [token["id"] for token in tokens] == engine.tokenizer.encode(TEXT)
    assert all(TEXT[token["start"] : token["stop"]] == token["text"] != "" for token in tokens)
    assert (tokens[0]["start"], tokens[-1]["stop"]) == (0, len(TEXT))
    assert await _tokenize(client, inputs="") == []


async def test_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for changes, prompt in (
        ({}, "u>Hi|a>Yes|a>"),
        ({"add_generation_prompt": False}, "u>Hi|a>Yes|"),
        ({"continue_final_message": True}, "u>Hi|a>Yes"),
        ({"chat_template_kwargs": {"end": ";"}}, "u>Hi;a>Yes;a>"),
    ):
        body = await _tokenize(client, messages=chat, **changes)
        assert engine.tokenizer.decode(body["tokens"]) == prompt


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "inputs"),
        ("/tokenize", {"inputs": "a", "prompt": "b"}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "messages"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"inputs": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [405]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "other"}, "model"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, path: str, body: dict[str, Any], field: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"{field}=")
    assert response.json()["error_type"] == "validation"


async def test_bytes_that_are_no_text_become_replacement_characters(client: httpx.AsyncClient) -> None:
    tokens = (await _tokenize(client, prompt="東"))["tokens"]
    response = await client.post("/detokenize", json={"tokens": tokens[:1]})
    assert response.json() == {"prompt": "\ufffd"}


async def test_tokenizer_info(client: httpx.AsyncClient) -> None:
    assert (await client.get("/tokenizer_info")).json() == {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": SPECIAL_TOKEN,
        "eos_token": SPECIAL_TOKEN,
        "pad_token": None,
        "model_max_length": 64,
        "chat_template": CHAT_TEMPLATE,
    }
