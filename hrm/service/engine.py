"""One model, one thread, and slots that are refilled as sequences halt: puzzles of all callers share a batch.

Other work with the model is done in the same thread, between ACT steps.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError
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
from hrm.service.sessions import begun, updated
from hrm.tasks.form import Puzzle

Result = TypeVar("Result")


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
    future: Future[Solved] = field(default_factory=Future)
    steps: int = 0
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
        self._jobs: dict[int, _Job] = {}  # by slot
        self._fresh: set[int] = set()  # slots whose job begins with the next step
        self._inputs = np.zeros((self.slots, model.form.seq_len), dtype=np.int32)
        self._identifiers = np.zeros(self.slots, dtype=np.int32)
        self._carry = self._inner.initial_carry(self._batch(range(self.slots)))
        graphed = model.model.kernels.cuda_graphs
        self._step = GraphedWork(self._computed, model.device, eager_calls=2) if graphed else self._computed
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
        job = _Job(puzzle, max_steps or self.model.act_max_steps, keeps_steps, request)
        with self._changed:
            self._check_open()
            self._waiting.add(job)
            self._changed.notify()
        job.future.add_done_callback(partial(self._withdrawn, job))
        return job.future

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

    def _withdrawn(self, job: _Job, future: Future[Solved]) -> None:
        """Forget a puzzle that nobody waits for any more; one that has a slot gives it up before the next ACT step."""
        if future.cancelled():
            with self._changed:
                self._waiting.remove(job)

    @property
    def work(self) -> Work:
        """Counts as they are now."""
        with self._changed:
            return Work(self._work.answered, self._work.act_steps, len(self._jobs), len(self._waiting))

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine by itself, if something did."""
        return self._failure

    def warm_up(self) -> None:
        """Answer an empty puzzle, so that what is compiled and recorded is ready for the first request."""
        puzzle = Puzzle(np.zeros(self.model.form.seq_len, dtype=np.int64))
        self.submit(puzzle, max_steps=3).result()
        for level in self._inner.model.inner.levels:
            self.run(updated(self.model, begun(self.model, puzzle), level, 1)).result()

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
                futures: list[Future[Any]] = [job.future for job in (*self._jobs.values(), *self._waiting.take_all())]
                futures += [future for _, future in self._besides]
                self._jobs.clear()
                self._besides.clear()
            for future in futures:
                _give(future, error)

    def _admit(self) -> bool:
        """Give free slots to those in line, and wait while there is no work; False when closed and all is done."""
        with self._changed:
            for slot in [slot for slot, job in self._jobs.items() if job.future.cancelled()]:
                del self._jobs[slot]
            while True:
                free = (slot for slot in range(self.slots) if slot not in self._jobs)
                while self._waiting and len(self._jobs) < self.slots:
                    job = self._waiting.take()
                    if job.future.cancelled():  # but not taken out yet
                        continue
                    slot = next(free)
                    self._jobs[slot] = job
                    self._fresh.add(slot)
                    self._inputs[slot] = job.puzzle.tokens
                    self._identifiers[slot] = job.puzzle.identifier
                if self._jobs or self._besides:
                    return True
                if self._closed:
                    return False
                self._changed.wait()

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
        slots = list(range(self.slots)) if self._is_one_shape else sorted(self._jobs)
        batch = self._batch(slots)
        batch["fresh"] = torch.tensor([slot in self._fresh for slot in slots])
        found = self._step(batch) if self._is_one_shape else self._computed(batch, torch.tensor(slots))
        self._fresh.clear()
        tokens, q = (each.cpu().numpy() for each in found)
        with self._changed:
            for row, slot in enumerate(slots):
                if (job := self._jobs.get(slot)) is None:
                    continue
                job.steps += 1
                self._work.act_steps += 1
                step = Step(tokens[row].astype(np.int64), float(q[row, 0]))
                if job.keeps_steps:
                    job.trajectory.append(step)
                if q[row, 0] > q[row, 1] or job.steps >= job.max_steps:
                    del self._jobs[slot]
                    self._work.answered += _give(job.future, Solved(step, job.steps, job.trajectory))

    def _batch(self, slots: range | list[int]) -> Batch:
        rows = list(slots)
        batch = {
            "inputs": torch.from_numpy(self._inputs[rows]),
            "puzzle_identifiers": torch.from_numpy(self._identifiers[rows]),
        }
        return {name: values.to(self.model.device) for name, values in batch.items()}

    def _computed(self, batch: Batch, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """An ACT step of some slots (None: all): answers [N, S] int32, q_halt and q_continue [N, 2] float32."""
        kept = self._carry
        puzzles = {name: values for name, values in batch.items() if name != "fresh"}
        before = kept if rows is None else kept.rows(rows)
        before.halted.copy_(batch["fresh"])
        after, outputs = self._inner.model(before, puzzles)
        for whole, new in zip(kept.tensors(), after.tensors(), strict=True):
            if rows is None:
                whole.copy_(new)
            else:
                whole[rows] = new
        q = [outputs["q_halt_logits"].float(), outputs["q_continue_logits"].float()]
        return outputs["logits"].argmax(-1).int(), torch.stack(q, 1)


def _give(future: Future[Any], outcome: object) -> bool:
    """Hand out what came of some work, or the error that ended it; False where nobody waits for it any more."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        return False
    return True
