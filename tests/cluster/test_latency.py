"""Latency between the stages' hosts is hidden: other microbatches are computed while some are on their way.

How much can be hidden is a matter of arithmetic. A sequence's next token can't be computed before the last one has gone
round all stages: with 32 sequences and 90 ms of network on the way round, no pipeline makes more than 32 / 0.09 = 356
tokens a second. So the model here is one that takes longer to compute than that, as models do for which several hosts
are worth it; the demo would be limited by the network alone.
"""

import asyncio
import random
import shutil
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.random_model import make_checkpoint
from cluster.testbed.host import ROOT
from cluster.testbed.links import Link
from cluster.testbed.service import Service, service_config
from cluster.testbed.testbed import Testbed
from gptj_serve.config import ServiceConfig
from gptj_serve.model.config import GPTJConfig

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("namespaces"), pytest.mark.timeout(240)]

NUM_HOSTS = NUM_STAGES = 3
NUM_MICROBATCHES = 5
LATENCY_S = 0.03
CONCURRENCY = 32
NUM_REQUESTS = 64
MODEL = GPTJConfig(n_layer=12, n_embd=1024, n_head=16, rotary_dim=32, vocab_size=4096, n_positions=512)
"""156 M parameters; the demo's tokenizer."""


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
    pipeline = {
        "num_stages": NUM_STAGES,
        "placement_strategy": "SPREAD",
        "scheduler": {"num_microbatches": NUM_MICROBATCHES},
    }
    config = service_config(
        NUM_HOSTS, directory, ROOT / "deployments" / "gptj.yaml", pipeline, checkpoint=str(checkpoint)
    )
    with Service(testbed, config, directory / "serve.log") as service:
        yield service


def test_latency_between_stages_is_hidden(
    testbed: Testbed, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        len({stage["node_ip"] for (pipeline,) in [service.pipelines()] for stage in pipeline["stages"]}) == NUM_STAGES
    )

    async def measure() -> list[float]:
        await _tokens_per_s(service.url(0), CONCURRENCY)  # warm-up
        rates = []
        for latency_s in (0.0, LATENCY_S, 0.0):
            testbed.set_all_links(Link(latency_s=latency_s))
            rates.append(await _tokens_per_s(service.url(0), NUM_REQUESTS))
        return rates

    with testbed.client.network():
        before, slow, after = asyncio.run(measure())
    fall = 1 - slow / max(before, after)
    with capsys.disabled():
        print(
            f"\n{CONCURRENCY} requests at a time: {before:.0f} and {after:.0f} tokens/s without latency, "
            f"{slow:.0f} with {LATENCY_S * 1e3:.0f} ms between hosts: {fall:.0%} less"
        )
    assert fall < 0.25


async def _tokens_per_s(url: str, num_requests: int) -> float:
    """Of requests of 16 to 48 tokens, `CONCURRENCY` at a time."""
    rng = random.Random(1)
    slots = asyncio.Semaphore(CONCURRENCY)

    async def generate(client: httpx.AsyncClient, number: int, num_tokens: int) -> None:
        parameters = {"max_new_tokens": num_tokens, "do_sample": True, "seed": number, "details": True}
        async with slots:
            response = await client.post("/generate", json={"inputs": f"Chapter {number}.", "parameters": parameters})
        answer = response.raise_for_status().json()
        assert answer["details"]["generated_tokens"] == num_tokens

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        lengths = [rng.randrange(16, 49) for _ in range(num_requests)]
        began_at = time.monotonic()
        await asyncio.gather(*[generate(client, number, length) for number, length in enumerate(lengths)])
        return sum(lengths) / (time.monotonic() - began_at)
