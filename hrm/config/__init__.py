"""Every option there is, with its type and default: the schema that Hydra checks each command line against.

The YAML files in `config/` choose values; what can be set at all, and what it means, stands here. OmegaConf rejects
unknown names and wrong types; the `__post_init__` methods reject values that no combination could use.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from hrm.errors import UserError, first_sentence

PROJECT_DIR = Path(__file__).resolve().parents[2]
CONFIG_DIR = PROJECT_DIR / "config"

TRM = "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"
ARCHITECTURES = ("hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", TRM)  # as in the published configs
LOSS_HEADS = ("losses@ACTLossHead",)
LOSS_TYPES = ("stablemax_cross_entropy", "softmax_cross_entropy")
POS_ENCODINGS = ("rope", "rope_2d", "learned", "rope+learned", "rope_2d+learned", "none")
FORWARD_DTYPES = ("bfloat16", "float32", "float16", "float64")
DEVICES = ("auto", "cuda", "mps", "cpu")
WANDB_MODES = ("auto", "online", "offline", "disabled")
OPTIMIZERS = ("adam_atan2", "adamw", "muon")
ACT_MODES = ("full", "halt", "both")
FP8_LEVELS = ("none", "H", "L", "both")
SAVEABLE_OUTPUTS = (
    "inputs",
    "labels",
    "puzzle_identifiers",
    "logits",
    "q_halt_logits",
    "q_continue_logits",
)


def neighbours(name: str, known: Iterable[str]) -> str:
    """The part of an error sentence that says what a misspelt `name` may have meant."""
    known = sorted(known)
    # Options nest: `hidden_size` should find `arch.hidden_size` too.
    by_last_part = {option.rpartition(".")[2]: option for option in known}
    close = difflib.get_close_matches(name, known, n=3) or [
        by_last_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=3)
    ]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(known)}." if len(known) <= 12 else "--help lists them."


def _choice(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option}={value} is not a choice; {neighbours(value, allowed)}")


def _at_least(option: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{option}={value} is too small: give at least {least}.")
    if value == math.inf:
        raise UserError(f"{option}={value} is too large: give a finite number.")


def _positive(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{option}={value} is out of range: give a finite number above 0.")


def _fraction(option: str, value: float, *, below_one: bool = False) -> None:
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise UserError(
            f"{option}={value} is out of range: give a number from 0 {'to below' if below_one else 'to'} 1."
        )


def updates_of(H_cycles: int, L_cycles: int) -> str:
    """The updates of L and H, in order, of so many slow cycles with so many fast ones in each."""
    return ("L" * L_cycles + "H") * H_cycles


# ---------------------------------------------------------------------------------------------------------------------
# Groups


@dataclass
class LossConfig:
    name: str = LOSS_HEADS[0]
    loss_type: str = "stablemax_cross_entropy"  # or softmax_cross_entropy

    def __post_init__(self) -> None:
        _choice("arch.loss.name", self.name, LOSS_HEADS)
        _choice("arch.loss.loss_type", self.loss_type, LOSS_TYPES)


@dataclass
class HRMConfig:
    """HRM v1 with adaptive computation time (paper section 2; names as in the published configs).

    `H_layers=0`, `mlp_t` and `puzzle_emb_len` are TRM's (Jolicoeur-Martineau 2025, arXiv 2510.04871), named as there.
    """

    name: str = ARCHITECTURES[0]
    loss: LossConfig = field(default_factory=LossConfig)
    halt_exploration_prob: float = 0.1  # share of sequences made to think at least a random number of steps
    halt_max_steps: int = 16  # ACT steps after which every sequence halts
    # Learn the value of going on too, from a recurrence more in each step. False, as in TRM (Jolicoeur-Martineau 2025):
    # sequences halt where q_halt > 0, and a training step is about 1.5 times as fast.
    q_continue: bool = True
    H_cycles: int = 2  # slow updates in an ACT step
    L_cycles: int = 2  # fast updates before each slow one
    # Updates at an ACT step's end that gradients flow through: 2, the last of either module, is the paper's one-step
    # gradient; L_cycles + 1 the last cycle as in TRM; each costs its blocks twice more.
    grad_updates: int = 2
    H_layers: int = 4  # 0, and with TRM's name always: none of its own, the L level's blocks are H's too
    L_layers: int = 4
    hidden_size: int = 512
    num_heads: int = 8
    expansion: float = 4.0  # SwiGLU's inner width is 2/3 of this times hidden_size, rounded up to 256s
    mlp_t: bool = False  # mix tokens by a gated MLP over them, not by attention: for packs of one shape of puzzle
    puzzle_emb_ndim: int = II(".hidden_size")  # numbers in a puzzle's vector; 0: no puzzle prefix
    puzzle_emb_len: int = 0  # tokens of the puzzle prefix, zeros where the vector ends; 0: as many as it fills
    # rope turns by the place in the row of tokens, rope_2d by row and column of a square grid; learned is added to the
    # input. Also rope+learned and rope_2d+learned: distances and places. none: for mlp_t, which tells places apart.
    pos_encodings: str = "rope"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    forward_dtype: str = "bfloat16"  # of activations; the master weights are float32

    @property
    def inner_size(self) -> int:
        """Inner width of the gated MLP."""
        return self._inner_size_of(self.hidden_size)

    def token_inner_size(self, num_tokens: int) -> int:
        """Inner width of `mlp_t`'s MLP."""
        return self._inner_size_of(num_tokens)

    def _inner_size_of(self, size: int) -> int:
        return -(-round(self.expansion * size * 2 / 3) // 256) * 256

    @property
    def layers(self) -> dict[str, int]:
        """Blocks that an update of either level runs through."""
        return {"H": self.H_layers or self.L_layers, "L": self.L_layers}

    @property
    def updates(self) -> str:
        """An ACT step's updates of L and H in order."""
        return updates_of(self.H_cycles, self.L_cycles)

    @property
    def rotation(self) -> str | None:
        """The RoPE among `pos_encodings`, or None where there is none or `mlp_t` has no use for one."""
        if self.mlp_t:
            return None
        return next((part for part in self.pos_encodings.split("+") if part.startswith("rope")), None)

    @property
    def learns_positions(self) -> bool:
        return "learned" in self.pos_encodings.split("+")

    @property
    def prefix_len(self) -> int:
        """Tokens that a puzzle's vector takes."""
        return max(self.puzzle_emb_len, -(-self.puzzle_emb_ndim // self.hidden_size)) if self.puzzle_emb_ndim else 0

    def __post_init__(self) -> None:
        if self.puzzle_emb_ndim == II(".hidden_size"):  # made in Python, where nobody resolves interpolations
            self.puzzle_emb_ndim = self.hidden_size
        _choice("arch.name", self.name, ARCHITECTURES)
        if self.name == TRM:
            self.H_layers = 0
        _choice("arch.pos_encodings", self.pos_encodings, POS_ENCODINGS)
        if self.pos_encodings == "none" and not self.mlp_t:
            raise UserError("arch.pos_encodings=none leaves attention blind to places: choose another, or mlp_t=true.")
        _choice("arch.forward_dtype", self.forward_dtype, FORWARD_DTYPES)
        _fraction("arch.halt_exploration_prob", self.halt_exploration_prob)
        for name in ("halt_max_steps", "H_cycles", "L_cycles", "L_layers", "hidden_size", "num_heads"):
            _at_least(f"arch.{name}", getattr(self, name), 1)
        for name in ("H_layers", "puzzle_emb_ndim", "puzzle_emb_len"):
            _at_least(f"arch.{name}", getattr(self, name), 0)
        if not 2 <= self.grad_updates <= len(self.updates):
            raise UserError(
                f"arch.grad_updates={self.grad_updates} is out of range: give a number from 2 to the "
                f"{len(self.updates)} updates of an ACT step, {self.updates}."
            )
        for name in ("expansion", "rope_theta", "rms_norm_eps"):
            _positive(f"arch.{name}", getattr(self, name))
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"arch.hidden_size={self.hidden_size} cannot be split into arch.num_heads={self.num_heads} equal "
                "heads: make it a multiple."
            )
        turned = {"rope": 2, "rope_2d": 4, None: 1}[self.rotation]  # numbers of a head that turn together
        if (self.hidden_size // self.num_heads) % turned:
            raise UserError(
                f"arch.pos_encodings={self.pos_encodings} needs a head size that is a multiple of {turned}, but "
                f"hidden_size/num_heads is {self.hidden_size // self.num_heads}: change one of them or take learned."
            )


@dataclass
class KernelsConfig:
    """How reasoning modules are computed: which backend, and execution choices that leave the maths alone."""

    backend: str = "naive"  # a name in hrm.kernels.BACKENDS, or auto: the fastest that runs here, and its switches
    attention: str = "auto"  # a name in hrm.kernels.attention.PROVIDERS, or auto: the fastest measured
    compile: bool = False  # pass the backend through torch.compile
    cuda_graphs: bool = False  # launch whole training and evaluation steps at once (NVIDIA); see parallel.cuda_graphs
    fused_step: bool = False  # optimizers, loss, casts and carry as a kernel each, in Triton (NVIDIA)
    chunk: int = 0  # sequences at a time where no gradient is needed, to stay in the cache; 0: all, on a CPU some
    fp8: str = "none"  # levels whose passes without gradient are computed in 8 bit (e4m3): none, H, L or both

    def __post_init__(self) -> None:
        _at_least("kernels.chunk", self.chunk, 0)
        _choice("kernels.fp8", self.fp8, FP8_LEVELS)


@dataclass
class DataConfig:
    """A named data pack: where it lies, which builder makes it, and what it is made of."""

    name: str = MISSING
    path: str = MISSING
    build: str = MISSING  # builder and its arguments, as typed after `python`; --output-dir PATH is added
    source: str = ""  # what the builder reads, or that it generates
    version: str = ""  # of the source, or the seed
    licence: str = ""  # of the source
    augmentation: str = ""  # of a training puzzle
    shape: str = ""  # of a puzzle, and the number of tokens


@dataclass
class OptimConfig:
    """The optimizer of the dense weights; rates and betas are the top-level options of the published code."""

    name: str = "adam_atan2"  # or adamw, muon
    eps: float = 1e-8  # AdamW only: Adam-atan2 has none
    momentum: float = 0.95  # Muon only: of the hidden matrices; `lr` and `weight_decay` are theirs
    rest_lr_ratio: float = 0.1  # Muon only: rate of embeddings and heads, by Adam-atan2, as a multiple of `lr`
    rest_weight_decay: float = 1.0  # Muon only: weight decay of embeddings and heads

    def __post_init__(self) -> None:
        _choice("optim.name", self.name, OPTIMIZERS)
        _fraction("optim.momentum", self.momentum, below_one=True)
        _positive("optim.rest_lr_ratio", self.rest_lr_ratio)
        _at_least("optim.rest_weight_decay", self.rest_weight_decay, 0)


@dataclass
class Stage:
    """Training steps that think less deep, or halt sooner, than the architecture does; null: as it does."""

    until: int = MISSING  # the last of these steps
    H_cycles: int | None = None
    L_cycles: int | None = None
    halt_max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("until", "H_cycles", "L_cycles", "halt_max_steps"):
            if getattr(self, name) not in (MISSING, None):
                _at_least(f"curriculum: {name}", getattr(self, name), 1)


_AS_THE_ARCHITECTURE = Stage()


@dataclass
class ParallelConfig:
    """How the processes that torchrun started share the work.

    `tensor * pipeline` of them train together on one part of the batch; there are as many parts as that leaves.
    """

    tensor: int = 1  # processes that share the heads and the MLP of every block
    pipeline: int = 1  # processes that share the layers of each level, in stages
    micro_batches: int = 4  # what a rank's batch is cut into on its way through the pipeline; at least its stages
    fsdp: bool = False  # keep the levels' weights and their optimizer state in shards over the data ranks
    bucket_mb: float = 0.0  # sum gradients in buckets of this many MB while backward goes on; 0: all at once after it
    cuda_graphs: bool | None = None  # record the exchange between GPUs into kernels.cuda_graphs; null: where possible

    @property
    def records_exchange(self) -> bool:
        """Whether `kernels.cuda_graphs` takes in what several processes exchange."""
        return self._can_record if self.cuda_graphs is None else self.cuda_graphs

    @property
    def _can_record(self) -> bool:
        return not self.fsdp and self.pipeline == 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        _at_least("parallel.micro_batches", self.micro_batches, self.pipeline)
        _at_least("parallel.bucket_mb", self.bucket_mb, 0)
        if self.fsdp and self.pipeline > 1:
            raise UserError("parallel.fsdp=true does not go with parallel.pipeline: drop one of them.")
        if self.cuda_graphs and not self._can_record:
            raise UserError(
                "parallel.cuda_graphs=true goes with data and tensor parallelism only: drop it, parallel.fsdp or "
                "parallel.pipeline."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Entry points


@dataclass
class PretrainConfig:
    """Options of `pretrain.py`. Those down to `eval_save_outputs` have the published code's names and meaning."""

    arch: Any = MISSING  # typed by the schema that its YAML file names
    data_path: str = II("data.path")

    global_batch_size: int = 768  # sequences in a step, over all ranks
    epochs: int = 100000
    eval_interval: int | None = 10000  # epochs from one evaluation to the next; null: once, at the end
    checkpoint_every_eval: bool = True  # else only at the end

    resume: str | None = None  # auto: go on from the run folder's last training state; or its path; null: start anew
    resume_changed: bool = False  # go on although options differ from those the run had
    checkpoint_interval: float = 10.0  # minutes from one training state to the next; besides, one at each evaluation
    keep_checkpoints: int = 2  # newest training states kept, beside the one that was best at its evaluation
    ema_decay: float | None = None  # of an average of the weights, such as 0.999; it is evaluated and saved too
    stop_after: int | None = None  # end after this many evaluations without a better exact accuracy
    stop_at_train_accuracy: float | None = None  # end at an evaluation before which training's exact accuracy was this

    lr: float = 1e-4
    lr_min_ratio: float = 1.0  # the cosine's end, as a share of lr; 1.0: constant after the warm-up
    lr_warmup_steps: int = 2000
    curriculum: list[Stage] = field(default_factory=list)  # other steps at first, one stage after the other
    stagger: bool = False  # begin with sequences at all ACT steps, not all at the first, as published
    augment_act_steps: bool = False  # at every ACT step, show a puzzle as another of its images: Sudoku and mazes
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    puzzle_emb_lr: float = 1e-2
    puzzle_emb_weight_decay: float = 0.1

    seed: int = 0
    project_name: str | None = None  # default: made from data_path
    run_name: str | None = None  # default: made from the architecture and the time
    checkpoint_path: str | None = None  # the run folder; default: checkpoints/<project_name>/<run_name>
    eval_save_outputs: list[str] = field(default_factory=list)  # any of hrm.config.SAVEABLE_OUTPUTS

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    accumulate: int = 1  # parts of a rank's batch whose gradients are summed one after the other, to save memory
    grad_clip: float | None = None  # largest global norm of the dense gradients; beyond it they are scaled down
    skip_nonfinite: bool = True  # leave out, and count, the updates of steps with NaN or Inf in loss or gradients
    abort_after: int | None = 20  # end the run after so many of these steps in a row; null: never
    dist_timeout: float = 600.0  # seconds that ranks wait for each other before the run ends naming who is missing
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these there is
    num_workers: int = 0  # loader processes; any number gives the same batches
    log_interval: int = 10  # steps from one reading of the metrics to the next
    profile: str | None = None  # a folder for a trace of a few steps, one file a rank, for Perfetto or chrome://tracing
    wandb: str = "auto"  # online, offline or disabled; auto: online when logged in

    def __post_init__(self) -> None:
        _choice("device", self.device, DEVICES)
        _choice("wandb", self.wandb, WANDB_MODES)
        for name in ("global_batch_size", "epochs", "log_interval"):
            _at_least(name, getattr(self, name), 1)
        _fraction("lr_min_ratio", self.lr_min_ratio)
        _at_least("accumulate", self.accumulate, 1)
        if self.grad_clip is not None:
            _positive("grad_clip", self.grad_clip)
        if self.abort_after is not None:
            _at_least("abort_after", self.abort_after, 1)
        _positive("dist_timeout", self.dist_timeout)
        if self.parallel.fsdp and self.ema_decay is not None:
            raise UserError("ema_decay does not go with parallel.fsdp=true: drop one of them.")
        for name in ("lr", "lr_warmup_steps", "weight_decay", "num_workers", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("puzzle_emb_lr", "puzzle_emb_weight_decay"):
            _at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed} is too large: give a number below 2**63.")
        _fraction("beta1", self.beta1, below_one=True)
        _fraction("beta2", self.beta2, below_one=True)
        for output in self.eval_save_outputs:
            _choice("eval_save_outputs", output, SAVEABLE_OUTPUTS)
        if self.eval_interval is not None:
            _at_least("eval_interval", self.eval_interval, 1)
            if self.epochs % self.eval_interval:
                raise UserError(
                    f"epochs={self.epochs} is not a multiple of eval_interval={self.eval_interval}: change one of them."
                )
        _positive("checkpoint_interval", self.checkpoint_interval)
        _at_least("keep_checkpoints", self.keep_checkpoints, 1)
        if self.ema_decay is not None:
            _fraction("ema_decay", self.ema_decay, below_one=True)
        if self.stop_after is not None:
            _at_least("stop_after", self.stop_after, 1)
        if self.stop_at_train_accuracy is not None:
            _fraction("stop_at_train_accuracy", self.stop_at_train_accuracy)
        ends = [stage.until for stage in self.curriculum]
        if ends != sorted(set(ends)):
            raise UserError(f"curriculum: stages end at steps {', '.join(map(str, ends))}; give them in order.")
        least = getattr(self.arch, "grad_updates", 2)
        for stage in self.curriculum:
            if len(updates := self.updates_at(stage.until)) < least:
                raise UserError(
                    f"curriculum: the stage until step {stage.until} has {len(updates)} updates, {updates}, but "
                    f"gradients flow through {least} (arch.grad_updates): give it more cycles."
                )

    def updates_at(self, step: int) -> str:
        """The updates of L and H in training step `step`, counted from 1."""
        stage = self._stage_at(step)
        return updates_of(stage.H_cycles or self.arch.H_cycles, stage.L_cycles or self.arch.L_cycles)

    def halt_max_steps_at(self, step: int) -> int:
        """ACT steps after which every sequence halts in training step `step`, counted from 1."""
        most: int = self._stage_at(step).halt_max_steps or self.arch.halt_max_steps
        return most

    def _stage_at(self, step: int) -> Stage:
        return next((stage for stage in self.curriculum if step <= stage.until), _AS_THE_ARCHITECTURE)


@dataclass
class EnsembleConfig:
    """Answers to one puzzle that are put to the vote."""

    augmentations: int = 1  # images of each puzzle under the task's symmetries, itself included
    checkpoints: list[str] = field(default_factory=list)  # models that answer beside `checkpoint`
    check: bool = False  # answers that break the rules (Sudoku, mazes) do not count where others keep them

    def __post_init__(self) -> None:
        _at_least("ensemble.augmentations", self.augmentations, 1)


@dataclass
class EvaluateConfig:
    """Options of `evaluate.py`."""

    checkpoint: str = MISSING  # a weights file, a run folder, a hub id such as owner/name, or sudoku, which is here
    data_path: str | None = None  # default: where the run's own config says
    save_outputs: list[str] = field(default_factory=list)  # any of hrm.config.SAVEABLE_OUTPUTS
    output_dir: str | None = None  # of saved outputs and pictures; default: the checkpoint's folder
    global_batch_size: int | None = None  # default: the run's own
    puzzle: str | None = None  # solve this one board (digits, 0 or . for blanks) instead of the test split
    show: int = 0  # print this many test boards and draw them, and the training curves, as PNG
    act: str = "full"  # full: all ACT steps; halt: until q_halt > q_continue; both: one after the other, compared
    act_margin: float = 0.0  # act=halt needs q_halt > q_continue + this
    act_max_steps: int | None = None  # last ACT step; default: training's
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    report: str | None = None  # a folder for an HTML report: answers step by step, and how accuracy comes about
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    device: str = "auto"
    num_workers: int = 0

    def __post_init__(self) -> None:
        _choice("device", self.device, DEVICES)
        for output in self.save_outputs:
            _choice("save_outputs", output, SAVEABLE_OUTPUTS)
        _at_least("show", self.show, 0)
        _choice("act", self.act, ACT_MODES)
        if self.act_max_steps is not None:
            _at_least("act_max_steps", self.act_max_steps, 1)
        _at_least("num_workers", self.num_workers, 0)
        if self.global_batch_size is not None:
            _at_least("global_batch_size", self.global_batch_size, 1)


def option_names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options in `config`."""
    for name in map(str, config):
        yield f"{prefix}{name}"
        if not OmegaConf.is_missing(config, name) and isinstance(child := config._get_node(name), DictConfig):
            yield from option_names(child, f"{prefix}{name}.")


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that the YAML files' defaults lists use."""
    store = ConfigStore.instance()
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(group="schema/arch", name="hrm_v1", node=HRMConfig)


# ---------------------------------------------------------------------------------------------------------------------
# From mappings to typed objects

T = TypeVar("T")


def to_typed(schema: type[T], values: Mapping[str, Any] | DictConfig, where: str) -> T:
    """Check `values` against the dataclass `schema` and return an instance.

    Args:
        where: what to call the mapping in an error, e.g. `arch`.

    Raises:
        UserError: for an unknown field, a wrong type, a missing or an impossible value.
    """
    typed = OmegaConf.structured(schema)
    name = ""
    try:
        for name, value in ((str(key), value) for key, value in values.items()):
            OmegaConf.update(typed, name, value)
        result = OmegaConf.to_object(typed)
    except (ConfigKeyError, ConfigAttributeError) as error:
        unknown = str(error.full_key)
        raise UserError(f"{where} has no field {unknown}; {neighbours(unknown, option_names(typed))}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{error.full_key or name} is not usable: {first_sentence(error)}.") from error
    assert isinstance(result, schema)
    return result


def arch_config(
    arch: Mapping[str, Any] | DictConfig, from_data: Mapping[str, int] | None = None, where: str = "arch"
) -> HRMConfig:
    """The typed architecture, from a mapping with the fields of `config/arch/hrm_v1.yaml`.

    Configs in the wild also carry what really comes from the data (`seq_len`, `vocab_size`, ...): such fields are
    accepted where they agree with `from_data`. `where` names the mapping in errors.

    Raises:
        UserError: for unknown fields, wrong types, impossible values, or a contradiction with the data.
    """
    values = dict(OmegaConf.to_container(arch, resolve=True) if isinstance(arch, DictConfig) else arch)  # type: ignore[arg-type]
    for name in ("batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers"):
        claimed, real = values.pop(name, None), (from_data or {}).get(name)
        if None not in (claimed, real) and claimed != real:
            raise UserError(f"arch.{name}={claimed} contradicts the data, which has {real}: drop it from arch.")
    if values.get("name") == TRM:  # whose code has no choice of the gradient, and other defaults
        values = {"q_continue": False, "puzzle_emb_len": 16, "grad_updates": values.get("L_cycles", 6) + 1} | values
    if (no_continue := values.pop("no_ACT_continue", None)) is not None:
        values["q_continue"] = not no_continue
    if values.pop("causal", False):
        raise UserError("arch.causal=true is not supported: HRM's attention is non-causal; drop it from arch.")
    return to_typed(HRMConfig, values, where)


def kernels_config(kernels: str | Mapping[str, Any] | KernelsConfig) -> KernelsConfig:
    """The kernel choice named by a preset of `config/kernels/`, or given field by field."""
    if isinstance(kernels, KernelsConfig):
        return kernels
    if isinstance(kernels, str):
        presets = {path.stem: path for path in (CONFIG_DIR / "kernels").glob("*.yaml")}
        if kernels not in presets:
            raise UserError(f"kernels={kernels} is not a preset; {neighbours(kernels, presets)}")
        return to_typed(KernelsConfig, OmegaConf.load(presets[kernels]), "kernels")  # type: ignore[arg-type]
    return to_typed(KernelsConfig, kernels, "kernels")
