"""The neural memory of Titans (Behrouz et al. 2025, arXiv 2501.00663): an MLP that learns while it is used.

Writing tokens to a memory is a step of gradient descent, with momentum and forgetting, on how badly the MLP maps their
keys to their values (section 3.1); reading is a pass of queries through it. Projections, gates and the weights that a
memory begins with are ordinary parameters, trained through the writing.

Shapes: B memories, N tokens, D width, H hidden width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.config.checks import at_least
from hrm.errors import UserError
from hrm.kernels.ops import MemoryWeights, memory_mlp_backward_update_, memory_mlp_forward_loss
from hrm.kernels.ops.memory_mlp import naive_updated
from hrm.models.layers import Linear, in_dtype, truncated_normal

_CONVOLVED = 4  # tokens that a projection mixes: the one it is of and three before it
# Sigmoids of these are what gates begin with: a memory forgets a hundredth, keeps half of its momentum, and steps as
# far as theta_max / 2.
_FIRST_ALPHA, _FIRST_ETA, _FIRST_THETA = -4.6, 0.0, 0.0


class MemoryState(NamedTuple):
    """What memories have learnt: the weights of their MLPs, and the momentum of these. Each [B, ...], float32."""

    weights: MemoryWeights
    momentum: MemoryWeights

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.momentum]

    def copied(self) -> MemoryState:
        """The same in memory of its own, as writing in place asks."""
        groups = [[tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in group] for group in self]
        return MemoryState(*(MemoryWeights(*group) for group in groups))


class Projection(nn.Module):
    """Linear, a depthwise convolution over the tokens before, and SiLU (section 4.4)."""

    def __init__(self, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = Linear(truncated_normal((dim, dim), dim**-0.5, generator))
        self.taps = nn.Parameter(truncated_normal((_CONVOLVED, dim), _CONVOLVED**-0.5, generator))

    def forward(self, x: Tensor) -> Tensor:
        """[..., N, D] of tokens [..., N, D]; the first see zeros before them."""
        projected = self.linear(x)
        (taps,) = in_dtype([self.taps], x.dtype)
        mixed = projected * taps[0]
        for back in range(1, min(_CONVOLVED, x.shape[-2])):
            mixed = mixed + F.pad(projected[..., :-back, :], (0, 0, back, 0)) * taps[back]
        return F.silu(mixed)


class NeuralMemory(nn.Module):
    """Memories that read and write tokens; each of a batch learns for itself.

    `update` and `retrieve` are for use: they change and read the memories that the module holds, which are in its
    `state_dict()`. `fresh`, `write` and `read` are the same for states that the caller holds; gradients flow through
    them to what was written, to projections, to gates and to the first weights, as Titans trains them.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        memories: int = 1,
        theta_max: float = 0.1,
        max_grad_norm: float | None = 100.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            dim: D, of tokens.
            hidden: H, hidden width of the MLP.
            memories: B, how many the module holds; 0: none, where the caller holds them all.
            theta_max: the largest step size; theta is a share of it. Steps are on the squared error summed over the
                features and over the tokens that are written at once.
            max_grad_norm: gradients of a memory are scaled down to this norm; None: never.
            generator: of the first weights; None: seed 0.

        Raises:
            UserError: a size is too small.
        """
        super().__init__()
        for name, size, least in (("dim", dim, 1), ("hidden", hidden, 1), ("memories", memories, 0)):
            at_least(name, size, least)
        generator = generator or torch.Generator().manual_seed(0)
        self.dim, self.hidden, self.theta_max, self.max_grad_norm = dim, hidden, theta_max, max_grad_norm
        self.key, self.value, self.query = (Projection(dim, generator) for _ in range(3))
        first_gates = torch.tensor([_FIRST_ALPHA, _FIRST_ETA, _FIRST_THETA])
        self.gates = Linear(truncated_normal((3, dim), 0.1 * dim**-0.5, generator), first_gates)
        # Keys have length 1: so that z1 has standard deviation 1, w1 has it too.
        self.first = nn.ParameterDict(
            {
                "w1": truncated_normal((hidden, dim), 1.0, generator),
                "b1": torch.zeros(hidden),
                "w2": truncated_normal((dim, hidden), hidden**-0.5, generator),
                "b2": torch.zeros(dim),
            }
        )
        self.memories = memories
        if memories:
            for kind, group in self.fresh(memories).copied()._asdict().items():
                for name, tensor in group._asdict().items():
                    self.register_buffer(f"{kind}_{name}", tensor)

    # ---- the memories that the module holds

    @property
    def state(self) -> MemoryState:
        """The memories held, as they are now: not copies.

        Raises:
            UserError: none are.
        """
        if not self.memories:
            raise UserError("this NeuralMemory holds no memories: build it with memories=1 or more.")
        groups = [
            MemoryWeights(*(self.get_buffer(f"{kind}_{name}") for name in MemoryWeights._fields))
            for kind in MemoryState._fields
        ]
        return MemoryState(*groups)

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """Write tokens `x` [B, N, D], of any floating-point dtype, to the memories held. Nothing waits for the device.

        Returns:
            The loss [B] before the step, mean over tokens and features. Where it, the gradients or the gates are not
            finite, the memory stays bit for bit as it was.
        """
        return self.write_(self.state, x)

    @torch.no_grad()
    def retrieve(self, x: Tensor) -> Tensor:
        """What the memories held say [B, N, D] to the queries of tokens `x` [B, N, D]."""
        return self.read(self.state, x)

    @torch.no_grad()
    def reset(self, which: Tensor | None = None) -> None:
        """Let memories begin anew: all, or those that are true in `which` [B]."""
        state = self.state
        for held, first in zip(state.tensors(), self.fresh(self.memories).tensors(), strict=True):
            if which is None:
                held.copy_(first)
            else:
                held.copy_(torch.where(which.view(-1, *[1] * (held.ndim - 1)), first, held))

    # ---- memories that the caller holds

    def fresh(self, memories: int) -> MemoryState:
        """So many memories that have learnt nothing yet; views of the first weights, and no momentum."""
        first = MemoryWeights(*(self.first[name] for name in MemoryWeights._fields))
        weights = MemoryWeights(*(tensor.expand(memories, *tensor.shape) for tensor in first))
        return MemoryState(weights, MemoryWeights(*(torch.zeros_like(weight) for weight in weights)))

    def read(self, state: MemoryState, x: Tensor) -> Tensor:
        """What memories say [B, N, D] to the queries of tokens `x` [B, N, D]."""
        self._check(x)
        queries = _of_length_one(self.query(x))
        w1, b1, w2, b2 = (weight.to(x.dtype) for weight in state.weights)
        hidden = F.silu(queries @ w1.mT + b1.unsqueeze(-2))
        return hidden @ w2.mT + b2.unsqueeze(-2)

    def write(self, state: MemoryState, x: Tensor) -> MemoryState:
        """The memories after tokens `x` [B, N, D] were written, differentiable; `state` stays as it is."""
        self._check(x)
        saved = memory_mlp_forward_loss.naive(*self._keys_and_values(x), *state.weights)
        weights, momentum, _ = naive_updated(saved, *state, *self._gates(x), self._limit(x))
        return MemoryState(weights, momentum)

    @torch.no_grad()
    def write_(self, state: MemoryState, x: Tensor, *, by_definition: bool = False) -> Tensor:
        """The same in place and without gradients, by the kernels of `hrm.kernels.ops`.

        Args:
            state: contiguous, overwritten.
            x: [B, N, D].
            by_definition: in plain PyTorch instead, as float64 is in any case.

        Returns:
            The loss [B] before the step, mean over tokens and features.
        """
        self._check(x)
        plain = by_definition or x.dtype == torch.float64
        forward = memory_mlp_forward_loss.naive if plain else memory_mlp_forward_loss
        update_ = memory_mlp_backward_update_.naive if plain else memory_mlp_backward_update_
        saved = forward(*self._keys_and_values(x), *state.weights)
        update_(saved, *state, *self._gates(x), self._limit(x))
        return saved.loss

    # ---- floating-point operations of the matmuls for one memory, forward; backward takes twice as many

    def read_flops(self, tokens: int) -> int:
        return 2 * tokens * self.dim * (self.dim + 2 * self.hidden)

    def write_flops(self, tokens: int) -> int:
        """Of the two projections, the gates, and five products of the MLP, forward and backward."""
        return 2 * tokens * self.dim * (2 * self.dim + 3 + 5 * self.hidden)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise UserError(f"the memory's tokens are {list(x.shape)} and should be [memories, tokens, {self.dim}].")

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _of_length_one(self.key(x)), self.value(x)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, eta and theta [B] of tokens that are written at once: from the mean over them."""
        wide = torch.promote_types(x.dtype, torch.float32)
        alpha, eta, theta = self.gates(x.to(wide)).mean(-2).sigmoid().unbind(-1)
        return alpha, eta, theta * (self.theta_max * self._terms(x))

    def _limit(self, x: Tensor) -> float | None:
        return None if self.max_grad_norm is None else self.max_grad_norm / max(self._terms(x), 1)

    def _terms(self, x: Tensor) -> int:
        """Terms of the squared error of tokens written at once, of which the kernels take the mean, and we the sum."""
        return x.shape[-2] * self.dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}"


def _of_length_one(x: Tensor) -> Tensor:
    """Vectors divided by their length, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1, eps=1e-6).to(x.dtype)
