"""A run under way: its steps, evaluations and saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from hrm.checkpoint.lock import RunLock
from hrm.checkpoint.run_folder import STOPPED_FILE, note_stop
from hrm.checkpoint.save_points import Interrupted, Request, SavePoints, undisturbed
from hrm.checkpoint.saving import StateSaver, on_host
from hrm.checkpoint.states import StateMetadata
from hrm.checkpoint.weights import save_weights
from hrm.config import PretrainConfig
from hrm.data.identity import PackIdentity
from hrm.data.loader import EvalLoader, TrainLoader
from hrm.data.pack import Pack
from hrm.data.prefetch import on_device
from hrm.distributed.world import World, is_of_an_exchange, share_from_main
from hrm.errors import UserError, first_sentence
from hrm.evaluation.metrics import nothing_scored
from hrm.evaluation.runner import evaluate, save_outputs
from hrm.models import ACTLossHead
from hrm.optim.nonfinite import find_nonfinite
from hrm.training.metrics import MetricWindow
from hrm.training.resume import Progress, own_tensors, shared_tensors
from hrm.training.run_log import RunLog
from hrm.training.step import TrainState, current_lr, make_train_step

Metrics = dict[str, dict[str, float]]  # by set


@dataclass
class Run:
    """A run under way."""

    config: PretrainConfig
    world: World
    folder: Path
    lock: RunLock | None  # the main process has it
    train_pack: Pack
    identity: PackIdentity
    environment: dict[str, str]
    state: TrainState
    progress: Progress
    window: MetricWindow
    log: RunLog
    saver: StateSaver
    is_between_steps: bool = True  # and no evaluation is half noted: the state is one to go on from
    is_save_due: bool = False  # as none could be made when it was asked for
    last_metrics: Metrics = field(default_factory=dict)  # of the last evaluation

    def train(
        self,
        train_loader: TrainLoader,
        eval_loader: EvalLoader,
        save_points: SavePoints,
        trace_step: Callable[[], None],
    ) -> Request:
        """Train to the end (`NOTHING`), or to where a request stops the run."""
        config, state, progress = self.config, self.state, self.progress
        step = make_train_step(config, self.world, state)
        passes = config.epochs // (config.eval_interval or config.epochs)
        while progress.pass_index < passes:
            batches = self.window.timed(train_loader.iterate(progress.pass_index, progress.batches))
            for batch in on_device(batches, self.world.device):
                if state.step == state.total_steps:
                    break
                self.is_between_steps = False
                self.window.add(step(batch), state.model.train_step_flops())
                progress.batches += 1
                self.is_between_steps = True
                self.log.advance()
                trace_step()
                if state.step == 1 or state.step % config.log_interval == 0:
                    self._close_window()
                self._record(wait=False)
                request = save_points.after_step()
                if request:
                    self._save()
                if request.stops:
                    return request
            self._close_window()
            self._save()  # before the evaluation, which takes long with some packs and changes nothing
            is_last = progress.pass_index == passes - 1
            if progress.pass_index >= config.min_eval_interval or is_last:
                try:
                    with save_points.may_be_left_undone():
                        evaluated = self._evaluated(eval_loader)
                except Interrupted:
                    return save_points.signalled
                self.is_between_steps = False
                if self._use_evaluation(*evaluated, is_last=is_last):
                    break
            self.is_between_steps = False
            progress.pass_index += 1
            progress.batches = 0
            self.is_between_steps = True
            self.window.restart_clock()
        return Request.NOTHING

    def finish(self, request: Request) -> None:
        """Save what a run leaves behind at its end, or where a request stopped it.

        Raises:
            UserError: it could not be written.
        """
        if request.stops:
            self._save_weights()
        self.saver.wait()
        names = [f"state_{self.state.step}", *self._models()] if request.stops else list(self._models())
        failed = {name: self.saver.failed[name] for name in names if name in self.saver.failed}
        failed = share_from_main(failed, self.world)
        if self.saver.saved_step is None:
            way_on = "no training state was saved"
        else:
            way_on = f"resume=auto goes on from {self.folder / f'state_{self.saver.saved_step}'}"
        if failed:
            name, reason = next(iter(failed.items()))
            raise UserError(
                f"{self.folder / name} could not be written ({reason}), which was to be saved at the end; {way_on}."
            )
        if request.stops:
            if self.world.is_main and self.saver.saved_step == self.state.step:
                self.saver.run(STOPPED_FILE, partial(note_stop, self.folder, self.state.step, request.reason))
                self.saver.wait()
            self.log.say(f"Stopped by {request.reason} after step {self.state.step}; {way_on}.")
        elif not self._has_finite_weights():
            raise UserError(
                f"the weights are not finite after step {self.state.step}, the last, and were not saved; {way_on}: "
                "lower lr, or set grad_clip."
            )

    def _close_window(self) -> None:
        # Ranks must agree on what they have read. What closed a window ago is there, or the device has a window to do.
        self._record(wait=self.world.processes > 1)
        self._give_up_if_diverged()
        self._end_if_lock_is_lost()
        self.window.close(self.state.step, current_lr(self.config, self.state, self.config.lr))
        if self.is_save_due and not self.window.last_skipped:
            self._save()

    def _record(self, *, wait: bool) -> None:
        for record in self.window.finished(wait=wait):
            self.log.record(record)
            self.progress.train_accuracy = record.get("train/exact_accuracy", self.progress.train_accuracy)

    def _give_up_if_diverged(self) -> None:
        """To be called when all ranks have read the same windows, so that all end here or none."""
        if not self.window.gave_up:
            return
        self.saver.wait()
        if self.saver.saved_step is not None:  # none is saved while steps are skipped
            good = f"the last good weights are in {self.folder / f'state_{self.saver.saved_step}'}"
        elif self._has_finite_weights():  # skipped steps change none
            self._save_weights()
            self.saver.wait()
            good = f"no training state was saved before; the last good weights are in {self.folder / self._name()}"
        else:
            good = "nothing was saved before, and the weights are not finite"
        raise UserError(
            f"loss or gradients were not finite in {self.config.abort_after} steps in a row (abort_after), which were "
            f"skipped; {good}: lower lr, or set grad_clip."
        )

    def _end_if_lock_is_lost(self) -> None:
        if self.lock is not None and self.lock.lost:
            raise UserError(
                f"another process has taken over the run folder {self.folder}, as this one gave no sign of life "
                "for too long; it ends without writing there."
            )

    def _save(self) -> None:
        """Save the training state, unless that of this step is there already, or it is not good."""
        self._record(wait=True)
        self._give_up_if_diverged()
        self._end_if_lock_is_lost()
        self.saver.wait()
        if self.saver.saved_step == self.state.step:
            return
        if reason := self._why_not_good():
            if not self.is_save_due:
                self.log.say(f"No training state is saved after step {self.state.step}: {reason}.")
            self.is_save_due = True
            return
        self.is_save_due = False
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
            pack_identity=asdict(self.identity),
            made_by=self.environment,
        )
        self.saver.save(metadata, shared_tensors(self.state), own_tensors(self.state, self.window, self.world))

    def _why_not_good(self) -> str | None:
        """Why the state is not one to go on from, the same on all ranks; waits for the device, as saving does."""
        guard = self.state.guard
        if guard is not None and guard.in_a_row > 0:
            return "its loss or gradients were not finite"
        if not self._has_finite_weights():
            return "its weights are not finite"
        return None

    def _has_finite_weights(self) -> bool:
        """Whether there is no NaN and no infinity in the weights and their average; every process must call this."""
        return not self.state.shared.find_nonfinite(self._own_weights())

    def _own_weights(self) -> list[Tensor]:
        """The weights, and their average, as far as this process has them."""
        tensors = [tensor for model in self._models().values() for tensor in model.state_dict().values()]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    def _evaluated(self, loader: EvalLoader) -> tuple[Metrics, Metrics, dict[str, Tensor], float]:
        """Metrics to record, those that say which evaluation is the best, outputs to keep, and the seconds it took."""
        config, state = self.config, self.state
        started = time.perf_counter()
        metrics, outputs = evaluate(state.model, loader, self.world, config.eval_save_outputs)
        judged = metrics
        if state.average is not None:
            judged, _ = evaluate(state.average.model, loader, self.world)
            metrics |= {f"ema/{set_name}": values for set_name, values in judged.items()}
        return metrics, judged, outputs, time.perf_counter() - started

    def _use_evaluation(
        self, metrics: Metrics, judged: Metrics, outputs: dict[str, Tensor], seconds: float, *, is_last: bool
    ) -> bool:
        """Record an evaluation and keep the weights; returns whether to end."""
        config, state = self.config, self.state
        self.last_metrics = metrics
        for set_name, values in metrics.items():
            self.log.record({"step": state.step} | {f"{set_name}/{name}": value for name, value in values.items()})
            if not values["count"]:
                self.log.say(f"step {state.step}: {nothing_scored(set_name)}")
                continue
            self.log.say(
                f"step {state.step}, test set {set_name}: {100 * values['exact_accuracy']:.2f} % of "
                f"{values['count']:.0f} puzzles exactly right, {100 * values['accuracy']:.2f} % of cells "
                f"({seconds:.0f} s)"
            )
        if outputs:
            self._save_outputs(outputs)
        self._note(judged)
        reason = self._reason_to_end()
        if config.checkpoint_every_eval or is_last or reason:
            self._save_weights()
        if reason and not is_last:
            self.log.say(f"Ended early: {reason}.")
        return reason is not None

    def _save_outputs(self, outputs: dict[str, Tensor]) -> None:
        try:
            save_outputs(outputs, self.folder, self.state.step, self.world)
        except (OSError, RuntimeError) as error:
            if is_of_an_exchange(error):
                raise
            self.log.say(f"Outputs of step {self.state.step} could not be written ({first_sentence(error)}).")

    def _note(self, metrics: dict[str, dict[str, float]]) -> None:
        """Take an evaluation into account."""
        progress = self.progress
        count = sum(values["count"] for values in metrics.values())
        if not count:  # no label, so no evaluation is better than another
            return
        accuracy = sum(values.get("exact_accuracy", 0) * values["count"] for values in metrics.values()) / count
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

    def save_on_error(self, error: BaseException) -> None:
        """Keep what a run has that ends before its time, where this process has all of it: the training state if the
        error came between two steps, and the weights."""
        # Of several processes, others may be missing.
        is_whole = self.world.processes == self.world.size and not self.config.parallel.fsdp
        if not (self.world.is_main and self.state.step and is_whole) or (self.lock and self.lock.lost):
            return
        if isinstance(error, KeyboardInterrupt):
            reason = "Ctrl-C"
        else:  # a UserError says what it is when it is told
            reason = "an error" if isinstance(error, UserError) else type(error).__name__
        for attempt in range(2):  # a signal's handler may raise before it is taken away
            try:
                with undisturbed():
                    kept = self._keep_what_there_is(reason)
                break
            except Exception as second:
                kept = f"saving what there is failed too ({first_sentence(second)})" if attempt else ""
        self.log.say(f"Stopped by {reason}; {kept}.")

    def _keep_what_there_is(self, reason: str) -> str:
        """What was saved, in words."""
        with suppress(Exception):
            self.saver.wait()
        if find_nonfinite(self._own_weights()):
            return "the weights are not finite and were not saved"
        if self.world.processes == 1 and self.is_between_steps and not self.window.gave_up:
            self._save()
            self.saver.wait()
        files = [save_weights(on_host(model.state_dict()), self.folder, name) for name, model in self._models().items()]
        if self.saver.saved_step == self.state.step:
            note_stop(self.folder, self.state.step, reason)
        return f"the weights so far are in {' and '.join(map(str, files))}"

    def _name(self) -> str:
        return f"step_{self.state.step}"

    def _models(self) -> dict[str, ACTLossHead]:
        """What is saved as weights, by the names of the files."""
        models = {self._name(): self.state.model}
        if self.state.average is not None:
            models[f"{self._name()}_ema"] = self.state.average.model
        return models

    def _save_weights(self) -> None:
        if not self._has_finite_weights():
            self.log.say(f"The weights after step {self.state.step} are not finite, and are not saved.")
            return
        for name, model in self._models().items():
            weights = self.state.shared.gather(model.state_dict())
            if self.world.is_main:
                self.saver.run(name, partial(save_weights, on_host(weights), self.folder, name))
