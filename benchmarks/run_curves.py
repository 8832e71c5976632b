"""Overlay the curves of finished runs: accuracy in training and test, ACT steps, and how often q_halt is right.

python -m benchmarks.run_curves checkpoints/one checkpoints/other --picture benchmarks/results/tables/runs.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from benchmarks.common import picture_file, run_command
from hrm.checkpoint.run_folder import CONFIG_FILE, METRICS_FILE
from hrm.errors import UserError
from hrm.evaluation.report.plots import Metric, Record, draw_panels, read_records, run_panel

_METRICS = (
    Metric("training puzzles exactly right", "percent", "exact_accuracy", ["train"]),
    Metric("test puzzles exactly right", "percent", "exact_accuracy", ["test", "average"]),
    Metric("ACT steps in training", "linear", "steps", ["train"]),
    Metric("q_halt right", "percent", "q_halt_accuracy", ["train", "test"]),
)
_X_LABELS = {"step": "training step", "minutes": "minutes of training"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=picture_file, required=True, help="an SVG or PNG file")
    parser.add_argument("--against", choices=_X_LABELS, default="step", help="minutes leave evaluations out")
    arguments = parser.parse_args(argv)
    names = [folder.resolve().name for folder in arguments.runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in arguments.runs]
    runs = {
        name: _read(folder, arguments.against == "minutes") for name, folder in zip(names, arguments.runs, strict=True)
    }
    panels = [run_panel(metric, runs, arguments.against) for metric in _METRICS]
    draw_panels(panels, _X_LABELS[arguments.against], arguments.picture, columns=2)


def with_minutes(records: Sequence[Record], batch_size: int) -> list[Record]:
    """Records with the `minutes` of training behind them, from the rates that those of training give.

    Evaluations take no part; stops of a run that was resumed neither.
    """
    minutes, step = 0.0, 0.0
    timed: list[Record] = []
    for record in records:
        if "puzzles_per_second" in record:
            minutes += (record["step"] - step) * batch_size / record["puzzles_per_second"] / 60
            step = record["step"]
        timed.append({**record, "minutes": minutes})
    return timed


def _read(folder: Path, timed: bool) -> Sequence[Record]:
    for name in (METRICS_FILE, CONFIG_FILE) if timed else (METRICS_FILE,):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: name the folder of a run that pretrain.py made.")
    records = list(read_records(folder / METRICS_FILE))
    return with_minutes(records, OmegaConf.load(folder / CONFIG_FILE).global_batch_size) if timed else records


if __name__ == "__main__":
    run_command(main)
