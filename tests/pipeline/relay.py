"""A TCP connection by way of a relay, which can fall silent without ending it."""

import asyncio
import socket
from typing import Self


class Relay:
    """For one connection, to `target`: of whoever connects to `address` while this is entered, or did before."""

    def __init__(self, target: str) -> None:
        self._host, self._port = target.removeprefix("tcp://").split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._task: asyncio.Task[None] | None = None
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_silent = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._listener.close()

    async def _run(self) -> None:
        event_loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        incoming, _ = await event_loop.sock_accept(self._listener)
        outgoing = socket.create_connection((self._host, int(self._port)))
        with incoming, outgoing:
            incoming.setblocking(False)
            outgoing.setblocking(False)
            await asyncio.gather(self._pass(incoming, outgoing), self._pass(outgoing, incoming))

    async def _pass(self, source: socket.socket, destination: socket.socket) -> None:
        event_loop = asyncio.get_running_loop()
        while data := await event_loop.sock_recv(source, 65536):
            if not self.is_silent:
                await event_loop.sock_sendall(destination, data)
        await asyncio.Event().wait()  # who has ended its side hears nothing either
