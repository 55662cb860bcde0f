"""`Figures`: what a simulated load came to, and against the limits that it was to keep."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_serve.profiling.percentile import percentile
from gptj_serve.simulation.outcomes import Outcomes
from gptj_serve.simulation.service import Result


@dataclass(frozen=True, slots=True)
class Targets:
    """In seconds. A request keeps them if it is served, its first token comes in time, and the others do on average."""

    first_token_s: float
    between_tokens_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares are of all requests, those refused included; latencies of those served. 0 where there is none."""

    num_requests: int
    num_refused: int
    duration_s: float
    requests_per_s: float  # served
    tokens_per_s: float  # generated
    first_token_p50_s: float
    first_token_p99_s: float
    between_tokens_p50_s: float  # of all times between two tokens of a request
    between_tokens_p99_s: float
    between_tokens_max_s: float
    whole_p50_s: float  # until the last token
    whole_p99_s: float
    share_first_token: float
    share_between_tokens: float
    share_both: float
    share_gaps: float  # of all times between two tokens: those within the target
    num_preemptions: int
    most_pipelines: int
    pipeline_hours: float
    gpu_hours: float


def figures(
    outcomes: Outcomes, result: Result, targets: Targets, request_s: float, num_gpus_per_pipeline: float
) -> Figures:
    """`request_s` is added to each first token's time: it lies outside of the pipelines."""
    arrived_s, first_s, last_s = (np.array(times) for times in (outcomes.arrived_s, outcomes.first_s, outcomes.last_s))
    num_tokens = np.array(outcomes.num_tokens)
    is_served = num_tokens > 0
    first = (first_s - arrived_s + request_s)[is_served]
    whole = (last_s - arrived_s + request_s)[is_served]
    between = ((last_s - first_s) / np.maximum(num_tokens - 1, 1))[is_served]
    in_time, steady = first <= targets.first_token_s, between <= targets.between_tokens_s
    count = len(arrived_s)
    duration_s = result.duration_s or math.inf
    return Figures(
        num_requests=count,
        num_refused=outcomes.num_refused,
        duration_s=result.duration_s,
        requests_per_s=int(is_served.sum()) / duration_s,
        tokens_per_s=int(num_tokens.sum()) / duration_s,
        first_token_p50_s=percentile(first, 0.5, of_nothing=0.0),
        first_token_p99_s=percentile(first, 0.99, of_nothing=0.0),
        between_tokens_p50_s=outcomes.gap_percentile(0.5),
        between_tokens_p99_s=outcomes.gap_percentile(0.99),
        between_tokens_max_s=outcomes.longest_gap_s,
        whole_p50_s=percentile(whole, 0.5, of_nothing=0.0),
        whole_p99_s=percentile(whole, 0.99, of_nothing=0.0),
        share_first_token=int(in_time.sum()) / count,
        share_between_tokens=int(steady.sum()) / count,
        share_both=int((in_time & steady).sum()) / count,
        share_gaps=1 - outcomes.num_slow_gaps / outcomes.num_gaps if outcomes.num_gaps else 0.0,
        num_preemptions=result.num_preemptions,
        most_pipelines=result.most_pipelines,
        pipeline_hours=result.pipeline_s / 3600,
        gpu_hours=result.pipeline_s / 3600 * num_gpus_per_pipeline,
    )


def lines(found: Figures, targets: Targets) -> list[tuple[str, str]]:
    """What is printed: name and value."""

    def ms(*seconds: float) -> str:
        return " / ".join(f"{1e3 * s:,.0f}" if s >= 0.1 else f"{1e3 * s:.1f}" for s in seconds) + " ms"

    rows = [
        ("requests", f"{found.num_requests:,}, {found.num_refused:,} of them refused"),
        ("time", f"{found.duration_s:,.1f} s"),
        ("throughput", f"{found.requests_per_s:,.1f} requests/s, {found.tokens_per_s:,.0f} generated tokens/s"),
        ("first token, p50 / p99", ms(found.first_token_p50_s, found.first_token_p99_s)),
        ("between tokens, p50 / p99", ms(found.between_tokens_p50_s, found.between_tokens_p99_s)),
        ("whole answer, p50 / p99", ms(found.whole_p50_s, found.whole_p99_s)),
        (f"first token within {targets.first_token_s:g} s", f"{found.share_first_token:.2%} of the requests"),
        (f"tokens {targets.between_tokens_s:g} s apart or less", f"{found.share_between_tokens:.2%} on average"),
        ("", f"{found.share_gaps:.2%} of all single tokens"),
        ("both", f"{found.share_both:.2%} of the requests"),
        ("pipelines", f"{found.most_pipelines:,} at most, {found.pipeline_hours:,.2f} pipeline-hours"),
    ]
    if found.gpu_hours:
        rows.append(("GPUs", f"{found.gpu_hours:,.2f} GPU-hours"))
    if found.num_preemptions:
        rows.append(("preemptions", f"{found.num_preemptions:,}: the KV pool was too small at times"))
    return rows


def as_json(found: Figures, targets: Targets, result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings,
        "targets": {name: getattr(targets, name) for name in targets.__slots__},
        "figures": {name: getattr(found, name) for name in found.__slots__},
        "moments": [{name: getattr(moment, name) for name in moment.__slots__} for moment in result.moments],
    }
