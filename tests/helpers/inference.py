"""Run folders of tiny untrained models, and the models in them, for puzzles of any kind."""

from pathlib import Path
from typing import Any

import torch

import hrm
from hrm.checkpoint.run_folder import save_config
from hrm.checkpoint.weights import save_weights
from hrm.config import PretrainConfig
from hrm.inference.model import TrainedModel
from hrm.models.hrm import HRMConfig
from hrm.tasks.form import PuzzleForm

TINY = {
    "hidden_size": 16,
    "num_heads": 2,
    "H_layers": 1,
    "L_layers": 1,
    "H_cycles": 1,
    "L_cycles": 1,
    "halt_max_steps": 3,
    "forward_dtype": "float32",
}


def untrained(folder: Path, form: PuzzleForm, **arch: Any) -> Path:
    """A run folder with random weights, for puzzles of a form."""
    options = HRMConfig(**(TINY | arch))
    save_config(PretrainConfig(arch=options, data_path="data/none"), folder)
    model = hrm.build_model(
        options,
        batch_size=1,
        seq_len=form.seq_len,
        vocab_size=form.vocab_size,
        num_puzzle_identifiers=form.num_puzzle_identifiers,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # answers that differ, and sequences that halt at different steps
        model.model.inner.q_head.weight.normal_(generator=generator)
        model.model.inner.q_head.bias.zero_()
        model.model.inner.puzzle_emb.weights.normal_(generator=generator)
    save_weights(model.state_dict(), folder, "step_7")
    form.save(folder)
    return folder


def tiny(folder: Path, form: PuzzleForm, **arch: Any) -> TrainedModel:
    return hrm.from_pretrained(untrained(folder, form, **arch), device="cpu")
