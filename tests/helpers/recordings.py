"""Recordings of puzzles as a model might solve them, for reports."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.data.builders.maze_puzzles import random_mazes, shortest_paths
from hrm.data.builders.sudoku_puzzles import dig_holes, random_grids
from hrm.evaluation.report.recorder import Recorder, Recording
from hrm.evaluation.runner import StepOutputs
from hrm.tasks import all_tasks
from hrm.tasks.arc import Pair, encode
from hrm.tasks.base import PuzzleSize, View
from hrm.tasks.maze import FREE
from hrm.tasks.sudoku import BoxShape, encode_tokens

Tokens = NDArray[np.uint8]
Booleans = NDArray[np.bool_]


def sudoku_view(box: BoxShape) -> View:
    return all_tasks()["sudoku"].view(PuzzleSize(box.cells, box.vocab_size))


def maze_view(side: int) -> View:
    return all_tasks()["maze"].view(PuzzleSize(side**2, 6))


def tokens_view(names: int | list[str], columns: int | None = None) -> View:
    return View(tuple(map(str, range(names)) if isinstance(names, int) else names), columns)


ARC_VIEW = all_tasks()["arc"].view(PuzzleSize(900, 12))


def denoise(labels: NDArray[np.int32], to_fill: Booleans, num_steps: int) -> StepOutputs:
    """What a model might say of puzzles [N, S]: tokens `to_fill` are guessed at, and each is corrected at a step of its
    own, in most puzzles before the last; q_halt rises as they are."""
    rng = np.random.default_rng(0)
    ease = rng.uniform(0.3, 1.15, (len(labels), 1))  # of the steps that it takes to correct all tokens
    corrected = np.where(rng.random(labels.shape) < 0.5, 0, rng.random(labels.shape) * ease * num_steps)
    truth = np.where(labels == IGNORE_LABEL_ID, 0, labels)
    step = np.arange(1, num_steps + 1)[:, None, None]
    guesses = rng.choice(labels[to_fill], (num_steps, *labels.shape))
    answers = np.where(to_fill & (step < corrected), guesses, truth).astype(np.uint8)
    wrong = (answers != truth).sum(-1)
    q_halt = (3 - 4 * np.log2(1 + wrong) + 0.5 * rng.standard_normal(wrong.shape)).astype(np.float32)
    return StepOutputs(*map(torch.from_numpy, (answers, q_halt, -0.5 * q_halt)))


def recording(inputs: Tokens, labels: NDArray[Any], to_fill: Booleans, num_steps: int, per_kind: int) -> Recording:
    recorder = Recorder(per_kind)
    recorder.add(as_batch(inputs, labels), denoise(labels, to_fill, num_steps), np.arange(len(inputs)))
    return recorder.recording()


def as_batch(inputs: NDArray[Any], labels: NDArray[Any]) -> Batch:
    identifiers = np.arange(len(inputs))
    fields = {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers}
    return {name: torch.from_numpy(field.astype(np.int32)) for name, field in fields.items()}


def sudoku(box: BoxShape, count: int = 40, num_steps: int = 8, per_kind: int = 4) -> Recording:
    rng = np.random.default_rng(0)
    grids = random_grids(count, box, rng)
    puzzles = dig_holes(grids, 30 if box.side == 9 else box.cells // 3, box, rng)
    return recording(encode_tokens(puzzles), encode_tokens(grids), puzzles == 0, num_steps, per_kind)


def maze(side: int, count: int = 12, num_steps: int = 8, per_kind: int = 4, min_length: int = 10) -> Recording:
    mazes, _ = random_mazes(count, side, min_length, np.random.default_rng(0))
    inputs, labels = (tokens.reshape(count, -1) for tokens in (mazes, shortest_paths(mazes)))
    return recording(inputs, labels, inputs == FREE, num_steps, per_kind)


def arc(pairs: list[Pair], num_steps: int = 8, per_kind: int = 4) -> Recording:
    inputs, labels = (np.concatenate([corner(grid) for grid in grids]) for grids in zip(*pairs, strict=True))
    labels = np.where(labels == 0, IGNORE_LABEL_ID, labels.astype(np.int32))
    return recording(inputs, labels, labels > 1, num_steps, per_kind)


def corner(grid: Tokens) -> Tokens:
    """A grid's tokens [1, 900] with the grid at the top left."""
    return encode(grid[None], np.zeros((1, 2), dtype=np.int64))


TOOLS = ["pad", "search", "read_file", "summarise", "translate"]


def tool_names(count: int = 12, num_steps: int = 4, per_kind: int = 4) -> Recording:
    rng = np.random.default_rng(0)
    labels = rng.integers(1, len(TOOLS), (count, 9))
    inputs = rng.permuted(labels, axis=1).astype(np.uint8)
    labels[:, 7:] = IGNORE_LABEL_ID
    return recording(inputs, labels, labels > 0, num_steps, per_kind)


ARC_PAIRS = [
    Pair(np.arange(12, dtype=np.uint8).reshape(3, 4) % 10, np.arange(6, dtype=np.uint8).reshape(2, 3)),
    Pair(np.ones((10, 7), dtype=np.uint8), np.eye(9, dtype=np.uint8)),
    Pair(np.zeros((30, 30), dtype=np.uint8), np.full((1, 1), 9, dtype=np.uint8)),
]


ARC_NAMES = ["gravity", "diagonal", "<b>"]
