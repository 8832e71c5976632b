"""The published HRM code (github.com/sapientinc/HRM) beside ours, from a checkout of it, in the same call.

    git clone https://github.com/sapientinc/HRM
    python -m benchmarks.train_step --published HRM

Also benchmarks.loop, .evaluate, .latency, .learning, .gradients and .answering.

It runs as it is, in a process of its own (`published_side.py`), through torch.compile as it always does unless its own
switch, the environment variable DISABLE_COMPILE, is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.config import PretrainConfig
from hrm.errors import UserError
from hrm.models.hrm import HRMConfig

WORKS = ("step", "loop", "evaluation", "latency")
_SIDE = Path(__file__).with_name("published_side.py")
_OPTIONS = (
    *("H_cycles", "L_cycles", "H_layers", "L_layers", "hidden_size", "expansion", "num_heads", "pos_encodings"),
    *("rms_norm_eps", "rope_theta", "halt_max_steps", "halt_exploration_prob", "puzzle_emb_ndim", "forward_dtype"),
)
_TRAINING = (
    *("epochs", "lr", "lr_min_ratio", "lr_warmup_steps", "weight_decay", "beta1", "beta2"),
    *("puzzle_emb_lr", "puzzle_emb_weight_decay", "seed"),
)


@dataclass(frozen=True)
class Published:
    """A checkout of the published code.

    Raises:
        UserError: it is none.
    """

    checkout: Path

    def __post_init__(self) -> None:
        for name in ("pretrain.py", "models/hrm/hrm_act_v1.py", "puzzle_dataset.py"):
            if not (self.checkout / name).is_file():
                raise UserError(
                    f"{self.checkout} is no checkout of the published code: it has no {name}; "
                    "git clone https://github.com/sapientinc/HRM."
                )

    def measure(
        self,
        work: str,
        arch: Any,
        pack: Path,
        batch_size: int,
        device: torch.device,
        *,
        warmup: int = 5,
        repeats: int = 30,
        compiled: bool | None = None,
    ) -> dict[str, Any]:
        """Time one kind of work of the published code with fresh weights.

        Args:
            work: one of `WORKS`. step: a training step on a batch that waits in memory; loop: its training loop, with
                its loader; evaluation: an ACT step of a batch in its `evaluate`; latency: all ACT steps of a batch,
                from tokens on the host to answers on the host.
            arch: our options of HRM v1.
            pack: a folder with a split `train`.
            batch_size: sequences.
            warmup: calls that are not counted, after a first one that compiles.
            repeats: calls that are.
            compiled: through torch.compile, as it is published; None: unless DISABLE_COMPILE is set.

        Returns:
            `ms`: the median of the calls, of `loop` the mean; `slowest of 20`; `first s`: seconds of the first call;
            `GiB`: peak memory on CUDA, else None; `stand-ins`: packages that were replaced because they are not
            installed, among flash_attn and adam_atan2.

        Raises:
            UserError: the published code has no such option, or fails; the sentence ends with its last line.
        """
        request = _request(work, arch, pack, batch_size, device) | {"warmup": warmup, "repeats": repeats}
        return self._ask(request, compiled)

    def gradients(
        self,
        arch: Any,
        pack: Path,
        weights: Mapping[str, Tensor],
        batches: Sequence[Batch],
        halted: Sequence[Tensor],
        kept: Collection[int],
        device: torch.device,
        *,
        compiled: bool | None = None,
    ) -> dict[int, dict[str, Any]]:
        """What training steps of the published code compute, at weights that stay as they are, without exploration.

        Args:
            weights: a state dict of ours.
            arch, pack, compiled: as for `measure`.
            batches, halted, kept: as for `benchmarks.published_side.observe`.

        Returns:
            The first result of `observe`, each step with `stand-ins`, as of `measure`, besides.

        Raises:
            UserError: the published code has no such option, or fails; the sentence ends with its last line.
        """
        request = _request("gradients", arch, pack, len(halted[0]), device)
        request["arch"]["halt_exploration_prob"] = 0.0
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder, "given.pt"), Path(folder, "found.pt")
            torch.save({"weights": dict(weights), "batches": list(batches), "halted": list(halted)}, given)
            answer = self._ask(request | {"kept": list(kept), "given": str(given), "found": str(found)}, compiled)
            steps: dict[int, dict[str, Any]] = torch.load(found, map_location=device, weights_only=True)
            return {number: step | {"stand-ins": answer["stand-ins"]} for number, step in steps.items()}

    def answer(
        self,
        arch: Any,
        pack: Path,
        weights: Mapping[str, Tensor],
        batch_size: int,
        device: torch.device,
        *,
        compiled: bool | None = None,
    ) -> dict[str, Any]:
        """Evaluate weights by the published code on a whole test split, whose batches wait in memory.

        Args:
            pack: a folder with splits `train` and `test`.
            weights: a state dict of ours.
            arch, batch_size, compiled: as for `measure`.

        Returns:
            `test`: metrics of each test set and its `count`; `puzzles/s`, after a first batch that compiles;
            `stand-ins`, as of `measure`.

        Raises:
            UserError: the published code has no such option, or fails; the sentence ends with its last line.
        """
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, "given.pt")
            torch.save(dict(weights), given)
            request = _request("answer", arch, pack, batch_size, device) | {"given": str(given)}
            return self._ask(request, compiled)

    def learn(self, config: PretrainConfig, pack: Path, device: torch.device, window: int) -> dict[str, Any]:
        """Train the published code as `config` says, and evaluate it once at the end.

        Args:
            config: as far as the published code has its options: the others stay as they are there.
            pack: a folder with splits `train` and `test`.
            window: steps that a point of the curve is the mean of.

        Returns:
            `test`: metrics of each test set and its `count`; `curve`: for each window its last `step`, `lm_loss` and,
            where a sequence halted, `exact_accuracy` and ACT `steps`; `steps`; `minutes`, compiling and evaluating
            included; `stand-ins`, as of `measure`.

        Raises:
            UserError: the published code has no such option, or fails; the sentence ends with its last line.
        """
        return self._ask(training_request(config, pack, device) | {"window": window})

    def _ask(self, request: Mapping[str, Any], compiled: bool | None = None) -> dict[str, Any]:
        """What its process answers."""
        environment = dict(os.environ)
        if compiled is not None:
            environment.pop("DISABLE_COMPILE", None)
            environment |= {} if compiled else {"DISABLE_COMPILE": "1"}
        done = subprocess.run(
            [sys.executable, "-P", str(_SIDE), str(self.checkout.resolve())],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(f"the published code in {self.checkout} failed: {_last_line(done.stderr)}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def _request(work: str, arch: Any, pack: Path, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What its process must know of any work."""
    return {
        "work": work,
        "arch": published_arch(arch),
        "pack": str(pack.resolve()),
        "batch_size": batch_size,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def training_request(config: PretrainConfig, pack: Path, device: torch.device) -> dict[str, Any]:
    """What its process must know to train as `config` says, as far as the published code has its options.

    Raises:
        UserError: it does not have the architecture, an option of it that is not as it is there, or the optimizer.
    """
    if config.optim.name != "adam_atan2":
        raise UserError(f"the published code has no optim={config.optim.name}: take optim=adam_atan2.")
    request = _request("learn", config.arch, pack, config.global_batch_size, device)
    return request | {"config": {name: getattr(config, name) for name in _TRAINING}}


def published_arch(arch: Any) -> dict[str, Any]:
    """Options of HRM v1 as the published code takes them.

    Raises:
        UserError: it does not have the architecture, or an option that is not as it is there.
    """
    if not isinstance(arch, HRMConfig):
        raise UserError(f"the published code has no arch={arch.name}: take arch=hrm_v1 or hrm_small.")
    as_published = HRMConfig(hidden_size=arch.hidden_size)
    for field in fields(HRMConfig):
        value = getattr(arch, field.name)
        if field.name not in _OPTIONS and value != getattr(as_published, field.name):
            raise UserError(f"the published code has no arch.{field.name}={value}: leave it out.")
    return {name: getattr(arch, name) for name in _OPTIONS}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
