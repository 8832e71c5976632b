"""The Hopper attention kernel against float64: on such a GPU as it is, elsewhere its source by threads on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels import naive  # noqa: E402
from hrm.kernels.naive import RotaryTables, rotary_tables  # noqa: E402
from hrm.kernels.ops.e4m3 import E4M3  # noqa: E402
from hrm.kernels.ops.hopper import attention as hopper_attention  # noqa: E402
from tests.helpers.fake_gluon import Descriptor, FakeGluon, Number, Pointer, on_cpu  # noqa: E402

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if ON_HOPPER else "cpu"
HEAD_SIZE = 64


def run_on_cpu(
    qkv: Tensor, rotary: RotaryTables, num_heads: int, multiprocessors: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`hopper_attention.attention_forward` on a GPU of so many multiprocessors."""
    batch, tokens, width = qkv.shape
    out = torch.full((batch, tokens, width // 3), math.nan).to(dtype or qkv.dtype)
    lse = torch.full((batch, num_heads, tokens), math.nan)
    programs, _ = hopper_attention._programs(batch, tokens, num_heads, multiprocessors)
    for program in range(programs):
        on_cpu(hopper_attention, "_forward_kernel", FakeGluon(program, programs, seed=program))(
            Descriptor(qkv, 1, 64, HEAD_SIZE),
            Descriptor(qkv, 1, hopper_attention._KEYS, HEAD_SIZE),
            Descriptor(qkv, 1, hopper_attention._rest(tokens), HEAD_SIZE),
            Descriptor(out, 1, 64, HEAD_SIZE),
            Pointer(rotary.cos),
            Pointer(rotary.sin),
            Pointer(lse),
            Number(batch * num_heads),
            tokens,
            num_heads,
            hopper_attention._stages(tokens),
        )
    return out, lse


def draw(batch: int, tokens: int, num_heads: int, dtype: torch.dtype) -> tuple[Tensor, RotaryTables]:
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    qkv = torch.randn(batch, tokens, 3 * num_heads * HEAD_SIZE, generator=generator).to(DEVICE, dtype)
    tables = rotary_tables(tokens, HEAD_SIZE, 10000.0)
    return qkv, RotaryTables(tables.cos.to(DEVICE), tables.sin.to(DEVICE))


def definition(qkv: Tensor, rotary: RotaryTables, num_heads: int) -> tuple[Tensor, Tensor]:
    """The result and the logarithms to base 2 of its rows' normalisers, in float64 but for the rotation."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, HEAD_SIZE).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = naive.rotate(q, rotary).double(), naive.rotate(k, rotary).double()
    scores = q @ k.mT / math.sqrt(HEAD_SIZE)
    out = torch.softmax(scores, -1) @ v.double()
    return out.transpose(1, 2).reshape(batch, tokens, width // 3), torch.logsumexp(scores, -1) / math.log(2)


def check(results: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Probabilities and the result are rounded to 16 bit, a row's normaliser is not."""
    epsilon = torch.finfo(results[0].dtype).eps
    assert (results[0].double() - exact[0]).norm() / exact[0].norm() < epsilon / 2
    # A rotated feature may be rounded to the neighbour of what the definition has.
    assert (results[1].double() - exact[1]).abs().max() < epsilon


@pytest.mark.skipif(ON_HOPPER, reason="the GPU itself runs it")
@pytest.mark.parametrize(
    ("batch", "tokens", "num_heads", "multiprocessors"),
    [
        (1, 513, 3, 1),  # 4 stages, as many as full tiles of keys; one program with all heads
        (1, 700, 3, 2),  # a program begins within a head; rest of 64 keys
        (2, 901, 2, 3),  # 3 stages, rest of 16 keys, and runs that end within a head
        (1, 1024, 2, 4),  # 2 stages; no token past the last tile of keys
    ],
)
def test_on_the_cpu(batch: int, tokens: int, num_heads: int, multiprocessors: int) -> None:
    qkv, rotary = draw(batch, tokens, num_heads, torch.float16)
    check(run_on_cpu(qkv, rotary, num_heads, multiprocessors), definition(qkv, rotary, num_heads))


def test_on_the_cpu_in_e4m3() -> None:
    """Rounded once, from what is in float32: on the CPU, to the number that the float64 result lies next to."""
    qkv, rotary = draw(1, 700, 1, torch.float16)
    out, _ = run_on_cpu(qkv, rotary, 1, 1, E4M3)
    assert_rounded_to_e4m3(out, definition(qkv, rotary, 1)[0])


def assert_rounded_to_e4m3(out: Tensor, exact: Tensor) -> None:
    """As far off as rounding alone makes it, but where probabilities in 16 bit lead to the number beside."""
    error, least = ((x.double() - exact).norm() / exact.norm() for x in (out, exact.float().to(E4M3)))
    assert error < 1.01 * least


def test_shared_memory_holds_what_it_takes() -> None:
    for tokens in range(513, 1100):
        rows = (tokens - 1) // 128 * 128 + 2 * hopper_attention._rest(tokens) + 2 * 192
        stages = hopper_attention._stages(tokens)
        assert (rows + 128 * stages) * 2 * HEAD_SIZE < 227 * 1024
        assert hopper_attention._rest(tokens) >= (tokens - 1) % 128 + 1


@pytest.mark.parametrize(
    ("batch", "tokens", "multiprocessors"), [(96, 901, 132), (1, 901, 132), (7, 600, 4), (3, 513, 1)]
)
def test_programs_share_all_tiles_and_none_is_idle(batch: int, tokens: int, multiprocessors: int) -> None:
    tiles = batch * 8 * -(-tokens // 192)
    programs, most = hopper_attention._programs(batch, tokens, 8, multiprocessors)
    assert programs <= multiprocessors
    assert (programs - 1) * most < tiles <= programs * most


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [513, 640, 700, 901, 1000, 1024])
@pytest.mark.parametrize("batch", [1, 19, 96])
def test_on_the_gpu(batch: int, tokens: int, dtype: torch.dtype) -> None:
    qkv, rotary = draw(batch, tokens, 8, dtype)
    out, lse = hopper_attention.attention_forward(qkv, rotary.cos, rotary.sin, 8, save_lse=True)
    assert lse is not None
    for i in range(0, batch, 19):  # a few sequences: in float64, all scores are more than memory holds
        check((out[i : i + 1], lse[i : i + 1]), definition(qkv[i : i + 1], rotary, 8))
    for _ in range(3):
        again, none = hopper_attention.attention_forward(qkv, rotary.cos, rotary.sin, 8, save_lse=False)
        assert none is None
        assert torch.equal(out, again)
    rounded, _ = hopper_attention.attention_forward(qkv, rotary.cos, rotary.sin, 8, save_lse=False, dtype=E4M3)
    assert_rounded_to_e4m3(rounded[:1], definition(qkv[:1], rotary, 8)[0])
