"""Tiny models with weights and states drawn at random, and what comes out of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import hrm
from hrm.batch import Batch
from hrm.models import ACTLossHead
from hrm.models.recurrent import RecurrentModel

SEQ_LEN, VOCAB_SIZE, NUM_IDENTIFIERS = 5, 7, 4


def build(arch: Mapping[str, Any], **options: Any) -> ACTLossHead:
    sizes = {"batch_size": 3, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, "num_puzzle_identifiers": NUM_IDENTIFIERS}
    model: ACTLossHead = hrm.build_model(arch, **(sizes | options))
    return model


def gradients(model: ACTLossHead) -> dict[str, Tensor]:
    """Of every parameter and of the batch's rows of the puzzle table."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    if model.model.inner.prefix_len:
        assert model.model.inner.puzzle_emb.local_weights is not None
        found["puzzle rows"] = model.model.inner.puzzle_emb.local_weights.grad
    assert all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """In the Euclidean norm of the whole tensor."""
    actual, reference = actual.detach().cpu().double(), reference.detach().cpu().double()
    return float((actual - reference).norm() / reference.norm())


def randomised(model: ACTLossHead) -> ACTLossHead:
    """With the weights that start as constants drawn too, so that they cannot hide a mistake."""
    generator, inner = torch.Generator().manual_seed(1), model.model.inner
    with torch.no_grad():
        inner.q_head.weight.normal_(generator=generator)
        inner.puzzle_emb.weights.normal_(generator=generator)
    return model


def random_states(model: ACTLossHead, batch: Batch) -> dict[str, Tensor]:
    generator, inner = torch.Generator().manual_seed(2), model.model.inner
    return {
        name: torch.randn(state.shape, generator=generator, dtype=torch.float64).to(inner.dtype)
        for name, state in inner.empty_states(batch).items()
    }


def fresh_states(inner: RecurrentModel, batch: Batch) -> dict[str, Tensor]:
    """The states in which sequences begin."""
    empty = inner.empty_states(batch)
    return {name: empty[name] + initial.to(inner.dtype) for name, initial in inner.initial_states.items()}


def flops_outside(model: ACTLossHead, batch: Batch, *, training: bool) -> int:
    """Of products in an ACT step that no block computes: the heads, both ways, and the token table's gradient."""
    inner, (sequences, seq_len) = model.model.inner, batch["inputs"].shape
    width, rows = inner.config.hidden_size, sequences * inner.num_tokens
    passes = 3 if training else 1
    heads = passes * 2 * width * (rows * inner.sizes.vocab_size + 2 * sequences)
    if training and inner.config.q_continue and inner.config.max_steps_in_training > 1:
        heads += 2 * width * 2 * sequences
    table = 2 * 8 * width * sequences * seq_len if training else 0  # 7 rows of the table are made 8
    return heads + table
