"""Options of `pretrain.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import II, MISSING

from hrm.config.checks import MOST_WORKERS, at_least, at_most, choice, fraction, positive
from hrm.config.data import DataConfig
from hrm.config.entry import DEVICES, DTYPES, SAVEABLE_OUTPUTS
from hrm.config.kernels import KernelsConfig
from hrm.config.optim import OptimConfig
from hrm.config.parallel import ParallelConfig
from hrm.config.renamed import Combined, Dropped, OldNames, Renamed
from hrm.errors import UserError

INIT_PUZZLE_EMB = ("auto", "keep", "mean", "new")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def _ema_decay(given: Mapping[str, Any]) -> float | None:
    """What TRM's `ema` and `ema_rate` stand for, of which one may be left out."""
    return given.get("ema_rate", 0.999) if given.get("ema", True) else None


_EMA = Combined("ema_decay", _ema_decay)


@dataclass
class PretrainConfig:
    """Options of `pretrain.py`. Those down to `eval_save_outputs` have the published code's names and meaning."""

    # Names in TRM's code.
    RENAMED: ClassVar[OldNames] = {
        "ema": _EMA,
        "ema_rate": _EMA,
        "evaluators": Dropped("a pack's task brings its evaluators"),
        "freeze_weights": Renamed("freeze", lambda on: "trunk" if on else None),
        "load_checkpoint": "init_from",
    }

    arch: Any = MISSING  # typed by the schema that its YAML file names
    data_path: str = II("data.path")  # the pack to train on, or its URL; default: that of `data`, built if missing
    # Several packs to train on at once, of one vocabulary and length: identifiers of each have rows of their own in the
    # puzzle table. A single one is data_path.
    data_paths: list[str] = field(default_factory=list)
    data_paths_test: list[str] = field(default_factory=list)  # packs that are evaluated; empty: those trained on

    global_batch_size: int = 768  # sequences in a training step, over all ranks
    epochs: int = 100000  # passes over the groups of the training set; a multiple of eval_interval
    eval_interval: int | None = 10000  # epochs between evaluations; null: one evaluation, at the end
    min_eval_interval: int = 0  # the first passes of eval_interval epochs that are not evaluated
    eval_examples: int | None = None  # evaluate on so many examples of each set, drawn by the seed; null: on all
    checkpoint_every_eval: bool = True  # save the weights at every evaluation; false: only at the end

    # The training state to resume from: auto: the last one in the run folder, if any; or its path or URL; null: start
    # anew.
    resume: str | None = None
    resume_changed: bool = False  # resume although options differ from those of the saved run
    # Start from the weights of another run: a weights file, a run folder, the URL of one, a hub id; optimizers start
    # afresh.
    init_from: str | None = None
    # The puzzle table with init_from. keep: its rows; mean: each row the mean of its rows; new: zeros; auto: keep where
    # the pack has the same identifiers, else mean.
    init_puzzle_emb: str = "auto"
    # Weights that are not trained. trunk: all but the puzzle table; or names of modules and weights with commas between
    # them, * for any characters, such as L_level,lm_head.
    freeze: str | None = None
    checkpoint_interval: float = 10.0  # minutes between training states; one is saved at each evaluation too
    keep_checkpoints: int = 2  # newest training states to keep, beside the one that was best at its evaluation
    # Decay of an average of the weights, such as 0.999, which is evaluated and saved too.
    ema_decay: float | None = None
    ema_start: int = 0  # steps until which the average is the weights themselves
    stop_after: int | None = None  # end after this many evaluations without a better exact accuracy; null: never
    # End at an evaluation once training's exact accuracy is this; null: never.
    stop_at_train_accuracy: float | None = None

    lr: float = 1e-4  # peak learning rate of the dense weights
    lr_min_ratio: float = 1.0  # end of the cosine decay, as a share of the peak; 1.0: constant after the warm-up
    lr_warmup_steps: int = 2000  # steps in which the learning rate rises linearly from 0
    # Stages of training, one after the other, each {until: its last step, and the architecture's options that differ in
    # it, such as halt_max_steps}. After the last stage, all is as the architecture says.
    curriculum: list[Any] = field(default_factory=list)
    stagger: bool = False  # begin with sequences at all ACT steps, instead of all at the first, as published
    augment_entry: bool = False  # map each puzzle that begins by random symmetries of its task, until it halts
    augment_act_steps: bool = False  # map puzzles by a symmetry of their task at every ACT step: Sudoku; mazes warn
    weight_decay: float = 0.1  # decoupled weight decay of the dense weights
    beta1: float = 0.9  # decay of the optimizer's running mean of gradients
    beta2: float = 0.95  # decay of the optimizer's running mean of squared gradients
    puzzle_emb_lr: float = 1e-2  # learning rate of the puzzle embeddings, by SignSGD
    puzzle_emb_weight_decay: float = 0.1  # weight decay of the puzzle embeddings

    seed: int = 0  # seed of weights, order of examples and exploration; the same seed gives the same run
    project_name: str | None = None  # project in Weights & Biases and in checkpoint_path; null: made from data_path
    run_name: str | None = None  # name of the run in its project; null: made from the architecture and the time
    checkpoint_path: str | None = None  # the run folder; null: checkpoints/<project_name>/<run_name>
    # Tensors saved at each evaluation: any of inputs, labels, puzzle_identifiers, logits, q_halt_logits and
    # q_continue_logits.
    eval_save_outputs: list[str] = field(default_factory=list)

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    accumulate: int = 1  # passes in which a rank's batch is computed, their gradients summed, to save memory
    grad_clip: float | None = None  # largest global norm of the dense gradients, beyond which they are scaled down
    skip_nonfinite: bool = True  # skip, and count, optimizer steps with NaN or Inf in loss or gradients
    abort_after: int | None = 20  # end the run after so many skipped steps in a row; null: never
    dist_timeout: float = 600.0  # seconds that ranks wait for one another before the run ends and names who is missing
    # What to compute in: bfloat16, float32, float16 or float64; auto: arch.forward_dtype, but float32 where a CPU has
    # no instructions for bfloat16.
    dtype: str = "auto"
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is available
    num_workers: int = 0  # processes that load data; any number gives the same batches
    log_interval: int = 10  # steps between two records of metrics
    profile: str | None = None  # folder for a trace of a few steps, one file a rank, for Perfetto or chrome://tracing
    wandb: str = "auto"  # Weights & Biases: online, offline or disabled; auto: online when logged in

    def __post_init__(self) -> None:
        choice("device", self.device, DEVICES)
        choice("dtype", self.dtype, DTYPES)
        choice("wandb", self.wandb, WANDB_MODES)
        choice("init_puzzle_emb", self.init_puzzle_emb, INIT_PUZZLE_EMB)
        self._settle_packs()
        at_least("min_eval_interval", self.min_eval_interval, 0)
        if self.eval_examples is not None:
            at_least("eval_examples", self.eval_examples, 1)
        for name in ("global_batch_size", "epochs", "log_interval"):
            at_least(name, getattr(self, name), 1)
        fraction("lr_min_ratio", self.lr_min_ratio)
        at_least("accumulate", self.accumulate, 1)
        if self.grad_clip is not None:
            positive("grad_clip", self.grad_clip)
        if self.abort_after is not None:
            at_least("abort_after", self.abort_after, 1)
        positive("dist_timeout", self.dist_timeout)
        if self.parallel.fsdp and self.ema_decay is not None:
            raise UserError("ema_decay cannot be combined with parallel.fsdp=true: drop one of them.")
        for name in ("lr", "lr_warmup_steps", "weight_decay", "num_workers", "seed"):
            at_least(name, getattr(self, name), 0)
        at_most("num_workers", self.num_workers, MOST_WORKERS)
        for name in ("puzzle_emb_lr", "puzzle_emb_weight_decay"):
            at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed} is too large: give a number below 2**63.")
        fraction("beta1", self.beta1, below_one=True)
        fraction("beta2", self.beta2, below_one=True)
        for output in self.eval_save_outputs:
            choice("eval_save_outputs", output, SAVEABLE_OUTPUTS)
        if self.eval_interval is not None:
            at_least("eval_interval", self.eval_interval, 1)
            if self.epochs % self.eval_interval:
                raise UserError(
                    f"epochs={self.epochs} is not a multiple of eval_interval={self.eval_interval}: change one of them."
                )
        positive("checkpoint_interval", self.checkpoint_interval)
        at_least("keep_checkpoints", self.keep_checkpoints, 1)
        if self.ema_decay is not None:
            fraction("ema_decay", self.ema_decay, below_one=True)
        at_least("ema_start", self.ema_start, 0)
        if self.stop_after is not None:
            at_least("stop_after", self.stop_after, 1)
        if self.stop_at_train_accuracy is not None:
            fraction("stop_at_train_accuracy", self.stop_at_train_accuracy)
        self._stages = self._checked_stages()

    def _settle_packs(self) -> None:
        """Let `data_path` be the first pack, and the lists of packs be empty where they have nothing to add to it."""
        if self.data_paths:
            if self.data_path not in (self.data_paths[0], self.data.path):
                raise UserError(
                    f"data_path={self.data_path} and data_paths=[{','.join(self.data_paths)}] name different packs: "
                    "give one of the two."
                )
            self.data_path = self.data_paths[0]
        for option in ("data_paths", "data_paths_test"):
            if twice := next((path for path in getattr(self, option) if getattr(self, option).count(path) > 1), None):
                raise UserError(f"{option} has {twice} twice: name each pack once.")
        if len(self.data_paths) == 1:
            self.data_paths = []
        if self.data_paths_test == self.train_paths:
            self.data_paths_test = []

    @property
    def train_paths(self) -> list[str]:
        """The packs that are trained on."""
        return self.data_paths or [self.data_path]

    @property
    def test_paths(self) -> list[str]:
        """The packs that are evaluated."""
        return self.data_paths_test or self.train_paths

    def _checked_stages(self) -> list[tuple[int, Any]]:
        """The last step of each stage of the curriculum, and the architecture in it."""
        stages: list[tuple[int, Any]] = []
        for stage in self.curriculum:
            if not isinstance(stage, Mapping) or not isinstance(stage.get("until"), int):
                raise UserError(
                    "curriculum: each stage is {until: its last step, option: value, ...}, such as "
                    "[{until: 5000, halt_max_steps: 4}]."
                )
            until, fields = stage["until"], {name: value for name, value in stage.items() if value is not None}
            at_least("curriculum: until", until, 1)
            del fields["until"]
            try:
                stages.append((until, self.arch.in_stage(fields)))
            except UserError as error:
                raise UserError(f"curriculum: the stage until step {until}: {error}") from error
        ends = [until for until, _ in stages]
        if ends != sorted(set(ends)):
            raise UserError(f"curriculum: stages end at steps {', '.join(map(str, ends))}; give them in order.")
        return stages

    def arch_at(self, step: int) -> Any:
        """The architecture's options in training step `step`, counted from 1."""
        return next((arch for until, arch in self._stages if step <= until), self.arch)
