"""A model in 8 bit beside the same model as it is: size, time, exact accuracy; and stored in int8: `hrm quantize`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hrm.checkpoint.weights import PRETRAINED_CONFIG, PRETRAINED_WEIGHTS
from hrm.config import QuantizeConfig
from hrm.errors import UserError, printable
from hrm.evaluation.loading import describe_model
from hrm.export.puzzles import Puzzles, find_puzzles
from hrm.inference.model import TrainedModel, from_pretrained
from hrm.inference.predictor import PredictOptions, sequences_at_once
from hrm.tasks.form import FORM_FILE, IDENTIFIERS_FILE, Puzzle
from hrm.version import __version__
from hrm.writing import new_file

REPORT_FILE = "quantize.json"
_OURS = {PRETRAINED_WEIGHTS, PRETRAINED_CONFIG, FORM_FILE, IDENTIFIERS_FILE, REPORT_FILE, "README.md"}
_ALONE = 5  # puzzles that are timed one at a time


@dataclass(frozen=True)
class Measured:
    """How a model answers, each puzzle halting where the model says so."""

    computed: str  # by which kernels, in which dtype
    bytes: int | None  # of its file; None where there is none of it
    accuracy: float  # share of the puzzles that are right at every token
    act_steps: float  # mean of a puzzle
    ms_in_batch: float  # milliseconds an ACT step and puzzle, `batch_size` at a time
    ms_alone: float  # the same for puzzles that come alone


def quantize(config: QuantizeConfig) -> None:
    """Compare a model with itself in 8 bit, and store it, as `config` says.

    Raises:
        UserError: there is no such model or no puzzle to compare on, the device cannot compute so, the folder cannot be
            written, or accuracy falls by more than the gate allows; then what was written and the report stay.
    """
    folder = None if config.output is None else Path(config.output)
    if folder is not None:
        if config.quantize != "int8":
            raise UserError(f"output= stores int8, which quantize={config.quantize} can compute with too: drop one.")
        _check_folder(folder)
    plain = _load(config, config.checkpoint, "none")
    rounded = _load(config, config.checkpoint, config.quantize)
    puzzles = find_puzzles(plain, config.puzzles, config.data_path, config.seed)
    if folder is not None:
        rounded = _stored(config, rounded, folder)
    print(f"Comparing on {len(puzzles):,} puzzles: {printable(puzzles.source)}.", flush=True)
    batch_size = config.batch_size or sequences_at_once(plain.device)
    found, answers = {}, []
    for name, model in (("as it is", plain), (config.quantize, rounded)):
        has_file = model is plain or folder is not None
        found[name], answered = measure(model, puzzles, batch_size, config.act_max_steps, has_file=has_file)
        answers.append(answered)
    same = float((answers[0] == answers[1]).all(1).mean())
    fall = found["as it is"].accuracy - found[config.quantize].accuracy
    passed = fall <= config.gate
    print(_table(found, same, batch_size))
    if folder is not None:
        report = {
            "quantize": config.quantize,
            "checkpoint": plain.checkpoint.weights_file.name,
            "task": plain.task.name,
            "device": str(plain.device),
            "puzzles": len(puzzles),
            "source": puzzles.source,
            "batch_size": batch_size,
            "measured": {name: asdict(each) for name, each in found.items()},
            "same_answers": same,
            "gate": config.gate,
            "passed": passed,
            "versions": {"hrm": __version__, "torch": torch.__version__},
        }
        with new_file(folder / REPORT_FILE) as file:
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not passed:
        advice = f"do not use {folder}, whose {REPORT_FILE} has the figures" if folder else "do not use it"
        raise UserError(
            f"in {config.quantize} the model is right on {found[config.quantize].accuracy:.1%} of {len(puzzles):,} "
            f"puzzles and as it is on {found['as it is'].accuracy:.1%}, which falls by more than gate={config.gate} "
            f"allows: {advice}."
        )


def measure(
    model: TrainedModel,
    puzzles: Puzzles,
    batch_size: int,
    act_max_steps: int | None = None,
    *,
    has_file: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Measured, NDArray[np.int64]]:
    """Answer the puzzles, and time that.

    Args:
        has_file: whether the model is what its file holds, whose size is then told.
        clock: seconds of the kind that counts.

    Returns:
        What was measured, and the answers [N, S].
    """
    given = [Puzzle(tokens, int(row)) for tokens, row in zip(puzzles.inputs, puzzles.identifiers, strict=True)]
    together = PredictOptions(act_max_steps, batch_size=batch_size)
    alone = PredictOptions(act_max_steps, batch_size=1)

    def timed(some: Sequence[Puzzle], options: PredictOptions) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
        start = clock()
        out = model.predictor.answer(some, range(len(some)), options)
        return out.answers, out.steps, clock() - start

    for options in (together, alone):  # what is compiled, recorded and prepared is not timed
        for _ in range(2):
            timed(given[: options.batch_size], options)
    ones = [timed([puzzle], alone) for puzzle in given[:_ALONE]]
    answers, steps, seconds = timed(given, together)
    size = model.checkpoint.weights_file.stat().st_size if has_file else None
    return (
        Measured(
            computed=f"{model.device}, {describe_model(model.model, model.checkpoint)}",
            bytes=size,
            accuracy=float(puzzles.right(answers).mean()),
            act_steps=float(steps.mean()),
            ms_in_batch=1000 * seconds / float(steps.sum()),
            ms_alone=1000 * float(np.median([seconds / steps.sum() for _, steps, seconds in ones])),
        ),
        answers,
    )


def _load(config: QuantizeConfig, name: str, precision: str) -> TrainedModel:
    return from_pretrained(
        name,
        device=config.device,
        dtype=config.dtype if precision == "none" else "auto",
        quantize=precision,
        data_path=config.data_path,
    )


# ---- the folder


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file: give a folder.")
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if found and (found - _OURS or REPORT_FILE not in found):
        raise UserError(
            f"output={folder} holds files that no hrm quantize wrote, and is not overwritten: give another folder."
        )


def _stored(config: QuantizeConfig, model: TrainedModel, folder: Path) -> TrainedModel:
    """The model as it is read from the folder that it was written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OURS:
            (folder / name).unlink(missing_ok=True)
        (folder / REPORT_FILE).write_text('{"passed": null}\n', encoding="utf-8")  # until it has been compared
        model.save_pretrained(folder)
    except OSError as error:
        raise UserError(
            f"output={folder} cannot be written ({error.strerror or error}): give another folder."
        ) from error
    print(f"Wrote {printable(str(folder))}.", flush=True)
    return _load(config, str(folder), config.quantize)


# ---- what is shown


def _table(found: dict[str, Measured], same: float, batch_size: int) -> str:
    columns = list(found.values())
    rows: list[tuple[Any, ...]] = [
        ("", *found),
        ("exact accuracy", *(f"{each.accuracy:.2%}" for each in columns)),
        ("ACT steps a puzzle", *(f"{each.act_steps:.2f}" for each in columns)),
        (f"ms an ACT step and puzzle, {batch_size} at a time", *(f"{each.ms_in_batch:.3g}" for each in columns)),
        ("ms an ACT step, a puzzle alone", *(f"{each.ms_alone:.3g}" for each in columns)),
        ("MB of weights", *(f"{each.bytes / 1e6:.2f}" if each.bytes else "" for each in columns)),
    ]
    lines = [f"  {name:<44}{one:>12}{other:>12}" for name, one, other in rows]
    computed = [f"  {name}: {each.computed}." for name, each in found.items()]
    return "\n".join([*lines, f"  The same answer to {same:.2%} of the puzzles.", *computed])
