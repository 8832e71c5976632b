"""The Triton backends and switches as a whole: they compute, and train, what the definition does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hrm.batch import Batch
from hrm.config import KernelsConfig, OptimConfig, PretrainConfig
from hrm.data.pack import Pack, PackMetadata
from hrm.distributed.world import World
from hrm.models import ACTLossHead, arch_config, build_model
from hrm.optim import FusedAdamW
from hrm.training.step import initial_state, make_train_step

pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
NAIVE = KernelsConfig("naive", attention="sdpa")
CHOICES = {
    "triton": KernelsConfig("triton"),
    "fused step": KernelsConfig("triton", fused_step=True),
    "fused step of the definition": KernelsConfig("naive", attention="sdpa", fused_step=True),
    "in chunks": KernelsConfig("triton", chunk=2),
    "head_parallel": KernelsConfig("head_parallel"),
    "triton_unrolled": KernelsConfig("triton_unrolled", fused_step=True),
}


def model(arch: dict[str, Any], batch: Batch, kernels: KernelsConfig) -> ACTLossHead:
    return build_model(
        arch,
        batch_size=len(batch["inputs"]),
        seq_len=batch["inputs"].shape[1],
        vocab_size=7,
        num_puzzle_identifiers=4,
        kernels=kernels,
        device=DEVICE,
    )


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 5), (3, 16)])
def test_step_equals_the_definition(
    choice: str,
    positions: str,
    batch_size: int,
    seq_len: int,
    tiny_arch: dict[str, Any],
    random_batch: Callable[..., Batch],
) -> None:
    arch = tiny_arch | {"pos_encodings": positions, "H_layers": 2}
    batch = random_batch(batch_size, seq_len)
    results = []
    for kernels in (NAIVE, CHOICES[choice]):
        built = model(arch, batch, kernels)
        on_device = {name: field.to(DEVICE) for name, field in batch.items()}
        keys = ["logits", "q_halt_logits", "target_q_continue"]
        _, loss, _, outputs, _ = built(carry=built.initial_carry(on_device), batch=on_device, return_keys=keys)
        loss.backward()
        assert all(param.grad is not None for param in built.parameters())
        results.append([loss.detach(), *outputs.values(), *(param.grad for param in built.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("choice", "optim"),
    [
        ("fused step", "adam_atan2"),
        ("fused step", "adamw"),
        ("fused step of the definition", "adam_atan2"),
        ("triton_unrolled", "adam_atan2"),
    ],
)
def test_training_equals_the_definition(
    choice: str, optim: str, tiny_arch: dict[str, Any], random_batch: Callable[..., Batch]
) -> None:
    """Five steps in float16, whose weights are cast: losses, weights and the puzzle table."""
    arch = tiny_arch | {"forward_dtype": "float16", "halt_max_steps": 2}
    metadata = PackMetadata(0, None, 0, 7, 5, 4, 100, 1.0, ("all",))
    pack, world = Pack(path=None, split="train", metadata=metadata, sets={}), World(0, 1, DEVICE)  # type: ignore[arg-type]
    results = []
    for kernels in (NAIVE, CHOICES[choice]):
        config = PretrainConfig(
            arch=arch_config(arch),
            kernels=kernels,
            optim=OptimConfig(optim),
            global_batch_size=3,
            epochs=10000,
            lr_warmup_steps=2,
        )
        state = initial_state(config, pack, world)
        assert isinstance(state.optimizers[0][0], FusedAdamW) == (optim == "adamw" and kernels.fused_step)
        step = make_train_step(config, world, state)
        losses = [float(step(random_batch(3, seed=number))["lm_loss"]) for number in range(5)]
        weights = torch.cat([param.detach().flatten() for param in state.model.parameters()])
        results.append((losses, weights, state.model.model.inner.puzzle_emb.weights.clone()))
    (losses, weights, table), (found_losses, found_weights, found_table) = results
    np.testing.assert_allclose(found_losses, losses, rtol=2e-3)
    # Adam's step has the size of the rate where the sign of a gradient is clear, so weights are compared by how far
    # they moved: at most 5 rates apart, and on average far less.
    assert (found_weights - weights).abs().mean() < 0.1 * 5 * 1e-4
    assert ((found_table - table).abs() > 1e-3).float().mean() < 0.05
    assert (table != 0).any()
