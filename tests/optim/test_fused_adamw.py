"""AdamW as one kernel, in the place of PyTorch's; without a GPU it runs in Triton's interpreter."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from hrm.models.layers import in_dtype, kept_copy
from hrm.optim import FusedAdamW

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [(12, 32), (2,), (40, 65), ()]
OPTIONS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}

Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def draw_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]


def set_grads(params: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(optimizer.param_groups[0]["params"], step)
        optimizer.param_groups[0]["lr"] = 0.1 / step
        optimizer.step()


def plain(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 1.0, fused=ON_GPU, **OPTIONS)


def fused(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return FusedAdamW(params, 1.0, copy_dtype=torch.float16, **OPTIONS)


def test_options_are_those_of_a_group() -> None:
    one, two = draw_params()[:2]
    optimizer = FusedAdamW([{"params": [one], "eps": 0.5}, {"params": [two]}], lr=0.1, eps=0.25)
    assert [group["eps"] for group in optimizer.param_groups] == [0.5, 0.25]


@pytest.mark.parametrize(("first", "second"), [(fused, fused), (plain, fused)])
def test_continues_from_a_state(first: Make, second: Make) -> None:
    """From its own to the bit; from PyTorch's as near as the two are."""
    whole, half = draw_params(), draw_params()
    train(second(whole), range(1, 9))
    earlier = first(half)
    train(earlier, range(1, 5))
    later = second(half)
    # As a training state is restored: the numbers are the state's, how they are computed is the options' business.
    state = deepcopy(earlier.state_dict())
    state["param_groups"] = later.state_dict()["param_groups"]
    later.load_state_dict(state)
    train(later, range(5, 9))
    if first is second:
        assert all(torch.equal(one, other) for one, other in zip(half, whole, strict=True))
    else:
        torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-6)


def test_the_next_forward_uses_the_copies() -> None:
    params = draw_params()
    optimizer = fused(params)
    for step in range(1, 4):
        train(optimizer, range(step, step + 1))
        for param in params:
            copy = kept_copy(param)
            assert copy is not None
            assert in_dtype([param], torch.float16)[0].data_ptr() == copy.values.data_ptr()
            assert torch.equal(copy.values, param.half())


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_in_a_cuda_graph() -> None:
    """Replays go on as eager steps do, to the bit, with rates that are filled in between."""
    finals = []
    for graphed in (False, True):
        params = draw_params()
        rate = torch.tensor(0.0, dtype=torch.float64, device=DEVICE)
        optimizer = FusedAdamW(params, rate, copy_dtype=torch.bfloat16, **OPTIONS)
        set_grads(params, 1)
        graph = None
        for number in range(1, 26):
            for param in params:
                assert param.grad is not None
                param.grad.mul_(-0.9)
            rate.fill_(0.1 / number)
            if not graphed or number <= 2:
                optimizer.step()
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay()
        finals.append([*params, *(in_dtype([param], torch.bfloat16)[0] for param in params)])
    assert all(torch.equal(eager, replayed) for eager, replayed in zip(*finals, strict=True))
