"""Training steps are those of the published code: a checkout of it in HRM_CHECKOUT trains beside ours."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.published import training_request
from hrm.config import PretrainConfig
from hrm.config.compose import compose
from hrm.data.loader import TrainLoader
from hrm.data.pack import open_pack
from hrm.distributed.world import World
from hrm.training.step import initial_state, make_train_step
from tests.helpers.checkout import CHECKOUT, needs_checkout
from tests.helpers.entry_points import make_pack

SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "published_training.py"
STEPS = 30
BATCH = 12

pytestmark = [pytest.mark.slow, needs_checkout]


def test_thirty_steps_from_the_same_weights_on_the_same_batches(tmp_path: Path) -> None:
    """Losses, halting, refilling, both optimizers and the schedule together; without exploration, which is random."""
    make_pack(tmp_path / "pack", train_size=24)
    chosen = ["experiment=sudoku_extreme_1k", "arch=hrm_small", "arch.hidden_size=32", "arch.num_heads=2"]
    chosen += ["arch.halt_max_steps=4", "arch.halt_exploration_prob=0", "arch.forward_dtype=float32", "kernels=naive"]
    chosen += ["lr=3e-3", "puzzle_emb_lr=3e-3", "lr_warmup_steps=5", "lr_min_ratio=0.1", "eval_interval=null"]
    chosen += [f"data_path={tmp_path / 'pack'}", f"global_batch_size={BATCH}", "epochs=30", "device=cpu"]
    config = compose(PretrainConfig, "pretrain", chosen)
    pack = open_pack(tmp_path / "pack", "train")
    state = initial_state(replace(config, seed=3), pack, World(0, 1, torch.device("cpu")))
    with torch.no_grad():  # so that some halt early, and others do not
        q_head = state.model.model.inner.q_head
        q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        assert q_head.bias is not None
        q_head.bias.zero_()
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    batches = list(islice(TrainLoader(pack, BATCH, 0, epochs_per_pass=30).iterate(0), STEPS))
    request = training_request(config, tmp_path / "pack", torch.device("cpu"))
    given, found = tmp_path / "given.pt", tmp_path / "found.pt"
    torch.save({"request": request, "weights": before, "batches": batches}, given)
    command = [sys.executable, "-P", str(SCRIPT), CHECKOUT, str(given), str(found)]
    subprocess.run(command, check=True, env=os.environ | {"DISABLE_COMPILE": "1"})
    theirs = torch.load(found, weights_only=True)

    step, lengths = make_train_step(config, World(0, 1, torch.device("cpu")), state), set()
    for batch, expected in zip(batches, theirs["metrics"], strict=True):
        metrics = step(batch)
        count = float(metrics["count"])
        if count:
            lengths.add(float(metrics["steps"]) / count)
        for name in ("lm_loss", "q_halt_loss", "q_continue_loss"):
            assert float(metrics[name]) / BATCH == pytest.approx(expected[f"train/{name}"], rel=1e-3, abs=1e-5)
        for name in ("accuracy", "exact_accuracy", "steps"):
            assert float(metrics[name]) / max(count, 1) == pytest.approx(expected[f"train/{name}"], abs=1e-4)
    assert len(lengths) > 3, "sequences halt at different steps"
    for name, weight in state.model.state_dict().items():
        theirs_now = theirs["weights"][name].float()
        moved = (theirs_now - before[name]).norm()
        assert (weight - theirs_now).norm() <= 1e-3 * moved, name
        assert moved > 0 or name.endswith("_init")
