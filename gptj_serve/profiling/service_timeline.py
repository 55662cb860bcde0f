"""The last steps of a running service's stages, out of its `/status`, as timelines. Needs no torch."""

from gptj_serve.api.status import PipelineStatus, Status
from gptj_serve.engine.timeline import Occupancy, Span, Timeline


def service_timelines(status: Status) -> dict[str, Timeline]:
    """By the pipelines' names: each stage's newest steps, at most 64; of the queue only the present is known."""
    return {f"pipeline {pipeline['replica_id']}": _timeline(pipeline) for pipeline in status["pipelines"]}


def _timeline(pipeline: PipelineStatus) -> Timeline:
    engine = pipeline["engine"]
    return Timeline(
        num_stages=len(pipeline["stages"]),
        spans=[
            Span(
                step["microbatch_id"],
                stage["stage_index"],
                step["started_at"],
                step["started_at"] + step["duration_s"],
                step["num_rows"],
                step["num_tokens"],
            )
            for stage in pipeline["stages"]
            for step in stage["steps"]
        ],
        occupancies=[
            Occupancy(pipeline["now"], engine["num_waiting"], engine["num_running"], engine["num_kv_blocks_used"])
        ],
    )
