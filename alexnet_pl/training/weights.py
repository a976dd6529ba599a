"""Initial weights: warm starts from a run, checkpoint or torchvision, and the comparison of state dicts."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from alexnet_pl.models.alexnet import from_torchvision
from alexnet_pl.runtime.errors import one_line
from alexnet_pl.training.checkpoint_io import BEST, CheckpointError, read_checkpoint

TORCHVISION = "torchvision"
"""Value of ``init_from`` for torchvision's ImageNet weights."""


def differing_keys(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, list[str]]:
    """Return the names in which two state dicts differ: ``missing``, ``unexpected`` and ``mis-shaped``, with shapes."""
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    return {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": shapes,
    }


def network_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the network's entries of a checkpoint's state dict, without their prefix; all of a file that has none.

    A loss with class weights is the other module that may have entries.
    """
    states = checkpoint["state_dict"]
    of_run = {name.removeprefix("net."): value for name, value in states.items() if name.startswith("net.")}
    return of_run or dict(states)


def check_fit(net: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint is of this network.

    Raises:
        CheckpointError: with the names that differ.
    """
    differing = _listed(differing_keys(net.state_dict(), network_weights(checkpoint)))
    if differing:
        raise CheckpointError(f"{path} is of another network: {differing}")


def warm_start(net: nn.Module, source: str) -> str:
    """Load the weights of another network whose names and shapes match, and report the others.

    Args:
        source: a checkpoint, a run directory for its best checkpoint, a file that is only a state dict, or
            ``torchvision`` for torchvision's AlexNet trained on ImageNet. The names of ``torchvision.models.alexnet``
            are translated.

    Returns:
        One line for the log.

    Raises:
        CheckpointError: nothing matches, the file is not readable, or the download failed.
    """
    if source == TORCHVISION and not Path(source).exists():
        path, weights = download_torchvision()
    else:
        path = Path(source) / "checkpoints" / BEST if Path(source).is_dir() else Path(source)
        weights = network_weights(read_checkpoint(path, bare=True))
    weights, own = from_torchvision(weights), net.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    differing = _listed(differing_keys(own, weights))
    if not fitting:
        raise CheckpointError(f"init_from={source} has no weights for this network: {differing}")
    net.load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of {len(own)} weights from {path}" + (f"; {differing}" if differing else "")


def download_torchvision() -> tuple[Path, dict[str, Tensor]]:
    """Return the ImageNet weights of ``torchvision.models.alexnet``, downloaded once into torch's cache and verified.

    Returns:
        The file and its state dict, with torchvision's names.

    Raises:
        CheckpointError: no network connection, or a corrupt download.
    """
    url = AlexNet_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        weights = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(
            f"init_from={TORCHVISION}: {url} could not be downloaded to {path}, or is corrupt there: {reason}\n"
            "Remove that file if it exists, or copy it from elsewhere: init_from=FILE."
        ) from error
    return path, weights


def _listed(differing: dict[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differing.items() if names)
