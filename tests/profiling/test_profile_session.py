"""Profiles of real engines in this process: what they show must be what the engine did."""

import asyncio
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import small_backend_json, small_tokenizer
from safetensors import SafetensorError
from threads import torch_threads
from trace_format import check

from gptj_serve.config import DEMO_CHECKPOINT, PipelineConfig, ServiceConfig
from gptj_serve.engine.milestones import Milestone
from gptj_serve.errors import ConfigError, InvalidRequestError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.stage_runner import StageSpec
from gptj_serve.planner import plan_service
from gptj_serve.profiling.load import Load, PlannedRequest
from gptj_serve.profiling.session import Profile, Session, stage_specs
from gptj_serve.profiling.trace_events import trace_events

REQUESTS = [PlannedRequest(0.0, 20, 4), PlannedRequest(0.0, 150, 3), PlannedRequest(0.0, 1, 1)]


def service(checkpoint: object = DEMO_CHECKPOINT, **pipeline: Any) -> ServiceConfig:
    stage = {"num_threads": 1}
    return ServiceConfig(checkpoint=str(checkpoint), pipeline={"num_stages": 2, "stage": stage} | pipeline)


def profile(config: ServiceConfig, load: Load, **options: bool) -> Profile:
    return asyncio.run(Session(config).profile(load, **options))


@pytest.fixture(scope="module")
def demo() -> Profile:
    config = service(scheduler={"max_microbatch_tokens": 64}, kernels="torch")  # our own call no operators
    return profile(config, Load(REQUESTS, max_concurrency=2), with_operators=True)


@pytest.fixture(scope="module")
def tiny(tiny_gptj, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profile") / "tiny"
    directory.mkdir()
    for file in tiny_gptj(vocab_size=small_tokenizer().num_token_ids).iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "tokenizer.json").write_text(small_backend_json())
    return directory


def test_the_figures_are_those_of_the_requests(demo: Profile):
    summary = demo.summary
    assert (summary.num_finished, summary.num_refused, summary.num_preemptions) == (3, 0, 0)
    assert summary.num_prompt_tokens == 20 + 150 + 1
    assert summary.num_tokens_generated == 4 + 3 + 1
    assert summary.tokens_per_s == pytest.approx(8 / summary.duration_s)
    assert summary.scheduler_s_per_step > 0
    assert [stage.layers for stage in summary.stages] == [(0, 4), (4, 6)]
    for stage in summary.stages:
        assert stage.num_steps == summary.num_steps
        assert 0 < stage.p50_step_s <= stage.p99_step_s
        assert stage.mean_step_s * stage.num_steps == pytest.approx(stage.busy_ratio * summary.duration_s)
        assert 0 <= stage.bubble_ratio < 1
    assert summary.stages[0].mean_handoff_s is None
    assert summary.stages[1].mean_handoff_s is not None


def test_every_token_is_computed_in_a_step(demo: Profile):
    """All but the last one of each request are computed: 19 + 149 prompt tokens before the one that is sampled from."""
    for stage_index in range(2):
        spans = demo.timeline.of_stage(stage_index)
        assert len(spans) == demo.summary.num_steps
        assert sum(span.num_tokens for span in spans) == (20 + 3) + (150 + 2) + 1
        assert sum(span.num_decode_rows for span in spans) == 3 + 2 + 1  # a prompt of one token is like a decode row
        assert sum(span.num_prompt_tokens for span in spans) == 20 + 150
        assert max(span.num_tokens for span in spans) == 64
        assert all(span.num_decode_rows <= span.num_rows for span in spans)


def test_stages_take_microbatches_in_order_and_one_after_the_other(demo: Profile):
    first, second = (demo.timeline.of_stage(index) for index in range(2))
    ids = [span.microbatch_id for span in first]
    assert ids == sorted(ids) == [span.microbatch_id for span in second]
    for ours, next_stages in zip(first, second, strict=True):
        assert ours.end_s <= next_stages.start_s
        assert 0 <= next_stages.handoff_s <= next_stages.start_s - ours.end_s + 1e-6
    for before, after in [*pairwise(first), *pairwise(second)]:
        assert before.end_s <= after.start_s


def test_the_scheduler_makes_each_microbatch_before_and_takes_it_after(demo: Profile):
    made = {s.microbatch_id: s for s in demo.timeline.scheduler_spans if s.name == "schedule"}
    taken = {s.microbatch_id: s for s in demo.timeline.scheduler_spans if s.name == "update"}
    assert made.keys() - {None} == taken.keys() == {span.microbatch_id for span in demo.timeline.spans}
    for span in demo.timeline.spans:
        assert made[span.microbatch_id].end_s <= span.start_s
        assert span.end_s <= taken[span.microbatch_id].start_s


def test_requests_and_blocks_are_counted(demo: Profile):
    timeline = demo.timeline
    told = Counter(passage.milestone for passage in timeline.passages)
    assert told == {Milestone.QUEUED: 3, Milestone.SCHEDULED: 3}
    assert {passage.request_id for passage in timeline.passages} == {f"request {n}" for n in range(3)}
    assert max(occupancy.num_running for occupancy in timeline.occupancies) == 2
    assert max(occupancy.num_kv_blocks_used for occupancy in timeline.occupancies) >= 150 // 16
    last = timeline.occupancies[-1]
    assert (last.num_waiting, last.num_running, last.num_kv_blocks_used) == (0, 0, 0)


def test_operators_are_those_of_their_steps(demo: Profile):
    span_of = {(span.stage_index, span.microbatch_id): span for span in demo.timeline.spans}
    per_step: dict[tuple[int, int], Counter[str]] = {key: Counter() for key in span_of}
    for operator in demo.timeline.operators:
        key = (operator.stage_index, operator.microbatch_id)
        assert span_of[key].start_s <= operator.start_s <= operator.end_s <= span_of[key].end_s
        per_step[key][operator.name] += 1
    for (stage_index, _), counts in per_step.items():
        assert counts["aten::embedding"] == (stage_index == 0)
        assert counts["aten::layer_norm"] == (4 if stage_index == 0 else 2 + 1)
        assert not any(name.startswith("gptj_serve") for name in counts)


def test_the_trace_follows_the_formats_rules(demo: Profile):
    events = trace_events({"demo": demo.timeline})
    check(events)
    kinds = Counter((event["ph"], event.get("cat")) for event in events)
    assert kinds["X", "stage"] == 2 * demo.summary.num_steps
    assert kinds["s", "handoff"] == kinds["f", "handoff"] == demo.summary.num_steps
    assert kinds["X", "operator"] == len(demo.timeline.operators)


def test_requests_come_when_they_are_due(tiny: Path):
    load = Load([PlannedRequest(0.0, 3, 1), PlannedRequest(0.25, 3, 1)], max_concurrency=None)
    made = profile(service(tiny), load)
    first, second = (p.at_s for p in made.timeline.passages if p.milestone is Milestone.QUEUED)
    assert second - first > 0.2
    assert made.timeline.operators == []
    assert made.timeline.in_flight_s < made.summary.duration_s  # nothing to do until the second one came
    for stage in made.summary.stages:
        assert stage.busy_ratio < 1 - stage.bubble_ratio


def test_a_small_pool_preempts_and_recomputes(tiny: Path):
    load = Load([PlannedRequest(0.0, 30, 40)] * 4, max_concurrency=4)
    made = profile(service(tiny, kv_cache={"num_tokens": 96, "block_size": 4, "reuse_prefixes": False}), load)
    assert made.summary.num_finished == 4
    assert made.summary.num_tokens_generated == 160
    assert made.summary.num_preemptions > 0
    told = Counter(passage.milestone for passage in made.timeline.passages)
    assert told[Milestone.PREEMPTED] == told[Milestone.RESUMED] == made.summary.num_preemptions
    num_prompt_tokens = sum(span.num_prompt_tokens for span in made.timeline.of_stage(0))
    assert num_prompt_tokens > 4 * 30


def test_who_would_wait_too_long_is_counted(tiny: Path):
    """Nobody's turn comes within a nanosecond."""
    load = Load([PlannedRequest(0.0, 30, 4)] * 3, max_concurrency=2)
    made = profile(service(tiny, scheduler={"max_queue_wait_s": 1e-9}), load)
    assert (made.summary.num_finished, made.summary.num_refused, made.summary.num_steps) == (0, 3, 0)
    assert made.summary.num_prompt_tokens == 0
    assert (made.summary.tokens_per_s, made.summary.scheduler_s_per_step) == (0.0, 0.0)
    assert [stage.bubble_ratio for stage in made.summary.stages] == [0.0, 0.0]


def test_a_request_that_can_never_be_served_ends_the_profile(tiny: Path):
    load = Load([PlannedRequest(0.0, 90, 40)] * 2, max_concurrency=2)
    with pytest.raises(InvalidRequestError):
        profile(service(tiny), load)


def test_what_cant_be_served_is_refused_before_weights_are_loaded(tmp_path: Path, tiny: Path):
    """They are damaged once it is open, which is what loading tells."""
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    session = Session(service(tmp_path, kv_cache={"num_tokens": 32}))
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidRequestError, match=r"20 prompt tokens \+ 20 new tokens exceed the limit of 32"):
        asyncio.run(session.profile(Load([PlannedRequest(0.0, 4, 4), PlannedRequest(0.0, 20, 20)], max_concurrency=1)))
    with pytest.raises(SafetensorError):
        asyncio.run(session.profile(Load([PlannedRequest(0.0, 4, 4)], max_concurrency=1)))


def test_one_stage_waits_for_the_engine_too(tiny: Path):
    """Between steps: the way there and back is time without work for it."""
    made = profile(service(tiny, num_stages=1), Load([PlannedRequest(0.0, 8, 20)], max_concurrency=1))
    (stage,) = made.summary.stages
    assert 0 < stage.bubble_ratio < 1


def test_the_figures_say_what_was_profiled(tiny: Path, cpu_kernels: None):
    load = Load([PlannedRequest(0.0, 8, 2)], max_concurrency=1)
    with torch_threads(1):
        int8 = profile(service(tiny, dtype="bfloat16", quantization="int8", stage={"num_threads": 2}), load).summary
        plain = profile(service(tiny, kernels="torch", stage={"num_threads": 3}), load).summary
    assert (int8.dtype, int8.threads_per_stage) == ("bfloat16", 2)
    assert "int8" in int8.kernels
    assert (plain.dtype, plain.kernels, plain.threads_per_stage) == ("float32", "torch", 3)


def test_what_cant_be_loaded_is_named(tiny: Path):
    with pytest.raises(ConfigError, match="num_stages=7"):
        Session(service(tiny, num_stages=7))
    with pytest.raises(ConfigError, match=r"num_gpus=1: 2 stages need more GPUs than this machine's \d"):
        Session(service(tiny, stage={"num_gpus": 1}, num_stages=2 + torch.cuda.device_count()))


def test_stages_are_made_as_the_config_says(tiny: Path):
    session = Session(service(tiny, dtype="bfloat16", deterministic=True))
    assert session.dtype == "bfloat16"
    config = PipelineConfig(num_stages=3, dtype="bfloat16", deterministic=True, kv_cache={"num_tokens": 100})
    plan = plan_service(config, Checkpoint.open(tiny))
    specs = stage_specs(config, plan, 90)
    assert [spec.span for spec in specs] == [stage.layers for stage in plan.stages]
    assert specs[1] == StageSpec(
        plan.stages[1].layers, 7, 16, torch.bfloat16, torch.device("cpu"), 90, deterministic=True
    )
