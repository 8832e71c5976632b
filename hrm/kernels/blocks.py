"""The types of blocks: a NamedTuple of weights each, in the dtype of the activations. Their maths is in `naive`.

A block mixes the tokens, by attention or by a gated MLP over them, and then puts each token through a gated MLP. The
type says which of them, and which gate: backends name the types that they compute.

Shapes: T tokens, D hidden size, F inner width of the gated MLP, G that of the one over the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockWeights(NamedTuple):
    """Attention, then SwiGLU (`naive.swiglu`)."""

    qkv: Tensor  # [3 D, D]: the rows of all q heads, then k, then v
    o: Tensor  # [D, D]
    gate_up: Tensor  # [2 F, D]: gate, then up
    down: Tensor  # [D, F]


class MixerWeights(NamedTuple):
    """SwiGLU over the tokens, then SwiGLU."""

    token_gate_up: Tensor  # [2 G, T]: gate, then up
    token_down: Tensor  # [T, G]
    gate_up: Tensor  # [2 F, D]: gate, then up
    down: Tensor  # [D, F]


class NormGatedBlockWeights(NamedTuple):
    """Attention, then an MLP with a normalised gate (`naive.norm_gated`)."""

    qkv: Tensor  # [3 D, D]: the rows of all q heads, then k, then v
    o: Tensor  # [D, D]
    gate_up: Tensor  # [2 F, D]: gate, then up
    down: Tensor  # [D, F]


class NormGatedMixerWeights(NamedTuple):
    """An MLP with a normalised gate over the tokens, then another."""

    token_gate_up: Tensor  # [2 G, T]: gate, then up
    token_down: Tensor  # [T, G]
    gate_up: Tensor  # [2 F, D]: gate, then up
    down: Tensor  # [D, F]


class NormedBlockWeights(NamedTuple):
    """Attention normalised before its output projection (`naive.attention`), then an MLP with a normalised gate."""

    qkv: Tensor  # [3 D, D]: the rows of all q heads, then k, then v
    o: Tensor  # [D, D]
    gate_up: Tensor  # [2 F, D]: gate, then up
    down: Tensor  # [D, F]
