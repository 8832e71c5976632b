"""Symmetries, votes and the evaluation of ensembles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrm.evaluation.ensemble import maze_rules, maze_symmetries, sudoku_rules, sudoku_symmetries, vote
from hrm.tasks.maze import is_shortest_path, random_mazes, shortest_paths
from hrm.tasks.sudoku import BoxShape, count_solutions, decode_tokens, encode_tokens, is_solved, random_grids


@pytest.mark.parametrize("box", ["2x2", "2x3", "3x3"])
def test_sudoku_symmetries_keep_the_rules(box: str) -> None:
    shape = BoxShape.parse(box)
    boards = encode_tokens(random_grids(5, shape, np.random.default_rng(0)))
    boards[0, :3] = 1  # blanks stay blank
    puzzles = torch.from_numpy(boards.astype(np.int32))
    symmetries = sudoku_symmetries(shape, 6)
    images = [symmetry.apply(puzzles) for symmetry in symmetries]
    assert torch.equal(images[0], puzzles)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6
    for symmetry, image in zip(symmetries, images, strict=True):
        grids = decode_tokens(image.numpy())
        assert is_solved(grids[1:], shape).all()
        assert (grids[0] == 0).sum() == 3
        assert count_solutions(grids[:1], shape)[0] >= 1
        assert torch.equal(symmetry.undo(image), puzzles)


def solved_mazes() -> tuple[Tensor, Tensor]:
    """Three mazes of 8 x 8 cells and a shortest path through each, [3, 64]."""
    mazes, _ = random_mazes(3, 8, 10, np.random.default_rng(0))
    inputs = torch.from_numpy(np.asarray(mazes).reshape(3, 64).astype(np.int32))
    answers = torch.from_numpy(np.asarray(shortest_paths(mazes)).reshape(3, 64).astype(np.int32))
    return inputs, answers


def test_maze_symmetries_keep_shortest_paths() -> None:
    inputs, answers = solved_mazes()
    symmetries = maze_symmetries(64, 6, 8)
    assert len({tuple(symmetry.cells.tolist()) for symmetry in symmetries}) == 8
    for symmetry in symmetries:
        assert is_shortest_path(symmetry.apply(inputs).numpy(), symmetry.apply(answers).numpy()).all()
        assert torch.equal(symmetry.undo(symmetry.apply(inputs)), inputs)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_vote_is_what_counting_gives(members: int, puzzles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(2, (members, puzzles, 2), generator=generator)
    q_halt = torch.randn(members, puzzles, generator=generator, dtype=torch.float64)
    chosen = vote(answers, q_halt)
    for puzzle in range(puzzles):
        said: dict[tuple[int, ...], list[float]] = {}
        for answer, q in zip(answers[:, puzzle].tolist(), q_halt[:, puzzle].tolist(), strict=True):
            said.setdefault(tuple(answer), []).append(1 / (1 + math.exp(-q)))
        best = max(said, key=lambda answer: (len(said[answer]), sum(said[answer]) / len(said[answer])))
        assert tuple(chosen[puzzle].tolist()) == best


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_unsound_answers_count_only_among_themselves(members: int, puzzles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(2, (members, puzzles, 2), generator=generator)
    q_halt = torch.randn(members, puzzles, generator=generator)
    sound = answers[..., 0] == 1  # a property of the answer, as rules are
    chosen = vote(answers, q_halt, sound)
    for puzzle in range(puzzles):
        kept = sound[:, puzzle] if sound[:, puzzle].any() else torch.ones(members, dtype=torch.bool)
        alone = vote(answers[kept, puzzle : puzzle + 1], q_halt[kept, puzzle : puzzle + 1])
        assert torch.equal(chosen[puzzle : puzzle + 1], alone)


@pytest.mark.parametrize("box", ["2x2", "2x3", "3x3"])
def test_rules_of_sudoku(box: str) -> None:
    shape = BoxShape.parse(box)
    solution = torch.from_numpy(encode_tokens(random_grids(1, shape, np.random.default_rng(0))).astype(np.int32))
    puzzle = solution.clone()
    puzzle[0, ::2] = 1
    swapped = torch.where(solution == 2, 3, torch.where(solution == 3, 2, solution))  # right, but for another puzzle
    clashing, blank, padded = solution.clone(), solution.clone(), solution.clone()
    clashing[0, 0] = clashing[0, 2]
    blank[0, 0], padded[0, 0] = 1, 0
    answers = torch.cat([solution, swapped, clashing, blank, padded])
    assert sudoku_rules(shape)(puzzle.expand(5, -1), answers).tolist() == [True, False, False, False, False]


def test_rules_of_mazes_are_shortest_paths() -> None:
    inputs, answers = solved_mazes()
    assert maze_rules(inputs, answers).all()
    assert not maze_rules(inputs, inputs).any()
