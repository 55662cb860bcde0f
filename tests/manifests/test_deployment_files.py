"""Each file in deployments/ is a config that Serve and the service take; the plan that it names is of its pipeline."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from gptj_serve.cli import main
from gptj_serve.config import DEMO_CHECKPOINT, PipelineConfig, ServiceConfig
from tests.serving.service import ROOT

FILES = sorted((ROOT / "deployments").glob("*.yaml"))
MODEL_6B = "/models/gpt-j-6b"
PLAN = re.compile(r"^#\s+(gptj-serve plan .*)$", re.MULTILINE)


def service_configs(file: Path) -> list[ServiceConfig]:
    """Of its applications. `route_prefix` and names are compared by Serve's schema."""
    deployment = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert all(app.import_path == "gptj_serve.serving.app:build" for app in deployment.applications)
    return [ServiceConfig.model_validate(app.args) for app in deployment.applications]


def planned(capsys: pytest.CaptureFixture[str], command: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[1:], "--json"])
    assert not ended.value.code, f"{command}: does not fit"
    return json.loads(capsys.readouterr().out)


def option(command: str, name: str, default: str) -> str:
    words = shlex.split(command)
    return words[words.index(name) + 1] if name in words else default


def test_they_are_all_here() -> None:
    names = {"gptj", "gptj-6b-1gpu", "gptj-6b-4gpu", "gptj-6b-cpu", "high-availability", "multi-model"}
    assert {file.stem for file in FILES} == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_serve_and_the_service_take_it(file: Path) -> None:
    deployment = yaml.safe_load(file.read_text())
    assert ServeDeploySchema.model_validate(deployment).http_options.port == 8000
    configs = service_configs(file)
    assert len({config.served_name for config in configs}) == len(configs), "metrics could not tell them apart"
    for config in configs:
        assert config.checkpoint in (DEMO_CHECKPOINT, MODEL_6B)
        if config.checkpoint == MODEL_6B:
            assert re.search(rf"^#\s+gptj-serve convert \S+ {MODEL_6B}\b", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", [file for file in FILES if MODEL_6B in file.read_text()], ids=lambda file: file.name)
def test_the_plan_that_it_names_is_of_its_own_pipeline(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = PLAN.findall(file.read_text())
    (pipeline,) = [config.pipeline for config in service_configs(file) if config.checkpoint == MODEL_6B]
    assert option(command, "--config", "") == "gpt-j-6b"
    assert int(option(command, "--stages", "1")) == pipeline.num_stages
    assert int(option(command, "--kv-tokens", "0")) == (pipeline.kv_cache.num_tokens or 0)
    assert (option(command, "--device", "gpu") == "cpu") is (pipeline.stage.num_gpus == 0)
    assert ("--kv-tokens" in command) is not pipeline.sizes_kv_pool_from_memory
    assert option(command, "--quantization", "none") == pipeline.quantization
    assert option(command, "--dtype", "auto") == pipeline.dtype
    plan = planned(capsys, command)
    assert plan["fits"]
    assert len(plan["stages"]) == pipeline.num_stages
    assert comments_of_the_pool(file) == claims_of_the_pool(plan)


def comments_of_the_pool(file: Path) -> list[str]:
    return re.findall(r"# (\d+ sequences of full length, or \d+ of 512 tokens: [\d.]+ GiB)", file.read_text())


def claims_of_the_pool(plan: dict) -> list[str]:
    """What the comment on the pool's size must say."""
    largest = max(stage["kv_pool_bytes"] for stage in plan["stages"]) / 2**30
    told = f"{plan['max_batch_full']} sequences of full length, or {plan['max_batch_typical']} of 512 tokens"
    return [f"{told}: {largest:.1f} GiB"]


def test_high_availability_has_nothing_only_once() -> None:
    (config,) = service_configs(ROOT / "deployments" / "high-availability.yaml")
    assert config.num_pipelines >= 2
    assert config.ingress.num_replicas >= 2
    assert config.ingress.request_timeout_s is not None
    assert config.ingress.request_timeout_s > config.pipeline.step_timeout_s
    assert config.pipeline.step_timeout_s < PipelineConfig().step_timeout_s
