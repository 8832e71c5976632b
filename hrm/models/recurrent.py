"""What recurrent architectures share: embeddings in, a schedule of updates in every ACT step, output heads.

An architecture adds its modules, its states and its schedule (see `hrm.models.hrm` for the plainest example).
Shapes: B sequences, S input tokens, P puzzle prefix tokens, T = P + S, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import II
from torch import Tensor, nn

from hrm.batch import Batch
from hrm.config.checks import MOST_REPEATS, at_least, at_most, choice, neighbours, positive
from hrm.config.renamed import OldNames, Renamed
from hrm.errors import UserError
from hrm.kernels import Kernels
from hrm.kernels.context import KernelContext, RotaryTables
from hrm.kernels.naive import grid_rotary_tables, rotary_tables
from hrm.kernels.schedule import Schedule, Update, looped
from hrm.models.act import ACTConfig
from hrm.models.blocks import BLOCKS, Block, BlockSizes, NormedAttentionBlock, Stack
from hrm.models.layers import Embedding, Linear, SparseEmbedding, copies_at_hand, in_dtype, truncated_normal

POS_ENCODINGS = ("rope", "rope_2d", "learned", "rope+learned", "rope_2d+learned", "none")
FORWARD_DTYPES = ("bfloat16", "float32", "float16", "float64")
GRADIENTS = ("one_step", "last_cycle", "all")


@dataclass
class RecurrentConfig(ACTConfig):
    """Options of blocks, embeddings and gradients, which all recurrent architectures have."""

    CHANGES_IN_TRAINING: ClassVar[frozenset[str]] = ACTConfig.CHANGES_IN_TRAINING | {"gradient"}
    RENAMED: ClassVar[OldNames] = {
        "grad_updates": Renamed("gradient", str),
        "no_ACT_continue": Renamed("q_continue", operator.not_),  # TRM's
    }

    # What gradients flow through at the end of an ACT step. one_step: the last update of each state, the paper's
    # one-step gradient; last_cycle: all since the slow state was last replaced; all; or a number of updates.
    gradient: str = "one_step"
    # Starts of the states that the heads do not read, z_L of HRM and TRM. With several, training advances them all, and
    # in each ACT step the one of lowest loss learns and hands its answer to the others; evaluation takes the first.
    starts: int = 1
    hidden_size: int = 512  # numbers in a token's state
    num_heads: int = 8  # of attention
    expansion: float = 4.0  # SwiGLU's inner width is 2/3 of this times hidden_size, rounded up to 256s
    mlp_t: bool = False  # mix tokens by a gated MLP over them, not by attention: for packs of one shape of puzzle
    # Of the gated MLPs: silu(g) * v, or sigmoid_rms, sigmoid(g) * rms_norm(g * v), with which the sizes of weights do
    # not matter ("Speed is Confidence", arXiv 2601.19085).
    gate: str = "silu"
    attention_norm: bool = False  # with gate=sigmoid_rms: norm attention's output too, before its projection
    puzzle_emb_ndim: int = II(".hidden_size")  # numbers in a puzzle's vector; 0: no puzzle prefix
    puzzle_emb_len: int = 0  # tokens of the puzzle prefix, zeros where the vector ends; 0: as many as it fills
    register_tokens: int = 0  # fixed random tokens between the puzzle prefix and the input
    # rope rotates by the position in the row of tokens, rope_2d by row and column of a square grid; learned is added to
    # the input. Also rope+learned and rope_2d+learned: distances and positions. none: for mlp_t, whose weights know
    # positions; attention takes the tokens for a set then.
    pos_encodings: str = "rope"
    rms_norm_eps: float = 1e-5  # added to the mean square before its root is taken
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    forward_dtype: str = "bfloat16"  # of activations; the master weights are float32

    def schedule(self) -> Iterator[Update]:
        """The updates of one ACT step, in order. The heads read the state that the last one replaces."""
        raise NotImplementedError

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options in a published config or in one that an earlier version saved, by today's names.

        Raises:
            UserError: it asks for what is not there.
        """
        given = dict(values)
        if given.pop("causal", False):
            raise UserError("arch.causal=true is not supported: attention is non-causal; drop it from arch.")
        if (no_continue := given.pop("no_ACT_continue", None)) is not None:
            given.setdefault("q_continue", not no_continue)
        if (updates := given.pop("grad_updates", None)) is not None:
            given.setdefault("gradient", str(updates))
        return given

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.puzzle_emb_ndim == II(".hidden_size"):  # made in Python, where nobody resolves interpolations
            self.puzzle_emb_ndim = self.hidden_size
        self.gradient = str(self.gradient)
        choice("arch.pos_encodings", self.pos_encodings, POS_ENCODINGS)
        choice("arch.gate", self.gate, BLOCKS)
        if self.attention_norm and (self.mlp_t or self.gate != "sigmoid_rms"):
            raise UserError("arch.attention_norm=true is for attention with arch.gate=sigmoid_rms: drop it, or mlp_t.")
        choice("arch.forward_dtype", self.forward_dtype, FORWARD_DTYPES)
        for name in ("hidden_size", "num_heads"):
            at_least(f"arch.{name}", getattr(self, name), 1)
        for name in ("puzzle_emb_ndim", "puzzle_emb_len", "register_tokens"):
            at_least(f"arch.{name}", getattr(self, name), 0)
        if self.prefix_len > MOST_REPEATS:
            raise UserError(
                f"arch.puzzle_emb_ndim={self.puzzle_emb_ndim} is too large: give at most {MOST_REPEATS} times "
                "arch.hidden_size."
            )
        for name in ("expansion", "rope_theta", "rms_norm_eps"):
            positive(f"arch.{name}", getattr(self, name))
        at_most("arch.expansion", self.expansion, 1e12)  # where sizes are still exact
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"arch.hidden_size={self.hidden_size} cannot be split into arch.num_heads={self.num_heads} equal "
                "heads: make it a multiple."
            )
        rotated = {"rope": 2, "rope_2d": 4, None: 1}[self.rotation]  # numbers of a head that are rotated together
        if self.head_size % rotated:
            raise UserError(
                f"arch.pos_encodings={self.pos_encodings} needs a head size that is a multiple of {rotated}, but "
                f"hidden_size/num_heads is {self.head_size}: change one of them or take learned."
            )
        schedule = list(self.schedule())
        self._check_gradient(schedule)
        at_least("arch.starts", self.starts, 1)
        if self.starts > self.hidden_size:
            raise UserError(
                f"arch.starts={self.starts} is too large: only arch.hidden_size={self.hidden_size} vectors of that "
                "size can be orthogonal to one another."
            )
        if self.starts > 1 and len({update.state for update in schedule}) == 1:
            raise UserError(
                f"arch.starts={self.starts} needs a state that the heads do not read, and arch.name={self.name} has "
                "none: drop it."
            )

    def _check_gradient(self, schedule: Schedule) -> None:
        if self.gradient in GRADIENTS:
            return
        if not self.gradient.isdigit():
            raise UserError(f"arch.gradient={self.gradient} is not a choice; {neighbours(self.gradient, GRADIENTS)}")
        least = len(schedule) - _last_updates(schedule)
        if not least <= int(self.gradient) <= len(schedule):
            raise UserError(
                f"arch.gradient={self.gradient} is out of range: give {', '.join(GRADIENTS)}, or a number from {least} "
                f"to the {len(schedule)} updates of an ACT step."
            )

    def effective_options(self) -> dict[str, Any]:
        """The options as a mapping, equal where steps are: `gradient` is a number of updates, whatever its name."""
        schedule = list(self.schedule())
        return asdict(self) | {"gradient": len(schedule) - self.gradient_start(schedule)}

    def gradient_start(self, schedule: Schedule) -> int:
        """The index of the first update that gradients flow through."""
        if self.gradient == "one_step":
            return _last_updates(schedule)
        if self.gradient == "last_cycle":
            *before, last = schedule
            return max((i + 1 for i, update in enumerate(before) if update.state == last.state), default=0)
        return 0 if self.gradient == "all" else len(schedule) - int(self.gradient)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

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
        """Tokens before the input's: the puzzle's and the registers."""
        return self.puzzle_prefix_len + self.register_tokens

    @property
    def puzzle_prefix_len(self) -> int:
        """Tokens that a puzzle's vector takes."""
        return max(self.puzzle_emb_len, -(-self.puzzle_emb_ndim // self.hidden_size)) if self.puzzle_emb_ndim else 0

    def inner_size(self, size: int) -> int:
        """Inner width of a gated MLP over `size` numbers."""
        return -(-round(self.expansion * size * 2 / 3) // 256) * 256


def _last_updates(schedule: Schedule) -> int:
    """The index from which on each state is updated a last time: the one-step gradient begins there."""
    return min({update.state: index for index, update in enumerate(schedule)}.values())


class DataSizes(NamedTuple):
    """What a model must know of its data."""

    seq_len: int
    vocab_size: int
    num_puzzle_identifiers: int


class Prepared(NamedTuple):
    """What stays the same through the recurrences of one ACT step: embeddings, and weights in the compute dtype."""

    embeddings: Tensor  # [B, T, D]
    blocks: dict[str, Sequence[Any]]  # weights of each module's blocks, of the type that the blocks have
    no_grad_blocks: dict[str, Sequence[Any]]  # the same as `Kernels.run` wants them
    context: KernelContext


class StepPlan(NamedTuple):
    """What an ACT step is under some options, worked out once."""

    config: RecurrentConfig
    schedule: Schedule
    gradient_start: int  # the index of the first update that gradients flow through
    max_steps: int  # ACT steps after which every sequence has halted

    @classmethod
    def of(cls, config: RecurrentConfig, *, training: bool) -> StepPlan:
        schedule = list(config.schedule())
        most = config.max_steps_in_training if training else config.halt_max_steps
        return cls(config, schedule, config.gradient_start(schedule), most)


class RecurrentModel(nn.Module):
    """Embeddings, modules and output heads: one ACT step without the halting.

    A subclass adds its modules and states, then the heads, in its `__init__`.
    """

    averages_puzzle_table: ClassVar[bool] = True  # whether an average of the weights (`ema_decay`) takes it in

    rotary_cos: Tensor  # [T, D / heads], with rope only
    rotary_sin: Tensor
    registers: Tensor  # [register_tokens, D]
    kernels: Kernels  # set by `hrm.models.build_model`, when it knows the device

    def __init__(self, config: RecurrentConfig, sizes: DataSizes, generator: torch.Generator) -> None:
        """The embeddings, drawn by `generator` in the order of the published code."""
        super().__init__()
        self.config = config
        self.sizes = sizes
        self._plans = {training: StepPlan.of(config, training=training) for training in (False, True)}
        self.output_state = self._plans[False].schedule[-1].state  # which the heads read
        self.dtype: torch.dtype = getattr(torch, config.forward_dtype)
        self.prefix_len = config.prefix_len
        self.num_tokens = self.prefix_len + sizes.seq_len
        self.stacks: dict[str, Stack] = {}  # the modules that have blocks, by their names in updates and `state_dict()`
        self._initial: dict[str, str] = {}  # the buffer of each state
        self._no_grad_blocks: dict[str, Sequence[Any]] | None = None  # in 8 bit, while weights are at hand
        self._starts: dict[str, str] = {}  # the buffer of the further starts of each state that has some

        self.embed_tokens = self._new_table(sizes.vocab_size, generator)
        self._learns_positions, self._rotates = config.learns_positions, config.rotation is not None
        if self._learns_positions:
            self.embed_pos = self._new_table(self.num_tokens, generator)
        if self._rotates:
            tables = _rotary_tables(config, sizes.seq_len)
            self.register_buffer("rotary_cos", tables.cos, persistent=False)
            self.register_buffer("rotary_sin", tables.sin, persistent=False)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = SparseEmbedding(sizes.num_puzzle_identifiers, config.puzzle_emb_ndim)
        if config.register_tokens:  # of the variance of the input's embeddings as the model sees them
            registers = truncated_normal((config.register_tokens, config.hidden_size), 1.0, generator)
            self.register_buffer("registers", registers)

    def _new_table(self, rows: int, generator: torch.Generator) -> Embedding:
        width = self.config.hidden_size
        return Embedding(truncated_normal((rows, width), width**-0.5, generator))

    def add_stack(self, name: str, num_layers: int, generator: torch.Generator) -> None:
        """Add a module of so many blocks, which updates name by `name`, as `state_dict()` does."""
        self.stacks[name] = Stack([self.new_block(generator) for _ in range(num_layers)])
        self.add_module(name, self.stacks[name])

    def new_block(self, generator: torch.Generator) -> Block:
        """A fresh block of the kind that the options ask for."""
        config = self.config
        width, tokens = config.hidden_size, self.num_tokens
        sizes = BlockSizes(tokens, width, config.inner_size(width), config.inner_size(tokens), config.num_heads)
        kind = NormedAttentionBlock if config.attention_norm else BLOCKS[config.gate][config.mlp_t]
        return kind(sizes, generator)

    def add_state(self, name: str, buffer: str, initial: Tensor) -> None:
        """Add a state that begins with the vector `initial` [D] at every token, which `state_dict()` calls `buffer`."""
        # Not learned, and in the states' dtype as in the published checkpoints: wider ones would make the published
        # code compute in theirs.
        self.register_buffer(buffer, initial.to(self.dtype))
        self._initial[name] = buffer

    def add_starts(self, name: str, others: Tensor) -> None:
        """Let training begin a state with the vectors `others` [starts - 1, D] too: see `hrm.models.starts`."""
        self._starts[name] = f"{self._initial[name]}_others"
        self.register_buffer(self._starts[name], others.to(self.dtype))

    def random_vector(self, generator: torch.Generator) -> Tensor:
        """A vector [D] for a state to begin with, of standard deviation 1, as published."""
        return truncated_normal((self.config.hidden_size,), 1.0, generator)

    def add_heads(self, generator: torch.Generator) -> None:
        """Add the output heads, which the published code draws last."""
        vocab_size, width = self.sizes.vocab_size, self.config.hidden_size
        self.lm_head = Linear(truncated_normal((vocab_size, width), width**-0.5, generator))
        # Q-learning starts from "both values are near 0" (sigmoid of -5), whatever the state.
        self.q_head = Linear(torch.zeros(2, width), torch.full((2,), -5.0))

    # ---- what others ask

    @property
    def initial_states(self) -> dict[str, Tensor]:
        """The vector [D] that each state begins with at every token."""
        return {name: self.get_buffer(buffer) for name, buffer in self._initial.items()}

    @property
    def hidden_states(self) -> list[str]:
        """The names of the states that the heads do not read."""
        return [name for name in self._initial if name != self.output_state]

    @property
    def hidden_starts(self) -> dict[str, Tensor]:
        """The vectors [starts, D] that states with several starts begin with, the first in evaluation too."""
        return {
            name: torch.cat([self.get_buffer(self._initial[name])[None], self.get_buffer(others)])
            for name, others in self._starts.items()
        }

    @property
    def block_types(self) -> tuple[type, ...]:
        """The types of the blocks' weights, which the kernels have to compute."""
        return tuple(dict.fromkeys(block.WEIGHTS for stack in self.stacks.values() for block in stack.blocks))

    @property
    def is_its_schedule(self) -> bool:
        """Whether an ACT step is the updates of its schedule one after the other, and nothing besides."""
        return type(self).recur is RecurrentModel.recur

    @property
    def levels(self) -> dict[str, Update]:
        """The update of each level, lowest first: `L` and `H` for states `z_L` and `z_H`.

        Empty where an ACT step is not made of such updates: one state alone, or one that is updated in several ways.
        """
        updates = list(dict.fromkeys(self.plan.schedule))
        states = {update.state for update in updates}
        if not self.is_its_schedule or not 1 < len(states) == len(updates):
            return {}
        return {update.state.removeprefix("z_"): update for update in updates}

    @property
    def plan(self) -> StepPlan:
        """An ACT step as it is now, in training or in evaluation."""
        return self._plans[self.training]

    @property
    def training_plan(self) -> StepPlan:
        """An ACT step in training, as the stage of the curriculum has it."""
        return self._plans[True]

    def train_as(self, config: RecurrentConfig) -> None:
        """Let training steps be as a stage of the curriculum has them; `config` differs in nothing that has weights."""
        self._plans[True] = StepPlan.of(config, training=True)

    def empty_states(self, batch: Batch) -> dict[str, Tensor]:
        """States of zeros for a batch, to be given values when its sequences begin."""
        shape = (batch["inputs"].shape[0], self.num_tokens, self.config.hidden_size)
        return {name: torch.zeros(shape, dtype=self.dtype, device=batch["inputs"].device) for name in self._initial}

    @contextmanager
    def weights_at_hand(self) -> Iterator[None]:
        """A context in which weights do not change: they are cast once, and on a CPU rounded to 8 bit once."""
        outer, self._no_grad_blocks = self._no_grad_blocks, {}
        try:
            with copies_at_hand(self.parameters(), self.dtype):
                yield
        finally:
            self._no_grad_blocks = outer

    # ---- one ACT step

    def prepare(self, batch: Batch) -> Prepared:
        """Embed a batch and cast the weights, once for all recurrences of an ACT step."""
        return self.prepare_embedded(self._embed(batch["inputs"], batch["puzzle_identifiers"]))

    def prepare_embedded(self, embeddings: Tensor) -> Prepared:
        """`prepare` for a batch whose embeddings [B, T, D] are known."""
        rotary = RotaryTables(self.rotary_cos, self.rotary_sin) if self._rotates else None
        masters = {name: stack.weights() for name, stack in self.stacks.items()}
        weights = [weight for stack in masters.values() for block in stack for weight in block]
        cast = iter(in_dtype(weights, self.dtype))
        blocks: dict[str, Sequence[Any]] = {
            name: [type(block)(*islice(cast, len(block))) for block in stack] for name, stack in masters.items()
        }
        no_grad_blocks = self._prepare_without_gradient(blocks)
        context = KernelContext(rotary, self.config.num_heads, self.config.rms_norm_eps)
        return Prepared(embeddings, blocks, no_grad_blocks, context)

    @torch.no_grad()
    def _prepare_without_gradient(self, blocks: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """The blocks of each module as `Kernels.run` wants them."""
        kept = self._no_grad_blocks
        if not self.kernels.eight_bit or kept is None or self.lm_head.weight.device.type != "cpu":
            return {name: self.kernels.prepare(name, stack) for name, stack in blocks.items()}
        for name, stack in blocks.items():
            if name not in kept:
                kept[name] = self.kernels.prepare(name, stack)
        return dict(kept)

    def _embed(self, inputs: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        width = self.config.hidden_size
        embeddings = self.embed_tokens(inputs, self.dtype)
        prefix: list[Tensor] = []
        if puzzle_len := self.config.puzzle_prefix_len:
            puzzle = self.puzzle_emb(puzzle_identifiers, self.dtype)
            puzzle = F.pad(puzzle, (0, puzzle_len * width - self.config.puzzle_emb_ndim))
            prefix.append(puzzle.view(-1, puzzle_len, width))
        if self.config.register_tokens:
            registers = (self.registers / math.sqrt(width)).to(self.dtype)  # by which all are multiplied below
            prefix.append(registers.expand(embeddings.shape[0], -1, -1))
        if prefix:
            embeddings = torch.cat((*prefix, embeddings), dim=1)
        if self._learns_positions:
            # Two tables of equal variance are summed: scale back to the variance of one.
            (positions,) = in_dtype([self.embed_pos.embedding_weight], self.dtype)
            embeddings = 0.707106781 * (embeddings + positions)
        scaled: Tensor = math.sqrt(width) * embeddings
        return scaled

    def recur(self, states: dict[str, Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """The updates of one ACT step. With gradients on, `gradient` says which of them are differentiable."""
        if not torch.is_grad_enabled():
            return self._run_without_gradient(states, prepared, self.plan.schedule)
        return self.finish(self.begin(states, prepared), prepared)

    def begin(self, states: dict[str, Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """The updates of one ACT step that are never differentiable."""
        return self._run_without_gradient(states, prepared, self.plan.schedule[: self.plan.gradient_start])

    def finish(self, states: dict[str, Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """Those after `begin`, differentiable with gradients on."""
        schedule = self.plan.schedule[self.plan.gradient_start :]
        if not torch.is_grad_enabled():
            return self._run_without_gradient(states, prepared, schedule)
        known = {**states, "embeddings": prepared.embeddings}
        new = looped(self.kernels.module)(known, schedule, prepared.blocks, prepared.context)
        return {name: new[name] for name in states}

    def update(self, states: dict[str, Tensor], prepared: Prepared, level: str) -> dict[str, Tensor]:
        """One of the updates that an ACT step is made of, without gradient: `level` is one of `levels`."""
        return self._run_without_gradient(states, prepared, [self.levels[level]])

    def recur_to_q_values(self, states: dict[str, Tensor], prepared: Prepared) -> tuple[Tensor, Tensor]:
        """`q_values` after one more ACT step, without gradient and without what only other tokens would need."""
        *schedule, last = self.plan.schedule
        states = self._run_without_gradient(states, prepared, schedule)
        *_, last_block = prepared.blocks[last.module]
        but_last = prepared.no_grad_blocks | {last.module: prepared.no_grad_blocks[last.module][:-1]}
        x = self._run_without_gradient(states, prepared._replace(no_grad_blocks=but_last), [last])[last.state]
        return self._read_q_head(self.kernels.first_token_block(x, last_block, prepared.context))

    @torch.no_grad()
    def _run_without_gradient(
        self, states: dict[str, Tensor], prepared: Prepared, schedule: Schedule
    ) -> dict[str, Tensor]:
        if not schedule:
            return states
        known = {**states, "embeddings": prepared.embeddings}
        new = self.kernels.run(known, schedule, prepared.no_grad_blocks, prepared.context)
        return {name: new[name] for name in states}

    def logits(self, states: Mapping[str, Tensor]) -> Tensor:
        """Scores of the answer's tokens, [B, S, V]."""
        logits: Tensor = self.lm_head(states[self.output_state])[:, self.prefix_len :]
        return logits

    def q_values(self, states: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """q_halt and q_continue, logits, each [B] in float32 at least, read off the first token.

        Without `q_continue` in the configuration, it is 0, a value of one half.
        """
        return self._read_q_head(states[self.output_state][:, 0])

    def _read_q_head(self, first_token: Tensor) -> tuple[Tensor, Tensor]:
        q: Tensor = self.q_head(first_token)
        q_halt, q_continue = q.to(torch.promote_types(q.dtype, torch.float32)).unbind(-1)
        return q_halt, q_continue if self.config.q_continue else torch.zeros_like(q_halt)

    # ---- what it costs: floating-point operations in the blocks for one sequence, nearly all that a step computes

    def act_step_flops(self) -> int:
        """Of an ACT step in evaluation."""
        return self.schedule_flops(self._plans[False].schedule)

    def train_step_flops(self) -> int:
        """Of an ACT step in training as the stage of the curriculum has it, backward pass and target included."""
        config, schedule, start, max_steps = self.training_plan
        flops = self.schedule_flops(schedule) + 2 * self.schedule_flops(schedule[start:])
        if config.q_continue and max_steps > 1:
            flops += self.q_values_flops(schedule)
        return flops

    def q_values_flops(self, schedule: Schedule) -> int:
        """Of `recur_to_q_values`."""
        *others, last = schedule
        return self.schedule_flops(others) + self.stacks[last.module].first_token_flops()

    def schedule_flops(self, schedule: Schedule) -> int:
        """Of updates forward."""
        each = {name: stack.flops() for name, stack in self.stacks.items()}
        return sum(each[update.module] for update in schedule)


def _rotary_tables(config: RecurrentConfig, seq_len: int) -> RotaryTables:
    if config.rotation == "rope":
        return rotary_tables(config.prefix_len + seq_len, config.head_size, config.rope_theta)
    side = math.isqrt(seq_len)
    if side * side != seq_len:
        raise UserError(
            f"arch.pos_encodings={config.pos_encodings} is for square grids, which {seq_len} tokens are not: "
            "choose rope or learned."
        )
    return grid_rotary_tables(config.prefix_len, side, config.head_size, config.rope_theta)
