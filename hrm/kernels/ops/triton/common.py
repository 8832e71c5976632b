"""What launchers of Triton kernels share: dtypes, sizes of tiles, and what a device has."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tile_rows(tokens: int, most: int) -> int:
    """Rows of a tile for `tokens`: a power of two, as Triton asks, and at least 16, as matrix units ask."""
    return min(most, max(16, 1 << (tokens - 1).bit_length()))


def row_wise(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of a kernel whose programs take some whole rows: the same size where these are short."""
    width = triton.next_power_of_2(columns)
    height = max(1, 2048 // width)  # a warp to a row of 512
    return (triton.cdiv(rows, height),), {"ROWS": height, "COLUMNS": width}


def ordered(kernel: Any, arguments: int, constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """Compile-time arguments of a kernel in its order, which come after so many others."""
    return tuple(constants[name] for name in kernel.arg_names[arguments:])


def launch(
    kernel: Any,
    known: dict[Any, Any],
    key: Hashable,
    programs: int,
    tensors: Sequence[Tensor],
    others: Sequence[Any],
    **options: Any,
) -> None:
    """Launch a kernel with all its arguments: first the tensors of which it reads many numbers at a time.

    What it was compiled to is kept in `known` by `key`, which has to stand for all that compiling depends on but for
    where those tensors begin, and is then launched with their addresses. To look into each argument anew, as Triton
    does, takes the host longer than the launch.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    bits = 0
    for address in addresses:
        bits |= address
    compiled = None if bits % 16 else known.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*addresses, *others)
        return
    compiled = kernel[(programs,)](*tensors, *others, **options)
    if bits % 16 == 0 and compiled is not None:  # the interpreter compiles nothing
        known[key] = compiled


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    # Without a GPU this is Triton's interpreter, one program at a time.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take: 227 KiB on data-centre GPUs from Hopper on."""
    if device.type != "cuda":  # Triton's interpreter, which has as much as is asked for
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def stages(device: torch.device) -> int:
    """How many stages of 32 KiB fit into shared memory beside 16 KiB of output; gaming cards have room for two."""
    if device.type != "cuda":
        return 1
    return 3 if shared_memory(device) >= 116 * 1024 else 2


def differentiates(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
