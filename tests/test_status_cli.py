"""`gptj-serve status` against a server of canned answers."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from trace_format import read_trace

from gptj_serve.api.status import PipelineStatus, StageStatus, Status
from gptj_serve.cli import main
from gptj_serve.status_cli import MIN_WIDE_WIDTH, render


@dataclass
class Service:
    """Answers `GET /status` with `body`; asks for the key if there is one. Or sends everybody elsewhere."""

    body: bytes = b""
    key: str | None = None
    url: str = ""
    location: str = ""
    num_requests: int = 0


@pytest.fixture
def service() -> Iterator[Service]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.num_requests += 1
            if state.location:
                self.send_response(302)
                self.send_header("Location", state.location)
                self.end_headers()
                return
            is_known = state.key is None or self.headers["Authorization"] == f"Bearer {state.key}"
            found = self.path == "/status"
            self.send_response((200 if found else 404) if is_known else 401)
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], service: Service) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str, url: str | None = None) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["status", "--url", url or service.url, *arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def make_stage(index: int, **changes: Any) -> StageStatus:
    stage: dict[str, Any] = {
        "stage_index": index, "layers": [4 * index, 4 * index + 4], "device": "cpu", "dtype": "float32",
        "kernels": "torch", "num_threads": 1, "pid": 100 + index, "node_ip": "10.0.0.1",
        "weight_bytes": 10, "kv_cache_bytes": 20,
        "memory_bytes": 400_000_000, "num_restarts": 0, "busy_ratio": 0.5, "handoff_s": 0.00123 if index else None,
        "handoff": "shared_memory" if index else None,
        "steps": [],
    }  # fmt: skip
    return StageStatus(**stage | changes)  # type: ignore[typeddict-item]


def make_status(**changes: Any) -> Status:
    engine = {
        "num_running": 3, "num_waiting": 2, "num_kv_blocks": 512, "num_kv_blocks_used": 128, "num_preemptions": 1234,
        "num_recoveries": 1, "queue_wait_s": 12.4,
    }  # fmt: skip
    pipeline = PipelineStatus(
        replica_id="abc", is_ready=True, now=5.0, tokens_per_s=1234.4, engine=engine,
        stages=[make_stage(0), make_stage(1, num_restarts=2)],
    )  # fmt: skip
    status: dict[str, Any] = {
        "model": "my-gptj", "version": "1.2.3", "uptime_s": 93784.0, "tasks": ["generate", "classify"],
        "heads": {"tone": "classifier"}, "max_model_len": 1024, "pipelines": [pipeline],
        "scaling": None, "problems": [],
        "ingress": {"num_requests": 5, "max_requests": 1024},
    }  # fmt: skip
    return Status(**status | changes)  # type: ignore[typeddict-item]


def test_once_shows_service_pipelines_and_stages(run: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    service.body = json.dumps(make_status(problems=["pipeline def does not answer: TimeoutError"])).encode()
    status, out, err = run("--once")
    assert (status, err) == (0, "")
    service_line, _, pipeline_line, header, first, second, problem = out.splitlines()
    assert "my-gptj  gptj_serve 1.2.3, up 1 d 2 h  generate, classify, tone (classifier)" in service_line
    assert "5 of at most 1024 requests" in service_line
    queue = "3 running, 2 waiting for about 12 s"
    assert f"pipeline abc  ready  1,234 tokens/s  {queue}  KV █████░░░░░░░░░░░░░░░ 128/512 blocks" in pipeline_line
    assert "1,234 preemptions, 1 recoveries  handoff by shared_memory" in pipeline_line
    assert header.split() == ["stage", "layers", "device", "memory", "busy", "handoff", "restarts", "process"]
    bar = "██████████░░░░░░░░░░"
    assert first.split() == ["0", "0-3", "cpu", "float32", "0.40", "GB", bar, "50%", "0", "100", "on", "10.0.0.1"]
    assert second.split()[-6:] == ["1.23", "ms", "2", "101", "on", "10.0.0.1"]
    assert problem == "pipeline def does not answer: TimeoutError"


@pytest.mark.parametrize(
    ("num_pipelines", "minimum", "changes", "line"),
    [
        (1, 0, {"num_starting": 2, "num_stopping": 0}, "pipelines by load  1 of 0 to 3  2 starting"),
        (0, 0, {"num_starting": 0, "num_stopping": 0}, "pipelines by load  0 of 0 to 3  the next request starts one"),
        (0, 0, {"num_starting": 1, "num_stopping": 0}, "pipelines by load  0 of 0 to 3  1 starting"),
        (0, 1, None, "pipelines by load  0 of 1 to 3"),
        (
            1,
            1,
            {"num_starting": 0, "num_stopping": 2},
            "pipelines by load  1 of 1 to 3  2 finishing what they have begun",
        ),
    ],
)
def test_pipelines_that_come_and_go_by_load(
    run: Any, service: Service, num_pipelines: int, minimum: int, changes: dict[str, int] | None, line: str
) -> None:
    scaling = {"min_pipelines": minimum, "max_pipelines": 3, "changes": changes}
    pipelines = make_status()["pipelines"] * num_pipelines
    service.body = json.dumps(make_status(pipelines=pipelines, scaling=scaling)).encode()
    _, out, _ = run("--once")
    assert out.splitlines()[1].rstrip() == line


def test_a_pipeline_that_is_not_ready_says_so(run: Any, service: Service) -> None:
    pipeline = make_status()["pipelines"][0]
    service.body = json.dumps(make_status(pipelines=[{**pipeline, "is_ready": False}])).encode()
    _, out, _ = run("--once")
    assert "stages are started again" in " ".join(out.split())


def test_json_is_what_the_service_says(run: Any, service: Service) -> None:
    service.body = json.dumps(make_status()).encode()
    status, out, _ = run("--json")
    assert status == 0
    assert json.loads(out) == make_status()


def test_the_key_comes_from_the_option_or_the_environment(
    run: Any, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.body, service.key = json.dumps(make_status()).encode(), "secret"
    assert run("--once", "--api-key", "secret")[0] == 0
    monkeypatch.setenv("GPTJ_SERVE_API_KEY", "secret")
    assert run("--once")[0] == 0
    monkeypatch.delenv("GPTJ_SERVE_API_KEY")
    status, out, err = run("--once")
    assert (status, out) == (1, "")
    assert err == (
        f"gptj-serve: {service.url}/status: HTTP 401 Unauthorized; it asks for an API key (--api-key or "
        "GPTJ_SERVE_API_KEY)\n"
    )


def test_no_redirect_takes_the_key_elsewhere(run: Any, service: Service) -> None:
    service.location = f"{service.url}/elsewhere"
    assert run("--once", "--api-key", "secret") == (
        1, "", f"gptj-serve: {service.url}/status: HTTP 302 Found; it leads to {service.url}/elsewhere, and is not "
        "followed, since that may be anybody's\n"
    )  # fmt: skip
    assert service.num_requests == 1


def test_a_trace_of_the_last_steps(run: Any, service: Service, tmp_path: Path) -> None:
    """Of a stage some steps are no longer told, or not yet."""
    stages = [
        make_stage(
            index,
            steps=[
                {"microbatch_id": number, "started_at": 2.0 + number + 0.5 * index, "duration_s": 0.5, "num_rows": 3,
                 "num_tokens": 7}
                for number in range(first, end)
            ],
        )
        for index, (first, end) in enumerate([(1, 4), (0, 3)])
    ]  # fmt: skip
    pipeline = PipelineStatus(**{**make_status()["pipelines"][0], "stages": stages, "now": 6.0})
    service.body = json.dumps(make_status(pipelines=[pipeline], problems=["pipeline def does not answer"])).encode()
    file = tmp_path / "trace.json.gz"
    assert run("--trace", str(file)) == (
        0,
        f"pipeline abc: 4 steps of 2 stages, over 3.00 s\ntimeline: {file}, for ui.perfetto.dev or chrome://tracing\n",
        "pipeline def does not answer\n",
    )
    events = read_trace(file)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [(tracks[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        ("stage 1", "microbatch 0", 0, 500_000),
        ("stage 0", "microbatch 1", 500_000, 500_000),
        ("stage 1", "microbatch 1", 1_000_000, 500_000),
        ("stage 0", "microbatch 2", 1_500_000, 500_000),
        ("stage 1", "microbatch 2", 2_000_000, 500_000),
        ("stage 0", "microbatch 3", 2_500_000, 500_000),
    ]
    assert [e["args"] for e in events if e["ph"] == "X"] == [{"num_rows": 3, "num_tokens": 7}] * 6
    assert [e["ph"] for e in events if e["ph"] in "sf"] == ["s", "f"] * 2
    counters = {e["name"]: e["args"] for e in events if e["ph"] == "C"}
    assert counters == {"requests": {"waiting": 2}, "sequences": {"running": 3}, "KV blocks": {"used": 128}}


@pytest.mark.parametrize("option", ["--once", "--json"])
def test_a_trace_is_all_that_is_shown(run: Any, service: Service, tmp_path: Path, option: str) -> None:
    file = tmp_path / "trace.json"
    assert run("--trace", str(file), option) == (1, "", f"gptj-serve: --trace={file}: can't be set beside {option}\n")
    assert not file.exists()
    assert service.num_requests == 0


@pytest.mark.parametrize("body", [b"<html>", b'{"model": "x"}', b""])
def test_an_answer_that_is_something_else(run: Any, service: Service, body: bytes) -> None:
    service.body = body
    assert run("--once") == (
        1, "", f"gptj-serve: {service.url}/status: what answers there is not this service's status\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9/status: [Errno 111] Connection refused"),
        ("127.0.0.1:8000", "--url='127.0.0.1:8000': must begin with http:// or https://"),
        ("file:///etc/passwd", "--url='file:///etc/passwd': must begin with http:// or https://"),
        ("http://127.0.0.1:x", "http://127.0.0.1:x/status: nonnumeric port: 'x'"),
    ],
)
def test_no_service_there(run: Any, url: str, message: str) -> None:
    assert run("--once", url=url) == (1, "", f"gptj-serve: {message}\n")


@pytest.mark.parametrize(("width", "has_processes"), [(80, False), (MIN_WIDE_WIDTH, True)])
def test_every_figure_can_be_read_in_any_terminal(width: int, has_processes: bool) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(render(make_status(), width))
    shown = console.file.getvalue()
    assert "…" not in shown
    for figure in ("0-3", "cpu float32", "0.40 GB", "50%", "1.23 ms"):
        assert figure in shown
    assert ("process" in shown) == has_processes
