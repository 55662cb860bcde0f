"""`PipelineChoice`: where requests go, and that no pipeline is flooded or left idle."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.engine.admission import make_job
from gptj_serve.routing.choice import MAX_SHARE, MIN_SHARE, PipelineChoice, Route, RoutedBy, num_reusable_tokens
from gptj_serve.types import EngineRequest, Pooling, SamplingParams, Task

BLOCK_SIZE = 16
SYSTEM = list(range(1000, 1000 + 20 * BLOCK_SIZE))

numbers = itertools.count()


def request(token_ids: Sequence[int], **fields: Any) -> EngineRequest:
    return EngineRequest(
        request_id=str(next(numbers)),
        task=Task.GENERATE,
        prompt_token_ids=list(token_ids),
        sampling=SamplingParams(max_new_tokens=10),
        **fields,
    )


def choice(**options: Any) -> PipelineChoice:
    return PipelineChoice(BLOCK_SIZE, 1000, **options)


def serve(choice: PipelineChoice, request: EngineRequest, pipeline: str, output: Sequence[int] = (7,)) -> None:
    """All of a request's life there."""
    choice.route(request, [pipeline])
    choice.on_event(request.request_id, pipeline)
    choice.ended(request.request_id, output)


def keep_busy(choice: PipelineChoice, pipeline: str, num_requests: int) -> list[EngineRequest]:
    """So many requests stay there, and have begun to be answered."""
    requests = [request([5]) for _ in range(num_requests)]
    for one in requests:
        choice.route(one, [pipeline])
        choice.on_event(one.request_id, pipeline)
    return requests


def test_what_nobody_knows_goes_where_there_is_least_to_do() -> None:
    assert choice().route(request(SYSTEM), "ab") == Route(RoutedBy.LOAD)


def test_a_conversation_goes_on_where_it_is() -> None:
    """With what was generated there: of the second turn all whole blocks are known, whoever else has the first."""
    known = choice()
    turn = SYSTEM + [1] * 20
    answer = [2] * 30
    serve(known, request(turn), "b", answer)
    serve(known, request(turn), "a", [3] * 30)
    for _ in range(5):
        second = request([*turn, *answer, *[4] * 10])
        assert known.route(second, "abc") == Route(RoutedBy.PREFIX, "b")
        assert known.num_tokens_due("b") == len(second.prompt_token_ids) - (len(turn) + 29) // BLOCK_SIZE * BLOCK_SIZE
        known.ended(second.request_id)
    assert known.num_tokens_due("b") == 0


def test_short_prompts_with_long_answers_are_known_too() -> None:
    known = choice()
    serve(known, request([1] * 5), "b", [2] * 40)
    assert known.route(request([1] * 5 + [2] * 40), "ab") == Route(RoutedBy.PREFIX, "b")


def test_other_salts_are_other_prefixes() -> None:
    known = choice()
    serve(known, request(SYSTEM, cache_salt="one"), "a")
    assert known.route(request(SYSTEM, cache_salt="two"), "ab") == Route(RoutedBy.LOAD)
    assert known.route(request(SYSTEM, cache_salt="one"), "ab") == Route(RoutedBy.PREFIX, "a")


def test_a_long_prefix_is_worth_waiting_for_and_a_short_one_is_not() -> None:
    """Of the first one, 320 tokens are known to "a", of the second one 80; 300 others are due there before."""
    known = choice()
    serve(known, request(SYSTEM), "a")
    serve(known, request([9] * 81), "a")
    keep_busy(known, "b", 2)
    due = request([*[9] * 80, *[8] * 300])
    assert known.route(due, "ab") == Route(RoutedBy.PREFIX, "a")
    assert known.num_tokens_due("a") == 300
    for prompt, wanted in (([*SYSTEM, 1], Route(RoutedBy.PREFIX, "a")), ([9] * 90, Route(RoutedBy.LOAD))):
        asked = request(prompt)
        assert known.route(asked, "ab") == wanted
        known.ended(asked.request_id)
    known.on_event(due.request_id, "a")
    assert known.num_tokens_due("a") == 0
    assert known.route(request([9] * 90), "ab") == Route(RoutedBy.PREFIX, "a")


def test_a_request_counts_where_it_is() -> None:
    """Serve may send it elsewhere than was preferred, and it may fail before it is anywhere."""
    known = choice()
    serve(known, request(SYSTEM), "a")
    asked, lost = request([*SYSTEM, 1, 2, 3]), request([*SYSTEM, 4])
    assert known.route(asked, "ab").pipeline == "a"
    assert (known.num_requests("a"), known.num_tokens_due("a")) == (1, 3)
    known.on_event(asked.request_id, "b")
    assert [(known.num_requests(name), known.num_tokens_due(name)) for name in "ab"] == [(0, 0), (1, 0)]
    assert known.route(lost, "ab").pipeline == "a"  # both hold it now, and "b" has more to do
    known.ended(lost.request_id)
    known.ended(asked.request_id, [5] * 20)
    known.on_event(asked.request_id, "a")  # too late to count
    assert [(known.num_requests(name), known.num_tokens_due(name)) for name in "ab"] == [(0, 0), (0, 0)]
    assert known.route(request([*SYSTEM, 1, 2, 3, *[5] * 20]), "ab").pipeline == "b"


def test_what_is_on_its_way_by_load_counts_once_it_is_taken() -> None:
    """A burst with a beginning that nobody knew: before any of it is answered, more of it is sent where that is."""
    known = choice()
    burst = [request([*SYSTEM, number]) for number in range(3)]
    for one in burst:
        assert known.route(one, "abc") == Route(RoutedBy.LOAD)
    for one, pipeline in zip(burst, "aab", strict=True):
        known.on_taken(one.request_id, pipeline)
    assert [known.num_requests(pipeline) for pipeline in "abc"] == [2, 1, 0]
    assert [known.num_tokens_due(pipeline) for pipeline in "abc"] == [len(SYSTEM) + 2, len(SYSTEM) + 1, 0]
    more = request([*SYSTEM, 9])
    assert known.route(more, "ab") == Route(RoutedBy.PREFIX, "b")
    known.on_taken(more.request_id, "b")  # as it was to be
    assert (known.num_requests("b"), known.num_tokens_due("b")) == (2, len(SYSTEM) + 2)
    known.on_event(more.request_id, "b")
    known.on_taken(more.request_id, "b")  # the event was faster
    assert (known.num_requests("b"), known.num_tokens_due("b")) == (2, len(SYSTEM) + 1)
    for one in [*burst, more]:
        known.ended(one.request_id)
        known.on_taken(one.request_id, "a")  # too late to count
    assert [(known.num_requests(name), known.num_tokens_due(name)) for name in "ab"] == [(0, 0), (0, 0)]


def test_a_request_that_is_not_taken_where_it_was_to_go_counts_where_it_is() -> None:
    known = choice()
    serve(known, request(SYSTEM), "a")
    asked = request([*SYSTEM, 1])
    assert known.route(asked, "ab").pipeline == "a"
    known.on_taken(asked.request_id, "b")
    assert [(known.num_requests(name), known.num_tokens_due(name)) for name in "ab"] == [(0, 0), (1, len(SYSTEM) + 1)]


def test_what_is_gone_is_not_preferred() -> None:
    known = choice()
    serve(known, request(SYSTEM), "a")
    assert known.route(request(SYSTEM), "bc") == Route(RoutedBy.LOAD)
    known.keep_only({"b", "c"})
    assert known.route(request(SYSTEM), "abc") == Route(RoutedBy.LOAD)


def test_what_lost_its_blocks_holds_what_it_has_computed_since() -> None:
    """Of three requests one leaves it, one is computed there again, one has not come there yet."""
    known = choice()
    leaving, staying, coming = request([*SYSTEM, 1]), request([6] * 100), request([7] * 100)
    for one in (leaving, staying):
        known.route(one, "a")
        known.on_event(one.request_id, "a")
    known.route(coming, "a")
    known.on_taken(coming.request_id, "a")
    known.forget("a")
    assert (known.num_requests("a"), known.num_tokens_due("a")) == (3, 321 + 100 + 100)
    known.ended(leaving.request_id, [2] * 40)
    assert (known.num_requests("a"), known.num_tokens_due("a")) == (2, 200)
    assert known.route(request([*SYSTEM, 1, *[2] * 40]), "ab") == Route(RoutedBy.LOAD)
    for one in (staying, coming):
        known.on_event(one.request_id, "a")
    assert known.num_tokens_due("a") == 0
    assert known.route(request([6] * 100), "ab") == Route(RoutedBy.PREFIX, "a")
    known.ended(staying.request_id, [3] * 40)
    again = request([*[6] * 100, *[3] * 40])
    assert known.route(again, "ab") == Route(RoutedBy.PREFIX, "a")
    assert known.num_tokens_due("a") == 4 + 140 - 138 // BLOCK_SIZE * BLOCK_SIZE


def test_where_prefixes_are_not_kept_only_load_counts() -> None:
    known = choice(is_prefix_aware=False)
    serve(known, request(SYSTEM), "a", [1] * 50)
    assert known.route(request(SYSTEM), "ab") == Route(RoutedBy.LOAD)
    assert known.route(request(SYSTEM, session_id="s"), "ab").routed_by is RoutedBy.SESSION


# ── balance ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Sent:
    """A request at a pipeline, or on its way there."""

    choice: PipelineChoice
    request: EngineRequest
    pipeline: str
    is_preferred: bool
    taken_after: int  # steps of the cluster
    begun_after: int
    age: int = 0

    @property
    def is_taken(self) -> bool:
        return self.age >= self.taken_after

    def go_on(self) -> None:
        self.age += 1
        if self.age == self.begun_after:
            self.choice.on_event(self.request.request_id, self.pipeline)
        elif self.age == self.taken_after:
            self.choice.on_taken(self.request.request_id, self.pipeline)

    def is_known_to(self, choice: PipelineChoice) -> bool:
        return self.is_taken or (self.is_preferred and self.choice is choice)


class Cluster:
    """Pipelines under several ingresses. What is not preferred goes to the less loaded of two random ones.

    With each new request those before take a step: they arrive after some, and later begin to be answered.
    """

    def __init__(self, pipelines: str, num_ingresses: int = 1) -> None:
        self.pipelines = pipelines
        self.choices = [choice() for _ in range(num_ingresses)]
        self.ongoing: list[Sent] = []
        self.num_served: Counter[str] = Counter()
        self.random = random.Random(0)

    def num_sent(self, pipeline: str) -> int:
        """And not over."""
        return sum(sent.pipeline == pipeline for sent in self.ongoing)

    def begin(self, request: EngineRequest) -> RoutedBy:
        for sent in self.ongoing:
            sent.go_on()
        choice = self.random.choice(self.choices)
        unknown = Counter(sent.pipeline for sent in self.ongoing if not sent.is_known_to(choice))
        taken = Counter(sent.pipeline for sent in self.ongoing if sent.is_taken and sent.choice is not choice)
        for name in self.pipelines:
            assert choice.num_requests(name) + taken[name] == self.num_sent(name) - unknown[name]
        route = choice.route(request, self.pipelines, taken)
        pipeline = route.pipeline or min(self.random.sample(self.pipelines, 2), key=self.num_sent)
        self.num_served[pipeline] += 1
        taken_after = self.random.randint(1, 4)
        begun_after = self.random.randint(taken_after, 12)
        self.ongoing.append(Sent(choice, request, pipeline, bool(route.pipeline), taken_after, begun_after))
        if route.pipeline is not None:
            share = max(MIN_SHARE, math.ceil(MAX_SHARE * len(self.ongoing) / len(self.pipelines)))
            assert self.num_sent(pipeline) <= share + unknown[pipeline]
        return route.routed_by

    def end(self, index: int) -> None:
        sent = self.ongoing.pop(index)
        sent.choice.ended(sent.request.request_id, [3] * 20 if sent.age >= sent.begun_after else ())


@pytest.mark.parametrize(("num_ingresses", "least_share"), [(1, 0.8), (3, 0.3)])
def test_a_common_beginning_floods_nobody_and_leaves_nobody_idle(num_ingresses: int, least_share: float) -> None:
    """All have the same system prompt, one pipeline was the only one to know it, and users come and go unevenly.

    Each ingress has to find out by itself that others know it too.
    """
    cluster = Cluster("abcd", num_ingresses)
    for known in cluster.choices:
        serve(known, request(SYSTEM), "a")
    routed = Counter()
    for _ in range(600):
        routed[cluster.begin(request([*SYSTEM, next(numbers), *[1] * 20]))] += 1
        while len(cluster.ongoing) > cluster.random.choice([4, 24, 40]):
            cluster.end(min(cluster.random.randrange(len(cluster.ongoing)) for _ in range(2)))
    assert min(cluster.num_served[name] for name in "abcd") > least_share * 600 / 4, cluster.num_served
    assert max(cluster.num_served.values()) < (MAX_SHARE + 0.2) * 600 / 4, cluster.num_served
    assert routed[RoutedBy.PREFIX] > 570  # all know it soon


def test_a_pipeline_without_work_gets_some_before_others_get_much() -> None:
    """Though these could take all within their shares: it may have been started for them."""
    known = choice()
    for pipeline in "abc":
        serve(known, request(SYSTEM), pipeline)
        keep_busy(known, pipeline, MIN_SHARE)
    session_id = next(name for name, own in pipelines_of(choice(), "abcd").items() if own == "a")
    in_session = [request([number], session_id=session_id) for number in range(2)]
    new = request([*SYSTEM, 1])
    assert known.route(new, "abcd") == Route(RoutedBy.LOAD)
    assert known.route(in_session[0], "abcd") == Route(RoutedBy.SESSION, "d")
    known.on_taken(new.request_id, "d")
    assert known.route(in_session[1], "abcd") == Route(RoutedBy.SESSION, "a")
    assert known.route(request([*SYSTEM, 2]), "abcd").routed_by is RoutedBy.PREFIX


def test_a_pipeline_that_is_slow_gets_less() -> None:
    """It holds the system prompt too, but its requests stay longer, and so count there."""
    cluster = Cluster("abc")
    for pipeline in "abc":
        serve(cluster.choices[0], request(SYSTEM), pipeline)
    for _ in range(600):
        cluster.begin(request([*SYSTEM, next(numbers), *[1] * 20]))
        fast = [index for index, sent in enumerate(cluster.ongoing) if sent.pipeline != "a"]
        if len(cluster.ongoing) > 18:
            cluster.end(fast[0] if fast and cluster.random.random() < 0.9 else 0)
    assert 0 < cluster.num_served["a"] < 0.6 * cluster.num_served["b"]
    assert cluster.num_served["c"] > 0.8 * cluster.num_served["b"]


def test_requests_of_other_ingresses_count() -> None:
    known = choice()
    serve(known, request(SYSTEM), "a")
    assert known.route(request(SYSTEM), "ab", {"a": 1, "b": 1}) == Route(RoutedBy.PREFIX, "a")
    assert known.route(request(SYSTEM), "ab", {"a": 20, "b": 1}) == Route(RoutedBy.LOAD)


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=60),
    num_pipelines=st.integers(2, 5),
)
def test_nobody_is_preferred_beyond_its_share(steps: list[tuple[int, int, bool]], num_pipelines: int) -> None:
    """Whatever comes and goes (`Cluster.begin` looks); and when all is over nothing is counted any more."""
    cluster = Cluster("abcde"[:num_pipelines], 2)
    for conversation, session, ends in steps:
        session_id = f"session {session}" if session else ""
        cluster.begin(request([*SYSTEM, *[conversation] * 40, next(numbers)], session_id=session_id))
        if ends:
            cluster.end(0)
    while cluster.ongoing:
        cluster.end(0)
    assert [known.num_requests(name) for known in cluster.choices for name in "abcde"] == [0] * 10
    assert [known.num_tokens_due(name) for known in cluster.choices for name in "abcde"] == [0] * 10


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────


def pipelines_of(known: PipelineChoice, pipelines: Sequence[str], num_sessions: int = 300) -> dict[str, str]:
    found = {}
    for number in range(num_sessions):
        asked = request([1], session_id=f"user-{number}")
        route = known.route(asked, pipelines)
        assert route.routed_by is RoutedBy.SESSION
        assert route.pipeline is not None
        found[asked.session_id] = route.pipeline
        known.ended(asked.request_id)
    return found


def test_all_ingresses_find_the_same_pipeline_for_a_session() -> None:
    found = pipelines_of(choice(), "abcd")
    assert pipelines_of(choice(), "dcba") == found
    assert all(num > 300 / 4 * 0.7 for num in Counter(found.values()).values()), Counter(found.values())
    assert len(Counter(found.values())) == 4


def test_only_the_sessions_of_a_pipeline_that_leaves_move() -> None:
    before, after, more = (pipelines_of(choice(), names) for names in ("abcd", "abd", "abcde"))
    assert all(after[session] == pipeline for session, pipeline in before.items() if pipeline != "c")
    assert {after[session] for session, pipeline in before.items() if pipeline == "c"} == set("abd")
    assert all(pipeline == "e" for session, pipeline in more.items() if pipeline != before[session])


def test_a_session_whose_pipeline_has_its_share_moves_for_a_while() -> None:
    known = choice()
    own = pipelines_of(known, "abc", 1)["user-0"]
    second = pipelines_of(known, [name for name in "abc" if name != own], 1)["user-0"]
    busy = keep_busy(known, own, 4)
    assert pipelines_of(known, "abc", 1)["user-0"] == second
    for one in busy:
        known.ended(one.request_id)
    assert pipelines_of(known, "abc", 1)["user-0"] == own


def test_a_few_requests_of_others_send_no_session_away() -> None:
    """Nor do they keep a conversation from its cache: three on one of eight pipelines, and all else idle."""
    known = choice()
    pipelines = "abcdefgh"
    own = pipelines_of(known, pipelines, 1)["user-0"]
    serve(known, request(SYSTEM), own)
    keep_busy(known, own, MIN_SHARE - 1)
    assert pipelines_of(known, pipelines, 1)["user-0"] == own
    assert known.route(request([*SYSTEM, 1]), pipelines) == Route(RoutedBy.PREFIX, own)
    assert pipelines_of(known, pipelines, 1)["user-0"] != own, "it has its share now"


def test_a_session_goes_before_a_prefix() -> None:
    known = choice()
    own = pipelines_of(known, "ab", 1)["user-0"]
    other = "b" if own == "a" else "a"
    serve(known, request(SYSTEM), other)
    assert known.route(request(SYSTEM, session_id="user-0"), "ab") == Route(RoutedBy.SESSION, own)


# ── what can be reused ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        {"task": Task.GENERATE, "sampling": SamplingParams(max_new_tokens=5)},
        {"task": Task.GENERATE, "sampling": SamplingParams(max_new_tokens=5), "output_token_ids": [1] * 20},
        {"task": Task.GENERATE, "sampling": SamplingParams(max_new_tokens=5, prompt_logprobs=True)},
        {"task": Task.SCORE, "continuation_token_ids": [1, 2, 3]},
        {"task": Task.QA},
        *[{"task": task, "pooling": pooling} for task in (Task.CLASSIFY, Task.EMBED) for pooling in Pooling
          if (task, pooling) != (Task.CLASSIFY, Pooling.ALL)],
    ],
)  # fmt: skip
def test_what_can_be_reused_is_what_the_engine_reuses(fields: dict[str, Any]) -> None:
    asked = EngineRequest(request_id="r", prompt_token_ids=list(range(50)), **fields)
    job = make_job(asked, BLOCK_SIZE, frozenset(), None, 0.0)
    assert num_reusable_tokens(asked) == job.num_reusable(job.sequences[0])
