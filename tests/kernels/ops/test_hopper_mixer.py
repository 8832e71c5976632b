"""The Hopper kernel that mixes tokens against float64: on such a GPU as it is, elsewhere its source by threads."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels import naive  # noqa: E402
from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights  # noqa: E402
from hrm.kernels.ops.hopper import mixer as hopper_mixer  # noqa: E402
from hrm.kernels.ops.triton.mixer import Saved, mix_tokens  # noqa: E402
from tests.helpers.fake_gluon import Descriptor, FakeGluon, Number, Pointer, on_cpu  # noqa: E402

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if ON_HOPPER else "cpu"
EPS = 1e-5
Weights = MixerWeights | NormGatedMixerWeights
Gate = type[MixerWeights] | type[NormGatedMixerWeights]
GATES: list[Gate] = [MixerWeights, NormGatedMixerWeights]


def draw(
    shape: tuple[int, int, int], inner: int, gate: Gate, injected: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Weights]:
    """State, injection or None, and weights whose gates are neither shut nor wide open."""
    generator = torch.Generator().manual_seed(shape[1] * 1000 + inner)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(DEVICE, dtype)

    tokens = shape[1]
    mixer = normal(2 * inner, tokens, scale=2 * tokens**-0.5), normal(tokens, inner, scale=inner**-0.5)
    weights = gate(*mixer, normal(8, 8), normal(8, 8))
    return normal(*shape), normal(*shape) if injected else None, weights


def check(actual: Tensor, state: Tensor, injection: Tensor | None, weights: Weights) -> None:
    x = state if injection is None else state + injection
    exact = naive.mix_tokens(x.double(), type(weights)(*(weight.double() for weight in weights)), EPS)
    # Hidden units and the result are rounded to 16 bit.
    assert (actual.double() - exact).norm() / exact.norm() < torch.finfo(actual.dtype).eps / 2


def saved_of(state: Tensor, injection: Tensor | None, weights: Weights) -> Saved:
    """Room for what a backward needs."""
    tile, vector = torch.full_like(state, math.nan), torch.full(state[:, 0].shape, math.nan, device=state.device)
    normed = isinstance(weights, NormGatedMixerWeights)
    return Saved(
        None if injection is None else tile.clone(),
        tile if normed else None,
        vector,
        vector.clone() if normed else None,
    )


def check_saved(saved: Saved, state: Tensor, injection: Tensor | None, weights: Weights) -> None:
    x = state if injection is None else state + injection
    assert saved.total is None or torch.equal(saved.total, x)
    exact = type(weights)(*(weight.double() for weight in weights))
    features = x.double().mT
    gate, up = (features @ exact.token_gate_up.T).chunk(2, -1)
    factors = torch.ones_like(gate[..., 0])
    if isinstance(weights, NormGatedMixerWeights):
        factors = ((gate * up).square().mean(-1) + EPS).rsqrt()
    mixed = (gate.sigmoid() * gate * up * factors[..., None]) @ exact.token_down.T
    rstd = ((features + mixed).square().mean(-1) + EPS).rsqrt()
    wanted = {"kept": mixed.mT, "rstd": rstd, "factors": factors}
    for name, value in wanted.items():
        found = getattr(saved, name)
        if found is not None:
            assert (found.double() - value).norm() / value.norm() < torch.finfo(state.dtype).eps, name


def run_on_cpu(
    state: Tensor,
    injection: Tensor | None,
    weights: Weights,
    rounded: Tensor | None,
    multiprocessors: int,
    saved: Saved,
) -> Tensor:
    """`hopper_mixer.mix_tokens` on a GPU of so many multiprocessors."""
    batch, tokens, width = state.shape
    inner = weights.token_down.shape[1]
    out = torch.full_like(state, math.nan)
    pieces, chunk = hopper_mixer._pieces(tokens), hopper_mixer._CHUNK
    both = weights.token_gate_up.view(2, inner, tokens)
    descriptors = [
        *(Descriptor(state, 1, piece, 64) for piece in pieces),
        *(None if injection is None else Descriptor(injection, 1, piece, 64) for piece in pieces),
        *(Descriptor(both, 2, chunk, piece) for piece in pieces),
        *(Descriptor(weights.token_down, piece, chunk) for piece in pieces),
        *(Descriptor(out, 1, piece, 64) for piece in pieces),
    ]
    programs = min(batch * -(-width // 64), multiprocessors)
    for program in range(programs):
        gluon = FakeGluon(program, programs, seed=program)
        on_cpu(hopper_mixer, "_mix_tokens_kernel", gluon, tanh=torch.tanh)(
            *descriptors,
            None if rounded is None else Pointer(rounded),
            *(None if tensor is None else Descriptor(tensor, 1, piece, 64) for tensor in saved[:2] for piece in pieces),
            *(None if vector is None else Pointer(vector) for vector in saved[2:]),
            Number(batch),
            Number(width),
            EPS,
            tokens,
            inner,
            hopper_mixer._stages(tokens, inner),
            isinstance(weights, NormGatedMixerWeights),
        )
    return out


@pytest.mark.skipif(ON_HOPPER, reason="the GPU itself runs it")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(
    ("shape", "inner", "multiprocessors"),
    [
        ((2, 88, 128), 256, 1),  # one program has all four tiles, more than there are groups or slots
        ((3, 82, 72), 200, 2),  # features and hidden units that end within a tile
        ((1, 97, 64), 64, 132),  # a single tile: two groups have nothing to do
        ((2, 97, 128), 256, 1),  # weights stream past, of four tiles in groups of three
        ((5, 12, 128), 32, 1),  # the second piece of the tokens is empty
    ],
)
def test_on_the_cpu(
    shape: tuple[int, int, int], inner: int, multiprocessors: int, injected: bool, saving: bool, gate: Gate
) -> None:
    state, injection, weights = draw(shape, inner, gate, injected, torch.float16)
    rounded = torch.full_like(state, math.nan, dtype=torch.bfloat16) if injected else None
    saved = saved_of(state, injection, weights) if saving else Saved()
    out = run_on_cpu(state, injection, weights, rounded, multiprocessors, saved)
    check(out, state, injection, weights)
    assert rounded is None or torch.equal(rounded, out.to(torch.bfloat16))
    check_saved(saved, state, injection, weights)


@pytest.mark.parametrize("tokens", [1, 16, 33, 82, 88, 97, 128])
@pytest.mark.parametrize("inner", [32, 256, 1024])
def test_pieces_hold_all_tokens_and_fit_into_shared_memory(tokens: int, inner: int) -> None:
    first, rest = hopper_mixer._pieces(tokens)
    assert first + rest >= tokens
    assert {first, rest} <= {16, 32, 64}
    stages = hopper_mixer._stages(tokens, inner)
    weights = 3 * hopper_mixer._CHUNK * stages
    assert 2 * (first + rest) * (weights + 64 * (hopper_mixer._GROUPS.value + hopper_mixer._SLOTS.value)) < 227 * 1024
    assert min(2, -(-inner // hopper_mixer._CHUNK)) <= stages


@pytest.mark.parametrize(
    ("shape", "inner", "dtype", "fits"),
    [
        ((1, 88, 512), 256, torch.bfloat16, True),
        ((1, 82, 72), 200, torch.float16, True),
        ((1, 129, 512), 256, torch.bfloat16, False),
        ((1, 88, 508), 256, torch.bfloat16, False),  # rows of x would not begin at multiples of 16 bytes
        ((1, 88, 512), 252, torch.bfloat16, False),  # nor those of the weights
        ((1, 88, 512), 256, torch.float32, False),
    ],
)
def test_what_fits(shape: tuple[int, int, int], inner: int, dtype: torch.dtype, fits: bool) -> None:
    state, _, weights = draw(shape, inner, MixerWeights, False, dtype)
    assert hopper_mixer.fits(state, None, weights.token_gate_up, weights.token_down) == fits


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel's operation takes it, but for operands that it does not take."""
    monkeypatch.setattr("hrm.kernels.ops.triton.mixer.hopper.why_not", lambda device: None)
    monkeypatch.setattr(hopper_mixer, "mix_tokens", lambda *arguments: arguments)
    state, injection, weights = draw((2, 88, 32), 64, NormGatedMixerWeights, True, torch.float16)
    taken = mix_tokens(state, injection, weights, EPS)
    assert all(map(operator.is_, taken, (state, injection, *weights[:2], True, EPS, None)))
    narrow = mix_tokens(state.float(), None, NormGatedMixerWeights(*(weight.float() for weight in weights)), EPS)
    assert narrow.shape == state.shape


def cases() -> Iterator[tuple[tuple[int, int, int], int, Gate, bool, torch.dtype]]:
    for gate, injected, dtype in itertools.product(GATES, (False, True), (torch.bfloat16, torch.float16)):
        yield (384, 88, 512), 256, gate, injected, dtype
    for shape, inner in (
        ((1, 88, 512), 256),
        ((37, 82, 512), 256),
        ((5, 81, 200), 200),
        ((384, 97, 512), 512),
        ((3, 88, 512), 1024),
        ((2, 128, 64), 64),
        ((7, 12, 64), 32),
    ):
        yield shape, inner, NormGatedMixerWeights, True, torch.bfloat16
        yield shape, inner, MixerWeights, False, torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("shape", "inner", "gate", "injected", "dtype"), list(cases()))
def test_on_the_gpu(shape: tuple[int, int, int], inner: int, gate: Gate, injected: bool, dtype: torch.dtype) -> None:
    state, injection, weights = draw(shape, inner, gate, injected, dtype)
    rounded = torch.empty_like(state, dtype=torch.float8_e4m3fn) if injected else None
    out = mix_tokens(state, injection, weights, EPS, rounded)
    assert rounded is None or torch.equal(rounded.float(), out.to(rounded.dtype).float())
    some = slice(None, None, 19)  # in float64, all hidden units are more than memory holds
    check(out[some], state[some], None if injection is None else injection[some], weights)
    for _ in range(3):
        assert torch.equal(out, mix_tokens(state, injection, weights, EPS))
