"""Builds a pack of puzzles of Reasoning Gym, or lists the generators that make one.

hrm data reasoning_gym --list
hrm data reasoning_gym --task n_queens --set n=6 max_remove=5 --output-dir data/six-queens
hrm data reasoning_gym --task rush_hour --train-size 10000 --set max_moves=20

Questions and answers are texts: a token is a character, and what all questions have in common is left out. An answer
ends with a symbol of its own. No question comes twice, so that none is trained on and tested. Evaluation hands answers
to the generator's own verifier, beside the exact match: a puzzle may have several right answers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from hrm.data.builders.common import check_at_least, fill_in, option, recorded, run_command
from hrm.data.builders.rush_hour import fewest_moves
from hrm.data.pack import SPLITS, replace_pack, write_examples, write_identifiers, write_provenance
from hrm.errors import UserError, first_sentence
from hrm.reading import parse_json
from hrm.tasks.reasoning_gym import MOST_PUZZLES, TASK, Generator, Origin, installed, is_safe, version_installed
from hrm.tasks.text import Template, TextTokens, padded
from hrm.tasks.tokens import Vocabulary

COMMAND = "reasoning_gym"  # `hrm data reasoning_gym`

LISTED_PUZZLES = 6
"""Of each generator, drawn for `--list`."""

# So many puzzles are drawn for each one that is wanted, at most: others are repetitions, or too long.
_DRAWS = 4
_PATIENCE = 12
_PROBED = 32  # puzzles that other processes must generate alike
_HASH_SEEDS = ("1", "2", "3")  # of those processes
_NOT_ALIKE = "it generates other puzzles each time, whatever its seed"
_PROBE = """
import json, sys
from hrm.tasks.reasoning_gym import Generator
found = []
for name, settings, seed, size, numbers in json.loads(sys.argv[1]):
    generator = Generator(name, settings, seed, size)
    texts = [[generator.puzzle(number)[part] for part in ("question", "answer")] for number in reversed(numbers)]
    found.append(texts[::-1])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Question:
    """A puzzle that can be learned."""

    number: int  # of the generator
    question: str
    answer: str


class Misfit(UserError):
    """A generator whose puzzles make no pack; says why."""


# Answers.


def _solve_rush_hour(question: str) -> str | None:
    return fewest_moves(question.partition("Board:\n")[2])


# Of generators that only verify answers, and give none.
SOLVERS: dict[str, Callable[[str], str | None]] = {"rush_hour": _solve_rush_hour}


def answer_of(name: str, generator: Generator, entry: Mapping[str, Any]) -> str | None:
    """A right answer to a puzzle: its own, else one that lies beside it, else a solver's; None where there is none.

    Raises:
        Misfit: the verifier does not accept the puzzle's own answer.
    """
    own = entry["answer"]
    if isinstance(own, str) and own:
        if generator.score(own, entry) < 1:
            raise Misfit(f"its verifier does not accept its own answer {own[:40]!r}")
        return own
    beside = [value for key, value in entry["metadata"].items() if "answer" in key or "solution" in key]
    texts = [
        value if isinstance(value, str) else json.dumps(value, default=str) for value in beside if value is not None
    ]
    if name in SOLVERS and (solved := SOLVERS[name](entry["question"])) is not None:
        texts.append(solved)
    return next((text for text in texts if text and generator.score(text, entry) >= 1), None)


# Puzzles.


def draw(name: str, generator: Generator, size: int, wanted: int, max_length: int) -> list[Question]:
    """`wanted` different puzzles of the `size` that a generator has, in the order of their numbers.

    Raises:
        Misfit: there are not as many.
    """
    found: dict[str, Question] = {}
    drawn, unanswered, long = 0, 0, 0
    with tqdm(total=wanted, desc=f"Puzzles of {name}", unit=" puzzles", delay=2, leave=False) as progress:
        for drawn in range(size):
            entry = generator.puzzle(drawn)
            question = entry["question"]
            if not isinstance(question, str):
                raise Misfit(f"its questions are no texts, but of type {type(question).__name__}")
            if question in found:
                continue
            answer = answer_of(name, generator, entry)
            if answer is None:
                unanswered += 1
            elif len(answer) >= max_length:
                long += 1
            else:
                found[question] = Question(drawn, question, answer)
                progress.update()
            if len(found) == wanted:
                return list(found.values())
            if drawn == _PATIENCE and not found:
                break  # nothing will come
    if unanswered and not found:
        raise Misfit("it gives no answers, only verifies them, so there is nothing to learn from")
    if long and not found:
        raise Misfit(f"its answers have more than the {max_length:,} characters of --max-length")
    raise Misfit(
        f"{drawn + 1:,} puzzles that were drawn have only {len(found):,} different questions that fit, and {wanted:,} "
        "are wanted: lower --train-size and --test-size, or let settings make larger puzzles"
    )


class Encoded:
    """Puzzles as texts without what all have in common, and their symbols."""

    def __init__(self, questions: Sequence[Question], max_length: int, max_symbols: int) -> None:
        """Leaves out what is too long.

        Raises:
            Misfit: all puzzles are, or there are too many symbols.
        """
        self.template = Template.of([question.question for question in questions])
        slots = [self.template.slots(question.question) or ("",) for question in questions]
        lengths = np.array([sum(map(len, parts)) + len(parts) - 1 for parts in slots])
        lengths = np.maximum(lengths, [len(question.answer) + 1 for question in questions])
        if lengths.min() > max_length:
            raise Misfit(f"its puzzles have {lengths.min():,} characters or more, and --max-length is {max_length:,}")
        kept = np.flatnonzero(lengths <= max_length).tolist()
        self.questions = [questions[index] for index in kept]
        self.slots = [slots[index] for index in kept]
        self.length = int(lengths[kept].max())
        texts = [*(question.answer for question in self.questions), *(part for parts in self.slots for part in parts)]
        self.symbols = TextTokens.symbols_of(texts, self.template)
        if len(self.symbols) > max_symbols:
            raise Misfit(f"it has {len(self.symbols):,} different characters, and --max-symbols is {max_symbols:,}")


def collect(arguments: argparse.Namespace, name: str, generator: Generator, size: int) -> Encoded:
    """As many puzzles as the command line asks for.

    Raises:
        Misfit: they do not fit.
    """
    wanted = arguments.train_size + arguments.test_size
    more = wanted
    while True:
        questions = draw(name, generator, size, more, arguments.max_length)
        encoded = Encoded(questions, arguments.max_length, arguments.max_symbols)
        if not is_safe(generator, [question.answer for question in questions]):
            raise Misfit("its verifier evaluates answers as Python, and their symbols can spell what must not be run")
        fitting = len(encoded.questions)
        if fitting >= wanted:
            return encoded
        if 2 * fitting < len(questions):
            raise Misfit(
                f"only {fitting:,} of {len(questions):,} puzzles that were drawn have no more characters than "
                f"--max-length, {arguments.max_length:,}: raise that, or let settings make smaller puzzles"
            )
        more += 2 * (wanted - fitting)


class Job(NamedTuple):
    """Puzzles that another process is to generate, too."""

    name: str
    settings: Mapping[str, Any]
    seed: int
    size: int
    numbers: Sequence[int]


def check_reproducible(job: Job, generator: Generator) -> None:
    """Misfit if other processes generate other puzzles: then a seed says nothing, and none could be verified later."""
    here = _texts(generator, job.numbers)
    if any(there != [here] for there in texts_elsewhere([job])):
        raise Misfit(_NOT_ALIKE)


def _texts(generator: Generator, numbers: Sequence[int]) -> list[list[Any]]:
    """Questions and answers."""
    puzzles = map(generator.puzzle, numbers)
    return [[puzzle["question"], puzzle["answer"]] for puzzle in puzzles]


def texts_elsewhere(jobs: Sequence[Job]) -> list[list[list[list[Any]]]]:
    """Questions and answers of all jobs as each of several other processes generates them, the last first.

    In each of them sets have another order, the same ones every time: one process alone might agree by chance.
    """
    path = os.pathsep.join(filter(None, sys.path))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _PROBE, json.dumps(jobs)],
                    env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for hash_seed in _HASH_SEEDS
        ]
        written = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise UserError("Reasoning Gym failed in another process; what it said stands above.")
    return [json.loads(text) for text in written]


def read_settings(values: Sequence[str]) -> dict[str, Any]:
    """The settings that `--set` gives, `name=value` each: JSON, or else text.

    Raises:
        UserError: one is not of this form.
    """
    settings: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise UserError(f"--set {value} is no setting; write name=value.")
        try:
            settings[name] = parse_json({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            settings[name] = text
    return settings


# The command line.


def listing(arguments: argparse.Namespace) -> str:
    """Which generators make packs by their default settings, and why the others do not."""
    rows, misfits, asked = {}, {}, {}
    size, count = _DRAWS * LISTED_PUZZLES, LISTED_PUZZLES
    for name in tqdm(sorted(installed().factory.DATASETS), "Trying generators", unit=" generators", leave=False):
        try:
            generator = Generator(name, {}, arguments.seed, size)
            questions = draw(name, generator, size, count, arguments.max_length)
            encoded = Encoded(questions, arguments.max_length, arguments.max_symbols)
            if not is_safe(generator, [question.answer for question in questions]):
                raise Misfit("its verifier evaluates answers as Python")
            answers = max(len(question.answer) for question in questions)
            rows[name] = f"{name:28}{encoded.length:>7,}{answers:>8,}{len(encoded.symbols):>9,}"
            asked[name] = _texts(generator, range(count))
        except UserError as error:
            misfits[name] = first_sentence(error)
    elsewhere = texts_elsewhere([Job(name, {}, arguments.seed, size, list(range(count))) for name in asked])
    for (name, here), *found in zip(asked.items(), *elsewhere, strict=True):
        if any(there != here for there in found):
            del rows[name]
            misfits[name] = _NOT_ALIKE
    head = f"{'--task':28}{'length':>7}{'answer':>8}{'symbols':>9}"
    note = f"In characters, by {count} puzzles of each at default settings; a pack of many may need more."
    left_out = [f"{name:28}{why}" for name, why in sorted(misfits.items())]
    return "\n".join([head, *rows.values(), "", note, "", "These make none:", *left_out])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without generating anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", metavar="NAME", help="the generator")
    parser.add_argument("--list", action="store_true", help="instead: list the generators that fit, with their sizes")
    parser.add_argument("--output-dir", type=Path, help="the pack to write (data/gym-<task>)")
    parser.add_argument("--train-size", type=int, help="training puzzles (5000)")
    parser.add_argument("--test-size", type=int, help="test puzzles (500)")
    parser.add_argument("--seed", type=int, default=42, help="of every random choice (%(default)s)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of the generator"
    )
    parser.add_argument(
        "--max-length", type=int, default=1024, help="characters of a question or answer, at most (%(default)s)"
    )
    parser.add_argument("--max-symbols", type=int, default=128, help="different ones, at most (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.list == (arguments.task is not None):
        raise UserError("Give one of --task and --list.")
    if arguments.list:
        for name in ("output_dir", "train_size", "test_size"):
            if getattr(arguments, name) is not None:
                raise UserError(f"{option(name)} does not apply to --list; leave it out.")
        if arguments.set:
            raise UserError("--set does not apply to --list; leave it out.")
    fill_in(arguments, {"train_size": 5000, "test_size": 500, "output_dir": Path(f"data/gym-{arguments.task}")})
    check_at_least(arguments, {"train_size": 1, "test_size": 1, "seed": 0, "max_length": 2, "max_symbols": 3})
    if arguments.train_size + arguments.test_size > MOST_PUZZLES // _DRAWS:
        raise UserError(f"--train-size and --test-size are more than {MOST_PUZZLES // _DRAWS:,}; lower them.")
    return arguments


def run(arguments: argparse.Namespace) -> str:
    """Lists the generators, or builds the pack that `parse_arguments` described; returns what to print."""
    return listing(arguments) if arguments.list else build(arguments)


def build(arguments: argparse.Namespace) -> str:
    """Builds a pack and returns a one-line summary."""
    begin = time.perf_counter()
    name, version = arguments.task, version_installed()
    settings, size = read_settings(arguments.set), _DRAWS * (arguments.train_size + arguments.test_size)
    with replace_pack(arguments.output_dir) as folder:
        generator = Generator(name, settings, arguments.seed, size)
        try:
            encoded = collect(arguments, name, generator, size)
            numbers = [question.number for question in encoded.questions[:: -(-len(encoded.questions) // _PROBED)]]
            check_reproducible(Job(name, settings, arguments.seed, size, numbers), generator)
        except Misfit as error:
            raise UserError(f"Reasoning Gym's {name} makes no pack: {error}.") from error
        tokens = TextTokens(encoded.symbols)
        dtype = np.min_scalar_type(len(encoded.symbols))
        ends = {
            "train": (0, arguments.train_size),
            "test": (arguments.train_size, arguments.train_size + arguments.test_size),
        }
        for split in SPLITS:
            rows = slice(*ends[split])
            inputs = padded([tokens.question(slots) for slots in encoded.slots[rows]], encoded.length, dtype)
            answers = [tokens.answer(question.answer) for question in encoded.questions[rows]]
            write_examples(folder / split, inputs, padded(answers, encoded.length, dtype), len(encoded.symbols) + 1)
        write_identifiers(folder, ["<blank>"])
        Vocabulary(tuple(encoded.symbols)).write(folder)
        tested = tuple(question.number for question in encoded.questions[slice(*ends["test"])])
        Origin(name, settings, arguments.seed, size, version, encoded.template.parts, tested).write(folder)
        kept = recorded(arguments, but=("output_dir", "list"))
        write_provenance(folder, f"hrm data {COMMAND}", kept, f"Reasoning Gym {version}", task=TASK.name)
    counts = f"{arguments.train_size:,} training and {arguments.test_size:,} test puzzles"
    return (
        f"{arguments.output_dir}: {counts} of {name}, {encoded.length:,} characters at most, {len(encoded.symbols):,} "
        f"symbols, from Reasoning Gym {version}, in {time.perf_counter() - begin:.1f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(run, lambda: parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
