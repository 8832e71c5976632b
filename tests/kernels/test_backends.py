"""Every backend that is found computes what the definition does, on awkward sizes; and the registry that finds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.config import KernelsConfig
from hrm.errors import UserError
from hrm.kernels import Backend, KernelRequest, backend_names, load_backend, make_kernels, naive, registry, resolve
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, MixerWeights, RotaryTables
from hrm.kernels.schedule import Schedule, Update, looped

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # Triton's interpreter misreads bfloat16
HEADS, HEAD_SIZE, INNER, TOKEN_INNER = 2, 16, 64, 24
WIDTH = HEADS * HEAD_SIZE
EPS = 1e-5

# One sequence of the published Sudoku length, an odd batch of a length that is no multiple of anything.
SIZES = [(1, 82), (3, 5)]

Results = dict[str, Tensor]


def draw(block_type: type, batch: int, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """State, injection and a gradient, and the weights of two blocks, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(batch + tokens)
    fields = {
        "qkv": (3 * WIDTH, WIDTH),
        "o": (WIDTH, WIDTH),
        "token_gate_up": (2 * TOKEN_INNER, tokens),
        "token_down": (tokens, TOKEN_INNER),
        "gate_up": (2 * INNER, WIDTH),
        "down": (WIDTH, INNER),
    }

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(DEVICE, dtype)

    names: tuple[str, ...] = block_type._fields  # type: ignore[attr-defined]
    states = [torch.randn(batch, tokens, WIDTH, generator=generator).to(DEVICE, dtype) for _ in range(3)]
    return states, [block_type(*(matrix(*fields[name]) for name in names)) for _ in range(2)]


def context(block_type: type, tokens: int, dtype: torch.dtype) -> KernelContext:
    if "qkv" not in block_type._fields:  # type: ignore[attr-defined]
        return KernelContext(None, HEADS, EPS)
    tables = naive.rotary_tables(tokens, HEAD_SIZE, 10000.0)
    wide = torch.promote_types(dtype, torch.float32)
    return KernelContext(RotaryTables(*(table.to(DEVICE, wide) for table in tables)), HEADS, EPS)


def assert_accurate(
    ours: Callable[[torch.dtype], Results], definition: Callable[[torch.dtype], Results], dtype: torch.dtype
) -> None:
    """In float32 to 1e-5, in 16 bit at most 1.5 times as far from float64 as the definition is."""
    exact, plain, found = definition(torch.float64), definition(dtype), ours(dtype)
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        assert found[name].dtype == dtype, name
        assert found[name].shape == wanted.shape, name
        error, own = (((x.double() - wanted).norm() / wanted.norm()).item() for x in (found[name], plain[name]))
        assert error <= (1e-5 if dtype == torch.float32 else 1.5 * own), (name, error, own)


def cases() -> list[Any]:
    return [
        pytest.param(name, block_type, id=f"{name}-{block_type.__name__}")
        for name in backend_names()
        for block_type in load_backend(name).block_types
    ]


def request_for(block_type: type, tokens: int, dtype: torch.dtype) -> KernelRequest:
    rotary = "qkv" in block_type._fields  # type: ignore[attr-defined]
    return KernelRequest(
        DEVICE,
        dtype,
        HEAD_SIZE,
        rotary=rotary,
        num_tokens=tokens,
        batch_size=3,
        width=WIDTH,
        block_types=(block_type,),
    )


def backend_for(name: str, block_type: type, tokens: int, dtype: torch.dtype) -> Backend:
    backend = load_backend(name)
    if reason := backend.reason_against(request_for(block_type, tokens, dtype)):
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize(("name", "block_type"), cases())
def test_module_forward_and_backward(name: str, block_type: type, batch: int, tokens: int, dtype: torch.dtype) -> None:
    backend = backend_for(name, block_type, tokens, dtype)
    (state, injection, grad), blocks = draw(block_type, batch, tokens, dtype)

    def run(module: Callable[..., Tensor], dtype: torch.dtype) -> Results:
        def leaf(x: Tensor) -> Tensor:
            return x.to(dtype, copy=True).requires_grad_()

        own = [leaf(state), leaf(injection)]
        weights = [block_type(*map(leaf, block)) for block in blocks]
        out = module(*own, weights, context(block_type, tokens, dtype))
        named = {"state": own[0], "injection": own[1]}
        for index, block in enumerate(weights):
            named |= {f"{index}.{field}": matrix for field, matrix in block._asdict().items()}
        gradients = torch.autograd.grad(out, list(named.values()), grad.to(dtype))
        return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}

    assert_accurate(
        lambda dtype: run(backend.reasoning_module, dtype), lambda dtype: run(naive.reasoning_module, dtype), dtype
    )


SCHEDULES: dict[str, Schedule] = {
    "HRM": [Update("z_L", ("z_H", "embeddings"), "fast")] * 2
    + [Update("z_H", ("z_L",), "slow"), Update("z_L", ("z_H", "embeddings"), "fast"), Update("z_H", ("z_L",), "slow")],
    "one state": [Update("z_L", ("embeddings",), "fast")] * 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "block_type"), cases())
def test_schedule_without_gradient(
    name: str, block_type: type, schedule: str, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    backend_for(name, block_type, tokens, dtype)
    if batch * tokens > 15 and schedule != "HRM":
        pytest.skip("one size is enough")
    (z_H, z_L, embeddings), (fast, slow) = draw(block_type, batch, tokens, dtype)
    states = {"z_H": z_H, "z_L": z_L, "embeddings": embeddings}
    kernels = make_kernels(resolve(KernelsConfig(name), request_for(block_type, tokens, dtype)), ("fast", "slow"))

    def run(function: Callable[..., dict[str, Tensor]], dtype: torch.dtype) -> Results:
        cast = {key: state.to(dtype) for key, state in states.items()}
        before = {key: state.clone() for key, state in cast.items()}
        modules = {
            key: [block_type(*(matrix.to(dtype) for matrix in block))]
            for key, block in (("fast", fast), ("slow", slow))
        }
        with torch.no_grad():
            new = function(cast, SCHEDULES[schedule], modules, context(block_type, tokens, dtype))
        assert all(torch.equal(cast[key], before[key]) for key in cast), "the states handed in are changed"
        return {key: new[key] for key in sorted(new)}

    assert_accurate(
        lambda dtype: run(kernels.run, dtype), lambda dtype: run(looped(naive.reasoning_module), dtype), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize(("name", "block_type"), cases())
def test_first_token_block(name: str, block_type: type, batch: int, tokens: int, dtype: torch.dtype) -> None:
    backend = backend_for(name, block_type, tokens, dtype)
    (x, *_), (block, _) = draw(block_type, batch, tokens, dtype)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> Results:
        weights = block_type(*(matrix.to(dtype) for matrix in block))
        with torch.no_grad():
            return {"out": function(x.to(dtype), weights, context(block_type, tokens, dtype))}

    def definition(dtype: torch.dtype) -> Results:
        """Of what all tokens become."""
        return {"out": run(lambda x, w, c: naive.reasoning_module(x, 0 * x, [w], c)[:, 0], dtype)["out"]}

    assert_accurate(lambda dtype: run(backend.first_token_block, dtype), definition, dtype)


# ---- what is found


def test_the_definition_computes_every_type_of_block() -> None:
    known = {block_type for name in backend_names() for block_type in load_backend(name).block_types}
    assert known <= set(load_backend("naive").block_types)


def test_the_normalised_gate() -> None:
    """By its formula, in float64; in float16 the product of gate and up may be beyond 65504."""
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(shape, generator=generator).double() for shape in [(3, 8), (6, 8), (6, 8), (5, 6)])
    g, v = x @ gate.T, x @ up.T
    product = g * v
    hidden = torch.sigmoid(g) * product / (product.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(naive.norm_gated(x, torch.cat([gate, up]), down, EPS), hidden @ down.T)
    large = naive.norm_gated(torch.full((1, 8), 50.0).half(), torch.full((12, 8), 2.0).half(), torch.eye(6).half(), EPS)
    assert torch.equal(large, torch.ones_like(large))  # gate and up are 800 each


def test_files_in_the_folders_are_the_backends() -> None:
    folder = Path(registry.__file__).parent
    files = {file.stem for name in ("backends", "experimental") for file in (folder / name).glob("[!_]*.py")}
    packages = {file.parent.name for file in (folder / "experimental").glob("*/__init__.py")}
    assert set(backend_names()) == files | packages


def test_auto_takes_no_experiment() -> None:
    for name in backend_names(registry.EXPERIMENTAL):
        assert load_backend(name).default(KernelRequest(DEVICE, torch.bfloat16, 64)) is None


class OfMyOwn(tuple[Tensor]):
    """A type of blocks that no backend knows."""


def test_auto_passes_to_the_next_backend_where_blocks_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = Backend(
        naive.reasoning_module, naive.first_token_block, default=lambda request: {"fused_step": False}, priority=100
    )
    found = {"eager": eager, "naive": load_backend("naive")}
    monkeypatch.setattr("hrm.kernels.choice.backend_names", lambda *packages: list(found))
    monkeypatch.setattr("hrm.kernels.choice.load_backend", found.__getitem__)
    request = KernelRequest(torch.device("cpu"), torch.float32, 16)
    assert resolve(KernelsConfig("auto"), request).backend == "eager"
    mixers = request._replace(block_types=(MixerWeights,), rotary=False)
    assert resolve(KernelsConfig("auto"), mixers).backend == "naive"
    assert resolve(KernelsConfig("auto"), request._replace(block_types=(BlockWeights, MixerWeights))).backend == "naive"
    with pytest.raises(UserError, match="no backend computes blocks of OfMyOwn"):
        resolve(KernelsConfig("auto"), request._replace(block_types=(OfMyOwn,)))
    with pytest.raises(
        UserError, match=r"backend=eager cannot run: it has kernels for BlockWeights, not .*MixerWeights"
    ):
        resolve(KernelsConfig("eager"), mixers)


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("needy", "import not_there_at_all.part", "not_there_at_all is not installed"),
        ("dated", "from json import not_in_there", "it cannot be imported: cannot import name 'not_in_there'"),
    ],
)
def test_a_backend_without_its_packages_cannot_run(
    name: str, source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr("hrm.kernels.experimental.__path__", [str(tmp_path)])
    assert name in backend_names()
    with pytest.raises(UserError, match=rf"kernels\.backend={name} cannot run: {reason}"):
        resolve(KernelsConfig(name), KernelRequest(DEVICE, torch.float32, 16))


def test_a_file_without_a_backend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent.py").write_text("")
    monkeypatch.setattr("hrm.kernels.experimental.__path__", [str(tmp_path)])
    with pytest.raises(UserError, match=r"hrm\.kernels\.experimental\.silent .* BACKEND"):
        load_backend("silent")
