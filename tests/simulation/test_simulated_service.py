import math

import numpy as np
import pytest

from gptj_serve.engine.scheduler import SchedulerLimits
from gptj_serve.profiling.load import PlannedRequest
from gptj_serve.scaling.policy import ScalingLimits
from gptj_serve.simulation.cost_model import CostModel, ModelShape
from gptj_serve.simulation.load import COPY_SPREAD_S, SimulatedLoad, make_load
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.report import Figures, Targets, figures
from gptj_serve.simulation.service import Deployment, Result, SimulatedService

COST = CostModel(
    source="estimated",
    model=ModelShape(name="x", num_layers=4, max_sequence_tokens=256, head_layers=1.0),
    weights_s=2e-3,
    token_s=1e-4,
    engine_step_s=1e-3,
    request_s=0.25,
)
TARGETS = Targets(1.0, 0.05)


def deployment(num_pipelines: int = 1, scaling: ScalingLimits | None = None, **changes: float) -> Deployment:
    limits = SchedulerLimits(2, 8, 64, 256, changes.get("max_queue_wait_s", math.inf))
    return Deployment(limits, 128, 16, True, COST.pipeline(2), num_pipelines, scaling, changes.get("startup_s", 5.0))


def steady(requests_per_s: float, seconds: float, num_prompt: int = 20, num_new: int = 20) -> list[PlannedRequest]:
    count = int(requests_per_s * seconds)
    return [PlannedRequest(index / requests_per_s, num_prompt, num_new) for index in range(count)]


def serve(deployment: Deployment, load: SimulatedLoad) -> tuple[Figures, Result, Outcomes]:
    outcomes = Outcomes(len(load), TARGETS.between_tokens_s)
    result = SimulatedService(deployment, outcomes).run(load)
    return figures(outcomes, result, TARGETS, COST.request_s, 2.0), result, outcomes


def test_one_request_takes_what_its_steps_take():
    found, result, _ = serve(deployment(), make_load([PlannedRequest(0.0, 10, 3)]))
    stages = COST.pipeline(2)
    assert found.first_token_p50_s == pytest.approx(0.25 + 4 * 2e-3 + 4 * 10e-4 + 1e-3)
    assert found.between_tokens_p50_s == pytest.approx(4 * 2e-3 + 4 * 1e-4 + 1e-3, rel=0.01)
    assert (found.num_requests, found.num_refused, found.share_both) == (1, 0, 1.0)
    assert found.pipeline_hours == pytest.approx(result.duration_s / 3600)
    assert found.gpu_hours == pytest.approx(2 * result.duration_s / 3600)
    assert stages.num_stages == 2


def test_more_pipelines_serve_what_is_too_much_for_one():
    load = make_load(steady(60, 12))
    alone, _, _ = serve(deployment(1, max_queue_wait_s=2.0), load)
    many, _, outcomes = serve(deployment(6, max_queue_wait_s=2.0), load)
    assert alone.num_refused > 100
    assert many.num_refused == 0
    assert many.share_first_token > 0.99
    assert alone.share_first_token < 0.8
    assert list(outcomes.num_tokens) == [20] * len(load)
    assert alone.num_requests == many.num_requests == 720


def test_a_refused_request_is_neither_served_nor_forgotten():
    found, _, outcomes = serve(deployment(1, max_queue_wait_s=0.5), make_load(steady(60, 10)))
    served = sum(tokens == 20 for tokens in outcomes.num_tokens)
    assert served + found.num_refused == 600
    assert found.share_first_token <= served / 600


def test_the_policy_starts_pipelines_for_a_burst_and_stops_them_after_it():
    scaling = ScalingLimits(1, 5, 2.0, 0.8, 1.0, 20.0, 900.0)
    quiet_before, burst = steady(0.5, 20), steady(60, 60)
    planned = quiet_before + [PlannedRequest(20 + r.arrival_s, r.num_prompt_tokens, r.num_new_tokens) for r in burst]
    planned += [PlannedRequest(80 + r.arrival_s, r.num_prompt_tokens, r.num_new_tokens) for r in steady(0.5, 120)]
    found, result, _ = serve(deployment(1, scaling), make_load(planned))
    sizes = [moment.num_running + moment.num_starting for moment in result.moments]
    assert found.num_refused == 0
    assert max(sizes) > 2
    assert sizes[0] == sizes[-1] == 1
    assert found.pipeline_hours * 3600 < 0.8 * max(sizes) * found.duration_s
    assert any(moment.num_starting for moment in result.moments)


def test_a_pipeline_that_comes_gets_its_part_of_what_waits():
    """All requests come before it does; it would have nothing to do."""
    scaling = ScalingLimits(1, 2, 1.0, 0.8, 0.5, 100.0, 900.0)
    load = make_load(steady(200, 2))
    alone, _, _ = serve(deployment(1), load)
    shared, _, outcomes = serve(deployment(1, scaling, startup_s=1.0), load)
    assert shared.most_pipelines == 2
    assert shared.duration_s < 0.75 * alone.duration_s
    assert list(outcomes.num_tokens) == [20] * 400


def test_from_zero_the_first_request_waits_for_a_pipeline():
    scaling = ScalingLimits(0, 2, 2.0, 0.8, 1.0, 5.0, 5.0)
    planned = [PlannedRequest(0.0, 10, 5), PlannedRequest(60.0, 10, 5)]
    found, result, outcomes = serve(deployment(1, scaling, startup_s=7.0), make_load(planned))
    assert found.num_refused == 0
    assert outcomes.first_s[0] < 0.1
    assert 67.0 <= outcomes.first_s[1] <= 69.0
    assert any(moment.num_running + moment.num_starting == 0 for moment in result.moments)


def test_a_pipeline_that_never_gets_to_serve_costs_from_the_beginning_of_its_start():
    scaling = ScalingLimits(1, 2, 1.0, 0.8, 0.5, 100.0, 900.0)
    found, result, outcomes = serve(deployment(1, scaling, startup_s=1000.0), make_load(steady(200, 2)))
    began_s = next(moment.at_s for moment in result.moments if moment.num_starting)
    assert list(outcomes.num_tokens) == [20] * 400
    assert result.moments[-1].num_starting == 1
    both_s = 2 * found.duration_s - found.pipeline_hours * 3600
    assert began_s - 1.0 <= both_s <= began_s


def test_it_lasts_until_the_last_token():
    found, result, outcomes = serve(deployment(3), make_load(steady(10, 20)))
    assert found.duration_s == max(outcomes.last_s)
    assert result.pipeline_s == pytest.approx(3 * found.duration_s)
    assert result.moments[-1].num_generating == 0


def test_where_all_are_refused_it_lasts_until_the_last_one_came():
    outcomes = Outcomes(2)
    outcomes.arrived_s[0], outcomes.arrived_s[1] = 1.0, 2.5
    assert outcomes.end_s == 2.5


def test_no_request_that_waits_for_a_pipeline_to_start_is_refused_for_it():
    scaling = ScalingLimits(0, 1, 2.0, 0.8, 1.0, 5.0, 5.0)
    planned = [PlannedRequest(0.0, 10, 5), *(PlannedRequest(60.0 + index / 10, 10, 5) for index in range(20))]
    found, _, outcomes = serve(deployment(1, scaling, startup_s=30.0, max_queue_wait_s=1.0), make_load(planned))
    assert found.num_refused == 0
    assert list(outcomes.num_tokens) == [5] * 21
    assert min(outcomes.first_s[1:]) > 90.0


def test_the_same_seed_gives_the_same_result():
    load = make_load(steady(10, 20))
    first, again = (serve(deployment(3), load)[0] for _ in range(2))
    assert first == again


def test_a_rate_compresses_and_copies_multiply():
    planned = steady(2, 50)
    fast = make_load(planned, rate=10)
    assert len(fast) == 100
    assert fast.arrival_s[-1] == pytest.approx(planned[-1].arrival_s / 10)
    many = make_load(planned, copies=5)
    assert len(many) == 500
    assert list(many.arrival_s) == sorted(many.arrival_s)
    assert many.arrival_s[-1] <= planned[-1].arrival_s + COPY_SPREAD_S
    assert len(np.unique(many.arrival_s)) > 490


def test_lengths_stay_with_their_arrivals():
    planned = [PlannedRequest(float(index), 1 + index, 100 - index) for index in range(50)]
    load = make_load(planned, copies=3)
    assert set(load.num_prompt_tokens + load.num_new_tokens) == {101}


def test_percentiles_of_gaps_are_within_a_bin_of_the_truth():
    outcomes = Outcomes(1, max_gap_s=0.5)
    gaps_s = np.random.default_rng(0).lognormal(-3, 1, 5000)
    for gap_s in gaps_s:
        outcomes.on_gaps(float(gap_s), 1)
    for share in (0.5, 0.99):
        assert outcomes.gap_percentile(share) == pytest.approx(np.quantile(gaps_s, share), rel=0.02)
    assert outcomes.num_slow_gaps == int((gaps_s > 0.5).sum())
    assert outcomes.longest_gap_s == gaps_s.max()
    assert Outcomes(1).gap_percentile(0.5) == 0.0
