"""What a model's tokens mean, kept beside its weights: puzzles are read and answers written without the pack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.errors import UserError, shortened
from hrm.reading import read_json
from hrm.writing import new_file

FORM_FILE = "task.json"
IDENTIFIERS_FILE = "identifiers.json"

Symbol = int | float | str
Tokens = NDArray[np.integer[Any]]


class Puzzle(NamedTuple):
    """What a model is given."""

    tokens: Tokens  # [S]
    identifier: int = 0  # row of the puzzle table


@dataclass(frozen=True)
class PuzzleForm:
    """How the puzzles of a task are written as a model's tokens."""

    task: str  # by its name in hrm.tasks
    seq_len: int  # S
    vocab_size: int
    num_puzzle_identifiers: int = 1  # rows of the puzzle table
    shape: tuple[int, int] | None = None  # rows and columns of the grid, where the pack says so
    symbols: tuple[Symbol, ...] | None = None  # of tokens 1, 2, ..., where the pack names them
    template: tuple[str | None, ...] = ()  # of questions that are texts: what all have in common, None what differs
    # Whether answers have a symbol just where their inputs have one. What else a model answers there is padding.
    answers_cover_inputs: bool = False
    identifiers: tuple[str, ...] = ()  # names of the puzzle identifiers, as far as known

    def to_json(self) -> dict[str, Any]:
        """All but the identifiers, which may be many and have a file of their own."""
        template = {"template": list(self.template)} if self.template else {}
        return {
            "task": self.task,
            "seq_len": self.seq_len,
            "vocab_size": self.vocab_size,
            "num_puzzle_identifiers": self.num_puzzle_identifiers,
            "shape": None if self.shape is None else list(self.shape),
            "symbols": None if self.symbols is None else list(self.symbols),
            "answers_cover_inputs": self.answers_cover_inputs,
        } | template

    @classmethod
    def from_json(cls, content: Any, where: str, identifiers: Sequence[str] = ()) -> PuzzleForm:
        """What `to_json` gave.

        Raises:
            UserError: it is something else; `where` names it.
        """
        try:
            seq_len, vocab_size, num_identifiers = (
                content[name] for name in ("seq_len", "vocab_size", "num_puzzle_identifiers")
            )
            shape, symbols = content["shape"], content["symbols"]
            shape = None if shape is None else (shape[0], shape[1])
            symbols = None if symbols is None else tuple(symbols)
            numbers = [seq_len, vocab_size, num_identifiers, *(shape or ())]
            if not all(type(number) is int and 0 < number < 2**31 for number in numbers):
                raise ValueError("sizes are whole numbers above 0")
            if shape and shape[0] * shape[1] != seq_len:
                raise ValueError("its shape is not that of seq_len cells")
            if symbols is not None and (
                len(symbols) != vocab_size - 1 or not all(type(symbol) in (int, float, str) for symbol in symbols)
            ):
                raise ValueError("symbols are strings and numbers, one for each token but 0")
            if not isinstance(content["task"], str):
                raise ValueError("task is a name")
            covers = content["answers_cover_inputs"] is True
            template = tuple(content.get("template", ()))
            if not all(part is None or isinstance(part, str) for part in template):
                raise ValueError("template is a list of texts and nulls")
            names = tuple(identifiers)
            return cls(content["task"], seq_len, vocab_size, num_identifiers, shape, symbols, template, covers, names)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{where} does not say what the model's tokens mean ({shortened(str(error))}): restore it, or give "
                "the pack by data_path."
            ) from error

    def save(self, folder: Path) -> None:
        """Write `task.json` and, where puzzles have names, `identifiers.json`.

        Raises:
            UserError: they cannot be written.
        """
        with new_file(folder / FORM_FILE) as file:
            text = json.dumps(self.to_json(), ensure_ascii=False, indent=1)
            file.write_text(text + "\n", encoding="utf-8")
        if len(self.identifiers) > 1:
            with new_file(folder / IDENTIFIERS_FILE) as file:
                file.write_text(json.dumps(self.identifiers, ensure_ascii=False) + "\n", encoding="utf-8")

    @cached_property
    def identifier_of(self) -> dict[str, int]:
        """The row of the puzzle table of each name."""
        return {name: row for row, name in enumerate(self.identifiers)}

    def identifier(self, name: object) -> int:
        """The row of the puzzle table that is named, or given by its number; 0, that of no puzzle, for None.

        Raises:
            UserError: there is none.
        """
        if name is None:
            return 0
        if isinstance(name, str) and name in self.identifier_of:
            return self.identifier_of[name]
        if isinstance(name, int | np.integer) and not isinstance(name, bool) and str(name) in self.identifier_of:
            return self.identifier_of[str(name)]  # a name in a custom pack may have been written as a number
        if isinstance(name, int | np.integer) and not isinstance(name, bool):
            if 0 <= name < self.num_puzzle_identifiers:
                return int(name)
            raise UserError(f"puzzle {name} is none of the {self.num_puzzle_identifiers} that the model knows.")
        known = f"such as {', '.join(self.identifiers[1:4])}" if len(self.identifiers) > 1 else "which has no names"
        raise UserError(f"puzzle {shortened(str(name))!r} is not one that the model was trained on, {known}.")

    def from_tokens(self, value: object) -> Tokens:
        """The model's own tokens [S], of any shape.

        Raises:
            UserError: they are none.
        """
        try:
            tokens = np.asarray(value)
        except ValueError:  # rows of different lengths
            tokens = np.empty(0, dtype=object)
        if tokens.dtype.kind not in "iu" or tokens.size != self.seq_len:
            raise UserError(f"the model takes {self.seq_len} tokens, whole numbers from 0 to {self.vocab_size - 1}.")
        tokens = tokens.reshape(-1)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            wrong = int(tokens[(tokens < 0) | (tokens >= self.vocab_size)][0])
            raise UserError(f"token {wrong} is not in the model's vocabulary, 0 to {self.vocab_size - 1}.")
        return tokens.astype(np.int64)


def read_form(folder: Path) -> PuzzleForm | None:
    """What `PuzzleForm.save` left in a folder; None where it did not.

    Raises:
        UserError: it is damaged.
    """
    file = folder / FORM_FILE
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        names = folder / IDENTIFIERS_FILE
        identifiers = read_json(names) if names.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): restore it.") from error
    if not isinstance(identifiers, list) or not all(isinstance(name, str) for name in identifiers):
        raise UserError(f"{names} is no list of names: restore it.")
    return PuzzleForm.from_json(content, str(file), identifiers)
