"""The Hopper attention kernel against float64: on such a GPU as it is, elsewhere its source run by threads on the CPU.

Triton interprets no Gluon. `FakeGluon` stands in for the part of the language that the kernel uses: a group of warps
is a thread, a tensor is one of PyTorch's, copies take place late and in any order, and a barrier that is never passed
is an error. That checks everything but layouts and speed: who waits for what, masks, rotation and softmax.
"""

from __future__ import annotations

import math
import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels import hopper_attention, naive  # noqa: E402
from hrm.kernels.naive import RotaryTables, rotary_tables  # noqa: E402

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if ON_HOPPER else "cpu"
HEAD_SIZE = 64


class Number(int):
    """A scalar of a kernel."""

    def to(self, dtype: torch.dtype) -> Number:
        return self


def _number_operator(name: str) -> Callable[..., Any]:
    def operator(self: Number, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Number(result) if isinstance(result, int) else result

    return operator


for _name in ("add", "radd", "sub", "mul", "rmul", "floordiv", "mod", "and", "or", "xor", "eq", "lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _number_operator(f"__{_name}__"))


class Block(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(layout=SimpleNamespace(shape=self.shape))

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


def block(x: Tensor) -> Block:
    return x.as_subclass(Block)


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, memory.shape, memory.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.memory[i])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.memory[start : start + length])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory.permute(*order))

    def load(self, layout: Any) -> Block:
        return block(self.memory.clone())

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)


class Barrier:
    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def advance(self) -> None:
        assert self.missing >= 0
        if self.missing == self.bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


class Pointer:
    def __init__(self, memory: Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, offsets

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)


class Descriptor:
    def __init__(self, memory: Tensor, *block_shape: int) -> None:
        self.memory, self.dtype, self.layout = memory, memory.dtype, None
        nbytes = math.prod(block_shape) * memory.element_size()
        self.block_type = SimpleNamespace(shape=block_shape, nbytes=nbytes)

    def window(self, at: Sequence[int]) -> Tensor:
        return self.memory[tuple(slice(i, i + n) for i, n in zip(at, self.block_type.shape, strict=True))]


class FakeGluon:
    """What one program of a kernel sees as `gl`, `mbarrier`, `tma` and the functions for wgmma."""

    constexpr = int32 = torch.int32
    float32, int64 = torch.float32, torch.int64
    exp2, log2, maximum, minimum = torch.exp2, torch.log2, torch.maximum, min
    MBarrierLayout = NVMMADistributedLayout = DotOperandLayout = SliceLayout = staticmethod(lambda *_: None)
    static_range = staticmethod(lambda *bounds: map(Number, range(*bounds)))

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = program, programs
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.copies: list[tuple[int, Callable[[], None]]] = []
        self.errors: list[BaseException] = []

    # ---- numbers and tensors

    def program_id(self, axis: int) -> Number:
        return Number(self.program)

    def num_programs(self, axis: int) -> Number:
        return Number(self.programs)

    def cdiv(self, a: int, b: int) -> Number:
        return Number(-(-a // b))

    def DistributedLinearLayout(self, *parts: Any) -> SimpleNamespace:
        return SimpleNamespace(shape=parts[-1])

    def arange(self, start: int, end: int, layout: Any) -> Block:
        return block(torch.arange(start, end))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Block:
        return block(torch.zeros(*shape, dtype=dtype))

    def full(self, shape: Sequence[int], value: int, dtype: torch.dtype, layout: Any) -> Block:
        return block(torch.full(tuple(shape), value, dtype=dtype))

    def convert_layout(self, x: Block, layout: Any, assert_trivial: bool = False) -> Block:
        return x

    def where(self, condition: Tensor, x: Tensor, y: float) -> Tensor:
        return torch.where(condition, x, y)

    def max(self, x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack((x, y), -1)

    def load(self, at: Pointer, mask: Tensor, other: float) -> Block:
        return block(torch.where(mask, at.memory.view(-1)[at.offsets * mask], other))

    def store(self, at: Pointer, value: Tensor, mask: Tensor) -> None:
        at.memory.view(-1)[at.offsets[mask]] = value[mask]

    def warpgroup_mma(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
        product = (a.memory if isinstance(a, Shared) else a).float() @ b.memory.float()
        return block(acc + product if use_acc else product)

    def warpgroup_mma_wait(self, pending: int, deps: tuple[Tensor, ...]) -> Any:
        return deps[0] if len(deps) == 1 else deps

    # ---- shared memory, barriers, copies

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if dtype == torch.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(tuple(shape), math.nan, dtype=dtype))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def wait(self, barrier: Barrier, phase: int) -> None:
        self._sleep_until(lambda: barrier.phase & 1 != phase)

    def arrive(self, barrier: Barrier, count: int, pred: bool = True) -> None:
        with self.changed:
            barrier.missing -= count if pred else 0
            barrier.advance()
            self.changed.notify_all()

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        with self.changed:
            barrier.bytes += nbytes
            barrier.missing -= 1

    def async_copy_global_to_shared(self, desc: Descriptor, at: Sequence[int], barrier: Barrier, to: Shared) -> None:
        to.memory.fill_(math.nan)

        def copy() -> None:
            window = desc.window(at)
            to.memory.zero_()[tuple(map(slice, window.shape))] = window
            barrier.bytes -= desc.block_type.nbytes
            barrier.advance()

        self._copy_later(copy)

    def async_copy_shared_to_global(self, desc: Descriptor, at: Sequence[int], source: Shared) -> None:
        def copy() -> None:
            window = desc.window(at)
            window.copy_(source.memory[tuple(map(slice, window.shape))])

        self._copy_later(copy)

    def store_wait(self, pending: int) -> None:
        me = threading.get_ident()
        self._sleep_until(lambda: all(owner != me for owner, _ in self.copies))

    def thread_barrier(self) -> None:  # of the threads of a group, which are one here
        pass

    def _copy_later(self, copy: Callable[[], None]) -> None:
        with self.changed:
            self.copies.append((threading.get_ident(), copy))
            self.changed.notify_all()

    def _sleep_until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            passed = self.changed.wait_for(lambda: condition() or bool(self.errors), timeout=20)
            assert passed, "deadlock"
            if self.errors:
                raise SystemExit

    def warp_specialize(
        self, groups: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[Any]
    ) -> None:
        running = len(groups)

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            nonlocal running
            try:
                function(*arguments)
            except BaseException as error:
                self.errors.append(error)
            with self.changed:
                running -= 1
                self.changed.notify_all()

        threads = [threading.Thread(target=run, args=group) for group in groups]
        for thread in threads:
            thread.start()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.copies) or not running)
                if not self.copies:
                    break
                owner_and_copy = self.random.choice(self.copies)
                owner_and_copy[1]()
                self.copies.remove(owner_and_copy)
                self.changed.notify_all()
            if self.random.random() < 0.2:
                time.sleep(1e-4)  # lets the groups run ahead of the copies
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def on_cpu(kernel: Any, gluon: FakeGluon) -> Callable[..., None]:
    """The kernel as a function whose `gl` and the like, and those of the functions it calls, are `gluon`."""
    names: dict[str, Any] = dict(vars(hopper_attention))
    for name, value in vars(hopper_attention).items():
        if isinstance(value, triton.language.constexpr):
            names[name] = Number(value.value) if isinstance(value.value, int) else value.value
        elif hasattr(value, "fn"):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
    for name in ("gl", "mbarrier", "tma"):
        names[name] = gluon
    names |= {"warpgroup_mma": gluon.warpgroup_mma, "warpgroup_mma_wait": gluon.warpgroup_mma_wait}
    names |= {"fence_async_shared": lambda: None, "range": gluon.static_range}
    function: Callable[..., None] = names[kernel.fn.__name__]
    return function


def run_on_cpu(qkv: Tensor, rotary: RotaryTables, num_heads: int, multiprocessors: int) -> tuple[Tensor, Tensor]:
    """`hopper_attention.attention_forward` on a GPU of so many multiprocessors."""
    batch, tokens, width = qkv.shape
    out = torch.full((batch, tokens, width // 3), math.nan, dtype=qkv.dtype)
    lse = torch.full((batch, num_heads, tokens), math.nan)
    programs, _ = hopper_attention._programs(batch, tokens, num_heads, multiprocessors)
    for program in range(programs):
        on_cpu(hopper_attention._forward_kernel, FakeGluon(program, programs, seed=program))(
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
