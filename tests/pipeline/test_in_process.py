"""The whole engine over real stages in this process: batched = alone, N stages = 1 stage, cached = uncached, and all
of it = transformers in fp32, also when KV blocks run out."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import PipelineError
from gptj_serve.kernels.choice import Kernels
from gptj_serve.kernels.cpu_layers import BLOCK_SIZE as CPU_BLOCK_SIZE
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadInfo, HeadKind, fingerprint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, Row, RowOutput, RowResult, SampleSpec
from gptj_serve.types import (
    EngineRequest,
    FailureEvent,
    FinishReason,
    HeadEvent,
    Pooling,
    SamplingParams,
    Task,
    TokenEvent,
    Warpers,
)

BLOCK_SIZE = 4
MAX_NEW_TOKENS = 12
NUM_PROMPTS = 24
N_POSITIONS = 96  # of the tiny checkpoint
EOS = 41  # a token that the tiny model says now and then
PLENTY = 400  # KV blocks
SCARCE = N_POSITIONS // BLOCK_SIZE + 2
SCARCE_ON_OUR_KERNELS = N_POSITIONS // CPU_BLOCK_SIZE + 2

ENGINES = [(1, PLENTY, "torch"), (3, SCARCE, "torch"), (3, SCARCE_ON_OUR_KERNELS, "auto")]


@pytest.fixture(scope="module")
def directory(tiny_gptj) -> Path:
    return tiny_gptj()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    lengths = [1, 2, N_POSITIONS - MAX_NEW_TOKENS, *(rng.randint(1, 70) for _ in range(NUM_PROMPTS - 3))]
    return [[rng.randrange(1, 96) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def greedy_reference(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt alone through transformers' generate."""
    model = GPTJForCausalLM.from_pretrained(directory).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=EOS
        )
        answers.append(out[0, len(prompt) :].tolist())
    assert len({token for answer in answers for token in answer}) > 20  # not the same one over and over
    assert any(len(answer) < MAX_NEW_TOKENS for answer in answers)  # some meet the end token
    return answers


def block_size(kernels: Kernels) -> int:
    """Small ones have more ends to get wrong."""
    return CPU_BLOCK_SIZE if kernels == "auto" else BLOCK_SIZE


def make_runners(directory: Path, num_stages: int, num_kv_blocks: int, kernels: Kernels = "torch") -> list[StageRunner]:
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    cpu = torch.device("cpu")
    return [
        StageRunner.load(
            checkpoint,
            StageSpec(span, num_kv_blocks, block_size(kernels), torch.float32, cpu, config.vocab_size, kernels=kernels),
        )
        for span in partition(config.n_layer, num_stages, head_cost(config))
    ]


@asynccontextmanager
async def serving(
    directory: Path,
    *,
    num_stages: int = 1,
    num_kv_blocks: int = PLENTY,
    max_microbatch_tokens: int = 64,
    kernels: Kernels = "torch",
    schedules_ahead: bool = False,
) -> AsyncGenerator[LocalEngine]:
    pipeline = InProcessPipeline(make_runners(directory, num_stages, num_kv_blocks, kernels))
    limits = SchedulerLimits(num_stages, 64, max_microbatch_tokens, N_POSITIONS, schedules_ahead=schedules_ahead)
    scheduler = Scheduler(limits, KVBlocks(num_kv_blocks, block_size(kernels)), frozenset({EOS}))
    try:
        async with LocalEngine(scheduler, pipeline) as engine:
            yield engine
            scheduler.check_integrity()
            assert scheduler.blocks.num_used == 0
    finally:
        pipeline.close()


async def num_preemptions(engine: LocalEngine) -> int:
    return engine.stats().as_dict()["num_preemptions"]


def generate_request(request_id: str, prompt: list[int], **sampling: object) -> EngineRequest:
    warpers = Warpers(**{name: sampling.pop(name) for name in ("temperature", "top_k", "top_p") if name in sampling})
    params = SamplingParams(**{"max_new_tokens": MAX_NEW_TOKENS, "warpers": warpers, **sampling})
    return EngineRequest(request_id=request_id, task=Task.GENERATE, prompt_token_ids=prompt, sampling=params)


def long_requests(prompts: list[list[int]]) -> list[EngineRequest]:
    """Requests that outgrow a scarce pool."""
    return [
        generate_request(f"long {i}", prompt, max_new_tokens=N_POSITIONS - 70, ignore_eos=True)
        for i, prompt in enumerate(prompts[3:13])
    ]


async def generate(engine: LocalEngine, request: EngineRequest) -> list[int]:
    events = [event async for event in engine.submit(request)]
    assert all(isinstance(event, TokenEvent) for event in events), events
    assert [event.index for event in events] == list(range(len(events)))
    return [event.token_id for event in events]


async def values(engine: LocalEngine, request: EngineRequest) -> torch.Tensor:
    (event,) = [event async for event in engine.submit(request)]
    assert isinstance(event, HeadEvent), event
    return torch.tensor(event.values.array)


async def head_logits(engine: LocalEngine, task: Task, index: int, prompt: list[int]) -> torch.Tensor:
    request = EngineRequest(request_id=f"{task}-{index}", task=task, prompt_token_ids=prompt)
    (event,) = [event async for event in engine.submit(request)]
    assert isinstance(event, HeadEvent)
    return torch.tensor(event.values.array)


# ------------------------------------------------------------------------------------------------ = transformers


@pytest.mark.parametrize(
    ("num_stages", "max_microbatch_tokens", "num_kv_blocks", "kernels"),
    [
        (1, 512, PLENTY, "torch"),
        (2, 64, PLENTY, "torch"),
        (3, 17, PLENTY, "torch"),
        (6, 64, PLENTY, "torch"),
        (1, 64, SCARCE, "torch"),
        (2, 17, SCARCE, "torch"),
        (3, 512, SCARCE, "torch"),
        (6, 11, SCARCE, "torch"),
        (1, 512, PLENTY, "auto"),
        (3, 17, PLENTY, "auto"),
        (6, 64, PLENTY, "auto"),
    ],
    indirect=["kernels"],
)
async def test_greedy_tokens_equal_transformers_generate(
    directory: Path,
    prompts,
    greedy_reference,
    num_stages: int,
    max_microbatch_tokens: int,
    num_kv_blocks: int,
    kernels: Kernels,
):
    async with serving(
        directory,
        num_stages=num_stages,
        max_microbatch_tokens=max_microbatch_tokens,
        num_kv_blocks=num_kv_blocks,
        kernels=kernels,
    ) as engine:
        riders = [head_logits(engine, task, i, prompts[i]) for i in range(3, 9) for task in (Task.CLASSIFY, Task.QA)]
        answers, logits = await asyncio.gather(
            asyncio.gather(*(generate(engine, generate_request(str(i), p)) for i, p in enumerate(prompts))),
            asyncio.gather(*riders),
        )
        assert (await num_preemptions(engine) > 0) == (num_kv_blocks != PLENTY)
    assert answers == greedy_reference
    for i, (class_logits, qa_logits) in enumerate(zip(logits[::2], logits[1::2], strict=True), 3):
        assert class_logits.shape == (1, 3)
        assert qa_logits.shape == (len(prompts[i]), 2)


@pytest.mark.parametrize(
    ("max_microbatch_tokens", "num_kv_blocks", "kernels"),
    [(512, PLENTY, "torch"), (17, SCARCE, "torch"), (512, PLENTY, "auto")],
    indirect=["kernels"],
)
async def test_greedy_tokens_of_a_stage_scheduled_ahead_equal_transformers_generate(
    directory: Path, prompts, greedy_reference, max_microbatch_tokens: int, num_kv_blocks: int, kernels: Kernels
):
    async with serving(
        directory,
        max_microbatch_tokens=max_microbatch_tokens,
        num_kv_blocks=num_kv_blocks,
        kernels=kernels,
        schedules_ahead=True,
    ) as engine:
        requests = [generate_request(str(i), prompt) for i, prompt in enumerate(prompts)]
        assert await asyncio.gather(*(generate(engine, request) for request in requests)) == greedy_reference
        alone = [await generate(engine, request) for request in requests[:4]]
        assert alone == greedy_reference[:4]
        stats = engine.stats()
    assert (stats.num_preemptions > 0) == (num_kv_blocks != PLENTY)
    assert stats.num_rows_ahead > 0.5 * stats.num_tokens_generated
    num_ended_early = sum(len(answer) < MAX_NEW_TOKENS for answer in [*greedy_reference, *greedy_reference[:4]])
    assert 0 < stats.num_rows_ahead_wasted <= num_ended_early


@pytest.mark.parametrize(("num_stages", "num_kv_blocks", "kernels"), ENGINES, indirect=["kernels"])
async def test_head_logits_equal_transformers(
    directory: Path, prompts, num_stages: int, num_kv_blocks: int, kernels: Kernels
):
    classifier = GPTJForSequenceClassification.from_pretrained(directory).eval()
    reader = GPTJForQuestionAnswering.from_pretrained(directory, num_labels=2).eval()
    async with serving(
        directory, num_stages=num_stages, num_kv_blocks=num_kv_blocks, max_microbatch_tokens=13, kernels=kernels
    ) as engine:
        others = asyncio.gather(*(generate(engine, request) for request in long_requests(prompts)))
        classes = await asyncio.gather(*(head_logits(engine, Task.CLASSIFY, i, p) for i, p in enumerate(prompts)))
        spans = await asyncio.gather(*(head_logits(engine, Task.QA, i, p) for i, p in enumerate(prompts)))
        await others
    for prompt, class_logits, qa_logits in zip(prompts, classes, spans, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = reader(ids)
            torch.testing.assert_close(class_logits, classifier(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(qa_logits[:, 0], expected.start_logits[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(qa_logits[:, 1], expected.end_logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("num_stages", "num_kv_blocks", "kernels"), ENGINES, indirect=["kernels"])
async def test_hidden_states_equal_transformers(
    directory: Path, prompts, num_stages: int, num_kv_blocks: int, kernels: Kernels
):
    model = GPTJModel.from_pretrained(directory).eval()
    requests = {
        (i, pooling): EngineRequest(
            request_id=f"{i}-{pooling}", task=Task.EMBED, prompt_token_ids=prompts[i], pooling=pooling
        )
        for i in range(12)
        for pooling in Pooling
    }
    async with serving(
        directory, num_stages=num_stages, num_kv_blocks=num_kv_blocks, max_microbatch_tokens=13, kernels=kernels
    ) as engine:
        others = asyncio.gather(*(generate(engine, request) for request in long_requests(prompts)))
        answers = await asyncio.gather(*(values(engine, request) for request in requests.values()))
        await others
        assert (await num_preemptions(engine) > 0) == (num_kv_blocks != PLENTY)
    for (i, pooling), answer in zip(requests, answers, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompts[i]])).last_hidden_state[0]
        pooled = {Pooling.LAST: hidden[-1:], Pooling.MEAN: hidden.mean(0, keepdim=True), Pooling.ALL: hidden}
        torch.testing.assert_close(answer, pooled[pooling], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_stages", "num_kv_blocks", "kernels"), ENGINES, indirect=["kernels"])
async def test_scores_of_continuations_equal_transformers(
    directory: Path, prompts, num_stages: int, num_kv_blocks: int, kernels: Kernels
):
    model = GPTJForCausalLM.from_pretrained(directory).eval()
    cuts = [(i, cut) for i, p in enumerate(prompts) for cut in {1, len(p) // 2, len(p) - 1} if 0 < cut < len(p)]
    async with serving(
        directory, num_stages=num_stages, num_kv_blocks=num_kv_blocks, max_microbatch_tokens=13, kernels=kernels
    ) as engine:
        requests = [
            EngineRequest(
                request_id=f"{i}-{cut}",
                task=Task.SCORE,
                prompt_token_ids=prompts[i][:cut],
                continuation_token_ids=prompts[i][cut:],
            )
            for i, cut in cuts
        ]
        others = asyncio.gather(*(generate(engine, request) for request in long_requests(prompts)))
        answers = await asyncio.gather(*(values(engine, request) for request in requests))
        await others
        assert (await num_preemptions(engine) > 0) == (num_kv_blocks != PLENTY)
    for (i, cut), answer in zip(cuts, answers, strict=True):
        ids = torch.tensor(prompts[i])
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])
        torch.testing.assert_close(answer, logprobs[cut - 1 :], rtol=0, atol=1e-4)


def test_only_the_rows_of_a_continuation_go_through_the_lm_head(directory: Path, prompts):
    (runner,) = make_runners(directory, 1, 40)
    num_rows: list[int] = []
    runner.stage.lm_head.register_forward_hook(lambda _, inputs, __: num_rows.append(len(inputs[0])))
    row = Row(prompts[2], 0, list(range(30)), target_token_ids=[1, 2, 3])
    assert len(runner.run(MicroBatch(0, [row]), None).rows[0].targets.rows()) == 3
    assert num_rows == [3]


def test_a_target_without_a_logit_fails_its_row_alone(directory: Path):
    (runner,) = make_runners(directory, 1, 4)
    rows = [Row([1], 0, [i], target_token_ids=[target]) for i, target in enumerate([5, 97])]
    good, bad = runner.run(MicroBatch(0, rows), None).rows
    assert good.targets.array.shape == (1, 1)
    assert bad == RowResult(failure="token id 97 has no logit: the model's are below 97")


# ------------------------------------------------------------------------------------------------- several heads


async def test_rows_of_different_heads_mix_in_a_microbatch(directory: Path, prompts, tmp_path: Path):
    checkpoint = Checkpoint.open(directory)
    rng = np.random.default_rng(0)

    def head(name: str, kind: HeadKind, num_labels: int) -> HeadCheckpoint:
        labels = [f"label {i}" for i in range(num_labels)] if kind is HeadKind.CLASSIFIER else []
        problem_type = "single_label_classification" if labels else None
        info = HeadInfo(
            kind=kind, name=name, labels=labels, problem_type=problem_type, backbone=fingerprint(checkpoint)
        )
        weight = rng.normal(size=(num_labels, 32)).astype(np.float32)
        bias = None if labels else rng.normal(size=2).astype(np.float32)
        return HeadCheckpoint(tmp_path / name, info, weight, bias)

    heads = {
        "tone": head("tone", HeadKind.CLASSIFIER, 5),
        "topic": head("topic", HeadKind.CLASSIFIER, 2),
        "reader": head("reader", HeadKind.QA, 2),
    }
    runners = make_runners(directory, 2, PLENTY)
    runners[-1] = StageRunner(runners[-1].stage, runners[-1].spec, heads)
    rows_per_step: list[set[str]] = []
    run = runners[-1].run
    runners[-1].run = lambda m, h: rows_per_step.append({row.head for row in m.rows}) or run(m, h)
    pipeline = InProcessPipeline(runners)
    scheduler = Scheduler(SchedulerLimits(2, 64, 64, N_POSITIONS), KVBlocks(PLENTY, BLOCK_SIZE), frozenset({EOS}))
    kinds = [
        (Task.CLASSIFY, "tone"), (Task.CLASSIFY, "topic"), (Task.CLASSIFY, "default"), (Task.QA, "reader"),
        (Task.QA, "default"),
    ]  # fmt: skip
    async with LocalEngine(scheduler, pipeline) as engine:
        requests = [
            EngineRequest(
                request_id=f"{i}-{task}-{name}",
                task=task,
                prompt_token_ids=prompts[i],
                head=name,
                pooling=Pooling.MEAN if name == "topic" else Pooling.LAST,
            )
            for i in range(6)
            for task, name in kinds
        ]
        answers = await asyncio.gather(*(values(engine, request) for request in requests))
    pipeline.close()
    assert any(len(names) > 2 for names in rows_per_step)
    model = GPTJModel.from_pretrained(directory).eval()
    for request, answer in zip(requests, answers, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([request.prompt_token_ids])).last_hidden_state[0]
        if request.pooling is Pooling.MEAN:
            hidden = hidden.mean(dim=0, keepdim=True)
        elif request.task is Task.CLASSIFY:
            hidden = hidden[-1:]
        if request.head == "default":
            stage = runners[-1].stage
            expected = (stage.score if request.task is Task.CLASSIFY else stage.qa_outputs)(hidden)
        else:
            expected = hidden @ torch.from_numpy(heads[request.head].weight).T
            if heads[request.head].bias is not None:
                expected += torch.from_numpy(heads[request.head].bias)
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


async def test_logprobs_equal_transformers(directory: Path, prompts, greedy_reference):
    prompt, answer = prompts[5], greedy_reference[5]
    async with serving(directory, num_stages=2) as engine:
        events = [event async for event in engine.submit(generate_request("a", prompt))]
    with torch.inference_mode():
        logits = GPTJForCausalLM.from_pretrained(directory).eval()(torch.tensor([[*prompt, *answer]])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([event.logprob for event in events]), expected, rtol=0, atol=1e-4)


async def test_context_can_be_filled_to_the_last_position(directory: Path, prompts):
    prompt = prompts[2][:60]
    async with serving(directory, num_stages=2, num_kv_blocks=N_POSITIONS // BLOCK_SIZE) as engine:
        request = generate_request("a", prompt, max_new_tokens=N_POSITIONS - 60, ignore_eos=True)
        events = [event async for event in engine.submit(request)]
    assert len(events) == N_POSITIONS - 60
    assert events[-1].finish_reason is FinishReason.LENGTH


# ------------------------------------------------------------------------------------------------- sampled tokens


def sampled_request(index: int, prompt: list[int]) -> EngineRequest:
    sampling = {
        "temperature": 0.5 + 0.1 * (index % 8),
        "top_k": (0, 20)[index % 2],
        "top_p": (1.0, 0.9, 0.5)[index % 3],
    }
    return generate_request(f"sampled-{index}", prompt, seed=1000 + index, ignore_eos=True, **sampling)


@pytest.fixture(scope="module")
def sampled_requests(prompts) -> list[EngineRequest]:
    return [sampled_request(i, prompts[i % NUM_PROMPTS]) for i in range(32)]


async def test_sampled_tokens_are_the_same_alone_in_a_crowd_under_preemption_and_on_any_split(
    directory: Path, sampled_requests
):
    async with serving(directory) as engine:
        alone = [await generate(engine, request) for request in sampled_requests]
    assert alone[24:] != alone[:8]  # the same prompts with other seeds and parameters
    for num_stages, num_kv_blocks, ahead in [
        (1, PLENTY, False), (1, PLENTY, True), (1, SCARCE, True), (2, SCARCE, False), (3, PLENTY, False)
    ]:  # fmt: skip
        async with serving(
            directory, num_stages=num_stages, num_kv_blocks=num_kv_blocks, schedules_ahead=ahead
        ) as engine:
            together = await asyncio.gather(*(generate(engine, request) for request in sampled_requests))
            assert (await num_preemptions(engine) > 0) == (num_kv_blocks == SCARCE)
            assert (engine.stats().num_rows_ahead > 0) == ahead
        assert together == alone, f"{num_stages} stages, {num_kv_blocks} blocks"


async def test_replayed_on_another_pipeline_it_goes_on_with_the_same_tokens(directory: Path, sampled_requests):
    request = sampled_requests[7]
    async with serving(directory, num_stages=1) as engine:
        tokens = await generate(engine, request)
    async with serving(directory, num_stages=3, max_microbatch_tokens=7) as engine:
        for num_done in (1, 5, MAX_NEW_TOKENS - 1):
            replayed = EngineRequest(
                request_id=f"replayed-{num_done}",
                task=Task.GENERATE,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=tokens[:num_done],
                sampling=request.sampling,
            )
            events = [event async for event in engine.submit(replayed)]
            assert [(event.index, event.token_id) for event in events] == list(enumerate(tokens))[num_done:]


# ------------------------------------------------------------------------------------------------ a stage at work


def qa_logits(runners: list[StageRunner], prompt: list[int], chunks: list[int], first_id: int) -> torch.Tensor:
    """Logits of every token, computed chunk by chunk over blocks that lie in no order."""
    table = list(range(30, 0, -1))
    logits: list[list[float]] = []
    start = 0
    for microbatch_id, size in enumerate(chunks, first_id):
        row = Row(prompt[start : start + size], start, table, RowOutput.QA)
        result = None
        for runner in runners:
            result = runner.run(MicroBatch(microbatch_id, [row]), result)
        logits += result.rows[0].values.rows()
        start += size
    return torch.tensor(logits)


def test_cached_equals_uncached(directory: Path, prompts):
    runners = make_runners(directory, 2, num_kv_blocks=31)
    prompt = prompts[2]
    whole = qa_logits(runners, prompt, [len(prompt)], 0)
    one_by_one = qa_logits(runners, prompt, [1] * len(prompt), 1)
    torch.testing.assert_close(one_by_one, whole, rtol=0, atol=1e-4)
    uneven = [1, 5, 1, 1, 30, 2]
    chunked = qa_logits(runners, prompt, [*uneven, len(prompt) - sum(uneven)], 1 + len(prompt))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)


def test_stage_refuses_a_microbatch_out_of_order(directory: Path):
    (runner,) = make_runners(directory, 1, 4)
    microbatch = [MicroBatch(i, [Row([1], 0, [0])]) for i in range(9)]
    runner.run(microbatch[3], None)
    runner.run(microbatch[4], None)
    for wrong in (3, 4, 6):
        with pytest.raises(AssertionError, match="5 was due"):
            runner.run(microbatch[wrong], None)
    runner.restart()
    runner.run(microbatch[8], None)


def test_ids_without_a_token_are_never_sampled(directory: Path):
    """A tokenizer smaller than the vocabulary: only its own columns compete."""
    checkpoint = Checkpoint.open(directory)
    spec = StageSpec(range(6), 4, BLOCK_SIZE, torch.float32, torch.device("cpu"), num_token_ids=10)
    runner = StageRunner.load(checkpoint, spec)
    rows = [
        Row([i + 1], 0, [i], samples=[SampleSpec(Warpers(temperature=t), seed=i)])
        for i, t in enumerate([0.0, 0.0, 5.0, 50.0])
    ]
    for microbatch_id in range(20):
        output = runner.run(MicroBatch(microbatch_id, rows), None)
        assert all(result.tokens[0].token_id < 10 for result in output.rows)


async def test_failure_of_a_stage_is_recovered_from(directory: Path, prompts, greedy_reference):
    class FailingRunner(StageRunner):
        num_runs = 0

        def run(self, microbatch, hidden):
            self.num_runs += 1
            if self.num_runs in (3, 9):
                raise RuntimeError("out of memory")
            return super().run(microbatch, hidden)

    first, second = make_runners(directory, 2, PLENTY)
    pipeline = InProcessPipeline([first, FailingRunner(second.stage, second.spec)])
    scheduler = Scheduler(SchedulerLimits(2, 64, 64, N_POSITIONS), KVBlocks(PLENTY, BLOCK_SIZE), frozenset({EOS}))
    async with LocalEngine(scheduler, pipeline) as engine:
        answers = await asyncio.gather(
            *(generate(engine, generate_request(str(i), prompt)) for i, prompt in enumerate(prompts))
        )
        assert engine.stats().as_dict()["num_recoveries"] == 2
    pipeline.close()
    assert answers == greedy_reference


async def test_a_stage_lost_with_rows_made_ahead_in_flight_is_recovered_from(
    directory: Path, prompts, greedy_reference
):
    num_fed_steps = 0  # with rows that were

    class FailingRunner(StageRunner):
        def run(self, microbatch, hidden):
            nonlocal num_fed_steps
            num_fed_steps += any(row.fed_from is not None for row in microbatch.rows)
            if num_fed_steps in (3, 10) and any(row.fed_from is not None for row in microbatch.rows):
                raise RuntimeError("out of memory")
            return super().run(microbatch, hidden)

    (runner,) = make_runners(directory, 1, PLENTY)
    pipeline = InProcessPipeline([FailingRunner(runner.stage, runner.spec)])
    limits = SchedulerLimits(1, 64, 64, N_POSITIONS, schedules_ahead=True)
    scheduler = Scheduler(limits, KVBlocks(PLENTY, BLOCK_SIZE), frozenset({EOS}))
    async with LocalEngine(scheduler, pipeline) as engine:
        answers = await asyncio.gather(
            *(generate(engine, generate_request(str(i), prompt)) for i, prompt in enumerate(prompts[:12]))
        )
        assert engine.stats().num_recoveries == 2
        scheduler.check_integrity()
    pipeline.close()
    assert num_fed_steps > 10
    assert answers == greedy_reference[:12]


async def test_pipeline_error_names_the_cause(directory: Path):
    pipeline = InProcessPipeline(make_runners(directory, 2, 4))
    with pytest.raises(PipelineError, match=r"microbatch 7 failed: .*index"):
        await pipeline.run(MicroBatch(7, [Row([5000], 0, [0])]))  # no such token
    pipeline.close()


async def test_nan_in_one_request_leaves_the_others_and_those_who_come_after_alone(
    directory: Path, prompts, greedy_reference
):
    """The embedding of one token is NaN; requests without it get their answers, also from the blocks it has used."""
    runners = make_runners(directory, 2, SCARCE)
    harmless = {token for part in (*prompts[:2], *greedy_reference[:2]) for token in part}
    poison = min(set(range(1, 96)) - harmless)
    with torch.no_grad():
        runners[0].stage.wte.weight[poison] = torch.nan
    pipeline = InProcessPipeline(runners)
    scheduler = Scheduler(SchedulerLimits(2, 64, 64, N_POSITIONS), KVBlocks(SCARCE, BLOCK_SIZE), frozenset({EOS}))
    async with LocalEngine(scheduler, pipeline) as engine:
        for attempt in range(3):
            bad = generate_request(f"bad-{attempt}", [poison] * 80)
            good = [generate_request(f"{attempt}-{i}", prompts[i]) for i in range(2)]
            events, *answers = await asyncio.gather(
                _events(engine, bad), *(_events(engine, request) for request in good)
            )
            assert [type(event) for event in events] == [FailureEvent]
            assert "NaN" in events[0].message
            assert [[getattr(e, "token_id", e) for e in a] for a in answers] == greedy_reference[:2]
    pipeline.close()


async def _events(engine: LocalEngine, request: EngineRequest) -> list[object]:
    return [event async for event in engine.submit(request)]
