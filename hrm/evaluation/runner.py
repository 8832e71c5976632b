"""Run a model to its answers over a test split and count how good they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hrm.batch import Batch
from hrm.cuda_graphs import GraphedWork
from hrm.data.loader import EvalLoader
from hrm.distributed import World, sum_over_ranks
from hrm.models import ACTLossHead


@torch.no_grad()  # not inference_mode: compiled no-gradient code of the training step serves here too
def think(
    model: ACTLossHead, batch: Batch, return_keys: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Spend all ACT steps on a batch.

    Args:
        model: in evaluation mode.
        return_keys: as in `ACTLossHead.forward`.

    Returns:
        `(metrics, outputs)` of the last step, as in `ACTLossHead.forward`.
    """
    carry = model.initial_carry(batch)
    for _ in range(model.halt_max_steps - 1):
        carry, *_ = model(carry=carry, batch=batch)
    _, _, metrics, outputs, _ = model(carry=carry, batch=batch, return_keys=return_keys)
    return metrics, outputs


def evaluate(
    model: ACTLossHead, loader: EvalLoader, world: World, keep: Sequence[str] = ()
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Metrics of every set of a test split.

    Args:
        keep: names of batch fields and outputs to keep, see `hrm.config.SAVEABLE_OUTPUTS`.

    Returns:
        `(metrics, saved)`: `metrics[set][name]` averaged over the examples of all ranks, with `count`, how many they
        were; `saved[name]` of this rank's examples in order, on the CPU, padding left out.
    """
    keep = list(dict.fromkeys(keep))
    was_training = model.training
    model.eval()
    work: Callable[[Batch], tuple[dict[str, Tensor], dict[str, Tensor]]] = partial(think, model, return_keys=keep)
    if model.kernels.cuda_graphs:
        work = GraphedWork(work, world.device, eager_calls=1)
    sums: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, list[Tensor]] = defaultdict(list)
    for set_name, batch, count in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=not world.is_main):
        metrics, outputs = work({name: field.to(world.device, non_blocking=True) for name, field in batch.items()})
        totals = sums.setdefault(set_name, {})
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value.float()
        if keep:
            local = len(batch["inputs"])
            real = min(max(count - world.rank * local, 0), local)
            for name in keep:
                saved[name].append({**batch, **outputs}[name][:real].cpu())
    model.train(was_training)
    averages = {set_name: _average(totals, world) for set_name, totals in sums.items()}
    return averages, {name: torch.cat(parts) for name, parts in saved.items()}


def _average(totals: dict[str, Tensor], world: World) -> dict[str, float]:
    names = sorted(totals)
    stacked = torch.stack([totals[name] for name in names])
    sum_over_ranks([stacked], world)
    values = dict(zip(names, stacked.tolist(), strict=True))
    count = values.pop("count")
    return {"count": count} | {name: value / max(count, 1) for name, value in values.items()}


def save_outputs(outputs: dict[str, Tensor], folder: Path, step: int, world: World) -> Path:
    """Write this rank's saved outputs under the published name, `step_<n>_all_preds.<rank>`."""
    file = folder / f"step_{step}_all_preds.{world.rank}"
    torch.save(outputs, file)
    return file
