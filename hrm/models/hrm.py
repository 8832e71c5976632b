"""HRM v1 with adaptive computation time (Wang et al. 2025, arXiv 2506.21734).

Shapes: B sequences, S input tokens, P puzzle prefix tokens, T = P + S, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.batch import Batch
from hrm.config import TRM, HRMConfig, KernelsConfig
from hrm.errors import UserError
from hrm.kernels import make_kernels
from hrm.kernels.context import KernelContext, RotaryTables
from hrm.kernels.naive import BlockWeights, MixerWeights, grid_rotary_tables, rotary_tables
from hrm.kernels.schedule import Schedule, Update, looped
from hrm.models.layers import Embedding, Linear, SparseEmbedding, in_dtype, truncated_normal


@dataclass(frozen=True)
class InnerCarry:
    """State of the two modules between ACT steps, each [B, T, D]."""

    z_H: Tensor
    z_L: Tensor


@dataclass(frozen=True)
class Carry:
    """All that one ACT step hands to the next."""

    inner_carry: InnerCarry
    steps: Tensor  # [B] int32: ACT steps spent on the sequence
    halted: Tensor  # [B] bool: the next step takes a new sequence in this place
    current_data: Batch

    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order."""
        return [
            self.inner_carry.z_H,
            self.inner_carry.z_L,
            self.steps,
            self.halted,
            *(self.current_data[name] for name in sorted(self.current_data)),
        ]


class Prepared(NamedTuple):
    """What stays the same through the recurrences of one ACT step: embeddings, and weights in the compute dtype."""

    embeddings: Tensor  # [B, T, D]
    blocks: dict[str, Sequence[Any]]  # weights of each module's blocks, of the type that the architecture's blocks have
    no_grad_blocks: dict[str, Sequence[Any]]  # the same as `Kernels.run` wants them
    context: KernelContext


def _linear(out_features: int, in_features: int, generator: torch.Generator) -> Linear:
    return Linear(truncated_normal((out_features, in_features), in_features**-0.5, generator))


def _rotary_tables(config: HRMConfig, prefix_len: int, seq_len: int) -> RotaryTables:
    head_size = config.hidden_size // config.num_heads
    if config.rotation == "rope":
        return rotary_tables(prefix_len + seq_len, head_size, config.rope_theta)
    side = math.isqrt(seq_len)
    if side * side != seq_len:
        raise UserError(
            f"arch.pos_encodings={config.pos_encodings} is for square grids, which {seq_len} tokens are not: "
            "choose rope or learned."
        )
    return grid_rotary_tables(prefix_len, side, head_size, config.rope_theta)


def _states(carry: InnerCarry, prepared: Prepared) -> dict[str, Tensor]:
    return {"z_H": carry.z_H, "z_L": carry.z_L, "embeddings": prepared.embeddings}


class Attention(nn.Module):
    """Weights of self-attention; the rows of `qkv_proj` are q's, then k's, then v's."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.qkv_proj = _linear(3 * width, width, generator)
        self.o_proj = _linear(width, width, generator)


class SwiGLU(nn.Module):
    """Weights of the gated MLP; the rows of `gate_up_proj` are the gate's, then the up projection's."""

    def __init__(self, width: int, inner: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_up_proj = _linear(2 * inner, width, generator)
        self.down_proj = _linear(width, inner, generator)


class Block(nn.Module):
    """Weights of one post-norm transformer block; `hrm.kernels` computes it.

    With `mlp_t` it has another MLP, over the tokens, instead of attention.
    """

    def __init__(self, config: HRMConfig, num_tokens: int, generator: torch.Generator) -> None:
        super().__init__()
        if config.mlp_t:
            self.mlp_t = SwiGLU(num_tokens, config.token_inner_size(num_tokens), generator)
        else:
            self.self_attn = Attention(config.hidden_size, generator)
        self.mlp = SwiGLU(config.hidden_size, config.inner_size, generator)

    def weights(self) -> BlockWeights | MixerWeights:
        """The master weights."""
        if hasattr(self, "mlp_t"):
            return MixerWeights(
                token_gate_up=self.mlp_t.gate_up_proj.weight,
                token_down=self.mlp_t.down_proj.weight,
                gate_up=self.mlp.gate_up_proj.weight,
                down=self.mlp.down_proj.weight,
            )
        return BlockWeights(
            qkv=self.self_attn.qkv_proj.weight,
            o=self.self_attn.o_proj.weight,
            gate_up=self.mlp.gate_up_proj.weight,
            down=self.mlp.down_proj.weight,
        )


class Level(nn.Module):
    """Weights of one reasoning module, H or L."""

    def __init__(self, config: HRMConfig, num_layers: int, num_tokens: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, num_tokens, generator) for _ in range(num_layers))

    def weights(self) -> list[BlockWeights | MixerWeights]:
        """The master weights of its blocks."""
        return [layer.weights() for layer in self.layers]  # type: ignore[operator]


class HierarchicalReasoningModel(nn.Module):
    """Embeddings, the two coupled modules and the output heads: one ACT step without the halting."""

    H_init: Tensor  # [D]
    L_init: Tensor  # [D]
    rotary_cos: Tensor  # [T, D / heads], with rope only
    rotary_sin: Tensor

    def __init__(
        self,
        config: HRMConfig,
        *,
        seq_len: int,
        vocab_size: int,
        num_puzzle_identifiers: int,
        kernels: KernelsConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config = config
        self.training_updates = config.updates  # of a step in training; a curriculum sets others
        self.dtype: torch.dtype = getattr(torch, config.forward_dtype)
        width = config.hidden_size
        self.prefix_len = config.prefix_len
        num_tokens = self.prefix_len + seq_len

        def table(rows: int) -> Embedding:
            return Embedding(truncated_normal((rows, width), width**-0.5, generator))

        self.embed_tokens = table(vocab_size)
        if config.learns_positions:
            self.embed_pos = table(num_tokens)
        if config.rotation is not None:
            tables = _rotary_tables(config, self.prefix_len, seq_len)
            self.register_buffer("rotary_cos", tables.cos, persistent=False)
            self.register_buffer("rotary_sin", tables.sin, persistent=False)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = SparseEmbedding(num_puzzle_identifiers, config.puzzle_emb_ndim)
        if config.H_layers:
            self.H_level = Level(config, config.H_layers, num_tokens, generator)
        self.L_level = Level(config, config.L_layers, num_tokens, generator)
        self.kernels = make_kernels(kernels, tuple(self.levels))
        # Not learned, and in the states' dtype as in the published checkpoints: wider ones would make the published
        # code compute in theirs.
        self.register_buffer("H_init", truncated_normal((width,), 1.0, generator).to(self.dtype))
        self.register_buffer("L_init", truncated_normal((width,), 1.0, generator).to(self.dtype))
        self.lm_head = Linear(truncated_normal((vocab_size, width), width**-0.5, generator))
        # Q-learning starts from "both values are near 0" (sigmoid of -5), whatever the state.
        self.q_head = Linear(torch.zeros(2, width), torch.full((2,), -5.0))

    @property
    def levels(self) -> dict[str, Level]:
        """The modules that have blocks, by their names in `state_dict()`."""
        return {name: getattr(self, name) for name in ("H_level", "L_level") if hasattr(self, name)}

    @property
    def averages_puzzle_table(self) -> bool:
        """Whether an average of the weights (`ema_decay`) takes in the puzzle table.

        TRM's code averages parameters, and the table is none: its average answers with the table as it is. HRM's code
        has no average; there all that is learned is averaged.
        """
        return self.config.name != TRM

    def initial_carry(self, batch: Batch) -> InnerCarry:
        sequences, seq_len = batch["inputs"].shape
        shape = (sequences, self.prefix_len + seq_len, self.config.hidden_size)
        z_H = torch.zeros(shape, dtype=self.dtype, device=batch["inputs"].device)
        return InnerCarry(z_H, torch.zeros_like(z_H))

    def reset_carry(self, carry: Carry, batch: Batch) -> tuple[InnerCarry, Tensor, Batch]:
        """Give sequences that halted the initial state and the batch's data, and count the step."""
        states, steps, data = self.kernels.reset_carry(
            {"z_H": carry.inner_carry.z_H, "z_L": carry.inner_carry.z_L},
            self.initial_state,
            carry.halted,
            carry.steps,
            carry.current_data,
            batch,
        )
        return InnerCarry(**states), steps, data

    @property
    def initial_state(self) -> dict[str, Tensor]:
        """The vector [D] that each state begins with at every token."""
        return {"z_H": self.H_init, "z_L": self.L_init}

    def prepare(self, batch: Batch) -> Prepared:
        """Embed a batch and cast the weights, once for all recurrences of an ACT step."""
        rotary = None
        if self.config.rotation is not None:
            rotary = RotaryTables(self.rotary_cos, self.rotary_sin)
        masters = {name: level.weights() for name, level in self.levels.items()}
        weights = [weight for level in masters.values() for block in level for weight in block]
        cast = iter(in_dtype(weights, self.dtype))
        blocks: dict[str, Sequence[Any]] = {
            name: [type(block)(*islice(cast, len(block))) for block in level] for name, level in masters.items()
        }
        with torch.no_grad():
            no_grad_blocks = {name: self.kernels.prepare(name, level) for name, level in blocks.items()}
        embeddings = self._embed(batch["inputs"], batch["puzzle_identifiers"])
        context = KernelContext(rotary, self.config.num_heads, self.config.rms_norm_eps)
        return Prepared(embeddings, blocks, no_grad_blocks, context)

    def _embed(self, inputs: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        width = self.config.hidden_size
        embeddings = self.embed_tokens(inputs, self.dtype)
        if self.prefix_len:
            puzzle = self.puzzle_emb(puzzle_identifiers, self.dtype)
            puzzle = F.pad(puzzle, (0, self.prefix_len * width - self.config.puzzle_emb_ndim))
            embeddings = torch.cat((puzzle.view(-1, self.prefix_len, width), embeddings), dim=1)
        if self.config.learns_positions:
            # Two tables of equal variance are summed: scale back to the variance of one.
            (positions,) = in_dtype([self.embed_pos.embedding_weight], self.dtype)
            embeddings = 0.707106781 * (embeddings + positions)
        scaled: Tensor = math.sqrt(width) * embeddings
        return scaled

    def recur(self, carry: InnerCarry, prepared: Prepared) -> InnerCarry:
        """One ACT step's schedule. Only its last `grad_updates` updates are differentiable."""
        schedule = self._schedule()
        if not torch.is_grad_enabled():
            return self._run(carry, prepared, schedule)
        last = self.config.grad_updates
        carry = self._run(carry, prepared, schedule[:-last])
        states = looped(self.kernels.module)(
            _states(carry, prepared), schedule[-last:], prepared.blocks, prepared.context
        )
        return InnerCarry(states["z_H"], states["z_L"])

    def recur_to_q_values(self, carry: InnerCarry, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """`q_values` after one more ACT step, without gradient and without what only other tokens would need."""
        *schedule, last_update = self._schedule()
        carry = self._run(carry, prepared, schedule)
        module = last_update.module
        *_, last_block = prepared.blocks[module]
        but_last = prepared.no_grad_blocks | {module: prepared.no_grad_blocks[module][:-1]}
        x = self._run(carry, prepared._replace(no_grad_blocks=but_last), [last_update]).z_H
        return self._read_q_head(self.kernels.first_token_block(x, last_block, prepared.context))

    @torch.no_grad()
    def _run(self, carry: InnerCarry, prepared: Prepared, schedule: Schedule) -> InnerCarry:
        if not schedule:
            return carry
        states = self.kernels.run(_states(carry, prepared), schedule, prepared.no_grad_blocks, prepared.context)
        return InnerCarry(states["z_H"], states["z_L"])

    def _schedule(self) -> list[Update]:
        fast = Update("z_L", ("z_H", "embeddings"), "L_level")
        slow = Update("z_H", ("z_L",), "H_level" if self.config.H_layers else "L_level")
        updates = self.training_updates if self.training else self.config.updates
        return [slow if level == "H" else fast for level in updates]

    def logits(self, carry: InnerCarry) -> Tensor:
        """Scores of the answer's tokens, [B, S, V]."""
        logits: Tensor = self.lm_head(carry.z_H)[:, self.prefix_len :]
        return logits

    def q_values(self, carry: InnerCarry) -> tuple[Tensor, Tensor]:
        """Logits of the values of halting and of going on, each [B] in float32 at least, read off the first token.

        Without `q_continue` in the configuration, the value of going on is a half, logit 0.
        """
        return self._read_q_head(carry.z_H[:, 0])

    def _read_q_head(self, first_token: Tensor) -> tuple[Tensor, Tensor]:
        q: Tensor = self.q_head(first_token)
        q_halt, q_continue = q.to(torch.promote_types(q.dtype, torch.float32)).unbind(-1)
        return q_halt, q_continue if self.config.q_continue else torch.zeros_like(q_halt)


class AdaptiveComputation(nn.Module):
    """Halting around the model: every call is one ACT step; places whose sequence halted take a new one."""

    images: Tensor | None  # [N, T] int64: see `show_images`, with the prefix left in place

    def __init__(self, inner: HierarchicalReasoningModel, seed: int) -> None:
        super().__init__()
        self.inner = inner
        self.training_halt_max_steps = inner.config.halt_max_steps  # a curriculum sets others
        self.register_buffer("images", None, persistent=False)
        self._exploration: torch.Generator | None = None
        self.seed_exploration(seed)

    def seed_exploration(self, seed: int) -> None:
        """Restart the stream of random minimum steps. Ranks must differ in `seed`, or they explore alike."""
        self._seed = seed
        self._exploration = None

    def exploration(self, device: torch.device) -> torch.Generator:
        """The generator of random minimum steps, made on first use on the device in use."""
        if self._exploration is None or self._exploration.device != device:
            self._exploration = torch.Generator(device).manual_seed(self._seed)
        return self._exploration

    def show_images(self, cells: Tensor) -> None:
        """In training, show every sequence as one of its images from now on, another one at each ACT step.

        What the model thinks of a token moves with it. So a puzzle is not the same twice in the many steps that train
        on it, and cannot be learnt by heart.

        Args:
            cells: [N, S] int64, permutations that keep the rules: token i of image n is the puzzle's token cells[n, i].
        """
        prefix = torch.arange(self.inner.prefix_len, device=cells.device).expand(len(cells), -1)
        self.images = torch.cat([prefix, cells + self.inner.prefix_len], 1)

    def initial_carry(self, batch: Batch) -> Carry:
        halted = torch.ones_like(batch["inputs"][:, 0], dtype=torch.bool)
        return Carry(
            self.inner.initial_carry(batch),
            steps=torch.zeros_like(halted, dtype=torch.int32),
            halted=halted,
            current_data={name: torch.zeros_like(field) for name, field in batch.items()},
        )

    def staggered_carry(self, batch: Batch) -> Carry:
        """A carry to begin training with whose sequences, the batch's, halt at different times.

        From `initial_carry` all begin together, and until some halt early, training steps see all at one ACT step, and
        the same ones as many times in a row as there are ACT steps. Here the first of them take fewer steps.
        """
        state, steps, data = self.inner.reset_carry(self.initial_carry(batch), batch)
        taken = torch.arange(len(steps), device=steps.device, dtype=steps.dtype) % self.training_halt_max_steps
        return Carry(state, taken, torch.zeros_like(steps, dtype=torch.bool), data)

    def forward(self, carry: Carry, batch: Batch) -> tuple[Carry, dict[str, Tensor]]:
        state, steps, data = self.inner.reset_carry(carry, batch)
        if self.training and self.images is not None:
            state, data = self._turned(state, data, self.images)
        prepared = self.inner.prepare(data)
        state = self.inner.recur(state, prepared)
        q_halt, q_continue = self.inner.q_values(state)
        outputs = {"logits": self.inner.logits(state), "q_halt_logits": q_halt, "q_continue_logits": q_continue}

        with torch.no_grad():
            state = InnerCarry(state.z_H.detach(), state.z_L.detach())
            max_steps = self._max_steps
            last = steps >= max_steps
            halted = last
            if self.training and max_steps > 1:
                halted = (last | (q_halt > q_continue)) & (steps >= self._min_steps(steps))
            if self.training and max_steps > 1 and self.inner.config.q_continue:
                # Bootstrapped target (paper eq. 9): the value of the better action one step on.
                next_halt, next_continue = self.inner.recur_to_q_values(state, prepared)
                next_value = torch.where(last, next_halt, torch.maximum(next_halt, next_continue))
                outputs["target_q_continue"] = torch.sigmoid(next_value)
        return Carry(state, steps, halted, data), outputs

    def think(self, carry: Carry, batch: Batch, num_steps: int) -> Carry:
        """What as many calls in evaluation do to a carry, if none of its sequences halts before the last of them."""
        state, steps, data = self.inner.reset_carry(carry, batch)
        prepared = self.inner.prepare(data)
        for _ in range(num_steps):
            state = self.inner.recur(state, prepared)
        steps = steps + (num_steps - 1)
        return Carry(state, steps, steps >= self.inner.config.halt_max_steps, data)

    def _turned(self, state: InnerCarry, data: Batch, images: Tensor) -> tuple[InnerCarry, Batch]:
        """Each sequence and its state as a random one of the images."""
        device, prefix_len = images.device, self.inner.prefix_len
        drawn = torch.randint(len(images), (len(state.z_H),), device=device, generator=self.exploration(device))
        tokens = images[drawn]
        cells, places = tokens[:, prefix_len:] - prefix_len, tokens.unsqueeze(-1).expand_as(state.z_H)
        data = data | {name: data[name].gather(1, cells) for name in ("inputs", "labels")}
        return InnerCarry(state.z_H.gather(1, places), state.z_L.gather(1, places)), data

    def _min_steps(self, steps: Tensor) -> Tensor:
        """For exploration: a share of the sequences may not halt before a random step in {2 .. halt_max_steps}."""
        generator = self.exploration(steps.device)
        coin = torch.rand(steps.shape, device=steps.device, generator=generator)
        minimum = torch.randint(2, self._max_steps + 1, steps.shape, device=steps.device, generator=generator)
        return torch.where(coin < self.inner.config.halt_exploration_prob, minimum, 0)

    @property
    def _max_steps(self) -> int:
        return self.training_halt_max_steps if self.training else self.inner.config.halt_max_steps
