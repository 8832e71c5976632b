"""Options of `hrm quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hrm.config.checks import at_least, choice, fraction
from hrm.config.entry import DEVICES, DTYPES, QUANTIZE


@dataclass
class QuantizeConfig:
    """Options of `hrm quantize`."""

    # The model: a run folder, a weights file, a hub id such as owner/name, or sudoku, sudoku_small or maze, which come
    # with the package.
    checkpoint: str = MISSING
    quantize: str = "int8"  # what is compared with the model as it is: int8 or fp8
    # With int8, the folder to write, which `checkpoint=` then takes; an earlier one there is replaced. null: compare
    # and write nothing.
    output: str | None = None
    gate: float = 0.01  # how much exact accuracy may fall, as a share of the puzzles; else the command fails
    puzzles: int = 1000  # to compare accuracy on
    batch_size: int | None = None  # puzzles computed at a time; null: what suits the device
    act_max_steps: int | None = None  # ACT steps at most; null: as in training
    # The pack whose test split has the puzzles to compare on, and which says what tokens mean where the checkpoint does
    # not. null: the pack that the model was trained on, if it is here, else Sudoku puzzles are generated.
    data_path: str | None = None
    seed: int = 0  # of the puzzles that are generated
    dtype: str = "auto"  # what the model as it is computes in; auto: as in training, or what suits the CPU
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is available

    def __post_init__(self) -> None:
        choice("quantize", self.quantize, [name for name in QUANTIZE if name != "none"])
        choice("device", self.device, DEVICES)
        choice("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "act_max_steps"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        fraction("gate", self.gate)
        at_least("puzzles", self.puzzles, 1)
        at_least("seed", self.seed, 0)
