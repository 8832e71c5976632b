"""Records an evaluation step by step and writes the report of it: a page, and a GIF of a puzzle of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrm.data.columns import read_column
from hrm.data.pack import Pack, read_identifiers
from hrm.distributed.world import World, gather_on_main
from hrm.evaluation.breakdown import Rating
from hrm.evaluation.report.gif import require_pillow, write_gifs
from hrm.evaluation.report.inside import Insight
from hrm.evaluation.report.page import write_report
from hrm.evaluation.report.picture import require_matplotlib
from hrm.evaluation.report.recorder import Recorder, Trajectories, check_vocabulary
from hrm.models import ACTLossHead
from hrm.tasks import task_of
from hrm.tasks.base import Evaluator, PuzzleSize

# Puzzles that a report shows of those answered right, wrong, and right at last.
_SHOWN_PER_KIND = 8


class ReportWriter:
    """Gives the evaluation loop its `recorder`, and then writes the report.

    Args:
        evaluators: of the same evaluation; they add what they know to the puzzles shown.
    """

    def __init__(self, pack: Pack, evaluators: Sequence[Evaluator]) -> None:
        check_vocabulary(pack.metadata.vocab_size)
        require_pillow()  # better now than after minutes of evaluation
        require_matplotlib()
        self._pack, self._evaluators = pack, evaluators
        self._task, self._size = task_of(pack), PuzzleSize.of(pack)
        self._names = read_identifiers(pack.path, pack.metadata.num_puzzle_identifiers)
        self.recorder = Recorder(_SHOWN_PER_KIND, self._task.shown_identifiers(self._names))

    def write(self, folder: Path, weights_file: Path, world: World, model: ACTLossHead | None = None) -> Path | None:
        """The report on the answers of all ranks, and on what happens inside the model; None on other ranks than 0.

        Args:
            model: to look inside, in evaluation mode; each rank has the whole of it.
        """
        recordings = gather_on_main(self.recorder.recording(), world)
        if not recordings:
            return None
        recording = self.recorder.merge(recordings)
        view = self._task.view(self._size, self._pack.path)
        inside = None
        if model is not None and len(recording.shown.inputs):
            inside = Insight(model, recording.shown, self._task, self._size, view).content()
        file = write_report(
            folder,
            recording,
            view,
            title=self._task.title(self._size) or self._pack.path.name,
            subtitle=f"{weights_file} on {self._pack.path / self._pack.split}",
            per_kind=_SHOWN_PER_KIND,
            rating=Rating.of_pack(self._pack),
            sources=read_column(self._pack, "sources"),
            rules=self._task.rules(self._size),
            details=self._details(recording.shown),
            inside=inside,
        )
        write_gifs(folder, recording.shown, view)
        return file

    def _details(self, shown: Trajectories) -> list[dict[str, Any]]:
        """What the page's script reads of each puzzle shown beside the recorded answers."""
        details = []
        for inputs, identifier in zip(shown.inputs, shown.puzzle_identifiers.tolist(), strict=True):
            name = self._names[identifier]
            of_puzzle: dict[str, Any] = {"name": name} if self._task.names_puzzles else {}
            for evaluator in self._evaluators:
                of_puzzle |= evaluator.details(name, inputs)
            details.append(of_puzzle)
        return details
