"""Floating-point operations of HRM v1's blocks, which are nearly all that a step computes, and what a GPU could do."""

from __future__ import annotations

from hrm.config import HRMConfig

# Dense bf16 with sums in float32, in TFLOP/s, by the makers' data sheets; the first name that fits counts.
_PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
}


def block_flops(arch: HRMConfig, num_tokens: int) -> float:
    """Floating-point operations of one token's way through one block, among `num_tokens`."""
    width = arch.hidden_size
    if arch.mlp_t:
        return 6 * width * (arch.token_inner_size(num_tokens) + arch.inner_size)
    return 2 * (4 * width**2 + 3 * width * arch.inner_size) + 4 * num_tokens * width


def act_step_blocks(arch: HRMConfig, updates: str | None = None) -> int:
    """Blocks that one ACT step runs forward, in the architecture's updates of L and H or in other ones."""
    updates = arch.updates if updates is None else updates
    return sum(updates.count(level) * layers for level, layers in arch.layers.items())


def train_step_blocks(arch: HRMConfig, updates: str | None = None) -> int:
    """Blocks of one training step, a backward pass through one counted as two.

    A recurrence forward, with `q_continue` another one for its target, and backward through the last `grad_updates`.
    """
    recurrences = 2 if arch.q_continue and arch.halt_max_steps > 1 else 1
    updates = arch.updates if updates is None else updates
    backward = act_step_blocks(arch, updates[-arch.grad_updates :])
    return recurrences * act_step_blocks(arch, updates) + 2 * backward


def peak_tflops(device_name: str) -> float | None:
    """What a GPU of that name could do at best, in TFLOP/s of bf16; None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, peak in _PEAK_TFLOPS.items():
        if set(name.split()) <= set(words):
            return peak
    return None
