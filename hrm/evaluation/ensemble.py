"""Several answers to one puzzle, from symmetric puzzles and from several checkpoints, put to the vote.

A task's symmetries turn a puzzle into another one whose answer, mapped back, answers the first. A recurrent model that
is stuck on one of them is often not stuck on the next (the analysis of HRM in arXiv 2601.10679).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.data.pack import Pack
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.evaluation.metrics import MetricSums, Throughput, accuracy_sums, compare
from hrm.evaluation.runner import Part, make_runner, show_predictions
from hrm.models import ACTLossHead
from hrm.tasks import task_of
from hrm.tasks.base import Evaluator, PuzzleSize, Rules, Symmetry


class DeviceSymmetry(NamedTuple):
    """A `Symmetry` on a device, for integer tokens [N, S]."""

    cells: Tensor  # [S] int64
    tokens: Tensor  # [V] int64
    cells_back: Tensor
    tokens_back: Tensor

    @classmethod
    def of(cls, symmetry: Symmetry, device: torch.device) -> DeviceSymmetry:
        cells, tokens = (torch.from_numpy(map_).to(device) for map_ in symmetry)
        return cls(cells, tokens, cells.argsort(), tokens.argsort())

    def apply(self, puzzles: Tensor) -> Tensor:
        return self.tokens[puzzles.long()[:, self.cells]].to(puzzles.dtype)

    def undo(self, puzzles: Tensor) -> Tensor:
        return self.tokens_back[puzzles.long()][:, self.cells_back].to(puzzles.dtype)


def symmetries_of(pack: Pack, count: int) -> list[Symmetry]:
    """`count` symmetries of the pack's task, the identity first.

    Raises:
        UserError: the task has fewer.
    """
    task, size = task_of(pack), PuzzleSize.of(pack)
    if count > 1 and task.votes_over_pack:
        raise UserError(
            f"ensemble.augmentations={count} cannot be used with {pack.path}, which holds augmentations that vote "
            "already: leave it out."
        )
    most = task.num_symmetries(size)
    if count > 1 and most == 1:
        raise UserError(
            f"ensemble.augmentations={count} needs a task with known symmetries, and {pack.path} holds {task.name}, "
            "which has none: leave it out."
        )
    if count > most:
        raise UserError(
            f"ensemble.augmentations={count} is too large: a puzzle of the task {task.name} has {most:.0f} symmetries."
        )
    return task.symmetries(size, count)


def rules_of(pack: Pack) -> Rules:
    """The rules of the pack's task.

    Raises:
        UserError: it has none that are known.
    """
    task = task_of(pack)
    rules = task.rules(PuzzleSize.of(pack))
    if rules is None:
        raise UserError(
            f"ensemble.check=true needs a task with known rules, and {pack.path} holds {task.name}, which has none: "
            "leave it out."
        )
    return rules


def keep_rules(rules: Rules, inputs: Tensor, answers: Tensor) -> Tensor:
    """Which answers [N, S] to inputs [N, S] keep the rules: [N] bool, on the device of the answers."""
    return torch.from_numpy(rules.keeps(inputs.cpu().numpy(), answers.cpu().numpy())).to(answers.device)


def vote(answers: Tensor, q_halt: Tensor, valid: Tensor | None = None) -> Tensor:
    """The answers that most members give; of equally many, those whose mean sigmoid(q_halt) is highest.

    Args:
        answers: [K, N, S], of K members to N puzzles.
        q_halt: [K, N], logits.
        valid: [K, N] bool; where some of a puzzle's answers are, the others do not count.

    Returns:
        [N, S].
    """
    # [K, K, N]; one member after the other, or comparing cell by cell would take K times as much memory
    same = torch.stack([(answers == each).all(-1) for each in answers])
    votes = same.sum(0)
    confidence = torch.where(same, q_halt.sigmoid(), 0).sum(1) / votes
    standing = votes + confidence / 2  # confidence / 2 < 1 only decides between equal votes
    if valid is not None:
        standing = standing + valid * (len(answers) + 1)
    best = standing.argmax(0)
    chosen: Tensor = answers.gather(0, best.view(1, -1, 1).expand(1, -1, answers.shape[-1]))[0]
    return chosen


def make_member(model: ACTLossHead, world: World) -> Callable[[Batch, DeviceSymmetry], tuple[Tensor, Tensor]]:
    """A function that gives a model's answers to a symmetric puzzle of each, after all ACT steps.

    It takes N puzzles and a symmetry, on the device, and returns the answers [N, S] int32, mapped back, and q_halt [N],
    logits. All batches must have one shape, as in `make_runner`.
    """
    run = make_runner(model, world, ["logits", "q_halt_logits"])

    def answer(batch: Batch, symmetry: DeviceSymmetry) -> tuple[Tensor, Tensor]:
        _, outputs = run(batch | {"inputs": symmetry.apply(batch["inputs"])})
        # Cloned because a graph's next call overwrites it.
        return symmetry.undo(outputs["logits"].argmax(-1).int()), outputs["q_halt_logits"].clone()

    return answer


def evaluate_ensemble(
    models: Sequence[ACTLossHead],
    symmetries: Sequence[Symmetry],
    parts: Iterable[Part],
    world: World,
    evaluators: Sequence[Evaluator],
    throughput: Throughput,
    rules: Rules | None = None,
) -> dict[str, dict[str, float]]:
    """How good the vote is of all models' answers to all symmetric puzzles, and of the first 1, 2, 4, ... of them.

    Args:
        models: in evaluation mode, for the same pack.
        symmetries: each is applied to every puzzle.
        parts: this rank's puzzles.
        evaluators: are shown what was voted for, or all answers if they count votes themselves.
        rules: answers that break them do not count, where others keep them.

    Returns:
        By set: `count`, and `exact_accuracy/of_<n>` and `accuracy/of_<n>` by the number n of answers voted on.
    """
    members = [make_member(model, world) for model in models]
    on_device = [DeviceSymmetry.of(symmetry, world.device) for symmetry in symmetries]
    count = len(symmetries) * len(models)
    sizes = [size for size in (2**power for power in range(count.bit_length())) if size < count] + [count]
    sums = MetricSums(world)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.weights_at_hand())
        for part in parts:
            batch = {name: field.to(world.device) for name, field in part.batch.items()}
            answers = [member(batch, symmetry) for symmetry in on_device for member in members]
            tokens, q_halt = zip(*answers, strict=True)
            valid = torch.stack([keep_rules(rules, batch["inputs"], answer) for answer in tokens]) if rules else None
            metrics: dict[str, Tensor] = {}
            for size in sizes:
                counted = None if valid is None else valid[:size]
                voted = vote(torch.stack(tokens[:size]), torch.stack(q_halt[:size]), counted)
                scores = accuracy_sums(compare(batch["labels"], voted))
                metrics["count"] = scores.pop("count")
                metrics |= {f"{name}/of_{size}": value for name, value in scores.items()}
            sums.add(part.set_name, metrics)
            throughput.count(part.real)
            for evaluator in evaluators:
                shown = answers if evaluator.wants_all_votes else [(voted, torch.stack(q_halt).mean(0))]
                for answer, confidence in shown:
                    fields = (field[: part.real].cpu() for field in (answer, confidence))
                    show_predictions([evaluator], part.set_name, part.puzzles(), *fields)
    return sums.averages()
