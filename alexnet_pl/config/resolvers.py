"""OmegaConf resolvers for conf/; imports no torch, which train.py loads only when there is something to run."""

from omegaconf import OmegaConf

PAPER_BATCH = 128


def scale_lr(lr: float, batch_size: int) -> float:
    """Scale a learning rate for batches of 128 images linearly to ``batch_size`` (Goyal et al. 2017, section 2.1).

    In YAML, ``lr: ${scale_lr:0.01,${data.batch_size}}`` is 0.01 at 128 images per batch and 0.08 at 1,024.
    """
    return lr * (batch_size / PAPER_BATCH)


def register_resolvers() -> None:
    """Register the resolvers with OmegaConf; a second call changes nothing."""
    OmegaConf.register_new_resolver("scale_lr", scale_lr, replace=True)
