"""`arch.gate=sigmoid_rms`, with `arch.attention_norm` or without: types of blocks which the definition computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hrm.batch import Batch
from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.blocks import NormedBlockWeights, NormGatedBlockWeights, NormGatedMixerWeights
from hrm.models import architectures
from tests.helpers.models import build, randomised

SIZES = {"hidden_size": 32, "num_heads": 2, "halt_max_steps": 2, "forward_dtype": "float64", "gate": "sigmoid_rms"}
ARCHS: dict[str, dict[str, Any]] = {
    "attention": SIZES | {"H_layers": 1, "L_layers": 2},
    "normed attention": SIZES | {"H_layers": 1, "L_layers": 2, "attention_norm": True},
    "mixer": SIZES | {"name": architectures()["trm"].name, "L_layers": 2, "mlp_t": True, "pos_encodings": "none"},
}
TYPES = {"attention": NormGatedBlockWeights, "normed attention": NormedBlockWeights, "mixer": NormGatedMixerWeights}
SILU = {"gate": "silu", "attention_norm": False}


@pytest.mark.parametrize("kind", ARCHS)
def test_a_model_of_these_blocks(kind: str, random_batch: Callable[..., Batch]) -> None:
    batch = random_batch()
    model, silu = (randomised(build(ARCHS[kind] | gate)) for gate in ({}, SILU))
    assert model.model.inner.block_types == (TYPES[kind],)
    weights, others = model.state_dict(), silu.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights), "another draw of weights"
    results = [m(carry=m.initial_carry(batch), batch=batch, return_keys=["logits"]) for m in (model, silu)]
    assert not torch.allclose(results[0][3]["logits"], results[1][3]["logits"])
    results[0][1].backward()
    projections = [param for name, param in model.named_parameters() if "proj" in name]
    assert projections
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in projections)


@pytest.mark.parametrize("kind", ARCHS)
def test_the_size_of_the_up_projection_does_not_matter(kind: str, random_batch: Callable[..., Batch]) -> None:
    """Ten times as large it is the same model, but for eps of the norm: what the gate was made for."""
    batch = random_batch()
    model = randomised(build(ARCHS[kind] | {"rms_norm_eps": 1e-24})).double().eval()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            outputs = model(carry=model.initial_carry(batch), batch=batch, return_keys=["logits"])[3]
        return outputs["logits"]

    before = logits()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "gate_up" in name:
                param[len(param) // 2 :] *= 10
    torch.testing.assert_close(logits(), before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ARCHS)
def test_operations_are_those_of_the_matmuls(kind: str, random_batch: Callable[..., Batch]) -> None:
    ours, silu = (build(ARCHS[kind] | gate).model.inner.stacks["L_level"] for gate in ({}, SILU))
    assert ours.flops() == silu.flops()
    if kind == "mixer":  # attention's products are not counted where they are fused
        model, batch = build(ARCHS[kind]), random_batch()
        inner = model.model.inner
        prepared = inner.prepare(batch)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            blocks = prepared.blocks["L_level"]
            inner.kernels.module(prepared.embeddings, prepared.embeddings, blocks, prepared.context)
        assert counter.get_total_flops() == len(batch["inputs"]) * inner.stacks["L_level"].flops()


def test_the_norm_comes_before_attentions_output_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    x, qkv, o = (torch.randn(shape, generator=generator).double() for shape in ((2, 5, 8), (24, 8), (8, 8)))
    mixed = naive.sdpa(F.linear(x, qkv), None, 2)
    for kind, expected in (
        (NormedBlockWeights, mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()),
        (NormGatedBlockWeights, mixed),
    ):
        weights = kind(qkv, o, qkv, o)
        torch.testing.assert_close(naive.attention(x, weights, None, 2), expected @ o.T)


def test_attention_norm_is_for_attention_with_this_gate() -> None:
    for options in ({"mlp_t": True}, {"gate": "silu"}):
        with pytest.raises(UserError, match="attention_norm=true is for attention"):
            build(SIZES | {"attention_norm": True} | options)


def test_what_cannot_compute_it_says_so() -> None:
    with pytest.raises(UserError, match="it has kernels for BlockWeights, not for blocks of NormGatedBlockWeights"):
        build(ARCHS["attention"] | {"forward_dtype": "float32"}, kernels={"backend": "triton"})
    with pytest.raises(UserError, match=r"arch\.gate=silo is not a choice; did you mean silu"):
        build(SIZES | {"gate": "silo"})
