"""ZeroMQ sockets as the pipeline uses them.

On one host a link is an `ipc://` socket in a private directory; between hosts it is `tcp://` with CURVE: whoever
does not hold the pipeline's keys is refused in the handshake. Every receiver binds, every sender connects.

A host that loses its power, and a network that loses every packet, tell nobody that a connection has ended: TCP would
go on trying for a quarter of an hour. So the ends of a link between hosts ask each other all the time whether they are
still there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from gptj_serve.steps import MAX_FRAME_BYTES

POLL_INTERVAL_MS = 100
"""How often a waiting stage looks whether it should stop."""

LINK_TIMEOUT_S = 5.0
"""A link between hosts is cut when nothing has come over it for so long, and can't be made if it takes longer.

Any message gets through in a fraction of it: the largest hidden states of the 6B model are 8 MB.
"""

HEARTBEAT_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """One key pair per pipeline, known to its members only: knowing the public half is what admits a peer."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair())


def bind_receiver(socket: zmq.Socket[Any], address: str, keys: CurveKeys | None) -> str:
    """Bind a PULL socket to `ipc://path` or `tcp://host` (any free port); returns the address to connect to."""
    _configure(socket, keys)
    if keys is not None:
        socket.curve_server = True
    socket.maxmsgsize = MAX_FRAME_BYTES
    socket.bind(f"{address}:*" if address.startswith("tcp://") else address)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect_sender(socket: zmq.Socket[Any], address: str, keys: CurveKeys | None) -> None:
    """Connect a PUSH socket; what it sends before the connection stands is queued."""
    _configure(socket, keys)
    if keys is not None:
        socket.curve_serverkey = keys.public
    socket.connect(address)


def receive(socket: zmq.Socket[bytes], should_stop: Callable[[], bool]) -> list[zmq.Frame] | None:
    """The next message's frames, or None once `should_stop` says so."""
    while not should_stop():
        if socket.poll(POLL_INTERVAL_MS):
            return socket.recv_multipart(copy=False)
    return None


def _configure(socket: zmq.Socket[Any], keys: CurveKeys | None) -> None:
    socket.linger = 0
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        timeout_ms = int(1000 * LINK_TIMEOUT_S)
        socket.heartbeat_ivl = int(1000 * HEARTBEAT_INTERVAL_S)
        socket.heartbeat_timeout = socket.connect_timeout = socket.handshake_ivl = timeout_ms
