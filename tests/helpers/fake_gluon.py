"""Runs kernels in Gluon by threads on the CPU.

Triton interprets no Gluon. `FakeGluon` stands in for the part of the language that our kernels use: a group of warps
is a thread, a tensor is one of PyTorch's, copies take place late and in any order, and a barrier that is never passed
is an error. That checks everything but layouts and speed: who waits for what, masks and numbers.
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

import torch
import triton
from torch import Tensor


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


class DType:
    """Of a tensor in memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch, self.primitive_bitwidth = dtype, 8 * dtype.itemsize


class Block(torch.Tensor):
    """A tensor in registers."""

    def to(self, dtype: Any) -> Block:  # type: ignore[override]
        return block(super().to(dtype.torch if isinstance(dtype, DType) else dtype))

    @property
    def type(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(layout=SimpleNamespace(shape=self.shape), shape=self.shape)

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


def block(x: Tensor) -> Block:
    return x.as_subclass(Block)


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, memory.shape, DType(memory.dtype)
        self.type = SimpleNamespace(shape=memory.shape)

    def index(self, i: int) -> Shared:
        return Shared(self.memory[i])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.memory[start : start + length])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.view(*shape))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        numbers = self.memory.view(-1).view(dtype.torch)
        return Shared(numbers[: math.prod(shape)].view(*shape))

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
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)


class Descriptor:
    def __init__(self, memory: Tensor, *block_shape: int) -> None:
        self.memory, self.dtype, self.layout = memory, DType(memory.dtype), None
        nbytes = math.prod(block_shape) * memory.element_size()
        self.block_type = SimpleNamespace(shape=block_shape, nbytes=nbytes)

    def window(self, at: Sequence[int]) -> Tensor:
        return self.memory[tuple(slice(i, i + n) for i, n in zip(at, self.block_type.shape, strict=True))]


class FakeGluon:
    """What one program of a kernel sees as `gl`, `mbarrier`, `tma` and the functions for wgmma."""

    constexpr = int32 = torch.int32
    float32, int64 = torch.float32, torch.int64
    bfloat16, float16 = torch.bfloat16, torch.float16
    abs, exp, exp2, log2, rsqrt = torch.abs, torch.exp, torch.exp2, torch.log2, torch.rsqrt
    minimum = min
    MBarrierLayout = NVMMADistributedLayout = DotOperandLayout = staticmethod(lambda *_: None)
    SliceLayout = BlockedLayout = staticmethod(lambda *_: None)
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

    def maximum(self, x: Any, y: Any) -> Any:
        return torch.maximum(x, y) if isinstance(x, Tensor) else Number(max(x, y))

    def expand_dims(self, x: Tensor, axis: int) -> Tensor:
        return x.unsqueeze(axis)

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

    def load(self, at: Pointer, mask: Tensor | bool = True, other: float = 0.0) -> Block:
        return block(torch.where(torch.as_tensor(mask).bool(), at.memory.view(-1)[at.offsets * mask], other))

    def store(self, at: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        mask = torch.ones_like(at.offsets, dtype=torch.bool) if mask is None else mask.bool()
        at.memory.view(-1)[at.offsets[mask]] = value[mask]

    def warpgroup_mma(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
        product = (a.memory if isinstance(a, Shared) else a).float() @ b.memory.float()
        return block(acc + product if use_acc else product)

    def warpgroup_mma_wait(self, pending: int, deps: tuple[Tensor, ...]) -> Any:
        return deps[0] if len(deps) == 1 else deps

    # ---- shared memory, barriers, copies

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if dtype == torch.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return barriers[0] if len(shape) == 1 else SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(tuple(shape), math.nan, dtype=dtype.torch))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def wait(self, barrier: Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            self._sleep_until(lambda: barrier.phase & 1 != phase)

    def arrive(self, barrier: Barrier, count: int, pred: bool = True) -> None:
        with self.changed:
            barrier.missing -= count if pred else 0
            barrier.advance()
            self.changed.notify_all()

    def expect(self, barrier: Barrier, nbytes: int, pred: bool = True) -> None:
        if not pred:
            return
        with self.changed:
            barrier.bytes += nbytes
            barrier.missing -= 1

    def async_copy_global_to_shared(
        self, desc: Descriptor, at: Sequence[int], barrier: Barrier, to: Shared, pred: bool = True
    ) -> None:
        if not pred:
            return
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


def on_cpu(module: types.ModuleType, kernel: str, gluon: FakeGluon, **others: Any) -> Callable[..., None]:
    """A kernel of the module as a function whose `gl` and the like, and those of the functions it calls, are `gluon`.

    Args:
        others: stand in for what the module has under these names, such as functions in assembly.
    """
    names: dict[str, Any] = {}
    for value in vars(module).values():
        if hasattr(value, "fn"):
            names |= value.fn.__globals__  # of functions of other modules, what they call there
    names |= vars(module)
    for name, value in list(names.items()):
        if isinstance(value, triton.language.constexpr):
            names[name] = Number(value.value) if isinstance(value.value, int) else value.value
        elif hasattr(value, "fn"):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
    for name in ("gl", "mbarrier", "tma"):
        names[name] = gluon
    names |= {"warpgroup_mma": gluon.warpgroup_mma, "warpgroup_mma_wait": gluon.warpgroup_mma_wait}
    names |= {"fence_async_shared": lambda: None, "range": gluon.static_range}
    names |= others
    function: Callable[..., None] = names[kernel]
    return function
