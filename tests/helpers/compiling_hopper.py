"""As `compiling`, for kernels in Gluon for Hopper: those of blocks that mix tokens, in 16 bit and in e4m3; of long
rows; and of lists of products.

python -m tests.helpers.compiling_hopper
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from hrm.kernels import fp8
from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights
from hrm.kernels.context import KernelContext
from hrm.kernels.ops.hopper import device, grouped_gemm, long_rows, mixer_features
from tests.helpers.compiling import launch_without_running


def main() -> None:
    launch_without_running(90)
    device.why_not = lambda _: None
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=132)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    state = ones(192, 88, 512)
    for kind in (MixerWeights, NormGatedMixerWeights):
        weights = kind(ones(512, 88), ones(88, 256), ones(3072, 512), ones(512, 1536))
        fp8.reasoning_module(state, state, fp8.quantize_blocks([weights]), KernelContext(None, 8, 1e-5))
    rows = state.view(-1, 512)
    inner, squares, _ = mixer_features.gated(rows, weights.gate_up, normed=True, save=False)
    mixer_features.residual_rms(rows, inner, weights.down, squares, 1e-5, save=True)

    long = ones(3, 40_000)
    long_rows.softmax_backward(long, long, long)
    long, of_rows = ones(3, 9000), torch.ones(3)
    long_rows.layer_norm_backward(long, long, torch.ones(9000), of_rows, of_rows, long)
    for left, right, transposed in (
        (ones(300, 72), ones(72, 264), (False, False)),
        (ones(300, 72), ones(264, 72), (False, True)),
        (ones(72, 300), ones(72, 264), (True, False)),
    ):
        products = [(left, right, ones(300, 264))] * 9
        grouped_gemm.multiply(products, [(300, 264)] * 9, [72] * 9, 256, True, *transposed)


if __name__ == "__main__":
    main()
