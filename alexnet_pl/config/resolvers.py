"""What ``${…}`` can compute in conf/. Without torch, which train.py loads only once there is something to run."""

from omegaconf import OmegaConf

PAPER_BATCH = 128


def scale_lr(lr: float, batch_size: int) -> float:
    """The linear scaling rule (Goyal et al. 2017, section 2.1): ``lr`` belongs to the paper's batches of 128 images.

    In YAML: ``lr: ${scale_lr:0.01,${data.batch_size}}`` is 0.01 at 128 and 0.08 at 1,024.
    """
    return lr * (batch_size / PAPER_BATCH)


def register_resolvers() -> None:
    """Make them known to OmegaConf; a second call changes nothing."""
    OmegaConf.register_new_resolver("scale_lr", scale_lr, replace=True)
