"""Validation of a config before any data is read: keys, types, ranges, trainer, monitors, device, optimizer."""

import copy
import inspect
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parameter import UninitializedParameter

from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.optimizers import optimizer_factory
from alexnet_pl.config.resolve import processes
from alexnet_pl.config.schedules import schedule_factory
from alexnet_pl.config.schema import Settings, check_arguments, format_value, locate, remains_of_experiment
from alexnet_pl.distributed.collectives import broadcast_from_rank0
from alexnet_pl.distributed.environment import World, get_world, is_launched
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import ConfigError, did_you_mean, invalid_value, one_line

SECTIONS = ("model", "augment", "data", "loss", "optimizer", "scheduler", "trainer")
"""Top-level keys that describe one object each."""

OPTIONAL = ("augment", "loss", "scheduler")
"""Those that may be null or missing."""

COLLECTIONS = ("callbacks", "logger")
"""Top-level keys that describe any number of named objects."""

VALUES = ("seed", "split_seed", "study", "channels_last", "compile", "run_dir", "resume", "allow_changes", "trust",
          "init_from", "data_dir", "final_evaluation", "scale", "threads")  # fmt: skip
"""Top-level keys with plain values."""

PACKAGES = ("experiment", "rung", "local")
"""Groups whose options set keys of the top level, and are no key themselves."""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of ``torch.compile``."""

REQUIRED = ("seed", "split_seed", "run_dir", "model.num_classes", "data.image_size", "callbacks.best",
            "callbacks.resume")  # fmt: skip
"""Keys that every run reads."""

MONITORS = (
    *(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "acc", "acc_top5", "error", "error_top5")),
    "lr",
    "grad_norm",
    "weight_norm",
    "epoch_seconds",
    "images_per_second",
)
"""Metrics that are logged during training."""

LOGGED_BEFORE_SAVING = tuple(name for name in MONITORS if name.startswith("val/"))
"""Metrics that ``AFTER_VALIDATION`` can monitor, which compares at the end of validation, before the others exist."""

AFTER_VALIDATION = ("alexnet_pl.training.BestCheckpoint", "alexnet_pl.training.StopWithoutImprovement")


def validate(cfg: DictConfig) -> None:
    """Check everything about the config of a run that can be known without its data.

    Ranges that constructors check themselves (``data.val_fraction``, ``model.dropout``, …) are left to them, because
    they are called before data is read as well.

    Raises:
        ConfigError: names the first invalid key, its value and what is expected.
    """
    check_sections(cfg)
    settings = cast(Settings, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    check_ranges(settings)
    check_trainer(settings["trainer"])
    check_augment(settings.get("augment") or {})
    check_warmup(settings.get("scheduler") or {}, settings["optimizer"], settings["trainer"].get("max_epochs"))
    # The data section borrows values of others: an error in those is reported with its original key.
    for section in sorted((*SECTIONS, *COLLECTIONS), key=lambda name: name == "data"):
        check_arguments(section, settings.get(section))
    check_monitors({f"callbacks.{name}": callback for name, callback in settings["callbacks"].items()})
    check_monitors({"scheduler": settings.get("scheduler") or {}})
    check_device(settings["trainer"])
    rehearse_optimizer(settings)


# --- keys -----------------------------------------------------------------------------------------------------------


def check_sections(cfg: DictConfig) -> None:
    """Check that every top-level key is used, and that every section is there and has a ``_target_``.

    A key of the user's own is used if another key refers to it, as in ``width: 64`` and ``model.fc_width: ${width}``.
    In a config from a run directory these references are already resolved; it was checked before it was saved.

    Raises:
        ConfigError: names the key.
    """
    known = (*VALUES, *SECTIONS, *COLLECTIONS)
    references = set(re.findall(r"\$\{\.*([^.:}[]+)", OmegaConf.to_yaml(cfg)))
    for key in map(str, cfg):
        if references and key not in known and key not in references:
            if key in PACKAGES:
                fix = "Start the option's file with the line # @package _global_"
                raise invalid_value(key, cfg[key], "its keys at the top level", fix)
            hint = f" Remove it: ~{key}" if isinstance(cfg[key], DictConfig) else did_you_mean(key, known)
            raise ConfigError(f"{key}={format_value(cfg[key])} is invalid: no other key refers to {key}.{hint}")
    for name in COLLECTIONS:
        if not isinstance(cfg.get(name), DictConfig | None):
            raise invalid_value(name, cfg[name], "a mapping from names to objects")
    for key in (*SECTIONS, *(f"{name}.{entry}" for name in COLLECTIONS for entry in cfg.get(name) or ())):
        described = OmegaConf.select(cfg, key)
        if described is None and key in OPTIONAL:
            continue
        if described is None and key in SECTIONS:
            raise ConfigError(f"{key} not found: every run needs it.")
        if isinstance(described, str):
            raise invalid_value(key, described, "a mapping with _target_")
        if not isinstance(described, DictConfig) or "_target_" not in described:
            section, _, entry = key.rpartition(".")
            named = [name for name, value in cfg[section].items() if value and "_target_" in value] if section else []
            unnamed = [f"{section}.{name}" for name in cfg[section] if name not in named] if section else [key]
            hint = remains_of_experiment(unnamed)
            if section and not hint:
                hint = did_you_mean(entry, (f"{section}.{name}" for name in named))
            raise ConfigError(f"{key}._target_ not found: every section names a class.{hint}")
        if described.get("_partial_") and key not in ("optimizer", "scheduler"):
            raise invalid_value(f"{key}._partial_", True, "false", "The run needs the object itself.")
    for key in REQUIRED:
        if OmegaConf.select(cfg, key) is None:
            raise ConfigError(f"{key} not found: every run needs it.")


# --- values ---------------------------------------------------------------------------------------------------------


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_limit(value: Any) -> bool:
    return value >= 1 if type(value) is int else 0 < value <= 1


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_rates(value: Any) -> bool:
    return all(0 < rate < float("inf") for rate in (value if isinstance(value, list) else [value]))


PRECISIONS = ("auto", "32-true", "16-mixed", "bf16-mixed", "32", "16", "bf16", 32, 16)
"""Supported precisions with Lightning's aliases; weights of another type than float32 would not fit the images."""

SEEDS = "a whole number from 0 to 4294967295"


def _is_positive(value: Any) -> bool:
    return bool(0 < value < math.inf)


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_is_seed, SEEDS),
    "split_seed": (_is_seed, SEEDS),
    "channels_last": (lambda value: value in (True, False, "auto"), "true, false or auto"),
    "threads": (lambda count: count == "auto" or _is_count(count), "auto, or a number of CPU threads ≥ 1"),
    "final_evaluation": (lambda value: isinstance(value, bool), "true or false"),
    "compile": (lambda mode: mode in COMPILE_MODES, f"null or one of: {', '.join(COMPILE_MODES)}"),
    "trust": (
        lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
        "a list of module names, as in trust=[my_module]",
    ),
    "data.seed": (_is_seed, SEEDS),
    "data.split_seed": (_is_seed, SEEDS),
    "data.mean": (lambda values: len(values) == 3, "three numbers, one per channel"),
    "data.std": (lambda values: len(values) == 3 and min(values) > 0, "three numbers above 0, one per channel"),
    **dict.fromkeys(("augment.mixup.alpha", "augment.cutmix.alpha"), (_is_positive, "a number above 0")),
    "loss.label_smoothing": (lambda weight: 0 <= weight < 1, "a number from 0 to below 1"),
    "loss.reduction": (lambda name: name == "mean", "mean, or no such key"),
    "optimizer.betas": (lambda betas: len(betas) == 2, "a list of two numbers"),
    "optimizer.lr": (_is_positive, "a number above 0"),
    "scheduler.eta_min": (lambda rate: 0 <= rate < math.inf, "a number ≥ 0"),
    "scheduler.factor": (lambda factor: 0 < factor <= 1, "a number above 0 and up to 1"),
    "scheduler.patience": (lambda epochs: epochs >= 0, "a number of epochs, 0 or more"),
    "scheduler.step_size": (_is_count, "a number of intervals ≥ 1"),
    "scheduler.gamma": (lambda factor: 0 < factor < float("inf"), "a number above 0"),
    "scheduler.max_lr": (_are_rates, "a number above 0, or one per parameter group"),
    "scheduler.total_steps": (lambda steps: steps == "auto" or _is_count(steps), "auto, or a number of steps ≥ 1"),
    "scheduler.T_max": (lambda length: length == "auto" or _is_count(length), "auto, or a number of intervals ≥ 1"),
    "callbacks.dashboard.histogram_every_n_epochs": (lambda epochs: epochs >= 0, "a number of epochs, or 0 for none"),
    "callbacks.dashboard.num_neighbor_images": (lambda count: count >= 0, "a number of images, or 0 for none"),
    "trainer.max_epochs": (lambda epochs: epochs >= 1 or epochs == -1, "a whole number ≥ 1, or -1 with max_steps"),
    "trainer.max_steps": (lambda steps: steps >= 1 or steps == -1, "a whole number ≥ 1, or -1 for no limit"),
    "trainer.fast_dev_run": (lambda batches: batches >= 0, "true, false or a number of batches"),
    "trainer.check_val_every_n_epoch": (_is_count, "a number of epochs ≥ 1"),
    "trainer.accumulate_grad_batches": (_is_count, "a number of batches ≥ 1"),
    "trainer.precision": (lambda name: name in PRECISIONS, "one of: auto, 32-true, 16-mixed, bf16-mixed"),
    "trainer.profiler": (lambda name: name in ("simple", "advanced", "pytorch"), "simple, advanced, pytorch or null"),
    "trainer.gradient_clip_val": (lambda norm: 0 <= norm < float("inf"), "a number ≥ 0, or null"),
    "trainer.gradient_clip_algorithm": (lambda name: name in ("norm", "value"), "norm or value"),
    "trainer.num_sanity_val_steps": (lambda steps: steps >= -1, "a number of batches, or -1 for all"),
    **{
        f"trainer.limit_{split}_batches": (_is_limit, "a number of batches ≥ 1, or a fraction above 0 up to 1.0")
        for split in ("train", "val", "test")
    },
}
"""Key → predicate and description of the values that types alone do not exclude and nothing refuses before training."""


def check_ranges(settings: Settings) -> None:
    """Check the values of the keys in ``RANGES``, if they are set.

    Raises:
        ConfigError: names the key, its value and what is expected.
    """
    for path, (is_valid, words) in RANGES.items():
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        try:
            valid = value is None or is_valid(value)
        except TypeError:  # text, if a constructor of the user's own declares no type
            valid = False
        if not valid:
            raise invalid_value(path, value, words)


# --- trainer --------------------------------------------------------------------------------------------------------

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")

REFUSED_BY_TRAINER: dict[str, tuple[tuple[Any, ...], str]] = {
    "logger": ((), "Loggers belong into the section logger."),
    "callbacks": ((), "Callbacks belong into the section callbacks."),
    "plugins": ((), "The run sets its own, which keeps checkpoints safe to load."),
    "enable_checkpointing": ((), "Remove callbacks of yours to save less; best and resume are needed."),
    "enable_progress_bar": ((), "A bar is shown on terminals."),
    "barebones": ((False,), "Without logging and checkpoints a run has no result."),
    "overfit_batches": ((0, 0.0), "Validation would use training images. Set trainer.limit_train_batches."),
    "val_check_interval": ((None, 1.0), "Every validation belongs to an epoch. Set trainer.check_val_every_n_epoch."),
    "max_time": ((None,), "How far a run gets would depend on the machine. Set trainer.max_epochs or max_steps."),
    "reload_dataloaders_every_n_epochs": ((0,), "A resumed run could not continue inside an epoch."),
    "limit_predict_batches": ((None, 1.0), "Training predicts nothing."),
    "inference_mode": ((True,), "Validation needs no gradients."),
    "model_registry": ((None,), "Checkpoints stay in the run directory."),
}
"""Trainer arguments that would break what a run promises → values that are harmless, and the reason or alternative."""


def check_trainer(trainer: Settings) -> None:
    """Check the trainer's settings against what a run supports.

    Raises:
        ConfigError: names the key, and the supported alternative if there is one.
    """
    for key, (harmless, reason) in REFUSED_BY_TRAINER.items():
        # Types are compared as well: val_check_interval=1 means one batch and 1.0 an epoch.
        if key in trainer and not any(
            trainer[key] == value and isinstance(trainer[key], type(value)) for value in harmless
        ):
            expected = " or ".join(map(format_value, harmless)) or "no such key"
            raise invalid_value(f"trainer.{key}", trainer[key], expected, reason)
    if isinstance(strategy := trainer.get("strategy"), str) and strategy not in STRATEGIES:
        raise invalid_value("trainer.strategy", strategy, f"one of: {', '.join(STRATEGIES)}")
    if str(trainer.get("strategy")).startswith("ddp") and trainer.get("use_distributed_sampler", True):
        raise invalid_value(
            "trainer.use_distributed_sampler", True, "false", "The loaders split the batches. Set trainer=ddp."
        )
    if trainer.get("max_epochs", -1) in (None, -1) and trainer.get("max_steps", -1) == -1:
        raise invalid_value("trainer.max_epochs", trainer.get("max_epochs"), "a whole number ≥ 1, or a max_steps")


def check_monitors(watching: Settings) -> None:
    """Check that monitored metrics are logged, and that ``mode`` does not keep their worst value.

    Args:
        watching: dotted key → settings of an object that may monitor a metric.

    Raises:
        ConfigError: names the key.
    """
    for path, settings in watching.items():
        parameters = inspect.signature(locate(path, settings["_target_"])).parameters if settings else {}
        by_default = parameters["monitor"].default if "monitor" in parameters else None
        if settings.get("_target_") == PLATEAU:  # which has no such argument
            by_default = "val/loss"
        monitor = settings.get("monitor", by_default)
        if not isinstance(monitor, str):  # none, or required and reported as missing
            continue
        logged = LOGGED_BEFORE_SAVING if settings["_target_"] in AFTER_VALIDATION else MONITORS
        if monitor not in logged:
            raise ConfigError(
                f"{path}.monitor={monitor} is invalid: it is never logged{' in time' * (monitor in MONITORS)}."
                f"{did_you_mean(monitor, logged)}\nLogged: {', '.join(logged)}."
            )
        best = "max" if "/acc" in monitor else "min" if "/" in monitor else None
        mode = settings.get("mode", parameters["mode"].default if "mode" in parameters else best)
        if best and mode != best:
            plus, origin = ("", "") if "mode" in settings else ("+", " (the default)")
            fix = f"It would keep the worst {monitor}. Set {plus}{path}.mode={best}"
            raise invalid_value(f"{path}.mode", f"{mode}{origin}", best, fix)


def check_augment(augment: Settings) -> None:
    """Check that every step names a transform, and that ``none`` is not among several options of ``augment``.

    Its class would ignore the others' steps.

    Raises:
        ConfigError: names the steps.
    """
    steps = [name for name, value in augment.items() if isinstance(value, dict)]
    settings = [name for name in steps if "_target_" not in augment[name]]
    if settings and augment.get("_target_") in ("torch.nn.Identity", "alexnet_pl.data.Compose"):
        path = f"augment.{settings[0]}"
        hint = remains_of_experiment(f"augment.{name}" for name in settings)
        raise ConfigError(f"{path}={augment[settings[0]]} is invalid: expected a transform with a _target_.{hint}")
    if augment.get("_target_") == "torch.nn.Identity" and steps:
        raise ConfigError(
            f"augment=none is invalid with the steps {', '.join(steps)}: expected none alone, or a list without it."
        )


WARMUP_PLATEAU, PLATEAU = "alexnet_pl.training.WarmupPlateau", "torch.optim.lr_scheduler.ReduceLROnPlateau"


def check_warmup(scheduler: Settings, optimizer: Settings, max_epochs: int | None) -> None:
    """Check that the linear warm-up of a schedule ends within the run, which would never reach ``optimizer.lr``.

    ``WarmupPlateau``'s begins at ``warmup_lr``, and an optimizer whose learning rate is not above that has none. In a
    run that ``trainer.max_steps`` ends, the schedule checks it once the number of images is known.

    Raises:
        ConfigError: names the key and the number of epochs.
    """
    epochs = scheduler.get("warmup_epochs")
    if not isinstance(epochs, int | float):  # its type is checked with the others
        return
    if scheduler.get("_target_") == WARMUP_PLATEAU:
        start, rate = scheduler.get("warmup_lr", 0.01), optimizer.get("lr")
        if not (isinstance(start, int | float) and isinstance(rate, int | float) and start < rate):
            return
    if max_epochs is not None and 1 <= max_epochs < epochs:
        raise invalid_value("scheduler.warmup_epochs", epochs, f"at most {max_epochs}, the trainer.max_epochs")


def check_device(trainer: Settings) -> None:
    """Check that this machine has the accelerator and the devices, and that a CPU is not asked for float16.

    Raises:
        ConfigError: names the key, its value and what is available.
    """
    wanted, devices, precision = (trainer.get(key) for key in ("accelerator", "devices", "precision"))
    known = {"cuda": CUDAAccelerator, "mps": MPSAccelerator, "cpu": CPUAccelerator}
    present = [name for name, accelerator in known.items() if accelerator.is_available()]
    names = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if wanted is not None and wanted not in names:
        raise invalid_value(
            "trainer.accelerator", wanted, f"one of: {', '.join(names)}", did_you_mean(str(wanted), names).strip()
        )
    choices = {None: present, "auto": present, "gpu": [name for name in present if name != "cpu"]}
    found = choices.get(wanted, [name for name in present if name == wanted])
    if not found and wanted in ("gpu", *known):
        reason = f"torch {torch.__version__} finds no such device here."
        raise invalid_value("trainer.accelerator", wanted, f"one of: {', '.join(['auto', *present])}", reason)
    if not found:  # an accelerator that only Lightning knows
        return
    try:
        parsed = known[found[0]].parse_devices(1 if devices in (None, "auto") else devices)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer.devices={devices} is invalid on {found[0]}: {one_line(error)}") from error
    most = max(16, 2 * (os.cpu_count() or 1))  # more ranks than cores only slow each other down
    if found[0] == "cpu" and isinstance(parsed, int) and parsed > most:
        raise invalid_value("trainer.devices", devices, f"at most {most} ranks on this machine's cores")
    if found[0] == "cpu" and trainer.get("sync_batchnorm"):
        raise invalid_value("trainer.sync_batchnorm", True, "false on a CPU", "Torch has it for GPUs only.")
    if found[0] == "cpu" and str(precision) in ("16", "16-mixed"):
        raise invalid_value("trainer.precision", precision, "auto, bf16-mixed or 32-true on a CPU")


def rehearse_optimizer(settings: Settings) -> None:
    """Create the optimizer and the schedule for the real network, so that torch refuses now what it refuses later.

    The network is built on the meta device, without memory for its weights. First comes a single weight on the CPU,
    because the meta device has no fused optimizers.

    Raises:
        ConfigError: with torch's reason, which names the value.
    """
    section = "optimizer"
    unfused = {key: value for key, value in settings["optimizer"].items() if key != "fused"}
    try:
        for optimizer, weights in (
            ({**settings["optimizer"], "layers": {}}, [("weight", nn.Parameter(torch.zeros(1, 1)))]),
            (unfused, _meta_weights(settings)),
        ):
            if weights:
                made = optimizer_factory(instantiate(optimizer))(weights)
        section = "scheduler"
        if (schedule := schedule_factory(instantiate(settings.get(section)))) is not None:
            schedule(made)
    except (InstantiationException, ConfigError):
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        target = settings[section]["_target_"]
        raise ConfigError(f"{section}._target_={target} is invalid: {one_line(error)}") from error


def _meta_weights(settings: Settings) -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters of the configured network on the meta device; none if it cannot be built there."""
    model = {**copy.deepcopy(settings["model"])}
    if "image_size" in model:
        model["image_size"] = settings["data"]["image_size"]
    try:
        with torch.device("meta"):
            weights = [*instantiate(model).named_parameters()]
    except (InstantiationException, ConfigError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if cause is not None:  # an invalid argument of one of our networks
            raise cause from None
        return []  # a network of the user's own may need real tensors to be built
    return [] if any(isinstance(weight, UninitializedParameter) for _, weight in weights) else weights


# --- ranks and directories ------------------------------------------------------------------------------------------


def refuse_in_sweep(trainer: Mapping[str, Any]) -> None:
    """Refuse distributed training in a sweep, whose trials run in one process each.

    Raises:
        ConfigError: this process is one of several ranks, or the trainer asks for several.
    """
    devices = trainer.get("devices", 1)
    if trainer.get("strategy") == "ddp" and devices in ("auto", -1):
        devices = torch.cuda.device_count()
    count = devices if isinstance(devices, int) else len(devices.split(",") if isinstance(devices, str) else devices)
    count = max(count * trainer.get("num_nodes", 1), get_world().size)
    if count > 1:
        raise ConfigError(
            f"{count} ranks are invalid in a sweep (-m): each of them would run the whole sweep. "
            "Give every trial one device, or start the trials one by one."
        )


def check_processes(cfg: DictConfig, group: World) -> None:
    """Check that the world size matches the config.

    Raises:
        ConfigError: several nodes without torchrun or srun; another world size than was started; a batch that the
            ranks cannot split; ranks with different run directories.
    """
    count, local = processes(cfg), group.local_size
    if is_launched() and count != group.size:
        raise ConfigError(
            f"the world size is {group.size}, but trainer.devices × trainer.num_nodes is {count}. Set "
            f"trainer=ddp, and omit both or set trainer.devices={local} trainer.num_nodes={group.size // local}."
        )
    if not is_launched() and cfg.trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes} is invalid: expected 1, or a start by torchrun or srun. "
            "See docs/scaling.md."
        )
    if cfg.data.batch_size % count:
        raise ConfigError(
            f"data.batch_size={cfg.data.batch_size} is invalid: expected a multiple of the {count} ranks, because it "
            "counts the images of all of them."
        )
    if (first := broadcast_from_rank0("run_dir", str(cfg.run_dir))) != str(cfg.run_dir):
        raise ConfigError(f"rank {group.rank} has the run directory {cfg.run_dir}, and rank 0 {first}.")


def refuse_used_folder(run_dir: Path) -> None:
    """Refuse a directory that holds a run already: the files of both runs would mix.

    Raises:
        ConfigError: the directory is in use.
    """
    if (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"{run_dir} already holds a run.\n"
            f"Resume it with {hydra_override('resume', run_dir)}, or choose another hydra.run.dir, "
            "or run_dir if the config is that of a run."
        )


def refuse_unwritable(run_dir: Path) -> None:
    """Refuse a run directory that cannot be written, now instead of at the first checkpoint.

    Raises:
        ConfigError: names the directory and the reason.
    """
    parent = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{parent} cannot be written ({error.strerror}), so a run there would be lost.\n"
            "Choose another hydra.run.dir."
        ) from error
