"""What a task is: all that the rest of the package asks about the meaning of tokens.

A task is a file of this folder with a subclass of `Task` and an instance of it, `TASK`. Only its name, the sizes it
comes in and its view must be given; what else it says of itself (rules, symmetries, ratings, evaluators) makes more of
evaluation work: votes of answers to symmetric puzzles, answers checked against the rules, accuracy by difficulty.
Nothing here needs PyTorch: puzzles are arrays of tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.data.pack import Pack
from hrm.errors import UserError
from hrm.tasks.form import Puzzle, PuzzleForm

Tokens = NDArray[np.integer[Any]]
Booleans = NDArray[np.bool_]


class PuzzleSize(NamedTuple):
    """What a model must know of a puzzle."""

    seq_len: int  # tokens of a puzzle, S
    vocab_size: int  # different tokens, V

    @classmethod
    def of(cls, pack: Pack) -> PuzzleSize:
        return cls(pack.metadata.seq_len, pack.metadata.vocab_size)


@dataclass(frozen=True)
class View:
    """How puzzles are drawn, on the terminal, in reports and in GIFs.

    Args:
        symbols: what each token [V] is written as.
        columns: tokens in a row; None where a sequence is no grid.
        blank: the token that an input leaves to be filled in: answers are then drawn over their inputs. None: beside.
        box: rows and columns between two thick lines.
        drawing: `symbols` writes them into cells; `path` draws a way through walls, by the symbols "#", "S", "G" and
            "o" of `symbols`; `colors` draws digits as ARC's colours.
        grid_sizes: for `colors`, the rows and columns [N, 2] of the grids that tokens [N, S] show at their top left,
            where these are smaller than the whole.
    """

    symbols: tuple[str, ...]
    columns: int | None = None
    blank: int | None = None
    box: tuple[int, int] | None = None
    drawing: Literal["symbols", "path", "colors"] = "symbols"
    grid_sizes: Callable[[Tokens], NDArray[np.int64]] | None = None

    def as_json(self) -> dict[str, Any]:
        """What a script in a browser draws by."""
        return {name: getattr(self, name) for name in ("drawing", "symbols", "columns", "blank", "box")}

    def given(self, inputs: Tokens) -> Booleans:
        """Which cells of inputs [..., S] are filled in: neither blank nor padding."""
        if self.blank is None:
            return np.zeros(inputs.shape, dtype=np.bool_)
        given: Booleans = (inputs != 0) & (inputs != self.blank)
        return given


class Symmetry(NamedTuple):
    """A map of puzzles to others of the same rules: symmetric[i] = tokens[puzzle[cells[i]]]."""

    cells: NDArray[np.int64]  # [S], a permutation
    tokens: NDArray[np.int64]  # [V], likewise

    def apply(self, puzzles: Tokens) -> Tokens:
        """The symmetric puzzles [N, S] of puzzles [N, S], of the same type."""
        mapped: Tokens = self.tokens[puzzles[:, self.cells]].astype(puzzles.dtype)
        return mapped

    def undo(self, puzzles: Tokens) -> Tokens:
        """Inverse of `apply`."""
        mapped: Tokens = np.argsort(self.tokens)[puzzles][:, np.argsort(self.cells)].astype(puzzles.dtype)
        return mapped


def identity(size: PuzzleSize) -> Symmetry:
    return Symmetry(np.arange(size.seq_len), np.arange(size.vocab_size))


class Solutions(NamedTuple):
    """What a search for the right answers to one puzzle found."""

    answers: Sequence[Tokens]  # different ones [S], two at most
    is_complete: bool  # whether there are no others; False where two were found, or the time was up

    @property
    def only(self) -> Tokens | None:
        """The answer that is the only right one, or None."""
        return self.answers[0] if self.is_complete and len(self.answers) == 1 else None


@dataclass(frozen=True)
class Rules:
    """What tells a right answer without looking at a label.

    Args:
        keeps: which answers [N, S] to inputs [N, S] keep the rules: [N].
        result: what such an answer is: "a shortest path".
        broken_at: which cells [N, S] of answers [N, S] to inputs [N, S] break them, where that can be told of a cell.
        solve: finds the right answers to one puzzle [S], in a time that is bounded.
    """

    keeps: Callable[[Tokens, Tokens], Booleans]
    result: str
    broken_at: Callable[[Tokens, Tokens], Booleans] | None = None
    solve: Callable[[Tokens], Solutions] | None = None


class Difficulty(NamedTuple):
    """How hard puzzles are, from the puzzles themselves."""

    name: str  # as in "accuracy by <name>"
    of: Callable[[Tokens, Tokens], NDArray[Any]]  # a number [N] for each of inputs and labels [N, S]


class Evaluator(ABC):
    """Scores answers in a way of its own, beside the exact match.

    Each process shows its own evaluator its share of the split; then the first one gets the states of all.
    """

    wants_all_votes = False
    """Of an ensemble: every answer, not only what they voted for."""

    @abstractmethod
    def add(self, set_name: str, puzzles: Mapping[str, NDArray[Any]], answers: Tokens, q_halt: NDArray[Any]) -> None:
        """Take the answers [N, S] to some puzzles of a set, and the logits q_halt [N].

        `puzzles` has inputs and labels [N, S], the latter `hrm.batch.IGNORE_LABEL_ID` where there is none, and
        puzzle_identifiers [N].
        """

    @abstractmethod
    def state(self) -> Any:
        """What was counted; can be pickled."""

    @abstractmethod
    def summary(self, states: Sequence[Any], folder: Path) -> str:
        """What to print, from the states of all processes, the own first; may leave files in `folder`."""

    def details(self, name: str, inputs: Tokens) -> dict[str, Any]:
        """What the report's script reads of a puzzle beside the recorded answers; after `summary`.

        Args:
            name: of its puzzle identifier.
            inputs: [S].
        """
        return {}


class RulesEvaluator(Evaluator):
    """Counts answers that keep the rules, for tasks whose puzzles have more than one right answer."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._counts: dict[str, tuple[int, int]] = {}

    def add(self, set_name: str, puzzles: Mapping[str, NDArray[Any]], answers: Tokens, q_halt: NDArray[Any]) -> None:
        kept, count = self._counts.get(set_name, (0, 0))
        valid = self._rules.keeps(puzzles["inputs"], answers)
        self._counts[set_name] = kept + int(valid.sum()), count + len(valid)

    def state(self) -> dict[str, tuple[int, int]]:
        """By set: answers that keep the rules, and answers."""
        return self._counts

    def summary(self, states: Sequence[dict[str, tuple[int, int]]], folder: Path) -> str:
        lines = []
        for set_name in states[0]:
            kept, count = map(sum, zip(*(state.get(set_name, (0, 0)) for state in states), strict=True))
            lines.append(
                f"  {set_name}: {100 * kept / max(count, 1):.2f} % of {count} answers are {self._rules.result}, the "
                "label's or another one."
            )
        return "\n".join(lines)


class Task(ABC):
    """A task; see the methods for what it may say of itself."""

    name: str
    """As packs name it in their provenance."""

    votes_over_pack = False
    """Whether the pack holds augmentations of its puzzles, which an evaluator of the task puts to the vote."""

    names_puzzles = False
    """Whether a report shows puzzles by the names of their identifiers."""

    one_answer = True
    """Whether the label is the only right answer. Where there are several, a symmetry may map it to another of them."""

    @abstractmethod
    def fits(self, size: PuzzleSize) -> bool:
        """Whether puzzles of the task come in this size."""

    @abstractmethod
    def view(self, size: PuzzleSize, folder: Path | None = None) -> View:
        """How puzzles are drawn.

        Args:
            folder: of the pack, which may say more; None for a lone puzzle.
        """

    def title(self, size: PuzzleSize) -> str | None:
        """What a report is headed with; None: the name of the pack."""
        return None

    def is_input(self, inputs: Tokens) -> Booleans:
        """Which rows [N] of tokens [N, S] may be inputs of the task."""
        return np.ones(len(inputs), dtype=np.bool_)

    def rules(self, size: PuzzleSize) -> Rules | None:
        """What tells whether an answer is right; None where only the label does."""
        return None

    def num_symmetries(self, size: PuzzleSize) -> float:
        """How many symmetries are known, the identity among them; may be infinite."""
        return 1

    def symmetries(self, size: PuzzleSize, count: int, seed: int = 0) -> list[Symmetry]:
        """`count` of the symmetries, at most `num_symmetries`, the identity first."""
        return [identity(size)][:count]

    def cell_permutations(self, size: PuzzleSize, seed: int, count: int = 4096) -> NDArray[np.int64]:
        """Permutations of the cells under which the rules stay: permuted[i] = puzzle[cells[i]].

        Returns:
            [N, S]: of all symmetries, or of `count` random ones where they are more.
        """
        most = min(count, self.num_symmetries(size))
        return np.stack([symmetry.cells for symmetry in self.symmetries(size, int(most), seed)])

    def difficulty(self) -> Difficulty | None:
        """How hard a puzzle is, for packs that do not say it; None where that cannot be told."""
        return None

    def evaluators(self, pack: Pack) -> list[Evaluator]:
        """Scores beside the exact match."""
        return []

    def parse_input(self, text: str, size: PuzzleSize) -> Tokens:
        """The input [S] that a user typed.

        Args:
            size: the one the model was trained on, as far as known; the text may be of another.

        Raises:
            UserError: it is none, or breaks the rules.
        """
        view = self.view(size)
        symbols = {symbol: token for token, symbol in enumerate(view.symbols) if symbol}
        if max(map(len, symbols)) > 1:
            raise UserError(f"puzzle= cannot be read for the task {self.name}, whose symbols are no single characters.")
        if view.blank is not None:
            symbols |= {".": view.blank}
        text = "".join(text.split()) if " " not in symbols else text.replace("\n", "")
        for position, symbol in enumerate(text, start=1):
            if symbol not in symbols:
                raise UserError(f"Character {position} of the puzzle is {symbol!r}; write one of {''.join(symbols)!r}.")
        return np.array([symbols[symbol] for symbol in text], dtype=np.int64)

    # ---- from what a user gives to tokens, and from answers to what a user reads

    def view_of(self, form: PuzzleForm) -> View:
        """How puzzles are drawn, as far as a model knows it without its pack."""
        return self.view(PuzzleSize(form.seq_len, form.vocab_size))

    def example(self, form: PuzzleForm) -> Any:
        """A puzzle as a user may give it, so that one can see how they are written; None where there is none."""
        return None

    def grid(self, form: PuzzleForm) -> tuple[int, int] | None:
        """Rows and columns of a puzzle; None where it is a list."""
        if form.shape is not None:
            return form.shape
        columns = self.view(PuzzleSize(form.seq_len, form.vocab_size)).columns
        return None if columns is None else (form.seq_len // columns, columns)

    def is_cell(self, value: object, form: PuzzleForm) -> bool:
        """Whether a string is one cell of a puzzle rather than a puzzle."""
        return isinstance(value, str) and len(value) == 1 and form.seq_len > 1

    def puzzles_of(self, value: object, form: PuzzleForm) -> list[Puzzle]:
        """The puzzles in what a user gives as one, mostly one.

        Args:
            value: a puzzle as `read_input` takes it; or a mapping with it as `input` (or `question`) or, as the model's
                own tokens, as `tokens`, and in `puzzle` the name or number of its identifier.

        Raises:
            UserError: it is no puzzle of the task, or not of the model's size.
        """
        identifier = 0
        if isinstance(value, Mapping):
            identifier = form.identifier(value.get("puzzle"))
            if "tokens" in value:
                return [Puzzle(form.from_tokens(value["tokens"]), identifier)]
            field = next((name for name in ("input", "question") if name in value), None)
            if field is None:
                raise UserError("it has no field input: give the puzzle there, or the model's tokens as tokens.")
            value = value[field]
        tokens = self.read_input(value, form)
        if len(tokens) != form.seq_len:
            raise UserError(f"it has {len(tokens)} cells, but the model's puzzles have {form.seq_len}.")
        return [Puzzle(tokens, identifier)]

    def read_input(self, value: object, form: PuzzleForm) -> Tokens:
        """The input [S] that is a text as `parse_input` takes it, or a list or grid of its characters or digits.

        Raises:
            UserError: it is none.
        """
        if not isinstance(value, str):
            cells = flat_cells(value)
            for number, cell in enumerate(cells, start=1):
                if len(cell) != 1 and not (set(map(len, cells)) == {math.isqrt(form.seq_len)}):  # rows as strings
                    raise UserError(f"cell {number} is {cell[:20]!r}, which is no single character or digit.")
            value = "".join(cells)
        return self.parse_input(value, PuzzleSize(form.seq_len, form.vocab_size))

    def answer_value(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> Any:
        """An answer [S] as a value for JSON: the rows of a grid as strings."""
        text, grid = self.answer_text(answer, puzzle, form), self.grid(form)
        if grid is None:
            return text
        return [text[start : start + grid[1]] for start in range(0, len(text), grid[1])]

    def answer_text(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> str:
        """An answer [S] on one line, a character for each cell; "." stands for a blank and for padding."""
        symbols = _symbols(self, PuzzleSize(form.seq_len, form.vocab_size))
        return "".join([symbols[token] for token in answer.tolist()])

    def augmented(self, puzzle: Puzzle, count: int, form: PuzzleForm) -> list[tuple[Puzzle, Undo]]:
        """A puzzle under `count` of the task's symmetries, the identity first, each with what maps answers [S] back.

        Raises:
            UserError: there are fewer.
        """
        size = PuzzleSize(form.seq_len, form.vocab_size)
        if count > (most := self.num_symmetries(size)):
            has = "has none that are known: leave it out" if most == 1 else f"has {most:.0f}"
            raise UserError(f"augmentations={count} needs as many symmetries, and the task {self.name} {has}.")
        return [
            (puzzle._replace(tokens=symmetry.apply(puzzle.tokens[None])[0]), _undo(symmetry))
            for symmetry in _symmetries(self, size, count)
        ]

    def template(self, folder: Path) -> tuple[str | None, ...]:
        """What all questions of the pack in a folder have in common, if they are texts, with None for what differs."""
        return ()

    def shown_identifiers(self, names: Sequence[str]) -> Booleans | None:
        """Which puzzle identifiers, by their names, a report may choose puzzles of; None: all."""
        return None


Undo = Callable[[Tokens], Tokens]
"""Maps an answer [S] to a symmetric puzzle to an answer to the puzzle itself."""


def _undo(symmetry: Symmetry) -> Undo:
    return lambda answer: symmetry.undo(answer[None])[0]


@lru_cache(maxsize=8)
def _symbols(task: Task, size: PuzzleSize) -> list[str]:
    """A character for each token."""
    return [symbol or "." for symbol in task.view(size).symbols]


@lru_cache(maxsize=8)
def _symmetries(task: Task, size: PuzzleSize, count: int) -> list[Symmetry]:
    return task.symmetries(size, count)


def flat_cells(value: object) -> list[str]:
    """The cells of a list or grid, as strings, row by row.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence):
        raise UserError("it is no text, list or grid: give the puzzle as one of these.")
    cells = []
    for cell in value:
        if isinstance(cell, Sequence) and not isinstance(cell, str):
            cells += flat_cells(cell)
        elif isinstance(cell, str | int) and not isinstance(cell, bool):
            cells.append(str(cell))
        else:
            raise UserError(f"a cell is {str(cell)[:20]}, which is no character or digit.")
    return cells


UNLIMITED = math.inf
"""Number of symmetries where they are drawn at random from very many."""
