"""What `hrm export` does: write the files, compare them with PyTorch, and say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hrm.config import ExportConfig
from hrm.config.extras import need
from hrm.errors import UserError, printable
from hrm.export.format import Format, device_for
from hrm.export.formats import load_format
from hrm.export.gate import Comparison, compare
from hrm.export.graphs import Graph, module_graphs, whole_graphs
from hrm.export.puzzles import Puzzles, find_puzzles
from hrm.export.readme import PROGRAM_FILE, program, readme, written
from hrm.inference.model import TrainedModel, from_pretrained
from hrm.reading import read_json
from hrm.version import __version__
from hrm.writing import new_file

REPORT_FILE, TEXT_FILE, README_FILE = "export.json", "export.txt", "README.md"


def export(config: ExportConfig) -> None:
    """Export a model as `config` says.

    Raises:
        UserError: there is no such model or no puzzle to compare on, the folder cannot be written, the format cannot be
            written or run here, or the exported model is less accurate than the gate allows; then its files and the
            report stay.
    """
    chosen = load_format(config.format)
    need(f"format={config.format}", "export", chosen.packages)
    device = device_for(config.format, chosen, config.device)
    if reason := chosen.why_not(device):
        raise UserError(f"format={config.format} cannot be written here: {reason}; or give format=onnx.")
    folder = Path(config.output)
    earlier = _earlier_export(folder)
    model = from_pretrained(config.checkpoint, device=device, dtype="float32", data_path=config.data_path)
    puzzles = find_puzzles(model, config.puzzles, config.data_path, config.seed)
    num_steps = config.act_max_steps or model.act_max_steps
    graphs = _graphs(model, config.parts or _usual_parts(model, chosen), num_steps, chosen)
    report: dict[str, Any] = {
        "format": config.format,
        "checkpoint": model.checkpoint.weights_file.name,
        "architecture": model.model.model.inner.config.name,
        "task": model.task.name,
        "act_steps": num_steps,
        "versions": {"hrm": __version__, "torch": torch.__version__, **chosen.versions()},
        "gate": config.gate,
        "passed": None,  # until files have been compared
    }
    _replace(folder, earlier, graphs, chosen, report)
    for graph in graphs:
        _write(graph, model, chosen, config)
        size = sum(_sizes(folder, chosen.files(graph.name)).values())
        print(f"Wrote {printable(str(folder / chosen.files(graph.name)[0]))}, {size / 1e6:.1f} MB.", flush=True)
    _write_pages(model, config, chosen, graphs, num_steps, puzzles)
    print(f"Comparing with PyTorch on {len(puzzles):,} puzzles: {printable(puzzles.source)}.", flush=True)
    runs = {graph.name: chosen.open(graph, folder, device) for graph in graphs}
    batch_size = min(config.batch_size, config.max_batch_size) if chosen.bounded else config.batch_size
    found = compare(model, runs, num_steps, puzzles, batch_size)
    passed = found.passes(config.gate)
    files = _sizes(folder, [file for graph in graphs for file in chosen.files(graph.name)])
    _write_report(folder, report | {"passed": passed, "bytes": files} | asdict(found))
    table = _table(found, chosen)
    with new_file(folder / TEXT_FILE) as file:
        file.write_text(f"{_heading(model, config, found, passed=passed)}\n\n{table}\n", encoding="utf-8")
    print(table)
    if not passed:
        raise UserError(
            f"the exported model is right on {found.worst.accuracy:.1%} of {found.puzzles:,} puzzles and PyTorch's on "
            f"{found.pytorch.accuracy:.1%}, further apart than gate={config.gate} allows: do not use {folder}; its "
            f"{REPORT_FILE} has the figures."
        )


def _usual_parts(model: TrainedModel, chosen: Format) -> str:
    return chosen.parts if model.model.model.inner.levels else "whole"


def _graphs(model: TrainedModel, parts: str, num_steps: int, chosen: Format) -> list[Graph]:
    whole = list(whole_graphs(model, num_steps, solve=chosen.has_solve)) if parts != "modules" else []
    return whole + (list(module_graphs(model)) if parts != "whole" else [])


# ---- the folder


def _earlier_export(folder: Path) -> list[Path]:
    """The files of an earlier export there, which this one replaces.

    Raises:
        UserError: the folder holds other files too, or is none.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file: give a folder.")
    found = [file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]
    if not found:
        return []
    try:
        listed = set(read_json(folder / REPORT_FILE)["files"])
    except (OSError, ValueError, LookupError, TypeError):
        listed = set()
    others = sorted({file.relative_to(folder).as_posix() for file in found} - listed - {REPORT_FILE})
    if others or not listed:
        one = others[0] if others else REPORT_FILE
        raise UserError(
            f"output={folder} holds {one}, which no export wrote there, and is not overwritten: give another folder."
        )
    return found


def _replace(
    folder: Path, earlier: Sequence[Path], graphs: Sequence[Graph], chosen: Format, report: dict[str, Any]
) -> None:
    """Remove an earlier export, so that a run that ends early leaves none that looks whole, and note what comes."""
    files = [file for graph in graphs for file in chosen.files(graph.name)]
    report["files"] = [*files, README_FILE, PROGRAM_FILE, TEXT_FILE]
    try:
        for file in earlier:
            file.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror}): give another folder.") from error
    _write_report(folder, report)


def _write(graph: Graph, model: TrainedModel, chosen: Format, config: ExportConfig) -> None:
    try:
        chosen.write(graph, model, Path(config.output), config.max_batch_size)
    except OSError as error:
        raise UserError(f"the model cannot be written ({error.strerror or error}): give another folder.") from error


def _sizes(folder: Path, files: Sequence[str]) -> dict[str, int]:
    """The sizes in bytes of those that there are."""
    return {name: (folder / name).stat().st_size for name in files if (folder / name).exists()}


def _write_pages(
    model: TrainedModel,
    config: ExportConfig,
    chosen: Format,
    graphs: Sequence[Graph],
    num_steps: int,
    puzzles: Puzzles,
) -> None:
    example = written(model, puzzles.inputs[0].tolist())
    pages = {
        README_FILE: readme(model, config.format, chosen, graphs, config.max_batch_size, example),
        PROGRAM_FILE: program(model, chosen, graphs, num_steps),
    }
    for name, text in pages.items():
        with new_file(Path(config.output) / name) as file:
            file.write_text(text, encoding="utf-8")


# ---- the report


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    with new_file(folder / REPORT_FILE) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _heading(model: TrainedModel, config: ExportConfig, found: Comparison, *, passed: bool) -> str:
    return (
        f"{model.checkpoint.weights_file.name} as format={config.format}, compared with PyTorch on {found.puzzles:,} "
        f"puzzles: {found.source}.\nThe gate, gate={config.gate}: {'passed' if passed else 'FAILED'}."
    )


def _table(found: Comparison, chosen: Format) -> str:
    columns = [found.pytorch, *found.solved.values()]
    names = ["PyTorch", *(f"{chosen.runtime}: {way}" for way in found.solved)]
    rows = [
        ("", *names),
        ("exact accuracy", *(f"{column.accuracy:.2%}" for column in columns)),
        (f"ms a puzzle, {found.batch_size} at a time", *(f"{column.ms_in_batch:,.1f}" for column in columns)),
        ("ms a puzzle, alone", *(f"{column.ms_alone:,.1f}" for column in columns)),
        ("the same answer", "", *(f"{way.same_answers:.2%}" for way in found.solved.values())),
        ("largest difference of logits", "", *(f"{way.logits_difference:.1e}" for way in found.solved.values())),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(["", first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in rows]
    for way, apart in found.first_steps.items():
        lines.append(
            f"  After one or two ACT steps by {way}: logits differ by at most {apart.logits:.1e}, states by "
            f"{apart.states:.1e}."
        )
    return "\n".join(line.rstrip() for line in lines)
