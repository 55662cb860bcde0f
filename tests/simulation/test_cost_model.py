from pathlib import Path

import numpy as np
import pytest

from gptj_serve.engine.scheduler import SchedulerLimits
from gptj_serve.errors import ConfigError
from gptj_serve.planner import NAMED_CONFIGS, Model
from gptj_serve.simulation.cost_model import CostModel, ModelShape
from gptj_serve.simulation.estimate import estimate
from gptj_serve.simulation.fit import (
    Asked,
    StageTime,
    fit_engine,
    fit_stages,
    non_negative_least_squares,
    simulate_round,
    stage_errors,
)
from gptj_serve.simulation.step_shape import StepShape, shape_of
from gptj_serve.steps import Row, SampleSpec

SHAPE = ModelShape(name="x", num_layers=6, max_sequence_tokens=512, head_layers=0.0)
COST = CostModel(
    source="measured",
    model=SHAPE,
    stage_s=1e-4,
    weights_s=2e-4,
    token_s=1e-5,
    free_tokens=4,
    row_s=2e-6,
    context_s=4e-8,
    pair_s=1e-8,
    head_s=3e-4,
    sample_s=2e-5,
    handoff_s=1e-5,
    engine_step_s=3e-4,
    engine_row_s=2e-5,
    request_s=0.01,
)


def test_a_shape_counts_what_attention_reads_and_what_it_computes():
    rows = [Row([1], 9, [], samples=[SampleSpec()]), Row([1, 2, 3], 4, [])]
    assert shape_of(rows) == StepShape(
        num_rows=2, num_tokens=4, num_context_tokens=10 + 7, num_pairs=10 + (5 + 6 + 7), num_samples=1
    )


def test_a_step_costs_what_the_formula_says():
    """Six layers over two stages, of which the last has the head."""
    first_s, last_s = COST.pipeline(2).stage_times_s(StepShape(2, 10, 50, 100, 1))
    layer_s = 2e-4 + 6 * 1e-5 + 2 * 2e-6 + 50 * 4e-8 + 100 * 1e-8
    assert first_s == pytest.approx(1e-4 + 3 * layer_s)
    assert last_s == pytest.approx(1e-4 + 3 * layer_s + 3e-4 + 2e-5)
    (whole_s,) = COST.pipeline(1).stage_times_s(StepShape(1, 3, 3, 6, 0))
    assert whole_s == pytest.approx(1e-4 + 6 * (2e-4 + 2e-6 + 3 * 4e-8 + 6 * 1e-8) + 3e-4)  # so few tokens are free


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match="num_stages=7"):
        COST.pipeline(7)


def test_a_file_is_what_was_written(tmp_path: Path):
    COST.write(tmp_path / "cost.json")
    assert CostModel.read(tmp_path / "cost.json") == COST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        (COST.model_dump_json().replace('"token_s":', '"tokens_s":'), "tokens_s"),
        (COST.model_copy(update={"token_s": -1.0}).model_dump_json(), "token_s"),
    ],
)
def test_a_file_that_is_none_is_refused_by_field(tmp_path: Path, text: str, message: str):
    file = tmp_path / "cost.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"cost\.json.*{message}"):
        CostModel.read(file)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.json: can't be read"):
        CostModel.read(tmp_path / "none.json")


def test_the_fit_finds_the_coefficients_that_made_the_times():
    times = []
    for num_stages in (1, 2):
        pipeline = COST.pipeline(num_stages)
        for rows in (1, 2, 4, 8, 32):
            for context in (16, 400):
                for chunk in (0, 64):
                    pairs = rows * context + chunk * (chunk + 1) // 2
                    shape = StepShape(rows + (chunk > 0), rows + chunk, rows * context + chunk, pairs, rows)
                    for index, seconds in enumerate(pipeline.stage_times_s(shape)):
                        times.append(StageTime(shape, 6 // num_stages, index == num_stages - 1, seconds))
    found = fit_stages(CostModel(source="measured", model=SHAPE), times)
    assert np.abs(stage_errors(found, times)).max() < 1e-3
    assert found.free_tokens == COST.free_tokens
    assert found.token_s == pytest.approx(COST.token_s, rel=0.01)
    assert found.context_s == pytest.approx(COST.context_s, rel=0.01)
    assert found.pair_s == pytest.approx(COST.pair_s, rel=0.01)


def test_least_squares_never_go_below_zero():
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative_least_squares(rows, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])
    assert non_negative_least_squares(rows, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])


def test_the_engine_is_found_from_rounds_that_it_made():
    limits = SchedulerLimits(2, 64, 128, 512)
    asked = [Asked(size, [(8, 30), (24, 18)] * max(2, size)) for size in (1, 4, 32)]
    rounds = [simulate_round(COST, limits, 400, 16, one) for one in asked]
    blank = COST.model_copy(update={"engine_step_s": 0.0, "engine_row_s": 0.0, "request_s": 0.0})
    found = fit_engine(blank, limits, 400, 16, rounds)
    for measured in rounds:
        simulated = simulate_round(found, limits, 400, 16, measured.asked)
        assert simulated.tokens_per_s == pytest.approx(measured.tokens_per_s, rel=0.1)
        assert simulated.first_token_s == pytest.approx(measured.first_token_s, rel=0.3)


def test_a_round_is_simulated_with_blocks_of_the_deployments_own_size():
    """Sequences of up to 48 tokens: of four blocks they take three each, or one."""
    limits = SchedulerLimits(1, 64, 512, 512)
    asked = Asked(8, [(16, 32)] * 8)
    small, large = (simulate_round(COST, limits, 4, block_size, asked) for block_size in (16, 64))
    assert small.tokens_per_s < 0.8 * large.tokens_per_s


def step_s(cost: CostModel, *rows: Row) -> float:
    (time_s,) = cost.pipeline(1).stage_times_s(shape_of(rows))
    return time_s


def test_an_estimate_is_the_roofline_of_its_figures():
    """GPT-J 6B in half precision: 12 GB of weights, of which a decode step reads all but the embedding."""
    model = Model(NAMED_CONFIGS["gpt-j-6b"])
    cost = estimate(model, "gpt-j-6b", "float16", 1e12, 1e14)
    assert cost.source == "estimated"
    alone_s = step_s(cost, Row([1], 0, [], samples=[SampleSpec()]))
    assert alone_s == pytest.approx(11.7e9 / 1e12 + cost.stage_s, rel=0.02)
    kv_s = 2 * 28 * 4096 * 2 / 1e12  # of a token: keys and values of all layers
    assert step_s(cost, Row([1], 1999, [], samples=[SampleSpec()])) - alone_s == pytest.approx(1999 * kv_s, rel=0.02)
    prompt_s = step_s(cost, Row([1] * 2048, 0, [], samples=[SampleSpec()]))
    weights_s = 2 * 5.64e9 * 2048 / 1e14 + cost.head_s + cost.stage_s
    scores_s = 28 * 4 * 4096 * (2048 * 2049 / 2) / 1e14  # queries by keys, and those by values
    assert prompt_s - weights_s == pytest.approx(2048 * kv_s + scores_s, rel=0.05)
    assert 0.03 < (prompt_s - weights_s) / prompt_s < 0.06


def test_the_kv_of_a_prompt_is_read_once_a_chunk():
    """Twice the bandwidth saves half of what reading takes: the weights, hidden by arithmetic, and each token's KV."""
    model = Model(NAMED_CONFIGS["gpt-j-6b"])
    slow, fast = (estimate(model, "gpt-j-6b", "float16", rate, 1e14) for rate in (1e12, 2e12))
    chunk = Row([1] * 512, 1024, [])
    head_s = slow.head_s - fast.head_s
    assert step_s(slow, chunk) - step_s(fast, chunk) - head_s == pytest.approx(1536 * 2 * 28 * 4096 * 2 / 2e12)


def test_an_estimate_without_rates_is_refused():
    with pytest.raises(ConfigError, match="above 0"):
        estimate(Model(NAMED_CONFIGS["gpt-j-6b"]), "x", "float16", 0.0, 1e14)
