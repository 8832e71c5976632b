"""The model card of a saved model: README.md with the metadata that the hub reads."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hrm.checkpoint.run_folder import METRICS_FILE
from hrm.checkpoint.weights import Checkpoint
from hrm.models import ACTLossHead
from hrm.reading import open_lines
from hrm.tasks.base import Task
from hrm.tasks.form import PuzzleForm
from hrm.version import __version__

_TEXT = """\
# {title}

A Hierarchical Reasoning Model for the task {task}: {parameters:,} parameters, puzzles of {seq_len} cells in a
vocabulary of {vocab_size} tokens, at most {act_max_steps} ACT steps.

```python
import hrm

model = hrm.from_pretrained("owner/name")  # this repository, or a folder with these files
out = model.predict(puzzle)
print(out.texts[0], out.q_halt[0])
```

## Training

- Architecture: `{arch}`, width {width}
- Data: {data}
- Optimizer steps: {step}
- Computed in {dtype}
{metrics}
## Limits

The model answers puzzles of the one size and vocabulary it was trained on{table}. `q_halt` is its own estimate that an
answer is right, not a proof.

Made with hrm-torch {version}. Architecture: Hierarchical Reasoning Model (arXiv 2506.21734).
"""


def model_card(task: Task, form: PuzzleForm, model: ACTLossHead, checkpoint: Checkpoint) -> ModelCard:
    """The card of a model, as far as its checkpoint tells."""
    config = model.model.inner.config
    data_path = checkpoint.config.get("data_path")
    name = Path(data_path).name if isinstance(data_path, str) else "not recorded"
    metadata = ModelCardData(
        library_name="hrm", tags=["hrm", "hierarchical-reasoning-model", "model_hub_mixin", task.name]
    )
    known = f", and only the {form.num_puzzle_identifiers:,} puzzle identifiers of its table"
    text = _TEXT.format(
        title=f"HRM for {task.name}",
        task=task.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seq_len=form.seq_len,
        vocab_size=form.vocab_size,
        act_max_steps=model.halt_max_steps,
        arch=config.name,
        width=config.hidden_size,
        data=f"`{name}`",
        step=f"{checkpoint.step:,}" if checkpoint.step else "not recorded",
        dtype=config.forward_dtype,
        metrics="".join(f"- {name}: {value:.4f}\n" for name, value in _metrics(checkpoint).items()),
        table=known if form.num_puzzle_identifiers > 1 else "",
        version=__version__,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _metrics(checkpoint: Checkpoint) -> dict[str, float]:
    """The accuracies that training measured at the step of the weights, where its record is beside them."""
    found: dict[str, float] = {}
    try:
        with open_lines(checkpoint.folder / METRICS_FILE) as lines:
            for record in map(json.loads, lines):
                if record.get("step") == checkpoint.step:
                    found |= {
                        f"{name} (test)": float(value)
                        for name, value in record.items()
                        if name.endswith("accuracy")
                        and not name.startswith("train/")
                        and isinstance(value, float | int)
                    }
    except (OSError, ValueError, AttributeError, EOFError):
        return {}
    return found
