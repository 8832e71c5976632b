"""The Hopper kernels for gradients of the half that mixes tokens, their source by threads on the CPU, against those in
Triton, which `tests/kernels/test_triton_mixer.py` compares with the definition: on a Hopper GPU with these in place.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels import naive  # noqa: E402
from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights  # noqa: E402
from hrm.kernels.ops.hopper import mixer_backward  # noqa: E402
from tests.helpers.fake_gluon import Descriptor, FakeGluon, Number, Pointer, on_cpu  # noqa: E402

EPS = 1e-5


def packed(gate_up: Tensor, down: Tensor, parts: tuple[int, int]) -> Tensor:
    """[3, hidden, tokens]: gate, up and down transposed, with zeros to whole tiles."""
    T, G = down.shape
    hidden = -(-G // 64) * 64
    matrices = torch.zeros(3, hidden, sum(parts), dtype=down.dtype)
    matrices[:2, :G, :T] = gate_up.view(2, G, T)
    matrices[2, :G, :T] = down.T
    return matrices


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def run(kernel: str, programs: int, *arguments: object) -> None:
    for program in range(programs):
        gluon = FakeGluon(program, programs, seed=program)
        on_cpu(mixer_backward, kernel, gluon, _sigmoid=torch.sigmoid)(*arguments)


@pytest.mark.parametrize("gate", [MixerWeights, NormGatedMixerWeights])
@pytest.mark.parametrize(
    ("shape", "inner", "parts", "programs"),
    [
        ((2, 88, 128), 128, (64, 32), 1),  # one program has all four tiles
        ((3, 42, 72), 100, (32, 16), 2),  # features, tokens and hidden units that end within a tile
        ((1, 20, 64), 64, (16, 16), 4),  # one tile, one group with nothing to do
    ],
)
def test_on_the_cpu(shape: tuple[int, int, int], inner: int, parts: tuple[int, int], programs: int, gate: type) -> None:
    B, T, D = shape
    generator = torch.Generator().manual_seed(T)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).half()

    x, dy = normal(B, T, D), normal(B, T, D)
    gate_up, down = normal(2 * inner, T, scale=2 * T**-0.5), normal(T, inner, scale=inner**-0.5)
    exact = [tensor.double().requires_grad_() for tensor in (x, gate_up, down)]
    y = naive.mix_tokens(exact[0], gate(exact[1], exact[2], *exact[1:]), EPS)
    (wanted,) = torch.autograd.grad(y, exact[:1], dy.double())

    gates, ups = (exact[0].detach().mT @ exact[1].detach().T).chunk(2, -1)  # [B, D, inner]
    normed = gate is NormGatedMixerWeights
    factors = torch.ones(B, D).double()
    if normed:
        factors = ((gates * ups).square().mean(-1) + EPS).rsqrt()
    mixed = (gates.sigmoid() * gates * ups * factors[..., None]) @ exact[2].detach().T  # [B, D, T]
    rstd = ((exact[0].detach().mT + mixed).square().mean(-1) + EPS).rsqrt().float()
    kept = (mixed.mT if normed else y.detach()).half().contiguous()

    matrices = packed(gate_up, down, parts)
    hidden = matrices.shape[1]
    dx, d_mixed = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    shares = torch.full((B, D), math.nan)
    per_sequence = -(-D // 64)
    run(
        "_state_kernel",
        programs,
        *(Descriptor(tensor, 1, part, 64) for tensor in (x, kept, dy) for part in parts),
        *(Descriptor(matrices, count, 32, part) for count in (2, 1) for part in parts),
        *(Descriptor(tensor, 1, part, 64) for tensor in (dx, d_mixed) for part in parts),
        Pointer(rstd),
        Pointer(factors.float()) if normed else None,
        Pointer(shares) if normed else None,
        Number(B * per_sequence),
        Number(per_sequence),
        T,
        D,
        inner,
        hidden // 32,
        4,
        normed,
    )
    assert error(dx, wanted) < 1e-3
    exact_y, exact_dy = y.detach().mT, dy.double().mT
    d_total = rstd.double()[..., None] * (exact_dy - exact_y * (exact_dy * exact_y).mean(-1, keepdim=True))
    assert error(d_mixed, (d_total * factors[..., None]).mT) < 1e-3
    assert not normed or error(shares, (d_total * mixed).sum(-1) * factors**2 / inner) < 1e-3


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "programs"),
    [
        ((300, 128, 192), 2),  # rows and columns that end within a tile, more than one tile of rows for a program
        ((100, 64, 72), 4),
    ],
)
def test_the_gate_on_the_cpu(sizes: tuple[int, int, int], programs: int, normed: bool) -> None:
    M, D, F = sizes
    generator = torch.Generator().manual_seed(M)
    d_mixed, down, projected = (
        torch.randn(shape, generator=generator).half() for shape in ((M, D), (D, F), (M, 2 * F))
    )
    shares = torch.randn(M, generator=generator)
    found = torch.full_like(projected, math.nan)
    run(
        "_gate_kernel",
        min(programs, -(-M // 128) * -(-F // 128)),
        Descriptor(d_mixed, 128, 64),
        Descriptor(down, 64, 64),
        *(Descriptor(half, 128, 64) for of in (projected, found) for half in (of[:, :F], of[:, F:])),
        Pointer(shares) if normed else None,
        Number(M),
        Number(F),
        D // 64,
        4,
    )
    gate, up = projected.double().requires_grad_().chunk(2, -1)
    product = gate * up
    taken = product.square().sum(-1) @ shares.double() / 2 if normed else 0
    loss = (gate.sigmoid() * product * (d_mixed.double() @ down.double())).sum() - taken
    wanted = torch.cat(torch.autograd.grad(loss, [gate, up]), -1)
    assert error(found, wanted) < 1e-3
