"""Stages agree on dtype and KV pool before they start: as fakes, and the real one with a memory that is counted."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptj_serve.config import PipelineConfig
from gptj_serve.errors import ConfigError, DeviceMemoryError
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.pipeline.kv_room import GIB, KVRoom
from gptj_serve.serving.bring_up import StartingStage, bring_up
from gptj_serve.serving.pipeline_deployment import stage_settings
from gptj_serve.serving.stage_actor import GPTJStage, StageSettings


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A stage takes the package's lines for its own process."""
    ours = logging.getLogger("gptj_serve")
    before = (ours.handlers, ours.level, ours.propagate)
    yield
    ours.handlers, ours.level, ours.propagate = before


class Method:
    """As an actor's: `remote` begins the call, and its result is awaited."""

    def __init__(self, name: str, call: Callable[..., Any], calls: list[tuple[Any, ...]]) -> None:
        self._name, self._call, self._calls = name, call, calls

    def remote(self, *arguments: Any) -> "asyncio.Future[Any]":
        async def answer() -> Any:
            self._calls.append((self._name, *arguments))
            await asyncio.sleep(0)
            return self._call(*arguments)

        return asyncio.ensure_future(answer())


class FakeStage:
    """An actor's handle. What it was asked, in which order, is in `calls`."""

    def __init__(self, capability: tuple[int, int], free_bytes: int, calls: list[tuple[Any, ...]]) -> None:
        self.capability = Method("capability", lambda: capability, calls)
        self.load = Method("load", lambda dtype: None, calls)
        room = KVRoom("a card", 10 * GIB, 10 * GIB, 10 * GIB - free_bytes, GIB, 1 << 20)
        self.measure = Method("measure", lambda: room, calls)
        self.allocate = Method("allocate", lambda num_blocks: {"num_blocks": num_blocks}, calls)


def settings_for(directory: Path, **config: Any) -> list[StageSettings]:
    checkpoint = Checkpoint.open(directory)
    return stage_settings(PipelineConfig(num_stages=2, **config), checkpoint, checkpoint.config.vocab_size)


async def brought_up(
    settings: list[StageSettings], *devices: tuple[tuple[int, int], int]
) -> tuple[list[StartingStage], list[tuple[Any, ...]], list[dict[str, Any]]]:
    calls: list[tuple[Any, ...]] = []
    stages = [StartingStage(FakeStage(*device, calls), each) for device, each in zip(devices, settings, strict=True)]
    return stages, calls, await bring_up(stages)


@pytest.mark.parametrize(("capabilities", "dtype"), [(((8, 0), (9, 0)), "bfloat16"), (((9, 0), (7, 5)), "float16")])
async def test_on_gpus_stages_agree_on_a_dtype_and_the_smallest_pool(
    tiny_gptj: Callable[..., Path],
    capabilities: tuple[tuple[int, int], ...],
    dtype: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "gptj_serve.serving.bring_up")
    settings = settings_for(tiny_gptj(), stage={"num_gpus": 1})
    assert [(each.dtype, each.num_kv_blocks) for each in settings] == [("auto", None)] * 2
    sizes = (3 * GIB, 2 * GIB)
    stages, calls, descriptions = await brought_up(settings, *zip(capabilities, sizes, strict=True))
    assert [(s.settings.dtype, s.settings.num_kv_blocks) for s in stages] == [(dtype, 2047)] * 2
    assert calls == [
        *[("capability",)] * 2, *[("load", dtype)] * 2, *[("measure",)] * 2, *[("allocate", 2047)] * 2,
    ]  # fmt: skip
    assert descriptions == [{"num_blocks": 2047}] * 2
    assert [record.message[:22] for record in caplog.records] == [f"stage {n} of 2: a card: " for n in (0, 1)]
    _, calls, _ = await brought_up([stages[0].settings], (capabilities[0], 0))
    assert calls == [("load", dtype), ("allocate", 2047)]  # one that replaces it


async def test_what_is_set_is_not_asked_for(tiny_gptj: Callable[..., Path]) -> None:
    for config in ({}, {"stage": {"num_gpus": 1}, "dtype": "float16", "kv_cache": {"num_tokens": 160}}):
        settings = settings_for(tiny_gptj(), **config)
        _, calls, _ = await brought_up(settings, *[((9, 0), GIB)] * 2)
        assert calls == [("load", settings[0].dtype)] * 2 + [("allocate", settings[0].num_kv_blocks)] * 2


async def test_no_stage_allocates_if_one_has_too_little_room(tiny_gptj: Callable[..., Path]) -> None:
    settings = settings_for(tiny_gptj(), stage={"num_gpus": 1})
    calls: list[tuple[Any, ...]] = []
    stages = [
        StartingStage(FakeStage((9, 0), free_bytes, calls), each)
        for free_bytes, each in zip((GIB, 6 << 20), settings, strict=True)
    ]
    with pytest.raises(DeviceMemoryError, match="stage 1 of 2 on a card: a KV cache of one sequence of n_positions=96"):
        await bring_up(stages)
    assert not any(name == "allocate" for name, *_ in calls)


class CountedMemory:
    """Of a card with 1 GiB, of which a process has taken 100 MiB."""

    name = "a fake"

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def free_and_total(self) -> tuple[int, int]:
        return GIB - self.reserved_bytes(), GIB

    def reserved_bytes(self) -> int:
        return 100 << 20

    def release(self) -> None:
        pass


def test_a_stage_measures_its_room_after_it_has_loaded(tiny_gptj: Callable[..., Path]) -> None:
    (first, _) = settings_for(tiny_gptj(), stage={"num_gpus": 1}, gpu_memory_utilization=0.5)
    stage = GPTJStage(first._replace(uses_gpu=False, kernels="torch"), CountedMemory((8, 0)))
    assert stage.capability() == (8, 0)
    stage.load("bfloat16")
    room = stage.measure()
    assert room.budget_bytes == GIB // 2
    assert room.weight_bytes == first.weight_bytes  # in half precision, as it was planned
    assert room.used_bytes < 100 << 20


@pytest.mark.parametrize(
    ("quantization", "capability", "told"),
    [
        ("fp8", (8, 6), "has compute capability 8.6, and fp8 needs 8.9"),
        ("int8", (7, 5), "has compute capability 7.5, and int8 needs 8.0"),
    ],
)
def test_a_gpu_that_can_not_is_refused_before_anything_is_loaded(
    tiny_gptj: Callable[..., Path], quantization: str, capability: tuple[int, int], told: str
) -> None:
    settings = settings_for(tiny_gptj(), stage={"num_gpus": 1}, quantization=quantization)
    stage = GPTJStage(settings[0]._replace(uses_gpu=False), CountedMemory(capability))
    for call in (stage.capability, lambda: stage.load("bfloat16")):
        with pytest.raises(ConfigError) as raised:
            call()
        assert str(raised.value) == f"pipeline.quantization={quantization}: a fake {told}"
