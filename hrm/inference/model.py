"""A trained model to be used from a program: `hrm.from_pretrained(...)`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors.torch import save_file
from torch import Tensor

from hrm.checkpoint.quantized import to_int8
from hrm.checkpoint.run_folder import replacing
from hrm.checkpoint.weights import (
    PRETRAINED_CONFIG,
    PRETRAINED_WEIGHTS,
    PUZZLE_TABLE,
    Checkpoint,
    find_checkpoint,
    read_weights,
)
from hrm.config import KernelsConfig, kernels_config
from hrm.config.checks import at_least, choice
from hrm.config.entry import DTYPES
from hrm.distributed.world import World, pick_device
from hrm.errors import UserError
from hrm.evaluation.latent import Mixing, states_after, token_mixing
from hrm.evaluation.loading import ModelSizes, describe_model, load_model
from hrm.evaluation.paths import Noise
from hrm.inference.card import model_card
from hrm.inference.forms import form_of_checkpoint
from hrm.inference.inputs import in_chunks, items_of, read_item
from hrm.inference.predictor import Predictions, PredictOptions, Predictor, as_batch
from hrm.models import ACTLossHead
from hrm.tasks import all_tasks
from hrm.tasks.base import Task
from hrm.tasks.form import PuzzleForm
from hrm.version import __version__

_LIKELY_BATCH = 256  # what kernels prepare for


class TrainedModel(ModelHubMixin):
    """A trained model with what its tokens mean.

    Attributes:
        model: the weights and what computes them; `model(carry=..., batch=...)` is one ACT step.
        task: what tokens mean, one of `hrm.tasks`.
        form: how puzzles are written as tokens, with the sizes.
        checkpoint: where it comes from.
        device: where it lies.
    """

    def __init__(self, model: ACTLossHead, form: PuzzleForm, checkpoint: Checkpoint, device: torch.device) -> None:
        """`model` is in evaluation mode, on `device`."""
        self.model, self.form, self.checkpoint, self.device = model, form, checkpoint, device
        self.task: Task = all_tasks()[form.task]
        self._predictor = Predictor(model, self.task, form, device)

    # ---- answers

    @overload
    def predict(
        self,
        x: Any,
        *,
        act_max_steps: int | None = None,
        augmentations: int = 1,
        paths: int = 1,
        noise: float = 0.3,
        noise_at: str = "steps",
        pick: str = "vote",
        seed: int = 0,
        trajectory: bool = False,
        latents: bool = False,
        halt: bool = True,
        batch_size: int | None = None,
        tokens: bool = False,
        stream: Literal[False] = False,
    ) -> Predictions: ...

    @overload
    def predict(
        self,
        x: Any,
        *,
        act_max_steps: int | None = None,
        augmentations: int = 1,
        paths: int = 1,
        noise: float = 0.3,
        noise_at: str = "steps",
        pick: str = "vote",
        seed: int = 0,
        trajectory: bool = False,
        latents: bool = False,
        halt: bool = True,
        batch_size: int | None = None,
        tokens: bool = False,
        stream: Literal[True],
    ) -> Iterator[Predictions]: ...

    def predict(
        self,
        x: Any,
        *,
        act_max_steps: int | None = None,
        augmentations: int = 1,
        paths: int = 1,
        noise: float = 0.3,
        noise_at: str = "steps",
        pick: str = "vote",
        seed: int = 0,
        trajectory: bool = False,
        latents: bool = False,
        halt: bool = True,
        batch_size: int | None = None,
        tokens: bool = False,
        stream: bool = False,
    ) -> Predictions | Iterator[Predictions]:
        """Answer one puzzle or many.

        Args:
            x: a puzzle as the task writes it, or several. Sudoku: 81 digits, 0 or . for blanks, as text, list or grid;
                mazes: `# SGo` as text, rows or grid; ARC: `{"input": grid, "puzzle": name}`, or a task's own
                `{"test": [...], "puzzle": name}`; one's own task: lists or grids of symbols. numpy arrays and tensors
                stand for lists. With `stream`, anything that can be iterated over.
            act_max_steps: ACT steps at most; None: as in training.
            augmentations: answers to as many symmetric copies of each puzzle. The first that keeps the task's rules
                counts, where they are known; else what most answer.
            paths: answers to each of these copies by as many paths of all ACT steps: the first as ever, the others with
                noise on the model's states. The first answer that keeps the task's rules counts, where they are known;
                else what `pick` says.
            noise: standard deviation of that noise.
            noise_at: when it is added: before all `steps`, or at the `start` only.
            pick: vote, the most frequent answer; q, that of highest q_halt; converged, of the path whose state changed
                least in the last step; first, of the path that halts first.
            seed: of the noise.
            trajectory: give the answers and q_halt after every ACT step too.
            latents: give the model's states at the start and after every ACT step too, beside what `trajectory` gives.
                They are large: 7 MB a Sudoku with the published model.
            halt: end a sequence where the model says q_halt > q_continue, and give its slot to the next one; False:
                spend all steps on each, as `hrm evaluate` does.
            batch_size: sequences computed at a time; None: as many as there are, up to what suits the device (16 on a
                CPU, else 256). Sequences do not depend on one another, but how their sums round may depend on how many
                there are; on a GPU, with a number here, the batch always has that size.
            tokens: `x` holds the model's own tokens, as a pack does.
            stream: give an iterator of chunks, in order; memory stays the same however many puzzles there are.

        Raises:
            UserError: an option is of no use, or a puzzle is none: the sentence names it by its index.
        """
        options = PredictOptions(
            act_max_steps,
            augmentations,
            paths=paths,
            noise=Noise(noise, at=noise_at, seed=seed),
            pick=pick,
            trajectory=trajectory,
            latents=latents,
            halt=halt,
            batch_size=batch_size,
        )
        items = items_of(x, self.task, self.form, tokens=tokens)
        chunks = in_chunks(items, self._predictor.chunk_size(options), self.task, self.form)
        if stream:
            return self._predictor.answers(chunks, options)
        read = list(chunks)  # all are checked before any is answered
        if not read:
            return self._none(options)
        return Predictions.joined(list(self._predictor.answers(read, options)))

    @property
    def predictor(self) -> Predictor:
        """What answers puzzles that are read already."""
        return self._predictor

    def _none(self, options: PredictOptions) -> Predictions:
        inner, steps = self.model.model.inner, options.act_max_steps or self.act_max_steps
        answers = np.zeros((0, self.form.seq_len), dtype=np.int64)
        out = Predictions(answers, np.zeros(0), np.zeros(0, dtype=np.int64), [], [], np.zeros(0, dtype=np.int64))
        if not options.every_step:
            return out
        shape = (0, steps + 1, inner.num_tokens, inner.config.hidden_size)
        return replace(
            out,
            trajectory=np.zeros((0, steps, self.form.seq_len), dtype=np.int64),
            q_halts=np.zeros((0, steps)),
            latents={name: np.zeros(shape, dtype=np.float32) for name in inner.initial_states}
            if options.latents
            else None,
        )

    # ---- what happens inside

    @property
    def prefix_len(self) -> int:
        """Tokens of the puzzle prefix, P, which come before those of the input in `latents` and in `token_mixing`."""
        return self.model.model.inner.prefix_len

    def token_mixing(self, x: Any, *, step: int | None = None, tokens: bool = False) -> list[Mixing]:
        """How each block mixes the tokens of one puzzle: attention by head, or how sensitive an MLP over tokens is.

        Args:
            x: one puzzle, as `predict` takes it.
            step: of which ACT step, from 1; None: the one after which it halts. It is the last update of a module that
                is looked at, computed by the definition of the blocks whatever the kernels are.
            tokens: as for `predict`.

        Returns:
            A `Mixing` for each block, module by module.

        Raises:
            UserError: there is no such step, or not one puzzle.
        """
        items = items_of(x, self.task, self.form, tokens=tokens)
        puzzles = [
            puzzle for number, item in enumerate(items) for puzzle in read_item(item, number, self.task, self.form)
        ]
        if len(puzzles) != 1:
            raise UserError(f"token_mixing takes one puzzle, and is given {len(puzzles)}.")
        if step is None:
            step = int(self._predictor.answer(puzzles, [0], PredictOptions()).steps[0])
        at_least("step", step, 1)
        batch = {name: field.to(self.device) for name, field in as_batch(puzzles).items()}
        return token_mixing(self.model, batch, states_after(self.model, batch, step - 1))

    # ---- what it is

    @property
    def num_parameters(self) -> int:
        """Numbers in its weights, those of the puzzle table included."""
        return sum(tensor.numel() for tensor in self.model.state_dict().values())

    @property
    def act_max_steps(self) -> int:
        """ACT steps after which every sequence halts, unless `predict` is told otherwise."""
        return self.model.halt_max_steps

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.model.model.inner.config.forward_dtype

    def __repr__(self) -> str:
        form, config, grid = self.form, self.model.model.inner.config, self.task.grid(self.form)
        size = f"{grid[0]}x{grid[1]}" if grid else f"{form.seq_len}"
        names = f", {form.num_puzzle_identifiers:,} puzzle identifiers" if form.num_puzzle_identifiers > 1 else ""
        blocks = ", ".join(f"{name}: {len(stack.blocks)}" for name, stack in self.model.model.inner.stacks.items())
        updates = len(self.model.model.inner.plan.schedule)
        return (
            f"TrainedModel({self.checkpoint.weights_file}\n"
            f"  task: {self.task.name}, {size} cells, {form.vocab_size} tokens{names}\n"
            f"  architecture: {config.name}, width {config.hidden_size}, {config.num_heads} heads, blocks {blocks}\n"
            f"  parameters: {self.num_parameters:,}\n"
            f"  steps: at most {self.act_max_steps} ACT steps of {updates} updates, "
            f"{self.model.act_step_flops() / 1e6:,.1f} MFLOPs each\n"
            f"  computed on {self.device}, {self.dtype}, kernels {describe_model(self.model, self.checkpoint)}\n"
            ")"
        )

    # ---- saving and the hub; `save_pretrained` and `push_to_hub` are the mixin's

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        if self.model.kernels.int8 != "none":
            weights = to_int8(weights, self._matrices(weights))
        with replacing(save_directory / PRETRAINED_WEIGHTS) as temporary:
            save_file(weights, temporary, {"format": "pt"})
        self.form.save(save_directory)
        text = json.dumps(self._config(), indent=1, ensure_ascii=False)
        (save_directory / PRETRAINED_CONFIG).write_text(text + "\n", encoding="utf-8")

    def _matrices(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The names of what is stored in 8 bit: matrices of the blocks that are computed so, and the puzzle table."""
        inner = self.model.model.inner
        stacks = [stack for name, stack in inner.stacks.items() if name in inner.kernels.eight_bit]
        of_blocks = {id(weight) for stack in stacks for block in stack.weights() for weight in block}
        names = [name for name, weight in self.model.named_parameters() if id(weight) in of_blocks]
        return names + [name for name in (PUZZLE_TABLE,) if name in weights and len(weights[name]) > 1]

    def _config(self) -> dict[str, Any]:
        """What others need to build the model, without the paths of this machine."""
        config = self.checkpoint.config
        kept: dict[str, Any] = {"model_type": "hrm", "hrm_version": __version__, "arch": config["arch"]}
        data_path = config.get("data_path")
        if isinstance(data_path, str) and not (Path(data_path).is_absolute() or data_path.startswith("file:")):
            kept["data_path"] = data_path
        for name in ("global_batch_size", "pack_identity"):
            if name in config:
                kept[name] = config[name]
        return kept | {"task": self.form.to_json()}

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md that is saved beside the weights."""
        return model_card(self.task, self.form, self.model, self.checkpoint)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        return cls.load(model_id, **{name: kwargs[name] for name in _LOADING if name in kwargs})

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        kernels: str | Mapping[str, Any] | KernelsConfig = "auto",
        quantize: str = "none",
        data_path: str | None = None,
    ) -> Self:
        """See `from_pretrained`."""
        choice("dtype", dtype, DTYPES)
        place = device if isinstance(device, torch.device) else _device(device)
        checkpoint = find_checkpoint(str(name))
        weights = read_weights(checkpoint.weights_file)
        form = form_of_checkpoint(checkpoint, weights, data_path)
        sizes = ModelSizes(
            1 if place.type == "cpu" else _LIKELY_BATCH, form.seq_len, form.vocab_size, form.num_puzzle_identifiers
        )
        world = World(0, 1, place)
        model = load_model(checkpoint, weights, sizes, kernels_config(kernels), world, dtype=dtype, quantize=quantize)
        return cls(model, form, checkpoint, place)


_LOADING = ("device", "dtype", "kernels", "quantize", "data_path")


def _device(name: str) -> torch.device:
    base, _, number = name.partition(":")
    chosen = pick_device(base, int(number) if number.isdigit() else 0)
    return chosen


def from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    kernels: str | Mapping[str, Any] | KernelsConfig = "auto",
    quantize: str = "none",
    data_path: str | None = None,
) -> TrainedModel:
    """A trained model, ready to answer puzzles.

    Args:
        name: a model that comes with the package (`sudoku`, `maze`), a run folder, a weights file, a folder that
            `save_pretrained` wrote, the URL of one of these, or a hub id such as owner/name.
        device: cuda, cuda:1, mps or cpu; auto: the first of these that is available.
        dtype: to compute in, such as float32; auto: as in training, but float32 where a CPU has no instructions for
            bfloat16.
        kernels: a preset of `kernels=`, or its fields.
        quantize: int8 or fp8: matmuls in 8 bit, which changes answers (`hrm quantize` says how many). fp8 needs an
            NVIDIA GPU, from Ada and Hopper on. A model that is loaded in int8 is saved in int8.
        data_path: the pack that the model was trained on, or its URL, for checkpoints that do not say what their tokens
            mean.

    Raises:
        UserError: there is no such model, or it is broken, or an option is of no use.
    """
    return TrainedModel.load(name, device=device, dtype=dtype, kernels=kernels, quantize=quantize, data_path=data_path)
