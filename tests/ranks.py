"""Processes that train or evaluate together, told of one another as torchrun tells them."""

from torch.distributed import TCPStore


def meeting() -> TCPStore:
    """A store where processes find one another as long as it is kept.

    It has its port from the start. One that was only seen to be free may be taken before the processes get to it, by
    connections of those before them.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(rank: int, processes: int, port: int, attempt: int = 0) -> dict[str, str]:
    """The variables of a process that meets the others of its attempt at the port of a `meeting`."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
    return {name: str(value) for name, value in own.items()}
