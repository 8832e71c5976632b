"""A line of the table: what is timed, beside what, and the bar it has to meet."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

# A backward is timed many times over one forward; with this, torch.compile would free what it saved after the first.
torch._functorch.config.donated_buffer = False

Call = Callable[[], object]
Function = Callable[..., Any]


class Work(NamedTuple):
    """What a row times, made on a device just before. A rival that cannot be made is reported, and does not count."""

    ours: Call
    rivals: Mapping[str, Callable[[], Call]]


@dataclass(frozen=True)
class Bar:
    """What a row has to reach; unset parts count as reached."""

    of_copy: float | None = None  # this share of the rate of a device copy of as many bytes
    times_rival: float | None = None  # as fast as the fastest of `rivals` times this
    rivals: Sequence[str] = ()  # names of those that the bar speaks of; none: all

    def __str__(self) -> str:
        parts = [] if self.of_copy is None else [f"{self.of_copy:.0%} of copy"]
        if self.times_rival is not None:
            parts.append(f"{self.times_rival:g}x {' or '.join(self.rivals) or 'the fastest rival'}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One operation in one direction at one size."""

    shape: str  # as the table shows it, with the dtype where it is not bfloat16
    direction: str  # forward, backward, step
    work: Callable[[torch.device], Work]
    bar: Bar
    bytes: int = 0  # that must pass: inputs and results once each
    flops: int = 0
    from_python: bool = False  # timed as it is called from Python, the host's part with it; else from a graph


HRM_STATES = (384 * 82, 512)
"""Rows and columns of the states of the HRM on Sudoku: 384 sequences of 81 tokens and a puzzle token."""

BEYOND_CACHE = (2**15, 2**13)
"""Half a GiB in bfloat16."""


def compiled(function: Function) -> Callable[[], Function]:
    """A rival: `function` through torch.compile, in one graph for these shapes."""

    def make() -> Function:
        torch.compiler.reset()
        # On a CPU only the script is tried out: making C++ of every row takes minutes.
        backend = "inductor" if torch.cuda.is_available() else "aot_eager"
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    return make


def imported(module: str, name: str) -> Callable[[], Function]:
    """A rival: a function of a package that may not be installed."""

    def load() -> Function:
        function: Function = getattr(importlib.import_module(module), name)
        return function

    return load


def plain(function: Function) -> Callable[[], Function]:
    """A rival as it is."""
    return lambda: function


def random(device: torch.device, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers times `scale`, the same in every run on a device; differentiable."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    numbers = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
    return numbers.mul_(scale).requires_grad_()


def forward(
    shape: str,
    inputs: Callable[[torch.device], Sequence[Any]],
    function: Function,
    rivals: Mapping[str, Callable[[], Function]],
    bar: Bar,
    bytes: int = 0,
    flops: int = 0,
) -> Row:
    """The row of a function without its gradient.

    Args:
        shape, bar, bytes, flops: as `Row` has them.
        inputs: the function's arguments, made on a device.
        function: ours.
        rivals: functions of the same arguments, each behind a call that makes it (`compiled`, `imported`, `plain`).
    """

    def work(device: torch.device) -> Work:
        arguments = inputs(device)

        def call_of(function: Function) -> Call:
            def call() -> object:
                with torch.no_grad():
                    return function(*arguments)

            return call

        return Work(call_of(function), {name: _then(make, call_of) for name, make in rivals.items()})

    return Row(shape, "forward", work, bar, bytes, flops)


def backward(
    shape: str,
    inputs: Callable[[torch.device], Sequence[Any]],
    function: Function,
    rivals: Mapping[str, Callable[[], Function]],
    bar: Bar,
    bytes: int = 0,
    flops: int = 0,
) -> Row:
    """As `forward`, for the gradient alone, taken in the tensors of `inputs` that require one."""

    def work(device: torch.device) -> Work:
        arguments = inputs(device)
        leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]

        def call_of(function: Function) -> Call:
            out = function(*arguments)
            grad = random(device, *out.shape, dtype=out.dtype).detach()
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return Work(call_of(function), {name: _then(make, call_of) for name, make in rivals.items()})

    return Row(shape, "backward", work, bar, bytes, flops)


def _then(make: Callable[[], Function], call_of: Callable[[Function], Call]) -> Callable[[], Call]:
    return lambda: call_of(make())
