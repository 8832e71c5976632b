"""Titans' memory as a module: it recalls what was written, learns how to write, and holds its state."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

from hrm.errors import UserError
from hrm.kernels.ops import MemoryWeights
from hrm.models.memory import NeuralMemory
from tests.helpers.drop_in import block
from tests.helpers.operations import DEVICES, ON_GPU, relative_error

MEMORIES, TOKENS, DIM, HIDDEN = 3, 6, 16, 24


def module(device: str = "cpu", **options: Any) -> NeuralMemory:
    return NeuralMemory(DIM, HIDDEN, memories=MEMORIES, **options).to(device)


def tokens(seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MEMORIES, TOKENS, DIM, generator=generator).to(device, dtype)


def test_a_write_is_the_papers_by_torch_func() -> None:
    """Equations 9 to 14, for each memory alone and in float64."""
    memory = module(max_grad_norm=None).double()
    state = memory.fresh(MEMORIES)
    x = [tokens(seed, dtype=torch.float64) for seed in (1, 2)]
    new = memory.write(memory.write(state, x[0]), x[1])

    def loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        w1, b1, w2, b2 = weights
        return (F.linear(F.silu(F.linear(k, w1, b1)), w2, b2) - v).square().sum()

    for i in range(MEMORIES):
        weights = tuple(memory.first[name] for name in MemoryWeights._fields)
        momentum = tuple(torch.zeros_like(weight) for weight in weights)
        for seen in x:
            k, v = F.normalize(memory.key(seen[i]), dim=-1), memory.value(seen[i])
            alpha, eta, theta = memory.gates(seen[i]).mean(0).sigmoid()
            grads = grad(loss)(weights, k, v)
            momentum = tuple(eta * s - 0.1 * theta * g for s, g in zip(momentum, grads, strict=True))
            weights = tuple((1 - alpha) * w + s for w, s in zip(weights, momentum, strict=True))
        for ours, wanted in zip(new.tensors(), [*weights, *momentum], strict=True):
            torch.testing.assert_close(ours[i], wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates_by_the_kernels_are_the_differentiable_ones(device: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter's matmul misreads bfloat16")
    memory, exact = module(device), module(device).double()
    state, exact_state = memory.fresh(MEMORIES), exact.fresh(MEMORIES)
    for seed in range(3):
        x = tokens(seed, device, dtype)
        loss = memory.update(x)
        assert loss.shape == (MEMORIES,)
        state, exact_state = memory.write(state, x), exact.write(exact_state, x.double())
    found = [*memory.state.tensors(), memory.retrieve(x)]
    plain = [*state.tensors(), memory.read(state, x)]
    wanted = [*exact_state.tensors(), exact.read(exact_state, x.double())]
    for i, (ours, same_dtype, true) in enumerate(zip(found, plain, wanted, strict=True)):
        allowed = 1e-5 if dtype == torch.float32 else 1.5 * relative_error(same_dtype, true)
        assert relative_error(ours, true) < allowed, i


def test_what_was_written_is_recalled_better() -> None:
    """Written eight times, it is off by less than a fifth, each memory on its own: none sees another one's tokens."""
    memory, x = module(), tokens(0)
    losses = torch.stack([memory.update(x) for _ in range(8)])
    assert (losses[-1] < 0.2 * losses[0]).all()
    only_first = module()
    only_first.update(x)
    changed = x.clone()
    changed[1:] = 0
    other = module()
    other.update(changed)
    for a, b in zip(only_first.state.tensors(), other.state.tensors(), strict=True):
        torch.testing.assert_close(a[0], b[0])
        assert not torch.allclose(a[1], b[1])


def test_gradients_flow_through_writes_to_all_that_is_trained() -> None:
    """To projections, gates, first weights and what was written; checked against finite differences in float64."""
    memory = NeuralMemory(4, 5).double()
    written, asked = (
        torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)
    )
    names = [name for name, _ in memory.named_parameters()]

    def answer(x: Tensor, *parameters: Tensor) -> Tensor:
        def recall(x: Tensor) -> Tensor:
            state = memory.write(memory.write(memory.fresh(1), x), x.flip(1))
            return memory.read(state, asked)

        holder = _Calls(memory, recall)
        return functional_call(holder, {f"memory.{n}": p for n, p in zip(names, parameters, strict=True)}, (x,))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in memory.parameters()]
    assert torch.autograd.gradcheck(answer, (written.requires_grad_(), *parameters), fast_mode=True)
    grads = torch.autograd.grad(answer(written, *parameters).square().sum(), parameters)
    for name, gradient in zip(names, grads, strict=True):
        assert gradient.count_nonzero() > 0, name


class _Calls(torch.nn.Module):
    """A module around a memory that calls a function, so that `functional_call` can exchange its parameters."""

    def __init__(self, memory: NeuralMemory, function: Any) -> None:
        super().__init__()
        self.memory, self.function = memory, function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_change_nothing(bad: float) -> None:
    memory = module()
    memory.update(tokens(0))
    before = memory.state.copied()
    x = tokens(1)
    x[1, 2, 3] = bad
    memory.update(x)
    for old, new in zip(before.tensors(), memory.state.tensors(), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])


def test_the_state_comes_back_and_is_reset() -> None:
    one, other = module(), module()
    one.update(tokens(0))
    assert {"weights_w1", "momentum_b2", "first.w1", "key.taps", "gates.bias"} <= one.state_dict().keys()
    other.load_state_dict(one.state_dict())
    for memory in (one, other):
        memory.update(tokens(1))
    assert all(map(torch.equal, one.state.tensors(), other.state.tensors()))
    one.reset(torch.tensor([True, False, False]))
    fresh = one.fresh(MEMORIES).tensors()
    assert all(torch.equal(held[0], first[0]) for held, first in zip(one.state.tensors(), fresh, strict=True))
    assert all(map(torch.equal, [x[1] for x in one.state.tensors()], [x[1] for x in other.state.tensors()]))
    one.reset()
    assert all(map(torch.equal, one.state.tensors(), fresh))


def test_errors() -> None:
    with pytest.raises(UserError, match=r"the memory's tokens are \[3, 6, 15\] and should be \[memories, tokens, 16\]"):
        module().update(tokens(0)[..., :15])
    with pytest.raises(UserError, match="holds no memories"):
        NeuralMemory(DIM, HIDDEN, memories=0).update(tokens(0))
    with pytest.raises(UserError, match="dim=0"):
        NeuralMemory(0, HIDDEN)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_updates_and_reads_wait_for_nothing() -> None:
    memory, x = module("cuda"), tokens(0, "cuda", torch.bfloat16)
    memory.update(x), memory.retrieve(x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            memory.update(x)
            memory.retrieve(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_page_about_it_runs() -> None:
    names: dict[str, Any] = {}
    exec(block("memory.md", "python"), names)
    assert names["recalled"].shape == names["x"].shape
