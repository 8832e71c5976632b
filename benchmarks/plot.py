"""Draw the results of a benchmark as a bar chart: speed relative to `compile`, by shape and preset.

python -m benchmarks.plot benchmarks/results/tables/DATE-train-step.json benchmarks/results/tables/train-step.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import BASELINE
from hrm.evaluation.report.plots import pyplot

_SPEED_UP = f"x {BASELINE}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file that a benchmark wrote")
    parser.add_argument("picture", type=Path, help="an SVG or PNG file")
    arguments = parser.parse_args(argv)
    content = json.loads(arguments.results.read_text())
    draw(content["about"], [row for row in content["rows"] if _SPEED_UP in row], arguments.picture)


def draw(about: dict[str, str], rows: Sequence[dict[str, float | str]], picture: Path) -> None:
    """One group of bars for each shape, one bar for each preset, its milliseconds written at its end."""
    plt = pyplot()
    shapes = list(dict.fromkeys((row["S"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(2.6 * len(shapes) + 1, 2.6), sharey=True, squeeze=False)
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
    figure.tight_layout()
    with plt.rc_context({"svg.fonttype": "none"}):  # text as text
        figure.savefig(picture)


if __name__ == "__main__":
    main()
