"""The losses against their formulas in plain Python, and the loss head on sequences worked out by hand."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hrm.batch import IGNORE_LABEL_ID
from hrm.models.act import AdaptiveComputation, Carry
from hrm.models.losses import (
    LOSSES,
    ACTLossHead,
    LossConfig,
    act_loss,
    smoothed_cross_entropy,
    softmax_cross_entropy,
    stablemax_cross_entropy,
)

Loss = Callable[[Tensor, Tensor], Tensor]

both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


# --- formulas, one label at a time ---


def stablemax_reference(row: Sequence[float], label: int) -> tuple[float, list[float]]:
    """The loss of one label and its gradient by the logits."""
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in row]
    slope = [1 if x >= 0 else 1 / (1 - x) ** 2 for x in row]
    total = math.fsum(s)
    grad = [slope[j] / total - (slope[j] / s[j] if j == label else 0) for j in range(len(row))]
    return -math.log(s[label] / total), grad


def softmax_reference(row: Sequence[float], label: int) -> tuple[float, list[float]]:
    exponentials = [math.exp(x - max(row)) for x in row]
    total = math.fsum(exponentials)
    grad = [exponentials[j] / total - (j == label) for j in range(len(row))]
    return math.log(total) - (row[label] - max(row)), grad


REFERENCES = [(stablemax_cross_entropy, stablemax_reference, 1e-12), (softmax_cross_entropy, softmax_reference, 1e-5)]


@st.composite
def logits_and_labels(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    vocab_size, rows = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    # stablemax changes branch at 0, and the branch not taken has its pole at 1.
    logit = st.floats(-50, 50) | st.floats(-2, 2) | st.sampled_from([0.0, -0.0, 0.5, 1.0])
    logits = draw(st.lists(st.lists(logit, min_size=vocab_size, max_size=vocab_size), min_size=rows, max_size=rows))
    label = st.integers(0, vocab_size - 1) | st.just(IGNORE_LABEL_ID)
    return logits, draw(st.lists(label, min_size=rows, max_size=rows))


@pytest.mark.parametrize(("loss", "reference", "tolerance"), REFERENCES, ids=LOSSES.keys())
@settings(deadline=None)
@given(case=logits_and_labels())
def test_formula(
    loss: Loss,
    reference: Callable[[Sequence[float], int], tuple[float, list[float]]],
    tolerance: float,
    case: tuple[list[list[float]], list[int]],
) -> None:
    rows, labels = case
    logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    losses = loss(logits, torch.tensor(labels))
    (grads,) = torch.autograd.grad(losses.sum(), logits)
    for row, label, value, grad in zip(rows, labels, losses.tolist(), grads.tolist(), strict=True):
        if label == IGNORE_LABEL_ID:
            assert value == 0
            assert grad == [0] * len(row)
        else:
            expected, expected_grad = reference(row, label)
            assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)
            assert grad == pytest.approx(expected_grad, rel=tolerance, abs=tolerance)


@both_losses
def test_all_labels_ignored(loss: Loss) -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = loss(logits, torch.full((2, 3), IGNORE_LABEL_ID))
    assert torch.equal(losses, torch.zeros_like(losses))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(grad, torch.zeros(2, 3, 4))


@both_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extreme_logits_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 1e38)
    rows = [[largest, -largest, 0.0], [-largest] * 3, [largest] * 3, [1.0, -largest, 1.0], [1.0] * 3]
    for label in range(3):
        logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
        losses = loss(logits, torch.full((len(rows),), label))
        assert losses.isfinite().all()
        (grad,) = torch.autograd.grad(losses.sum(), logits)
        assert grad.dtype == dtype
        assert grad.isfinite().all()


@both_losses
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_any_layout(loss: Loss, label_dtype: torch.dtype) -> None:
    """What the model hands over: a slice that leaves out the puzzle prefix, of labels in int32."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 6, 5, generator=generator)
    labels = torch.randint(5, (2, 4), generator=generator, dtype=label_dtype)
    expected = loss(whole[:, 2:].contiguous(), labels)
    assert expected.shape == (2, 4)

    leaf = whole.clone().requires_grad_()
    losses = loss(leaf[:, 2:], labels)
    assert torch.equal(losses, expected)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    assert torch.equal(grad[:, :2], torch.zeros(2, 2, 5))
    assert (grad[:, 2:] != 0).all()
    transposed = whole[:, 2:].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(loss(transposed, labels.T.contiguous().T), expected)


def test_precision_of_losses() -> None:
    """stablemax in float64, softmax in float32, whatever the logits come in."""
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 12
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        cast = logits.to(dtype)
        stable, soft = stablemax_cross_entropy(cast, labels), softmax_cross_entropy(cast, labels)
        assert (stable.dtype, soft.dtype) == (torch.float64, torch.float32)
        assert torch.equal(stable, stablemax_cross_entropy(cast.double(), labels))
        assert torch.equal(soft, softmax_cross_entropy(cast.float(), labels))


# --- the loss head ---


class Scripted(AdaptiveComputation):
    """In the model's place: one call's carry and outputs, given beforehand."""

    def __init__(self, carry: Carry, outputs: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.result = carry, outputs

    def forward(self, carry: Carry, batch: dict[str, Tensor]) -> tuple[Carry, dict[str, Tensor]]:
        return self.result


X = IGNORE_LABEL_ID
# Five sequences of three labels, their answers, and what that makes of them.
LABELS = [[0, 1, 2], [0, X, 2], [X, 1, X], [X, X, X], [2, 2, 2]]
ANSWERS = [[0, 1, 2], [0, 1, 1], [2, 1, 0], [0, 0, 0], [2, 2, 2]]
EXACT = [True, False, True, True, True]  # where nothing is asked, nothing is wrong
HALTED = [True, True, True, True, False]
STEPS = [3, 1, 4, 2, 1]
Q_HALT = [0.0, 0.5, -2.0, 3.0, 1.0]  # right (0 says halt), wrong, wrong, not counted, not counted
Q_CONTINUE = [0.1, -0.2, 0.3, -0.4, 0.5]
TARGET = [0.9, 0.8, 0.0, 0.6, 0.5]


def scripted_head(loss_type: str, *, with_target: bool = True) -> tuple[ACTLossHead, dict[str, Tensor]]:
    logits = torch.full((5, 3, 3), -0.5)
    logits.scatter_(2, torch.tensor(ANSWERS).unsqueeze(-1), 1.5)
    outputs = {
        "logits": logits,
        "q_halt_logits": torch.tensor(Q_HALT),
        "q_continue_logits": torch.tensor(Q_CONTINUE),
    }
    for output in outputs.values():
        output.requires_grad_()
    if with_target:
        outputs["target_q_continue"] = torch.tensor(TARGET)
    data = {"labels": torch.tensor(LABELS, dtype=torch.int32)}
    state = {"z": torch.zeros(5, 3, 1)}
    carry = Carry(state, torch.tensor(STEPS, dtype=torch.int32), torch.tensor(HALTED), data)
    return ACTLossHead(Scripted(carry, outputs), LossConfig(loss_type=loss_type)), outputs


def binary_cross_entropy(logit: float, target: float) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def hand_made_lm_loss(loss_type: str) -> float:
    reference = stablemax_reference if loss_type == "stablemax_cross_entropy" else softmax_reference
    total = 0.0
    for labels, answers in zip(LABELS, ANSWERS, strict=True):
        rows = [[1.5 if token == answer else -0.5 for token in range(3)] for answer in answers]
        losses = [reference(row, label)[0] for row, label in zip(rows, labels, strict=True) if label != X]
        total += sum(losses) / max(len(losses), 1)
    return total


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("with_target", [True, False])
def test_loss_and_metrics(loss_type: str, with_target: bool) -> None:
    head, _ = scripted_head(loss_type, with_target=with_target)
    _, loss, metrics, _, all_halted = head(carry=None, batch=None)
    lm_loss = hand_made_lm_loss(loss_type)
    q_halt_loss = sum(map(binary_cross_entropy, Q_HALT, EXACT))
    q_continue_loss = sum(map(binary_cross_entropy, Q_CONTINUE, TARGET)) if with_target else 0
    expected = {
        "count": 3,
        "accuracy": 1 + 1 / 2 + 1,
        "exact_accuracy": 2,
        "q_halt_accuracy": 1,
        "steps": 3 + 1 + 4,
        "lm_loss": lm_loss,
        "q_halt_loss": q_halt_loss,
    }
    if with_target:
        expected["q_continue_loss"] = q_continue_loss
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(lm_loss + 0.5 * (q_halt_loss + q_continue_loss), rel=1e-6)
    assert not all_halted
    assert not any(value.requires_grad for value in metrics.values())


def test_gradient_of_the_loss() -> None:
    """The loss is a mean over the labels of a sequence and a sum over sequences, with half the weight on the q's."""
    head, outputs = scripted_head("stablemax_cross_entropy")
    _, loss, *_ = head(carry=None, batch=None)
    loss.backward()
    for name, logits, targets in (("q_halt_logits", Q_HALT, EXACT), ("q_continue_logits", Q_CONTINUE, TARGET)):
        grad = outputs[name].grad
        assert grad is not None
        expected = [(1 / (1 + math.exp(-logit)) - target) / 2 for logit, target in zip(logits, targets, strict=True)]
        assert grad.tolist() == pytest.approx(expected, abs=1e-6)
    grad = outputs["logits"].grad
    assert grad is not None
    for sequence, labels in enumerate(LABELS):
        valid = [label for label in labels if label != X]
        for place, label in enumerate(labels):
            row = outputs["logits"][sequence, place].tolist()
            by_token = stablemax_reference(row, label)[1] if label != X else [0.0] * 3
            expected = [value / max(len(valid), 1) for value in by_token]
            assert grad[sequence, place].tolist() == pytest.approx(expected, abs=1e-6)


def test_only_what_is_asked_for_is_returned() -> None:
    head, outputs = scripted_head("softmax_cross_entropy")
    keys = ["q_halt_logits", "logits", "target_q_continue"]
    _, _, _, returned, _ = head(carry=None, batch=None, return_keys=keys)
    assert returned.keys() == set(keys)
    for key in keys:
        assert torch.equal(returned[key], outputs[key])
        assert not returned[key].requires_grad
    assert head(carry=None, batch=None)[3] == {}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("smooth_padding", [True, False])
def test_smoothing_mixes_the_label_with_all_tokens(loss_type: str, smooth_padding: bool) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[1, 2, IGNORE_LABEL_ID], [4, 1, 0]])
    config = LossConfig(loss_type=loss_type, label_smoothing=0.2, smooth_padding=smooth_padding)
    found = smoothed_cross_entropy(logits, labels, config)
    shares = logits.exp() if "softmax" in loss_type else torch.where(logits < 0, 1 / (1 - logits), logits + 1)
    log_p = (shares / shares.sum(-1, keepdim=True)).log()
    target = torch.full((2, 3, 5), 0.2 / (5 if smooth_padding else 4), dtype=torch.float64)
    if not smooth_padding:
        target[..., 0] = 0
    target.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), torch.full((2, 3, 1), 0.8, dtype=torch.float64))
    expected = torch.where(labels == IGNORE_LABEL_ID, 0, -(target * log_p).sum(-1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_losses_of_q_have_a_weight_and_other_losses_than_the_published_are_not_fused() -> None:
    q_losses = {}
    for weight in (0.5, 0.05, 0.0):
        head, _ = scripted_head("softmax_cross_entropy")
        changed = ACTLossHead(head.model, LossConfig(loss_type="softmax_cross_entropy", q_weight=weight))
        _, loss, metrics, _, _ = changed(carry=head.model.result[0], batch={})
        q_losses[weight] = (loss - metrics["lm_loss"]) / (metrics["q_halt_loss"] + metrics["q_continue_loss"])
    for weight, found in q_losses.items():
        assert found.item() == pytest.approx(weight)
    assert LossConfig(loss_type="softmax_cross_entropy").is_published
    for other in ({"q_weight": 0.05}, {"label_smoothing": 0.2}):
        config = LossConfig(**other)
        assert not config.is_published
        assert ACTLossHead(head.model, config, fused=True).act_loss.func is act_loss  # type: ignore[attr-defined]
