"""The processes of a run, started by torchrun or alone, and the device each one computes on."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hrm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the other processes, if torchrun started this one, and leave them at the end.

    Args:
        device: `auto`, `cuda`, `mps` or `cpu`. NCCL connects CUDA ranks, gloo the others.

    Raises:
        UserError: the device asked for is not there, or there are more ranks on this host than GPUs.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    chosen = _pick_device(device, int(local_rank or 0))
    if local_rank is None:
        yield World(0, 1, chosen)
        return
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo", device_id=chosen if chosen.type == "cuda" else None
    )
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        dist.barrier()  # a rank that takes its connections down early makes the others abort at times
    finally:
        dist.destroy_process_group()
        # A group that lives on in a reference cycle may abort the process while Python ends (PyTorch #179291).
        gc.collect()


def _pick_device(device: str, local_rank: int) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind, there in available.items() if there)
    if not available[device]:
        kinds = " or ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={device} was asked for, but PyTorch finds none here; use device={kinds} or auto.")
    if device != "cuda":
        return torch.device(device)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started rank {local_rank} on a host with {torch.cuda.device_count()} GPU(s); lower "
            "--nproc-per-node to that."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def share_from_main(value: T, world: World) -> T:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: Iterable[Tensor], world: World) -> None:
    """Overwrite tensors in place by rank 0's."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sum_over_ranks(tensors: Sequence[Tensor], world: World) -> None:
    """Replace tensors of one dtype, in place, by their sums over all ranks, in a single exchange."""
    if world.size > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
