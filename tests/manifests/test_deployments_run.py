"""The deployments for CPUs are started, and answer; so does the one with two models, each below its prefix."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import NotFoundError, OpenAI

from gptj_serve.model.config import GPTJConfig
from gptj_serve.planner import Model, Resources, plan
from tests.manifests.deployed import DEMO, deployed
from tests.serving.service import ServeRun

pytestmark = [pytest.mark.manifests, pytest.mark.serve, pytest.mark.timeout(240)]

HEADS = ("lm_head", "score", "qa_outputs")
INT8 = Resources(num_stages=2, dtype="bfloat16", quantization="int8")


def test_the_6b_models_deployment_for_cpus(tmp_path: Path, int8_kernels: None) -> None:
    """With the demo in its place, and a core in place of sixteen. Comes first, while nothing else is served."""
    small = {"stage": {"num_cpus": 0.3, "num_threads": 1}, "kv_cache": {"num_tokens": 2048}}
    with deployed("gptj-6b-cpu", tmp_path, small, checkpoint="demo") as run:
        (pipeline,) = httpx.get(f"{run.url}/status", timeout=60).json()["pipelines"]
        assert [stage["dtype"] for stage in pipeline["stages"]] == ["bfloat16"] * 2
        in_8_bits = plan(Model(GPTJConfig.from_file(DEMO / "config.json"), HEADS), INT8)
        held = [stage["weight_bytes"] for stage in pipeline["stages"]]
        assert held == pytest.approx([stage.weight_bytes for stage in in_8_bits.stages], rel=0.1)
        assert pipeline["engine"]["num_kv_blocks"] == 128


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeRun]:
    """A copy of the demo stands for the 6B model."""
    directory = tmp_path_factory.mktemp("two")
    other = Path(shutil.copytree(DEMO, directory / "other"))
    small = {"num_stages": 2, "stage": {"num_cpus": 0.3}, "kv_cache": {"num_tokens": 2048}}
    with deployed("multi-model", directory, small, checkpoint=str(other)) as run:
        yield run


@pytest.mark.parametrize(("prefix", "model"), [("/gpt-j-6b", "gpt-j-6b"), ("/demo", "gptj-demo")])
def test_each_model_has_all_routes_below_its_prefix(two_models: ServeRun, prefix: str, model: str) -> None:
    without_slash = httpx.get(two_models.url + prefix, timeout=60)
    assert without_slash.headers["location"] == f"{two_models.url}{prefix}/", "the page's own links are relative"
    with httpx.Client(base_url=two_models.url + prefix, timeout=60) as http:
        assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == [model]
        assert http.get("/status").json()["model"] == model
        assert http.get("/ready").json()["is_ready"]
        assert "<title>gptj_serve" in http.get("/").text
        assert http.get("/openapi.json").json()["servers"] == [{"url": prefix}]
        assert f'src="{prefix}/docs-assets/' in http.get("/docs").text
        assert http.post("/classify", json={"inputs": "book a flight"}).json()[0][0]["label"]
        assert http.get("/nothing").json()["error"] == f"GET {prefix}/nothing: Not Found"


def test_nothing_is_served_outside_the_prefixes(two_models: ServeRun) -> None:
    answer = httpx.post(f"{two_models.url}/generate", json={"inputs": "x"}, timeout=60)
    assert (answer.status_code, "not found" in answer.text) == (404, True)
    assert httpx.get(f"{two_models.url}/-/routes", timeout=60).json() == {"/demo": "demo", "/gpt-j-6b": "gpt-j-6b"}


def test_clients_reach_a_model_by_its_prefix_and_no_other(two_models: ServeRun) -> None:
    with OpenAI(base_url=f"{two_models.url}/gpt-j-6b/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(model="gpt-j-6b", prompt="The", max_tokens=3).usage.completion_tokens == 3
        with pytest.raises(NotFoundError, match="this service has 'gpt-j-6b' only"):
            client.completions.create(model="gptj-demo", prompt="The")
    command = [Path(sys.executable).parent / "gptj-serve", "status", "--once", "--url", f"{two_models.url}/demo"]
    assert "gptj-demo" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_start_names_each_url_and_probes_are_no_news(two_models: ServeRun) -> None:
    assert f"gpt-j-6b is ready on {two_models.url}/gpt-j-6b; " in two_models.startup_output
    assert f"gptj-demo is ready on {two_models.url}/demo; " in two_models.startup_output
    assert httpx.get(f"{two_models.url}/demo/ready", timeout=60).status_code == 200
    assert "/demo/ready" not in two_models.output
