"""Small models to export, and what they answer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import hrm
from hrm.checkpoint.run_folder import save_config
from hrm.checkpoint.weights import save_weights
from hrm.config import ExportConfig, PretrainConfig
from hrm.config.compose import compose
from hrm.data.pack import write_examples, write_identifiers
from hrm.evaluation.latent import act_steps
from hrm.export import command
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import as_batch
from hrm.models.hrm import HRMConfig
from hrm.models.recurrent import RecurrentConfig
from hrm.models.transformer import TransformerConfig
from hrm.models.trm import TRMConfig
from hrm.tasks.form import Puzzle, PuzzleForm

ACT_STEPS = 3
SIZE: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "expansion": 1.0, "halt_max_steps": ACT_STEPS}
HRM = HRMConfig(**SIZE, H_layers=1, L_layers=1, H_cycles=1, L_cycles=2)
TRM = TRMConfig(**SIZE, L_layers=1, H_cycles=1, L_cycles=1, mlp_t=True, pos_encodings="none")
ARCHITECTURES: dict[str, RecurrentConfig] = {
    "hrm": HRM,
    "trm-mixer": TRM,
    "trm-attention": TRMConfig(**SIZE, L_layers=1, H_cycles=2, L_cycles=1, register_tokens=1),
    "transformer": TransformerConfig(**SIZE, num_layers=1, pos_encodings="rope_2d+learned"),
}
SYMBOLS = "?.1234"  # of the tokens of 4x4 boards


def run_folder(folder: Path, options: RecurrentConfig, seed: int = 1) -> Path:
    """A run folder with random weights, of a model for 4x4 boards."""
    save_config(PretrainConfig(arch=options, data_path="data/none"), folder)
    model = hrm.build_model(options, batch_size=1, seq_len=16, vocab_size=6, num_puzzle_identifiers=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # answers that depend on the puzzle, and values of halting that differ
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=generator)
        model.model.inner.puzzle_emb.weights.normal_(generator=generator)
    save_weights(model.state_dict(), folder, "step_7")
    PuzzleForm("sudoku", seq_len=16, vocab_size=6).save(folder)
    return folder


def loaded(folder: Path) -> TrainedModel:
    return hrm.from_pretrained(folder, device="cpu", dtype="float32")


def boards(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random tokens: what untrained models answer to them differs more than their answers to puzzles."""
    return np.random.default_rng(3).integers(1, 6, (count, 16))


def text_of(tokens: np.ndarray[Any, Any]) -> str:
    """A board as the program in an exported folder writes it."""
    return "".join(SYMBOLS[token] for token in tokens)


def answers_of(model: TrainedModel, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """After all ACT steps."""
    batch = as_batch([Puzzle(tokens) for tokens in inputs])
    outputs = [outputs for _, (_, outputs) in zip(range(ACT_STEPS), act_steps(model.model, batch), strict=False)]
    answers: np.ndarray[Any, np.dtype[np.int64]] = outputs[-1]["logits"].argmax(-1).numpy()
    return answers


def pack_of_answers(folder: Path, model: TrainedModel, count: int = 12) -> Path:
    """A pack whose labels are what a model answers, so that it is right on all of it."""
    inputs = boards(count)
    labels = answers_of(model, inputs)
    for split in ("train", "test"):
        write_examples(folder / split, inputs.astype(np.uint8), labels.astype(np.uint8), vocab_size=6)
    write_identifiers(folder, ["<blank>"])
    return folder


def export(*options: str) -> None:
    """What `hrm export` does with these options."""
    command.export(compose(ExportConfig, "export", options))
