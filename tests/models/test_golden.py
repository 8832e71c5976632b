"""Numbers of the published model (`tests/golden/rope_stablemax`, float32 on CPU): what a correct build reproduces.

`weights_{before,after}.npz` are state dicts before and after six training steps at the constant rates of `config.json`,
`batches.npz` the batch of each step, `expected.npz` what came out: in evaluation on batch 1 until all sequences halt,
and at each step of training. Exploration is off.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import hrm
from hrm.batch import Batch
from hrm.models import ACTLossHead
from hrm.optim import AdamATan2, SparseSignSGD

FOLDER = Path(__file__).parent / "golden" / "rope_stablemax"
CONFIG = json.loads((FOLDER / "config.json").read_text())
Q_KEYS = ["q_halt_logits", "q_continue_logits"]

Expected = dict[str, npt.NDArray[Any]]


def read(name: str) -> Expected:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def part(expected: Expected, prefix: str) -> Expected:
    return {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}


def batch_of_step(step: int) -> Batch:
    return {name: torch.tensor(array) for name, array in part(read("batches"), f"{step}/").items()}


def golden_model() -> ACTLossHead:
    model = hrm.build_model(
        CONFIG["arch"],
        batch_size=CONFIG["batch_size"],
        seq_len=CONFIG["arch"]["seq_len"],
        vocab_size=CONFIG["arch"]["vocab_size"],
        num_puzzle_identifiers=CONFIG["num_puzzle_identifiers"],
    )
    model.load_state_dict({name: torch.tensor(array) for name, array in read("weights_before").items()})
    return model


def assert_close(actual: Mapping[str, Tensor], expected: Expected, relative: float) -> None:
    """The same names; whole numbers equal, others to `relative` of the largest of their array."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name].detach().numpy()
        assert got.shape == wanted.shape, name
        error = np.abs(got.astype(np.float64) - wanted).max()
        allowed = relative * np.abs(wanted).max() if np.issubdtype(wanted.dtype, np.floating) else 0
        assert error <= allowed, f"{name} is off by {error}, allowed are {allowed}"


def metrics_and(metrics: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"metric/{name}": value for name, value in metrics.items()} | others


def gradients(model: ACTLossHead) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert model.model.inner.puzzle_emb.local_weights is not None
    found["puzzle_emb.local"] = model.model.inner.puzzle_emb.local_weights.grad
    return {name: grad for name, grad in found.items() if grad is not None}


def test_evaluation() -> None:
    expected = read("expected")
    model = golden_model().eval()
    batch = batch_of_step(1)
    carry = model.initial_carry(batch)
    for step in range(1, 5):
        with torch.inference_mode():
            carry, loss, metrics, outputs, all_halted = model(carry=carry, batch=batch, return_keys=["logits", *Q_KEYS])
        assert_close(metrics_and(metrics, outputs | {"loss": loss}), part(expected, f"eval/step{step}/"), 1e-4)
        assert bool(all_halted) == (step == 4)


def test_training() -> None:
    expected = read("expected")
    model, settings = golden_model(), CONFIG["optim"]
    optimizers = [
        AdamATan2(model.parameters(), settings["lr"], settings["betas"], settings["weight_decay"]),
        SparseSignSGD(model.model.inner.puzzle_emb, settings["puzzle_emb_lr"], settings["puzzle_emb_weight_decay"]),
    ]
    carry = model.initial_carry(batch_of_step(1))
    for step in range(1, CONFIG["train_steps"] + 1):
        carry, loss, metrics, outputs, all_halted = model(
            carry=carry, batch=batch_of_step(step), return_keys=[*Q_KEYS, "target_q_continue"]
        )
        (loss / CONFIG["batch_size"]).backward()
        seen = metrics_and(metrics, outputs | {"loss": loss, "halted": carry.halted, "steps": carry.steps})
        if step == 1:
            seen |= {f"grad/{name}": grad for name, grad in gradients(model).items()}
        assert_close(seen, part(expected, f"train/step{step}/"), 1e-4)
        assert bool(all_halted) == bool(expected[f"train/step{step}/halted"].all())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    # How far the weights moved: a stricter measure than where they are.
    before, after = read("weights_before"), read("weights_after")
    moved = {name: weight - torch.tensor(before[name]) for name, weight in model.state_dict().items()}
    assert_close(moved, {name: after[name] - before[name] for name in after}, 1e-3)
