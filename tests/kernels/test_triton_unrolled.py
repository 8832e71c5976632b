"""The unrolled recurrence: it computes what the definition does update by update, whichever kernel takes it."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, RotaryTables, rotary_tables
from hrm.kernels.schedule import Run, Schedule, Update, looped

pytest.importorskip("triton", reason="Triton is not installed")

from hrm.kernels.backends import triton as triton_module
from hrm.kernels.experimental import triton_unrolled
from hrm.kernels.experimental.triton_unrolled import run
from hrm.kernels.ops.triton import linear as triton_linear
from hrm.kernels.ops.triton import residual_rms

pytestmark = pytest.mark.slow  # an experiment, in Triton's interpreter

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
States = dict[str, Tensor]
Modules = dict[str, list[BlockWeights]]


def schedule(updates: str) -> Schedule:
    """Of HRM's two states, from a text of their letters."""
    kinds = {"L": Update("z_L", ("z_H", "embeddings"), "L_level"), "H": Update("z_H", ("z_L",), "H_level")}
    return [kinds[letter] for letter in updates]


def problem(
    batch: int, tokens: int, heads: int, head_size: int, inner: int, layers: tuple[int, int], seed: int = 0
) -> tuple[States, Modules]:
    """States, and modules of so many layers of H and of L, in float64."""
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_size

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)
        return values.to(DEVICE)

    def level(count: int) -> list[BlockWeights]:
        shapes = ((3 * width, width), (width, width), (2 * inner, width), (width, inner))
        return [BlockWeights(*(matrix(*shape) for shape in shapes)) for _ in range(count)]

    z_H, z_L, embeddings = torch.randn(3, batch, tokens, width, generator=generator, dtype=torch.float64).to(DEVICE)
    states = {"z_H": z_H, "z_L": z_L, "embeddings": embeddings}
    return states, {"H_level": level(layers[0]), "L_level": level(layers[1])}


def in_dtype(states: States, modules: Modules, dtype: torch.dtype) -> tuple[States, Modules]:
    return {name: state.to(dtype) for name, state in states.items()}, {
        name: [BlockWeights(*(matrix.to(dtype) for matrix in block)) for block in blocks]
        for name, blocks in modules.items()
    }


definition = looped(naive.reasoning_module)  # which tests/models/test_model.py holds against HRM's equations


def error(actual: States, reference: States) -> float:
    assert actual.keys() == reference.keys()
    return max(float((actual[name].double() - r).norm() / r.norm()) for name, r in reference.items())


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
    run: Run = run,
) -> None:
    check_schedule(batch, tokens, heads, head_size, inner, layers, schedule(updates), turned, dtype, run)


def check_schedule(
    batch: int,
    tokens: int,
    heads: int,
    head_size: int,
    inner: int,
    layers: tuple[int, int],
    updates: Schedule,
    turned: bool,
    dtype: torch.dtype,
    run: Run = run,
) -> None:
    exact_states, exact_modules = problem(batch, tokens, heads, head_size, inner, layers)
    tables = rotary_tables(tokens, head_size, 10000.0)
    rotary = RotaryTables(tables.cos.to(DEVICE), tables.sin.to(DEVICE)) if turned else None
    wide = RotaryTables(rotary.cos.double(), rotary.sin.double()) if rotary else None
    reference = definition(exact_states, updates, exact_modules, KernelContext(wide, heads, EPS))
    context = KernelContext(rotary, heads, EPS)
    states, modules = in_dtype(exact_states, exact_modules, dtype)
    before = {name: state.clone() for name, state in states.items()}
    actual = run(states, updates, modules, context)
    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    assert all(torch.equal(states[name], state) for name, state in before.items())
    if dtype == torch.float32:
        assert error(actual, reference) < 1e-5
    else:
        own = error(definition(states, updates, modules, context), reference)
        assert error(actual, reference) < 1.5 * own


@pytest.fixture(params=["persistent", "on chip"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two kernels `run` takes."""
    name: str = request.param
    kernels = {"persistent": triton_unrolled._update_persistently, "on chip": triton_unrolled.update_on_chip}
    monkeypatch.setattr(triton_unrolled, "_choose", lambda *_: kernels[name])
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
    check(2, 5, 2, 32, 72, layers, updates, True, dtype, triton_module.run)


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
    check(2, 5, 2, 32, 72, (3, 2), updates, True, dtype, triton_module.run)
    assert len(calls) == updates.count("L") + 2 * updates.count("H")  # of two layers one, of three two


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (384, 82), (7, 901)])
def test_launch_by_launch_at_full_size(batch: int, tokens: int) -> None:
    check(batch, tokens, 8, 64, 1536, (2, 2), "LLHLLH", True, torch.bfloat16, triton_module.run)


@pytest.mark.parametrize(("tokens", "dtype"), [(40, torch.float32), (130, torch.float16)])
def test_tiles_past_the_end_of_rows_columns_and_keys(tokens: int, dtype: torch.dtype) -> None:
    check(2, tokens, 3, 16, 72, (1, 1), "LH", True, dtype)


def test_many_rows_take_the_launches_of_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("update_on_chip", "_update_persistently"):
        monkeypatch.setattr(triton_unrolled, kernel, None)
    monkeypatch.setattr(triton_unrolled, "_MOST_ROWS", 3 * 40 - 1)
    check(3, 40, 2, 16, 72, (1, 2), "LLHL", True, torch.float32)


# Other recurrences of the same states and modules, which only the launches of the triton backend take.
OTHERS = {
    "inputs the other way round": [
        Update("z_L", ("embeddings", "z_H"), "L_level"),
        Update("z_L", ("embeddings", "z_H"), "L_level"),
        Update("z_H", ("z_L",), "H_level"),
        Update("z_L", ("embeddings", "z_H"), "L_level"),
    ],
    "one state": [Update("z_H", ("embeddings",), "L_level")] * 3,
    "a state that takes itself": [Update("z_H", ("z_H", "embeddings"), "L_level")] * 2,
    "three inputs": [
        Update("z_L", ("z_H", "embeddings"), "L_level"),
        Update("z_H", ("embeddings", "z_L", "z_H"), "H_level"),
        Update("z_L", ("z_H", "z_L", "embeddings"), "L_level"),
    ],
    "a constant replaced": [Update("z_L", ("z_H",), "L_level"), Update("embeddings", ("z_L",), "H_level")] * 2,
    "what is new is not used at once": [
        Update("z_L", ("z_H",), "L_level"),
        Update("z_H", ("embeddings",), "H_level"),
        Update("z_L", ("embeddings",), "L_level"),
    ],
}


@pytest.mark.parametrize("run", [run, triton_module.run])
@pytest.mark.parametrize("recurrence", OTHERS)
def test_other_recurrences(recurrence: str, run: Run) -> None:
    check_schedule(2, 5, 2, 32, 72, (1, 2), OTHERS[recurrence], True, torch.float32, run)


def test_an_empty_schedule_changes_nothing() -> None:
    states, modules = problem(1, 5, 2, 32, 64, (1, 1))
    states, modules = in_dtype(states, modules, torch.float32)
    for each in (run, triton_module.run):
        after = each(states, [], modules, KernelContext(None, 2, EPS))
        assert all(torch.equal(after[name], state) for name, state in states.items())


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda states, context: (states, replace(context, num_heads=8)), "8 heads"),
        (lambda states, context: (states | {"z_L": states["z_L"][:, :4]}, context), "z_L"),
        (lambda states, context: (states, replace(context, rotary=rotary_tables(4, 32, 10000.0))), "rotary"),
        (lambda states, context: (states | {"z_H": states["z_H"].double()}, context), "float64"),
    ],
)
def test_says_what_it_cannot_take(
    spoil: Callable[[States, KernelContext], tuple[States, KernelContext]], named: str
) -> None:
    states, modules = in_dtype(*problem(1, 5, 2, 32, 64, (1, 1)), torch.float32)
    states, context = spoil(states, KernelContext(None, 2, EPS))
    with pytest.raises(UserError, match=named):
        run(states, schedule("L"), modules, context)


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
    states, modules = in_dtype(*problem(3, 82, 8, 64, 1536, (2, 2)), torch.bfloat16)
    context = KernelContext(None, 8, EPS)

    def twice() -> list[Tensor]:
        after_one = run(states, schedule("LLHLLH"), modules, context)
        return list(run(after_one, schedule("LLHL"), modules, context).values())

    reference = twice()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = twice()
    for _ in range(20):
        for tensor in captured[:2]:
            tensor.fill_(torch.nan)
        graph.replay()
        again = twice()
        for a, b, c in zip(reference, captured, again, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
