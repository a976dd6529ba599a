"""Resolution of a config: what ``auto`` stands for on this machine, and settings that follow from others."""

import logging
import os
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from alexnet_pl.config.torch_internals import has_bf16_instructions
from alexnet_pl.distributed.environment import get_world, is_launched
from alexnet_pl.runtime.cpu_load import cores_in_use_by_others, free_cores
from alexnet_pl.runtime.system import usable_cores

log = logging.getLogger(__name__)

FAST_EPOCHS = 2
"""Epochs of a run with ``trainer.fast_dev_run``: the second one shows that an epoch can follow another."""

MIXED_PRECISION = ("16-mixed", "bf16-mixed", "16", "bf16", 16)


def resolve_auto(cfg: DictConfig) -> None:
    """Replace, in place, every value that depends on the machine or on other keys, so that config.yaml is complete.

    - ``data``: paths become absolute, because a run may be resumed from another directory.
    - ``model.image_size`` becomes ``data.image_size``.
    - ``trainer.fast_dev_run`` becomes limits on epochs, batches and neighbor images; see :func:`shorten`.
    - ``trainer.devices``, ``trainer.precision`` and ``channels_last``: ``auto`` becomes what suits the machine.
    - ``optimizer.fused=true`` becomes false if the trainer clips gradients in mixed precision.
    """
    with open_dict(cfg):
        cfg.model.image_size = cfg.data.image_size
        for key in ("root", "shards", "cache"):
            if (path := cfg.data.get(key)) is not None and "://" not in path:
                cfg.data[key] = str(Path(path).expanduser().absolute())
        shorten(cfg)
        if cfg.trainer.get("devices") in ("auto", -1):
            group = get_world()
            if group.size > 1:
                cfg.trainer.num_nodes = group.size // group.local_size
            gpus = torch.cuda.device_count() if on_cuda(cfg.trainer.accelerator) else 1
            cfg.trainer.devices = group.local_size if is_launched() else gpus
        if cfg.trainer.precision == "auto":
            cfg.trainer.precision = default_precision(cfg.trainer.accelerator)
        if cfg.channels_last == "auto":
            cfg.channels_last = cfg.trainer.precision in MIXED_PRECISION and on_cuda(cfg.trainer.accelerator)
        unfuse_if_clipped(cfg)


def unfuse_if_clipped(cfg: DictConfig) -> None:
    """Set ``optimizer.fused`` to false, in place, if the trainer clips gradients in mixed precision.

    A fused optimizer unscales gradients inside its step, so Lightning cannot clip them before it.
    """
    clips = cfg.trainer.get("gradient_clip_val") and cfg.trainer.precision in MIXED_PRECISION
    if clips and cfg.optimizer.get("fused"):
        cfg.optimizer.fused = False


def resolve_threads(cfg: DictConfig) -> None:
    """Replace ``threads=auto``, in place, by the number of torch's threads that suits the machine and its load now.

    It is that of ``OMP_NUM_THREADS`` if it is set. Else it is torch's own (one per core), less one for each core that
    other programs keep busy, if the run computes on the CPU. Not a part of :func:`resolve_auto`, because a run that
    resumes keeps the number it has.
    """
    if cfg.get("threads") != "auto":
        return
    threads = torch.get_num_threads()
    if on_cpu(cfg.trainer.accelerator) and threads > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores, used = usable_cores(), cores_in_use_by_others()
        if (free := free_cores(used, cores)) < threads:
            log.info(f"threads {free} of {threads}: other programs keep {used:.1f} of {cores} cores busy")
            threads = free
    with open_dict(cfg):
        cfg.threads = threads


def shorten(cfg: DictConfig) -> None:
    """Apply ``trainer.fast_dev_run=N`` (true: 1): at most two epochs of N batches per split, whatever else is set.

    Unlike in Lightning, checkpoints, loggers and the test are kept, because a smoke run is to exercise them as well.
    The key becomes false, so that the trainer does not apply its own meaning.
    """
    batches = int(cfg.trainer.get("fast_dev_run") or 0)
    if batches == 0:
        return
    trainer = cfg.trainer
    trainer.fast_dev_run = False
    epochs = trainer.get("max_epochs")
    trainer.max_epochs = FAST_EPOCHS if epochs in (None, -1) else min(epochs, FAST_EPOCHS)
    for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        limit = trainer.get(key)
        trainer[key] = min(limit, batches) if type(limit) is int else batches  # a fraction may leave no batch
    warmup = (cfg.get("scheduler") or {}).get("warmup_epochs")
    if isinstance(warmup, int | float):
        cfg.scheduler.warmup_epochs = min(warmup, trainer.max_epochs)
    for callback in (cfg.get("callbacks") or {}).values():
        if callback.get("num_neighbor_images"):
            callback.num_neighbor_images = min(callback.num_neighbor_images, batches * cfg.data.batch_size)


def drop_disabled(cfg: DictConfig) -> None:
    """Remove callbacks and loggers that are null, as in ``callbacks.dashboard=null``."""
    for section in ("callbacks", "logger"):
        for name in [name for name, entry in (cfg.get(section) or {}).items() if entry is None]:
            with open_dict(cfg):
                del cfg[section][name]


def on_cuda(accelerator: str) -> bool:
    """Return True if ``trainer.accelerator`` selects a CUDA GPU on this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def on_cpu(accelerator: str) -> bool:
    """Return True if ``trainer.accelerator`` selects the CPU on this machine."""
    automatic = accelerator == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    return accelerator == "cpu" or automatic


def processes(cfg: DictConfig) -> int:
    """Return the world size, ``devices`` × ``num_nodes`` of the trainer, after :func:`resolve_auto`."""
    devices = cfg.trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = int(devices) if devices.isdecimal() else devices.split(",")
    return (devices if isinstance(devices, int) else len(devices)) * int(cfg.trainer.get("num_nodes", 1))


def default_precision(accelerator: str) -> str:
    """Return ``16-mixed`` for a CUDA GPU, ``bf16-mixed`` for a CPU with bf16 instructions, ``32-true`` otherwise.

    A CPU without AMX or AVX512-bf16 emulates bf16, many times slower than float32. The same holds for one whose
    instruction set is capped by ``ONEDNN_MAX_CPU_ISA``, because the kernels follow the cap.
    """
    if on_cuda(accelerator):
        return "16-mixed"
    return "bf16-mixed" if on_cpu(accelerator) and has_bf16_instructions() else "32-true"
