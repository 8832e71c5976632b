"""Several answers to one puzzle, from symmetric puzzles, several paths and several checkpoints, and one picked of them.

A task's symmetries turn a puzzle into another one whose answer, mapped back, answers the first. A recurrent model that
is stuck on one of them is often not stuck on the next (the analysis of HRM in arXiv 2601.10679).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import NamedTuple

from torch import Tensor

from hrm.config import EnsembleConfig
from hrm.config.evaluation import PICKS
from hrm.distributed.world import World
from hrm.evaluation.metrics import MetricSums, Throughput, accuracy_sums, compare
from hrm.evaluation.paths import Answers, Noise, make_member
from hrm.evaluation.picking import Picked, pick
from hrm.evaluation.runner import Part, show_predictions
from hrm.evaluation.symmetries import DeviceSymmetry
from hrm.models import ACTLossHead
from hrm.tasks.base import Evaluator, Rules, Symmetry

ANY = "any"  # beside the ways of picking: one of the answers is right


class EnsembleScores(NamedTuple):
    """How good an ensemble is, by set and then by name; n counts answers, the first 1, 2, 4, ... of all."""

    metrics: dict[str, dict[str, float]]  # `count`; `exact_accuracy/of_<n>` and `accuracy/of_<n>` of what is picked
    # `<way>/exact_accuracy/of_<n>` and `<way>/act_steps/of_<n>`, for each puzzle, of each way of picking
    ways: dict[str, dict[str, float]]


def evaluate_ensemble(
    models: Sequence[ACTLossHead],
    symmetries: Sequence[Symmetry],
    options: EnsembleConfig,
    parts: Iterable[Part],
    world: World,
    evaluators: Sequence[Evaluator],
    throughput: Throughput,
    rules: Rules | None = None,
) -> EnsembleScores:
    """How good the answer is that is picked of all models' answers, by all paths, to all symmetric puzzles.

    Args:
        models: in evaluation mode, for the same pack.
        symmetries: each is applied to every puzzle.
        parts: this rank's puzzles.
        evaluators: are shown what is picked, or all answers if they count votes themselves.
        rules: answers that break them do not count, where others keep them.
    """
    members = [make_member(model, world, Noise.of(options)) for model in models]
    on_device = [DeviceSymmetry.of(symmetry, world.device) for symmetry in symmetries]
    asked = list(product(range(options.paths), on_device, members))
    sums, of_ways = MetricSums(world), MetricSums(world)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.weights_at_hand())
        for part in parts:
            batch = {name: field.to(world.device) for name, field in part.batch.items()}
            each = [member(batch, symmetry, path) for path, symmetry, member in asked]
            answers = Answers.stacked([answer.checked(rules, batch["inputs"]) for answer in each] if rules else each)
            metrics: dict[str, Tensor] = {}
            ways: dict[str, Tensor] = {}
            for size in sizes_up_to(len(asked)):
                picked = picked_by_all(answers.first(size))
                scores = accuracy_sums(compare(batch["labels"], picked[options.pick].tokens))
                metrics["count"] = ways["count"] = scores.pop("count")
                metrics |= {f"{name}/of_{size}": value for name, value in scores.items()}
                of_size = way_sums(answers.first(size), picked, batch["labels"])
                ways |= {f"{name}/of_{size}": value for name, value in of_size.items()}
            sums.add(part.set_name, metrics)
            of_ways.add(part.set_name, ways)
            throughput.count(part.real)
            for evaluator in evaluators:
                shown = [(picked[options.pick].tokens, answers.q_halt.mean(0))]
                if evaluator.wants_all_votes:
                    shown = list(zip(answers.tokens, answers.q_halt, strict=True))
                for answer, confidence in shown:
                    fields = (field[: part.real].cpu() for field in (answer, confidence))
                    show_predictions([evaluator], part.set_name, part.puzzles(), *fields)
    return EnsembleScores(sums.averages(), of_ways.averages())


def sizes_up_to(count: int) -> list[int]:
    """The numbers of answers that are scored: 1, 2, 4, ... and `count`."""
    return [size for size in (2**power for power in range(count.bit_length())) if size < count] + [count]


def picked_by_all(answers: Answers) -> dict[str, Picked]:
    """What each way picks of `answers` [K, N, ...]."""
    return {way: pick(way, answers) for way in PICKS}


def way_sums(answers: Answers, picked: Mapping[str, Picked], labels: Tensor) -> dict[str, Tensor]:
    """`<way>/exact_accuracy` and `<way>/act_steps` of each way and of `ANY`, summed over the labelled puzzles.

    Args:
        answers: [K, N, ...].
        picked: of these.
        labels: [N, S].
    """
    sums = {}
    for way, of_way in picked.items():
        comparison = compare(labels, of_way.tokens)
        sums[f"{way}/exact_accuracy"] = accuracy_sums(comparison)["exact_accuracy"]
        sums[f"{way}/act_steps"] = of_way.act_steps[comparison.counted].sum()
    right = [compare(labels, tokens) for tokens in answers.tokens]
    exact = right[0].exact
    for other in right[1:]:
        exact = exact | other.exact
    sums[f"{ANY}/exact_accuracy"] = (right[0].counted & exact).sum()
    return sums


def ways_table(ways: Mapping[str, float]) -> str:
    """A line for each number of answers: exactly right by each way of picking, and the ACT steps that it takes."""
    sizes = sorted({int(name.rpartition("_")[2]) for name in ways if "/of_" in name})
    head = ["answers", "ACT steps", *(way for way in PICKS if way != "first"), ANY, "first", "ACT steps"]
    lines = [head]
    for size in sizes:
        exact = {way: f"{ways[f'{way}/exact_accuracy/of_{size}']:.2%}" for way in (*PICKS, ANY)}
        steps = {way: f"{ways[f'{way}/act_steps/of_{size}']:.1f}" for way in ("vote", "first")}
        row = [str(size), steps["vote"], *(exact[way] for way in PICKS if way != "first"), exact[ANY]]
        lines.append([*row, exact["first"], steps["first"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
    )
