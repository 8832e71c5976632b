"""Makes train.csv and test.csv of 9x9 Sudoku from lists of puzzles, such as players publish: a puzzle on a line.

hrm data sudoku-lists hardest.txt 17_clues.txt --output-dir data/raw/hard
hrm data sudoku --source-dir data/raw/hard --subsample-size 1000 --num-aug 1000 --output-dir data/hard

A line begins with a puzzle: 81 characters row by row, '.' or '0' for a blank. What follows it after a space or a comma
is ignored, and so are empty lines and those that begin with '#'. Puzzles are solved here; those without a solution,
with several, and those that come twice are left out. No test puzzle is equivalent to a training puzzle.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrm.data.builders.common import check_at_least, csv_lines, run_command, source_name
from hrm.data.builders.sudoku_puzzles import symmetry_invariant
from hrm.errors import UserError
from hrm.tasks.sudoku import BoxShape, Grids, parse_grid
from hrm.tasks.sudoku_solver import solve
from hrm.writing import new_file

COMMAND = "sudoku-lists"  # `hrm data sudoku-lists`

SHAPE = BoxShape(3, 3)

CHUNK = 256  # puzzles solved at once


def read_lists(paths: Sequence[Path]) -> dict[bytes, str]:
    """The different puzzles of some lists, as digits; each with the name of the first list that has it.

    Raises:
        UserError: a list cannot be read, a line begins with no puzzle, or there is none at all.
    """
    found: dict[bytes, str] = {}
    for path in paths:
        with csv_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip() or line.startswith("#"):
                    continue
                try:
                    board = parse_grid(re.split(r"[\s,;]", line.strip(), maxsplit=1)[0], SHAPE)
                except UserError as error:
                    raise UserError(f"{path}, line {number}: {error} Correct or remove the line.") from error
                found.setdefault(board.astype(np.uint8).tobytes(), source_name(path.name.split(".")[0], path, number))
    if not found:
        raise UserError(f"{' and '.join(map(str, paths))} hold no puzzle; give lists with a puzzle on a line.")
    return found


def boards_of(puzzles: Sequence[bytes]) -> Grids:
    return np.frombuffer(b"".join(puzzles), dtype=np.uint8).reshape(-1, SHAPE.cells)


def solve_all(questions: Grids) -> Grids:
    """The only solution of each puzzle `[N, 81]`; zeros where there is none or more than one."""
    chunks = range(0, len(questions), CHUNK)
    return np.concatenate(
        [solve(questions[i : i + CHUNK], SHAPE) for i in tqdm(chunks, desc="Solving", delay=2, leave=False)]
    )


def build(arguments: argparse.Namespace) -> str:
    """Writes the two files and returns a one-line summary."""
    puzzles = read_lists(arguments.lists)
    questions, sources = boards_of(list(puzzles)), list(puzzles.values())
    answers = solve_all(questions)
    proper = np.flatnonzero(answers.any(1))
    families = symmetry_invariant(answers[proper], SHAPE)  # equivalent puzzles are in one
    kinds, sizes = np.unique(families, return_counts=True)
    order = np.random.default_rng(arguments.seed).permutation(len(kinds))
    enough = np.searchsorted(np.cumsum(sizes[order]), arguments.test_size) + 1
    is_test = np.isin(families, kinds[order[:enough]])
    if is_test.all():
        raise UserError(
            f"--test-size {arguments.test_size} leaves none of {len(proper)} puzzles to train on; give a smaller one."
        )
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {arguments.output_dir} cannot be made ({error.strerror}).") from error
    for name, rows in (("train", proper[~is_test]), ("test", proper[is_test])):
        with (
            new_file(arguments.output_dir / f"{name}.csv") as file,
            file.open("w", newline="", encoding="utf-8") as out,
        ):
            writer = csv.writer(out)
            writer.writerow(["source", "question", "answer"])
            for row in rows:
                question, answer = ("".join(map(str, board)) for board in (questions[row], answers[row]))
                writer.writerow([sources[row], question.replace("0", "."), answer])
    left_out = len(questions) - len(proper)
    counts = f"{np.count_nonzero(~is_test):,} training and {np.count_nonzero(is_test):,} test puzzles"
    remark = f"; {left_out:,} without exactly one solution are left out" if left_out else ""
    return f"{arguments.output_dir}: {counts}{remark}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", type=Path, nargs="+", metavar="LIST", help="text files, also gzipped ones (.gz)")
    parser.add_argument("--output-dir", type=Path, required=True, help="the folder for train.csv and test.csv")
    parser.add_argument("--test-size", type=int, default=1000, help="test puzzles, at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the split (%(default)s)")
    arguments = parser.parse_args(argv)
    check_at_least(arguments, {"test_size": 1, "seed": 0})
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(build, lambda: parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
