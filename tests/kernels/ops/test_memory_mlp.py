"""The memory's loss and update against torch.func's gradients, and what must not happen to a memory.

Without a GPU the kernels run in Triton's interpreter, the three phases of the update one after the other.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from hrm.errors import UserError
from hrm.kernels.ops import MemoryWeights, memory_mlp_backward_update_, memory_mlp_forward_loss
from tests.helpers.operations import DEVICES, DTYPES, ON_GPU, relative_error

pytest.importorskip("triton", reason="Triton is not installed")

on_gpu = pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
# Memories, tokens, width, hidden width: no multiple of a tile, one row, more rows than a tile, several memories.
SHAPES = [((), 5, 24, 17), ((), 1, 16, 16), ((), 150, 40, 72), ((2,), 33, 64, 64), ((2, 2), 16, 8, 130)]
GATES = {"alpha": 0.1, "eta": 0.9, "theta": 3.0}


def draw(
    device: str, dtype: torch.dtype, memories: Sequence[int], tokens: int, width: int, hidden: int
) -> tuple[Tensor, Tensor, MemoryWeights, MemoryWeights]:
    """Keys, values, weights and momentum."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*memories, *shape, generator=generator).mul_(scale).to(device)

    k, v = normal(tokens, width).to(dtype), normal(tokens, width).to(dtype)
    w = MemoryWeights(
        normal(hidden, width, scale=width**-0.5),
        normal(hidden, scale=0.1),
        normal(width, hidden, scale=hidden**-0.5),
        normal(width, scale=0.1),
    )
    momentum = MemoryWeights(*(torch.randn(x.shape, generator=generator).to(device) * 0.1 for x in w))
    return k, v, w, momentum


def loss_by_hand(w: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
    w1, b1, w2, b2 = w
    y = F.linear(F.silu(F.linear(k, w1, b1)), w2, b2)
    return (y - v).square().mean()


def by_torch_func(
    k: Tensor, v: Tensor, w: MemoryWeights, momentum: MemoryWeights, limit: float | None
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Loss, new weights, new momentum and norms, in float64, by torch.func.grad and the formulas of the paper."""
    k, v = k.double(), v.double()
    memories = k.shape[:-2]
    k, v = (x.reshape(-1, *x.shape[-2:]) for x in (k, v))
    count = len(k)
    flat_w, flat_momentum = ([x.double().reshape(count, *x.shape[len(memories) :]) for x in xs] for xs in (w, momentum))
    losses, new_w, new_momentum, norms = [], [], [], []
    for i in range(count):
        own, moments = tuple(x[i] for x in flat_w), [x[i] for x in flat_momentum]
        losses.append(loss_by_hand(own, k[i], v[i]))
        grads = grad(loss_by_hand)(own, k[i], v[i])
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
        factor = 1.0 if limit is None else min(1.0, limit / norms[-1].item())
        moments = [GATES["eta"] * m - GATES["theta"] * factor * g for m, g in zip(moments, grads, strict=True)]
        new_momentum.append(moments)
        new_w.append([(1 - GATES["alpha"]) * x + m for x, m in zip(own, moments, strict=True)])
    whole = [
        [torch.stack(parts).reshape(x.shape) for parts, x in zip(zip(*new, strict=True), w, strict=True)]
        for new in (new_w, new_momentum)
    ]
    return torch.stack(losses).reshape(memories), *whole, torch.stack(norms).reshape(memories)


def copies(*groups: MemoryWeights) -> list[MemoryWeights]:
    return [MemoryWeights(*(x.clone() for x in group)) for group in groups]


def run(
    k: Tensor, v: Tensor, w: MemoryWeights, momentum: MemoryWeights, limit: float | None, *, naive: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the forward pass and of the update."""
    w, momentum = copies(w, momentum)
    forward = memory_mlp_forward_loss.naive if naive else memory_mlp_forward_loss
    update = memory_mlp_backward_update_.naive if naive else memory_mlp_backward_update_
    saved = forward(k, v, *w)
    norm = update(saved, w, momentum, *GATES.values(), limit)
    return [saved.loss, saved.z1, saved.h, saved.y], [*w, *momentum, norm]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch_func(device: str, dtype: torch.dtype, shape: Any, limit: float | None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter's matmul misreads bfloat16")
    k, v, w, momentum = draw(device, dtype, *shape)
    loss, new_w, new_momentum, norms = by_torch_func(k, v, w, momentum, limit)
    exact = [*new_w, *new_momentum, norms]
    forward, found = run(k, v, w, momentum, limit, naive=False)
    forward_plain, plain = run(k, v, w, momentum, limit, naive=True)
    assert forward[0].dtype == torch.float32
    assert all(x.dtype == dtype for x in forward[1:])
    assert relative_error(forward[0], loss) < (1e-6 if dtype == torch.float32 else 1e-2)
    for ours, same_dtype in zip(forward[1:], forward_plain[1:], strict=True):
        assert relative_error(ours, same_dtype.double()) < (1e-5 if dtype == torch.float32 else 1e-2)
    for i, (ours, same_dtype, wanted) in enumerate(zip(found, plain, exact, strict=True)):
        # A single number, the norm, may by chance be nearer in the definition: rounding once is allowed.
        least = torch.finfo(dtype).eps / 2 if i == len(exact) - 1 else 1e-4
        allowed = 1e-5 if dtype == torch.float32 else max(1.5 * relative_error(same_dtype, wanted), least)
        assert relative_error(ours, wanted) < allowed, i


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [((), 2048, 512, 512), ((3,), 700, 384, 1024), ((64,), 32, 64, 256)])
def test_against_torch_func_on_models_sizes(dtype: torch.dtype, shape: Any) -> None:
    test_against_torch_func("cuda", dtype, shape, 0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_call_takes_its_own_numbers(device: str) -> None:
    """It is launched as the first one was compiled: whole numbers, other gates, tensors that begin elsewhere."""
    k, v, w, momentum = draw(device, torch.float32, (), 20, 24, 40)
    gate = torch.tensor(0.1, device=device)
    shifted = torch.empty(k.numel() + 1, device=device)[1:].view_as(k).copy_(k)
    for keys, alpha, limit in ((k, 0.1, 1), (k, 0.2, 2), (k, gate, 0.01), (shifted, gate, None), (k, 0.1, 1)):
        found, wanted = (copies(w, momentum) for _ in range(2))
        memory_mlp_backward_update_(memory_mlp_forward_loss(keys, v, *w), *found, alpha, 0.9, 3.0, limit)
        definition = memory_mlp_forward_loss.naive(keys, v, *w)
        memory_mlp_backward_update_.naive(definition, *wanted, alpha, 0.9, 3.0, limit)
        for ours, exact in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_tf32_where_torch_may_take_it(device: str) -> None:
    k, v, w, momentum = draw(device, torch.float32, (), 64, 128, 128)
    _, new_w, new_momentum, norms = by_torch_func(k, v, w, momentum, None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _, found = run(k, v, w, momentum, None, naive=False)
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, wanted in zip(found, [*new_w, *new_momentum, norms], strict=True):
        assert relative_error(ours, wanted) < 4e-3  # four products in a row, their numbers cut off by 2^-11 on average


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("naive", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["k", "v", "w1", "b2", "alpha", "eta", "theta"])
def test_what_is_not_finite_leaves_that_memory_bit_for_bit(device: str, naive: bool, bad: float, where: str) -> None:
    """And the other memory of the batch is updated."""
    k, v, w, momentum = draw(device, torch.float32, (2,), 20, 24, 40)
    gates = {name: torch.full((2,), gate, device=device) for name, gate in GATES.items()}
    second = {"k": k, "v": v, **w._asdict(), **gates}[where][1]
    second.view(-1)[0] = bad
    new_w, new_momentum = copies(w, momentum)
    forward = memory_mlp_forward_loss.naive if naive else memory_mlp_forward_loss
    update = memory_mlp_backward_update_.naive if naive else memory_mlp_backward_update_
    update(forward(k, v, *new_w), new_w, new_momentum, *gates.values(), 1.0)
    for old, new in zip([*w, *momentum], [*new_w, *new_momentum], strict=True):
        assert torch.equal(old[1].view(torch.int32), new[1].view(torch.int32))
        assert not torch.equal(old[0], new[0])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_leave_all_as_it_was(device: str) -> None:
    k, v, w, momentum = draw(device, torch.float32, (2,), 0, 8, 16)
    new_w, new_momentum = copies(w, momentum)
    saved = memory_mlp_forward_loss(k, v, *new_w)
    assert saved.loss.isnan().all()
    assert saved.y.shape == (2, 0, 8)
    memory_mlp_backward_update_(saved, new_w, new_momentum, 0.1, 0.9, 1.0)
    assert all(map(torch.equal, [*w, *momentum], [*new_w, *new_momentum]))


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("naive", [False, True])
def test_no_gradient_is_no_clipping(device: str, naive: bool) -> None:
    k, _, w, momentum = draw(device, torch.float32, (), 4, 8, 16)
    w = MemoryWeights(*(torch.zeros_like(x) for x in w))
    _, found = run(k, torch.zeros_like(k), w, momentum, 0.01, naive=naive)
    for new, old in zip(found[4:8], momentum, strict=True):
        torch.testing.assert_close(new, GATES["eta"] * old)
    assert found[8] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_small_gradients_survive_float16(device: str) -> None:
    """The gradient of y is 2 / (N D) of its error, less than float16 can hold."""
    k, v, w, momentum = draw(device, torch.float16, (), 128, 64, 64)
    v = (memory_mlp_forward_loss.naive(k, v, *w).y + 1e-2).half()
    _, _, new_momentum, _ = by_torch_func(k, v, w, momentum, None)
    _, found = run(k, v, w, momentum, None, naive=False)
    change = [ours.double() - GATES["eta"] * old for ours, old in zip(found[4:8], momentum, strict=True)]
    wanted = [new - GATES["eta"] * old for new, old in zip(new_momentum, momentum, strict=True)]
    for ours, exact in zip(change, wanted, strict=True):
        assert relative_error(ours, exact) < 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_operands_need_not_be_contiguous_and_equal_calls_give_equal_bits(device: str) -> None:
    k, v, w, momentum = draw(device, torch.float32, (2,), 70, 24, 40)
    one = run(k, v, w, momentum, 0.01, naive=False)
    strided = [x.mT.contiguous().mT for x in (k, v)]
    other = run(*strided, w, momentum, 0.01, naive=False)
    for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_saved_serves_twice(device: str) -> None:
    """What programs count with is as it was after an update."""
    k, v, w, momentum = draw(device, torch.float32, (), 40, 24, 40)
    saved = memory_mlp_forward_loss(k, v, *w)
    first, second = copies(w, momentum), copies(w, momentum)
    for new_w, new_momentum in (first, second):
        memory_mlp_backward_update_(saved, new_w, new_momentum, **GATES)
    assert all(map(torch.equal, [*first[0], *first[1]], [*second[0], *second[1]]))


@pytest.mark.parametrize("device", DEVICES)
def test_operators(device: str) -> None:
    k, v, w, momentum = draw(device, torch.float32, (2,), 20, 24, 40)
    torch.library.opcheck(torch.ops.hrm.memory_mlp_forward_loss.default, (k, v, *w))

    def step(k: Tensor, v: Tensor, w: MemoryWeights, momentum: MemoryWeights, gate: Tensor) -> tuple[Tensor, Tensor]:
        saved = memory_mlp_forward_loss(k, v, *w)
        return saved.loss, memory_mlp_backward_update_(saved, w, momentum, gate, 0.9, gate, 0.5)

    torch.compiler.reset()
    gate = torch.tensor([0.1, 0.2], device=device)
    plain, compiled = copies(w, momentum), copies(w, momentum)
    expected = step(k, v, *plain, gate)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(k, v, *compiled, gate)
    for a, b in zip([*expected, *plain[0], *plain[1]], [*found, *compiled[0], *compiled[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@on_gpu
def test_a_hundred_updates_wait_for_nothing_and_take_three_launches_each() -> None:
    k, v, w, momentum = draw("cuda", torch.bfloat16, (), 256, 128, 128)
    gates = [torch.tensor(gate, device="cuda") for gate in GATES.values()]

    def update() -> None:
        memory_mlp_backward_update_(memory_mlp_forward_loss(k, v, *w), w, momentum, *gates, 1.0)

    update()  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    names = {event.key: event.count for event in profile.key_averages()}
    calls = {name: count for name, count in names.items() if name.startswith(("cuda", "cu"))}
    assert sum(count for name, count in calls.items() if "Launch" in name) == 300, calls
    # The profiler itself waits at its end.
    assert not [name for name in calls if "StreamSynchronize" in name or "EventSynchronize" in name], calls
    assert not [name for name in calls if "Memcpy" in name or "Memset" in name], calls


@pytest.mark.gpu
@on_gpu
def test_in_a_cuda_graph() -> None:
    k, v, w, momentum = draw("cuda", torch.bfloat16, (), 256, 128, 128)

    def update(w: MemoryWeights, momentum: MemoryWeights) -> None:
        memory_mlp_backward_update_(memory_mlp_forward_loss(k, v, *w), w, momentum, **GATES)

    plain, recorded = copies(w, momentum), copies(w, momentum)
    update(*copies(w, momentum))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(*recorded)
    for _ in range(3):
        graph.replay()
        update(*plain)
    for a, b in zip([*plain[0], *plain[1]], [*recorded[0], *recorded[1]], strict=True):
        assert torch.equal(a, b)


def test_errors() -> None:
    k, v, w, momentum = draw("cpu", torch.float32, (2,), 5, 8, 16)
    with pytest.raises(UserError, match=r"memory_mlp_forward_loss: v is \[2, 5, 7\] and should be \[2, 5, 8\], as k"):
        memory_mlp_forward_loss(k, v[..., :7], *w)
    with pytest.raises(UserError, match=r"w1 is bfloat16; give float32"):
        memory_mlp_forward_loss(k, v, w.w1.bfloat16(), *w[1:])
    with pytest.raises(UserError, match=r"w2 is \[2, 8, 15\] and should be \[2, 8, 16\]"):
        memory_mlp_forward_loss(k, v, w.w1, w.b1, w.w2[..., :15], w.b2)
    saved = memory_mlp_forward_loss(k, v, *w)
    wrong = momentum._replace(w1=momentum.w1.mT.contiguous().mT)
    with pytest.raises(UserError, match=r"memory_mlp_backward_update_: momentum\.w1 is overwritten and not contiguous"):
        memory_mlp_backward_update_(saved, w, wrong, 0.1, 0.9, 1.0)
    with pytest.raises(UserError, match=r"w\.w1 is \[2, 15, 8\] and should be \[2, 16, 8\]"):
        memory_mlp_backward_update_(saved, w._replace(w1=w.w1[:, :15]), momentum, 0.1, 0.9, 1.0)
    with pytest.raises(UserError, match=r"max_grad_norm=0 is too small"):
        memory_mlp_backward_update_(saved, w, momentum, 0.1, 0.9, 1.0, 0)
    with pytest.raises(UserError, match=r"eta is \[3\] and should be \[2\]"):
        memory_mlp_backward_update_(saved, w, momentum, 0.1, torch.ones(3), 1.0)
