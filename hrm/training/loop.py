"""The training run: two optimizers, one ACT step per batch, evaluation and a checkpoint at every interval."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hrm.checkpoint.finding import AUTO, check_options, find_state, local_state
from hrm.checkpoint.lock import RunLock
from hrm.checkpoint.run_folder import (
    cannot_write,
    keep_earlier_run,
    remove_leftovers,
    save_config,
    superseded_by_going_on,
)
from hrm.checkpoint.save_points import Request, SavePoints, leave_signals_alone
from hrm.checkpoint.saving import StateSaver
from hrm.checkpoint.states import SavedState, environment_info
from hrm.config import DataConfig, PretrainConfig
from hrm.data.builders.missing import ensure_pack
from hrm.data.identity import PackIdentity, pack_identity
from hrm.data.joined import first_identifiers, join_test, join_train, joined_identity
from hrm.data.loader import EvalLoader, TrainLoader, deaths_of_workers_told
from hrm.data.pack import Pack, open_pack, read_provenance
from hrm.data.published import local_pack
from hrm.distributed.world import World, join_world, share_from_main
from hrm.errors import EXIT_INTERRUPTED, UserError
from hrm.kernels import describe
from hrm.kernels.dtypes import AUTO as AUTO_DTYPE
from hrm.kernels.dtypes import computing_dtype, describe_dtype
from hrm.output import unbreakable_output
from hrm.remote.urls import is_url
from hrm.tasks import form_of, task_of
from hrm.tasks.form import PuzzleForm
from hrm.training.metrics import MetricWindow
from hrm.training.profiling import step_trace
from hrm.training.resume import Progress, restore
from hrm.training.run import Metrics, Run
from hrm.training.run_log import RunLog, cut_records
from hrm.training.step import TrainState, initial_state, symmetry_warnings
from hrm.training.warm_start import WarmStart, frozen_report
from hrm.unforeseen import traceback_folder

EXIT_PREEMPTED = 75
"""Exit status of a run that a signal stopped and that can go on: "temporary failure, try again" in sysexits.h."""


def pretrain(config: PretrainConfig) -> TrainResult:
    """Train as `config` says, on all the processes that torchrun started (or on this one alone).

    Leaves in the run folder: `all_config.yaml`, `metrics.jsonl`, the weights `step_<n>` (also as `.safetensors`; with
    `ema_decay` their average as `step_<n>_ema`), what tokens mean (`task.json`), and the training states `state_<n>`
    that `resume` goes on from.

    Raises:
        UserError: for data, options or hardware that cannot work together.
        SystemExit: after a signal to stop, when all is saved that going on takes: with `EXIT_INTERRUPTED` after Ctrl-C
            (SIGINT), with `EXIT_PREEMPTED` after SIGTERM, SIGHUP or SIGUSR1.
    """
    with unbreakable_output(), join_world(config.device, config.parallel, config.dist_timeout) as world:
        request, result = _pretrain(config, world)
    atexit.register(leave_signals_alone)
    if request.stops:
        raise SystemExit(EXIT_INTERRUPTED if request is Request.INTERRUPT else EXIT_PREEMPTED)
    return result


class TrainResult(NamedTuple):
    """What a run that came to its end leaves."""

    folder: Path
    step: int  # the last
    metrics: Metrics  # of the last evaluation, by set; with `ema_decay` those of the average as `ema/<set>`


def _pretrain(config: PretrainConfig, world: World) -> tuple[Request, TrainResult]:
    """Train to the end (`NOTHING`), or to where a request stops the run."""
    config, folder = share_from_main(_with_names(config), world)
    with RunLock(folder) if world.is_main else nullcontext() as lock:
        resume = None if config.resume is None else local_state(config.resume)  # all processes read it
        found = find_state(resume, folder) if world.is_main and resume is not None else None
        saved = share_from_main(found, world)
        if world.is_main:
            for path in {*config.train_paths, *config.test_paths}:
                ensure_pack(config.data, path)
        share_from_main(None, world)  # the others wait for the pack
        dtype = share_from_main(_dtype(config, saved, world.device), world)  # hosts may have unlike processors
        made_for = config.arch.forward_dtype
        config = replace(config, arch=replace(config.arch, forward_dtype=dtype))
        if Path(config.data.path) != Path(config.data_path):  # what `data` tells is of another pack
            config = replace(config, data=DataConfig(Path(config.data_path).name, config.data_path, build=""))
        # Looked up once, so that both splits are of one pack. Processes of a machine wait for the one that fetches.
        local = {path: local_pack(path) for path in (*config.train_paths, *config.test_paths)}
        packs = [open_pack(local[path], "train") for path in config.train_paths]
        tests = [open_pack(local[path], "test") for path in config.test_paths]
        _check_one_task([*packs, *tests])
        train_pack, test_pack = join_train(packs), join_test(tests, packs)
        identities = share_from_main(_identities(packs, tests) if world.is_main else None, world)
        assert identities is not None
        identity = joined_identity(identities)
        changed = [] if saved is None else check_options(saved, config, train_pack, identity)
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
            examples=config.eval_examples,
            seed=config.seed,
        )
        task = read_provenance(train_pack.path).get("task")  # as it says itself: guesses are none to insist on
        # What goes on has its weights already.
        warm_start = WarmStart.read(config, train_pack, identity, task) if saved is None else None
        state, progress = initial_state(config, train_pack, world, warm_start), Progress()
        window = MetricWindow(world, config.global_batch_size)
        if saved is not None:
            progress = Progress.from_saved(saved)
            if begun := restore(saved, state, world, config, train_pack):
                window.reopen(begun)
        if world.is_main:
            try:
                _take_over(folder, saved)
                about = _about_packs(config.train_paths, packs, identities) if len(packs) > 1 else {}
                save_config(config, folder, pack_identity=asdict(identity), task=task, **about)
                _form(packs, train_pack).save(folder)
            except OSError as error:
                raise cannot_write(folder, error) from error
        is_same_run = saved is not None and saved.is_of(folder)
        wandb_id = saved.metadata.wandb_id if saved and is_same_run else None
        with (
            traceback_folder(folder),
            SavePoints(config.checkpoint_interval, world, config.dist_timeout) as save_points,
            RunLog(config, folder, state.total_steps, world, state.step, wandb_id) as log,
            StateSaver(folder, config.keep_checkpoints, world, config.dist_timeout, log.say) as saver,
            step_trace(config.profile, world, log.say) as trace_step,
        ):
            log.say(_summary(config, made_for, state, world, folder))
            environment = environment_info(describe(state.model.kernels), world)
            for line in _origin(config, saved, changed, identity, environment):
                log.say(line)
            for line in [
                *symmetry_warnings(config, train_pack),
                *(warm_start.report(state.model, config.arch) if warm_start else ()),
                *frozen_report(state.model),
            ]:
                log.say(line)
            if is_same_run:
                saver.goes_on_from(state.step, superseded_by_going_on(folder, state.step))
            run = Run(
                config, world, folder, lock, train_pack, identity, environment, state, progress, window, log, saver
            )
            try:
                with deaths_of_workers_told():
                    request = run.train(train_loader, eval_loader, save_points, trace_step)
                    run.finish(request)
            except BaseException as error:  # whatever it is, what was learned stays
                run.save_on_error(error)
                raise
    if request.stops:
        save_points.hand_on()
    return request, TrainResult(folder, state.step, run.last_metrics)


def _dtype(config: PretrainConfig, saved: SavedState | None, device: torch.device) -> str:
    """What the run computes in; a run that goes on, in what it did where nobody asked for another."""
    made_for: str = config.arch.forward_dtype
    if saved is not None and config.dtype == AUTO_DTYPE:
        had = saved.metadata.config
        before = had["arch"].get("forward_dtype", made_for)
        if before == made_for or (
            had.get("dtype") == AUTO_DTYPE and {before, made_for} <= {"bfloat16", "float16", "float32"}
        ):
            return str(before)
    return computing_dtype(config.dtype, made_for, device)


def _take_over(folder: Path, saved: SavedState | None) -> None:
    """Make a run folder ready, moving aside what does not belong to the run that starts or goes on."""
    remove_leftovers(folder)
    if saved is None:
        keep_earlier_run(folder)
        return
    keep_earlier_run(folder, saved.metadata.step if saved.is_of(folder) else None)
    cut_records(saved.folder.parent, saved.metadata.metrics_size, folder)


def _origin(
    config: PretrainConfig,
    saved: SavedState | None,
    changed: Sequence[str],
    identity: PackIdentity,
    environment: Mapping[str, str],
) -> list[str]:
    """What to say of where a run starts from."""
    if saved is None:
        return [] if config.resume is None else ["Nothing to resume yet: a new run."]
    lines = [f"Not usable: {sentence}" for sentence in saved.unusable]
    lines.append(f"Going on from {saved.folder}" + (f", with {' and '.join(changed)}." if changed else "."))
    if not changed and saved.metadata.pack_identity.get("provenance", identity.provenance) != identity.provenance:
        lines.append(f"The pack {config.data_path} was built anew, and holds the same.")
    had = saved.metadata.made_by
    if differ := [f"{name} {had.get(name)}, now {now}" for name, now in environment.items() if had.get(name) != now]:
        lines.append(f"Expect other bits than from a run never stopped: it was saved by {'; '.join(differ)}.")
    return lines


def _with_names(config: PretrainConfig) -> tuple[PretrainConfig, Path]:
    """The config with its open names filled in as the published code does, and the run folder."""
    project = config.project_name or f"{Path(config.data_path).name.capitalize()} ACT-torch"
    run = config.run_name or f"{config.arch.name.split('@')[-1]} {time.strftime('%Y-%m-%d %H-%M-%S')}"
    folder = Path(config.checkpoint_path) if config.checkpoint_path else _default_folder(config, project, run)
    if config.resume is not None and config.checkpoint_path is None and config.run_name is None:
        if config.resume == AUTO:
            raise UserError("resume=auto looks in the run folder: name it, by checkpoint_path= or run_name=.")
        if is_url(config.resume):
            raise UserError(f"resume={config.resume} goes on in a folder here: name it, by checkpoint_path=.")
        path = Path(config.resume)
        folder = path.parent if path.name.startswith("state_") else path
    return replace(config, project_name=project, run_name=run, checkpoint_path=str(folder)), folder


def _default_folder(config: PretrainConfig, project: str, run: str) -> Path:
    """The run folder that nothing names. Names made here stand in it without the spaces that W&B shows."""
    checkpoints = Path("checkpoints")
    published = checkpoints / project / run
    if config.resume is not None and published.is_dir():  # of a run before
        return published
    names = (config.project_name or project.replace(" ", "-"), config.run_name or run.replace(" ", "-"))
    return checkpoints.joinpath(*names)


def _check_one_task(splits: Sequence[Pack]) -> None:
    for split in splits:
        task_of(split)  # refuses a pack that names a task of other sizes, now and not when it is evaluated
    for ours, theirs in combinations(splits, 2):
        for name in ("seq_len", "vocab_size", "num_puzzle_identifiers") if ours.path == theirs.path else ():
            one, other = getattr(ours.metadata, name), getattr(theirs.metadata, name)
            if one != other:
                raise UserError(
                    f"{ours.path} has {name} {one} in {ours.split} but {other} in {theirs.split}: build both splits "
                    "together."
                )


def _identities(train: Sequence[Pack], test: Sequence[Pack]) -> list[PackIdentity]:
    """Of the packs trained on, each with its test split if that is evaluated."""
    return [pack_identity(pack, *(split for split in test if split.path == pack.path)) for pack in train]


def _about_packs(paths: Sequence[str], packs: Sequence[Pack], identities: Sequence[PackIdentity]) -> dict[str, Any]:
    """What to write down of several packs: which rows of the puzzle table are whose."""
    rows = zip(paths, packs, first_identifiers(packs), identities, strict=True)
    return {
        "packs": [
            {
                "path": path if is_url(path) else str(pack.path),
                "first_identifier": first,
                "num_puzzle_identifiers": pack.metadata.num_puzzle_identifiers,
                "identifiers": identity.identifiers,
            }
            for path, pack, first, identity in rows
        ]
    }


def _form(packs: Sequence[Pack], joined: Pack) -> PuzzleForm:
    """How puzzles are written: as in the first of the packs. The names of several packs' identifiers may clash."""
    form = form_of(packs[0])
    if len(packs) == 1:
        return form
    return replace(form, num_puzzle_identifiers=joined.metadata.num_puzzle_identifiers, identifiers=())


def _summary(config: PretrainConfig, made_for: str, state: TrainState, world: World, folder: Path) -> str:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    whole = state.shared.gather(dict(state.model.named_parameters()))
    parameters = sum(param.numel() for param in whole.values())
    dtype: str = config.arch.forward_dtype
    kernels = describe(state.model.kernels)
    if dtype != made_for:
        kernels += f", {describe_dtype(dtype, made_for, world.device)}"
    return (
        f"Training {parameters:,} parameters for {state.total_steps:,} steps of {config.global_batch_size} puzzles "
        f"on {world.processes} x {device}, kernels: {kernels}.\n"
        f"Run folder: {folder}"
    )
