"""The scheduler's rules one by one; test_scheduler_chaos.py mixes them."""

import random

import msgspec
import pytest
from fake_stages import EOS, VOCAB_SIZE, FakeStages, expected_events, generate_request, head_request, make_scheduler

from gptj_serve.engine.scheduler import INTERNAL_ERROR, MIN_CHUNK_TOKENS, Scheduler
from gptj_serve.errors import InvalidRequestError
from gptj_serve.steps import MicroBatch, RowOutput, RowResult, SampleSpec, StepOutput
from gptj_serve.types import (
    PRIORITY_STEP,
    BeamParams,
    EngineRequest,
    Event,
    FailureEvent,
    FinishReason,
    Pooling,
    PromptEvent,
    Task,
    TokenEvent,
)


def drain(scheduler: Scheduler, stages: FakeStages | None = None) -> list[Event]:
    """Serve everything, one microbatch at a time."""
    stages = stages or FakeStages(scheduler.blocks.block_size)
    events: list[Event] = []
    while (microbatch := scheduler.schedule()) is not None:
        events += scheduler.update(stages.run(microbatch))
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.blocks.num_used == 0
    return events


def serve(*requests: EngineRequest, **limits: int) -> list[Event]:
    scheduler = make_scheduler(**limits)
    for request in requests:
        scheduler.add(request)
    return drain(scheduler)


def token_ids(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def scheduled(scheduler: Scheduler) -> MicroBatch:
    microbatch = scheduler.schedule()
    assert microbatch is not None
    return microbatch


def decoding_scheduler(num_sequences: int, **limits: int) -> tuple[Scheduler, FakeStages]:
    """All sequences have their prompt computed and one token."""
    scheduler = make_scheduler(**limits)
    stages = FakeStages(scheduler.blocks.block_size)
    for i in range(num_sequences):
        scheduler.add(generate_request(str(i), [i % 11], max_new_tokens=20, ignore_eos=True))
    while scheduler.num_waiting:
        scheduler.update(stages.run(scheduled(scheduler)))
    return scheduler, stages


# ------------------------------------------------------------------------------------------------ a microbatch's size


@pytest.mark.parametrize(
    ("num_sequences", "num_stages", "sizes"),
    [(16, 4, [4, 4, 4, 4]), (5, 2, [3, 2]), (3, 4, [1, 1, 1, 0]), (7, 1, [7]), (1, 3, [1, 0, 0])],
)
def test_decode_rows_are_spread_over_the_stages(num_sequences: int, num_stages: int, sizes: list[int]):
    scheduler, _ = decoding_scheduler(num_sequences, num_stages=num_stages)
    microbatches = [scheduler.schedule() for _ in range(num_stages)]
    assert [len(microbatch.rows) if microbatch else 0 for microbatch in microbatches] == sizes
    riders = [row.block_table[0] for microbatch in microbatches if microbatch for row in microbatch.rows]
    assert len(set(riders)) == num_sequences  # disjoint


def test_prompts_are_not_capped_by_the_number_of_stages():
    scheduler = make_scheduler(num_stages=4)
    for i in range(8):
        scheduler.add(generate_request(str(i), [i]))
    assert len(scheduled(scheduler).rows) == 8


@pytest.mark.parametrize(
    ("num_stages", "sizes"),
    [(1, [512, 388]), (2, [225, 225, 225, 225]), (4, [128] * 7 + [4])],
)
def test_prompts_are_cut_so_that_all_stages_have_some(num_stages: int, sizes: list[int]):
    scheduler = make_scheduler(
        num_stages=num_stages, num_blocks=300, max_microbatch_tokens=512, max_sequence_tokens=1000
    )
    for i in range(9):
        scheduler.add(head_request(str(i), Task.CLASSIFY, [i] * 100))
    chunks = []
    while (microbatch := scheduler.schedule()) is not None:
        chunks.append(microbatch.num_tokens)
    assert chunks == sizes


def test_a_prompt_is_cut_by_its_own_tokens_and_not_by_those_who_decode():
    scheduler, _ = decoding_scheduler(
        80, num_stages=2, num_blocks=600, max_num_sequences=100, max_microbatch_tokens=512, max_sequence_tokens=1000
    )
    scheduler.add(head_request("long", Task.CLASSIFY, [1] * 800))
    for _ in range(2):
        sizes = [len(row.token_ids) for row in scheduled(scheduler).rows]
        assert sizes == [1] * 40 + [200]  # in flight it still counts


def test_many_prompts_are_cut_by_the_token_budget_alone():
    scheduler = make_scheduler(num_stages=2, num_blocks=600, max_microbatch_tokens=256, max_sequence_tokens=2000)
    scheduler.add(head_request("a", Task.CLASSIFY, [1] * 2000))
    assert scheduled(scheduler).num_tokens == 256


def test_beams_wider_than_the_smallest_chunk_go_on():
    """Their rows of one token don't count as prompts."""
    request = generate_request("a", range(9), max_new_tokens=3, beams=BeamParams(num_beams=MIN_CHUNK_TOKENS + 2))
    limits = {"max_num_sequences": 200, "max_microbatch_tokens": 200, "num_blocks": 1000}
    events = serve(request, num_stages=2, **limits)
    assert events == serve(request, num_stages=1, **limits)
    assert events


@pytest.mark.parametrize("budget", [1, 3, 7, 16])
def test_token_budget_holds_and_is_used_up(budget: int):
    scheduler = make_scheduler(max_microbatch_tokens=budget)
    for i in range(3):
        scheduler.add(head_request(str(i), Task.CLASSIFY, [i] * 10))
    sizes = []
    while (microbatch := scheduler.schedule()) is not None:
        sizes.append(microbatch.num_tokens)
    assert sizes == [budget] * (30 // budget) + [30 % budget] * (30 % budget > 0)


def test_decoding_goes_before_prompts_within_the_budget():
    scheduler, _ = decoding_scheduler(3, max_microbatch_tokens=5)
    scheduler.add(generate_request("long", range(10)))
    rows = scheduled(scheduler).rows
    assert [len(row.token_ids) for row in rows] == [1, 1, 1, 2]
    assert [row.start for row in rows] == [1, 1, 1, 0]


def test_long_prompt_is_cut_into_chunks_that_follow_each_other():
    scheduler = make_scheduler(max_microbatch_tokens=4)
    scheduler.add(generate_request("a", range(10), max_new_tokens=1, seed=5))
    chunks = [scheduled(scheduler).rows[0] for _ in range(3)]
    assert scheduler.schedule() is None
    assert [(row.start, row.token_ids) for row in chunks] == [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (8, [8, 9])]
    assert [row.samples for row in chunks] == [[], [], [SampleSpec(seed=5)]]
    assert [len(row.block_table) for row in chunks] == [1, 2, 3]


def test_every_chunk_of_a_qa_request_returns_its_logits_and_the_last_of_a_classify_request():
    for task, outputs in (
        (Task.QA, [RowOutput.QA, RowOutput.QA]),
        (Task.CLASSIFY, [RowOutput.NOTHING, RowOutput.CLASSIFY]),
    ):
        scheduler = make_scheduler(max_microbatch_tokens=4)
        scheduler.add(head_request("a", task, range(6)))
        assert [scheduled(scheduler).rows[0].output for _ in range(2)] == outputs
        assert scheduler.schedule() is None


def test_chunks_return_what_adds_up_to_the_pooled_hidden_states():
    for pooling, outputs in (
        (Pooling.LAST, [RowOutput.NOTHING, RowOutput.HIDDEN_LAST]),
        (Pooling.MEAN, [RowOutput.HIDDEN_SUM, RowOutput.HIDDEN_SUM]),
        (Pooling.ALL, [RowOutput.HIDDEN_ALL, RowOutput.HIDDEN_ALL]),
    ):
        scheduler = make_scheduler(max_microbatch_tokens=4)
        scheduler.add(head_request("a", Task.EMBED, range(6), pooling))
        assert [scheduled(scheduler).rows[0].output for _ in range(2)] == outputs


def test_classify_with_every_state_is_refused():
    with pytest.raises(InvalidRequestError, match="pooling='all'"):
        make_scheduler().add(head_request("a", Task.CLASSIFY, range(6), Pooling.ALL))


def test_only_the_tokens_before_a_continuation_s_are_scored():
    scheduler = make_scheduler(max_microbatch_tokens=4)
    scheduler.add(head_request("a", Task.SCORE, range(6), continuation=[7, 8, 9, 10]))
    rows = [scheduled(scheduler).rows[0] for _ in range(3)]
    assert scheduler.schedule() is None  # the continuation's last token is not computed
    assert [row.token_ids for row in rows] == [[0, 1, 2, 3], [4, 5, 7, 8], [9]]
    assert [(row.first_target, row.target_token_ids) for row in rows] == [(0, []), (1, [7, 8, 9]), (0, [10])]


def test_a_continuation_counts_for_the_length_and_goes_with_score_alone():
    scheduler = make_scheduler(max_sequence_tokens=8)
    with pytest.raises(InvalidRequestError, match="continuation_token_ids=4: 5 prompt tokens"):
        scheduler.add(head_request("a", Task.SCORE, range(5), continuation=range(4)))
    with pytest.raises(InvalidRequestError, match="continuation_token_ids"):
        scheduler.add(head_request("a", Task.SCORE, range(5)))
    with pytest.raises(InvalidRequestError, match="continuation_token_ids"):
        scheduler.add(head_request("a", Task.CLASSIFY, range(5), continuation=[1]))
    scheduler.add(head_request("a", Task.SCORE, range(5), continuation=range(3)))


def test_max_num_sequences_is_the_most_that_hold_blocks():
    scheduler = make_scheduler(max_num_sequences=2)
    for i in range(5):
        scheduler.add(generate_request(str(i), [i]))
    assert len(scheduled(scheduler).rows) == 2
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_tokens_waiting) == (2, 3, 3)


def test_admission_waits_for_the_blocks_of_the_whole_prompt():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_microbatch_tokens=4)
    scheduler.add(head_request("a", Task.CLASSIFY, range(10)))
    scheduler.add(head_request("b", Task.CLASSIFY, range(8)))
    scheduler.add(head_request("c", Task.CLASSIFY, range(2)))
    chunks = [scheduled(scheduler) for _ in range(3)]
    assert scheduler.num_running == 1  # "a" has yet to take two of the three free blocks; "c" does not overtake "b"
    assert [microbatch.num_tokens for microbatch in chunks] == [4, 4, 2]
    assert scheduler.schedule() is None


# ------------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize(
    ("num_prompt", "max_new_tokens", "field", "value"),
    [(17, 1, "prompt", 17), (10, 7, "max_new_tokens", 7), (16, 1, "max_new_tokens", 1)],
)
@pytest.mark.parametrize(
    "limits", [{"max_sequence_tokens": 16}, {"num_blocks": 4, "block_size": 4}], ids=["n_positions", "KV pool"]
)
def test_request_that_can_never_be_finished(limits, num_prompt: int, max_new_tokens: int, field: str, value: int):
    scheduler = make_scheduler(**limits)
    with pytest.raises(InvalidRequestError, match="16") as raised:
        scheduler.add(generate_request("a", [1] * num_prompt, max_new_tokens=max_new_tokens))
    assert (raised.value.field, raised.value.value) == (field, value)
    assert not scheduler.has_work


@pytest.mark.parametrize("task", [Task.CLASSIFY, Task.QA])
def test_head_request_that_is_too_long(task: Task):
    scheduler = make_scheduler(max_sequence_tokens=16)
    with pytest.raises(InvalidRequestError, match="prompt=17"):
        scheduler.add(head_request("a", task, [1] * 17))
    scheduler.add(head_request("a", task, [1] * 16))


def test_request_that_just_fits():
    request = generate_request("a", [1] * 10, max_new_tokens=6, ignore_eos=True)
    events = serve(request, num_blocks=4, block_size=4, max_sequence_tokens=16)
    assert events == expected_events(request)
    assert len(events) == 6


def test_id_is_taken_until_its_request_has_ended():
    scheduler = make_scheduler()
    request = head_request("a", Task.CLASSIFY, [1, 2])
    scheduler.add(request)
    with pytest.raises(InvalidRequestError, match="request_id='a'"):
        scheduler.add(generate_request("a", [3]))
    assert drain(scheduler) == expected_events(request)
    scheduler.add(request)


# -------------------------------------------------------------------------------------------------------- ending


def seed_that_ends(reason: FinishReason, **sampling: object) -> EngineRequest:
    """A request whose expected answer ends for that reason after a few tokens."""
    for seed in range(1000):
        request = generate_request("a", [1, 2, 3], max_new_tokens=12, seed=seed, **sampling)
        events = expected_events(request)
        if len(events) in range(3, 9) and events[-1].finish_reason is reason:
            return request
    raise AssertionError("no such seed")


def test_eos_ends_a_request():
    request = seed_that_ends(FinishReason.EOS)
    events = serve(request)
    assert events == expected_events(request)
    assert token_ids(events)[-1] == EOS


def test_ignore_eos_goes_on():
    request = seed_that_ends(FinishReason.EOS)
    ignoring = generate_request("a", [1, 2, 3], max_new_tokens=12, seed=request.sampling.seed, ignore_eos=True)
    events = serve(ignoring)
    assert len(events) == 12
    assert EOS in token_ids(events)[:9]
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_stop_token_ends_a_request():
    request = seed_that_ends(FinishReason.STOP, stop_token_ids=[4, 7], ignore_eos=True)
    assert serve(request) == expected_events(request)
    assert token_ids(serve(request))[-1] in (4, 7)


def test_min_new_tokens_holds_back_eos_and_stop_tokens():
    scheduler = make_scheduler()
    scheduler.add(generate_request("a", [1], max_new_tokens=6, min_new_tokens=3, stop_token_ids=[9, 4]))
    stages = FakeStages(4)
    banned = []
    while (microbatch := scheduler.schedule()) is not None:
        edits = microbatch.rows[0].samples[0].edits
        banned.append(edits and sorted(edits.banned_token_ids))
        scheduler.update(stages.run(microbatch))
    assert banned[:4] == [[EOS, 4, 9]] * 3 + [None] * (len(banned) > 3)


def test_row_failure_ends_its_request_alone():
    scheduler = make_scheduler()
    stages = FakeStages(4)
    good = generate_request("good", [1, 2])
    scheduler.add(generate_request("bad", [3]))
    scheduler.add(good)
    output = stages.run(scheduled(scheduler))
    output.rows[0] = RowResult(failure="NaN", is_kv_suspect=True)
    first = scheduler.update(output)
    assert first[0] == FailureEvent("bad", "NaN")
    scheduler.check_integrity()
    assert first[1:] + drain(scheduler, stages) == expected_events(good)


# -------------------------------------------------------------------------------------- preemption, abort, replay


def test_preempted_sequence_does_not_repeat_a_token():
    """Preempted and admitted again with a step in flight: that step's token counts, its recomputation's does not."""
    scheduler = make_scheduler(num_stages=3, num_blocks=4, block_size=1)
    stages = FakeStages(1)
    young = generate_request("young", [5], max_new_tokens=3, ignore_eos=True)
    scheduler.add(generate_request("elder", [1], max_new_tokens=3, ignore_eos=True))
    scheduler.add(young)
    events = scheduler.update(stages.run(scheduled(scheduler)))
    flying = [stages.run(scheduled(scheduler)) for _ in range(2)]  # a step of each; all blocks are taken
    events += scheduler.update(flying.pop(0))
    flying.append(stages.run(scheduled(scheduler)))  # the elder goes on and needs the block of the young one
    assert (scheduler.num_preemptions, scheduler.num_waiting) == (1, 1)
    scheduler.abort("elder")
    flying.append(stages.run(scheduled(scheduler)))  # the young one is computed anew; its first step still flies
    assert scheduler.num_running == 1
    while flying:
        events += scheduler.update(flying.pop(0))
        scheduler.check_integrity()
    events += drain(scheduler, stages)
    assert [event for event in events if event.request_id == "young"] == expected_events(young)


def events_if_preempted_in_flight(young: EngineRequest, head_start: int) -> list[Event] | None:
    """Its blocks go to an elder while a step of it flies; then it is computed anew before that step comes back."""
    scheduler = make_scheduler(num_stages=6, num_blocks=20, block_size=1)
    stages = FakeStages(1)
    scheduler.add(generate_request("elder", [1], max_new_tokens=19, ignore_eos=True, priority=-1))
    for _ in range(head_start):
        scheduler.update(stages.run(scheduled(scheduler)))
    scheduler.add(young)
    events: list[Event] = []
    flying: list[tuple[MicroBatch, StepOutput]] = []
    while not scheduler.num_preemptions:
        if (microbatch := scheduler.schedule()) is not None:
            flying.append((microbatch, stages.run(microbatch)))
        if not scheduler.num_preemptions and (microbatch is None or len(flying) > 1):
            if not flying:
                return None  # there was room for both
            events += scheduler.update(flying.pop(0)[1])
    if not any(len(row.samples) and row.token_ids[0] != 1 for microbatch, _ in flying for row in microbatch.rows):
        return None
    scheduler.abort("elder")
    while (microbatch := scheduler.schedule()) is not None:
        flying.append((microbatch, stages.run(microbatch)))
    while flying:
        events += scheduler.update(flying.pop(0)[1])
        scheduler.check_integrity()
    return [event for event in [*events, *drain(scheduler, stages)] if event.request_id == young.request_id]


@pytest.mark.parametrize(
    "sampling",
    [
        {"beams": BeamParams(num_beams=2)},
        {"beams": BeamParams(num_beams=3), "max_new_tokens": 4},
        {"prompt_lookup_num_tokens": 3, "seed": 1, "max_new_tokens": 12},
        {"guidance_scale": 2.0, "max_new_tokens": 6},
    ],
    ids=["two beams", "three beams", "drafts", "guide"],
)
def test_what_flew_while_its_blocks_went_to_another_counts_once(sampling: dict[str, object]):
    young = generate_request("young", [2, 3], **{"max_new_tokens": 6, "ignore_eos": True, **sampling})
    answers = [events_if_preempted_in_flight(young, head_start) for head_start in range(16)]
    assert any(answer is not None for answer in answers)
    assert all(answer is None or answer == expected_events(young) for answer in answers)


def test_a_rider_is_not_preempted_for_another_row_of_its_microbatch():
    """An urgent prompt stands before a sequence that decodes, and takes its blocks only in a microbatch without it."""
    scheduler = make_scheduler(num_blocks=8, block_size=1, max_microbatch_tokens=3)
    stages = FakeStages(1)
    requests = [
        generate_request("humble", [1], max_new_tokens=7, ignore_eos=True, priority=1),
        generate_request("urgent", [2, 3, 4, 5, 6], max_new_tokens=1),
    ]
    scheduler.add(requests[0])
    events = scheduler.update(stages.run(scheduled(scheduler)))
    scheduler.add(requests[1])
    events += drain(scheduler, stages)
    assert scheduler.num_preemptions > 0
    for request in requests:
        assert [event for event in events if event.request_id == request.request_id] == expected_events(request)


def test_preempted_in_the_making_of_a_microbatch_is_not_in_it():
    """Two decode on one stage; the elder's next block is taken from the younger, which then waits without KV."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    stages = FakeStages(2)
    for name in "ab":
        scheduler.add(generate_request(name, [1, 2, 3], max_new_tokens=5, ignore_eos=True))
    while not scheduler.num_preemptions:
        scheduler.update(stages.run(scheduled(scheduler)))
        scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    for name in "cd":
        scheduler.add(generate_request(name, [1], max_new_tokens=1))
    assert scheduler.num_waiting == 3
    assert scheduler.waiting_request_ids() == ["c", "d"], "the younger has had its first turn"


def test_abort_frees_blocks_at_once_even_with_a_step_in_flight():
    scheduler, stages = decoding_scheduler(2)
    output = stages.run(scheduled(scheduler))
    assert scheduler.blocks.num_used == 2
    assert scheduler.abort("0")
    assert scheduler.blocks.num_used == 1
    assert [event.request_id for event in scheduler.update(output)] == ["1"]
    assert not scheduler.abort("0")
    assert not scheduler.abort("never heard of")


def test_a_new_request_is_not_given_the_step_of_an_aborted_one_with_its_id():
    scheduler, stages = decoding_scheduler(1)
    output = stages.run(scheduled(scheduler))
    scheduler.abort("0")
    request = generate_request("0", [5, 6])
    scheduler.add(request)
    assert scheduler.update(output) == []
    assert drain(scheduler, stages) == expected_events(request)


def test_reset_recomputes_everything():
    requests = [generate_request("a", range(6)), head_request("b", Task.QA, range(9)), generate_request("c", [2])]
    scheduler = make_scheduler(max_microbatch_tokens=4)
    stages = FakeStages(4)
    for request in requests:
        scheduler.add(request)
    events = []
    for _ in range(3):
        events += scheduler.update(stages.run(scheduled(scheduler)))
    scheduler.schedule()
    scheduler.reset()
    stages.restart()
    scheduler.check_integrity()
    assert (scheduler.num_in_flight, scheduler.num_running, scheduler.blocks.num_used) == (0, 0, 0)
    events += drain(scheduler, stages)
    for request in requests:
        assert [event for event in events if event.request_id == request.request_id] == expected_events(request)


@pytest.mark.parametrize("num_done", [1, 3, 5])
def test_replay_goes_on_where_the_earlier_attempt_ended(num_done: int):
    original = generate_request("a", [3, 1], max_new_tokens=6, min_new_tokens=4, ignore_eos=True)
    events = serve(original)
    replayed = generate_request(
        "a", [3, 1], output=token_ids(events)[:num_done], max_new_tokens=6, min_new_tokens=4, ignore_eos=True
    )
    assert serve(replayed, max_microbatch_tokens=3) == events[num_done:]


# ----------------------------------------------------------------------------------------------- order and priority


def test_priority_moves_a_request_by_so_many_places():
    scheduler = make_scheduler(max_num_sequences=1, max_sequence_tokens=8)
    order = []
    scheduler.add(generate_request("running", [1], max_new_tokens=1))
    output = FakeStages(4).run(scheduled(scheduler))
    scheduler.add(generate_request("late", [1], max_new_tokens=1, priority=1))
    scheduler.add(generate_request("normal", [2], max_new_tokens=1))
    scheduler.add(generate_request("urgent", [3], max_new_tokens=1, priority=-1))
    for i in range(PRIORITY_STEP):
        scheduler.add(generate_request(f"next {i}", [4], max_new_tokens=1))
    scheduler.update(output)
    order = [event.request_id for event in drain(scheduler)]
    assert order[:3] == ["urgent", "normal", "next 0"]
    assert order.index("late") == PRIORITY_STEP - 1  # behind those that arrived within 256 places, before the others


def test_the_last_in_rank_is_preempted():
    scheduler = make_scheduler(num_blocks=6, block_size=2)
    stages = FakeStages(2)
    scheduler.add(generate_request("humble", [1, 2], max_new_tokens=8, ignore_eos=True, priority=1))
    scheduler.add(generate_request("urgent", [3, 4], max_new_tokens=8, ignore_eos=True))
    while not scheduler.num_preemptions:
        scheduler.update(stages.run(scheduled(scheduler)))
    events = scheduler.update(stages.run(scheduled(scheduler)))
    assert {event.request_id for event in events} == {"urgent"}


def test_a_block_is_kept_for_each_running_sequence_to_grow():
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    for i in range(6):
        scheduler.add(generate_request(str(i), [i]))
    assert len(scheduled(scheduler).rows) == 3


# -------------------------------------------------------------------------------------------------- prefix reuse


def test_requests_that_arrive_together_share_the_blocks_of_their_prefix():
    scheduler = make_scheduler(block_size=4)
    for i in range(3):
        scheduler.add(generate_request(str(i), [*range(10), i]))
    rows = scheduled(scheduler).rows
    assert [(row.start, len(row.token_ids)) for row in rows] == [(0, 11), (8, 3), (8, 3)]
    assert len({tuple(row.block_table[:2]) for row in rows}) == 1
    assert len({row.block_table[2] for row in rows}) == 3
    assert (scheduler.num_prefix_tokens, scheduler.num_prefix_tokens_reused) == (24, 16)


def test_a_prompt_that_is_being_computed_is_waited_for():
    scheduler = make_scheduler(block_size=4, max_microbatch_tokens=8)
    for i in range(2):
        scheduler.add(generate_request(str(i), range(17), seed=i))
    rows = [row for _ in range(3) for row in scheduled(scheduler).rows]
    assert [(row.start, len(row.token_ids)) for row in rows] == [(0, 8), (8, 8), (16, 1), (16, 1)]


@pytest.mark.parametrize("other", ["salt", "pool"])
def test_nothing_is_shared_with_another_salt_or_when_switched_off(other: str):
    scheduler = make_scheduler(block_size=4, reuse_prefixes=other != "pool")
    request = generate_request("a", range(9))
    scheduler.add(request)
    scheduler.add(msgspec.structs.replace(request, request_id="b", cache_salt="b" if other == "salt" else ""))
    assert [row.start for row in scheduled(scheduler).rows] == [0, 0]


def test_blocks_of_finished_requests_are_reused_until_others_need_them():
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    stages = FakeStages(4)
    first = generate_request("a", range(9), max_new_tokens=1)
    scheduler.add(first)
    assert drain(scheduler, stages) == expected_events(first)
    again = generate_request("b", range(9), max_new_tokens=1)
    scheduler.add(again)
    microbatch = scheduled(scheduler)
    assert microbatch.rows[0].start == 8
    assert scheduler.update(stages.run(microbatch)) == expected_events(again)
    scheduler.add(generate_request("large", [7] * 20, max_new_tokens=4, ignore_eos=True))
    drain(scheduler, stages)
    scheduler.add(msgspec.structs.replace(again, request_id="c"))
    assert scheduled(scheduler).rows[0].start == 0


def test_nothing_is_reused_of_what_a_request_wants_of_its_prompt():
    scheduler = make_scheduler(block_size=4)
    stages = FakeStages(4)
    scheduler.add(generate_request("a", range(9), max_new_tokens=1))
    drain(scheduler, stages)
    scored = generate_request("b", range(9), max_new_tokens=1, prompt_logprobs=True)
    scheduler.add(scored)
    events = drain(scheduler, stages)
    assert isinstance(events[0], PromptEvent)
    assert events == expected_events(scored)
    assert scheduler.num_prefix_tokens_reused == 0
    continued = head_request("c", Task.SCORE, range(9), continuation=[1, 2])
    scheduler.add(continued)
    assert drain(scheduler, stages) == expected_events(continued)
    assert scheduler.num_prefix_tokens_reused == 8


def test_what_came_of_a_failed_row_is_not_reused():
    scheduler = make_scheduler(block_size=4)
    stages = FakeStages(4)
    scheduler.add(generate_request("a", range(9)))
    output = stages.run(scheduled(scheduler))
    output.rows[0] = RowResult(failure="nothing is possible")
    scheduler.update(output)
    scheduler.add(generate_request("b", range(9)))
    microbatch = scheduled(scheduler)
    assert microbatch.rows[0].start == 8  # the request was to blame, not the numbers
    output = stages.run(microbatch)
    output.rows[0] = RowResult(failure="NaN", is_kv_suspect=True)
    scheduler.update(output)
    scheduler.add(generate_request("c", range(9)))
    assert scheduled(scheduler).rows[0].start == 0


# ---------------------------------------------------------------------------------- several sequences of one request


def test_beams_share_blocks_and_copy_the_one_that_they_write_to():
    scheduler = make_scheduler(block_size=4)
    stages = FakeStages(4)
    request = generate_request("a", range(6), max_new_tokens=6, beams=BeamParams(num_beams=3), ignore_eos=True)
    scheduler.add(request)
    scheduler.update(stages.run(scheduled(scheduler)))
    microbatch = scheduled(scheduler)
    assert len({row.block_table[0] for row in microbatch.rows}) == 1
    assert len({row.block_table[1] for row in microbatch.rows}) == 3
    assert [source for source, _ in microbatch.block_copies] == [microbatch.rows[2].block_table[1]] * 2
    events = scheduler.update(stages.run(microbatch))
    assert events + drain(scheduler, stages) == expected_events(request)


def test_guide_rides_behind_its_text():
    scheduler = make_scheduler(max_microbatch_tokens=8)
    stages = FakeStages(4)
    request = generate_request("a", range(6), guidance_scale=2.0, negative_prompt_token_ids=[7, 8, 9])
    scheduler.add(generate_request("other", [1], max_new_tokens=20, ignore_eos=True))
    scheduler.add(request)
    events = []
    seen = []
    while any(event.request_id == "a" for event in events) is False:
        microbatch = scheduled(scheduler)
        seen.append([(row.start, len(row.token_ids), len(row.samples)) for row in microbatch.rows])
        events += scheduler.update(stages.run(microbatch))
    assert seen == [[(0, 1, 1), (0, 5, 0), (0, 2, 0)], [(1, 1, 1), (5, 1, 1), (2, 1, 0)]]
    events += drain(scheduler, stages)
    assert [event for event in events if event.request_id == "a"] == expected_events(request)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"beams": BeamParams(num_beams=5)}, "num_beams"),
        ({"beams": BeamParams(num_beams=4), "max_new_tokens": 12}, "max_new_tokens"),
        ({"guidance_scale": 2.0, "negative_prompt_token_ids": [1] * 13}, "negative_prompt"),
        ({"guidance_scale": 2.0, "max_new_tokens": 12}, "max_new_tokens"),
        ({"negative_prompt_token_ids": [1]}, "negative_prompt"),
    ],
)
def test_sequences_that_can_never_run_together(sampling, field: str):
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_sequences=4, max_sequence_tokens=16)
    with pytest.raises(InvalidRequestError) as raised:
        scheduler.add(generate_request("a", [1] * 4, **sampling))
    assert raised.value.field == field


# --------------------------------------------------------------------------------------------------------- drafts


def test_drafts_change_no_answer_and_save_steps():
    """The fake's tokens repeat themselves once all but two are banned."""
    few = {"suppress_tokens": list(range(2, VOCAB_SIZE)), "max_new_tokens": 40, "ignore_eos": True}
    plain = generate_request("a", [1, 0, 1], **few)
    drafting = generate_request("a", [1, 0, 1], prompt_lookup_num_tokens=4, **few)

    def count_steps(request: EngineRequest) -> tuple[list[Event], int]:
        scheduler = make_scheduler()
        stages = FakeStages(4)
        scheduler.add(request)
        events, num_steps = [], 0
        while (microbatch := scheduler.schedule()) is not None:
            events += scheduler.update(stages.run(microbatch))
            scheduler.check_integrity()
            num_steps += 1
        assert scheduler.num_tokens_drafted >= scheduler.num_draft_tokens_accepted == 40 - num_steps
        return events, num_steps

    (events, num_steps), (drafted, num_fewer) = count_steps(plain), count_steps(drafting)
    assert drafted == events
    assert num_steps == 40
    assert num_fewer < 35


def test_drafts_keep_to_the_budget_and_to_the_length():
    few = {"suppress_tokens": list(range(1, VOCAB_SIZE)), "ignore_eos": True, "prompt_lookup_num_tokens": 8}
    scheduler = make_scheduler(max_microbatch_tokens=5)
    stages = FakeStages(4)
    scheduler.add(generate_request("a", [0] * 4, max_new_tokens=9, **few))
    widths = []
    while (microbatch := scheduler.schedule()) is not None:
        widths.append(microbatch.num_tokens)
        assert microbatch.rows[0].end < 4 + 9  # what the last token would compute is not wanted
        scheduler.update(stages.run(microbatch))
    assert widths == [4, 5, 3]


def test_time_ends_a_request_after_the_token_at_hand():
    now = 0.0
    scheduler = make_scheduler(clock=lambda: now)
    stages = FakeStages(4)
    scheduler.add(generate_request("a", [1], max_new_tokens=20, ignore_eos=True, max_time_s=2.0))
    events = scheduler.update(stages.run(scheduled(scheduler)))
    now = 2.0
    events += scheduler.update(stages.run(scheduled(scheduler)))
    assert [event.finish_reason for event in events] == [None, FinishReason.TIME]
    assert not scheduler.has_work


def test_drafts_hold_up_nobody():
    """Drafters first in rank: each sequence still gets a token in every step, and a new prompt begins."""
    few = {"suppress_tokens": list(range(2, VOCAB_SIZE)), "ignore_eos": True, "max_new_tokens": 40}
    scheduler = make_scheduler(max_microbatch_tokens=12)
    stages = FakeStages(4)
    for index in range(6):
        lookup = {"prompt_lookup_num_tokens": 8} if index < 2 else {}
        scheduler.add(generate_request(str(index), [index % 2, 0, 1], **few, **lookup))
    while scheduler.num_waiting:
        scheduler.update(stages.run(scheduled(scheduler)))
    for _ in range(10):
        events = scheduler.update(stages.run(scheduled(scheduler)))
        assert {event.request_id for event in events} == set("012345")
    assert scheduler.num_draft_tokens_accepted > 0
    late = generate_request("late", [7] * 12, max_new_tokens=1)
    scheduler.add(late)
    answers = [event for _ in range(6) for event in scheduler.update(stages.run(scheduled(scheduler)))]
    assert [event for event in answers if event.request_id == "late"] == expected_events(late)


@pytest.mark.parametrize("seed", range(60))
def test_a_guided_prompt_of_one_token_waits_like_any_other(seed: int):
    """Its sequences have one token left to compute even while it waits; none of its rows may ride then."""
    chance = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=chance.randint(14, 18), block_size=1, max_microbatch_tokens=chance.randint(3, 6),
        max_sequence_tokens=12, reuse_prefixes=False,
    )  # fmt: skip
    stages = FakeStages(1)
    requests: dict[str, EngineRequest] = {}
    events: list[Event] = []
    for index in range(60):
        if chance.random() < 0.6:
            guided = chance.random() < 0.5
            prompt = [i % 4 + 1 for i in range(1 if guided else chance.choice([1, 4, 6]))]
            sampling = {"guidance_scale": 2.0} if guided else {}
            request = generate_request(
                str(index), prompt, max_new_tokens=chance.choice([2, 4, 6]), ignore_eos=True, seed=index, **sampling
            )
            requests[str(index)] = request
            scheduler.add(request)
        microbatch = scheduler.schedule()
        scheduler.check_integrity()
        if microbatch is not None:
            events += scheduler.update(stages.run(microbatch))
    events += drain(scheduler, stages)
    for request_id, request in requests.items():
        assert [event for event in events if event.request_id == request_id] == expected_events(request)


@pytest.mark.parametrize(("max_new_tokens", "num_own_blocks"), [(8, 3), (2, 1)])
def test_beams_run_in_just_the_blocks_that_they_may_need(max_new_tokens: int, num_own_blocks: int):
    params = {"max_new_tokens": max_new_tokens, "beams": BeamParams(num_beams=3), "ignore_eos": True}
    request = generate_request("a", [1] * 6, **params)
    scheduler = make_scheduler(num_blocks=1 + 3 * num_own_blocks, block_size=4)
    scheduler.add(request)
    assert drain(scheduler) == expected_events(request)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("at", ["row", "take"])
def test_a_job_that_breaks_fails_alone(at: str, caplog):
    scheduler = make_scheduler()
    stages = FakeStages(4)
    good = generate_request("good", [1, 2])
    scheduler.add(generate_request("bad", [3, 4, 5]))
    scheduler.add(good)
    (bad,) = [entry.job for request_id, entry in scheduler._entries.items() if request_id == "bad"]

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    setattr(bad, at, broken)
    events = drain(scheduler, stages) + scheduler.take_failures()
    assert [event for event in events if event.request_id == "bad"] == [FailureEvent("bad", INTERNAL_ERROR)]
    assert [event for event in events if event.request_id == "good"] == expected_events(good)
    assert "a bug" in caplog.text
