from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, PRODUCTS, assert_accurate, assert_compiles, draw

pytest.importorskip("triton", reason="Triton is not installed")

Sizes = Sequence[tuple[int, int, int]]  # M, K, N
CASES: dict[str, Sizes] = {
    "one": [(5, 7, 3)],
    "of unlike sizes": [(1, 16, 16), (70, 32, 144), (33, 80, 16), (16, 48, 64)],
    "not aligned": [(19, 33, 65), (3, 5, 7), (64, 8, 24)],
    "some empty": [(0, 16, 16), (8, 0, 16), (5, 16, 32), (4, 16, 0), (0, 8, 8)],
    "all empty": [(0, 4, 4), (3, 4, 0)],
}
EXPERTS = [(rows, 512, 1536) for rows in (700, 1, 4096, 0, 129, 2048, 16, 5000)]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def operands(device: str, dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    xs = draw(device, dtype, *[(M, K) for M, K, _ in sizes], grad=False)
    ws = draw(device, dtype, *[(K, N) for _, K, N in sizes], seed=1, grad=False)
    ws = [w * max(1, len(w)) ** -0.5 for w in ws]
    return [tensor.requires_grad_() for tensor in xs + ws]


def fast(*tensors: Tensor) -> list[Tensor]:
    half = len(tensors) // 2
    return ops.grouped_gemm(tensors[:half], tensors[half:])


def naive(*tensors: Tensor) -> list[Tensor]:
    half = len(tensors) // 2
    return ops.grouped_gemm.naive(tensors[:half], tensors[half:])


@pytest.mark.parametrize(("device", "dtype"), PRODUCTS)
@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients(device: str, dtype: torch.dtype, case: str) -> None:
    assert_accurate(fast, naive, operands(device, dtype, CASES[case]))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_gpu) for dtype in (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("count", [8, 80], ids=["one launch", "two launches"])
def test_experts(dtype: torch.dtype, count: int) -> None:
    assert_accurate(fast, naive, operands("cuda", dtype, (EXPERTS * 10)[:count]))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_gpu) for dtype in (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize(("count", "rows"), [(61, 1), (9, 2048)])
def test_several_of_any_sizes(dtype: torch.dtype, count: int, rows: int) -> None:
    sizes = [(37 * i % 300 + rows, 8 * (5 * i % 90 + 1), 8 * (i % 70 + 40)) for i in range(count)]
    assert_accurate(fast, naive, operands("cuda", dtype, sizes))


def test_more_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.kernels.ops.triton.grouped_gemm._MAX_PRODUCTS", 2)
    assert_accurate(fast, naive, operands("cpu", torch.float16, [(3, 16, 16)] * 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(device: str, dtype: torch.dtype) -> None:
    """Columns that lie dense, in all or only in some; parts of something larger."""
    x, y, w, v = draw(device, dtype, (32, 48), (48, 64), (32, 64), (64, 16), grad=False)
    for xs, ws in (
        ([x.T, y], [w, v]),
        ([x.T, y.T], [w, x.T]),
        ([x[:, :16], y[::2, ::4]], [v.T[:, :48], y[:16, 16:]]),
        ([y[1:, 3:9]], [w[:6, 1:]]),
    ):
        for out, left, right in zip(ops.grouped_gemm(xs, ws), xs, ws, strict=True):
            assert out.is_contiguous()
            torch.testing.assert_close(out.float(), left.float() @ right.float(), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_the_same_in_any_company(device: str) -> None:
    """Runs of tiles begin and end within products, and sizes are no part of the kernel."""
    sizes: Sizes = [(130, 64, 48), (16, 16, 144), (200, 32, 80)]
    tensors = operands(device, torch.float16, sizes)
    alone = [fast(tensors[i], tensors[3 + i])[0] for i in range(3)]
    together = fast(*tensors)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(together, fast(*tensors), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    tensors = operands(device, torch.float32, [(3, 8, 4), (5, 2, 6)])
    torch.library.opcheck(torch.ops.hrm.grouped_gemm.default, (tensors[:2], tensors[2:]))
    assert_compiles(fast, tensors)


def test_gradients_of_some() -> None:
    """Of weights alone, in a launch; of a result that is not used, nothing."""
    xs, ws = draw("cpu", torch.float32, (3, 16), (5, 16), grad=False), draw("cpu", torch.float32, (16, 4), (16, 8))
    first, _ = ops.grouped_gemm(xs, ws)
    torch.autograd.backward(first.sum())
    torch.testing.assert_close(ws[0].grad, xs[0].sum(0)[:, None].expand(16, 4))
    assert ws[1].grad is not None
    assert not ws[1].grad.any()


def test_errors() -> None:
    x, w = draw("cpu", torch.float32, (3, 5), (5, 4), grad=False)
    with pytest.raises(UserError, match="grouped_gemm: ws are 1 and xs 2; give one for each"):
        ops.grouped_gemm([x, x], [w])
    with pytest.raises(UserError, match=r"ws\[1\] is \[4, 5\] and should be \[5, N\], as xs\[1\] is \[3, 5\]"):
        ops.grouped_gemm([x, x], [w, w.T])
    with pytest.raises(UserError, match=r"grouped_gemm: xs\[0\] is \[15\] and should be \[M, K\], a matrix"):
        ops.grouped_gemm([x.flatten()], [w])
    with pytest.raises(
        UserError, match=r"grouped_gemm: xs\[1\] is float16 and xs\[0\] is float32; give both one dtype"
    ):
        ops.grouped_gemm([x, x.half()], [w, w])
    assert ops.grouped_gemm([], []) == []
