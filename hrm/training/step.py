"""One training step: an ACT step of every sequence, forward, backward, and an update of all weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.config import PretrainConfig
from hrm.cuda_graphs import GraphedWork
from hrm.data.pack import Pack
from hrm.distributed import World, broadcast_tensors, sum_over_ranks
from hrm.errors import UserError
from hrm.models import ACTLossHead, build_model
from hrm.models.hrm_v1 import Carry
from hrm.optim import AdamATan2, SparseSignSGD, learning_rate


@dataclass
class TrainState:
    """What changes while a run goes on."""

    model: ACTLossHead
    optimizers: list[tuple[torch.optim.Optimizer, float]]  # each with its base learning rate
    total_steps: int
    step: int = 0
    carry: Carry | None = None


TrainStep = Callable[[Batch], dict[str, Tensor]]
"""Takes this rank's batch, on the host; returns the step's metrics, on the device, valid until the next step."""


def initial_state(config: PretrainConfig, pack: Pack, world: World) -> TrainState:
    """A fresh model with its optimizers, equal on all ranks."""
    metadata = pack.metadata
    examples = config.epochs * metadata.total_groups * metadata.mean_puzzle_examples
    total_steps = int(examples / config.global_batch_size)
    if total_steps == 0:
        raise UserError(
            f"{config.epochs} epochs of {pack.path} are {int(examples)} examples, fewer than one batch of "
            f"global_batch_size={config.global_batch_size}: raise epochs or lower global_batch_size."
        )
    model = build_model(
        config.arch,
        batch_size=config.global_batch_size // world.size,
        seq_len=metadata.seq_len,
        vocab_size=metadata.vocab_size,
        num_puzzle_identifiers=metadata.num_puzzle_identifiers,
        kernels=config.kernels,
        device=world.device,
        seed=config.seed,
    )
    broadcast_tensors(model.state_dict().values(), world)
    model.model.seed_exploration(config.seed + world.rank)

    graphed = _is_graphed(model, world)

    def rate(value: float, dtype: torch.dtype = torch.float64) -> float | Tensor:
        return torch.tensor(value, device=world.device, dtype=dtype) if graphed else value

    betas = (config.beta1, config.beta2)
    dense: torch.optim.Optimizer
    if config.optim.name == "adamw":
        dense = torch.optim.AdamW(
            model.parameters(),
            rate(config.lr, torch.float32),
            betas,
            config.optim.eps,
            config.weight_decay,
            foreach=True,
            capturable=graphed,
        )
    else:
        dense = AdamATan2(model.parameters(), rate(config.lr), betas, config.weight_decay, capturable=graphed)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(dense, config.lr)]
    if model.model.inner.prefix_len:
        table = model.model.inner.puzzle_emb
        sparse = SparseSignSGD(table, rate(config.puzzle_emb_lr), config.puzzle_emb_weight_decay)
        optimizers.append((sparse, config.puzzle_emb_lr))
    return TrainState(model, optimizers, total_steps)


def make_train_step(config: PretrainConfig, world: World, state: TrainState) -> TrainStep:
    """The function that advances `state` by one step, run eagerly or as a CUDA graph as `config.kernels` says."""
    update: TrainStep = partial(_update, config, world, state)
    if _is_graphed(state.model, world):
        exploration = state.model.model.exploration(world.device)
        in_place = partial(_update_in_place, config, world, state)
        update = GraphedWork(in_place, world.device, eager_calls=3, generators=[exploration])

    def step(batch: Batch) -> dict[str, Tensor]:
        _set_rates(config, state)
        return update({name: field.to(world.device, non_blocking=True) for name, field in batch.items()})

    return step


def current_lr(config: PretrainConfig, state: TrainState, base_lr: float) -> float:
    """The learning rate of step `state.step`."""
    return learning_rate(state.step, base_lr, config.lr_warmup_steps, state.total_steps, config.lr_min_ratio)


def _is_graphed(model: ACTLossHead, world: World) -> bool:
    # The exchange of several ranks stays out of graphs.
    return model.kernels.cuda_graphs and world.size == 1


def _set_rates(config: PretrainConfig, state: TrainState) -> None:
    """The host's part of a step: count it and set its learning rates."""
    state.step += 1
    for optimizer, base_lr in state.optimizers:
        for group in optimizer.param_groups:
            lr = current_lr(config, state, base_lr)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _update(config: PretrainConfig, world: World, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """The device's part of a step: nothing in it depends on the host."""
    if state.carry is None:
        state.carry = state.model.initial_carry(batch)
    metrics: dict[str, Tensor]
    state.carry, loss, metrics, _, _ = state.model(carry=state.carry, batch=batch)
    (loss / config.global_batch_size).backward()
    # The loss is divided by the global batch already, so gradients are summed, not averaged.
    sum_over_ranks([param.grad for param in state.model.parameters() if param.grad is not None], world)
    for optimizer, _ in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return metrics


def _update_in_place(config: PretrainConfig, world: World, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """`_update` for CUDA graphs: the carry stays in the same memory."""
    carry = state.carry = state.carry or state.model.initial_carry(batch)
    metrics = _update(config, world, state, batch)
    for kept, new in zip(carry.tensors(), state.carry.tensors(), strict=True):
        kept.copy_(new)
    state.carry = carry
    return metrics
