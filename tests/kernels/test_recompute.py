"""`kernels.recompute`: less is kept for the backward pass, and gradients are the same to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Shape, batches, peak_gib, reset_peak
from hrm.batch import Batch
from hrm.config import KernelsConfig, PretrainConfig
from hrm.config.compose import compose
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.kernels import backend_names, load_backend
from hrm.kernels.naive import BlockWeights
from hrm.models import ACTLossHead, Carry, architectures
from hrm.training.step import initial_state, make_train_step
from tests.helpers.models import build, gradients, random_states, randomised

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
RandomBatch = Callable[..., Batch]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_heads": 2,
    "gradient": "all",
    "halt_max_steps": 4,
    "forward_dtype": "float32",
}
FOUND: dict[str, Any] = {name: found.config(**SIZES) for name, found in architectures().items()}
HRM = replace(FOUND["hrm"], H_layers=3, L_layers=3)
ONE_CYCLE = replace(HRM, H_layers=0, L_layers=2, H_cycles=1, L_cycles=2, halt_max_steps=1)
ARCHS = FOUND | {
    "one module": replace(HRM, H_layers=0),
    "last cycle": replace(HRM, gradient="last_cycle"),
    "mixer": replace(FOUND["trm"], H_cycles=1, L_cycles=2, mlp_t=True),
    "gated": replace(HRM, gate="sigmoid_rms", attention_norm=True),
    "one step": replace(HRM, gradient="one_step"),
}


class Living(TorchDispatchMode):
    """Counts the bytes of what was made under it and is still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[reference.cdata] = (reference, storage.nbytes())
        return result

    def bytes(self) -> int:
        living = [size for reference, size in self._made.values() if not reference.expired()]  # type: ignore[no-untyped-call]
        return sum(living)


def differentiated(model: ACTLossHead, batch: Batch, living: Living | None = None) -> tuple[dict[str, Tensor], int]:
    """Gradients of a training step, and what it keeps for them."""
    states = random_states(model, batch)
    halted = torch.zeros_like(batch["puzzle_identifiers"], dtype=torch.bool)
    steps = torch.zeros_like(batch["puzzle_identifiers"])
    carry = Carry({name: state.to(steps.device) for name, state in states.items()}, steps, halted, batch)
    with living or nullcontext():
        _, loss, _, _, _ = model(carry=carry, batch=batch, return_keys=[])
        kept = living.bytes() if living else 0
    loss.backward()
    return gradients(model), kept


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_same_gradients_from_less_memory(arch: Any, random_batch: RandomBatch) -> None:
    batch = random_batch(batch_size=64)
    kept, found = {}, {}
    for recompute in ("none", "block", "module"):
        model = randomised(build(arch, kernels={"backend": "naive", "recompute": recompute}))
        found[recompute], kept[recompute] = differentiated(model, batch, Living())
    assert kept["module"] < kept["block"] < 0.4 * kept["none"]
    assert_same(found["block"], found["none"])
    assert_same(found["module"], found["none"])


@pytest.mark.parametrize("backend", [name for name in backend_names() if name != "naive"])
def test_every_backend_computes_again_what_it_saved(backend: str, random_batch: RandomBatch) -> None:
    """Its own kernels, forward and backward, in float16 too."""
    batch = random_batch(batch_size=1)
    dtype = "bfloat16" if ON_GPU else "float16"  # Triton's interpreter misreads bfloat16
    attends = BlockWeights in load_backend(backend).block_types
    small = ONE_CYCLE if attends else replace(ARCHS["mixer"], L_cycles=1, L_layers=1)
    arch = replace(small, forward_dtype=dtype)
    found = {}
    for recompute in ("none", "block", "module"):
        try:
            kernels = {"backend": backend, "recompute": recompute}
            model = randomised(build(arch, kernels=kernels, device=DEVICE))
        except UserError as error:
            pytest.skip(str(error))
        found[recompute], _ = differentiated(model, {name: field.to(DEVICE) for name, field in batch.items()})
    assert_same(found["block"], found["none"])
    assert_same(found["module"], found["none"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_modules_compute_again_too(random_batch: RandomBatch) -> None:
    arch, found = replace(ONE_CYCLE, L_layers=1), {}
    for recompute in ("none", "block", "module"):
        kernels = {"backend": "naive", "compile": True, "recompute": recompute}
        found[recompute], _ = differentiated(randomised(build(arch, kernels=kernels)), random_batch())
    assert_same(found["module"], found["none"])
    for name, gradient in found["block"].items():  # the compiler fuses the sum before a block with it
        torch.testing.assert_close(gradient, found["none"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "block", "module"])
def test_nothing_changes_without_gradient(recompute: str, random_batch: RandomBatch) -> None:
    model = randomised(build(HRM, kernels={"backend": "naive", "recompute": recompute})).eval()
    batch = random_batch()
    with torch.no_grad():
        _, _, _, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=["logits"])
    plain = randomised(build(HRM)).eval()
    _, _, _, expected, _ = plain(carry=plain.initial_carry(batch), batch=batch, return_keys=["logits"])
    assert torch.equal(outputs["logits"], expected["logits"])


def test_what_is_no_choice() -> None:
    with pytest.raises(UserError, match=r"kernels\.recompute=blocks is not a choice; did you mean block\?"):
        KernelsConfig(recompute="blocks")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_long_puzzles_fit_in_half_the_memory(tmp_path: Path) -> None:
    """Recorded training steps, gradients through a whole cycle of 900 tokens: equal weights, and less memory."""
    found, peak = {}, {}
    for recompute in ("none", "block", "module"):
        chosen = ["kernels=auto", f"kernels.recompute={recompute}", "arch.gradient=last_cycle", "device=cuda"]
        config = compose(PretrainConfig, "pretrain", [*chosen, "global_batch_size=24"])
        pack, stream = batches(None, Shape(24, 900), tmp_path)
        reset_peak(DEVICE)
        state = initial_state(config, pack, World(0, 1, DEVICE))
        step = make_train_step(config, World(0, 1, DEVICE), state)
        for _ in range(6):  # of which the last ones replay a graph
            step(next(stream))
        torch.cuda.synchronize()
        peak[recompute] = peak_gib(DEVICE) or 0.0
        found[recompute] = {name: weight.cpu() for name, weight in state.model.state_dict().items()}
        del state, step
    assert peak["block"] < peak["none"] / 2
    assert peak["module"] < peak["none"]
    assert_same(found["block"], found["none"])
    assert_same(found["module"], found["none"])
