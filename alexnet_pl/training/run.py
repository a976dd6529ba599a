"""Run: one training from its config to result.json and report.html."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.config.compose import name_run_dir
from alexnet_pl.config.optimizers import discards_state
from alexnet_pl.config.resolve import drop_disabled, processes, resolve_auto, resolve_threads, unfuse_if_clipped
from alexnet_pl.config.trust import refused_targets
from alexnet_pl.config.validate import check_processes, refuse_unwritable, refuse_used_folder, validate
from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.data.shards.reader import is_url
from alexnet_pl.distributed.collectives import RankFailedError, lost_peer
from alexnet_pl.distributed.environment import get_world, is_launched
from alexnet_pl.distributed.launcher import end_with_parent, launch
from alexnet_pl.figures.html_report import REPORT, open_command, write_report
from alexnet_pl.runtime.commands import current_command, hydra_override, train_command
from alexnet_pl.runtime.cpu_load import torch_threads
from alexnet_pl.runtime.errors import ConfigError, DataError, UserError, one_line, printable
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.run_folder import (
    CONFIG,
    CORRUPTIONS,
    RESULT,
    finished_result,
    record_command,
    results_table,
    run_lock,
    write_result,
)
from alexnet_pl.runtime.signals import GracefulShutdown, RunInterrupted, raise_if_interrupted
from alexnet_pl.runtime.system import NUMERICS, device_name, git_commit, package_versions
from alexnet_pl.training.build import (
    RunObjects,
    Trainer,
    build,
    build_loggers,
    build_trainer,
    compile_network,
    fit_to_images,
    images_used,
    num_batches,
    quiet_lightning,
    run_length,
)
from alexnet_pl.training.checkpoint_io import CheckpointError, latest_valid, remove_resume_checkpoints
from alexnet_pl.training.final_metrics import final_metrics
from alexnet_pl.training.lightning_internals import guard_restoring, set_position, use_average
from alexnet_pl.training.loggers import MetricsCSV
from alexnet_pl.training.resume import (
    Changes,
    Position,
    SavedLengths,
    apply_changes,
    apply_path_changes,
    changes_since,
    check_images,
    check_inputs,
    check_length,
    check_not_passed,
    check_ranks,
    diff_configs,
    named_on_the_command_line,
    relocated,
    restarts_schedule,
    saved_config,
    saved_images,
    saved_lengths,
    schedule_start,
    without_places,
)
from alexnet_pl.training.saved_state import check_saved_state
from alexnet_pl.training.trackers import Tracker, attempt, trackers, tracking
from alexnet_pl.training.weights import check_fit, warm_start

log = logging.getLogger(__name__)


class OutOfMemoryError(UserError):
    """The memory of the device or the machine cannot hold a batch."""

    exit_code = 1


class RunDirectoryLostError(UserError):
    """The run directory was removed while the run was writing to it."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    """The run to do, as resolved from the command line and, when resuming, from the run directory.

    Attributes:
        cfg: resolved config.
        run_dir: run directory.
        named: settings given on the command line.
        resuming: the directory holds the run already.
        changed: settings that differ from those the run had so far.
        result: contents of result.json if the run has finished and nothing changes.
        commit: git commit at the start; the checkout may change during the run.
        command: what started the run, for commands.txt; None for this process's own command line.
    """

    cfg: DictConfig
    run_dir: Path
    named: Sequence[str]
    resuming: bool
    changed: Changes
    result: dict[str, Any] | None
    commit: str | None
    command: str | None = None


@dataclass(frozen=True)
class Start:
    """The state that training starts from.

    Attributes:
        description: for the log.
        checkpoint: file to resume from, or None.
        position: where training continues.
        ranks: number of ranks whose state was saved inside an epoch, or None.
        images: ``digest`` of the data that the checkpoint was saved with, or None.
        lengths: lengths that the checkpoint records, or None.
        schedule_start: epochs done when the schedule began.
        changed: settings of the optimizer and the schedule that the checkpoint was not saved with.
    """

    description: str = "from scratch"
    checkpoint: Path | None = None
    position: Position = Position()
    ranks: int | None = None
    images: str | None = None
    lengths: SavedLengths | None = None
    schedule_start: float = 0.0
    changed: Changes = field(default_factory=dict)


def run(cfg: DictConfig, named: Sequence[str] | None = None, command: str | None = None) -> float:
    """Train and test what ``cfg`` (``conf/train.yaml``) describes, in the directory ``cfg.run_dir``.

    With ``cfg.resume``, continue the run in that directory as if it had never stopped. A stop signal ends the process
    with 128 + its number after the training state is saved.

    Args:
        named: with ``cfg.resume``, the settings to compare with the run's; by default those on the command line.
        command: recorded as what started the run; by default this process's command line, which then also starts the
            ranks of a distributed run.

    Returns:
        The best validation accuracy, in [0, 1], which a sweep maximizes. Never a test metric.

    Raises:
        ConfigError: invalid config; raised before any data is read.
        DataError: missing or corrupt images.
        CheckpointError: a checkpoint could not be written or read.
        NonFiniteError: training diverged.
        OutOfMemoryError: with a batch size to try.
    """
    name_run_dir(cfg)
    with _errors_for_users(cfg), _graceful_shutdown(cfg) as stop:
        plan = prepare(cfg, named_on_the_command_line() if named is None else named, command)
        if plan.result is not None:
            return complete(plan, plan.result)
        if launch_ranks(plan):
            return float((finished_result(plan.run_dir) or {})["val/acc"])
        objects = build(plan.cfg, plan.named, plan.resuming)
        with lock(plan), torch_threads(plan.cfg.get("threads")):
            start = find_start(plan, objects)
            loggers, metrics = build_loggers(plan.cfg, plan.run_dir, start.position)
            trainer = build_trainer(plan.cfg, objects.callbacks, loggers)
            with tracking(loggers, plan.run_dir):
                load_data(objects.data, trainer)
                if start.checkpoint is None:
                    fit_to_images(objects.model, objects.data)
                restore(plan, objects, start, trainer, metrics, stop)
                record_start(plan, objects, start, trainer)
                fit(plan, objects, start, trainer)
                final = final_metrics(objects.model, objects.data, trainer) if plan.cfg.get("final_evaluation") else {}
                tested = test_best(objects, trainer)
                result = record_result(plan, objects, trainer, metrics, tested, final)
                report(plan, objects, result, trackers(loggers))
        return objects.best.metrics["val/acc"]


def prepare(cfg: DictConfig, named: Sequence[str], command: str | None = None) -> Plan:
    """Validate the config and replace ``auto`` values; when resuming, adopt the run's own config and allowed changes.

    Raises:
        ConfigError: an invalid value, a change that is not allowed, a used or read-only directory.
    """
    quiet_lightning()
    end_with_parent()
    commit, run_dir, resuming = git_commit(), Path(cfg.run_dir), cfg.resume is not None
    drop_disabled(cfg)
    if not resuming:
        cfg = _in_own_folder(cfg, named)
    validate(without_places(cfg, named) if resuming else cfg)
    resolve_auto(cfg)
    if get_world().rank == 0:
        refuse_unwritable(run_dir)
        if not resuming:
            refuse_used_folder(run_dir)
    changed: Changes = {}
    result = None
    if resuming:
        saved = saved_config(run_dir, cfg)
        changed = apply_path_changes(saved, diff_configs(saved, cfg, named))
        apply_changes(saved, changed, cfg.allow_changes)
        unfuse_if_clipped(saved)
        result = None if changed else finished_result(run_dir)
        if result is None:
            validate(saved)  # on this machine, with the changes
            check_inputs(run_dir, saved, cfg)
        cfg = saved
    if result is None:
        check_processes(cfg, get_world())
        resolve_threads(cfg)
    return Plan(cfg, run_dir, named, resuming, changed, result, commit, command)


def _in_own_folder(cfg: DictConfig, named: Sequence[str]) -> DictConfig:
    """Return the config of a new run whose paths are those of another run's config.yaml, with paths of its own.

    A resolved config names each file of the run that it is from; with another ``run_dir`` alone, the new run would
    replace that run's checkpoints.
    """
    before, now = (cfg.get("trainer") or {}).get("default_root_dir"), str(cfg.run_dir)
    if before in (None, now) or "trainer.default_root_dir" in named:
        return cfg
    own: DictConfig = OmegaConf.create(relocated(OmegaConf.to_container(cfg, resolve=True), before, now))
    return own


def complete(plan: Plan, result: dict[str, Any]) -> float:
    """Create what an interruption after the test left undone in a finished run: the report, and the final clean-up."""
    dashboard, resume = plan.cfg.callbacks.get("dashboard"), plan.cfg.callbacks.resume
    if get_world().rank == 0:
        if dashboard is not None and dashboard.get("figures", True) and not (plan.run_dir / REPORT).is_file():
            _write_report(plan.run_dir, {})
        if not resume.get("keep", False):
            remove_resume_checkpoints(Path(resume.folder))
    log.info(f"{plan.run_dir} has finished; there is nothing to resume.\n\n{results_table(result)}")
    return float(result["val/acc"])


def launch_ranks(plan: Plan) -> bool:
    """Launch one process per rank and wait for them, if the config asks for several and this process is none of them.

    Raises:
        ConfigError: several ranks, but no command to start them with.
        RankFailedError: a rank was killed.
    """
    count = processes(plan.cfg)
    if is_launched() or count == 1:
        return False
    if plan.command is not None or not HydraConfig.initialized():
        raise ConfigError(f"{count} ranks are launched by alexnet train, torchrun or srun, but this process is not.")
    launch(count, plan.run_dir, resume_command(plan.cfg))
    return True


@contextmanager
def lock(plan: Plan) -> Iterator[None]:
    """Hold the run directory on rank 0, and check again what another process may have changed in the meantime.

    Raises:
        UserError: another process writes to the directory, or has just finished the run.
    """
    with run_lock(plan.run_dir) if get_world().rank == 0 else nullcontext():
        if get_world().rank == 0 and not plan.resuming:
            refuse_used_folder(plan.run_dir)
        if plan.resuming and not plan.changed and finished_result(plan.run_dir):
            raise ConfigError(f"{plan.run_dir} has just been finished by another process; there is nothing to resume.")
        yield


def find_start(plan: Plan, objects: RunObjects) -> Start:
    """Return what to start from: the latest checkpoint of the run, else ``init_from``, else random weights.

    Raises:
        CheckpointError: a corrupt checkpoint, or one of another network.
        ConfigError: a finished run is to be extended, and its training state was not kept.
        DataError: the classes are not those of the run.
    """
    cfg, net, data = plan.cfg, objects.model.net, objects.data
    found = latest_valid(objects.resume.path.parent) if plan.resuming else None
    if found is None:
        if plan.resuming and finished_result(plan.run_dir):
            raise ConfigError(
                f"{plan.run_dir} has finished, and its resume checkpoints were removed. To extend a run, start it with "
                f"callbacks.resume.keep=true; to start a new one from its weights, use init_from={plan.run_dir}"
            )
        return Start() if cfg.init_from is None else Start(warm_start(net, str(cfg.init_from)))
    if "init_from" in plan.changed:
        raise ConfigError("init_from is invalid beside resume: the run has begun. Start a new run with it.")
    path, checkpoint = found
    check_fit(net, checkpoint, path)
    if checkpoint["hyper_parameters"].get("class_names") != list(data.class_names):
        raise DataError(f"{data.name} has other classes than when this run began. Start a new run.")
    position = Position(**checkpoint["position"])
    inside = checkpoint.get("inside")
    return Start(
        f"from {path.name}: {position}",
        path,
        position,
        len(inside) if isinstance(inside, list) and inside else None,
        saved_images(checkpoint, cfg),
        saved_lengths(checkpoint),
        schedule_start(checkpoint),
        changes_since(checkpoint, cfg),
    )


def load_data(data: ImageDataModule, trainer: Trainer) -> None:
    """Read the data and move it to where batches are made from it."""
    data.prepare_data()
    data.setup()
    data.move_to(trainer.strategy.root_device)


def restore(
    plan: Plan, objects: RunObjects, start: Start, trainer: Trainer, metrics: MetricsCSV, stop: GracefulShutdown
) -> None:
    """Set the position in the trainer, the loader and metrics.csv, and the length of the schedule.

    Raises:
        ConfigError: the position or the schedule does not fit the changed settings.
        DataError: the images have changed.
    """
    model, position, loader = objects.model, start.position, objects.data.train_dataloader()
    check_images(start.images, objects.data)
    check_ranks(start.ranks, get_world().size)
    check_not_passed(trainer.max_epochs, trainer.max_steps, position)
    loader.start_image = position.images
    # After a change of the batch size, at least one batch of the epoch is left.
    batch = min(loader.start_batch, num_batches(loader, trainer.limit_train_batches) - 1) if position.images else 0
    changed = {**start.changed, **{key: plan.changed[key] for key in ("optimizer.fused",) if key in plan.changed}}
    restart = restarts_schedule(changed)
    whole = model.run_length = objects.resume.planned = run_length(trainer, loader)
    model.validation_period = trainer.check_val_every_n_epoch or 1
    if start.checkpoint is not None:
        left = run_length(trainer, loader, position, batch)
        model.run_length = check_length(model.make_scheduler, start.lengths, whole, left, restart)
        batches = num_batches(loader, trainer.limit_train_batches)
        model.schedule_start = position.epoch + batch / batches if restart else start.schedule_start
    objects.resume.stop, objects.resume.restart_schedule = stop, restart and start.checkpoint is not None
    objects.resume.restart_optimizer = discards_state(changed)
    if batch % trainer.accumulate_grad_batches:
        raise ConfigError(
            f"data.batch_size={objects.data.batch_size} is invalid with accumulated gradients: this run stopped inside "
            "an epoch. Resume with the batch size and the accumulation that it had."
        )
    if model.make_scheduler is not None:  # whatever refuses this length does so before anything is written
        model.make_scheduler(model.create_optimizer(), model.run_length)
    guard_restoring(trainer, partial(check_saved_state, model, trainer))
    set_position(trainer, position.epoch, batch, position.step)
    if plan.resuming:
        has_ended = 0 < trainer.max_steps <= position.step  # perhaps inside an epoch, whose row is complete then
        metrics.resume(position.epoch + has_ended, required=position.epoch)


def record_start(plan: Plan, objects: RunObjects, start: Start, trainer: Trainer) -> None:
    """Write config.yaml, which makes the directory a run directory, and log what is about to be trained."""
    cfg, data, world, run_dir = plan.cfg, objects.data, get_world(), plan.run_dir
    if world.rank == 0:
        for outdated in (RESULT, REPORT, CORRUPTIONS):  # of a finished run that is extended
            (run_dir / outdated).unlink(missing_ok=True)
        write_atomic(run_dir / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
        record_command(run_dir, plan.command or current_command())
    counts, side = data.counts(), cfg.data.image_size
    log.info(f"data    {data.description}")
    log.info(f"        {counts['train']:,} train, {counts['val']:,} validation, {counts['test']:,} test images")
    log.info(
        f"model   {type(objects.model.net).__name__}, {_num_parameters(objects):,} parameters, input {side}×{side}"
    )
    classes, logits = len(data.class_names), cfg.model.num_classes
    if logits > classes:  # allowed, but rarely meant: the presets for ImageNet have 1,000
        log.info(f"        {logits:,} logits for {classes} classes; model.num_classes={classes} has one for each")
    threads = torch.get_num_threads()
    log.info(f"device  {_devices(trainer)}, precision {cfg.trainer.precision}, {threads} thread{'s' * (threads > 1)}")
    log.info(f"start   {start.description}")
    for key, (before, now) in {**start.changed, **plan.changed}.items():
        log.info(printable(f"change  {key}: {before} → {now}"))
    log.info(f"run     {run_dir}")


def fit(plan: Plan, objects: RunObjects, start: Start, trainer: Trainer) -> None:
    """Train from ``start`` to the end, compiled if the config says so."""
    mode = plan.cfg.compile
    if mode is not None:
        side, loader = objects.data.image_size, objects.data.train_dataloader()
        compile_network(objects.model.net, mode, torch.zeros(loader.per_rank_batch_size, 3, side, side), trainer)
    trainer.fit(objects.model, datamodule=objects.data, ckpt_path=start.checkpoint)
    use_average(trainer, objects.model)
    trainer.strategy.barrier("best checkpoint")  # rank 0 has written it
    if objects.best.score is None:
        raise ConfigError("training ended before any validation. Set a longer trainer.max_time.")


def test_best(objects: RunObjects, trainer: Trainer) -> dict[str, float]:
    """Test the best checkpoint and return its metrics. Nothing is chosen by them."""
    return dict(trainer.test(objects.model, datamodule=objects.data, ckpt_path=objects.best.path, verbose=False)[0])


def record_result(
    plan: Plan,
    objects: RunObjects,
    trainer: Trainer,
    metrics: MetricsCSV,
    tested: dict[str, float],
    final: dict[str, float],
) -> dict[str, Any]:
    """Write result.json and return its contents; {} on all ranks but 0.

    Validation metrics are those of the validation that chose the best checkpoint, not of the last one in that epoch.
    """
    if get_world().rank > 0:
        return {}
    best, data, cfg = objects.best, objects.data, plan.cfg
    metrics.record(best.epoch, tested)
    rows = metrics.rows.values()
    result: dict[str, Any] = {
        "status": "finished",
        **{f"val/{name}": best.metrics[f"val/{name}"] for name in ("acc", "acc_top5", "loss")},
        **{name: value for name, value in tested.items() if "/error" not in name},
        **final,
        "best_epoch": best.epoch,
        "epochs": len(rows),
        "seconds": sum(row["epoch_seconds"] for row in rows),
        "images_per_second": sum(row["images_per_second"] for row in rows) / len(rows),
        "data": {"name": data.name, "source": data.description, **images_used(trainer, data)},
        "model": type(objects.model.net).__name__,
        "parameters": _num_parameters(objects),
        "device": _devices(trainer),
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
        "split_seed": cfg.split_seed,
        "versions": package_versions(),
        "numerics": NUMERICS,
        "threads": torch.get_num_threads(),  # the order of sums depends on them, so the last digits do
        "git_commit": plan.commit,
    }
    write_result(plan.run_dir / RESULT, result)
    return result


def report(plan: Plan, objects: RunObjects, result: dict[str, Any], tracked: Sequence[Tracker]) -> None:
    """Write report.html, remove the resume checkpoints, and tell the log and the trackers the results."""
    if get_world().rank > 0:
        return
    page = None
    if objects.dashboard is not None and objects.dashboard.figures:
        page = _write_report(plan.run_dir, objects.dashboard.unavailable)
    outcome = {"hp/val_acc_best": result["val/acc"], "hp/test_acc": result["test/acc"], "hp/seconds": result["seconds"]}
    for tracker in tracked:
        attempt(tracker, "no outcome", partial(tracker.log_metrics, outcome, None))
        if page is not None:
            attempt(tracker, "no report", partial(tracker.log_report, page))
    objects.resume.remove()
    log.info(f"\n{results_table(result)}\n")
    log.info(
        f"best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s, "
        f"{result['images_per_second']:,.0f} images/s"
    )
    if page is not None:
        log.info(f"report {page}  (open it with: {open_command(page)})")
    log.info(f"run directory {plan.run_dir}")


def _write_report(run_dir: Path, unavailable: dict[str, str]) -> Path | None:
    """Write report.html, or log why not: the result has been recorded, and nothing here may undo it."""
    try:
        return write_report(run_dir, unavailable)
    except Exception as error:
        log.warning(f"warning: no report: {one_line(error)}")
        return None


def _num_parameters(objects: RunObjects) -> int:
    return sum(parameter.numel() for parameter in objects.model.net.parameters())


def _devices(trainer: Trainer) -> str:
    name, count = device_name(trainer.strategy.root_device), get_world().size
    return f"{count} × {name}" if count > 1 else name


@contextmanager
def _graceful_shutdown(cfg: DictConfig) -> Iterator[GracefulShutdown]:
    """Exit with 128 + the signal's number after a stop signal, and log the command that resumes the run."""
    stop = GracefulShutdown()
    stop.install()
    try:
        yield stop
        raise_if_interrupted()
    except RunInterrupted as stopped:
        log.info(f"stopped by {stopped}")
        if get_world().rank == 0 and (Path(cfg.run_dir) / CONFIG).exists():
            log.info(f"To resume: {resume_command(cfg)}")
        sys.exit(stopped.exit_code)
    finally:
        stop.restore()


def resume_command(cfg: DictConfig) -> str:
    """Return the command that resumes the run, with what its own command trusts: modules, classes, address of data."""
    names = [*(cfg.get("trust") or ()), *refused_targets(cfg)]
    trusted = [f"trust=[{','.join(dict.fromkeys(names))}]"] if names else []
    root = str(cfg.data.get("root"))
    address = [hydra_override("++data.root", root)] if is_url(root) else []
    return train_command(*trusted, *address, resume=cfg.run_dir)


@contextmanager
def _errors_for_users(cfg: DictConfig) -> Iterator[None]:
    """Translate errors that a user can act on: out of memory, a failed rank, a removed directory, Lightning's refusals.

    Raises:
        UserError: with what to do.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, CheckpointError) and not os.path.isdir(cfg.run_dir):
            raise RunDirectoryLostError(f"run_dir={cfg.run_dir} not found: it was removed during the run.") from error
        raise
    except MisconfigurationException as error:
        raise ConfigError(one_line(error)) from error
    except ModuleNotFoundError as error:  # raised by hand, without a name, for what a callback of Lightning needs
        if error.name is not None:
            raise
        raise ConfigError(one_line(error)) from error
    except FileNotFoundError as error:
        if os.path.isdir(cfg.run_dir):
            raise
        raise RunDirectoryLostError(f"run_dir={cfg.run_dir} not found: it was removed during the run.") from error
    except RuntimeError as error:
        if lost_peer(error):
            raise RankFailedError(
                f"another rank of this run has ended, so this one ends too.\nTo resume: {resume_command(cfg)}"
            ) from error
        # Words of torch's CPU allocator on Linux and on Windows.
        on_cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
            raise
        raise OutOfMemoryError(
            f"out of memory with data.batch_size={cfg.data.batch_size}. "
            f"Try data.batch_size={max(1, cfg.data.batch_size // 2)}."
        ) from error
