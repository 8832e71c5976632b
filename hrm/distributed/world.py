"""The processes of a run, started by torchrun or alone, and the device each one computes on."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hrm.config import ParallelConfig
from hrm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """The ranks that share one piece of work, and this process's place among them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process's place among all of the run.

    `rank` and `size` count the parts that a batch is cut into. Under tensor or pipeline parallelism several processes
    compute one part together; they have the same `rank` and read the same data.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # of the processes with the same part of the model; None: all there are
    tensor: Axis = Axis()
    pipeline: Axis = Axis()

    @property
    def processes(self) -> int:
        return self.size * self.tensor.size * self.pipeline.size

    @property
    def is_first_of_part(self) -> bool:
        """Whether this process speaks for those that compute its part of the batch."""
        return self.tensor.rank == self.pipeline.rank == 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0 and self.is_first_of_part


@contextmanager
def join_world(device: str, parallel: ParallelConfig | None = None, timeout: float = 600) -> Iterator[World]:
    """Join the other processes, if torchrun started this one, and leave them at the end.

    Args:
        device: `auto`, `cuda`, `mps` or `cpu`. NCCL connects CUDA ranks, gloo the others.
        parallel: how the processes share the model; without it, each has its own.
        timeout: seconds that a process waits for the others in an exchange.

    Raises:
        UserError: the device asked for is not there, there are more ranks on this host than GPUs, the processes cannot
            be shared out as `parallel` says, or one of them stopped answering; the last names it.
    """
    parallel = parallel or ParallelConfig()
    local_rank = os.environ.get("LOCAL_RANK")
    chosen = pick_device(device, int(local_rank or 0))
    if local_rank is None:
        _check_shares(parallel, 1)
        yield World(0, 1, chosen)
        return
    on_cuda = chosen.type == "cuda"
    # NCCL ends a process that waited too long without a word to Python. It gets more time, so that an exchange between
    # the hosts, which each step makes for its own reasons, notices first and can say who is missing.
    store, rank, processes = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # torchrun's store outlives a restart (--max-restarts): addresses of the processes before must not be found.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=processes,
        device_id=chosen if on_cuda else None,
        timeout=timedelta(seconds=2 * timeout if on_cuda else timeout),
    )
    try:
        yield share_out(parallel, chosen, timeout)
        dist.barrier()  # a rank that takes its connections down early makes the others abort at times
    except RuntimeError as error:
        if is_of_an_exchange(error) and (silent := _silent_ranks(min(timeout, 10))):
            named = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
            raise UserError(
                f"{named} of {dist.get_world_size()} hung or ended: no answer in dist_timeout={timeout:g} seconds; "
                "look at the last output there, or raise dist_timeout if it was only slow."
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        # A group that lives on in a reference cycle may abort the process while Python ends (PyTorch #179291).
        gc.collect()


def _check_shares(parallel: ParallelConfig, processes: int) -> None:
    together = parallel.tensor * parallel.pipeline
    if processes % together:
        raise UserError(
            f"parallel.tensor={parallel.tensor} times parallel.pipeline={parallel.pipeline} does not divide the "
            f"{processes} process(es) there are: start with torchrun --nproc-per-node {together}, or a multiple."
        )


def share_out(parallel: ParallelConfig, device: torch.device, timeout: float = 600) -> World:
    """This process's place among all that have joined; every process must call this.

    Neighbours share the heads of a block, then come the stages of a pipeline, then the parts of the batch.

    Raises:
        UserError: the processes cannot be shared out so.
    """
    processes = dist.get_world_size()
    _check_shares(parallel, processes)
    if parallel.tensor == parallel.pipeline == 1:
        return World(dist.get_rank(), processes, device)
    ranks = torch.arange(processes).view(-1, parallel.pipeline, parallel.tensor)

    def axis(dim: int) -> Axis:
        lines = ranks.movedim(dim, -1).flatten(0, -2).tolist()
        group, _ = dist.new_subgroups_by_enumeration(lines, timeout=timedelta(seconds=timeout))  # type: ignore[no-untyped-call]
        return Axis(dist.get_rank(group), ranks.shape[dim], group)

    data, pipeline, tensor = map(axis, range(3))
    return World(data.rank, data.size, device, data.group, tensor, pipeline)


def is_of_an_exchange(error: BaseException) -> bool:
    """Whether an error came from an exchange between processes, most likely as one of them ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _silent_ranks(seconds: float) -> list[int]:
    """After a failed exchange, which every living rank sees sooner or later: those that do not say so in time."""
    store = dist.distributed_c10d._get_default_store()
    names = [f"saw_failure/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.set(names[dist.get_rank()], "")
        with suppress(dist.DistStoreError):
            store.wait(names, timedelta(seconds=seconds))
        return [rank for rank, name in enumerate(names) if not store.check([name])]
    except dist.DistError:
        return [0]  # the process that keeps the store


def pick_device(device: str, local_rank: int) -> torch.device:
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
    """The main process's value, on every process."""
    if world.processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_on_main(value: T, world: World) -> list[T]:
    """Every rank's value in order, on the main process; empty on other ranks."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(value, values, group=world.group, group_dst=0)
    return values or []


def broadcast_tensors(tensors: Iterable[Tensor], world: World) -> None:
    """Overwrite tensors in place by the main process's."""
    if world.processes > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sum_over_ranks(tensors: Sequence[Tensor], world: World) -> None:
    """Replace tensors of one dtype, in place, by their sums over all ranks, in a single exchange."""
    if world.size > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=world.group)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
