"""Cores are claimed by one stage at a time, near each other, and free again when its process ends, however it does."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptj_serve.pipeline.core_claims import Core, available_cores, claim_cores, pin_process

# Two NUMA nodes of two physical cores with two threads each, numbered as Linux does
CORES = [Core(index, node=index // 2 % 2, thread=index // 4) for index in range(8)]

HOLD = """
import sys, time
from pathlib import Path
from gptj_serve.pipeline.core_claims import Core, claim_cores
claim = claim_cores(2, [Core(index, 0, 0) for index in range(3)], Path(sys.argv[1]))
print(claim.cores, flush=True)
time.sleep(60)
"""


def test_stages_get_cores_of_a_node_each_and_physical_ones_first(tmp_path: Path):
    first, second = (claim_cores(2, CORES, tmp_path) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.cores, second.cores) == ([0, 1], [4, 5])  # the second threads of that node rather than two nodes
    third = claim_cores(3, CORES, tmp_path)
    assert third is not None
    assert third.cores == [2, 3, 6]


def test_a_claim_that_no_node_has_room_for_takes_several(tmp_path: Path):
    claim = claim_cores(5, CORES, tmp_path)
    assert claim is not None
    assert claim.cores == [0, 1, 2, 3, 4]
    assert claim_cores(4, CORES, tmp_path) is None
    assert (tmp_path / "core-5").exists()
    left = claim_cores(3, CORES, tmp_path)  # the refused claim holds nothing back
    assert left is not None
    assert left.cores == [5, 6, 7]


def test_what_is_released_can_be_claimed_again(tmp_path: Path):
    claim = claim_cores(8, CORES, tmp_path)
    assert claim is not None
    assert claim_cores(1, CORES, tmp_path) is None
    claim.release()
    assert claim_cores(8, CORES, tmp_path) is not None


def test_a_killed_process_leaves_no_claim(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "[0, 1]\n"
        cores = [Core(index, 0, 0) for index in range(3)]
        assert claim_cores(2, cores, tmp_path) is None
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        claim = claim_cores(2, cores, tmp_path)
        assert claim is not None
        assert claim.cores == [0, 1]
    finally:
        process.kill()
        process.stdout.close()


def test_cores_are_read_from_the_system(tmp_path: Path):
    here = sorted(os.sched_getaffinity(0))
    (tmp_path / "node/node1").mkdir(parents=True)
    (tmp_path / "node/node1/cpulist").write_text(f"{here[0]}-{here[-1]}\n")
    (tmp_path / f"cpu/cpu{here[-1]}/topology").mkdir(parents=True)
    (tmp_path / f"cpu/cpu{here[-1]}/topology/thread_siblings_list").write_text(f"{here[0]},{here[-1]}\n")
    cores = available_cores(tmp_path)
    assert [core.cpu for core in cores] == here
    assert {core.node for core in cores} == {1}
    assert [core.thread for core in cores] == [0] * (len(here) - 1) + [int(len(here) > 1)]
    assert {core.node for core in available_cores(tmp_path / "nothing")} == {0}


def test_threads_that_are_there_and_those_that_come_are_pinned():
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("with one core nothing changes")
    core = max(before)
    found: dict[str, set[int]] = {}
    go_on = threading.Event()

    def look(name: str) -> None:
        go_on.wait(10)
        found[name] = os.sched_getaffinity(0)

    early = threading.Thread(target=look, args=("early",))
    early.start()
    try:
        pin_process([core])
        late = threading.Thread(target=look, args=("late",))
        late.start()
        go_on.set()
        early.join()
        late.join()
        assert found == {"early": {core}, "late": {core}}
    finally:
        pin_process(before)
