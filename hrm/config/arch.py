"""Options of the architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, DictConfig, OmegaConf

from hrm.config.checks import MOST_REPEATS, at_least, choice, fraction, positive, sane_counts
from hrm.config.typed import to_typed
from hrm.errors import UserError

TRM = "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"
ARCHITECTURES = ("hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", TRM)  # as in the published configs
LOSS_HEADS = ("losses@ACTLossHead",)
LOSS_TYPES = ("stablemax_cross_entropy", "softmax_cross_entropy")
POS_ENCODINGS = ("rope", "rope_2d", "learned", "rope+learned", "rope_2d+learned", "none")
FORWARD_DTYPES = ("bfloat16", "float32", "float16", "float64")


def updates_of(H_cycles: int, L_cycles: int) -> str:
    """The updates of L and H, in order, of so many slow cycles with so many fast ones in each."""
    return ("L" * L_cycles + "H") * H_cycles


@dataclass
class LossConfig:
    name: str = LOSS_HEADS[0]
    loss_type: str = "stablemax_cross_entropy"  # or softmax_cross_entropy

    def __post_init__(self) -> None:
        choice("arch.loss.name", self.name, LOSS_HEADS)
        choice("arch.loss.loss_type", self.loss_type, LOSS_TYPES)


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
        sane_counts("arch.", self)
        choice("arch.name", self.name, ARCHITECTURES)
        if self.name == TRM:
            self.H_layers = 0
        choice("arch.pos_encodings", self.pos_encodings, POS_ENCODINGS)
        if self.pos_encodings == "none" and not self.mlp_t:
            raise UserError("arch.pos_encodings=none leaves attention blind to places: choose another, or mlp_t=true.")
        choice("arch.forward_dtype", self.forward_dtype, FORWARD_DTYPES)
        fraction("arch.halt_exploration_prob", self.halt_exploration_prob)
        for name in ("halt_max_steps", "H_cycles", "L_cycles", "L_layers", "hidden_size", "num_heads"):
            at_least(f"arch.{name}", getattr(self, name), 1)
        for name in ("H_layers", "puzzle_emb_ndim", "puzzle_emb_len"):
            at_least(f"arch.{name}", getattr(self, name), 0)
        if not 2 <= self.grad_updates <= len(self.updates):
            raise UserError(
                f"arch.grad_updates={self.grad_updates} is out of range: give a number from 2 to the "
                f"{len(self.updates)} updates of an ACT step, {self.updates}."
            )
        if self.prefix_len > MOST_REPEATS:
            raise UserError(
                f"arch.puzzle_emb_ndim={self.puzzle_emb_ndim} is too large: give at most {MOST_REPEATS} times "
                "arch.hidden_size."
            )
        for name in ("expansion", "rope_theta", "rms_norm_eps"):
            positive(f"arch.{name}", getattr(self, name))
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
