"""The plain transformer: T(embeddings) without the loop, z = T(z + embeddings) with it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.config.compose import compose
from hrm.config.training import PretrainConfig
from hrm.data.builders.example_tasks import VALUES, recall
from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.context import KernelContext, RotaryTables
from hrm.models import ACTLossHead
from tests.helpers.models import build, flops_outside, fresh_states, gradients, randomised

ARCH = {"name": "transformer", "num_layers": 3, "hidden_size": 32, "num_heads": 2, "forward_dtype": "float64"}


def logits_after(model: ACTLossHead, batch: Batch, steps: int) -> Tensor:
    carry = model.initial_carry(batch)
    for _ in range(steps):
        carry, _, _, outputs, _ = model(carry=carry, batch=batch, return_keys=["logits"])
    return outputs["logits"]


def transform(model: ACTLossHead, x: Tensor, blocks: Any) -> Tensor:
    """The trunk by hand, block by block."""
    inner = model.model.inner
    context = KernelContext(RotaryTables(inner.rotary_cos, inner.rotary_sin), 2, 1e-5)
    for block in blocks:
        x = naive.reasoning_module(x, torch.zeros_like(x), [block], context)
    return x


@torch.no_grad()
def test_without_and_with_the_loop(random_batch: Callable[..., Batch]) -> None:
    batch = random_batch()
    plain, looped = (randomised(build(ARCH | {"halt_max_steps": steps})).double().eval() for steps in (1, 3))
    prepared = plain.model.inner.prepare(batch)
    z = transform(plain, prepared.embeddings, prepared.blocks["trunk"])
    for model in (plain, looped):
        torch.testing.assert_close(logits_after(model, batch, 1), model.model.inner.logits({"z": z}))
    again = transform(looped, z + prepared.embeddings, prepared.blocks["trunk"])
    torch.testing.assert_close(logits_after(looped, batch, 2), looped.model.inner.logits({"z": again}))
    # Without the loop a sequence has halted, so that the next step begins from the start.
    assert torch.equal(logits_after(plain, batch, 2), logits_after(plain, batch, 1))


def test_it_is_as_large_as_hrm_by_default() -> None:
    """As the baseline of HRM's paper: the same blocks, as many as both modules have."""
    sizes = {"seq_len": 81, "vocab_size": 11}
    count = [
        sum(param.numel() for param in build(arch, **sizes).parameters()) for arch in ({"name": "transformer"}, {})
    ]
    assert count[0] == count[1]


# ---- memory as context


MAC = {**ARCH, "num_layers": 1, "memory": "mac", "segment_len": 4, "memory_hidden": 24}


def test_segments_attend_to_themselves_and_the_memory_carries_over(random_batch: Callable[..., Batch]) -> None:
    """Without a memory, no token knows of another segment; with one, of earlier ones but not of later ones."""
    batch = random_batch(seq_len=11)  # 1 of the prefix, and 3 segments
    for arch, reach in ((MAC | {"memory": "none"}, [1]), (MAC, [1, 2])):
        model = randomised(build(arch, seq_len=11)).eval()
        with torch.no_grad():
            changed = {**batch, "inputs": batch["inputs"].clone()}
            changed["inputs"][:, 3] = (changed["inputs"][:, 3] + 1) % 7  # the first token of the second segment
            difference = logits_after(model, batch, 1) - logits_after(model, changed, 1)
        segments = torch.nn.functional.pad(difference, (0, 0, 1, 0)).abs().amax((0, 2)).split(4)
        assert [i for i, segment in enumerate(segments) if segment.max() > 1e-9] == reach


@pytest.mark.parametrize("halt_max_steps", [1, 3])
@pytest.mark.parametrize("memory", ["none", "mac"])
def test_a_step_in_segments(random_batch: Callable[..., Batch], memory: str, halt_max_steps: int) -> None:
    """Every weight gets a gradient, and the operations of training and evaluation are those that torch counts."""
    options = {"memory": memory, "halt_max_steps": halt_max_steps, "forward_dtype": "float32"}
    model, batch = build(MAC | options, seq_len=9), random_batch(seq_len=9)
    for training in (True, False):
        model.train(training)
        with (
            torch.set_grad_enabled(training),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            _, loss, *_ = model(carry=model.initial_carry(batch), batch=batch)
            if training:
                loss.backward()
        steps = model.train_step_flops() if training else model.act_step_flops()
        assert counter.get_total_flops() == 3 * steps + flops_outside(model, batch, training=training)
    for name, grad in gradients(model).items():
        assert grad.isfinite().all(), name
        assert grad.count_nonzero() > 0, name


@torch.no_grad()
def test_evaluation_by_the_kernels_is_that_of_training(random_batch: Callable[..., Batch]) -> None:
    """The kernels write to the memory in place, training by differentiable PyTorch."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model, batch = randomised(build(MAC | {"forward_dtype": "float32"}, seq_len=9)), random_batch(seq_len=9)
    inner = model.model.inner
    with torch.enable_grad():
        trained = inner.recur(fresh_states(inner, batch), inner.prepare(batch))["z"].detach()
    for backend in ("naive", "triton"):
        inner.kernels = replace(inner.kernels, config=replace(inner.kernels.config, backend=backend))
        found = inner.recur(fresh_states(inner, batch), inner.prepare(batch))["z"]
        torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-5)


def test_options_that_do_not_fit_segments(tiny_arch: dict[str, Any]) -> None:
    for option, value in (("mlp_t", True), ("pos_encodings", "rope_2d")):
        with pytest.raises(UserError, match=rf"arch\.{option}=.* is for whole sequences"):
            build({**MAC, option: value})
    with pytest.raises(UserError, match=r"arch\.memory=max is not a choice; did you mean mac"):
        build(MAC | {"memory": "max"})
    with pytest.raises(UserError, match=r"there is no option memory; did you mean arch\.memory\?"):
        compose(PretrainConfig, "pretrain", ["arch=transformer", "memory=mac"])
    assert build(MAC | {"segment_len": 0}, seq_len=5).model.inner.config.segment == 64


def recall_batch(pairs: int, rng: np.random.Generator) -> Batch:
    """64 sequences of the example task `recall`: names with their values, then the names, whose values are asked."""
    examples = [recall(pairs, rng) for _ in range(64)]
    tokens = {symbol: i for i, symbol in enumerate([None, *VALUES, *(f"x{n}" for n in range(2 * pairs))])}
    inputs, labels = (
        torch.tensor([[tokens[symbol] for symbol in part] for part in parts]) for parts in zip(*examples, strict=True)
    )
    return {
        "inputs": inputs.int(),
        "labels": labels.int().masked_fill(labels == 0, IGNORE_LABEL_ID),
        "puzzle_identifiers": torch.zeros(64, dtype=torch.int32),
    }


def recall_accuracy(options: dict[str, Any], steps: int) -> tuple[float, int]:
    """The share of new questions answered after so many steps of training, and the number of parameters.

    Pairs fill the first segment, and questions are in the second.
    """
    pairs = 4
    arch = {"name": "transformer", "hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 0, "forward_dtype": "float32"}
    arch |= {"loss": {"loss_type": "softmax_cross_entropy"}}
    sizes = {"seq_len": 3 * pairs, "vocab_size": 1 + len(VALUES) + 2 * pairs}
    model = build(arch | {"segment_len": 2 * pairs} | options, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = recall_batch(pairs, rng)
        _, loss, *_ = model(carry=model.initial_carry(batch), batch=batch)
        optimizer.zero_grad()
        (loss / 64).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    right = []
    with torch.no_grad():
        for _ in range(4):
            batch = recall_batch(pairs, rng)
            logits = logits_after(model, batch, 1)
            right.append((logits.argmax(-1) == batch["labels"])[:, 2 * pairs :].double().mean().item())
    return sum(right) / len(right), sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_memory_as_context_recalls_what_a_larger_model_without_memory_cannot() -> None:
    """Four values: who does not know has one in four."""
    mac = {"memory": "mac", "num_layers": 1, "memory_hidden": 64, "persistent_tokens": 1}
    with_memory, size = recall_accuracy(mac, 200)
    without, larger = recall_accuracy({"memory": "none", "num_layers": 2}, 100)
    assert size <= larger
    assert with_memory > 0.9
    assert without < 0.4
