"""What `evaluate.py` does: a test split is evaluated, or, with `input=`, puzzles of one's own are answered."""

from __future__ import annotations

import os
import sys

from hrm.config import EnsembleConfig, EvaluateConfig
from hrm.errors import UserError, printable
from hrm.evaluation.command import evaluate_checkpoint
from hrm.inference.files import STANDARD, predict_file
from hrm.inference.model import from_pretrained
from hrm.inference.predictor import PredictOptions

EXIT_UNANSWERED = 3
"""Exit status where some of the inputs could not be answered; the others were."""


def evaluate_or_predict(config: EvaluateConfig) -> None:
    """Run `evaluate.py` as `config` says.

    Raises:
        UserError: for a checkpoint, a pack, a puzzle or a file that is missing, broken or does not fit the others.
        SystemExit: with `EXIT_UNANSWERED`.
    """
    if config.input is None:
        if config.output is not None:
            raise UserError("output= is for the answers to input=: give that too, or take output_dir=.")
        evaluate_checkpoint(config)
        return
    _check(config)
    model = from_pretrained(
        config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
        data_path=config.data_path,
    )
    options = PredictOptions(
        config.act_max_steps,
        config.ensemble.augmentations,
        halt=config.act == "halt",
        batch_size=config.global_batch_size,
        halt_margin=config.act_margin,
    )
    target = config.output or STANDARD
    count = predict_file(model, config.input, target, options)
    if count.bad or target != STANDARD:
        unanswered = f"; {count.bad:,} could not be answered: their lines have error" if count.bad else ""
        wrote = "" if target == STANDARD else f" in {target}"
        print(
            printable(f"Answered {count.inputs - count.bad:,} of {count.inputs:,} inputs{wrote}{unanswered}."),
            file=sys.stderr,
        )
    if count.bad:
        raise SystemExit(EXIT_UNANSWERED)


def _check(config: EvaluateConfig) -> None:
    """UserError for options that have no meaning with input=."""
    outputs = {name: getattr(config, name) for name in ("puzzle", "save_outputs", "show", "report", "output_dir")}
    for name, value in outputs.items():
        if value:
            raise UserError(f"input= cannot be used with {name}=: leave one of them out.")
    if config.act == "both":
        raise UserError("input= cannot be used with act=both: take act=halt or act=full.")
    if config.ensemble.checkpoints != EnsembleConfig().checkpoints:
        raise UserError("input= cannot be used with ensemble.checkpoints=: one model answers.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("input= works in a single process: leave out torchrun.")
