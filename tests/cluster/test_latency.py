"""Latency between the stages' hosts is hidden: other microbatches are computed while some are on their way.

What it costs is measured beside it, and printed. How much can be hidden is a matter of arithmetic. A sequence's next
token can't be computed before the last one has gone round all stages: with 32 sequences and 90 ms of network on the
way round, no pipeline makes more than 32 / 0.09 = 356 tokens a second. So the model here is one that takes longer to
compute than that, as models do for which several hosts are worth it; the demo would be limited by the network alone.
"""

import asyncio
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx
import pytest

from benchmarks.random_model import make_checkpoint
from cluster.testbed.host import ROOT
from cluster.testbed.links import Link
from cluster.testbed.service import Service, service_config
from cluster.testbed.testbed import Testbed
from gptj_serve.config import ServiceConfig
from gptj_serve.model.config import GPTJConfig

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("namespaces"), pytest.mark.timeout(300)]

NUM_HOSTS = NUM_STAGES = 3
LATENCY_S = 0.03
CONCURRENCY = 32
NUM_ROUNDS, SETTLING_S, MEASURED_S = 3, 2.0, 6.0
LOOK_S = 0.2

MODEL = GPTJConfig(n_layer=36, n_embd=1024, n_head=16, rotary_dim=32, vocab_size=4096, n_positions=512)
"""460 M parameters; the demo's tokenizer."""


@pytest.fixture(scope="module")
def testbed(namespaces: None) -> Iterator[Testbed]:
    with Testbed(NUM_HOSTS) as testbed:
        yield testbed


@pytest.fixture(scope="module")
def service(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("latency")
    checkpoint = directory / "model"
    checkpoint.mkdir()
    make_checkpoint(MODEL, checkpoint)
    shutil.copy(ServiceConfig().checkpoint_dir / "tokenizer.json", checkpoint)
    pipeline = {"num_stages": NUM_STAGES, "placement_strategy": "SPREAD"}
    config = service_config(
        NUM_HOSTS, directory, ROOT / "deployments" / "gptj.yaml", pipeline, checkpoint=str(checkpoint)
    )
    with Service(testbed, config, directory / "serve.log") as service:
        yield service


class Measured(NamedTuple):
    tokens_per_s: float
    num_in_flight: list[int]  # microbatches, each time that the engine was asked


def test_microbatches_are_computed_while_others_are_on_their_way(
    testbed: Testbed, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    (pipeline,) = service.pipelines()
    assert len({stage["node_ip"] for stage in pipeline["stages"]}) == NUM_STAGES
    with testbed.client.network():
        measured = asyncio.run(_measure(testbed, service.url(0), [0.0, LATENCY_S] * NUM_ROUNDS))
    rates = [each.tokens_per_s for each in measured]
    without, with_latency = statistics.median(rates[::2]), statistics.median(rates[1::2])
    with capsys.disabled():
        print(
            f"\n{CONCURRENCY} requests at a time: {without:.0f} tokens/s without latency, {with_latency:.0f} with "
            f"{LATENCY_S * 1e3:.0f} ms between hosts, {1 - with_latency / without:.0%} less; in turns "
            f"{[round(rate) for rate in rates]}"
        )
    for each in measured[1::2]:
        assert statistics.median(each.num_in_flight) == NUM_STAGES


async def _measure(testbed: Testbed, url: str, latencies_s: Sequence[float]) -> list[Measured]:
    """With each latency, while `CONCURRENCY` requests run all the time, those that end being replaced at once."""
    rng = random.Random(1)

    async def work(client: httpx.AsyncClient) -> None:
        while True:
            number, num_tokens = rng.randrange(1000), rng.randrange(64, 129)
            parameters = {"max_new_tokens": num_tokens, "do_sample": True, "seed": number}
            body = {"inputs": f"Chapter {number}.", "parameters": parameters}
            (await client.post("/generate", json=body)).raise_for_status()

    async def look(client: httpx.AsyncClient) -> dict[str, Any]:
        (pipeline,) = (await client.get("/status")).raise_for_status().json()["pipelines"]
        engine = pipeline["engine"]
        assert engine["num_running"] + engine["num_waiting"] > CONCURRENCY / 2
        return engine

    measured = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        workers = [asyncio.create_task(work(client)) for _ in range(CONCURRENCY)]
        try:
            await asyncio.sleep(SETTLING_S)
            for latency_s in latencies_s:
                testbed.set_all_links(Link(latency_s=latency_s))
                await asyncio.sleep(SETTLING_S)
                began, began_at = await look(client), time.monotonic()
                seen = [began]
                while time.monotonic() < began_at + MEASURED_S:
                    await asyncio.sleep(LOOK_S)
                    seen.append(await look(client))
                num_tokens = seen[-1]["num_tokens_generated"] - began["num_tokens_generated"]
                in_flight = [engine["num_microbatches_in_flight"] for engine in seen]
                measured.append(Measured(num_tokens / (time.monotonic() - began_at), in_flight))
        finally:
            for worker in workers:
                worker.cancel()
            ends = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
    return measured
