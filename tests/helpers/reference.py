"""An independent float64 HRM, after the specification."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hrm.kernels.naive import BlockWeights

EPS = 1e-5


def reference_norm(x: Tensor, eps: float = EPS) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def reference_attention(x: Tensor, block: BlockWeights, num_heads: int, theta: float | None) -> Tensor:
    """One head at a time; with `theta`, feature pairs (i, i + half) are complex numbers turned by their position."""
    tokens, width = x.shape[-2:]
    size = width // num_heads
    half = size // 2

    def turned(head: Tensor) -> Tensor:
        if theta is None:
            return head
        frequencies = torch.tensor([theta ** (-2 * i / size) for i in range(half)], dtype=torch.float64)
        angles = torch.arange(tokens, dtype=torch.float64).unsqueeze(-1) * frequencies
        numbers = torch.complex(head[..., :half], head[..., half:]) * torch.exp(1j * angles)
        return torch.cat((numbers.real, numbers.imag), -1)

    mixed = []
    for head in range(num_heads):
        q, k, v = (x @ block.qkv[start : start + size].T for start in range(head * size, 3 * width, width))
        scores = torch.exp(turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(size))
        mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
    return torch.cat(mixed, -1) @ block.o.T


def reference_swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    inner = len(gate_up) // 2
    gate, up = x @ gate_up[:inner].T, x @ gate_up[inner:].T
    return (gate / (1 + torch.exp(-gate)) * up) @ down.T


def reference_module(
    state: Tensor, injection: Tensor, blocks: Sequence[BlockWeights], num_heads: int, theta: float | None
) -> Tensor:
    x = state + injection
    for block in blocks:
        x = reference_norm(x + reference_attention(x, block, num_heads, theta))
        x = reference_norm(x + reference_swiglu(x, block.gate_up, block.down))
    return x


def reference_step(
    weights: Mapping[str, Tensor],
    puzzle_rows: Tensor,
    inputs: Tensor,
    states: Mapping[str, Tensor],
    cycles: tuple[int, int],
    num_heads: int,
    *,
    updates: int = 2,
) -> tuple[Tensor, Tensor]:
    """Logits and q's of one ACT step with learned positions, from the state dict's names.

    Only the last `updates` updates are differentiable.
    """
    width = weights["H_init"].shape[0]
    puzzle = torch.zeros(len(inputs), -(-puzzle_rows.shape[1] // width) * width, dtype=torch.float64)
    puzzle[:, : puzzle_rows.shape[1]] = puzzle_rows
    puzzle_tokens = puzzle.reshape(len(inputs), -1, width)
    tokens = torch.cat((puzzle_tokens, weights["embed_tokens.embedding_weight"][inputs.long()]), 1)
    embeddings = math.sqrt(width) * 0.707106781 * (tokens + weights["embed_pos.embedding_weight"])

    def level(name: str) -> list[BlockWeights]:
        layers = sum(key.startswith(f"{name}.") and key.endswith("o_proj.weight") for key in weights)
        parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        return [BlockWeights(*(weights[f"{name}.layers.{i}.{part}.weight"] for part in parts)) for i in range(layers)]

    z_H, z_L = states["z_H"], states["z_L"]
    H_cycles, L_cycles = cycles
    left = H_cycles * (L_cycles + 1)
    for _ in range(H_cycles):
        for _ in range(L_cycles):
            z_L = reference_module(z_L, z_H + embeddings, level("L_level"), num_heads, None)
            left -= 1
            z_L = z_L if left < updates else z_L.detach()
        z_H = reference_module(z_H, z_L, level("H_level"), num_heads, None)
        left -= 1
        z_H = z_H if left < updates else z_H.detach()
    logits = z_H[:, puzzle_tokens.shape[1] :] @ weights["lm_head.weight"].T
    return logits, z_H[:, 0] @ weights["q_head.weight"].T + weights["q_head.bias"]
