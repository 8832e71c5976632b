"""What evaluation does for one kind of task only: symmetries for ensembles, and scores beside the exact match."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.batch import Batch
from hrm.data.pack import IntArray, Pack, PackSet, read_identifiers
from hrm.distributed.world import World, gather_on_main
from hrm.errors import UserError
from hrm.evaluation.arc import ArcScorer
from hrm.evaluation.ensemble import (
    Rules,
    Symmetry,
    identity,
    maze_rules,
    maze_symmetries,
    sudoku_rules,
    sudoku_symmetries,
)
from hrm.evaluation.gif import require_pillow, write_gifs
from hrm.evaluation.report import (
    Bar,
    Rating,
    View,
    arc_demonstrations,
    arc_tasks,
    by_rating,
    by_source,
    originals,
    stored,
    write_report,
)
from hrm.evaluation.runner import Answers, Examiner, Sums, judge
from hrm.evaluation.trajectory import Recorder, check_vocabulary
from hrm.tasks.sudoku import random_symmetries

# Puzzles that a report shows of those answered right, wrong, and right at last.
_SHOWN_PER_KIND = 8


def symmetries(pack: Pack, count: int) -> list[Symmetry]:
    """`count` maps of the pack's puzzles to others of the same rules, the identity first.

    Raises:
        UserError: the task has none that are known, or fewer.
    """
    meta, view = pack.metadata, View.of_pack(pack)
    if count == 1:
        return [identity(meta.seq_len, meta.vocab_size)]
    if view.box is not None:
        return sudoku_symmetries(view.box, count)
    if view.kind == "maze":
        if count > 8:
            raise UserError(f"ensemble.augmentations={count} is too large: a square maze has 8 images.")
        return maze_symmetries(meta.seq_len, meta.vocab_size, count)
    if view.kind == "arc":
        raise UserError(
            f"ensemble.augmentations={count} does not go with an ARC pack, whose augmentations are in it and vote "
            "already: leave it out."
        )
    raise UserError(f"ensemble.augmentations={count} needs a Sudoku or a maze pack, for {pack.path} holds neither.")


def known_rules(pack: Pack) -> Rules | None:
    """What tells whether an answer keeps to the rules of the pack's task; None for a task where only the label does."""
    view = View.of_pack(pack)
    if view.box is not None:
        return sudoku_rules(view.box)
    return maze_rules if view.kind == "maze" else None


def cell_permutations(pack: Pack, seed: int, count: int = 4096) -> Tensor:
    """Permutations of a puzzle's cells under which the rules stay: image[i] = puzzle[cells[i]].

    Returns:
        [N, S] int64: `count` random ones for Sudoku, the eight of the square for mazes.

    Raises:
        UserError: the pack holds neither.
    """
    view = View.of_pack(pack)
    if view.box is not None:
        return torch.from_numpy(random_symmetries(count, view.box, np.random.default_rng(seed)).source.astype(np.int64))
    if view.kind == "maze":
        return torch.stack([image.cells for image in maze_symmetries(pack.metadata.seq_len, 1, 8)])
    raise UserError(
        f"augment_act_steps=true needs a Sudoku or a maze pack, for {pack.path} holds neither: leave it out."
    )


def task_examiners(pack: Pack) -> list[Examiner]:
    """Those that the pack's task has, and one for ratings and sources if they are stored in the pack.

    Raises:
        UserError: as `hrm.evaluation.report.stored`.
    """
    kind = View.of_pack(pack).kind
    examiners: list[Examiner] = []
    if kind == "maze":
        examiners.append(MazeExaminer())
    if kind == "arc":
        examiners.append(ArcExaminer(pack))
    if (breakdown := BreakdownExaminer(pack)).breakdowns:
        examiners.append(breakdown)
    return examiners


class MazeExaminer:
    """Counts answers that mark a shortest path, be it the label's or another one."""

    counts_votes = False

    def __init__(self) -> None:
        self._marks: dict[str, list[torch.Tensor]] = {}

    def __call__(self, set_name: str, puzzles: Batch, answers: Answers) -> None:
        self._marks.setdefault(set_name, []).append(maze_rules(puzzles["inputs"], answers.tokens))

    def verdict(self, world: World, folder: Path) -> str:
        sums = Sums(world)
        for set_name, marks in self._marks.items():
            valid = torch.cat(marks).to(world.device)
            sums.add(set_name, {"shortest": valid.sum(), "count": torch.tensor(len(valid))})
        return "\n".join(
            f"  {set_name}: {100 * values['shortest']:.2f} % of {values['count']:.0f} answers are a shortest path, the "
            "label's or another one."
            for set_name, values in sums.averages().items()
        )


class ArcExaminer:
    """Lets the augmentations of each test input vote, and writes what to submit."""

    counts_votes = True

    def __init__(self, pack: Pack) -> None:
        self.scorer = ArcScorer(pack)

    def __call__(self, set_name: str, puzzles: Batch, answers: Answers) -> None:
        self.scorer.add(
            puzzles["puzzle_identifiers"].numpy(),
            puzzles["inputs"].numpy(),
            answers.tokens.numpy(),
            answers.q_halt.float().numpy(),
        )

    def verdict(self, world: World, folder: Path) -> str:
        gathered = gather_on_main(self.scorer.votes, world)
        for votes in gathered[1:]:
            self.scorer.merge(votes)
        if not gathered:
            return ""
        result = self.scorer.result()
        file = folder / "submission.json"
        file.write_text(json.dumps(result.submission) + "\n")
        passed, shares = (
            ", ".join(f"{100 * share:.2f} % at {count}" for count, share in counted.items())
            for counted in (result.pass_at, result.share_at)
        )
        return (
            f"  Tasks solved, by answers allowed: {passed}.\n"
            f"  Mean share of a task's test inputs solved (TRM's figure): {shares}.\n"
            f"  Saved the first two answers in {file}."
        )


class BreakdownExaminer:
    """Counts exact answers by difficulty rating and by source, where the pack has these."""

    counts_votes = False

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        known = [
            ("difficulty rating", stored(pack, "ratings"), by_rating),
            ("source", stored(pack, "sources"), by_source),
        ]
        self.breakdowns = [(name, values, bars) for name, values, bars in known if values is not None]
        self._keys: list[NDArray[np.uint64]] = []
        self._judged: list[NDArray[np.bool_]] = []  # [2, N]: there is a label, the answer is it

    def __call__(self, set_name: str, puzzles: Batch, answers: Answers) -> None:
        judged = judge(puzzles["labels"], answers.tokens)
        self._keys.append(_keys(puzzles["inputs"].numpy(), puzzles["puzzle_identifiers"].numpy()))
        self._judged.append(torch.stack([judged.counted, judged.exact]).numpy())

    def verdict(self, world: World, folder: Path) -> str:
        gathered = gather_on_main((np.concatenate(self._keys), np.concatenate(self._judged, axis=1)), world)
        if not gathered:
            return ""
        # The ranks took turns, so the answers come in another order than the puzzles. Sorted by key they agree; puzzles
        # with the same key are one and the same, and so are their answers.
        keys, judged = (np.concatenate(parts, axis=-1) for parts in zip(*gathered, strict=True))
        counted, exact = judged[:, np.argsort(keys, kind="stable")]
        in_split = np.argsort(np.concatenate([_keys_of_set(data) for data in self._pack.sets.values()]), kind="stable")
        lines = []
        for name, values, bars in self.breakdowns if counted.any() else ():
            lines += [f"  Exact answers by {name}:", *_bar_rows(bars(values[in_split][counted], exact[counted]))]
        return "\n".join(lines)


def _keys(inputs: IntArray, identifiers: IntArray) -> NDArray[np.uint64]:
    """A number [N] for each puzzle, by its tokens [N, S] and identifier [N], that no other one has."""
    rows = np.column_stack([inputs, identifiers]).astype(np.int32)
    return np.array([int.from_bytes(blake2b(row, digest_size=8).digest()) for row in rows], dtype=np.uint64)


def _keys_of_set(data: PackSet) -> NDArray[np.uint64]:
    return _keys(data.inputs, np.repeat(data.puzzle_identifiers, np.diff(data.puzzle_indices)))


def _bar_rows(bars: Sequence[Bar]) -> list[str]:
    width = max(len(bar["label"]) for bar in bars)
    shares = [100 * bar["right"] / bar["count"] for bar in bars]
    return [
        f"    {bar['label']:<{width}}  {share:6.2f} % of {bar['count']:>7,}"
        for bar, share in zip(bars, shares, strict=True)
    ]


class ReportWriter:
    """Records an evaluation step by step and writes the HTML report of it, and a GIF of a puzzle of each kind."""

    def __init__(self, pack: Pack, examiners: Sequence[Examiner]) -> None:
        check_vocabulary(pack.metadata.vocab_size)
        require_pillow()  # said now, not after minutes of evaluation
        self._pack = pack
        self._view = View.of_pack(pack)
        self._scorer = next((each.scorer for each in examiners if isinstance(each, ArcExaminer)), None)
        self._names = read_identifiers(pack.path, pack.metadata.num_puzzle_identifiers)
        may_show = originals(self._names) if self._view.kind == "arc" else None
        self.recorder = Recorder(_SHOWN_PER_KIND, may_show)

    def write(self, folder: Path, weights_file: Path, world: World) -> Path | None:
        """The report on the answers of all ranks; its file on rank 0, None elsewhere."""
        recordings = gather_on_main(self.recorder.recording(), world)
        if not recordings:
            return None
        recording = self.recorder.merge(recordings)
        tasks = None
        if self._scorer:
            tasks = arc_tasks(recording.shown, self._names, self._scorer, arc_demonstrations(self._pack))
        file = write_report(
            folder,
            recording,
            self._view,
            title=self._title(),
            subtitle=f"{weights_file} on {self._pack.path / self._pack.split}",
            per_kind=_SHOWN_PER_KIND,
            rating=Rating.of_pack(self._pack, self._view),
            sources=stored(self._pack, "sources"),
            names=self._names if self._pack.metadata.num_puzzle_identifiers > 1 else None,
            tasks=tasks,
        )
        write_gifs(folder, recording.shown, self._view)
        return file

    def _title(self) -> str:
        side = self._view.columns
        kinds = {"sudoku": f"Sudoku, {side} × {side}", "maze": f"Mazes, {side} × {side}"}
        return kinds.get(self._view.kind, self._pack.path.name)
