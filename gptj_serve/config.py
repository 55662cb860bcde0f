"""`ServiceConfig`: everything a deployment file can set.

Frozen pydantic models that refuse unknown keys. The fields' descriptions are their documentation: unit, default, why.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from gptj_serve.scaling.policy import ScalingLimits
from gptj_serve.types import DEFAULT_HEAD

DEMO_CHECKPOINT = "demo"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
_RAYS_OWN_RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}

Quantization = Literal["none", "int8", "fp8"]
"""Of the weights of linear layers; on CPUs, and for fp8, also of what they are multiplied with."""

Kernels = Literal["auto", "torch"]
"""Our own where they can run, or PyTorch's."""

HandoffKind = Literal["auto", "zmq", "shared_memory", "cuda_ipc", "distributed"]
"""How hidden states get from one stage to the next."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(_Part):
    """Resources of one stage actor. All stages of a pipeline get the same."""

    num_cpus: float = Field(1.0, ge=0, allow_inf_nan=False, description="CPUs that Ray reserves for each stage actor.")
    num_gpus: float = Field(
        0.0, ge=0, le=1, description="The share of one GPU that Ray reserves for each stage; 0 runs it on CPU."
    )
    num_threads: PositiveInt | None = Field(
        None, description="Torch threads per CPU stage. Default: the cores the process may use, over num_stages."
    )
    pin_cores: bool = Field(
        False,
        description="Each CPU stage has num_threads cores to itself, of one NUMA node where one has enough free: for "
        "hosts with several of them. Other stages of the service keep off these, other processes don't. Where too few "
        "are left, a line in the log says so and the stage runs on any.",
    )

    @model_validator(mode="after")
    def _can_be_placed(self) -> Self:
        if self.num_cpus == self.num_gpus == 0:
            raise ValueError("num_cpus and num_gpus are both 0; Ray can't place a stage that needs nothing")
        if self.pin_cores and self.num_gpus > 0:
            raise ValueError("pin_cores is for stages on CPU (num_gpus: 0)")
        return self


class KVCacheConfig(_Part):
    block_size: PositiveInt = Field(16, description="Tokens per KV block.")
    num_tokens: PositiveInt | None = Field(
        None,
        description="Capacity of the pool in tokens, on every stage; at least n_positions. Default: on CPU eight "
        "sequences of n_positions; on GPU what fits into gpu_memory_utilization on the fullest. A smaller pool means "
        "more preemption, never another answer.",
    )
    reuse_prefixes: bool = Field(
        True, description="Requests take over what others have computed of the same beginning, while it is kept."
    )


class SchedulerConfig(_Part):
    max_num_sequences: PositiveInt = Field(256, description="Sequences that hold KV blocks at the same time.")
    max_microbatch_tokens: PositiveInt = Field(
        512, description="Tokens of one microbatch. Bounds how long a long prompt can delay the tokens of others."
    )
    max_queue_wait_s: PositiveFloat | None = Field(
        60.0,
        description="A request that would wait longer than this for its turn gets 503 at once, with Retry-After: "
        "estimated from the tokens that wait before it and how fast the pipeline gets through them. Until an ingress "
        "has heard of the queue, it may become a quarter longer; who has waited that long gets 503. null: no limit.",
    )
    schedule_ahead: Literal["auto"] | bool = Field(
        "auto",
        description="With a single stage, make its next step while one runs, so that it need not wait for the engine "
        "in between; a new request's prompt then begins a step later. auto: on GPUs. docs/engine.md has the gain.",
    )


class PipelineConfig(_Part):
    """One pipeline: an engine and its stages."""

    num_stages: PositiveInt = Field(1, description="Stage actors that the layers are split over; at most n_layer.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of weights and KV cache. auto: float32 on CPU; on GPU bfloat16 where the card of every stage has "
        "it (compute capability 8.0 or more), else float16, whatever the checkpoint is stored in.",
    )
    quantization: Quantization = Field(
        "none",
        description="Of the weights of linear layers, to 8 bits with a scale for each output. int8: on CPUs with "
        "AVX-512 VNNI, where what they are multiplied with is rounded too, for each token; on GPUs the weights alone. "
        "fp8 (e4m3): on GPUs of compute capability 8.9 or more, in bfloat16; what comes of prompts and large batches "
        "is rounded too. docs/performance.md has the effect.",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="The share of a GPU's memory that is in use once the KV pool is there, by whomever: the pool is "
        "made of what weights, graphs and the largest microbatch leave of it. The rest is for what comes later: links "
        "of NCCL, fragmentation. A stage that reserves a part of a GPU (num_gpus below 1) takes that part of it. Where "
        "kv_cache.num_tokens is not set.",
    )
    kernels: Kernels = Field(
        "auto",
        description="What the layers run on. auto: our own on CPUs with AVX-512, where g++ compiles them when first "
        "needed, and on GPUs of compute capability 8.0 or more, where Triton does; else PyTorch's, with a line in the "
        "log that says why. torch: PyTorch's.",
    )
    deterministic: bool = Field(
        False,
        description="The same request gives the same tokens and bit-equal log-probabilities whatever runs beside it, "
        "however it is cut and over however many stages. On CPU only; docs/determinism.md has the cost.",
    )
    handoff: HandoffKind = Field(
        "auto",
        description="How hidden states get from a stage to the next. auto: through shared memory between CPUs of one "
        "host; by CUDA IPC on one GPU; by torch.distributed with NCCL between GPUs; else over ZeroMQ. Any of them can "
        "be asked for (shared_memory, cuda_ipc, distributed, zmq), if all neighbours can use it. distributed between "
        "CPUs uses gloo, and like NCCL encrypts nothing.",
    )
    stage: StageConfig = StageConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Ray's placement group strategy: one node when it fits (PACK), or one per node (SPREAD)."
    )
    max_ongoing_requests: PositiveInt = Field(
        4096, description="Requests, running and waiting, that one pipeline takes; beyond them they wait in Serve."
    )
    engine_num_cpus: PositiveFloat = Field(0.1, description="CPUs that Ray reserves for the engine's process.")
    startup_timeout_s: PositiveFloat = Field(600.0, description="Longest time for all stages to load their weights.")
    step_timeout_s: PositiveFloat = Field(
        120.0,
        description="Without a step's result for this time, while one is due, a stage counts as lost. Only one that "
        "hangs is found by it: of one that dies or fails the engine hears at once. It must exceed the longest step, "
        "of max_microbatch_tokens on the slowest stage: milliseconds for a small model, many seconds for a large one "
        "on CPUs. So it does not follow from the steps so far: after a thousand tokens one by one comes a long prompt.",
    )
    max_queued_requests: PositiveInt = Field(
        4096, description="Requests on their way from each ingress to a pipeline; more are refused with 503."
    )

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> Self:
        if self.deterministic and (self.stage.num_gpus > 0 or self.dtype == "float16"):
            raise ValueError("deterministic is for stages on CPU (num_gpus: 0) in float32 or bfloat16")
        return self

    @model_validator(mode="after")
    def _can_schedule_ahead(self) -> Self:
        if self.scheduler.schedule_ahead is True and self.num_stages > 1:
            raise ValueError(
                f"scheduler.schedule_ahead: true is for a single stage, not num_stages={self.num_stages}: several have "
                "each other's microbatches to work on while the engine makes the next"
            )
        return self

    @model_validator(mode="after")
    def _can_be_quantized(self) -> Self:
        uses_gpu = self.stage.num_gpus > 0
        if self.quantization == "fp8" and not uses_gpu:
            raise ValueError("quantization: fp8 is for stages on GPU (num_gpus)")
        if self.quantization == "fp8" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"quantization: fp8 goes with dtype auto or bfloat16, not {self.dtype}")
        if self.quantization == "int8" and uses_gpu and self.dtype == "float32":
            raise ValueError("quantization: int8 on GPU goes with dtype auto, bfloat16 or float16, not float32")
        if self.quantization == "int8" and not uses_gpu and self.dtype == "float16":
            raise ValueError("quantization: int8 on CPU (num_gpus: 0) goes with dtype auto, float32 or bfloat16")
        if self.quantization != "none" and self.kernels == "torch":
            raise ValueError(f"quantization: {self.quantization} needs our own kernels (kernels: auto)")
        return self

    @model_validator(mode="after")
    def _memory_is_there_to_be_shared(self) -> Self:
        if "gpu_memory_utilization" not in self.model_fields_set:
            return self
        if self.stage.num_gpus == 0:
            raise ValueError("gpu_memory_utilization is for stages on GPU; on CPU set kv_cache.num_tokens")
        if self.kv_cache.num_tokens is not None:
            raise ValueError("kv_cache.num_tokens sets the KV pool's size already: leave out gpu_memory_utilization")
        return self

    @model_validator(mode="after")
    def _has_gpus_to_share(self) -> Self:
        if self.handoff == "cuda_ipc" and self.stage.num_gpus == 0:
            raise ValueError("handoff: cuda_ipc is for stages that share a GPU (stage.num_gpus above 0)")
        return self

    @property
    def sizes_kv_pool_from_memory(self) -> bool:
        """The KV pool is as large as the stages find room for, once they have loaded."""
        return self.stage.num_gpus > 0 and self.kv_cache.num_tokens is None

    @property
    def schedules_ahead(self) -> bool:
        if self.scheduler.schedule_ahead == "auto":
            return self.num_stages == 1 and self.stage.num_gpus > 0
        return self.scheduler.schedule_ahead


class IngressConfig(_Part):
    num_replicas: PositiveInt = Field(1, description="Processes that speak HTTP and tokenize.")
    num_cpus: NonNegativeFloat = Field(0.1, description="CPUs that Ray reserves for each ingress process.")
    resources: dict[Annotated[str, Field(min_length=1)], PositiveFloat] = Field(
        {},
        description="Custom resources that each ingress takes, as nodes have by `ray start --resources`: ingresses are "
        "only where there are some. So they keep no node with GPUs that an autoscaler would take away.",
    )
    max_ongoing_requests: PositiveInt = Field(
        1024,
        description="Task requests (POST) that one ingress works on at a time, from their headers to their answer's "
        "end; more get 503 with Retry-After at once. Health, status and page don't count.",
    )
    max_queued_requests: PositiveInt = Field(
        4096, description="Requests on their way from each proxy to an ingress; more are refused with 503."
    )
    max_body_bytes: PositiveInt = Field(1 << 20, description="Largest accepted HTTP body; a larger one gets 413.")
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="A body that is not complete after this time gets 408: who dribbles holds nothing longer.",
    )
    request_timeout_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="The longest that a request is worked on, and the default of X-Request-Timeout; then 504, or an "
        "error event in a stream. Default: no limit.",
    )
    replay_timeout_s: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
        description="A request that has lost its pipeline, and gets no further on any other for this time, has failed. "
        "Long enough for a new pipeline to start and load.",
    )
    api_keys_file: str | None = Field(
        None,
        description="YAML or JSON file of API keys (docs/access.md), on each ingress's node; looked at again within a "
        "second of a change. Limits in it are for the whole service: of num_replicas ingresses each allows its share. "
        "Default: the keys in GPTJ_SERVE_API_KEYS; without any, the service is open.",
    )
    cors_origins: list[str] = Field(
        [],
        description="Origins whose pages may call the service, as https://example.org; or only '*', for all. Default: "
        "none but the service's own page.",
    )
    max_batch_inputs: PositiveInt = Field(64, description="Longest list of inputs or prompts in one request.")
    max_qa_windows: PositiveInt = Field(
        256, description="Windows that the contexts of one QA request are cut into; each is a sequence for the model."
    )

    @field_validator("resources")
    @classmethod
    def _are_custom(cls, resources: dict[str, float]) -> dict[str, float]:
        for name in sorted(resources.keys() & _RAYS_OWN_RESOURCES):
            raise ValueError(f"{name!r} is no custom resource, but Ray's own; an ingress takes num_cpus")
        return resources

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin: scheme://host or scheme://host:port, in lower case")
        if "*" in origins and len(origins) > 1:
            raise ValueError("'*' stands for all origins; leave out the others")
        return origins

    @property
    def api_keys_path(self) -> Path | None:
        """Absolute, but with its symlinks as they are: another target may be put in place at any time."""
        return None if self.api_keys_file is None else Path(self.api_keys_file).expanduser().absolute()


class RoutingConfig(_Part):
    """Which of several pipelines a request goes to."""

    prefer_cached_prefixes: bool = Field(
        True,
        description="A request goes to the pipeline that holds most of its beginning in its KV blocks, unless it would "
        "wait there for longer than that saves, or the pipeline has its share of the requests already. false: to the "
        "less loaded of two random ones. Needs pipeline.kv_cache.reuse_prefixes; docs/routing.md has the rule.",
    )


class RolloutConfig(_Part):
    """How a new config or new weights replace what is running."""

    surge: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether a new pipeline is started before an old one is stopped. auto: if the cluster has room for "
        "one more when the new config arrives; else the old one makes room first, and requests wait where there is no "
        "other. With always and no room the rollout waits, and the old version serves on.",
    )
    drain_timeout_s: float = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="The longest that an old pipeline or ingress goes on with what it has begun. Requests whose tokens "
        "another pipeline can go on with leave at once.",
    )


class AutoscalingConfig(_Part):
    """How many pipelines there are, by what they have to do (docs/scaling.md)."""

    min_pipelines: NonNegativeInt = Field(
        1,
        description="Never fewer. 0: an idle service ends its last pipeline; the next request waits for a new one.",
    )
    max_pipelines: PositiveInt = Field(description="Never more.")
    initial_pipelines: PositiveInt | None = Field(
        None,
        description="So many are started first. Default: min_pipelines, or 1: a start shows whether one can load.",
    )
    target_drain_s: PositiveFloat = Field(
        10.0,
        description="So many that they get through the backlog of tokens within this time, at the speed they show.",
    )
    target_kv_share: float = Field(
        0.8, gt=0, le=1, description="So many that running sequences hold at most this share of their KV blocks."
    )
    upscale_delay_s: NonNegativeFloat = Field(
        2.0, description="More are started once they have been needed for so long."
    )
    downscale_delay_s: PositiveFloat = Field(
        300.0, description="Pipelines that were not needed at any moment of so long a time are stopped."
    )
    scale_to_zero_delay_s: PositiveFloat = Field(
        900.0, description="With min_pipelines 0, the last one is stopped after so long without any request."
    )
    may_add_nodes: bool = Field(
        False,
        description="Ask for pipelines that no node has room for, so that a Ray autoscaler adds nodes. false: only as "
        "many as fit into the cluster as it is.",
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_pipelines < self.min_pipelines:
            raise ValueError(f"max_pipelines={self.max_pipelines} is below min_pipelines={self.min_pipelines}")
        if not self.min_pipelines <= self.num_initial <= self.max_pipelines:
            raise ValueError(
                f"initial_pipelines={self.num_initial} must be from min_pipelines={self.min_pipelines} to "
                f"max_pipelines={self.max_pipelines}"
            )
        if self.downscale_delay_s < self.upscale_delay_s:
            raise ValueError(
                f"downscale_delay_s={self.downscale_delay_s:g} is below upscale_delay_s={self.upscale_delay_s:g}: "
                "the number would swing with the load"
            )
        if self.min_pipelines > 0 and "scale_to_zero_delay_s" in self.model_fields_set:
            raise ValueError(f"scale_to_zero_delay_s goes with min_pipelines=0, not {self.min_pipelines}")
        return self

    @property
    def num_initial(self) -> int:
        return max(1, self.min_pipelines) if self.initial_pipelines is None else self.initial_pipelines

    @property
    def limits(self) -> ScalingLimits:
        return ScalingLimits(
            min_pipelines=self.min_pipelines,
            max_pipelines=self.max_pipelines,
            target_drain_s=self.target_drain_s,
            target_kv_share=self.target_kv_share,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
            scale_to_zero_delay_s=self.scale_to_zero_delay_s,
        )


class ServiceConfig(_Part):
    """The argument of the application builder: `args` in a Serve config file."""

    checkpoint: str = Field(
        DEMO_CHECKPOINT, description="Directory with config.json, safetensors and tokenizer.json; or 'demo'."
    )
    model_name: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="The name in /v1/models. Default: the checkpoint directory's name."
    )
    chat_template: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Path of a Jinja file that makes a prompt of a chat's messages, for /v1/chat/completions. Default: "
        "the checkpoint directory's chat_template.jinja, else the chat_template of its tokenizer_config.json.",
    )
    heads: dict[Annotated[str, Field(min_length=1)], str] = Field(
        {},
        description="Task heads beside the checkpoint's own: name → directory made by `fit`. Requests choose one by "
        "`model`; 'default' is the checkpoint's own.",
    )
    pipeline: PipelineConfig = PipelineConfig()
    num_pipelines: PositiveInt = Field(1, description="Replicas of the whole pipeline, where autoscaling is not set.")
    autoscaling: AutoscalingConfig | None = Field(
        None, description="Let the load decide how many pipelines there are. Default: always num_pipelines."
    )
    ingress: IngressConfig = IngressConfig()
    routing: RoutingConfig = RoutingConfig()
    rollout: RolloutConfig = RolloutConfig()

    @field_validator("heads")
    @classmethod
    def _default_is_taken(cls, heads: dict[str, str]) -> dict[str, str]:
        if DEFAULT_HEAD in heads:
            raise ValueError(f"{DEFAULT_HEAD!r} is the name of the checkpoint's own heads; choose another")
        return heads

    @model_validator(mode="after")
    def _can_be_scaled(self) -> Self:
        if self.autoscaling is None:
            return self
        if "num_pipelines" in self.model_fields_set:
            raise ValueError(
                f"num_pipelines={self.num_pipelines} and autoscaling contradict each other: set one of them "
                "(autoscaling.initial_pipelines is how many are started first)"
            )
        target_s, longest_s = self.autoscaling.target_drain_s, self.pipeline.scheduler.max_queue_wait_s
        if longest_s is not None and target_s >= longest_s:
            raise ValueError(
                f"autoscaling.target_drain_s={target_s:g} must be below pipeline.scheduler.max_queue_wait_s="
                f"{longest_s:g}: requests would be refused before more pipelines are started"
            )
        return self

    @property
    def head_dirs(self) -> dict[str, Path]:
        return {name: Path(directory).expanduser() for name, directory in self.heads.items()}

    @property
    def chat_template_file(self) -> Path | None:
        return None if self.chat_template is None else Path(self.chat_template).expanduser()

    @property
    def checkpoint_dir(self) -> Path:
        if self.checkpoint == DEMO_CHECKPOINT:
            return Path(str(files("gptj_serve") / "demo"))
        return Path(self.checkpoint).expanduser()

    @property
    def served_name(self) -> str:
        if self.model_name is not None:
            return self.model_name
        return "gptj-demo" if self.checkpoint == DEMO_CHECKPOINT else self.checkpoint_dir.resolve().name
