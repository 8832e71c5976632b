"""The training run: two optimizers, one ACT step per batch, evaluation and a checkpoint at every interval."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from hrm.checkpoint.finding import AUTO, check_options, find_state
from hrm.checkpoint.run_folder import keep_earlier_run, make_folder, save_config
from hrm.checkpoint.save_points import Request, SavePoints, uninterrupted
from hrm.checkpoint.saving import StateSaver, on_host
from hrm.checkpoint.states import SavedState, StateMetadata, environment_info
from hrm.checkpoint.weights import save_weights
from hrm.config import PretrainConfig
from hrm.data.builders.missing import ensure_pack
from hrm.data.loader import EvalLoader, TrainLoader
from hrm.data.pack import Pack, open_pack
from hrm.data.prefetch import on_device
from hrm.distributed.world import World, join_world, share_from_main
from hrm.errors import UserError
from hrm.evaluation.runner import evaluate, save_outputs
from hrm.kernels import describe
from hrm.models import ACTLossHead
from hrm.models.flops import block_flops, train_step_blocks
from hrm.training.metrics import MetricWindow
from hrm.training.profiling import step_trace
from hrm.training.resume import Progress, own_tensors, restore, shared_tensors
from hrm.training.run_log import RunLog, cut_records
from hrm.training.step import TrainState, current_lr, initial_state, make_train_step

EXIT_PREEMPTED = 75
"""Exit status of a run that a signal stopped and that can go on: "temporary failure, try again" in sysexits.h."""


def pretrain(config: PretrainConfig) -> None:
    """Train as `config` says, on all the processes that torchrun started (or on this one alone).

    Leaves in the run folder: `all_config.yaml`, `metrics.jsonl`, the weights `step_<n>` (also as `.safetensors`; with
    `ema_decay` their average as `step_<n>_ema`), and the training states `state_<n>` that `resume` goes on from.

    Raises:
        UserError: for data, options or hardware that cannot work together.
        SystemExit: with `EXIT_PREEMPTED`, after SIGTERM or SIGUSR1, when all is saved that going on takes.
    """
    with join_world(config.device, config.parallel, config.dist_timeout) as world:
        config, folder = share_from_main(_with_names(config), world)
        saved = share_from_main(_find_saved(config, folder) if world.is_main else None, world)
        if world.is_main:
            ensure_pack(config.data, config.data_path)
        share_from_main(None, world)  # the others wait for the pack
        train_pack, test_pack = open_pack(config.data_path, "train"), open_pack(config.data_path, "test")
        _check_one_task(train_pack, test_pack)
        changed = [] if saved is None else check_options(saved, config, train_pack)
        train_loader = TrainLoader(
            train_pack,
            config.global_batch_size,
            config.seed,
            world.rank,
            world.size,
            epochs_per_pass=config.eval_interval or config.epochs,
            num_workers=config.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        eval_loader = EvalLoader(
            test_pack,
            config.global_batch_size,
            world.rank,
            world.size,
            num_workers=config.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        state, progress = initial_state(config, train_pack, world), Progress()
        window = MetricWindow(world, config.global_batch_size)
        if saved is not None:
            progress = Progress(**saved.metadata.progress)
            if begun := restore(saved, state, world, config, train_pack):
                window.reopen(begun)
        if world.is_main:
            _take_over(folder, saved)
            save_config(config, folder)
        is_same_run = saved is not None and saved.is_of(folder)
        wandb_id = saved.metadata.wandb_id if saved and is_same_run else None
        with (
            RunLog(config, folder, state.total_steps, world, state.step, wandb_id) as log,
            StateSaver(folder, config.keep_checkpoints, world, config.dist_timeout) as saver,
            SavePoints(config.checkpoint_interval, world, config.dist_timeout) as save_points,
            step_trace(config.profile, world, log.say) as trace_step,
        ):
            log.say(_summary(config, state, world, folder))
            made_by = environment_info(describe(state.model.kernels), world)
            for line in _origin(config, saved, changed, made_by):
                log.say(line)
            if is_same_run:
                saver.saved_step = state.step
            run = _Run(config, world, folder, train_pack, made_by, state, progress, window, log, saver)
            try:
                is_complete = run.train(train_loader, eval_loader, save_points, trace_step)
            except BaseException as error:  # Ctrl-C, a full disk, a closed terminal: what was learned stays
                with uninterrupted():
                    run.save_on_error(type(error).__name__)
                raise
            saver.wait()
            if not is_complete:
                log.say(f"Stopped by a signal after step {state.step}; resume=auto goes on from there.")
    if not is_complete:
        raise SystemExit(EXIT_PREEMPTED)


@dataclass
class _Run:
    """A run under way."""

    config: PretrainConfig
    world: World
    folder: Path
    train_pack: Pack
    made_by: dict[str, str]
    state: TrainState
    progress: Progress
    window: MetricWindow
    log: RunLog
    saver: StateSaver

    def train(
        self,
        train_loader: TrainLoader,
        eval_loader: EvalLoader,
        save_points: SavePoints,
        trace_step: Callable[[], None],
    ) -> bool:
        """Train to the end (True), or to where a signal asks to stop (False)."""
        config, state, progress = self.config, self.state, self.progress
        step = make_train_step(config, self.world, state)
        passes = config.epochs // (config.eval_interval or config.epochs)
        while progress.pass_index < passes:
            batches = self.window.timed(train_loader.iterate(progress.pass_index, progress.batches))
            for batch in on_device(batches, self.world.device):
                if state.step == state.total_steps:
                    break
                self.window.add(step(batch), _sequence_flops(config, self.train_pack, state.step))
                progress.batches += 1
                self.log.advance()
                trace_step()
                if state.step == 1 or state.step % config.log_interval == 0:
                    self._close_window()
                self._record(wait=False)
                request = save_points.after_step()
                if request:
                    self._save()
                if request is Request.SAVE_AND_STOP:
                    return False
            self._close_window()
            self._save()  # before the evaluation, which takes long with some packs and changes nothing
            if self._evaluate(eval_loader, is_last=progress.pass_index == passes - 1):
                break
            progress.pass_index += 1
            progress.batches = 0
            self.window.restart_clock()
        return True

    def _close_window(self) -> None:
        # Ranks must agree on what they have read. What closed a window ago is there, or the device has a window to do.
        self._record(wait=self.world.processes > 1)
        self._give_up_if_diverged()
        self.window.close(self.state.step, current_lr(self.config, self.state, self.config.lr))

    def _record(self, *, wait: bool) -> None:
        for record in self.window.finished(wait=wait):
            self.log.record(record)
            self.progress.train_accuracy = record.get("train/exact_accuracy", self.progress.train_accuracy)

    def _give_up_if_diverged(self) -> None:
        """To be called when all ranks have read the same windows, so that all end here or none."""
        if not self.window.gave_up:
            return
        good = f"state_{self.saver.saved_step}"
        if self.saver.saved_step is None:
            good = f"step_{self.state.step}"
            self._save_weights()
        self.saver.wait()
        raise UserError(
            f"loss or gradients were not finite in {self.config.abort_after} steps in a row (abort_after), which were "
            f"skipped; the last good weights are in {self.folder / good}: lower lr, or set grad_clip."
        )

    def _save(self) -> None:
        """Save the training state, unless that of this step is there already."""
        self._record(wait=True)
        self._give_up_if_diverged()
        if self.saver.saved_step == self.state.step:
            return
        begun = self.window.open_sums()
        metadata = StateMetadata(
            step=self.state.step,
            num_ranks=self.world.size,
            progress=asdict(self.progress),
            window_names=begun.names if begun else [],
            window_steps=begun.num_steps if begun else 0,
            metrics_size=self.log.size(),
            wandb_id=self.log.wandb_id,
            config=asdict(self.config),
            pack=asdict(self.train_pack.metadata),
            made_by=self.made_by,
        )
        self.saver.save(metadata, shared_tensors(self.state), own_tensors(self.state, self.window, self.world))

    def _evaluate(self, loader: EvalLoader, *, is_last: bool) -> bool:
        """Evaluate and keep the weights; returns whether to end."""
        config, state = self.config, self.state
        started = time.perf_counter()
        metrics, outputs = evaluate(state.model, loader, self.world, config.eval_save_outputs)
        judged = metrics
        if state.average is not None:
            judged, _ = evaluate(state.average.model, loader, self.world)
            metrics |= {f"ema/{set_name}": values for set_name, values in judged.items()}
        seconds = time.perf_counter() - started
        for set_name, values in metrics.items():
            self.log.record({"step": state.step} | {f"{set_name}/{name}": value for name, value in values.items()})
            self.log.say(
                f"step {state.step}, test set {set_name}: {100 * values['exact_accuracy']:.2f} % of "
                f"{values['count']:.0f} puzzles exactly right, {100 * values['accuracy']:.2f} % of cells "
                f"({seconds:.0f} s)"
            )
        if outputs:
            save_outputs(outputs, self.folder, state.step, self.world)
        self._note(judged)
        reason = self._reason_to_end()
        if config.checkpoint_every_eval or is_last or reason:
            self._save_weights()
        if reason and not is_last:
            self.log.say(f"Ended early: {reason}.")
        return reason is not None

    def _note(self, metrics: dict[str, dict[str, float]]) -> None:
        """Take an evaluation into account."""
        progress = self.progress
        count = sum(values["count"] for values in metrics.values())
        accuracy = sum(values["exact_accuracy"] * values["count"] for values in metrics.values()) / max(count, 1)
        progress.evaluations_since_best += 1
        if progress.best_accuracy is None or accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_step = accuracy, self.state.step
            progress.evaluations_since_best = 0

    def _reason_to_end(self) -> str | None:
        config, progress = self.config, self.progress
        if config.stop_after is not None and progress.evaluations_since_best >= config.stop_after:
            return f"no exact accuracy since step {progress.best_step} was better (stop_after={config.stop_after})"
        wanted, reached = config.stop_at_train_accuracy, progress.train_accuracy
        if wanted is not None and reached is not None and reached >= wanted:
            return f"training's exact accuracy is {reached:.4g} (stop_at_train_accuracy={wanted})"
        return None

    def save_on_error(self, reason: str) -> None:
        """Keep the weights of a run that ends before its time, where this process has all of them."""
        is_whole = self.world.processes == self.world.size and not self.config.parallel.fsdp  # or others may be missing
        if not (self.world.is_main and self.state.step and is_whole):
            return
        with suppress(Exception):
            self.saver.wait()
        files = [save_weights(on_host(model.state_dict()), self.folder, name) for name, model in self._models().items()]
        self.log.say(f"Stopped by {reason}; the weights so far are in {' and '.join(map(str, files))}.")

    def _models(self) -> dict[str, ACTLossHead]:
        """What is saved as weights, by the names of the files."""
        models = {f"step_{self.state.step}": self.state.model}
        if self.state.average is not None:
            models[f"step_{self.state.step}_ema"] = self.state.average.model
        return models

    def _save_weights(self) -> None:
        for name, model in self._models().items():
            weights = self.state.shared.gather(model.state_dict())
            if self.world.is_main:
                self.saver.run(name, partial(save_weights, on_host(weights), self.folder, name))


def _find_saved(config: PretrainConfig, folder: Path) -> SavedState | None:
    return None if config.resume is None else find_state(config.resume, folder)


def _take_over(folder: Path, saved: SavedState | None) -> None:
    """Make a run folder ready, moving aside what does not belong to the run that starts or goes on."""
    make_folder(folder, "checkpoint_path")
    if saved is None:
        keep_earlier_run(folder)
        return
    keep_earlier_run(folder, saved.metadata.step if saved.is_of(folder) else None)
    cut_records(saved.folder.parent, saved.metadata.metrics_size, folder)


def _origin(config: PretrainConfig, saved: SavedState | None, changed: list[str], made_by: dict[str, str]) -> list[str]:
    """What to say of where a run starts from."""
    if saved is None:
        return [] if config.resume is None else ["Nothing to resume yet: a new run."]
    lines = [f"Not usable: {sentence}" for sentence in saved.unusable]
    lines.append(f"Going on from {saved.folder}" + (f", with {' and '.join(changed)}." if changed else "."))
    had = saved.metadata.made_by
    if differ := [f"{name} {had.get(name)}, now {now}" for name, now in made_by.items() if had.get(name) != now]:
        lines.append(f"Expect other bits than from a run never stopped: it was saved by {'; '.join(differ)}.")
    return lines


def _with_names(config: PretrainConfig) -> tuple[PretrainConfig, Path]:
    """The config with its open names filled in as the published code does, and the run folder."""
    project = config.project_name or f"{Path(config.data_path).name.capitalize()} ACT-torch"
    run = config.run_name or f"{config.arch.name.split('@')[-1]} {time.strftime('%Y-%m-%d %H-%M-%S')}"
    folder = Path(config.checkpoint_path or Path("checkpoints") / project / run)
    if config.resume is not None and config.checkpoint_path is None and config.run_name is None:
        if config.resume == AUTO:
            raise UserError("resume=auto looks in the run folder: name it, by checkpoint_path= or run_name=.")
        path = Path(config.resume)
        folder = path.parent if path.name.startswith("state_") else path
    return replace(config, project_name=project, run_name=run, checkpoint_path=str(folder)), folder


def _check_one_task(train: Pack, test: Pack) -> None:
    for name in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        ours, theirs = getattr(train.metadata, name), getattr(test.metadata, name)
        if ours != theirs:
            raise UserError(
                f"{train.path} has {name} {ours} in train but {theirs} in test: build both splits together."
            )


def _sequence_flops(config: PretrainConfig, pack: Pack, step: int) -> float:
    tokens = config.arch.prefix_len + pack.metadata.seq_len
    return float(tokens * train_step_blocks(config.arch, config.updates_at(step)) * block_flops(config.arch, tokens))


def _summary(config: PretrainConfig, state: TrainState, world: World, folder: Path) -> str:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    whole = state.shared.gather(dict(state.model.named_parameters()))
    parameters = sum(param.numel() for param in whole.values())
    return (
        f"Training {parameters:,} parameters for {state.total_steps:,} steps of {config.global_batch_size} puzzles "
        f"on {world.processes} x {device}, kernels: {describe(state.model.kernels)}.\n"
        f"Run folder: {folder}"
    )
