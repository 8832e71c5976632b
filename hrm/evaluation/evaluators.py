"""Who scores the predictions on a pack beside the exact match, and what they conclude."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hrm.data.pack import Pack
from hrm.distributed.world import World, gather_on_main
from hrm.evaluation.breakdown import BreakdownEvaluator
from hrm.tasks import task_of
from hrm.tasks.base import Evaluator


def evaluators_of(pack: Pack) -> list[Evaluator]:
    """Those of the pack's task, and one for ratings and sources if they are stored in the pack.

    Raises:
        UserError: as `hrm.data.columns.read_column` and `hrm.tasks.task_of`.
    """
    evaluators = task_of(pack).evaluators(pack)
    if (breakdown := BreakdownEvaluator(pack)).breakdowns:
        evaluators.append(breakdown)
    return evaluators


def summaries(evaluators: Sequence[Evaluator], world: World, folder: Path) -> list[str]:
    """What each concludes from the predictions of all ranks; none but on the first. May leave files in `folder`."""
    texts = []
    for evaluator in evaluators:
        states = gather_on_main(evaluator.state(), world)
        if states:
            texts.append(evaluator.summary(states, folder))
    return texts
