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

# Those that end a run by what people or schedulers do: Ctrl-C, kill and preemption, a closed terminal, Slurm's warning.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class Request(IntEnum):
    """What is asked of the ranks after a step; of several requests, the highest counts."""

    NOTHING = 0
    SAVE = 1
    PREEMPT = 2
    INTERRUPT = 3

    @property
    def stops(self) -> bool:
        """Whether the run is to save and end."""
        return self >= Request.PREEMPT

    @property
    def reason(self) -> str:
        """What stopped the run."""
        return "Ctrl-C" if self is Request.INTERRUPT else "a signal"


class Interrupted(BaseException):
    """A signal asked a run to stop while it did what may be left undone."""


class SavePoints:
    """Says after which steps to save, the same ones on all ranks: when `minutes` have passed, or a signal to stop came.

    Inside its context signals to stop are noted, and those that follow change nothing: what is being saved is saved
    (SIGKILL ends a run that hangs). Signals that the caller ignores, as nohup does, stay ignored. Ranks agree by an
    exchange between the hosts that is read a step later, so that nobody waits for the device.
    """

    def __init__(self, minutes: float, world: World, timeout: float) -> None:
        """Ranks wait at most `timeout` seconds for each other."""
        self._seconds = 60 * minutes
        self._is_main = world.is_main
        self._signalled = Request.NOTHING
        self._stopped_by: signal.Signals | None = None
        self._may_raise = False
        self._former_handlers: dict[signal.Signals, Any] = {}
        # A group of its own: other threads and the device's backend exchange at other times.
        self._group: dist.ProcessGroup | None = None
        if world.processes > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former_handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former_handlers = {}
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

    @contextmanager
    def may_be_left_undone(self) -> Iterator[None]:
        """A context that a signal to stop ends at once by `Interrupted`, if this process is the only one."""
        try:
            self._may_raise = self._group is None
            if self._may_raise and self._signalled:
                raise Interrupted
            yield
        finally:
            self._may_raise = False

    def hand_on(self) -> None:
        """After the context: let the handler that was there before have the signal that stopped the run, as one that a
        launcher puts there to requeue the job."""
        number = self._stopped_by
        if number is not None and callable(former := signal.getsignal(number)) and former != signal.default_int_handler:
            signal.raise_signal(number)

    @property
    def signalled(self) -> Request:
        """What signals asked of this process so far."""
        return self._signalled

    def _own_request(self) -> Request:
        if self._signalled:
            return self._signalled
        # Clocks differ: rank 0's counts.
        return Request(self._is_main and time.monotonic() - self._saved_at >= self._seconds)

    def _note(self, request: Request) -> Request:
        if request:
            self._saved_at = time.monotonic()
        return request

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self._signalled:
            self._stopped_by = signal.Signals(number)
            self._signalled = Request.INTERRUPT if number == signal.SIGINT else Request.PREEMPT
        if self._may_raise:
            self._may_raise = False
            raise Interrupted


def leave_signals_alone() -> None:
    """Ignore signals to stop from here on, where all is saved and one would only change the exit status."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context that no signal to stop ends, nor the death of a loader's worker, at which PyTorch raises wherever the
    main thread is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    quiet: dict[int, Any] = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        quiet[signal.SIGCHLD] = signal.SIG_DFL
    former = {number: signal.signal(number, handler) for number, handler in quiet.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
