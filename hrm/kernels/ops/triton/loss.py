"""The ACT loss with its metrics in Triton: two launches forward, one backward.

Forward, programs read a piece of a sequence's logits once and find its loss and which tokens are right; one program
then sums over pieces and sequences. Backward, the logits are read again, fewer bytes than what would be kept otherwise.
Sums are taken in a fixed order.

Shapes: B sequences of N pieces, S tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.batch import IGNORE_LABEL_ID

_IGNORED = tl.constexpr(IGNORE_LABEL_ID)
# What `_batch_loss_kernel` writes, in its order.
_SUMS = (
    "count",
    "accuracy",
    "exact_accuracy",
    "q_halt_accuracy",
    "steps",
    "lm_loss",
    "q_halt_loss",
    "q_continue_loss",
)


@triton.jit
def _load_tokens(
    logits: tl.tensor,
    labels: tl.tensor,
    STRIDE_B: tl.constexpr,
    STRIDE_S: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    STABLEMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """This program's tokens: logits [ROWS, COLUMNS] in the dtype of the loss, -inf from V on, and labels [ROWS]."""
    sequence = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    at = sequence * STRIDE_B + rows[:, None] * STRIDE_S + columns
    x = tl.load(logits + at, (rows < S)[:, None] & (columns < V), 0).to(tl.float64 if STABLEMAX else tl.float32)
    return tl.where(columns < V, x, -float("inf")), tl.load(labels + sequence * S + rows, rows < S, _IGNORED)


@triton.jit
def _shares(x: tl.tensor, STABLEMAX: tl.constexpr) -> tl.tensor:
    """What the probabilities of tokens are proportional to; that of -inf is 0."""
    if STABLEMAX:
        return tl.where(x < 0, 1 / (1 - tl.minimum(x, 0)), x + 1)
    else:
        return tl.exp(x - tl.max(x, 1)[:, None])


@triton.jit
def _piece_loss_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    right_counts: tl.tensor,
    valid_counts: tl.tensor,
    STRIDE_B: tl.constexpr,
    STRIDE_S: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    STABLEMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    x, label = _load_tokens(logits, labels, STRIDE_B, STRIDE_S, S, V, STABLEMAX, ROWS, COLUMNS)
    is_own = tl.arange(0, COLUMNS)[None, :] == label[:, None]
    is_valid = label != _IGNORED
    shares = _shares(x, STABLEMAX)
    total = tl.sum(shares, 1)
    if STABLEMAX:
        own = tl.sum(tl.where(is_own, shares, 0), 1)
        loss = -tl.log(tl.where(is_valid, own / total, 1))
    else:  # not by way of the probability, which may be 0 in float32
        own = tl.sum(tl.where(is_own, x, 0), 1) - tl.max(x, 1)
        loss = tl.where(is_valid, tl.log(total) - own, 0)
    right = is_valid & (tl.argmax(x, 1) == label)
    piece = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + piece, tl.sum(loss.to(tl.float64)))
    tl.store(right_counts + piece, tl.sum(right.to(tl.int32)))
    tl.store(valid_counts + piece, tl.sum(is_valid.to(tl.int32)))


@triton.jit
def _sum_pieces(
    pieces: tl.tensor, sequences: tl.tensor, B: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr
) -> tl.tensor:
    """Sums of `pieces` [B, N] over the pieces of `sequences`."""
    columns = tl.arange(0, PIECES)[None, :]
    inside = (sequences < B)[:, None] & (columns < N)
    return tl.sum(tl.load(pieces + sequences[:, None] * N + columns, inside, 0), 1)


@triton.jit
def _binary_cross_entropy(logit: tl.tensor, target: tl.tensor) -> tl.tensor:
    return tl.maximum(logit, 0) - logit * target + tl.log(1 + tl.exp(-tl.abs(logit)))


@triton.jit
def _batch_loss_kernel(
    losses: tl.tensor,
    right_counts: tl.tensor,
    valid_counts: tl.tensor,
    q_halt: tl.tensor,
    q_continue: tl.tensor,
    target: tl.tensor,
    halted: tl.tensor,
    steps: tl.tensor,
    loss: tl.tensor,
    sums: tl.tensor,
    STRIDE_HALT: tl.constexpr,
    STRIDE_CONTINUE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.arange(0, BLOCK)
    lm_loss = tl.zeros((BLOCK,), tl.float64)
    q_halt_loss = tl.zeros((BLOCK,), tl.float64)
    q_continue_loss = tl.zeros((BLOCK,), tl.float64)
    accuracy = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    exact_count = tl.zeros((BLOCK,), tl.int32)
    q_right_count = tl.zeros((BLOCK,), tl.int32)
    step_count = tl.zeros((BLOCK,), tl.int32)
    for _ in range(0, B, BLOCK):
        inside = at < B
        right, valid = _sum_pieces(right_counts, at, B, N, PIECES), _sum_pieces(valid_counts, at, B, N, PIECES)
        exact = right == valid
        q = tl.load(q_halt + at * STRIDE_HALT, inside, 0).to(tl.float64)
        lm_loss += _sum_pieces(losses, at, B, N, PIECES) / tl.maximum(valid, 1)
        q_halt_loss += tl.where(inside, _binary_cross_entropy(q, exact.to(tl.float64)), 0)
        if HAS_TARGET:
            wanted = tl.load(target + at, inside, 0).to(tl.float64)
            value = tl.load(q_continue + at * STRIDE_CONTINUE, inside, 0).to(tl.float64)
            q_continue_loss += tl.where(inside, _binary_cross_entropy(value, wanted), 0)
        counted = (tl.load(halted + at, inside, 0) != 0) & (valid > 0)
        accuracy += tl.where(counted, right.to(tl.float64) / tl.maximum(valid, 1), 0)
        count += counted.to(tl.int32)
        exact_count += (counted & exact).to(tl.int32)
        q_right_count += (counted & ((q >= 0) == exact)).to(tl.int32)
        step_count += tl.where(counted, tl.load(steps + at, inside, 0), 0)
        at += BLOCK
    lm, halt, go_on = tl.sum(lm_loss), tl.sum(q_halt_loss), tl.sum(q_continue_loss)
    tl.store(loss, lm + 0.5 * (halt + go_on))
    tl.store(sums + 0, tl.sum(count))
    tl.store(sums + 1, tl.sum(accuracy))
    tl.store(sums + 2, tl.sum(exact_count))
    tl.store(sums + 3, tl.sum(q_right_count))
    tl.store(sums + 4, tl.sum(step_count))
    tl.store(sums + 5, lm)
    tl.store(sums + 6, halt)
    tl.store(sums + 7, go_on)


@triton.jit
def _loss_backward_kernel(
    d_loss: tl.tensor,
    logits: tl.tensor,
    labels: tl.tensor,
    right_counts: tl.tensor,
    valid_counts: tl.tensor,
    q_halt: tl.tensor,
    q_continue: tl.tensor,
    target: tl.tensor,
    d_logits: tl.tensor,
    d_q_halt: tl.tensor,
    d_q_continue: tl.tensor,
    STRIDE_B: tl.constexpr,
    STRIDE_S: tl.constexpr,
    STRIDE_HALT: tl.constexpr,
    STRIDE_CONTINUE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    STABLEMAX: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    pieces = tl.program_id(0) * tl.num_programs(1) + tl.arange(0, PIECES)
    inside = tl.arange(0, PIECES) < tl.num_programs(1)
    valid = tl.sum(tl.load(valid_counts + pieces, inside, 0))
    grad = tl.load(d_loss)
    scale = (grad / tl.maximum(valid, 1)).to(tl.float64 if STABLEMAX else tl.float32)

    x, label = _load_tokens(logits, labels, STRIDE_B, STRIDE_S, S, V, STABLEMAX, ROWS, COLUMNS)
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    is_own = columns == label[:, None]
    shares = _shares(x, STABLEMAX)
    total = tl.sum(shares, 1)[:, None]
    if STABLEMAX:  # d share / d logit is share^2 below 0 and 1 above
        slope = tl.where(x < 0, shares * shares, 1)
        d_x = slope / total - tl.where(is_own, tl.where(x < 0, shares, 1 / (tl.maximum(x, 0) + 1)), 0)
    else:
        d_x = shares / total - is_own.to(tl.float32)
    d_x = tl.where((label != _IGNORED)[:, None], scale * d_x, 0)
    at = sequence.to(tl.int64) * S * V + rows[:, None] * V + columns
    tl.store(d_logits + at, d_x, (rows < S)[:, None] & (columns < V))

    if tl.program_id(1) == 0:
        exact = tl.sum(tl.load(right_counts + pieces, inside, 0)) == valid
        q = tl.load(q_halt + sequence * STRIDE_HALT).to(tl.float64)
        tl.store(d_q_halt + sequence, 0.5 * grad * (tl.sigmoid(q) - exact.to(tl.float64)))
        if HAS_TARGET:
            wanted = tl.load(target + sequence).to(tl.float64)
            q = tl.load(q_continue + sequence * STRIDE_CONTINUE).to(tl.float64)
            tl.store(d_q_continue + sequence, 0.5 * grad * (tl.sigmoid(q) - wanted))


# A program's logits, those that fill up V to a power of two among them: 4 a thread, since float64 takes long.
_BLOCK = 512


def _tile(S: int, V: int) -> tuple[int, dict[str, int]]:
    """The number of pieces of a sequence, and their size."""
    columns = triton.next_power_of_2(V)
    rows = max(1, _BLOCK // columns)
    return triton.cdiv(S, rows), {"ROWS": rows, "COLUMNS": columns}


class _ACTLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        q_halt: Tensor,
        q_continue: Tensor,
        target: Tensor | None,
        labels: Tensor,
        halted: Tensor,
        steps: Tensor,
        stablemax: bool,
    ) -> tuple[Tensor, Tensor]:
        B, S, V = logits.shape
        N, tile = _tile(S, V)
        losses = logits.new_empty(B, N, dtype=torch.float64)
        right_counts, valid_counts = (torch.empty_like(losses, dtype=torch.int32) for _ in range(2))
        layout = {"STRIDE_B": logits.stride(0), "STRIDE_S": logits.stride(1), "S": S, "V": V, "STABLEMAX": stablemax}
        _piece_loss_kernel[(B, N)](logits, labels, losses, right_counts, valid_counts, **layout, **tile)
        loss, sums = losses.new_empty(()), losses.new_empty(len(_SUMS))
        pieces = triton.next_power_of_2(N)
        q_layout = {
            "STRIDE_HALT": q_halt.stride(0),
            "STRIDE_CONTINUE": q_continue.stride(0),
            "HAS_TARGET": target is not None,
            "PIECES": pieces,
        }
        block = max(1, min(2048 // pieces, triton.next_power_of_2(B)))
        _batch_loss_kernel[(1,)](
            losses, right_counts, valid_counts, q_halt, q_continue, target, halted, steps, loss, sums, B=B, N=N,
            BLOCK=block, **q_layout, num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, right_counts, valid_counts, q_halt, q_continue, target)
        ctx.layout = layout | q_layout
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        logits, labels, right_counts, valid_counts, q_halt, q_continue, target = ctx.saved_tensors
        d_logits = logits.new_empty(logits.shape)
        d_q_halt = q_halt.new_empty(q_halt.shape)
        d_q_continue = None if target is None else torch.empty_like(d_q_halt)
        N, tile = _tile(*logits.shape[1:])
        _loss_backward_kernel[(len(logits), N)](
            d_loss, logits, labels, right_counts, valid_counts, q_halt, q_continue, target, d_logits, d_q_halt,
            d_q_continue, **ctx.layout, **tile,
        )  # fmt: skip
        return d_logits, d_q_halt, d_q_continue, None, None, None, None, None


def act_loss(
    logits: Tensor,
    q_halt: Tensor,
    q_continue: Tensor,
    target: Tensor | None,
    labels: Tensor,
    halted: Tensor,
    steps: Tensor,
    loss_type: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `hrm.models.losses.act_loss`, with every sum in float64."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    loss, sums = _ACTLoss.apply(  # type: ignore[no-untyped-call]
        logits, q_halt, q_continue, target, labels.contiguous(), halted, steps, loss_type == "stablemax_cross_entropy"
    )
    metrics = dict(zip(_SUMS, sums.unbind(), strict=True))
    if target is None:
        del metrics["q_continue_loss"]
    return loss, metrics
