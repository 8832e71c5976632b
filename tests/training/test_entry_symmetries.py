"""Sequences that enter as symmetries of the puzzles in the pack, and recipes made of the options for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm.batch import IGNORE_LABEL_ID
from hrm.config import KernelsConfig, PretrainConfig
from hrm.config.optim import OptimConfig
from hrm.data.builders.maze import main as build_mazes
from hrm.data.pack import open_pack
from hrm.models import arch_config
from hrm.training.step import TrainState, make_train_step, symmetry_warnings
from tests.helpers.entry_points import make_pack
from tests.helpers.training import ALONE, start


@pytest.fixture(scope="module")
def sudoku_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sudoku") / "pack"
    make_pack(path, train_size=40, test_size=8, givens=8)
    return path


def config_of(pack: Path, **arch: Any) -> PretrainConfig:
    fields = {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "hidden_size": 32,
        "num_heads": 2,
        "L_layers": 1,
        "H_cycles": 2,
        "L_cycles": 2,
        "halt_max_steps": 3,
        "puzzle_emb_ndim": 0,
        "forward_dtype": "float32",
        "gate": "sigmoid_rms",
        "loss": {"loss_type": "softmax_cross_entropy", "label_smoothing": 0.2, "q_weight": 0.05},
    }
    return PretrainConfig(
        arch=arch_config(fields | arch),
        data_path=str(pack),
        global_batch_size=8,
        epochs=20,
        eval_interval=None,
        lr=0.02,
        lr_min_ratio=0.0,
        lr_warmup_steps=0,
        weight_decay=0.005,
        grad_clip=1.0,
        optim=OptimConfig(
            "muon",
            momentum=0.6,
            rest_lr_ratio=0.005,
            rest_weight_decay=1.0,
            scale="spectral",
            split="heads",
            iterations=3,
        ),
        augment_entry=True,
        ema_decay=0.9,
        ema_start=30,
        kernels=KernelsConfig("naive"),
        device="cpu",
        wandb="disabled",
    )


def run_steps(config: PretrainConfig, steps: int) -> tuple[TrainState, list[float]]:
    state, batches = start(config)
    step = make_train_step(config, ALONE, state)
    return state, [float(step(batch)["lm_loss"]) / 8 for batch, _ in zip(batches, range(steps), strict=False)]


@pytest.mark.parametrize(
    "arch",
    [
        {"mlp_t": True, "pos_encodings": "none", "register_tokens": 1},
        {"attention_norm": True, "pos_encodings": "rope_2d", "register_tokens": 2},
        {"mlp_t": True, "pos_encodings": "none", "starts": 2},
    ],
    ids=["mixer", "attention", "two starts"],
)
def test_recipes_learn_and_repeat(sudoku_pack: Path, arch: dict[str, Any]) -> None:
    config = config_of(sudoku_pack, **arch)
    state, losses = run_steps(config, 60)
    assert losses[-1] < 0.75 * losses[0]
    again, repeated = run_steps(config, 60)
    assert repeated == losses
    assert state.average is not None
    assert again.average is not None
    for name, weight in state.average.model.state_dict().items():
        assert torch.equal(weight, again.average.model.state_dict()[name])


def test_boards_that_enter_are_symmetries_and_stay(sudoku_pack: Path) -> None:
    """They keep Sudoku's rules, differ from the pack's, and stay as they are until they halt."""
    state, batches = start(config_of(sudoku_pack, mlp_t=True, pos_encodings="none"))
    act, batch = state.model.model, next(batches)
    carry, _ = act(act.initial_carry(batch), batch)
    data = carry.current_data
    boards = data["labels"].view(8, 4, 4)
    for lines in (boards, boards.mT, boards.view(8, 2, 2, 2, 2).transpose(2, 3).reshape(8, 4, 4)):
        assert torch.equal(lines.sort(-1).values, torch.tensor([2, 3, 4, 5], dtype=lines.dtype).expand(8, 4, 4))
    given = data["inputs"] > 1
    assert torch.equal(data["inputs"][given], data["labels"][given])
    assert torch.equal(given.sum(1), (batch["inputs"] > 1).sum(1))
    assert not torch.equal(data["labels"], batch["labels"])
    again, _ = act(replace(carry, halted=torch.zeros_like(carry.halted)), batch)
    assert torch.equal(again.current_data["inputs"], data["inputs"])
    # Another time the same puzzle enters as another one; in evaluation as it is.
    other, _ = act(act.initial_carry(batch), batch)
    assert not torch.equal(other.current_data["inputs"], data["inputs"])
    act.eval()
    plain, _ = act(act.initial_carry(batch), batch)
    assert torch.equal(plain.current_data["inputs"], batch["inputs"])


def test_cells_without_a_label_stay_so(sudoku_pack: Path) -> None:
    state, batches = start(config_of(sudoku_pack, mlp_t=True, pos_encodings="none"))
    batch = next(batches)
    batch["labels"][batch["inputs"] > 1] = IGNORE_LABEL_ID
    carry, _ = state.model.model(state.model.initial_carry(batch), batch)
    data = carry.current_data
    assert torch.equal(data["labels"] == IGNORE_LABEL_ID, data["inputs"] > 1)


def test_tasks_with_several_right_answers_warn(sudoku_pack: Path, tmp_path: Path) -> None:
    config = config_of(sudoku_pack)
    assert symmetry_warnings(config, open_pack(sudoku_pack, "train")) == []
    sizes = ["--generate", "6x6", "--train-size", "4", "--test-size", "2"]
    assert build_mazes([*sizes, "--output-dir", str(tmp_path / "m")]) == 0
    mazes = open_pack(tmp_path / "m", "train")
    (warning,) = symmetry_warnings(config, mazes)
    assert "augment_entry=true maps it to another one" in warning
    assert symmetry_warnings(replace(config, augment_entry=False), mazes) == []
