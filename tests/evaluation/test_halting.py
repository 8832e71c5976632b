"""Halting: what the carry keeps, when sequences stop, and how exploration spreads."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hrm
from hrm.batch import Batch
from hrm.models import ACTLossHead
from hrm.models.act import Carry
from hrm.models.recurrent import Prepared

Arch = dict[str, Any]
RandomBatch = Callable[..., Batch]

KEYS = ["logits", "q_halt_logits", "q_continue_logits", "target_q_continue"]


def build(arch: Arch, seq_len: int = 5, seed: int = 0) -> ACTLossHead:
    model: ACTLossHead = hrm.build_model(
        arch, batch_size=3, seq_len=seq_len, vocab_size=7, num_puzzle_identifiers=4, seed=seed
    )
    return model


def with_q(model: ACTLossHead, q_halt: float, q_continue: float) -> ACTLossHead:
    """With constant q's: the head's weights are zero at the start."""
    bias = torch.tensor([q_halt, q_continue])
    model.load_state_dict(model.state_dict() | {"model.inner.q_head.bias": bias})
    return model


def step(model: ACTLossHead, carry: Carry, batch: Batch) -> tuple[Carry, dict[str, Tensor]]:
    outputs: dict[str, Tensor]
    carry, _, _, outputs, all_halted = model(carry=carry, batch=batch, return_keys=KEYS)
    assert bool(all_halted) == all(carry.halted.tolist())
    return carry, outputs


def rows(carry: Carry, outputs: dict[str, Tensor], row: int) -> list[Tensor]:
    """All that one sequence has after a step."""
    state = [carry.states["z_H"], carry.states["z_L"], carry.steps, carry.halted, *carry.current_data.values()]
    return [tensor[row] for tensor in [*state, *outputs.values()]]


# --- the carry ---


def test_initial_carry_takes_the_whole_batch(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model, batch = build(tiny_arch), random_batch()
    carry = model.initial_carry(batch)
    assert carry.halted.dtype == torch.bool
    assert carry.steps.dtype == torch.int32
    assert carry.halted.all()
    carry, _ = step(model, carry, batch)
    assert carry.steps.tolist() == [1, 1, 1]
    assert carry.steps.dtype == torch.int32
    assert carry.halted.tolist() == [False] * 3
    assert all(torch.equal(carry.current_data[name], batch[name]) for name in batch)


@pytest.mark.parametrize("training", [True, False])
def test_halted_places_start_anew_and_others_go_on(tiny_arch: Arch, random_batch: RandomBatch, training: bool) -> None:
    model = build(tiny_arch | {"forward_dtype": "float64", "halt_max_steps": 8}).double().train(training)
    model.model.inner.puzzle_emb.weights.normal_(generator=torch.Generator().manual_seed(0))
    old, new = random_batch(seed=1), random_batch(seed=2)
    before, _ = step(model, model.initial_carry(old), old)
    before, _ = step(model, before, old)
    mixed = replace(before, halted=torch.tensor([True, False, True]))
    untouched = [tensor.clone() for tensor in (mixed.states["z_H"], mixed.states["z_L"], mixed.steps)]

    after = step(model, mixed, new)
    going_on = step(model, before, new)
    fresh = step(model, model.initial_carry(new), new)
    for row, expected in ((0, fresh), (1, going_on), (2, fresh)):
        torch.testing.assert_close(rows(*after, row), rows(*expected, row), rtol=1e-12, atol=1e-12)
    assert after[0].steps.tolist() == [1, 3, 1]
    for name in new:
        assert after[0].current_data[name].tolist() == [
            new[name][0].tolist(),
            old[name][1].tolist(),
            new[name][2].tolist(),
        ]
    # The carry that came in is the caller's still.
    assert all(
        torch.equal(now, then)
        for now, then in zip((mixed.states["z_H"], mixed.states["z_L"], mixed.steps), untouched, strict=True)
    )


def test_a_new_sequence_starts_from_the_initial_state(
    tiny_arch: Arch, random_batch: RandomBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_arch), random_batch()
    inner = model.model.inner
    recur, seen = inner.recur, []

    def recording(carry: dict[str, Tensor], prepared: Prepared) -> dict[str, Tensor]:
        seen.append(carry)
        return recur(carry, prepared)

    monkeypatch.setattr(inner, "recur", recording)
    left = {"z_H": torch.full((3, 6, 32), 7.0), "z_L": torch.full((3, 6, 32), math.nan)}
    halted = torch.tensor([True, True, False])
    model(carry=replace(model.initial_carry(batch), states=left, halted=halted), batch=batch)
    for row in (0, 1):
        assert all(torch.equal(seen[0]["z_H"][row, token], inner.H_init) for token in range(6))
        assert all(torch.equal(seen[0]["z_L"][row, token], inner.L_init) for token in range(6))
    assert torch.equal(seen[0]["z_H"][2], left["z_H"][2])
    assert seen[0]["z_L"][2].isnan().all()


def test_carry_has_no_gradient(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model, batch = build(tiny_arch), random_batch()
    carry, *_ = model(carry=model.initial_carry(batch), batch=batch)
    assert not carry.states["z_H"].requires_grad
    assert not carry.states["z_L"].requires_grad


def test_a_staggered_start_shows_every_step_at_once(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    """Sequences think as from any start, but stand at different ACT steps, and so leave one after the other."""
    model = build(tiny_arch | {"forward_dtype": "float64", "halt_max_steps": 3, "halt_exploration_prob": 0.0}).double()
    first, second = random_batch(seed=1), random_batch(seed=2)
    carry, outputs = step(model, model.model.staggered_carry(first), first)
    assert carry.steps.tolist() == [1, 2, 3]
    assert carry.halted.tolist() == [False, False, True]
    together, expected = step(model, model.initial_carry(first), first)
    for name in ("logits", "q_halt_logits"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(carry.states["z_H"], together.states["z_H"], rtol=1e-12, atol=1e-12)
    left = []
    for _ in range(6):
        carry, _ = step(model, carry, second)
        left.append(carry.halted.tolist())
    assert left == 2 * [[False, True, False], [True, False, False], [False, False, True]]


# --- when to halt ---


def halting(model: ACTLossHead, batch: Batch, num_steps: int) -> list[list[bool]]:
    """Who halts at each of the next steps from a fresh carry."""
    carry, halted = model.initial_carry(batch), []
    for _ in range(num_steps):
        carry, _ = step(model, carry, batch)
        halted.append(carry.halted.tolist())
    return halted


def test_evaluation_halts_at_the_last_step_only(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model = with_q(build(tiny_arch), q_halt=9, q_continue=-9).eval()
    assert halting(model, random_batch(), 8) == 2 * [[False] * 3, [False] * 3, [False] * 3, [True] * 3]


def test_training_halts_when_halting_is_worth_more(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    batch = random_batch()
    until_last = 2 * [[False] * 3, [False] * 3, [False] * 3, [True] * 3]
    assert halting(with_q(build(tiny_arch), q_halt=0.5, q_continue=0.25), batch, 3) == [[True] * 3] * 3
    assert halting(with_q(build(tiny_arch), q_halt=0.25, q_continue=0.5), batch, 8) == until_last
    assert halting(with_q(build(tiny_arch), q_halt=0.5, q_continue=0.5), batch, 8) == until_last


def scripted_q(pairs: list[tuple[list[float], list[float]]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Stands in for functions that read q off a state: each call takes the next pair."""
    script: Iterator[tuple[list[float], list[float]]] = iter(pairs)

    def q_values(*_: object) -> tuple[Tensor, Tensor]:
        q_halt, q_continue = next(script)
        return torch.tensor(q_halt), torch.tensor(q_continue)

    return q_values


def test_each_sequence_halts_by_its_own_values(
    tiny_arch: Arch, random_batch: RandomBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_arch), random_batch()
    script = [([1.0, -1.0, 0.0], [0.0, 0.0, 0.0]), ([0.0] * 3, [0.0] * 3)]
    monkeypatch.setattr(model.model.inner, "q_values", scripted_q(script))
    carry = replace(model.initial_carry(batch), halted=torch.zeros(3, dtype=torch.bool), steps=torch.tensor([0, 3, 2]))
    carry, _ = step(model, carry, batch)
    assert carry.halted.tolist() == [True, True, False]  # by its values, by its steps, not at all


def test_a_single_step(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model, batch = build(tiny_arch | {"halt_max_steps": 1, "halt_exploration_prob": 1.0}), random_batch()
    assert halting(model, batch, 3) == [[True] * 3] * 3
    carry, loss, metrics, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=KEYS)
    loss.backward()
    assert carry.steps.tolist() == [1, 1, 1]
    assert "target_q_continue" not in outputs
    assert "q_continue_loss" not in metrics


# --- the target of q_continue ---


def test_target_formula(tiny_arch: Arch, random_batch: RandomBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(tiny_arch), random_batch()
    next_halt, next_continue = [0.3, -2.0, -2.0], [-0.7, 1.5, 1.5]
    monkeypatch.setattr(model.model.inner, "recur_to_q_values", scripted_q([(next_halt, next_continue)]))
    carry = replace(model.initial_carry(batch), halted=torch.zeros(3, dtype=torch.bool), steps=torch.tensor([0, 1, 3]))
    _, outputs = step(model, carry, batch)
    better = [0.3, 1.5, -2.0]  # the last of the four steps cannot go on
    expected = [1 / (1 + math.exp(-value)) for value in better]
    assert outputs["target_q_continue"].tolist() == pytest.approx(expected, rel=1e-6)


def test_target_looks_one_step_ahead(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    """It is made of the q's that the next step, from the new state and with the same weights, will have."""
    model = build(tiny_arch | {"forward_dtype": "float64"}).double()
    with torch.no_grad():
        model.model.inner.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch, ignored = random_batch(seed=1), random_batch(seed=2)
    carry = model.initial_carry(batch)
    for number in range(1, 5):
        carry, outputs = step(model.train(), carry, batch)
        assert not outputs["target_q_continue"].requires_grad
        ahead = replace(carry, halted=torch.zeros(3, dtype=torch.bool))
        _, following = step(model.eval(), ahead, ignored)
        value = following["q_halt_logits"]
        if number < 4:
            value = torch.maximum(value, following["q_continue_logits"])
        torch.testing.assert_close(outputs["target_q_continue"], torch.sigmoid(value), rtol=1e-12, atol=1e-12)
        carry = ahead


def test_evaluation_has_no_target(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model, batch = build(tiny_arch).eval(), random_batch()
    _, _, metrics, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=KEYS)
    assert outputs.keys() == {"logits", "q_halt_logits", "q_continue_logits"}
    assert "q_continue_loss" not in metrics


def test_without_the_value_of_going_on(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    """Sequences halt where q_halt > 0, nothing is bootstrapped, and the head's other row is left alone."""
    arch, batch = tiny_arch | {"q_continue": False}, random_batch()
    assert halting(with_q(build(arch), q_halt=0.25, q_continue=0.5), batch, 3) == [[True] * 3] * 3
    assert halting(with_q(build(arch), q_halt=-0.25, q_continue=-0.5), batch, 3) == [[False] * 3] * 3
    model = build(arch)
    _, loss, metrics, outputs, _ = model(carry=model.initial_carry(batch), batch=batch, return_keys=KEYS)
    loss.backward()
    assert outputs.keys() == {"logits", "q_halt_logits", "q_continue_logits"}
    assert outputs["q_continue_logits"].tolist() == [0.0] * 3
    assert "q_continue_loss" not in metrics
    of_halt, of_continue = model.model.inner.q_head.bias.grad.tolist()
    assert of_halt != 0
    assert of_continue == 0


def test_the_value_of_going_on_changes_no_other_loss(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    batch, losses = random_batch(), []
    for q_continue in (True, False):
        model = build(tiny_arch | {"q_continue": q_continue})
        _, _, metrics, _, _ = model(carry=model.initial_carry(batch), batch=batch)
        losses.append((metrics["lm_loss"].item(), metrics["q_halt_loss"].item()))
    assert losses[0] == losses[1]


# --- exploration ---

MAX_STEPS, SEQUENCES = 6, 4000


def exploring(tiny_arch: Arch, probability: float, seed: int = 0) -> ACTLossHead:
    """A model that would halt at once if it did not explore, and is as cheap as can be."""
    arch = tiny_arch | {
        "hidden_size": 8,
        "H_cycles": 1,
        "L_cycles": 1,
        "puzzle_emb_ndim": 0,
        "halt_max_steps": MAX_STEPS,
        "halt_exploration_prob": probability,
    }
    return with_q(build(arch, seq_len=1, seed=seed), q_halt=1, q_continue=0)


def halting_after(model: ACTLossHead, num_steps: int, batch: Batch) -> Tensor:
    """Who halts at step `num_steps` [B]."""
    carry = model.initial_carry(batch)
    going_on = replace(carry, halted=torch.zeros_like(carry.halted), steps=torch.full_like(carry.steps, num_steps - 1))
    return step(model, going_on, batch)[0].halted


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_exploration_statistics(tiny_arch: Arch, random_batch: RandomBatch, probability: float) -> None:
    """Halting at step s means: no minimum, or one of the s - 1 out of {2..max} that are at most s."""
    model, batch = exploring(tiny_arch, probability), random_batch(SEQUENCES, seq_len=1)
    for num_steps in range(1, MAX_STEPS + 1):
        expected = 1 - probability + probability * (num_steps - 1) / (MAX_STEPS - 1)
        share = halting_after(model, num_steps, batch).double().mean().item()
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / SEQUENCES), num_steps


def test_exploration_waits_only_where_it_would_halt(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    model = with_q(exploring(tiny_arch, 1.0), q_halt=0, q_continue=1)
    batch = random_batch(100, seq_len=1)
    assert [bool(halting_after(model, num_steps, batch).any()) for num_steps in range(1, MAX_STEPS + 1)] == [
        *[False] * (MAX_STEPS - 1),
        True,
    ]
    model = exploring(tiny_arch, 1.0).eval()
    assert not halting_after(model, MAX_STEPS - 1, batch).any()
    assert halting_after(model, MAX_STEPS, batch).all()


def test_exploration_seeds(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    batch = random_batch(60, seq_len=1)

    def stream(model: ACTLossHead) -> list[list[bool]]:
        return [halting_after(model, 3, batch).tolist() for _ in range(4)]

    model = exploring(tiny_arch, 0.5)
    first = stream(model)
    assert all(one != other for number, one in enumerate(first) for other in first[:number])
    assert stream(exploring(tiny_arch, 0.5)) == first
    assert stream(exploring(tiny_arch, 0.5, seed=1)) != first
    assert stream(model) != first
    model.model.seed_exploration(1)
    other = stream(model)
    assert other != first
    model.model.seed_exploration(0)
    assert stream(model) == first


def test_evaluation_leaves_the_exploration_stream_alone(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    batch = random_batch(60, seq_len=1)
    model, undisturbed = exploring(tiny_arch, 0.5), exploring(tiny_arch, 0.5)
    for _ in range(2):
        assert not halting_after(model.eval(), 3, batch).any()
        expected = halting_after(undisturbed, 3, batch)
        assert expected.any()
        assert torch.equal(halting_after(model.train(), 3, batch), expected)


# --- augmentations ---


@pytest.mark.parametrize("puzzle_emb_ndim", [32, 0])
def test_states_are_permuted_with_their_tokens(
    puzzle_emb_ndim: int, tiny_arch: Arch, random_batch: RandomBatch
) -> None:
    """Steps that show an augmentation are those of a carry permuted by hand, labels too; evaluation shows none."""
    arch = tiny_arch | {"puzzle_emb_ndim": puzzle_emb_ndim}
    shown, plain, batch = build(arch), build(arch), random_batch()
    turn = torch.tensor([2, 0, 1, 4, 3])
    shown.model.set_augmentations(turn.expand(4, -1))

    def by_hand(carry: Carry) -> Carry:
        prefix = plain.model.inner.prefix_len
        places = torch.cat([torch.arange(prefix), turn + prefix])
        state = {name: state[:, places] for name, state in carry.states.items()}
        data = {name: field[:, turn] if field.ndim == 2 else field for name, field in carry.current_data.items()}
        return replace(carry, states=state, current_data=data)

    carry, expected = shown.initial_carry(batch), plain.initial_carry(batch)
    turned = {name: field[:, turn] if field.ndim == 2 else field for name, field in batch.items()}
    for number in range(3):
        carry, outputs = step(shown, carry, batch)
        expected, reference = step(plain, by_hand(expected) if number else expected, turned)
        torch.testing.assert_close(outputs, reference)
        torch.testing.assert_close(carry.tensors(), expected.tensors())
    evaluated = [step(model.eval(), model.initial_carry(batch), batch)[1] for model in (shown, plain)]
    torch.testing.assert_close(*evaluated, rtol=0, atol=0)


def test_augmentations_are_drawn_anew_and_by_seed(tiny_arch: Arch, random_batch: RandomBatch) -> None:
    batch = random_batch()

    def seen() -> list[Tensor]:
        model = build(tiny_arch)
        model.model.set_augmentations(torch.stack([torch.arange(5).roll(n) for n in range(5)]))
        carry, inputs = model.initial_carry(batch), []
        for _ in range(4):
            carry, _ = step(model, carry, batch)
            inputs.append(carry.current_data["inputs"])
        return inputs

    one = seen()
    assert all(torch.equal(first, second) for first, second in zip(one, seen(), strict=True))
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(one))
    assert all(torch.equal(inputs.sort().values, batch["inputs"].sort().values) for inputs in one)
