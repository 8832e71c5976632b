"""Builds a Sudoku pack from the hub, from CSV files or from generated puzzles.

hrm data sudoku --output-dir data/sudoku-extreme-1k-aug-1000 --subsample-size 1000 --num-aug 1000
hrm data sudoku --source-dir my-puzzles --output-dir data/my-puzzles
hrm data sudoku --generate 2x2 --train-size 5000 --test-size 1000 --output-dir data/sudoku-4x4
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hrm.data.builders.common import (
    check_at_least,
    count_known,
    count_repeats,
    csv_lines,
    fill_in,
    is_generated,
    recorded,
    remarks,
    run_command,
    source_files,
    source_name,
)
from hrm.data.builders.sudoku_puzzles import all_grids, dig_holes, random_grids, symmetry_invariant
from hrm.data.pack import SPLITS, PackMetadata, PackSet, replace_pack, write_identifiers, write_provenance, write_split
from hrm.errors import UserError, shortened
from hrm.tasks.sudoku import (
    PAD_TOKEN,
    TASK,
    BoxShape,
    Grids,
    encode_tokens,
    is_solved,
    parse_grid,
    random_symmetries,
)
from hrm.tasks.sudoku_solver import count_ambiguous

COMMAND = "sudoku"  # `hrm data sudoku`

DEFAULT_REPO = "sapientinc/sudoku-extreme"

SECONDS_OF_CHECKING = 10.0
"""How long to look for a second solution of each split's puzzles."""

# Rows of a CSV file, and augmentations, worked on together: bounds the memory beyond the pack's own arrays.
CHUNK = 1 << 14


@dataclass(frozen=True)
class GeneratorLimits:
    """What can be generated with one box shape."""

    grids: int  # complete grids there are
    fewest_givens: int  # with which a puzzle can have a single solution
    default_givens: int  # which holes dug at random reach nearly always


GENERATOR_LIMITS = {
    BoxShape(2, 2): GeneratorLimits(grids=288, fewest_givens=4, default_givens=6),
    BoxShape(2, 3): GeneratorLimits(grids=28_200_960, fewest_givens=8, default_givens=14),
    BoxShape(3, 3): GeneratorLimits(grids=6_670_903_752_021_072_936_960, fewest_givens=17, default_givens=30),
}

# So many random grids in a row without a new puzzle, and the generator gives up.
PATIENCE = 4096


@dataclass(frozen=True)
class Puzzles:
    """Puzzles and their solutions, digits `[N, cells]`; how hard they are rated and where they are from, if known."""

    questions: Grids
    answers: Grids
    ratings: NDArray[np.int64] | None = None  # [N]
    sources: NDArray[np.object_] | None = None  # [N] str: few different ones, so that references take less room

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: NDArray[np.int64]) -> "Puzzles":
        return Puzzles(
            self.questions[rows],
            self.answers[rows],
            None if self.ratings is None else self.ratings[rows],
            None if self.sources is None else self.sources[rows],
        )


# Puzzles from CSV files.


@dataclass
class _Lines:
    """Lines of a CSV file by columns; those of columns that it lacks stay empty."""

    numbers: list[int] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    ratings: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def read_csv(path: Path, min_difficulty: int | None) -> tuple[BoxShape, Puzzles]:
    """The puzzles of a CSV file (gzipped if its name ends so) with columns question and answer, and where given rating
    and source.

    Raises:
        UserError: if the file cannot be read or a line is malformed; names the line.
    """
    required = ["question", "answer"] + (["rating"] if min_difficulty is not None else [])
    blocks: list[Puzzles] = []
    shape: BoxShape | None = None
    with csv_lines(path) as lines_of_file:
        reader = csv.reader(lines_of_file)
        header = next(reader, [])
        for column in required:
            if column not in header:
                found = shortened(", ".join(header)) or "none"
                raise UserError(f"{path} has no column {column!r} (its first line names: {found}); add it.")
        wanted = [*required, "rating", "source"]
        columns = {name: header.index(name) for name in wanted if name in header}
        rows = ((reader.line_num, row) for row in reader)
        for lines in _csv_chunks(rows, columns, path, min_difficulty):
            if shape is None:
                with _located(path, lines.numbers[0], "question"):
                    shape = BoxShape.from_cells(len(lines.questions[0]))
            block = Puzzles(
                _parse_column(lines.questions, shape, path, lines.numbers, "question"),
                _parse_column(lines.answers, shape, path, lines.numbers, "answer"),
                np.array(lines.ratings) if "rating" in columns else None,
                np.array(lines.sources, dtype=object) if "source" in columns else None,
            )
            _check_answers(block, shape, path, lines.numbers)
            blocks.append(block)
    if shape is None:
        rated = "" if min_difficulty is None else f" rated {min_difficulty} or more; lower --min-difficulty"
        raise UserError(f"{path} holds no puzzle{rated or '; add lines to it'}.")
    ratings = [block.ratings for block in blocks if block.ratings is not None]
    sources = [block.sources for block in blocks if block.sources is not None]
    return shape, Puzzles(
        np.concatenate([block.questions for block in blocks]),
        np.concatenate([block.answers for block in blocks]),
        np.concatenate(ratings) if ratings else None,
        np.concatenate(sources) if sources else None,
    )


def _csv_chunks(
    rows: Iterator[tuple[int, list[str]]], columns: Mapping[str, int], path: Path, min_difficulty: int | None
) -> Iterator[_Lines]:
    """Chunks of lines, without those rated below `min_difficulty`; `columns` says which field of a line each is."""
    lines = _Lines()
    for number, row in tqdm(rows, desc=f"Reading {path.name}", unit=" lines", delay=2, leave=False):
        if not row:
            continue
        if len(row) <= max(columns.values()):
            raise UserError(f"{path}, line {number}: its {len(row)} fields are too few; correct or remove the line.")
        if "rating" in columns:
            text = row[columns["rating"]]
            try:
                rating = int(text)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: rating {shortened(text)!r} is no whole number; correct or remove the line."
                ) from error
            if not -(2**63) <= rating < 2**63:
                raise UserError(f"{path}, line {number}: rating {text} is beyond 64 bits; correct or remove the line.")
            if min_difficulty is not None and rating < min_difficulty:
                continue
            lines.ratings.append(rating)
        if "source" in columns:
            lines.sources.append(source_name(row[columns["source"]], path, number))
        lines.numbers.append(number)
        lines.questions.append(row[columns["question"]])
        lines.answers.append(row[columns["answer"]])
        if len(lines.numbers) == CHUNK:
            yield lines
            lines = _Lines()
    if lines.numbers:
        yield lines


@contextmanager
def _located(path: Path, line: int, column: str) -> Iterator[None]:
    """Names file, line and column in errors about a board."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, line {line}, {column}: {error}") from error


def _parse_column(texts: list[str], shape: BoxShape, path: Path, lines: list[int], column: str) -> Grids:
    if all(len(text) == shape.cells for text in texts):
        symbols = np.frombuffer("".join(texts).encode("ascii", "replace"), dtype=np.uint8)
        digits = np.where(symbols == ord("."), 0, symbols - np.uint8(ord("0"))).astype(np.uint8)
        if digits.max() <= shape.side:
            return digits.reshape(-1, shape.cells)
    # Something is odd in these lines: read them one by one to say where.
    boards = np.empty((len(texts), shape.cells), dtype=np.uint8)
    for row, (text, line) in enumerate(zip(texts, lines, strict=True)):
        with _located(path, line, column):
            boards[row] = parse_grid(text, shape)
    return boards


def _check_answers(puzzles: Puzzles, shape: BoxShape, path: Path, lines: list[int]) -> None:
    unsolved = ~is_solved(puzzles.answers, shape)
    contradicted = ((puzzles.questions != 0) & (puzzles.questions != puzzles.answers)).any(1)
    for wrong, problem in ((unsolved, "is not a solved board"), (contradicted, "contradicts the question")):
        if wrong.any():
            line = lines[int(wrong.argmax())]
            raise UserError(f"{path}, line {line}: the answer {problem}; correct or remove the line.")


def read_source(train_file: Path, test_file: Path, min_difficulty: int | None) -> tuple[BoxShape, Puzzles, Puzzles]:
    """Box shape, training and test puzzles of two CSV files."""
    shape, train = read_csv(train_file, min_difficulty)
    test_shape, test = read_csv(test_file, min_difficulty)
    if test_shape != shape:
        raise UserError(
            f"{test_file} has boards of {test_shape.cells} cells and {train_file} of {shape.cells}; "
            "a pack holds boards of one size."
        )
    return shape, train, test


# Generated puzzles.


def generate(
    shape: BoxShape, train_size: int, test_size: int, givens: int, rng: np.random.Generator
) -> tuple[Puzzles, Puzzles]:
    """Different random puzzles with one solution each, `givens` filled cells, for training and test.

    No solution of a training puzzle solves a test puzzle; on 9x9 boards none is equivalent to one either.

    Raises:
        UserError: if there are not so many puzzles, or random search finds no more.
    """
    limits = GENERATOR_LIMITS[shape]
    if not limits.fewest_givens <= givens < shape.cells:
        raise UserError(
            f"--givens {givens} is out of range for {shape} boxes; choose {limits.fewest_givens} to {shape.cells - 1}."
        )
    if shape == BoxShape(2, 2):
        # So few that the two sides share them out beforehand.
        grids = rng.permutation(all_grids(shape))
        share = round(limits.grids * test_size / (train_size + test_size))
        test_grids, train_grids = np.split(grids, [min(max(share, 1), limits.grids - 1)])
        available = {"--test-size": len(test_grids), "--train-size": len(train_grids)}

        def draw_test(count: int) -> Grids:
            return rng.choice(test_grids, count)

        def draw_train(count: int) -> Grids:
            return rng.choice(train_grids, count)
    else:
        available = {"--test-size": limits.grids, "--train-size": limits.grids}

        def draw_test(count: int) -> Grids:
            return random_grids(count, shape, rng)

        def draw_train(count: int) -> Grids:
            grids = random_grids(count, shape, rng)
            return grids[~np.isin(_kinship(grids, shape), held_out)]

    for option, size in (("--test-size", test_size), ("--train-size", train_size)):
        most = available[option] * comb(shape.cells, givens)
        if size > most:
            raise UserError(
                f"{option} {size} is more than the {most} puzzles of {shape} boxes with {givens} givens that can exist "
                "on its side; ask for fewer."
            )
    test = _draw_puzzles(draw_test, test_size, "--test-size", givens, shape, rng)
    held_out = _kinship(test.answers, shape)
    train = _draw_puzzles(draw_train, train_size, "--train-size", givens, shape, rng)
    return train, test


def _kinship(grids: Grids, shape: BoxShape) -> NDArray[np.uint64] | NDArray[np.bytes_]:
    """Keys `[N]` of complete grids that may not stand on both sides when equal.

    Smaller boards have too few grids that are not equivalent to keep those apart: there the grid itself is the key.
    """
    return symmetry_invariant(grids, shape) if shape == BoxShape(3, 3) else _row_keys(grids)


def _row_keys(grids: Grids) -> NDArray[np.bytes_]:
    """Complete grids `[N, cells]` as sortable keys `[N]`."""
    return np.ascontiguousarray(grids).view(f"S{grids.shape[1]}")[:, 0]


def _draw_puzzles(
    draw_grids: Callable[[int], Grids], count: int, option: str, givens: int, shape: BoxShape, rng: np.random.Generator
) -> Puzzles:
    """`count` different puzzles dug from grids that `draw_grids(how many)` draws."""
    answers: dict[bytes, bytes] = {}  # by question
    barren = 0
    with tqdm(desc=f"Generating {option[2:-5]}", total=count, unit=" puzzles", delay=2, leave=False) as progress:
        while len(answers) < count:
            known, tries = len(answers), min(max(count - len(answers), 64), 1024)
            grids = draw_grids(tries)
            questions = dig_holes(grids, givens, shape, rng)
            reached = np.count_nonzero(questions, axis=1) == givens
            answers.update(zip(map(bytes, questions[reached]), map(bytes, grids[reached]), strict=True))
            progress.update(min(len(answers), count) - known)
            barren = 0 if len(answers) > known else barren + tries
            if barren >= PATIENCE:
                raise UserError(
                    f"{option} {count} is more than the {known} puzzles of {shape} boxes with {givens} givens found by "
                    f"random search ({barren} grids in a row gave no new one); ask for fewer, or for more --givens."
                )

    def boards(rows: Sequence[bytes]) -> Grids:
        return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, shape.cells)

    return Puzzles(boards(list(answers)[:count]), boards(list(answers.values())[:count]))


def faults(train: Puzzles, test: Puzzles, shape: BoxShape) -> str:
    """What a reader of results should know of puzzles that somebody else made, for the summary."""
    repeats = "{} puzzles repeat another one"
    counts = {
        "test puzzles are also trained on": count_known(test.questions, train.questions),
        "test puzzles have the solution of a training puzzle": count_known(test.answers, train.answers),
        **{
            repeats.format(split): count_repeats(puzzles.questions)
            for split, puzzles in zip(SPLITS, (train, test), strict=True)
        },
    }
    for split, puzzles in zip(SPLITS, (train, test), strict=True):
        several, checked = count_ambiguous(puzzles.questions, shape, SECONDS_OF_CHECKING)
        among = f" (of the first {checked:,})" if checked < len(puzzles) else ""
        counts[f"{split} puzzles{among} have several solutions"] = several
    return remarks(counts)


# The pack.


def augment(
    puzzles: Puzzles, shape: BoxShape, num_aug: int, hints: int, held_out: Grids, rng: np.random.Generator
) -> PackSet:
    """One group for every puzzle: the puzzle itself, `num_aug` random augmentations of it and `hints` more that are
    easier, each with its one example.

    Easier ones have a share of their blanks filled in, drawn uniformly from none to all for each. Augmentations whose
    solution is among the complete grids `held_out` (`[M, cells]`, M may be 0) are drawn again.
    """
    extra = num_aug + hints
    size = 1 + extra
    inputs, labels = (np.empty((len(puzzles) * size, shape.cells), dtype=np.uint8) for _ in range(2))
    inputs[::size], labels[::size] = encode_tokens(puzzles.questions), encode_tokens(puzzles.answers)
    augmentations = len(puzzles) * extra
    for start in tqdm(range(0, augmentations, CHUNK), desc="Augmenting", delay=2, leave=False):
        drawn = np.arange(start, min(start + CHUNK, augmentations))
        while drawn.size:
            group, number = np.divmod(drawn, extra)
            row = group * size + 1 + number
            symmetries = random_symmetries(drawn.size, shape, rng)
            questions, answers = (symmetries.apply(grids[group]) for grids in (puzzles.questions, puzzles.answers))
            if hints:
                share = np.where(number < num_aug, 0, rng.random(drawn.size))
                filled = rng.random(questions.shape) < share[:, None]
                questions = np.where(filled, answers, questions)
            inputs[row], labels[row] = encode_tokens(questions), encode_tokens(answers)
            drawn = drawn[np.isin(_row_keys(answers), _row_keys(held_out))]
    return PackSet(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=np.zeros(len(inputs), dtype=np.int32),
        puzzle_indices=np.arange(len(inputs) + 1, dtype=np.int32),
        group_indices=np.arange(0, len(inputs) + 1, size, dtype=np.int32),
    )


def write_puzzles(folder: Path, shape: BoxShape, puzzles: PackSet) -> None:
    """Writes one split, with the metadata of the published Sudoku packs."""
    metadata = PackMetadata(
        pad_id=PAD_TOKEN,
        ignore_label_id=PAD_TOKEN,
        blank_identifier_id=0,
        vocab_size=shape.vocab_size,
        seq_len=shape.cells,
        num_puzzle_identifiers=1,
        total_groups=len(puzzles.group_indices) - 1,
        mean_puzzle_examples=1,
        sets=("all",),
    )
    write_split(folder, metadata, {"all": puzzles})


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without looking at any puzzle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("data/sudoku-extreme-full"), help="the pack to write (%(default)s)"
    )
    parser.add_argument("--num-aug", type=int, default=0, help="augmentations of each training puzzle (%(default)s)")
    parser.add_argument(
        "--hints",
        type=int,
        default=0,
        help="easier augmentations of each training puzzle, some blanks filled in (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=42, help="of every random choice (%(default)s)")
    source = parser.add_argument_group("source: one of")
    source.add_argument("--source-repo", help=f"hub dataset with train.csv and test.csv (default: {DEFAULT_REPO})")
    source.add_argument("--source-dir", type=Path, help="folder with train.csv and test.csv, or .csv.gz")
    source.add_argument("--generate", metavar="BOX", help="random puzzles with boxes of 2x2, 2x3 or 3x3 cells")
    files = parser.add_argument_group("with --source-repo or --source-dir")
    files.add_argument("--subsample-size", type=int, help="use at most so many training puzzles, drawn at random")
    files.add_argument("--min-difficulty", type=int, help="leave out puzzles with a lower rating")
    generated = parser.add_argument_group("with --generate")
    generated.add_argument("--train-size", type=int, help="training puzzles (default: 1000)")
    generated.add_argument("--test-size", type=int, help="test puzzles (default: 1000)")
    defaults = ", ".join(f"{shape}: {limits.default_givens}" for shape, limits in GENERATOR_LIMITS.items())
    generated.add_argument("--givens", type=int, help=f"filled cells of a puzzle (default for {defaults})")
    arguments = parser.parse_args(argv)

    of_files, of_generated = ("subsample_size", "min_difficulty"), ("train_size", "test_size", "givens")
    generating = is_generated(arguments, "puzzles", of_files, of_generated, DEFAULT_REPO)
    least = {"num_aug": 0, "hints": 0, "seed": 0, "subsample_size": 1, "train_size": 1, "test_size": 1}
    check_at_least(arguments, least)
    if generating:
        arguments.generate = BoxShape.parse(arguments.generate)
        givens = GENERATOR_LIMITS[arguments.generate].default_givens
        fill_in(arguments, {"train_size": 1000, "test_size": 1000, "givens": givens})
    return arguments


def build(arguments: argparse.Namespace) -> str:
    """Builds the pack that `parse_arguments` described and returns a one-line summary."""
    begin = time.perf_counter()
    rng = np.random.default_rng(arguments.seed)
    with replace_pack(arguments.output_dir) as folder:
        if arguments.generate is not None:
            shape = arguments.generate
            train, test = generate(shape, arguments.train_size, arguments.test_size, arguments.givens, rng)
            held_out, source, files = test.answers, f"generated puzzles with {arguments.givens} givens", {}
            remark = ""  # different puzzles with one solution each, by construction
        else:
            split_files, source = source_files(arguments)
            files = {file.name: file for file in split_files.values()}
            shape, train, test = read_source(split_files["train"], split_files["test"], arguments.min_difficulty)
            held_out = test.answers[:0]
            if arguments.subsample_size is not None and arguments.subsample_size < len(train):
                train = train.take(np.sort(rng.choice(len(train), arguments.subsample_size, replace=False)))
            remark = faults(train, test, shape)
        most = np.iinfo(np.int32).max // len(train) - 1  # a pack's offsets are int32
        if arguments.num_aug + arguments.hints > most:
            raise UserError(
                f"--num-aug {arguments.num_aug} and --hints {arguments.hints} of {len(train)} puzzles are more than a "
                f"pack can hold; choose at most {most} together, or fewer puzzles."
            )
        examples = augment(train, shape, arguments.num_aug, arguments.hints, held_out, rng)
        write_puzzles(folder / "train", shape, examples)
        write_puzzles(folder / "test", shape, augment(test, shape, 0, 0, held_out, rng))
        if test.ratings is not None:  # for accuracy by difficulty
            np.save(folder / "test" / "all__ratings.npy", test.ratings)
        if test.sources is not None:  # and by source; as text of fixed width, which is read without pickle
            np.save(folder / "test" / "all__sources.npy", test.sources.astype(str))
        write_identifiers(folder, ["<blank>"])
        write_provenance(folder, "dataset/build_sudoku_dataset.py", recorded(arguments), source, files, task=TASK.name)
    return (
        f"{arguments.output_dir}: {len(train):,} training puzzles with {arguments.num_aug:,} augmentations"
        f"{f' and {arguments.hints:,} easier ones' if arguments.hints else ''} each and "
        f"{len(test):,} test puzzles of {shape.side}x{shape.side} cells, from {source}, "
        f"in {time.perf_counter() - begin:.1f} s{remark}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(build, lambda: parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
