"""The published HRM code at work in a process of its own; `benchmarks.published` starts it and says what is asked for.

    python -P published_side.py CHECKOUT < request.json

Prints a line of JSON at the end. What is timed are the published functions as they lie in the checkout: `train_batch`,
`create_dataloader` and `evaluate` of its pretrain.py. On a CPU, where that file names CUDA, it is read with "cpu".
Packages that it imports and that are not installed get a stand-in, and the answer names those.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice, repeat
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class AdamATan2(torch.optim.Optimizer):
    """The published formula of the package adam-atan2, all parameters in few launches."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self._steps += 1
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"first": torch.zeros_like(param), "second": torch.zeros_like(param)}
            grads = [param.grad for param in params]
            first, second = ([self.state[param][name] for param in params] for name in ("first", "second"))
            (beta1, beta2), lr = group["betas"], group["lr"]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, (1 - beta2**self._steps) ** 0.5)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            directions = [torch.atan2(a, b) for a, b in zip(first, roots, strict=True)]
            torch._foreach_add_(params, directions, alpha=-lr / (1 - beta1**self._steps))


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """PyTorch's attention, with cuDNN's kernels where those are the fastest, on [B, T, N, K]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).contiguous()


class BaseModel:
    """Options as attributes, unchecked."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def _nothing(*_: Any, **__: Any) -> None:
    pass


# By the name of the package, what the published code takes of it.
STAND_INS: dict[str, dict[str, Any]] = {
    "adam_atan2": {"AdamATan2": AdamATan2},
    "argdantic": {"ArgParser": SimpleNamespace},
    "coolname": {"generate_slug": _nothing},
    "flash_attn": {"flash_attn_func": flash_attn_func},
    "pydantic": {"BaseModel": BaseModel, "ConfigDict": dict},
    "wandb": {"init": _nothing, "log": _nothing, "run": None},
}


def stand_in_for_what_is_missing() -> list[str]:
    """Give packages that are not installed a stand-in; returns those that change what is timed."""
    missing = [name for name in STAND_INS if importlib.util.find_spec(name) is None]
    if "flash_attn" in missing and importlib.util.find_spec("flash_attn_interface") is not None:
        missing.remove("flash_attn")
    for name in missing:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(STAND_INS[name])
    if "flash_attn" in missing and torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    return [name for name in missing if name in ("adam_atan2", "flash_attn")]


def load_pretrain(checkout: Path, device: str) -> ModuleType:
    """Its pretrain.py as a module, without what it does as a script."""
    sys.path.insert(0, str(checkout))
    datasets = sys.modules["dataset"] = ModuleType("dataset")  # another package of that name may be installed
    datasets.__path__ = [str(checkout / "dataset")]
    source = (checkout / "pretrain.py").read_text(encoding="utf-8")
    if device != "cuda":
        source = source.replace(".cuda()", ".cpu()").replace('"cuda"', '"cpu"')
    module = ModuleType("pretrain")
    sys.modules["pretrain"] = module
    exec(compile(source, str(checkout / "pretrain.py"), "exec"), vars(module))
    return module


LOSSES = ("lm_loss", "q_halt_loss", "q_continue_loss")
OUTPUTS = ("logits", "q_halt_logits", "q_continue_logits", "target_q_continue")


def observe(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    kept: Collection[int],
    halted: Sequence[Tensor] | None = None,
) -> tuple[dict[int, dict[str, Any]], list[Tensor]]:
    """What training steps compute, at weights that stay as they are. The model is ours or the published one.

    States go on from step to step as this model computes them.

    Args:
        model: a loss head in training mode, without exploration.
        batches: of each step, B sequences that wait to begin, on the model's device.
        kept: the steps, from 1 on, whose results are kept and that have a backward pass.
        halted: which sequences [B] halt after each step, in place of the model's own decisions.

    Returns:
        `(steps, decisions)`. `steps[n]` has the loss and its parts, 0-dimensional sums over the batch; `logits`
        [B, S, V], `q_halt_logits`, `q_continue_logits`, `target_q_continue` if the model learns to continue, `halted`
        and `exact`, each [B]; and `gradients` in float32 by the parameter's name, of the mean over the batch, those of
        the puzzle table of its rows in the batch, [B, ndim]. `decisions` has the model's own [B] after each step.
    """
    plain = getattr(model, "_orig_mod", model)  # beneath torch.compile
    steps: dict[int, dict[str, Any]] = {}
    decisions: list[Tensor] = []
    carry = None
    for number, (batch, given) in enumerate(zip(batches, halted or repeat(None), strict=False), 1):
        if carry is None:
            with torch.device(batch["inputs"].device):
                carry = model.initial_carry(batch)
        carry, loss, metrics, outputs, _ = model(carry=carry, batch=batch, return_keys=list(OUTPUTS))
        decisions.append(carry.halted)
        if number in kept:
            labels = carry.current_data["labels"]
            (loss / len(carry.halted)).backward()
            steps[number] = {
                "loss": loss.detach(),
                **{name: metrics[name].detach() for name in LOSSES if name in metrics},
                **{name: outputs[name].detach().float() for name in OUTPUTS if name in outputs},
                "halted": carry.halted,
                "exact": ((outputs["logits"].argmax(-1) == labels) | (labels < 0)).all(-1),
                "gradients": dict(_take_gradients(plain)),
            }
        if given is not None:
            carry = replace(carry, halted=given)
    return steps, decisions


def _take_gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Gradients by name, which the model then has no longer."""
    leaves = list(model.named_parameters())
    rows = getattr(getattr(model.model.inner, "puzzle_emb", None), "local_weights", None)
    if rows is not None:
        leaves.append(("model.inner.puzzle_emb.weights", rows))
    for name, leaf in leaves:
        if leaf.grad is not None:
            yield name, leaf.grad.float()
            leaf.grad = None


class Published:
    """Its model and optimizers as its `launch` makes them, on a pack."""

    def __init__(self, checkout: Path, request: dict[str, Any]) -> None:
        self.on_cuda = request["device"] == "cuda"
        self.pretrain = load_pretrain(checkout, request["device"])
        self.batch_size: int = request["batch_size"]
        self.pack = Path(request["pack"])
        loss = SimpleNamespace(name="losses@ACTLossHead", __pydantic_extra__={"loss_type": "stablemax_cross_entropy"})
        arch = SimpleNamespace(
            name="hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", loss=loss, __pydantic_extra__=request["arch"]
        )
        self.config = SimpleNamespace(
            arch=arch,
            data_path=str(self.pack),
            global_batch_size=self.batch_size,
            epochs=10**9,
            lr=1e-4,
            lr_min_ratio=1.0,
            lr_warmup_steps=2000,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            puzzle_emb_lr=1e-2,
            puzzle_emb_weight_decay=0.1,
            checkpoint_path=None,
            seed=0,
            eval_save_outputs=[],
        )
        vars(self.config).update(request.get("config", {}))
        torch.random.manual_seed(self.config.seed)
        self.metadata = self._dataset("train", 1)[1]
        self.state = self.pretrain.init_train_state(self.config, self.metadata, world_size=1)

    def _dataset(self, split: str, epochs: int) -> tuple[Any, Any]:
        loader, metadata = self.pretrain.create_dataloader(
            self.config,
            split,
            test_set_mode=split == "test",
            epochs_per_iter=epochs,
            global_batch_size=self.batch_size,
            rank=0,
            world_size=1,
        )
        return loader, metadata

    def loader(self, batches: int) -> Iterator[Any]:
        """Its loader, for so many batches at least."""
        epochs = 2 + batches * self.batch_size // self.metadata.total_groups
        return iter(self._dataset("train", epochs)[0])

    def in_memory(self, batches: int = 16) -> Iterator[Any]:
        """Batches that wait in memory, again and again."""
        rng = np.random.default_rng(0)
        arrays = {name: np.load(self.pack / "train" / f"all__{name}.npy") for name in ("inputs", "labels")}
        ready = []
        for _ in range(batches):
            rows = rng.integers(0, len(arrays["inputs"]), self.batch_size)
            batch = {name: torch.from_numpy(array[rows].astype(np.int32)) for name, array in arrays.items()}
            batch["puzzle_identifiers"] = torch.zeros(self.batch_size, dtype=torch.int32)
            ready.append({name: field.pin_memory() if self.on_cuda else field for name, field in batch.items()})
        return cycle(ready)

    def train(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """A training step; its metrics, as published."""
        metrics: dict[str, Any] | None = self.pretrain.train_batch(
            self.config, self.state, batch, self.batch_size, rank=0, world_size=1
        )
        return metrics or {}

    def learn(self, window: int) -> dict[str, Any]:
        """All its epochs, and an evaluation: the test split's metrics, and means over windows of so many steps.

        Of a window's sequences, `exact_accuracy` and `steps` are of those that halted; both are missing if none did.
        """
        began = time.perf_counter()
        self.state.model.train()
        curve, sums = [], dict.fromkeys(("lm_loss", "exact_accuracy", "steps", "count"), 0.0)
        for _, batch, _ in self._dataset("train", self.config.epochs)[0]:
            metrics = self.train(batch)
            if not metrics:  # past the last step
                continue
            halted = float(metrics["train/count"])
            sums["lm_loss"] += float(metrics["train/lm_loss"]) / window
            sums["count"] += halted
            for name in ("exact_accuracy", "steps"):
                sums[name] += halted * float(metrics[f"train/{name}"])
            if self.state.step % window == 0:
                halted = sums.pop("count")
                of_halted = {name: sums[name] / halted for name in ("exact_accuracy", "steps") if halted}
                curve.append({"step": self.state.step, "lm_loss": sums["lm_loss"], **of_halted})
                sums = dict.fromkeys((*sums, "count"), 0.0)
        self.state.model.eval()
        loader, metadata = self._dataset("test", 1)
        test = self._evaluate(list(loader), metadata)
        steps = self.state.total_steps
        return {"test": test, "curve": curve, "steps": steps, "minutes": (time.perf_counter() - began) / 60}

    def take_weights(self, weights: dict[str, Tensor]) -> None:
        """Put a state dict of ours in the place of the model's weights."""
        model = self.state.model
        getattr(model, "_orig_mod", model).load_state_dict(weights)

    def gradients(self, given: dict[str, Any], kept: Collection[int]) -> dict[int, dict[str, Any]]:
        """See `observe`: all on the CPU."""
        self.take_weights(given["weights"])
        self.state.model.train()
        device = "cuda" if self.on_cuda else "cpu"
        batches = [{name: field.to(device) for name, field in batch.items()} for batch in given["batches"]]
        steps, _ = observe(self.state.model, batches, kept, [halted.to(device) for halted in given["halted"]])
        return {
            number: {
                name: {key: each.cpu() for key, each in value.items()} if name == "gradients" else value.cpu()
                for name, value in step.items()
            }
            for number, step in steps.items()
        }

    def answer(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Its evaluation of the whole test split, whose batches wait in memory: metrics, and puzzles a second."""
        self.take_weights(weights)
        self.state.model.eval()
        loader, metadata = self._dataset("test", 1)
        batches = list(loader)
        self._evaluate(batches[:1], metadata)
        test: dict[str, dict[str, float]] = {}
        ms = self.timed(lambda: test.update(self._evaluate(batches, metadata)))
        return {"test": test, "puzzles/s": 1000 * sum(count for _, _, count in batches) / ms}

    def _evaluate(self, batches: Sequence[tuple[str, Any, int]], metadata: Any) -> dict[str, dict[str, float]]:
        """Metrics of its `evaluate` for each set that has puzzles here, and their `count`."""
        found = self.pretrain.evaluate(self.config, self.state, batches, metadata, rank=0, world_size=1)
        counts: Counter[str] = Counter()
        for set_name, _, count in batches:
            counts[set_name] += count
        return {
            set_name: {"count": count, **{name: float(value) for name, value in found[set_name].items()}}
            for set_name, count in counts.items()
        }

    # ---- what can be asked for: each yields milliseconds

    def step(self) -> Iterator[float]:
        """Training steps on batches that wait in memory."""
        self.state.model.train()
        batches = self.in_memory()
        while True:
            batch = next(batches)
            yield self.timed(lambda batch=batch: self.train(batch))  # type: ignore[misc]

    def loop(self, batches: int) -> Iterator[float]:
        """Its training loop: its loader, a step, metrics on the host."""
        self.state.model.train()
        loader = self.loader(batches)
        while True:

            def once() -> None:
                _, batch, _ = next(loader)
                self.train(batch)

            yield self.timed(once)

    def evaluation(self) -> Iterator[float]:
        """Its evaluation of a batch, all ACT steps; the time of one."""
        self.state.model.eval()
        batches = self.in_memory()
        steps = self.config.arch.__pydantic_extra__["halt_max_steps"]
        while True:
            loader = [("all", next(batches), self.batch_size)]
            call = lambda loader=loader: self.pretrain.evaluate(  # noqa: E731
                self.config, self.state, loader, SimpleNamespace(sets=["all"]), rank=0, world_size=1
            )
            yield self.timed(call) / steps

    def latency(self) -> Iterator[float]:
        """Its loop over all ACT steps, from tokens on the host to answers on the host."""
        self.state.model.eval()
        model, device = self.state.model, "cuda" if self.on_cuda else "cpu"
        batches = self.in_memory()

        def answer() -> None:
            with torch.inference_mode():
                batch = {name: field.to(device) for name, field in next(batches).items()}
                with torch.device(device):
                    carry = model.initial_carry(batch)
                all_finish = False
                while not all_finish:
                    carry, _, _, outputs, all_finish = model(carry=carry, batch=batch, return_keys=["logits"])
                outputs["logits"].argmax(-1).cpu()

        while True:
            yield self.timed(answer)

    def timed(self, work: Callable[[], object]) -> float:
        """Milliseconds by the clock, until the device is done."""
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return 1000 * (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def main() -> None:
    checkout, request = Path(sys.argv[1]).resolve(), json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    stand_ins = stand_in_for_what_is_missing()
    answer = _answer_to(request, Published(checkout, request))
    print(json.dumps(answer | {"stand-ins": stand_ins}), flush=True)


def _answer_to(request: dict[str, Any], published: Published) -> dict[str, Any]:
    if request["work"] == "learn":
        return published.learn(request["window"])
    if request["work"] == "gradients":
        given = torch.load(request["given"], weights_only=True)
        torch.save(published.gradients(given, request["kept"]), request["found"])
        return {}
    if request["work"] == "answer":
        return published.answer(torch.load(request["given"], weights_only=True))
    calls = 1 + request["warmup"] + request["repeats"]
    works = {"step": published.step, "evaluation": published.evaluation, "latency": published.latency}
    times = published.loop(calls) if request["work"] == "loop" else works[request["work"]]()
    first, *others = islice(times, calls)
    measured = others[request["warmup"] :]
    average = statistics.fmean if request["work"] == "loop" else statistics.median
    return {
        "ms": average(measured),
        "slowest of 20": sorted(measured)[-1 - len(measured) // 20],
        "first s": first / 1000,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if published.on_cuda else None,
    }


if __name__ == "__main__":
    main()
