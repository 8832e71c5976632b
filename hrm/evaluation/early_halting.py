"""Evaluation that spends on a puzzle only the ACT steps it asks for: one that halts makes room for the next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice

import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.cuda_graphs import GraphedWork
from hrm.evaluation.metrics import Throughput, accuracy_sums, compare
from hrm.evaluation.runner import Part, Predictions
from hrm.models import ACTLossHead, Carry

# Batches on the device at once. At the end of such a pool slots run empty, for at most the steps of one puzzle: a small
# part of the work when each slot has seen this many.
_PARTS_PER_POOL = 64


class _Slots:
    """B puzzles being worked on, refilled from a pool; all of it stays on the device."""

    def __init__(
        self, model: ACTLossHead, pool_size: int, slots: int, margin: float, device: torch.device, max_steps: int
    ) -> None:
        """`model` is in evaluation mode; the pool's last row stands for "none left"."""
        self._model = model
        self._margin = margin
        self._max_steps = max_steps
        self._pool: Batch = {}
        self.predictions: Predictions
        self._pool_size, self._slots, self._device = pool_size, slots, device
        self._carry: Carry | None = None
        self._all_slots: tuple[Carry, Tensor] | None = None  # the carry and the rows before any slot was given up
        self._rows = torch.full((slots,), pool_size, dtype=torch.int64, device=device)  # which puzzle is in a slot
        self._next = torch.zeros((), dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # puzzles in the pool
        self.finished = torch.zeros((), dtype=torch.int64, device=device)

    def fill(self, puzzles: Batch) -> None:
        """Start over with these puzzles, on the host, at most `pool_size` of them."""
        count = len(puzzles["inputs"])
        for name, field in puzzles.items():
            if name not in self._pool:
                self._pool[name] = field.new_zeros((self._pool_size + 1, *field.shape[1:])).to(self._device)
            self._pool[name][:count] = field.to(self._device)
        if self._carry is None:
            seq_len = puzzles["inputs"].shape[1]
            rows = self._pool_size + 1
            self.predictions = Predictions(
                torch.zeros(rows, seq_len, dtype=torch.int32, device=self._device),
                torch.zeros(rows, device=self._device),
                torch.zeros(rows, dtype=torch.int32, device=self._device),
            )
            self._carry = self._model.initial_carry({name: field[: self._slots] for name, field in self._pool.items()})
            self._all_slots = self._carry, self._rows
        assert self._all_slots is not None
        self._carry, self._rows = self._all_slots
        self._carry.halted.fill_(True)
        self._next.zero_()
        self._count.fill_(count)
        self.finished.zero_()

    def step(self, _: Batch) -> None:
        """One ACT step of every slot. Nothing here waits for the device."""
        assert self._carry is not None
        kept, none_left = self._carry, self._pool_size
        wanted = self._next + kept.halted.cumsum(0) - 1
        self._next += kept.halted.sum()
        self._rows.copy_(torch.where(kept.halted, torch.where(wanted < self._count, wanted, none_left), self._rows))
        batch = {name: field[self._rows] for name, field in self._pool.items()}
        carry, outputs = self._model.model(kept, batch)
        q_halt = outputs["q_halt_logits"]
        halted = (q_halt > outputs["q_continue_logits"] + self._margin) | (carry.steps >= self._max_steps)
        # Slots that go on, or are empty, write to the row that nobody reads.
        rows = torch.where(halted, self._rows, none_left)
        new = Predictions(outputs["logits"].argmax(-1).int(), q_halt.float(), carry.steps)
        for kept_field, field in zip(self.predictions, new, strict=True):
            kept_field.index_copy_(0, rows, field)
        self.finished += (rows < none_left).sum()
        for before, after in zip(kept.tensors(), replace(carry, halted=halted).tensors(), strict=True):
            before.copy_(after)

    def give_up_empty_slots(self) -> None:
        """Compute no slot until the next pool that can get no puzzle any more. Waits for the device."""
        assert self._carry is not None
        if self._next < self._count:
            return
        busy = ~self._carry.halted & (self._rows < self._pool_size)
        if not busy.all():
            (kept,) = busy.nonzero(as_tuple=True)
            self._carry, self._rows = self._carry.rows(kept), self._rows[kept]


class EarlyHalting:
    """Answers puzzles, each at the step where q_halt > q_continue + `margin`, or at the last.

    Args:
        model: in evaluation mode.
        slots: puzzles worked on at a time.
        margin: infinite: each takes all steps.
        max_steps: the last step; default: the model's `halt_max_steps`.
        pool_size: most puzzles in a pool.
    """

    def __init__(
        self,
        model: ACTLossHead,
        slots: int,
        device: torch.device,
        margin: float = 0.0,
        max_steps: int | None = None,
        pool_size: int | None = None,
    ) -> None:
        self._model = model
        max_steps = model.halt_max_steps if max_steps is None else max_steps
        self._state = _Slots(model, pool_size or slots * _PARTS_PER_POOL, slots, margin, device, max_steps)
        graphed = model.kernels.cuda_graphs
        self._step = GraphedWork(self._state.step, device, eager_calls=2) if graphed else self._state.step
        # Where shapes are free: a graph has one, and so has compiled code.
        self._shrinks = device.type == "cpu" and not graphed and not model.kernels.compile
        self._slots = slots
        self._least_steps = max_steps if margin == math.inf else 1  # of a puzzle

    @torch.no_grad()
    def answer(self, parts: Iterable[Part], throughput: Throughput) -> Iterator[tuple[str, Batch, Predictions]]:
        """Answer this rank's `parts`, of at most `slots` puzzles each.

        Yields:
            `(set name, puzzles, predictions)`, pool by pool and in order, on the CPU.
        """
        with self._model.weights_at_hand():
            yield from self._answer(parts, throughput)

    def _answer(self, parts: Iterable[Part], throughput: Throughput) -> Iterator[tuple[str, Batch, Predictions]]:
        warm = False
        for set_name, of_set in groupby(parts, lambda part: part.set_name):
            pools = _pools(of_set)
            puzzles = next(pools)
            if not warm:
                self._state.fill(puzzles)
                for _ in range(3):  # two eager steps compile and tune, the third is recorded
                    self._step({})
                throughput.start()
                warm = True
            self._begin(puzzles)
            following: Batch | None = puzzles
            while following is not None:
                puzzles, following = following, next(pools, None)  # read while the device works
                predictions = self._finish(puzzles)
                throughput.count(len(predictions.steps))
                if following is not None:
                    self._begin(following)  # and so is what the caller does with the answers
                yield set_name, puzzles, predictions

    @torch.no_grad()
    def answer_pool(self, puzzles: Batch) -> Predictions:
        """Answer puzzles on the host, as many as a pool may have at most: in order, on the CPU."""
        with self._model.weights_at_hand():
            self._begin(puzzles)
            return self._finish(puzzles)

    def _begin(self, puzzles: Batch) -> None:
        """Take the steps that a pool of puzzles takes at least, without waiting for them."""
        self._state.fill(puzzles)
        for _ in range(self._least_steps):
            self._take_steps(len(puzzles["inputs"]))

    def _finish(self, puzzles: Batch) -> Predictions:
        """Take the other steps of the pool that was begun."""
        count = len(puzzles["inputs"])
        # A look waits for the device.
        while unfinished := count - int(self._state.finished):
            self._take_steps(unfinished)
        return Predictions(*(field[:count].to("cpu", copy=True) for field in self._state.predictions))

    def _take_steps(self, unfinished: int) -> None:
        """As many as so many puzzles take at least: a step finishes at most one in every slot."""
        for _ in range(-(-unfinished // self._slots)):
            self._step({})
            if self._shrinks:
                self._state.give_up_empty_slots()


def _pools(parts: Iterator[Part]) -> Iterator[Batch]:
    """The puzzles of parts, a pool at a time, on the host and without padding."""
    while pool := list(islice(parts, _PARTS_PER_POOL)):
        yield {name: torch.cat([part.batch[name][: part.real] for part in pool]) for name in pool[0].batch}


def halting_metrics(puzzles: Batch, predictions: Predictions) -> dict[str, Tensor]:
    """Sums over a pool under the names of `ACTLossHead.forward`'s metrics, without the losses."""
    comparison = compare(puzzles["labels"], predictions.tokens)
    believes = predictions.q_halt >= 0
    return accuracy_sums(comparison) | {
        "q_halt_accuracy": (comparison.counted & (believes == comparison.exact)).sum(),
        "steps": predictions.steps[comparison.counted].sum(),
    }
