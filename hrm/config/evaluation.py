"""Options of `evaluate.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from hrm.config.checks import MOST_WORKERS, at_least, at_most, choice, positive
from hrm.config.entry import DEVICES, DTYPES, QUANTIZE, SAVEABLE_OUTPUTS
from hrm.config.kernels import KernelsConfig

MOST_ANSWERS = 1024  # to a puzzle; each votes on each: the vote of more would not fit in memory

PICKS = ("vote", "q", "converged", "first")
NOISE_ON = ("hidden", "output", "all")
NOISE_AT = ("steps", "start")
PUZZLE_EMB = ("trained", "mean", "zero")
ACT_MODES = ("auto", "full", "halt", "both")


@dataclass
class EnsembleConfig:
    """Several answers to each puzzle, by augmented copies of it, several paths and several models; one is picked."""

    augmentations: int = 1  # augmented copies of each puzzle under the task's symmetries, the puzzle itself included
    checkpoints: list[str] = field(default_factory=list)  # further models that answer, written as for `checkpoint`
    check: bool = False  # ignore answers that break the task's rules wherever other answers keep them
    # Paths of each model to an answer, the first as ever, the others with noise on the states of the recurrence; of a
    # model trained with arch.starts=K the first K are its starts, without noise, and others begin with them in turn.
    paths: int = 1
    noise: float = 0.3  # standard deviation of that noise, in states whose root mean square is 1 after a norm
    # What gets it. hidden: the states that the heads do not read, such as the fast one, or the only state there is;
    # output: the one that they read; all.
    noise_on: str = "hidden"
    noise_at: str = "steps"  # when it is added. steps: before every ACT step; start: before the first, a random start
    # What counts. vote: the most frequent answer; q: of highest q_halt; converged: whose state changed least in the
    # last ACT step; first: of the path that halts first, by q_halt > q_continue.
    pick: str = "vote"
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        at_least("ensemble.augmentations", self.augmentations, 1)
        at_most("ensemble.augmentations", self.augmentations, MOST_ANSWERS)
        at_least("ensemble.paths", self.paths, 1)
        at_most("ensemble.paths", self.paths, MOST_ANSWERS // self.augmentations)
        positive("ensemble.noise", self.noise)
        choice("ensemble.noise_on", self.noise_on, NOISE_ON)
        choice("ensemble.noise_at", self.noise_at, NOISE_AT)
        choice("ensemble.pick", self.pick, PICKS)
        at_least("ensemble.seed", self.seed, 0)


@dataclass
class EvaluateConfig:
    """Options of `evaluate.py`."""

    # The model: a weights file, a run folder (its last step is taken), the URL of one, a hub id such as owner/name, or
    # sudoku, sudoku_small or maze, which come with the package.
    checkpoint: str = MISSING
    # The pack whose test split is evaluated, or its URL; null: what the run was trained on.
    data_path: str | None = None
    # Rows of the puzzle table. trained: those of the pack it was trained on; mean: for every puzzle their mean, which
    # answers puzzles of other packs, unseen in training; zero: none, to see what the identifier is worth.
    puzzle_emb: str = "trained"
    # Tensors to save beside the metrics: any of inputs, labels, puzzle_identifiers, logits, q_halt_logits and
    # q_continue_logits.
    save_outputs: list[str] = field(default_factory=list)
    output_dir: str | None = None  # folder of saved outputs and pictures; null: the checkpoint's folder
    # Sequences evaluated at a time, over all ranks; null: as in training. With input, null: as many as it has, up to 16
    # on a CPU and 256 on a GPU, where a pipe always gets 256.
    global_batch_size: int | None = None
    # Solve this one puzzle, row by row, instead of the test split (Sudoku: digits, 0 or . for blanks; mazes: # SGo).
    puzzle: str | None = None
    # Answer the puzzles of a file, or of stdin (-), instead of evaluating: JSON lines, CSV with a column input or
    # question, or a puzzle a line.
    input: str | None = None
    output: str | None = None  # with input: the file of answers, JSON lines; null or -: stdout
    show: int = 0  # number of test puzzles to print and draw, with the training curves, as PNG
    # When sequences halt. full: after all ACT steps; halt: where q_halt > q_continue (with puzzle, if its rules are
    # known: once the answer keeps them as well); both: one after the other, compared; auto: full, but halt with input
    # or puzzle.
    act: str = "auto"
    act_margin: float = 0.0  # with act=halt, sequences halt where q_halt > q_continue + act_margin
    act_max_steps: int | None = None  # ACT steps at most, more or fewer than in training; null: as in training
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    report: str | None = None  # folder for an HTML report: answers at every ACT step, and accuracy in its parts
    # Database in which the metrics and the files written are recorded: sqlite:///FILE or
    # postgresql://USER:PASSWORD@HOST:PORT/DATABASE.
    results: str | None = None
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    # What to compute in: bfloat16, float32, float16 or float64; auto: as in training, but float32 where a CPU has no
    # instructions for bfloat16.
    dtype: str = "auto"
    # 8 bit for the matmuls. int8: integers, on CPUs and NVIDIA GPUs; fp8: e4m3, on NVIDIA GPUs from Ada and Hopper on.
    # It changes answers: `hrm quantize` says how many.
    quantize: str = "none"
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is available
    num_workers: int = 0  # processes that load data; any number gives the same batches

    def __post_init__(self) -> None:
        choice("device", self.device, DEVICES)
        choice("dtype", self.dtype, DTYPES)
        choice("quantize", self.quantize, QUANTIZE)
        for output in self.save_outputs:
            choice("save_outputs", output, SAVEABLE_OUTPUTS)
        at_least("show", self.show, 0)
        at_least("act_margin", self.act_margin, -math.inf)  # no NaN, and no infinity, with which none would halt
        choice("puzzle_emb", self.puzzle_emb, PUZZLE_EMB)
        choice("act", self.act, ACT_MODES)
        if self.act == "auto":
            self.act = "full" if self.input is None and self.puzzle is None else "halt"
        if self.act_max_steps is not None:
            at_least("act_max_steps", self.act_max_steps, 1)
        at_least("num_workers", self.num_workers, 0)
        at_most("num_workers", self.num_workers, MOST_WORKERS)
        if self.global_batch_size is not None:
            at_least("global_batch_size", self.global_batch_size, 1)
