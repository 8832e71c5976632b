"""The fused optimizers against the plain ones, and the copies of the weights they leave for the next forward.

Without a GPU the kernels run in Triton's interpreter; on a GPU the same tests take the sizes that models have.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from hrm.models.layers import Linear, SparseEmbedding, in_dtype, kept_copy  # noqa: E402
from hrm.optim import AdamATan2, SparseSignSGD  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
HALF = torch.bfloat16 if ON_GPU else torch.float16
Shapes = Sequence[tuple[int, ...]]
ODD: Shapes = [(), (5,), (3000,), (40, 65), (2048,), (1,)]
MANY: Shapes = [(3,)] * 65  # more than one launch takes
HRM_V1: Shapes = [(12, 512), (2, 512), (2,)] + [(1536, 512), (512, 512), (3072, 512), (512, 1536)] * 8
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")]


def draw_params(shapes: Shapes, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]


def set_grads(params: Sequence[nn.Parameter], seed: int) -> None:
    """Gradients of very unlike size; some numbers never get one."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        size = 10.0 ** torch.randint(-9, 6, param.shape, generator=torch.Generator().manual_seed(0))
        param.grad = torch.where(size < 1e-8, 0, grad * size).to(DEVICE, param.dtype)


def train(optimizer: AdamATan2, steps: range) -> None:
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        set_grads(params, step)
        optimizer.param_groups[0]["lr"] = 0.1 / step
        optimizer.step()


def fused(params: Sequence[nn.Parameter], copy_dtype: torch.dtype | None = HALF) -> AdamATan2:
    return AdamATan2(params, 1.0, weight_decay=0.3, fused=True, copy_dtype=copy_dtype)


@pytest.mark.parametrize("shapes", [ODD, MANY, pytest.param(HRM_V1, marks=on_gpu)], ids=["odd", "many", "HRM v1"])
def test_adam_atan2(shapes: Shapes) -> None:
    """Weights and moments are as near to those in float64 as the plain update's in float32."""
    exact = [nn.Parameter(param.detach().double()) for param in draw_params(shapes)]
    plain, params = draw_params(shapes), draw_params(shapes)
    optimizers = AdamATan2(exact, 1.0, weight_decay=0.3), AdamATan2(plain, 1.0, weight_decay=0.3), fused(params)
    for optimizer in optimizers:
        train(optimizer, range(1, 6))

    def everything(optimizer: AdamATan2) -> list[Tensor]:
        params = optimizer.param_groups[0]["params"]
        parts = [params, *([optimizer.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq"))]
        return [torch.cat([tensor.detach().double().flatten() for tensor in part]) for part in parts]

    exact_all, plain_all, fused_all = map(everything, optimizers)
    for wanted, same, actual in zip(exact_all, plain_all, fused_all, strict=True):
        assert (actual - wanted).norm() <= 1.5 * (same - wanted).norm()
    torch.testing.assert_close(fused_all[0], exact_all[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused_all[2], exact_all[2], rtol=1e-6, atol=0)  # sizes from 1e-17 to 1e10


def test_directions_all_around() -> None:
    """One step from m = v = 0 turns by atan2((1 - b1) g, |g|), whatever g's size; small betas reach steep angles."""
    betas = (0.5, 0.999)
    params = [nn.Parameter(torch.zeros(41, device=DEVICE))]
    params[0].grad = torch.cat((torch.logspace(-15, 15, 40), torch.zeros(1))).to(DEVICE)
    params[0].grad[1::2] *= -1
    optimizer = AdamATan2(params, 1.0, betas, fused=True)
    optimizer.step()
    turn = -torch.sign(params[0].grad) * torch.tensor(0.5).atan() / 0.5
    torch.testing.assert_close(params[0].detach(), turn, rtol=1e-6, atol=0)
    # Then a moment of the old sign over gradients that vanish: m shrinks slower than the root of v.
    state = optimizer.state[params[0]]
    state["exp_avg_sq"].copy_(torch.logspace(-12, 3, 41) ** 2 * state["exp_avg"].cpu() ** 2)
    params[0].grad.zero_()
    before, m = params[0].detach().clone().double(), state["exp_avg"].double() * 0.5
    v = state["exp_avg_sq"].double() * 0.999
    optimizer.step()
    expected = before - torch.atan2(m, (v / (1 - 0.999**2)).sqrt()) / 0.75
    torch.testing.assert_close(params[0].detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("betas", [(0.0, 0.95), (0.9, 0.0)])
def test_betas_of_zero(betas: tuple[float, float]) -> None:
    plain, params = draw_params(ODD), draw_params(ODD)
    for optimizer in (AdamATan2(plain, 1.0, betas), AdamATan2(params, 1.0, betas, fused=True)):
        train(optimizer, range(1, 4))
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=1e-6)


def test_rate_on_the_device() -> None:
    params, same = draw_params(ODD), draw_params(ODD)
    rate = torch.tensor(0.0, dtype=torch.float64, device=DEVICE)
    held = AdamATan2(same, rate, weight_decay=0.3, fused=True)
    train(fused(params), range(1, 4))
    for step in range(1, 4):
        set_grads(same, step)
        rate.fill_(0.1 / step)
        held.step()
    assert all(torch.equal(one, other) for one, other in zip(params, same, strict=True))


def plain(params: Sequence[nn.Parameter]) -> AdamATan2:
    return AdamATan2(params, 1.0, weight_decay=0.3)


@pytest.mark.parametrize(("first", "second"), [(plain, fused), (fused, plain), (fused, fused)])
def test_states_of_either_kind_continue(
    first: Callable[[Sequence[nn.Parameter]], AdamATan2], second: Callable[[Sequence[nn.Parameter]], AdamATan2]
) -> None:
    whole, half = draw_params(ODD), draw_params(ODD)
    train(fused(whole), range(1, 7))
    earlier = first(half)
    train(earlier, range(1, 4))
    later = second(half)
    later.load_state_dict(deepcopy(earlier.state_dict()))
    assert later.param_groups[0]["fused"] == (second is fused)
    train(later, range(4, 7))
    if first is second:
        assert all(torch.equal(one, other) for one, other in zip(half, whole, strict=True))
    else:
        torch.testing.assert_close(half, whole, rtol=1e-6, atol=1e-6)


# --- copies in the compute dtype ---


def trained_linear() -> tuple[Linear, AdamATan2]:
    layer = Linear(*(param.detach() for param in draw_params([(6, 5), (6,)])))
    optimizer = fused(list(layer.parameters()))
    train(optimizer, range(1, 2))
    return layer, optimizer


def uses_copy(weight: Tensor) -> bool:
    copy = kept_copy(weight)
    return copy is not None and in_dtype([weight], HALF)[0].data_ptr() == copy.values.data_ptr()


def test_the_next_forward_uses_the_copies() -> None:
    layer, optimizer = trained_linear()
    for step in range(2, 4):
        for weight in layer.parameters():
            assert uses_copy(weight)
            assert torch.equal(in_dtype([weight], HALF)[0], weight.to(HALF))
            assert in_dtype([weight], torch.float64)[0].equal(weight.double())
        addresses = [in_dtype([weight], HALF)[0].data_ptr() for weight in layer.parameters()]
        train(optimizer, range(step, step + 1))
        assert addresses == [in_dtype([weight], HALF)[0].data_ptr() for weight in layer.parameters()]


def change_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[1] += 1


def load(weight: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.ones_like(weight)})


def replace_data(weight: nn.Parameter) -> None:
    weight.data = torch.ones_like(weight)


def train_plainly(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    AdamATan2([weight], 0.1).step()


@pytest.mark.parametrize("change", [change_in_place, load, replace_data, train_plainly])
def test_a_stale_copy_is_not_used(change: Callable[[nn.Parameter], None]) -> None:
    layer, optimizer = trained_linear()
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    change(weight)
    assert not torch.equal(weight, before)
    assert not uses_copy(weight)
    assert torch.equal(in_dtype([weight], HALF)[0], weight.to(HALF))
    assert bias is not None
    assert uses_copy(bias)

    copy = kept_copy(weight)
    assert copy is not None
    optimizer.refresh_copies()
    assert uses_copy(weight)
    assert torch.equal(copy.values, weight.to(HALF))  # in the memory that a CUDA graph reads
    train(optimizer, range(2, 3))
    assert uses_copy(weight)
    assert torch.equal(in_dtype([weight], HALF)[0], weight.to(HALF))


def test_a_copied_model_has_no_part_in_the_copies() -> None:
    layer, optimizer = trained_linear()
    twin = deepcopy(layer)
    train(optimizer, range(2, 3))
    assert torch.equal(in_dtype([twin.weight], HALF)[0], twin.weight.to(HALF))


def test_gradients_through_copies() -> None:
    """In float32, as the plain cast's, summed over uses, also where only some of the weights are used."""
    layer, _ = trained_linear()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    layer.zero_grad()
    for _ in range(2):
        torch.autograd.backward(layer(x).square().sum() + layer(x).sum())
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()  # type: ignore[union-attr]
    for _ in range(2):
        for square in (True, False):
            y = nn.functional.linear(x, weight.to(HALF), bias.to(HALF))
            torch.autograd.backward((y.square() if square else y).sum())
    for actual, expected in ((layer.weight, weight), (layer.bias, bias)):
        assert actual is not None
        assert actual.grad is not None
        assert actual.grad.dtype == torch.float32
        torch.testing.assert_close(actual.grad, expected.grad, rtol=2e-3, atol=2e-3)
    one, other = draw_params([(2, 3), (4,)])
    torch.autograd.backward(in_dtype([one, other], HALF)[0].sum())
    assert one.grad is not None
    assert torch.equal(one.grad, torch.ones_like(one))
    assert other.grad is None


def test_a_backward_after_the_step_is_refused() -> None:
    """It would take the gradient at other weights than the forward's."""
    layer, optimizer = trained_linear()
    x = torch.ones(2, 5, dtype=HALF, device=DEVICE, requires_grad=True)
    y = layer(x)
    train(optimizer, range(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- sparse SignSGD ---


def sign_step(ids: Tensor, grads: Tensor, weights: Tensor, *, fused: bool) -> Tensor:
    table = SparseEmbedding(*weights.shape)
    table.weights = weights.clone()
    torch.autograd.backward(table(ids, grads.dtype), grads)
    SparseSignSGD(table, 0.1, 0.7, fused=fused).step()
    return table.weights


@pytest.mark.parametrize("num_ids", [1, 3, 1000])
@pytest.mark.parametrize(
    ("batch", "width"),
    [(1, 6), (7, 32), (70, 70), *(pytest.param(b, 512, marks=on_gpu) for b in (384, 768, 3000))],
)
def test_sign_sgd(num_ids: int, batch: int, width: int) -> None:
    """The gradients are small integers, whose sums are exact in any order, and often 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(num_ids, (batch,), generator=generator, dtype=torch.int32).to(DEVICE)
    grads = torch.randint(-2, 3, (batch, width), generator=generator).float().to(DEVICE)
    weights = torch.randn(num_ids, width, generator=generator).to(DEVICE)
    expected = sign_step(ids, grads, weights, fused=False)
    actual = sign_step(ids, grads, weights, fused=True)
    # A multiplication and an addition may be one operation with one rounding.
    torch.testing.assert_close(actual, expected, rtol=2**-23, atol=1e-8)
    untouched = torch.ones(num_ids, dtype=torch.bool).index_fill(0, ids.cpu().long(), False)
    assert torch.equal(actual[untouched], weights[untouched])
    assert torch.equal(actual, sign_step(ids, grads, weights, fused=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_in_a_cuda_graph() -> None:
    """Replays go on as eager steps do, to the bit, with rates that are filled in between."""
    finals = []
    for graphed in (False, True):
        params = draw_params(HRM_V1)
        table = SparseEmbedding(50, 512).to(DEVICE)
        rate = torch.tensor(0.0, dtype=torch.float64, device=DEVICE)
        dense = AdamATan2(params, rate, weight_decay=0.3, fused=True, copy_dtype=HALF)
        sparse = SparseSignSGD(table, rate, 0.7, fused=True)
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(50, (384,), generator=drawn).to(DEVICE)
        torch.autograd.backward(table(ids, torch.float32), torch.randn(384, 512, generator=drawn).to(DEVICE))
        set_grads(params, 1)
        grads = [param.grad for param in params]

        def step(dense: AdamATan2 = dense, sparse: SparseSignSGD = sparse) -> None:
            dense.step()
            sparse.step()

        graph = None
        for number in range(1, 8):
            for grad in grads:
                assert grad is not None
                grad.mul_(-0.7)
            rate.fill_(0.1 / number)
            if not graphed or number <= 2:
                step()
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            graph.replay()
        copies = [in_dtype([param], HALF)[0] for param in params]
        assert all(torch.equal(copy, param.to(HALF)) for copy, param in zip(copies, params, strict=True))
        finals.append([*params, *copies, table.weights])
    assert all(torch.equal(eager, replayed) for eager, replayed in zip(*finals, strict=True))
