"""Symmetric copies of puzzles, and the rules that answers must keep, as the task of a pack has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrm.data.pack import Pack
from hrm.errors import UserError
from hrm.tasks import task_of
from hrm.tasks.base import PuzzleSize, Rules, Symmetry


class DeviceSymmetry(NamedTuple):
    """A `Symmetry` on a device, for integer tokens [N, S]."""

    cells: Tensor  # [S] int64
    tokens: Tensor  # [V] int64
    cells_back: Tensor
    tokens_back: Tensor

    @classmethod
    def of(cls, symmetry: Symmetry, device: torch.device) -> DeviceSymmetry:
        cells, tokens = (torch.from_numpy(map_).to(device) for map_ in symmetry)
        return cls(cells, tokens, cells.argsort(), tokens.argsort())

    def apply(self, puzzles: Tensor) -> Tensor:
        return self.tokens[puzzles.long()[:, self.cells]].to(puzzles.dtype)

    def undo(self, puzzles: Tensor) -> Tensor:
        return self.tokens_back[puzzles.long()][:, self.cells_back].to(puzzles.dtype)


def symmetries_of(pack: Pack, count: int) -> list[Symmetry]:
    """`count` symmetries of the pack's task, the identity first.

    Raises:
        UserError: the task has fewer.
    """
    task, size = task_of(pack), PuzzleSize.of(pack)
    if count > 1 and task.votes_over_pack:
        raise UserError(
            f"ensemble.augmentations={count} cannot be used with {pack.path}, which holds augmentations that vote "
            "already: leave it out."
        )
    most = task.num_symmetries(size)
    if count > 1 and most == 1:
        raise UserError(
            f"ensemble.augmentations={count} needs a task with known symmetries, and {pack.path} holds {task.name}, "
            "which has none: leave it out."
        )
    if count > most:
        raise UserError(
            f"ensemble.augmentations={count} is too large: a puzzle of the task {task.name} has {most:.0f} symmetries."
        )
    return task.symmetries(size, count)


def rules_of(pack: Pack) -> Rules:
    """The rules of the pack's task.

    Raises:
        UserError: it has none that are known.
    """
    task = task_of(pack)
    rules = task.rules(PuzzleSize.of(pack))
    if rules is None:
        raise UserError(
            f"ensemble.check=true needs a task with known rules, and {pack.path} holds {task.name}, which has none: "
            "leave it out."
        )
    return rules


def keep_rules(rules: Rules, inputs: Tensor, answers: Tensor) -> Tensor:
    """Which answers [N, S] to inputs [N, S] keep the rules: [N] bool, on the device of the answers."""
    return torch.from_numpy(rules.keeps(inputs.cpu().numpy(), answers.cpu().numpy())).to(answers.device)
