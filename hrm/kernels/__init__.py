"""The maths of a reasoning module, once per backend, and the choice between them.

- `naive` is the definition, `blocks` what it computes with, `schedule` and `context` what architectures hand down;
- `backends/` and `experimental/` hold a file for each backend, which says of itself what it needs (`backend`);
- `attention` has the cores of attention to choose from, `fp8` and `int8` passes without gradient in 8 bit, `quantize`
  the option that chooses between them;
- `ops/` holds the operations that backends are built of;
- `choice` resolves `auto` and checks what is combined, `presets` reads what `kernels=` can name.

What may be combined with a backend, and leaves the maths alone, are switches of `hrm.config.KernelsConfig`.
"""

from hrm.kernels.backend import Backend, FirstTokenBlock, KernelRequest, ReasoningModule
from hrm.kernels.choice import Kernels, describe, make_kernels, resolve, tensor_parallel_backends
from hrm.kernels.registry import backend_names, load_backend

__all__ = [
    "Backend",
    "FirstTokenBlock",
    "KernelRequest",
    "Kernels",
    "ReasoningModule",
    "backend_names",
    "describe",
    "load_backend",
    "make_kernels",
    "resolve",
    "tensor_parallel_backends",
]
