"""`build`: the application that `serve run deployments/gptj.yaml` runs.

Serve passes a typed argument only if the annotation is a real class at run time, so this module must not have
`from __future__ import annotations`.
"""

import logging
from typing import Any, Self

import ray
import ray.serve.context
from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from gptj_serve.api.chat_template import ChatTemplate
from gptj_serve.api.door.key_ring import KeyRing
from gptj_serve.api.errors import most_telling
from gptj_serve.config import DEMO_CHECKPOINT, ServiceConfig
from gptj_serve.errors import CheckpointError, ConfigError, GPTJServeError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import open_heads
from gptj_serve.planner import plan_service
from gptj_serve.serving.autoscaling import free_resources, serve_autoscaling
from gptj_serve.serving.capacity import Group, num_that_fit, surge_percent, surges
from gptj_serve.serving.handover import MAX_CONSTRUCTOR_TRIES
from gptj_serve.serving.ingress import Ingress
from gptj_serve.serving.pipeline_deployment import Pipeline
from gptj_serve.serving.serve_run import (
    anything_is_served,
    application_being_built,
    end_serve_run,
    foreign_listener,
    num_alive,
)
from gptj_serve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

HEALTH_CHECK_PERIOD_S = 2.0
NUM_LOOKING_REQUESTS = 256
"""Beyond the task requests that an ingress answers: room for those that it refuses, health, status and page."""


class BuilderConfig(ServiceConfig):
    """`ServiceConfig` as Serve parses it from a config file: a value it refuses ends `serve run` too."""

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_is_wrong(cls, values: Any, parse: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return parse(values)
        except ValidationError as error:
            details = most_telling(error.errors())
            field = ".".join(map(str, details["loc"]))
            value = f"{field}={details['input']!r}: " if field else ""  # fields that contradict each other name theirs
            end_serve_run(f"the application's args can't be used: {value}{details['msg']}")
            raise


def build(config: BuilderConfig) -> Application:
    """Check the whole checkpoint from its headers, then bind the deployments.

    Raises `ConfigError` or `CheckpointError`, naming file and tensor, before any process is started for it; a
    `serve run` that has nothing else to serve then ends.
    """
    try:
        checkpoint = _check(config)
        _check_port()
        if anything_is_served():
            verify_weights(checkpoint)
            _check_room(config)
    except GPTJServeError as error:
        end_serve_run(f"{config.served_name} can't be served: {error}")
        raise
    if config.checkpoint != DEMO_CHECKPOINT:  # the replicas' working directories may differ
        config = config.model_copy(update={"checkpoint": str(config.checkpoint_dir.resolve())})
    if config.chat_template_file is not None:
        config = config.model_copy(update={"chat_template": str(config.chat_template_file.resolve())})
    config = config.model_copy(update={"heads": {name: str(d.resolve()) for name, d in config.head_dirs.items()}})
    if (keys_path := config.ingress.api_keys_path) is not None:
        ingress = config.ingress.model_copy(update={"api_keys_file": str(keys_path)})
        config = config.model_copy(update={"ingress": ingress})
    for_ingresses, for_pipelines = _max_surge_percents(config)
    return _ingress(config, for_ingresses).bind(config, _pipeline(config, for_pipelines).bind(config))


def verify_weights(checkpoint: Checkpoint) -> None:
    """Before anything is replaced, compare all tensors with their checksums. Raises `CheckpointError`.

    Each stage compares its own, whenever it loads them: but where there is no room for old and new side by side, that
    would be too late.
    """
    from gptj_serve.model import weights  # torch is imported only where something is replaced

    weights.verify_weights(checkpoint.tensors.values())


def _check(config: ServiceConfig) -> Checkpoint:
    checkpoint = Checkpoint.open(config.checkpoint_dir)
    model = checkpoint.config
    tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
    num_token_ids = tokenizer.num_token_ids
    if num_token_ids > model.vocab_size:
        raise CheckpointError(
            f"{config.checkpoint_dir / 'tokenizer.json'}: has {num_token_ids} token ids, more than the "
            f"vocab_size={model.vocab_size} of config.json"
        )
    open_heads(config.head_dirs, checkpoint)
    ChatTemplate.open(config, model, tokenizer)
    KeyRing(config.ingress.api_keys_path)
    plan_service(config.pipeline, checkpoint)
    num_kv_tokens = config.pipeline.kv_cache.num_tokens
    if num_kv_tokens is not None and num_kv_tokens < model.n_positions:
        raise ConfigError(
            f"pipeline.kv_cache.num_tokens={num_kv_tokens}: must hold one sequence of n_positions={model.n_positions}"
        )
    return checkpoint


def _check_port() -> None:
    """Where Serve runs: an application may be built anywhere."""
    if not ray.is_initialized():
        return
    port: int = ray.serve.context._get_global_client().http_config.port
    other = foreign_listener(port)
    if other is not None:
        raise ConfigError(
            f"http_options.port={port}: process {other.pid} ({other.name()}) of another cluster listens there; "
            "choose another port"
        )


def _check_room(config: ServiceConfig) -> None:
    """Before anything is stopped for it. A cluster may grow: so this is not asked of a first start."""
    if config.rollout.surge == "always":
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = _pipeline_bundles(config)
    if num_that_fit(bundles, config.pipeline.placement_strategy, nodes, 1) == 0:
        needed = ", ".join(f"{amount:g} {resource}" for bundle in bundles for resource, amount in bundle.items())
        amounts = [f"{sum(node.get(name, 0.0) for node in nodes):g} {name}" for name in ("CPU", "GPU")]
        raise ConfigError(
            f"pipeline: needs {needed}, for which this cluster has no room ({', '.join(amounts)} in all): nothing was "
            "replaced. With rollout.surge=always the old version serves until there is room"
        )


def _ingress(config: ServiceConfig, max_surge_percent: int) -> serve.Deployment:
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=config.ingress.num_replicas,
        max_ongoing_requests=config.ingress.max_ongoing_requests + NUM_LOOKING_REQUESTS,
        max_queued_requests=config.ingress.max_queued_requests,
        ray_actor_options={"num_cpus": config.ingress.num_cpus, "resources": config.ingress.resources},
        max_surge_percent=max_surge_percent,
        graceful_shutdown_timeout_s=config.rollout.drain_timeout_s,
        max_constructor_retry_count=MAX_CONSTRUCTOR_TRIES,
    )


def _pipeline(config: ServiceConfig, max_surge_percent: int) -> serve.Deployment:
    pipeline = config.pipeline
    num_first = _num_first_pipelines(config)
    scaling = serve_autoscaling(config, _pipeline_bundles(config), num_first)
    number: dict[str, Any] = {"num_replicas": num_first} if scaling is None else {"autoscaling_config": scaling}
    return serve.deployment(
        Pipeline,
        name="Pipeline",
        **number,
        max_ongoing_requests=pipeline.max_ongoing_requests,
        max_queued_requests=pipeline.max_queued_requests,
        ray_actor_options={"num_cpus": pipeline.engine_num_cpus},
        placement_group_bundles=_pipeline_bundles(config),
        placement_group_strategy=pipeline.placement_strategy,
        request_router_config=RequestRouterConfig(request_router_class="gptj_serve.serving.router.PipelineRouter"),
        max_surge_percent=max_surge_percent,
        graceful_shutdown_timeout_s=config.rollout.drain_timeout_s,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=MAX_CONSTRUCTOR_TRIES,
    )


def _num_first_pipelines(config: ServiceConfig) -> int:
    """With which the new config begins. Where load decides, no fewer than run now, whatever they were started for."""
    scaling = config.autoscaling
    if scaling is None:
        return config.num_pipelines
    return min(max(scaling.num_initial, num_alive("Pipeline", application_being_built())), scaling.max_pipelines)


def _pipeline_bundles(config: ServiceConfig) -> list[dict[str, float]]:
    stage = {"CPU": config.pipeline.stage.num_cpus, "GPU": config.pipeline.stage.num_gpus}
    stage_bundle = {resource: amount for resource, amount in stage.items() if amount > 0}
    return [{"CPU": config.pipeline.engine_num_cpus}] + [stage_bundle] * config.pipeline.num_stages


def _free_resources() -> list[dict[str, float]]:
    """Of each node, while something is served; nothing else."""
    if not anything_is_served():
        return []
    return free_resources()


def _max_surge_percents(config: ServiceConfig) -> tuple[int, int]:
    """How many ingresses and pipelines, in percent of all, may run beside those that they replace.

    Where it is 0, old ones are stopped first.
    """
    if config.rollout.surge == "never":
        return 0, 0
    free = _free_resources()
    if config.rollout.surge == "always" or not free:
        return 100, 100
    application = application_being_built()
    needed = {"CPU": config.ingress.num_cpus, **config.ingress.resources}
    ingresses = Group([needed], config.ingress.num_replicas, num_alive("Ingress", application))
    pipelines = Group(_pipeline_bundles(config), _num_first_pipelines(config), num_alive("Pipeline", application))
    numbers = surges(ingresses, pipelines, config.pipeline.placement_strategy, free)
    for group, num_surging in zip((ingresses, pipelines), numbers, strict=True):
        if num_surging == 0:
            logger.warning(
                "there is no room for one more replica that needs %s: old ones are stopped before new ones start",
                ", ".join(str(dict(bundle)) for bundle in group.bundles),
            )
    num_ingresses, num_pipelines = numbers
    return (
        surge_percent(num_ingresses, ingresses.num_replicas),
        surge_percent(num_pipelines, pipelines.num_replicas),
    )
