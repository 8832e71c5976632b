"""Builds a pack from your own examples, one JSON object a line.

hrm data custom --train train.jsonl --test test.jsonl --output-dir data/mine
hrm data custom --train all.jsonl --test-fraction 0.1 --output-dir data/mine

A line is {"input": [...], "output": [...]}, lists of numbers and strings, or grids, which are lists of equal rows; of
any size, since short ones are padded. A null in an output is not learned, and neither is the padding: where the length
of an answer is part of it, end it with a symbol of your own. Two more fields say how lines belong together:
  "group"   lines of one group are variants of one original, such as its augmentations: training draws one of them at
            a time, and none is tested while others are trained on; without it, a line is a group of its own
  "puzzle"  names what the model is to learn a vector for, such as the rule that the line follows; lines of one group
            and one puzzle are examples of the same; without it, a line is a puzzle of its own and has no name
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hrm.data.builders.common import check_at_least, count_known, count_repeats, recorded, remarks, run_command
from hrm.data.pack import (
    SPLITS,
    PackMetadata,
    PackSet,
    replace_pack,
    write_identifiers,
    write_provenance,
    write_split,
)
from hrm.errors import UserError
from hrm.reading import open_lines, parse_json
from hrm.tasks.tokens import PAD_TOKEN, TASK, Symbol, Vocabulary, is_symbol, parse_vocabulary, read_vocabulary

COMMAND = "custom"  # `hrm data custom`

FIELDS = {"input": True, "output": True, "group": False, "puzzle": False}  # and whether a line must have them
BLANK = "<blank>"

Shape = tuple[int, ...]  # (length,) or (rows, columns)
Tokens = NDArray[np.int32]  # of such a shape


@dataclass(frozen=True)
class Example:
    """One line; `location` is its file and number, which also names its group and puzzle if the line does not."""

    location: str
    input: Tokens
    output: Tokens
    group: str | None
    puzzle: str | None


# Reading.


class Reader:
    """Turns lines into examples. Without a vocabulary, symbols get tokens in the order in which they appear."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._given = vocabulary
        self._tokens: dict[Symbol | None, int] = {None: PAD_TOKEN} if vocabulary is None else vocabulary.tokens()

    def read(self, path: Path) -> list[Example]:
        """The examples of a file.

        Raises:
            UserError: if the file cannot be read or a line is malformed; names the line.
        """
        examples = []
        try:
            with open_lines(path) as stream:
                lines = tqdm(stream, desc=f"Reading {path.name}", unit=" lines", delay=2, leave=False)
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        examples.append(self._example(line, f"{path}, line {number}"))
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); give a UTF-8 file of JSON lines.") from error
        if not examples:
            raise UserError(f"{path} holds no example; add lines to it.")
        return examples

    def vocabulary(self) -> tuple[Vocabulary, Tokens]:
        """The vocabulary of all that was read, and its token `[tokens of the examples]` for each of theirs."""
        vocabulary = self._given or Vocabulary.infer(symbol for symbol in self._tokens if symbol is not None)
        final = vocabulary.tokens()
        return vocabulary, np.array([final[symbol] for symbol in self._tokens], dtype=np.int32)

    def _example(self, line: str, location: str) -> Example:
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{location}: this is not valid JSON ({error}); correct or remove the line.") from error
        if not isinstance(record, dict):
            raise UserError(f'{location}: this is no object; write {{"input": [...], "output": [...]}}.')
        for name in record:
            if name not in FIELDS:
                raise UserError(f"{location}: there is no field {name!r}; a line has {', '.join(FIELDS)}.")
        for name, needed in FIELDS.items():
            if needed and name not in record:
                raise UserError(f"{location}: the field {name!r} is missing; add it.")
        question, answer = (self._cells(record[name], f"{location}, {name}") for name in ("input", "output"))
        if question.ndim != answer.ndim:
            raise UserError(f"{location}: one of input and output is a list and one a grid; make both the same.")
        if not answer.any():
            raise UserError(f"{location}, output: there is nothing but null; give something to learn.")
        group, puzzle = (self._name(record.get(name), f"{location}, {name}") for name in ("group", "puzzle"))
        return Example(location, question, answer, group, puzzle)

    def _cells(self, value: object, location: str) -> Tokens:
        if not isinstance(value, list) or not value:
            raise UserError(f"{location}: {_shown(value)} is not a list of symbols; give one with at least one symbol.")
        rows = value if isinstance(value[0], list) else [value]
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, list) or not row or len(row) != len(rows[0]):
                raise UserError(f"{location}: row {number} is {_shown(row)}; rows of a grid are lists of one length.")
        tokens = np.array([[self._token(symbol, location) for symbol in row] for row in rows], dtype=np.int32)
        return tokens if isinstance(value[0], list) else tokens[0]

    def _token(self, symbol: object, location: str) -> int:
        # True equals 1 and would be found in its location.
        if not (symbol is None or is_symbol(symbol)):
            raise UserError(f"{location}: {_shown(symbol)} is not a symbol; symbols are strings and numbers.")
        if self._given is None:
            return self._tokens.setdefault(symbol, len(self._tokens))
        if symbol not in self._tokens:
            raise UserError(f"{location}: {_shown(symbol)} is not in the vocabulary; correct it, or extend --vocab.")
        return self._tokens[symbol]

    def _name(self, value: object, location: str) -> str | None:
        if value is not None and (type(value) not in (int, str) or value == ""):
            raise UserError(f"{location}: {_shown(value)} is no name; give a string or a whole number.")
        return None if value is None else str(value)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


# Splitting.


def check_apart(train: Sequence[Example], test: Sequence[Example]) -> None:
    """UserError if a group is in both."""
    locations = {example.group: example.location for example in train if example.group is not None}
    for example in test:
        if example.group in locations:
            raise UserError(
                f"{example.location}: group {example.group!r} is trained on in {locations[example.group]}; keep a "
                "group in one file, or leave it out if these lines are no variants of one another."
            )


def split_groups(
    examples: Sequence[Example], test_fraction: float, rng: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Training and test examples, in their old order; a random `test_fraction` of the groups is tested."""
    groups = list(dict.fromkeys(example.group or example.location for example in examples))
    if len(groups) < 2:
        raise UserError("--test-fraction cannot split a single group; give test examples with --test.")
    count = min(max(round(test_fraction * len(groups)), 1), len(groups) - 1)
    tested = {groups[index] for index in rng.choice(len(groups), count, replace=False)}
    sides: tuple[list[Example], list[Example]] = [], []
    for example in examples:
        sides[(example.group or example.location) in tested].append(example)
    return sides


# The pack.


def common_shape(examples: Sequence[Example], wanted: Shape | None) -> Shape:
    """The shape that all inputs and outputs fit into, the smallest unless one is `wanted`.

    Raises:
        UserError: for lists among grids, or an example that is larger than wanted; names the line.
    """
    first = examples[0]
    kinds = {1: "a list", 2: "a grid"}
    largest = np.maximum(first.input.shape, first.output.shape)
    for example in examples:
        if example.input.ndim != first.input.ndim:
            raise UserError(
                f"{example.location}: this is {kinds[example.input.ndim]}, but {first.location} has "
                f"{kinds[first.input.ndim]}; a pack holds one kind."
            )
        size = np.maximum(example.input.shape, example.output.shape)
        if wanted is not None and (len(wanted) != len(size) or (size > wanted).any()):
            raise UserError(
                f"{example.location}: this example of {_written(size)} does not fit --shape {_written(wanted)}; give a "
                "larger one, or none."
            )
        largest = np.maximum(largest, size)
    return wanted or tuple(map(int, largest))


def _written(shape: Sequence[int] | NDArray[np.int64]) -> str:
    return "x".join(map(str, shape))


def pack_examples(
    examples: Sequence[Example], shape: Shape, final_tokens: Tokens, identifiers: dict[str, int], vocab_size: int
) -> PackSet:
    """The arrays of one split, groups and puzzles in the order in which they first appear."""
    groups: dict[str, dict[str, list[Example]]] = {}
    for example in examples:
        puzzles = groups.setdefault(example.group or example.location, {})
        puzzles.setdefault(example.puzzle or example.location, []).append(example)
    all_puzzles = [puzzle for puzzles in groups.values() for puzzle in puzzles.values()]
    dtype = np.min_scalar_type(vocab_size - 1)
    inputs, labels = (np.full((len(examples), *shape), PAD_TOKEN, dtype=dtype) for _ in range(2))
    for row, example in enumerate(example for puzzle in all_puzzles for example in puzzle):
        for array, tokens in ((inputs, example.input), (labels, example.output)):
            array[row][tuple(map(slice, tokens.shape))] = final_tokens[tokens]
    return PackSet(
        inputs=inputs.reshape(len(examples), -1),
        labels=labels.reshape(len(examples), -1),
        puzzle_identifiers=np.array([identifiers[puzzle[0].puzzle or BLANK] for puzzle in all_puzzles], dtype=np.int32),
        puzzle_indices=np.cumsum([0, *map(len, all_puzzles)], dtype=np.int32),
        group_indices=np.cumsum([0, *map(len, groups.values())], dtype=np.int32),
    )


def faults(train: PackSet, test: PackSet) -> str:
    """What a reader of results should know of the examples, for the summary. Inputs differ by identifier, too."""

    def questions(data: PackSet) -> list[bytes]:
        owners = np.repeat(data.puzzle_identifiers, np.diff(data.puzzle_indices)).astype(np.int64)
        return [bytes(owner) + bytes(row) for owner, row in zip(owners, data.inputs, strict=True)]

    asked = {split: questions(data) for split, data in zip(SPLITS, (train, test), strict=True)}
    counts = {"test inputs are also trained on": count_known(asked["test"], asked["train"])}
    for split, data in zip(SPLITS, (train, test), strict=True):
        whole = [question + bytes(row) for question, row in zip(asked[split], data.labels, strict=True)]
        repeats = count_repeats(whole)
        counts[f"{split} examples repeat another one"] = repeats
        counts[f"{split} inputs stand there again with another output"] = count_repeats(asked[split]) - repeats
    return remarks(counts)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without looking at any example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="the pack to write")
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE", required=True, help="examples to train on")
    parser.add_argument("--test", type=Path, nargs="+", metavar="FILE", help="examples to test on")
    parser.add_argument("--test-fraction", type=float, help="or: test on this share of the groups of --train")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of groups to test on (%(default)s)")
    parser.add_argument(
        "--vocab", help="all symbols, as a JSON list or a file with one, such as another pack's vocabulary.json"
    )
    parser.add_argument("--shape", help="pad to this length or grid, 81 or 9x9 (default: what the largest needs)")
    arguments = parser.parse_args(argv)
    if (arguments.test is None) == (arguments.test_fraction is None):
        raise UserError("There are no test examples or two kinds of them; give one of --test and --test-fraction.")
    if arguments.test_fraction is not None and not 0 < arguments.test_fraction < 1:
        raise UserError(f"--test-fraction {arguments.test_fraction} is out of range; choose more than 0, less than 1.")
    check_at_least(arguments, {"seed": 0})
    if arguments.shape is not None and not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", arguments.shape):
        raise UserError(f"--shape {arguments.shape} is no length or grid; write it as 81 or 9x9.")
    return arguments


def build(arguments: argparse.Namespace) -> str:
    """Builds the pack that `parse_arguments` described and returns a one-line summary."""
    begin = time.perf_counter()
    given = None
    if arguments.vocab is not None:
        inline = arguments.vocab.lstrip().startswith("[")
        given = parse_vocabulary(arguments.vocab, "--vocab") if inline else read_vocabulary(Path(arguments.vocab))
    with replace_pack(arguments.output_dir) as folder:
        reader = Reader(given)
        train = [example for path in arguments.train for example in reader.read(path)]
        if arguments.test is not None:
            test = [example for path in arguments.test for example in reader.read(path)]
            check_apart(train, test)
        else:
            train, test = split_groups(train, arguments.test_fraction, np.random.default_rng(arguments.seed))
        wanted = None if arguments.shape is None else tuple(map(int, arguments.shape.split("x")))
        shape = common_shape([*train, *test], wanted)
        vocabulary, final_tokens = reader.vocabulary()
        identifiers = {BLANK: 0}
        for example in (*train, *test):
            identifiers.setdefault(example.puzzle or BLANK, len(identifiers))
        sets = {
            split: pack_examples(examples, shape, final_tokens, identifiers, vocabulary.size)
            for split, examples in zip(SPLITS, (train, test), strict=True)
        }
        for split, data in sets.items():
            metadata = PackMetadata(
                pad_id=PAD_TOKEN,
                ignore_label_id=PAD_TOKEN,
                blank_identifier_id=0,
                vocab_size=vocabulary.size,
                seq_len=data.inputs.shape[1],
                num_puzzle_identifiers=len(identifiers),
                total_groups=len(data.group_indices) - 1,
                mean_puzzle_examples=len(data.inputs) / len(data.puzzle_identifiers),
                sets=("all",),
            )
            write_split(folder / split, metadata, {"all": data})
        write_identifiers(folder, list(identifiers))
        vocabulary.write(folder)
        files = {str(path): path for path in (*arguments.train, *(arguments.test or []))}
        kept = recorded(arguments) | {"shape": _written(shape)}  # the shape is needed to read its grids
        write_provenance(folder, "dataset/build_custom_dataset.py", kept, "your own examples", files, task=TASK.name)
    return (
        f"{arguments.output_dir}: {len(train):,} training and {len(test):,} test examples of {_written(shape)} cells, "
        f"{len(vocabulary.symbols):,} symbols, {len(identifiers) - 1:,} named puzzles, in "
        f"{time.perf_counter() - begin:.1f} s{faults(sets['train'], sets['test'])}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(build, lambda: parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
