from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES

pytest.importorskip("triton", reason="Triton is not installed")

ODD: list[tuple[int, ...]] = [(), (5,), (3000,), (40, 65), (0, 3), (2048,), (1,)]
HRM_V1: list[tuple[int, ...]] = [(12, 512), (2, 512), (2,)]
HRM_V1 += [(1536, 512), (512, 512), (3072, 512), (512, 1536)] * 8
OPTIONS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
STEPS = 25


def draw(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def gradients(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype, step: int) -> list[Tensor]:
    """Of very unlike sizes, from 1e-8 to 1e4; some are 0 at every step."""
    sizes = draw(shapes, "cpu", torch.float32, seed=0)
    factors = [torch.where(size < -1.5, 0, 10 ** (3 * size - 2)).clamp(max=1e4) for size in sizes]
    grads = draw(shapes, "cpu", torch.float32, seed=step)
    return [(grad * factor).to(device, dtype) for grad, factor in zip(grads, factors, strict=True)]


class Fused:
    """Parameters with their moments, and what `adamw_` makes of them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> None:
        self.params = draw(shapes, device, dtype, seed=100)
        self.first, self.second = ([torch.zeros_like(param) for param in self.params] for _ in range(2))

    def step(self, grads: Sequence[Tensor], step: int | Tensor, lr: float | Tensor, **more: Any) -> None:
        ops.adamw_(self.params, grads, self.first, self.second, step, lr, **OPTIONS, **more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [ODD, HRM_V1], ids=["odd", "HRM v1"])
def test_as_torch_optim_adamw(device: str, shapes: list[tuple[int, ...]]) -> None:
    """Over 25 steps with another rate each, and as near to float64 as PyTorch's in float32."""
    if device == "cpu" and shapes is HRM_V1:
        pytest.skip("too large for the interpreter")
    fused = Fused(shapes, device, torch.float32)
    plain, exact = ([param.to(dtype, copy=True) for param in fused.params] for dtype in (torch.float32, torch.float64))
    optimizers = [torch.optim.AdamW(params, 1.0, fused=False, foreach=False, **OPTIONS) for params in (plain, exact)]
    for step in range(1, STEPS + 1):
        grads = gradients(shapes, device, torch.float32, step)
        fused.step(grads, step, 0.1 / step)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / step
            for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                param.grad = grad.to(param.dtype)
            optimizer.step()
    ours = [fused.params, fused.first, fused.second]
    theirs, references = (
        [params, *([optimizer.state[param][key] for param in params] for key in ("exp_avg", "exp_avg_sq"))]
        for optimizer, params in zip(optimizers, (plain, exact), strict=True)
    )
    for actual_all, same_all, wanted_all in zip(ours, theirs, references, strict=True):
        actual, same, wanted = (torch.cat([x.flatten() for x in part]) for part in (actual_all, same_all, wanted_all))
        assert (actual - wanted).norm() <= 1.5 * (same - wanted).norm()
        torch.testing.assert_close(actual.double(), wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))


def test_more_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = (Fused(ODD, "cpu", torch.float32) for _ in range(2))
    grads = gradients(ODD, "cpu", torch.float32, 1)
    together.step(grads, 1, 0.1)
    monkeypatch.setattr("hrm.kernels.ops.triton.adamw.MAX_WEIGHTS", 2)
    apart.step(grads, 1, 0.1)
    assert all(torch.equal(one, other) for one, other in zip(together.params, apart.params, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(device: str, dtype: torch.dtype) -> None:
    """One step from moments that are there, in float32 until it is rounded."""
    one, other = Fused(ODD, device, dtype), Fused(ODD, device, dtype)
    for moments in (one.second, other.second):
        for moment in moments:
            moment.fill_(0.5)
    grads = draw(ODD, device, dtype, seed=1)
    one.step(grads, 3, 0.1)
    ops.adamw_.naive(other.params, grads, other.first, other.second, 3, 0.1, **OPTIONS)
    for actual, wanted in zip(one.params + one.first, other.params + other.first, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_on_the_device(device: str) -> None:
    """Step and rate in tensors give the same bits as numbers do."""
    one, other = (Fused(ODD, device, torch.float32) for _ in range(2))
    step, lr = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.float64)
    for number in range(1, 6):
        grads = gradients(ODD, device, torch.float32, number)
        one.step(grads, number, 0.1 / number)
        other.step(grads, step.fill_(number), lr.fill_(0.1 / number))
    for actual, wanted in zip(one.params + one.second, other.params + other.second, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copy_dtype", [torch.float16, torch.bfloat16])
def test_copies_and_skipped_steps(device: str, copy_dtype: torch.dtype) -> None:
    masked, bare = (Fused(ODD, device, torch.float32) for _ in range(2))
    copies = [torch.full_like(param, torch.nan, dtype=copy_dtype) for param in masked.params]
    taken = 0
    for number in range(1, 6):
        grads = gradients(ODD, device, torch.float32, number)
        if skip := number in (1, 4):
            grads = [torch.where(grad > 0, torch.nan, torch.inf) for grad in grads]
        else:
            taken += 1
            bare.step(grads, taken, 0.1)
        masked.step(grads, taken, 0.1, copies=copies, found_inf=torch.tensor(float(skip), device=device))
        everything = zip(
            masked.params + masked.first + masked.second, bare.params + bare.first + bare.second, strict=True
        )
        assert all(torch.equal(actual, wanted) for actual, wanted in everything)
        if device == "cuda" or copy_dtype == torch.float16:  # the interpreter cuts off in bfloat16
            assert all(
                torch.equal(copy, param.to(copy_dtype)) for copy, param in zip(copies, masked.params, strict=True)
            )
        else:
            assert all(copy.isfinite().all() for copy in copies)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_other_strides_and_betas_of_zero(device: str) -> None:
    (param,) = draw([(6, 40)], device, torch.float32, 0)
    (grad,) = draw([(40, 6)], device, torch.float32, 1)
    first, second = torch.zeros_like(param), torch.zeros_like(param)
    ops.adamw_([param], [grad.T], [first], [second], 1, 0.1, (0.0, 0.0), 0.0, 0.0)
    torch.testing.assert_close(param, draw([(6, 40)], device, torch.float32, 0)[0] - 0.1 * grad.T.sign())
    assert torch.equal(first, grad.T)


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    params, grads, first, second = (draw([(3, 5), (2,)], device, torch.float32, seed) for seed in range(4))
    second = [moment.abs() for moment in second]
    versions = [param._version for param in params]
    arguments = (params, grads, first, second, [], None, None, None, 2.0, 0.1, 0.9, 0.99, 1e-8, 0.1)
    torch.library.opcheck(torch.ops.hrm.adamw_.default, arguments, test_utils=("test_schema", "test_faketensor"))
    ops.adamw_(params, grads, first, second, 2, 0.1)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))


def test_nothing_to_do() -> None:
    ops.adamw_([], [], [], [], 1, 0.1)
    empty = [torch.empty(0, 3)]
    ops.adamw_(empty, empty, empty, empty, 1, 0.1)


def test_errors() -> None:
    params, grads, first, second = (draw([(3, 5), (2,)], "cpu", torch.float32, seed) for seed in range(4))
    with pytest.raises(UserError, match="adamw_: grads are 1 and params 2; give one for each"):
        ops.adamw_(params, grads[:1], first, second, 1, 0.1)
    with pytest.raises(UserError, match=r"adamw_: exp_avgs\[1\] is \[3, 5\] and should be \[2\], as params\[1\]"):
        ops.adamw_(params, grads, [first[0], first[0]], second, 1, 0.1)
    with pytest.raises(UserError, match=r"adamw_: grads\[1\] is float16 and grads\[0\] is float32; give all one dtype"):
        ops.adamw_(params, [grads[0], grads[1].half()], first, second, 1, 0.1)
    with pytest.raises(UserError, match=r"adamw_: params\[0\] is float64; give float32, float16 or bfloat16"):
        ops.adamw_([param.double() for param in params], grads, first, second, 1, 0.1)
    with pytest.raises(UserError, match=r"adamw_: copies\[0\] is not contiguous and is to be written"):
        ops.adamw_(params[:1], grads[:1], first[:1], second[:1], 1, 0.1, copies=[torch.empty(5, 3).T])
