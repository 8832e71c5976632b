"""The optimizers that a run's options ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrm.config import PretrainConfig
from hrm.models import ACTLossHead
from hrm.optim.adam_atan2 import AdamATan2
from hrm.optim.adamw import FusedAdamW
from hrm.optim.muon import Muon
from hrm.optim.sign_sgd import SparseSignSGD


class Weights(Protocol):
    """The dense weights of which this process computes the update: `hrm.distributed.partition.SharedModel`."""

    @property
    def weights(self) -> Mapping[str, nn.Parameter]: ...

    def hidden_matrices(self, split: str = ...) -> dict[nn.Parameter, int]: ...


def build_optimizers(
    config: PretrainConfig,
    shared: Weights,
    model: ACTLossHead,
    device: torch.device,
    group: dist.ProcessGroup | None,
    *,
    graphed: bool,
    masks: bool,
) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizer of the dense weights, then that of the puzzle table if one is trained, each with its base rate.

    Args:
        group: the processes with the same part of the model, which share a batch; None: all there are.
        graphed: their steps are recorded as a CUDA graph, so what changes between steps lies in tensors.
        masks: they run at every step and mask what they write, so that the host need not know whether one is skipped.
    """
    fused, on_cuda = model.kernels.fused_step, device.type == "cuda"

    def rate(value: float, dtype: torch.dtype = torch.float64) -> float | Tensor:
        return torch.tensor(value, device=device, dtype=dtype) if graphed else value

    betas = (config.beta1, config.beta2)
    dense: torch.optim.Optimizer
    # All may be frozen: the optimizer of nothing takes a group without weights, but not a list without groups.
    weights: list[Any] = list(shared.weights.values()) or [{"params": []}]
    # Copies are of whole weights, in the dtype that the model computes in.
    copy_dtype = model.model.inner.dtype if fused and not config.parallel.fsdp else None
    if config.optim.name == "adamw" and fused:
        dense = FusedAdamW(
            weights, rate(config.lr), betas, config.optim.eps, config.weight_decay, copy_dtype=copy_dtype
        )
    elif config.optim.name == "adamw":
        dense = torch.optim.AdamW(
            weights,
            rate(config.lr, torch.float32),
            betas,
            config.optim.eps,
            config.weight_decay,
            foreach=not on_cuda,
            fused=on_cuda,
            capturable=graphed,
        )
    else:
        options: dict[str, Any] = {
            "capturable": graphed or masks,
            "fused": fused,
            "copy_dtype": copy_dtype,
        }
        kind: type[AdamATan2] = AdamATan2
        if config.optim.name == "muon" and shared.weights:
            kind = Muon
            options |= {
                "matrices": shared.hidden_matrices(config.optim.split),
                "momentum": config.optim.momentum,
                "rest_lr_ratio": config.optim.rest_lr_ratio,
                "rest_weight_decay": config.optim.rest_weight_decay,
                "scale": config.optim.scale,
                "iterations": config.optim.iterations,
            }
        dense = kind(weights, rate(config.lr), betas, config.weight_decay, **options)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(dense, config.lr)]
    if model.model.inner.config.puzzle_emb_ndim and not model.model.inner.puzzle_emb.is_frozen:
        table = model.model.inner.puzzle_emb
        sparse = SparseSignSGD(
            table, rate(config.puzzle_emb_lr), config.puzzle_emb_weight_decay, fused=fused, group=group
        )
        optimizers.append((sparse, config.puzzle_emb_lr))
    return optimizers
