"""What cannot work in a configuration, found before any data is read; and what a stranger's configuration may name."""

import inspect
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from alexnet_pl.config.resolve import processes
from alexnet_pl.config.schedules import schedule_factory
from alexnet_pl.config.schema import Settings, check_arguments, format_value, locate
from alexnet_pl.distributed.collectives import broadcast_from_rank0
from alexnet_pl.distributed.environment import World, get_world, is_launched
from alexnet_pl.runtime.errors import ConfigError, did_you_mean

SECTIONS = ("model", "augment", "data", "optimizer", "scheduler", "trainer")
"""Top-level keys that describe one object each; ``augment`` and ``scheduler`` may be null."""

COLLECTIONS = ("callbacks", "logger")
"""Top-level keys that describe any number of named objects."""

VALUES = ("seed", "split_seed", "study", "channels_last", "compile", "run_dir", "resume", "allow_changes",
          "init_from")  # fmt: skip
"""Top-level keys that are plain values."""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What ``torch.compile`` takes as its mode."""

NEEDED = ("seed", "split_seed", "run_dir", "model.num_classes", "data.image_size", "callbacks.best", "callbacks.resume",
          "logger.csv")  # fmt: skip
"""What a run reads by name, some of it only after training."""

MONITORS = (
    *(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "acc", "acc_top5", "error", "error_top5")),
    "lr",
    "grad_norm",
    "weight_norm",
    "epoch_seconds",
    "images_per_second",
)
"""What :class:`alexnet_pl.training.classifier.ImageClassifier`, ``EpochReport`` and ``Norms`` log while training."""

LOGGED_BEFORE_SAVING = tuple(name for name in MONITORS if name.startswith("val/"))
"""What there is when ``BestCheckpoint`` looks, at the end of validation: the figures of training come after it."""

BEST_CHECKPOINT = "alexnet_pl.training.BestCheckpoint"


def validate(cfg: DictConfig) -> None:
    """Check everything about a run's configuration that can be known without its data.

    What the constructors check themselves (``data.val_fraction``, ``model.dropout``, …) is left to them: they are
    called before data is read as well.

    Raises:
        ConfigError: names the first key that cannot work, its value and what is allowed.
    """
    check_sections(cfg)
    settings: Settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_ranges(settings)
    # The data borrow values of other sections: what is wrong there is to be named there.
    for section in sorted((*SECTIONS, *COLLECTIONS), key=lambda name: name == "data"):
        check_arguments(section, settings.get(section))
    check_monitors({f"callbacks.{name}": callback for name, callback in settings["callbacks"].items()})
    check_monitors({"scheduler": settings.get("scheduler") or {}})
    check_device(settings["trainer"])
    rehearse_optimizer(cfg)


# --- keys -----------------------------------------------------------------------------------------------------------


def check_sections(cfg: DictConfig) -> None:
    """Refuse a top-level key that nothing reads, and a section that is absent or describes nothing.

    A key of one's own is read where another key refers to it: ``width: 64`` and ``model.fc_width: ${width}``. In a
    configuration from a run folder the references are resolved already; it was checked before it was written.

    Raises:
        ConfigError: names the key.
    """
    known = (*VALUES, *SECTIONS, *COLLECTIONS)
    references = set(re.findall(r"\$\{\.*([^.:}[]+)", OmegaConf.to_yaml(cfg)))
    for key in cfg:
        if references and key not in known and key not in references:
            hint = f" Leave it out: ~{key}" if isinstance(cfg[key], DictConfig) else did_you_mean(str(key), known)
            raise ConfigError(f"{key}={format_value(cfg[key])}: nothing reads a key {key}.{hint}")
    for key in (*SECTIONS, *(f"{name}.{entry}" for name in COLLECTIONS for entry in cfg.get(name) or ())):
        described = OmegaConf.select(cfg, key)
        if described is None and key in ("augment", "scheduler"):
            continue
        if described is None and key in SECTIONS:
            raise ConfigError(f"{key} is missing: every run needs it.")
        if not isinstance(described, DictConfig) or "_target_" not in described:
            section, _, entry = key.rpartition(".")
            named = [name for name, value in cfg[section].items() if value and "_target_" in value] if section else []
            hint = did_you_mean(entry, (f"{section}.{name}" for name in named)) if section else ""
            raise ConfigError(f"{key} has no _target_, so it describes nothing.{hint}")
    for key in NEEDED:
        if OmegaConf.select(cfg, key) is None:
            raise ConfigError(f"{key} is missing: every run needs it.")


# --- values ---------------------------------------------------------------------------------------------------------


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_share(value: Any) -> bool:
    return value >= 1 if type(value) is int else 0 < value <= 1


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "split_seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "channels_last": (lambda value: value in (True, False, "auto"), "true, false or auto"),
    "compile": (lambda mode: mode in COMPILE_MODES, f"null or one of {', '.join(COMPILE_MODES)}"),
    "data.seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "data.split_seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "data.mean": (lambda values: len(values) == 3, "three numbers, one a channel"),
    "data.std": (lambda values: len(values) == 3 and min(values) > 0, "three numbers above 0, one a channel"),
    "optimizer.lr": (lambda rate: 0 < rate < float("inf"), "a number above 0"),
    "scheduler.factor": (lambda factor: 0 < factor < 1, "above 0 and below 1"),
    "scheduler.patience": (lambda epochs: epochs >= 0, "a number of epochs, 0 or more"),
    "callbacks.dashboard.histogram_every_n_epochs": (lambda epochs: epochs >= 0, "a number of epochs; 0 for none"),
    "callbacks.dashboard.num_neighbor_images": (lambda count: count >= 0, "a number of images; 0 for none"),
    "trainer.max_epochs": (lambda epochs: epochs >= 1, "a whole number, 1 or more"),
    **{
        f"trainer.limit_{split}_batches": (_is_share, "a number of batches from 1, or a share above 0 up to 1.0")
        for split in ("train", "val", "test")
    },
}
"""Values that their types allow and nothing else would refuse before training. Each: the test, and what is allowed."""


def check_ranges(settings: Settings) -> None:
    """Hold the values of ``RANGES`` that are there against their ranges.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for path, (allowed, words) in RANGES.items():
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        try:
            possible = value is None or allowed(value)
        except TypeError:  # text, where a constructor of the user's own declares no type
            possible = False
        if not possible:
            raise ConfigError(f"{path}={value} is not possible: it is {words}.")


def check_monitors(watching: Settings) -> None:
    """Refuse a monitored quantity that is never logged, and a ``mode`` that would keep its worst value.

    Args:
        watching: key → the settings of what may monitor something.

    Raises:
        ConfigError: names the key.
    """
    for path, settings in watching.items():
        monitor = settings.get("monitor")
        if monitor is None:
            continue
        logged = LOGGED_BEFORE_SAVING if settings["_target_"] == BEST_CHECKPOINT else MONITORS
        if monitor not in logged:
            raise ConfigError(
                f"{path}.monitor={monitor} is never logged{' in time' * (monitor in MONITORS)}."
                f"{did_you_mean(monitor, logged)}\nLogged: {', '.join(logged)}."
            )
        best = "max" if "/acc" in monitor else "min" if "/" in monitor else None
        parameters = inspect.signature(locate(path, settings["_target_"])).parameters
        mode = settings.get("mode", parameters["mode"].default if "mode" in parameters else best)
        if best and mode != best:
            key = f"{path}.mode"
            raise ConfigError(f"{key}={mode} takes the worst {monitor} for the best: set {key}={best}.")


def check_device(trainer: Settings) -> None:
    """Refuse an accelerator or a number of devices that this machine lacks, and float16 on a CPU.

    Raises:
        ConfigError: names the key, its value and what there is.
    """
    wanted, devices, precision = (trainer.get(key) for key in ("accelerator", "devices", "precision"))
    known = {"cuda": CUDAAccelerator, "mps": MPSAccelerator, "cpu": CPUAccelerator}
    present = [name for name, accelerator in known.items() if accelerator.is_available()]
    names = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if wanted is not None and wanted not in names:
        raise ConfigError(f"trainer.accelerator={wanted} does not exist.{did_you_mean(wanted, names)}")
    choices = {None: present, "auto": present, "gpu": [name for name in present if name != "cpu"]}
    found = choices.get(wanted, [name for name in present if name == wanted])
    if not found and wanted in ("gpu", *known):
        raise ConfigError(
            f"trainer.accelerator={wanted} is not possible: torch {torch.__version__} finds no such device here. "
            f"Available: {', '.join(['auto', *present])}."
        )
    if not found:  # a kind of accelerator that only Lightning knows
        return
    try:
        known[found[0]].parse_devices(1 if devices in (None, "auto") else devices)
    except (MisconfigurationException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"trainer.devices={devices} is not possible on {found[0]}: {reason}") from error
    if found[0] == "cpu" and trainer.get("sync_batchnorm"):
        raise ConfigError("trainer.sync_batchnorm=true is not possible on a CPU: torch has it for GPUs only.")
    if found[0] == "cpu" and str(precision) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.precision={precision} is not possible on a CPU: it is auto, bf16-mixed, 32-true or 64-true."
        )


def rehearse_optimizer(cfg: DictConfig) -> None:
    """Make the optimiser and the scheduler for a single weight, so that torch refuses now what it refuses later.

    Raises:
        ConfigError: with torch's reason, which names the value.
    """
    weight = nn.Parameter(torch.zeros(1, 1))
    section = "optimizer"
    try:
        optimizer = instantiate(cfg.optimizer)([weight])
        section = "scheduler"
        if (schedule := schedule_factory(instantiate(cfg.get(section)))) is not None:
            schedule(optimizer)
    except (InstantiationException, ConfigError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{section}={cfg[section]._target_} is not possible: {reason}") from error


def refuse_in_sweep(trainer: Mapping[str, Any]) -> None:
    """A sweep runs its points in one process each.

    Raises:
        ConfigError: this process is one of several, or the trainer asks for several.
    """
    devices = trainer.get("devices", 1)
    if trainer.get("strategy") == "ddp" and devices in ("auto", -1):
        import torch

        devices = torch.cuda.device_count()
    count = devices if isinstance(devices, int) else len(devices.split(",") if isinstance(devices, str) else devices)
    count = max(count * trainer.get("num_nodes", 1), get_world().size)
    if count > 1:
        raise ConfigError(
            f"{count} processes are not possible in a sweep (-m): each of them would run the whole sweep. "
            "Give every point one device, or start the points one by one."
        )


def check_processes(cfg: DictConfig, group: World) -> None:
    """Hold the processes that are there, or are to be started, against the configuration.

    Raises:
        ConfigError: several machines without torchrun or srun; another number than was started; a batch that
            they cannot share; different folders.
    """
    count, local = processes(cfg), group.local_size
    if is_launched() and count != group.size:
        raise ConfigError(
            f"{group.size} processes were started, and trainer.devices × trainer.num_nodes is {count}. Set "
            f"trainer=ddp, and leave both out or set trainer.devices={local} trainer.num_nodes={group.size // local}."
        )
    if not is_launched() and cfg.trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: the processes of several machines are started by torchrun or "
            "srun. See docs/scaling.md."
        )
    if cfg.data.batch_size % count:
        raise ConfigError(
            f"data.batch_size={cfg.data.batch_size} cannot be shared by {count} processes: it counts the images of all "
            f"of them together, and is a multiple of {count}."
        )
    if (first := broadcast_from_rank0("run_dir", str(cfg.run_dir))) != str(cfg.run_dir):
        raise ConfigError(f"process {group.rank} was given the folder {cfg.run_dir}, and process 0 {first}.")


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
