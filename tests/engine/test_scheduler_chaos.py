"""Any order of adding, scheduling, completing, aborting and losing stages gives every request its one right answer."""

import random
from typing import Any

from fake_stages import (
    HEAD_TASKS,
    VOCAB_SIZE,
    FakeStages,
    expected_events,
    generate_request,
    head_request,
    make_scheduler,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gptj_serve.errors import InvalidRequestError
from gptj_serve.steps import StepOutput
from gptj_serve.types import BeamParams, EarlyStopping, EngineRequest, Event, Pooling, Task, TokenEvent, is_terminal

MAX_TOKENS = 20
prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8)
alike_prompts = st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=8)  # with prefixes in common


class SchedulerMachine(RuleBasedStateMachine):
    schedules_ahead = False

    @initialize(
        num_stages=st.sampled_from([4, 3, 2, 1]),
        num_blocks=st.integers(4, 16),
        block_size=st.integers(1, 3),
        max_microbatch_tokens=st.integers(1, 16),
        max_num_sequences=st.integers(1, 8),
        reuse_prefixes=st.booleans(),
    )
    def start(self, num_stages: int, **limits: int) -> None:
        self.scheduler = make_scheduler(
            num_stages=1 if self.schedules_ahead else num_stages,
            max_sequence_tokens=MAX_TOKENS,
            schedules_ahead=self.schedules_ahead,
            **limits,
        )
        self.capacity = min(MAX_TOKENS, limits["num_blocks"] * limits["block_size"])
        self.stages = FakeStages(limits["block_size"])
        self.expected: dict[str, list[Event]] = {}  # of every request that was let in
        self.events: dict[str, list[Event]] = {}
        self.aborted: set[str] = set()
        self.in_flight: list[StepOutput] = []

    # ------------------------------------------------------------------------------------------------- requests

    @rule(
        prompts=st.lists(prompts | alike_prompts, min_size=1, max_size=4),
        max_new_tokens=st.integers(1, 14),
        min_new_tokens=st.integers(0, 3),
        stop_token_ids=st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=2),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 5),
        num_replayed=st.integers(0, 3),
        guidance_scale=st.sampled_from([1.0, 1.0, 1.5]),
        negative_prompt_token_ids=st.just([]) | alike_prompts,
        prompt_logprobs=st.booleans(),
        num_top_logprobs=st.integers(0, 2),
        no_repeat_ngram_size=st.sampled_from([0, 0, 2, 3]),
        prompt_lookup_num_tokens=st.sampled_from([0, 1, 3, 8]),
        priority=st.integers(-1, 1),
    )
    def add_generate(self, **request: Any) -> None:
        self._add_generate(**request)

    def _add_generate(self, prompts: list[list[int]], num_replayed: int, **sampling: object) -> None:
        if sampling["guidance_scale"] != 1:
            sampling["prompt_lookup_num_tokens"] = 0
        else:
            sampling["negative_prompt_token_ids"] = []
        if sampling["guidance_scale"] != 1 and sampling["priority"] == 1:
            prompts = [prompt[:1] for prompt in prompts]  # both its sequences have one token to compute
        for prompt in prompts:
            request_id = str(len(self.expected))
            request = generate_request(request_id, prompt, **sampling)
            earlier = [event.token_id for event in expected_events(request)[:-1] if isinstance(event, TokenEvent)]
            self._add(generate_request(request_id, prompt, output=earlier[:num_replayed], **sampling))

    @rule(
        prompts=st.lists(prompts | alike_prompts, min_size=1, max_size=2),
        num_beams=st.integers(2, 4),
        early_stopping=st.sampled_from(EarlyStopping),
        num_return_sequences=st.integers(1, 2),
        max_new_tokens=st.integers(1, 8),
        min_new_tokens=st.integers(0, 3),
        no_repeat_ngram_size=st.sampled_from([0, 2]),
    )
    def add_beams(
        self, prompts: list[list[int]], num_beams: int, early_stopping: EarlyStopping, num_return_sequences: int,
        **sampling: object,
    ) -> None:  # fmt: skip
        beams = BeamParams(
            num_beams=num_beams, early_stopping=early_stopping, num_return_sequences=num_return_sequences
        )
        for prompt in prompts:
            self._add(generate_request(str(len(self.expected)), prompt, beams=beams, **sampling))

    @rule(prompt=prompts | alike_prompts, kind=st.sampled_from(HEAD_TASKS), continuation=prompts)
    def add_head(self, prompt: list[int], kind: tuple[Task, Pooling], continuation: list[int]) -> None:
        task, pooling = kind
        continuation = continuation if task is Task.SCORE else []
        self._add(head_request(str(len(self.expected)), task, prompt, pooling, continuation))

    def _add(self, request: EngineRequest) -> None:
        num_new = request.sampling.max_new_tokens if request.sampling else 0
        num_new += len(request.continuation_token_ids)
        fits = len(request.prompt_token_ids) + num_new <= self.capacity
        is_lone = request.sampling is None or (request.sampling.beams is None and request.sampling.guidance_scale == 1)
        try:
            self.scheduler.add(request)
        except InvalidRequestError:
            assert not fits or not is_lone  # several sequences may need more than there is
        else:
            assert fits
            self.expected[request.request_id] = expected_events(request)
            self.events[request.request_id] = []

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.expected)))
        was_here = request_id not in self.aborted and not self._has_ended(request_id)
        assert self.scheduler.abort(request_id) == was_here
        if was_here:
            self.aborted.add(request_id)

    def _has_ended(self, request_id: str) -> bool:
        return any(map(is_terminal, self.events[request_id]))

    # ---------------------------------------------------------------------------------------------------- steps

    @precondition(lambda self: len(self.in_flight) < self.scheduler.limits.max_in_flight)
    @rule()
    def schedule(self) -> None:
        self._schedule()

    def _schedule(self) -> bool:
        microbatch = self.scheduler.schedule()
        if microbatch is None:
            return False
        assert len({target for _, target in microbatch.block_copies}) == len(microbatch.block_copies)
        assert microbatch.num_tokens <= self.scheduler.limits.max_microbatch_tokens
        assert self.scheduler.num_running <= self.scheduler.limits.max_num_sequences
        self.in_flight.append(self.stages.run(microbatch))  # stages keep the order of scheduling
        return True

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete(self) -> None:
        for event in self.scheduler.update(self.in_flight.pop(0)):
            assert not self._has_ended(event.request_id), "an event after the last"
            assert event.request_id not in self.aborted, "an event of an aborted request"
            self.events[event.request_id].append(event)

    @rule(seed=st.integers(0, 2**16), num_steps=st.integers(5, 60))
    def serve_for_a_while(self, seed: int, num_steps: int) -> None:
        """Many steps within one rule, so that pools fill up and what is preempted comes back while it is in flight."""
        chance = random.Random(seed)
        for _ in range(num_steps):
            has_room = len(self.in_flight) < self.scheduler.limits.max_in_flight
            if has_room and chance.random() < 0.8 and self._schedule():
                self.scheduler.check_integrity()
            elif self.in_flight:
                self.complete()

    def _turn(self) -> None:
        while len(self.in_flight) < self.scheduler.limits.max_in_flight and self._schedule():
            self.scheduler.check_integrity()
        assert self.in_flight or not self.scheduler.has_work, "nothing in flight and nothing schedulable"
        if self.in_flight:
            self.complete()
        self.scheduler.check_integrity()

    @rule()
    def lose_a_stage(self) -> None:
        for event in self.scheduler.reset():
            assert event.is_pipeline_at_fault
            self.aborted.add(event.request_id)  # for another pipeline to try
        self.stages.restart()
        self.in_flight.clear()

    @invariant()
    def all_blocks_are_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    @invariant()
    def answers_so_far_are_right(self) -> None:
        for request_id, events in getattr(self, "events", {}).items():
            assert events == self.expected[request_id][: len(events)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        num_turns = 0
        while self.scheduler.has_work:
            self._turn()
            num_turns += 1
            assert num_turns < 5000, "no progress"
        while self.in_flight:
            self.complete()
        for request_id, expected in self.expected.items():
            if request_id not in self.aborted:
                assert self.events[request_id] == expected
        assert self.scheduler.blocks.num_used == 0
        assert self.scheduler.num_in_flight == 0


class SchedulerMachineAhead(SchedulerMachine):
    """A single stage, scheduled ahead: most requests are such as can be."""

    schedules_ahead = True

    @rule(
        prompts=st.lists(prompts | alike_prompts, min_size=1, max_size=4),
        max_new_tokens=st.integers(1, 14),
        stop_token_ids=st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=2),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 5),
        num_replayed=st.integers(0, 3),
        prompt_logprobs=st.booleans(),
        num_top_logprobs=st.integers(0, 2),
        priority=st.integers(-1, 1),
    )
    def add_plain(self, **request: Any) -> None:
        plain = {"min_new_tokens": 0, "no_repeat_ngram_size": 0, "prompt_lookup_num_tokens": 0, "guidance_scale": 1.0}
        self._add_generate(**request, **plain)


_SETTINGS = settings(
    max_examples=400,
    stateful_step_count=20,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = _SETTINGS
TestSchedulerAhead = SchedulerMachineAhead.TestCase
TestSchedulerAhead.settings = _SETTINGS
