"""One service for all tests here: the README's deployment, with two more heads and a chat template."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
import torch
import yaml

from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadInfo, HeadKind, fingerprint
from tests.serving.service import ROOT, URL, ServeRun


@pytest.fixture(scope="session")
def named_heads(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> dict[str, HeadCheckpoint]:
    """A classifier "tone", which looks at the mean of a text's states, and a reader."""
    checkpoint = Checkpoint.open(demo)
    directory = tmp_path_factory.mktemp("heads")
    rng = np.random.default_rng(0)

    def make(kind: HeadKind, name: str, num_outputs: int, **info: Any) -> HeadCheckpoint:
        weight = rng.normal(size=(num_outputs, checkpoint.config.n_embd)).astype(np.float32)
        bias = None if kind is HeadKind.CLASSIFIER else np.array([0.5, -0.5], dtype=np.float32)
        described = HeadInfo(kind=kind, name=name, backbone=fingerprint(checkpoint), **info)
        head = HeadCheckpoint(directory / name, described, weight, bias)
        head.save()
        return head

    tone = {"labels": ["glad", "sad", "flat"], "problem_type": "multi_label_classification", "pooling": "mean"}
    return {
        "tone": make(HeadKind.CLASSIFIER, "tone", 3, **tone),
        "reader": make(HeadKind.QA, "reader", 2),
    }


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, named_heads: dict[str, HeadCheckpoint]) -> Iterator[ServeRun]:
    """Also checks how it ends: Ctrl-C stops it soon and leaves no process."""
    directory = tmp_path_factory.mktemp("serve")
    config = yaml.safe_load((ROOT / "deployments" / "gptj.yaml").read_text())
    args = config["applications"][0]["args"]
    args["heads"] = {name: str(head.directory) for name, head in named_heads.items()}
    args["chat_template"] = str(ROOT / "deployments" / "chat.jinja")
    (directory / "gptj.yaml").write_text(yaml.safe_dump(config))
    run = ServeRun(directory / "gptj.yaml", directory / "output.log")
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
