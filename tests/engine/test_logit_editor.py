"""What the editor keeps of a history; that its edits are transformers' is compared where they are applied."""

import math

from hypothesis import given
from hypothesis import strategies as st

from gptj_serve.engine.logit_editor import LogitEditor
from gptj_serve.steps import LogitEdits
from gptj_serve.types import SamplingParams

EOS = 0
tokens = st.lists(st.integers(0, 4), min_size=1, max_size=12)
some_params = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 12),
    min_new_tokens=st.integers(0, 4),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    no_repeat_ngram_size=st.integers(0, 3),
    bad_words_ids=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=2),
    sequence_bias=st.lists(st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=2), st.just(2.0)), max_size=2),
    begin_suppress_tokens=st.lists(st.integers(0, 4), max_size=2),
    forced_eos_token_id=st.sampled_from([[], [EOS]]),
    exponential_decay_length_penalty=st.sampled_from([None, (2, 1.5)]),
)


class FakeMatcher:
    """Allows the tokens from 0 to the number of those accepted; finished after four."""

    def __init__(self, accepted: tuple[int, ...] = ()) -> None:
        self.accepted = accepted

    def allowed_mask(self) -> bytes:
        return bytes([(1 << len(self.accepted) + 1) - 1])

    def accept(self, token_id: int) -> None:
        if token_id > len(self.accepted):
            raise ValueError(f"{token_id} is not allowed")
        self.accepted = (*self.accepted, token_id)

    @property
    def is_finished(self) -> bool:
        return len(self.accepted) == 4

    def fork(self) -> "FakeMatcher":
        return FakeMatcher(self.accepted)


def editor(prompt: list[int], output: list[int] | None = None, **params: object) -> LogitEditor:
    params = {"max_new_tokens": 20, **params}
    made = LogitEditor(SamplingParams(**params), prompt, frozenset({EOS}))  # type: ignore[arg-type]
    for token_id in output or []:
        made.push(token_id)
    return made


def same(one: LogitEdits | None, other: LogitEdits | None) -> bool:
    """The order of token ids means nothing."""
    if one is None or other is None:
        return one is other

    def key(edits: LogitEdits) -> list[object]:
        return [sorted(v) if isinstance(v, list) else v for v in (getattr(edits, f) for f in edits.__struct_fields__)]

    return key(one) == key(other)


@given(some_params, tokens, tokens, tokens)
def test_tokens_that_are_taken_back_leave_no_trace(params, prompt: list[int], output: list[int], draft: list[int]):
    made, reference = (LogitEditor(params, prompt, frozenset({EOS})) for _ in range(2))
    for token_id in output:
        made.push(token_id)
        reference.push(token_id)
    before = made.edits()
    for token_id in draft:
        made.push(token_id)
    made.pop(len(draft))
    assert same(made.edits(), before)
    made.push(2)
    reference.push(2)
    assert same(made.edits(), reference.edits())


@given(some_params, tokens, tokens, tokens)
def test_forks_go_their_own_ways(params, prompt: list[int], output: list[int], other: list[int]):
    made, alone = (LogitEditor(params, prompt, frozenset({EOS})) for _ in range(2))
    fork = made.fork()
    for token_id in other:
        fork.push(token_id)
    for token_id in output:
        made.push(token_id)
        alone.push(token_id)
    assert same(made.edits(), alone.edits())


def test_plain_requests_have_no_edits():
    assert editor([1, 2], [3, 3, 3], stop_token_ids=[4], max_time_s=1.0, num_top_logprobs=3).edits() is None


def test_penalties_of_the_output_don_t_count_the_prompt():
    edits = editor([1, 1, 2], [2, 3, 3], presence_penalty=0.5, frequency_penalty=0.1).edits()
    assert edits is not None
    assert sorted(edits.output_counts) == [(2, 1), (3, 2)]
    assert edits.seen_token_ids == []
    seen = editor([1, 1, 2], [2, 3], repetition_penalty=1.2).edits()
    assert seen is not None
    assert sorted(seen.seen_token_ids) == [1, 2, 3]


def test_allowed_tokens_are_a_mask():
    edits = editor([1], allowed_token_ids=[2, 9]).edits()
    assert edits is not None
    assert edits.allowed_mask == bytes([0b100, 0b10])


def test_a_grammar_and_allowed_tokens_both_hold():
    params = SamplingParams(max_new_tokens=9, allowed_token_ids=[1, 2, 9])
    made = LogitEditor(params, [7], frozenset({EOS}), FakeMatcher((0, 0)))
    edits = made.edits()
    assert edits is not None
    assert edits.allowed_mask == bytes([0b110])
    fork = made.fork()
    made.push(2)
    assert made.matcher is not None
    assert fork.matcher is not None
    assert (made.matcher.accepted, fork.matcher.accepted) == ((0, 0, 2), (0, 0))  # type: ignore[attr-defined]


def test_nothing_is_allowed_where_grammar_and_allowed_tokens_contradict_each_other():
    params = SamplingParams(max_new_tokens=9, allowed_token_ids=[9])
    edits = LogitEditor(params, [7], frozenset({EOS}), FakeMatcher()).edits()
    assert edits is not None
    assert edits.allowed_mask == bytes([0])  # not b"", which would allow everything


def test_a_forced_token_that_is_suppressed_is_not_forced():
    kept = editor([1], suppress_tokens=[3], forced_eos_token_id=[3, 4], max_new_tokens=1).edits()
    assert kept is not None
    assert kept.forced_token_ids == [4]
    banned = editor([1], suppress_tokens=[3], forced_eos_token_id=[3], max_new_tokens=1).edits()
    assert banned is not None
    assert (banned.forced_token_ids, banned.banned_token_ids) == ([], [3])
    at_begin = editor([1], begin_suppress_tokens=[3], forced_eos_token_id=[3, 4], max_new_tokens=1).edits()
    assert at_begin is not None
    assert at_begin.forced_token_ids == [4]


def test_a_sequence_may_begin_where_the_prompt_begins():
    edits = editor([5], bad_words_ids=[[5, 3], [7, 5, 4]], sequence_bias=[([5, 2], 1.0)]).edits()
    assert edits is not None
    assert (edits.banned_token_ids, edits.biases) == ([3], [(2, 1.0)])


def test_boost_grows_with_the_tokens_beyond_its_start():
    params = {"exponential_decay_length_penalty": (2, 1.5)}
    assert editor([1], [5, 5], **params).edits() is None
    edits = editor([1], [5, 5, 5, 5], **params).edits()
    assert edits is not None
    assert (edits.boosted_token_ids, edits.boost) == ([EOS], 1.5**2 - 1)
    endless = editor([1], [5] * 40, exponential_decay_length_penalty=(0, 1e300)).edits()
    assert endless is not None
    assert endless.boost == math.inf
