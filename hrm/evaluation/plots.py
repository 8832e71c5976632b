"""Training curves from a run's `metrics.jsonl`, as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from hrm.errors import UserError

_INK = {"train": "#0072B2", "test": "#D55E00"}


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing to files only.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("Pictures need matplotlib: pip install 'hrm[report]', or leave out show=.") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(metrics_file: Path, file: Path) -> None:
    """Draw loss, exact accuracy and ACT steps over training steps.

    Args:
        metrics_file: records that `pretrain.py` wrote; those of test sets have names such as `all/exact_accuracy`.
    """
    records = list(_read_records(metrics_file))
    panels = [
        ("lm_loss", "loss per puzzle", 1),
        ("exact_accuracy", "exactly right (%)", 100),
        ("steps", "ACT steps", 1),
    ]
    plt = pyplot()
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for (metric, label, scale), axes in zip(panels, all_axes, strict=True):
        for name in sorted({name for record in records for name in record if name.endswith(f"/{metric}")}):
            points = [(record["step"], scale * record[name]) for record in records if name in record]
            split = "train" if name.startswith("train/") else "test"
            style = {"color": _INK[split], "marker": "o" if split == "test" else None, "linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), label=split, **style)
        axes.set(xlabel="training step", ylabel=label)
        axes.set_ylim(0, 105 if scale == 100 else None)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _read_records(metrics_file: Path) -> Iterator[dict[str, float]]:
    for line in metrics_file.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the last line of a run that was killed while it wrote
