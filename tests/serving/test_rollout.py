"""New configs and new weights on a service under load, by the call that `serve deploy` makes in the end."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray.serve.context
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from safetensors.numpy import load_file, save_file

from tests.serving.service import ServeRun, eventually

pytestmark = [pytest.mark.serve, pytest.mark.faults]

ROLLOUT_TIMEOUT_S = 60.0

STREAMED = [
    {"inputs": f"Chapter {n}.", "parameters": {"max_new_tokens": 200, "seed": n, "do_sample": n > 0}} for n in range(2)
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

    def __init__(self, config: Path) -> None:
        self._original = config

    async def deploy(self, **changes: Any) -> None:
        config = yaml.safe_load(self._original.read_text())
        config["applications"][0]["args"].update(changes)
        self._deployed_at = time.time()
        client = ray.serve.context._get_global_client()
        await asyncio.to_thread(client.deploy_apps, ServeDeploySchema(**config))

    async def ended(self) -> tuple[str, str]:
        """Status and message of the application, once the rollout has ended."""
        overview = serve.status().applications["gptj"]

        async def has_ended() -> bool:
            """the rollout has ended"""
            nonlocal overview
            await asyncio.sleep(0.3)  # asking costs the controller something
            overview = (await asyncio.to_thread(serve.status)).applications["gptj"]
            return overview.last_deployed_time_s >= self._deployed_at - 1 and overview.status != "DEPLOYING"

        await eventually(has_ended, ROLLOUT_TIMEOUT_S)
        return overview.status, overview.message


@pytest.fixture
async def operator(service: ServeRun, cluster: None) -> AsyncIterator[Operator]:
    operator = Operator(service.config)
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
            await asyncio.sleep(0.3)

    async def stop(self) -> None:
        self._is_stopped = True
        await asyncio.gather(*self._tasks)


@pytest.mark.timeout(180)
async def test_rollouts_under_load(
    http: httpx.AsyncClient, operator: Operator, service: ServeRun, tmp_path: Path, demo: Path
) -> None:
    """Broken ones, a new config, new weights: no request fails, and none gets an answer of two versions."""
    old = await answers(http)
    (pipeline,) = (await http.get("/status")).json()["pipelines"]
    load = Load(http)
    for what in ("damaged", "unknown key", "too large"):
        changes, told = broken(what, tmp_path / what.replace(" ", "-"), demo)
        await operator.deploy(**changes)
        status, message = await operator.ended()
        assert status == "DEPLOY_FAILED"
        assert [part for part in told if part not in message] == [], message
        assert service.process.poll() is None
    (same,) = (await http.get("/status")).json()["pipelines"]
    assert same["replica_id"] == pipeline["replica_id"]

    small = {"num_stages": 2, "stage": {"num_cpus": 0.2}, "scheduler": {"max_num_sequences": 100}}
    await operator.deploy(num_pipelines=2, pipeline=small, heads={})
    assert await operator.ended() == ("RUNNING", "")
    assert len((await http.get("/status")).json()["pipelines"]) == 2
    assert all(set(texts) == {text} for texts, text in zip(load.texts, old, strict=True))

    num_answers = [len(texts) for texts in load.texts]
    new_weights = changed_weights(tmp_path / "new-weights", demo)
    await operator.deploy(pipeline=small, checkpoint=str(new_weights), model_name="gptj-demo", heads={})
    assert await operator.ended() == ("RUNNING", "")
    new = await answers(http)
    await load.stop()
    assert load.failures == []
    for texts, one, other, before in zip(load.texts, old, new, num_answers, strict=True):
        assert one != other
        assert len(texts) > before
        assert set(texts) <= {one, other}


def broken(what: str, directory: Path, demo: Path) -> tuple[dict[str, Any], list[str]]:
    """Changes of the config that can't be served, and what the operator is told."""
    if what == "unknown key":
        return {"num_pipeline": 2}, ["num_pipeline"]
    if what == "too large":
        return {"pipeline": {"stage": {"num_cpus": 1000}}, "heads": {}}, ["1000 CPU", "has no room"]
    shutil.copytree(demo, directory)
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    return {"checkpoint": str(directory), "heads": {}}, [
        str(directory / "model.safetensors"),
        "is damaged: its SHA-256",
    ]
