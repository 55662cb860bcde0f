"""The shape of `GET /status`, which the page, `gptj-serve status` and operators' scripts read.

Times are seconds; points in time are Unix time of the host that measured them; rates are over the last second.
"""

from typing import Any, NotRequired

from typing_extensions import TypedDict


class StepSpan(TypedDict):
    """One microbatch on one stage."""

    microbatch_id: int
    started_at: float
    duration_s: float  # computing only
    num_rows: int
    num_tokens: int


class StageStatus(TypedDict):
    stage_index: int
    layers: list[int]  # half-open span [first, end)
    device: str
    dtype: str  # of the KV cache, and of weights where they are not quantized
    kernels: str  # "torch", or ours by the type of their operands, as in "avx512-int8"
    num_threads: int
    pid: int
    node_ip: str
    weight_bytes: int
    kv_cache_bytes: int
    memory_bytes: int  # resident memory of the process; of a GPU stage what torch has reserved on the device
    num_restarts: int
    busy_ratio: float  # share of the last second in which it computed
    handoff: NotRequired[str | None]  # how hidden states come from the stage before (pipeline.handoff), if from any
    handoff_s: float | None  # from the sender's last instruction to this stage's first; mean; None without any
    steps: list[StepSpan]  # the newest, at most 64, oldest first


class PipelineStatus(TypedDict):
    replica_id: str
    is_ready: bool  # False while stages are started again
    now: float  # of the replica's host, for the ages of its stages' steps
    tokens_per_s: float  # generated
    stages: list[StageStatus]
    engine: dict[str, Any]  # the fields of `types.EngineStats`


class IngressStatus(TypedDict):
    """The ingress process that answered. Calls through the Ray handle don't pass its door: they count in neither."""

    num_requests: int  # task requests over HTTP that are being answered now
    max_requests: int


class PipelineChanges(TypedDict):
    num_starting: int
    num_stopping: int  # these finish what they have begun


class ScalingStatus(TypedDict):
    """Where the load decides how many pipelines there are. Changes are None where they aren't known just now."""

    min_pipelines: int
    max_pipelines: int
    changes: PipelineChanges | None


class Status(TypedDict):
    model: str
    version: str
    uptime_s: float
    tasks: list[str]
    heads: dict[str, str]  # name → "classifier" or "qa"
    max_model_len: int
    ingress: IngressStatus
    pipelines: list[PipelineStatus]
    scaling: ScalingStatus | None  # None where their number is fixed
    problems: list[str]  # one line for each pipeline that did not answer
