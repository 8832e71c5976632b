"""Whether numbers are finite, found without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def find_nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """1.0 if there is a NaN or an infinity in any of the tensors, else 0.0; 0-dimensional float32, on their device.

    Reads each number once: 4 bytes a weight for gradients in float32.
    """
    # Of one dtype: only then do a few kernels serve for all.
    largest = torch._foreach_norm([tensor.float() for tensor in tensors if tensor.numel()], torch.inf)
    return (~torch.isfinite(torch.stack(largest)).all()).float()
