"""Stages on a device that is as late as can be: the same answers, nothing waited for, and graphs made once."""

import logging
import random

import pytest
import torch

from gptj_serve.kernels.gpu.rows import DeviceRows
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import GPTJStage
from gptj_serve.pipeline.gpu.gpu_step import GPUStep
from gptj_serve.steps import LogitEdits, MicroBatch, Row, RowOutput, RowResult, SampleSpec, StepOutput
from gptj_serve.types import Warpers
from tests.pipeline.fake_device import FakeDevice, HostSyncError, NoHostSync
from tests.pipeline.gpu_runners import BLOCK_SIZE, MAX_ROWS, MAX_TOKENS, gpu_runners, run, torch_runners
from tests.pipeline.reference_layers import ReferenceLayers

GREEDY = SampleSpec()
EDITED = SampleSpec(edits=LogitEdits(banned_token_ids=[3]))
DRAWN = SampleSpec(Warpers(temperature=1.5), seed=7)
PROMPTS = [[5, 17, 40, 3, 88, 61, 9, 9, 52], [11, 33, 60, 4], [71]]
NUM_STEPS = 7


class CountedLayers(ReferenceLayers):
    def __init__(self, stage: GPTJStage, num_kv_blocks: int, block_size: int) -> None:
        super().__init__(stage, num_kv_blocks, block_size)
        self.num_tokens: set[int] = set()

    def run(self, hidden: torch.Tensor, rows: DeviceRows) -> torch.Tensor:
        self.num_tokens.add(rows.num_tokens)
        return super().run(hidden, rows)


@pytest.fixture(scope="module")
def checkpoint(tiny_gptj) -> Checkpoint:
    return Checkpoint.open(tiny_gptj(n_layer=2))


def table(i: int, num_tokens: int) -> list[int]:
    return list(range(16 * i, 16 * i - (-num_tokens // BLOCK_SIZE)))


def prompts(spec: SampleSpec = GREEDY) -> MicroBatch:
    return MicroBatch(0, [Row(p, 0, table(i, len(p)), samples=[spec]) for i, p in enumerate(PROMPTS)])


def decode(microbatch_id: int, tokens: list[int] | None, spec: SampleSpec = GREEDY) -> MicroBatch:
    """A token more for each; without `tokens` those of the microbatch before, which nobody has seen."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        start = len(prompt) + microbatch_id - 1
        token_id, fed_from = (0, i) if tokens is None else (tokens[i], None)
        rows.append(Row([token_id], start, table(i, start + 1), samples=[spec], fed_from=fed_from))
    return MicroBatch(microbatch_id, rows)


def tokens_of(output: StepOutput) -> list[int]:
    assert all(row is not None and row.failure is None for row in output.rows)
    return [row.tokens[0].token_id for row in output.rows]


def greedy_tokens(checkpoint: Checkpoint, spec: SampleSpec = GREEDY) -> list[list[int]]:
    """Of each step, as PyTorch's kernels give them one by one."""
    runners = torch_runners(checkpoint)
    steps = [tokens_of(run(runners, prompts(spec)))]
    for step in range(1, NUM_STEPS):
        steps.append(tokens_of(run(runners, decode(step, steps[-1], spec))))
    return steps


def assert_same(output: StepOutput, expected: StepOutput) -> None:
    for row, other in zip(output.rows, expected.rows, strict=True):
        assert (row is None) == (other is None)
        if row is None:
            continue
        assert [t.token_id for t in row.tokens] == [t.token_id for t in other.tokens]
        assert [t.logprob for t in row.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-4)
        assert [[i for i, _ in t.top_logprobs] for t in row.tokens] == [
            [i for i, _ in t.top_logprobs] for t in other.tokens
        ]
        for matrix, expected_matrix in ((row.values, other.values), (row.targets, other.targets)):
            assert (matrix is None) == (expected_matrix is None)
            if matrix is not None:
                torch.testing.assert_close(
                    torch.tensor(matrix.array), torch.tensor(expected_matrix.array), rtol=0, atol=1e-4
                )


# ---------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("num_stages", [1, 2])
def test_prompts_and_decode_steps_give_what_pytorchs_kernels_give(checkpoint: Checkpoint, num_stages: int):
    expected_runners = torch_runners(checkpoint, num_stages)
    runners = gpu_runners(checkpoint, FakeDevice(), num_stages)
    expected, output = run(expected_runners, prompts()), run(runners, prompts())
    for step in range(1, NUM_STEPS):
        assert_same(output, expected)
        microbatch = decode(step, tokens_of(expected))
        expected, output = run(expected_runners, microbatch), run(runners, microbatch)
    assert_same(output, expected)


MIXED = [
    Row([5, 9, 77, 3, 2], 0, [0, 1], samples=[GREEDY] * 3),
    Row([8], 0, [2], samples=[EDITED]),
    Row([30, 31, 32, 33, 34, 35], 0, [3, 4], RowOutput.QA),
    Row([4], 0, [5]),
    Row([40, 41], 0, [6], samples=[SampleSpec(num_top_logprobs=3)], target_token_ids=[41, 7], num_top_targets=2),
    Row([50], 0, [7], RowOutput.HIDDEN_LAST, samples=[GREEDY]),
]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_rows_that_ask_for_more_than_tokens_mix_with_those_that_don_t(checkpoint: Checkpoint, num_stages: int):
    expected = run(torch_runners(checkpoint, num_stages), MicroBatch(0, MIXED))
    assert_same(run(gpu_runners(checkpoint, FakeDevice(), num_stages), MicroBatch(0, MIXED)), expected)


def test_decode_rows_of_all_kinds_go_through_a_graph(checkpoint: Checkpoint):
    device = FakeDevice()
    runners, expected_runners = gpu_runners(checkpoint, device), torch_runners(checkpoint)
    guided = [Row([9], 0, [4], samples=[SampleSpec(guidance_scale=1.5)]), Row([2], 0, [5])]
    rows = [MIXED[1], Row([3], 0, [1], samples=[GREEDY]), *guided, MIXED[5]]
    output = run(runners, MicroBatch(0, rows))
    assert (device.num_launched, device.num_replayed) == (0, 2)
    assert_same(output, run(expected_runners, MicroBatch(0, rows)))


def test_blocks_are_copied_before_the_step(checkpoint: Checkpoint):
    first = MicroBatch(0, [Row([5, 17, 40, 3], 0, [0], samples=[GREEDY]), Row([6, 7, 8, 9], 0, [1])])
    copies = [(0, 2), (1, 0), (2, 3)]  # as if one after the other
    second = MicroBatch(1, [Row([7], 4, [3, 8], samples=[GREEDY]), Row([7], 4, [0, 9], samples=[GREEDY])], copies)
    runners, expected_runners = gpu_runners(checkpoint, FakeDevice()), torch_runners(checkpoint)
    for microbatch in (first, second):
        assert_same(run(runners, microbatch), run(expected_runners, microbatch))


def test_a_row_whose_numbers_go_wrong_fails_alone(checkpoint: Checkpoint):
    (runner,) = gpu_runners(checkpoint, FakeDevice())
    with torch.no_grad():
        runner.stage.wte.weight[13] = torch.nan
    rows = [Row([13], 0, [0], samples=[GREEDY]), Row([5], 0, [1], samples=[GREEDY])]
    bad, good = runner.run(MicroBatch(0, rows), None).rows
    assert bad is not None
    assert bad.failure is not None
    assert bad.is_kv_suspect
    assert isinstance(good, RowResult)
    assert good.failure is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([97], 0, [0]), "index out of range: the 97 token ids"),
        (Row([1], 0, [64]), "not in the 64 KV blocks"),
        (Row([1, 2, 3, 4, 5], 0, [0]), "not in the 64 KV blocks"),
        (Row([1], 96, list(range(25))), "KV blocks in a row"),
        (Row([1], 2**31 - 1, [0]), "positions from"),
    ],
)
def test_what_lies_outside_never_gets_to_the_device(checkpoint: Checkpoint, row: Row, message: str):
    device = FakeDevice()
    (runner,) = gpu_runners(checkpoint, device)
    with pytest.raises(IndexError, match=message):
        runner.begin(MicroBatch(0, [row]), None)
    assert all(stream.num_waiting == 0 for stream in device.streams)


def test_more_rows_than_it_was_made_for_are_refused(checkpoint: Checkpoint):
    (runner,) = gpu_runners(checkpoint, FakeDevice())
    rows = [Row([1], 0, [i]) for i in range(MAX_ROWS + 1)]
    with pytest.raises(IndexError, match=r"7 rows in a step \(max_num_sequences\), where there is room for 6"):
        runner.begin(MicroBatch(0, rows), None)


# --------------------------------------------------------------------------------------------- nothing is waited for


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_steps_are_fed_with_tokens_that_nobody_has_seen(checkpoint: Checkpoint, seed: int | None):
    """All steps are put in before any result is asked for; the device does them when it likes."""
    expected = greedy_tokens(checkpoint)
    device = FakeDevice(None if seed is None else random.Random(seed))
    (runner,) = gpu_runners(checkpoint, device)
    with NoHostSync(device):
        steps = [runner.begin(prompts(), None)]
        steps += [runner.begin(decode(step, None), None) for step in range(1, NUM_STEPS)]
    if seed is None:
        assert device.streams[0].num_waiting > 0
    assert [tokens_of(runner.output(step)) for step in steps] == expected


def test_beginning_a_step_waits_for_nothing_of_the_one_before(checkpoint: Checkpoint):
    """But it fills pinned memory, from which the one before that must have been taken."""
    device = FakeDevice()
    (runner,) = gpu_runners(checkpoint, device)
    for step, most_computed in enumerate([0, 0, 1, 3, 5, 7]):  # of each step the layers and the sampling
        runner.begin(prompts() if step == 0 else decode(step, None), None)
        assert device.num_computed <= most_computed


def test_tokens_that_only_the_host_can_choose_are_fed_too(checkpoint: Checkpoint):
    (runner,) = gpu_runners(checkpoint, FakeDevice())
    steps = [runner.begin(prompts(DRAWN), None)]
    steps += [runner.begin(decode(step, None, DRAWN), None) for step in range(1, NUM_STEPS)]
    assert [tokens_of(runner.output(step)) for step in steps] == greedy_tokens(checkpoint, DRAWN)


def test_hidden_states_are_handed_on_before_they_are_there(checkpoint: Checkpoint):
    device = FakeDevice()
    first, last = gpu_runners(checkpoint, device, 2)
    tokens = greedy_tokens(checkpoint)
    microbatches = [prompts(), *(decode(step, tokens[step - 1]) for step in range(1, NUM_STEPS))]
    handed_on, steps = [], []
    with NoHostSync(device):
        for microbatch in microbatches:
            handed_on.append(first.begin(microbatch, None))
            if len(handed_on) == 2:  # as if two were on their way
                steps.append(last.begin(microbatches[len(steps)], handed_on.pop(0).hidden))
        steps.append(last.begin(microbatches[-1], handed_on.pop().hidden))
    assert [tokens_of(last.output(step)) for step in steps] == tokens


def test_hidden_states_stay_until_the_next_stage_has_read_them(checkpoint: Checkpoint):
    """The first stage's device is always done before the second one's begins."""
    first, last = gpu_runners(checkpoint, FakeDevice(), 2)
    tokens = greedy_tokens(checkpoint)
    steps = []
    for microbatch in [prompts(), *(decode(step, tokens[step - 1]) for step in range(1, NUM_STEPS))]:
        hidden = first.begin(microbatch, None).hidden
        first.synchronize()
        steps.append(last.begin(microbatch, hidden))
    assert [tokens_of(last.output(step)) for step in steps] == tokens


def test_hidden_states_from_another_process_come_by_pinned_memory(checkpoint: Checkpoint):
    device = FakeDevice()
    first, last = gpu_runners(checkpoint, device, 2)
    tokens = greedy_tokens(checkpoint)
    steps = []
    for number, microbatch in enumerate([prompts(), *(decode(step, tokens[step - 1]) for step in range(1, NUM_STEPS))]):
        hidden = first.run(microbatch, None)
        with NoHostSync(device):
            steps.append(last.begin(microbatch, hidden))
        hidden.fill_(torch.nan)  # whoever brought it has done so
        assert steps[number].hidden is None
    assert [tokens_of(last.output(step)) for step in steps] == tokens


def test_a_step_that_looks_at_its_numbers_is_an_error(checkpoint: Checkpoint):
    (runner,) = gpu_runners(checkpoint, FakeDevice())
    runner.stage.ln_f.register_forward_pre_hook(lambda _, inputs: inputs[0].isfinite().all().item() and None)
    with pytest.raises(HostSyncError, match="item in a step"):
        runner.run(prompts(), None)


def test_a_step_that_nobody_asks_anything_of_is_over_when_its_output_is_there(checkpoint: Checkpoint):
    device = FakeDevice()
    (runner,) = gpu_runners(checkpoint, device)
    step = runner.begin(MicroBatch(0, [Row([5, 17, 40], 0, [0])]), None)
    assert device.num_computed == 0
    assert runner.output(step).rows == [None]
    assert device.num_computed == 1


def test_each_result_is_made_once_whoever_asks(checkpoint: Checkpoint):
    (runner,) = gpu_runners(checkpoint, FakeDevice())
    step = runner.begin(prompts(DRAWN), None)
    assert runner.output(step) is runner.output(step)
    assert isinstance(step, GPUStep)


def test_after_a_restart_any_microbatch_may_be_the_first(checkpoint: Checkpoint):
    (runner,) = gpu_runners(checkpoint, FakeDevice())
    runner.run(prompts(), None)
    with pytest.raises(AssertionError, match="1 was due"):
        runner.begin(decode(5, None), None)
    runner.restart()
    with pytest.raises(AssertionError, match="a step that was not here"):
        runner.begin(decode(5, None), None)
    runner.restart()
    assert tokens_of(runner.run(prompts(), None)) == greedy_tokens(checkpoint)[0]


# ----------------------------------------------------------------------------------------------------------- graphs


def test_graphs_are_captured_at_the_start_and_replayed_from_then_on(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
):
    device = FakeDevice()
    with caplog.at_level(logging.INFO, logger="gptj_serve"):
        (runner,) = gpu_runners(checkpoint, device)
    (line,) = [record.getMessage() for record in caplog.records if "captured" in record.getMessage()]
    # 1, 2, 4 and 6 rows of up to 6 or 24 blocks; and as many numbers of places to sample at
    assert line.startswith("captured 12 CUDA graphs in ")
    assert device.num_captured == 12
    run([runner], prompts())
    assert (device.num_captured, device.num_launched, device.num_replayed) == (12, 1, 1)  # the prompts; their sampling
    for step in range(1, 4):
        run([runner], decode(step, [1, 2, 3]))
    assert (device.num_captured, device.num_launched, device.num_replayed) == (12, 1, 7)


def test_each_number_of_tokens_that_has_kernels_of_its_own_has_been_run_at_the_start(checkpoint: Checkpoint):
    """Also without as many sequences: 8-bit products are compiled for some tens of tokens, and for more."""
    layers: list[CountedLayers] = []

    def counted(stage: GPTJStage, num_kv_blocks: int, block_size: int) -> CountedLayers:
        layers.append(CountedLayers(stage, num_kv_blocks, block_size))
        return layers[-1]

    gpu_runners(checkpoint, FakeDevice(), make_layers=counted, max_microbatch_tokens=80)
    assert {16, 32, 48, 80} <= layers[0].num_tokens


def test_steps_take_no_memory(checkpoint: Checkpoint):
    device = FakeDevice()
    runners = gpu_runners(checkpoint, device, 2)
    reserved = device.reserved_bytes()
    run(runners, prompts())
    long = Row(list(range(1, MAX_TOKENS + 1)), 0, table(0, MAX_TOKENS), samples=[GREEDY])
    run(runners, MicroBatch(1, [long]))
    for step in range(2, 6):
        run(runners, decode(step, [1, 2, 3]))
    assert device.reserved_bytes() == reserved
