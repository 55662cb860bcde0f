"""Stages at work on microbatches made by hand, as they come over the wire: each thing that a row can ask for, against
transformers' logits in fp32, and that rows don't touch each other."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import GPTJForCausalLM, GPTJForSequenceClassification

from gptj_serve.engine.sampling import NOT_FINITE, NOTHING_POSSIBLE
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline import row_outputs
from gptj_serve.pipeline.partition import partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import LogitEdits, MicroBatch, Row, RowOutput, RowResult, SampleSpec, StepOutput
from gptj_serve.types import Matrix, Warpers

BLOCK_SIZE = 4
NUM_BLOCKS = 64
VOCAB_SIZE = 97
GREEDY = SampleSpec()
PROMPT = [5, 17, 40, 3, 88, 61, 9, 9, 52, 30, 71, 2]
OTHER = [11, 33, 60, 4, 4, 25, 90]


@dataclass
class Stages:
    """A chain of stages; counts what goes through the LM head."""

    runners: list[StageRunner]
    num_steps: int = 0
    lm_head_rows: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, directory: Path, num_stages: int = 1, num_token_ids: int = VOCAB_SIZE) -> "Stages":
        checkpoint = Checkpoint.open(directory)
        cpu = torch.device("cpu")
        spans = partition(checkpoint.config.n_layer, num_stages, 1.0)
        specs = [StageSpec(span, NUM_BLOCKS, BLOCK_SIZE, torch.float32, cpu, num_token_ids) for span in spans]
        stages = cls([StageRunner.load(checkpoint, spec) for spec in specs])
        lm_head = stages.runners[-1].stage.lm_head
        lm_head.register_forward_hook(lambda _, inputs, __: stages.lm_head_rows.append(len(inputs[0])))
        return stages

    def run(self, *rows: Row, copies: list[tuple[int, int]] | None = None) -> list[RowResult | None]:
        microbatch = MicroBatch(self.num_steps, list(rows), copies or [])
        self.num_steps += 1
        self.lm_head_rows.clear()
        result: Any = None
        for runner in self.runners:
            result = runner.run(msgspec.msgpack.decode(msgspec.msgpack.encode(microbatch), type=MicroBatch), result)
        output = msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepOutput)
        assert output.microbatch_id == microbatch.microbatch_id
        assert len(output.rows) == len(rows)
        return output.rows


@pytest.fixture(scope="module")
def directory(tiny_gptj) -> Path:
    return tiny_gptj()


@pytest.fixture
def stages(directory: Path) -> Stages:
    return Stages.load(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> GPTJForCausalLM:
    return GPTJForCausalLM.from_pretrained(directory).eval()


@torch.inference_mode()
def logits_of(model: GPTJForCausalLM, token_ids: list[int]) -> Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def whole(token_ids: list[int], first_block: int, **asked_for: Any) -> Row:
    """A sequence from its beginning, in blocks of its own."""
    return Row(token_ids, 0, list(range(first_block, first_block - (-len(token_ids) // BLOCK_SIZE))), **asked_for)


def chosen(result: RowResult | None) -> list[int]:
    assert result is not None
    assert result.failure is None
    return [token.token_id for token in result.tokens]


def numbers(matrix: Matrix | None) -> Tensor:
    assert matrix is not None
    return torch.tensor(matrix.array)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("num_stages", [1, 3])
def test_samples_follow_the_last_tokens(directory: Path, model: GPTJForCausalLM, num_stages: int):
    stages = Stages.load(directory, num_stages)
    results = stages.run(
        whole(PROMPT, 0, samples=[GREEDY] * 4),
        whole(OTHER, 8),
        whole(OTHER, 16, samples=[GREEDY]),
    )
    expected = logits_of(model, PROMPT)[-4:]
    assert chosen(results[0]) == expected.argmax(-1).tolist()
    logprobs = expected.log_softmax(-1).amax(-1)
    assert_close(torch.tensor([token.logprob for token in results[0].tokens]), logprobs)
    assert results[1] is None
    assert chosen(results[2]) == [logits_of(model, OTHER)[-1].argmax().item()]
    assert stages.lm_head_rows == [5]


def test_a_draft_is_answered_as_its_tokens_would_be_one_by_one(directory: Path):
    """With noise: each sample has the position that its token takes, so verified drafts equal plain decoding."""
    spec = SampleSpec(Warpers(temperature=1.5, top_p=0.95), seed=4)
    one_by_one = Stages.load(directory)
    tokens = list(PROMPT)
    (result,) = one_by_one.run(whole(tokens, 0, samples=[spec]))
    tokens += chosen(result)
    for _ in range(6):
        (result,) = one_by_one.run(Row(tokens[-1:], len(tokens) - 1, list(range(5)), samples=[spec]))
        tokens += chosen(result)
    drafted = Stages.load(directory)
    drafted.run(whole(PROMPT, 0))
    draft = tokens[len(PROMPT) : -1]
    (result,) = drafted.run(Row(draft, len(PROMPT), list(range(5)), samples=[spec] * len(draft)))
    assert chosen(result) == tokens[len(PROMPT) + 1 :]
    (at_once,) = Stages.load(directory).run(whole(tokens[:-1], 0, samples=[spec] * 7))
    assert chosen(at_once) == tokens[len(PROMPT) :]
    assert len(set(tokens[len(PROMPT) :])) > 3


def test_the_noise_is_that_of_the_position_that_the_token_takes(stages: Stages, model: GPTJForCausalLM):
    """Position 12 follows twelve tokens: seeds must give in all versions what they gave in the first."""
    rows = [whole(PROMPT, 4 * i, samples=[SampleSpec(Warpers(temperature=2.0), seed=i)]) for i in range(12)]
    logits = logits_of(model, PROMPT)[-1].double() / 2.0
    expected = []
    for seed in range(12):
        noise = _gumbel_noise(seed, 12, 2 + 64)
        groups = [logits[:64].logsumexp(-1) + noise[0], logits[64:].logsumexp(-1) + noise[1]]
        group = int(groups[1] > groups[0])
        members = logits[64 * group : 64 * group + 64]
        expected.append(64 * group + (members + noise[2 : 2 + len(members)]).argmax().item())
    assert [chosen(result)[0] for result in stages.run(*rows)] == expected


def _gumbel_noise(seed: int, position: int, count: int) -> Tensor:
    """SplitMix64 keyed by seed and position, in plain integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    key = mix(mix(seed) + position * golden & mask)
    uniform = [((mix(key + i * golden & mask) >> 11) + 0.5) / 2**53 for i in range(1, count + 1)]
    return torch.tensor([-math.log(-math.log(u)) for u in uniform], dtype=torch.float64)


def test_edits_belong_to_their_own_sample(stages: Stages, model: GPTJForCausalLM):
    best = logits_of(model, PROMPT)[-3:].topk(2).indices
    ban = SampleSpec(edits=LogitEdits(banned_token_ids=[best[1, 0].item()]))
    (result,) = stages.run(whole(PROMPT, 0, samples=[GREEDY, ban, GREEDY]))
    assert chosen(result) == [best[0, 0], best[1, 1], best[2, 0]]


def test_ids_without_a_token_don_t_exist(directory: Path):
    """A tokenizer smaller than the vocabulary: only its own columns compete, and share the probability."""
    stages = Stages.load(directory, num_token_ids=10)
    specs = [
        SampleSpec(Warpers(temperature=temperature), seed=seed, num_top_logprobs=20)
        for seed, temperature in enumerate([0.0, 0.0, 5.0, 50.0] * 8)
    ]
    rows = [whole([i + 1], i, samples=[spec]) for i, spec in enumerate(specs)]
    for result in stages.run(*rows):
        assert chosen(result)[0] < 10
        logprobs = torch.tensor([logprob for _, logprob in result.tokens[0].top_logprobs])
        assert len(logprobs) == 10
        assert math.isclose(logprobs.exp().sum(), 1, abs_tol=1e-5)


def test_candidates_are_the_best_log_probabilities_after_edits(stages: Stages, model: GPTJForCausalLM):
    edits = LogitEdits(biases=[(7, 2.0)], banned_token_ids=[3])
    spec = SampleSpec(edits=edits, num_candidates=6)
    results = stages.run(*(whole(tokens, 8 * i, samples=[spec]) for i, tokens in enumerate((PROMPT, OTHER))))
    for tokens, result in zip((PROMPT, OTHER), results, strict=True):
        expected = logits_of(model, tokens)[-1].log_softmax(-1)
        expected[7] += 2.0
        expected[3] = -math.inf
        best = expected.topk(6)
        assert [token_id for token_id, _ in result.candidates] == best.indices.tolist()
        assert_close(torch.tensor([score for _, score in result.candidates]), best.values)
        assert result.tokens == []


def test_guidance_takes_the_next_row_for_the_unconditional_one(stages: Stages, model: GPTJForCausalLM):
    def guided(scale: float) -> int:
        conditional, unconditional = (logits_of(model, tokens)[-1].log_softmax(-1) for tokens in (PROMPT, OTHER))
        return (unconditional + scale * (conditional - unconditional)).argmax().item()

    scales = [0.5, 1.5, 3.0, 6.0, -2.0]
    rows = []
    for i, scale in enumerate(scales):
        rows.append(whole(PROMPT, 10 * i, samples=[SampleSpec(guidance_scale=scale)]))
        rows.append(whole(OTHER, 10 * i + 4))
        rows.append(whole(OTHER, 10 * i + 7, samples=[GREEDY]))
    results = stages.run(*rows)
    assert [chosen(result)[0] for result in results[::3]] == [guided(scale) for scale in scales]
    assert len(set(map(guided, scales))) > 2
    assert results[1::3] == [None] * 5
    assert {chosen(result)[0] for result in results[2::3]} == {logits_of(model, OTHER)[-1].argmax().item()}
    assert stages.lm_head_rows == [15]


# ------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("max_scored_rows", [1, 3, 128])
def test_targets_are_scored_in_slices_over_all_rows(
    stages: Stages, model: GPTJForCausalLM, max_scored_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(row_outputs, "MAX_SCORED_ROWS", max_scored_rows)
    results = stages.run(
        whole(PROMPT, 0, target_token_ids=PROMPT[3:], first_target=2, num_top_targets=4),
        whole(OTHER, 8, samples=[GREEDY]),
        whole(OTHER, 16, target_token_ids=[50, 51], first_target=5),
        whole(PROMPT, 24, target_token_ids=[1], first_target=11, num_top_targets=200),
    )
    logprobs = logits_of(model, PROMPT).log_softmax(-1)
    first = numbers(results[0].targets)
    assert first.shape == (9, 1 + 2 * 4)
    assert_close(first[:, 0], logprobs[2:11].gather(1, torch.tensor(PROMPT[3:])[:, None])[:, 0])
    best = logprobs[2:11].topk(4)
    assert torch.equal(first[:, 1:5].long(), best.indices)
    assert_close(first[:, 5:], best.values)
    assert_close(numbers(results[2].targets)[:, 0], logits_of(model, OTHER).log_softmax(-1)[[5, 6], [50, 51]])
    everything = numbers(results[3].targets)  # no more than there are
    assert everything.shape == (1, 1 + 2 * VOCAB_SIZE)
    assert_close(everything[0, 1 + VOCAB_SIZE :], logprobs[11].sort(descending=True).values)
    assert stages.lm_head_rows[0] == 1
    assert sum(stages.lm_head_rows[1:]) == 9 + 2 + 1
    assert max(stages.lm_head_rows[1:]) == min(12, max_scored_rows)


def test_a_target_without_a_logit_fails_its_row_alone(stages: Stages):
    targets = [5, 97, 96, 2**31 - 1]
    results = stages.run(*(whole([1, 2], i, target_token_ids=[3, target]) for i, target in enumerate(targets)))
    assert [result.failure for result in results[1::2]] == [
        f"token id {target} has no logit: the model's are below 97" for target in (97, 2**31 - 1)
    ]
    assert all(numbers(result.targets).shape == (2, 1) for result in results[::2])
    assert stages.lm_head_rows == [4]


def test_a_row_can_ask_for_everything_at_once(stages: Stages, model: GPTJForCausalLM, directory: Path):
    row = whole(
        PROMPT,
        0,
        output=RowOutput.CLASSIFY,
        samples=[GREEDY, GREEDY],
        target_token_ids=PROMPT[1:],
    )
    (result,) = stages.run(row)
    logits = logits_of(model, PROMPT)
    assert chosen(result) == logits[-2:].argmax(-1).tolist()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])
    assert_close(numbers(result.targets), expected)
    classifier = GPTJForSequenceClassification.from_pretrained(directory).eval()
    with torch.inference_mode():
        assert_close(numbers(result.values), classifier(torch.tensor([PROMPT])).logits)


def test_what_no_row_asks_for_is_not_computed(stages: Stages):
    assert stages.run(whole(PROMPT, 0), whole(OTHER, 8, output=RowOutput.QA))[0] is None
    assert stages.lm_head_rows == []


# ----------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_row_whose_numbers_go_wrong_fails_alone(directory: Path, num_stages: int):
    """The embedding of one token is NaN: whoever has it in its context fails, whatever it asks for."""

    def rows(tokens: list[int]) -> list[Row]:
        drawn = SampleSpec(Warpers(temperature=1.0, top_k=20, typical_p=0.9), seed=3, num_top_logprobs=3)
        return [
            whole(tokens, 0, samples=[GREEDY]),
            whole(tokens, 4, samples=[drawn]),
            whole(tokens, 8, samples=[GREEDY, drawn]),
            whole(tokens, 12, samples=[SampleSpec(num_candidates=4)]),
            whole(tokens, 16, samples=[SampleSpec(Warpers(temperature=1.0), edits=LogitEdits(banned_token_ids=[4]))]),
            whole(tokens, 20, target_token_ids=tokens[1:], num_top_targets=2),
            whole(tokens, 24, samples=[GREEDY], target_token_ids=tokens[1:2]),
            whole(tokens, 28, output=RowOutput.HIDDEN_ALL),
            whole(tokens, 32, samples=[SampleSpec(guidance_scale=2.0)]),
            whole(tokens, 36),
        ]

    stages = Stages.load(directory, num_stages)
    poison = 77
    sound = stages.run(*rows(PROMPT))
    with torch.no_grad():
        stages.runners[0].stage.wte.weight[poison] = math.nan
    assert stages.run(*rows(PROMPT)) == sound
    poisoned = rows([*PROMPT[:3], poison, *PROMPT[4:]])
    for victims in (slice(0, 8, 2), slice(1, 8, 2), slice(8, 9), slice(9, 10)):  # the last is the unconditional one
        mixed = rows(PROMPT)
        mixed[victims] = poisoned[victims]
        results = stages.run(*mixed)
        concerned = [8] if victims.start == 9 else list(range(10))[victims]
        for index, result in enumerate(results):
            assert result == (RowResult(failure=NOT_FINITE, is_kv_suspect=True) if index in concerned else sound[index])


def test_a_row_fails_alone_and_only_if_nothing_is_possible_after_its_first_token(stages: Stages):
    """What follows a draft means nothing if the draft was wrong: the tokens before it stand."""
    nothing = SampleSpec(edits=LogitEdits(allowed_mask=b"\x00"))
    results = stages.run(
        whole(PROMPT, 0, samples=[nothing, GREEDY, GREEDY], target_token_ids=[1]),
        whole(PROMPT, 4, samples=[GREEDY, GREEDY, GREEDY], target_token_ids=[1]),
        whole(PROMPT, 8, samples=[GREEDY, nothing, GREEDY], target_token_ids=[1]),
    )
    assert results[0] == RowResult(failure=NOTHING_POSSIBLE)
    assert len(chosen(results[1])) == 3
    assert results[2] is not None
    assert results[2].failure is None
    assert chosen(results[2]) == chosen(results[1])[:1]


# ------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("num_stages", [1, 3])
def test_blocks_are_copied_in_every_layer_before_anything_is_written(directory: Path, num_stages: int):
    """Two sequences fork from one in the middle of a block; the first goes on in it while the others write copies."""
    stages = Stages.load(directory, num_stages)
    stages.run(whole(PROMPT[:10], 0))  # blocks 0, 1 and half of 2
    ends = {2: [71, 2], 9: [8, 20], 5: [44, 45]}
    rows = [
        Row(tokens, 10, [0, 1, block], samples=[SampleSpec(num_top_logprobs=VOCAB_SIZE)] * 2)
        for block, tokens in ends.items()
    ]
    results = stages.run(*rows, copies=[(2, 9), (9, 5)])
    for tokens, result in zip(ends.values(), results, strict=True):
        (alone,) = Stages.load(directory).run(
            whole(PROMPT[:10] + tokens, 0, samples=[SampleSpec(num_top_logprobs=VOCAB_SIZE)] * 2)
        )
        for ours, expected in zip(result.tokens, alone.tokens, strict=True):
            assert_close(_by_id(ours.top_logprobs), _by_id(expected.top_logprobs))


def _by_id(pairs: list[tuple[int, float]]) -> Tensor:
    return torch.tensor([logprob for _, logprob in sorted(pairs)])


def test_a_row_reads_blocks_that_another_row_fills(stages: Stages, model: GPTJForCausalLM):
    """As when two requests with the same prompt arrive together."""
    rows = [
        Row(PROMPT[8:], 8, [3, 7, 12], samples=[GREEDY]),
        Row(PROMPT[:8], 0, [3, 7]),
        Row([33, 34], 8, [3, 7, 20], samples=[GREEDY]),
    ]
    results = stages.run(*rows)
    assert chosen(results[0]) == [logits_of(model, PROMPT)[-1].argmax().item()]
    assert chosen(results[2]) == [logits_of(model, [*PROMPT[:8], 33, 34])[-1].argmax().item()]


@pytest.mark.parametrize("spec", [GREEDY, SampleSpec(Warpers(temperature=0.9, top_k=30), seed=4)])
def test_a_row_is_fed_with_what_a_row_of_the_step_before_chose(directory: Path, spec: SampleSpec):
    """As if the engine had waited for the token and sent it; rows may change places from step to step."""
    sequences = {"mine": (PROMPT, list(range(8))), "theirs": (OTHER, list(range(8, 14)))}
    orders = [["mine", "", "theirs"], ["theirs", "mine"], ["mine", "", "theirs"], ["", "mine", "theirs"]]

    def tokens(*, is_fed: bool) -> dict[str, list[int]]:
        stages = Stages.load(directory)
        found: dict[str, list[int]] = {"mine": [], "theirs": [], "": []}
        for step, order in enumerate(orders):
            rows = [whole([7, 8], 20, samples=[spec])] * len(order)
            for index, name in enumerate(order):
                if name:
                    prompt, table = sequences[name]
                    if step == 0:
                        rows[index] = Row(prompt, 0, table, samples=[spec])
                    elif is_fed:
                        source = orders[step - 1].index(name)
                        rows[index] = Row([0], len(prompt) + step - 1, table, samples=[spec], fed_from=source)
                    else:
                        rows[index] = Row(found[name][-1:], len(prompt) + step - 1, table, samples=[spec])
            for name, result in zip(order, stages.run(*rows), strict=True):
                found[name] += chosen(result)
        return found

    expected = tokens(is_fed=False)
    assert tokens(is_fed=True) == expected
    assert len({*expected["mine"], *expected["theirs"]}) > 3


def test_a_row_fed_by_a_failed_one_disturbs_nobody(directory: Path, model: GPTJForCausalLM):
    stages = Stages.load(directory)
    impossible = SampleSpec(edits=LogitEdits(allowed_mask=b"\0"))
    results = stages.run(whole(OTHER, 8, samples=[impossible]), whole(PROMPT, 0, samples=[GREEDY]))
    assert results[0] is not None
    assert results[0].failure == NOTHING_POSSIBLE
    (token_id,) = chosen(results[1])
    table = list(range(8, 8 + len(OTHER)))
    results = stages.run(
        Row([0], len(OTHER), table, samples=[GREEDY], fed_from=0),
        Row([0], len(PROMPT), [0, 1, 2, 3], samples=[GREEDY], fed_from=1),
    )
    expected = logits_of(model, [*PROMPT, token_id])[-1].argmax().item()
    assert chosen(results[1]) == [expected]


def test_after_a_restart_there_is_nothing_to_feed_with(stages: Stages):
    fed = Row([0], len(PROMPT), [0, 1, 2, 3], samples=[GREEDY], fed_from=0)
    stages.run(whole(PROMPT, 0, samples=[GREEDY]))
    stages.runners[0].restart()
    with pytest.raises(AssertionError, match="nothing was computed before"):
        stages.run(fed)


def test_microbatches_come_in_order_without_gaps(directory: Path):
    (runner,) = Stages.load(directory).runners
    microbatch = [MicroBatch(i, [Row([1], 0, [0])]) for i in range(9)]
    runner.run(microbatch[3], None)
    runner.run(microbatch[4], None)
    for wrong in (3, 4, 6):
        with pytest.raises(AssertionError, match="5 was due"):
            runner.run(microbatch[wrong], None)
    runner.restart()
    runner.run(microbatch[8], None)
