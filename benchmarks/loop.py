"""Time whole training loops under the kernel presets, side by side: loader, steps, metrics, as `pretrain.py` runs them.

python -m benchmarks.loop --data data/sudoku-extreme-1k-aug-1000
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import Trial, compare_presets, peak_gib, run_command
from hrm.training.loop import pretrain

_WINDOWS = 3  # of which the first one compiles


def main(argv: Sequence[str] | None = None) -> None:
    compare_presets("loop", __doc__, "384x81,768x81", _measure, "loop", argv)


def _measure(trial: Trial) -> dict[str, Any]:
    metadata, batch_size = trial.pack.metadata, trial.shape.batch_size
    examples = metadata.total_groups * metadata.mean_puzzle_examples
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            trial.config,
            data_path=str(trial.pack.path),
            checkpoint_path=str(Path(folder) / "run"),
            epochs=math.ceil(_WINDOWS * trial.repeats * batch_size / examples),
            eval_interval=None,
            log_interval=trial.repeats,
            wandb="disabled",
            device=trial.world.device.type,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # what a run says of itself is not of this table
            pretrain(config)
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [record["puzzles_per_second"] for record in records if "puzzles_per_second" in record]
    ms = 1000 * batch_size / statistics.median(rates[1:])
    return {"ms": ms, "puzzles/s": 1000 * batch_size / ms, "GiB": peak_gib(trial.world.device)}


if __name__ == "__main__":
    run_command(main)
