"""Builds a maze pack from the hub, from CSV files or from random mazes.

hrm data maze --output-dir data/maze-30x30-hard-1k
hrm data maze --source-dir my-mazes --output-dir data/my-mazes --aug
hrm data maze --generate 30x30 --output-dir data/maze-30x30

Generated mazes have walls like the published ones and paths of the same least length, but start and goal are about as
far apart as the maze allows where the published ones are random cells far enough apart. Their paths are a little longer
(30x30: 116 moves on average; 115 with random cells), and mazes with few long paths are as frequent as those with many.
"""

import argparse
import csv
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrm.data.builders.common import (
    check_at_least,
    count_repeats,
    csv_lines,
    fill_in,
    is_generated,
    recorded,
    remarks,
    run_command,
    source_files,
)
from hrm.data.builders.maze_puzzles import random_mazes, shortest_paths
from hrm.data.pack import PackMetadata, PackSet, replace_pack, write_identifiers, write_provenance, write_split
from hrm.errors import UserError, shortened
from hrm.tasks.dihedral import NUM_DIHEDRAL
from hrm.tasks.maze import (
    PAD_TOKEN,
    PATH,
    TASK,
    VOCAB_SIZE,
    Mazes,
    Tokens,
    dihedral_variants,
    is_maze,
    is_shortest_path,
    parse_maze,
    side_of,
)

COMMAND = "maze"  # `hrm data maze`

DEFAULT_REPO = "sapientinc/maze-30x30-hard-1k"
SIDES = range(3, 65)

# Fewest moves of the published mazes; on other sizes, twice the side leaves enough random mazes.
PUBLISHED_SIDE, PUBLISHED_MIN_LENGTH = 30, 110


def least_moves(side: int) -> int:
    """From start to goal of a generated maze, where nothing else is asked for."""
    return PUBLISHED_MIN_LENGTH if side == PUBLISHED_SIDE else 2 * side


@dataclass(frozen=True)
class Puzzles:
    """Mazes and their answers, tokens `[N, n, n]`."""

    questions: Mazes
    answers: Mazes

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: NDArray[np.int64]) -> "Puzzles":
        return Puzzles(self.questions[rows], self.answers[rows])


def read_csv(path: Path) -> Puzzles:
    """The mazes of a CSV file (gzipped if its name ends so) with columns question and answer.

    Answers are taken as they stand: `faults` tells whether they are shortest paths.

    Raises:
        UserError: if the file cannot be read or a line is malformed; names the line.
    """
    with csv_lines(path) as lines:
        reader = csv.DictReader(lines)
        records = [(reader.line_num, record) for record in reader]
    columns = list(reader.fieldnames or [])
    for column in ("question", "answer"):
        if column not in columns:
            raise UserError(
                f"{path} has no column {column!r} (its first line names: {shortened(', '.join(columns))}); add it."
            )
    if not records:
        raise UserError(f"{path} holds no maze; add lines to it.")

    rows: list[Tokens] = []  # [2, cells]
    for line, record in records:
        question, answer = (
            _parse(record[column], f"{path}, line {line}, {column}") for column in ("question", "answer")
        )
        if not is_maze(question[None])[0]:
            raise UserError(f"{path}, line {line}: a question has one S, one G and no o; correct or remove the line.")
        cells = rows[0].shape[1] if rows else len(question)
        if not len(question) == len(answer) == cells:
            raise UserError(
                f"{path}, line {line}: the question has {len(question)} cells and the answer {len(answer)}, but the "
                f"pack's mazes have {cells}; correct or remove the line."
            )
        rows.append(np.stack([question, answer]))
    side = side_of(rows[0].shape[1])
    questions, answers = np.stack(rows, axis=1).reshape(2, -1, side, side)
    return Puzzles(questions, answers)


def _parse(text: str | None, location: str) -> Tokens:
    try:
        return parse_maze(text or "")
    except UserError as error:
        raise UserError(f"{location}: {error}") from error


def faults(train: Puzzles, test: Puzzles) -> str:
    """What a reader of results should know of mazes that somebody else made, for the summary."""
    count = len(train) + len(test)
    questions, answers = (
        np.concatenate(mazes).reshape(count, -1)
        for mazes in ((train.questions, test.questions), (train.answers, test.answers))
    )
    wrong = count - int(np.count_nonzero(is_shortest_path(questions, answers)))
    trained = {bytes(variant) for variants in dihedral_variants(train.questions) for variant in variants}
    known = sum(bytes(maze) in trained for maze in test.questions)
    return remarks(
        {
            "answers are not shortest paths": int(wrong),
            "test mazes are augmentations of training mazes": known,
            "train mazes repeat another one": count_repeats(train.questions),
            "test mazes repeat another one": count_repeats(test.questions),
        }
    )


def parse_size(text: str) -> int:
    """The side of mazes whose size is written as "30x30"; UserError for sizes that are not generated."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or match[1] != match[2] or int(match[1]) not in SIDES:
        raise UserError(
            f"--generate {text} is no size of a square maze; choose one from {SIDES[0]}x{SIDES[0]} to "
            f"{SIDES[-1]}x{SIDES[-1]}."
        )
    return int(match[1])


def with_variants(puzzles: Puzzles, solve: bool) -> Puzzles:
    """Each maze with its 7 rotations and reflections after it.

    Args:
        solve: variants are solved anew, so that among equal shortest paths the same rule chooses in each of them.
            Otherwise their answers are those of the maze, rotated and reflected, as in the published packs.
    """
    side = puzzles.questions.shape[1]
    questions = dihedral_variants(puzzles.questions).reshape(-1, side, side)
    if solve:
        return Puzzles(questions, shortest_paths(questions))
    return Puzzles(questions, dihedral_variants(puzzles.answers).reshape(-1, side, side))


def write_puzzles(folder: Path, puzzles: Puzzles, group_size: int) -> None:
    """Write one split, with the metadata of the published maze packs: a group is a maze with its variants."""
    inputs, labels = (mazes.reshape(len(puzzles), -1) for mazes in (puzzles.questions, puzzles.answers))
    examples = PackSet(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=np.zeros(len(inputs), dtype=np.int32),
        puzzle_indices=np.arange(len(inputs) + 1, dtype=np.int32),
        group_indices=np.arange(0, len(inputs) + 1, group_size, dtype=np.int32),
    )
    metadata = PackMetadata(
        pad_id=PAD_TOKEN,
        ignore_label_id=PAD_TOKEN,
        blank_identifier_id=0,
        vocab_size=VOCAB_SIZE,
        seq_len=inputs.shape[1],
        num_puzzle_identifiers=1,
        total_groups=len(puzzles) // group_size,
        mean_puzzle_examples=1,
        sets=("all",),
    )
    write_split(folder, metadata, {"all": examples})


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without looking at any maze."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("data/maze-30x30-hard-1k"), help="the pack to write (%(default)s)"
    )
    parser.add_argument(
        "--aug",
        action="store_true",
        help="add the 7 rotations and reflections of training mazes, those of generated mazes solved anew",
    )
    parser.add_argument("--seed", type=int, default=42, help="of every random choice (%(default)s)")
    source = parser.add_argument_group("source: one of")
    source.add_argument("--source-repo", help=f"hub dataset with train.csv and test.csv (default: {DEFAULT_REPO})")
    source.add_argument("--source-dir", type=Path, help="folder with train.csv and test.csv, or .csv.gz")
    source.add_argument("--generate", metavar="SIZE", help="random mazes, of 30x30 cells for example")
    files = parser.add_argument_group("with --source-repo or --source-dir")
    files.add_argument("--subsample-size", type=int, help="use at most so many training mazes, drawn at random")
    generated = parser.add_argument_group("with --generate")
    generated.add_argument("--train-size", type=int, help="training mazes (default: 1000)")
    generated.add_argument("--test-size", type=int, help="test mazes (default: 1000)")
    generated.add_argument(
        "--min-length",
        type=int,
        help=f"moves from start to goal, at least (default: {PUBLISHED_MIN_LENGTH} for {PUBLISHED_SIDE}x"
        f"{PUBLISHED_SIDE}, else twice the side)",
    )
    arguments = parser.parse_args(argv)

    of_generated = ("train_size", "test_size", "min_length")
    generating = is_generated(arguments, "mazes", ("subsample_size",), of_generated, DEFAULT_REPO)
    check_at_least(arguments, {"seed": 0, "subsample_size": 1, "train_size": 1, "test_size": 1, "min_length": 1})
    if generating:
        side = parse_size(arguments.generate)
        fill_in(arguments, {"train_size": 1000, "test_size": 1000, "min_length": least_moves(side)})
    return arguments


def build(arguments: argparse.Namespace) -> str:
    """Builds the pack that `parse_arguments` described and returns a one-line summary."""
    begin = time.perf_counter()
    rng = np.random.default_rng(arguments.seed)
    files: dict[str, Path] = {}
    with replace_pack(arguments.output_dir) as folder:
        if arguments.generate is not None:
            count = arguments.test_size + arguments.train_size
            mazes, share = random_mazes(count, parse_size(arguments.generate), arguments.min_length, rng)
            puzzles = Puzzles(mazes, shortest_paths(mazes))
            test, train = (puzzles.take(rows) for rows in np.split(np.arange(count), [arguments.test_size]))
            source = f"random mazes with shortest paths of {arguments.min_length} moves or more"
            remark = f"; {share:.2%} of random mazes have one"
        else:
            files, source = source_files(arguments)
            train, test = (read_csv(file) for file in files.values())
            if test.questions.shape[1] != train.questions.shape[1]:
                raise UserError(
                    f"{files['test']} has mazes of {test.questions[0].size} cells and {files['train']} of "
                    f"{train.questions[0].size}; a pack holds mazes of one size."
                )
            if arguments.subsample_size is not None and arguments.subsample_size < len(train):
                train = train.take(np.sort(rng.choice(len(train), arguments.subsample_size, replace=False)))
            remark = faults(train, test)
        if arguments.aug:
            augmented = with_variants(train, solve=arguments.generate is not None)
            write_puzzles(folder / "train", augmented, NUM_DIHEDRAL)
        else:
            write_puzzles(folder / "train", train, 1)
        write_puzzles(folder / "test", test, 1)
        write_identifiers(folder, ["<blank>"])
        read = {file.name: file for file in files.values()}
        write_provenance(folder, "dataset/build_maze_dataset.py", recorded(arguments), source, read, task=TASK.name)
    moves = np.count_nonzero(test.answers == PATH, axis=(1, 2)) + 1
    return (
        f"{arguments.output_dir}: {len(train):,} training mazes{' with 7 augmentations each' * arguments.aug} and "
        f"{len(test):,} test mazes of {moves.mean():.1f} moves on average, from {source}, "
        f"in {time.perf_counter() - begin:.1f} s{remark}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(build, lambda: parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
