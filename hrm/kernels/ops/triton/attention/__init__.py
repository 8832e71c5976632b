"""Self-attention with rotary embedding in Triton, forward and backward, straight on the fused projection.

`attention` is `hrm.kernels.naive.attention` without its two projections: the same roundings, but no copy, transpose or
rotated tensor passes through memory besides the result (long sequences also write their rotated keys once).

Shapes: B sequences, T tokens, N heads of size K, D = N K. Kernels read q, k and v out of rows of `qkv` [B, T, 3 D] and
write gradients into rows of `d_qkv` [B, T, 3 D]; a program never adds to memory that another one writes, so that
results do not depend on the order of programs. Softmax works in base 2 (one instruction on the GPU): its scale is
log2(e) / sqrt(K), and `lse` is the logarithm to base 2 of a row's normaliser.
"""

from hrm.kernels.ops.triton.attention.dispatch import attention, attention_in_e4m3
from hrm.kernels.ops.triton.attention.first_token import first_token_attention

__all__ = ["attention", "attention_in_e4m3", "first_token_attention"]
