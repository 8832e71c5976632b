"""Several starts trained by winner-takes-all, against the model with one start, run on each of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.errors import UserError
from hrm.models import ACTLossHead, Carry, arch_config, architectures
from hrm.models.act import AdaptiveComputation
from hrm.models.hrm import HierarchicalReasoningModel, HRMConfig
from hrm.models.recurrent import DataSizes, Prepared, RecurrentConfig
from hrm.models.starts import WinnerTakesAll, aligned_starts
from hrm.training.metrics import MetricWindow
from tests.helpers.models import build, flops_outside, gradients, randomised
from tests.helpers.training import ALONE

RandomBatch = Callable[..., Batch]
STARTS = 3


@pytest.fixture(params=["hrm", "trm"])
def config(request: pytest.FixtureRequest) -> RecurrentConfig:
    """Small and in float64; halting depends on the q values alone."""
    return architectures()[request.param].config(
        hidden_size=32,
        num_heads=2,
        H_cycles=2,
        L_cycles=2,
        L_layers=1,
        halt_max_steps=4,
        halt_exploration_prob=0.0,
        forward_dtype="float64",
        starts=STARTS,
    )


def drawn(config: RecurrentConfig) -> ACTLossHead:
    """In float64, with q values by which some sequences halt."""
    model = randomised(build(config).double())
    with torch.no_grad():
        model.model.inner.q_head.bias.zero_()
    return model


def with_one_start(model: ACTLossHead, config: RecurrentConfig) -> ACTLossHead:
    """The model without its other starts."""
    alone = build(replace(config, starts=1)).double()
    alone.load_state_dict({name: weight for name, weight in model.state_dict().items() if "others" not in name})
    return alone


def of_starts(carry: Carry, starts: Tensor) -> Carry:
    """The carry of a model with one start in which each sequence has the states of one of several, [B]."""
    each = torch.stack([carry.states["z_L"], *(carry.states[f"z_L.{number}"] for number in range(1, STARTS))])
    return replace(carry, states={"z_H": carry.states["z_H"], "z_L": each[starts, torch.arange(len(starts))]})


def losses_of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
    """Stablemax's cross-entropy, written out: the mean over the tokens that have a label."""
    found = []
    for scores, answers in zip(logits, labels, strict=True):
        s = torch.where(scores < 0, 1 / (1 - scores), scores + 1)
        right = [-(row[int(label)] / row.sum()).log() for row, label in zip(s, answers, strict=True) if label >= 0]
        found.append(torch.stack(right).mean())
    return torch.stack(found)


def steps_of_both(
    model: ACTLossHead, alone: ACTLossHead, draw: RandomBatch, steps: int
) -> Iterator[tuple[Tensor, list[Carry], dict[str, Any], dict[str, Any]]]:
    """Each training step's winners, every start's carry after it, and what both models have of the winners."""
    carry = model.initial_carry(draw(8))
    for step in range(steps):
        batch = draw(8, seed=step)
        states, taken, data = model.model.reset_carry(carry, batch)
        begun = Carry(states, taken - 1, torch.zeros_like(carry.halted), data)
        ends, losses = [], []
        for number in range(STARTS):
            of_start = of_starts(begun, torch.full((8,), number))
            after, _, _, outputs, _ = alone(carry=of_start, batch=batch, return_keys=["logits"])
            ends.append(after)
            losses.append(losses_of_sequences(outputs["logits"], data["labels"]))
        winner = torch.stack(losses).argmin(0)
        results = []
        for trained, given in ((model, carry), (alone, of_starts(begun, winner))):
            trained.zero_grad()
            new, loss, metrics, outputs, _ = trained(carry=given, batch=batch, return_keys=["logits", "q_halt_logits"])
            loss.backward()
            results.append({"carry": new, "loss": loss, "metrics": metrics, **outputs, "gradients": gradients(trained)})
        yield winner, ends, *results
        carry = results[0]["carry"]


@pytest.mark.parametrize(("gradient", "q_continue"), [("one_step", True), ("last_cycle", False), ("all", False)])
def test_the_winner_is_trained_as_if_it_were_alone(
    config: RecurrentConfig, gradient: str, q_continue: bool, random_batch: RandomBatch
) -> None:
    config = replace(config, gradient=gradient, q_continue=q_continue)
    model = drawn(config)
    alone = with_one_start(model, config)
    winners, halted = [], []
    for winner, ends, found, expected in steps_of_both(model, alone, random_batch, 5):
        for name in ("loss", "logits", "q_halt_logits"):
            torch.testing.assert_close(found[name], expected[name])
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient_alone in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient_alone, rtol=1e-9, atol=1e-13, msg=name)

        after, of_winner = found["carry"], expected["carry"]
        assert torch.equal(after.halted, of_winner.halted)
        assert torch.equal(after.steps, of_winner.steps)
        torch.testing.assert_close(after.states["z_H"], of_winner.states["z_H"])
        for number, end in enumerate(ends):
            torch.testing.assert_close(after.states[f"z_L.{number}" if number else "z_L"], end.states["z_L"])
        assert not any(tensor.requires_grad for tensor in after.tensors())

        shares = {name: value for name, value in found["metrics"].items() if "share" in name}
        assert shares == {f"start_{number}_share": (winner == number).sum() for number in range(STARTS)}
        rest = {name: value for name, value in found["metrics"].items() if name not in shares}
        torch.testing.assert_close(rest, expected["metrics"])
        winners += winner.tolist()
        halted += after.halted.tolist()
    assert set(winners) == set(range(STARTS))
    assert set(halted) == {False, True}


def test_losers_get_no_gradient(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    """Where they stand changes nothing in what the winners learn, as long as they lose."""
    model, batch = drawn(config), random_batch(16)
    carry, *_ = model(carry=model.initial_carry(batch), batch=batch)
    carry = replace(carry, halted=torch.zeros_like(carry.halted))

    def trained(carry: Carry) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        model.zero_grad()
        _, outputs = model.model(carry, batch)
        _, loss, _, _, _ = model(carry=carry, batch=batch)
        loss.backward()
        return outputs["winner"], {"loss": loss.detach(), **gradients(model)}, carry.states

    winner, learned, states = trained(carry)
    moved = dict(states)
    for number in range(STARTS):
        name = f"z_L.{number}" if number else "z_L"
        lost = (winner != number).view(-1, 1, 1)
        moved[name] = states[name] + 1e-3 * lost
        assert lost.any()
    again, learned_again, _ = trained(replace(carry, states=moved))
    assert torch.equal(again, winner)
    assert all(torch.equal(learned_again[name], gradient) for name, gradient in learned.items())


def test_starts_are_orthogonal_and_as_long_as_the_first(config: RecurrentConfig) -> None:
    model, alone = build(config), build(replace(config, starts=1))
    starts = model.model.inner.hidden_starts["z_L"]
    assert torch.equal(starts[0], alone.model.inner.initial_states["z_L"])
    products = starts @ starts.T
    torch.testing.assert_close(products, products[0, 0] * torch.eye(STARTS, dtype=torch.float64))
    other = build(config, seed=1).model.inner.hidden_starts["z_L"]
    assert not torch.equal(other, starts)
    of_zero = aligned_starts(torch.zeros(8), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(of_zero @ of_zero.T, 8 * torch.eye(3))
    whole = build(replace(config, starts=32)).model.inner.hidden_starts["z_L"]  # as many as there can be
    torch.testing.assert_close(whole @ whole.T, products[0, 0] * torch.eye(32, dtype=torch.float64))


def test_one_start_is_the_model_without_the_option(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    several, alone, batch = build(config), build(replace(config, starts=1)), random_batch()
    assert type(alone.model) is AdaptiveComputation
    carry, _, metrics, _, _ = alone(carry=alone.initial_carry(batch), batch=batch)
    assert list(carry.states) == ["z_H", "z_L"]
    assert not any("share" in name for name in metrics)
    others = {"model.inner.L_init_others"}
    assert several.state_dict().keys() - alone.state_dict().keys() == others
    for name, weight in alone.state_dict().items():
        assert torch.equal(several.state_dict()[name], weight), name
    # In evaluation the first start answers, as if there were no others.
    results = []
    with torch.no_grad():
        for model in (several.eval(), alone.eval()):
            carry = model.initial_carry(batch)
            for _ in range(2):
                carry, _, _, outputs, _ = model(carry=carry, batch=batch, return_keys=["logits"])
            results.append((carry.named_tensors(), outputs["logits"]))
    (states, logits), (states_alone, logits_alone) = results
    assert torch.equal(logits, logits_alone)
    assert states.keys() == states_alone.keys()
    assert all(torch.equal(states[name], state) for name, state in states_alone.items())


def test_the_first_of_equal_losses_wins(config: RecurrentConfig, random_batch: RandomBatch) -> None:
    model, batch = drawn(config), random_batch()
    batch["labels"].fill_(IGNORE_LABEL_ID)
    _, _, metrics, _, _ = model(carry=model.initial_carry(batch), batch=batch)
    assert metrics["start_0_share"] == 3


@pytest.mark.parametrize("gradient", ["one_step", "last_cycle"])
def test_operations_of_a_training_step(config: RecurrentConfig, gradient: str, random_batch: RandomBatch) -> None:
    config = replace(config, gradient=gradient, forward_dtype="float32")
    model, batch = build(config), random_batch()
    carry = model.initial_carry(batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, loss, _, _, _ = model(carry=carry, batch=batch)
        loss.backward()
    inner = model.model.inner
    answers = STARTS * 2 * config.hidden_size * 3 * inner.num_tokens * inner.sizes.vocab_size  # all starts', to compare
    expected = 3 * model.train_step_flops() + flops_outside(model, batch, training=True) + answers
    assert counter.get_total_flops() == expected


def test_shares_are_of_all_sequences() -> None:
    window = MetricWindow(ALONE, global_batch_size=4)
    for first in (1, 3):  # of four sequences, of which none halted
        sums = {"count": 0, "lm_loss": 2.0, "start_0_share": first, "start_1_share": 4 - first}
        window.add({name: torch.tensor(value) for name, value in sums.items()})
    window.close(2, 0.1)
    (record,) = window.finished(wait=True)
    assert record["train/start_0_share"] == record["train/start_1_share"] == 0.5


class WithAnACTStepOfItsOwn(HierarchicalReasoningModel):
    def recur(self, states: dict[str, Tensor], prepared: Prepared) -> dict[str, Tensor]:
        return super().recur(states, prepared)


def test_impossible_starts() -> None:
    for wrong, said in (
        ({"starts": 0}, "arch.starts=0 is too small"),
        ({"starts": 33, "hidden_size": 32, "num_heads": 2}, "arch.starts=33 is too large: only arch.hidden_size=32"),
        ({"starts": 2, "name": "transformer"}, "needs a state that the heads do not read, and arch.name=transformer"),
    ):
        with pytest.raises(UserError, match=said):
            arch_config(wrong)
    config = HRMConfig(hidden_size=32, num_heads=2, H_layers=1, L_layers=1, starts=2)
    own = WithAnACTStepOfItsOwn(config, DataSizes(5, 7, 4), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"arch\.starts=2 is for models whose ACT step is the updates of its schedule"):
        WinnerTakesAll(own, 0)
