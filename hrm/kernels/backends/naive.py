"""The definition as a backend: plain PyTorch, alone or through torch.compile."""

from __future__ import annotations

from hrm.kernels import naive
from hrm.kernels.backend import Backend, KernelRequest
from hrm.kernels.blocks import BlockWeights
from hrm.kernels.requirements import is_measured, why_not_compiled


def _default(request: KernelRequest) -> dict[str, bool]:
    """On a CPU as it is; on a GPU compiled and recorded, where measured with our kernels around blocks without any.

    On a CPU, compiled code is hardly ever faster than cores with sequences of their own are.
    """
    on_cuda = request.device.type == "cuda"
    return {
        "compile": on_cuda and why_not_compiled(request) is None,
        "cuda_graphs": on_cuda,
        "fused_step": BlockWeights not in request.block_types and is_measured(request),
    }


BACKEND = Backend(
    naive.reasoning_module,
    naive.first_token_block,
    block_types=naive.BLOCK_TYPES,
    default=_default,
    priority=0,
    takes_attention=True,
    tensor_parallel=True,
    by_core=True,
)
