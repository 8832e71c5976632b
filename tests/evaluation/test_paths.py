"""Paths with noise on the states, against loops written here; and which of several answers is picked."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrm.batch import Batch
from hrm.config import EnsembleConfig
from hrm.config.evaluation import PICKS
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.evaluation.paths import Answers, Halting, Noise, follow, make_member
from hrm.evaluation.picking import pick
from hrm.evaluation.runner import run_act_steps
from hrm.evaluation.symmetries import DeviceSymmetry
from hrm.models import ACTLossHead
from hrm.tasks.base import Rules
from tests.helpers.models import SEQ_LEN, VOCAB_SIZE, build, fresh_states, randomised

WORLD = World(0, 1, torch.device("cpu"))
ARCHS: dict[str, dict[str, Any]] = {
    "hrm": {},
    "trm": {"name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1", "H_layers": 0},
    "transformer": {"name": "transformer"},
}


def model_of(arch: str, tiny_arch: dict[str, Any]) -> ACTLossHead:
    options = tiny_arch | {"forward_dtype": "float64", "halt_max_steps": 3} | ARCHS[arch]
    if arch == "transformer":
        options = {name: value for name, value in options.items() if not name.startswith(("H_", "L_"))}
    model = randomised(build(options).double()).eval()
    return model


def batch_of(count: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(VOCAB_SIZE, (count, SEQ_LEN), generator=generator, dtype=torch.int32)
    return {"inputs": inputs, "labels": inputs, "puzzle_identifiers": torch.arange(count, dtype=torch.int32)}


def identity() -> DeviceSymmetry:
    cells, tokens = torch.arange(SEQ_LEN), torch.arange(VOCAB_SIZE)
    return DeviceSymmetry(cells, tokens, cells, tokens)


def by_hand(model: ACTLossHead, batch: Batch, noisy: dict[str, list[Tensor | None]]) -> list[dict[str, Tensor]]:
    """Tokens, q values and output state after each ACT step, with what `noisy` adds to a state before each."""
    inner = model.model.inner
    states, steps = fresh_states(inner, batch), []
    with torch.no_grad():
        for number in range(model.halt_max_steps):
            for name, added in noisy.items():
                if (noise := added[number]) is not None:
                    states[name] = states[name] + noise
            states = inner.recur(states, inner.prepare(batch))
            q_halt, q_continue = inner.q_values(states)
            answer = inner.logits(states).argmax(-1)
            steps.append(
                {"tokens": answer, "q": q_halt, "ahead": q_halt - q_continue, "out": states[inner.output_state]}
            )
    return steps


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("at", ["steps", "start"])
@pytest.mark.parametrize("on", ["hidden", "output", "all"])
def test_noise_is_added_where_and_when_it_is_asked_for(arch: str, on: str, at: str, tiny_arch: dict[str, Any]) -> None:
    model, batch = model_of(arch, tiny_arch), batch_of()
    inner, noise = model.model.inner, Noise(0.7, on, at, seed=3)
    output, states = [inner.output_state], [*inner.initial_states]
    expected = {"output": output, "all": states, "hidden": [name for name in states if name not in output] or output}
    names = noise.states(inner)
    assert names == expected[on]
    drawn = noise.drawn(inner, 2, 3)
    assert drawn.shape == (3 if at == "steps" else 1, len(names), inner.num_tokens, inner.config.hidden_size)
    assert drawn.std().item() == pytest.approx(0.7, rel=0.1)
    noisy: dict[str, list[Tensor | None]] = {
        name: [drawn[step, place].double() if step < len(drawn) else None for step in range(3)]
        for place, name in enumerate(names)
    }
    steps = by_hand(model, batch, noisy)
    found = make_member(model, WORLD, noise)(batch, identity(), 2)
    assert torch.equal(found.tokens, steps[-1]["tokens"].int())
    torch.testing.assert_close(found.q_halt, steps[-1]["q"].float())
    change = (steps[-1]["out"] - steps[-2]["out"]).square().mean((1, 2))
    torch.testing.assert_close(found.change, change.float(), rtol=1e-4, atol=1e-6)
    for row in range(3):
        halted = [number for number, step in enumerate(steps) if step["ahead"][row] > 0]
        where = halted[0] if halted else 2
        assert found.halted_at[row] == (where + 1 if halted else 4)
        assert torch.equal(found.halted_tokens[row], steps[where]["tokens"][row].int())
        assert found.halted_q[row].item() == pytest.approx(steps[where]["q"][row].item(), rel=1e-5)
    assert found.act_steps.tolist() == [3] * 3
    plain = by_hand(model, batch, {})
    assert not torch.equal(plain[-1]["q"], steps[-1]["q"])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_first_path_is_the_model_as_it_is(arch: str, tiny_arch: dict[str, Any]) -> None:
    model, batch = model_of(arch, tiny_arch), batch_of()
    _, outputs = run_act_steps(model, batch, ["logits", "q_halt_logits"])
    first = make_member(model, WORLD, Noise(1.0))(batch, identity(), 0)
    for found in (first, follow(model, batch, 3)):
        assert torch.equal(found.tokens, outputs["logits"].argmax(-1).int())
        assert torch.equal(found.q_halt, outputs["q_halt_logits"].float())


@pytest.mark.parametrize("row", range(3))
def test_a_path_may_end_where_it_halts(row: int, tiny_arch: dict[str, Any]) -> None:
    """At the step after which q_halt > q_continue, or later, when the answer keeps the rules."""
    model = model_of("hrm", tiny_arch)
    batch = {name: field[row : row + 1] for name, field in batch_of().items()}
    steps = by_hand(model, batch, {})
    ahead = [step["ahead"].item() for step in steps]
    for margin in (-math.inf, *(value - 1e-6 for value in ahead), math.inf):
        expected = next((number for number, value in enumerate(ahead) if value > margin), 2)
        found = follow(model, batch, 3, halting=Halting(margin))
        assert found.act_steps.tolist() == [expected + 1]
        assert torch.equal(found.tokens, steps[expected]["tokens"].int())
        torch.testing.assert_close(found.q_halt, steps[expected]["q"].float())
        for right in (0, 1):
            answer = steps[right]["tokens"].numpy()
            rules = Rules(lambda inputs, answers, answer=answer: (answers == answer).all(1), "that one")
            kept = [step for step in range(expected, 3) if (steps[step]["tokens"].numpy() == answer).all()]
            found = follow(model, batch, 3, halting=Halting(margin, rules))
            assert found.act_steps.tolist() == [(kept or [2])[0] + 1]


def test_a_path_is_the_same_in_any_batch_and_differs_from_others(tiny_arch: dict[str, Any]) -> None:
    model, batch = model_of("hrm", tiny_arch), batch_of()
    member = make_member(model, WORLD, Noise(1.0, seed=5))
    together = [member(batch, identity(), path) for path in range(4)]
    alone = {name: field[1:2] for name, field in batch.items()}
    for path, answers in enumerate(together):
        torch.testing.assert_close(member(alone, identity(), path).q_halt, answers.q_halt[1:2])
    assert len({round(answers.q_halt[1].item(), 9) for answers in together}) == 4
    other_seed = make_member(model, WORLD, Noise(1.0, seed=6))(batch, identity(), 1)
    assert not torch.equal(other_seed.q_halt, together[1].q_halt)


@pytest.mark.parametrize("at", ["steps", "start"])
def test_the_first_paths_are_the_starts_of_a_model_with_several(at: str, tiny_arch: dict[str, Any]) -> None:
    """Without noise; then they begin with them in turn, with it."""
    model, batch = model_of("trm", tiny_arch | {"starts": 3}), batch_of()
    inner, noise = model.model.inner, Noise(0.7, at=at)
    member, starts = make_member(model, WORLD, noise), inner.hidden_starts["z_L"]
    for path in range(5):
        drawn = noise.drawn(inner, path, 3).double()
        assert bool(drawn.any()) == (path > 2)
        added = [drawn[0, 0] + starts[path % 3] - starts[0], *drawn[1:, 0], None, None]
        steps = by_hand(model, batch, {"z_L": added[:3]})
        found = member(batch, identity(), path)
        assert torch.equal(found.tokens, steps[-1]["tokens"].int())
        torch.testing.assert_close(found.q_halt, steps[-1]["q"].float())
    first = [member(batch, identity(), path).q_halt for path in range(3)]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_options() -> None:
    assert Noise.of(EnsembleConfig()) is None
    assert Noise.of(EnsembleConfig(paths=2, noise=1, noise_at="start", seed=4)) == Noise(1, "hidden", "start", 4)
    for wrong, said in (
        ({"paths": 0}, "ensemble.paths=0 is too small"),
        ({"paths": 33, "augmentations": 32}, "ensemble.paths=33 is too large: give at most 32."),
        ({"noise": 0}, "ensemble.noise=0 is out of range"),
        ({"noise_on": "z_L"}, "ensemble.noise_on=z_L is not a choice; there are: all, hidden, output."),
        ({"noise_at": "end"}, "ensemble.noise_at=end is not a choice"),
        ({"pick": "best"}, "ensemble.pick=best is not a choice; there are: converged, first, q, vote."),
    ):
        with pytest.raises(UserError, match=said):
            EnsembleConfig(**wrong)


# --- picking ---


def drawn_answers(members: int, puzzles: int, seed: int) -> Answers:
    """With few values, so that many are equal; members may have different numbers of ACT steps."""
    generator = torch.Generator().manual_seed(seed)
    tokens, halted_tokens = (
        torch.randint(2, (members, puzzles, 2), generator=generator, dtype=torch.int32) for _ in range(2)
    )
    q_halt, halted_q = (torch.randint(-2, 3, (members, puzzles), generator=generator).float() for _ in range(2))
    change = torch.randint(3, (members, puzzles), generator=generator).float()
    act_steps = torch.randint(1, 4, (members, 1), generator=generator, dtype=torch.int32).expand(-1, puzzles)
    halted_at = torch.randint(1, 5, (members, puzzles), generator=generator, dtype=torch.int32).minimum(act_steps + 1)
    # whether answers keep the rules is a property of them
    keeps, halted_keeps = tokens[..., 0] == 1, halted_tokens[..., 0] == 1
    return Answers(tokens, q_halt, change, halted_at, halted_tokens, halted_q, act_steps, keeps, halted_keeps)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000), st.sampled_from(PICKS), st.booleans())
def test_picks_are_what_a_loop_finds(members: int, puzzles: int, seed: int, way: str, check: bool) -> None:
    answers = drawn_answers(members, puzzles, seed)
    if not check:
        ones = torch.ones_like(answers.keeps)
        answers = replace_keeps(answers, ones, ones)
    picked = pick(way, answers)
    for n in range(puzzles):
        first = way == "first"
        tokens = [tuple(each) for each in (answers.halted_tokens if first else answers.tokens)[:, n].tolist()]
        q = (answers.halted_q if first else answers.q_halt)[:, n].tolist()
        keeps = (answers.halted_keeps if first else answers.keeps)[:, n].tolist()
        taken, halted = answers.act_steps[:, n].tolist(), answers.halted_at[:, n].tolist()
        halted = [at if at <= most else math.inf for at, most in zip(halted, taken, strict=True)]
        confidence = [1 / (1 + math.exp(-value)) for value in q]

        def votes(k: int, tokens: list[Any] = tokens, confidence: list[float] = confidence) -> tuple[int, float]:
            same = [other for other in range(members) if tokens[other] == tokens[k]]
            return len(same), round(sum(confidence[other] for other in same) / len(same), 5)

        rank = {
            "vote": votes,
            "q": lambda k, q=q: q[k],
            "converged": lambda k, n=n: -answers.change[k, n].item(),
            "first": lambda k, halted=halted, q=q: (-halted[k], q[k]),
        }[way]
        among = [k for k in range(members) if keeps[k]] or range(members)
        best = max(among, key=rank)  # of equals the first
        assert tuple(picked.tokens[n].tolist()) == tokens[best]
        if way != "vote":
            assert picked.q_halt[n].item() == q[best]
        ends = min(halted) if first else math.inf
        assert picked.act_steps[n].item() == sum(min(most, ends) for most in taken)


def replace_keeps(answers: Answers, keeps: Tensor, halted_keeps: Tensor) -> Answers:
    return answers._replace(keeps=keeps, halted_keeps=halted_keeps)
