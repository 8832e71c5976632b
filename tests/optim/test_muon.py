"""Muon against PyTorch's, its parts against what they stand for."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hrm.models.layers import keep_copy, kept_copy
from hrm.optim import AdamATan2, Muon
from hrm.optim.muon import orthogonal
from tests.helpers.training import through_a_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(16, 16), (48, 16), (16, 40), (16, 16)]
STACKED = [1, 3, 1, 1]
ALL_SHAPES: list[tuple[int, ...]] = [*SHAPES, (11, 16), (2,)]
LR, WEIGHT_DECAY = 0.02, 0.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), dtype=torch.float32, device=DEVICE)


def parameters() -> list[nn.Parameter]:
    """Four hidden matrices, an embedding and a bias."""
    return [nn.Parameter(draw(*shape, seed=seed)) for seed, shape in enumerate(ALL_SHAPES)]


def muon(params: list[nn.Parameter], **options: Any) -> Muon:
    matrices = dict(zip(params, STACKED, strict=False))
    options = {"rest_lr_ratio": 0.3, "rest_weight_decay": 0.1, "weight_decay": WEIGHT_DECAY} | options
    return Muon(params, options.pop("lr", LR), matrices=matrices, **options)


def gradient(number: int, step: int) -> Tensor:
    """Of parameter `number`; the parameters' are of unlike size."""
    return draw(*ALL_SHAPES[number], seed=100 * step + number) * 10.0 ** (number - 2)


def take(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, param in enumerate(params):
            param.grad = gradient(number, step)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (1, 64, 16), (4, 1, 7)])
def test_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = draw(*shape) * torch.tensor([1e-6, 1.0, 1e4, 3.0], device=DEVICE)[: shape[0], None, None]
    found = orthogonal(matrices).float()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    sizes = torch.linalg.svdvals(found)
    assert sizes.min() > 0.3  # small singular values of square matrices lag behind
    assert sizes.max() < 1.3
    assert torch.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_with_few_iterations_small_singular_values_stay_small() -> None:
    left, right = (torch.linalg.qr(draw(8, 8, seed=seed)).Q for seed in (1, 2))
    matrix = left @ torch.diag(torch.tensor([1.0] * 4 + [0.01] * 4, device=DEVICE)) @ right
    few, many = (torch.linalg.svdvals(orthogonal(matrix[None], steps)[0].float()) for steps in (3, 6))
    assert few[:4].min() > 0.5
    assert few[4:].max() < 0.25
    assert many.min() > 0.5


def test_spectral_scale() -> None:
    """Beside Adam's, which is tested against PyTorch's: a factor for each shape, of one matrix or of several."""
    moves = {}
    for scale in ("adam", "spectral"):
        params = [nn.Parameter(draw(*shape, seed=seed)) for seed, shape in enumerate([(64, 16), (48, 16), (16, 40)])]
        before = [param.detach().clone() for param in params]
        optimizer = Muon(params, LR, matrices=dict(zip(params, (1, 3, 1), strict=True)), scale=scale)
        for param in params:
            param.grad = draw(*param.shape, seed=7)
        optimizer.step()
        moves[scale] = [param.detach() - old for param, old in zip(params, before, strict=True)]
    factors = (2 / (0.2 * 8), 1 / (0.2 * 4), 1 / (0.2 * 40**0.5))
    for adam, spectral, factor in zip(moves["adam"], moves["spectral"], factors, strict=True):
        torch.testing.assert_close(spectral, factor * adam, rtol=1e-3, atol=1e-6)


def test_orthogonal_of_nothing_is_nothing() -> None:
    assert not orthogonal(torch.zeros(2, 4, 4, device=DEVICE)).any()


def test_equals_pytorchs() -> None:
    """PyTorch's works in bfloat16 and on whole parameters: on those that hold several matrices, on each by itself."""
    ours, theirs = parameters(), parameters()
    matrices = [
        [nn.Parameter(part.clone()) for part in param.detach().chunk(stacked)]
        for param, stacked in zip(theirs, STACKED, strict=False)
    ]
    optimizers = [
        torch.optim.Muon(parts, LR, WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw") for parts in matrices
    ]
    optimizer = muon(ours)
    for step in range(1, 5):
        take(optimizer, ours, range(step, step + 1))
        for number, (parts, reference) in enumerate(zip(matrices, optimizers, strict=True)):
            for part, part_grad in zip(parts, gradient(number, step).chunk(STACKED[number]), strict=True):
                part.grad = part_grad
            reference.step()
    for param, before, parts in zip(ours, parameters(), matrices, strict=False):
        moved, expected = param - before, torch.cat(list(parts)) - before
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_rest_is_adam_atan2s() -> None:
    ours, theirs = parameters(), parameters()[len(SHAPES) :]
    take(muon(ours, betas=(0.8, 0.9)), ours, range(1, 5))
    reference = AdamATan2(theirs, LR * 0.3, (0.8, 0.9), 0.1)
    for step in range(1, 5):
        for number, param in enumerate(theirs, start=len(SHAPES)):
            param.grad = gradient(number, step)
        reference.step()
    assert all(torch.equal(one, other) for one, other in zip(ours[len(SHAPES) :], theirs, strict=True))


def test_host_and_device_count_alike() -> None:
    host, device = parameters(), parameters()
    take(muon(host), host, range(1, 5))
    rate = torch.tensor(LR, dtype=torch.float64, device=DEVICE)
    take(muon(device, lr=rate, capturable=True), device, range(1, 5))
    for one, other in zip(host, device, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_changes_where_a_gradient_is_not_finite() -> None:
    params = parameters()
    optimizer = muon(params, lr=torch.tensor(LR, dtype=torch.float64, device=DEVICE), capturable=True)
    take(optimizer, params, range(1, 3))
    before = [param.detach().clone() for param in params]
    state = {key: value.clone() for values in optimizer.state.values() for key, value in values.items()}
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))
    after = {key: value for values in optimizer.state.values() for key, value in values.items()}
    assert all(torch.equal(after[key], value) for key, value in state.items())
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    other = parameters()
    without = muon(other, lr=torch.tensor(LR, dtype=torch.float64, device=DEVICE), capturable=True)
    take(optimizer, params, range(3, 4))
    take(without, other, range(1, 4))
    for one, two in zip(params, other, strict=True):
        torch.testing.assert_close(one, two)


def test_continues_from_its_state() -> None:
    whole, half = parameters(), parameters()
    take(muon(whole), whole, range(1, 6))
    first = muon(half)
    take(first, half, range(1, 3))
    second = muon(half)
    second.load_state_dict(through_a_file(first.state_dict()))
    take(second, half, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(whole, half, strict=True))
    assert all("exp_avg_sq" not in second.state[param] for param in half[: len(SHAPES)])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_writes_the_copies() -> None:
    params = parameters()
    optimizer = muon(params, fused=True, copy_dtype=torch.bfloat16)
    take(optimizer, params, range(1, 3))
    for param in params:
        copy = kept_copy(param)
        assert copy is not None
        assert copy.is_current(param)
        assert torch.equal(copy.values, param.bfloat16())
    keep_copy(params[0], torch.zeros_like(params[0], dtype=torch.bfloat16))
    take(optimizer, params, range(3, 4))
    copy = kept_copy(params[0])
    assert copy is not None
    assert torch.equal(copy.values, params[0].bfloat16())
