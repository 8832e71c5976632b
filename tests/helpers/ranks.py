"""Processes that train or evaluate together, told of one another as torchrun tells them."""

import os
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import spawn

PATIENCE = 300.0  # seconds; what takes longer hangs, on however busy a machine


def meeting() -> TCPStore:
    """A store where processes find one another as long as it is kept.

    It has its port from the start. One that was only seen to be free may be taken before the processes get to it, by
    connections of those before them.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def wait_for_all(rank: int, processes: int, port: int) -> None:
    """Return when all have come so far. Processes take unlike time to start, on a busy machine seconds."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    store.set(f"started {rank}", "")
    store.wait([f"started {other}" for other in range(processes)])


def environment(rank: int, processes: int, port: int, attempt: int = 0) -> dict[str, str]:
    """The variables of a process that meets the others of its attempt at the port of a `meeting`."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
    return {name: str(value) for name, value in own.items()}


def on_rank(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(rank, *arguments)` in a process of its own, which ends here."""
    torch.set_num_threads(1)
    work(rank, *arguments)
    os._exit(0)  # what gloo's threads hold may abort a process while Python ends, now and then (PyTorch #179291)


def on_ranks(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(rank, port, *arguments)` in so many processes, with the port of a meeting that lasts as long as they do."""
    store = meeting()
    spawn(on_rank, (work, store.port, *arguments), nprocs=processes)  # type: ignore[no-untyped-call]


def wait_for(condition: Callable[[], bool], job: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
