"""guidellm loads the service without a failed request, and its figures add up."""

from pathlib import Path

import pytest

from tests.serving.clients import environments

pytestmark = [pytest.mark.serve, pytest.mark.clients, pytest.mark.timeout(900)]

NUM_REQUESTS = 24
NUM_OUTPUT_TOKENS = 16


@pytest.fixture(scope="module")
def report(url: str, demo: Path) -> dict:
    return environments.run("guidellm", "guidellm_run.py", url, str(demo), "/v1/completions")


def test_every_request_succeeds(report: dict) -> None:
    requests = report["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (NUM_REQUESTS, [], [])
    assert all(request["output"] for request in requests["successful"])


def test_tokens_are_counted(report: dict) -> None:
    metrics = report["metrics"]
    output = metrics["output_token_count"]["successful"]
    assert (output["min"], output["max"]) == (NUM_OUTPUT_TOKENS, NUM_OUTPUT_TOKENS)
    assert metrics["prompt_token_count"]["successful"]["mean"] == pytest.approx(32, abs=2)


def test_times_are_sane(report: dict) -> None:
    metrics = report["metrics"]
    latency_s = metrics["request_latency"]["successful"]["mean"]
    first_s = metrics["time_to_first_token_ms"]["successful"]["mean"] / 1000
    between_s = metrics["inter_token_latency_ms"]["successful"]["mean"] / 1000
    assert 0 < first_s < latency_s
    assert first_s + (NUM_OUTPUT_TOKENS - 1) * between_s == pytest.approx(latency_s, rel=0.1)
    assert 1 < metrics["request_concurrency"]["successful"]["mean"] <= 4
