"""Which handoff two neighbours use, by what they are."""

import pytest

from gptj_serve.config import HandoffKind, PipelineConfig, StageConfig
from gptj_serve.errors import ConfigError
from gptj_serve.pipeline.handoff_choice import StagePlace, choose_handoff

CPU, OTHER_CPU = StagePlace("a"), StagePlace("b")
GPU, OTHER_GPU, FAR_GPU = StagePlace("a", "GPU-1"), StagePlace("a", "GPU-2"), StagePlace("b", "GPU-3")


@pytest.mark.parametrize(
    ("sender", "receiver", "chosen", "refused"),
    [
        (CPU, CPU, "shared_memory", ["cuda_ipc"]),
        (CPU, OTHER_CPU, "zmq", ["cuda_ipc", "shared_memory"]),
        (GPU, GPU, "cuda_ipc", ["distributed"]),
        (GPU, OTHER_GPU, "distributed", ["cuda_ipc"]),
        (GPU, FAR_GPU, "distributed", ["cuda_ipc", "shared_memory"]),
        (GPU, CPU, "zmq", ["cuda_ipc", "distributed"]),
        (CPU, GPU, "zmq", ["cuda_ipc", "distributed"]),
    ],
)
def test_it_follows_from_what_the_neighbours_are(
    sender: StagePlace, receiver: StagePlace, chosen: HandoffKind, refused: list[HandoffKind]
) -> None:
    assert choose_handoff(sender, receiver) == chosen
    for kind in ("cuda_ipc", "distributed", "shared_memory", "zmq"):
        if kind in refused:
            with pytest.raises(ConfigError, match=f"pipeline.handoff='{kind}'"):
                choose_handoff(sender, receiver, kind)
        else:
            assert choose_handoff(sender, receiver, kind) == kind


def test_the_refusal_names_both_and_what_would_do() -> None:
    with pytest.raises(ConfigError) as raised:
        choose_handoff(GPU, OTHER_GPU, "cuda_ipc")
    assert str(raised.value) == (
        "pipeline.handoff='cuda_ipc': not from GPU GPU-1 of host a to GPU GPU-2 of host a; "
        "possible: distributed, shared_memory, zmq"
    )


def test_a_gpu_s_memory_is_not_shared_by_stages_without_one() -> None:
    with pytest.raises(ValueError, match="handoff: cuda_ipc is for stages that share a GPU"):
        PipelineConfig(handoff="cuda_ipc")
    assert PipelineConfig(handoff="cuda_ipc", stage=StageConfig(num_gpus=0.5)).handoff == "cuda_ipc"
