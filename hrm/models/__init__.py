"""The architectures, a file each, and the one way to build them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hrm.config import KernelsConfig, kernels_config
from hrm.errors import UserError
from hrm.kernels import KernelRequest, make_kernels, resolve
from hrm.models.act import AdaptiveComputation, Carry
from hrm.models.architecture import arch_config, architecture_of, architectures, register_architectures
from hrm.models.losses import ACTLossHead
from hrm.models.recurrent import DataSizes, RecurrentConfig
from hrm.models.size_guard import at_most
from hrm.models.starts import WinnerTakesAll

__all__ = [
    "ACTLossHead",
    "Carry",
    "RecurrentConfig",
    "arch_config",
    "architectures",
    "build_model",
]

register_architectures()


def build_model(
    arch: Mapping[str, Any] | RecurrentConfig,
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
        arch: the fields of a file of `config/arch/`; `name` says which architecture it is (HRM v1), and what else is
            left out has the published default.
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
    config = arch if isinstance(arch, RecurrentConfig) else arch_config(arch, from_data)
    sizes = DataSizes(seq_len, vocab_size, num_puzzle_identifiers)
    with at_most():
        inner = architecture_of(config).model(config, sizes, torch.Generator().manual_seed(seed))
    request = KernelRequest(
        device,
        inner.dtype,
        config.head_size,
        rotary=config.rotation is not None,
        positions_in_row=config.rotation in (None, "rope"),
        num_tokens=inner.num_tokens,
        batch_size=batch_size,
        width=config.hidden_size,
        block_types=inner.block_types,
        modules=tuple(inner.stacks),
    )
    inner.kernels = make_kernels(resolve(kernels_config(kernels), request), tuple(inner.stacks))
    model = WinnerTakesAll(inner, seed) if config.starts > 1 else AdaptiveComputation(inner, seed)
    return ACTLossHead(model, config.loss, fused=inner.kernels.config.fused_step).to(device)
