"""Log-probabilities, of the completion and of the prompt: OpenAI's shape, vLLM's and Text Generation Inference's."""

from typing import Any

import httpx
import openai
import pytest
from calls import events
from fakes import HOLE, SPECIAL_TOKEN, FakeEngine, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.api.logprobs import (
    MIN_LOGPROB,
    ScoredToken,
    mean_logprob,
    openai_logprobs,
    scored_prompt,
    token_name,
    vllm_prompt_logprobs,
)
from gptj_serve.types import EngineRequest, Matrix, Task

CONTINUATION = " jumps — né."


async def _complete(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return response.json()


def _expected(engine: FakeEngine, token_ids: list[int], first: int, num_top: int) -> dict[str, Any]:
    """What the made-up model says of the tokens from `first` on, put into OpenAI's shape by hand."""
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for index in range(first, len(token_ids)):
        if index == 0:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        logprobs = engine.logprobs_after(token_ids[:index])
        best = sorted(range(len(logprobs)), key=lambda token_id: -logprobs[token_id])[:num_top]
        token_logprobs.append(float(logprobs[token_ids[index]]))
        top_logprobs.append(
            {
                token_name(engine.tokenizer, token_id): float(logprobs[token_id])
                for token_id in [*best, token_ids[index]]
            }
        )
    return {
        "tokens": [token_name(engine.tokenizer, token_id) for token_id in token_ids[first:]],
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
    }


# ── of the completion ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
async def test_logprobs_of_a_completion(client: httpx.AsyncClient, engine: FakeEngine, num_top: int) -> None:
    engine.script["The fox"] = CONTINUATION
    body = await _complete(client, prompt="The fox", max_tokens=40, logprobs=num_top)
    prompt, (end,) = engine.tokenizer.encode("The fox"), engine.model.eos_token_ids
    token_ids = [*prompt, *engine.tokenizer.encode(CONTINUATION), end]
    logprobs = body["choices"][0]["logprobs"]
    offsets = logprobs.pop("text_offset")
    assert logprobs == _expected(engine, token_ids, len(prompt), num_top)
    assert all(len(top) in (max(num_top, 1), num_top + 1) for top in logprobs["top_logprobs"])
    text = body["choices"][0]["text"]
    assert "prompt_logprobs" not in body["choices"][0]
    _check_offsets(engine, text, logprobs["tokens"], offsets)


def _check_offsets(engine: FakeEngine, text: str, names: list[str], offsets: list[int]) -> None:
    """Whole tokens stand in the text where their offsets say."""
    assert offsets == sorted(offsets)
    for name, offset in zip(names, offsets, strict=True):
        if not name.startswith("bytes:") and name != SPECIAL_TOKEN:
            assert text[offset : offset + len(name)] == name


async def test_tokens_that_are_no_text_have_names_of_their_own(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = "a👩b"
    body = await _complete(client, prompt="The fox", max_tokens=40, logprobs=0)
    logprobs = body["choices"][0]["logprobs"]
    (end,) = engine.model.eos_token_ids
    names = ["a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x91", "bytes:\\xa9", "b", token_name(engine.tokenizer, end)]
    assert logprobs["tokens"] == names
    assert logprobs["text_offset"] == [0, 1, 1, 1, 1, 2, 3]


def test_no_two_tokens_share_a_name() -> None:
    """Else one of them would be missing from `top_logprobs`."""
    tokenizer = small_tokenizer()
    names = [token_name(tokenizer, token_id) for token_id in range(tokenizer.num_token_ids + HOLE)]
    assert len(set(names)) == len(names)
    assert SPECIAL_TOKEN in names


async def test_minus_infinity_is_a_number_in_json(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.head_logits = lambda request: [[-float("inf"), 5.0, -float("inf")]] * len(request.continuation_token_ids)
    body = await _complete(client, prompt=[1, 2, 3], max_tokens=0, logprobs=1, echo=True)
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, MIN_LOGPROB, MIN_LOGPROB]


# ── of the prompt ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("num_top", [0, 1, 3])
async def test_echo_with_logprobs(client: httpx.AsyncClient, engine: FakeEngine, max_tokens: int, num_top: int) -> None:
    body = await _complete(
        client, prompt="The fox — né", max_tokens=max_tokens, logprobs=num_top, echo=True, return_token_ids=True, seed=1
    )
    (choice,) = body["choices"]
    prompt = engine.tokenizer.encode("The fox — né")
    assert choice["text"].startswith("The fox — né")
    assert len(choice["token_ids"]) == max_tokens
    offsets = choice["logprobs"].pop("text_offset")
    assert choice["logprobs"] == _expected(engine, [*prompt, *choice["token_ids"]], 0, num_top)
    _check_offsets(engine, choice["text"], choice["logprobs"]["tokens"], offsets)
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == max_tokens
    assert [request.task for request in engine.requests] == [Task.GENERATE if max_tokens else Task.SCORE]


async def test_scoring_asks_for_all_tokens_but_the_first(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 0, "logprobs": 2, "echo": True, "n": 2}
    await _complete(client, **body, priority=3, cache_salt="pepper")
    asked = [(r.prompt_token_ids, r.continuation_token_ids, r.num_top_logprobs) for r in engine.requests]
    assert asked == [([1], [2, 3], 2), ([4], [5], 2)], "each prompt once"
    assert {(r.priority, r.cache_salt) for r in engine.requests} == {(3, "pepper")}


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_share_the_scores_of_their_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    body = {"model": "tiny", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 3, "logprobs": 2, "echo": True, "n": 2}
    response = await client.post("/v1/completions", json=body | {"stream": stream, "seed": 1, "ignore_eos": True})
    parts = events(response)[:-1] if stream else [response.json()]
    scored: dict[int, list[Any]] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        scored[choice["index"]] = scored.get(choice["index"], []) + choice["logprobs"]["token_logprobs"]
    assert scored[0][:3] == scored[1][:3] == [None, *(row[0] for row in engine.score_rows([1, 2, 3], 1, 0))]
    assert scored[2][:2] == scored[3][:2] == [None, *(row[0] for row in engine.score_rows([4, 5], 1, 0))]
    assert [len(scored[index]) for index in range(4)] == [6, 6, 5, 5]
    asked = [r.sampling is not None and r.sampling.prompt_logprobs for r in engine.requests]
    assert asked == [True, False, True, False]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_prompt_of_one_token_nothing_is_known(
    client: httpx.AsyncClient, engine: FakeEngine, max_tokens: int, stream: bool
) -> None:
    body = {"model": "tiny", "prompt": [5], "max_tokens": max_tokens, "logprobs": 1, "echo": True, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    choice = (events(response)[0] if stream else response.json())["choices"][0]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 1 + max_tokens
    assert not any(request.sampling and request.sampling.prompt_logprobs for request in engine.requests)
    assert len(engine.requests) == max_tokens


async def test_echo_alone_of_nothing_new_needs_no_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await _complete(client, prompt=["The fox", "The dog"], max_tokens=0, echo=True, n=2)
    assert [choice["text"] for choice in body["choices"]] == ["The fox"] * 2 + ["The dog"] * 2
    assert {choice["logprobs"] for choice in body["choices"]} == {None}
    assert engine.requests == []


async def test_a_prompt_that_fills_the_context_can_be_scored(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await _complete(client, prompt=[1] * 64, max_tokens=0, echo=True, logprobs=0)
    assert len(body["choices"][0]["logprobs"]["token_logprobs"]) == 64
    refused = await client.post(
        "/v1/completions", json={"model": "tiny", "prompt": [1] * 65, "max_tokens": 0, "echo": True}
    )
    assert refused.json()["error"]["param"] == "prompt"


async def test_prompt_logprobs_as_in_vllm(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    token_ids = [1, 2, 3]
    body = await _complete(client, prompt=token_ids, max_tokens=2, prompt_logprobs=2, logprobs=3)
    (choice,) = body["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for index, entries in enumerate(others, 1):
        logprobs = engine.logprobs_after(token_ids[:index])
        best = sorted(range(len(logprobs)), key=lambda token_id: -logprobs[token_id])
        ids = [token_ids[index], *(token_id for token_id in best[:2] if token_id != token_ids[index])]
        assert list(entries) == [str(token_id) for token_id in ids]
        for token_id in ids:
            rank = best.index(token_id) + 1
            assert entries[str(token_id)] == {
                "logprob": float(logprobs[token_id]),
                "rank": rank if rank <= 3 else None,
                "decoded_token": token_name(engine.tokenizer, token_id),
            }
    assert len(choice["logprobs"]["tokens"]) == 2, "without echo the prompt stays out of logprobs"
    assert max(len(top) for top in choice["logprobs"]["top_logprobs"]) >= 3


# ── streamed ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 12])
@pytest.mark.parametrize("stop", [None, ".", "né"])
async def test_streamed_logprobs_concatenate_to_the_whole(
    client: httpx.AsyncClient, engine: FakeEngine, echo: bool, max_tokens: int, stop: str | None
) -> None:
    if not max_tokens and not echo:
        return
    engine.script["The fox"] = CONTINUATION
    body = {
        "model": "tiny",
        "prompt": ["The fox", "a 👩", "c"],
        "max_tokens": max_tokens,
        "stop": stop,
        "logprobs": 2,
        "echo": echo,
        "seed": 3,
        "return_token_ids": True,
    }
    whole = (await client.post("/v1/completions", json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events(await client.post("/v1/completions", json=body | options))
    assert (done, last["usage"]) == ("[DONE]", whole["usage"])
    joined = [
        {
            "index": index,
            "text": "",
            "logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []},
            "token_ids": [],
        }
        for index in range(3)
    ]
    for chunk in chunks:
        (piece,) = chunk["choices"]
        choice = joined[piece["index"]]
        choice["text"] += piece["text"]
        choice["token_ids"] += piece["token_ids"]
        choice["finish_reason"] = piece["finish_reason"]
        for name, values in piece["logprobs"].items():
            choice["logprobs"][name] += values
    assert joined == whole["choices"]
    if max_tokens:
        assert len(chunks) > 6


# ── as clients read it ───────────────────────────────────────────────────────────────────────────────────


async def test_openai_reads_it(app: Any, engine: FakeEngine) -> None:
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http_client) as client:
        completion = await client.completions.create(
            model="tiny", prompt="The fox", max_tokens=3, logprobs=2, echo=True, temperature=0
        )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    num_tokens = len(engine.tokenizer.encode("The fox")) + 3
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.token_logprobs) == num_tokens
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    assert logprobs.top_logprobs[-1] == {
        logprobs.tokens[-1]: logprobs.token_logprobs[-1],
        **logprobs.top_logprobs[-1],
    }


def _read_by_lm_eval(choice: Any, num_context: int) -> tuple[float, bool]:
    """The arithmetic of lm-evaluation-harness' `LocalCompletionsAPI.parse_logprobs`: the last token is generated."""
    token_logprobs = choice["logprobs"]["token_logprobs"][num_context:-1]
    top_logprobs = choice["logprobs"]["top_logprobs"][num_context:-1]
    pairs = zip(token_logprobs, top_logprobs, strict=True)
    return sum(token_logprobs), all(logprob == max(top.values()) for logprob, top in pairs)


async def test_lm_eval_finds_likelihoods_and_what_is_greedy(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    context = [1, 2, 3]
    greedy = list(context)
    for _ in range(3):
        greedy.append(int(engine.logprobs_after(greedy).argmax()))
    other = [*greedy[:-1], greedy[-1] - 1]
    body = await _complete(
        client, prompt=[greedy, other], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for token_ids, is_greedy, choice in zip([greedy, other], [True, False], body["choices"], strict=True):
        rows = engine.score_rows(token_ids, len(context), 0)
        assert _read_by_lm_eval(choice, len(context)) == (sum(row[0] for row in rows), is_greedy)


async def test_a_byte_that_looks_like_the_likeliest_is_not_taken_for_it(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """Both would be U+FFFD as texts; of equal keys in `top_logprobs` only one is left, and lm-eval sees "greedy"."""
    first, second = engine.tokenizer.encode("é")[-1], engine.tokenizer.encode("👩")[0]
    engine.head_logits = lambda request: [[-5.0, float(first), -0.1]]
    body = await _complete(client, prompt=[1, second], max_tokens=0, logprobs=1, echo=True)
    top = body["choices"][0]["logprobs"]["top_logprobs"][1]
    assert sorted(top.values()) == [-5.0, pytest.approx(-0.1)]


# ── Text Generation Inference ────────────────────────────────────────────────────────────────────────────


async def _generate(client: httpx.AsyncClient, **parameters: Any) -> Any:
    response = await client.post("/generate", json={"inputs": "The fox", "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("details", [True, False])
async def test_decoder_input_details(client: httpx.AsyncClient, engine: FakeEngine, details: bool) -> None:
    answer = await _generate(client, decoder_input_details=True, details=details, max_new_tokens=3)
    token_ids = engine.tokenizer.encode("The fox")
    prefill = answer["details"]["prefill"]
    assert [token["id"] for token in prefill] == token_ids
    assert "".join(token["text"] for token in prefill) == "The fox"
    assert prefill[0]["logprob"] is None
    assert [[token["logprob"]] for token in prefill[1:]] == engine.score_rows(token_ids, 1, 0)
    assert "top_tokens" not in answer["details"]


async def test_top_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await _generate(client, top_n_tokens=3, max_new_tokens=4)
    details, prompt = answer["details"], engine.tokenizer.encode("The fox")
    token_ids = [*prompt, *(token["id"] for token in details["tokens"])]
    rows = engine.score_rows(token_ids, len(prompt), 3)
    assert [[t["logprob"], *(x["id"] for x in top), *(x["logprob"] for x in top)] for t, top in _pairs(details)] == rows
    for token, top in _pairs(details):
        assert top[0]["id"] == token["id"], "greedy"
        assert set(top[0]) == set(token) == {"id", "text", "logprob", "special"}
    streamed = events(
        await client.post(
            "/generate_stream", json={"inputs": "The fox", "parameters": {"top_n_tokens": 3, "max_new_tokens": 4}}
        )
    )
    assert [event["top_tokens"] for event in streamed] == details["top_tokens"]


def _pairs(details: Any) -> Any:
    return zip(details["tokens"], details["top_tokens"], strict=True)


# ── the shapes alone ─────────────────────────────────────────────────────────────────────────────────────


@given(st.text(min_size=1, max_size=20))
def test_a_prompts_pieces_are_its_text(text: str) -> None:
    tokenizer = small_tokenizer()
    token_ids = tokenizer.encode(text.encode(errors="replace").decode())
    rows = [[-float(i), 1.0, -0.5] for i in range(1, len(token_ids))]
    tokens = scored_prompt(tokenizer, token_ids, Matrix.of(rows) if rows else None)
    assert "".join(token.text for token in tokens) == tokenizer.decode(token_ids, skip_special_tokens=False)
    assert [token.logprob for token in tokens] == [None, *(-float(i) for i in range(1, len(token_ids)))]
    assert all(token.top == [(1, -0.5)] for token in tokens[1:])
    shape = openai_logprobs(tokenizer, tokens, 1, 0)
    assert {len(values) for values in shape.values()} == {len(token_ids)}
    assert len(vllm_prompt_logprobs(tokenizer, tokens, 1)) == len(token_ids)


def test_the_mean_is_over_what_is_known() -> None:
    assert mean_logprob([ScoredToken(1, "a", -1.0), ScoredToken(2, "b", -2.0)]) == -1.5
    assert mean_logprob([]) == 0.0


async def test_a_scoring_request_that_fails_is_an_error(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    def fail(request: EngineRequest, index: int) -> str | None:
        return "a stage was lost" if request.task is Task.SCORE else None

    engine.fail_at = fail
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 0, "echo": True, "logprobs": 1}
    for stream in (False, True):
        response = await client.post("/v1/completions", json=body | {"stream": stream})
        assert (response.status_code, response.json()["error"]["message"]) == (500, "a stage was lost")
