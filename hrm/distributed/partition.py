"""Sharing a model out over processes, and bringing the gradients together, with the model's code left alone.

Tensor parallelism and a pipeline replace the weights of the modules' blocks by this process's parts of them, and the
functions that compute a reasoning module by ones that know of the others (`hrm.distributed.tensor`, `.pipeline`).
FSDP2 keeps shards and gathers a module's weights when the model asks for them. Everything else, the puzzle table too,
is on all processes, and those that share a part of the batch compute equal gradients for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hrm.config import ParallelConfig
from hrm.distributed import pipeline
from hrm.distributed import tensor as tensor_parallel
from hrm.distributed.world import World, sum_over_ranks
from hrm.errors import UserError
from hrm.kernels import attention, tensor_parallel_backends
from hrm.kernels.choice import EIGHT_BIT
from hrm.kernels.recompute import recomputed
from hrm.kernels.schedule import chunked, looped
from hrm.models import ACTLossHead
from hrm.optim.clip import clip_gradients
from hrm.optim.nonfinite import find_nonfinite


class _Cut(NamedTuple):
    """How a weight of a block is divided."""

    stage: int  # of the pipeline that has it
    dim: int  # along which the tensor ranks cut it
    stacked: int  # matrices one above the other in that dimension, each of which is cut
    shape: torch.Size  # of the whole


class SharedModel:
    """A model of which this process keeps its part.

    Attributes:
        weights: what the optimizer updates, and nothing frozen, by the names in `model.state_dict()`: whole weights, or
            parts of them.
    """

    weights: dict[str, nn.Parameter]

    def __init__(self, model: ACTLossHead, config: ParallelConfig, world: World) -> None:
        """Reduce `model`, whose weights are equal on all processes, to this one's part, in place.

        Raises:
            UserError: the architecture or the kernels cannot be shared out so.
        """
        self._model = model
        self._world = world
        self._fsdp = config.fsdp and world.size > 1
        is_divided = self._fsdp or world.processes > world.size
        if is_divided:
            self._check_divides()
        self._cuts = dict(self._plan()) if is_divided else {}
        if world.tensor.size > 1 or world.pipeline.size > 1:
            for name in self._cuts:
                self._replace(name)
            self._replace_kernels(config.micro_batches)
        self._sharded: dict[str, nn.Parameter] = {}
        self.weights = dict(_trained(model))
        if self._fsdp:
            self._shard_stacks()
            self._sharded = {name: param for name, param in _trained(model) if name in self._cuts}
            # The optimizer works on plain tensors that share their memory with the shards.
            self.weights |= {name: nn.Parameter(_local(param)) for name, param in self._sharded.items()}
        if is_divided and not config.records_exchange:  # evaluation too exchanges then
            kernels = model.model.inner.kernels
            model.model.inner.kernels = replace(kernels, config=replace(kernels.config, cuda_graphs=False))
        # FSDP sums the gradients of its shards itself.
        self._sum = _GradientSum(
            [param for name, param in self.weights.items() if name not in self._sharded], world, config.bucket_mb
        )

    def hidden_matrices(self, split: str = "projections") -> dict[nn.Parameter, int]:
        """The weights that are matrices within the blocks, with how many of one height each has one above the other.

        Args:
            split: what counts as one, as in `hrm.config.optim.OptimConfig`.

        Raises:
            UserError: processes have parts of them.
        """
        if self._cuts:
            raise UserError(
                "optim=muon needs whole matrices, which parallel.tensor, parallel.pipeline and parallel.fsdp divide: "
                "choose optim=adam_atan2, or share out the batch alone."
            )
        return {
            self.weights[f"model.inner.{stack_name}.layers.{index}.{name}"]: count
            for stack_name, stack in self._model.model.inner.stacks.items()
            for index, block in enumerate(stack.blocks)
            for name, count in block.matrices(split).items()
            if f"model.inner.{stack_name}.layers.{index}.{name}" in self.weights
        }

    def last_backward(self) -> None:
        """Announce that with the next backward pass the gradients are complete."""
        self._sum.start()

    def finish_gradients(self, max_norm: float | None = None) -> None:
        """After backward: leave in `weights` gradients summed over the ranks, of a global norm up to `max_norm`."""
        self._sum.finish()
        for name, param in self._sharded.items():
            if param.grad is not None:
                self.weights[name].grad, param.grad = _local(param.grad), None
        if max_norm is not None:
            grads = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
            parts = [grad for name, grad in grads.items() if name in self._cuts]
            whole = [grad for name, grad in grads.items() if name not in self._cuts]
            axes = (self._world.tensor, self._world.pipeline)
            groups = [None] if self._fsdp else [axis.group for axis in axes if axis.size > 1]
            clip_gradients(whole, parts, groups, max_norm)

    def find_nonfinite(self, others: Sequence[Tensor]) -> Tensor:
        """After `finish_gradients`: 1.0 if a NaN or an infinity is in a gradient in `weights`, or in one of this
        process's `others`, on any process, else 0.0; 0-dimensional and the same on all processes.
        """
        found = find_nonfinite([*(w.grad for w in self.weights.values() if w.grad is not None), *others])
        if self._world.processes > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of tensors whose parts the processes hold, on every process; all must call this.

        Args:
            tensors: weights, or what belongs to each in the same shape (moments, averages), by the names that weights
                have in `model.state_dict()`; for a weight of another stage, an empty tensor. What is not divided is
                returned as it is.
        """
        return {name: self._gather(name, _local(tensor.detach())) for name, tensor in tensors.items()}

    def scatter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `gather`: this process's parts, as views."""
        parts = {name: self._part(name, tensor) for name, tensor in tensors.items()}
        if self._fsdp:
            parts |= {name: parts[name].chunk(self._world.size)[self._world.rank] for name in parts.keys() & self._cuts}
        return parts

    def _plan(self) -> Iterator[tuple[str, _Cut]]:
        for stack_name, stack in self._model.model.inner.stacks.items():
            for index, block in enumerate(stack.blocks):
                stage = index * self._world.pipeline.size // len(stack.blocks)
                cuts = block.cuts()
                for path, weight in block.named_parameters():
                    cut = _Cut(stage, *cuts[path], weight.shape)
                    yield f"model.inner.{stack_name}.layers.{index}.{path}", cut

    def _check_divides(self) -> None:
        world, stacks = self._world, self._model.model.inner.stacks
        blocks = [block for stack in stacks.values() for block in stack.blocks]
        if option := next((block.INDIVISIBLE for block in blocks if block.INDIVISIBLE), None):
            raise UserError(
                f"{option} cannot be used with parallel.tensor, parallel.pipeline or parallel.fsdp: share out the "
                "batch alone."
            )
        wanted = [(f"{name}.layers", len(stack.blocks), world.pipeline.size) for name, stack in stacks.items()]
        for block in blocks:
            wanted += [(option, size, world.tensor.size) for option, size in block.divisible().items()]
            if self._fsdp:  # whose shards are of each weight's rows
                wanted += [
                    (f"rows of {name}", len(weight), world.size * world.tensor.size)
                    for name, weight in block.named_parameters()
                ]
        for option, size, parts in wanted:
            if size % parts:
                raise UserError(
                    f"{option}={size} does not divide over the {parts} processes that share it: change it, "
                    "parallel.tensor, parallel.pipeline or the number of processes."
                )

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This stage's and tensor rank's part, which FSDP may divide further."""
        if (cut := self._cuts.get(name)) is None:
            return whole
        tensor = self._world.tensor
        if cut.stage != self._world.pipeline.rank:
            return whole.new_empty(0)
        return _by_matrix(whole, cut).chunk(tensor.size, cut.dim + 1)[tensor.rank].flatten(cut.dim, cut.dim + 1)

    def _gather(self, name: str, part: Tensor) -> Tensor:
        if (cut := self._cuts.get(name)) is None:
            return part
        tensor, stages = self._world.tensor, self._world.pipeline
        if cut.stage == stages.rank:
            if self._fsdp:
                part = torch.cat(_all(part, self._world.size, self._world.group))
            if tensor.size > 1:
                parts = [_by_matrix(part, cut) for part in _all(part, tensor.size, tensor.group)]
                part = torch.cat(parts, cut.dim + 1).flatten(cut.dim, cut.dim + 1)
        if stages.size > 1:
            part = part.contiguous() if cut.stage == stages.rank else part.new_empty(cut.shape)
            dist.broadcast(part, group=stages.group, group_src=cut.stage)
        return part

    def _replace(self, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        whole = self._model.get_parameter(name)
        part = nn.Parameter(self._part(name, whole.detach()).clone(), whole.requires_grad)
        setattr(self._model.get_submodule(module), attribute, part)

    def _replace_kernels(self, micro_batches: int) -> None:
        world, inner = self._world, self._model.model.inner
        kernels = inner.kernels
        config = kernels.config
        for option in EIGHT_BIT:
            if (named := getattr(config, option)) != "none":
                raise UserError(
                    f"kernels.{option}={named} cannot be used with parallel.tensor or parallel.pipeline: drop it."
                )
        if config.chunk and world.pipeline.size > 1:
            raise UserError(
                "kernels.chunk cannot be used with parallel.pipeline: choose parallel.micro_batches instead."
            )
        module, first_token_block, run = kernels.module, kernels.first_token_block, kernels.run
        if world.tensor.size > 1:
            if not kernels.tensor_parallel:
                able = " or ".join(tensor_parallel_backends())
                raise UserError(
                    f"parallel.tensor={world.tensor.size} needs kernels.backend={able} without kernels.compile, not "
                    f"{config.backend}: take kernels=naive."
                )
            module, first_token_block = tensor_parallel.make(world.tensor, attention.get(config.attention))
            run = looped(module)
            run = chunked(run, config.chunk) if config.chunk else run
            module = recomputed(module, config.recompute)
        if world.pipeline.size > 1:
            num_blocks = {name: len(stack.blocks) for name, stack in inner.stacks.items()}
            staged = pipeline.Pipeline(world.pipeline, module, first_token_block, num_blocks, micro_batches)
            module, first_token_block, run = staged.reasoning_module, staged.first_token_block, staged.run
        inner.kernels = replace(kernels, module=module, first_token_block=first_token_block, run=run)

    def _shard_stacks(self) -> None:
        """Let FSDP2 gather a module's weights when the model asks for them, in the compute dtype.

        They stay gathered until the backward pass has used them: an ACT step uses each many times over, so gathering
        them at each use, as FSDP does for layers used once, would cost many times the traffic to save the 2 bytes that
        a weight takes in bfloat16, beside the 16 of its master, gradient and moments.
        """
        inner = self._model.model.inner
        group = self._world.group or dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, self._world.device.type)
        policy = MixedPrecisionPolicy(
            param_dtype=inner.dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
        for stack in inner.stacks.values():
            sharded = fully_shard(stack, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
            assert isinstance(sharded, FSDPModule)
            sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the global batch already
            sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor
            _gather_when_called(stack, "weights")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)


def _gather_when_called(stack: nn.Module, method: str) -> None:
    """Let a sharded module gather its weights when the model calls `method`, which takes no arguments."""
    read: Callable[[], Any] = getattr(stack, method)
    # FSDP sees it called with one: on CUDA it stumbles over an empty list of them (PyTorch 2.11).
    setattr(stack, method, lambda _: read())
    register_fsdp_forward_method(stack, method)
    setattr(stack, method, partial(getattr(stack, method), None))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _by_matrix(weight: Tensor, cut: _Cut) -> Tensor:
    """A view with the stacked matrices in a dimension of their own, `cut.dim`, before the one that is cut."""
    return weight.view(*weight.shape[: cut.dim], cut.stacked, -1, *weight.shape[cut.dim + 1 :])


def _all(part: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


class _GradientSum:
    """Sums gradients over the ranks: all at the end of backward, or in buckets while it goes on."""

    def __init__(self, params: Sequence[nn.Parameter], world: World, bucket_mb: float) -> None:
        self._params = params
        self._world = world
        self._buckets: list[list[nn.Parameter]] = []
        self._sent: list[tuple[list[nn.Parameter], Tensor, dist.Work]] | None = None  # None: not started
        self._missing: list[int] = []
        if bucket_mb and world.size > 1:
            self._buckets = _fill_buckets(params[::-1], bucket_mb * 1e6)  # backward comes to the last weights first
            for number, bucket in enumerate(self._buckets):
                for param in bucket:
                    param.register_post_accumulate_grad_hook(self._noting(number))  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Before the backward pass that completes the gradients."""
        self._sent, self._missing = [], [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """After it: leave sums in the weights' gradients."""
        if not self._buckets:
            sum_over_ranks([param.grad for param in self._params if param.grad is not None], self._world)
            return
        assert self._sent is not None
        while len(self._sent) < len(self._buckets):  # some weights got no gradient
            self._send()
        for params, flat, work in self._sent:
            work.wait()
            for param, part in zip(params, torch.split(flat, [param.numel() for param in params]), strict=True):
                param.grad = part.view_as(param)
        self._sent = None

    def _noting(self, number: int) -> Callable[[Tensor], None]:
        def note(param: Tensor) -> None:
            if self._sent is None:
                return
            self._missing[number] -= 1
            # In the buckets' order, which is the same on all ranks, whatever the order of their last gradients.
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

        return note

    def _send(self) -> None:
        assert self._sent is not None
        params = [param for param in self._buckets[len(self._sent)] if param.grad is not None]
        flat = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
        work = dist.all_reduce(flat, group=self._world.group, async_op=True)
        assert work is not None
        self._sent.append((params, flat, work))


def _fill_buckets(params: Sequence[nn.Parameter], max_bytes: float) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0.0
    for param in params:
        size = param.numel() * param.element_size()
        if size > room or not buckets:
            buckets.append([])
            room = max_bytes
        buckets[-1].append(param)
        room -= size
    return buckets
