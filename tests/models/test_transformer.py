"""The plain transformer: T(embeddings) without the loop, z = T(z + embeddings) with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.kernels import naive
from hrm.kernels.context import KernelContext, RotaryTables
from hrm.models import ACTLossHead
from tests.helpers.models import build, randomised

ARCH = {"name": "transformer", "num_layers": 3, "hidden_size": 32, "num_heads": 2, "forward_dtype": "float64"}


def logits_after(model: ACTLossHead, batch: Batch, steps: int) -> Tensor:
    carry = model.initial_carry(batch)
    for _ in range(steps):
        carry, _, _, outputs, _ = model(carry=carry, batch=batch, return_keys=["logits"])
    return outputs["logits"]


def transform(model: ACTLossHead, x: Tensor, blocks: Any) -> Tensor:
    """The trunk by hand, block by block."""
    inner = model.model.inner
    context = KernelContext(RotaryTables(inner.rotary_cos, inner.rotary_sin), 2, 1e-5)
    for block in blocks:
        x = naive.reasoning_module(x, torch.zeros_like(x), [block], context)
    return x


@torch.no_grad()
def test_without_and_with_the_loop(random_batch: Callable[..., Batch]) -> None:
    batch = random_batch()
    plain, looped = (randomised(build(ARCH | {"halt_max_steps": steps})).double().eval() for steps in (1, 3))
    prepared = plain.model.inner.prepare(batch)
    z = transform(plain, prepared.embeddings, prepared.blocks["trunk"])
    for model in (plain, looped):
        torch.testing.assert_close(logits_after(model, batch, 1), model.model.inner.logits({"z": z}))
    again = transform(looped, z + prepared.embeddings, prepared.blocks["trunk"])
    torch.testing.assert_close(logits_after(looped, batch, 2), looped.model.inner.logits({"z": again}))
    # Without the loop a sequence has halted, so that the next step begins from the start.
    assert torch.equal(logits_after(plain, batch, 2), logits_after(plain, batch, 1))


def test_it_is_as_large_as_hrm_by_default() -> None:
    """As the baseline of HRM's paper: the same blocks, as many as both modules have."""
    sizes = {"seq_len": 81, "vocab_size": 11}
    count = [
        sum(param.numel() for param in build(arch, **sizes).parameters()) for arch in ({"name": "transformer"}, {})
    ]
    assert count[0] == count[1]
