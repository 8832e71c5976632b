"""Many answers to one puzzle, from images of it and from several checkpoints, put to the vote.

A task's symmetries turn a puzzle into another one whose answer, turned back, answers the first. A recurrent model that
is stuck on one image is often not stuck on the next (the analysis of HRM in arXiv 2601.10679).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.distributed.world import World
from hrm.evaluation.runner import Answers, Examiner, Pace, Part, Sums, judge, make_thinking, score
from hrm.models import ACTLossHead
from hrm.tasks.maze import dihedral_images, is_shortest_path, side_of
from hrm.tasks.sudoku import BoxShape, decode_tokens, is_solved, random_symmetries

# Which answers [N, S] to puzzles [N, S] keep to the rules: [N] bool. It looks at no label.
Rules = Callable[[Tensor, Tensor], Tensor]


class Symmetry(NamedTuple):
    """A map of puzzles of S tokens to others that have the same rules: image[i] = tokens[puzzle[cells[i]]]."""

    cells: Tensor  # [S] int64, a permutation
    tokens: Tensor  # [V] int64, likewise

    def apply(self, puzzles: Tensor) -> Tensor:
        """The images [N, S] of puzzles [N, S], of the same integer type."""
        return self.tokens[puzzles.long()[:, self.cells]].to(puzzles.dtype)

    def undo(self, images: Tensor) -> Tensor:
        """Inverse of `apply`."""
        return self.tokens.argsort()[images.long()][:, self.cells.argsort()].to(images.dtype)

    def to(self, device: torch.device) -> Symmetry:
        return Symmetry(self.cells.to(device), self.tokens.to(device))


def identity(seq_len: int, vocab_size: int) -> Symmetry:
    return Symmetry(torch.arange(seq_len), torch.arange(vocab_size))


def sudoku_symmetries(box: BoxShape, count: int, seed: int = 0) -> list[Symmetry]:
    """The identity, and random permutations of digits, bands, rows, stacks and columns, and transpositions."""
    drawn = random_symmetries(count - 1, box, np.random.default_rng(seed))
    digits = torch.from_numpy(drawn.relabel.astype(np.int64)) + 1  # token 1 is a blank, 2 the digit 1
    tokens = torch.cat([torch.zeros_like(digits[:, :1]), digits], dim=1)
    cells = torch.from_numpy(drawn.source.astype(np.int64))
    return [identity(box.cells, box.vocab_size), *map(Symmetry, cells, tokens)]


def maze_symmetries(seq_len: int, vocab_size: int, count: int) -> list[Symmetry]:
    """The first `count` of the eight symmetries of the square, the identity first."""
    side = side_of(seq_len)
    square = np.arange(seq_len, dtype=np.int64).reshape(1, side, side)
    images = dihedral_images(square).reshape(8, seq_len)
    return [Symmetry(torch.from_numpy(image), torch.arange(vocab_size)) for image in images[:count]]


def sudoku_rules(box: BoxShape) -> Rules:
    """Whether a board is complete, breaks no rule and keeps what was given."""

    def kept(puzzles: Tensor, answers: Tensor) -> Tensor:
        given, board = decode_tokens(puzzles.cpu().numpy()), decode_tokens(answers.cpu().numpy())
        sound = is_solved(board, box) & ((given == 0) | (given == board)).all(-1)
        return torch.from_numpy(sound).to(answers.device)

    return kept


def maze_rules(puzzles: Tensor, answers: Tensor) -> Tensor:
    """Whether an answer marks a shortest path."""
    return torch.from_numpy(is_shortest_path(puzzles.cpu().numpy(), answers.cpu().numpy())).to(answers.device)


def vote(answers: Tensor, q_halt: Tensor, sound: Tensor | None = None) -> Tensor:
    """The answers that most members give; of equally many, those whose mean sigmoid(q_halt) is highest.

    Args:
        answers: [K, N, S], of K members to N puzzles.
        q_halt: [K, N], logits.
        sound: [K, N] bool; where some of a puzzle's answers are, the others do not count.

    Returns:
        [N, S].
    """
    same = (answers.unsqueeze(0) == answers.unsqueeze(1)).all(-1)  # [K, K, N]
    votes = same.sum(0)
    confidence = torch.where(same, q_halt.sigmoid(), 0).sum(1) / votes
    standing = votes + confidence / 2  # confidence / 2 < 1 only decides between equal votes
    if sound is not None:
        standing = standing + sound * (len(answers) + 1)
    best = standing.argmax(0)
    chosen: Tensor = answers.gather(0, best.view(1, -1, 1).expand(1, -1, answers.shape[-1]))[0]
    return chosen


def make_answering(model: ACTLossHead, world: World) -> Callable[[Batch, Symmetry], tuple[Tensor, Tensor]]:
    """A function that gives a model's answers to an image of each puzzle, after all ACT steps.

    It takes N puzzles and a symmetry, on the device, and returns the answers [N, S] int32, turned back, and q_halt [N],
    logits. All batches must have one shape, as in `make_thinking`.
    """
    thinking = make_thinking(model, world, ["logits", "q_halt_logits"])

    def answer(batch: Batch, symmetry: Symmetry) -> tuple[Tensor, Tensor]:
        _, outputs = thinking(batch | {"inputs": symmetry.apply(batch["inputs"])})
        # Cloned because a graph's next call overwrites it.
        return symmetry.undo(outputs["logits"].argmax(-1).int()), outputs["q_halt_logits"].clone()

    return answer


def evaluate_ensemble(
    models: Sequence[ACTLossHead],
    symmetries: Sequence[Symmetry],
    parts: Iterable[Part],
    world: World,
    examiners: Sequence[Examiner],
    pace: Pace,
    rules: Rules | None = None,
) -> dict[str, dict[str, float]]:
    """How good the vote is of all models' answers to all images of a puzzle, and of the first 1, 2, 4, ... of them.

    Args:
        models: in evaluation mode, for the same pack.
        symmetries: one for each image.
        parts: this rank's puzzles.
        examiners: are shown what was voted for, or all answers if they count votes themselves.
        rules: answers that break them do not count, where others keep them.

    Returns:
        By set: `count`, and `exact_accuracy/of_<n>` and `accuracy/of_<n>` by the number n of answers voted on.
    """
    voters = [make_answering(model, world) for model in models]
    on_device = [symmetry.to(world.device) for symmetry in symmetries]
    members = len(symmetries) * len(models)
    sizes = [size for size in (2**power for power in range(members.bit_length())) if size < members] + [members]
    sums = Sums(world)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.weights_at_hand())
        for part in parts:
            batch = {name: field.to(world.device) for name, field in part.batch.items()}
            answers = [voter(batch, symmetry) for symmetry in on_device for voter in voters]
            tokens, q_halt = zip(*answers, strict=True)
            sound = torch.stack([rules(batch["inputs"], answer) for answer in tokens]) if rules else None
            metrics: dict[str, Tensor] = {}
            for size in sizes:
                counted = None if sound is None else sound[:size]
                voted = vote(torch.stack(tokens[:size]), torch.stack(q_halt[:size]), counted)
                scores = score(judge(batch["labels"], voted))
                metrics["count"] = scores.pop("count")
                metrics |= {f"{name}/of_{size}": value for name, value in scores.items()}
            sums.add(part.set_name, metrics)
            pace.count(part.real)
            puzzles = {name: field[: part.real] for name, field in part.batch.items()}
            for examiner in examiners:
                for answer, confidence in answers if examiner.counts_votes else [(voted, torch.stack(q_halt).mean(0))]:
                    steps = torch.full_like(answer[:, 0], models[0].halt_max_steps)
                    said = Answers(*(field[: part.real].cpu() for field in (answer, confidence, steps)))
                    examiner(part.set_name, puzzles, said)
    return sums.averages()
