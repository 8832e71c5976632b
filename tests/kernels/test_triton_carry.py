"""The start of an ACT step in one launch, against its definition and in place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from hrm.batch import Batch  # noqa: E402
from hrm.kernels.ops.triton.carry import reset_carry  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")]
SIZES = [(1, 1, 8), (5, 30, 48), (3, 1500, 16)] + [
    pytest.param(*size, marks=on_gpu) for size in ((384, 81, 512), (97, 900, 512))
]


def definition(
    states: Batch, initial: Batch, halted: Tensor, steps: Tensor, data: Batch, fresh: Batch
) -> tuple[Batch, Tensor, Batch]:
    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(halted.view(-1, *[1] * (old.ndim - 1)), new.to(old.dtype), old)

    return (
        {name: choose(initial[name], states[name]) for name in states},
        choose(torch.zeros_like(steps), steps) + 1,
        {name: choose(fresh[name], data[name]) for name in data},
    )


def tensors(states: Batch, steps: Tensor, data: Batch) -> list[Tensor]:
    return [*(states[name] for name in sorted(states)), steps, *(data[name] for name in sorted(data))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU)
@pytest.mark.parametrize("num_states", [1, 2, 3])
@pytest.mark.parametrize("share_halted", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)
def test_equals_the_definition(
    batch: int,
    tokens: int,
    width: int,
    share_halted: float,
    num_states: int,
    dtype: torch.dtype,
    random_batch: Callable[..., Batch],
) -> None:
    generator = torch.Generator().manual_seed(0)
    data, fresh = (
        {name: field.to(DEVICE) for name, field in random_batch(batch, tokens, seed=seed).items()} for seed in (1, 2)
    )
    names = "zyx"[:num_states]
    drawn = torch.randn(num_states, batch, tokens + 1, width, generator=generator).to(DEVICE, dtype)
    states = dict(zip(names, drawn, strict=True))
    vectors = torch.randn(num_states, width, generator=generator).to(DEVICE)  # in float32, as the model keeps them
    initial = dict(zip(reversed(names), vectors, strict=True))
    halted = (torch.rand(batch, generator=generator) < share_halted).to(DEVICE)
    steps = torch.randint(1, 17, (batch,), generator=generator, dtype=torch.int32).to(DEVICE)
    expected = definition(states, initial, halted, steps, data, fresh)

    given = tensors(states, steps, data)
    before = [tensor.clone() for tensor in given]
    reordered = dict(reversed(data.items()))
    actual = reset_carry(states, initial, halted, steps, reordered, fresh)
    assert all(torch.equal(one, other) for one, other in zip(tensors(*actual), tensors(*expected), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_in_a_cuda_graph() -> None:
    z_H, z_L = torch.randn(2, 64, 82, 512, device=DEVICE, dtype=torch.bfloat16)
    H_init, L_init = torch.randn(2, 512, device=DEVICE)
    steps, ids, fresh = (torch.randint(9, (64,), device=DEVICE, dtype=torch.int32) for _ in range(3))
    halted = torch.rand(64, device=DEVICE) < 0.5
    arguments = ({"z_H": z_H, "z_L": z_L}, {"z_H": H_init, "z_L": L_init}, halted, steps, {"": ids}, {"": fresh})
    reset_carry(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = reset_carry(*arguments)
    halted.logical_not_()
    graph.replay()
    for one, other in zip(tensors(*captured), tensors(*definition(*arguments)), strict=True):
        assert torch.equal(one, other)
