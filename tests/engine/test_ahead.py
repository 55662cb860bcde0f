"""A single stage is scheduled ahead: rows are made while the tokens that they begin with are still being chosen."""

import pytest
from fake_stages import EOS, VOCAB_SIZE, FakeStages, expected_events, generate_request, head_request, make_scheduler

from gptj_serve.engine.scheduler import Scheduler
from gptj_serve.steps import PLACEHOLDER_TOKEN_ID, MicroBatch, RowResult, StepOutput
from gptj_serve.types import (
    BeamParams,
    EngineRequest,
    Event,
    FailureEvent,
    FinishReason,
    Task,
    TokenEvent,
    Warpers,
)


class Run:
    """Steps by hand: what is in flight is computed, but its results are not in the scheduler yet."""

    def __init__(self, *requests: EngineRequest, **limits: int) -> None:
        limits = {"block_size": 4, **limits}
        self.scheduler: Scheduler = make_scheduler(schedules_ahead=True, **limits)
        self.stages = FakeStages(limits["block_size"])
        self.in_flight: list[StepOutput] = []
        self.made: list[MicroBatch] = []
        self.riders: list[list[str]] = []  # their requests
        self.events: dict[str, list[Event]] = {}
        for request in requests:
            self.add(request)

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(request)
        self.events[request.request_id] = []

    def schedule(self) -> MicroBatch | None:
        assert len(self.in_flight) < self.scheduler.limits.max_in_flight
        microbatch = self.scheduler.schedule()
        if microbatch is not None:
            self.made.append(microbatch)
            self.riders.append(self.scheduler.request_ids_in_flight()[microbatch.microbatch_id])
            self.in_flight.append(self.stages.run(microbatch))
        self.scheduler.check_integrity()
        return microbatch

    def complete(self) -> list[Event]:
        events = self.scheduler.update(self.in_flight.pop(0))
        for event in events:
            self.events[event.request_id].append(event)
        self.scheduler.check_integrity()
        return events

    def turn(self) -> None:
        """As the engine does."""
        while len(self.in_flight) < self.scheduler.limits.max_in_flight and self.schedule() is not None:
            pass
        if self.in_flight:
            self.complete()

    def finish(self) -> None:
        while self.scheduler.has_work or self.in_flight:
            self.turn()
        assert self.scheduler.blocks.num_used == 0


def plain(request_id: str, prompt: list[int], **sampling: object) -> EngineRequest:
    return generate_request(request_id, prompt, **{"ignore_eos": True, **sampling})


def sources(microbatch: MicroBatch | None) -> list[int | None]:
    assert microbatch is not None
    return [row.fed_from for row in microbatch.rows]


def test_the_next_step_is_made_while_one_runs():
    run = Run(plain("a", [1, 2, 3]), plain("b", [4]))
    assert sources(run.schedule()) == [None, None]
    ahead = run.schedule()
    assert ahead is not None
    assert sources(ahead) == [0, 1]
    assert [row.start for row in ahead.rows] == [3, 1]
    assert {tuple(row.token_ids) for row in ahead.rows} == {(PLACEHOLDER_TOKEN_ID,)}
    assert [event.index for event in run.complete()] == [0, 0]
    assert sources(run.schedule()) == [0, 1]
    run.finish()
    assert run.events == {name: expected_events(plain(name, prompt)) for name, prompt in [("a", [1, 2, 3]), ("b", [4])]}
    assert run.scheduler.num_rows_ahead == 6
    assert run.scheduler.num_rows_ahead_wasted == 0


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_nothing_is_made_beyond_the_last_token(max_new_tokens: int):
    """Known ahead, an end by length wastes no row; nor would there be a position for it."""
    request = plain("a", [1, 2, 3], max_new_tokens=max_new_tokens)
    run = Run(request, max_sequence_tokens=3 + max_new_tokens)
    run.finish()
    assert run.events["a"] == expected_events(request)
    assert [row.end for microbatch in run.made for row in microbatch.rows] == list(range(3, 3 + max_new_tokens))
    assert run.scheduler.num_rows_ahead == max_new_tokens - 1
    assert run.scheduler.num_rows_ahead_wasted == 0


def test_a_row_made_for_a_request_that_ends_by_itself_is_wasted():
    request = next(
        request
        for seed in range(0, 1000, 2)
        for request in [generate_request("a", [1, 2], max_new_tokens=30, seed=seed)]
        if 3 < len(expected_events(request)) < 30
    )
    run = Run(request)
    run.finish()
    assert run.events["a"] == expected_events(request)
    assert run.events["a"][-1].finish_reason is FinishReason.EOS
    assert run.scheduler.num_rows_ahead == len(run.events["a"])
    assert run.scheduler.num_rows_ahead_wasted == 1


def test_a_prompt_rides_with_rows_made_ahead_and_is_fed_as_soon_as_it_is_computed():
    run = Run(plain("a", [1, 2], max_new_tokens=20), max_microbatch_tokens=4)
    run.schedule()
    run.add(plain("b", [1] * 7, max_new_tokens=20))
    assert sources(run.schedule()) == [0, None]
    run.complete()
    assert sources(run.schedule()) == [0, None]
    run.complete()
    assert sources(run.schedule()) == [0, None]  # the third and last chunk
    run.complete()
    assert sources(run.schedule()) == [0, 1]


def test_only_rows_of_the_step_before_feed():
    """While `a` was short of room it missed a step; its token is known by the next one."""
    run = Run(plain("a", [1], max_new_tokens=8), plain("b", [2], max_new_tokens=8), max_microbatch_tokens=1)
    for _ in range(40):
        run.turn()
    for before, microbatch in zip(run.made, run.made[1:], strict=False):
        for row in microbatch.rows:
            if row.fed_from is not None:
                assert before.rows[row.fed_from].end == row.start
    run.finish()
    assert run.events == {
        name: expected_events(plain(name, prompt, max_new_tokens=8)) for name, prompt in [("a", [1]), ("b", [2])]
    }


@pytest.mark.parametrize(
    "sampling",
    [
        {"guidance_scale": 1.5},
        {"beams": BeamParams(num_beams=2)},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"bad_words_ids": [[1], [2, 3]]},
        {"sequence_bias": [([4, 5], 1.0)]},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_who_needs_the_token_keeps_step_with_the_others(sampling: dict[str, object]):
    """Made ahead, every second step would go without it."""
    plain_one, other = plain("a", [1, 2], max_new_tokens=12), plain("b", [3, 4], max_new_tokens=6, **sampling)
    run = Run(plain_one)
    for _ in range(3):
        run.turn()
    run.add(other)
    run.finish()
    steps = [index for index, request_ids in enumerate(run.riders) if "b" in request_ids]
    assert len(steps) > 1
    assert steps == list(range(steps[0], steps[-1] + 1)), "one was made without it"
    assert sources(run.made[steps[0] - 1]) == [0]
    assert sources(run.made[-1]) == [0]  # alone again
    assert run.events["a"] == expected_events(plain_one)


def test_who_has_left_is_waited_for_no_more():
    run = Run(plain("a", [1, 2], max_new_tokens=12), plain("b", [3, 4], max_new_tokens=6, no_repeat_ngram_size=2))
    run.schedule()
    assert run.schedule() is None
    run.scheduler.abort("b")
    assert sources(run.schedule()) == [0]


@pytest.mark.parametrize("task", [Task.CLASSIFY, Task.QA])
def test_who_gets_no_token_holds_up_nobody(task: Task):
    run = Run(head_request("h", task, [5, 6, 7]), plain("a", [1, 2], max_new_tokens=12))
    assert sources(run.schedule()) == [None, None]
    assert sources(run.schedule()) == [1]


def test_drafts_are_made_all_the_same():
    """A draft follows tokens that are known; it saves more than a step made ahead."""
    request = plain("a", [1, 2, 3, 4] * 3, max_new_tokens=20, seed=1, prompt_lookup_num_tokens=4)
    run = Run(request)
    run.finish()
    assert run.events["a"] == expected_events(request)
    assert run.scheduler.num_draft_tokens_accepted > 0
    assert run.scheduler.num_rows_ahead == 0


def test_warpers_and_log_probabilities_go_along():
    run = Run(plain("a", [1, 2], warpers=Warpers(temperature=0.7, top_p=0.9), seed=5, num_top_logprobs=2))
    first, second = run.schedule(), run.schedule()
    assert first is not None
    assert second is not None
    assert second.rows[0].samples == first.rows[0].samples
    assert second.rows[0].samples[0].seed == 5


@pytest.mark.parametrize(
    "sampling",
    [{"min_new_tokens": 4}, {"suppress_tokens": [1, 2, 3]}, {"min_new_tokens": 2, "stop_token_ids": [4, 5, 6]}],
)
@pytest.mark.parametrize("seed", range(4))
def test_edits_that_depend_on_the_number_of_tokens_alone_go_along(sampling: dict[str, object], seed: int):
    request = generate_request("a", [1, 2], max_new_tokens=8, seed=seed, **sampling)
    run = Run(request)
    run.finish()
    assert run.events["a"] == expected_events(request)
    assert run.scheduler.num_rows_ahead >= len(run.events["a"]) - 1


def test_of_such_edits_each_token_has_its_own():
    """Biases and words of one token, a forced end, and a penalty that grows."""
    edits = {
        "sequence_bias": [([4], 1.5)], "bad_words_ids": [[5]], "begin_suppress_tokens": [6],
        "forced_eos_token_id": [EOS], "exponential_decay_length_penalty": (2, 1.5), "ignore_eos": False,
    }  # fmt: skip
    run, one_by_one = Run(generate_request("a", [1, 2], max_new_tokens=6, seed=1, **edits)), make_scheduler()
    one_by_one.add(generate_request("a", [1, 2], max_new_tokens=6, seed=1, **edits))
    stages = FakeStages(4)
    expected = []
    while (microbatch := one_by_one.schedule()) is not None:
        expected += [row.samples for row in microbatch.rows]
        one_by_one.update(stages.run(microbatch))
    run.finish()
    assert [row.samples for microbatch in run.made for row in microbatch.rows][: len(expected)] == expected
    assert len({repr(samples) for samples in expected}) > 3


def test_a_failed_row_takes_the_one_that_it_feeds_with_it():
    run = Run(plain("bad", [1, 2]), plain("good", [3, 4]))
    run.schedule()
    run.schedule()
    (good,) = run.in_flight[0].rows[1:]
    run.in_flight[0] = StepOutput(0, [RowResult(failure="not finite", is_kv_suspect=True), good])
    assert [type(event) for event in run.complete()] == [FailureEvent, TokenEvent]
    run.finish()
    assert len(run.events["bad"]) == 1
    assert run.events["good"] == expected_events(plain("good", [3, 4]))
    assert run.scheduler.num_rows_ahead_wasted == 1


def test_blocks_of_the_aborted_go_to_others_while_a_row_of_theirs_is_in_flight():
    """The row writes first: stages work in order."""
    run = Run(plain("a", [1] * 8, max_new_tokens=4), num_blocks=4, max_sequence_tokens=16)
    run.schedule()
    ahead = run.schedule()
    assert ahead is not None
    (written,) = ahead.rows[0].block_table[2:]
    assert run.scheduler.abort("a")
    other = plain("b", [2] * 11, max_new_tokens=5)
    run.add(other)
    run.complete()
    microbatch = run.schedule()
    assert microbatch is not None
    assert written in microbatch.rows[0].block_table
    run.finish()
    assert run.events == {"a": [], "b": expected_events(other)}
    assert run.scheduler.num_rows_ahead_wasted == 1


def test_a_preempted_request_keeps_what_was_made_ahead_for_it():
    old, young = plain("old", [1] * 4, max_new_tokens=8), plain("young", [2] * 3, max_new_tokens=8)
    run = Run(old, young, num_blocks=4, block_size=4, max_sequence_tokens=16)
    while not run.scheduler.num_preemptions:
        run.schedule()
        if len(run.in_flight) == 2 and not run.scheduler.num_preemptions:
            run.complete()
    assert any(row.fed_from is not None for row in run.made[-2].rows)
    num_before = len(run.events["young"])
    run.complete()
    assert len(run.events["young"]) > num_before  # of a step that was in flight when its blocks went to another
    run.finish()
    assert run.events == {"old": expected_events(old), "young": expected_events(young)}


def test_preempted_and_admitted_again_in_the_making_of_a_microbatch_it_is_computed_again():
    """`b` lacks a block, gives up those it has, and finds most of its prompt in those of `a`."""
    requests = [
        plain("a", [1, 1, 1, 1, 5], max_new_tokens=6),
        plain("b", [1, 1, 1, 1, 6], max_new_tokens=6, prompt_logprobs=True),
    ]
    run = Run(*requests, num_blocks=7, block_size=2)
    run.schedule()
    assert sources(run.schedule()) == [0, 1]
    run.complete()
    microbatch = run.schedule()
    assert microbatch is not None
    assert run.scheduler.num_preemptions == 1
    assert [(row.start, row.end, row.fed_from) for row in microbatch.rows] == [(6, 7, 0), (4, 6, None)]
    run.finish()
    assert run.events == {request.request_id: expected_events(request) for request in requests}


@pytest.mark.parametrize(("max_new_tokens", "num_reused"), [(4, 4), (5, 4), (6, 8)])
def test_blocks_are_published_once_their_tokens_are_known_and_computed(max_new_tokens: int, num_reused: int):
    """The last position of a block is computed ahead, while prompts are; who comes after takes the block over all the
    same. Of the last token nothing is computed."""
    first = plain("a", [1, 2, 3], max_new_tokens=max_new_tokens)
    run = Run(first, plain("long", [9] * 30, max_new_tokens=1), block_size=4, max_microbatch_tokens=8)
    run.finish()
    tokens = [1, 2, 3, *(event.token_id for event in expected_events(first))]
    second = plain("b", [*tokens, 1], max_new_tokens=3)
    run.add(second)
    run.finish()
    assert run.scheduler.num_prefix_tokens_reused == num_reused
    assert run.events["b"] == expected_events(second)


def test_nobody_takes_a_block_of_which_a_token_is_not_known_yet():
    """Whatever it will be, and whatever stands in for it: 0, or nothing at all."""
    run = Run(plain("a", [1, 2, 3], max_new_tokens=6, seed=2), block_size=4)
    run.schedule()
    run.schedule()
    guesses = [plain(f"b{token}", [1, 2, 3, token, 5], max_new_tokens=2) for token in range(VOCAB_SIZE)]
    for guess in guesses:
        run.add(guess)
    run.complete()
    run.finish()
    for guess in guesses:
        assert run.events[guess.request_id] == expected_events(guess)


def test_after_a_loss_nothing_is_fed_by_what_was_lost():
    requests = [plain("a", [1, 2, 3], max_new_tokens=9), plain("b", [4], max_new_tokens=9)]
    run = Run(*requests)
    for _ in range(3):
        run.turn()
    run.schedule()
    assert len(run.in_flight) == 2
    assert run.scheduler.reset() == []
    run.in_flight.clear()
    run.stages.restart()
    assert sources(run.schedule()) == [None, None]
    run.finish()
    assert run.events == {request.request_id: expected_events(request) for request in requests}


def test_suspects_are_alone_in_flight():
    run = Run(plain("a", [1, 2, 3], max_new_tokens=9), plain("b", [4], max_new_tokens=9))
    for _ in range(2):
        run.schedule()
        run.schedule()
        run.scheduler.reset()
        run.in_flight.clear()
        run.stages.restart()
    microbatch = run.schedule()
    assert microbatch is not None
    assert len(microbatch.rows) == 1
    assert run.schedule() is None
    run.finish()
    assert run.events["a"][-1].token_id == expected_events(plain("a", [1, 2, 3], max_new_tokens=9))[-1].token_id


def test_eos_is_a_token_like_any_other_for_who_ignores_it():
    request = next(
        request
        for seed in range(0, 1000, 2)
        for request in [plain("a", [1, 2], max_new_tokens=12, seed=seed)]
        if EOS in [event.token_id for event in expected_events(request)[:-1]]
    )
    run = Run(request)
    run.finish()
    assert run.events["a"] == expected_events(request)
    assert run.scheduler.num_rows_ahead_wasted == 0
