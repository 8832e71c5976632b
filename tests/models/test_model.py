"""The model: names, initial weights and maths, each against an independent statement of the specification."""

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch._inductor.config
from omegaconf import OmegaConf
from torch import Tensor

from hrm.batch import Batch
from hrm.config import CONFIG_DIR, KernelsConfig, kernels_config
from hrm.errors import UserError
from hrm.kernels import KernelRequest, Kernels, backend_names, load_backend, make_kernels, naive, resolve
from hrm.kernels.backend import ReasoningModule
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, RotaryTables, rotate
from hrm.kernels.schedule import chunked, looped
from hrm.models import ACTLossHead
from hrm.models.layers import in_dtype, kept_copy
from tests.helpers.models import (
    NUM_IDENTIFIERS,
    SEQ_LEN,
    VOCAB_SIZE,
    build,
    gradients,
    random_states,
    randomised,
    relative_error,
)
from tests.helpers.reference import EPS, reference_module, reference_step

Arch = dict[str, Any]
MODULES = ("H_level", "L_level")
ON_CPU = KernelRequest(torch.device("cpu"), torch.float32, 64)
RandomBatch = Callable[..., Batch]


def train_step(model: ACTLossHead, batch: Batch) -> dict[str, Tensor]:
    """Forward and backward from a fresh carry; returns the outputs."""
    keys = ["logits", "q_halt_logits", "q_continue_logits", "target_q_continue"]
    outputs: dict[str, Tensor]
    _, loss, _, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=keys)
    loss.backward()
    return outputs


# --- names and shapes ---


@pytest.mark.parametrize(
    ("pos_encodings", "puzzle_emb_ndim", "prefix_len"),
    [("rope", 32, 1), ("learned", 32, 1), ("rope", 0, 0), ("learned", 0, 0), ("rope", 20, 1), ("learned", 80, 3)],
)
def test_state_dict(tiny_arch: Arch, pos_encodings: str, puzzle_emb_ndim: int, prefix_len: int) -> None:
    model = build(
        tiny_arch | {"H_layers": 2, "L_layers": 3, "pos_encodings": pos_encodings, "puzzle_emb_ndim": puzzle_emb_ndim}
    )
    expected: dict[str, tuple[int, ...]] = {
        "H_init": (32,),
        "L_init": (32,),
        "embed_tokens.embedding_weight": (VOCAB_SIZE, 32),
        "lm_head.weight": (VOCAB_SIZE, 32),
        "q_head.weight": (2, 32),
        "q_head.bias": (2,),
    }
    if pos_encodings == "learned":
        expected["embed_pos.embedding_weight"] = (prefix_len + SEQ_LEN, 32)
    if puzzle_emb_ndim:
        expected["puzzle_emb.weights"] = (NUM_IDENTIFIERS, puzzle_emb_ndim)
    for layer in ("H_level.layers.0", "H_level.layers.1", *(f"L_level.layers.{i}" for i in range(3))):
        expected[f"{layer}.self_attn.qkv_proj.weight"] = (96, 32)
        expected[f"{layer}.self_attn.o_proj.weight"] = (32, 32)
        expected[f"{layer}.mlp.gate_up_proj.weight"] = (512, 32)
        expected[f"{layer}.mlp.down_proj.weight"] = (32, 256)
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        f"model.inner.{name}": shape for name, shape in expected.items()
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    # What is no parameter, the dense optimizer must not see.
    buffers = {"model.inner.H_init", "model.inner.L_init", "model.inner.puzzle_emb.weights"}
    assert dict(model.named_parameters()).keys() == state.keys() - buffers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_initial_states_have_the_dtype_of_the_states(tiny_arch: Arch, dtype: str, random_batch: RandomBatch) -> None:
    """As in the published checkpoints; and wider ones, of older checkpoints, give the same numbers."""
    batch = random_batch()
    model = build(tiny_arch | {"forward_dtype": dtype}).eval()
    state = model.state_dict()
    initial = {name for name in state if name.endswith("_init")}
    assert {state[name].dtype for name in initial} == {getattr(torch, dtype)}
    assert {tensor.dtype for name, tensor in state.items() if name not in initial} == {torch.float32}
    wide = {name: torch.randn_like(state[name], dtype=torch.float32) for name in initial}
    other = build(tiny_arch | {"forward_dtype": dtype}).eval()
    model.load_state_dict(state | wide)
    other.load_state_dict(state | wide)
    for name in ("H_init", "L_init"):  # as they were until now
        other.model.inner.register_buffer(name, wide[f"model.inner.{name}"])
    outputs = [each(carry=each.initial_carry(batch), batch=batch, return_keys=["logits"])[3] for each in (model, other)]
    assert torch.equal(outputs[0]["logits"], outputs[1]["logits"])


@pytest.mark.parametrize(
    ("hidden_size", "expansion", "inner"),
    [
        (512, 4, 1536),  # 1365.3
        (32, 4, 256),  # 85.3
        (96, 4, 256),  # 256 exactly
        (32, 12.02, 256),  # 256.43: rounded before it is rounded up
        (32, 12.04, 512),  # 256.85
    ],
)
def test_inner_width_of_swiglu(tiny_arch: Arch, hidden_size: int, expansion: float, inner: int) -> None:
    state = build(tiny_arch | {"hidden_size": hidden_size, "expansion": expansion}).state_dict()
    assert state["model.inner.H_level.layers.0.mlp.down_proj.weight"].shape == (hidden_size, inner)
    assert state["model.inner.H_level.layers.0.mlp.gate_up_proj.weight"].shape == (2 * inner, hidden_size)


# --- initial weights ---


def test_initial_weights(tiny_arch: Arch) -> None:
    width = 256
    model = build(tiny_arch | {"hidden_size": width, "pos_encodings": "learned"}, seq_len=80, vocab_size=50)
    state = {name.removeprefix("model.inner."): tensor for name, tensor in model.state_dict().items()}
    assert torch.equal(state.pop("q_head.weight"), torch.zeros(2, width))
    assert torch.equal(state.pop("q_head.bias"), torch.full((2,), -5.0))
    assert torch.equal(state.pop("puzzle_emb.weights"), torch.zeros(NUM_IDENTIFIERS, width))

    cut_normal = 2 / 0.8796256610342398  # two sigma of the uncut normal, in units of the cut one's deviation
    within_sigma = math.erf(1 / math.sqrt(2)) / math.erf(2 / math.sqrt(2))
    for name, tensor in state.items():
        # Tables have 1/sqrt(D), linears 1/sqrt(fan_in): the same rule for a [rows, features] array.
        target = 1.0 if name in ("H_init", "L_init") else tensor.shape[1] ** -0.5
        scaled, count = tensor.double().flatten() / target, tensor.numel()
        # Five standard errors of each statistic; a cut normal's fourth moment is below the normal's 3.
        assert abs(scaled.mean()) < 5 / math.sqrt(count), name
        assert abs(scaled.square().mean() - 1) < 5 * math.sqrt(2 / count), name
        share = (scaled.abs() < cut_normal / 2).double().mean()
        assert abs(share - within_sigma) < 5 * math.sqrt(within_sigma * (1 - within_sigma) / count), name
        assert scaled.abs().max() <= cut_normal * (1 + 1e-6), name
        if count > 5000:
            assert scaled.abs().max() > 0.99 * cut_normal, name
    drawn = [tensor.flatten()[:100].tolist() for tensor in state.values()]
    assert all(one != other for number, one in enumerate(drawn) for other in drawn[:number])


def test_printed_models_have_sizes(tiny_arch: Arch) -> None:
    model = build(tiny_arch | {"hidden_size": 64, "num_heads": 4, "expansion": 4})
    shown = str(model)
    assert f"parameters={sum(parameter.numel() for parameter in model.parameters()):,}" in shown
    assert "(qkv_proj): Linear(in_features=64, out_features=192, bias=False)" in shown
    assert "(q_head): Linear(in_features=64, out_features=2, bias=True)" in shown
    assert f"(embed_tokens): Embedding({VOCAB_SIZE}, 64)" in shown
    assert f"(puzzle_emb): SparseEmbedding({NUM_IDENTIFIERS}, " in shown


def test_seed_decides_the_weights(tiny_arch: Arch) -> None:
    one, same, other = (build(tiny_arch, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    constant = ("q_head.weight", "q_head.bias", "puzzle_emb.weights")
    assert all(not torch.equal(one[name], other[name]) for name in one if not name.endswith(constant))


def test_global_generator_is_neither_read_nor_advanced(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    def outcome(global_seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = build(tiny_arch | {"halt_exploration_prob": 0.5}, batch_size=40)
        q_bias = torch.tensor([5.0, -5.0])  # all would halt, so that exploration shows
        model.load_state_dict(model.state_dict() | {"model.inner.q_head.bias": q_bias})
        batch = random_batch(40)
        carry, loss, *_ = model(carry=model.initial_carry(batch), batch=batch)
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        return [carry.halted, loss.detach(), *model.state_dict().values()]

    assert all(torch.equal(one, other) for one, other in zip(outcome(1), outcome(2), strict=True))


# --- embeddings ---


@pytest.mark.parametrize("pos_encodings", ["rope", "learned", "rope+learned"])
@pytest.mark.parametrize(("puzzle_emb_ndim", "prefix_len"), [(0, 0), (20, 1), (80, 3)])
def test_embeddings(
    tiny_arch: Arch, random_batch: RandomBatch, pos_encodings: str, puzzle_emb_ndim: int, prefix_len: int
) -> None:
    inner = build(tiny_arch | {"pos_encodings": pos_encodings, "puzzle_emb_ndim": puzzle_emb_ndim}).model.inner
    if puzzle_emb_ndim:
        inner.puzzle_emb.weights.normal_(generator=torch.Generator().manual_seed(0))
    batch = random_batch()
    embeddings = inner.prepare(batch).embeddings
    assert embeddings.shape == (3, prefix_len + SEQ_LEN, 32)
    for sequence in range(3):
        for token in range(prefix_len + SEQ_LEN):
            if token < prefix_len:
                row = inner.puzzle_emb.weights[batch["puzzle_identifiers"][sequence]][token * 32 : (token + 1) * 32]
                expected = torch.cat((row, torch.zeros(32 - len(row))))
            else:
                expected = inner.embed_tokens.embedding_weight[batch["inputs"][sequence, token - prefix_len]]
            if pos_encodings != "rope":
                expected = (expected + inner.embed_pos.embedding_weight[token]) / math.sqrt(2)
            torch.testing.assert_close(embeddings[sequence, token], math.sqrt(32) * expected)


# --- a reasoning module ---


@dataclass
class Case:
    """Inputs of a reasoning module in float64 on the CPU, and what the reference makes of them."""

    state: Tensor
    injection: Tensor
    blocks: list[BlockWeights]
    cotangent: Tensor
    num_heads: int
    theta: float | None
    output: Tensor
    gradients: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.state, self.injection, *(weight for block in self.blocks for weight in block)]

    def rotary(self, dtype: torch.dtype) -> RotaryTables | None:
        """Tables rounded only once, so that their error does not grow with the position."""
        if self.theta is None:
            return None
        tokens, size = self.state.shape[1], self.state.shape[2] // self.num_heads
        frequencies = [self.theta ** (-2 * (feature % (size // 2)) / size) for feature in range(size)]
        positions = torch.arange(tokens, dtype=torch.float64)
        exact = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float64))
        return RotaryTables(exact.cos().to(dtype), exact.sin().to(dtype))

    def assert_right(
        self, module: ReasoningModule, dtype: torch.dtype, forward: float, backward: float, device: str = "cpu"
    ) -> None:
        """The output of `module` in `dtype`, and the gradients of state, injection and weights, as errors in L2."""
        leaves = [leaf.to(device, dtype).requires_grad_() for leaf in self.leaves()]
        blocks = [BlockWeights(*leaves[start : start + 4]) for start in range(2, len(leaves), 4)]
        rotary = self.rotary(torch.promote_types(dtype, torch.float32))
        if rotary is not None:
            rotary = RotaryTables(rotary.cos.to(device), rotary.sin.to(device))
        context = KernelContext(rotary, self.num_heads, EPS)
        output = module(leaves[0], leaves[1], blocks, context)
        assert output.dtype == dtype
        assert relative_error(output, self.output) < forward
        found = torch.autograd.grad(output, leaves, self.cotangent.to(device, dtype))
        for gradient, reference in zip(found, self.gradients, strict=True):
            assert relative_error(gradient, reference) < backward
        with torch.no_grad():  # compiled backends have other code for it
            output = module(leaves[0], leaves[1], blocks, context)
        assert relative_error(output, self.output) < forward


@functools.cache
def reference_case(
    batch: int, tokens: int, theta: float | None, width: int, num_heads: int, inner: int, num_blocks: int = 2
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def linear(rows: int, columns: int) -> Tensor:
        return normal(rows, columns) / math.sqrt(columns)

    blocks = [
        BlockWeights(linear(3 * width, width), linear(width, width), linear(2 * inner, width), linear(width, inner))
        for _ in range(num_blocks)
    ]
    shape = (batch, tokens, width)
    case = Case(normal(*shape), normal(*shape), blocks, normal(*shape), num_heads, theta, torch.empty(0), [])
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    case.output = reference_module(case.state, case.injection, case.blocks, num_heads, theta)
    case.gradients = list(torch.autograd.grad(case.output, leaves, case.cotangent))
    for leaf in leaves:
        leaf.requires_grad_(False)
    return case


@pytest.mark.parametrize("theta", [None, 10000.0], ids=["learned", "rope"])
@pytest.mark.parametrize("tokens", [17, 82])
@pytest.mark.parametrize("batch", [1, 3])
def test_naive_module(batch: int, tokens: int, theta: float | None) -> None:
    case = reference_case(batch, tokens, theta, width=48, num_heads=3, inner=40)
    case.assert_right(naive.reasoning_module, torch.float64, 1e-14, 1e-14)
    case.assert_right(naive.reasoning_module, torch.float32, 1e-6, 2e-6)
    case.assert_right(naive.reasoning_module, torch.bfloat16, 0.015, 0.025)
    case.assert_right(naive.reasoning_module, torch.float16, 0.002, 0.003)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_module_on_cpu() -> None:
    module = make_kernels(resolve(kernels_config("compile"), ON_CPU), MODULES).module
    assert module is not naive.reasoning_module
    case = reference_case(batch=2, tokens=17, theta=10000.0, width=48, num_heads=3, inner=40, num_blocks=1)
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):  # the trial of the compiler costs as much as the rest
        case.assert_right(module, torch.float32, 1e-6, 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("preset", ["naive", "compile", "triton", "head_parallel"])
@pytest.mark.parametrize("tokens", [82, 901])
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_module_on_gpu(preset: str, tokens: int, batch: int) -> None:
    case = reference_case(batch, tokens, theta=10000.0, width=256, num_heads=4, inner=768)
    request = KernelRequest(torch.device("cuda"), torch.bfloat16, 64, num_tokens=tokens, batch_size=batch, width=256)
    module = make_kernels(resolve(kernels_config(preset), request), MODULES).module
    torch._dynamo.reset()
    # Without it, shapes beyond the limit would silently run uncompiled.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        case.assert_right(module, torch.float32, 3e-6, 6e-6, "cuda")
        case.assert_right(module, torch.bfloat16, 0.015, 0.025, "cuda")


@pytest.mark.parametrize("theta", [10000.0, 50.0])
def test_rotary_tables(tiny_arch: Arch, theta: float) -> None:
    arch = tiny_arch | {"hidden_size": 128, "rope_theta": theta, "puzzle_emb_ndim": 129}
    inner = build(arch, seq_len=899).model.inner
    cos, sin = inner.rotary_cos, inner.rotary_sin
    assert cos.shape == sin.shape == (901, 64)
    assert cos.dtype == sin.dtype == torch.float32
    for token in (0, 1, 81, 900):
        for feature in (0, 1, 31, 32, 63):
            angle = token * theta ** (-2 * (feature % 32) / 64)
            # Frequency and angle are rounded to float32 before the cosine is taken.
            assert cos[token, feature].item() == pytest.approx(math.cos(angle), abs=1e-7 * (1 + 2 * angle))
            assert sin[token, feature].item() == pytest.approx(math.sin(angle), abs=1e-7 * (1 + 2 * angle))


def test_grid_rotary_tables(tiny_arch: Arch) -> None:
    """How two cells see each other depends on how many rows and columns lie between them, and on nothing else."""
    inner = build(
        tiny_arch | {"hidden_size": 64, "num_heads": 2, "puzzle_emb_ndim": 65, "pos_encodings": "rope_2d"}, seq_len=81
    ).model.inner
    assert inner.rotary_cos.shape == inner.rotary_sin.shape == (83, 32)
    assert torch.equal(inner.rotary_cos[:, :16], inner.rotary_cos[:, 16:])  # as the fused kernels take for granted
    assert torch.equal(inner.rotary_sin[:, :16], inner.rotary_sin[:, 16:])
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(32, generator=generator).expand(1, 1, 83, 32) for _ in range(2))
    rotary = RotaryTables(inner.rotary_cos, inner.rotary_sin)
    scores = (rotate(q, rotary) @ rotate(k, rotary).mT)[0, 0]
    places = [(-2, -2), (-1, -1), *((row, column) for row in range(9) for column in range(9))]
    by_distance: dict[tuple[int, int], list[float]] = {}
    for number, (row, column) in enumerate(places):
        for other, (its_row, its_column) in enumerate(places):
            distance = (row - its_row, column - its_column)
            by_distance.setdefault(distance, []).append(scores[number, other].item())
    for alike in by_distance.values():
        assert alike == pytest.approx([alike[0]] * len(alike), abs=1e-4)
    assert len({round(alike[0], 3) for alike in by_distance.values()}) > 0.9 * len(by_distance)


def test_the_first_token_of_a_grid_is_not_rotated(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    """As kernels for it alone take for granted: what they give is what the whole module has there."""
    arch = tiny_arch | {"puzzle_emb_ndim": 65, "pos_encodings": "rope_2d", "forward_dtype": "float64"}
    inner = randomised(build(arch, seq_len=9)).model.inner
    assert torch.equal(inner.rotary_cos[0], torch.ones(16))
    assert not inner.rotary_sin[0].any()
    prepared = inner.prepare(random_batch(seq_len=9))
    x, blocks = prepared.embeddings, prepared.blocks["L_level"]
    whole = naive.reasoning_module(x, torch.zeros_like(x), blocks, prepared.context)
    torch.testing.assert_close(naive.first_token_block(x, blocks[0], prepared.context), whole[:, 0])


@pytest.mark.parametrize(("pos_encodings", "in_row"), [("rope", True), ("rope_2d", False), ("learned", True)])
def test_kernels_are_told_whether_positions_are_in_a_row(
    tiny_arch: Arch, pos_encodings: str, in_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[KernelRequest] = []

    def noted(config: KernelsConfig, request: KernelRequest) -> KernelsConfig:
        requests.append(request)
        return resolve(config, request)

    monkeypatch.setattr("hrm.models.resolve", noted)
    build(tiny_arch | {"pos_encodings": pos_encodings}, seq_len=9)
    assert [request.positions_in_row for request in requests] == [in_row]


def test_grid_rotary_tables_need_a_square(tiny_arch: Arch) -> None:
    with pytest.raises(UserError, match=r"pos_encodings=rope_2d is for square grids, which 80 tokens are not"):
        build(tiny_arch | {"pos_encodings": "rope_2d"}, seq_len=80)


# --- an ACT step ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("loss_type", ["stablemax_cross_entropy", "softmax_cross_entropy"])
@pytest.mark.parametrize("pos_encodings", ["rope", "learned", "rope+learned"])
def test_every_dtype_trains(
    tiny_arch: Arch, random_batch: RandomBatch, dtype: str, loss_type: str, pos_encodings: str
) -> None:
    model = build(
        tiny_arch | {"forward_dtype": dtype, "loss": {"loss_type": loss_type}, "pos_encodings": pos_encodings}
    )
    outputs = train_step(model, random_batch())
    assert outputs["logits"].shape == (3, SEQ_LEN, VOCAB_SIZE)
    assert outputs["logits"].dtype == getattr(torch, dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32
    for name in ("q_halt_logits", "q_continue_logits", "target_q_continue"):
        assert (outputs[name].shape, outputs[name].dtype) == ((3,), wide)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32, name
        assert grad.isfinite().all(), name
        # Puzzle rows and q_head start at zero, but nothing that they meet is zero.
        assert grad.count_nonzero() > 0, name


@pytest.mark.parametrize(
    ("cycles", "gradient", "last"),
    [
        ((1, 1), "one_step", 2),
        ((2, 3), "one_step", 2),
        ((3, 1), "one_step", 2),
        ((2, 2), "last_cycle", 3),
        ((2, 3), "last_cycle", 4),
        ((3, 1), "last_cycle", 2),
        ((1, 2), "last_cycle", 3),
        ((2, 2), "4", 4),
        ((3, 1), "all", 6),
    ],
)
def test_gradient_flows_through_the_last_updates(
    tiny_arch: Arch, random_batch: RandomBatch, cycles: tuple[int, int], gradient: str, last: int
) -> None:
    arch = tiny_arch | {"H_cycles": cycles[0], "L_cycles": cycles[1], "H_layers": 2, "puzzle_emb_ndim": 40}
    arch |= {"gradient": gradient}
    model = randomised(build(arch | {"pos_encodings": "learned", "forward_dtype": "float64"})).double()
    inner, batch = model.model.inner, random_batch()
    carry = random_states(model, batch)

    state = inner.recur(carry, inner.prepare(batch))
    logits, q = inner.logits(state), torch.stack(inner.q_values(state), -1)
    generator = torch.Generator().manual_seed(3)
    towards = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in (logits, q)]
    torch.autograd.backward([logits, q], towards)
    found = {name.removeprefix("model.inner."): grad for name, grad in gradients(model).items()}

    weights = {name: weight.detach().clone().requires_grad_() for name, weight in inner.state_dict().items()}
    rows = weights["puzzle_emb.weights"][batch["puzzle_identifiers"].long()].detach().requires_grad_()
    leaves = {name: rows if name == "puzzle rows" else weights[name] for name in found}

    def reference(last: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        outputs = reference_step(weights, rows, batch["inputs"], carry, cycles, 2, updates=last)
        return outputs, torch.autograd.grad(outputs, list(leaves.values()), towards)

    outputs, expected = reference(last)
    torch.testing.assert_close((logits, q), outputs, rtol=1e-10, atol=1e-10)
    for name, grad in zip(leaves, expected, strict=True):
        assert relative_error(found[name], grad) < 1e-10, name
    updates = cycles[0] * (cycles[1] + 1)
    if last < updates:  # the whole gradient is another one, or this test could not tell them apart
        _, whole = reference(updates)
        assert all(
            relative_error(found[name], grad) > 1e-3
            for name, grad in zip(leaves, whole, strict=True)
            if name.startswith("L_level")
        )


def computed_by(kernels: Kernels, module: ReasoningModule) -> Kernels:
    """`kernels` with all modules computed by `module`, and blocks of the first token on weights of any dtype."""

    def first_token_block(x: Tensor, weights: BlockWeights, context: KernelContext) -> Tensor:
        cast = BlockWeights(*(weight.to(x.dtype) for weight in weights))
        return naive.first_token_block(x, cast, context)

    return replace(kernels, module=module, first_token_block=first_token_block, run=looped(module))


def test_updates_in_order(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    """L, L, H, L, L, H, gradient only in the last two; H is injected z_L, L is injected z_H + E."""
    model = build(tiny_arch)
    inner, batch = model.model.inner, random_batch()
    calls = []

    def recording(state: Tensor, injection: Tensor, blocks: Sequence[BlockWeights], context: KernelContext) -> Tensor:
        output = naive.reasoning_module(state, injection, blocks, context)
        calls.append((state, injection, blocks, output, torch.is_grad_enabled()))
        return output

    inner.kernels = computed_by(inner.kernels, recording)
    prepared, z = inner.prepare(batch), random_states(model, batch)
    result = inner.recur(z, prepared)
    assert [grad for *_, grad in calls] == [False] * 4 + [True] * 2
    z_H, z_L = z["z_H"], z["z_L"]
    for number, (state, injection, blocks, output, _) in enumerate(calls):
        if number % 3 < 2:
            assert blocks is prepared.blocks["L_level"]
            assert torch.equal(state, z_L)
            assert torch.equal(injection, z_H + prepared.embeddings)
            z_L = output
        else:
            assert blocks is prepared.blocks["H_level"]
            assert torch.equal(state, z_H)
            assert torch.equal(injection, z_L)
            z_H = output
    assert result["z_H"] is z_H
    assert result["z_L"] is z_L


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("H_layers", [1, 3])
def test_target_needs_the_first_token_only(
    positions: str, H_layers: int, tiny_arch: Arch, random_batch: RandomBatch
) -> None:
    arch = tiny_arch | {"pos_encodings": positions, "H_layers": H_layers, "forward_dtype": "float64"}
    model = randomised(build(arch)).double()
    inner = model.model.inner
    with torch.no_grad():
        prepared, carry = inner.prepare(random_batch()), random_states(model, random_batch())
        expected = inner.q_values(inner.recur(carry, prepared))
        found = inner.recur_to_q_values(carry, prepared)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequences", [1, 2, 3, 5])
def test_chunks_change_nothing(sequences: int, tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model = randomised(build(tiny_arch | {"H_cycles": 3, "forward_dtype": "float64"})).double()
    inner, batch = model.model.inner, random_batch(batch_size=5)
    with torch.no_grad():
        prepared, carry = inner.prepare(batch), random_states(model, batch)
        before = {name: state.clone() for name, state in carry.items()}
        expected = inner.recur(carry, prepared)
        inner.kernels = replace(inner.kernels, run=chunked(inner.kernels.run, sequences))
        found = inner.recur(carry, prepared)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(carry[name], state) for name, state in before.items())


def test_casting_weights_once_changes_nothing(
    tiny_arch: Arch, random_batch: RandomBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, batch = tiny_arch | {"forward_dtype": "bfloat16"}, random_batch()
    once, each_time = randomised(build(arch)), randomised(build(arch))

    def casting(state: Tensor, injection: Tensor, blocks: Sequence[BlockWeights], context: KernelContext) -> Tensor:
        assert {weight.dtype for block in blocks for weight in block} <= {torch.float32}
        cast = [BlockWeights(*(weight.to(state.dtype) for weight in block)) for block in blocks]
        return naive.reasoning_module(state, injection, cast, context)

    inner = each_time.model.inner
    inner.kernels = computed_by(inner.kernels, casting)
    outputs = train_step(once, batch)
    monkeypatch.setattr("hrm.models.recurrent.in_dtype", lambda weights, dtype: tuple(weights))
    expected = train_step(each_time, batch)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    found, wanted = gradients(once), gradients(each_time)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_weights_at_hand_are_cast_once(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model, batch = build(tiny_arch | {"forward_dtype": "bfloat16"}).eval(), random_batch()
    weights = list(model.parameters())

    def logits() -> Tensor:
        _, _, _, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=["logits"])
        return outputs["logits"]

    with torch.no_grad():
        expected = logits()
        with model.weights_at_hand():
            first, again = in_dtype(weights, torch.bfloat16), in_dtype(weights, torch.bfloat16)
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, again, strict=True))
            assert torch.equal(logits(), expected)
            weights[0].mul_(2)  # against the rule, and noticed all the same
            assert torch.equal(in_dtype(weights[:1], torch.bfloat16)[0], weights[0].bfloat16())
        assert not any(kept_copy(weight) for weight in weights)
        with model.weights_at_hand():  # as a graph that was recorded before reads them
            later = in_dtype(weights, torch.bfloat16)
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, later, strict=True))
            assert torch.equal(later[0], weights[0].bfloat16())
        with pytest.raises(ZeroDivisionError), model.weights_at_hand():
            raise ZeroDivisionError
        assert not any(kept_copy(weight) for weight in weights)


# --- building from what people write ---


def test_fields_left_out_have_the_published_defaults() -> None:
    config = build({"hidden_size": 64, "L_layers": 1, "H_layers": 1, "expansion": 1}).model.inner.config
    assert config.hidden_size == config.puzzle_emb_ndim == 64
    assert (config.H_cycles, config.L_cycles, config.num_heads, config.halt_max_steps) == (2, 2, 8, 16)
    assert (config.pos_encodings, config.rope_theta, config.rms_norm_eps) == ("rope", 10000, 1e-5)
    assert (config.forward_dtype, config.halt_exploration_prob) == ("bfloat16", 0.1)
    assert config.loss.loss_type == "stablemax_cross_entropy"


def test_arch_from_omegaconf(tiny_arch: Arch) -> None:
    whole = OmegaConf.create({"arch": tiny_arch | {"puzzle_emb_ndim": "${.hidden_size}"}, "lr": 1e-4})
    ours, same = build(whole.arch, seed=5).state_dict(), build(tiny_arch, seed=5).state_dict()
    assert ours.keys() == same.keys()
    assert all(torch.equal(ours[name], same[name]) for name in same)


def test_published_configs_carry_what_the_data_say(tiny_arch: Arch) -> None:
    published = {
        "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "batch_size": 3,
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB_SIZE,
        "num_puzzle_identifiers": NUM_IDENTIFIERS,
        "causal": False,
    }
    assert build(tiny_arch | published).model.inner.config == build(tiny_arch).model.inner.config
    with pytest.raises(UserError, match=r"^arch\.causal=true is not supported"):
        build(tiny_arch | published | {"causal": True})
    for name, value in (("batch_size", 4), ("seq_len", 6), ("vocab_size", 11), ("num_puzzle_identifiers", 5)):
        said = rf"^arch\.{name}={value} contradicts the data, which has {published[name]}:"
        with pytest.raises(UserError, match=said):
            build(tiny_arch | published | {name: value})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hiden_size": 64}, "arch has no field hiden_size; did you mean hidden_size?"),
        ({"loss": {"loss_tpye": "stablemax_cross_entropy"}}, "loss_type"),
        ({"loss": "softmax_cross_entropy"}, "arch.loss"),
        ({"loss": {"loss_type": "softmax"}}, "arch.loss.loss_type=softmax is not a choice"),
        (
            {"pos_encodings": "sine"},
            "arch.pos_encodings=sine is not a choice; there are: learned, none, rope, rope+learned, rope_2d, "
            "rope_2d+learned.",
        ),
        ({"forward_dtype": "bf16"}, "arch.forward_dtype=bf16 is not a choice; did you mean bfloat16?"),
        ({"hidden_size": "wide"}, "arch.hidden_size is not usable: Value 'wide'"),
        ({"num_heads": 5}, "arch.hidden_size=32 cannot be split into arch.num_heads=5 equal heads"),
        ({"num_heads": 32}, "arch.pos_encodings=rope needs a head size that is a multiple of 2"),
        ({"H_cycles": 0}, "arch.H_cycles=0 is too small"),
        ({"halt_max_steps": 0}, "arch.halt_max_steps=0 is too small"),
        ({"halt_exploration_prob": 1.5}, "arch.halt_exploration_prob=1.5 is out of range"),
        ({"puzzle_emb_ndim": -1}, "arch.puzzle_emb_ndim=-1 is too small"),
        ({"expansion": 0}, "arch.expansion=0.0 is out of range"),
        ({"expansion": math.nan}, "arch.expansion=nan is out of range"),
        ({"rope_theta": 0}, "arch.rope_theta=0.0 is out of range"),
        ({"rms_norm_eps": -1e-5}, "arch.rms_norm_eps=-1e-05 is out of range"),
    ],
)
def test_impossible_arch(tiny_arch: Arch, fields: Arch, said: str) -> None:
    with pytest.raises(UserError) as raised:
        build(tiny_arch | fields)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers"])
def test_impossible_data(tiny_arch: Arch, name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}=0 is too small"):
        build(tiny_arch, **{name: 0})


# --- choosing kernels ---


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (KernelRequest(torch.device("cpu"), torch.bfloat16, 64), "Triton needs an NVIDIA GPU, not cpu"),
        (KernelRequest(torch.device("cuda"), torch.float64, 64), "it has no kernels for float64"),
        (
            KernelRequest(torch.device("cuda"), torch.float32, 48),
            "it has kernels for heads of 16, 32, 64 and 128, not 48",
        ),
    ],
)
def test_triton_names_what_it_lacks(request_: KernelRequest, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError) as raised:
        resolve(KernelsConfig("triton"), request_)
    assert str(raised.value) == f"kernels.backend=triton cannot run: {said}; take kernels=naive."
    assert resolve(KernelsConfig("auto"), request_).backend == "naive"


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIG_DIR / "kernels").glob("*.yaml")))
def test_presets_load(preset: str) -> None:
    """And run on the CPU, or say why not."""
    config = kernels_config(preset)
    if config.cuda_graphs:
        blocks = (BlockWeights,) if config.backend == "auto" else load_backend(config.backend).block_types
        with pytest.raises(UserError, match=r"needs an NVIDIA GPU, not cpu; take kernels=naive\.$"):
            resolve(config, ON_CPU._replace(block_types=blocks[:1]))
    elif not config.compile or shutil.which("c++") or shutil.which("g++"):
        assert resolve(config, ON_CPU).backend in backend_names()
        assert callable(make_kernels(resolve(config, ON_CPU), MODULES).module)


def test_kernels_from_preset_mapping_or_object(tiny_arch: Arch) -> None:
    for kernels in ("naive", "auto", {"backend": "naive"}, {}, KernelsConfig()):
        assert build(tiny_arch, kernels=kernels).model.inner.kernels.config.backend == "naive"


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ("naiv", "kernels=naiv is not a preset; did you mean naive?"),
        ({"backend": "naivee"}, "kernels.backend=naivee is not one; did you mean naive?"),
        ({"bakend": "naive"}, "kernels has no field bakend; did you mean backend?"),
        ({"compile": "maybe"}, "kernels.compile is not usable"),
    ],
)
def test_impossible_kernels(tiny_arch: Arch, kernels: str | dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        build(tiny_arch, kernels=kernels)
    assert said in str(raised.value)


def test_compile_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^kernels\.compile=true cannot run on mps: .* take kernels=naive\.$"):
        resolve(KernelsConfig(compile=True), ON_CPU._replace(device=torch.device("mps")))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"cannot run on cpu: there is no C\+\+ compiler; take kernels=naive\.$"):
        resolve(KernelsConfig(compile=True), ON_CPU)


def test_registers_stand_before_the_input_and_are_not_learned(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model = build(tiny_arch | {"register_tokens": 3})
    inner, batch = model.model.inner, random_batch()
    assert inner.prefix_len == 4
    assert "model.inner.registers" in model.state_dict()
    assert "model.inner.registers" not in dict(model.named_parameters())
    embeddings = inner.prepare(batch).embeddings
    assert embeddings.shape == (3, 9, 32)
    torch.testing.assert_close(embeddings[:, 1:4], inner.registers.expand(3, -1, -1))
    _, loss, _, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=["logits"])
    assert outputs["logits"].shape == (3, 5, 7)
    loss.backward()
    assert inner.registers.grad is None
