"""The Triton backend as a whole: it computes, and trains, what the definition does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hrm.batch import Batch
from hrm.models import ACTLossHead, build_model

pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()


def model(arch: dict[str, Any], batch: Batch, backend: str) -> ACTLossHead:
    return build_model(
        arch,
        batch_size=len(batch["inputs"]),
        seq_len=batch["inputs"].shape[1],
        vocab_size=7,
        num_puzzle_identifiers=4,
        kernels={"backend": backend},
        device="cuda" if ON_GPU else "cpu",
    )


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 5), (3, 16)])
def test_step_equals_the_definition(
    positions: str, batch_size: int, seq_len: int, tiny_arch: dict[str, Any], random_batch: Callable[..., Batch]
) -> None:
    arch = tiny_arch | {"pos_encodings": positions, "H_layers": 2}
    batch = random_batch(batch_size, seq_len)
    results = []
    for backend in ("naive", "triton"):
        built = model(arch, batch, backend)
        on_device = {name: field.to(built.model.inner.H_init.device) for name, field in batch.items()}
        keys = ["logits", "q_halt_logits", "target_q_continue"]
        _, loss, _, outputs, _ = built(carry=built.initial_carry(on_device), batch=on_device, return_keys=keys)
        loss.backward()
        assert all(param.grad is not None for param in built.parameters())
        results.append([loss.detach(), *outputs.values(), *(param.grad for param in built.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
