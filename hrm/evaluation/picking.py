"""Which of several answers to a puzzle counts: those of symmetric copies, of several models, of several paths.

Shapes: K answers to each of N puzzles of S cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrm.evaluation.paths import Answers


class Picked(NamedTuple):
    """The answers that count."""

    tokens: Tensor  # [N, S]
    q_halt: Tensor  # [N], logits
    act_steps: Tensor  # [N] int32: that all K answers together took until they could be picked from


def pick(way: str, answers: Answers) -> Picked:
    """One answer to each puzzle.

    vote: what most answer; of equally many, those whose mean sigmoid(q_halt) is highest.
    q: the highest q_halt after the last ACT step.
    converged: the state that the heads read changed least in the last ACT step.
    first: the first to halt, as it was then; of several at one step, the highest q_halt. All others end there too.

    Where some answers keep the task's rules, the others do not count; of equally good ones it is the first.

    Args:
        way: one of `hrm.config.evaluation.PICKS`.
        answers: stacked, [K, N, ...].
    """
    tokens, q_halt, keeps = answers.tokens, answers.q_halt, answers.keeps
    taken = answers.act_steps
    if way == "first":
        tokens, q_halt, keeps = answers.halted_tokens, answers.halted_q, answers.halted_keeps
        never = answers.halted_at > taken
        halted_at = answers.halted_at.where(~never, taken.amax(0) + 1)
        standing = q_halt.sigmoid() / 2 - halted_at  # the former decides between equal steps only
        taken = taken.minimum(halted_at.amin(0))
    elif way == "vote":
        standing = standing_in_vote(tokens, q_halt)
    else:
        standing = {"q": q_halt, "converged": -answers.change}[way]
    best = best_of(standing, keeps)
    chosen = tokens.gather(0, best[..., None].expand(-1, -1, tokens.shape[-1]))[0]
    return Picked(chosen, q_halt.gather(0, best)[0], taken.sum(0))


def best_of(standing: Tensor, keeps: Tensor) -> Tensor:
    """[1, N] int64: which of the K answers stands highest, of those that keep the rules if any do; both are [K, N]."""
    return standing.masked_fill(keeps.any(0) & ~keeps, float("-inf")).argmax(0, keepdim=True)


def standing_in_vote(tokens: Tensor, q_halt: Tensor) -> Tensor:
    """[K, N]: how many of the K answers [K, N, S] are the same, plus half the mean sigmoid(q_halt) of these."""
    # [K, K, N]; one member after the other, or comparing cell by cell would take K times as much memory
    same = torch.stack([(tokens == each).all(-1) for each in tokens])
    votes = same.sum(0)
    confidence = torch.where(same, q_halt.sigmoid(), 0).sum(1) / votes
    return votes + confidence / 2  # which is below 1 and so decides between equal votes only
