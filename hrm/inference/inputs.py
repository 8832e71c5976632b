"""One puzzle or many: how what a user gives falls into puzzles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hrm.errors import UserError
from hrm.tasks.base import Task
from hrm.tasks.form import Puzzle, PuzzleForm


def items_of(x: Any, task: Task, form: PuzzleForm, *, tokens: bool = False) -> Iterable[Any]:
    """The puzzles in `x`, each as `Task.puzzles_of` takes it.

    One puzzle is a text, a mapping, a list of cells, or a grid of the model's size (or, for ARC and grids of one's own,
    of any size). All else is many: a list or an array of these, or anything that can be iterated over.

    Args:
        tokens: arrays hold the model's own tokens.

    Raises:
        UserError: it is nothing of the kind.
    """
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    if isinstance(x, np.ndarray) and x.dtype.kind in "US":
        x = x.tolist()
    if tokens:
        rows = np.asarray(x)
        return ({"tokens": row} for row in (rows[None] if rows.size == form.seq_len else rows))
    if isinstance(x, str | Mapping):
        return [x]
    if isinstance(x, np.ndarray | list | tuple):
        return [x] if _is_one(x, task, form) else x
    if isinstance(x, Iterable):
        return x
    raise UserError(
        f"what is given is no puzzle (its type is {type(x).__name__}): give a text, a list, an array, or several of "
        "these."
    )


def _is_one(x: Any, task: Task, form: PuzzleForm) -> bool:
    """Whether a list or an array is a single puzzle."""
    if len(x) == 0:
        return False
    shape, first = task.grid(form), x[0]
    if isinstance(x, np.ndarray):
        depth, width = x.ndim, x.shape[-1]
    elif isinstance(first, str):
        rows_of_grid = shape is not None and shape[0] > 1 and [len(str(row)) for row in x] == [shape[1]] * shape[0]
        return rows_of_grid or all(task.is_cell(cell, form) for cell in x)
    elif isinstance(first, Sequence | np.ndarray):
        inner = first[0] if len(first) else None
        depth = 3 if isinstance(inner, Sequence | np.ndarray) and not isinstance(inner, str) else 2
        width = len(first)
        if isinstance(inner, str) and len(inner) > 1 and not task.is_cell(inner, form):
            depth = 3  # a list of grids whose rows are texts
    else:
        return not isinstance(first, Mapping | torch.Tensor)  # numbers, or null
    if depth == 1:
        return True
    return depth == 2 and shape is not None and (width != form.seq_len or shape[1] == form.seq_len)


def read_item(item: Any, number: int, task: Task, form: PuzzleForm) -> list[Puzzle]:
    """The puzzles in one item, mostly one.

    Raises:
        UserError: it is none; the sentence begins with its number.
    """
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().numpy()
    try:
        return task.puzzles_of(item, form)
    except UserError as error:
        raise UserError(f"input {number}: {error}") from error


def in_chunks(
    items: Iterable[Any], size: int, task: Task, form: PuzzleForm
) -> Iterator[tuple[list[Puzzle], list[int]]]:
    """The puzzles of items, `size` at a time, and the number of the item that each is of.

    Raises:
        UserError: as `read_item`.
    """
    puzzles: list[Puzzle] = []
    numbers: list[int] = []
    for number, item in enumerate(items):
        for puzzle in read_item(item, number, task, form):
            puzzles.append(puzzle)
            numbers.append(number)
            if len(puzzles) == size:
                yield puzzles, numbers
                puzzles, numbers = [], []
    if puzzles:
        yield puzzles, numbers
