from __future__ import annotations

from collections.abc import Iterator

from benchmarks.ops.row import Bar, Row, compiled, forward, plain, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    """Sizes of the HRM's states and beyond the cache; the gradient is the gradient of the sum, and moves nothing."""
    for shape in ((24, 32),) if toy else ((384 * 82, 512), (2**15, 2**13)):
        yield forward(
            "x".join(map(str, shape)),
            lambda device, shape=shape: [random(device, *shape) for _ in range(2)],  # type: ignore[misc]
            ops.vector_add,
            {"eager": plain(ops.vector_add.naive), "compile": compiled(ops.vector_add.naive)},
            Bar(of_copy=0.9),
            bytes=3 * 2 * shape[0] * shape[1],
        )
