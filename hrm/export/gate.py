"""Exported files against the model that they are of: logits, exact accuracy, time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.batch import Batch
from hrm.evaluation.latent import act_steps, initial_states
from hrm.export.graphs import INPUTS, NEW, OUTPUTS, SOLVE_FILE, STEP_FILE
from hrm.export.puzzles import Puzzles
from hrm.inference.model import TrainedModel

_ALONE = 5  # puzzles that are timed one at a time


@dataclass(frozen=True)
class Comparison:
    """What was found, as `export.json` has it; pairs are of PyTorch and of onnxruntime, both on the CPU."""

    puzzles: int
    source: str
    step_difference: float  # the largest between logits after one ACT step
    state_difference: float  # the same between states
    solve_difference: float  # the largest between logits after all ACT steps
    same_answers: float  # share of the puzzles to which both answer the same
    accuracy: tuple[float, float]  # shares of the puzzles that are right at every token
    ms_in_batch: tuple[float, float]  # milliseconds a puzzle, in batches of `batch_size`
    ms_alone: tuple[float, float]  # milliseconds for a puzzle that comes alone
    batch_size: int

    @property
    def accuracy_difference(self) -> float:
        return abs(self.accuracy[0] - self.accuracy[1])


class _Solved(NamedTuple):
    logits: NDArray[np.float32]  # [B, S, V]
    seconds: float


def compare(model: TrainedModel, folder: Path, num_steps: int, puzzles: Puzzles, batch_size: int) -> Comparison:
    """Answer the puzzles by `model` and by the files in `folder`.

    Args:
        model: on the CPU, in float32.
        num_steps: ACT steps of `solve.onnx`.
    """
    step = onnxruntime.InferenceSession(folder / STEP_FILE, providers=["CPUExecutionProvider"])
    solve = onnxruntime.InferenceSession(folder / SOLVE_FILE, providers=["CPUExecutionProvider"])

    def by_torch(rows: slice) -> _Solved:
        start = time.perf_counter()
        batch = _batch(puzzles, rows)
        with model.model.weights_at_hand():
            *_, (_, outputs) = islice(act_steps(model.model, batch), num_steps)
        return _Solved(outputs["logits"].numpy(), time.perf_counter() - start)

    def by_onnx(rows: slice) -> _Solved:
        start = time.perf_counter()
        logits, *_ = solve.run(list(OUTPUTS), dict(zip(INPUTS, _arrays(puzzles, rows), strict=True)))
        return _Solved(logits, time.perf_counter() - start)

    first = slice(0, min(batch_size, len(puzzles)))
    step_difference, state_difference = _step_differences(model, step, puzzles, first)
    for solver in (by_torch, by_onnx):  # what is prepared at the first call is not timed
        solver(slice(0, 1))
    alone = [
        [solver(slice(i, i + 1)).seconds for i in range(min(_ALONE, len(puzzles)))] for solver in (by_torch, by_onnx)
    ]
    seconds, largest = np.zeros(2), 0.0
    answers: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for begin in range(0, len(puzzles), batch_size):
        rows = slice(begin, begin + batch_size)
        pair = by_torch(rows), by_onnx(rows)
        largest = max(largest, float(np.abs(pair[0].logits - pair[1].logits).max()))
        for side, solved in enumerate(pair):
            seconds[side] += solved.seconds
            answers[side].append(solved.logits.argmax(-1))
    torchs, onnxs = np.concatenate(answers[0]), np.concatenate(answers[1])
    return Comparison(
        puzzles=len(puzzles),
        source=puzzles.source,
        step_difference=step_difference,
        state_difference=state_difference,
        solve_difference=largest,
        same_answers=float((torchs == onnxs).all(1).mean()),
        accuracy=(float(puzzles.right(torchs).mean()), float(puzzles.right(onnxs).mean())),
        ms_in_batch=_pair(1000 * seconds / len(puzzles)),
        ms_alone=_pair(1000 * np.median(alone, axis=1)),
        batch_size=batch_size,
    )


def _step_differences(model: TrainedModel, step: Any, puzzles: Puzzles, rows: slice) -> tuple[float, float]:
    """The largest differences between logits and between states: a step of sequences that begin, and the next one."""
    arrays = dict(zip(INPUTS, _arrays(puzzles, rows), strict=True))
    batch = _batch(puzzles, rows)
    # Those that begin have their states replaced: what they hold does not matter.
    states = {name: torch.full_like(state, 7.0) for name, state in initial_states(model.model, batch).items()}
    halted, logits_apart, states_apart = np.ones(len(arrays["inputs"]), dtype=np.bool_), 0.0, 0.0
    for after, outputs in islice(act_steps(model.model, batch), 2):
        given = {name: state.numpy() for name, state in states.items()}
        names = ["logits", *(f"{NEW}{name}" for name in states)]
        logits, *new = step.run(names, {**arrays, "halted": halted, **given})
        logits_apart = max(logits_apart, _apart(outputs["logits"], logits))
        states_apart = max(states_apart, *(_apart(after[name], found) for name, found in zip(states, new, strict=True)))
        states, halted = after, np.zeros_like(halted)
    return logits_apart, states_apart


def _arrays(puzzles: Puzzles, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return puzzles.inputs[rows], puzzles.identifiers[rows]


def _batch(puzzles: Puzzles, rows: slice) -> Batch:
    tensors = (torch.from_numpy(values.astype(np.int32)) for values in _arrays(puzzles, rows))
    return dict(zip(INPUTS, tensors, strict=True))


def _apart(one: Tensor, other: NDArray[np.float32]) -> float:
    return float(np.abs(one.numpy() - other).max())


def _pair(values: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(values[0]), 3), round(float(values[1]), 3)
