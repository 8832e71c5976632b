"""Some puzzles of a test split, printed and drawn with a model's answers, and the curves of its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from hrm.checkpoint.run_folder import METRICS_FILE
from hrm.checkpoint.weights import Checkpoint
from hrm.data.pack import Pack
from hrm.distributed.world import World
from hrm.errors import UserError, printable
from hrm.evaluation.report.boards import LEGEND, Board, draw_boards, outcome_of, render_text
from hrm.evaluation.report.picture import require_matplotlib
from hrm.evaluation.report.plots import draw_curves
from hrm.tasks import task_of
from hrm.tasks.base import PuzzleSize

SHOWN_OUTPUTS = ("inputs", "labels", "logits")
"""What `show_puzzles` must be given of a split."""


def check_show(pack: Pack, world: World) -> None:
    """Say what hinders `show_puzzles` now, not after minutes of evaluation.

    Raises:
        UserError: there are several processes, the puzzles are no grids to be filled in, or matplotlib is missing.
    """
    if world.size > 1:
        raise UserError("show= works in a single process: leave out torchrun.")
    size = PuzzleSize.of(pack)
    view = task_of(pack).view(size, pack.path)
    if view.columns is None or view.blank is None:
        raise UserError(
            f"show= draws grids that are filled in, and the puzzles of {pack.path}, {size.seq_len} cells of "
            f"{size.vocab_size} tokens, are none: leave it out, or look at them with report=."
        )
    require_matplotlib()


def show_puzzles(outputs: Mapping[str, Tensor], count: int, pack: Pack, checkpoint: Checkpoint, folder: Path) -> None:
    """Print and draw test puzzles, wrong ones among them where there are any, and draw the training curves.

    Args:
        outputs: `SHOWN_OUTPUTS` of the split: inputs and labels [N, S], logits [N, S, V].
        count: how many to show, at most.
        folder: of the pictures.
    """
    task, size = task_of(pack), PuzzleSize.of(pack)
    view, rules = task.view(size, pack.path), task.rules(size)
    inputs, labels = (outputs[name].numpy() for name in ("inputs", "labels"))
    answers = outputs["logits"].argmax(-1).cpu().numpy()
    solutions = labels
    if rules and not rules.solve:  # there may be more right answers than the label
        solutions = np.where(rules.keeps(inputs, answers)[:, None], answers, labels)
    order = np.argsort((answers == solutions).all(1), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]
    boards = [
        Board(view, inputs[index], answers[index], solutions[index], title=f"test puzzle {index}") for index in spread
    ]
    print("\n".join(f"{render_text(board)}\n{outcome_of(board, rules)}\n" for board in boards) + LEGEND)
    draw_boards(boards, folder / "boards.png")
    drawn = ["boards.png"]
    if (metrics_file := checkpoint.folder / METRICS_FILE).is_file():
        draw_curves(metrics_file, folder / "curves.png")
        drawn.append("curves.png")
    print(printable(f"Drew {' and '.join(drawn)} in {folder}."))
