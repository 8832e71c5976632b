"""The report's section on what happens inside a model, on a handful of the puzzles that it shows."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.evaluation.latent import (
    Walk,
    by_definition,
    initial_states,
    last_changes,
    nearby_states,
    states_after,
    token_mixing,
    update_changes,
    walk,
)
from hrm.evaluation.report.latent import (
    draw_changes,
    draw_last_changes,
    draw_mixing,
    draw_paths,
    draw_reading,
    draw_starts,
    draw_update_changes,
)
from hrm.evaluation.report.picture import png
from hrm.evaluation.report.recorder import Trajectories, kinds
from hrm.models import ACTLossHead
from hrm.output import bar_interval
from hrm.tasks.base import Booleans, PuzzleSize, Symmetry, Task, Tokens, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PUZZLES = 6
_MOST_TRIED_AGAIN = 3  # from other starts, and as symmetric puzzles
_STARTS = 5  # the own one among them
_SYMMETRIES = 4  # beside the puzzle itself
_NOISE = 0.3
_MOST_MAPS = 24  # of blocks and heads in a picture
_PIXELS_AN_INCH = 110  # of the page, which is wide enough for 9 inches
_MOST_BYTES = 1 << 28  # of the states that are kept
_MOST_TOKENS_ON_CPU = 1 << 10  # of all puzzles together: a maze of 30x30 takes a core seconds for an ACT step


@dataclass(frozen=True)
class _Few:
    """Some puzzles [M, S] to look into, on the model's device."""

    names: list[str]
    inputs: NDArray[np.uint8]
    labels: NDArray[np.int32]
    identifiers: NDArray[np.int32]  # [M]
    device: torch.device

    @classmethod
    def of(cls, shown: Trajectories, count: int, device: torch.device) -> _Few:
        """Up to `count` puzzles, half of them answered wrong where there are so many."""
        of_kind = {kind: columns.tolist() for kind, columns in kinds(shown.scores, count).items()}
        right = list(dict.fromkeys([*of_kind["slow"], *of_kind["right"]]))
        wrong = of_kind["wrong"]
        num_wrong = min(len(wrong), max(count // 2, count - len(right)))
        rows = np.array([*wrong[:num_wrong], *right[: count - num_wrong]], dtype=np.int64)
        names = [str(index) for index in shown.scores.index[rows]]
        return cls(names, shown.inputs[rows], shown.labels[rows], shown.puzzle_identifiers[rows], device)

    def batch(self, rows: NDArray[np.int64] | slice = slice(None), inputs: Tokens | None = None) -> Batch:
        """A batch of them, or of `inputs` that stand for them."""
        fields = {
            "inputs": self.inputs[rows] if inputs is None else inputs,
            "puzzle_identifiers": self.identifiers[rows],
        }
        return {name: torch.from_numpy(field.astype(np.int32)).to(self.device) for name, field in fields.items()}


class Insight:
    """Looks into a model, puzzle by puzzle, and gathers what the page's script draws."""

    def __init__(self, model: ACTLossHead, shown: Trajectories, task: Task, size: PuzzleSize, view: View) -> None:
        """`shown` is not empty."""
        self._model, self._task, self._size, self._view = model, task, size, view
        self._steps = model.halt_max_steps
        inner = model.model.inner
        of_puzzle = (self._steps + 1) * inner.num_tokens * inner.config.hidden_size * len(inner.initial_states) * 4
        device = inner.lm_head.weight.device
        count = min(_MOST_PUZZLES, _MOST_BYTES // of_puzzle)
        if device.type == "cpu":
            count = min(count, _MOST_TOKENS_ON_CPU // inner.num_tokens)
        self._few = _Few.of(shown, max(1, count), device)
        self._pictures: list[dict[str, Any]] = []
        tried_again = 2 * min(_MOST_TRIED_AGAIN, len(self._few.names))
        self._bar = tqdm(
            desc="looking inside the model",
            total=(2 + tried_again) * self._steps,
            unit=" ACT steps",
            delay=2,
            leave=False,
            mininterval=bar_interval(),
        )

    def content(self) -> dict[str, Any]:
        """The section as JSON: `pictures` and `fates`, what became of puzzles that were tried again."""
        with self._bar, by_definition(self._model), self._model.weights_at_hand():
            everyone = np.arange(len(self._few.names))
            own, right = self._walk(everyone)
            if not all(np.isfinite(states).all() for states in own.states.values()):  # a model that diverged
                return {"pictures": [], "fates": []}
            self._draw_states(own, right)
            if self._model.model.inner.is_its_schedule:
                self._draw_mixing(own)
            fates = self._try_again(right) if self._steps > 1 else []
        return {"pictures": self._pictures, "fates": fates}

    def _walk(
        self, rows: NDArray[np.int64], start: dict[str, Tensor] | None = None, keep: list[str] | None = None
    ) -> tuple[Walk, Booleans]:
        """What the model goes through on the puzzles `rows`, answers being 0 where none is asked for; and which of its
        last answers are right."""
        walked = walk(self._model, self._few.batch(rows), self._steps, start, keep, self._bar.update)
        asked = self._few.labels[rows] != IGNORE_LABEL_ID
        right = self._right(walked.answers[:, -1], rows)
        return replace(walked, answers=np.where(asked[:, None], walked.answers, 0)), right

    def _right(self, answers: Tokens, rows: NDArray[np.int64]) -> Booleans:
        """Which answers are right, by the labels of the puzzles `rows` or by the rules."""
        labels = self._few.labels[rows]
        right: Booleans = ((answers == labels) | (labels == IGNORE_LABEL_ID)).all(1)
        if rules := self._task.rules(self._size):
            right |= rules.keeps(self._few.inputs[rows], answers)
        return right

    def _add(self, title: str, text: str, figure: Figure) -> None:
        width = round(_PIXELS_AN_INCH * figure.get_figwidth())
        picture = base64.b64encode(png(figure)).decode("ascii")
        self._pictures.append({"title": title, "text": text, "png": picture, "width": width})

    def _draw_states(self, own: Walk, right: Booleans) -> None:
        if self._steps < 2:
            return
        names = self._few.names
        self._add(
            "Where the states go",
            "Each path is a puzzle, each dot a state after an ACT step, in the two directions in which the states "
            "differ most. Numbers are those of the puzzles above.",
            draw_paths(own.states, right, names),
        )
        self._add(
            "Do they come to rest?",
            "How much each step changes the states, whose own root mean square is about 1. A line that falls comes to "
            "rest, on the right answer or on a wrong one; one that stays high keeps searching.",
            draw_changes(own.states, right),
        )
        schedule = self._model.model.inner.plan.schedule
        if len(schedule) > len(own.states) and self._model.model.inner.is_its_schedule:
            changed = update_changes(self._model, self._few.batch(), own.states, self._bar.update)
            self._add(
                "Within the steps",
                "The same for each update of a state. The teeth of a saw: a fast state settles between the updates of "
                "the slow one, and is stirred up by them.",
                draw_update_changes(changed),
            )
        self._add(
            "Which cells change when",
            "The last ACT step that changed the answer of each cell; a dot where the input has it.",
            draw_last_changes(self._view, self._few.inputs, own.answers, right, names),
        )

    def _draw_mixing(self, own: Walk) -> None:
        """Of the puzzle with the latest change, at that step."""
        last = last_changes(own.answers)
        puzzle = int(last.max(1).argmax())
        cell, step = int(last[puzzle].argmax()), int(last[puzzle].max())
        batch = self._few.batch(slice(puzzle, puzzle + 1))
        mixing = token_mixing(self._model, batch, states_after(self._model, batch, step - 1))
        if not mixing:
            return
        if sum(len(part.maps) for part in mixing) > _MOST_MAPS:
            mixing = list({part.module: part for part in mixing}.values())  # the last block of each module
        prefix_len = self._model.model.inner.prefix_len
        of_what = f"in puzzle {self._few.names[puzzle]}, in the last update of each module in ACT step {step}"
        if mixing[0].kind == "attention":
            what = f"The weights of attention by head, {of_what}: bright is what a token, a row of the map, attends to."
        else:
            what = (
                f"This model mixes tokens by an MLP, which has no attention. Instead: how much a token, a row of the "
                f"map, changes with each other one, {of_what}."
            )
        self._add("Which tokens read which", what, draw_mixing(mixing, prefix_len))
        self._add(
            "What one cell reads",
            "The same for the cell that changed last there.",
            draw_reading(mixing, prefix_len, self._view, cell),
        )

    def _try_again(self, right: Booleans) -> list[dict[str, Any]]:
        """The puzzles answered wrong, and others where these are few, from other starts and as symmetric puzzles."""
        order = np.argsort(right, kind="stable")[:_MOST_TRIED_AGAIN]
        symmetries = self._symmetries()
        state = self._model.model.inner.output_state
        paths, ends, fates = {}, {}, []
        for row in order.tolist():
            rows = np.full(_STARTS, row)
            batch = self._few.batch(rows)
            starts = nearby_states(self._model, batch, row, _NOISE)
            for name, own_start in initial_states(self._model, batch).items():
                starts[name][0] = own_start[0]
            name, (walked, is_right) = self._few.names[row], self._walk(rows, starts, [state])
            paths[name], ends[name] = walked.states[state], is_right
            fates.append(
                {
                    "name": name,
                    "right": bool(is_right[0]),
                    "settled": bool(walked.settled()[0]),
                    "qHalt": round(float(walked.q_halt[0, -1]), 4),
                    "starts": [int(is_right[1:].sum()), _STARTS - 1],
                    "symmetric": self._symmetric(row, symmetries),
                }
            )
        self._add(
            "From other starts",
            f"Puzzles begun again from the model's own start with noise of {_NOISE} on it. A path that ends elsewhere "
            "has found another place to rest: where that is a wrong answer, a spurious attractor. (ensemble.paths has "
            "several starts answer.)",
            draw_starts(paths, ends, state),
        )
        return fates

    def _symmetries(self) -> list[Symmetry]:
        """Some that are not the identity; none where augmentations are puzzles with identifiers of their own."""
        if self._task.votes_over_pack:
            return []
        count = int(min(_SYMMETRIES + 1, self._task.num_symmetries(self._size)))
        return self._task.symmetries(self._size, count)[1:]

    def _symmetric(self, row: int, symmetries: list[Symmetry]) -> list[int] | None:
        """How many of the symmetric puzzles are answered right, of how many; None where there are none."""
        if not symmetries:
            return None
        rows = np.full(len(symmetries), row)
        inputs = np.concatenate([symmetry.apply(self._few.inputs[row : row + 1]) for symmetry in symmetries])
        walked = walk(self._model, self._few.batch(rows, inputs), self._steps, keep=[], stepped=self._bar.update)
        back = [symmetry.undo(answer[-1:])[0] for symmetry, answer in zip(symmetries, walked.answers, strict=True)]
        return [int(self._right(np.stack(back), rows).sum()), len(symmetries)]
