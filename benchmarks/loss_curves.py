"""Train under the kernel presets and compare their loss curves with the definition's.

python -m benchmarks.loss_curves --data data/sudoku-extreme-1k-aug-1000

A preset passes if its curve, from the same seed, stays as close to the definition's as the definition's own curves from
other seeds do. Exits with 1 if one does not; by chance alone, one that differs as another seed does fails in one of
--seeds calls. All sequences begin together, and losses are largest in their first ACT steps: points of a curve are
comparable where --window is a multiple of arch.halt_max_steps and, once sequences halt early, many times that.

For a long run of few presets, compare with another one than the definition and without a judgement:

python -m benchmarks.loss_curves --data data/sudoku-extreme-1k-aug-1000 --reference compile --presets triton,fp8 \\
    --seeds 1 --steps 3000 --window 50 --shape 384x81 --picture benchmarks/results/tables/curves.svg \\
    lr=7e-5 weight_decay=1.0
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import (
    PRESETS,
    Shape,
    batches,
    machine,
    make_parser,
    picture_file,
    preset_config,
    presets_of,
    run_command,
    write_results,
)
from hrm.config import KernelsConfig, PretrainConfig
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.report.picture import PALETTE
from hrm.evaluation.report.plots import Axis, Curve, Panel, draw_panels
from hrm.training.step import initial_state, make_train_step

_METRICS = ("lm_loss", "exact_accuracy", "count")
_PANELS: dict[str, tuple[str, Axis]] = {
    "loss": ("loss per puzzle", "log"),  # equal distances are equal shares
    "exact_accuracy": ("training puzzles exactly right", "percent"),
}


class Course(NamedTuple):
    """How a training run went: means over windows of steps, [windows] each."""

    loss: Tensor  # language-model loss per sequence
    exact_accuracy: Tensor  # share of the sequences that halted; nan where none did


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", help="a pack of real puzzles; without it, random tokens")
    parser.add_argument("--presets", help="to compare with the reference; default: all")
    parser.add_argument("--reference", default="naive", metavar="PRESET", help="what the others are compared with")
    parser.add_argument("--shape", default="128x81", help="batch size x sequence length")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=25, help="steps that a point of a curve averages")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of the reference that make its spread; 1: no spread, no judgement"
    )
    parser.add_argument("--picture", type=picture_file, help="draw all curves into this SVG or PNG file")
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_intermixed_args(argv)
    steps, window, reference = arguments.steps, arguments.window, arguments.reference
    presets = presets_of(arguments.presets) if arguments.presets else []
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} is too small: give at least 1.")
    if window < 1 or steps < 1 or steps % window:
        raise UserError(f"--steps {steps} is not a multiple of --window {window}: change one of them.")

    shape = Shape.parse(arguments.shape)
    rows: list[dict[str, object]] = []
    courses: dict[str, Course] = {}
    with join_world(arguments.device) as world, tempfile.TemporaryDirectory() as scratch:

        def train(config: PretrainConfig) -> Course:
            return course(config, shape, steps, window, arguments.data, Path(scratch), world)

        config = preset_config(reference, shape, arguments.overrides)
        if reference == "naive":
            # A graph replays the definition's own kernels, only sooner.
            config = replace(config, kernels=KernelsConfig("naive", cuda_graphs=world.device.type == "cuda"))
        first, *others = [train(replace(config, seed=seed)) for seed in range(arguments.seeds)]
        spread = max((distance(first.loss, other.loss) for other in others), default=None)
        courses[reference] = first
        courses |= {f"{reference}, seed {seed}": other for seed, other in enumerate(others, 1)}
        rows.append(_row(reference, first, window, spread))
        print(rows[-1], flush=True)
        for preset in presets or [name for name in PRESETS.split(",") if name != reference]:
            try:
                found = train(preset_config(preset, shape, arguments.overrides))
            except UserError as error:
                rows.append({"kernels": preset, "cannot run": str(error)})
            else:
                away = distance(first.loss, found.loss)
                rows.append(_row(preset, found, window, away))
                if spread is not None:
                    rows[-1]["within the spread"] = "yes" if away <= spread else "NO"
                courses[preset if preset != reference else f"{preset}, again"] = found
            print(rows[-1], flush=True)
    about = machine(world.device) | {
        "runs": f"{steps} steps of {shape.batch_size}, means over {window} steps",
        "distance": "largest difference between two loss curves' points, as a share of "
        f"{reference}'s; {reference}'s own: between its seeds",
    }
    curves = _as_json(reference, window, courses)
    print(write_results("loss-curves", about, rows, arguments.output_dir, curves=curves))
    if arguments.picture:
        draw(curves, arguments.picture)
    if any(row.get("within the spread") == "NO" for row in rows):
        raise SystemExit(1)


def course(
    config: PretrainConfig, shape: Shape, steps: int, window: int, data_path: str | None, scratch: Path, world: World
) -> Course:
    """Train for so many steps, a multiple of `window`, from the seed in `config`."""
    torch.compiler.reset()
    pack, stream = batches(data_path, shape, scratch, steps)
    step = make_train_step(config, world, initial_state(config, pack, world))
    sums = []  # on the device until the end, so that nothing waits
    for _ in range(steps):
        metrics = step(next(stream))
        sums.append(torch.stack([metrics[name].float() for name in _METRICS]))
    loss, exact, count = torch.stack(sums).cpu().double().view(-1, window, len(_METRICS)).sum(1).unbind(1)
    return Course(loss / (window * shape.batch_size), exact / count)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference between two curves, relative to the first."""
    return float(((a - b).abs() / a).max())


def draw(curves: Mapping[str, Any], picture: Path) -> None:
    """Draw the field `curves` of the results: loss and exact accuracy, the reference on top of its other seeds."""
    reference, window = curves["reference"], curves["window"]
    panels = []
    for metric, (y_label, axis) in _PANELS.items():
        lines = {run: [math.nan if y is None else y for y in points] for run, points in curves[metric].items()}
        colors = iter(PALETTE * len(lines))
        drawn = []
        for run, points in lines.items():
            label = run
            if metric == "loss" and run != reference:
                away = distance(torch.tensor(lines[reference]), torch.tensor(points))
                label += f", at most {100 * away:.2g} % away"
            if run.startswith(f"{reference}, seed "):
                style = {"color": "#9AA0A6", "linewidth": 0.8, "zorder": 2}
            else:
                style = {"color": next(colors), "linewidth": 1.4, "zorder": 3}
            drawn.append(Curve(label, range(window, window * (len(points) + 1), window), points, style))
        panels.append(Panel(y_label, axis, drawn))
    draw_panels(panels, "training step", picture, columns=2)


def _as_json(reference: str, window: int, courses: Mapping[str, Course]) -> dict[str, Any]:
    """The curves by metric and run, a point for each window; null is not a number."""

    def points(curve: Tensor) -> list[float | None]:
        return [None if math.isnan(y) else y for y in curve.tolist()]

    return {"reference": reference, "window": window} | {
        metric: {run: points(getattr(found, metric)) for run, found in courses.items()} for metric in Course._fields
    }


def _row(preset: str, found: Course, window: int, away: float | None) -> dict[str, object]:
    count = len(found.loss)
    stride = max(1, count // 3)
    points = {f"loss at {(i + 1) * window}": float(found.loss[i]) for i in range(stride - 1, count, stride)}
    exact = {f"exact at {count * window}": float(found.exact_accuracy[-1])}
    return {"kernels": preset, "first": float(found.loss[0]), **points, **exact, "distance": away}


if __name__ == "__main__":
    run_command(main)
