"""Sudoku rules, solver, symmetries, random puzzles and the pack builder, checked against slow plain Python."""

import csv
import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from hrm.data.builders import sudoku as builder
from hrm.data.builders import sudoku_puzzles as generator
from hrm.data.pack import Pack, open_pack
from hrm.errors import UserError
from hrm.tasks import sudoku, sudoku_solver
from hrm.tasks.sudoku import BoxShape, Grids

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [BoxShape(2, 2), BoxShape(2, 3), BoxShape(3, 3)]
SMALL = BoxShape(2, 2)

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def peers(cell: int, shape: BoxShape) -> set[int]:
    """The other cells of a cell's row, column and box, by definition."""
    row, col = divmod(cell, shape.side)
    return {
        r * shape.side + c
        for r in range(shape.side)
        for c in range(shape.side)
        if r == row or c == col or (r // shape.rows == row // shape.rows and c // shape.cols == col // shape.cols)
    } - {cell}


def brute_force(puzzle: Sequence[int], shape: BoxShape) -> Iterator[tuple[int, ...]]:
    """All solutions, by trying every digit in the first cell of fewest choices."""
    neighbours = [peers(cell, shape) for cell in range(shape.cells)]
    board = [int(digit) for digit in puzzle]
    if any(board[cell] and board[cell] == board[peer] for cell in range(shape.cells) for peer in neighbours[cell]):
        return

    def search() -> Iterator[tuple[int, ...]]:
        choices = {
            cell: set(range(1, shape.side + 1)) - {board[peer] for peer in neighbours[cell]}
            for cell in range(shape.cells)
            if not board[cell]
        }
        if not choices:
            yield tuple(board)
            return
        cell = min(choices, key=lambda cell: len(choices[cell]))
        for digit in choices[cell]:
            board[cell] = digit
            yield from search()
        board[cell] = 0

    yield from search()


def rows_of(grids: Grids) -> set[bytes]:
    return {bytes(grid) for grid in np.asarray(grids, dtype=np.uint8)}


# Shapes, text and tokens.


def test_box_shape() -> None:
    assert [(shape.side, shape.cells, shape.vocab_size) for shape in SHAPES] == [(4, 16, 6), (6, 36, 8), (9, 81, 11)]
    for shape in SHAPES:
        assert BoxShape.from_cells(shape.cells) == shape == BoxShape.parse(str(shape))
    with pytest.raises(UserError, match=r"80 cells.*16, 36 or 81"):
        BoxShape.from_cells(80)
    for text in ("3x2", "4x4", "9", "2x", "axb", ""):
        with pytest.raises(UserError, match="choose 2x2, 2x3 or 3x3"):
            BoxShape.parse(text)


def test_parse_grid() -> None:
    text = "12.. 34..\n 0000 ...1"
    assert sudoku.parse_grid(text, SMALL).tolist() == [1, 2, 0, 0, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(UserError, match="15 characters; 16 characters from 1 to 4"):
        sudoku.parse_grid("." * 15, SMALL)
    with pytest.raises(UserError, match="Character 3 of the board is '5'"):
        sudoku.parse_grid("..5" + "." * 13, SMALL)
    with pytest.raises(UserError, match="Character 1 of the board is '²'"):
        sudoku.parse_grid("²" + "." * 15, SMALL)


def test_tokens() -> None:
    digits = np.arange(10, dtype=np.uint8)
    tokens = sudoku.encode_tokens(digits)
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == list(range(1, 11))
    np.testing.assert_array_equal(sudoku.decode_tokens(tokens.astype(np.int32)), digits)
    assert sudoku.decode_tokens(np.array([sudoku.PAD_TOKEN])).tolist() == [0]


# Rules.


@shapes
def test_conflicts_are_equal_digits_among_peers(shape: BoxShape) -> None:
    rng = np.random.default_rng(1)
    grids = np.where(rng.random((20, 2, shape.cells)) < 0.3, rng.integers(1, shape.side + 1, (20, 2, shape.cells)), 0)
    expected = [
        [
            bool(grid[cell]) and any(grid[peer] == grid[cell] for peer in peers(cell, shape))
            for cell in range(shape.cells)
        ]
        for grid in grids.reshape(-1, shape.cells)
    ]
    found = sudoku.conflicts(grids.astype(np.uint8), shape)
    assert found.shape == grids.shape
    assert found.reshape(-1, shape.cells).tolist() == expected
    assert found.any()
    assert not found.all()


@shapes
def test_is_solved(shape: BoxShape) -> None:
    grids = generator.random_grids(3, shape, np.random.default_rng(2))
    assert sudoku.is_solved(grids, shape).tolist() == [True, True, True]
    grids[0, 5] = 0
    grids[1, [0, 1]] = grids[1, [1, 0]]
    assert sudoku.is_solved(grids, shape).tolist() == [False, False, True]
    assert sudoku.is_solved(grids[2], shape)


# Solver.


def test_counts_of_random_small_puzzles() -> None:
    """Random clues: many puzzles contradict themselves, many have several solutions."""
    rng = np.random.default_rng(3)
    puzzles = np.where(rng.random((300, 16)) < 0.3, rng.integers(1, 5, (300, 16)), 0).astype(np.uint8)
    expected = np.array([len(list(brute_force(puzzle, SMALL))) for puzzle in puzzles])
    assert {0, 1, 2} <= set(expected.tolist())
    np.testing.assert_array_equal(sudoku_solver.count_solutions(puzzles, SMALL, limit=1000), expected)
    np.testing.assert_array_equal(sudoku_solver.count_solutions(puzzles, SMALL), np.minimum(expected, 2))
    solved = sudoku_solver.solve(puzzles, SMALL)
    for puzzle, count, solution in zip(puzzles, expected, solved, strict=True):
        assert tuple(solution) == (next(brute_force(puzzle, SMALL)) if count == 1 else (0,) * 16)


@pytest.mark.parametrize(("shape", "kept"), [(SHAPES[1], 0.4), (SHAPES[2], 0.45)], ids=str)
def test_counts_of_thinned_grids(shape: BoxShape, kept: float) -> None:
    """Grids with so many cells blanked that some keep one solution and some do not."""
    rng = np.random.default_rng(4)
    grids = generator.random_grids(40, shape, rng)
    puzzles = np.where(rng.random(grids.shape) < kept, grids, 0).astype(np.uint8)
    expected = [len(list(itertools.islice(brute_force(puzzle, shape), 5))) for puzzle in puzzles]
    assert min(expected) == 1
    assert max(expected) > 2
    assert sudoku_solver.count_solutions(puzzles, shape, limit=5).tolist() == expected


def test_solves_a_puzzle_beyond_singles() -> None:
    shape = BoxShape(3, 3)
    puzzle = sudoku.parse_grid(
        "8........ ..36..... .7..9.2.. .5...7... ....457.. ...1...3. ..1....68 ..85...1. .9....4..", shape
    )
    solution = sudoku_solver.solve(puzzle, shape)
    assert tuple(solution) == next(brute_force(puzzle.tolist(), shape))
    assert sudoku_solver.count_solutions(puzzle, shape) == 1


def test_counting_stops_at_the_limit() -> None:
    """A blank 9x9 board has 7e21 solutions."""
    assert sudoku_solver.count_solutions(np.zeros((2, 81), dtype=np.uint8), BoxShape(3, 3), limit=2).tolist() == [2, 2]


def test_more_boards_than_are_worked_on_together() -> None:
    """The states waiting on the solver's stack must keep their owners."""
    grids = generator.all_grids(SMALL)
    puzzles = np.tile(grids, (20, 1))
    puzzles[:, :8] = 0
    assert len(puzzles) > 2 * sudoku_solver._WIDTH
    counts = sudoku_solver.count_solutions(puzzles, SMALL, limit=1000).reshape(20, 288)
    assert (counts == [len(list(brute_force(puzzle, SMALL))) for puzzle in puzzles[:288]]).all()


# Symmetries.


@shapes
def test_images_of_puzzles_solve_to_images_of_solutions(shape: BoxShape) -> None:
    rng = np.random.default_rng(5)
    solutions = generator.random_grids(60, shape, rng)
    puzzles = generator.dig_holes(solutions, shape.cells // 2, shape, rng)
    symmetries = sudoku.random_symmetries(60, shape, rng)
    images, answers = symmetries.apply(puzzles), symmetries.apply(solutions)
    assert images.dtype == answers.dtype == np.uint8
    assert sudoku.is_solved(answers, shape).all()
    np.testing.assert_array_equal(np.count_nonzero(images, axis=1), np.count_nonzero(puzzles, axis=1))
    for image, answer in zip(images[:5], answers, strict=False):
        assert list(brute_force(image, shape)) == [tuple(answer)]
    assert (answers != solutions).any(1).sum() > 50


@pytest.mark.parametrize(
    ("shape", "maps"),
    # bands! (rows in a band!)^bands x stacks! (columns in a stack!)^stacks, twice with transposition
    [(BoxShape(2, 2), 8 * 8 * 2), (BoxShape(2, 3), (6 * 2**3) * (2 * 6**2))],
    ids=str,
)
def test_every_rearrangement_is_drawn_and_no_other(shape: BoxShape, maps: int) -> None:
    symmetries = sudoku.random_symmetries(60_000, shape, np.random.default_rng(6))
    _, drawn = np.unique(symmetries.source, axis=0, return_counts=True)
    assert len(drawn) == maps
    expected = 60_000 / maps
    assert abs(drawn - expected).max() < 6 * expected**0.5


def test_digits_are_relabelled_uniformly() -> None:
    relabel = sudoku.random_symmetries(24_000, SMALL, np.random.default_rng(7)).relabel
    assert not relabel[:, 0].any()
    orders, drawn = np.unique(relabel[:, 1:], axis=0, return_counts=True)
    assert rows_of(orders) == {bytes(order) for order in itertools.permutations(range(1, 5))}
    assert abs(drawn - 1000).max() < 6 * 1000**0.5


def test_half_of_the_square_boards_are_transposed() -> None:
    source = sudoku.random_symmetries(10_000, BoxShape(3, 3), np.random.default_rng(8)).source
    transposed = source[:, 0] // 9 != source[:, 1] // 9  # neighbours in a row come from different rows
    assert abs(transposed.mean() - 0.5) < 0.03


@shapes
def test_no_symmetry_changes_the_key(shape: BoxShape) -> None:
    rng = np.random.default_rng(9)
    grids = generator.random_grids(200, shape, rng)
    keys = generator.symmetry_invariant(grids, shape)
    for _ in range(5):
        images = sudoku.random_symmetries(200, shape, rng).apply(grids)
        np.testing.assert_array_equal(generator.symmetry_invariant(images, shape), keys)
    assert generator.symmetry_invariant(grids[3], shape) == keys[3]


def test_keys_tell_9x9_grids_apart() -> None:
    grids = generator.random_grids(1000, BoxShape(3, 3), np.random.default_rng(10))
    assert len(np.unique(generator.symmetry_invariant(grids, BoxShape(3, 3)))) == 1000


def test_keys_are_the_symmetry_classes_of_4x4_grids() -> None:
    """The classes are found by closing under swaps that generate the group."""

    def neighbours(grid: bytes) -> Iterator[bytes]:
        board = np.frombuffer(grid, dtype=np.uint8).reshape(4, 4)
        for order in ([1, 0, 2, 3], [0, 1, 3, 2], [2, 3, 0, 1]):
            yield bytes(board[order])
            yield bytes(board[:, order])
            yield bytes(np.array([0, *(1 + np.array(order))], dtype=np.uint8)[board])
        yield bytes(board.T)
        yield bytes(np.array([0, 1, 3, 2, 4], dtype=np.uint8)[board])

    unvisited = rows_of(generator.all_grids(SMALL))
    classes = []
    while unvisited:
        frontier = {unvisited.pop()}
        members = set(frontier)
        while frontier:
            frontier = {image for grid in frontier for image in neighbours(grid)} - members
            members |= frontier
        unvisited -= members
        classes.append(members)
    assert sorted(map(len, classes)) == [96, 192]
    keys = [
        set(generator.symmetry_invariant(np.array([list(grid) for grid in members], dtype=np.uint8), SMALL).tolist())
        for members in classes
    ]
    assert [len(key) for key in keys] == [1, 1]
    assert keys[0] != keys[1]


# Random puzzles.


def test_all_4x4_grids() -> None:
    grids = generator.all_grids(SMALL)
    assert {tuple(grid) for grid in grids.tolist()} == set(brute_force([0] * 16, SMALL))
    assert len(grids) == 288


@shapes
def test_random_grids(shape: BoxShape) -> None:
    grids = generator.random_grids(200, shape, np.random.default_rng(11))
    assert grids.shape == (200, shape.cells)
    assert sudoku.is_solved(grids, shape).all()
    assert len(rows_of(grids)) > 100
    # Every digit comes first about equally often.
    assert abs(np.bincount(grids[:, 0], minlength=shape.side + 1)[1:] - 200 / shape.side).max() < 40
    np.testing.assert_array_equal(grids, generator.random_grids(200, shape, np.random.default_rng(11)))


@pytest.mark.parametrize(("shape", "givens"), [(SHAPES[0], 6), (SHAPES[1], 14), (SHAPES[2], 30)], ids=str)
def test_dug_puzzles_have_one_solution(shape: BoxShape, givens: int) -> None:
    rng = np.random.default_rng(12)
    grids = generator.random_grids(25, shape, rng)
    puzzles = generator.dig_holes(grids, givens, shape, rng)
    assert set(np.count_nonzero(puzzles, axis=1)) == {givens}
    for puzzle, grid in zip(puzzles, grids, strict=True):
        assert list(brute_force(puzzle, shape)) == [tuple(grid)]


def test_digging_ends_where_no_cell_can_be_spared() -> None:
    rng = np.random.default_rng(13)
    puzzles = generator.dig_holes(generator.random_grids(30, SMALL, rng), 0, SMALL, rng)
    for puzzle in puzzles:
        assert len(list(brute_force(puzzle, SMALL))) == 1
        for cell in np.flatnonzero(puzzle):
            fewer = puzzle.copy()
            fewer[cell] = 0
            assert len(list(brute_force(fewer, SMALL))) > 1


# Builder.


def run(output: Path, *arguments: object) -> tuple[Pack, Pack]:
    assert builder.main(["--output-dir", str(output), *map(str, arguments)]) == 0
    return open_pack(output, "train"), open_pack(output, "test")


def digits_of(pack: Pack) -> tuple[Grids, Grids]:
    data = pack.sets["all"]
    return sudoku.decode_tokens(data.inputs), sudoku.decode_tokens(data.labels)


def write_csv(path: Path, rows: Sequence[Sequence[object]], header: str = "source,question,answer,rating") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as stream:
        csv.writer(stream).writerows([header.split(","), *rows])
    return path


def sample_rows(count: int, seed: int, shape: BoxShape = SMALL) -> list[list[object]]:
    """Lines of a CSV file; the i-th puzzle has rating i."""
    rng = np.random.default_rng(seed)
    grids = generator.random_grids(count, shape, rng)
    puzzles = generator.dig_holes(grids, shape.cells // 2, shape, rng)
    text = ["".join(map(str, row)) for row in (*puzzles, *grids)]
    return [["made", text[i].replace("0", "."), text[count + i], i] for i in range(count)]


def as_digits(texts: Sequence[object]) -> list[list[int]]:
    return [[int(symbol) for symbol in str(text).replace(".", "0")] for text in texts]


@shapes
def test_generated_pack(shape: BoxShape, tmp_path: Path) -> None:
    train, test = run(tmp_path / "pack", "--generate", shape, "--train-size", 40, "--test-size", 25, "--num-aug", 3)
    for pack, groups, size in ((train, 40, 4), (test, 25, 1)):
        metadata, data = pack.metadata, pack.sets["all"]
        assert (metadata.pad_id, metadata.ignore_label_id, metadata.blank_identifier_id) == (0, 0, 0)
        assert (metadata.vocab_size, metadata.seq_len) == (shape.side + 2, shape.cells)
        assert (metadata.num_puzzle_identifiers, metadata.total_groups) == (1, groups)
        assert (metadata.mean_puzzle_examples, metadata.sets) == (1, ("all",))
        assert data.inputs.dtype == data.labels.dtype == np.uint8
        assert not data.puzzle_identifiers.any()
        assert data.puzzle_indices.tolist() == list(range(groups * size + 1))
        assert data.group_indices.tolist() == list(range(0, groups * size + 1, size))
        assert (data.inputs.min(), data.labels.min()) == (1, 2)
        questions, answers = digits_of(pack)
        assert set(np.count_nonzero(questions, axis=1)) == {builder.GENERATOR_LIMITS[shape].default_givens}
        for question, answer in zip(questions[:: size * 5], answers[:: size * 5], strict=True):
            assert list(brute_force(question, shape)) == [tuple(answer)]
        np.testing.assert_array_equal(sudoku_solver.solve(questions, shape), answers)
        assert len(rows_of(questions[::size])) == groups
    assert json.loads((tmp_path / "pack" / "identifiers.json").read_text()) == ["<blank>"]
    assert not rows_of(digits_of(train)[1]) & rows_of(digits_of(test)[1])


def test_a_group_is_a_puzzle_and_its_images(tmp_path: Path) -> None:
    shape = BoxShape(3, 3)
    write_csv(tmp_path / "train.csv", rows := sample_rows(6, 0, shape))
    write_csv(tmp_path / "test.csv", sample_rows(2, 1, shape))
    train, _ = run(tmp_path / "pack", "--source-dir", tmp_path, "--num-aug", 5)
    questions, answers = (grids.reshape(6, 6, 81) for grids in digits_of(train))
    assert questions[:, 0].tolist() == as_digits([row[1] for row in rows])
    assert answers[:, 0].tolist() == as_digits([row[2] for row in rows])
    keys = generator.symmetry_invariant(answers, shape)
    assert (keys == keys[:, :1]).all()
    assert len(np.unique(keys)) == 6
    np.testing.assert_array_equal(sudoku_solver.solve(questions, shape), answers)
    assert len(rows_of(questions.reshape(36, 81))) == 36


def test_4x4_augmentations_do_not_leak(tmp_path: Path) -> None:
    """Half of the 288 grids are held out, so that without redrawing nearly every group would hit them."""
    train, test = run(tmp_path / "pack", "--generate", "2x2", "--train-size", 60, "--test-size", 60, "--num-aug", 100)
    trained, tested = (rows_of(digits_of(pack)[1]) for pack in (train, test))
    assert not trained & tested
    assert len(trained) > 200


def test_an_image_is_redrawn_until_it_is_not_held_out() -> None:
    """All but two of the 96 or 192 images of the grid are held out; the identity's is not."""
    rng = np.random.default_rng(14)
    grid = generator.all_grids(SMALL)[:1]
    images = np.unique(sudoku.random_symmetries(5000, SMALL, rng).apply(np.repeat(grid, 5000, axis=0)), axis=0)
    other = images[(images != grid).any(1)][0]
    allowed = rows_of(np.stack([grid[0], other]))
    held_out = np.array([image for image in images if bytes(image) not in allowed])
    augmented = builder.augment(builder.Puzzles(grid, grid), SMALL, 30, 0, held_out, rng)
    assert rows_of(sudoku.decode_tokens(augmented.labels)) == allowed


def test_hints_make_easier_images(tmp_path: Path) -> None:
    sizes = ("--generate", "2x3", "--train-size", 10, "--test-size", 5, "--givens", 12, "--num-aug", 2, "--hints", 40)
    train, test = run(tmp_path / "pack", *sizes)
    data, shape = train.sets["all"], BoxShape(2, 3)
    groups = np.diff(data.puzzle_indices[data.group_indices])
    assert groups.tolist() == [43] * 10
    givens = (sudoku.decode_tokens(data.inputs) != 0).sum(1).reshape(10, 43)
    assert (givens[:, :3] == 12).all()
    assert (givens[:, 3:] >= 12).all()
    # A uniform share of the 24 blanks: about 12 on average, and anything from none to all.
    assert abs(givens[:, 3:].mean() - 24) < 1
    assert len(np.unique(givens[:, 3:])) > 20
    inputs, labels = sudoku.decode_tokens(data.inputs), sudoku.decode_tokens(data.labels)
    assert ((inputs == 0) | (inputs == labels)).all()
    assert sudoku.is_solved(labels, shape).all()
    assert len(test.sets["all"].inputs) == 5


def test_ratings_and_sources_of_test_puzzles_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the puzzles that are used, though they are read in several chunks."""
    monkeypatch.setattr(builder, "CHUNK", 4)
    write_csv(tmp_path / "train.csv", sample_rows(9, 3))
    rows = [[("mine", "yours, too", "", "größer")[n % 4], *row[1:]] for n, row in enumerate(sample_rows(11, 4))]
    write_csv(tmp_path / "test.csv", [["high", *row[1:3], 99] for row in rows[:1]] + rows)
    options = ("--num-aug", 1, "--hints", 1, "--subsample-size", 3, "--min-difficulty", 3)
    _, test = run(tmp_path / "pack", "--source-dir", tmp_path, *options)
    kept = [["high", *rows[0][1:3], 99], *rows[3:]]
    assert digits_of(test)[0].tolist() == as_digits([row[1] for row in kept])
    assert np.load(tmp_path / "pack/test/all__ratings.npy").tolist() == [row[3] for row in kept]
    assert np.load(tmp_path / "pack/test/all__sources.npy", allow_pickle=False).tolist() == [row[0] for row in kept]
    for name in ("all__ratings.npy", "all__sources.npy"):
        assert not (tmp_path / "pack/train" / name).exists()


def test_columns_may_be_missing_and_in_any_order(tmp_path: Path) -> None:
    rows = sample_rows(3, 5)
    write_csv(tmp_path / "train.csv", [row[1:3] for row in rows], header="question,answer")
    write_csv(tmp_path / "test.csv", [row[2::-1] for row in rows], header="answer,question,source")
    _, test = run(tmp_path / "pack", "--source-dir", tmp_path)
    assert digits_of(test)[0].tolist() == as_digits([row[1] for row in rows])
    assert np.load(tmp_path / "pack/test/all__sources.npy").tolist() == ["made"] * 3
    assert not (tmp_path / "pack/test/all__ratings.npy").exists()


def test_9x9_training_and_test_grids_are_not_equivalent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids are drawn from the images of eight only, so that chance alone cannot keep the two sides apart."""
    shape = BoxShape(3, 3)
    originals = generator.random_grids(8, shape, np.random.default_rng(15))

    def few_classes(count: int, shape: BoxShape, rng: np.random.Generator) -> Grids:
        return sudoku.random_symmetries(count, shape, rng).apply(rng.choice(originals, count))

    monkeypatch.setattr(builder, "random_grids", few_classes)
    train, test = run(tmp_path / "pack", "--generate", "3x3", "--train-size", 20, "--test-size", 3, "--givens", 40)
    keys = [set(generator.symmetry_invariant(digits_of(pack)[1], shape).tolist()) for pack in (train, test)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 8


def test_the_4x4_grids_are_shared_out_in_proportion(tmp_path: Path) -> None:
    train, test = run(tmp_path / "pack", "--generate", "2x2", "--train-size", 2500, "--test-size", 500)
    assert [len(rows_of(digits_of(pack)[1])) for pack in (train, test)] == [240, 48]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    arguments = ("--generate", "2x3", "--train-size", 20, "--test-size", 10, "--num-aug", 4)
    run(tmp_path / "a", *arguments, "--seed", 7)
    run(tmp_path / "b", *arguments, "--seed", 7)
    run(tmp_path / "c", *arguments, "--seed", 8)
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert len(first) == 14
    assert first == second
    for name in ("train/all__inputs.npy", "test/all__labels.npy"):
        assert first[name] != third[name]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@shapes
def test_csv_source(shape: BoxShape, suffix: str, tmp_path: Path) -> None:
    rows = {"train": sample_rows(9, 0, shape), "test": sample_rows(4, 1, shape)}
    for split, lines in rows.items():
        write_csv(tmp_path / f"{split}{suffix}", lines)
    for pack, lines in zip(run(tmp_path / "pack", "--source-dir", tmp_path), rows.values(), strict=True):
        questions, answers = digits_of(pack)
        assert questions.tolist() == as_digits([line[1] for line in lines])
        assert answers.tolist() == as_digits([line[2] for line in lines])


def test_csv_in_other_guises(tmp_path: Path) -> None:
    """Columns in another order and more of them, a byte order mark, zeros for blanks, spaces, an empty line."""
    rows = sample_rows(3, 0)
    lines = [f"{answer},x,{str(question).replace('.', '0')}" for _, question, answer, _ in rows]
    lines[1] = lines[1].replace(",x,", ",x, ")
    text = "\ufeffanswer,note,question\r\n" + "\r\n".join([*lines, "", ""])
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_bytes(text.encode())
    train, _ = run(tmp_path / "pack", "--source-dir", tmp_path)
    assert digits_of(train)[0].tolist() == as_digits([row[1] for row in rows])


def test_subsample_is_of_the_training_split_only(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", rows := sample_rows(30, 0))
    write_csv(tmp_path / "test.csv", sample_rows(12, 1))
    all_questions = [bytes(row) for row in as_digits([row[1] for row in rows])]
    train, test = run(tmp_path / "pack", "--source-dir", tmp_path, "--subsample-size", 10, "--num-aug", 2)
    assert (train.metadata.total_groups, test.metadata.total_groups) == (10, 12)
    kept = [all_questions.index(bytes(question)) for question in digits_of(train)[0][::3]]
    assert len(set(kept)) == 10
    assert kept != list(range(10))
    train, _ = run(tmp_path / "pack", "--source-dir", tmp_path, "--subsample-size", 1000)
    assert train.metadata.total_groups == 30


def test_min_difficulty_is_of_both_splits(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", rows := sample_rows(30, 0))
    write_csv(tmp_path / "test.csv", sample_rows(12, 1))
    train, test = run(tmp_path / "pack", "--source-dir", tmp_path, "--min-difficulty", 7)
    assert (train.metadata.total_groups, test.metadata.total_groups) == (23, 5)
    assert digits_of(train)[0].tolist() == as_digits([row[1] for row in rows[7:]])


def test_hub_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "train.csv", sample_rows(5, 0))
    write_csv(tmp_path / "test.csv", sample_rows(5, 1))
    asked = []

    def download(repo: str, filename: str, repo_type: str) -> str:
        asked.append((repo, filename, repo_type))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    run(tmp_path / "pack")
    run(tmp_path / "pack", "--source-repo", "someone/puzzles")
    assert asked == [
        (repo, f"{split}.csv", "dataset")
        for repo in ("sapientinc/sudoku-extreme", "someone/puzzles")
        for split in ("train", "test")
    ]


@pytest.mark.parametrize("command", [["dataset/build_sudoku_dataset.py"], ["-m", "hrm.data.builders.sudoku"]])
def test_runs_as_script_and_as_module(command: list[str], tmp_path: Path) -> None:
    arguments = ["--generate", "2x2", "--train-size", "5", "--test-size", "5", "--output-dir", str(tmp_path / "pack")]
    done = subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert f"{tmp_path / 'pack'}: 5 training puzzles" in done.stdout
    assert open_pack(tmp_path / "pack", "test").metadata.total_groups == 5


# What users are told.


def failure(capsys: pytest.CaptureFixture[str], output: Path, *arguments: object) -> str:
    """The sentence on stderr of a build that must fail and leave nothing behind."""
    assert builder.main(["--output-dir", str(output), *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert not output.exists()
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--generate 4x4", "Sudoku boxes of 4x4 are not supported; choose 2x2, 2x3 or 3x3."),
        ("--generate nine", "'nine' is not a Sudoku box size; choose 2x2, 2x3 or 3x3."),
        ("--generate 2x2 --source-dir d", "--source-dir and --generate exclude each other; give one of them."),
        ("--source-repo r --source-dir d", "--source-repo and --source-dir exclude each other; give one of them."),
        ("--generate 2x2 --source-repo r", "--source-repo and --generate exclude each other; give one of them."),
        ("--generate 2x2 --subsample-size 5", "--subsample-size does not apply to generated puzzles; leave it out."),
        ("--generate 2x2 --min-difficulty 5", "--min-difficulty does not apply to generated puzzles; leave it out."),
        ("--train-size 5", "--train-size applies to generated puzzles only; leave it out or add --generate."),
        ("--source-dir d --test-size 5", "--test-size applies to generated puzzles only; leave it out or add"),
        ("--givens 5", "--givens applies to generated puzzles only; leave it out or add --generate."),
        ("--generate 2x2 --num-aug -1", "--num-aug -1 is too small; choose 0 or more."),
        ("--generate 2x2 --seed -1", "--seed -1 is too small; choose 0 or more."),
        ("--generate 2x2 --train-size 0", "--train-size 0 is too small; choose 1 or more."),
        ("--generate 2x2 --test-size 0", "--test-size 0 is too small; choose 1 or more."),
        ("--source-dir d --subsample-size 0", "--subsample-size 0 is too small; choose 1 or more."),
        ("--generate 3x3 --givens 16", "--givens 16 is out of range for 3x3 boxes; choose 17 to 80."),
        ("--generate 2x2 --givens 16", "--givens 16 is out of range for 2x2 boxes; choose 4 to 15."),
        (
            "--generate 2x2 --train-size 3 --test-size 2 --num-aug 999999999",
            "--num-aug 999999999 and --hints 0 of 3 puzzles are more",
        ),
        # 144 grids a side, of which each has 16 puzzles with one blank
        (
            "--generate 2x2 --givens 15 --train-size 2305 --test-size 2305",
            "--test-size 2305 is more than the 2304 puzzles of 2x2 boxes with 15 givens that can exist on its side;",
        ),
        # The bound above does not see which clues determine a grid.
        (
            "--generate 2x2 --givens 4 --train-size 300000 --test-size 200",
            "puzzles of 2x2 boxes with 4 givens found by random search",
        ),
    ],
)
def test_bad_options(arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in failure(capsys, tmp_path / "pack", *arguments.split())


GOOD = "1234341221434321"


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (["s", GOOD[:-1], GOOD, 1], "line 4, question: The board has 15 characters; 16 characters from 1 to 4"),
        (["s", GOOD, GOOD + "1", 1], "line 4, answer: The board has 17 characters; 16"),
        (["s", GOOD[:-1] + "x", GOOD, 1], "line 4, question: Character 16 of the board is 'x'"),
        (["s", "é" + GOOD[1:], GOOD, 1], "line 4, question: Character 1 of the board is 'é'"),
        (["s", GOOD, GOOD[:-1] + "5", 1], "line 4, answer: Character 16 of the board is '5'"),
        (["s", GOOD, GOOD[:-1] + ".", 1], "line 4: the answer is not a solved board; correct or remove the line."),
        (["s", "." * 16, "1" * 16, 1], "line 4: the answer is not a solved board"),
        (["s", "2" + "." * 15, GOOD, 1], "line 4: the answer contradicts the question; correct or remove the line."),
        (["s", GOOD], "line 4: its 2 fields are too few; correct or remove the line."),
        (["s", GOOD, GOOD, "easy"], "line 4: rating 'easy' is no whole number; correct or remove the line."),
        (["s", GOOD, GOOD, 2**63], f"line 4: rating {2**63} is beyond 64 bits; correct or remove the line."),
        (["s", GOOD, GOOD, -(2**63) - 1], f"line 4: rating {-(2**63) - 1} is beyond 64 bits"),
        (["s", GOOD, GOOD, "9" * 5000], f"line 4: rating '{'9' * 117}...' is no whole number"),
        (["x" * 257, GOOD, GOOD, 1], "line 4: its source has 257 characters; give a name of at most 256."),
        (["x" * 100_000, GOOD, GOOD, 1], "line 4: its source has 100,000 characters"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_malformed_lines(
    bad: list[object], sentence: str, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "test"):
        good = [["s", "." + GOOD[1:], GOOD, 1]] * 2
        write_csv(tmp_path / f"{name}.csv", [*good, *([bad] if name == split else []), *good])
    text = failure(capsys, tmp_path / "pack", "--source-dir", tmp_path, "--min-difficulty", 0)
    assert f"error: {tmp_path / split}.csv, {sentence}" in text


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: object) -> str:
        return failure(capsys, tmp_path / "pack", "--source-dir", tmp_path, *arguments)

    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    rows = sample_rows(3, 0)
    assert f"--source-dir {tmp_path} has neither train.csv nor train.csv.gz; put one there." in told()
    write_csv(train, rows)
    assert f"--source-dir {tmp_path} has neither test.csv nor test.csv.gz; put one there." in told()
    write_csv(test, rows, header="source,question,solution,rating")
    assert f"{test} has no column 'answer' (its first line names: source, question, solution, rating); add" in told()
    write_csv(test, [row[:3] for row in rows], header="source,question,answer")
    assert f"{test} has no column 'rating'" in told("--min-difficulty", 1)
    test.write_text("")
    assert f"{test} has no column 'question' (its first line names: none); add it." in told()
    write_csv(test, [])
    assert f"{test} holds no puzzle; add lines to it." in told()
    write_csv(test, rows)
    assert f"{train} holds no puzzle rated 9 or more; lower --min-difficulty." in told("--min-difficulty", 9)
    write_csv(test, [["s", "." * 20, "1" * 20, 1]])
    assert f"{test}, line 2, question: No Sudoku board has 20 cells; boards of 16, 36 or 81" in told()
    write_csv(test, sample_rows(2, 0, BoxShape(2, 3)))
    assert f"{test} has boards of 36 cells and {train} of 16; a pack holds boards of one size." in told()
    test.write_bytes("source,question,answer,rating\né".encode("latin-1"))
    assert f"{test} cannot be read as CSV (" in told()
    test.unlink()
    whole = write_csv(tmp_path / "test.csv.gz", rows).read_bytes()
    (tmp_path / "test.csv.gz").write_bytes(whole[:-20])
    assert f"{tmp_path / 'test.csv.gz'} cannot be read as CSV (" in told()


def test_an_unreachable_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    text = failure(capsys, tmp_path / "pack")
    assert "train.csv of the hub dataset sapientinc/sudoku-extreme cannot be downloaded" in text
    assert "--source-dir" in text
    assert "--generate" in text


def test_other_peoples_files_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert builder.main(["--generate", "2x2", "--output-dir", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
