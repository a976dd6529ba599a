"""One run from a config: seed → build → fit → test the best checkpoint → write result.json → return the score."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict

from alexnet_pl import __version__
from alexnet_pl.config.resolve import processes, resolve_auto
from alexnet_pl.config.validate import check_processes, refuse_unwritable, refuse_used_folder, validate
from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.distributed.collectives import RankFailedError, lost_peer
from alexnet_pl.distributed.environment import get_world, is_launched
from alexnet_pl.distributed.launcher import end_with_parent, launch
from alexnet_pl.figures.html_report import write_report
from alexnet_pl.runtime.errors import ConfigError, DataError, UserError
from alexnet_pl.runtime.run_folder import finished_result, results_table, write_result
from alexnet_pl.runtime.signals import GracefulShutdown, RunInterrupted, raise_if_interrupted
from alexnet_pl.runtime.system import device_name, git_commit, package_versions, raise_malloc_thresholds
from alexnet_pl.training.build import compile_network, make_trainer, quiet_lightning
from alexnet_pl.training.callbacks.checkpoint import BestCheckpoint, ResumeCheckpoint
from alexnet_pl.training.callbacks.dashboard import Dashboard
from alexnet_pl.training.checkpoint_io import latest_valid
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lightning_internals import set_position
from alexnet_pl.training.loggers import MetricsCSV
from alexnet_pl.training.resume import (
    Changes,
    apply_changes,
    apply_path_changes,
    diff_configs,
    named_on_the_command_line,
    saved_config,
)
from alexnet_pl.training.weights import check_fit, warm_start

log = logging.getLogger(__name__)


class OutOfMemoryError(UserError):
    """The device's or the machine's memory does not hold a batch."""

    exit_code = 1


def run(cfg: DictConfig, named: Sequence[str] | None = None) -> float:
    """Train and test what ``cfg`` (``conf/train.yaml``) describes, into the folder ``cfg.run_dir``.

    With ``cfg.resume`` go on with the run in that folder, as if it had never stopped. A SIGINT, SIGTERM or SIGUSR1
    ends the process with 128 + its number after what has been learned is saved.

    Args:
        named: with ``cfg.resume``, the settings that are to be compared with the run's; by default those on the
            command line.

    Returns:
        The best validation accuracy, in [0, 1]: what a sweep maximises. Never a test figure.

    Raises:
        ConfigError: a setting that cannot work; raised before any data is read.
        DataError: missing or damaged images.
        CheckpointError: a checkpoint that cannot be written or read.
        NonFiniteError: training has broken down.
        OutOfMemoryError: with a batch size to try.
    """
    quiet_lightning()
    end_with_parent()
    stop = GracefulShutdown()
    stop.install()
    try:
        score = _run(cfg, stop, named_on_the_command_line() if named is None else named)
        raise_if_interrupted()
        return score
    except RunInterrupted as stopped:
        log.info(f"stopped by {stopped}")
        if get_world().rank == 0 and (Path(cfg.run_dir) / "config.yaml").exists():
            log.info(f"go on with: python train.py resume={cfg.run_dir}")
        sys.exit(stopped.exit_code)
    except RuntimeError as error:
        # What torch's allocator for the CPU says, on Linux and on Windows.
        on_cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        if lost_peer(error):
            raise RankFailedError(
                "another process of this run has ended, so this one ends too.\n"
                f"Go on with the same command and resume={cfg.run_dir}"
            ) from error
        if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
            raise
        raise OutOfMemoryError(
            f"out of memory with data.batch_size={cfg.data.batch_size}. "
            f"Try data.batch_size={max(1, cfg.data.batch_size // 2)}."
        ) from error
    finally:
        stop.restore()


def _run(cfg: DictConfig, stop: GracefulShutdown, named: Sequence[str]) -> float:
    commit = git_commit()  # now: the checkout may change while the run goes on
    run_dir, group = Path(cfg.run_dir), get_world()
    validate(cfg)
    resolve_auto(cfg)
    if group.rank == 0:
        refuse_unwritable(run_dir)
    changed: Changes = {}
    resuming = cfg.resume is not None  # what is resumed has settled everything
    if not resuming:
        if group.rank == 0:
            refuse_used_folder(run_dir)
    else:
        saved = saved_config(run_dir)
        changed = apply_path_changes(saved, diff_configs(saved, cfg, named))
        apply_changes(saved, changed, cfg.allow_changes)
        if not changed and (result := finished_result(run_dir)):
            log.info(f"{run_dir} has finished; there is nothing to resume.\n\n{results_table(result)}")
            return result["val/acc"]
        cfg = saved
        validate(cfg)  # for this machine, and with the changes
    check_processes(cfg, group)
    if not is_launched() and processes(cfg) > 1:
        if not HydraConfig.initialized():
            raise ConfigError(f"{processes(cfg)} processes are started by train.py, torchrun or srun; this is neither.")
        launch(processes(cfg), run_dir)
        return finished_result(run_dir)["val/acc"]

    seed_everything(cfg.seed, verbose=False)
    data: ImageDataModule = instantiate(cfg.data)
    if data.classes_from_files and not resuming and "model.num_classes" not in named_on_the_command_line():
        with open_dict(cfg):
            cfg.model.num_classes = len(data.class_names)
    if cfg.model.num_classes < len(data.class_names):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes} is too few: the data has {len(data.class_names)} classes."
        )
    model = ImageClassifier(
        net=instantiate(cfg.model),
        num_classes=cfg.model.num_classes,
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.get("scheduler")),
        hyperparameters={
            **OmegaConf.to_container(cfg, resolve=True),
            "class_names": list(data.class_names),
            "version": __version__,
        },
    )
    raise_malloc_thresholds()
    if cfg.channels_last:
        model.net.to(memory_format=torch.channels_last)
    start, resumed_from, position = "from scratch", None, {"epoch": 0, "batch": 0, "step": 0}
    if cfg.init_from is not None:
        start = warm_start(model.net, str(cfg.init_from))
    if (run_dir / "config.yaml").exists() and (found := latest_valid(run_dir / "checkpoints")):
        resumed_from, checkpoint = found
        check_fit(model.net, checkpoint, resumed_from)
        if checkpoint["hyper_parameters"].get("class_names") != list(data.class_names):
            raise DataError(f"{data.name} has other classes than when this run began. Start a new run.")
        position = checkpoint["position"]
        start = f"from {resumed_from.name}: {describe(position)}"

    callbacks = instantiate(cfg.callbacks)
    best: BestCheckpoint = callbacks.best
    resume: ResumeCheckpoint = callbacks.resume
    resume.stop, resume.rebuild_schedule = stop, bool(changed)
    resume.changed_rate = changed["optimizer.lr"][1] if "optimizer.lr" in changed else None
    with open_dict(cfg):
        cfg.logger.tensorboard.purge_step = position["step"] or None
    loggers = instantiate(cfg.logger)
    metrics: MetricsCSV = loggers.csv
    if cfg.resume is not None or resumed_from is not None:
        metrics.resume(position["epoch"])
    trainer = make_trainer(cfg, [*callbacks.values()], [*loggers.values()])

    data.prepare_data()
    data.setup()
    data.move_to(trainer.strategy.root_device)
    if group.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        scratch = run_dir / ".config.yaml"
        OmegaConf.save(cfg, scratch, resolve=True)
        os.replace(scratch, run_dir / "config.yaml")  # from here on the folder holds a run
    counts, parameters = data.counts(), sum(p.numel() for p in model.net.parameters())
    device, side = device_name(trainer.strategy.root_device), cfg.data.image_size
    if group.size > 1:
        device = f"{group.size} × {device}"
    log.info(f"data    {data.description}")
    log.info(f"        {counts['train']:,} train, {counts['val']:,} validation, {counts['test']:,} test images")
    log.info(f"model   {type(model.net).__name__}, {parameters:,} parameters, input {side}×{side}")
    log.info(f"device  {device}, precision {cfg.trainer.precision}")
    log.info(f"start   {start}")
    for key, (before, now) in changed.items():
        log.info(f"change  {key}: {before} → {now}")
    log.info(f"run     {run_dir}")

    if cfg.compile is not None:
        images = torch.zeros(data.train_dataloader().per_rank_batch_size, 3, side, side)
        compile_network(model.net, cfg.compile, images, trainer)
    set_position(trainer, position)
    data.train_dataloader().start_image = position["batch"] * data.batch_size
    trainer.fit(model, datamodule=data, ckpt_path=resumed_from)
    trainer.strategy.barrier("best checkpoint")  # process 0 has written it
    test = trainer.test(model, datamodule=data, ckpt_path=best.path, verbose=False)[0]

    if group.rank > 0:
        return best.score
    metrics.record(best.epoch, test)
    rows = metrics.rows
    result: dict[str, Any] = {
        "status": "finished",
        **{f"val/{name}": rows[best.epoch][f"val/{name}"] for name in ("acc", "acc_top5", "loss")},
        **{name: value for name, value in test.items() if "/error" not in name},
        "best_epoch": best.epoch,
        "epochs": len(rows),
        "seconds": sum(row["epoch_seconds"] for row in rows.values()),
        "images_per_second": sum(row["images_per_second"] for row in rows.values()) / len(rows),
        "data": {"name": data.name, "source": data.description, **counts},
        "model": type(model.net).__name__,
        "parameters": parameters,
        "device": device,
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
        "split_seed": cfg.split_seed,
        "versions": package_versions(),
        "git_commit": commit,
    }
    write_result(run_dir / "result.json", result)
    if dashboard := callbacks.get("dashboard"):
        report(run_dir, dashboard)
    log.info(f"\n{results_table(result)}\n")
    log.info(
        f"best epoch {best.epoch} of {len(rows)}, {result['seconds']:.0f} s, "
        f"{result['images_per_second']:,.0f} images/s"
    )
    log.info(f"run folder {run_dir}")
    return result["val/acc"]


def report(run_dir: Path, dashboard: Dashboard) -> None:
    """Write the run's page where its figures are drawn. The result stands already: nothing here may take it back."""
    if dashboard.figures:
        try:
            write_report(run_dir, dashboard.left_out)
        except Exception as error:
            log.warning(f"warning: no report: {' '.join(str(error).split())}")


def describe(position: dict[str, int]) -> str:
    """Where a resumed run goes on, for people."""
    if position["batch"]:
        return f"goes on inside epoch {position['epoch'] + 1}, after batch {position['batch']}"
    return f"goes on after epoch {position['epoch']}"
