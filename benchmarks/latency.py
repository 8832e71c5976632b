"""Time one puzzle from the host's tokens to the host's answer, all ACT steps, under the kernel presets, side by side.

python -m benchmarks.latency --data data/sudoku-extreme-1k-aug-1000
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.common import Trial, compare_presets, run_command
from hrm.evaluation.runner import make_runner
from hrm.training.step import initial_state


def main(argv: Sequence[str] | None = None) -> None:
    compare_presets("latency", __doc__, "1x81", _measure, "latency", argv)


def _measure(trial: Trial) -> dict[str, Any]:
    device = trial.world.device
    model = initial_state(trial.config, trial.pack, trial.world).model.eval()
    thinking = make_runner(model, trial.world, ["logits"])

    def answer_ms() -> float:
        batch = next(trial.batches)
        started = time.perf_counter()
        _, outputs = thinking({name: field.to(device, non_blocking=True) for name, field in batch.items()})
        _answer: Tensor = outputs["logits"].argmax(-1).cpu()
        return 1000 * (time.perf_counter() - started)

    with model.weights_at_hand():
        first_ms = answer_ms()
        for _ in range(2):
            answer_ms()
        times = sorted(answer_ms() for _ in range(trial.repeats))
    steps = trial.config.arch.halt_max_steps
    return {
        "ms": statistics.median(times),
        "ms, slowest of 20": times[-1 - len(times) // 20],
        "ms an ACT step": statistics.median(times) / steps,
        "first s": first_ms / 1000,
    }


if __name__ == "__main__":
    run_command(main)
