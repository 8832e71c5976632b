"""Clients of `hrm serve`, and what they meet with."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

_CONNECTED_AT_ONCE = 64


@dataclass
class Load:
    """What requests met with."""

    ms: list[float] = field(default_factory=list)  # of those that were answered
    answered: int = 0  # puzzles
    texts: dict[int, str] = field(default_factory=dict)  # answers by board
    errors: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    seconds: float = 0.0
    cpu_seconds: float = math.nan  # of the service, where the system tells

    def row(self) -> dict[str, Any]:
        times = np.percentile(self.ms or [np.nan], [50, 95, 99]).tolist()
        return {
            "puzzles/s": self.answered / self.seconds,
            **dict(zip(("p50 ms", "p95 ms", "p99 ms"), times, strict=True)),
            "CPU ms a puzzle": 1000 * self.cpu_seconds / max(self.answered, 1),
            "answered": self.answered,
            "left out": self.left_out,
            "errors": " ".join(f"{error}: {count}" for error, count in self.errors.items()) or 0,
        }


class Clients:
    """Connections to one address, as many as there are requests at a time, kept open."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connect(self, count: int) -> None:
        """Have so many open, asked for in turns: one that a listener has no room for is answered seconds later."""
        at_once = asyncio.Semaphore(_CONNECTED_AT_ONCE)

        async def one() -> None:
            async with at_once:
                self._idle.append(await asyncio.open_connection(*self._address))

        await asyncio.gather(*(one() for _ in range(count)))

    async def infer(self, tokens: np.ndarray[Any, Any]) -> list[str]:
        """The answers to puzzles [N, S], each on one line.

        Raises:
            RuntimeError: it is refused.
            OSError, asyncio.IncompleteReadError: the connection breaks.
        """
        body = json.dumps({"inputs": [{"tokens": row} for row in tokens.tolist()]}).encode()
        status, content = await self.ask(request_of(body))
        if status != 200:
            raise RuntimeError(str(status))
        texts: list[str] = json.loads(content)["texts"]
        return texts

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of an answer."""
        while self._idle and self._idle[-1][0].at_eof():  # the service closes what was idle for long
            self._idle.pop()[1].close()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        try:
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
            body = await reader.readexactly(int(length)) if length else await reader.read()
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head or not length:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split()[1]), body

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def request_of(
    body: bytes,
    path: str = "/infer",
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
    length: int | None = None,
) -> bytes:
    """A request as it is sent.

    Args:
        length: what it says that its body has; None: the truth.
    """
    fields = {"Host": "h", "Content-Type": "application/json", **(headers or {})}
    fields["Content-Length"] = str(len(body) if length is None else length)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(clients: Clients, tokens: np.ndarray[Any, Any], numbers: range, load: Load, due: float) -> None:
    """Ask for some puzzles, and enter into `load` what comes of it; its time counts from when it was due."""
    try:
        texts = await clients.infer(tokens[numbers.start : numbers.stop])
        load.texts.update(zip(numbers, texts, strict=True))
        load.answered += len(texts)
        load.ms.append(1000 * (time.perf_counter() - due))
    except RuntimeError as error:
        load.errors[str(error)] += 1
    except (OSError, asyncio.IncompleteReadError) as error:
        load.errors[type(error).__name__] += 1


def saturate(
    address: tuple[str, int], tokens: np.ndarray[Any, Any], clients: int, inputs: int = 1, processes: int = 1
) -> Load:
    """Every puzzle once, so many a request, by so many clients that are never idle."""
    processes = min(processes, len(tokens))
    if processes == 1:
        return asyncio.run(_never_idle(address, tokens, clients, inputs))
    context = multiprocessing.get_context("spawn")
    pipes = []
    for part in np.array_split(np.arange(len(tokens)), processes):
        here, there = context.Pipe()
        arguments = (there, address, tokens[part], max(1, clients // processes), inputs)
        context.Process(target=_never_idle_in_a_process, args=arguments, daemon=True).start()
        there.close()
        pipes.append((int(part[0]), here))
    for _, pipe in pipes:
        pipe.recv()  # its clients are connected
    for _, pipe in pipes:
        pipe.send(None)
    whole = Load()
    for first, pipe in pipes:
        load: Load = pipe.recv()
        whole.ms += load.ms
        whole.answered += load.answered
        whole.texts |= {first + number: text for number, text in load.texts.items()}
        whole.errors += load.errors
        whole.seconds = max(whole.seconds, load.seconds)
    return whole


def _never_idle_in_a_process(
    pipe: Connection, address: tuple[str, int], tokens: np.ndarray[Any, Any], clients: int, inputs: int
) -> None:
    def begin() -> None:
        pipe.send(None)
        pipe.recv()

    pipe.send(asyncio.run(_never_idle(address, tokens, clients, inputs, begin)))


async def _never_idle(
    address: tuple[str, int],
    tokens: np.ndarray[Any, Any],
    count: int,
    inputs: int,
    begin: Callable[[], None] = lambda: None,
) -> Load:
    """`saturate` in one process.

    Args:
        begin: called when all clients are connected; they ask when it returns.
    """
    load, clients = Load(), Clients(address)
    parts = iter([range(first, min(first + inputs, len(tokens))) for first in range(0, len(tokens), inputs)])

    async def client() -> None:
        for numbers in parts:
            await ask(clients, tokens, numbers, load, time.perf_counter())

    await clients.connect(count)
    begin()
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    load.seconds = time.perf_counter() - began
    clients.close()
    return load
