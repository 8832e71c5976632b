"""What an average of the weights takes in, and what it shares with the model, by the architecture's published code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.models import ACTLossHead, build_model
from hrm.training.average import WeightAverage

TRM = "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"
TABLE = "model.inner.puzzle_emb.weights"


def build(**arch: Any) -> ACTLossHead:
    small = {"hidden_size": 32, "num_heads": 2, "L_layers": 1, "L_cycles": 1, "halt_max_steps": 2}
    return build_model(small | arch, batch_size=1, seq_len=4, vocab_size=3, num_puzzle_identifiers=3)


def moved(model: ACTLossHead) -> dict[str, Tensor]:
    """Change everything that is learned, and return the weights before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model.state_dict()[TABLE].fill_(1)
    return before


@pytest.mark.parametrize("name", [TRM, "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_average_takes_in_what_the_published_code_averages(name: str, dtype: str) -> None:
    model = build(name=name, forward_dtype=dtype)
    average = WeightAverage(model, 0.75)
    before = moved(model)
    average.update()
    average.update(torch.tensor(1.0))  # a step that was skipped
    assert average.shared == {"model.inner.H_init", "model.inner.L_init"} | ({TABLE} if name == TRM else set())
    assert average.model.state_dict().keys() == before.keys()
    for weight, tensor in average.model.state_dict().items():
        expected = model.state_dict()[weight] if weight in average.shared else before[weight] + 0.25
        if weight == TABLE and name != TRM:
            expected = torch.full_like(tensor, 0.25)
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("name", [TRM, "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"])
def test_what_is_averaged_has_memory_of_its_own_and_what_is_shared_has_not(name: str) -> None:
    model = build(name=name)
    average = WeightAverage(model, 0.75)
    ours, theirs = model.state_dict(), average.model.state_dict()
    assert {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()} == average.shared
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_is_the_weights_until_its_step() -> None:
    model = build()
    average = WeightAverage(model, 0.75, start=2)
    for step in (1, 2):
        before = moved(model)
        average.at_step(step)
        average.update(torch.tensor(0.0) if step == 2 else None)
        for name, tensor in average.model.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name])
    before = moved(model)
    average.at_step(3)
    average.update(torch.tensor(1.0))  # a step that was skipped
    average.update()
    for name, parameter in average.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25, check_dtype=False)
