"""Several starts of the latent state, trained by winner-takes-all ("Speed is Confidence", arXiv 2601.19085).

In every ACT step of training all starts of a sequence are advanced without gradient. The one whose tokens have the
lowest loss then takes the differentiable updates again, with gradients, and its state that the heads read is handed to
all starts of the sequence; each keeps its other states. Evaluation has the first start alone, at the cost of a model
without others.

Shapes: B sequences, S input tokens, T tokens with the prefix, D hidden size, K starts (`arch.starts`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.errors import UserError
from hrm.models.act import AdaptiveComputation, Advanced, Carry
from hrm.models.losses import sequence_losses
from hrm.models.recurrent import Prepared, RecurrentModel

_WINNER = "winner"  # among the outputs of an ACT step


class WinnerTakesAll(AdaptiveComputation):
    """Halting around a model with several starts; in evaluation it is its base class."""

    def __init__(self, inner: RecurrentModel, seed: int) -> None:
        """Draw the further starts, as many as the configuration asks for.

        Raises:
            UserError: an ACT step of the model is more than its updates.
        """
        super().__init__(inner, seed)
        self.starts = inner.config.starts
        if not inner.is_its_schedule:
            raise UserError(
                f"arch.starts={self.starts} is for models whose ACT step is the updates of its schedule, which that of "
                f"{inner.config.name} is not: drop it."
            )
        (drawn_by,) = np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(1)  # other numbers than the weights'
        generator = torch.Generator().manual_seed(int(drawn_by))
        for name in inner.hidden_states:
            inner.add_starts(name, aligned_starts(inner.initial_states[name], self.starts - 1, generator))

    @property
    def initial_states(self) -> dict[str, Tensor]:
        """Those of the further starts too, by the names that they have in a carry."""
        found = self.inner.initial_states
        for name, starts in self.inner.hidden_starts.items():
            found |= {_name_of(name, number): start for number, start in enumerate(starts)}
        return found

    def initial_carry(self, batch: Batch) -> Carry:
        """A carry in which every sequence has halted; in training with the states of all starts."""
        carry = super().initial_carry(batch)
        if not self.training:
            return carry
        others = {
            _name_of(name, number): torch.zeros_like(carry.states[name])
            for name in self.inner.hidden_states
            for number in range(1, self.starts)
        }
        return replace(carry, states=carry.states | others)

    def advance(self, states: dict[str, Tensor], prepared: Prepared, data: Batch) -> Advanced:
        """The updates of an ACT step: in training those of the winner, whose number [B] is among the outputs."""
        if not self.training:
            return super().advance(states, prepared, data)
        inner = self.inner
        names = [*inner.initial_states]
        with torch.no_grad():
            each = [self._of_start(states, number) for number in range(self.starts)]
            cut = [inner.begin(start, prepared) for start in each]
            ends = [inner.finish(start, prepared) for start in cut]
            losses = [sequence_losses(inner.logits(end), data["labels"], inner.config.loss) for end in ends]
            winner = torch.stack(losses).argmin(0)
            sequences = torch.arange(len(winner), device=winner.device)
            of_winner = {name: torch.stack([start[name] for start in cut])[winner, sequences] for name in names}
        after = inner.finish(of_winner, prepared)
        with torch.no_grad():
            kept = dict(states)  # in its order
            kept[inner.output_state] = after[inner.output_state]
            for number, end in enumerate(ends):
                won = (winner == number).view(-1, 1, 1)
                kept |= {
                    _name_of(name, number): torch.where(won, after[name], end[name]) for name in inner.hidden_states
                }
        return Advanced(after, kept, {_WINNER: winner})

    def metrics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`start_<k>_share`: the sequences that start k won, k from 0."""
        if _WINNER not in outputs:
            return {}
        winner = outputs[_WINNER]
        return {f"start_{number}_share": (winner == number).sum() for number in range(self.starts)}

    def train_step_flops(self) -> int:
        """As in the base class: an ACT step of each start, and the differentiable updates of the winner."""
        _, schedule, gradient_start, _ = self.inner.training_plan
        flops = self.inner.schedule_flops
        return super().train_step_flops() - flops(schedule[:gradient_start]) + self.starts * flops(schedule)

    def _of_start(self, states: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The model's states, by its names for them, of one of the starts."""
        hidden = {name: states[_name_of(name, number)] for name in self.inner.hidden_states}
        return {self.inner.output_state: states[self.inner.output_state]} | hidden


def aligned_starts(first: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random vectors [count, D] of the length of `first` [D], orthogonal to it and to one another.

    Of all orthogonal vectors they are the nearest to those drawn, by the singular value decomposition. Where `first` is
    zero, their root mean square is 1.
    """
    length = first.double().norm()
    drawn = torch.randn(count, len(first), generator=generator, dtype=torch.float64)
    unit = torch.where(length > 0, first.double() / length, 0.0)
    drawn -= (drawn @ unit)[:, None] * unit
    length = torch.where(length > 0, length, len(first) ** 0.5)
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    starts: Tensor = length * (left @ right)
    return starts.to(first.dtype)


def _name_of(state: str, start: int) -> str:
    """What a carry calls a state of a start: the first start's by its own name."""
    return f"{state}.{start}" if start else state
