"""Composition of configs outside ``alexnet train``: directories of options, overrides from Python."""

import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from alexnet_pl.config.hydra_versions import VERSION_BASE
from alexnet_pl.config.resolvers import register_resolvers, run_folder
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import ConfigError, user_errors

_PACKAGE = Path(__file__).resolve().parents[1]

CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""Directory of the options: ``alexnet_pl/conf`` as installed from a wheel, ``conf`` in a checkout."""

OWN_OPTIONS = "ALEXNET_PL_CONF"
"""Environment variable with the user's own directory of options, which ``conf/train.yaml`` searches after ``CONF``."""

_HYDRA_RESOLVERS = ("now", "hydra", "python_version")

_LOCK = threading.Lock()


# --- directories of options -----------------------------------------------------------------------------------------


def own_options_dir() -> Path | None:
    """Return the directory for a user's own options on every checkout and installation; it may not exist.

    ``$XDG_CONFIG_HOME/alexnet_pl``, by default ``~/.config/alexnet_pl``; on Windows ``%APPDATA%/alexnet_pl``. None for
    a user without a home directory.
    """
    base = os.environ.get("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME")
    try:
        return (Path(base) if base else Path.home() / ".config") / "alexnet_pl"
    except RuntimeError:
        return None


def find_own_options() -> None:
    """Point ``OWN_OPTIONS`` at :func:`own_options_dir` if that exists and the user has not set the variable.

    Subprocesses, such as the workers of a launcher, inherit it. A home directory of another user, as in a container
    started with ``--user``, has no options for this one.
    """
    directory = own_options_dir()
    if OWN_OPTIONS not in os.environ and directory is not None and os.path.isdir(directory):
        os.environ[OWN_OPTIONS] = str(directory)


# --- overrides from Python ------------------------------------------------------------------------------------------


def as_list(overrides: Sequence[str]) -> list[str]:
    """Return overrides as a list.

    Raises:
        ConfigError: they are one text, whose letters would be taken for overrides.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides} is invalid: expected a list of text, such as [{overrides!r}].")
    return [*overrides]


def add_or_set(override: str) -> str:
    """Return ``+key.of.a.section=value`` with ``++``, which sets the key if it exists already.

    Lightning's trainer keys are set that way in every recipe for Hydra, whether or not this project's config has them.
    """
    return re.sub(r"^\+(?=[\w-]+\.[^=/@]*=)", "++", override)


_ONE_OPTION = re.compile(
    r"\+{0,2}((?:data|loss|model|optimizer|scale|scheduler|trainer)(?:/\w+)*)=(\[.*|.*,\s*\[.*)", re.DOTALL
)
"""Override of a group that has one option at a time with a list of options."""


def refuse_lists(overrides: Sequence[str]) -> None:
    """Refuse a list of options where one is expected: Hydra would merge them into an object that nobody described.

    Raises:
        ConfigError: names the override and what it may have meant.
    """
    for override in overrides:
        if found := _ONE_OPTION.fullmatch(override):
            group, value = found.groups()
            options = re.sub(r"[\[\]\s]", "", value)
            raise ConfigError(
                f"{group}={value} is invalid: expected one option, because several would be merged into one. To train "
                f"with every one of them: -m {group}={options}, or alexnet_pl.study. Lists are for augment, callbacks "
                "and logger."
            )


_AUGMENT = re.compile(r"\+{0,2}augment=(.*)", re.DOTALL)


def refuse_same_steps(overrides: Sequence[str]) -> None:
    """Refuse a list of options of ``augment`` that set the same step: the last one would win, and undo the other.

    Raises:
        ConfigError: names the options and the step.
    """
    values = [found.group(1) for override in overrides if (found := _AUGMENT.fullmatch(override))]
    for options in re.findall(r"\[([^\[\]]*)\]", " ".join(values)):  # several in a sweep
        owners: dict[str, str] = {}
        for option in filter(None, re.split(r"[\s,'\"]+", options)):
            for step in sorted(_steps(option)):
                if (other := owners.setdefault(step, option)) != option:
                    raise ConfigError(
                        f"augment=[{options}] is invalid: {other} and {option} both set augment.{step}, and the last "
                        "one would win. Expected one of them."
                    )


def _steps(option: str) -> set[str]:
    """Return the names of the steps of an option of ``augment``, with those of the options it inherits from."""
    folders = [CONF / "augment", *(Path(own) / "augment" for own in filter(None, [os.environ.get(OWN_OPTIONS)]))]
    path = next((path for folder in folders if (path := folder / f"{option}.yaml").is_file()), None)
    if path is None:  # Hydra says so
        return set()
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        return set()
    inherited = [name for name in content.get("defaults", ()) if isinstance(name, str) and name != "_self_"]
    own = {str(key) for key, value in content.items() if isinstance(value, dict)}
    return own.union(*map(_steps, inherited))


def to_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as Hydra overrides; a nested mapping sets the keys below its own.

    ``{"model": "lenet5", "trainer": {"max_epochs": 2}, "trust": ["nets"]}`` becomes ``model=lenet5``,
    ``trainer.max_epochs=2`` and ``trust=[nets]``.
    """
    overrides: list[str] = []
    for key, given in settings.items():
        value = _plain(given)
        if isinstance(value, Mapping):
            overrides += to_overrides({f"{key}.{name}": below for name, below in value.items()})
        else:
            overrides.append(f"{key}={_value(value)}")
    return overrides


def to_sweep(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the overrides of a sweep: as :func:`to_overrides`, but over the values of each list."""
    overrides: list[str] = []
    for key, given in settings.items():
        value = _plain(given)
        if isinstance(value, Mapping):
            overrides += to_sweep({f"{key}.{name}": below for name, below in value.items()})
        else:
            overrides.append(f"{key}={','.join(map(_value, value if isinstance(value, list | tuple) else [value]))}")
    return overrides


def config_dir_arguments(config_dir: str | os.PathLike[str] | None) -> list[str]:
    """Return the command-line arguments that add a directory of options."""
    return [] if config_dir is None else ["--config-dir", os.fspath(config_dir)]


def _plain(value: Any) -> Any:
    """Return ranges, and the arrays and scalars of NumPy, torch and pandas, as lists and numbers; others unchanged."""
    if isinstance(value, range):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _value(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    plain = _plain(value)
    if isinstance(plain, list | tuple):
        return f"[{','.join(map(_value, plain))}]"
    return hydra_override("", plain)[1:]


# --- composition ----------------------------------------------------------------------------------------------------


def compose(
    overrides: Sequence[str] = (), *, config_dir: str | os.PathLike[str] | None = None, **settings: Any
) -> DictConfig:
    """Return the config that ``alexnet train`` would run with these overrides, ready for ``alexnet_pl.train``.

    Values may be changed afterwards; interpolations such as ``data.image_size: ${model.image_size}`` follow them. Hydra
    is left as it was found: another application in this process is not disturbed, nor is a later call.

    Args:
        overrides: as on the command line: ``["model=alexnet_bn", "trainer.max_epochs=3"]``.
        config_dir: directory with options of your own, laid out as ``conf/``, as ``--config-dir`` on the command line.
        settings: overrides as keywords, applied last: ``model="lenet5"``, ``trainer={"max_epochs": 3}`` or
            ``**{"trainer.max_epochs": 3}``.

    Raises:
        ConfigError: an unknown key or option, a list of options where one is expected, an override that cannot be
            parsed, or a directory that is not found.
    """
    given = [*map(add_or_set, as_list(overrides)), *to_overrides(settings)]
    refuse_lists(given)
    with user_errors():
        refuse_same_steps(given)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(
                f"config_dir={config_dir} not found. Give a directory with options, such as model/*.yaml."
            )
        given.append(_search_path(Path(config_dir)))
    register_resolvers()
    with _private_hydra(), user_errors():
        return _compose(given)


def name_run_dir(cfg: DictConfig) -> None:
    """Give a config a run directory of its own, ``runs/<time>``, if it leaves the name to Hydra but Hydra does not run.

    That is a config from Hydra's own ``compose``; :func:`compose` has named the directory already.
    """
    register_resolvers()
    if OmegaConf.is_interpolation(cfg, "run_dir") and not HydraConfig.initialized():
        cfg.run_dir = run_folder(cfg.resume, f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")


def _search_path(config_dir: Path) -> str:
    """Return the override that adds a directory of options to the user's own."""
    directories = [os.environ.get(OWN_OPTIONS), str(config_dir.absolute())]
    return f"hydra.searchpath=[{','.join(_value(each) for each in directories if each)}]"


def _compose(overrides: list[str]) -> DictConfig:
    """Compose the config, name its run directory, and resolve what refers to Hydra, which does not outlive the call."""
    with initialize_config_dir(str(CONF), job_name="train", **VERSION_BASE):
        cfg = hydra_compose("train", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with read_write(cfg.hydra), open_dict(cfg.hydra):
        cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    _resolve_references_to_hydra(cfg, OmegaConf.to_container(cfg, resolve=False))
    return cfg


def _resolve_references_to_hydra(node: DictConfig | ListConfig, plain: Any) -> None:
    """Replace ``${hydra:…}``, ``${now:…}`` and ``${python_version:…}`` by their values.

    Args:
        plain: the node as plain dicts and lists with unresolved text.
    """
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
        if isinstance(value, dict | list):
            _resolve_references_to_hydra(node[key], value)
        elif isinstance(value, str) and re.search(rf"\$\{{\s*({'|'.join(_HYDRA_RESOLVERS)})\s*:", value):
            node[key] = node[key]


@contextmanager
def _private_hydra() -> Iterator[None]:
    """Hand Hydra's global state to the block as if it were new, and restore it afterwards. One thread at a time."""
    with _LOCK:
        own = OWN_OPTIONS in os.environ
        job, version = JobRuntime.instance(), VersionBase.instance()
        before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg, job.conf.copy(), version.version_base
        new_resolvers = [name for name in _HYDRA_RESOLVERS if not OmegaConf.has_resolver(name)]
        find_own_options()
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra, HydraConfig.instance().cfg, job.conf, version.version_base = before
            for name in new_resolvers:
                OmegaConf.clear_resolver(name)
            if not own:
                os.environ.pop(OWN_OPTIONS, None)
