"""What lies between two hosts of a testbed, and the messages that the switch is told it with."""

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Link:
    """Holds in both directions. A cut one loses everything, in silence, as a pulled cable does."""

    latency_s: float = 0.0  # one way
    loss: float = 0.0  # the share of frames, 0 to 1
    is_cut: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s <= 60:
            raise ValueError(f"latency_s={self.latency_s}: must be between 0 and 60 seconds")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss={self.loss}: must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Command:
    """To the switch: links by their two ports, ports to forget, or nothing but a question for its counters."""

    links: list[tuple[int, int, Link]] = field(default_factory=list)
    unplug: list[int] = field(default_factory=list)

    def encode(self) -> bytes:
        return json.dumps([[(a, b, asdict(link)) for a, b, link in self.links], self.unplug]).encode()

    @classmethod
    def decode(cls, message: bytes) -> "Command":
        links, unplug = json.loads(message)
        return cls([(a, b, Link(**link)) for a, b, link in links], unplug)


@dataclass(slots=True)
class Counters:
    """Of all frames since the start; the switch answers each command with them."""

    num_forwarded: int = 0
    num_bytes: int = 0
    num_lost: int = 0  # on links with loss or cut ones, or for a host that is gone

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> "Counters":
        return cls(**json.loads(message))
