"""Votes of ensembles."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrm.evaluation.picking import best_of, standing_in_vote


def vote(answers: Tensor, q_halt: Tensor, valid: Tensor | None = None) -> Tensor:
    """What is voted for, [N, S], of answers [K, N, S]."""
    keeps = torch.ones(answers.shape[:2], dtype=torch.bool) if valid is None else valid
    (best,) = best_of(standing_in_vote(answers, q_halt), keeps)
    return answers[best, torch.arange(len(best))]


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
def test_invalid_answers_count_only_among_themselves(members: int, puzzles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(2, (members, puzzles, 2), generator=generator)
    q_halt = torch.randn(members, puzzles, generator=generator)
    valid = answers[..., 0] == 1  # a property of the answer, as rules are
    chosen = vote(answers, q_halt, valid)
    for puzzle in range(puzzles):
        kept = valid[:, puzzle] if valid[:, puzzle].any() else torch.ones(members, dtype=torch.bool)
        alone = vote(answers[kept, puzzle : puzzle + 1], q_halt[kept, puzzle : puzzle + 1])
        assert torch.equal(chosen[puzzle : puzzle + 1], alone)
