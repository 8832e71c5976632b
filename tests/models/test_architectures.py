"""Whatever architecture is found in hrm/models: it builds, trains, halts, keeps its names and counts its operations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hrm.batch import Batch
from hrm.config import CONFIG_DIR
from hrm.config.compose import compose
from hrm.config.training import PretrainConfig
from hrm.errors import UserError
from hrm.models import ACTLossHead, arch_config, architectures
from hrm.models.recurrent import RecurrentConfig
from tests.helpers.models import build, flops_outside, gradients

RandomBatch = Callable[..., Batch]
PRESETS = sorted(path.stem for path in (CONFIG_DIR / "arch").glob("*.yaml"))


@pytest.fixture(params=sorted(architectures()))
def config(request: pytest.FixtureRequest) -> RecurrentConfig:
    """Of each architecture, a small one: only its width and precision are not its own."""
    schema = architectures()[request.param].config
    return schema(hidden_size=64, num_heads=2, puzzle_emb_ndim=64, forward_dtype="float32", halt_max_steps=3)


def step(model: ACTLossHead, carry: Any, batch: Batch) -> tuple[Any, Tensor, dict[str, Tensor]]:
    carry, loss, _, outputs, _ = model(carry=carry, batch=batch, return_keys=["logits", "q_halt_logits"])
    return carry, loss, outputs


def test_a_file_is_an_architecture_with_a_name_of_its_own() -> None:
    names = [architecture.name for architecture in architectures().values()]
    assert len(set(names)) == len(names) >= 3
    assert {"hrm", "trm", "transformer"} <= architectures().keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compose_to_a_config_of_their_architecture(preset: str) -> None:
    arch = compose(PretrainConfig, "pretrain", [f"arch={preset}"]).arch
    assert type(arch) in {architecture.config for architecture in architectures().values()}


def test_one_training_step_gives_every_weight_a_gradient(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    model, batch = build(config), random_batch()
    carry, loss, outputs = step(model, model.initial_carry(batch), batch)
    loss.backward()
    assert outputs["logits"].shape == (3, 5, 7)
    for name, grad in gradients(model).items():
        assert grad.isfinite().all(), name
        assert grad.count_nonzero() > 0, name
    assert not any(tensor.requires_grad for tensor in carry.tensors())


def test_the_carry_has_names(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    model, batch = build(config), random_batch()
    carry, *_ = step(model, model.initial_carry(batch), batch)
    names = carry.named_tensors()
    assert list(names) == [*carry.states, "steps", "halted", "data.inputs", "data.labels", "data.puzzle_identifiers"]
    assert list(carry.states) == list(model.model.inner.initial_states)
    parts = [carry.rows(slice(0, 1)), carry.rows(slice(1, 3))]
    for name, tensor in type(carry).joined(parts).named_tensors().items():
        assert torch.equal(tensor, names[name])


def test_evaluation_halts_at_the_last_step_and_a_halted_sequence_makes_room(
    config: RecurrentConfig, random_batch: RandomBatch
) -> None:
    model, old, new = build(config).eval(), random_batch(seed=1), random_batch(seed=2)
    with torch.no_grad():
        carry, halted = model.initial_carry(old), []
        for _ in range(3):
            carry, *_ = step(model, carry, old)
            halted.append(carry.halted.tolist())
        assert halted == [[False] * 3, [False] * 3, [True] * 3]
        after, _, outputs = step(model, carry, new)
        _, _, expected = step(model, model.initial_carry(new), new)
    assert after.steps.tolist() == [1, 1, 1]
    assert torch.equal(outputs["logits"], expected["logits"])


def test_steps_in_training_alone(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    model, batch = build(replace(config, train_max_steps=1)), random_batch()
    carry, *_ = step(model, model.initial_carry(batch), batch)
    assert carry.halted.all()
    with torch.no_grad():
        carry, *_ = step(model.eval(), model.initial_carry(batch), batch)
    assert not carry.halted.any()
    assert model.halt_max_steps == 3


def test_a_second_step_goes_on_from_the_first(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    model, batch = build(config).eval(), random_batch()
    with torch.no_grad():
        carry, _, first = step(model, model.initial_carry(batch), batch)
        _, _, second = step(model, carry, batch)
        thought = model.model.think(model.initial_carry(batch), batch, 1)
        _, _, after_thinking = step(model, thought, batch)
    assert not torch.allclose(first["logits"], second["logits"])
    assert torch.equal(after_thinking["logits"], second["logits"])


@torch.no_grad()
def test_updates_of_levels_make_an_act_step(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    model, batch = build(config).eval(), random_batch()
    inner = model.model.inner
    if not inner.levels:
        assert len({update.state for update in inner.plan.schedule}) == 1, "a state alone has no levels"
        return
    level_of = {update: level for level, update in inner.levels.items()}
    states, _, _ = model.model.reset_carry(model.initial_carry(batch), batch)
    prepared = inner.prepare(batch)
    after = inner.recur(states, prepared)
    for update in inner.plan.schedule:
        states = inner.update(states, prepared, level_of[update])
    assert states.keys() == after.keys()
    assert all(torch.equal(state, after[name]) for name, state in states.items())


@pytest.mark.parametrize("name", ["hrm", "trm"])
def test_levels_have_the_names_of_their_states(name: str) -> None:
    inner = build(architectures()[name].config(hidden_size=64, num_heads=2)).model.inner
    assert {level: update.state for level, update in inner.levels.items()} == {"L": "z_L", "H": "z_H"}
    assert list(inner.levels) == ["L", "H"]


def test_weights_come_back_by_their_names(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    one, other, batch = build(config, seed=1).eval(), build(config, seed=2).eval(), random_batch()
    assert all(name.startswith("model.inner.") for name in one.state_dict())
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        results = [step(model, model.initial_carry(batch), batch)[2]["logits"] for model in (one, other)]
    assert torch.equal(*results)


def test_a_stage_of_the_curriculum_changes_what_may_change(config: RecurrentConfig) -> None:
    shallow = config.in_stage({"halt_max_steps": 2, "gradient": "one_step"})
    assert shallow == replace(config, train_max_steps=2, gradient="one_step")
    model = build(config)
    whole = model.train_step_flops()
    for name in sorted(config.CHANGES_IN_TRAINING & {"H_cycles", "L_cycles"}):
        model.model.inner.train_as(config.in_stage({name: 1}))
        assert model.train_step_flops() < whole


@pytest.mark.parametrize("mlp_t", [False, True])
@pytest.mark.parametrize("gradient", ["one_step", "last_cycle", "all"])
@pytest.mark.parametrize("q_continue", [True, False])
def test_operations_of_a_training_step(
    config: RecurrentConfig, gradient: str, mlp_t: bool, q_continue: bool, random_batch: RandomBatch
) -> None:
    """To the last one: as many as torch counts while the step runs."""
    config = replace(config, gradient=gradient, mlp_t=mlp_t, q_continue=q_continue)
    model, batch = build(config), random_batch()
    carry = model.initial_carry(batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        _, loss, _ = step(model, carry, batch)
        loss.backward()
    assert counter.get_total_flops() == 3 * model.train_step_flops() + flops_outside(model, batch, training=True)


@pytest.mark.parametrize("mlp_t", [False, True])
def test_operations_of_an_evaluation_step(config: RecurrentConfig, mlp_t: bool, random_batch: RandomBatch) -> None:
    model, batch = build(replace(config, mlp_t=mlp_t)).eval(), random_batch()
    carry = model.initial_carry(batch)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, carry, batch)
    assert counter.get_total_flops() == 3 * model.act_step_flops() + flops_outside(model, batch, training=False)


def test_names_in_the_configs_of_trm() -> None:
    """Its HRM is ours; of its others, the nearest is named."""
    config = arch_config({"name": "recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1", "mlp_t": False})
    assert config == arch_config({})
    for theirs, ours in (
        ("recursive_reasoning.transformers_baseline@Model_ACTV2", "transformer"),
        ("recursive_reasoning.trm_singlez@TinyRecursiveReasoningModel_ACTV1", "recursive_reasoning.trm@"),
        ("recursive_reasoning.trm_hier6@TinyRecursiveReasoningModel_ACTV1", "recursive_reasoning.trm@"),
    ):
        with pytest.raises(UserError, match=rf"not here.*the nearest to train is {ours}"):
            arch_config({"name": theirs})


@pytest.mark.parametrize("pos_encodings", ["none", "rope"])
def test_attention_without_positions_takes_the_tokens_for_a_set(
    tiny_arch: dict[str, Any], random_batch: Callable[..., Batch], pos_encodings: str
) -> None:
    """Its answers to tokens in another order are its answers in that order; with positions they are not."""
    batch = random_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {**batch, "inputs": batch["inputs"][:, order], "labels": batch["labels"][:, order]}
    model = build({**tiny_arch, "pos_encodings": pos_encodings}).eval()

    def answers(given: Batch) -> Tensor:
        _, _, _, outputs, _ = model(carry=model.initial_carry(given), batch=given, return_keys=["logits"])
        return outputs["logits"]

    with torch.no_grad():
        is_equal = torch.allclose(answers(moved), answers(batch)[:, order], atol=1e-4)
    assert is_equal is (pos_encodings == "none")
