"""How hidden states get from one stage to the next: chosen by what the two neighbours are."""

import sys
from typing import NamedTuple

from gptj_serve.config import HandoffKind
from gptj_serve.errors import ConfigError


class StagePlace(NamedTuple):
    """Where a stage's hidden states are."""

    host: str  # the same for stages that share memory, network and users
    gpu: str | None = None  # its UUID, since every process may number them in its own way; None on a CPU


def choose_handoff(sender: StagePlace, receiver: StagePlace, wanted: HandoffKind = "auto") -> HandoffKind:
    """Never "auto". Raises `ConfigError` if the wanted one is not to be had between these two.

    CPUs of one host share memory, and two stages on one GPU its memory, where NCCL refuses to work. Different GPUs use
    NCCL. What is left goes by ZeroMQ, which always works.
    """
    share_host = sender.host == receiver.host
    on_gpus = [place.gpu for place in (sender, receiver) if place.gpu is not None]
    share_gpu = share_host and len(on_gpus) == 2 and on_gpus[0] == on_gpus[1]
    can_use: dict[HandoffKind, bool] = {
        "cuda_ipc": share_gpu and sys.platform == "linux",
        "distributed": len(on_gpus) != 1 and not share_gpu,
        "shared_memory": share_host and sys.platform == "linux",
        "zmq": True,
    }
    if wanted == "auto":
        preferred: tuple[HandoffKind, ...] = ("cuda_ipc", "distributed") if on_gpus else ("shared_memory",)
        return next((kind for kind in preferred if can_use[kind]), "zmq")
    if not can_use[wanted]:
        ways = ", ".join(kind for kind, is_usable in can_use.items() if is_usable)
        raise ConfigError(
            f"pipeline.handoff={wanted!r}: not from {_described(sender)} to {_described(receiver)}; possible: {ways}"
        )
    return wanted


def _described(place: StagePlace) -> str:
    return f"{'a CPU' if place.gpu is None else f'GPU {place.gpu}'} of host {place.host}"
