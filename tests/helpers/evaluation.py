"""Trained models and their packs, opened without evaluate.py: one board at a time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hrm.checkpoint.weights import find_checkpoint, read_weights
from hrm.models import ACTLossHead, arch_config, build_model
from hrm.tasks import all_tasks
from hrm.tasks.base import PuzzleSize
from tests.helpers.entry_points import CPU, ROOT
from tests.helpers.models import fresh_states
from tests.helpers.ranks import PATIENCE, environment, meeting


def load_model(run: Path) -> ACTLossHead:
    checkpoint = find_checkpoint(str(run))
    model = build_model(
        arch_config(checkpoint.config["arch"]), batch_size=1, seq_len=16, vocab_size=6, num_puzzle_identifiers=1
    )
    model.load_state_dict(read_weights(checkpoint.weights_file))
    return model.eval()


def raw_split(pack: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs and labels as they lie on the disk."""
    inputs, labels = (np.load(pack / "test" / f"all__{name}.npy").astype(np.int64) for name in ("inputs", "labels"))
    return inputs, labels


@torch.no_grad()
def think_alone(model: ACTLossHead, tokens: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], float]:
    """Logits [S, V] and the halting logit of one board, after all steps, without the wrapper that batches and halts."""
    inner = model.model.inner
    batch = {"inputs": torch.from_numpy(tokens)[None], "puzzle_identifiers": torch.zeros(1, dtype=torch.int32)}
    state = fresh_states(inner, batch)
    for _ in range(inner.config.halt_max_steps):
        state = inner.recur(state, inner.prepare(batch))
    return inner.logits(state)[0].double().numpy(), float(inner.q_values(state)[0])


def answers_to_images(model: ACTLossHead, tokens: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    """What a model says to images of a 4x4 board, after all steps, each turned back."""
    said = []
    for symmetry in all_tasks()["sudoku"].symmetries(PuzzleSize(16, 6), count):
        (image,) = symmetry.apply(tokens[None])
        answer = think_alone(model, image)[0].argmax(-1)
        said.append(symmetry.undo(answer[None])[0])
    return said


def run_ranks(size: int, *argv: str) -> list[str]:
    """What each rank of `torchrun evaluate.py` printed."""
    store, shared = meeting(), os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "evaluate.py"), *CPU, *argv],
            env=shared | environment(rank, size, store.port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    printed = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=PATIENCE)
            assert rank.returncode == 0, err
            printed.append(out)
    finally:
        for rank in ranks:
            rank.kill()
    return printed
