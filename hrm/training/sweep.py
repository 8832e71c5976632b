"""The end of several runs by `-m`: how each one did, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hrm.config.compose import SweptRun
from hrm.errors import printable_lines
from hrm.training.loop import TrainResult
from hrm.training.run import Metrics


def sweep_table(runs: Sequence[SweptRun[TrainResult]]) -> str:
    """A line for each run: the options in which the runs differ, the last evaluation, the run folder."""
    options = [dict(override.lstrip("+").split("=", 1) for override in run.overrides) for run in runs]
    names = [name for name in dict.fromkeys(name for given in options for name in given) if _differs(name, options)]
    rows = [
        {name: given.get(name, "") for name in names}
        | _outcome(run.result.metrics)
        | {"run folder": str(run.result.folder)}
        for given, run in zip(options, runs, strict=True)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return printable_lines(
        "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
    )


def _differs(name: str, options: Sequence[Mapping[str, str]]) -> bool:
    return len({given.get(name) for given in options}) > 1 and name not in ("checkpoint_path", "run_name")


def _outcome(metrics: Metrics) -> dict[str, str]:
    """What the last evaluation measured of each set."""
    cells = {}
    for set_name, of_set in metrics.items():
        for metric, label in (("exact_accuracy", "exactly right"), ("accuracy", "cells right")):
            if metric in of_set:
                cells[label if set_name == "all" else f"{set_name} {label}"] = f"{of_set[metric]:.2%}"
    return cells
