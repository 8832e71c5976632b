"""One model, one thread, and slots that are refilled as sequences halt: puzzles of all callers share a batch.

Other work with the model is done in the same thread, between ACT steps.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hrm.inference.model import TrainedModel
from hrm.inference.predictor import sequences_at_once
from hrm.service.sessions import updated
from hrm.service.slots import Found, Slots
from hrm.tasks.form import Puzzle

Result = TypeVar("Result")
_AnyFuture = Future[Any] | asyncio.Future[Any]


class Closed(Exception):
    """The engine takes no more work."""


@dataclass(frozen=True, eq=False)
class Step:
    """What the model answered after an ACT step."""

    tokens: NDArray[np.int64]  # [S]
    q_halt: float  # a logit


@dataclass(frozen=True, eq=False)
class Solved:
    """The answer to a puzzle."""

    last: Step
    steps: int  # ACT steps spent
    trajectory: list[Step]  # after each of them, where it was asked for


@dataclass(eq=False)
class _Asked:
    """Puzzles whose answers are waited for together."""

    max_steps: int
    keeps_steps: bool
    request: object
    future: Future[Solved] | asyncio.Future[list[Solved]]
    is_one: bool = False  # what is waited for is no list
    solved: list[Solved | None] = field(default_factory=list)  # by the puzzle's number
    unsolved: int = 0


@dataclass(eq=False)
class _Job:
    puzzle: Puzzle
    number: int  # of those asked for together
    asked: _Asked
    trajectory: list[Step] = field(default_factory=list)
    ticket: int | None = None  # once it is not in the engine's line any more


class _Lines:
    """Puzzles that wait: those of a request stand in a line of their own, and the lines take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[object, OrderedDict[_Job, None]] = OrderedDict()  # by request

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, job: _Job) -> None:
        self._lines.setdefault(job.asked.request, OrderedDict())[job] = None

    def remove(self, job: _Job) -> None:
        """Take a puzzle out, if it is there."""
        if (line := self._lines.get(job.asked.request)) is not None:
            line.pop(job, None)
            if not line:
                del self._lines[job.asked.request]

    def take(self) -> _Job:
        """The next puzzle."""
        request, line = self._lines.popitem(last=False)
        job, _ = line.popitem(last=False)
        if line:
            self._lines[request] = line  # behind the others
        return job

    def take_all(self) -> list[_Job]:
        jobs = [job for line in self._lines.values() for job in line]
        self._lines.clear()
        return jobs


@dataclass
class Work:
    """What was done so far, and what is at hand."""

    answered: int = 0  # puzzles
    act_steps: int = 0  # of all puzzles
    in_slots: int = 0
    waiting: int = 0


class Engine:
    """Answers puzzles of many callers at once, each as many ACT steps as the model asks for.

    A puzzle takes a free slot before the next ACT step and gives it up after the one in which it halts. Answers are
    those of `TrainedModel.predict`, up to how a batch of another size rounds.

    Args:
        model: used by this engine alone from now on.
        slots: puzzles computed at a time; None: what suits the device.
    """

    def __init__(self, model: TrainedModel, slots: int | None = None) -> None:
        self.model = model
        self.slots = slots or sequences_at_once(model.device)
        self._slots = Slots(model, self.slots)
        self._jobs: dict[int, _Job] = {}  # by ticket: in slots, or next
        self._halted_lately = 0  # puzzles, in the last step that was read
        self._ready: list[tuple[_AnyFuture, object]] = []  # to be handed out: an answer or an error
        self._waiting = _Lines()
        self._withdrawn: list[int] = []  # tickets of what nobody waits for any more
        self._besides: deque[tuple[Generator[None, None, Any], Future[Any]]] = deque()  # work other than puzzles
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._work = Work()
        self._thread = threading.Thread(target=self._run, name="hrm-engine", daemon=True)
        self._thread.start()

    def submit(
        self, puzzle: Puzzle, max_steps: int | None = None, *, keeps_steps: bool = False, request: object = None
    ) -> Future[Solved]:
        """Put a puzzle in line. Cancelling the future takes it out of the line or out of its slot.

        Args:
            max_steps: ACT steps at most; None: as in training.
            keeps_steps: give what was answered after every ACT step too.
            request: what it is of; where puzzles wait, requests take turns, so that one of many does not delay others.

        Raises:
            Closed: it takes no more.
        """
        future: Future[Solved] = Future()
        self._put_in_line([puzzle], _Asked(max_steps or self.model.act_max_steps, keeps_steps, request, future, True))
        return future

    def ask(
        self,
        puzzles: Sequence[Puzzle],
        max_steps: int | None = None,
        *,
        keeps_steps: bool = False,
        request: object = None,
    ) -> asyncio.Future[list[Solved]]:
        """As `submit`, for several puzzles, from within an event loop.

        The loop is woken once for all that an ACT step has answered. A future of `submit` wakes its thread for itself,
        and at some hundred answers a step the engine would then wait for the interpreter more than for the device.
        """
        future: asyncio.Future[list[Solved]] = asyncio.get_running_loop().create_future()
        if not puzzles:
            future.set_result([])
        self._put_in_line(puzzles, _Asked(max_steps or self.model.act_max_steps, keeps_steps, request, future))
        return future

    def _put_in_line(self, puzzles: Sequence[Puzzle], asked: _Asked) -> None:
        asked.solved = [None] * len(puzzles)
        asked.unsolved = len(puzzles)
        jobs = [_Job(puzzle, number, asked) for number, puzzle in enumerate(puzzles)]
        with self._changed:
            self._check_open()
            for job in jobs:
                self._waiting.add(job)
            self._changed.notify()
        asked.future.add_done_callback(partial(self._withdraw, jobs))

    def run(self, work: Generator[None, None, Result]) -> Future[Result]:
        """Do other work with the model. Cancelling the future ends it where it yields next.

        While puzzles are in slots, all such work together gets about as much time as they do, in turns.

        Args:
            work: yields often: the next ACT step waits for that.

        Raises:
            Closed: it takes no more.
        """
        future: Future[Result] = Future()
        with self._changed:
            self._check_open()
            self._besides.append((work, future))
            self._changed.notify()
        return future

    def _check_open(self) -> None:
        if self._failure is not None:
            raise Closed("the model cannot compute any more; restart the service")
        if self._closed:
            raise Closed("the service is ending")

    def _withdraw(self, jobs: Sequence[_Job], future: _AnyFuture) -> None:
        """Forget puzzles that nobody waits for any more."""
        if future.cancelled():
            with self._changed:
                for job in jobs:
                    if job.ticket is None:
                        self._waiting.remove(job)
                    else:
                        self._withdrawn.append(job.ticket)

    @property
    def work(self) -> Work:
        """Counts as they are now."""
        with self._changed:
            in_slots = min(len(self._jobs), self.slots)
            waiting = len(self._waiting) + len(self._jobs) - in_slots
            return Work(self._work.answered, self._work.act_steps, in_slots, waiting)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine by itself, if something did."""
        return self._failure

    def warm_up(self) -> None:
        """Answer an empty puzzle, so that what is compiled and recorded is ready for the first request."""
        puzzle = Puzzle(np.zeros(self.model.form.seq_len, dtype=np.int64))
        self.submit(puzzle, max_steps=3).result()
        for level in self.model.model.model.inner.levels:
            self.run(updated(self.model, puzzle, level, 1)).result()

    def close(self) -> None:
        """Take no more work, do what there is, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ---- its thread

    def _run(self) -> None:
        try:
            with torch.no_grad(), self.model.model.weights_at_hand():
                while self._admit():
                    began = time.perf_counter()
                    if self._jobs:
                        self._advance()
                    self._work_besides(time.perf_counter() - began)
        except BaseException as error:
            with self._changed:
                self._closed, self._failure = True, error
                jobs = [*self._jobs.values(), *self._waiting.take_all()]
                futures = dict.fromkeys(job.asked.future for job in jobs)
                self._ready += [(future, error) for future in [*futures, *(future for _, future in self._besides)]]
                self._jobs.clear()
                self._besides.clear()
            self._hand_out()
            traceback.print_exception(error)  # for whoever runs it; clients get a sentence

    def _admit(self) -> bool:
        """Give free slots to those in line, and wait while there is no work; False when closed and all is done."""
        with self._changed:
            while True:
                self._fill()
                if self._jobs or self._besides:
                    return True
                if self._closed:
                    return False
                self._changed.wait()

    def _fill(self) -> None:
        """Take puzzles out of the line for the slots that are free, and for those that become free meanwhile."""
        for ticket in self._withdrawn:
            if ticket in self._jobs:
                self._slots.give_up(ticket)
        self._withdrawn.clear()
        for ticket in self._slots.left():
            del self._jobs[ticket]
        # In the step that is not read yet about as many halt as in the one before, and then others are to be in line.
        ahead = max(2 * self._halted_lately, self.slots // 2, 1) if self._slots.reads_later else 0
        most = self.slots + min(ahead, self.slots)
        while self._waiting and len(self._jobs) < most:
            job = self._waiting.take()
            if not job.asked.future.cancelled():  # but not taken out yet
                job.ticket = self._slots.put(job.puzzle, job.asked.max_steps)
                self._jobs[job.ticket] = job

    def _work_besides(self, seconds: float) -> None:
        """Other work for so long, each a piece in turn; one piece at least."""
        until = time.perf_counter() + seconds
        while True:
            with self._changed:
                if not self._besides:
                    return
                work, future = self._besides.popleft()
            if future.cancelled():
                work.close()
                continue
            try:
                next(work)
            except StopIteration as done:
                _give(future, done.value)
            except Exception as error:
                _give(future, error)
            else:
                with self._changed:
                    self._besides.append((work, future))
            if time.perf_counter() >= until:
                return

    def _advance(self) -> None:
        """One ACT step of the puzzles in slots.

        Where more wait than there are slots, the next step is launched before this one is read: it keeps the device at
        work. Else it would only delay those that come meanwhile.
        """
        self._slots.launch()
        while self._slots.launched > (1 if self._goes_ahead() else 0):
            self._read(self._slots.read())

    def _goes_ahead(self) -> bool:
        is_full = bool(self._waiting) or len(self._jobs) > self.slots
        return self._slots.reads_later and is_full and not self._besides

    def _read(self, found: Found) -> None:
        """Make answers of what a step has found, and hand them out."""
        self._work.act_steps += len(found.tickets)
        self._halted_lately = int(found.has_halted.sum())
        columns = (found.tickets, found.q_halt, found.steps, found.has_halted)
        for row, (ticket, q_halt, steps, has_halted) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if (job := self._jobs.get(ticket)) is None:  # given up meanwhile
                continue
            asked = job.asked
            if not (has_halted or asked.keeps_steps):
                continue
            step = Step(found.tokens[row].astype(np.int64), q_halt)
            if asked.keeps_steps:
                job.trajectory.append(step)
            if has_halted:
                del self._jobs[ticket]
                self._work.answered += not asked.future.cancelled()
                asked.solved[job.number] = Solved(step, steps, job.trajectory)
                asked.unsolved -= 1
                if not asked.unsolved:
                    self._ready.append((asked.future, asked.solved[0] if asked.is_one else asked.solved))
        self._hand_out()

    def _hand_out(self) -> None:
        """Give what is ready to those who wait for it."""
        ready, self._ready = self._ready, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], object]]] = {}
        for future, outcome in ready:
            if isinstance(future, asyncio.Future):
                by_loop.setdefault(future.get_loop(), []).append((future, outcome))
            else:
                _give(future, outcome)
        for loop, outcomes in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_give_all, outcomes)


def _give_all(outcomes: Sequence[tuple[asyncio.Future[Any], object]]) -> None:
    """Give each, in the thread of the loop that waits."""
    for future, outcome in outcomes:
        if not future.done():
            _give(future, outcome)


def _give(future: _AnyFuture, outcome: object) -> None:
    """Hand out what came of some work, or the error that ended it, unless nobody waits for it any more."""
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
