"""Run folders of tiny untrained models, and the models in them, for puzzles of any kind."""

from pathlib import Path
from typing import Any

import torch

import hrm
from hrm.checkpoint.run_folder import save_config
from hrm.checkpoint.weights import save_weights
from hrm.config import PretrainConfig
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import as_batch
from hrm.models.hrm import HRMConfig
from hrm.models.recurrent import RecurrentConfig
from hrm.tasks.form import Puzzle, PuzzleForm

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


def untrained(folder: Path, form: PuzzleForm, config: RecurrentConfig | None = None, **arch: Any) -> Path:
    """A run folder with random weights, for puzzles of a form; without a config, of HRM with such options."""
    options = config or HRMConfig(**(TINY | arch))
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


def untrained_halting_apart(folder: Path, form: PuzzleForm, puzzles: Any, **arch: Any) -> Path:
    """A run folder as `untrained` makes one, whose sequences halt at different steps: half of the first two go on.

    Args:
        puzzles: tokens [N, S].
    """
    untrained(folder, form, **arch)
    model = hrm.from_pretrained(folder, device="cpu").model
    batch = as_batch([Puzzle(tokens) for tokens in puzzles])
    with torch.no_grad():
        carry, values = model.initial_carry(batch), []
        for _ in range(2):
            carry, outputs = model.model(carry, batch)
            values.append(outputs["q_halt_logits"] - outputs["q_continue_logits"])
        model.model.inner.q_head.bias[1] += torch.stack(values).median()
    save_weights(model.state_dict(), folder, "step_7")
    return folder
