"""Options of `hrm export`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hrm.config.checks import at_least, choice, fraction

PARTS = ("whole", "modules", "all")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class ExportConfig:
    """Options of `hrm export`."""

    # The model: a run folder, a weights file, the URL of one, a hub id such as owner/name, or sudoku, sudoku_small or
    # maze, which come with the package.
    checkpoint: str = MISSING
    output: str = MISSING  # the folder to write; an earlier export there is replaced
    # A file of hrm/export/formats. onnx: for onnxruntime and others; program: for PyTorch without this package;
    # tensorrt: the same with engines of TensorRT; triton: a model repository for NVIDIA's Triton Inference Server.
    format: str = "onnx"
    # Of the model. whole: one ACT step, and all of them where the format has loops; modules: one update of each level,
    # H and L, and what stands before and after them; all: both. null: whole, and all by format=triton.
    parts: str | None = None
    act_max_steps: int | None = None  # ACT steps of a whole solve; null: as in training
    gate: float = 0.01  # how far exact accuracy may be from PyTorch's, as a share of the puzzles; else it fails
    puzzles: int = 1000  # to compare accuracy on
    batch_size: int = 16  # puzzles at a time while comparing
    max_batch_size: int = 64  # puzzles at a time at most, where the files say it: format=tensorrt and triton
    device: str = "auto"  # what format=program compiles for, cpu or cuda; auto: cpu. The others know theirs.
    # The pack whose test split has the puzzles to compare on, and which says what tokens mean where the checkpoint does
    # not. null: the pack that the model was trained on, if it is here, else Sudoku puzzles are generated.
    data_path: str | None = None
    seed: int = 0  # of the puzzles that are generated

    def __post_init__(self) -> None:
        if self.parts is not None:
            choice("parts", self.parts, PARTS)
        choice("device", self.device, DEVICES)
        if self.act_max_steps is not None:
            at_least("act_max_steps", self.act_max_steps, 1)
        fraction("gate", self.gate)
        at_least("puzzles", self.puzzles, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("max_batch_size", self.max_batch_size, 2)
        at_least("seed", self.seed, 0)
