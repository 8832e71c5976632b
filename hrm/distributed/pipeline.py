"""Reasoning modules whose blocks several processes hold in stages, over any backend.

A stage holds an equal part of the consecutive blocks of every module. All that is computed outside of the blocks is
the same on every process, so the states are handed round in full at the end of each call, and gradients likewise.

Within a call the batch goes through the ring of stages in micro-batches, and at once into the next update, whose
first stage needs nothing but the micro-batch's own state: with S stages, M >= S micro-batches and U updates in a row,
a stage works for U M of U M + S - 1 slots. So the idle share (the bubble) is (S - 1) / (U M + S - 1). At S = 2, M = 4
and 2 cycles of 2 it is 6 % in the four updates without gradient of a training step, 5 % in the five of its target, and
20 %, forward as well as backward, in the two differentiable ones, which are calls of one update each. Neither the
exchange nor the handing round overlaps computing.

`torch.distributed.pipelining` cannot express this: its schedules own the loss and the whole forward and backward of a
chain of stages that each micro-batch passes once, where a recurrence sends it round the same stages again and again,
mostly without gradient, in the middle of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, setitem
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.distributed.world import Axis
from hrm.kernels import FirstTokenBlock, ReasoningModule
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights
from hrm.kernels.schedule import Schedule, States


@dataclass(frozen=True)
class Pipeline:
    """Gives `hrm.kernels.Kernels` its functions. Blocks of other stages are in the lists of blocks, but not looked at.

    Attributes:
        inner: what computes this stage's blocks, and a first token.
        num_blocks: of each module in the whole model, multiples of the stages.
        micro_batches: at least the stages.
    """

    axis: Axis
    inner: ReasoningModule
    inner_first_token: FirstTokenBlock
    num_blocks: dict[str, int]
    micro_batches: int

    def reasoning_module(
        self,
        state: Tensor,
        injection: Tensor,
        blocks: Sequence[BlockWeights],
        context: KernelContext,
    ) -> Tensor:
        """See `hrm.kernels.naive.reasoning_module`. `blocks` are a whole module's."""
        own = self._own(blocks, len(blocks))

        def compute(x: Tensor, blocks: Sequence[BlockWeights]) -> Tensor:
            return self.inner(x, torch.zeros_like(x), blocks, context)

        weights = [weight for block in own for weight in block]
        result: Tensor = _Staged.apply(self, compute, state + injection, *weights)  # type: ignore[no-untyped-call]
        return result

    def first_token_block(self, x: Tensor, weights: BlockWeights, context: KernelContext) -> Tensor:
        """See `hrm.kernels.naive.first_token_block`, for the last block of a module."""
        last = self.axis.size - 1
        if self.axis.rank == last:
            first = self.inner_first_token(x, weights, context).contiguous()
        else:
            first = torch.empty_like(x[:, 0], memory_format=torch.contiguous_format)
        dist.broadcast(first, group=self.axis.group, group_src=last)
        return first

    def run(
        self, states: States, schedule: Schedule, modules: Mapping[str, Sequence[BlockWeights]], context: KernelContext
    ) -> dict[str, Tensor]:
        """See `hrm.kernels.schedule.Run`; the last blocks of a module may be left out."""
        if not schedule:
            return dict(states)
        parts = {name: list(self._cut(state)) for name, state in states.items()}
        own = {name: self._own(blocks, self.num_blocks[name]) for name, blocks in modules.items()}

        def enter(number: int, part: int) -> Tensor:
            update = schedule[number]
            return parts[update.state][part] + reduce(add, [parts[name][part] for name in update.inputs])

        def stage(number: int, part: int, x: Tensor) -> Tensor:
            blocks = own[schedule[number].module]
            return self.inner(x, torch.zeros_like(x), blocks, context) if blocks else x

        def leave(number: int, part: int, x: Tensor) -> None:
            parts[schedule[number].state][part] = x

        self._circulate(parts[schedule[0].state], len(schedule), enter, stage, leave)
        replaced = dict.fromkeys(update.state for update in schedule)
        return {**states, **{name: self._hand_round(parts[name], 0) for name in replaced}}

    def _own(self, blocks: Sequence[BlockWeights], num_blocks: int) -> Sequence[BlockWeights]:
        each = num_blocks // self.axis.size
        return blocks[self.axis.rank * each : (self.axis.rank + 1) * each]

    def _cut(self, x: Tensor) -> Sequence[Tensor]:
        return x.tensor_split(self.micro_batches)

    def _hand_round(self, parts: Sequence[Tensor], source: int) -> Tensor:
        """All parts together, those of the stage `source`, on every stage."""
        whole = torch.cat(tuple(parts))
        dist.broadcast(whole, group=self.axis.group, group_src=source)
        return whole

    def _circulate(
        self,
        like: Sequence[Tensor],
        rounds: int,
        enter: Callable[[int, int], Tensor],
        stage: Callable[[int, int, Tensor], Tensor],
        leave: Callable[[int, int, Tensor], None],
        *,
        backward: bool = False,
    ) -> None:
        """Send every micro-batch round the ring of stages `rounds` times.

        In slot t, the stage at place s of the ring works on number t - s of the list of all (round, micro-batch); after
        each slot all stages exchange at once, so that no order of sends and receives can block.

        Args:
            like: a tensor per micro-batch, of the shape and dtype that travels.
            enter: the first stage's input of (round, micro-batch).
            stage: this stage's result of (round, micro-batch, input).
            leave: takes (round, micro-batch, what came out of the last stage), on the first stage.
            backward: go round the other way, from the last stage to the first.
        """
        size, parts = self.axis.size, len(like)
        direction = -1 if backward else 1
        place = size - 1 - self.axis.rank if backward else self.axis.rank
        following, previous = (self.axis.rank + direction) % size, (self.axis.rank - direction) % size
        work = range(rounds * parts)
        arrived: Tensor | None = None
        for slot in range(len(work) + size - 1):
            transfers = []
            if (number := slot - place) in work:
                turn = divmod(number, parts)
                x = enter(*turn) if place == 0 else arrived
                assert x is not None
                sent = stage(*turn, x).contiguous()
                transfers.append(dist.P2POp(dist.isend, sent, group=self.axis.group, group_peer=following))
            if (coming := slot - (place - 1) % size) in work:
                arrived = torch.empty_like(like[coming % parts], memory_format=torch.contiguous_format)
                transfers.append(dist.P2POp(dist.irecv, arrived, group=self.axis.group, group_peer=previous))
            for transfer in dist.batch_isend_irecv(transfers) if transfers else []:
                transfer.wait()
            if place == 0 and coming in work:
                assert arrived is not None
                leave(*divmod(coming, parts), arrived)


class _Staged(torch.autograd.Function):
    """One update through all stages, and its gradient the same way back.

    Takes the whole batch and this stage's weights; gives the whole batch on every stage, and wants its gradient there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pipeline: Pipeline,
        compute: Callable[[Tensor, Sequence[BlockWeights]], Tensor],
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
        width = len(BlockWeights._fields)
        blocks = [BlockWeights(*leaves[i : i + width]) for i in range(0, len(leaves), width)]
        entered = pipeline._cut(x)
        tapes: list[tuple[Tensor, Tensor]] = []  # of each micro-batch: this stage's input and output
        left = list(entered)

        def stage(round: int, part: int, x: Tensor) -> Tensor:
            with torch.enable_grad():
                start = x.detach().requires_grad_()
                tapes.append((start, compute(start, blocks)))
            return tapes[-1][1].detach()

        pipeline._circulate(entered, 1, lambda _, part: entered[part], stage, lambda _, part, x: setitem(left, part, x))
        ctx.pipeline, ctx.leaves, ctx.tapes = pipeline, leaves, tapes
        return pipeline._hand_round(left, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pipeline: Pipeline = ctx.pipeline
        entered = pipeline._cut(grad)
        left = list(entered)
        wide = torch.promote_types(grad.dtype, torch.float32)  # to round once, as the undivided batch does
        sums = [torch.zeros_like(leaf, dtype=wide) for leaf in ctx.leaves]

        def stage(round: int, part: int, grad: Tensor) -> Tensor:
            start, end = ctx.tapes[part]
            grad, *grads = torch.autograd.grad(end, [start, *ctx.leaves], grad)
            torch._foreach_add_(sums, grads)
            return grad

        pipeline._circulate(
            entered, 1, lambda _, part: entered[part], stage, lambda _, part, x: setitem(left, part, x), backward=True
        )
        grads = [total.to(leaf.dtype) for total, leaf in zip(sums, ctx.leaves, strict=True)]
        return None, None, pipeline._hand_round(left, pipeline.axis.size - 1), *grads
