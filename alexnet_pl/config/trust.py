"""Allow-list for configs from run directories and checkpoints: which classes an untrusted ``_target_`` may name."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning
from lightning import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from alexnet_pl.config.schema import HYDRA_KEYS, locate
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.run_folder import MAX_DEPTH

LIGHTNING_CALLBACKS = (
    "DeviceStatsMonitor", "EarlyStopping", "EMAWeightAveraging", "LearningRateMonitor", "ModelSummary",
    "RichModelSummary", "RichProgressBar", "Timer", "TQDMProgressBar",
)  # fmt: skip
"""Lightning's callbacks that write no files. ModelCheckpoint, for one, writes wherever its ``dirpath`` points."""

LIGHTNING_LOGGERS = ("CSVLogger", "TensorBoardLogger")
"""Lightning's loggers that open no connection."""

DATA_MODULES = (
    "CIFAR100DataModule", "CIFAR10DataModule", "DigitsDataModule", "FashionMNISTDataModule", "ImageFolderDataModule",
    "ImagenetteDataModule", "KMNISTDataModule", "MNISTDataModule", "STL10DataModule", "SVHNDataModule",
    "ShardedDataModule",
)  # fmt: skip

MAX_VALUES = 200_000
"""Number of values in a foreign config; a checkpoint's may hold 22,000 class names."""

MAX_NUMBER = 1024
"""Largest number in a foreign augmentation: pixels of padding, a side, a kernel. Memory grows with its square."""

MAX_SUM = 4 * MAX_NUMBER
"""Largest sum of the numbers in a foreign augmentation, whose steps may each add pixels."""

ENLARGING = ("RandomZoomOut", "ScaleJitter")
"""torchvision's transforms with a factor in place of a size, which enlarge an image without bound."""

Allowed = dict[str, tuple[type, tuple[str, ...] | None]]


class Slot(NamedTuple):
    """One top-level section of a config.

    Attributes:
        allowed: module → base class and names; every public subclass of the base in that module if names is None.
        depth: nesting of a ``_target_`` below the section; None for any.
        places: key inside the section → what may stand there in place of ``allowed``.
    """

    allowed: Allowed
    depth: int | None
    places: dict[str, Allowed] = {}


_LIBRARIES = ("alexnet_pl", "hydra", "lightning", "numpy", "omegaconf", "torch", "torchmetrics", "torchvision")

_MORE = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.nn", "torchvision.models")
"""Modules of libraries with names that a user may have good reason to trust: ModelCheckpoint, WandbLogger, resnet18."""

TORCHVISION_NETWORKS = (
    "AlexNet", "DenseNet", "GoogLeNet", "Inception3", "MNASNet", "MobileNetV2", "ShuffleNetV2", "SqueezeNet",
    "SwinTransformer", "VisionTransformer",
)  # fmt: skip
"""torchvision's networks that plain values describe; others expect layers or classes as arguments."""

ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid",
    "Mish", "PReLU", "ReLU", "ReLU6", "RReLU", "SELU", "Sigmoid", "SiLU", "Softplus", "Softshrink", "Softsign", "Tanh",
    "Tanhshrink", "Threshold",
)  # fmt: skip
"""torch's elementwise functions, which keep the size of a feature map."""

NORMS = ("BatchNorm2d", "GroupNorm", "Identity", "InstanceNorm2d", "LocalResponseNorm", "SyncBatchNorm")
"""torch's normalization layers of feature maps."""

POOLS = ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "Identity", "LPPool2d", "MaxPool2d")

_LAYERS: Allowed = {"torch.nn": (nn.Module, None)}

_NORMS: Allowed = {
    "torch.nn": (nn.Module, NORMS),
    "alexnet_pl.models": (nn.Module, ("LocalResponseNorm", "SpatialResponseNorm")),
}

_IN_MODEL: dict[str, Allowed] = {
    "activation": {"torch.nn": (nn.Module, ACTIVATIONS)},
    "norm": _NORMS,
    "cnorm2": _NORMS,
    "pool": {
        "torch.nn": (nn.Module, POOLS),
        "alexnet_pl.models": (nn.Module, ("NonOverlappingMaxPool2d", "OverlappingMaxPool2d")),
    },
}

SLOTS = {
    "model": Slot(
        {
            **_LAYERS,
            "alexnet_pl.models": (nn.Module, None),
            "torchvision.models": (nn.Module, TORCHVISION_NETWORKS),
        },
        None,
        _IN_MODEL,
    ),
    "augment": Slot(
        {
            "torch.nn": (nn.Module, ("Identity", "Sequential")),
            "alexnet_pl.data": (nn.Module, None),
            "torchvision.transforms.v2": (nn.Module, None),
        },
        None,
    ),
    "data": Slot({"alexnet_pl.data": (LightningDataModule, DATA_MODULES)}, 0),
    "loss": Slot({"torch.nn": (nn.Module, ("CrossEntropyLoss",))}, 0),
    "optimizer": Slot({"torch.optim": (Optimizer, None), "alexnet_pl.training": (Optimizer, None)}, None),
    "scheduler": Slot(
        {"torch.optim.lr_scheduler": (LRScheduler, None), "alexnet_pl.training": (LRScheduler, None)}, None
    ),
    "trainer": Slot(
        {name: (lightning.Trainer, ("Trainer",)) for name in ("alexnet_pl.training", "lightning", "lightning.pytorch")},
        0,
    ),
    "callbacks": Slot(
        {
            "alexnet_pl.training": (Callback, None),
            "lightning.pytorch.callbacks": (Callback, LIGHTNING_CALLBACKS),
        },
        1,
    ),
    "logger": Slot(
        {"alexnet_pl.training": (Logger, None), "lightning.pytorch.loggers": (Logger, LIGHTNING_LOGGERS)}, 1
    ),
}
"""Top-level key → what its ``_target_`` keys may name. No other key of a foreign config may hold a ``_target_``."""


def check_targets(config: Any, trust: Sequence[str] = ()) -> None:
    """Refuse a config from a run directory or checkpoint that could do more than build a run.

    Each section may only name the classes of its entry in ``SLOTS``, as one name inside one of the listed modules.
    That is decided by the text of the name; a module that is not listed is never imported and no attribute of
    another module is reached. Interpolations are refused because a run directory holds resolved values, and
    ``${oc.create:…}`` could add a ``_target_`` that nobody has checked.

    Args:
        config: plain dicts and lists, or a ``DictConfig``; it is read, never instantiated.
        trust: modules (``my_module``) or full names (``torchvision.models.resnet18``) that the user allows in
            addition: what those modules define themselves, not what they import.

    Raises:
        ConfigError: names the key and the refused value, or the limit that the config exceeds.
    """
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    sums: dict[str, float] = {}
    for path, value in walk(plain):
        key, name = path[-1], ".".join(map(str, path))
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{name} is refused: it holds a null character.")
        is_large = isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER  # also NaN
        if is_large and _section(path) == "augment" and not names_trusted(plain, trust):
            raise ConfigError(f"{name}={value} is refused: expected numbers up to {MAX_NUMBER} in an augmentation.")
        if isinstance(value, int | float) and _section(path) == "augment":  # steps that enlarge an image add up
            total = sums[str(path[0])] = sums.get(str(path[0]), 0) + max(0, value)
            if total > MAX_SUM and not names_trusted(plain, trust):
                raise ConfigError(
                    f"{name}={value} is refused: expected numbers up to {MAX_SUM} in total in augmentations."
                )
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{name}={value} is refused: the config of a run directory has no interpolations.")
        if key == "_target_" and not (_is_trusted(value, trust) or _is_allowed(path, value)):
            raise ConfigError(_refusal(path, value))
        if isinstance(key, str) and re.fullmatch("_.*_", key) and key not in HYDRA_KEYS:
            raise ConfigError(f"{name} is refused: Hydra keys are {', '.join(HYDRA_KEYS)}.")


def names_trusted(config: Any, trust: Sequence[str]) -> bool:
    """Return True if a ``_target_`` in ``config`` names what the user trusts, which is exempt from limits on sizes."""
    return any(path[-1] == "_target_" and _is_trusted(value, trust) for path, value in walk(config))


def refused_targets(config: Any) -> list[str]:
    """Return the names in a config that :func:`check_targets` refuses without trust, each once."""
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    named = ((path, value) for path, value in walk(plain) if path[-1] == "_target_")
    return [*dict.fromkeys(str(value) for path, value in named if not _is_allowed(path, value))]


def walk(root: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of every entry below ``root``, iteratively and within the limits.

    Raises:
        ConfigError: too deep or too many entries, which a list that contains itself is as well.
    """
    stack: list[tuple[tuple[Any, ...], Any]] = [((), root)]
    count = 0
    while stack:
        path, node = stack.pop()
        if path:
            yield path, node
        if isinstance(node, dict):
            entries = [((*path, key), value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            entries = [((*path, index), value) for index, value in enumerate(node)]
        else:
            continue
        count += len(entries)
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{'.'.join(map(str, path[:4]))}… is nested more than {MAX_DEPTH} levels deep.")
        if count > MAX_VALUES:
            raise ConfigError(f"the config has more than {MAX_VALUES:,} values.")
        stack += reversed(entries)


def _slot(path: tuple[Any, ...]) -> tuple[str, int]:
    """Return the section that a ``_target_`` belongs to and how deep it is nested below it."""
    section = path[1:] if path[:2] == ("data", "augment") else path  # the data module receives the augmentation
    return str(section[0]), len(section) - 2


def _section(path: tuple[Any, ...]) -> str:
    """Return the section that an entry belongs to."""
    return "augment" if path[:2] == ("data", "augment") else str(path[0])


def _allowed_at(path: tuple[Any, ...]) -> Allowed:
    """Return what a ``_target_`` at ``path`` may name, which may depend on the key that holds it."""
    slot = SLOTS[_slot(path)[0]]
    return slot.places.get(str(path[-2]), slot.allowed) if len(path) > 2 else slot.allowed


def _is_allowed(path: tuple[Any, ...], target: Any) -> bool:
    """Return True if the ``_target_`` at ``path`` may name ``target`` by the rules of its section."""
    section, depth = _slot(path)
    if section not in SLOTS or not isinstance(target, str):
        return False
    allowed = _allowed_at(path)
    module, _, name = target.rpartition(".")
    if module not in allowed or SLOTS[section].depth not in (None, depth):
        return False
    base, names = allowed[module]
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name, re.ASCII) or (names is not None and name not in names):
        return False
    found = vars(importlib.import_module(module)).get(name)  # one of the modules listed above
    if not inspect.isclass(found) or not issubclass(found, base) or name in ENLARGING:
        return False
    return found.__module__ == module or found.__module__.startswith(f"{module}.")


def _is_trusted(target: Any, trust: Sequence[str]) -> bool:
    """Return True if the user trusts ``target``: by its full name, or as defined in a module that they named."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", target, re.ASCII):
        return False
    if target in trust:
        return True
    for module in trust:
        if target.startswith(f"{module}."):
            home = getattr(locate("_target_", target), "__module__", None) or ""
            return home == module or home.startswith(f"{module}.")
    return False


def _refusal(path: tuple[Any, ...], target: Any) -> str:
    """Return the message for a refused ``_target_``: what may stand there and how to allow more."""
    name = ".".join(map(str, path))
    section, depth = _slot(path)
    message = f"{name}={target} is refused: the config of a run directory or checkpoint may not name it."
    if section in SLOTS:
        slot = SLOTS[section]
        if slot.depth is None or depth == slot.depth:
            classes = [
                f"{module} ({', '.join(names)})" if names else module
                for module, (_, names) in _allowed_at(path).items()
            ]
            message += f" Expected a class of {', '.join(classes)}."
    if isinstance(target, str) and re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target, re.ASCII):
        module = target.rpartition(".")[0]
        library = target.partition(".")[0] in (*sys.stdlib_module_names, *_LIBRARIES)
        if not library or module in _MORE:
            code = target if library else module
            message += f"\nIf you trust {code}: --trust {code}, for train trust=[{code}]."
    return message
