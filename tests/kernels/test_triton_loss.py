"""The fused loss head against its definition, forward and backward.

Without a GPU the kernels run in Triton's interpreter, which checks everything but speed; its bfloat16 is not to be
trusted. On a GPU the same tests take the sizes that models have.
"""

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from hrm.batch import IGNORE_LABEL_ID  # noqa: E402
from hrm.kernels.ops.triton import loss as triton_loss  # noqa: E402
from hrm.models.losses import LOSSES, LossConfig, act_loss  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
# of a loss relatively, of gradients to their largest number: what a loss in float64 or float32 leaves
TOLERANCE = {"stablemax_cross_entropy": 1e-7, "softmax_cross_entropy": 1e-6}
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")]
SIZES = [(1, 1, 2), (3, 7, 11), (2, 130, 50), (5, 300, 6)] + [
    pytest.param(*size, marks=on_gpu) for size in ((384, 81, 11), (96, 900, 12), (96, 900, 6), (3000, 81, 11))
]

both_losses = pytest.mark.parametrize("loss_type", LOSSES)


def draw(batch: int, tokens: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> dict[str, Tensor]:
    """Arguments of `act_loss`. Some tokens and a sequence have no label, some sequences are right, many logits are
    equal, and logits and q's lie in memory as they come from the model."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    logits = (torch.randn(batch, tokens + 2, vocab, generator=generator) * scale).round(decimals=1).to(dtype)[:, 2:]
    labels = torch.where(uniform(batch, tokens) < 0.3, (uniform(batch, tokens) * vocab).long(), logits.argmax(-1))
    labels = torch.where(uniform(batch, 1) < 0.5, logits.argmax(-1), labels)
    labels[uniform(batch, tokens) < 0.2] = IGNORE_LABEL_ID
    if batch > 1:
        labels[-1] = IGNORE_LABEL_ID
    q = torch.randn(batch, 2, generator=generator) * scale
    return {
        "logits": logits.to(DEVICE),
        "q": q.to(DEVICE),
        "target": uniform(batch).to(DEVICE),
        "labels": labels.to(DEVICE, torch.int32),
        "halted": (uniform(batch) < 0.7).to(DEVICE),
        "steps": (uniform(batch) * 16).to(DEVICE, torch.int32),
    }


def run(
    fused: bool, loss_type: str, case: dict[str, Tensor], *, with_target: bool = True
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The loss, the metrics, and the gradients by logits and q's of a third of the loss."""
    logits, q = case["logits"].detach().requires_grad_(), case["q"].detach().requires_grad_()
    target = case["target"] if with_target else None
    q_halt, q_continue = q.unbind(-1)
    arguments = (logits, q_halt, q_continue, target, case["labels"], case["halted"], case["steps"])
    if fused:
        loss, metrics = triton_loss.act_loss(*arguments, loss_type)
    else:
        loss, metrics = act_loss(*arguments, LossConfig(loss_type=loss_type))
    return loss.detach(), metrics, list(torch.autograd.grad(loss / 3, [logits, q]))


@both_losses
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "vocab"), SIZES)
def test_equals_the_definition(loss_type: str, dtype: torch.dtype, batch: int, tokens: int, vocab: int) -> None:
    case, tolerance = draw(batch, tokens, vocab, dtype), TOLERANCE[loss_type]
    loss, metrics, grads = run(True, loss_type, case)
    expected_loss, expected_metrics, expected_grads = run(False, loss_type, case)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        expected = expected_metrics[name].item()
        assert value.item() == pytest.approx(expected, rel=1e-6 if "loss" in name or name == "accuracy" else 0), name
        assert not value.requires_grad
    if loss_type == "stablemax_cross_entropy":
        assert metrics["lm_loss"].item() == pytest.approx(expected_metrics["lm_loss"].item(), rel=1e-12)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad.dtype, grad.shape) == (wanted.dtype, wanted.shape)
        rounding = 2 * torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, wanted, rtol=max(tolerance, rounding), atol=tolerance)


@both_losses
@pytest.mark.parametrize("with_target", [True, False])
def test_gradients_against_float64(loss_type: str, with_target: bool) -> None:
    case = draw(3, 5, 11, torch.float32)
    _, metrics, grads = run(True, loss_type, case, with_target=with_target)
    assert ("q_continue_loss" in metrics) == with_target
    exact = case | {"logits": case["logits"].double(), "q": case["q"].double(), "target": case["target"].double()}
    _, _, exact_grads = run(False, loss_type, exact, with_target=with_target)
    for grad, wanted in zip(grads, exact_grads, strict=True):
        assert (grad - wanted).norm() <= 1e-6 * wanted.norm()


@both_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + [torch.bfloat16] * ON_GPU)
def test_extreme_numbers_stay_finite(loss_type: str, dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 1e38)
    rows = torch.tensor(
        [[largest, -largest, 0.0], [-largest] * 3, [largest] * 3, [1.0, -largest, 1.0], [0.0, -0.0, 0.0]], dtype=dtype
    )
    case = draw(3, 5, 3, dtype) | {
        "logits": rows.repeat(3, 1, 1).to(DEVICE),
        "labels": torch.arange(3, dtype=torch.int32).repeat(5, 1).T.contiguous().to(DEVICE),
        "q": torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0, 0]], device=DEVICE),
    }
    loss, _, grads = run(True, loss_type, case)
    expected_loss, _, expected_grads = run(False, loss_type, case)
    assert loss.isfinite()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-7)


def test_any_layout() -> None:
    case = draw(3, 5, 7, torch.float32)
    odd = case | {
        "logits": case["logits"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "labels": case["labels"].long().T.contiguous().T,
        "q": case["q"].T.contiguous().T,
    }
    assert not any(odd[name].is_contiguous() for name in ("logits", "labels", "q"))
    loss, metrics, grads = run(True, "stablemax_cross_entropy", case)
    odd_loss, odd_metrics, odd_grads = run(True, "stablemax_cross_entropy", odd)
    assert torch.equal(loss, odd_loss)
    assert metrics == odd_metrics
    assert all(torch.equal(one, other) for one, other in zip(grads, odd_grads, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@both_losses
def test_in_a_cuda_graph(loss_type: str) -> None:
    case = draw(384, 81, 11, torch.bfloat16)
    run(True, loss_type, case)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, metrics, grads = run(True, loss_type, case)
    case["logits"].copy_(-case["logits"])
    case["halted"].logical_not_()
    graph.replay()
    eager_loss, eager_metrics, eager_grads = run(True, loss_type, case)
    assert torch.equal(loss, eager_loss)
    assert all(torch.equal(value, eager_metrics[name]) for name, value in metrics.items())
    assert all(torch.equal(one, other) for one, other in zip(grads, eager_grads, strict=True))
