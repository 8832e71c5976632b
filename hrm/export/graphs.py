"""A model as ONNX files: one ACT step, and a whole solve as a loop over the same computation.

Shapes: B sequences, which may be any number, S input tokens, T tokens with the puzzle prefix, D hidden size, V tokens
of the vocabulary.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from hrm.errors import UserError, first_sentence
from hrm.evaluation.latent import by_definition
from hrm.inference.model import TrainedModel
from hrm.models.act import AdaptiveComputation, Carry
from hrm.version import __version__

OPSET = 20
STEP_FILE, SOLVE_FILE = "step.onnx", "solve.onnx"
INPUTS = ("inputs", "puzzle_identifiers")
OUTPUTS = ("logits", "q_halt", "q_continue")
NEW = "new_"  # before a state's name, where a step gives it


class Step(nn.Module):
    """One ACT step; see `export_step`."""

    def __init__(self, act: AdaptiveComputation) -> None:
        super().__init__()
        self.act = act

    def forward(
        self, inputs: Tensor, puzzle_identifiers: Tensor, halted: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        names = self.act.inner.initial_states
        batch = {"inputs": inputs, "puzzle_identifiers": puzzle_identifiers}
        steps = torch.zeros_like(halted, dtype=torch.int32)  # counted by whoever calls
        after, outputs = self.act(Carry(dict(zip(names, states, strict=True)), steps, halted, batch), batch)
        answers = (outputs["logits"], outputs["q_halt_logits"], outputs["q_continue_logits"])
        return *answers, *(after.states[name] for name in names)


class Solve(nn.Module):
    """A whole solve; see `export_solve`."""

    def __init__(self, act: AdaptiveComputation, num_steps: int) -> None:
        super().__init__()
        self.act, self.num_steps = act, num_steps

    def forward(self, inputs: Tensor, puzzle_identifiers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.act.inner
        names = list(inner.initial_states)
        batch = {"inputs": inputs, "puzzle_identifiers": puzzle_identifiers}
        initial, _, _ = self.act.reset_carry(self.act.initial_carry(batch), batch)
        prepared = inner.prepare(batch)

        def goes_on(step: Tensor, *_: Tensor) -> Tensor:
            return step < self.num_steps

        def advance(step: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            new = inner.recur(dict(zip(names, states, strict=True)), prepared)
            return step + 1, *(new[name] for name in names)

        _, *last = torch.while_loop(  # type: ignore[no-untyped-call]
            goes_on, advance, (torch.tensor(0), *(initial[name] for name in names))
        )
        states = dict(zip(names, last, strict=True))
        return inner.logits(states), *inner.q_values(states)


def export_step(model: TrainedModel, folder: Path) -> Path:
    """Write `step.onnx`.

    Inputs: `inputs` [B, S], `puzzle_identifiers` [B], int64; `halted` [B] bool, sequences that begin anew, whose states
    are not looked at; each state by its name [B, T, D] float32. Outputs: `logits` [B, S, V], `q_halt` and `q_continue`
    [B], logits, and each state by its name after `new_`.

    Args:
        model: on the CPU, in float32.

    Raises:
        UserError: this PyTorch cannot export it.
    """
    inner = model.model.model.inner
    states = inner.empty_states({"inputs": torch.zeros(2, model.form.seq_len)})
    return _export(
        model,
        Step(model.model.model),
        folder / STEP_FILE,
        [*_example(model), torch.ones(2, dtype=torch.bool), *states.values()],
        [*INPUTS, "halted", *states],
        [*OUTPUTS, *(f"{NEW}{name}" for name in states)],
        {},
    )


def export_solve(model: TrainedModel, folder: Path, num_steps: int) -> Path:
    """Write `solve.onnx`: `num_steps` ACT steps from the initial states, without early halting.

    Inputs: `inputs` [B, S], `puzzle_identifiers` [B], int64. Outputs, of the last step: `logits` [B, S, V], `q_halt`
    and `q_continue` [B], logits.

    Args:
        model: on the CPU, in float32.

    Raises:
        UserError: this PyTorch cannot export it.
    """
    return _export(
        model,
        Solve(model.model.model, num_steps),
        folder / SOLVE_FILE,
        _example(model),
        INPUTS,
        OUTPUTS,
        {"act_steps": str(num_steps)},
    )


def _example(model: TrainedModel) -> list[Tensor]:
    """Two puzzles: with one, PyTorch would take the size of the batch for a constant."""
    return [torch.zeros(2, model.form.seq_len, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]


def _export(
    model: TrainedModel,
    module: nn.Module,
    file: Path,
    example: list[Tensor],
    input_names: tuple[str, ...] | list[str],
    output_names: tuple[str, ...] | list[str],
    about: Mapping[str, str],
) -> Path:
    batch = torch.export.Dim("batch")
    shapes: list[Any] = [{0: batch} for _ in example]
    if isinstance(module, Step):  # its states are one argument
        named = 3
        shapes = [*shapes[:named], tuple(shapes[named:])]
    try:
        with _quiet(), torch.no_grad(), by_definition(model.model):
            program = torch.onnx.export(
                module.eval(),
                tuple(example),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tuple(shapes),
                input_names=list(input_names),
                output_names=list(output_names),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            f"PyTorch {torch.__version__} cannot write {model.checkpoint.weights_file} as {file.name} "
            f"({first_sentence(error)}): take a later PyTorch or another architecture."
        ) from error
    assert program is not None
    if any(isinstance(value.shape[0], int) for value in program.model.graph.inputs if value.shape is not None):
        raise UserError(
            f"{model.checkpoint.weights_file} cannot be written as {file.name}: PyTorch {torch.__version__} takes the "
            f"size of the batch for a constant in {model.model.model.inner.config.name}."
        )
    _without_traces(program.model)
    program.model.metadata_props.update(
        {
            "hrm_version": __version__,
            "architecture": model.model.model.inner.config.name,
            "task": model.task.name,
            **about,
        }
    )
    program.save(file)
    return file


def _without_traces(model: onnx_ir.Model) -> None:
    """Leave out the stack traces beside every node, which take more room than a small model's weights."""
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed and on names of dimensions."""
    logs = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnx_ir"))}
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in logs.items():
            log.setLevel(level)


def size_in_bytes(file: Path) -> int:
    """Of an ONNX file and of the weights beside it, which large models have in a file of their own."""
    return sum(os.path.getsize(part) for part in (file, Path(f"{file}.data")) if part.exists())
