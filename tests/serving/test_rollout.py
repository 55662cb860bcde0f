"""New configs and new weights on a service under load: `serve deploy`, as an operator does it."""

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray._private.worker
import yaml
from ray import serve
from safetensors.numpy import load_file, save_file

from tests.serving.service import SERVE, ServeRun, eventually

pytestmark = pytest.mark.serve

ROLLOUT_TIMEOUT_S = 60.0

STREAMED = [
    {"inputs": f"Chapter {n}.", "parameters": {"max_new_tokens": 300, "seed": n, "do_sample": n > 0}} for n in range(2)
]
WHOLE = [
    {"inputs": f"Part {n}.", "parameters": {"max_new_tokens": 24, "do_sample": True, "best_of": 2, "seed": n}}
    for n in range(2)
]


def changed_weights(directory: Path, demo: Path) -> Path:
    """The demo with another layer 3, and without checksums."""
    shutil.copytree(demo, directory)
    (directory / "checksums.json").unlink()
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.3.mlp.fc_out.weight"))
    tensors[name] = np.ascontiguousarray(-tensors[name])
    save_file(tensors, directory / "model.safetensors")
    return directory


class Operator:
    """Deploys variants of the service's own config."""

    def __init__(self, directory: Path, config: Path) -> None:
        self._directory = directory
        self._original = config
        dashboard = f"http://{ray._private.worker.get_dashboard_url()}"
        self._environment = os.environ | {"RAY_ADDRESS": dashboard, "RAY_DASHBOARD_ADDRESS": dashboard}
        self._environment["RAY_AUTH_MODE"] = "token"

    async def deploy(self, **changes: Any) -> None:
        config = yaml.safe_load(self._original.read_text())
        args = config["applications"][0]["args"]
        args.update(changes)
        file = self._directory / "new.yaml"
        file.write_text(yaml.safe_dump(config))
        self._deployed_at = time.time()
        command = [str(SERVE), "deploy", str(file)]
        await asyncio.to_thread(subprocess.run, command, env=self._environment, check=True, capture_output=True)

    async def ended(self) -> tuple[str, str]:
        """Status and message of the application, once the rollout has ended."""
        overview = serve.status().applications["gptj"]

        async def has_ended() -> bool:
            """the rollout has ended"""
            nonlocal overview
            overview = (await asyncio.to_thread(serve.status)).applications["gptj"]
            return overview.last_deployed_time_s >= self._deployed_at - 1 and overview.status != "DEPLOYING"

        await eventually(has_ended, ROLLOUT_TIMEOUT_S)
        return overview.status, overview.message


@pytest.fixture
async def operator(service: ServeRun, cluster: None, tmp_path: Path) -> AsyncIterator[Operator]:
    operator = Operator(tmp_path, service.config)
    yield operator
    await operator.deploy()
    assert await operator.ended() == ("RUNNING", "")


async def streamed(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    text = ""
    async with http.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                text += json.loads(line.removeprefix("data:"))["token"]["text"]
    return text


async def whole(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["generated_text"])


async def answers(http: httpx.AsyncClient) -> list[str]:
    return await asyncio.gather(*[streamed(http, body) for body in STREAMED], *[whole(http, body) for body in WHOLE])


class Load:
    """Asks the same questions again and again until it is stopped; `failures` and all `texts` per question."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.failures: list[str] = []
        self.texts: list[list[str]] = [[] for _ in [*STREAMED, *WHOLE]]
        self._is_stopped = False
        self._tasks = [
            asyncio.create_task(self._ask(http, index, ask, body))
            for index, (ask, body) in enumerate([*[(streamed, b) for b in STREAMED], *[(whole, b) for b in WHOLE]])
        ]

    async def _ask(self, http: httpx.AsyncClient, index: int, ask: Any, body: dict[str, Any]) -> None:
        while not self._is_stopped:
            try:
                self.texts[index].append(await ask(http, body))
            except (AssertionError, KeyError, httpx.HTTPError) as error:
                self.failures.append(repr(error))
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._is_stopped = True
        await asyncio.gather(*self._tasks)


@pytest.mark.timeout(180)
async def test_rollouts_under_load(http: httpx.AsyncClient, operator: Operator, tmp_path: Path, demo: Path) -> None:
    """A new config, then new weights: no request fails, and none gets an answer of both versions."""
    old = await answers(http)
    load = Load(http)
    small = {"num_stages": 2, "stage": {"num_cpus": 0.2}, "scheduler": {"max_num_sequences": 100}}
    await operator.deploy(num_pipelines=2, pipeline=small)
    assert await operator.ended() == ("RUNNING", "")
    assert len((await http.get("/status")).json()["pipelines"]) == 2
    num_answers = [len(texts) for texts in load.texts]
    assert all(set(texts) == {text} for texts, text in zip(load.texts, old, strict=True))
    new_weights = changed_weights(tmp_path / "new-weights", demo)
    await operator.deploy(num_pipelines=2, pipeline=small, checkpoint=str(new_weights), model_name="gptj-demo")
    assert await operator.ended() == ("RUNNING", "")
    new = await answers(http)
    await load.stop()
    assert load.failures == []
    assert all(len(texts) > before for texts, before in zip(load.texts, num_answers, strict=True))
    assert all(one != other for one, other in zip(old, new, strict=True))
    for texts, one, other in zip(load.texts, old, new, strict=True):
        assert set(texts) <= {one, other}


def broken(what: str, directory: Path, demo: Path) -> tuple[dict[str, Any], list[str]]:
    """Changes of the config that can't be served, and what the operator is told."""
    if what == "missing":
        return {"checkpoint": str(directory)}, [f"{directory}: no such checkpoint directory"]
    if what == "unknown key":
        return {"num_pipeline": 2}, ["num_pipeline"]
    if what == "chat template":
        directory.with_suffix(".jinja").write_text("{% if %}")
        return {"chat_template": str(directory.with_suffix(".jinja"))}, [str(directory), "not a chat template"]
    shutil.copytree(demo, directory)
    file = directory / "model.safetensors"
    if what == "damaged":
        weights = bytearray(file.read_bytes())
        weights[-3] ^= 1
        file.write_bytes(weights)
        return {"checkpoint": str(directory)}, [str(file), "is damaged: its SHA-256"]
    tensors = load_file(file)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"][:-1].copy()
    save_file(tensors, file)
    return {"checkpoint": str(directory)}, [str(file), "ln_f.bias", "has shape"]


@pytest.mark.timeout(120)
async def test_a_broken_rollout_is_refused(
    http: httpx.AsyncClient, operator: Operator, service: ServeRun, tmp_path: Path, demo: Path
) -> None:
    """Whatever is wrong with it: the running version serves on, and the status says what is wrong."""
    old = await answers(http)
    (pipeline,) = (await http.get("/status")).json()["pipelines"]
    load = Load(http)
    for what in ("missing", "unknown key", "chat template", "damaged", "wrong shape"):
        changes, told = broken(what, tmp_path / what.replace(" ", "-"), demo)
        await operator.deploy(**changes)
        status, message = await operator.ended()
        assert status == "DEPLOY_FAILED"
        assert [part for part in told if part not in message] == [], message
    await load.stop()
    assert load.failures == []
    assert all(set(texts) == {text} for texts, text in zip(load.texts, old, strict=True))
    (same,) = (await http.get("/status")).json()["pipelines"]
    assert same["replica_id"] == pipeline["replica_id"]
    assert service.process.poll() is None
