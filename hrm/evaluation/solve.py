"""One puzzle that the user typed: a checkpoint's answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from hrm.batch import IGNORE_LABEL_ID
from hrm.checkpoint.weights import Checkpoint, find_checkpoint, read_weights
from hrm.config import EnsembleConfig, EvaluateConfig, kernels_config
from hrm.data.pack import read_provenance
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.evaluation.loading import ModelSizes, load_model, trained_sizes
from hrm.evaluation.paths import Answers, Halting, Noise, make_member
from hrm.evaluation.picking import pick
from hrm.evaluation.report.boards import Board, outcome_of
from hrm.evaluation.report.text import legend_of, render_text
from hrm.evaluation.symmetries import DeviceSymmetry
from hrm.models import ACTLossHead
from hrm.tasks import parse_puzzle
from hrm.tasks.base import PuzzleSize, Rules, Solutions, Symmetry, Task, Tokens
from hrm.tasks.form import read_form


def solve_puzzle(config: EvaluateConfig, checkpoint: Checkpoint, text: str, world: World) -> None:
    """Answer the puzzle `text` and print the answer.

    Raises:
        UserError: it is no puzzle, or not of the kind that the checkpoint was trained on.
    """
    weights = read_weights(checkpoint.weights_file)
    vocab_size, _ = trained_sizes(checkpoint, weights)
    form = read_form(checkpoint.folder)
    task, inputs = parse_puzzle(text, vocab_size, form.task if form else _task_name(checkpoint))
    size = PuzzleSize(len(inputs), vocab_size)
    if not task.fits(size):
        raise UserError(
            f"a puzzle of {size.seq_len} cells is not of the kind that {checkpoint.weights_file} was trained on, which "
            f"has a vocabulary of {vocab_size} tokens: give another one."
        )
    if form and form.seq_len != size.seq_len:
        raise UserError(
            f"the puzzle has {size.seq_len} cells, but those that {checkpoint.weights_file} was trained on have "
            f"{form.seq_len}: give another one."
        )
    if config.kernels.backend == "auto":
        # Compiling anything would outlast one puzzle by far.
        config = replace(config, kernels=kernels_config("naive"))
    models = [_model_for(checkpoint, weights, size, config, world)]
    for other in map(find_checkpoint, config.ensemble.checkpoints):
        models.append(_model_for(other, read_weights(other.weights_file), size, config, world))
    count = config.ensemble.augmentations
    if count > task.num_symmetries(size):
        raise UserError(
            f"ensemble.augmentations={count} is too large: a puzzle of the task {task.name} has "
            f"{task.num_symmetries(size):.0f} symmetries."
        )
    rules = task.rules(size)
    halting = Halting(config.act_margin, rules) if config.act == "halt" else None
    answer, asked = _answer(models, inputs, task.symmetries(size, count), config.ensemble, rules, halting, world)
    if world.is_main:
        solutions = rules.solve(inputs) if rules and rules.solve else None
        board = _board(task, size, rules, inputs, answer, solutions)
        at_hand = len(models) * count * config.ensemble.paths
        several = f" It took {asked} of {at_hand} answers." if asked > 1 else ""
        print(f"{render_text(board)}\n{legend_of(board)}\n{outcome_of(board, rules, solutions)}{several}")


def _task_name(checkpoint: Checkpoint) -> str | None:
    """What the checkpoint's pack says of its task, if it is there."""
    data_path = checkpoint.config.get("data_path")
    name = read_provenance(data_path).get("task") if isinstance(data_path, str) else None
    return name if isinstance(name, str) else None


def _model_for(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], size: PuzzleSize, config: EvaluateConfig, world: World
) -> ACTLossHead:
    """The checkpoint's model for one puzzle at a time, which brings no pack to say what the model must know."""
    vocab_size, num_identifiers = trained_sizes(checkpoint, weights)
    if vocab_size != size.vocab_size:
        raise UserError(
            f"{checkpoint.weights_file} has a vocabulary of {vocab_size} tokens, but the puzzle is of "
            f"{size.vocab_size}: leave it out of ensemble.checkpoints."
        )
    sizes = ModelSizes(1, size.seq_len, vocab_size, num_identifiers)
    kernels, dtype, quantize = config.kernels, config.dtype, config.quantize
    return load_model(checkpoint, weights, sizes, kernels, world, config.act_max_steps, dtype, quantize=quantize)


def _answer(
    models: Sequence[ACTLossHead],
    inputs: Tokens,
    symmetries: Sequence[Symmetry],
    options: EnsembleConfig,
    rules: Rules | None,
    halting: Halting | None,
    world: World,
) -> tuple[Tokens, int]:
    """The first answer that keeps the rules, path by path, symmetry by symmetry and model by model, else what is picked
    of all; and how many answers were asked for."""
    answers: list[Answers] = []
    batch = {
        "inputs": torch.from_numpy(inputs.astype(np.int32)).unsqueeze(0).to(world.device),
        "labels": torch.full((1, len(inputs)), IGNORE_LABEL_ID, dtype=torch.int32, device=world.device),
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32, device=world.device),
    }
    members = [make_member(model, world, Noise.of(options), halting) for model in models]
    for path, symmetry, member in product(range(options.paths), symmetries, members):
        answer = member(batch, DeviceSymmetry.of(symmetry, world.device), path)
        answers.append(answer.checked(rules, batch["inputs"]) if rules else answer)
        if rules and answers[-1].keeps.item():
            tokens = answer.tokens
            break
    else:
        tokens = pick(options.pick, Answers.stacked(answers)).tokens
    return tokens[0].cpu().numpy(), len(answers)


def _board(
    task: Task, size: PuzzleSize, rules: Rules | None, inputs: Tokens, answer: Tokens, solutions: Solutions | None
) -> Board:
    """The answer beside the only right one, or the cells that break the rules."""
    solution, broken = solutions.only if solutions else None, None
    if rules and rules.broken_at and solution is None:
        (broken,) = rules.broken_at(inputs[None], answer[None])
    return Board(task.view(size), inputs, answer, solution, broken)
