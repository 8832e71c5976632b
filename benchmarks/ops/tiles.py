"""Time the row kernels and the memory's of `hrm.kernels.ops` with other tiles than the ones their tables choose.

python -m benchmarks.ops.tiles [--only norm_backward] [--seconds 400]

`forward_tile` and `backward_tile` of `hrm.kernels.ops.triton.norm` and `.softmax` are fixed tables by the length of a
row, so that a device computes the same in every run; so are the tiles of the memory. This shows what they could be: a
line for each choice, the fastest last, beside the one in force and, for rows, a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from benchmarks.ops.row import random
from benchmarks.ops.rows.memory_mlp import rows as memory_rows
from benchmarks.ops.timing import Timer
from hrm.distributed.world import join_world
from hrm.errors import UserError
from hrm.kernels import ops
from hrm.kernels.ops import memory_mlp
from hrm.kernels.ops.triton import memory_mlp as memory
from hrm.kernels.ops.triton import norm, softmax
from hrm.kernels.ops.triton.norm import Tile

_ROWS = {512: 384 * 82, 4096: 2**15, 16384: 2**13, 11: 384 * 82}  # by columns
_REGISTERS = 65536  # of a multiprocessor


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {
        "norm_forward": (norm, "forward_tile"),
        "norm_backward": (norm, "backward_tile"),
        "softmax_forward": (softmax, "forward_tile"),
        "softmax_backward": (softmax, "backward_tile"),
    }
    parser.add_argument("--only", choices=[*tables, "memory_mlp"])
    parser.add_argument("--seconds", type=float, default=500, help="after so many no further table is begun")
    arguments = parser.parse_args(argv)
    ends_at = time.monotonic() + arguments.seconds
    with join_world("auto") as world:
        if world.device.type != "cuda":
            raise UserError(f"benchmarks.ops.tiles needs an NVIDIA GPU, not {world.device.type}.")
        timer = Timer(world.device)
        if arguments.only in (None, "memory_mlp"):
            _compare_memory(timer, ends_at)
        for columns in _ROWS:
            for name, (module, table) in tables.items():
                if arguments.only in (None, name) and time.monotonic() < ends_at:
                    _compare(name, module, table, columns, timer)


def _compare(name: str, module: ModuleType, table: str, columns: int, timer: Timer) -> None:
    in_force = getattr(module, table)
    found = []
    persistent = name == "norm_backward"
    padded = 1 << (columns - 1).bit_length()
    chosen = in_force(padded)
    for tile in dict.fromkeys([chosen, *_candidates(padded, persistent)]):
        setattr(module, table, lambda *_, tile=tile: tile)
        try:
            with timer.stream():
                us = timer.us(_call(name, columns, timer.device))
        except Exception as error:  # too many registers, say
            print(name, columns, tile, "failed:", str(error).splitlines()[-1:], flush=True)
            continue
        finally:
            setattr(module, table, in_force)
        found.append((us, tile))
    copy_us = timer.copy_us((2 if "forward" in name else 3) * 2 * _ROWS[columns] * columns)
    for us, tile in sorted(found, key=lambda pair: -pair[0]):
        mark = " <- in force" if tile == chosen else ""
        print(f"{name} {_ROWS[columns]}x{columns}: {us:8.1f} us, {copy_us / us:.2f} of copy, {tile}{mark}", flush=True)


def _call(name: str, columns: int, device: torch.device) -> Callable[[], object]:
    x = random(device, _ROWS[columns], columns)
    weights = [random(device, columns), random(device, columns)]
    function = partial(ops.layer_norm, weight=weights[0], bias=weights[1]) if "norm" in name else ops.softmax
    if "forward" in name:
        return lambda: function(x.detach())
    out = function(x)
    grad = random(device, *out.shape).detach()
    leaves = [x, *weights] if "norm" in name else [x]
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _compare_memory(timer: Timer, ends_at: float) -> None:
    in_force = memory_mlp.MOST_ROWS, memory.TILES
    changes: list[dict[str, Any]] = [
        *({"rows": rows, "stages": stages} for rows in (128, 64) for stages in (3, 4, 5)),
        *({"columns": columns, "warps": warps} for columns, warps in ((64, 8), (128, 4), (128, 8), (32, 4))),
        *({"update_warps": 8, "weight": weight} for weight in (64, 128)),
        *({"tokens": tokens, "stages": 3} for tokens in (32, 128)),
        *({"programs": 2, "stages": 3, "rows": rows} for rows in (128, 64)),
        {"inner": 128, "stages": 3},
    ]
    row = next(memory_rows(toy=False))
    found = []
    for change in changes:
        if time.monotonic() > ends_at:
            break
        memory_mlp.MOST_ROWS = change.pop("rows", in_force[0])
        memory.TILES = in_force[1]._replace(**change)
        try:
            call = row.work(timer.device).ours
            with timer.stream():
                found.append((timer.us(call), (memory_mlp.MOST_ROWS, memory.TILES)))
        except Exception as error:  # too much shared memory, say
            print("memory_mlp", change, "failed:", str(error).splitlines()[-1:], flush=True)
        finally:
            memory_mlp.MOST_ROWS, memory.TILES = in_force
    for us, (rows, tiles) in sorted(found, reverse=True):
        mark = " <- in force" if (rows, tiles) == in_force else ""
        print(f"memory_mlp {row.shape}: {us:8.1f} us, {rows} rows, {tiles}{mark}", flush=True)


def _candidates(columns: int, persistent: bool) -> Iterator[Tile]:
    for warps in (1, 2, 4, 8, 16, 32):
        for per_thread in (4, 8, 16, 32):
            rows = warps * 32 * per_thread // columns
            if rows not in (1, 2, 4, 8, 16, 32, 64):
                continue
            if not persistent:
                yield Tile(rows, warps)
            elif 4 <= warps <= 16:
                for programs in (1, 2, 3, 4, 6):
                    registers = _REGISTERS // (programs * warps * 32) // 8 * 8
                    if 48 <= registers <= 255:
                        yield Tile(rows, warps, programs, registers)


if __name__ == "__main__":
    main()
