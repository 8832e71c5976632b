"""What a backend says of itself, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights
from hrm.kernels.schedule import Module, Run

ReasoningModule: TypeAlias = Module[Any]


class FirstTokenBlock(Protocol):
    """See `hrm.kernels.naive.first_token_block`."""

    def __call__(self, x: Tensor, weights: Any, context: KernelContext) -> Tensor: ...


class KernelRequest(NamedTuple):
    """What is to be computed, and on what device."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    head_size: int
    rotary: bool = True
    positions_in_row: bool = True  # whether RoPE counts tokens 0, 1, 2, ...; False: its angles may be any
    num_tokens: int = 82  # of a sequence, the puzzle prefix included
    batch_size: int = 384  # sequences on this rank
    width: int = 512  # hidden size
    block_types: Sequence[type] = (BlockWeights,)  # of the blocks' weights
    modules: tuple[str, ...] = ()  # names of the modules that hold the blocks

    @property
    def has_attention(self) -> bool:
        """Whether some of the blocks attend."""
        return any("qkv" in getattr(block, "_fields", ()) for block in self.block_types)


def runs_anywhere(request: KernelRequest) -> str | None:
    """The reason why a backend of plain PyTorch cannot run: there is none."""
    return None


def never_the_default(request: KernelRequest) -> Mapping[str, Any] | None:
    """The switches of a backend that `auto` does not take."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute reasoning modules. Its file in `backends/` or `experimental/` calls it `BACKEND`."""

    reasoning_module: (
        ReasoningModule  # as that of `naive`, differentiable; with `takes_attention`, has argument `attend`
    )
    first_token_block: FirstTokenBlock  # as that of `naive`; gradients are not asked for
    run: Run | None = None  # whole schedules without gradient at once; None: `reasoning_module` for each update
    block_types: Sequence[type] = (BlockWeights,)  # of weights that it computes
    why_not: Callable[[KernelRequest], str | None] = runs_anywhere  # the reason why it cannot run, or None
    # Where it is the fastest that was measured: the switches of `KernelsConfig` it then has, or None elsewhere. `auto`
    # takes the first that answers, by falling priority; the definition, with 0, always does.
    default: Callable[[KernelRequest], Mapping[str, Any] | None] = never_the_default
    priority: int = 1
    # Whether kernels.compile is for the definition, which then gives gradients beside `run`; and whether what 8 bit has
    # no kernels for is compiled where steps are recorded.
    compiles_definition: bool = False
    takes_attention: bool = False  # whether kernels.attention chooses the core of its attention
    compiles: bool = True  # whether torch.compile can take it into a graph
    eight_bit: bool = True  # whether kernels.fp8 and kernels.int8 can take schedules without gradient from it
    tensor_parallel: bool = False  # whether parallel.tensor can divide its blocks over processes
    by_core: bool = False  # whether, on a CPU, each core can take other sequences through it (`hrm.kernels.cores`)

    def reason_against(self, request: KernelRequest) -> str | None:
        """Why it cannot compute what is asked for, as the end of a sentence, or None."""
        unknown = [block.__name__ for block in request.block_types if block not in self.block_types]
        if unknown:
            known = " and ".join(block.__name__ for block in self.block_types)
            return f"it has kernels for {known}, not for blocks of {' and '.join(unknown)}"
        return self.why_not(request)
