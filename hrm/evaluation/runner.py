"""Run a model over a test split, all ACT steps for every puzzle, and measure its predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hrm.batch import Batch
from hrm.cuda_graphs import GraphedWork
from hrm.data.loader import EvalLoader
from hrm.distributed.world import World
from hrm.evaluation.metrics import MetricSums, Throughput
from hrm.models import ACTLossHead
from hrm.output import bar_interval
from hrm.tasks.base import Evaluator
from hrm.writing import new_file

Runner = Callable[[Batch], tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Takes a batch on the device; returns metrics and outputs of the last ACT step."""


@torch.no_grad()  # not inference_mode: compiled no-gradient code of the training step serves here too
def run_act_steps(
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
        carry = model.model.think(carry, batch, model.halt_max_steps - 1)  # nothing reads the outputs of these
    _, _, metrics, outputs, _ = model(carry=carry, batch=batch, return_keys=return_keys)
    return metrics, outputs


class StepOutputs(NamedTuple):
    """A model's outputs after each of T ACT steps on a batch of B sequences of S tokens."""

    answers: Tensor  # [T, B, S] uint8
    q_halt: Tensor  # [T, B] float32, logits
    q_continue: Tensor  # [T, B] float32, logits


@torch.no_grad()  # as in `run_act_steps`
def record_act_steps(
    model: ACTLossHead, batch: Batch, return_keys: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor], StepOutputs]:
    """Spend all ACT steps on a batch, as `run_act_steps` does, and keep the answer of each.

    Only one step's logits are in memory at a time.

    Args:
        model: in evaluation mode, with a vocabulary of at most 256 tokens.
        return_keys: as in `ACTLossHead.forward`.

    Returns:
        `(metrics, outputs, steps)`: of the last step as in `ACTLossHead.forward`, and the outputs of every step.
    """
    keys = ["logits", "q_halt_logits", "q_continue_logits"]
    carry = model.initial_carry(batch)
    steps = []
    for _ in range(model.halt_max_steps):
        carry, _, metrics, outputs, _ = model(carry=carry, batch=batch, return_keys=[*keys, *return_keys])
        answer = outputs["logits"].argmax(-1).to(torch.uint8)
        steps.append((answer, outputs["q_halt_logits"].float(), outputs["q_continue_logits"].float()))
    stacked = StepOutputs(*(torch.stack(parts) for parts in zip(*steps, strict=True)))
    return metrics, {key: outputs[key] for key in return_keys if key in outputs}, stacked


def _recorded_among_outputs(
    model: ACTLossHead, batch: Batch, return_keys: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`record_act_steps`, the outputs of every step among the outputs."""
    metrics, outputs, steps = record_act_steps(model, batch, return_keys)
    return metrics, outputs | steps._asdict()


def make_runner(model: ACTLossHead, world: World, return_keys: Sequence[str] = (), *, record: bool = False) -> Runner:
    """`run_act_steps` with a model in evaluation mode, run eagerly or as a CUDA graph as the model's kernels say.

    With a graph, all batches must have one shape, and a call overwrites the results of the one before.

    Args:
        record: put the fields of `StepOutputs` among the outputs.
    """
    run: Runner = partial(_recorded_among_outputs if record else run_act_steps, model, return_keys=return_keys)
    return GraphedWork(run, world.device, eager_calls=1) if model.kernels.cuda_graphs else run


class Part(NamedTuple):
    """This rank's share of a global batch of a test split."""

    set_name: str
    batch: Batch  # on the host
    first: int  # index in the split of its first puzzle
    real: int  # puzzles in it; the rest is padding

    def puzzles(self) -> Batch:
        """The batch without padding."""
        return {name: field[: self.real] for name, field in self.batch.items()}


class Predictions(NamedTuple):
    """A model's answers to N puzzles of S tokens when it had halted, on the CPU."""

    tokens: Tensor  # [N, S] int32
    q_halt: Tensor  # [N], logits
    steps: Tensor  # [N] int32, ACT steps spent


class StepRecorder(Protocol):
    """Takes the outputs of every ACT step, such as `hrm.evaluation.report.recorder.Recorder`."""

    def add(self, batch: Batch, steps: StepOutputs, index: NDArray[np.int64]) -> None:
        """Take a batch's first `len(index)` sequences, which have these indices in the split."""


def parts_of(loader: EvalLoader, world: World) -> Iterator[Part]:
    """This rank's puzzles in order, under a progress bar."""
    set_start, in_set, previous = 0, 0, None
    bar = tqdm(loader, "evaluating", unit="batch", leave=False, mininterval=bar_interval(), disable=not world.is_main)
    for set_name, batch, count in bar:
        if set_name != previous:
            set_start, in_set, previous = set_start + in_set, 0, set_name
        skipped = world.rank * len(batch["inputs"])
        yield Part(set_name, batch, set_start + in_set + skipped, min(max(count - skipped, 0), len(batch["inputs"])))
        in_set += count


def show_predictions(
    evaluators: Sequence[Evaluator], set_name: str, puzzles: Batch, tokens: Tensor, q_halt: Tensor
) -> None:
    """Show evaluators the answers [N, S] to puzzles of a set, all on the CPU."""
    arrays = {name: field.numpy() for name, field in puzzles.items()}
    for evaluator in evaluators:
        evaluator.add(set_name, arrays, tokens.numpy(), q_halt.float().numpy())


def evaluate(
    model: ACTLossHead,
    loader: EvalLoader,
    world: World,
    keep: Sequence[str] = (),
    evaluators: Sequence[Evaluator] = (),
    recorder: StepRecorder | None = None,
    throughput: Throughput | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Metrics of every set of a test split.

    Args:
        keep: names of batch fields and outputs to keep, see `hrm.config.SAVEABLE_OUTPUTS`.
        evaluators: are shown all predictions.
        recorder: takes the outputs of every ACT step.
        throughput: counts the puzzles and takes the time.

    Returns:
        `(metrics, saved)`: `metrics[set][name]` averaged over the labelled examples of all ranks, with `count`, how
        many they were, alone where there are none; `saved[name]` of this rank's examples in order, on the CPU, padding
        left out.
    """
    keep = list(dict.fromkeys(keep))
    was_training = model.training
    model.eval()
    run = make_runner(
        model, world, [*keep, *(("logits", "q_halt_logits") if evaluators else ())], record=recorder is not None
    )
    sums = MetricSums(world)
    saved: dict[str, list[Tensor]] = defaultdict(list)
    with model.weights_at_hand():
        for number, part in enumerate(parts_of(loader, world)):
            if throughput and (number == 0 or (number == 2 and len(loader) > 4)):  # by then all is compiled
                throughput.start()
            metrics, outputs = run({name: x.to(world.device, non_blocking=True) for name, x in part.batch.items()})
            sums.add(part.set_name, metrics)
            for name in keep:
                saved[name].append({**part.batch, **outputs}[name][: part.real].cpu())
            if evaluators:
                tokens = outputs["logits"].argmax(-1).int()[: part.real].cpu()
                q_halt = outputs["q_halt_logits"][: part.real].cpu()
                show_predictions(evaluators, part.set_name, part.puzzles(), tokens, q_halt)
            if recorder:
                steps = StepOutputs(*(outputs[name] for name in StepOutputs._fields))
                recorder.add(part.batch, steps, np.arange(part.first, part.first + part.real))
            if throughput:
                throughput.count(part.real)
    model.train(was_training)
    return sums.averages(), {name: torch.cat(pieces) for name, pieces in saved.items()}


def save_outputs(outputs: dict[str, Tensor], folder: Path, step: int, world: World) -> Path:
    """Write this rank's saved outputs under the published name, `step_<n>_all_preds.<rank>`."""
    file = folder / f"step_{step}_all_preds.{world.rank}"
    if world.is_first_of_part:
        with new_file(file), file.open("xb") as stream:  # a stream of Python says why it cannot be written
            torch.save(outputs, stream)
    return file
