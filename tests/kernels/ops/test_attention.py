from functools import partial

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import ops
from hrm.kernels.naive import RotaryTables, rotary_tables
from hrm.kernels.ops.attention import _projection
from tests.helpers.operations import DEVICES, PRODUCTS, assert_accurate, assert_compiles, draw, results

pytest.importorskip("triton", reason="Triton is not installed")


def tables(tokens: int, size: int, device: str) -> RotaryTables:
    return RotaryTables(*(table.to(device) for table in rotary_tables(tokens, size, 10000.0)))


@pytest.mark.parametrize(("device", "dtype"), PRODUCTS)
@pytest.mark.parametrize("shape", [(2, 5, 2, 16), (1, 40, 1, 32), (2, 2, 17, 3, 16), (19, 2, 16)])
@pytest.mark.parametrize("rotates", [False, True])
def test_result_and_gradients(device: str, dtype: torch.dtype, shape: tuple[int, ...], rotates: bool) -> None:
    rotary = tables(shape[-3], shape[-1], device) if rotates else None
    fast, naive = partial(ops.attention, rotary=rotary), partial(ops.attention.naive, rotary=rotary)
    assert_accurate(fast, naive, draw(device, dtype, shape, shape, shape), slack=2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(384, 82, 8, 64), (96, 901, 8, 64)])
@pytest.mark.parametrize("consecutive", [False, True])
def test_on_models_sizes(dtype: torch.dtype, shape: tuple[int, ...], consecutive: bool) -> None:
    rotary = tables(shape[-3], shape[-1], "cuda")
    fast = partial(ops.attention, rotary=rotary, consecutive=consecutive)
    assert_accurate(
        fast, partial(ops.attention.naive, rotary=rotary), draw("cuda", dtype, shape, shape, shape), slack=2
    )


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_projection_are_read_as_they_lie(device: str) -> None:
    (qkv,) = draw(device, torch.float32, (2, 9, 3, 2, 16))
    parts = qkv.unbind(2)
    assert _projection(*parts).data_ptr() == qkv.data_ptr()
    copies = [part.clone() for part in parts]
    assert torch.equal(_projection(*copies), _projection(*parts))
    assert _projection(parts[0], parts[2], parts[1]).data_ptr() != qkv.data_ptr()

    def of_projection(qkv: Tensor) -> Tensor:
        return ops.attention(*qkv.unbind(2))

    def of_copies(qkv: Tensor) -> Tensor:
        return ops.attention(*(part.clone() for part in qkv.unbind(2)))

    for ours, copied in zip(results(of_projection, [qkv]), results(of_copies, [qkv]), strict=True):
        assert torch.equal(ours, copied)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leading", [(2,), (), (2, 3)])
def test_gradients_of_parts_are_not_put_together_by_a_copy(
    device: str, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (qkv,) = draw(device, torch.float32, (*leading, 9, 3 * 2 * 16))

    def by_parts(qkv: Tensor) -> Tensor:
        return ops.attention(*ops.projection_parts(qkv, 2))

    def by_unbind(qkv: Tensor) -> Tensor:
        return ops.attention(*qkv.unflatten(-1, (3, 2, 16)).unbind(-3))

    wanted = results(by_unbind, [qkv])
    copies = []
    monkeypatch.setattr(torch, "stack", lambda *a, **k: copies.append(a))
    ours = results(by_parts, [qkv])
    monkeypatch.undo()
    assert not copies
    assert all(map(torch.equal, ours, wanted))
    assert_compiles(by_parts, [qkv])


def test_gradients_of_parts_that_lie_apart() -> None:
    (qkv,) = draw("cpu", torch.float64, (3, 5, 2 * 3 * 4))
    torch.autograd.gradcheck(lambda x: [part.sin() * i for i, part in enumerate(ops.projection_parts(x, 2), 1)], [qkv])


@pytest.mark.parametrize("device", DEVICES)
def test_what_kernels_are_not_made_for_runs_the_definition(device: str) -> None:
    q, k, v = draw(device, torch.float32, (2, 5, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16))
    assert_accurate(ops.attention, ops.attention.naive, [q, k, v])
    same = draw(device, torch.float32, *[(2, 5, 2, 16)] * 3)
    assert_accurate(partial(ops.attention, causal=True), partial(ops.attention.naive, causal=True), same)
    odd = draw(device, torch.float32, *[(2, 5, 2, 10)] * 3)
    assert_accurate(ops.attention, ops.attention.naive, odd)
    assert ops.attention(q[:0], k[:0], v[:0]).shape == (0, 5, 2, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_causal_tokens_see_what_came_before(device: str) -> None:
    q, k, v = draw(device, torch.float32, *[(1, 6, 2, 16)] * 3, grad=False)
    out = ops.attention(q, k, v, causal=True)
    for tokens in (1, 4):
        part = ops.attention(q[:, :tokens], k[:, :tokens], v[:, :tokens], causal=True)
        torch.testing.assert_close(out[:, :tokens], part)


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    inputs = draw(device, torch.float32, *[(2, 5, 2, 16)] * 3)
    rotary = tables(5, 16, device)
    torch.library.opcheck(torch.ops.hrm.attention_of_parts.default, (*inputs, *rotary, True, False))
    assert_compiles(partial(ops.attention, rotary=rotary), inputs)


def test_errors() -> None:
    q, k = torch.ones(2, 5, 2, 16), torch.ones(2, 7, 2, 16)
    with pytest.raises(UserError, match=r"attention: v is \[2, 5, 2, 16\] and should be \[2, 7, 2, 16\], as k"):
        ops.attention(q, k, q)
    with pytest.raises(UserError, match=r"attention: k is \[2, 7, 1, 16\] and should be \[2, 7, 2, 16\], as q but for"):
        ops.attention(q, k[:, :, :1], k[:, :, :1])
    with pytest.raises(UserError, match=r"rotary.cos is \[4, 16\] and should be \[5, 16\], tokens by features"):
        ops.attention(q, q, q, rotary=rotary_tables(4, 16, 1e4))
    with pytest.raises(UserError, match=r"attention: q is \[2, 16\]; give \[..., tokens, heads, features\]"):
        ops.attention(q[0, 0], q[0, 0], q[0, 0])
    with pytest.raises(UserError, match="attention: k is float16 and q is float32; give both one dtype"):
        ops.attention(q, q.half(), q)
    with pytest.raises(UserError, match=r"projection is \[2, 5, 2, 16\]; give \[..., tokens, 3 \* 2 \* features\]"):
        ops.projection_parts(q, 2)
