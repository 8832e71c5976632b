"""A CPU's cores, each with sequences of its own: through a whole schedule, or a module forward and backward.

PyTorch lets all cores share every single operation, and at its end they wait for the slowest. Where another program
takes one of them for a while, the others spend that time waiting, hundreds of times in a training step. Sequences do
not depend on one another, so here a core takes some of them through everything and then takes the next ones: cores meet
once, and one that is shared with others gets fewer sequences. What passes between operations stays in its cache.

How a batch is divided depends on its shape and on the number of threads alone, so results are the same from run to run.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.kernels.backend import ReasoningModule
from hrm.kernels.context import KernelContext
from hrm.kernels.schedule import Run, Schedule, States

# The widest tensor of a block, for all sequences of a part, with which passes are fastest: one a few times as wide no
# longer stays in the cache, and from 32 MiB on the C library takes fresh pages for every tensor.
WIDEST = 10 << 20
WIDEST_IN_INT8 = 3 << 20  # rounding goes over each tensor several times
# The least work in a part: below, weights are read again for few tokens, and Python takes as long as the operations.
_LEAST_ROWS = 256
_LEAST_PRODUCTS = 4 << 20  # rows * width * width
_PARTS_A_CORE = 2  # so that a core that is shared with other programs can leave some to the others
_MOST_THREADS = 8  # beyond, they would wait for Python's lock


def parts_of(z: Tensor, most: int = WIDEST) -> list[slice]:
    """How to divide the sequences of a state `z` [B, T, D] that lies on the CPU: evenly.

    Args:
        most: bytes that the widest tensor of a part should have.
    """
    batch, tokens, width = z.shape
    widest = 6 * z.numel() * z.element_size()  # gates and ups of all sequences, as published
    parts = math.ceil(widest / most)
    if (threads := _threads()) > 1:
        rows = max(_LEAST_ROWS, math.ceil(_LEAST_PRODUCTS / width**2))
        enough = min(batch * tokens // rows, batch)
        if enough >= threads:
            parts = max(parts, min(enough // threads, _PARTS_A_CORE) * threads)
    return _slices(batch, math.ceil(batch / max(1, min(parts, batch))) or 1)


def run_by_core(run: Run, sequences: int = 0, most: int = WIDEST) -> Run:
    """`run`, so many sequences at a time (0: as `parts_of` says), each core with others."""

    def in_parts(
        states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext
    ) -> dict[str, Tensor]:
        if not schedule:
            return dict(states)
        first = states[schedule[0].state]
        parts = _slices(len(first), sequences) if sequences else parts_of(first, most)
        if len(parts) < 2:
            return run(states, schedule, modules, context)
        new = {update.state: torch.empty_like(states[update.state]) for update in schedule}

        def compute(part: slice) -> None:
            found = run({name: state[part] for name, state in states.items()}, schedule, modules, context)
            for name, whole in new.items():
                whole[part] = found[name]

        _each(compute, parts)
        return {**states, **new}

    return in_parts


def module_by_core(module: ReasoningModule) -> ReasoningModule:
    """`module`, forward and backward, each core with others; weights' gradients are summed in the sequences' order."""

    def in_parts(state: Tensor, injection: Tensor, blocks: Sequence[Any], context: KernelContext) -> Tensor:
        parts = parts_of(state)
        if len(parts) < 2 or _threads() < 2 or not torch.is_grad_enabled():
            return module(state, injection, blocks, context)

        def of_weights(state: Tensor, injection: Tensor, *weights: Tensor) -> Tensor:
            left = iter(weights)
            rebuilt = [type(block)(*itertools.islice(left, len(block))) for block in blocks]
            return module(state, injection, rebuilt, context)

        weights = [weight for block in blocks for weight in block]
        out: Tensor = _ByCore.apply(of_weights, parts, state, injection, *weights)  # type: ignore[no-untyped-call]
        return out

    return in_parts


class _ByCore(torch.autograd.Function):
    """A function of two inputs divided by sequences and of weights."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        parts: list[slice],
        state: Tensor,
        injection: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        ctx.parts, ctx.wanted = parts, wanted
        out = torch.empty_like(state)
        graphs: dict[int, tuple[Tensor, list[Tensor]]] = {}

        @torch.enable_grad()
        def compute(part: slice) -> None:
            inputs = [tensor.detach() for tensor in (state[part], injection[part], *weights)]
            for tensor, with_gradient in zip(inputs, wanted, strict=True):
                tensor.requires_grad_(with_gradient)
            result = function(*inputs)
            out[part] = result.detach()
            leaves = [tensor for tensor, with_gradient in zip(inputs, wanted, strict=True) if with_gradient]
            graphs[part.start] = result, leaves

        _each(compute, parts)
        ctx.graphs = graphs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: dict[int, tuple[Tensor, ...]] = {}

        def compute(part: slice) -> None:
            result, leaves = ctx.graphs.pop(part.start)  # its tensors are freed as parts are done
            found[part.start] = torch.autograd.grad(result, leaves, grad[part])

        _each(compute, ctx.parts)
        by_input = iter(zip(*(found[part.start] for part in ctx.parts), strict=True))
        grads = [next(by_input) if with_gradient else None for with_gradient in ctx.wanted]
        inputs = [None if parts is None else torch.cat(parts) for parts in grads[:2]]
        weights = [None if parts is None else _sum(parts) for parts in grads[2:]]
        return None, None, *inputs, *weights


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, in the first of them."""
    total, *others = tensors
    for other in others:
        total += other
    return total


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _threads() -> int:
    """Those that divide a batch among themselves."""
    threads = torch.get_num_threads()
    return threads if threads <= _MOST_THREADS else 1


class _Helpers:
    """The threads that work beside a caller."""

    def __init__(self) -> None:
        self.one_caller = threading.Lock()  # at a time: PyTorch's number of threads is the process's
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def pool(self, size: int) -> ThreadPoolExecutor:
        """At least so many threads, in each of which an operation runs on one core."""
        if self._pool is None or self._size < size:
            self._pool = ThreadPoolExecutor(size, "hrm-core", torch.set_num_threads, (1,))
            self._size = size
        return self._pool


_helpers = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.__init__)  # type: ignore[misc] # threads do not live on in a child


def _each(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Do `work` for all parts: with one thread in turn, else each thread takes the next one when it is done."""
    threads = _threads()
    if threads < 2:
        for part in parts:
            work(part)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    left = queue.SimpleQueue[slice]()
    for part in parts:
        left.put(part)

    def work_on() -> None:
        # Modes are a thread's own.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), suppress(queue.Empty):
            while True:
                work(left.get_nowait())

    with _helpers.one_caller:
        torch.set_num_threads(1)
        helpers: list[Future[None]] = []
        try:
            pool = _helpers.pool(threads - 1)
            helpers = [pool.submit(work_on) for _ in range(min(threads, len(parts)) - 1)]
            work_on()
        finally:
            with suppress(queue.Empty):  # after an error, helpers end with the parts that they have
                while True:
                    left.get_nowait()
            wait(helpers)
            torch.set_num_threads(threads)
        for helper in helpers:
            helper.result()
