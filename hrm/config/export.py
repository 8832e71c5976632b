"""Options of `hrm export`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hrm.config.checks import at_least, choice, fraction

FORMATS = ("onnx",)


@dataclass
class ExportConfig:
    """Options of `hrm export`."""

    # The model: a run folder, a weights file, the URL of one, a hub id such as owner/name, or sudoku, which comes with
    # the package.
    checkpoint: str = MISSING
    output: str = MISSING  # the folder to write; an earlier export there is replaced
    format: str = "onnx"  # what to write; onnx: one ACT step and a whole solve, for onnxruntime and others
    act_max_steps: int | None = None  # ACT steps of a whole solve; null: as in training
    gate: float = 0.01  # how far exact accuracy may be from PyTorch's, as a share of the puzzles; else it fails
    puzzles: int = 1000  # to compare accuracy on
    batch_size: int = 16  # puzzles at a time while comparing
    # The pack whose test split has the puzzles to compare on, and which says what tokens mean where the checkpoint does
    # not. null: the pack that the model was trained on, if it is here, else Sudoku puzzles are generated.
    data_path: str | None = None
    seed: int = 0  # of the puzzles that are generated

    def __post_init__(self) -> None:
        choice("format", self.format, FORMATS)
        if self.act_max_steps is not None:
            at_least("act_max_steps", self.act_max_steps, 1)
        fraction("gate", self.gate)
        at_least("puzzles", self.puzzles, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("seed", self.seed, 0)
