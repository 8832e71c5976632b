"""TRM: one module for both levels, tokens mixed by an MLP, a prefix longer than the puzzle's vector."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hrm.batch import Batch
from hrm.config import CONFIG_DIR, KernelsConfig, ParallelConfig, kernels_config
from hrm.config.compose import compose
from hrm.config.training import PretrainConfig
from hrm.distributed.partition import SharedModel
from hrm.distributed.world import Axis, World
from hrm.errors import UserError
from hrm.kernels import KernelRequest, describe, make_kernels, naive, resolve
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import MixerWeights
from hrm.models import arch_config
from hrm.models.hrm import HRMConfig
from hrm.models.trm import NAME, TRMConfig
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
from tests.helpers.reference import EPS, reference_norm, reference_swiglu

Arch = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def trm(tiny_arch: Arch) -> Arch:
    """A tiny one."""
    del tiny_arch["H_layers"]
    return tiny_arch | {
        "name": NAME,
        "L_layers": 2,
        "mlp_t": True,
        "H_cycles": 2,
        "L_cycles": 3,
        "pos_encodings": "none",
        "puzzle_emb_len": 3,
    }


def published(**fields: Any) -> TRMConfig:
    """`config/arch/trm.yaml` with its defaults."""
    values = OmegaConf.merge(OmegaConf.load(CONFIG_DIR / "arch/trm.yaml"), fields)
    del values["defaults"]
    config = arch_config(values)
    assert isinstance(config, TRMConfig)
    return config


def reference_module(state: Tensor, injection: Tensor, blocks: list[MixerWeights]) -> Tensor:
    """One sequence at a time, one feature after the other."""
    rows = []
    for sequence in state + injection:
        x = sequence
        for block in blocks:
            mixed = torch.stack(
                [reference_swiglu(feature, block.token_gate_up, block.token_down) for feature in x.T], -1
            )
            x = reference_norm((x + mixed).T).T
            x = reference_norm(x + reference_swiglu(x, block.gate_up, block.down))
        rows.append(x)
    return torch.stack(rows)


def draw_blocks(tokens: int, width: int, inner: int, num_blocks: int = 2) -> list[MixerWeights]:
    generator = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)

    return [
        MixerWeights(linear(2 * inner, tokens), linear(tokens, inner), linear(2 * inner, width), linear(width, inner))
        for _ in range(num_blocks)
    ]


def assert_right(module: Callable[..., Tensor], batch: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Output and gradients of `module` in `dtype`, against the reference in float64."""
    forward, backward = {torch.float64: (1e-13, 1e-13), torch.float32: (2e-6, 4e-6)}.get(dtype, (0.015, 0.03))
    generator = torch.Generator().manual_seed(1)
    state, injection, towards = torch.randn(3, batch, tokens, width, generator=generator, dtype=torch.float64)
    exact = [state, injection, *(weight for block in draw_blocks(tokens, width, 40) for weight in block)]

    def run(function: Callable[..., Tensor], leaves: list[Tensor], *options: Any) -> tuple[Tensor, ...]:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        blocks = [MixerWeights(*leaves[start : start + 4]) for start in range(2, len(leaves), 4)]
        output = function(*leaves[:2], blocks, *options)
        return output, *torch.autograd.grad(output, leaves, towards.to(output))

    expected = run(reference_module, [leaf.clone() for leaf in exact])
    found = run(module, [leaf.to(DEVICE, dtype, copy=True) for leaf in exact], KernelContext(None, 1, EPS))
    assert found[0].dtype == dtype
    assert relative_error(found[0], expected[0]) < forward
    assert all(relative_error(*pair) < backward for pair in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (3, 17), (2, 96)])
def test_naive_module(batch: int, tokens: int, dtype: torch.dtype) -> None:
    assert_right(naive.reasoning_module, batch, tokens, 24, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (5, 88), (8, 97), (3, 901)])
def test_module_on_gpu(batch: int, tokens: int) -> None:
    request = KernelRequest(
        torch.device("cuda"),
        torch.bfloat16,
        64,
        rotary=False,
        num_tokens=tokens,
        batch_size=batch,
        width=256,
        block_types=(naive.MixerWeights,),
    )
    kernels = resolve(kernels_config("auto"), request)
    assert kernels.compile
    assert_right(make_kernels(kernels, ("L_level",)).module, batch, tokens, 256, torch.bfloat16)


def test_state_dict(trm: Arch) -> None:
    """The names of the published code."""
    expected: dict[str, tuple[int, ...]] = {
        "H_init": (32,),
        "L_init": (32,),
        "embed_tokens.embedding_weight": (VOCAB_SIZE, 32),
        "lm_head.weight": (VOCAB_SIZE, 32),
        "puzzle_emb.weights": (NUM_IDENTIFIERS, 32),
        "q_head.bias": (2,),
        "q_head.weight": (2, 32),
    }
    for layer in ("L_level.layers.0", "L_level.layers.1"):
        expected[f"{layer}.mlp_t.gate_up_proj.weight"] = (512, 3 + SEQ_LEN)
        expected[f"{layer}.mlp_t.down_proj.weight"] = (3 + SEQ_LEN, 256)
        expected[f"{layer}.mlp.gate_up_proj.weight"] = (512, 32)
        expected[f"{layer}.mlp.down_proj.weight"] = (32, 256)
    state = build(trm).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        f"model.inner.{name}": shape for name, shape in expected.items()
    }


@pytest.mark.parametrize(("mlp_t", "millions"), [(True, 5), (False, 7)])
def test_size(mlp_t: bool, millions: int) -> None:
    """As the paper has it, for Sudoku."""
    model = build(vars(published(mlp_t=mlp_t)) | {"loss": {}}, seq_len=81, vocab_size=11)
    assert round(sum(param.numel() for param in model.parameters()) / 1e6) == millions
    assert model.model.inner.prefix_len == 16


def test_prefix_longer_than_the_vector(trm: Arch, random_batch: Callable[..., Batch]) -> None:
    model = randomised(build(trm | {"puzzle_emb_ndim": 40}))
    inner, batch = model.model.inner, random_batch()
    prefix = inner.prepare(batch).embeddings[:, :3].flatten(1) / math.sqrt(32)
    torch.testing.assert_close(prefix[:, :40], inner.puzzle_emb.weights[batch["puzzle_identifiers"]])
    assert not prefix[:, 40:].any()
    assert build(trm | {"puzzle_emb_len": 1, "puzzle_emb_ndim": 40}).model.inner.prefix_len == 2
    assert build(trm | {"puzzle_emb_ndim": 0}).model.inner.prefix_len == 0


def reference_step(
    weights: Mapping[str, Tensor], embeddings: Tensor, z_H: Tensor, z_L: Tensor
) -> tuple[Tensor, Tensor]:
    """Both levels by the one module; gradients through the second of two cycles."""
    parts = ("mlp_t.gate_up_proj", "mlp_t.down_proj", "mlp.gate_up_proj", "mlp.down_proj")
    blocks = [MixerWeights(*(weights[f"L_level.layers.{i}.{part}.weight"] for part in parts)) for i in range(2)]
    for _ in range(2):
        z_H, z_L = z_H.detach(), z_L.detach()
        for _ in range(3):
            z_L = reference_module(z_L, z_H + embeddings, blocks)
        z_H = reference_module(z_H, z_L, blocks)
    return z_H, z_L


def test_one_module_serves_both_levels(trm: Arch, random_batch: Callable[..., Batch]) -> None:
    model = randomised(build(trm | {"forward_dtype": "float64"})).double()
    inner, batch = model.model.inner, random_batch()
    carry, prepared = random_states(model, batch), inner.prepare(batch)
    state = inner.recur(carry, prepared)
    towards = torch.randn(state["z_H"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state["z_H"].backward(towards)
    found = {name: weight.grad for name, weight in inner.named_parameters() if name.startswith("L_level")}

    weights = {name: weight.detach().clone().requires_grad_() for name, weight in inner.state_dict().items()}
    z_H, z_L = reference_step(weights, prepared.embeddings.detach(), carry["z_H"], carry["z_L"])
    torch.testing.assert_close([state["z_H"], state["z_L"]], [z_H, z_L], rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(z_H, [weights[name] for name in found], towards)
    assert len(found) == 8
    for name, grad in zip(found, expected, strict=True):
        assert (mine := found[name]) is not None
        assert relative_error(mine, grad) < 1e-10, name


@pytest.mark.parametrize("backend", ["triton", "triton_unrolled", "head_parallel"])
def test_kernels_share_the_module_too(backend: str, trm: Arch, random_batch: Callable[..., Batch]) -> None:
    pytest.importorskip("triton")
    batch, results = {name: field.to(DEVICE) for name, field in random_batch().items()}, []
    for kernels, dtype in (("naive", "float64"), (backend, "float32")):
        arch = trm | {"mlp_t": False, "pos_encodings": "rope", "forward_dtype": dtype}
        model = randomised(build(arch, kernels={"backend": kernels}, device=DEVICE)).to(getattr(torch, dtype))
        carry, loss, *_ = model(carry=model.initial_carry(batch), batch=batch)
        loss.backward()
        results.append([carry.states["z_H"], carry.states["z_L"], loss, *gradients(model).values()])
    for exact, found in zip(*results, strict=True):
        assert relative_error(found, exact) < 5e-5  # of float32, through eight updates of two blocks


def test_target_needs_the_first_token_only(trm: Arch, random_batch: Callable[..., Batch]) -> None:
    model = randomised(build(trm | {"forward_dtype": "float64", "q_continue": True})).double()
    inner = model.model.inner
    with torch.no_grad():
        prepared, carry = inner.prepare(random_batch()), random_states(model, random_batch())
        expected = inner.q_values(inner.recur(carry, prepared))
        torch.testing.assert_close(inner.recur_to_q_values(carry, prepared), expected, rtol=1e-12, atol=1e-12)


def test_an_hrm_with_one_module_is_a_trm(trm: Arch, random_batch: Callable[..., Batch]) -> None:
    """Earlier versions knew TRM as an HRM with H_layers=0; such configs give the same numbers."""
    as_hrm = trm | {"name": HRMConfig.name, "H_layers": 0, "q_continue": False, "grad_updates": 4}
    batch, results = random_batch(), []
    for arch in (trm, as_hrm):
        model = randomised(build(arch))
        _, loss, *_ = model(carry=model.initial_carry(batch), batch=batch)
        loss.backward()
        results.append([loss, *gradients(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("L_cycles", [1, 3])
def test_gradients_flow_through_the_last_cycle(L_cycles: int) -> None:
    """However TRM is asked for: by a mapping, by a command line, or as it was saved before `gradient` had a name."""
    by_mapping = arch_config({"name": NAME, "L_cycles": L_cycles, "hidden_size": 64, "num_heads": 1})
    overrides = ["arch=trm", f"arch.L_cycles={L_cycles}", "arch.hidden_size=64", "arch.num_heads=1"]
    assert compose(PretrainConfig, "pretrain", overrides).arch == by_mapping
    schedule = list(by_mapping.schedule())
    assert len(schedule) == 3 * (L_cycles + 1)
    assert len(schedule) - by_mapping.gradient_start(schedule) == L_cycles + 1
    saved = arch_config({"name": NAME, "L_cycles": L_cycles, "grad_updates": L_cycles + 1})
    assert saved.gradient_start(schedule) == by_mapping.gradient_start(schedule)


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (
            KernelsConfig("triton"),
            "it has kernels for BlockWeights, not for blocks of MixerWeights; take kernels=naive.",
        ),
        (KernelsConfig("head_parallel"), "it has kernels for BlockWeights, not for blocks of MixerWeights"),
        (KernelsConfig("triton_unrolled"), "it has kernels for BlockWeights, not for blocks of MixerWeights"),
        (KernelsConfig("triton_unrolled", int8="all"), "it has kernels for BlockWeights"),
        (KernelsConfig("naive", attention="spda"), "kernels.attention=spda is not one"),
    ],
)
def test_kernels_made_for_attention(kernels: KernelsConfig, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    request = KernelRequest(torch.device("cuda"), torch.bfloat16, 64, rotary=False, block_types=(naive.MixerWeights,))
    with pytest.raises(UserError) as raised:
        resolve(kernels, request)
    assert said in str(raised.value)


@pytest.mark.parametrize("preset", ["auto", "naive"])
def test_no_attention_is_named(preset: str) -> None:
    request = KernelRequest(torch.device("cpu"), torch.float32, 64, rotary=False, block_types=(naive.MixerWeights,))
    assert describe(resolve(kernels_config(preset), request)) == "naive, by_core"


@pytest.mark.parametrize(
    ("capability", "hip", "backend", "ours"),
    [((9, 0), None, "triton_mixer", True), ((9, 0), "6.4", "naive", False), ((8, 0), None, "naive", False)],
    ids=["Hopper", "AMD", "Ampere"],
)
def test_auto_takes_kernels_or_compiles(
    capability: tuple[int, int], hip: str | None, backend: str, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = resolve(
        KernelsConfig("auto"),
        KernelRequest(torch.device("cuda"), torch.bfloat16, 64, rotary=False, block_types=(naive.MixerWeights,)),
    )
    assert (config.backend, config.compile, config.cuda_graphs, config.fused_step) == (backend, not ours, True, ours)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, "arch.mlp_t=true")],
)
def test_only_the_batch_is_shared_out(trm: Arch, fields: Arch, said: str) -> None:
    axis = Axis(0, 2, None)
    world = World(0, 1, torch.device("cpu"), tensor=axis)
    with pytest.raises(
        UserError, match=f"^{said} cannot be used with parallel.tensor, parallel.pipeline or parallel.fsdp"
    ):
        SharedModel(build(trm | fields), ParallelConfig(tensor=2), world)


def test_matrices_of_heads(trm: Arch) -> None:
    arch = trm | {"mlp_t": False, "num_heads": 2, "pos_encodings": "rope"}
    shared = SharedModel(build(arch), ParallelConfig(), World(0, 1, torch.device("cpu")))
    counts = {name: shared.hidden_matrices("heads").get(weight) for name, weight in shared.weights.items()}
    first = "L_level.layers.0."
    assert {name.split(first)[1]: number for name, number in counts.items() if first in name} == {
        "self_attn.qkv_proj.weight": 6,
        "self_attn.o_proj.weight": 1,
        "mlp.gate_up_proj.weight": 1,
        "mlp.down_proj.weight": 1,
    }


def test_hidden_matrices(trm: Arch) -> None:
    shared = SharedModel(build(trm), ParallelConfig(), World(0, 1, torch.device("cpu")))
    stacked = {name: shared.hidden_matrices().get(weight) for name, weight in shared.weights.items()}
    assert {name.split("layers.")[1]: number for name, number in stacked.items() if "layers." in name} == {
        f"{layer}.{part}.weight": number
        for layer in (0, 1)
        for part, number in {
            "mlp_t.gate_up_proj": 2,
            "mlp_t.down_proj": 1,
            "mlp.gate_up_proj": 2,
            "mlp.down_proj": 1,
        }.items()
    }
    assert all(number is None for name, number in stacked.items() if "layers." not in name)


def test_published_config() -> None:
    """The published YAML file, as its code resolves it, is `arch=trm`."""
    theirs = {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "halt_exploration_prob": 0.1,
        "halt_max_steps": 16,
        "H_cycles": 3,
        "L_cycles": 6,
        "H_layers": 0,
        "L_layers": 2,
        "hidden_size": 512,
        "num_heads": 8,
        "expansion": 4,
        "puzzle_emb_ndim": 512,
        "pos_encodings": "rope",
        "forward_dtype": "bfloat16",
        "mlp_t": False,
        "puzzle_emb_len": 16,
        "no_ACT_continue": True,
    }
    assert arch_config(theirs) == published()
    assert arch_config(theirs | {"mlp_t": True, "pos_encodings": "none", "H_layers": 2}) == published(
        mlp_t=True, pos_encodings="none"
    )
    assert arch_config(theirs | {"L_cycles": 4, "no_ACT_continue": False}).gradient == "last_cycle"
    assert arch_config(theirs | {"no_ACT_continue": False}).q_continue
    left_out = {name: value for name, value in theirs.items() if name not in ("puzzle_emb_len", "no_ACT_continue")}
    assert arch_config(left_out) == published()
