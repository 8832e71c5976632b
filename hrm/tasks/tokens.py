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
from hrm.tasks.base import PuzzleSize, Task, View

Symbol = int | float | str

PAD_TOKEN = 0
VOCABULARY_FILE = "vocabulary.json"


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


def _columns(folder: Path, seq_len: int) -> int | None:
    """Of the grids in a pack, by the shape (such as 9x9) that its builder put on record; None for lists."""
    try:
        rows, columns = map(int, read_provenance(folder)["arguments"]["shape"].split("x"))
    except (ValueError, KeyError, TypeError, AttributeError):  # lists of symbols, or no record
        return None
    return columns if min(rows, columns) > 0 and rows * columns == seq_len else None


TASK = AnyTokens()
