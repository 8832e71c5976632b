"""What `evaluate.py` does: a test split is evaluated, or, with `input=`, puzzles of one's own are answered."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from hrm.checkpoint.weights import find_checkpoint
from hrm.config import EnsembleConfig, EvaluateConfig
from hrm.errors import UserError, printable, printable_lines
from hrm.evaluation.command import evaluate_checkpoint
from hrm.evaluation.paths import Noise
from hrm.evaluation.report.boards import Board
from hrm.evaluation.report.text import legend_of, render_text
from hrm.inference.files import STANDARD, predict_file
from hrm.inference.model import TrainedModel, from_pretrained
from hrm.inference.predictor import PredictOptions
from hrm.reading import parse_json
from hrm.tasks import all_tasks
from hrm.tasks.base import PuzzleSize
from hrm.tasks.form import read_form

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
        if config.puzzle is not None and not _is_drawn(config.puzzle, config.checkpoint):
            _answer_one(config, config.puzzle)
        else:
            evaluate_checkpoint(config)
        return
    _check(config)
    model, options = _model(config), _options(config)
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


def _model(config: EvaluateConfig) -> TrainedModel:
    return from_pretrained(
        config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
        quantize=config.quantize,
        data_path=config.data_path,
    )


def _options(config: EvaluateConfig) -> PredictOptions:
    several = config.ensemble
    return PredictOptions(
        config.act_max_steps,
        several.augmentations,
        halt=config.act == "halt",
        batch_size=config.global_batch_size,
        halt_margin=config.act_margin,
        paths=several.paths,
        noise=Noise(several.noise, several.noise_on, several.noise_at, several.seed),
        pick=several.pick,
    )


def _is_drawn(text: str, name: str) -> bool:
    """Whether a puzzle is a board that is filled in, which `hrm.evaluation.solve` draws; not so ARC's and one's own."""
    if text.lstrip()[:1] in ("{", "["):
        return False
    form = read_form(find_checkpoint(name).folder)
    if form is None or form.task not in (tasks := all_tasks()):
        return True
    return tasks[form.task].view(PuzzleSize(form.seq_len, form.vocab_size)).blank is not None


def _answer_one(config: EvaluateConfig, text: str) -> None:
    """Answer a puzzle that is no board, JSON or a text as `predict` takes it, and print the answer."""
    _check(replace(config, puzzle=None), "puzzle")
    value: object = text
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise UserError(f"puzzle= is not valid JSON ({error}).") from error
    model = _model(config)
    try:
        puzzles = model.task.puzzles_of(value, model.form)
    except UserError as error:
        raise UserError(f"puzzle= cannot be answered: {error}") from error
    out = model.predictor.answer(puzzles, range(len(puzzles)), _options(config))
    view = model.task.view(PuzzleSize(model.form.seq_len, model.form.vocab_size))
    for number, puzzle in enumerate(puzzles):
        if view.drawing == "colors":
            board = Board(view, puzzle.tokens, out.answers[number])
            print(f"{render_text(board)}\n{legend_of(board)}")
        else:
            print(printable_lines(_written(out.values[number])))
        print(f"q_halt {out.q_halt[number]:.2f} after {out.steps[number]} ACT steps.")


def _written(answer: object) -> str:
    """A list of symbols on a line, a grid on several."""
    is_grid = isinstance(answer, list) and bool(answer) and isinstance(answer[0], list)
    return "\n".join(_row(row) for row in (answer if is_grid and isinstance(answer, list) else [answer]))


def _row(cells: object) -> str:
    if not isinstance(cells, list):
        return str(cells)
    return " ".join("." if cell is None else str(cell) for cell in cells)


def _check(config: EvaluateConfig, option: str = "input") -> None:
    """UserError for options that have no meaning with input=, or with another one."""
    outputs = {
        name: getattr(config, name) for name in ("puzzle", "save_outputs", "show", "report", "results", "output_dir")
    }
    for name, value in outputs.items():
        if value:
            raise UserError(f"{option}= cannot be used with {name}=: leave one of them out.")
    if config.act == "both":
        raise UserError(f"{option}= cannot be used with act=both: take act=halt or act=full.")
    if config.ensemble.checkpoints != EnsembleConfig().checkpoints:
        raise UserError(f"{option}= cannot be used with ensemble.checkpoints=: one model answers.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{option}= works in a single process: leave out torchrun.")
