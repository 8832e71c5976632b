"""Your own data, and anything else: tokens that mean what the pack says, if it says anything.

`<pack>/vocabulary.json` is the list of symbols, numbers or strings, in the order of their tokens. Token 0 pads and is
null there; in labels it is not learned, so an answer's null cells mean nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from hrm.data.pack import read_provenance
from hrm.errors import UserError, shortened
from hrm.reading import parse_json, read_text
from hrm.tasks.base import PuzzleSize, Task, Tokens, View
from hrm.tasks.form import Puzzle, PuzzleForm, Symbol

PAD_TOKEN = 0
VOCABULARY_FILE = "vocabulary.json"


__all__ = ["AnyTokens", "Symbol", "Vocabulary", "is_symbol", "parse_vocabulary", "read_vocabulary", "vocabulary_of"]


def is_symbol(value: object) -> TypeGuard[Symbol]:
    """Whether a value from JSON can be a symbol: a string or a finite number."""
    return type(value) in (int, str) or (type(value) is float and math.isfinite(value))


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of tokens 1, 2, ..."""

    symbols: tuple[Symbol, ...]

    @classmethod
    def infer(cls, symbols: Iterable[Symbol]) -> Vocabulary:
        """The vocabulary of all different `symbols`: numbers in order, then strings in order."""
        return cls(tuple(sorted(set(symbols), key=lambda symbol: (isinstance(symbol, str), symbol))))

    @property
    def size(self) -> int:
        """Tokens: padding and the symbols."""
        return len(self.symbols) + 1

    def tokens(self) -> dict[Symbol | None, int]:
        """The token of each symbol; None pads."""
        return {None: PAD_TOKEN} | {symbol: token for token, symbol in enumerate(self.symbols, start=1)}

    def decode(self, tokens: NDArray[np.integer[Any]]) -> Any:
        """Tokens of any shape as nested lists of symbols, None for padding."""
        return np.array([None, *self.symbols], dtype=object)[tokens].tolist()

    def write(self, folder: Path) -> None:
        """Write `<folder>/vocabulary.json`."""
        text = json.dumps([None, *self.symbols], ensure_ascii=False, indent=0)
        (folder / VOCABULARY_FILE).write_text(text + "\n", encoding="utf-8")


def read_vocabulary(file: Path) -> Vocabulary:
    """The vocabulary in a JSON file: a list of different strings and numbers, the null of token 0 first or left out.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        return parse_vocabulary(read_text(file), str(file))
    except (OSError, ValueError) as error:
        raise UserError(f"Vocabulary {file} cannot be read ({error}); give a JSON list of symbols.") from error


def parse_vocabulary(text: str, where: str) -> Vocabulary:
    """The vocabulary written as a JSON list; `where` names it in errors.

    Raises:
        UserError: for anything that is not such a list.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"Vocabulary {where} is not valid JSON ({error}); give a list of symbols.") from error
    if not isinstance(content, list):
        raise UserError(f"Vocabulary {where} is not a list; give a JSON list of symbols.")
    symbols = content[1:] if content[:1] == [None] else content
    for symbol in symbols:
        if not is_symbol(symbol):
            shown = shortened(json.dumps(symbol))
            raise UserError(f"Vocabulary {where} holds {shown}; a symbol is a string or a number.")
    if not symbols or len(set(symbols)) < len(symbols):
        raise UserError(f"Vocabulary {where} names {'a symbol twice' if symbols else 'no symbol'}; name each once.")
    return Vocabulary(tuple(symbols))


class AnyTokens(Task):
    """Sequences and grids of which nothing is known but symbols and shape."""

    name = "tokens"

    def fits(self, size: PuzzleSize) -> bool:
        return True

    def view(self, size: PuzzleSize, folder: Path | None = None) -> View:
        names = [str(token) for token in range(size.vocab_size)]
        if folder is None:
            return View(tuple(names))
        if (vocabulary := folder / VOCABULARY_FILE).is_file():
            names = ["", *map(str, read_vocabulary(vocabulary).symbols)]
        return View(tuple(names), _columns(folder, size.seq_len))

    # ---- from what a user gives to tokens, and from answers to what a user reads

    def view_of(self, form: PuzzleForm) -> View:
        return View(("", *map(str, vocabulary_of(form).symbols)), form.shape[1] if form.shape else None)

    def example(self, form: PuzzleForm) -> Any:
        """The symbols in turn."""
        symbols = vocabulary_of(form).symbols
        tokens = np.arange(form.seq_len) % len(symbols) + 1
        return vocabulary_of(form).decode(tokens.reshape(form.shape or -1))

    def grid(self, form: PuzzleForm) -> tuple[int, int] | None:
        return form.shape

    def is_cell(self, value: object, form: PuzzleForm) -> bool:
        return value is None or (is_symbol(value) and value in vocabulary_of(form).tokens())

    def read_input(self, value: object, form: PuzzleForm) -> Tokens:
        """The tokens [S] of a list or a grid of symbols, null for padding, filled up to the model's size.

        A text is JSON; or a symbol a character, where all symbols are single ones; or symbols between white space.
        """
        cells = self._cells(_symbols_of_text(value, form) if isinstance(value, str) else value, form)
        known = vocabulary_of(form).tokens()
        tokens = np.zeros(cells.shape, dtype=np.int64)
        for index, symbol in np.ndenumerate(cells):
            if not (symbol is None or is_symbol(symbol)) or symbol not in known:
                at = ", ".join(str(number + 1) for number in index)
                raise UserError(
                    f"cell {at} is {shortened(json.dumps(symbol, default=str))}, which is no symbol that the "
                    "model knows."
                )
            tokens[index] = known[symbol]
        whole = np.zeros(form.shape or (form.seq_len,), dtype=np.int64)
        whole[tuple(map(slice, tokens.shape))] = tokens
        return whole.reshape(-1)

    def _cells(self, value: object, form: PuzzleForm) -> NDArray[np.object_]:
        """Symbols in a list [at most S] or, for grids, in a grid no larger than the model's."""
        if isinstance(value, np.ndarray):
            value = value.tolist()
        shape: tuple[int, ...] = form.shape or (form.seq_len,)
        wanted = f"a grid of at most {shape[0]}x{shape[1]}" if form.shape else f"a list of at most {form.seq_len}"
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"it is not {wanted} symbols.")
        if form.shape and not isinstance(value[0], list | tuple):
            if len(value) != form.seq_len:
                raise UserError(f"it is a list of {len(value)} symbols, not {wanted}.")
            value = [value[start : start + shape[-1]] for start in range(0, form.seq_len, shape[-1])]
        rows = value if form.shape else [value]
        widths = {len(row) if isinstance(row, list | tuple) else -1 for row in rows}
        if (
            len(widths) != 1
            or min(widths) < 1
            or len(rows) > (shape[0] if form.shape else 1)
            or max(widths) > shape[-1]
        ):
            raise UserError(
                f"it is not {wanted} symbols: {len(rows)}x{max(widths)}."
                if form.shape
                else f"it has {len(value)} symbols, but the model takes at most {form.seq_len}."
            )
        cells = np.empty((len(rows), max(widths)), dtype=object)
        for number, row in enumerate(rows):
            for column, symbol in enumerate(row):
                cells[number, column] = symbol
        return cells if form.shape else cells[0]

    def answer_value(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> Any:
        """The list or grid of symbols, null for padding; as large as the input where answers are."""
        cells = answer.reshape(form.shape or (form.seq_len,))
        if form.answers_cover_inputs:
            given = puzzle.tokens.reshape(cells.shape) != PAD_TOKEN
            ends = [
                int(np.flatnonzero(given.any(axis=tuple(a for a in range(given.ndim) if a != axis)))[-1]) + 1
                if given.any()
                else 0
                for axis in range(given.ndim)
            ]
            cells = np.where(given, cells, PAD_TOKEN)[tuple(map(slice, ends))]
        return vocabulary_of(form).decode(cells)

    def answer_text(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> str:
        """The symbols one after the other, "." for padding, where all are single characters; else JSON."""
        value = self.answer_value(answer, puzzle, form)
        if not _are_characters(form):
            return json.dumps(value, ensure_ascii=False)
        cells = [cell for row in value for cell in row] if form.shape else value
        return "".join("." if cell is None else str(cell) for cell in cells)


def vocabulary_of(form: PuzzleForm) -> Vocabulary:
    """The symbols of a form; the numbers of tokens where it names none."""
    return Vocabulary(form.symbols or tuple(range(1, form.vocab_size)))


def _are_characters(form: PuzzleForm) -> bool:
    return all(len(str(symbol)) == 1 for symbol in vocabulary_of(form).symbols)


def _symbols_of_text(text: str, form: PuzzleForm) -> object:
    """The symbols in a text, as lists."""
    if text.lstrip().startswith("["):
        try:
            return parse_json(text)
        except ValueError as error:
            if not _are_characters(form):
                raise UserError(f"it is not valid JSON ({error}).") from error
    by_text: dict[str, Symbol] = {str(symbol): symbol for symbol in vocabulary_of(form).symbols}
    if _are_characters(form):
        return [by_text.get(symbol, symbol) for symbol in text if symbol in by_text or not symbol.isspace()]
    return [by_text.get(symbol, symbol) for symbol in text.split()]


def _columns(folder: Path, seq_len: int) -> int | None:
    """Of the grids in a pack, by the shape (such as 9x9) that its builder put on record; None for lists."""
    shape = shape_of(folder, seq_len)
    return None if shape is None else shape[1]


def shape_of(folder: Path, seq_len: int) -> tuple[int, int] | None:
    """Rows and columns of the grids in a pack, by the shape (such as 9x9) that its builder put on record."""
    try:
        rows, columns = map(int, read_provenance(folder)["arguments"]["shape"].split("x"))
    except (ValueError, KeyError, TypeError, AttributeError):  # lists of symbols, or no record
        return None
    return (rows, columns) if min(rows, columns) > 0 and rows * columns == seq_len else None


TASK = AnyTokens()
