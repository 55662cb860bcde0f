"""Hidden states of many sequences through the pipeline, kept on disk so that a second run, or one that was broken
off, computes nothing twice."""

import asyncio
import fcntl
import hashlib
import os
import struct
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.errors import DataError, RequestFailedError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import fingerprint
from gptj_serve.model.loading_progress import terminal_bar
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.partition import head_cost, partition
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.types import EngineRequest, HeadEvent, Pooling, Task

BLOCK_SIZE = 16
KV_SEQUENCES = 8
"""The KV pool's capacity in sequences of full length."""

MAX_MICROBATCH_TOKENS = 512
MAX_SUBMITTED = 256
"""Sequences handed to the engine at a time."""

_RECORD = struct.Struct("<32sI")  # key, number of rows


@dataclass(frozen=True, slots=True)
class FeatureConfig:
    """How hidden states are computed; all of it but the stages and threads is part of the cache's identity."""

    num_stages: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    pooling: Pooling = Pooling.LAST


class FeatureCache:
    """One append-only file: a record per sequence of its key, number of rows and rows [num_rows, num_columns].

    Rows are float32, or float16 for whole sequences, which take much room. A record that a broken-off run left
    unfinished is cut off on opening. One process at a time.
    """

    def __init__(self, file: Path, num_columns: int, dtype: type[np.floating]) -> None:
        self._num_columns = num_columns
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._places: dict[bytes, tuple[int, int]] = {}  # key → (offset of the rows, number of rows)
        self._name = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = file.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{file}: can't be opened as a cache of features: {error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(f"{file}: is in use by another run") from None
        self._read_index()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> NDArray[np.float32]:
        offset, num_rows = self._places[key]
        data = os.pread(self._file.fileno(), num_rows * self._num_columns * self._dtype.itemsize, offset)
        return np.frombuffer(data, self._dtype).reshape(num_rows, self._num_columns).astype(np.float32)

    def add(self, key: bytes, rows: NDArray[np.float32]) -> None:
        record = _RECORD.pack(key, len(rows)) + rows.astype(self._dtype).tobytes()
        offset = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        try:
            written = self._file.write(record)
        except OSError as error:
            raise DataError(f"{self._name}: can't be written: {error}") from None
        if written < len(record):
            raise DataError(f"{self._name}: can't be written: the disk is full")
        self._places[key] = (offset + _RECORD.size, len(rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_index(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        offset = 0
        while offset + _RECORD.size <= size:
            key, num_rows = _RECORD.unpack(os.pread(self._file.fileno(), _RECORD.size, offset))
            end = offset + _RECORD.size + num_rows * self._num_columns * self._dtype.itemsize
            if end > size:
                break
            self._places[key] = (offset + _RECORD.size, num_rows)
            offset = end
        if offset < size:
            os.ftruncate(self._file.fileno(), offset)


def open_cache(directory: Path, checkpoint: Checkpoint, config: FeatureConfig) -> FeatureCache:
    """The cache of one backbone, dtype and pooling."""
    dtype = str(config.dtype).removeprefix("torch.")
    name = f"{fingerprint(checkpoint)}-{dtype}-{config.pooling}.features"
    stored = np.float16 if config.pooling is Pooling.ALL else np.float32
    return FeatureCache(directory / name, checkpoint.config.n_embd, stored)


def key_of(token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(token_ids, dtype="<u4").tobytes()).digest()


async def compute_features(
    checkpoint: Checkpoint, config: FeatureConfig, cache: FeatureCache, sequences: Iterable[list[int]]
) -> None:
    """Add to the cache the hidden states of those sequences that it hasn't got."""
    missing = {key: ids for ids in sequences if (key := key_of(ids)) not in cache}
    if not missing:
        return
    num_tokens = sum(map(len, missing.values()))
    places = asyncio.Semaphore(MAX_SUBMITTED)
    with tqdm(total=num_tokens, desc="features", unit="token", unit_scale=True) as progress:
        async with _engine(checkpoint, config) as engine, asyncio.TaskGroup() as group:

            async def compute(key: bytes, token_ids: list[int]) -> None:
                request = EngineRequest(
                    request_id=key.hex(), task=Task.EMBED, prompt_token_ids=token_ids, pooling=config.pooling
                )
                async for event in engine.submit(request):
                    if not isinstance(event, HeadEvent):
                        raise RequestFailedError(f"no features for a sequence of {len(token_ids)} tokens: {event}")
                    cache.add(key, event.values.array)
                progress.update(len(token_ids))
                places.release()

            for key, token_ids in missing.items():
                await places.acquire()
                group.create_task(compute(key, token_ids))


@asynccontextmanager
async def _engine(checkpoint: Checkpoint, config: FeatureConfig) -> AsyncGenerator[LocalEngine]:
    model = checkpoint.config
    num_blocks = -(-KV_SEQUENCES * model.n_positions // BLOCK_SIZE)
    runners = []
    for index, span in enumerate(partition(model.n_layer, config.num_stages, head_cost(model))):
        spec = StageSpec(
            span, num_blocks, BLOCK_SIZE, config.dtype, torch.device(config.device), model.vocab_size,
            max_num_sequences=MAX_SUBMITTED, max_microbatch_tokens=MAX_MICROBATCH_TOKENS,
        )  # fmt: skip
        with terminal_bar(f"Loading stage {index + 1} of {config.num_stages}") as progress:
            runners.append(StageRunner.load(checkpoint, spec, progress=progress))
    limits = SchedulerLimits(config.num_stages, MAX_SUBMITTED, MAX_MICROBATCH_TOKENS, model.n_positions)
    pipeline = InProcessPipeline(runners)
    try:
        async with LocalEngine(Scheduler(limits, KVBlocks(num_blocks, BLOCK_SIZE), frozenset()), pipeline) as engine:
            yield engine
    finally:
        pipeline.close()
