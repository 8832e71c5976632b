"""What optimizers with Adam's two moments share: counts on the device, copies of the weights, skipping of steps."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hrm.models.layers import keep_copy, kept_copy
from hrm.optim.schedule import set_lr


class Adam(Optimizer):
    """An optimizer with moments `exp_avg` and `exp_avg_sq` of each weight; subclasses say how a step changes them.

    Attributes:
        found_inf: 0-dimensional float32; when 1, and not 0, `step` changes nothing but gradients, without waiting to
            see. Needs `capturable`.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        *,
        capturable: bool = False,
        fused: bool = False,
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        """As for other optimizers; `capturable` keeps the step count on the device, for CUDA graphs: give `lr` as a
        0-dimensional float64 tensor there, and fill it. All parameters must then have a gradient at every step.

        Args:
            fused: update by one kernel in Triton, which runs on NVIDIA GPUs; for contiguous float32 parameters. Implies
                `capturable`, with either kind of `lr`.
            copy_dtype: with `fused`, write a copy of the weights in this dtype too, for `hrm.models.layers.in_dtype` to
                use. A CUDA graph that uses copies needs `refresh_copies` before its replay if weights may have changed
                by anything but `step`.
        """
        capturable = capturable or fused
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "capturable": capturable, "fused": fused}
        super().__init__(params, defaults)
        self._copy_dtype = copy_dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that this optimizer saved, whatever computed it.

        Options come with the state, but how it is computed stays as constructed, and so does a tensor that holds `lr`.
        """
        own = [(group["lr"], group["capturable"], group["fused"]) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, (lr, capturable, fused) in zip(self.param_groups, own, strict=True):
            set_lr(group, float(group["lr"]), lr)
            group["capturable"], group["fused"] = capturable, fused
            for param in group["params"]:
                if state := self.state.get(param):
                    step = float(state["step"])
                    state["step"] = torch.tensor(step, device=param.device) if capturable else int(step)

    def refresh_copies(self) -> None:
        """Bring copies up to date, in place, whose weights were changed by anything but `step`. Does not wait."""
        if self._copy_dtype is None:
            return
        for group in self.param_groups:
            for param in group["params"]:
                copy = kept_copy(param)
                if copy is not None and not copy.is_current(param):
                    keep_copy(param, copy.values.copy_(param.detach()))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        for step, same_step in self._count_step(params, group["capturable"]):
            self._apply(same_step, step, group)

    @abstractmethod
    def _apply(self, params: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> None:
        """Take step number `step` of weights of `group` that all have a gradient."""

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    def _count_step(self, params: list[Tensor], capturable: bool) -> list[tuple[int | Tensor, list[Tensor]]]:
        """Advance the step count of `params`; returns them by their count."""
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), device=param.device) if capturable else 0
                state |= self._new_state(param)
        if capturable:
            steps = [self.state[param]["step"] for param in params]
            if self.found_inf is None:
                torch._foreach_add_(steps, 1)
            else:  # by a list: to add one tensor to many, PyTorch waits for its value
                torch._foreach_add_(steps, [1 - self.found_inf] * len(steps))
            return [(steps[0], params)] if params else []
        by_step: dict[int, list[Tensor]] = defaultdict(list)
        for param in params:
            self.state[param]["step"] += 1
            by_step[self.state[param]["step"]].append(param)
        return list(by_step.items())

    def _copies(self, params: list[Tensor]) -> list[Tensor]:
        """Memory for the copies of `params`, that of the step before where there is one; empty if none are wanted."""
        if self._copy_dtype is None or self._copy_dtype == params[0].dtype:
            return []
        copies = []
        for param in params:
            copy = kept_copy(param)
            reusable = copy is not None and copy.address == param.data_ptr() and copy.values.dtype == self._copy_dtype
            copies.append(copy.values if copy and reusable else torch.empty_like(param, dtype=self._copy_dtype))
        return copies
