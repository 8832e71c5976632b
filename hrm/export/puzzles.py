"""Puzzles with answers, to compare an exported model and its original on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.data.pack import Pack, open_pack
from hrm.data.registry import is_pack
from hrm.errors import UserError
from hrm.inference.model import TrainedModel


class Puzzles(NamedTuple):
    """N puzzles of S tokens."""

    inputs: NDArray[np.int64]  # [N, S]
    labels: NDArray[np.int64]  # [N, S]; IGNORE_LABEL_ID where any answer will do
    identifiers: NDArray[np.int64]  # [N], rows of the puzzle table
    source: str  # where they are from, for people

    def __len__(self) -> int:
        return len(self.inputs)

    def right(self, answers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which answers [N, S] are right at every token."""
        agrees: NDArray[np.bool_] = ((answers == self.labels) | (self.labels == IGNORE_LABEL_ID)).all(1)
        return agrees


def find_puzzles(model: TrainedModel, count: int, data_path: str | None, seed: int) -> Puzzles:
    """At most `count` puzzles of a pack's test split, else as many generated ones.

    Args:
        data_path: a pack; None: the one that the model was trained on, if it is where the checkpoint says.
        seed: of generated puzzles.

    Raises:
        UserError: there are none, or the pack is of another kind than the model.
    """
    trained_on = model.checkpoint.config.get("data_path")
    if data_path is None and isinstance(trained_on, str) and is_pack(Path(trained_on)):
        data_path = trained_on
    if data_path is not None:
        return _of_pack(open_pack(data_path, "test"), model, count)
    generators = {"sudoku": _generated_sudoku, "maze": _generated_mazes}
    if model.task.name in generators:
        return generators[model.task.name](model.form.seq_len, count, seed)
    raise UserError(
        "there are no puzzles to compare the exported model on: give a pack of the task "
        f"{model.task.name}, by data_path=..."
    )


def _of_pack(pack: Pack, model: TrainedModel, count: int) -> Puzzles:
    data, form = pack.metadata, model.form
    for name in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        if getattr(data, name) != getattr(form, name):
            raise UserError(
                f"{pack.path} has {name}={getattr(data, name)}, but the model was trained with "
                f"{getattr(form, name)}: give a pack of its kind, by data_path=..."
            )
    inputs, labels, identifiers, left = [], [], [], count
    for examples in pack.sets.values():
        some = slice(0, left)
        inputs.append(np.asarray(examples.inputs[some], dtype=np.int64))
        labels.append(np.asarray(examples.labels[some], dtype=np.int64))
        owners = np.searchsorted(examples.puzzle_indices, np.arange(len(inputs[-1])), side="right") - 1
        identifiers.append(np.asarray(examples.puzzle_identifiers[owners], dtype=np.int64))
        left -= len(inputs[-1])
    joined = np.concatenate(labels)
    if data.ignore_label_id is not None:
        joined = np.where(joined == data.ignore_label_id, IGNORE_LABEL_ID, joined)
    return Puzzles(np.concatenate(inputs), joined, np.concatenate(identifiers), f"the test split of {pack.path}")


def _generated_sudoku(cells: int, count: int, seed: int) -> Puzzles:
    """Puzzles with a single solution, of which no given can be left out: those are the hard ones."""
    from hrm.data.builders.sudoku_puzzles import dig_holes, random_grids
    from hrm.tasks.sudoku import BoxShape, encode_tokens

    box, random = BoxShape.from_cells(cells), np.random.default_rng(seed)
    grids = random_grids(count, box, random)[:count]
    boards = dig_holes(grids, 0, box, random)
    return Puzzles(
        encode_tokens(boards).astype(np.int64),
        encode_tokens(grids).astype(np.int64),
        np.zeros(count, dtype=np.int64),
        f"generated Sudoku puzzles without a spare given (seed {seed})",
    )


def _generated_mazes(cells: int, count: int, seed: int) -> Puzzles:
    """Mazes as `hrm data maze --generate` makes them by another seed, with the paths that it takes for labels."""
    from hrm.data.builders.maze import least_moves
    from hrm.data.builders.maze_puzzles import random_mazes, shortest_paths

    side = math.isqrt(cells)
    mazes, _ = random_mazes(count, side, least_moves(side), np.random.default_rng(seed))
    inputs, labels = (grids.reshape(count, cells).astype(np.int64) for grids in (mazes, shortest_paths(mazes)))
    return Puzzles(inputs, labels, np.zeros(count, dtype=np.int64), f"generated {side}x{side} mazes (seed {seed})")
