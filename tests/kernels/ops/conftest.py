from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def need_gib() -> Iterator[Callable[[float], None]]:
    """A function that takes so much of the GPU's memory for the test, which is skipped where less is free.

    Taken, not looked at: other processes may share the GPU.
    """

    def need(wanted: float) -> None:
        try:
            torch.empty(int(wanted * 2**30), dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pytest.skip(f"it needs {wanted:g} GiB of the GPU's memory, and less is free")

    yield need
    torch.cuda.empty_cache()
