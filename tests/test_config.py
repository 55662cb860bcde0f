"""The deployment's configuration: what it refuses, and what it says when it does."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gptj_serve.config import AutoscalingConfig, IngressConfig, ServiceConfig
from gptj_serve.scaling.policy import ScalingLimits


def test_defaults() -> None:
    config = ServiceConfig()
    assert (config.checkpoint, config.num_pipelines, config.pipeline.num_stages) == ("demo", 1, 1)
    assert (config.pipeline.dtype, config.pipeline.stage.num_gpus) == ("auto", 0)
    assert config.pipeline.kv_cache.block_size == 16
    assert config.ingress.max_body_bytes == 1024 * 1024


def test_values_arrive_where_they_are_read() -> None:
    config = ServiceConfig.model_validate(
        {
            "num_pipelines": 2,
            "pipeline": {
                "num_stages": 4,
                "dtype": "bfloat16",
                "stage": {"num_gpus": 0.5},
                "kv_cache": {"num_tokens": 64},
            },
            "ingress": {"max_batch_inputs": 3},
        }
    )
    assert (config.num_pipelines, config.pipeline.num_stages, config.pipeline.dtype) == (2, 4, "bfloat16")
    assert (config.pipeline.stage.num_gpus, config.pipeline.kv_cache.num_tokens) == (0.5, 64)
    assert config.ingress.max_batch_inputs == 3


@pytest.mark.parametrize(
    "values",
    [
        {"chekpoint": "demo"},
        {"pipeline": {"stages": 2}},
        {"pipeline": {"stage": {"gpus": 1}}},
        {"pipeline": {"kv_cache": {"blocks": 1}}},
        {"pipeline": {"scheduler": {"max_num_seqs": 1}}},
        {"ingress": {"replicas": 1}},
        {"checkpoint": 5},
        {"model_name": ""},
        {"num_pipelines": 0},
        {"pipeline": None},
        {"pipeline": {"num_stages": 0}},
        {"pipeline": {"num_stages": 1.5}},
        {"pipeline": {"dtype": "float8"}},
        {"pipeline": {"quantization": "int4"}},
        {"pipeline": {"kernels": "own"}},
        {"pipeline": {"placement_strategy": "pack"}},
        {"pipeline": {"engine_num_cpus": 0}},
        {"pipeline": {"startup_timeout_s": -1}},
        {"pipeline": {"step_timeout_s": 0}},
        {"pipeline": {"stage": {"num_cpus": -1}}},
        {"pipeline": {"stage": {"num_gpus": "many"}}},
        {"pipeline": {"stage": {"num_threads": 0}}},
        {"pipeline": {"kv_cache": {"block_size": 0}}},
        {"pipeline": {"kv_cache": {"num_tokens": 0}}},
        {"pipeline": {"scheduler": {"max_num_sequences": 0}}},
        {"pipeline": {"scheduler": {"max_microbatch_tokens": 0}}},
        {"ingress": {"num_replicas": 0}},
        {"ingress": {"num_cpus": -1}},
        {"ingress": {"max_ongoing_requests": 0}},
        {"ingress": {"max_body_bytes": 0}},
        {"ingress": {"max_batch_inputs": 0}},
        {"ingress": {"body_timeout_s": 0}},
        {"ingress": {"body_timeout_s": float("inf")}},
        {"ingress": {"request_timeout_s": 0}},
        {"ingress": {"request_timeout_s": float("inf")}},
        {"ingress": {"api_keys_file": 5}},
        {"ingress": {"resources": {"front": 0}}},
        {"ingress": {"cors_origins": "*"}},
        {"ingress": {"cors_origins": ["example.org"]}},
        {"ingress": {"cors_origins": ["https://example.org/"]}},
        {"ingress": {"cors_origins": ["https://Example.org"]}},
        {"ingress": {"cors_origins": ["https://*.example.org"]}},
        {"ingress": {"cors_origins": ["*", "https://example.org"]}},
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(values: dict[str, Any]) -> None:
    where, what = "", values
    while isinstance(what, dict):
        ((key, what),) = what.items()
        where = f"{where}.{key}".lstrip(".")
    with pytest.raises(ValidationError) as error:
        ServiceConfig.model_validate(values)
    (problem,) = error.value.errors()
    assert ".".join(map(str, problem["loc"])) == where
    assert problem["input"] == what


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"stage": {"num_gpus": 0.5}, "dtype": "float32"}, ["on GPU", "dtype", "not float32"]),
        ({"dtype": "float16"}, ["num_gpus", "dtype"]),
        ({"kernels": "torch"}, ["kernels: auto"]),
    ],
)
def test_int8_is_refused_where_there_are_no_kernels_for_it(others: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        ServiceConfig.model_validate({"pipeline": {"quantization": "int8", **others}})
    (problem,) = error.value.errors()
    assert problem["loc"] == ("pipeline",)
    for name in ("quantization: int8", *named):
        assert name in problem["msg"]
    assert ServiceConfig.model_validate({"pipeline": others}).pipeline.quantization == "none"


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({}, "is for stages on GPU (num_gpus)"),
        ({"stage": {"num_gpus": 1}, "dtype": "float16"}, "dtype auto or bfloat16, not float16"),
        ({"stage": {"num_gpus": 1}, "kernels": "torch"}, "needs our own kernels (kernels: auto)"),
    ],
)
def test_fp8_is_refused_where_there_are_no_kernels_for_it(others: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as error:
        ServiceConfig.model_validate({"pipeline": {"quantization": "fp8", **others}})
    (problem,) = error.value.errors()
    assert "quantization: fp8" in problem["msg"]
    assert named in problem["msg"]


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_all_quantizations_on_gpus(quantization: str, dtype: str) -> None:
    pipeline = {"quantization": quantization, "dtype": dtype, "stage": {"num_gpus": 1}}
    config = ServiceConfig.model_validate({"pipeline": pipeline}).pipeline
    assert (config.quantization, config.gpu_memory_utilization) == (quantization, 0.9)


@pytest.mark.parametrize(
    ("pipeline", "is_sized"),
    [
        ({}, False),
        ({"stage": {"num_gpus": 1}}, True),
        ({"stage": {"num_gpus": 0.5}, "gpu_memory_utilization": 0.5}, True),
        ({"stage": {"num_gpus": 1}, "kv_cache": {"num_tokens": 4096}}, False),
    ],
)
def test_whether_the_pool_is_sized_from_memory(pipeline: dict[str, Any], is_sized: bool) -> None:
    assert ServiceConfig.model_validate({"pipeline": pipeline}).pipeline.sizes_kv_pool_from_memory is is_sized


@pytest.mark.parametrize(
    ("others", "named"),
    [({}, "for stages on GPU"), ({"stage": {"num_gpus": 1}, "kv_cache": {"num_tokens": 1}}, "kv_cache.num_tokens")],
)
def test_a_share_of_memory_that_decides_nothing_is_refused(others: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ServiceConfig.model_validate({"pipeline": {"gpu_memory_utilization": 0.8, **others}})


@pytest.mark.parametrize(
    ("asked", "num_stages", "num_gpus", "is_on"),
    [
        ("auto", 1, 0, False),
        ("auto", 1, 0.5, True),
        ("auto", 2, 1, False),
        (True, 1, 0, True),
        (False, 1, 1, False),
        (False, 2, 1, False),
    ],
)
def test_a_single_stage_is_scheduled_ahead_if_it_is_a_gpu_s(
    asked: str | bool, num_stages: int, num_gpus: float, is_on: bool
) -> None:
    values = {"num_stages": num_stages, "stage": {"num_gpus": num_gpus}, "scheduler": {"schedule_ahead": asked}}
    assert ServiceConfig.model_validate({"pipeline": values}).pipeline.schedules_ahead is is_on


def test_several_stages_can_t_be_scheduled_ahead() -> None:
    values = {"num_stages": 2, "scheduler": {"schedule_ahead": True}}
    with pytest.raises(ValidationError, match=r"schedule_ahead: true is for a single stage, not num_stages=2"):
        ServiceConfig.model_validate({"pipeline": values})


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_int8_on_cpus(dtype: str) -> None:
    config = ServiceConfig.model_validate({"pipeline": {"quantization": "int8", "dtype": dtype}})
    assert (config.pipeline.quantization, config.pipeline.kernels) == ("int8", "auto")


def test_autoscaling_defaults() -> None:
    assert ServiceConfig().autoscaling is None
    scaling = AutoscalingConfig(max_pipelines=4)
    assert (scaling.num_initial, scaling.may_add_nodes) == (1, False)
    assert scaling.limits == ScalingLimits(
        min_pipelines=1,
        max_pipelines=4,
        target_drain_s=10.0,
        target_kv_share=0.8,
        upscale_delay_s=2.0,
        downscale_delay_s=300.0,
        scale_to_zero_delay_s=900.0,
    )
    assert AutoscalingConfig(min_pipelines=0, max_pipelines=4).num_initial == 1
    assert AutoscalingConfig(min_pipelines=3, max_pipelines=4).num_initial == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Field required"),
        ({"max_pipelines": 0}, "greater than 0"),
        ({"max_pipelines": 2, "min_pipelines": -1}, "greater than or equal to 0"),
        ({"max_pipelines": 2, "min_pipelines": 3}, "max_pipelines=2 is below min_pipelines=3"),
        ({"max_pipelines": 2, "initial_pipelines": 0}, "greater than 0"),
        ({"max_pipelines": 2, "initial_pipelines": 3}, "initial_pipelines=3 must be from min_pipelines=1 to max"),
        ({"max_pipelines": 4, "min_pipelines": 3, "initial_pipelines": 2}, "initial_pipelines=2 must be from min"),
        ({"max_pipelines": 2, "target_kv_share": 1.5}, "less than or equal to 1"),
        ({"max_pipelines": 2, "target_kv_share": 0}, "greater than 0"),
        ({"max_pipelines": 2, "target_drain_s": 0}, "greater than 0"),
        ({"max_pipelines": 2, "upscale_delay_s": -1}, "greater than or equal to 0"),
        (
            {"max_pipelines": 2, "upscale_delay_s": 20, "downscale_delay_s": 10},
            "downscale_delay_s=10 is below upscale_delay_s=20",
        ),
        ({"max_pipelines": 2, "scale_to_zero_delay_s": 60}, "scale_to_zero_delay_s goes with min_pipelines=0, not 1"),
        ({"max_pipelines": 2, "target_ongoing_requests": 2}, "Extra inputs are not permitted"),
    ],
)
def test_autoscaling_that_contradicts_itself(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AutoscalingConfig.model_validate(values)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"num_pipelines": 1}, "num_pipelines=1 and autoscaling contradict each other"),
        (
            {"pipeline": {"scheduler": {"max_queue_wait_s": 10}}},
            "autoscaling.target_drain_s=10 must be below pipeline.scheduler.max_queue_wait_s=10",
        ),
    ],
)
def test_autoscaling_that_contradicts_the_rest(others: dict[str, Any], message: str) -> None:
    scaling = {"autoscaling": {"max_pipelines": 4}}
    with pytest.raises(ValidationError, match=message):
        ServiceConfig.model_validate(scaling | others)
    endless = {"pipeline": {"scheduler": {"max_queue_wait_s": None}}}
    assert ServiceConfig.model_validate(scaling | endless).autoscaling == AutoscalingConfig(max_pipelines=4)


def test_nothing_changes_a_configuration() -> None:
    config = ServiceConfig()
    with pytest.raises(ValidationError):
        config.pipeline.num_stages = 2  # type: ignore[misc]


def test_the_demo_checkpoint_is_in_the_package() -> None:
    config = ServiceConfig()
    assert config.checkpoint_dir.parts[-2:] == ("gptj_serve", "demo")
    assert config.served_name == "gptj-demo"


@pytest.mark.parametrize(
    ("checkpoint", "model_name", "served_name"),
    [
        ("/models/gpt-j-6b", None, "gpt-j-6b"),
        ("/models/gpt-j-6b/", None, "gpt-j-6b"),
        ("/models/gpt-j-6b/../other", None, "other"),
        ("/models/gpt-j-6b", "mine", "mine"),
        ("demo", "mine", "mine"),
    ],
)
def test_served_name(checkpoint: str, model_name: str | None, served_name: str) -> None:
    assert ServiceConfig(checkpoint=checkpoint, model_name=model_name).served_name == served_name


def test_checkpoint_dir_knows_home_and_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert ServiceConfig(checkpoint="~/gptj").checkpoint_dir == Path("/home/somebody/gptj")
    monkeypatch.chdir(tmp_path)
    assert ServiceConfig(checkpoint=".").served_name == tmp_path.name


@pytest.mark.parametrize("name", ["CPU", "GPU", "memory", "object_store_memory"])
def test_an_ingress_takes_custom_resources_only(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name!r} is no custom resource"):
        IngressConfig(resources={name: 1.0})


def test_api_keys_path_is_absolute_with_its_symlinks_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert IngressConfig().api_keys_path is None
    assert IngressConfig(api_keys_file="~/keys.yaml").api_keys_path == Path("/home/somebody/keys.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    assert IngressConfig(api_keys_file="keys.yaml").api_keys_path == tmp_path / "keys.yaml"


def test_origins_as_browsers_write_them() -> None:
    origins = ["https://example.org", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abcdef"]
    assert IngressConfig(cors_origins=origins).cors_origins == origins
    assert IngressConfig(cors_origins=["*"]).cors_origins == ["*"]


def test_heads_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = ServiceConfig.model_validate({"heads": {"spam": "~/spam", "tone": "/heads/tone"}})
    assert config.head_dirs == {"spam": Path("/home/somebody/spam"), "tone": Path("/heads/tone")}
    for heads, message in (({"default": "a"}, "'default' is the name of the checkpoint's own"), ({"": "a"}, "heads")):
        with pytest.raises(ValidationError, match=message):
            ServiceConfig.model_validate({"heads": heads})


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str | None]]:
    """All settings with their descriptions, as (dotted name, description)."""
    found: list[tuple[str, str | None]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field.description))
    return found


def test_each_setting_is_described() -> None:
    fields = _fields(ServiceConfig)
    assert "pipeline.kv_cache.num_tokens" in dict(fields)
    assert [name for name, description in fields if not description] == []
