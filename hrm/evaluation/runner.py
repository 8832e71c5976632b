"""Run a model to its answers over a test split and count how good they are."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.cuda_graphs import GraphedWork
from hrm.data.loader import EvalLoader
from hrm.distributed.world import World, sum_over_ranks
from hrm.evaluation.trajectory import Recorder, Steps, record
from hrm.models import ACTLossHead

Thinking = Callable[[Batch], tuple[dict[str, Tensor], dict[str, Tensor]]]


@torch.no_grad()  # not inference_mode: compiled no-gradient code of the training step serves here too
def think(
    model: ACTLossHead, batch: Batch, return_keys: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Spend all ACT steps on a batch.

    Args:
        model: in evaluation mode.
        return_keys: as in `ACTLossHead.forward`.

    Returns:
        `(metrics, outputs)` of the last step, as in `ACTLossHead.forward`.
    """
    carry = model.initial_carry(batch)
    if model.halt_max_steps > 1:
        carry = model.model.think(carry, batch, model.halt_max_steps - 1)  # nobody asks what these would say
    _, _, metrics, outputs, _ = model(carry=carry, batch=batch, return_keys=return_keys)
    return metrics, outputs


def _think_aloud(
    model: ACTLossHead, batch: Batch, return_keys: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`think`, with what was said after every step among the outputs."""
    metrics, outputs, steps = record(model, batch, return_keys)
    return metrics, outputs | steps._asdict()


def make_thinking(
    model: ACTLossHead, world: World, return_keys: Sequence[str] = (), *, aloud: bool = False
) -> Thinking:
    """`think` with a model in evaluation mode, run eagerly or as a CUDA graph as the model's kernels say.

    With a graph, all batches must have one shape, and a call overwrites the results of the one before.

    Args:
        aloud: put the fields of `Steps`, what was said after every step, among the outputs.
    """
    thinking: Thinking = partial(_think_aloud if aloud else think, model, return_keys=return_keys)
    return GraphedWork(thinking, world.device, eager_calls=1) if model.kernels.cuda_graphs else thinking


class Part(NamedTuple):
    """This rank's share of a global batch of a test split."""

    set_name: str
    batch: Batch  # on the host
    first: int  # place in the split of its first puzzle
    real: int  # puzzles in it; the rest is padding


class Answers(NamedTuple):
    """What a model said of N puzzles of S tokens when it had halted, on the CPU."""

    tokens: Tensor  # [N, S] int32
    q_halt: Tensor  # [N], logits
    steps: Tensor  # [N] int32, ACT steps spent


class Examiner(Protocol):
    """Sees this rank's answers and scores them in its own way."""

    counts_votes: bool  # wants every answer of an ensemble, not what they voted for

    def __call__(self, set_name: str, puzzles: Batch, answers: Answers) -> None:
        """Take some puzzles of a set, on the host, and the answers to them."""

    def verdict(self, world: World, folder: Path) -> str:
        """What to print, from the answers of all ranks, empty on all but rank 0; may leave files in `folder`."""


def parts(loader: EvalLoader, world: World) -> Iterator[Part]:
    """This rank's puzzles in order, under a progress bar."""
    set_start, in_set, previous = 0, 0, None
    for set_name, batch, count in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=not world.is_main):
        if set_name != previous:
            set_start, in_set, previous = set_start + in_set, 0, set_name
        skipped = world.rank * len(batch["inputs"])
        yield Part(set_name, batch, set_start + in_set + skipped, min(max(count - skipped, 0), len(batch["inputs"])))
        in_set += count


def evaluate(
    model: ACTLossHead,
    loader: EvalLoader,
    world: World,
    keep: Sequence[str] = (),
    examiners: Sequence[Examiner] = (),
    recorder: Recorder | None = None,
    pace: Pace | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Metrics of every set of a test split.

    Args:
        keep: names of batch fields and outputs to keep, see `hrm.config.SAVEABLE_OUTPUTS`.
        examiners: are shown all answers.
        recorder: takes what was said after every step.
        pace: takes the time.

    Returns:
        `(metrics, saved)`: `metrics[set][name]` averaged over the examples of all ranks, with `count`, how many they
        were; `saved[name]` of this rank's examples in order, on the CPU, padding left out.
    """
    keep = list(dict.fromkeys(keep))
    was_training = model.training
    model.eval()
    wanted = [*keep, *(("logits", "q_halt_logits") if examiners else ())]
    thinking = make_thinking(model, world, wanted, aloud=recorder is not None)
    sums = Sums(world)
    saved: dict[str, list[Tensor]] = defaultdict(list)
    with model.weights_at_hand():
        for number, part in enumerate(parts(loader, world)):
            if pace and (number == 0 or (number == 2 and len(loader) > 4)):  # by then all is compiled and recorded
                pace.start()
            metrics, outputs = thinking({name: x.to(world.device, non_blocking=True) for name, x in part.batch.items()})
            sums.add(part.set_name, metrics)
            for name in keep:
                saved[name].append({**part.batch, **outputs}[name][: part.real].cpu())
            if examiners:
                tokens = outputs["logits"].argmax(-1).int()
                steps = torch.full_like(tokens[:, 0], model.halt_max_steps)
                said = Answers(*(field[: part.real].cpu() for field in (tokens, outputs["q_halt_logits"], steps)))
                for examiner in examiners:
                    examiner(part.set_name, {name: field[: part.real] for name, field in part.batch.items()}, said)
            if recorder:
                steps_said = Steps(*(outputs[name] for name in Steps._fields))
                recorder.add(part.batch, steps_said, np.arange(part.first, part.first + part.real))
            if pace:
                pace.count(part.real)
    model.train(was_training)
    return sums.averages(), {name: torch.cat(pieces) for name, pieces in saved.items()}


class Judged(NamedTuple):
    """How good the answers to N puzzles are."""

    counted: Tensor  # [N] bool: there is a label
    right: Tensor  # [N], share of the labelled tokens that are right
    exact: Tensor  # [N] bool: all of them are


def judge(labels: Tensor, tokens: Tensor) -> Judged:
    """Compare answers with labels as `ACTLossHead.forward` does.

    Args:
        labels: [N, S], IGNORE_LABEL_ID where there is none.
        tokens: answers [N, S].
    """
    labelled = labels != IGNORE_LABEL_ID
    count = labelled.sum(-1)
    right = (labelled & (tokens == labels)).sum(-1)
    return Judged(count > 0, right / count.clamp_min(1), right == count)


def score(judged: Judged) -> dict[str, Tensor]:
    """Sums of `count`, `accuracy` and `exact_accuracy`, as in `ACTLossHead.forward`."""
    return {
        "count": judged.counted.sum(),
        "accuracy": judged.right.sum(),
        "exact_accuracy": (judged.counted & judged.exact).sum(),
    }


class Sums:
    """Sums of metrics by set, on the device until they are asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._totals: dict[str, dict[str, Tensor]] = {}

    def add(self, set_name: str, metrics: Mapping[str, Tensor]) -> None:
        totals = self._totals.setdefault(set_name, {})
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value.to(self._world.device, torch.float32)

    def averages(self) -> dict[str, dict[str, float]]:
        """Over the examples of all ranks, with `count`, how many they were."""
        return {set_name: _average(totals, self._world) for set_name, totals in self._totals.items()}


def _average(totals: dict[str, Tensor], world: World) -> dict[str, float]:
    names = sorted(totals, key=_natural)
    stacked = torch.stack([totals[name] for name in names])
    sum_over_ranks([stacked], world)
    values = dict(zip(names, stacked.tolist(), strict=True))
    count = values.pop("count")
    return {"count": count} | {name: value / max(count, 1) for name, value in values.items()}


def _natural(name: str) -> list[str | int]:
    """A key that sorts of_2 before of_16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Pace:
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


def save_outputs(outputs: dict[str, Tensor], folder: Path, step: int, world: World) -> Path:
    """Write this rank's saved outputs under the published name, `step_<n>_all_preds.<rank>`."""
    file = folder / f"step_{step}_all_preds.{world.rank}"
    if world.is_first_of_part:
        torch.save(outputs, file)
    return file
