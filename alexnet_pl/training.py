"""One run from a config: seed → build → fit → test the best checkpoint → write result.json → return the score."""

import copy
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from alexnet_pl import __version__
from alexnet_pl.callbacks import EpochReport, Norms, ProgressBar, ReseedEachEpoch
from alexnet_pl.checkpoints import BestCheckpoint, ResumeCheckpoint, SafeCheckpointIO, latest_valid, set_position
from alexnet_pl.classifier import ImageClassifier
from alexnet_pl.dashboard import Dashboard
from alexnet_pl.data.module import ImageDataModule
from alexnet_pl.distributed import PeerLost, ProcessGroup, agreed, current, end_with_parent, launch, lost_peer, started
from alexnet_pl.errors import ConfigError, DataError, UserError
from alexnet_pl.malloc import keep_freed_memory
from alexnet_pl.metrics_csv import MetricsCSV
from alexnet_pl.report import write_report
from alexnet_pl.results import device_name, finished_result, git_commit, package_versions, results_table, write_result
from alexnet_pl.resuming import (
    Changes,
    apply_changes,
    changes,
    check_fit,
    move,
    named_on_the_command_line,
    saved_config,
    warm_start,
)
from alexnet_pl.stopping import RunStopped, StopRequest, stop_if_asked
from alexnet_pl.validation import validate

log = logging.getLogger(__name__)


class OutOfMemory(UserError):
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
        OutOfMemory: with a batch size to try.
    """
    quiet_lightning()
    end_with_parent()
    stop = StopRequest()
    stop.install()
    try:
        score = _run(cfg, stop, named_on_the_command_line() if named is None else named)
        stop_if_asked()
        return score
    except RunStopped as stopped:
        log.info(f"stopped by {stopped}")
        if current().rank == 0 and (Path(cfg.run_dir) / "config.yaml").exists():
            log.info(f"go on with: python train.py resume={cfg.run_dir}")
        sys.exit(stopped.exit_code)
    except RuntimeError as error:
        # What torch's allocator for the CPU says, on Linux and on Windows.
        on_cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        if lost_peer(error):
            raise PeerLost(
                "another process of this run has ended, so this one ends too.\n"
                f"Go on with the same command and resume={cfg.run_dir}"
            ) from error
        if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
            raise
        raise OutOfMemory(
            f"out of memory with data.batch_size={cfg.data.batch_size}. "
            f"Try data.batch_size={max(1, cfg.data.batch_size // 2)}."
        ) from error
    finally:
        stop.restore()


def _run(cfg: DictConfig, stop: StopRequest, named: Sequence[str]) -> float:
    commit = git_commit()  # now: the checkout may change while the run goes on
    run_dir, group = Path(cfg.run_dir), current()
    validate(cfg)
    settle(cfg)
    if group.rank == 0:
        refuse_unwritable(run_dir)
    changed: Changes = {}
    resuming = cfg.resume is not None  # what is resumed has settled everything
    if not resuming:
        if group.rank == 0:
            refuse_used_folder(run_dir)
    else:
        saved = saved_config(run_dir)
        changed = move(saved, changes(saved, cfg, named))
        apply_changes(saved, changed, cfg.resume_with_changes)
        if not changed and (result := finished_result(run_dir)):
            log.info(f"{run_dir} has finished; there is nothing to resume.\n\n{results_table(result)}")
            return result["val/acc"]
        cfg = saved
        validate(cfg)  # for this machine, and with the changes
    check_processes(cfg, group)
    if not started() and processes(cfg) > 1:
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
    keep_freed_memory()
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
        images = torch.zeros(data.train_dataloader().share, 3, side, side)
        compile_network(model.net, cfg.compile, images, trainer)
    set_position(trainer, position)
    data.train_dataloader().start = position["batch"]
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


def settle(cfg: DictConfig) -> None:
    """Replace what is left to the machine or to another key by what it comes to, so that config.yaml says it.

    ``trainer.precision=auto`` and ``channels_last=auto`` become what suits the device; a ``data.image_size`` of its
    own becomes the size that the network is built for; ``trainer.devices=auto`` the processes that this machine has or
    is to have.
    """
    with open_dict(cfg):
        cfg.model.image_size = cfg.data.image_size
        for key in ("root", "shards", "cache"):  # a resumed run may be called from another folder
            if (path := cfg.data.get(key)) is not None and "://" not in path:
                cfg.data[key] = str(Path(path).expanduser().absolute())
        if cfg.trainer.get("devices") in ("auto", -1):
            group = current()
            if group.size > 1:
                cfg.trainer.num_nodes = group.size // group.local_size
            gpus = torch.cuda.device_count() if on_cuda(cfg.trainer.accelerator) else 1
            cfg.trainer.devices = group.local_size if started() else gpus
        if cfg.trainer.precision == "auto":
            cfg.trainer.precision = default_precision(cfg.trainer.accelerator)
        if cfg.channels_last == "auto":
            cfg.channels_last = cfg.trainer.precision in ("16-mixed", "bf16-mixed") and on_cuda(cfg.trainer.accelerator)


def on_cuda(accelerator: str) -> bool:
    """Whether ``trainer.accelerator`` comes to a CUDA GPU on this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def processes(cfg: DictConfig) -> int:
    """``devices`` × ``num_nodes`` of the trainer, once :func:`settle` has replaced ``auto``."""
    devices = cfg.trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = int(devices) if devices.isdecimal() else devices.split(",")
    return (devices if isinstance(devices, int) else len(devices)) * cfg.trainer.get("num_nodes", 1)


def check_processes(cfg: DictConfig, group: ProcessGroup) -> None:
    """Hold the processes that are there, or are to be started, against the configuration.

    Raises:
        ConfigError: several machines without torchrun or srun; another number than was started; a batch that
            they cannot share; different folders.
    """
    count, local = processes(cfg), group.local_size
    if started() and count != group.size:
        raise ConfigError(
            f"{group.size} processes were started, and trainer.devices × trainer.num_nodes is {count}. Set "
            f"trainer=ddp, and leave both out or set trainer.devices={local} trainer.num_nodes={group.size // local}."
        )
    if not started() and cfg.trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: the processes of several machines are started by torchrun or "
            "srun. See docs/scaling.md."
        )
    if cfg.data.batch_size % count:
        raise ConfigError(
            f"data.batch_size={cfg.data.batch_size} cannot be shared by {count} processes: it counts the images of all "
            f"of them together, and is a multiple of {count}."
        )
    if (first := agreed("run_dir", str(cfg.run_dir))) != str(cfg.run_dir):
        raise ConfigError(f"process {group.rank} was given the folder {cfg.run_dir}, and process 0 {first}.")


def default_precision(accelerator: str) -> str:
    """``16-mixed`` on a CUDA GPU, ``bf16-mixed`` on a CPU with bf16 instructions, else ``32-true``.

    A CPU without AMX or AVX512-bf16 emulates bf16, many times slower than float32. So does one whose instruction set
    is capped by ``ONEDNN_MAX_CPU_ISA``: the kernels follow that cap, not the CPU.
    """
    if on_cuda(accelerator):
        return "16-mixed"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
    return "bf16-mixed" if on_cpu and _has_bf16_instructions() else "32-true"


def _has_bf16_instructions() -> bool:
    on_chip = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return on_chip and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compile_network(net: nn.Module, mode: str, images: Tensor, trainer: Trainer) -> None:
    """Have ``net`` compiled, in place so that the keys of its state dict stay; left as it is where that fails.

    A compiler can fail on the first batch: there may be no C++ compiler, or a GPU too new for it. So it is tried on
    a copy first, forward and backward. Neither ``net`` nor the random generators notice. Dropout draws the same masks
    as without the compiler.

    Args:
        mode: of ``torch.compile``.
        images: a batch of the shape that the network is going to see.
    """
    device = trainer.strategy.root_device
    twin = copy.deepcopy(net).to(device)
    # Compiled code has its own random numbers unless told otherwise.
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    twin.compile(options=options)
    try:
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            twin(images.to(device)).float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise anything
        torch.compiler.reset()
        reason = " ".join(str(error).split())[:200]
        log.warning(f"warning: compile={mode} failed, the run goes on without it ({type(error).__name__}: {reason})")
    else:
        net.compile(options=options)


def make_trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any]) -> Trainer:
    """The trainer of ``cfg.trainer`` with the callbacks that every run has; a progress bar on a terminal only."""
    from rich import get_console

    on_terminal = get_console().is_terminal
    bar = [ProgressBar()] if on_terminal else []
    # The report counts a batch before the checkpoint callback saves the count.
    callbacks = [EpochReport(), Norms(), *callbacks, ReseedEachEpoch(cfg.seed), *bar]
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=on_terminal and current().rank == 0,
        enable_checkpointing=False,  # Lightning's own; the callbacks above save
    )
    # Of several processes Lightning asks the first in every step whether it was to stop, and waits for its GPU to
    # answer. ResumeCheckpoint has them agree.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def refuse_used_folder(run_dir: Path) -> None:
    """A second run in a folder would mix its files with the first one's.

    Raises:
        ConfigError: the folder holds a run.
    """
    if (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"{run_dir} already holds a run.\nGo on with it by resume={run_dir}, or choose another hydra.run.dir."
        )


def refuse_unwritable(run_dir: Path) -> None:
    """Find out now, not when the first checkpoint is due.

    Raises:
        ConfigError: nothing can be written where the run folder is or would be.
    """
    folder = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): a run there would be lost.\nChoose another hydra.run.dir."
        ) from error


def quiet_lightning() -> None:
    """Keep Lightning's banners out of the log; its warnings stay, but for those that nobody here can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # between lightning and newer torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True")  # the metrics sum over processes
    warnings.filterwarnings(
        "ignore", message=".*it is recommended to use `Trainer\\(devices=1"
    )  # no image counts twice
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # nothing is logged by step
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # TensorLoader.start resumes it
