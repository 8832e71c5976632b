"""When to save: by the clock, or because a signal asks the run to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from hrm.distributed.world import World

STOP_SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))  # no SIGUSR1 on Windows


class Request(IntEnum):
    """What is asked of the ranks after a step; of several requests, the highest counts."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_STOP = 2


class SavePoints:
    """Says after which steps to save, the same ones on all ranks: when `minutes` have passed, or a signal to stop came.

    Inside its context the signals of preemption are caught once; the next one does what it did before. Ranks agree by
    an exchange between the hosts that is read a step later, so that nobody waits for the device.
    """

    def __init__(self, minutes: float, world: World, timeout: float) -> None:
        """Ranks wait at most `timeout` seconds for each other."""
        self._seconds = 60 * minutes
        self._is_main = world.is_main
        self._signalled = False
        self._former_handlers: dict[signal.Signals, Any] = {}
        # A group of its own: other threads and the device's backend exchange at other times.
        self._group: dist.ProcessGroup | None = None
        if world.processes > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._former_handlers = {number: signal.signal(number, self._catch) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back_handlers()
        if kind is None and self._asked is not None:  # end the exchange before its group ends
            self._asked[1].wait()

    def after_step(self) -> Request:
        """What to do now; every rank must ask after every step."""
        if self._group is None:
            return self._note(self._own_request())
        agreed = Request.NOTHING
        if self._asked is not None:
            requests, exchange = self._asked
            exchange.wait()
            agreed = self._note(Request(int(requests)))
        requests = torch.tensor(self._own_request())
        self._asked = requests, dist.all_reduce(requests, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed

    def _own_request(self) -> Request:
        if self._signalled:
            return Request.SAVE_AND_STOP
        # Clocks differ: rank 0's counts.
        return Request(self._is_main and time.monotonic() - self._saved_at >= self._seconds)

    def _note(self, request: Request) -> Request:
        if request:
            self._saved_at = time.monotonic()
        return request

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self._give_back_handlers()

    def _give_back_handlers(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A context that Ctrl-C does not end: hands press it twice, and torchrun and timeout pass it on once more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if former is None else former)
