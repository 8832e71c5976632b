"""Puzzles of Reasoning Gym (Stojanovski et al. 2025, arXiv 2505.24760): texts, scored by its own verifiers.

`<pack>/reasoning_gym.json` says which generator made a pack and how, so that evaluation generates the test puzzles
again and hands answers to the generator's verifier: a puzzle may have several right answers. The puzzles are not taken
from the pack, for some verifiers evaluate what stands in one as Python.
"""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.config.checks import neighbours
from hrm.config.paths import install_hint
from hrm.data.pack import Pack
from hrm.errors import UserError, first_sentence, printable
from hrm.reading import read_json
from hrm.tasks.base import Evaluator, PuzzleSize, Tokens, View
from hrm.tasks.form import Puzzle, PuzzleForm
from hrm.tasks.text import Template, TextTokens, padded, slots_of
from hrm.tasks.tokens import VOCABULARY_FILE, AnyTokens, read_vocabulary, vocabulary_of

FILE = "reasoning_gym.json"
MOST_PUZZLES = 10_000_000
"""That a generator is asked for."""

_SHOWN = {" ": "␣", "\n": "↵"}  # in drawings, where a space would not be seen

# Verifiers that evaluate answers as Python or by sympy, which does, too.
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
# Without these nothing is called, and no power outgrows the memory.
_DANGEROUS = set("(*")


def installed() -> Any:
    """The package `reasoning_gym`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import reasoning_gym
        from reasoning_gym import factory  # noqa: F401, holds the names
    except ImportError as error:
        raise UserError(f"Reasoning Gym is not installed ({error}): {install_hint('gym')}.") from error
    return reasoning_gym


def version_installed() -> str:
    """The version of the package; errors as `installed`."""
    installed()
    return metadata.version("reasoning-gym")


class Generator:
    """One of its generators, with settings: puzzles by number, and their verifier."""

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int, size: int) -> None:
        """`size`: puzzles that there are.

        Raises:
            UserError: there is no such generator or setting, or a value is none of its.
        """
        package = installed()
        known = package.factory.DATASETS
        if name not in known:
            raise UserError(f"Reasoning Gym has no generator {name}; {neighbours(name, known)}")
        options = [field.name for field in fields(known[name][1]) if field.name not in ("seed", "size")]
        for setting in settings:
            if setting == "size":
                raise UserError(
                    f"size is how many puzzles {name} has: leave it out of its settings, {_listed(options)}."
                )
            if setting not in options:
                raise UserError(f"{name} has no setting {setting}; it has {_listed(options)}.")
        try:
            self._dataset = package.create_dataset(name, seed=seed, size=size, **settings)
        except Exception as error:  # assertions and whatever else a setting of a wrong kind leads to
            typed = " ".join(f"{setting}={value}" for setting, value in settings.items())
            raise UserError(
                f"{name} does not work with {typed or 'its default settings'} ({first_sentence(error)}); it has "
                f"{_listed(options)}."
            ) from error

    def puzzle(self, number: int) -> dict[str, Any]:
        """A puzzle: its question, answer and what the verifier needs.

        Raises:
            UserError: the generator fails.
        """
        try:
            with redirect_stdout(io.StringIO()):  # some print while they search
                entry: dict[str, Any] = self._dataset[number]
        except Exception as error:
            raise UserError(
                f"Reasoning Gym's generator failed at puzzle {number} ({first_sentence(error)})."
            ) from error
        return entry

    def score(self, answer: str, entry: Mapping[str, Any]) -> float:
        """Its verifier's score of an answer, 1 for a right one; 0 where it fails on what an answer looks like."""
        try:
            return float(self._dataset.score_answer(answer, entry))
        except Exception:
            return 0.0

    @property
    def evaluates(self) -> bool:
        """Whether its verifier evaluates answers as Python."""
        return bool(_EVALUATES.search(inspect.getsource(type(self._dataset).score_answer)))


def is_safe(generator: Generator, answers: Sequence[str]) -> bool:
    """Whether its verifier may be handed any text of the characters in right answers."""
    return not (generator.evaluates and any(_DANGEROUS.intersection(answer) for answer in answers))


def _listed(names: Sequence[str]) -> str:
    return f"the settings {', '.join(names)}" if names else "no settings"


@dataclass(frozen=True)
class Origin:
    """What a pack's puzzles were generated by."""

    generator: str
    settings: dict[str, Any]
    seed: int
    size: int  # puzzles of the generator
    version: str  # of Reasoning Gym
    template: tuple[str | None, ...]
    test: tuple[int, ...]  # numbers of the test puzzles

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """What `write` left in a pack.

        Raises:
            UserError: it is missing or broken.
        """
        file = folder / FILE
        try:
            content = read_json(file)
            origin = cls(**{field.name: content[field.name] for field in fields(cls)})
            numbers = (origin.seed, origin.size, *origin.test)
            if (
                not all(type(number) is int and number >= 0 for number in numbers)
                or not 0 < origin.size <= MOST_PUZZLES
                or not isinstance(origin.settings, dict)
                or not all(isinstance(text, str) for text in (origin.generator, origin.version))
                or not all(part is None or isinstance(part, str) for part in origin.template)
            ):
                raise ValueError("a field is of a wrong type")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}); build or download the pack again.") from error
        return cls(**{**vars(origin), "template": tuple(origin.template), "test": tuple(origin.test)})


class Verified(Evaluator):
    """Hands answers to the verifier of the puzzles' generator."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._origin = Origin.read(pack.path)
        vocabulary = read_vocabulary(pack.path / VOCABULARY_FILE)
        if vocabulary.size != pack.metadata.vocab_size:
            raise UserError(
                f"{pack.path / VOCABULARY_FILE} names {vocabulary.size} tokens, but the pack has "
                f"{pack.metadata.vocab_size}; build or download the pack again."
            )
        self._tokens = TextTokens(vocabulary.symbols)
        self._puzzles: dict[bytes, dict[str, Any]] | None = None
        self._counts: dict[str, tuple[int, float, int, int]] = {}
        self._generator: Generator | None = None
        self._allowed: set[str] | None = None  # characters of answers that the verifier may be handed; None: any
        self._problem = ""
        try:
            origin = self._origin
            self._generator = Generator(origin.generator, origin.settings, origin.seed, origin.size)
        except UserError as error:
            self._problem = str(error)

    def add(self, set_name: str, puzzles: Mapping[str, NDArray[Any]], answers: Tokens, q_halt: NDArray[Any]) -> None:
        accepted, total, verified, count = self._counts.get(set_name, (0, 0.0, 0, 0))
        for inputs, answer in zip(puzzles["inputs"], answers, strict=True):
            score = self._score(inputs, answer)
            count += 1
            if score is not None:
                verified += 1
                accepted += score >= 1
                total += score
        self._counts[set_name] = accepted, total, verified, count

    def _score(self, inputs: Tokens, answer: Tokens) -> float | None:
        """None where the verifier cannot be asked."""
        if self._generator is None:
            return None
        if self._puzzles is None:
            self._puzzles = self._generated(self._generator)
        entry = self._puzzles.get(inputs.astype(np.int64).tobytes())
        if entry is None:
            return None
        text = self._tokens.text(answer)
        if self._allowed is not None and not self._allowed.issuperset(text):
            return 0.0
        return self._generator.score(text, entry)

    def _generated(self, generator: Generator) -> dict[bytes, dict[str, Any]]:
        """The test puzzles by their inputs [S]."""
        template, length = Template(self._origin.template), self._pack.metadata.seq_len
        puzzles, texts = {}, []
        try:
            for number in self._origin.test:
                entry = generator.puzzle(number)
                slots = template.slots(entry["question"])
                tokens = self._tokens.question(slots) if slots else []
                if len(tokens) <= length:
                    puzzles[padded([tokens], length).tobytes()] = entry
                texts.append(entry["answer"] or "")
        except UserError as error:  # of another version
            self._problem = str(error)
            return {}
        if not is_safe(generator, texts):
            self._problem = f"{self._origin.generator}'s verifier evaluates answers as Python, which is not allowed."
            return {}
        if generator.evaluates:
            self._allowed = set().union(*map(set, texts))
        return puzzles

    def state(self) -> dict[str, tuple[int, float, int, int]]:
        """By set: answers that are accepted, sum of scores, answers that were verified, answers."""
        return self._counts

    def summary(self, states: Sequence[dict[str, tuple[int, float, int, int]]], folder: Path) -> str:
        lines = []
        for set_name in states[0]:
            of_ranks = (state.get(set_name, (0, 0.0, 0, 0)) for state in states)
            accepted, total, verified, count = map(sum, zip(*of_ranks, strict=True))
            name = self._origin.generator
            if verified:
                lines.append(
                    f"  {set_name}: {100 * accepted / verified:.2f} % of {verified} answers are accepted by Reasoning "
                    f"Gym's verifier of {name}; mean score {total / verified:.3f}."
                )
            if verified < count:
                why = self._problem or (
                    f"the version that is installed generates other puzzles than {self._origin.version}, which made "
                    "the pack: install that, or build the pack again."
                )
                lines.append(f"  {set_name}: {count - verified} answers were not verified: {printable(why)}")
        return "\n".join(lines)


class ReasoningGym(AnyTokens):
    """Texts in tokens of characters."""

    name = "reasoning_gym"

    def view(self, size: PuzzleSize, folder: Path | None = None) -> View:
        return _with_spaces_seen(super().view(size, folder))

    def evaluators(self, pack: Pack) -> list[Evaluator]:
        return [Verified(pack)] if pack.split == "test" else []

    def template(self, folder: Path) -> tuple[str | None, ...]:
        return Origin.read(folder).template

    # ---- from what a user gives to tokens, and from answers to what a user reads

    def view_of(self, form: PuzzleForm) -> View:
        return _with_spaces_seen(super().view_of(form))

    def example(self, form: PuzzleForm) -> None:
        """None: a model does not keep a question."""

    def is_cell(self, value: object, form: PuzzleForm) -> bool:
        return False

    def read_input(self, value: object, form: PuzzleForm) -> Tokens:
        """A question, whole or without what all have in common."""
        tokens = TextTokens(vocabulary_of(form).symbols).question(slots_of(value, Template(form.template or (None,))))
        if len(tokens) > form.seq_len:
            raise UserError(f"it has {len(tokens)} symbols, but the model takes at most {form.seq_len}.")
        row: NDArray[np.int64] = padded([tokens], form.seq_len)[0]
        return row

    def answer_value(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> str:
        """The text."""
        return TextTokens(vocabulary_of(form).symbols).text(answer)

    def answer_text(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> str:
        return json.dumps(self.answer_value(answer, puzzle, form), ensure_ascii=False)


def _with_spaces_seen(view: View) -> View:
    return View(tuple(_SHOWN.get(symbol, symbol) for symbol in view.symbols))


TASK = ReasoningGym()
