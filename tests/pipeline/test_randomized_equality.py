"""Random requests, served all at once over random engines, against transformers' generate for each of them alone.

Greedy and beam search with every processor that transformers has for them. `pytest -m large` runs thousands.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJForCausalLM
from transformers.utils import logging as transformers_logging

import gptj_serve
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import (
    BeamEvent,
    BeamParams,
    EarlyStopping,
    EngineRequest,
    FailureEvent,
    SamplingParams,
    Task,
    TokenEvent,
    is_terminal,
)

DEMO = Path(gptj_serve.__file__).parent / "demo"
EARLY_STOPPING = {EarlyStopping.HEURISTIC: False, EarlyStopping.FIRST: True, EarlyStopping.NEVER: "never"}
MAX_PROMPT = 40
MAX_NEW = 12
REQUESTS_PER_ENGINE = 40


@dataclass(frozen=True)
class Case:
    """One request in both languages."""

    prompt: list[int]
    theirs: dict[str, Any]
    ours: SamplingParams
    num_cancelled_after: int | None  # close the stream after so many events


@dataclass
class Model:
    """A checkpoint with its oracle, and the token ids that come up often enough to be worth forbidding."""

    directory: Path
    oracle: GPTJForCausalLM
    vocab_size: int
    frequent: list[int]
    eos: int


@pytest.fixture(scope="module")
def models(tiny_gptj) -> list[Model]:
    shapes = [
        {},
        {"n_layer": 4, "n_head": 2, "rotary_dim": 8, "activation_function": "gelu", "vocab_size": 50},
        {"n_layer": 5, "n_embd": 48, "rotary_dim": 12, "n_inner": 64, "layer_norm_epsilon": 1e-3},
    ]
    return [load(tiny_gptj(**shape)) for shape in shapes] + [load(DEMO)]


def load(directory: Path) -> Model:
    transformers_logging.set_verbosity_error()
    oracle = GPTJForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = oracle.generation_config.pad_token_id = None
    chance = random.Random(5)
    counts: dict[int, int] = {}
    for _ in range(12):
        ids = torch.tensor([[chance.randrange(1, oracle.config.vocab_size) for _ in range(6)]])
        for token in oracle.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 6:].tolist():
            counts[token] = counts.get(token, 0) + 1
    frequent = sorted(counts, key=lambda token: -counts[token])[:12]
    return Model(directory, oracle, oracle.config.vocab_size, frequent, eos=frequent[3])


def draw_case(
    model: Model, chance: random.Random, shared: list[list[int]], max_sequences: int, *, is_plain: bool
) -> Case:
    prompt = [*chance.choice(shared), *(draw_token(model, chance) for _ in range(chance.randint(0, 6)))]
    prompt = (prompt or [draw_token(model, chance)])[:MAX_PROMPT]
    max_new = chance.randint(1, MAX_NEW)
    theirs: dict[str, Any] = {"max_new_tokens": max_new, "eos_token_id": model.eos}
    ours: dict[str, Any] = {"max_new_tokens": max_new}

    def maybe(probability: float) -> bool:
        return chance.random() < probability and not is_plain

    def tokens(count: int) -> list[int]:
        return [draw_token(model, chance) for _ in range(count)]

    def both(name: str, value: Any) -> None:
        theirs[name] = ours[name] = value

    if maybe(0.2):
        both("min_new_tokens", chance.randint(0, max_new))
    if maybe(0.25):
        both("repetition_penalty", chance.choice([0.7, 1.2, 1.8, 3.0]))
    if maybe(0.25):
        both("no_repeat_ngram_size", chance.randint(1, 4))
    if maybe(0.2):
        both("bad_words_ids", [tokens(chance.randint(1, 3)) for _ in range(chance.randint(1, 4))])
    if maybe(0.2):
        both("suppress_tokens", sorted(set(tokens(chance.randint(1, 5)))))
    if maybe(0.15):
        both("begin_suppress_tokens", sorted(set(tokens(chance.randint(1, 5)))))
    if maybe(0.2):
        both("exponential_decay_length_penalty", (chance.randint(0, 6), chance.choice([1.05, 1.3, 2.0])))
    if maybe(0.2):
        biases = {tuple(tokens(chance.randint(1, 3))): chance.choice([-4.0, -0.5, 1.0, 6.0]) for _ in range(3)}
        theirs["sequence_bias"] = biases
        ours["sequence_bias"] = [(list(ids), bias) for ids, bias in biases.items()]
    suppressed = ours.get("suppress_tokens", [])  # transformers refuses to force these
    if maybe(0.1) and (forced := draw_token(model, chance)) not in suppressed:
        both("forced_bos_token_id", forced)
    # Forced and forbidden at the beginning at once, transformers generates token 0.
    if maybe(0.1) and model.eos not in [*suppressed, *ours.get("begin_suppress_tokens", [])]:
        theirs["forced_eos_token_id"] = model.eos
        ours["forced_eos_token_id"] = [model.eos]
    if max_sequences > 1 and maybe(0.4):
        num_beams = chance.randint(2, max_sequences)
        early_stopping = chance.choice(list(EARLY_STOPPING))
        length_penalty = chance.choice([1.0, 1.0, 0.0, 2.0, -1.0])
        theirs |= {"num_beams": num_beams, "early_stopping": EARLY_STOPPING[early_stopping]}
        theirs["length_penalty"] = length_penalty
        ours["beams"] = BeamParams(num_beams=num_beams, early_stopping=early_stopping, length_penalty=length_penalty)
    elif max_sequences > 1 and maybe(0.2):
        scale = chance.choice([0.5, 1.5, 3.0])
        negative = tokens(chance.randint(0, 10))
        theirs["guidance_scale"] = ours["guidance_scale"] = scale
        ours["negative_prompt_token_ids"] = negative
        if negative:
            theirs["negative_prompt_ids"] = torch.tensor([negative])
    elif maybe(0.5):
        ours["prompt_lookup_num_tokens"] = chance.randint(1, 6)  # may not change anything
    cancelled = chance.randint(0, 3) if chance.random() < 0.1 else None
    return Case(prompt, theirs, SamplingParams(**ours), cancelled)


def draw_token(model: Model, chance: random.Random) -> int:
    return chance.choice(model.frequent) if chance.random() < 0.6 else chance.randrange(model.vocab_size)


def expected(model: Model, case: Case) -> list[int]:
    ids = torch.tensor([case.prompt])
    out = model.oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **case.theirs
    )
    return out[0, len(case.prompt) :].tolist()


def num_blocks_of(case: Case, block_size: int) -> int:
    """That is enough for the case alone, whatever its beams have in common."""
    length = max(len(case.prompt), len(case.ours.negative_prompt_token_ids)) + case.ours.max_new_tokens
    num_sequences = case.ours.beams.num_beams if case.ours.beams else 1 + (case.ours.guidance_scale != 1)
    return num_sequences * -(-length // block_size)


def draw_engine(
    model: Model, cases: list[Case], chance: random.Random, *, ahead: bool
) -> tuple[Scheduler, InProcessPipeline]:
    """Any number of stages, or one that is scheduled ahead, and so few KV blocks that requests are preempted."""
    checkpoint = Checkpoint.open(model.directory)
    config = checkpoint.config
    num_stages = 1 if ahead else chance.randint(1, 4)
    are_wide = any(case.ours.beams or case.ours.guidance_scale != 1 for case in cases)
    block_size, num_spare, max_num_sequences, max_microbatch_tokens = 1, 0, 64, 64
    if are_wide:
        block_size = chance.choice([1, 1, 2, 4, 16])
        num_spare = chance.choice([0, 0, 3, 200])
        max_num_sequences = chance.choice([8, 64])
        max_microbatch_tokens = chance.choice([8, 24, 64, 512])
    num_blocks = max(num_blocks_of(case, block_size) for case in cases) + num_spare
    runners = [
        StageRunner.load(
            checkpoint,
            StageSpec(span, num_blocks, block_size, torch.float32, torch.device("cpu"), config.vocab_size),
        )
        for span in partition(config.n_layer, num_stages, head_cost(config))
    ]
    limits = SchedulerLimits(
        num_stages, max_num_sequences, max_microbatch_tokens, config.n_positions, schedules_ahead=ahead
    )
    blocks = KVBlocks(num_blocks, block_size, reuse_prefixes=chance.random() < 0.8)
    return Scheduler(limits, blocks, frozenset({model.eos})), InProcessPipeline(runners)


async def serve(
    model: Model, cases: list[Case], chance: random.Random, seen: Counter[str], *, ahead: bool
) -> list[list[int] | None]:
    """Each case's tokens, or None where the stream was closed early; `seen` adds up the engine's counters."""
    scheduler, pipeline = draw_engine(model, cases, chance, ahead=ahead)
    try:
        async with LocalEngine(scheduler, pipeline) as engine:
            delays = [chance.choice([0, 0, 0, chance.random() * 0.1]) for _ in cases]
            requests = [
                EngineRequest(
                    request_id=str(index),
                    task=Task.GENERATE,
                    prompt_token_ids=case.prompt,
                    sampling=case.ours,
                    priority=chance.randint(-2, 2),
                )
                for index, case in enumerate(cases)
            ]
            answers = await asyncio.gather(*map(answer, [engine] * len(cases), requests, cases, delays))
            seen.update(engine.stats().as_dict())
        scheduler.check_integrity()
        assert scheduler.blocks.num_used == 0
        return answers
    finally:
        pipeline.close()


async def answer(engine: LocalEngine, request: EngineRequest, case: Case, delay_s: float) -> list[int] | None:
    await asyncio.sleep(delay_s)
    tokens: list[int] = []
    num_terminal = 0
    async with aclosing(engine.submit(request)) as events:
        num_events = 0
        async for event in events:
            if num_events == case.num_cancelled_after:
                return None
            num_events += 1
            assert not isinstance(event, FailureEvent), event
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
            elif isinstance(event, BeamEvent):
                tokens = event.beams[0].token_ids
            num_terminal += is_terminal(event)
    assert num_terminal == 1
    return tokens


def compare(
    models: list[Model], seed: int, num_requests: int, seen: Counter[str], *, ahead: bool = False
) -> Iterator[str]:
    """Descriptions of all mismatches. `ahead`: on single stages scheduled ahead, of which most serve plain requests
    alone."""
    chance = random.Random(seed)
    num_compared = 0
    while num_compared < num_requests:
        model = chance.choice(models)
        shared = [[], *([draw_token(model, chance) for _ in range(chance.randint(1, 34))] for _ in range(2))]
        max_sequences = chance.choice([1, 2, 8]) if num_compared else 1  # of a request
        num_cases = min(REQUESTS_PER_ENGINE, num_requests - num_compared)
        are_plain = ahead and chance.random() < 0.8
        cases = [draw_case(model, chance, shared, max_sequences, is_plain=are_plain) for _ in range(num_cases)]
        answers = asyncio.run(serve(model, cases, chance, seen, ahead=ahead))
        for case, tokens in zip(cases, answers, strict=True):
            if tokens is not None and tokens != (reference := expected(model, case)):
                yield f"{model.directory}: {case}\n  ours   {tokens}\n  theirs {reference}"
        num_compared += len(cases)


def test_what_is_served_is_what_transformers_generates(models: list[Model]) -> None:
    seen: Counter[str] = Counter()
    mismatches = list(compare(models, 2, 120, seen))
    assert not mismatches, "\n".join(mismatches)
    for counter in ("preemptions", "prefix_tokens_reused", "draft_tokens_accepted", "requests_aborted"):
        assert seen[f"num_{counter}"] > 0, counter
    assert seen["num_requests_failed"] == 0


def test_what_a_stage_scheduled_ahead_serves_is_what_transformers_generates(models: list[Model]) -> None:
    seen: Counter[str] = Counter()
    mismatches = list(compare(models, 3, 80, seen, ahead=True))
    assert not mismatches, "\n".join(mismatches)
    for counter in ("preemptions", "prefix_tokens_reused", "requests_aborted", "rows_ahead", "rows_ahead_wasted"):
        assert seen[f"num_{counter}"] > 0, counter
    assert seen["num_requests_failed"] == 0


@pytest.mark.large
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(10, 20))
def test_thousands_of_requests(models: list[Model], seed: int, ahead: bool) -> None:
    mismatches = list(compare(models, seed, 250, Counter(), ahead=ahead))
    assert not mismatches, "\n".join(mismatches)
