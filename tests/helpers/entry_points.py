"""Run `pretrain.py` and `evaluate.py` as the shell would, on packs and models that take a second to make."""

import contextlib
import io
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hrm.data.builders import sudoku as build_sudoku_dataset

ROOT = Path(__file__).resolve().parents[2]

# Options of pretrain.py for the smallest run that has every part: 2 passes of 3 steps over `make_pack`'s 12 puzzles.
TINY_MODEL = ["arch=hrm_small", "arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=2"]
TINY_RUN = [*TINY_MODEL, "kernels=naive", "device=cpu", "wandb=disabled", "global_batch_size=4", "epochs=2"]
TINY_RUN += ["eval_interval=1", "log_interval=1"]
CPU = ["kernels=naive", "device=cpu"]

TRAINED_EXAMPLES = 60  # of the test split of the fixture `trained`; 12 divides it, 8 and 7 do not


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    status: int
    out: str
    err: str


def run_script(script: str, *argv: str) -> Outcome:
    """Run a script of the root in this process. Anything but an exit passes through, as a traceback would."""
    out, err = io.StringIO(), io.StringIO()
    status: object = None
    with (
        mock.patch.object(sys, "argv", [str(ROOT / script), *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
    assert status is None or isinstance(status, int)
    return Outcome(status or 0, out.getvalue(), err.getvalue())


def make_pack(
    folder: Path, *, box: str = "2x2", train_size: int = 12, test_size: int = 5, givens: int | None = None
) -> None:
    """Build a pack of generated Sudoku puzzles."""
    argv = ["--generate", box, "--train-size", str(train_size), "--test-size", str(test_size)]
    argv += ["--output-dir", str(folder)] + ([] if givens is None else ["--givens", str(givens)])
    with contextlib.redirect_stdout(io.StringIO()):
        assert build_sudoku_dataset.main(argv) == 0


def train(*argv: str) -> None:
    """A training run that must succeed."""
    outcome = run_script("pretrain.py", *argv)
    assert outcome.status == 0, outcome.err


def evaluated(*argv: str) -> tuple[dict[str, float], str]:
    """The metrics that `evaluate.py` prints, and all it prints."""
    outcome = run_script("evaluate.py", *CPU, *argv)
    assert outcome.status == 0, outcome.err
    return printed_metrics(outcome.out), outcome.out


def printed_metrics(out: str) -> dict[str, float]:
    """Of the set `all`, by name."""
    metrics = {name: float(value) for name, value in re.findall(r"^ +all/(\S+) +([\d.]+)$", out, re.MULTILINE)}
    assert metrics, out
    return metrics
