"""What happens to requests when clients leave and processes die, and how a service that can't start ends."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.util.state import list_actors

from tests.serving.service import ROOT, ServeRun, eventually

pytestmark = pytest.mark.serve

LONG = {"inputs": "It was the best of times", "parameters": {"max_new_tokens": 900, "details": True}}


async def pipeline_status(http: httpx.AsyncClient) -> dict[str, Any]:
    pipelines = (await http.get("/status")).json()["pipelines"]
    assert len(pipelines) == 1
    return pipelines[0]


async def test_client_that_leaves_frees_its_blocks(http: httpx.AsyncClient) -> None:
    before = (await pipeline_status(http))["engine"]
    async with http.stream("POST", "/generate_stream", json=LONG) as response:
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data:")

        async def is_shown() -> bool:
            """the stream is in the status"""
            engine = (await pipeline_status(http))["engine"]
            return engine["num_kv_blocks_used"] > 0 and engine["num_running"] == 1

        await eventually(is_shown)

    async def freed() -> bool:
        """the blocks of the stream that its client left are free"""
        engine = (await pipeline_status(http))["engine"]
        return engine["num_kv_blocks_used"] == 0 and engine["num_running"] == 0

    await eventually(freed)
    after = (await pipeline_status(http))["engine"]
    assert after["num_requests_aborted"] == before["num_requests_aborted"] + 1
    assert after["num_tokens_generated"] - before["num_tokens_generated"] < LONG["parameters"]["max_new_tokens"]


def test_stages_are_actors_with_telling_names(cluster: None) -> None:
    actors = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", "GPTJStage")])
    names = sorted(actor.name for actor in actors)
    assert len({actor.pid for actor in actors}) == 2
    assert "stage-0-of-2/layers-0-to-3" in names[0]
    assert "stage-1-of-2/layers-4-to-5" in names[1]


def test_handle_from_another_job(cluster: None) -> None:
    @ray.remote(num_cpus=0)
    def another_job() -> dict[str, Any]:
        handle = serve.get_app_handle("gptj")
        request = {"inputs": "The President", "parameters": {"max_new_tokens": 6}}
        stream = handle.options(stream=True).generate_stream.remote(request)
        question = {"question": "Where does Anna live?", "context": "Anna lives in Paris."}
        return {
            "generate": handle.generate.remote(request).result(),
            "stream": [item["token"]["text"] for item in stream],
            "classify": handle.classify.remote({"inputs": "what is my balance"}).result(),
            "qa": handle.qa.remote({"inputs": question}).result(),
        }

    answers = ray.get(another_job.remote())
    assert "".join(answers["stream"]) == answers["generate"]["generated_text"]
    assert len(answers["stream"]) == 6
    assert answers["classify"][0][0]["label"] == "balance"
    assert answers["qa"]["answer"] == "Anna lives in Paris."[answers["qa"]["start"] : answers["qa"]["end"]]


def test_handle_refuses_bad_input_by_name(cluster: None) -> None:
    handle = serve.get_app_handle("gptj")
    with pytest.raises(Exception, match=r"parameters\.temperature=-1"):
        handle.generate.remote({"inputs": "x", "parameters": {"temperature": -1}}).result()


async def stream_tokens(http: httpx.AsyncClient, body: dict[str, Any], started: asyncio.Event) -> list[int]:
    """The streamed token ids; sets `started` after the tenth."""
    tokens = []
    async with http.stream("POST", "/generate_stream", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                tokens.append(json.loads(line.removeprefix("data:"))["token"]["id"])
                if len(tokens) == 10:
                    started.set()
    return tokens


VARIED = [
    {},
    {"do_sample": True},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"do_sample": True, "frequency_penalty": 0.4, "prompt_lookup_num_tokens": 4},
    {"guidance_scale": 1.5, "negative_prompt": "The President"},
    {"grammar": {"type": "regex", "value": "[a-z ]{400}"}},
]


async def whole_answer(http: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    return (await http.post("/generate", json=body)).json()


@pytest.mark.parametrize("victim", [0, 1])
async def test_killed_stage_is_only_a_pause(http: httpx.AsyncClient, victim: int) -> None:
    bodies = [
        {"inputs": f"Chapter {n}.", "parameters": {"max_new_tokens": 180, "seed": n, **parameters}}
        for n, parameters in enumerate(VARIED)
    ]
    beams = {"inputs": "Chapter six.", "parameters": {"max_new_tokens": 80, "num_beams": 4}}
    undisturbed = await asyncio.gather(*[stream_tokens(http, body, asyncio.Event()) for body in bodies])
    undisturbed_beams = await whole_answer(http, beams)
    started = asyncio.Event()
    streams = [asyncio.create_task(stream_tokens(http, body, started)) for body in bodies]
    search = asyncio.create_task(whole_answer(http, beams))
    await started.wait()
    stage = (await pipeline_status(http))["stages"][victim]
    assert not any(stream.done() for stream in streams)
    os.kill(stage["pid"], signal.SIGKILL)
    assert await asyncio.gather(*streams) == undisturbed
    assert await search == undisturbed_beams
    status = await pipeline_status(http)
    assert status["engine"]["num_recoveries"] > 0
    assert status["stages"][victim]["pid"] != stage["pid"]
    assert status["stages"][1 - victim]["pid"] != stage["pid"]
    assert status["engine"]["num_kv_blocks_used"] == 0


async def test_killed_pipeline_replica_is_only_a_pause(http: httpx.AsyncClient, cluster: None) -> None:
    bodies = [
        {"inputs": f"Chapter {n}.", "parameters": {"max_new_tokens": 180, "seed": n, **parameters}}
        for n, parameters in enumerate(VARIED)
    ]
    beams = {"inputs": "Chapter six.", "parameters": {"max_new_tokens": 80, "num_beams": 4}}
    undisturbed = await asyncio.gather(*[stream_tokens(http, body, asyncio.Event()) for body in bodies])
    undisturbed_beams = await whole_answer(http, beams)
    started = asyncio.Event()
    streams = [asyncio.create_task(stream_tokens(http, body, started)) for body in bodies]
    search = asyncio.create_task(whole_answer(http, beams))
    await started.wait()
    replica_id = (await pipeline_status(http))["replica_id"]
    replicas = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", "ServeReplica:gptj:Pipeline")])
    assert not any(stream.done() for stream in streams)
    os.kill(replicas[0].pid, signal.SIGKILL)
    assert await asyncio.gather(*streams) == undisturbed
    assert await search == undisturbed_beams
    assert (await pipeline_status(http))["replica_id"] != replica_id


@pytest.mark.timeout(120)
async def test_broken_checkpoint_ends_serve_run(tmp_path: Path, demo: Path) -> None:
    """Its own cluster beside the service's; the message names file and tensor, and the command ends."""
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights.replace(b"h.3.mlp.fc_in.bias", b"h.3.mlp.fc_in.bios", 1))
    config = (ROOT / "deployments" / "gptj.yaml").read_text()
    (tmp_path / "broken.yaml").write_text(
        config.replace("checkpoint: demo", f"checkpoint: {broken}").replace("port: 8000", "port: 8011")
    )
    run = ServeRun(tmp_path / "broken.yaml", tmp_path / "output.log", port=8011)
    processes: list[psutil.Process] = []
    try:
        while run.process.poll() is None:
            processes = run.descendants() or processes
            await asyncio.sleep(0.1)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
    finally:
        run.process.kill()
    assert run.process.returncode != 0
    assert f"{broken}: tensor 'h.3.mlp.fc_in.bias' is missing" in run.output
