"""How many KV blocks all stages have room for."""

from dataclasses import replace

import pytest

from gptj_serve.errors import DeviceMemoryError
from gptj_serve.pipeline.kv_room import GIB, Knobs, KVRoom, advice, agreed_num_blocks

KNOBS = Knobs(2, "bfloat16", "none", 512, 256)
ROOM = KVRoom("a card", 16 * GIB, 14 * GIB, used_bytes=8 * GIB, weight_bytes=6 * GIB, block_bytes=1 << 20)


def test_the_fullest_stage_decides() -> None:
    fuller = replace(ROOM, used_bytes=9 * GIB)
    assert agreed_num_blocks([ROOM], 16, 2048, KNOBS) == 6 * 1024 - 1  # one more is the block of padding
    assert agreed_num_blocks([ROOM, fuller], 16, 2048, KNOBS) == 5 * 1024 - 1
    assert agreed_num_blocks([fuller, ROOM], 16, 2048, KNOBS) == 5 * 1024 - 1
    larger_blocks = replace(ROOM, block_bytes=2 << 20)
    assert agreed_num_blocks([ROOM, larger_blocks], 16, 2048, KNOBS) == 3 * 1024 - 1


def test_a_stage_tells_what_it_found() -> None:
    assert str(ROOM) == (
        "a card: 6.00 GiB of weights, 2.00 GiB of all else; in the 14.00 GiB that may be used there is room for 6,143 "
        "KV blocks of 1,048,576 bytes"
    )


def test_exactly_one_sequence_is_enough() -> None:
    just = replace(ROOM, used_bytes=ROOM.budget_bytes - 129 * ROOM.block_bytes)
    assert agreed_num_blocks([just], 16, 2048, KNOBS) == 128
    with pytest.raises(DeviceMemoryError):
        agreed_num_blocks([replace(just, used_bytes=just.used_bytes + 1)], 16, 2048, KNOBS)


@pytest.mark.parametrize("used_bytes", [int(13.9 * GIB), 15 * GIB])
def test_too_little_room_is_told_with_numbers_and_what_to_change(used_bytes: int) -> None:
    with pytest.raises(DeviceMemoryError) as raised:
        agreed_num_blocks([ROOM, replace(ROOM, used_bytes=used_bytes)], 16, 2048, KNOBS)
    text = str(raised.value)
    left = "0.10 GiB" if used_bytes < 14 * GIB else "0.00 GiB"
    assert text.startswith("stage 1 of 2 on a card: a KV cache of one sequence of n_positions=2048 needs 0.13 GiB; ")
    assert f"of gpu_memory_utilization=0.9 of 16.00 GiB {left} is left beside 6.00 GiB of weights and " in text
    missing = 129 / 1024 + used_bytes / GIB - 14
    assert f"of all else: {missing:.2f} GiB too little. Under pipeline: raise gpu_memory_utilization=0.9" in text


def test_advice_is_for_the_config_as_it_is() -> None:
    assert "gpu_memory_utilization" not in advice(replace(KNOBS, num_kv_tokens=4096))
    assert "lower kv_cache.num_tokens=4096" in advice(replace(KNOBS, num_kv_tokens=4096))
    assert "use dtype=auto instead of float32" in advice(replace(KNOBS, dtype="float32"))
    assert "quantization" not in advice(replace(KNOBS, quantization="fp8"))
    for each in (KNOBS, replace(KNOBS, num_kv_tokens=4096)):
        assert "scheduler.max_microbatch_tokens=512" in advice(each)
        assert "num_stages=2" in advice(each)
