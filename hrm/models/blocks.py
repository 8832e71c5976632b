"""Blocks and what they are made of: their weights, what they cost, and how processes divide them.

The maths is that of `hrm.kernels.naive`, which the other backends compute faster and where the types of weights are.
Shapes: T tokens of a sequence with its puzzle prefix, D hidden size, F inner width of the gated MLP.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from hrm.kernels.blocks import (
    BlockWeights,
    MixerWeights,
    NormedBlockWeights,
    NormGatedBlockWeights,
    NormGatedMixerWeights,
)
from hrm.models.layers import Linear, truncated_normal


class Cut(NamedTuple):
    """How tensor-parallel processes divide a weight."""

    dim: int  # the dimension that is divided
    stacked: int  # matrices one above the other in that dimension, each of which is divided


class BlockSizes(NamedTuple):
    """Sizes that a block is built with."""

    num_tokens: int  # T
    width: int  # D
    inner: int  # F
    token_inner: int  # inner width of an MLP over the tokens
    num_heads: int


def _linear(out_features: int, in_features: int, generator: torch.Generator) -> Linear:
    return Linear(truncated_normal((out_features, in_features), in_features**-0.5, generator))


class Attention(nn.Module):
    """Self-attention (`naive.attention`); the rows of `qkv_proj` are q's, then k's, then v's."""

    CUTS: ClassVar[dict[str, Cut]] = {"qkv_proj.weight": Cut(0, 3), "o_proj.weight": Cut(1, 1)}

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.qkv_proj = _linear(3 * width, width, generator)
        self.o_proj = _linear(width, width, generator)


class SwiGLU(nn.Module):
    """A gated MLP (`naive.swiglu`); the rows of `gate_up_proj` are the gate's, then the up projection's."""

    CUTS: ClassVar[dict[str, Cut]] = {"gate_up_proj.weight": Cut(0, 2), "down_proj.weight": Cut(1, 1)}

    def __init__(self, width: int, inner: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_up_proj = _linear(2 * inner, width, generator)
        self.down_proj = _linear(width, inner, generator)


class Block(nn.Module):
    """A post-norm block: something that mixes the tokens, then the gated MLP (paper section 2).

    Another kind of block is a subclass, with a type of weights of its own that `naive` and other backends compute.
    """

    WEIGHTS: ClassVar[type]  # what `weights` returns
    INDIVISIBLE: ClassVar[str | None] = None  # the option because of which processes cannot divide it

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def weights(self) -> Any:
        """The master weights, of the type `WEIGHTS`."""
        raise NotImplementedError

    def flops(self, num_tokens: int | None = None) -> int:
        """Floating-point operations forward, for a sequence of T tokens; backward takes twice as many.

        Args:
            num_tokens: instead of T, for blocks whose weights are for any number.
        """
        raise NotImplementedError

    def first_token_flops(self) -> int:
        """As `flops`, where only token 0 of the result is wanted (`naive.first_token_block`)."""
        raise NotImplementedError

    def cuts(self) -> dict[str, Cut]:
        """How each weight is divided, by its name in the block."""
        parts = [(name, part) for name, part in self.named_children() if isinstance(part, Attention | SwiGLU)]
        return {f"{name}.{weight}": cut for name, part in parts for weight, cut in part.CUTS.items()}

    def matrices(self, split: str) -> dict[str, int]:
        """Of how many matrices of one height, one above the other, each weight is made, by its name in the block.

        Args:
            split: `projections`, or `heads`, which also parts the heads of q, k and v, and leaves gate and up together.
        """
        counts = {name: cut.stacked for name, cut in self.cuts().items()}
        if split == "heads":
            heads = self.sizes.num_heads
            counts = {name: count * heads if "qkv_proj" in name else 1 for name, count in counts.items()}
        return counts

    def divisible(self) -> dict[str, int]:
        """The sizes, by their names for the user, that the number of tensor-parallel processes has to divide."""
        return {"arch.num_heads": self.sizes.num_heads, "the MLP's inner width": self.sizes.inner}


class AttentionBlock(Block):
    """Attention over the tokens, then the MLP."""

    WEIGHTS: ClassVar[type] = BlockWeights

    def __init__(self, sizes: BlockSizes, generator: torch.Generator) -> None:
        super().__init__(sizes)
        self.self_attn = Attention(sizes.width, generator)
        self.mlp = SwiGLU(sizes.width, sizes.inner, generator)

    def weights(self) -> BlockWeights:
        return BlockWeights(
            qkv=self.self_attn.qkv_proj.weight,
            o=self.self_attn.o_proj.weight,
            gate_up=self.mlp.gate_up_proj.weight,
            down=self.mlp.down_proj.weight,
        )

    def flops(self, num_tokens: int | None = None) -> int:
        tokens, width, inner, *_ = self.sizes
        tokens = num_tokens or tokens
        return 2 * tokens * (4 * width**2 + 3 * width * inner) + 4 * tokens**2 * width

    def first_token_flops(self) -> int:
        tokens, width, inner, *_ = self.sizes
        keys_and_values = 2 * tokens * 2 * width**2
        return keys_and_values + 2 * (2 * width**2 + 3 * width * inner) + 4 * tokens * width


class MixerBlock(Block):
    """A gated MLP over the tokens of each feature (Jolicoeur-Martineau 2025, arXiv 2510.04871), then the MLP."""

    WEIGHTS: ClassVar[type] = MixerWeights
    INDIVISIBLE = "arch.mlp_t=true"

    def __init__(self, sizes: BlockSizes, generator: torch.Generator) -> None:
        super().__init__(sizes)
        self.mlp_t = SwiGLU(sizes.num_tokens, sizes.token_inner, generator)
        self.mlp = SwiGLU(sizes.width, sizes.inner, generator)

    def weights(self) -> MixerWeights:
        return MixerWeights(
            token_gate_up=self.mlp_t.gate_up_proj.weight,
            token_down=self.mlp_t.down_proj.weight,
            gate_up=self.mlp.gate_up_proj.weight,
            down=self.mlp.down_proj.weight,
        )

    def flops(self, num_tokens: int | None = None) -> int:
        tokens, width, inner, token_inner, _ = self.sizes
        return 6 * tokens * width * (token_inner + inner)

    def first_token_flops(self) -> int:
        tokens, width, inner, token_inner, _ = self.sizes
        return 6 * width * (tokens * token_inner + inner)


class NormGatedAttentionBlock(AttentionBlock):
    """The same with the gate sigmoid(g) * rms_norm(g * v) (`naive.norm_gated`), whose norm is over all hidden units."""

    WEIGHTS: ClassVar[type] = NormGatedBlockWeights
    INDIVISIBLE = "arch.gate=sigmoid_rms"

    def weights(self) -> NormGatedBlockWeights:  # type: ignore[override]
        return NormGatedBlockWeights(*super().weights())


class NormedAttentionBlock(NormGatedAttentionBlock):
    """The same with attention's output normalised too, before its projection."""

    WEIGHTS: ClassVar[type] = NormedBlockWeights

    def weights(self) -> NormedBlockWeights:  # type: ignore[override]
        return NormedBlockWeights(*super().weights())


class NormGatedMixerBlock(MixerBlock):
    """The same with the gate sigmoid(g) * rms_norm(g * v) in both MLPs."""

    WEIGHTS: ClassVar[type] = NormGatedMixerWeights

    def weights(self) -> NormGatedMixerWeights:  # type: ignore[override]
        return NormGatedMixerWeights(*super().weights())


# By `arch.gate`: without and with `arch.mlp_t`.
BLOCKS: dict[str, tuple[type[AttentionBlock | MixerBlock], type[AttentionBlock | MixerBlock]]] = {
    "silu": (AttentionBlock, MixerBlock),
    "sigmoid_rms": (NormGatedAttentionBlock, NormGatedMixerBlock),
}


class Stack(nn.Module):
    """A module of the recurrence: blocks that an update runs through one after the other."""

    def __init__(self, layers: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]

    def weights(self) -> list[Any]:
        """The master weights of its blocks."""
        return [block.weights() for block in self.layers]  # type: ignore[operator]

    def flops(self, num_tokens: int | None = None) -> int:
        """Of an update forward, for one sequence of all tokens or of so many."""
        return sum(block.flops(num_tokens) for block in self.blocks)

    def first_token_flops(self) -> int:
        """As `flops`, where only token 0 of the result is wanted."""
        *others, last = self.blocks
        return sum(block.flops() for block in others) + last.first_token_flops()
