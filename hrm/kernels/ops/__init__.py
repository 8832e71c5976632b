"""The kernel library: operations on tensors of any model, which know no backend, no block and no configuration.

Public ones are functions of this package, a file each: `ops.vector_add(x, y)`, whose definition in plain PyTorch is
`ops.vector_add.naive`. On an NVIDIA GPU with Triton a call runs the kernel, elsewhere the definition. Each is a
`torch.library` operator too (`torch.ops.hrm.vector_add`), which torch.compile and torch.export take as it is.
`operator` holds what these files share. docs/kernel-library.md lists them.

What backends are built of besides lies with the kernels, and has its definition in `hrm.kernels.naive`:

- `triton/` is written in Triton and runs on every NVIDIA GPU it knows, and in Triton's interpreter on a CPU;
- `hopper/` is written by hand in Gluon for Hopper GPUs; the operations in `triton/` call it where it is faster.

A file there begins with what it computes and the shapes it takes, and keeps its kernels private; an operation of
several kernels is a folder. What files of a folder share lies in its `common.py`. All of them import Triton: import
them where it is known to be installed.
"""

# Imported here and now, not on demand: a name of this package would otherwise be the file or the function in it,
# depending on who imported what first. None of these files imports Triton before it is called.
from hrm.kernels.ops.adamw import adamw_
from hrm.kernels.ops.asin import asin
from hrm.kernels.ops.attention import attention, projection_parts
from hrm.kernels.ops.block_scaled_matmul import BlockScaled, block_scaled_matmul, dequantize_blocks, quantize_blocks
from hrm.kernels.ops.dropout import dropout
from hrm.kernels.ops.grouped_gemm import grouped_gemm
from hrm.kernels.ops.layer_norm import layer_norm
from hrm.kernels.ops.matmul import matmul
from hrm.kernels.ops.memory_mlp import MemorySaved, MemoryWeights, memory_mlp_backward_update_, memory_mlp_forward_loss
from hrm.kernels.ops.norm_linear import norm_linear
from hrm.kernels.ops.rms_norm import rms_norm
from hrm.kernels.ops.softmax import softmax
from hrm.kernels.ops.vector_add import vector_add

__all__ = [
    "BlockScaled",
    "MemorySaved",
    "MemoryWeights",
    "adamw_",
    "asin",
    "attention",
    "block_scaled_matmul",
    "dequantize_blocks",
    "dropout",
    "grouped_gemm",
    "layer_norm",
    "matmul",
    "memory_mlp_backward_update_",
    "memory_mlp_forward_loss",
    "norm_linear",
    "projection_parts",
    "quantize_blocks",
    "rms_norm",
    "softmax",
    "vector_add",
]
