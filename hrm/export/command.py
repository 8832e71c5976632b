"""What `hrm export` does: write the files, compare them with PyTorch, and say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript
import torch

from hrm.config import ExportConfig
from hrm.errors import UserError, printable
from hrm.export.gate import Comparison, compare
from hrm.export.graphs import OPSET, SOLVE_FILE, STEP_FILE, export_solve, export_step, size_in_bytes
from hrm.export.puzzles import find_puzzles
from hrm.export.readme import readme, written
from hrm.inference.model import from_pretrained
from hrm.version import __version__
from hrm.writing import new_file

REPORT_FILE, README_FILE = "export.json", "README.md"
_OURS = {REPORT_FILE, README_FILE, *(f"{file}{part}" for file in (STEP_FILE, SOLVE_FILE) for part in ("", ".data"))}


def export(config: ExportConfig) -> None:
    """Export a model as `config` says.

    Raises:
        UserError: there is no such model or no puzzle to compare on, the folder cannot be written, or the exported
            model is less accurate than the gate allows; then its files and the report stay.
    """
    folder = Path(config.output)
    _check_folder(folder)
    model = from_pretrained(config.checkpoint, device="cpu", dtype="float32", data_path=config.data_path)
    puzzles = find_puzzles(model, config.puzzles, config.data_path, config.seed)
    num_steps = config.act_max_steps or model.act_max_steps
    _make_empty(folder)
    files = []
    for write in (lambda: export_step(model, folder), lambda: export_solve(model, folder, num_steps)):
        files.append(_written(write))
        print(f"Wrote {printable(str(files[-1]))}, {size_in_bytes(files[-1]) / 1e6:.1f} MB.", flush=True)
    example = written(model, puzzles.inputs[0].tolist())
    with new_file(folder / README_FILE) as file:
        file.write_text(readme(model, num_steps, example), encoding="utf-8")
    print(f"Comparing with PyTorch on {len(puzzles):,} puzzles: {printable(puzzles.source)}.", flush=True)
    found = compare(model, folder, num_steps, puzzles, config.batch_size)
    passed = found.accuracy_difference <= config.gate
    report = {
        "format": config.format,
        "checkpoint": model.checkpoint.weights_file.name,
        "architecture": model.model.model.inner.config.name,
        "task": model.task.name,
        "act_steps": num_steps,
        "opset": OPSET,
        "bytes": {file.name: size_in_bytes(file) for file in files},
        "versions": {
            "hrm": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "gate": config.gate,
        "passed": passed,
    }
    with new_file(folder / REPORT_FILE) as file:
        file.write_text(json.dumps(report | _by_runtime(found), indent=1) + "\n", encoding="utf-8")
    print(_table(found))
    if not passed:
        raise UserError(
            f"the exported model is right on {found.accuracy[1]:.1%} of {found.puzzles:,} puzzles and PyTorch's on "
            f"{found.accuracy[0]:.1%}, further apart than gate={config.gate} allows: do not use {folder}; its "
            f"{REPORT_FILE} has the figures."
        )


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file: give a folder.")
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if found and (found - _OURS or STEP_FILE not in found):
        raise UserError(f"output={folder} holds files but no export, and is not overwritten: give another folder.")


def _make_empty(folder: Path) -> None:
    """Remove an earlier export, so that a run that ends early leaves none that looks whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OURS:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror}): give another folder.") from error


def _written(write: Callable[[], Path]) -> Path:
    try:
        return write()
    except OSError as error:
        raise UserError(f"the model cannot be written ({error.strerror or error}): give another folder.") from error


def _by_runtime(found: Comparison) -> dict[str, Any]:
    """The comparison for JSON: pairs by the runtimes' names."""
    return {
        name: dict(zip(("pytorch", "onnxruntime"), value, strict=True)) if isinstance(value, tuple) else value
        for name, value in asdict(found).items()
    }


def _table(found: Comparison) -> str:
    rows = [
        ("", "PyTorch", "onnxruntime"),
        ("exact accuracy", *(f"{share:.2%}" for share in found.accuracy)),
        (f"ms a puzzle, {found.batch_size} at a time", *(f"{ms:,.1f}" for ms in found.ms_in_batch)),
        ("ms a puzzle, alone", *(f"{ms:,.1f}" for ms in found.ms_alone)),
    ]
    lines = [f"  {name:<32}{one:>12}{other:>14}" for name, one, other in rows]
    return "\n".join(
        [
            *lines,
            f"  The same answer to {found.same_answers:.2%} of the puzzles. Largest differences: logits "
            f"{found.step_difference:.1e} and states {found.state_difference:.1e} after one or two ACT steps, logits "
            f"{found.solve_difference:.1e} at the end.",
        ]
    )
