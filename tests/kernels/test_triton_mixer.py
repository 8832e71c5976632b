"""Both halves of a block that mixes tokens against their definition in float64, forward and backward.

Without a GPU the kernels run in Triton's interpreter, whose matmul misreads bfloat16; on a GPU the same tests take the
sizes that models have too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from hrm.kernels import naive  # noqa: E402
from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights  # noqa: E402
from hrm.kernels.ops.triton import mixer, mixer_backward  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]

Weights = MixerWeights | NormGatedMixerWeights
Half = Callable[[Tensor, Tensor, Weights], Tensor]


def tokens(x: Tensor, injection: Tensor, weights: Weights) -> Tensor:
    return mixer_backward.mix_tokens(x, injection, weights, EPS)


def features(x: Tensor, injection: Tensor, weights: Weights) -> Tensor:
    rows = (x + injection).view(-1, x.shape[-1])
    return mixer_backward.mix_features(rows, weights, EPS).view(x.shape)


def naive_tokens(x: Tensor, injection: Tensor, weights: Weights) -> Tensor:
    return naive.mix_tokens(x + injection, weights, EPS)


def naive_features(x: Tensor, injection: Tensor, weights: Weights) -> Tensor:
    rows = x + injection
    gate_up, down = weights.gate_up, weights.down
    if isinstance(weights, NormGatedMixerWeights):
        return naive.rms_norm(rows + naive.norm_gated(rows, gate_up, down, EPS), EPS)
    return naive.rms_norm(rows + naive.swiglu(rows, gate_up, down), EPS)


HALVES: dict[str, tuple[Half, Half, tuple[int, int]]] = {
    "tokens": (tokens, naive_tokens, (2, 4)),
    "features": (features, naive_features, (4, 6)),
}


def draw(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, sharp: float, down: float
) -> tuple[list[Tensor], Tensor]:
    """State, injection and the four matrices, `sharp` times as large as fresh ones, and the gradient of the result."""
    B, T, D, G, F = sizes
    generator = torch.Generator().manual_seed(B + T)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    state, injection, grad = (normal(B, T, D) for _ in range(3))
    matrices = [
        normal(2 * G, T, scale=sharp * T**-0.5),
        normal(T, G, scale=sharp * down * G**-0.5),
        normal(2 * F, D, scale=sharp * D**-0.5),
        normal(D, F, scale=sharp * down * F**-0.5),
    ]
    return [state, injection, *matrices], grad


def differentiated(
    half: Half, block_type: type, inputs: Sequence[Tensor], grad: Tensor, used: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    """The result, then the gradients of both states and of the half's two matrices."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = half(leaves[0], leaves[1], block_type(*leaves[2:]))
    return [out.detach(), *torch.autograd.grad(out, [*leaves[:2], *leaves[slice(*used)]], grad.to(dtype))]


# One sequence; odd sizes beyond and below a tile's; and, on a GPU, those of recipes.
SIZES = [(1, 17, 48, 40, 80), (3, 5, 80, 72, 64)]
RECIPES = [(33, 88, 512, 256, 1536), (5, 97, 256, 256, 768), (7, 82, 512, 256, 1536)]


@pytest.mark.parametrize(("sharp", "down"), [(6.0, 1.0), (1.0, 0.02)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES + RECIPES * ON_GPU)
@pytest.mark.parametrize("block_type", [MixerWeights, NormGatedMixerWeights])
@pytest.mark.parametrize("half", HALVES)
def test_gradients(
    half: str, block_type: type, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, sharp: float, down: float
) -> None:
    """Late in training the gates are sharp; where they add little, the norm's part of the gradient is a small rest."""
    ours, definition, used = HALVES[half]
    inputs, grad = draw(sizes, dtype, sharp, down)
    exact = differentiated(definition, block_type, inputs, grad, used, torch.float64)
    plain = differentiated(definition, block_type, inputs, grad, used, dtype)
    found = differentiated(ours, block_type, inputs, grad, used, dtype)
    for name, wanted, own, result in zip(
        ["out", "state", "injection", "gate_up", "down"], exact, plain, found, strict=True
    ):
        error, usual = (((x.double() - wanted).norm() / wanted.norm()).item() for x in (result, own))
        assert error <= (1e-5 if dtype == torch.float32 else 1.5 * usual), (name, error, usual)
    again = differentiated(ours, block_type, inputs, grad, used, dtype)
    assert all(map(torch.equal, found, again)), "a second run differs"


@pytest.mark.parametrize("half", HALVES)
def test_only_the_gradients_that_are_wanted(half: str) -> None:
    ours, _, (first, last) = HALVES[half]
    inputs, grad = draw(SIZES[0], DTYPES[0], 1.0, 1.0)
    wanted = differentiated(ours, NormGatedMixerWeights, inputs, grad, (first, last), DTYPES[0])
    for trained in ([0], [first], [last - 1], [1, last - 1]):
        leaves = [tensor.clone().requires_grad_(index in trained) for index, tensor in enumerate(inputs)]
        torch.autograd.backward(ours(leaves[0], leaves[1], NormGatedMixerWeights(*leaves[2:])), grad)
        found = [leaf.grad for leaf in [*leaves[:2], *leaves[first:last]]]
        assert [index for index, gradient in enumerate(found) if gradient is not None] == [
            index if index < 2 else 2 + index - first for index in trained
        ]
        for gradient, expected in zip(found, wanted[1:], strict=True):
            assert gradient is None or torch.equal(gradient, expected)


def test_a_state_may_be_injected_into_itself() -> None:
    inputs, grad = draw(SIZES[1], DTYPES[0], 1.0, 1.0)
    x, weights = inputs[0].requires_grad_(), NormGatedMixerWeights(*inputs[2:])
    twice = torch.autograd.grad(tokens(x, x, weights), x, grad)[0]
    other = x.detach().clone().requires_grad_()
    torch.testing.assert_close(twice, 2 * torch.autograd.grad(tokens(x, other, weights), other, grad)[0])


@pytest.mark.parametrize("block_type", [MixerWeights, NormGatedMixerWeights])
def test_mixed_tokens_in_another_format(block_type: type) -> None:
    inputs, _ = draw(SIZES[1], DTYPES[0], 1.0, 1.0)
    rounded = torch.empty_like(inputs[0], dtype=torch.float8_e4m3fn if ON_GPU else torch.float16)
    y = mixer.mix_tokens(inputs[0], inputs[1], block_type(*inputs[2:]), EPS, rounded)
    torch.testing.assert_close(rounded.double(), y.to(rounded.dtype).double(), rtol=0.13 * ON_GPU, atol=2**-9 * ON_GPU)
    assert torch.equal(y, mixer.mix_tokens(inputs[0], inputs[1], block_type(*inputs[2:]), EPS))
