"""Connections that nobody can hold open for nothing, and no more of them than the process can have."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from hrm.errors import UserError

BACKLOG = 128
"""Connections that wait to be accepted. asyncio accepts as many in a row before it looks at any of them."""

_ACCEPTED_BEFORE_CLOSED = 4 * (BACKLOG + 1)  # it has gone on to a fourth row when the first can be closed
_TOLD_SO = 64  # connections beyond the limit that get a sentence; those beyond are closed at once
_SECONDS_FOR_THAT = 1.0
_OTHER_FILES = 128  # that a process has open: its libraries, weights, stores


def connection_class(seconds: float, most: int) -> type[H11Protocol]:
    """uvicorn's connection, closed where a request does not begin to arrive, or an answer is not read, for so long.

    The application has its own limit for a request whose head has arrived; uvicorn knows none before and none after.

    Args:
        most: connections that may be open; what is sent on one more gets status 503.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._unread = _Timer(self, seconds)  # runs while an answer waits to be read
            self._awaited = _Timer(self, seconds)  # runs while the head of a request is awaited
            self._is_too_many = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # for `pause_writing` to tell of all that is not read
            self._is_too_many = len(self.connections) > most
            if len(self.connections) > most + _TOLD_SO:
                transport.abort()
                return
            if self._is_too_many:
                self._awaited = _Timer(self, min(seconds, _SECONDS_FOR_THAT))
            self._awaited.start()

        def data_received(self, data: bytes) -> None:
            if self._is_too_many:
                self._refuse(503, f"{most} connections are open already; come again later.", "Retry-After: 1\r\n")
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._awaited.stop()
            else:
                self._awaited.start()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "what was sent is no HTTP request.")

        def _refuse(self, status: int, sentence: str, headers: str = "") -> None:
            """Answer without the application, and close; uvicorn's own way fails where h11 expects no response."""
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
                self.transport.abort()  # in the middle of another answer
            if self.transport.is_closing():
                return
            body = json.dumps({"error": sentence})
            head = f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}{headers}Connection: close\r\n\r\n{body}".encode())
            self.transport.close()

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


def connections_allowed(wanted: int) -> int:
    """As many connections as wanted, or fewer, as far as the system lets the process have files open.

    The limit of this process is raised as far as it is needed and may be.

    Raises:
        UserError: not even one.
    """
    try:
        import resource
    except ImportError:  # on Windows
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    beside = _TOLD_SO + _ACCEPTED_BEFORE_CLOSED + _OTHER_FILES
    needed = wanted + beside
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    with suppress(ValueError, OSError):  # more than the system lets a process have, whatever its limit
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(wanted, soft - beside)
    if allowed < 1:
        raise UserError(f"this process may have only {soft} files open: raise the limit, as by ulimit -n 4096.")
    return allowed


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
