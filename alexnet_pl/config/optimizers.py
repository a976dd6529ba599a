"""Optimizer in a config: parameter groups with their own learning rate and weight decay, by the names of parameters."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from alexnet_pl.runtime.errors import ConfigError, did_you_mean, invalid_value

NamedParameters = Iterable[tuple[str, nn.Parameter]]

GROUPING = ("decay_biases_and_norms", "bias_lr_multiplier", "layers")
"""Keys of the section ``optimizer`` that divide the parameters into groups; the others are the constructor's."""

LAYER_KEYS = ("lr_multiplier", "weight_decay")
"""Keys of an entry in ``optimizer.layers``."""


@dataclass(frozen=True)
class Grouping:
    """Division of the parameters into groups. The defaults make a single group, as ``torch.optim`` does by itself.

    Attributes:
        decay_biases_and_norms: False exempts biases and normalization layers from weight decay.
        bias_lr_multiplier: learning rate of the biases relative to ``optimizer.lr``, above 0; 2 in 2012.
        layers: pattern → ``lr_multiplier`` (0 or more) and ``weight_decay`` of the matching layers, of their weights
            only if biases and normalization are exempt. A pattern (:mod:`fnmatch`) matches the name of a layer or
            parameter or the end of one after a dot: ``conv1``, ``features.conv1`` and ``conv[12]`` match
            ``features.conv1.weight``. The last matching pattern counts. An empty entry changes nothing, but gives the
            layer groups of its own, for ``scheduler.layers``.
    """

    decay_biases_and_norms: bool = True
    bias_lr_multiplier: float = 1.0
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.bias_lr_multiplier < float("inf"):
            raise invalid_value("optimizer.bias_lr_multiplier", self.bias_lr_multiplier, "a number above 0")
        for pattern, settings in self.layers.items():
            path = f"optimizer.layers.{pattern}"
            if not isinstance(settings, Mapping):
                raise invalid_value(path, settings, f"a mapping with {' or '.join(LAYER_KEYS)}")
            for key, value in settings.items():
                if key not in LAYER_KEYS:
                    raise ConfigError(f"{path}.{key}={value} is invalid: no such key.{did_you_mean(key, LAYER_KEYS)}")
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                    raise invalid_value(f"{path}.{key}", value, "a number ≥ 0")


def kind(name: str, parameter: nn.Parameter) -> str:
    """Return ``biases``, ``norms`` (vectors that are no biases: the scales of normalization layers) or ``weights``."""
    if name.rpartition(".")[2] == "bias":
        return "biases"
    return "norms" if parameter.ndim <= 1 else "weights"


def matches(name: str, pattern: str) -> bool:
    """Return True if ``pattern`` matches the parameter ``name`` or its layer, or the end of either after a dot."""
    layer = name.rpartition(".")[0]
    ends = (whole.split(".", cut)[-1] for whole in (name, layer) if whole for cut in range(whole.count(".") + 1))
    return any(fnmatchcase(end, pattern) for end in ends)


def convolution_groups(net: nn.Module) -> dict[torch.Tensor, int]:
    """Return the number of groups of each convolution that has several, by its weight, if that is a parameter."""
    found = (module for module in net.modules() if isinstance(module, nn.Conv2d))
    return {each.weight: each.groups for each in found if each.groups > 1 and isinstance(each.weight, nn.Parameter)}


def parameter_groups(
    named: NamedParameters, lr: float, weight_decay: float, grouping: Grouping, weights_apart: bool = False
) -> list[dict[str, Any]]:
    """Divide parameters into groups of equal learning rate and weight decay; pure, a function of names and shapes.

    Args:
        named: names and parameters.
        lr: learning rate of a parameter that no rule concerns.
        weight_decay: weight decay of such a parameter.
        weights_apart: never put weights into one group with biases or norms; ``are_weights`` says which a group holds.

    Returns:
        Groups ``{"params", "lr", "weight_decay", "name"}``, those at the full rate first, otherwise in the order of
        ``named``. ``name`` is unique and joins what the group holds: ``weights``, ``biases, norms``, ``conv1 weights``.

    Raises:
        ConfigError: a pattern that matches no parameter, or a weight decay of parameters that are exempt.
    """
    named = list(named)
    for pattern, settings in grouping.layers.items():
        found = {kind(name, parameter) for name, parameter in named if matches(name, pattern)}
        if settings.get("weight_decay") and found and "weights" not in found and not grouping.decay_biases_and_norms:
            raise invalid_value(
                f"optimizer.layers.{pattern}.weight_decay",
                settings["weight_decay"],
                "weights, but only biases or normalization match, which optimizer.decay_biases_and_norms=false exempts",
            )
        if not found:
            layers = dict.fromkeys(name.split(".")[-2] for name, _ in named if "." in name)
            raise ConfigError(
                f"optimizer.layers.{pattern} is invalid: no layer matches.{did_you_mean(pattern, layers)}"
            )
    groups: dict[tuple[float, float, str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        label, multiplier, decay = _rule(name, parameter, weight_decay, grouping)
        is_weight = kind(name, parameter) == "weights"
        empty = {"params": [], "lr": lr * multiplier, "weight_decay": decay, "name": []}
        if weights_apart:
            empty["are_weights"] = is_weight
        own = label if grouping.layers.get(label.rpartition(" ")[0]) == {} else ""
        group = groups.setdefault((multiplier, decay, own, weights_apart and is_weight), empty)
        group["params"].append(parameter)
        group["name"] += [label] * (label not in group["name"])
    ordered = sorted(groups.items(), key=lambda item: item[0][0] != 1)
    return [{**group, "name": ", ".join(group["name"])} for _, group in ordered]


def _rule(name: str, parameter: nn.Parameter, weight_decay: float, grouping: Grouping) -> tuple[str, float, float]:
    """Return the label of a parameter, the multiplier of its learning rate, and its weight decay."""
    label = kind(name, parameter)
    pattern = next((pattern for pattern in reversed([*grouping.layers]) if matches(name, pattern)), None)
    layer = {} if pattern is None else grouping.layers[pattern]
    multiplier, decay = layer.get("lr_multiplier", 1.0), layer.get("weight_decay", weight_decay)
    if label != "weights" and not grouping.decay_biases_and_norms:
        decay = 0.0
    if label == "biases":
        multiplier *= grouping.bias_lr_multiplier
    return label if pattern is None else f"{pattern} {label}", float(multiplier), float(decay)


@dataclass(frozen=True)
class OptimizerFactory:
    """An optimizer as configured, to be created for a network.

    Attributes:
        make: creates the optimizer from parameters or parameter groups.
        grouping: how the parameters are grouped.
    """

    make: Any  # a class or functools.partial: typed calls are impossible because each optimizer has its own arguments
    grouping: Grouping = Grouping()

    def __call__(self, named: NamedParameters, parts: Mapping[torch.Tensor, int] | None = None) -> Optimizer:
        """Create the optimizer for named parameters. With the default grouping it receives them as a plain list.

        Args:
            named: names and parameters.
            parts: :func:`convolution_groups` of the network, for an optimizer that takes weights for matrices.

        Raises:
            ConfigError: a pattern that matches no parameter.
        """
        optimizer: Optimizer
        weights_apart = getattr(getattr(self.make, "func", self.make), "weights_apart", False)
        if self.grouping == Grouping() and not weights_apart:
            optimizer = self.make([parameter for _, parameter in named])
        else:
            defaults = self.make([nn.Parameter(torch.zeros(1, 1))]).defaults
            decay = defaults.get("weight_decay", 0.0)
            optimizer = self.make(parameter_groups(named, defaults["lr"], decay, self.grouping, weights_apart))
        if weights_apart and parts:
            optimizer.parts = dict(parts)  # type: ignore[attr-defined]  # Muon's
        return optimizer


def optimizer_factory(configured: Any) -> OptimizerFactory:
    """Separate the keys in ``GROUPING`` from an instantiated ``optimizer`` section.

    Args:
        configured: the ``functools.partial`` that Hydra makes of the section, or any callable.

    Raises:
        ConfigError: a value of those keys is invalid.
    """
    if isinstance(configured, OptimizerFactory):
        return configured
    if not isinstance(configured, functools.partial):
        return OptimizerFactory(configured)
    given = {key: value for key, value in configured.keywords.items() if key in GROUPING and value is not None}
    if OmegaConf.is_config(layers := given.get("layers")):
        given["layers"] = OmegaConf.to_container(layers)
    keywords = {key: value for key, value in configured.keywords.items() if key not in GROUPING}
    return OptimizerFactory(functools.partial(configured.func, *configured.args, **keywords), Grouping(**given))


def discards_state(keys: Iterable[str]) -> bool:
    """Return True if a change of these config keys leaves no use for the state of the optimizer, its momentum.

    It belongs to parameters by their position in the groups, so another optimizer or other groups cannot load it.
    """
    return any(key.startswith(f"optimizer.{name}") for key in keys for name in ("_target_", *GROUPING))
