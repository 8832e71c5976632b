"""The unrolled recurrence: it computes what the definition does update by update, whichever kernel takes it."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.cycles import Cycles
from hrm.kernels.naive import BlockWeights, RotaryTables, rotary_tables

pytest.importorskip("triton", reason="Triton is not installed")

from hrm.kernels.backends import triton as triton_module
from hrm.kernels.experimental import triton_unrolled
from hrm.kernels.experimental.triton_unrolled import cycles
from hrm.kernels.ops.triton import linear as triton_linear
from hrm.kernels.ops.triton import residual_rms

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
State = tuple[Tensor, Tensor, Tensor]


def problem(
    batch: int, tokens: int, heads: int, head_size: int, inner: int, layers: tuple[int, int], seed: int = 0
) -> tuple[State, list[BlockWeights], list[BlockWeights]]:
    """z_H, z_L and embeddings, blocks of H and blocks of L, in float64."""
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_size

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)
        return values.to(DEVICE)

    def level(count: int) -> list[BlockWeights]:
        shapes = ((3 * width, width), (width, width), (2 * inner, width), (width, inner))
        return [BlockWeights(*(matrix(*shape) for shape in shapes)) for _ in range(count)]

    z_H, z_L, embeddings = torch.randn(3, batch, tokens, width, generator=generator, dtype=torch.float64).to(DEVICE)
    return (z_H, z_L, embeddings), level(layers[0]), level(layers[1])


def in_dtype(blocks: list[BlockWeights], dtype: torch.dtype) -> list[BlockWeights]:
    return [BlockWeights(*(matrix.to(dtype) for matrix in block)) for block in blocks]


def expected(
    state: State,
    H_blocks: list[BlockWeights],
    L_blocks: list[BlockWeights],
    updates: str,
    rotary: RotaryTables | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    z_H, z_L, embeddings = state
    for update in updates:
        if update == "L":
            z_L = naive.reasoning_module(z_L, z_H + embeddings, L_blocks, rotary, heads, EPS)
        else:
            z_H = naive.reasoning_module(z_H, z_L, H_blocks, rotary, heads, EPS)
    return z_H, z_L


def error(actual: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    return max(float((a.double() - r).norm() / r.norm()) for a, r in zip(actual, reference, strict=True))


def check(
    batch: int,
    tokens: int,
    heads: int,
    head_size: int,
    inner: int,
    layers: tuple[int, int],
    updates: str,
    turned: bool,
    dtype: torch.dtype,
    cycles: Cycles = cycles,
) -> None:
    state, H_blocks, L_blocks = problem(batch, tokens, heads, head_size, inner, layers)
    tables = rotary_tables(tokens, head_size, 10000.0)
    rotary = RotaryTables(tables.cos.to(DEVICE), tables.sin.to(DEVICE)) if turned else None
    wide = RotaryTables(rotary.cos.double(), rotary.sin.double()) if rotary else None
    reference = expected(state, H_blocks, L_blocks, updates, wide, heads)
    z_H, z_L, embeddings = (tensor.to(dtype) for tensor in state)
    H_cast, L_cast = in_dtype(H_blocks, dtype), in_dtype(L_blocks, dtype)
    before = z_H.clone(), z_L.clone()
    actual = cycles(z_H, z_L, embeddings, H_cast, L_cast, updates, rotary, heads, EPS)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype]
    assert torch.equal(z_H, before[0])
    assert torch.equal(z_L, before[1])
    if dtype == torch.float32:
        assert error(actual, reference) < 1e-5
    else:
        own = error(expected((z_H, z_L, embeddings), H_cast, L_cast, updates, rotary, heads), reference)
        assert error(actual, reference) < 1.5 * own


@pytest.fixture(params=["persistent", "on chip"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two kernels `cycles` takes."""
    name: str = request.param
    monkeypatch.setattr(triton_unrolled, "_pays_on_chip", lambda *_: name == "on chip")
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "tokens", "layers", "updates", "turned"),
    [
        (1, 5, (1, 2), "LLHLLH", True),
        (3, 16, (2, 1), "LLHL", True),
        (3, 5, (1, 1), "HL", False),
        (1, 16, (1, 3), "L", False),
    ],
)
def test_equals_the_definition(
    kernel: str, batch: int, tokens: int, layers: tuple[int, int], updates: str, turned: bool, dtype: torch.dtype
) -> None:
    if DEVICE == "cuda" and kernel == "on chip" and dtype == torch.float32:
        pytest.skip("no registers for it")
    check(batch, tokens, 2, 32, 128, layers, updates, turned, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("layers", "updates"), [((1, 2), "LLHLLH"), ((2, 1), "LLHL"), ((1, 1), "LHHLL"), ((1, 2), "HLH"), ((0, 1), "LLH")]
)
def test_launch_by_launch(layers: tuple[int, int], updates: str, dtype: torch.dtype) -> None:
    check(2, 5, 2, 32, 72, layers, updates, True, dtype, triton_module.cycles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("updates", ["LLHLLH", "HLL"])
def test_norms_put_off(updates: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's last norm is left to the next block's matmuls: here by plain ones that stand in for Hopper's."""
    calls = []

    def norm_linear(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        calls.append("norm_linear")
        factors = (x.float().square().mean(1) + eps).rsqrt()
        return ((x.float() @ weight.float().T) * factors[:, None]).to(x.dtype), factors

    def linear_residual_rms(
        x: Tensor, weight: Tensor, residual: Tensor, eps: float, save: bool, factors: Tensor | None = None
    ) -> tuple[Tensor, None]:
        scaled = residual.float() if factors is None else residual.float() * factors[:, None]
        total = scaled + x.float() @ weight.float().T
        return torch.nn.functional.rms_norm(total, total.shape[1:], eps=eps).to(x.dtype), None

    hopper = SimpleNamespace(
        norm_linear=norm_linear,
        linear_residual_rms=linear_residual_rms,
        linear=lambda x, weight: x @ weight.T,
        pays_for_linear=lambda x, weight: True,
        pays_for_residual_rms=lambda x, weight: weight.shape[0] == weight.shape[1],
        fits_swiglu=lambda inputs: False,
    )
    for operation in (triton_linear, residual_rms):
        monkeypatch.setattr(operation, "_hopper", lambda x: hopper)
    check(2, 5, 2, 32, 72, (3, 2), updates, True, dtype, triton_module.cycles)
    assert len(calls) == updates.count("L") + 2 * updates.count("H")  # of two layers one, of three two


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (384, 82), (7, 901)])
def test_launch_by_launch_at_full_size(batch: int, tokens: int) -> None:
    check(batch, tokens, 8, 64, 1536, (2, 2), "LLHLLH", True, torch.bfloat16, triton_module.cycles)


@pytest.mark.parametrize(("tokens", "dtype"), [(40, torch.float32), (130, torch.float16)])
def test_tiles_past_the_end_of_rows_columns_and_keys(tokens: int, dtype: torch.dtype) -> None:
    check(2, tokens, 3, 16, 72, (1, 1), "LH", True, dtype)


def test_many_rows_take_the_launches_of_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("update_on_chip", "_update_persistently"):
        monkeypatch.setattr(triton_unrolled, kernel, None)
    monkeypatch.setattr(triton_unrolled, "_MOST_ROWS", 3 * 40 - 1)
    check(3, 40, 2, 16, 72, (1, 2), "LLHL", True, torch.float32)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda arguments: arguments | {"updates": "LXH"}, "LXH"),
        (lambda arguments: arguments | {"updates": ""}, "updates"),
        (lambda arguments: arguments | {"num_heads": 8}, "8 heads"),
        (lambda arguments: arguments | {"z_L": arguments["z_L"][:, :4]}, "z_L"),
        (lambda arguments: arguments | {"rotary": rotary_tables(4, 32, 10000.0)}, "rotary"),
        (lambda arguments: arguments | {"z_H": arguments["z_H"].double()}, "float64"),
    ],
)
def test_says_what_it_cannot_take(spoil: Callable[[dict[str, object]], dict[str, object]], named: str) -> None:
    (z_H, z_L, embeddings), H_blocks, L_blocks = problem(1, 5, 2, 32, 64, (1, 1))
    arguments: dict[str, object] = {
        "z_H": z_H.float(),
        "z_L": z_L.float(),
        "embeddings": embeddings.float(),
        "H_blocks": in_dtype(H_blocks, torch.float32),
        "L_blocks": in_dtype(L_blocks, torch.float32),
        "updates": "L",
        "rotary": None,
        "num_heads": 2,
        "eps": EPS,
    }
    with pytest.raises(UserError, match=named):
        cycles(**spoil(arguments))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (7, 82), (384, 82), (3, 901)])
def test_equals_the_definition_at_full_size(
    batch: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_unrolled, "_MOST_ROWS", batch * tokens)
    layers = (1, 2) if batch == 384 or dtype == torch.float32 else (4, 4)
    check(batch, tokens, 8, 64, 1536, layers, "LLHLLH", True, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (133, 82), (3, 128)])
def test_small_model_equals_the_definition_at_full_size(batch: int, tokens: int) -> None:
    check(batch, tokens, 4, 32, 512, (4, 4), "LLHLLH", True, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_replayed_graphs_and_calls_in_a_row_give_the_same_bits() -> None:
    (z_H, z_L, embeddings), H_blocks, L_blocks = problem(3, 82, 8, 64, 1536, (2, 2))
    z_H, z_L, embeddings = (tensor.bfloat16() for tensor in (z_H, z_L, embeddings))
    blocks = in_dtype(H_blocks, torch.bfloat16), in_dtype(L_blocks, torch.bfloat16)

    def twice() -> tuple[Tensor, Tensor]:
        after_one = cycles(z_H, z_L, embeddings, *blocks, "LLHLLH", None, 8, EPS)
        return cycles(*after_one, embeddings, *blocks, "LLHL", None, 8, EPS)

    reference = twice()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = twice()
    for _ in range(20):
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        again = twice()
        for a, b, c in zip(reference, captured, again, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
