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
from torch import Tensor

from hrm.batch import Batch
from hrm.cuda_graphs import GraphedWork
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import is_one_shape, sequences_at_once
from hrm.service.sessions import updated
from hrm.tasks.form import Puzzle

Result = TypeVar("Result")
_AnyFuture = Future[Any] | asyncio.Future[Any]

_COLUMNS = 3  # of rows, beside tokens


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
class _Job:
    puzzle: Puzzle
    max_steps: int
    keeps_steps: bool
    request: object
    future: Future[Solved] | asyncio.Future[Solved]
    trajectory: list[Step] = field(default_factory=list)


class _Lines:
    """Puzzles that wait: those of a request stand in a line of their own, and the lines take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[object, OrderedDict[_Job, None]] = OrderedDict()  # by request

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, job: _Job) -> None:
        self._lines.setdefault(job.request, OrderedDict())[job] = None

    def remove(self, job: _Job) -> None:
        """Take a puzzle out, if it is there."""
        if (line := self._lines.get(job.request)) is not None:
            line.pop(job, None)
            if not line:
                del self._lines[job.request]

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
        self._inner = model.model
        self._is_one_shape = is_one_shape(model.model, model.device)  # else only slots in use are computed
        self._reads_later = model.device.type != "cpu"  # it computes while the host goes on
        self._jobs: dict[int, _Job] = {}  # by slot
        self._free = list(range(self.slots))  # slots that have none
        self._fresh: list[int] = []  # slots whose job begins with the next step
        # A row for each slot: tokens [S], identifier, whether its job begins with the next step, and ACT steps at most.
        # In one piece, for a single copy to the device; what is found comes back likewise.
        self._rows = torch.zeros(
            (self.slots, model.form.seq_len + _COLUMNS), dtype=torch.int32, pin_memory=model.device.type == "cuda"
        )
        self._written = self._rows.numpy()  # the same memory, written without a word to PyTorch
        self._staged: list[_Job] = []  # those that get the next free slots, and their rows
        self._staged_rows = np.zeros_like(self._written)
        self._unread: list[tuple[_Job, NDArray[np.int32]]] = []  # what a step has found for a job
        self._carry = self._inner.initial_carry(_batch(self._rows.to(model.device)))
        graphed = model.model.kernels.cuda_graphs
        self._step = GraphedWork(self._computed, model.device, eager_calls=2) if graphed else self._computed
        self._ready: list[tuple[_AnyFuture, object]] = []  # to be handed out: an answer or an error
        self._waiting = _Lines()
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
        self._put_in_line([_Job(puzzle, max_steps or self.model.act_max_steps, keeps_steps, request, future)])
        return future

    def ask(
        self,
        puzzles: Sequence[Puzzle],
        max_steps: int | None = None,
        *,
        keeps_steps: bool = False,
        request: object = None,
    ) -> list[asyncio.Future[Solved]]:
        """As `submit`, for several puzzles, from within an event loop.

        The loop is woken once for all that an ACT step has answered. A future of `submit` wakes its thread for itself,
        and at some hundred answers a step the engine would then wait for the interpreter more than for the device.
        """
        loop = asyncio.get_running_loop()
        jobs = [
            _Job(puzzle, max_steps or self.model.act_max_steps, keeps_steps, request, loop.create_future())
            for puzzle in puzzles
        ]
        self._put_in_line(jobs)
        return [job.future for job in jobs]  # type: ignore[misc]

    def _put_in_line(self, jobs: Sequence[_Job]) -> None:
        with self._changed:
            self._check_open()
            for job in jobs:
                self._waiting.add(job)
            self._changed.notify()
        for job in jobs:
            job.future.add_done_callback(partial(self._withdrawn, job))

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

    def _withdrawn(self, job: _Job, future: Future[Solved] | asyncio.Future[Solved]) -> None:
        """Forget a puzzle that nobody waits for any more; one that has a slot gives it up before the next ACT step."""
        if future.cancelled():
            with self._changed:
                self._waiting.remove(job)

    @property
    def work(self) -> Work:
        """Counts as they are now."""
        with self._changed:
            waiting = len(self._waiting) + len(self._staged)
            return Work(self._work.answered, self._work.act_steps, len(self._jobs), waiting)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine by itself, if something did."""
        return self._failure

    def warm_up(self) -> None:
        """Answer an empty puzzle, so that what is compiled and recorded is ready for the first request."""
        puzzle = Puzzle(np.zeros(self.model.form.seq_len, dtype=np.int64))
        self.submit(puzzle, max_steps=3).result()
        for level in self._inner.model.inner.levels:
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
            with torch.no_grad(), self._inner.weights_at_hand():
                while self._admit():
                    began = time.perf_counter()
                    if self._jobs:
                        self._advance()
                    self._work_besides(time.perf_counter() - began)
        except BaseException as error:
            with self._changed:
                self._closed, self._failure = True, error
                unread = [job for job, _ in self._unread]
                jobs = [*unread, *self._jobs.values(), *self._staged, *self._waiting.take_all()]
                self._ready += [(job.future, error) for job in jobs]
                self._ready += [(future, error) for _, future in self._besides]
                self._jobs.clear()
                self._staged.clear()
                self._besides.clear()
            self._hand_out()
            traceback.print_exception(error)  # for whoever runs it; clients get a sentence

    def _admit(self) -> bool:
        """Give free slots to those in line, and wait while there is no work; False when closed and all is done."""
        self._fill()
        while not (self._jobs and self._reads_later and (self._staged or not self._free)):
            self._read()
            with self._changed:
                self._stage(len(self._free))
                if not self._staged:
                    if self._jobs or self._besides:
                        return True
                    if self._closed:
                        return False
                    self._changed.wait()
            self._fill()
            if self._jobs:
                return True
        return True

    def _stage(self, most: int) -> None:
        """Take puzzles out of the line, up to so many, and write their rows."""
        for slot in [slot for slot, job in self._jobs.items() if job.future.cancelled()]:
            del self._jobs[slot]
            self._free.append(slot)
        while self._waiting and len(self._staged) < most:
            job = self._waiting.take()
            if job.future.cancelled():  # but not taken out yet
                continue
            row = self._staged_rows[len(self._staged)]
            row[:-_COLUMNS] = job.puzzle.tokens
            row[-_COLUMNS:] = job.puzzle.identifier, True, job.max_steps
            self._staged.append(job)

    def _fill(self) -> None:
        """Give free slots to those that are staged. On a GPU the device waits for this."""
        count = min(len(self._free), len(self._staged))
        wanted = [number for number in range(count) if not self._staged[number].future.cancelled()]
        if wanted:
            slots = [self._free.pop() for _ in wanted]
            self._written[slots] = self._staged_rows[wanted]
            self._jobs.update(zip(slots, (self._staged[number] for number in wanted), strict=True))
            self._fresh += slots
        if count:
            left = len(self._staged) - count
            self._staged_rows[:left] = self._staged_rows[count : count + left].copy()
            del self._staged[:count]

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
        """One ACT step of the slots in use."""
        slots = sorted(self._jobs)
        if self._is_one_shape:
            found = self._step({"rows": self._rows})
        else:
            kept = torch.tensor(slots)
            found = self._computed({"rows": self._rows[kept]}, kept)
        if self._reads_later:  # while the device is at this step
            self._read()
            with self._changed:
                self._stage(max(1, self.slots // 2))
        host = found.cpu().numpy()
        self._written[self._fresh, -2] = False
        self._fresh.clear()
        self._work.act_steps += len(slots)
        has_halted = host[:, -1].tolist()
        for row, slot in zip(slots, slots, strict=True) if self._is_one_shape else enumerate(slots):
            if (job := self._jobs.get(slot)) is None:  # given up meanwhile
                continue
            if has_halted[row]:
                del self._jobs[slot]
                self._free.append(slot)
            if has_halted[row] or job.keeps_steps:
                self._unread.append((job, host[row]))
        if not self._reads_later:
            self._read()

    def _computed(self, batch: Batch, kept: Tensor | None = None) -> Tensor:
        """An ACT step of some slots (None: all), given by their rows [N, S + 3].

        Returns:
            [N, S + 3] int32: answers, the bits of q_halt, which is float32, steps taken, and whether it has halted.
        """
        rows = batch["rows"].to(self.model.device)
        before = self._carry if kept is None else self._carry.rows(kept)
        before.halted.copy_(rows[:, -2] != 0)
        after, outputs = self._inner.model(before, _batch(rows))
        for whole, new in zip(self._carry.tensors(), after.tensors(), strict=True):
            if kept is None:
                whole.copy_(new)
            else:
                whole[kept] = new
        q_halt, q_continue = outputs["q_halt_logits"].float(), outputs["q_continue_logits"].float()
        has_halted = (q_halt > q_continue) | (after.steps >= rows[:, -1])
        columns = [q_halt.view(torch.int32), after.steps.int(), has_halted.int()]
        return torch.cat([outputs["logits"].argmax(-1).int(), torch.stack(columns, 1)], 1)

    def _read(self) -> None:
        """Make answers of what a step has found, and hand them out."""
        unread, self._unread = self._unread, []
        for job, found in unread:
            step = Step(found[:-_COLUMNS].astype(np.int64), float(found[-3:-2].view(np.float32)[0]))
            if job.keeps_steps:
                job.trajectory.append(step)
            if found[-1]:  # it has halted
                self._work.answered += not job.future.cancelled()
                self._ready.append((job.future, Solved(step, int(found[-2]), job.trajectory)))
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


def _batch(rows: Tensor) -> Batch:
    """A model's batch, from rows [N, S + 3] of slots."""
    return {"inputs": rows[:, :-_COLUMNS].contiguous(), "puzzle_identifiers": rows[:, -_COLUMNS].contiguous()}


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
