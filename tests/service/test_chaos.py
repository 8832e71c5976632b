"""Service, Redis and PostgreSQL are killed under load."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos import run_chaos
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import untrained_halting_apart

pytestmark = pytest.mark.slow


def test_nothing_recorded_is_lost_or_wrong_after_kills(tmp_path: Path) -> None:
    boards = np.random.default_rng(0).integers(1, 6, (20, 16))
    folder = untrained_halting_apart(tmp_path, PuzzleForm("sudoku", 16, 6), boards, halt_max_steps=5)
    options = argparse.Namespace(checkpoint=str(folder), device="cpu", rounds=3, seconds=0.5, seed=0)
    outcome = run_chaos(options, boards)
    assert outcome.problems == {}
    assert outcome.killed == {"postgresql": 2, "redis": 2, "service": 1}
    assert outcome.rows > 20
    assert outcome.repeated > 10
    assert outcome.updates > 5
    assert sum(answer.is_recorded for answer in outcome.answered) > 20
