"""Grammars through the whole engine over real stages: every text matches, whoever else is in the batch."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch

import gptj_serve
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import InvalidRequestError
from gptj_serve.grammar import GrammarCompiler
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import (
    BeamEvent,
    BeamParams,
    EngineRequest,
    FailureEvent,
    FinishReason,
    Grammar,
    GrammarKind,
    SamplingParams,
    Task,
    TokenEvent,
    Warpers,
)

DEMO = Path(gptj_serve.__file__).parent / "demo"
BLOCK_SIZE = 8
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
REGEX = Grammar(GrammarKind.REGEX, "[A-Z][a-z]{2,5}( [a-z]{1,4}){2}[.!]")
CHOICE = Grammar(GrammarKind.CHOICE, json.dumps(["yes", "no", "naïve café"]))
LARK = Grammar(GrammarKind.LARK, 'start: "(" item ")"\nitem: /x{1,3}/ | "[" item "]"')


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


def request(request_id: str, prompt: list[int], grammar: Grammar | None, **params: object) -> EngineRequest:
    sampling = SamplingParams(**{"max_new_tokens": 60, "grammar": grammar, **params})  # type: ignore[arg-type]
    return EngineRequest(request_id=request_id, task=Task.GENERATE, prompt_token_ids=prompt, sampling=sampling)


async def serve(tokenizer: Tokenizer, requests: list[EngineRequest], num_blocks: int) -> list[list[int]]:
    """Each request's tokens; of a beam search the best one's."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(DEMO)
    config = checkpoint.config
    num_token_ids = min(tokenizer.num_token_ids, config.vocab_size)
    runners = [
        StageRunner.load(
            checkpoint, StageSpec(span, num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"), num_token_ids)
        )
        for span in partition(config.n_layer, 2, head_cost(config))
    ]
    pipeline = InProcessPipeline(runners)
    scheduler = Scheduler(
        SchedulerLimits(2, 16, 64, config.n_positions), KVBlocks(num_blocks, BLOCK_SIZE), config.eos_token_ids
    )
    compiler = GrammarCompiler(tokenizer, config.eos_token_ids)

    async def answer(engine: LocalEngine, request: EngineRequest) -> list[int]:
        tokens = list(request.output_token_ids)
        last = None
        async for event in engine.submit(request):
            assert not isinstance(event, FailureEvent), event
            last = event
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
        if isinstance(last, BeamEvent):
            return last.beams[0].token_ids
        if request.sampling is not None and request.sampling.grammar is not None:
            assert isinstance(last, TokenEvent)
            assert last.finish_reason is FinishReason.EOS
        return tokens

    try:
        async with LocalEngine(scheduler, pipeline, compiler.compile_async) as engine:
            answers = await asyncio.gather(*[answer(engine, request) for request in requests])
            assert scheduler.blocks.num_used == 0
            return answers
    finally:
        pipeline.close()


def matches(text: str, grammar: Grammar) -> bool:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            person = json.loads(text)
            return set(person) == {"name", "age"} and len(person["name"]) <= 6 and 0 <= person["age"] <= 99
        case GrammarKind.REGEX:
            return re.fullmatch(grammar.text, text) is not None
        case GrammarKind.CHOICE:
            return text in json.loads(grammar.text)
        case GrammarKind.LARK:
            return re.fullmatch(r"\((\[*)x{1,3}(\]*)\)", text) is not None and text.count("[") == text.count("]")


async def test_texts_match_their_grammars_and_others_are_what_they_are_alone(tokenizer: Tokenizer) -> None:
    requests = []
    for index, prompt in enumerate(("The name is ", "Answer: ", "Once upon a time")):
        ids = tokenizer.encode(prompt)
        drawn = {"warpers": Warpers(temperature=0.9), "seed": index}
        requests.append(request(f"{index} free", ids, None, max_new_tokens=12))
        requests.append(request(f"{index} json", ids, JSON, **drawn))
        requests.append(request(f"{index} regex", ids, REGEX))
        requests.append(request(f"{index} choice", ids, CHOICE, repetition_penalty=1.3))
        requests.append(request(f"{index} guided", ids, CHOICE, guidance_scale=2.0))
        requests.append(request(f"{index} beams", ids, REGEX, beams=BeamParams(num_beams=3)))
        requests.append(request(f"{index} lark", ids, LARK, **drawn))
    together = await serve(tokenizer, requests, num_blocks=40)
    for one, tokens in zip(requests, together, strict=True):
        assert one.sampling is not None
        if one.sampling.grammar is not None:
            text = tokenizer.decode([token for token in tokens if token not in tokenizer.special_token_ids])
            assert matches(text, one.sampling.grammar), (one.request_id, text)
    alone = [(await serve(tokenizer, [one], num_blocks=128))[0] for one in requests[:4]]
    assert alone == together[:4]


async def test_a_replayed_request_goes_on_in_its_grammar(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The name is ")
    (whole,) = await serve(tokenizer, [request("a", ids, JSON)], num_blocks=40)
    resumed = EngineRequest(
        request_id="b",
        task=Task.GENERATE,
        prompt_token_ids=ids,
        output_token_ids=whole[:5],
        sampling=SamplingParams(max_new_tokens=60, grammar=JSON),
    )
    assert await serve(tokenizer, [resumed], num_blocks=40) == [whole]


async def test_a_bad_grammar_is_refused_beside_a_good_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Answer: ")
    bad = request("bad", ids, Grammar(GrammarKind.REGEX, "a("))
    with pytest.raises(InvalidRequestError, match="grammar"):
        await serve(tokenizer, [bad], num_blocks=40)
