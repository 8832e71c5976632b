"""How PyTorch's threads wait for one another on a CPU: set before PyTorch is loaded, which reads it then."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# How often GNU's OpenMP, which PyTorch's packages for Linux bring along, looks for work before a thread that waits goes
# to sleep. By itself it looks for some 3 ms, a turn of the processor: where another program computes too, the thread
# spins in the place of the one that it waits for. Where it is given more threads than cores, it takes this number.
# Other runtimes let others go first while they wait.
_SPINS = {"GOMP_SPINCOUNT": "1000"}


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait go to sleep soon, unless the environment says how they wait."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment.update(_SPINS)
