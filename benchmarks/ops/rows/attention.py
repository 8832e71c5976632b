from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.row import Bar, Function, Row, backward, compiled, forward, plain, random
from hrm.kernels import attention as model_attention
from hrm.kernels import ops
from hrm.kernels.backend import KernelRequest
from hrm.kernels.naive import RotaryTables, rotary_tables

_HEADS, _SIZE = 8, 64


def rows(toy: bool) -> Iterator[Row]:
    """Self-attention of the HRM on Sudoku and on mazes, from a projection to the result, beside the model's own."""
    for batch, tokens in [(2, 5)] if toy else [(384, 82), (96, 901)]:
        inputs = partial(_inputs, batch, tokens)
        rivals: dict[str, Callable[[], Function]] = {
            "model": partial(_model, tokens),
            "eager": plain(partial(_of_parts, ops.attention.naive)),
            "compile": compiled(partial(_of_parts, ops.attention.naive)),
        }
        bar = Bar(times_rival=0.98, rivals=("model",))  # the same kernels: as fast, within the noise
        numbers = batch * tokens * _HEADS * _SIZE
        products = 4 * numbers * tokens
        shape = f"{batch}x{tokens}, {_HEADS} heads of {_SIZE}"
        yield forward(shape, inputs, _ours, rivals, bar, 2 * 4 * numbers, products)
        yield backward(shape, inputs, _ours, rivals, bar, 2 * 8 * numbers, 5 * products // 2)


def _ours(qkv: Tensor, rotary: RotaryTables) -> Tensor:
    out: Tensor = ops.attention(*ops.projection_parts(qkv, _HEADS), rotary=rotary, consecutive=True)
    return out.flatten(2)


def _of_parts(attend: Function, qkv: Tensor, rotary: RotaryTables) -> Tensor:
    q, k, v = qkv.view(*qkv.shape[:2], 3, _HEADS, _SIZE).unbind(2)
    out: Tensor = attend(q, k, v, rotary=rotary)
    return out.flatten(2)


def _model(tokens: int) -> Function:
    """What `kernels.attention=auto` takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = KernelRequest(device=device, dtype=torch.bfloat16, head_size=_SIZE, num_tokens=tokens)
    attend = model_attention.get(model_attention.choose("auto", request))

    def of_projection(qkv: Tensor, rotary: RotaryTables) -> Tensor:
        return attend(qkv, rotary, _HEADS)

    return of_projection


def _inputs(batch: int, tokens: int, device: torch.device) -> list[Any]:
    tables = rotary_tables(tokens, _SIZE, 10000.0)
    return [random(device, batch, tokens, 3 * _HEADS * _SIZE), RotaryTables(*(table.to(device) for table in tables))]
