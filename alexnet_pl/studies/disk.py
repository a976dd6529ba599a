"""Disk space of a study: an estimate before it starts, from the number of parameters and the files a run keeps."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

BYTES_PER_WEIGHT = 4
"""best.ckpt holds float32 weights, whatever the precision of training."""

RESUME_COPIES = 2 * 3
"""latest.ckpt and previous.ckpt, each with the weights and up to two moments per weight (Adam)."""

OTHER_BYTES = 6_000_000
"""Figures, report, TensorBoard events and log of a run, rounded up."""


def parameter_count(cfg: DictConfig) -> int | None:
    """Return the number of parameters of the config's network, or None if it cannot be built.

    The network is built on torch's meta device, which allocates no memory.
    """
    import torch  # here for start-up time: reports never load it

    from alexnet_pl.config.hydra_versions import instantiate

    try:
        with torch.device("meta"):
            return int(sum(parameter.numel() for parameter in instantiate(cfg.model).parameters()))
    except Exception:  # an invalid model is reported by its trial, in the trial's own words
        return None


def disk_estimate(root: Path, configs: Mapping[str, DictConfig], parallel: int = 1) -> tuple[str, str]:
    """Return how much disk space a study's unfinished trials take, and a warning if the disk has less ("" otherwise).

    Args:
        root: the study's directory; it may not exist yet.
        configs: config hash → config of each trial that has yet to finish.
        parallel: trials that run at the same time, each of which needs room for its resume checkpoints.

    Returns:
        One line each, or "" if there is nothing to say: no trials, or no network that can be built.
    """
    counts: dict[str, int | None] = {}
    sizes = []
    for cfg in configs.values():
        key = OmegaConf.to_yaml(cfg.model, resolve=True)
        if key not in counts:
            counts[key] = parameter_count(cfg)
        if (count := counts[key]) is not None:
            sizes.append((BYTES_PER_WEIGHT * count, bool(OmegaConf.select(cfg, "callbacks.resume.keep"))))
    if not sizes:
        return "", ""
    kept = sum(best * (1 + RESUME_COPIES * keep) + OTHER_BYTES for best, keep in sizes)
    scratch = sum(sorted((RESUME_COPIES * best for best, keep in sizes if not keep), reverse=True)[:parallel])
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    line = f"disk: about {size(kept)} for {len(sizes)} trials"
    line += f", and {size(scratch)} for resume checkpoints while they run" if scratch else ""
    warning = ""
    if free < kept + scratch:
        warning = (
            f"warning: {existing} has {size(free)} free, less than the {size(kept + scratch)} this study may need. "
            "Free some space or choose another directory: hydra.sweep.dir=DIR"
        )
    return f"{line}; {size(free)} free", warning


def size(count: int) -> str:
    """Return a number of bytes for people: ``86 MB``, ``1.6 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(round(count / 1e6), 1)} MB"
