"""Exported files against the model that they are of: logits, exact accuracy, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.batch import Batch
from hrm.evaluation.latent import act_steps, initial_states
from hrm.export.format import Run
from hrm.export.graphs import EMBED, HEADS, INPUTS, NEW, SOLVE, STEP, schedule
from hrm.export.puzzles import Puzzles
from hrm.inference.model import TrainedModel

MODULES = "modules"  # a solve by a model's modules apart

_ALONE = 5  # puzzles that are timed one at a time

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Solved:
    """How one way to solve did on all puzzles."""

    accuracy: float  # share of the puzzles that are right at every token
    ms_in_batch: float  # milliseconds a puzzle, in batches of `batch_size`
    ms_alone: float  # milliseconds for a puzzle that comes alone


@dataclass(frozen=True)
class SolvedByFiles(Solved):
    """The same by files, beside PyTorch."""

    same_answers: float  # share of the puzzles to which both answer the same
    logits_difference: float  # the largest between logits after all ACT steps


@dataclass(frozen=True)
class Difference:
    """The largest differences between PyTorch and files after one ACT step and after two."""

    logits: float
    states: float


@dataclass(frozen=True)
class Comparison:
    """What was found, as `export.json` has it."""

    puzzles: int
    source: str
    batch_size: int
    pytorch: Solved
    solved: dict[str, SolvedByFiles]  # by way: solve, the steps one by one, modules
    first_steps: dict[str, Difference]  # by way: step, modules

    @property
    def worst(self) -> SolvedByFiles:
        """The way whose accuracy is furthest from PyTorch's."""
        return max(self.solved.values(), key=self._distance)

    def passes(self, gate: float) -> bool:
        """Whether the accuracy of no way is further from PyTorch's than `gate`, a share of the puzzles."""
        return self._distance(self.worst) <= gate

    def _distance(self, way: SolvedByFiles) -> float:
        return abs(way.accuracy - self.pytorch.accuracy)


Solver = Callable[[Arrays], NDArray[np.float32]]  # from a batch's arrays to logits [B, S, V]
Stepper = Callable[[Arrays, Arrays, bool], tuple[NDArray[np.float32], Arrays]]
# An ACT step, from a batch's arrays, states, and whether it begins, to logits and new states.


def compare(
    model: TrainedModel, runs: Mapping[str, Run], num_steps: int, puzzles: Puzzles, batch_size: int
) -> Comparison:
    """Answer the puzzles by `model` and by its files.

    Args:
        runs: the files' graphs by name.
        num_steps: ACT steps of a solve.
    """
    steppers = _steppers(model, runs)
    solvers: dict[str, Solver] = {
        name: _in_turn(stepper, model, num_steps) for name, stepper in steppers.items() if name != STEP
    }
    if SOLVE in runs:
        solvers = {SOLVE: lambda arrays: runs[SOLVE](arrays)["logits"]} | solvers
    elif STEP in runs:
        solvers = {STEP: _in_turn(steppers[STEP], model, num_steps)} | solvers

    def by_torch(arrays: Arrays) -> NDArray[np.float32]:
        with model.model.weights_at_hand():
            *_, (_, outputs) = islice(act_steps(model.model, _batch(model, arrays)), num_steps)
        logits: NDArray[np.float32] = outputs["logits"].float().cpu().numpy()
        return logits

    first = _arrays(puzzles, slice(0, min(batch_size, len(puzzles))))
    first_steps = {name: _first_steps(model, stepper, first) for name, stepper in steppers.items()}
    timed = {name: _Timed(solver, puzzles) for name, solver in {"": by_torch, **solvers}.items()}
    for begin in range(0, len(puzzles), batch_size):
        expected, *found = (solver.solve(slice(begin, begin + batch_size)) for solver in timed.values())
        for solver, logits in zip(list(timed.values())[1:], found, strict=True):
            solver.largest = max(solver.largest, _apart(expected, logits))
    pytorch = timed.pop("")
    return Comparison(
        puzzles=len(puzzles),
        source=puzzles.source,
        batch_size=batch_size,
        pytorch=Solved(**pytorch.figures()),
        solved={
            name: SolvedByFiles(
                **solver.figures(),
                same_answers=float((solver.all_answers() == pytorch.all_answers()).all(1).mean()),
                logits_difference=solver.largest,
            )
            for name, solver in timed.items()
        },
        first_steps=first_steps,
    )


class _Timed:
    """A solver, what it answered and how long that took."""

    def __init__(self, solver: Solver, puzzles: Puzzles) -> None:
        self._solver, self._puzzles = solver, puzzles
        self._answers: list[NDArray[np.int64]] = []
        self._seconds, self.largest = 0.0, 0.0
        solver(_arrays(puzzles, slice(0, 1)))  # what is prepared at the first call is not timed
        self._alone = [self._timed(slice(i, i + 1))[1] for i in range(min(_ALONE, len(puzzles)))]

    def _timed(self, rows: slice) -> tuple[NDArray[np.float32], float]:
        arrays, start = _arrays(self._puzzles, rows), time.perf_counter()
        logits = self._solver(arrays)
        return logits, time.perf_counter() - start

    def solve(self, rows: slice) -> NDArray[np.float32]:
        """Logits [B, S, V] of the next puzzles."""
        logits, seconds = self._timed(rows)
        self._seconds += seconds
        self._answers.append(logits.argmax(-1))
        return logits

    def all_answers(self) -> NDArray[np.int64]:
        return np.concatenate(self._answers)

    def figures(self) -> dict[str, float]:
        """The fields of `Solved`."""
        return {
            "accuracy": float(self._puzzles.right(self.all_answers()).mean()),
            "ms_in_batch": round(1000 * self._seconds / len(self._puzzles), 3),
            "ms_alone": round(1000 * float(np.median(self._alone)), 3),
        }


def _steppers(model: TrainedModel, runs: Mapping[str, Run]) -> dict[str, Stepper]:
    """The ways to take an ACT step by files."""
    inner = model.model.model.inner
    names = list(inner.initial_states)

    def by_step(arrays: Arrays, states: Arrays, begins: bool) -> tuple[NDArray[np.float32], Arrays]:
        found = runs[STEP]({**arrays, "halted": np.full(len(arrays["inputs"]), begins), **states})
        return found["logits"], {name: found[f"{NEW}{name}"] for name in names}

    def by_modules(arrays: Arrays, states: Arrays, begins: bool) -> tuple[NDArray[np.float32], Arrays]:
        known = runs[EMBED](arrays) | ({} if begins else states)
        for graph, inputs in schedule(model):
            known[inputs[0]] = runs[graph]({name: known[name] for name in inputs})[f"{NEW}{inputs[0]}"]
        logits = runs[HEADS]({inner.output_state: known[inner.output_state]})["logits"]
        return logits, {name: known[name] for name in names}

    steppers: dict[str, Stepper] = {}
    if STEP in runs:
        steppers[STEP] = by_step
    if EMBED in runs:
        steppers[MODULES] = by_modules
    return steppers


def _in_turn(stepper: Stepper, model: TrainedModel, num_steps: int) -> Solver:
    def solve(arrays: Arrays) -> NDArray[np.float32]:
        logits, states = stepper(arrays, _any_states(model, arrays), True)
        for _ in range(num_steps - 1):
            logits, states = stepper(arrays, states, False)
        return logits

    return solve


def _first_steps(model: TrainedModel, stepper: Stepper, arrays: Arrays) -> Difference:
    """A step of sequences that begin, and the next one."""
    states, begins, logits_apart, states_apart = _any_states(model, arrays), True, 0.0, 0.0
    for after, outputs in islice(act_steps(model.model, _batch(model, arrays)), 2):
        expected = {name: _numpy(state) for name, state in after.items()}
        logits, new = stepper(arrays, states, begins)
        logits_apart = max(logits_apart, _apart(_numpy(outputs["logits"]), logits))
        states_apart = max(states_apart, *(_apart(expected[name], new[name]) for name in expected))
        states, begins = expected, False
    return Difference(logits_apart, states_apart)


def _any_states(model: TrainedModel, arrays: Arrays) -> Arrays:
    """States of sequences that begin, which replace them: what they hold does not matter."""
    states = initial_states(model.model, _batch(model, arrays))
    return {name: np.full(state.shape, 7.0, dtype=np.float32) for name, state in states.items()}


def _arrays(puzzles: Puzzles, rows: slice) -> Arrays:
    return dict(zip(INPUTS, (puzzles.inputs[rows], puzzles.identifiers[rows]), strict=True))


def _batch(model: TrainedModel, arrays: Arrays) -> Batch:
    return {name: torch.from_numpy(values.astype(np.int32)).to(model.device) for name, values in arrays.items()}


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest difference; the largest number that there is where one is no number."""
    most = float(np.finfo(np.float32).max)
    return float(np.nan_to_num(np.abs(one - other), nan=most, posinf=most).max())
