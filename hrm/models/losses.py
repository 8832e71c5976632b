"""The loss of an ACT step and its metrics (spec section 3; paper section 2, "Adaptive computational time")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.config.checks import at_least, choice, fraction

if TYPE_CHECKING:
    from hrm.config import KernelsConfig
    from hrm.models.act import AdaptiveComputation, Carry


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy under stablemax (Prieto et al. 2025): probabilities s / sum(s), computed in float64.

    s(x) grows linearly above 0 and falls as 1 / (1 - x) below, so large logits do not overflow into exact zeros.

    Args:
        logits: [..., V].
        labels: [...] integers; IGNORE_LABEL_ID counts as no loss.

    Returns:
        The loss of each label [...], in float64 (float32 on devices that have no float64).
    """
    valid, picked = _picked(_log_stablemax(logits), labels)
    return -torch.where(valid, picked, 0)


def _log_stablemax(logits: Tensor) -> Tensor:
    """Logarithms of probabilities, in the dtype of `stablemax_cross_entropy`."""
    x = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    # The clamp keeps the branch not taken finite: in float32 an infinite one would make the gradient NaN.
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0) + 1e-30), x + 1)
    return torch.log(s / s.sum(-1, keepdim=True))


def _picked(log_probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels count, and the log-probability of each, both [...]; that of an ignored one is any."""
    valid = labels != IGNORE_LABEL_ID
    return valid, log_probabilities.gather(-1, torch.where(valid, labels, 0).long().unsqueeze(-1)).squeeze(-1)


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy under softmax in float32. Arguments and result as in `stablemax_cross_entropy`."""
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), labels.long().flatten(), ignore_index=IGNORE_LABEL_ID, reduction="none"
    )
    return flat.view(labels.shape)


LOSSES = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}
LOSS_HEADS = ("losses@ACTLossHead",)


@dataclass
class LossConfig:
    """The loss of an ACT step."""

    name: str = LOSS_HEADS[0]  # as in the published configs; there is no other
    loss_type: str = "stablemax_cross_entropy"  # of the tokens, or softmax_cross_entropy
    label_smoothing: float = 0.0  # share of a label's probability that is spread evenly over all tokens
    smooth_padding: bool = True  # whether the padding token, 0, gets its part of that share
    q_weight: float = 0.5  # weight of the losses of q_halt and q_continue beside the tokens'

    @property
    def is_published(self) -> bool:
        """Whether it is the published loss, with either loss of the tokens: the one that `fused_step` computes."""
        return self == LossConfig(loss_type=self.loss_type)

    def __post_init__(self) -> None:
        choice("arch.loss.name", self.name, LOSS_HEADS)
        choice("arch.loss.loss_type", self.loss_type, LOSSES)
        fraction("arch.loss.label_smoothing", self.label_smoothing, below_one=True)
        at_least("arch.loss.q_weight", self.q_weight, 0)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Cross-entropy with labels that keep 1 - s of their probability and spread s evenly over the tokens.

    Arguments and result as in `stablemax_cross_entropy`. Without `smooth_padding`, token 0 gets nothing of s.
    """
    softmax = config.loss_type == "softmax_cross_entropy"
    log_probabilities = torch.log_softmax(logits.float(), -1) if softmax else _log_stablemax(logits)
    valid, picked = _picked(log_probabilities, labels)
    spread = log_probabilities[..., 0 if config.smooth_padding else 1 :].mean(-1)
    share = config.label_smoothing
    return -torch.where(valid, (1 - share) * picked + share * spread, 0)


def _token_losses(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """The cross-entropy that the configuration asks for, as in `stablemax_cross_entropy`."""
    if config.label_smoothing:
        return smoothed_cross_entropy(logits, labels, config)
    return LOSSES[config.loss_type](logits, labels)


def sequence_losses(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """The tokens' part of `act_loss` of each sequence, [B]: the mean over its tokens that have a label."""
    divisor = (labels != IGNORE_LABEL_ID).sum(-1).clamp_min(1)
    return (_token_losses(logits, labels, config) / divisor.unsqueeze(-1)).sum(-1)


def act_loss(
    logits: Tensor,
    q_halt: Tensor,
    q_continue: Tensor,
    target: Tensor | None,
    labels: Tensor,
    halted: Tensor,
    steps: Tensor,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one ACT step, summed over the batch, and its metrics (spec section 3).

    Args:
        logits: [B, S, V].
        q_halt, q_continue: [B], logits of the values of halting and of continuing.
        target: [B], what sigmoid(q_continue) should be; None leaves its loss out.
        labels: [B, S] integers.
        halted, steps: [B], of the carry after the step.
        config: which loss.

    Returns:
        `(loss, metrics)`, all 0-dimensional. Metrics are sums without gradient, over the sequences that halted and have
        a label; the losses' over all sequences.
    """
    with torch.no_grad():
        valid = labels != IGNORE_LABEL_ID
        valid_count = valid.sum(-1)
        right_count = (valid & (logits.argmax(-1) == labels)).sum(-1)
        exact = right_count == valid_count
        counted = halted & (valid_count > 0)
        divisor = valid_count.clamp_min(1)
        metrics = {
            "count": counted.sum(),
            "accuracy": torch.where(counted, right_count / divisor, 0).sum(),
            "exact_accuracy": (counted & exact).sum(),
            "q_halt_accuracy": (counted & ((q_halt >= 0) == exact)).sum(),
            "steps": torch.where(counted, steps, 0).sum(),
        }

    lm_loss = (_token_losses(logits, labels, config) / divisor.unsqueeze(-1)).sum()
    q_halt_loss = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt.dtype), reduction="sum")
    metrics |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_halt_loss.detach()}
    q_loss = q_halt_loss
    if target is not None:
        q_continue_loss = F.binary_cross_entropy_with_logits(q_continue, target, reduction="sum")
        metrics["q_continue_loss"] = q_continue_loss.detach()
        q_loss = q_loss + q_continue_loss
    return lm_loss + config.q_weight * q_loss, metrics


# A logit of halting so sure that to be right, as an answer without labels is, costs exactly 0.
_SURE = 1e4


class ACTLossHead(nn.Module):
    """The model as it is trained and evaluated: one call is one ACT step of every sequence, with loss and metrics."""

    def __init__(self, model: AdaptiveComputation, loss: LossConfig, *, fused: bool = False) -> None:
        """With `fused`, the published loss is computed by the kernels in Triton, which run on NVIDIA GPUs."""
        super().__init__()
        self.model = model
        self.act_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = partial(act_loss, config=loss)
        if fused and loss.is_published:
            from hrm.kernels.ops.triton import loss as triton_loss  # imported here: Triton is not everywhere

            self.act_loss = partial(triton_loss.act_loss, loss_type=loss.loss_type)

    def extra_repr(self) -> str:
        return f"parameters={sum(parameter.numel() for parameter in self.parameters()):,}"

    @property
    def halt_max_steps(self) -> int:
        """ACT steps after which every sequence has halted."""
        return self.model.inner.config.halt_max_steps

    @property
    def kernels(self) -> KernelsConfig:
        """What computes the model."""
        return self.model.inner.kernels.config

    def act_step_flops(self) -> int:
        """Floating-point operations in the blocks of one ACT step of evaluation, for one sequence."""
        return self.model.inner.act_step_flops()

    def train_step_flops(self) -> int:
        """Those of one training step as the curriculum's stage has it, for one sequence, backward pass included."""
        return self.model.train_step_flops()

    def weights_at_hand(self) -> AbstractContextManager[None]:
        """A context in which weights do not change and are cast to the compute dtype once, not at every ACT step."""
        return self.model.inner.weights_at_hand()

    def initial_carry(self, batch: Batch) -> Carry:
        """A carry in which every sequence has halted, so that the first call takes `batch`."""
        return self.model.initial_carry(batch)

    def forward(
        self, *, carry: Carry, batch: Batch, return_keys: Sequence[str] = ()
    ) -> tuple[Carry, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Run one ACT step.

        Args:
            carry: from `initial_carry` or the call before.
            batch: `inputs` [B, S], `labels` [B, S] and `puzzle_identifiers` [B], read by sequences that are halted.
            return_keys: outputs wanted: `logits` [B, S, V], `q_halt_logits`, `q_continue_logits`, and in training
                `target_q_continue`, each [B].

        Returns:
            `(carry, loss, metrics, outputs, all_halted)`. The loss is summed over the batch. Metrics are sums without
            gradient, over the sequences that halted in this call and have a label; the losses' and shares' over all
            sequences in training, and over those that have a label in evaluation. There the published code also counts
            the `q_halt_loss` of rows that only pad the last batch, so that its figure depends on the batch size.
            `all_halted` is a boolean tensor: reading it waits for the device.
        """
        carry, outputs = self.model(carry, batch)
        q_halt = outputs["q_halt_logits"]
        if not self.training:
            has_label = (carry.current_data["labels"] != IGNORE_LABEL_ID).any(-1)
            q_halt = torch.where(has_label, q_halt, _SURE)
        loss, metrics = self.act_loss(
            outputs["logits"],
            q_halt,
            outputs["q_continue_logits"],
            outputs.get("target_q_continue"),
            carry.current_data["labels"],
            carry.halted,
            carry.steps,
        )
        metrics |= self.model.metrics(outputs)
        wanted = {key: outputs[key].detach() for key in return_keys if key in outputs}
        return carry, loss, metrics, wanted, carry.halted.all()
