"""What one process answers: the demo checkpoint in a single stage, without Ray, HTTP or ZeroMQ."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import torch

from gptj_serve.api.app import create_app
from gptj_serve.api.service import Service
from gptj_serve.config import ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.grammar import GrammarCompiler
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.tokenizer import Tokenizer

BLOCK_SIZE = 16


@asynccontextmanager
async def one_process() -> AsyncIterator[httpx.AsyncClient]:
    """A client of the HTTP application, which runs in this event loop."""
    config = ServiceConfig()
    checkpoint = Checkpoint.open(config.checkpoint_dir)
    tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
    model = checkpoint.config
    num_blocks = 8 * model.n_positions // BLOCK_SIZE
    everything = StageSpec(
        range(model.n_layer), num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"), tokenizer.num_token_ids
    )
    pipeline = InProcessPipeline([StageRunner.load(checkpoint, everything)])
    scheduler = Scheduler(
        SchedulerLimits(1, 64, 512, model.n_positions), KVBlocks(num_blocks, BLOCK_SIZE), model.eos_token_ids
    )
    grammars = GrammarCompiler(tokenizer, model.eos_token_ids)
    try:
        async with LocalEngine(scheduler, pipeline, grammars.compile_async) as engine:
            transport = httpx.ASGITransport(create_app(Service(config, model, checkpoint.heads, tokenizer, engine)))
            async with httpx.AsyncClient(transport=transport, base_url="http://one-process", timeout=120) as client:
                yield client
    finally:
        pipeline.close()
