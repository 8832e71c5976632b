"""TRM's own code and ours exchange packs and checkpoints, both ways, with equal metrics.

Skipped without its code: TRM_CHECKOUT names a checkout of github.com/SamsungSAILMontreal/TinyRecursiveModels. It needs
einops.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.entry_points import ROOT, run_script
from tests.helpers.training import write_identified_pack

CHECKOUT = os.environ.get("TRM_CHECKOUT", "")
NAMES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")

pytestmark = pytest.mark.skipif(not Path(CHECKOUT, "puzzle_dataset.py").is_file(), reason="TRM_CHECKOUT is not set")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_identified_pack(tmp_path_factory.mktemp("exchange") / "pack", puzzles=5)


def theirs(*arguments: object) -> dict[str, float]:
    """The metrics that TRM's code prints."""
    pytest.importorskip("einops")
    elsewhere = [path for path in sys.path if path and Path(path) != ROOT]  # our `dataset` would hide theirs
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([CHECKOUT, *elsewhere])}
    command = [sys.executable, "-P", str(ROOT / "tests/helpers/trm_side.py"), *map(str, arguments)]
    process = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    metrics: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return metrics


def ours(*options: str) -> dict[str, float]:
    """The metrics that evaluate.py prints."""
    outcome = run_script("evaluate.py", "device=cpu", "kernels=naive", *options)
    assert outcome.status == 0, outcome.err
    return {name: float(value) for name, value in re.findall(r"all/(\S+) +([\d.]+)$", outcome.out, re.MULTILINE)}


def test_their_checkpoint_of_our_pack_evaluates_here_without_options(pack: Path, tmp_path: Path) -> None:
    there = theirs("train", pack, tmp_path / "run", 20)
    here = ours(f"checkpoint={tmp_path / 'run'}")
    assert {name: here[name] for name in NAMES} == pytest.approx({name: there[name] for name in NAMES}, abs=1e-4)
    assert 0 < here["accuracy"] < 1


def test_our_checkpoint_evaluates_there(pack: Path, tmp_path: Path) -> None:
    arch = "H_cycles=2 L_cycles=2 L_layers=2 hidden_size=32 num_heads=2 puzzle_emb_len=2 halt_max_steps=3"
    outcome = run_script(
        "pretrain.py",
        *("arch=trm", *(f"arch.{option}" for option in arch.split()), "arch.forward_dtype=float32"),
        *(f"data_paths=[{pack}]", "evaluators=[]", "+run_name=exchange", "ema=True", "lr=1e-3", "puzzle_emb_lr=0.1"),
        *(
            "lr_warmup_steps=1",
            "epochs=10",
            "eval_interval=5",
            "global_batch_size=6",
            f"checkpoint_path={tmp_path / 'run'}",
        ),
        *("device=cpu", "kernels=naive", "wandb=disabled"),
    )
    assert outcome.status == 0, outcome.err
    for name in ("step_20", "step_20_ema"):
        here = ours(f"checkpoint={tmp_path / 'run' / name}")
        there = theirs("evaluate", pack, tmp_path / "run" / name)
        assert {name: here[name] for name in NAMES} == pytest.approx({name: there[name] for name in NAMES}, abs=1e-4)


def test_training_goes_on_here_from_their_checkpoint(pack: Path, tmp_path: Path) -> None:
    """By the options that their code has for it, with a table of another size."""
    theirs("train", pack, tmp_path / "run", 4)
    other = write_identified_pack(tmp_path / "other", puzzles=3)
    arch = "H_cycles=2 L_cycles=2 hidden_size=32 num_heads=2 puzzle_emb_len=2 halt_max_steps=3"
    outcome = run_script(
        "pretrain.py",
        *("arch=trm", *(f"arch.{option}" for option in arch.split()), "arch.forward_dtype=float32"),
        *(f"data_paths=[{other}]", f"load_checkpoint={tmp_path / 'run' / 'step_4'}", "freeze_weights=True"),
        *("epochs=2", "eval_interval=1", "global_batch_size=6", f"checkpoint_path={tmp_path / 'tuned'}"),
        *("device=cpu", "kernels=naive", "wandb=disabled"),
    )
    assert outcome.status == 0, outcome.err
    assert "Puzzle table: 4 rows, each the mean of the 6 there." in outcome.out
    assert "All options of arch are as it had them." in outcome.out
