"""config.resolve."""

from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from alexnet_pl.distributed.environment import get_world, is_launched


def resolve_auto(cfg: DictConfig) -> None:
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
            group = get_world()
            if group.size > 1:
                cfg.trainer.num_nodes = group.size // group.local_size
            gpus = torch.cuda.device_count() if on_cuda(cfg.trainer.accelerator) else 1
            cfg.trainer.devices = group.local_size if is_launched() else gpus
        if cfg.trainer.precision == "auto":
            cfg.trainer.precision = default_precision(cfg.trainer.accelerator)
        if cfg.channels_last == "auto":
            cfg.channels_last = cfg.trainer.precision in ("16-mixed", "bf16-mixed") and on_cuda(cfg.trainer.accelerator)


def on_cuda(accelerator: str) -> bool:
    """Whether ``trainer.accelerator`` comes to a CUDA GPU on this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def processes(cfg: DictConfig) -> int:
    """``devices`` × ``num_nodes`` of the trainer, once :func:`resolve_auto` has replaced ``auto``."""
    devices = cfg.trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = int(devices) if devices.isdecimal() else devices.split(",")
    return (devices if isinstance(devices, int) else len(devices)) * cfg.trainer.get("num_nodes", 1)


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
