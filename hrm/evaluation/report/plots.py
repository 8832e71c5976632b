"""Curves of training as pictures, from the `metrics.jsonl` of runs or from points that a benchmark took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hrm.errors import UserError
from hrm.evaluation.report.picture import PALETTE, new_picture, save_picture
from hrm.reading import parse_json, read_text

Record = Mapping[str, float]
Axis = Literal["linear", "log", "percent"]
Split = Literal["train", "test", "average"]

_STYLES: dict[Split, dict[str, Any]] = {
    "train": {"linewidth": 1.2, "alpha": 0.8},
    "test": {"linewidth": 1.2, "marker": "o", "markersize": 4},
    "average": {"linewidth": 1.2, "marker": "s", "markersize": 4, "linestyle": "--"},
}
_LEGEND_LINES = 3  # that fit into a panel
_LEGEND: dict[Split, str] = {"train": "train", "test": "test", "average": "test, averaged weights"}


class Curve(NamedTuple):
    """One line of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]  # nan leaves a gap
    style: Mapping[str, Any]  # keywords of matplotlib's plot


class Panel(NamedTuple):
    """Axes with the curves in them."""

    label: str  # of the y axis
    axis: Axis  # percent: the curves are shares
    curves: Sequence[Curve]


class Metric(NamedTuple):
    """What a panel shows of runs: a metric as `metrics.jsonl` names it, on some splits."""

    label: str
    axis: Axis
    name: str
    splits: Sequence[Split] = ("train", "test", "average")


def draw_panels(panels: Sequence[Panel], x_label: str, file: Path, columns: int = 3) -> None:
    """Draw panels side by side, `columns` in a row, into a file of the kind that its name ends with."""
    save_picture(figure_of(panels, x_label, columns), file)


def figure_of(panels: Sequence[Panel], x_label: str, columns: int = 3) -> Any:
    """The matplotlib figure of the panels. Legends of more than three lines would cover the curves: then there is one,
    below all panels."""
    rows = -(-len(panels) // columns)
    size = (4 * columns, 3.2 * rows)
    figure, grid = new_picture(rows, columns, size=size)
    lines: dict[str, Any] = {}
    for panel, axes in zip(panels, grid.flat, strict=True):
        for curve in panel.curves:
            scale = 100 if panel.axis == "percent" else 1
            values = [scale * value for value in curve.y]
            (line,) = axes.plot(curve.x, values, label=curve.label, clip_on=False, **curve.style)  # 0 shows too
            lines.setdefault(curve.label, line)
        axes.set(xlabel=x_label, ylabel=f"{panel.label} (%)" if panel.axis == "percent" else panel.label)
        if panel.axis == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # numbers, not powers of ten
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=7)
        else:
            highest = axes.dataLim.y1  # infinite where there are no values
            axes.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1)
        axes.grid(alpha=0.3, which="both")
    if max(len(panel.curves) for panel in panels) <= _LEGEND_LINES:
        for axes in grid.flat:
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
    else:
        widest = 0.6 + 0.065 * max(map(len, lines))  # inches, of a sample and a label
        figure.set_figheight(size[1] + 0.18 * -(-len(lines) // max(int(size[0] / widest), 1)))
        figure.legend(
            handles=list(lines.values()),
            labels=list(lines),
            loc="outside lower center",
            ncols=max(int(size[0] / widest), 1),
            frameon=False,
            fontsize=8,
        )
    return figure


def draw_curves(metrics_file: Path, file: Path) -> None:
    """`training_curves` into a file."""
    save_picture(training_curves(metrics_file), file)


def training_curves(metrics_file: Path) -> Any:
    """The matplotlib figure of loss, exact accuracy and ACT steps over training steps.

    Args:
        metrics_file: records that `pretrain.py` wrote; those of test sets have names such as `all/exact_accuracy`.
    """
    metrics = (
        Metric("loss per puzzle", "linear", "lm_loss"),
        Metric("exactly right", "percent", "exact_accuracy"),
        Metric("ACT steps", "linear", "steps"),
    )
    runs = {"": list(read_records(metrics_file))}
    return figure_of([run_panel(metric, runs, "step") for metric in metrics], "training step")


def run_panel(metric: Metric, runs: Mapping[str, Sequence[Record]], x: str) -> Panel:
    """The curves of one metric of runs.

    Args:
        runs: records by the name of the run. Colours tell several runs apart, and train from test where it is only one.
        x: the field of the records to draw against.
    """
    curves = []
    for number, (run, records) in enumerate(runs.items()):
        for name in sorted({name for record in records for name in record if name.endswith(f"/{metric.name}")}):
            if (split := _split_of(name)) not in metric.splits:
                continue
            points = [(record[x], record[name]) for record in records if name in record]
            color = PALETTE[(number if len(runs) > 1 else list(_STYLES).index(split)) % len(PALETTE)]
            label = ", ".join(filter(None, [run, _LEGEND[split] if len(metric.splits) > 1 else ""]))
            xs, ys = zip(*points, strict=True)
            curves.append(Curve(label, xs, ys, _STYLES[split] | {"color": color}))
    return Panel(metric.label, metric.axis, curves)


def read_records(metrics_file: Path) -> Iterator[dict[str, float]]:
    """The records of a run, in order, as far as they are numbers by name.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = read_text(metrics_file).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{metrics_file} cannot be read ({error}): move it elsewhere.") from error
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            return  # the last line of a run that was killed while it wrote
        if not isinstance(record, dict):
            return
        yield {name: value for name, value in record.items() if type(value) in (int, float) and abs(value) < 1e300}


def _split_of(name: str) -> Split:
    if name.startswith("train/"):
        return "train"
    return "average" if name.startswith("ema/") else "test"
