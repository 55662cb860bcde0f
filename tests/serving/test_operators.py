"""What operators see of a running service: its status, metrics and logs."""

import asyncio
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from pydantic import TypeAdapter
from ray import serve

from gptj_serve.api.status import Status
from gptj_serve.tokenizer import Tokenizer
from tests.serving.service import ROOT, URL, ServeRun, eventually

pytestmark = pytest.mark.serve

METRICS_TIMEOUT_S = 40.0  # Ray exports what its processes measure every ten seconds

QUESTION = {"question": "Where does Anna live?", "context": "Anna lives in Paris."}

SAMPLE = re.compile(r"^ray_gptj_(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)$")


async def get_status(http: httpx.AsyncClient) -> Status:
    return TypeAdapter(Status).validate_python((await http.get("/status")).json())


Samples = dict[tuple[str, str], float]
"""By name with our own labels, as `requests_total{outcome=eos,task=generate}`, and by process."""


async def read_metrics(http: httpx.AsyncClient) -> Samples:
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    samples: Samples = {}
    for line in (await http.get(address)).text.splitlines():
        if (sample := SAMPLE.match(line)) is None:
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"]))
        assert labels["model"] == "gptj-demo"
        own = ",".join(f"{key}={labels[key]}" for key in ("by", "outcome", "stage", "task", "le") if key in labels)
        samples[f"{sample['name']}{{{own}}}", labels["WorkerId"]] = float(sample["value"])
    return samples


def growth(before: Samples, now: Samples, *names: str) -> list[float]:
    """By how much metrics have grown, over all processes."""
    return [
        sum(value - before.get((name, process), 0.0) for (name, process), value in now.items() if name == wanted)
        for wanted in names
    ]


async def settled_metrics(http: httpx.AsyncClient) -> Samples:
    """The metrics, once all that happened so far is in them."""
    before = await read_metrics(http)
    (await http.post("/qa", json={"inputs": QUESTION})).raise_for_status()
    answered = "requests_total{outcome=answered,task=qa}"
    now: Samples = {}

    async def is_settled() -> bool:
        """the ingress's and the engine's metrics are exported"""
        nonlocal now
        engine = (await get_status(http))["pipelines"][0]["engine"]
        now = await read_metrics(http)
        tokens = ("prompt_tokens_total{}", "generated_tokens_total{}")
        totals = {value for (name, _), value in now.items() if name in tokens}
        # The question's prompt tokens are the last that the engine counts.
        is_told = {engine["num_prompt_tokens"], engine["num_tokens_generated"]} <= totals
        return is_told and growth(before, now, answered) == [1]

    await eventually(is_settled, METRICS_TIMEOUT_S)
    return now


async def test_status_has_its_documented_shape(http: httpx.AsyncClient) -> None:
    body = {"inputs": "The President said", "parameters": {"max_new_tokens": 24, "do_sample": True}}
    await http.post("/generate", json=body)

    async def is_reported() -> bool:
        """the stages have told of the steps"""
        (pipeline,) = (await get_status(http))["pipelines"]
        return all(len(stage["steps"]) >= 24 for stage in pipeline["stages"])

    await eventually(is_reported)
    status = await get_status(http)
    assert (status["model"], status["max_model_len"], status["problems"]) == ("gptj-demo", 1024, [])
    assert status["heads"] == {"tone": "classifier", "reader": "qa"}
    (pipeline,) = status["pipelines"]
    assert pipeline["is_ready"]
    first, second = pipeline["stages"]
    assert (first["stage_index"], first["layers"], second["layers"]) == (0, [0, 4], [4, 6])
    assert first["pid"] != second["pid"]
    assert (first["handoff"], second["handoff"]) == (None, "shared_memory")
    assert first["handoff_s"] is None
    assert second["handoff_s"] is not None
    assert 0 < second["handoff_s"] < 1
    for stage in pipeline["stages"]:
        assert len(stage["steps"]) <= 64
        assert stage["memory_bytes"] > stage["weight_bytes"] > 0
        starts = [step["started_at"] for step in stage["steps"]]
        assert starts == sorted(starts)
        assert starts[-1] <= pipeline["now"] <= time.time()
    last = second["steps"][-1]
    (same,) = [step for step in first["steps"] if step["microbatch_id"] == last["microbatch_id"]]
    assert same["started_at"] + same["duration_s"] <= last["started_at"]


async def test_counters_are_exact(http: httpx.AsyncClient, cluster: None, demo: Path) -> None:
    before = await settled_metrics(http)
    prompt = [100, 200, 300, 400, 500]
    completion = {"model": "gptj-demo", "prompt": prompt, "max_tokens": 17, "ignore_eos": True}
    answers = await asyncio.gather(*[http.post("/v1/completions", json=completion) for _ in range(4)])
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [17] * 4
    (await http.post("/classify", json={"inputs": "what is my balance"})).raise_for_status()
    assert (await http.post("/generate", json={"inputs": "x", "parameters": {"top_p": 2}})).status_code == 422
    now = await settled_metrics(http)
    assert growth(
        before,
        now,
        "requests_total{outcome=length,task=generate}",
        "requests_total{outcome=answered,task=classify}",
        "requests_total{outcome=refused,task=none}",
        "generated_tokens_total{}",
        "time_to_first_token_seconds_count{}",
        "inter_token_latency_seconds_count{}",
        "request_seconds_count{task=generate}",
        "request_seconds_count{task=classify}",
        "queue_seconds_count{task=generate}",
        "queue_seconds_count{task=classify}",
        "routes_total{by=load}",
    ) == [4, 1, 1, 4 * 17, 4, 4 * 16, 4, 1, 4, 1, 6]
    encode = Tokenizer.from_directory(demo).encode
    texts = [encode("what is my balance"), encode(QUESTION["question"]), encode(QUESTION["context"])]
    assert growth(before, now, "prompt_tokens_total{}") == [4 * len(prompt) + sum(map(len, texts))]
    steps = growth(before, now, "stage_steps_total{stage=0}", "stage_steps_total{stage=1}")
    assert steps[0] == steps[1] >= 17
    assert growth(before, now, "stage_handoffs_total{stage=0}", "stage_handoffs_total{stage=1}") == [0, steps[1]]
    busy = growth(before, now, "stage_busy_seconds_total{stage=0}", "stage_busy_seconds_total{stage=1}")
    assert 0 < min(busy) <= max(busy) < METRICS_TIMEOUT_S
    gauges = ("num_kv_blocks{}", "num_kv_blocks_used{}", "num_running{}", "num_waiting{}")
    pipeline = next(process for (name, process), value in now.items() if name == gauges[0])
    assert [now[name, pipeline] for name in gauges] == [512, 0, 0, 0]


async def test_each_request_is_one_line_with_its_id(http: httpx.AsyncClient, service: ServeRun) -> None:
    request = {"inputs": "The President said", "parameters": {"max_new_tokens": 3}}
    await http.post("/generate", json=request, headers={"X-Request-ID": "find-me"})
    await http.get("/status", headers={"X-Request-ID": "find-me"})

    async def is_shown() -> bool:
        """the line is in the terminal"""
        return "find-me" in service.output

    await eventually(is_shown)
    (line,) = [line for line in service.output.splitlines() if "find-me" in line]
    assert "POST /generate: length; 3 prompt tokens, 3 generated, the first after" in line


async def test_a_mistake_through_the_handle_is_a_line_without_traceback(service: ServeRun, cluster: None) -> None:
    before = len(service.output)
    handle = serve.get_app_handle("gptj")
    with pytest.raises(ValueError, match=r"parameters\.top_k=-5"):
        await handle.generate.remote({"inputs": "x", "parameters": {"top_k": -5}})

    async def is_shown() -> bool:
        """the refusal is in the terminal"""
        return "Call refused: parameters.top_k=-5" in service.output[before:]

    await eventually(is_shown)
    assert "Traceback" not in service.output[before:]


def test_the_command_shows_it(service: ServeRun, capsys: pytest.CaptureFixture[str]) -> None:
    from gptj_serve.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["status", "--once", "--url", URL])
    assert not ended.value.code
    output = " ".join(capsys.readouterr().out.split())
    assert "gptj-demo" in output
    assert "0-3" in output
    assert "4-5" in output


def test_the_start_says_what_is_served_where(service: ServeRun) -> None:
    (line,) = [line for line in service.startup_output.splitlines() if "gptj-demo is ready" in line]
    assert f"gptj-demo is ready on {URL}; generation, classification, question answering, reader (qa), " in line
    assert "tone (classifier); 2 stage(s) on cpu; KV cache of 8,192 tokens for sequences of at most 1,024" in line


def read_spans(directory: Path) -> list[dict[str, Any]]:
    """Serve's default exporter writes JSON objects one after another."""
    spans = []
    for file in directory.iterdir():
        text, decoder, start = file.read_text(), json.JSONDecoder(), 0
        while start < len(text.rstrip()):
            span, end = decoder.raw_decode(text, start)
            spans.append(span)
            start = end + len(text[end:]) - len(text[end:].lstrip())
    return spans


@pytest.mark.timeout(180)
def test_logs_as_json_and_traces(tmp_path: Path) -> None:
    """A cluster of its own, stopped while a stream is open: that is no reason for a traceback."""
    config = yaml.safe_load((ROOT / "deployments" / "gptj.yaml").read_text())
    config["http_options"]["port"] = 8012
    config["logging_config"] = {"encoding": "JSON", "logs_dir": str(tmp_path)}
    config["tracing_config"] = {"enabled": True, "sampling_ratio": 1.0}
    (tmp_path / "gptj.yaml").write_text(yaml.safe_dump(config))
    run = ServeRun(tmp_path / "gptj.yaml", tmp_path / "output.txt", port=8012)
    try:
        run.wait_until_ready()
        body = {"inputs": "The President said", "parameters": {"max_new_tokens": 5}}
        httpx.post(f"{run.url}/generate", json=body, headers={"X-Request-ID": "find-me"}).raise_for_status()
        time.sleep(3)  # the engine takes over what stages have traced once a second
        long = {"inputs": "Once", "parameters": {"max_new_tokens": 1000, "do_sample": True}}
        with httpx.stream("POST", f"{run.url}/generate_stream", json=long) as response:
            next(response.iter_lines())
            run.interrupt()
    finally:
        run.process.kill()
    assert "Traceback" not in run.output
    (log,) = tmp_path.glob("replica_gptj_Ingress*.log")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (line["outcome"], line["num_prompt_tokens"], line["num_generated_tokens"]) == ("length", 3, 5)
    sessions = Path(tempfile.gettempdir(), "ray").glob("session_*/logs/serve/spans")
    spans = read_spans(max(sessions, key=lambda path: path.stat().st_mtime))
    by_id = {span["context"]["span_id"]: span for span in spans}
    sequence = next(span for span in spans if span["attributes"].get("gptj.num_generated_tokens") == 5)
    assert [event["name"] for event in sequence["events"]] == ["queued", "scheduled", "first_token", "finished"]
    assert by_id[sequence["parent_id"]]["name"] == "replica_handle_request Pipeline run"
    steps = [span for span in spans if span["parent_id"] == sequence["context"]["span_id"]]
    assert sorted(span["name"] for span in steps) == ["stage 0"] * 5 + ["stage 1"] * 5
    assert len({span["attributes"]["gptj.pid"] for span in steps}) == 2
    root = sequence
    while root["parent_id"] in by_id:
        root = by_id[root["parent_id"]]
    assert root["name"] == "POST /generate"
