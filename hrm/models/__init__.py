"""The architectures, and the one way to build them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hrm.config import HRMConfig, KernelsConfig, arch_config, kernels_config
from hrm.errors import UserError
from hrm.kernels import KernelRequest, resolve
from hrm.kernels.naive import BlockWeights, MixerWeights
from hrm.models.hrm import AdaptiveComputation, HierarchicalReasoningModel
from hrm.models.losses import ACTLossHead
from hrm.models.memory import at_most

__all__ = ["ACTLossHead", "build_model"]


def build_model(
    arch: Mapping[str, Any] | HRMConfig,
    *,
    batch_size: int,
    seq_len: int,
    vocab_size: int,
    num_puzzle_identifiers: int,
    kernels: str | Mapping[str, Any] | KernelsConfig = "naive",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ACTLossHead:
    """Build a model with fresh weights.

    Args:
        arch: the fields of `config/arch/hrm_v1.yaml`; what is left out has the published default.
        batch_size: sequences in a training step on this rank. Other sizes work too; backends may prepare for this one.
        seq_len: tokens of a puzzle, without the puzzle prefix.
        vocab_size: number of different tokens.
        num_puzzle_identifiers: rows of the puzzle table, the blank one included.
        kernels: a preset of `config/kernels/`, or its fields.
        device: where the model lies. Backends are chosen for it.
        seed: of the initial weights and of halting exploration; no global generator is used.

    Returns:
        The model with its loss head, in training mode. `model.initial_carry(batch)` starts a carry;
        `carry, loss, metrics, outputs, all_halted = model(carry=carry, batch=batch, return_keys=[...])` runs one ACT
        step (see `ACTLossHead.forward`); `state_dict()` has the published names.

    Raises:
        UserError: for a wrong or impossible option, or a backend that cannot run on `device`.
    """
    from_data = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "num_puzzle_identifiers": num_puzzle_identifiers,
    }
    for name, size in from_data.items():
        if size < 1:
            raise UserError(f"{name}={size} is too small: give at least 1.")
    device = torch.device(device)
    config = arch if isinstance(arch, HRMConfig) else arch_config(arch, from_data)
    request = KernelRequest(
        device,
        getattr(torch, config.forward_dtype),
        config.hidden_size // config.num_heads,
        rotary=config.rotation is not None,
        num_tokens=config.prefix_len + seq_len,
        batch_size=batch_size,
        width=config.hidden_size,
        block_types=(MixerWeights if config.mlp_t else BlockWeights,),
        modules=("H_level", "L_level") if config.H_layers else ("L_level",),
    )
    with at_most():
        inner = HierarchicalReasoningModel(
            config,
            seq_len=seq_len,
            vocab_size=vocab_size,
            num_puzzle_identifiers=num_puzzle_identifiers,
            kernels=resolve(kernels_config(kernels), request),
            generator=torch.Generator().manual_seed(seed),
        )
    model = AdaptiveComputation(inner, seed)
    return ACTLossHead(model, config.loss.loss_type, fused=inner.kernels.config.fused_step).to(device)
