"""`LinkWatch`: notices at once when a link is cut, and when all of them stand.

ZeroMQ connects again by itself and tells nobody, but what was on its way is lost. So whoever holds an end of a link
listens to the events of its socket.
"""

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from gptj_serve.errors import PipelineError
from gptj_serve.pipeline.sockets import LINK_TIMEOUT_S

_EVENTS = (
    zmq.Event.CONNECTED
    | zmq.Event.CONNECT_RETRIED
    | zmq.Event.ACCEPTED
    | zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
    | zmq.Event.MONITOR_STOPPED
)


@dataclass(slots=True)
class _End:
    """This process's end of one link."""

    socket: zmq.Socket[Any]
    name: str
    accepted: set[int] = field(default_factory=set)  # file descriptors
    peers: set[int] = field(default_factory=set)  # of these, those that may be the link's other end

    def is_cut_by(self, event: int, value: int) -> bool:
        """A sender's link is cut when it ends or can't be made: its receiver was bound before.

        At a receiver strangers may knock: whoever was connected when a handshake succeeded may be the peer, and the
        link is cut when they all have left. ZeroMQ doesn't say whose handshake it was.
        """
        if event == zmq.Event.CONNECTED:
            self.peers = {value}
        elif event == zmq.Event.ACCEPTED:
            self.accepted.add(value)
        elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.peers = self.peers or set(self.accepted)
        elif event == zmq.Event.DISCONNECTED:
            was_peer = value in self.peers
            self.accepted.discard(value)
            self.peers.discard(value)
            return was_peer and not self.peers
        return event == zmq.Event.CONNECT_RETRIED


class LinkWatch:
    """A thread that calls `on_cut`, at most once, with the error that names the first link that is cut.

    Of one context there may be one watch.
    """

    def __init__(self, on_cut: Callable[[PipelineError], None]) -> None:
        self._on_cut = on_cut
        self._ends: dict[zmq.Socket[bytes], _End] = {}  # by the socket that brings its events
        self._thread: threading.Thread | None = None
        self._unmade: set[zmq.Socket[bytes]] = set()  # of these the senders' that have not connected yet
        self._settled = threading.Event()  # all links are made, or one is cut
        self._cut: zmq.Socket[bytes] | None = None  # the events of the link that was the first to be

    def add(self, socket: zmq.Socket[Any], name: str) -> None:
        """Before it is bound or connected, and before `start`; `name` says what the link is for."""
        address = f"inproc://link-watch-{len(self._ends)}"
        socket.monitor(address, _EVENTS)
        events = zmq.Context[zmq.Socket[bytes]](socket.context).socket(zmq.PAIR)
        events.connect(address)
        self._ends[events] = _End(socket, name)
        if socket.type == zmq.PUSH:
            self._unmade.add(events)

    def wait_until_made(self) -> None:
        """Until each sender's link stands. Raises `PipelineError` if one is cut or takes longer than a link may."""
        self._settled.wait(2 * LINK_TIMEOUT_S)  # the connection's and the handshake's, each of which ends the wait
        unmade = self._unmade.copy()  # the thread may be at it
        if self._cut is not None:
            how = "could not be made" if self._cut in unmade else "was cut"
            raise PipelineError(f"the link for {self._ends[self._cut].name} {how}")
        if unmade:
            names = " and ".join(sorted(self._ends[events].name for events in unmade))
            raise PipelineError(f"the link for {names} could not be made")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="link-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, if it has not been ended. The sockets must still be open, and no other thread use them."""
        for end in self._ends.values():
            end.socket.disable_monitor()
        if self._thread is not None:
            self._thread.join()
        for events in self._ends:
            events.close(linger=0)
        self._ends.clear()

    def _run(self) -> None:
        poller = zmq.Poller()
        for events in self._ends:
            poller.register(events, zmq.POLLIN)
        while True:
            for events, _ in poller.poll():
                event, value = struct.unpack("=hi", events.recv_multipart()[0])
                if event == zmq.Event.MONITOR_STOPPED:
                    return
                end = self._ends[events]
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    self._unmade.discard(events)
                    if not self._unmade:
                        self._settled.set()
                if end.is_cut_by(event, value) and self._cut is None:
                    self._cut = events
                    self._settled.set()
                    self._on_cut(PipelineError(f"the link for {end.name} was cut"))
