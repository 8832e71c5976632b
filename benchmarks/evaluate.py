"""Time evaluation under the kernel presets, side by side: all ACT steps of a batch, as `evaluate.py` runs them.

python -m benchmarks.evaluate --data data/sudoku-extreme-1k-aug-1000
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import Trial, compare_presets, median_ms, peak_gib, run_command
from hrm.evaluation.runner import make_runner
from hrm.training.step import initial_state


def main(argv: Sequence[str] | None = None) -> None:
    compare_presets("evaluate", __doc__, "1x81,64x81,384x81,768x81,96x900", _measure, "evaluation", argv)


def _measure(trial: Trial) -> dict[str, Any]:
    device = trial.world.device
    model = initial_state(trial.config, trial.pack, trial.world).model.eval()
    thinking = make_runner(model, trial.world)

    def answer() -> object:
        batch = next(trial.batches)
        return thinking({name: field.to(device, non_blocking=True) for name, field in batch.items()})

    steps = model.halt_max_steps
    with model.weights_at_hand():
        first_ms = median_ms(answer, device, 0, 1)
        ms = median_ms(answer, device, 2, max(1, trial.repeats // 5)) / steps
    rates = trial.rates(ms, model.act_step_flops())
    return {
        "ms": ms,
        **rates,
        "puzzles/s": rates["puzzles/s"] / steps,
        "tokens/s": rates["tokens/s"] / steps,
        "GiB": peak_gib(device),
        "first batch s": first_ms / 1000,
    }


if __name__ == "__main__":
    run_command(main)
