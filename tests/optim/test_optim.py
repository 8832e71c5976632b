"""The optimizers against scalar loops in Python's float64, and the schedule by its values."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from hrm.models.layers import SparseEmbedding
from hrm.optim import AdamATan2, SparseSignSGD, learning_rate
from tests.helpers.ranks import on_rank
from tests.helpers.training import through_a_file

SHAPES: Sequence[tuple[int, ...]] = [(), (5,), (3, 4), (2, 1, 3), (1,)]
NUM_STEPS = 7
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.3


# --- Adam-atan2 ---


def initial_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    rng = np.random.default_rng(0)
    return [torch.nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=dtype)) for shape in SHAPES]


def set_grads(params: Sequence[torch.nn.Parameter], step: int, *, every: bool = False) -> None:
    """Gradients of very unlike size. Unless `every` parameter is to have one, some have none at some steps."""
    rng = np.random.default_rng(step)
    for number, param in enumerate(params):
        grad = torch.tensor(rng.normal(size=param.shape) * 10.0 ** rng.integers(-8, 9), dtype=param.dtype)
        missing = not every and ((number == 1 and step == 1) or (number == 2 and step in (3, 4, 6)))
        zero = number == 3 and step in (1, 5)
        param.grad = None if missing else torch.zeros_like(grad) if zero else grad


def rate(step: int) -> float:
    return 0.1 / step


def reference_run(dtype: torch.dtype, *, every: bool = False) -> list[list[float]]:
    """One number at a time."""
    params = initial_params(dtype)
    values = [param.detach().flatten().tolist() for param in params]
    m = [[0.0] * len(value) for value in values]
    v = [[0.0] * len(value) for value in values]
    t = [0] * len(values)
    b1, b2 = BETAS
    for step in range(1, NUM_STEPS + 1):
        set_grads(params, step, every=every)
        lr = rate(step)
        for number, param in enumerate(params):
            if param.grad is None:
                continue
            t[number] += 1
            for i, g in enumerate(param.grad.flatten().tolist()):
                p = values[number][i] * (1 - lr * WEIGHT_DECAY)
                m[number][i] = b1 * m[number][i] + (1 - b1) * g
                v[number][i] = b2 * v[number][i] + (1 - b2) * g * g
                direction = math.atan2(m[number][i], math.sqrt(v[number][i]) / math.sqrt(1 - b2 ** t[number]))
                values[number][i] = p - lr / (1 - b1 ** t[number]) * direction
    return values


def take_steps(optimizer: torch.optim.Optimizer, params: Sequence[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_adam_atan2(dtype: torch.dtype, tolerance: float) -> None:
    params = initial_params(dtype)
    take_steps(AdamATan2(params, 1.0, BETAS, WEIGHT_DECAY), params, range(1, NUM_STEPS + 1))
    for param, expected in zip(params, reference_run(dtype), strict=True):
        assert param.dtype == dtype
        assert param.flatten().tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_capturable_adam_atan2() -> None:
    """Nothing of a step is on the host: its number is a tensor, and the rate one that is filled."""
    params, lr = initial_params(torch.float32), torch.tensor(1.0)
    optimizer = AdamATan2(params, lr, BETAS, WEIGHT_DECAY, capturable=True)
    for step in range(1, NUM_STEPS + 1):
        set_grads(params, step, every=True)
        lr.fill_(rate(step))
        optimizer.step()
    assert all(torch.equal(state["step"], torch.tensor(float(NUM_STEPS))) for state in optimizer.state.values())
    for param, expected in zip(params, reference_run(torch.float32, every=True), strict=True):
        assert param.flatten().tolist() == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_capturable_state_goes_to_the_gpu() -> None:
    """A state read from a checkpoint lies on the CPU; a captured step must find all of it on the device."""
    params = [torch.nn.Parameter(param.detach()) for param in initial_params(torch.float32)]
    optimizer = AdamATan2(params, torch.tensor(0.1), BETAS, capturable=True)
    set_grads(params, 1, every=True)
    optimizer.step()
    on_gpu = [torch.nn.Parameter(param.detach().cuda()) for param in params]
    continued = AdamATan2(on_gpu, torch.tensor(0.1, device="cuda"), BETAS, capturable=True)
    continued.load_state_dict(through_a_file(optimizer.state_dict()))
    for state in continued.state.values():
        assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(state, "cuda")


def test_adam_atan2_groups_and_closure() -> None:
    """Each group has its own options; a closure gives the gradients and its loss comes back."""
    one, two = (torch.nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64)) for _ in range(2))
    optimizer = AdamATan2([{"params": [one], "weight_decay": 0.5}, {"params": [two], "lr": 0.25}], lr=0.1)

    def closure() -> float:
        loss = (one.square() + two.square()).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 26
    # At step 1 m is (1 - b1) g and the corrected root of v is |g|, up to the correction that stays outside.
    turn = math.atan2(0.1, 1) / 0.1
    assert one.tolist() == pytest.approx([2 * 0.95 - 0.1 * turn, -3 * 0.95 + 0.1 * turn], rel=1e-12)
    assert two.tolist() == pytest.approx([2 - 0.25 * turn, -3 + 0.25 * turn], rel=1e-12)


def test_adam_atan2_continues_from_its_state() -> None:
    whole, half = initial_params(torch.float32), initial_params(torch.float32)
    take_steps(AdamATan2(whole, 1.0, BETAS, WEIGHT_DECAY), whole, range(1, NUM_STEPS + 1))

    first = AdamATan2(half, 1.0, BETAS, WEIGHT_DECAY)
    take_steps(first, half, range(1, 4))
    forgetful = [torch.nn.Parameter(param.detach().clone()) for param in half]
    second = AdamATan2(half, lr=5.0)  # options come with the state
    second.load_state_dict(through_a_file(first.state_dict()))
    take_steps(second, half, range(4, NUM_STEPS + 1))
    assert all(torch.equal(one, other) for one, other in zip(whole, half, strict=True))

    take_steps(AdamATan2(forgetful, 1.0, BETAS, WEIGHT_DECAY), forgetful, range(4, NUM_STEPS + 1))
    assert not any(torch.equal(one, other) for one, other in zip(whole, forgetful, strict=True))


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), (True, True)])
def test_states_continue_on_device_or_host(first: bool, second: bool) -> None:
    """Where count and rate are kept is no part of a state; a tensor that a CUDA graph reads the rate from stays."""

    def make(params: Sequence[torch.nn.Parameter], capturable: bool, lr: float) -> AdamATan2:
        rate = torch.tensor(lr, dtype=torch.float64) if capturable else lr
        return AdamATan2(params, rate, BETAS, WEIGHT_DECAY, capturable=capturable)

    def take(optimizer: AdamATan2, params: Sequence[torch.nn.Parameter], step: int) -> None:
        set_grads(params, step, every=True)
        optimizer.step()

    whole, half = initial_params(torch.float32), initial_params(torch.float32)
    reference, earlier, later = make(whole, False, 0.1), make(half, first, 0.1), make(half, second, 5.0)
    own_rate = later.param_groups[0]["lr"]
    for step in range(1, 4):
        take(reference, whole, step)
        take(earlier, half, step)
    later.load_state_dict(through_a_file(earlier.state_dict()))
    assert later.param_groups[0]["lr"] == 0.1
    assert not second or later.param_groups[0]["lr"] is own_rate
    assert {type(state["step"]) for state in later.state.values()} == {torch.Tensor if second else int}
    for step in range(4, NUM_STEPS + 1):
        take(reference, whole, step)
        take(later, half, step)
    assert all(torch.equal(one, other) for one, other in zip(whole, half, strict=True))


# --- sparse SignSGD ---

LR, NDIM = 0.1, 6
Rows = list[list[float]]


def make_table(num_rows: int, dtype: torch.dtype = torch.float64) -> SparseEmbedding:
    table = SparseEmbedding(num_rows, NDIM)
    table.weights = torch.tensor(np.random.default_rng(0).normal(size=(num_rows, NDIM)), dtype=dtype)
    return table


def read_rows(table: SparseEmbedding, ids: Sequence[int], towards: Tensor) -> None:
    """A training forward and backward in which `towards` [B, ndim] is the gradient."""
    torch.autograd.backward(table(torch.tensor(ids, dtype=torch.int32), towards.dtype), towards)


def random_gradient(size: int, seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=(size, NDIM)))


def reference_sign_step(weights: Rows, ids: Sequence[int], grads: Rows, weight_decay: float) -> Rows:
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0] * NDIM)
    for row, grad in zip(ids, grads, strict=True):
        sums[row] = [total + g for total, g in zip(sums[row], grad, strict=True)]
    return [
        [w * (1 - LR * weight_decay) - LR * np.sign(g) for w, g in zip(row, sums[number], strict=True)]
        if number in sums
        else row
        for number, row in enumerate(weights)
    ]


@pytest.mark.parametrize(
    ("num_rows", "batches"),
    [
        (9, [[0, 3, 8], [3, 3, 3], [2, 8, 2, 8, 0, 2]]),
        (1, [[0], [0, 0, 0, 0]]),
        (2, [[1], [0, 1], [1, 1]]),
    ],
    ids=["duplicates", "one row", "two rows"],
)
def test_sparse_sign_sgd(num_rows: int, batches: list[list[int]]) -> None:
    table = make_table(num_rows)
    optimizer = SparseSignSGD(table, LR, weight_decay=0.7)
    for seed, ids in enumerate(batches):
        before, grads = table.weights.clone(), random_gradient(len(ids), seed)
        read_rows(table, ids, grads)
        optimizer.step()
        optimizer.zero_grad()
        expected = reference_sign_step(before.tolist(), ids, grads.tolist(), 0.7)
        for number, row in enumerate(expected):
            if number in ids:
                assert table.weights[number].tolist() == pytest.approx(row, rel=1e-14)
            else:
                assert torch.equal(table.weights[number], before[number])


def test_gradients_that_cancel_leave_decay_alone() -> None:
    table = make_table(3)
    before, grad = table.weights.clone(), random_gradient(1, 0)[0]
    read_rows(table, [1, 2, 1], torch.stack((grad, grad, -grad)))
    SparseSignSGD(table, LR, weight_decay=0.5).step()
    assert table.weights[1].tolist() == pytest.approx((before[1] * (1 - LR * 0.5)).tolist(), rel=1e-14)


def test_steps_without_gradient_change_nothing() -> None:
    table = make_table(3)
    optimizer, before = SparseSignSGD(table, LR, weight_decay=0.5), table.weights.clone()
    ids = torch.tensor([0, 1])
    optimizer.step()
    table.eval()(ids, torch.float64)  # evaluation reads rows too
    optimizer.step()
    with torch.no_grad():  # and so do the passes without gradient in training
        table.train()(ids, torch.float64)
    optimizer.step()
    table(ids, torch.float64)
    optimizer.step()  # no backward yet
    read_rows(table, [0, 1], random_gradient(2, 0))
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(table.weights, before)


def test_evaluation_between_backward_and_step_does_not_disturb() -> None:
    table, same = make_table(4), make_table(4)
    for each in (table, same):
        read_rows(each, [1, 3], random_gradient(2, 0))
    table.eval()(torch.tensor([0, 2]), torch.float64)
    for each in (table, same):
        SparseSignSGD(each, LR).step()
    assert torch.equal(table.weights, same.weights)


@pytest.mark.parametrize("on_device", [False, True])
def test_sparse_sign_sgd_continues_from_its_state(on_device: bool) -> None:
    table = make_table(4, torch.float32)
    optimizer = SparseSignSGD(table, LR, weight_decay=0.7)
    optimizer.param_groups[0]["lr"] = 0.025
    copy = make_table(4, torch.float32)
    second = SparseSignSGD(copy, lr=torch.tensor(1.0, dtype=torch.float64) if on_device else 1.0)
    rate = second.param_groups[0]["lr"]
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    assert second.param_groups[0]["lr"] is rate or not on_device
    for each, stepping in ((table, optimizer), (copy, second)):
        read_rows(each, [1, 3, 1], random_gradient(3, 0).float())
        stepping.step()
    assert torch.equal(table.weights, copy.weights)


RANK_IDS = [4, 1, 1, 0, 1, 6, 4, 4]  # ids repeat within a rank and across ranks


def sign_step(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    table, grads = make_table(8, torch.float32), random_gradient(8, 5).float()
    mine = slice(4 * rank, 4 * rank + 4)
    read_rows(table, RANK_IDS[mine], grads[mine])
    SparseSignSGD(table, LR, weight_decay=0.7).step()
    torch.save(table.weights, folder / f"weights_{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_share_their_gradients(tmp_path: Path) -> None:
    spawn(on_rank, (sign_step, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    table = make_table(8, torch.float32)
    read_rows(table, RANK_IDS, random_gradient(8, 5).float())
    SparseSignSGD(table, LR, weight_decay=0.7).step()
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"weights_{rank}", weights_only=True), table.weights)


# --- the schedule ---


@pytest.mark.parametrize(
    ("step", "warmup_steps", "total_steps", "min_ratio", "expected"),
    [
        (1, 10, 110, 0.1, 0.2),  # warm-up begins with a first share, not with 0
        (5, 10, 110, 0.1, 1.0),
        (9, 10, 110, 0.1, 1.8),
        (10, 10, 110, 0.1, 2.0),  # the peak
        (35, 10, 110, 0.1, 2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)),
        (60, 10, 110, 0.1, 2 * 0.55),
        (110, 10, 110, 0.1, 0.2),
        (110, 10, 110, 0.0, 0.0),
        (60, 10, 110, 1.0, 2.0),  # constant
        (110, 10, 110, 1.0, 2.0),
        (1, 1, 100, 0.1, 2.0),
        (50, 0, 100, 0.0, 1.0),
        (100, 0, 100, 0.0, 0.0),
        (3, 10, 5, 0.1, 0.6),  # a run that ends within its warm-up
        (5, 10, 5, 0.1, 1.0),
        (5, 5, 5, 0.1, 2.0),
    ],
)
def test_learning_rate(step: int, warmup_steps: int, total_steps: int, min_ratio: float, expected: float) -> None:
    assert learning_rate(step, 2.0, warmup_steps, total_steps, min_ratio) == pytest.approx(expected, abs=1e-12)


@given(
    warmup_steps=st.integers(0, 50),
    cosine_steps=st.integers(1, 200),
    min_ratio=st.floats(0, 1),
    base_lr=st.floats(1e-6, 10),
)
def test_learning_rate_rises_then_falls(warmup_steps: int, cosine_steps: int, min_ratio: float, base_lr: float) -> None:
    total_steps = warmup_steps + cosine_steps
    rates = [learning_rate(step, base_lr, warmup_steps, total_steps, min_ratio) for step in range(1, total_steps + 1)]
    slack = 1e-12 * base_lr
    assert all(0 <= rate <= base_lr + slack for rate in rates)
    rising, falling = rates[:warmup_steps], rates[max(warmup_steps - 1, 0) :]
    assert all(before < after for before, after in pairwise(rising))
    assert all(before >= after - slack for before, after in pairwise(falling))
    assert rates[-1] == pytest.approx(min_ratio * base_lr, abs=slack)


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_learning_rate_past_the_end_stays_there(min_ratio: float) -> None:
    for step in (101, 150, 200):
        assert learning_rate(step, 2.0, 10, 100, min_ratio) == pytest.approx(2 * min_ratio, abs=1e-12)


def test_capturable_rounds_as_the_host_does() -> None:
    """What CUDA graphs record must not train otherwise than eager steps."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = [[torch.randn(shape, generator=generator) for shape in ((7, 5), (11,))] for _ in range(21)]
    finals = []
    for capturable in (False, True):
        params = [param.clone().requires_grad_() for param in start]
        lr = torch.tensor(0.0, dtype=torch.float64) if capturable else 0.0
        optimizer = AdamATan2(params, lr, weight_decay=0.3, capturable=capturable)
        for step, step_grads in enumerate(grads, 1):
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad
            if capturable:
                optimizer.param_groups[0]["lr"].fill_(7e-3 / step)
            else:
                optimizer.param_groups[0]["lr"] = 7e-3 / step
            optimizer.step()
        finals.append(params)
    for eager, captured in zip(*finals, strict=True):
        assert torch.equal(eager, captured)
