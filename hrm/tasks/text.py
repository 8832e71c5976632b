"""Questions and answers that are texts, as tokens of their characters.

What all questions of a pack have in common, such as the rules of a game, says nothing and is left out: a template holds
it, and tokens are made of what stands between its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.errors import UserError, shortened
from hrm.tasks.base import Tokens
from hrm.tasks.form import Symbol

END = "<end>"
"""Ends an answer: its length is part of it."""
NEXT = "<next>"
"""Stands where a part of the template was, between two parts of the question."""

# Only wording goes into a template: what has no two words in a row may be a part of a board that all questions share.
_WORDING = re.compile(r"[A-Za-z]{2,}[,;.:]? [a-z]{2,}")
_SAMPLE = 24  # questions that a template is first made of


@dataclass(frozen=True)
class Template:
    """What questions have in common, in order; None stands for what differs."""

    parts: tuple[str | None, ...] = (None,)

    @classmethod
    def of(cls, questions: Sequence[str]) -> Template:
        """A template that all the questions fit."""
        sample = list(dict.fromkeys(questions[:_SAMPLE]))
        while True:
            template = cls(tuple(_common(sample)))
            other = next((question for question in questions if template.slots(question) is None), None)
            if other is None:
                return template
            if other in sample:  # wording that comes twice in one question
                return cls()
            sample.append(other)

    @property
    def num_slots(self) -> int:
        return sum(part is None for part in self.parts)

    def slots(self, question: str) -> tuple[str, ...] | None:
        """What differs in a question, in order; None where it does not fit. Each part stands where it first can."""
        found, at, is_open = [], 0, False  # whether a slot began at `at` and has no end yet
        for number, part in enumerate(self.parts, start=1):
            if part is None:
                is_open = True
                continue
            is_last = number == len(self.parts)
            start = len(question) - len(part) if is_last and is_open else question.find(part, at) if is_open else at
            if start < at or not question.startswith(part, start):
                return None
            if is_open:
                found.append(question[at:start])
            at, is_open = start + len(part), False
        if is_open:
            found.append(question[at:])
        elif at < len(question):
            return None
        return tuple(found)

    def __str__(self) -> str:
        return "".join("..." if part is None else part for part in self.parts)


def _common(texts: Sequence[str]) -> list[str | None]:
    """The parts of a template for different texts: split at what they share, left and right likewise."""
    if len(set(texts)) == 1:
        return [texts[0]] if texts[0] else []
    shared = min(texts, key=len)
    for text in texts:
        match = SequenceMatcher(None, shared, text, autojunk=False).find_longest_match()
        shared = shared[match.a : match.a + match.size]
    if not _WORDING.search(shared):
        return [None]
    sides = zip(*((text.partition(shared)[0], text.partition(shared)[2]) for text in texts), strict=True)
    left, right = (_common(side) for side in sides)
    return [*left, shared, *right]


class TextTokens:
    """Tokens of the symbols of a vocabulary, characters and `END` and `NEXT` among them; 0 pads."""

    def __init__(self, symbols: Sequence[Symbol]) -> None:
        self._symbols = ["", *map(str, symbols)]
        self._tokens: Mapping[str, int] = {symbol: token for token, symbol in enumerate(self._symbols) if token}

    @staticmethod
    def symbols_of(texts: Iterable[str], template: Template) -> list[str]:
        """The symbols that texts and the template's slots need."""
        marks = [END, NEXT] if template.num_slots > 1 else [END]
        return [*marks, *sorted(set().union(*map(set, texts)))]

    def question(self, slots: Sequence[str]) -> list[int]:
        """The tokens of what differs in a question.

        Raises:
            UserError: a character has no token.
        """
        symbols = list(slots[0])
        for slot in slots[1:]:
            symbols += [NEXT, *slot]
        return self._encoded(symbols)

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer; errors as `question`."""
        return self._encoded([*text, END])

    def text(self, tokens: Tokens) -> str:
        """The text of an answer's tokens [S], up to its end."""
        symbols = [self._symbols[token] for token in tokens.tolist()]
        return "".join(symbols[: symbols.index(END)] if END in symbols else symbols)

    def _encoded(self, symbols: Sequence[str]) -> list[int]:
        for symbol in symbols:
            if symbol not in self._tokens:
                raise UserError(f"it has the character {symbol!r}, which the model does not know.")
        return [self._tokens[symbol] for symbol in symbols]


def padded(rows: Sequence[Sequence[int]], length: int, dtype: np.dtype[Any] | type = np.int64) -> NDArray[Any]:
    """Rows of tokens, [N, length], filled up with 0."""
    array = np.zeros((len(rows), length), dtype=dtype)
    for row, tokens in zip(array, rows, strict=True):
        row[: len(tokens)] = tokens
    return array


def slots_of(value: object, template: Template) -> tuple[str, ...]:
    """What differs in a question that a user gives: whole, or without the template, a part a slot.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, str):
        if (slots := template.slots(value)) is not None:
            return slots
        if template.num_slots == 1:
            return (value,)
    elif (
        isinstance(value, Sequence)
        and len(value) == template.num_slots
        and all(isinstance(part, str) for part in value)
    ):
        return tuple(value)
    raise UserError(
        f"it does not read as the questions do that the model knows, {shortened(str(template), 400)!r}: give a whole "
        f"question, or a list of the {template.num_slots} texts that stand for the dots."
    )
