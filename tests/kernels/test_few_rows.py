"""Schedules of a few sequences: what their kernels compute is what the definition does, update by update."""

import math

import pytest
import torch
from torch import Tensor

from hrm.kernels import naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, RotaryTables, rotary_tables
from hrm.kernels.schedule import Schedule, Update, looped

pytest.importorskip("triton", reason="Triton is not installed")

from hrm.kernels.ops.triton import few_rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16] + [torch.bfloat16] * ON_GPU  # Triton's interpreter misreads bfloat16
FAST, SLOW = Update("z_L", ("z_H", "embeddings"), "L_level"), Update("z_H", ("z_L",), "H_level")
SCHEDULES = {
    "HRM": [FAST, FAST, SLOW],
    "one module": [FAST, Update("z_H", ("z_L",), "L_level")],
    "one state": [Update("z_H", ("embeddings",), "H_level")] * 2,
    "a state that no update takes": [FAST, Update("z_H", ("embeddings",), "H_level")],
    "the sum of the result and another": [SLOW, Update("z_L", ("embeddings", "z_H"), "L_level"), SLOW],
}
States = dict[str, Tensor]
Modules = dict[str, list[BlockWeights]]


def problem(
    batch: int, tokens: int, heads: int, head_size: int, inner: int, *, rotary: bool = True
) -> tuple[States, Modules, KernelContext]:
    """States, modules of two blocks and of one, and what they share, in float64."""
    generator = torch.Generator().manual_seed(batch * tokens)
    width = heads * head_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    def blocks(count: int) -> list[BlockWeights]:
        shapes = ((3 * width, width), (width, width), (2 * inner, width), (width, inner))
        return [BlockWeights(*(draw(*shape) / math.sqrt(shape[1]) for shape in shapes)) for _ in range(count)]

    states = {name: draw(batch, tokens, width) for name in ("z_L", "z_H", "embeddings")}
    tables = RotaryTables(*(table.to(DEVICE) for table in rotary_tables(tokens, head_size, 10000.0)))
    context = KernelContext(tables if rotary else None, heads, 1e-5)
    return states, {"H_level": blocks(1), "L_level": blocks(2)}, context


def in_dtype(states: States, modules: Modules, dtype: torch.dtype) -> tuple[States, Modules]:
    return {name: state.to(dtype) for name, state in states.items()}, {
        name: [BlockWeights(*(matrix.to(dtype) for matrix in block)) for block in blocks]
        for name, blocks in modules.items()
    }


def error(actual: States, reference: States) -> float:
    assert actual.keys() == reference.keys()
    return max(float((actual[name].double() - r).norm() / r.norm()) for name, r in reference.items())


def check(schedule: Schedule, states: States, modules: Modules, context: KernelContext, dtype: torch.dtype) -> None:
    """As near to float64 as the definition is in `dtype`, alike every time, its arguments left alone."""
    states, modules = in_dtype(states, modules, dtype)
    assert few_rows.fits(states, schedule, modules, context)
    before = {name: state.clone() for name, state in states.items()}
    definition = looped(naive.reasoning_module)
    wide_states, wide_modules = in_dtype(states, modules, torch.float64)
    reference = definition(wide_states, schedule, wide_modules, context)
    expected = error(definition(states, schedule, modules, context), reference)
    found = few_rows.run(states, schedule, modules, context)
    assert error(found, reference) < 1.25 * expected
    assert all(torch.equal(state, before[name]) for name, state in states.items())
    again = few_rows.run(states, schedule, modules, context)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, dtype: torch.dtype) -> None:
    check(SCHEDULES[schedule], *problem(2, 5, 2, 32, 64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_size", "inner", "rotary"),
    [
        (1, 82, 2, 32, 64, True),
        (2, 17, 6, 32, 192, True),  # widths that no tile divides
        (1, 1, 1, 128, 64, True),
        (1, 128, 2, 32, 64, False),
    ],
)
def test_sizes(
    batch: int, tokens: int, heads: int, head_size: int, inner: int, rotary: bool, dtype: torch.dtype
) -> None:
    check([SLOW], *problem(batch, tokens, heads, head_size, inner, rotary=rotary), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("batch", [1, 5])
def test_the_published_size(batch: int) -> None:
    check(SCHEDULES["HRM"], *problem(batch, 82, 8, 64, 1536), torch.bfloat16)


def test_what_it_leaves_to_others() -> None:
    states, modules, context = problem(1, 5, 2, 32, 128)
    half, halves = in_dtype(states, modules, torch.float16)
    assert few_rows.fits(half, [FAST], halves, context)
    assert not few_rows.fits(states, [FAST], modules, context)  # 64 bit
    assert not few_rows.fits(half, [], halves, context)
    assert not few_rows.fits(half, [FAST], halves | {"L_level": []}, context)
    assert not few_rows.pays(half, [], halves, context)
    assert few_rows.pays(half, [FAST], halves, context) == (ON_GPU and torch.cuda.get_device_capability() == (9, 0))
    many = {name: state.expand(1000, -1, -1) for name, state in half.items()}
    assert not few_rows.pays(many, [FAST], halves, context)
    long = {name: state[:, :1].expand(-1, 129, -1) for name, state in half.items()}
    assert not few_rows.fits(long, [FAST], halves, context)
    three = Update("z_L", ("z_H", "z_H", "embeddings"), "L_level")
    assert not few_rows.fits(half, [three], halves, context)
