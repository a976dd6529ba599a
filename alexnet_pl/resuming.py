"""Going on with a run in its folder, and starting a new one from another's weights."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from alexnet_pl.alexnet import from_torchvision
from alexnet_pl.checkpoints import BEST, CheckpointError, read_checkpoint
from alexnet_pl.errors import ConfigError
from alexnet_pl.validation import check_targets

ABOUT_RESUMING = ("resume", "resume_with_changes", "run_dir", "study")
"""Keys that say how a run is called, not what it computes."""

PLACES = ("data.root",)
"""Keys that say where something lies: a resumed run takes them as they are now, and is no other run for it."""

TORCHVISION = "torchvision"
"""The word that stands for torchvision's ImageNet weights in ``init_from``."""

Changes = dict[str, tuple[Any, Any]]


def saved_config(run_dir: Path) -> DictConfig:
    """The configuration that a run was started with, its paths adapted to where the folder lies now.

    Raises:
        ConfigError: ``run_dir`` is no run folder, or its config.yaml is damaged or names what it may not.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume={run_dir} is no run folder: it has no config.yaml.")
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        before = plain["run_dir"]
    except Exception as error:  # yaml's and OmegaConf's own, and a key that is not there
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    check_targets(plain)
    return OmegaConf.create(_relocated(plain, before, str(run_dir)))


def _relocated(node: Any, before: str, now: str) -> Any:
    if isinstance(node, dict):
        return {key: _relocated(value, before, now) for key, value in node.items()}
    if isinstance(node, list):
        return [_relocated(value, before, now) for value in node]
    if isinstance(node, str) and (node == before or node.startswith(before + "/")):
        return now + node.removeprefix(before)
    return node


def named_on_the_command_line() -> list[str]:
    """Keys and groups that were set beside ``resume``, such as ``optimizer.lr`` and ``model/norm``."""
    if not HydraConfig.initialized():
        return []
    keys = [override.split("=", 1)[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    return [key for key in keys if key not in ABOUT_RESUMING]


def changes(saved: DictConfig, now: DictConfig, named: Sequence[str]) -> Changes:
    """What the settings ``named`` on the command line would change: key → (before, now).

    Args:
        saved: the run's configuration.
        now: the one composed from the command line, settled.
        named: keys or groups; a group stands for all keys in it, ``experiment`` for all there are.
    """
    before, after = _leaves(saved), _leaves(now)
    prefixes = [name.replace("/", ".") for name in named]
    everything = "experiment" in prefixes
    return {
        key: (before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
        and key not in ABOUT_RESUMING
        and (everything or any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes))
    }


def _leaves(config: DictConfig) -> dict[str, Any]:
    """``{"optimizer.lr": 0.001, …}``; a list counts as one value."""
    found = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(value, f"{path}.{key}" if path else str(key))
        else:
            found[path] = node

    visit(OmegaConf.to_container(config, resolve=True), "")
    return found


def move(saved: DictConfig, changed: Changes) -> Changes:
    """Put the changes of ``PLACES`` into ``saved``; what is left of the changes is another matter."""
    for key in PLACES:
        if key in changed:
            OmegaConf.update(saved, key, changed[key][1])
    return {key: change for key, change in changed.items() if key not in PLACES}


def apply_changes(saved: DictConfig, changed: Changes, allowed: bool) -> None:
    """Put the changes into ``saved``.

    Raises:
        ConfigError: changes that were not allowed, or that make it another network, with the keys.
    """
    listed = ", ".join(f"{key} ({before} → {now})" for key, (before, now) in changed.items())
    if changed and not allowed:
        raise ConfigError(
            f"resume would change {listed}.\nLeave these out to go on as before, or allow them with "
            "resume_with_changes=true (the learning-rate schedule then starts anew)."
        )
    if network := [key for key in changed if key.startswith("model.")]:
        raise ConfigError(
            f"resume cannot change the network: {', '.join(network)}. Start a new run, with init_from=… if you like."
        )
    for key, (_, now) in changed.items():
        OmegaConf.update(saved, key, now, force_add=True)


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
