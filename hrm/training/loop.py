"""The training run: two optimizers, one ACT step per batch, evaluation and a checkpoint at every interval."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hrm.checkpoint import keep_earlier_run, save_config, save_weights
from hrm.config import PretrainConfig
from hrm.data.build import ensure_pack
from hrm.data.loader import EvalLoader, TrainLoader
from hrm.data.pack import Pack, open_pack
from hrm.distributed import World, join_world, share_from_main
from hrm.errors import UserError
from hrm.evaluation.runner import evaluate, save_outputs
from hrm.training.metrics import MetricWindow, RunLog
from hrm.training.step import TrainState, current_lr, initial_state, make_train_step


def pretrain(config: PretrainConfig) -> None:
    """Train as `config` says, on all the processes that torchrun started (or on this one alone).

    Leaves in the run folder: `all_config.yaml`, `metrics.jsonl` and the weights `step_<n>`.

    Raises:
        UserError: for data, options or hardware that cannot work together.
    """
    with join_world(config.device) as world:
        config, folder = share_from_main(_with_names(config), world)
        if world.is_main:
            ensure_pack(config.data, config.data_path)
        share_from_main(None, world)  # the others wait for the pack
        train_pack, test_pack = open_pack(config.data_path, "train"), open_pack(config.data_path, "test")
        _check_one_task(train_pack, test_pack)
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
        state = initial_state(config, train_pack, world)
        if world.is_main:
            keep_earlier_run(folder)
            save_config(config, folder)
        with RunLog(config, folder, state.total_steps, world) as log:
            log.say(_summary(config, state, world, folder))
            try:
                _run(config, world, folder, state, train_loader, eval_loader, log)
            except BaseException as error:  # Ctrl-C, a full disk, a closed terminal: what was learned stays
                if world.is_main and state.step:
                    file = save_weights(state.model, folder, state.step)
                    log.say(f"Stopped by {type(error).__name__}; the weights so far are in {file}.")
                raise


def _run(
    config: PretrainConfig,
    world: World,
    folder: Path,
    state: TrainState,
    train_loader: TrainLoader,
    eval_loader: EvalLoader,
    log: RunLog,
) -> None:
    window = MetricWindow(world, config.global_batch_size)
    step = make_train_step(config, world, state)
    passes = config.epochs // (config.eval_interval or config.epochs)
    for pass_index in range(passes):
        for batch in train_loader.iterate(pass_index):
            if state.step == state.total_steps:
                break
            window.add(step(batch))
            log.advance()
            if state.step == 1 or state.step % config.log_interval == 0:
                window.close(state.step, current_lr(config, state, config.lr))
            for record in window.finished():
                log.record(record)
        window.close(state.step, current_lr(config, state, config.lr))
        for record in window.finished(wait=True):
            log.record(record)

        started = time.perf_counter()
        metrics, outputs = evaluate(state.model, eval_loader, world, config.eval_save_outputs)
        seconds = time.perf_counter() - started
        for set_name, values in metrics.items():
            log.record({"step": state.step} | {f"{set_name}/{name}": value for name, value in values.items()})
            log.say(
                f"step {state.step}, test set {set_name}: {100 * values['exact_accuracy']:.2f} % of "
                f"{values['count']:.0f} puzzles exactly right, {100 * values['accuracy']:.2f} % of cells "
                f"({seconds:.0f} s)"
            )
        if outputs:
            save_outputs(outputs, folder, state.step, world)
        if world.is_main and (config.checkpoint_every_eval or pass_index == passes - 1):
            save_weights(state.model, folder, state.step)
        window.restart_clock()


def _with_names(config: PretrainConfig) -> tuple[PretrainConfig, Path]:
    """The config with its open names filled in as the published code does, and the run folder."""
    project = config.project_name or f"{Path(config.data_path).name.capitalize()} ACT-torch"
    run = config.run_name or f"{config.arch.name.split('@')[-1]} {time.strftime('%Y-%m-%d %H-%M-%S')}"
    folder = Path(config.checkpoint_path or Path("checkpoints") / project / run)
    return replace(config, project_name=project, run_name=run, checkpoint_path=str(folder)), folder


def _check_one_task(train: Pack, test: Pack) -> None:
    for name in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        ours, theirs = getattr(train.metadata, name), getattr(test.metadata, name)
        if ours != theirs:
            raise UserError(
                f"{train.path} has {name} {ours} in train but {theirs} in test: build both splits together."
            )


def _summary(config: PretrainConfig, state: TrainState, world: World, folder: Path) -> str:
    kernels = state.model.kernels
    switches = [name for name, on in asdict(kernels).items() if on is True]
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    parameters = sum(param.numel() for param in state.model.parameters())
    return (
        f"Training {parameters:,} parameters for {state.total_steps:,} steps of {config.global_batch_size} puzzles "
        f"on {world.size} x {device}, kernels: {' + '.join([kernels.backend, *switches])}.\n"
        f"Run folder: {folder}"
    )
