"""One service for all tests here: the README's command, on the demo checkpoint with two stages."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import torch

from tests.serving.service import ROOT, URL, ServeRun


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeRun]:
    """Also checks how it ends: Ctrl-C stops it soon and leaves no process."""
    run = ServeRun(ROOT / "deployments" / "gptj.yaml", tmp_path_factory.mktemp("serve") / "output.log")
    try:
        yield run.wait_until_ready()
        processes = run.descendants()
        ray.shutdown()
        seconds = run.interrupt()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive, f"left behind after {seconds:.1f} s: {alive}"
    finally:
        run.process.kill()


@pytest.fixture(scope="session")
def cluster(service: ServeRun) -> None:
    """This process as one more Ray job on the service's cluster."""
    ray.init(address="auto", namespace="serve", log_to_driver=False)


@pytest.fixture
async def http(service: ServeRun) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=URL, timeout=120, limits=limits) as client:
        yield client


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """The oracle shares the cores with the service; more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Path:
    return ROOT / "gptj_serve" / "demo"
