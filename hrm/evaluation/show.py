"""Some puzzles of a test split, printed and drawn with a model's answers, and the curves of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hrm.checkpoint.run_folder import METRICS_FILE
from hrm.checkpoint.weights import Checkpoint
from hrm.data.pack import Pack, read_identifiers
from hrm.distributed.world import World
from hrm.errors import UserError, printable
from hrm.evaluation.report.boards import Board, outcome_of
from hrm.evaluation.report.drawings import draw_boards
from hrm.evaluation.report.picture import require_matplotlib
from hrm.evaluation.report.plots import draw_curves
from hrm.evaluation.report.text import legend_of, render_text
from hrm.tasks import task_of
from hrm.tasks.base import Evaluator, PuzzleSize, Tokens


class ShownPuzzles(Evaluator):
    """Keeps a few puzzles of a split as their answers come in, and in the end prints and draws them.

    Of ARC's augmentations only the originals are shown.
    """

    def __init__(self, pack: Pack, count: int, world: World) -> None:
        """`count`: how many to show, at most.

        Raises:
            UserError: there are several processes, or matplotlib is missing: better now than after minutes.
        """
        if world.size > 1:
            raise UserError("show= works in a single process: leave out torchrun.")
        require_matplotlib()
        self._count = count
        self._task, size = task_of(pack), PuzzleSize.of(pack)
        self._view, self._rules = self._task.view(size, pack.path), self._task.rules(size)
        self._names: list[str] = []
        self._may_show = None
        if self._task.names_puzzles:
            self._names = read_identifiers(pack.path, pack.metadata.num_puzzle_identifiers)
            self._may_show = self._task.shown_identifiers(self._names)
        self._seen = 0
        self._kept: dict[bool, list[Board]] = {False: [], True: []}  # by whether they are right

    def add(self, set_name: str, puzzles: Mapping[str, NDArray[Any]], answers: Tokens, q_halt: NDArray[Any]) -> None:
        for row, (inputs, labels, identifier) in enumerate(
            zip(puzzles["inputs"], puzzles["labels"], puzzles["puzzle_identifiers"].tolist(), strict=True)
        ):
            if self._may_show is not None and not self._may_show[identifier]:
                continue
            name = f", task {self._names[identifier]}" if self._names else ""
            board = self._board(inputs, labels, answers[row], f"test puzzle {self._seen + row}{name}")
            kept = self._kept[board.num_wrong() == 0]
            if len(kept) < self._count:
                kept.append(board)
        self._seen += len(answers)

    def _board(self, inputs: Tokens, labels: Tokens, answer: Tokens, title: str) -> Board:
        several = self._rules and not self._rules.solve  # there may be more right answers than the label
        is_right = several and self._rules and self._rules.keeps(inputs[None], answer[None])[0]
        return Board(self._view, inputs, answer, answer if is_right else labels, title=printable(title))

    def state(self) -> None:
        """Nothing: there is one process."""

    def summary(self, states: Sequence[Any], folder: Path) -> str:
        """Nothing beside what `show` prints."""
        return ""

    def show(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Print the puzzles, the wrong ones first, and draw them and the training curves into `folder`."""
        wrong, right = self._kept[False], self._kept[True]
        num_right = min(len(right), max(self._count // 2, self._count - len(wrong)))
        boards = [*wrong[: self._count - num_right], *right[:num_right]]
        if not boards:
            print("There is no test puzzle to show.")
            return
        texts = [f"{render_text(board)}\n{outcome_of(board, self._rules)}\n" for board in boards]
        print("\n".join([*texts, legend_of(boards[0])]))
        drawn = []
        if self._view.columns is not None:  # lists are read, not looked at
            draw_boards(boards, folder / "boards.png")
            drawn.append("boards.png")
        if (metrics_file := checkpoint.folder / METRICS_FILE).is_file():
            draw_curves(metrics_file, folder / "curves.png")
            drawn.append("curves.png")
        if drawn:
            print(printable(f"Drew {' and '.join(drawn)} in {folder}."))
