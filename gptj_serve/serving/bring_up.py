"""`bring_up`: stages load, and agree on what none of them can know alone: a dtype, and the size of the KV pool.

The devices are seen by the stages only, and one block id must mean a block on every stage. So where the config leaves
it to the devices, all stages are asked what theirs can, load in the dtype that all have, measure what is left, and make
as many KV blocks as fit on the fullest. A stage that replaces a lost one is told what was agreed on.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptj_serve.pipeline.kv_room import agreed_num_blocks
from gptj_serve.planner import resolve_dtype
from gptj_serve.serving.stage_actor import StageSettings

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StartingStage:
    """A `stage_actor.GPTJStage` behind an actor handle: its methods are called by `.remote`, and awaited."""

    actor: Any
    settings: StageSettings


async def bring_up(stages: Sequence[StartingStage]) -> list[dict[str, Any]]:
    """Load all stages at the same time, and complete their settings. Returns their descriptions.

    Raises what a stage raised, and `DeviceMemoryError` if together they have no room for a sequence of full length.
    """
    if any(stage.settings.dtype == "auto" for stage in stages):
        dtype = resolve_dtype("auto", await asyncio.gather(*[stage.actor.capability.remote() for stage in stages]))
        for stage in stages:
            knobs = stage.settings.knobs
            stage.settings = stage.settings._replace(dtype=dtype, knobs=replace(knobs, dtype=dtype))
    await asyncio.gather(*[stage.actor.load.remote(stage.settings.dtype) for stage in stages])
    if any(stage.settings.num_kv_blocks is None for stage in stages):
        rooms = await asyncio.gather(*[stage.actor.measure.remote() for stage in stages])
        for index, room in enumerate(rooms):
            logger.info("stage %d of %d: %s", index, len(rooms), room)
        own = stages[0].settings
        num_blocks = agreed_num_blocks(rooms, own.block_size, own.max_sequence_tokens, own.knobs)
        for stage in stages:
            stage.settings = stage.settings._replace(num_kv_blocks=num_blocks)
    descriptions: list[dict[str, Any]] = await asyncio.gather(
        *[stage.actor.allocate.remote(stage.settings.num_kv_blocks) for stage in stages]
    )
    return descriptions
