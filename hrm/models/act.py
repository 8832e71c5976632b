"""Adaptive computation time around any architecture (paper section 2; spec section 2): every call is one ACT step.

Shapes: B sequences, S input tokens, P puzzle prefix tokens, T = P + S, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from hrm.batch import Batch
from hrm.config.checks import at_least, fraction, neighbours, sane_counts
from hrm.config.typed import to_typed
from hrm.errors import UserError
from hrm.models.losses import LossConfig

if TYPE_CHECKING:
    from hrm.models.recurrent import Prepared, RecurrentModel


@dataclass
class ACTConfig:
    """Options of halting, which all architectures have."""

    # What a curriculum may change in training; subclasses add theirs.
    CHANGES_IN_TRAINING: ClassVar[frozenset[str]] = frozenset({"halt_max_steps", "halt_exploration_prob"})

    name: str = MISSING  # which architecture it is
    loss: LossConfig = field(default_factory=LossConfig)
    halt_exploration_prob: float = 0.1  # share of sequences that may not halt before a random step, in training
    halt_max_steps: int = 16  # ACT steps after which every sequence halts
    train_max_steps: int | None = None  # the same in training alone; null: halt_max_steps
    # Learn q_continue too, from a recurrence more in each step. False: sequences halt where q_halt > 0, and a training
    # step is about 1.5 times as fast.
    q_continue: bool = True

    def __post_init__(self) -> None:
        sane_counts("arch.", self)
        fraction("arch.halt_exploration_prob", self.halt_exploration_prob)
        at_least("arch.halt_max_steps", self.halt_max_steps, 1)
        if self.train_max_steps is not None:
            at_least("arch.train_max_steps", self.train_max_steps, 1)

    @property
    def max_steps_in_training(self) -> int:
        return self.halt_max_steps if self.train_max_steps is None else self.train_max_steps

    def in_stage(self, fields: Mapping[str, Any]) -> Self:
        """The architecture in a stage of the curriculum that gives `fields` other values; halt_max_steps is training's.

        Raises:
            UserError: a field may not change in training, or a value is impossible.
        """
        for name in fields:
            if name not in self.CHANGES_IN_TRAINING:
                raise UserError(f"{name} cannot change in training; {neighbours(name, self.CHANGES_IN_TRAINING)}")
        given = dict(fields)
        if (most := given.pop("halt_max_steps", None)) is not None:
            given["train_max_steps"] = most
        return to_typed(type(self), asdict(self) | given, "arch")


@dataclass(frozen=True)
class Carry:
    """All that one ACT step hands to the next."""

    states: dict[str, Tensor]  # of the recurrence, by name, each [B, T, D]
    steps: Tensor  # [B] int32: ACT steps spent on the sequence
    halted: Tensor  # [B] bool: the next step begins another sequence here
    current_data: Batch

    def named_tensors(self) -> dict[str, Tensor]:
        """All of it by name, in a fixed order."""
        data = {f"data.{name}": self.current_data[name] for name in sorted(self.current_data)}
        return {**self.states, "steps": self.steps, "halted": self.halted, **data}

    def tensors(self) -> list[Tensor]:
        """All of it, in the order of `named_tensors`."""
        return list(self.named_tensors().values())

    def rows(self, rows: slice | Tensor) -> Carry:
        """Some sequences' part, as views; as copies for a tensor of their indices."""
        return Carry(
            {name: state[rows] for name, state in self.states.items()},
            self.steps[rows],
            self.halted[rows],
            {name: field[rows] for name, field in self.current_data.items()},
        )

    @classmethod
    def joined(cls, parts: Sequence[Carry]) -> Carry:
        """One carry of several parts' sequences."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return Carry(
            {name: torch.cat([part.states[name] for part in parts]) for name in first.states},
            torch.cat([part.steps for part in parts]),
            torch.cat([part.halted for part in parts]),
            {name: torch.cat([part.current_data[name] for part in parts]) for name in first.current_data},
        )


class Advanced(NamedTuple):
    """What the updates of an ACT step lead to."""

    states: dict[str, Tensor]  # of the model, by its names
    kept: dict[str, Tensor]  # what the carry has of them
    outputs: dict[str, Tensor]  # beside those of the heads


class AdaptiveComputation(nn.Module):
    """Halting around a model: every call is one ACT step; a sequence that halted makes room for another one."""

    augmentations: Tensor | None  # [N, T] int64: see `set_augmentations`, with the prefix left where it is
    entry_cells: Tensor | None  # [N, S] int64: see `set_entry_symmetries`
    entry_tokens: Tensor | None  # [N, V] int64

    def __init__(self, inner: RecurrentModel, seed: int) -> None:
        super().__init__()
        self.inner = inner
        for name in ("augmentations", "entry_cells", "entry_tokens"):
            self.register_buffer(name, None, persistent=False)
        self._exploration: torch.Generator | None = None
        self.seed_exploration(seed)

    def seed_exploration(self, seed: int) -> None:
        """Begin anew the stream of random minimum steps. Ranks must differ in `seed`, or they explore alike."""
        self._seed = seed
        self._exploration = None

    def exploration(self, device: torch.device) -> torch.Generator:
        """The generator of random minimum steps, made on first use on the device in use."""
        if self._exploration is None or self._exploration.device != device:
            self._exploration = torch.Generator(device).manual_seed(self._seed)
        return self._exploration

    def set_augmentations(self, cells: Tensor) -> None:
        """In training, show each sequence as one of its augmentations from now on, another one at each ACT step.

        The states of its tokens are permuted with it. So a puzzle is not the same twice in the many steps that train on
        it, and cannot be learnt by heart.

        Args:
            cells: [N, S] int64, permutations that keep the task's rules: token i of augmentation n is the puzzle's
                token cells[n, i].
        """
        prefix = torch.arange(self.inner.prefix_len, device=cells.device).expand(len(cells), -1)
        self.augmentations = torch.cat([prefix, cells + self.inner.prefix_len], 1)

    def set_entry_symmetries(self, cells: Tensor, tokens: Tensor) -> None:
        """In training, show each sequence that begins as a random symmetry of it from now on, until it halts.

        Args:
            cells: [N, S] int64, permutations of the cells, and
            tokens: [N, V] int64, of the tokens: symmetric[i] = tokens[n, puzzle[cells[n, i]]] keeps the task's rules.
                One after another is applied twice, so there are up to N squared.
        """
        self.entry_cells, self.entry_tokens = cells, tokens

    @property
    def initial_states(self) -> dict[str, Tensor]:
        """The vector [D] that each state of a carry begins with at every token."""
        return self.inner.initial_states

    def initial_carry(self, batch: Batch) -> Carry:
        """A carry in which every sequence has halted, so that the first call takes `batch`."""
        halted = torch.ones_like(batch["inputs"][:, 0], dtype=torch.bool)
        return Carry(
            self.inner.empty_states(batch),
            steps=torch.zeros_like(halted, dtype=torch.int32),
            halted=halted,
            current_data={name: torch.zeros_like(field) for name, field in batch.items()},
        )

    def staggered_carry(self, batch: Batch) -> Carry:
        """A carry to begin training with whose sequences, the batch's, halt at different times.

        From `initial_carry` all begin together, and until some halt early, training steps see all at one ACT step, and
        the same ones as many times in a row as there are ACT steps. Here the first of them take fewer steps.
        """
        states, steps, data = self.reset_carry(self.initial_carry(batch), batch)
        taken = torch.arange(len(steps), device=steps.device, dtype=steps.dtype) % self.inner.training_plan.max_steps
        return Carry(states, taken, torch.zeros_like(steps, dtype=torch.bool), data)

    def reset_carry(self, carry: Carry, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Batch]:
        """Give sequences that halted the initial states and the batch's data, and count the step."""
        initial, fresh = self.initial_states, self._entering(batch)
        return self.inner.kernels.reset_carry(
            carry.states, initial, carry.halted, carry.steps, carry.current_data, fresh
        )

    def forward(self, carry: Carry, batch: Batch) -> tuple[Carry, dict[str, Tensor]]:
        """One ACT step: the new carry, detached, and `logits` [B, S, V], `q_halt_logits`, `q_continue_logits` and in
        training with q_continue `target_q_continue`, each [B].
        """
        states, steps, data = self.reset_carry(carry, batch)
        if self.training and self.augmentations is not None:
            states, data = self._augmented(states, data, self.augmentations)
        prepared = self.inner.prepare(data)
        states, kept, outputs = self.advance(states, prepared, data)
        q_halt, q_continue = self.inner.q_values(states)
        outputs |= {"logits": self.inner.logits(states), "q_halt_logits": q_halt, "q_continue_logits": q_continue}

        with torch.no_grad():
            kept = {name: state.detach() for name, state in kept.items()}
            config, _, _, max_steps = self.inner.plan
            last = steps >= max_steps
            halted = last
            if self.training and max_steps > 1:
                halted = (last | (q_halt > q_continue)) & (steps >= self._min_steps(steps))
            if self.training and max_steps > 1 and config.q_continue:
                # Bootstrapped target (paper eq. 9): the value of the better action one step on.
                next_halt, next_continue = self.inner.recur_to_q_values(states, prepared)
                next_value = torch.where(last, next_halt, torch.maximum(next_halt, next_continue))
                outputs["target_q_continue"] = torch.sigmoid(next_value)
        return Carry(kept, steps, halted, data), outputs

    def advance(self, states: dict[str, Tensor], prepared: Prepared, data: Batch) -> Advanced:
        """The updates of an ACT step."""
        after = self.inner.recur(states, prepared)
        return Advanced(after, after, {})

    def metrics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the batch, 0-dimensional, of what `advance` put into the outputs of an ACT step."""
        return {}

    def train_step_flops(self) -> int:
        """See `hrm.models.recurrent.RecurrentModel.train_step_flops`."""
        return self.inner.train_step_flops()

    def think(self, carry: Carry, batch: Batch, num_steps: int) -> Carry:
        """What as many calls in evaluation do to a carry, if none of its sequences halts before the last of them."""
        states, steps, data = self.reset_carry(carry, batch)
        prepared = self.inner.prepare(data)
        for _ in range(num_steps):
            states = self.inner.recur(states, prepared)
        steps = steps + (num_steps - 1)
        return Carry(states, steps, steps >= self.inner.plan.max_steps, data)

    def _entering(self, batch: Batch) -> Batch:
        """The batch, in training each sequence as a random symmetry of it if there are any."""
        if not self.training or self.entry_cells is None or self.entry_tokens is None:
            return batch
        for _ in range(2):
            device, rows = self.entry_cells.device, (len(batch["inputs"]),)
            drawn = torch.randint(len(self.entry_cells), rows, device=device, generator=self.exploration(device))
            cells, tokens = self.entry_cells[drawn], self.entry_tokens[drawn]
            new = {}
            for name in ("inputs", "labels"):
                moved = batch[name].gather(1, cells)
                mapped = tokens.gather(1, moved.clamp_min(0).long()).to(moved.dtype)
                new[name] = torch.where(moved < 0, moved, mapped)  # labels may be IGNORE_LABEL_ID
            batch = batch | new
        return batch

    def _augmented(self, states: dict[str, Tensor], data: Batch, tables: Tensor) -> tuple[dict[str, Tensor], Batch]:
        """Each sequence and its states as a random one of the augmentations."""
        prefix_len = self.inner.prefix_len
        drawn = torch.randint(
            len(tables), (len(data["inputs"]),), device=tables.device, generator=self.exploration(tables.device)
        )
        tokens = tables[drawn]
        cells = tokens[:, prefix_len:] - prefix_len
        data = data | {name: data[name].gather(1, cells) for name in ("inputs", "labels")}
        moved = {name: state.gather(1, tokens.unsqueeze(-1).expand_as(state)) for name, state in states.items()}
        return moved, data

    def _min_steps(self, steps: Tensor) -> Tensor:
        """For exploration: a share of the sequences may not halt before a random step in {2 .. max_steps}."""
        config, _, _, max_steps = self.inner.plan
        generator = self.exploration(steps.device)
        coin = torch.rand(steps.shape, device=steps.device, generator=generator)
        minimum = torch.randint(2, max_steps + 1, steps.shape, device=steps.device, generator=generator)
        return torch.where(coin < config.halt_exploration_prob, minimum, 0)
