"""Time training steps under the kernel presets, side by side.

python -m benchmarks.train_step --data data/sudoku-extreme-1k-aug-1000

Of blocks that mix tokens by an MLP:

python -m benchmarks.train_step --data PACK --presets compile,auto --shapes 384x81 experiment=sudoku_speedrun
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import Trial, compare_presets, median_ms, peak_gib, run_command
from hrm.training.step import initial_state, make_train_step


def main(argv: Sequence[str] | None = None) -> None:
    compare_presets("train-step", __doc__, "1x81,64x81,384x81,768x81,96x900", _measure, "step", argv)


def _measure(trial: Trial) -> dict[str, Any]:
    device, state = trial.world.device, initial_state(trial.config, trial.pack, trial.world)
    step = make_train_step(trial.config, trial.world, state)
    first_ms = median_ms(lambda: step(next(trial.batches)), device, 0, 1)
    ms = median_ms(lambda: step(next(trial.batches)), device, 5, trial.repeats)
    return {
        "ms": ms,
        **trial.rates(ms, state.model.train_step_flops()),
        "GiB": peak_gib(device),
        "first step s": first_ms / 1000,
    }


if __name__ == "__main__":
    run_command(main)
