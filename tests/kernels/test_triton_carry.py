"""The start of an ACT step in one launch, against its definition and in place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from hrm.batch import Batch  # noqa: E402
from hrm.kernels.ops.triton.carry import restart  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")]
SIZES = [(1, 1, 8), (5, 30, 48), (3, 1500, 16)] + [
    pytest.param(*size, marks=on_gpu) for size in ((384, 81, 512), (97, 900, 512))
]


def definition(
    z_H: Tensor, z_L: Tensor, H_init: Tensor, L_init: Tensor, halted: Tensor, steps: Tensor, data: Batch, fresh: Batch
) -> list[Tensor]:
    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(halted.view(-1, *[1] * (old.ndim - 1)), new.to(old.dtype), old)

    return [
        choose(H_init, z_H),
        choose(L_init, z_L),
        choose(torch.zeros_like(steps), steps) + 1,
        *(choose(fresh[name], data[name]) for name in data),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU)
@pytest.mark.parametrize("share_halted", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)
def test_equals_the_definition(
    batch: int,
    tokens: int,
    width: int,
    share_halted: float,
    dtype: torch.dtype,
    random_batch: Callable[..., Batch],
) -> None:
    generator = torch.Generator().manual_seed(0)
    data, fresh = (
        {name: field.to(DEVICE) for name, field in random_batch(batch, tokens, seed=seed).items()} for seed in (1, 2)
    )
    z_H, z_L = torch.randn(2, batch, tokens + 1, width, generator=generator).to(DEVICE, dtype)
    H_init, L_init = torch.randn(2, width, generator=generator).to(DEVICE)  # in float32, as the model keeps them
    halted = (torch.rand(batch, generator=generator) < share_halted).to(DEVICE)
    steps = torch.randint(1, 17, (batch,), generator=generator, dtype=torch.int32).to(DEVICE)
    expected = definition(z_H, z_L, H_init, L_init, halted, steps, data, fresh)

    given = [z_H, z_L, steps, *data.values()]
    before = [tensor.clone() for tensor in given]
    *state, new_data = restart(z_H, z_L, H_init, L_init, halted, steps, list(data.values()), list(fresh.values()))
    actual = [*state, *new_data]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_in_a_cuda_graph() -> None:
    z_H, z_L = torch.randn(2, 64, 82, 512, device=DEVICE, dtype=torch.bfloat16)
    H_init, L_init = torch.randn(2, 512, device=DEVICE)
    steps, ids, fresh = (torch.randint(9, (64,), device=DEVICE, dtype=torch.int32) for _ in range(3))
    halted = torch.rand(64, device=DEVICE) < 0.5
    arguments = (z_H, z_L, H_init, L_init, halted, steps, [ids], [fresh])
    restart(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = restart(*arguments)
    halted.logical_not_()
    graph.replay()
    for one, other in zip(
        [*captured[:3], *captured[3]], definition(*arguments[:6], {"": ids}, {"": fresh}), strict=True
    ):
        assert torch.equal(one, other)
