"""Evaluate a trained model, or solve one puzzle with it: `hrm evaluate checkpoint=...`, as `evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import EvaluateConfig
    from hrm.config.compose import run
    from hrm.inference.command import evaluate_or_predict

    run(EvaluateConfig, "evaluate", evaluate_or_predict, "hrm evaluate", argv)
    return 0
