"""Options of `evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from hrm.config.checks import at_least, choice
from hrm.config.entry import DEVICES, SAVEABLE_OUTPUTS
from hrm.config.kernels import KernelsConfig

ACT_MODES = ("full", "halt", "both")


@dataclass
class EnsembleConfig:
    """Answers to one puzzle that are put to the vote."""

    augmentations: int = 1  # images of each puzzle under the task's symmetries, itself included
    checkpoints: list[str] = field(default_factory=list)  # models that answer beside `checkpoint`
    check: bool = False  # answers that break the rules (Sudoku, mazes) do not count where others keep them

    def __post_init__(self) -> None:
        at_least("ensemble.augmentations", self.augmentations, 1)


@dataclass
class EvaluateConfig:
    """Options of `evaluate.py`."""

    checkpoint: str = MISSING  # a weights file, a run folder, a hub id such as owner/name, or sudoku, which is here
    data_path: str | None = None  # the pack; default: where the run's own config says
    save_outputs: list[str] = field(
        default_factory=list
    )  # any of inputs, labels, puzzle_identifiers, logits, q_halt_logits, q_continue_logits
    output_dir: str | None = None  # of saved outputs and pictures; default: the checkpoint's folder
    global_batch_size: int | None = None  # sequences at a time; default: the run's own
    puzzle: str | None = None  # solve this one board (digits, 0 or . for blanks) instead of the test split
    show: int = 0  # print this many test boards and draw them, and the training curves, as PNG
    act: str = "full"  # full: all ACT steps; halt: until q_halt > q_continue; both: one after the other, compared
    act_margin: float = 0.0  # act=halt needs q_halt > q_continue + this
    act_max_steps: int | None = None  # last ACT step; default: training's
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    report: str | None = None  # a folder for an HTML report: answers step by step, and how accuracy comes about
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these there is
    num_workers: int = 0  # loader processes

    def __post_init__(self) -> None:
        choice("device", self.device, DEVICES)
        for output in self.save_outputs:
            choice("save_outputs", output, SAVEABLE_OUTPUTS)
        at_least("show", self.show, 0)
        choice("act", self.act, ACT_MODES)
        if self.act_max_steps is not None:
            at_least("act_max_steps", self.act_max_steps, 1)
        at_least("num_workers", self.num_workers, 0)
        if self.global_batch_size is not None:
            at_least("global_batch_size", self.global_batch_size, 1)
