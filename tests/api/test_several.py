"""Several sequences of one prompt: the best of some, beams, all of them."""

from typing import Any

import httpx
from calls import events
from fakes import FakeEngine

from gptj_serve.types import FinishReason


async def _complete(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "The fox", "seed": 7, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def _generate(client: httpx.AsyncClient, **parameters: Any) -> Any:
    body = {"inputs": "The fox", "parameters": {"seed": 7, "max_new_tokens": 5, **parameters}}
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ── the best of several ──────────────────────────────────────────────────────────────────────────────────


async def test_the_best_completions_by_mean_logprob(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body: dict[str, Any] = {"prompt": ["The fox", "c"], "max_tokens": 6, "logprobs": 0}
    separate = []
    for seed in range(7, 11):  # two prompts with two candidates each: one seed after the other
        prompt = "The fox" if seed < 9 else "c"
        separate.append((await _complete(client, **body | {"prompt": prompt}, seed=seed))["choices"][0])
    engine.requests.clear()
    answer = await _complete(client, **body, n=1, best_of=2)
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9, 10]
    for choice, candidates in zip(answer["choices"], [separate[:2], separate[2:]], strict=True):
        best = max(candidates, key=lambda candidate: _mean(candidate["logprobs"]["token_logprobs"]))
        assert (choice["text"], choice["logprobs"]) == (best["text"], best["logprobs"])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    num_made = sum(len(candidate["logprobs"]["tokens"]) for candidate in separate)
    assert answer["usage"]["completion_tokens"] == num_made, "what was not chosen has been generated too"


async def test_the_n_best_come_best_first(client: httpx.AsyncClient) -> None:
    every = (await _complete(client, n=4, logprobs=0))["choices"]
    means = {choice["text"]: _mean(choice["logprobs"]["token_logprobs"]) for choice in every}
    best = (await _complete(client, n=2, best_of=4))["choices"]
    assert [choice["text"] for choice in best] == sorted(means, key=lambda text: -means[text])[:2]
    assert [choice["index"] for choice in best] == [0, 1]
    same = (await _complete(client, n=4, best_of=4, logprobs=0))["choices"]
    assert same == every, "with nothing to choose the order stays that of the seeds"


async def test_length_does_not_decide(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """A sum of log-probabilities would favour what ends early, whatever it says."""
    engine.end_at = lambda request, index: FinishReason.LENGTH if request.sampling.seed % 2 and index == 0 else None
    body: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    chosen = set()
    for seed in range(1, 20, 2):
        both = (await _complete(client, n=2, logprobs=0, seed=seed, **body))["choices"]
        assert [len(choice["logprobs"]["tokens"]) for choice in both] == [1, 8]
        means = [_mean(choice["logprobs"]["token_logprobs"]) for choice in both]
        (best,) = (await _complete(client, best_of=2, seed=seed, **body))["choices"]
        assert best["text"] == both[means.index(max(means))]["text"]
        chosen.add(means.index(max(means)))
    assert chosen == {0, 1}


async def test_best_of_as_in_text_generation_inference(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    alone = [await _generate(client, seed=seed, do_sample=True, details=True) for seed in (7, 8, 9)]
    engine.requests.clear()
    answer = await _generate(client, best_of=3, do_sample=True, details=True, decoder_input_details=True)
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9]
    best, *others = sorted(alone, key=lambda one: -_mean([token["logprob"] for token in one["details"]["tokens"]]))
    details = answer["details"]
    rest = details.pop("best_of_sequences")
    assert [token["id"] for token in details.pop("prefill")] == engine.tokenizer.encode("The fox")
    assert (answer["generated_text"], details) == (best["generated_text"], _without_prefill(best["details"]))
    assert len(rest) == len(others) == 2
    for sequence in rest:
        text = sequence.pop("generated_text")
        assert sequence.pop("prefill")
        assert (text, sequence) in [(one["generated_text"], _without_prefill(one["details"])) for one in others]
    plain = await _generate(client, best_of=3, do_sample=True)
    assert plain == {"generated_text": best["generated_text"]}


def _without_prefill(details: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in details.items() if name != "prefill"}


async def test_all_of_several(client: httpx.AsyncClient) -> None:
    alone = [await _generate(client, seed=seed, do_sample=True, details=True) for seed in (7, 8, 9)]
    assert await _generate(client, num_return_sequences=3, do_sample=True, details=True) == alone


# ── beams ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_beams_are_the_choices(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " jumps — né"
    answer = await _complete(
        client, prompt=["The fox", "c"], use_beam_search=True, n=2, best_of=2, return_token_ids=True
    )
    (end,) = engine.model.eos_token_ids
    scripted = [*engine.tokenizer.encode(" jumps — né"), end]
    others = [[1, 0], [1, 0], [1, 1]]
    decode = engine.tokenizer.decode
    assert answer["choices"] == [
        {
            "index": index,
            "text": decode(ids),
            "logprobs": None,
            "finish_reason": "stop" if ids == scripted else "length",
            "token_ids": ids,
        }
        for index, ids in enumerate([scripted, *others])
    ]
    assert len(engine.requests) == 2, "one request for each prompt"
    assert answer["usage"]["completion_tokens"] == len(scripted) + 6


async def test_beams_after_an_echo(client: httpx.AsyncClient) -> None:
    answer = await _complete(client, use_beam_search=True, n=2, echo=True)
    assert all(choice["text"].startswith("The fox") for choice in answer["choices"])


async def test_beams_as_in_text_generation_inference(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script["The fox"] = " né"
    assert await _generate(client, num_beams=4) == {"generated_text": " né"}
    answer = await _generate(client, num_beams=4, details=True, return_full_text=True)
    (end,) = engine.model.eos_token_ids
    token_ids = [*engine.tokenizer.encode(" né"), end]
    tokens = [
        {"id": token_id, "text": text, "logprob": None, "special": token_id == end}
        for token_id, text in zip(token_ids, [*_texts(engine, token_ids[:-1]), ""], strict=True)
    ]
    assert answer == {
        "generated_text": "The fox né",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": len(token_ids),
            "seed": None,
            "prefill": [],
            "tokens": tokens,
            "beam_score": -0.5,
        },
    }


def _texts(engine: FakeEngine, token_ids: list[int]) -> list[str]:
    texts = []
    for index in range(len(token_ids)):
        before, now = (engine.tokenizer.decode(token_ids[:end]).rstrip("\ufffd") for end in (index, index + 1))
        texts.append(now[len(before) :])
    return texts


async def test_a_list_of_beams(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answers = await _generate(client, num_beams=4, num_return_sequences=3)
    assert answers == [{"generated_text": engine.tokenizer.decode([1, index])} for index in range(3)]
    assert len(engine.requests) == 1


async def test_a_beam_search_that_fails(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_at = lambda request, index: "a stage was lost"
    body = {"model": "tiny", "prompt": "The fox", "use_beam_search": True, "n": 2}
    response = await client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "a stage was lost")


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_time_is_a_length(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.end_at = lambda request, index: FinishReason.TIME if index == 2 else None
    (choice,) = (await _complete(client, max_time=1))["choices"]
    assert choice["finish_reason"] == "length"
    answer = await _generate(client, max_time=1, details=True)
    assert (answer["details"]["finish_reason"], answer["details"]["generated_tokens"]) == ("length", 3)
    streamed = events(await client.post("/generate_stream", json={"inputs": "The fox", "parameters": {"max_time": 1}}))
    assert streamed[-1]["details"]["finish_reason"] == "length"
