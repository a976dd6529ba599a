"""training.weights."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from alexnet_pl.models.alexnet import from_torchvision
from alexnet_pl.training.checkpoint_io import BEST, CheckpointError, read_checkpoint

TORCHVISION = "torchvision"
"""The word that stands for torchvision's ImageNet weights in ``init_from``."""


# --- weights --------------------------------------------------------------------------------------------------------


def differing_keys(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, list[str]]:
    """Which names of two state dicts do not fit: ``missing``, ``unexpected`` and ``mis-shaped``, with shapes."""
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
    """The network's own entries of a checkpoint's state dict."""
    return {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}


def check_fit(net: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another network.

    Raises:
        CheckpointError: with the names that do not fit.
    """
    differing = _listed(differing_keys(net.state_dict(), network_weights(checkpoint)))
    if differing:
        raise CheckpointError(f"{path} is of another network: {differing}")


def warm_start(net: nn.Module, source: str) -> str:
    """Load the weights that fit from elsewhere, and say which do not.

    Args:
        source: a checkpoint, a run folder for its best one, a file with a state dict alone, or ``torchvision`` for
            torchvision's AlexNet trained on ImageNet. The names of ``torchvision.models.alexnet`` are understood.

    Returns:
        One line for the log.

    Raises:
        CheckpointError: nothing fits, the file cannot be read, or the weights not be downloaded.
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
    """The ImageNet weights of ``torchvision.models.alexnet``, downloaded once into torch's cache and verified.

    Returns:
        The file and its state dict, under torchvision's names.

    Raises:
        CheckpointError: no network, or a damaged download.
    """
    url = AlexNet_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        weights = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"init_from={TORCHVISION}: {url} could not be downloaded to {path}, or is damaged there: {reason}\n"
            "Remove that file if there is one, or bring the file from elsewhere: init_from=FILE."
        ) from error
    return path, weights


def _listed(differing: dict[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differing.items() if names)
