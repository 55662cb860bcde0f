"""Streams that are cut after any of their events, and taken up again by `Last-Event-ID`."""

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from calls import TEXT, events
from fakes import FakeEngine
from fastapi import FastAPI
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gptj_serve.types import EngineRequest, Event

EMOJI = "So 😀 it 👍🏽 goes é."
USAGE = {"stream_options": {"include_usage": True}}
USAGE_EACH = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "tiny", "prompt": "The fox", "max_tokens": 8, "stream": True, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "The fox"}]
    return "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 8, "stream": True, **fields}


def generation(path: str = "/generate", **parameters: Any) -> tuple[str, dict[str, Any]]:
    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 8, **parameters}}
    return path, body if path == "/generate_stream" else body | {"stream": True}


CASES = {
    "one choice": completion(),
    "greedy": completion(temperature=0, **USAGE),
    "sampled choices": completion(n=3, temperature=1.3, top_k=50, **USAGE),
    "usage in each event": completion(n=3, seed=5, **USAGE_EACH),
    "log-probabilities and ids": completion(n=2, logprobs=2, return_token_ids=True),
    "several prompts": completion(prompt=["The fox", "A dog", "东京"], seed=2**63 - 1),
    "echo": completion(prompt=["The fox", "A dog"], n=2, echo=True, logprobs=1),
    "echo alone": completion(prompt=["The fox", "A"], echo=True, logprobs=1, max_tokens=0, **USAGE),
    "equal choices": completion(n=2, temperature=0),
    "characters over several tokens": completion(prompt="emoji", max_tokens=40, logprobs=0),
    "a stop string": completion(prompt="text", stop=["café", "over it"], max_tokens=40),
    "a stop string that is kept": completion(
        prompt=["text", "emoji"], stop=[" over", "go"], include_stop_str_in_output=True, max_tokens=40
    ),
    "a grammar": completion(n=2, structured_outputs={"regex": "[a-z]+"}),
    "drafts": completion(prompt_lookup_num_tokens=4, n=2),
    "chat": chat(),
    "chat of several": chat(n=3, logprobs=True, top_logprobs=2, return_token_ids=True, **USAGE_EACH),
    "chat with usage": chat(n=2, **USAGE),
    "TGI": generation(),
    "TGI sampled": generation(do_sample=True, top_n_tokens=2, min_new_tokens=6),
    "TGI with all of the text": generation("/generate_stream", return_full_text=True, temperature=0.7),
    "TGI with a stop string": generation("/generate_stream", stop=["the caf", " over"], max_new_tokens=40),
}


@pytest.fixture(autouse=True)
def _scripted(engine: FakeEngine) -> None:
    engine.script |= {"text": TEXT, "emoji": EMOJI}


async def stream(client: httpx.AsyncClient, path: str, body: Any, last_event_id: str | None = None) -> list[str]:
    """Its events as they are on the wire."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    response = await client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return response.text.split("\n\n")[:-1]


def id_of(event: str) -> str:
    data, event_id = event.split("\n")
    assert data.startswith("data: ")
    return event_id.removeprefix("id: ")


def message(path: str, response: httpx.Response) -> str:
    error = response.json()["error"]
    if path.startswith("/v1/"):
        assert error["param"] == "Last-Event-ID"
        return str(error["message"])
    return str(error)


def check_same(came: list[str], whole: list[str]) -> None:
    """Byte for byte, but that choices may be interleaved otherwise; the last events come after all of them."""
    pieces, expected = by_choice(came), by_choice(whole)
    if len(expected) == 1:
        assert came == whole
    assert pieces == expected
    num_closing = len(whole) - sum(map(len, expected.values()))
    assert came[len(came) - num_closing :] == whole[len(whole) - num_closing :]
    assert set(map(id_of, came[-1 - num_closing :])) == set(map(id_of, whole[-1 - num_closing :]))


def by_choice(came: list[str]) -> dict[int, list[str]]:
    """The events of each choice, without what depends on how far the others are: the id, and the usage until then."""
    pieces: dict[int, list[str]] = {}
    for event in came:
        data = event.split("\n")[0].removeprefix("data: ")
        body = json.loads(data) if data != "[DONE]" else {}
        if "token" in body:
            pieces.setdefault(0, []).append(data)
        for choice in body.get("choices", []):
            pieces.setdefault(choice["index"], []).append(re.sub(r',"usage":{[^}]*}', "", data))
    return pieces


@pytest.mark.parametrize("case", CASES)
async def test_the_rest_after_each_event(client: httpx.AsyncClient, case: str) -> None:
    path, body = CASES[case]
    whole = await stream(client, path, body)
    assert len(set(map(id_of, whole))) == len(whole) > 1
    for index, event in enumerate(whole):
        check_same(whole[: index + 1] + await stream(client, path, body, id_of(event)), whole)


@pytest.mark.parametrize("case", CASES)
async def test_ids_are_short_and_plain(client: httpx.AsyncClient, case: str) -> None:
    for event in await stream(client, *CASES[case]):
        event_id = id_of(event)
        assert event_id.isascii()
        assert event_id.isprintable()
        assert " " not in event_id
        assert len(event_id) <= 64 + 10 * 4


@pytest.mark.parametrize("case", ["sampled choices", "chat of several", "TGI sampled"])
async def test_a_client_that_is_cut_after_every_event(client: httpx.AsyncClient, engine: FakeEngine, case: str) -> None:
    path, body = CASES[case]
    came: list[str] = []
    while not came or (rest := await stream(client, path, body, id_of(came[-1]))):
        came.append(rest[0] if came else (await stream(client, path, body))[0])
    check_same([came[0], *await stream(client, path, body, id_of(came[0]))], came)
    seeds = {request.sampling.seed for request in engine.requests if request.sampling is not None}
    assert len(seeds) == body.get("n", 1), "one seed was drawn, and kept"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_body_cut_anywhere(client: httpx.AsyncClient, data: st.DataObject) -> None:
    fields = {
        "n": st.integers(1, 4),
        "max_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0, 0.5, 2]),
        "seed": st.integers(0, 2**63 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=2), min_size=1, max_size=3),
        "stream_options": st.sampled_from([USAGE["stream_options"], USAGE_EACH["stream_options"]]),
        "return_token_ids": st.booleans(),
    }
    path, body = data.draw(st.sampled_from([completion(), chat(), completion(logprobs=1), chat(logprobs=True)]))
    body = body | data.draw(st.fixed_dictionaries({}, optional=fields))
    whole = await stream(client, path, body)
    cut = data.draw(st.integers(0, 99)) % len(whole)
    check_same(whole[: cut + 1] + await stream(client, path, body, id_of(whole[cut])), whole)


class UnsteadyEngine(FakeEngine):
    """Its requests overtake each other, every time in another way."""

    random = random.Random(1)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Event]:
        async for event in super().submit(request):
            for _ in range(self.random.choice([0, 0, 1, 12])):
                await asyncio.sleep(0)
            yield event


class TestChoicesThatOvertakeEachOther:
    @pytest.fixture
    def engine(self, engine: FakeEngine) -> FakeEngine:
        return UnsteadyEngine(engine.model, engine.tokenizer)

    @pytest.mark.parametrize("make", [completion, chat])
    async def test_each_piece_comes_once(self, client: httpx.AsyncClient, make: Callable[..., Any]) -> None:
        path, body = make(n=4, max_tokens=12, return_token_ids=True, **USAGE_EACH)
        first = await stream(client, path, body)
        orders = set()
        for cut in range(len(first)):
            came = first[: cut + 1] + await stream(client, path, body, id_of(first[cut]))
            orders.add(tuple(came))
            check_same(came, first)
            check_usage(came)
        assert len(orders) > 3


def chunks_of(came: list[str]) -> list[Any]:
    assert came[-1].startswith("data: [DONE]\n")
    return [json.loads(event.split("\n")[0][6:]) for event in came[:-1]]


def check_usage(came: list[str]) -> None:
    """Each event tells of the tokens until then."""
    num_tokens = 0
    for chunk in chunks_of(came):
        num_tokens += sum(len(choice.get("token_ids", [])) for choice in chunk["choices"])
        assert chunk["usage"]["completion_tokens"] == num_tokens


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────


ALL_KINDS = [completion(seed=1), chat(seed=1), generation(seed=1), generation("/generate_stream", seed=1)]
WHOLE = [("/v1/completions", {"stream": False}), ("/v1/chat/completions", {"stream": False}), ("/generate", {})]


async def refusal(client: httpx.AsyncClient, path: str, body: Any, event_id: str) -> str:
    response = await client.post(path, json=body, headers={"Last-Event-ID": event_id})
    assert response.status_code == 400, response.text
    said = message(path, response)
    assert said.startswith(f"Last-Event-ID={event_id!r}"[:90])
    return said


@pytest.mark.parametrize("kind", range(len(ALL_KINDS)))
@pytest.mark.parametrize(
    "spoil",
    [
        lambda event_id: "",
        lambda event_id: "17",
        lambda event_id: event_id[:-1],
        lambda event_id: event_id + "0",
        lambda event_id: event_id.upper(),
        lambda event_id: "2" + event_id[1:],
        lambda event_id: event_id.replace(".", ",", 1),
        lambda event_id: f"{event_id}, {event_id}",
        lambda event_id: "1." + "A" * 48 + ".0-0.00000000",
        lambda event_id: "9" * 4000,
    ],
)
async def test_no_id(client: httpx.AsyncClient, kind: int, spoil: Callable[[str], str], engine: FakeEngine) -> None:
    path, body = ALL_KINDS[kind]
    event_id = spoil(id_of((await stream(client, path, body))[2]))
    engine.requests.clear()
    assert "is no id of an event of this service" in await refusal(client, path, body, event_id)
    assert engine.requests == []


@pytest.mark.parametrize("kind", range(3))
async def test_an_id_twice(client: httpx.AsyncClient, kind: int) -> None:
    path, body = ALL_KINDS[kind]
    one, other = map(id_of, (await stream(client, path, body))[:2])
    response = await client.post(path, json=body, headers=[("Last-Event-ID", one), ("Last-Event-ID", other)])
    assert response.status_code == 400
    assert "is no id of an event" in message(path, response)


@pytest.mark.parametrize(
    ("asked", "other"),
    [
        (completion(), completion(prompt="The dog")),
        (completion(), completion(seed=1)),
        (completion(n=2), completion(n=3)),
        (completion(), completion(stop="x")),
        (completion(), chat()),
        (chat(), chat(max_tokens=9)),
        (chat(), generation()),
        (generation(), generation(max_new_tokens=9)),
        (generation(), generation(seed=3)),
    ],
)
async def test_an_id_of_another_request(client: httpx.AsyncClient, engine: FakeEngine, asked: Any, other: Any) -> None:
    event_id = id_of((await stream(client, *asked))[0])
    engine.requests.clear()
    assert "answers another request" in await refusal(client, *other, event_id)
    assert engine.requests == []


async def test_the_same_request_written_otherwise(client: httpx.AsyncClient) -> None:
    path, body = completion()
    whole = await stream(client, path, body)
    rewritten = json.dumps(dict(reversed(body.items())), indent=2) + "\n"
    headers = {"Last-Event-ID": id_of(whole[3]), "Content-Type": "application/json"}
    assert (await client.post(path, content=rewritten, headers=headers)).text == "".join(f"{e}\n\n" for e in whole[4:])


@pytest.mark.parametrize("kind", range(3))
async def test_an_answer_in_one_piece(client: httpx.AsyncClient, engine: FakeEngine, kind: int) -> None:
    (path, body), (whole_path, change) = ALL_KINDS[kind], WHOLE[kind]
    event_id = id_of((await stream(client, path, body))[0])
    engine.requests.clear()
    whole = {name: value for name, value in body.items() if name != "stream"} | change
    assert path == whole_path
    assert "goes with a stream only" in await refusal(client, path, whole, event_id)
    assert engine.requests == []


@pytest.mark.parametrize("script", [" jumps under the café — 東京.", " jumps", TEXT[:-1] + "!"])
@pytest.mark.parametrize("make", [completion, generation])
async def test_an_answer_that_is_another_one_now(
    client: httpx.AsyncClient, engine: FakeEngine, make: Callable[..., Any], script: str
) -> None:
    """As under other weights: nothing of it is sent."""
    path, body = make(max_tokens=40) if make is completion else make(max_new_tokens=40)
    engine.script["The fox"] = TEXT
    whole = await stream(client, path, body)
    engine.script["The fox"] = script
    last = next(event for event in reversed(whole) if "[DONE]" not in event)
    assert "came out otherwise" in await refusal(client, path, body, id_of(last))
    assert await stream(client, path, body, id_of(whole[0])), "what was sent until here is the same"


async def test_equal_choices_that_are_others_now(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    path, body = completion(n=2, temperature=0, max_tokens=40)
    engine.script["The fox"] = TEXT
    whole = await stream(client, path, body)
    engine.script["The fox"] = TEXT.upper()
    assert "came out otherwise" in await refusal(client, path, body, id_of(whole[5]))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_an_id_with_a_character_changed(client: httpx.AsyncClient, data: st.DataObject) -> None:
    path, body = data.draw(st.sampled_from([completion(n=2, seed=1), chat(seed=1, **USAGE), generation(seed=1)]))
    whole = await stream(client, path, body)
    event_id = id_of(whole[data.draw(st.integers(0, 99)) % len(whole)])
    place = data.draw(st.integers(0, 99)) % len(event_id)
    character = data.draw(st.sampled_from("0123456789abcdefXYZ.-_ ,~"))
    assume(character != event_id[place])
    changed = event_id[:place] + character + event_id[place + 1 :]
    response = await client.post(path, json=body, headers={"Last-Event-ID": changed})
    assert response.status_code == 400
    assert "Last-Event-ID=" in message(path, response)


@pytest.mark.parametrize(
    ("path", "body"), [completion(max_time=5), chat(max_time=5), generation(max_time=5), completion(max_time=5, n=2)]
)
async def test_what_ends_by_the_clock_has_no_ids(client: httpx.AsyncClient, path: str, body: Any) -> None:
    response = await client.post(path, json=body)
    assert len(events(response)) > 1
    assert "\nid:" not in response.text
    timed = {**body, "max_time": None} if path != "/generate" else generation()[1]
    event_id = id_of((await stream(client, path, timed))[0])
    assert "max_time ends by the clock" in await refusal(client, path, body, event_id)


# ── failures on the way ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ["one choice", "chat of several", "TGI sampled"])
async def test_a_stream_that_failed_is_taken_up_before_its_error(
    client: httpx.AsyncClient, engine: FakeEngine, case: str
) -> None:
    path, body = CASES[case]
    engine.fail_at = lambda request, index: "the stages are gone" if index == 4 else None
    *came, error = await stream(client, path, body)
    assert "the stages are gone" in error
    assert "\nid:" not in error
    response = await client.post(path, json=body, headers={"Last-Event-ID": id_of(came[-1])})
    assert "the stages are gone" in response.text
    engine.fail_at = lambda request, index: None
    came += await stream(client, path, body, id_of(came[-1]))
    check_same([came[0], *await stream(client, path, body, id_of(came[0]))], came)


async def test_another_process_goes_on(
    app_with: Callable[..., FastAPI], client_of: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    path, body = CASES["sampled choices"]
    one, other = client_of(app_with()), client_of(app_with())
    whole = await stream(one, path, body)
    check_same(whole[:8] + await stream(other, path, body, id_of(whole[7])), whole)


async def test_what_is_computed_again_is_paid_again(
    app_with: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], httpx.AsyncClient],
    tmp_path: Path,
) -> None:
    async def left() -> int:
        response = await client.post("/tokenize", json={"model": "tiny", "prompt": "x"})
        return int(response.headers["x-ratelimit-remaining-tokens"])

    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "a", "key": "key-of-a-client", "max_tokens_per_minute": 60}]}))
    client = client_of(app_with(api_keys_file=str(keys)))
    client.headers["X-API-Key"] = "key-of-a-client"

    path, body = completion(temperature=0, **USAGE)
    whole = await stream(client, path, body)
    before = await left()
    rest = await stream(client, path, body, id_of(whole[-3]))
    after = await left()
    usage = chunks_of(rest)[-1]["usage"]
    assert usage == chunks_of(whole)[-1]["usage"], "the answer is counted once"
    assert before - after == pytest.approx(usage["total_tokens"], abs=3)  # tokens come back with time
