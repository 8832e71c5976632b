"""How good predictions are, summed over all ranks, and how fast they came."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hrm.batch import IGNORE_LABEL_ID
from hrm.distributed.world import World, sum_over_ranks


class Comparison(NamedTuple):
    """How good the predictions for N puzzles are."""

    counted: Tensor  # [N] bool: there is a label
    right: Tensor  # [N], share of the labelled tokens that are right
    exact: Tensor  # [N] bool: all of them are


def compare(labels: Tensor, tokens: Tensor) -> Comparison:
    """Compare predictions with labels as `ACTLossHead.forward` does.

    Args:
        labels: [N, S], IGNORE_LABEL_ID where there is none.
        tokens: predictions [N, S].
    """
    labelled = labels != IGNORE_LABEL_ID
    count = labelled.sum(-1)
    right = (labelled & (tokens == labels)).sum(-1)
    return Comparison(count > 0, right / count.clamp_min(1), right == count)


def accuracy_sums(comparison: Comparison) -> dict[str, Tensor]:
    """Sums of `count`, `accuracy` and `exact_accuracy`, as in `ACTLossHead.forward`."""
    return {
        "count": comparison.counted.sum(),
        "accuracy": comparison.right.sum(),
        "exact_accuracy": (comparison.counted & comparison.exact).sum(),
    }


class MetricSums:
    """Sums of metrics by set, on the device until they are asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._totals: dict[str, dict[str, Tensor]] = {}

    def add(self, set_name: str, metrics: Mapping[str, Tensor]) -> None:
        totals = self._totals.setdefault(set_name, {})
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value.to(self._world.device, torch.float32)

    def averages(self) -> dict[str, dict[str, float]]:
        """Over the labelled examples of all ranks, with `count`, how many they were: alone if there are none."""
        return {set_name: _average(totals, self._world) for set_name, totals in self._totals.items()}


def _average(totals: dict[str, Tensor], world: World) -> dict[str, float]:
    names = sorted(totals, key=_natural)
    stacked = torch.stack([totals[name] for name in names])
    sum_over_ranks([stacked], world)
    values = dict(zip(names, stacked.tolist(), strict=True))
    count = values.pop("count")
    return {"count": count} | ({name: value / count for name, value in values.items()} if count else {})


def _natural(name: str) -> list[str | int]:
    """A key that sorts of_2 before of_16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Throughput:
    """Puzzles a second of all ranks together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._puzzles = 0
        self._started = time.perf_counter()

    def start(self) -> None:
        """Forget what was before; waits for the device."""
        self._wait()
        self._puzzles, self._started = 0, time.perf_counter()

    def count(self, puzzles: int) -> None:
        self._puzzles += puzzles

    def per_second(self) -> float:
        """Since `start`; waits for the device."""
        self._wait()
        rate = torch.tensor(self._puzzles / (time.perf_counter() - self._started), device=self._world.device)
        sum_over_ranks([rate], self._world)
        return float(rate)

    def _wait(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by set, a row each, under the names they are logged by; a sentence for sets without labels."""
    rows = [
        (f"{set_name}/{name}", value)
        for set_name, values in metrics.items()
        for name, value in values.items()
        if values["count"]
    ]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {value:>10.{0 if name.endswith('/count') else 4}f}" for name, value in rows]
    unlabelled = [set_name for set_name, values in metrics.items() if not values["count"]]
    return "\n".join(lines + [f"  {nothing_scored(set_name)}" for set_name in unlabelled])


def nothing_scored(set_name: str) -> str:
    """What stands in place of the metrics of a set whose labels are not known."""
    return f"No right answer is known to any puzzle of the set {set_name}, so nothing is scored."
