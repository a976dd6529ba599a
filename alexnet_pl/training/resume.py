"""Going on with a run in its folder, and starting a new one from another's weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.config.trust import check_targets
from alexnet_pl.runtime.errors import ConfigError

ABOUT_RESUMING = ("resume", "allow_changes", "run_dir", "study")
"""Keys that say how a run is called, not what it computes."""

PLACES = ("data.root",)
"""Keys that say where something lies: a resumed run takes them as they are now, and is no other run for it."""

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


def diff_configs(saved: DictConfig, now: DictConfig, named: Sequence[str]) -> Changes:
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


def apply_path_changes(saved: DictConfig, changed: Changes) -> Changes:
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
            "allow_changes=true (the learning-rate schedule then starts anew)."
        )
    if network := [key for key in changed if key.startswith("model.")]:
        raise ConfigError(
            f"resume cannot change the network: {', '.join(network)}. Start a new run, with init_from=… if you like."
        )
    for key, (_, now) in changed.items():
        OmegaConf.update(saved, key, now, force_add=True)
