"""Connections that nobody can hold open for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def connection_class(seconds: float) -> type[H11Protocol]:
    """uvicorn's connection, closed where a request does not begin to arrive, or an answer is not read, for so long.

    The application has its own limit for a request whose head has arrived; uvicorn knows none before and none after.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._unread = _Timer(self, seconds)  # runs while an answer waits to be read
            self._awaited = _Timer(self, seconds)  # runs while the head of a request is awaited

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # for `pause_writing` to tell of all that is not read
            self._awaited.start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._awaited.stop()
            else:
                self._awaited.start()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unread.stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unread.stop()
            self._awaited.stop()
            super().connection_lost(exc)

    return Connection


class _Timer:
    """Ends a connection, unless it is stopped in time."""

    def __init__(self, connection: H11Protocol, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._running: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self._running is None:
            self._running = self._connection.loop.call_later(self._seconds, self._connection.transport.abort)

    def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            self._running = None
