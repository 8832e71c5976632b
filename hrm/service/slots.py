"""Puzzles being computed on a device, each in a slot, and the next ones, which take slots there as others halt."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.batch import Batch
from hrm.cuda_graphs import GraphedWork
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import is_one_shape
from hrm.tasks.form import Puzzle

_COLUMNS = 3  # of rows, beside tokens
_NOBODY = -1  # in place of a ticket
_TICKETS = 1 << 31  # how many there are: they begin again, long after the puzzle of the same number has left


@dataclass(frozen=True)
class Found:
    """What an ACT step has found for the puzzles that were in slots.

    Shapes: N puzzles of S tokens.
    """

    tickets: NDArray[np.int32]  # [N]
    tokens: NDArray[np.int32]  # [N, S]
    q_halt: NDArray[np.float32]  # [N], logits
    steps: NDArray[np.int32]  # [N], ACT steps spent
    has_halted: NDArray[np.bool_]  # [N]


class Slots:
    """Puzzles in slots, refilled on the device from a line of those that are next.

    A step can so be launched before the answers of the one before are known to the host: it takes puzzles out of the
    line for all slots whose puzzles have halted by then. The host knows puzzles by tickets, numbers in the order in
    which they were put in line. Not for several threads at once.

    Attributes:
        count: of slots.
        reads_later: whether the device computes while the host goes on.
    """

    def __init__(self, model: TrainedModel, count: int) -> None:
        self.count = count
        self.reads_later = model.device.type == "cuda"
        self._model, self._device = model.model, model.device
        self._is_one_shape = is_one_shape(model.model, model.device)  # else only slots in use are computed
        seq_len = model.form.seq_len
        # Rows hold tokens [S], identifier, ACT steps at most, and ticket. The line is a ring: a step that is launched
        # and not read yet may take as many as there are slots, and as many again may be left for the next ones.
        self._line = self._on_host(2 * count, seq_len + _COLUMNS)
        self._given_up = self._on_host(count)  # the ticket of the puzzle that is to leave a slot
        self._written_line, self._written_given_up = self._line.numpy(), self._given_up.numpy()  # the same memory
        self._written_given_up[:] = _NOBODY
        self._found = deque(self._on_host(count, seq_len + _COLUMNS + 1) for _ in range(2))
        self._put = 0  # puzzles put in line so far
        self._unread: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._go_on: tuple[NDArray[np.int32], NDArray[np.intp]] = np.zeros(0, np.int32), np.zeros(0, np.intp)
        self._leaving: set[int] = set()  # tickets of what nobody waits for, until their slots are known

        self._rows = torch.zeros((count, seq_len + _COLUMNS), dtype=torch.int32, device=self._device)
        self._rows[:, -1] = _NOBODY
        self._taken = torch.zeros((), dtype=torch.int64, device=self._device)  # puzzles, out of the line so far
        self._most_taken = torch.zeros((), dtype=torch.int64, device=self._device)  # `_put` when the step was launched
        self._carry = self._model.initial_carry(_batch(self._rows))
        graphed = model.model.kernels.cuda_graphs
        self._step = GraphedWork(self._computed, model.device, eager_calls=2) if graphed else self._computed

    @property
    def launched(self) -> int:
        """Steps that are not read yet, at most two."""
        return len(self._unread)

    def put(self, puzzle: Puzzle, max_steps: int) -> int:
        """Put a puzzle in line: its ticket."""
        ticket = self._put % _TICKETS
        row = self._written_line[self._put % len(self._line)]
        row[:-_COLUMNS] = puzzle.tokens
        row[-_COLUMNS:] = puzzle.identifier, max_steps, ticket
        self._put += 1
        return ticket

    def give_up(self, ticket: int) -> None:
        """Have a puzzle leave its slot before the next step, or after that if it has none yet."""
        self._leaving.add(ticket)

    def left(self) -> list[int]:
        """The tickets of puzzles that were given up and are in no slot when the next step begins; each once."""
        if not self._leaving:
            return []
        slots = dict(zip(*(values.tolist() for values in self._go_on), strict=True))
        left = [ticket for ticket in self._leaving if ticket in slots]
        for ticket in left:
            self._written_given_up[slots[ticket]] = ticket
        self._leaving.difference_update(left)
        return left

    def launch(self) -> None:
        """Begin an ACT step of all that are in slots then."""
        self._most_taken.fill_(self._put)
        found = self._step({"line": self._line, "given_up": self._given_up})
        host = self._found[0]
        self._found.rotate(1)
        on_cuda = self._device.type == "cuda"
        host.copy_(found, non_blocking=on_cuda)  # elsewhere nothing says when it is there
        event = None
        if on_cuda:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._unread.append((host, event))

    def read(self) -> Found:
        """Wait for the first of the steps that were launched: what it has found."""
        host, event = self._unread.popleft()
        if event is not None:
            event.synchronize()
        rows = host.numpy()
        (slots,) = np.nonzero(rows[:, -1] != _NOBODY)
        rows = rows[slots]
        found = Found(rows[:, -1], rows[:, :-4], rows[:, -4].view(np.float32), rows[:, -3], rows[:, -2] != 0)
        goes_on = ~found.has_halted
        self._go_on = found.tickets[goes_on], slots[goes_on]
        self._leaving.difference_update(found.tickets[found.has_halted].tolist())
        return found

    def _computed(self, batch: Batch) -> Tensor:
        """An ACT step, with slots refilled before it.

        Args:
            batch: `line` [2N, S + 3] and `given_up` [N].

        Returns:
            [N, S + 4] int32: answers, the bits of q_halt, which is float32, steps taken, whether it has halted, ticket.
        """
        line, given_up = (batch[name].to(self._device, non_blocking=True) for name in ("line", "given_up"))
        free = self._carry.halted | (self._rows[:, -1] == given_up)
        wanted = self._taken + free.cumsum(0) - 1
        takes = free & (wanted < self._most_taken)
        self._taken += takes.sum()
        self._rows.copy_(torch.where(takes[:, None], line[wanted % len(line)], self._rows))
        self._rows[:, -1].masked_fill_(free & ~takes, _NOBODY)
        self._carry.halted.copy_(free)
        tickets = self._rows[:, -1:]
        if self._is_one_shape:
            return torch.cat([self._advanced(), tickets], 1)
        (used,) = (tickets[:, 0] != _NOBODY).nonzero(as_tuple=True)
        found = torch.zeros((self.count, line.shape[1] + 1), dtype=torch.int32)
        found[:, -1:] = tickets
        found[used, :-1] = self._advanced(used)
        return found

    def _advanced(self, used: Tensor | None = None) -> Tensor:
        """What an ACT step of some slots (None: all) finds: `_computed` without the tickets."""
        rows = self._rows if used is None else self._rows[used]
        before = self._carry if used is None else self._carry.rows(used)
        after, outputs = self._model.model(before, _batch(rows))
        q_halt, q_continue = outputs["q_halt_logits"].float(), outputs["q_continue_logits"].float()
        halted = (q_halt > q_continue) | (after.steps >= rows[:, -2]) | (rows[:, -1] == _NOBODY)
        for whole, new in zip(self._carry.tensors(), replace(after, halted=halted).tensors(), strict=True):
            if used is None:
                whole.copy_(new)
            else:
                whole[used] = new
        columns = torch.stack([q_halt.view(torch.int32), after.steps.int(), halted.int()], 1)
        return torch.cat([outputs["logits"].argmax(-1).int(), columns], 1)

    def _on_host(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")


def _batch(rows: Tensor) -> Batch:
    """A model's batch, from rows [N, S + 3] of slots."""
    return {"inputs": rows[:, :-_COLUMNS].contiguous(), "puzzle_identifiers": rows[:, -_COLUMNS].contiguous()}
