"""Whether this package's kernels in Gluon run on a device: they are made for Hopper GPUs."""

from __future__ import annotations

import functools
import importlib.util

import torch

from hrm.kernels.requirements import is_hopper


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason why they cannot run on `device`, or None."""
    if not is_hopper(device):
        return "it is written for Hopper GPUs (compute capability 9.0)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    # Gluon's interface still changes from one Triton to the next: this is the one the kernels know.
    return None if triton.__version__.startswith("3.6.") else f"it needs Triton 3.6, not {triton.__version__}"
