"""The real HTTP application on a port of its own: the demo checkpoint, its stages in this process, no Ray."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
import torch
import uvicorn
from playwright.sync_api import Page
from torch import Tensor

from gptj_serve.api.app import create_app
from gptj_serve.api.service import Service
from gptj_serve.config import IngressConfig, ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.grammar import GrammarCompiler
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, StepOutput
from gptj_serve.tokenizer import Tokenizer

NUM_STAGES = 2
BLOCK_SIZE = 16
STEP_PAUSE_S = 0.004
"""Each stage takes so much longer: a demo that is done at once could not be watched, or stopped."""

OpenPage = Callable[..., Page]
"""See `conftest.open_page`."""


class SlowStage(StageRunner):
    def run(self, microbatch: MicroBatch, hidden: Any) -> Tensor | StepOutput:
        result = super().run(microbatch, hidden)
        time.sleep(STEP_PAUSE_S)
        return result


class LiveApp:
    """Serves while it is entered, in a thread with an event loop of its own; `url` ends with a slash."""

    def __init__(self, ingress: IngressConfig | None = None) -> None:
        self._config = ServiceConfig(ingress=ingress or IngressConfig())
        self._server: uvicorn.Server | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="live app", daemon=True)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(60), "the app did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()

    def post(self, path: str, body: Any) -> Any:
        return httpx.post(self.url + path, json=body, timeout=60).raise_for_status().json()

    def num_running(self) -> int:
        (pipeline,) = httpx.get(self.url + "status").raise_for_status().json()["pipelines"]
        return int(pipeline["engine"]["num_running"])

    async def _serve(self) -> None:
        config = self._config
        checkpoint = Checkpoint.open(config.checkpoint_dir)
        tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
        model = checkpoint.config
        num_blocks = 8 * model.n_positions // BLOCK_SIZE
        stages = []
        for span in partition(model.n_layer, NUM_STAGES, head_cost(model)):
            cpu = torch.device("cpu")
            spec = StageSpec(span, num_blocks, BLOCK_SIZE, torch.float32, cpu, tokenizer.num_token_ids)
            stages.append(SlowStage.load(checkpoint, spec))
        pipeline = InProcessPipeline(stages)
        limits = SchedulerLimits(NUM_STAGES, 64, 512, model.n_positions)
        scheduler = Scheduler(limits, KVBlocks(num_blocks, BLOCK_SIZE), model.eos_token_ids)
        grammars = GrammarCompiler(tokenizer, model.eos_token_ids)
        async with LocalEngine(scheduler, pipeline, grammars.compile_async) as engine:
            app = create_app(Service(config, model, checkpoint.heads, tokenizer, engine))
            self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
            self._started.set()
            await self._server.serve(sockets=[self._socket])
        pipeline.close()
