"""Draw the results of a benchmark as bars: speed relative to `compile` by shape and preset, or the table of the suite.

python -m benchmarks.plot benchmarks/results/tables/DATE-train-step.json benchmarks/results/tables/train-step.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINE, run_command
from hrm.evaluation.report.picture import new_picture, save_picture

_SPEED_UP = f"x {BASELINE}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file that a benchmark wrote")
    parser.add_argument("picture", type=Path, help="an SVG or PNG file")
    arguments = parser.parse_args(argv)
    content = json.loads(arguments.results.read_text())
    rows = content["rows"]
    if any("way" in row for row in rows):
        draw_ways(content["about"], rows, arguments.picture)
    else:
        draw(content["about"], [row for row in rows if _SPEED_UP in row], arguments.picture)


def draw(about: dict[str, str], rows: Sequence[dict[str, float | str]], picture: Path) -> None:
    """One group of bars for each shape, one bar for each preset, its milliseconds written at its end."""
    shapes = list(dict.fromkeys((row["S"], row["batch"]) for row in rows))
    figure, axes = new_picture(1, len(shapes), size=(2.6 * len(shapes) + 1, 2.6), sharey=True)
    for (seq_len, batch), panel in zip(shapes, axes[0], strict=True):
        of_shape = [row for row in rows if (row["S"], row["batch"]) == (seq_len, batch)]
        names = [str(row["kernels"]) for row in of_shape]
        speeds = [float(row[_SPEED_UP]) for row in of_shape]
        colors = ["#9aa0a6" if name == BASELINE else "#1f6feb" for name in names]
        panel.barh(names, speeds, color=colors)
        for index, row in enumerate(of_shape):
            panel.text(speeds[index], index, f" {float(row['ms']):.3g} ms", va="center", fontsize=7)
        panel.axvline(1, color="black", linewidth=0.6)
        panel.set_title(f"{seq_len} tokens, batch {batch}", fontsize=9)
        panel.set_xlim(0, 1.35 * max(speeds))
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"times as fast as {BASELINE}; {about['device']}, PyTorch {about['torch']}", fontsize=8)
    save_picture(figure, picture)


def draw_ways(about: Mapping[str, str], rows: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """The rows of `benchmarks.suite` that ran: a panel for each of time, memory and rate, a bar for each way."""
    ran = [row for row in rows if "ms" in row]
    names = [f"{row['way']} ({row['processes']})" if row["processes"] > 1 else row["way"] for row in ran]
    colors = ["#1f6feb" if row["processes"] > 1 else "#9aa0a6" for row in ran]
    panels = {"ms": "ms a training step", "MB": "MB of a process", "tokens/s": "tokens a second"}
    figure, axes = new_picture(1, len(panels), size=(9, 0.3 * len(ran) + 1.2), sharey=True)
    for (column, title), panel in zip(panels.items(), axes[0], strict=True):
        values = [float(row[column]) for row in ran]
        panel.barh(names, values, color=colors)
        for index, value in enumerate(values):
            panel.text(value, index, f" {value:,.3g}" if value < 1000 else f" {value:,.0f}", va="center", fontsize=7)
        panel.set_title(title, fontsize=9)
        panel.set_xlim(0, 1.45 * max(values, default=1))
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"{about['global batch']}; {about['device']}, PyTorch {about['torch']}", fontsize=8)
    save_picture(figure, picture)


if __name__ == "__main__":
    run_command(main)
