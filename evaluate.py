"""Evaluate a trained HRM: `python evaluate.py checkpoint=... [option=value]`; `--help` lists the options."""

from hrm.config import EvaluateConfig
from hrm.config.compose import run
from hrm.evaluation.command import evaluate_checkpoint

if __name__ == "__main__":
    run(EvaluateConfig, "evaluate", evaluate_checkpoint, program="python evaluate.py")
