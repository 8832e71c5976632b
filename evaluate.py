"""Evaluate a trained HRM: `python evaluate.py checkpoint=... [option=value]`; `--help` lists the options."""

from hrm.config import EvaluateConfig
from hrm.config.compose import run
from hrm.inference.command import evaluate_or_predict

if __name__ == "__main__":
    run(EvaluateConfig, "evaluate", evaluate_or_predict, program="python evaluate.py")
