"""Linked stages give the tokens of one process whatever the handoff, also when links are cut, also with steps in flight
on a device."""

import asyncio
import itertools
import os
import random
from pathlib import Path

import pytest
import torch

from gptj_serve.config import HandoffKind
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import load_stage
from gptj_serve.pipeline.gpu.gpu_runner import GPUStageRunner
from gptj_serve.pipeline.gpu.sampler import GreedySampler
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, Row, SampleSpec
from tests.chaos import links
from tests.pipeline.fake_device import FakeDevice
from tests.pipeline.linked import BLOCK_SIZE, NUM_BLOCKS, LinkedPipeline, generate_all, make_runners, open_links
from tests.pipeline.reference_layers import ReferenceLayers

NUM_STAGES = 3

pytestmark = pytest.mark.parametrize("kind", ["zmq", "shared_memory", "distributed"])


def link_stages(runners: list[StageRunner], directory: Path, kind: HandoffKind) -> LinkedPipeline:
    numbers = itertools.count()
    return LinkedPipeline(runners, lambda name: f"ipc://{directory}/{next(numbers)}-{name}", lambda: None, handoff=kind)


async def test_the_tokens_are_those_of_one_process_also_when_links_are_cut(
    tiny_gptj, tmp_path: Path, kind: HandoffKind
) -> None:
    """A cut of the link beside the tensors is enough for both of its ends to begin anew."""
    checkpoint = Checkpoint.open(tiny_gptj())
    in_process = InProcessPipeline(make_runners(checkpoint, NUM_STAGES))
    expected = await generate_all(checkpoint, in_process, NUM_STAGES, max_new_tokens=40)
    in_process.close()
    rng = random.Random(0)

    async def cut_links(pipeline: LinkedPipeline) -> None:
        for index in (1, 2, 1):
            num_recoveries, enough = pipeline.num_recoveries, pipeline.num_steps + rng.randrange(3, 12)
            while pipeline.num_steps < enough:
                await asyncio.sleep(0)
            address = pipeline.addresses[index].hidden
            (link,) = [link for link in links.connections_of([os.getpid()]) if link.address == address]
            assert links.cut(link)
            while pipeline.num_recoveries == num_recoveries:
                await asyncio.sleep(0.001)

    async with open_links(link_stages(make_runners(checkpoint, NUM_STAGES), tmp_path, kind)) as pipeline:
        cutter = asyncio.create_task(cut_links(pipeline))
        assert await generate_all(checkpoint, pipeline, NUM_STAGES, max_new_tokens=40) == expected
        await cutter
        assert pipeline.num_recoveries == 3


async def test_steps_in_flight_on_a_device(tiny_gptj, tmp_path: Path, kind: HandoffKind) -> None:
    """Several steps are given to it before any has come back; it does nothing before it must."""
    checkpoint = Checkpoint.open(tiny_gptj())
    device = FakeDevice()
    runners: list[StageRunner] = []
    for span in partition(checkpoint.config.n_layer, NUM_STAGES, 1.0):
        spec = StageSpec(
            span, NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"), 97,
            max_num_sequences=8, max_microbatch_tokens=64,
        )  # fmt: skip
        stage = load_stage(checkpoint, span, torch.float32, torch.device("cpu"))
        layers = ReferenceLayers(stage, NUM_BLOCKS, BLOCK_SIZE)
        runners.append(GPUStageRunner(stage, spec, layers, device, GreedySampler()))
    plain = make_runners(checkpoint, 1)[0]
    microbatches = [
        MicroBatch(n, [Row([n + 1, 2 * n + 1, 30], 0, [2 * (n % 8)], samples=[SampleSpec()])]) for n in range(12)
    ]
    expected = [plain.run(microbatch, None) for microbatch in microbatches]
    async with open_links(link_stages(runners, tmp_path, kind)) as pipeline:
        outputs = await asyncio.gather(*[pipeline.run(microbatch) for microbatch in microbatches])
    for output, one in zip(outputs, expected, strict=True):
        assert output.microbatch_id == one.microbatch_id
        assert [token.token_id for token in output.rows[0].tokens] == [token.token_id for token in one.rows[0].tokens]
