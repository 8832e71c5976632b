"""Schedules: the updates of one ACT step in order, as an architecture lists them, and how they are run.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from hrm.kernels.context import KernelContext

Block = TypeVar("Block", contravariant=True)


class Update(NamedTuple):
    """`states[state] = module(states[state], sum of the inputs, blocks[module], context)`."""

    state: str  # the state that is replaced
    inputs: tuple[str, ...]  # what is summed, in this order, and added to it before: other states, or constants
    module: str  # whose blocks are applied


Schedule: TypeAlias = Sequence[Update]
States: TypeAlias = Mapping[str, Tensor]  # by name, each [B, T, D]; constants of the ACT step are among them


class Module(Protocol[Block]):
    """See `hrm.kernels.naive.reasoning_module`; `Block` is what holds the weights of a block."""

    def __call__(self, state: Tensor, injection: Tensor, blocks: Sequence[Block], context: KernelContext) -> Tensor: ...


class Run(Protocol):
    """Apply a schedule to the states, and return them all by their names; the arguments are left as they are.

    `modules` holds the blocks of each module by its name: what `hrm.kernels.Kernels.prepare` made of them, or, where
    gradients are wanted of `looped`, the blocks themselves.
    """

    def __call__(
        self, states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext
    ) -> dict[str, Tensor]: ...


class Summed:
    """States by name, and the sums of them that updates take, each kept until one of its terms is replaced."""

    def __init__(self, states: States) -> None:
        self.states = dict(states)
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def sum(self, names: tuple[str, ...]) -> Tensor:
        """The sum of these states, in this order."""
        if names not in self._sums:
            self._sums[names] = reduce(add, [self.states[name] for name in names])
        return self._sums[names]

    def replace(self, name: str, state: Tensor) -> None:
        """Let `state` be what the name stands for from now on."""
        self.states[name] = state
        self._sums = {names: total for names, total in self._sums.items() if name not in names}

    def keep_sum(self, names: tuple[str, ...], total: Tensor) -> None:
        """Note the sum of these states, which was computed elsewhere."""
        self._sums[names] = total


def looped(module: Module[Any], others: Mapping[str, Module[Any]] | None = None) -> Run:
    """One call of `module` for every update, or of `others[update.module]` where that has one."""

    def run(
        states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext
    ) -> dict[str, Tensor]:
        new = Summed(states)
        for state, inputs, name in schedule:
            compute = (others or {}).get(name, module)
            new.replace(state, compute(new.states[state], new.sum(inputs), modules[name], context))
        return new.states

    return run


def chunked(run: Run, sequences: int) -> Run:
    """The whole schedule for so many sequences, then for the next: what passes between kernels may stay in a cache."""

    def in_chunks(
        states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext
    ) -> dict[str, Tensor]:
        if not schedule:
            return dict(states)
        first = states[schedule[0].state]
        if sequences >= len(first):
            return run(states, schedule, modules, context)
        new = {update.state: torch.empty_like(states[update.state]) for update in schedule}
        for start in range(0, len(first), sequences):
            part = slice(start, start + sequences)
            chunk = run({name: state[part] for name, state in states.items()}, schedule, modules, context)
            for name, whole in new.items():
                whole[part] = chunk[name]
        return {**states, **new}

    return in_chunks
